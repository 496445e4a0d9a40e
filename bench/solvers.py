"""Fewer forwards and long clips, on held-out clips of nano's world, which are drawn at first.

    python -m bench.solvers few      forwards a clip, and PSNR of the edits to those of 100 Euler steps
    python -m bench.solvers long     65 frames: windows that agree at each step beside windows by themselves
    python -m bench.solvers mask     PSNR in and outside of what the truth changes, with that as the mask and without

long: PSNR to the truth in each quarter of the clip, and flicker: the change from frame to frame beyond the truth's, in
levels of 255, where a blend of windows begins or ends and elsewhere. All windows are cross-faded. The ceiling is the
truth through the VAE.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

import metrics
from bench import HOUSE, save, table
from bench.measure import device_name
from media import read_clip, read_image
from model import KiwiEdit
from nano.__main__ import main as nano
from sampler import Sampler, crossfaded, windows

FEW = [
    *[(f"Euler {steps}", steps, Sampler()) for steps in (50, 25, 16, 12)],
    *[(f"AB2 {steps}", steps, Sampler("ab2")) for steps in (25, 16, 12)],
    *[(f"Euler 50, reuse {limit:g}", 50, Sampler(reuse=limit)) for limit in (0.02, 0.05)],
    ("AB2 50, reuse 0.02", 50, Sampler("ab2", 0.02)),
    ("re-noise 1000,757,522", 50, Sampler(re_noise=(1000, 757, 522))),
]


def psnr(a, b):
    """dB of uint8 frames (T, H, W, 3)."""
    return metrics.psnr(a.double() / 255, b.double() / 255)


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
    best = edit(100, Sampler())
    for name, steps, sampler in FEW:
        forwards = 0
        results = [psnr(a, b) for a, b in zip(edit(steps, sampler), best)]
        yield {"steps": name, "forwards": forwards / len(clips), "PSNR dB": mean(results), "worst clip": min(results)}


def by_themselves(edit, source, spans):
    """Each window of a clip an edit of its own, cross-faded where they overlap."""
    clips = (edit(source[4 * start : 4 * stop - 3]).clone() for start, stop in spans)
    return torch.stack(list(crossfaded(clips, spans, 4)))


def long(args, model):
    frames, length = 17, model.config.vae.latent_frames(model.config.window)
    spans, apart = windows(frames, length), windows(frames, length, 1)
    borders = {i for start, _ in spans[1:] for i in (4 * start - 1, 4 * start + 4)}  # the blend begins; it ends
    through = lambda clip: model.decode_frames(model.encode_frames(clip))
    alone = lambda source, spans, *rest: by_themselves(lambda part: model.edit(part, *rest), source, spans)
    ways = {
        "windows that agree": lambda source, truth, *rest: model.edit(source, *rest),
        "by themselves, as much overlap": lambda source, truth, *rest: alone(source, spans, *rest),
        "by themselves, one frame of overlap": lambda source, truth, *rest: alone(source, apart, *rest),
        "ceiling": lambda source, truth, *rest: by_themselves(through, truth, spans),
    }
    clips = list(cases(args.data, args.clips))
    for name, edit in ways.items():
        quarters, jumps = [[], [], [], []], ([], [])
        for source, prompt, ref, truth in clips:
            result = edit(source, truth, prompt, ref)
            for i, quarter in enumerate(quarters):
                part = slice(len(truth) * i // 4, len(truth) * (i + 1) // 4)
                quarter.append(psnr(result[part], truth[part]))
            error = result.float() - truth.float()
            for i, change in enumerate(error.diff(dim=0).abs().mean(dim=(1, 2, 3)).tolist()):
                jumps[i not in borders].append(change)
        dB = {f"quarter {i + 1} dB": mean(quarter) for i, quarter in enumerate(quarters)}
        yield {"edit": name, **dB, "flicker at borders": mean(jumps[0]), "elsewhere": mean(jumps[1])}


def mask(args, model):
    rows = [json.loads(line) for line in (Path(args.data) / "truth.jsonl").read_text().splitlines()]
    regions = [read_image(Path(args.data) / row["mask"])[..., 0] > 127 for row in rows if row["kind"] != "image"]
    clips = list(zip(cases(args.data, args.clips), regions))
    for name in ("no mask", "what the truth changes"):
        inside, outside, kept = [], [], []
        for (source, prompt, ref, truth), region in clips:
            region = region.unflatten(0, (len(source), -1))
            if region.all():  # a style: nothing stays
                continue
            result = model.edit(source, prompt, ref, mask=None if name == "no mask" else region)
            inside.append(psnr(result[region], truth[region]))
            outside.append(psnr(result[~region], truth[~region]))
            far = F.max_pool2d(region.float(), 17, 1, 8) == 0  # 8 pixels from it
            kept.append(float((result == source)[far].float().mean()))
        yield {"mask": name, "inside dB": mean(inside), "outside dB": mean(outside), "equal far outside": mean(kept)}


SECTIONS = {"few": few, "long": long, "mask": mask}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SECTIONS)
    parser.add_argument("--clips", type=int, default=6, help="moving clips (default %(default)s)")
    parser.add_argument("--weights", default=HOUSE / "weights/nano", metavar="DIR")
    parser.add_argument("--out", type=Path, default=HOUSE / "bench", help="folder of the results (default: bench/)")
    args = parser.parse_args()
    model, rows = KiwiEdit.from_pretrained(args.weights, dtype=torch.float32), []
    with TemporaryDirectory() as args.data:
        asked = ["--clips", 2 * args.clips, "--frames", 65 if args.what == "long" else 9, "--split", "test"]
        nano(["data", args.data, *map(str, asked), "--workers", "1"])
        for row in SECTIONS[args.what](args, model):
            rows.append(row)
            save(args.out, device_name(), f"solvers_{args.what}", rows, "bench.solvers")
    print(table(rows))


if __name__ == "__main__":
    main()
