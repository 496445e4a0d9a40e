"""Figures of docs/curation.md: `python -m bench.curate truth DIR`, `python -m bench.curate scale DIR`.

truth: the classical models on clips of `python -m nano data DIR --split test`, whose truth is known.
scale: the bookkeeping with answers that rows bring along, and de-duplication of features that cluster, 768 wide.
"""

import argparse
import json
import random
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import curate
from curators import Rejected
from curators.classical import Classical, overlap, resized
from curators.pairs import hashed
from ledger import read_json_lines, write_json_lines
from media import read_image, resize, write_image
from metrics import as_float, psnr
from nano.world import load_library, redraw_edit, render, to_uint8
from parallel import pick_device
from report import table
from vlm import jpeg


def truth(folder, most=400):
    world, models, found = (
        json.loads((folder / "world.json").read_text()),
        Classical(None),
        {"subject": [], "background": []},
    )
    size, library, references = world["size"], load_library(world["assets"]), {}
    for row in tqdm(read_json_lines(folder / "truth.jsonl")[:most], desc="truth", mininterval=1):
        row["kind"] = "background" if row["task"].startswith("background") else "subject"
        edit, clips = redraw_edit(library, world, row["index"]), (folder / row["src_video"], folder / row["tgt_video"])
        if row["task"] in ("style", "remove") or row["kind"] == "background" and not edit.target.things:
            continue
        try:
            _, mask, row["key"], _ = models.ground(*clips, row)
            image = models.synthesize(*clips, mask, row)
        except Rejected:
            continue
        key = row["key"]
        if row["kind"] == "subject":  # where the things stand that the edit exchanges, the old one and the new
            scenes = [(scene, i) for scene, i in zip((edit.source, edit.target), edit.changed) if i is not None]
            seen = sum(render(scene, size)[2][i][key, 0] for scene, i in scenes) > 0.5
            found["subject"].append(overlap(resized(mask, [size] * 2), seen))
            references.setdefault((row["new"]["name"], row["new"]["look"]), image)
        else:  # the scene drawn without its things, where these stood
            true = to_uint8(render(replace(edit.target, things=[]), image.shape[0])[0])[key]
            hidden = resized(mask, image.shape[:2])
            found["background"].append(psnr(as_float(image[None]), as_float(true[None]), hidden[None]))
    (iou, ious), (db, dbs) = ((sum(values) / max(len(values), 1), len(values)) for values in found.values())
    images, again = list(references.values()), []  # every tenth once more, smaller, brighter and as a JPEG
    for image in images[::10]:
        small = resize(image[None], [max(8, round(side * 0.8)) for side in image.shape[:2]])[0]
        again.append(read_image("a JPEG", jpeg((small.float() * 1.04).clamp(0, 255).to(torch.uint8))))
    belongs, _ = curate.deduplicate(models.embed([*images, *again]), np.arange(len(images) + len(again)), 0.96)
    dropped = sum(kept != i for i, kept in enumerate(belongs))
    right = sum(belongs[len(images) + i] == 10 * i for i in range(len(again)))
    planted = f"{right / dropped:.3f}, {right / len(again):.3f}"
    return [
        ("classical models on the nano world", "found", "figure"),
        ("local edits: IoU of the mask with the edited things", ious, f"{iou:.3f}"),
        ("new backgrounds: PSNR where things stood", dbs, f"{db:.1f} dB"),
        ("duplicates, 10 % planted: precision, recall", len(images), planted),
    ]


def scale(folder, records=100_000, vectors=50_000, width=768):
    drawn, made = random.Random(0), folder / "made"
    for name in ("masks/0.png", "refs/0.jpg"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(made / name, torch.zeros(8, 8, 3, dtype=torch.uint8))

    def line(i):
        feature = curate.pack(F.normalize(torch.tensor([drawn.gauss(0, 1) for _ in range(8)]), dim=0))
        return {
            "id": hashed(str(i)), "name": "", "src_video": f"s/{i}.mp4", "tgt_video": f"t/{i}.mp4", "base": 0,
            "prompt": f"Replace the car with number {i}.", "kind": "subject", "edit_score": drawn.uniform(4, 10),
            "frames": 81, "height": 8, "width": 8, "mask": "masks/0.png", "key": 0, "box": [0, 0, 1, 1],
            "ref_image": "refs/0.jpg", "ref_size": [64, 64], "verdict": drawn.random() < 0.8, "feature": feature,
        }  # fmt: skip

    shards = [range(at, min(at + 1000, records)) for at in range(0, records, 1000)]
    for shard, numbers in enumerate(shards):
        write_json_lines(made / f"ledger/read/{shard:05d}.jsonl", map(line, numbers))
    told = {"bases": [str(made)], "shards": list(map(len, shards)), "stages": [], "settings": {"models": "classical"}}
    (made / "ledger/read.json").write_text(json.dumps(told))
    start = time.perf_counter()
    curate.main([str(made), "--out", str(folder / "out"), "--set", "duplicate=1", "page=1"])
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    normal = lambda seed, count: torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    centres = F.normalize(normal(0, -(-vectors // 20)), dim=1).repeat(20, 1)[:vectors]
    features = F.normalize(centres + normal(1, vectors) * 0.6 / width**0.5, dim=1)
    start = time.perf_counter()
    curate.deduplicate(features, np.arange(vectors), 0.99, device=pick_device(None))
    spent = time.perf_counter() - start
    return [
        ("scale", "figure"),
        (f"{records} records through all stages, answers brought along", f"{records / seconds:.0f} records/s"),
        ("its memory", f"{memory:.2f} GiB"),
        (f"de-duplication of {vectors} x {width} in clusters of 20", f"{spent:.0f} s"),
        ("the same for 3.7M, by the square of the number", f"{spent * (3.7e6 / vectors) ** 2 / 3600:.2f} h"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("truth", "scale"))
    parser.add_argument("folder", type=Path, help="truth: of python -m nano data; scale: an empty folder to work in")
    args = parser.parse_args()
    print(table({"truth": truth, "scale": scale}[args.what](args.folder.resolve())))
