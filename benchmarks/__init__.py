"""Benchmarks: which edits are judged, what is asked about them, and how answers are read.

    refvie.yaml, openve.yaml, imgedit.yaml, sparkle.yaml, or a YAML of your own -> open_bench -> Bench
    its items (YAML, CSV or JSON) + folder of edits -> read_bench -> Item(key, task, instruction, source, edit, ref)
    Bench.rubric(item) -> the question;  an answer's text, names of criteria -> read_answer -> {name: 1..5}

The criteria and their hierarchy are the paper's (Section 5) and the release's, the wording is ours. Nothing is guessed
into a score.
"""

import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from data import csv_lines, inside
from vlm import Malformed, json_objects, spoken

ANSWER = """
Think in one or two sentences, then answer with JSON alone, scores last, whole numbers from 1 to 5. No score may be
above the first. {"reasoning": "...", FIELDS}"""
ASKED = "\n\nThe instruction of the edit was: {instruction}"


@dataclass(frozen=True)
class Item:
    """One edit to judge. `key` names it in every table; `edit` follows the release's naming of outputs."""

    key: str
    task: str
    instruction: str
    source: Path
    edit: Path
    ref: Path | None = None


@dataclass(frozen=True)
class Bench:
    """A benchmark, as benchmarks/*.yaml describe it. tasks: {name or "*": {grade, criteria: {name: five anchors}}}."""

    name: str
    columns: dict  # ours: theirs
    edit: str  # the name of an output: {index}, {key}, {task}, {stem}, {name}, {instruction}
    tasks: dict
    title: str = ""
    kind: str = "video"
    table: str = "tasks"  # its columns: tasks, or criteria
    skip: tuple = ()
    items: list = ()
    published: dict = field(default_factory=dict)
    prompts: dict = field(default_factory=dict)  # {task or "*": template}, in place of our rubric

    @property
    def wording(self):
        return self.prompts.get("name", "ours")

    def task(self, name):
        return self.tasks.get(name) or self.tasks["*"]

    def criteria(self, name):
        return list(self.task(name)["criteria"])

    def rubric(self, item):
        """What the judge is asked about an item."""
        text = self.prompts.get(item.task) or self.prompts.get("*")
        if text is None:
            text = f"You grade {self.task(item.task)['grade']}.\n"
            for name, anchors in self.task(item.task)["criteria"].items():
                text += "\n".join(["", f"{name}:", *(f"{i}: {anchor}" for i, anchor in enumerate(anchors, 1)), ""])
            text += ANSWER.replace("FIELDS", ", ".join(f'"{name}": n' for name in self.criteria(item.task)))
        text += "" if "{instruction}" in text else ASKED
        return text.replace("{instruction}", item.instruction)


def read_yaml(path):
    """A YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ValueError(f"{path}: is not {path.suffix[1:].upper()} ({str(error).splitlines()[0]})") from None


def open_bench(name, prompts=None):
    """A Bench by its name, or from a YAML file, perhaps with a file of prompts."""
    ours = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
    path = ours.get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"--bench {name}: expected {', '.join(ours)}, or a YAML file like benchmarks/refvie.yaml")
    found, names = read_yaml(path), {f.name for f in fields(Bench)} - {"name", "prompts"}
    if not isinstance(found, dict) or not {"columns", "edit", "tasks"} <= found.keys() <= names:
        raise ValueError(f"{path}: expected columns, edit, tasks, and no more than {', '.join(sorted(names))}")
    bench = Bench(path.stem, **{"title": path.stem, **found, "prompts": read_yaml(prompts) if prompts else {}})
    for task, told in bench.tasks.items():
        if not all(isinstance(anchors, list) and len(anchors) == 5 for anchors in told["criteria"].values()):
            raise ValueError(f"{path}: {task}: expected five anchors, for 1 to 5, under each of its criteria")
    if not isinstance(bench.prompts, dict) or not all(isinstance(text, str) for text in bench.prompts.values()):
        raise ValueError(f"{prompts}: expected a mapping from tasks to templates")
    return bench


def rows_of(path):
    """Yield (place, key, row) of a table of items: CSV, or YAML or JSON with a list, or a mapping from keys."""
    if path.suffix == ".csv":
        yield from ((place, str(i), row) for i, (place, row) in enumerate(csv_lines(path)))
        return
    rows = read_yaml(path)
    rows = rows["items"] if isinstance(rows, dict) and {"items", "tasks"} <= rows.keys() else rows
    named = rows.items() if isinstance(rows, dict) else enumerate(rows if isinstance(rows, list) else [])
    yield from ((f"{path}, item {key}", str(key), row) for key, row in named)


def read_bench(bench, path, edits, limit=None):
    """The items of a Bench, or of one by name, at most `limit`. ValueError where the file is not what --bench says."""
    bench = open_bench(bench) if isinstance(bench, str) else bench
    path, items, names = Path(path), [], {}
    for index, (place, key, row) in enumerate(rows_of(path)):
        texts = {ours: text_of(row, theirs, place) for ours, theirs in bench.columns.items()}
        task = texts["task"]
        if task in bench.skip:
            continue
        if task not in bench.tasks and "*" not in bench.tasks:
            raise ValueError(f"{place}: unknown task {task!r}; --bench {bench.name} has {', '.join(bench.tasks)}")
        ref = source_of(path, texts["ref"], place) if "ref" in texts else None
        edit = edit_of(bench, edits, index, key, texts, place)
        items.append(Item(key, task, texts["instruction"], source_of(path, texts["source"], place), edit, ref))
        if (other := names.setdefault(edit, key)) != key:
            told = "both are judged by the one file, which `run` makes of the first"
            print(f"warning: {path}: items {other} and {key} share the edit {edit.name}: {told}", file=sys.stderr)
    if not items:
        raise ValueError(f"{path}: holds no items of --bench {bench.name}; is it the right file?")
    return items[:limit]


def text_of(row, name, place):
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: has no {name}; is it the right --bench?")
    return value.strip()


def source_of(path, name, place):
    """A source or reference: from the table's folder or, as OpenVE-Bench is published, with that folder's name."""
    folder = path.absolute().parent
    published = name.split("/")[0] == folder.name and not (folder / name).exists()
    return inside(folder.parent if published else path.parent, name, place)


def edit_of(bench, edits, index, key, texts, place):
    """Where the edit of an item lies: the benchmark's pattern, whose `*/` is a folder of any name, or missing."""
    source, given = Path(texts["source"]), {"index": index, "key": key, **texts}
    name = bench.edit.format(**{**given, "stem": source.stem, "name": source.name})
    plain = inside(edits, name.replace("*/", ""), place)
    return next(iter(sorted(Path(edits).glob(name))), plain) if "*/" in bench.edit else plain


def wrong_reference(items, item):
    """The next reference of another item, cyclically, of the same task if there is one; None without."""
    at = items.index(item)
    others = [i for i in items[at + 1 :] + items[:at] if item.ref and i.ref not in (None, item.ref) and i.ref.is_file()]
    return min(others, key=lambda other: other.task != item.task).ref if others else None


NUMBER = r"(?P<score>-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(?P<of>\d+))?"
# what may follow a score: not "2 of the hats", nor "3-4"
END = r"(?![\d.]*\d|\s*(?:/|-|–|to|or)\s*\d)(?(of)|(?![ \t]+(?!stars?\b|points?\b|of 5\b)[a-z]))"


def read_score(value):
    """ "4", 4, "4/5", "**4**", {"score": 4} -> 4. Malformed for anything but a whole number from 1 to 5."""
    value = value.get("score", value) if isinstance(value, dict) else value
    match = re.fullmatch(NUMBER, str(value).strip(" *_`\"'.,"))
    whole = match and match["of"] in (None, "5") and float(match["score"]) in range(1, 6)
    if not whole or isinstance(value, bool):
        raise Malformed(f"{value!r} is not a whole number from 1 to 5")
    return int(float(match["score"]))


def read_answer(text, names):
    """A judge's answer -> {name: score} for all of `names`, by name and not by order; Malformed with the reason.

    JSON first, whatever stands around it; else lines such as "**Visual quality:** 4/5", also out of half a JSON, or a
    heading with the name and "Score: 4" below it.
    """
    for found in reversed(list(json_objects(text))):
        flat = {re.sub(r"[^a-z]+", "_", str(k).lower()).strip("_"): v for k, v in found.items()}
        if all(name in flat for name in names):
            return {name: read_score(flat[name]) for name in names}
    # "consistency_detail" in "Consistency & Detail"
    spelled = {name: r"[\s_]+(?:(?:&|and)[\s_]+)?".join(map(re.escape, name.split("_"))) for name in names}
    heading = rf"[#* \t\d.]*(?:{'|'.join(spelled.values())})"
    parts, scores = re.split(rf"(?im)^(?={heading})", text), {}
    score = rf"(?im)^[ \t*_-]*score[ \t*_]*[:=][ \t*_]*{NUMBER}{END}"
    for name, words in spelled.items():
        given = re.findall(rf"(?im){words}[^\n:=]{{0,60}}[:=][\s*_\"']*{NUMBER}{END}", text)
        own = [part for part in parts if re.match(rf"(?i)[#* \t\d.]*{words}[^\n]*\n", part)]
        given = given or [found for part in own for found in re.findall(score, part)]
        values = {read_score(f"{value}/{of}" if of else value) for value, of in given}
        if len(values) != 1:
            said = " ".join(text.split())[:120]
            raise Malformed(f"{name} is {'given twice' if values else 'missing'} in the answer: {said!r}")
        scores[name] = values.pop()
    return scores


def read_reason(text):
    """Why, from the object that `read_answer` reads."""
    text = spoken(text)
    found = [f["reasoning"] for f in json_objects(text) if isinstance(f.get("reasoning"), str)]
    return found[-1] if found else " ".join(text.split())[:400]


def read_winner(text):
    """A pairwise answer -> {"winner": "1" | "2" | "tie"}."""
    given = re.findall(r"winner[\"'*\s]*[:=][\s\"'*]*(1|2|tie)(?=[\"'*\s]*(?:[,}.;(\n]|$))", text, re.IGNORECASE)
    if len({g.lower() for g in given}) != 1:
        raise Malformed(f"no winner in the answer: {' '.join(text.split())[:120]!r}")
    return {"winner": given[0].lower()}


def enforce(scores):
    """The hierarchy: {name: score} in order -> (the same with none above the first, whether it was broken)."""
    first = next(iter(scores.values()))
    kept = {name: min(score, first) for name, score in scores.items()}
    return kept, kept != scores
