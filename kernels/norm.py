"""What a DiT block does between its matrix products, and a VAE block between its convolutions, in one pass over the
tokens or pixels each, float32 inside.

    rms_norm_rope         x (B, L, D) -> rope(x / rms(x) * weight) (B, L, H, d), the mean square over the full width
                          D = H d, then consecutive pairs turned by the angles of their position, as Wan does
    layer_norm_modulate   x -> layer_norm(x) * (1 + scale) + shift
    gate_residual         x, y -> x + gate * y
    gate_residual_norm    the last two in a row: x, y -> x' = x + gate * y, layer_norm_modulate(x')
    channel_norm_silu     x (B, C, T, H, W) -> silu(x / rms(x) * gamma), the mean square over the channels of a pixel,
                          written behind the frames that a causal convolution remembers

gate, shift, scale: (B, 1, D), or (1, 1, D) for all. Results have the dtype of x; rows8: the norm's are `linear.Rows8`.

Bytes per element of 16-bit x: 4 (read, write), gate_residual 6, gate_residual_norm 8 where the pair of them would move
10; about 10 FLOPs, so memory bandwidth is the limit: 34 us per pass over 18,480 x 3072 on an H100 (3.35 TB/s).
A program has one row in its registers, or some pixels of few channels. Backward, 512 programs take every 512th row
each and keep their share of the gradients of weight, gate, shift and scale in registers; the shares are summed at the
end, in the same order every time.
The idea of such fused rows is Liger Kernel's (arXiv 2410.10989).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from kernels.attention import hand_to_triton, operator
from kernels.linear import Rows8

triton = tl = None  # imported by `compiled` at the first launch: nobody on a CPU waits for them


def wide(x):
    """16 bits -> float32; what is wider stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_rope_plain(x, weight, rope, num_heads, eps):
    # The norm's factor goes into the rotation and the rotation is a complex product: two passes after the norm.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x[:0]).dtype)
    factor = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # (B, L, 1)
    if rope is None:
        return (x * (wide(weight) * factor)).to(x.dtype).unflatten(-1, (num_heads, -1))
    pairs = torch.view_as_complex((x * wide(weight)).contiguous().unflatten(-1, (num_heads, -1, 2)))  # (B, L, H, d/2)
    return torch.view_as_real(pairs * (torch.complex(*rope)[:, None] * factor[..., None])).flatten(-2).to(x.dtype)


def layer_norm_modulate_plain(x, shift, scale, eps, rows8=False):
    if rows8:
        return Rows8.of(layer_norm_modulate_plain(x, shift, scale, eps))
    width, kind = x.shape[-1:], torch.promote_types(x.dtype, torch.float32)
    shift, scale = shift.to(kind), 1 + scale.to(kind)
    if x.is_cpu and len(x) == len(shift) == 1:  # one pass: on a CPU a 16-bit layer norm takes float32 parameters
        return F.layer_norm(x, width, scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(wide(x), width, eps=eps), scale).to(x.dtype)


def gate_residual_plain(x, y, gate):
    return torch.addcmul(x, y, gate).to(x.dtype)


def gate_residual_norm_plain(x, y, gate, shift, scale, eps, rows8=False):
    x = x + y if gate is None else gate_residual_plain(x, y, gate)
    return x, layer_norm_modulate_plain(x, shift, scale, eps, rows8)


def channel_norm_silu_plain(x, gamma, past=None):
    y = F.silu(F.normalize(x, dim=1) * (gamma * len(gamma) ** 0.5))
    return y if past is None else torch.cat([past, y], dim=2)


def load_row(pointer, at, D: tl.constexpr):
    """A row as float32, zeros from D on."""
    return tl.load(pointer + at, mask=at < D, other=0.0).to(tl.float32)


def store_row(pointer, at, row, D: tl.constexpr):
    tl.store(pointer + at, row.to(pointer.dtype.element_ty), mask=at < D)


def rotate(row, cos, sin, position, D: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, SIGN: tl.constexpr):
    """Turn the consecutive pairs of every head (PAIRS of them) by the angles of a position, back for SIGN -1."""
    pair = tl.arange(0, BLOCK // 2)
    at = position * PAIRS + pair % PAIRS
    c = tl.load(cos + at, mask=pair < D // 2, other=1.0)
    s = tl.load(sin + at, mask=pair < D // 2, other=0.0) * SIGN
    a, b = tl.split(tl.reshape(row, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK,))


def normalised(row, at, eps, D: tl.constexpr, CENTRED: tl.constexpr):
    """row / rms(row), of the row less its mean if CENTRED, and the factor."""
    if CENTRED:
        row = tl.where(at < D, row - tl.sum(row, 0) / D, 0.0)
    factor = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
    return row * factor, factor


def rms_norm_rope_forward(x, weight, cos, sin, out, L, eps, D: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    u, _ = normalised(load_row(x + row * D, at, D), at, eps, D, False)
    value = u * load_row(weight, at, D)
    if cos is not None:
        value = rotate(value, cos, sin, row % L, D, PAIRS, BLOCK, 1)
    store_row(out + row * D, at, value, D)


def rms_norm_rope_backward(
    x, weight, cos, sin, grad, dx, dweight, rows, L, eps, D: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """With u = x / rms(x) and g the gradient turned back: dweight = sum(g u), dx = (g w - u mean(g w u)) / rms(x)."""
    at = tl.arange(0, BLOCK)
    w = load_row(weight, at, D)
    share = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * D  # an int under the interpreter, which has no .to
        u, factor = normalised(load_row(x + start, at, D), at, eps, D, False)
        g = load_row(grad + start, at, D)
        if cos is not None:
            g = rotate(g, cos, sin, row % L, D, PAIRS, BLOCK, -1)
        share += g * u
        g *= w
        store_row(dx + start, at, factor * (g - u * (tl.sum(g * u, 0) / D)), D)
    store_row(dweight + tl.program_id(0) * D, at, share, D)


def residual_norm_forward(
    x, y, gate, shift, scale, new, normed, row_scale, L, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """new = x + gate * y, normed = layer_norm(new) * (1 + scale) + shift; what is None is left out. row_scale: normed
    is fp8, each row's largest value 448, and this its scale."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // L
    at = tl.arange(0, BLOCK)
    value = load_row(x + row * D, at, D)
    if y is not None:
        update = load_row(y + row * D, at, D)
        if gate is not None:
            update *= load_row(gate + batch * gate_stride, at, D)
        value = (value + update).to(new.dtype.element_ty)  # the norm sees what is kept
        store_row(new + row * D, at, value, D)
        value = value.to(tl.float32)
    if shift is not None:
        u, _ = normalised(value, at, eps, D, True)
        value = u * (1 + load_row(scale + batch * scale_stride, at, D))
        value += load_row(shift + batch * shift_stride, at, D)
        if row_scale is not None:
            value = value.to(x.dtype.element_ty).to(tl.float32)  # the plain twin rounds before it quantises
            largest = tl.max(tl.abs(value), 0)
            factor = tl.where(largest > 0, largest / 448, 1.0)
            tl.store(row_scale + row, factor)
            value = tl.clamp(value / factor, -448.0, 448.0)
        store_row(normed + row * D, at, value, D)


def residual_norm_backward(
    new, y, gate, scale, grad_new, grad_normed, dx, dy, dgate, dshift, dscale, L, gate_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With u the normalised row and g = grad_normed (1 + scale): dx = grad_new + factor (g - mean(g) - u mean(g u)),
    dy = gate dx, dgate = sum(dx y), dshift = sum(grad_normed), dscale = sum(grad_normed u)."""
    program, batch = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    gate_share = tl.zeros([BLOCK], tl.float32)
    shift_share = tl.zeros([BLOCK], tl.float32)
    scale_share = tl.zeros([BLOCK], tl.float32)
    for position in tl.range(program, L, tl.num_programs(0)):
        row = batch.to(tl.int64) * L + position
        g = tl.zeros([BLOCK], tl.float32)
        if grad_normed is not None:
            u, factor = normalised(load_row(new + row * D, at, D), at, eps, D, True)
            g = load_row(grad_normed + row * D, at, D)
            shift_share += g
            scale_share += g * u
            g *= 1 + load_row(scale + batch * scale_stride, at, D)
            g = factor * (g - tl.sum(g, 0) / D - u * (tl.sum(g * u, 0) / D))
        if grad_new is not None:
            g += load_row(grad_new + row * D, at, D)
        if grad_normed is not None:
            store_row(dx + row * D, at, g, D)
        if gate is not None:
            gate_share += g * load_row(y + row * D, at, D)
            store_row(dy + row * D, at, g * load_row(gate + batch * gate_stride, at, D), D)
    share = (batch * tl.num_programs(0) + program) * D
    if gate is not None:
        store_row(dgate + share, at, gate_share, D)
    if grad_normed is not None:
        store_row(dshift + share, at, shift_share, D)
        store_row(dscale + share, at, scale_share, D)


def channel_norm_silu_forward(
    x, gamma, out, rows, clip, skip, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS pixels of D channels, which lie together. In out, `skip` pixels stand before each clip of `clip` pixels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    at, inside = row[:, None] * D + channel, (row < rows)[:, None] & (channel < D)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, 1) / D), 1e-12 / D**0.5)  # F.normalize's least length
    value = value / length[:, None] * load_row(gamma, channel, D)
    value = value / (1 + tl.exp(-value))
    out += (row + (row // clip + 1) * skip)[:, None] * D + channel
    tl.store(out, value.to(out.dtype.element_ty), mask=inside)


KERNELS = (
    load_row, store_row, rotate, normalised, rms_norm_rope_forward, rms_norm_rope_backward, residual_norm_forward,
    residual_norm_backward, channel_norm_silu_forward,
)  # fmt: skip
PROGRAMS = 512  # of a backward kernel: about four for each multiprocessor of an H100


@lru_cache
def compiled(name):
    """A kernel above by name, in the hands of Triton."""
    hand_to_triton(globals())
    return globals()[name]


def row_shape(D):
    """How many elements of a row a program holds, and on how many warps: 16 elements or fewer on a thread."""
    block = 1 << (D - 1).bit_length()
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def pixel_shape(D):
    """The same for pixels of D channels, of which a program holds 2,048 elements or more."""
    shape = row_shape(D)
    return {**shape, "ROWS": max(1, 2048 // shape["BLOCK"]), "num_warps": max(shape["num_warps"], 4)}


def launch(name, grid, D, tensors, *numbers, **constants):
    """Run a kernel on its tensors, the first of them in one piece, and numbers."""
    with torch.cuda.device_of(tensors[0]):
        compiled(name)[grid](*tensors, *numbers, D=D, **{**row_shape(D), **constants})


def nothing(x):
    """An operator returns tensors only; this one stands for None."""
    return x.new_empty(0)


@operator("rms_norm_rope", "(Tensor x, Tensor w, Tensor? cos, Tensor? sin, int H, float eps) -> Tensor")
def rms_norm_rope_op(x, weight, cos, sin, num_heads, eps):
    B, L, D = x.shape
    out = rms_norm_rope_shape(x, weight, cos, sin, num_heads, eps)
    tensors = x.contiguous(), weight, cos, sin, out
    launch("rms_norm_rope_forward", (B * L,), D, tensors, L, eps, PAIRS=D // num_heads // 2)
    return out


@rms_norm_rope_op.register_fake
def rms_norm_rope_shape(x, weight, cos, sin, num_heads, eps):
    return x.new_empty((*x.shape[:2], num_heads, x.shape[2] // num_heads))


@operator("rms_norm_rope_backward", "(Tensor grad, Tensor x, Tensor w, Tensor? cos, Tensor? sin, float eps) -> "
          "(Tensor, Tensor)")  # fmt: skip
def rms_norm_rope_backward_op(grad, x, weight, cos, sin, eps):
    B, L, D = x.shape
    programs = min(B * L, PROGRAMS)
    dx, shares = x.new_empty(x.shape), x.new_empty((programs, D), dtype=torch.float32)
    tensors = x.contiguous(), weight, cos, sin, grad.contiguous(), dx, shares
    launch("rms_norm_rope_backward", (programs,), D, tensors, B * L, L, eps, PAIRS=grad.shape[-1] // 2)
    return dx, shares.sum(0).to(weight.dtype)


@rms_norm_rope_backward_op.register_fake
def _(grad, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def rms_norm_rope_save(ctx, inputs, output):
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def rms_norm_rope_gradients(ctx, grad):
    return *rms_norm_rope_backward_op(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


rms_norm_rope_op.register_autograd(rms_norm_rope_gradients, setup_context=rms_norm_rope_save)


def strides(*factors):
    """From one sample's row to the next."""
    return [0 if t is None else t.stride(0) for t in factors]


@operator("residual_norm", "(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, float eps, "
          "bool rows8) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def residual_norm_op(x, y, gate, shift, scale, eps, rows8):
    """x + gate y, its modulated norm and, if that is in 8 bits, the rows' scales; each empty if not asked for."""
    B, L, D = x.shape
    new, normed, row_scale = residual_norm_shapes(x, y, gate, shift, scale, eps, rows8)
    outputs = new, normed, row_scale if rows8 else None
    tensors = x.contiguous(), None if y is None else y.contiguous(), gate, shift, scale, *outputs
    launch("residual_norm_forward", (B * L,), D, tensors, L, *strides(gate, shift, scale), eps)
    return new, normed, row_scale


@residual_norm_op.register_fake
def residual_norm_shapes(x, y, gate, shift, scale, eps, rows8):
    new, normed = (nothing(x) if t is None else x.new_empty(x.shape) for t in (y, shift))
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if rows8 else nothing(x)
    return new, normed.to(torch.float8_e4m3fn) if rows8 else normed, scales


@operator("residual_norm_backward", "(Tensor? grad_new, Tensor? grad_normed, Tensor new, Tensor? y, Tensor? gate, "
          "Tensor? scale, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
def residual_norm_backward_op(grad_new, grad_normed, new, y, gate, scale, eps):
    """-> dx, dy, dgate, dshift, dscale; empty where it is that of None, or equal to another."""
    B, L, D = new.shape
    programs = min(L, max(1, PROGRAMS // B))
    dx, dy, *_ = residual_norm_backward_shapes(grad_new, grad_normed, new, y, gate, scale, eps)
    shares = new.new_empty((3, B, programs, D), dtype=torch.float32)
    grad_new, grad_normed, y = (t if t is None else t.contiguous() for t in (grad_new, grad_normed, y))
    tensors = new.contiguous(), y, gate, scale, grad_new, grad_normed, dx, dy, *shares
    launch("residual_norm_backward", (programs, B), D, tensors, L, *strides(gate, scale), eps)
    summed = [nothing(new) if t is None else share.sum(1, keepdim=True).to(t.dtype)
              for t, share in zip((gate, scale, scale), shares)]  # fmt: skip
    return dx, dy, *summed


@residual_norm_backward_op.register_fake
def residual_norm_backward_shapes(grad_new, grad_normed, new, y, gate, scale, eps):
    tokens = (nothing(new) if t is None else new.new_empty(new.shape) for t in (scale, gate))
    return *tokens, *(nothing(new) if t is None else t.new_empty(t.shape) for t in (gate, scale, scale))


def residual_norm_save(ctx, inputs, output):
    x, y, gate, shift, scale, ctx.eps, _ = inputs
    ctx.adds = y is not None  # of y itself only dgate wants to know
    ctx.save_for_backward(output[0] if ctx.adds else x, None if gate is None else y, gate, shift, scale)


def residual_norm_gradients(ctx, grad_new, grad_normed, _):
    new, y, gate, shift, scale = ctx.saved_tensors
    grad_new = grad_new if ctx.adds else None
    grad_normed = None if scale is None else grad_normed
    dx, dy, dgate, dshift, dscale = residual_norm_backward_op(grad_new, grad_normed, new, y, gate, scale, ctx.eps)
    if scale is None:
        dx, dshift, dscale = grad_new, None, None
    if gate is None:
        dy, dgate = dx if ctx.adds else None, None
    return dx, dy, dgate, None if dshift is None else dshift.to(shift.dtype), dscale, None, None


residual_norm_op.register_autograd(residual_norm_gradients, setup_context=residual_norm_save)


@operator("channel_norm_silu", "(Tensor x, Tensor gamma, Tensor? past) -> Tensor")
def channel_norm_silu_op(x, gamma, past):
    x, out = x.contiguous(memory_format=torch.channels_last_3d), channel_norm_silu_shapes(x, gamma, past)
    D, frames, frame = x.shape[1], x.shape[2], x.shape[3] * x.shape[4]
    if past is not None:
        out[:, :, : past.shape[2]] = past
    rows, skip, shape = x.numel() // D, (out.shape[2] - frames) * frame, pixel_shape(D)
    grid = (-(-rows // shape["ROWS"]),)
    launch("channel_norm_silu_forward", grid, D, (x, gamma, out), rows, frames * frame, skip, **shape)
    return out


@channel_norm_silu_op.register_fake
def channel_norm_silu_shapes(x, gamma, past):
    B, C, T, H, W = x.shape
    T += 0 if past is None else past.shape[2]
    return x.new_empty(B, T, H, W, C).movedim(-1, 1)


def channel_norm_silu_gradients(ctx, grad):
    """The plain twin runs again: a VAE that is trained is nano's, on small clips."""
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        present = [leaf for leaf in leaves if leaf is not None]
        gradients = torch.autograd.grad(channel_norm_silu_plain(*leaves), present, grad)
    return (*gradients, None)[:3]


channel_norm_silu_op.register_autograd(
    channel_norm_silu_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def rms_norm_rope_triton(x, weight, rope, num_heads, eps):
    """ValueError where weight or rope have not the shapes of the plain twin's: a kernel would read beyond them."""
    _, L, D = x.shape
    cos, sin = (None, None) if rope is None else (t.contiguous() for t in rope)
    if weight.shape != (D,) or rope is not None and not cos.shape == sin.shape == (L, D // num_heads // 2):
        table = rope and [tuple(t.shape) for t in rope]
        raise ValueError(f"rms_norm_rope: x {tuple(x.shape)}, weight {tuple(weight.shape)}, rope {table} do not fit")
    return rms_norm_rope_op(x, weight, cos, sin, num_heads, eps)


def per_clip(t, x):
    """gate, shift or scale as (B, 1, D), each row in one piece; autograd sums what is spread here."""
    t = t.expand(x.shape[0], 1, x.shape[2])
    return t if t.stride(-1) == 1 else t.contiguous()


def layer_norm_modulate_triton(x, shift, scale, eps, rows8=False):
    _, normed, factors = residual_norm_op(x, None, None, per_clip(shift, x), per_clip(scale, x), eps, rows8)
    return Rows8(normed, factors, x.dtype) if rows8 else normed


def gate_residual_triton(x, y, gate):
    return residual_norm_op(x, y.expand_as(x), per_clip(gate, x), None, None, 0.0, False)[0]


def gate_residual_norm_triton(x, y, gate, shift, scale, eps, rows8=False):
    gate, shift, scale = None if gate is None else per_clip(gate, x), per_clip(shift, x), per_clip(scale, x)
    new, normed, factors = residual_norm_op(x, y.expand_as(x), gate, shift, scale, eps, rows8)
    return new, Rows8(normed, factors, x.dtype) if rows8 else normed


def channel_norm_silu_triton(x, gamma, past=None):
    fits = past is None or past.shape[:2] + past.shape[3:] == x.shape[:2] + x.shape[3:]
    if x.ndim != 5 or gamma.shape != (x.shape[1], 1, 1, 1) or not fits:
        raise ValueError(f"channel_norm_silu: x {tuple(x.shape)}, gamma {tuple(gamma.shape)} do not fit")
    return channel_norm_silu_op(x, gamma.contiguous(), past)
