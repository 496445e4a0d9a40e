"""Tests of metrics.py"""

import re

import numpy as np
import pytest
import torch

import judge
import metrics
from conftest import BLUE, GREEN, RED, SHARED, demo, smooth_clip


def as_clip(colour, **more):
    return metrics.as_float(smooth_clip(colour, **more))


def test_metrics_know_the_copy_the_edit_and_the_wrong_reference():
    source, edit, (red, green) = as_clip(BLUE), as_clip(RED), (as_clip(c)[:1, :, 16:48, 8:40] for c in (RED, GREEN))
    copy, true = metrics.measure(source, source, [red]), metrics.measure(source, edit, [red, green])
    assert copy["edit_strength"] == copy["edited_area"] == copy["reference_gain"] == copy["flicker_excess"] == 0
    assert copy["preserved_psnr"] == 60 and copy["preserved_ssim"] == pytest.approx(1)
    assert true["edited_area"] == pytest.approx(0.25, abs=0.06) and true["preserved_psnr"] == 60
    assert true["reference_gain"] > 0.3 > true["wrong_reference_gain"]
    assert all(metrics.known_answers(source, source, red, true).values())
    assert not any(metrics.known_answers(source, source, red, copy).values())


def test_a_small_edit_is_not_drowned_by_what_stayed():
    source, ref = as_clip(BLUE, size=256), as_clip(RED)[:1, :, 16:48, 8:40]
    edit = source.clone()
    edit[:, :, 180:204, 200:224] = ref[..., :24, :24]
    changed = metrics.reference_scores(source, edit, metrics.change_map(source, edit), [ref])[0]
    everywhere = metrics.reference_scores(source, edit, torch.ones(8, 32, 32), [ref])[0]
    assert changed[1] > 0.3 and changed[1] > everywhere[1] + 0.05


DAMAGES = {  # what is done to the edit: the metrics that say so, and by how much they move
    "blurred": (lambda s, e: metrics.blurred(e), {"sharpness_kept": (-1, -0.4), "sharpness_edited": (-1, -0.4)}),
    "frozen": (lambda s, e: e[:1].expand_as(e), {"frozen_share": (1, 1), "lag": (8, 8)}),
    "half rate": (lambda s, e: e[torch.arange(len(e)) // 2 * 2], {"frozen_share": (0.45, 0.55)}),
    "3 frames late": (lambda s, e: e[(torch.arange(len(e)) - 3).clamp_min(0)], {"lag": (3, 3)}),
    "boils": (lambda s, e: torch.where(s != e, e + 0.1 * torch.randn_like(e), e).clamp(0, 1), {"warp_error": (3, 30)}),
    "a quarter": (lambda s, e: s + (e - s) / 4, {"edit_strength": (-99, -5)}),
    "shifted": (lambda s, e: e.roll((2, -1), (2, 3)), {"shift": (2.0, 2.5), "preserved_psnr": (-10, 0)}),
    "noisy": (lambda s, e: (e + 0.1 * torch.randn_like(e)).clamp(0, 1), {"flicker_excess": (10, 99)}),
    "shuffled": (lambda s, e: metrics.shuffled(e), {"flicker_excess": (10, 99)}),
    "replaced": (lambda s, e: e * 0 + torch.eye(3)[0, :, None, None], {"preserved_psnr": (-60, -20)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn_pair():
    """A texture that moves, an edit that tints a square of it: float (T, 3, H, W), and its metrics."""
    texture = torch.rand(1, 3, 40, 80, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(texture, (136, 232), mode="bicubic")[0]
    source = torch.stack([texture[:, t // 2 : t // 2 + 96, t : t + 96] for t in range(24)]).clamp(0, 1)
    edit = source.clone()
    edit[:, 0, 24:72, 24:72] = edit[:, 0, 24:72, 24:72] * 0.3 + 0.7
    return source, edit, metrics.measure(source, edit)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_table_of_damages_each_is_seen_by_a_metric_made_for_it(drawn_pair, damage):
    source, edit, before = drawn_pair
    do, seen = DAMAGES[damage]
    after = metrics.measure(source, do(source, edit))
    assert before["frozen_share"] == before["lag"] == before["shift"] == 0
    for name, (low, high) in seen.items():
        assert low - 1e-6 <= after[name] - before[name] <= high + 1e-6, name
    if damage == "replaced":
        assert after["preserved_psnr"] == after["preserved_ssim"] == 0  # nothing was kept: the worst there is


def test_the_numbers_are_those_of_their_formulas_and_undefined_where_nothing_is():
    a, where = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 16, 16, dtype=torch.bool)
    where[:, :8] = True
    b = a + 0.1 * where[:, None]
    assert metrics.psnr(a, b, where) == pytest.approx(20) and metrics.psnr(a, b, ~where) == 60
    assert metrics.ssim(a, a) == pytest.approx(1) and metrics.ssim(a, b, where) < 0.99
    assert np.isnan(metrics.psnr(a, b, where & False)) and np.isnan(metrics.ssim(a, b, where & False))
    measured = metrics.measure(as_clip(BLUE), as_clip(RED) + 0.02)  # damage to what should stay
    assert measured["preserved_psnr"] == pytest.approx(-20 * np.log10(0.02), abs=0.3)
    half = torch.zeros(1, 3, 16, 16)
    half[..., :8] = 51 / 255
    measured = metrics.measure(half * 0, half)
    assert measured["edit_strength"] == pytest.approx(25.5) and measured["edited_area"] == 0.5
    assert measured["flicker"] is measured["lag"] is measured["reference_gain"] is None  # a still, without a reference


@pytest.mark.parametrize("count", [1, 9])
def test_the_small_clips_of_the_page_are_as_long_as_the_edit_and_near_it(tmp_path, count):
    frames = smooth_clip(BLUE, count)
    copy = metrics.write_small(tmp_path / "x", frames, 8)
    assert copy.shape == frames.shape and 0 < (copy.float() - frames.float()).abs().mean() < 6
    assert (tmp_path / "x.jpg").is_file() and (tmp_path / "x.mp4").is_file() == (count > 1)


def test_the_changed_region_is_compared_with_the_reference_by_features_if_there_are_any():
    edit, changed = torch.zeros(3, 32, 32, 3, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.bool)
    changed[:, 1:3, 2], seen = True, []
    embed = lambda images: (seen.extend(images), torch.eye(2)[[len(image) % 2 for image in images]])[1]
    assert metrics.crop_similarity(edit, changed, torch.zeros(5, 5, 3), embed) == 0  # 16 rows are even, 5 are odd
    assert [tuple(image.shape) for image in seen] == [(16, 8, 3)] * 3 + [(5, 5, 3)]
    assert metrics.crop_similarity(edit, changed & False, None, embed) is None


@demo
def test_metrics_rank_real_edits_above_the_copy_and_a_wrong_reference(tmp_path, capsys):
    edits = SHARED / "demo" / "edits" / "refvie"
    words = ["score", "--bench", "refvie", SHARED / "demo" / "refvie_bench.yaml", "--edits", edits, "--out", tmp_path]
    judge.main([*map(str, words), "--limit", "2"])  # of all six 6 and 5 hold
    held = re.findall(r"\| reference_gain is above .* \| (\d) \| 2 \|", capsys.readouterr().out)
    assert held == ["2", "2"]
