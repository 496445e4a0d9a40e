"""Figures of docs/curation.md: `python -m bench.curate truth DIR`, `python -m bench.curate scale DIR`.

truth: the classical models on clips of `python -m nano data DIR --split test`, whose truth is known: masks are held
against the things themselves (old and new, as far as they are seen) and against every pixel that differs.
scale: the bookkeeping with answers that rows bring along, and de-duplication of features that cluster, 768 wide.
"""

import argparse
import json
import random
import resource
import time
from collections import Counter
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
    world, models = json.loads((folder / "world.json").read_text()), Classical(None)
    size, library, cases = world["size"], load_library(world["assets"]), Counter()
    local, background, references = [], [], {}
    for row in tqdm(list(read_json_lines(folder / "truth.jsonl"))[:most], desc="truth", mininterval=1):
        if row["task"] in ("style", "remove"):
            continue
        row["kind"] = "background" if row["task"].startswith("background") else "subject"
        source, target = folder / row["src_video"], folder / row["tgt_video"]
        region = read_image(folder / row["mask"])[..., 0].unflatten(0, (-1, size)) > 127
        if row["kind"] == "background" and region.all():
            continue  # nothing but background: no foreground to be found
        cases[row["kind"]] += 1
        try:
            _, mask, row["key"], _ = models.ground(source, target, row)
            image = models.synthesize(source, target, mask, row)
        except Rejected:
            continue
        edit, changed = redraw_edit(library, world, row["index"]), region[row["key"]]
        if row["kind"] == "subject":
            mask = resized(mask, [size] * 2)
            local.append((overlap(mask, outlines(edit, size, row["key"])), overlap(mask, changed)))
            references.setdefault((row["new"]["name"], row["new"]["look"]), image)
        else:
            background.append(hidden_psnr(edit, image, ~changed, row["key"]))
    if not references:
        raise ValueError(f"{folder}: none of its clips has a reference that could be made; draw more of them")
    precision, recall, number = find_planted(models, list(references.values()))
    (things, pixels), found = (sum(column) / len(local) for column in zip(*local)), (cases["subject"], len(local))
    psnr = sum(background) / max(len(background), 1)
    return [
        ("classical models on the nano world", "cases", "found", "figure"),
        ("local edits: IoU of the mask with the edited things", *found, f"{things:.3f}"),
        ("the same with all pixels that differ, soft shadows too", *found, f"{pixels:.3f}"),
        ("new backgrounds: PSNR where the foreground stood", cases["background"], len(background), f"{psnr:.1f} dB"),
        ("duplicates, 10 % planted: precision, recall", number, "", f"{precision:.3f}, {recall:.3f}"),
    ]  # fmt: skip


def outlines(edit, size, key):
    """Where the things that an edit exchanges are seen in frame `key`, the old one and the new: bool (size, size)."""
    seen = [render(scene, size)[2][i] for scene, i in zip((edit.source, edit.target), edit.changed) if i is not None]
    return sum(share[key, 0] for share in seen) > 0.5


def hidden_psnr(edit, image, place, key):
    """PSNR in dB, where `place` is true, of a background reference and the scene drawn without its things."""
    true = to_uint8(render(replace(edit.target, things=[]), image.shape[0])[0])[key]
    return psnr(as_float(image[None]), as_float(true[None]), place[None])


def find_planted(models, images):
    """Every tenth picture comes once more, smaller, brighter and as a JPEG -> precision, recall, number of pictures."""
    again = []
    for image in images[::10]:
        size = [max(8, round(side * 0.8)) for side in image.shape[:2]]
        brighter = (resize(image[None], size)[0].float() * 1.04).clamp(0, 255).to(torch.uint8)
        again.append(read_image("a JPEG", jpeg(brighter)))
    features = models.embed([*images, *again])
    belongs, _ = curate.deduplicate(features, np.arange(len(features)), 0.96)
    dropped = sum(kept != i for i, kept in enumerate(belongs))
    right = sum(belongs[len(images) + i] == 10 * i for i in range(len(again)))
    return right / max(dropped, 1), right / len(again), len(features)


def scale(folder, records=100_000, vectors=200_000, width=768):
    memory, drawn = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, random.Random(0)
    made, before = folder / "made", memory()
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
    told = {"read": {"bases": [str(made)], "shards": list(map(len, shards)), "stages": []},
            "settings": {"models": "classical"}}  # fmt: skip
    for name, value in told.items():
        (made / f"ledger/{name}.json").write_text(json.dumps(value))
    start, busy = time.perf_counter(), time.process_time()
    curate.main([str(made), "--out", str(folder / "out"), "--set", "duplicate=1", "page=1"])
    seconds, busy, peak = time.perf_counter() - start, time.process_time() - busy, memory()

    normal = lambda seed, *shape: torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))
    centres, noise = F.normalize(normal(0, -(-vectors // 20)), dim=1), normal(1, vectors) * 0.6 / width**0.5
    features, device = F.normalize(centres.repeat(20, 1)[:vectors] + noise, dim=1), pick_device(None)
    start = time.perf_counter()
    curate.deduplicate(features, np.arange(vectors), 0.99, device=device)
    spent = time.perf_counter() - start
    return [
        ("scale", "figure"),
        (f"{records} records through all stages, answers brought along", f"{records / seconds:.0f} records/s"),
        ("the same by CPU time; memory", f"{records / busy:.0f} records/s; {peak:.2f} GiB, {before:.2f} before"),
        (f"de-duplication of {vectors} x {width} in clusters of 20, {device}", f"{spent:.0f} s, {memory():.2f} GiB"),
        ("the same for 3.7M, by the square of the number", f"{spent * (3.7e6 / vectors) ** 2 / 3600:.2f} h"),
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("truth", "scale"))
    parser.add_argument("folder", type=Path, help="truth: of python -m nano data; scale: an empty folder to work in")
    args = parser.parse_args()
    print(table({"truth": truth, "scale": scale}[args.what](args.folder.resolve())))
