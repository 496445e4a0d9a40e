"""The world that nano learns editing in: named sprites and photographs, scenes of them, and edits whose truth is known.

    Library (sprites by name, photographs) -> Scene: a background under a moving camera, things on their paths
      -> Edit: the scene before and after one change, its instruction, perhaps a reference picture
      -> frames uint8 (T, H, W, 3) before and after, and the edited region bool (T, H, W)

Everything is drawn with torch at twice the size and averaged: camera motion, soft shadows, occlusion. An edit depends
on (seed, split, index) alone. Objects, photographs and wordings of the test split never occur in training, with one
exception that language forces: a thing that only its name describes must be one that training has named, or a new
pair of a known colour and a known shape. Training alone sees photographs and things in other colours too, and heaps of
leaves as places: with the fifteen photographs of its split as they are, nano learned those by heart.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from media import whole_file, write_text

LOCAL = ("change", "remove", "add")  # the hard ones: twice as many of each
TASKS = {
    "image": ("style", "background", *LOCAL, *LOCAL),
    "video": ("style", "background", *LOCAL, *LOCAL),
    "ref_video": ("subject", "background_ref", "subject", "subject_add"),
}
MIXTURE = ("image", "video", "ref_video", "image")  # as the paper's third stage: 2:1:1
COLOURS = {
    "red": (0.85, 0.12, 0.12), "green": (0.15, 0.65, 0.2), "blue": (0.15, 0.3, 0.85), "yellow": (0.98, 0.85, 0.1),
    "orange": (0.98, 0.5, 0.05), "purple": (0.5, 0.15, 0.7), "pink": (0.98, 0.5, 0.7), "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.09), "brown": (0.45, 0.27, 0.12), "turquoise": (0.1, 0.75, 0.75), "grey": (0.5, 0.5, 0.52),
}  # fmt: skip
COMMON = (
    "dog cat cow tiger rabbit horse monkey pig elephant penguin fish turtle octopus frog panda fox lion bear owl duck "
    "butterfly crab snail whale car bus bicycle taxi tractor truck train rocket airplane sailboat helicopter balloon "
    "apple banana strawberry watermelon lemon pineapple grapes tomato carrot broccoli hamburger pizza doughnut cake "
    "cactus rose tulip sunflower mushroom tree house tent umbrella guitar trumpet drum crown camera clock television "
    "basketball trophy teddy_bear kite snowman cloud sun star gem key bell book chair door"
)
SPRITE = 128  # pixels a side of a stored sprite
TEST_SHARE = 6  # one name in six is held out


# ------------------------------------------------------------------------------------------------ what there is to see


@dataclass
class Sprite:
    name: str
    look: str  # which artist drew it: one name has several looks
    levels: list  # premultiplied RGBA (4, n, n) float in [0, 1], n = 128, 64, 32, 16


@dataclass
class Photo:
    name: str  # what an instruction calls it, e.g. "a forest"
    image: object  # (3, H, W) float in [0, 1]
    panorama: bool = False  # equirectangular, or flat and repeated without end


@dataclass
class Library:
    sprites: dict = field(default_factory=dict)  # name -> [Sprite], the first is the look that its name alone calls for
    photos: list = field(default_factory=list)

    def names(self, split):
        held = held_out(self.sprites)
        return sorted(name for name in self.sprites if (name in held) == (split == "test"))

    def photos_of(self, split):
        """The split's photographs, and apart from them its textures: (panoramas, flat ones)."""
        groups = [[p for p in self.photos if p.panorama == panorama] for panorama in (True, False)]
        held = [held_out([p.name for p in group]) for group in groups]
        return [[p for p in group if (p.name in names) == (split == "test")] for group, names in zip(groups, held)]


def held_out(names):
    """One name in TEST_SHARE, by the order of their hashes: known without a list, the same on every machine."""
    ranked = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ranked[: len(ranked) // TEST_SHARE])


def pyramid(image):
    """A sprite and its halves, so that no warp has to skip pixels."""
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
    heart_x, heart_y = x.abs() / 0.75, -y / 0.75
    return {
        "circle": radius - 0.8,
        "square": torch.maximum(x.abs(), y.abs()) - 0.68,
        "triangle": polygon(3) + 0.02,
        "diamond": x.abs() + y.abs() - 0.9,
        "hexagon": polygon(6),
        "star": radius * (points.cos() + 0.75 * points.abs().sin() * -1 + 0.75 * math.sin(math.pi / 5)) - 0.62,
        "ring": (radius - 0.6).abs() - 0.22,
        "cross": torch.minimum(
            torch.maximum(x.abs() - 0.25, y.abs() - 0.8), torch.maximum(y.abs() - 0.25, x.abs() - 0.8)
        ),
        "heart": ((heart_x**2 + heart_y**2 - 1) ** 3 - heart_x**2 * heart_y**3) * 0.4,
        "moon": torch.maximum(radius - 0.8, 0.62 - ((x - 0.38) ** 2 + (y + 0.1) ** 2).sqrt()),
        "arrow": torch.minimum(
            torch.maximum(x - 0.1, y.abs() - 0.22).maximum(-0.8 - x), torch.maximum(x + y.abs() * 1.1 - 0.85, -0.05 - x)
        ),
        "bar": torch.maximum(x.abs() - 0.85, y.abs() - 0.3),
    }


def draw_shapes():
    """Twelve shapes in twelve colours, each in two looks: sprites that need no asset and whose names compose."""
    y, x = (2 * place - 1 for place in pixel_grid(2 * SPRITE))
    sprites = {}
    for shape, distance in shape_distances(x, y).items():
        alpha = (0.5 - distance * SPRITE).clamp(0, 1)
        rim = (0.5 - (distance + 0.09) * SPRITE).clamp(0, 1)
        for colour, rgb in COLOURS.items():
            rgb = torch.tensor(rgb).view(3, 1, 1)
            shaded = rgb * (0.95 - 0.3 * y) + 0.25 * (-((x + 0.3) ** 2 + (y + 0.35) ** 2) * 8).exp()
            striped = rgb * rim + (1 - rim) * (0.25 + 0.5 * (1 - rgb)) - 0.2 * ((x + y) * 14).sin().gt(0.3) * rim
            for look, body in (("shaded", shaded), ("striped", striped)):
                levels = pyramid(torch.cat([body.clamp(0, 1) * alpha, alpha[None]]))[1:]  # drawn at twice the size
                sprites.setdefault(f"{colour} {shape}", []).append(Sprite(f"{colour} {shape}", look, levels))
    return sprites


def draw_textures(count=48, size=256):
    """Seamless cloudy textures in three colours each, as backgrounds that need no asset."""
    frequency = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size)[None].square()
    photos = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        colours = torch.rand(3, 3, generator=g)
        colours = 0.15 + 0.7 * colours.lerp(colours.mean(dim=1, keepdim=True), 0.45)  # no louder than photographs
        spectrum = torch.fft.rfft2(torch.randn(2, size, size, generator=g))
        steep = 1.8 + torch.rand(1, generator=g).item()
        field_ = torch.fft.irfft2(spectrum / (frequency + 4 / size**2) ** (steep / 2), s=(size, size))
        a, b = (field_ / field_.std(dim=(1, 2), keepdim=True)).mul(1.2).sigmoid()[:, None]
        image = colours[0].view(3, 1, 1) * a + colours[1].view(3, 1, 1) * (1 - a)
        photos.append(
            Photo(f"texture {i}", (image * (0.4 + 0.6 * b) + colours[2].view(3, 1, 1) * 0.4 * (1 - b)).clamp(0, 1))
        )
    return photos


def draw_pattern(kind, first, second, size=128):
    """A seamless pattern of two named colours: a background that words alone describe to the pixel."""
    y, x = pixel_grid(size)
    soft = size / 8  # edges as wide as an eighth of a cell's pixel: anti-aliased when drawn small

    def wave(phase):
        return ((2 * math.pi * phase).sin() * soft / 4).clamp(-0.5, 0.5) + 0.5

    mix = {
        "plain": torch.zeros_like(x),
        "stripes": wave(4 * x),
        "checkerboard": (wave(2 * x) - wave(2 * y)).abs(),
        "dots": (((4 * x % 1 - 0.5) ** 2 + (4 * y % 1 - 0.5) ** 2).sqrt().sub(0.3).mul(-soft / 2)).clamp(-0.5, 0.5)
        + 0.5,
        "gradient": (1 - (2 * math.pi * y).cos()) / 2,
    }[kind]
    a, b = (torch.tensor(COLOURS[c]).view(3, 1, 1) for c in (first, second))
    return a * (1 - mix) + b * mix


PATTERN_WORDS = {
    "plain": "a plain {a} wall", "stripes": "{a} and {b} stripes", "checkerboard": "a checkerboard of {a} and {b}",
    "dots": "{b} dots on {a}", "gradient": "a smooth gradient from {a} to {b}",
}  # fmt: skip


def pattern_photo(rng, split):
    """A pattern whose words belong to the split."""
    while True:
        kind = pick(rng, list(PATTERN_WORDS))
        a, b = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        name = PATTERN_WORDS[kind].format(a=a, b=b)
        if kind == "plain" or (hashlib.sha256(name.encode()).digest()[0] % TEST_SHARE == 0) == (split == "test"):
            return Photo(name, draw_pattern(kind, a, b))


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
    smallest, largest, upright = float(rng.uniform(0.03, 0.12)), 0.32, rng.random() < 0.5
    covered = 2 * math.pi * smallest**2 * math.log(largest / smallest)  # by one leaf, on average
    image = palette[0] + grain
    for _ in range(int(3 / covered)):
        middle_x, middle_y, tone = (float(v) for v in rng.random(3))
        radius = min(largest, smallest * (1 - float(rng.random())) ** -0.5)
        angle, flatness = 0.0 if upright else float(rng.uniform(0, math.pi)), float(rng.uniform(1, 2.5))
        cos, sin = math.cos(angle), math.sin(angle)
        dx, dy = (x - middle_x + 0.5) % 1 - 0.5, (y - middle_y + 0.5) % 1 - 0.5
        u, v = cos * dx + sin * dy, flatness * (cos * dy - sin * dx)
        distance = torch.hypot(u, v) if rng.random() < 0.5 else torch.maximum(u.abs(), v.abs())
        alpha = ((radius - distance) * size + 0.5).clamp(0, 1)
        body = (
            palette[int(tone * 5)] + float(rng.normal(0, 0.06)) + 0.15 * v / radius + float(rng.uniform(0, 1)) * grain
        )
        image = image + alpha * (body - image)
    return Photo("texture of leaves", image.clamp(0, 1))


def colour_matrix(rng):
    """(3, 3): colours turned about the grey axis, more or less of them, and another exposure."""
    turn, much, light = float(rng.normal(0, 0.8)), float(rng.uniform(0.4, 1.3)), float(rng.uniform(0.6, 1.25))
    grey, cos, sin = torch.full((3, 3), 1 / 3), math.cos(turn), math.sin(turn) / 3**0.5
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return light * (grey + much * (cos * (torch.eye(3) - grey) + sin * cross))


def recoloured(rng, thing):
    """A photograph or a sprite in other colours."""
    matrix = colour_matrix(rng)

    def turned(image):  # premultiplied, if there is alpha: linear all the same
        colours = torch.einsum("ij,jhw->ihw", matrix, image[:3])
        return (
            torch.cat([torch.minimum(colours.relu(), image[3:]), image[3:]]) if len(image) > 3 else colours.clamp(0, 1)
        )

    if isinstance(thing, Photo):
        return replace(thing, image=turned(thing.image))
    return replace(thing, look=f"{thing.look}, recoloured", levels=[turned(level) for level in thing.levels])


def read_index(folder):
    """What a folder of assets holds. FileNotFoundError where `nano.py assets` has not filled it."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: fill the folder with `python nano.py assets {folder}`")
    return json.loads(path.read_text())


@lru_cache(maxsize=1)  # a worker draws many clips
def load_library(folder=None):
    """Shapes and textures and, where `folder` was filled by `nano.py assets`, emoji and photographs."""
    library = Library(draw_shapes(), draw_textures())
    if folder is None:
        return library
    index, folder = read_index(folder), Path(folder)
    images = load_file(folder / "assets.safetensors")
    for entry, image in zip(index["sprites"], images["sprites"]):
        name = entry["name"]
        library.sprites.setdefault(name, []).append(Sprite(name, entry["look"], pyramid(image.float() / 255)))
    panoramas = [Photo(e["name"], image.float() / 255, True) for e, image in zip(index["photos"], images["photos"])]
    library.photos = panoramas + library.photos[: len(panoramas)]
    return library


# ------------------------------------------------------------------------------------------------ scenes


@dataclass
class Thing:
    """An object in a scene. `path`: per frame x, y (in frame widths from the middle), size (of the frame), angle."""

    sprite: Sprite
    path: object  # (T, 4) float32
    flip: bool = False


@dataclass
class Scene:
    photo: Photo
    view: tuple  # where the camera starts: (yaw, pitch, field of view) or (x, y, scale), and whether it is mirrored
    camera: object  # (T, 3) float32: x, y in frame widths, and zoom
    things: list


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def smooth_path(rng, frames, amount):
    """(T,) a drift, a swing or no motion at all, of about `amount`."""
    time = torch.linspace(0, 1, frames)
    kind = rng.random()
    size = float(rng.uniform(-amount, amount))
    if kind < 0.3:
        return torch.zeros(frames)
    if kind < 0.7:
        return size * (time - 0.5)
    return size / 2 * (2 * math.pi * (float(rng.uniform(0.5, 1.2)) * time + float(rng.random()))).sin()


def draw_camera(rng, frames):
    """A camera at rest, or one that pans, zooms or shakes; a still's is at rest, for a still does not tell where "on the
    left" would be in frames that it does not have."""
    kind = rng.random() * (frames > 1)
    x, y, zoom = torch.zeros(frames), torch.zeros(frames), torch.ones(frames)
    time = torch.linspace(0, 1, frames)
    if 0.25 < kind < 0.6:
        x, y = float(rng.uniform(-0.25, 0.25)) * (time - 0.5), float(rng.uniform(-0.1, 0.1)) * (time - 0.5)
    elif 0.6 <= kind < 0.8:
        zoom = 1 + float(rng.uniform(0.1, 0.35)) * (time if rng.random() < 0.5 else 1 - time)
    elif kind >= 0.8:
        x, y = (torch.from_numpy(rng.normal(0, 0.008, frames).cumsum().astype("float32")) for _ in "xy")
    return torch.stack([x, y, zoom], dim=1)


def draw_view(rng, photo, split):
    if photo.panorama:  # training looks up and down too: fifteen panoramas have few views straight ahead
        pitch, extent = ((-30, 25), (50, 95)) if split == "train" else ((-8, 6), (65, 85))
        return (
            float(rng.uniform(-180, 180)),
            float(rng.uniform(*pitch)),
            float(rng.uniform(*extent)),
            bool(rng.integers(2)),
        )
    return float(rng.random()), float(rng.random()), float(rng.uniform(0.5, 0.8)), bool(rng.integers(2))


def draw_things(rng, sprites, frames):
    """Things apart from one another, larger ones where there are fewer."""
    slots = [(-0.25, 0.05), (0.25, 0.05), (0.0, 0.2), (0.0, -0.22)]
    order = rng.permutation(2 if len(sprites) < 3 else 4)
    things = []
    for sprite, slot in zip(sprites, order):
        x, y = slots[slot] if len(sprites) > 1 else (float(rng.uniform(-0.22, 0.22)), float(rng.uniform(-0.1, 0.2)))
        x, y = (v + float(rng.uniform(-0.06, 0.06)) for v in (x, y))
        size = float(rng.uniform(0.34, 0.5)) * (1.15 if len(sprites) == 1 else 1.0)
        path = torch.stack(
            [
                (x + smooth_path(rng, frames, 0.22)).clamp(-0.33, 0.33),
                (y + smooth_path(rng, frames, 0.12)).clamp(-0.33, 0.33),
                size * (1 + smooth_path(rng, frames, 0.25)),
                float(rng.uniform(-0.15, 0.15)) + smooth_path(rng, frames, 0.5),
            ],
            dim=1,
        )
        things.append(Thing(sprite, path, bool(rng.integers(2))))
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
    """(T, 4, size, size), premultiplied: a sprite on its path as the camera sees it; or its shadow's alpha (T, 1, ...)."""
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


SHADOW = 0.35


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


# ------------------------------------------------------------------------------------------------ edits


def grey(x):
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)


def blurred(x, radius):
    for _ in range(3):
        x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)
    return x


def edges(x):
    g = F.pad(grey(x), (1, 1, 1, 1), mode="replicate")
    return ((g[..., 1:-1, 2:] - g[..., 1:-1, :-2]).abs() + (g[..., 2:, 1:-1] - g[..., :-2, 1:-1]).abs()).clamp(0, 1)


def tinted(x, *rgb):
    return x * x.new_tensor(rgb).view(3, 1, 1)


def pixelated(x):
    cell = x.shape[-1] // 16
    return F.interpolate(F.avg_pool2d(x, cell), scale_factor=cell, mode="nearest")


STYLES = {
    "night": lambda x: tinted(x**1.3, 0.28, 0.34, 0.62),
    "a black and white film": lambda x: ((grey(x) - 0.5) * 1.15 + 0.5).expand_as(x),
    "an old sepia photograph": lambda x: tinted(grey(x).expand_as(x), 1.05, 0.85, 0.62),
    "sunset": lambda x: tinted(x, 1.15, 0.72, 0.5) + x.new_tensor([0.1, 0.03, 0.0]).view(3, 1, 1),
    "winter": lambda x: tinted(0.45 * x + 0.55 * grey(x), 0.85, 0.95, 1.1) * 0.7 + 0.3,
    "a pencil sketch": lambda x: (0.97 - 2.5 * edges(x)).expand_as(x),
    "pixel art": pixelated,
    "a comic book": lambda x: (blurred(x, 1) * 3.999).floor() / 3 * (1 - 1.6 * edges(x)).clamp(0.1, 1),
    "a photographic negative": lambda x: 1 - x,
    "a misty morning": lambda x: 0.42 * blurred(x, 1) + 0.5,
    "an infrared camera": lambda x: tinted(grey(x), 1.6, 0, 0) + tinted((grey(x) * 2 - 0.6).clamp(0, 1), 0, 0.9, 0)
    + tinted(1 - grey(x), 0, 0, 0.8),
    "a neon sign": lambda x: 0.15 * tinted(x, 0.6, 0.3, 1) + 2.2 * tinted(edges(x), 0.3, 1, 0.95),
}  # fmt: skip

PLACES = {
    "on the left": (-0.26, 0.08), "on the right": (0.26, 0.08), "in the middle": (0.0, 0.05), "at the top": (0.0, -0.25),
    "at the bottom": (0.0, 0.27), "in the top left corner": (-0.27, -0.26), "in the top right corner": (0.27, -0.26),
    "in the bottom left corner": (-0.27, 0.27), "in the bottom right corner": (0.27, 0.27),
}  # fmt: skip

# What people write, for training.
WORDINGS = {
    "style": (
        "Make it look like {s}.", "Turn this into {s}.", "Give the {clip} the look of {s}.", "Restyle everything as {s}.",
        "I want this to look like {s}", "Change the style to {s}.", "Render the whole {clip} as {s}.", "Let it be {s}.",
        "Paint it like {s}.", "Convert the {clip} to {s}", "A version of this as {s}, please.", "Style: {s}",
        "Please redo the {clip} in the style of {s}.", "I'd love to see this as {s}.",
        "Can you restyle the {clip} so that it feels like {s}?", "The {clip} should have the mood of {s}.",
        "Add a filter: {s}.", "{s}, please, for the whole {clip}", "Imagine the same {clip}, but as {s}.",
        "Same scene, different look: {s}.", "Turn the entire {clip} into {s} and keep every object.",
        "Make everything appear like {s}", "Let the whole {clip} be in the style of {s}.", "What would this be as {s}?",
        "Recreate the {clip} as {s}.", "Redraw all of it as {s}.", "Colour and texture like {s}, shapes as they are.",
        "Stylize this as {s}.", "Use {s} as the style.", "It needs the atmosphere of {s}.", "As if it were {s}.",
        "Could this be made into {s}?", "My boss wants {s} here.", "Alter the overall look to {s}.",
        "Switch the look of the {clip} to {s}.", "Go for {s}.", "Everything in here should feel like {s}.",
        "Filter the {clip} to get {s}.", "The final {clip} resembles {s} from corner to corner.",
        "Reimagine it as {s}, without changing what is in it.", "I'm after {s} in this {clip}.",
        "Do the whole thing over as {s}.", "Now in the manner of {s}", "The {clip} is to be redone as {s}.",
        "Adopt the aesthetic of {s} throughout", "Reinterpret the {clip} visually as {s}.",
        "Recast the {clip} as {s}, leaving shapes and motion intact", "Dress the entire {clip} up as {s}",
        "Convert the {clip} to {s}, keeping all objects where they are", "Make it seem as though this were {s}",
        "Put a filter on so it looks like {s}", "Make the {clip} into {s} without moving anything",
        "Transform the footage into {s}.", "Apply the look of {s} to every frame.",
        "Everything repainted so that we seem to be watching {s}", "Grade and filter the {clip} until it passes for {s}",
        "How about giving the whole {clip} the feel of {s}?", "The final {clip} must have the visual style of {s}.",
        "Redo the entire {clip} in the manner of {s}", "The whole thing should come out resembling {s}",
        "Reimagine the {clip} as {s}", "Let the {clip} take on the look of {s}.",
        "It would be nicer if the {clip} looked like {s}.", "We need the {clip} delivered in the style of {s}.",
    ),
    "background": (
        "Replace the background with {p}.", "Change the background to {p}.", "Put {p} behind everything.",
        "Make the background {p}.", "Use {p} as the background.", "Swap the backdrop for {p}.", "Set it in front of {p}.",
        "The background should be {p}.", "Behind the objects I want {p}.", "New background: {p}", "Background -> {p}",
        "Take away what is behind the objects and show {p} there.", "Could we have {p} as a backdrop?",
        "Place everything in front of {p}.", "Please give it {p} for a background.",
        "The objects stay, the background becomes {p}.", "Everything should stand before {p}.",
        "Paint {p} behind the objects.", "Turn the backdrop into {p}.", "Fill the background with {p}.",
        "How about {p} behind all this?", "The scene behind should be replaced by {p}.", "Cover the background with {p}",
        "I'd rather see {p} behind them.", "Let {p} be the background.", "Have {p} behind the things in the {clip}.",
        "Only the background changes: it is now {p}.", "Leave the foreground as it is and draw {p} behind it.",
        "Set the backdrop to {p}.", "Do not touch the objects; put {p} at the back.", "Substitute the background with {p}.",
        "The wall behind becomes {p}.", "A different background please: {p}.", "Can the background turn into {p}?",
        "Drop in {p} as the backdrop.", "Remove the old background and use {p}.", "Make it so that {p} fills the back.",
        "With {p} as background", "In the back there should be {p}.", "The things in the {clip} are in front of {p} now.",
        "Surround the objects with {p}.", "Edit the background so that it shows {p}.", "Lay {p} under everything else.",
        "Cut out the objects and composite them over {p}", "I'm hoping to see {p} in the distance instead of this background",
        "Greenscreen this onto {p}", "Transform the surroundings into {p}", "Same objects, different place: {p}",
        "Give the {clip} a new backdrop, namely {p}", "Why not have {p} as the background of this {clip}?",
        "Relocate the objects to {p}", "Make the background look like {p}, but don't touch the objects",
        "The background must be replaced by {p}.", "Location change: {p}. Leave the foreground alone.",
        "Yo swap that background for {p}", "The setting becomes {p}; the objects remain unchanged.",
        "Could you replace what's behind the objects with {p}?", "Please use {p} as the backdrop.",
        "Everything in the foreground stays; behind it, show {p}.", "Can we have {p} as the setting instead?",
        "Transport the objects to {p}", "Have the background exchanged for {p}", "Show the same objects against {p}",
        "Behind the objects there should be {p}",
    ),
    "change": (
        "Replace the {a} with {b}.", "Swap the {a} for {b}.", "Turn the {a} into {b}.", "Change the {a} to {b}.",
        "Make the {a} become {b}.", "I want {b} instead of the {a}.", "Put {b} where the {a} is.",
        "Instead of the {a} show {b}.", "Swap out the {a} and bring in {b}.", "Replace the {a} by {b}, leave the rest.",
        "{b} instead of the {a}, please", "Please turn the {a} into {b}", "Can you make the {a} into {b}?",
        "In place of the {a} there should be {b}.", "The {a} becomes {b}.", "Where the {a} is now, draw {b}.",
        "I'd prefer {b} to the {a}.", "Convert the {a} to {b}.", "Transform the {a} into {b} and touch nothing else.",
        "Remove the {a} and put {b} there.", "Trade the {a} for {b}.", "Switch the {a} to {b}.", "Could the {a} be {b}?",
        "Have {b} in the spot of the {a}.", "The {a} is boring, give me {b} in its place.", "The {a} -> {b}",
        "Take the {a} out and {b} in.", "Let the {a} turn into {b}.", "Let the {a} be replaced with {b}.",
        "It was the {a}; make it {b}.", "Morph the {a} into {b}.", "Fill the place of the {a} with {b}.",
        "We need {b} here, not the {a}.", "Rather than the {a}, I'd like to see {b}.", "Edit the {a} so that it is {b}.",
        "Drop the {a} and use {b}.", "Everything stays except the {a}, which becomes {b}.",
        "Delete the {a}, then add {b} in the same place.", "Could you please redraw the {a} as {b}?",
        "The {a} was a mistake, it was meant to be {b}.", "Make {b} out of the {a}.", "Cover the {a} with {b}.",
        "{b} should stand where the {a} stands.", "Would you mind exchanging the {a} for {b}?",
        "Replacement: {b} for the {a}", "As if by magic, the {a} became {b}",
        "Replace the {a}, substituting {b} in exactly the same spot",
        "Rework the {a} into {b}, keeping the position and motion", "Let the {a} be {b} from now on",
        "The {a} should be replaced by {b}.", "Not the {a}! I meant {b}.", "Let's go with {b} in lieu of the {a}",
        "Where the {a} used to be, show {b}.", "Have the {a} changed into {b}", "The client hates the {a}, use {b} instead",
        "Recast the role of the {a} with {b}", "Let {b} stand in for the {a}.", "I wish the {a} could be {b}",
        "Wherever you see the {a}, draw {b} instead.", "Remake the {a} as {b}; everything else stays the same",
        "Make the {a} look like {b}", "Put {b} in place of the {a}.", "Out with the {a}, in with {b}",
        "Get rid of the {a} and put {b} there instead",
    ),
    "remove": (
        "Remove the {a}.", "Get rid of the {a}.", "Delete the {a} from the {clip}.", "Take the {a} away.", "Erase the {a}.",
        "Take out the {a}, please.", "I don't want the {a} in there.", "Clear the {a} away.",
        "Please remove the {a} from the {clip}.", "The {a} should not be there.", "No {a} in this {clip}, please.",
        "Make the {a} vanish.", "I'd like the {clip} more if the {a} weren't there.", "Can you take the {a} off the {clip}?",
        "Clean up the {clip}: lose the {a}.", "Wipe the {a} out.", "There is no {a} any more.", "Drop the {a}.",
        "Edit out the {a}.", "Eliminate the {a}, keep everything else.", "Hide the {a}.", "Kick the {a} out.",
        "The {a} is disturbing me, away with it.", "Only the {a} is to be removed.", "The {a} must leave.",
        "Do away with the {a}.", "Throw the {a} out of the {clip}.", "Leave everything in, except the {a}.",
        "Show the same {clip} minus the {a}.", "Fill in the background where the {a} is.", "Strip the {a} from the {clip}.",
        "Retouch the {clip} so that the {a} is gone.", "The {a} should be gone.", "I can't stand the {a}, please delete it.",
        "Paint over the {a} with the background.", "We don't need the {a}.", "Who put the {a} there? Remove it.",
        "Nobody should see the {a}.", "Could you please erase the {a} completely?", "Let there be nothing where the {a} is.",
        "The {clip} has no {a} in the end.", "Empty the place where the {a} is.", "Bye bye to the {a}!",
        "Scrub the {a} from every frame", "Omit the {a}", "Object removal: the {a}", "Exclude the {a} from the {clip}",
        "Zap the {a}", "Discard the {a}", "Make it look as though the {a} had never been there",
        "Why keep the {a}? Just empty space there, please", "Have the {a} removed, leaving no trace.",
        "The {a} shouldn't be here, take care of that", "Eliminate the {a} from the scene.",
        "The {clip} should no longer contain the {a}.", "I need the {a} edited out.", "Can we ditch the {a}?",
        "Inpaint over the {a} so only the background is left", "Pull the {a} from this shot",
        "The {a} distracts the viewer, kindly remove.", "Let the {a} vanish", "Lose the {a}",
        "Farewell to the {a}; everything else as before", "Clean up the shot by dropping the {a}",
    ),
    "add": (
        "Add {b} {w}.", "Put {b} {w}.", "Place {b} {w}.", "Insert {b} {w}.", "I want {b} {w}.", "Let there be {b} {w}.",
        "There should be {b} {w}.", "Draw {b} {w}.", "Please add {b} {w}.", "Could we have {b} {w}?", "It needs {b} {w}.",
        "Have {b} {w}.", "{b} {w}, please", "A new thing {w}: {b}.", "I'd like to see {b} {w}.", "Let me see {b} {w}.",
        "Give me {b} {w}.", "Bring in {b} {w}.", "Drop {b} in {w}.", "Include {b} {w}.", "Paint {b} {w}.",
        "Something is missing {w}: {b}.", "It would look better with {b} {w}.", "The {clip} should have {b} {w}.",
        "We need {b} {w}, the rest stays as it is.", "Stick {b} {w}.", "Position {b} {w}.", "Make {b} show up {w}.",
        "There is room {w} for {b}.", "Throw in {b} {w}.", "Fill the space {w} with {b}.",
        "Edit the {clip} so that there is {b} {w}.", "Can you draw {b} {w}?", "Keep everything and add {b} {w}.",
        "Display {b} {w}.", "What about {b} {w}?", "Create {b} {w}.", "Now with {b} {w}", "Extend the scene by {b} {w}.",
        "{w} there should be {b}.", "{w} I want {b}.", "In addition, {b} {w}.", "One more object {w}, namely {b}.",
        "Introduce {b} {w} without changing anything else.", "Composite {b} into the {clip} {w}", "Pop {b} in {w}",
        "Generate {b} {w}", "Render {b} {w} on top of the existing {clip}", "Overlay {b} {w}", "Plop {b} down {w}",
        "To be inserted: {b}, {w}", "Show us {b} {w} next to what's already in the {clip}", "I wish there was also {b} {w}",
        "Everything stays the same, but with {b} {w}", "Looks empty, so how about {b} {w}?", "Extra object: {b} {w}",
        "Can I have {b} {w} as well?", "Additionally, show {b} {w}", "Conjure up {b} {w}!", "Locate {b} {w} as a new object",
        "Complete the scene with {b} {w}", "Bring in {b} {w}, keep everything that's already there",
        "We want {b} visible {w} in addition to the rest", "Draw {b} {w}, leaving the rest as is",
    ),
    "subject": (
        "Replace the {a} with the object shown.", "Swap the {a} for the one in the picture.",
        "Turn the {a} into the thing from the reference.", "Put the shown object where the {a} is.",
        "Change the {a} to what the reference shows.", "Replace the {a} with the {b} from the image.",
        "Swap the {a} for this {b}.", "Use the pictured {b} instead of the {a}.",
        "The object in the reference replaces the {a}.", "Please replace the {a} by what you see in the picture.",
        "In place of the {a} I want this {b}.", "Take the {b} from the picture and put it where the {a} is.",
        "The {a} becomes the {b} in the reference.", "Where the {a} is, draw this object.",
        "Remove the {a} and put the pictured object there.", "Can you make the {a} into this {b}?",
        "Trade the {a} for the object in the image.", "Swap out the {a}, bring in the {b} shown.",
        "Use what is in the picture instead of the {a}.", "I'd like the thing I show you instead of the {a}.",
        "This {b} should stand where the {a} stands.", "The {a} -> the {b} in the image",
        "Transform the {a} into the pictured one.", "Convert the {a} to the {b} of the reference image.",
        "Not the {a} but the object in the reference, please.", "Let the {a} turn into this.",
        "My {b} is in the picture: put it in place of the {a}.", "The {a} out, the shown {b} in.",
        "Fill the place of the {a} with the object from the picture.",
        "Make the {a} look like the thing in the reference image.", "Morph the {a} into the {b} that is shown.",
        "Rather than the {a}, show the one from the reference.", "We need the {b} from the photo here, not the {a}.",
        "Drop the {a} and use the given object.", "See the picture? That is what the {a} becomes.",
        "Edit the {a} so that it is the {b} in the picture.", "Redraw the {a} as the object I attached.",
        "Everything stays, only the {a} turns into the attached {b}.", "Cover the {a} with the {b} shown in the image.",
        "Here is a {b}. It replaces the {a}.", "Let the {a} be replaced by the reference object.",
        "Delete the {a} and insert this thing at the same place.", "Switch the {a} to the shown item.",
        "Get rid of the {a}; the {b} shown goes there instead", "The {a} should become the object in the photo",
        "Where the {a} would be, insert the item from the photo", "Trade the {a} for the thing I'm showing you",
        "Convert the {a} to match the object provided", "Supplant the {a} with the subject of the reference photo",
        "Let the {b} in the photo stand in for the {a}", "The {a} must be exchanged for the {b} in the attached picture.",
        "Make the pictured {b} appear in lieu of the {a}", "Substitute the pictured item for the {a}.",
        "Switch the {a} with the depicted {b}", "Same {clip}, but with this {b} replacing the {a}",
        "I want my {b} there instead of the {a}, see picture", "I'd rather see the {b} from my photo than the {a}",
        "Have the {a} replaced by the thing shown.", "How about the object shown rather than the {a}?",
        "The {a} should be replaced by what is in the image", "Wherever the {a} goes, show the object in the picture instead",
        "Would you mind replacing the {a} with the {b} I attached?", "Our product is the {b} pictured; swap out the {a}",
        "Here is a picture of something: replace the {a} with that",
    ),
    "subject_add": (
        "Add the object shown {w}.", "Put the one in the picture {w}.", "Place the thing from the reference {w}.",
        "Insert this {b} {w}.", "I want the shown {b} {w}.", "Put what the reference shows {w}.",
        "Add the {b} from the image {w}.", "Let the pictured object be {w}.", "Please add this {b} {w}.",
        "I'd like to see the object from the picture {w}.", "Bring in the {b} from the image {w}.",
        "Could we have the shown thing {w}?", "Have this {b} {w}.", "The {clip} needs the pictured object {w}.",
        "Take the object in the reference and place it {w}.", "Drop the shown {b} in {w}.",
        "Draw the thing from the image {w}.", "Here is a {b}: put it {w}.", "Include what is in the picture {w}.",
        "{w} I want the object shown.", "{w} there should be this {b}.", "Give me the {b} of the reference {w}.",
        "Stick the attached object {w}.", "Position the {b} shown in the picture {w}.",
        "Paste the object from the reference {w}.", "Keep everything and add the shown thing {w}.",
        "Make the pictured {b} show up {w}.", "Copy the {b} from the image into the {clip}, {w}.",
        "A new object {w}: the one in the picture.", "There is room {w} for this {b}.", "The item I show you goes {w}.",
        "Use the picture: its {b} belongs {w}.", "In addition, the reference object {w}.",
        "Throw in the thing from the photo {w}.", "Can you put my {b} {w}? It is in the picture.",
        "Fill the space {w} with the {b} shown.", "Edit the {clip} so that the reference object is {w}.",
        "Nothing changes, except that this {b} is {w}.", "Display the attached {b} {w}.",
        "What you see in the image, I want it {w}.", "Create the same object {w} as in the reference.",
        "See the picture? Add that {w}.", "Let there be the pictured {b} {w}.",
        "Also show this exact {b} {w}, leaving everything else alone",
        "Render the object provided {w}, keep the rest unchanged", "I wish the thing in the picture was also {w}",
        "The thing I'm showing you should be added {w}", "Our product, the {b} in the picture, must be visible {w}",
        "I'd like the item in the photo to appear {w}", "Overlay the subject of the reference photo {w}",
        "What about the {b} pictured here, added {w}?", "Composite the depicted {b} into the {clip} {w}",
        "Bring the {b} in the reference into the scene {w}", "Now add the {b} I gave you {w}.",
        "Throw in the item from the reference {w}", "The depicted object is to be placed {w}.",
        "Stick the {b} from the photo {w}", "Position the referenced {b} {w}", "Pop the {b} shown into the {clip} {w}",
        "Would you kindly put the pictured {b} {w}?", "Fit the {b} in the sample image in {w}",
        "Let the {b} you see in the image show up {w}", "Copy the object out of the picture and place it {w}.",
        "It'd be nice to have the object shown {w} too",
    ),
    "background_ref": (
        "Replace the background with the one shown.", "Change the background to the reference.",
        "Put the scene from the picture behind everything.", "Use the picture as the background.",
        "Swap the backdrop for the place in the image.", "Make the background look like the reference.",
        "Set it in the place that is shown.", "Let the background be the one pictured.",
        "The picture shows the new background.", "New background: the place in the picture",
        "Put this place behind everything.", "Please use the reference as the backdrop.",
        "Everything should stand in front of the scene shown.", "I want this view behind the objects.",
        "Take the background from the reference image.", "Behind the objects there should be the place in the image.",
        "Let it play in the place from the picture.", "Leave the objects, change the background to what is pictured.",
        "The place in the reference goes behind all things.", "Fill the background with the scene from the image.",
        "Could we be in the place that the picture shows?", "Transfer the objects to the place in the image.",
        "Let the picture be the backdrop.", "Here is a place. Use it for the background.",
        "Turn the background into this landscape.", "Background as in the picture",
        "Only the background changes, to the one in the reference image.", "What is behind should look like this place.",
        "Bring the reference scene in as background.", "Same objects, but in the surroundings shown.",
        "Move the scene to the place in the photo.", "Keep what is in front and draw the pictured place at the back.",
        "Instead of the old background I want the view in the picture.", "Set the objects before the view that I show you.",
        "The surroundings should be those of the picture.", "Copy the place from the image into the background.",
        "With the pictured place as background", "Can you set the {clip} in this place?",
        "The attached picture is the backdrop.", "Cover the old background with the reference view.",
        "Place all objects in the shown surroundings.", "Remove the background and put in the one I attached.",
        "I took a photo of a place, use it as background.", "Have the {clip} set against the scenery provided",
        "Give the {clip} the surroundings depicted in the attached photo",
        "Where the photo was taken, that's where all this should be",
        "The same objects, only now in the location I'm showing you",
        "Cut out the objects and lay them over the reference background",
        "Make the setting match the place in the reference picture", "Can we have the pictured place as a backdrop?",
        "I'd like everything to happen in the place you see here",
        "Transfer the objects into the environment of the reference photo",
        "Let the location in the image replace the old background", "Greenscreen the objects onto the scene shown",
        "The place in the photo must become the new backdrop.", "Make it look as if this was shot in the place pictured",
        "Put the objects in front of the place in the photo", "The background should be the landscape in the attached image",
        "Adopt the setting seen in the reference image", "Keep the objects, but use the pictured scene as the background",
        "Composite the objects over the scene in the reference", "Could you set this in the location pictured?",
        "Move everything to the place in the picture", "Swap the background for the pictured location",
    ),
}  # fmt: skip

# For the test split. None of those above has all the telling words of one of these (a test sees to it).
HELD_WORDINGS = {
    "style": (
        "Could you make the {clip} resemble {s}?", "Transform the scene into {s}.", "Apply the style of {s} to everything.",
        "Show all of this as {s}.",
    ),
    "background": (
        "Keep the objects, but let the background be {p}.", "Exchange what is behind the objects for {p}.",
        "I would like {p} in the background.", "Move everything in front of {p}.",
    ),
    "change": (
        "Exchange the {a} for {b}.", "Substitute {b} for the {a}.", "Let {b} take the place of the {a}.",
        "The {a} should be {b} now.",
    ),
    "remove": (
        "Make the {a} disappear.", "The {a} has to go.", "Without the {a}, please.", "Cut the {a} out of the {clip}.",
    ),
    "add": (
        "Show {b} {w} as well.", "Let {b} appear {w}.", "Could you set {b} {w}?", "Also put in {b} {w}.",
    ),
    "subject": (
        "Let the shown {b} take the place of the {a}.", "Exchange the {a} for the object in the reference.",
        "The {a} should become what is pictured.", "Substitute the {b} in the picture for the {a}.",
    ),
    "subject_add": (
        "Let the object in the picture appear {w}.", "Set the pictured {b} {w}.", "Also show this object {w}.",
        "The shown {b} should be {w}.",
    ),
    "background_ref": (
        "Move everything to the pictured place.", "The background should be the scene in the reference.",
        "Exchange the backdrop for this picture.", "Keep the objects and use this place behind them.",
    ),
}  # fmt: skip


def article(name):
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return f"some {name}"
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


@dataclass
class Edit:
    """One example: the scene before and after, and the words for it."""

    kind: str  # the CSV it goes to
    task: str
    wording: str  # an entry of WORDINGS or HELD_WORDINGS
    prompt: str  # the wording, its blanks filled
    source: Scene
    target: Scene
    style: str | None = None  # a key of STYLES: the target is the source, restyled
    ref: object = None  # (3, n, n) float
    changed: tuple = ()  # indices of the things that differ in (source, target), None where there is none
    new: Sprite | None = None  # what a change or addition brings


def in_colour(name):
    """Whether a name says a colour, as those of all shapes do and those of a few emoji ("green book")."""
    return name.split()[0] in COLOURS


def nameable(library, split):
    """Sprites that a text may call for: of common things the first look, and the split's coloured shapes."""
    shapes = [n for n in library.names(split) if in_colour(n) and len(library.sprites[n]) == 2]
    common, known = (name.replace("_", " ") for name in COMMON.split()), library.names("train")
    return shapes, [name for name in common if name in known]


def tasks_of(shares):
    """{kind: its tasks, each as often as it is to be drawn}."""
    if shares is None:
        return TASKS
    return {
        kind: [task for task in dict.fromkeys(tasks) for _ in range(shares.get(task, 0))]
        for kind, tasks in TASKS.items()
    }


def draw_photo(rng, library, split, but=""):
    panoramas, textures = library.photos_of(split)
    if split == "train" and rng.random() < 0.25:
        return draw_leaves(rng, textures)
    photos = panoramas if panoramas and rng.random() < 0.7 else textures
    photo = pick(rng, [p for p in photos if p.name != but])
    return recoloured(rng, photo) if split == "train" and rng.random() < 0.6 else photo


def draw_sprite(rng, library, split, name):
    """A look of a name; in training sometimes one that nobody drew. A name that says a colour keeps it."""
    sprite = pick(rng, library.sprites[name])
    return recoloured(rng, sprite) if split == "train" and not in_colour(name) and rng.random() < 0.4 else sprite


def draw_scene(rng, library, split, frames, least=1):
    names = library.names(split)
    emoji = [n for n in names if not in_colour(n)] or names
    count = max(least, int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15])))
    chosen = []
    while len(chosen) < count:
        name = pick(rng, emoji if rng.random() < 0.75 else names)
        if name not in chosen:
            chosen.append(name)
    things = draw_things(rng, [draw_sprite(rng, library, split, name) for name in chosen], frames)
    photo = draw_photo(rng, library, split)
    return Scene(photo, draw_view(rng, photo, split), draw_camera(rng, frames), things)


def nameable_sprite(rng, library, split, without):
    shapes, common = nameable(library, split)
    while True:
        names = common if common and rng.random() < 0.6 else shapes
        sprite = library.sprites[pick(rng, names)][0]
        if sprite.name not in without:
            return sprite


def show_reference(rng, thing, size):
    """A picture (3, size, size) of a thing in another pose: turned, of another size, on white or a pale tone. Not
    mirrored: that would leave open which side is meant."""
    path = torch.tensor(
        [[*rng.uniform(-0.06, 0.06, 2), rng.uniform(0.6, 0.9), rng.uniform(-0.4, 0.4)]], dtype=torch.float32
    )
    layer = render_thing(replace(thing, path=path), torch.tensor([[0.0, 0.0, 1.0]]), size)[0]
    paper = (
        torch.ones(3, 1, 1)
        if rng.random() < 0.6
        else torch.tensor(rng.uniform(0.6, 1, 3), dtype=torch.float32).view(3, 1, 1)
    )
    return paper * (1 - layer[3:]) + layer[:3]


def draw_edit(library, split, seed, index, frames, size, shares=None):
    """Clip `index` of a data set: everything about it is drawn from (seed, split, index). shares: {task: how often}, of
    these tasks alone; None: as TASKS has them."""
    rng = np.random.default_rng([seed, split == "test", index])
    tasks = tasks_of(shares)
    kinds = [kind for kind in MIXTURE if tasks[kind]]
    kind = kinds[index % len(kinds)]
    task = pick(rng, tasks[kind])
    scene = draw_scene(rng, library, split, 1 if kind == "image" else frames)
    edit = Edit(kind, task, "", "", scene, scene)
    words = {"clip": "picture" if kind == "image" else "video"}
    if task == "style":
        edit.style = words["s"] = pick(rng, list(STYLES))
    elif task.startswith("background"):
        words["p"] = change_background(rng, edit, library, split, size)
    elif task in ("add", "subject_add"):
        words |= add_thing(rng, edit, library, split)
    else:
        words |= change_thing(rng, edit, library, split)
    if task.startswith("subject"):
        edit.ref = show_reference(rng, edit.target.things[edit.changed[1]], 2 * size)
    edit.wording = pick(rng, (HELD_WORDINGS if split == "test" else WORDINGS)[task])
    edit.prompt = edit.wording.format(**words)
    return edit


def redraw_edit(library, world, index):
    """Clip `index` of a data set as its world.json says that it is drawn: the same each time."""
    return draw_edit(library, world["split"], world["seed"], index, world["frames"], world["size"], world.get("tasks"))


def change_background(rng, edit, library, split, size):
    """A pattern that words describe, or a photograph with another view of it as the reference -> its name."""
    scene = edit.source
    if edit.task == "background":
        photo, view = pattern_photo(rng, split), (0.0, 0.0, 0.7, False)
    else:
        photo = draw_photo(rng, library, split, but=scene.photo.name)
        view = draw_view(rng, photo, split)
    edit.target = Scene(photo, view, scene.camera, scene.things)
    if edit.task == "background_ref":
        x, y, zoom = *rng.uniform(-0.08, 0.08, 2), rng.uniform(0.85, 1.0)
        camera = scene.camera[:1] * torch.tensor([1, 1, 0]) + torch.tensor([[x, y, zoom]], dtype=torch.float32)
        edit.ref = render_background(Scene(photo, view, camera, []), 2 * size)[0]
    return photo.name


def new_thing(rng, edit, library, split, path):
    """What an edit brings, which is nowhere in the scene -> the thing on a path, and what the instruction calls it."""
    present = [thing.sprite.name for thing in edit.source.things]
    if edit.task.startswith("subject"):  # the picture tells: any thing in any look, on either side
        name = pick(rng, [name for name in library.names(split) if name not in present])
        edit.new = draw_sprite(rng, library, split, name)
        return Thing(edit.new, path, bool(rng.integers(2))), name
    edit.new = nameable_sprite(rng, library, split, present)
    return Thing(edit.new, path), article(edit.new.name)


def add_thing(rng, edit, library, split):
    """Put a new thing at a place with a name, which others leave free -> the words for both."""
    scene, place = edit.source, pick(rng, list(PLACES))
    path = torch.tensor([*PLACES[place], 0.4, 0.0]).repeat(len(scene.camera), 1)
    thing, name = new_thing(rng, edit, library, split, path)
    others = [t for t in scene.things if ((t.path[:, :2] - path[:, :2]).norm(dim=1) > 0.3).all()]
    edit.source = replace(scene, things=others)
    edit.target = replace(scene, things=[*others, thing])
    edit.changed = (None, len(others))
    return {"w": place, "b": name}


def stands_out(things, which):
    """Where one of some things is, as seen from the others on the first frame: "on the left" of all, ..., or between."""
    places = torch.stack([thing.path[0, :2] for thing in things])
    ahead = places[which] - torch.cat([places[:which], places[which + 1 :]])
    sides = {
        "on the left": -ahead[:, 0],
        "on the right": ahead[:, 0],
        "at the top": -ahead[:, 1],
        "at the bottom": ahead[:, 1],
    }
    side, lead = max(((side, float(by.min())) for side, by in sides.items()), key=lambda found: found[1])
    return side if lead > 0.05 else "in the middle"


def change_thing(rng, edit, library, split):
    """Remove one of the things, or put a new one on its path -> the words for them. The new one stands upright at first
    and then turns as the old one does: how askew an old thing is cannot be told from one look at it. Where there are
    several, the words say which: always in the test split, whose things have names that training never heard, and
    three times in four in training, so that names count too."""
    things = list(edit.source.things)
    which = int(rng.integers(len(things)))
    old, edit.changed, words = things[which], (which, None), {"a": things[which].sprite.name}
    if len(things) > 1 and (split == "test" or rng.random() < 0.75):
        words["a"] += " " + stands_out(things, which)
    if edit.task == "remove":
        things.pop(which)
    else:
        path = old.path - old.path[:1] * torch.tensor([0, 0, 0, 1])
        things[which], words["b"] = new_thing(rng, edit, library, split, path)
        edit.changed = (which, which)
    edit.target = replace(edit.source, things=things)
    return words


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
    if edit.task in ("background", "background_ref"):
        share = 1 - sum(visible, torch.zeros_like(source[:, :1]))
    else:
        before, after = edit.changed
        share = sum(t[i] for t, i in ((touched, before), (touched_target, after)) if i is not None)
    source, target = to_uint8(source), to_uint8(target)
    region = (share[:, 0] > 1 / 512) | (source != target).any(dim=-1)  # a smaller share may still tip a rounding
    return source, target, region


# ------------------------------------------------------------------------------------------------ words for a scene


def describe(scene):
    """A caption of a scene in plain words."""
    things = " and ".join(article(t.sprite.name) for t in scene.things)
    place = "" if scene.photo.name.startswith("texture") else f" in front of {scene.photo.name}"
    return (things or "nothing") + place


def boxes(scene):
    """Per thing its box on the first frame, (x0, y0, x1, y1) in frame widths; things may leave the frame."""
    out = {}
    for thing in scene.things:
        x, y, size = (float(v) for v in thing.path[0, :3])
        zoom = float(scene.camera[0, 2])
        x, y = (x - float(scene.camera[0, 0])) * zoom + 0.5, (y - float(scene.camera[0, 1])) * zoom + 0.5
        half = size * zoom / 2
        out[thing.sprite.name] = [round(min(max(v, 0), 1), 3) for v in (x - half, y - half, x + half, y + half)]
    return out


# ------------------------------------------------------------------------------------------------ who reads them

SPECIAL_TOKENS = (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "vision_start", "vision_end", "image_pad",
    "video_pad",
)  # fmt: skip
QWEN = {
    "model_type": "qwen2_5_vl", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_hidden_layers": 4, "tie_word_embeddings": True, "max_position_embeddings": 4096,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}, "bos_token_id": None,
    "vision_config": {
        "depth": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "out_hidden_size": 192,
        "fullatt_block_indexes": [1, 3],
    },
}  # fmt: skip
VOCABULARY = 2048


def write_mllm_folder(folder, texts):
    """Train a tokenizer on `texts` (none: its words are bytes) and write it and the config of a small Qwen2.5-VL: what
    `MLLMEncoder.from_config` reads and a hub folder of Qwen's has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(f"<|{name}|>", special=True) for name in SPECIAL_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad", "eos": "im_end",
    }  # fmt: skip
    ids = {f"{ours}_token_id": tokenizer.token_to_id(f"<|{name}|>") for ours, name in names.items()}
    with whole_file(folder / "tokenizer.json") as path:
        tokenizer.save(str(path))
    write_text(folder / "config.json", json.dumps({**QWEN, **ids, "vocab_size": VOCABULARY}, indent=1))
