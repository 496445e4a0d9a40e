"""From noise to latents along the flow: dx = v dsigma, sigma from 1 to 0, v(x, t) the model's velocity.

    Euler                 x += h v                                   one forward a step: the release's way, the default
    Adams-Bashforth 2     x += h (v + h / (2 h') (v - v'))           second order: as good in 3 of 4 steps
    reuse                 a step whose predicted change is small takes v - x from the last forward (arXiv 2507.02860)
    re-noise              x0 = x - sigma v, noised anew to the next sigma: the sampler of distilled few-step weights

A clip longer than the model knows is a batch of overlapping windows, each encoded and decoded as a clip of its own, as
in training. At each step their velocities are averaged where they overlap (arXiv 2302.08113): all windows walk together
and arrive at the same latents. `Sampler()` with one window is the plain loop.
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

SOLVERS = ("euler", "ab2")
WARM_UP = 3  # forwards before `reuse` may skip


@dataclass(frozen=True)
class FlowMatch:
    """Flow matching: x_t = (1 - sigma) x0 + sigma noise, the model predicts noise - x0, t = 1000 sigma.

    shift moves the schedule towards noise: sigma -> shift sigma / (1 + (shift - 1) sigma). sigma_min is where the
    unshifted schedule would end after its last step; the released diffusers pipeline has 0.003 / 1.002 there, the
    released training and inference 0.
    weighting: of the training loss over t. "bell" is the release's (`training_sigmas`), "none" weighs all alike.
    """

    shift: float = 5.0
    sigma_min: float = 0.0
    weighting: str = "bell"

    def __post_init__(self):
        if self.weighting not in ("bell", "none"):
            raise ValueError(f"FlowMatch.weighting: {self.weighting!r}, expected bell or none")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"FlowMatch.shift: {self.shift}, expected a number above 0")

    def sigmas(self, steps):
        """(steps + 1,) float32, from 1 down to a final 0."""
        sigma = torch.linspace(1, self.sigma_min, steps + 1)[:-1]
        return torch.cat([self.shift * sigma / (1 + (self.shift - 1) * sigma), torch.zeros(1)])

    def timesteps(self, steps):
        """(steps,) float32 in (0, 1000]."""
        return 1000 * self.sigmas(steps)[:-1]

    def training_sigmas(self, t):
        """For timesteps t (B,): sigma (B,) and loss weight (B,) of the nearest of the 1000 training steps.

        The weight is a bell over t around 500, lowered until its smallest value is 0, with a mean of 1. So t = 1000,
        where an edit of few steps makes up its mind, weighs nothing: "none" is for weights that edit in few steps.
        """
        timesteps = self.timesteps(1000).to(t.device)
        bell = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
        weight = (bell - bell.min()) / (bell - bell.min()).mean()
        if self.weighting == "none":
            weight = torch.ones_like(weight)
        nearest = (t.float()[:, None] - timesteps).abs().argmin(dim=1)
        return timesteps[nearest] / 1000, weight[nearest]


@dataclass(frozen=True)
class Sampler:
    """How the steps are taken. `reuse`: the accumulated relative change of v up to which forwards are skipped, 0: none.
    `re_noise`: the timesteps in (0, 1000], falling, of weights that were distilled for them."""

    solver: str = "euler"
    reuse: float = 0.0
    re_noise: tuple[float, ...] = ()

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"Sampler.solver: {self.solver!r}, expected {' or '.join(SOLVERS)}")
        if not 0 <= self.reuse < math.inf:
            raise ValueError(f"Sampler.reuse: {self.reuse}, expected 0 or more, e.g. 0.02")
        t = (1001, *self.re_noise, 0)
        if not all(a > b for a, b in zip(t, t[1:])) or max(self.re_noise, default=0) > 1000:
            raise ValueError(f"Sampler.re_noise: {self.re_noise}, expected falling timesteps, e.g. 1000,757")
        if self.re_noise and (self.reuse or self.solver != "euler"):
            raise ValueError("Sampler.re_noise: it takes neither another solver nor reuse")

    def sigmas(self, flow, steps):
        """(steps + 1,), from 1 down to 0."""
        return torch.tensor([*self.re_noise, 0]) / 1000 if self.re_noise else flow.sigmas(steps)

    def sample(self, velocity, noise, sigmas, stay=None, on_step=None, draw=None, parts=1):
        """velocity(x, t (B,), on_part) -> v like x, float32; noise float32 (B, C, T, H, W) -> latents.

        stay(x, sigma): puts back what must not change after each step (`outside`). on_step(done, total) counts the
        parts (windows) of all steps. draw(): fresh noise for `re_noise`.
        """
        x, timesteps, steps = noise, (1000 * sigmas).to(noise.device), sigmas.diff().tolist()
        before, cache, tell = None, Reuse(self.reuse), on_step or (lambda done, total: None)
        for i, step in enumerate(steps):
            v = cache.guess(x) if i + 1 < len(steps) else None
            if v is None:
                v = velocity(x, timesteps[i].expand(len(x)), lambda n: tell(parts * i + n, parts * len(steps)))
                cache.learn(x, v)
            if self.re_noise:
                x = x - sigmas[i].item() * v
                if i + 1 < len(steps):
                    x = torch.lerp(x, draw(), sigmas[i + 1].item())
            elif self.solver == "ab2" and i:
                x = x + step * (v + step / (2 * steps[i - 1]) * (v - before))
            else:
                x = x + step * v
            before, x = v, stay(x, sigmas[i + 1].item()) if stay else x
            tell(parts * (i + 1), parts * len(steps))
        return x


class Reuse:
    """EasyCache (arXiv 2507.02860): while x moves little, v - x of the last forward stands for that of the next.

    The last two forwards say by how much v changes where x changes by one; of each skipped step the change so
    predicted, relative to v, is added up, and a forward is due when the sum reaches the limit."""

    def __init__(self, limit):
        self.limit, self.forwards, self.sum, self.rate = limit, 0, 0.0, 0.0

    def learn(self, x, v):
        if not self.limit:
            return
        if self.forwards:
            self.rate = float((v - self.v).norm() / (x - self.x).norm())
        self.forwards, self.sum, self.x, self.v, self.before = self.forwards + 1, 0.0, x, v, x

    def guess(self, x):
        """v at x, or None where the model must be asked."""
        if not self.limit or self.forwards < WARM_UP:
            return None
        self.sum += self.rate * float((x - self.before).norm() / self.v.norm())
        self.before = x
        return self.v + (x - self.x) if self.sum < self.limit else None


def windows(frames, length, overlap=None):
    """Latent frames -> spans [(start, stop)] of `length` that cover them, evenly spread, each sharing at least
    `overlap` with the next: a quarter, and the one of a window's first frame. One span where they fit."""
    if frames <= length:
        return [(0, frames)]
    overlap = min(max(length // 4, 1) + 1, length - 1) if overlap is None else overlap
    count = math.ceil((frames - overlap) / (length - overlap))
    starts = [round(i * (frames - length) / (count - 1)) for i in range(count)]
    return [(start, start + length) for start in starts]


def in_windows(x, spans):
    """Latents (1, C, T, h, w) -> (windows, C, t, h, w)."""
    return torch.cat([x[:, :, start:stop] for start, stop in spans])


def agreed(x, spans):
    """Velocities (windows, C, t, h, w), averaged where windows overlap, most from where a window sees most neighbours.

    A later window's first latent stands for one frame, the same place in another for several: it stays its own."""
    stop, length = spans[-1][1], x.shape[2]
    place = torch.arange(length, device=x.device)
    ramp = torch.minimum(place + 1, length - place).to(x.dtype).view(-1, 1, 1)
    total, weights = x.new_zeros(x.shape[1], stop, *x.shape[3:]), x.new_zeros(stop, 1, 1)
    shared = [slice(start + (start > 0), stop) for start, stop in spans]
    for row, part in zip(x, shared):
        count = part.stop - part.start
        total[:, part] += (ramp * row)[:, -count:]
        weights[part] += ramp[-count:]
    mean = total / weights
    return torch.stack([torch.cat([row[:, : length - (p.stop - p.start)], mean[:, p]], 1) for row, p in zip(x, shared)])


def filled(frames, length):
    """Frames, then the last again, until there are `length`."""
    last = None
    for last in frames:
        yield last
    for _ in range(length - len(frames)):
        yield last


def window_frames(frames, spans, stride):
    """Frames -> the stack of each window. A latent frame is `stride` frames, a window's first the last one of them."""
    held, start, frames = [], 0, iter(frames)
    for a, b in spans:
        first, stop = stride * a, stride * (b - 1) + 1
        held += islice(frames, stop - start - len(held))
        held, start = held[first - start :], first
        yield torch.stack(held)


def crossfaded(clips, spans, stride):
    """The windows' frames -> those of the whole, one by one, blended where windows overlap."""
    tail = []
    for clip, (start, _), following in zip(clips, spans, [*spans[1:], None]):
        for i, old in enumerate(tail):
            clip[i] = torch.lerp(old.float(), clip[i].float(), (i + 1) / (len(tail) + 1)).round().to(torch.uint8)
        own = len(clip) if following is None else stride * (following[0] - start)
        yield from clip[:own]
        tail = clip[own:]


def mask_latents(mask, vae):
    """A mask of a window, (T, H, W) or (T, H, W, 3) -> (1, t, h, w), true where any pixel of a latent may change."""
    places = F.max_pool2d(white(mask).float(), vae.space_stride)
    later = places[1:].unflatten(0, (-1, vae.time_stride)).amax(1)
    return torch.cat([places[:1], later])[None] > 0


def white(mask):
    """A mask, uint8 or bool (..., H, W) or (..., H, W, 3) -> bool (..., H, W)."""
    light = mask.float().mean(-1) if mask.shape[-1] == 3 else mask.float()
    return light > (0 if mask.dtype == torch.bool else 127)


def outside(changes, source, noise):
    """-> stay(x, sigma): outside of `changes` the source's latents at this noise level."""
    return lambda x, sigma: torch.where(changes, x, torch.lerp(source, noise, sigma))


def pasted(edit, source, mask, feather=4):
    """A frame (H, W, 3) of the edit where its mask is white, of the source from 2 * `feather` pixels beyond it."""
    size = 2 * feather + 1
    share = F.max_pool2d(white(mask).float()[None, None], size, 1, feather)
    share = F.avg_pool2d(share, size, 1, feather, count_include_pad=False)[0, 0, :, :, None]
    return torch.lerp(source.float(), edit.float(), share).round().to(torch.uint8)
