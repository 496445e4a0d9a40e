"""Quantised linear: y = x W^T + b, W kept as 8-bit numbers with one float32 scale per output row.

    stored (out, in) float8 e4m3 or int8, scale (out, 1) float32; W = stored * scale; x and y stay 16 or 32 bits

fp8, int8: half the bytes of bfloat16. Each forward dequantises W into a temporary, and so does the backward, which
gives the gradient of x (for LoRA on top) and of the bias; autograd keeps no dequantised copy. The result is that of a
linear with the dequantised weight, to the bit.

w8a8: fp8 weights, and every row of x becomes fp8 with a scale of its own (`Rows8`), so that tensor cores multiply 8
bits by 8, twice as fast as bfloat16. The norm before a linear emits such rows itself. It has no backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LARGEST = {"fp8": 448.0, "int8": 127.0, "w8a8": 448.0}


def quantise_rows(x, kind):
    """x (..., in) -> stored (..., in), scale (..., 1) float32: each row's largest value becomes the kind's."""
    if kind not in LARGEST:
        raise ValueError(f"quantise_rows: {kind!r}, expected one of {', '.join(LARGEST)}")
    x, largest = x.detach().float(), LARGEST[kind]
    scale = x.abs().amax(dim=-1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    if kind == "int8":
        return (x / scale).round().to(torch.int8), scale
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


class Rows8(NamedTuple):
    """Activations in 8 bits: stored (B, L, D) float8 e4m3, scale (B, L, 1) float32, and the dtype that they had."""

    stored: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x):
        return x if isinstance(x, Rows8) else cls(*quantise_rows(x, "w8a8"), x.dtype)


def product8_plain(x: Rows8, stored, scale):
    """(x W^T), (B, L, D) and W (out, D) in 8 bits -> (B, L, out)."""
    return F.linear(dequantise(*x), dequantise(stored, scale, x.dtype))


def product8(x: Rows8, stored, scale):
    """The same by cuBLASLt's scaled product (on a CPU by oneDNN's), which accumulates 8-bit products in float32."""
    if x.dtype != torch.bfloat16:  # it gives nothing else
        return product8_plain(x, stored, scale)
    rows, factors = x.stored.flatten(0, -2), x.scale.flatten(0, -2)
    y = torch._scaled_mm(rows, stored.T, factors, scale.T, out_dtype=x.dtype)
    return y.unflatten(0, x.stored.shape[:-1])


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

    def __init__(self, stored, scale, bias=None, products8=False):
        """scale: (out, 1), or one number for the whole weight; bias (out,). products8: multiply in 8 bits, too."""
        super().__init__()
        self.products8 = products8
        self.out_features, self.in_features = stored.shape
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale.float().reshape(-1, 1).repeat(len(stored) // scale.numel(), 1))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    @classmethod
    def from_linear(cls, linear, kind):
        return cls(*quantise_rows(linear.weight, kind), linear.bias, kind == "w8a8")

    @property
    def weight(self):
        """The dequantised weight, float32."""
        return dequantise(self.stored, self.scale, torch.float32)

    def forward(self, x):
        """x (B, L, in), or `Rows8` of it where `products8` -> (B, L, out)."""
        weight = self.stored, self.scale
        y = product8(Rows8.of(x), *weight) if self.products8 else Matmul.apply(x, *weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        def kept(tensor):
            probe = fn(tensor[:0])
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(lambda tensor: fn(tensor) if tensor is self.bias else kept(tensor), recurse)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.stored.dtype}"
