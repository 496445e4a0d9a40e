"""The forward of attention for Hopper, in Gluon: q (B, Lq, H, 128), k and v (B, Lk, H, 128) in 16 bits -> out and lse.

After FlashAttention-3 (arXiv 2407.08608): a program has 128 queries of one head and three partitions. A producer warp
loads blocks of 128 keys and values through the tensor memory accelerator (TMA); two warpgroups of consumers own 64
queries each. A consumer issues q k^T of the next block and p v of the last one together, so the tensor cores work while
it computes softmax, and the two issue in turns (ping-pong). `attention_blocks` is the plain twin: the same blocks in
the same order, the short block first because it alone is masked.

Each stage of shared memory has two mbarriers, full (the copy arrived) and empty (both consumers read it). The wait on
the next keys stands between the two waits on the tensor cores on purpose: ptxas moves softmax over a bare wait.
It compiles for sm_90a without spills (`python -m bench.kernels compile`) and has never run on a GPU, so `auto` does not
time it: add it to `kernels.CANDIDATES` once `python -m bench.kernels check` passed. Backward is `attention.py`'s.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from kernels.attention import LOCK, attention_op_shapes, attention_triton, backward, operator, save_for_backward

gl = hop = mb = tma = None  # Gluon, imported by `compiled`
BLOCK = 128  # queries of a program, keys of a block
CONSTANTS = {"D": 128, "M": BLOCK, "N": BLOCK, "STAGES": 2}  # 160 KiB of shared memory


def attention_blocks(q, k, v):
    """-> out (B, Lq, H, d), lse (B, H, Lq) in log2."""
    (B, Lq, H, d), Lk = q.shape, k.shape[1]
    largest, total = q.new_full((B, H, Lq, 1), -math.inf).float(), q.new_zeros(B, H, Lq, 1).float()
    acc, p, values = q.new_zeros(B, H, Lq, d).float(), None, None
    for start in range((Lk - 1) // BLOCK * BLOCK, -1, -BLOCK):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, start : start + BLOCK]).float() * (d**-0.5 * math.log2(math.e))
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        if p is not None:
            acc += (p @ values).float()
        p, shrink = torch.exp2(scores - new), torch.exp2(largest - new)
        total, largest, acc = total * shrink + p.sum(-1, keepdim=True), new, acc * shrink
        p, values = p.to(v), v[:, start : start + BLOCK].transpose(1, 2)
    out = (acc + (p @ values).float()) / total
    return out.transpose(1, 2).to(q), (largest + total.log2())[..., 0]


def producer(
    q_desc, k_desc, v_desc, q_row, Lk, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    half: gl.constexpr = M // 2
    mb.expect(q_full, M * D * 2)
    tma.async_copy_global_to_shared(q_desc, [q_row, 0], q_full, q_smem.index(0))
    tma.async_copy_global_to_shared(q_desc, [q_row + half, 0], q_full, q_smem.index(1))
    tail = (Lk - 1) // N * N
    stage = 0
    phase = 0
    for start in range(0, Lk, N):
        mb.wait(k_empty.index(stage), phase)
        mb.expect(k_full.index(stage), N * D * 2)
        tma.async_copy_global_to_shared(k_desc, [tail - start, 0], k_full.index(stage), k_smem.index(stage))
        mb.wait(v_empty.index(stage), phase)
        mb.expect(v_full.index(stage), N * D * 2)
        tma.async_copy_global_to_shared(v_desc, [tail - start, 0], v_full.index(stage), v_smem.index(stage))
        stage += 1
        wrap = stage == STAGES
        phase = gl.where(wrap, phase ^ 1, phase)
        stage = gl.where(wrap, 0, stage)


def consumer(
    out, lse, q_row, ROW, Lq, Lk, scale, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, mine, other,
    WHO: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    half: gl.constexpr = M // 2
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    PV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PV, k_width=2)
    q = q_smem.index(WHO)
    zero = gl.zeros([half, N], gl.float32, S)
    acc = gl.zeros([half, D], gl.float32, PV)

    mb.wait(q_full, 0)
    mb.wait(k_full.index(0), 0)
    s = hop.warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = hop.warpgroup_mma_wait(0, deps=[s])
    mb.arrive(k_empty.index(0), count=1)
    columns = gl.arange(0, N, gl.SliceLayout(0, S))
    s = gl.where(gl.expand_dims(columns < Lk - (Lk - 1) // N * N, 0), s, float("-inf"))
    largest = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - gl.expand_dims(largest, 1))
    total = gl.sum(p, 1)
    p16 = gl.convert_layout(p.to(out.dtype.element_ty), P)

    stage = 0
    phase = 0
    turn = 0
    mb.wait(k_full.index(1), 0, pred=N < Lk)
    for start in range(N, Lk, N):
        last, last_phase = stage, phase
        stage += 1
        wrap = stage == STAGES
        phase = gl.where(wrap, phase ^ 1, phase)
        stage = gl.where(wrap, 0, stage)
        mb.wait(mine, turn)
        s_next = hop.warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mb.wait(v_full.index(last), last_phase)
        acc = hop.warpgroup_mma(p16, v_smem.index(last), acc, is_async=True)
        mb.arrive(other, count=1)
        turn = turn ^ 1
        s, acc = hop.warpgroup_mma_wait(1, deps=[s_next, acc])
        mb.arrive(k_empty.index(stage), count=1)
        new = gl.maximum(largest, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - gl.expand_dims(new, 1))
        shrink = gl.exp2(largest - new)
        total = total * shrink + gl.sum(p, 1)
        largest = new
        p_next = gl.convert_layout(p.to(out.dtype.element_ty), P)
        after = stage + 1
        roll = after == STAGES
        mb.wait(k_full.index(gl.where(roll, 0, after)), gl.where(roll, phase ^ 1, phase), pred=start + N < Lk)
        acc, p16, total = hop.warpgroup_mma_wait(0, deps=[acc, p_next, total])
        mb.arrive(v_empty.index(last), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, PV)), 1)

    mb.wait(v_full.index(stage), phase)
    acc = hop.warpgroup_mma(p16, v_smem.index(stage), acc, is_async=True)
    acc = hop.warpgroup_mma_wait(0, deps=[acc])
    first = q_row + WHO * half
    rows = first + gl.arange(0, half, gl.SliceLayout(1, S))
    gl.store(lse + rows, largest + gl.log2(total), mask=rows < Lq)
    rows_o = first + gl.arange(0, half, gl.SliceLayout(1, PV))
    d = gl.arange(0, D, gl.SliceLayout(0, PV))
    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, PV)), 1)
    at = out + gl.expand_dims(rows_o.to(gl.int64) * ROW, 1) + gl.expand_dims(d, 0)
    gl.store(at, acc.to(out.dtype.element_ty), mask=gl.expand_dims(rows_o < Lq, 1))


def attention_forward_hopper(
    q, k, v, out, lse, Lq, Lk, HEADS, scale, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr
):
    half: gl.constexpr = M // 2
    ROW = HEADS * D
    q_row = gl.program_id(0) * M
    batch, head = gl.program_id(1) // HEADS, gl.program_id(1) % HEADS
    q += batch.to(gl.int64) * Lq * ROW + head * D
    k += batch.to(gl.int64) * Lk * ROW + head * D
    v += batch.to(gl.int64) * Lk * ROW + head * D
    out += batch.to(gl.int64) * Lq * ROW + head * D
    lse += gl.program_id(1).to(gl.int64) * Lq
    dtype: gl.constexpr = q.dtype.element_ty
    L: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_desc = tma.make_tensor_descriptor(q, [Lq, D], [ROW, 1], [half, D], L)
    k_desc = tma.make_tensor_descriptor(k, [Lk, D], [ROW, 1], [N, D], L)
    v_desc = tma.make_tensor_descriptor(v, [Lk, D], [ROW, 1], [N, D], L)
    q_smem = gl.allocate_shared_memory(dtype, [2, half, D], L)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, N, D], L)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, N, D], L)
    B: gl.constexpr = mb.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], B)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    mb.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mb.init(k_full.index(i), count=1)
        mb.init(v_full.index(i), count=1)
        mb.init(k_empty.index(i), count=2)
        mb.init(v_empty.index(i), count=2)
        mb.arrive(k_empty.index(i), count=2)
        mb.arrive(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mb.init(order.index(i), count=1)
    mb.arrive(order.index(0), count=1)  # the first warpgroup begins
    hop.fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (out, lse, q_row, ROW, Lq, Lk, scale, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full,
                        v_empty, order.index(0), order.index(1), 0, M, N, D, STAGES)),
            (consumer, (out, lse, q_row, ROW, Lq, Lk, scale, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full,
                        v_empty, order.index(1), order.index(0), 1, M, N, D, STAGES)),
            (producer, (q_desc, k_desc, v_desc, q_row, Lk, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full,
                        v_empty, M, N, D, STAGES)),
        ],
        [4, 1],  # warps of the second consumer and the producer
        [240, 24],  # and their registers
    )  # fmt: skip


@lru_cache
def compiled(name="attention_forward_hopper"):
    with LOCK:
        from triton.experimental import gluon
        from triton.experimental.gluon import language
        from triton.experimental.gluon.language.nvidia import hopper

        globals().update(gl=language, hop=hopper, mb=hopper.mbarrier, tma=hopper.tma)
        for kernel in (producer, consumer):
            globals()[kernel.__name__] = gluon.jit(kernel)
        return gluon.jit(attention_forward_hopper, do_not_specialize=["HEADS"])


@operator("attention_hopper", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
def attention_hopper_op(q, k, v):
    import triton

    q, k, v = (x.contiguous() for x in (q, k, v))
    (B, Lq, H, d), out_lse = q.shape, attention_op_shapes(q, k, v)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    with torch.cuda.device_of(q):
        compiled()[(triton.cdiv(Lq, BLOCK), B * H)](
            q, k, v, *out_lse, Lq, k.shape[1], H, d**-0.5 * math.log2(math.e), **CONSTANTS, num_warps=4
        )
    return out_lse


attention_hopper_op.register_fake(attention_op_shapes)
attention_hopper_op.register_autograd(backward, setup_context=save_for_backward)


def attention_hopper(q, k, v):
    """Heads of 128 in 16 bits; the rest runs `attention_triton`, which also refuses shapes that do not fit."""
    fits = k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[-1] == k.shape[-1] == 128 and k.shape[1]
    if not fits or not q.dtype == k.dtype == v.dtype or q.dtype.itemsize != 2:
        return attention_triton(q, k, v)
    return attention_hopper_op(q, k, v)[0]
