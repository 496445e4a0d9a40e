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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
SOUND_RATE, SOUND_BITS = 48_000, 256_000  # a second
LAYOUTS = {1: "mono", 6: "5.1"}  # by the number of channels; all others become stereo


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
    """The size (h, w) at which a picture is edited: at most max_pixels, floored to multiples of 32 (perhaps 0)."""
    scale = max(math.sqrt(height * width / max_pixels), 1)
    return int(height / scale) // GRID * GRID, int(width / scale) // GRID * GRID


@lru_cache(1024)
def nearest_size(height: int, width: int, max_pixels: int, grid: int, power: int = 2) -> tuple[int, int]:
    """The size (h, w) in multiples of `grid` that keeps most of a picture, where `working_size` could drop half of the
    pixels: the largest product of its area and the share of the picture that its crop leaves, to that power.

    At most max_pixels and no larger than the picture: 1280x704 gives 80x48 of 4096. (0, 0) where a side is too short.
    """
    sizes = [(h, w) for h in range(grid, height + 1, grid) for w in range(grid, min(width, max_pixels // h) + 1, grid)]

    def worth(size):
        aspect = size[0] * width / (size[1] * height)
        return size[0] * size[1] * min(aspect, 1 / aspect) ** power

    return max(sizes, key=worth, default=(0, 0))


def usable_frames(count: int, max_frames: int) -> int:
    """The largest 4k + 1 that is at most count and max_frames: the lengths the VAE takes."""
    return (min(count, max_frames) - 1) // 4 * 4 + 1


def fit_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop uint8 frames (T, H, W, 3) to the aspect of `size` (h, w), centred, and resize them: (T, h, w, 3)."""
    (height, width), (H, W) = size, frames.shape[1:3]
    h, w = (H, int(H / height * width)) if H / W < height / width else (int(W / width * height), W)
    h, w = max(h, 1), max(w, 1)
    top, left = (H - h) // 2, (W - w) // 2
    return resize(frames[:, top : top + h, left : left + w], size)


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


def read_clip(path, max_frames=81, max_pixels=MAX_PIXELS, max_fps=None, size_of=working_size, held=None) -> Clip:
    """The first 4k + 1 (at most max_frames) frames of a video or image file, fitted to the working size; of 2 to 4
    frames all, for one alone would be a picture.

    max_fps: a clip at about twice that rate gives every second frame, and so on. size_of: another rule than
    `working_size`, (height, width, max_pixels) -> (h, w). held: of a clip of more frames they stay in their file, a
    `FrameFile`. Frames are resized as they are decoded: memory is that of the result. MediaError where the file is
    missing, unreadable, corrupt, without pictures or too small.
    """
    frames, count, size = [], 0, None
    with open_media(path) as (container, stream):
        fps = frame_rate(stream)
        stride = max(round(fps / max_fps), 1) if max_fps else 1
        for index, rgb in decode(path, container, stream):
            if size is None:
                height, width = rgb.shape[:2]
                size = size_of(height, width, max_pixels)
                if not all(size):
                    raise MediaError(f"{path}: {width}x{height} pixels, at most {max_pixels} in all, are too few")
            if index % stride == 0:
                count += 1
                if held is None or count <= held:
                    frames += fit_frames(rgb[None], size)
            if count == max_frames:
                break
        still = is_picture(container) and count == 1
        promised = shown_frames(container, stream)
        # without a count of frames the length is the container's, whose sound may be longer
        forgiven = max(2, promised // (50 if stream.frames else 10))
        short = not still and count < max_frames
        if short and stream.frames and index + 1 < min(promised, max_frames * stride) // 2:
            raise MediaError(f"{path}: ends after {index + 1} of {promised} frames; fetch the file again")
        if short and index + 1 < promised - forgiven:
            note(path, f"promises {promised} frames and has {index + 1}: is it cut off? Fetch it again for the rest")
    count = usable_frames(count, max_frames) if count > 4 else count
    frames = torch.stack(frames[:count]) if count <= len(frames) else FrameFile(str(path), count, size, stride)
    return Clip(frames, fps / stride, still, (height, width), str(path))


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
        for rgb in islice(pictures(self.path), 0, (self.count - 1) * self.stride + 1, self.stride):
            yield fit_frames(rgb[None], self.size)[0]


def read_frames(path, count: int, size: tuple[int, int]) -> torch.Tensor:
    """The first `count` frames of a file, fitted to `size` (h, w): uint8 (count, h, w, 3).

    One or two that its header promised and it does not have repeat the last. MediaError where more are missing.
    """
    frames = list(FrameFile(path, count, size))
    if len(frames) < max(count - 2, 1):
        raise MediaError(f"{path}: ends after {len(frames)} of {count} frames; fetch the file again")
    return torch.stack(frames + frames[-1:] * (count - len(frames)))


def pictures(path, content: bytes | None = None):
    """Yield the upright frames of a file (or its content), uint8 (H, W, 3), as `decode` does. MediaError."""
    with open_media(path, content) as (container, stream):
        for _, rgb in decode(path, container, stream):
            yield rgb


def read_image(path, content: bytes | None = None) -> torch.Tensor:
    """A picture file (or its content), or the first frame of a video, as uint8 (H, W, 3). MediaError."""
    return next(pictures(path, content))


def measure(path, count=True) -> tuple[int, int, int, float]:
    """(frames, height, width, frames a second) of a file, upright, from its header and first frame; a picture has 1
    frame and a rate of 0. A clip whose header has no length is decoded to be counted, or has 0 frames. MediaError."""
    with open_media(path) as (container, stream):
        frames = decode(path, container, stream)
        height, width = next(frames)[1].shape[:2]
        if is_picture(container):
            return 1, height, width, 0
        promised = shown_frames(container, stream) or (1 + sum(1 for _ in frames) if count else 0)
        return promised, height, width, float(frame_rate(stream))


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
    moving = [s for s in streams if s.frames > 1] if streams[0].frames == 1 else []
    stream = [*moving, *streams][0]
    if stream.codec_context is None:
        raise MediaError(f"{path}: FFmpeg has no decoder for it here; convert it to PNG or mp4")
    return stream


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
    rates = [stream.guessed_rate, stream.base_rate, stream.average_rate]
    if stream.base_rate and stream.base_rate > MAX_RATE:
        times = sorted(entry.timestamp for entry in stream.index_entries)
        steps = sorted(b - a for a, b in zip(times, times[1:]) if b > a)
        if len(steps) > 4:
            rates.insert(0, 1 / (steps[len(steps) // 2] * stream.time_base))
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
    fps, still, codec = frame_rate(stream), is_picture(container), stream.codec_context
    counted = container.format.name == "avi" and codec.has_b_frames  # AVI has decoding times only
    hd = not still and stream.height > SD_HEIGHT
    if codec.color_trc in HDR:
        note(path, "is HDR and read without tone mapping: its colours will be dull; convert it to SDR")
    if stream.metadata.get("alpha_mode") == "1":
        note(path, "is WebM with alpha, which FFmpeg drops: transparent parts are black; give ProRes 4444 or PNG")
    if not still:
        stream.thread_type = "AUTO"
    if codec.name == "mjpeg":
        codec.options = {"err_detect": "explode"}  # or half a JPEG decodes to a half grey picture
    held = start = time = None
    tick = 0  # `held` is shown from here on until the next picture
    for frame in chain.from_iterable(map(decoded, container.demux(stream))):
        due = tick if held is None else tick + 1
        if frame.is_corrupt:
            raise MediaError(f"{path}: frame {due} is corrupt; re-encode or fetch the file again")
        if not counted and frame.pts is not None:
            time = frame.pts * stream.time_base
            start = time if start is None else start
            timed = round((time - start) * fps)
            due = timed if timed >= tick else due  # where time goes back, frames are counted
        for index in range(tick, due):
            yield index, held
        tick, held = due, upright_rgb(frame, stream, hd)
    if held is None:
        raise MediaError(f"{path}: has no frames")
    if still and (alpha := alpha_of(container, stream)) is not None:
        held = over_white(held, upright_rgb(alpha, stream))
    until = tick + 1
    if time is not None and not still:  # the last picture is held too, for its duration
        end = time + (frame.duration or 0) * stream.time_base
        until = max(until, min(round((end - start) * fps), shown_frames(container, stream)))
    for index in range(tick, until):
        yield index, held


def decoded(packet):
    """The frames of a packet; a PNG whose eXIf chunk is damaged is decoded without it."""
    if not packet.size and packet.pts is not None:  # Theora: as before; a decoder would take it for the file's end
        return []
    codec = packet.stream.codec_context
    try:
        frames = packet.decode()
    except av.error.InvalidDataError:
        head, mark, rest = bytes(packet).partition(b"eXIf")
        if codec.name not in ("png", "apng") or not mark:
            raise
        return codec.decode(av.Packet(head[:-4] + rest[int.from_bytes(head[-4:], "big") + 4 :]))
    if codec.name == "tiff" and b"\xff\xd8\xff" in bytes(packet) and not frames[0].to_ndarray().any():
        raise MediaError(f"{packet.stream.container.name}: FFmpeg reads a TIFF of JPEG tiles black; convert it to PNG")
    return frames


def alpha_of(container, stream):
    """The frame of a HEIC's or AVIF's transparency, a grey picture of the same size beside it; None without one."""
    for other in container.streams.video:
        same_size = (other.width, other.height) == (stream.width, stream.height)
        if other.index != stream.index and same_size and other.codec_context and other.format.name.startswith("gray"):
            container.seek(0)
            return next(container.decode(other), None)
    return None


def upright_rgb(frame, stream, hd=False) -> torch.Tensor:
    """A decoded frame as uint8 (H, W, 3): alpha over white, square pixels, rotated. hd: BT.709 unless it says."""
    if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
        rgba = torch.from_numpy(frame.to_ndarray(format="rgba"))
        rgb = over_white(rgba[..., :3], rgba[..., 3:])
    else:
        bt709 = hd and frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
        rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", src_colorspace="ITU709" if bt709 else None))
    aspect = stream.sample_aspect_ratio or 1  # of a pixel, width to height
    if aspect != 1 and 0.25 < aspect < 4:  # other numbers are mistakes
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
    """uint8 (H, W, 3) to a .png or .jpg file."""
    name, pixel_format = IMAGE_CODECS[Path(path).suffix.lower()]
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=pixel_format)
    with whole_file(path) as temporary, av.open(str(temporary.absolute()), "w", format="image2pipe") as out:
        stream = out.add_stream(name)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], pixel_format
        stream.codec_context.qmin = stream.codec_context.qmax = 2  # of JPEG: the best
        out.mux([*stream.encode(frame), *stream.encode(None)])


def faithful_codec(frames):
    """The codec for frames (T, H, W, 3) that are judged by their pixels."""
    return EXACT_VIDEO_CODEC if frames[0].numel() <= SMALL_FRAME else VIDEO_CODEC


def write_video(path, frames, fps, audio_from=None, codec=VIDEO_CODEC, count=None):
    """uint8 frames (T, H, W, 3), H and W even, to an h264 mp4 (BT.709) at `fps`. With `count` any iterable of so many
    frames (H, W, 3), which are written as they come.

    audio_from: a file whose sound, if it has any, is kept for the length of the clip, as AAC. Sound that cannot be kept
    is reported on stderr and never costs the video. codec: VIDEO_CODEC or EXACT_VIDEO_CODEC.
    """
    fps, (pixel_format, options), sound = Fraction(fps).limit_denominator(1_001_000), codec, None
    if audio_from is not None:
        try:
            sound = read_sound(audio_from, (len(frames) if count is None else count) / fps)
        except Exception as error:
            note(audio_from, f"keeps no sound ({getattr(error, 'strerror', None) or error})")
    frames = iter(frames)
    first, fast = next(frames), {"movflags": "faststart"}
    with whole_file(path) as temporary, av.open(str(temporary.absolute()), "w", "mp4", container_options=fast) as out:
        video = out.add_stream("libx264", rate=fps, options=options)
        video.height, video.width, video.pix_fmt = *first.shape[:2], pixel_format
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        if sound:
            track = out.add_stream("aac", rate=SOUND_RATE, layout=sound.layout.name, bit_rate=SOUND_BITS)
            out.mux([*track.encode(sound), *track.encode(None)])
        for image in chain([first], frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            out.mux(video.encode(frame.reformat(format=pixel_format, dst_colorspace="ITU709")))
        out.mux(video.encode())


def read_sound(path, duration):
    """The sound of a file for `duration` seconds from its first picture, in mono, stereo or 5.1, silent where it has
    gaps: one av.AudioFrame of float32 at SOUND_RATE; None without sound.

    It is decoded into runs of frames of one kind that follow one another; each run is resampled and put at its time.
    """
    with av.open(str(Path(path).absolute())) as source:
        if not source.streams.audio:
            return None
        first, sound = (source.streams.video or source.streams.audio)[0], source.streams.audio[0]
        start = (first.start_time or 0) * first.time_base
        layout = av.AudioLayout(LAYOUTS.get(sound.layout.nb_channels, "stereo"))
        runs, kind, end = [], None, 0  # runs: [(second at which it begins, frames)]; end: of the last, in seconds
        try:
            for frame in source.decode(sound):
                at = end if frame.pts is None else frame.pts * frame.time_base - start
                at = end if abs(at - end) < 0.012 else at  # some containers round times to 1 ms
                if at >= duration:
                    break
                before, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
                if kind != before or at != end:
                    runs.append((at, []))
                runs[-1][1].append(frame)
                end = at + Fraction(frame.samples, frame.sample_rate)
        except av.error.FFmpegError as error:
            note(path, f"keeps {float(end):.1f} s of its sound ({error.strerror})")
    out = np.zeros((layout.nb_channels, round(min(max(end, 0), duration) * SOUND_RATE)), np.float32)
    for at, frames in runs:
        resampler, place = av.AudioResampler("fltp", layout, SOUND_RATE), round(at * SOUND_RATE)
        pieces = [piece.to_ndarray() for frame in (*frames, None) for piece in resampler.resample(frame)]
        samples = np.concatenate(pieces, axis=1)[:, max(-place, 0) :]
        part = out[:, max(place, 0) :][:, : samples.shape[1]]
        part[:] = samples[:, : part.shape[1]]
    if not out.size:
        return None
    whole = av.AudioFrame.from_ndarray(np.nan_to_num(out, copy=False), "fltp", layout.name)  # the encoder refuses NaN
    whole.sample_rate, whole.pts, whole.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
    return whole


# Whole files


def write_text(path, text: str):
    """A text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it when the block ends well, remove it otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(old, ignore_errors=True)
