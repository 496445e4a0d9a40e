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
from nano.assets import PACKAGES
from nano.data import read_truth, read_world
from nano.evaluate import digest_of
from report import table

CARD = """# nano

A Kiwi-Edit of {millions:.1f} million parameters, {megabytes:.1f} MB in bfloat16, trained from nothing by nanoKiwi in a
world that it draws itself, to show on any computer that model, training and curriculum work. `python sample.py` edits
the bundled clip, number {example} of the held-out ones, chosen by hand: "{prompt}"

- It knows clips of {frames} frames of {size}x{size} at {fps} a second; whatever it is given is shrunk to about that.
- It adds, removes, replaces, restyles and changes backgrounds, by words and by a reference picture.
- It takes {steps} denoising steps and a guidance by references of {ref_guidance:g} unless told otherwise.
- Parameters: {parts}.

## What it cannot do

- Real clips: it has seen emoji, coloured shapes, panoramas, textures and heaps of leaves.
- Words beyond its world: texts can ask for 65 common things and for pairs of a colour and a shape. Of several things it
  changes the one whose place the words say ("the bell on the left").
- References are single sprites on a plain ground, or views. Objects do not turn in depth or deform.

## How it was made

On {made_by}. nanoKiwi's docs/nano.md has the commands.

{phases}

## How good it is

`python -m nano eval` on clips whose objects, photographs and wordings were held out. "Ceiling" is the truth through
this model's own VAE; sharpness is the mean |Laplacian| to the truth's. There is one truth: a right edit that looks
otherwise counts as wrong.

{evaluation}

## Licences

The training clips are drawn from these packages, whose licences allow it; of them this folder holds the example alone.

{licences}
"""


def ship(args):
    checkpoint, data, out = Path(args.checkpoint), Path(args.data), Path(args.out)
    if checkpoint.is_dir() and (found := find_checkpoint(checkpoint)):
        checkpoint = found / "weights.safetensors"
        print(f"ship        {checkpoint}")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: give a run of train.py, or the weights.safetensors of its checkpoint")
    only_weights(out, also=("example", "MODEL_CARD.md"))
    row, world = find_example(data, args.example), read_world(data)
    phases = phases_of(checkpoint, Path(args.weights))
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=args.weights)
    clip = world["frames"], world["size"], world["size"], world["fps"]
    model.config = replace(model.config, trained=clip, steps=args.steps, ref_guidance=args.ref_guidance)
    evaluation = read_evaluation(args.eval, model) if args.eval else "Not evaluated yet."
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    with whole_folder(out) as folder:
        model.to(torch.bfloat16).save(folder)
        (folder / "example").mkdir()
        shutil.copyfile(data / row["src_video"], folder / "example" / "source.mp4")
        if "ref_image" in row:
            shutil.copyfile(data / row["ref_image"], folder / "example" / "reference.png")
        (folder / "example" / "prompt.txt").write_text(row["prompt"] + "\n")
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        card = CARD.format(
            millions=sum(parts.values()) / 1e6, parts=", ".join(f"{name} {count:,}" for name, count in parts.items()),
            megabytes=total / 1e6, **world, example=args.example, steps=args.steps, ref_guidance=args.ref_guidance,
            prompt=row["prompt"], made_by=args.made_by, phases=phases, evaluation=evaluation.rstrip(),
            licences="\n".join(f"- {name} {version}: {text}" for name, (version, text, _) in PACKAGES.items()),
        )  # fmt: skip
        (folder / "MODEL_CARD.md").write_text(card)
    print(f"write       {out}: {(total + len(card.encode())) / 1e6:.1f} MB")


def read_evaluation(folder, model):
    """What `eval` found, as text. ValueError if it measured another model, or other settings."""
    made = json.loads((Path(folder) / "eval.json").read_text())
    settings = ("steps", "ref_guidance")
    if made.get("digest") != digest_of(model) or any(made[name] != getattr(model.config, name) for name in settings):
        raise ValueError(f"--eval {folder}: measured other weights, steps or guidance; run `python -m nano eval` again")
    return (Path(folder) / "eval.md").read_text()


def find_example(data, index):
    """The row of a held-out clip. ValueError where it is none."""
    row = next((row for row in read_truth(data) if row["index"] == index), None)
    if row is None or row["kind"] == "image":
        raise ValueError(f"--example {index}: not the index of a video in {data}/truth.jsonl")
    return row


def phases_of(checkpoint, weights):
    """What was trained up to a checkpoint, as a Markdown table, as far as the files are still there. Weights that were
    shipped themselves bring the rows of their card; runs of one phase are added up."""

    def pretrained(folder, *parts):
        for path in (folder / f"{part}.pt" for part in parts):
            if path.is_file():
                state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
                yield [f"pretrain {path.stem}", 1, state["step"], 0, round(state["seconds"])]

    rows = list(pretrained(weights.parent, "vae", "mllm", "dit"))
    if (card := weights / "MODEL_CARD.md").is_file():
        lines = [line for line in card.read_text().splitlines() if line.startswith(("| pretrain ", "| train.py "))]
        for phase, *cells in (line.strip("| ").split(" | ") for line in lines):
            rows.append([phase, *map(int, cells)])
    for folder, begun in reversed(list(checkpoints_before(checkpoint.parent))):
        done = json.loads((folder / "train.json").read_text())["counts"]
        rows.append([f"train.py stage {begun['stage']}", 1, done["step"], done["samples"], round(done["seconds"])])
    rows += pretrained(checkpoint.parent, "decoder")
    phases = {}
    for phase, *numbers in rows:
        phases[phase] = [a + b for a, b in zip(phases.get(phase, [0] * 4), numbers)]
    return table([["phase", "runs", "steps", "samples", "seconds"], *([phase, *n] for phase, n in phases.items())])


def checkpoints_before(folder):
    """(A checkpoint's folder, what its run began with), then the last one of the run it started from, and so on."""
    while (folder / "train.json").is_file():
        begun = began_with(folder.parent)
        yield folder, begun
        started = Path(begun["weights"] or "")
        folder = max(started.glob("step-*"), default=started)
