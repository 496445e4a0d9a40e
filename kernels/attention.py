"""Scaled dot-product attention, softmax(q k^T / sqrt(d)) v for every head: no mask, any two lengths.

    q (B, Lq, H, d), k and v (B, Lk, H, d) -> (B, Lq, H, d); 16 or 32 bits in and out, float32 inside

FLOPs: 4 Lq Lk d per head forward, 10 backward (and 4 to recompute the scores). Bytes: q, k, v and out once, and
4 per query for the log-sum-exp; on paper Lk/2 FLOPs a byte, so from a few hundred keys on only arithmetic counts.

The kernels follow FlashAttention-2 (arXiv 2307.08691): a block of queries meets all keys with a running softmax
(arXiv 1805.02867) and the scores never leave the chip; backward recomputes them from the log-sum-exp, once per block
of queries for dq and once per block of keys for dk and dv, so nothing is added atomically and a
configuration gives the same bits each time (another process may time another one as the fastest). Loads go through pointers or, on Hopper, through the tensor memory accelerator (TMA); whether a
producer warp of its own issues them (warp specialisation) is a configuration too. The first launch of a shape's
size class times the configurations below; `python -m kernels.bench check` runs each of them by itself.
"""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F

SLICE = 1 << 19  # scores: 1 MB in bfloat16, about what one core's cache holds
LOCK = threading.Lock()
triton = tl = None  # imported by `compiled` at the first launch: nobody on a CPU waits for them


def attention_ref(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum(
        "bhqk,bkhd->bqhd", scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v), v
    )


def attention_slices(q, k, v):
    """As the above, a few samples at a time, so that their scores stay in a CPU's cache; these are bfloat16 as q is, at
    twice the rounding of fused attention, more where they are large. The backward of PyTorch's takes two to ten times as
    long there in bfloat16 (`python -m kernels.bench attention`)."""
    samples = max(1, SLICE // (q.shape[1] * k.shape[1] * q.shape[2]))
    outs = []
    for some in zip(q.split(samples), k.split(samples), v.split(samples)):
        queries, keys, values = (x.transpose(1, 2) for x in some)
        outs.append((queries * q.shape[-1] ** -0.5 @ keys.transpose(-1, -2)).softmax(-1) @ values)
    return torch.cat(outs).transpose(1, 2)


def attention_sdpa(q, k, v):
    """PyTorch's own fused attention; it wants (B, H, L, d)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attention_cudnn(q, k, v):
    """That of cuDNN, which PyTorch has but does not choose by itself on every card."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return attention_sdpa(q, k, v)


def head_matrix(pointer, length, ROW: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr):
    """One head's (length, DIM) matrix, its rows ROW apart, for `load_tile`: a TMA descriptor or just the pointer."""
    if TMA:
        return tl.make_tensor_descriptor(pointer, [length, DIM], [ROW, 1], [BLOCK, DIM])
    else:  # a jitted function returns one type from each branch
        return pointer


def load_tile(
    matrix, start, length, ROW: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows start .. start + BLOCK of a matrix, zeros behind its end; WHOLE promises that the end is not met.

    A tile's own offsets fit 32 bits, its start may not.
    """
    if TMA:
        return matrix.load([start, 0])
    else:
        rows = tl.arange(0, BLOCK)
        at = matrix + tl.cast(start, tl.int64) * ROW + rows[:, None] * ROW + tl.arange(0, DIM)
        return tl.load(at) if WHOLE else tl.load(at, mask=(start + rows < length)[:, None], other=0.0)


def store_tile(pointer, values, start, length, ROW: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of `load_tile`; nothing is written behind the end."""
    rows = tl.arange(0, BLOCK)
    at = pointer + tl.cast(start, tl.int64) * ROW + rows[:, None] * ROW + tl.arange(0, DIM)
    tl.store(at, values.to(pointer.dtype.element_ty), mask=(start + rows < length)[:, None])


def attention_forward(
    q, k, v, out, lse, Lq, Lk, scale, size_class, HEADS: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SPECIALISE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys, BLOCK_N at a time.

    scale: log2(e) / sqrt(d), since exp2 is one instruction; lse: log2 of each query's sum of exponentials.
    """
    ROW: tl.constexpr = HEADS * DIM
    first, batch, head = tl.program_id(0) * BLOCK_M, tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    q += batch.to(tl.int64) * Lq * ROW + head * DIM
    k += batch.to(tl.int64) * Lk * ROW + head * DIM
    v += batch.to(tl.int64) * Lk * ROW + head * DIM
    out += batch.to(tl.int64) * Lq * ROW + head * DIM
    q_matrix = head_matrix(q, Lq, ROW, BLOCK_M, DIM, TMA)
    k_matrix = head_matrix(k, Lk, ROW, BLOCK_N, DIM, TMA)
    v_matrix = head_matrix(v, Lk, ROW, BLOCK_N, DIM, TMA)
    queries = load_tile(q_matrix, first, Lq, ROW, BLOCK_M, DIM, TMA)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    # First the whole blocks of keys, then the one that sticks out, masked. Triton specialises only a loop that stands
    # alone, so there every block is masked.
    whole = 0 if SPECIALISE else Lk // BLOCK_N * BLOCK_N
    for masked in tl.static_range(1 if SPECIALISE else 0, 2):
        for start in tl.range(whole * masked, Lk if masked else whole, BLOCK_N, warp_specialize=SPECIALISE):
            keys = load_tile(k_matrix, start, Lk, ROW, BLOCK_N, DIM, TMA, not masked)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if masked:
                scores = tl.where(start + tl.arange(0, BLOCK_N) < Lk, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new[:, None])
            shrink = tl.exp2(largest - new)
            total = total * shrink + tl.sum(p, 1)
            values = load_tile(v_matrix, start, Lk, ROW, BLOCK_N, DIM, TMA, not masked)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            largest = new

    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse + tl.program_id(1).to(tl.int64) * Lq + rows, largest + tl.log2(total), mask=rows < Lq)
    store_tile(out, acc / total[:, None], first, Lq, ROW, BLOCK_M, DIM)


def attention_backward_q(
    q, k, v, out, grad, lse, delta, dq, Lq, Lk, scale, size_class, HEADS: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and on the way delta = sum(out * grad), which `attention_backward_kv` needs too.

    With p = exp2(scores - lse): ds = p * (grad v^T - delta), dq = ds k / sqrt(d).
    """
    ROW: tl.constexpr = HEADS * DIM
    first, batch, head = tl.program_id(0) * BLOCK_M, tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    queries_at = batch.to(tl.int64) * Lq * ROW + head * DIM
    k += batch.to(tl.int64) * Lk * ROW + head * DIM
    v += batch.to(tl.int64) * Lk * ROW + head * DIM
    k_matrix = head_matrix(k, Lk, ROW, BLOCK_N, DIM, TMA)
    v_matrix = head_matrix(v, Lk, ROW, BLOCK_N, DIM, TMA)
    queries = load_tile(q + queries_at, first, Lq, ROW, BLOCK_M, DIM, False)
    grads = load_tile(grad + queries_at, first, Lq, ROW, BLOCK_M, DIM, False)
    outputs = load_tile(out + queries_at, first, Lq, ROW, BLOCK_M, DIM, False)
    rows = first + tl.arange(0, BLOCK_M)
    rows_at = tl.program_id(1).to(tl.int64) * Lq + rows
    row_lse = tl.load(lse + rows_at, mask=rows < Lq, other=float("inf"))
    row_delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + rows_at, row_delta, mask=rows < Lq)

    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    whole = Lk // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):
        for start in tl.range(whole * masked, Lk if masked else whole, BLOCK_N):
            keys = load_tile(k_matrix, start, Lk, ROW, BLOCK_N, DIM, TMA, not masked)
            values = load_tile(v_matrix, start, Lk, ROW, BLOCK_N, DIM, TMA, not masked)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if masked:
                scores = tl.where(start + tl.arange(0, BLOCK_N) < Lk, scores, float("-inf"))
            p = tl.exp2(scores * scale - row_lse[:, None])
            dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)

    store_tile(dq + queries_at, acc * (scale * 0.6931471805599453), first, Lq, ROW, BLOCK_M, DIM)  # ln 2: 1 / sqrt(d)


def attention_backward_kv(
    q, k, v, grad, lse, delta, dk, dv, Lq, Lk, scale, size_class, HEADS: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, which meet all queries, BLOCK_M at a time; scores are (keys, queries) here.

    dv = p^T grad, dk = ds^T q / sqrt(d). A query behind the end has lse = inf, so p = 0 without a mask.
    """
    ROW: tl.constexpr = HEADS * DIM
    first, batch, head = tl.program_id(0) * BLOCK_N, tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    keys_at = batch.to(tl.int64) * Lk * ROW + head * DIM
    q += batch.to(tl.int64) * Lq * ROW + head * DIM
    grad += batch.to(tl.int64) * Lq * ROW + head * DIM
    lse += tl.program_id(1).to(tl.int64) * Lq
    delta += tl.program_id(1).to(tl.int64) * Lq
    q_matrix = head_matrix(q, Lq, ROW, BLOCK_M, DIM, TMA)
    grad_matrix = head_matrix(grad, Lq, ROW, BLOCK_M, DIM, TMA)
    keys = load_tile(k + keys_at, first, Lk, ROW, BLOCK_N, DIM, False)
    values = load_tile(v + keys_at, first, Lk, ROW, BLOCK_N, DIM, False)

    acc_k = tl.zeros([BLOCK_N, DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_N, DIM], tl.float32)
    for start in tl.range(0, Lq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_tile(q_matrix, start, Lq, ROW, BLOCK_M, DIM, TMA)
        grads = load_tile(grad_matrix, start, Lq, ROW, BLOCK_M, DIM, TMA)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(scores * scale - tl.load(lse + rows, mask=rows < Lq, other=float("inf"))[None])
        acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + rows, mask=rows < Lq, other=0.0)[None])
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    store_tile(dk + keys_at, acc_k * (scale * 0.6931471805599453), first, Lk, ROW, BLOCK_N, DIM)
    store_tile(dv + keys_at, acc_v, first, Lk, ROW, BLOCK_N, DIM)


KERNELS = (head_matrix, load_tile, store_tile, attention_forward, attention_backward_q, attention_backward_kv)

# (BLOCK_M, BLOCK_N, TMA, SPECIALISE, warps, stages); the backward kernels have no SPECIALISE. None of these spills
# registers on an H100 (`python -m kernels.bench compile`); the last of each fits the shared memory of any card from
# Ampere on. float32 has tiles of its own (`usable`).
CONFIGS = {
    "attention_forward": [
        (128, 128, True, True, 4, 2), (128, 64, True, True, 4, 3), (128, 128, True, False, 8, 2),
        (128, 128, True, False, 8, 3), (128, 64, True, False, 8, 3), (64, 64, True, False, 4, 2), (128, 128, False, False, 8, 2),
        (128, 64, False, False, 8, 3), (64, 64, False, False, 4, 3), (64, 32, False, False, 4, 2),
    ],
    "attention_backward_q": [
        (128, 64, True, 8, 2), (128, 64, True, 8, 3), (64, 64, True, 4, 2),
        (128, 64, False, 8, 2), (64, 64, False, 4, 2), (64, 32, False, 4, 2),
    ],
    "attention_backward_kv": [
        (64, 128, True, 8, 2), (64, 128, True, 8, 3), (32, 128, True, 8, 2), (64, 64, True, 4, 2),
        (32, 128, False, 8, 2), (64, 64, False, 4, 2), (32, 64, False, 4, 2),
    ],
}  # fmt: skip


def triton_config(name, blocks):
    """An entry of CONFIGS as Triton wants it."""
    *tiles, warps, stages = blocks
    names = ("BLOCK_M", "BLOCK_N", "TMA", "SPECIALISE")
    if name == "attention_forward" and len(tiles) == 3:
        tiles.append(False)
    return triton.Config(dict(zip(names, tiles)), num_warps=warps, num_stages=stages)


def usable(configs, arguments, DIM, **_):
    """The configurations for this device, the plainest first, which is taken where none can be timed. The tensor memory
    accelerator came with Hopper, and Triton's warp specialisation was compiled for Hopper and heads of 64 and 128 alone.
    Products of float32 are no tensor core's: they take minutes to compile in large tiles and do not fit the shared memory
    of a 3090 or 4090, so there is one of small ones."""
    if not arguments["q"].is_cuda:
        return configs
    if arguments["q"].dtype == torch.float32:
        small = {"BLOCK_M": 32, "BLOCK_N": 32, "TMA": False, "SPECIALISE": False}
        return [triton.Config({name: small[name] for name in configs[-1].kwargs}, num_warps=8, num_stages=1)]
    major, _ = torch.cuda.get_device_capability(arguments["q"].device)
    return [
        c
        for c in reversed(configs)
        if (major >= 9 or not c.kwargs["TMA"]) and (major == 9 and DIM >= 64 or not c.kwargs.get("SPECIALISE"))
    ]


def hand_to_triton(module, **options):
    """Import Triton into a module of kernels (its globals) and give it them all, once, whichever threads come first."""
    with LOCK:
        if module["triton"] is None:
            import triton
            import triton.language

            module.update({function.__name__: triton.jit(function, **options) for function in module["KERNELS"]})
            module.update(tl=triton.language, triton=triton)


@lru_cache
def compiled(name):
    """A kernel above by name, in the hands of Triton and its autotuner."""
    hand_to_triton(globals(), do_not_specialize=["size_class"])
    configs = [triton_config(name, config) for config in CONFIGS[name]]
    if triton.knobs.runtime.interpret:  # nothing to time
        configs = configs[:1]
    prune = {"early_config_prune": usable}
    return triton.autotune(configs, ["size_class", "DIM"], prune_configs_by=prune, do_bench=time_or_skip)(
        globals()[name]
    )


def time_or_skip(run, quantiles):
    """Milliseconds of a configuration; infinity of one that this device or this Triton cannot compile or launch."""
    with left_out("a configuration of attention"):
        return triton.testing.do_bench(run, warmup=5, rep=30, quantiles=quantiles)
    return [math.inf] * len(quantiles)


@contextmanager
def left_out(what):
    """What fails inside is left out, and said; Triton's errors are of many kinds. An error of the device itself passes
    through, for it gives nothing more to this process."""
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        print(f"kernels: {what} is left out: {type(error).__name__}: {str(error).strip()[:200]}", flush=True)


def launch(name, rows, block, tensors, q, k):
    """Run a kernel on a grid of one program per `block` of `rows` and per head."""
    (B, Lq, H, d), Lk = q.shape, k.shape[1]
    kernel = compiled(name)
    if q.is_cuda:  # descriptors are made in the kernel and want a few bytes of its device
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    size_class = min(Lq, 1 << 14).bit_length() * 32 + min(Lk, 1 << 14).bit_length()
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # of float32 products only
    with torch.cuda.device_of(q):
        kernel[lambda config: (triton.cdiv(rows, config[block]), B * H)](
            *tensors, Lq, Lk, d**-0.5 * 1.4426950408889634, size_class, HEADS=H, DIM=d, PRECISION=precision
        )


@torch.library.custom_op("nanokiwi::attention", mutates_args=())
def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (B, Lq, H, d), lse (B, H, Lq) float32."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = outputs = attention_op_shapes(q, k, v)
    launch("attention_forward", q.shape[1], "BLOCK_M", (q, k, v, out, lse), q, k)
    return outputs


@attention_op.register_fake
def attention_op_shapes(q, k, v):
    B, Lq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Lq), dtype=torch.float32)


@torch.library.custom_op("nanokiwi::attention_backward", mutates_args=())
def attention_backward_op(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    dq, dk, dv = gradients = attention_backward_op_shapes(grad, q, k, v, out, lse)
    delta = torch.empty_like(lse)
    launch("attention_backward_q", q.shape[1], "BLOCK_M", (q, k, v, out, grad, lse, delta, dq), q, k)
    launch("attention_backward_kv", k.shape[1], "BLOCK_N", (q, k, v, grad, lse, delta, dk, dv), q, k)
    return gradients


@attention_backward_op.register_fake
def attention_backward_op_shapes(grad, q, k, v, out, lse):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, grad, grad_lse):
    return attention_backward_op(grad, *ctx.saved_tensors)


attention_op.register_autograd(backward, setup_context=save_for_backward)


def attention_triton(q, k, v):
    d = q.shape[-1]
    if d < 16 or d & (d - 1):
        raise ValueError(f"attention in Triton: head_dim {d} is not a power of two of at least 16; take 'sdpa'")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"attention in Triton: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one, of 16 or 32 bits"
        )
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or d != k.shape[-1] or not k.shape[1]:
        raise ValueError(f"attention: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit")
    return attention_op(q, k, v)[0]
