"""Pictures and clips: from any file PyAV can read to uint8 tensors on the model's grid, and back to a file.

    file -> decode, rotate, alpha over white -> constant frame rate -> crop to the aspect, resize (H, W in 32s)
         -> Clip.frames uint8 (T, H, W, 3), T = 4k + 1
    frames -> h264 mp4 with the source's frame rate and sound, or a still picture

Sizes and resizing follow the released inference (FACTS.md, "Frames and sizes"); frame rate and sound, which
the release drops, are kept. Files are written under a temporary name and renamed when whole.
"""

import io
import math
import os
import re
import shutil
import sys
import threading
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

with suppress(ImportError):  # without PyAV all but reading and writing files works
    import av
    from av.stream import Disposition

GRID = 32  # pixels: the VAE's stride 16 (or 8) times the DiT's patch 2, and what every Kiwi-Edit size is floored to
MAX_PIXELS = 720 * 1280
# Pixel format and x264's options. Without mbtree the bytes depend on the frames alone: it reads memory that nobody has
# written, and the same edit would not give the same file.
SAME_BYTES = {"preset": "medium", "x264-params": "mbtree=0"}
VIDEO_CODEC = ("yuv420p", {"crf": "16", **SAME_BYTES})  # near lossless
SMALL_VIDEO_CODEC = ("yuv420p", {"crf": "28", **SAME_BYTES})  # to look at on a page
EXACT_VIDEO_CODEC = ("yuv444p", {"crf": "4", **SAME_BYTES})  # pictures so small that VIDEO_CODEC costs them 15 dB
SMALL_FRAME = 3 * 256 * 256  # values: frames that are as small, such as the nano model's
HDR = (16, 18)  # transfer functions: PQ and HLG
IMAGE_CODECS = {".png": ("png", "rgb24"), ".jpg": ("mjpeg", "yuvj444p"), ".jpeg": ("mjpeg", "yuvj444p")}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)  # Hz
MP4_AUDIO = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")  # copied as they are; others become aac


class MediaError(ValueError):
    """A file that cannot be read or written as a picture or clip; the text names the file and the mend."""


@dataclass
class Clip:
    frames: torch.Tensor  # uint8 (T, H, W, 3)
    fps: Fraction
    still: bool  # came from a picture file: the edit is written as a picture too
    source_size: tuple[int, int]  # (height, width) before resizing, upright
    path: str


def working_size(height, width, max_pixels=MAX_PIXELS):
    """The size (h, w) at which a picture is edited: at most max_pixels, floored to multiples of 32.

    ValueError where a side would be less than 32.
    """
    scale = max(math.sqrt(height * width / max_pixels), 1)
    h, w = int(height / scale), int(width / scale)
    if min(h, w) < GRID:
        shrunk = f", shrunk to at most {max_pixels} in all," * (scale > 1)
        raise ValueError(f"{width}x{height} pixels{shrunk} are too few: each side needs at least {GRID}")
    return h // GRID * GRID, w // GRID * GRID


def nearest_size(height, width, max_pixels, grid):
    """The size (h, w) for weights that know only small frames, where `working_size` could drop half of the pixels.

    Of all multiples of `grid` with at most max_pixels, none larger than the picture, the one with the largest product of
    its area and the square of the share of the picture that its crop leaves: 1280x704 gives 80x48 of 4096. ValueError
    where a side is too short.
    """
    sizes = [(h, w) for h in range(grid, height + 1, grid) for w in range(grid, min(width, max_pixels // h) + 1, grid)]
    if not sizes:
        shrunk = f", shrunk to at most {max_pixels} in all," * (min(height, width) >= grid)
        raise ValueError(f"{width}x{height} pixels{shrunk} are too few: each side needs at least {grid}")

    def kept(size):
        aspect = size[0] * width / (size[1] * height)
        return min(aspect, 1 / aspect)

    return max(sizes, key=lambda size: size[0] * size[1] * kept(size) ** 2)


def usable_frames(count, max_frames=81):
    """The largest 4k + 1 that is at most count and max_frames: the lengths the VAE takes."""
    return (min(count, max_frames) - 1) // 4 * 4 + 1


def fit_frames(frames, size):
    """Crop uint8 frames (T, H, W, 3) to the aspect of `size` (h, w), centred, and resize them: (T, h, w, 3)."""
    height, width = size
    H, W = frames.shape[1:3]
    if H / W < height / width:
        inner = max(int(H / height * width), 1)
        left = (W - inner) // 2
        frames = frames[:, :, left : left + inner]
    else:
        inner = max(int(W / width * height), 1)
        top = (H - inner) // 2
        frames = frames[:, top : top + inner]
    return resize(frames, size)


def resize(frames, size):
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3), bicubic and antialiased, as Pillow does."""
    x = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1).contiguous()


def pad_reference(image, size, shrink=1.0):
    """A reference picture uint8 (H, W, 3), fitted into `size` (h, w), shrunk, and centred on white: (h, w, 3)."""
    height, width = size
    H, W = image.shape[:2]
    h, w = (round(H / W * width), width) if W / H > width / height else (height, round(W / H * height))
    h, w = max(round(h * shrink), 1), max(round(w * shrink), 1)
    top, left = round((height - h) / 2), round((width - w) / 2)
    out = torch.full((height, width, 3), 255, dtype=torch.uint8)
    out[top : top + h, left : left + w] = resize(image[None], (h, w))[0]
    return out


def beginning(path, content=None):
    """The first 64 bytes of a file, as far as they can be read."""
    try:
        return path.open("rb").read(64) if content is None else content[:64]
    except OSError:
        return b""


@contextmanager
def open_media(path, content=None):
    """Open a file, or its content as bytes, and yield (container, its picture stream); every PyAV error becomes a
    MediaError."""
    path = Path(path)
    if content is None and not path.is_file():
        raise MediaError(f"{path}: {'a folder; give a clip or a picture in it' if path.is_dir() else 'no such file'}")
    try:
        # absolute: of "clip12:30.mp4" ffmpeg would take the first part for a protocol; and "100%dogs.png" for many files
        name = str(path.absolute()) if content is None else io.BytesIO(content)
        with av.open(name, options={"pattern_type": "none"}) as container:
            # an mp3's cover art is a video stream to ffmpeg, but not a clip
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if any(s.disposition & Disposition.dependent for s in streams):
                raise MediaError(
                    f"{path}: a HEIC or AVIF picture in tiles, of which FFmpeg would give the first: convert it to JPEG or PNG"
                )
            if not streams:
                raise MediaError(f"{path}: has no pictures (an audio file?); give a video or an image")
            if streams[0].codec_context is None:
                raise MediaError(f"{path}: FFmpeg has no decoder for it here; convert it to PNG or mp4")
            yield container, streams[0]
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if b"ANIM" in beginning(path, content):
            reason = "an animated WebP, which FFmpeg does not read: convert it to GIF or mp4"
        raise MediaError(f"{path}: cannot be decoded ({reason}); is it whole, and a video or image?") from None


def is_picture(container):
    brand = container.metadata.get("major_brand", "")  # an AVIF or HEIC is a picture in the manner of an mp4
    return (
        brand in ("avif", "heic", "heix", "mif1")
        or container.format.name == "image2"
        or container.format.name.endswith("_pipe")
    )


def mirrored(frame):
    """Whether a frame's metadata mirror it, which `frame.rotation` cannot say."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # a picture with EXIF, a type that PyAV has no name for: `mirrored_by_exif`
        return False
    if matrix is None:
        return False
    a, b, _, c, d = (float(x) for x in np.frombuffer(bytes(matrix), np.int32)[:5])
    return a * d < b * c


def mirrored_by_exif(content):
    """Whether the EXIF orientation in a picture file's bytes is one of the four that mirror."""
    start = re.search(rb"(Exif\0\0|eXIf|EXIF....)(?=II\*\0|MM\0\*)", content, re.DOTALL)  # JPEG, PNG, WebP
    if not start:
        return False
    exif = content[start.end() :]
    order = "little" if exif[:2] == b"II" else "big"
    first = int.from_bytes(exif[4:8], order) + 2
    for at in range(first, first + 12 * int.from_bytes(exif[first - 2 : first], order), 12):
        if int.from_bytes(exif[at : at + 2], order) == 0x0112:
            return int.from_bytes(exif[at + 8 : at + 10], order) in (2, 4, 5, 7)
    return False


def decoded(container, stream):
    """Yield (frame, whether the metadata mirror it)."""
    mirror = None
    for packet in container.demux(stream):
        if packet.size and is_picture(container):
            mirror = mirrored_by_exif(bytes(packet)) or None  # a picture's one packet is the file
        for frame in packet.decode():
            if (
                mirror is None
            ):  # asked of the first alone: a frame and its side data refer to each other, and would stay for long
                mirror = mirrored(frame)
            yield frame, mirror


def upright_rgb(frame, aspect=1, mirror=False):
    """A decoded frame as uint8 (H, W, 3): alpha laid over white, in square pixels, mirrored and rotated as its metadata
    ask. aspect: of the pixels, width to height."""
    if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        rgb = ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    rgb = torch.from_numpy(np.ascontiguousarray(rgb))
    if aspect != 1:
        rgb = resize(rgb[None], (rgb.shape[0], round(rgb.shape[1] * aspect)))[0]
    turns = round(frame.rotation / 90)
    if mirror:  # the rotation is read off the first axis, which the mirror has turned by 180 degrees
        rgb, turns = rgb.flip(1), turns + 2
    return rgb.rot90(turns).contiguous() if turns % 4 else rgb  # rot90 copies, even for none


@lru_cache(4096)  # once a file, however often training reads it
def note(path, text):
    print(f"note: {path} {text}", file=sys.stderr)


def frame_rate(stream):
    """Frames a second of a clip; 25 where its file does not say. More than 300 is what its time stamps count in, such as
    the 1000 of a Matroska or WebM file that tells no duration of a frame."""
    rates = (stream.average_rate, stream.base_rate)
    return next((rate for rate in rates if rate and rate <= 300), Fraction(25))


def decode(path, container, stream):
    """Yield (index, rgb) of the clip's upright frames at its average rate.

    A variable frame rate becomes a constant one: a frame stays until the next, of two in one tick the later wins.
    """
    stream.thread_type = "AUTO"
    if is_picture(container):
        stream.codec_context.options = {"err_detect": "explode"}  # or half a JPEG decodes to a half grey picture
    fps, aspect = frame_rate(stream), stream.sample_aspect_ratio or 1
    aspect = aspect if 0.25 < aspect < 4 else 1  # other numbers are mistakes
    pending, start = None, None
    if stream.metadata.get("alpha_mode") == "1":
        note(
            path,
            "is WebM with alpha, which FFmpeg's decoder drops: what shows through is black; give ProRes 4444 or PNG for white",
        )
    for count, (frame, mirror) in enumerate(decoded(container, stream)):
        if frame.is_corrupt:
            raise MediaError(f"{path}: frame {count} is corrupt; re-encode or fetch the file again")
        if not count and frame.color_trc in HDR:
            note(
                path, "is HDR and read without tone mapping: its colours will be dull; convert it to SDR for true ones"
            )
        if start is None:
            start = frame.time
        index = count if frame.time is None or start is None else round((frame.time - start) * float(fps))
        rgb = upright_rgb(frame, aspect, mirror)
        while pending is not None and pending[0] < index:
            yield pending
            pending = (pending[0] + 1, pending[1])
        pending = (max(index, 0), rgb)
    if pending is None:
        raise MediaError(f"{path}: has no frames")
    yield pending


def shown_frames(container, stream):
    """How many frames a clip's header promises, 0 where it says nothing (WebM as it was streamed). It may count more packets than are shown: a cut without re-encoding leaves
    those since the last key frame in the file, and its edit list hides them."""
    fps = frame_rate(stream)
    length = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 10**6)
    counts = [count for count in (stream.frames, round(length * fps)) if count]
    return min(counts, default=0)


def read_clip(path, max_frames=81, max_pixels=MAX_PIXELS, max_fps=None, size_of=working_size):
    """The first 4k + 1 (at most max_frames) frames of a video or image file, fitted to the working size; of a clip of 2 to
    4 frames all.

    max_fps: of a clip that has about twice as many every second frame is taken, and so on. size_of: another rule than
    `working_size`, (height, width, max_pixels) -> (h, w). Frames are resized as they are decoded: memory is that of the
    result. MediaError where the file is missing, unreadable, corrupt, without pictures or too small.
    """
    frames, source_size = [], None
    with open_media(path) as (container, stream):
        fps = frame_rate(stream)
        stride = max(round(fps / max_fps), 1) if max_fps else 1
        still = is_picture(container)
        for number, (_, rgb) in enumerate(decode(path, container, stream)):
            if number % stride:
                continue
            if source_size is None:
                source_size = tuple(rgb.shape[:2])
                try:
                    size = size_of(*source_size, max_pixels)
                except ValueError as error:
                    raise MediaError(f"{path}: {error}") from None
            frames.append(fit_frames(rgb[None], size)[0])
            if len(frames) == max_frames:
                break
        declared = stream.frames and shown_frames(container, stream)
    if len(frames) < min(declared // stride, max_frames) // 2:
        raise MediaError(f"{path}: ends after {number + 1} of {declared} frames; fetch the file again")
    count = usable_frames(len(frames), max_frames)
    frames = torch.stack(frames[: count if count > 1 else 4])  # of fewer than 5 one alone would be a picture
    return Clip(frames, fps / stride, still and len(frames) == 1, source_size, str(path))


def read_image(path, content=None):
    """A picture file (or its content, bytes), or the first frame of a video, as uint8 (H, W, 3). MediaError where that
    fails."""
    with open_media(path, content) as (container, stream):
        return next(decode(path, container, stream))[1]


def write_text(path, text):
    """A text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def whole_folder(folder):
    """Yield an empty folder beside `folder`; it takes that one's place when the block ends well, and goes otherwise."""
    folder = Path(folder).resolve()  # what a link stands for is replaced, not the link
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it when the block ends well, remove it otherwise."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path):
    """Beside `path`, of this thread alone, with the same ending."""
    return path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp{path.suffix}")


def writable(path):
    """Check early, before minutes of work, that `path` can be written. MediaError if not."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise MediaError(f"{path}: is a folder; give a file name for the result")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(Path(path).resolve())
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror}); choose another place for the output") from None


def write_image(path, image):
    """uint8 (H, W, 3) to a .png or .jpg file. MediaError for another ending."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_CODECS:
        raise MediaError(f"{path}: a picture is written as {', '.join(IMAGE_CODECS)}")
    name, pixel_format = IMAGE_CODECS[path.suffix.lower()]
    codec = av.CodecContext.create(name, "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = pixel_format, Fraction(1, 25)
    if name == "mjpeg":
        codec.qmin = codec.qmax = 2
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=pixel_format)
    frame.pts = 0
    content = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror}); choose another place or make room") from None


def faithful_codec(frames):
    """The codec for frames (T, H, W, 3) that are judged by their pixels."""
    return EXACT_VIDEO_CODEC if frames[0].numel() <= SMALL_FRAME else VIDEO_CODEC


def write_video(path, frames, fps, audio_from=None, codec=VIDEO_CODEC):
    """uint8 frames (T, H, W, 3), H and W even, to an h264 mp4 (BT.709) at `fps`.

    audio_from: a file whose sound, if it has any, is kept for the length of the clip. Sound that cannot be kept
    is reported on stderr and does not cost the video. codec: VIDEO_CODEC, SMALL_VIDEO_CODEC or EXACT_VIDEO_CODEC.
    ValueError without frames, or for a rate of 0.
    """
    if not len(frames) or fps <= 0:
        raise ValueError(f"{path}: a video of {len(frames)} frames at {fps} a second cannot be written")
    fps = Fraction(fps).limit_denominator(1001000)
    with whole_file(path) as temporary:
        try:
            mux_video(temporary, frames, fps, audio_from, codec)
        except av.error.FFmpegError as error:
            if audio_from is None or isinstance(error, OSError) and error.errno == 28:  # no space left on device
                raise MediaError(
                    f"{path}: cannot be written ({error.strerror}); choose another place or make room"
                ) from None
            print(f"{audio_from}: its sound cannot be kept ({error.strerror})", file=sys.stderr)
            mux_video(temporary, frames, fps, None, codec)


def mux_video(path, frames, fps, audio_from, codec):
    duration, (pixel_format, options) = len(frames) / fps, codec
    heard = nullcontext() if audio_from is None else av.open(str(Path(audio_from).absolute()))
    with (
        heard as source,
        av.open(str(Path(path).absolute()), "w", format="mp4", container_options={"movflags": "faststart"}) as out,
    ):
        video = out.add_stream("libx264", rate=fps, options=options)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], pixel_format
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        sound = source and next(iter(source.streams.audio), None)
        if sound and sound.codec_context is None:
            print(f"{audio_from}: its sound cannot be kept (FFmpeg has no decoder for it)", file=sys.stderr)
            sound = None
        add_sound = copy_sound(out, source, duration) if sound else None
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            out.mux(video.encode(frame.reformat(format=pixel_format, dst_colorspace="ITU709")))
        out.mux(video.encode())
        if add_sound:
            add_sound()


def copy_sound(out, source, duration):
    """Add a stream for the source's sound to `out` and return the function that fills it.

    Streams must be added before the first packet is written. Time counts from the source's first picture.
    """
    sound = source.streams.audio[0]
    pictures = source.streams.video[0]
    start = float(pictures.start_time * pictures.time_base) if pictures.start_time else 0.0

    def copy():
        for packet in source.demux(sound):
            if packet.pts is None:
                continue
            time = float(packet.pts * packet.time_base) - start
            if time >= duration:
                break
            offset = round(start / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, track
            out.mux(packet)

    def transcode():
        small = av.AudioResampler(format="fltp", layout=track.codec_context.layout, rate=rate, frame_size=1024)
        samples = None

        def add(pieces):
            nonlocal samples
            for piece in pieces:
                piece.pts = samples
                samples += piece.samples
                out.mux(track.encode(piece))

        for frame in source.decode(sound):
            if frame.time is not None and frame.time < start:
                continue
            if samples is None:  # sound may set in later than the pictures
                samples = round(((frame.time or start) - start) * rate)
            if samples >= duration * rate:
                break
            add(small.resample(frame))
        else:
            if samples is not None:
                add(small.resample(None))
        out.mux(track.encode(None))

    if sound.codec_context.name.removesuffix("float") in MP4_AUDIO:
        track = out.add_stream_from_template(sound)
        return copy
    rate = min(AAC_RATES, key=lambda known: abs(known - sound.rate))
    track = out.add_stream("aac", rate=rate)
    track.codec_context.layout = "mono" if sound.layout.nb_channels == 1 else "stereo"
    return transcode


def measure(path):
    """(frames, height, width) of a picture or clip, upright, from its header and first frame; a clip whose header does not
    say is decoded to be counted. MediaError."""
    with open_media(path) as (container, stream):
        frames = decode(path, container, stream)
        _, rgb = next(frames)
        return 1 if is_picture(container) else shown_frames(container, stream) or 1 + sum(
            1 for _ in frames
        ), *rgb.shape[:2]


def read_frames(path, count, size):
    """The first `count` frames of a file, fitted to `size` (h, w): uint8 (count, h, w, 3).

    One or two that its header promised and it does not have repeat the last. MediaError where more are missing.
    """
    frames = []
    with open_media(path) as (container, stream):
        for _, rgb in decode(path, container, stream):
            frames.append(fit_frames(rgb[None], size)[0])
            if len(frames) == count:
                break
    if len(frames) < max(count - 2, 1):
        raise MediaError(f"{path}: ends after {len(frames)} of {count} frames; fetch the file again")
    return torch.stack(frames + frames[-1:] * (count - len(frames)))


def decoded_shape(path):
    """(frames, height, width) of a file, all of it decoded. MediaError."""
    with open_media(path) as (container, stream):
        for frames, (_, rgb) in enumerate(decode(path, container, stream), 1):
            pass
    return frames, *rgb.shape[:2]
