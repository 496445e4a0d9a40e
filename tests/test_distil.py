"""Tests of distil.py and `train.py --preset distil`"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from conftest import lessons, losses, moving_picture
from distil import FAKE, STUDENT, TURNS, Distillation
from lora import add_adapter, inject_lora
from model import KiwiEdit
from sampler import FlowMatch, Sampler
from stages import DISTIL

NUMBERS = 16


class Coin(nn.Module):
    """A KiwiEdit in small whose clips are 16 numbers, all 1 or all -1: the best guess from noise is their mean, 0."""

    dtype, training_loss, cast = torch.float32, KiwiEdit.training_loss, KiwiEdit.cast

    def __init__(self):
        super().__init__()
        inner = nn.Linear(128, 128), nn.SiLU()
        self.dit = nn.Sequential(nn.Linear(2 * NUMBERS + 7, 128), nn.SiLU(), *inner, nn.Linear(128, NUMBERS))

    def velocity(self, x, t, context, source=None, ref=None):
        t, flat = t[:, None] / 1000, x.flatten(1)
        waves = [f(k * t) for k in (1, 3, 6) for f in (torch.sin, torch.cos)]
        return self.dit(torch.cat([flat, flat * t, t, *waves], dim=1)).view_as(x)


def learn(parameters, rate, steps, loss_of):
    optimizer = torch.optim.Adam(parameters, rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()


def test_a_student_of_two_forwards_makes_what_its_teacher_makes_in_four():
    torch.manual_seed(0)
    model, flow, rows = Coin(), FlowMatch(1.0, weighting="none"), 128
    context, shape = torch.zeros(rows, 1, 1), (NUMBERS, 1, 1, 1)
    draw_t = lambda: flow.timesteps(1000)[torch.randint(1000, (rows,))]
    clips = lambda: (2.0 * torch.randint(0, 2, (rows, 1, 1, 1, 1)) - 1).expand(rows, *shape)
    distance = lambda x: (x - x.mean(dim=1, keepdim=True).sign()).abs().mean().item()  # to the nearer side of the coin
    learn(model.parameters(), 3e-3, 600, lambda step: model.training_loss(clips(), context, draw_t(), flow=flow))
    velocity = lambda x, t, on_part: model.velocity(x, t, context)
    taught = lambda steps: distance(Sampler().sample(velocity, torch.randn(rows, *shape), flow.sigmas(steps)))
    with torch.no_grad():
        two, four = taught(2), taught(4)

    inject_lora(model.requires_grad_(False).dit, 16, ("0", "2", "4"))
    add_adapter(model.dit, FAKE)
    distillation = Distillation(model, replace(DISTIL, student=(1000.0, 500.0)))
    noise = lambda: torch.randn(rows, distillation.noises, *shape)

    def loss_of(step):
        distillation.begin(step)
        return distillation.loss(None, context, draw_t(), None, None, noise(), flow, False)

    learn([p for name, p in model.named_parameters() if ".lora_" in name], 1e-3, 1000, loss_of)
    student = distance(distillation.edit(noise(), (context,), 2, learning=False))
    assert student < 0.4 * two and student < 1.5 * four


def test_a_student_learns_in_its_turns_resumes_and_edits_in_its_own_steps(tmp_path, lesson, held, monkeypatch, capsys):
    acting, edit, run = [], KiwiEdit.edit, tmp_path / "run"
    adapter = lambda model: next(m.adapter for m in model.dit.modules() if hasattr(m, "adapter"))
    monkeypatch.setattr(KiwiEdit, "edit", lambda model, *a, **k: acting.append(adapter(model)) or edit(model, *a, **k))

    def distil(steps, out=run, *flags, weights=lesson / "weights"):
        settings = [f"steps={steps}", "dit_lora_rank=3", "student=1000,700", "lr=0.01", "global_batch=2"]
        more = ["--preset", "distil", "--val", held, "--weights", weights, *flags]
        train.main(lessons(lesson, out, *more, settings=[*settings, "sample_every=5", "sample_steps=1"]))

    distil(5)
    assert set(acting) == {STUDENT}, "previews are the student's, whoever learned last"
    monkeypatch.undo()
    distil(TURNS + 2, run, "--resume", "auto")
    distil(TURNS + 2, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    first, last = (load_file(run / f"step-00000{step}/weights.safetensors") for step in (5, TURNS + 2))
    assert all(".lora_" in name and FAKE not in name for name in last), "only the student is saved"
    assert not any(first[name].any() for name in first if "lora_B" in name), "the first five turns are the fake's"
    assert any(last[name].any() for name in last if "lora_B" in name)
    assert len(losses(run, "loss_student")) == 1 and len(losses(run, "loss_fake")) == TURNS + 1
    assert losses(run, "val")[0] != losses(run, "val")[-1]
    with pytest.raises(ValueError, match="merge it by --export"):
        distil(1, tmp_path / "other", weights=run)

    train.main(["--export", str(run), "--out", str(tmp_path / "model")])
    train.main(["--export-lora", str(run), "--out", str(tmp_path / "x.safetensors")])
    assert "--re-noise 1000,700" in capsys.readouterr().out
    assert not any(FAKE in name for name in load_file(tmp_path / "x.safetensors"))
    own, whole = (KiwiEdit.from_pretrained(path, dtype=torch.float32) for path in (run, tmp_path / "model"))
    assert own.config.re_noise == whole.config.re_noise == (1000, 700)
    result = lambda model, **how: model.edit(moving_picture(6, 32, 64), "Replace the sky.", **how).int()
    assert torch.equal(result(own), result(own, sampler=Sampler(re_noise=(1000, 700))))
    assert (result(own) - result(whole)).abs().max() <= 1 and not torch.equal(result(own), result(own, steps=2))
