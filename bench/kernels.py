"""The kernels: `python -m bench.kernels SECTION ...`

check       each configuration of the attention kernels in a process of its own, forward and backward, against
            float32: pass, or what went wrong (on a CPU interpreted)
attention   forward and backward beside PyTorch's attention; on a GPU each of its backends, TFLOP/s
norm        a GPU alone: the fused passes beside their plain twins, GB/s
compile     no device needed: every kernel through ptxas: registers, spilled bytes, shared memory; a spill fails

python -m bench.kernels compile --arch 80                   # does it spill on an A100?
"""

from bench import parse_arguments, run

NAMES = ("check", "attention", "norm", "compile")
args = parse_arguments("bench.kernels", NAMES, __doc__) if __name__ == "__main__" else None

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from multiprocessing import get_context

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench.measure import ceilings, direction, in_turns, on_gpu, relative_difference
from dit import rope_3d
from kernels import ATTENTION, hopper
from kernels import norm as fused

triton_attention = sys.modules["kernels.attention"]  # whose name in the package is the function's
CLOSE = 1e-2  # |ours - float32| / |float32| in bfloat16


def cases(args):
    """(kernel, configuration, head_dim) of every attention configuration; the Hopper kernel has one."""
    kinds = {name: [*product(configs, (128, 64))] for name, configs in triton_attention.CONFIGS.items()}
    kinds["attention_forward_hopper"] = [(tuple(hopper.CONSTANTS.values()), 128)]
    return [(name, *case) for name, some in kinds.items() for case in some if args.only in name]


def check(args):
    if not on_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
    fits = on_gpu() and kernels.on_hopper(torch.device("cuda"))
    todo = [case for case in cases(args) if fits or "hopper" not in case[0]]
    context, at_once, seconds = get_context("spawn"), *((16, 90) if on_gpu() else (2, 600))
    for some in [todo[i : i + at_once] for i in range(0, len(todo), at_once)]:
        answers = [context.SimpleQueue() for _ in some]
        running = [context.Process(target=check_one, args=(*case, answer)) for case, answer in zip(some, answers)]
        for process in running:
            process.start()
        end = time.monotonic() + seconds
        for (name, config, dim), process, answer in zip(some, running, answers):
            process.join(max(0, end - time.monotonic()))
            lost = "hung" if process.is_alive() else f"ended with {process.exitcode}"
            process.kill()
            difference, result = (math.nan, lost) if answer.empty() else answer.get()
            yield {"kernel": name, "configuration": str(config), "head_dim": dim, "difference": difference,
                   "result": result}  # fmt: skip


def forward_and_backward(function, inputs, grad):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def check_one(name, config, dim, answer):
    """Forward and backward twice with one configuration, the plainest of the other kernels, at lengths with tails."""
    configs = triton_attention.CONFIGS
    configs |= {other: [config] if other == name else some[-1:] for other, some in configs.items()}
    triton_attention.usable = lambda configs, arguments, **_: configs
    place, dtype, lengths = ("cuda", torch.bfloat16, (8190, 1600)) if on_gpu() else ("cpu", torch.float32, (130, 70))
    try:
        q, k, v = (torch.randn(1, lengths[i], 2, dim, device=place, dtype=dtype, requires_grad=True) for i in (0, 1, 1))
        grad, exact = torch.randn_like(q), [x.detach().float().requires_grad_() for x in (q, k, v)]
        function = ATTENTION["hopper" if "hopper" in name else "triton"]
        ours, again = (forward_and_backward(function, (q, k, v), grad) for _ in range(2))
        theirs = forward_and_backward(ATTENTION["ref"], exact, grad)
        difference = relative_difference(lambda: ours, lambda: theirs)
        same = all(torch.equal(a, b) for a, b in zip(ours, again))
        good = "pass" if difference < CLOSE else "wrong numbers"
        answer.put((difference, good if same else "other bits each time"))
    except Exception as error:
        answer.put((math.nan, f"{type(error).__name__}: {str(error).strip()[:120]}"))


def backend(which):
    def run(q, k, v):
        with sdpa_kernel(which):
            return ATTENTION["sdpa"](q, k, v)

    return run


def attention(args):
    if on_gpu():
        candidates = {name: ATTENTION[name] for name in ("triton", "cudnn", "hopper")}
        candidates |= {"flash": backend(SDPBackend.FLASH_ATTENTION),
                       "efficient": backend(SDPBackend.EFFICIENT_ATTENTION)}  # fmt: skip
        peak, device, shapes = ceilings(args.repeat)[0], "cuda", [(1, *shape, torch.bfloat16) for shape in (
            (18480, 18480, 24, 128), (8190, 8190, 24, 128), (18480, 512, 24, 128), (18480, 1600, 24, 128),
            (75600, 75600, 4, 128), (18480, 18480, 24, 64))]  # fmt: skip
    else:
        candidates = {name: ATTENTION[name] for name in ("slices", "sdpa", "ref")}
        peak, device, shapes = None, "cpu", [(1, 1024, n, 12, d, torch.float32)
                                             for n, d in ((1024, 128), (512, 128), (1024, 64))]  # fmt: skip
        shapes += [(32, *n, 8, 32, torch.bfloat16) for n in ((64, 64), (256, 256), (256, 96))]  # a batch of nano's
    for (B, Lq, Lk, heads, dim, dtype), (way, factor) in product(shapes, (("forward", 4), ("backward", 10))):
        qkv = tuple(torch.randn(B, n, heads, dim, device=device, dtype=dtype, requires_grad=True) for n in (Lq, Lk, Lk))
        runs = {name: direction(way, function, qkv) for name, function in candidates.items()}
        rates = {name: factor * B * Lq * Lk * heads * dim / seconds / 1e12
                 for name, seconds in in_turns(runs, args.repeat).items()}  # fmt: skip
        row = {"B, Lq x Lk, heads x dim": f"{B}, {Lq} x {Lk}, {heads} x {dim}", "dtype": str(dtype)[6:],
               "direction": way} | {f"{name} TFLOP/s": rate for name, rate in rates.items()}  # fmt: skip
        ours, theirs = next(iter(runs.values())), direction(way, ATTENTION["sdpa"], qkv)
        row |= {"best of matmul": max(r for r in rates.values() if r == r) / peak} if peak else {}
        yield row | {"first to sdpa": relative_difference(ours, theirs)}


def norm(args):
    """Each fused pass of the 5B at 720p, and the norm of its decoder before the pixel shuffle."""
    peak = ceilings(args.repeat)[1]
    yield from norm_rows(args.repeat, (21, 22, 40), 24, torch.bfloat16, (1, 256, 4, 352, 640), peak)


def norm_rows(repeat, grid, heads, dtype, video, peak=None, ways=("forward", "backward")):
    """Kernel beside plain twin; bytes count what has to be read and written."""
    device, D = torch.device("cuda" if on_gpu() else "cpu"), 128 * heads
    rope = rope_3d(grid, 128, device)
    new = {"device": device, "dtype": dtype, "requires_grad": True}
    x, y = (torch.randn(1, len(rope[0]), D, **new) for _ in range(2))
    gate, shift, scale = (torch.randn(1, 1, D, **new) for _ in range(3))
    pixels = torch.randn(video, **{**new, "requires_grad": False}).contiguous(memory_format=torch.channels_last_3d)
    for name, inputs, rest, passes in (  # passes: how often x is read or written, forward and backward
        ("rms_norm_rope", (x, torch.rand(D, **new)), (rope, heads, 1e-6), (2, 3)),
        ("layer_norm_modulate", (x, shift, scale), (1e-6,), (2, 3)),
        ("gate_residual", (x, y, gate), (), (3, 3)),
        ("gate_residual_norm", (x, y, gate, shift, scale), (1e-6,), (4, 6)),
        ("channel_norm_silu", (pixels, torch.rand(video[1], 1, 1, 1, **new)), (), (2,)),  # its backward is the twin's
    ):
        functions = [getattr(fused, f"{name}_{kind}") for kind in ("triton", "plain")]
        for way, count in zip(ways, passes):
            ours, plain = (direction(way, lambda *t, f=f: f(*t, *rest), inputs) for f in functions)
            seconds = in_turns({"ours": ours, "plain": plain}, max(repeat, 15) if on_gpu() else repeat)
            bandwidth = count * inputs[0].nbytes / seconds["ours"] / 1e9
            yield {"kernel": name, "elements": "x".join(map(str, inputs[0].shape)), "dtype": str(dtype)[6:],
                   "direction": way, "ours ms": seconds["ours"] * 1000, "plain ms": seconds["plain"] * 1000,
                   "ours / plain": seconds["ours"] / seconds["plain"], "GB/s": bandwidth,
                   "of copy": bandwidth / peak if peak else math.nan,
                   "relative difference": relative_difference(ours, plain)}  # fmt: skip


ABSENT = {  # the norms' kernels are compiled with all of their arguments, and without these
    "rms_norm_rope_forward": [(), ("cos", "sin")],
    "rms_norm_rope_backward": [()],
    "residual_norm_forward": [(), ("row_scale",), ("y", "gate", "new"), ("shift", "scale", "normed", "row_scale")],
    "residual_norm_backward": [(), ("y", "gate", "grad_new", "dy", "dgate"),
                               ("scale", "grad_normed", "dx", "dshift", "dscale")],
    "channel_norm_silu_forward": [()],
}  # fmt: skip


def compile_all(args):
    """At the widths of the 5B and the 14B model, in bfloat16."""
    os.environ.pop("TRITON_INTERPRET", None)  # set, there would be nothing to compile
    for name, config, dim in cases(args):
        if "hopper" not in name:
            kernel, (m, n, warps, stages) = triton_attention.compiled(name).fn, config
            constants = {"DIM": dim, "PRECISION": "tf32", "BLOCK_M": m, "BLOCK_N": n}
            options = {"num_warps": warps, "num_stages": stages}
        elif args.arch // 10 == 9:
            kernel, constants, options = hopper.compiled(), hopper.CONSTANTS, {"num_warps": 4}
        else:
            continue
        yield compile_one(args.arch, kernel, f"head_dim {dim}, {config}", constants, options)
    for name, variants in ABSENT.items():
        pixels = name.startswith("channel")
        for D, without in product((160, 256, 1024) if pixels else (3072, 5120), variants if args.only in name else ()):
            constants = {"D": D, "PAIRS": 64, **(fused.pixel_shape if pixels else fused.row_shape)(D)}
            options = {"num_warps": constants.pop("num_warps")}
            label = f"width {D}" + (f", without {' '.join(without)}" if without else "")
            yield compile_one(args.arch, fused.compiled(name), label, constants | dict.fromkeys(without), options)


FLOATS = ("row_scale", "lse", "delta", "cos", "sin", "dweight", "dgate", "dshift", "dscale")
INTEGERS = ("Lq", "Lk", "L", "HEADS", "rows", "clip", "skip", "size_class")


def compile_one(arch, kernel, label, constants, options):
    """Pointers and lengths are multiples of 16; the figures are read off the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        number = name == "eps" or name == "scale" and {"DIM", "STAGES"} & constants.keys()
        integer = name in INTEGERS or name.endswith("_stride")
        signature[name] = ("constexpr" if name in constants else "i32" if integer else "fp32" if number
                           else "*fp32" if name in FLOATS else "*bf16")  # fmt: skip
        if name == "normed" and "row_scale" not in constants:
            signature[name] = "*fp8e4nv"
        if signature[name] not in ("constexpr", "fp32") and name not in ("HEADS", "size_class"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = (GluonASTSource if "STAGES" in constants else ASTSource)(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"kernel": kernel.__name__, "configuration": label, "registers": registers, "spilled bytes": stack,
            "shared KiB": binary.metadata.shared / 1024, "result": "spills" if stack else "pass"}  # fmt: skip


SECTIONS = dict(zip(NAMES, (check, attention, norm, compile_all)))
if __name__ == "__main__":
    run("bench.kernels", args, SECTIONS)
