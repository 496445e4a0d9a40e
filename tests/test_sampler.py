"""Tests of sampler.py and of what `KiwiEdit.edit` and sample.py make of it"""

import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

import sample
from bench.solvers import agreeing, by_themselves, psnr
from conftest import HOUSE, close, moving_picture, small_model
from media import FrameFile, read_clip, read_image, write_image, write_video
from model import FlowMatch, KiwiEdit
from nano.__main__ import main as nano_main
from nano.data import read_frames, read_truth
from sampler import Sampler, agreed, crossfaded, in_windows, mask_latents, pasted, window_frames, windows

nano = pytest.mark.skipif(not sample.DEFAULT_WEIGHTS.is_dir(), reason="needs weights/nano")


@pytest.fixture(scope="session")
def nano_model():
    return KiwiEdit.from_pretrained(sample.DEFAULT_WEIGHTS, dtype=torch.float32)


@pytest.fixture(scope="session")
def long_case(tmp_path_factory):
    """Source, prompt and truth of a clip of 33 frames."""
    folder = tmp_path_factory.mktemp("long") / "data"
    nano_main(["data", str(folder), "--clips", "2", "--frames", "33", "--split", "test", "--workers", "1"])
    row = next(row for row in read_truth(folder) if row["kind"] == "video")
    return folder / row["src_video"], row["prompt"], read_frames(folder / row["tgt_video"])


def walk(sampler, steps, velocity, forwards=None):
    x = torch.ones(1, 1, 1, 2, 2)

    def counted(x, t, on_part):
        forwards.append(t.item()) if forwards is not None else None
        return velocity(x, t / 1000)

    return sampler.sample(counted, x, sampler.sigmas(FlowMatch(1.0), steps))


def test_adams_bashforth_is_of_second_order_and_euler_of_first():
    velocity = lambda x, sigma: x  # x(sigma) = exp(sigma - 1)
    error = lambda solver, steps: abs(walk(Sampler(solver), steps, velocity).mean().item() - math.exp(-1))
    assert 1.9 < error("euler", 20) / error("euler", 40) < 2.1
    assert 3.7 < error("ab2", 20) / error("ab2", 40) < 4.3 and error("ab2", 20) < error("euler", 40) / 5


def test_reuse_asks_the_model_less_the_higher_its_limit_but_always_at_first_and_last():
    def asked(limit):
        walk(Sampler(reuse=limit), 20, lambda x, sigma: x + 0.1 * sigma, forwards := [])
        return forwards

    assert len(asked(0.0)) == 20 > len(asked(0.1)) > len(asked(0.5)) > 4
    assert len(asked(1e9)) == 4 and asked(1e9) == [1000, 950, pytest.approx(900), pytest.approx(50)]


def test_re_noise_predicts_the_clean_latents_and_noises_them_anew():
    clean, seen = torch.full((1, 1, 1, 64, 64), 3.0), []

    def velocity(x, t, on_part):
        seen.append((t.item(), x.mean().item(), x.std().item()))
        return (x - clean) / (t / 1000)

    sampler, draw = Sampler(re_noise=(1000, 757, 522)), lambda: torch.randn(clean.shape)
    x = sampler.sample(velocity, draw(), sampler.sigmas(None, 50), draw=draw)
    assert close(x, clean, 1e-5) and [round(t) for t, *_ in seen] == [1000, 757, 522]
    assert all(abs(m - 3 * (1 - t / 1000)) < 0.05 and abs(s - t / 1000) < 0.05 for t, m, s in seen[1:])


@pytest.mark.parametrize("wrong", [
    {"solver": "heun"}, {"reuse": -1}, {"re_noise": (500, 700)}, {"re_noise": (1200,)}, {"re_noise": (9,), "reuse": 1},
])  # fmt: skip
def test_a_sampler_refuses_what_it_cannot_do(wrong):
    with pytest.raises(ValueError, match="Sampler"):
        Sampler(**wrong)


@nano
def test_fewer_forwards_stay_near_the_full_walk_of_nano(nano_model, long_case):
    clip = read_clip(long_case[0], 9).frames
    edit = lambda steps, *how: nano_model.edit(clip, long_case[1], steps=steps, sampler=Sampler(*how))
    best = edit(64)
    euler, ab2, reused = psnr(edit(12), best), psnr(edit(12, "ab2"), best), psnr(edit(32, "euler", 0.03), best)
    assert ab2 > euler + 1.5 and ab2 > 38 and reused > 38


def test_windows_cover_a_clip_evenly_overlap_and_average_to_the_velocity_of_the_whole():
    for frames, length in ((5, 21), (21, 21), (22, 21), (61, 21), (17, 3), (361, 21), (4, 3)):
        spans = windows(frames, length)
        assert spans[0][0] == 0 and spans[-1][1] == frames and all(b - a == min(length, frames) for a, b in spans)
        assert all(b1 - a2 >= max(length // 4, 1) + 1 for (_, b1), (a2, _) in pairwise(spans))
    x, spans = torch.randn(1, 2, 17, 2, 2), windows(17, 5)
    assert close(agreed(in_windows(x, spans), spans), in_windows(x, spans), 1e-6)
    apart = torch.randn(len(spans), 2, 5, 2, 2)
    together, start = agreed(apart, spans), spans[1][0]
    assert torch.equal(together[:, :, 0], apart[:, :, 0])  # a window's first latent stays its own
    assert torch.equal(together[0, :, start + 1 :], together[1, :, 1 : 5 - start])


def test_each_window_sees_its_own_frames():
    frames = torch.arange(33)
    seen = [stack.tolist() for stack in window_frames(frames, windows(9, 3), 4)]
    assert seen == [list(range(first, first + 9)) for first in range(0, 25, 4)]


def test_a_long_edit_never_shows_the_denoiser_more_than_a_window(qwen_folder):
    model, seen, told = small_model(qwen_folder).eval(), set(), []
    object.__setattr__(model.config, "trained", (5, 32, 32, 8))
    inject = model.inject
    model.inject = lambda x, *rest: seen.add(x.shape[2]) or inject(x, *rest)
    edited = model.edit(moving_picture(15, 32, 32), "Go.", steps=2, progress=lambda *tell: told.append(tell))
    assert edited.shape == (15, 32, 32, 3) and seen == {2} and {("denoise", 3, 8), ("denoise", 8, 8)} <= set(told)


@nano
def test_a_long_edit_stays_as_good_to_its_end_and_as_windows_by_themselves(nano_model, long_case):
    source, prompt, truth = read_clip(long_case[0], 99).frames, *long_case[1:]
    together = nano_model.edit(source, prompt)
    spans, ways = windows(9, 3), (agreeing(nano_model, source, prompt), by_themselves(nano_model, source, prompt))
    agree, differ = ([(a[4:].float() - b[:5].float()).square().mean() for a, b in pairwise(clips)] for clips in ways)
    assert sum(agree) < 0.9 * sum(differ)
    apart = torch.stack(list(crossfaded(iter(ways[1]), spans, 4)))
    flicker = lambda clip: float((clip.float() - truth.float()).diff(dim=0).abs().mean())
    assert psnr(together, truth) > psnr(apart, truth) - 0.3 and flicker(together) < 1.2 * flicker(apart)
    thirds = [psnr(together[i : i + 11], truth[i : i + 11]) for i in (0, 11, 22)]
    assert max(thirds) - min(thirds) < 4


@nano
def test_a_long_clip_streams_from_file_to_file_as_the_same_pixels(nano_model, long_case, tmp_path):
    source, prompt, _ = long_case
    clip = read_clip(source, 33, held=9)
    assert isinstance(clip.frames, FrameFile) and clip.frames.shape == (33, 64, 64, 3)
    whole = read_clip(source, 33).frames
    assert torch.equal(torch.stack(list(clip.frames)), whole) and torch.is_tensor(read_clip(source, 33, held=33).frames)
    assert torch.equal(torch.stack(list(nano_model.edit_stream(clip.frames, prompt))), nano_model.edit(whole, prompt))
    words = [str(source), prompt, "--frames", "33", "--device", "cpu", "--compare", "-o", str(tmp_path / "out.mp4")]
    sample.main(words)
    assert read_clip(tmp_path / "out.mp4", 99).frames.shape == (33, 64, 64, 3)
    assert read_image(tmp_path / "out_compare.png").shape == (256, 512, 3)


def test_a_mask_is_at_least_as_large_in_latents_and_soft_at_its_edge_in_pixels(qwen_folder):
    vae = small_model(qwen_folder).config.vae
    mask = torch.zeros(5, 64, 64, dtype=torch.bool)
    mask[3, 20, 40] = True
    assert mask_latents(mask, vae)[0].nonzero().tolist() == [[1, 20 // vae.space_stride, 40 // vae.space_stride]]
    black, white = torch.zeros(64, 64, 3, dtype=torch.uint8), torch.full((64, 64, 3), 255, dtype=torch.uint8)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 32:] = True
    row = pasted(white, black, mask)[10, :, 0].tolist()
    assert row == sorted(row) and row[23] == 0 < row[28] < 255 == row[32]


@nano
def test_outside_of_its_mask_an_edit_is_the_source_bit_by_bit(nano_model, tmp_path):
    clip, mask = moving_picture(9, 64, 64), torch.zeros(64, 64, 3, dtype=torch.uint8)
    mask[:, 40:] = 255
    still = nano_model.edit(clip, "Make it night.", mask=mask.expand(9, -1, -1, -1))
    assert torch.equal(still[:, :, :32], clip[:, :, :32]) and not torch.equal(still[:, :, 48:], clip[:, :, 48:])
    write_video(tmp_path / "in.mp4", clip, 8)
    write_image(tmp_path / "mask.png", mask)
    write_video(tmp_path / "mask.mp4", mask.expand(9, -1, -1, -1), 8)
    for name in ("mask.png", "mask.mp4"):
        read = sample.read_mask(str(tmp_path / name), read_clip(tmp_path / "in.mp4"))
        assert torch.equal(nano_model.edit(clip, "Make it night.", mask=read), still)
    write_video(tmp_path / "in.mp4", clip[:, :, :32], 8)
    with pytest.raises(ValueError, match="mask.png: 64x64 pixels, and the input has 32x64"):
        sample.read_mask(str(tmp_path / "mask.png"), read_clip(tmp_path / "in.mp4"))


@nano
def test_two_processes_make_the_same_edit_as_one(tmp_path):
    write_video(tmp_path / "in.mp4", moving_picture(9, 64, 64), 8)
    words = [str(HOUSE / "sample.py"), "in.mp4", "Make it night.", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, out in (([], "one.mp4"), (["-m", "torch.distributed.run", "--nproc-per-node", "2"], "two.mp4")):
        done = subprocess.run([sys.executable, *command, *words, "-o", out], capture_output=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    one, two = (read_clip(tmp_path / name).frames.int() for name in ("one.mp4", "two.mp4"))
    assert (one - two).abs().max() <= 1
