"""How fast the kernels and the model are, beside what else there is, measured in one process.

    attention   forward and backward beside PyTorch's attention; on a GPU each of its backends, TFLOP/s
    norm        the fused passes beside the usual lines of PyTorch; GB/s
    dit         a step of the diffusion transformer beside diffusers' WanTransformer3DModel, the same random weights
    vae         encode and decode beside diffusers' AutoencoderKLWan, the same random weights; on a GPU peak memory too
    edit        a whole edit by phase: encode, 50 steps, decode (random weights; the context is random too)
    train       steps of train.py, stage 2, random weights
    memory      no device needed: peak memory of an edit at 480p and 720p by part, computed on tensors without storage
    check       every configuration of the attention kernels by itself, forward and backward, against float32
    compile     no device needed: compile every kernel for one, and list registers, spills and shared memory

On a GPU the sizes are those of Wan2.2-TI2V-5B at 480p and 720p in bfloat16, and fractions are of a matrix product and
a copy measured in the same run. On a CPU the widths are real, the rest is small. What is compared runs in turns, and a
figure is the median of its turns; on a GPU between events, with the L2 cache flushed before each turn.
Everything is printed and goes to bench/<device>.json, row by row: what stops early keeps its rows. Several sections run
each in a process of its own, so that one that fails leaves the device to the next. This command alone in kernels/ knows the floors above it.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from dit import DiT, DiTConfig, rope_3d
from kernels import ATTENTION, left_out
from vae import VAE, VAEConfig

EXAMPLES = """examples:
  python -m kernels.bench check attention norm --limit 200    # the kernels, at most 200 s a section
  python -m kernels.bench dit vae --repeat 9    # the model beside diffusers (pip install diffusers)
  python -m kernels.bench compile --arch 80     # will it spill on an A100?
"""
HOUSE = Path(__file__).resolve().parent.parent
GRIDS = {"480p": (21, 30, 52), "720p": (21, 44, 80)}  # latents of 81 frames, 832x480 and 1280x704, of Wan 2.2


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="+", choices=list(SECTIONS), help="what to measure, one or more")
    add("--repeat", type=int, default=7, help="turns of each measurement (default %(default)s)")
    add("--steps", type=int, default=50, help="edit: denoising steps (default %(default)s)")
    add("--limit", type=float, metavar="SECONDS", help="stop a section after so long (default: never)")
    add("--arch", type=int, default=90, help="compile: compute capability, e.g. 80, 89, 90 (default %(default)s)")
    add("--out", type=Path, default=HOUSE / "bench", help="folder of the results (default: bench/ of this repository)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if len(args.what) > 1 or args.limit:
        return sys.exit("; ".join(filter(None, (in_a_process(what, args) for what in args.what))) or None)
    (what,), rows, path, started = args.what, [], None, time.time()
    nowhere = {"compile": f"sm_{args.arch}, compiled only", "memory": "computed"}
    device = nowhere.get(what) or device_name()
    try:
        for row in SECTIONS[what](args):
            rows.append(row)
            path = save(args.out, device, what, rows, argv)
    finally:
        if rows:
            print(f"{table(rows)}\n{what}: {len(rows)} rows, {time.time() - started:.0f} s, {path}\n", flush=True)


def in_a_process(what, args):
    """Measure a section in a process of its own, which ends with all that it started -> what went wrong, or None."""
    options = ["--repeat", args.repeat, "--steps", args.steps, "--arch", args.arch, "--out", args.out]
    command = [sys.executable, "-m", "kernels.bench", what, *map(str, options)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return f"{what}: failed" if process.wait(args.limit) else None
    except subprocess.TimeoutExpired:
        return f"{what}: stopped after {args.limit:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# Measuring


def on_gpu():
    return torch.cuda.is_available()


def device_name():
    if on_gpu():
        return torch.cuda.get_device_name()
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"CPU {cpu[1] if cpu else 'unknown'} {torch.get_num_threads()}core"


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("processor", "")).strip("-")


def in_turns(functions, repeat):
    """Median seconds of each function, {name: function or None}, one after the other, `repeat` turns after a first.

    None, or one that the device refuses: nan.
    """
    times = {name: [] for name in functions}
    alive = {name: function for name, function in functions.items() if function}
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if on_gpu() else None
    for turn in range(repeat + 1):
        for name, function in list(alive.items())[:: -1 if turn % 2 else 1]:  # nobody always comes first
            seconds = None
            with left_out(name):
                seconds = once(function, flush)
            if seconds is None:
                del alive[name]
            elif turn:
                times[name].append(seconds)
    return {name: statistics.median(ts) if name in alive else float("nan") for name, ts in times.items()}


def once(function, flush):
    if flush is None:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(
        2_000_000
    )  # about a millisecond, in which the CPU gets ahead: its time to launch is not the kernel's
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def ceilings(repeat):
    """(TFLOP/s of a 8192^3 matrix product in bfloat16, GB/s of a copy of 1 GiB, read and write counted) of a GPU."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    seconds = in_turns({"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)}, max(repeat, 20))
    return 2 * 8192**3 / seconds["matmul"] / 1e12, 2 * x.numel() / seconds["copy"] / 1e9


def table(rows):
    """Rows, dicts with the same keys, as a Markdown table."""
    cells = [list(rows[0])] + [[shown(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells)


def shown(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def save(folder, device, what, rows, argv):
    """Put a section into the device's file; what else is in it stays. The file is whole or as it was."""
    path = folder / f"{slug(device)}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    command = " ".join(["python -m kernels.bench", *(sys.argv[1:] if argv is None else argv)])
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results[what] = {"date": date, "device": device, "torch": torch.__version__, "command": command, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1).replace("NaN", "null") + "\n")
    os.replace(temporary, path)
    return path


# The kernels


def attention(args):
    def backend(which):
        def run(q, k, v):
            with sdpa_kernel(which):
                return ATTENTION["sdpa"](q, k, v)

        return run

    if on_gpu():
        device, shapes = "cuda", [(1, *shape, torch.bfloat16) for shape in (
            (18480, 18480, 24, 128), (8190, 8190, 24, 128), (18480, 512, 24, 128), (18480, 1600, 24, 128),
            (75600, 75600, 4, 128), (18480, 18480, 24, 64))]  # fmt: skip
        candidates = {"triton": ATTENTION["triton"], "cudnn": ATTENTION["cudnn"],
                      "flash": backend(SDPBackend.FLASH_ATTENTION),
                      "efficient": backend(SDPBackend.EFFICIENT_ATTENTION)}  # fmt: skip
        peak = ceilings(args.repeat)[0]
    else:
        device, shapes = (
            "cpu",
            [
                (1, *shape, torch.float32)
                for shape in ((1024, 1024, 12, 128), (1024, 512, 12, 128), (1024, 1024, 12, 64))
            ],
        )
        shapes += [
            (32, *shape, 8, 32, torch.bfloat16) for shape in ((64, 64), (256, 256), (256, 96))
        ]  # a batch of nano's
        candidates = {name: ATTENTION[name] for name in ("slices", "sdpa", "ref")}
        peak = None
    ours = next(iter(candidates))
    for B, Lq, Lk, heads, dim, dtype in shapes:
        q, k, v = (torch.randn(B, n, heads, dim, device=device, dtype=dtype, requires_grad=True) for n in (Lq, Lk, Lk))
        grad = torch.randn_like(q)
        flops = 4 * B * Lq * Lk * heads * dim
        for direction, factor in (("forward", 1), ("backward", 2.5)):
            runs = {}
            for name, function in candidates.items():
                runs[name] = attention_run(function, direction, (q, k, v), grad)
            seconds = in_turns(runs, args.repeat)
            row = {
                "B, Lq x Lk, heads x dim": f"{B}, {Lq} x {Lk}, {heads} x {dim}",
                "dtype": str(dtype)[6:],
                "direction": direction,
            }
            row |= {f"{name} TFLOP/s": factor * flops / s / 1e12 for name, s in seconds.items()}
            if peak:
                best = min((s for name, s in seconds.items() if name != ours and not math.isnan(s)), default=math.nan)
                row |= {"best other / ours": best / seconds[ours]}
                row |= {"of matmul": factor * flops / seconds[ours] / 1e12 / peak}
            yield row | {
                f"{ours} to sdpa": relative_difference(
                    runs[ours], attention_run(ATTENTION["sdpa"], direction, (q, k, v), grad)
                )
            }


def relative_difference(ours, theirs):
    """|ours - theirs| / |theirs| of all that two functions return; nan where there is no second or one of them fails."""
    if theirs is None:
        return math.nan
    with left_out("a difference"):
        pairs = [x if isinstance(x, tuple) else (x,) for x in (ours(), theirs())]
        sizes = [(torch.dist(a.float(), b.float()), b.float().norm()) for a, b in zip(*pairs)]
        return (sum(d**2 for d, _ in sizes) / sum(n**2 for _, n in sizes)).sqrt().item()
    return math.nan


def attention_run(function, direction, qkv, grad):
    """What to time: the forward alone, or the backward of a forward that ran once."""
    if direction == "forward":
        return torch.no_grad()(lambda: function(*qkv))
    kept = []

    def run():
        if not kept:
            kept.append(function(*qkv))
        return torch.autograd.grad(kept[0], qkv, grad, retain_graph=True)

    return run


def check(args):
    """Each configuration of the attention kernels in a process of its own, 90 s at most: one that hangs, cannot be
    launched or computes something else is told apart from the rest, before a stopwatch may choose it."""
    from kernels.bench import check_one  # by this name its processes find it

    configs = importlib.import_module("kernels.attention").CONFIGS
    if not on_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
    cases = [(name, config, dim) for name, known in configs.items() for config in known for dim in (128, 64)]
    context, at_once = get_context("spawn"), 16 if on_gpu() else 2
    for i in range(0, len(cases), at_once):
        answers = [context.SimpleQueue() for _ in cases[i : i + at_once]]
        running = [context.Process(target=check_one, args=(*case, answer)) for case, answer in zip(cases[i:], answers)]
        for process in running:
            process.start()
        end = time.monotonic() + (90 if on_gpu() else 600)
        for (name, config, dim), process, answer in zip(cases[i:], running, answers):
            process.join(max(0, end - time.monotonic()))
            found = {
                "relative difference": math.nan,
                "same bits again": False,
                "failed": "" if process.exitcode == 0 else "ended",
            }
            if process.is_alive():
                process.kill()
                found["failed"] = "hung"
            yield {"kernel": name, "configuration": str(config), "head_dim": dim} | (
                found if answer.empty() else answer.get()
            )


def check_one(name, config, dim, answer):
    """Forward and backward with one configuration of a kernel, the plainest of the others, at lengths with tails."""
    kernels = importlib.import_module("kernels.attention")
    for other in kernels.CONFIGS:
        kernels.CONFIGS[other] = [config] if other == name else kernels.CONFIGS[other][-1:]
    place, lengths = ("cuda", (8190, 1600)) if on_gpu() else ("cpu", (130, 70))
    dtype = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's arithmetic of 16 bits is its own
    try:
        q, k, v = (
            torch.randn(1, n, 2, dim, device=place, dtype=dtype, requires_grad=True)
            for n in (lengths[0], *lengths[1:] * 2)
        )
        grad = torch.randn_like(q)
        exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
        kernels.usable = lambda configs, arguments, **_: configs
        results = []
        for function, inputs in ((ATTENTION["triton"], (q, k, v)),) * 2 + ((ATTENTION["ref"], exact),):
            out = function(*inputs)
            results.append((out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
        ours, again, theirs = results
        same = all(torch.equal(a, b) for a, b in zip(ours, again))
        answer.put(
            {
                "relative difference": relative_difference(lambda: ours, lambda: theirs),
                "same bits again": same,
                "failed": "",
            }
        )
    except Exception as error:
        answer.put(
            {
                "relative difference": math.nan,
                "same bits again": False,
                "failed": f"{type(error).__name__}: {str(error).strip()[:120]}",
            }
        )


def norm(args):
    if on_gpu():
        peak = ceilings(args.repeat)[1]
        yield from norm_rows(args.repeat, (21, 22, 40), 24, torch.bfloat16, peak)
        yield channel_norm_row(
            args.repeat, (1, 256, 4, 352, 640), torch.bfloat16, peak
        )  # the 5B's decoder, before its shuffle
        return
    for heads in (12, 24):
        for dtype in (torch.float32, torch.bfloat16):
            yield from norm_rows(args.repeat, (4, 16, 16), heads, dtype)


def norm_rows(repeat, grid, heads, dtype, peak=None):
    """Each function beside the lines one would write, at head_dim 128 and a grid of tokens."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    D, (cos, sin) = 128 * heads, rope_3d(grid, 128, device)
    L, new = len(cos), {"device": device, "dtype": dtype, "requires_grad": True}

    def usual_rms(x, weight):
        a, b = F.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(-1, (heads, -1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).type_as(x)

    def usual_norm(x, shift, scale):
        return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)

    def usual_gate(x, y, gate):
        return (x.float() + y * gate).type_as(x)

    def usual_gate_norm(x, y, gate, shift, scale):
        x = usual_gate(x, y, gate)
        return x, usual_norm(x, shift, scale)

    x, y = torch.randn(1, L, D, **new), torch.randn(1, L, D, **new)
    gate, shift, scale = (torch.randn(1, 1, D, **new) for _ in range(3))
    cases = {  # name: ours, usual, inputs, how often x is read or written, forward and backward
        "rms_norm_rope": (lambda x, w: kernels.rms_norm_rope(x, w, (cos, sin), heads, 1e-6), usual_rms,
                          (x, torch.rand(D, **new)), (2, 3)),
        "layer_norm_modulate": (lambda *tensors: kernels.layer_norm_modulate(*tensors, 1e-6), usual_norm,
                                (x, shift, scale), (2, 3)),
        "gate_residual": (kernels.gate_residual, usual_gate, (x, y, gate), (3, 3)),
        "gate_residual_norm": (lambda *tensors: kernels.gate_residual_norm(*tensors, 1e-6), usual_gate_norm,
                               (x, y, gate, shift, scale), (4, 6)),
    }  # fmt: skip
    for name, (ours, usual, inputs, passes) in cases.items():
        for direction, count in zip(("forward", "backward"), passes):
            runs = {"ours": norm_run(ours, direction, inputs), "usual": norm_run(usual, direction, inputs)}
            seconds = in_turns(runs, max(repeat, 15))
            yield kernel_row(name, f"{L} x {D}", dtype, direction, runs, seconds, count * x.nbytes, peak)


def channel_norm_row(repeat, shape, dtype, peak):
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    inputs = x, torch.rand(shape[1], 1, 1, 1, device="cuda", dtype=dtype)
    ours, usual = kernels.channel_norm_silu, importlib.import_module("kernels.norm").channel_norm_silu_plain
    runs = {"ours": norm_run(ours, "forward", inputs), "usual": norm_run(usual, "forward", inputs)}
    seconds = in_turns(runs, max(repeat, 15))
    return kernel_row(
        "channel_norm_silu", f"{math.prod(shape[2:])} x {shape[1]}", dtype, "forward", runs, seconds, 2 * x.nbytes, peak
    )


def kernel_row(name, size, dtype, direction, runs, seconds, count, peak):
    """count: bytes that have to be read and written."""
    bandwidth = count / seconds["ours"] / 1e9
    row = {"kernel": name, "L x D": size, "dtype": str(dtype)[6:], "direction": direction,
           "ours ms": seconds["ours"] * 1000, "usual ms": seconds["usual"] * 1000,
           "ours / usual": seconds["ours"] / seconds["usual"], "GB/s": bandwidth}  # fmt: skip
    return (
        row
        | ({"of copy": bandwidth / peak} if peak else {})
        | {"relative difference": relative_difference(*runs.values())}
    )


def norm_run(function, direction, inputs):
    if direction == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(0)  # both sides get the same gradients, or their results could not be compared
    grads = [torch.randn_like(o) for o in out]
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)


def compile_all(args):
    """Every kernel in every configuration through ptxas, at the widths of the 5B and the 14B model."""
    os.environ.pop("TRITON_INTERPRET", None)  # set, there would be nothing to compile
    import triton

    attention, norm = (importlib.import_module(f"kernels.{name}") for name in ("attention", "norm"))
    for name, configs in attention.CONFIGS.items():
        attention.compiled(name)
        for dim in (128, 64):
            for config in configs:
                blocks = attention.triton_config(name, config)
                if args.arch < 90 and blocks.kwargs["TMA"] or args.arch // 10 != 9 and blocks.kwargs.get("SPECIALISE"):
                    continue
                constants = {"HEADS": 24, "DIM": dim, "PRECISION": "tf32", **blocks.kwargs}
                options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
                label = f"head_dim {dim}, {config}"
                yield compile_one(triton, args.arch, getattr(attention, name), label, constants, options)
    left_out = {
        "rms_norm_rope_forward": [(), ("cos", "sin")],
        "rms_norm_rope_backward": [()],
        "residual_norm_forward": [(), ("y", "gate", "new"), ("shift", "scale", "normed", "mean", "rstd")],
        "residual_norm_backward": [(), ("y", "gate", "grad_new", "dy", "dgate"),
                                   ("scale", "grad_normed", "mean", "rstd", "dx", "dshift", "dscale")],
    }  # fmt: skip
    for name, variants in left_out.items():
        kernel = norm.compiled(name)
        for D in (3072, 5120):
            shape = norm.row_shape(D)
            for absent in variants:
                constants = {"D": D, "PAIRS": 64, "BLOCK": shape["BLOCK"], **dict.fromkeys(absent)}
                label = f"width {D}" + (f", without {' '.join(absent)}" if absent else "")
                yield compile_one(triton, args.arch, kernel, label, constants, {"num_warps": shape["num_warps"]})
    for D in (160, 256, 1024):
        shape = norm.pixel_shape(D)
        warps = {"num_warps": shape.pop("num_warps")}
        kernel = norm.compiled("channel_norm_silu_forward")
        yield compile_one(triton, args.arch, kernel, f"{D} channels", {"D": D, **shape}, warps)


FLOATS = ("lse", "delta", "cos", "sin", "rstd", "mean", "dweight", "dgate", "dshift", "dscale")
INTEGERS = ("Lq", "Lk", "L", "rows", "size_class", "gate_stride", "shift_stride", "scale_stride")


def compile_one(triton, arch, kernel, label, constants, options):
    """A row for one kernel in bfloat16, pointers and lengths multiples of 16, read off the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in INTEGERS else "*fp32" if name in FLOATS else "*bf16"
        if name in ("scale", "eps") and ("DIM" in constants or name == "eps"):
            signature[name] = "fp32"
        elif name != "size_class":
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"kernel": kernel.__name__, "configuration": label, "registers": registers, "spilled bytes": stack,
            "shared KiB": binary.metadata.shared / 1024}  # fmt: skip


# The model


def has_diffusers():
    if importlib.util.find_spec("diffusers"):
        return True
    print("note: measured alone, for a comparison pip install diffusers", flush=True)
    return False


def diffusers_dit(config):
    """The same Wan DiT in diffusers; `model.load_weights` takes its names."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=True, eps=config.eps,
    )  # fmt: skip


def diffusers_vae(config):
    """The same Wan VAE in diffusers; `diffusers_vae_name` gives its names."""
    from diffusers import AutoencoderKLWan

    mean, std = config.statistics
    sizes = {"base_dim": config.dim, "z_dim": config.z_dim, "dim_mult": list(config.dim_mult), "latents_mean": mean,
             "latents_std": std, "num_res_blocks": config.num_res_blocks,
             "temperal_downsample": list(config.temporal_downsample)}  # fmt: skip
    if config.version == "2.2":
        sizes |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                  "decoder_base_dim": config.decoder_dim, "scale_factor_spatial": 16}  # fmt: skip
    return AutoencoderKLWan(**sizes)


def built(device, dtype, make):
    """make() with its parameters on a device in a dtype from the start: 5B of float32 first would need 20 GB."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def dit(args):
    from model import PRESETS

    if on_gpu():
        grids = {
            "720p": GRIDS["720p"],
            "720p + reference": (22, 44, 80),
            "480p": GRIDS["480p"],
            "480p + reference": (22, 30, 52),
        }
        cases = [(name, DiTConfig(), grid, torch.bfloat16) for name, grid in grids.items()]
    else:
        small, large = replace(PRESETS["wan21_1_3b"].dit, num_layers=3), replace(DiTConfig(), num_layers=1)
        cases = [(name, config, (4, 32, 32), dtype) for dtype in (torch.float32, torch.bfloat16)
                 for name, config in (("1.3B, 3 of 30 layers", small), ("5B, 1 of 30 layers", large))]  # fmt: skip
    for case in cases:
        yield dit_row(args, *case)
    if on_gpu():  # last, and one size: compiling takes minutes
        yield dit_row(args, *cases[0], compiled=True)


def dit_row(args, name, config, grid, dtype, compiled=False):
    """A forward of ours and of diffusers' from latents and 512 text features, and ours with the context's keys kept;
    compiled: those too."""
    from model import load_weights

    device = "cuda" if on_gpu() else "cpu"
    ours = built(device, dtype, lambda: DiT(config))
    theirs = built(device, dtype, lambda: diffusers_dit(config)) if has_diffusers() else None
    if theirs:
        load_weights(ours, theirs.state_dict())
    x = torch.randn(1, config.in_dim, *grid, device=device, dtype=dtype)
    text = torch.randn(1, 512, config.text_dim, device=device, dtype=dtype)
    t = torch.tensor([500.0], device=device)
    with torch.no_grad():
        kept = ours.context_keys_values(ours.text_embedding(text))
    runs = {
        "ours": lambda: ours(x, t, ours.text_embedding(text)),
        "diffusers": theirs and (lambda: theirs(x, t, text, return_dict=False)[0]),
        "ours, context kept": lambda: ours(x, t, kept),
    }
    if on_gpu():
        our_compiled, their_compiled = (
            compiled and model and torch.compile(model, dynamic=False) for model in (ours, theirs)
        )
        runs["ours, compiled"] = our_compiled and (lambda: our_compiled(x, t, kept))
        runs["diffusers, compiled"] = their_compiled and (lambda: their_compiled(x, t, text, return_dict=False)[0])
    with torch.no_grad():
        difference = relative_difference(runs["ours"], runs["diffusers"])
        seconds = in_turns(runs, args.repeat)
    tokens = grid[0] * grid[1] * grid[2] // 4
    row = {"model": name, "tokens": tokens, "dtype": str(dtype)[6:]} | {f"{k} s": s for k, s in seconds.items()}
    return row | {"ours / diffusers": seconds["ours"] / seconds["diffusers"], "relative difference": difference}


def vae(args):
    size, dtypes = (9, 64, 64), (torch.float32, torch.bfloat16)
    if on_gpu():
        size, dtypes = (81, 704, 1280), (torch.bfloat16,)
    configs = [VAEConfig(), VAEConfig(version="2.1", dim=96, z_dim=16)]
    for config in configs:
        for dtype in dtypes:
            yield from vae_rows(args, config, size, dtype)


def vae_rows(args, config, size, dtype):
    """Encode and decode of a clip of `size` (frames, height, width)."""
    device = "cuda" if on_gpu() else "cpu"
    ours = built(device, dtype, lambda: VAE(config))
    theirs = built(device, dtype, lambda: diffusers_vae(config)) if has_diffusers() else None
    if theirs:
        theirs.load_state_dict({diffusers_vae_name(k, config): v for k, v in ours.state_dict().items()})
    video = torch.rand(1, 3, *size, device=device, dtype=dtype) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(video)
        z = ours.denormalise(latents)  # diffusers leaves the normalisation to its pipelines
        encode = {
            "ours": lambda: ours.encode(video),
            "diffusers": theirs and (lambda: ours.normalise(theirs.encode(video).latent_dist.mean)),
        }
        decode = {
            "ours": lambda: ours.decode(latents),
            "diffusers": theirs and (lambda: theirs.decode(z, return_dict=False)[0]),
        }
        for direction, runs in (("encode", encode), ("decode", decode)):
            seconds = in_turns(runs, args.repeat if not on_gpu() else 1)
            row = {"VAE": config.version, "frames": "x".join(map(str, size)), "dtype": str(dtype)[6:],
                   "direction": direction} | {f"{name} s": s for name, s in seconds.items()}  # fmt: skip
            row["ours / diffusers"] = seconds["ours"] / seconds["diffusers"]
            if on_gpu():
                row |= {f"{name} GiB": peak_memory(run) if run else math.nan for name, run in runs.items()}
            yield row | {"relative difference": relative_difference(*runs.values())}


def peak_memory(run):
    """GiB that a run needs on top of what is there."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        run()
    except torch.OutOfMemoryError:
        return float("nan")
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def diffusers_vae_name(name, config):
    """Wan's name of a VAE parameter, as our VAE has it -> diffusers' name."""
    for wan, theirs in (
        (r"residual\.0\.", "norm1."), (r"residual\.2\.", "conv1."), (r"residual\.3\.", "norm2."),
        (r"residual\.6\.", "conv2."), (r"shortcut", "conv_shortcut"), (r"middle\.0", "mid_block.resnets.0"),
        (r"middle\.1", "mid_block.attentions.0"), (r"middle\.2", "mid_block.resnets.1"), (r"head\.0", "norm_out"),
        (r"head\.2", "conv_out"), (r"coder\.conv1", "coder.conv_in"), (r"^conv1", "quant_conv"),
        (r"^conv2", "post_quant_conv"),
    ):  # fmt: skip
        name = re.sub(wan, theirs, name)
    if config.version == "2.2":
        name = re.sub(r"downsamples\.(\d)\.downsamples\.\d\.(resample|time)", r"down_blocks.\1.downsampler.\2", name)
        name = re.sub(r"upsamples\.(\d)\.upsamples\.\d\.(resample|time)", r"up_blocks.\1.upsampler.\2", name)
        name = re.sub(r"downsamples\.(\d)\.downsamples\.(\d)", r"down_blocks.\1.resnets.\2", name)
        return re.sub(r"upsamples\.(\d)\.upsamples\.(\d)", r"up_blocks.\1.resnets.\2", name)
    name = name.replace("downsamples", "down_blocks")
    flat = re.search(r"upsamples\.(\d+)", name)
    if not flat:
        return name
    level, place = divmod(int(flat[1]), config.num_res_blocks + 2)  # a level: one block more, then its upsampling
    inner = "upsamplers.0" if place == config.num_res_blocks + 1 else f"resnets.{place}"
    return name.replace(flat[0], f"up_blocks.{level}.{inner}")


def edit(args):
    """The phases of an edit without the language model, whose weights cannot be random: seconds of each."""
    from model import PRESETS, KiwiEdit

    name, device, dtype = ("wan22_5b", "cuda", torch.bfloat16) if on_gpu() else ("nano", "cpu", torch.float32)
    model = built(device, dtype, lambda: KiwiEdit(replace(PRESETS[name], mllm=None)))
    size = (81, 704, 1280) if on_gpu() else (17, 128, 128)
    video = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, device=device)
    context = torch.randn(1, 512, model.config.dit.dim, device=device, dtype=dtype)
    with torch.no_grad():
        source = model.encode_frames(video)
        noise = torch.randn(source.shape, device=device)
        turns = iter((min(2, args.steps), args.steps))  # two steps warm up: all of them twice would be most of a lease
        phases = {"encode": lambda: model.encode_frames(video),
                  "denoise": lambda: model.denoise(noise, context, source, steps=next(turns)),
                  "decode": lambda: model.decode_frames(source)}  # fmt: skip
        seconds = {}
        for phase, run in phases.items():
            seconds |= in_turns({phase: run}, 1)
            yield {"model": name, "frames": "x".join(map(str, size)), "phase": phase, "s": seconds[phase]}
    yield {
        "model": name,
        "frames": "x".join(map(str, size)),
        "phase": f"all, {args.steps} steps",
        "s": sum(seconds.values()),
    }


def memory(args):
    """Weights and the peak of live tensors for each part of an edit in bfloat16, GiB: with --offload the largest sum
    counts. Library workspaces (cuDNN, cuBLAS: some hundred MiB) and the CUDA context (half a GiB) come on top.
    """
    from model import PRESETS, KiwiEdit

    kernels.set_backend("triton")  # on meta tensors an operator gives its result's shape
    model = built("meta", torch.bfloat16, lambda: KiwiEdit(replace(PRESETS["wan22_5b"], mllm=None)))
    dim, empty = model.config.dit.dim, lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)
    for name, (frames, height, width) in GRIDS.items():
        latents, ref = empty(1, 48, frames, height, width), empty(1, 48, 1, height, width)
        video = torch.empty(1, 3, 4 * frames - 3, 16 * height, 16 * width, dtype=torch.bfloat16)  # never on the GPU
        steps = {
            "DiT step, a reference": (model.dit, lambda: model.velocity(
                latents, empty(1), model.dit.context_keys_values(empty(1, 1536, dim)), latents, ref)),
            "VAE encode": (model.vae, lambda: model.vae.encode(video)),
            "VAE decode": (model.vae, lambda: model.vae.decode(latents, out_device="cpu")),
            "VAE encode, --tile 16": (model.vae, lambda: model.vae.encode(video, tile=16)),
            "VAE decode, --tile 16": (model.vae, lambda: model.vae.decode(latents, tile=16, out_device="cpu")),
        }  # fmt: skip
        for part, (module, run) in steps.items():
            weights = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30
            with torch.no_grad():
                peak = peak_of_live_tensors(run, module)
            yield {"frames": name, "part": part, "weights GiB": weights, "peak GiB": peak, "sum GiB": weights + peak}
    kernels.set_backend("auto")


def peak_of_live_tensors(run, module):
    """GiB of tensors on the meta device, those of the module aside, that are alive at once during run()."""
    cpu = torch.device("cpu")

    class Ledger(TorchDispatchMode):
        live, peak, known = 0, 0, weakref.WeakSet(p.untyped_storage() for p in module.parameters())

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == cpu:
                return torch.empty(args[0].shape, dtype=args[0].dtype)  # there is nothing to copy
            if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return True  # whether all of a decoded clip is finite
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if hasattr(tensor, "untyped_storage") and tensor.is_meta and tensor.untyped_storage() not in self.known:
                    storage = tensor.untyped_storage()
                    self.known.add(storage)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.free, storage.nbytes())
            return out

        def free(self, size):
            self.live -= size

    with Ledger() as ledger:
        run()
    return ledger.peak / 2**30


def train(args):
    """Steps of train.py itself, stage 2, one clip each, from decoding to the optimizer: medians after two to warm up.

    All weights are random and the language model is nano's, so that nothing needs Qwen; 30 layers of the 5B with
    float32 masters and moments want an H200, half of them fit 80 GiB and have the same utilisation.
    """
    name, settings, sizes = "nano", ["dit.num_layers=9"], {"small": (9, 128, 128)}
    if on_gpu():
        name, sizes = "wan22_5b", {"480p": (81, 480, 832), "720p": (81, 704, 1280)}
        large = torch.cuda.get_device_properties(0).total_memory > 110 * 2**30
        settings = [f"dit.num_layers={30 if large else 15}"]
    for size in sizes.values():
        with tempfile.TemporaryDirectory() as folder:  # one at a time: half of the 5B's random weights are 13 GB
            lines = train_run(Path(folder), name, size, settings, args.repeat)[2:]
        row = {"model": f"{name}, {settings[0][4:]}", "frames": "x".join(map(str, size))}
        keys = [key for key in ("seconds", "tokens_s", "tflop_s", "mfu", "memory_gib") if key in lines[0]]
        yield row | {key: statistics.median(line[key] for line in lines) for key in keys}


def train_run(folder, name, size, settings, repeat):
    """metrics.jsonl of `repeat` steps and two more, on a smooth random clip of `size`, as a list of dicts. Then the run
    is killed: its last checkpoint would be some 30 GB that nobody reads."""
    from media import write_video

    clip = F.interpolate(torch.rand(1, 3, 5, 8, 8), size, mode="trilinear")[0].mul(255).byte().permute(1, 2, 3, 0)
    write_video(folder / "source.mp4", clip.numpy(), 16)
    write_video(folder / "target.mp4", (255 - clip).numpy(), 16)
    (folder / "video.csv").write_text("src_video,tgt_video,prompt\nsource.mp4,target.mp4,Invert the colours.\n")
    settings = [*settings, "steps=100000", "global_batch=1", "image=0", f"pixels={size[1] * size[2]}"]
    command = [sys.executable, HOUSE / "train.py", "--config", name, "--stage", 2, "--init", "random", "--qwen",
               HOUSE / "weights" / "nano" / "mllm", "--data", folder, "--out", folder / "run", "--save-every", 100000, "--set", *settings]  # fmt: skip
    process, metrics, lines = subprocess.Popen([str(word) for word in command]), folder / "run" / "metrics.jsonl", []
    try:
        while len(lines) < repeat + 2:
            if process.poll() is not None:
                raise RuntimeError(f"train.py ended with {process.returncode} after {len(lines)} steps")
            time.sleep(0.2)
            lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    finally:
        process.kill()
        process.wait()
    return [json.loads(line) for line in lines]


SECTIONS = {"check": check, "attention": attention, "norm": norm, "dit": dit, "vae": vae, "edit": edit, "train": train,
            "memory": memory, "compile": compile_all}  # fmt: skip

if __name__ == "__main__":
    main()
