"""Clips of the world as files: tables for train.py, truth.jsonl with what was drawn, RefVIE-Bench's layout."""

import csv
import json
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from media import EXACT_VIDEO_CODEC, read_clip, read_image, whole_file, write_image, write_text, write_video
from nano import world


def write_example(out, library, settings, index):
    """Draw clip `index` and write its files under `out` -> its line of truth.jsonl."""
    edit = world.redraw_edit(library, settings, index)
    source, target, mask = world.draw_frames(edit, settings["size"])
    still, stem = edit.kind == "image", f"{edit.kind}/{index:06d}"
    ending = "png" if still else "mp4"
    names = {"src_video": f"{stem}_src.{ending}", "tgt_video": f"{stem}_tgt.{ending}"}
    for name, clip in zip(names.values(), (source, target)):
        if still:
            write_image(out / name, clip[0])
        else:
            write_video(out / name, clip, settings["fps"], None, EXACT_VIDEO_CODEC)
    if edit.ref is not None:
        names["ref_image"] = f"{stem}_ref.png"
        write_image(out / names["ref_image"], world.to_uint8(edit.ref[None])[0])
    rows = mask.flatten(0, 1)[..., None].expand(-1, -1, 3).to(torch.uint8) * 255
    write_image(out / f"{stem}_mask.png", rows)
    return {
        "index": index, "kind": edit.kind, "task": edit.task, "prompt": edit.prompt, **names,
        "mask": f"{stem}_mask.png",
        "source_caption": world.describe(edit.source),
        "target_caption": world.describe(edit.target) + (f", as {edit.style}" if edit.style else ""),
        "style": edit.style,
        "boxes": world.boxes(edit.source), "target_boxes": world.boxes(edit.target),
        "new": edit.new and {"name": edit.new.name, "look": edit.new.look},
        "photos": sorted({edit.source.photo.name, edit.target.photo.name}),
    }  # fmt: skip


def write_share(out, settings, indices):
    """A run of clips, on one thread: there are as many workers as cores."""
    torch.set_num_threads(1)
    return [write_example(out, world.load_library(settings["assets"]), settings, i) for i in indices]


def write_table(path, rows):
    """The clips of one kind as train.py reads them."""
    columns = ["src_video", "tgt_video", "prompt"] + ["ref_image"] * ("ref_image" in rows[0])
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def make_data(args):
    out = Path(args.out)
    tables = {kind: out / f"{kind}.csv" for kind in world.TASKS}
    written = (*tables.values(), out / "truth.jsonl")
    if any(path.exists() for path in written) and not (out / "world.json").exists():
        raise ValueError(f"{out}: refusing to replace its tables: they are not nano's; give another folder")
    world.load_library(args.assets)  # fails before anything is deleted
    for path in written:  # delete stale tables first: their pictures will be replaced
        path.unlink(missing_ok=True)
    for kind in world.TASKS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    settings = {  # what an example's index needs to be drawn again
        "assets": args.assets, "split": args.split, "seed": args.seed, "clips": args.clips, "frames": args.frames,
        "size": args.size, "fps": args.fps,
    }  # fmt: skip
    shares, rows = [range(i, min(i + 32, args.clips)) for i in range(0, args.clips, 32)], []
    with tqdm(total=args.clips, desc="draw", unit="clip", mininterval=5) as bar:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers > 1 else nullcontext() as pool:
            for share in (pool.map if pool else map)(partial(write_share, out, settings), shares):
                rows += share
                bar.update(len(share))
    write_text(out / "world.json", json.dumps(settings))  # first: it says whose the tables are
    for kind, path in tables.items():
        if of_kind := [row for row in rows if row["kind"] == kind]:
            write_table(path, of_kind)
    write_text(out / "truth.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"write       {len(rows)} clips, {out}/{', '.join(path.name for path in written if path.exists())}")


def make_bench(args):
    """Held-out reference cases in the layout of RefVIE-Bench: refvie_bench.yaml, videos/, refs/."""
    out = Path(args.out)
    for name in ("videos", "refs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    library, lines, first = world.load_library(args.assets), [], world.MIXTURE.index("ref_video")
    for i in range(args.items):
        edit = world.draw_edit(library, "test", args.seed, first + i * len(world.MIXTURE), args.frames, args.size)
        source = world.draw_frames(edit, args.size)[0]
        write_video(out / "videos" / f"{i:03d}_src.mp4", source, args.fps, None, EXACT_VIDEO_CODEC)
        write_image(out / "refs" / f"{i:03d}.png", world.to_uint8(edit.ref[None])[0])
        lines.append(
            f"- src_video: videos/{i:03d}_src.mp4\n  instruction: {json.dumps(edit.prompt)}\n"
            f"  ref_img: refs/{i:03d}.png\n  edit_type: {edit.task.partition('_')[0]}\n"
        )
    write_text(out / "refvie_bench.yaml", "".join(lines))
    print(f"write       {len(lines)} items, {out}/refvie_bench.yaml")


def read_truth(folder):
    path = Path(folder) / "truth.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: draw a world first, `python -m nano data {folder}`")
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_world(folder):
    """What held-out clips were drawn with. ValueError for training clips."""
    settings = json.loads((Path(folder) / "world.json").read_text())
    if settings["split"] != "test":
        raise ValueError(f"{folder} is of the {settings['split']} split: draw held-out cases with --split test")
    return settings


def read_frames(path):
    """uint8 (T, H, W, 3) of a clip or picture of the world, at its own size."""
    return read_clip(path, max_frames=10_000).frames if path.suffix == ".mp4" else read_image(path)[None]


def read_case(folder, row):
    """Source, truth and reference, or None, of a line of truth.jsonl."""
    ref = read_frames(folder / row["ref_image"])[0] if "ref_image" in row else None
    return read_frames(folder / row["src_video"]), read_frames(folder / row["tgt_video"]), ref


def read_mask(path, size):
    """The edited region, bool (T, size, size)."""
    return read_image(path)[..., 0].unflatten(0, (-1, size)) > 127


def read_many(paths, quiet=False):
    """The frames of files, in their order, one thread per core: decoding releases the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(read_frames, paths), total=len(paths), desc="read", mininterval=5, disable=quiet))
