"""Numbers with their doubt: means with intervals, shares, wins, rank correlations.

Items, not answers, are what varies: repeats are averaged before. Nothing here knows what is measured.
"""

import math
from dataclasses import dataclass

import numpy as np

FEW = 10  # below so many items the values are shown: a bootstrap of 3 covers 73 % where it says 95


@dataclass
class Mean:
    value: float | None
    low: float | None = None
    high: float | None = None
    missing: int = 0
    values: tuple = ()

    def __str__(self):
        missing = f" ({self.missing} missing)" if self.missing else ""
        if self.value is None:
            return f"–{missing}"
        show = lambda *numbers: ", ".join(f"{x:.{3 if abs(self.value) < 1 else 2}f}" for x in numbers)
        spread = f" [{show(self.low, self.high)}]" if self.low is not None else ""
        spread = f" ({show(*self.values)})" if len(self.values) > 1 else spread
        return f"{show(self.value)}{spread}{missing}"


def mean_of(groups, missing=0, allow_missing=True):
    """The mean of the groups' means, with a 95 % bootstrap interval over items within each group.

    groups: lists of one number an item. No value where a group is empty, or where items are missing and averaging over
    failures is not allowed; no interval below 10 items.
    """
    if not groups or not all(groups) or (missing and not allow_missing):
        return Mean(None, missing=missing)
    value = float(np.mean([np.mean(g) for g in groups]))
    if min(map(len, groups)) < FEW:
        return Mean(value, missing=missing, values=tuple(groups[0]) if len(groups) == 1 else ())
    draw = np.random.default_rng(0)
    means = np.mean([np.array(g)[draw.integers(len(g), size=(2000, len(g)))].mean(1) for g in groups], axis=0)
    return Mean(value, *np.quantile(means, [0.025, 0.975]).tolist(), missing)


def share_of(values, z=1.96):
    """The mean of numbers in 0..1, with Wilson's 95 % interval."""
    n = len(values)
    if not n:
        return Mean(None)
    share = sum(values) / n
    middle, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    return Mean(share, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))


def sign_test(wins, losses):
    """Two-sided p of so many wins and losses if both were as likely."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def higher(x):
    """Of each two items the sign of their difference: (n * (n - 1) / 2,)."""
    return np.sign(np.subtract.outer(x, x))[np.triu_indices(len(x), 1)]


def spearman(a, b):
    """Rank correlation with ties; None where one side does not vary or there are fewer than 3 pairs."""
    ra, rb = (np.sign(np.subtract.outer(x, x)).sum(axis=1) for x in (a, b))  # ranks, ties sharing theirs, up to scale
    return None if len(ra) < 3 or ra.std() == 0 or rb.std() == 0 else float(np.corrcoef(ra, rb)[0, 1])


def kendall(a, b):
    """Kendall's tau-b; None as `spearman`."""
    da, db = higher(a), higher(b)
    if len(a) < 3 or not da.any() or not db.any():
        return None
    return float((da * db).sum() / math.sqrt((da != 0).sum() * (db != 0).sum()))


def pairwise(people, ours):
    """Of the pairs of items that people tell apart, the share that `ours` orders as they do; its ties count half."""
    da, db = higher(people), higher(ours)
    return float((1 + da * db)[da != 0].mean() / 2) if da.any() else None


def with_interval(f, a, b):
    """f(a, b) as text, with a 95 % bootstrap interval over items from 10 on."""
    value = f(a, b)
    if value is None or len(a) < FEW:
        return "–" if value is None else f"{value:.2f}"
    draw, a, b = np.random.default_rng(0), np.array(a), np.array(b)
    drawn = [f(a[i], b[i]) for i in draw.integers(len(a), size=(300, len(a)))]
    low, high = np.quantile([d for d in drawn if d is not None], [0.025, 0.975])
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
