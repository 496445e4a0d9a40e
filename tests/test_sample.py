"""Tests of sample.py"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import command
import sample
from conftest import HOUSE, SHARED, bad_media, demo, moving_picture, save_training_layout, small_model
from media import pad_reference, read_clip, read_image, write_image, write_video
from model import PRESETS, KiwiEdit, read_for
from sampler import Sampler


def edit(*words):
    sample.main([*map(str, words), "--device", "cpu"])


def test_help_answers_before_the_heavy_imports():
    done = subprocess.run([sys.executable, "-X", "importtime", "sample.py", "--help"], capture_output=True, text=True,
                          cwd=HOUSE)  # fmt: skip
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "examples:" in done.stdout
    assert "argparse" in imported and not imported & {"torch", "av", "transformers", "numpy"}


@demo
def test_the_main_job_on_a_real_clip_gives_a_playable_edit(tmp_path, qwen_folder):
    weights, shared = save_training_layout(small_model(qwen_folder), tmp_path), SHARED / "demo"
    layers = ["--weights", weights, "--base", tmp_path / "wan", "--qwen", tmp_path / "qwen"]
    few = ["--max-pixels", 50000, "--frames", 21, "--steps", 2, "-o", tmp_path / "out.mp4"]
    words = [shared / "bathtub.mp4", "Replace the towel with stones.", "--ref", shared / "stones.jpg", "--compare"]
    edit(*words, *layers, *few)
    clip = read_clip(tmp_path / "out.mp4")
    assert clip.frames.shape == (21, 160, 288, 3) and clip.fps == 16
    assert read_clip(tmp_path / "out_compare.mp4").frames.shape == (21, 160, 3 * 288, 3)  # source, reference and edit


def test_a_still_picture_gives_a_picture(tmp_path, small_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image("in.jpg", moving_picture(1, 70, 102)[0])
    edit("in.jpg", "--weights", small_weights, "--steps", 1, "Make it night.")
    assert read_image("in_edited.png").shape == (64, 96, 3)


@pytest.fixture
def knowing_weights(tmp_path, small_weights):
    """Weights that were trained on one kind of clip, and know an example."""
    folder = Path(shutil.copytree(small_weights, tmp_path / "knowing"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trained": [5, 64, 64, 8], "steps": 1}))
    (folder / "example").mkdir()
    write_video(folder / "example/source.mp4", moving_picture(5, 64, 64), 8)
    write_image(folder / "example/reference.png", moving_picture(1, 50, 70)[0])
    (folder / "example/prompt.txt").write_text("Make it night.\n")
    return str(folder)


def test_alone_it_edits_the_example_of_its_weights(tmp_path, knowing_weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edit("--weights", knowing_weights)
    source, ref = read_clip("knowing/example/source.mp4").frames, read_image("knowing/example/reference.png")
    edited = KiwiEdit.from_pretrained(knowing_weights, dtype=torch.float32).edit(source, "Make it night.", ref, steps=1)
    assert read_clip("out.mp4").frames.shape == edited.shape == read_clip("out_compare.mp4").frames[:, ::4, ::12].shape
    beside = torch.cat([source[2], pad_reference(ref, (64, 64)), edited[2]], dim=1)
    assert torch.equal(read_image("out_compare.png")[::4, ::4], beside)
    assert "Make it night." in capsys.readouterr().out


def test_weights_that_know_one_kind_of_clip_edit_others_at_about_that_size_and_say_so(
    tmp_path, knowing_weights, capsys
):
    frames = moving_picture(20, 240, 300)
    for clip, rate, note in ((frames, 16, True), (frames[:5, :64, :64], 16, True), (frames[:5, :64, :64], 8, False)):
        write_video(tmp_path / "in.mp4", clip, rate)
        edit(tmp_path / "in.mp4", "x", "--weights", knowing_weights, "--steps", 1, "-o", tmp_path / "out.mp4")
        edited = read_clip(tmp_path / "out.mp4")
        assert edited.frames.shape[1:] == (64, 64, 3) and edited.fps == 8
        assert ("know 5 frames of 64x64 at 8 fps only" in capsys.readouterr().out) == note


@pytest.mark.skipif(not sample.DEFAULT_WEIGHTS.is_dir(), reason="needs weights/nano, which are not in this checkout")
def test_the_bundled_weights_edit_their_example(tmp_path):
    done = subprocess.run([sys.executable, str(HOUSE / "sample.py")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    source, edited = (
        read_clip(p).frames for p in (sample.DEFAULT_WEIGHTS / "example/source.mp4", tmp_path / "out.mp4")
    )
    assert source.shape == edited.shape and (source.int() - edited.int()).abs().float().mean() > 3
    assert sum(path.stat().st_size for path in sample.DEFAULT_WEIGHTS.rglob("*") if path.is_file()) <= 32e6


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    bad_media(folder := tmp_path_factory.mktemp("bad"))
    return folder


@pytest.mark.parametrize("case, says", [
    ([], "has no example"), (["whole.mp4"], "a clip and an instruction are needed"),
    (["whole.mp4", ""], "the instruction is empty"), (["whole.jpg", "caf\udce9"], "'utf-8' codec"),
    (["absent.mp4", "x"], "no such file"), (["half.mp4", "x"], "cannot be decoded"), (["..", "x"], "..: a folder"),
    (["sound.mp3", "x"], "no pictures"), (["dot.png", "x"], "too few"), (["drawing.svg", "x"], "no decoder"),
    (["whole.jpg", "x", "--ref", "half.jpg"], "half.jpg"), (["whole.jpg", "x", "--device", "cuda"], "not available"),
    (["whole.jpg", "x", "--weights", "nowhere"], "no such file or folder"),
    (["whole.jpg", "x", "--weights", "words.png"], "words.png: cannot be read"),
    (["whole.jpg", "x", "-o", "words.png/out.png"], "words.png"), (["whole.mp4", "x", "-o", "out.avi"], ".mp4"),
    (["whole.jpg", "x", "-o", "../{}/whole.jpg"], "would be replaced"),
    (["whole.jpg", "x", "--ref", "its_compare.png", "-o", "its.png", "--compare"], "its_compare.png: would be"),
    (["whole.jpg", "x", "--mask", "dot.png"], "give a mask of the input's size"),
    (["whole.jpg", "x", "--re-noise", "5,9"], "falling timesteps"), (["whole.jpg", "x", "--reuse", "-1"], "0 or more"),
    (["whole.jpg", "x", "--shift", "0"], "shift: 0.0"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_a_failure(bad, small_weights, case, says, monkeypatch):
    if "cuda" in case and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = sorted(bad.iterdir())
    monkeypatch.chdir(bad)
    weights = [] if "--weights" in case else ["--weights", str(small_weights)]
    device = [] if "--device" in case else ["--device", "cpu"]
    with pytest.raises(SystemExit) as exit_, command.one_line("sample.py"):
        sample.main([*(word.format(bad.name) for word in case), *weights, *device])
    assert says in exit_.value.code and "\n" not in exit_.value.code
    assert sorted(bad.iterdir()) == before


@pytest.mark.parametrize("flag, value", [("--seed", 2**64), ("--ref-guidance", -1), ("--steps", 0)])
def test_a_number_out_of_range_is_refused_while_parsing(capsys, flag, value):
    with pytest.raises(SystemExit):
        sample.parse_arguments(["in.mp4", "x", flag, str(value)])
    assert f"argument {flag}: expected a number from" in capsys.readouterr().err


def test_a_name_that_begins_with_a_dash_stands_behind_two():
    assert sample.parse_arguments(["--", "-dash.mp4", "x"]).input == "-dash.mp4"


def test_an_interrupted_run_leaves_no_file(tmp_path, small_weights):
    write_video(tmp_path / "in.mp4", moving_picture(9, 64, 64), 25)
    words = ["in.mp4", "x", "--weights", str(small_weights), "--steps", "100000"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it
    process = subprocess.Popen([sys.executable, str(HOUSE / "sample.py"), *words], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed)  # fmt: skip
    text = ""
    while "denoise" not in text:
        text += process.stderr.read(1) or pytest.fail(text)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0 and "interrupted" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_seed_steps_shift_guidance_and_sampler_reach_the_denoising(monkeypatch, tmp_path, small_weights):
    asked, image = [], str(tmp_path / "in.png")
    denoised = lambda self, noise, *rest: asked.append((noise[0, 0, 0, 0, 0].item(), *rest[3:5], *rest[7:9])) or noise
    monkeypatch.setattr(KiwiEdit, "denoise", denoised)
    write_image(image, moving_picture(1, 64, 64)[0])
    few = ("--solver", "ab2", "--reuse", "0.02"), ("--re-noise", "1000,757,522")
    plain = (), ("--shift", "3"), ("--steps", "7"), ("--seed", "1"), ("--ref-guidance", "2", "--ref", image)
    for flags in (*plain, *few):
        edit(image, "Make it snow.", "--weights", small_weights, "-o", tmp_path / "out.png", *flags)
    noise, steps, flows, guidance, samplers = zip(*asked)
    assert steps == (50, 50, 7, *[50] * 4) and [flow.shift for flow in flows] == [5, 3, *[5] * 5]
    assert guidance == (1, 1, 1, 1, 2, 1, 1) and noise[0] == noise[1] != noise[3]
    assert samplers == (*[Sampler()] * 5, Sampler("ab2", 0.02), Sampler(re_noise=(1000, 757, 522)))


def test_a_judge_s_edits_have_every_frame_of_the_file(tmp_path):
    write_video(tmp_path / "in.mp4", moving_picture(9, 64, 64), 16)
    config = replace(PRESETS["nano"], trained=(9, 64, 64, 8))
    assert [read_for(config, tmp_path / "in.mp4", every_frame=every).fps for every in (False, True)] == [8, 16]
