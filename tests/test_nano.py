"""Tests of nano/"""

import csv
import hashlib
import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import judge
import train
from command import one_line
from conftest import HOUSE, close, randomise, small_edit
from connectors import MLLMConfig
from dit import DiTConfig
from media import read_clip, read_image
from model import FlowMatch, KiwiConfig, KiwiEdit
from nano import data, evaluate, pretrain, ship, world
from nano.__main__ import main


def nano(*words):
    main(list(map(str, words)))


@pytest.fixture(scope="session")
def library():
    return world.load_library()


@pytest.fixture(scope="session")
def edits(library):
    """The first edits of a world whose clips have 5 frames, by split."""
    return {s: [world.draw_edit(library, s, 0, i, 5, 64) for i in range(140)] for s in ("train", "test")}


def same_files(a, b):
    files = sorted(path.relative_to(a) for path in a.rglob("*.*"))
    return len(files) if all((a / name).read_bytes() == (b / name).read_bytes() for name in files) else 0


def test_the_world_is_the_same_whoever_draws_it_and_its_tables_are_those_of_the_real_data(tmp_path, nano_data):
    nano("data", tmp_path, "--clips", 16, "--frames", 5, "--workers", 2)
    assert same_files(nano_data, tmp_path) == 4 * 4 + 4 * 3 + 8 * 3 + 5
    for kind, count in {"image": 8, "video": 4, "ref_video": 4}.items():
        columns, *rows = csv.reader((nano_data / f"{kind}.csv").open())
        assert columns == ["src_video", "tgt_video", "prompt"] + ["ref_image"] * (kind == "ref_video")
        source, target = (read_clip(nano_data / name) for name in rows[0][:2])
        assert source.frames.shape == target.frames.shape == (1 if kind == "image" else 5, 64, 64, 3)
        assert source.still == (kind == "image") and len(rows) == count and rows[0][2]
        assert kind != "ref_video" or read_image(nano_data / rows[0][3]).shape == (128, 128, 3)


def test_an_edit_is_the_same_in_every_version_of_the_code(edits):
    told = [[e.prompt, world.describe(e.target), world.boxes(e.target)] for split in edits.values() for e in split]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] == "f70cf4cf463059de"
    drawn = [[*world.draw_frames(e, 32)[:2], e.ref] for split in edits.values() for e in split[:24]]
    light = [round(float(x.float().mean() * (1 if x.max() > 1 else 255))) for d in drawn for x in d if x is not None]
    assert hashlib.sha256(json.dumps(light).encode()).hexdigest()[:16] == "8f23139459bb0ea3"


def test_outside_the_mask_nothing_changes_and_inside_something_does(edits, nano_data):
    for edit in edits["train"][:32]:
        source, target, region = world.draw_frames(edit, 64)
        assert torch.equal(source[~region], target[~region]), edit.prompt
        assert (source[region] != target[region]).float().mean() > 0.2, edit.prompt
        if edit.changed:
            assert 0.01 < region.float().mean() < 0.5, edit.prompt
        if edit.task == "remove" and len(edit.source.things) == 1:
            rows, columns = ((world.render(edit.source, 64)[2][0][0, 0] > 0.5).nonzero() / 64).unbind(dim=1)
            ((left, top, right, bottom),) = world.boxes(edit.source).values()
            assert left - 0.05 < columns.min() and columns.max() < right + 0.05, "the box encloses the thing"
            assert top - 0.05 < rows.min() and rows.max() < bottom + 0.05
    for row in data.read_truth(nano_data):
        source, target, _, region = data.read_case(nano_data, row)
        assert region.all() or (source.int() - target.int())[~region].abs().float().mean() < 2, "the codec's share"


def test_tables_are_of_this_world_alone(tmp_path, monkeypatch):
    small = ["data", tmp_path, "--frames", 1, "--workers", 1, "--clips"]
    nano(*small, 4)
    assert len(list(tmp_path.glob("*.csv"))) == 3
    nano(*small, 1)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["image.csv"]
    monkeypatch.setattr(data.Clips, "__getitem__", lambda *told: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        nano(*small, 4, "--seed", 1)
    assert [path.name for path in tmp_path.glob("*.*")] == ["world.json"], "half drawn over another: no tables"
    (tmp_path / "world.json").unlink()
    (tmp_path / "image.csv").write_text("a person's own")
    with pytest.raises(ValueError, match="refusing to replace"):
        nano(*small, 1)


def test_what_is_tested_was_never_trained_on_and_training_alone_sees_strange_colours(edits, library):
    own = {id(photo) for photo in library.photos} | {id(look) for looks in library.sprites.values() for look in looks}
    seen, strange = {}, {}
    for split, some in edits.items():
        scenes = [scene for e in some for scene in (e.source, e.target)]
        things = [thing.sprite for scene in scenes for thing in scene.things]
        seen[split] = {scene.photo.name for scene in scenes if "plain" not in scene.photo.name}
        seen[split] |= {thing.name for thing in things} | {e.prompt for e in some}
        groups = [e.source.photo for e in some], things
        strange[split] = [sum(id(one) not in own for one in group) / len(group) for group in groups]
    assert not seen["train"] & seen["test"] and len(seen["test"]) > 160
    assert strange["test"] == [0, 0] and 0.5 < strange["train"][0] < 0.9
    assert strange["train"][1] == 0, "a coloured shape keeps the colour of its name"


def test_wordings_have_the_blanks_that_edits_fill_and_the_held_out_are_no_rearranged_ones():
    common = set("the to in of is are be it and has for as you could please from a would like".split())
    needed = dict(style="s", background="p", change="ab", remove="a", add="bw", subject="a", subject_add="w")
    telling = lambda wording: set(re.findall(r"(?<!{)\b[a-z']+", wording.lower())) - common
    train, test = world.WORDINGS["train"], world.WORDINGS["test"]
    assert train.keys() == test.keys() == {task for tasks in world.TASKS.values() for task in tasks}
    for task, wordings in train.items():
        blanks = set(needed.get(task, ""))
        for wording in (*wordings, *test[task]):
            found = set(re.findall(r"{(\w+)}", wording)) - {"clip"}
            assert blanks <= found <= blanks | set("b" if "subject" in task else ""), wording
        assert not [(a, b) for a in wordings for b in test[task] if telling(b) <= telling(a)]
        assert len(set(wordings)) == len(wordings) >= 64 and len(test[task]) == 4


def run_pretrain(part, data, out, *more):
    nano("pretrain", part, "--data", data, "--out", out, "--steps", 2, "--batch", 2, *more)


def run_ship(checkpoint, weights, test_clips, out):
    words = ["--weights", weights, "--data", test_clips, "--example", 2, "--made-by", "a test", "--out", out]
    nano("ship", checkpoint, *words)
    return (out / "MODEL_CARD.md").read_text()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, nano_data):
    folder = tmp_path_factory.mktemp("pretrained")
    for part in ("vae", "mllm", "dit"):
        run_pretrain(part, nano_data, folder)
    return folder


@pytest.fixture(scope="session")
def test_clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano_test")
    nano("data", folder, "--clips", 4, "--frames", 5, "--workers", 1, "--split", "test")
    return folder


def test_pretraining_in_pieces_is_one_training(tmp_path, nano_data, pretrained):
    with pytest.raises(SystemExit, match="75"):
        run_pretrain("vae", nano_data, tmp_path, "--minutes", 0)
    with pytest.raises(ValueError, match="begun with .*seed.: 0"):
        run_pretrain("vae", nano_data, tmp_path, "--seed", 1)
    first = torch.load(tmp_path / "vae.pt", weights_only=True)
    run_pretrain("vae", nano_data, tmp_path)
    whole, pieces = (torch.load(folder / "vae.pt", weights_only=True) for folder in (pretrained, tmp_path))
    assert first["step"] == 1 and pieces["step"] == 2 and pieces["seconds"] > first["seconds"] > 0
    assert all(torch.equal(whole["masters"][name], pieces["masters"][name]) for name in whole["masters"])
    model = KiwiEdit.from_pretrained(pretrained / "weights", dtype=torch.float32)
    assert torch.equal(model.vae.encoder.conv1.weight, whole["masters"]["encoder.conv1.weight"])


def test_an_answer_s_word_is_read_off_before_the_model_sees_it(monkeypatch, qwen_folder):
    speaker = randomise(pretrain.Speaker(MLLMConfig(str(qwen_folder), dit_dim=16, num_image_queries=3)))
    still, seen = torch.zeros(1, 56, 56, 3, dtype=torch.uint8), []
    monkeypatch.setattr(F, "cross_entropy", lambda *given: seen.append(given))
    for answer in ("ab", "xb"):
        pretrain.answer_loss(speaker, [(still, "Describe this.", None, answer)])
    (a, wanted_a), (x, wanted_x) = seen
    assert wanted_a[0] != wanted_x[0] and torch.equal(wanted_a[1:], wanted_x[1:])
    assert close(a[0], x[0], 1e-5) and not close(a[1], x[1], 1e-3)


def test_a_small_denoiser_learns_two_edits_by_heart(library):
    """Both of the same picture: only the context tells them apart. Latents are the pixels of 4x4 cells."""
    some = (world.draw_edit(library, "train", 1, i, 5, 32) for i in range(200))
    edit = next(e for e in some if e.kind == "image" and "plain" in e.prompt)
    source, changed, _ = world.draw_frames(edit, 32)
    pictures = [x.permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (source, changed, 255 - source)]  # (1, 3, 32, 32)
    before, *targets = (F.pixel_unshuffle(x, 4)[:, :, None] for x in pictures)  # (1, 48, 1, 8, 8)
    clean, before, contexts = torch.cat(targets), before.expand(2, -1, -1, -1, -1), torch.randn(2, 3, 64)
    dit = DiTConfig(64, 128, 2, 1, 48, 48, freq_dim=32, text_dim=8, patch_size=(1, 1, 1))
    model = KiwiEdit(KiwiConfig(dit, None, None))
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3, (0.9, 0.98))
    batch = [torch.cat([x] * 4) for x in (clean, contexts, before)]
    for _ in range(150):
        t = FlowMatch().timesteps(1000)[torch.randint(1000, (8,))]
        model.training_loss(*batch[:2], t, batch[2]).backward()
        optimiser.step()
        optimiser.zero_grad()
    result = model.denoise(torch.randn_like(clean), contexts, before, steps=10)
    error, copied = ((x - clean).square().flatten(1).mean(dim=1) for x in (result, before))
    assert (error < copied / 3).all(), (error, copied)


def test_a_decoder_is_trained_alone_over_weights_that_exist(tmp_path, nano_data, test_clips):
    run_pretrain("decoder", nano_data, tmp_path)
    nano_weights = HOUSE / "weights/nano"
    card = run_ship(tmp_path / "decoder.safetensors", nano_weights, test_clips, tmp_path / "shipped")
    old, new = (KiwiEdit.from_pretrained(folder).state_dict() for folder in (nano_weights, tmp_path / "shipped"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {".".join(name.split(".")[:2]) for name in changed} == {"vae.conv2", "vae.decoder"}
    assert "| train.py stage 3 | 13 | 38602 | 1235264 | 64164 |" in card and "| pretrain decoder | 1 | 2 | 0 |" in card


def test_what_ships_is_the_same_each_time_and_its_card_has_the_runs_and_the_evaluation(
    tmp_path, nano_data, pretrained, test_clips
):
    weights, run_ = pretrained / "weights", tmp_path / "run"
    words = ["--config", "nano", "--stage", 3, "--data", nano_data, "--weights", weights, "--out", run_]
    train.main([*map(str, words), "--set", "steps=1", "global_batch=2", "workers=0"])
    card, _ = (run_ship(run_, weights, test_clips, tmp_path / name) for name in "ab")
    assert same_files(tmp_path / "a", tmp_path / "b") == 12
    assert sum(path.stat().st_size for path in (tmp_path / "a").rglob("*.*")) < 32e6
    shipped = KiwiEdit.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert tuple(shipped.config.trained) == (5, 64, 64, 8) and small_edit(shipped).shape == (6, 32, 64, 3)
    assert "| pretrain vae | 1 | 2 |" in card and "| train.py stage 3 | 1 | 1 | 2 |" in card
    row = data.read_truth(test_clips)[2]
    assert (tmp_path / "a/example/prompt.txt").read_text().strip() == row["prompt"]
    assert (tmp_path / "a/example/reference.png").read_bytes() == (test_clips / row["ref_image"]).read_bytes()
    nano("eval", "--weights", tmp_path / "a", "--data", test_clips, "--out", tmp_path, "--card")
    assert (tmp_path / "eval.md").read_text().strip() in (tmp_path / "a/MODEL_CARD.md").read_text()
    measures = [case["measures"] for case in json.loads((tmp_path / "eval.json").read_text())["cases"]]
    assert [len(m) for m in measures] == [3, 3, 4, 3], "one of them has a reference, and is edited without it too"


def test_a_card_has_every_run_before_from_whatever_folder_it_is_written(tmp_path):
    for run_, began in (("1", {}), ("2", {"weights": "../1"})):
        checkpoint = tmp_path / run_ / "step-000005"
        checkpoint.mkdir(parents=True)
        (checkpoint / "train.json").write_text('{"counts": {"step": 5, "samples": 10, "seconds": 3}}')
        args = {"stage": int(run_), "weights": began and "runs/1"}
        (tmp_path / run_ / "config.json").write_text(json.dumps({"args": args, "began": began}))
    rows = ship.phases_of(checkpoint / "weights.safetensors", tmp_path)
    assert rows == [["train.py stage 1", 1, 5, 10, 3], ["train.py stage 2", 1, 5, 10, 3]]


def test_a_perfect_edit_is_recognised_and_sharp_and_the_source_and_a_blur_are_not(edits, library):
    for index, edit in list(enumerate(edits["test"][:40]))[::5]:
        source, target, region = world.draw_frames(edit, 64)
        measures = evaluate.measure(target, target, region)
        assert measures["psnr_in"] == pytest.approx(60) and measures["ssim_in"] == pytest.approx(1)
        assert evaluate.measure(source, target, region)["psnr_in"] < 40
        if edit.new or edit.task == "remove":
            assert all(evaluate.recognise(edit, library, target, region, index).values())
            assert not all(evaluate.recognise(edit, library, source, region, index).values())
    target = world.draw_frames(edits["test"][3], 64)[1]
    region = torch.ones(target.shape[:3], dtype=torch.bool).tril()
    blur = F.avg_pool2d(target.mT.float(), (1, 3), 1, (0, 1), count_include_pad=False).mT.to(torch.uint8)
    truth, soft = ([evaluate.measure(result, target, region)] for result in (target, blur))
    assert evaluate.sharpness(truth, "in") == 1 == evaluate.sharpness(truth, "out")
    assert evaluate.sharpness(soft, "in") < 0.8 and math.isnan(evaluate.sharpness([], "in"))


def test_bench_writes_what_judge_reads_and_eval_wants_held_out_clips(tmp_path, nano_data):
    nano("bench", tmp_path, "--items", 2, "--frames", 5, "--workers", 1)
    items = judge.read_bench("refvie", tmp_path / "refvie_bench.yaml", tmp_path / "edits")
    assert len(items) == 2 and all(item.source.is_file() and item.ref.is_file() for item in items)
    with pytest.raises(ValueError, match="of the train split"):
        nano("eval", "--weights", "w", "--data", nano_data, "--out", tmp_path / "r")


def test_reports_are_compared_case_by_case_over_their_seeds(tmp_path, capsys):
    for name, gain in (("a0", 3.0), ("a1", 1.0), ("b0", 0.0)):
        measures = [{"edit": {"psnr_in": 20 + 5 * i + gain, "psnr_out": 30, "right": i > 0}} for i in range(12)]
        cases = [{"index": i, "task": "add", "measures": m} for i, m in enumerate(measures)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps({"cases": cases}))
    nano("compare", tmp_path / "a0", tmp_path / "a1", "--to", tmp_path / "b0")
    assert "| add | 12 | 2.00 [2.00, 2.00] | 0.000 [0.000, 0.000] | 0.000 [0.000, 0.000] |" in capsys.readouterr().out


def test_the_walkthrough_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(HOUSE)
    text, names = (HOUSE / "docs/walkthrough.md").read_text(), {}
    cells = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", text, re.DOTALL)
    assert len(cells) == 10 == text.count("```python") == len(re.findall(r"\(Section \d", text))
    for code, printed in cells:
        exec(code, names)
        assert capsys.readouterr().out == printed, code


@pytest.mark.parametrize("arguments, says", [
    ("data x --size 50", "multiple of 32"), ("data x --frames 8", "4k + 1"), ("data x --assets .", "nano assets"),
    ("pretrain vae --data x --out y", "nano data"), ("eval --weights w --data x --out y", "nano data"),
    ("ship c --weights w --data x --example 1 --made-by m --out y", "give a run"),
])  # fmt: skip
def test_what_nano_cannot_do_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nano", *arguments.split()])
    with pytest.raises(SystemExit) as exit_, one_line("nano"):
        main()
    told = capsys.readouterr().err if exit_.value.code == 2 else exit_.value.code
    assert says in told.strip().splitlines()[-1]


def test_an_archive_that_is_not_the_checked_one_is_refused(tmp_path):
    (tmp_path / "pmndrs-assets-1.7.0.tgz").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the archive"):
        data.fetch_package("@pmndrs/assets", tmp_path)
    assert data.plain_name({"name": "DOG FACE", "category": "Animals & Nature"}) == "dog"
    assert data.plain_name({"name": "Clock Face One Oclock", "category": "Travel & Places"}) is None
