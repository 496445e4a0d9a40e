"""From editing pairs to RefVIE quadruplets (paper, Section 3: 3.7M pairs in, 477K out): `python curate.py pairs.csv --out out/refvie`.

    pairs: csv, parquet, jsonl, Ditto-1M, ReCo, OpenVE-3M -> ledger/read/00000.jsonl, ...: shards of records
      -> Score       edit_score of frame pairs       >= 6: good for instruction tuning; >= 8 and of two kinds: go on
      -> Ground      box and mask of the new object, or of the foreground before a new background
      -> Synthesize  ref_image: the object cut out on white, or the background without its foreground
      -> Verify      verdict: does the reference show what the edit brought? and its feature
      -> deduplicate over all records, best first
      -> ref_video.csv + refs/, refvie.parquet, video.csv and image.csv, funnel, statistics, page.html

A record is a dict: id, src_video, tgt_video, prompt, edit_type, and what the stages add: edit_score, frame_scores, box
[x1, y1, x2, y2] in 0..1, mask, ref_image, verdict, cluster. status is "open" until a stage ends it as "rejected" or
"failed", with `stage` and `reason`; "kept" are the quadruplets. What a record brings along (a score, a box, a mask, a
reference, a verdict) is taken as it is: so a ledger can be read again with other thresholds and nothing is paid twice.

Models: classical (no weights: differences of frames, honest about what they cannot see) or those that the paper names.
The paper's pipeline was never released; prompts and thresholds that it does not state are ours.
"""

import argparse
import base64
import csv
import errno
import fcntl
import html
import http.client
import inspect
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

EXAMPLES = """examples:
  python curate.py pairs.csv --out out/refvie                                    # no model, a few seconds a pair
  python curate.py ditto/ openve.csv --out out/refvie --models paper             # the paper's models, one GPU
  torchrun --nproc-per-node 8 curate.py ditto/ --out out/refvie --models paper   # eight
  python curate.py out/refvie/ledger/verify --out out/strict --min-ref-score 9   # other thresholds, nothing paid twice
  python curate.py pairs.csv --out out/refvie --rejects rejects.json             # what was rejected on page.html

A run that was stopped or killed goes on where it was when the same command is given again.
Training with the result: the last line of the run says how.
"""

PAPER_MODELS = {  # flag: what the paper names, where it says
    "scorer": "Qwen/Qwen3-VL-4B-Instruct+EditScore/EditScore-Qwen3-VL-4B-Instruct",
    "grounder": "Qwen/Qwen3-VL-8B-Instruct",
    "segmenter": "facebook/sam3",
    "editor": "Qwen/Qwen-Image-Edit-2511",
    "verifier": "Qwen/Qwen3-VL-8B-Instruct",
    "embedder": "openai/clip-vit-large-patch14",
}
SERVED = dict.fromkeys(("scorer", "grounder", "verifier"), "or http://HOST/v1#NAME of a server ")


def above(least, kind=float):
    """The type of a flag whose number must be above `least`."""

    def number(text):
        value = kind(text)
        if not least < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above {least}")
        return value

    return number


def score(text):
    """The type of a flag on EditScore's scale."""
    value = float(text)
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10")
    return value


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Make reference-guided training data (RefVIE quadruplets) out of editing pairs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "pairs",
        nargs="*",
        metavar="PAIRS",
        help="tables (.csv .parquet .json .jsonl), folders of Ditto-1M or ReCo, or a ledger's stage",
    )
    add("--out", metavar="DIR", help="the ledger and the result; the same again resumes")
    add("--base-path", metavar="DIR", help="what paths in the tables start from (default: the table's folder)")
    add("--models", choices=("classical", "paper"), default="classical", help="default %(default)s")
    for flag, name in PAPER_MODELS.items():
        add(
            f"--{flag}",
            metavar="MODEL",
            help=f"with --models paper: a folder or hub id, {SERVED.get(flag, '')}(default {name})",
        )
    add("--min-score", type=score, default=6.0, metavar="0..10", help="for instruction tuning (default %(default)s)")
    add("--min-ref-score", type=score, default=8.0, metavar="0..10", help="to get a reference (default %(default)s)")
    add(
        "--fps",
        type=above(0),
        default=1.0,
        help="frame pairs a second that --models paper scores (default %(default)s)",
    )
    add("--min-side", type=above(0, int), default=64, metavar="PIXELS", help="of a reference (default %(default)s)")
    add("--max-aspect", type=above(1), default=4.0, help="of a reference (default %(default)s)")
    add(
        "--duplicate",
        type=above(0),
        metavar="COSINE",
        help="above it a reference is one already kept (default: paper 0.99, classical 0.96)",
    )
    add(
        "--guard",
        metavar="DIR",
        help="pictures and clips of a benchmark, e.g. RefVIE-Bench: whose reference or first frame resembles one is rejected",
    )
    add("--rejects", metavar="FILE", help="rejects.json of page.html: these records leave the result")
    add(
        "--page",
        type=above(0, int),
        default=400,
        metavar="N",
        help="at most so many quadruplets on page.html (default %(default)s)",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: more than one machine; pip install 'ray[data]' (default %(default)s)",
    )
    add(
        "--shard-rows",
        type=above(0, int),
        default=256,
        metavar="N",
        help="records in a file of the ledger (default %(default)s)",
    )
    add(
        "--workers",
        type=above(0, int),
        default=2,
        help="records at a time: threads of a stage; with ray also its actors (default %(default)s)",
    )
    add(
        "--retry-failed",
        action="store_true",
        help="try again what failed: no network, no memory, a file that is there now",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the synthesis of --models paper, with the record's number (default %(default)s)",
    )
    add("--device", metavar="NAME", help="default: cuda if there is one")
    add("--measure", choices=("truth", "scale"), help="figures of the README: truth: PAIRS is what `python -m nano data` wrote; "
        "scale: PAIRS is an empty folder to work in")  # fmt: skip
    add("--show-prompts", action="store_true", help="print what the models are asked, and stop")
    args = parser.parse_args(argv)
    if not args.show_prompts and not (args.pairs and (args.out or args.measure)):
        parser.error("say which pairs, and where to: curate.py pairs.csv --out out/refvie")
    for flag, name in PAPER_MODELS.items():
        if args.models == "classical" and getattr(args, flag):
            parser.error(f"--{flag} is for --models paper")
        setattr(args, flag, getattr(args, flag) or name)
    if args.duplicate is None:
        args.duplicate = 0.99 if args.models == "paper" else 0.96
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and slips of the pen answer before torch is there

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from connectors import PIXEL_MEAN, PIXEL_STD
from data import COLUMNS, FILES, csv_lines, has_columns, inside, parquet_file, row_group
from load import local_path, read_json
from media import (
    MediaError,
    decode,
    frame_rate,
    measure,
    open_media,
    pad_reference,
    read_image,
    resize,
    whole_file,
    write_image,
    write_text,
)
from metrics import as_float, lab, luma, otsu, read_reference
from nano.world import load_library, redraw_edit, render, to_uint8
from parallel import pick_device, rank_and_world
from vlm import (
    Barred,
    Local,
    Malformed,
    NoRedirect,
    OpenAICompatible,
    Settings,
    TryAgain,
    Unusable,
    has_secret,
    jpeg,
    jpeg_uri,
    json_objects,
    key_of,
    sampled_frames,
    sound,
    spoken,
)  # fmt: skip

STAGES = ("read", "score", "ground", "synthesize", "verify", "deduplicate")
PAID = ("ground", "synthesize", "verify")  # what these rejected stays rejected when a ledger is read again
KINDS = ("subject", "background")  # of edits that a reference can guide; the others are style, remove and other
# what goes wrong with one record, not with the run
FORESEEN = (ValueError, OSError, RuntimeError, ArithmeticError, LookupError, TypeError, TryAgain, Malformed)


class Rejected(Exception):
    """The record is whole and not good enough; the text says why. found: what was found out about it by then."""

    def __init__(self, reason, found=None):
        super().__init__(reason)
        self.found = found or {}


# ------------------------------------------------------------------------------------------------ records

PAIR = COLUMNS["video"]  # source, target and instruction by our names
SETS = {  # their columns for these, and the licence to be told
    "pairs": (PAIR, None),
    "Ditto-1M": (("source_path", "edited_path", "instruction"), "CC-BY-NC-SA-4.0"),
    "OpenVE-3M": (("original_video", "video", "prompt"), "CC-BY-NC-4.0"),
    "ReCo": (PAIR, "see its data card"),  # after `reco_line`
    "ledger": (PAIR, None),
}
# what a record may bring along, where it is of this type: of the pair, any line; of its reference, a ledger's alone
KNOWN = {"edit_type": str, "frames": int, "height": int, "width": int, "edit_score": (int, float), "frame_scores": list}
MADE = {"key": int, "box": list, "mask": str, "label": str, "ref_image": str, "ref_size": list,
        "verdict": bool, "verdict_reason": str, "feature": str}  # fmt: skip
# what an instruction is about, where the data do not say: the first of these that is found
ALL = r"(?:this(?= (?:to|into|in|as|be|look|feel|were)\b|\W|$)|it|everything|everyone|them|(?:all|the rest) of (?:it|this|them)|all|" \
      r"the (?:(?:whole|entire|same|overall|final) )*(?:thing|clip|video|picture|image|photo|scene|footage|look)s?)"  # fmt: skip
SHOWN = r"(?:shown?|pictured|depicted|attached|reference|provided|given|picture|image|photo)"
WORDS = [(kind, "|".join(words)) for kind, words in (
    ("background", (
        # "the man in the background" and "leave the background" do not ask for another
        r"(?<!in the )(?<!from the )(?<!in )(?<!with the )(?<!over the )(?<!keep the )(?<!leave the )(?<!only the )\bback(?:ground|drop)s?\b",
        r"\b(?:change|edit)s? only the background\b|\bonly the background (?:changes|comes)\b|\b(?:like|want|have|see|use) (?!the\b)[^.]* in the background\b",
        r"^in the back|\bat the back\b|\b(?:fills?|draw|paint)\b.* back\b",
        # nor a thing that shall blend into its surroundings, as long descriptions end
        r"^(?:\W*\w+){0,9}?\W*\b(?<!into the )(?<!with the )(?<!of the )(?<!with its )(?<!into its )(?:surroundings|setting|scenery|environment|landscape|location|green ?screen)\b",
        # nor do "in front of the shop" and "behind the counter", which say where a thing is
        r"\bbehind (?:everything|everyone|it|them|all|this|the (?:objects?|things?))\b|\bwhat is behind\b",
        rf"\b(?:{ALL}|objects?|things?|foreground|should) (?:\w+ ){{0,4}}(?:in front of|before|against|over|within|inside)\b",
        rf"\b(?:place|scene|view) (?:\w+ ){{0,3}}{SHOWN}\b|\b(?:this|a|{SHOWN}) (?:place|scene|view)\b|\bplace (?:that|where)\b",
        r"\b(?:move|transport|relocate|transfer|set|place|put|take) (?:everything|all|the (?:objects|things|scene|clip|video|picture)) (?:in|into|to|onto)\b",
    )),
    ("style", (
        r"(?<!hair )(?<!hair)\b(?:re)?styl(?:es?|ed|i[sz]e)\b|\baesthetics?\b|\bfilter\b|\btexture\b|\b(?:mood|atmosphere|manner|look) of\b|\bwhole thing\b",
        r"\b(?:as|like|into) (?:an? )?(?:\w+ )?(?:painting|sketch|cartoon|drawing|mosaic|film|photo)\b|\bof this as\b|\bfor the whole\b",
        rf"\b(?:make|turn|render|convert|transform|change|alter|switch|redo|recreate|redraw|repaint|paint|show|imagine|reimagine|reinterpret|recast|see|have|"
        rf"want|do|imitate|picture|let|give|dress|lend|put|of) {ALL}\b(?! look as though the)[^.]*\b(?:into|to|as|like|resembles?|be|the (?:look|feel|form)|from)\b",
        rf"\b{ALL} (?:\w+ ){{0,3}}(?:look|feel|seem|appear)(?:s|ed)? (?:\w+ ){{0,2}}(?:like|as)\b(?! though the)",
        rf"\b(?:{ALL}|is|be|out) (?:\w+ )?(?:resembl\w+|redone|reworked|repainted)\b|\b(?:this|it) be (?:made|as)\b|\blet it be\b|\bgo for\b|\bafter .* in this\b",
        r"^(?:as (?!if by)|like|now (?:as|in)\b)|\bwants? .* here\b",
    )),
    ("subject", (  # one thing for another
        r"\b(?:replac\w+|swap\w*|exchang\w+|substitut\w+|supplant\w*|trad\w+|switch|transform|turns?|convert|morph|chang\w+|becomes?|became|redraw|remake|rework)\b|->",
        r"\b(?:instead|rather than|prefer|meant)\b|\bin (?:place|lieu) of\b|\bin (?:its|the same) (?:place|spot)\b|\bthe (?:place|spot|role) of\b",
        r"\b(?:and|then) (?:\w+ )?(?:put|add|insert|use|bring|draw|in)\b|\bfill (?:that|the) .* with (?!the background)|\bcover the\b.*\bwith\b|\bwhere the\b.*\bdraw\b",
        r"^not the\b|^could the\b.*\bbe\b|^edit the (?!clip|video|picture|image|photo|scene).* so that\b|\bin\W*$",
    )),
    ("remove", (
        r"\b(?:remov\w+|delet\w+|erase|eliminate|discard|omit|exclude|ditch|hide|lose the|strip|scrub|zap|bin|wipe|retouch|inpaint|get rid of|do away|leave out)\b",
        r"\b(?:without the|minus|except|nobody|gone|vanish\w*|disappears?|invisible|away|no (?:longer|more|trace)|bye|farewell|empty space|nothing where)\b",
        r"\b(?:has to|must|should|would) (?:go|leave)\b|\b(?:don't|do not|not) (?:want|need|be)\b|\b(?:were|should|had)(?:n't| not| never)\b|\b(?:there is|has|contain|^)\W*no\b",
        r"\b(?:cut|take|throw(?! in)|kick|edit(?:ed)?|paint|rub|clear|pull)\b.*\b(?:out|off|from|away)\b|^(?:paint over|empty) the\b|\bin the background where\b",
        r"\bdrop(?:ping)? the (?!shown|pictured|attached|object|item|thing)",
    )),
    ("subject", (  # one thing more
        r"\b(?:add\w*|put|place|insert\w*|give|dress|make|draw|paste|drop|bring|includ\w+|introduce|use|show|set|let|have|with|should|want|wish|needs?|see|paint|stick)\b",
        r"\b(?:position|display|create|extend|throw in|copy|fill|generate|render|overlay|pop|plop|composite|incorporate|superimpose|slip|work|fit|conjure|get)\b",
        r"\b(?:object|thing|item|room|missing|goes|belongs|contain|lacks|appear|visible|there is|(?:what|how) about)\b",
    )),
)]  # fmt: skip
TYPES = {
    "local_change": "subject", "local_add": "subject", "change": "subject", "add": "subject", "replace": "subject",
    "subject": "subject", "subject_add": "subject", "background": "background", "background_change": "background",
    "background_ref": "background", "local_remove": "remove", "remove": "remove", "global_style": "style", "style": "style",
    "local_modification": "subject", "background_replacement": "background", "style_transfer": "style",
    "creative_edit": "other", "camera_edit": "other", "subtitle_edit": "other",
}  # fmt: skip
NUMBERS = r"-?\d+(?:\.\d+)?"


def kind_of(edit_type, prompt):
    """What an edit is: subject, background, remove, style or other; by its type where that is one of TYPES, else by the
    words of its instruction."""
    known = TYPES.get((edit_type or "").strip().lower().replace(" ", "_"))
    return known or next((kind for kind, words in WORDS if re.search(words, prompt, re.IGNORECASE)), "other")


def read_pairs(path, args):
    """Yield (the set where its files say it, else None; base folder; place; line) of everything in `path`. ValueError,
    FileNotFoundError."""
    path, base = Path(path), args.base_path
    if path.is_file():
        yield from ((None, base or path.parent, place, line) for place, line in read_lines(path))
    elif (path / "training_metadata").is_dir():  # Ditto-1M
        for file in sorted((path / "training_metadata").glob("*.json")):
            yield from ((None, base or path, place, line) for place, line in read_lines(file))
    elif tables := sorted(path.glob("*/*_data_configs.json")):
        for file in tables:
            for number, (place, line) in enumerate(read_lines(file)):
                try:
                    line = reco_line(line, file.parent.name, place)
                except ValueError:
                    if number == 0:  # its field names are others than we know
                        raise
                    line = None
                yield "ReCo", base or path, place, line
    elif shards := sorted(path.glob("[0-9]*.jsonl")):
        yield from read_stage(path, shards, args)
    elif path.is_dir():
        raise ValueError(
            f"{path}: neither Ditto-1M (training_metadata/), ReCo (*/*_data_configs.json) nor a ledger's stage; give a table"
        )
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")


def read_stage(path, shards, args):
    """`read_pairs` of a ledger's stage."""
    run = path.resolve().parent.parent
    told, made = (json.loads((path.parent / name).read_text()) for name in ("read.json", "settings.json"))
    if len(shards) < told["shards"]:
        raise ValueError(
            f"{path}: that stage is not done, {len(shards)} of {told['shards']} shards; finish the run, or give an earlier stage"
        )
    settings = settings_of(args)
    other = [
        name for name in ("models", "embedder") if made.get(name) != settings.get(name)
    ]  # their likeness is another's
    if other and path.name in ("verify", "deduplicate"):
        its = f"--{other[0]} {made.get(other[0])}"
        raise ValueError(f"{path} holds features of {its}, whose likeness is another's: say {its}")
    for shard in shards:
        for number, line in enumerate(read_json_lines(shard), 1):
            place = f"{shard}, line {number}"
            line |= {key: str(inside(run, line[key], place)) for key in ("mask", "ref_image") if key in line}
            if other:
                line.pop("feature", None)  # an earlier stage has those of the ledger that it was made from
            yield "ledger", args.base_path or told["bases"][line["base"]], place, line


def read_lines(path):
    """Yield (place, dict) of the rows of a .csv, .parquet, .jsonl or .json file."""
    if path.suffix == ".parquet":
        file = parquet_file(path)
        wanted = [name for name in file.schema_arrow.names if not name.endswith("_bytes")]
        for group in range(file.num_row_groups):
            for i, line in enumerate(row_group(path, file, group, wanted).to_pylist()):
                yield f"{path}, row {i} of group {group}", line
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            yield from ((f"{path}, line {number}", parsed(text)) for number, text in enumerate(file, 1) if text.strip())
    elif path.suffix == ".json":
        try:
            lines = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is not JSON ({error})") from None
        if not isinstance(lines, list):
            raise ValueError(f"{path}: has no list of pairs")
        for number, line in enumerate(lines):
            yield f"{path}, entry {number}", line
    elif path.suffix == ".csv":
        yield from csv_lines(path)
    else:
        raise ValueError(f"{path}: a table is .csv, .parquet, .json or .jsonl")


def write_json_lines(path, rows):
    """Whole, or not at all."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())  # or a machine that dies could keep the new name and lose what is in it


def parsed(text):
    """What a line of JSON says, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json_lines(path):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not isinstance(found := parsed(line), dict):
                raise ValueError(f"{path}, line {number}: is not a record in JSON")
            yield found


def reco_line(line, task, place):
    """A line of ReCo by our names: its clips lie under <task>/src_videos and <task>/tar_videos."""
    fields = line if isinstance(line, dict) else {}
    given = lambda *names: next((str(fields[n]) for n in names if fields.get(n)), None)
    prompt = given("instruction", "prompt", "edit_instruction", "caption")
    source = given("src_video", "src_video_path", "source", "source_path", "video")
    target = given("tar_video", "tar_video_path", "tgt_video", "target", "target_path") or source
    if not (prompt and source):
        raise ValueError(
            f"{place}: expected an instruction and a source clip; it has {', '.join(fields) or repr(line)}"
        )
    below = lambda name, folder: name if name.startswith(f"{task}/") else f"{task}/{folder}/{Path(name).name}"
    return {
        "src_video": below(source, "src_videos"),
        "tgt_video": below(target, "tar_videos"),
        "prompt": prompt,
        "edit_type": task,
    }


def records_of(args, bases):
    """Yield the records of all inputs, numbered. `bases`, a list, is filled with the folders that their paths start from.

    Nothing is opened but the tables: a clip that is missing is found out, and counted, when it is its turn.
    """
    number, told, home = 0, set(), lru_cache(lambda base: str(Path(base).resolve()))
    for source in args.pairs:
        known = None  # the set that this input was found to be
        for name, base, place, line in read_pairs(source, args):
            fields, base = line if isinstance(line, dict) else {}, home(base)
            known = name or next((key for key, (columns, _) in SETS.items() if set(columns) <= fields.keys()), known)
            if known is None:
                has_columns(place, PAIR, list(fields))  # raises: it has not
            columns, licence = SETS[known]
            if licence and known not in told:
                told.add(known)
                print(f"licence     {known}: {licence}")
            if base not in bases:
                if unsound := [folder for folder in (base, args.out) if sound(folder) != folder]:
                    raise ValueError(
                        f"{sound(unsound[0])}: its name is no UTF-8 text, which no table can hold; rename the folder"
                    )
                bases.append(base)
            record = {"id": f"{number:07d}", "name": sound(str(fields.get("name") or fields.get("id") or number))}
            record |= {key: fields.get(column) for key, column in zip(PAIR, columns)} | {"base": bases.index(base)}
            record |= carried(fields, known == "ledger")
            if known == "ledger":
                adopt(record, Path(args.out))
            record |= start_of(record, base, place)
            if known == "ledger":
                record |= end_of(record, line, args)
            yield record
            number += 1
    if not number:
        raise ValueError(f"{', '.join(args.pairs)}: no pairs")


def carried(line, ours):
    """What a line brings along of the stages' work: what is known of the pair, and if it is a ledger's what was made of it.
    A reference without its mask is made anew."""
    kinds = KNOWN | MADE if ours and {"key", "box", "mask"} <= line.keys() else KNOWN
    found = {key: line[key] for key, kind in kinds.items() if isinstance(line.get(key), kind) and line[key] != ""}
    if isinstance(line.get("edit_score"), str) and re.fullmatch(NUMBERS, line["edit_score"].strip()):  # of a CSV
        found["edit_score"] = float(line["edit_score"])
    if not 0 <= found.get("edit_score", 0) <= 10:
        del found["edit_score"]
    return found


def adopt(record, out):
    """Take over the pictures that another run made for a record: a link where that can be, else a copy."""
    for key, folder in (("mask", "masks"), ("ref_image", "refs")):
        if key in record:
            source, name = record[key], picture_name(folder, record["id"])
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(out / name) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
            record[key] = name


def picture_name(folder, number):
    """Where a record's picture lies below --out: a thousand in a folder."""
    return f"{folder}/{number[:-3]}/{number}.png"


def start_of(record, base, place):
    """Kind and status of a new record: one with an empty field, or a path that leaves its base, is over at once."""
    end = {"kind": None, "status": "failed", "stage": "read"}
    for key in PAIR:
        if not isinstance(record[key], str) or not record[key].strip() or sound(record[key]) != record[key]:
            texts = {key: sound(record[key]) if isinstance(record[key], str) else "" for key in PAIR}
            return end | texts | {"reason": f"{place}: {key} is empty, or no text"}
    try:
        inside(base, record["src_video"], place), inside(base, record["tgt_video"], place)
    except ValueError as error:
        return end | {"reason": str(error)}
    return {"kind": kind_of(record.get("edit_type"), record["prompt"]), "status": "open"}


def end_of(record, line, args):
    """What stays of a ledger's line that had ended: it failed, or a stage after the scores rejected it."""
    if not (
        line["status"] == "failed" and not args.retry_failed or line["status"] == "rejected" and line["stage"] in PAID
    ):
        return {}
    tuning = line["stage"] in PAID and record.get("edit_score", -1) >= args.min_score
    return {key: line[key] for key in ("status", "stage", "reason")} | {"tuning": tuning}


# ------------------------------------------------------------------------------------------------ the ledger


class Ledger:
    """What has become of every record: ledger/<stage>/<shard>.jsonl, a record a line, whole or not there.

    While a shard is worked on, <shard>.part grows by each record that is done, so that a run that was killed repeats
    at most the records it was busy with. All shards of a stage hold the same records as those of the stage before,
    those that had ended too: each file tells everything.
    """

    def __init__(self, out):
        self.out = Path(out)
        self.folder = self.out / "ledger"

    def path(self, stage, shard):
        return self.folder / stage / f"{shard:05d}.jsonl"

    def done(self, stage, shard):
        return self.path(stage, shard).is_file()

    def rows(self, stage, shard):
        rows = list(read_json_lines(self.path(stage, shard)))
        told = self.told
        size = told.get("shard_rows", 0)  # ledgers begun before this number was kept are not checked
        if size and len(rows) != min(size, told["records"] - shard * size):
            raise ValueError(f"{self.path(stage, shard)}: has lost records, {len(rows)} are left (a crash?): delete it"
                             f"{' and read.json' if stage == 'read' else ''}, and the same command makes it anew")  # fmt: skip
        return rows

    def write(self, stage, shard, rows):
        path = self.path(stage, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(path, rows)
        path.with_suffix(".part").unlink(missing_ok=True)

    @contextmanager
    def journal(self, stage, shard):
        """Yield ({id: record} that were done before, a function that adds one)."""
        path = self.path(stage, shard).with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a line that was being written when we were killed is not one
        rows = {row["id"]: row for row in map(parsed, whole.splitlines()) if row}  # a machine that died may leave zeros
        with path.open("ab") as file:
            file.truncate(len(whole))

            def add(row):
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()

            yield rows, add

    def reopen_failed(self, shard):
        """Make the failed records of a shard open again: in every stage its work, done or begun, becomes a journal
        without them."""
        for stage in reversed(
            STAGES[1:]
        ):  # so that, killed in between, no later stage still tells of what is open again
            path = self.path(stage, shard)
            part = path.with_suffix(".part")
            rows = self.rows(stage, shard) if self.done(stage, shard) else []
            if part.is_file() or any(row["status"] == "failed" and row["stage"] != "read" for row in rows):
                with self.journal(stage, shard) as (begun, _):
                    worked_on = begun | {row["id"]: row for row in rows if row.get("passed") == stage}
                write_json_lines(part, [row for row in worked_on.values() if row["status"] != "failed"])
                path.unlink(missing_ok=True)
        taken_over = lambda row: row["status"] == "failed" and row["stage"] != "read"  # from another run's ledger
        if any(map(taken_over, rows := self.rows("read", shard))):
            self.write(
                "read", shard, [row | {"status": "open", "tuning": False} if taken_over(row) else row for row in rows]
            )

    @property
    def told(self):
        """What was read, read.json, or None while the tables have not been read to the end."""
        path = self.folder / "read.json"
        return read_json(path) if path.is_file() else None

    def all_done(self, stage):
        """Whether a stage is done with all that was read."""
        told = self.told
        return told is not None and all(self.done(stage, shard) for shard in range(told["shards"]))


def read_all(args, ledger):
    """The tables into shards of records, once."""
    if told := ledger.told:
        if told["sizes"] != sizes(args):
            raise ValueError(f"{', '.join(args.pairs)} changed since {ledger.out} was begun: give another --out")
        return
    shutil.rmtree(ledger.folder / "read", ignore_errors=True)  # of a reading that was cut off
    bases, shards, total = [], 0, 0
    records = iter(tqdm(records_of(args, bases), desc="read", unit=" records", mininterval=1))
    while rows := list(islice(records, args.shard_rows)):
        ledger.write("read", shards, rows)
        shards, total = shards + 1, total + len(rows)
    # not before: a slip in the inputs should not bind the folder
    write_text(ledger.folder / "settings.json", json.dumps(settings_of(args), indent=1))
    told = {"records": total, "shards": shards, "shard_rows": args.shard_rows, "bases": bases, "sizes": sizes(args)}
    write_text(ledger.folder / "read.json", json.dumps(told))


def sizes(args):
    return {path: Path(path).stat().st_size for path in args.pairs if Path(path).is_file()}


@contextmanager
def only_run(ledger, rank):
    """Two runs in one folder would mix their work: the second is refused."""
    ledger.folder.mkdir(parents=True, exist_ok=True)
    with (ledger.folder / f"lock.{rank}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{ledger.out}: another curate.py is at work there; wait for it, or give another --out"
            ) from None
        yield


def settings_of(args):
    """What the records of a folder depend on."""
    free = ("out", "engine", "workers", "retry_failed", "device", "show_prompts", "measure", "rejects", "page")
    models = PAPER_MODELS if args.models == "classical" else ()
    return {k: v for k, v in vars(args).items() if k not in free and k not in models} | {"prompts": PROMPTS_VERSION}


def same_settings(args, ledger):
    """A folder's records were made with one set of settings; ValueError that names the one that differs."""
    path, settings = ledger.folder / "settings.json", settings_of(args)
    before = read_json(path) if path.is_file() else settings
    changed = [key for key in settings | before if before.get(key) != settings.get(key)]
    if changed:
        usable = STAGES[1:-2] if {"models", "embedder"} & set(changed) else STAGES[1:-1]  # its features are another's
        last = [stage for stage in usable if ledger.all_done(stage)][-1:]
        raise ValueError(
            f"{ledger.out} was made with {changed[0]} {before.get(changed[0])!r}, not {settings.get(changed[0])!r}: give another --out"
            + "".join(f"; {ledger.folder / stage} as its input keeps what was paid for" for stage in last)
        )


def out_of_room(error):
    """Whether a disk or a quota is full: no record's fault. MediaErrors have it as what they were raised for."""
    return any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in (error, error.__context__))


def ended(row, stage, status, reason):
    reason = " ".join(str(reason).split()) or type(reason).__name__
    return row | {"status": status, "stage": stage, "reason": reason[:300]}


def run_shard(stage, ledger, shard, bar=None):
    """One stage over one shard, from wherever it was."""
    rows = ledger.rows(STAGES[STAGES.index(stage.name) - 1], shard)
    with ledger.journal(stage.name, shard) as (done, add):
        waiting = [row for row in rows if row["status"] == "open" and row["id"] not in done]
        bar is None or bar.update(len(rows) - len(waiting))
        for row in stage(waiting):
            row["passed"] = stage.name
            add(row)
            done[row["id"]] = row
            bar is None or bar.update()
        rows = [done.get(row["id"], row) if row["status"] == "open" else row for row in rows]
    if len(waiting) >= 20 and all(done[row["id"]]["status"] == "failed" for row in waiting):
        raise ValueError(
            f"all {len(waiting)} records of a shard failed in `{stage.name}`: {done[waiting[0]['id']]['reason']}; mend that and "
            "add --retry-failed, or go on without them by the same command again"
        )
    ledger.write(stage.name, shard, rows)


# ------------------------------------------------------------------------------------------------ the four stages


def load_models(args, stage):
    models = {"classical": Classical, "paper": Paper}[args.models](args)
    models.setup(stage)
    return models


class Stage:
    """Records -> records. `one` does a record's work: it returns what to add to the record, or raises Rejected. Several
    threads work on records."""

    def __init__(self, args, bases):
        self.args, self.bases, self.loaded, self.barred = args, bases, None, None
        self.lock = threading.Lock()

    @property
    def models(self):
        """What the records are put to, loaded for the first that asks: a ledger read again may ask nothing. Barred where
        that fails, for it is no record's fault."""
        with self.lock:
            if self.barred:  # loading may take minutes: the others that wait need not fail one by one
                raise self.barred
            if self.loaded is None:
                try:
                    self.loaded = load_models(self.args, self.name)
                except FORESEEN as error:
                    self.barred = Barred(f"{self.name}: {error}")
                    raise self.barred from error
        return self.loaded

    def __call__(self, rows):
        """Yield the records, open, rejected or failed, as they are done. What ends the run, Ctrl-C too, is raised after all
        that were begun are done: they may have been paid for. A second Ctrl-C leaves them."""
        rows, busy, ends, pool = iter(rows), set(), None, ThreadPoolExecutor(self.args.workers)
        more = lambda: {pool.submit(self.guarded, row) for row in islice(rows, 2 * self.args.workers - len(busy))}
        try:
            while busy := busy if ends else busy | more():
                try:
                    done, busy = wait(busy, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt as stop:
                    if ends is not None:
                        raise
                    ends, done, busy = stop, set(), {future for future in busy if not future.cancel()}
                    print(
                        f"\nnote        the {len(busy)} records under way are finished; Ctrl-C once more leaves them",
                        file=sys.stderr,
                    )
                for future in done:
                    if future.exception() is None:
                        yield future.result()
                    elif ends is None:
                        ends = future.exception()
                        busy = {future for future in busy if not future.cancel()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if ends is not None:
            raise ends

    def guarded(self, row):
        try:
            return row | self.one(row)
        except Rejected as reason:
            return ended(row | reason.found, self.name, "rejected", reason)
        except Barred:
            raise
        except FORESEEN as error:
            if out_of_room(error):
                raise
            return ended(row, self.name, "failed", error)

    def file(self, row, key):
        """A record's file: a clip below its base, a mask or reference below --out."""
        return inside(self.args.out if key in ("mask", "ref_image") else self.bases[row["base"]], row[key], row["id"])

    def clips(self, row):
        return self.file(row, "src_video"), self.file(row, "tgt_video")

    def keep(self, folder, row, image):
        """Write a record's picture, uint8 (H, W, 3), below --out -> its name there."""
        name = picture_name(folder, row["id"])
        (Path(self.args.out) / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(Path(self.args.out) / name, image)
        return name


class Score(Stage):
    """Stage 1. How well the edit was made, 0..10: all frames' scores, their mean, and what the record is good for."""

    name = "score"

    def one(self, row):
        found = {}
        if "frames" not in row:  # whoever brings a score need not have opened the files
            _, shape = (measure(path) for path in self.clips(row))  # a source that is missing is no good for tuning
            found |= dict(zip(("frames", "height", "width"), shape))
        if "edit_score" not in row:
            found["frame_scores"] = [round(s, 3) for s in self.models.score(*self.clips(row), row)]
            found["edit_score"] = round(sum(found["frame_scores"]) / len(found["frame_scores"]), 3)
        return self.judged(row | found)

    def judged(self, row):
        score, kind = row["edit_score"], row["kind"]
        row["tuning"] = score >= self.args.min_score
        if not row["tuning"]:
            raise Rejected(f"score {score:g} is below {self.args.min_score:g}", row)
        if kind not in KINDS:
            why = {"remove": "a removal leaves nothing to show", "style": "a style is no object"}
            raise Rejected(f"no reference for this kind of edit: {why.get(kind, 'neither object nor background')}", row)
        if score < self.args.min_ref_score:
            raise Rejected(
                f"score {score:g} is below {self.args.min_ref_score:g}, enough for instruction tuning only", row
            )
        return row


class Ground(Stage):
    """Stage 2. Where the new object is, or the foreground that stands before a new background: box, mask, key frame."""

    name = "ground"

    def one(self, row):
        if "mask" in row:
            return {}
        box, mask, key = self.models.ground(*self.clips(row), row)
        share = mask.float().mean().item()
        if share < 2e-4:
            raise Rejected("the mask is empty")
        if share > 0.8:
            raise Rejected(f"the mask covers {share:.0%} of the frame")
        picture = mask[..., None].expand(-1, -1, 3).to(torch.uint8) * 255
        return {"box": [round(v, 4) for v in box], "mask": self.keep("masks", row, picture), "key": key}


class Synthesize(Stage):
    """Stage 3. The reference picture; extreme shapes and small ones are dropped."""

    name = "synthesize"

    def one(self, row):
        if "ref_image" in row:
            self.check(*row["ref_size"])
            return {}
        mask = read_image(self.file(row, "mask"))[..., 0] > 127
        image = self.models.synthesize(*self.clips(row), mask, row)
        height, width = image.shape[:2]
        self.check(height, width)
        return {"ref_image": self.keep("refs", row, image), "ref_size": [height, width]}

    def check(self, height, width):
        if min(height, width) < self.args.min_side:
            raise Rejected(f"the reference has {width}x{height} pixels, a side below {self.args.min_side}")
        if max(height / width, width / height) > self.args.max_aspect:
            raise Rejected(f"the reference has {width}x{height} pixels, an aspect above {self.args.max_aspect:g}")


class Verify(Stage):
    """Stage 4, first half. Whether the reference and the edited clip show the same, and the reference's feature."""

    name = "verify"

    def one(self, row):
        found = {}
        if "verdict" not in row:
            agree, reason = self.models.verify(*self.clips(row), self.file(row, "ref_image"), row)
            found = {"verdict": bool(agree), "verdict_reason": reason}
        known = row | found
        if not known["verdict"]:
            raise Rejected(f"the reference does not show the edit: {known.get('verdict_reason', '')}", found)
        if "feature" not in row:
            found["feature"] = pack(self.models.embed([read_image(self.file(row, "ref_image"))])[0])
        if self.args.guard and "source_feature" not in row:
            found["source_feature"] = pack(self.models.embed([frame_at(self.file(row, "src_video"), 0)])[0])
        return found


CLASSES = {stage.name: stage for stage in (Score, Ground, Synthesize, Verify)}


def pack(feature):
    """(D,) -> text: float16, which moves a cosine by less than 0.0005."""
    return base64.b64encode(feature.half().cpu().numpy().tobytes()).decode()


def unpack(text):
    return np.frombuffer(base64.b64decode(text), dtype=np.float16)


def frame_at(path, index):
    """Frame `index` of a clip or picture, uint8 (H, W, 3), at its own size. MediaError."""
    with open_media(path) as (container, stream):
        for _, rgb in islice(decode(path, container, stream), index, None):
            return rgb
    raise MediaError(f"{path}: has no frame {index}")


# ------------------------------------------------------------------------------------------------ classical models

LOOKS = 12  # frames of a clip that are looked at
LOOK_PIXELS = 320 * 180
UNCHANGED, CHANGED = 8.0, 16.0  # CIELAB units: a VAE's trace stays below the first; above the second all is edit


def look_at(path, count):
    """LOOKS of the first `count` frames of a clip, evenly spread, shrunk: uint8 (T, H, W, 3), and their indices."""
    return frames_at(path, sorted({round(i) for i in np.linspace(0, count - 1, min(LOOKS, count))}), LOOK_PIXELS)


def frames_at(path, wanted, max_pixels):
    """The frames of some indices, in order, as far as the clip has them, shrunk: uint8 (T, H, W, 3), and their indices."""
    frames, indices = [], []
    with open_media(path) as (container, stream):
        for number, (_, rgb) in enumerate(decode(path, container, stream)):
            if number in wanted:
                scale = min(1.0, math.sqrt(max_pixels / (rgb.shape[0] * rgb.shape[1])))
                frames.append(resize(rgb[None], [max(8, round(side * scale)) for side in rgb.shape[:2]])[0])
                indices.append(number)
            if number == wanted[-1]:
                break
    if not frames:
        raise MediaError(f"{path}: has no frames")
    return torch.stack(frames), indices


def moments(source, target):
    """How many frames two clips have in common. MediaError where one is so much longer that they show other moments."""
    before, after = (measure(path)[0] for path in (source, target))
    if abs(before - after) > 0.1 * after + 2:
        raise MediaError(f"{target}: has {after} frames, its source {before}: not the same moments")
    return min(before, after)


def look_at_pair(source, target):
    """The same moments of both clips, at the target's size -> source, target float (T, 3, H, W), indices."""
    shared = moments(source, target)
    (a, _), (b, indices) = (look_at(path, shared) for path in (source, target))
    count = min(len(a), len(b))  # a file may hold fewer frames than it declares
    if abs(math.log(a.shape[1] / a.shape[2] * b.shape[2] / b.shape[1])) > 0.05:
        raise MediaError(
            f"{target}: is {b.shape[2]}x{b.shape[1]} where its source is {a.shape[2]}x{a.shape[1]}, another aspect"
        )
    return as_float(resize(a[:count], b.shape[1:3])), as_float(b[:count]), indices[:count]


def difference(source, target):
    """CIELAB distance of each pixel, averaged over 3x3 -> (T, H, W)."""
    apart = 100 * (lab(source) - lab(target)).square().sum(dim=1).sqrt()
    return F.avg_pool2d(apart[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def split_value(values):
    """Otsu's threshold between what stayed and what changed, kept within UNCHANGED and CHANGED."""
    return min(max(otsu(values.clamp(max=60), 60, 60), UNCHANGED), CHANGED)


def regions(mask):
    """Connected regions (8 neighbours) of each frame of bool (T, H, W) -> int64 labels, 0 outside.

    Runs of pixels in a row are the nodes, runs that touch in the next row the edges; the smallest number wins.
    """
    frames, height, width = mask.shape
    line = np.pad(mask.numpy(), ((0, 0), (0, 0), (0, 1))).ravel().astype(np.int8)  # a gap ends each row
    change = np.diff(line, prepend=0)
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)  # ends are exclusive
    above = np.flatnonzero(starts // (width + 1) % height < height - 1)
    low = np.searchsorted(ends, starts[above] + width + 1, "left")
    high = np.searchsorted(starts, ends[above] + width + 1, "right")
    a = np.repeat(above, high - low)
    b = np.arange(len(a)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + np.repeat(low, high - low)
    label = np.arange(len(starts))
    while (label[a] != label[b]).any():
        smaller = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], smaller)
        np.minimum.at(label, label[b], smaller)
        label = label[label]
    out = torch.zeros(mask.shape, dtype=torch.int64)
    out[mask] = torch.from_numpy(np.repeat(label + 1, ends - starts))
    return out


def large_regions(mask, least=0.1, pixels=4):
    """A mask (T, H, W) without its specks: of each frame the regions of at least `least` of the largest, and `pixels`."""
    labels = regions(mask)
    count = torch.bincount(labels.flatten())
    count[0] = 0
    size = count[labels]  # (T, H, W)
    largest = size.amax(dim=(1, 2), keepdim=True)
    return mask & (size >= (least * largest).clamp_min(pixels))


def without_holes(mask):
    """A mask (T, H, W) with what it encloses."""
    around = F.pad(~mask, (1, 1, 1, 1), value=True)
    labels = regions(around)
    return ~(labels == labels[:, :1, :1])[:, 1:-1, 1:-1]


def clean(mask, least=0.1):
    """Large regions without their holes; gaps of 2 % of the frame are closed first, bridges of a pixel cut."""
    grow = lambda x, n: F.max_pool2d(x, 2 * n + 1, 1, n)
    x, gap = mask[:, None].float(), min(mask.shape[1:]) // 60
    if gap:
        x = -grow(-grow(x, 1), 1)
        x = -grow(-x, 1)
        x = grow(x, 1)
        x = -grow(-grow(x, gap), gap)
    return without_holes(large_regions(x[:, 0] > 0.5, least))


def box_of(mask):
    """[x1, y1, x2, y2] of a mask (H, W), shares of width and height."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    height, width = mask.shape
    return [
        columns[0].item() / width,
        rows[0].item() / height,
        (columns[-1].item() + 1) / width,
        (rows[-1].item() + 1) / height,
    ]


def ramp(value, low, high):
    """0 at `low` and beyond, 1 at `high`, straight in between."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


class Classical:
    """No weights. Everything follows from the difference of source and target at the same moments.

    Sees: how strong an edit is, how well it stays in its place, whether it is there all the time. Cannot see: what was
    asked for, whether the result looks natural, what an object is. A changed light counts as an edit.
    """

    def __init__(self, args):
        self.args = args

    def setup(self, stage):
        pass

    def score(self, source_path, target_path, row):
        """Of each moment 10 sqrt(fit x presence): FACTS.md's sqrt(SC PQ) with what can be measured in their places."""
        source, target, _ = look_at_pair(source_path, target_path)
        apart = difference(source, target)
        changed = apart > split_value(apart)
        body = clean(changed, 0.25)
        usual = body.float().mean(dim=(1, 2)).median().item()
        return [
            self.fit(row["kind"], source[t], target[t], apart[t], changed[t], body[t], usual) for t in range(len(apart))
        ]

    def fit(self, kind, source, target, apart, changed, body, usual):
        area = body.float().mean().item()
        strength = ramp(apart[body].mean().item() if body.any() else 0.0, 4, 16)
        left = apart[~body].square().mean().sqrt().item() if not body.all() else 99.0
        if kind == "style":
            edges = [
                (luma(x[None])[..., 1:, 1:] - luma(x[None])[..., :-1, :-1]).abs().flatten() for x in (source, target)
            ]
            kept = torch.corrcoef(torch.stack(edges))[0, 1].nan_to_num().item()
            return 10 * math.sqrt(strength * ramp(area, 0.05, 0.6) * ramp(kept, 0.0, 0.3))
        if kind == "background":
            return 10 * math.sqrt(strength * ramp(area, 0.05, 0.3) * ramp(1 - area, 0.0, 0.03))
        together = (changed & body).sum().item() / max(changed.sum().item(), 1)  # the rest is scattered about
        place = min(ramp(left, 12, 6), ramp(together, 0.3, 0.8), ramp(area, 0.85, 0.5), ramp(area, 0.0, 0.001))
        presence = ramp(area, 0.1 * usual, 0.3 * usual) if usual else 0.0
        return 10 * math.sqrt(min(strength, place) * presence)

    def ground(self, source_path, target_path, row):
        """-> box, mask (H, W) and index of the frame in which it is best seen."""
        source, target, indices = look_at_pair(source_path, target_path)
        apart = difference(source, target)
        body = self.body(apart, row["kind"])
        area = body.float().mean(dim=(1, 2))
        edge = torch.stack([body[:, 0].any(1), body[:, -1].any(1), body[..., 0].any(1), body[..., -1].any(1)]).sum(0)
        if area.max() < 2e-4:
            raise Rejected("nothing changed" if row["kind"] == "subject" else "nothing stayed: no foreground")
        if row["kind"] == "subject":
            best = (area * (1 - 0.2 * edge)).argmax()
            if area[best] > 0.6:
                raise Rejected(f"{area[best]:.0%} of the frame changed: not a local edit")
        else:
            best = (-area * (1 - 0.1 * edge) - (area < 2e-4).float()).argmax()
            if not 0.005 < area[best] < 0.75:
                raise Rejected(f"{area[best]:.0%} of the frame stayed: no background edit")
        return box_of(body[best]), body[best], indices[best]

    def body(self, apart, kind):
        """What is to be masked, bool (T, H, W): the changed region, or before a new background what stayed."""
        return clean(apart > split_value(apart), 0.25) if kind == "subject" else clean(apart < split_value(apart), 0.05)

    def synthesize(self, source_path, target_path, mask, row):
        """A subject cut out of the key frame, or the key frame without its foreground: uint8 (H, W, 3)."""
        if row["kind"] == "subject":
            return cut_out(frame_at(target_path, row["key"]), mask)
        source, target, indices = look_at_pair(source_path, target_path)
        foreground = self.body(difference(source, target), "background")
        frames, _ = frames_at(target_path, indices, 1280 * 720)
        return without_foreground(frames, foreground, indices.index(row["key"]))

    def verify(self, source_path, target_path, ref_path, row):
        """Whether the colours of the reference are those of the edit at other moments than the one it was taken from,
        and more so than those of the source in the same places: (bool, reason)."""
        source, target, indices = look_at_pair(source_path, target_path)
        body = self.body(difference(source, target), row["kind"])
        place = body if row["kind"] == "subject" else ~body
        others = [i for i, index in enumerate(indices) if index != row["key"] and place[i].any()]
        others = others or [indices.index(row["key"])]
        picture = read_reference(ref_path)
        ink = inked(picture)[0] if row["kind"] == "subject" else torch.ones(picture.shape[2:], dtype=torch.bool)
        wanted = colours(picture[0, :, ink].T)
        after, before = (colours(torch.cat([clip[i][:, place[i]].T for i in others])) for clip in (target, source))
        near, far = ((wanted - x).abs().mean().item() for x in (after, before))
        return near < min(ALIKE, far), f"colours {near:.0f} from the edit's, {far:.0f} from the source's (CIELAB)"

    def embed(self, images):
        return torch.stack([look_feature(image) for image in images])


ALIKE = 6.0  # CIELAB units between the colours of one thing at two moments: on 13 real edits at most 4


def inked(picture):
    """Where a reference (1, 3, H, W) is not its white ground -> bool (1, H, W)."""
    return picture.amin(dim=1) < 0.97


def colours(pixels, ways=8):
    """The colours of pixels (N, 3) in 0..1 as quantiles along some directions of CIELAB (ways, 20): the mean difference
    of two such tables is the (sliced) earth mover's distance of the two sets of colours."""
    directions = F.normalize(torch.randn(3, ways, generator=torch.Generator().manual_seed(0)), dim=0)
    values = 100 * lab(pixels.T[None, :, None])[0, :, 0].T @ directions  # (N, ways)
    return torch.quantile(values[:: max(1, len(values) // 20000)], torch.linspace(0.025, 0.975, 20), dim=0).T


def cut_out(frame, mask, margin=0.05):
    """The masked object of a frame (H, W, 3) on white, tightly cropped, uint8. mask: bool (h, w), smaller or as large.

    The mask's border moves to the nearest edge of the picture by a guided filter (He et al., 2010).
    """
    height, width = frame.shape[:2]
    soft = F.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    x1, y1, x2, y2 = box_of(soft[0, 0] > 0.5)
    pad = margin * max((x2 - x1) * width, (y2 - y1) * height)
    left, right = max(int(x1 * width - pad), 0), min(math.ceil(x2 * width + pad), width)
    top, bottom = max(int(y1 * height - pad), 0), min(math.ceil(y2 * height + pad), height)
    colour = as_float(frame[None, top:bottom, left:right])
    radius = max(1, round(height / mask.shape[0]))
    alpha = guided(soft[..., top:bottom, left:right], luma(colour), radius).sub(0.3).div(0.4).clamp(0, 1)
    return to_uint8(colour * alpha + (1 - alpha))[0]


def guided(x, guide, radius, strength=1e-3):
    """x (1, 1, H, W) smoothed, but not across the edges of `guide` (1, 1, H, W)."""
    mean = lambda y: F.avg_pool2d(y, 2 * radius + 1, 1, radius, count_include_pad=False)
    a = (mean(guide * x) - mean(guide) * mean(x)) / (mean(guide * guide) - mean(guide) ** 2 + strength)
    return mean(a) * guide + mean(mean(x) - a * mean(guide))


def without_foreground(frames, foreground, key):
    """Frame `key` of uint8 (T, H, W, 3) with what lies behind its foreground, bool (T, h, w): uint8 (H, W, 3).

    First from the frames that show it, moved by the camera's way between them; then, for what none of them shows, from
    its surroundings. Rejected where that would be most of the picture.
    """
    small = luma(as_float(resize(frames, foreground.shape[1:])))
    grown = F.max_pool2d(foreground[:, None].float(), 7, 1, 3)  # shadows and soft borders belong to it
    height, width = frames.shape[1:3]
    hole = F.interpolate(grown[key : key + 1], (height, width))[0, 0] > 0.5
    picture = as_float(frames[key : key + 1])
    seen = []
    for t in range(len(frames)):
        if t == key:
            continue
        way, error = camera_way(
            small[t : t + 1], small[key : key + 1], (1 - grown[key : key + 1]) * (1 - grown[t : t + 1])
        )
        if error > 0.05:
            continue
        grid = F.affine_grid(way[None], (1, 3, height, width), align_corners=False)[:, hole][:, None]  # (1, 1, N, 2)
        moved = F.grid_sample(as_float(frames[t : t + 1]), grid, padding_mode="border", align_corners=False)[0, :, 0]
        known = F.grid_sample(1 - grown[t : t + 1], grid, align_corners=False)[0, 0, 0] > 0.99
        seen.append(torch.where(known, moved, math.nan))
    unknown = hole.clone()
    if seen:
        found = torch.stack(seen).nanmedian(dim=0).values  # (3, pixels of the hole)
        picture[0, :, hole] = found.nan_to_num()
        unknown[hole] = found[0].isnan()
    if unknown.float().mean() > 0.5:
        raise Rejected(f"{unknown.float().mean():.0%} of the background is never seen")
    return to_uint8(from_surroundings(picture, ~unknown[None, None]))[0]


def camera_way(moving, fixed, weight):
    """Shift, zoom and roll that lay `moving` on `fixed`, lumas (1, 1, h, w), where weight (1, 1, h, w) is 1.

    -> theta (2, 3) for affine_grid, and the mean difference that is left. Gauss-Newton from coarse to fine
    (Lucas and Kanade, 1981); differences that stay large count little, as they belong to what moves by itself.
    """
    height, width = fixed.shape[2:]
    unit = max(height, width) / 2
    p = torch.zeros(4)  # zoom, roll, shift in units of half the longer side
    for level in (8, 4, 2, 1):
        size = [max(side // level, 8) for side in (height, width)]
        a, b, w = (F.interpolate(x, size, mode="area") for x in (moving, fixed, weight))
        ys, xs = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in size)
        y, x = torch.meshgrid(ys * height / 2 / unit, xs * width / 2 / unit, indexing="ij")
        for _ in range(8):
            grid = F.affine_grid(way_matrix(p, height, width)[None], a.shape, align_corners=False)
            warped = F.grid_sample(a, grid, padding_mode="border", align_corners=False)
            seen = F.grid_sample(torch.ones_like(a), grid, align_corners=False)
            gy, gx = torch.gradient(warped[0, 0])
            gx, gy = gx * size[1] / width * unit, gy * size[0] / height * unit
            rest = (b - warped)[0, 0]
            use = (w * seen)[0, 0]
            error = (rest.abs() * use).sum().item() / max(use.sum().item(), 1e-6)
            steps = torch.stack([gx * x + gy * y, gy * x - gx * y, gx, gy], dim=-1).flatten(0, 1)
            robust = (use / (1 + (rest / 0.05) ** 2)).flatten()
            normal = steps.T @ (steps * robust[:, None]) + 1e-4 * torch.eye(4)
            p = p + torch.linalg.solve(normal, steps.T @ (robust * rest.flatten()))
    return way_matrix(p, height, width), error if use.mean() > 0.1 else 1.0


def way_matrix(p, height, width):
    """Zoom, roll and shift as theta (2, 3) in affine_grid's coordinates, where both sides go from -1 to 1."""
    zoom, roll, right, down = p.tolist()
    unit = max(height, width)
    return torch.tensor(
        [
            [1 + zoom, -roll * height / width, right * unit / width],
            [roll * width / height, 1 + zoom, down * unit / height],
        ]
    )


def from_surroundings(picture, known):
    """Fill what is not known, bool (1, 1, H, W), with averages over as much around it as it takes: (1, 3, H, W)."""
    known = known.float()
    if known.min() == 1:
        return picture
    weight = F.avg_pool2d(known, 2, ceil_mode=True, count_include_pad=False)
    coarse = F.avg_pool2d(picture * known, 2, ceil_mode=True, count_include_pad=False) / weight.clamp_min(1e-6)
    if min(coarse.shape[2:]) > 1 or weight.min() == 0 < weight.max() and max(coarse.shape[2:]) > 1:
        coarse = from_surroundings(coarse, weight > 0)
    return picture * known + (1 - known) * F.interpolate(
        coarse, picture.shape[2:], mode="bilinear", align_corners=False
    )


def look_feature(image, size=16):
    """What a reference looks like, (D,) of length 1: its layout in CIELAB, most of its mean taken away.

    Shown is what lies within two standard deviations of its ink, so that a white margin, a resize or a JPEG's noise
    around the object move nothing.
    """
    picture = F.interpolate(
        as_float(image[None]), (64, 64), mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)
    ink = (0.92 - picture.amin(dim=1)[0]).clamp_min(1e-12).sqrt()
    axis = (torch.arange(64) + 0.5) / 32 - 1
    spread = []
    for weight in (ink.sum(dim=0), ink.sum(dim=1)):  # along x, along y
        middle = (weight * axis).sum() / weight.sum()
        spread.append((2 * ((weight * (axis - middle) ** 2).sum() / weight.sum()).sqrt(), middle))
    (x, right), (y, down) = spread
    window = torch.tensor([[[x, 0, right], [0, y, down]]])
    grid = F.affine_grid(window, (1, 3, 2 * size, 2 * size), align_corners=False)
    layout = lab(F.avg_pool2d(F.grid_sample(picture, grid, padding_mode="border", align_corners=False), 2))[0]
    return F.normalize((layout - 0.75 * layout.mean(dim=(1, 2), keepdim=True)).flatten(), dim=0)


# ------------------------------------------------------------------------------------------------ the paper's models

PROMPTS_VERSION = 1  # to be raised with every change of a prompt: it stands in the output
PROMPTS = {
    "success": (
        "You are a strict judge of video edits. The first image is a frame of the source, the second is the same moment "
        "after the edit. The instruction was: {prompt}\n"
        "Give two whole numbers from 0 to 25. First, how fully and rightly the instruction was carried out: 0 is not at all, "
        "25 is exactly. Second, how well everything that the instruction does not speak of was kept: 0 is another scene, 25 "
        "is untouched.\n"
        'Answer with one line of JSON: {{"reasoning": "<one sentence>", "score": [<first>, <second>]}}'
    ),
    "quality": (
        "You are a strict judge of pictures. The image is a frame of an edited video.\n"
        "Give two whole numbers from 0 to 25. First, how natural it looks: light, shadow, perspective, proportions; 25 is a "
        "photograph or a flawless picture of its style. Second, how free of artefacts it is: smears, torn borders, doubled "
        "limbs, unreadable text; 25 is none.\n"
        'Answer with one line of JSON: {{"reasoning": "<one sentence>", "score": [<first>, <second>]}}'
    ),
    "ground_subject": (
        "The image is the first frame of a video that was edited by this instruction: {prompt}\n"
        "Find the one object that the edit has brought or changed, as it now looks. "
        'Answer with JSON only: [{{"bbox_2d": [x1, y1, x2, y2], "label": "<what it is, a few words>"}}]. '
        "If it is not to be seen, answer []."
    ),
    "ground_background": (
        "The image is the first frame of a video whose background was replaced by this instruction: {prompt}\n"
        "Find the foreground that stands before the new background: one box around all of it. "
        'Answer with JSON only: [{{"bbox_2d": [x1, y1, x2, y2], "label": "<what it is, a few words>"}}]. '
        "If there is no foreground, answer []."
    ),
    "extract": (
        "Show the {label} of this picture alone, complete, on a plain white background, with nothing else in the picture. "
        "Keep its colours, material and details exactly as they are."
    ),
    "clear": (
        "Remove the {label} from this picture, with shadows and reflections, and fill in the background that was behind as "
        "it would look without it. Change nothing else."
    ),
    "verify_subject": (
        "The first image is a frame of a video that was edited by this instruction: {prompt}\n"
        "The second image is meant to show the object that the edit brought. Is it the same object, of the same colour, shape "
        "and material, alone and complete enough to be recognised?\n"
        'Answer with JSON only: {{"reason": "<one sentence>", "match": true or false}}'
    ),
    "verify_background": (
        "The first image is a frame of a video whose background was replaced by this instruction: {prompt}\n"
        "The second image is meant to show that background without any foreground. Is it the same place in the same style and "
        "light, with nothing left of the foreground and no smears?\n"
        'Answer with JSON only: {{"reason": "<one sentence>", "match": true or false}}'
    ),
}


def read_scores(text, highest=25):
    """A judge's answer -> its two numbers. Malformed: a failed parse is a failed record, never a number in the middle."""
    found = [f["score"] for f in json_objects(text) if isinstance(f.get("score"), list)]
    if not found:  # half a JSON, or none
        lists = re.findall(rf"score\W{{0,6}}\[\s*({NUMBERS})\s*,\s*({NUMBERS})\s*\]", text, re.IGNORECASE)
        found = [[float(a), float(b)] for a, b in lists]
    if not found:
        raise Malformed(f"no score in the answer: {' '.join(text.split())[:120]!r}")
    scores = found[-1]
    if len(scores) != 2 or not all(is_number(v) and 0 <= v <= highest for v in scores):
        raise Malformed(f"{scores} are not two numbers from 0 to {highest}")
    return [float(v) for v in scores]


def read_box(text, size=(1000, 1000)):
    """A grounder's answer -> box [x1, y1, x2, y2] in 0..1 and its label.

    size: what coordinates count, (width, height): 1000 for Qwen3-VL; of the resized picture for Qwen2.5-VL. Read are
    lists, single objects, code fences, text around, an answer that broke off or repeats itself; of several boxes the
    largest counts. Malformed where there is none; Rejected for a box that is no object's.
    """
    if re.search(r"\[\s*\]", text) and "bbox" not in text:
        raise Rejected("the grounder sees nothing of the kind")
    found = [(f.get("bbox_2d", f.get("bbox")), f.get("label")) for f in json_objects(text)]
    found = [
        (box, label) for box, label in found if isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    ]
    if not found:  # half a JSON, or none
        four = r"\s*,\s*".join([f"({NUMBERS})"] * 4)
        for match in re.finditer(rf"bbox(?:_2d)?[\"']?\s*:\s*\[\s*{four}\s*\]", text):
            label = re.match(r"[^{}]{0,40}?label[\"']?\s*:\s*([\"'])(.{1,80}?)\1\s*(?:[,}\]]|$)", text[match.end() :])
            found.append(([float(v) for v in match.groups()], label and label[2]))
    boxes = []
    for four, label in found:
        x1, y1, x2, y2 = (min(max(v / side, 0), 1) for v, side in zip(four, size * 2))
        boxes.append(((x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0, [x1, y1, x2, y2], label))
    if not boxes:
        raise Malformed(f"no box in the answer: {' '.join(text.split())[:120]!r}")
    area, box, label = max(boxes, key=lambda b: b[0])
    if area < 1e-3:
        raise Rejected(f"the box {[round(v, 3) for v in box]} is empty or tiny")
    if area > 0.95:
        raise Rejected("the box is the whole frame")
    return box, sound(label.strip())[:80] if isinstance(label, str) and label.strip() else "object"


def is_number(value):
    return type(value) in (int, float)  # true and false are ints to isinstance


def read_verdict(text):
    """A verifier's answer -> (bool, reason). Malformed where it does not say."""
    for found in reversed(list(json_objects(text))):
        match = str(found.get("match")).strip().lower()  # JSON's true, or the word
        if match in ("true", "yes", "false", "no"):
            return match in ("true", "yes"), sound(str(found.get("reason", "")))[:200]
    said = {m.lower() for m in re.findall(r"match\W{0,6}(true|false)\b", text, re.IGNORECASE)}
    if len(said) != 1:
        raise Malformed(f"no verdict in the answer: {' '.join(text.split())[:120]!r}")
    return said == {"true"}, ""


def add_adapter(module, folder):
    """Merge a released LoRA (adapter_config.json, adapter_model.safetensors) into a model's weights, in place.

    ValueError where the adapter is of another kind or some of it finds no place.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    if (
        config.get("peft_type", "LORA") != "LORA"
        or config.get("use_dora")
        or config.get("rank_pattern")
        or config.get("alpha_pattern")
    ):
        raise ValueError(f"{folder}: only plain LoRA adapters of one rank are read")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = {name.removesuffix(".weight"): p for name, p in module.named_parameters() if name.endswith(".weight")}
    lower = {name for name in tensors if ".lora_A." in name}
    other = tensors.keys() - lower - {name.replace(".lora_A.", ".lora_B.") for name in lower}
    if other or len(tensors) != 2 * len(lower):
        raise ValueError(
            f"{folder}: not pairs of lora_A and lora_B alone ({', '.join(sorted(other)[:3]) or 'a lora_B is missing'})"
        )
    for name in lower:
        layer = name.split(".lora_A.")[0]
        tail = re.search(
            r"(?:language_model\.|visual\.|model\.)?(?:layers|blocks|merger|deepstack_merger_list)\..*", layer
        )
        places = [w for w in weights if tail and w.endswith(re.sub(r"^model\.", "", tail[0]))]
        if "visual" not in layer:  # names of transformers 4 leave out language_model.; both towers have layers
            places = [w for w in places if "visual" not in w]
        if len(places) != 1:
            raise ValueError(
                f"{folder}: {layer} finds {'no place' if not places else 'several places'} in {type(module).__name__}"
            )
        a, b = tensors[name].float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()
        weight = weights[places[0]]
        with torch.no_grad():
            weight += (scale * (b @ a)).to(weight)
    return module


def open_model(name, device):
    """A multimodal model to ask: http://host/v1#MODEL (of an OpenAI-compatible server; one that serves a single model
    needs no #MODEL), or a folder or hub id, BASE+ADAPTER with a LoRA over it. ValueError where it cannot be had."""
    if name.startswith(("http://", "https://")):
        key, (address, _, model) = key_of("OPENAI_API_KEY"), name.partition("#")
        request = urllib.request.Request(
            f"{address.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        try:
            with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as answer:
                served = [entry["id"] for entry in json.load(answer)["data"]]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{name}: no OpenAI-compatible server answers there ({error}); start it, or name a model"
            ) from None
        if (model or len(served) != 1) and model not in served:
            raise ValueError(
                f"{name}: serves {len(served)} models, {', '.join(served[:8])}...: say which, {address}#MODEL"
            )
        return OpenAICompatible(model or served[0], Settings(endpoint=address, deadline=120.0, temperature=None))
    base, _, adapter = name.partition("+")
    asked = Local(local_path(base), Settings(device=device, max_pixels=1280 * 720, max_tokens=512))
    if adapter:
        add_adapter(asked.mllm, local_path(adapter))
    return asked


class Paper:
    """The models that the paper names. Those on this machine take one record at a time; a server takes --workers."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        self.lock = threading.Lock()

    def setup(self, stage):
        if stage == "score":
            self.scorer = open_model(self.args.scorer, self.device)
        elif stage == "ground":
            self.grounder = open_model(self.args.grounder, self.device)
            if isinstance(self.grounder, OpenAICompatible) and re.search(
                "qwen2[._]5.vl", self.grounder.model, re.IGNORECASE
            ):
                raise ValueError(f"{self.args.grounder}: Qwen2.5-VL counts boxes in pixels of the size that its server shrinks to, "
                                 "which we cannot know: serve Qwen3-VL, or give the folder or hub id")  # fmt: skip
            self.segmenter = open_segmenter(self.args.segmenter, self.device)
        elif stage == "synthesize":
            self.editor = open_editor(self.args.editor, self.device)
        elif stage == "verify":
            self.verifier = open_model(self.args.verifier, self.device)
        if stage in ("verify", "guard"):
            self.embedder = open_embedder(self.args.embedder, self.device)

    def ask(self, model, prompt, images, read, tries=5):
        """read(the answer) to a prompt about images, uint8 (H, W, 3) by label. Asks a server again that was busy, or whose
        answer cannot be read: it draws another, and the record's other answers are paid for."""
        server = isinstance(model, OpenAICompatible)
        with tempfile.TemporaryDirectory() as folder:
            media = [(label, Path(folder) / f"{label}.jpg") for label in images]
            for label, path in media:
                write_image(path, images[label])
            for done in range(1, tries + 1):
                try:
                    with nullcontext() if server else self.lock:
                        said = model.ask(prompt, media, 1.0).text
                    return read(spoken(said))
                except Malformed as error:  # a local model would say the same again
                    if isinstance(error, Unusable) or not server or done == tries:
                        raise
                except TryAgain as error:
                    if done == tries:
                        raise
                    time.sleep(min(error.after or 2 ** (done - 1) * (1 + random.random()), 60.0))

    def score(self, source_path, target_path, row):
        """EditScore (FACTS.md, "Curation"): of each pair of frames sqrt(min(SC) min(PQ)), from 0..25 to 0..10. Frame i
        of the edit is that of frame i of the source, whatever rate the files claim: the release writes all at 15 fps."""
        moments(source_path, target_path)
        with open_media(target_path) as (_, stream):
            rate = float(frame_rate(stream))
        pairs = zip(*(sampled_frames(path, self.args.fps, rate=rate)[0] for path in (source_path, target_path)))
        scores = []
        for source, target in pairs:
            prompt = PROMPTS["success"].format(prompt=row["prompt"])
            success = self.ask(self.scorer, prompt, {"source": source, "edited": target}, read_scores)
            quality = self.ask(self.scorer, PROMPTS["quality"].format(), {"edited": target}, read_scores)
            scores.append(math.sqrt(min(success) * min(quality)) * 10 / 25)
        return scores

    def ground(self, source_path, target_path, row):
        frame = frame_at(target_path, 0)
        absolute = isinstance(self.grounder, Local) and self.grounder.positions_a_second  # Qwen2.5-VL
        size = self.grounder.seen_size(*frame.shape[:2])[::-1] if absolute else (1000, 1000)
        prompt = PROMPTS[f"ground_{row['kind']}"].format(prompt=row["prompt"])
        box, row["label"] = self.ask(self.grounder, prompt, {"frame": frame}, lambda said: read_box(said, tuple(size)))
        with self.lock:
            mask = segment(self.segmenter, frame, box)
        within = mask[
            round(box[1] * len(mask)) : round(box[3] * len(mask)),
            round(box[0] * mask.shape[1]) : round(box[2] * mask.shape[1]),
        ]
        if not mask.any() or within.sum() < 0.5 * mask.sum():
            raise Rejected("the mask does not lie in its box")
        return box, mask, 0

    def synthesize(self, source_path, target_path, mask, row):
        """The editor's picture. Its generator starts from the record's number, so that shards do not matter."""
        frame = frame_at(target_path, row["key"])
        label = row.get("label", "object")
        if row["kind"] == "subject":
            frame, prompt = around(frame, row["box"]), PROMPTS["extract"].format(label=label)
        else:
            prompt = PROMPTS["clear"].format(label=label)
        generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + int(row["id"]))
        from PIL import Image

        with self.lock:
            # without a negative prompt the pipeline leaves guidance out in silence
            made = self.editor(
                image=[Image.fromarray(frame.numpy())],
                prompt=prompt,
                negative_prompt=" ",
                true_cfg_scale=4.0,
                generator=generator,
            )
        image = torch.from_numpy(np.array(made.images[0].convert("RGB")))
        return trimmed(image) if row["kind"] == "subject" else image

    def verify(self, source_path, target_path, ref_path, row):
        images = {"edited": frame_at(target_path, row["key"]), "reference": read_image(ref_path)}
        return self.ask(
            self.verifier, PROMPTS[f"verify_{row['kind']}"].format(prompt=row["prompt"]), images, read_verdict
        )

    def embed(self, images):
        with self.lock:
            return clip_features(self.embedder, images)


def around(frame, box, margin=0.15):
    """The part of a frame (H, W, 3) around a box [x1, y1, x2, y2] in 0..1."""
    height, width = frame.shape[:2]
    x, y = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    left, top = max(int((box[0] - x) * width), 0), max(int((box[1] - y) * height), 0)
    return frame[top : math.ceil((box[3] + y) * height), left : math.ceil((box[2] + x) * width)].contiguous()


def trimmed(image, margin=0.05):
    """A picture of an object on white, uint8 (H, W, 3), tightly cropped. Rejected where it is empty."""
    ink = inked(as_float(image[None]))[0]
    if not ink.any():
        raise Rejected("the editor's picture is empty")
    return around(image, box_of(large_regions(ink[None], 0.01)[0]), margin)


def open_segmenter(name, device):
    try:
        from transformers import Sam3TrackerModel
    except ImportError:
        raise ValueError("this transformers has no SAM 3; pip install -U transformers") from None
    return Sam3TrackerModel.from_pretrained(local_path(name)).to(device).eval()


@torch.no_grad()
def segment(model, frame, box):
    """SAM 3's mask, bool (H, W), of what is in a box [x1, y1, x2, y2] of 0..1 of a frame uint8 (H, W, 3)."""
    side = model.config.prompt_encoder_config.image_size
    weight = next(model.parameters())
    pixels = resize(frame[None], (side, side)).permute(0, 3, 1, 2).to(weight) / 127.5 - 1
    boxes = (torch.tensor(box) * side).view(1, 1, 4).to(weight)
    masks = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks  # (1, 1, 1, h, w)
    return F.interpolate(masks[:, 0].float(), frame.shape[:2], mode="bilinear", align_corners=False)[0, 0].cpu() > 0


def open_editor(name, device):
    editor_is_installed()
    from diffusers import QwenImageEditPlusPipeline

    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    pipeline = QwenImageEditPlusPipeline.from_pretrained(local_path(name), torch_dtype=dtype).to(device)
    tell_of_pictures(pipeline.text_encoder)
    return pipeline


def editor_is_installed():
    """ValueError with the mend, before days of work, where diffusers or what Qwen's processor needs is missing."""
    try:
        import torchvision  # noqa: F401
        from diffusers import QwenImageEditPlusPipeline  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--models paper makes references with diffusers ({error}); pip install diffusers pillow torchvision "
            f"torch=={torch.__version__.partition('+')[0]}"
        ) from None


def tell_of_pictures(mllm):
    """diffusers 0.42 does not say which tokens are a picture's, and without it transformers gives Qwen2.5-VL the
    positions of text, in silence: say it."""

    def told(module, arguments, keywords):
        if "mm_token_type_ids" in keywords or keywords.get("input_ids") is None:
            return None
        return arguments, keywords | {
            "mm_token_type_ids": (keywords["input_ids"] == module.config.image_token_id).int()
        }

    if "mm_token_type_ids" in inspect.signature(mllm.forward).parameters:  # older ones see it from the tokens
        mllm.register_forward_pre_hook(told, with_kwargs=True)


def open_embedder(name, device):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(local_path(name)).to(device).eval()


@torch.no_grad()
def clip_features(model, images):
    """CLIP's features of length 1, (N, D) float32, of pictures uint8 (H, W, 3): each whole, on white."""
    side = model.config.vision_config.image_size
    weight = next(model.parameters())
    pixels = as_float(torch.stack([pad_reference(image, (side, side)) for image in images]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    out = model.get_image_features(pixel_values=((pixels - mean) / std).to(weight))
    return F.normalize(getattr(out, "pooler_output", out).float(), dim=-1).cpu()


# ------------------------------------------------------------------------------------------------ de-duplication


def deduplicate(features, order, threshold, block=2048, known_from=0.9):
    """Which records stand for which: features (N, D) of length 1, in any order; `order` (N,) best first.

    A record goes only if it is closer than `threshold` to one that is kept, so a chain of small steps does not collapse
    into its best end. -> of each record the kept one it belongs to (itself where it is kept), int64 (N,), and its cosine
    to the nearest kept one before it, float32 (N,), which is exact above `known_from` and -1 or more below.

    Of N records that are all kept, blocks against blocks: N^2 D FLOP. Most of it is spared, and nothing lost: on their
    main axes the first quarter of two vectors, and the product of what length is left, bound their cosine from above; only
    where this bound passes `known_from` (or the threshold, if it is lower) the cosine itself is computed.
    """
    features = on_main_axes(torch.as_tensor(features))
    total, width = features.shape
    head, least = max(width // 4, 1), min(known_from, threshold)
    short = torch.cat([features[:, :head], features[:, head:].norm(dim=1, keepdim=True)], dim=1)
    kept, count = torch.empty(total, dtype=torch.int64), 0
    belongs, nearest = np.arange(total), np.full(total, -1.0, np.float32)
    for start in tqdm(range(0, total, block), desc="deduplicate", unit="block", mininterval=1, disable=total <= block):
        rows = torch.from_numpy(order[start : start + block])
        best, place = torch.full((len(rows),), -1.0), rows.clone()
        for low in range(0, count, block):
            others = kept[low : low + block][: count - low]
            near = ((short[rows] @ short[others].T).amax(dim=1) > least).nonzero()[:, 0]
            if len(near):
                value, index = (features[rows[near]] @ features[others].T).max(dim=1)
                closer = value > best[near]
                place[near[closer]], best[near[closer]] = others[index[closer]], value[closer]
        among = (features[rows] @ features[rows].T).numpy()
        best, new = best.numpy(), []  # new: places in this block that are kept
        for i in range(len(rows)):
            if new:
                j = new[int(among[i, new].argmax())]
                if among[i, j] > best[i]:
                    best[i], place[i] = among[i, j], rows[j]
            if best[i] <= threshold:
                new.append(i)
                place[i] = rows[i]
        belongs[rows.numpy()], nearest[rows.numpy()] = place.numpy(), best
        kept[count : count + len(new)] = rows[new]
        count += len(new)
    return belongs, nearest


def on_main_axes(features, sample=20_000):
    """Features (N, D), float32, turned so that the axes along which they vary most come first; cosines stay."""
    features = features.float()
    some = features[:: max(1, len(features) // sample)]
    return features @ torch.linalg.eigh(some.T @ some).eigenvectors.flip(1)


def deduplicate_all(args, ledger):
    """The last stage, over all shards at once: references that are one already kept, or a benchmark's, are rejected."""
    if ledger.all_done("deduplicate"):
        return
    shards, resembled = range(ledger.told["shards"]), guard_of(args)
    shutil.rmtree(
        ledger.folder / "deduplicate", ignore_errors=True
    )  # of before a retry: killed in between, it would pass for ours
    ids, scores, features, guarded = [], [], [], {}
    for row in (row for shard in shards for row in ledger.rows("verify", shard) if row["status"] == "open"):
        if name := resembled(row):
            guarded[row["id"]] = name
        else:
            ids.append(row["id"])
            scores.append(row["edit_score"])
            features.append(unpack(row["feature"]))
    found = {}
    if ids:
        matrix = torch.from_numpy(np.stack(features))
        features.clear()
        belongs, nearest = deduplicate(matrix, np.argsort(-np.array(scores), kind="stable"), args.duplicate)
        found = {i: (ids[b], round(float(n), 4)) for i, b, n in zip(ids, belongs, nearest)}
    for shard in shards:
        rows = ledger.rows("verify", shard)
        for row in rows:
            row.pop("feature", None), row.pop("source_feature", None)
        ledger.write(
            "deduplicate", shard, [decided(row, found, guarded) if row["status"] == "open" else row for row in rows]
        )


def decided(row, found, guarded):
    """An open record, kept or rejected. found: {id: (the record that stands for it, its cosine to the nearest)}; guarded:
    {id: what of the benchmark it resembles}."""
    row["passed"] = "deduplicate"
    row["cluster"], row["nearest"] = kept, cosine = found.get(row["id"], (None, None))
    if row["id"] in guarded:
        return ended(
            row | {"tuning": False}, "deduplicate", "rejected", f"resembles {guarded[row['id']]} of the benchmark"
        )
    if kept != row["id"]:
        return ended(row, "deduplicate", "rejected", f"the reference is that of {kept} again (cosine {cosine:.3f})")
    return row | {"status": "kept"}


def guard_of(args):
    """-> a function: of a record the picture or clip of the benchmark that its reference or first frame resembles, or None."""
    if not args.guard:
        return lambda row: None
    files, models = benchmark_files(args.guard), load_models(args, "guard")
    theirs = np.stack(
        [models.embed([read_image(path)])[0].numpy() for path in tqdm(files, desc="guard", mininterval=1)]
    )

    def resembled(row):
        for own in ("source_feature", "feature"):
            near = theirs @ unpack(row[own]).astype(np.float32)
            if near.max() > args.duplicate:
                return files[near.argmax()].relative_to(args.guard).as_posix()
        return None

    return resembled


def benchmark_files(folder):
    """Its pictures and clips, by their endings; what else lies there is told, for a clip among it would not be guarded."""
    kinds = ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .avif .heic .mp4 .m4v .mov .webm .mkv .avi".split()
    found = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    files = [path for path in found if path.suffix.lower() in kinds]
    if not files:
        raise ValueError(f"--guard {folder}: no pictures or clips there")
    other = sorted({path.suffix.lower() or path.name for path in found} - set(kinds))
    print(
        f"guard       {len(files)} pictures and clips of {folder}"
        + (f"; not read: {', '.join(other)}" if other else "")
    )
    return files


# ------------------------------------------------------------------------------------------------ the result


def write_results(args, ledger, bases):
    """Tables that train.py takes, RefVIE's parquet, the funnel, statistics and the page; -> funnel as Markdown."""
    out, rejects = ledger.out, read_rejects(args.rejects)
    common, home = os.path.commonpath([out, *bases]), os.path.commonpath(bases)
    counts, sample, told, chosen = Funnel(), [], [], random.Random(0)
    with training_tables(out) as write, parquet_of_refvie(out) as write_parquet:
        for row in final_rows(ledger, rejects):
            counts.add(row)
            if len(told) < 200:
                told.append(row)
            if not row.get("tuning"):  # the kept are all good for it
                continue
            clips = [Path(bases[row["base"]]) / row[key] for key in ("src_video", "tgt_video")]
            pair = [*(os.path.relpath(clip, common) for clip in clips), row["prompt"]]
            write("image" if row.get("frames") == 1 else "video", pair)
            if row["status"] != "kept":
                continue
            reference = inside(out, row["ref_image"], row["id"])
            write("ref", [*pair, os.path.relpath(reference, common)])
            write_parquet(
                [row["id"], row["prompt"], *(os.path.relpath(clip, home) for clip in clips), reference.read_bytes()]
            )
            if len(sample) < args.page:
                sample.append(row)
            elif (place := chosen.randrange(len(counts.kept))) < args.page:  # each of the kept is as likely
                sample[place] = row
    write_page(args, ledger, bases, sorted(sample, key=lambda row: row["id"]), counts, told, rejects)
    text = counts.markdown() + ("\n" + pair_by_pair(told) if counts.total <= len(told) else "")
    for name, content in (
        ("funnel.md", text),
        ("funnel.svg", counts.svg()),
        ("statistics.json", json.dumps(counts.statistics(), indent=1)),
    ):
        write_text(out / name, content)
    return text, counts, common


def final_rows(ledger, rejects):
    """Yield all records, those that a person rejected as such."""
    for shard in range(ledger.told["shards"]):
        for row in ledger.rows("deduplicate", shard):
            if row["status"] == "kept" and row["id"] in rejects:
                row = ended(row, "person", "rejected", rejects[row["id"]]) | {"tuning": False}
            yield row


def read_rejects(path):
    """{id: reason} that a person chose on page.html."""
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(key): str(reason) for key, reason in found.items()}
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: is not the rejects.json that page.html saves") from None


@contextmanager
def training_tables(out):
    """Yield write(kind, fields) for ref_video.csv, video.csv and image.csv; a table without rows is not left behind."""
    counts = dict.fromkeys(FILES, 0)
    with ExitStack() as stack:
        writers = {}
        for kind, name in FILES.items():
            file = stack.enter_context(
                stack.enter_context(whole_file(out / name)).open("w", newline="", encoding="utf-8")
            )
            writers[kind] = csv.writer(file)
            writers[kind].writerow(COLUMNS[kind])

        def write(kind, fields):
            writers[kind].writerow(fields)
            counts[kind] += 1

        yield write
    for kind, count in counts.items():
        if not count:
            (out / FILES[kind]).unlink()


@contextmanager
def parquet_of_refvie(out):
    """Yield write(values of a row) for refvie.parquet in the layout of the published set; its clips' paths start from the
    base folder of the inputs, of several from the one above all."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        print("note        refvie.parquet is not written; pip install pyarrow, and the same command again")
        yield lambda values: None
        return
    fields = [(name, pyarrow.string()) for name in ("iid", "prompt", "src_video", "tgt_video")]
    schema, lines = pyarrow.schema([*fields, ("ref_image_bytes", pyarrow.binary())]), []
    with whole_file(out / "refvie.parquet") as temporary, ParquetWriter(temporary, schema) as writer:

        def flush():
            writer.write_table(pyarrow.Table.from_pylist(lines, schema))
            lines.clear()

        def write(values):
            lines.append(dict(zip(schema.names, values)))
            if len(lines) == 256:
                flush()

        yield write
        if lines:
            flush()


WAYS_OUT = (*STAGES, "person")


class Funnel:
    """How many records reached which stage, and why the others did not (the paper's Figure 3), with what the kept ones
    are like (Figure 4)."""

    def __init__(self):
        self.total, self.tuning, self.kept = 0, 0, []
        self.reasons = Counter()  # (stage, status, reason) of those that ended
        self.nearest = []  # cosine of each record to the nearest one kept before it, of those kept and of duplicates

    def add(self, row):
        self.total += 1
        self.tuning += bool(row.get("tuning"))
        if row.get("nearest") is not None and row.get("stage") != "person":
            self.nearest.append(row["nearest"])
        if row["status"] == "kept":
            self.kept.append((row["kind"], row.get("frames", 0), *row.get("ref_size", (0, 0))))
            return
        # without the file or the line that it speaks of, and the path in it
        reason = re.sub(r"^(?:/.*?|[^:]*, (?:line|row|entry) \d[^:]*): (?:.* (?=is outside of ))?", "", row["reason"])
        reason = re.sub(r"\d+(?:\.\d+)?x\d+|\d+(?:\.\d+)?%?", "#", reason).split(":")[0][:80]
        self.reasons[row["stage"], row["status"], reason] += 1

    def steps(self):
        """(stage, records that passed it)"""
        left, out = self.total, [("pairs", self.total)]
        for stage in WAYS_OUT:
            ended_here = sum(count for (at, _, _), count in self.reasons.items() if at == stage)
            left -= ended_here
            if stage != "person" or ended_here:
                out.append((stage, left))
        return out

    def markdown(self):
        lines = ["| stage | records that passed | of all |", "| --- | --- | --- |"]
        lines += [f"| {name} | {count} | {count / self.total:.1%} |" for name, count in self.steps()]
        lines += [
            "",
            f"Good for instruction tuning: {self.tuning} of {self.total}.",
            "",
            "| left at | as | why | records |",
            "| --- | --- | --- | --- |",
        ]
        for (stage, status, reason), count in sorted(
            self.reasons.items(), key=lambda kv: (WAYS_OUT.index(kv[0][0]), -kv[1])
        ):
            lines.append(f"| {stage} | {status} | {reason.replace('|', '/')} | {count} |")
        return "\n".join(lines) + "\n"

    def statistics(self):
        """Of the kept: kinds, frames, reference sizes; and about how many would be left at other thresholds of
        likeness: what is near to one that another threshold would drop is taken for dropped too."""
        tally = lambda values: {str(value): count for value, count in sorted(Counter(values).items())}
        curve = {str(t): sum(n <= t for n in self.nearest) for t in (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)}
        side = [f"{2 ** int(math.log2(max(min(h, w), 1)))} and up" for _, _, h, w in self.kept]
        return {
            "records": self.total, "instruction_tuning": self.tuning, "kept": len(self.kept),
            "kinds": tally([k[0] for k in self.kept]), "frames": tally([k[1] for k in self.kept]),
            "reference_shorter_side": tally(side), "left_at_a_threshold_of": curve,
        }  # fmt: skip

    def svg(self, width=640, bar=26):
        """The funnel as bars."""
        steps = self.steps()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bar * len(steps) + 8}" font-family="sans-serif" font-size="13">'
        ]
        for i, (name, count) in enumerate(steps):
            length = (width - 260) * count / max(self.total, 1)
            parts.append(f'<text x="100" y="{bar * i + 20}" text-anchor="end">{name}</text>')
            parts.append(f'<rect x="110" y="{bar * i + 6}" width="{length:.1f}" height="{bar - 8}" fill="#4477aa"/>')
            parts.append(
                f'<text x="{118 + length:.1f}" y="{bar * i + 20}">{count} ({count / max(self.total, 1):.0%})</text>'
            )
        return "".join(parts) + "</svg>"


def pair_by_pair(rows):
    """What became of each record and why, as Markdown."""
    lines = ["| record | kind | score | ended | why |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        kept = row["status"] == "kept"
        score = f"{row['edit_score']:.1f}" if "edit_score" in row else ""
        cells = (
            row["name"],
            row["kind"],
            score,
            "kept" if kept else row["stage"],
            row.get("verdict_reason", "") if kept else row["reason"],
        )
        lines.append(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in cells)} |")
    return "\n".join(lines) + "\n"


PAGE = """<!doctype html><meta charset="utf-8"><title>RefVIE quadruplets</title>
<style>body{font:15px sans-serif;margin:1.5em auto;max-width:1100px}img{max-width:100%}table{border-collapse:collapse;font-size:13px}
td,th{border:1px solid #ccc;padding:2px 6px;text-align:left}.card{display:none}.card.on{display:block}.no{opacity:.45}
.row{display:flex;gap:1em;align-items:flex-start}.row>*{flex:1}.ref{max-height:320px;border:1px solid #ddd}button,select{font:inherit;margin-right:.5em}</style>
<h1>RefVIE quadruplets</h1><p>%(count)s of %(kept)s kept. Keys: &larr; &rarr; leaf, r rejects or takes back. Then save rejects.json and run the
command again with <code>--rejects rejects.json</code>.</p>
<p><button onclick="go(-1)">&larr;</button><button onclick="go(1)">&rarr;</button><select id="why"><option>reference shows the wrong thing</option>
<option>reference is cut off or torn</option><option>edit does not follow the instruction</option><option>edit has artefacts</option><option>not suitable</option></select>
<button onclick="reject()">reject / take back (r)</button><button onclick="save()">save rejects.json</button> <span id="at"></span></p>
%(cards)s<h2>Funnel</h2>%(funnel)s<h2>What became of the pairs</h2>%(table)s
<script>let at=0;const out=%(rejects)s,cards=[...document.querySelectorAll('.card')];
function show(){cards.forEach((c,i)=>{c.classList.toggle('on',i==at);c.classList.toggle('no',c.dataset.id in out)});
document.getElementById('at').textContent=cards.length?(at+1)+' of '+cards.length+', '+Object.keys(out).length+' rejected':'nothing was kept'}
function go(d){at=Math.max(0,Math.min(cards.length-1,at+d));show()}
function reject(){if(!cards.length)return;const id=cards[at].dataset.id;if(id in out)delete out[id];else out[id]=document.getElementById('why').value;show()}
function save(){const a=document.createElement('a');a.href=URL.createObjectURL(new Blob([JSON.stringify(out,null,1)],{type:'application/json'}));a.download='rejects.json';a.click()}
addEventListener('keydown',e=>{if(e.target.tagName=='SELECT')return;if(e.key=='ArrowLeft')go(-1);if(e.key=='ArrowRight')go(1);if(e.key=='r')reject()});show()</script>
"""


def write_page(args, ledger, bases, rows, counts, told, rejects):
    """page.html: one file with all pictures in it. What was rejected before is saved again with what a person adds."""

    def card(row):
        try:
            clips = [Path(bases[row["base"]]) / row[key] for key in ("src_video", "tgt_video")]
            count = min(measure(clip)[0] for clip in clips)
            source, target = (look_at(clip, count)[0] for clip in clips)
            reference = read_image(ledger.out / row["ref_image"])
        except MediaError as error:
            return f'<div class="card" data-id="{row["id"]}"><p>{html.escape(str(error))}</p></div>'
        strip = [
            torch.cat(list(resize(x[torch.linspace(0, len(x) - 1, min(4, len(x))).long()], size_to(x, 300))), dim=1)
            for x in (source, target)
        ]
        width = min(s.shape[1] for s in strip)
        reference = resize(reference[None], size_to(reference[None], 480))[0]
        why = (
            f"{row['id']} {row['name']}: {row['kind']}, score {row['edit_score']:.1f}; {row.get('verdict_reason', '')}"
        )
        return (
            f'<div class="card" data-id="{row["id"]}"><h3>{html.escape(row["prompt"])}</h3><p>{html.escape(why)}</p><div class="row">'
            f'<div style="flex:3">source above, edit below<br><img src="{jpeg_uri(torch.cat([s[:, :width] for s in strip]))}"></div>'
            f'<div>reference<br><img class="ref" src="{jpeg_uri(reference)}"></div></div></div>'
        )

    with ThreadPoolExecutor(args.workers) as pool:
        cards = list(tqdm(pool.map(card, rows), total=len(rows), desc="page", mininterval=1))
    fill = {"count": len(rows), "kept": len(counts.kept), "funnel": counts.svg(), "cards": "".join(cards)}
    fill["table"] = markdown_to_html(pair_by_pair(told))
    fill["rejects"] = json.dumps(rejects).replace("</", "<\\/")  # no end of the script
    content = re.sub(r"%\((\w+)\)s", lambda name: str(fill[name[1]]), PAGE)
    write_text(ledger.out / "page.html", content)


def size_to(frames, longest):
    """(h, w) of frames (T, H, W, 3) with the longer side at most `longest`, even."""
    height, width = frames.shape[1:3]
    scale = min(1.0, longest / max(height, width))
    return [max(2, round(side * scale / 2) * 2) for side in (height, width)]


def markdown_to_html(table):
    lines = [
        [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.strip("|- ")
    ]
    return (
        "<table>" + "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines) + "</table>"
    )


# ------------------------------------------------------------------------------------------------ how good it is


def measure_on_truth(folder, most=400):
    """The classical models on clips of `python -m nano data`, whose truth is known -> a Markdown table.

    Masks are held against the things themselves (old and new, as far as they are seen) and against every pixel that
    differs, which takes in their soft shadows.
    """
    folder = Path(folder)
    if not (folder / "truth.jsonl").is_file():
        raise FileNotFoundError(
            f"{folder}/truth.jsonl is missing: `python -m nano data {folder} --split test` writes it"
        )
    world, models = json.loads((folder / "world.json").read_text()), Classical(None)
    library, cases, local, background, references = load_library(world["assets"]), Counter(), [], [], {}
    for row in tqdm(list(read_json_lines(folder / "truth.jsonl"))[:most], desc="truth", mininterval=1):
        if row["task"] in ("style", "remove"):
            continue
        row["kind"] = "background" if row["task"].startswith("background") else "subject"
        source, target = folder / row["src_video"], folder / row["tgt_video"]
        region = read_image(folder / row["mask"])[..., 0].unflatten(0, (-1, world["size"])) > 127
        if row["kind"] == "background" and region.all():
            continue  # a scene of nothing but background has no foreground to be found
        cases[row["kind"]] += 1
        try:
            box, mask, row["key"] = models.ground(source, target, row)
            image = models.synthesize(source, target, mask, row)
        except Rejected:
            continue
        edit = redraw_edit(library, world, row["index"])
        if row["kind"] == "subject":
            truths = outlines(edit, world["size"], row["key"]), region[row["key"]]
            local.append([f for truth in truths for f in (overlap(mask, truth), box_overlap(box, box_of(truth)))])
            references.setdefault((row["new"]["name"], row["new"]["look"]), image)
        else:
            background.append(hidden_psnr(edit, image, ~region[row["key"]], row["key"]))
    if not references:
        raise ValueError(f"{folder}: none of its clips has a reference that could be made; draw more of them")
    precision, recall, count = find_planted(models, list(references.values()))
    mask_things, box_things, mask_all, box_all = (sum(column) / len(local) for column in zip(*local))
    psnr = sum(background) / max(len(background), 1)
    return "\n".join([
        "| classical models on the nano world | cases | found | figure |", "| --- | --- | --- | --- |",
        f"| local edits: IoU of mask, of box with the edited things | {cases['subject']} | {len(local)} | {mask_things:.3f}, {box_things:.3f} |",
        f"| the same with all pixels that differ, soft shadows too | {cases['subject']} | {len(local)} | {mask_all:.3f}, {box_all:.3f} |",
        f"| new backgrounds: PSNR where the foreground stood | {cases['background']} | {len(background)} | {psnr:.1f} dB |",
        f"| duplicates, 10 % planted: precision, recall | {count} | | {precision:.3f}, {recall:.3f} |",
    ])  # fmt: skip


def outlines(edit, size, key):
    """Where the things that an edit exchanges are seen in frame `key`, the old one and the new: bool (size, size)."""
    seen = [render(scene, size)[2][i] for scene, i in zip((edit.source, edit.target), edit.changed) if i is not None]
    return sum(share[key, 0] for share in seen) > 0.5


def overlap(a, b):
    return (a & b).sum().item() / max((a | b).sum().item(), 1)


def box_overlap(a, b):
    area = lambda box: max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return both / (area(a) + area(b) - both)


def hidden_psnr(edit, image, place, key):
    """PSNR in dB, where `place` is true, of a background reference and the scene drawn without its things."""
    truth = to_uint8(render(replace(edit.target, things=[]), image.shape[0])[0])[key]
    error = ((image.double() - truth.double()) / 255).square().mean(dim=-1)[place].mean().item()
    return -10 * math.log10(max(error, 1e-6))


def find_planted(models, images):
    """Every tenth picture comes once more, smaller, brighter and as a JPEG -> precision and recall of finding these, and how
    many pictures that makes."""
    again = []
    for image in images[::10]:
        size = [max(8, round(side * 0.8)) for side in image.shape[:2]]
        brighter = (resize(image[None], size)[0].float() * 1.04).clamp(0, 255).to(torch.uint8)
        again.append(read_image("a JPEG", jpeg(brighter)))
    features = models.embed([*images, *again])
    belongs, _ = deduplicate(features, np.arange(len(features)), parse_arguments(["x", "--out", "x"]).duplicate)
    dropped = sum(kept != i for i, kept in enumerate(belongs))
    right = sum(belongs[len(images) + i] == 10 * i for i in range(len(again)))
    return right / max(dropped, 1), right / len(again), len(features)


def measure_scale(folder, records=100_000, vectors=500_000, width=512):
    """The bookkeeping with answers that the records bring along, and de-duplication -> a Markdown table."""
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    made = Ledger(Path(folder).resolve() / "made")  # as another run would have left it
    drawn, before = random.Random(0), memory()
    for name in ("masks/0.png", "refs/0.png"):
        (made.out / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(made.out / name, torch.zeros(8, 8, 3, dtype=torch.uint8))

    def line(i):
        return {"src_video": f"s/{i}.mp4", "tgt_video": f"t/{i}.mp4", "prompt": "replace the car", "edit_type": "change", "base": 0, "status": "open",
                "edit_score": drawn.uniform(4, 10), "frames": 81, "height": 8, "width": 8, "box": [0, 0, 1, 1], "mask": "masks/0.png", "key": 0,
                "ref_image": "refs/0.png", "ref_size": [64, 64], "verdict": drawn.random() < 0.8,
                "feature": pack(F.normalize(torch.tensor([drawn.gauss(0, 1) for _ in range(8)]), dim=0))}  # fmt: skip

    made.write("verify", 0, map(line, range(records)))
    write_text(made.folder / "read.json", json.dumps({"bases": [str(made.out)], "shards": 1}))
    write_text(made.folder / "settings.json", json.dumps({"models": "classical"}))
    out = str(made.out.parent / "out")
    args = parse_arguments([str(made.folder / "verify"), "--out", out, "--shard-rows", "1000", "--duplicate", "1"])
    ledger, start = Ledger(args.out), time.perf_counter()
    read_all(args, ledger)
    run_local(args, ledger, ledger.told["bases"], 0, 1)
    seconds, peak = time.perf_counter() - start, memory()
    features = F.normalize(torch.randn(vectors, width, generator=torch.Generator().manual_seed(0)), dim=1)
    start = time.perf_counter()
    deduplicate(features, np.arange(vectors), 0.99)
    spent = time.perf_counter() - start
    return "\n".join([
        "| scale | figure |", "| --- | --- |",
        f"| {records} records through four stages, models cached | {records / seconds:.0f} records/s, {peak:.2f} GiB at most, {before:.2f} before |",
        f"| de-duplication of {vectors} x {width}, all kept | {spent:.0f} s, {memory():.2f} GiB at most |",
        f"| the same for 3.7M, by the square of the number | {spent * (3.7e6 / vectors) ** 2 / 3600:.1f} h |",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------ running


def run_local(args, ledger, bases, rank, world):
    """Stage after stage, so that one stage's models are loaded at a time; this process has every world-th shard."""
    told, threads = ledger.told, torch.get_num_threads()
    mine = range(rank, told["shards"], world)
    torch.set_num_threads(max(1, threads // args.workers))  # records share the cores
    for name, make in CLASSES.items():
        todo = [shard for shard in mine if not ledger.done(name, shard)]
        stage = None  # its models go before others come
        torch.cuda.empty_cache()
        if not todo:
            continue
        stage = make(args, bases)
        total = sum(min(args.shard_rows, told["records"] - shard * args.shard_rows) for shard in todo)
        with tqdm(total=total, desc=name, unit=" records", mininterval=1, disable=rank > 0) as bar:
            for shard in todo:
                run_shard(stage, ledger, shard, bar)
    torch.set_num_threads(threads)


class ShardWorker:
    """What Ray Data calls: a stage of ours on the shards whose numbers come by, from ledger to ledger."""

    def __init__(self, name, args, bases):
        self.stage, self.ledger = CLASSES[name](args, bases), Ledger(args.out)

    def __call__(self, batch):
        for shard in batch["shard"].tolist():
            if not self.ledger.done(self.stage.name, shard):
                run_shard(self.stage, self.ledger, shard)
        return batch


def run_ray(args, ledger, bases):
    """The same classes as actors of Ray Data; all machines see --out and the data under the same paths."""
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray Data; pip install 'ray[data]'") from None
    shards = [shard for shard in range(ledger.told["shards"]) if not ledger.done("verify", shard)]
    if not shards:
        return
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    data = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    for name in CLASSES:
        data = data.map_batches(
            ShardWorker, fn_constructor_args=(name, args, bases), batch_size=1, concurrency=args.workers,
            num_gpus=1 if args.models == "paper" else 0, num_cpus=1 if args.models == "paper" else 0.25,
        )  # fmt: skip
    try:
        for _ in tqdm(data.iter_batches(batch_size=1), total=len(shards), desc="ray", unit="shard"):
            pass
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"--engine ray: {lines[-1] if lines else type(error).__name__}") from None
    finally:
        ray.shutdown()


def reopen_all(ledger, rank, world):
    for shard in range(rank, ledger.told["shards"], world):
        ledger.reopen_failed(shard)
    if world > 1:  # else the first could find all shards done that another is about to open again
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()


def wait_for(ready, what, bar_seconds=30):
    """Poll until ready() is true; torchrun ends everybody when one of us dies."""
    told = time.monotonic()
    while not ready():
        time.sleep(0.2)
        if time.monotonic() - told > bar_seconds:
            print(f"wait        for {what}")
            told = math.inf


def main(argv=None):
    args = parse_arguments(argv)
    if args.show_prompts:
        for name, prompt in PROMPTS.items():
            print(f"--- {name}, version {PROMPTS_VERSION}\n{prompt.replace('{{', '{').replace('}}', '}')}\n")
        return
    if given := [flag for flag in PAPER_MODELS if has_secret(getattr(args, flag))]:
        raise ValueError(f"--{given[0]}: no user, password or query in the address; put the key into OPENAI_API_KEY")
    if args.measure:
        return print({"truth": measure_on_truth, "scale": measure_scale}[args.measure](args.pairs[0]))
    rank, world = rank_and_world()
    if world > 1 and args.engine == "ray":
        raise ValueError("--engine ray finds its own processes: start it without torchrun")
    args.out = str(Path(args.out).resolve())
    ledger = Ledger(args.out)
    with only_run(ledger, rank):
        made = ("synthesize", "verify", "deduplicate")  # stages of a ledger whose references are there
        if args.models == "paper" and any(Path(path).name not in made for path in args.pairs):
            editor_is_installed()
        if rank == 0:
            same_settings(args, ledger)
            read_rejects(args.rejects)  # a slip is told of before days of work, not after them
            for path in benchmark_files(args.guard) if args.guard else ():
                read_image(path)
            read_all(args, ledger)
        wait_for(lambda: ledger.told, "the tables")
        same_settings(args, ledger)  # on every rank: none begins with other ones while the first is still refusing them
        bases = ledger.told["bases"]
        if args.retry_failed:
            reopen_all(ledger, rank, world)
        run_ray(args, ledger, bases) if args.engine == "ray" else run_local(args, ledger, bases, rank, world)
        if rank > 0:
            return
        wait_for(lambda: ledger.all_done("verify"), "the other processes")
        deduplicate_all(args, ledger)
        text, counts, common = write_results(args, ledger, bases)
    print(text)
    tables = [name for name in (*FILES.values(), "refvie.parquet") if (Path(args.out) / name).is_file()]
    print(
        f"write       {args.out}/{''.join(f'{name}, ' for name in tables)}page.html, funnel.md, statistics.json: look at page.html"
    )
    if sum(count for (_, status, _), count in counts.reasons.items() if status == "failed") == counts.total:
        raise ValueError(
            f"not one of {counts.total} records could be worked on; the table above says why (--retry-failed tries them again)"
        )
    if counts.kept:
        print(
            f"train       python train.py --stage 3 --ref-csv {shlex.quote(args.out)}/ref_video.csv --base-path {shlex.quote(common)} --data DIR"
        )
    else:
        print("train       nothing: not one quadruplet was kept; the table above says why")


def run():
    """main, with every foreseeable failure as one line on stderr and an exit code that is not 0."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ncurate.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # at a plain exit Python waits for the threads that a second Ctrl-C leaves
    except (ValueError, OSError) as error:
        sys.exit(f"curate.py: {error}")


if __name__ == "__main__":
    run()
