"""Train Kiwi-Edit in three stages: `torchrun --nproc-per-node 8 train.py --stage 3 --data DIR --out DIR`.

CSV -> batches of one shape (data.py) -> VAE latents, MLLM inputs -> noise at a random time -> velocity (model.py)
    -> mean squared error -> gradients summed over the global batch -> AdamW -> checkpoint (paper, Section 5)
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

EXAMPLES = """examples:
  python train.py --config nano --stage 1 --data data/nano --weights weights/nano --out runs/nano1
  torchrun --nproc-per-node 8 train.py --config wan22_5b --stage 2 --data DIR --weights runs/1/latest --out runs/2
"""
ALIGN = ("lora", "mllm.image_queries", "mllm.connector")
EDIT = (*ALIGN, "mllm.video_queries", "dit", "source_embedder", "source_scale")
REFER = (*EDIT, "mllm.ref_queries", "mllm.ref_connector", "ref_embedder")


@dataclass(frozen=True)
class Stage:
    """What a stage trains, on what and how (paper, Section 5.1; FACTS.md, "Training")."""

    trains: tuple[str, ...]  # names of parts; "lora": the language model's
    image: int = 1  # shares of the mixture
    video: int = 0
    ref: int = 0
    source: bool = True  # whether the DiT sees the source latents
    pixels: tuple[int, ...] = (960_000,)  # at most so many, equal shares of the steps
    frames: int = 81
    steps: int = 10_000
    global_batch: int = 128
    batch: int = 1  # samples in one forward
    lora_rank: int = 64
    lr: float = 2e-5
    warmup: int = 100
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip: float = 1.0
    shift: float = 5.0
    ref_shrink: float = 0.7  # references are shrunk by a random factor between this and 1
    ema: float = 0.0

    @property
    def ratio(self):
        return {"image": self.image, "video": self.video, "ref": self.ref}


STAGES = {
    "paper": {
        1: Stage(ALIGN, source=False, steps=30_000),
        2: Stage(EDIT, 1, 1, pixels=(360_000, 960_000)),
        3: Stage(REFER, 2, 1, 1),
    },
    "released": {
        1: Stage(ALIGN, source=False, pixels=(1024 * 1024,), lr=1e-5, steps=30_000, global_batch=8),
        2: Stage(EDIT, 1, 1, pixels=(600 * 600, 720 * 1280), lr=1e-5, steps=20_000, global_batch=16),
        3: Stage(REFER, 1, 1, 1, pixels=(720 * 1280,), lr=5e-6, steps=15_000, global_batch=24),
    },
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Train Kiwi-Edit: three stages, from a laptop to many GPUs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="wan22_5b", help="a preset of model.py: wan22_5b, wan21_14b, wan21_1_3b, nano (default %(default)s)")
    add("--stage", type=int, choices=(1, 2, 3), required=True)
    add("--preset", choices=list(STAGES), default="paper", help="the paper's numbers or the released scripts' (default %(default)s)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change a field of the stage, e.g. steps=100 lr=1e-4")
    add("--data", metavar="DIR", help="folder with image.csv, video.csv, ref_video.csv")
    add("--out", required=True, metavar="DIR", help="the run: config.json, metrics.jsonl, checkpoints")
    add("--weights", metavar="PATH", help="to start from")
    add("--init", choices=("random",), help="random: start from nothing (with --qwen FOLDER for config and tokenizer)")
    add("--qwen", default="Qwen/Qwen2.5-VL-3B-Instruct", metavar="PATH|HUB_ID", help="default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--workers", type=int, default=2, help="processes that decode (default %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    stage = with_settings(STAGES[args.preset][args.stage], args.set)
    import torch

    from data import FILES, Mixture, Pairs, fill_buckets, read_table

    model = build(args, stage)
    names = trainable(model, stage)
    tables = {kind: read_table(Path(args.data) / FILES[kind], kind) for kind, share in stage.ratio.items() if share}
    bad = []
    buckets = {kind: fill_buckets(rows, kind == "image", stage.frames, stage.pixels[0], bad) for kind, rows in tables.items()}
    pairs = Pairs(tables, Mixture(buckets, stage.ratio, stage.batch, args.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=stage.weight_decay)
    per_step = stage.global_batch // stage.batch
    loader = iter(torch.utils.data.DataLoader(pairs, None, sampler=range(stage.steps * per_step), num_workers=args.workers))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(Path(args.out) / "metrics.jsonl", "a") as metrics:
        for step in range(stage.steps):
            total = 0.0
            for _ in range(per_step):
                loss = batch_loss(model, stage, next(loader), args.seed) / per_step
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
            optimizer.step()
            optimizer.zero_grad()
            line = {"step": step + 1, "loss": total, "grad_norm": norm.item(), "lr": stage.lr}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            print(line)


def with_settings(stage, settings):
    """The stage with `key=value` settings, each cast to its field's type. ValueError for a key it has not."""
    known = {field.name: field.default for field in fields(stage)}
    changes = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known or key == "trains":
            raise ValueError(f"--set {setting}: no such key; there are {', '.join(k for k in known if k != 'trains')}")
        old = getattr(stage, key)
        try:
            if isinstance(old, bool):
                changes[key] = {"true": True, "false": False}[value.lower()]
            elif isinstance(old, tuple):
                changes[key] = tuple(int(v) for v in value.split(","))
            else:
                changes[key] = type(old)(value)
        except (ValueError, KeyError):
            raise ValueError(f"--set {setting}: {value!r} is not of the kind {type(old).__name__}") from None
    return replace(stage, **changes)


def build(args, stage):
    import torch

    from connectors import inject_lora
    from model import PRESETS, KiwiEdit

    torch.manual_seed(args.seed)
    preset = PRESETS[args.config]
    if args.init == "random":
        model = KiwiEdit(replace(preset, mllm=replace(preset.mllm, folder=args.qwen)))
    elif args.weights:
        model = KiwiEdit.from_pretrained(args.weights, dtype=torch.float32)
    else:
        raise ValueError("no weights to start from: give --weights PATH, or --init random --qwen FOLDER")
    inject_lora(model.mllm.model.language_model, stage.lora_rank)
    return model.train()


def trainable(model, stage):
    """Set requires_grad for exactly what the stage trains -> its names."""
    parts = tuple(part + "." for part in stage.trains)
    names = []
    for name, parameter in model.named_parameters():
        wanted = (name + ".").startswith(parts) or ("lora" in stage.trains and ".lora_" in name)
        # Wan's projection of T5 features is part of `dit` and never used: weight decay alone would change it
        parameter.requires_grad_(wanted and not name.startswith("dit.text_embedding."))
        if parameter.requires_grad:
            names.append(name)
    return names


def draw(seed, number, flow):
    """The generator and timestep of sample `number` of a run: the same however the run is divided."""
    import torch

    generator = torch.Generator().manual_seed((seed << 40) + number)
    return generator, flow.timesteps(1000)[torch.randint(1000, (), generator=generator)]


def batch_loss(model, stage, batch, seed):
    """The mean loss of one batch of pairs, all of one shape."""
    import torch

    from data import pad_reference
    from model import FlowMatch

    flow = FlowMatch(stage.shift)
    draws = [draw(seed, number, flow) for number in batch["numbers"]]
    refs = batch["refs"]
    with torch.no_grad():
        latents, source = (torch.cat([model.encode_frames(x) for x in batch[name]]) for name in ("target", "source"))
        ref = None
        if refs:
            size = batch["target"].shape[2:4]
            shrinks = [stage.ref_shrink + (1 - stage.ref_shrink) * torch.rand((), generator=g).item() for g, _ in draws]
            ref = torch.cat([model.encode_frames(pad_reference(r, size, s)[None]) for r, s in zip(refs, shrinks)])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g, _ in draws])
    t = torch.stack([t for _, t in draws])
    losses = []
    for i, prompt in enumerate(batch["prompts"]):
        context = model.mllm(prompt, batch["source"][i], refs[i] if refs else None)
        one = slice(i, i + 1)
        losses.append(model.training_loss(
            latents[one], context, t[one], source[one] if stage.source else None, None if ref is None else ref[one],
            noise[one], flow))
    return torch.stack(losses).mean()


def run():
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    run()
