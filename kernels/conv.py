"""The VAE's convolutions, channels last: 3D ones by what a CPU does fastest, upsampling folded into its convolution.

    conv3d          x (B, C, T, H, W), weight (O, C, kt, kh, kw) -> F.conv3d
    upsample_conv   x (B, C, T, H, W), weight (O, C, 3, 3) -> the zero-padded 3x3 convolution of x at twice the size

Nearest upsampling repeats pixels, so each of the four output parities sees 2x2 different pixels under its 3x3 kernel:
four 2x2 convolutions of x itself, whose taps are sums of the 3x3 ones. 4/9 of the FLOPs and no enlarged input; in
bfloat16 the sums round once more (2.2e-3 instead of 1.7e-3 of the result, 256 channels).
"""

import math
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F


def conv3d(x, weight, bias, stride=(1, 1, 1), padding=(0, 0, 0)):
    """F.conv3d; on a CPU a matrix product or oneDNN by name.

    A few voxels under a large kernel are a matrix product: every library first copies the kernel, 113 MB at 1024
    channels, into a layout of its own (4x4x4 voxels on 2 cores: 30 ms against 97). For small float32 inputs torch
    takes an im2col loop of up to 20 times oneDNN's time (32 channels, 32x32x6: 23 ms against 1.1).
    """
    voxels = x.numel() // x.shape[1] // math.prod(stride)
    if x.is_cpu and voxels <= len(weight):
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)]).movedim(1, -1)  # (B, T, H, W, C)
        for axis, (size, step) in enumerate(zip(weight.shape[2:], stride), start=1):
            x = x.unfold(axis, size, step)  # ... (B, T', H', W', C, kt, kh, kw)
        patches = x.movedim(4, -1).flatten(4)
        return F.linear(patches, weight.movedim(1, -1).flatten(1), bias).movedim(-1, 1)
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def upsample_conv_plain(x, weight, bias):
    frames = x.transpose(1, 2).flatten(0, 1)  # CUDA enlarges pictures, not volumes, without leaving channels last
    x = F.interpolate(frames, scale_factor=2, mode="nearest").unflatten(0, (len(x), -1)).transpose(1, 2)
    return conv3d(x, weight[:, :, None], bias, padding=(0, 1, 1))


def parity_kernels(weight):
    """(O, C, 3, 3) -> (O, C, 1, 2, 2) for each (row, column) parity: 0 sees taps 0 | 1 + 2, 1 sees taps 0 + 1 | 2."""

    def halves(taps, axis):
        a, b, c = taps.unbind(axis)
        return torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)

    weight = weight.permute(0, 2, 3, 1)  # (O, 3, 3, C), as it lies in memory
    kernels = (((i, j), both) for i, row in enumerate(halves(weight, 1)) for j, both in enumerate(halves(row, 2)))
    return {parity: both.permute(0, 3, 1, 2)[:, :, None] for parity, both in kernels}


def folding_pays(x, weight):
    """On a CPU, few pixels do not pay for the sums of taps, nor few channels for four writes."""
    return not x.is_cpu or (x.numel() // x.shape[1] > len(weight) and x.shape[1] >= 96)


def upsample_conv(x, weight, bias, kept):
    """`upsample_conv_plain` as four convolutions, if that pays. kept: a dict that keeps their weights over calls."""
    if not folding_pays(x, weight):
        return upsample_conv_plain(x, weight, bias)
    B, _, T, H, W = x.shape
    kept.update({} if kept else parity_kernels(weight))
    out = x.new_empty(B, T, H, 2, W, 2, len(weight))
    padded = F.pad(x, (1, 1, 1, 1))
    for (i, j), kernel in kept.items():
        part = conv3d(padded[..., i : i + H + 1, j : j + W + 1], kernel, bias)
        out[:, :, :, i, :, j] = part.movedim(1, -1)
    return out.flatten(4, 5).flatten(2, 3).movedim(-1, 1)  # (B, O, T, 2 H, 2 W), channels last


@contextmanager
def fastest_convolutions():
    """cuDNN times its algorithms once per shape; not where deterministic ones are asked for."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
    warn_of_slow_conv3d(torch.__version__, cudnn.version() if torch.cuda.is_available() else None)
    try:
        yield
    finally:
        cudnn.benchmark = before


@lru_cache
def warn_of_slow_conv3d(version, cudnn):
    """torch 2.9 runs bfloat16 conv3d without cuDNN below 9.15, in 17 times the memory."""
    if version.startswith("2.9") and cudnn and cudnn < 91500:
        print(f"kernels: torch {version} with cuDNN {cudnn} runs bfloat16 conv3d in 17 times the memory: "
              "pip install 'nvidia-cudnn-cu12>=9.15', or another torch", flush=True)  # fmt: skip
