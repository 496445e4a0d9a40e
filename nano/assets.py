"""Emoji and panoramas from three npm packages -> assets.safetensors, index.json, LICENSES.txt."""

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from media import whole_file, write_text
from nano.world import SPRITE, WORDINGS

PACKAGES = {  # version, what the package says of its licence, checksum of the archive
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT; Fluent Emoji by Microsoft, MIT",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "emoji-datasource-google": ("16.0.0", "MIT; Noto Emoji by Google, Apache-2.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "@pmndrs/assets": ("1.7.0", "CC0-1.0; panoramas from Poly Haven, CC0",
        "152bd218a3390703f184f0c6ce16e73c8f0a87f32d38530d418a09d33d8208dc"),
}  # fmt: skip
NO_THINGS = "|".join(WORDINGS["no things"])  # a pattern for the Unicode names of what cannot stand in a scene


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
    image = F.interpolate(image[None], (SPRITE, SPRITE), mode="bilinear", antialias=True, align_corners=False)[0]
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
    if entry["category"] not in WORDINGS["categories"] or re.search(NO_THINGS, name):
        return None
    name = WORDINGS["emoji"].get(name, name.removesuffix(" face"))
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
    for place in WORDINGS["panoramas"]:
        text = panoramas.extractfile(f"package/hdri/{place}.exr.js").read().decode()
        photos.append(panorama_image(base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", text)[1])))
    with whole_file(folder / "assets.safetensors") as path:
        save_file({"sprites": torch.stack(sprites), "photos": torch.stack(photos)}, path)
    licences = (f"{name} {version}: {licence}\n" for name, (version, licence, _) in PACKAGES.items())
    write_text(folder / "LICENSES.txt", "".join(licences))
    told = {"sprites": index, "photos": [{"name": name} for name in WORDINGS["panoramas"].values()]}
    write_text(folder / "index.json", json.dumps(told, indent=0))  # last: its presence says that the folder is whole
    print(f"write       {folder}: {len(sprites)} sprites, {len(photos)} panoramas")
