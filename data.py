"""Tables of editing pairs, their mixture, and the batches that training asks for.

    image.csv, video.csv, ref_video.csv -> Row -> shapes (cache.py) -> buckets of one shape
      -> Mixture: batches in an order that is a function of the seed -> Pairs, or cache.CachedPairs

`python data.py check`: read every file before a long run; `python data.py cache`: encode rows once for all training.
"""

import argparse
import csv
import hashlib
import math
import os
import random
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from command import one_line

EXAMPLES = """examples:
  python data.py check data/nano/image.csv data/nano/ref_video.csv      # before a long run
  python data.py cache --preset lora --config nano --data data/nano --weights weights/nano --out cache/nano
  python train.py --preset lora --config nano --data data/nano --weights weights/nano --cache cache/nano --out runs/mine
"""
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold


def parse_arguments(argv=None):
    doc, raw = "Check tables of editing pairs, or encode them once.", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="read every file of the tables and report what is wrong")
    check.add_argument("tables", nargs="+", metavar="TABLE", help="image.csv, video.csv, ref_video.csv or parquet")
    check.add_argument("--base-path", metavar="DIR", help="where the paths in the tables start (default: its folder)")
    cache = commands.add_parser("cache", help="encode rows; the other arguments are those of train.py")
    cache.add_argument("--out", required=True, metavar="DIR", help="the cache")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help answers before torch is imported

import torch
from tqdm import tqdm

from media import GRID, MediaError, nearest_size, pictures, read_frames, read_image, usable_frames, working_size

FILES = {"image": "image.csv", "video": "video.csv", "ref": "ref_video.csv"}
PAIR = ("src_video", "tgt_video", "prompt")
COLUMNS = {"image": PAIR, "video": PAIR, "ref": (*PAIR, "ref_image")}
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2)  # height / width


@dataclass(frozen=True)
class Row:
    """One editing pair: two files (pictures or clips), the instruction and, for a reference, a picture."""

    source: str
    target: str
    prompt: str
    ref: str | tuple | None = None  # a file, or (parquet file, row group, row)

    @property
    def files(self):
        ref = self.ref[0] if isinstance(self.ref, tuple) else self.ref
        return [self.source, self.target, *([ref] if ref else [])]


# Tables


def find_tables(folders, kind):
    """The tables of a kind of data in these folders, one each; RefVIE is published as chunk_*.parquet.
    FileNotFoundError."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"--data {folder}: no such folder; give one with {', '.join(FILES.values())}")
        paths = [(folder / FILES[kind]).with_suffix(suffix) for suffix in READERS]
        chunks = sorted(folder.glob("chunk_*.parquet")) if kind == "ref" else []
        found += [path for path in paths if path.is_file()][:1] or chunks
    if not found:
        names = ", ".join(map(str, folders))
        raise FileNotFoundError(f"{names}: has no {FILES[kind]}, which this stage needs; or give it by --{kind}-csv")
    return found


def kind_of(path):
    """The kind of data of a table, by what it has."""
    if path.suffix == ".parquet":
        return "ref" if "ref_image_bytes" in parquet_file(path).schema_arrow.names else "video"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return "ref" if "ref_image" in re.findall(r"\w+", file.readline()) else "video"


def read_table(path, kind, base=None):
    """The rows of a table with the released columns; paths in it start from `base` (default: its folder).

    ValueError for a missing column, an empty table or field, or a path that leaves the base folder.
    """
    path = Path(path)
    base = os.path.realpath(base or path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python -m nano data DIR` makes a small data set")
    rows = []
    for where, (source, target, prompt, *ref) in READERS.get(path.suffix, read_csv)(path, kind):
        for text in (source, target, prompt, *ref):
            if not isinstance(text, tuple) and not (isinstance(text, str) and text.strip()):
                raise ValueError(f"{where}: an empty field, or no text, among {', '.join(COLUMNS[kind])}")
        ref = [below(base, r, where) if isinstance(r, str) else r for r in ref]
        rows.append(Row(below(base, source, where), below(base, target, where), prompt.strip(), *ref))
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return rows


def inside(base, name, where):
    """base / name as a path below base; ValueError if it leads out. The words count, not where links lead: in the hub's
    cache every file is a link to outside of its folder."""
    return Path(below(os.path.abspath(base), name, where))


def below(base, name, where):
    """`inside` for an absolute base, on texts: ten times as fast for tables of a million rows."""
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(base.rstrip(os.sep) + os.sep):
        raise ValueError(f"{where}: {name} is outside of {base}; give paths below it (train.py: --base-path)")
    return path


def read_csv(path, kind):
    """Yield (place, fields) of every row."""
    for place, line in csv_lines(path, COLUMNS[kind]):
        yield place, [line[name] for name in COLUMNS[kind]]


def csv_lines(path, columns=()):
    """Yield (place, line as a dict) of a CSV table that has these columns. ValueError where csv would misread it."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)  # an unclosed quote would swallow the rest
        try:
            has_columns(path, columns, reader.fieldnames or [])
            for line in reader:
                place = f"{path}, line {reader.line_num}"
                if any(line.pop(None, None) or ()):
                    raise ValueError(f"{place}: more fields than columns; a prompt with a comma needs quotes around it")
                yield place, line
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}; is a quote not closed?") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is not UTF-8 text; save the table as CSV UTF-8") from None


def has_columns(path, columns, found):
    if absent := [name for name in columns if name not in found]:
        raise ValueError(f"{path}: has no column {', '.join(absent)}; it has {', '.join(map(str, found))}")


def read_parquet(path, kind):
    """Yield (place, fields) of every row; for RefVIE's reference the place of its bytes."""
    file = parquet_file(path)
    has_columns(path, [*PAIR, *["ref_image_bytes"] * (kind == "ref")], file.schema_arrow.names)
    for group in range(file.num_row_groups):
        for i, line in enumerate(row_group(path, file, group, list(PAIR)).to_pylist()):
            ref = [(str(path), group, i)] if kind == "ref" else []
            yield f"{path}, row {i} of group {group}", [line[name] for name in PAIR] + ref


# By a table's ending, what yields (place for messages, fields in the order of COLUMNS[kind]) of every row.
READERS = {".csv": read_csv, ".parquet": read_parquet}


def parquet_file(path):
    try:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(path)
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not a parquet file ({str(error).splitlines()[0]})") from None


def row_group(path, file, group, columns):
    """Columns of a row group of a `parquet_file`, as a pyarrow table. MediaError where it is damaged."""
    try:
        return file.read_row_group(group, columns)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}, row group {group}: cannot be read ({str(error).splitlines()[0]})") from None


@lru_cache(maxsize=2)
def reference_bytes(path, group):
    """The reference pictures of a row group. `check` reads in order; training shuffles and reads a group for nearly
    every picture, so ref_video.csv with its files, or a cache, is quicker there."""
    return row_group(path, parquet_file(path), group, ["ref_image_bytes"]).column(0)


def read_reference(ref):
    """The picture uint8 (H, W, 3) that a row's `ref` stands for. MediaError."""
    if isinstance(ref, str):
        return read_image(ref)
    path, group, row = ref
    content, where = reference_bytes(path, group)[row].as_py(), f"{path}, row {row} of group {group}"
    if not content:
        raise MediaError(f"{where}: has no ref_image_bytes")
    return read_image(where, content)


def read_pair(row, shape):
    """Frames uint8 (T, h, w, 3) of a row's target and source at `shape`, and its reference or None. MediaError."""
    target, source = (read_frames(path, shape[0], shape[1:]) for path in (row.target, row.source))
    return target, source, read_reference(row.ref) if row.ref else None


# The order of the data


def bucket(shape, max_frames, max_pixels):
    """The shape (T, h, w) at which a clip (frames, height, width) is trained.

    A clip above max_pixels takes the nearest of a few aspects, so that batches fill, in the largest size of it: 832x480
    for 16:9 of 409,600 pixels.
    """
    frames, height, width = shape
    frames = usable_frames(frames, max_frames)
    if height * width <= max_pixels:
        return frames, *working_size(height, width, max_pixels)
    aspect = min(ASPECTS, key=lambda a: abs(math.log(a * width / height)))
    return frames, *nearest_size(round(10_000 * aspect), 10_000, max_pixels, GRID, power=1)


def fill_buckets(shapes, max_frames, max_pixels):
    """Shapes of rows (a text: left out) -> {shape of training: [row numbers]}."""
    buckets = defaultdict(list)
    for number, shape in enumerate(shapes):
        if not isinstance(shape, str):
            buckets[bucket(shape, max_frames, max_pixels)].append(number)
    return dict(buckets)


class Mixture:
    """The order in which batches of several kinds of data are trained, a function of the seed and nothing else.

    buckets: {kind: {shape: [row numbers]}}; ratio: {kind: share}. Batch number n is one kind, one shape, `size` rows:
    `self[n]` -> (kind, shape, rows). There is no state: a run that resumes asks for the next number. Every bucket is
    an endless row of shuffled epochs, cut into batches across their ends, so each row comes once in its epoch.
    """

    def __init__(self, buckets, ratio, size, seed):
        self.buckets, self.size, self.seed = buckets, size, seed
        # {"image": 2, "video": 1} -> ["image", "video", "image"]: whole shares, spread evenly
        moments = [((i + 0.5) / share, kind) for kind, share in ratio.items() for i in range(share)]
        self.pattern = [kind for _, kind in sorted(moments, key=lambda moment: moment[0])]
        self.orders = {}  # what was shuffled last: (kind, epoch) -> batches, (kind, epoch, shape) -> rows

    def __getitem__(self, number):
        turn, place = divmod(number, len(self.pattern))
        kind = self.pattern[place]
        number = turn * self.pattern.count(kind) + self.pattern[:place].count(kind)  # among this kind's
        epoch = number * self.size // sum(map(len, self.buckets[kind].values()))  # or a later one, for batches are cut
        while self.batches_before(kind, epoch + 1) <= number:
            epoch += 1
        batches = self.shuffled(self.batches(kind, epoch), kind, epoch)
        shape, i = batches[number - self.batches_before(kind, epoch)]
        return kind, shape, [self.row(kind, shape, j) for j in range(i * self.size, (i + 1) * self.size)]

    def batches_before(self, kind, epoch):
        return sum(epoch * len(rows) // self.size for rows in self.buckets[kind].values())

    def batches(self, kind, epoch):
        """Yield (shape, number in the shape's bucket) of the batches that are complete in this epoch."""
        for shape, rows in self.buckets[kind].items():
            for i in range(epoch * len(rows) // self.size, (epoch + 1) * len(rows) // self.size):
                yield shape, i

    def row(self, kind, shape, j):
        """Row j of a bucket's endless row of shuffled epochs."""
        rows = self.buckets[kind][shape]
        epoch, place = divmod(j, len(rows))
        return self.shuffled(rows, kind, epoch, shape)[place]

    def shuffled(self, values, kind, epoch, *more):
        """Values in the order of an epoch; orders of epochs long past are dropped."""
        key = (kind, epoch, *more)
        if key not in self.orders:
            self.orders = {k: order for k, order in self.orders.items() if k[0] != kind or k[1] >= epoch - 1}
            order = self.orders[key] = list(values)
            random.Random(f"{self.seed} {key}").shuffle(order)
        return self.orders[key]


class Curriculum:
    """Mixtures one after the other: [(first batch, Mixture)]. `self[n]` -> (mixture, kind, shape, rows)."""

    def __init__(self, phases):
        self.phases = phases

    def __getitem__(self, n):
        start, mixture = [phase for phase in self.phases if phase[0] <= n][-1]
        return mixture, *mixture[n - start]


class Pairs(torch.utils.data.Dataset):
    """Batches of decoded pairs, to be asked for by number.

    tables: {kind: [Row]}; curriculum: their order; resize: `MLLMEncoder.resize`, done here, in the worker.
    `self[n]` -> a dict of lists, an entry a sample: numbers (counted over the whole run), prompts, paths, pictures
    (frames uint8 (T, h, w, 3) of target and source, the reference uint8 (H, W, 3) or None), seen (what `resize`
    returned); besides kind, shape and bad, a list of (path, reason). A row that cannot be read is replaced by the
    next one of its bucket; if none can, the dict has nothing but `fatal`.
    """

    def __init__(self, tables, curriculum, resize):
        self.tables, self.curriculum, self.resize = tables, curriculum, resize

    def __getitem__(self, n):
        mixture, kind, shape, numbers = self.curriculum[n]
        counted = list(range(n * len(numbers), (n + 1) * len(numbers)))
        batch = {"kind": kind, "shape": shape, "numbers": counted, "bad": []}
        try:
            samples = [self.sample(batch, mixture.buckets[kind][shape], number) for number in numbers]
        except (ValueError, OSError) as error:  # a worker's exception would come with its traceback
            return {"fatal": str(error)}
        return batch | dict(zip(("prompts", "paths", "pictures", "seen"), map(list, zip(*samples))))

    def sample(self, batch, bucket, number):
        """(prompt, path, pictures, seen) of a row, or of the next in its bucket that can be read."""
        for _ in bucket:
            row = self.tables[batch["kind"]][number]
            try:
                return row.prompt, row.target, *self.read(row, batch["shape"])
            except MediaError as error:
                batch["bad"].append((row.target, str(error)))
            number = bucket[(bucket.index(number) + 1) % len(bucket)]
        what = f"{len(bucket)} samples of {batch['kind']} {batch['shape']}"
        raise MediaError(f"none of the {what} can be read; the last: {batch['bad'][-1][1]}")

    def read(self, row, shape):
        target, source, ref = read_pair(row, shape)
        return (target, source, ref), self.resize(source, ref)


def fingerprint(rows):
    """Rows, in their order, as a short text."""
    return digest([(r.source, r.target, r.prompt, r.ref) for r in rows])[:16]


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


# Commands


def main(argv=None):
    args, rest = parse_arguments(argv)
    if args.command == "check" and rest:
        raise ValueError(f"check: unknown argument {rest[0]} (see --help)")
    if args.command == "cache":  # the VAE and the stages live on floors above this one
        train = str(Path(__file__).with_name("train.py"))
        os.execv(sys.executable, [sys.executable, train, *rest, "--out", args.out, "--set", f"write_cache={args.out}"])
    if faults := sum(check_table(Path(path), args.base_path) for path in args.tables):
        sys.exit(f"data.py: {faults} rows have faults")


def check_table(path, base):
    """Decode every pair of a table and print its faults -> the number of faulty rows."""
    rows, faulty = read_table(path, kind_of(path), base), 0
    with ThreadPoolExecutor(4) as pool:
        for row, faults in tqdm(pool.map(check_row, rows), path.name, len(rows)):
            faulty += bool(faults)
            for fault in faults:
                tqdm.write(f"{row.target}: {fault}")
    print(f"{path}: {len(rows)} rows, {faulty} with faults")
    return faulty


def check_row(row):
    """(row, what is wrong with it)."""
    try:
        sizes = [[tuple(rgb.shape[:2]) for rgb in pictures(path)] for path in (row.source, row.target)]
        if row.ref:
            read_reference(row.ref)
    except MediaError as error:
        return row, [str(error)]
    (before, h, w), (frames, height, width) = ((len(shown), *shown[-1]) for shown in sizes)
    stretch = h * width / w / height
    wrong = {
        f"has {frames} frames, its source {before}: only the shorter length is trained": before != frames,
        f"is {width}x{height}, its source {w}x{h}: their crops will not match": not 0.95 < stretch < 1.05,
        f"is {width}x{height}: each side needs at least {GRID}": min(height, width) < GRID,
    }
    return row, [fault for fault, found in wrong.items() if found]


if __name__ == "__main__":
    with one_line("data.py"):
        main()
