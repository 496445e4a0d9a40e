"""Judge edited videos: `python judge.py score --bench refvie bench.yaml --edits DIR --judge metrics`.

    benchmark file, folder of edits -> items (source, instruction, reference, edit)
    -> metrics, without any model, and the answers of an MLLM judge -> answers.jsonl, which a rerun takes up
    -> scores with the paper's hierarchy enforced, controls, intervals -> <bench>.md, <bench>.csv, <bench>.html

RefVIE-Bench and OpenVE-Bench (paper, Section 5) are judged by an MLLM on three criteria from 1 to 5. The released
scripts ask it to keep criteria 2 and 3 at or below 1 and trust that it did, drop what failed, and cannot resume.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = """examples:
  python judge.py score --bench refvie refvie_bench.yaml --edits out/edits --judge metrics --out out/judge
"""

METRICS = {  # name -> (better when, what it is)
    "edit_strength": "mean colour change of 8x8 blocks, source to edit, in levels of 255",
    "edited_area": "share of the blocks that changed",
    "preserved_psnr": "PSNR in dB over the blocks that did not change, at most 60",
    "preserved_ssim": "SSIM of the luma over the same blocks",
    "flicker": "mean absolute second difference in time of the edit's luma, levels",
    "flicker_excess": "the same, minus the source's",
    "reference_similarity": "patches of the changed region and of the reference that find one another, 0 to 1",
    "reference_gain": "the same, minus what the unedited source would get",
}


class JudgeError(ValueError):
    """Input that cannot be judged; the text names the file and what to do next."""


# ---- benchmarks


@dataclass(frozen=True)
class Item:
    """One edit to judge. `key` names it in every table."""

    key: str
    task: str
    instruction: str
    source: Path
    edit: Path
    ref: Path | None = None


def inside(base, name, where):
    """The path `name` below the folder `base`. JudgeError where it leads out of it."""
    path = (base / name).resolve()
    if base.resolve() not in path.parents:
        raise JudgeError(f"{where}: {name} leads out of {base}; give paths below the benchmark's folder")
    return path


def field(row, name, where):
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise JudgeError(f"{where}: has no {name}; is it the right --bench?")
    return value.strip()


def read_refvie(path, edits):
    """RefVIE-Bench: YAML of src_video, instruction, ref_img, edit_type -> items in the file's order."""
    import yaml

    try:
        rows = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise JudgeError(f"{path}: is not YAML ({str(error).splitlines()[0]})") from None
    items = []
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        where = f"{path}, item {i}"
        source, instruction, ref, task = (field(row, n, where) for n in ("src_video", "instruction", "ref_img", "edit_type"))
        name = f"{i}_{instruction[:10]}_{Path(source).name}"
        items.append(Item(str(i), task, instruction, inside(path.parent, source, where), edits / name,
                          inside(path.parent, ref, where)))  # fmt: skip
    return items


def read_openve(path, edits):
    """OpenVE-Bench: CSV of original_video, prompt, edited_type."""
    items = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for i, row in enumerate(csv.DictReader(file)):
            where = f"{path}, row {i + 1}"
            source, instruction, task = (field(row, n, where) for n in ("original_video", "prompt", "edited_type"))
            name = f"{Path(source).stem}_edited.mp4"
            items.append(Item(str(i), task, instruction, inside(path.parent, source, where), edits / name))
    return items


BENCHES = {"refvie": read_refvie, "openve": read_openve}

# ---- metrics: no model


def load_pair(item, edit_path, max_pixels=256 * 448, max_frames=81):
    """Source and edit, aligned frame by frame, float32 (T, 3, H, W) in 0..1 at the edit's aspect."""
    from data import fit_frames, read_clip

    edit = read_clip(edit_path, max_frames, max_pixels).frames
    source = read_clip(item.source, max_frames, max_pixels).frames
    count = min(len(edit), len(source))
    source = source[:count]
    if source.shape[1:3] != edit.shape[1:3]:
        source = fit_frames(source, edit.shape[1:3])
    to_float = lambda frames: frames.permute(0, 3, 1, 2).float() / 255
    return to_float(source), to_float(edit[:count])


def luma(x):
    return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def change_map(source, edit):
    """Root mean square over RGB of the difference of 8x8 block means, (T, H/8, W/8) in 0..1."""
    import torch.nn.functional as F

    return (F.avg_pool2d(edit, 8) - F.avg_pool2d(source, 8)).square().mean(1).sqrt()


def changed_blocks(change, floor=6 / 255):
    """Which blocks were edited: Otsu's threshold on the square root of the change, at least `floor`."""
    import torch

    values = change.sqrt().flatten()
    hist = torch.histc(values, 64, 0, 1)
    p, centres = hist / hist.sum(), (torch.arange(64) + 0.5) / 64
    below, mass = p.cumsum(0), (p * centres).cumsum(0)
    between = (mass[-1] * below - mass).square() / (below * (1 - below)).clamp_min(1e-9)
    threshold = ((between.argmax() + 1) / 64).square().item()
    return change > max(threshold, floor)


def ssim_map(a, b):
    """SSIM of lumas (T, 1, H, W), 8x8 windows: the mean of each block's window, (T, H/8, W/8)."""
    import torch.nn.functional as F

    mean = lambda x: F.avg_pool2d(x, 8)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))[:, 0]


def flicker(x):
    """Mean |second difference in time| of the luma, in levels of 255; None below 3 frames."""
    y = luma(x) * 255
    return (y[2:] - 2 * y[1:-1] + y[:-2]).abs().mean().item() if len(y) > 2 else None


def lab(x):
    """sRGB (T, 3, H, W) in 0..1 -> CIELAB / 100, D65."""
    import torch

    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("ij,tjhw->tihw", to_xyz, linear) / torch.tensor([0.9505, 1.0, 1.089]).view(1, 3, 1, 1)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([1.16 * f[:, 1] - 0.16, 5 * (f[:, 0] - f[:, 1]), 2 * (f[:, 1] - f[:, 2])], 1)


def patch_descriptors(x, window):
    """Mean and deviation of CIELAB and the edge directions of each window, at half-window steps: (T, 14, h, w).

    Distances are meant to be read in units of about 25 CIELAB steps.
    """
    import torch
    import torch.nn.functional as F

    colour = lab(x) * 4
    pool = lambda y: F.avg_pool2d(y, window, window // 2)
    mean = pool(colour)
    deviation = (pool(colour**2) - mean**2).clamp_min(0).sqrt()
    y = F.pad(luma(x), (1, 1, 1, 1), mode="replicate")
    dx, dy = (y[..., 1:-1, 2:] - y[..., 1:-1, :-2]), (y[..., 2:, 1:-1] - y[..., :-2, 1:-1])
    angle, size = torch.atan2(dy, dx), (dx**2 + dy**2).sqrt()
    bins = torch.cat([size * torch.cos(angle - k * math.pi / 4).clamp_min(0) ** 2 for k in range(8)], 1)
    return torch.cat([mean, deviation, 2 * pool(bins)], 1)


def reference_scores(source, edit, change, ref):
    """How much the edit looks like the reference where it changed, and how much of that the source had already.

    source, edit (T, 3, H, W), change (T, H/8, W/8), ref (1, 3, h, w). Patches of the edit, weighted by how much
    they changed, look for their nearest patch in the reference, and the reference's for theirs in the edit.
    -> (similarity, gain): similarity in 0..1, the mean of exp(-d^2/2) both ways; gain in -1..1.
    """
    import torch
    import torch.nn.functional as F

    totals = torch.zeros(2)
    frames = torch.linspace(0, len(edit) - 1, min(5, len(edit))).round().long().tolist()
    for window in (16, 32):
        of_ref = patch_descriptors(ref, window)[0].flatten(1).T  # (R, 14)
        for t in frames:
            a, b = (patch_descriptors(x[t : t + 1], window)[0] for x in (source, edit))  # (14, h, w)
            weight = F.interpolate(change[None, t : t + 1], a.shape[1:], mode="area").flatten()
            weight = weight / weight.sum().clamp_min(1e-9)
            for k, own in enumerate((a, b)):
                near = torch.exp(-torch.cdist(own.flatten(1).T, of_ref).square() / 2)  # (P, R)
                totals[k] += (weight * near.amax(1)).sum() / 2 + near.amax(0).mean() / 2
    of_source, of_edit = (totals / (2 * len(frames))).tolist()
    return of_edit, of_edit - of_source


def read_reference(path, side=256):
    """A reference picture, its longer side `side` pixels: float32 (1, 3, h, w) in 0..1."""
    from data import read_image, resize

    image = read_image(path)
    scale = side / max(image.shape[:2])
    small = resize(image[None], [max(32, round(n * scale)) for n in image.shape[:2]])
    return small.permute(0, 3, 1, 2).float() / 255


def measure(item, wrong_ref=None):
    """All metrics of one item, and its known-answer controls -> dict of numbers (None: not defined for this item)."""
    import torch

    source, edit = load_pair(item, item.edit)
    change = change_map(source, edit)
    edited = changed_blocks(change)
    out = {"frames": len(edit), "edit_strength": change.mean().item() * 255, "edited_area": edited.float().mean().item()}
    kept = ~edited
    if kept.float().mean() >= 0.02:
        pixels = kept.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        error = ((edit - source).square() * pixels).sum() / (3 * pixels.sum())
        out["preserved_psnr"] = min(60.0, -10 * math.log10(max(error.item(), 1e-6)))
        out["preserved_ssim"] = ssim_map(luma(source), luma(edit))[kept].mean().item()
    out["flicker"], before = flicker(edit), flicker(source)
    if before is not None:
        out["flicker_excess"] = out["flicker"] - before
        order = torch.randperm(len(edit), generator=torch.Generator().manual_seed(0))
        out["control_shuffled_flicker"] = flicker(edit[order])
    if item.ref:
        out["reference_similarity"], out["reference_gain"] = reference_scores(source, edit, change, read_reference(item.ref))
    if wrong_ref:
        _, out["control_wrong_ref_gain"] = reference_scores(source, edit, change, read_reference(wrong_ref))
    return out


def wrong_reference(items, item):
    """The reference of the next item, cyclically, of the same task where there is one."""
    others = [i for i in items if i.ref and i.ref != item.ref]
    same = [i for i in others if i.task == item.task] or others
    after = [i for i in same if int(i.key) > int(item.key)] or same
    return after[0].ref if item.ref and after else None


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("score", help="score finished edits").add_argument
    add("path", help="the benchmark's file")
    add("--bench", choices=BENCHES, required=True)
    add("--edits", required=True, metavar="DIR", help="the edited videos, under their released names")
    add("--judge", default="metrics", help="metrics")
    add("--out", default="out/judge", metavar="DIR", help="folder for the report (default %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    items = BENCHES[args.bench](Path(args.path), Path(args.edits))
    import torch

    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda item: measure(item, wrong_reference(items, item)), items))
    names = sorted({name for row in rows for name in row})
    with (out / f"{args.bench}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "task", *names])
        for item, row in zip(items, rows):
            writer.writerow([item.key, item.task, *(row.get(n) for n in names)])
            print(item.key, item.task, {k: v if v is None else round(v, 3) for k, v in row.items()})


if __name__ == "__main__":
    main()
