"""Numbers about an edit that need no model: what changed, what stayed, how it flickers, how near the reference it is.

    source and edit files -> frames (T, 3, H, W) float32 in 0..1, frame by frame the same moment; ref (1, 3, h, w)
      -> change of each 8x8 block (T, H/8, W/8) -> changed blocks, kept blocks
      -> {"edit_strength": 24.1, "preserved_psnr": 33.0, "reference_gain": 0.2, ...}

None of them knows what the instruction asked for: they say how much changed, not whether it was the right thing.
They stand beside a judge's scores, catch what a judge overlooks (an untouched copy, flicker, a damaged background)
and need no network. `METRICS` says of each what it is and what it cannot see; `measure` computes them all.
"""

import functools
import math
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from media import (
    SMALL_VIDEO_CODEC,
    MediaError,
    faithful_codec,
    fit_frames,
    pad_reference,
    read_clip,
    read_image,
    resize,
    write_image,
    write_video,
)

BLOCK = 8  # pixels a side at the working size: smaller shifts than this are mostly averaged away
CHANGED = (6 / 255, 20 / 255)  # the threshold between kept and changed lies in between: invisible, and plain to see
PSNR_LIMIT = 60.0
PIXELS = 256 * 448  # at most, of the working size
WINDOWS = (16, 32)  # pixels a side of the patches compared with a reference

METRICS = {  # name: (better when, formula and range, what it cannot see)
    "edit_strength": (
        "",
        "mean over blocks of the RMS difference of the 8x8 block means of source and edit, RGB levels 0..255",
        "whether the change is the one asked for; a moved object counts as changed twice",
    ),
    "edited_area": (
        "",
        "share of blocks whose difference is above Otsu's threshold, kept within 6 to 20 levels; 0..1",
        "changes below the threshold, such as a faint tint",
    ),
    "preserved_psnr": (
        "higher",
        "PSNR over the pixels of the other blocks, dB, at most 60",
        "damage above the threshold, which counts as edit: read it together with edited_area",
    ),
    "preserved_ssim": (
        "higher",
        "SSIM of the luma in 8x8 windows, mean over the same blocks; at most 1",
        "the same; colour",
    ),
    "flicker": (
        "lower",
        "mean |y(t-1) - 2 y(t) + y(t+1)| of the luma y, levels 0..255",
        "slow drift; fast motion counts as flicker",
    ),
    "flicker_excess": (
        "lower",
        "flicker of the edit minus flicker of the source; the source's motion cancels where it was kept",
        "flicker hidden by an edit that is smoother than its source",
    ),
    "reference_similarity": (
        "higher",
        "mean exp(-d^2/2) over the edit's patches, weighted by their change, and over the reference's, d being the "
        + "distance to the nearest of the other by colour, contrast and edge directions; 0..1",
        "shape, identity, text: a red hat and a red shoe of one cloth look alike",
    ),
    "reference_gain": (
        "higher",
        "reference_similarity minus what the unedited source would get in the same places; -1..1; about 0 for a copy",
        "the same; an edit whose source looked like the reference already has little to gain",
    ),
}


def measure(source, edit, refs=()):
    """All metrics of a clip: name -> number, or None where it is not defined (too few frames, nothing kept).

    refs: the reference, if there is one, and after it wrong ones; the gain of these comes as "control_wrong_gains", and
    as "control_shuffled_flicker" the flicker of the edit's frames in random order.
    """
    change = change_map(source, edit)
    changed = changed_blocks(change)
    out = dict.fromkeys(METRICS)
    out["edit_strength"] = change.mean().item() * 255
    out["edited_area"] = changed.float().mean().item()
    out["preserved_psnr"], out["preserved_ssim"] = preserved(source, edit, ~changed)
    out["flicker"], before = flicker(edit), flicker(source)
    out["flicker_excess"] = None if before is None else out["flicker"] - before
    out["control_shuffled_flicker"] = flicker(shuffled(edit))
    scores = reference_scores(source, edit, change, refs) if refs else [(None, None)]
    out["reference_similarity"], out["reference_gain"] = scores[0]
    out["control_wrong_gains"] = [gain for _, gain in scores[1:]]
    return out


def luma(x):
    """(T, 3, H, W) -> (T, 1, H, W), BT.601."""
    return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def change_map(source, edit):
    """RMS over RGB of the difference of block means -> (T, H/8, W/8) in 0..1."""
    return (F.avg_pool2d(edit, BLOCK) - F.avg_pool2d(source, BLOCK)).square().mean(1).sqrt()


def changed_blocks(change):
    """Which blocks were edited: above Otsu's threshold on the square root of the change, within CHANGED."""
    return change > min(max(otsu(change.sqrt(), 64, 1) ** 2, CHANGED[0]), CHANGED[1])


def otsu(values, bins, highest):
    """The value, of those in 0..highest, that splits them best in two (Otsu, 1979), on a histogram."""
    hist = torch.histc(values, bins, 0, highest)
    p, centres = hist / hist.sum(), (torch.arange(bins) + 0.5) * highest / bins
    below, mass = p.cumsum(0), (p * centres).cumsum(0)
    between = (mass[-1] * below - mass).square() / (below * (1 - below)).clamp_min(1e-9)
    return (between.argmax().item() + 1) * highest / bins


def preserved(source, edit, kept):
    """PSNR and SSIM over the kept blocks (T, H/8, W/8), bool. None, None where under 2 % of the picture was kept."""
    if kept.float().mean() < 0.02:
        return None, None
    error = F.avg_pool2d((edit - source).square().mean(1, keepdim=True), BLOCK)[:, 0][kept].mean().item()
    psnr = -10 * math.log10(max(error, 10 ** (-PSNR_LIMIT / 10)))
    return psnr, ssim_map(luma(source), luma(edit))[kept].mean().item()


def ssim_map(a, b):
    """SSIM of two lumas (T, 1, H, W) in each block -> (T, H/8, W/8)."""
    mean = lambda x: F.avg_pool2d(x, BLOCK)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))[:, 0]


def flicker(x):
    """Mean |second difference in time| of the luma, levels of 255. None for fewer than 3 frames."""
    y = luma(x) * 255
    return (y[2:] - 2 * y[1:-1] + y[:-2]).abs().mean().item() if len(y) > 2 else None


def shuffled(frames):
    """The same frames in a random order: the known-bad answer for anything temporal."""
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))]


def lab(x):
    """sRGB (T, 3, H, W) in 0..1 -> CIELAB / 100 under D65."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("ij,tjhw->tihw", to_xyz, linear) / torch.tensor([0.9505, 1.0, 1.089]).view(1, 3, 1, 1)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([1.16 * f[:, 1] - 0.16, 5 * (f[:, 0] - f[:, 1]), 2 * (f[:, 1] - f[:, 2])], 1)


def patch_descriptors(x, window):
    """What a patch looks like: mean and deviation of CIELAB, strength of 8 edge directions -> (T, 14, h, w).

    x: (T, 3, H, W); patches of `window` pixels at half-window steps. A distance of 1 is 25 CIELAB steps.
    """
    colour = 4 * lab(x)
    pool = lambda y: F.avg_pool2d(y, window, window // 2)
    mean = pool(colour)
    deviation = (pool(colour**2) - mean**2).clamp_min(0).sqrt()
    y = F.pad(luma(x), (1, 1, 1, 1), mode="replicate")
    dx, dy = y[..., 1:-1, 2:] - y[..., 1:-1, :-2], y[..., 2:, 1:-1] - y[..., :-2, 1:-1]
    angle, size = torch.atan2(dy, dx), (dx**2 + dy**2).sqrt()
    edges = torch.cat([size * torch.cos(angle - k * math.pi / 4).clamp_min(0) ** 2 for k in range(8)], 1)
    return torch.cat([mean, deviation, 2 * pool(edges)], 1)


def reference_scores(source, edit, change, refs):
    """How near the edit came to each reference where it changed -> [(similarity, gain), ...]; see METRICS.

    source, edit (T, 3, H, W), change (T, H/8, W/8), refs: (1, 3, h, w) each; five evenly chosen frames are read.
    """
    chosen = torch.linspace(0, len(edit) - 1, min(5, len(edit))).round().long().tolist()
    totals = torch.zeros(len(refs), 2)  # of the source, of the edit
    for window in WINDOWS:
        of_refs = [patch_descriptors(ref, window)[0].flatten(1).T for ref in refs]  # (R, 14) each
        for t in chosen:
            looks = [patch_descriptors(x[t : t + 1], window)[0] for x in (source, edit)]  # 2 x (14, h, w)
            weight = F.interpolate(change[None, t : t + 1], looks[0].shape[1:], mode="area").flatten()
            weight = weight / weight.sum().clamp_min(1e-9)
            for i, of_ref in enumerate(of_refs):
                for k, look in enumerate(looks):
                    near = torch.exp(-torch.cdist(look.flatten(1).T, of_ref).square() / 2)  # (P, R)
                    totals[i, k] += ((weight * near.amax(1)).sum() + near.amax(0).mean()) / 2
    totals /= len(WINDOWS) * len(chosen)
    return [(of_edit, of_edit - of_source) for of_source, of_edit in totals.tolist()]


def load_pair(source_path, edit_path):
    """Source and edit, frame by frame, uint8 (T, H, W, 3) at the edit's aspect, and the frame rate.

    Frame i is compared with frame i, whatever the frame rates, as the release keeps frames and not time; the longer is
    cut. An edit by a system that resamples time must be resampled first. MediaError as `read_clip`.
    """
    edit = read_clip(edit_path, max_pixels=PIXELS)
    source = read_clip(source_path, max_pixels=PIXELS).frames
    count = min(len(edit.frames), len(source))
    source = source[:count]
    if source.shape[1:3] != edit.frames.shape[1:3]:
        source = fit_frames(source, edit.frames.shape[1:3])
    return source, edit.frames[:count], edit.fps


def as_float(frames):
    return frames.permute(0, 3, 1, 2).float() / 255


@functools.lru_cache(maxsize=64)  # the same reference is a wrong one for other items
def read_reference(path):
    """A reference picture, its longer side 256 pixels: float32 (1, 3, h, w) in 0..1."""
    image = read_image(path)
    scale = 256 / max(image.shape[:2])
    return as_float(resize(image[None], [max(32, round(n * scale)) for n in image.shape[:2]]))


def measure_files(source_path, edit_path, refs, media):
    """`measure` of an edit, and two numbers of the re-encoded source, which every real edit should beat.

    refs: paths, the true one first. Leaves a filmstrip and a small clip under `media`.
    """
    source, edit, fps = load_pair(source_path, edit_path)
    write_media(media, source, edit, fps, refs[0] if refs else None)
    pictures = [read_reference(ref) for ref in refs[:1]]
    for ref in refs[1:]:
        with suppress(MediaError):  # one that is broken is its own item's trouble, and not this one's
            pictures.append(read_reference(ref))
    out = measure(as_float(source), as_float(edit), pictures)
    copy = measure(as_float(source), as_float(reencoded(source, fps)), pictures[:1])
    return out | {"control_copy_strength": copy["edit_strength"], "control_copy_gain": copy["reference_gain"]}


def reencoded(frames, fps):
    """Frames as a lossy file gives them back: the unedited copy that a lazy system would hand in."""
    with tempfile.TemporaryDirectory() as folder:
        if len(frames) == 1:
            write_image(Path(folder) / "x.jpg", frames[0])
            return read_image(Path(folder) / "x.jpg")[None]
        write_video(Path(folder) / "x.mp4", frames, fps, codec=SMALL_VIDEO_CODEC)
        return read_clip(Path(folder) / "x.mp4", len(frames), frames[0].numel()).frames


def write_media(media, source, edit, fps, ref_path):
    """<media>.jpg: a filmstrip, source above edit, the reference at its end. <media>.mp4: both side by side, small."""
    media.parent.mkdir(parents=True, exist_ok=True)
    size = 128, round(edit.shape[2] * 128 / edit.shape[1] / 2) * 2
    chosen = torch.linspace(0, len(edit) - 1, min(5, len(edit))).round().long()
    strip = torch.cat([torch.cat(list(resize(x[chosen], size)), 1) for x in (source, edit)], 0)
    if ref_path:
        strip = torch.cat([strip, pad_reference(read_image(ref_path), (len(strip), len(strip)))], 1)
    write_image(media.with_suffix(".jpg"), strip)
    if len(edit) > 1:
        both = torch.cat([resize(x, size) for x in (source, edit)], 2)
        write_video(media.with_suffix(".mp4"), both, fps, codec=SMALL_VIDEO_CODEC)


def write_shuffled(path, edit_path):
    """The edit with its frames in random order, as a file as good as the edit's: time alone is to be worse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = read_clip(edit_path)
    write_video(path, shuffled(clip.frames), clip.fps, codec=faithful_codec(clip.frames))
