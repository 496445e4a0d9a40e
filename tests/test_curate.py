"""Tests of curate.py, ledger.py and bench/curate.py"""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench.curate
import curate
import data
from conftest import HOUSE
from curators import ended
from curators.classical import Classical
from curators.pairs import Reader, kind_of
from ledger import Ledger, is_open, read_json_lines, write_json_lines
from media import MediaError, read_image, write_image

SMALL = ("min_side=8", "shard_rows=5")


def curated(out, *words, **settings):
    """Run curate.py on small shards -> the records at the end."""
    changed = [f"{key}={value}" for key, value in settings.items()]
    curate.main([*map(str, words), "--out", str(out), "--set", *SMALL, *changed])
    return records_in(out)


def records_in(out, stage="deduplicate"):
    told = json.loads((Path(out) / "ledger/read.json").read_text())
    ledger = Ledger(out, [*told["stages"], "deduplicate"])
    return [row for shard in range(len(told["shards"])) for row in ledger.rows(stage, shard)]


def kept_in(rows):
    return [row for row in rows if row["status"] == "kept"]


@pytest.fixture(scope="session")
def pairs(nano_data):
    """The small world's pairs in one table, with the types of their edits and without their references."""
    types = {row["tgt_video"]: row["task"] for row in read_json_lines(nano_data / "truth.jsonl")}
    path = nano_data / "pairs.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("src_video", "tgt_video", "prompt", "edit_type"))
        for name in data.FILES.values():
            for row in csv.DictReader((nano_data / name).open()):
                table.writerow([*(row[key] for key in data.COLUMNS["video"]), types[row["tgt_video"]]])
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, pairs):
    out = tmp_path_factory.mktemp("curate") / "out"
    curated(out, pairs)
    return out


@pytest.fixture
def no_models(monkeypatch):
    for work in ("setup", "score", "ground", "synthesize", "verify", "embed"):
        monkeypatch.setattr(Classical, work, None)


def lines_of(pairs, count, **more):
    return [row | more for _, row in zip(range(count), csv.DictReader(pairs.open()))]


def write_lines(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_pairs_become_quadruplets_that_training_reads(run, pairs):
    rows = records_in(run)
    kept = kept_in(rows)
    assert len(rows) == 16 and len(kept) >= 4 and {row["kind"] for row in rows} >= {"subject", "background"}
    assert all(row["reason"] and row["stage"] in ("score", "ground", "synthesize", "verify", "deduplicate")
               for row in rows if row["status"] != "kept")  # fmt: skip
    table = data.read_table(run / "ref_video.csv", "ref", os.path.commonpath([run, pairs.parent]))
    assert [Path(row.ref) for row in table] == [run / row["ref_image"] for row in kept]
    assert all(data.read_reference(row.ref).shape[0] >= 8 and not data.check_row(row)[1] for row in table)
    assert f"| deduplicate | {len(kept)} |" in (run / "funnel.md").read_text()
    page = (run / "page.html").read_text()
    assert page.count('class="card"') == len(rows) and "{{" not in page
    assert page.count('data-stage="kept"') == len(kept) and page.count('class="marked"') >= len(kept)


def test_refvie_s_parquet_holds_the_jpegs_and_is_read_again_as_it_is(tmp_path, run, pairs, monkeypatch):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    kept = kept_in(records_in(run))
    (chunk,) = (run / "refvie").glob("chunk_*.parquet")
    for row, record in zip(data.read_table(chunk, "ref", pairs.parent), kept, strict=True):
        assert torch.equal(data.read_reference(row.ref), read_image(run / record["ref_image"]))
    written = chunk.stat().st_mtime_ns
    curated(run, pairs)
    assert chunk.stat().st_mtime_ns == written
    for work in ("ground", "synthesize"):
        monkeypatch.setattr(Classical, work, None)
    again = curated(tmp_path / "out", run / "refvie", "--base-path", pairs.parent, duplicate=1)
    assert len(again) == len(kept) and all("ref_image" in row for row in again if row["edit_score"] >= 8)
    assert {row["stage"] for row in again if row["status"] == "rejected"} <= {"score", "verify"}


def test_a_stage_is_one_line_of_the_list_also_after_verify(tmp_path, pairs, run, monkeypatch):
    monkeypatch.setattr(curate, "PIPELINE", list(curate.PIPELINE))
    story = re.search(r"```python\n# curate.py\n(.*?)```", (HOUSE / "README.md").read_text(), re.DOTALL)[1]
    lights = sorted(read_image(run / row["ref_image"]).float().mean() / 255 for row in kept_in(records_in(run)))
    exec(story.replace("< 0.2", f"< {lights[1]}"), dict(vars(curate)))
    rows = curated(shutil.copytree(run, tmp_path / "out"), pairs)
    passed, dark = [row for row in rows if "light" in row], [row for row in rows if row.get("stage") == "bright"]
    assert passed and dark and all(row["status"] == "rejected" for row in dark) and kept_in(rows)
    funnel = (tmp_path / "out/funnel.md").read_text()
    assert f"| bright | {len(passed)} |" in funnel
    assert f"| bright | rejected | the reference is dark | {len(dark)} |" in funnel


def test_a_run_read_again_takes_other_thresholds_and_asks_no_model(tmp_path, run, pairs, no_models):
    scores = sorted(row["edit_score"] for row in records_in(run, "verify") if is_open(row))
    rows = curated(tmp_path / "strict", run, "--min-ref-score", scores[-1])
    assert 0 < len(kept_in(rows)) <= scores.count(scores[-1])
    assert all((tmp_path / "strict" / row["ref_image"]).is_file() for row in kept_in(rows))
    small = curated(tmp_path / "large", run, min_side=2000)
    assert any("a side below 2000" in row.get("reason", "") for row in small) and not kept_in(small)
    square, sizes = (
        curated(tmp_path / "square", run, max_aspect=1),
        [row["ref_size"] for row in kept_in(records_in(run))],
    )
    wide = sum(height != width for height, width in sizes)
    assert sum("an aspect above 1" in row.get("reason", "") for row in square) >= wide > 0
    says = "was made with min_score 6.0, not 7.0: give another --out; .* keeps what was paid for"
    with pytest.raises(ValueError, match=says):
        curated(tmp_path / "strict", run, "--min-ref-score", scores[-1], "--min-score", 7)


def test_features_of_another_embedder_are_made_anew_and_paths_out_of_a_run_are_refused(tmp_path, run):
    theirs = shutil.copytree(run, tmp_path / "theirs")
    told = json.loads((theirs / "ledger/read.json").read_text())
    told["settings"] |= {"models": "paper", "embedder": "A"}
    (theirs / "ledger/read.json").write_text(json.dumps(told))
    for shard in (theirs / "ledger/verify").iterdir():
        shard.write_text(re.sub(r'"feature": "[^"]*"', '"feature": "AAAA"', shard.read_text()))
    curated(tmp_path / "again", theirs)
    features = [[row.get("feature") for row in records_in(out, "verify")] for out in (tmp_path / "again", run)]
    assert features[0] == features[1] and any(features[0])
    shard = theirs / "ledger/synthesize/00000.jsonl"
    shard.write_text(re.sub(r"refs/[^\"]*", "../../secret.jpg", shard.read_text()))
    with pytest.raises(ValueError, match="../../secret.jpg is outside of"):
        curated(tmp_path / "bad", theirs)


def test_what_failed_or_was_rejected_for_money_stays_so_when_its_run_is_read_again(tmp_path, run, monkeypatch):
    monkeypatch.setattr(Classical, "setup", None)
    theirs = shutil.copytree(run, tmp_path / "theirs")
    path = theirs / "ledger/score/00000.jsonl"
    row, *rows = read_json_lines(path)
    write_json_lines(path, [{"id": row["id"], **ended("score", "failed", "no memory")}, *rows])
    again = curated(tmp_path / "second", theirs)
    assert [row["reason"] for row in again if row["status"] == "failed"] == ["no memory"] and not again[0].get("tuning")
    paid = lambda rows: {row["id"] for row in rows if row.get("stage") in ("ground", "synthesize", "verify")}
    assert paid(again) <= paid(records_in(run))
    monkeypatch.undo()
    mended = curated(tmp_path / "second", theirs, "--retry-failed")
    assert not any(row["status"] == "failed" for row in mended) and mended[0]["edit_score"] >= 0


def test_bad_rows_cost_only_themselves_and_can_be_tried_again(tmp_path, pairs):
    good = [f"{r['src_video']},{r['tgt_video']},x,{r['edit_type']}" for r in lines_of(pairs, 3)]
    for name in {Path(line.split(",")[0]).parts[0] for line in good}:
        shutil.copytree(pairs.parent / name, tmp_path / name)
    broken = tmp_path / good[0].split(",")[1]
    content = broken.read_bytes()
    broken.write_bytes(content[:40])
    odd = ["none.mp4,none.mp4,Add a hat.,add", "../a.mp4,b.mp4,Add a hat.,add", "a,b,,add",
           "a,b,Replace it, then leave,add,x"]  # fmt: skip
    (tmp_path / "p.csv").write_text("\n".join(["src_video,tgt_video,prompt,edit_type", *good, *odd]))
    lines = ["{half", "[]", {"src_video": "a", "tgt_video": "b", "prompt": ["x"]}]
    write_lines(tmp_path / "p.jsonl", [lines_of(pairs, 1)[0] | {"prompt": "half \ud83d"}, *lines])
    tables = tmp_path / "p.csv", tmp_path / "p.jsonl"
    before = curated(tmp_path / "out", *tables)
    reasons = [row["reason"] for row in before if row["status"] == "failed"]
    says = ("cannot be decoded", "no such file", "is outside of", "prompt is empty", "more fields than columns",
            "prompt is empty, or no text", "is empty", "is empty", "prompt is empty, or no text")  # fmt: skip
    assert len(reasons) == 9 and len(before) == 11 and all(words in why for words, why in zip(says, reasons))
    broken.write_bytes(content)
    after = curated(tmp_path / "out", *tables, "--retry-failed")
    healed = [new for old, new in zip(before, after) if old["status"] == "failed" != new["status"]]
    assert [Path(row["tgt_video"]).name for row in healed] == [broken.name]


def test_what_a_row_brings_is_used_unless_it_is_odd(tmp_path, pairs, run):
    kept = kept_in(records_in(run))[0]
    line = {key: kept[key] for key in ("src_video", "tgt_video", "prompt", "edit_type")}
    for name in (kept["mask"], kept["ref_image"]):
        shutil.copy(run / name, pairs.parent / Path(name).name)
    mask, picture, box = Path(kept["mask"]).name, Path(kept["ref_image"]).name, [0.1, 0.2, 0.9, 0.95]
    lines = [
        line | {"edit_score": "9.5", "box": box}, line | {"prompt": "m", "edit_score": 9, "mask": mask},
        line | {"prompt": "r", "edit_score": 9, "ref_image": picture},
        line | {"prompt": "o", "edit_score": 10**400, "box": [3, 4], "frames": "9"}, line | {"mask": "/etc/passwd"},
        line | {"src_video": "none.mp4", "edit_score": 7}, line | {"prompt": "t", "edit_score": 7},
    ]  # fmt: skip
    out, table = tmp_path / "out", write_lines(tmp_path / "p.jsonl", lines)
    rows = curated(out, table, "--base-path", pairs.parent, duplicate=1)
    assert [row.get("edit_score") for row in rows[:3]] == [9.5, 9, 9] and "frame_scores" not in rows[0]
    x1, y1, *_ = rows[0].get("box", box)
    assert x1 >= 0.05 and y1 >= 0.15
    assert torch.equal(read_image(out / rows[1]["mask"]), read_image(run / kept["mask"]))
    assert "mask" not in rows[2] and rows[2]["ref_size"] == kept["ref_size"]
    assert rows[3]["edit_score"] == kept["edit_score"] and "no such file" in rows[-2]["reason"]
    assert "for instruction tuning only" in rows[-1]["reason"] and rows[-1]["tuning"]


def test_exact_copies_fall_at_reading_and_rows_can_be_appended_but_not_changed(tmp_path, pairs):
    lines = lines_of(pairs, 3, edit_score=5)
    table, more = write_lines(tmp_path / "p.jsonl", lines * 4), lines_of(pairs, 5, edit_score=5)
    rows = curated(tmp_path / "out", table, "--base-path", pairs.parent)
    assert len(rows) == 3 and "| read | rejected | an exact copy | 9 |" in (tmp_path / "out/funnel.md").read_text()
    grown = curated(tmp_path / "out", write_lines(table, more), "--base-path", pairs.parent)
    assert grown[:3] == rows and len(grown) == 5
    anew = curated(tmp_path / "two", table, "--base-path", pairs.parent)
    assert [row["id"] for row in grown] == [row["id"] for row in anew]
    write_lines(table, more[:4] + [more[4] | {"prompt": "another"}])
    with pytest.raises(ValueError, match="1 records of .* are gone from the tables, or changed: give another --out"):
        curated(tmp_path / "out", table, "--base-path", pairs.parent)


def reader(*words):
    return Reader(curate.parse_arguments([*map(str, words), "--out", "x"]))


def test_the_published_sets_are_read_in_their_own_formats(tmp_path, capsys):
    def put(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    put("ditto/training_metadata/x.json", [{"source_path": "s/a.mp4", "edited_path": "e/a.mp4",
                                            "instruction": "Replace the background with snow."}])  # fmt: skip
    put("reco/replace/replace_data_configs.json", [
        {"src_video": "088301.mp4", "tar_video": "088301.mp4", "instruction_final_refine": "x",
         "video_masks": ["replace/video_masks/088301.mp4"]},
    ])  # fmt: skip
    put("openve.csv", "original_video,video,prompt,edited_type\no/1.mp4,v/1.mp4,Add a hat.,local_remove\n")
    put("sparkle/prompts/time_train.csv", "prompt,src_video,tgt_video,task\n"
        "At dusk.,time/a.mp4,time/b.mp4,Sparkle_time_000001\n")  # fmt: skip
    rows = list(reader(*(tmp_path / name for name in ("ditto", "reco", "openve.csv", "sparkle"))))
    assert [(r["src_video"], r["tgt_video"], r["kind"], r["name"]) for r in rows] == [
        ("s/a.mp4", "e/a.mp4", "background", ""),
        ("replace/src_videos/088301.mp4", "replace/tar_videos/088301.mp4", "subject", "reco_replace_088301"),
        ("o/1.mp4", "v/1.mp4", "remove", ""), ("time/a.mp4", "time/b.mp4", "background", "Sparkle_time_000001"),
    ]  # fmt: skip
    assert rows[1]["given_mask"] == "replace/video_masks/088301.mp4"
    told = re.findall(r"licence +(\S+): (\S+)", capsys.readouterr().out)
    assert told == [("Ditto-1M", "CC-BY-NC-SA-4.0"), ("ReCo", "CC-BY-NC-SA-4.0"), ("OpenVE-3M", "CC-BY-NC-4.0"),
                    ("Sparkle", "CC-BY-4.0")]  # fmt: skip
    alone, one = reader(tmp_path / "reco/replace/replace_data_configs.json"), tmp_path / "reco"
    assert [alone.bases[row["base"]] for row in alone] == [str(one)]
    put("other/openve.csv", (tmp_path / "openve.csv").read_text())  # the same names below another folder
    assert len(list(reader(tmp_path / "openve.csv", tmp_path / "other/openve.csv", tmp_path / "openve.csv"))) == 2


@pytest.mark.parametrize("name, text, says", [
    ("p.csv", 'src_video,tgt_video,prompt\na,b,"Add a hat\n', "every quote closed"),
    ("p.csv", "a,b\n1,2\n", "p.csv: has no column src_video, tgt_video, prompt; it has a, b"),
    ("p.json", "[" * 100_000, "is not JSON"), ("p.txt", "", "a table is .csv"), ("none/", "", "no such file"),
    ("p.jsonl", "", "no pairs"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text) if "/" not in name else None
    with pytest.raises((ValueError, OSError), match=says):
        list(reader(tmp_path / name))


@pytest.mark.parametrize("edit_type, prompt, kind", [
    ("Local Modification", "x", "subject"), ("camera_edit", "Replace it.", "other"),
    ("object swap", "Remove the dog.", "remove"),
    ("", "Make it look like a painting.", "style"), ("", "Apply the dawn aesthetic to this video.", "style"),
    ("", "Remove the man in front of the shop.", "remove"), ("", "Add a red car in front of the house.", "subject"),
    ("", "Delete the dog in the background.", "remove"),
    ("", "Remove the background and show a beach.", "background"),
    ("", "Zoom in slowly.", "unknown"),
    ("", "Replace her hair with a hair style of the eighties.", "subject"),
    ("", "Add a lamp that blends into the surroundings.", "subject"),
    ("", "背景を雪山に変えてください。", "unknown"), ("", "Turn the car into a bus.", "subject"),
])  # fmt: skip
def test_an_edit_s_kind_is_its_type_else_what_english_keywords_say(edit_type, prompt, kind):
    assert kind_of(edit_type, prompt) == kind


@pytest.mark.parametrize("word", "背景を変えて Donaudampfschifffahrt 0f3a9c replace_the_ put_ a _ background_".split())
def test_no_prompt_takes_more_than_a_millisecond(word):
    prompt, seconds = (word.replace("_", " ") * 2000)[:2000], []
    for _ in range(5):
        start = time.perf_counter()
        kind_of("", prompt)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.001


def test_what_ends_a_run_keeps_what_was_answered_and_asks_it_no_more(tmp_path, pairs, monkeypatch):
    asked, score = [], Classical.score

    def barred_at_the_fourth(models, source, target, row):
        asked.append(row["id"])
        if len(asked) == 4:
            raise curate.Barred("the key is refused")
        return score(models, source, target, row)

    def full(number):
        try:
            raise OSError(number, "No space left on device")
        except OSError:
            raise MediaError("x: cannot be written") from None

    monkeypatch.setattr(Classical, "score", barred_at_the_fourth)
    with pytest.raises(curate.Barred):
        curated(tmp_path / "out", pairs, "--workers", 1, shard_rows=100)
    for number in (errno.ENOSPC, errno.EDQUOT):
        with monkeypatch.context() as disk, pytest.raises(MediaError, match="cannot be written"):
            disk.setattr(curate, "write_image", lambda *_: full(number))
            curated(tmp_path / "out", pairs, "--workers", 1, shard_rows=100)
    rows = curated(tmp_path / "out", pairs, "--workers", 1, shard_rows=100)
    assert asked.count(asked[3]) == 2 and len(asked) == len(set(asked)) + 1
    assert not any(row["status"] == "failed" for row in rows)


def test_one_budget_of_failures_stops_the_run_and_holds_until_it_is_raised(tmp_path):
    lines = [f"refs/a.mp4,refs/b.mp4,Add hat {i}." for i in range(40)]
    (tmp_path / "p.csv").write_text("\n".join(["src_video,tgt_video,prompt", *lines]))
    says = r"20 of 20 records failed, more than --max-bad 0.2.*`score`.*mend that and add --retry-failed"
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            curated(tmp_path / "out", tmp_path / "p.csv")
    with pytest.raises(ValueError, match="not one of 40 records could be worked on"):
        curated(tmp_path / "out", tmp_path / "p.csv", "--max-bad", 1)
    assert all(row["status"] == "failed" for row in records_in(tmp_path / "out"))


def same_result(out, expected):
    """Two runs left the same ledger and pictures, and nothing half done."""
    kinds = (".jsonl", ".png", ".jpg", ".part")
    files = lambda folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in kinds}
    return files(out) == files(expected)


def start_curate(out, *words, **environment):
    words = [sys.executable, HOUSE / "curate.py", *words, "--out", out, "--set", *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def test_runs_that_are_killed_and_resumed_end_as_one_run(tmp_path, pairs, run):
    for stage in ("score", "verify"):
        process = start_curate(tmp_path / "out", pairs, "--workers", 1)
        while process.poll() is None and not (tmp_path / "out" / "ledger" / stage).is_dir():
            time.sleep(0.005)
        process.kill()
        process.wait()
    curated(tmp_path / "out", pairs)
    assert same_result(tmp_path / "out", run)


def test_a_shard_half_done_is_finished_without_asking_again_and_one_cut_short_is_noticed(
    tmp_path, pairs, run, no_models
):
    out = shutil.copytree(run, tmp_path / "out")
    whole = out / "ledger/verify/00000.jsonl"
    whole.with_suffix(".part").write_text(whole.read_text() + "\0\0\n" + '{"id": "00000')  # left by what died
    whole.unlink(), shutil.rmtree(out / "ledger/deduplicate")
    curated(out, pairs)
    assert whole.read_text() and same_result(out, run)
    for stage in ("score", "read"):
        shard = out / f"ledger/{stage}/00000.jsonl"
        shard.write_text("".join(shard.read_text().splitlines(True)[:-1]))
        with pytest.raises(ValueError, match=rf"{stage}/00000\.jsonl: has lost records"):
            curated(out, pairs)
    shard.write_text("{half")
    with pytest.raises(ValueError, match=r"read/00000\.jsonl: Expecting"):
        curated(out, pairs)


def test_two_processes_do_what_one_does_and_a_stray_world_size_is_not_waited_for(tmp_path, pairs, run, monkeypatch):
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    runs = [start_curate(tmp_path / "out", pairs, RANK=str(rank), **together) for rank in (1, 0)]
    assert [process.wait(timeout=600) for process in runs] == [0, 0]
    assert same_result(tmp_path / "out", run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    curated(tmp_path / "out", pairs)


def test_ray_finishes_with_fewer_gpus_than_stages_and_leaves_a_ray_that_was_there(tmp_path, pairs, run, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray Data: pip install 'ray[data]'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ray.init(num_cpus=2, num_gpus=1, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    monkeypatch.setitem(curate.GPUS, "classical", 1)
    out = shutil.copytree(run, tmp_path / "out")
    for stage in ("synthesize", "verify", "guard", "deduplicate"):
        shutil.rmtree(out / "ledger" / stage)
    try:
        curated(out, pairs, "--engine", "ray")
        assert same_result(out, run) and ray.is_initialized()
    finally:
        ray.shutdown()


def test_ctrl_c_keeps_the_records_under_way_and_begins_no_other(tmp_path, monkeypatch, capsys):
    args, ledger = curate.parse_arguments(["x", "--out", str(tmp_path)]), Ledger(tmp_path, ["score"])
    ledger.write("read", 0, [{"id": str(i)} for i in range(20)])
    (ledger.folder / "read.json").write_text(json.dumps({"shards": [20], "bases": []}))
    stage = curate.Score(args, ledger, curate.Budget(0.2))
    stage.one = lambda row: time.sleep(0.3) or {"done": True}

    def interrupted(begun, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(curate, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.run(0)
    finished = ledger.lines("score", 0)
    assert 1 <= len(finished) <= 4 and all(row["done"] for row in finished) and "once more" in capsys.readouterr().err


def test_duplicates_go_only_if_they_are_close_to_one_that_is_kept():
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


def test_of_two_alike_the_better_is_kept_and_the_next_best_when_a_person_rejects_it(tmp_path, monkeypatch):
    feature, ledger = curate.pack(torch.tensor([1.0, 0.0])), Ledger(tmp_path, ["verify", "deduplicate"])
    for shard, (name, score) in enumerate((("a", 8.0), ("b", 9.0), ("c", 7.0))):
        ledger.write("read", shard, [{"id": name}])
        ledger.write("verify", shard, [{"id": name, "edit_score": score, "feature": feature}])
    (ledger.folder / "read.json").write_text(json.dumps({"shards": [1] * 3, "stages": ["verify"]}))

    def statuses(**rejects):
        curate.deduplicate_all(SimpleNamespace(duplicate=0.9, device="cpu"), ledger, rejects)
        return [ledger.rows("deduplicate", shard)[0]["status"] for shard in range(3)]

    assert statuses() == ["rejected", "kept", "rejected"]
    with monkeypatch.context() as killed, pytest.raises(SystemExit):  # then old files do not pass for new ones
        killed.setattr(curate, "write_text", lambda path, text: sys.exit())
        statuses(b="torn")
    assert statuses() == ["rejected", "kept", "rejected"]
    assert statuses(b="torn") == ["kept", "rejected", "rejected"]


def test_a_person_s_rejects_and_a_benchmark_s_pictures_leave_the_result(tmp_path, pairs, run):
    kept = kept_in(records_in(run))
    out = shutil.copytree(run, tmp_path / "out")
    (tmp_path / "rejects.json").write_text(json.dumps({kept[0]["id"]: "torn"}))
    curated(out, pairs, "--rejects", tmp_path / "rejects.json")
    rows = lambda folder, *names: sum(len((folder / f"{name}.csv").read_text().splitlines()) - 1 for name in names)
    assert rows(out, "ref_video") == len(kept) - 1 and rows(out, "video", "image") == rows(run, "video", "image") - 1
    assert "| person | rejected | torn | 1 |" in (out / "funnel.md").read_text()
    assert f'out={{"{kept[0]["id"]}": "torn"}}' in (out / "page.html").read_text()  # saved again with what comes to it
    (tmp_path / "bench/b").mkdir(parents=True)
    shutil.copy(run / kept[1]["ref_image"], tmp_path / "bench/theirs.jpg")
    write_image(tmp_path / "bench/b/theirs.jpg", torch.zeros(64, 64, 3, dtype=torch.uint8))  # of the same name
    write_image(tmp_path / "bench/first.png", read_image(pairs.parent / kept[2]["src_video"]))
    rows = {row["id"]: row for row in curated(tmp_path / "guarded", run, "--guard", tmp_path / "bench")}
    for row, name in ((kept[1], "theirs.jpg"), (kept[2], "first.png")):
        assert f"resembles {name} of the benchmark" in rows[row["id"]]["reason"] and not rows[row["id"]]["tuning"]
    rows = curated(tmp_path / "free", tmp_path / "guarded")  # decided anew
    assert kept_in(rows) == kept and all(row["tuning"] for row in kept_in(rows))


@pytest.mark.parametrize("flag, says", [("--rejects", "none.json"), ("--guard", "broken.png")])
def test_what_would_spoil_the_result_is_found_before_the_work(tmp_path, pairs, flag, says):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError), match=says):
        curated(tmp_path / "out", pairs, flag, tmp_path / "in" / ("none.json" if flag == "--rejects" else ""))
    assert not (tmp_path / "out/ledger/score").exists()


def test_the_measures_run_on_the_real_code(tmp_path, nano_data):
    assert "40 records through all stages" in str(bench.curate.scale(tmp_path, records=40, vectors=30, width=8))
    _, things, _, planted = bench.curate.truth(nano_data)
    assert float(things[-1]) > 0.7 and planted[-1] == "1.000, 1.000"


@pytest.mark.parametrize("setting", ["fps=0", "min_side=0", "shard_rows=0", "page=-1", "max_aspect=0.5"])
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(SystemExit):
        curate.parse_arguments(["x", "--out", "y", "--set", setting])


def test_only_stages_from_the_first_failure_on_are_opened_again(tmp_path):
    stages = ["score", "ground", "verify"]
    ledger, fail = Ledger(tmp_path, stages), {"id": "b", **ended("ground", "failed", "no memory")}
    for stage in ("read", *stages):
        ledger.write(stage, 0, [{"id": "a"}, fail if stage == "ground" else {"id": "b"}][: 1 + (stage != "verify")])
    ledger.reopen_failed(0)
    assert [ledger.done(stage, 0) for stage in ledger.stages] == [True, True, False, False]
    assert ledger.lines("ground", 0) == ledger.lines("verify", 0) == [{"id": "a"}]


def test_an_address_with_a_secret_is_refused():
    with pytest.raises(ValueError, match="put the key into OPENAI_API_KEY"):
        curate.main(["x", "--out", "y", "--models", "paper", "--set", "scorer=http://u:secret@h/v1"])
