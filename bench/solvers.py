"""Fewer forwards, long clips and masks, on clips of nano's world whose truth is known.

    python -m nano data ../clips --split test --clips 16 && python -m bench.solvers few --data ../clips
    python -m nano data ../long --split test --clips 16 --frames 65 && python -m bench.solvers long --data ../long

few: forwards and PSNR of the edits to those of 200 Euler steps. long: windows that are denoised together beside windows
by themselves, cross-faded, and the clip at once; PSNR to the truth in each quarter of the clip, and flicker: the change
from a frame to the next beyond the truth's, at the borders of windows and elsewhere, in levels of 255.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from bench import HOUSE, save, table
from bench.measure import device_name
from media import read_clip, read_image
from model import KiwiEdit
from sampler import Sampler, windows

FEW = [
    *[(f"Euler {steps}", steps, Sampler()) for steps in (50, 25, 16, 12, 8)],
    *[(f"AB2 {steps}", steps, Sampler("ab2")) for steps in (25, 16, 12, 8)],
    *[(f"Euler 50, reuse {limit:g}", 50, Sampler(reuse=limit)) for limit in (0.01, 0.02, 0.05)],
    ("AB2 50, reuse 0.02", 50, Sampler("ab2", 0.02)),
    ("re-noise 1000,757,522", 50, Sampler(re_noise=(1000, 757, 522))),
]


def psnr(a, b):
    return -10 * math.log10(max(float(((a.double() - b.double()) / 255).square().mean()), 1e-6))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def cases(folder, limit):
    """(source, prompt, reference or None, truth) of the clips of a nano folder."""
    rows = [json.loads(line) for line in (Path(folder) / "truth.jsonl").read_text().splitlines()]
    for row in [row for row in rows if row["kind"] != "image"][:limit]:
        source, truth = (read_clip(Path(folder) / row[key], 10_000).frames for key in ("src_video", "tgt_video"))
        yield source, row["prompt"], read_image(Path(folder) / row["ref_image"]) if "ref_image" in row else None, truth


def few(args, model):
    clips, forwards, velocity = list(cases(args.data, args.clips)), 0, model.velocity

    def counted(*given):
        nonlocal forwards
        forwards += 1
        return velocity(*given)

    model.velocity = counted
    edit = lambda steps, sampler: [model.edit(*clip[:3], steps, sampler=sampler, ref_guidance=1) for clip in clips]
    best = edit(200, Sampler())
    for name, steps, sampler in FEW:
        forwards = 0
        results = [psnr(a, b) for a, b in zip(edit(steps, sampler), best)]
        yield {"steps": name, "forwards": forwards / len(clips), "PSNR dB": mean(results), "worst clip": min(results)}


def by_themselves(model, source, prompt, ref, spans):
    """Each window an edit of its own, cross-faded where they overlap."""
    total, weights = torch.zeros(source.shape), torch.zeros(len(source), 1, 1, 1)
    for a, b in spans:
        part = slice(4 * a, 4 * (b - 1) + 1)
        place = torch.arange(part.stop - part.start)
        weight = torch.minimum(place + 1, len(place) - place).clamp(max=5).view(-1, 1, 1, 1).float()
        total[part] += weight * model.edit(source[part], prompt, ref)
        weights[part] += weight
    return (total / weights).round().to(torch.uint8)


def long(args, model):
    spans = windows((65 - 1) // 4 + 1, model.config.vae.latent_frames(model.config.window))
    borders = {frame for a, b in spans[1:] for frame in range(4 * a - 4, 4 * a + 1)}
    ways = {
        "windows together": model.edit,
        "windows by themselves, cross-faded": lambda *clip: by_themselves(model, *clip, spans),
        "the source as it is": lambda source, *rest: source,
    }
    clips = list(cases(args.data, args.clips))
    for name, edit in ways.items():
        quarters, inside, jumps = [[], [], [], []], [], ([], [])
        for *clip, truth in clips:
            result = edit(*clip)
            for i, quarter in enumerate(quarters):
                part = slice(len(truth) * i // 4, len(truth) * (i + 1) // 4)
                quarter.append(psnr(result[part], truth[part]))
            error = result.float() - truth.float()
            for i, change in enumerate(error.diff(dim=0).abs().mean(dim=(1, 2, 3)).tolist()):
                jumps[i not in borders].append(change)
        yield {
            "edit": name, **{f"quarter {i + 1} dB": mean(quarter) for i, quarter in enumerate(quarters)},
            "flicker at borders": mean(jumps[0]), "elsewhere": mean(jumps[1]),
        }  # fmt: skip


SECTIONS = {"few": few, "long": long}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SECTIONS)
    parser.add_argument("--data", required=True, metavar="DIR", help="what `python -m nano data` drew")
    parser.add_argument("--clips", type=int, default=8, help="at most so many moving clips (default %(default)s)")
    parser.add_argument("--weights", default=HOUSE / "weights/nano", metavar="DIR")
    parser.add_argument("--out", type=Path, default=HOUSE / "bench", help="folder of the results (default: bench/)")
    args = parser.parse_args()
    rows, model = [], KiwiEdit.from_pretrained(args.weights, dtype=torch.float32)
    for row in SECTIONS[args.what](args, model):
        rows.append(row)
        save(args.out, device_name(), f"solvers_{args.what}", rows, "bench.solvers")
    print(table(rows))


if __name__ == "__main__":
    main()
