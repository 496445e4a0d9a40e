"""Tests of train.py"""

import fcntl
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import command
import media
import parallel
import stages
import start
import train
from conftest import (
    HOUSE,
    SMALL,
    begun,
    close,
    go,
    golden,
    lessons,
    losses,
    manifest,
    save_training_layout,
    small_edit,
    small_model,
    steps_of,
    trainer_of,
)
from connectors import MLLMConfig
from data import Pairs
from load import our_name, released_name, valid_checkpoints
from media import read_clip
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit


@golden
@pytest.mark.parametrize("config, stage", [("5b", 1), ("5b", 2), ("5b", 3), ("14b", 1), ("14b", 2)])
def test_what_a_stage_saves_has_exactly_the_released_names_and_shapes(real_qwen_folder, config, stage):
    name = f"wan2{'2_5b' if config == '5b' else '1_14b'}"
    args = train.parse_arguments(["--config", name, "--stage", str(stage), "--preset", "released"])
    chosen, preset = train.choose_stage(args), PRESETS[name]
    preset = replace(preset, mllm=replace(preset.mllm, folder=str(real_qwen_folder)))
    with torch.device("meta"):
        model = KiwiEdit(start.config_of(args, preset))
        start.choose_trained(model, chosen, None)
    saved = {released_name(n): tuple(p.shape) for n, p in model.named_parameters() if train.belongs(n, chosen)}
    assert saved == {n: tuple(t.shape) for n, t in manifest(f"trainable_{config}_stage{stage}").items()}
    assert all(our_name(released_name(n)) == n for n, _ in model.named_parameters())
    assert (model.mllm.config.max_pixels is None) == (config == "5b")  # so their scripts


def test_a_signal_saves_the_last_whole_step_and_exits_with_success(tmp_path, lesson):
    process = begun(lesson, tmp_path / "run", "--workers", "1")
    while steps_of(tmp_path / "run") < 2:
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # the workers too, as torchrun does
    assert process.wait(60) == 0
    steps = len(losses(tmp_path / "run"))
    assert f"SIGTERM: step {steps} of" in process.stdout.read()
    assert (tmp_path / "run" / f"step-{steps:06d}" / "train.json").is_file()


@pytest.mark.parametrize("how", ["add_learned", "add_unscaled", "add_shared_patch_embed", "channel_concat"])
def test_every_ablation_of_the_source_trains_from_the_same_weights(tmp_path, lesson, how):
    go(lesson, tmp_path / "run", stage=2, settings=["steps=1", f"model.source={how}", "mllm.context=queries"])
    trained = load_file(tmp_path / "run" / "step-000001" / "weights.safetensors")
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    with pytest.raises(ValueError, match="not a nanoKiwi folder"):
        train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "run")])
    small_edit(KiwiEdit.from_pretrained(tmp_path / "model", dtype=torch.float32), ref=False)
    with pytest.raises(ValueError, match="needs them as they are"):
        train.main(["--export", str(tmp_path / "run"), "--out", str(lesson / "weights")])
    assert ("vae_condition.learned.weight" in trained) == (how == "add_learned")
    go(lesson, tmp_path / "next", "--weights", tmp_path / "run", settings=["steps=1"])
    saved = tmp_path / "run/step-000001/weights.safetensors"
    over = KiwiEdit.from_pretrained(saved, dtype=torch.float32, base=lesson / "weights")
    assert (over.config.source, over.config.mllm.context) == (how, "queries"), "the checkpoint edits as it is"
    for path in (saved, saved.parent, tmp_path / "run"):
        same = KiwiEdit.from_pretrained(path, dtype=torch.float32)
        assert same.config == over.config
        assert all(torch.equal(a, b) for a, b in zip(same.parameters(), over.parameters()))
    config = json.loads((tmp_path / "next" / "config.json").read_text())["model"]
    assert (config["source"], config["mllm"]["context"]) == (how, "queries"), "the next stage has the same model"


@pytest.mark.parametrize("how", ["add_learned", "channel_concat"])
def test_a_run_that_does_not_train_what_its_source_needs_edits_as_its_export(tmp_path, lesson, how):
    go(lesson, tmp_path / "run", stage=1, settings=["steps=1", f"model.source={how}"])
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    run, model = (KiwiEdit.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("run", "model"))
    assert torch.equal(small_edit(run, ref=False), small_edit(model, ref=False))


def test_a_released_training_checkpoint_goes_on_training(tmp_path, lesson, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path, stage=2)
    flags = ["--weights", checkpoint, "--base", tmp_path / "wan", "--qwen", tmp_path / "qwen", "--config", "nano"]
    go(lesson, tmp_path / "run", *flags, settings=["steps=1"])
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
    go(lesson, tmp_path / "runs" / "1", "--weights", begun, settings=settings)
    monkeypatch.chdir(tmp_path)
    config = KiwiEdit.from_pretrained(tmp_path / "runs" / "1").config
    assert config.steps == 3 and config.dit.bf16_timesteps


def test_several_folders_are_trained_as_one(tmp_path, lesson):
    for half, rows in (("a", slice(1, 4)), ("b", slice(4, None))):
        (tmp_path / half).mkdir()
        for table in lesson.glob("*.csv"):
            head, *lines = table.read_text().splitlines()
            (tmp_path / half / table.name).write_text("\n".join([head, *[head, *lines][rows]]))
    go(lesson, tmp_path / "one", settings=["steps=2"])
    halves = ["--data", tmp_path / "a", tmp_path / "b", "--base-path", lesson]
    go(lesson, tmp_path / "two", *halves, settings=["steps=2"])
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    (tmp_path / "b" / "image.csv").unlink()
    with pytest.raises(FileNotFoundError, match="b: has no image.csv"):
        go(lesson, tmp_path / "none", "--data", tmp_path / "b", "--base-path", lesson, settings=["steps=2"])


def test_broken_samples_are_logged_and_too_many_stop_the_run(tmp_path, lesson):
    for file in lesson.glob("*.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "video_1_tgt.mp4").write_bytes((tmp_path / "video_1_tgt.mp4").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"1 of 5 video rows cannot be read \(--max-bad 5\).*video_1_tgt"):
        go(lesson, tmp_path / "run", "--data", tmp_path)
    go(lesson, tmp_path / "run2", "--data", tmp_path, "--max-bad", "30", settings=["steps=2"])
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
        go(lesson, tmp_path / name, settings=["steps=3", *more])
        return load_file(tmp_path / name / "step-000003/weights.safetensors")

    plain = learned("plain")
    for number in ("warmup=9", "schedule=linear", "clip=1e-9", "shift=20", "beta2=0.5", "weight_decay=0.5",
                   "ref_shrink=0.3", "weighting=none", "balance=true"):  # fmt: skip
        other = learned(number, number)
        assert any(not torch.equal(plain[k], other[k]) for k in plain), number


def test_a_stage_says_that_the_lora_of_its_weights_keeps_its_rank(tmp_path, lesson, capsys):
    for stage, weights, settings in ((1, lesson / "weights", []), (2, tmp_path / "1", ["lora_rank=4"])):
        assert "LoRA" not in capsys.readouterr().err
        go(lesson, tmp_path / str(stage), "--weights", weights, stage=stage, settings=["steps=1", *settings])
    assert "have LoRA of rank 2, which goes on: lora_rank=4" in capsys.readouterr().err


def test_averaged_weights_are_what_their_decay_says(tmp_path, lesson):
    go(lesson, tmp_path / "run", "--save-every", "1", settings=["steps=3", "ema=0.75"])
    file = lambda step, name: load_file(tmp_path / f"run/step-{step:06d}/{name}.safetensors")
    before, ema, weights = file(2, "ema"), file(3, "ema"), file(3, "weights")
    assert all(torch.allclose(ema[k], 0.75 * before[k] + 0.25 * weights[k], atol=1e-6) for k in ema)
    assert any(not torch.equal(ema[k], weights[k]) for k in ema)
    train.main(["--export", str(tmp_path / "run/step-000003/ema.safetensors"), "--out", str(tmp_path / "average")])
    head = load_file(tmp_path / "average/dit.safetensors")["dit.head.head.weight"]
    assert torch.equal(head, ema["dit.head.head.weight"]), "the file given is what is exported"


def test_another_run_goes_on_from_a_checkpoint_given_by_its_path(tmp_path, lesson):
    KiwiEdit.from_pretrained(lesson / "weights").save(tmp_path / "half")  # bfloat16, from which float32 goes on
    go(lesson, tmp_path / "a", "--weights", tmp_path / "half", "--save-every", "1", settings=["steps=2"])
    resume = ["--weights", tmp_path / "half", "--resume", tmp_path / "a/step-000001"]
    go(lesson, tmp_path / "b", *resume, settings=["steps=2"])
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[1:]
    with pytest.raises(ValueError, match="later checkpoints"):
        go(lesson, tmp_path / "a", *resume, settings=["steps=2"])


def test_a_run_is_never_what_it_began_with_itself(tmp_path, lesson):
    go(lesson, tmp_path / "run", "--save-every", "1", settings=["steps=1"])
    for own in ("run", "run/step-000001", "run/step-000001/weights.safetensors"):
        with pytest.raises(ValueError, match="is --out itself; give what this run began with"):
            go(lesson, tmp_path / "run", "--weights", tmp_path / own, "--resume", "auto", settings=["steps=2"])
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
    save, loss = checkpoint.save_file, train.Trainer.loss

    def slowly(*tensors):
        time.sleep(1)
        save(*tensors)

    def no_memory(trainer, batch, *more):
        if trainer.counts["step"] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(trainer, batch, *more)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    monkeypatch.setattr(train.Trainer, "loss", no_memory)
    with pytest.raises(torch.OutOfMemoryError) as error:
        go(lesson, tmp_path, "--workers", 2, "--save-every", 1, settings=["steps=2"])
    assert multiprocessing.active_children() == [] and error.tb  # which keeps the loader
    assert [path.name for path in valid_checkpoints(tmp_path)] == ["step-000001"] and not list(tmp_path.glob(".step-*"))


def test_a_damaged_checkpoint_or_one_of_another_stage_is_not_resumed_from(tmp_path, lesson, capsys):
    mine = Path(shutil.copytree(lesson, tmp_path / "mine", ignore=shutil.ignore_patterns("weights")))
    go(lesson, tmp_path / "run", "--data", mine, stage=1, settings=["steps=1"])
    table = mine / "image.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    again = ["--data", mine, "--resume", "auto"]
    go(lesson, tmp_path / "run", *again, stage=1, settings=["steps=2"])
    assert "the image rows, whose order begins anew" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trains other parts: a next stage begins with --weights"):
        go(lesson, tmp_path / "run", *again, stage=2, settings=["steps=3"])
    state = next((tmp_path / "run" / "step-000002" / "state").glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000002/state: cannot be read"):
        go(lesson, tmp_path / "run", *again, stage=1, settings=["steps=3"])


def test_a_base_path_is_of_the_tables_named_where_some_are(tmp_path, lesson):
    shutil.copy(lesson / "ref_video.csv", tmp_path / "curated.csv")
    named = ["--ref-csv", tmp_path / "curated.csv", "--base-path", lesson]
    go(lesson, tmp_path / "named", *named, settings=["steps=1"])
    go(lesson, tmp_path / "plain", settings=["steps=1"])
    assert losses(tmp_path / "named") == losses(tmp_path / "plain")


def test_a_diverged_run_skips_steps_saves_nothing_and_stops_with_the_sample(tmp_path, lesson, capsys):
    flags, settings = ["--save-every", "1"], ["lr=1e30", "weight_decay=0", "warmup=0"]
    with pytest.raises(ValueError, match=r"5 steps in a row were skipped.*: .*step-000001.*_tgt\.(png|mp4)"):
        go(lesson, tmp_path / "run", *flags, settings=settings)
    said = capsys.readouterr().err
    assert "skipped: its gradient is" in said and "not saved; the last sound checkpoint" in said
    assert [path.name for path in valid_checkpoints(tmp_path / "run")] == ["step-000001"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert lines[-1]["loss"] is None, "NaN is no JSON"


def test_a_run_resumes_with_its_own_arguments_and_a_second_process_is_kept_out(tmp_path, lesson, monkeypatch):
    go(lesson, tmp_path / "run", settings=["steps=1"])
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "run", "--set", "steps=2"])
    assert len(losses(tmp_path / "run")) == 2
    begun, args = (train.parse_arguments(["--resume", str(tmp_path / path)]) for path in ("run", "run/step-000001"))
    assert begun.resume == "auto" and args.resume.endswith("step-000001") and args.stage == 3 and args.workers == 0
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process trains there"):
            train.main(["--resume", "run", "--set", "steps=3"])
    assert (tmp_path / "run/step-000002/weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~checkpoint.UMASK


def test_batches_that_do_not_fit_into_shared_memory_are_refused_and_a_signal_ends_a_wait(tmp_path, lesson):
    with pytest.raises(ValueError, match="docker run --shm-size=8g, or --workers 0"):
        train.room_for_batches((81, 10**5, 10**5), 1, 2)
    with trainer_of(lesson, tmp_path) as trainer:
        signal.signal(signal.SIGALRM, trainer.ask_to_stop)
        trainer.batches = iter(lambda: time.sleep(60), None)
        signal.alarm(1)
        started = time.monotonic()
        assert trainer.next_batch() is None and trainer.stop == "SIGALRM" and time.monotonic() - started < 30


@pytest.mark.parametrize("words, says", [
    (["--set", "speed=2"], "Stage has no 'speed'; it has"), (["--set", "steps=many"], "not of the kind"),
    (["--set", "weighting=no"], "Stage.weighting: 'no', expected one of bell, none"),
    (["--set", "schedule=never"], "expected one of constant, cosine, linear"),
    (["--sp", "2"], "does not divide the 1 processes"),
    (["--weights", "nowhere"], "no such file or folder"), (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--dtype", "bfloat16", "--parallel", "ddp"], "take --parallel fsdp"),
    (["--set", "batch=3"], "not a multiple of batch"),
    (["--resume", "nowhere"], "not a checkpoint folder"), (["--set", "paint.dim=3"], "there are model, dit, vae, mllm"),
    (["--set", "ema=1.5"], "Stage.ema: 1.5"), (["--set", "image=-1"], "shares of at least 0"),
    (["--set", "trains=lora,dti"], "the model has no 'dti'"),
    (["--set", "lora_targets=q_proj,key"], "no linear layer 'key'"),
    (["--init", "random"], "leave out --weights"), (["--weights", __file__], "cannot be read"),
    (["--set", "trains=dit.lora"], "dit.lora needs a rank; --set dit_lora_rank=32"),
    (["--set", "pixels=0"], "Stage.pixels: 0"), (["--set", "clip=-1"], "Stage.clip: -1"),
    (["--set", "ref_shrink=1.5"], "Stage.ref_shrink: 1.5"), (["--set", "lora_rank=0"], "Stage.lora_rank: 0"),
])  # fmt: skip
def test_a_bad_request_to_train_is_one_clear_line(tmp_path, lesson, monkeypatch, words, says):
    plain = lessons(lesson, tmp_path / "run", settings=words[1:] if words[0] == "--set" else [])
    plain[plain.index("--set") : plain.index("--set")] = [] if words[0] == "--set" else words
    monkeypatch.setattr(sys, "argv", ["train.py", *plain])
    with pytest.raises(SystemExit) as exit_, command.one_line("train.py"):
        train.main()
    assert says in exit_.value.code and "\n" not in exit_.value.code and not parallel.dist.is_initialized()


def test_a_setting_that_had_no_value_takes_none_a_number_or_several():
    for value, pixels in (("none", None), ("9000", 9000)):
        for config in (MLLMConfig("x"), MLLMConfig("x", max_pixels=None)):
            assert stages.with_settings(config, [f"max_pixels={value}"]).max_pixels == pixels
    assert stages.with_settings(KiwiConfig(), ["trained=9,64,64,8"]).trained == (9, 64, 64, 8)
    assert stages.with_settings(stages.DISTIL, ["student=1000"]).student == (1000.0,)
    with pytest.raises(ValueError, match="trained=5: .*not iterable"):
        stages.with_settings(KiwiConfig(), ["trained=5"])
    with pytest.raises(ValueError, match="max_pixels=many: 'many' is not of the kind of None"):
        stages.with_settings(MLLMConfig("x", max_pixels=None), ["max_pixels=many"])


def test_a_number_too_small_is_refused_before_anything_is_read(capsys):
    for flag, least in {"--max-bad": 0, "--workers": 0, "--sample-steps": 1, "--sample-every": 0, "--keep": 1}.items():
        assert train.parse_arguments(["--stage", "1", flag, str(least)])
        with pytest.raises(SystemExit):
            train.parse_arguments(["--stage", "1", flag, str(least - 1)])
        assert f"{flag}: expected a number from {least}" in capsys.readouterr().err


def test_a_lost_worker_is_told_with_the_mend(tmp_path, lesson):
    def lost():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        yield

    with trainer_of(lesson, tmp_path) as trainer:
        trainer.batches = lost()
        with pytest.raises(ValueError, match="killed by signal: Killed. Out of memory. Take fewer --workers"):
            trainer.next_batch()


def test_nano_starts_from_nothing_but_no_run_is_written_over(tmp_path, lesson, capsys, monkeypatch):
    monkeypatch.setattr(start, "NANO", tmp_path / "none")
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
    assert valid_checkpoints(tmp_path / "run") == [] and not list((tmp_path / "run").glob(".step-*"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_plot_shows_the_losses_and_previews_are_of_the_held_out_rows(tmp_path, lesson, capsys, parallel):
    flags = ["--sample-every", "2", "--sample-steps", "1", "--parallel", parallel, "--val", lesson]
    go(lesson, tmp_path / "run", *flags, settings=["steps=2"])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    train.main(["--plot", str(tmp_path / "run")])
    svg = (tmp_path / "run" / "loss.svg").read_text()
    assert svg.count("<path d=") > 5 and all(f">{name}<" in svg for name in ("loss", "val", "val_q1", "loss_image"))
    assert read_clip(tmp_path / "run" / "samples" / "step-000002-ref.mp4").frames.shape[2] == 3 * 96


def test_the_help_of_the_other_commands_answers_without_torch():
    for name in ("train.py", "data.py", "curate.py", "judge.py", "nano"):
        runner = "runpy.run_path" if name.endswith(".py") else "runpy.run_module"
        probe = f"import runpy, sys; sys.argv = [{name!r}, '--help']\ntry: {runner}({name!r}, run_name='__main__')\n"
        probe += "except SystemExit: assert not {'torch', 'av', 'transformers', 'numpy'} & sys.modules.keys()"
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=HOUSE)
        assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


def test_the_paper_s_numbers_are_the_defaults():
    told = {1: ((1, 0, 0), 30_000), 2: ((1, 1, 0), 10_000), 3: ((2, 1, 1), 10_000)}  # FACTS.md, "Training"
    for number, stage in train.STAGES["paper"].items():
        assert (tuple(stage.ratio.values()), stage.steps) == told[number] and stage.source == (number > 1)
        own = (stage.global_batch, stage.lr, stage.optimizer, stage.lora_rank, stage.shift)
        assert own == (128, 2e-5, "adamw", 64, 5.0)
    assert [stage.lr for stage in train.STAGES["released"].values()] == [1e-5, 1e-5, 5e-6]


def test_timesteps_are_drawn_over_the_whole_schedule_and_rounded_where_weights_see_them_so():
    draws = torch.tensor([train.draw(0, number, FlowMatch(), False)[1].item() for number in range(2000)])
    assert len(draws.unique()) > 800 and abs((draws < FlowMatch().timesteps(1000)[500]).float().mean() - 0.5) < 0.05
    rounded = torch.stack([train.draw(0, number, FlowMatch(), True)[1] for number in range(50)])
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_a_batch_has_the_mean_loss_of_its_items_each_with_its_own_words(tmp_path, lesson):
    per_item = ("numbers", "prompts", "paths", "pictures", "seen")
    with trainer_of(lesson, tmp_path, "batch=2", "ref=0", "ref_shrink=1") as trainer:
        batch = next(iter(trainer.loader())) | {"prompts": ["Invert it.", "Make it snow."]}
        singles = [{k: v[i : i + 1] if k in per_item else v for k, v in batch.items()} for i in range(2)]
        drawn = lambda each: [train.draw(0, number, trainer.flow, False) for number in each["numbers"]]
        whole, *parts = (trainer.loss(each, drawn(each), trainer.flow)[0].detach() for each in (batch, *singles))
    assert close(whole, torch.stack(parts).mean(), 1e-5) and abs(parts[0] - parts[1]) > 1e-3 * whole


def test_phases_begin_and_samples_are_numbered_by_batches_and_items(tmp_path, lesson):
    with trainer_of(lesson, tmp_path, "steps=20", "pixels=4096,6144", "batch=2") as trainer:
        pairs = Pairs(trainer.data.tables, trainer.data.curriculum, lambda source, row: None)
        assert [start for start, _ in trainer.data.curriculum.phases] == [0, 10 * trainer.stage.batches]
        assert pairs[0]["numbers"] + pairs[1]["numbers"] == [0, 1, 2, 3]


def test_muon_takes_matrices_of_the_blocks_and_adamw_the_rest():
    shapes = {"dit.blocks.0.ffn.0.weight": (4, 3), "mllm.ref_queries": (4, 3), "dit.blocks.0.modulation": (1, 6, 3),
              "source_embedder.learned.weight": (1, 3)}  # fmt: skip
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    stage = replace(train.STAGES["paper"][3], optimizer="muon")
    muon, adamw = train.make_optimizers(stage, trained)
    assert len(muon.param_groups[0]["params"]) == 1 and adamw.defaults["betas"] == (0.9, 0.999)
    decay = {group["weight_decay"]: len(group["params"]) for group in adamw.param_groups}
    assert decay == {0.01: 1, 0.0: 2}, "queries and modulations do not decay"
    trained["dit.blocks.0.ffn.0.weight"].device_mesh = SimpleNamespace(size=lambda: 8)
    with pytest.raises(ValueError, match="has 4 rows for 8 ranks"):
        train.make_optimizers(stage, trained)
