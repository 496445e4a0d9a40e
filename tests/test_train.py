"""Tests of train.py, start.py, stages.py and checkpoint.py"""

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

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import command
import media
import parallel
import start
import train
from conftest import (
    HOUSE,
    SMALL,
    close,
    go,
    golden,
    lessons,
    losses,
    manifest,
    save_training_layout,
    small_edit,
    small_model,
    trainer_of,
)
from connectors import MLLMConfig
from load import our_name, released_name, valid_checkpoints
from media import read_clip
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit
from stages import DISTIL, STAGES, with_settings


def weights_of(path):
    return KiwiEdit.from_pretrained(path, dtype=torch.float32)


def export(run, out, *more):
    train.main(["--export", str(run), "--out", str(out), *map(str, more)])


# What is trained


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
    saved = {released_name(n): tuple(p.shape) for n, p in model.named_parameters() if train.belongs(n, chosen.trains)}
    assert saved == {n: tuple(t.shape) for n, t in manifest(f"trainable_{config}_stage{stage}").items()}
    assert all(our_name(released_name(n)) == n for n, _ in model.named_parameters())
    assert (model.mllm.config.max_pixels is None) == (config == "5b")  # so their scripts


def test_the_paper_s_numbers_are_the_defaults():
    told = {1: ((1, 0, 0), 30_000), 2: ((1, 1, 0), 10_000), 3: ((2, 1, 1), 10_000)}
    for number, stage in STAGES["paper"].items():
        assert (tuple(stage.ratio.values()), stage.steps) == told[number] and stage.source == (number > 1)
        own = (stage.global_batch, stage.lr, stage.optimizer, stage.lora_rank, stage.shift)
        assert own == (128, 2e-5, "adamw", 64, 5.0)
    assert [stage.lr for stage in STAGES["released"].values()] == [1e-5, 1e-5, 5e-6]


def test_the_learning_rate_rises_and_falls_as_its_schedule_says():
    stage = replace(STAGES["paper"][1], lr=2.0, warmup=2, steps=12)
    for schedule, end in (("constant", [2, 2, 2]), ("linear", [2, 1, 0.2]), ("cosine", [2, 1, 0.04894])):
        rates = [train.learning_rate(replace(stage, schedule=schedule), step) for step in (0, 1, 2, 7, 11)]
        assert rates == pytest.approx([1, 2, *end], rel=1e-3)


def test_muon_takes_matrices_and_adamw_the_rest_and_queries_and_modulations_do_not_decay():
    shapes = {"dit.blocks.0.ffn.0.weight": (4, 3), "mllm.ref_queries": (4, 3), "dit.blocks.0.modulation": (1, 6, 3),
              "source_embedder.learned.weight": (1, 3)}  # fmt: skip
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    stage = replace(STAGES["paper"][3], optimizer="muon")
    muon, adamw = train.make_optimizers(stage, trained)
    assert len(muon.param_groups[0]["params"]) == 1 and adamw.defaults["betas"] == (0.9, 0.999)
    assert {group["weight_decay"]: len(group["params"]) for group in adamw.param_groups} == {0.01: 1, 0.0: 2}
    trained["dit.blocks.0.ffn.0.weight"].device_mesh = SimpleNamespace(size=lambda: 8)
    with pytest.raises(ValueError, match="has 4 rows for 8 ranks"):
        train.make_optimizers(stage, trained)


def test_noise_and_timestep_are_drawn_by_seed_and_sample_alone_over_the_whole_schedule():
    taken = {}
    for seed, number in [(0, 0), (0, 1), (0, 2**33), (1, 0), (1, 2**33)] * 2:
        torch.manual_seed(len(taken))
        generator, t, chance = train.draw(seed, number, FlowMatch(), rounded=False)
        found = (t.item(), chance, torch.randn(3, generator=generator).tolist())
        assert taken.setdefault((seed, number), found) == found
    assert all(len({found[i] if i < 2 else str(found[i]) for found in taken.values()}) == 5 for i in range(3))
    draws = torch.tensor([train.draw(0, number, FlowMatch(), False)[1].item() for number in range(2000)])
    assert len(draws.unique()) > 800 and abs((draws < FlowMatch().timesteps(1000)[500]).float().mean() - 0.5) < 0.05
    rounded = torch.stack([train.draw(0, number, FlowMatch(), True)[1] for number in range(50)])
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_a_number_of_a_stage_changes_what_is_learned(tmp_path, lesson):
    def learned(*settings):
        one = ["steps=2", "global_batch=1", "image=0", "video=0"]
        with trainer_of(lesson, tmp_path, *one, *settings) as trainer:
            trainer.batches = iter(trainer.loader())
            trainer.step(), trainer.step()
            return torch.cat([p.detach().flatten() for p in trainer.trained.values()])

    plain = learned()
    for number in ("clip=1e-9", "shift=20", "beta2=0.5", "ref_shrink=0.3", "weighting=none", "balance=true"):
        assert not torch.equal(plain, learned(number)), number


def test_a_batch_has_the_mean_loss_of_its_items_each_with_its_own_words(tmp_path, lesson):
    per_item = ("numbers", "prompts", "paths", "pictures", "seen")
    with trainer_of(lesson, tmp_path, "steps=20", "pixels=4096,6144", "batch=2", "ref=0", "ref_shrink=1") as trainer:
        assert [begin for begin, _ in trainer.data.curriculum.phases] == [0, 10 * trainer.stage.batches]
        assert trainer.pairs[0]["numbers"] + trainer.pairs[1]["numbers"] == [0, 1, 2, 3]
        batch = next(iter(trainer.loader())) | {"prompts": ["Invert it.", "Make it snow."]}
        singles = [{k: v[i : i + 1] if k in per_item else v for k, v in batch.items()} for i in range(2)]
        drawn = lambda each: [train.draw(0, number, trainer.flow, False) for number in each["numbers"]]
        whole, *parts = (trainer.loss(each, drawn(each), trainer.flow)[0].detach() for each in (batch, *singles))
    assert close(whole, torch.stack(parts).mean(), 1e-5) and abs(parts[0] - parts[1]) > 1e-3 * whole


def test_averaged_weights_are_what_their_decay_says(tmp_path, lesson):
    go(lesson, tmp_path / "run", settings=["steps=3", "ema=0.75", "save_every=1"])
    file = lambda step, name: load_file(tmp_path / f"run/step-{step:06d}/{name}.safetensors")
    before, ema, weights = file(2, "ema"), file(3, "ema"), file(3, "weights")
    assert all(torch.allclose(ema[k], 0.75 * before[k] + 0.25 * weights[k], atol=1e-6) for k in ema)
    assert any(not torch.equal(ema[k], weights[k]) for k in ema)
    export(tmp_path / "run/step-000003/ema.safetensors", tmp_path / "average")
    head = load_file(tmp_path / "average/dit.safetensors")["dit.head.head.weight"]
    assert torch.equal(head, ema["dit.head.head.weight"]), "the file given is what is exported"


# What a run starts from


@pytest.mark.parametrize("how, stage", [("add_learned", 2), ("channel_concat", 1)])
def test_an_ablation_trains_edits_exports_and_goes_on_as_the_same_model(tmp_path, lesson, how, stage, capsys):
    run = tmp_path / "run"
    go(lesson, run, stage=stage, settings=["steps=1", f"model.source={how}", "mllm.context=queries"])
    trained = run / "step-000001/weights.safetensors"
    assert ("vae_condition.learned.weight" in load_file(trained)) == (how == "add_learned")
    export(run, tmp_path / "model")
    exported = weights_of(tmp_path / "model")
    assert (exported.config.source, exported.config.mllm.context) == (how, "queries")
    for path in (trained, trained.parent, run):
        assert torch.equal(small_edit(weights_of(path), ref=False), small_edit(exported, ref=False))
    for out, says in ((run, "not a nanoKiwi folder"), (lesson / "weights", "needs them as they are")):
        with pytest.raises(ValueError, match=says):
            export(run, out)
    go(lesson, tmp_path / "next", "--weights", run, stage=stage + 1, settings=["steps=1", "lora_rank=4"])
    assert "have LoRA of rank 2, which goes on: lora_rank=4" in capsys.readouterr().err
    config = json.loads((tmp_path / "next" / "config.json").read_text())["model"]
    assert (config["source"], config["mllm"]["context"]) == (how, "queries")


def test_a_released_training_checkpoint_goes_on_training(tmp_path, lesson, qwen_folder):
    released = save_training_layout(small_model(qwen_folder), tmp_path, stage=2)
    flags = ["--weights", released, "--base", tmp_path / "wan", "--qwen", tmp_path / "qwen", "--config", "nano"]
    go(lesson, tmp_path / "run", *flags, settings=["steps=1"])
    trained, before = load_file(tmp_path / "run/step-000001/weights.safetensors"), load_file(released)
    assert before.keys() < trained.keys()  # references are new
    assert all((trained[k] - before[k]).abs().max() < 0.01 for k in before)
    model = weights_of(tmp_path / "run")
    assert len(model.mllm.ref_queries) and not model.dit.patch_embedding.weight.is_meta
    (tmp_path / "wan").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="began with .*give --base or --qwen"):
        weights_of(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "whole", "--base", tmp_path / "moved", "--qwen", tmp_path / "qwen")


def test_a_run_is_found_and_goes_on_from_any_folder_and_is_never_its_own_beginning(tmp_path, lesson, monkeypatch):
    monkeypatch.chdir(lesson.parent)
    (tmp_path / "elsewhere" / "disk").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere" / "disk")
    weights, settings = lesson.relative_to(lesson.parent) / "weights", ["steps=1", "model.steps=3"]
    go(lesson, tmp_path / "runs" / "1", "--weights", weights, settings=settings)
    monkeypatch.chdir(tmp_path)
    assert weights_of(Path("runs/1")).config.steps == 3
    for own in ("1", "1/step-000001", "1/step-000001/weights.safetensors"):
        with pytest.raises(ValueError, match="is --out itself; give what this run began with"):
            go(lesson, "runs/1", "--weights", f"runs/{own}", "--resume", "auto", settings=["steps=2"])
    train.main(["--resume", "runs/1", "--set", "steps=2"])
    assert len(losses("runs/1")) == 2
    whole, one = (train.parse_arguments(["--resume", f"runs/1{end}"]) for end in ("", "/step-000001"))
    assert whole.resume == "auto" and one.resume.endswith("step-000001") and one.stage == 3 and "steps=1" in one.set
    with Path("runs/1/.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process works there"):
            train.main(["--resume", "runs/1", "--set", "steps=3"])
    assert Path("runs/1/step-000002/weights.safetensors").stat().st_mode & 0o777 == 0o644


def test_nano_starts_from_nothing_but_no_run_is_written_over(tmp_path, lesson, capsys, monkeypatch):
    monkeypatch.setattr(start, "NANO", tmp_path / "none")
    mllm = ["--qwen", HOUSE / "weights" / "nano" / "mllm"]
    words = ["--config", "nano", "--stage", 1, "--data", lesson, "--out", tmp_path / "run", *mllm, "--set", *SMALL]
    words = [*map(str, words), "dit.num_layers=1"]
    train.main([*words, "steps=1"])
    assert "random weights" in capsys.readouterr().err and (tmp_path / "run/init").is_dir()
    with pytest.raises(ValueError, match="give --resume auto to continue"):
        train.main([*words, "steps=1"])
    train.main([*words, "steps=2", "--resume", "auto"])
    export(tmp_path / "run", tmp_path / "whole")
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "whole/config.json").is_file()


def test_several_folders_are_trained_as_one_and_a_base_path_is_of_the_tables_named(tmp_path, lesson):
    for half, rows in (("a", slice(1, 4)), ("b", slice(4, None))):
        (tmp_path / half).mkdir()
        for table in lesson.glob("*.csv"):
            head, *lines = table.read_text().splitlines()
            (tmp_path / half / table.name).write_text("\n".join([head, *[head, *lines][rows]]))
    shutil.copy(lesson / "ref_video.csv", tmp_path / "curated.csv")
    ways = {"one": [], "two": ["--data", tmp_path / "a", tmp_path / "b", "--base-path", lesson],
            "named": ["--ref-csv", tmp_path / "curated.csv", "--base-path", lesson]}  # fmt: skip
    for name, flags in ways.items():
        go(lesson, tmp_path / name, *flags, settings=["steps=1"])
        assert losses(tmp_path / name) == losses(tmp_path / "one")
    (tmp_path / "b" / "image.csv").unlink()
    with pytest.raises(FileNotFoundError, match="b: has no image.csv"):
        go(lesson, tmp_path / "none", "--data", tmp_path / "b", "--base-path", lesson, settings=["steps=2"])


def test_broken_samples_are_logged_and_too_many_stop_the_run(tmp_path, lesson):
    for file in lesson.glob("*.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "video_1_tgt.mp4").write_bytes((tmp_path / "video_1_tgt.mp4").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"1 of 5 video rows cannot be read \(max_bad=5\).*video_1_tgt"):
        go(lesson, tmp_path / "run", "--data", tmp_path)
    go(lesson, tmp_path / "run2", "--data", tmp_path, settings=["steps=2", "max_bad=30"])
    line = json.loads((tmp_path / "run2" / "bad.jsonl").read_text())
    assert line["path"].endswith("video_1_tgt.mp4") and "cannot be decoded" in line["reason"]


@pytest.mark.parametrize("words, says", [
    (["--set", "speed=2"], "Stage has no 'speed'; it has"), (["--set", "steps=many"], "is not of the kind int"),
    (["--set", "schedule=never"], "expected one of constant, cosine, linear"),
    (["--set", "ema=1.5"], "ema: 1.5, expected from 0"), (["--set", "image=-1"], "image: -1, expected from 0"),
    (["--set", "pixels=0"], "pixels: (0,), expected from 1"), (["--set", "keep=0"], "keep: 0, expected from 1"),
    (["--set", "batch=3"], "not a multiple of batch"), (["--set", "student=5,7"], "is trained as a LoRA"),
    (["--set", "trains=dit.lora"], "dit.lora needs a rank; --set dit_lora_rank=32"),
    (["--set", "trains=lora,dti"], "the model has no 'dti'"), (["--set", "paint.dim=3"], "there are model, dit, vae"),
    (["--set", "lora_targets=q_proj,key"], "no linear layer 'key'"),
    (["--set", "dtype=bfloat16", "parallel=ddp"], "take --set parallel=fsdp"),
    (["--sp", "2"], "does not divide the 1 processes"), (["--resume", "nowhere"], "not the folder of a run"),
    (["--weights", "nowhere"], "no such file or folder"), (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--weights", __file__], "cannot be read"),
])  # fmt: skip
def test_a_bad_request_to_train_is_one_clear_line(tmp_path, lesson, monkeypatch, words, says):
    settings, flags = (words[1:], []) if words[0] == "--set" else ([], words)
    monkeypatch.setattr(sys, "argv", ["train.py", *lessons(lesson, tmp_path / "run", *flags, settings=settings)])
    with pytest.raises(SystemExit) as exit_, command.one_line("train.py"):
        train.main()
    assert says in exit_.value.code and "\n" not in exit_.value.code and not parallel.dist.is_initialized()


def test_a_setting_is_parsed_as_its_field_s_type():
    for value, pixels in (("none", None), ("9000", 9000)):
        assert with_settings(MLLMConfig("x"), [f"max_pixels={value}"]).max_pixels == pixels
    assert with_settings(KiwiConfig(), ["trained=9,64,64,8"]).trained == (9, 64, 64, 8)
    changed = with_settings(DISTIL, ["student=1000", "checkpointing=false", "lr=1e-3", "workers=0"])
    assert (changed.student, changed.checkpointing, changed.lr, changed.workers) == ((1000.0,), False, 1e-3, 0)


# Kills, faults, and what a checkpoint holds


def test_another_run_goes_on_from_a_checkpoint_given_by_its_path(tmp_path, lesson):
    KiwiEdit.from_pretrained(lesson / "weights").save(tmp_path / "half")  # bfloat16, from which float32 goes on
    go(lesson, tmp_path / "a", "--weights", tmp_path / "half", settings=["steps=2", "save_every=1"])
    resume = ["--weights", tmp_path / "half", "--resume", tmp_path / "a/step-000001"]
    go(lesson, tmp_path / "b", *resume, settings=["steps=2"])
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[1:]
    with pytest.raises(ValueError, match="later checkpoints"):
        go(lesson, tmp_path / "a", *resume, settings=["steps=2"])


def test_checkpoints_are_in_the_order_of_their_steps_and_a_renamed_one_stays(tmp_path, lesson):
    words = lessons(lesson, tmp_path, "--resume", "auto", settings=["save_every=1", "keep=1"])
    train.main([*words, "steps=1"])
    (tmp_path / "step-000001").rename(tmp_path / "step-000001-good")
    train.main([*words, "steps=2"])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001-good", "step-000002"]
    for name in ("step-999999", "step-1000000"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    assert [p.name for p in valid_checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_a_damaged_checkpoint_or_one_of_another_stage_is_not_resumed_from(tmp_path, lesson, capsys):
    mine = Path(shutil.copytree(lesson, tmp_path / "mine", ignore=shutil.ignore_patterns("weights")))
    go(lesson, tmp_path / "run", "--data", mine, stage=1, settings=["steps=1"])
    table, again = mine / "image.csv", ["--data", mine, "--resume", "auto"]
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    go(lesson, tmp_path / "run", *again, stage=1, settings=["steps=2"])
    said = capsys.readouterr().err
    assert "not as when" in said and "steps 1 -> 2" in said and "image rows" in said
    with pytest.raises(ValueError, match="cannot go on with trains .*begin a next stage with --weights"):
        go(lesson, tmp_path / "run", *again, stage=2, settings=["steps=3"])
    state = next((tmp_path / "run" / "step-000002" / "state").glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000002/state: cannot be read"):
        go(lesson, tmp_path / "run", *again, stage=1, settings=["steps=3"])


def test_a_diverged_run_skips_steps_saves_nothing_and_stops_with_the_sample(tmp_path, lesson, capsys):
    settings = ["lr=1e30", "weight_decay=0", "warmup=0", "save_every=1", "global_batch=1"]
    with pytest.raises(ValueError, match=r"5 steps in a row were skipped.*: .*step-000001.*_tgt\.(png|mp4)"):
        go(lesson, tmp_path / "run", settings=settings)
    said = capsys.readouterr().err
    assert "skipped: its gradient is" in said and "not saved; the last sound checkpoint" in said
    assert [path.name for path in valid_checkpoints(tmp_path / "run")] == ["step-000001"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert lines[-1]["loss"] is None, "NaN is no JSON"


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
        go(lesson, tmp_path, settings=["steps=2", "workers=2", "save_every=1"])
    assert multiprocessing.active_children() == [] and error.tb  # which keeps the loader
    assert [path.name for path in valid_checkpoints(tmp_path)] == ["step-000001"] and not list(tmp_path.glob(".step-*"))


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_checkpoint(tmp_path, lesson):
    words = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run", settings=["steps=2"])]
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; {shlex.join(words)}"], capture_output=True, text=True)
    assert done.returncode != 0 and "the checkpoint cannot be written" in done.stderr.splitlines()[-1]
    assert valid_checkpoints(tmp_path / "run") == [] and not list((tmp_path / "run").glob(".step-*"))


def test_a_folder_is_whole_or_as_it_was(tmp_path, monkeypatch):
    for word in ("old", "new"):
        with media.whole_folder(tmp_path / "w") as temporary:
            (temporary / "x").write_text(word)
    with pytest.raises(KeyboardInterrupt), media.whole_folder(tmp_path / "w"):
        raise KeyboardInterrupt
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


def test_shared_memory_is_measured_and_a_signal_ends_a_wait(tmp_path, lesson):
    with pytest.raises(ValueError, match="docker run --shm-size=8g, or --set workers=0"):
        train.room_for_batches((81, 10**5, 10**5), STAGES["paper"][1])

    with trainer_of(lesson, tmp_path) as trainer:
        before = signal.signal(signal.SIGALRM, trainer.ask_to_stop)
        trainer.batches, started = iter(lambda: time.sleep(60), None), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert trainer.next_batch() is None and trainer.stop == "SIGALRM" and time.monotonic() - started < 30
        signal.signal(signal.SIGALRM, before)


# What is looked at


def test_a_plot_shows_the_losses_and_previews_are_of_the_held_out_rows(tmp_path, lesson, held):
    settings = ["steps=2", "sample_every=2", "sample_steps=1", "parallel=fsdp"]
    with pytest.raises(ValueError, match="give --val"):
        go(lesson, tmp_path / "none", settings=settings)
    go(lesson, tmp_path / "run", "--val", held, settings=settings)
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
