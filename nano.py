"""Train a small Kiwi-Edit from nothing, in a world whose truth is known: `python nano.py data OUT`, then `pretrain`.

    assets    emoji and panoramas, once                         -> a folder outside the repository
    data      clips of the world (world.py)                     -> mp4, png, image.csv, video.csv, ref_video.csv, truth.jsonl
    pretrain  a VAE, a Qwen2.5-VL and a text-to-video DiT, the stand-ins for what the paper starts from -> weights/
    (train.py runs the paper's three stages on these data and weights)
    ship      the last stage's checkpoint over those weights    -> weights/nano in bfloat16, example, model card
    eval      edits of held-out clips against their truth       -> eval.md, eval.json, sheet.png
    bench     held-out reference edits in RefVIE-Bench's layout -> refvie_bench.yaml for judge.py
    recipe    all of that as bash, for one H100 or two CPU cores -> stdout

What exists only because the real weights are 20 GB lives here and in world.py.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

EXAMPLES = """examples:
  python nano.py assets ../assets && python nano.py data ../nano_train --assets ../assets --clips 4000
  python nano.py data ../tiny --clips 8                 (shapes and textures alone: no asset is needed)
  python nano.py pretrain vae --data ../nano_train --out ../pre                           (then mllm, then dit)
  python nano.py eval --weights weights/nano --data ../nano_test --out ../report
"""


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="A small world to learn editing in.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("assets", help="fetch emoji and panoramas with npm (100 MB)").add_argument
    add("out", metavar="DIR", help="a folder, outside the repository or ignored by it")

    add = commands.add_parser("data", help="draw clips and write the three CSVs").add_argument
    add("out", metavar="OUT", help="a folder")
    add("--clips", type=positive, default=1000, help="images, videos and reference videos 2:1:1 (default %(default)s)")
    add("--split", choices=("train", "test"), default="train", help="default %(default)s")
    add("--tasks", nargs="+", type=task_share, metavar="TASK=N", help="these alone, and how often (default: local edits twice "
        "as often as a style or a background): style background change remove add subject subject_add background_ref")  # fmt: skip
    add("--workers", type=positive, default=2, help="processes; the files are the same (default %(default)s)")
    add_world(add)

    add = commands.add_parser("bench", help="draw held-out reference cases in RefVIE-Bench's layout").add_argument
    add("out", metavar="OUT", help="a folder")
    add("--items", type=positive, default=24, help="default %(default)s")
    add_world(add)

    add = commands.add_parser("pretrain", help="train the parts that Kiwi-Edit starts from").add_argument
    add("part", choices=("vae", "mllm", "dit"), help="in this order")
    add("--data", required=True, metavar="DIR", help="what `nano.py data` wrote")
    add("--out", required=True, metavar="DIR", help="states to resume from, and weights/ for `train.py --weights`")
    add(
        "--minutes",
        type=float,
        default=9,
        help="stop after so long with exit code 75; the next call goes on (default %(default)s)",
    )
    add("--steps", type=positive, help="of the whole training (default: 4000, 1000, 800)")
    add("--batch", type=positive, help="default: 16 stills or 8 clips, 16, 64")
    add("--seed", type=int, default=0, help="default %(default)s")

    add = commands.add_parser("ship", help="make a training checkpoint a folder of weights of its own").add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run of train.py, of which the last is taken, or a checkpoint's weights.safetensors",
    )
    add("--weights", required=True, metavar="DIR", help="what `pretrain` wrote, from which training started")
    add("--data", required=True, metavar="DIR", help="held-out clips, of the size that training saw")
    add(
        "--example",
        required=True,
        type=int,
        metavar="INDEX",
        help="the one that bare `python sample.py` edits (truth.jsonl)",
    )
    add("--steps", type=positive, default=2, help="denoising steps that the weights ask for (default %(default)s)")
    add(
        "--ref-guidance",
        type=float,
        default=1.0,
        metavar="G",
        help="how far they ask for references to be followed (default %(default)s: as trained)",
    )
    add("--made-by", required=True, metavar="TEXT", help='the machine, for the model card, e.g. "one H100"')
    add("--eval", metavar="DIR", help="what `eval` wrote, for the model card")
    add("--out", required=True, metavar="DIR", help="e.g. weights/nano")

    add = commands.add_parser("eval", help="measure weights on held-out cases whose truth is known").add_argument
    add("--weights", required=True, metavar="PATH", help="a folder with trained weights")
    add("--data", required=True, metavar="DIR", help="what `nano.py data --split test` wrote")
    add("--out", required=True, metavar="DIR", help="for eval.md, eval.json and sheet.png")
    add("--assets", metavar="DIR", help="default: where the data had them")
    add("--cases", type=positive, default=400, help="at most so many (default %(default)s)")
    add("--steps", type=positive, help="denoising steps (default: what the weights ask for)")
    add("--ref-guidance", type=float, metavar="G", help="how far references are followed (default: likewise)")

    add = commands.add_parser(
        "recipe", help='print the whole curriculum as bash: bash -c "$(python nano.py recipe cpu)"'
    ).add_argument
    add("machine", choices=("h100", "cpu"), help="the sizes: for one H100, or two CPU cores and 100 minutes")
    return parser.parse_args(argv)


def add_world(add):
    add("--assets", metavar="DIR", help="what `nano.py assets` filled (default: shapes and textures alone)")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--size", type=positive, default=64, help="pixels a side, a multiple of 32 (default %(default)s)")
    add("--frames", type=positive, default=9, help="4k + 1 (default %(default)s)")
    add("--fps", type=positive, default=8, help="default %(default)s")


def task_share(text):
    from world import TASKS

    task, _, share = text.partition("=")
    known = list(dict.fromkeys(task for tasks in TASKS.values() for task in tasks))
    if task not in known or not share.isdigit() or int(share) < 1:
        raise argparse.ArgumentTypeError(f"{text}: TASK=N, N at least 1 and TASK one of {' '.join(known)}")
    return task, int(share)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    parse_arguments()  # --help and slips of the pen answer before torch is there

import av
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from connectors import REFERENCE_HINT, SYSTEM_PROMPT, MLLMEncoder, num_tokens
from media import (
    EXACT_VIDEO_CODEC,
    pad_reference,
    read_clip,
    read_image,
    whole_file,
    whole_folder,
    write_image,
    write_text,
    write_video,
)
from model import PRESETS, FlowMatch, KiwiEdit, began_with, find_checkpoint, only_weights
from parallel import pick_device
from vae import VAE, chunks
from world import (
    MIXTURE,
    SPRITE,
    TASKS,
    boxes,
    describe,
    draw_edit,
    draw_frames,
    load_library,
    nameable,
    pick,
    read_index,
    redraw_edit,
    render,
    to_uint8,
    write_mllm_folder,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ assets

# npm packages: version, what their own text says of the licence, checksum of the archive.
PACKAGES = {
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT; Fluent Emoji by Microsoft, MIT",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "emoji-datasource-google": ("16.0.0", "MIT; Noto Emoji by Google, Apache-2.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "@pmndrs/assets": ("1.7.0", "CC0-1.0; panoramas from Poly Haven, CC0",
        "152bd218a3390703f184f0c6ce16e73c8f0a87f32d38530d418a09d33d8208dc"),
}  # fmt: skip
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
NOT_THINGS = (
    "clock face|symbol|sign$|globe|medal|calendar|envelope|chart|suit$|clinking|sunset over|sunrise|cityscape|bridge at|night with|"
    "milky way|foggy|fog$|silhouette|ceremony|fork and knife|tickets?$|playing card|arrow|battery$|pouring|speaker|placard|"
    "control knobs|level slider"
)
PLAIN_NAMES = {
    "automobile": "car", "delivery truck": "truck", "deciduous tree": "tree", "long drum": "drum", "closed book": "book",
    "basketball and hoop": "basketball", "house building": "house", "aubergine": "eggplant", "ear of maize": "corn", "black scissors": "scissors",
    "electric light bulb": "light bulb", "wrapped present": "present", "red apple": "apple", "slice of pizza": "pizza",
    "white medium star": "star", "black sun with rays": "sun", "gem stone": "gem", "lady beetle": "ladybug",
    "black telephone": "telephone", "spouting whale": "whale", "front-facing baby chick": "chick", "baby chick": "chick",
    "office building": "office block", "billiards": "billiard ball", "direct hit": "dartboard", "racing car": "race car",
    "mantelpiece clock": "clock", "headphone": "headphones", "optical disc": "compact disc", "hocho": "kitchen knife",
    "steaming bowl": "bowl of noodles", "cooked rice": "bowl of rice", "shortcake": "cake", "beer mug": "beer",
    "personal computer": "laptop", "mobile phone": "phone", "left-pointing magnifying glass": "magnifying glass",
    "right-pointing magnifying glass": "magnifying glass", "recreational vehicle": "camper van",
    "oncoming automobile": "car", "oncoming bus": "bus", "oncoming taxi": "taxi", "oncoming police car": "police car",
    "womans hat": "sun hat", "mans shoe": "brown shoe", "womans boots": "boot",
    "womans sandal": "sandal", "womans clothes": "blouse", "tram car": "tram", "cooking": "frying pan", "closed lock with key": "lock",
}  # fmt: skip
PLACES_SHOWN = {
    "apartment": "an empty apartment", "bridge": "a glass bridge", "city": "a city square", "dawn": "a rocky desert at dawn",
    "esplanade": "a shopping mall", "forest": "a forest", "hall": "a ballroom", "lab": "a machine room", "lobby": "a lobby",
    "night": "a field under the stars", "park": "a green meadow", "sky": "clouds above the sea", "studio": "a photo studio",
    "sunrise": "a meadow at sunrise", "sunset": "an old town square", "venice": "a seaside road", "warehouse": "a warehouse",
    "workshop": "a workshop",
}  # fmt: skip


def fetch_package(name, folder):
    """An npm package's archive, fetched by npm and checked -> an open tarfile, whose members are read, not unpacked."""
    version, _, checksum = PACKAGES[name]
    archive = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        if not shutil.which("npm"):
            raise FileNotFoundError(f"npm is not installed: install it, or put {archive.name} into {folder} yourself")
        done = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"npm pack {name}@{version}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != checksum:
        raise ValueError(f"{archive}: is not the archive that was checked for its licence; delete it and try again")
    return tarfile.open(archive)


def decode_picture(data, form, pixels):
    """Picture bytes -> float (C, H, W) of the pixel format's values."""
    with av.open(io.BytesIO(data), format=form) as container:
        frame = next(container.decode(video=0))
        return torch.from_numpy(frame.to_ndarray(format=pixels)).float().movedim(-1, 0)


def sprite_image(data, form):
    """An emoji's picture -> premultiplied uint8 (4, 128, 128)."""
    image = decode_picture(data, form, "rgba") / 255
    image = torch.cat([image[:3] * image[3:], image[3:]])
    image = F.interpolate(image[None], (SPRITE, SPRITE), mode="bilinear", antialias=True, align_corners=False)[0]
    return (image.clamp(0, 1) * 255).round().byte()


def panorama_image(data):
    """An EXR panorama with linear light -> uint8 (3, H, W) as a camera would expose it."""
    light = decode_picture(data, "exr_pipe", "gbrpf32le").nan_to_num()
    bright = F.max_pool2d(light[None], 9, 1, 4)[0]
    light = torch.where(
        (light.amin(dim=0) <= 0) & (bright.amin(dim=0) > 0.5), bright, light
    )  # lamps beyond half precision
    light = light * 0.35 / (light + 1e-4).log().mean().exp()
    return ((light * (1 + light / 9) / (1 + light)).clamp(0, 1) ** (1 / 2.2) * 255).round().byte()


def plain_name(entry):
    """What a person calls an emoji, from its Unicode name; None for what is no thing."""
    name = entry["name"].lower().replace("\u2019", "'")
    if entry["category"] not in CATEGORIES or re.search(NOT_THINGS, name):
        return None
    name = PLAIN_NAMES.get(name, name.removesuffix(" face"))
    return name if len(name.split()) <= 3 else None


def fetch_assets(args):
    """Fetch the packages and write assets.safetensors, index.json and LICENSES.txt to a folder."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    fluent, noto, panoramas = (fetch_package(name, folder) for name in PACKAGES)
    entries = json.load(noto.extractfile("package/emoji.json"))
    drawn = {Path(m.name).stem: m for m in fluent.getmembers() if m.isreg() and m.name.endswith(".webp")}
    sprites, index = [], []
    for look, archive, find, form in (
        ("fluent", fluent, lambda e: drawn.get(e["unified"].lower()), "webp_pipe"),
        (
            "noto",
            noto,
            lambda e: e["has_img_google"] and noto.getmember(f"package/img/google/64/{e['image']}"),
            "png_pipe",
        ),
    ):
        for entry in tqdm(sorted(entries, key=lambda e: e["sort_order"]), desc=look):
            name, member = plain_name(entry), find(entry)
            if name and member:
                sprites.append(sprite_image(archive.extractfile(member).read(), form))
                index.append({"name": name, "look": f"{look} {entry['name'].lower()}"})
    photos = []
    for place in PLACES_SHOWN:
        text = panoramas.extractfile(f"package/hdri/{place}.exr.js").read().decode()
        photos.append(panorama_image(base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", text)[1])))
    with whole_file(folder / "assets.safetensors") as path:
        save_file({"sprites": torch.stack(sprites), "photos": torch.stack(photos)}, path)
    write_text(
        folder / "LICENSES.txt",
        "".join(f"{name} {version}: {licence}\n" for name, (version, licence, _) in PACKAGES.items()),
    )
    told = {"sprites": index, "photos": [{"name": n} for n in PLACES_SHOWN.values()]}
    write_text(folder / "index.json", json.dumps(told, indent=0))  # last: its presence says that the folder is whole
    print(
        f"write       {folder}: {len(sprites)} sprites of {len({e['name'] for e in index})} names, {len(photos)} panoramas"
    )


# ------------------------------------------------------------------------------------------------ data


def write_example(out, library, world, index):
    """Draw clip `index` and write its files under `out` -> its line of truth.jsonl."""
    edit = redraw_edit(library, world, index)
    source, target, mask = draw_frames(edit, world["size"])
    still = edit.kind == "image"
    stem, ending = f"{edit.kind}/{index:06d}", "png" if still else "mp4"
    names = {"src_video": f"{stem}_src.{ending}", "tgt_video": f"{stem}_tgt.{ending}"}
    for name, clip in zip(names.values(), (source, target)):
        write_image(out / name, clip[0]) if still else write_video(
            out / name, clip, world["fps"], None, EXACT_VIDEO_CODEC
        )
    if edit.ref is not None:
        names["ref_image"] = f"{stem}_ref.png"
        write_image(out / names["ref_image"], to_uint8(edit.ref[None])[0])
    rows = mask.flatten(0, 1)[..., None].expand(-1, -1, 3).to(torch.uint8) * 255
    write_image(out / f"{stem}_mask.png", rows)
    return {
        "index": index, "kind": edit.kind, "task": edit.task, "prompt": edit.prompt, **names, "mask": f"{stem}_mask.png",
        "source_caption": describe(edit.source),
        "target_caption": describe(edit.target) + (f", as {edit.style}" if edit.style else ""), "style": edit.style,
        "boxes": boxes(edit.source), "target_boxes": boxes(edit.target),
        "new": edit.new and {"name": edit.new.name, "look": edit.new.look},
        "photos": sorted({edit.source.photo.name, edit.target.photo.name}),
    }  # fmt: skip


def write_share(out, world, indices):
    """A run of clips, on one thread: there are as many workers as cores."""
    torch.set_num_threads(1)
    return [write_example(out, load_library(world["assets"]), world, i) for i in indices]


def write_table(path, rows):
    """The clips of one kind as train.py reads them. Where there are none, no table: one that is there is of other clips."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    columns = ["src_video", "tgt_video", "prompt"] + ["ref_image"] * ("ref_image" in rows[0])
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def make_data(args):
    out = Path(args.out)
    tables = {kind: out / f"{kind}.csv" for kind in TASKS}
    others = [path.name for path in (*tables.values(), out / "truth.jsonl") if path.exists()]
    if others and not (out / "world.json").exists():
        raise ValueError(
            f"{out}: has {', '.join(others)} that nano.py did not write, and would replace: give another folder"
        )
    if args.assets is not None:
        read_index(args.assets)  # before workers start
    for kind in TASKS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    world = {  # what an example's index needs to be drawn again
        "assets": args.assets, "split": args.split, "seed": args.seed, "clips": args.clips, "frames": args.frames,
        "size": args.size, "fps": args.fps, "tasks": args.tasks and dict(args.tasks),
    }  # fmt: skip
    for path in (
        *tables.values(),
        out / "truth.jsonl",
    ):  # until all clips are drawn there are none: those that are there
        path.unlink(missing_ok=True)  # would tell of pictures that this world has replaced
    shares, rows = [range(i, min(i + 32, args.clips)) for i in range(0, args.clips, 32)], []
    with tqdm(total=args.clips, desc="draw", unit="clip", mininterval=5) as bar:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers > 1 else nullcontext() as pool:
            for written in (pool.map if pool else map)(partial(write_share, out, world), shares):
                rows += written
                bar.update(len(written))
    write_text(out / "world.json", json.dumps(world))  # first: it says whose the tables are
    for kind, path in tables.items():
        write_table(path, [row for row in rows if row["kind"] == kind])
    write_text(out / "truth.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(
        f"write       {len(rows)} clips, {out}/{''.join(f'{p.name}, ' for p in tables.values() if p.exists())}truth.jsonl"
    )


# ------------------------------------------------------------------------------------------------ pretraining


def read_truth(folder):
    path = Path(folder) / "truth.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: draw a world first, `python nano.py data {folder}`")
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_frames(path):
    """uint8 (T, H, W, 3) of a clip or picture of the world, at its own size."""
    return read_clip(path, max_frames=10_000).frames if path.suffix == ".mp4" else read_image(path)[None]


def read_many(paths, quiet=False):
    """The frames of files, in their order, read by as many threads as there are cores: decoding leaves Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(read_frames, paths), total=len(paths), desc="read", mininterval=5, disable=quiet))


class Trainer:
    """Float32 masters of a module whose forward and backward run in bfloat16, trained in pieces that resume.

    Muon updates the matrices (a convolution's kernels are rows of one), AdamW the rest: at 160 steps the VAE has 22.3 dB
    with it and 19.4 dB with AdamW alone, for an eighth more time.

    The learning rate rises over 2 % of the steps and falls as a cosine to 0 at the last, wherever pieces begin and end;
    step n draws its batch from (seed, n), so pieces and one long run are the same training.
    """

    def __init__(self, name, module, folder, steps, rate, seed, device):
        self.name, self.steps, self.rate, self.seed = name, steps, rate, seed
        self.path, self.step, self.seconds = Path(folder) / f"{name}.pt", 0, 0.0
        module.to(device)
        self.names, self.parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
        self.masters = [p.detach().float().flatten(1 if p.ndim > 1 else 0).clone() for p in self.parameters]
        matrices, rest = [], []
        for n, p, master in zip(self.names, self.parameters, self.masters):
            (matrices if is_matrix(n, p) else rest).append(master)
        self.optimisers = [
            torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, rate, (0.9, 0.98), weight_decay=0.01),
        ]
        if self.path.is_file():
            self.resume()
        for p, master in zip(self.parameters, self.masters):
            p.data = master.view_as(p).bfloat16()

    def resume(self):
        """Go on from the state in the file. ValueError where that is of another training."""
        state = torch.load(self.path, weights_only=True, map_location="cpu")  # where AdamW wants its step counts
        if list(state["masters"]) != list(self.names):
            raise ValueError(f"{self.path}: is of another model; give another --out or delete it")
        if state["seed"] != self.seed:
            raise ValueError(
                f"{self.path}: was begun with --seed {state['seed']}; go on with that, or give another --out"
            )
        if state["steps"] != self.steps:
            print(
                f"note        {self.path}: was begun as {state['steps']} steps, now {self.steps}: another learning rate from here on"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        for master, saved in zip(self.masters, state["masters"].values()):
            master.copy_(saved.view_as(master))

    def run(self, loss_of, minutes):
        """Steps, at least one, until `minutes` are over or all are done; the state is saved every minute, and the float32
        masters are in the module at the end. loss_of(generator) -> a scalar, and figures to show. -> whether all are done."""
        begin, first, shown, skipped = time.time(), self.step, {}, 0
        saved = begin
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5) as bar:
            while self.step < self.steps and (self.step == first or time.time() - begin < 60 * minutes):
                rising, done = (self.step + 1) / (0.02 * self.steps), self.step / self.steps
                for optimiser in self.optimisers:
                    optimiser.param_groups[0]["lr"] = self.rate * min(1, rising) * (1 + math.cos(math.pi * done)) / 2
                loss, figures = loss_of(torch.Generator().manual_seed(1_000_003 * self.seed + self.step))
                loss.backward()
                for p, master in zip(self.parameters, self.masters):
                    master.grad, p.grad = p.grad if p.grad is None else p.grad.float().reshape(master.shape), None
                norm = float(torch.nn.utils.clip_grad_norm_(self.masters, 1.0))
                self.step += 1
                bar.update()
                if not math.isfinite(norm):
                    skipped += 1
                    continue
                for optimiser in self.optimisers:
                    optimiser.step()
                for p, master in zip(self.parameters, self.masters):
                    p.data.copy_(master.view_as(p))
                for key, value in {"loss": loss.detach(), "norm": norm, **figures}.items():
                    shown[key] = 0.98 * shown.get(key, float(value)) + 0.02 * float(value)
                bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
                if time.time() - saved > 60:
                    saved = time.time()
                    self.save(saved - begin)
        self.save(time.time() - begin)
        for p, master in zip(self.parameters, self.masters):
            p.data = master.view_as(p).clone()
        figures = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
        print(
            f"{self.name:<11} step {self.step} of {self.steps}, {time.time() - begin:.0f} s, {skipped} skipped, {figures}"
        )
        return self.step == self.steps

    def save(self, seconds):
        """seconds: of this piece; the file adds them up."""
        masters = {n: m.view_as(p) for n, p, m in zip(self.names, self.parameters, self.masters)}
        state = {"step": self.step, "masters": masters, "optimisers": [o.state_dict() for o in self.optimisers]}
        state |= {"seed": self.seed, "steps": self.steps, "seconds": self.seconds + seconds}
        with whole_file(self.path) as path:
            torch.save(state, path)


def is_matrix(name, parameter):
    """Whether Muon may orthogonalise its updates: not a table of vectors, not a row."""
    table = "embed_tokens" in name or "modulation" in name
    return not table and parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) > 1


def load_trained(name, module, folder):
    """The weights that `pretrain NAME` has reached, into `module`. FileNotFoundError where it has not run."""
    path = Path(folder) / f"{name}.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python nano.py pretrain {name}` first")
    _, unexpected = module.load_state_dict(
        torch.load(path, weights_only=True, map_location="cpu")["masters"], strict=False
    )
    if unexpected:
        raise ValueError(f"{path}: is of another model ({unexpected[0]}, ...)")
    return module.eval().requires_grad_(False)


def rows_of(frames, wanted):
    """Clips of the wanted indices as one batch in [-1, 1], (B, 3, T, H, W)."""
    return torch.stack([frames[i] for i in wanted]).permute(0, 4, 1, 2, 3).float() * (2 / 255) - 1


def reconstruct(vae, video, generator):
    """Video through encoder, a sample of the posterior and decoder, not clamped -> (video, mean, log-variance)."""
    mean, log_variance = vae.moments(video, chunk=99)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    z = vae.conv2(mean + noise * (0.5 * log_variance.clamp(-20, 10)).exp(), {})
    state = {}
    parts = [vae.decoder.up(vae.decoder.bottom(z[:, :, a:b], state), state) for a, b in chunks(z.shape[2], 99)]
    return torch.cat(parts, dim=2), mean, log_variance


def start_vae(vae):
    """Weights from which few steps go far, in place: residual branches add nothing, so that the shortcuts carry the
    picture, and the posterior is narrow, so that the decoder sees it (after 160 steps of AdamW 18.7 dB instead of 16.7)."""
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".residual.6." in name or ".proj." in name:
                parameter.zero_()
        vae.conv1.bias[vae.config.z_dim :] -= 6


def vae_loss(video, output, mean, log_variance):
    """L1 and squared error of pixels, L1 of their differences in space and time, and a little KL; and the PSNR."""
    error = output.float() - video
    squared = error.square().mean()
    loss = error.abs().mean() + 5 * squared
    for axis in (2, 3, 4):
        if video.shape[axis] > 1:
            loss = loss + 0.25 * error.diff(dim=axis).abs().mean()
    mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + 1e-4 * divergence, {"psnr": -10 * (squared.detach() / 4).log10(), "kl": divergence.detach()}


def pretrain_vae(args, rows, device):
    """Reconstruction of the world's clips: still frames on three steps of four, whole clips on the fourth."""
    folder = Path(args.data)
    vae = VAE(nano_config(args).vae)
    start_vae(vae)
    trainer = Trainer("vae", vae, args.out, args.steps or 4000, 2e-3, args.seed, device)
    if trainer.step >= trainer.steps:
        rows = []  # nothing is read for nothing
    videos = read_many([folder / r[k] for r in rows if r["kind"] != "image" for k in ("src_video", "tgt_video")])
    stills = read_many([folder / r[k] for r in rows if r["kind"] == "image" for k in ("src_video", "tgt_video")])
    stills += [ref[:, ::2, ::2] for ref in read_many([folder / r["ref_image"] for r in rows if "ref_image" in r])]

    def loss_of(generator):
        clips = videos if trainer.step % 4 == 3 and videos else stills
        wanted = torch.randint(len(clips), (args.batch or (8 if clips is videos else 16),), generator=generator)
        video = rows_of(clips, wanted).to(device)
        if torch.randint(2, (), generator=generator):
            video = video.flip(4)
        return vae_loss(video, *reconstruct(vae, video.bfloat16(), generator))

    return trainer.run(loss_of, args.minutes)


GRID = 16  # grounding answers count sixteenths of the frame
CAPTION_TOKENS = 32


def nano_config(args, **vae_statistics):
    """The preset for the clips of --data, with the MLLM's folder under --out and the latents' mean and std where they are
    known."""
    nano, size = PRESETS["nano"], json.loads((Path(args.data) / "world.json").read_text())["size"]
    mllm = replace(nano.mllm, folder=str(Path(args.out) / "mllm"))
    if size > 64:  # frames would come down to 56x56 and up again to 336x336; from 112x112 they have more to show there
        mllm = replace(mllm, max_pixels=112 * 112)
    return replace(nano, vae=replace(nano.vae, **vae_statistics), mllm=mllm)


def conversation(rng, row):
    """What the MLLM is asked about a row and what it should answer -> (the clip's file, question, a reference's file or
    None, answer)."""
    kind = rng.random()
    if kind < 0.6:  # what Kiwi-Edit's system prompt asks for: the content, as the instruction would have it
        return row["src_video"], row["prompt"], row.get("ref_image"), row["target_caption"]
    side, column, places = pick(rng, (("source", "src_video", "boxes"), ("target", "tgt_video", "target_boxes")))
    clip, places = row[column], row[places]
    if kind < 0.8 or not places:
        return clip, "Describe this.", None, row[f"{side}_caption"]
    name = pick(rng, sorted(places))
    return clip, f"Where is the {name}?", None, " ".join(str(round(GRID * v)) for v in places[name])


def answer_loss(encoder, conversations):
    """conversations: (frames, question, reference or None, answer) each. -> next-token cross-entropy of the answers, and
    the share of tokens that are right: one forward for the batch, padded at the end, where causal attention never looks.
    """
    start, end = ([encoder.token(f"<|im_{which}|>")] for which in ("start", "end"))
    embed = encoder.model.language_model.embed_tokens
    requests = []
    for frames, question, ref, answer in conversations:
        inputs = encoder.prepare(question, frames, ref)
        turn = inputs.pieces[-1] + start + encoder.ids("assistant\n")  # pieces end with the queries and the turn's end
        requests.append(replace(inputs, pieces=[*inputs.pieces[:-2], turn, encoder.ids(answer) + end]))
    grids = [grid for request in requests for grid in request.grids.values()]
    pixels = torch.cat([p for request in requests for p in request.pixel_values.values()]).to(embed.weight)
    seen = encoder.model.visual(pixels, grid_thw=torch.tensor(grids, device=pixels.device)).pooler_output
    seen = iter(seen.split([num_tokens(grid) for grid in grids]))

    def embedded(piece):
        return next(seen) if isinstance(piece, str) else embed(torch.tensor(piece, device=pixels.device))

    rows = [torch.cat([embedded(piece) for piece in request.pieces]) for request in requests]
    positions = [encoder.position_ids(request)[:, 0].T for request in requests]  # (S, 3) each
    pad = torch.nn.utils.rnn.pad_sequence
    hidden = encoder.model.language_model(
        inputs_embeds=pad(rows, batch_first=True),
        position_ids=pad(positions, batch_first=True).permute(2, 0, 1).to(pixels.device),
        use_cache=False,
    ).last_hidden_state
    answers = [request.pieces[-1] for request in requests]
    before = [h[len(row) - len(answer) - 1 : len(row) - 1] for h, row, answer in zip(hidden, rows, answers)]
    logits = (torch.cat(before) @ embed.weight.T).float()
    wanted = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    return F.cross_entropy(logits, wanted), {"right": (logits.argmax(dim=1) == wanted).float().mean()}


def pretrain_mllm(args, rows, device):
    """Captions, captions of what an instruction asks for, and grounding, by next-token prediction."""
    if not (Path(args.out) / "mllm" / "config.json").is_file():
        texts = [row[key] for row in rows for key in ("prompt", "source_caption", "target_caption")]
        texts += [SYSTEM_PROMPT, REFERENCE_HINT, "system\nuser\nassistant\n"] * 100
        write_mllm_folder(Path(args.out) / "mllm", texts)
    encoder, folder = MLLMEncoder(nano_config(args).mllm), Path(args.data)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith("model."))
    trainer = Trainer("mllm", encoder, args.out, args.steps or 1000, 1e-3, args.seed, device)

    def loss_of(generator):
        rng = np.random.default_rng([args.seed, trainer.step])
        wanted = rng.integers(len(rows), size=args.batch or 16)
        clips, questions, refs, answers = zip(*(conversation(rng, rows[i]) for i in wanted))
        seen = iter(read_many([folder / name for name in (*clips, *filter(None, refs))], quiet=True))
        clips, refs = [next(seen) for _ in clips], [ref and next(seen)[0] for ref in refs]
        return answer_loss(encoder, list(zip(clips, questions, refs, answers)))

    return trainer.run(loss_of, args.minutes)


def caption_features(encoder, captions):
    """The MLLM's hidden states of captions, (B, CAPTION_TOKENS, hidden), zero after the end as Wan's T5 features are."""
    device = encoder.model.language_model.embed_tokens.weight.device
    ids = [encoder.ids(caption)[:CAPTION_TOKENS] for caption in captions]
    length = torch.tensor([len(row) for row in ids], device=device)
    padded = torch.tensor([row + [0] * (CAPTION_TOKENS - len(row)) for row in ids], device=device)
    hidden = encoder.model.language_model(input_ids=padded, use_cache=False).last_hidden_state
    return hidden * (torch.arange(CAPTION_TOKENS, device=device) < length[:, None])[..., None]


def encode_world(args, rows, device):
    """The posterior means of every target, made once per state of the VAE and the data. rows: {"still": [...], "video":
    [...]} -> tensors (N, z, t, h, w) of those that there are, in their order."""
    data, out = Path(args.data), Path(args.out)
    vae = load_trained("vae", VAE(nano_config(args).vae), out).to(device)
    made_of = hashlib.sha256((data / "world.json").read_bytes() + (data / "truth.jsonl").read_bytes())
    for name, value in vae.state_dict().items():
        made_of.update(name.encode() + value.float().cpu().numpy().tobytes())
    path = out / f"latents_{made_of.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        latents, at_once = {kind: [] for kind in rows if rows[kind]}, 32
        for kind, parts in latents.items():
            files = [data / row["tgt_video"] for row in rows[kind]]
            for i in tqdm(range(0, len(files), at_once), desc=f"encode {kind}", mininterval=5):
                frames = read_many(files[i : i + at_once], quiet=True)
                with torch.no_grad():
                    parts.append(vae.moments(rows_of(frames, range(len(frames))).to(device), chunk=99)[0].cpu())
        with whole_file(path) as temporary:
            save_file({kind: torch.cat(parts).contiguous() for kind, parts in latents.items()}, temporary)
    return load_file(path)


def pretrain_dit(args, rows, device):
    """Text to video: captions and clips of the world, by flow matching. Then the three parts become weights/."""
    rows = {"still": [r for r in rows if r["kind"] == "image"], "video": [r for r in rows if r["kind"] != "image"]}
    latents = encode_world(args, rows, device)
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents.values()], dim=1)
    mean, std = flat.mean(dim=1), flat.std(dim=1)
    model = KiwiEdit(nano_config(args, mean=tuple(mean.tolist()), std=tuple(std.tolist())))
    load_trained("vae", model.vae, args.out)
    load_trained("mllm", model.mllm, args.out).to(device)
    trainer = Trainer("dit", model.dit, args.out, args.steps or 800, 1e-3, args.seed, device)
    timesteps = FlowMatch().timesteps(1000)

    def loss_of(generator):
        kind = list(latents)[trainer.step % len(latents)]
        wanted = torch.randint(len(rows[kind]), (args.batch or 64,), generator=generator)
        clean = (latents[kind][wanted] - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
        clean = clean.to(device, torch.bfloat16)
        t = timesteps[torch.randint(1000, (len(wanted),), generator=generator)].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        with torch.no_grad():
            features = caption_features(model.mllm, [rows[kind][i]["target_caption"] for i in wanted])
        return model.training_loss(clean, model.dit.text_embedding(features.to(clean)), t, noise=noise), {}

    done = trainer.run(loss_of, args.minutes)
    model.save(Path(args.out) / "weights")
    print(f"write       {args.out}/weights: what train.py --weights starts from")
    return done


def pretrain(args):
    Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = pick_device()
    rows = read_truth(args.data)
    if not {"vae": pretrain_vae, "mllm": pretrain_mllm, "dit": pretrain_dit}[args.part](args, rows, device):
        sys.exit(75)  # the recipe's "call me again": sysexits' EX_TEMPFAIL


# ------------------------------------------------------------------------------------------------ evaluation

CANDIDATES = 20  # the right sprite among so many: chance is 5 %
ASKED = {  # before all training: dB gained on a copy inside the edited region, share of right objects
    "change": (6, 0.6), "add": (6, 0.6), "remove": (6, None), "background": (6, None), "style": (4, None),
    "subject": (None, 0.7),
}  # fmt: skip


def region_psnr(a, b, region):
    """PSNR in dB, at most 60, of uint8 (T, H, W, 3) where region (T, H, W) is true; nan where it is empty."""
    error = ((a.double() - b.double()) / 255).square().mean(dim=-1)[region].mean()
    return min(60.0, -10 * math.log10(max(float(error), 1e-6))) if region.any() else math.nan


def region_ssim(a, b, region, window=7):
    """SSIM of 7x7 windows whose middle lies in the region, averaged over windows and colours; nan where it is empty."""

    def smooth(x):
        return F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)

    a, b = (x.permute(0, 3, 1, 2).double() / 255 for x in (a, b))
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(ssim.mean(dim=1)[region].mean()) if region.any() else math.nan


def measure(result, target, region):
    return {
        f"{name}_{where}": metric(result, target, part)
        for name, metric in (("psnr", region_psnr), ("ssim", region_ssim))
        for where, part in (("in", region), ("out", ~region))
    }


def is_nearest(edit, sprites, result, region):
    """Whether the first of some sprites, drawn where the edit brought its own, comes closest to `result` in the region."""
    errors = []
    for sprite in sprites:
        things, after = list(edit.target.things), edit.changed[1]
        things[after] = replace(things[after], sprite=sprite)
        drawn = to_uint8(render(replace(edit.target, things=things), result.shape[1])[0])
        errors.append(float((drawn.double() - result.double()).square().mean(dim=-1)[region].mean()))
    return errors[0] == min(errors)


def recognise(edit, library, split, result, region, index):
    """Does one see what the edit asked for? {} where there is no telling, else {"right": bool} and, for a reference
    whose name has another look, {"look": bool}.

    right: of CANDIDATES things the one asked for is nearest; for a removal, the result is 6 dB nearer to the truth than
    to the source (noise is a little nearer too).
    look: the sprite that was shown is nearer than the other looks of its name.
    """
    if edit.task == "remove":
        source, target, _ = draw_frames(edit, result.shape[1])
        return {"right": region_psnr(result, target, region) >= region_psnr(result, source, region) + 6}
    if edit.new is None or not region.any():
        return {}
    rng = np.random.default_rng([7, index])
    names = library.names(split) if edit.ref is not None else [n for group in nameable(library, split) for n in group]
    others = [name for name in names if name != edit.new.name]
    others = [others[i] for i in rng.permutation(len(others))[: CANDIDATES - 1]]
    candidates = [edit.new] + [pick(rng, library.sprites[name]) for name in others]
    found = {"right": is_nearest(edit, candidates, result, region)}
    looks = [sprite for sprite in library.sprites[edit.new.name] if sprite.look != edit.new.look]
    if edit.ref is not None and looks:
        found["look"] = is_nearest(edit, [edit.new, *looks], result, region)
    return found


def evaluate_case(model, library, edit, split, folder, row):
    """One case, `edit` as it was drawn -> its measures by method, and a picture row (source, reference, edit, truth) of its middle frame."""
    source, target = (read_frames(folder / row[key]) for key in ("src_video", "tgt_video"))
    size = source.shape[1]
    region = read_frames(folder / row["mask"])[0, ..., 0].unflatten(0, (-1, size)) > 127
    ref = read_frames(folder / row["ref_image"])[0] if "ref_image" in row else None
    results = {"edit": model.edit(source, row["prompt"], ref, seed=row["index"]), "copy": source}
    if ref is not None:
        results["edit, no reference"] = model.edit(source, row["prompt"], seed=row["index"])
    results["ceiling"] = model.decode_frames(
        model.encode_frames(target)
    )  # what no edit in the VAE's latents can exceed
    measures = {
        method: measure(result, target, region) | recognise(edit, library, split, result, region, row["index"])
        for method, result in results.items()
    }
    shown = torch.full_like(source[0], 40) if ref is None else pad_reference(ref, (size, size))
    middle = len(source) // 2
    return measures, torch.cat([source[middle], shown, results["edit"][middle], target[middle]], dim=1)


def mean(values):
    """Of the numbers among the values; None where there are none."""
    values = [float(value) for value in values if value is not None and not math.isnan(value)]
    return sum(values) / len(values) if values else None


def summary(cases):
    """Means by task and method, nan left out, as a Markdown table."""
    columns = ("psnr_in", "ssim_in", "psnr_out", "ssim_out", "right", "look")
    lines = ["| task | method | cases | PSNR in | SSIM in | PSNR out | SSIM out | right object | shown look |"]
    lines.append("| --- " * 9 + "|")
    for task in dict.fromkeys(case["task"] for case in cases):
        of_task = [case["measures"] for case in cases if case["task"] == task]
        for method in of_task[0]:
            cells = []
            for column in columns:
                value = mean(m[method].get(column) for m in of_task)
                cells.append("" if value is None else f"{value:.2f}" if "_" in column else f"{value:.0%}")
            lines.append(f"| {task} | {method} | {len(of_task)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gained(measures):
    """Of some cases' measures, as text: dB nearer than a copy inside, dB lost to the ceiling outside, share right; "" where
    there is none."""
    inside = mean(m["edit"]["psnr_in"] - m["copy"]["psnr_in"] for m in measures)
    outside = mean(m["ceiling"]["psnr_out"] - m["edit"]["psnr_out"] for m in measures)
    right = mean(m["edit"].get("right") for m in measures)
    return f"{inside:+.1f} dB", "" if outside is None else f"{outside:.1f} dB", "" if right is None else f"{right:.0%}"


def goals(cases):
    """Per task what an edit should reach, as a Markdown table; in brackets what was ASKED."""
    columns = ("task", "edit - copy, inside", "ceiling - edit, outside", "right object", "reference - none, inside")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for task in dict.fromkeys(case["task"] for case in cases):
        of_task = [case["measures"] for case in cases if case["task"] == task]
        inside, outside, right = gained(of_task)
        without = [m for m in of_task if "edit, no reference" in m]
        shown = mean(m["edit"]["psnr_in"] - m["edit, no reference"]["psnr_in"] for m in without)
        asked_in, asked_right = ASKED.get(task, (None, None))
        cells = [
            inside + (f" (asked {asked_in:+})" if asked_in else ""),
            outside and f"{outside} (asked at most 3)",
            right + (f" (asked {asked_right:.0%})" if right and asked_right else ""),
            "" if shown is None else f"{shown:+.1f} dB (asked more than 0)",
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_wording(cases):
    """How well each sentence is understood, as a Markdown table; none of them was in training."""
    lines = [
        "| task | wording | cases | edit - copy, inside | ceiling - edit, outside | right object |",
        "| --- " * 6 + "|",
    ]
    for task, wording in sorted({(case["task"], case["wording"]) for case in cases}):
        of = [case["measures"] for case in cases if (case["task"], case["wording"]) == (task, wording)]
        lines.append(f"| {task} | {wording} | {len(of)} | {' | '.join(gained(of))} |")
    return "\n".join(lines) + "\n"


def read_world(folder):
    """What held-out clips were drawn with. ValueError where they are none."""
    world = json.loads((Path(folder) / "world.json").read_text())
    if world["split"] != "test":
        raise ValueError(f"{folder} is of the {world['split']} split: draw held-out cases with --split test")
    return world


def evaluate(args):
    """Edit held-out cases and compare with the known truth: eval.json, eval.md, sheet.png under --out."""
    folder, out = Path(args.data), Path(args.out)
    rows, world = read_truth(folder)[: args.cases], read_world(folder)
    library = load_library(world["assets"] if args.assets is None else args.assets)
    model = KiwiEdit.from_pretrained(args.weights, pick_device(), torch.float32)
    asked = {name: value for name in ("steps", "ref_guidance") if (value := getattr(args, name)) is not None}
    model.config = replace(model.config, **asked)
    out.mkdir(parents=True, exist_ok=True)
    cases, pictures = [], {}
    for row in tqdm(rows, desc="eval", mininterval=5):
        edit = redraw_edit(library, world, row["index"])
        measures, picture = evaluate_case(model, library, edit, world["split"], folder, row)
        task = "subject" if row["task"] == "subject_add" else row["task"]
        told = {"task": task, "wording": edit.wording, "prompt": row["prompt"]}
        cases.append({"index": row["index"], "kind": row["kind"], **told, "measures": measures})
        pictures.setdefault(task, []).append(picture)
    table = f"{summary(cases)}\n{goals(cases)}\n{by_wording(cases)}"
    settings = {"digest": digest_of(model)} | {name: getattr(model.config, name) for name in ("steps", "ref_guidance")}
    write_text(
        out / "eval.json", json.dumps({"weights": args.weights, "world": world, **settings, "cases": cases}, indent=0)
    )
    write_text(out / "eval.md", table)
    sheet = [
        torch.cat([*shown[:4], *[torch.zeros_like(shown[0])] * (4 - len(shown))], dim=1) for shown in pictures.values()
    ]
    write_image(out / "sheet.png", torch.cat(sheet).repeat_interleave(2, 0).repeat_interleave(2, 1))
    print(
        f"{table}write       {out}/eval.md, eval.json, sheet.png (source | reference | edit | truth, four cases a task)"
    )


# ------------------------------------------------------------------------------------------------ shipping

CARD = """# nano

A Kiwi-Edit of {millions:.1f} million parameters, {megabytes:.1f} MB in bfloat16, trained from nothing by this repository
in a world that it draws itself. It shows on any computer that the model, the training and the curriculum work. It is
not an editor for real clips.

It knows clips of {frames} frames of {size}x{size} at {fps} a second. `python sample.py` edits the bundled example, number
{example} of the held-out clips, chosen among them by us: "{prompt}" An edit takes {steps} denoising steps unless told
otherwise; more are sharper and farther from the truth. Its guidance by references is {ref_guidance:g}
(`--ref-guidance`; 1 is none): above 1 shown things are easier to recognise and their pixels farther from the truth.

Parameters: {parts}.

## Training

Clips of the three stages: {seen}. Batches depend on the seeds, not on the pieces in which a phase was run.

Trained on: {made_by}

| phase | seed | steps | samples | seconds |
| --- | --- | --- | --- | --- |
{phases}

## Evaluation

`nano.py eval` on clips whose objects, photographs and wordings were held out; a model of another size of clip, or
another evaluation, has other figures. "Ceiling" is the truth through this model's own VAE.

{evaluation}

## What it cannot do

- Real clips: it has seen emoji, coloured shapes, twelve styles, panoramas, textures and heaps of leaves, and nothing
  else. It takes any clip, shrinks it to about {size}x{size} pixels, and edits it badly.
- Words beyond those of `world.py`: what a text may call for are 65 common things and pairs of a colour and a shape.
- Names: of several things it changes the one whose place the words say ("the bell on the left"), not the one they name.
- References are single sprites on a plain ground, or views. Objects do not turn in depth or deform.
- `eval` compares with one truth: a right edit that looks otherwise is counted wrong.

## Licences

The training clips are drawn from these packages, whose licences allow it (and from shapes and textures drawn by
`world.py`); nothing of them is in this folder but the clip and the picture of the example.

{licences}

## To make such weights

`python nano.py recipe MACHINE` prints the whole curriculum as bash, from no data to weights that are measured, at the
sizes for two CPU cores (64x64x9) or for one H100 (128x128x17, in pieces of at most nine minutes). Given again, it goes on
where it stopped. README says what the first reaches. On an H100 nobody has run the
second yet: its steps, and the 25 minutes they should take there, are estimates.

```bash
bash -c "$(python nano.py recipe cpu)"
bash -c "$(python nano.py recipe h100)"
```
"""
RECIPE = """set -e
[ -f ../assets/index.json ] || python nano.py assets ../assets
[ -f {out}/clips/truth.jsonl ] || python nano.py data {out}/clips --assets ../assets --clips {clips} --size {size} --frames {frames} --workers {cores}
[ -f {out}/stills/truth.jsonl ] || python nano.py data {out}/stills --assets ../assets --clips {stills} --size {size} --frames 1 --seed 1 --workers {cores}
[ -f {out}/test/truth.jsonl ] || python nano.py data {out}/test --assets ../assets --clips 400 --split test --size {size} --frames {frames} --workers {cores}
pretrain() {{ until python nano.py pretrain "$@" --data {out}/clips --out {out}/pre --minutes {minutes}; do test $? = 75; done; }}
pretrain vae --steps {vae}
pretrain mllm --steps {mllm}
pretrain dit --steps {dit}
all="--config nano --data {out}/clips {out}/stills"
CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 torchrun --nproc-per-node {cores} train.py --stage 3 $all --weights {out}/pre/weights --write-cache {out}/cache --out {out}/cache
stage() {{ until timeout {minutes}m python train.py $all --cache {out}/cache --workers {loaders} --no-checkpointing --dtype bfloat16 --parallel fsdp --resume auto "$@"; do test $? = 124; done; }}
stage --stage 1 --weights {out}/pre/weights --out {out}/runs/1 --set steps={stage1} {batch} {optimizer}
stage --stage 2 --weights {out}/runs/1 --out {out}/runs/2 --set steps={stage2} {batch} {optimizer} {few}
stage --stage 3 --weights {out}/runs/2 --out {out}/runs/3 --set steps={stage3} {batch} {optimizer} {few} image=2 video=1 ref=2
ship() {{ python nano.py ship {out}/runs/3 --weights {out}/pre/weights --data {out}/test --made-by "{machine}" --out {out}/nano "$@"; }}
ship --example 2
python nano.py eval --weights {out}/nano --data {out}/test --out {out}/report
ship --example 2 --eval {out}/report
echo "$((SECONDS / 60)) minutes\""""
MACHINES = {
    # in pieces of at most nine minutes, as GPUs are lent
    "h100": dict(
        machine="one H100", out="../nano128", size=128, frames=17, clips=8000, stills=24000, cores=16, loaders=12,
        minutes=9, vae=4000, mllm=2000, dit=3000, stage1=600, stage2=2000, stage3=2000,
        batch="global_batch=64 batch=64", optimizer="lr=1e-3 warmup=50 schedule=cosine beta2=0.98 optimizer=muon",
    ),
    "cpu": dict(
        machine="two CPU cores", out="../nano64", size=64, frames=9, clips=4000, stills=16000, cores=2, loaders=1,
        minutes=60, vae=2500, mllm=400, dit=250, stage1=200, stage2=700, stage3=1900,
        batch="global_batch=32 batch=32", optimizer="lr=2e-3 warmup=20 schedule=cosine beta2=0.98 optimizer=muon",
    ),
}  # fmt: skip


def recipe(args):
    """Print the whole curriculum: from no data and no weights to weights that are measured. Given again, it goes on where
    it stopped: pretraining where it was saved last, training after its last checkpoint."""
    # for edits in two steps the noisy timesteps matter, and the small places that an edit changes
    print(RECIPE.format(few="shift=20 weighting=none balance=true", **MACHINES[args.machine]))


def ship(args):
    """A training checkpoint over what it started from, LoRA merged, in bfloat16, with an example and a model card: the
    folder that sample.py takes. The same arguments write the same bytes."""
    checkpoint, data, out = Path(args.checkpoint), Path(args.data), Path(args.out)
    if checkpoint.is_dir() and (found := find_checkpoint(checkpoint)):
        checkpoint = found / "weights.safetensors"
        print(f"ship        {checkpoint}")
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no such file; give a run of train.py, or the weights.safetensors of a train.py checkpoint"
        )
    only_weights(out, also=("example", "MODEL_CARD.md"))
    row, world = find_example(data, args.example), read_world(data)
    phases, seen = phases_of(checkpoint, Path(args.weights)), clips_seen(checkpoint, Path(args.weights))
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=args.weights)
    clip = world["frames"], world["size"], world["size"], world["fps"]
    model.config = replace(model.config, trained=clip, steps=args.steps, ref_guidance=args.ref_guidance)
    evaluation = read_evaluation(args.eval, model) if args.eval else "Not evaluated yet.\n"
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    with whole_folder(out) as folder:
        model.to(torch.bfloat16).save(folder)
        (folder / "example").mkdir()
        shutil.copyfile(data / row["src_video"], folder / "example" / "source.mp4")
        if "ref_image" in row:
            shutil.copyfile(data / row["ref_image"], folder / "example" / "reference.png")
        (folder / "example" / "prompt.txt").write_text(row["prompt"] + "\n")
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        card = CARD.format(
            millions=sum(parts.values()) / 1e6, parts=", ".join(f"{name} {count:,}" for name, count in parts.items()),
            megabytes=total / 1e6, **world, example=args.example, steps=args.steps, ref_guidance=args.ref_guidance,
            prompt=row["prompt"], made_by=args.made_by, seen=seen, phases="\n".join(phases), evaluation=evaluation.rstrip(),
            licences="\n".join(f"- {name} {version}: {text}" for name, (version, text, _) in PACKAGES.items()),
        )  # fmt: skip
        (folder / "MODEL_CARD.md").write_text(card)
    print(f"write       {out}: {(total + len(card.encode())) / 1e6:.1f} MB")


def digest_of(model):
    """A fingerprint of a model's weights as they are shipped, in bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_evaluation(folder, model):
    """What `eval` found, as text. ValueError where that was another model, or this one asked for other edits."""
    made = json.loads((Path(folder) / "eval.json").read_text())
    if made.get("digest") != digest_of(model) or any(
        made[name] != getattr(model.config, name) for name in ("steps", "ref_guidance")
    ):
        raise ValueError(
            f"--eval {folder}: measured other weights ({made['weights']}), steps or guidance; measure these by `nano.py eval`"
        )
    return (Path(folder) / "eval.md").read_text()


def find_example(data, index):
    """The row of a held-out clip. ValueError where it is none."""
    row = next((row for row in read_truth(data) if row["index"] == index), None)
    if row is None or row["kind"] == "image":
        raise ValueError(f"--example {index}: is not the index of a video in {data}/truth.jsonl")
    return row


def phases_of(checkpoint, weights):
    """What was trained before and up to a checkpoint, as rows of a table, as far as its files are still there. Weights
    that were shipped themselves bring the rows of their own card."""
    rows = []
    for part in ("vae", "mllm", "dit"):
        if (path := weights.parent / f"{part}.pt").is_file():
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            rows.append(f"| pretrain {part} | {state['seed']} | {state['step']} | | {state['seconds']:.0f} |")
    if (card := weights / "MODEL_CARD.md").is_file():
        rows += [line for line in card.read_text().splitlines() if line.startswith(("| pretrain ", "| train.py "))]
    for folder, begun in reversed(list(checkpoints_before(checkpoint.parent))):
        counts = json.loads((folder / "train.json").read_text())["counts"]
        cells = begun["seed"], counts["step"], counts["samples"], round(counts["seconds"])
        rows.append(f"| train.py stage {begun['stage']} | {' | '.join(map(str, cells))} |")
    return rows


def checkpoints_before(folder):
    """(A training checkpoint's folder, what its run began with), then the last one of the run it started from, and so on."""
    while (folder / "train.json").is_file():
        begun = began_with(folder.parent)
        yield folder, begun
        started = Path(begun["weights"] or "")
        folder = max(started.glob("step-*"), default=started)


def clips_seen(checkpoint, weights):
    """How the clips of a training were drawn, the last ones first, as far as that is recorded; of weights that were
    shipped themselves what their card says."""
    told = [
        how_drawn(Path(data) / "world.json")
        for _, begun in checkpoints_before(checkpoint.parent)
        for data in begun["data"]
    ]
    if (card := weights / "MODEL_CARD.md").is_file():
        for seen in re.findall(r"Clips of the three stages: (.*?)\. Batches", card.read_text(), re.DOTALL):
            told += seen.split(", ")
    return ", ".join(dict.fromkeys(told)) or "not recorded"


def how_drawn(path):
    """A world.json as the command that wrote it."""
    if not path.is_file():
        return "others not recorded"
    made = json.loads(path.read_text())
    tasks = "".join(f" {task}={n}" for task, n in (made.get("tasks") or {}).items())
    return f"{made['clips']} of `nano.py data --seed {made['seed']} --frames {made['frames']}{' --tasks' * bool(tasks)}{tasks}`"


# ------------------------------------------------------------------------------------------------ RefVIE-Bench's layout


def make_bench(args):
    """Held-out reference cases in the layout of RefVIE-Bench: refvie_bench.yaml, videos/, refs/."""
    out = Path(args.out)
    for name in ("videos", "refs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    library, lines, index = load_library(args.assets), [], MIXTURE.index("ref_video")
    while len(lines) < args.items:
        edit = draw_edit(library, "test", args.seed, index, args.frames, args.size)
        name = f"{len(lines):03d}"
        source = draw_frames(edit, args.size)[0]
        write_video(out / "videos" / f"{name}_src.mp4", source, args.fps, None, EXACT_VIDEO_CODEC)
        write_image(out / "refs" / f"{name}.png", to_uint8(edit.ref[None])[0])
        kind = "background" if edit.task == "background_ref" else "subject"
        lines.append(
            f"- src_video: videos/{name}_src.mp4\n  instruction: {json.dumps(edit.prompt)}\n"
            f"  ref_img: refs/{name}.png\n  edit_type: {kind}\n"
        )
        index += len(MIXTURE)
    write_text(out / "refvie_bench.yaml", "".join(lines))
    print(f"write       {len(lines)} items, {out}/refvie_bench.yaml")


def main(argv=None):
    args = parse_arguments(argv)
    if args.command in ("data", "bench") and (args.size % 32 or args.frames % 4 != 1):
        raise ValueError(f"--size {args.size} --frames {args.frames}: a multiple of 32, and 4k + 1 (5, 9, 17, ...)")
    commands = {
        "assets": fetch_assets,
        "data": make_data,
        "bench": make_bench,
        "pretrain": pretrain,
        "ship": ship,
        "eval": evaluate,
        "recipe": recipe,
    }
    commands[args.command](args)


def run():
    """main, with every foreseeable failure as one line on stderr and an exit code that is not 0."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nnano.py: interrupted; pretraining goes on from its last minute, everything else begins anew")
    except (ValueError, OSError) as error:
        sys.exit(f"nano.py: {error}")


if __name__ == "__main__":
    run()
