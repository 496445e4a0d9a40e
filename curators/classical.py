"""Curation without weights: everything follows from the difference of source and target at the same moments.

    source, target clips -> 12 moments (T, 3, h, w) of at most 320x180 -> CIELAB difference (T, h, w) -> what changed
      subject: its main part, grown by colour (GrabCut) -> cut out of the full key frame, its rim's colours estimated
      background: what stayed is the foreground -> filled by shift map

Sees how strong an edit is, whether it stays in its place and is there all the time, and a colour that the words name.
Does not see what was asked for, whether it looks natural, what an object is. So it rejects what looks broken: several
large parts, colours that contradict the difference, contact with the border, 20 % of a background never seen.
opencv (opencv-contrib-python-headless) is optional: GrabCut and shift maps have plain twins here, and the rejects hold.
"""

import math
import os
import re
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from curators import Rejected, box_of, frame_at, moments
from media import MediaError, decode, open_media, read_image, resize
from metrics import as_float, lab, luma, otsu

LOOKS = 12  # frames of a clip that are looked at
LOOK_PIXELS, CUT_PIXELS, FILL_PIXELS = 320 * 180, 640 * 360, 1280 * 720
UNCHANGED, CHANGED = 8.0, 16.0  # CIELAB units: a VAE's trace stays below the first; above the second all is edit
ALIKE = 6.0  # CIELAB units between the colours of one thing at two moments
COLOURS = {  # names -> sRGB
    "red": (190, 30, 40), "orange": (235, 125, 30), "yellow": (235, 210, 50), "gold": (205, 160, 50),
    "golden": (205, 160, 50), "green": (50, 130, 60), "blue": (40, 80, 180), "purple": (120, 50, 150),
    "pink": (235, 150, 180), "brown": (110, 70, 45), "black": (25, 25, 28), "white": (240, 240, 240),
    "grey": (128, 128, 128), "gray": (128, 128, 128), "silver": (185, 185, 190), "blonde": (215, 190, 140),
    "platinum": (220, 210, 190), "snowy": (230, 235, 240),
}  # fmt: skip

try:
    import cv2
except ImportError:
    cv2 = None


# ---- what is seen


def frames_at(path, wanted, max_pixels):
    """Frames by their indices, as far as the clip has them, shrunk: uint8 (T, H, W, 3), and their indices."""
    return decoded(
        path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0, tuple(sorted(set(wanted))), max_pixels
    )


@lru_cache(maxsize=64)  # of 2 MB at most: a small run decodes each clip once
def decoded(path, state, wanted, max_pixels):
    frames, indices = [], []
    with open_media(path) as (container, stream):
        for number, (_, rgb) in enumerate(decode(path, container, stream)):
            if number in wanted:
                scale = min(1.0, math.sqrt(max_pixels / (rgb.shape[0] * rgb.shape[1])))
                frames.append(resize(rgb[None], [max(8, round(side * scale)) for side in rgb.shape[:2]])[0])
                indices.append(number)
            if number == wanted[-1]:
                break
    if not frames:
        raise MediaError(f"{path}: has no frames")
    return torch.stack(frames), indices


def look_at_pair(source, target, max_pixels=LOOK_PIXELS):
    """The same moments of both clips, at the target's size -> source, target float (T, 3, H, W), indices."""
    shared = moments(source, target)
    wanted = [round(i) for i in np.linspace(0, shared - 1, min(LOOKS, shared))]
    (a, _), (b, indices) = (frames_at(path, wanted, max_pixels) for path in (source, target))
    count = min(len(a), len(b))  # a file may hold fewer frames than it declares
    if abs(math.log(a.shape[1] / a.shape[2] * b.shape[2] / b.shape[1])) > 0.05:
        raise MediaError(
            f"{target}: is {b.shape[2]}x{b.shape[1]} where its source is {a.shape[2]}x{a.shape[1]}, another aspect"
        )
    return as_float(resize(a[:count], b.shape[1:3])), as_float(b[:count]), indices[:count]


def difference(source, target):
    """CIELAB distance of each pixel, averaged over 3x3 -> (T, H, W)."""
    apart = 100 * (lab(source) - lab(target)).square().sum(dim=1).sqrt()
    return F.avg_pool2d(apart[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def split_value(values):
    """Otsu's threshold between what stayed and what changed, kept within UNCHANGED and CHANGED."""
    return min(max(otsu(values.clamp(max=60), 60, 60), UNCHANGED), CHANGED)


def body(apart, kind):
    """What is to be masked, bool (T, H, W): the changed region, or before a new background what stayed."""
    return clean(apart > split_value(apart), 0.25) if kind == "subject" else clean(apart < split_value(apart), 0.12)


# ---- masks


def regions(mask):
    """Connected regions (8 neighbours) of each frame of bool (T, H, W) -> int64 labels, 0 outside.

    Runs of pixels in a row are the nodes, runs that touch in the next row the edges; the smallest number wins.
    """
    frames, height, width = mask.shape
    line = np.pad(mask.numpy(), ((0, 0), (0, 0), (0, 1))).ravel().astype(np.int8)  # a gap ends each row
    change = np.diff(line, prepend=0)
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)  # ends are exclusive
    above = np.flatnonzero(starts // (width + 1) % height < height - 1)
    low = np.searchsorted(ends, starts[above] + width + 1, "left")
    high = np.searchsorted(starts, ends[above] + width + 1, "right")
    a = np.repeat(above, high - low)
    b = np.arange(len(a)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + np.repeat(low, high - low)
    label = np.arange(len(starts))
    while (label[a] != label[b]).any():
        smaller = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], smaller)
        np.minimum.at(label, label[b], smaller)
        label = label[label]
    out = torch.zeros(mask.shape, dtype=torch.int64)
    out[mask] = torch.from_numpy(np.repeat(label + 1, ends - starts))
    return out


def large_regions(mask, least=0.1, pixels=4):
    """A mask (T, H, W) without specks: of each frame the regions of at least `least` of the largest, and `pixels`."""
    labels = regions(mask)
    count = torch.bincount(labels.flatten())
    count[0] = 0
    size = count[labels]  # (T, H, W)
    return mask & (size >= (least * size.amax(dim=(1, 2), keepdim=True)).clamp_min(pixels))


def parts(mask, least=0.2):
    """How many regions of a mask (H, W) have at least `least` of the largest's size."""
    count = torch.bincount(regions(mask[None]).flatten())[1:]
    return int((count >= least * count.max()).sum()) if len(count) else 0


def without_holes(mask):
    """A mask (T, H, W) with what it encloses."""
    labels = regions(F.pad(~mask, (1, 1, 1, 1), value=True))
    return ~(labels == labels[:, :1, :1])[:, 1:-1, 1:-1]


def grow(x, n):
    """Each pixel of (N, 1, H, W) takes the largest value within n pixels."""
    return F.max_pool2d(F.max_pool2d(x, (2 * n + 1, 1), 1, (n, 0)), (1, 2 * n + 1), 1, (0, n)) if n else x


def blur(x, n):
    """Box means over 2n + 1 pixels, borders counted right."""
    mean = lambda y, size, pad: F.avg_pool2d(y, size, 1, pad, count_include_pad=False)
    return mean(mean(x, (2 * n + 1, 1), (n, 0)), (1, 2 * n + 1), (0, n))


def clean(mask, least=0.1):
    """Large regions without their holes; gaps of 2 % of the frame are closed first, bridges of a pixel cut."""
    x, gap = mask[:, None].float(), min(mask.shape[1:]) // 60
    if gap:
        x = -grow(-grow(x, 1), 1)
        x = grow(-grow(-x, 1), 1)
        x = -grow(-grow(x, gap), gap)
    return without_holes(large_regions(x[:, 0] > 0.5, least))


def resized(mask, size):
    """A mask bool (H, W) at another size."""
    return F.interpolate(mask[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0] > 0.5


def overlap(a, b):
    return (a & b).sum().item() / max((a | b).sum().item(), 1)


def by_colour(frame, mask, seed):
    """A mask bool (H, W) grown or shrunk to what has its seed's colours, not those of the ring around it: main part."""
    x = mask[None, None].float()
    ring, reach = (grow(x, max(n, min(mask.shape) // d))[0, 0] > 0.5 for n, d in ((2, 60), (8, 8)))
    inner = (-grow(-seed[None, None].float(), 1))[0, 0] > 0.5
    if not inner.any() or ring.all():
        return mask
    grabbed = (grab_cut if cv2 else histogram_cut)(frame, mask, inner, ring, reach)
    return without_holes(large_regions(grabbed[None], 1.0))[0] if grabbed.any() else grabbed


def grab_cut(frame, mask, inner, ring, reach):
    """GrabCut (Rother et al., 2004): inner is probably foreground, what lies beyond `reach` is not looked at."""
    state = np.full(mask.shape, cv2.GC_BGD, np.uint8)
    state[reach.numpy()], state[inner.numpy()] = cv2.GC_PR_BGD, cv2.GC_PR_FGD
    state[(grow(ring[None, None].float(), 4)[0, 0] < 0.5).numpy() & reach.numpy()] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(
        np.ascontiguousarray(frame), state, None, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK
    )
    return torch.from_numpy((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD))


def histogram_cut(frame, mask, inner, ring, reach):
    """GrabCut's plain twin: smoothed colour histograms of inside and ring decide each pixel near the mask's border."""
    near, inside = grow(ring[None, None].float(), 4)[0, 0] > 0.5, mask
    for outside in (reach & ~ring, None, None):
        odds = like(frame, inside, reach & ~inside if outside is None else outside)
        inside = (blur(odds.clamp(-3, 3)[None, None], 3)[0, 0] > 0) & near
    return inside


def like(frame, inside, outside, bins=12):
    """Log odds (H, W) that a colour of a frame uint8 (H, W, 3) is one of those inside, not outside."""
    index = ((frame.long() * bins // 256) * torch.tensor([bins * bins, bins, 1])).sum(-1)
    share = []
    for where in (inside, outside):
        cube = torch.bincount(index[where], minlength=bins**3).float().view(1, 1, bins, bins, bins) + 0.02
        share.append(F.avg_pool3d(cube, 3, 1, 1).flatten()[index] / max(int(where.sum()), 1))
    return (share[0] / share[1]).log()


# ---- pictures


def cut_out(frame, mask, margin=0.05):
    """The masked object of a frame uint8 (H, W, 3) on white, tightly cropped, uint8. mask: bool (h, w), of any size.

    Its border moves to the nearest edge of the picture by a guided filter (He et al., 2010); colours of the rim are
    those of the object alone, estimated from blurs of both sides (Forte, 2021).
    """
    height, width = frame.shape[:2]
    soft = F.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    x1, y1, x2, y2 = box_of(soft[0, 0] > 0.5)
    pad = margin * max((x2 - x1) * width, (y2 - y1) * height)
    left, right = max(int(x1 * width - pad), 0), min(math.ceil(x2 * width + pad), width)
    top, bottom = max(int(y1 * height - pad), 0), min(math.ceil(y2 * height + pad), height)
    colour = as_float(frame[None, top:bottom, left:right])
    radius = max(1, round(height / mask.shape[0]))
    alpha = guided(soft[..., top:bottom, left:right], luma(colour), radius).sub(0.35).div(0.4).clamp(0, 1)
    own = own_colour(own_colour(colour, alpha, 45), alpha, 3, colour)
    return as_uint8(own * alpha + (1 - alpha))[0]


def own_colour(start, alpha, radius, colour=None):
    """Foreground colours (1, 3, H, W) of a picture that mixes foreground and background by alpha."""
    colour = start if colour is None else colour
    inside, outside = blur(alpha, radius), blur(1 - alpha, radius)
    front, back = blur(start * alpha, radius) / (inside + 1e-5), blur(colour * (1 - alpha), radius) / (outside + 1e-5)
    return (front + alpha * (colour - alpha * front - (1 - alpha) * back)).clamp(0, 1)


def as_uint8(x):
    """(N, 3, H, W) in 0..1 -> uint8 (N, H, W, 3)."""
    return x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def guided(x, guide, radius, strength=1e-3):
    """x (1, 1, H, W) smoothed, but not across the edges of `guide` (1, 1, H, W)."""
    mean = lambda y: blur(y, radius)
    a = (mean(guide * x) - mean(guide) * mean(x)) / (mean(guide * guide) - mean(guide) ** 2 + strength)
    return mean(a) * guide + mean(mean(x) - a * mean(guide))


def without_foreground(frame, foreground):
    """A frame uint8 (H, W, 3) with its foreground, bool (H, W), filled from like surroundings. Rejected if that is more
    than 20 % of the picture, or 4 % without opencv's shift map."""
    unknown = (
        grow(foreground[None, None].float(), max(4, min(foreground.shape) // 50))[0, 0] > 0.5
    )  # shadows, soft rims
    if unknown.float().mean() > (0.2 if cv2 else 0.04):
        raise Rejected(f"{unknown.float().mean():.0%} of the background is never seen")
    picture = as_float(frame[None])
    return shift_map(picture, unknown) if cv2 else as_uint8(from_surroundings(picture, ~unknown[None, None]))[0]


def shift_map(picture, unknown, pixels=360 * 200):
    """Fill `unknown`, bool (H, W), of a picture (1, 3, H, W) with copies of like surroundings (He and Sun, 2012)."""
    full = as_uint8(picture)[0]
    if not unknown.any():
        return full
    scale = min(1.0, math.sqrt(pixels / unknown.numel()))
    size = [round(side * scale) for side in unknown.shape]
    small = cv2.cvtColor(
        as_uint8(F.interpolate(from_surroundings(picture, ~unknown[None, None]), size, mode="area"))[0].numpy(),
        cv2.COLOR_RGB2Lab,
    )
    hole = F.interpolate(unknown[None, None].float(), size, mode="area")[0, 0] > 0
    done = small.copy()
    cv2.setRNGSeed(0)
    cv2.xphoto.inpaint(small, (~hole).to(torch.uint8).mul(255).numpy(), done, cv2.xphoto.INPAINT_SHIFTMAP)
    filled = as_float(resize(torch.from_numpy(cv2.cvtColor(done, cv2.COLOR_Lab2RGB))[None], unknown.shape))
    soft = torch.where(unknown, 1.0, blur(unknown[None, None].float(), 4))
    return as_uint8(picture * (1 - soft) + filled * soft)[0]


def from_surroundings(picture, known):
    """Fill what is not known, bool (1, 1, H, W), with averages over as much around it as it takes: (1, 3, H, W)."""
    known = known.float()
    if known.min() == 1:
        return picture
    weight = F.avg_pool2d(known, 2, ceil_mode=True, count_include_pad=False)
    coarse = F.avg_pool2d(picture * known, 2, ceil_mode=True, count_include_pad=False) / weight.clamp_min(1e-6)
    if min(coarse.shape[2:]) > 1 or weight.min() == 0 < weight.max() and max(coarse.shape[2:]) > 1:
        coarse = from_surroundings(coarse, weight > 0)
    return picture * known + (1 - known) * F.interpolate(
        coarse, picture.shape[2:], mode="bilinear", align_corners=False
    )


# ---- numbers


def ramp(value, low, high):
    """0 at `low` and beyond, 1 at `high`, straight in between."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


def named_colour(prompt):
    """The colour that the instruction asks for, CIELAB (3,), or None: the first named after "with" or "into"."""
    words = re.findall("[a-z]+", prompt[:2000].lower())
    cut = next((i for i, word in enumerate(words) if word in ("with", "into", "to")), 0)
    for before, word in zip(["", *words], words[:]):
        if word in COLOURS and word in words[cut:]:
            light = {"dark": 0.4, "deep": 0.6}.get(before, 1.0)
            return 100 * lab(torch.tensor(COLOURS[word]).view(1, 3, 1, 1) * light / 255)[0, :, 0, 0]
    return None


def colours(pixels, ways=8):
    """The colours of pixels (N, 3) in 0..1 as quantiles along some directions of CIELAB (ways, 20): the mean difference
    of two such tables is the (sliced) earth mover's distance of the two sets of colours."""
    directions = F.normalize(torch.randn(3, ways, generator=torch.Generator().manual_seed(0)), dim=0)
    values = 100 * lab(pixels.T[None, :, None])[0, :, 0].T @ directions  # (N, ways)
    return torch.quantile(values[:: max(1, len(values) // 20000)], torch.linspace(0.025, 0.975, 20), dim=0).T


def inked(picture):
    """Where a reference (1, 3, H, W) is not its white ground -> bool (1, H, W)."""
    return picture.amin(dim=1) < 0.96


def layout(picture, mask, size=32):
    """What a mask bool (H, W) shows of a picture (3, H, W), its box stretched: CIELAB (3, size, size), and the mask."""
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(box_of(mask), mask.shape[::-1] * 2))
    stretched = lambda x: F.interpolate(
        x[None, :, y1:y2, x1:x2], (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return 100 * lab(stretched(picture))[0], stretched(mask[None].float())[0, 0] > 0.5


def apart_in_layout(a, b):
    """Mean CIELAB distance of two `layout`s where both have a mask, and the overlap of their masks."""
    (one, mask), (other, mask2) = a, b
    both = mask & mask2
    distance = (one - other).square().sum(0).sqrt()[both].mean().item() if both.any() else 99.0
    return distance, overlap(mask, mask2)


class Classical:
    def __init__(self, args):
        self.args = args

    def setup(self, stage):
        torch.manual_seed(0)

    def preflight(self, stages):
        pass

    def score(self, source_path, target_path, row):
        """Of each moment 10 sqrt(SC PQ): EditScore's formula with what can be measured in their places."""
        source, target, _ = look_at_pair(source_path, target_path)
        apart = difference(source, target)
        changed = apart > split_value(apart)
        whole = clean(changed, 0.25)
        area = whole.float().mean(dim=(1, 2))
        usual, swapped = area.median().item(), self.exchanged(source, target, whole, row)
        steady = ramp(drift(target, whole) - drift(source, whole), 12, 1)
        moment = lambda t: (row["kind"], source[t], target[t], apart[t], changed[t], whole[t], usual)
        return [10 * swapped * math.sqrt(steady * self.fit(*moment(t))) for t in range(len(apart))]

    def fit(self, kind, source, target, apart, changed, whole, usual):
        """How strong and how well placed an edit is at one moment, 0..1."""
        area = whole.float().mean().item()
        strength = 1 - math.exp(-(apart[whole].mean().item() if whole.any() else 0.0) / 8)
        left = apart[~whole].square().mean().sqrt().item() if not whole.all() else 99.0
        if kind == "style":
            edges = [
                (luma(x[None])[..., 1:, 1:] - luma(x[None])[..., :-1, :-1]).abs().flatten() for x in (source, target)
            ]
            kept = torch.corrcoef(torch.stack(edges))[0, 1].nan_to_num().item()
            return strength * ramp(area, 0.05, 0.6) * (0.4 + 0.6 * ramp(kept, 0.0, 0.6))
        if kind == "background":
            return strength * ramp(area, 0.05, 0.3) * ramp(1 - area, 0.0, 0.05)
        together = (changed & whole).sum().item() / max(changed.sum().item(), 1)  # the rest is scattered about
        place = min(
            math.exp(-((left / 14) ** 2)), ramp(together, 0.3, 0.9), ramp(area, 0.85, 0.5), ramp(area, 0.0, 0.001)
        )
        return strength * place * (ramp(area, 0.1 * usual, 0.4 * usual) if usual else 0.0)

    def exchanged(self, source, target, whole, row):
        """0.3 where the source has the colour that the words ask for and the target lost it, else 1."""
        wanted = named_colour(row["prompt"])
        if wanted is None or row["kind"] not in ("subject", "background") or not whole.any():
            return 1.0
        near = []
        for clip in (source, target):
            pixels = 100 * lab(clip).permute(0, 2, 3, 1)[whole]
            near.append(torch.quantile((pixels - wanted).norm(dim=1)[:: max(1, len(pixels) // 20000)], 0.25).item())
        return 0.3 if near[0] < 20 and near[0] + 15 < near[1] else 1.0

    def ground(self, source_path, target_path, row):
        """-> box, mask (H, W), index of the frame in which it is best seen, no more columns."""
        source, target, indices = look_at_pair(source_path, target_path)
        apart = difference(source, target)
        masks, kind = body(apart, row["kind"]), row["kind"]
        if "box" in row:
            within = torch.zeros_like(masks)
            x1, y1, x2, y2 = (round(v * side) for v, side in zip(row["box"], masks.shape[:0:-1] * 2))
            within[:, y1:y2, x1:x2] = True
            masks = masks & within
        area = masks.float().mean(dim=(1, 2))
        edge = torch.stack([masks[:, 0].any(1), masks[:, -1].any(1), masks[..., 0].any(1), masks[..., -1].any(1)]).sum(
            0
        )
        if area.max() < 2e-4:
            raise Rejected("nothing changed" if kind == "subject" else "nothing stayed: no foreground")
        best = (
            area * (1 - 0.2 * edge) if kind == "subject" else -area * (1 - 0.1 * edge) - (area < 2e-4).float()
        ).argmax()
        if kind == "subject" and area[best] > 0.6:
            raise Rejected(f"{area[best]:.0%} of the frame changed: not a local edit")
        if kind == "background" and not 0.005 < area[best] < 0.75:
            raise Rejected(f"{area[best]:.0%} of the frame stayed: no background edit")
        key, mask = indices[best], masks[best]
        if kind == "background":
            frame = frames_at(target_path, [key], CUT_PIXELS)[0][0]
            mask = resized(mask, frame.shape[:2])
            mask = mask | by_colour(frame, mask, mask)
        if kind == "subject":
            mask = self.whole_object(
                frames_at(target_path, [key], CUT_PIXELS)[0][0], mask, apart[best] > split_value(apart)
            )
        return box_of(mask), mask, key, {}

    def whole_object(self, frame, mask, changed):
        """The mask of one whole object in a frame uint8 (H, W, 3), from the mask of what changed, or Rejected."""
        if (number := parts(mask)) > 1:
            raise Rejected(f"the edit is in {number} large parts")
        mask, changed = resized(large_regions(mask[None], 1.0)[0], frame.shape[:2]), resized(changed, frame.shape[:2])
        found = by_colour(frame, mask, mask & changed)
        if (share := overlap(found, mask)) < 0.6:
            raise Rejected(f"colours and difference disagree about the object's outline (IoU {share:.2f})")
        x1, y1, x2, y2 = box_of(found)
        contact = sum(int(side.sum()) for side in (found[0], found[-1], found[:, 0], found[:, -1]))
        if contact > 0.2 * (found.any(0).sum() + found.any(1).sum()) * 2 or x2 - x1 == 1 or y2 - y1 == 1:
            raise Rejected("the frame's border cuts the object off")
        return found

    def synthesize(self, source_path, target_path, mask, row):
        """A subject cut out of the key frame, or the key frame without its foreground: uint8 (H, W, 3)."""
        if row["kind"] == "subject":
            return cut_out(frame_at(target_path, row["key"]), mask)
        frame = frames_at(target_path, [row["key"]], FILL_PIXELS)[0][0]
        return without_foreground(frame, resized(mask, frame.shape[:2]))

    def verify(self, source_path, target_path, ref_path, row):
        """Does the reference show the edit, upright and whole, and is it there at other moments? (bool, reason)"""
        source, target, indices = look_at_pair(source_path, target_path)
        masks = body(difference(source, target), row["kind"])
        place = masks if row["kind"] == "subject" else ~masks
        picture = as_float(read_image(ref_path)[None])[0]
        ink = inked(picture[None])[0] if row["kind"] == "subject" else torch.ones(picture.shape[1:], dtype=torch.bool)
        if not ink.any() or not place.any():
            return False, "nothing is shown"
        if "given_ref" not in row and row.get("key") in indices:
            shown = self.in_place(target_path, picture, ink, row)
            if shown:
                return False, shown
        elif broken := self.broken(picture, ink, target, place):
            return False, broken
        others = [i for i, index in enumerate(indices) if index != row.get("key") and place[i].any()]
        others = others or [i for i in range(len(indices)) if place[i].any()]
        wanted = colours(picture[:, ink].T)
        after, before = (colours(torch.cat([clip[i][:, place[i]].T for i in others])) for clip in (target, source))
        near, far = ((wanted - x).abs().mean().item() for x in (after, before))
        limit = 4 * ALIKE if "given_ref" in row else min(ALIKE, far)  # another picture of the thing, in another light
        return near < limit, f"colours {near:.0f} from the edit's, {far:.0f} from the source's (CIELAB)"

    def in_place(self, target_path, picture, ink, row):
        """What is wrong with a reference that was cut out of the key frame, held against that frame, or None."""
        frame = as_float(frames_at(target_path, [row["key"]], CUT_PIXELS)[0])[0]
        mask = resized(read_image(self.args.out + "/" + row["mask"])[..., 0] > 127, frame.shape[1:])
        where = mask if row["kind"] == "subject" else torch.ones_like(mask)
        if not where.any():
            return "the mask is empty"
        seen, shown = layout(frame, where), layout(picture, ink)
        if row["kind"] == "background":
            stayed = F.interpolate(grow(mask[None, None].float(), 9), (32, 32), mode="area")[0, 0] > 0
            seen = seen[0], seen[1] & ~stayed
            shown = shown[0], shown[1] & ~stayed
        distance, same = apart_in_layout(seen, shown)
        if distance > 14 or same < 0.8:
            return f"it is not what stands in its place (CIELAB {distance:.0f}, outline {same:.2f})"
        return None

    def broken(self, picture, ink, target, place):
        """What is wrong with a reference that came with the pair: noise, or upside down; None if nothing is found."""
        fine = F.interpolate(picture[None], (128, 128), mode="area")
        noise = (luma(fine)[..., 1:] - luma(fine)[..., :-1]).abs().mean() / luma(fine).std().clamp_min(0.01)
        if noise > 0.7:
            return "it is noise"
        best = int(place.float().mean(dim=(1, 2)).argmax())
        seen, shown = layout(target[best], place[best]), layout(picture, ink)
        upright = apart_in_layout(seen, shown)[0]
        turned = apart_in_layout(seen, (shown[0].flip(1), shown[1].flip(0)))[0]
        return f"it is upside down (CIELAB {turned:.0f} against {upright:.0f})" if turned < 0.7 * upright else None

    def embed(self, images):
        return torch.stack([look_feature(image) for image in images])


def drift(clip, where):
    """How far the colours within a mask move from one look to the next, CIELAB units: a thing keeps its colours."""
    tables = [colours(frame[:, mask].T) for frame, mask in zip(clip, where) if mask.sum() > 20]
    return sum((a - b).abs().mean().item() for a, b in zip(tables, tables[1:])) / max(len(tables) - 1, 1)


def look_feature(image, size=16):
    """What a reference looks like, (D,) of length 1: its layout in CIELAB, most of its mean taken away.

    Shown is what lies within two standard deviations of its ink, so that a white margin, a resize or a JPEG's noise
    around the object move nothing.
    """
    picture = F.interpolate(
        as_float(image[None]), (64, 64), mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)
    ink = (0.92 - picture.amin(dim=1)[0]).clamp_min(1e-12).sqrt()
    axis = (torch.arange(64) + 0.5) / 32 - 1
    spread = []
    for weight in (ink.sum(dim=0), ink.sum(dim=1)):  # along x, along y
        middle = (weight * axis).sum() / weight.sum()
        spread.append((2 * ((weight * (axis - middle) ** 2).sum() / weight.sum()).sqrt(), middle))
    (x, right), (y, down) = spread
    window = torch.tensor([[[x, 0, right], [0, y, down]]])
    grid = F.affine_grid(window, (1, 3, 2 * size, 2 * size), align_corners=False)
    seen = lab(F.avg_pool2d(F.grid_sample(picture, grid, padding_mode="border", align_corners=False), 2))[0]
    return F.normalize((seen - 0.75 * seen.mean(dim=(1, 2), keepdim=True)).flatten(), dim=0)
