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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

from command import number, one_line

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python judge.py run --bench refvie refvie_bench.yaml --weights weights/nano --edits out/edits
  python judge.py score --bench refvie refvie_bench.yaml --edits out/edits --judge gemini-3-flash-preview
  python judge.py compare --bench refvie refvie_bench.yaml out/edits_a out/edits_b --judge metrics
  python judge.py leaderboard out/judge_a out/judge_b

keys: GEMINI_API_KEY for gemini-..., OPENAI_API_KEY for openai:MODEL at --endpoint (vLLM, ...), none for local:
"""
MODES = {"official": (1.0, "medium"), "strict": (4.0, "high")}  # frames a second, resolution that the judge sees
TRUST = 0.2  # share of known answers that a judge may fail


def parse_arguments(argv=None):
    bench, report, judged, sides = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    add = bench.add_argument
    add("path", help="the items: the benchmark's YAML, CSV or JSON, or the --bench file if it holds them")
    add("--bench", required=True, metavar="NAME|FILE", help="refvie, openve, imgedit, sparkle, or a YAML like them")
    add("--limit", type=number(1), metavar="N", help="only the first N items")
    report.add_argument("--out", type=Path, default="out/judge", metavar="DIR", help="the report's (%(default)s)")
    add = judged.add_argument
    add("--judge", default="metrics", help="metrics (no model), gemini-..., openai:MODEL or local:PATH|HUB_ID")
    add("--mode", choices=MODES, default="official", help="1 frame a second, or 4 at high resolution")
    add("--endpoint", default="", metavar="URL", help="the judge's server, for openai: and other places than Google's")
    add("--dry-run", action="store_true", help="stop after the cost estimate")
    add("--allow-missing", action="store_true", help="average over what succeeded")
    add("--human", type=Path, metavar="CSV", help="item, rater, and people's scores, or what `people` saved")
    add("--embedder", metavar="PATH|HUB_ID", help="a CLIP for crop_similarity, e.g. openai/clip-vit-large-patch14")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="how to ask (docs/judging.md)")
    sides.add_argument("a", metavar="A", help="the edits of one system")
    sides.add_argument("b", metavar="B", help="the edits of the other")

    teach = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description="Judge edited videos.", **teach)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, *parents):
        return commands.add_parser(name, parents=parents, help=text, description=text, **teach)

    add = command("score", "score finished edits and write a report", bench, judged, report).add_argument
    add("--edits", type=Path, required=True, metavar="DIR", help="the edited videos, under the release's names")
    add("--prompts", type=Path, metavar="FILE", help="YAML, task: template with {instruction}; instead of our rubric")
    add("--repeats", type=number(1), default=1, help="answers an item (default %(default)s)")
    add("--controls", type=number(0), default=4, metavar="N", help="items with known answers (default %(default)s)")
    command("compare", "compare two systems, order swapped", bench, sides, judged, report)
    command("people", "a page on which people compare two systems blind", bench, sides, report)
    add = command("leaderboard", "one table over several runs").add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="--out of a `score`")

    add = command("run", "make the edits with Kiwi-Edit, under torchrun on several GPUs", bench).add_argument
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
from benchmarks import Item, enforce, open_bench, read_answer, read_bench, read_reason, read_winner, wrong_reference
from cache import weights_print
from data import csv_lines
from ledger import appended
from load import local_path, read_json
from media import MediaError, read_image, whole_file, write_text
from metrics import DAMAGES, METRICS, measure_files, write_damaged, write_edit
from model import KiwiEdit, read_for, read_weights
from parallel import pick_device, rank_and_world
from stages import with_settings
from stats import kendall, mean_of, pairwise, share_of, sign_test, spearman, with_interval

METRICS_VERSION = "metrics/5"
PAIR = """You compare two edits of one {kind}. You see {what}, then edit 1 and edit 2. Say which one a careful viewer
would prefer: first by how well it does what was asked, then by what it kept, then by how clean, sharp and stable it is.
Answer with JSON alone: {"reasoning": "...", "winner": "1"}, "2" in place of "1", or "tie".

The instruction of the edit was: {instruction}"""


class Answers:
    """answers.jsonl: every question sent and every answer, written through at once: they were paid for."""

    def __init__(self, lines, add):
        self.lines, self.add = [line for line in lines if {"event", "key"} <= line.keys()], add
        self.good = {line["key"]: line for line in self.lines if line.get("ok")}

    def write(self, **line):
        self.add(line)
        self.lines.append(line)
        if line.get("ok"):
            self.good[line["key"]] = line

    def due(self, questions):
        """Those without a good answer yet, each once."""
        return list({q.key: q for q in questions if q.key not in self.good}.values())


@cache
def file_hash(path):
    """sha256 of a file's content, in hex; read once a run."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key_of(*parts):
    """What makes a question the same question: who is asked and how, words, and the content of files (paths)."""
    texts = [file_hash(part) if isinstance(part, Path) else str(part) for part in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


@dataclass
class Question:
    """One request to a judge. control: "" for a real item, else what is known about the answer."""

    item: Item
    control: str
    text: str
    media: list  # (label, path)
    read: Callable[[str], dict]  # what the judge said -> its value
    schema: dict | None  # the properties of that dict
    key: str
    answer: dict | None = None  # its line of answers.jsonl, once there is a good one
    problem: str = "not asked"  # why there is none


def asked_how(args):
    """Everything but words and files on which an answer depends."""
    s = args.settings
    return f"{args.judge} {s.endpoint} {s.fps:g} {s.resolution} {s.send} {s.max_pixels} {s.temperature}"


def score_question(args, item, control="", repeat=0, **changed):
    """A question about an item, with what is `changed` for a control whose answer is known."""
    bench, shown = args.bench, replace(item, **changed)
    names, text = bench.criteria(item.task), bench.rubric(item)
    media = [("Reference image", shown.ref)] if item.ref else []
    media += [(f"Original {bench.kind}", item.source), (f"Edited {bench.kind}", shown.edit)]
    schema = {"reasoning": {"type": "string"}}
    schema |= {name: {"type": "integer", "minimum": 1, "maximum": 5} for name in names}
    edit = shown.edit.name if control in DAMAGES else shown.edit  # which is not there yet, and is named by its content
    key = key_of(asked_how(args), text, control, repeat, item.source, edit, shown.ref or "")
    read = lambda said: read_answer(said, names)
    return Question(item, control, text, media, read, None if bench.prompts else schema, key)


def score_questions(items, args):
    """Everything to ask about the items that can be judged: the items, repeated, and controls on a few of them."""
    questions = [score_question(args, item, repeat=repeat) for item in items for repeat in range(args.repeats)]
    still = args.bench.kind == "picture"
    for item in items[:: max(1, len(items) // max(1, args.controls))][: args.controls]:
        questions.append(score_question(args, item, "copy", edit=item.source))
        for damage in ("blurred", "quarter") if still else DAMAGES:
            name = f"{file_hash(item.edit)[:16]}_{damage}.{'png' if still else 'mp4'}"
            questions.append(score_question(args, item, damage, edit=args.out / "controls" / name))
        if wrong := wrong_reference(items, item):
            questions.append(score_question(args, item, "wrong_ref", ref=wrong))
    return questions


def pair_questions(args, a, b):
    """The same pair asked twice, with A first and with B first."""
    what = "the reference image and the original" if a.ref else "the original"
    text = PAIR.replace("{kind}", args.bench.kind).replace("{what}", what).replace("{instruction}", a.instruction)
    schema = {"reasoning": {"type": "string"}, "winner": {"type": "string", "enum": ["1", "2", "tie"]}}
    given = [("Reference image", a.ref)] if a.ref else []
    for order, (first, second) in (("AB", (a, b)), ("BA", (b, a))):
        media = [*given, ("Original", a.source), ("Edit 1", first.edit), ("Edit 2", second.edit)]
        key = key_of(asked_how(args), text, order, *(path for _, path in media))
        yield Question(a, order, text, media, read_winner, schema, key)


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


def ask_all(judge, args, answers, questions):
    """Ask what has no good answer yet; answers go into the questions -> why asking stopped or None, and the cost."""
    announce(questions, answers, args)
    asker, due = vlm.Asker(judge, args.settings), answers.due(questions)

    def ask(q):
        told = {"key": q.key, "item": q.item.key, "control": q.control, "judge": args.judge}
        note = lambda **event: answers.write(**told, endpoint=args.settings.endpoint, **event)
        schema = q.schema and {"type": "object", "properties": q.schema}
        try:
            if q.control in DAMAGES and not q.media[-1][1].is_file() and not asker.stop:
                write_damaged(q.media[-1][1], q.control, q.item.source, q.item.edit)
            asker.ask(q.text, q.media, args.settings.fps, q.read, schema, note)
        except (vlm.TryAgain, ValueError, OSError) as error:
            q.problem = str(error)  # what stops all is in asker.stop

    workers = args.settings.concurrency if judge.again else 1  # a local model's batches would depend on timing
    try:
        list(tqdm(vlm.in_threads(ask, due, workers), total=len(due), desc="judge", disable=not due))
    except KeyboardInterrupt as error:
        asker.stop = error  # what waits is not sent, and not paid
        raise
    for q in questions:
        q.answer = answers.good.get(q.key)
    print(f"paid        {(cost := account(answers, questions))}")
    return asker.stop, cost


def announce(questions, answers, args):
    """Print what the questions will cost, from the files' headers alone."""
    due, tokens = answers.due(questions), cache(lambda path: vlm.tokens_of(path, args.judge, args.settings))
    there = lambda q: [path if path.is_file() else q.item.edit for _, path in q.media]  # a control is not made yet
    tokens_in = sum(len(q.text) // 4 + sum(map(tokens, there(q))) for q in due)
    out = 120 * len(due)  # tokens; a thinking model says more
    print(f"cost        {len(due)} of {len(questions)} questions to ask, about {tokens_in:,} tokens in, {out:,} out")


def account(answers, questions):
    """What the questions cost so far, over all runs, refused and cut-off answers too: one line of text."""
    keys = {q.key for q in questions}
    lines = [line for line in answers.lines if line["key"] in keys]
    ends = [line for line in lines if line["event"] == "answer"]
    sent, unread = len(lines) - len(ends), sum(not line["ok"] for line in ends)
    late = sum(line.get("perhaps_paid", False) for line in ends)
    t_in, t_out = (sum(line.get(name) or 0 for line in ends) for name in ("tokens_in", "tokens_out"))
    return (
        f"{sent} requests sent, {len(ends)} answered or given up, {unread} of these without a score, "
        f"{sent - len(ends)} cut off, {late} timed out (perhaps paid); {t_in:,} tokens in, {t_out:,} out"
    )


@dataclass
class Row:
    """All that is known about an item at the end."""

    item: Item
    error: str | None = None  # why there are no metrics
    numbers: dict = field(default_factory=dict)  # metrics, and what `scores_of` makes of the answers
    known: dict = field(default_factory=dict)  # what is known of the metrics: whether it held
    media: Path | None = None  # where its small clips and posters are, without their endings
    answers: list = field(default_factory=list)  # {name: score} as the judge gave them, one a repeat
    reasons: list = field(default_factory=list)
    failures: list = field(default_factory=list)  # why an answer is missing, one a repeat without a score

    @property
    def lost(self):
        """Why a result is missing, or None: averaging over the others would be averaging over failures."""
        return self.error or (self.failures or [None])[0]


def scores_of(answers):
    """Answers of the repeats -> means of the criteria, capped by the first; "score", their mean; the same uncapped; and
    its standard deviation over repeats."""
    capped = [enforce(answer)[0] for answer in answers]
    totals = [fmean(answer.values()) for answer in capped]
    found = {name: fmean(answer[name] for answer in capped) for name in capped[0]}
    found |= {"score": fmean(totals), "uncapped": fmean(fmean(answer.values()) for answer in answers)}
    return {**found, "spread": stdev(totals)} if len(totals) > 1 else found


def measure_all(items, answers, args):
    """Metrics of every item, those known already excepted -> rows."""
    embed = open_embedder(args)

    def one(item):
        if not item.edit.is_file():
            return Row(item, f"missing: {item.edit}")
        try:
            wrong = wrong_reference(items, item)
            key = key_of(METRICS_VERSION, args.embedder, item.source, item.edit, item.ref or "", wrong or "")
            media = args.out / "media" / key
            if key not in answers.good or not Path(f"{media}_edit.jpg").is_file():
                found, known = measure_files(item.source, item.edit, item.ref, wrong, media, embed)
                answers.write(event="answer", ok=True, key=key, item=item.key, metrics=found, known=known)
            numbers = {name: value for name, value in answers.good[key]["metrics"].items() if value is not None}
            return Row(item, None, numbers, answers.good[key]["known"], media)
        except (MediaError, OSError) as error:
            return Row(item, f"unreadable: {error}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # items run side by side
    rows = list(tqdm(vlm.in_threads(one, items, os.cpu_count()), total=len(items), desc="metrics"))
    torch.set_num_threads(threads)
    print(f"metrics     {sum(not row.error for row in rows)} of {len(rows)} items")
    return rows


def open_embedder(args):
    """--embedder, a CLIP: pictures -> features of length 1; None without."""
    if not args.embedder:
        return None
    from transformers import CLIPModel

    from curators.paper import clip_features

    model = CLIPModel.from_pretrained(local_path(args.embedder)).to(pick_device(args.settings.device)).eval()
    return lambda images: clip_features(model, images)


def collect(rows, questions):
    """Put the answers into the rows."""
    by_key = {row.item.key: row for row in rows}
    for q in [q for q in questions if not q.control]:
        row = by_key[q.item.key]
        if q.answer:
            row.answers.append(q.answer["value"])
            row.reasons.append(read_reason(q.answer["text"]))
        else:
            row.failures.append(q.problem)
    for row in rows:
        row.numbers = (scores_of(row.answers) if row.answers else {}) | row.numbers


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


def known_of_judge(rows, questions):
    """{what is known: [whether the judge said so, ...]}. What scores lowest already cannot fall and says nothing."""
    true, known = {row.item.key: row.numbers for row in rows if row.answers}, {}
    for q in [q for q in questions if q.control]:
        lowered, what = KNOWN[q.control]
        held = known.setdefault(what, [])
        if q.answer and q.item.key in true:
            names, given = lowered(list(q.answer["value"])), enforce(q.answer["value"])[0]
            was, now = (sum(scores[name] for name in names) for scores in (true[q.item.key], given))
            if q.control == "copy":
                held.append(now == len(names))
            elif was > len(names):
                held.append(now < was)
    return known


def known_table(known):
    """-> a table, and how many failed of how many."""
    table = [[what, sum(held), len(held)] for what, held in known.items()]
    count = sum(of for *_, of in table)
    return [["known answer", "held", "of"], *table], count - sum(held for _, held, _ in table), count


def verdict_of(judge, failed, asked, what):
    """-> the first line of every report, and whether the judge cannot be trusted. what: it did, in {} of {}."""
    if not asked:
        return f"Unchecked: {judge} was asked nothing whose answer is known.", False
    bad = failed / asked > TRUST
    opening = "Do not trust this judge" if bad else "Checked"
    return f"{opening}: {judge} {what.format(failed, asked)} ({failed / asked:.0%}).", bad


def by_task(rows):
    """{task: its rows}."""
    tasks = defaultdict(list)
    for row in rows:
        tasks[row.item.task].append(row)
    return tasks


def means(args, rows, names, lost=lambda row: row.lost):
    """[Mean of each of these numbers over the rows that have it]. lost: rows whose number is missing."""
    missing = sum(bool(lost(row)) for row in rows)
    values = [[row.numbers[name] for row in rows if name in row.numbers] for name in names]
    return [mean_of([of], missing, args.allow_missing) for of in values]


def overall(args, rows, name):
    """The mean of the tasks' means."""
    groups = [[row.numbers[name] for row in of if row.answers] for of in by_task(rows).values()]
    return mean_of(groups, sum(bool(row.lost) for row in rows), args.allow_missing)


def score_table(args, rows, trusted):
    """The paper's Table 3 (a column for each criterion) or 2 (one for each task), and the mean without the cap."""
    bench, found, line = args.bench, by_task(rows), [args.edits.name]
    wide, whole = bench.table == "criteria", set(bench.tasks) <= {*found, "*"}
    tasks = {task: found[task] for task in [*bench.tasks, *found] if task in found}  # in the paper's order
    names = {task: [*bench.criteria(task), "score"] if wide else ["score"] for task in tasks}
    head = [f"{task}: {name}" if wide else task for task in tasks for name in names[task]]
    for task, of in tasks.items():
        line += means(args, of, names[task])
    table = [["", *(name.replace("_", " ") for name in head), "overall", "overall, uncapped"]]
    table.append([*line, overall(args, rows, "score"), overall(args, rows, "uncapped")])
    told = bench.published
    same = (told.get("model"), told.get("prompts")) == (args.judge, bench.wording) and not args.limit
    alike = same and told.get("items") in (None, len(rows))
    note = f"{told.get('judge')}; {'comparable' if alike else 'other model, prompts or items: compare ranks'}"
    for system, known in told.get("rows", {}).items() if trusted else ():
        line = [f"{system}, published ({note})"]
        for task in tasks:
            given = known.get(task, [])  # the criteria's scores, or the task's
            given = [*given, fmean(given)] if wide and given else [given] if given else []
            cells = [f"{value:.2f}" for value in given]
            line += cells if len(cells) == len(names[task]) else ["–"] * len(names[task])
        table.append([*line, "–", f"{known['overall']:.2f}" if whole and "overall" in known else "–"])
    return table


def metric_table(args, rows, paired=False):
    """Means of the metrics, one line a metric, by task. paired: of differences A - B, with a sign test over all."""
    tasks, names = by_task(rows), [name for name in METRICS if any(name in row.numbers for row in rows)]
    count = lambda of: f"{sum(not row.error for row in of)} of {len(of)}"
    head = ["metric", "better", *(f"{task} ({count(of)})" for task, of in tasks.items())]
    table = [[*head, *(["A higher", "B higher", "sign test p"] if paired else [])]]
    for name, *cells in zip(names, *(means(args, of, names, lambda row: row.error) for of in tasks.values())):
        gaps = [row.numbers[name] for row in rows if name in row.numbers]
        up, down = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        table.append([name, METRICS[name][0], *cells, *([up, down, f"{sign_test(up, down):.3f}"] if paired else [])])
    return table


def write_csv(path, rows):
    """One line an item: what went wrong, scores, metrics, spread over repeats."""
    lines = []
    for row in rows:
        told = {"item": row.item.key, "task": row.item.task, "edit": row.item.edit.name, "error": row.lost or ""}
        numbers = {name: f"{value:.4f}" for name, value in row.numbers.items()}
        lines.append({**told, "instruction": row.item.instruction, **numbers})
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def bar(task, mean, low, high):
    """A bar of the page, from low to high; the text is a mean with its interval, without single values."""
    share = 0 if mean.value is None else max(0.0, min(1.0, (mean.value - low) / (high - low)))
    return dict(task=task.replace("_", " "), text=str(replace(mean, values=())), share=round(100 * share, 1))


def finish(args, name, verdict, parts, lost, stopped, page):
    """Write <name>.md and .html, from the same parts [(title, text, table)], and end as the run has gone: exit code 3
    for a judge that cannot be trusted, ValueError where results are missing. lost: {item: why}.

    page: title, bars, and cards [(rows: its edit or those of A and B, values it is sorted by, what was preferred)].
    """
    path, (told, bad), count = args.out / f"{name}.html", verdict, len(page["cards"])
    if lost:
        parts.append(("Missing", f"{len(lost)} of {count} items.", [["item", "why"], *lost.items()]))
    about = [["metric", "better", "what it is", "what it cannot see"], *([n, *told] for n, told in METRICS.items())]
    text = "".join(f"\n## {name}\n\n{words}\n\n{report.table(table)}\n" for name, words, table in parts)
    head = f"# {page['title']}\n\n**{told}**\n\n`{args.command_line}`\n"
    write_text(path.with_suffix(".md"), f"{head}{text}\n## What the metrics are\n\n{report.table(about)}\n")
    names = list(dict.fromkeys(name for _, values, _ in page["cards"] for name in values))
    parts = [*parts, ("What the metrics are", "", about)]
    page |= {"verdict": told, "bad": bad, "names": names, "parts": parts, "command": args.command_line}
    write_text(path, report.page("judge.html", to=lambda file: relative(file, args.out), **page))
    print(f"{text}\n{path}\nverdict     {told}")
    if stopped:
        raise stopped
    if bad:
        sys.exit(3)
    if lost and not args.allow_missing:
        told = f"{len(lost)} of {count} items lack a result, see {path}"
        raise ValueError(f"{told}; mend them and run again, or average over the rest with --allow-missing")


def relative(path, folder):
    return Path(os.path.relpath(path, folder)).as_posix()


def read_human(path, items):
    """A CSV of item, perhaps rater, and columns of scores, or of `winner` -> {column: {rater: {item: score}}}."""
    told, winners = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), {"A": 1.0, "tie": 0.5, "B": 0.0}
    for where, line in csv_lines(path, ["item"]) if path else ():
        item, rater = line.pop("item"), line.pop("rater", "")
        for column, value in line.items():
            if value:
                try:
                    score = winners[value] if column == "winner" else float(value)
                except (ValueError, KeyError):
                    score = math.nan
                if not math.isfinite(score):
                    raise ValueError(f"{where}: {column} is {value!r}, not a number")
                told[column][rater][item].append(score)
    mean = lambda given: {item: fmean(scores) for item, scores in given.items()}  # without raters a line a person
    human = {column: {rater: mean(given) for rater, given in raters.items()} for column, raters in told.items()}
    known = sorted(item.key for item in items)
    if path and not any(item in known for raters in human.values() for given in raters.values() for item in given):
        raise ValueError(f"{path}: none of its items is one of the benchmark's, which are {', '.join(known[:5])}, ...")
    return human


def mean_over(raters):
    """{rater: {item: score}} -> {item: mean over raters}."""
    items = dict.fromkeys(item for given in raters.values() for item in given)
    return {item: fmean(given[item] for given in raters.values() if item in given) for item in items}


def agreement(human, rows):
    """A table: how people's scores agree with ours, over all and per task, and raters among themselves."""
    table = [["people's", "ours", "task", "items", "Spearman", "Kendall", "pairwise accuracy"]]
    ours = {row.item.key: row.numbers for row in rows}
    for column, raters in human.items():
        people = mean_over(raters)
        for name in dict.fromkeys(name for numbers in ours.values() for name in numbers):
            for task, of in [("all", rows), *(by_task(rows).items() if name == "score" else ())]:
                both = [row.item.key for row in of if row.item.key in people and name in ours[row.item.key]]
                if both:
                    a, b = [people[key] for key in both], [ours[key][name] for key in both]
                    found = [with_interval(f, a, b) for f in (spearman, kendall, pairwise)]
                    table.append([column, name, task, len(both), *found])
        shared = [(x, y, x.keys() & y.keys()) for x, y in combinations(raters.values(), 2)]
        among = [pairwise([x[k] for k in keys], [y[k] for k in keys]) for x, y, keys in shared if keys]
        if among := [share for share in among if share is not None]:
            table.append([column, "raters among themselves", "all", "", "", "", f"{fmean(among):.2f}"])
    return table


def prepare(args, *folders):
    """Read what the arguments name, before anything is paid -> the benchmark's items with the edits of each folder."""
    if lost := [folder for folder in folders if not Path(folder).is_dir()]:
        raise ValueError(f"{lost[0]}: no such folder of edits")  # a report on it would replace a good one
    args.bench = open_bench(args.bench, args.prompts if args.command == "score" else None)
    names = {name for task in args.bench.tasks.values() for name in task["criteria"]}
    if taken := names & {*METRICS, "score", "uncapped", "spread", "wrong_reference_gain"}:
        raise ValueError(f"--bench {args.bench.name}: a criterion cannot be named {min(taken)}, as a number of ours is")
    sides = [read_bench(args.bench, args.path, folder, args.limit) for folder in folders]
    if args.command != "people":
        args.settings = with_settings(vlm.Settings(args.endpoint, *MODES[args.mode]), args.set)
        args.human = read_human(args.human, sides[0])
    return sides


def gather(args, sides, questions_of):
    """Measure every item, then ask the judge -> rows of each side, questions, why asking stopped or None, the cost.

    questions_of: groups of items whose edits are there, one of each side -> questions. A dry run ends here.
    """
    judge = make_judge(args)
    with appended(args.out / "answers.jsonl", sync=True) as (lines, add):
        answers = Answers(lines, add)
        if args.dry_run:
            there = [group for group in zip(*sides) if all(item.edit.is_file() for item in group)]
            sys.exit(announce(questions_of(there) if args.judge != "metrics" else [], answers, args))
        rows = [measure_all(items, answers, args) for items in sides]
        if not judge:
            return rows, [], None, ""
        whole = [group for group in zip(*rows) if not any(row.error for row in group)]
        questions = questions_of([[row.item for row in group] for group in whole])
        return rows, questions, *ask_all(judge, args, answers, questions)


def score(args):
    """`judge.py score`: metrics, then the judge, then the report."""
    asked_about = lambda groups: score_questions([item for (item,) in groups], args)
    (rows,), questions, stopped, cost = gather(args, prepare(args, args.edits), asked_about)
    judged, parts, known = args.judge != "metrics", [], defaultdict(list)
    collect(rows, questions)
    for what, held in (pair for row in rows for pair in row.known.items()):
        known[what].append(held)
    of_metrics, failed, count = known_table(known)
    verdict = f"No judge was asked. The metrics failed {failed} of {count} known answers.", False
    if judged:
        of_judge, failed, count = known_table(known_of_judge(rows, questions))
        told, bad = verdict_of(args.judge, failed, count, "failed {} of {} known answers")
        models = {q.answer.get("model") or "" for q in questions if q.answer}
        others = ", ".join(sorted(name for name in models if name.lower() not in args.judge.lower()))
        verdict = told + (f" Answered by {others}, not by {args.judge}." if others else ""), bad
        parts.append(("Scores", how_scored(args, rows), score_table(args, rows, not bad)))
        parts.append(("Known answers, judge", f"Cost: {cost}", of_judge))
    if args.human:
        text = "Rank correlations and the share of pairs of items in people's order; [95 % bootstrap] from 10 items on."
        parts.append(("Agreement with people", text, agreement(args.human, rows)))
    text = "No model. Means over items, with their values below 10 items and a 95 % bootstrap interval from there on."
    parts.append(("Metrics", text, metric_table(args, rows)))
    parts.append(("Known answers, metrics", "", of_metrics))
    write_csv(args.out / f"{args.bench.name}.csv", rows)
    write_summary(args, rows, *verdict)
    name, low, high = ("score", 1, 5) if judged else ("edit_strength", 0, 80)
    shown = {task: means(args, of, [name])[0] for task, of in by_task(rows).items()}
    page = {"title": f"{args.bench.title}: {args.edits.name}", "measured": name.replace("_", " ")}
    page["bars"] = [bar(task, mean, low, high) for task, mean in shown.items()]
    page["cards"] = [((row,), row.numbers, "") for row in rows]
    finish(args, args.bench.name, verdict, parts, {row.item.key: row.lost for row in rows if row.lost}, stopped, page)


def how_scored(args, rows):
    """What stands above the scores."""
    answers, s = [answer for row in rows for answer in row.answers], args.settings
    broken, missing = sum(enforce(answer)[1] for answer in answers), sum(len(row.failures) for row in rows)
    spreads = [row.numbers["spread"] for row in rows if "spread" in row.numbers]
    spread = f" Standard deviation over repeats, mean over items: {fmean(spreads):.2f}." if spreads else ""
    return (
        f"{args.judge} at {s.fps:g} frames a second, {s.resolution} resolution, temperature {s.temperature}, "
        f"{args.repeats} answer(s) an item, rubric: {args.bench.wording}. Overall is the mean of the tasks' means. The "
        f"judge broke the hierarchy in {broken} of {len(answers)} answers; here the first score caps the others, "
        f"published rows were merely asked to. {missing} answers are missing.{spread}"
    )


def write_summary(args, rows, verdict, bad):
    """summary.json, a line of `leaderboard`."""
    told = {"bench": args.bench.name, "judge": args.judge, "items": len(rows), "asked": asked_how(args)}
    told["prompts"] = key_of(*(args.bench.rubric(row.item) for row in rows))
    told |= {"overall": str(overall(args, rows, "score")), "uncapped": str(overall(args, rows, "uncapped"))}
    told["tasks"] = {task: str(*means(args, of, ["score"])) for task, of in by_task(rows).items()}
    write_text(args.out / "summary.json", json.dumps({**told, "verdict": verdict, "trusted": not bad}, indent=1))


SWAYED = "followed the position"
OUTCOMES = {("1", "2"): "A preferred", ("2", "1"): "B preferred", ("1", "1"): SWAYED, ("2", "2"): SWAYED}
POINTS = {"A preferred": 1.0, "B preferred": 0.0}  # anything else is 0.5


def votes_of(questions):
    """{item: who is preferred, where there is an answer in both orders}."""
    said = defaultdict(list)
    for q in [q for q in questions if q.answer]:
        said[q.item.key].append(q.answer["value"]["winner"])
    return {item: OUTCOMES.get(tuple(winners), "undecided") for item, winners in said.items() if len(winners) == 2}


def preferences(votes, human, rows, lost):
    """A table, in which a win is one in both orders, and {task: share of A}. lost: pairs without a vote."""
    head = ["task", "A wins", "B wins", "undecided", "of these: followed the position", "pairs", "share of A [Wilson]"]
    table, shares = [[*head, "sign test p", "as people say [Wilson]"]], {}
    people = mean_over(human.get("winner", {}))
    for task, of in {"all": rows, **by_task(rows)}.items():
        said = {row.item.key: votes[row.item.key] for row in of if row.item.key in votes}
        if said:
            a, b, swayed = (list(said.values()).count(what) for what in (*POINTS, SWAYED))
            points = {item: POINTS.get(vote, 0.5) for item, vote in said.items()}
            shares[task] = share_of(points.values())
            both = [(people[item], point) for item, point in points.items() if item in people]
            same = share_of([(x > 0.5) == (y > 0.5) for x, y in both if 0.5 not in (x, y)])
            told = f"– ({lost} missing)" if lost else shares[task]
            p = f"{sign_test(a, b):.3f}"
            table.append([task, a, b, len(said) - a - b, swayed, len(said), told, p, same])
    return table, shares


def compare(args):
    """`judge.py compare`: which of two systems wins, each pair shown in both orders; metrics as paired differences."""
    sides = prepare(args, args.a, args.b)
    asked_about = lambda pairs: [q for a, b in pairs for q in pair_questions(args, a, b)]
    (left, right), questions, stopped, _ = gather(args, sides, asked_about)
    parts, verdict, shares, votes = [], ("No judge was asked.", False), {}, votes_of(questions)
    lost = {a.item.key: a.error or b.error for a, b in zip(left, right) if a.error or b.error}
    whole = len(left) - len(lost)
    lost |= {q.item.key: "no answer in both orders" for q in questions if q.item.key not in votes}
    if args.judge != "metrics":
        swayed = list(votes.values()).count(SWAYED)
        verdict = verdict_of(args.judge, swayed, len(votes), f"{SWAYED}, not the edit, in {{}} of {{}} pairs")
        table, shares = preferences(votes, args.human, left, 0 if args.allow_missing else len(lost))
        parts.append(("Preferences", "Each pair was shown in both orders; a win needs both.", table))
    gaps, cards = [], []
    for a, b in zip(left, right):
        gap = {name: value - b.numbers[name] for name, value in a.numbers.items() if name in b.numbers}
        gaps.append(Row(a.item, a.error or b.error, gap))
        cards.append(((a, b), {f"{name}, A - B": value for name, value in gap.items()}, votes.get(a.item.key, "")))
    text = f"Differences A - B over {whole} of {len(left)} pairs."
    parts.append(("Metrics", text, metric_table(args, gaps, paired=True)))
    page = {"title": f"{args.bench.title}: A = {args.a}, B = {args.b}", "measured": "share that prefers A"}
    page |= {"bars": [bar(task, share, 0, 1) for task, share in shares.items()], "cards": cards}
    finish(args, f"{args.bench.name}_compare", verdict, parts, lost, stopped, page)


def people(args):
    """`judge.py people`: a page that shows pairs blind, in random order and on random sides, and saves people.csv."""
    to = lambda path: path and relative(path, args.out)
    pairs = [
        dict(item=a.key, instruction=a.instruction, source=to(a.source), a=to(a.edit), b=to(b.edit), ref=to(a.ref))
        for a, b in zip(*prepare(args, args.a, args.b))
        if a.edit.is_file() and b.edit.is_file()
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    title, page = f"{args.bench.title}: which edit is better?", args.out / "people.html"
    write_text(page, report.page("people.html", title=title, pairs=pairs))
    print(f"{page}: {len(pairs)} pairs; open it, and give the people.csv that it saves to compare --human")


def leaderboard(args):
    """`judge.py leaderboard`: one table over several runs. Those asked in other ways are marked."""
    runs = [read_json(path / "summary.json") for path in args.runs]
    names = ("bench", "judge", "asked", "prompts", "items")
    for path, run in zip(args.runs, runs):
        if not {*names, "tasks", "overall", "uncapped", "trusted"} <= run.keys():
            raise ValueError(f"{path}/summary.json: is not of a `judge.py score`")
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    table = [["", "judge", "items", *tasks, "overall", "uncapped", "verdict"]]
    for path, run in zip(args.runs, runs):
        other = [name for name in names if run[name] != runs[0][name]]
        notes = ["not trusted"] * (not run["trusted"])
        notes += [f"other {', '.join(other)} than the first"] if other else []
        means = [run["tasks"].get(task, "–") for task in tasks]
        table.append([path, run["judge"], run["items"], *means, run["overall"], run["uncapped"], "; ".join(notes)])
    print(report.table(table))


def run(args):
    """`judge.py run`: the edits themselves, one process a GPU under torchrun, taken up where it stopped."""
    rank, world = rank_and_world()
    device = pick_device(args.device)
    items = read_bench(open_bench(args.bench), args.path, args.edits, args.limit)
    same_run(args, items)
    items = list({item.edit: item for item in reversed(items)}.values())[::-1]  # of those that share a name the first
    mine = [item for item in items[rank::world] if not item.edit.is_file()]
    print(f"[{rank}/{world}] {len(mine)} of {len(items[rank::world])} edits to make, {args.weights} on {device}")
    if not mine:
        return
    dtype, failed = torch.float32 if device.type == "cpu" else torch.bfloat16, 0
    model = KiwiEdit.from_pretrained(args.weights, device, dtype, args.base, args.qwen, args.ref_pad_first)
    more = {"steps": args.steps, "seed": args.seed, "tile": args.tile, "ref_guidance": args.ref_guidance}
    for item in mine:
        try:
            clip = read_for(model.config, item.source, args.frames, args.max_pixels, every_frame=True)
            ref = read_image(item.ref) if item.ref and args.ref else None
            made = model.edit(clip.frames, item.instruction, ref, **more)
            write_edit(item.edit, made, clip.fps, item.source)
            print(f"[{rank}/{world}] {item.edit}", flush=True)
        except (ValueError, torch.OutOfMemoryError) as error:
            failed += 1
            print(f"[{rank}/{world}] item {item.key} skipped: {error}", file=sys.stderr, flush=True)
    if failed and world == 1:  # under torchrun a failing process would end the others; `score` counts what is missing
        told = "where memory is short, add --tile 16, or smaller --frames or --max-pixels"
        raise ValueError(f"{failed} of {len(mine)} edits failed, see above; mend them and run again; {told}")


def same_run(args, items):
    """Refuse to mix runs in one folder of edits: run.json in it says what made them."""
    path, files = args.edits / "run.json", read_weights(args.weights, args.base, args.qwen)[1]
    names = ("seed", "steps", "ref", "ref_guidance", "ref_pad_first", "frames", "max_pixels")
    asked = {"weights": weights_print(files, ""), **{name: getattr(args, name) for name in names}}
    if path.is_file():
        made = read_json(path)
        if other := [f"{name} {made.get(name)}, not {asked[name]}" for name in asked if made.get(name) != asked[name]]:
            raise ValueError(f"{path}: edits are there of {'; '.join(other)}; give another --edits, or delete them")
    elif there := [item.edit for item in items if item.edit.is_file()]:
        raise ValueError(f"{there[0]}: edits without {path}; use an empty --edits")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked, indent=1))


def main(argv=None):
    args = parse_arguments(argv)
    {"score": score, "compare": compare, "run": run, "people": people, "leaderboard": leaderboard}[args.command](args)


if __name__ == "__main__":
    with one_line("judge.py", "interrupted; run the same command again to go on"):
        main()
