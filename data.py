"""Pictures and clips: from any file PyAV can read to uint8 tensors on the model's grid, and back to a file.

    file -> decode, rotate, alpha over white -> constant frame rate -> crop to the aspect, resize (H, W in 32s)
         -> Clip.frames uint8 (T, H, W, 3), T = 4k + 1
    frames -> h264 mp4 with the source's frame rate and sound, or a still picture

Sizes and resizing follow the released inference (FACTS.md, "Frames and sizes"); frame rate and sound, which
the release drops, are kept. Files are written under a temporary name and renamed when whole.
"""

import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

GRID = 32  # pixels: the VAE's stride 16 (or 8) times the DiT's patch 2, and what every Kiwi-Edit size is floored to
MAX_PIXELS = 720 * 1280
VIDEO_CODEC = ("yuv420p", {"crf": "16", "preset": "medium"})
# For small pictures, on which the above costs 15 dB, and for bytes that depend on the frames alone: x264's mbtree reads
# memory that nobody has written. Not every player shows yuv444p.
EXACT_VIDEO_CODEC = ("yuv444p", {"crf": "4", "preset": "medium", "x264-params": "mbtree=0"})
IMAGE_CODECS = {".png": ("png", "rgb24"), ".jpg": ("mjpeg", "yuvj444p"), ".jpeg": ("mjpeg", "yuvj444p")}
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
    if height * width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        height, width = int(height / scale), int(width / scale)
    if min(height, width) < GRID:
        raise ValueError(f"{width}x{height} pixels are too few: each side needs at least {GRID}")
    return height // GRID * GRID, width // GRID * GRID


def usable_frames(count, max_frames=81):
    """The largest 4k + 1 that is at most count and max_frames: the lengths the VAE takes."""
    return (min(count, max_frames) - 1) // 4 * 4 + 1


def fit_frames(frames, size):
    """Crop uint8 frames (T, H, W, 3) to the aspect of `size` (h, w), centred, and resize them: (T, h, w, 3)."""
    height, width = size
    H, W = frames.shape[1:3]
    if H / W < height / width:
        inner = int(H / height * width)
        left = (W - inner) // 2
        frames = frames[:, :, left : left + inner]
    else:
        inner = int(W / width * height)
        top = (H - inner) // 2
        frames = frames[:, top : top + inner]
    return resize(frames, size)


def resize(frames, size):
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3), bicubic and antialiased, as Pillow does."""
    x = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1).contiguous()


def pad_reference(image, size):
    """A reference picture uint8 (H, W, 3), fitted into `size` (h, w) and centred on white: (h, w, 3)."""
    height, width = size
    H, W = image.shape[:2]
    h, w = (round(H / W * width), width) if W / H > width / height else (height, round(W / H * height))
    h, w = max(h, 1), max(w, 1)
    top, left = round((height - h) / 2), round((width - w) / 2)
    out = torch.full((height, width, 3), 255, dtype=torch.uint8)
    out[top : top + h, left : left + w] = resize(image[None], (h, w))[0]
    return out


@contextmanager
def open_media(path):
    """Open a file for reading and yield (container, its picture stream); every PyAV error becomes a MediaError."""
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            # an mp3's cover art is a video stream to ffmpeg, but not a clip
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise MediaError(f"{path}: has no pictures (an audio file?); give a video or an image")
            yield container, streams[0]
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        with path.open("rb") as file:
            animated_webp = b"ANIM" in file.read(64)
        if animated_webp:
            reason = "an animated WebP, which FFmpeg does not read: convert it to GIF or mp4"
        raise MediaError(f"{path}: cannot be decoded ({reason}); is it whole, and a video or image?") from None


def is_picture(container):
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def upright_rgb(frame):
    """A decoded frame as uint8 (H, W, 3): alpha laid over white, rotated as its metadata asks."""
    if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        rgb = ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    return torch.from_numpy(np.rot90(rgb, round(frame.rotation / 90)).copy())


def decode(path, container, stream):
    """Yield (index, frame, rgb) of the clip's upright frames at its average rate.

    A variable frame rate becomes a constant one: a frame stays until the next, of two in one tick the later wins.
    """
    stream.thread_type = "AUTO"
    if is_picture(container):
        stream.codec_context.options = {"err_detect": "explode"}  # or half a JPEG decodes to a half grey picture
    fps = stream.average_rate or Fraction(25)
    pending, start = None, None
    for count, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise MediaError(f"{path}: frame {count} is corrupt; re-encode or fetch the file again")
        if start is None:
            start = frame.time
        index = count if frame.time is None or start is None else round((frame.time - start) * float(fps))
        rgb = upright_rgb(frame)
        while pending is not None and pending[0] < index:
            yield pending
            pending = (pending[0] + 1, pending[1])
        pending = (max(index, 0), rgb)
    if pending is not None:
        yield pending


def read_clip(path, max_frames=81, max_pixels=MAX_PIXELS):
    """The first 4k + 1 (at most max_frames) frames of a video or image file, fitted to the working size.

    Frames are resized as they are decoded: memory is that of the result.
    MediaError where the file is missing, unreadable, corrupt, without pictures or too small.
    """
    frames, source_size = [], None
    with open_media(path) as (container, stream):
        fps = stream.average_rate or Fraction(25)
        still = is_picture(container)
        for _, rgb in decode(path, container, stream):
            if source_size is None:
                source_size = tuple(rgb.shape[:2])
                try:
                    size = working_size(*source_size, max_pixels)
                except ValueError as error:
                    raise MediaError(f"{path}: {error}") from None
            frames.append(fit_frames(rgb[None], size)[0])
            if len(frames) == max_frames:
                break
        declared = stream.frames
    if not frames:
        raise MediaError(f"{path}: has no frames")
    if len(frames) < min(declared, max_frames) // 2:
        raise MediaError(f"{path}: ends after {len(frames)} of {declared} frames; fetch the file again")
    frames = torch.stack(frames[: usable_frames(len(frames), max_frames)])
    return Clip(frames, fps, still and len(frames) == 1, source_size, str(path))


def read_image(path):
    """A picture file, or the first frame of a video, as uint8 (H, W, 3). MediaError where that fails."""
    with open_media(path) as (container, stream):
        for _, rgb in decode(path, container, stream):
            return rgb
    raise MediaError(f"{path}: has no frames")


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it when the block ends well, remove it otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable(path):
    """Check early, before minutes of work, that `path` can be written. MediaError if not."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise MediaError(f"{path}: is a folder; give a file name for the result")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{Path(path).name}.{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror}); choose another place with -o") from None


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
    with whole_file(path) as temporary:
        temporary.write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)]))


def write_video(path, frames, fps, audio_from=None, exact=False):
    """uint8 frames (T, H, W, 3), H and W even, to an h264 mp4 (BT.709) at `fps`.

    audio_from: a file whose sound, if it has any, is kept for the length of the clip. Sound that cannot be kept
    is reported on stderr and does not cost the video. exact: nearly lossless, and the same bytes every time.
    """
    codec = EXACT_VIDEO_CODEC if exact else VIDEO_CODEC
    fps = Fraction(fps).limit_denominator(1001000)
    with whole_file(path) as temporary:
        try:
            mux_video(temporary, frames, fps, audio_from, codec)
        except av.error.FFmpegError as error:
            if audio_from is None or isinstance(error, OSError) and error.errno == 28:  # no space left on device
                raise MediaError(f"{path}: cannot be written ({error.strerror})") from None
            print(f"{audio_from}: its sound cannot be kept ({error.strerror})", file=sys.stderr)
            mux_video(temporary, frames, fps, None, codec)


def mux_video(path, frames, fps, audio_from, codec):
    duration, (pixel_format, options) = len(frames) / fps, codec
    with av.open(str(path), "w", format="mp4", container_options={"movflags": "faststart"}) as out:
        video = out.add_stream("libx264", rate=fps, options=options)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], pixel_format
        bt709, limited = 1, 1
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = bt709
        context.color_range = limited
        source = av.open(str(audio_from)) if audio_from is not None else None
        try:
            add_sound = copy_sound(out, source, duration) if source and source.streams.audio else None
            for image in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                out.mux(video.encode(frame.reformat(format=pixel_format, dst_colorspace="ITU709")))
            out.mux(video.encode())
            if add_sound:
                add_sound()
        finally:
            if source:
                source.close()


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
        small = av.AudioResampler(format="fltp", layout=track.codec_context.layout, rate=sound.rate, frame_size=1024)
        samples = 0
        for frame in source.decode(sound):
            if frame.time is not None and frame.time < start:
                continue
            for piece in small.resample(frame):
                if samples >= duration * sound.rate:
                    break
                piece.pts = samples
                samples += piece.samples
                out.mux(track.encode(piece))
        out.mux(track.encode(None))

    if sound.codec_context.name.removesuffix("float") in MP4_AUDIO:
        track = out.add_stream_from_template(sound)
        return copy
    track = out.add_stream("aac", rate=sound.rate)
    track.codec_context.layout = "mono" if sound.layout.nb_channels == 1 else "stereo"
    return transcode
