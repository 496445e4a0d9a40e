"""Fewer forwards, long clips and masks, on held-out clips of nano's world: `python -m bench.solvers SECTION ...`

    few      forwards a clip, and PSNR of the edits to those of 100 Euler steps
    long     65 frames: windows that agree at each step beside windows by themselves
    mask     PSNR in and outside of what the truth changes, with that as the mask and without

long: PSNR to the truth in each quarter of the clip; how far two windows differ in the frames that both show, before
they are cross-faded; and flicker, the change from frame to frame beyond the truth's, where windows begin or end and
elsewhere. Differences are in levels of 255. nano's windows begin with each latent frame, where one alone flickers too.
"""

import bench

NAMES = ("few", "long", "mask")
args = bench.parse_arguments("bench.solvers", NAMES, __doc__) if __name__ == "__main__" else None

from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.nn.functional as F

from bench.measure import psnr
from model import KiwiEdit
from nano.__main__ import main as nano
from nano.data import read_case, read_truth
from sampler import Sampler, crossfaded, windows

FEW = [
    *[(f"Euler {steps}", steps, Sampler()) for steps in (50, 25, 16, 12)],
    *[(f"AB2 {steps}", steps, Sampler("ab2")) for steps in (25, 16, 12)],
    *[(f"Euler 50, reuse {limit:g}", 50, Sampler(reuse=limit)) for limit in (0.02, 0.05)],
    ("AB2 50, reuse 0.02", 50, Sampler("ab2", 0.02)),
    ("re-noise 1000,757,522", 50, Sampler(re_noise=(1000, 757, 522))),
]


@contextmanager
def model_and_cases(args, frames=9):
    """nano, and of each moving clip (source, prompt, reference or None, truth, the edited region)."""
    model = KiwiEdit.from_pretrained(bench.HOUSE / "weights/nano", dtype=torch.float32)
    with TemporaryDirectory() as folder:
        asked = ["--clips", 2 * args.clips, "--frames", frames, "--split", "test", "--workers", 1]
        nano(["data", folder, *map(str, asked)])
        cases = []
        for row in [row for row in read_truth(folder) if row["kind"] != "image"][: args.clips]:
            source, truth, ref, region = read_case(Path(folder), row)
            cases.append((source, row["prompt"], ref, truth, region))
        yield model, cases


def few(args):
    with model_and_cases(args) as (model, cases):
        forwards, velocity = [], model.velocity
        model.velocity = lambda *given: forwards.append(1) or velocity(*given)
        edit = lambda steps, sampler: [model.edit(*c[:3], steps, sampler=sampler, ref_guidance=1) for c in cases]
        best = edit(100, Sampler())
        for name, steps, sampler in FEW:
            forwards.clear()
            results = [psnr(a, b) for a, b in zip(edit(steps, sampler), best)]
            yield {"steps": name, "forwards": len(forwards) / len(cases), "PSNR dB": mean(results),
                   "worst clip": min(results)}  # fmt: skip


def agreeing(model, *given):
    """The windows of a long edit, (T, H, W, 3) each, before they are cross-faded."""
    with patch("model.crossfaded", lambda clips, *rest: clips):
        return list(model.edit_stream(*given))


def by_themselves(model, source, *given):
    """Likewise, each window an edit of its own."""
    spans = windows((len(source) + 3) // 4, model.config.vae.latent_frames(model.config.window))
    return [model.edit(source[4 * start : 4 * stop - 3], *given) for start, stop in spans]


def flicker(edit, truth):
    """Change from frame to frame beyond the truth's, where latent frames meet (windows begin and end there), and
    elsewhere."""
    changes = (edit.float() - truth.float()).diff(dim=0).abs().mean(dim=(1, 2, 3)).tolist()
    return [mean(c for i, c in enumerate(changes) if i and (i % 4 in (0, 3)) == meet) for meet in (True, False)]


def long(args):
    with model_and_cases(args, 65) as (model, cases):
        spans = windows(17, model.config.vae.latent_frames(model.config.window))
        for name, edit in {"windows that agree": agreeing, "by themselves, as much overlap": by_themselves}.items():
            quarters, apart, whole, alone = [[], [], [], []], [], [], []
            for source, prompt, ref, truth, _ in cases:
                clips = edit(model, source, prompt, ref)
                apart += [(a[4:].float() - b[:5].float()).square().mean().item() for a, b in pairwise(clips)]
                alone += [flicker(clip, truth[4 * start :][:9]) for clip, (start, _) in zip(clips, spans)]
                result = torch.stack(list(crossfaded(iter(clips), spans, 4)))
                whole.append(flicker(result, truth))
                for i, quarter in enumerate(quarters):
                    part = slice(len(truth) * i // 4, len(truth) * (i + 1) // 4)
                    quarter.append(psnr(result[part], truth[part]))
            row = {f"quarter {i + 1} dB": mean(quarter) for i, quarter in enumerate(quarters)}
            row |= {"windows differ by": mean(apart) ** 0.5, "flicker at borders": mean(w[0] for w in whole)}
            row |= {"elsewhere": mean(w[1] for w in whole), "there, one window": mean(a[0] for a in alone)}
            yield {"edit": name, **row}


def mask(args):
    with model_and_cases(args) as (model, cases):
        for name in ("no mask", "what the truth changes"):
            rows = []
            for source, prompt, ref, truth, region in cases:
                if region.all():  # a style: nothing stays
                    continue
                result = model.edit(source, prompt, ref, mask=None if name == "no mask" else region)
                far = F.max_pool2d(region.float(), 17, 1, 8) == 0  # 8 pixels from it
                kept = float((result == source)[far].float().mean())
                rows.append((psnr(result[region], truth[region]), psnr(result[~region], truth[~region]), kept))
            means = map(mean, zip(*rows))
            yield {"mask": name, **dict(zip(("inside dB", "outside dB", "equal far outside"), means))}


SECTIONS = dict(zip(NAMES, (few, long, mask)))
if __name__ == "__main__":
    bench.run("bench.solvers", args, SECTIONS)
