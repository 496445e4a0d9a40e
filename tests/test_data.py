"""Tests of data.py and cache.py"""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cache
import data
import media
from cache import Cache, Shapes
from conftest import moving_picture, write_clip, write_table
from data import Curriculum, Mixture, Pairs, Row, bucket, read_table
from media import MediaError, write_image

ALONE = SimpleNamespace(rank=0, world=1, first=False, gathered=list)


def shapes_of(rows, kind="video", known=()):
    found = Shapes(*known)
    found.measure(rows, ALONE)
    return [found.of_row(row, kind) for row in rows]


# Tables


@pytest.mark.parametrize("text, says", [
    ("src_video,prompt\na.png,x\n", "no column tgt_video"), ("src_video,tgt_video,prompt\n", "has no rows"),
    ("src_video,tgt_video,prompt\na.png,,x\n", "line 2: an empty field"), ("", "no column src_video"),
    ("src_video,tgt_video,prompt\na.png,../../etc/passwd,x\n", "is outside of"),
    ("src_video,tgt_video,prompt\na.png,b.png,make it red, shiny\n", "line 2: more fields than columns"),
    ('src_video,tgt_video,prompt\na.png,b.png,"x\na.png,b.png,y\n', "is a quote not closed"),
    ('src_video,tgt_video,"' + "p" * 140_000, "is a quote not closed"),
    ("src_video,tgt_video,prompt\na.png,b.png,caf\u00e9\n", "image.csv: is not UTF-8"),
])  # fmt: skip
def test_a_bad_table_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "image.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(ValueError, match=says):
        read_table(tmp_path / "image.csv", data.kind_of(tmp_path / "image.csv"))


def test_a_path_into_a_sibling_whose_name_begins_alike_is_outside(tmp_path):
    with pytest.raises(ValueError, match="is outside of"):
        data.inside(tmp_path / "data", "../data-secret/x.png", "here")


def test_a_table_has_references_where_a_column_says_so(tmp_path):
    for column, kind in (("ref_image", "ref"), ('"ref_image"', "ref"), ("ref_image_note", "video")):
        (tmp_path / "t.csv").write_text(f"src_video,tgt_video,prompt,{column}\n")
        assert data.kind_of(tmp_path / "t.csv") == kind


def test_parquet_with_reference_bytes_gives_the_rows_that_a_csv_gives(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_image(tmp_path / "ref.png", moving_picture(1, 50, 40)[0])
    content, path = (tmp_path / "ref.png").read_bytes(), tmp_path / "chunk_0001.parquet"
    columns = {"iid": ["1", "2", "3"], "prompt": ["x"] * 3, "src_video": ["a.mp4"] * 3, "tgt_video": ["b.mp4"] * 3,
               "ref_image_bytes": [content, None, content]}  # fmt: skip
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    assert data.find_tables([tmp_path], "ref") == [path] and data.kind_of(path) == "ref"
    rows = read_table(path, "ref")
    assert [row.source for row in rows] == [str(tmp_path / "a.mp4")] * 3
    assert torch.equal(data.read_reference(rows[2].ref), moving_picture(1, 50, 40)[0])
    with pytest.raises(MediaError, match="row 1 of group 0: has no ref_image_bytes"):
        data.read_reference(rows[1].ref)
    damaged = bytearray(path.read_bytes())
    at = data.parquet_file(path).metadata.row_group(1).column(4)
    start = at.dictionary_page_offset or at.data_page_offset
    damaged[start : start + 16] = b"\xff" * 16
    (tmp_path / "bad.parquet").write_bytes(damaged)
    with pytest.raises(MediaError, match=r"bad.parquet, row group 1: cannot be read \([^\n]*\)$"):
        data.read_reference(read_table(tmp_path / "bad.parquet", "ref")[2].ref)


def test_check_names_what_is_wrong_with_a_table(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", moving_picture(9, 64, 64))
    write_clip(tmp_path / "b.mp4", moving_picture(7, 64, 96))
    (tmp_path / "c.mp4").write_text("no clip")
    pairs = [["a.mp4", name, "x"] for name in ("a.mp4", "b.mp4", "c.mp4")]
    with pytest.raises(SystemExit, match="2 rows have faults"):
        data.main(["check", str(write_table(tmp_path / "video.csv", pairs))])
    said = "".join(capsys.readouterr())
    lost, crops, damaged = "b.mp4: has 7 frames, its source 9", "crops will not match", "c.mp4: cannot be decoded"
    assert all(words in said for words in (lost, crops, damaged, "3 rows, 2 with faults"))


# Order


def test_a_mixture_gives_each_row_once_an_epoch_in_the_ratio_asked_for_and_has_no_state():
    images, videos = {(1, 64, 64): list(range(10)), (1, 64, 96): [10, 11, 12]}, {(9, 64, 64): list(range(5))}
    of_seed = lambda seed: Mixture({"image": images, "video": videos}, {"image": 2, "video": 1, "ref": 0}, 2, seed)
    batches = [of_seed(3)[n] for n in range(60)]
    assert [kind for kind, *_ in batches[:6]] == ["image", "video", "image"] * 2
    seen = [row for kind, _, rows in batches if kind == "image" for row in rows]
    for row in range(13):  # 80 samples are 6.2 epochs; buckets of an odd size cut their batches across epochs
        assert 5 <= seen.count(row) <= 7
    assert sorted(seen[:26]) == sorted([*range(13)] * 2)  # 10 + 3 rows by two: even after two epochs
    assert [of_seed(4)[n] for n in range(9)] != batches[:9]


def test_the_order_of_many_rows_is_made_once_an_epoch_and_not_for_every_batch():
    mixture, took = Mixture({"image": {(1, 64, 64): range(200_000)}}, {"image": 1}, 1, seed=0), []
    for numbers in (range(1), range(1, 500)):
        started = time.perf_counter()
        assert len({mixture[n][2][0] for n in numbers}) == len(numbers)
        took.append(time.perf_counter() - started)
    assert took[1] < took[0]


def test_each_size_of_a_stage_has_its_share_of_the_steps():
    small, large = (Mixture({"image": {(1, n, n): [0, 1]}}, {"image": 1}, 2, seed=0) for n in (64, 96))
    both = Curriculum([(0, small), (6, large)])
    assert [both[n][2][1] for n in range(12)] == [64] * 6 + [96] * 6 and both[7][1:] == large[1]


def test_large_clips_share_a_few_shapes_and_small_ones_keep_theirs():
    assert bucket((100, 480, 832), 81, 720 * 1280) == (81, 480, 832)
    assert bucket((50, 1080, 1920), 81, 360_000) == bucket((49, 1070, 1930), 81, 360_000) == (49, 448, 800)
    assert bucket((100, 720, 1280), 49, 409_600) == bucket((100, 720, 1280), 49, 399_360) == (49, 480, 832)
    assert bucket((9, 2160, 3840), 81, 720 * 1280) == (9, 704, 1280)


def test_a_broken_sample_is_replaced_by_the_next_of_its_shape_and_reported(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(tmp_path / name, moving_picture(9, 64, 64))
    rows = read_table(write_table(tmp_path / "video.csv", [[f"{n}.mp4", f"{n}.mp4", "x"] for n in "abc"]), "video")
    assert shapes_of(rows) == [(9, 64, 64)] * 3
    mixture = Mixture({"video": {(9, 64, 64): [0, 1, 2]}}, {"video": 1}, 3, seed=0)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:900])
    batch = Pairs({"video": rows}, Curriculum([(0, mixture)]), lambda source, ref: None)[0]
    order = ["abc"[row] for row in mixture[0][2]]
    assert [Path(p).stem for p in batch["paths"]] == ["c" if name == "b" else name for name in order]
    assert [Path(path).name for path, _ in batch["bad"]] == ["b.mp4"] and "b.mp4" in batch["bad"][0][1]
    for name in "ac":
        (tmp_path / f"{name}.mp4").unlink()
    assert "none of the 3" in Pairs({"video": rows}, Curriculum([(0, mixture)]), None)[0]["fatal"]


# Shapes and cache


def test_a_pair_is_as_long_as_its_shorter_file_and_two_lost_frames_are_forgiven(tmp_path):
    long, short = (str(write_clip(tmp_path / f"{n}.mp4", moving_picture(n, 64, 64))) for n in (13, 9))
    assert shapes_of([Row(long, short, "x"), Row(short, long, "x")]) == [(9, 64, 64)] * 2
    assert len(media.read_frames(short, 11, (64, 64))) == 11
    with pytest.raises(MediaError, match="ends after 9 of 12"):
        media.read_frames(short, 12, (64, 64))


def test_pairs_that_would_train_misaligned_or_as_pictures_are_left_out_with_the_reason(tmp_path):
    whole, half = (str(write_clip(tmp_path / f"{n}.mp4", moving_picture(n, 64, 64), rate=n)) for n in (30, 15))
    short = str(write_clip(tmp_path / "short.mp4", moving_picture(3, 64, 64)))
    said = shapes_of([Row(whole, half, "x"), Row(short, whole, "x")])
    assert "15 frames a second, its source 30" in said[0] and "has 3 frames; a clip needs at least 5" in said[1]


def test_files_are_measured_once_and_again_when_they_change(tmp_path, monkeypatch):
    clip = str(write_clip(tmp_path / "a.mp4", moving_picture(9, 64, 64)))
    row, shapes = Row(clip, clip, "x"), Shapes()
    shapes.measure([row], ALONE)
    shapes.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "measure", None)  # nothing is opened
        assert shapes_of([row], known=[tmp_path]) == [(9, 64, 64)]
    write_clip(tmp_path / "a.mp4", moving_picture(13, 64, 96))
    assert shapes_of([row], known=[tmp_path]) == [(13, 64, 96)]


def test_a_cache_has_a_row_by_its_content_and_one_change_costs_one_row(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, file in enumerate(files):
        write_image(file, moving_picture(1, 64, 64)[0] + i)
    rows, size = [Row(file, file, f"Do {i}.") for i, file in enumerate(files)], (1, 64, 64)

    def absent(rows, made=1):
        shapes = Shapes()
        shapes.measure(rows, ALONE)
        held = Cache(tmp_path / "cache", shapes, {"latents": made, "context": made})
        return held, [held.absent(row, size) for row in rows]

    held, lost = absent(rows)
    assert lost == [["latents", "context"]] * 3
    for i, row in enumerate(rows):
        for part in held.parts:
            held.write(part, row, size, {part: torch.full((2,), i)})
    assert absent(rows)[1] == absent(rows[::-1])[1] == [[], [], []]
    assert held.read("latents", rows[1], size)["latents"][0] == 1
    assert absent(rows, made=2)[1] == [["latents", "context"]] * 3
    changed = [rows[0], replace(rows[1], prompt="Do it."), rows[2]]
    write_image(tmp_path / "2.png", moving_picture(1, 64, 64)[0] + 9)
    held, lost = absent(changed)
    assert lost == [[], ["context"], ["latents", "context"]]
    with pytest.raises(ValueError, match="2 of 3 rows are new, changed, .* run data.py cache again"):
        held.check([(row, size) for row in changed])
    held.write("latents", rows[2], size, "is broken")
    with pytest.raises(MediaError, match="is broken"):
        held.read("latents", rows[2], size)
