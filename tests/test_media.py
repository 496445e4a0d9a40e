"""Tests of media.py: files as people have them, read as a person sees and hears them."""

import gc
import re
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from conftest import bad_media, golden, moving_picture, recorded, write_clip
from media import (
    MediaError,
    decode,
    fit_frames,
    measure,
    nearest_size,
    open_media,
    pad_reference,
    read_clip,
    read_image,
    working_size,
    write_image,
    write_video,
)  # fmt: skip


@golden
def test_working_sizes_crops_and_reference_boxes_match_the_release():
    records, pictures = recorded("preprocess.json"), recorded("preprocess_frames.safetensors")
    for r in records["vae_inference"]:
        assert working_size(r["height"], r["width"], r["max_pixels"]) == (r["out_height"], r["out_width"])
    for i in range(3):
        image = pictures[f"{i}.image"]
        fitted = lambda pixels, image=image: fit_frames(image[None], working_size(*image.shape[:2], pixels))[0]
        pairs = {"ref_pad_64x96": pad_reference(image, (64, 96)), "max4096.inference": fitted(4096),
                 "maxnone.inference": fitted(720 * 1280)}  # fmt: skip
        for name, ours in pairs.items():
            assert (ours.int() - pictures[f"{i}.{name}"].int()).abs().float().mean() < 0.05, name
    for r in records["reference_padding"]:
        black = torch.zeros(r["height"], r["width"], 3, dtype=torch.uint8)
        inside = (pad_reference(black, r["target_wh"][::-1])[..., 0] == 0).nonzero()
        assert [*inside.amin(0).flip(0).tolist(), *(inside.amax(0) + 1).flip(0).tolist()] == r["inference_box_xyxy"]


def test_a_small_size_keeps_the_picture_s_aspect_and_uses_the_pixels():
    sizes = {
        (704, 1280): (48, 80),
        (1280, 720): (80, 48),
        (480, 640): (48, 64),
        (999, 999): (64, 64),
        (15, 640): (0, 0),
    }
    assert {size: nearest_size(*size, 64 * 64, 16) for size in sizes} == sizes


# Frames


def bars(count=21, height=64):
    """A white bar that moves 4 pixels a frame: `place` tells the frame's number."""
    frames = torch.zeros(count, height, -(-4 * count // 32) * 32, 3, dtype=torch.uint8)
    for i in range(count):
        frames[i, :, 4 * i : 4 * i + 4] = 255
    return frames


def place(rgb):
    return int(rgb.float().mean((0, 2)).argmax()) // 4


def places(path):
    with open_media(path) as (container, stream):
        return [place(rgb) for _, rgb in decode(path, container, stream)]


def test_a_clip_keeps_its_frames_and_its_rate(tmp_path):
    source = write_clip(tmp_path / "in.mkv", moving_picture(30), rate=Fraction(30000, 1001))
    clip = read_clip(source, max_frames=21)
    assert clip.frames.shape == (21, 64, 96, 3) and clip.fps == Fraction(30000, 1001) and not clip.still
    write_video(tmp_path / "out.mp4", clip.frames, clip.fps)
    again = read_clip(tmp_path / "out.mp4")
    assert again.frames.shape == clip.frames.shape and again.fps == clip.fps
    assert (again.frames.float() - clip.frames.float()).abs().mean() < 3
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert out.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_a_clip_of_a_higher_rate_gives_every_kth_frame_and_one_of_two_to_four_frames_all(tmp_path):
    clip = read_clip(write_clip(tmp_path / "in.mp4", bars(20), rate=30), 9, max_fps=8)
    assert clip.fps == Fraction(30, 4) and [place(rgb) for rgb in clip.frames] == [0, 4, 8, 12, 16]
    for count, read in ((1, 1), (2, 2), (4, 4), (5, 5), (8, 5), (90, 89)):  # one alone would be a picture
        assert len(read_clip(write_clip(tmp_path / "in.mp4", moving_picture(count, 32, 32)), 241).frames) == read


def remux(source, target, cut=0, **options):
    """Copy a clip's packets, `cut` seconds earlier."""
    with av.open(str(source)) as old, av.open(str(target), "w", **options) as new:
        stream = old.streams.video[0]
        track, ticks = new.add_stream_from_template(stream), round(cut / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, track
                new.mux(packet)
    return target


def test_a_clip_cut_without_encoding_it_anew_has_the_frames_that_are_shown(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(60))
    cut = remux(source, tmp_path / "cut.mp4", Fraction(48, 25))
    with av.open(str(cut)) as clip:
        assert clip.streams.video[0].frames == 60  # what makes it hard
    assert measure(cut)[0] == 12 and torch.equal(read_clip(cut).frames, read_clip(source).frames[48:57])


def test_a_clip_whose_header_says_neither_length_nor_rate_has_those_of_its_frames(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(20))
    for options in ({}, {"live": "1"}):  # of Matroska's time stamps, 1000 a second, or of no length
        copy = remux(source, tmp_path / "copy.mkv", options=options)
        assert measure(copy)[0] == measure(source)[0] == 20
        assert torch.equal(read_clip(copy).frames, read_clip(source).frames)


def test_an_avi_with_b_frames_has_every_frame_once_and_in_order(tmp_path):
    for codec, options in (("libx264", {"x264-params": "bframes=2:b-adapt=0"}), ("mpeg4", {"bf": "2"})):
        path = write_clip(tmp_path / f"{codec}.avi", bars(40), codec, options=options)
        assert places(path) == list(range(40)) and measure(path)[0] == 40


def test_every_picture_of_a_variable_frame_rate_stands_at_its_time(tmp_path):
    gif = write_clip(tmp_path / "held.gif", bars(21), "gif", "rgb8", 20, container={"final_delay": "300"})
    assert places(gif) == [*range(21), *[20] * 59] and measure(gif)[0] == 80  # 50 ms each, the last for 3 s
    clip = read_clip(gif)
    assert clip.fps == 20 and len(clip.frames) == 77
    times = [i for i in range(25) if i not in (5, 6, 13, 20)]  # a phone dropped four
    phone = write_clip(tmp_path / "phone.mp4", bars(21), rate=30, times=times, options={"x264-params": "bframes=0"})
    seen = places(phone)
    assert [seen[t] for t in times] == list(range(21)) and seen[5:7] == [4, 4] and read_clip(phone).fps == 30


def test_a_gif_of_one_frame_is_a_still_and_an_animated_avif_a_clip(tmp_path):
    assert read_clip(write_clip(tmp_path / "one.gif", bars(1, 64), "gif", "rgb8")).still
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("PyAV has no AV1 encoder here")
    clip = read_clip(write_clip(tmp_path / "in.avif", bars(10), "libsvtav1", rate=10, options={"preset": "10"}))
    assert not clip.still and clip.fps == 10 and len(clip.frames) == 9


# Pictures as they are seen


def encoded(codec, array, pixels):
    """A picture as a file's bytes."""
    codec = av.CodecContext.create(codec, "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *array.shape[:2], pixels, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(array, format=pixels)
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def test_rotation_alpha_and_wide_pixels_are_read_as_a_person_sees_them(tmp_path):
    path = write_clip(tmp_path / "in.mp4", moving_picture(1, 64, 96))
    upright, data = read_image(path), bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # the track header's display matrix
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "phone.mp4"), upright.rot90(-1))
    wide = write_clip(tmp_path / "wide.mp4", moving_picture(1, 64, 96), pixels=Fraction(4, 3))
    assert measure(wide)[:3] == (1, 64, 128) and read_image(wide).shape[1] == 128
    glass = np.full((40, 40, 4), (200, 100, 0, 51), dtype=np.uint8)  # a fifth over white
    (tmp_path / "glass.png").write_bytes(encoded("png", glass, "rgba"))
    assert (
        read_image(tmp_path / "glass.png")[0, 0].tolist() == [244, 224, 204] and read_clip(tmp_path / "glass.png").still
    )


def chunk(kind, data):
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_png_with_a_profile_or_damaged_exif_is_read_and_its_orientation_obeyed(tmp_path):
    image, path = moving_picture(1, 40, 60)[0], tmp_path / "in.png"
    plain, exif = encoded("png", image.numpy(), "rgb24"), b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    profile = chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(b"profile".ljust(132, b"\0")))  # every macOS screenshot
    garbage, short, turned = (chunk(b"eXIf", content) for content in (b"garbage", b"MM\0*", exif))
    for chunks in (profile, short, profile + garbage) * 3:
        path.write_bytes(plain[:33] + chunks + plain[33:])
        assert torch.equal(read_image(path), image)
    gc.collect()  # touching frame.side_data frees a dictionary twice: the process dies
    path.write_bytes(plain[:33] + profile + turned + plain[33:])
    assert torch.equal(read_image(path), image.rot90(-1))


def test_a_tiff_with_the_tags_of_cameras_and_scanners_is_read(tmp_path):
    image = moving_picture(1, 40, 60)[0]
    tiff = encoded("tiff", image.numpy(), "rgb24")
    at = struct.unpack_from("<I", tiff, 4)[0] + 2  # of the tags, the first of which another may replace
    tags = list(struct.iter_unpack("<HHII", tiff[at : at + 12 * 14]))
    assert (296, 3, 1, 2) in tags  # the resolution's unit
    for other, shown in (((274, 3, 1, 6), image.rot90(-1)), ((700, 1, 4, 0x2F3E783C), image), (tags[0], image)):
        changed = b"".join(struct.pack("<HHII", *tag) for tag in sorted([other, *tags[1:]]))
        (tmp_path / "in.tif").write_bytes(tiff[:at] + changed + tiff[at + len(changed) :])
        assert torch.equal(read_image(tmp_path / "in.tif"), shown)


def test_an_untagged_clip_above_576_lines_is_read_as_bt_709(tmp_path):
    colour = torch.tensor([200, 40, 90], dtype=torch.uint8)
    write_video(tmp_path / "tagged.mp4", colour.expand(1, 640, 64, 3), 10)
    with av.open(str(tmp_path / "plain.mp4"), "w") as out:
        video = out.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 640, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(colour.expand(640, 64, 3).numpy(), format="rgb24")
        out.mux(video.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        out.mux(video.encode())
    for name in ("tagged.mp4", "plain.mp4"):
        assert (read_image(tmp_path / name).int() - colour).abs().max() <= 3


# Faults


def test_every_bad_file_is_one_media_error_that_names_it(tmp_path):
    bad_media(tmp_path)
    words = "half.mp4 flipped.mp4 empty.mp4 words.png dot.png half.jpg sound.mp3 absent.mp4 drawing.svg"
    for name in words.split():
        with pytest.raises(MediaError, match=re.escape(name)) as error:
            read_clip(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_clip_that_is_cut_off_is_told_of(tmp_path, capsys):
    path = write_clip(tmp_path / "in.mp4", moving_picture(60, 128, 128))
    whole = remux(path, tmp_path / "fast.mp4", container_options={"movflags": "faststart"}).read_bytes()
    for share in (0.35, 0.7):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
        try:
            assert 60 * share - 15 < len(read_clip(tmp_path / "cut.mp4").frames) < 58
            assert re.search(r"promises 60 frames and has \d\d: is it cut off", capsys.readouterr().err)
        except MediaError as error:
            assert "cut.mp4" in str(error)  # where the cut goes through a frame


def test_a_name_is_a_name_and_no_pattern(tmp_path):
    write_image(tmp_path / "i001.png", 255 - moving_picture(1)[0])
    for name in ("100%done.png", "my%20dog.png", "i%03d.png", "clip12:30.png"):
        write_image(tmp_path / name, moving_picture(1)[0])
        assert torch.equal(read_image(tmp_path / name), moving_picture(1)[0])


# Sound


def add_beeps(path, parts, codec="pcm_s16le"):
    """A clip of 2 s with sound in parts of 0.9 s, each from an encoder of its own: (start in s, channels, rate, beeps
    at s)."""
    with av.open(str(path), "w") as out:
        video, track = out.add_stream("libx264", rate=20), None
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for start, channels, rate, beeps in parts:
            layout = "stereo" if channels == 2 else "mono"
            track = track or out.add_stream(codec, rate=rate, layout=layout)
            encoder = av.CodecContext.create(codec, "w") if start else track.codec_context
            if start:
                encoder.sample_rate, encoder.layout, encoder.format = rate, layout, "s16"
                encoder.time_base = Fraction(1, rate)
            t = np.arange(rate * 9 // 10) / rate + start
            wave = sum(((t >= b) & (t < b + 0.1)) * np.sin(6283 * t) for b in beeps) * 20000
            frame = av.AudioFrame.from_ndarray(np.repeat(wave.astype(np.int16), channels)[None], "s16", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.stream = track
                out.mux(packet)
        for image in moving_picture(40, 64, 64):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        out.mux(video.encode())
    return path


def heard(path):
    """Seconds at which beeps begin, and where the sound ends."""
    with av.open(str(path)) as file:
        pieces = [(frame.time, frame.to_ndarray()[0], frame.sample_rate) for frame in file.decode(audio=0)]
    loud = [time + i / rate for time, wave, rate in pieces for i in np.flatnonzero(abs(wave) > 0.1)]
    return [b for a, b in zip([-1, *loud], loud) if b - a > 0.05], pieces[-1][0] + len(pieces[-1][1]) / pieces[-1][2]


@pytest.mark.parametrize("name, codec, parts", [
    ("odd.mkv", "pcm_s16le", [(0, 1, 11000, (0.2, 0.6))]),
    ("late.mkv", "pcm_s16le", [(0.4, 1, 192000, (0.6, 1.1))]),
    ("gap.mkv", "pcm_s16le", [(0, 1, 48000, (0.2, 0.7)), (1.1, 1, 48000, (1.3,))]),
    ("usual.mp4", "aac", [(0, 2, 44100, (0.2, 0.6))]),
    ("changing.ts", "mp2", [(0, 2, 48000, (0.2, 0.6)), (0.9, 1, 44100, (1.3,))]),
])  # fmt: skip
def test_sound_is_heard_when_it_was_and_ends_with_the_pictures(tmp_path, name, codec, parts):
    source = add_beeps(tmp_path / name, parts, codec)
    clip = read_clip(source)
    write_video(tmp_path / "out.mp4", clip.frames, clip.fps, audio_from=source)
    starts, end = heard(tmp_path / "out.mp4")
    expected = [b for *_, beeps in parts for b in beeps]
    assert len(starts) == len(expected) and max(abs(a - b) for a, b in zip(starts, expected)) < 0.015
    assert abs(end - min(parts[-1][0] + 0.9, len(clip.frames) / clip.fps)) < 0.1


def test_sound_that_cannot_be_kept_never_costs_the_video(tmp_path, capsys):
    (tmp_path / "words.mp4").write_text("not a clip")
    write_video(tmp_path / "out.mp4", moving_picture(5, 64, 64), 25, audio_from=tmp_path / "words.mp4")
    assert len(read_clip(tmp_path / "out.mp4").frames) == 5
    assert "words.mp4 keeps no sound" in capsys.readouterr().err
