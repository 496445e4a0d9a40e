"""What training costs: memory of a card, from sizes in the code alone (`train.py --dry-run`), and operations.

    config (DiT, VAE, MLLM), stage, shape of a clip -> bytes by purpose -> which cards fit

Held by a test against measured peaks at the 5B's widths (tests/test_lora.py).
"""

import resource
from dataclasses import asdict

import torch

from dit import DiT
from vae import VAE

CARDS = (12, 16, 24, 48, 80, 141)  # GB, as they are sold
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16
RESERVE = 0.7 * 2**30  # CUDA's context, libraries, workspaces
HIDDEN, LAYERS, FFN, KV, VOCAB, VISION = 2048, 36, 11008, 256, 151936, 668_680_000  # Qwen2.5-VL-3B
WIDTHS = {"q_proj": HIDDEN, "k_proj": KV, "v_proj": KV, "o_proj": HIDDEN, "gate_proj": FFN, "up_proj": FFN,
          "down_proj": FFN}  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def sizes(config, stage):
    """Parameters of each part: {part: (frozen outside of blocks, frozen in blocks' linears, trained)}, and of the
    largest block that is gathered whole."""
    with torch.device("meta"):
        dit, vae = DiT(config.dit), VAE(config.vae)
    d, f, m = config.dit.dim, config.dit.ffn_dim, config.mllm
    linears = config.dit.num_layers * (8 * d * d + 2 * d * f)
    lora = config.dit.num_layers * stage.dit_lora_rank * (8 * 2 * d + 2 * (d + f)) * ("dit.lora" in stage.trains)
    lora *= 2 if stage.student else 1  # and the fake score's
    patch = config.dit.out_dim * d * config.dit.patch_size[1] ** 2 + d
    embedder = lambda name: (0, 0, patch) if name in stage.trains else (patch, 0, 0)
    layer = 2 * HIDDEN**2 + 2 * HIDDEN * KV + 3 * HIDDEN * FFN
    spoken = LAYERS * stage.lora_rank * sum(HIDDEN + WIDTHS[name] for name in stage.lora_targets)
    queries = (m.num_image_queries + m.num_video_queries + m.num_ref_queries) * HIDDEN
    connectors = 2 * (HIDDEN * d + d * d + 2 * d)
    return {
        "dit": (0, 0, count(dit)) if "dit" in stage.trains else (count(dit) - linears, linears, lora),
        "source_embedder": embedder("source_embedder"),
        "ref_embedder": embedder("ref_embedder"),
        "vae": (count(vae), 0, 0),
        "language model": (VOCAB * HIDDEN, layer * LAYERS,
                           spoken * ("lora" in stage.trains) + (connectors + queries) * stage.trains_mllm),
        "vision tower": (VISION, 0, 0),
    }, max(count(dit.blocks[0]), layer)  # fmt: skip


def memory(config, stage, shape, gpus=1, cache=False, quantise=None):
    """Bytes that a card needs by purpose, for batches of `shape` (frames, height, width), computing in 16 bits."""
    parts, block = sizes(config, stage)
    if cache:
        encoders = ("vae", "vision tower", *([] if stage.trains_mllm else ["language model"]))
        parts = {name: part for name, part in parts.items() if name not in encoders}
    whole = "dit" in stage.trains
    share = gpus if gpus > 1 or whole else 1
    outside, linears, trained = (sum(part[i] for part in parts.values()) for i in range(3))
    gathered = 0
    if gpus > 1 or whole:  # two blocks, and all that lies outside of blocks
        others = trained - parts["dit"][2] if whole else trained
        gathered = 2 * (2 * block + outside + others)
    copied = config.dit.dim * config.dit.ffn_dim * (10 if quantise else 2)  # a weight: 8 -> 32 -> 16 bits, or anew
    return {
        # FSDP2 shards parameters, which 8-bit weights are not
        "frozen weights": 2 * outside / share + (linears if quantise else 2 * linears / share),
        "trained weights": 4 * trained / share,
        "gathered": gathered,
        "gradients": 4 * trained / share / (2 if stage.student else 1),
        "moments": 8 * trained / share,
        "average": 4 * trained / share * (stage.ema > 0),
        "activations": activations(config, stage, shape, cache) + copied,
    }


def activations(config, stage, shape, cache):
    """Bytes: of every block its input and the output of self-attention, and what the backward of one block keeps
    inside, some 20 D + 4 F numbers a token with its gradients; the same for the language model where it is trained."""
    c, m, (frames, height, width) = config.dit, config.mllm, shape
    tokens = (config.vae.latent_frames(frames) + (stage.ref > 0)) * height * width // config.pixel_grid**2
    lora = 1.2 if "dit.lora" in stage.trains else 1  # its own outputs beside the base's
    inside = lora * tokens * (20 * c.dim + 4 * c.ffn_dim)
    kept = tokens * 2 * c.dim * c.num_layers if stage.checkpointing else 0.6 * inside * c.num_layers
    if not cache or stage.trains_mllm:
        pictures = -(-min(frames, m.max_frames) // 2) * min(height * width, m.max_pixels or 602112) // 784
        seen = pictures + max(m.num_image_queries, m.num_video_queries, m.num_ref_queries)
        inside = max(inside, seen * (20 * HIDDEN + 6 * FFN))
        kept += seen * 2 * HIDDEN * LAYERS * stage.trains_mllm
    return 2 * stage.batch * (kept + inside)


def report(config, stage, gpus, cache, quantise):
    """What --dry-run prints, for the largest 16:9 clip of the stage."""
    width = int((max(stage.pixels) * 16 / 9) ** 0.5) // 32 * 32
    shape = ((stage.frames - 1) // 4 * 4 + 1, int(max(stage.pixels) / width) // 32 * 32, width)
    lines = ["stage: " + ", ".join(f"{key} {value}" for key, value in asdict(stage).items())]
    for name, (outside, linears, trained) in sizes(config, stage)[0].items():
        lines.append(f"  {name:<16} {trained / 1e6:10.1f} M trained {(outside + linears) / 1e6:10.1f} M frozen")
    rows = "encoded rows from a cache" if cache else "rows encoded in training"
    bits = f", frozen linears in {quantise}" if quantise else ""
    lines.append(f"GiB of a card ({gpus} card{'s' * (gpus > 1)}, {'x'.join(map(str, shape))}, {rows}{bits}):")
    need = memory(config, stage, shape, gpus, cache, quantise) | {"CUDA and libraries": RESERVE}
    lines += [f"  {name:<16} {size / 2**30:10.2f}" for name, size in need.items() if size]
    total = sum(need.values()) / 2**30
    cards = ", ".join(str(card) for card in CARDS if total <= 0.97 * card)
    fits = f"fits cards of {cards} GB" if cards else "fits no card; more --gpus, --cache, --quantise, or fewer pixels"
    lines.append(f"  {'together':<16} {total:10.2f}: {fits}")
    return "\n".join(lines)


def batch_flops(config, stage, tokens, more=0):
    """Floating-point operations of a batch of so many tokens in the DiT, forward and backward, the recomputing not
    counted, and of `more` forwards without a backward. Linear layers: 2 a weight and token, twice that in the backward
    (once where the weights are frozen). Attention: 4 N^2 D a layer, twice that in the backward."""
    c, m = config.dit, config.mllm
    n, context = tokens / stage.batch, (m.num_image_queries + m.num_video_queries + m.num_ref_queries) / 3
    linear = n * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + context * 2 * c.dim**2
    attention = 2 * n * (n + context) * c.dim
    passes = (3 if "dit" in stage.trains else 2) + more
    return stage.batch * c.num_layers * 2 * (passes * linear + (3 + more) * attention)


def machine_use(ranks, flops_s):
    """Peak memory and, on a GPU that is known, model FLOPs utilisation; on a CPU the memory is the process's."""
    use = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "tflop_s": flops_s / 1e12}
    if ranks.device.type == "cuda":
        use["memory_gib"] = torch.cuda.max_memory_allocated(ranks.device) / 2**30
        name = torch.cuda.get_device_name(ranks.device)
        if peak := next((peak for part, peak in PEAK_FLOPS.items() if part in name), None):
            use["mfu"] = flops_s / ranks.world / peak
    return use
