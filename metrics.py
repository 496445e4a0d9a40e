"""Numbers about an edit that need no model: what changed, what stayed, how it moves, how near the reference it is.

    source and edit files -> frames (T, 3, H, W) float32 in 0..1, frame by frame the same moment; ref (1, 3, h, w)
      -> change of each 8x8 block (T, H/8, W/8) -> changed blocks, kept blocks
      -> {"edit_strength": 24.1, "preserved_psnr": 33.0, "frozen_share": 0.0, ...}

None of them knows what the instruction asked for: they say how much changed, not whether it was the right thing.
They stand beside a judge's scores and catch what it overlooks: an untouched copy, blur, a frozen or late clip, boiling,
a damaged background. `METRICS` says what each cannot see. `psnr` and `ssim` are the project's only ones.
"""

import functools
import math
from contextlib import suppress

import torch
import torch.nn.functional as F

import media
from connectors import sample_frames

BLOCK = 8  # pixels a side at the working size: smaller shifts than this are mostly averaged away
CHANGED = (6 / 255, 20 / 255)  # the threshold between kept and changed lies in between: invisible, and plain to see
PSNR_LIMIT = 60.0
PIXELS = 256 * 448  # at most, of the working size
WINDOWS = (16, 32)  # pixels a side of the patches compared with a reference
LAGS = 8  # frames, the largest delay that is looked for
PAGE_CODEC = ("yuv420p", {"crf": "28", "preset": "veryfast", "x264-params": "mbtree=0"})  # to look at on a page
REACH = 4  # pixels, the largest motion between two frames that block matching follows

METRICS = {  # name: (better when, formula and range, what it cannot see)
    "edit_strength": ("", "RMS difference of 8x8 block means, RGB levels", "whether it is the change asked for"),
    "edited_area": ("", "share of blocks that differ by more than Otsu's threshold, 6..20 levels", "a faint tint"),
    "preserved_psnr": ("higher", "over the other blocks, aligned, dB, at most 60; 0 if none", "doing less raises it"),
    "preserved_ssim": ("higher", "of the luma in 8x8 windows over the same blocks; 0 if none", "the same; colour"),
    "shift": ("lower", "pixels by which the whole edit is displaced; 0 if undoing it does not help", "zoom, rotation"),
    "sharpness_kept": ("near 1", "mean |Laplacian| of the luma, edit to source, kept blocks", "that noise is sharp"),
    "sharpness_edited": ("", "the same over the changed blocks", "a smooth thing asked for lowers it rightly"),
    "frozen_share": ("lower", "share of moments at which only the source moves, 0..1", "a slowed motion"),
    "lag": ("near 0", f"frames by which the motion comes late, +-{LAGS}; {LAGS} if nothing moves", "repeated motion"),
    "warp_error": ("lower", f"levels of luma to the best match within {REACH} pixels a frame before, changed blocks",
                   "slow boiling; fast motion counts as boiling"),
    "flicker": ("", "mean |y(t-1) - 2 y(t) + y(t+1)| of the luma y, levels", "blur and freezing lower it"),
    "flicker_excess": ("", "flicker of the edit minus flicker of the source", "the same; motion that the edit stopped"),
    "reference_similarity": ("higher", "mean exp(-d^2/2) over the changed patches and the reference's; d: distance to "
                             "the nearest of the other by colour and edges", "shape, identity, text"),
    "reference_gain": ("higher", "the same minus the unedited source's, -1..1", "a source that looked like it before"),
    "crop_similarity": ("higher", "cosine of CLIP's features of the reference and the changed region, with --embedder",
                        "the same thing in another pose; what stands around it"),
}  # fmt: skip


def measure(source, edit, refs=()):
    """All metrics of a clip: name -> number, or None where it does not apply (a still, no reference).

    refs: its reference and perhaps another item's, whose gain comes as "wrong_reference_gain".
    """
    change = change_map(source, edit)
    changed, out = changed_blocks(change), dict.fromkeys(METRICS)
    out["edit_strength"], out["edited_area"] = change.mean().item() * 255, changed.float().mean().item()
    out["shift"], out["preserved_psnr"], out["preserved_ssim"] = aligned_and_preserved(source, edit, changed)
    y, x = luma(source) * 255, luma(edit) * 255  # (T, 1, H, W)
    before, after = edges(y), edges(x)
    out["sharpness_kept"] = ratio(after, before, ~changed[::4])
    out["sharpness_edited"] = ratio(after, before, changed[::4])
    if len(x) > 1:
        out["frozen_share"], out["lag"], out["warp_error"] = frozen_share(y, x), lag(y, x), warp_error(x, changed)
    if len(x) > 2:
        out["flicker"], out["flicker_excess"] = flicker(x), flicker(x) - flicker(y)
    if refs:
        (out["reference_similarity"], out["reference_gain"]), *others = reference_scores(source, edit, change, refs)
        out |= {"wrong_reference_gain": others[0][1]} if others else {}
    return out


def known_answers(source, copy, ref, measured):
    """{what is known: whether it holds}. copy: the source as a lazy system would hand it in, re-encoded."""
    change = change_map(source, copy)
    known = {"edit_strength is above the re-encoded source's": measured["edit_strength"] > 255 * change.mean().item()}
    if ref is not None:
        gain = reference_scores(source, copy, change, [ref])[0][1]
        known["reference_gain is above the re-encoded source's"] = measured["reference_gain"] > gain
    if "wrong_reference_gain" in measured:
        held = measured["reference_gain"] > measured["wrong_reference_gain"]
        known["reference_gain is above that of another item's reference"] = held
    return known


def luma(x):
    """(T, 3, H, W) -> (T, 1, H, W), BT.601."""
    return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def psnr(a, b, where=None):
    """dB, at most 60, of (T, C, H, W) in 0..1 where the mask (T, H, W) is true; nan where it is empty."""
    error = (a - b).square().mean(dim=1)
    error = (error if where is None else error[where]).mean().item()
    return error if math.isnan(error) else -10 * math.log10(max(error, 10 ** (-PSNR_LIMIT / 10)))


def ssim(a, b, where=None, window=7, stride=1):
    """SSIM of windows of (T, C, H, W) in 0..1, averaged over channels and those where the mask of windows is true."""
    pad = window // 2 if stride == 1 else 0
    mean = lambda x: F.avg_pool2d(x, window, stride, pad, count_include_pad=False)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    found = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean(dim=1)
    return (found if where is None else found[where]).mean().item()


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


def aligned_and_preserved(source, edit, changed):
    """-> pixels by which the edit is displaced, and PSNR and SSIM over the kept blocks once that is undone."""
    (dy, dx), shift = displacement(luma(source[::4]), luma(edit[::4])), 0.0
    margin = math.ceil((max(abs(dy), abs(dx)) + 0.01) / BLOCK) * BLOCK  # what came in at the edges is not there
    if math.hypot(dy, dx) >= 0.25 and 4 * margin < min(source.shape[2:]):
        inner = lambda x: x[..., margin:-margin, margin:-margin]
        few, back = inner(source[::4]), inner(moved_by(edit[::4], -dy, -dx))
        if psnr(few, back) > psnr(few, inner(edit[::4])) + 1:
            shift, source, edit = math.hypot(dy, dx), inner(source), inner(moved_by(edit, -dy, -dx))
            changed = changed_blocks(change_map(source, edit))
    if changed.float().mean() > 0.98:
        return shift, 0.0, 0.0
    pixels = (~changed).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    pixels = F.pad(pixels, (0, source.shape[3] % BLOCK, 0, source.shape[2] % BLOCK))
    return shift, psnr(source, edit, pixels), ssim(luma(source), luma(edit), ~changed, BLOCK, BLOCK)


def displacement(a, b):
    """(dy, dx) in pixels by which b (T, 1, H, W) lies off a, to a fraction, by phase correlation over all frames."""
    height, width = a.shape[2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    fa, fb = (torch.fft.rfft2((x[:, 0] - x.mean((1, 2, 3))[:, None, None]) * window) for x in (a, b))
    cross = fb * fa.conj()
    peak = torch.fft.irfft2((cross / cross.abs().clamp_min(1e-9)).mean(0), s=(height, width))
    y, x = divmod(peak.argmax().item(), width)
    found = []
    for at, line in ((y, peak[:, x]), (x, peak[y])):
        before, here, after = (line[(at + d) % len(line)].item() for d in (-1, 0, 1))
        near = max(before, after, 0.0)
        fraction = near / (here + near) if near else 0.0  # Foroosh et al., 2002
        found.append((at + len(line) // 2) % len(line) - len(line) // 2 + (fraction if after > before else -fraction))
    return found


def moved_by(x, dy, dx):
    """(T, C, H, W) displaced by a fraction of pixels, around the edges."""
    height, width = x.shape[2:]
    ramp = torch.fft.fftfreq(height)[:, None] * dy + torch.fft.rfftfreq(width) * dx
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.exp(-2j * math.pi * ramp), s=(height, width)).clamp(0, 1)


def edges(y):
    """Mean |Laplacian| of every fourth frame (T, 1, H, W) -> its blocks (T/4, H/8, W/8)."""
    y = F.pad(y[::4], (1, 1, 1, 1), mode="replicate")
    found = 4 * y[..., 1:-1, 1:-1] - y[..., :-2, 1:-1] - y[..., 2:, 1:-1] - y[..., 1:-1, :-2] - y[..., 1:-1, 2:]
    return F.avg_pool2d(found.abs(), BLOCK)[:, 0]


def ratio(a, b, where):
    """Mean of a over that of b in blocks; None in fewer than 1 % of them."""
    return None if where.float().mean() < 0.01 else (a[where].mean() / b[where].mean().clamp_min(1e-3)).item()


def frozen_share(source, edit):
    """Share of the moments at which the source moves that the edit does not; None where the source stands still."""
    before, after = ((x[1:] - x[:-1]).abs().mean((1, 2, 3)) for x in (source, edit))
    moves = before > 0.3
    return (after < 0.2 * before)[moves].float().mean().item() if moves.any() else None


def lag(source, edit):
    """The delay at which the edit's changes in time resemble the source's most; None where the source stands still."""
    before, after = (F.avg_pool2d(x[1:] - x[:-1], BLOCK).flatten(1) for x in (source, edit))
    if before.abs().mean() < 0.1:
        return None
    if after.abs().mean() < 0.02:
        return LAGS
    before, after = (F.normalize(x, dim=1, eps=1.0) for x in (before, after))  # (T - 1, H/8 * W/8)
    reach, fit = min(LAGS, len(before) // 3), {}
    for d in sorted(range(-reach, reach + 1), key=abs):
        a, b = before[max(0, -d) : len(before) - max(0, d)], after[max(0, d) : len(after) + min(0, d)]
        fit[d] = (a * b).sum(1).mean().item()
    best = max(fit, key=fit.get)
    return best if fit[best] > fit[0] + 0.02 else 0


def warp_error(x, changed):
    """What block matching between neighbouring frames of (T, 1, H, W) leaves over, in the changed blocks."""
    chosen = torch.tensor(sample_frames(len(x) - 1, 12))
    now, before = x[chosen + 1], F.pad(x[chosen], (REACH,) * 4, mode="replicate")
    height, width = x.shape[2:]
    left = torch.full_like(F.avg_pool2d(now, BLOCK), math.inf)
    for dy in range(2 * REACH + 1):
        for dx in range(2 * REACH + 1):
            error = (now - before[..., dy : dy + height, dx : dx + width]).abs()
            left = torch.minimum(left, F.avg_pool2d(error, BLOCK))
    where = changed[chosen + 1]
    return left[:, 0][where if where.any() else where | True].mean().item()


def flicker(y):
    """Mean |second difference in time| of the luma."""
    return (y[2:] - 2 * y[1:-1] + y[:-2]).abs().mean().item()


def shuffled(frames):
    """The same frames in a random order: the known-bad answer for anything temporal."""
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))]


def blurred(x):
    """(T, C, H, W) at a quarter of its resolution and back."""
    size = [max(1, side // 4) for side in x.shape[2:]]
    return F.interpolate(F.interpolate(x, size, mode="area"), x.shape[2:], mode="bilinear")


DAMAGES = {  # name: (edit, source) -> a worse edit, uint8 (T, H, W, 3)
    "shuffled": lambda edit, source: shuffled(edit),
    "blurred": lambda edit, source: as_uint8(blurred(as_float(edit))),
    "frozen": lambda edit, source: edit[:1].expand_as(edit),
    "quarter": lambda edit, source: (source + (edit.float() - source) / 4).round().to(torch.uint8),
}


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
    chosen = sample_frames(len(edit), 5)
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


def crop_similarity(edit, changed, ref, embed):
    """Mean cosine between a reference, uint8 (h, w, 3), and the box around the changed blocks of up to five frames."""
    crops = []
    for t in sample_frames(len(edit), 5):
        rows, columns = (changed[t].any(axis).nonzero()[:, 0] * BLOCK for axis in (1, 0))
        if len(rows):
            crops.append(edit[t, rows[0] : rows[-1] + BLOCK, columns[0] : columns[-1] + BLOCK])
    return (embed(crops) @ embed([ref])[0]).mean().item() if crops else None


def load_pair(source_path, edit_path, max_pixels=PIXELS):
    """Source and edit, frame by frame, uint8 (T, H, W, 3) at the edit's aspect, and the frame rate.

    Frame i is compared with frame i, whatever the frame rates, as the release keeps frames and not time; the longer is
    cut. An edit by a system that resamples time must be resampled first. MediaError as `read_clip`.
    """
    edit = media.read_clip(edit_path, max_pixels=max_pixels)
    source = media.read_clip(source_path, max_pixels=max_pixels).frames
    count = min(len(edit.frames), len(source))
    source = source[:count]
    if source.shape[1:3] != edit.frames.shape[1:3]:
        source = media.fit_frames(source, edit.frames.shape[1:3])
    return source, edit.frames[:count], edit.fps


def as_float(frames):
    return frames.permute(0, 3, 1, 2).float() / 255


def as_uint8(x):
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


@functools.lru_cache(maxsize=64)  # the same reference is a wrong one for other items
def read_reference(path):
    """A reference picture, its longer side 256 pixels: float32 (1, 3, h, w) in 0..1."""
    image = media.read_image(path)
    scale = 256 / max(image.shape[:2])
    return as_float(media.resize(image[None], [max(32, round(n * scale)) for n in image.shape[:2]]))


def measure_files(source_path, edit_path, ref, wrong, beside, embed=None):
    """-> `measure` and `known_answers` of an edit.

    ref, wrong: paths of its reference and of another item's, or None. embed: pictures -> features of length 1. Leaves
    small clips and posters for a page: <beside>_source and <beside>_edit, and <beside>_ref.jpg.
    """
    source, edit, fps = load_pair(source_path, edit_path)
    refs = [read_reference(ref)] if ref else []
    with suppress(media.MediaError):  # if it is broken, that is its own item's trouble
        refs += [read_reference(wrong)] if wrong else []
    beside.parent.mkdir(parents=True, exist_ok=True)
    if ref:
        write_small(f"{beside}_ref", as_uint8(refs[0]), fps)
    write_small(f"{beside}_edit", edit, fps)
    copy = write_small(f"{beside}_source", source, fps)
    frames, (source, edit, copy) = edit, map(as_float, (source, edit, copy))
    out = measure(source, edit, refs)
    if embed and ref:
        changed = changed_blocks(change_map(source, edit))
        out["crop_similarity"] = crop_similarity(frames, changed, media.read_image(ref), embed)
    return out, known_answers(source, copy, refs[0] if ref else None, out)


def write_small(path, frames, fps):
    """A poster and, of more than one frame, a small clip for a page -> the frames (T, H, W, 3) as the file has them."""
    media.write_image(f"{path}.jpg", frames[len(frames) // 2])
    if len(frames) == 1:
        return media.read_image(f"{path}.jpg")[None]
    media.write_video(f"{path}.mp4", frames, fps, codec=PAGE_CODEC)
    return media.read_clip(f"{path}.mp4", len(frames), frames[0].numel()).frames


def write_damaged(path, damage, source_path, edit_path):
    """The edit, damaged, as a file as good as the edit's: a judge should score it lower."""
    source, edit, fps = load_pair(source_path, edit_path, max_pixels=720 * 1280)
    write_edit(path, DAMAGES[damage](edit, source), fps)


def write_edit(path, frames, fps, audio_from=None):
    """An edit as a picture or a clip, which loses nothing that metrics would see."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in media.IMAGE_CODECS:
        media.write_image(path, frames[0])
    else:
        media.write_video(path, frames, fps, audio_from, media.faithful_codec(frames))
