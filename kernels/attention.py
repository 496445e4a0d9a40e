"""Scaled dot-product attention, softmax(q k^T / sqrt(d)) v for every head: no mask, any two lengths.

    q (B, Lq, H, d), k and v (B, Lk, H, d) -> (B, Lq, H, d); 16 or 32 bits in and out, float32 inside

FLOPs: 4 Lq Lk d per head forward, 10 backward (and 4 to recompute the scores). Bytes: q, k, v and out once, and
4 per query for the log-sum-exp; on paper Lk/2 FLOPs a byte, so from a few hundred keys on only arithmetic counts.

After FlashAttention-2 (arXiv 2307.08691): a block of queries meets all keys with a running softmax (arXiv 1805.02867)
and the scores never leave the chip. Backward recomputes them from the log-sum-exp, once per block of queries for dq and
once per block of keys for dk and dv: nothing is added atomically, so a configuration gives the same bits each time.
The first launch of a size class times the configurations below; heads are a run-time number, so one compilation serves
every model. `python -m bench.kernels check` runs each configuration in its own process.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F

SLICE = 1 << 19  # scores: 1 MB in bfloat16, about what one core's cache holds
LOCK = threading.Lock()
COMPILED = set()  # (kernel, size class, head_dim, dtype, device) whose configurations are compiled
triton = tl = None  # imported by `compiled` at the first launch: nobody on a CPU waits for them


def attention_ref(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum(
        "bhqk,bkhd->bqhd", scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v), v
    )


def attention_slices(q, k, v):
    """`attention_ref` a few samples at a time, so that the scores stay in a CPU's cache, in the dtype of q. In bfloat16
    it rounds twice as much as fused attention, whose backward takes 2 to 10 times as long (`python -m bench.kernels
    attention`)."""
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
    """cuDNN's backend (PyTorch does not pick it by default)."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return attention_sdpa(q, k, v)


def head_of(pointer, length, HEADS, DIM: tl.constexpr):
    """The first row of this program's sample and head; rows lie HEADS * DIM apart."""
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    return pointer + batch.to(tl.int64) * length * HEADS * DIM + head * DIM


def load_tile(pointer, start, length, ROW, BLOCK: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows start .. start + BLOCK of a head's matrix, zeros behind its end; WHOLE promises that the end is not met.

    A tile's own offsets fit 32 bits, its start may not.
    """
    rows = tl.arange(0, BLOCK)
    at = pointer + tl.cast(start, tl.int64) * ROW + rows[:, None] * ROW + tl.arange(0, DIM)
    return tl.load(at) if WHOLE else tl.load(at, mask=(start + rows < length)[:, None], other=0.0)


def store_tile(pointer, values, start, length, ROW, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of `load_tile`; nothing is written behind the end."""
    rows = tl.arange(0, BLOCK)
    at = pointer + tl.cast(start, tl.int64) * ROW + rows[:, None] * ROW + tl.arange(0, DIM)
    tl.store(at, values.to(pointer.dtype.element_ty), mask=(start + rows < length)[:, None])


def attention_forward(
    q, k, v, out, lse, Lq, Lk, scale, size_class, HEADS, DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys, BLOCK_N at a time.

    scale: log2(e) / sqrt(d), since exp2 is one instruction; lse: log2 of each query's sum of exponentials.
    """
    ROW, first = HEADS * DIM, tl.program_id(0) * BLOCK_M
    k, v = head_of(k, Lk, HEADS, DIM), head_of(v, Lk, HEADS, DIM)
    queries = load_tile(head_of(q, Lq, HEADS, DIM), first, Lq, ROW, BLOCK_M, DIM)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    whole = Lk // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):  # the whole blocks of keys, then the one that sticks out, masked
        for start in tl.range(whole * masked, Lk if masked else whole, BLOCK_N):
            keys = load_tile(k, start, Lk, ROW, BLOCK_N, DIM, not masked)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if masked:
                scores = tl.where(start + tl.arange(0, BLOCK_N) < Lk, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new[:, None])
            shrink = tl.exp2(largest - new)
            total = total * shrink + tl.sum(p, 1)
            values = load_tile(v, start, Lk, ROW, BLOCK_N, DIM, not masked)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            largest = new

    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse + tl.program_id(1).to(tl.int64) * Lq + rows, largest + tl.log2(total), mask=rows < Lq)
    store_tile(head_of(out, Lq, HEADS, DIM), acc / total[:, None], first, Lq, ROW, BLOCK_M, DIM)


def attention_backward_q(
    q, k, v, out, grad, lse, delta, dq, Lq, Lk, scale, size_class, HEADS, DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and on the way delta = sum(out * grad), which `attention_backward_kv` needs too.

    With p = exp2(scores - lse): ds = p * (grad v^T - delta), dq = ds k / sqrt(d).
    """
    ROW, first = HEADS * DIM, tl.program_id(0) * BLOCK_M
    k, v = head_of(k, Lk, HEADS, DIM), head_of(v, Lk, HEADS, DIM)
    queries = load_tile(head_of(q, Lq, HEADS, DIM), first, Lq, ROW, BLOCK_M, DIM)
    grads = load_tile(head_of(grad, Lq, HEADS, DIM), first, Lq, ROW, BLOCK_M, DIM)
    outputs = load_tile(head_of(out, Lq, HEADS, DIM), first, Lq, ROW, BLOCK_M, DIM)
    rows = first + tl.arange(0, BLOCK_M)
    rows_at = tl.program_id(1).to(tl.int64) * Lq + rows
    row_lse = tl.load(lse + rows_at, mask=rows < Lq, other=float("inf"))
    row_delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + rows_at, row_delta, mask=rows < Lq)

    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    whole = Lk // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):
        for start in tl.range(whole * masked, Lk if masked else whole, BLOCK_N):
            keys = load_tile(k, start, Lk, ROW, BLOCK_N, DIM, not masked)
            values = load_tile(v, start, Lk, ROW, BLOCK_N, DIM, not masked)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if masked:
                scores = tl.where(start + tl.arange(0, BLOCK_N) < Lk, scores, float("-inf"))
            p = tl.exp2(scores * scale - row_lse[:, None])
            dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)

    acc *= scale * 0.6931471805599453  # scale ln 2 is 1 / sqrt(d)
    store_tile(head_of(dq, Lq, HEADS, DIM), acc, first, Lq, ROW, BLOCK_M, DIM)


def attention_backward_kv(
    q, k, v, grad, lse, delta, dk, dv, Lq, Lk, scale, size_class, HEADS, DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, which meet all queries, BLOCK_M at a time; scores are (keys, queries) here.

    dv = p^T grad, dk = ds^T q / sqrt(d). A query behind the end has lse = inf, so p = 0 without a mask.
    """
    ROW, first = HEADS * DIM, tl.program_id(0) * BLOCK_N
    q, grad = head_of(q, Lq, HEADS, DIM), head_of(grad, Lq, HEADS, DIM)
    keys = load_tile(head_of(k, Lk, HEADS, DIM), first, Lk, ROW, BLOCK_N, DIM)
    values = load_tile(head_of(v, Lk, HEADS, DIM), first, Lk, ROW, BLOCK_N, DIM)
    lse += tl.program_id(1).to(tl.int64) * Lq
    delta += tl.program_id(1).to(tl.int64) * Lq

    acc_k = tl.zeros([BLOCK_N, DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_N, DIM], tl.float32)
    for start in tl.range(0, Lq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_tile(q, start, Lq, ROW, BLOCK_M, DIM)
        grads = load_tile(grad, start, Lq, ROW, BLOCK_M, DIM)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(scores * scale - tl.load(lse + rows, mask=rows < Lq, other=float("inf"))[None])
        acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + rows, mask=rows < Lq, other=0.0)[None])
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    acc_k *= scale * 0.6931471805599453
    store_tile(head_of(dk, Lk, HEADS, DIM), acc_k, first, Lk, ROW, BLOCK_N, DIM)
    store_tile(head_of(dv, Lk, HEADS, DIM), acc_v, first, Lk, ROW, BLOCK_N, DIM)


KERNELS = (head_of, load_tile, store_tile, attention_forward, attention_backward_q, attention_backward_kv)

# (BLOCK_M, BLOCK_N, warps, stages). None of these spills registers on an H100 (`python -m bench.kernels compile`); the
# last of each fits the shared memory of any card from Ampere on. float32 has tiles of its own (`usable`).
CONFIGS = {
    "attention_forward": [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)],
    "attention_backward_q": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
    "attention_backward_kv": [(32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
}


def triton_config(config):
    """An entry of CONFIGS as Triton wants it."""
    block_m, block_n, warps, stages = config
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)


def usable(configs, arguments, **_):
    """The configurations for this device, the plainest first: it runs where none can be timed. Tensor cores do no exact
    float32: one configuration of small tiles, which compile fast and fit every card."""
    if arguments["q"].is_cuda and arguments["q"].dtype == torch.float32:
        return [triton_config((32, 32, 8, 1))]
    return configs[::-1]


def hand_to_triton(module, **options):
    """Import Triton into a module of kernels (its globals) and JIT them all, once; thread-safe."""
    with LOCK:
        if module["triton"] is None:
            import triton
            import triton.language

            module.update({function.__name__: triton.jit(function, **options) for function in module["KERNELS"]})
            module.update(tl=triton.language, triton=triton)


@lru_cache
def compiled(name):
    """A kernel above by name, in the hands of Triton and its autotuner."""
    hand_to_triton(globals(), do_not_specialize=["size_class", "HEADS"])
    configs = [triton_config(config) for config in CONFIGS[name]]
    if triton.knobs.runtime.interpret:  # nothing to time
        configs = configs[:1]
    prune = {"early_config_prune": usable}
    tuned = triton.autotune(configs, ["size_class", "DIM"], prune_configs_by=prune, do_bench=time_or_skip)
    return tuned(globals()[name])


def time_or_skip(run, quantiles):
    """Milliseconds of a configuration; infinity of one that this device or this Triton cannot compile or launch."""
    with left_out("a configuration of attention"):
        return triton.testing.do_bench(run, warmup=5, rep=30, quantiles=quantiles)
    return [math.inf] * len(quantiles)


@contextmanager
def left_out(what):
    """Print what fails inside and go on; Triton's errors are of many kinds. A device error passes through: it ends the
    process's use of the device."""
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
    size_class = min(Lq, 1 << 14).bit_length() * 32 + min(Lk, 1 << 14).bit_length()
    arguments = *tensors, Lq, Lk, d**-0.5 * 1.4426950408889634, size_class, H
    constants = {"DIM": d, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"}  # of float32 products only
    with torch.cuda.device_of(q):
        if len(kernel.configs) > 1 and (begun := (name, size_class, d, q.dtype, q.device)) not in COMPILED:
            COMPILED.add(begun)
            compile_side_by_side(kernel, arguments, constants)
        kernel[lambda config: (triton.cdiv(rows, config[block]), B * H)](*arguments, **constants)


def compile_side_by_side(kernel, arguments, constants):
    """All configurations of a kernel in threads, before they are timed one by one. What fails waits for its turn."""
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        return kernel.warmup(*arguments, grid=(1,), **constants)


def operator(name, schema):
    """Register a function as torch.ops.nanokiwi.<name>: one step for autograd, torch.compile and meta tensors."""
    return torch.library.custom_op(f"nanokiwi::{name}", mutates_args=(), schema=schema)


@operator("attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
def attention_op(q, k, v):
    """-> out (B, Lq, H, d), lse (B, H, Lq) float32."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = outputs = attention_op_shapes(q, k, v)
    launch("attention_forward", q.shape[1], "BLOCK_M", (q, k, v, out, lse), q, k)
    return outputs


@attention_op.register_fake
def attention_op_shapes(q, k, v):
    B, Lq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Lq), dtype=torch.float32)


@operator("attention_backward", "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> "
          "(Tensor, Tensor, Tensor)")  # fmt: skip
def attention_backward_op(grad, q, k, v, out, lse):
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
    d, kinds = q.shape[-1], {q.dtype, k.dtype, v.dtype}
    fits = k.shape == v.shape and q.shape[::2] == k.shape[::2] and d == k.shape[-1] and k.shape[1]
    if not fits or d < 16 or d & (d - 1) or len(kinds) > 1 or q.dtype.itemsize > 4:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(
            f"attention in Triton: {shapes} do not fit: one dtype of 16 or 32 bits, as many keys as values, and heads "
            "of a power of two of at least 16; take 'sdpa'"
        )
    return attention_op(q, k, v)[0]
