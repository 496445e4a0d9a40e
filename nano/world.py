"""The world that nano learns editing in: named sprites and photographs, scenes of them, and edits whose truth is known.

    Library (sprites by name, photographs)
      -> Scene: a background under a moving camera, things on their paths
      -> Edit: the scene before and after one change, its instruction, perhaps a reference picture
      -> frames uint8 (T, H, W, 3) before and after, and the edited region bool (T, H, W)

Drawn with torch at twice the size and averaged: camera motion, soft shadows, occlusion. (seed, split, index) decide an
edit, so the order in which random numbers are taken is part of the world. Objects, photographs and wordings of the test
split never occur in training, except that a text can only ask for a thing whose name training has heard, or for a new
pair of a known colour and a known shape. Training alone sees recoloured photographs and things, and heaps of leaves as
places: nano learned fifteen plain photographs by heart.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

LOCAL = ("change", "remove", "add")  # the hard ones: twice as many of each
TASKS = {
    "image": ("style", "background", *LOCAL, *LOCAL),
    "video": ("style", "background", *LOCAL, *LOCAL),
    "ref_video": ("subject", "background_ref", "subject", "subject_add"),
}
MIXTURE = ("image", "video", "ref_video", "image")  # as the paper's third stage: 2:1:1
WORDINGS = json.loads(Path(__file__).with_name("wordings.json").read_text())
COLOURS, PLACES = WORDINGS["colours"], WORDINGS["places"]  # of a name its rgb in [0, 1]; its x, y from the middle
SPRITE = 128  # pixels a side of a stored sprite
TEST_SHARE = 6  # one name in six is held out
SHADOW = 0.35


@dataclass
class Sprite:
    name: str
    look: str  # which artist drew it: one name has several looks
    levels: list  # premultiplied RGBA (4, n, n) float in [0, 1], n = 128, 64, 32, 16: no warp has to skip pixels


@dataclass
class Photo:
    name: str  # what an instruction calls it, e.g. "a forest"
    image: torch.Tensor  # (3, H, W) float in [0, 1]
    panorama: bool = False  # equirectangular, or flat and repeated without end


@dataclass
class Thing:
    sprite: Sprite
    path: torch.Tensor  # (T, 4): x, y in frame widths from the middle, size in frame widths, angle
    flip: bool = False


@dataclass
class Scene:
    photo: Photo
    view: tuple  # where the camera starts: (yaw, pitch, field of view) or (x, y, scale), and whether it is mirrored
    camera: torch.Tensor  # (T, 3): x, y in frame widths, and zoom
    things: list


@dataclass
class Edit:
    kind: str  # the CSV it goes to
    task: str
    prompt: str  # an entry of wordings.json, its blanks filled
    source: Scene
    target: Scene
    style: str | None = None  # a key of STYLES: the target is the source, restyled
    ref: torch.Tensor | None = None  # (3, n, n)
    changed: tuple = ()  # indices of the things that differ in (source, target), None where there is none
    new: Sprite | None = None  # what a change or addition brings


def of_split(names, split):
    """The names of a split. Held out is one in TEST_SHARE, by the order of their hashes: the same on every machine."""
    ranked = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    held = len(ranked) // TEST_SHARE
    return sorted(ranked[:held] if split == "test" else ranked[held:])


def in_colour(name):
    """Whether a name says a colour, as those of all shapes do and those of a few emoji ("green book")."""
    return name.split()[0] in COLOURS


@dataclass
class Library:
    sprites: dict  # name -> [Sprite], the first is the look that its name alone calls for
    photos: list

    def names(self, split):
        return of_split(self.sprites, split)

    def photos_of(self, split):
        """The split's photographs, and apart from them its textures: (panoramas, flat ones)."""
        groups = [[p for p in self.photos if p.panorama == panorama] for panorama in (True, False)]
        names = [of_split([p.name for p in group], split) for group in groups]
        return [[p for p in group if p.name in some] for group, some in zip(groups, names)]

    def nameable(self, split):
        """What a text may call for: the split's coloured shapes, and common things that training has heard of."""
        shapes = [name for name in self.names(split) if in_colour(name) and len(self.sprites[name]) == 2]
        known = self.names("train")
        return shapes, [name for name in WORDINGS["common"] if name in known]


def pyramid(image):
    """A sprite and its halves."""
    levels = [image]
    while levels[-1].shape[-1] > 16:
        levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
    return levels


def pixel_grid(size):
    """Rows and columns (size, size) of a square's pixels, their middles, in (0, 1)."""
    axis = (torch.arange(size) + 0.5) / size
    return torch.meshgrid(axis, axis, indexing="ij")


def shape_distances(x, y):
    """Signed distances (negative inside) of some plane shapes about the origin, on a grid in [-1, 1]."""
    radius, angle = (x * x + y * y).sqrt(), torch.atan2(x, -y)

    def polygon(corners):
        sector = 2 * math.pi / corners
        return radius * (torch.remainder(angle + sector / 2, sector) - sector / 2).cos() - 0.8 * math.cos(sector / 2)

    points = torch.remainder(angle, 2 * math.pi / 5) - math.pi / 5
    heart_x, heart_y, low, high = x.abs() / 0.75, -y / 0.75, torch.minimum, torch.maximum
    return {
        "circle": radius - 0.8, "square": high(x.abs(), y.abs()) - 0.68, "triangle": polygon(3) + 0.02,
        "diamond": x.abs() + y.abs() - 0.9, "hexagon": polygon(6),
        "star": radius * (points.cos() + 0.75 * points.abs().sin() * -1 + 0.75 * math.sin(math.pi / 5)) - 0.62,
        "ring": (radius - 0.6).abs() - 0.22, "bar": high(x.abs() - 0.85, y.abs() - 0.3),
        "cross": low(high(x.abs() - 0.25, y.abs() - 0.8), high(y.abs() - 0.25, x.abs() - 0.8)),
        "heart": ((heart_x**2 + heart_y**2 - 1) ** 3 - heart_x**2 * heart_y**3) * 0.4,
        "moon": high(radius - 0.8, 0.62 - ((x - 0.38) ** 2 + (y + 0.1) ** 2).sqrt()),
        "arrow": low(high(x - 0.1, y.abs() - 0.22).maximum(-0.8 - x), high(x + y.abs() * 1.1 - 0.85, -0.05 - x)),
    }  # fmt: skip


def draw_shapes():
    """Twelve shapes in twelve colours, each in two looks: sprites that need no asset and whose names compose."""
    y, x = (2 * place - 1 for place in pixel_grid(2 * SPRITE))
    sprites = {}
    for shape, distance in shape_distances(x, y).items():
        alpha = (0.5 - distance * SPRITE).clamp(0, 1)
        rim = (0.5 - (distance + 0.09) * SPRITE).clamp(0, 1)
        for colour, rgb in COLOURS.items():
            name, rgb = f"{colour} {shape}", torch.tensor(rgb).view(3, 1, 1)
            shaded = rgb * (0.95 - 0.3 * y) + 0.25 * (-((x + 0.3) ** 2 + (y + 0.35) ** 2) * 8).exp()
            striped = rgb * rim + (1 - rim) * (0.25 + 0.5 * (1 - rgb)) - 0.2 * ((x + y) * 14).sin().gt(0.3) * rim
            layers = (torch.cat([body.clamp(0, 1) * alpha, alpha[None]]) for body in (shaded, striped))
            sprites[name] = [Sprite(name, look, pyramid(x)[1:]) for look, x in zip(("shaded", "striped"), layers)]
    return sprites


def draw_textures(count=48, size=256):
    """Seamless cloudy textures in three colours each, as backgrounds that need no asset."""
    frequency = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size)[None].square()
    photos = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        colours = torch.rand(3, 3, generator=g)
        colours = 0.15 + 0.7 * colours.lerp(colours.mean(dim=1, keepdim=True), 0.45)  # no louder than photographs
        first, second, third = colours.view(3, 3, 1, 1)
        spectrum = torch.fft.rfft2(torch.randn(2, size, size, generator=g))
        steep = 1.8 + torch.rand(1, generator=g).item()
        clouds = torch.fft.irfft2(spectrum / (frequency + 4 / size**2) ** (steep / 2), s=(size, size))
        a, b = (clouds / clouds.std(dim=(1, 2), keepdim=True)).mul(1.2).sigmoid()[:, None]
        image = (first * a + second * (1 - a)) * (0.4 + 0.6 * b) + third * 0.4 * (1 - b)
        photos.append(Photo(f"texture {i}", image.clamp(0, 1)))
    return photos


@lru_cache(maxsize=1)  # a worker draws many clips
def load_library(folder=None):
    """Shapes and textures and, if `folder` has them, emoji and photographs. FileNotFoundError before `nano assets`."""
    path = Path(folder or "", "index.json")
    if folder and not path.is_file():
        raise FileNotFoundError(f"{path} is missing: fill the folder with `python -m nano assets {folder}`")
    library = Library(draw_shapes(), draw_textures())
    if not folder:
        return library
    index, images = json.loads(path.read_text()), load_file(path.with_name("assets.safetensors"))
    for entry, image in zip(index["sprites"], images["sprites"]):
        sprite = Sprite(entry["name"], entry["look"], pyramid(image.float() / 255))
        library.sprites.setdefault(sprite.name, []).append(sprite)
    panoramas = [Photo(e["name"], image.float() / 255, True) for e, image in zip(index["photos"], images["photos"])]
    library.photos = panoramas + library.photos[: len(panoramas)]
    return library


def pick(rng, options):
    return options[rng.integers(len(options))]


def recoloured(rng, thing):
    """A photograph or a sprite whose colours are turned about the grey axis, more or less of them, and exposed anew."""
    turn, much, light = rng.normal(0, 0.8), rng.uniform(0.4, 1.3), rng.uniform(0.6, 1.25)
    grey, cross = torch.full((3, 3), 1 / 3), torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    turned = math.cos(turn) * (torch.eye(3) - grey) + math.sin(turn) / 3**0.5 * cross
    matrix = light * (grey + much * turned)

    def recolour(image):  # premultiplied, if there is alpha: linear all the same
        colours, alpha = torch.einsum("ij,jhw->ihw", matrix, image[:3]), image[3:]
        return torch.cat([torch.minimum(colours.relu(), alpha), alpha]) if len(alpha) else colours.clamp(0, 1)

    if isinstance(thing, Photo):
        return replace(thing, image=recolour(thing.image))
    return replace(thing, look=f"{thing.look}, recoloured", levels=[recolour(level) for level in thing.levels])


def draw_leaves(rng, skins, size=128):
    """A seamless heap of discs and blocks of many sizes, each hiding what lies below it, as a place for training.

    Radii have a density of r^-3, which gives the heap the scale invariance of photographs: the dead leaves model
    (Lee, Mumford and Huang 2001, Occlusion Models for Natural Images). `skins`: photographs whose grain leaves wear.
    """
    y, x = pixel_grid(size)
    palette = rng.uniform(0.1, 0.9, (5, 3)).astype("float32")
    palette = torch.from_numpy(palette.mean(axis=1, keepdims=True) * 0.5 + palette * 0.5)[..., None, None]
    grain = F.interpolate(pick(rng, skins).image[None], (size, size), mode="bilinear", antialias=True)[0]
    grain = grain - grain.mean(dim=(1, 2), keepdim=True)
    smallest, largest, upright = rng.uniform(0.03, 0.12), 0.32, rng.random() < 0.5
    covered = 2 * math.pi * smallest**2 * math.log(largest / smallest)  # by one leaf, on average
    image = palette[0] + grain
    for _ in range(int(3 / covered)):
        middle_x, middle_y, tone = rng.random(3).tolist()
        radius = min(largest, smallest * (1 - rng.random()) ** -0.5)
        angle, flatness = 0.0 if upright else rng.uniform(0, math.pi), rng.uniform(1, 2.5)
        cos, sin = math.cos(angle), math.sin(angle)
        dx, dy = (x - middle_x + 0.5) % 1 - 0.5, (y - middle_y + 0.5) % 1 - 0.5
        u, v = cos * dx + sin * dy, flatness * (cos * dy - sin * dx)
        distance = torch.hypot(u, v) if rng.random() < 0.5 else torch.maximum(u.abs(), v.abs())
        alpha = ((radius - distance) * size + 0.5).clamp(0, 1)
        colour = palette[int(tone * 5)] + rng.normal(0, 0.06)
        image = image + alpha * (colour + 0.15 * v / radius + rng.uniform(0, 1) * grain - image)
    return Photo("texture of leaves", image.clamp(0, 1))


def wave(phase, soft):
    return ((2 * math.pi * phase).sin() * soft / 4).clamp(-0.5, 0.5) + 0.5


PATTERNS = {  # words of two named colours, and the share of the second on a grid; soft: how wide an edge is
    "a plain {a} wall": lambda x, y, soft: torch.zeros_like(x),
    "{a} and {b} stripes": lambda x, y, soft: wave(4 * x, soft),
    "a checkerboard of {a} and {b}": lambda x, y, soft: (wave(2 * x, soft) - wave(2 * y, soft)).abs(),
    "{b} dots on {a}": lambda x, y, soft: ((4 * x % 1 - 0.5) ** 2 + (4 * y % 1 - 0.5) ** 2).sqrt().sub(0.3)
    .mul(-soft / 2).clamp(-0.5, 0.5) + 0.5,
    "a smooth gradient from {a} to {b}": lambda x, y, soft: (1 - (2 * math.pi * y).cos()) / 2,
}  # fmt: skip


def pattern_photo(rng, split, size=128):
    """A seamless pattern whose words belong to the split: a background that words alone describe to the pixel."""
    while True:
        words = pick(rng, list(PATTERNS))
        first, second = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        name = words.format(a=first, b=second)
        held_out = hashlib.sha256(name.encode()).digest()[0] % TEST_SHARE == 0
        if "plain" in words or held_out == (split == "test"):
            break
    y, x = pixel_grid(size)
    a, b = (torch.tensor(COLOURS[colour]).view(3, 1, 1) for colour in (first, second))
    share = PATTERNS[words](x, y, size / 8)
    return Photo(name, a * (1 - share) + b * share)


def smooth_path(rng, frames, amount):
    """(T,) a drift, a swing or no motion at all, of about `amount`."""
    time = torch.linspace(0, 1, frames)
    kind, size = rng.random(), rng.uniform(-amount, amount)
    if kind < 0.3:
        return torch.zeros(frames)
    if kind < 0.7:
        return size * (time - 0.5)
    return size / 2 * (2 * math.pi * (rng.uniform(0.5, 1.2) * time + rng.random())).sin()


def draw_camera(rng, frames):
    """A camera at rest, or one that pans, zooms or shakes. A still's rests: one frame does not show where it goes."""
    kind = rng.random() * (frames > 1)
    x, y, zoom = torch.zeros(frames), torch.zeros(frames), torch.ones(frames)
    time = torch.linspace(0, 1, frames)
    if 0.25 < kind < 0.6:
        x, y = rng.uniform(-0.25, 0.25) * (time - 0.5), rng.uniform(-0.1, 0.1) * (time - 0.5)
    elif 0.6 <= kind < 0.8:
        zoom = 1 + rng.uniform(0.1, 0.35) * (time if rng.random() < 0.5 else 1 - time)
    elif kind >= 0.8:
        x, y = (torch.from_numpy(rng.normal(0, 0.008, frames).cumsum().astype("float32")) for _ in "xy")
    return torch.stack([x, y, zoom], dim=1)


def draw_view(rng, photo, split):
    if not photo.panorama:
        ranges = (0, 1), (0, 1), (0.5, 0.8)
    elif split == "test":
        ranges = (-180, 180), (-8, 6), (65, 85)
    else:  # training looks up and down too: fifteen panoramas have few views straight ahead
        ranges = (-180, 180), (-30, 25), (50, 95)
    return *(rng.uniform(*limits) for limits in ranges), bool(rng.integers(2))


def draw_things(rng, sprites, frames):
    """Things apart from one another, larger ones where there are fewer."""
    slots = [(-0.25, 0.05), (0.25, 0.05), (0.0, 0.2), (0.0, -0.22)]
    order = rng.permutation(2 if len(sprites) < 3 else 4)
    things = []
    for sprite, slot in zip(sprites, order):
        x, y = slots[slot] if len(sprites) > 1 else (rng.uniform(-0.22, 0.22), rng.uniform(-0.1, 0.2))
        x, y = x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.06, 0.06)
        size = rng.uniform(0.34, 0.5) * (1.15 if len(sprites) == 1 else 1.0)
        path = [
            (x + smooth_path(rng, frames, 0.22)).clamp(-0.33, 0.33),
            (y + smooth_path(rng, frames, 0.12)).clamp(-0.33, 0.33),
            size * (1 + smooth_path(rng, frames, 0.25)),
            rng.uniform(-0.15, 0.15) + smooth_path(rng, frames, 0.5),
        ]
        things.append(Thing(sprite, torch.stack(path, dim=1), bool(rng.integers(2))))
    return things


def render_background(scene, size):
    """(T, 3, size, size): the photograph as the camera sees it."""
    x, y, zoom = (v.view(-1, 1, 1) for v in scene.camera.unbind(dim=1))
    row, column = (place - 0.5 for place in pixel_grid(size))
    u, v = column / zoom + x, row / zoom + y  # (T, size, size), in frame widths
    first, second, extent, mirrored = scene.view
    u = -u if mirrored else u
    image = scene.photo.image[None]
    height, width = image.shape[2:]
    if scene.photo.panorama:
        yaw, pitch, focal = math.radians(first), math.radians(second), 0.5 / math.tan(math.radians(extent) / 2)
        forward, up = focal * math.cos(pitch) + v * math.sin(pitch), focal * math.sin(pitch) - v * math.cos(pitch)
        longitude = torch.atan2(u, forward) + yaw
        latitude = torch.atan2(up, (u * u + forward * forward).sqrt())
        column, row = longitude / (2 * math.pi) % 1, 0.5 - latitude / math.pi
        image = F.pad(F.pad(image, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1), mode="replicate")
    else:
        column, row = (u * extent + first) % 1, (v * extent + second) % 1
        image = F.pad(image, (1, 1, 1, 1), mode="circular")
    grid = torch.stack([(column * width + 1) / (width + 2), (row * height + 1) / (height + 2)], dim=-1) * 2 - 1
    return F.grid_sample(image.expand(len(grid), -1, -1, -1), grid, align_corners=False, padding_mode="border")


def render_thing(thing, camera, size, shadow=False):
    """A sprite on its path as the camera sees it, premultiplied (T, 4, size, size); or its shadow's alpha."""
    x, y, extent, angle = thing.path.unbind(dim=1)
    zoom = camera[:, 2]
    x, y, extent = (x - camera[:, 0]) * zoom, (y - camera[:, 1]) * zoom, extent * zoom
    if shadow:
        x, y, extent = x + 0.06 * extent, y + 0.1 * extent, extent * 1.06
    levels = thing.sprite.levels
    fine = [level for level in levels if level.shape[-1] >= float(extent.max()) * size] or levels[:1]
    image = levels[-1][3:] if shadow else fine[-1]
    row, column = (place - 0.5 for place in pixel_grid(size))
    dx, dy = column - x.view(-1, 1, 1), row - y.view(-1, 1, 1)
    cos, sin = (angle.cos() / extent).view(-1, 1, 1), (angle.sin() / extent).view(-1, 1, 1)
    u, v = 2 * (cos * dx + sin * dy), 2 * (cos * dy - sin * dx)
    grid = torch.stack([-u if thing.flip else u, v], dim=-1)
    return F.grid_sample(image.expand(len(grid), -1, -1, -1), grid, align_corners=False)


def render(scene, size):
    """A scene's frames (T, 3, size, size) and, of each thing, the share of a pixel that it or its shadow changes
    and the share that is visible, each (T, 1, size, size). Drawn at twice the size and averaged."""
    frames = render_background(scene, 2 * size)
    touched, visible = [], []
    for thing in scene.things:
        shade = SHADOW * render_thing(thing, scene.camera, 2 * size, shadow=True)
        layer = render_thing(thing, scene.camera, 2 * size)
        alpha = layer[:, 3:]
        frames = frames * (1 - shade) * (1 - alpha) + layer[:, :3]
        touched = [t * (1 - alpha) for t in touched] + [1 - (1 - shade) * (1 - alpha)]
        visible = [v * (1 - alpha) for v in visible] + [alpha]
    return F.avg_pool2d(frames, 2), [F.avg_pool2d(t, 2) for t in touched], [F.avg_pool2d(v, 2) for v in visible]


def grey(x):
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)


def blurred(x):
    for _ in range(3):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x


def edges(x):
    g = F.pad(grey(x), (1, 1, 1, 1), mode="replicate")
    return ((g[..., 1:-1, 2:] - g[..., 1:-1, :-2]).abs() + (g[..., 2:, 1:-1] - g[..., :-2, 1:-1]).abs()).clamp(0, 1)


def tinted(x, *rgb):
    return x * x.new_tensor(rgb).view(3, 1, 1)


STYLES = {
    "night": lambda x: tinted(x**1.3, 0.28, 0.34, 0.62),
    "a black and white film": lambda x: ((grey(x) - 0.5) * 1.15 + 0.5).expand_as(x),
    "an old sepia photograph": lambda x: tinted(grey(x).expand_as(x), 1.05, 0.85, 0.62),
    "sunset": lambda x: tinted(x, 1.15, 0.72, 0.5) + x.new_tensor([0.1, 0.03, 0.0]).view(3, 1, 1),
    "winter": lambda x: tinted(0.45 * x + 0.55 * grey(x), 0.85, 0.95, 1.1) * 0.7 + 0.3,
    "a pencil sketch": lambda x: (0.97 - 2.5 * edges(x)).expand_as(x),
    "pixel art": lambda x: F.interpolate(F.avg_pool2d(x, x.shape[-1] // 16), x.shape[2:], mode="nearest"),
    "a comic book": lambda x: (blurred(x) * 3.999).floor() / 3 * (1 - 1.6 * edges(x)).clamp(0.1, 1),
    "a photographic negative": lambda x: 1 - x,
    "a misty morning": lambda x: 0.42 * blurred(x) + 0.5,
    "an infrared camera": lambda x: tinted(grey(x), 1.6, 0, 0) + tinted((grey(x) * 2 - 0.6).clamp(0, 1), 0, 0.9, 0)
    + tinted(1 - grey(x), 0, 0, 0.8),
    "a neon sign": lambda x: 0.15 * tinted(x, 0.6, 0.3, 1) + 2.2 * tinted(edges(x), 0.3, 1, 0.95),
}  # fmt: skip


def article(name):
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return f"{'some' if plural else 'an' if name[0] in 'aeio' else 'a'} {name}"


def show_reference(rng, thing, size):
    """A picture (3, size, size) of a thing in another pose: turned, of another size, on white or a pale tone. Not
    mirrored: that would leave open which side is meant."""
    pose = [*rng.uniform(-0.06, 0.06, 2), rng.uniform(0.6, 0.9), rng.uniform(-0.4, 0.4)]
    path = torch.tensor([pose], dtype=torch.float32)
    layer = render_thing(replace(thing, path=path), torch.tensor([[0.0, 0.0, 1.0]]), size)[0]
    paper = np.ones(3) if rng.random() < 0.6 else rng.uniform(0.6, 1, 3)
    return torch.tensor(paper, dtype=torch.float32).view(3, 1, 1) * (1 - layer[3:]) + layer[:3]


def stands_out(things, which):
    """Where one thing is, seen from the others on the first frame: "on the left" of all, ..., or in the middle."""
    places = torch.stack([thing.path[0, :2] for thing in things])
    ahead = places[which] - torch.cat([places[:which], places[which + 1 :]])
    right, below = ahead.unbind(dim=1)
    sides = {"on the left": -right, "on the right": right, "at the top": -below, "at the bottom": below}
    side = max(sides, key=lambda side: sides[side].min())
    return side if sides[side].min() > 0.05 else "in the middle"


@dataclass
class Artist:
    """Draws an edit's parts from the library, with the dice of one clip."""

    rng: np.random.Generator
    library: Library
    split: str
    size: int

    def photo(self, but=""):
        panoramas, textures = self.library.photos_of(self.split)
        training = self.split == "train"
        if training and self.rng.random() < 0.25:
            return draw_leaves(self.rng, textures)
        photos = panoramas if panoramas and self.rng.random() < 0.7 else textures
        photo = pick(self.rng, [p for p in photos if p.name != but])
        return recoloured(self.rng, photo) if training and self.rng.random() < 0.6 else photo

    def sprite(self, name):
        """A look of a name; in training sometimes one that nobody drew. A name that says a colour keeps it."""
        sprite = pick(self.rng, self.library.sprites[name])
        strange = self.split == "train" and not in_colour(name) and self.rng.random() < 0.4
        return recoloured(self.rng, sprite) if strange else sprite

    def scene(self, frames):
        names = self.library.names(self.split)
        emoji = [name for name in names if not in_colour(name)] or names
        count, chosen = self.rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]), []
        while len(chosen) < count:
            name = pick(self.rng, emoji if self.rng.random() < 0.75 else names)
            if name not in chosen:
                chosen.append(name)
        things = draw_things(self.rng, [self.sprite(name) for name in chosen], frames)
        photo = self.photo()
        return Scene(photo, draw_view(self.rng, photo, self.split), draw_camera(self.rng, frames), things)

    def new_thing(self, edit, path):
        """Something that is nowhere in the scene, on a path -> the thing, and what the instruction calls it."""
        present = [thing.sprite.name for thing in edit.source.things]
        if edit.task.startswith("subject"):  # the picture tells: any thing in any look, on either side
            name = pick(self.rng, [name for name in self.library.names(self.split) if name not in present])
            edit.new = self.sprite(name)
            return Thing(edit.new, path, bool(self.rng.integers(2))), name
        shapes, common = self.library.nameable(self.split)
        while edit.new is None or edit.new.name in present:
            names = common if common and self.rng.random() < 0.6 else shapes
            edit.new = self.library.sprites[pick(self.rng, names)][0]
        return Thing(edit.new, path), article(edit.new.name)

    # Each changes the target and returns the words for the blanks of the instruction.

    def restyle(self, edit):
        edit.style = pick(self.rng, list(STYLES))
        return {"s": edit.style}

    def move(self, edit):
        """To a pattern that words describe, or to a photograph, another view of which is the reference."""
        if edit.task == "background":
            edit.target = replace(edit.source, photo=pattern_photo(self.rng, self.split), view=(0.0, 0.0, 0.7, False))
        else:
            photo = self.photo(but=edit.source.photo.name)
            edit.target = replace(edit.source, photo=photo, view=draw_view(self.rng, photo, self.split))
            pose = [[*self.rng.uniform(-0.08, 0.08, 2), self.rng.uniform(0.85, 1.0)]]
            camera = edit.source.camera[:1] * torch.tensor([1, 1, 0]) + torch.tensor(pose, dtype=torch.float32)
            edit.ref = render_background(replace(edit.target, camera=camera), 2 * self.size)[0]
        return {"p": edit.target.photo.name}

    def add(self, edit):
        """At a place with a name, which others leave free."""
        scene, place = edit.source, pick(self.rng, list(PLACES))
        path = torch.tensor([*PLACES[place], 0.4, 0.0]).repeat(len(scene.camera), 1)
        thing, name = self.new_thing(edit, path)
        others = [t for t in scene.things if ((t.path[:, :2] - path[:, :2]).norm(dim=1) > 0.3).all()]
        edit.source, edit.target = replace(scene, things=others), replace(scene, things=[*others, thing])
        edit.changed = (None, len(others))
        return {"w": place, "b": name}

    def change(self, edit):
        """Remove one of the things, or put a new one on its path, which starts upright and turns as the old one does:
        one look does not show how askew an old thing is. The words say which of several: always in the test split,
        whose names training never heard, and three times in four in training, so that names count."""
        things = list(edit.source.things)
        which = int(self.rng.integers(len(things)))
        old, words = things.pop(which), {}
        name = old.sprite.name
        if things and (self.split == "test" or self.rng.random() < 0.75):
            name += " " + stands_out(edit.source.things, which)
        if edit.task != "remove":
            thing, words["b"] = self.new_thing(edit, old.path - old.path[:1] * torch.tensor([0, 0, 0, 1]))
            things.insert(which, thing)
        edit.target, edit.changed = replace(edit.source, things=things), (which, which if edit.new else None)
        return words | {"a": name}


def draw_edit(library, split, seed, index, frames, size):
    """Clip `index` of a data set: everything about it is drawn from (seed, split, index)."""
    rng = np.random.default_rng([seed, split == "test", index])
    artist, kind = Artist(rng, library, split, size), MIXTURE[index % len(MIXTURE)]
    task = pick(rng, TASKS[kind])
    scene = artist.scene(1 if kind == "image" else frames)
    edit = Edit(kind, task, "", scene, scene)
    changes = {"style": artist.restyle, "background": artist.move, "background_ref": artist.move, "add": artist.add,
               "subject_add": artist.add}  # fmt: skip
    words = changes.get(task, artist.change)(edit)
    if task.startswith("subject"):
        edit.ref = show_reference(rng, edit.target.things[edit.changed[1]], 2 * size)
    edit.prompt = pick(rng, WORDINGS[split][task]).format(clip="picture" if kind == "image" else "video", **words)
    return edit


def redraw_edit(library, world, index):
    """Clip `index` of a data set as its world.json says that it is drawn: the same each time."""
    return draw_edit(library, world["split"], world["seed"], index, world["frames"], world["size"])


def to_uint8(frames):
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).contiguous()


def draw_frames(edit, size):
    """An edit -> source and target uint8 (T, size, size, 3) and the edited region bool (T, size, size).

    The region is where the changed things and their shadows lie, or where the background shows; for a style everywhere.
    """
    source, touched, visible = render(edit.source, size)
    if edit.style:
        return to_uint8(source), to_uint8(STYLES[edit.style](source)), torch.ones_like(source[:, 0], dtype=torch.bool)
    target, touched_target, _ = render(edit.target, size)
    if edit.changed:
        shares = [t[i] for t, i in zip((touched, touched_target), edit.changed) if i is not None]
    else:
        shares = [1 - sum(visible, torch.zeros_like(source[:, :1]))]
    source, target = to_uint8(source), to_uint8(target)
    region = (sum(shares)[:, 0] > 1 / 512) | (source != target).any(dim=-1)  # a smaller share may still tip a rounding
    return source, target, region


def describe(scene):
    """A caption of a scene in plain words."""
    things = " and ".join(article(t.sprite.name) for t in scene.things)
    place = "" if scene.photo.name.startswith("texture") else f" in front of {scene.photo.name}"
    return (things or "nothing") + place


def boxes(scene):
    """Per thing its box on the first frame, (x0, y0, x1, y1) in frame widths; things may leave the frame."""
    out, (camera_x, camera_y, zoom) = {}, scene.camera[0].tolist()
    for thing in scene.things:
        x, y, size, _ = thing.path[0].tolist()
        x, y, half = (x - camera_x) * zoom + 0.5, (y - camera_y) * zoom + 0.5, size * zoom / 2
        out[thing.sprite.name] = [round(min(max(v, 0), 1), 3) for v in (x - half, y - half, x + half, y + half)]
    return out
