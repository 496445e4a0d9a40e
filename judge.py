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
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock

from command import number, one_line

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
    bench, report, judged, sides = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    add = bench.add_argument
    add("path", help="the items: the benchmark's YAML, CSV or JSON, or the --bench file if it holds them")
    add("--bench", required=True, metavar="NAME|FILE", help="refvie, openve, imgedit, sparkle, or a YAML like them")
    add("--limit", type=number(1), metavar="N", help="only the first N items")
    add = report.add_argument
    add("--out", type=Path, default="out/judge", metavar="DIR", help="for the report (default %(default)s)")
    add = judged.add_argument
    add("--judge", default="metrics", help="see below (default %(default)s)")
    add("--mode", choices=MODES, default="official", help="1 frame a second, or 4 at high resolution")
    add("--endpoint", default="", metavar="URL", help="the judge's server, for openai: and other places than Google's")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars a million tokens, for the cost")
    add("--dry-run", action="store_true", help="stop after the cost estimate")
    add("--allow-missing", action="store_true", help="average over what succeeded")
    add("--human", type=Path, metavar="CSV", help="item, rater, and people's scores, or what `people` saved")
    add("--embedder", metavar="PATH|HUB_ID", help="a CLIP for crop_similarity, e.g. openai/clip-vit-large-patch14")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="how to ask (docs/judging.md)")
    sides.add_argument("a", metavar="A", help="the edits of one system")
    sides.add_argument("b", metavar="B", help="the edits of the other")

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="Judge edited videos.", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, *parents):
        more = {"help": text, "description": text, "epilog": EXAMPLES, "formatter_class": raw}
        return commands.add_parser(name, parents=parents, **more).add_argument

    add = command("score", "score finished edits and write a report", bench, judged, report)
    add("--edits", type=Path, required=True, metavar="DIR", help="the edited videos, under the release's names")
    add("--prompts", type=Path, metavar="FILE", help="YAML, task: template with {instruction}; instead of our rubric")
    add("--repeats", type=number(1), default=1, help="answers an item (default %(default)s)")
    add("--controls", type=number(0), default=4, metavar="N", help="items with known answers (default %(default)s)")
    add("--name", help="the system's name in the tables (default: the folder of the edits)")

    command("compare", "compare two systems, order swapped", bench, sides, judged, report)
    command("people", "a page on which people compare two systems blind", bench, sides, report)
    add = command("leaderboard", "one table over several runs")
    add("runs", nargs="+", type=Path, metavar="RUN", help="--out of a `score`")

    add = command("run", "make the edits with Kiwi-Edit, under torchrun on several GPUs", bench)
    add("--edits", type=Path, required=True, metavar="DIR", help="where they go, under the release's names")
    nano = str(Path(__file__).parent / "weights" / "nano")
    add("--weights", default=nano, metavar="PATH|HUB_ID", help="as for sample.py (default: weights/nano)")
    add("--base", metavar="PATH|HUB_ID", help="under a .safetensors or a run of train.py, as for sample.py")
    add("--qwen", metavar="PATH|HUB_ID", help="likewise")
    add("--ref-pad-first", action="store_true", help="as for sample.py")
    add("--ref", action=argparse.BooleanOptionalAction, default=True, help="give the reference image to the model")
    add("--steps", type=number(1), help="denoising steps (default: 50; nano 2)")
    add("--ref-guidance", type=number(1e-9, kind=float), metavar="G", help="of references (default: 1; nano 1.2)")
    add("--seed", type=int, default=0, help="of every edit, as in the release (default %(default)s)")
    add("--frames", type=number(1), help="at most so many (default: 81; nano 9)")
    add("--max-pixels", type=number(1), help="larger frames are shrunk (default: 921600; nano 4096)")
    add("--tile", type=number(1), metavar="N", help="VAE tiles, for small cards")
    add("--device", help="default: this process's GPU, or the CPU")

    args = parser.parse_args(argv)
    # a password or key in --endpoint stays out of the report
    words = [re.sub(r"://.*[@?].*", "://***", word) for word in (sys.argv[1:] if argv is None else argv)]
    args.command_line = shlex.join(["python", "judge.py", *words])
    return args


if __name__ == "__main__":
    parse_arguments()  # parse before importing torch

import torch
from tqdm import tqdm

import report
import vlm
from benchmarks import Item, enforce, open_bench, read_answer, read_bench, read_reason, read_winner, wrong_references
from cache import weights_print
from data import csv_lines
from ledger import appended
from load import local_path, read_json
from media import MediaError, read_image, whole_file, write_text
from metrics import DAMAGES, METRICS, WORST, measure_files, write_damaged, write_edit
from model import KiwiEdit, read_for, read_weights
from parallel import pick_device, rank_and_world
from stages import with_settings
from stats import Mean, kendall, mean_of, pairwise, sign_test, spearman, wilson, with_interval

PAIR = """You compare two edits of one {kind}. You see {what}, then edit 1 and edit 2. Say which one a careful viewer
would prefer: first by how well it does what was asked, then by what it kept, then by how clean, sharp and stable it is.
Answer with JSON alone: {"reasoning": "...", "winner": "1"}, "2" in place of "1", or "tie".

The instruction of the edit was: {instruction}"""


class Answers:
    """answers.jsonl: every question sent and every answer, written through at once: they were paid for."""

    def __init__(self, lines, add):
        self.lines, self.add, self.lock = [line for line in lines if {"event", "key"} <= line.keys()], add, Lock()
        self.good = {line["key"]: line for line in self.lines if line.get("ok")}

    def write(self, **line):
        with self.lock:
            self.add(line)  # ASCII: an answer may hold what ends a line or is no text
            self.lines.append(line)
            if line.get("ok"):
                self.good[line["key"]] = line

    def due(self, questions):
        """Those without a good answer yet, each once."""
        return list({q.key: q for q in questions if q.key not in self.good}.values())


@contextmanager
def open_answers(out):
    """The answers of earlier runs too. What a crash cut short is dropped, never guessed at."""
    with appended(out / "answers.jsonl", sync=True) as (lines, add):
        yield Answers(lines, add)


@cache
def file_hash(path):
    """sha256 of a file's content, in hex; read once a run."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key_of_question(*parts):
    """What makes a question the same question: who is asked and how, words, and the content of files (paths)."""
    texts = [file_hash(part) if isinstance(part, Path) else str(part) for part in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def make_judge(args):
    """The judge of --judge; None for `metrics`, and where nothing is asked."""
    kind, _, rest = args.judge.partition(":")
    if args.judge == "metrics" or args.dry_run:
        return None
    if vlm.has_secret(args.settings.endpoint):
        raise ValueError("--endpoint: no user, password or query in the address; put the key into the environment")
    if args.judge.startswith("gemini-"):
        return vlm.Gemini(args.judge, args.settings)
    if rest and kind == "openai":
        return vlm.OpenAICompatible(rest, args.settings)
    if rest and kind == "local":
        return vlm.Local(local_path(rest), args.settings)
    raise ValueError(f"--judge {args.judge}: expected metrics, gemini-..., openai:MODEL or local:PATH")


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


def question(args, item, control="", repeat=0, **changed):
    """A question about an item, with what is `changed` for a control whose answer is known."""
    bench, shown = args.bench, replace(item, **changed)
    names, text = bench.criteria(item.task), bench.rubric(item)
    scores = {name: {"type": "integer", "minimum": 1, "maximum": 5} for name in names}
    schema = None if bench.prompts else {"type": "object", "properties": {"reasoning": {"type": "string"}, **scores}}
    files = [item.edit, "damaged"] if control in DAMAGES else [shown.edit]  # the damaged file is not there yet
    key = key_of_question(asked_how(args), text, control, repeat, item.source, *files, shown.ref or "")
    media = [("Reference image", shown.ref)] if item.ref else []
    media += [(f"Original {bench.kind}", item.source), (f"Edited {bench.kind}", shown.edit)]
    return Question(item, control, repeat, text, media, names, key, schema)


def questions_of(items, args):
    """Everything to ask about the items that can be judged: the items, repeated, and controls on a few of them."""
    questions = [question(args, item, repeat=repeat) for item in items for repeat in range(args.repeats)]
    still = args.bench.kind == "picture"
    for item in items[:: max(1, len(items) // max(1, args.controls))][: args.controls]:
        questions.append(question(args, item, "copy", edit=item.source))
        for damage in ("blurred", "quarter") if still else DAMAGES:
            path = args.out / "controls" / f"{file_hash(item.edit)[:16]}_{damage}.{'png' if still else 'mp4'}"
            questions.append(question(args, item, damage, edit=path))
        if wrong := wrong_references(items, item):
            questions.append(question(args, item, "wrong_ref", ref=wrong[0]))
    return questions


def ask_all(judge, args, answers, questions):
    """Ask what has no good answer yet -> why asking stopped, or None."""
    announce(questions, answers, args)
    asker, due = vlm.Asker(judge, args.settings), answers.due(questions)

    def ask(q):
        told = {"key": q.key, "item": q.item.key, "control": q.control, "repeat": q.repeat, "judge": args.judge,
                "endpoint": args.settings.endpoint}  # fmt: skip
        read = (lambda said: read_answer(said, q.names)) if q.names else read_winner
        try:
            if q.control in DAMAGES and not q.media[-1][1].is_file() and not asker.stop:
                write_damaged(q.media[-1][1], q.control, q.item.source, q.item.edit)
            asker.ask(
                q.text, q.media, args.settings.fps, read, q.schema, lambda **event: answers.write(**told, **event)
            )
        except (vlm.TryAgain, ValueError, OSError):
            pass  # the ledger knows; what stops all is in asker.stop

    workers = args.settings.concurrency if judge.again else 1
    try:
        for _ in tqdm(vlm.in_threads(ask, due, workers), total=len(due), desc="judge", disable=not due):
            pass
    except KeyboardInterrupt as error:
        asker.stop = error  # what waits is not sent, and not paid
        raise
    print(f"paid        {account(answers, questions, args.price)}")
    return asker.stop


def announce(questions, answers, args):
    """Print what the questions will cost, from the files' headers alone."""
    due, s = answers.due(questions), args.settings
    a_frame, a_picture = vlm.tokens_of(args.judge, s.resolution)
    if args.judge.startswith("openai:") and s.send == "frames":
        a_frame = a_picture
    seen_by = lambda q: [q.item.edit if q.control in DAMAGES else path for _, path in q.media]
    seen = {path: vlm.frames_seen(path, s.fps) for path in {path for q in due for path in seen_by(q)}}
    tokens_in = sum(len(q.text) // 4 + sum(a_frame * seen[p] or a_picture for p in seen_by(q)) for q in due)
    out = 120 * len(due)  # tokens; a thinking model says more
    print(f"cost        {len(due)} of {len(questions)} questions to ask, about {tokens_in:,} tokens in, {out:,} out"
          f"{dollars(args.price, tokens_in, out)}")  # fmt: skip


def dollars(price, tokens_in, tokens_out):
    return f", ${(price[0] * tokens_in + price[1] * tokens_out) / 1e6:.2f}" if price else ""


def account(answers, questions, price):
    """What the questions cost so far, over all runs, refused and cut-off answers too: one line of text."""
    keys = {q.key for q in questions}
    lines = [line for line in answers.lines if line["key"] in keys]
    ends = [line for line in lines if line["event"] == "answer"]
    sent, unread = len(lines) - len(ends), sum(not line["ok"] for line in ends)
    late = sum(line.get("perhaps_paid", False) for line in ends)
    t_in, t_out = (sum(line.get(name) or 0 for line in ends) for name in ("tokens_in", "tokens_out"))
    return (f"{sent} requests sent, {len(ends)} answered or given up, {unread} of these without a score, "
            f"{sent - len(ends)} cut off, {late} timed out (perhaps paid); {t_in:,} tokens in, {t_out:,} out"
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

    def numbers(self):
        """Everything that is known of it in numbers: {"score": their mean, criterion: ..., metric: ...}."""
        known = {"score": self.total(), **self.scores(), **{name: self.metrics.get(name) for name in METRICS}}
        return {name: value for name, value in known.items() if value is not None}


METRICS_VERSION = "metrics/4"


def open_embedder(args):
    """--embedder, a CLIP: pictures -> features of length 1; None without."""
    if not args.embedder:
        return None
    from transformers import CLIPModel

    from curators.paper import clip_features

    model = CLIPModel.from_pretrained(local_path(args.embedder)).to(pick_device(args.settings.device)).eval()
    return lambda images: clip_features(model, images)


def measure_all(items, answers, args):
    """Metrics of every item, those known already excepted -> rows."""
    embed = open_embedder(args)

    def one(item):
        if not item.edit.is_file():
            return Row(item, error=f"missing: {item.edit}")
        try:
            refs = [item.ref, *wrong_references(items, item)] if item.ref else []
            key = key_of_question(METRICS_VERSION, args.embedder, item.source, item.edit, *refs)
            media = args.out / "media" / key
            if key not in answers.good or not media.with_name(f"{key}_edit.jpg").is_file():
                values = measure_files(item.source, item.edit, refs, media, embed)
                answers.write(event="answer", ok=True, key=key, item=item.key, judge=METRICS_VERSION, metrics=values)
            return Row(item, answers.good[key]["metrics"], media)
        except (MediaError, OSError) as error:
            return Row(item, error=f"unreadable: {error}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # items run side by side
    rows = list(tqdm(vlm.in_threads(one, items, os.cpu_count()), total=len(items), desc="metrics"))
    torch.set_num_threads(threads)
    print(f"metrics     {sum(bool(row.metrics) for row in rows)} of {len(rows)} items")
    return rows


def collect(rows, questions, answers):
    """Put the answers into the rows -> those to controls, {(control, item key): scores or None}."""
    by_key, controls = {row.item.key: row for row in rows}, {}
    failures = {line["key"]: line["error"] for line in answers.lines if "error" in line}
    for q in questions:
        row, line = by_key[q.item.key], answers.good.get(q.key)
        if q.control:
            controls[q.control, q.item.key] = line and enforce(line["value"])[0]
        elif line:
            row.answers.append(line["value"])
            row.reasons.append(read_reason(line["text"]))
        else:
            row.failures.append(failures.get(q.key, "not asked"))
    return controls


FIRST, ALL = (lambda names: names[:1]), (lambda names: names)
TIME = lambda names: [name for name in names if "temporal" in name] or names[1:]
KNOWN = {  # control: the criteria that it lowers, and what is known about its answer
    "copy": (FIRST, "the source handed in as the edit scores 1 on the first criterion"),
    "wrong_ref": (FIRST, "a wrong reference scores lower on the first criterion"),
    "shuffled": (TIME, "shuffled frames score lower on time (where there is no such criterion: on all but the first)"),
    "frozen": (ALL, "the edit frozen at its first frame scores lower in all"),
    "blurred": (ALL, "the edit at a quarter of its resolution scores lower in all"),
    "quarter": (FIRST, "a quarter of the edit's strength scores lower on the first criterion"),
}


def judge_controls(rows, controls):
    """Known answers put to the judge -> table, and how many failed of how many."""
    true = {row.item.key: row.scores() for row in rows if row.answers}
    table = [["known answer", "held", "of", "true edit scored lowest too", "without an answer"]]
    for kind, (lowered, what) in KNOWN.items():
        asked = [(true.get(key), scores) for (control, key), scores in controls.items() if control == kind]
        known = []  # of each pair the true edit's score, the control's, and the lowest there is
        for whole, scores in asked:
            if whole and scores:
                names = lowered(list(scores))
                known.append((sum(whole[n] for n in names), sum(scores[n] for n in names), len(names)))
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
    refs = [m for m in done if m["reference_gain"] is not None]
    wrong = [(m["reference_gain"], m["control_wrong_gains"]) for m in refs if m["control_wrong_gains"]]
    tests = {
        "edit_strength is above that of the source, re-encoded":
            [m["edit_strength"] > m["control_copy_strength"] for m in done],
        "reference_gain is above that of the source, re-encoded":
            [m["reference_gain"] > m["control_copy_gain"] for m in refs],
        "reference_gain is higher for the true reference than for the next one of its task":
            [g > w[0] for g, w in wrong],
        "shuffled frames flicker more":
            [m["control_shuffled_flicker"] > m["flicker"] for m in done if m["flicker"] is not None],
        "the edit at a quarter of its resolution is less sharp": [m["control_blurred"] < 1 for m in done],
    }  # fmt: skip
    pairs = [g > x for g, w in wrong for x in w]
    lines = [[what, sum(held), len(held)] for what, held in tests.items() if held]
    table = [["known answer", "held", "of"], *lines]
    table += [["all pairs with up to 5 other references", sum(pairs), len(pairs)]] if pairs else []
    return table, sum(of - held for _, held, of in lines), sum(of for *_, of in lines)


@dataclass
class Verdict:
    """The first line of every report. bad: the judge cannot be trusted."""

    text: str
    bad: bool = False


def verdict_of(judge, failed, asked, what, note=""):
    if not asked:
        return Verdict(f"Unchecked: {judge} was asked nothing whose answer is known.{note}")
    bad = failed / asked > TRUST
    told = f"{judge} {what.format(failed, asked)} ({failed / asked:.0%}).{note}"
    return Verdict(f"{'Do not trust this judge' if bad else 'Checked'}: {told}", bad)


def by_task(rows):
    """{task: its rows}, in the items' order."""
    tasks = defaultdict(list)
    for row in rows:
        tasks[row.item.task].append(row)
    return tasks


def grouped(rows):
    """{"all": rows}, and those of each task if there are several."""
    tasks = by_task(rows)
    return {"all": rows, **(tasks if len(tasks) > 1 else {})}


def score_means(args, rows, cap=True):
    """{task: {criterion: Mean, "average": Mean}}, and overall, the mean of the tasks' means."""
    tasks, means, groups = by_task(rows), {}, []
    for task in [task for task in dict.fromkeys((*args.bench.tasks, *tasks)) if task in tasks]:
        missing, judged = sum(bool(row.lost) for row in tasks[task]), [row for row in tasks[task] if row.answers]
        columns = {name: [row.scores(cap)[name] for row in judged] for name in args.bench.criteria(task)}
        columns["average"] = [row.total(cap) for row in judged]
        means[task] = {name: mean_of([values], missing, args.allow_missing) for name, values in columns.items()}
        groups.append(columns["average"])
    return means, mean_of(groups, sum(bool(row.lost) for row in rows), args.allow_missing)


def score_table(args, rows, trusted):
    """The paper's Table 3 (a column for each criterion) or 2 (one for each task), capped and not."""
    bench, lines, wide = args.bench, [], args.bench.table == "criteria"
    for cap in (True, False):
        means, overall = score_means(args, rows, cap)
        ours = {f"{task}: {name}" if wide else task: mean
                for task, of in means.items() for name, mean in of.items() if wide or name == "average"}  # fmt: skip
        lines.append([args.name if cap else "the same, uncapped", *ours.values(), overall])
    table, note = [["", *(name.replace("_", " ") for name in ours), "overall"], *lines], published_note(args, len(rows))
    for system, known in (bench.published.get("rows") or {}).items() if trusted else ():
        cells = []
        for task, of in means.items():
            given, count = known.get(task, []), len(of) if wide else 1
            given = [*given, fmean(given)] if wide and given else [given] if given else []
            cells += [f"{value:.2f}" for value in given] if len(given) == count else ["–"] * count
        whole = len(means) == len(bench.tasks) or "*" in bench.tasks
        cells.append(f"{known['overall']:.2f}" if whole and "overall" in known else "–")
        table.append([f"{system}, published ({note})", *cells])
    return table


def published_note(args, count):
    """Whether published rows were made as this run was."""
    told = args.bench.published
    same = {"model": told.get("model") == args.judge, "prompts": told.get("prompts") == args.bench.wording,
            "items": told.get("items") in (None, count) and not args.limit}  # fmt: skip
    other = [what for what, is_same in same.items() if not is_same]
    return f"{told.get('judge')}; " + (f"other {', '.join(other)}: compare ranks" if other else "comparable")


def or_worst(metrics, name):
    """A metric's value; where it is undefined the worst there is, or None."""
    return WORST.get(name) if metrics[name] is None else metrics[name]


def metric_table(rows, allow_missing):
    """Means of the metrics, one line a metric."""
    tasks = by_task(rows)
    count = lambda of: f"{sum(bool(row.metrics) for row in of)} of {len(of)}"
    table = [["metric", "better", *(f"{task} ({count(of)})" for task, of in tasks.items())]]
    for name, (better, *_) in METRICS.items():
        cells = []
        for of in tasks.values():
            done = [row.metrics for row in of if row.metrics]
            known = [value for m in done if (value := or_worst(m, name)) is not None]
            nothing = f", {undefined} undefined" if (undefined := sum(m[name] is None for m in done)) else ""
            cells.append(f"{mean_of([known], len(of) - len(done), allow_missing)}{nothing}" if known else "–")
        if set(cells) != {"–"}:
            table.append([name, better, *cells])
    return table


def write_csv(path, rows):
    """One line an item: what went wrong, scores, metrics, spread over repeats."""
    lines = []
    for row in rows:
        told = {"item": row.item.key, "task": row.item.task, "edit": row.item.edit.name, "error": row.lost or "",
                "instruction": row.item.instruction}  # fmt: skip
        numbers = row.numbers() | {"uncapped": row.total(False), "spread": row.spread()}
        lines.append(told | {name: f"{value:.4f}" for name, value in numbers.items() if value is not None})
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def card(args, rows, values, outcome=""):
    """An item for the page: what it shows, says and is sorted by (values). rows: its edit, or those of A and B."""
    to = lambda path: Path(os.path.relpath(path, args.out)).as_posix()
    first, clips = rows[0], []
    names = ["edit"] if len(rows) == 1 else ["A", "B"]
    for name, row in [("source", first), *zip(names, rows)]:
        if row.media:
            kind, file = ("source", row.item.source) if name == "source" else ("edit", row.item.edit)
            small = row.media.with_name(f"{row.media.name}_{kind}")
            video = small.with_suffix(".mp4")
            clips.append((name, to(small.with_suffix(".jpg")), to(video) if video.is_file() else "", to(file)))
    ref = first.media and first.item.ref and to(first.media.with_name(f"{first.media.name}_ref.jpg"))
    problems = [p for row in rows for p in ([row.error] if row.error else [f"no score: {w}" for w in row.failures])]
    return dict(row=first, clips=clips, ref=ref, values=values, outcome=outcome, problems=problems)


def bar(task, mean, low, high):
    """A bar of the page, from low to high; the text is a mean with its interval, without single values."""
    share = 0 if mean.value is None else max(0.0, min(1.0, (mean.value - low) / (high - low)))
    return dict(task=task.replace("_", " "), text=str(replace(mean, values=())), share=round(100 * share, 1))


def finish(args, name, verdict, parts, lost, stopped, page):
    """Write <name>.md and .html, from the same parts [(title, text, table)], and end as the run has gone: exit code 3
    for a judge that cannot be trusted, ValueError where results are missing."""
    text = "".join(f"\n## {name}\n\n{words}\n\n{report.table(table)}\n" for name, words, table in parts)
    head, path = f"# {page['title']}\n\n**{verdict.text}**\n\n`{args.command_line}`\n", args.out / f"{name}.html"
    write_text(path.with_suffix(".md"), head + text)
    names = dict.fromkeys(name for card in page["cards"] for name in card["values"])
    page |= {"verdict": verdict, "command": args.command_line, "parts": parts, "names": list(names)}
    write_text(path, report.page("judge.html", **page))
    print(f"{text.partition('## What the metrics are')[0]}\n{path}\nverdict     {verdict.text}")
    if stopped:
        raise stopped
    if verdict.bad:
        sys.exit(3)
    if lost and not args.allow_missing:
        told = f"{lost} of {len(page['cards'])} items lack a result, see {path}"
        raise ValueError(f"{told}; mend them and run again, or average over the rest with --allow-missing")


def read_human(path, items):
    """A CSV of item, perhaps rater, and columns of scores, or of `winner` -> {column: [(item, rater, score), ...]}."""
    human, winners = defaultdict(list), {"A": 1.0, "tie": 0.5, "B": 0.0}
    for where, line in csv_lines(path, ["item"]):
        item, rater = line.pop("item"), line.pop("rater", "")
        for column, value in line.items():
            if value:
                try:
                    score = winners[value] if column == "winner" else float(value)
                except (ValueError, KeyError):
                    score = math.nan
                if not math.isfinite(score):
                    raise ValueError(f"{where}: {column} is {value!r}, not a number")
                human[column].append((item, rater, score))
    known = sorted(item.key for item in items)
    if not any(item in known for of in human.values() for item, *_ in of):
        raise ValueError(f"{path}: none of its items is one of the benchmark's, which are {', '.join(known[:5])}, ...")
    return human


def mean_scores(told):
    """[(item, rater, score), ...] -> {item: mean over raters}."""
    scores = defaultdict(list)
    for item, _, score in told:
        scores[item].append(score)
    return {item: fmean(of) for item, of in scores.items()}


def agreement(human, rows):
    """A table: how people's scores agree with ours, over all and per task, and raters among themselves."""
    table = [["people's", "ours", "task", "items", "Spearman", "Kendall", "pairwise accuracy"]]
    ours = {row.item.key: row.numbers() for row in rows}
    for column, told in human.items():
        people = mean_scores(told)
        for name in dict.fromkeys(name for numbers in ours.values() for name in numbers):
            for task, of in grouped(rows).items():
                both = [row.item.key for row in of if row.item.key in people and name in ours[row.item.key]]
                if both and (task == "all" or name == "score"):
                    a, b = [people[key] for key in both], [ours[key][name] for key in both]
                    found = [with_interval(f, a, b) for f in (spearman, kendall, pairwise)]
                    table.append([column, name, task, len(both), *found])
        raters = [mean_scores(t for t in told if t[1] == name) for name in dict.fromkeys(rater for _, rater, _ in told)]
        shared = [(x, y, x.keys() & y.keys()) for x, y in combinations(raters, 2)]
        among = [pairwise([x[k] for k in keys], [y[k] for k in keys]) for x, y, keys in shared if keys]
        if among := [share for share in among if share is not None]:
            table.append([column, "raters among themselves", "all", "", "", "", f"{fmean(among):.2f}"])
    return table


def read_sides(args, *folders):
    """The benchmark's items with the edits of each folder; a report on an absent one would replace a good one."""
    if lost := [folder for folder in folders if not Path(folder).is_dir()]:
        raise ValueError(f"{lost[0]}: no such folder of edits")
    args.bench = open_bench(args.bench, args.prompts if args.command == "score" else None)
    return [read_bench(args.bench, args.path, folder, args.limit) for folder in folders]


def prepare(args, *folders):
    """Read what the arguments name, before anything is paid -> items of each folder, people's scores, the judge."""
    sides = read_sides(args, *folders)
    fps, resolution = MODES[args.mode]
    args.settings = with_settings(vlm.Settings(args.endpoint, fps, resolution), args.set)
    return *sides, read_human(args.human, sides[0]) if args.human else {}, make_judge(args)


def score(args):
    """`judge.py score`: metrics, then the judge, then the report."""
    args.name = args.name or args.edits.name
    items, human, judge = prepare(args, args.edits)
    controls, stopped, cost, answered = {}, None, "", Counter()
    with open_answers(args.out) as answers:
        if args.dry_run and args.judge != "metrics":
            return announce(questions_of([item for item in items if item.edit.is_file()], args), answers, args)
        rows = measure_all(items, answers, args)
        if judge:
            questions = questions_of([row.item for row in rows if row.error is None], args)
            stopped = ask_all(judge, args, answers, questions)
            controls, cost = collect(rows, questions, answers), account(answers, questions, args.price)
            answered = Counter(answers.good[q.key].get("model") for q in questions if q.key in answers.good)
    known, failed, asked = judge_controls(rows, controls) if judge else metric_controls(rows)
    verdict = Verdict(f"No judge was asked. The metrics failed {failed} of {asked} known answers.")
    if judge:
        others = [name for name in answered if name and name.lower() not in args.judge.lower()]
        note = f" Answered by {', '.join(others)}, not by {args.judge}." if others else ""
        verdict = verdict_of(args.judge, failed, asked, "failed {} of {} known answers", note)

    write_csv(args.out / f"{args.bench.name}.csv", rows)
    means, overall = score_means(args, rows)
    told = {"bench": args.bench.name, "name": args.name, "judge": args.judge, "answered": answered, "items": len(rows),
            "asked": asked_how(args), "prompts": key_of_question(*map(args.bench.rubric, items)),
            "overall": str(overall), "uncapped": str(score_means(args, rows, False)[1]),
            "tasks": {task: str(mean["average"]) for task, mean in means.items()},
            "verdict": verdict.text, "trusted": not verdict.bad}  # fmt: skip
    write_text(args.out / "summary.json", json.dumps(told, indent=1))

    bars = [bar(task, mean["average"], 1, 5) for task, mean in means.items()]
    if not judge:
        strength = lambda of: mean_of([[row.metrics["edit_strength"] for row in of if row.metrics]])
        bars = [bar(task, strength(of), 0, 80) for task, of in by_task(rows).items()]
    page = {"title": f"{args.bench.title}: {args.name}", "measured": "mean score" if judge else "edit strength",
            "bars": bars, "cards": [card(args, [row], row.numbers()) for row in rows]}  # fmt: skip
    parts = score_parts(args, rows, verdict, known, cost) if judge else []
    parts += metric_parts(args, rows, human)
    finish(args, args.bench.name, verdict, parts, sum(bool(row.lost) for row in rows), stopped, page)


def score_parts(args, rows, verdict, known, cost):
    """What the judge said, as parts of the report: [(title, text, table)]."""
    answers, s = [answer for row in rows for answer in row.answers], args.settings
    broken, missing = sum(enforce(answer)[1] for answer in answers), sum(len(row.failures) for row in rows)
    text = (
        f"{args.judge} at {s.fps:g} frames a second, {s.resolution} resolution, temperature {s.temperature}, "
        f"{args.repeats} answer(s) an item, rubric: {args.bench.wording}. Overall is the mean of the tasks' means. The "
        f"judge broke the hierarchy in {broken} of {len(answers)} answers; the first row caps every score by the first "
        f"one, published rows were merely asked to. {missing} answers are missing."
    )
    if spreads := [row.spread() for row in rows if row.spread() is not None]:
        text += f" Standard deviation over repeats, mean over items: {fmean(spreads):.2f}."
    return [
        ("Scores", text, score_table(args, rows, not verdict.bad)),
        ("Known answers, judge", f"Cost: {cost}", known),
    ]


def metric_parts(args, rows, human):
    """What people and the metrics say, and what is missing."""
    parts = []
    if human:
        text = ("Rank correlations and the share of pairs of items put in people's order, over items; [95 % bootstrap "
                "interval] from 10 items on.")  # fmt: skip
        parts.append(("Agreement with people", text, agreement(human, rows)))
    text = "No model. Means over items, with their values below 10 items and a 95 % bootstrap interval from there on."
    parts.append(("Metrics", text, metric_table(rows, args.allow_missing)))
    parts.append(("Known answers, metrics", "", metric_controls(rows)[0]))
    if lost := [[row.item.key, row.item.task, row.lost] for row in rows if row.lost]:
        means = "Means are over what there is" if args.allow_missing else "No mean is given over failures"
        text = f"{len(lost)} of {len(rows)} items lack a result. {means}."
        parts.append(("Missing", text, [["item", "task", "why"], *lost]))
    told = [["metric", "better", "what it is", "what it cannot see"], *([n, *about] for n, about in METRICS.items())]
    return [*parts, ("What the metrics are", "", told)]


def same_run(args, items):
    """Refuse to mix runs in one folder of edits: run.json in it says what made them."""
    path, files = args.edits / "run.json", read_weights(args.weights, args.base, args.qwen)[1]
    names = ("seed", "steps", "ref", "ref_guidance", "ref_pad_first", "frames", "max_pixels")
    asked = {"weights": weights_print(files, ""), **{name: getattr(args, name) for name in names}}
    if not path.is_file():
        if there := next((item.edit for item in items if item.edit.is_file()), None):
            raise ValueError(f"{there}: edits without {path}; use an empty --edits")
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_text(path, json.dumps(asked, indent=1))
    made = read_json(path)
    if other := [f"{name} {made.get(name)}, not {asked[name]}" for name in asked if made.get(name) != asked[name]]:
        raise ValueError(f"{path}: edits are there of {'; '.join(other)}; give another --edits, or delete them")


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
        except (ValueError, torch.OutOfMemoryError) as error:
            failed += 1
            print(f"[{rank}/{world}] item {item.key} skipped: {error}", file=sys.stderr, flush=True)
    if failed and world == 1:  # under torchrun a failing process would end the others; `score` counts what is missing
        raise ValueError(f"{failed} of {len(mine)} edits failed, see above; mend them and run again; where memory is "
                         "short, add --tile 16, or smaller --frames or --max-pixels")  # fmt: skip


def make_edit(model, item, args):
    """An item's edit by the model, written where the benchmark looks for it."""
    clip = read_for(model.config, item.source, args.frames, args.max_pixels, every_frame=True)
    ref = read_image(item.ref) if item.ref and args.ref else None
    more = {"steps": args.steps, "seed": args.seed, "tile": args.tile, "ref_guidance": args.ref_guidance}
    write_edit(item.edit, model.edit(clip.frames, item.instruction, ref, **more), clip.fps, item.source)


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


SWAYED = "followed the position"
OUTCOMES = {("1", "2"): "A preferred", ("2", "1"): "B preferred", ("1", "1"): SWAYED, ("2", "2"): SWAYED}
POINTS = {"A preferred": 1.0, "B preferred": 0.0}  # anything else is 0.5


def votes_of(questions, answers):
    """{item: who is preferred, where there is an answer in both orders}."""
    said = defaultdict(list)
    for q in questions:
        if q.key in answers.good:
            said[q.item.key].append(answers.good[q.key]["value"]["winner"])
    return {item: OUTCOMES.get(tuple(winners), "undecided") for item, winners in said.items() if len(winners) == 2}


def share_cell(share, count):
    low, high = wilson(share, count)
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


def preferences(votes, human, rows, lost):
    """A table, in which a win is one in both orders, and {task: share of A}. lost: pairs without a vote."""
    head = ["task", "A wins", "B wins", "undecided", "of these: followed the position", "pairs", "share of A [Wilson]"]
    table, shares = [[*head, "sign test p", *(f"as people's {name} says [Wilson]" for name in human)]], {}
    for task, of in grouped(rows).items():
        said = {row.item.key: votes[row.item.key] for row in of if row.item.key in votes}
        if said:
            a, b, swayed = (list(said.values()).count(what) for what in (*POINTS, SWAYED))
            shares[task] = fmean(POINTS.get(vote, 0.5) for vote in said.values())
            told = f"– ({lost} missing)" if lost else share_cell(shares[task], len(said))
            line = [task, a, b, len(said) - a - b, swayed, len(said), told, f"{sign_test(a, b):.3f}"]
            for people in map(mean_scores, human.values()):
                both = [(people.get(item, 0.5), POINTS.get(vote, 0.5)) for item, vote in said.items()]
                same = [(x > 0.5) == (y > 0.5) for x, y in both if 0.5 not in (x, y)]
                line.append(share_cell(fmean(same), len(same)) if same else "–")
            table.append(line)
    return table, shares


def paired_metrics(pairs, lost, allow_missing):
    """A table: the differences of every metric over pairs of rows."""
    table = [["metric", "better", "A - B, mean of the pairs", "A higher", "B higher", "sign test p"]]
    for name, (better, *_) in METRICS.items():
        both = [(or_worst(a.metrics, name), or_worst(b.metrics, name)) for a, b in pairs]
        if gaps := [x - y for x, y in both if x is not None and y is not None]:
            up, down = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
            table.append([name, better, mean_of([gaps], lost, allow_missing), up, down, f"{sign_test(up, down):.3f}"])
    return table


def compare(args):
    """`judge.py compare`: which of two systems wins, each pair shown in both orders; metrics as paired differences."""
    *sides, human, judge = prepare(args, args.a, args.b)
    parts, verdict, votes, shares, stopped = [], Verdict("No judge was asked."), {}, {}, None
    with open_answers(args.out) as answers:
        if args.dry_run and args.judge != "metrics":
            there = [(a, b) for a, b in zip(*sides) if a.edit.is_file() and b.edit.is_file()]
            return announce([q for a, b in there for q in both_orders(args, a, b)], answers, args)
        pairs = list(zip(*(measure_all(items, answers, args) for items in sides)))
        lost = {a.item.key: a.error or b.error for a, b in pairs if a.error or b.error}
        if judge:
            questions = [q for a, b in pairs if a.item.key not in lost for q in both_orders(args, a.item, b.item)]
            stopped = ask_all(judge, args, answers, questions)
            votes = votes_of(questions, answers)
            unheard = "no answer of the judge in both orders"
            lost |= {q.item.key: unheard for q in questions if q.item.key not in votes}
            swayed = list(votes.values()).count(SWAYED)
            verdict = verdict_of(args.judge, swayed, len(votes), f"{SWAYED}, not the edit, in {{}} of {{}} pairs")
            table, shares = preferences(votes, human, [a for a, _ in pairs], 0 if args.allow_missing else len(lost))
            parts.append(("Preferences", "Each pair was shown in both orders; a win needs both.", table))
    whole = [(a, b) for a, b in pairs if a.item.key not in lost]
    text = f"Paired differences over {len(whole)} pairs, {len(lost)} missing."
    parts.append(("Metrics", text, paired_metrics(whole, len(lost), args.allow_missing)))
    parts += [("Missing", "", [["item", "why"], *lost.items()])] if lost else []
    cards = []
    for a, b in pairs:
        theirs = b.numbers()
        gaps = {f"{name}, A - B": value - theirs[name] for name, value in a.numbers().items() if name in theirs}
        cards.append(card(args, [a, b], gaps, votes.get(a.item.key, "")))
    page = {"title": f"{args.bench.title}: A = {args.a}, B = {args.b}", "cards": cards,
            "measured": "share that prefers A",
            "bars": [bar(task, Mean(share), 0, 1) for task, share in shares.items()]}  # fmt: skip
    finish(args, f"{args.bench.name}_compare", verdict, parts, len(lost), stopped, page)


def people(args):
    """`judge.py people`: a page that shows pairs blind, in random order and on random sides, and saves people.csv."""
    sides = read_sides(args, args.a, args.b)
    to = lambda path: path and Path(os.path.relpath(path, args.out)).as_posix()
    both = [(a, b) for a, b in zip(*sides) if a.edit.is_file() and b.edit.is_file()]
    if not both:
        raise ValueError(f"{args.a}, {args.b}: no item has both edits")
    pairs = [dict(item=a.key, instruction=a.instruction, source=to(a.source), a=to(a.edit), b=to(b.edit), ref=to(a.ref))
             for a, b in both]  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    title, page = f"{args.bench.title}: which edit is better?", args.out / "people.html"
    write_text(page, report.page("people.html", title=title, pairs=pairs))
    print(f"{page}: {len(pairs)} pairs; open it, and give the people.csv that it saves to compare --human")


def leaderboard(args):
    """`judge.py leaderboard`: one table over several runs. Those asked in other ways are marked."""
    told = [read_json(path / "summary.json") for path in args.runs]
    for path, run in zip(args.runs, told):
        if not {"tasks", "name", "trusted", "uncapped"} <= run.keys():
            raise ValueError(f"{path}/summary.json: was not written by `judge.py score`")
    tasks = list(dict.fromkeys(task for run in told for task in run["tasks"]))
    table = [["", "judge", "items", *tasks, "overall", "uncapped", "verdict"]]
    for run in told:
        other = [name for name in ("bench", "judge", "asked", "prompts", "items") if run[name] != told[0][name]]
        notes = ["not trusted"] * (not run["trusted"])
        notes += [f"other {', '.join(other)} than the first"] if other else []
        table.append([run["name"], run["judge"], run["items"], *(run["tasks"].get(task, "–") for task in tasks),
                      run["overall"], run["uncapped"], "; ".join(notes)])  # fmt: skip
    print(report.table(table))


def main(argv=None):
    args = parse_arguments(argv)
    {"score": score, "compare": compare, "run": run, "people": people, "leaderboard": leaderboard}[args.command](args)


if __name__ == "__main__":
    with one_line("judge.py", "interrupted; run the same command again to go on"):
        main()
