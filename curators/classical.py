"""Curation without weights: everything follows from the difference of source and target at the same moments.

    source, target clips -> 12 moments (T, 3, h, w) of at most 320x180 -> CIELAB difference (T, h, w) -> what changed
      subject: its main part, grown by colour -> cut out of the full key frame, its rim's colours estimated
      background: what stayed is the foreground -> filled with copies of what surrounds it

Sees how strong an edit is, whether it stays in its place and is there all the time, and a colour that the words name.
Does not see what was asked for, whether it looks natural, what an object is. So it rejects what looks broken: several
large parts, colours that contradict the difference, contact with the border, 20 % of a background never seen.
"""

import math
import re
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from curators import Rejected, around, box_of, frame_at, moments
from media import MediaError, decode, open_media, read_image, resize
from metrics import as_float, as_uint8, lab, luma, otsu
from vlm import within

LOOKS = 12  # frames of a clip that are looked at
LOOK_PIXELS, CUT_PIXELS, FILL_PIXELS = 320 * 180, 640 * 360, 1280 * 720
UNCHANGED, CHANGED = 8.0, 16.0  # CIELAB units: a VAE's trace stays below the first; above the second all is edit
ALIKE = 6.0  # CIELAB units between the colours of one thing at two moments
COLOURS = {  # sRGB
    "red": (190, 30, 40), "orange": (235, 125, 30), "yellow": (235, 210, 50), "golden": (205, 160, 50),
    "green": (50, 130, 60), "blue": (40, 80, 180), "purple": (120, 50, 150), "pink": (235, 150, 180),
    "brown": (110, 70, 45), "black": (25, 25, 28), "white": (240, 240, 240), "grey": (128, 128, 128),
    "gray": (128, 128, 128), "silver": (185, 185, 190), "blonde": (215, 190, 140),
}  # fmt: skip


@lru_cache(maxsize=64)  # of 2 MB at most: a small run decodes each clip once
def frames_at(path, wanted, max_pixels):
    """Frames by their indices in order, as far as the clip has them, shrunk: uint8 (T, H, W, 3), and their indices."""
    frames, indices = [], []
    with open_media(path) as (container, stream):
        for number, (_, rgb) in enumerate(islice(decode(path, container, stream), wanted[-1] + 1)):
            if number in wanted:
                frames.append(resize(rgb[None], within(*rgb.shape[:2], max_pixels, 1))[0])
                indices.append(number)
    if not frames:
        raise MediaError(f"{path}: has no frames")
    return torch.stack(frames), indices


def key_frame(path, index, max_pixels):
    """The frame uint8 (H, W, 3) in which an edit is best seen."""
    return frames_at(path, (index,), max_pixels)[0][0]


def look_at_pair(source, target):
    """The same moments of both clips, at the target's size -> source, target float (T, 3, H, W), indices."""
    shared = moments(source, target)
    wanted = tuple(round(i) for i in np.linspace(0, shared - 1, min(LOOKS, shared)))
    (a, _), (b, indices) = (frames_at(path, wanted, LOOK_PIXELS) for path in (source, target))
    count = min(len(a), len(b))  # a file may hold fewer frames than it declares
    if abs(math.log(a.shape[1] / a.shape[2] * b.shape[2] / b.shape[1])) > 0.05:
        raise MediaError(f"{target}: has another aspect than its source")
    return as_float(resize(a[:count], b.shape[1:3])), as_float(b[:count]), indices[:count]


def difference(source, target):
    """CIELAB distance of each pixel, averaged over 3x3 -> (T, H, W), and the value that splits what changed from what
    stayed (Otsu's, kept within UNCHANGED and CHANGED)."""
    apart = 100 * (lab(source) - lab(target)).square().sum(dim=1).sqrt()
    apart = F.avg_pool2d(apart[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    return apart, min(max(otsu(apart.clamp(max=60), 60, 60), UNCHANGED), CHANGED)


def body(source, target, kind):
    """What is to be masked, bool (T, H, W): the changed region, or before a new background what stayed."""
    apart, split = difference(source, target)
    return clean(apart > split, 0.25) if kind == "subject" else clean(apart < split, 0.12)


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
    b = np.arange(len(a)) - np.repeat(np.cumsum(high - low) - high, high - low)
    label = np.arange(len(starts))
    while (label[a] != label[b]).any():
        smaller = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], smaller)
        np.minimum.at(label, label[b], smaller)
        label = label[label]
    out = torch.zeros(mask.shape, dtype=torch.int64)
    out[mask] = torch.from_numpy(np.repeat(label + 1, ends - starts))
    return out


def large_regions(mask, least):
    """A mask (T, H, W) without specks: of each frame the regions of at least `least` of the largest, and 4 pixels."""
    labels = regions(mask)
    count = torch.bincount(labels.flatten())
    count[0] = 0
    size = count[labels]  # (T, H, W)
    return mask & (size >= (least * size.amax(dim=(1, 2), keepdim=True)).clamp_min(4))


def without_holes(mask):
    """A mask (T, H, W) with what it encloses."""
    labels = regions(F.pad(~mask, (1, 1, 1, 1), value=True))
    return ~(labels == labels[:, :1, :1])[:, 1:-1, 1:-1]


def grow(mask, n):
    """What lies within n pixels of a mask, bool (..., H, W), along both axes."""
    x = mask.float().view(-1, 1, *mask.shape[-2:])
    return (F.max_pool2d(F.max_pool2d(x, (2 * n + 1, 1), 1, (n, 0)), (1, 2 * n + 1), 1, (0, n)) > 0).view(mask.shape)


def clean(mask, least):
    """Large regions without their holes; gaps of 2 % of the frame are closed first, bridges of a pixel cut."""
    close = lambda mask, n: ~grow(~grow(mask, n), n)
    if gap := min(mask.shape[1:]) // 60:
        mask = close(~close(~close(mask, 1), 1), gap)
    return without_holes(large_regions(mask, least))


def stretched(x, size, **how):
    """(N, C, H, W) at another size."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False, **how)


def resized(mask, size):
    """A mask bool (H, W) at another size."""
    return stretched(mask[None, None].float(), size)[0, 0] > 0.5


def overlap(a, b):
    return (a & b).sum().item() / max((a | b).sum().item(), 1)


def blur(x, n):
    """Box means over 2n + 1 pixels, borders counted right."""
    mean = lambda y, size, pad: F.avg_pool2d(y, size, 1, pad, count_include_pad=False)
    return mean(mean(x, (2 * n + 1, 1), (n, 0)), (1, 2 * n + 1), (0, n))


def whole_object(frame, mask, change):
    """The mask of one whole object in a frame uint8 (H, W, 3), from the mask of what changed and how much that was,
    (h, w), 1 on the border to what stayed. Rejected, for what is broken."""
    if (number := len(regions(large_regions(mask[None], 0.2)).unique()) - 1) > 1:
        raise Rejected(f"the edit is in {number} large parts")
    mask = resized(large_regions(mask[None], 1.0)[0], frame.shape[:2])
    found = by_colour(frame, mask)
    if (share := overlap(found, mask)) < 0.6:
        raise Rejected(f"colours and difference disagree about the object's outline (IoU {share:.2f})")
    found = by_colour(frame, mask, stretched(change[None, None], mask.shape)[0, 0].clamp(0.1, 10).log())
    x1, y1, x2, y2 = box_of(found)
    contact = sum(int(side.sum()) for side in (found[0], found[-1], found[:, 0], found[:, -1]))
    if contact > 0.4 * (found.any(0).sum() + found.any(1).sum()) or x2 - x1 == 1 or y2 - y1 == 1:
        raise Rejected("the frame's border cuts the object off")
    return found


def by_colour(frame, mask, evidence=0.0):
    """A mask bool (H, W) grown or shrunk to what has its colours, not those of the ring around it: its main part.

    A plain GrabCut (Rother et al., 2004): colour histograms of inside and outside decide each pixel near the border,
    with other evidence (H, W), log odds.
    """
    side = min(mask.shape)
    ring, reach = grow(mask, max(2, side // 60)), grow(mask, max(8, side // 8))
    inside, outside, near = mask, reach & ~ring, grow(ring, 4)
    if not outside.any():
        return mask
    for _ in range(3):
        odds = like(frame, inside, outside).clamp(-3, 3) + evidence
        inside = (blur(odds[None, None], 3)[0, 0] > 0) & near
        outside = reach & ~inside
    return without_holes(large_regions(inside[None], 1.0))[0]


def like(frame, inside, outside, bins=12):
    """Log odds (H, W) that a colour of a frame uint8 (H, W, 3) is one of those inside, not outside."""
    index = ((frame.long() * bins // 256) * torch.tensor([bins * bins, bins, 1])).sum(-1)
    share = []
    for where in (inside, outside):
        cube = torch.bincount(index[where], minlength=bins**3).float().view(1, 1, bins, bins, bins) + 0.02
        share.append(F.avg_pool3d(cube, 3, 1, 1).flatten()[index] / max(int(where.sum()), 1))
    return (share[0] / share[1]).log()


def cut_out(frame, mask):
    """The masked object of a frame uint8 (H, W, 3) on white, tightly cropped, uint8. mask: bool (h, w), of any size.

    Colours of the rim are those of the object alone, estimated from blurs of both sides (Forte, 2021).
    """
    soft = stretched(mask[None, None].float(), frame.shape[:2])
    cropped = lambda x: around(x, box_of(soft[0, 0] > 0.5), 0.05)
    colour, alpha = as_float(cropped(frame)[None]), cropped(soft[0].permute(1, 2, 0)).permute(2, 0, 1)[None]
    alpha = blur(alpha, max(1, round(frame.shape[0] / mask.shape[0]))).sub(0.35).div(0.4).clamp(0, 1)
    own = colour
    for radius in (45, 3):
        front = blur(own * alpha, radius) / (blur(alpha, radius) + 1e-5)
        back = blur(colour * (1 - alpha), radius) / (blur(1 - alpha, radius) + 1e-5)
        own = (front + alpha * (colour - alpha * front - (1 - alpha) * back)).clamp(0, 1)
    return as_uint8(own * alpha + (1 - alpha))[0]


def without_foreground(frame, foreground):
    """A frame uint8 (H, W, 3) whose foreground, bool (H, W), shows copies of like surroundings, which overlap. Rejected
    if that is more than 20 % of the picture.

    From coarse to fine: each cell of a grid takes the place of the cell whose 5x5 neighbours look most alike, at about
    the same height (after Wexler et al., 2007); then the hole's pixels come from there, three cells wide.
    """
    if foreground.float().mean() > 0.2:
        raise Rejected(f"{foreground.float().mean():.0%} of the background is never seen")
    hole = grow(foreground, max(4, min(foreground.shape) // 50))[None, None]  # shadows, soft rims
    out = from_surroundings(as_float(frame[None]), ~hole)
    for cells in (40, 80, 160):
        size = max(1, max(hole.shape) // cells)
        grid = [side // size for side in hole.shape[2:]]
        whole = stretched(out, [side * size for side in grid])
        small, gap = F.interpolate(whole, grid, mode="area"), F.adaptive_max_pool2d(hole.float(), grid) > 0
        for _ in range(3):
            source = like_cells(small, gap)
            small = torch.where(gap, copied(small, source, 1), small)
        out = torch.where(hole, stretched(copied(whole, source, size), hole.shape[2:]), out)
    return as_uint8(out)[0]


def like_cells(small, gap):
    """For each pixel of (1, 3, h, w) the index of the one to copy; far from the gap, bool (1, 1, h, w), itself."""
    height, width = gap.shape[2:]
    place = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 1.4, width), indexing="ij")
    seen = torch.cat([F.unfold(F.pad(small, (2, 2, 2, 2), mode="replicate"), 5)[0], torch.stack(place).flatten(1)]).T
    blocked = grow(F.pad(gap, (1, 1, 1, 1), value=True), 2)[0, 0, 1:-1, 1:-1].flatten()
    wanted, known = blocked.nonzero()[:, 0], (~blocked).nonzero()[:, 0]
    source = torch.arange(height * width)
    source[wanted] = known[torch.cat([torch.cdist(x, seen[known]).argmin(1) for x in seen[wanted].split(1024)])]
    return source


def copied(picture, source, size):
    """Cells of `size` pixels of (1, 3, H, W) with a margin of one cell, each taken from place `source` and mixed."""
    patches = F.unfold(picture, 3 * size, padding=size, stride=size)
    window = torch.hann_window(3 * size + 2, periodic=False)[1:-1]
    weight = torch.outer(window, window).flatten().repeat(3)[:, None].expand(-1, patches.shape[2])
    fold = lambda x: F.fold(x, picture.shape[2:], 3 * size, padding=size, stride=size)
    return fold((patches * weight)[..., source]) / fold(weight[None])


def from_surroundings(picture, known):
    """Fill what is not known, bool (1, 1, H, W), with averages over as much around it as it takes: (1, 3, H, W)."""
    if known.all():
        return picture
    mean = lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    weight = mean(known.float())
    coarse = from_surroundings(mean(picture * known) / weight.clamp_min(1e-6), weight > 0)
    return torch.where(known, picture, stretched(coarse, picture.shape[2:]))


def ramp(value, low, high):
    """0 at `low` and beyond, 1 at `high`, straight in between."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


def colours(pixels, ways=8):
    """The colours of pixels (N, 3) in 0..1 as quantiles along some directions of CIELAB (ways, 20): the mean difference
    of two such tables is the (sliced) earth mover's distance of the two sets of colours."""
    directions = F.normalize(torch.randn(3, ways, generator=torch.Generator().manual_seed(0)), dim=0)
    values = 100 * lab(pixels.T[None, :, None])[0, :, 0].T @ directions  # (N, ways)
    return torch.quantile(values[:: max(1, len(values) // 20000)], torch.linspace(0.025, 0.975, 20), dim=0).T


def drift(clip, where):
    """How far the colours within a mask move from one look to the next, CIELAB units: a thing keeps its colours."""
    tables = [colours(frame[:, mask].T) for frame, mask in zip(clip, where) if mask.sum() > 20]
    return sum((a - b).abs().mean().item() for a, b in zip(tables, tables[1:])) / max(len(tables) - 1, 1)


def inked(picture):
    """Where a reference (3, H, W) is not its white ground -> bool (H, W)."""
    return picture.amin(dim=0) < 0.96


def layout(picture, mask, size=32):
    """What a mask bool (H, W) shows of a picture (3, H, W), its box stretched: CIELAB (3, size, size), and the mask."""
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(box_of(mask), mask.shape[::-1] * 2))
    shown = lambda x: stretched(x[None, :, y1:y2, x1:x2], (size, size), antialias=True)
    return 100 * lab(shown(picture))[0], shown(mask[None].float())[0, 0] > 0.5


class Classical:
    def __init__(self, args):
        self.args = args

    def setup(self, stage):
        """Nothing is to be loaded, or missing."""

    preflight = setup

    def score(self, source_path, target_path, row):
        """Of each moment 10 sqrt(SC PQ): EditScore's formula with what can be measured in their places."""
        source, target, _ = look_at_pair(source_path, target_path)
        apart, split = difference(source, target)
        changed = apart > split
        whole = clean(changed, 0.25)
        usual, steady = whole.float().mean(dim=(1, 2)).median().item(), drift(target, whole) - drift(source, whole)
        common = ramp(steady, 12, 1) * exchanged(source, target, whole, row) ** 2
        moment = zip(source, target, apart, changed, whole)
        return [10 * math.sqrt(common * fit(row["kind"], *looks, usual)) for looks in moment]

    def ground(self, source_path, target_path, row):
        """-> box, mask (H, W), index of the frame in which it is best seen, no more columns."""
        source, target, indices = look_at_pair(source_path, target_path)
        masks, subject = body(source, target, row["kind"]), row["kind"] == "subject"
        if "box" in row:
            x1, y1, x2, y2 = (round(v * side) for v, side in zip(row["box"], masks.shape[:0:-1] * 2))
            within = torch.zeros_like(masks)
            within[:, y1:y2, x1:x2] = True
            masks = masks & within
        area = masks.float().mean(dim=(1, 2))
        edges = sum(side.any(1).float() for side in (masks[:, 0], masks[:, -1], masks[..., 0], masks[..., -1]))
        if area.max() < 2e-4:
            raise Rejected("nothing changed" if subject else "nothing stayed: no foreground")
        seen = area * (1 - 0.2 * edges) if subject else -area * (1 - 0.1 * edges) - (area < 2e-4).float()
        best = int(seen.argmax())
        if subject and area[best] > 0.6:
            raise Rejected(f"{area[best]:.0%} of the frame changed: not a local edit")
        if not subject and not 0.005 < area[best] < 0.75:
            raise Rejected(f"{area[best]:.0%} of the frame stayed: no background edit")
        frame, mask = key_frame(target_path, indices[best], CUT_PIXELS), masks[best]
        if subject:
            apart, split = difference(source, target)
            mask = whole_object(frame, mask, apart[best] / split)
        else:
            mask = resized(mask, frame.shape[:2])
            mask = mask | by_colour(frame, mask)
        return box_of(mask), mask, indices[best], {}

    def synthesize(self, source_path, target_path, mask, row):
        """A subject cut out of the key frame, or the key frame without its foreground: uint8 (H, W, 3)."""
        if row["kind"] == "subject":
            return cut_out(frame_at(target_path, row["key"]), mask)
        frame = key_frame(target_path, row["key"], FILL_PIXELS)
        return without_foreground(frame, resized(mask, frame.shape[:2]))

    def verify(self, source_path, target_path, ref_path, row):
        """Does the reference show the edit, upright and whole, and is it there at other moments? (bool, reason)"""
        source, target, indices = look_at_pair(source_path, target_path)
        subject, given = row["kind"] == "subject", "given_ref_image" in row
        picture, place = as_float(read_image(ref_path)[None])[0], body(source, target, row["kind"]) == subject
        if given:
            best = int(place.float().mean(dim=(1, 2)).argmax())
            frame, where = target[best], place[best]
        else:
            frame = as_float(key_frame(target_path, row["key"], CUT_PIXELS)[None])[0]
            mask = resized(read_image(f"{self.args.out}/{row['mask']}")[..., 0] > 127, frame.shape[1:])
            where = mask if subject else ~grow(mask, 9)
        ink = inked(picture) if subject else resized(where, picture.shape[1:])
        seen = [i for i in range(len(indices)) if place[i].any()]
        if not ink.any() or not where.any() or not seen:
            return False, "nothing is shown"
        if wrong := misplaced(picture, ink, frame, where, given):
            return False, wrong
        others = [i for i in seen if indices[i] != row.get("key")] or seen
        wanted = colours(picture[:, ink].T)
        after, before = (colours(torch.cat([clip[i][:, place[i]].T for i in others])) for clip in (target, source))
        near, far = ((wanted - x).abs().mean().item() for x in (after, before))
        limit = 4 * ALIKE if given else min(ALIKE, far)  # another picture of the thing, in another light
        return near < limit, f"colours {near:.0f} from the edit's, {far:.0f} from the source's (CIELAB)"

    def embed(self, images):
        return torch.stack([look_feature(image) for image in images])


def fit(kind, source, target, apart, changed, whole, usual):
    """How strong and how well placed an edit is at one moment, 0..1."""
    area = whole.float().mean().item()
    strength = 1 - math.exp(-(apart[whole].mean().item() if whole.any() else 0.0) / 8)
    if kind == "style":
        edges = torch.stack([luma(x[None]).diff(dim=-1).flatten().abs() for x in (source, target)])
        kept = torch.corrcoef(edges)[0, 1].nan_to_num().item()
        return strength * ramp(area, 0.05, 0.6) * (0.4 + 0.6 * ramp(kept, 0.0, 0.6))
    if kind == "background":
        return strength * ramp(area, 0.05, 0.3) * ramp(1 - area, 0.0, 0.05)
    left = apart[~whole].square().mean().sqrt().item() if not whole.all() else 99.0
    together = (changed & whole).sum().item() / max(changed.sum().item(), 1)  # the rest is scattered about
    stays, size = math.exp(-((left / 14) ** 2)), min(ramp(area, 0.85, 0.5), ramp(area, 0.0, 0.001))
    present = ramp(area, 0.1 * usual, 0.4 * usual) if usual else 0.0
    return strength * min(stays, ramp(together, 0.3, 0.9), size) * present


def exchanged(source, target, whole, row):
    """0.3 where the source has the colour that the words name last and the target lost it, else 1."""
    named = [word for word in re.findall("[a-z]+", row["prompt"][:2000].lower()) if word in COLOURS]
    if not named or row["kind"] not in ("subject", "background") or not whole.any():
        return 1.0
    wanted = 100 * lab(torch.tensor(COLOURS[named[-1]]).view(1, 3, 1, 1) / 255)[0, :, 0, 0]
    apart = [(100 * lab(clip).permute(0, 2, 3, 1)[whole] - wanted).norm(dim=1) for clip in (source, target)]
    before, after = (torch.quantile(x[:: max(1, len(x) // 20000)], 0.25).item() for x in apart)
    return 0.3 if before < 20 and before + 15 < after else 1.0


def misplaced(picture, ink, frame, where, given):
    """What is wrong with a reference (3, h, w), drawn where `ink` is true, if it shows what the mask `where` shows of a
    frame (3, H, W), or None. given: it came with the pair, another picture of the same."""
    (seen, outline), (shown, drawn) = layout(frame, where), layout(picture, ink)
    apart = lambda a, b, both: (a - b).square().sum(0).sqrt()[both].mean().nan_to_num(99.0).item()
    upright, turned = apart(seen, shown, outline & drawn), apart(seen, shown.flip(1), outline & drawn.flip(0))
    same, turned_same = overlap(outline, drawn), overlap(outline, drawn.flip(0))
    fine = luma(F.interpolate(picture[None], (128, 128), mode="area"))
    if given and fine.diff(dim=-1).abs().mean() > 0.7 * fine.std().clamp_min(0.01):
        return "it is noise"
    if turned < 0.7 * upright if given else turned_same > same + 0.1:
        return f"it is upside down (CIELAB {turned:.0f} against {upright:.0f})"
    if not given and (upright > 14 or same < 0.8):
        return f"it is not what stands in its place (CIELAB {upright:.0f}, outline {same:.2f})"
    return None


def look_feature(image):
    """What a reference looks like, (D,) of length 1: its layout in CIELAB, most of its mean taken away."""
    picture = stretched(as_float(image[None]), (64, 64), antialias=True).clamp(0, 1)[0]
    ink = picture.amin(dim=0) < 0.92
    seen, _ = layout(picture, ink if ink.any() else ~ink, 16)
    return F.normalize((seen - 0.75 * seen.mean(dim=(1, 2), keepdim=True)).flatten(), dim=0)
