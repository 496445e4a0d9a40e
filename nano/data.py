"""Packages in, clips out: emoji and panoramas from npm for the world to draw with; its clips as files: tables for
train.py, truth.jsonl with what was drawn, RefVIE-Bench's layout."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from media import EXACT_VIDEO_CODEC, read_clip, read_image, whole_file, write_image, write_text, write_video
from nano import world

FPS = 8
PACKAGES = {  # version, what the package says of its licence, checksum of the archive
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT; Fluent Emoji by Microsoft, MIT",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "emoji-datasource-google": ("16.0.0", "MIT; Noto Emoji by Google, Apache-2.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "@pmndrs/assets": ("1.7.0", "CC0-1.0; panoramas from Poly Haven, CC0",
        "152bd218a3390703f184f0c6ce16e73c8f0a87f32d38530d418a09d33d8208dc"),
}  # fmt: skip
NO_THINGS = "|".join(world.WORDINGS["no things"])  # a pattern for the Unicode names of what cannot stand in a scene


def fetch_package(name, folder):
    """An npm package's archive, fetched and checked -> an open tarfile; members are read, nothing is unpacked."""
    version, _, checksum = PACKAGES[name]
    archive = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        fetch = ["npm", "pack", "--silent", f"{name}@{version}"]
        if subprocess.run(fetch, cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise OSError(f"{' '.join(fetch)} failed; or put {archive.name} into {folder} yourself")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != checksum:
        raise ValueError(f"{archive}: not the archive whose licence was checked; delete it and try again")
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
    image = F.interpolate(image[None], (world.SPRITE,) * 2, mode="bilinear", antialias=True)[0]
    return (image.clamp(0, 1) * 255).round().byte()


def panorama_image(data):
    """An EXR panorama in linear light -> uint8 (3, H, W) as a camera would expose it."""
    light = decode_picture(data, "exr_pipe", "gbrpf32le").nan_to_num()
    bright = F.max_pool2d(light[None], 9, 1, 4)[0]
    lost = (light.amin(dim=0) <= 0) & (bright.amin(dim=0) > 0.5)  # lamps beyond half precision
    light = torch.where(lost, bright, light)
    light = light * 0.35 / (light + 1e-4).log().mean().exp()
    return ((light * (1 + light / 9) / (1 + light)).clamp(0, 1) ** (1 / 2.2) * 255).round().byte()


def plain_name(entry):
    """What a person calls an emoji, from its Unicode name; None for what is no thing."""
    name = entry["name"].lower().replace("\u2019", "'")
    if entry["category"] not in world.WORDINGS["categories"] or re.search(NO_THINGS, name):
        return None
    name = world.WORDINGS["emoji"].get(name, name.removesuffix(" face"))
    return name if len(name.split()) <= 3 else None


def fetch_assets(args):
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    fluent, noto, panoramas = (fetch_package(name, folder) for name in PACKAGES)
    entries = sorted(json.load(noto.extractfile("package/emoji.json")), key=lambda e: e["sort_order"])
    pictures = {Path(name).stem: name for name in fluent.getnames() if name.endswith(".webp")}
    found = [("fluent", fluent, "webp_pipe", e, pictures.get(e["unified"].lower())) for e in entries]
    found += [("noto", noto, "png_pipe", e, e["has_img_google"] and f"package/img/google/64/{e['image']}")
              for e in entries]  # fmt: skip
    sprites, index = [], []
    for look, archive, form, entry, picture in tqdm(found, desc="emoji"):
        name = plain_name(entry)
        if name and picture:
            sprites.append(sprite_image(archive.extractfile(picture).read(), form))
            index.append({"name": name, "look": f"{look} {entry['name'].lower()}"})
    photos = []
    for place in world.WORDINGS["panoramas"]:
        text = panoramas.extractfile(f"package/hdri/{place}.exr.js").read().decode()
        photos.append(panorama_image(base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", text)[1])))
    with whole_file(folder / "assets.safetensors") as path:
        save_file({"sprites": torch.stack(sprites), "photos": torch.stack(photos)}, path)
    licences = (f"{name} {version}: {licence}\n" for name, (version, licence, _) in PACKAGES.items())
    write_text(folder / "LICENSES.txt", "".join(licences))
    told = {"sprites": index, "photos": [{"name": name} for name in world.WORDINGS["panoramas"].values()]}
    write_text(folder / "index.json", json.dumps(told, indent=0))  # last: its presence says that the folder is whole
    print(f"write       {folder}: {len(sprites)} sprites, {len(photos)} panoramas")


class Clips:
    """Drawn and written one by one, by as many workers as one likes: clips[i] -> its line of truth.jsonl."""

    def __init__(self, out, settings, indices):
        self.out, self.settings, self.indices = out, settings, indices
        self.library = world.load_library(settings["assets"])

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        edit, size = world.redraw_edit(self.library, self.settings, self.indices[i]), self.settings["size"]
        source, target, mask = world.draw_frames(edit, size)
        stem, ending = f"{edit.kind}/{self.indices[i]:06d}", "png" if edit.kind == "image" else "mp4"
        names = {"src_video": f"{stem}_src.{ending}", "tgt_video": f"{stem}_tgt.{ending}"}
        for name, clip in zip(names.values(), (source, target)):
            if edit.kind == "image":
                write_image(self.out / name, clip[0])
            else:
                write_video(self.out / name, clip, FPS, None, EXACT_VIDEO_CODEC)
        if edit.ref is not None:
            names["ref_image"] = f"{stem}_ref.png"
            write_image(self.out / names["ref_image"], world.to_uint8(edit.ref))
        names["mask"] = f"{stem}_mask.png"
        write_image(self.out / names["mask"], mask.view(-1, size, 1).expand(-1, -1, 3).to(torch.uint8) * 255)
        return {
            "index": self.indices[i], "kind": edit.kind, "task": edit.task, "prompt": edit.prompt, **names,
            "source_caption": world.describe(edit.source),
            "target_caption": world.describe(edit.target) + (f", as {edit.style}" if edit.style else ""),
            "style": edit.style,
            "boxes": world.boxes(edit.source), "target_boxes": world.boxes(edit.target),
            "new": edit.new and {"name": edit.new.name, "look": edit.new.look},
            "photos": sorted({edit.source.photo.name, edit.target.photo.name}),
        }  # fmt: skip


def draw(out, settings, indices, workers):
    """Write clips under `out` -> their lines of truth.jsonl."""
    torch.set_num_threads(1)  # there are as many workers as cores
    for kind in world.TASKS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    workers = workers if workers > 1 else 0
    loader = DataLoader(Clips(out, settings, indices), None, num_workers=workers, collate_fn=dict)
    return list(tqdm(loader, desc="draw", unit="clip", mininterval=5))


def settings_of(args, split, clips):
    """What an example's index needs to be drawn again."""
    return {"assets": args.assets, "split": split, "seed": args.seed, "clips": clips, "frames": args.frames,
            "size": args.size, "fps": FPS}  # fmt: skip


def make_data(args):
    out, settings = Path(args.out), settings_of(args, args.split, args.clips)
    tables = {kind: out / f"{kind}.csv" for kind in world.TASKS}
    written = [*tables.values(), out / "truth.jsonl"]
    if any(path.exists() for path in written) and not (out / "world.json").exists():
        raise ValueError(f"{out}: refusing to replace its tables: they are not nano's; give another folder")
    world.load_library(args.assets)  # fails before anything is deleted
    for path in written:  # delete stale tables first: their pictures will be replaced
        path.unlink(missing_ok=True)
    rows = draw(out, settings, range(args.clips), args.workers)
    write_text(out / "world.json", json.dumps(settings))  # first: it says whose the tables are
    for kind, path in tables.items():
        if of_kind := [row for row in rows if row["kind"] == kind]:
            columns = ["src_video", "tgt_video", "prompt"] + ["ref_image"] * ("ref_image" in of_kind[0])
            with whole_file(path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([columns, *([row[column] for column in columns] for row in of_kind)])
    write_text(out / "truth.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"write       {len(rows)} clips, {out}/{', '.join(path.name for path in written if path.exists())}")


def make_bench(args):
    """Held-out reference cases in the layout of RefVIE-Bench: refvie_bench.yaml and the files it names."""
    out, every = Path(args.out), len(world.MIXTURE)
    indices = range(world.MIXTURE.index("ref_video"), args.items * every, every)
    rows = draw(out, settings_of(args, "test", args.items * every), indices, args.workers)
    items = [
        {"src_video": row["src_video"], "instruction": row["prompt"], "ref_img": row["ref_image"],
         "edit_type": row["task"].partition("_")[0]} for row in rows
    ]  # fmt: skip
    write_text(out / "refvie_bench.yaml", json.dumps(items, indent=1))  # JSON is YAML
    print(f"write       {len(items)} items, {out}/refvie_bench.yaml")


def read_truth(folder):
    path = Path(folder) / "truth.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: draw a world first, `python -m nano data {folder}`")
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_world(folder, split=None):
    """What the clips were drawn with. ValueError if they are of another split than asked."""
    settings = json.loads((Path(folder) / "world.json").read_text())
    if split not in (None, settings["split"]):
        raise ValueError(f"{folder} is of the {settings['split']} split: draw held-out cases with --split test")
    return settings


def read_frames(path):
    """uint8 (T, H, W, 3) of a clip or picture of the world, at its own size."""
    return read_clip(path, max_frames=10_000).frames if path.suffix == ".mp4" else read_image(path)[None]


def read_many(paths):
    """The frames of files, in their order, one thread per core: decoding releases the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read_frames, paths))


def read_case(folder, row):
    """Of a line of truth.jsonl the source, the truth, the reference or None, and the edited region bool (T, H, W)."""
    source, target = (read_frames(folder / row[name]) for name in ("src_video", "tgt_video"))
    ref = read_image(folder / row["ref_image"]) if "ref_image" in row else None
    return source, target, ref, read_image(folder / row["mask"])[..., 0].view(source.shape[:3]) > 127
