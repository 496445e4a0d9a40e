"""What is known of the data's files and rows, so that training need not open or encode them again.

    Shapes: path, size, time -> (frames, height, width, frames a second)           RUN/shapes.jsonl, CACHE/shapes.jsonl
    Cache: row, shape, prompt, what encodes it -> latents; context or vision tokens       CACHE/<hash>.safetensors

`write_cache` (python data.py cache) encodes what is absent; `CachedPairs` are `data.Pairs` read from it.
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import FILES, Pairs, digest, read_pair
from media import GRID, MediaError, measure, pad_reference, whole_file, write_text


class Shapes:
    """What every file looks like, measured once: shapes.jsonl of a run or cache, [path, size, time, shape or fault].

    A file whose size or time changed is measured again; nothing else is opened.
    """

    def __init__(self, *folders):
        self.known = {}
        for folder in filter(None, folders):
            path = Path(folder) / "shapes.jsonl"
            for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else ():
                name, *self.known[name] = json.loads(line)

    def measure(self, rows, ranks):
        """Make every file of `rows` known on all ranks, each of which measures its part."""
        mine = sorted({path for row in rows for path in row.files})[ranks.rank :: ranks.world]
        with ThreadPoolExecutor(8) as pool:
            bar = tqdm(pool.map(self.entry, mine), "read headers", len(mine), disable=not ranks.first, leave=False)
            for part in ranks.gathered([dict(zip(mine, bar))]):
                self.known |= part

    def entry(self, path):
        """[size, time, shape or fault] of a file; the size -1 of one that is not there."""
        try:
            found = os.stat(path)
            stamp = [found.st_size, found.st_mtime_ns]
        except OSError:
            stamp = [-1, -1]
        if self.known.get(path, ())[:2] == stamp:
            return self.known[path]
        try:
            return [*stamp, None if path.endswith(".parquet") else list(measure(path))]
        except MediaError as error:
            return [*stamp, str(error)]

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lines = (json.dumps([path, *entry]) + "\n" for path, entry in self.known.items())
        write_text(Path(folder) / "shapes.jsonl", "".join(lines))

    def of_row(self, row, kind):
        """(frames, height, width) that a row gives: the shorter of its files, the target's size; or why it has none."""
        found = [self.known[path][2] for path in row.files]
        if fault := next((shape for shape in found if isinstance(shape, str)), None):
            return fault
        (before, _, _, source_rate), (frames, height, width, rate) = found[:2]
        if min(height, width) < GRID:
            return f"{row.target}: is {width}x{height}, each side needs at least {GRID} pixels"
        if kind == "image":
            return 1, height, width
        shorter = min(before, frames)
        if 1 < shorter < 5:
            return f"{row.target}: has {shorter} frames; a clip needs at least 5; pictures go into {FILES['image']}"
        if source_rate and rate and before != frames:
            as_long = abs(before / source_rate - frames / rate) < 0.5
            if as_long and abs(source_rate / rate - 1) > 0.05:
                return f"{row.target}: has {rate:g} frames a second, its source {source_rate:g}: frames would not match"
        return shorter, height, width


class Cache:
    """Rows encoded once, in a folder, found by what they are made of: a file of tensors for each row, shape and part.

    parts: {"latents": ..., and "context" (of a frozen MLLM) or "seen" (of one that trains: the vision tower's tokens)};
    the values name what makes them: weights and settings. The name of a file is the hash of its part's value, of path,
    size and time of the row's files, of the shape and, for a context, of the prompt. So a row more or a word mended
    costs one file, and a file that changed is encoded anew.
    """

    def __init__(self, folder, shapes, parts, ref_shrink=1.0):
        self.folder, self.shapes, self.parts, self.ref_shrink = Path(folder), shapes, parts, ref_shrink

    def path(self, part, row, shape):
        files = [(path, *self.shapes.known[path][:2]) for path in row.files]
        words = row.prompt if part == "context" else None
        reference = [self.ref_shrink, row.ref] if row.ref else None
        name = digest([part, self.parts[part], files, reference, list(shape), words])
        return self.folder / f"{name}.safetensors"

    def absent(self, row, shape):
        """The parts of a row that are neither here nor known to be unreadable."""
        paths = {part: self.path(part, row, shape) for part in self.parts}
        return [part for part, path in paths.items() if not (path.is_file() or path.with_suffix(".txt").is_file())]

    def check(self, wanted):
        """ValueError unless every (row, shape) is here."""
        absent = [row for row, shape in wanted if self.absent(row, shape)]
        if absent:
            raise ValueError(
                f"{self.folder}: {len(absent)} of {len(wanted)} rows are new, changed, or encoded by other weights "
                f"or settings (the first: {absent[0].target}); run data.py cache again"
            )

    def write(self, part, row, shape, tensors):
        """tensors: {name: tensor}, or a text, the fault of the row."""
        path = self.path(part, row, shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(tensors, str):
            return write_text(path.with_suffix(".txt"), tensors)
        with whole_file(path) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def read(self, part, row, shape):
        path = self.path(part, row, shape)
        if path.with_suffix(".txt").is_file():
            raise MediaError(path.with_suffix(".txt").read_text())
        try:
            return load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{path}: {row.target}: not read from the cache ({error}); run data.py cache") from None


class CachedPairs(Pairs):
    """The same from a `Cache`: pictures are latents (C, T, h, w); seen is a context (L, D), or the mode and
    {name: (tokens of the vision tower (n, hidden), grid)}, or pictures for an encoder without one."""

    def __init__(self, tables, curriculum, cache):
        super().__init__(tables, curriculum, None)
        self.cache = cache

    def read(self, row, shape):
        latents = self.cache.read("latents", row, shape)
        pictures = tuple(latents.get(name) for name in ("target", "source", "ref"))
        if "context" in self.cache.parts:
            return pictures, self.cache.read("context", row, shape)["context"]
        found = self.cache.read("seen", row, shape)
        seen = {name: found[name] for name in ("source", "ref0") if name in found}
        for name in seen:
            if (grid := found.get(f"{name}.grid")) is not None:
                seen[name] = (seen[name], tuple(grid.tolist()))
        return pictures, ("ref" if row.ref else "image" if shape[0] == 1 else "video", seen)


@torch.no_grad()
def encode(model, stage, target, source, ref, chance):
    """Latents (C, T, h, w) of target, source and reference. The reference is shrunk by a factor between the stage's
    `ref_shrink` and 1, as `chance` in [0, 1) has it, and centred on white."""
    if ref is not None:
        ref = pad_reference(ref, target.shape[1:3], stage.ref_shrink + (1 - stage.ref_shrink) * chance)[None]
    device = model.vae.conv1.weight.device
    return tuple(None if x is None else model.encode_frames(x.to(device))[0] for x in (target, source, ref))


def cache_parts(config, files, stage, ranks):
    """What a cache of this stage holds, and what makes it: settings and weights (`Cache`)."""
    mllm, parts = config.mllm, {"latents": [asdict(config.vae), weights_print(files, "vae.")]}
    if stage.trains_mllm:
        eyes = [mllm.max_pixels, mllm.max_frames, mllm.max_ref_tokens]
        return parts | {"seen": [eyes, weights_print(files, "mllm.model.visual."), ranks.dtype]}
    return parts | {"context": [{**asdict(mllm), "folder": None}, weights_print(files, "mllm."), ranks.dtype]}


def weights_print(files, prefix):
    """Cheap fingerprint of the weights below a prefix: names, shapes and the first numbers of each."""
    found = []
    for name in sorted(name for name in files if name.startswith(prefix)):
        path, inner = files.places[name]
        file = files.open(path, "cpu")
        first = file.get_slice(inner)[:1] if hasattr(file, "get_slice") else file[inner][:1]
        found.append((name, files.shape(name), first.flatten()[:8].tolist()))
    return digest(found)


@torch.no_grad()
def write_cache(stage, ranks, model, cache, data):
    """Encode what the cache lacks, each rank its part; it can be interrupted. References are shrunk once."""
    mine = data.rows()[ranks.rank :: ranks.world]
    todo = [(row, shape, absent) for row, shape in mine if (absent := cache.absent(row, shape))]
    for row, shape, absent in tqdm(todo, desc="cache", unit="row", disable=not ranks.first):
        try:
            target, source, ref = read_pair(row, shape)
        except MediaError as error:
            report_bad(cache.folder, ranks, 0, [(row.target, str(error))])
            for part in absent:
                cache.write(part, row, shape, str(error))
            continue
        made = {}
        if "latents" in absent:
            latents = encode(model, stage, target, source, ref, random.Random(row.target).random())
            made["latents"] = {name: x for name, x in zip(("target", "source", "ref"), latents) if x is not None}
        mode, visuals = model.mllm.resize(source, ref)
        if "context" in absent:
            request = model.mllm.assemble(row.prompt, mode, visuals)
            made["context"] = {"context": model.mllm.encode([request])[0][0]}
        if "seen" in absent:
            made["seen"] = dict(visuals)
            if hasattr(model.mllm, "look"):
                request = model.mllm.assemble(row.prompt, mode, visuals)
                grids = {f"{name}.grid": torch.tensor(grid) for name, grid in request.grids.items()}
                made["seen"] = dict(zip(visuals, model.mllm.look([request]))) | grids
        for part, tensors in made.items():
            cache.write(part, row, shape, tensors)
    ranks.barrier()
    if ranks.first:
        print(f"{cache.folder}: {len(todo)} rows encoded on this rank, the others were there")


def report_bad(out, ranks, step, broken):
    """Append broken samples, (path, reason), to the run's bad.jsonl."""
    if broken and ranks.rank % ranks.sp == 0:
        with (Path(out) / "bad.jsonl").open("a") as file:
            file.write("".join(json.dumps({"step": step, "path": p, "reason": r}) + "\n" for p, r in broken))
