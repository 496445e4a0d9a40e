"""The records of all inputs: tables, the published sets as they lie on disk, another run.

    row -> id (hash of source, target, prompt), name, src_video, tgt_video, prompt, base (the folder of its paths),
           kind, edit_type, and what the row brings: edit_score, box, given_mask, given_ref_image

Another set is a line of SETS. One bad row costs itself: a record that failed at reading.
"""

import csv
import hashlib
import os
import re
import shutil
import sqlite3
from pathlib import Path

from curators import KINDS, ended
from data import COLUMNS, below, has_columns, inside, parquet_file, row_group
from ledger import Ledger, parsed, reopened
from media import whole_file
from vlm import sound

PAIR = COLUMNS["video"]  # src_video, tgt_video, prompt
SETS = {  # name: the tables in its folder, their columns for PAIR, the licence to print
    "table": (None, PAIR, None),
    "Ditto-1M": ("training_metadata/*.json", ("source_path", "edited_path", "instruction"), "CC-BY-NC-SA-4.0"),
    "ReCo": ("*/*_data_configs.json", ("src_video", "tar_video", "instruction_final_refine"), "CC-BY-NC-SA-4.0"),
    "OpenVE-3M": (None, ("original_video", "video", "prompt"), "CC-BY-NC-4.0"),
    "Sparkle": ("prompts/*_train.csv", PAIR, "CC-BY-4.0"),
    "RefVIE": ("chunk_*.parquet", PAIR, None),
}
TYPES = {  # kinds: edit types of the sets
    "subject": "subject change add replace local_change local_add local_modification subject_add",
    "background": "background background_change background_replacement background_ref location season time",
    "remove": "remove local_remove",
    "style": "style global_style style_transfer",
    "other": "creative_edit camera_edit subtitle_edit subtitles_edit",
}
VERBS = {
    "remove": "remove delete erase eliminate omit hide discard clear wipe",
    "style": "apply restyle stylize stylise reimagine",
    "whole": "change turn transform convert make render give redraw repaint",
    "subject": "add insert put place attach replace swap exchange substitute dress paint draw introduce include switch "
    "set shift",
}
TYPES, VERBS = ({word: kind for kind, words in names.items() for word in words.split()} for names in (TYPES, VERBS))
PLACES = set("background backdrop surroundings scenery environment".split())
WHOLE = set("video clip scene image picture photo footage everything it this all".split())
STYLES = set("style aesthetic painting watercolor watercolour cartoon anime sketch filter mood".split())


def kind_of(edit_type, prompt):
    """The kind of an edit by its type, else by English keywords around the instruction's first verb: in linear time."""
    if known := TYPES.get(edit_type.strip().lower().replace(" ", "_")):
        return known
    words = re.findall("[a-z]+", prompt[:2000].lower())
    at = next((i for i, word in enumerate(words) if word in VERBS), None)
    if at is None:
        return "unknown"
    verb, after = VERBS[words[at]], words[at + 1 : at + 7]
    place = next((i for i, word in enumerate(after) if word in PLACES), None)
    if place is not None and not {"in", "from", "of", "into"} & set(after[max(place - 2, 0) : place]):
        return "background"
    if verb == "whole" and WHOLE & set(after[:3]) or verb != "remove" and STYLES & set(after) and WHOLE & set(words):
        return "style"
    return "subject" if verb == "whole" else verb


def tables_of(source):
    """The tables of an input: [(set or None, file, base folder)]. ValueError, FileNotFoundError."""
    path = Path(source)
    if path.is_file():
        return [(None, path, path.parent)]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "ledger/read.json").is_file():
        return [("run", path / "ledger/read.json", path)]
    patterns = {name: pattern for name, (pattern, *_) in SETS.items() if pattern}
    for name, pattern in patterns.items():
        if found := sorted(path.glob(pattern)):
            return [(name, file, path) for file in found]
    known = ", ".join(f"{name} ({pattern})" for name, pattern in patterns.items())
    raise ValueError(f"{path}: no folder of {known}, nor of a run; give a table")


def read_lines(path):
    """Yield (place, dict, or a text that says what is wrong with it) of a .csv, .parquet, .jsonl or .json file."""
    if path.suffix == ".parquet":
        file = parquet_file(path)
        names = [name for name in file.schema_arrow.names if not name.endswith("_bytes")]
        for group in range(file.num_row_groups):
            for i, line in enumerate(row_group(path, file, group, names).to_pylist()):
                if "ref_image_bytes" in file.schema_arrow.names:
                    line["ref_image"] = [str(path.resolve()), group, i]
                yield f"row {i} of group {group}", line
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            yield from ((f"line {number}", parsed(text)) for number, text in enumerate(file, 1) if text.strip())
    elif path.suffix == ".json":
        if not isinstance(lines := parsed(path.read_text(encoding="utf-8-sig")), list):
            raise ValueError(f"{path}: is not JSON, or has no list of pairs")
        yield from ((f"entry {number}", line) for number, line in enumerate(lines))
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                for line in reader:
                    ragged = any(line.pop(None, ()))
                    wrong = "more fields than columns; quote a prompt with commas"
                    yield f"line {reader.line_num}", wrong if ragged else line
            except (csv.Error, UnicodeDecodeError) as error:
                text = f"{path}, after line {reader.line_num}: {error}; UTF-8, and every quote closed?"
                raise ValueError(text) from None
    else:
        raise ValueError(f"{path}: a table is .csv, .parquet, .json or .jsonl")


def reco_line(line, task):
    """A line of ReCo with paths from its folder, <task>/src_videos and so on, and its task as type."""
    line = {"edit_type": task, "name": f"reco_{task}_{Path(str(line.get('src_video'))).stem}", **line}
    mask = line.get("video_masks")
    line["mask"] = mask[0] if isinstance(mask, list) and mask else mask
    for key, folder in (("src_video", "src_videos"), ("tar_video", "tar_videos"), ("mask", "video_masks")):
        if isinstance(line.get(key), str) and not line[key].startswith(f"{task}/"):
            line[key] = f"{task}/{folder}/{Path(line[key]).name}"
    return line


def hashed(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


class Reader:
    """The records of all inputs that are not in the ledger yet, whose ids are `known`. `bases`: the folders that paths
    start from; number: of records, copies: exact duplicates, unknown: edits of unknown kind.

    Nothing is opened but the tables: a missing clip is one failed record when it is its turn.
    """

    def __init__(self, args, bases=(), known=()):
        self.args, self.bases, self.licences = args, list(bases), set()
        self.number = self.copies = self.unknown = 0
        self.seen = sqlite3.connect("")  # ids and their bases, on disk: memory stays constant
        self.seen.execute("create table seen (id text primary key, base int) without rowid")
        self.seen.executemany("insert into seen values (?, null)", ((key,) for key in known))

    def __iter__(self):
        for source in self.args.pairs:
            for name, file, folder in tables_of(source):
                rows = self.of_run(folder.resolve()) if name == "run" else self.of_table(name, file, folder)
                yield from filter(self.is_new, rows)
        if not self.number:
            raise ValueError(f"{', '.join(self.args.pairs)}: no pairs")

    def is_new(self, row):
        while held := self.seen.execute("select base from seen where id = ?", (row["id"],)).fetchone():
            if held[0] == row["base"]:
                self.copies += 1
                return False
            if held[0] is None:
                break
            row["id"] = hashed(row["id"], self.bases[row["base"]])  # the same names below another folder
        self.number += 1
        self.seen.execute("insert or replace into seen values (?, ?)", (row["id"], row["base"]))
        return held is None

    def base(self, folder):
        """The number of a folder that paths start from."""
        folder = str(Path(self.args.base_path or folder).resolve())
        if folder not in self.bases:
            self.bases.append(folder)
        return self.bases.index(folder)

    def of_table(self, name, file, folder):
        base = self.base(folder)
        for place, line in read_lines(file):
            fields = line if isinstance(line, dict) else {}
            if name is None and fields:  # the first line decides what the table is
                name = next((key for key, (_, columns, _) in SETS.items() if set(columns) <= fields.keys()), None)
                if name is None:
                    has_columns(file, PAIR, list(fields))  # raises: it has not
                if name == "ReCo":
                    base = self.base(file.absolute().parent.parent)
            _, columns, licence = SETS[name or "table"]
            if licence and name not in self.licences:
                self.licences.add(name)
                print(f"licence     {name}: {licence}")
            if name == "ReCo":
                fields = reco_line(fields, file.absolute().parent.name)
            if name == "Sparkle":
                fields = fields | {"edit_type": "background"}
            texts = {key: fields.get(column) for key, column in zip(PAIR, columns)}
            sane = {key: sound(value) if isinstance(value, str) else "" for key, value in texts.items()}
            given = next((fields[key] for key in ("name", "id", "iid", "task") if fields.get(key)), "")
            row = {"id": hashed(*sane.values()), "name": sound(str(given)), **sane, "base": base}
            where, wrong = f"{file}, {place}", [line] if isinstance(line, str) else []
            wrong += [f"{key} is empty, or no text" for key in PAIR if texts[key] != sane[key] or not sane[key].strip()]
            try:
                if wrong:
                    raise ValueError(f"{where}: {wrong[0]}")
                yield row | self.brought(row, fields, where)
            except ValueError as error:
                key = hashed(file.name, place, row["id"])
                yield row | {"kind": "unknown", "id": key, **ended("read", "failed", error)}

    def brought(self, row, fields, where):
        """What a row brings of the stages' work, and its kind; a CSV's numbers and lists are read as JSON. ValueError
        for a path that leaves its base."""
        score, box = (parsed(v) if isinstance(v, str) else v for v in (fields.get("edit_score"), fields.get("box")))
        number = lambda value, high: type(value) in (int, float) and 0 <= value <= high
        found = {"edit_score": score} if number(score, 10) else {}
        four = isinstance(box, list) and len(box) == 4 and all(number(value, 1) for value in box)
        if four and box[0] < box[2] and box[1] < box[3]:
            found["box"] = box
        for key in ("mask", "ref_image"):
            if isinstance(fields.get(key), str | list) and fields[key]:
                found["given_" + key] = fields[key]
        for name in (row["src_video"], row["tgt_video"], found.get("given_mask"), found.get("given_ref_image")):
            if isinstance(name, str):
                inside(self.bases[row["base"]], name, where)
        given = next((fields[key] for key in ("edit_type", "edited_type") if isinstance(fields.get(key), str)), "")
        reference = "given_ref_image" in found
        kind = kind_of(given, row["prompt"] if self.args.models == "classical" or reference else "")
        if reference and kind not in KINDS:
            kind = "subject"
        self.unknown += kind == "unknown"
        return found | {"edit_type": given, "kind": kind}

    def of_run(self, folder):
        """The records of another run with all that was paid for; what its thresholds decided is decided again."""
        told = parsed((folder / "ledger/read.json").read_text())
        own = self.args.embedder if self.args.models == "paper" else None
        same_models = [told["settings"].get(key) for key in ("models", "embedder")] == [self.args.models, own]
        ledger, numbers = Ledger(folder, told["stages"]), [self.base(base) for base in told["bases"]]
        for shard in range(len(told["shards"])):
            reached = next(stage for stage in reversed(ledger.stages) if ledger.done(stage, shard))
            for row in ledger.rows(reached, shard):
                if not same_models:
                    row.pop("feature", None)
                for name in (row[key] for key in ("mask", "ref_image") if key in row):
                    adopt(below(str(folder), name, row["id"]), below(self.args.out, name, row["id"]))
                row["base"] = numbers[row["base"]]
                again = row.get("stage") in ("score", "guard") and row["status"] == "rejected"
                if again or row.get("status") == "failed" and self.args.retry_failed and row["stage"] != "read":
                    row = reopened(row)
                elif "status" in row:
                    row["tuning"] = row.get("tuning", False) and row.get("edit_score", -1) >= self.args.min_score
                yield row


def adopt(source, target):
    """Take over a picture that another run made: a link if the disk allows, else a copy."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        try:
            os.link(source, target)
        except OSError:
            with whole_file(target) as temporary:
                shutil.copyfile(source, temporary)
