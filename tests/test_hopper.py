"""The Gluon kernel of kernels/hopper.py, run line by line on a CPU: shared memory, mbarriers, asynchronous copies and
products as the PTX manual describes them, the three partitions interleaved at random. Nothing here knows attention."""

import random
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import kernels
from conftest import close


class Pointer:
    def __init__(self, data, at=0):
        self.data, self.at, self.dtype = data.view(-1), at, SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset):
        return Pointer(self.data, self.at + offset)


class Barrier:
    """Completes a phase when all arrivals and all bytes are in; a wait for a parity passes once that phase is over."""

    count = pending = bytes = phase = 0

    def come(self, arrivals=0, size=0):
        self.pending, self.bytes = self.pending - arrivals, self.bytes - size
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Shared:
    def __init__(self, data):
        self.data = data

    def index(self, i):
        return self.data[i] if isinstance(self.data[i], Barrier) else Shared(self.data[i])

    def permute(self, order):
        return Shared(self.data.permute(order))


class Machine:
    """One partition runs at a time; at each operation chance picks the next one, and copies and products that land."""

    def __init__(self, seed):
        self.chance, self.turn, self.errors = random.Random(seed), threading.Condition(), []
        self.waits, self.copies, self.products, self.who = {}, [], {}, None
        self.landing = self.chance.choice((0.03, 0.5))

    def pick(self):
        while True:
            while self.copies and self.chance.random() < self.landing:
                self.copies.pop(self.chance.randrange(len(self.copies)))()
            for queue in self.products.values():
                if queue and self.chance.random() < self.landing:
                    queue.pop(0)()
            able = [thread for thread, ready in self.waits.items() if ready()]
            if able or not self.copies:
                break
        if self.waits and not able:
            self.errors.append("deadlock")
        self.who = self.chance.choice(able) if able else None
        self.turn.notify_all()

    def step(self, ready=lambda: True):
        me = threading.current_thread()
        self.waits[me] = ready
        self.pick()
        self.turn.wait_for(lambda: self.who is me or self.errors)
        assert not self.errors

    def partitions(self, parts, warps, registers):
        def run(function, arguments):
            me = threading.current_thread()
            with self.turn:
                try:
                    self.turn.wait_for(lambda: self.who is me or self.errors)
                    function(*arguments)
                except Exception as error:
                    self.errors.append(error)
                del self.waits[me]
                self.pick()

        self.waits = {threading.Thread(target=run, args=part): lambda: True for part in parts}
        threads = list(self.waits)
        for thread in threads:
            thread.start()
        with self.turn:
            self.pick()
        for thread in threads:
            thread.join()
        assert not self.errors, self.errors

    def copy(self, descriptor, at, barrier, shared):
        (data, (length, width), (row, _), (block, _)) = descriptor
        rows = torch.zeros(block, width, dtype=data.data.dtype)
        for i in range(max(0, min(block, length - at[0]))):
            rows[i] = data.data[data.at + (at[0] + i) * row :][:width]
        shared.data.fill_(float("nan"))  # whoever still reads it finds out
        self.copies.append(lambda: (shared.data.copy_(rows), barrier.come(size=rows.numel() * 2)))
        self.step()

    def product(self, a, b, acc, use_acc=True, is_async=True):
        result, left = [], a.data if isinstance(a, Shared) else a
        work = lambda: result.append(left.float() @ b.data.float() + (acc if use_acc else 0))
        self.products.setdefault(threading.current_thread(), []).append(work)
        self.step()
        return result  # empty while it is in flight

    def product_wait(self, left, deps):
        queue = self.products[threading.current_thread()]
        while len(queue) > left:
            queue.pop(0)()
        self.step()
        done = [d[0] if isinstance(d, list) and d else d for d in deps]
        return done if len(done) > 1 else done[0]

    def gluon(self, program):
        def allocate(dtype, shape, layout):
            if dtype != torch.int64:
                return Shared(torch.full(shape, float("nan"), dtype=dtype))
            barriers = [Barrier() for _ in range(shape[0])]
            return Shared(barriers) if len(shape) == 2 else barriers[0]

        def store(pointer, values, mask):
            at, mask = torch.broadcast_tensors(pointer.at, mask)
            pointer.data[at[mask]] = values[mask]

        def init(barrier, count):
            barrier.count = barrier.pending = count

        layout = dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "NVMMASharedLayout"),
                               lambda *args, **kwargs: None)  # fmt: skip
        gl = SimpleNamespace(
            float32=torch.float32, int64=torch.int64, static_range=range,
            program_id=lambda axis: torch.tensor(program[axis]),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype), arange=lambda a, b, _: torch.arange(a, b),
            where=lambda c, a, b: torch.where(c, a, b) if isinstance(c, torch.Tensor) else a if c else b,
            expand_dims=torch.unsqueeze, max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2, store=store,
            maximum=torch.maximum, convert_layout=lambda x, _: x, allocate_shared_memory=allocate,
            warp_specialize=self.partitions, **layout,
        )  # fmt: skip
        mb = SimpleNamespace(
            MBarrierLayout=lambda: None, init=init, arrive=lambda b, count: (b.come(count), self.waits and self.step()),
            expect=lambda b, size: b.come(1, -size),
            wait=lambda b, parity, pred=True: pred and self.step(lambda: b.phase % 2 != parity),
        )  # fmt: skip
        hop = SimpleNamespace(warpgroup_mma=self.product, warpgroup_mma_wait=self.product_wait,
                              fence_async_shared=lambda: None)  # fmt: skip
        tma = SimpleNamespace(make_tensor_descriptor=lambda *parts: parts[:4], async_copy_global_to_shared=self.copy)
        return {"gl": gl, "mb": mb, "hop": hop, "tma": tma}


@pytest.mark.parametrize("stages", [2, 3])
def test_the_hopper_kernel_computes_attention_however_its_partitions_interleave(stages, monkeypatch):
    module, (M, N, D, H) = sys.modules["kernels.hopper"], (4, 4, 8, 2)
    for seed, (Lq, Lk) in enumerate([(5, 3), (4, 4), (6, 9), (3, 22), (7, 40)] * 12):
        q, k, v = (torch.randn(2, n, H, D) for n in (Lq, Lk, Lk))
        out, lse = torch.full_like(q, float("nan")), torch.full((2, H, Lq), float("nan"))
        for program in [(block, head) for block in range(-(-Lq // M)) for head in range(2 * H)]:
            for name, value in Machine(seed).gluon(program).items():
                monkeypatch.setattr(module, name, value)
            pointers = map(Pointer, (q, k, v, out, lse))
            module.attention_forward_hopper(*pointers, Lq, Lk, H, D**-0.5 / 0.6931471805599453, D, M, N, stages)
        assert close(out, kernels.attention_ref(q, k, v), 1e-5)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
        assert close(lse, scores.logsumexp(-1) / 0.6931471805599453, 1e-5)
