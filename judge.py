"""Judge edited videos: `python judge.py score --bench refvie refvie_bench.yaml --edits DIR --judge metrics`.

    benchmark + folder of edits -> items (source, instruction, reference, edit)
    -> metrics, without any model (metrics.py), and a model's answers (vlm.py) -> answers.jsonl, which a rerun takes up
    -> verdict, scores with the paper's hierarchy enforced, intervals -> <bench>.md, .csv, .html, summary.json

RefVIE-Bench and OpenVE-Bench (paper, Section 5; Tables 2 and 3): criteria from 1 to 5, none above the first. The
released scripts ask the judge to keep that rule, drop what failed from the mean and show no noise. Here the rule is
enforced and its breaches counted, nothing that failed is averaged away, and every run asks questions whose answer is
known: a judge that fails more than a fifth of them ends the run with exit code 3.
"""

import argparse
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import threading
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python judge.py run --bench refvie refvie_bench.yaml --weights weights/nano --edits out/edits
  python judge.py score --bench refvie refvie_bench.yaml --edits out/edits --judge gemini-3-flash-preview
  python judge.py compare --bench refvie refvie_bench.yaml out/edits_a out/edits_b --judge metrics
  python judge.py leaderboard out/judge_a out/judge_b

judges (--judge):
  metrics                 no model, no network; always computed, whatever the judge
  gemini-...              Google's native API, key in GEMINI_API_KEY
  openai:MODEL            any OpenAI-compatible server at --endpoint (vLLM, ...), its key in OPENAI_API_KEY
  local:PATH|HUB_ID       Qwen2.5-VL or Qwen3-VL through transformers
"""
MODES = {"official": (1.0, "medium"), "strict": (4.0, "high")}  # frames a second, resolution that the judge sees
TRUST = 0.2  # share of known answers that a judge may fail


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="Judge edited videos.", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, judged=False):
        add = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw).add_argument
        if name != "leaderboard":
            add("path", help="the items: the benchmark's YAML, CSV or JSON, or the --bench file if it holds them")
            add(
                "--bench",
                required=True,
                metavar="NAME|FILE",
                help="refvie, openve, imgedit, sparkle, or a YAML like them",
            )
            add("--limit", type=number(1), metavar="N", help="only the first N items")
        if judged:
            add("--judge", default="metrics", help="see below (default %(default)s)")
            add("--mode", choices=MODES, default="official", help="1 frame a second, or 4 at high resolution")
            add("--endpoint", metavar="URL", help="the judge's server, for openai: and other places than Google's")
            add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars a million tokens, for the cost")
            add("--dry-run", action="store_true", help="stop after the cost estimate")
            add("--allow-missing", action="store_true", help="average over what succeeded")
            add("--human", type=Path, metavar="CSV", help="item, rater, and people's scores, or what `people` saved")
            add(
                "--embedder",
                metavar="PATH|HUB_ID",
                help="a CLIP, for crop_similarity, e.g. openai/clip-vit-large-patch14",
            )
            add("--set", action="append", default=[], metavar="NAME=VALUE", help="how to ask (docs/judging.md)")
        if judged or name == "people":
            add("--out", type=Path, default="out/judge", metavar="DIR", help="for the report (default %(default)s)")
        return add

    add = command("score", "score finished edits and write a report", judged=True)
    add("--edits", type=Path, required=True, metavar="DIR", help="the edited videos, under the release's names")
    add("--prompts", type=Path, metavar="FILE", help="YAML, task: template with {instruction}; instead of our rubric")
    add("--repeats", type=number(1), default=1, help="answers an item (default %(default)s)")
    add("--controls", type=number(0), default=4, metavar="N", help="items with known answers (default %(default)s)")
    add("--name", help="the system's name in the tables (default: the folder of the edits)")

    add = command("compare", "compare two systems, order swapped", judged=True)
    add("a", metavar="A", help="the edits of one system")
    add("b", metavar="B", help="the edits of the other")

    add = command("people", "a page on which people compare two systems blind")
    add("a", metavar="A", help="the edits of one system")
    add("b", metavar="B", help="the edits of the other")

    add = command("leaderboard", "one table over several runs")
    add("runs", nargs="+", type=Path, metavar="RUN", help="--out of a `score`")

    add = command("run", "make the edits with Kiwi-Edit, under torchrun on several GPUs")
    add("--edits", type=Path, required=True, metavar="DIR", help="where they go, under the release's names")
    nano = str(Path(__file__).parent / "weights" / "nano")
    add("--weights", default=nano, metavar="PATH|HUB_ID", help="as for sample.py (default: weights/nano)")
    add("--base", metavar="PATH|HUB_ID", help="under a .safetensors or a run of train.py, as for sample.py")
    add("--qwen", metavar="PATH|HUB_ID", help="likewise")
    add("--ref-pad-first", action="store_true", help="as for sample.py")
    add("--ref", action=argparse.BooleanOptionalAction, default=True, help="give the reference image to the model")
    add("--steps", type=number(1), help="denoising steps (default: 50; nano 2)")
    add("--ref-guidance", type=number(1e-9, float), metavar="G", help="of references (default: 1; nano 1.2)")
    add("--seed", type=int, default=0, help="of every edit, as in the release (default %(default)s)")
    add("--frames", type=number(1), help="at most so many (default: 81; nano 9)")
    add("--max-pixels", type=number(1), help="larger frames are shrunk (default: 921600; nano 4096)")
    add("--tile", type=number(1), metavar="N", help="VAE tiles, for small cards")
    add("--device", help="default: this process's GPU, or the CPU")

    args = parser.parse_args(argv)
    # a password or key in --endpoint stays out of the report
    words = [re.sub(r"://.*[@?].*", "://***", word) for word in (sys.argv[1:] if argv is None else argv)]
    args.command_line = shlex.join(["python", "judge.py", *words])
    if args.command == "score":
        args.name = args.name or args.edits.name
    return args


def number(least, kind=int):
    """A type for argparse: a finite number of at least so much."""

    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return parse


if __name__ == "__main__":
    parse_arguments()  # parse before importing torch

import torch
from tqdm import tqdm

import report
from benchmarks import (
    Item,
    enforce,
    open_bench,
    read_answer,
    read_bench,
    read_reason,
    read_winner,
    read_yaml,
    wrong_references,
)
from data import csv_lines
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
from metrics import DAMAGES, METRICS, WORST, measure_files, write_damaged
from model import KiwiEdit, is_out_of_memory, read_for, read_weights
from parallel import pick_device, rank_and_world
from stats import Mean, kendall, mean_of, pairwise, sign_test, spearman, wilson, with_interval
from vlm import (
    Asker,
    Gemini,
    JudgeError,
    Local,
    OpenAICompatible,
    Settings,
    TryAgain,
    has_secret,
    in_threads,
    tokens_of,
)

PAIR = """You compare two edits of one {kind}. You see {what}, then edit 1 and edit 2. Say which one a careful viewer
would prefer: first by how well it does what was asked, then by what it kept, then by how clean, sharp and stable it is.
Answer with JSON alone: {"reasoning": "...", "winner": "1"}, "2" in place of "1", or "tie".

The instruction of the edit was: {instruction}"""


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
        event, key = line["event"], line["key"]  # KeyError: a broken line
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else (
            hashlib.sha256(file.read()).hexdigest())  # fmt: skip


def key_of_question(*parts):
    """What makes a question the same question: who is asked and how, words, and the content of files (paths)."""
    texts = [file_hash(part) if isinstance(part, Path) else str(part) for part in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def make_judge(args):
    """The judge of --judge, or None for `metrics`. JudgeError for a name that is none."""
    if args.judge == "metrics":
        return None
    if has_secret(args.endpoint):
        raise JudgeError("--endpoint: no user, password or query in the address; put the key into the environment")
    if args.judge.startswith("gemini-"):
        return Gemini(args.judge, args.settings)
    kind, _, rest = args.judge.partition(":")
    if rest and kind == "openai":
        return OpenAICompatible(rest, args.settings)
    if rest and kind == "local":
        return Local(local_path(rest), args.settings)
    raise JudgeError(f"--judge {args.judge}: expected metrics, gemini-..., openai:MODEL or local:PATH")


def make_settings(args):
    """vlm.Settings from --mode, --endpoint and --set."""
    fps, resolution = MODES[args.mode]
    settings = Settings(args.endpoint, fps, resolution, dry_run=args.dry_run)
    for text in args.set:
        name, _, value = text.partition("=")
        if name not in {f.name for f in fields(Settings)}:
            raise JudgeError(f"--set {text}: expected one of {', '.join(f.name for f in fields(Settings))}")
        kind = type(getattr(Settings, name))
        try:
            settings = replace(settings, **{name: value if kind is type(None) else kind(value)})
        except ValueError:
            raise JudgeError(f"--set {text}: expected {kind.__name__}") from None
    return settings


def asked_how(args):
    """Everything but words and files on which an answer depends."""
    s = args.settings
    return f"{args.judge} {s.endpoint} {s.fps:g} {s.resolution} {s.send} {s.max_pixels} {s.temperature}"


@dataclass
class Question:
    """One request to a judge. control: "" for a real item, else what is known about the answer."""

    item: Item
    control: str
    repeat: int
    text: str
    media: list  # (label, path)
    names: list  # criteria to read, empty for a pairwise question
    key: str
    schema: dict | None = None


def media_of(bench, item):
    return [*([("Reference image", item.ref)] if item.ref else []), (f"Original {bench.kind}", item.source),
            (f"Edited {bench.kind}", item.edit)]  # fmt: skip


def question(args, item, shown, control="", repeat=0):
    """A question about an item, with the media of `shown`; a damaged edit is known by the edit and the damage."""
    names, text = args.bench.criteria(item.task), args.bench.rubric(item, args.prompts)
    scores = {name: {"type": "integer", "minimum": 1, "maximum": 5} for name in names}
    schema = None if args.prompts else {"type": "object", "properties": {"reasoning": {"type": "string"}, **scores}}
    files = [item.source, item.edit, "damaged"] if control in DAMAGES else [shown.source, shown.edit]
    key = key_of_question(asked_how(args), text, control, repeat, *files, shown.ref or "")
    return Question(item, control, repeat, text, media_of(args.bench, shown), names, key, schema)


def questions_of(items, args):
    """Everything to ask about the items that can be judged: the items, repeated, and controls on a few of them."""
    questions = [question(args, item, item, repeat=repeat) for item in items for repeat in range(args.repeats)]
    step = max(1, len(items) // max(1, args.controls))
    for item in items[::step][: args.controls]:
        questions.append(question(args, item, replace(item, edit=item.source), "copy"))
        still = args.bench.kind == "picture"
        for damage in DAMAGES:
            if not still or damage in ("blurred", "quarter"):
                path = args.out / "controls" / f"{file_hash(item.edit)[:16]}_{damage}.{'png' if still else 'mp4'}"
                questions.append(question(args, item, replace(item, edit=path), damage))
        if wrong := wrong_references(items, item):
            questions.append(question(args, item, replace(item, ref=wrong[0]), "wrong_ref"))
    return questions


def ask_all(judge, args, ledger, questions):
    """Ask what the ledger does not know yet -> why asking stopped, or None."""
    asker, due = Asker(judge, args.settings), ledger.due(questions)

    def ask(q):
        told = {"key": q.key, "item": q.item.key, "control": q.control, "repeat": q.repeat, "judge": args.judge,
                "endpoint": args.settings.endpoint}  # fmt: skip
        read = (lambda said: read_answer(said, q.names)) if q.names else read_winner
        try:
            if q.control in DAMAGES and not q.media[-1][1].is_file() and not asker.stop:
                write_damaged(q.media[-1][1], q.control, q.item.source, q.item.edit)
            asker.ask(q.text, q.media, args.settings.fps, read, q.schema, lambda **event: ledger.write(**told, **event))
        except (TryAgain, ValueError, OSError):
            pass  # the ledger knows; what stops all is in asker.stop

    workers = args.settings.concurrency if judge.again else 1
    try:
        for _ in tqdm(in_threads(ask, due, workers), total=len(due), desc="judge", disable=not due):
            pass
    except KeyboardInterrupt as error:
        asker.stop = error  # what waits is not sent, and not paid
        raise
    return asker.stop


def frames_seen(path, fps):
    """About how many frames of a file a judge sees; 0 of a picture, 1 of what cannot be read."""
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        return 0
    try:
        with open_media(path) as (container, stream):
            return max(1, round(shown_frames(container, stream) / frame_rate(stream) * fps))
    except MediaError:
        return 1


def announce(questions, ledger, args):
    """Print what the questions will cost, from the files' headers alone."""
    due, s = ledger.due(questions), args.settings
    a_frame, a_picture = tokens_of(args.judge, s.resolution)
    if args.judge.startswith("openai:") and s.send == "frames":
        a_frame = a_picture
    seen_by = lambda q: [q.item.edit if q.control in DAMAGES else path for _, path in q.media]
    seen = {path: frames_seen(path, s.fps) for path in {path for q in due for path in seen_by(q)}}
    tokens_in = sum(len(q.text) // 4 + sum(a_frame * seen[p] or a_picture for p in seen_by(q)) for q in due)
    out = 120 * len(due)  # tokens; a thinking model says more
    print(f"cost        {len(due)} of {len(questions)} questions to ask, about {tokens_in:,} tokens in, {out:,} out"
          f"{dollars(args.price, tokens_in, out)}")  # fmt: skip


def dollars(price, tokens_in, tokens_out):
    return f", ${(price[0] * tokens_in + price[1] * tokens_out) / 1e6:.2f}" if price else ""


def account(ledger, questions, price):
    """What the questions cost so far, over all runs, refused and cut-off answers too: one line of text."""
    keys = {q.key for q in questions}
    answers = [line for line in ledger.lines if line["event"] == "answer" and line["key"] in keys]
    sent = sum(line["event"] == "sent" and line["key"] in keys for line in ledger.lines)
    t_in, t_out = (sum(line.get(name) or 0 for line in answers) for name in ("tokens_in", "tokens_out"))
    unread, late = (sum(map(test, answers)) for test in (lambda a: not a["ok"], lambda a: a.get("perhaps_paid", False)))
    return (f"{sent} requests sent, {len(answers)} answered or given up, {unread} of these without a score, "
            f"{sent - len(answers)} cut off, {late} timed out (perhaps paid); {t_in:,} tokens in, {t_out:,} out"
            f"{dollars(price, t_in, t_out)}")  # fmt: skip


@dataclass
class Row:
    """All that is known about an item at the end."""

    item: Item
    metrics: dict = field(default_factory=dict)  # empty where there are none
    media: Path | None = None  # where its small clips and posters are, without their endings
    error: str | None = None
    answers: list = field(default_factory=list)  # {name: score} as the judge gave them, one a repeat
    reasons: list = field(default_factory=list)
    failures: list = field(default_factory=list)  # why an answer is missing, one a repeat without a score

    @property
    def lost(self):
        """Why a result is missing, or None: averaging over the others would be averaging over failures."""
        return self.error or (self.failures or [None])[0]

    def scores(self, cap=True):
        """{criterion: mean over repeats}, with the hierarchy enforced or not; {} without answers."""
        kept = [enforce(answer)[0] if cap else answer for answer in self.answers]
        return {name: fmean(answer[name] for answer in kept) for name in (kept or [{}])[0]}

    def total(self, cap=True):
        return fmean(self.scores(cap).values()) if self.answers else None

    def spread(self):
        """Standard deviation over repeats of the mean score; None below two."""
        totals = [fmean(enforce(answer)[0].values()) for answer in self.answers]
        return stdev(totals) if len(totals) > 1 else None


METRICS_VERSION = "metrics/4"


def open_embedder(args):
    """--embedder, a CLIP: pictures -> features of length 1; None without."""
    if not args.embedder:
        return None
    from transformers import CLIPModel

    from curators.paper import clip_features

    model = CLIPModel.from_pretrained(local_path(args.embedder)).to(pick_device(args.settings.device)).eval()
    return lambda images: clip_features(model, images)


def measure_all(items, ledger, args):
    """Metrics of every item, those that the ledger knows already excepted -> rows."""
    out, embed = args.out, open_embedder(args)

    def one(item):
        if not item.edit.is_file():
            return Row(item, error=f"missing: {item.edit}")
        try:
            refs = [item.ref, *wrong_references(items, item)] if item.ref else []
            key = key_of_question(METRICS_VERSION, args.embedder, item.source, item.edit, *refs)
            media = out / "media" / key
            if key not in ledger.good or not media.with_name(f"{key}_edit.jpg").is_file():
                values = measure_files(item.source, item.edit, refs, media, embed)
                ledger.write(event="answer", ok=True, key=key, item=item.key, judge=METRICS_VERSION, metrics=values)
            return Row(item, ledger.good[key]["metrics"], media)
        except (MediaError, OSError) as error:
            return Row(item, error=f"unreadable: {error}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # items run side by side
    done = dict(tqdm(in_threads(one, items, os.cpu_count()), total=len(items), desc="metrics"))
    torch.set_num_threads(threads)
    return [done[i] for i in range(len(items))]


def collect(rows, questions, ledger):
    """Put the ledger's answers into the rows -> answers to controls, {(control, item key): scores or None}."""
    by_key, controls = {row.item.key: row for row in rows}, {}
    failures = {line["key"]: line["error"] for line in ledger.lines if line["event"] == "answer" and not line["ok"]}
    for q in questions:
        row, line = by_key[q.item.key], ledger.good.get(q.key)
        scores = {name: line["value"][name] for name in q.names} if line else None
        if q.control:
            controls[q.control, q.item.key] = scores and enforce(scores)[0]
        elif line is None:
            row.failures.append(failures.get(q.key) or "not asked")
        else:
            row.answers.append(scores)
            row.reasons.append(read_reason(line["raw"]))
    return controls


KNOWN = {  # control: what is known about its answer
    "copy": "the source handed in as the edit scores 1 on the first criterion",
    "wrong_ref": "a wrong reference scores lower on the first criterion",
    "shuffled": "shuffled frames score lower on time (where there is no such criterion: on all but the first)",
    "frozen": "the edit frozen at its first frame scores lower in all",
    "blurred": "the edit at a quarter of its resolution scores lower in all",
    "quarter": "a quarter of the edit's strength scores lower on the first criterion",
}


def judge_controls(rows, controls):
    """Known answers put to the judge -> table, and how many failed of how many."""
    judged = {row.item.key: row for row in rows if row.answers}
    table = [["known answer", "held", "of", "true edit scored lowest too", "without an answer"]]
    for kind, what in KNOWN.items():
        asked = [(judged.get(key), scores) for (control, key), scores in controls.items() if control == kind]
        known = []  # of each pair the true edit's score, the control's, and the lowest there is
        for row, scores in asked:
            if row and scores:
                names = list(scores)[:1] if kind in ("copy", "wrong_ref", "quarter") else list(scores)
                if kind == "shuffled":
                    names = [name for name in scores if "temporal" in name] or list(scores)[1:]
                true = row.scores()
                known.append((sum(true[n] for n in names), sum(scores[n] for n in names), len(names)))
        if kind == "copy":
            held = [given == lowest for _, given, lowest in known]
        else:  # what scores lowest already cannot fall: such a pair says nothing
            held = [given < whole for whole, given, lowest in known if whole > lowest]
        if asked:
            table.append([what, sum(held), len(held), len(known) - len(held), len(asked) - len(known)])
    return table, sum(row[2] - row[1] for row in table[1:]), sum(row[2] for row in table[1:])


def metric_controls(rows):
    """Known answers put to the metrics -> table, and how many failed of how many; the last row is not counted."""
    done = [row.metrics for row in rows if row.metrics]
    moving = [m for m in done if m["flicker"] is not None]
    refs = [m for m in done if m["reference_gain"] is not None]
    wrong = [(m["reference_gain"], m["control_wrong_gains"]) for m in refs if m["control_wrong_gains"]]
    tests = {
        "edit_strength is above that of the source, re-encoded":
            [m["edit_strength"] > m["control_copy_strength"] for m in done],
        "reference_gain is above that of the source, re-encoded":
            [m["reference_gain"] > m["control_copy_gain"] for m in refs],
        "reference_gain is higher for the true reference than for the next one of its task":
            [g > w[0] for g, w in wrong],
        "shuffled frames flicker more": [m["control_shuffled_flicker"] > m["flicker"] for m in moving],
        "the edit at a quarter of its resolution is less sharp": [m["control_blurred"] < 1 for m in done],
        "all pairs with up to 5 other references": [g > x for g, w in wrong for x in w],
    }  # fmt: skip
    table = [["known answer", "held", "of"], *([what, sum(held), len(held)] for what, held in tests.items() if held)]
    counted = [held for what, held in tests.items() if not what.startswith("all pairs")]
    return table, sum(len(h) - sum(h) for h in counted), sum(map(len, counted))


@dataclass
class Verdict:
    """The first line of every report. bad: the judge cannot be trusted."""

    text: str
    bad: bool = False


def verdict_of(args, failed, known, answered):
    if args.judge == "metrics":
        return Verdict(f"No judge was asked. The metrics failed {failed} of {known} known answers.")
    others = [name for name in answered if name and name.lower() not in args.judge.lower()]
    note = f" Answered by {', '.join(others)}, not by {args.judge}." if others else ""
    if not known:
        return Verdict(f"Unchecked: {args.judge} was asked no known answer that says something.{note}")
    failing = failed / known > TRUST
    word = "Do not trust these scores" if failing else "Checked"
    return Verdict(
        f"{word}: {args.judge} failed {failed} of {known} known answers ({failed / known:.0%}).{note}", failing
    )


def by_task(rows):
    """{task: its rows}, in the benchmark's order."""
    tasks = {}
    for row in rows:
        tasks.setdefault(row.item.task, []).append(row)
    return tasks


def score_means(bench, rows, allow_missing, cap=True):
    """{task: {criterion: Mean, "average": Mean}}, and overall, the mean of the tasks' means."""
    tasks, means, groups = by_task(rows), {}, []
    for task in sorted(tasks, key=lambda t: list(bench.tasks).index(t) if t in bench.tasks else 99):
        missing, judged = sum(bool(row.lost) for row in tasks[task]), [row for row in tasks[task] if row.answers]
        columns = {name: [row.scores(cap)[name] for row in judged] for name in bench.criteria(task)}
        columns["average"] = [row.total(cap) for row in judged]
        means[task] = {name: mean_of([values], missing, allow_missing) for name, values in columns.items()}
        groups.append(columns["average"])
    return means, mean_of(groups, sum(bool(row.lost) for row in rows), allow_missing)


def score_table(args, rows, trusted):
    """The paper's Table 3 (a column for each criterion) or 2 (one for each task), capped and not."""
    bench, lines = args.bench, []
    for cap in (True, False):
        means, overall = score_means(bench, rows, args.allow_missing, cap)
        wide = bench.table == "criteria"
        ours = {f"{t}: {c.replace('_', ' ')}" if wide else t.replace("_", " "): mean
                for t in means for c, mean in means[t].items() if wide or c == "average"}  # fmt: skip
        lines.append([args.name if cap else "the same, uncapped", *ours.values(), overall])
    table = [["", *ours, "overall"], *lines]
    note = published_note(args, len(rows))
    for system, known in (bench.published.get("rows") or {}).items() if trusted else ():
        cells = []
        for task in means:
            given = known.get(task, "–")
            given = given if isinstance(given, list) else [given]
            if wide:
                complete = len(given) == len(bench.criteria(task))
                given = [*given, fmean(given)] if complete else ["–"] * len(means[task])
            cells += [f"{v:.2f}" if isinstance(v, int | float) else v for v in (given if wide else given[:1])]
        whole = len(means) == len(bench.tasks) or "*" in bench.tasks
        cells.append(f"{known['overall']:.2f}" if whole and "overall" in known else "–")
        table.append([f"{system}, published ({note})", *cells])
    return table


def published_note(args, count):
    """Whether published rows were made as this run was."""
    told, name = args.bench.published, (args.prompts or {}).get("name", "ours")
    same = {"model": told.get("model") == args.judge, "prompts": told.get("prompts") == name,
            "items": told.get("items") in (None, count) and not args.limit}  # fmt: skip
    other = [what for what, is_same in same.items() if not is_same]
    return f"{told.get('judge')}; " + (f"other {', '.join(other)}: compare ranks" if other else "comparable")


def metric_table(rows, allow_missing):
    """Means of the metrics, one line a metric; undefined counts as worst where there is a worst."""
    tasks = by_task(rows)
    count = lambda of_task: f"{sum(bool(row.metrics) for row in of_task)} of {len(of_task)}"
    table = [["metric", "better", *(f"{task} ({count(of)})" for task, of in tasks.items())]]
    for name, (better, *_) in METRICS.items():
        cells = []
        for of_task in tasks.values():
            done = [row.metrics for row in of_task if row.metrics]
            values = [m[name] if m[name] is not None else WORST.get(name) for m in done]
            nothing = sum(m[name] is None for m in done)
            known = [value for value in values if value is not None]
            mean = mean_of([known], len(of_task) - len(done), allow_missing) if known else "–"
            cells.append(f"{mean}, {nothing} undefined" if known and nothing else mean)
        if any(str(cell) != "–" for cell in cells):
            table.append([name, better, *cells])
    return table


def shown(value):
    return "–" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def sections(rows, controls, args, cost, human, verdict):
    """The report's parts: [(title, text, table)], for Markdown and HTML alike."""
    parts = []
    if args.judge != "metrics":
        parts.append(("Scores", score_text(rows, args), score_table(args, rows, not verdict.bad)))
        parts.append(("Known answers, judge", f"Cost: {cost}", judge_controls(rows, controls)[0]))
    if human:
        text = ("Rank correlations and the share of pairs of items put in people's order, over items; [95 % bootstrap "
                "interval] from 10 items on.")  # fmt: skip
        parts.append(("Agreement with people", text, human_agreement(human, rows)))
    text = "No model. Means over items, with their values below 10 items and a 95 % bootstrap interval from there on."
    parts.append(("Metrics", text, metric_table(rows, args.allow_missing)))
    parts.append(("Known answers, metrics", "", metric_controls(rows)[0]))
    if lost := [[row.item.key, row.item.task, row.lost] for row in rows if row.lost]:
        means = "Means are over what there is" if args.allow_missing else "No mean is given over failures"
        parts.append(("Missing", f"{len(lost)} of {len(rows)} items lack a result. {means}.",
                      [["item", "task", "why"], *lost]))  # fmt: skip
    told = [["metric", "better", "what it is", "what it cannot see"], *([n, *about] for n, about in METRICS.items())]
    return [*parts, ("What the metrics are", "", told)]


def score_text(rows, args):
    """How the scores came about."""
    answers, s = [answer for row in rows for answer in row.answers], args.settings
    broken, missing = sum(enforce(answer)[1] for answer in answers), sum(len(row.failures) for row in rows)
    spreads = [row.spread() for row in rows if row.spread() is not None]
    return (
        f"{args.judge} at {s.fps:g} frames a second, {s.resolution} resolution, temperature {s.temperature}, "
        f"{args.repeats} answer(s) an item, rubric: {(args.prompts or {}).get('name', 'ours')}. Overall is the mean of "
        f"the tasks' means. The judge broke the hierarchy in {broken} of {len(answers)} answers; the first row caps "
        f"every score by the first, published rows were merely asked to. {missing} answers are missing."
        + (f" Standard deviation over repeats, mean over items: {fmean(spreads):.2f}." if spreads else "")
    )


def markdown_text(title, args, verdict, parts):
    text = f"# {title}\n\n**{verdict.text}**\n\n`{args.command_line}`\n"
    return text + "".join(f"\n## {name}\n\n{words}\n\n{report.table(table)}\n" for name, words, table in parts)


def csv_text(rows):
    """One line an item: scores, spread over repeats, metrics, what went wrong."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores()))
    buffer, cell = io.StringIO(), lambda value: "" if value is None else f"{value:.4f}"
    writer = csv.writer(buffer)
    writer.writerow(["item", "task", "edit", *names, "uncapped", "answers", "spread", *METRICS, "error", "instruction"])
    for row in rows:
        scores = [cell(row.scores().get(name)) for name in names]
        measured = [cell(row.metrics.get(name)) for name in METRICS]
        item, total = row.item, cell(row.total(False))
        told = [item.key, item.task, item.edit.name, *scores, total, len(row.answers), cell(row.spread()), *measured]
        writer.writerow([*told, row.lost or "", item.instruction])
    return buffer.getvalue()


def card(row, out, outcome=""):
    """An item for the page: what it shows, says and is sorted by. Paths are relative to the page."""
    to = lambda path: Path(os.path.relpath(path, out)).as_posix()
    item, clips = row.item, []
    for name, path in (("source", item.source), ("edit", item.edit)) if row.media else ():
        small = row.media.with_name(f"{row.media.name}_{name}")
        video = small.with_suffix(".mp4")
        clips.append((name, to(small.with_suffix(".jpg")), to(video) if video.is_file() else "", to(path)))
    ref = row.media and item.ref and to(row.media.with_name(f"{row.media.name}_ref.jpg"))
    known = {name: value for name, value in row.metrics.items() if name in METRICS and value is not None}
    keys = {"score": row.total(), **known} if row.answers else known
    return dict(key=item.key, task=item.task, instruction=item.instruction, clips=clips, ref=ref, keys=keys,
                scores={name.replace("_", " "): shown(value) for name, value in row.scores().items()},
                metrics={name: shown(value) for name, value in known.items()}, reasons=row.reasons,
                problems=[row.error] if row.error else [f"no score: {w}" for w in row.failures],
                outcome=outcome)  # fmt: skip


def write_page(path, title, args, verdict, parts, cards, bars, measured, sort):
    """The report: verdict, a bar a task, items with the worst first, tables, what the metrics are at the end."""
    shown = [part for part in parts if part[0] in ("Scores", "Preferences")]
    keys, tasks = dict.fromkeys(name for one in cards for name in one["keys"]), dict.fromkeys(c["task"] for c in cards)
    write_text(path, report.page("judge.html", title=title, verdict=verdict, command=args.command_line, bars=bars,
                                 first=shown, rest=[part for part in parts if part not in shown], cards=cards,
                                 tasks=list(tasks), keys=list(keys), sort=sort, measured=measured))  # fmt: skip


def bar(task, mean, low, high):
    """A bar of the page, from low to high; the text is a mean with its interval, without single values."""
    mean = replace(mean, values=())
    share = 0 if mean.value is None else max(0.0, min(1.0, (mean.value - low) / (high - low)))
    return dict(task=task.replace("_", " "), text=str(mean), share=round(100 * share, 1))


def read_human(path, items):
    """A CSV of item, perhaps rater, and columns of scores, or of `winner` -> {column: {rater: {item: score}}}."""
    human, winners = {}, {"a": 1.0, "tie": 0.5, "b": 0.0}
    for where, line in csv_lines(path, ["item"]):
        item, rater = line.pop("item"), line.pop("rater", "") or ""
        for column, value in line.items():
            if value:
                try:
                    score = winners[value.lower()] if column == "winner" else float(value)
                except (ValueError, KeyError):
                    score = math.nan
                if not math.isfinite(score):
                    raise JudgeError(f"{where}: {column} is {value!r}, not a number")
                human.setdefault(column, {}).setdefault(rater, {}).setdefault(item, []).append(score)
    human = {column: {rater: {item: fmean(scores) for item, scores in of.items()} for rater, of in raters.items()}
             for column, raters in human.items()}  # fmt: skip
    known = {item.key for item in items}
    if not any(known & of.keys() for raters in human.values() for of in raters.values()):
        raise JudgeError(
            f"{path}: none of its items is one of the benchmark's, which are {', '.join(sorted(known)[:5])}, ..."
        )
    return human


def human_agreement(human, rows):
    """What `read_human` read -> table of agreement with what we computed, per task, and of raters among themselves."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores()))
    ours = {"mean score": {row.item.key: row.total() for row in rows}}
    ours |= {name: {row.item.key: row.scores().get(name) for row in rows} for name in names}
    ours |= {name: {row.item.key: row.metrics.get(name) for row in rows} for name in METRICS}
    tasks = {"all": {row.item.key for row in rows}}
    tasks |= (
        {task: {row.item.key for row in of} for task, of in by_task(rows).items()} if len(by_task(rows)) > 1 else {}
    )
    table = [["people's", "ours", "task", "items", "Spearman", "Kendall", "pairwise accuracy"]]
    for column, raters in human.items():
        people = {}
        for of in raters.values():
            for item, score in of.items():
                people.setdefault(item, []).append(score)
        for name, of_us in ours.items():
            for task, keys in tasks.items():
                both = sorted(key for key in keys & people.keys() if of_us.get(key) is not None)
                if both and (task == "all" or name == "mean score"):
                    a, b = [fmean(people[key]) for key in both], [of_us[key] for key in both]
                    found = [with_interval(f, a, b) for f in (spearman, kendall, pairwise)]
                    table.append([column, name, task, len(both), *found])
        pairs = [(x, y) for i, x in enumerate(raters.values()) for y in list(raters.values())[i + 1 :]]
        among = [
            pairwise([x[k] for k in x if k in y], [y[k] for k in x if k in y]) for x, y in pairs if x.keys() & y.keys()
        ]
        if among := [share for share in among if share is not None]:
            table.append([column, "raters among themselves", "all", "", "", "", f"{fmean(among):.2f}"])
    return table


def edits_exist(*folders):
    """JudgeError where a folder of edits is not there: a report on it would take the place of a good one."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise JudgeError(f"{folder}: no such folder of edits")


def prepare(args):
    """Read what the arguments name, before anything is paid: benchmark, settings, prompts."""
    args.bench, args.settings = open_bench(args.bench), make_settings(args)
    prompts = getattr(args, "prompts", None)
    args.prompts = read_yaml(prompts) if prompts else None
    if prompts and not (isinstance(args.prompts, dict) and all(isinstance(v, str) for v in args.prompts.values())):
        raise JudgeError(f"{prompts}: expected a mapping from tasks to templates")


def finish(verdict, page, lost, count, args, stopped=None):
    """Print where the report is; exit 3 for a judge that cannot be trusted, 1 where results are missing."""
    print(f"\n{page}\nverdict     {verdict.text}")
    if stopped:
        raise stopped
    if verdict.bad:
        sys.exit(3)
    if lost and not args.allow_missing:
        raise JudgeError(f"{lost} of {count} items lack a result, see {page}; mend them and run again, or average over "
                         "the rest with --allow-missing")  # fmt: skip


def score(args):
    """`judge.py score`: metrics, then the judge, then the report. JudgeError at the end where items have no result."""
    edits_exist(args.edits)
    prepare(args)
    items = read_bench(args.bench, args.path, args.edits, args.limit)
    human = read_human(args.human, items) if args.human else None
    controls, cost, stopped, answered = {}, "", None, Counter()
    with closing(Ledger(args.out / "answers.jsonl")) as ledger:
        judge = make_judge(args)
        if judge and args.dry_run:
            return announce(questions_of([item for item in items if item.edit.is_file()], args), ledger, args)
        rows = measure_all(items, ledger, args)
        print(f"metrics     {sum(bool(row.metrics) for row in rows)} of {len(rows)} items")
        if judge:
            questions = questions_of([row.item for row in rows if row.error is None], args)
            announce(questions, ledger, args)
            stopped = ask_all(judge, args, ledger, questions)
            controls, cost = collect(rows, questions, ledger), account(ledger, questions, args.price)
            answered = Counter(ledger.good[q.key].get("model") for q in questions if q.key in ledger.good)
            print(f"paid        {cost}")
    verdict = verdict_of(args, *(judge_controls(rows, controls) if judge else metric_controls(rows))[1:], answered)
    parts = sections(rows, controls, args, cost, human, verdict)
    title, page = f"{args.bench.title or args.bench.name}: {args.name}", args.out / f"{args.bench.name}.html"
    write_text(page.with_suffix(".md"), markdown_text(title, args, verdict, parts))
    write_text(page.with_suffix(".csv"), csv_text(rows))
    means, overall = score_means(args.bench, rows, args.allow_missing)
    told = {"bench": args.bench.name, "name": args.name, "judge": args.judge, "answered": answered, "items": len(rows),
            "asked": asked_how(args),
            "prompts": key_of_question(*(args.bench.rubric(item, args.prompts) for item in items)),
            "overall": str(overall), "uncapped": str(score_means(args.bench, rows, args.allow_missing, False)[1]),
            "tasks": {task: str(mean["average"]) for task, mean in means.items()},
            "verdict": verdict.text, "trusted": not verdict.bad}  # fmt: skip
    write_text(args.out / "summary.json", json.dumps(told, indent=1))
    strength = {task: [row.metrics["edit_strength"] for row in of if row.metrics] for task, of in by_task(rows).items()}
    bars = [bar(task, mean["average"], 1, 5) for task, mean in means.items()]
    if not judge:
        bars = [bar(task, mean_of([values]), 0, 80) for task, values in strength.items()]
    sort = "score" if judge else "reference_gain" if any(item.ref for item in items) else "edit_strength"
    write_page(
        page,
        title,
        args,
        verdict,
        parts,
        [card(row, args.out) for row in rows],
        bars,
        "mean score" if judge else "edit strength",
        sort,
    )
    for name, _, table in parts[:-1]:
        print(f"\n{name}\n{report.table(table)}")
    finish(verdict, page, sum(bool(row.lost) for row in rows), len(rows), args, stopped)


def same_run(args, items):
    """Refuse to mix runs in one folder of edits: run.json in it says what made them."""
    path, weights = args.edits / "run.json", Path(args.weights)
    config, files = read_weights(args.weights, args.base, args.qwen)
    asked = {name: getattr(args, name) for name in ("base", "qwen", "seed", "ref", "frames", "max_pixels")}
    asked |= {name: getattr(args, name) or getattr(config, name) for name in ("steps", "ref_guidance")}
    asked |= {
        "ref_pad_first": args.ref_pad_first or None,
        "weights": str(weights.resolve() if weights.exists() else weights),
    }
    asked["files"] = fingerprint(sorted({file for file, _ in files.places.values()}))
    if path.is_file():
        made = read_json(path)
        if other := [
            f"{name} {made.get(name)}, not {value}" for name, value in asked.items() if made.get(name) != value
        ]:
            raise JudgeError(f"{path}: edits are there of {'; '.join(other)}; give another --edits, or delete them")
        return
    if there := next((item.edit for item in items if item.edit.is_file()), None):
        raise JudgeError(f"{there}: edits without {path}; use an empty --edits")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asked, indent=1))


def fingerprint(files):
    """Cheap checkpoint fingerprint: the files' names, sizes, first and last megabytes."""
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
    if not mine:
        return
    dtype, failed = torch.float32 if device.type == "cpu" else torch.bfloat16, 0
    model = KiwiEdit.from_pretrained(args.weights, device, dtype, args.base, args.qwen, args.ref_pad_first)
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
    prepare(args)
    sides = [read_bench(args.bench, args.path, folder, args.limit) for folder in (args.a, args.b)]
    human = read_human(args.human, sides[0]) if args.human else None
    parts, verdict, votes = [], Verdict("No judge was asked."), {}
    with closing(Ledger(args.out / "answers.jsonl")) as ledger:
        judge = make_judge(args)
        if judge and args.dry_run:
            there = [(a, b) for a, b in zip(*sides) if a.edit.is_file() and b.edit.is_file()]
            return announce([q for a, b in there for q in both_orders(args, a, b)], ledger, args)
        pairs = list(zip(*(measure_all(items, ledger, args) for items in sides)))
        lost = {a.item.key: a.error or b.error for a, b in pairs if a.error or b.error}
        if judge:
            questions = [q for a, b in pairs if a.item.key not in lost for q in both_orders(args, a.item, b.item)]
            announce(questions, ledger, args)
            stopped = ask_all(judge, args, ledger, questions)
            if stopped:
                raise stopped
            lost |= {q.item.key: "no answer of the judge in both orders" for q in questions if q.key not in ledger.good}
            votes = votes_of(questions, ledger, lost)
            verdict = position_verdict(args, votes)
            parts.append(preferences(votes, {a.item.key: a.item.task for a, _ in pairs}, len(lost), args.allow_missing))
            print(f"paid        {account(ledger, questions, args.price)}")
            if human:
                parts.append(people_and_votes(human, votes))
    whole = [(a, b) for a, b in pairs if a.item.key not in lost]
    parts.append(paired_metrics(whole, len(lost), args.allow_missing))
    if lost:
        parts.append(("Missing", "", [["item", "why"], *lost.items()]))
    title, page = (
        f"{args.bench.title or args.bench.name}: A = {args.a}, B = {args.b}",
        args.out / f"{args.bench.name}_compare.html",
    )
    text = markdown_text(title, args, verdict, parts)
    write_text(page.with_suffix(".md"), text)
    cards = []
    for a, b in pairs:
        one, other = card(a, args.out, outcome=OUTCOMES.get(votes.get(a.item.key), "")), card(b, args.out)
        one["clips"] = [(name.replace("edit", "A"), *rest) for name, *rest in one["clips"]]
        one["clips"] += [("B", *rest) for name, *rest in other["clips"] if name == "edit"]
        one["keys"] = {n: v - other["keys"][n] for n, v in one["keys"].items() if n in other["keys"]}
        one["metrics"] = {f"{n}, A - B": shown(v) for n, v in one["keys"].items()}
        cards.append(one | {"problems": one["problems"] + other["problems"], "scores": {}})
    shares = share_of_a(votes, {a.item.key: a.item.task for a, _ in pairs})
    bars = [bar(task, Mean(fmean(share)), 0, 1) for task, share in shares.items()]
    write_page(page, title, args, verdict, parts, cards, bars, "share that prefers A", "edit_strength")
    print(f"{text}")
    finish(verdict, page, len(lost), len(pairs), args)


def paired_metrics(pairs, lost, allow_missing):
    """Pairs of rows -> a section of the report with the differences of every metric."""
    table = [["metric", "better", "A - B, mean of the pairs", "A higher", "B higher", "sign test p"]]
    for name, (better, *_) in METRICS.items():
        filled = [
            [m[name] if m[name] is not None else WORST.get(name) for m in (a.metrics, b.metrics)] for a, b in pairs
        ]
        gaps = [x - y for x, y in filled if x is not None and y is not None]
        if gaps:
            up, down = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
            table.append([name, better, mean_of([gaps], lost, allow_missing), up, down, f"{sign_test(up, down):.3f}"])
    return "Metrics", f"Paired differences over {len(pairs)} pairs, {lost} missing.", table


def both_orders(args, a, b):
    """The same pair asked twice, with A first and with B first."""
    what = "the reference image and the original" if a.ref else "the original"
    text = PAIR.replace("{kind}", args.bench.kind).replace("{what}", what).replace("{instruction}", a.instruction)
    properties = {"reasoning": {"type": "string"}, "winner": {"type": "string", "enum": ["1", "2", "tie"]}}
    given = [("Reference image", a.ref)] if a.ref else []
    for order, (first, second) in (("AB", (a, b)), ("BA", (b, a))):
        media = [*given, ("Original", a.source), ("Edit 1", first.edit), ("Edit 2", second.edit)]
        key = key_of_question(asked_how(args), text, order, *(path for _, path in media))
        yield Question(a, order, 0, text, media, [], key, {"type": "object", "properties": properties})


def votes_of(questions, ledger, lost):
    """{item: "A", "B" (both orders agree), "first", "second" (the answer followed the position) or "tie"}."""
    said = {}
    for q in questions:
        if q.item.key not in lost:
            said.setdefault(q.item.key, []).append(ledger.good[q.key]["value"]["winner"])
    names = {("1", "2"): "A", ("2", "1"): "B", ("1", "1"): "first", ("2", "2"): "second"}
    return {item: names.get(tuple(winners), "tie") for item, winners in said.items()}


OUTCOMES = {"A": "A preferred", "B": "B preferred", "tie": "undecided", "first": "followed the position",
            "second": "followed the position"}  # fmt: skip


def position_verdict(args, votes):
    swayed = sum(vote in ("first", "second") for vote in votes.values())
    if not votes:
        return Verdict("No pair was judged.")
    bad = swayed / len(votes) > TRUST
    word = "Do not trust these preferences" if bad else "Checked"
    return Verdict(f"{word}: {args.judge} followed the position, not the edit, in {swayed} of {len(votes)} pairs.", bad)


def share_of_a(votes, task_of):
    """{task: [1 for A, 0 for B, 0.5 for undecided, ...]}, all together first."""
    points = {"A": 1.0, "B": 0.0}
    shares = {"all": [points.get(vote, 0.5) for vote in votes.values()]} if votes else {}
    for item, vote in votes.items():
        shares.setdefault(task_of[item], []).append(points.get(vote, 0.5))
    return shares if len(shares) != 2 else {"all": shares["all"]}


def preferences(votes, task_of, lost, allow_missing):
    """A section of the report: a win counts where both orders name the same system."""
    swayed = {"all": sum(v in ("first", "second") for v in votes.values())}
    for item, vote in votes.items():
        swayed[task_of[item]] = swayed.get(task_of[item], 0) + (vote in ("first", "second"))
    table = [["task", "A wins", "B wins", "undecided", "of these: followed the position", "pairs",
              "share of A [Wilson 95 %]", "sign test p"]]  # fmt: skip
    for task, share in share_of_a(votes, task_of).items():
        a, b = share.count(1), share.count(0)
        low, high = wilson(fmean(share), len(share))
        cell = f"{fmean(share):.3f} [{low:.3f}, {high:.3f}]" if allow_missing or not lost else f"– ({lost} missing)"
        table.append([task, a, b, len(share) - a - b, swayed[task], len(share), cell, f"{sign_test(a, b):.3f}"])
    return "Preferences", "Each pair was shown in both orders; a win needs both.", table


def people_and_votes(human, votes):
    """How often the judge prefers what people prefer."""
    table = [["people's", "items that both decide", "the judge agrees [Wilson 95 %]"]]
    for column, raters in human.items():
        people = {}
        for of in raters.values():
            for item, score in of.items():
                people.setdefault(item, []).append(score)
        both = [
            (fmean(people[k]), v) for k, v in votes.items() if k in people and v in "AB" and fmean(people[k]) != 0.5
        ]
        if both:
            share = fmean((p > 0.5) == (v == "A") for p, v in both)
            table.append(
                [column, len(both), f"{share:.2f} [{', '.join(f'{x:.2f}' for x in wilson(share, len(both)))}]"]
            )
    return "Agreement with people", "", table


def people(args):
    """`judge.py people`: a page that shows pairs blind, in random order and on random sides, and saves people.csv."""
    edits_exist(args.a, args.b)
    bench = open_bench(args.bench)
    sides = [read_bench(bench, args.path, folder, args.limit) for folder in (args.a, args.b)]
    to = lambda path: Path(os.path.relpath(path, args.out)).as_posix()
    both = [(a, b) for a, b in zip(*sides) if a.edit.is_file() and b.edit.is_file()]
    pairs = [dict(item=a.key, instruction=a.instruction, source=to(a.source), a=to(a.edit), b=to(b.edit),
                  ref=a.ref and to(a.ref)) for a, b in both]  # fmt: skip
    if not pairs:
        raise JudgeError(f"{args.a}, {args.b}: no item has both edits")
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "people.html"
    write_text(
        page, report.page("people.html", title=f"{bench.title or bench.name}: which edit is better?", pairs=pairs)
    )
    print(f"{page}: {len(pairs)} pairs; open it, and give the people.csv that it saves to compare --human")


def leaderboard(args):
    """`judge.py leaderboard`: one table over several runs. Those asked in other ways are marked."""
    told = [read_json(path / "summary.json") for path in args.runs]
    tasks = list(dict.fromkeys(task for run in told for task in run["tasks"]))
    table = [["", "judge", "items", *tasks, "overall", "uncapped", "verdict"]]
    same = ("bench", "judge", "asked", "prompts", "items")
    for run in told:
        other = [name for name in same if run.get(name) != told[0].get(name)]
        note = "" if run["trusted"] else "not trusted"
        note = "; ".join(filter(None, [note, f"other {', '.join(other)} than the first" if other else ""]))
        table.append([run["name"], run["judge"], run["items"], *(run["tasks"].get(task, "–") for task in tasks),
                      run["overall"], run["uncapped"], note])  # fmt: skip
    print(report.table(table))


def main(argv=None):
    args = parse_arguments(argv)
    try:
        {"score": score, "compare": compare, "run": run, "people": people, "leaderboard": leaderboard}[args.command](
            args
        )
    except KeyboardInterrupt:
        print("judge.py: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        os._exit(1)  # threads that wait for a server would hold up a regular end; the ledger is on disk
    except (ValueError, OSError) as error:
        sys.exit(f"judge.py: {' '.join(str(error).split())}")
    except RuntimeError as error:  # torch.OutOfMemoryError, or CUDA's own where not even its context fits
        if not is_out_of_memory(error):
            raise
        sys.exit("judge.py: out of GPU memory; take --device cpu, or a larger card")


if __name__ == "__main__":
    main()
