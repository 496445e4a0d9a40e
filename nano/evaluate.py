"""Edits of held-out clips against their truth: is the region right, is the rest kept, is it the thing asked for, is it
as sharp. Beside the edit stand a copy of the source, the edit without its reference, and the ceiling: the truth through
the model's own VAE, which no edit can exceed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from media import pad_reference, write_image, write_text
from metrics import as_float, luma, psnr, ssim
from model import KiwiEdit
from nano.data import read_case, read_truth, read_world
from nano.world import draw_frames, load_library, pick, redraw_edit, render, to_uint8
from parallel import pick_device
from report import table
from stats import mean_of

CANDIDATES = 20  # the right sprite among so many: chance is 5 %
NOT_EVALUATED = "Not evaluated yet: `python -m nano eval --card`."  # in the card of weights that were just shipped


def detail(frames, region):
    """Sum of the luma's |Laplacian| in the region: fine edges and grain."""
    y = F.pad(luma(frames), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(y, kernel)[:, 0].abs()[region].sum())


def measure(result, target, region):
    """uint8 (T, H, W, 3) against its truth, in the region (T, H, W) and out of it; nan where that is empty."""
    numbers, result, target = {}, as_float(result), as_float(target)
    for where, part in (("in", region), ("out", ~region)):
        numbers[f"psnr_{where}"], numbers[f"ssim_{where}"] = psnr(result, target, part), ssim(result, target, part)
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


def recognise(edit, library, result, region, index):
    """Does one see what the edit asked for? {} if not measurable, else {"right": bool} and, for a reference whose name
    has another look, {"look": bool}.

    right: of CANDIDATES things the one asked for is nearest; a removal is 6 dB nearer to the truth than to the source.
    look: the sprite that was shown is nearer than the other looks of its name.
    """
    if edit.task == "remove":
        source, target, result = map(as_float, (*draw_frames(edit, result.shape[1])[:2], result))
        return {"right": psnr(result, target, region) >= psnr(result, source, region) + 6}
    if edit.new is None or not region.any():
        return {}
    rng = np.random.default_rng([7, index])
    names = library.names("test") if edit.ref is not None else sum(library.nameable("test"), [])
    others = [name for name in names if name != edit.new.name]
    others = [others[i] for i in rng.permutation(len(others))[: CANDIDATES - 1]]
    candidates = [edit.new] + [pick(rng, library.sprites[name]) for name in others]
    found = {"right": is_nearest(edit, candidates, result, region)}
    looks = [sprite for sprite in library.sprites[edit.new.name] if sprite.look != edit.new.look]
    if edit.ref is not None and looks:
        found["look"] = is_nearest(edit, [edit.new, *looks], result, region)
    return found


def mean(values):
    """Of those that are not nan; nan without any."""
    return torch.tensor(list(values), dtype=torch.float64).nanmean().item()


def sharpness(results, where):
    """|Laplacian| of some cases' results to that of their truth: 1 is as sharp, less is blurred; nan if flat."""
    truth = sum(result[f"truth_{where}"] for result in results)
    return sum(result[f"detail_{where}"] for result in results) / truth if truth else math.nan


def summary(cases):
    """Means by task and method as a Markdown table."""
    names = [f"{name} {where}" for where in ("in", "out") for name in ("PSNR", "SSIM", "sharpness")]
    rows = [["task", "method", "cases", *names, "right object", "shown look"]]
    for task in [*dict.fromkeys(case["task"] for case in cases), "all"]:
        of_task = [case["measures"] for case in cases if task in (case["task"], "all")]
        for method in dict.fromkeys(method for measures in of_task for method in measures):
            results, cells = [measures[method] for measures in of_task if method in measures], []
            of = lambda name: mean(result.get(name, math.nan) for result in results)
            for where in ("in", "out"):
                numbers = of(f"psnr_{where}"), of(f"ssim_{where}"), sharpness(results, where)
                cells += [f"{number:.2f}" for number in numbers]
            cells += [f"{of('right'):.0%}", f"{of('look'):.0%}"]
            rows.append([task, method, len(results), *("" if "nan" in cell else cell for cell in cells)])
    return table(rows)


def evaluate(args):
    """Edit held-out cases and compare with the known truth: eval.json, eval.md, sheet.png under --out."""
    folder, out, card = Path(args.data), Path(args.out), Path(args.weights, "MODEL_CARD.md")
    rows, world = read_truth(folder)[: args.cases], read_world(folder, "test")
    library = load_library(world["assets"])
    model = KiwiEdit.from_pretrained(args.weights, pick_device(), torch.float32)
    asked = {"steps": args.steps, "ref_guidance": args.ref_guidance, "re_noise": () if args.steps else None}
    model.config = replace(model.config, **{name: value for name, value in asked.items() if value is not None})
    out.mkdir(parents=True, exist_ok=True)
    cases, pictures = [], {}
    for row in tqdm(rows, desc="eval", mininterval=5):
        index, edit = row["index"], redraw_edit(library, world, row["index"])
        source, target, ref, region = read_case(folder, row)
        results = {"edit": model.edit(source, row["prompt"], ref, seed=index), "copy": source}
        if ref is not None:
            results["edit, no reference"] = model.edit(source, row["prompt"], seed=index)
        results["ceiling"] = model.decode_frames(model.encode_frames(target))
        measures = {
            method: measure(result, target, region) | recognise(edit, library, result, region, index)
            for method, result in results.items()
        }
        shown = torch.full_like(source[:1], 40) if ref is None else pad_reference(ref, source.shape[1:3])[None]
        frames = [clip[len(clip) // 2] for clip in (source, shown, results["edit"], target)]
        task = "subject" if row["task"] == "subject_add" else row["task"]
        cases.append({"index": index, "task": task, "prompt": row["prompt"], "measures": measures})
        pictures.setdefault(task, []).append(torch.cat(frames, dim=1))
    told = {"weights": args.weights, "world": world, "asked": asked, "cases": cases}
    write_text(out / "eval.json", json.dumps(told, indent=0))
    write_text(out / "eval.md", text := summary(cases) + "\n")
    empty = torch.zeros_like(pictures[task][0])
    sheet = torch.cat([torch.cat((shown + 4 * [empty])[:4], dim=1) for shown in pictures.values()])
    write_image(out / "sheet.png", sheet.repeat_interleave(2, 0).repeat_interleave(2, 1))
    print(f"{text}write       {out}/eval.md, eval.json, sheet.png (source | reference | edit | truth, four a task)")
    if args.card:
        write_text(card, card.read_text().replace(NOT_EVALUATED, text.rstrip()))


def read_reports(folders):
    """{case's index and task: what was measured of its edit, by each of the reports}."""
    found = {}
    for folder in folders:
        for case in json.loads((Path(folder) / "eval.json").read_text())["cases"]:
            found.setdefault((case["index"], case["task"]), []).append(case["measures"]["edit"])
    return found


def compare(args):
    """Reports (one way, several seeds) against others, paired by case: mean difference and 95 % interval."""
    a, b = read_reports(args.reports), read_reports(args.to)
    if a.keys() != b.keys():
        raise ValueError(f"{args.reports[0]}, {args.to[0]}: not of the same cases")
    rows = [["task", "cases", "inside, dB", "outside, dB", "right object"]]
    for task in [*dict.fromkeys(task for _, task in a), "all"]:
        keys, cells = [key for key in a if task in (key[1], "all")], []
        for name in ("psnr_in", "psnr_out", "right"):
            over_seeds = lambda edits: mean(edit.get(name, math.nan) for edit in edits)
            differences = [over_seeds(a[key]) - over_seeds(b[key]) for key in keys]
            cells.append(mean_of([[d for d in differences if not math.isnan(d)]]))
        rows.append([task, len(keys), *cells])
    print(table(rows))
