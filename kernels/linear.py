"""Weight-only quantised linear: y = x W^T + b, W kept as 8-bit numbers with one float32 scale per output row.

    stored (out, in) float8 e4m3 or int8, scale (out, 1) float32; W = stored * scale; x and y stay 16 or 32 bits

Half the bytes of bfloat16. Each forward dequantises W into a temporary, and so does the backward, which gives the
gradient of x (for LoRA on top) and of the bias; autograd keeps no dequantised copy. The result is, to the bit, that
of a linear with the dequantised weight.
"""

import torch
import torch.nn.functional as F
from torch import nn

KINDS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}  # dtype and largest value


def quantise_rows(weight, kind):
    """weight (out, in) -> stored (out, in), scale (out, 1) float32: each row's largest value becomes the kind's."""
    if kind not in KINDS:
        raise ValueError(f"quantise_rows: {kind!r}, expected one of {', '.join(KINDS)}")
    dtype, largest = KINDS[kind]
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    stored = weight / scale
    return (stored.round() if kind == "int8" else stored.clamp(-largest, largest)).to(dtype), scale


def dequantise(stored, scale, dtype):
    return (stored.float() * scale).to(dtype)


class Matmul(torch.autograd.Function):
    """x W^T, W dequantised in both directions."""

    @staticmethod
    def forward(ctx, x, stored, scale):
        ctx.save_for_backward(stored, scale)
        return F.linear(x, dequantise(stored, scale, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantise(*ctx.saved_tensors, grad.dtype), None, None


class QuantLinear(nn.Module):
    """nn.Linear with a frozen 8-bit weight; `.to(dtype)` moves `stored` and `scale` and casts the bias alone."""

    def __init__(self, stored, scale, bias=None):
        """scale: (out, 1), or one number for the whole weight; bias (out,)."""
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale.float().reshape(-1, 1).repeat(len(stored) // scale.numel(), 1))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    @classmethod
    def from_linear(cls, linear, kind):
        return cls(*quantise_rows(linear.weight, kind), linear.bias)

    @property
    def weight(self):
        """The dequantised weight, float32."""
        return dequantise(self.stored, self.scale, torch.float32)

    def forward(self, x):
        y = Matmul.apply(x, self.stored, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        def kept(tensor):
            probe = fn(tensor[:0])
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(lambda tensor: fn(tensor) if tensor is self.bias else kept(tensor), recurse)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.stored.dtype}"
