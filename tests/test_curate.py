"""Tests of curate.py"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import curate
import data
import judge
import media
import vlm
from conftest import (
    BLUE,
    GREEN,
    HOUSE,
    RED,
    SHARED,
    close,
    demo,
    moving_picture,
    randomise,
    smooth_clip,
    tiny_local_judge,
    write_clip,
)
from data import read_table
from media import MediaError, read_image, write_image, write_video
from nano.world import WORDINGS


def curated(data, out, *more, tables=("ref_video.csv", "video.csv", "image.csv")):
    """Curate the small world's pairs, shards of 5 -> the records of the last stage."""
    curate.main(
        [*map(str, [*(data / name for name in tables), "--out", out, "--min-side", 8, "--shard-rows", 5, *more])]
    )
    return records_in(out)


def records_in(out, stage="deduplicate"):
    return [
        row for path in sorted((Path(out) / "ledger" / stage).glob("*.jsonl")) for row in curate.read_json_lines(path)
    ]


@pytest.fixture(scope="session")
def quadruplets(tmp_path_factory, nano_data):
    out = tmp_path_factory.mktemp("curate") / "out"
    curated(nano_data, out)
    return out


def test_pairs_become_quadruplets_that_training_reads(quadruplets, nano_data):
    rows = records_in(quadruplets)
    kept = [row for row in rows if row["status"] == "kept"]
    assert len(rows) == 16 and len(kept) >= 4 and {row["kind"] for row in kept} == {"subject", "background"}
    assert all(row["reason"] and row["stage"] in curate.STAGES for row in rows if row["status"] != "kept")
    common = os.path.commonpath([quadruplets, nano_data])
    table = read_table(quadruplets / "ref_video.csv", "ref", common)
    assert [Path(row.ref) for row in table] == [quadruplets / row["ref_image"] for row in kept]
    assert all(data.read_reference(row.ref).shape[0] >= 8 and not data.check_row(row)[1] for row in table)
    page = (quadruplets / "page.html").read_text()
    assert (
        page.count('class="card"') == len(kept) and not re.search(r'(src|href)="(?!data:)', page) and "%(" not in page
    )
    assert f"| deduplicate | {len(kept)} |" in (quadruplets / "funnel.md").read_text()


def test_refvie_s_parquet_holds_the_references(quadruplets, nano_data):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    kept = [row for row in records_in(quadruplets) if row["status"] == "kept"]
    table = read_table(quadruplets / "refvie.parquet", "ref", nano_data)
    for row, record in zip(table, kept, strict=True):
        assert torch.equal(data.read_reference(row.ref), read_image(quadruplets / record["ref_image"]))


def test_classical_models_find_what_was_edited(nano_data):
    things, pixels, psnr, (precision, recall) = (
        [float(x) for x in re.findall(r"[\d.]+", line.split("|")[-2])]
        for line in curate.measure_on_truth(nano_data).splitlines()[2:]
    )
    assert (
        things[0] > 0.7
        and things[1] > 0.8
        and pixels[0] > 0.6
        and pixels[1] > 0.65
        and psnr[0] > 20
        and precision == recall == 1
    )


def test_a_ledger_read_again_takes_other_thresholds_and_asks_no_model(tmp_path, quadruplets, monkeypatch):
    for work in ("setup", "score", "ground", "synthesize", "verify", "embed"):
        monkeypatch.setattr(curate.Classical, work, None)
    scores = sorted(row["edit_score"] for row in records_in(quadruplets, "verify") if row["status"] == "open")
    rows = curated(quadruplets, tmp_path / "strict", "--min-ref-score", scores[-1], tables=["ledger/verify"])
    kept = [row for row in rows if row["status"] == "kept"]
    assert 0 < len(kept) == scores.count(scores[-1])
    small = curated(quadruplets, tmp_path / "large", "--min-side", 2000, tables=["ledger/verify"])
    assert any("a side below 2000" in row.get("reason", "") for row in small) and not any(
        row["status"] == "kept" for row in small
    )
    with pytest.raises(ValueError, match="features of --models classical"):
        curated(quadruplets, tmp_path / "mixed", "--models", "paper", tables=["ledger/verify"])
    assert all((tmp_path / "strict" / row["ref_image"]).is_file() for row in kept)
    again = curated(quadruplets, tmp_path / "strict", "--min-ref-score", scores[-1], tables=["ledger/verify"])
    assert again == rows
    with pytest.raises(ValueError, match="was made with min_score 6.0, not 7.0: give another --out"):
        curated(
            quadruplets, tmp_path / "strict", "--min-ref-score", scores[-1], "--min-score", 7, tables=["ledger/verify"]
        )


def test_what_failed_in_another_run_is_not_asked_again_when_its_ledger_is_read(tmp_path, quadruplets, monkeypatch):
    monkeypatch.setattr(curate.Classical, "setup", None)
    shutil.copytree(quadruplets, tmp_path / "first")
    path = min((tmp_path / "first" / "ledger" / "verify").glob("*.jsonl"))
    row, *rows = curate.read_json_lines(path)
    row = {key: value for key, value in row.items() if key not in ("edit_score", "frame_scores")}
    curate.write_json_lines(path, [row | {"status": "failed", "stage": "score", "reason": "no memory"}, *rows])
    found = curated(tmp_path / "first", tmp_path / "second", tables=["ledger/verify"])
    assert [row["reason"] for row in found if row["status"] == "failed"] == ["no memory"] and not found[0].get("tuning")
    monkeypatch.undo()
    again = curated(tmp_path / "first", tmp_path / "second", "--retry-failed", tables=["ledger/verify"])
    assert not any(row["status"] == "failed" for row in again) and again[0]["edit_score"] > 0


def test_bad_pairs_cost_only_themselves_and_can_be_tried_again(tmp_path, nano_data, quadruplets, capsys):
    for file in ("ref_video.csv", "ref_video"):
        (tmp_path / file).symlink_to(nano_data / file) if file == "ref_video" else shutil.copy(
            nano_data / file, tmp_path
        )
    shutil.copytree(nano_data / "ref_video", tmp_path / "clips")
    lines = (tmp_path / "ref_video.csv").read_text().replace("ref_video/", "clips/").splitlines()
    broken = sorted((tmp_path / "clips").glob("*_tgt.mp4"))[0]
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    (tmp_path / "p.csv").write_text(
        "\n".join([*lines, "clips/none.mp4,clips/none.mp4,Add a hat.,x", "../a.mp4,b.mp4,Add a hat.,x", "a,b,,x"])
    )
    rows = curated(tmp_path, tmp_path / "out", tables=["p.csv"])
    reasons = [row["reason"] for row in rows if row["status"] == "failed"]
    assert len(reasons) == 4 and len([row for row in rows if row["status"] == "kept"]) >= 1
    for reason, words in zip(reasons, ("has no pictures", "no such file", "is outside of", "prompt is empty")):
        assert words in reason
    before = records_in(tmp_path / "out")
    broken.write_bytes(content)
    after = curated(tmp_path, tmp_path / "out", "--retry-failed", tables=["p.csv"])
    healed = [new for old, new in zip(before, after) if old["status"] == "failed" != new["status"]]
    assert len(healed) == 1 and broken.name in healed[0]["tgt_video"]


def test_odd_lines_of_a_table_cost_only_themselves_and_odd_fields_nothing(tmp_path, nano_data, quadruplets):
    good = {
        key: line[key]
        for line in [next(csv.DictReader((nano_data / "ref_video.csv").open()))]
        for key in data.COLUMNS["video"]
    }
    odd = {
        "edit_type": 7,
        "frames": "9",
        "edit_score": "high",
        "mask": "/etc/passwd",
        "ref_image": b"".hex(),
        "verdict": "yes",
    }
    made = {
        "edit_score": 9.5,
        "box": [0, 0, 1, 1],
        "key": 0,
        "mask": "masks/x.png",
        "ref_image": "/etc/passwd",
        "verdict": True,
        "feature": "AAAA",
    }
    lines = [json.dumps(good | odd), "{half", "[]", json.dumps(good | {"prompt": ["x"]}), json.dumps(good | made),
             json.dumps(good | {"edit_score": 10**400}), json.dumps(good | {"prompt": "half \ud83d"})]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows = curated(tmp_path, tmp_path / "out", "--base-path", nano_data, "--duplicate", 1, tables=["p.jsonl"])
    assert [row["status"] == "failed" for row in rows] == [False, True, True, True, False, False, True]
    first = next(row for row in records_in(quadruplets) if row["src_video"] == good["src_video"])
    assert [row["edit_score"] for row in rows if "edit_score" in row] == [first["edit_score"], 9.5, first["edit_score"]]
    assert "passwd" not in (tmp_path / "out/ref_video.csv").read_text()
    shutil.copytree(tmp_path / "out/ledger", tmp_path / "theirs/ledger")
    shard = tmp_path / "theirs/ledger/verify/00000.jsonl"
    shard.write_text(re.sub(r"masks/[^\"]*", "../../secret.png", shard.read_text()))
    with pytest.raises(ValueError, match="line 1: ../../secret.png is outside of"):
        curated(tmp_path, tmp_path / "again", tables=["theirs/ledger/verify"])


def test_a_run_that_is_barred_keeps_what_was_answered_and_asks_it_no_more(tmp_path, nano_data, monkeypatch):
    asked, score = [], curate.Classical.score

    def barred_at_the_fourth(models, source, target, row):
        asked.append(row["id"])
        if len(asked) == 4:
            raise curate.Barred("the key is refused")
        return score(models, source, target, row)

    monkeypatch.setattr(curate.Classical, "score", barred_at_the_fourth)
    with pytest.raises(curate.Barred):
        curated(nano_data, tmp_path / "out", "--workers", 1, "--shard-rows", 100)
    curated(nano_data, tmp_path / "out", "--workers", 1, "--shard-rows", 100)
    assert asked.count(asked[3]) == 2 and len(asked) == len(set(asked)) + 1


def test_a_full_disk_stops_the_run_and_fails_no_record(tmp_path, nano_data, monkeypatch):
    def full(path, image):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise MediaError(f"{path}: cannot be written") from None

    monkeypatch.setattr(curate, "write_image", full)
    with pytest.raises(MediaError, match="cannot be written"):
        curated(nano_data, tmp_path / "out")
    monkeypatch.undo()
    assert not any(row["status"] == "failed" for row in curated(nano_data, tmp_path / "out"))


def test_a_ledger_is_an_input_only_where_its_stage_is_whole_and_what_failed_stays_so(
    tmp_path, nano_data, quadruplets, monkeypatch
):
    theirs = Path(shutil.copytree(quadruplets, tmp_path / "theirs"))
    shard = theirs / "ledger/verify/00000.jsonl"
    rows = list(curate.read_json_lines(shard))
    number = next(i for i, row in enumerate(rows) if row["status"] == "open")
    rows[number] = curate.ended(rows[number], "verify", "failed", "no answer") | {"verdict": None}
    curate.write_json_lines(shard, rows)
    before = records_in(theirs, "verify")
    kept = curated(theirs / "ledger", tmp_path / "again", tables=["verify"])
    assert (kept[number]["status"], kept[number]["reason"]) == ("failed", "no answer") and len(kept) == len(before)
    assert (
        curated(theirs / "ledger", tmp_path / "asked", "--retry-failed", tables=["verify"])[number]["status"] == "kept"
    )
    last = sorted(shard.parent.iterdir())[-1]
    last.unlink()
    with pytest.raises(ValueError, match="that stage is not done"):
        curated(theirs / "ledger", tmp_path / "part", tables=["verify"])
    with pytest.raises(ValueError, match="ledger/synthesize as its input keeps what was paid for"):
        curated(nano_data, theirs, "--min-ref-score", 9)


@pytest.mark.parametrize(
    "line, says",
    [("a.mp4,b.mp4,Replace it, then leave", "line 3: more fields"), ('a.mp4,b.mp4,"Add a hat', "a quote not closed")],
)
def test_a_table_that_csv_would_misread_is_refused(tmp_path, line, says):
    (tmp_path / "p.csv").write_text(f"src_video,tgt_video,prompt\na.mp4,b.mp4,Add a hat.\n{line}\n")
    with pytest.raises(ValueError, match=says):
        curated(tmp_path, tmp_path / "out", tables=["p.csv"])


def test_json_that_begins_with_a_mark_is_read_and_what_is_broken_is_named(tmp_path):
    table, told, bench = tmp_path / "p.json", tmp_path / "ledger" / "read.json", tmp_path / "b.yaml"
    table.write_text('[{"src_video": "a.mp4"}]', encoding="utf-8-sig")
    assert len(list(curate.read_lines(table))) == 1
    told.parent.mkdir()
    table.write_text("[" * 100_000), told.write_text(""), bench.write_text("- instruction: 2020-13-45")
    for says, read in (
        ("p.json: is not JSON", lambda: list(curate.read_lines(table))), ("read.json: is not JSON", lambda: curate.Ledger(tmp_path).told),
        ("b.yaml: is not YAML", lambda: judge.read_bench("refvie", bench, "edits")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            read()


@pytest.mark.parametrize("name, more, says", [
    ("caf\udce9", (), "its name is no UTF-8 text"), ("in", ("--rejects", "none.json"), "none.json"), ("in", ("--guard", "in"), "broken.png"),
])  # fmt: skip
def test_what_would_spoil_the_result_is_told_of_before_the_work(tmp_path, nano_data, monkeypatch, name, more, says):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    shutil.copy(nano_data / "ref_video.csv", name)
    Path("in").mkdir(exist_ok=True)
    Path("in/broken.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError), match=says):
        curated(Path(name), Path("out"), *more, tables=["ref_video.csv"])
    assert not Path("out/ledger/score").exists()


def test_the_measure_of_scale_runs_the_real_bookkeeping(tmp_path):
    assert "40 records through four stages" in curate.measure_scale(tmp_path, records=40, vectors=30, width=8)


def test_a_key_with_a_line_s_end_is_that_key_and_never_told(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    assert vlm.key_of("OPENAI_API_KEY") == "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has a character that no key has") as error:
        curate.open_model("http://127.0.0.1:9/v1", "cpu")
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize("gone_on", [True, False])
def test_a_shard_that_fails_as_a_whole_stops_the_run_and_is_tried_again_when_it_is_mended(tmp_path, nano_data, gone_on):
    pair = next(csv.DictReader((nano_data / "ref_video.csv").open()))
    (tmp_path / "p.csv").write_text(
        "src_video,tgt_video,prompt\n" + "refs/a.mp4,refs/b.mp4,Add a hat.\n" * 20
    )  # not --out's refs
    with pytest.raises(
        ValueError, match="all 20 records of a shard failed in `score`.*mend that and add --retry-failed"
    ):
        curated(tmp_path, tmp_path / "out", "--shard-rows", 20, tables=["p.csv"])
    if gone_on:
        with pytest.raises(ValueError, match="not one of 20 records could be worked on"):
            curated(tmp_path, tmp_path / "out", "--shard-rows", 20, tables=["p.csv"])
        assert all(row["status"] == "failed" for row in records_in(tmp_path / "out"))
    (tmp_path / "refs").mkdir()
    for name, key in (("a", "src_video"), ("b", "tgt_video")):
        shutil.copy(nano_data / pair[key], tmp_path / "refs" / f"{name}.mp4")
    rows = curated(tmp_path, tmp_path / "out", "--shard-rows", 20, "--retry-failed", tables=["p.csv"])
    assert len(rows) == 20 and not any(row["status"] == "failed" for row in rows)


def test_a_shard_half_done_is_finished_without_asking_again(tmp_path, nano_data, quadruplets, monkeypatch):
    out = Path(shutil.copytree(quadruplets, tmp_path / "out"))
    whole = out / "ledger/verify/00000.jsonl"
    done = [line for line in whole.read_text().splitlines(True) if json.loads(line).get("passed") == "verify"]
    whole.with_suffix(".part").write_text(
        "".join(done) + "\0\0\n" + '{"id": "00000'
    )  # what died left zeros, and half a line
    whole.unlink(), shutil.rmtree(out / "ledger/deduplicate")
    for work in ("setup", "score", "ground", "synthesize", "verify", "embed"):
        monkeypatch.setattr(curate.Classical, work, None)
    curated(nano_data, out)
    assert done and same_result(out, quadruplets)


def test_a_run_in_which_every_record_fails_ends_in_an_error(tmp_path, nano_data):
    shutil.copy(nano_data / "ref_video.csv", tmp_path / "p.csv")  # away from its clips
    with pytest.raises(ValueError, match="not one of [0-9]+ records could be worked on"):
        curated(tmp_path, tmp_path / "out", tables=["p.csv"])


def test_a_middling_edit_is_for_instruction_tuning_alone_and_a_poor_one_for_nothing(tmp_path, nano_data):
    pair = next(csv.DictReader((nano_data / "ref_video.csv").open()))
    good = {key: pair[key] for key in data.COLUMNS["video"]}
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(good | {"edit_score": s}) for s in (5.9, 6.0, 7.9)))
    rows = curated(tmp_path, tmp_path / "out", "--base-path", nano_data, tables=["p.jsonl"])
    assert [(row["status"], row["tuning"]) for row in rows] == [
        ("rejected", False),
        ("rejected", True),
        ("rejected", True),
    ]
    assert len(list(csv.DictReader((tmp_path / "out/video.csv").open()))) == 2


def test_a_score_that_a_table_brings_does_not_make_up_for_a_missing_source(tmp_path, nano_data):
    target = next(csv.DictReader((nano_data / "video.csv").open()))["tgt_video"]
    (tmp_path / "p.csv").write_text(
        f"src_video,tgt_video,prompt,edit_score\nnone.mp4,{target},Add a hat.,7\n{target},{target},Add a hat.,7\n"
    )
    gone, there = curated(tmp_path, tmp_path / "out", "--base-path", nano_data, tables=["p.csv"])
    assert "none.mp4: no such file" in gone["reason"] and "enough for instruction tuning only" in there["reason"]
    assert len((tmp_path / "out" / "video.csv").read_text().splitlines()) == 2


def test_frames_to_be_scored_correspond_whatever_rate_the_files_claim(tmp_path):
    frames = moving_picture(65, 32, 32)
    for name, fps, count in (("source", 30, 65), ("edit", 15, 61)):  # cut to 4k + 1, as the release does
        write_video(tmp_path / f"{name}.mp4", frames[:count], fps, None, media.EXACT_VIDEO_CODEC)
    source, edit, indices = curate.look_at_pair(tmp_path / "source.mp4", tmp_path / "edit.mp4")
    assert (source - edit).abs().mean() < 0.005 and indices[-1] == 60
    asked = []
    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    models.scorer = None
    models.ask = lambda model, prompt, images, read: asked.append(images) or read('{"score": [20, 20]}')
    assert models.score(tmp_path / "source.mp4", tmp_path / "edit.mp4", {"prompt": "x"}) == [8.0] * 5
    pairs = [images for images in asked if len(images) == 2]
    assert all((p["source"].float() - p["edited"].float()).abs().mean() < 3 for p in pairs)


@pytest.mark.parametrize("edit_type, prompt, kind", [
    ("Local Modification", "x", "subject"), ("Background Replacement", "x", "background"), ("camera_edit", "Replace it.", "other"),
    ("object swap", "Remove the dog.", "remove"), (None, "Make it look like a painting.", "style"),
    (None, "Cut the cat out of the video.", "remove"), (None, "I want a hat on it.", "subject"), (None, "Let it be night.", "style"),
    (None, "Remove the man in front of the shop.", "remove"), (None, "Add a red car in front of the house.", "subject"),
    (None, "Replace the woman behind the counter with a robot.", "subject"), (None, "Delete the dog in the background.", "remove"),
    (None, "Remove the background and show a beach.", "background"), (None, "Move everything in front of a lake.", "background"),
    (None, "Replace her hair with a hair style of the eighties.", "subject"), (None, "Zoom in slowly.", "other"),
    (None, "Add a lamp that blends into the surroundings.", "subject"), (None, "Delete the cat and put a dog there.", "subject"),
    (None, "Replace his coat with a red one, matching the lighting and colours of the environment.", "subject"),
])  # fmt: skip
def test_an_edit_s_kind_is_its_type_where_that_is_known_else_what_its_words_say(edit_type, prompt, kind):
    assert curate.kind_of(edit_type, prompt) == kind


def test_the_kind_of_an_edit_is_told_from_nearly_all_of_the_world_s_wordings():
    fill = {
        "a": "red car on the left",
        "b": "a lamp",
        "w": "at the top",
        "s": "night",
        "p": "blue stripes",
        "clip": "video",
    }
    for split, least in ("train", 0.95), ("test", 1):
        told = [
            curate.kind_of(None, w.format(**fill)) == curate.TYPES[task]
            for task, ws in WORDINGS[split].items()
            for w in ws
        ]
        assert sum(told) >= least * len(told)


def same_result(out, expected):
    """Two runs left the same ledger and pictures, and nothing half done."""
    names = [
        sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.suffix in (".jsonl", ".png", ".part"))
        for f in (out, expected)
    ]
    return names[0] == names[1] and all(
        (out / name).read_bytes() == (expected / name).read_bytes() for name in names[0]
    )


def start_curate(data, out, *more, **environment):
    tables = [data / name for name in ("ref_video.csv", "video.csv", "image.csv")]
    words = [sys.executable, HOUSE / "curate.py", *tables, "--out", out, "--min-side", 8, "--shard-rows", 5, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def test_runs_that_are_killed_and_resumed_end_as_one_run(tmp_path, nano_data, quadruplets):
    stages = ("score", "ground", "verify")
    for stage in stages:
        process = start_curate(nano_data, tmp_path / "out", "--workers", "1")
        while process.poll() is None and not (tmp_path / "out" / "ledger" / stage).is_dir():
            time.sleep(0.005)
        process.kill()
        process.wait()
    part = tmp_path / "out" / "ledger" / "verify" / "00000.part"
    part.write_bytes(part.read_bytes() + b'{"id": "00000') if part.is_file() else None
    curated(nano_data, tmp_path / "out")
    assert same_result(tmp_path / "out", quadruplets)


def test_two_processes_do_what_one_does(tmp_path, nano_data, quadruplets):
    runs = [start_curate(nano_data, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2") for rank in (1, 0)]
    assert [run.wait(timeout=600) for run in runs] == [0, 0]
    assert same_result(tmp_path / "out", quadruplets)


def test_a_world_size_without_torchrun_is_not_waited_for(tmp_path, nano_data, quadruplets, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(curate, "wait_for", lambda ready, what: ready() or pytest.fail(f"waits for {what}"))
    curated(nano_data, tmp_path / "out")
    assert same_result(tmp_path / "out", quadruplets)


def test_ray_data_does_what_one_process_does(tmp_path, nano_data, quadruplets):
    pytest.importorskip("ray", reason="needs Ray Data: pip install 'ray[data]'")
    run = start_curate(nano_data, tmp_path / "out", "--engine", "ray")
    text = run.communicate(timeout=300)[0].decode()
    assert run.returncode == 0, text[-2000:]
    assert same_result(tmp_path / "out", quadruplets)


def test_a_person_s_rejects_and_a_benchmark_s_pictures_leave_the_result(tmp_path, nano_data, quadruplets):
    kept = [row["id"] for row in records_in(quadruplets) if row["status"] == "kept"]
    out = shutil.copytree(quadruplets, tmp_path / "out")
    (tmp_path / "rejects.json").write_text(json.dumps({kept[0]: "torn"}))
    curated(nano_data, out, "--rejects", tmp_path / "rejects.json")
    table = list(csv.DictReader((out / "ref_video.csv").open()))
    assert len(table) == len(kept) - 1 and "| person | rejected | torn | 1 |" in (out / "funnel.md").read_text()
    assert f'out={{"{kept[0]}": "torn"}}' in (out / "page.html").read_text()  # saved again with what comes to it
    tuned = lambda folder: sum(len((folder / name).read_text().splitlines()) - 1 for name in ("video.csv", "image.csv"))
    assert tuned(out) == tuned(quadruplets) - 1
    (tmp_path / "bench/b").mkdir(parents=True)
    shutil.copy(quadruplets / "refs" / kept[1][:-3] / f"{kept[1]}.png", tmp_path / "bench" / "theirs.png")
    write_image(tmp_path / "bench/b/theirs.png", torch.zeros(64, 64, 3, dtype=torch.uint8))  # of the same name
    rows = curated(nano_data, tmp_path / "guarded", "--guard", tmp_path / "bench", tables=["ref_video.csv"])
    assert [row["id"] for row in rows if "resembles theirs.png of the benchmark" in row.get("reason", "")] == [kept[1]]
    assert not any(row["tuning"] for row in rows if row["id"] == kept[1])


def test_duplicates_go_only_where_they_are_close_to_one_that_is_kept():
    angle = torch.arange(40) * 0.1 + 0.02 * torch.rand(40)  # a chain: neighbours 0.995 alike, its ends not at all
    chain = torch.stack([angle.cos(), angle.sin()], dim=1)
    order = np.random.default_rng(0).permutation(40)
    expected, kept = np.arange(40), []
    for i in order:
        near = max(kept, key=lambda k: float(chain[i] @ chain[k]), default=None)
        if near is not None and float(chain[i] @ chain[near]) > 0.99:
            expected[i] = near
        else:
            kept.append(i)
    for block in (3, 7, 64):
        belongs, nearest = curate.deduplicate(chain, order, 0.99, block)
        assert np.array_equal(belongs, expected)
        assert all((nearest[i] > 0.99) == (belongs[i] != i) for i in range(40))
    assert 10 < len(kept) < 40


GOOD_BOX, WHOLE_BOX = '{"bbox_2d": [100, 200, 500, 800], "label": "a red car"}', '{"bbox_2d": [0, 0, 1000, 1000]}'


@pytest.mark.parametrize("answer, box", [
    (f"[{GOOD_BOX}]", "a red car"), (f"```json\n[{GOOD_BOX}]\n```", "a red car"), (f"Here: {GOOD_BOX} and so on", "a red car"),
    ("[" + f"{GOOD_BOX}, " * 30 + '{"bbox_2d": [100, 2', "a red car"), ('[{"bbox_2d": [100, 200, 500, 800]}]', "object"),
    ("{'bbox': [100.0,200.0,500.0,800.0]}", "object"), (f'[{{"bbox_2d": [1, 1, 50, 60]}}, {GOOD_BOX}]', "a red car"),
    (GOOD_BOX.replace("a red car", "the man's hat"), "the man's hat"), ('[{"label": "a dog", "bbox_2d": [100, 200, 500, 800]}]', "a dog"),
    ("[]", curate.Rejected), ("I see no car.", curate.Malformed), ('[{"bbox_2d": [500, 200, 100, 800]}]', curate.Rejected),
    (f"[{WHOLE_BOX}]", curate.Rejected), ('[{"bbox_2d": [10, 10, 12, 12]}]', curate.Rejected), ('{"bbox_2d": [1, 2, 3]}', curate.Malformed),
])  # fmt: skip
def test_a_grounder_s_answer_gives_a_box_or_a_reason(answer, box):
    if isinstance(box, str):
        assert curate.read_box(answer) == ([0.1, 0.2, 0.5, 0.8], box)
    else:
        pytest.raises(box, curate.read_box, answer)


@pytest.mark.parametrize("answer, scores", [
    ('{"reasoning": "fine", "score": [20, 25]}', [20, 25]), ('```json\n{"score": [7, 0]}\n```', [7, 0]), ('So {"score": [3, 4', None),
    ('"score": [12, 13], "reasoning": "broke off', [12, 13]), ('{"score": [20, 26]}', None), ('{"score": [20]}', None), ("20 and 25", None),
    ('{"score": [true, 20]}', None), ("", None),
])  # fmt: skip
def test_a_scorer_s_answer_that_cannot_be_read_is_no_score(answer, scores):
    if scores:
        assert curate.read_scores(answer) == scores
    else:
        pytest.raises(curate.Malformed, curate.read_scores, answer)


def test_a_verifier_s_answer_is_read_or_refused():
    assert curate.read_verdict('Well. {"reason": "same cup", "match": true}') == (True, "same cup")
    assert curate.read_verdict('{"match": "No", "reason": "blue"}') == (False, "blue")
    assert curate.read_verdict('{"match": true, "reason": "half \\ud83d"}')[
        1
    ].encode()  # or no table could be written any more
    for answer in ('{"match": "perhaps"}', "", '"match": true or "match": false'):
        pytest.raises(curate.Malformed, curate.read_verdict, answer)


def tiny_paper_models(folder, kind, said):
    """The paper's models, each of some 100,000 random weights, that answer as `said` has it (prompt -> text): they run,
    and what they mumble is replaced at the last moment."""
    from transformers import CLIPConfig, CLIPModel, Sam3TrackerConfig, Sam3TrackerModel

    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--models", "paper", "--device", "cpu"]))
    asked = vlm.Local(tiny_local_judge(folder, kind), vlm.Settings(device="cpu", max_pixels=64 * 64, max_tokens=2))
    mumble = asked.ask

    def ask(prompt, media, fps):
        try:
            answer = mumble(prompt, media, fps)
        except vlm.Malformed as error:  # cut off after 2 tokens
            answer = error.answer
        return replace(answer, text=said(prompt, media))

    asked.ask = ask
    models.scorer = models.grounder = models.verifier = asked
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    backbone = dict(
        small, image_size=112, patch_size=14, window_size=4, global_attn_indexes=[0], pretrain_image_size=112
    )
    sizes = [[32, 32], [16, 16], [8, 8]]
    config = Sam3TrackerConfig(
        vision_config=dict(backbone_config=dict(backbone, model_type="sam3_vit_model"), fpn_hidden_size=32, backbone_feature_sizes=sizes),
        prompt_encoder_config=dict(hidden_size=32, image_size=112), mask_decoder_config=dict(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32),
    )  # fmt: skip
    models.segmenter = Sam3TrackerModel(config).eval()
    models.embedder = CLIPModel(
        CLIPConfig(text_config=small, vision_config=dict(small, image_size=32, patch_size=8), projection_dim=24)
    ).eval()
    return models


def paper_answers(prompt, media):
    if "two whole numbers" in prompt:
        return '{"score": [25, 16]}' if "natural" in prompt else '{"score": [25, 25]}'
    return f"[{GOOD_BOX}]" if "bbox_2d" in prompt else '{"match": true, "reason": "same"}'


def in_pixels(prompt, media):  # as Qwen2.5-VL counts: a frame of 64 x 64 is shown to it as 56 x 56
    return paper_answers(prompt, media).replace("[100, 200, 500, 800]", "[5.6, 11.2, 28, 44.8]")


class Editor:
    """Stands where diffusers' pipeline of 20 billion weights would, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, image, prompt, negative_prompt, true_cfg_scale, generator):
        from PIL import Image

        self.asked.append((prompt, negative_prompt, true_cfg_scale, torch.rand(1, generator=generator).item()))
        picture = torch.full((96, 96, 3), 255, dtype=torch.uint8)
        picture[24:80, 16:72] = torch.from_numpy(np.array(image[0]).reshape(-1, 3).mean(axis=0).astype(np.uint8))
        return type("Made", (), {"images": [Image.fromarray(picture.numpy())]})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_paper_s_models_go_through_all_stages(tmp_path, nano_data, kind, monkeypatch):
    pytest.importorskip("PIL", reason="needs Pillow, as diffusers does: pip install pillow")
    models = tiny_paper_models(tmp_path / "mllm", kind, in_pixels if kind == "qwen2_5_vl" else paper_answers)
    models.editor = Editor()
    monkeypatch.setattr(curate, "segment", lambda model, frame, box, true=curate.segment: (
        true(model, frame, box) | True) & torch.nn.functional.pad(torch.ones(20, 20, dtype=bool), (10, 34, 15, 29)))  # fmt: skip
    monkeypatch.setattr(curate.Paper, "setup", lambda self, stage: self.__dict__.update(models.__dict__))
    monkeypatch.setattr(curate, "editor_is_installed", lambda: None)
    rows = curated(nano_data, tmp_path / "out", "--models", "paper", tables=["ref_video.csv"])
    live = [row for row in rows if row["status"] != "rejected" or row["stage"] == "deduplicate"]
    assert len(live) == len([row for row in rows if row["kind"] in curate.KINDS]) >= 2
    assert all(
        row["edit_score"] == 8.0 and row["label"] == "a red car" and row["verdict_reason"] == "same" for row in live
    )
    assert {asked[1:3] for asked in models.editor.asked} == {(" ", 4.0)} and len(
        {seed for *_, seed in models.editor.asked}
    ) == len(live)
    assert all("a red car" in prompt for prompt, *_ in models.editor.asked)


def test_sam_s_mask_and_clip_s_features_have_the_frame_s_shape_and_length_one(tmp_path):
    models = tiny_paper_models(tmp_path / "mllm", "qwen3_vl", paper_answers)
    frame = torch.randint(255, (60, 90, 3), dtype=torch.uint8)
    mask = curate.segment(models.segmenter, frame, [0.1, 0.2, 0.5, 0.8])
    assert mask.shape == (60, 90) and mask.dtype == torch.bool
    features = models.embed([frame, frame.flip(0)])
    assert features.shape == (2, 24) and close(features.norm(dim=1), torch.ones(2))
    assert torch.equal(models.embed([frame])[0], models.embed([frame])[0])


@pytest.mark.parametrize("style", ["base_model.model.model.language_model.layers", "base_model.model.model.layers"])
def test_a_released_adapter_is_merged_as_its_file_says(tmp_path, style):
    asked = vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen3_vl"), vlm.Settings(device="cpu"))
    weight = asked.mllm.model.language_model.layers[1].self_attn.q_proj.weight
    before, a, b = weight.detach().clone(), torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    name = f"{style}.1.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    curate.add_adapter(asked.mllm, tmp_path)
    assert close(weight - before, 2 * b @ a)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True})
    )
    curate.add_adapter(asked.mllm, tmp_path)
    assert close(weight - before, 6 * b @ a)  # 8 / sqrt(4) more
    save_file(
        {
            "base_model.model.elsewhere.layers.9.q.lora_A.weight": a,
            "base_model.model.elsewhere.layers.9.q.lora_B.weight": b,
        },
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="finds no place"):
        curate.add_adapter(asked.mllm, tmp_path)
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.bias": torch.zeros(3)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="not pairs of lora_A and lora_B alone"):
        curate.add_adapter(asked.mllm, tmp_path)


def test_the_published_sets_are_read_in_their_own_formats(tmp_path, capsys):
    (tmp_path / "ditto" / "training_metadata").mkdir(parents=True)
    line = {"source_path": "s/a.mp4", "edited_path": "e/a.mp4", "instruction": "Replace the background with snow."}
    (tmp_path / "ditto" / "training_metadata" / "x.json").write_text(json.dumps([line]))
    (tmp_path / "reco" / "remove").mkdir(parents=True)
    (tmp_path / "reco" / "remove" / "remove_data_configs.json").write_text(
        json.dumps([{"src_video": "1.mp4", "instruction": "Remove it."}])
    )
    (tmp_path / "openve.csv").write_text("original_video,video,prompt\no/1.mp4,v/1.mp4,Add a hat.\n")
    inputs = [str(tmp_path / name) for name in ("ditto", "reco", "openve.csv")]
    rows = list(curate.records_of(curate.parse_arguments([*inputs, "--out", "x"]), []))
    assert [(r["src_video"], r["tgt_video"], r["kind"]) for r in rows] == [
        ("s/a.mp4", "e/a.mp4", "background"), ("remove/src_videos/1.mp4", "remove/tar_videos/1.mp4", "remove"), ("o/1.mp4", "v/1.mp4", "subject"),
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert "Ditto-1M: CC-BY-NC-SA-4.0" in text and "OpenVE-3M: CC-BY-NC-4.0" in text
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="bad.csv, line 2: has no column src_video, tgt_video, prompt; it has a, b"):
        list(curate.records_of(curate.parse_arguments([str(tmp_path / "bad.csv"), "--out", "x"]), []))


@demo
def test_a_reference_is_cut_out_of_a_real_edit_and_a_wrong_one_is_noticed(tmp_path):
    models, row = curate.Classical(None), {"kind": "subject"}
    source, target, other = (SHARED / "demo" / "videos" / name for name in ("31_src.mp4", "31_tgt.mp4", "22_tgt.mp4"))
    assert sum(models.score(source, target, row)) / curate.LOOKS > 8
    box, mask, row["key"] = models.ground(source, target, row)
    write_image(tmp_path / "glasses.png", models.synthesize(source, target, mask, row))
    picture = read_image(tmp_path / "glasses.png").float()
    ink = picture[picture.amin(dim=2) < 240]
    assert 1.5 < picture.shape[1] / picture.shape[0] < 3 and ink[:, 0].mean() > 1.3 * ink[:, 1].mean()  # wide, and red
    assert models.verify(source, target, tmp_path / "glasses.png", row)[0]
    write_image(tmp_path / "wrong.png", curate.frame_at(other, 0))
    assert not models.verify(source, target, tmp_path / "wrong.png", row)[0]


def test_of_two_alike_the_better_is_kept(tmp_path):
    feature, ledger = curate.pack(torch.tensor([1.0, 0.0])), curate.Ledger(tmp_path)
    rows = [
        {"id": name, "status": "open", "edit_score": score, "feature": feature}
        for name, score in (("a", 8.0), ("b", 9.0))
    ]
    ledger.write("verify", 0, rows)
    (ledger.folder / "read.json").write_text(json.dumps({"records": 2, "shards": 1}))
    curate.deduplicate_all(SimpleNamespace(guard=None, duplicate=0.9), ledger)
    assert [row["status"] for row in ledger.rows("deduplicate", 0)] == ["rejected", "kept"]


def test_a_deduplication_that_is_killed_after_a_retry_is_done_anew_as_a_whole(tmp_path, monkeypatch):
    ledger, again = (
        curate.Ledger(tmp_path),
        lambda: curate.deduplicate_all(SimpleNamespace(guard=None, duplicate=0.9), ledger),
    )
    row = {
        "status": "open",
        "edit_score": 9.0,
        "feature": curate.pack(torch.tensor([1.0, 0.0])),
        "stage": "verify",
        "reason": "no memory",
    }
    ledger.write("verify", 0, [row | {"id": "a", "status": "failed"}]), ledger.write("verify", 1, [row | {"id": "b"}])
    (ledger.folder / "read.json").write_text(json.dumps({"records": 2, "shards": 2}))
    again()
    ledger.write("verify", 0, [row | {"id": "a"}])
    ledger.path("deduplicate", 0).unlink()  # as --retry-failed does it
    write = ledger.write
    with monkeypatch.context() as killed, pytest.raises(SystemExit):
        killed.setattr(ledger, "write", lambda stage, shard, rows: sys.exit() if shard else write(stage, shard, rows))
        again()
    again()
    assert [row["status"] for row in records_in(tmp_path)] == ["kept", "rejected"]


def test_a_clip_whose_first_frame_is_the_benchmark_s_is_left_out(tmp_path, nano_data, quadruplets):
    kept = next(row for row in records_in(quadruplets) if row["status"] == "kept")
    (tmp_path / "bench").mkdir()
    write_image(tmp_path / "bench" / "first.png", curate.frame_at(nano_data / kept["src_video"], 0))
    rows = curated(nano_data, tmp_path / "out", "--guard", tmp_path / "bench", tables=["ref_video.csv"])
    row = next(row for row in rows if row["id"] == kept["id"])
    assert "of the benchmark" in row["reason"] and not row["tuning"]


def test_limits_are_of_the_longer_side_to_the_shorter_of_the_mask_and_of_the_same_moments(tmp_path):
    stage = curate.Synthesize(SimpleNamespace(min_side=8, max_aspect=4.0), [])
    stage.check(40, 10)
    for height, width in ((41, 10), (10, 41)):
        with pytest.raises(curate.Rejected, match="aspect above 4"):
            stage.check(height, width)
    for name, count, height in (("a", 9, 64), ("b", 21, 64), ("c", 9, 96)):
        write_clip(tmp_path / f"{name}.mp4", moving_picture(count, height, 64))
    for other, says in (("b", "not the same moments"), ("c", "another aspect")):
        with pytest.raises(MediaError, match=says):
            curate.look_at_pair(tmp_path / "a.mp4", tmp_path / f"{other}.mp4")
    ground = curate.Ground(SimpleNamespace(out=tmp_path), [tmp_path])
    for share, says in ((0.81, "covers 81%"), (0, "is empty")):
        mask = torch.arange(10_000).view(100, 100) < share * 10_000
        ground.loaded = SimpleNamespace(ground=lambda source, target, row: ([0, 0, 1, 1], mask, 0))
        with pytest.raises(curate.Rejected, match=says):
            ground.one({"id": "1", "src_video": "a.mp4", "tgt_video": "a.mp4", "base": 0})


def test_the_funnel_counts_one_reason_as_one_whatever_file_or_line_it_speaks_of_and_the_page_shows_every_record():
    funnel, file, line = (
        curate.Funnel(),
        "/my clips/{}.mp4: no such file",
        "pairs.csv, line 3: {}.mp4 is outside of /base; give paths",
    )
    for reason in (file, line, "pairs.csv, line 4: prompt is empty, or no text"):
        for name in ("seaside", "a---b"):
            funnel.add({"status": "failed", "stage": "read", "reason": reason.format(name)})
    assert {reason: count for (_, _, reason), count in funnel.reasons.items()} == {
        "no such file": 2, "is outside of /base; give paths": 2, "prompt is empty, or no text": 2,
    }  # fmt: skip
    row = {"name": "a---b", "kind": "style", "status": "failed", "stage": "read", "reason": file}
    assert "<td>a---b</td>" in curate.markdown_to_html(curate.pair_by_pair([row]))


def test_styles_and_removals_are_for_tuning_alone(tmp_path):
    stage = curate.Score(SimpleNamespace(min_score=6.0, min_ref_score=8.0), [])
    for kind, score, says in (
        ("style", 9.0, "a style is no object"),
        ("remove", 9.0, "leaves nothing"),
        ("subject", 7.0, "tuning only"),
    ):
        with pytest.raises(curate.Rejected, match=says) as error:
            stage.judged({"edit_score": score, "kind": kind})
        assert error.value.found["tuning"]
    assert stage.judged({"edit_score": 8.0, "kind": "subject"})["tuning"]


def test_the_paper_s_scorer_and_verifier_see_the_frames_they_are_told_of(tmp_path):
    for name, colour in (("source", BLUE), ("target", RED)):
        write_video(tmp_path / f"{name}.mp4", smooth_clip(colour), 4)
    write_image(tmp_path / "ref.png", smooth_clip(GREEN)[0])
    asked, models = [], curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    models.scorer = models.verifier = None

    def ask(model, prompt, images, read):
        asked.append({label: "RGB"[image.float()[40, 30].argmax()] for label, image in images.items()})
        return read('{"score": [20, 20]}' if "score" in prompt else '{"match": true, "reason": "same"}')

    models.ask = ask
    files = tmp_path / "source.mp4", tmp_path / "target.mp4"
    models.score(*files, {"prompt": "x"})
    assert asked[:2] == [{"source": "B", "edited": "R"}, {"edited": "R"}]
    models.verify(*files, tmp_path / "ref.png", {"prompt": "x", "kind": "subject", "key": 0})
    assert asked[-1] == {"edited": "R", "reference": "G"}


def test_sam_sees_boxes_in_its_pixels_and_colours_from_minus_one_to_one():
    class Segmenter(torch.nn.Module):
        config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(image_size=100))

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values, input_boxes, multimask_output):
            self.seen = pixel_values, input_boxes
            return SimpleNamespace(pred_masks=torch.ones(1, 1, 1, 4, 4))

    for level in (0, 255):
        model = Segmenter()
        curate.segment(model, torch.full((60, 90, 3), level, dtype=torch.uint8), [0.1, 0.2, 0.5, 0.8])
        assert close(model.seen[0], torch.full((1, 3, 100, 100), level / 127.5 - 1))
        assert model.seen[1].flatten().tolist() == pytest.approx([10, 20, 50, 80])


def test_a_server_of_several_models_is_told_which(monkeypatch):
    class Listing(BaseHTTPRequestHandler):
        def do_GET(self):
            data = json.dumps({"data": [{"id": "first"}, {"id": "wanted-VL"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    assert curate.open_model(f"{url}#wanted-VL", "cpu").model == "wanted-VL"
    for name in (url, f"{url}#absent"):
        with pytest.raises(ValueError, match="serves 2 models, first, wanted-VL.*say which"):
            curate.open_model(name, "cpu")
    server.shutdown()


def test_a_server_s_answer_that_cannot_be_read_is_asked_for_again_and_a_local_one_is_not(tmp_path):
    models, said = (
        curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"])),
        iter(["hm", '{"score": [20, 20]}', "hm"]),
    )
    server = object.__new__(vlm.OpenAICompatible)
    server.ask = lambda *_: vlm.Answer(next(said))
    assert models.ask(server, "How good?", {"edited": smooth_clip(RED)[0]}, curate.read_scores) == [20, 20]
    with pytest.raises(vlm.Malformed):
        models.ask(SimpleNamespace(ask=server.ask), "How good?", {}, curate.read_scores)


def test_what_a_grounder_or_a_verifier_thinks_aloud_is_not_its_answer(tmp_path):
    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    asked = lambda said, read: models.ask(SimpleNamespace(ask=lambda *_: vlm.Answer(said)), "What is it?", {}, read)
    thought = '<think>{"bbox_2d": [0, 0, 900, 900], "label": "room"}? {"match": false}? Else [].</think>'
    assert asked(f'{thought}[{{"bbox_2d": [100, 100, 300, 300], "label": "hat"}}]', curate.read_box) == (
        [0.1, 0.1, 0.3, 0.3],
        "hat",
    )
    assert asked(f"{thought}**match**: true", curate.read_verdict) == (True, "")


def test_ctrl_c_keeps_the_records_under_way_and_begins_no_other(monkeypatch, capsys):
    stage, pressed = curate.Score(SimpleNamespace(workers=2), []), []
    stage.one = lambda row: time.sleep(0.3) or {"done": True}

    def interrupted(busy, wait=curate.wait, **how):
        if not pressed:
            raise KeyboardInterrupt(pressed.append(1))
        return wait(busy, **how)

    monkeypatch.setattr(curate, "wait", interrupted)
    finished = []
    with pytest.raises(KeyboardInterrupt):
        finished += iter(stage({"id": str(i)} for i in range(20)))
    with pytest.raises(KeyboardInterrupt):
        pressed.clear()
        for row in stage({"id": str(i)} for i in range(20)):
            finished.append(row)
    assert 1 <= len(finished) <= 4 and all(row["done"] for row in finished) and "once more" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_are_loaded_once(monkeypatch):
    tries = []
    monkeypatch.setattr(curate.Classical, "setup", lambda self, stage: tries.append(stage) or int("no such model"))
    stage = curate.Score(curate.parse_arguments(["x", "--out", "x", "--workers", "4"]), [])
    with pytest.raises(curate.Barred, match="score: invalid literal"):
        list(stage([{"id": str(i), "frames": 9, "src_video": "a", "tgt_video": "b", "base": 0} for i in range(8)]))
    assert tries == ["score"]


def test_a_shard_that_lost_records_is_not_taken_for_whole_and_features_of_another_embedder_are_not_compared(
    tmp_path, nano_data, quadruplets
):
    out = Path(shutil.copytree(quadruplets, tmp_path / "out"))
    shard = out / "ledger/synthesize/00000.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(True)[:-1]))
    shutil.rmtree(out / "ledger/verify"), shutil.rmtree(out / "ledger/deduplicate")
    with pytest.raises(ValueError, match=r"synthesize/00000\.jsonl: has lost records, 4 are left"):
        curated(nano_data, out)
    settings = quadruplets / "ledger/settings.json"
    told = json.loads(settings.read_text()) | {"models": "paper", "embedder": "A"}
    shutil.copytree(quadruplets, tmp_path / "paper")
    (tmp_path / "paper/ledger/settings.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="features of --embedder A"):
        curated(
            tmp_path / "paper/ledger", tmp_path / "again", "--models", "paper", "--embedder", "B", tables=["verify"]
        )


def test_features_that_an_earlier_stage_has_of_another_embedder_are_made_anew(tmp_path, quadruplets):
    theirs = Path(shutil.copytree(quadruplets, tmp_path / "theirs")) / "ledger"
    settings = json.loads((theirs / "settings.json").read_text()) | {"models": "paper", "embedder": "A"}
    (theirs / "settings.json").write_text(json.dumps(settings))
    for shard in (theirs / "synthesize").iterdir():  # as a run leaves them that began from another ledger's features
        curate.write_json_lines(
            shard, [row | {"feature": curate.pack(torch.ones(4))} for row in curate.read_json_lines(shard)]
        )
    rows = curated(theirs, tmp_path / "again", tables=["synthesize"])
    features = [[row.get("feature") for row in records_in(out, "verify")] for out in (tmp_path / "again", quadruplets)]
    assert features[0] == features[1] and any(features[0]) and any(row["status"] == "kept" for row in rows)


def test_clips_of_other_moments_are_not_scored_by_the_paper_s_models_either(tmp_path):
    for name, count in (("source", 49), ("target", 3)):
        write_clip(tmp_path / f"{name}.mp4", moving_picture(count, 64, 64))
    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    with pytest.raises(MediaError, match="not the same moments"):
        models.score(tmp_path / "source.mp4", tmp_path / "target.mp4", {"prompt": "x"})


def test_the_editor_s_language_model_is_told_which_tokens_are_a_picture_s(tmp_path):
    mllm = randomise(vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen2_5_vl"), vlm.Settings(device="cpu")).mllm)
    picture = mllm.config.image_token_id
    ids = torch.tensor([[5, 6, *[picture] * 4, 7]])
    words = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(16, 1176),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
    )
    plain, right = mllm(**words).logits, mllm(**words, mm_token_type_ids=(ids == picture).int()).logits
    curate.tell_of_pictures(mllm)
    assert torch.equal(mllm(**words).logits, right) and not close(plain, right, 1e-3)
