"""What a run leaves behind: training tables, refvie/chunk_*.parquet, the funnel, statistics and page.html."""

import csv
import heapq
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path

import torch

from curators import ended, frame_at
from data import COLUMNS, FILES, inside
from ledger import parsed
from media import MediaError, read_image, resize, whole_file, whole_folder, write_text
from report import page, table
from vlm import jpeg_uri, within

CURVE = (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)  # thresholds of likeness


def write_results(args, ledger, rejects):
    """-> the funnel, and the folder from which the paths of the tables start."""
    out, told, samples = ledger.out, ledger.told, {"kept": [], "other": []}
    funnel, common = Funnel(ledger.stages, told["copies"]), os.path.commonpath([out, *told["bases"]])
    start = [os.path.relpath(base, common) for base in told["bases"]]
    with ExitStack() as stack:
        tables, written = {}, Counter()
        for kind, name in FILES.items():
            file = stack.enter_context(whole_file(out / name)).open("w", newline="", encoding="utf-8")
            tables[kind] = csv.writer(stack.enter_context(file))
            tables[kind].writerow(COLUMNS[kind])
        for row in final_rows(ledger, rejects):
            funnel.add(row)
            sample = samples.get(row["status"], samples["other"])
            heapq.heappush(sample, (-int(row["id"], 16), row))  # ids are hashes: each row is as likely
            if len(sample) > (args.page + 1) // 2:
                heapq.heappop(sample)
            pair = [os.path.normpath(f"{start[row['base']]}/{row[key]}") for key in ("src_video", "tgt_video")]
            fields = {}
            if row.get("tuning"):
                fields["image" if row.get("frames") == 1 else "video"] = [*pair, row["prompt"]]
            if row["status"] == "kept":
                reference = inside(out, row["ref_image"], row["id"])
                fields["ref"] = [*pair, row["prompt"], os.path.relpath(reference, common)]
            for kind, cells in fields.items():
                tables[kind].writerow(cells)
                written[kind] += 1
    for kind in FILES.keys() - written.keys():  # a table without rows
        (out / FILES[kind]).unlink()
    write_refvie(out, told["bases"], final_rows(ledger, rejects))
    shown = [row for sample in samples.values() for _, row in sorted(sample, key=lambda item: -item[0])]
    with ThreadPoolExecutor(args.workers) as pool:
        cards = list(pool.map(lambda row: card(row, Path(told["bases"][row["base"]]), out), shown))
    known = {"cards": cards, "steps": funnel.steps(), "reasons": funnel.rows(), "rejects": rejects}
    write_text(out / "page.html", page("curate.html", title="RefVIE quadruplets", kept=written["ref"], **known))
    write_text(out / "funnel.md", funnel.markdown())
    write_text(out / "statistics.json", json.dumps(funnel.statistics(), indent=1))
    return funnel, common


def final_rows(ledger, rejects):
    """Yield all records; one that a person rejected leaves the tuning tables too, wherever it had ended."""
    for shard in range(len(ledger.told["shards"])):
        for row in ledger.rows("deduplicate", shard):
            if row["id"] in rejects:
                row |= {"tuning": False, **ended("person", "rejected", rejects[row["id"]])}
            yield row


def read_rejects(path):
    """{id: reason} that a person chose on page.html."""
    found = parsed(Path(path).read_text(encoding="utf-8")) if path else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is not the rejects.json that page.html saves")
    return {str(key): str(reason) for key, reason in found.items()}


def write_refvie(out, bases, rows, size=1000):
    """refvie/chunk_*.parquet in the published layout, JPEGs as they lie in refs/; paths start from the inputs' folder,
    of several from the one above all. De-duplication removes it when it decides anew."""
    try:
        import pyarrow
        from pyarrow.parquet import write_table
    except ImportError:
        return print("note        refvie/ is not written; pip install pyarrow, and the same command again")
    fields = [(name, pyarrow.string()) for name in ("iid", *COLUMNS["video"])]
    schema, home = pyarrow.schema([*fields, ("ref_image_bytes", pyarrow.binary())]), os.path.commonpath(bases)

    def line(row):
        paths = {key: os.path.relpath(Path(bases[row["base"]]) / row[key], home) for key in ("src_video", "tgt_video")}
        picture = inside(out, row["ref_image"], row["id"]).read_bytes()
        return {"iid": row["name"] or row["id"], "prompt": row["prompt"], **paths, "ref_image_bytes": picture}

    if not (out / "refvie").is_dir():
        kept, number = (line(row) for row in rows if row["status"] == "kept"), 0
        with whole_folder(out / "refvie") as folder:
            while lines := list(islice(kept, size)):
                write_table(pyarrow.Table.from_pylist(lines, schema), folder / f"chunk_{number:05d}.parquet")
                number += 1


class Funnel:
    """How many records reached which stage, and why the others did not (the paper's Figure 3), with what the kept ones
    are like (Figure 4)."""

    def __init__(self, stages, copies=0):
        self.stages, self.copies, self.total = (*stages[:-1], "person", stages[-1]), copies, copies
        self.reasons = Counter({("read", "rejected", "an exact copy"): copies} if copies else {})
        self.tuning = self.failed = 0
        self.kinds, self.frames, self.sides, self.left = Counter(), Counter(), Counter(), Counter()

    def add(self, row):
        self.total += 1
        self.tuning += bool(row.get("tuning"))
        self.failed += row["status"] == "failed"
        if "nearest" in row and row.get("stage") != "person":
            self.left.update(threshold for threshold in CURVE if row["nearest"] <= threshold)
        if row["status"] == "kept":
            self.kinds[row["kind"]] += 1
            self.frames[row["frames"]] += 1
            self.sides[min(row["ref_size"]) // 64 * 64] += 1
        else:
            self.reasons[row["stage"], row["status"], short(row["reason"])] += 1

    def steps(self):
        """[(stage, records that passed it, their share)]"""
        left, out = self.total, [("pairs", self.total, 1.0)]
        for stage in self.stages:
            ended_here = sum(number for (at, *_), number in self.reasons.items() if at == stage)
            left -= ended_here
            if stage != "person" or ended_here:
                out.append((stage, left, left / self.total))
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
        counts = {"kinds": self.kinds, "frames": self.frames, "shorter_side_of_reference_from": self.sides}
        return {
            "records": self.total, "exact_copies": self.copies, "instruction_tuning": self.tuning,
            "kept": self.kinds.total(), **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
            "left_at_a_threshold_of": {threshold: self.left[threshold] for threshold in CURVE},
        }  # fmt: skip


def short(reason):
    """A reason without the file, line or number that it speaks of, so that one reason is counted as one."""
    reason = re.sub(r"^(?:/.*?|[^:]*, (?:line|row|entry) \d[^:]*): (?:.* (?=is outside of ))?", "", reason)
    reason = re.sub(r"is that of [0-9a-f]{16}", "is that of another", reason)
    return re.sub(r"\d+(?:\.\d+)?x\d+|\d+(?:\.\d+)?%?", "#", reason).split(":")[0][:80]


def card(row, base, out):
    """What page.html shows of a record: its clips side by side, and the key frame with mask and box."""
    told = ("id", "name", "kind", "prompt", "stage", "status", "reason", "verdict_reason", "ref_image", "edit_score")
    clips = [base / row[key] for key in ("src_video", "tgt_video")]
    known = {"clips": [os.path.relpath(clip, out) for clip in clips], "still": row.get("frames") == 1, "marked": ""}
    if "mask" in row:
        with suppress(MediaError, OSError):
            known["marked"] = jpeg_uri(marked(clips[1], row["key"], out / row["mask"]))
            known["box"] = [round(100 * side, 1) for side in row["box"]]
    return known | {key: row.get(key, "") for key in told} | {"why": short(row.get("reason", ""))}


def marked(clip, key, mask):
    """Frame `key` of a clip, uint8 (H, W, 3), dark outside of its mask."""
    frame = frame_at(clip, key)
    frame = resize(frame[None], within(*frame.shape[:2], 640 * 360, 2))
    inside_mask = resize(read_image(mask)[None], frame.shape[1:3]) > 127
    return torch.where(inside_mask, frame, frame // 3)[0]
