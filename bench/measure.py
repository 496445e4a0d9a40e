"""The stopwatch: medians of functions that take turns; on a GPU between events, the L2 cache flushed before each."""

import math
import re
import statistics
import sys
import time
from functools import cache
from pathlib import Path

import torch

from kernels import left_out


def on_gpu():
    return torch.cuda.is_available()


def device_name():
    if on_gpu():
        return torch.cuda.get_device_name()
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"CPU {cpu[1] if cpu else 'unknown'} {torch.get_num_threads()}core"


def in_turns(functions, repeat):
    """Median seconds of each, {name: function or None}, in turns after one to warm up. nan: None, or it failed."""
    times = {name: [] for name, function in functions.items() if function}
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if on_gpu() else None
    for turn in range(repeat + 1):
        for name in list(times)[:: -1 if turn % 2 else 1]:  # nobody always comes first
            seconds = None
            with left_out(name):
                seconds = once(functions[name], flush)
            if seconds is None:
                del times[name]
            else:
                times[name].append(seconds)
    return {name: statistics.median(times[name][1:]) if name in times else math.nan for name in functions}


def once(function, flush):
    if flush is None:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(2_000_000)  # about a millisecond for the CPU to get ahead: launches are not the kernel's time
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def psnr(a, b):
    """dB of uint8 frames (T, H, W, 3)."""
    import metrics  # which needs PyAV

    return metrics.psnr(a.double() / 255, b.double() / 255)


def ceilings(repeat):
    """(TFLOP/s of an 8192^3 matrix product in bfloat16, GB/s of a copy of 1 GiB, read and write counted) of a GPU."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    seconds = in_turns({"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)}, max(repeat, 20))
    return 2 * 8192**3 / seconds["matmul"] / 1e12, 2 * x.numel() / seconds["copy"] / 1e9


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def relative_difference(ours, theirs):
    """|ours - theirs| / |theirs| of all that two functions return; nan without a second, or if one fails."""
    if theirs is None:
        return math.nan
    with left_out("a difference"):
        ours, theirs = (torch.cat([x.float().flatten() for x in as_tuple(function())]) for function in (ours, theirs))
        return (torch.dist(ours, theirs) / theirs.norm()).item()
    return math.nan


def direction(name, function, inputs):
    """What to time: the forward alone, or the backward of a forward that ran once."""
    if name == "forward":
        return torch.no_grad()(lambda: function(*inputs))

    @cache
    def forward():
        out = as_tuple(function(*inputs))
        torch.manual_seed(0)  # both sides get the same gradients, whatever the layout of their results
        return out, [torch.randn(o.shape, device=o.device, dtype=o.dtype) for o in out]

    return lambda: torch.autograd.grad(forward()[0], inputs, forward()[1], retain_graph=True)


def peak_memory(run):
    """GiB that a run needs on top of what is there."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with left_out("memory"):
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    return math.nan
