"""Pictures and clips: from any file that PyAV reads to uint8 tensors on the model's grid, and back to a file.

    file -> decode, rotate, alpha over white -> constant frame rate -> crop to the aspect, resize (H, W in 32s)
         -> Clip.frames uint8 (T, H, W, 3), T = 4k + 1
    frames -> h264 mp4 with the source's frame rate and sound, or a still picture

Sizes and resizing follow the released inference (FACTS.md, "Frames and sizes"); it drops frame rate and sound, we keep
them. Orientation comes from `frame.rotation` alone: touching `frame.side_data` crashes PyAV 17 to 18.1 on a PNG with an
ICC profile. So mirrored orientations (some selfies) are not seen. Files appear under their name when they are whole.
"""

import io
import math
import os
import shutil
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

with suppress(ImportError):  # without PyAV all but reading and writing files works
    import av
    from av.stream import Disposition

GRID = 32  # pixels: the VAE's stride 16 (or 8) times the DiT's patch 2; every Kiwi-Edit size is floored to it
MAX_PIXELS = 720 * 1280
MAX_RATE = 300  # frames a second; more is a container's unit of time, such as Matroska's 1000
# Pixel format and x264's options. Without mbtree the bytes depend on the frames alone: it reads uninitialised memory.
SAME_BYTES = {"preset": "medium", "x264-params": "mbtree=0"}
VIDEO_CODEC = ("yuv420p", {"crf": "16", **SAME_BYTES})  # near lossless
EXACT_VIDEO_CODEC = ("yuv444p", {"crf": "4", **SAME_BYTES})  # for small frames, where VIDEO_CODEC costs 15 dB
SMALL_FRAME = 3 * 256 * 256  # values of such a frame, e.g. the nano model's
HDR = (16, 18)  # transfer functions PQ and HLG
UNSPECIFIED = 2  # colour matrix
SD_HEIGHT = 576  # above it players take BT.709 where a clip does not name its matrix
IMAGE_CODECS = {".png": ("png", "rgb24"), ".jpg": ("mjpeg", "yuvj444p"), ".jpeg": ("mjpeg", "yuvj444p")}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)  # Hz
MP4_AUDIO = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")  # copied; others become AAC


class MediaError(ValueError):
    """A file that cannot be read or written as a picture or clip; the text names the file and the mend."""


@dataclass
class Clip:
    frames: torch.Tensor  # uint8 (T, H, W, 3), or a `FrameFile` that stands for it
    fps: Fraction
    still: bool  # from a picture file: the edit is written as a picture too
    source_size: tuple[int, int]  # (height, width) before resizing, upright
    path: str


# Sizes


def working_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The size (h, w) at which a picture is edited: at most max_pixels, floored to multiples of 32.

    ValueError where a side would be less than 32.
    """
    scale = max(math.sqrt(height * width / max_pixels), 1)
    h, w = int(height / scale), int(width / scale)
    if min(h, w) < GRID:
        raise ValueError(too_small(height, width, max_pixels, scale > 1, GRID))
    return h // GRID * GRID, w // GRID * GRID


def nearest_size(height: int, width: int, max_pixels: int, grid: int) -> tuple[int, int]:
    """The size (h, w) for weights that know only small frames, where `working_size` could drop half of the pixels.

    Of all multiples of `grid` with at most max_pixels, none larger than the picture, the one with the largest product
    of its area and the squared share of the picture that its crop leaves: 1280x704 gives 80x48 of 4096. ValueError
    where a side is too short.
    """
    sizes = [(h, w) for h in range(grid, height + 1, grid) for w in range(grid, min(width, max_pixels // h) + 1, grid)]
    if not sizes:
        raise ValueError(too_small(height, width, max_pixels, min(height, width) >= grid, grid))

    def kept(size):
        aspect = size[0] * width / (size[1] * height)
        return min(aspect, 1 / aspect)

    return max(sizes, key=lambda size: size[0] * size[1] * kept(size) ** 2)


def too_small(height, width, max_pixels, shrunk, grid):
    limit = f", shrunk to at most {max_pixels} in all," * shrunk
    return f"{width}x{height} pixels{limit} are too few: each side needs at least {grid}"


def usable_frames(count: int, max_frames: int = 81) -> int:
    """The largest 4k + 1 that is at most count and max_frames: the lengths the VAE takes."""
    return (min(count, max_frames) - 1) // 4 * 4 + 1


def fit_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
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


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3), bicubic and antialiased, as Pillow does."""
    x = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1).contiguous()


def pad_reference(image: torch.Tensor, size: tuple[int, int], shrink: float = 1.0) -> torch.Tensor:
    """A reference picture uint8 (H, W, 3), fitted into `size` (h, w), shrunk, and centred on white: (h, w, 3)."""
    height, width = size
    H, W = image.shape[:2]
    h, w = (round(H / W * width), width) if W / H > width / height else (height, round(W / H * height))
    h, w = max(round(h * shrink), 1), max(round(w * shrink), 1)
    top, left = round((height - h) / 2), round((width - w) / 2)
    out = torch.full((height, width, 3), 255, dtype=torch.uint8)
    out[top : top + h, left : left + w] = resize(image[None], (h, w))[0]
    return out


# Reading


def read_clip(path, max_frames=81, max_pixels=MAX_PIXELS, max_fps=None, size_of=working_size) -> Clip:
    """The first 4k + 1 (at most max_frames) frames of a video or image file, fitted to the working size; a clip of 2
    to 4 frames keeps all.

    max_fps: a clip at about twice that rate gives every second frame, and so on. size_of: another rule than
    `working_size`, (height, width, max_pixels) -> (h, w). Frames are resized as they are decoded: memory is that of
    the result. MediaError where the file is missing, unreadable, corrupt, without pictures or too small.
    """
    frames, size, number = [], None, -1
    with open_media(path) as (container, stream):
        fps = frame_rate(stream)
        stride = max(round(fps / max_fps), 1) if max_fps else 1
        for number, (_, rgb) in enumerate(decode(path, container, stream)):
            if number % stride:
                continue
            if size is None:
                source_size = tuple(rgb.shape[:2])
                try:
                    size = size_of(*source_size, max_pixels)
                except ValueError as error:
                    raise MediaError(f"{path}: {error}") from None
            frames.append(fit_frames(rgb[None], size)[0])
            if len(frames) == max_frames:
                break
        still = is_picture(container) and len(frames) == 1
        promised, counted = 0 if still else shown_frames(container, stream), stream.frames
    if counted and len(frames) < min(promised // stride, max_frames) // 2:
        raise MediaError(f"{path}: ends after {number + 1} of {promised} frames; fetch the file again")
    # without a count the length is the container's, whose sound may be longer
    if len(frames) < max_frames and number + 1 < promised - max(2, promised // (50 if counted else 10)):
        note(path, f"promises {promised} frames and has {number + 1}: is it cut off? Fetch it again for the rest")
    count = usable_frames(len(frames), max_frames)
    frames = torch.stack(frames[: count if count > 1 else 4])  # of fewer than 5 one alone would be a picture
    return Clip(frames, fps / stride, still, source_size, str(path))


@dataclass(frozen=True)
class FrameFile:
    """The frames of a clip that is too long for memory, decoded and fitted anew whenever they are iterated."""

    path: str
    count: int
    size: tuple[int, int]  # (h, w)
    stride: int = 1
    dtype = torch.uint8

    @property
    def shape(self):
        return (self.count, *self.size, 3)

    def __len__(self):
        return self.count

    def __iter__(self):
        with open_media(self.path) as (container, stream):
            frames = decode(self.path, container, stream)
            for _, rgb in islice(frames, 0, (self.count - 1) * self.stride + 1, self.stride):
                yield fit_frames(rgb[None], self.size)[0]


def long_clip(path, held, max_frames=81, max_pixels=MAX_PIXELS, max_fps=None, size_of=working_size) -> Clip:
    """`read_clip`; of a clip with more than `held` frames they stay in their file, a `FrameFile`."""
    clip = read_clip(path, min(max_frames, held + 4), max_pixels, max_fps, size_of)  # 4: or 4k + 1 would hide the rest
    if max_frames <= held or len(clip.frames) <= held:
        return clip
    with open_media(path) as (container, stream):
        stride = round(frame_rate(stream) / clip.fps)
        frames = islice(decode(path, container, stream), 0, (max_frames - 1) * stride + 1, stride)
        count = usable_frames(sum(1 for _ in frames), max_frames)
    return replace(clip, frames=FrameFile(str(path), count, tuple(clip.frames.shape[1:3]), stride))


def read_image(path, content: bytes | None = None) -> torch.Tensor:
    """A picture file (or its content), or the first frame of a video, as uint8 (H, W, 3). MediaError."""
    with open_media(path, content) as (container, stream):
        return next(decode(path, container, stream))[1]


def read_frames(path, count: int, size: tuple[int, int]) -> torch.Tensor:
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


def measure(path) -> tuple[int, int, int]:
    """(frames, height, width) of a picture or clip, upright, from its header and first frame; a clip whose header has
    no length is decoded to be counted. MediaError."""
    with open_media(path) as (container, stream):
        frames = decode(path, container, stream)
        _, rgb = next(frames)
        if is_picture(container):
            return 1, *rgb.shape[:2]
        return shown_frames(container, stream) or 1 + sum(1 for _ in frames), *rgb.shape[:2]


def decoded_shape(path) -> tuple[int, int, int]:
    """(frames, height, width) of a file, all of it decoded. MediaError."""
    with open_media(path) as (container, stream):
        sizes = [tuple(rgb.shape[:2]) for _, rgb in decode(path, container, stream)]
    return len(sizes), *sizes[-1]


@contextmanager
def open_media(path, content: bytes | None = None):
    """Open a file, or its content, and yield (container, its picture stream); every PyAV error becomes a MediaError."""
    path = Path(path)
    if content is None and not path.is_file():
        raise MediaError(f"{path}: {'a folder; give a clip or a picture in it' if path.is_dir() else 'no such file'}")
    try:
        # absolute, or ffmpeg takes the first part of "clip12:30.mp4" for a protocol; "100%dogs.png" is no pattern
        name = str(path.absolute()) if content is None else io.BytesIO(content)
        with av.open(name, options={"pattern_type": "none"}) as container:
            yield container, picture_stream(path, container)
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path}: cannot be decoded ({reason}); is it whole, and a video or image?") from None


def picture_stream(path, container):
    """The first stream of pictures, or a later one that moves where the first is its still (an animated AVIF)."""
    # an mp3's cover art is a video stream to ffmpeg, but not a clip
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(f"{path}: has no pictures (an audio file?); give a video or an image")
    if any(s.disposition & Disposition.dependent for s in streams):
        raise MediaError(f"{path}: a HEIC or AVIF in tiles, of which FFmpeg decodes one: convert it to JPEG or PNG")
    first = streams[0]
    if first.frames == 1:
        first = next((s for s in streams if s.frames > 1), first)
    if first.codec_context is None:
        raise MediaError(f"{path}: FFmpeg has no decoder for it here; convert it to PNG or mp4")
    return first


def is_picture(container) -> bool:
    """Whether a file is a still: by its kind, or a GIF or APNG of one frame."""
    brand, name = container.metadata.get("major_brand", ""), container.format.name
    if name in ("gif", "apng"):
        return container.streams.video[0].frames == 1
    return brand in ("avif", "heic", "heix", "mif1") or name == "image2" or name.endswith("_pipe")


def frame_rate(stream) -> Fraction:
    """Frames a second of the grid on which all of a clip's pictures have a place; 25 where its file has no rate.

    That is the stream's base rate, not its average: held and dropped pictures change only the latter. Where times are
    irregular, the rate of the median interval of the file's index.
    """
    if stream.base_rate and stream.base_rate > MAX_RATE:
        times = sorted(entry.timestamp for entry in stream.index_entries)
        steps = sorted(b - a for a, b in zip(times, times[1:]) if b > a)
        if len(steps) > 4 and (rate := 1 / (steps[len(steps) // 2] * stream.time_base)) <= MAX_RATE:
            return rate
    rates = (stream.guessed_rate, stream.base_rate, stream.average_rate)
    return next((rate for rate in rates if rate and rate <= MAX_RATE), Fraction(25))


def shown_frames(container, stream) -> int:
    """How many frames a clip's header promises, 0 where it has no length (WebM as it was streamed).

    By its duration: the number of packets is smaller where pictures are held, and larger after a cut without
    re-encoding, which leaves packets in the file that its edit list hides.
    """
    length = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 10**6)
    if not stream.duration and "matroska" in container.format.name and stream.start_time:
        length = max(length - stream.start_time * stream.time_base, 0)  # there a duration is the time of the end
    return round(length * frame_rate(stream)) or stream.frames


def decode(path, container, stream):
    """Yield (index, rgb) of the clip's upright frames, uint8 (H, W, 3), at `frame_rate`.

    A variable frame rate becomes a constant one: a frame stays until the next, of two in one tick the later wins.
    Above 576 lines a clip without a colour matrix is read as BT.709, as players do.
    """
    fps, aspect = frame_rate(stream), stream.sample_aspect_ratio or 1
    aspect = aspect if 0.25 < aspect < 4 else 1  # other numbers are mistakes
    still = is_picture(container)
    hd = not still and stream.height > SD_HEIGHT
    if stream.metadata.get("alpha_mode") == "1":
        note(path, "is WebM with alpha, which FFmpeg drops: transparent parts are black; give ProRes 4444 or PNG")
    start = pending = until = None
    for count, (frame, time, end) in enumerate(timed_frames(container, stream)):
        if frame.is_corrupt:
            raise MediaError(f"{path}: frame {count} is corrupt; re-encode or fetch the file again")
        if not count and frame.color_trc in HDR:
            note(path, "is HDR and read without tone mapping: its colours will be dull; convert it to SDR")
        start, until = time if start is None else start, end
        index = pending[0] + 1 if pending else 0
        if time is not None and (tick := round((time - start) * fps)) >= index - 1:  # else time goes back: count on
            index = tick
        rgb = upright_rgb(frame, aspect, hd)
        while pending is not None and pending[0] < index:
            yield pending
            pending = (pending[0] + 1, pending[1])
        pending = (index, rgb)
    if pending is None:
        raise MediaError(f"{path}: has no frames")
    if still and (alpha := alpha_of(container, stream)) is not None:
        pending = (0, over_white(pending[1], upright_rgb(alpha, aspect)))
    yield pending
    last = 0 if still or until is None else round((until - start) * fps)
    for index in range(pending[0] + 1, min(last, shown_frames(container, stream))):  # the last picture is held too
        yield index, pending[1]


def timed_frames(container, stream):
    """Yield (frame, its time, the end of all frames so far), both in seconds, exact, or None where frames are counted.

    AVI has decoding times only, so its frames are counted where some are stored out of order. A packet of 0 bytes
    (Theora) repeats the picture before it; a decoder would take it for the end of the file.
    """
    if not is_picture(container):
        stream.thread_type = "AUTO"
    if stream.codec_context.name == "mjpeg":
        stream.codec_context.options = {"err_detect": "explode"}  # or half a JPEG decodes to a half grey picture
    counted, until = container.format.name == "avi" and stream.codec_context.has_b_frames, None
    for packet in container.demux(stream):
        if not packet.size and packet.pts is not None:
            until = (packet.pts + (packet.duration or 0)) * stream.time_base
            continue
        for frame in decoded(packet):
            if counted or frame.pts is None:
                yield frame, None, None
                continue
            time = frame.pts * stream.time_base
            until = max(until or 0, time + (frame.duration or 0) * stream.time_base)
            yield frame, time, until


def alpha_of(container, stream):
    """The frame of a HEIC's or AVIF's transparency, a grey picture of the same size beside it; None without one."""
    size = (stream.width, stream.height)
    for other in container.streams.video:
        if other.index != stream.index and other.codec_context and (other.width, other.height) == size:
            if other.format.name.startswith("gray"):
                container.seek(0)
                return next(container.decode(other), None)
    return None


def decoded(packet):
    """The frames of a packet; a PNG whose eXIf chunk is damaged is decoded without it."""
    codec = packet.stream.codec_context
    try:
        frames = packet.decode()
    except av.error.InvalidDataError:
        head, mark, rest = bytes(packet).partition(b"eXIf")
        if codec.name not in ("png", "apng") or not mark:
            raise
        return codec.decode(av.Packet(head[:-4] + rest[int.from_bytes(head[-4:], "big") + 4 :]))
    if codec.name == "tiff" and b"\xff\xd8\xff" in bytes(packet) and not frames[0].to_ndarray().any():
        raise MediaError(
            f"{packet.stream.container.name}: a TIFF of JPEG tiles, which FFmpeg reads black: convert it to PNG"
        )
    return frames


def upright_rgb(frame, aspect=1, hd=False) -> torch.Tensor:
    """A decoded frame as uint8 (H, W, 3): alpha over white, square pixels (aspect: width to height), rotated."""
    if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
        rgba = torch.from_numpy(frame.to_ndarray(format="rgba"))
        rgb = over_white(rgba[..., :3], rgba[..., 3:])
    else:
        bt709 = hd and frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
        rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", src_colorspace="ITU709" if bt709 else None))
    if aspect != 1:
        rgb = resize(rgb[None], (rgb.shape[0], round(rgb.shape[1] * aspect)))[0]
    turns = round(frame.rotation / 90) % 4
    return rgb.rot90(turns).contiguous() if turns else rgb  # rot90 copies, even for none


def over_white(rgb, alpha):
    """uint8 (H, W, 3) laid over white by alpha, uint8 (H, W, 1 or 3), rounded."""
    rgb, alpha = rgb.int(), alpha.int()
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


@lru_cache(4096)  # once a file, however often training reads it
def note(path, text):
    print(f"note: {path} {text}", file=sys.stderr)


# Writing


def write_image(path, image: torch.Tensor):
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
        raise unwritable(path, error) from None


def faithful_codec(frames):
    """The codec for frames (T, H, W, 3) that are judged by their pixels."""
    return EXACT_VIDEO_CODEC if frames[0].numel() <= SMALL_FRAME else VIDEO_CODEC


def write_video(path, frames, fps, audio_from=None, codec=VIDEO_CODEC, count=None):
    """uint8 frames (T, H, W, 3), H and W even, to an h264 mp4 (BT.709) at `fps`. With `count` any iterable of so many
    frames (H, W, 3), which are written as they come.

    audio_from: a file whose sound, if it has any, is kept for the length of the clip. Sound that cannot be kept
    is reported on stderr and never costs the video. codec: VIDEO_CODEC or EXACT_VIDEO_CODEC.
    ValueError without frames, or for a rate of 0. MediaError where the file cannot be written.
    """
    count = len(frames) if count is None else count
    if not count or fps <= 0:
        raise ValueError(f"{path}: a video of {count} frames at {fps} a second cannot be written")
    frames, fps = iter(frames), Fraction(fps).limit_denominator(1001000)
    frames = chain([first := next(frames)], frames)
    size, duration = tuple(first.shape[:2]), count / fps
    with whole_file(path) as temporary:
        try:
            try:
                mux_video(temporary, frames, size, fps, duration, audio_from, codec)
            except SoundError as error:  # before the first frame
                no_sound(audio_from, error.__cause__)
                mux_video(temporary, frames, size, fps, duration, None, codec)
        except OSError as error:
            raise unwritable(path, error) from None


class SoundError(Exception):
    """Its cause kept a sound track from being written."""


def unwritable(path, error):
    return MediaError(f"{path}: cannot be written ({error.strerror}); choose another place or make room")


def no_sound(path, reason):
    print(f"note: {path}: its sound cannot be kept ({getattr(reason, 'strerror', None) or reason})", file=sys.stderr)


def mux_video(path, frames, size, fps, duration, audio_from, codec):
    pixel_format, options = codec
    options_mp4 = {"movflags": "faststart"}
    with ExitStack() as stack:
        try:
            source = audio_from and stack.enter_context(av.open(str(Path(audio_from).absolute())))
        except Exception as error:
            raise SoundError from error
        out = stack.enter_context(av.open(str(Path(path).absolute()), "w", format="mp4", container_options=options_mp4))
        video = out.add_stream("libx264", rate=fps, options=options)
        video.height, video.width, video.pix_fmt = *size, pixel_format
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        try:
            add_sound(out, source, duration)  # its stream is added before the first packet is written
        except OSError as error:
            if error.errno == 28:  # no space left on device
                raise
            raise SoundError from error
        except Exception as error:
            raise SoundError from error
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            out.mux(video.encode(frame.reformat(format=pixel_format, dst_colorspace="ITU709")))
        out.mux(video.encode())


def add_sound(out, source, duration):
    """Add the source's sound to `out`, in a stream of its own. Time counts from the first picture.

    What mp4 holds is copied, packet by packet. A transport stream may change its channels on the way: it is encoded.
    """
    sound = source and next(iter(source.streams.audio), None)
    if sound and sound.codec_context is None:
        no_sound(source.name, "FFmpeg has no decoder for it")
        sound = None
    if not sound:
        return
    pictures = source.streams.video[0] if source.streams.video else sound
    start = pictures.start_time * pictures.time_base if pictures.start_time else Fraction(0)
    if sound.codec_context.name.removesuffix("float") in MP4_AUDIO and source.format.name != "mpegts":
        return copy_packets(out, out.add_stream_from_template(sound), source, sound, start, duration)
    rate = min(AAC_RATES, key=lambda known: abs(known - sound.rate))
    layout = "mono" if sound.layout.nb_channels == 1 else "stereo"
    samples = read_sound(source, sound, start, duration, rate, layout)
    if samples.shape[1]:
        track = out.add_stream("aac", rate=rate)
        track.codec_context.layout = layout
        encode_sound(out, track, samples, rate, layout)


def copy_packets(out, track, source, sound, start, duration):
    for packet in source.demux(sound):
        if packet.pts is None:
            continue
        if packet.pts * packet.time_base - start >= duration:
            break
        offset = round(start / packet.time_base)
        packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, track
        out.mux(packet)


def read_sound(source, sound, start, duration, rate, layout) -> np.ndarray:
    """The sound of `duration` seconds from `start` as float32 (channels, samples), silence where it has gaps.

    Samples follow one another while they are within 12 ms of their times, which some containers round to 1 ms.
    """
    out = np.zeros((1 if layout == "mono" else 2, round(duration * rate)), np.float32)
    resampler, kind, place, end = None, None, 0, 0  # place: of the next sample; end: of all samples so far

    def put(pieces):
        nonlocal place, end
        for piece in pieces:
            values = piece.to_ndarray()[:, max(end - place, 0) :]  # what overlaps with earlier sound is dropped
            place += piece.samples
            part = out[:, place - values.shape[1] : place] if values.shape[1] else out[:, :0]
            part[:] = values[:, : part.shape[1]]
            end = max(end, place)

    try:
        for frame in source.decode(sound):
            at = place if frame.pts is None else round((frame.pts * frame.time_base - start) * rate)
            if at >= out.shape[1]:
                break
            now = (frame.format.name, frame.layout.nb_channels, frame.sample_rate)
            jumps = abs(at - place) > 0.012 * rate
            if jumps or now != kind:  # at first, after a gap, and where its kind changes within the file
                put(resampler.resample(None) if resampler else [])
                place = at if jumps else place
                kind, resampler = now, av.AudioResampler(format="fltp", layout=layout, rate=rate)
            put(resampler.resample(frame))
        put(resampler.resample(None) if resampler else [])
    except av.error.FFmpegError as error:
        print(f"note: {source.name}: its sound is kept for {end / rate:.1f} s ({error.strerror})", file=sys.stderr)
    return out[:, :end]


def encode_sound(out, track, samples, rate, layout):
    for at in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at : at + 1024]), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
        out.mux(track.encode(frame))
    out.mux(track.encode(None))


# Whole files


def write_text(path, text: str):
    """A text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


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


@contextmanager
def whole_folder(folder):
    """Yield an empty folder beside `folder`; it takes that one's place when the block ends well, and goes otherwise."""
    folder = Path(folder).resolve()  # a link's target is replaced, not the link
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
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
        raise unwritable(path, error) from None
