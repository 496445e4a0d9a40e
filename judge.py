"""Judge edited videos: `python judge.py score --bench refvie bench.yaml --edits DIR --judge metrics`.

    benchmark file + folder of edits -> items (source, instruction, reference, edit)
    -> metrics, without any model (metrics.py), and an MLLM's answers -> answers.jsonl, which a rerun takes up
    -> scores with the paper's hierarchy enforced, controls, intervals -> <bench>.md, <bench>.csv, <bench>.html

RefVIE-Bench and OpenVE-Bench (paper, Section 5; Tables 2 and 3): three criteria from 1 to 5, the second and third
never above the first. The released scripts ask the judge to keep that rule, drop what failed from the mean, cannot
resume and show no noise. Here the rule is enforced and its breaches counted, nothing that failed is averaged away,
every mean has an interval, and questions whose answer is known are asked in every run.
"""

import argparse
import csv
import fcntl
import hashlib
import html
import io
import json
import math
import os
import random
import re
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

EXAMPLES = """examples:
  python judge.py run --bench refvie refvie_bench.yaml --weights weights/nano --edits out/edits
  python judge.py score --bench refvie refvie_bench.yaml --edits out/edits --judge gemini-3-flash-preview --out out/judge

judges (--judge):
  metrics                 no model, no network; always computed, whatever the judge
  gemini-...              Google's native API, key in GEMINI_API_KEY
  openai:MODEL            any OpenAI-compatible server at --endpoint (vLLM, ...), key, if it wants one, in OPENAI_API_KEY
  local:PATH|HUB_ID       Qwen2.5-VL or Qwen3-VL through transformers
"""
MODES = {"official": 1.0, "strict": 4.0}  # frames a second that the judge sees


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="Judge edited videos.", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw).add_argument

    def bench(add):
        add("path", help="the benchmark's file: refvie_bench.yaml, benchmark_videos.csv or singleturn.json")
        add("--bench", choices=("refvie", "openve", "imgedit"), required=True, help="which benchmark it is")
        add("--limit", type=positive, metavar="N", help="only the first N items")

    def judging(add):
        add("--judge", default="metrics", help="see below (default %(default)s)")
        add("--mode", choices=MODES, default="official", help="1 or 4 frames a second (default %(default)s)")
        add("--fps", type=rate, help="another frame rate than the mode's")
        add("--endpoint", metavar="URL", help="the judge's server, for openai: and other places than Google's")
        add(
            "--send",
            choices=("frames", "video"),
            default="frames",
            help="openai: a server may sample a video as it likes",
        )
        add("--device", help="local: cuda, cpu, ... (default: cuda if there is one)")
        add("--max-tokens", type=positive, default=400, help="local: the longest answer (default %(default)s)")
        add("--concurrency", type=positive, default=4, help="questions under way at once (default %(default)s)")
        add(
            "--retries",
            type=natural,
            default=4,
            help="after a failure, a server's malformed answers included (default %(default)s)",
        )
        add(
            "--wait", type=float, default=2.0, help="seconds before the first retry, then doubled (default %(default)s)"
        )
        add("--deadline", type=rate, default=180.0, help="seconds for one answer (default %(default)s)")
        add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars a million tokens, for the cost")
        add("--dry-run", action="store_true", help="stop after the cost estimate")
        add("--allow-missing", action="store_true", help="average over what succeeded")
        add("--out", type=Path, default="out/judge", metavar="DIR", help="folder of the report (default %(default)s)")

    add = command("score", "score finished edits and write a report")
    bench(add)
    add("--edits", type=Path, required=True, metavar="DIR", help="the edited videos, under the release's names")
    judging(add)
    add("--repeats", type=positive, default=1, help="answers an item (default %(default)s)")
    add(
        "--controls",
        type=natural,
        default=4,
        metavar="N",
        help="items that also get known-answer questions (default %(default)s)",
    )
    add("--human", type=Path, metavar="CSV", help="columns item and people's scores: rank correlations with ours")
    add("--name", help="the system's name in the tables (default: the folder of the edits)")

    add = command("compare", "compare two systems, order swapped")
    bench(add)
    add("a", metavar="A", help="the edits of one system")
    add("b", metavar="B", help="the edits of the other")
    judging(add)

    add = command("run", "make the edits with Kiwi-Edit, under torchrun on several GPUs")
    bench(add)
    add("--edits", type=Path, required=True, metavar="DIR", help="where they go, under the release's names")
    add(
        "--weights",
        default=str(Path(__file__).parent / "weights" / "nano"),
        metavar="PATH|HUB_ID",
        help="as for sample.py (default: weights/nano)",
    )
    add("--base", metavar="PATH|HUB_ID", help="under a .safetensors or a run of train.py (default: what the run began with, "
        "else Wan-AI/Wan2.2-TI2V-5B)")  # fmt: skip
    add("--qwen", metavar="PATH|HUB_ID", help="likewise (default: the run's, else Qwen/Qwen2.5-VL-3B-Instruct)")
    add("--ref-pad-first", action="store_true", help="as for sample.py")
    add("--ref", action=argparse.BooleanOptionalAction, default=True, help="give the reference image to the model")
    add("--steps", type=positive, help="denoising steps (default: 50; nano 2)")
    add("--ref-guidance", type=rate, metavar="G", help="how far references are followed (default: 1; nano 1.2)")
    add("--seed", type=int, default=0, help="of every edit, as in the release (default %(default)s)")
    add("--frames", type=positive, help="at most so many (default: 81; nano 9)")
    add("--max-pixels", type=positive, help="larger frames are shrunk (default: 921600; nano 4096)")
    add("--tile", type=positive, metavar="N", help="VAE tiles, for small cards")
    add("--device", help="default: this process's GPU, or the CPU")

    add = command("averages", "averages of score files that the released scripts wrote")
    add("files", nargs="+", type=Path, help="openve_..._score.jsonl, refvie_..._score.jsonl")

    args = parser.parse_args(argv)
    # a password or key in --endpoint stays out of the report
    words = [re.sub(r"://.*[@?].*", "://***", word) for word in (sys.argv[1:] if argv is None else argv)]
    args.command_line = shlex.join(["python", "judge.py", *words])
    if args.command in ("score", "compare"):
        args.fps = args.fps or MODES[args.mode]
    if args.command == "score":
        args.name = args.name or args.edits.name
    return args


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def natural(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def rate(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    parse_arguments()  # --help and slips of the pen answer before torch is there

import numpy as np
import torch
import yaml  # comes with transformers
from tqdm import tqdm

from data import csv_lines, inside
from judges import (
    MAX_WAIT,
    Barred,
    Gemini,
    JudgeError,
    Local,
    Malformed,
    OpenAICompatible,
    TryAgain,
    Unusable,
    data_uri,
    enforce,
    has_secret,
    read_answer,
    read_reason,
    read_winner,
)  # fmt: skip
from load import local_path, read_json
from media import (
    MediaError,
    faithful_codec,
    frame_rate,
    open_media,
    read_image,
    shown_frames,
    writable,
    write_image,
    write_text,
    write_video,
)
from metrics import METRICS, measure_files, write_shuffled
from model import KiwiEdit, is_out_of_memory, read_for, read_weights
from parallel import pick_device, rank_and_world

# What is asked: criteria with our own rubric texts, which carry the paper's.

COMPLIANCE = "instruction_compliance"
DETAIL = "consistency_detail"
QUALITY = "visual_quality"
ANSWER = """
Think in one or two sentences, then answer with JSON alone, scores last, whole numbers from 1 to 5; 2 and 4 lie
between the descriptions given. Neither of the last two scores may be above the first.
{{"reasoning": "...", {fields}}}

The instruction of the edit was: {instruction}"""

REFERENCE_TASKS = {
    "subject": (
        "You grade the insertion or replacement of an object in a video, shown in a reference image.",
        {
            "identity_consistency": "1: nothing was changed, or an unrelated object came in. 3: the right kind of "
            "object, but its colour, texture or markings differ plainly from the reference. 5: it is the object of the "
            "reference, in a pose that fits the scene.",
            "temporal_consistency": "1: the object melts or changes shape from frame to frame. 3: stable in form, its "
            "texture blurs or shifts in motion. 5: the same solid object in every frame.",
            "physical_integration": "1: it slides over the picture like a sticker. 3: it follows the motion with slight "
            "drift, light and occlusion are roughly right. 5: motion, shadows, reflections and occlusion are as if it "
            "had been filmed there.",
        },
    ),
    "background": (
        "You grade the replacement of a video's background by the one of a reference image.",
        {
            "reference_fidelity": "1: the background was not changed, or the foreground is destroyed. 3: it resembles "
            "the reference without its key details, or parts of the foreground are missing. 5: it is the reference's "
            "scene in content and style, and the foreground is untouched throughout.",
            "matting_quality": "1: edges boil, foreground or background jitters. 3: edges are stable but soft, with "
            "little flicker in hair or transparent parts. 5: no seam in any frame.",
            "visual_harmony": "1: a flat picture pasted behind the subject, light and perspective clash. 3: perspective "
            "and scale are roughly right, the light is neutral. 5: light, depth and colour are those of one take.",
        },
    ),
}
VIDEO_TASKS = {
    "global_style": (
        "You grade a change of style or atmosphere of a whole video.",
        {
            COMPLIANCE: "1: the style is absent or another. 3: its palette and texture are there, but patchy or not in "
            "all frames. 5: the style in full, everywhere and all the time.",
            DETAIL: "1: the scene, its layout or motion is lost. 3: structure and motion are right, with local warping. "
            "5: every object, relation and motion is kept.",
            QUALITY: "1: it flickers or boils so that one cannot watch it. 3: noticeable but tolerable flicker. 5: "
            "perfectly stable.",
        },
    ),
    "background_change": (
        "You grade the change of a video's background.",
        {
            COMPLIANCE: "1: no change, a wrong background, or the foreground was replaced too. 3: the background is "
            "replaced, elements are missing or spill over the subject. 5: the background asked for, the foreground "
            "untouched.",
            DETAIL: "1: tearing, jittering edges, seen at a glance. 3: an acceptable blend with visible edges. 5: no "
            "seam, edges stable throughout.",
            QUALITY: "1: light, horizon or motion contradict each other. 3: believable with small errors. 5: light, "
            "shadow, perspective and camera motion agree.",
        },
    ),
    "local_change": (
        "You grade the change or replacement of something in a video.",
        {
            COMPLIANCE: "1: the target was not changed, or something else was. 3: largely changed, with remnants or in "
            "a wrong number or place. 5: the right thing in class, number, place, size and motion.",
            DETAIL: "1: the video is broken or the object flickers. 3: mostly right, with noticeable flicker or light. "
            "5: seamless and stable.",
            QUALITY: "1: tracking, light or perspective are plainly wrong. 3: small inconsistencies. 5: physically flawless.",
        },
    ),
    "local_remove": (
        "You grade the removal of something from a video.",
        {
            COMPLIANCE: "1: nothing or the wrong thing was removed. 3: the right thing, but with ghosts or large "
            "remains. 5: it is gone and all else untouched.",
            DETAIL: "1: the background behind it is badly made up or frozen. 3: mostly right. 5: as if it had always "
            "been seen, moving with the rest.",
            QUALITY: "1: severe artefacts or flicker. 3: noticeable inconsistency in time. 5: seamless and stable.",
        },
    ),
    "local_add": (
        "You grade the addition of something to a video.",
        {
            COMPLIANCE: "1: nothing or a wrong thing was added. 3: the right thing with wrong attributes. 5: it is as "
            "asked for in every attribute.",
            DETAIL: "1: contact, occlusion or motion are impossible. 3: mostly right. 5: shadows, reflections and "
            "motion are real.",
            QUALITY: "1: severe artefacts or flicker. 3: light or colour do not match. 5: seamless and stable.",
        },
    ),
}
IMAGE_TASK = (
    "You grade an edit of a picture. You see the original and the edited picture.",
    {
        COMPLIANCE: "1: the instruction was not followed. 3: in the main, with plain errors. 5: in full, and no more.",
        DETAIL: "1: what was to stay is lost. 3: kept in the main. 5: everything else is untouched.",
        QUALITY: "1: severe artefacts. 3: visible seams, light that does not fit. 5: as if photographed so.",
    },
)


TASKS = {"refvie": REFERENCE_TASKS, "openve": VIDEO_TASKS}  # imgedit's are all graded alike


def task_of(bench, task):
    """(what is graded, criteria) of a task."""
    return TASKS[bench][task] if bench in TASKS else IMAGE_TASK


def rubric(bench, item):
    intro, criteria = task_of(bench, item.task)
    lines = [intro, "", *(f"{name}: {text}" for name, text in criteria.items())]
    fields = ", ".join(f'"{name}": n' for name in criteria)
    return "\n".join(lines) + "\n" + ANSWER.format(fields=fields, instruction=item.instruction)


PAIR_RUBRIC = """You compare two edits of one {kind}. You see {what}, then edit 1 and edit 2. Say which one a careful viewer
would prefer: first by how well it does what was asked, then by what it kept, then by how clean and stable it is.
Answer with JSON alone: {{"reasoning": "...", "winner": "1"}}, "2" in place of "1", or "tie".

The instruction of the edit was: {instruction}"""

# Published rows (kept apart from ours in every table). Source: the project's page, github.com/linyq17/Kiwi-Edit,
# index.html at 2f21947, which agrees with the paper's overall figures in FACTS.md; * from showlab/Kiwi-Edit,
# index.html at 178f3f4. Overall is the mean of the tasks' means.
PUBLISHED = {
    "openve": (
        "judged by Gemini-2.5-Pro",
        {
            "Runway Aleph*": (3.72, 2.62, 4.18, 4.16, 2.78, 3.49),
            "Lucy-Edit 5B": (2.27, 1.57, 3.20, 1.75, 2.30, 2.22),
            "DITTO 14B": (4.01, 1.68, 2.03, 1.53, 1.41, 2.13),
            "OpenVE-Edit 5B": (3.16, 2.36, 2.98, 1.85, 2.15, 2.50),
            "Kiwi-Edit 5B, stage 2*": (3.54, 2.57, 3.84, 2.71, 2.25, 2.98),
            "Kiwi-Edit 5B, stage 3": (3.64, 2.64, 3.83, 2.63, 2.36, 3.02),
        },
    ),
    "refvie": (
        "judged by Gemini-3-Flash",
        {
            "Runway Aleph": (3.79, 3.65, 3.58, 3.33, 2.81, 2.58, 3.29),
            "Kling-O1": (4.75, 4.66, 4.60, 3.95, 3.21, 2.75, 3.99),
            "Kiwi-Edit 5B, all data": (3.51, 2.96, 2.91, 3.40, 2.58, 2.40, 2.96),
            "Kiwi-Edit 5B, reference data only": (3.98, 3.40, 3.34, 3.72, 2.90, 2.51, 3.31),
        },
    ),
}

# ------------------------------------------------------------------------------------------------ benchmarks


@dataclass(frozen=True)
class Item:
    """One edit to judge. `key` names it in every table; `edit` follows the release's naming of outputs."""

    key: str
    task: str
    instruction: str
    source: Path
    edit: Path
    ref: Path | None = None


def texts_of(row, where, *names):
    """Yield a row's texts of these names. JudgeError where one is missing."""
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise JudgeError(f"{where}: has no {name}; is it the right --bench?")
        yield value.strip()


def read_refvie(path, edits):
    """RefVIE-Bench: a YAML list of src_video, instruction, ref_img, edit_type."""
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise JudgeError(f"{path}: is not YAML ({str(error).splitlines()[0]})") from None
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        where = f"{path}, item {i}"
        source, instruction, ref, task = texts_of(row, where, "src_video", "instruction", "ref_img", "edit_type")
        edit = inside(edits, f"{i}_{instruction[:10]}_{Path(source).name}", where)
        yield Item(str(i), task, instruction, inside(path.parent, source, where), edit, inside(path.parent, ref, where))


LEFT_OUT = ("creative_edit", "camera_edit", "subtitle_edit")  # of OpenVE-Bench, as in the paper and the release


def read_openve(path, edits):
    """OpenVE-Bench: a CSV of original_video, prompt, edited_type. Paths start from the CSV's folder or, as published,
    with its name."""
    folder = path.absolute().parent
    for i, (where, row) in enumerate(csv_lines(path)):
        source, instruction, task = texts_of(row, where, "original_video", "prompt", "edited_type")
        if task not in LEFT_OUT:
            edit = inside(edits, f"{Path(source).stem}_edited.mp4", where)
            published = source.split("/")[0] == folder.name and not (folder / source).exists()
            base = folder.parent if published else folder
            yield Item(str(i), task, instruction, inside(base, source, where), edit)


def read_imgedit(path, edits):
    """ImgEdit's singleturn.json: {key: {id, prompt, edit_type}}, outputs <edit_type>/<key><picture's name>."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise JudgeError(f"{path}: is not JSON ({error})") from None
    for key, row in rows.items() if isinstance(rows, dict) else ():
        where = f"{path}, {key}"
        source, instruction, task = texts_of(row, where, "id", "prompt", "edit_type")
        edit = inside(edits, f"{task}/{key}{Path(source).name}", where)
        yield Item(key, task, instruction, inside(path.parent, source, where), edit)


BENCHES = {"refvie": read_refvie, "openve": read_openve, "imgedit": read_imgedit}


def read_bench(bench, path, edits, limit=None):
    """The items of a benchmark, at most `limit`. JudgeError where the file is not what --bench says."""
    path, edits = Path(path), Path(edits)
    if not path.is_file():
        raise JudgeError(f"{path}: no such file; give the benchmark's YAML, CSV or JSON")
    items = list(BENCHES[bench](path, edits))
    if not items:
        raise JudgeError(f"{path}: holds no items of --bench {bench}; is it the right file?")
    names = {}
    for item in items:
        if bench in TASKS and item.task not in TASKS[bench]:
            raise JudgeError(f"{path}, item {item.key}: unknown task {item.task!r} for --bench {bench}")
        other = names.setdefault(item.edit, item)
        if other is not item:
            print(f"warning: {path}: items {other.key} and {item.key} share the edit {item.edit.name}, as the released names "
                  "have it: both are judged by the one file, which `run` makes of the first", file=sys.stderr)  # fmt: skip
    return items[:limit]


def wrong_references(items, item):
    """Up to 5 references of other items, those of the same task first, from the next item on, cyclically."""
    if item.ref is None:
        return []
    at = items.index(item)
    others = [
        other for other in items[at + 1 :] + items[:at] if other.ref and other.ref != item.ref and other.ref.is_file()
    ]
    return [other.ref for other in sorted(others, key=lambda other: other.task != item.task)][:5]


# ------------------------------------------------------------------------------------------------ the ledger


class Ledger:
    """answers.jsonl: every question sent and every answer, one JSON a line, written through at once.

    A rerun asks only what has no good answer yet. A line cut short by a crash is put aside, never guessed at.
    """

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.good, self.lines, cut = {}, [], 0
        writable(path)
        self.file = path.open("a+", encoding="utf-8", errors="replace")  # a crash may cut a character in two
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JudgeError(f"{path}: another judge.py writes to it; wait for it, or give another --out") from None
        self.file.seek(0)
        text = self.file.read()
        for line in filter(None, text.split("\n")):
            try:
                self.take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                cut += 1
        if cut:
            print(f"resume      {cut} broken line(s) of {path} put aside", file=sys.stderr)
        if text and not text.endswith("\n"):
            self.file.write("\n")

    def take(self, line):
        event, key = line["event"], line["key"]  # KeyError: no line of ours
        if event == "answer" and line["ok"]:
            self.good[key] = line
        self.lines.append(line)

    def write(self, **line):
        with self.lock:
            self.file.write(json.dumps(line) + "\n")  # ASCII: an answer may hold what ends a line or is no text
            self.file.flush()
            os.fsync(self.file.fileno())
            self.take(line)

    def due(self, questions):
        """Those without a good answer yet, each once."""
        return list({q.key: q for q in questions if q.key not in self.good}.values())

    def close(self):
        self.file.close()


@cache
def file_hash(path):
    """sha256 of a file's content, in hex; read once a run."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def question_key(judge, text, files, extra=""):
    """What makes a question the same question: judge, words, and the content of the files, whatever their names."""
    parts = [judge, text, extra, *(file_hash(path) for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ asking


def make_judge(args):
    """The judge of --judge, or None for `metrics`. JudgeError for a name that is none."""
    name = args.judge
    if name == "metrics":
        return None
    if has_secret(args.endpoint):
        raise JudgeError("--endpoint: no user, password or query in the address; put the key into the environment")
    if name.startswith("gemini-"):
        return Gemini(name, args)
    kind, _, rest = name.partition(":")
    if rest and kind == "openai":
        return OpenAICompatible(rest, args)
    if rest and kind == "local":
        return Local(local_path(rest), args)
    raise JudgeError(f"--judge {name}: expected metrics, gemini-..., openai:MODEL or local:PATH")


@dataclass
class Question:
    """One request to an MLLM judge. control: "" for a real item, else what is known about the answer."""

    item: str
    control: str
    repeat: int
    text: str
    media: list  # (label, path)
    names: list  # criteria to read, empty for a pairwise question
    key: str


class Asker:
    """Sends questions a few at a time, retries, and writes everything down."""

    def __init__(self, judge, args, ledger):
        self.judge, self.args, self.ledger = judge, args, ledger
        self.not_before = 0.0  # while the judge is overrun
        self.stop = None  # why nothing more is sent
        self.reached = False

    def ask_all(self, questions):
        """Ask what the ledger does not know yet. Barred when the judge refuses us altogether."""
        due = self.ledger.due(questions)
        workers = 1 if isinstance(self.judge, Local) else self.args.concurrency
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(due), desc="judge", disable=not due) as bar:
            try:
                for done in as_completed([pool.submit(self.ask, question) for question in due]):
                    done.result()
                    bar.update()
            except BaseException as error:  # Ctrl-C among them: what waits in the queue must not be sent, and paid
                self.stop = self.stop or error
                pool.shutdown(cancel_futures=True)
                raise
        if self.stop:
            raise self.stop

    def ask(self, question):
        """Ask until there is a score, a reason to give up, or no try left."""
        for attempt in range(self.args.retries + 1):
            self.sleep_until(self.not_before)
            if self.stop:
                return
            problem = self.try_once(question, attempt)
            self.reached |= not isinstance(problem, TryAgain)
            if problem is None or isinstance(problem, Unusable | OSError) or isinstance(self.judge, Local) or self.stop:
                return  # a model on this machine would say the same again
            if isinstance(problem, TryAgain):
                wait = self.args.wait * 2**attempt * (1 + random.random() / 4)
                until = time.monotonic() + min(wait if problem.after is None else problem.after, MAX_WAIT)
                if problem.busy:  # everybody waits
                    self.not_before = max(self.not_before, until)
                if attempt < self.args.retries:
                    self.sleep_until(until)
        if not self.reached:  # then the problem is a TryAgain
            what = "has no time for us" if problem.busy else "cannot be reached"
            mend = "try again later" if problem.busy else "check --endpoint, and that its server is up"
            self.stop = Barred(f"the judge {what} ({problem}); {mend}")

    def try_once(self, question, attempt):
        """One request and its line in the ledger -> None, or the exception that stands for what went wrong."""
        read = read_answer if question.names else read_winner
        known = {"key": question.key, "item": question.item, "control": question.control, "repeat": question.repeat}
        self.ledger.write(event="sent", attempt=attempt, **known)
        began, problem, found = time.time(), None, {"ok": False}
        try:
            answer = self.judge.ask(question.text, question.media, self.args.fps)
            found |= {"raw": answer.text, "tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
            found |= {"scores": read(answer.text, question.names), "ok": True}
        except (TryAgain, ValueError, OSError) as error:
            problem = error
            found["error"] = str(error)
            if isinstance(error, Barred):
                self.stop = error
        seconds = round(time.time() - began, 2)
        self.ledger.write(event="answer", attempt=attempt, seconds=seconds, judge=self.args.judge, **known, **found)
        return problem

    def sleep_until(self, when):
        while not self.stop and (left := when - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


TOKENS_PER_FRAME = 258  # Gemini's usual count; other judges differ


def frames_seen(path, fps):
    """About how many frames of a file a judge sees; one of a picture, and of what cannot be read."""
    try:
        with open_media(path) as (container, stream):
            return max(1, round(shown_frames(container, stream) / frame_rate(stream) * fps))
    except MediaError:
        return 1


def dollars(price, tokens_in, tokens_out):
    return f", ${(price[0] * tokens_in + price[1] * tokens_out) / 1e6:.2f}" if price else ""


def announce(questions, ledger, args):
    due = ledger.due(questions)
    frames = {path: frames_seen(path, args.fps) for path in {path for q in due for _, path in q.media}}
    tokens_in = sum(len(q.text) // 4 + TOKENS_PER_FRAME * sum(frames[path] for _, path in q.media) for q in due)
    tokens_out = 120 * len(due)
    print(f"cost        {len(due)} of {len(questions)} questions to ask, about {tokens_in:,} tokens in, {tokens_out:,} out"
          f"{dollars(args.price, tokens_in, tokens_out)}")  # fmt: skip


def account(ledger, questions, price):
    """What the questions cost so far, over all runs: one line of text."""
    keys = {q.key for q in questions}
    answers = [line for line in ledger.lines if line["event"] == "answer" and line["key"] in keys]
    sent = sum(line["event"] == "sent" and line["key"] in keys for line in ledger.lines)
    t_in, t_out = (sum(line.get(name) or 0 for line in answers) for name in ("tokens_in", "tokens_out"))
    failed = sum(not line["ok"] for line in answers)
    return (f"{sent} requests sent, {len(answers)} answered or given up, {failed} of these without a score, "
            f"{sent - len(answers)} cut off (perhaps paid); {t_in:,} tokens in, {t_out:,} out"
            f"{dollars(price, t_in, t_out)}")  # fmt: skip


# ------------------------------------------------------------------------------------------------ numbers with intervals


@dataclass
class Mean:
    value: float | None
    low: float | None = None
    high: float | None = None
    missing: int = 0

    def __str__(self):
        missing = f" ({self.missing} missing)" if self.missing else ""
        if self.value is None:
            return f"-{missing}"
        digits = 3 if abs(self.value) < 1 else 2
        interval = "" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{interval}{missing}"


def mean_of(groups, missing=0, allow_missing=True):
    """The mean of the groups' means, with a 95 % bootstrap interval over items within each group.

    groups: lists of one number an item (repeats averaged before: items, not answers, are what varies). No value where
    a group is empty, or items are missing and averaging over failures is not allowed; no interval for a single item.
    """
    if not groups or not all(groups) or (missing and not allow_missing):
        return Mean(None, missing=missing)
    value = float(np.mean([np.mean(g) for g in groups]))
    if min(map(len, groups)) < 2:
        return Mean(value, missing=missing)
    draw = np.random.default_rng(0)
    means = np.mean([np.array(g)[draw.integers(len(g), size=(2000, len(g)))].mean(1) for g in groups], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(value, float(low), float(high), missing)


def spearman(a, b):
    """Rank correlation with ties; None where one side does not vary or there are fewer than 3 pairs."""
    ra, rb = (np.sign(np.subtract.outer(x, x)).sum(axis=1) for x in (a, b))  # ranks, ties sharing theirs, up to scale
    if len(ra) < 3 or ra.std() == 0 or rb.std() == 0:
        return None
    return float(np.corrcoef(ra, rb)[0, 1])


def kendall(a, b):
    """Kendall's tau-b; None as `spearman`."""
    da, db = (np.sign(np.subtract.outer(x, x))[np.triu_indices(len(x), 1)] for x in (a, b))  # of two items the higher
    if len(a) < 3 or not da.any() or not db.any():
        return None
    return float((da * db).sum() / math.sqrt((da != 0).sum() * (db != 0).sum()))


# ------------------------------------------------------------------------------------------------ metrics of an item


@dataclass
class Row:
    """All that is known about an item at the end."""

    item: Item
    metrics: dict = field(default_factory=dict)  # empty where there are none
    media: Path | None = None  # where its filmstrip and clip are, without the ending
    error: str | None = None
    answers: list = field(default_factory=list)  # enforced {name: score}, one a repeat
    broken: int = 0  # answers that broke the hierarchy
    reasons: list = field(default_factory=list)
    failures: list = field(default_factory=list)  # why an answer is missing, one a repeat without a score

    @property
    def lost(self):
        """Why a result is missing, or None: averaging over the others would be averaging over failures."""
        return self.error or (self.failures or [None])[0]

    def score(self, name):
        """The mean over repeats; None without answers, or where they have no such criterion."""
        given = [answer[name] for answer in self.answers if name in answer]
        return fmean(given) if given else None

    def totals(self):
        """Of each repeat the mean over its criteria."""
        return [fmean(answer.values()) for answer in self.answers]

    def spread(self):
        """Standard deviation over repeats of the mean score; None below two."""
        return stdev(self.totals()) if len(self.answers) > 1 else None


METRICS_VERSION = "metrics/2"


def measure_all(items, ledger, out):
    """Metrics of every item, those that the ledger knows already excepted -> rows."""

    def one(item):
        if not item.edit.is_file():
            return Row(item, error=f"missing: {item.edit}")
        try:
            refs = [item.ref, *wrong_references(items, item)] if item.ref else []
            key = question_key(METRICS_VERSION, "", [item.source, item.edit, *refs])
            media = out / "media" / key
            if key not in ledger.good or not media.with_suffix(".jpg").is_file():
                values = measure_files(item.source, item.edit, refs, media)
                ledger.write(event="answer", ok=True, key=key, item=item.key, judge=METRICS_VERSION, metrics=values)
            return Row(item, ledger.good[key]["metrics"], media)
        except (MediaError, OSError) as error:
            return Row(item, error=f"unreadable: {error}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # items run side by side
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(one, items), total=len(items), desc="metrics"))
    torch.set_num_threads(threads)
    return rows


# ------------------------------------------------------------------------------------------------ controls


def questions_of(rows, args):
    """Everything to ask about the items that can be judged: the items, repeated, and controls on a few of them."""
    good = [row.item for row in rows if row.error is None]
    questions = [question(args, item, item, repeat=repeat) for item in good for repeat in range(args.repeats)]
    step = max(1, len(good) // max(1, args.controls))
    for item in good[::step][: args.controls]:
        questions.append(question(args, item, replace(item, edit=item.source), "copy"))
        if args.bench != "imgedit":
            path = args.out / "controls" / f"{file_hash(item.edit)[:16]}_shuffled.mp4"
            if not path.is_file():
                write_shuffled(path, item.edit)
            questions.append(question(args, item, replace(item, edit=path), "shuffled"))
        if wrong := wrong_references([row.item for row in rows], item):
            questions.append(question(args, item, replace(item, ref=wrong[0]), "wrong_ref"))
    return questions


def question(args, item, shown, control="", repeat=0):
    """A question about an item, with the media of `shown`."""
    kind = "picture" if args.bench == "imgedit" else "video"
    media = [("Reference image", shown.ref)] if shown.ref else []
    media += [(f"Original {kind}", shown.source), (f"Edited {kind}", shown.edit)]
    text = rubric(args.bench, item)
    key = question_key(
        f"{args.judge} {args.fps:g} {args.send}", text, [path for _, path in media], f"{control} {repeat}"
    )
    return Question(item.key, control, repeat, text, media, list(task_of(args.bench, item.task)[1]), key)


def collect(rows, questions, ledger):
    """Put the ledger's answers into the rows; answers to controls are returned: {(control, item key): scores or None}."""
    by_key = {row.item.key: row for row in rows}
    controls = {}
    failures = {line["key"]: line["error"] for line in ledger.lines if line["event"] == "answer" and not line["ok"]}
    for q in questions:
        row, line = by_key[q.item], ledger.good.get(q.key)
        scores, broken = enforce({name: line["scores"][name] for name in q.names}) if line else (None, False)
        if q.control:
            controls[q.control, q.item] = scores
        elif line is None:
            row.failures.append(failures.get(q.key) or "not asked")
        else:
            row.answers.append(scores)
            row.broken += broken
            row.reasons.append(read_reason(line["raw"]))
    return controls


def metric_controls(rows):
    """Known answers put to the metrics -> table."""
    done = [row.metrics for row in rows if row.metrics]
    moving = [m for m in done if m["flicker"] is not None]
    refs = [m for m in done if m["reference_gain"] is not None]
    wrong = [(m["reference_gain"], m["control_wrong_gains"]) for m in refs if m["control_wrong_gains"]]
    tests = {
        "edit_strength is above that of the source, re-encoded": [
            m["edit_strength"] > m["control_copy_strength"] for m in done
        ],
        "reference_gain is above that of the source, re-encoded": [
            m["reference_gain"] > m["control_copy_gain"] for m in refs
        ],
        "reference_gain is higher for the true reference than for the next one of its task": [
            g > w[0] for g, w in wrong
        ],
        "the same, all pairs with up to 5 other references": [g > x for g, w in wrong for x in w],
        "shuffled frames flicker more": [m["control_shuffled_flicker"] > m["flicker"] for m in moving],
    }
    return [["known answer", "held", "of"], *([what, sum(held), len(held)] for what, held in tests.items() if held)]


def judge_controls(rows, controls):
    """Known answers put to the MLLM judge -> table."""
    judged = {row.item.key: row for row in rows if row.answers}
    tests = {
        "copy": "the source handed in as the edit scores 1 on the first criterion",
        "wrong_ref": "a wrong reference scores lower on the first criterion",
        "shuffled": "shuffled frames score lower on time (where there is no such criterion: on the last two)",
    }
    table = [["known answer", "held", "of", "true edit scored 1 too", "without an answer"]]
    for kind, what in tests.items():
        asked = [(judged.get(key), scores) for (control, key), scores in controls.items() if control == kind]
        known = []  # of each pair the true edit's total, the control's, and the lowest there is
        for row, scores in asked:
            if row and scores:
                names = list(scores)[:1]
                if kind == "shuffled":
                    names = [name for name in scores if name == "temporal_consistency"] or list(scores)[1:]
                known.append((sum(map(row.score, names)), sum(scores[name] for name in names), len(names)))
        if kind == "copy":
            held = [given == lowest for _, given, lowest in known]
        else:  # what scores 1 already cannot fall: such a pair tells nothing
            held = [given < whole for whole, given, lowest in known if whole > lowest]
        if asked:
            table.append([what, sum(held), len(held), len(known) - len(held), len(asked) - len(known)])
    return table


# ------------------------------------------------------------------------------------------------ reports


def by_task(rows):
    """{task: its rows}, in the paper's order."""
    tasks = {task: [] for task in (*REFERENCE_TASKS, *VIDEO_TASKS)}
    for row in rows:
        tasks.setdefault(row.item.task, []).append(row)
    return {task: of_task for task, of_task in tasks.items() if of_task}


def criteria_in(rows):
    return list(dict.fromkeys(name for row in rows for answer in row.answers for name in answer))


def score_means(bench, rows, allow_missing):
    """Means of an MLLM's scores: {task: {criterion: Mean, "average": Mean}}, and overall, the mean of the tasks'."""
    means, groups = {}, []
    for task, of_task in by_task(rows).items():
        missing = sum(bool(row.lost) for row in of_task)
        judged = [row for row in of_task if row.answers]
        columns = {name: [row.score(name) for row in judged] for name in task_of(bench, task)[1]}
        columns["average"] = [fmean(row.totals()) for row in judged]
        means[task] = {name: mean_of([values], missing, allow_missing) for name, values in columns.items()}
        groups.append(columns["average"])
    return means, mean_of(groups, sum(bool(row.lost) for row in rows), allow_missing)


def score_table(bench, name, rows, allow_missing):
    """The paper's Table 3 (refvie: a column for each criterion) or 2 (openve: one for each task)."""
    means, overall = score_means(bench, rows, allow_missing)
    if bench == "refvie":
        ours = {f"{task}: {column.replace('_', ' ')}": mean for task in means for column, mean in means[task].items()}
    else:
        ours = {task.replace("_", " "): means[task]["average"] for task in means}
    table = [["", *ours, "overall"], [f"**{name}**", *ours.values(), f"**{overall}**"]]
    judge_note, published = PUBLISHED.get(bench, ("", {}))
    for system, values in published.items():
        table.append([f"{system}, published, {judge_note}", *published_cells(bench, means, values)])
    return table


def published_cells(bench, tasks, values):
    """A published row laid out as ours of these tasks."""
    *values, overall = values
    if bench == "refvie":
        known = {task: [*three, fmean(three)] for task, three in zip(REFERENCE_TASKS, (values[:3], values[3:]))}
    else:
        known = {task: [value] for task, value in zip(VIDEO_TASKS, values)}
    cells = [f"{value:.2f}" for task in tasks for value in known[task]]
    return [*cells, f"{overall:.2f}" if len(tasks) == len(known) else "-"]  # of some tasks alone there is no overall


def metric_table(rows, allow_missing):
    """Means of the metrics, one line a task."""
    table = [["task", "items", *METRICS]]
    for task, of_task in by_task(rows).items():
        done = [row.metrics for row in of_task if row.metrics]
        cells = []
        for name in METRICS:
            values = [m[name] for m in done if m[name] is not None]
            undefined = len(done) - len(values)
            mean = mean_of([values], len(of_task) - len(done), allow_missing)
            cells.append(f"{mean} ({undefined} undefined)" if values and undefined else mean)
        table.append([task, f"{len(done)} of {len(of_task)}", *cells])
    return table


def markdown(table):
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def markdown_text(parts):
    """A report's parts, (title, text, table) each."""
    text = ""
    for title, words, table in parts:
        text += f"\n## {title}\n\n" + (f"{words}\n\n" if words else "") + f"{markdown(table)}\n"
    return text


def sections(rows, controls, args, cost, human):
    """The report's parts: [(title, text, table)], for Markdown and HTML alike."""
    parts = []
    if args.judge != "metrics":
        parts.append(("Scores", score_text(rows, args), score_table(args.bench, args.name, rows, args.allow_missing)))
        parts.append(("Controls of the judge", f"Cost: {cost}", judge_controls(rows, controls)))
    text = "No model. Mean over items [95 % bootstrap interval over items; too narrow where there are only a few]."
    parts.append(("Metrics", text, metric_table(rows, args.allow_missing)))
    parts.append(("Controls of the metrics", "", metric_controls(rows)))
    if human:
        parts.append(("Agreement with people", "Rank correlation over items.", human_agreement(human, rows)))
    if lost := [[row.item.key, row.item.task, row.lost] for row in rows if row.lost]:
        means = "Means are over what there is" if args.allow_missing else "No mean is given over failures"
        text = f"{len(lost)} of {len(rows)} items lack a result. {means}."
        parts.append(("Missing", text, [["item", "task", "why"], *lost]))
    table = [
        ["metric", "better", "what it is", "what it cannot see"],
        *([name, *told] for name, told in METRICS.items()),
    ]
    return [*parts, ("What the metrics are", "", table)]


def score_text(rows, args):
    """How the scores came about."""
    broken, answered = sum(row.broken for row in rows), sum(len(row.answers) for row in rows)
    text = (
        f"Judge {args.judge} at {args.fps:g} frames a second, {args.repeats} answer(s) an item. Mean [95 % bootstrap "
        f"interval over items]; overall is the mean of the tasks' means. The judge broke the hierarchy in {broken} of "
        f"{answered} answers; scores 2 and 3 were capped by score 1. {sum(len(row.failures) for row in rows)} "
        f"answers are missing. Published rows are the authors' own figures on "
        f"the whole benchmark with their judge and their rubric; ours says the same criteria in its own words, so compare "
        f"ranks, not digits; * is from the project's page, the rest agrees with the paper."
    )
    spreads = [row.spread() for row in rows if row.spread() is not None]
    return text + (f" Standard deviation over repeats, mean over items: {fmean(spreads):.2f}." if spreads else "")


def write_reports(rows, parts, args):
    """<bench>.md, .csv and .html -> the path of the last."""
    title, page = f"{args.bench}: {args.name}", args.out / f"{args.bench}.html"
    write_text(page.with_suffix(".md"), f"# {title}\n\n`{args.command_line}`\n{markdown_text(parts)}")
    write_text(page.with_suffix(".csv"), csv_text(rows))
    write_text(page, html_text(title, rows, parts, args))
    return page


def csv_text(rows):
    """One line an item: scores, spread over repeats, metrics, what went wrong."""
    names = criteria_in(rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(
        ["item", "task", "edit", *names, "answers", "spread", "hierarchy_broken", *METRICS, "error", "instruction"]
    )
    number = lambda value: "" if value is None else f"{value:.4f}"
    for row in rows:
        scores = [number(row.score(name)) for name in names]
        metrics = [number(row.metrics.get(name)) for name in METRICS]
        writer.writerow([row.item.key, row.item.task, row.item.edit.name, *scores, len(row.answers), number(row.spread()),
                         row.broken, *metrics, row.lost or "", row.item.instruction])  # fmt: skip
    return buffer.getvalue()


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0;font-size:13px}td,th{border:1px solid #ccc;padding:.25rem .5rem;text-align:left;
vertical-align:top}th{background:#f3f3f3}.wide{overflow-x:auto}img,video{max-width:100%;display:block;margin:.4rem 0}
.item{border-top:1px solid #ccc;padding:.6rem 0}code{font-size:12px}.bad{color:#a00}"""


def html_table(table):
    cell = lambda value, tag: f"<{tag}>{html.escape(str(value).replace('**', ''))}</{tag}>"
    rows = ["".join(cell(value, "td" if i else "th") for value in row) for i, row in enumerate(table)]
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(rows)}</tr></table></div>'


def html_text(title, rows, parts, args):
    """One self-contained page: the tables, then each item with its filmstrip, clip, scores and reasons."""
    body = [f"<h1>{html.escape(title)}</h1><p><code>{html.escape(args.command_line)}</code></p>"]
    for name, words, table in parts:
        body.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(words)}</p>{html_table(table)}")
    body.append("<h2>Items</h2><p>Above: source, below: edit, right: reference. The clip shows source and edit.</p>")
    body += [html_item(row) for row in rows]
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        + "\n".join(body)
    )


def html_item(row):
    """An item's part of the page, its pictures as data URIs."""
    item = row.item
    parts = [
        f'<div class="item"><h3>{html.escape(item.key)} {html.escape(item.task)}</h3><p>{html.escape(item.instruction)}</p>'
    ]
    if row.error:
        return parts[0] + f'<p class="bad">{html.escape(row.error)}</p></div>'
    parts.append(f'<img alt="filmstrip" src="{data_uri(row.media.with_suffix(".jpg"))}">')
    if (clip := row.media.with_suffix(".mp4")).is_file():
        parts.append(f'<video controls loop muted preload="none" src="{data_uri(clip)}"></video>')
    if row.answers:
        names = list(row.answers[0])
        parts.append(
            html_table([[*names, "reasons"], [*(f"{row.score(n):.2f}" for n in names), " / ".join(row.reasons)]])
        )
    for failure in row.failures:
        parts.append(f'<p class="bad">no score: {html.escape(failure)}</p>')
    known = {n: v for n, v in row.metrics.items() if isinstance(v, float) and not n.startswith("control")}
    parts.append(html_table([list(known), [f"{v:.3f}" for v in known.values()]]))
    return "".join(parts) + "</div>"


def read_human(path, items):
    """A CSV of item and one or more columns of human scores -> {column: {item: [scores]}}. ValueError."""
    human = {}
    for where, line in csv_lines(path, ["item"]):
        item = line.pop("item")
        for column, value in line.items():
            if value:
                try:
                    score = float(value)
                except ValueError:
                    score = math.nan
                if not math.isfinite(score):
                    raise JudgeError(f"{where}: {column} is {value!r}, not a number")
                human.setdefault(column, {}).setdefault(item, []).append(score)
    known = {item.key for item in items}
    if not any(known & scores.keys() for scores in human.values()):
        raise JudgeError(
            f"{path}: none of its items is one of the benchmark's, which are {', '.join(sorted(known)[:5])}, ..."
        )
    return human


def human_agreement(human, rows):
    """What `read_human` read -> table of Spearman and Kendall with what we computed."""
    table = [["people's", "ours", "items", "Spearman", "Kendall"]]
    ours = {name: {row.item.key: row.score(name) for row in rows} for name in criteria_in(rows)}
    ours["mean score"] = {row.item.key: fmean(row.totals()) for row in rows if row.answers}
    ours |= {name: {row.item.key: row.metrics.get(name) for row in rows} for name in METRICS}
    show = lambda value: "-" if value is None else f"{value:.2f}"
    for column, of_people in human.items():
        for name, of_us in ours.items():
            both = [key for key in of_people if of_us.get(key) is not None]
            if both:
                a, b = [fmean(of_people[key]) for key in both], [of_us[key] for key in both]
                table.append([column, name, len(both), show(spearman(a, b)), show(kendall(a, b))])
    return table


# ------------------------------------------------------------------------------------------------ commands


def edits_exist(*folders):
    """JudgeError where a folder of edits is not there: a report on it would take the place of a good one."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise JudgeError(f"{folder}: no such folder of edits")


def score(args):
    """`judge.py score`: metrics, then the judge, then the report. JudgeError at the end where items have no result."""
    edits_exist(args.edits)
    items = read_bench(args.bench, args.path, args.edits, args.limit)
    human = read_human(args.human, items) if args.human else None  # before the judge is paid
    controls, cost, stopped = {}, "", None
    with closing(Ledger(args.out / "answers.jsonl")) as ledger:
        judge = make_judge(args)
        rows = measure_all(items, ledger, args.out)
        print(f"metrics     {sum(bool(row.metrics) for row in rows)} of {len(rows)} items")
        if judge:
            questions = questions_of(rows, args)
            announce(questions, ledger, args)
            if args.dry_run:
                return
            try:
                Asker(judge, args, ledger).ask_all(questions)
            except Barred as error:
                stopped = error
            controls = collect(rows, questions, ledger)
            cost = account(ledger, questions, args.price)
            print(f"paid        {cost}")
    parts = sections(rows, controls, args, cost, human)
    page = write_reports(rows, parts, args)
    for title, _, table in parts[:-1]:
        print(f"\n{title}\n{markdown(table)}")
    print(f"\n{page}")
    if stopped:
        raise stopped
    missing = sum(bool(row.lost) for row in rows)
    if missing and not args.allow_missing:
        raise JudgeError(f"{missing} of {len(rows)} items lack a result, see {page}; mend them and run again, "
                         f"or average over the rest with --allow-missing")  # fmt: skip


def same_run(args, items):
    """The edits of a folder are one model's, made in one way: run.json in it says which. JudgeError for another, and for
    edits of which nothing is said."""
    path = args.edits / "run.json"
    weights = Path(args.weights)
    config, files = read_weights(args.weights, args.base, args.qwen)
    asked = {name: getattr(args, name) for name in ("base", "qwen", "seed", "ref", "frames", "max_pixels")}
    asked |= {name: getattr(args, name) or getattr(config, name) for name in ("steps", "ref_guidance")}
    asked["ref_pad_first"] = args.ref_pad_first or None  # not said by older ones
    asked["weights"] = str(weights.resolve() if weights.exists() else weights)
    asked["files"] = fingerprint(sorted({file for file, _ in files.places.values()}))
    if path.is_file():
        made = read_json(path)
        if other := [
            f"{name} {made.get(name)}, not {value}" for name, value in asked.items() if made.get(name) != value
        ]:
            raise JudgeError(f"{path}: edits are there of {'; '.join(other)}; give another --edits, or delete them")
        return
    if there := next((item.edit for item in items if item.edit.is_file()), None):
        raise JudgeError(f"{there}: is there, and no {path} says whose edit it is; give another --edits")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asked, indent=1))


def fingerprint(files):
    """Of weights, quickly: their files' sizes, first and last million bytes."""
    digest = hashlib.sha256()
    for path in files:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{Path(path).name} {size}".encode() + file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def run(args):
    """`judge.py run`: the edits themselves, one process a GPU under torchrun, taken up where it stopped."""
    rank, world = rank_and_world()
    device = pick_device(args.device)
    items = read_bench(args.bench, args.path, args.edits, args.limit)
    same_run(args, items)
    items = list({item.edit: item for item in reversed(items)}.values())[::-1]  # of those that share a name the first
    mine = [item for item in items[rank::world] if not item.edit.is_file()]
    print(f"[{rank}/{world}] {len(mine)} of {len(items[rank::world])} edits to make, {args.weights} on {device}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = (
        KiwiEdit.from_pretrained(args.weights, device, dtype, args.base, args.qwen, args.ref_pad_first)
        if mine
        else None
    )
    failed = 0
    for item in mine:
        try:
            make_edit(model, item, args)
            print(f"[{rank}/{world}] {item.edit}", flush=True)
        except (ValueError, RuntimeError) as error:
            failed += 1
            if isinstance(error, RuntimeError):
                if not is_out_of_memory(error):
                    raise
                torch.cuda.empty_cache()
                error = f"out of memory on {device}: add --tile 16, or smaller --frames or --max-pixels"
            print(f"[{rank}/{world}] item {item.key} skipped: {error}", file=sys.stderr, flush=True)
    if failed and world == 1:  # under torchrun a failing process would end the others; `score` counts what is missing
        raise JudgeError(f"{failed} of {len(mine)} edits failed, see above; run again when they are mended")


def make_edit(model, item, args):
    """An item's edit by the model, written where the benchmark looks for it."""
    clip = read_for(model.config, item.source, args.frames, args.max_pixels, every_frame=True)
    ref = read_image(item.ref) if item.ref and args.ref else None
    edited = model.edit(clip.frames, item.instruction, ref, steps=args.steps, seed=args.seed, tile=args.tile,
                        ref_guidance=args.ref_guidance)  # fmt: skip
    item.edit.parent.mkdir(parents=True, exist_ok=True)
    if clip.still:
        write_image(item.edit, edited[0])
    else:
        write_video(item.edit, edited, clip.fps, item.source, faithful_codec(edited))


def compare(args):
    """`judge.py compare`: which of two systems wins, each pair shown in both orders; metrics as paired differences."""
    edits_exist(args.a, args.b)
    sides = [read_bench(args.bench, args.path, folder, args.limit) for folder in (args.a, args.b)]
    parts = []
    with closing(Ledger(args.out / "answers.jsonl")) as ledger:
        judge = make_judge(args)
        pairs = list(zip(*(measure_all(items, ledger, args.out) for items in sides)))
        lost = {a.item.key: a.error or b.error for a, b in pairs if a.error or b.error}
        if judge:
            questions = [q for a, b in pairs if a.item.key not in lost for q in both_orders(args, a.item, b.item)]
            announce(questions, ledger, args)
            if args.dry_run:
                return
            Asker(judge, args, ledger).ask_all(questions)
            lost |= {q.item: "no answer of the judge in both orders" for q in questions if q.key not in ledger.good}
            parts.append(preferences(questions, ledger, lost, args.allow_missing))
            print(f"paid        {account(ledger, questions, args.price)}")
    pairs = [(a, b) for a, b in pairs if a.item.key not in lost]
    parts.append(paired_metrics(pairs, len(lost), args.allow_missing))
    if lost:
        parts.append(("Missing", "", [["item", "why"], *lost.items()]))
    text = f"# {args.bench}: A = {args.a}, B = {args.b}\n\n`{args.command_line}`\n\n{len(pairs)} pairs, {len(lost)} missing.\n"
    text += markdown_text(parts)
    page = args.out / f"{args.bench}_compare.md"
    write_text(page, text)
    print(f"{text}\n{page}")
    if lost and not args.allow_missing:
        raise JudgeError(f"{len(lost)} of {len(sides[0])} pairs are incomplete; mend them or give --allow-missing")


def paired_metrics(pairs, lost, allow_missing):
    """Pairs of rows -> a section of the report with the differences of every metric."""
    table = [["metric", "better", "A - B, mean of the pairs", "A higher", "pairs"]]
    for name, (better, *_) in METRICS.items():
        values = [(a.metrics[name], b.metrics[name]) for a, b in pairs]
        gaps = [x - y for x, y in values if x is not None and y is not None]
        if gaps:
            table.append([name, better, mean_of([gaps], lost, allow_missing), sum(g > 0 for g in gaps), len(gaps)])
    return "Metrics", "Paired differences [95 % bootstrap interval over items].", table


def both_orders(args, a, b):
    """The same pair asked twice, with A first and with B first."""
    what = "the reference image and the original" if a.ref else "the original"
    text = PAIR_RUBRIC.format(
        kind="picture" if args.bench == "imgedit" else "video", what=what, instruction=a.instruction
    )
    given = [("Reference image", a.ref)] if a.ref else []
    for order, (first, second) in (("AB", (a, b)), ("BA", (b, a))):
        media = [*given, ("Original", a.source), ("Edit 1", first.edit), ("Edit 2", second.edit)]
        key = question_key(f"{args.judge} {args.fps:g} {args.send}", text, [path for _, path in media], order)
        yield Question(a.key, order, 0, text, media, [], key)


def preferences(questions, ledger, lost, allow_missing):
    """A section of the report: a win counts where both orders name the same system; what follows the position is counted
    apart. lost: items without both answers."""
    votes = {}  # item -> the system that each order names
    for q in questions:
        if q.item not in lost:
            winner = ledger.good[q.key]["scores"]["winner"]
            votes.setdefault(q.item, []).append("tie" if winner == "tie" else q.control[int(winner) - 1])
    share = [1.0 if v == ["A", "A"] else 0.0 if v == ["B", "B"] else 0.5 for v in votes.values()]
    swayed = sum(set(v) == {"A", "B"} for v in votes.values())
    table = [
        ["A wins", "B wins", "undecided", "of these: followed the position", "pairs", "share of A"],
        [
            share.count(1),
            share.count(0),
            share.count(0.5),
            swayed,
            len(share),
            mean_of([share], len(lost), allow_missing),
        ],
    ]
    return "Preferences", "Each pair was shown in both orders; a win needs both.", table


def averages(args):
    """`judge.py averages`: the averages of score files written by the released scripts, theirs and ours."""
    for path in args.files:
        rows = read_released(path)
        table = [["", "theirs", "ours, hierarchy enforced", "answers", "partial", "hierarchy broken"]]
        theirs, ours = [], []  # one list a task
        for task in dict.fromkeys(task for task, _, _ in rows):
            of_task = [(scores, named) for t, scores, named in rows if t == task]
            whole = [enforce(named) for _, named in of_task if len(named) == 3]
            theirs.append([score for scores, _ in of_task for score in scores])
            ours.append([fmean(kept.values()) for kept, _ in whole])
            counts = len(of_task), len(of_task) - len(whole), sum(broken for _, broken in whole)
            table.append([task, f"{fmean(theirs[-1]):.4f}", mean_of([ours[-1]]), *counts])
        table.append(["mean of the tasks", f"{fmean(map(fmean, theirs)):.4f}", mean_of(ours), "", "", ""])
        table.append(["mean of all scores", f"{fmean(chain(*theirs)):.4f}", mean_of([list(chain(*ours))]), "", "", ""])
        print(f"{path}\n{markdown(table)}\n")


def read_released(path):
    """A score file of the released scripts -> [(task, their scores, {name: score})]; failures are not in such files.

    Names come from the answer kept beside the scores: the release orders RefVIE scores as the judge happened to.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for i, line in enumerate(file):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                task, scores, text = value.get("subtask") or value["edited_type"], value["scores"], value["result"]
                scores = [int(score) for score in scores]
                if not isinstance(text, str):
                    raise ValueError
            except (ValueError, KeyError, AttributeError, TypeError):
                raise JudgeError(f"{path}, line {i + 1}: not a line of the released scripts' score files") from None
            if not scores:
                continue
            rows.append((task, scores, released_names(task, scores, text)))
    if not rows:
        raise JudgeError(f"{path}: holds no scores")
    return rows


def released_names(task, scores, text):
    """The first criterion first: from the answer's own lines, or in stored order where it cannot be read."""
    # of OpenVE the release's wording of a criterion begins so, in the order in which it stores them
    names = (
        list(REFERENCE_TASKS[task][1])
        if task in REFERENCE_TASKS
        else ["instruction_compliance", "visual_quality", "consistency"]
    )
    try:
        return read_answer(text, names)
    except Malformed:
        return dict(zip(names, scores))


def main(argv=None):
    args = parse_arguments(argv)
    try:
        {"score": score, "compare": compare, "run": run, "averages": averages}[args.command](args)
    except KeyboardInterrupt:
        sys.exit("judge.py: interrupted; run the same command again to go on")
    except (ValueError, OSError) as error:
        sys.exit(f"judge.py: {' '.join(str(error).split())}")
    except RuntimeError as error:  # torch.OutOfMemoryError, or CUDA's own where not even its context fits
        if not is_out_of_memory(error):
            raise
        sys.exit("judge.py: out of GPU memory; take --device cpu, or a larger card")


if __name__ == "__main__":
    main()
