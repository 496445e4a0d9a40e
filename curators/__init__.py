"""What curation reads (pairs), asks and leaves (result). `classical` models need no weights, `paper` has those that the
paper names: a plain twin and a heavy one with the same methods, each about one record:

    score(source, target, row) -> [0..10, ...]           ground(source, target, row) -> box, mask (H, W), key, more
    synthesize(source, target, mask, row) -> picture     verify(source, target, reference, row) -> agree, reason
    embed([picture, ...]) -> (N, D) of length 1          preflight(): is everything there? setup(stage): load it
"""

import math
from functools import lru_cache
from itertools import islice

from media import MediaError, decode, measure, open_media

KINDS = ("subject", "background")  # of edits that a reference can guide; the others: style, remove, other, unknown


class Rejected(Exception):
    """The record is whole and not good enough; the text says why. found: columns that are known by then."""

    def __init__(self, reason, found=None):
        super().__init__(reason)
        self.found = found or {}


def ended(stage, status, reason):
    """The columns of a record that ends in a stage."""
    reason = " ".join(str(reason).split()) or type(reason).__name__
    return {"status": status, "stage": stage, "reason": reason[:300]}


def frame_at(path, index):
    """Frame `index` of a clip or picture, uint8 (H, W, 3), at its own size. MediaError."""
    with open_media(path) as (container, stream):
        for _, rgb in islice(decode(path, container, stream), index, None):
            return rgb
    raise MediaError(f"{path}: has no frame {index}")


counted = lru_cache(maxsize=4096)(lambda path: measure(path)[0])


def moments(source, target):
    """How many frames two clips have in common. MediaError if their lengths differ by more than a cut to 4k + 1."""
    before, after = counted(source), counted(target)
    if abs(before - after) > 0.1 * after + 2:
        raise MediaError(f"{target}: has {after} frames, its source {before}: not the same moments")
    return min(before, after)


def box_of(mask):
    """[x1, y1, x2, y2] of a mask (H, W), shares of width and height."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    (height, width), (y1, y2), (x1, x2) = mask.shape, rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
    return [x1 / width, y1 / height, (x2 + 1) / width, (y2 + 1) / height]


def around(picture, box, margin=0.1):
    """The part of a picture (H, W, C) around a box [x1, y1, x2, y2] in 0..1."""
    height, width = picture.shape[:2]
    x, y = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    left, top = max(int((box[0] - x) * width), 0), max(int((box[1] - y) * height), 0)
    return picture[top : math.ceil((box[3] + y) * height), left : math.ceil((box[2] + x) * width)].contiguous()
