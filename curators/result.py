"""What a run leaves behind: training tables, refvie/chunk_*.parquet, the funnel, statistics and page.html."""

import csv
import hashlib
import heapq
import json
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from curators import ended, frame_at
from data import COLUMNS, FILES, inside
from ledger import parsed
from media import MediaError, read_image, resize, whole_file, whole_folder, write_text
from report import page, table
from vlm import jpeg_uri


def write_results(args, ledger, bases, rejects):
    """Training tables, RefVIE's parquet, the funnel, statistics and the page."""
    out, counts, told, samples = ledger.out, Funnel(ledger), [], {True: [], False: []}
    common, digest = os.path.commonpath([out, *bases]), hashlib.sha256()
    start = [os.path.relpath(base, common) for base in bases]
    with training_tables(out) as write:
        for row in final_rows(ledger, rejects):
            counts.add(row)
            kept = row["status"] == "kept"
            told += [row] if len(told) < 200 else []
            heapq.heappush(samples[kept], (-int(row["id"], 16), row))  # ids are hashes: each row is as likely
            if len(samples[kept]) > (args.page + 1) // 2:
                heapq.heappop(samples[kept])
            if row.get("tuning"):
                pair = [os.path.normpath(f"{start[row['base']]}/{row[key]}") for key in ("src_video", "tgt_video")]
                write("image" if row.get("frames") == 1 else "video", [*pair, row["prompt"]])
                if kept:
                    reference = inside(out, row["ref_image"], row["id"])
                    write("ref", [*pair, row["prompt"], os.path.relpath(reference, common)])
                    digest.update(row["id"].encode())
    write_refvie(out, ledger, bases, rejects, digest.hexdigest())
    pairs = pair_by_pair(told)
    shown = [row for sample in samples.values() for _, row in sorted(sample, key=lambda item: -item[0])]
    with ThreadPoolExecutor(args.workers) as pool:
        cards = pool.map(lambda row: card(row, Path(bases[row["base"]]), out), shown)
        cards = list(tqdm(cards, total=len(shown), desc="page", mininterval=1))
    known = {"cards": cards, "steps": counts.steps(), "reasons": counts.rows(), "rejects": rejects, "lines": pairs}
    text = counts.markdown() + (f"\n{table(pairs)}\n" if counts.total <= len(told) else "")
    write_text(out / "page.html", page("curate.html", title="RefVIE quadruplets", kept=counts.kinds.total(), **known))
    write_text(out / "funnel.md", text)
    write_text(out / "statistics.json", counts.statistics())
    return text, counts, common


def final_rows(ledger, rejects):
    """Yield all records; one that a person rejected leaves the tuning tables too, wherever it had ended."""
    for shard in range(len(ledger.told["shards"])):
        for row in ledger.rows("deduplicate", shard):
            if row["id"] in rejects:
                row |= {"tuning": False, **ended("person", "rejected", rejects[row["id"]])}
            yield row


def read_rejects(path):
    """{id: reason} that a person chose on page.html."""
    if path is None:
        return {}
    found = parsed(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is not the rejects.json that page.html saves")
    return {str(key): str(reason) for key, reason in found.items()}


@contextmanager
def training_tables(out):
    """Yield write(kind, fields) for ref_video.csv, video.csv and image.csv; a table without rows is not left behind."""
    counts = dict.fromkeys(FILES, 0)
    with ExitStack() as stack:
        writers = {}
        for kind, name in FILES.items():
            temporary = stack.enter_context(whole_file(out / name))
            writers[kind] = csv.writer(stack.enter_context(temporary.open("w", newline="", encoding="utf-8")))
            writers[kind].writerow(COLUMNS[kind])

        def write(kind, fields):
            writers[kind].writerow(fields)
            counts[kind] += 1

        yield write
    for kind, number in counts.items():
        if not number:
            (out / FILES[kind]).unlink()


def write_refvie(out, ledger, bases, rejects, digest, rows=1000):
    """refvie/chunk_*.parquet in the published layout, JPEGs as they lie in refs/; paths start from the inputs'
    folder, of several from the one above all. Written anew only if other records are kept."""
    try:
        import pyarrow
        from pyarrow.parquet import write_table
    except ImportError:
        return print("note        refvie/ is not written; pip install pyarrow, and the same command again")
    mark, home = ledger.folder / "refvie.json", os.path.commonpath(bases)
    if mark.is_file() and parsed(mark.read_text()) == digest and (out / "refvie").is_dir():
        return None
    fields = [(name, pyarrow.string()) for name in ("iid", "prompt", "src_video", "tgt_video")]
    schema = pyarrow.schema([*fields, ("ref_image_bytes", pyarrow.binary())])

    def line(row):
        clips = [os.path.relpath(Path(bases[row["base"]]) / row[key], home) for key in ("src_video", "tgt_video")]
        picture = inside(out, row["ref_image"], row["id"]).read_bytes()
        return dict(zip(schema.names, [row["name"] or row["id"], row["prompt"], *clips, picture]))

    kept = (line(row) for row in final_rows(ledger, rejects) if row["status"] == "kept")
    with whole_folder(out / "refvie") as folder:
        for number in range(10**5):
            if not (lines := list(islice(kept, rows))):
                break
            write_table(pyarrow.Table.from_pylist(lines, schema), folder / f"chunk_{number:05d}.parquet")
    return write_text(mark, json.dumps(digest))


class Funnel:
    """How many records reached which stage, and why the others did not (the paper's Figure 3), with what the kept ones
    are like (Figure 4)."""

    def __init__(self, ledger):
        self.stages, self.copies = (*ledger.stages[:-1], "person", ledger.stages[-1]), ledger.told.get("copies", 0)
        self.total, self.tuning = self.copies, 0
        self.reasons = Counter({("read", "rejected", "an exact copy"): self.copies} if self.copies else {})
        self.kinds, self.frames, self.sides = Counter(), Counter(), Counter()
        self.nearest = []  # cosine of each record to the nearest one kept before it

    def add(self, row):
        self.total += 1
        self.tuning += bool(row.get("tuning"))
        if row.get("nearest") is not None and row.get("stage") != "person":
            self.nearest.append(row["nearest"])
        if row["status"] == "kept":
            self.kinds[row["kind"]] += 1
            self.frames[str(row.get("frames", 0))] += 1
            self.sides[f"{2 ** int(math.log2(max(min(row.get('ref_size', [1])), 1)))} and up"] += 1
            return
        self.reasons[row["stage"], row["status"], short(row["reason"])] += 1

    def steps(self):
        """[(stage, records that passed it, their share)]"""
        left, out = self.total, [("pairs", self.total, 1.0)]
        for stage in self.stages:
            ended_here = sum(number for (at, _, _), number in self.reasons.items() if at == stage)
            left -= ended_here
            if stage != "person" or ended_here:
                out.append((stage, left, left / max(self.total, 1)))
        return out

    def rows(self):
        order = lambda item: (self.stages.index(item[0][0]), -item[1])
        return [(*key, number) for key, number in sorted(self.reasons.items(), key=order)]

    def markdown(self):
        steps = [(name, number, f"{share:.1%}") for name, number, share in self.steps()]
        funnel = table([("stage", "records that passed", "of all"), *steps])
        reasons = table([("left at", "as", "why", "records"), *self.rows()])
        return f"{funnel}\n\nGood for instruction tuning: {self.tuning} of {self.total}.\n\n{reasons}\n"

    def statistics(self):
        """Of the kept: kinds, frames, reference sizes; and how many would be left at other thresholds of likeness:
        what is near to one that another threshold would drop counts as dropped too."""
        curve = {str(t): sum(n <= t for n in self.nearest) for t in (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)}
        return json.dumps({
            "records": self.total, "exact_copies": self.copies, "instruction_tuning": self.tuning,
            "kept": self.kinds.total(), "kinds": dict(sorted(self.kinds.items())),
            "frames": dict(sorted(self.frames.items())), "reference_shorter_side": dict(sorted(self.sides.items())),
            "left_at_a_threshold_of": curve,
        }, indent=1)  # fmt: skip


def short(reason):
    """A reason without the file, line or number that it speaks of, so that one reason is counted as one."""
    reason = re.sub(r"^(?:/.*?|[^:]*, (?:line|row|entry) \d[^:]*): (?:.* (?=is outside of ))?", "", reason)
    reason = re.sub(r"is that of [0-9a-f]{16}", "is that of another", reason)
    return re.sub(r"\d+(?:\.\d+)?x\d+|\d+(?:\.\d+)?%?", "#", reason).split(":")[0][:80]


def pair_by_pair(rows):
    """What became of each record and why: the cells of a table."""
    lines = [("record", "kind", "score", "ended", "why")]
    for row in rows:
        kept, score = row["status"] == "kept", f"{row['edit_score']:.1f}" if "edit_score" in row else ""
        why = row.get("verdict_reason", "") if kept else row["reason"]
        lines.append((row["name"] or row["id"], row["kind"], score, "kept" if kept else row["stage"], why))
    return [[" ".join(cell.split()) for cell in line] for line in lines]


def card(row, base, out):
    """What page.html shows of a record: its clips side by side, mask and box drawn in."""
    told = ("id", "name", "kind", "prompt", "stage", "status", "reason", "verdict_reason", "ref_image")
    known = {key: row.get(key, "") for key in told}
    clips = [base / row[key] for key in ("src_video", "tgt_video")]
    try:
        known["marked"] = jpeg_uri(marked(clips[1], out, row)) if "mask" in row else ""
    except (MediaError, OSError) as error:
        known |= {"marked": "", "reason": known["reason"] or str(error)}
    return known | {
        "why": short(known["reason"]), "score": f"{row['edit_score']:.1f}" if "edit_score" in row else "",
        "clips": [os.path.relpath(clip, out) for clip in clips], "still": row.get("frames") == 1,
    }  # fmt: skip


def marked(clip, out, row, longest=640):
    """The key frame with its mask's outline in red and its box in yellow, uint8 (H, W, 3)."""
    frame, mask = frame_at(clip, row["key"]), read_image(out / row["mask"])[None, ..., 0] > 127
    scale = min(1.0, longest / max(frame.shape[:2]))
    height, width = (round(side * scale / 2) * 2 for side in frame.shape[:2])
    frame = resize(frame[None], (height, width))[0]
    mask = F.interpolate(mask[None].float(), (height, width))[0, 0] > 0.5
    rim = (F.max_pool2d(mask[None].float(), 5, 1, 2)[0] > 0.5) & ~mask
    frame[rim] = torch.tensor([255, 40, 40], dtype=torch.uint8)
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(row["box"], (width, height) * 2))
    inner, box = torch.zeros(2, height, width, dtype=torch.bool)
    box[y1:y2, x1:x2], inner[y1 + 2 : max(y2 - 2, 0), x1 + 2 : max(x2 - 2, 0)] = True, True
    frame[box & ~inner] = torch.tensor([255, 210, 0], dtype=torch.uint8)
    return frame
