"""The few operations on which a DiT step spends its time, each with its plain PyTorch twin.

`dit.py` and `vae.py` call the functions below and never ask about hardware; `set_backend`, or KIWI_KERNELS=sdpa in the
environment of any command, chooses what they run:
    "ref"     the definitions in plain PyTorch
    "sdpa"    PyTorch's fused attention; the rest as "ref"
    "cudnn"   cuDNN's attention; the rest as "ref"
    "slices"  attention by slices of the batch; the rest as "ref"
    "triton"  our kernels
    "hopper"  our Gluon attention for Hopper; the rest as "triton"
    "auto"    on a CPU "sdpa", and "slices" to train in bfloat16 on short sequences; on a GPU our kernels, and of the
              attentions in CANDIDATES the fastest, timed once
`linear.py` has 8-bit weights, `conv.py` the VAE's convolutions. transformers probes for a package named `kernels`,
hence `__version__`; importing it imports neither triton nor CUDA.
"""

import math
import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from kernels import norm
from kernels.attention import (
    SLICE,
    attention_cudnn,
    attention_ref,
    attention_sdpa,
    attention_slices,
    attention_triton,
    left_out,
)
from kernels.hopper import attention_hopper

__version__ = "0.0"
ATTENTION = {
    "ref": attention_ref,
    "sdpa": attention_sdpa,
    "cudnn": attention_cudnn,
    "slices": attention_slices,
    "triton": attention_triton,
    "hopper": attention_hopper,
}
CANDIDATES = ("triton", "sdpa", "cudnn")  # of "auto" on a GPU
BACKENDS = ("auto", *ATTENTION)
backend = "auto"
fastest = {}  # (device, dtype, heads, head_dim, whether it trains) -> name of an attention, measured


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v; q (B, Lq, H, d), k and v (B, Lk, H, d) -> (B, Lq, H, d)."""
    return ATTENTION[choose(q, measured=True)](q, k, v)


def rms_norm_rope(x, weight, rope, num_heads, eps):
    """RMSNorm over the full width, then 3D RoPE per head: x (B, L, H d) -> (B, L, H, d).

    rope: cos and sin, each (L, d/2) float32, or None (the norm alone).
    """
    run = norm.rms_norm_rope_triton if choose(x) == "triton" else norm.rms_norm_rope_plain
    return run(x, weight, rope, num_heads, eps)


def layer_norm_modulate(x, shift, scale, eps, rows8=False):
    """layer_norm(x) * (1 + scale) + shift; x (B, L, D), shift and scale (B, 1, D). rows8: as `linear.Rows8`."""
    run = norm.layer_norm_modulate_triton if choose(x) == "triton" else norm.layer_norm_modulate_plain
    return run(x, shift, scale, eps, rows8)


def gate_residual(x, y, gate):
    """x + gate * y; x, y (B, L, D), gate (B, 1, D)."""
    return (norm.gate_residual_triton if choose(x) == "triton" else norm.gate_residual_plain)(x, y, gate)


def gate_residual_norm(x, y, gate, shift, scale, eps, rows8=False):
    """A residual and the norm after it: x' = x + gate * y, layer_norm_modulate(x', shift, scale, eps) -> both.

    gate None: x' = x + y. A LayerNorm with weight and bias has shift = bias, scale = weight.float() - 1.
    """
    run = norm.gate_residual_norm_triton if choose(x) == "triton" else norm.gate_residual_norm_plain
    return run(x, y, gate, shift, scale, eps, rows8)


def linear_gelu(x, linear):
    """gelu(x W^T + b), the tanh kind; x (B, L, in) -> (B, L, out). On a GPU GELU is the epilogue of cuBLASLt's product,
    which saves two passes over the widest tensor of a block."""
    plain = type(linear) is not nn.Linear or torch.is_grad_enabled() or not x.is_cuda
    if plain or choose(x) != "triton":
        return F.gelu(linear(x), approximate="tanh")
    y = torch.ops.aten._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.T, use_gelu=True)
    return y.unflatten(0, x.shape[:-1])


def channel_norm_silu(x, gamma, past=None):
    """silu(x / rms(x) * gamma), the mean square over the channels; x (B, C, T, H, W), gamma (C, 1, 1, 1).

    past: frames (B, C, P, H, W) to stand before it, as a causal convolution wants them -> (B, C, P + T, H, W).
    """
    run = norm.channel_norm_silu_triton if choose(x) == "triton" else norm.channel_norm_silu_plain
    return run(x, gamma, past)


def set_backend(name):
    """Choose one of BACKENDS for all functions above, from now on and for the whole process."""
    global backend
    if name not in BACKENDS:
        raise ValueError(f"{name!r} is no backend (KIWI_KERNELS, set_backend): expected one of {', '.join(BACKENDS)}")
    if name in ("triton", "hopper") and not find_spec("triton"):
        raise ImportError(f"set_backend({name!r}): triton is not installed; pip install triton, or take 'auto'")
    backend = name


def choose(x, measured=False):
    """The one place that asks for hardware: the backend of a tensor like x.

    measured: "auto" on a GPU takes the fastest attention; the rest are our kernels (one pass instead of several).
    """
    if backend == "triton" and x.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"set_backend('triton'), but the tensor is on {x.device}: Triton needs a GPU (or TRITON_INTERPRET=1 in the "
            "environment of Python, to interpret the kernels slowly); take 'auto'"
        )
    if backend == "hopper":
        if not on_hopper(x.device):
            raise RuntimeError(f"set_backend('hopper'), but {x.device} is no Hopper GPU; take 'auto'")
        return "hopper" if measured else "triton"
    if backend != "auto":
        return backend
    if x.is_cpu and x.dtype == torch.bfloat16 and measured and torch.is_grad_enabled():
        return "slices" if x.shape[1] ** 2 * x.shape[2] <= 8 * SLICE else "sdpa"
    ours = x.is_cuda and x.dtype != torch.float64 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    if not ours or not find_spec("triton"):
        return "sdpa"
    return fastest_attention(x.device, x.dtype, *x.shape[-2:]) if measured else "triton"


def on_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def fastest_attention(device, dtype, heads, head_dim):
    """Time the candidates once and say which is taken. torch.compile has no stopwatch: call once before compiling."""
    key = (device, dtype, heads, head_dim, torch.is_grad_enabled())
    if key not in fastest:
        if head_dim < 16 or head_dim & (head_dim - 1) or dtype == torch.float32:  # tensor cores do no exact float32
            return "sdpa"
        if torch.compiler.is_compiling():
            return "triton"
        times = {name: milliseconds(name, *key) for name in CANDIDATES}
        ran = [name for name, time in times.items() if time < math.inf]
        fastest[key] = min(ran, key=times.get, default="sdpa")  # a card that is full has no room for a stopwatch
        measured = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
        way = "forward and backward" if key[-1] else "forward"
        print(f"kernels: attention of {dtype}, {heads} heads of {head_dim}, {way}: {measured}; taking {fastest[key]}",
              flush=True)  # fmt: skip
    return fastest[key]


def milliseconds(name, device, dtype, heads, head_dim, trains):
    """Median over 8,192 tokens. Infinity if it fails; it says so."""
    with left_out(name), torch.cuda.device(device):
        from triton.testing import do_bench

        qkv = torch.randn(3, 1, 8192, heads, head_dim, device=device, dtype=dtype)
        return do_bench(lambda: run_alone(ATTENTION[name], qkv, trains), return_mode="median")
    return math.inf


def run_alone(function, qkv, trains):
    """An attention forward and, if it trains, backward, detached from the caller's graph: inside an activation
    checkpoint its saved tensors would be the checkpoint's, and its backward recompute a block that is half done."""
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.set_grad_enabled(trains), keep:
        leaves = [x.detach().requires_grad_(trains) for x in qkv]
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if trains else out


if os.environ.get("KIWI_KERNELS"):
    set_backend(os.environ["KIWI_KERNELS"])
