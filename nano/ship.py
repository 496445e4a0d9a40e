"""A training checkpoint over what it started from, LoRA merged, in bfloat16, with an example and a model card: a folder
for sample.py. The same arguments write the same bytes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from load import began_with, find_checkpoint, only_weights
from media import whole_folder
from model import KiwiEdit
from nano.data import PACKAGES, read_truth, read_world
from nano.evaluate import NOT_EVALUATED
from report import table

CARD = Path(__file__).with_name("card.md")  # with blanks


def ship(args):
    checkpoint, data, out = Path(args.checkpoint), Path(args.data), Path(args.out)
    if checkpoint.is_dir() and (found := find_checkpoint(checkpoint)):
        checkpoint = found / "weights.safetensors"
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: give a run of train.py, or the weights.safetensors of its checkpoint")
    only_weights(out, also=("example", "MODEL_CARD.md"))
    world, rows = read_world(data, "test"), {row["index"]: row for row in read_truth(data) if row["kind"] != "image"}
    if args.example not in rows:
        raise ValueError(f"--example {args.example}: not the index of a video in {data}/truth.jsonl")
    row = rows[args.example]
    phases = [["phase", "runs", "steps", "samples", "seconds"], *phases_of(checkpoint, Path(args.weights))]
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=args.weights)
    clip = world["frames"], world["size"], world["size"], world["fps"]
    model.config = replace(model.config, trained=clip, steps=args.steps, ref_guidance=args.ref_guidance)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    with whole_folder(out) as folder:
        model.to(torch.bfloat16).save(folder)
        (folder / "example").mkdir()
        for column, name in (("src_video", "source.mp4"), ("ref_image", "reference.png")):
            if column in row:
                shutil.copyfile(data / row[column], folder / "example" / name)
        (folder / "example" / "prompt.txt").write_text(row["prompt"] + "\n")
        megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        card = CARD.read_text().format(
            **world, example=args.example, steps=args.steps, ref_guidance=args.ref_guidance, made_by=args.made_by,
            prompt=row["prompt"], phases=table(phases), evaluation=NOT_EVALUATED, megabytes=megabytes,
            millions=sum(parts.values()) / 1e6, parts=", ".join(f"{name} {count:,}" for name, count in parts.items()),
            licences="\n".join(f"- {name} {version}: {text}" for name, (version, text, _) in PACKAGES.items()),
        )  # fmt: skip
        (folder / "MODEL_CARD.md").write_text(card)
    print(f"write       {out}: {megabytes:.1f} MB, of {checkpoint}")


def phases_of(checkpoint, weights):
    """What was trained up to a checkpoint, as far as the files are still there: the parts that `pretrain` made, or the
    rows that shipped weights have in their card, and each run of train.py from then on."""
    if (card := weights / "MODEL_CARD.md").is_file():
        lines = [line for line in card.read_text().splitlines() if line.startswith(("| pretrain ", "| train.py "))]
        before = [line.strip("| ").split(" | ") for line in lines]
    else:
        before = pretrained(weights.parent, "vae", "mllm", "dit")
    runs, folder = [], checkpoint.parent
    while (folder / "train.json").is_file():
        begun, done = began_with(folder.parent), json.loads((folder / "train.json").read_text())["counts"]
        runs.insert(0, [f"train.py stage {begun['stage']}", 1, done["step"], done["samples"], round(done["seconds"])])
        started = Path(begun["weights"] or "")
        folder = max(started.glob("step-*"), default=started)
    return [*before, *runs, *pretrained(checkpoint.parent, "decoder")]


def pretrained(folder, *parts):
    for part in parts:
        if (path := folder / f"{part}.pt").is_file():
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            yield [f"pretrain {part}", 1, state["step"], 0, round(state["seconds"])]
