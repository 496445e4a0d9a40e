"""Tests of train.py"""

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import media
import parallel
import train
from conftest import (
    HOUSE,
    close,
    golden,
    manifest,
    moving_picture,
    randomise,
    save_training_layout,
    small_edit,
    small_model,
    tiny_dit,
    write_table,
)
from connectors import MLLMConfig
from data import Curriculum, Mixture, Pairs
from load import our_name, released_name, valid_checkpoints
from media import read_clip, write_image, write_video
from model import FlowMatch, KiwiConfig, KiwiEdit
from vae import VAEConfig


@pytest.fixture(scope="session")
def lesson(tmp_path_factory, qwen_folder):
    """A data set of some tiny pairs of every kind, and weights of a tiny model with two heads."""
    folder = tmp_path_factory.mktemp("lesson")
    tables = {"image.csv": [], "video.csv": [], "ref_video.csv": []}
    for name, rows in tables.items():
        for i in range(5):
            frames = moving_picture(1 if name == "image.csv" else 5 + 4 * (i % 2), 64, 64 + 32 * (i % 3 == 0))
            files = [f"{name[:-4]}_{i}_{part}.{'png' if len(frames) == 1 else 'mp4'}" for part in ("src", "tgt")]
            for file, pixels in zip(files, (frames, 255 - frames)):
                write_image(folder / file, pixels[0]) if len(frames) == 1 else write_video(folder / file, pixels, 8)
            write_image(folder / f"ref_{i}.png", frames[0, : 40 + 7 * i])
            rows.append([*files, f"Invert it, {i}.", *[f"ref_{i}.png"] * (name == "ref_video.csv")])
        write_table(folder / name, rows, ref=name == "ref_video.csv")
    torch.manual_seed(0)
    mllm = MLLMConfig(str(qwen_folder), 48, 4, 4, 4, max_ref_tokens=4, max_pixels=64 * 64)
    dit = tiny_dit(dim=48, ffn_dim=48, num_heads=2, in_dim=48, out_dim=48)
    model = KiwiEdit(KiwiConfig(dit, VAEConfig(dim=4, dec_dim=4, z_dim=48, num_res_blocks=1), mllm))
    randomise(model, 0.5).save(folder / "weights")
    return folder


SMALL = ["global_batch=4", "pixels=6144", "frames=9", "warmup=0", "lr=1e-3", "lora_rank=2"]


def lessons(lesson, out, *flags, stage=3, weights="weights", settings=()):
    """The command line of a small run."""
    words = ["--stage", stage, "--data", lesson, "--out", out, "--weights", lesson / weights, "--workers", 0, *flags]
    return [*map(str, words), "--set", *SMALL, *settings]


def losses(out, name="loss"):
    return [json.loads(line)[name] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same_course(out, expected, tol=1e-5):
    """Losses and gradient norms agree (AdamW would forgive gradients of a wrong scale)."""
    pairs = [[torch.tensor(losses(run, name)) for run in (out, expected)] for name in ("loss", "grad_norm")]
    return all(close(a, b, 10 * tol if i else tol) for i, (a, b) in enumerate(pairs))


def part_of(name):
    if ".lora_" in name:
        return "lora"
    if name.startswith("dit."):
        return "text_embedding" if ".text_embedding." in name else "dit"
    return ".".join(name.split(".")[: 2 if name.startswith("mllm.") else 1])


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_changes_exactly_the_parameters_that_the_stage_trains(tmp_path, lesson, preset, stage):
    args = train.parse_arguments(
        lessons(lesson, tmp_path, "--preset", preset, stage=stage, settings=["global_batch=6"])
    )
    chosen = train.choose_stage(args)
    ranks = train.Ranks(args.parallel, args.dtype, args.sp, args.dry_run)
    try:
        model = train.load_model(args, chosen, ranks, None)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first, and then A would have no gradient
                torch.nn.init.normal_(parameter)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = train.Trainer(args, chosen, ranks, model, *train.open_data(args, chosen, ranks))
        trainer.batches = iter(trainer.loader())
        assert trainer.step()["skipped"] == 0
    finally:
        ranks.leave()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"lora", "mllm.image_queries", "mllm.connector"}
    expected |= {"mllm.video_queries", "dit", "source_embedder"} if stage > 1 else set()
    expected |= {"mllm.ref_queries", "mllm.ref_connector", "ref_embedder"} if stage > 2 else set()
    assert changed == {name for name in before if part_of(name) in expected}


@golden
@pytest.mark.parametrize("config, stage", [("5b", 1), ("5b", 2), ("5b", 3), ("14b", 1), ("14b", 2)])
def test_what_a_stage_saves_has_exactly_the_released_names_and_shapes(tmp_path, real_qwen_folder, config, stage):
    name = f"wan2{'2_5b' if config == '5b' else '1_14b'}"
    args = train.parse_arguments(["--config", name, "--stage", str(stage), "--preset", "released", "--init", "random",
                                  "--qwen", str(real_qwen_folder), "--out", str(tmp_path), "--dry-run"])  # fmt: skip
    chosen = train.choose_stage(args)
    ranks = train.Ranks(args.parallel, args.dtype, args.sp, args.dry_run)
    try:
        with torch.device("meta"):
            model = train.load_model(args, chosen, ranks, None)
    finally:
        ranks.leave()
    saved = {released_name(n): tuple(p.shape) for n, p in model.named_parameters() if train.belongs(n, chosen)}
    assert saved == {n: tuple(t.shape) for n, t in manifest(f"trainable_{config}_stage{stage}").items()}
    assert all(our_name(released_name(n)) == n for n, _ in model.named_parameters())
    assert (model.mllm.config.max_pixels is None) == (config == "5b")  # so their scripts


def on_two_ranks(tmp_path, runs, first=""):
    """Trainings on the same two CPU processes, after some lines of Python."""
    (tmp_path / "all.py").write_text(f"import sys\nsys.path.insert(0, {str(HOUSE)!r})\nimport parallel, train\n{first}\n"
                                     f"parallel.dist.init_process_group('gloo')\nfor words in {runs!r}:\n    train.main(words)\n"
                                     "parallel.dist.destroy_process_group()\n")  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "all.py")]
    done = subprocess.run(
        torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
    )
    print(done.stderr[-3000:])
    return done


def test_ddp_fsdp_and_sequence_parallelism_give_the_losses_of_one_process_and_resume_on_another_number(
    tmp_path, lesson
):
    short, long = ["steps=3", "pixels=4096,6144"], ["steps=20", "pixels=4096,6144", "ema=0.9"]
    muon = [*short, "optimizer=muon"]
    odd = ["steps=3", "pixels=3072", "image=0"]  # a token a frame, three or four in a sequence: not for two to share
    train.main(lessons(lesson, tmp_path / "one", "--save-every", "13", settings=long))
    runs = [lessons(lesson, tmp_path / name, "--save-every", "13", *flags, settings=settings) for name, flags, settings in (
        ("ddp", [], long), ("fsdp", ["--parallel", "fsdp"], long), ("sp", ["--sp", "2"], short), ("odd", ["--sp", "2"], odd),
        ("matrices", ["--parallel", "fsdp"], muon),
        ("half", ["--sp", "2", "--parallel", "fsdp", "--dtype", "bfloat16"], short))]  # fmt: skip
    assert on_two_ranks(tmp_path, runs).returncode == 0
    train.main(lessons(lesson, tmp_path / "short", settings=short))
    train.main(lessons(lesson, tmp_path / "muon", settings=muon))
    train.main(lessons(lesson, tmp_path / "whole", settings=odd))
    assert same_course(tmp_path / "odd", tmp_path / "whole")
    assert len(losses(tmp_path / "fsdp")) == 20
    assert same_course(tmp_path / "matrices", tmp_path / "muon") and losses(tmp_path / "muon") != losses(
        tmp_path / "short"
    )
    assert same_course(tmp_path / "ddp", tmp_path / "one") and same_course(tmp_path / "fsdp", tmp_path / "one")
    assert same_course(tmp_path / "sp", tmp_path / "short") and same_course(tmp_path / "half", tmp_path / "short", 3e-2)
    shutil.rmtree(tmp_path / "fsdp" / "step-000020")
    train.main(lessons(lesson, tmp_path / "fsdp", "--resume", "auto", settings=long))  # 7 more steps on one process
    assert same_course(tmp_path / "fsdp", tmp_path / "one")
    for name in ("weights", "ema"):
        a, b = (load_file(tmp_path / run / "step-000020" / f"{name}.safetensors") for run in ("one", "fsdp"))
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_sharded_ranks_do_not_wait_for_ever_where_one_kind_of_data_trains_what_another_has_not(tmp_path, lesson):
    kinds = ["steps=2", "batch=2"]  # a batch a rank, of which one is an image, the other a clip
    runs = [
        (1, [*kinds, "video=1"]),
        (3, [*kinds, "trains=ref_embedder", "video=0"]),
        (3, [*kinds, "model.source=add_learned", "optimizer=muon"]),
    ]
    words = [[lessons(lesson, tmp_path / f"{name}{i}", *flags, stage=stage, settings=settings) for i, (stage, settings) in enumerate(runs)]
             for name, flags in (("one", []), ("two", ["--parallel", "fsdp"]))]  # fmt: skip
    for run in words[0]:
        train.main(run)
    assert on_two_ranks(tmp_path, words[1]).returncode == 0
    assert all(same_course(tmp_path / f"two{i}", tmp_path / f"one{i}", 1e-4) for i in range(len(runs)))


def test_a_sample_that_one_rank_cannot_read_is_left_out_by_all_and_a_dry_run_of_two_ranks_says_it_once(
    tmp_path, lesson
):
    lost = """
def read_pair(row, shape, read=train.read_pair):
    if parallel.dist.get_rank() and row.target.endswith(".png"):
        raise train.MediaError("is not here")
    return read(row, shape)
train.read_pair = read_pair"""
    more = (["--dry-run"], ["--sample-every", "1", "--sample-steps", "1"])
    done = on_two_ranks(
        tmp_path,
        [lessons(lesson, tmp_path / "run", "--parallel", "fsdp", *flags, settings=["steps=1"]) for flags in more],
        lost,
    )
    assert (
        done.returncode == 0
        and "no sample of image: is not here" in done.stderr
        and done.stdout.count("one update: ") == 1
    )
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == [
        "step-000001-ref.mp4",
        "step-000001-video.mp4",
    ]


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(tmp_path, lesson):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command, run = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run")], tmp_path / "run"
    ranks = [
        subprocess.Popen(command, env=both | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.DEVNULL) for r in "01"
    ]
    try:
        while not (run / "metrics.jsonl").exists() or len(losses_so_far(run)) < 2:
            time.sleep(0.02)
            assert [rank.poll() for rank in ranks] == [None, None]
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(300) for rank in ranks] == [0, 0]
        assert train.valid_checkpoints(run)[-1].name == f"step-{len(losses(run)):06d}"
    finally:
        for rank in ranks:
            rank.kill()


def test_a_run_killed_at_any_point_goes_on_to_the_same_weights_bit_for_bit(tmp_path, lesson):
    settings = ["steps=7", "pixels=4096,6144", "optimizer=muon"]  # which has AdamW beside it
    train.main(lessons(lesson, tmp_path / "whole", settings=settings))
    dice, kills, out = random.Random(0), 0, tmp_path / "killed"
    while True:
        flags = ["--resume", "auto", "--save-every", "1", "--workers", kills % 3]
        command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, out, *flags, settings=settings)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        before = len(losses(out)) if (out / "metrics.jsonl").exists() else 0
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(losses_so_far(out)) > before):
            time.sleep(0.01)
        time.sleep(dice.random() * 0.3)
        if process.poll() is not None or kills == 3:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait(100) == 0, process.stderr.read()
    assert kills and losses(out) == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match="was trained by muon: add --set optimizer=muon"):
        train.main(lessons(lesson, out, "--resume", "auto", settings=settings[:2]))
    a, b = (load_file(run / "step-000007" / "weights.safetensors") for run in (tmp_path / "whole", out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in out.iterdir() if "step" in p.name) == ["step-000005", "step-000006", "step-000007"]


def losses_so_far(out):
    return [line for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_a_signal_saves_the_last_whole_step_and_exits_with_success(tmp_path, lesson):
    command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run", "--workers", "1")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses_so_far(tmp_path / "run")) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # the workers too, as torchrun does
    assert process.wait(60) == 0
    steps = len(losses(tmp_path / "run"))
    assert f"SIGTERM: step {steps} of" in process.stdout.read()
    assert (tmp_path / "run" / f"step-{steps:06d}" / "train.json").is_file()


def test_each_stage_starts_from_the_one_before_and_its_checkpoint_edits(tmp_path, lesson):
    for stage in (1, 2, 3):
        before = f"{tmp_path}/{stage - 1}" if stage > 1 else lesson / "weights"
        train.main(lessons(lesson, tmp_path / str(stage), "--weights", before, stage=stage, settings=["steps=1"]))
    checkpoint = tmp_path / "3" / "step-000001" / "weights.safetensors"
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=lesson / "weights")
    assert small_edit(model).shape == (6, 32, 64, 3)
    first, last = (load_file(tmp_path / stage / "step-000001" / "weights.safetensors") for stage in "13")
    name = "mllm.model.model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert first[name].any() and not torch.equal(first[name], last[name]) and first.keys() < last.keys()


@pytest.mark.parametrize("how", ["add_learned", "add_unscaled", "add_shared_patch_embed", "channel_concat"])
def test_every_ablation_of_the_source_trains_from_the_same_weights(tmp_path, lesson, how):
    train.main(
        lessons(lesson, tmp_path / "run", stage=2, settings=["steps=1", f"model.source={how}", "mllm.context=queries"])
    )
    trained = load_file(tmp_path / "run" / "step-000001" / "weights.safetensors")
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    with pytest.raises(ValueError, match="not a nanoKiwi folder"):
        train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "run")])
    assert small_edit(KiwiEdit.from_pretrained(tmp_path / "model", dtype=torch.float32), ref=False).shape == (
        6,
        32,
        64,
        3,
    )
    with pytest.raises(ValueError, match="needs them as they are"):
        train.main(["--export", str(tmp_path / "run"), "--out", str(lesson / "weights")])
    assert ("vae_condition.learned.weight" in trained) == (how == "add_learned")
    train.main(lessons(lesson, tmp_path / "next", "--weights", tmp_path / "run", settings=["steps=1"]))
    saved = tmp_path / "run/step-000001/weights.safetensors"
    over = KiwiEdit.from_pretrained(saved, dtype=torch.float32, base=lesson / "weights")
    assert (over.config.source, over.config.mllm.context) == (how, "queries"), "the checkpoint edits as it is"
    for path in (saved, saved.parent, tmp_path / "run"):
        same = KiwiEdit.from_pretrained(path, dtype=torch.float32)
        assert same.config == over.config
        assert all(torch.equal(a, b) for a, b in zip(same.parameters(), over.parameters())), (
            "it lies over what it began with"
        )
    config = json.loads((tmp_path / "next" / "config.json").read_text())["model"]
    assert (config["source"], config["mllm"]["context"]) == (how, "queries"), (
        "the next stage goes on with the same model"
    )


@pytest.mark.parametrize("how", ["add_learned", "channel_concat"])
def test_a_run_that_does_not_train_what_its_source_needs_edits_as_its_export(tmp_path, lesson, how):
    train.main(lessons(lesson, tmp_path / "run", stage=1, settings=["steps=1", f"model.source={how}"]))
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    run, model = (KiwiEdit.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("run", "model"))
    assert torch.equal(small_edit(run, ref=False), small_edit(model, ref=False))


def test_a_released_training_checkpoint_goes_on_training(tmp_path, lesson, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path, stage=2)
    flags = ["--weights", checkpoint, "--base", tmp_path / "wan", "--qwen", tmp_path / "qwen", "--config", "nano"]
    train.main(lessons(lesson, tmp_path / "run", *flags, settings=["steps=1"]))
    trained, before = load_file(tmp_path / "run" / "step-000001" / "weights.safetensors"), load_file(checkpoint)
    assert before.keys() < trained.keys()  # references are new
    assert all((trained[k] - before[k]).abs().max() < 0.01 for k in before)
    model = KiwiEdit.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert len(model.mllm.ref_queries) and not model.dit.patch_embedding.weight.is_meta
    (tmp_path / "wan").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="began with .*give --base or --qwen"):
        KiwiEdit.from_pretrained(tmp_path / "run")
    moved = ["--base", str(tmp_path / "moved"), "--qwen", str(tmp_path / "qwen")]
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "whole"), *moved])


def test_what_a_run_began_with_is_found_from_any_folder(tmp_path, lesson, monkeypatch):
    monkeypatch.chdir(lesson.parent)
    begun = lesson.relative_to(lesson.parent) / "weights"
    (tmp_path / "elsewhere" / "disk").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere" / "disk")
    settings = ["steps=1", "model.steps=3", "dit.bf16_timesteps=true"]
    train.main(lessons(lesson, tmp_path / "runs" / "1", "--weights", begun, settings=settings))
    monkeypatch.chdir(tmp_path)
    config = KiwiEdit.from_pretrained(tmp_path / "runs" / "1").config
    assert config.steps == 3 and config.dit.bf16_timesteps


def test_training_from_a_cache_gives_the_same_losses_and_opens_no_file(tmp_path, lesson, monkeypatch):
    settings = ["steps=3", "ref_shrink=1"]
    train.main(lessons(lesson, tmp_path / "plain", settings=settings))
    train.main(lessons(lesson, tmp_path / "plain1", stage=1, settings=["steps=1"]))  # which shows no source
    train.main(lessons(lesson, tmp_path / "cache", "--write-cache", tmp_path / "cache", settings=settings))
    monkeypatch.setattr(train, "measure_rows", None)
    train.main(lessons(lesson, tmp_path / "run", "--cache", tmp_path / "cache", settings=settings))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    for stage in (1, 2):
        train.main(
            lessons(lesson, tmp_path / f"part{stage}", "--cache", tmp_path / "cache", stage=stage, settings=["steps=1"])
        )
    assert losses(tmp_path / "part1") == losses(tmp_path / "plain1")
    for other in ("frames=5", "mllm.max_frames=2", "ref_shrink=0.5"):
        with pytest.raises(ValueError, match="written for other tables, pixels, frames, weights or settings"):
            train.main(
                lessons(
                    lesson,
                    tmp_path / "other",
                    "--cache",
                    tmp_path / "cache",
                    settings=["steps=1", "ref_shrink=1", other],
                )
            )
    monkeypatch.undo()
    with pytest.raises(ValueError, match="begun with other rows"):
        train.main(
            lessons(lesson, tmp_path / "cache", "--write-cache", tmp_path / "cache", settings=["ref_shrink=0.5"])
        )


def test_a_cache_is_refused_where_a_row_before_its_rows_is_gone(tmp_path, lesson):
    mine = Path(shutil.copytree(lesson, tmp_path / "mine", ignore=shutil.ignore_patterns("weights")))
    header, *rows = (mine / "image.csv").read_text().splitlines()
    (mine / "broken.png").write_text("none")
    (mine / "image.csv").write_text(
        "\n".join([header, rows[1], "broken.png,broken.png,Which is in no cache.", rows[2], rows[4]])
    )
    words = lessons(lesson, tmp_path / "c", "--data", mine, "--max-bad", 50, settings=["steps=1", "video=0", "ref=0"])
    train.main([*words, "--write-cache", str(tmp_path / "c")])
    (mine / "image.csv").write_text(
        "\n".join([header, rows[1], rows[2], rows[4]])
    )  # the last would get the second's latents
    with pytest.raises(ValueError, match="was written for other tables"):
        train.main([*words, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "c")])


def test_several_folders_are_trained_as_one(tmp_path, lesson):
    for half, rows in (("a", slice(1, 4)), ("b", slice(4, None))):
        (tmp_path / half).mkdir()
        for table in lesson.glob("*.csv"):
            head, *lines = table.read_text().splitlines()
            (tmp_path / half / table.name).write_text("\n".join([head, *[head, *lines][rows]]))
    train.main(lessons(lesson, tmp_path / "one", settings=["steps=2"]))
    halves = ["--data", tmp_path / "a", tmp_path / "b", "--base-path", lesson]
    train.main(lessons(lesson, tmp_path / "two", *halves, settings=["steps=2"]))
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    (tmp_path / "b" / "image.csv").unlink()
    with pytest.raises(FileNotFoundError, match="b: has no image.csv"):
        train.main(
            lessons(lesson, tmp_path / "none", "--data", tmp_path / "b", "--base-path", lesson, settings=["steps=2"])
        )


def test_broken_samples_are_logged_and_too_many_stop_the_run(tmp_path, lesson):
    for file in lesson.glob("*.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "video_1_tgt.mp4").write_bytes((tmp_path / "video_1_tgt.mp4").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"1 of 5 video rows cannot be read \(--max-bad 5\).*video_1_tgt"):
        train.main(lessons(lesson, tmp_path / "run", "--data", tmp_path))
    train.main(lessons(lesson, tmp_path / "run2", "--data", tmp_path, "--max-bad", "30", settings=["steps=2"]))
    line = json.loads((tmp_path / "run2" / "bad.jsonl").read_text())
    assert line["path"].endswith("video_1_tgt.mp4") and "cannot be decoded" in line["reason"]


def test_noise_and_timestep_depend_on_the_seed_and_the_sample_and_on_nothing_else():
    taken = {}
    for seed in (0, 1):
        for number in (0, 1, 2**33):
            torch.manual_seed(number)
            generator, t, chance = train.draw(seed, number, FlowMatch(), rounded=False)
            taken[seed, number] = (t.item(), chance, torch.randn(3, generator=generator).tolist())
    again = train.draw(1, 2**33, FlowMatch(), rounded=False)
    assert taken[1, 2**33] == (again[1].item(), again[2], torch.randn(3, generator=again[0]).tolist())
    for a, b in zip(taken.values(), list(taken.values())[1:]):
        assert a[0] != b[0] and a[1] != b[1] and a[2] != b[2]


def test_the_learning_rate_rises_and_falls_as_its_schedule_says():
    stage = replace(train.STAGES["paper"][1], lr=2.0, warmup=2, steps=12)
    for schedule, end in (("constant", [2, 2, 2]), ("linear", [2, 1, 0.2]), ("cosine", [2, 1, 1 - np.cos(np.pi / 10)])):
        rates = [train.learning_rate(replace(stage, schedule=schedule), step) for step in (0, 1, 2, 7, 11)]
        assert rates == pytest.approx([1, 2, *end])


def test_every_number_of_a_stage_changes_what_is_learned(tmp_path, lesson):
    def learned(name, *more):
        train.main(lessons(lesson, tmp_path / name, settings=["steps=3", *more]))
        return load_file(tmp_path / name / "step-000003/weights.safetensors")

    plain = learned("plain")
    for number in ("warmup=9", "schedule=linear", "clip=1e-9", "shift=20", "beta2=0.5", "weight_decay=0.5", "ref_shrink=0.3",
                   "weighting=none", "balance=true"):  # fmt: skip
        other = learned(number, number)
        assert any(not torch.equal(plain[k], other[k]) for k in plain), number


def test_a_stage_says_that_the_lora_of_its_weights_keeps_its_rank(tmp_path, lesson, capsys):
    for stage, weights, settings in ((1, lesson / "weights", []), (2, tmp_path / "1", ["lora_rank=4"])):
        assert "LoRA" not in capsys.readouterr().err
        train.main(
            lessons(lesson, tmp_path / str(stage), "--weights", weights, stage=stage, settings=["steps=1", *settings])
        )
    assert "have LoRA of rank 2, which goes on: lora_rank=4" in capsys.readouterr().err


def test_a_run_that_goes_on_with_another_loss_says_so(tmp_path, lesson, capsys):
    train.main(lessons(lesson, tmp_path / "run", settings=["steps=1"]))
    written = tmp_path / "run" / "step-000001" / "train.json"
    saved = json.loads(written.read_text())
    del saved["stage"]["balance"]  # as before there was such a setting
    written.write_text(json.dumps(saved))
    train.main(lessons(lesson, tmp_path / "run", "--resume", "auto", settings=["steps=2", "balance=true"]))
    assert "balance False -> True" in capsys.readouterr().err


def test_each_size_of_a_stage_has_its_share_of_the_steps():
    small, large = (Mixture({"image": {(1, n, n): [0, 1]}}, {"image": 1}, 2, seed=0) for n in (64, 96))
    both = Curriculum([(0, small), (6, large)])
    assert [both[n][2][1] for n in range(12)] == [64] * 6 + [96] * 6 and both[7][1:] == large[1]


def test_averaged_weights_are_what_their_decay_says(tmp_path, lesson):
    train.main(lessons(lesson, tmp_path / "run", "--save-every", "1", settings=["steps=3", "ema=0.75"]))
    file = lambda step, name: load_file(tmp_path / f"run/step-{step:06d}/{name}.safetensors")
    before, ema, weights = file(2, "ema"), file(3, "ema"), file(3, "weights")
    assert all(torch.allclose(ema[k], 0.75 * before[k] + 0.25 * weights[k], atol=1e-6) for k in ema)
    assert any(not torch.equal(ema[k], weights[k]) for k in ema)
    train.main(["--export", str(tmp_path / "run/step-000003/ema.safetensors"), "--out", str(tmp_path / "average")])
    head = load_file(tmp_path / "average/dit.safetensors")["dit.head.head.weight"]
    assert torch.equal(head, ema["dit.head.head.weight"]), "the file given is what is exported"


def test_another_run_goes_on_from_a_checkpoint_given_by_its_path(tmp_path, lesson):
    KiwiEdit.from_pretrained(lesson / "weights").save(tmp_path / "half")  # bfloat16, from which float32 goes on
    train.main(
        lessons(lesson, tmp_path / "a", "--weights", tmp_path / "half", "--save-every", "1", settings=["steps=2"])
    )
    resume = ["--weights", tmp_path / "half", "--resume", tmp_path / "a/step-000001"]
    train.main(lessons(lesson, tmp_path / "b", *resume, settings=["steps=2"]))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[1:]
    with pytest.raises(ValueError, match="later checkpoints"):
        train.main(lessons(lesson, tmp_path / "a", *resume, settings=["steps=2"]))


def test_a_run_is_never_what_it_began_with_itself(tmp_path, lesson):
    train.main(lessons(lesson, tmp_path / "run", "--save-every", "1", settings=["steps=1"]))
    for own in ("run", "run/step-000001", "run/step-000001/weights.safetensors"):
        with pytest.raises(ValueError, match="is --out itself; give what this run began with"):
            train.main(
                lessons(lesson, tmp_path / "run", "--weights", tmp_path / own, "--resume", "auto", settings=["steps=2"])
            )
    assert small_edit(KiwiEdit.from_pretrained(tmp_path / "run", dtype=torch.float32)).shape == (6, 32, 64, 3)


def test_checkpoints_are_in_the_order_of_their_steps_and_a_renamed_one_stays(tmp_path, lesson):
    words = lessons(lesson, tmp_path, "--resume", "auto", "--save-every", "1", "--keep", "1")
    train.main([*words, "steps=1"])
    (tmp_path / "step-000001").rename(tmp_path / "step-000001-good")
    train.main([*words, "steps=2"])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001-good", "step-000002"]
    for name in ("step-999999", "step-1000000"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    assert [p.name for p in valid_checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_a_shape_of_two_phases_has_the_rows_of_both_in_a_cache():
    small, large = (
        Mixture({"image": {(1, 64, 64): numbers}}, {"image": 1}, 2, seed=0) for numbers in ([0, 2, 130], [2])
    )
    assert train.rows_of_shapes(Curriculum([(0, large), (6, small)])) == {("image", (1, 64, 64)): [0, 2, 130]}


def test_a_row_of_a_cache_is_its_own(tmp_path):
    save_file(
        {"1.target": torch.ones(1), "10.target": torch.zeros(1)}, data.shard_path(tmp_path, "image", (1, 64, 64), 0)
    )
    assert data.read_shard(tmp_path, "image", (1, 64, 64), 0, 1)["target"] == 1


def test_a_folder_is_whole_or_as_it_was(tmp_path, monkeypatch):
    for word in ("old", "new"):
        with media.whole_folder(tmp_path / "w") as temporary:
            (temporary / "x").write_text(word)
    with pytest.raises(KeyboardInterrupt), media.whole_folder(tmp_path / "w"):
        raise KeyboardInterrupt
    assert (tmp_path / "w/x").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["w"]
    moved, rename = [], os.replace

    def interrupted(a, b):
        moved.append(a)
        if len(moved) == 2:  # the old folder is aside, the new one not yet in its place
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), media.whole_folder(tmp_path / "w"):
        pass
    assert (tmp_path / "w/x").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["w"]


def test_after_an_error_no_worker_waits_and_the_last_checkpoint_is_whole(tmp_path, lesson, monkeypatch):
    save, loss = train.save_file, train.Trainer.loss

    def slowly(*tensors):
        time.sleep(1)
        save(*tensors)

    def no_memory(trainer, batch):
        if trainer.counts["step"] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(trainer, batch)

    monkeypatch.setattr(train, "save_file", slowly)
    monkeypatch.setattr(train.Trainer, "loss", no_memory)
    with pytest.raises(torch.OutOfMemoryError) as error:
        train.main(lessons(lesson, tmp_path, "--workers", 2, "--save-every", 1, settings=["steps=2"]))
    assert multiprocessing.active_children() == [] and error.tb  # which keeps the loader
    assert [path.name for path in valid_checkpoints(tmp_path)] == ["step-000001"] and not list(tmp_path.glob(".step-*"))


def test_a_checkpoint_of_another_stage_or_that_is_damaged_is_not_resumed_from_and_other_rows_are_told_of(
    tmp_path, lesson, capsys
):
    mine = Path(shutil.copytree(lesson, tmp_path / "mine", ignore=shutil.ignore_patterns("weights")))
    train.main(lessons(lesson, tmp_path / "run", "--data", mine, stage=1, settings=["steps=1"]))
    table = mine / "image.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    again = ["--data", mine, "--resume", "auto"]
    train.main(lessons(lesson, tmp_path / "run", *again, stage=1, settings=["steps=2"]))
    assert "the image rows, whose order begins anew" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trains other parts: a next stage begins with --weights"):
        train.main(lessons(lesson, tmp_path / "run", *again, stage=2, settings=["steps=3"]))
    state = next((tmp_path / "run" / "step-000002" / "state").glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000002/state: cannot be read"):
        train.main(lessons(lesson, tmp_path / "run", *again, stage=1, settings=["steps=3"]))


def test_a_base_path_is_of_the_tables_named_where_some_are(tmp_path, lesson):
    shutil.copy(lesson / "ref_video.csv", tmp_path / "curated.csv")
    named = ["--ref-csv", tmp_path / "curated.csv", "--base-path", lesson]
    train.main(lessons(lesson, tmp_path / "named", *named, settings=["steps=1"]))
    train.main(lessons(lesson, tmp_path / "plain", settings=["steps=1"]))
    assert losses(tmp_path / "named") == losses(tmp_path / "plain")


def test_a_diverged_run_skips_steps_and_stops_with_the_sample(tmp_path, lesson, capsys):
    with pytest.raises(ValueError, match=r"5 steps in a row were skipped.*_tgt\.(png|mp4)"):
        train.main(lessons(lesson, tmp_path / "run", settings=["lr=1e30", "weight_decay=0"]))
    assert "skipped: its gradient is" in capsys.readouterr().err


def test_a_limit_of_pixels_is_a_number_or_none():
    for value, pixels in (("none", None), ("9000", 9000)):
        for config in (MLLMConfig("qwen"), MLLMConfig("qwen", max_pixels=None)):
            assert train.with_settings(config, [f"max_pixels={value}"]).max_pixels == pixels
    with pytest.raises(ValueError, match="max_pixels=lots: 'lots' is not of the kind"):
        train.with_settings(MLLMConfig("qwen"), ["max_pixels=lots"])


@pytest.mark.parametrize("words, says", [
    (["--set", "speed=2"], "Stage has no 'speed'; it has"), (["--set", "steps=many"], "not of the kind"),
    (["--set", "weighting=no"], "Stage.weighting: 'no', expected bell or none"),
    (["--set", "schedule=never"], "expected constant, cosine or linear"), (["--sp", "2"], "does not divide the 1 processes"),
    (["--weights", "nowhere"], "no such file or folder"), (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--dtype", "bfloat16", "--parallel", "ddp"], "take --parallel fsdp"), (["--set", "batch=3"], "not a multiple of batch"),
    (["--resume", "nowhere"], "not a checkpoint folder"), (["--set", "paint.dim=3"], "there are model, dit, vae, mllm"),
    (["--set", "ema=1.5"], "Stage.ema: 1.5"), (["--set", "image=-1"], "shares of at least 0"),
    (["--set", "trains=lora,dti"], "the model has no 'dti'"), (["--set", "lora_targets=q_proj,key"], "no linear layer 'key'"),
    (["--init", "random"], "leave out --weights"), (["--weights", __file__], "cannot be read"),
    (["--set", "pixels=0"], "Stage.pixels: 0"), (["--set", "clip=-1"], "Stage.clip: -1"),
    (["--set", "ref_shrink=1.5"], "Stage.ref_shrink: 1.5"), (["--set", "lora_rank=0"], "Stage.lora_rank: 0"),
])  # fmt: skip
def test_a_bad_request_to_train_is_one_clear_line(tmp_path, lesson, monkeypatch, words, says):
    plain = lessons(lesson, tmp_path / "run", settings=words[1:] if words[0] == "--set" else [])
    plain[plain.index("--set") : plain.index("--set")] = [] if words[0] == "--set" else words
    monkeypatch.setattr(sys, "argv", ["train.py", *plain])
    with pytest.raises(SystemExit) as exit_:
        train.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code and not parallel.dist.is_initialized()


def test_a_setting_that_had_no_value_takes_a_number_or_several():
    mllm, model = (train.with_settings(config, [text]) for config, text in (
        (MLLMConfig("x", max_pixels=None), "max_pixels=262144"), (KiwiConfig(), "trained=9,64,64,8")))  # fmt: skip
    assert mllm.max_pixels == 262144 and model.trained == (9, 64, 64, 8)
    assert train.cast("0.5,1", ()) == (0.5, 1)
    with pytest.raises(ValueError, match="max_pixels=many: 'many' is not of the kind of None"):
        train.with_settings(MLLMConfig("x", max_pixels=None), ["max_pixels=many"])


@pytest.mark.parametrize(
    "flag, least", [("--max-bad", 0), ("--workers", 0), ("--sample-steps", 1), ("--sample-every", 0), ("--keep", 1)]
)
def test_a_number_too_small_is_refused_before_anything_is_read(capsys, flag, least):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--stage", "1", flag, str(least - 1)])
    assert f"{flag} {least - 1}" in capsys.readouterr().err and train.parse_arguments(
        ["--stage", "1", flag, str(least)]
    )


@pytest.mark.parametrize("error, says", [
    (KeyboardInterrupt(), "train.py: interrupted"), (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --workers"),
])  # fmt: skip
def test_an_interrupt_before_the_first_step_and_a_lost_worker_are_one_line(monkeypatch, error, says):
    def fails():
        raise error

    monkeypatch.setattr(train, "main", fails)
    with pytest.raises(SystemExit) as exit_:
        train.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code.strip()


def test_nano_starts_from_nothing_but_no_run_is_written_over(tmp_path, lesson, capsys, monkeypatch):
    monkeypatch.setattr(train, "NANO", tmp_path / "none")
    words = ["--config", "nano", "--stage", 1, "--data", lesson, "--out", tmp_path / "run", "--set", *SMALL, "steps=1"]
    train.main([str(word) for word in words])
    assert "random weights" in capsys.readouterr().err and (tmp_path / "run/init").is_dir()
    with pytest.raises(ValueError, match="give --resume auto to continue"):
        train.main([str(word) for word in words])
    train.main([*map(str, words), "--set", "steps=2", "--resume", "auto"])
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "whole")])
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "whole/config.json").is_file()


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_checkpoint(tmp_path, lesson):
    command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run", settings=["steps=2"])]
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; {shlex.join(command)}"], capture_output=True, text=True)
    assert done.returncode != 0 and "the checkpoint cannot be written" in done.stderr.splitlines()[-1]
    assert train.valid_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_dry_run_writes_nothing_and_a_plot_shows_the_losses(tmp_path, lesson, capsys, parallel):
    train.main(lessons(lesson, tmp_path / "run", "--dry-run"))
    said = capsys.readouterr().out
    assert "M trained" in said and "frames of 64x64" in said and "GiB" in said and not (tmp_path / "run").exists()
    flags = ["--sample-every", "2", "--sample-steps", "1", "--parallel", parallel]
    train.main(lessons(lesson, tmp_path / "run", *flags, settings=["steps=2"]))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    train.main(["--plot", str(tmp_path / "run")])
    assert "<polyline" in (tmp_path / "run" / "loss.svg").read_text()
    assert read_clip(tmp_path / "run" / "samples" / "step-000002-ref.mp4").frames.shape[2] == 3 * 96


def test_the_help_of_the_other_commands_answers_without_torch():
    for name in ("train.py", "data.py", "curate.py", "judge.py", "nano"):
        runner = "runpy.run_path" if name.endswith(".py") else "runpy.run_module"
        probe = f"import runpy, sys; sys.argv = [{name!r}, '--help']\ntry: {runner}({name!r}, run_name='__main__')\n"
        probe += "except SystemExit: assert not {'torch', 'av', 'transformers', 'numpy'} & sys.modules.keys()"
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=HOUSE)
        assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


def test_the_paper_s_numbers_are_the_defaults():
    told = {
        1: ({"image": 1, "video": 0, "ref": 0}, 30_000),
        2: ({"image": 1, "video": 1, "ref": 0}, 10_000),
        3: ({"image": 2, "video": 1, "ref": 1}, 10_000),
    }
    for number, stage in train.STAGES["paper"].items():  # FACTS.md, "Training"
        assert (stage.ratio, stage.steps) == told[number] and stage.source == (number > 1)
        assert (stage.global_batch, stage.lr, stage.optimizer, stage.lora_rank, stage.shift) == (
            128,
            2e-5,
            "adamw",
            64,
            5.0,
        )
    assert [stage.lr for stage in train.STAGES["released"].values()] == [1e-5, 1e-5, 5e-6]


def test_timesteps_are_drawn_over_the_whole_schedule_and_rounded_where_weights_see_them_so():
    draws = torch.tensor([train.draw(0, number, FlowMatch(), False)[1].item() for number in range(2000)])
    assert len(draws.unique()) > 800 and abs((draws < FlowMatch().timesteps(1000)[500]).float().mean() - 0.5) < 0.05
    rounded = torch.stack([train.draw(0, number, FlowMatch(), True)[1] for number in range(50)])
    assert torch.equal(rounded, rounded.bfloat16().float())


@contextmanager
def trainer_of(lesson, out, *settings):
    args = train.parse_arguments(lessons(lesson, out, settings=settings))
    stage, ranks = train.choose_stage(args), train.Ranks(args.parallel, args.dtype, args.sp, args.dry_run)
    try:
        model = train.load_model(args, stage, ranks, None)
        yield train.Trainer(args, stage, ranks, model, *train.open_data(args, stage, ranks))
    finally:
        ranks.leave()


def test_a_batch_has_the_mean_loss_of_its_items_each_with_its_own_words(tmp_path, lesson):
    per_item = ("numbers", "prompts", "paths", "pictures", "visuals")
    with trainer_of(lesson, tmp_path, "batch=2", "ref=0", "ref_shrink=1") as trainer:
        batch = next(iter(trainer.loader())) | {"prompts": ["Invert it.", "Make it snow."]}
        singles = [{k: v[i : i + 1] if k in per_item else v for k, v in batch.items()} for i in range(2)]
        whole, *parts = (trainer.loss(each)[0].detach() for each in (batch, *singles))
    assert close(whole, torch.stack(parts).mean(), 1e-5) and abs(parts[0] - parts[1]) > 1e-3 * whole


def test_phases_begin_and_samples_are_numbered_by_batches_and_items(tmp_path, lesson):
    with trainer_of(lesson, tmp_path, "steps=20", "pixels=4096,6144", "batch=2") as trainer:
        pairs = Pairs(trainer.tables, trainer.curriculum, lambda source, row: None)
        assert [start for start, _ in trainer.curriculum.phases] == [0, 10 * trainer.stage.batches]
        assert pairs[0]["numbers"] + pairs[1]["numbers"] == [0, 1, 2, 3]


def test_a_batch_of_two_is_estimated_to_need_twice_the_activations_of_one(tmp_path, lesson):
    with trainer_of(lesson, tmp_path) as trainer:
        stages = [replace(trainer.stage, batch=size) for size in (1, 2)]
        one, two = (
            train.activation_numbers(trainer.model, stage, trainer.ranks, (9, 64, 64), True) for stage in stages
        )
    assert two == 2 * one


def test_muon_takes_matrices_of_the_blocks_and_adamw_the_rest():
    shapes = {
        "dit.blocks.0.ffn.0.weight": (4, 3),
        "mllm.ref_queries": (4, 3),
        "dit.blocks.0.modulation": (1, 6, 3),
        "source_embedder.learned.weight": (1, 3),
    }
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    stage = replace(train.STAGES["paper"][3], optimizer="muon")
    muon, adamw = train.make_optimizers(stage, trained)
    assert [len(o.param_groups[0]["params"]) for o in (muon, adamw)] == [1, 3] and adamw.defaults["betas"] == (
        0.9,
        0.999,
    )
    trained["dit.blocks.0.ffn.0.weight"].device_mesh = SimpleNamespace(size=lambda: 8)
    with pytest.raises(ValueError, match="has 4 rows for 8 ranks"):
        train.make_optimizers(stage, trained)
