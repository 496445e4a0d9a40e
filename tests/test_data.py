"""Tests of data.py"""

import re
import struct
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import data
import media
from conftest import bad_media, golden, moving_picture, recorded, write_clip, write_table
from data import Curriculum, Mixture, Pairs, bucket, measure_rows, read_table
from media import (
    MediaError,
    fit_frames,
    measure,
    nearest_size,
    pad_reference,
    read_clip,
    read_image,
    usable_frames,
    whole_file,
    working_size,
    write_image,
    write_video,
)


@golden
def test_working_sizes_crops_and_reference_boxes_match_the_release():
    records, pictures = recorded("preprocess.json"), recorded("preprocess_frames.safetensors")
    for r in records["vae_inference"]:
        assert working_size(r["height"], r["width"], r["max_pixels"]) == (r["out_height"], r["out_width"])
    for i in range(3):
        image = pictures[f"{i}.image"]
        pairs = [(pad_reference(image, (64, 96)), f"{i}.ref_pad_64x96")]
        for limit, pixels in (("4096", 4096), ("none", 720 * 1280)):
            fitted = fit_frames(image[None], working_size(*image.shape[:2], pixels))[0]
            pairs.append((fitted, f"{i}.max{limit}.inference"))
        for ours, name in pairs:
            assert (ours.int() - pictures[name].int()).abs().float().mean() < 0.05, name
    for r in records["reference_padding"]:
        black = torch.zeros(r["height"], r["width"], 3, dtype=torch.uint8)
        inside = (pad_reference(black, r["target_wh"][::-1])[..., 0] == 0).nonzero()
        assert [*inside.amin(0).flip(0).tolist(), *(inside.amax(0) + 1).flip(0).tolist()] == r["inference_box_xyxy"]


def test_a_small_size_keeps_the_picture_s_aspect_and_uses_the_pixels():
    sizes = {
        (704, 1280): (48, 80),
        (1280, 720): (80, 48),
        (480, 640): (48, 64),
        (1000, 1000): (64, 64),
        (64, 64): (64, 64),
    }
    for (height, width), expected in sizes.items():
        h, w = nearest_size(height, width, 64 * 64, 16)
        assert (h, w) == expected and 0.75 <= h * w / 64**2 <= 1
        assert 0.9 < h * width / (w * height) < 1.1
    with pytest.raises(ValueError, match="too few"):
        nearest_size(15, 640, 64 * 64, 16)


def test_a_clip_of_a_higher_rate_gives_every_kth_frame(tmp_path):
    frames = (torch.arange(20, dtype=torch.uint8) * 12).view(-1, 1, 1, 1).expand(-1, 64, 64, 3)
    write_video(tmp_path / "in.mp4", frames, 30)
    clip = read_clip(tmp_path / "in.mp4", 9, max_fps=8)
    assert clip.fps == Fraction(30, 4) and len(clip.frames) == 5
    assert (clip.frames[:, 0, 0, 0].int() - frames[::4, 0, 0, 0].int()).abs().max() <= 2
    assert len(read_clip(tmp_path / "in.mp4", 9, max_fps=30).frames) == 9


def test_a_clip_keeps_its_frames_its_rate_and_its_sound(tmp_path):
    source = write_clip(tmp_path / "in.mkv", moving_picture(30), rate=Fraction(30000, 1001), sound="pcm_s16le")
    clip = read_clip(source, max_frames=21)
    assert clip.frames.shape == (21, 64, 96, 3) and clip.fps == Fraction(30000, 1001) and not clip.still
    write_video(tmp_path / "out.mp4", clip.frames, clip.fps, audio_from=source)
    again = read_clip(tmp_path / "out.mp4")
    assert again.frames.shape == clip.frames.shape and again.fps == clip.fps
    assert (again.frames.float() - clip.frames.float()).abs().mean() < 3
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert out.streams.video[0].codec_context.pix_fmt == "yuv420p"
        tone = np.concatenate([frame.to_ndarray()[0] for frame in out.decode(audio=0)])
    assert abs(len(tone) / 48000 - 21 * 1001 / 30000) < 0.05  # as long as the pictures
    assert abs(np.abs(np.fft.rfft(tone[9600:19200])).argmax() * 5 - 440) <= 5


def test_sound_that_sets_in_late_stays_late(tmp_path):
    source = write_clip(tmp_path / "in.mkv", moving_picture(30), sound="pcm_s16le", late=0.4)
    write_video(tmp_path / "out.mp4", read_clip(source).frames, 25, audio_from=source)
    with av.open(str(tmp_path / "out.mp4")) as out:
        heard = [(frame.time, np.abs(frame.to_ndarray()).max() > 0.05) for frame in out.decode(audio=0)]
    assert abs(next(time for time, loud in heard if loud) - 0.4) < 0.05


def test_a_variable_frame_rate_becomes_a_constant_one_in_step_with_time(tmp_path):
    frames = (torch.arange(9).view(9, 1, 1, 1) * 25).to(torch.uint8).expand(9, 64, 64, 3)
    times = [0, 40, 80, 120, 160, 560, 600, 640, 680]  # 0.4 s of standstill after the fifth
    clip = read_clip(write_clip(tmp_path / "in.mp4", frames, times))
    shown = (clip.frames[:, 32, 32, 0].float() / 25).round().tolist()
    middle = round(0.45 * float(clip.fps))
    assert shown[middle] == 4 and shown == sorted(shown) and len(shown) == usable_frames(round(0.72 * clip.fps))


def test_rotation_alpha_and_stills_are_read_as_a_person_sees_them(tmp_path):
    path = write_clip(tmp_path / "in.mp4", moving_picture(1, 64, 96))
    upright = read_image(path)
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # the track header's display matrix
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in
                                          (0, 65536, 0, -65536, 0, 0, 64 << 16, 0, 1 << 30))  # fmt: skip
    (tmp_path / "phone.mp4").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "phone.mp4"), upright.rot90(-1))
    wide = write_clip(tmp_path / "wide.mp4", moving_picture(1, 64, 96), pixels=Fraction(4, 3))
    assert (
        measure_rows([SimpleNamespace(source=wide, target=wide, ref=None)], still=False) == [(1, 64, 128)]
        and read_image(wide).shape[1] == 128
    )
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 40, 40, "rgba", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((40, 40, 4), (200, 100, 0, 51), dtype=np.uint8), format="rgba")
    (tmp_path / "glass.png").write_bytes(b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)]))
    assert read_image(tmp_path / "glass.png")[0, 0].tolist() == [244, 224, 204]  # a fifth over white
    assert read_clip(tmp_path / "glass.png").still


def test_what_metadata_mirror_is_mirrored(tmp_path):
    write_image(tmp_path / "plain.jpg", moving_picture(1, 64, 96)[0])
    plain, jpeg = read_image(tmp_path / "plain.jpg"), (tmp_path / "plain.jpg").read_bytes()
    ways = {
        2: plain.flip(1),
        4: plain.flip(0),
        5: plain.transpose(0, 1),
        6: plain.rot90(-1),
        7: plain.transpose(0, 1).flip(0, 1),
    }
    for orientation, seen in ways.items():
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
        (tmp_path / "exif.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
        assert torch.equal(read_image(tmp_path / "exif.jpg"), seen), orientation
    path = write_clip(tmp_path / "in.mp4", moving_picture(1, 64, 96))
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # the track header's display matrix
    data[matrix : matrix + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 96 << 16, 0, 1 << 30)
    (tmp_path / "selfie.mp4").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "selfie.mp4"), read_image(path).flip(1))


def test_a_clip_cut_without_encoding_it_anew_has_the_frames_that_are_shown(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(60))
    with av.open(str(source)) as old, av.open(str(tmp_path / "cut.mp4"), "w") as new:
        stream = old.streams.video[0]
        track, cut = new.add_stream_from_template(stream), round(Fraction(48, 25) / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, track
                new.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as clip:
        assert clip.streams.video[0].frames == 60  # what makes it hard
    assert measure(tmp_path / "cut.mp4")[0] == 12
    assert torch.equal(read_clip(tmp_path / "cut.mp4").frames, read_clip(source).frames[48:57])


def test_a_clip_whose_header_says_neither_length_nor_rate_has_those_of_its_frames(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(20))
    for options in ({}, {"live": "1"}):  # of Matroska's time stamps, 1000 a second, or of no length
        with av.open(str(source)) as old, av.open(str(tmp_path / "copy.mkv"), "w", options=options) as new:
            stream = old.streams.video[0]
            track = new.add_stream_from_template(stream)
            for packet in old.demux(stream):
                if packet.size:
                    packet.stream = track
                    new.mux(packet)
        assert measure(tmp_path / "copy.mkv") == measure(source) and measure(source)[0] == 20
        assert torch.equal(read_clip(tmp_path / "copy.mkv").frames, read_clip(source).frames)


def test_of_two_to_four_frames_all_are_kept_for_one_alone_would_be_a_picture(tmp_path):
    for count, read in ((1, 1), (2, 2), (4, 4), (5, 5), (8, 5)):
        write_video(str(tmp_path / "in.mp4"), moving_picture(count, 64, 64), 25)
        assert len(read_clip(tmp_path / "in.mp4").frames) == read


def test_every_bad_file_is_one_media_error_that_names_it(tmp_path):
    bad_media(tmp_path)
    for name in (
        "half.mp4",
        "flipped.mp4",
        "empty.mp4",
        "words.png",
        "dot.png",
        "half.jpg",
        "sound.mp3",
        "absent.mp4",
        "drawing.svg",
    ):
        with pytest.raises(MediaError, match=re.escape(name)) as error:
            read_clip(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_name_is_a_name_and_no_pattern(tmp_path):
    for name in ("100%done.png", "my%20dog.png", "a%d.png", "clip12:30.png"):
        write_image(tmp_path / name, moving_picture(1)[0])
        assert torch.equal(read_image(tmp_path / name), moving_picture(1)[0])


def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "out.mp4") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_mixture_gives_each_row_once_an_epoch_in_the_ratio_asked_for_and_has_no_state():
    buckets = {
        "image": {(1, 64, 64): list(range(10)), (1, 64, 96): [10, 11, 12]},
        "video": {(9, 64, 64): list(range(5))},
    }
    mixture = Mixture(buckets, {"image": 2, "video": 1, "ref": 0}, 2, seed=3)
    batches = [mixture[n] for n in range(300)]
    assert [kind for kind, *_ in batches[:6]] == ["image", "video", "image"] * 2
    seen = [row for kind, _, rows in batches if kind == "image" for row in rows]
    for row in range(13):  # 400 samples are 30.8 epochs; buckets of an odd size cut their batches across epochs
        assert 29 <= seen.count(row) <= 32
    assert sorted(seen[:26]) == sorted([*range(13)] * 2)  # 10 + 3 rows by two: even after two epochs
    again = Mixture(buckets, {"image": 2, "video": 1}, 2, seed=3)
    assert [again[n] for n in (299, 7, 100)] == [batches[n] for n in (299, 7, 100)]
    assert [Mixture(buckets, {"image": 2, "video": 1}, 2, seed=4)[n] for n in range(9)] != batches[:9]


def test_the_order_of_a_million_rows_is_made_once_an_epoch_and_not_for_every_batch():
    mixture, took = Mixture({"image": {(1, 64, 64): range(1_000_000)}}, {"image": 1}, 1, seed=0), []
    for numbers in (range(1), range(1, 2000)):
        started = time.perf_counter()
        assert len({mixture[n][2][0] for n in numbers}) == len(numbers)
        took.append(time.perf_counter() - started)
    assert took[1] < took[0]


def test_a_broken_sample_is_replaced_by_the_next_of_its_shape_and_reported(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(tmp_path / name, moving_picture(9, 64, 64))
    rows = read_table(
        write_table(tmp_path / "video.csv", [[n, n, "Mirror it."] for n in ("a.mp4", "b.mp4", "c.mp4")]), "video"
    )
    assert measure_rows(rows, still=False) == [(9, 64, 64)] * 3
    mixture = Mixture({"video": {(9, 64, 64): [0, 1, 2]}}, {"video": 1}, 3, seed=0)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:900])
    batch = Pairs({"video": rows}, Curriculum([(0, mixture)]), lambda source, ref: None)[0]
    order = ["abc"[row] for row in mixture[0][2]]
    assert [Path(p).stem for p in batch["paths"]] == ["c" if name == "b" else name for name in order]
    assert [Path(path).name for path, _ in batch["bad"]] == ["b.mp4"] and "b.mp4" in batch["bad"][0][1]
    for name in "ac":
        (tmp_path / f"{name}.mp4").unlink()
    assert "none of the 3" in Pairs({"video": rows}, Curriculum([(0, mixture)]), None)[0]["fatal"]


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


@pytest.mark.parametrize("rate, seconds", [(48000, 0.5), (11000, 0.3), (192000, 0.3)])
def test_sound_that_mp4_cannot_hold_becomes_aac_to_its_last_sample(tmp_path, rate, seconds):
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        video, sound = out.add_stream("libx264", rate=25), out.add_stream("pcm_s16le", rate=rate)
        video.width = video.height = 64
        sound.layout = "mono"
        for image in moving_picture(25, 64, 64):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        tone = (np.sin(np.arange(round(rate * seconds)) * 2 * np.pi * 440 / rate) * 20000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.rate, frame.pts = rate, 0
        out.mux(sound.encode(frame)), out.mux(sound.encode(None)), out.mux(video.encode(None))
    write_video(tmp_path / "out.mp4", moving_picture(25, 64, 64), 25, audio_from=tmp_path / "in.mkv")
    with av.open(str(tmp_path / "out.mp4")) as out:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in out.decode(audio=0)])
        loud = np.flatnonzero(np.abs(heard) > 0.2) / out.streams.audio[0].rate
    assert abs(loud[-1] - loud[0] - seconds) < 0.01


def test_a_table_has_references_where_a_column_says_so(tmp_path):
    for columns, kind in (
        ("src_video,tgt_video,prompt,ref_image", "ref"),
        ("src_video,tgt_video,prompt,ref_image_note", "video"),
    ):
        (tmp_path / "t.csv").write_text(columns + "\n")
        assert data.kind_of(tmp_path / "t.csv") == kind


def test_parquet_with_reference_bytes_gives_the_rows_that_a_csv_gives(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_image(tmp_path / "ref.png", moving_picture(1, 50, 40)[0])
    content = (tmp_path / "ref.png").read_bytes()
    columns = {"iid": ["1", "2", "3"], "prompt": ["x"] * 3, "src_video": ["a.mp4"] * 3, "tgt_video": ["b.mp4"] * 3,
               "ref_image_bytes": [content, None, content]}  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "ref.parquet", row_group_size=2)
    (tmp_path / "refvie_477k").mkdir()
    (tmp_path / "refvie_477k" / "chunk_0001.parquet").symlink_to(tmp_path / "ref.parquet")
    assert [path.name for path in data.find_tables([tmp_path / "refvie_477k"], "ref")] == ["chunk_0001.parquet"]
    rows = read_table(tmp_path / "ref.parquet", "ref")
    assert [row.source for row in rows] == [str(tmp_path / "a.mp4")] * 3
    assert torch.equal(data.read_reference(rows[2].ref), moving_picture(1, 50, 40)[0])
    with pytest.raises(MediaError, match="row 1 of group 0: has no ref_image_bytes"):
        data.read_reference(rows[1].ref)
    damaged = bytearray((tmp_path / "ref.parquet").read_bytes())
    at = data.parquet_file(tmp_path / "ref.parquet").metadata.row_group(1).column(4)
    start = at.dictionary_page_offset or at.data_page_offset
    damaged[start : start + 16] = b"\xff" * 16
    (tmp_path / "bad.parquet").write_bytes(damaged)
    bad = read_table(tmp_path / "bad.parquet", "ref")[2]
    with pytest.raises(MediaError, match=r"bad.parquet, row group 1: cannot be read \([^\n]*\)$"):
        data.read_reference(bad.ref)


def test_large_clips_share_a_few_shapes_and_small_ones_keep_theirs():
    assert bucket((100, 480, 832), 81, 720 * 1280) == (81, 480, 832)
    assert bucket((50, 1080, 1920), 81, 360_000) == bucket((49, 1070, 1930), 81, 360_000) == (49, 448, 800)


def test_check_names_what_is_wrong_with_a_table(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", moving_picture(9, 64, 64))
    write_clip(tmp_path / "b.mp4", moving_picture(7, 64, 96))
    (tmp_path / "c.mp4").write_text("no clip")
    pairs = [["a.mp4", "a.mp4", "x"], ["a.mp4", "b.mp4", "x"], ["a.mp4", "c.mp4", "x"]]
    with pytest.raises(SystemExit, match="2 rows have faults"):
        data.main(["check", str(write_table(tmp_path / "video.csv", pairs))])
    said = capsys.readouterr()
    said = said.out + said.err
    for words in (
        "b.mp4: has 7 frames, its source 9",
        "crops will not match",
        "c.mp4: cannot be decoded",
        "3 rows, 2 with faults",
    ):
        assert words in said


def test_a_path_into_a_sibling_whose_name_begins_alike_is_outside(tmp_path):
    with pytest.raises(ValueError, match="is outside of"):
        data.inside(tmp_path / "data", "../data-secret/x.png", "here")


def test_a_pair_is_as_long_as_its_shorter_file_and_two_lost_frames_are_forgiven(tmp_path):
    long, short = (write_clip(tmp_path / f"{count}.mp4", moving_picture(count, 64, 64)) for count in (13, 9))
    rows = [SimpleNamespace(source=a, target=b, ref=None) for a, b in ((long, short), (short, long))]
    assert measure_rows(rows, still=False) == [(9, 64, 64)] * 2
    assert len(media.read_frames(short, 11, (64, 64))) == 11
    with pytest.raises(MediaError, match="ends after 9 of 12"):
        media.read_frames(short, 12, (64, 64))


def test_sound_that_mp4_can_hold_is_copied_and_ends_with_the_pictures(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(30), sound="aac")
    write_video(tmp_path / "out.mp4", read_clip(source, 21).frames, 25, audio_from=source)
    with av.open(str(tmp_path / "out.mp4")) as out:
        heard = [(frame.time, np.abs(frame.to_ndarray()).max() > 0.05) for frame in out.decode(audio=0)]
    assert next(time for time, loud in heard if loud) < 0.1 and abs(heard[-1][0] - 21 / 25) < 0.1
