"""How much memory training needs on a card: `train.py --dry-run`, from sizes in the code alone.

    config (DiT, VAE, MLLM), stage, shape of a clip -> bytes by purpose -> which cards fit

Held by a test against measured peaks at the 5B's widths (tests/test_lora.py).
"""

from dataclasses import asdict

import torch

from dit import DiT
from vae import VAE

CARDS = (12, 16, 24, 48, 80, 141)  # GB, as they are sold
RESERVE = 0.7 * 2**30  # CUDA's context, libraries, workspaces
QWEN = dict(hidden=2048, layers=36, ffn=11008, kv=256, vocab=151936, vision=668_680_000)  # Qwen2.5-VL-3B


def count(module):
    return sum(p.numel() for p in module.parameters())


def sizes(config, stage):
    """Parameters by part: {part: (frozen outside of blocks, in blocks' linears, trained)}, of one block, and layers."""
    with torch.device("meta"):
        dit, vae = DiT(config.dit), VAE(config.vae)
    block, d, f, r = count(dit.blocks[0]), config.dit.dim, config.dit.ffn_dim, stage.dit_lora_rank
    linears = len(dit.blocks) * (8 * d * d + 2 * d * f)
    whole = "dit" in stage.trains
    lora = len(dit.blocks) * r * (8 * 2 * d + 2 * (d + f)) if "dit.lora" in stage.trains else 0
    lora *= 2 if stage.student else 1  # and the fake score's
    patch = config.dit.out_dim * d * config.dit.patch_size[1] ** 2 + d
    parts = {"dit": (0, 0, count(dit)) if whole else (count(dit) - linears, linears, lora)}
    for name in ("source_embedder", "ref_embedder"):
        parts[name] = (0, 0, patch) if name in stage.trains else (patch, 0, 0)
    parts["vae"] = (count(vae), 0, 0)
    q, m = QWEN, config.mllm
    layer = 2 * q["hidden"] ** 2 + 2 * q["hidden"] * q["kv"] + 3 * q["hidden"] * q["ffn"]
    targets = {"q_proj": q["hidden"], "k_proj": q["kv"], "v_proj": q["kv"], "o_proj": q["hidden"],
               "gate_proj": q["ffn"], "up_proj": q["ffn"], "down_proj": q["ffn"]}  # fmt: skip
    own = sum(q["hidden"] + targets[name] for name in stage.lora_targets) * q["layers"] * stage.lora_rank
    connectors = 2 * (q["hidden"] * d + d * d + 2 * d)
    queries = (m.num_image_queries + m.num_video_queries + m.num_ref_queries) * q["hidden"]
    trained = own * ("lora" in stage.trains) + (connectors + queries) * stage.trains_mllm
    parts["language model"] = (q["vocab"] * q["hidden"], layer * q["layers"], trained)
    parts["vision tower"] = (q["vision"], 0, 0)
    return parts, block, layer


def memory(config, stage, shape, gpus=1, cache=False, quantise=None, checkpointing=True):
    """Bytes that a card needs by purpose, for batches of `shape` (frames, height, width), computing in 16 bits."""
    parts, block, layer = sizes(config, stage)
    for part in ("vae", "vision tower", *([] if stage.trains_mllm else ["language model"])):
        cache and parts.pop(part)
    sharded = gpus > 1 or "dit" in stage.trains
    share = gpus if sharded else 1
    trained = sum(part[2] for part in parts.values())
    linears = sum(part[1] for part in parts.values())  # FSDP2 shards parameters, which 8-bit weights are not
    frozen = 2 * sum(part[0] for part in parts.values()) / share + (linears if quantise else 2 * linears / share)
    rest = sum(sum(part) for part in parts.values()) - parts["dit"][1] - parts.get("language model", (0, 0, 0))[1]
    rest -= parts["dit"][2] if "dit" in stage.trains else 0
    gathered = 2 * (2 * max(block, layer) + rest) if sharded else 0
    copied = config.dit.dim * config.dit.ffn_dim * (10 if quantise else 2)  # a weight: 8 -> 32 -> 16 bits, or anew
    return {
        "frozen weights": frozen, "trained weights": 4 * trained / share, "gathered": gathered,
        "gradients": 4 * trained / share / (2 if stage.student else 1), "moments": 8 * trained / share,
        "average": 4 * trained / share * (stage.ema > 0),
        "activations": activations(config, stage, shape, cache, checkpointing) + copied,
    }  # fmt: skip


def activations(config, stage, shape, cache, checkpointing):
    """Bytes: of every block its input and the output of self-attention, and what the backward of one block keeps
    inside, some 20 D + 4 F numbers a token with its gradients; the same for the language model where it is trained."""
    c, m, (frames, height, width) = config.dit, config.mllm, shape
    tokens = (config.vae.latent_frames(frames) + (stage.ref > 0)) * height * width // config.pixel_grid**2
    lora = 1.2 if "dit.lora" in stage.trains else 1  # its own outputs beside the base's
    inside, kept = lora * tokens * (20 * c.dim + 4 * c.ffn_dim), tokens * 2 * c.dim * c.num_layers
    if not checkpointing:
        kept = 0.6 * inside * c.num_layers
    if cache and not stage.trains_mllm:
        return 2 * stage.batch * (kept + inside)
    q = QWEN
    pictures = -(-min(frames, m.max_frames) // 2) * min(height * width, m.max_pixels or 602112) // 784
    seen = pictures + max(m.num_image_queries, m.num_video_queries, m.num_ref_queries)
    inner = seen * (20 * q["hidden"] + 6 * q["ffn"])
    kept += seen * 2 * q["hidden"] * q["layers"] if stage.trains_mllm else 0
    return 2 * stage.batch * (kept + max(inside, inner))


def report(config, stage, gpus, cache, quantise, checkpointing, shape=None):
    """What --dry-run prints."""
    if shape is None:  # the largest 16:9 clip of the stage
        width = int((max(stage.pixels) * 16 / 9) ** 0.5) // 32 * 32
        shape = ((stage.frames - 1) // 4 * 4 + 1, int(max(stage.pixels) / width) // 32 * 32, width)
    need = memory(config, stage, shape, gpus, cache, quantise, checkpointing)
    parts = sizes(config, stage)[0]
    lines = ["stage: " + ", ".join(f"{key} {value}" for key, value in asdict(stage).items())]
    for name, (other, linears, trained) in parts.items():
        lines.append(f"  {name:<16} {trained / 1e6:10.1f} M trained {(other + linears) / 1e6:10.1f} M frozen")
    rows = "encoded rows from a cache" if cache else "rows encoded in training"
    bits = f", frozen linears in {quantise}" if quantise else ""
    lines.append(f"GiB of a card ({gpus} card{'s' * (gpus > 1)}, {'x'.join(map(str, shape))}, {rows}{bits}):")
    need["CUDA and libraries"] = RESERVE
    lines += [f"  {name:<16} {size / 2**30:10.2f}" for name, size in need.items() if size]
    total = sum(need.values()) / 2**30
    cards = ", ".join(str(card) for card in CARDS if total <= 0.97 * card)
    fits = f"fits cards of {cards} GB" if cards else "fits no card; more --gpus, --cache, --quantise, or fewer pixels"
    lines.append(f"  {'together':<16} {total:10.2f}: {fits}")
    return "\n".join(lines)
