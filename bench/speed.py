"""The model: `python -m bench.speed SECTION ...`

    dit       a step of the diffusion transformer beside diffusers' WanTransformer3DModel, the same random weights
    vae       encode and decode beside diffusers' AutoencoderKLWan, the same random weights; on a GPU peak memory too
    profile   where the time of a DiT step and of a decoding goes, by class of kernel
    weights8  the bundled example with 8-bit DiT weights beside float32: bytes and PSNR
    memory    no device needed: peak of an edit at 480p and 720p by part, computed on tensors without storage
    roofline  no device needed: the least time of a 720p step on an H200, by part

    python -m bench.speed dit vae --repeat 9    # beside diffusers (pip install diffusers)

On a GPU the sizes are those of Wan2.2-TI2V-5B at 480p and 720p in bfloat16. On a CPU the widths are real, the rest is
small.
"""

import bench

NAMES = ("dit", "vae", "profile", "weights8", "memory", "roofline")
args = bench.parse_arguments("bench.speed", NAMES, __doc__) if __name__ == "__main__" else None

import math
import re
import weakref
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from bench.measure import in_turns, on_gpu, peak_memory, psnr, relative_difference
from dit import DiT, DiTConfig
from kernels.linear import LARGEST
from lora import quantise
from vae import VAE, VAEConfig

CLASSES = {
    "attention": "attn|attention|fmha|flash|softmax",
    "convolution": "conv|fprop|implicit|winograd",
    "matrix product": "gemm|mm$|matmul|cutlass|nvjet|xmma|linear",
    "norm, RoPE, gate": "norm|residual",
    "GELU, SiLU": "gelu|silu",
    "copy": "copy|memcpy|memset|cat|fill|clone",
    "rest": "",
}
GRIDS = {"480p": (21, 30, 52), "720p": (21, 44, 80)}  # latents of 81 frames, 832x480 and 1280x704, of Wan 2.2


def diffusers_dit(config):
    """The same Wan DiT in diffusers; `load_weights` takes its names."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=True, eps=config.eps,
    )  # fmt: skip


def diffusers_vae(config):
    """The same Wan VAE in diffusers."""
    from diffusers import AutoencoderKLWan

    mean, std = config.statistics
    sizes = {"base_dim": config.dim, "z_dim": config.z_dim, "dim_mult": list(config.dim_mult), "latents_mean": mean,
             "latents_std": std, "num_res_blocks": config.num_res_blocks,
             "temperal_downsample": list(config.temporal_downsample)}  # fmt: skip
    if config.version == "2.2":
        sizes |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                  "decoder_base_dim": config.decoder_dim, "scale_factor_spatial": 16}  # fmt: skip
    return AutoencoderKLWan(**sizes)


def give_weights(ours, theirs):
    """Our VAE's weights for diffusers', which registers the same layers in the same order, but in the middle attention
    before the block that it follows."""
    names = list(theirs.state_dict())
    for half in ("encoder", "decoder"):
        attention = [name for name in names if name.startswith(f"{half}.mid_block.attentions.0.")]
        block = [name for name in names if name.startswith(f"{half}.mid_block.resnets.0.")]
        at = names.index(attention[0])
        names[at : at + len(attention + block)] = block + attention
    theirs.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)))


def built(device, dtype, make):
    """make() with its parameters on a device in a dtype from the start: 5B of float32 first would need 20 GB."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def beside_diffusers(dtype, *makes):
    """Our module and diffusers', None if that is not installed."""
    device = "cuda" if on_gpu() else "cpu"
    return [built(device, dtype, make) if i == 0 or find_spec("diffusers") else None for i, make in enumerate(makes)]


def dit(args):
    if on_gpu():
        sizes = {f"{name}{ref}": (21 + (ref != ""), *GRIDS[name][1:]) for name in GRIDS for ref in ("", " + reference")}
        for name, grid in sizes.items():
            yield dit_row(args, name, DiTConfig(), grid, torch.bfloat16)
        yield dit_row(args, "720p, blocks compiled", DiTConfig(), GRIDS["720p"], torch.bfloat16, compiled=True)
        for kind in LARGEST:
            yield dit_row(args, f"720p, ours in {kind}", DiTConfig(), GRIDS["720p"], torch.bfloat16, kind=kind)
        return
    small = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=3, in_dim=16, out_dim=16)
    for dtype in (torch.float32, torch.bfloat16):
        for name, config in (("1.3B, 3 of 30 layers", small), ("5B, 1 of 30 layers", DiTConfig(num_layers=1))):
            yield dit_row(args, name, config, (4, 32, 32), dtype)


@torch.no_grad()
def dit_row(args, name, config, grid, dtype, compiled=False, kind=None):
    """A forward from latents and 512 text features, ours and diffusers', and ours with the context's keys kept."""
    from load import load_weights

    device = "cuda" if on_gpu() else "cpu"
    ours, theirs = beside_diffusers(dtype, lambda: DiT(config), lambda: diffusers_dit(config))
    theirs and load_weights(ours, theirs.state_dict())
    if kind:
        quantise(torch.nn.ModuleDict({"dit": ours}), kind)
    x = torch.randn(1, config.in_dim, *grid, device=device, dtype=dtype)
    text = torch.randn(1, 512, config.text_dim, device=device, dtype=dtype)
    t = torch.tensor([500.0], device=device)
    kept = ours.context_keys_values(ours.text_embedding(text))
    runs = {"ours": lambda: ours(x, t, ours.text_embedding(text)),
            "diffusers": theirs and (lambda: theirs(x, t, text, return_dict=False)[0]),
            "ours, context kept": lambda: ours(x, t, kept)}  # fmt: skip
    runs["ours"]()  # chooses the attention, for which a compiled block has no stopwatch
    for block in [*ours.blocks, *(theirs.blocks if theirs else ())] if compiled else ():
        block.compile(dynamic=False)  # all blocks share one compilation
    difference = relative_difference(runs["ours"], runs["diffusers"])
    seconds = in_turns(runs, args.repeat)
    row = {"model": name, "tokens": math.prod(grid) // 4, "dtype": str(dtype)[6:]}
    row |= {f"{name} s": s for name, s in seconds.items()}
    return row | {"ours / diffusers": seconds["ours"] / seconds["diffusers"], "relative difference": difference}


def vae(args):
    size, dtypes = ((81, 704, 1280), (torch.bfloat16,)) if on_gpu() else ((9, 64, 64), (torch.float32, torch.bfloat16))
    for config in (VAEConfig(), VAEConfig(version="2.1", dim=96, z_dim=16)):
        for dtype in dtypes:
            yield from vae_rows(args, config, size, dtype)


@torch.no_grad()
def vae_rows(args, config, size, dtype):
    """Encode and decode of a clip of `size` (frames, height, width)."""
    device = "cuda" if on_gpu() else "cpu"
    ours, theirs = beside_diffusers(dtype, lambda: VAE(config), lambda: diffusers_vae(config))
    theirs and give_weights(ours, theirs)
    video = torch.rand(1, 3, *size, device=device, dtype=dtype) * 2 - 1
    latents = ours.encode(video)
    z = ours.denormalise(latents)  # diffusers leaves the normalisation to its pipelines
    for direction, run, other in (
        ("encode", lambda: ours.encode(video), lambda: ours.normalise(theirs.encode(video).latent_dist.mean)),
        ("decode", lambda: ours.decode(latents), lambda: theirs.decode(z, return_dict=False)[0]),
    ):
        runs = {"ours": run, "diffusers": other if theirs else None}
        seconds = in_turns(runs, 1 if on_gpu() else args.repeat)
        row = {"VAE": config.version, "frames": "x".join(map(str, size)), "dtype": str(dtype)[6:],
               "direction": direction, **{f"{name} s": s for name, s in seconds.items()},
               "ours / diffusers": seconds["ours"] / seconds["diffusers"]}  # fmt: skip
        row |= {f"{name} GiB": f and peak_memory(f) for name, f in runs.items()} if on_gpu() else {}
        yield row | {"relative difference": relative_difference(*runs.values())}


def profile(args):
    """ms of each class of CLASSES: kernels on a GPU, operators on a CPU."""
    device, dtype, layers, grid = "cpu", torch.float32, 1, (2, 4, 4)
    if on_gpu():
        device, dtype, layers, grid = "cuda", torch.bfloat16, 30, GRIDS["720p"]
    model = built(device, dtype, lambda: DiT(DiTConfig(num_layers=layers)))
    decoder = built(device, dtype, lambda: VAE(VAEConfig()))
    x, text = (torch.randn(1, *shape, device=device, dtype=dtype) for shape in ((48, *grid), (512, 3072)))
    t, kept = torch.tensor([500.0], device=device), model.context_keys_values(text)
    for part, run in (("DiT step", lambda: model(x, t, kept)), ("VAE decode", lambda: decoder.decode(x))):
        run()
        with torch.profiler.profile() as profiler:
            run()
        ms = dict.fromkeys(CLASSES, 0.0)
        for event in profiler.key_averages():
            name = next(name for name, pattern in CLASSES.items() if re.search(pattern, event.key.lower()))
            ms[name] += (event.self_device_time_total if on_gpu() else event.self_cpu_time_total) / 1000
        total = sum(ms.values())
        yield from ({"part": part, "class": name, "ms": time, "share": time / total} for name, time in ms.items())


def weights8(args):
    """PSNR of the edited example to that of float32 weights, in float32 arithmetic on a CPU; bfloat16: all of it."""
    from media import read_image
    from model import KiwiEdit, read_for

    nano, exact = bench.HOUSE / "weights" / "nano", None
    for kind in ("float32", "bfloat16", *LARGEST):
        model = KiwiEdit.from_pretrained(nano, "cpu", torch.bfloat16 if kind == "bfloat16" else torch.float32)
        if kind in LARGEST:
            quantise(model, kind, parts=["dit"])
        size = sum(t.numel() * t.element_size() for t in model.dit.blocks.state_dict().values())
        clip = read_for(model.config, nano / "example" / "source.mp4", None, None).frames
        prompt, ref = (nano / "example" / "prompt.txt").read_text(), read_image(nano / "example" / "reference.png")
        pixels = model.edit(clip, prompt.strip(), ref)
        exact = pixels if exact is None else exact
        yield {"DiT blocks": kind, "MB": size / 1e6, "PSNR dB": psnr(pixels, exact) if kind != "float32" else ""}


@torch.no_grad()
def memory(args):
    """Weights and the peak of live tensors in bfloat16, GiB: with --offload the largest sum counts. Workspaces of cuDNN
    and cuBLAS (some hundred MiB) and the CUDA context (half a GiB) come on top."""
    from model import PRESETS, KiwiEdit

    kernels.set_backend("triton")  # on meta tensors an operator gives its result's shape
    model = built("meta", torch.bfloat16, lambda: KiwiEdit(replace(PRESETS["wan22_5b"], mllm=None)))
    dim, empty = model.config.dit.dim, lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)
    for name, (frames, height, width) in GRIDS.items():
        latents, ref = empty(1, 48, frames, height, width), empty(1, 48, 1, height, width)
        video = torch.empty(1, 3, 4 * frames - 3, 16 * height, 16 * width, dtype=torch.bfloat16)  # never on the GPU
        for part, module, run in (
            ("DiT step, a reference", model.dit, lambda: model.velocity(
                latents, empty(1), model.dit.context_keys_values(empty(1, 1536, dim)), latents, ref)),
            ("VAE encode", model.vae, lambda: model.vae.encode(video)),
            ("VAE decode", model.vae, lambda: model.vae.decode(latents, out_device="cpu")),
            ("VAE encode, --tile 16", model.vae, lambda: model.vae.encode(video, tile=16)),
            ("VAE decode, --tile 16", model.vae, lambda: model.vae.decode(latents, tile=16, out_device="cpu")),
        ):  # fmt: skip
            weights = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30
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


def roofline(args):
    """At 790 TFLOP/s in bfloat16 and 4.3 TB/s, which an H200 reaches. Each pass reads or writes all tokens once."""
    c, tokens = DiTConfig(), math.prod(GRIDS["720p"]) // 4
    total = 0.0
    for part, flop, elements in (
        ("linears", 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim), 0),
        ("self-attention", 4 * tokens**2 * c.dim, 0),
        ("cross-attention, 512 tokens", 4 * tokens * 512 * c.dim, 0),
        ("norms, RoPE, gates: 19 passes", 0, 19 * tokens * c.dim),
        ("GELU: 2 passes", 0, 2 * tokens * c.ffn_dim),
    ):
        flop, size = flop * c.num_layers, 2 * elements * c.num_layers
        total += (ms := 1000 * (flop / 790e12 + size / 4.3e12))
        yield {"part": part, "TFLOP": flop / 1e12, "GB": size / 1e9, "ms": ms}
    yield {"part": "a step, at least", "TFLOP": "", "GB": "", "ms": total}


SECTIONS = dict(zip(NAMES, (dit, vae, profile, weights8, memory, roofline)))
if __name__ == "__main__":
    bench.run("bench.speed", args, SECTIONS)
