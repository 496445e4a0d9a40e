"""Fewer forwards and long clips, on held-out clips of nano's world: `python -m bench.solvers SECTION ...`

    few      forwards a clip, and PSNR of the edits to those of 100 Euler steps
    long     65 frames: windows that agree at each step beside windows by themselves

long: PSNR to the truth in each quarter of the clip, and flicker: the change from frame to frame beyond the truth's, in
levels of 255, where a blend of windows begins or ends and elsewhere. All windows are cross-faded.
"""

import bench

NAMES = ("few", "long")
args = bench.parse_arguments("bench.solvers", NAMES, __doc__) if __name__ == "__main__" else None

from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch

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
    """nano, and of each moving clip (source, prompt, reference or None, truth)."""
    model = KiwiEdit.from_pretrained(bench.HOUSE / "weights/nano", dtype=torch.float32)
    with TemporaryDirectory() as folder:
        asked = ["--clips", 2 * args.clips, "--frames", frames, "--split", "test", "--workers", 1]
        nano(["data", folder, *map(str, asked)])
        cases = []
        for row in [row for row in read_truth(folder) if row["kind"] != "image"][: args.clips]:
            source, truth, ref, _ = read_case(Path(folder), row)
            cases.append((source, row["prompt"], ref, truth))
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


def by_themselves(edit, source, spans):
    """Each window of a clip an edit of its own, cross-faded where they overlap."""
    clips = (edit(source[4 * start : 4 * stop - 3]).clone() for start, stop in spans)
    return torch.stack(list(crossfaded(clips, spans, 4)))


def long(args):
    with model_and_cases(args, 65) as (model, cases):
        spans = windows(17, model.config.vae.latent_frames(model.config.window))
        borders = {i for start, _ in spans[1:] for i in (4 * start - 1, 4 * start + 4)}  # the blend begins; it ends
        alone = lambda source, *rest: by_themselves(lambda part: model.edit(part, *rest), source, spans)
        for name, edit in {"windows that agree": model.edit, "by themselves, as much overlap": alone}.items():
            quarters, jumps = [[], [], [], []], ([], [])
            for source, prompt, ref, truth in cases:
                result = edit(source, prompt, ref)
                for i, quarter in enumerate(quarters):
                    part = slice(len(truth) * i // 4, len(truth) * (i + 1) // 4)
                    quarter.append(psnr(result[part], truth[part]))
                error = result.float() - truth.float()
                for i, change in enumerate(error.diff(dim=0).abs().mean(dim=(1, 2, 3)).tolist()):
                    jumps[i not in borders].append(change)
            dB = {f"quarter {i + 1} dB": mean(quarter) for i, quarter in enumerate(quarters)}
            yield {"edit": name, **dB, "flicker at borders": mean(jumps[0]), "elsewhere": mean(jumps[1])}


SECTIONS = dict(zip(NAMES, (few, long)))
if __name__ == "__main__":
    bench.run("bench.solvers", args, SECTIONS)
