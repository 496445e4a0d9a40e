"""Edits of held-out clips against their truth: is the region right, is the rest kept, is it the thing asked for, is it
as sharp. Beside the edit stand a copy of the source, the edit without its reference, and the ceiling: the truth through
the model's own VAE, which no edit can exceed."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from media import pad_reference, write_image, write_text
from model import KiwiEdit
from nano.data import read_frames, read_mask, read_truth, read_world
from nano.world import draw_frames, load_library, nameable, pick, redraw_edit, render, to_uint8
from parallel import pick_device

CANDIDATES = 20  # the right sprite among so many: chance is 5 %
ASKED = {  # set before all training: dB gained on a copy inside the edited region, share of right objects
    "change": (6, 0.6), "add": (6, 0.6), "remove": (6, None), "background": (6, None), "style": (4, None),
    "subject": (None, 0.7),
}  # fmt: skip


def region_psnr(a, b, region):
    """PSNR in dB, at most 60, of uint8 (T, H, W, 3) where region (T, H, W) is true; nan where it is empty."""
    error = ((a.double() - b.double()) / 255).square().mean(dim=-1)[region].mean()
    return min(60.0, -10 * math.log10(max(float(error), 1e-6))) if region.any() else math.nan


def region_ssim(a, b, region, window=7):
    """SSIM of 7x7 windows centred in the region, mean over windows and colours; nan where it is empty."""
    smooth = lambda x: F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)
    a, b = (x.permute(0, 3, 1, 2).double() / 255 for x in (a, b))
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(ssim.mean(dim=1)[region].mean()) if region.any() else math.nan


def detail(frames, region):
    """Energy of the luma's Laplacian in the region, in 0..1 per pixel squared: fine edges and grain."""
    luma = (frames.float() / 255 @ torch.tensor([0.299, 0.587, 0.114]))[:, None]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernel)[:, 0].square()[region].sum())


def measure(result, target, region):
    numbers = {}
    for where, part in (("in", region), ("out", ~region)):
        numbers[f"psnr_{where}"] = region_psnr(result, target, part)
        numbers[f"ssim_{where}"] = region_ssim(result, target, part)
        numbers[f"detail_{where}"], numbers[f"truth_{where}"] = detail(result, part), detail(target, part)
    return numbers


def is_nearest(edit, sprites, result, region):
    """Whether, of sprites drawn where the edit brought its own, the first comes closest to `result` in the region."""
    errors = []
    for sprite in sprites:
        things, after = list(edit.target.things), edit.changed[1]
        things[after] = replace(things[after], sprite=sprite)
        drawn = to_uint8(render(replace(edit.target, things=things), result.shape[1])[0])
        errors.append(float((drawn.double() - result.double()).square().mean(dim=-1)[region].mean()))
    return errors[0] == min(errors)


def recognise(edit, library, split, result, region, index):
    """Does one see what the edit asked for? {} if not measurable, else {"right": bool} and, for a reference whose name
    has another look, {"look": bool}.

    right: of CANDIDATES things the one asked for is nearest; a removal is 6 dB nearer to the truth than to the source.
    look: the sprite that was shown is nearer than the other looks of its name.
    """
    if edit.task == "remove":
        source, target, _ = draw_frames(edit, result.shape[1])
        return {"right": region_psnr(result, target, region) >= region_psnr(result, source, region) + 6}
    if edit.new is None or not region.any():
        return {}
    rng = np.random.default_rng([7, index])
    names = library.names(split) if edit.ref is not None else [n for group in nameable(library, split) for n in group]
    others = [name for name in names if name != edit.new.name]
    others = [others[i] for i in rng.permutation(len(others))[: CANDIDATES - 1]]
    candidates = [edit.new] + [pick(rng, library.sprites[name]) for name in others]
    found = {"right": is_nearest(edit, candidates, result, region)}
    looks = [sprite for sprite in library.sprites[edit.new.name] if sprite.look != edit.new.look]
    if edit.ref is not None and looks:
        found["look"] = is_nearest(edit, [edit.new, *looks], result, region)
    return found


def evaluate_case(model, library, edit, split, folder, row):
    """One case -> its measures by method, and its middle frame as a row: source, reference, edit, truth."""
    source, target = (read_frames(folder / row[key]) for key in ("src_video", "tgt_video"))
    size, middle = source.shape[1], len(source) // 2
    region = read_mask(folder / row["mask"], size)
    ref = read_frames(folder / row["ref_image"])[0] if "ref_image" in row else None
    results = {"edit": model.edit(source, row["prompt"], ref, seed=row["index"]), "copy": source}
    if ref is not None:
        results["edit, no reference"] = model.edit(source, row["prompt"], seed=row["index"])
    results["ceiling"] = model.decode_frames(model.encode_frames(target))
    measures = {
        method: measure(result, target, region) | recognise(edit, library, split, result, region, row["index"])
        for method, result in results.items()
    }
    shown = torch.full_like(source[0], 40) if ref is None else pad_reference(ref, (size, size))
    return measures, torch.cat([source[middle], shown, results["edit"][middle], target[middle]], dim=1)


def mean(values):
    """Of the numbers among the values; None where there are none."""
    values = [float(value) for value in values if value is not None and not math.isnan(value)]
    return sum(values) / len(values) if values else None


def sharpness(measures, where):
    """Laplacian energy of some cases' results to that of their truth: 1 is as sharp, less is blurred; None if flat."""
    truth = sum(m[f"truth_{where}"] for m in measures)
    return sum(m[f"detail_{where}"] for m in measures) / truth if truth else None


def by_task(cases):
    groups = {}
    for case in cases:
        groups.setdefault(case["task"], []).append(case["measures"])
    return groups


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def summary(cases):
    """Means by task and method as a Markdown table."""
    columns = {"PSNR": "psnr_{}", "SSIM": "ssim_{}", "sharpness": None}
    rows = []
    for task, of_task in [*by_task(cases).items(), ("all", [case["measures"] for case in cases])]:
        for method in dict.fromkeys(method for m in of_task for method in m):
            results, cells = [m[method] for m in of_task if method in m], []
            for where in ("in", "out"):
                for name in columns.values():
                    number = mean(m[name.format(where)] for m in results) if name else sharpness(results, where)
                    cells.append("" if number is None else f"{number:.2f}")
            right = [mean(m.get(name) for m in results) for name in ("right", "look")]
            rows.append([task, method, len(results), *cells, *("" if n is None else f"{n:.0%}" for n in right)])
    names = [f"{name} {where}" for where in ("in", "out") for name in columns]
    return markdown(["task", "method", "cases", *names, "right object", "shown look"], rows)


def goals(cases):
    """Per task what an edit should reach, as a Markdown table; in brackets what was ASKED."""
    rows = []
    for task, of_task in by_task(cases).items():
        inside = mean(m["edit"]["psnr_in"] - m["copy"]["psnr_in"] for m in of_task)
        outside = mean(m["ceiling"]["psnr_out"] - m["edit"]["psnr_out"] for m in of_task)
        right = mean(m["edit"].get("right") for m in of_task)
        without = [m for m in of_task if "edit, no reference" in m]
        shown = mean(m["edit"]["psnr_in"] - m["edit, no reference"]["psnr_in"] for m in without)
        asked_in, asked_right = ASKED.get(task, (None, None))
        rows.append([
            task,
            f"{inside:+.1f} dB" + (f" (asked {asked_in:+})" if asked_in else ""),
            "" if outside is None else f"{outside:.1f} dB (asked at most 3)",
            "" if right is None else f"{right:.0%}" + (f" (asked {asked_right:.0%})" if asked_right else ""),
            "" if shown is None else f"{shown:+.1f} dB (asked more than 0)",
        ])  # fmt: skip
    columns = ["task", "edit - copy, inside", "ceiling - edit, outside", "right object", "reference - none, inside"]
    return markdown(columns, rows)


def digest_of(model):
    """A fingerprint of a model's weights as they are shipped, in bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(args):
    """Edit held-out cases and compare with the known truth: eval.json, eval.md, sheet.png under --out."""
    folder, out = Path(args.data), Path(args.out)
    rows, world = read_truth(folder)[: args.cases], read_world(folder)
    library = load_library(world["assets"] if args.assets is None else args.assets)
    model = KiwiEdit.from_pretrained(args.weights, pick_device(), torch.float32)
    asked = {"steps": args.steps, "ref_guidance": args.ref_guidance}
    model.config = replace(model.config, **{name: value for name, value in asked.items() if value is not None})
    out.mkdir(parents=True, exist_ok=True)
    cases, pictures = [], {}
    for row in tqdm(rows, desc="eval", mininterval=5):
        edit = redraw_edit(library, world, row["index"])
        measures, picture = evaluate_case(model, library, edit, world["split"], folder, row)
        task = "subject" if row["task"] == "subject_add" else row["task"]
        cases.append({"index": row["index"], "task": task, "prompt": row["prompt"], "measures": measures})
        pictures.setdefault(task, []).append(picture)
    settings = {"digest": digest_of(model)} | {name: getattr(model.config, name) for name in ("steps", "ref_guidance")}
    told = {"weights": args.weights, "world": world, **settings, "cases": cases}
    write_text(out / "eval.json", json.dumps(told, indent=0))
    write_text(out / "eval.md", table := f"{summary(cases)}\n{goals(cases)}")
    empty = torch.zeros_like(picture)
    sheet = torch.cat([torch.cat((shown + 4 * [empty])[:4], dim=1) for shown in pictures.values()])
    write_image(out / "sheet.png", sheet.repeat_interleave(2, 0).repeat_interleave(2, 1))
    print(f"{table}write       {out}/eval.md, eval.json, sheet.png (source | reference | edit | truth, four a task)")
