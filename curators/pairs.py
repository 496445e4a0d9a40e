"""The records of all inputs: tables, the published sets as they lie on disk, another run.

    row -> id (hash of source, target, prompt), name, src_video, tgt_video, prompt, base (the folder of its paths),
           kind, edit_type, and what the row brings: edit_score, frame_scores, box, given_mask, given_ref

Another set: its columns in SETS, its layout in `tables_of`. One bad row costs itself: a record that failed at reading.
"""

import csv
import hashlib
import os
import re
import shutil
import sqlite3
from pathlib import Path

from curators import KINDS
from data import COLUMNS, below, has_columns, inside, parquet_file, row_group
from ledger import Ledger, parsed
from media import whole_file
from vlm import sound

PAIR = COLUMNS["video"]  # src_video, tgt_video, prompt
SETS = {  # their columns for these, and the licence to print
    "pairs": (PAIR, None),
    "RefVIE": (PAIR, None),
    "Sparkle": (PAIR, "CC-BY-4.0"),
    "ReCo": (PAIR, "CC-BY-NC-SA-4.0"),
    "Ditto-1M": (("source_path", "edited_path", "instruction"), "CC-BY-NC-SA-4.0"),
    "OpenVE-3M": (("original_video", "video", "prompt"), "CC-BY-NC-4.0"),
}
TYPES = {  # edit types of the sets -> kinds
    "subject": "subject change add replace local_change local_add local_modification subject_add",
    "background": "background background_change background_replacement background_ref location season time",
    "remove": "remove local_remove", "style": "style global_style style_transfer",
    "other": "creative_edit camera_edit subtitle_edit subtitles_edit",
}  # fmt: skip
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
VERBS = {
    "remove": "remove delete erase eliminate omit hide discard clear wipe",
    "style": "apply restyle stylize stylise reimagine",
    "whole": "change turn transform convert make render give redraw repaint",
    "subject": "add insert put place attach replace swap exchange substitute dress paint draw introduce include switch "
    "set shift",
}  # fmt: skip
VERBS = {word: kind for kind, words in VERBS.items() for word in words.split()}
PLACES = set("background backdrop surroundings scenery environment".split())
WHOLE = set("video clip scene image picture photo footage everything it this all".split())
STYLES = set("style aesthetic painting watercolor watercolour cartoon anime sketch filter mood".split())


def kind_of(edit_type, prompt):
    """The kind of an edit by its type, else by English keywords around the instruction's first verb: in linear time."""
    if known := TYPES.get((edit_type or "").strip().lower().replace(" ", "_")):
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
    if (path / "ledger" / "read.json").is_file():
        return [("run", path / "ledger" / "read.json", path)]
    layouts = {"training_metadata/*.json": "Ditto-1M", "*/*_data_configs.json": "ReCo",
               "prompts/*_train.csv": "Sparkle", "chunk_*.parquet": "RefVIE"}  # fmt: skip
    for pattern, name in layouts.items():
        if found := sorted(path.glob(pattern)):
            return [(name, file, path) for file in found]
    raise ValueError(f"{path}: no folder of Ditto-1M (training_metadata/), ReCo (*/*_data_configs.json), Sparkle "
                     "(prompts/*_train.csv), RefVIE (chunk_*.parquet) or a run; give a table")  # fmt: skip


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
                    ragged = any(line.pop(None, None) or ())
                    wrong = "more fields than columns; quote a prompt with commas"
                    yield f"line {reader.line_num}", wrong if ragged else line
            except (csv.Error, UnicodeDecodeError) as error:
                text = f"{path}, after line {reader.line_num}: {error}; UTF-8, and every quote closed?"
                raise ValueError(text) from None
    else:
        raise ValueError(f"{path}: a table is .csv, .parquet, .json or .jsonl")


def reco_line(line, task):
    """A line of ReCo by our names: its clips lie under <task>/src_videos and <task>/tar_videos."""
    below = lambda name, folder: name if name.startswith(f"{task}/") else f"{task}/{folder}/{Path(name).name}"
    first = lambda value: value[0] if isinstance(value, list) and value else value
    source, mask = line.get("src_video"), first(line.get("video_masks"))
    target = line.get("tar_video") or source
    prompt = next((line[key] for key in ("instruction_final_refine", "instruction", "prompt") if line.get(key)), None)
    if not isinstance(source, str) or not isinstance(target, str):
        return {"prompt": prompt}
    return {"src_video": below(source, "src_videos"), "tgt_video": below(target, "tar_videos"), "prompt": prompt,
            "edit_type": task, "name": f"reco_{task}_{Path(source).stem}",
            "mask": below(mask, "video_masks") if isinstance(mask, str) else None}  # fmt: skip


class Seen:
    """Ids that were read and the number of their base, on disk: memory stays constant."""

    def __init__(self):
        self.table = sqlite3.connect("")
        self.table.execute("create table seen (id text primary key, base int) without rowid")

    def add(self, key, base=0):
        """-> is it new?"""
        return self.table.execute("insert or ignore into seen values (?, ?)", (key, base)).rowcount == 1

    def base(self, key):
        return (self.table.execute("select base from seen where id = ?", (key,)).fetchone() or [None])[0]


def hashed(*texts):
    return hashlib.sha256("\0".join(map(sound, texts)).encode()).hexdigest()[:16]


class Reader:
    """The records of all inputs. `bases` are the folders that their paths start from; `number` counts records, `copies`
    exact duplicates, `unknown` edits of unknown kind.

    Nothing is opened but the tables: a missing clip is one failed record when it is its turn.
    """

    def __init__(self, args, bases=()):
        self.args, self.bases, self.seen, self.licences = args, list(bases), Seen(), set()
        self.number = self.copies = self.unknown = 0

    def __iter__(self):
        for row in self.rows():
            if self.seen.base(row["id"]) not in (None, row["base"]):  # the same names below another folder
                row["id"] = hashed(row["id"], self.bases[row["base"]])
            if self.seen.add(row["id"], row["base"]):
                self.number += 1
                yield row
            else:
                self.copies += 1
        if not self.number:
            raise ValueError(f"{', '.join(self.args.pairs)}: no pairs")

    def rows(self):
        for source in self.args.pairs:
            for name, file, folder in tables_of(source):
                yield from self.of_run(folder.resolve()) if name == "run" else self.of_table(name, file, folder)

    def base(self, folder):
        """The number of a folder that paths start from."""
        folder = str(Path(folder).resolve())
        if folder not in self.bases:
            if unsound := [path for path in (folder, self.args.out) if sound(path) != path]:
                raise ValueError(f"{sound(unsound[0])}: its name is no UTF-8 text, which no table can hold; rename it")
            self.bases.append(folder)
        return self.bases.index(folder)

    def of_table(self, name, file, folder):
        number = self.base(self.args.base_path or folder)
        for place, line in read_lines(file):
            fields = line if isinstance(line, dict) else {}
            if name == "ReCo" and fields:
                fields = reco_line(fields, file.parent.name)
            if name is None and fields:  # the first line decides what the table is
                name = next((key for key, (columns, _) in SETS.items() if set(columns) <= fields.keys()), None)
                if name is None:
                    has_columns(file, PAIR, list(fields))  # raises: it has not
            columns, licence = SETS[name or "pairs"]
            if licence and name not in self.licences:
                self.licences.add(name)
                print(f"licence     {name}: {licence}")
            if name == "Sparkle":
                fields = fields | {"edit_type": "background"}
            texts = {key: fields.get(column) for key, column in zip(PAIR, columns)}
            sane = {key: sound(value) if isinstance(value, str) else "" for key, value in texts.items()}
            given = next((fields[key] for key in ("name", "id", "iid", "task") if fields.get(key)), "")
            row = {"id": hashed(*sane.values()), "name": sound(str(given)), **sane, "base": number}
            empty = [f"{key} is empty, or no text" for key in PAIR if texts[key] != row[key] or not row[key].strip()]
            wrong = [line] if isinstance(line, str) else empty
            try:
                if wrong:
                    raise ValueError(f"{file}, {place}: {wrong[0]}")
                yield row | self.start(row, fields, f"{file}, {place}")
            except ValueError as error:
                key = hashed(f"{file.name}, {place}", row["id"])
                yield row | {"kind": "unknown", "id": key, "status": "failed", "stage": "read", "reason": str(error)}

    def start(self, row, fields, place):
        """What a row brings, and its kind. ValueError for a path that leaves its base."""
        found = brought(fields)
        for name in (row["src_video"], row["tgt_video"], found.get("given_mask"), found.get("given_ref")):
            if isinstance(name, str):
                inside(self.bases[row["base"]], name, place)
        given = next((fields[key] for key in ("edit_type", "edited_type") if isinstance(fields.get(key), str)), "")
        kind = kind_of(given, row["prompt"] if self.args.models == "classical" or "given_ref" in found else "")
        if "given_ref" in found and kind not in KINDS:
            kind = "subject"
        self.unknown += kind == "unknown"
        return found | {"edit_type": given, "kind": kind}

    def of_run(self, folder):
        """The records of another run with all that was paid for; what its thresholds decided is decided again."""
        told, theirs = (parsed((folder / f"ledger/{name}.json").read_text()) for name in ("read", "settings"))
        own = {"paper": self.args.embedder}.get(self.args.models)
        same_models = (theirs.get("models"), theirs.get("embedder")) == (self.args.models, own)
        ledger, out = Ledger(folder, told["stages"]), os.path.abspath(self.args.out)
        numbers = [self.base(self.args.base_path or base) for base in told["bases"]]
        for shard in range(len(told["shards"])):
            reached = next(stage for stage in reversed(ledger.stages) if ledger.done(stage, shard))
            for row in ledger.rows(reached, shard):
                if not same_models:
                    row.pop("feature", None), row.pop("source_feature", None)
                adopt(row, str(folder), out)
                row["base"] = numbers[row["base"]]
                if "status" in row:
                    again = row["stage"] == "score" if row["status"] == "rejected" else self.args.retry_failed
                    if again and row["stage"] != "read":
                        row = {key: value for key, value in row.items() if key not in ("status", "stage", "reason")}
                    else:
                        row["tuning"] = row.get("tuning", False) and row.get("edit_score", -1) >= self.args.min_score
                yield row


def brought(fields):
    """What a table's row brings of the stages' work; a CSV's numbers and lists are read as JSON."""
    known = {key: fields.get(key) for key in ("edit_score", "frame_scores", "box")}
    score, scores, box = (parsed(value) if isinstance(value, str) else value for value in known.values())
    number = lambda v, high: type(v) in (int, float) and 0 <= v <= high
    several = lambda v, high: isinstance(v, list) and all(number(x, high) for x in v)
    out = {"edit_score": score} if number(score, 10) else {}
    if several(scores, 10):
        out["frame_scores"] = scores
    if several(box, 1) and len(box) == 4 and box[0] < box[2] and box[1] < box[3]:
        out["box"] = box
    for key, name in (("mask", "given_mask"), ("ref_image", "given_ref")):
        if isinstance(fields.get(key), str | list) and fields[key]:
            out[name] = fields[key]
    return out


def adopt(row, theirs, out):
    """Take over the pictures that another run made for a record: a link if the disk allows, else a copy."""
    for name in (row[key] for key in ("mask", "ref_image") if key in row):
        source, target = below(theirs, name, row["id"]), below(out, name, row["id"])
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.link(source, target)
        except FileExistsError:
            pass
        except OSError:
            with whole_file(target) as temporary:
                shutil.copyfile(source, temporary)
