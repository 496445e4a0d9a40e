"""From editing pairs to RefVIE quadruplets (paper, Section 3: 3.7M pairs in, 477K out).

    tables, Ditto-1M, ReCo, OpenVE-3M, Sparkle, RefVIE, another run -> records in shards, exact copies dropped
      -> Score       edit_score    >= 6: good for instruction tuning; >= 8 and a local edit or a new background: go on
      -> Ground      box, mask     of the new object, or of the foreground before a new background
      -> Synthesize  ref_image     the object cut out on white, or the background without its foreground
      -> Verify      verdict       does the reference show what the edit brought? and its feature
      -> Guard                     is it a picture of a benchmark?
      -> what a person rejected leaves; de-duplication over all that is left, best first
      -> ref_video.csv, video.csv, image.csv, refvie/chunk_*.parquet, funnel, statistics, page.html

A record is a dict; a stage adds columns to it or ends it (ledger.py). What a row brings (score, box, mask, reference)
is used; a run read again with other thresholds pays for nothing twice. Another stage: a subclass of Stage in PIPELINE.

The paper's pipeline was never released; prompts and thresholds that it does not state are our own.
"""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from command import number, one_line
from stages import with_settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python curate.py pairs.csv --out out/refvie                                    # no weights, about two seconds a pair
  python curate.py ditto/ openve.csv --out out/refvie --models paper             # the paper's models, one GPU
  python curate.py out/refvie --out out/strict --min-ref-score 9                 # other thresholds, nothing paid twice

A run that was stopped or killed continues when the same command is given again; so does one whose tables have grown.
"""


@dataclass(frozen=True)
class Settings:
    """`--set name=value`. A model is a folder or hub id, BASE+LORA with a LoRA, or http://HOST/v1#NAME of a server."""

    scorer: str = "Qwen/Qwen3-VL-8B-Instruct+EditScore/EditScore-Qwen3-VL-8B-Instruct"
    grounder: str = "Qwen/Qwen3-VL-32B-Instruct"  # the paper's; Qwen/Qwen3-VL-8B-Instruct costs a quarter
    segmenter: str = "facebook/sam3"
    editor: str = "Qwen/Qwen-Image-Edit-2511"  # +LORA of Lightning: 4 steps in place of 40
    verifier: str = "Qwen/Qwen3-VL-32B-Instruct"
    embedder: str = "openai/clip-vit-large-patch14"
    fps: float = 2.0  # frame pairs a second that the scorer sees; the authors' figure
    cascade: float = 4.0  # a middle frame that scores below it ends the record; 0: score all frames of all
    min_side: int = 64  # pixels of a reference
    max_aspect: float = 4.0
    duplicate: float = 0.0  # cosine above which a reference is one already kept; 0: 0.99 (paper), 0.96 (classical)
    shard_rows: int = 1000
    page: int = 400  # records on page.html, half of them rejected ones
    seed: int = 0


MODELS = ("scorer", "grounder", "segmenter", "editor", "verifier", "embedder")


def parse_arguments(argv=None):
    defaults = "\n".join(f"  {f.name}={f.default}" for f in dataclasses.fields(Settings))
    parser = argparse.ArgumentParser(
        description="Make reference-guided training data (RefVIE quadruplets) out of editing pairs.",
        epilog=f"{EXAMPLES}\n--set, with defaults:\n{defaults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, score = parser.add_argument, {"type": number(0, 10, float), "metavar": "0..10"}
    add("pairs", nargs="+", metavar="PAIRS", help="tables (.csv .parquet .json .jsonl), folders of sets, runs' --out")
    add("--out", metavar="DIR", required=True, help="the ledger and the result; the same again resumes")
    add("--base-path", metavar="DIR", help="what paths in the tables start from (default: the table's folder)")
    add("--models", choices=("classical", "paper"), default="classical", help="default %(default)s")
    add("--min-score", default=6.0, **score, help="for instruction tuning (default %(default)s)")
    add("--min-ref-score", default=8.0, **score, help="to get a reference (default %(default)s)")
    add("--guard", metavar="DIR", help="pictures and clips of a benchmark: what resembles one is rejected")
    add("--rejects", metavar="FILE", help="rejects.json of page.html: these records leave the result")
    add("--max-bad", type=number(0, 1, float), default=0.2, metavar="0..1", help="stop when more fail, at least 20")
    add("--retry-failed", action="store_true", help="try again what failed: no network, no memory, a missing file")
    add("--engine", choices=("local", "ray"), default="local", help="ray: many machines; pip install 'ray[data]'")
    add("--workers", type=number(1, 9999), default=2, help="records at a time; with ray also actors (default 2)")
    add("--device", metavar="NAME", help="default: cuda if there is one")
    add("--prompts", metavar="FILE", help="EditScore's vie_prompts.py (default: from pip install editscore)")
    add("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE", help="see below")
    args = parser.parse_args(argv)
    try:
        vars(args).update(dataclasses.asdict(with_settings(Settings(), args.set)))
    except ValueError as error:
        parser.error(str(error))
    if not (min(args.fps, args.min_side, args.shard_rows, args.page) > 0 and args.max_aspect >= 1):
        parser.error("--set: fps, min_side, shard_rows and page are above 0, max_aspect is 1 or more")
    args.duplicate = args.duplicate or (0.99 if args.models == "paper" else 0.96)
    return args


if __name__ == "__main__":
    parse_arguments()  # --help answers before torch is there

import base64
import errno
import importlib
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from curators import KINDS, Rejected, box_of, ended
from curators.pairs import Reader, tables_of
from curators.result import read_rejects, write_results
from data import FILES, inside, read_reference
from ledger import Ledger, appended, is_open, locked, parsed
from media import measure, read_image, write_image, write_text
from parallel import pick_device, rank_and_world
from vlm import Barred, Malformed, TryAgain, has_secret

# one record's fault, not the run's
FORESEEN = (ValueError, OSError, RuntimeError, ArithmeticError, LookupError, TypeError, TryAgain, Malformed)
GPUS = {"classical": 0, "paper": 1}  # of an actor of Ray
FREE = "pairs out engine workers retry_failed device rejects page max_bad set".split()  # what no record depends on


def read_all(args, ledger):
    """The tables into shards of records, once; rows that were appended since become more shards."""
    free = FREE if args.models == "paper" else [*FREE, *MODELS]
    settings = {key: value for key, value in vars(args).items() if key not in free}
    told = ledger.told or {"shards": [], "bases": [], "settings": settings}
    for key in settings:
        if told["settings"].get(key) != settings[key]:
            raise ValueError(
                f"{ledger.out} was made with {key} {told['settings'].get(key)!r}, not {settings[key]!r}: "
                f"give another --out; {ledger.out} as its input keeps what was paid for"
            )
    tables = [file for source in args.pairs for _, file, _ in tables_of(source)]
    state = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in tables}
    if told.get("state") != state:
        sizes = list(told["shards"])
        known = (row["id"] for shard in range(len(sizes)) for row in ledger.rows("read", shard))
        reader = Reader(args, told["bases"], known)
        rows = iter(tqdm(reader, desc="read", unit=" records", mininterval=1))
        while shard := list(islice(rows, args.shard_rows)):
            ledger.write("read", len(sizes), shard)
            sizes.append(len(shard))
        if gone := sum(sizes) - reader.number:
            raise ValueError(f"{gone} records of {ledger.out} are gone from the tables, or changed: give another --out")
        print(f"kinds       {reader.unknown} of {reader.number} records are of unknown kind: neither type nor keyword")
        told |= {"shards": sizes, "bases": reader.bases, "state": state, "copies": reader.copies}
    write_text(ledger.folder / "read.json", json.dumps(told | {"stages": ledger.stages[1:-1]}))


def load_models(args):
    return getattr(importlib.import_module(f"curators.{args.models}"), args.models.capitalize())(args)


class Budget:
    """How many records may fail: --max-bad of those tried, counted over all stages of this process."""

    def __init__(self, most):
        self.most, self.tried, self.bad = most, 0, 0

    def add(self, row):
        self.tried += 1
        self.bad += (failed := row.get("status") == "failed")
        if failed and self.bad >= 20 and self.bad > self.most * self.tried:
            raise ValueError(
                f"{self.bad} of {self.tried} records failed, more than --max-bad {self.most:g} allows; the last in "
                f"`{row['stage']}`: {row['reason']}; mend that and add --retry-failed, or raise --max-bad"
            )


class Stage:
    """A step of all records, from ledger to ledger. `one` gives a record's new columns or raises Rejected; several
    threads call it. Models are loaded for the first record that asks: a run read again may ask nothing."""

    def __init__(self, args, ledger, budget):
        self.args, self.ledger, self.budget, self.bases = args, ledger, budget, ledger.told["bases"]
        self.name, self.loaded, self.lock = type(self).__name__.lower(), None, threading.Lock()
        self.setup()

    def setup(self):
        """Load what `one` needs besides `models`."""

    def one(self, row):
        raise NotImplementedError

    def run(self, shard, progress=lambda count: None):
        """A shard from wherever it was; each record is written down as soon as it is done. What ends the run, Ctrl-C
        too, is raised after all that were begun are done: they may have been paid for. A second Ctrl-C leaves them."""
        before = self.ledger.stages[self.ledger.stages.index(self.name) - 1]
        rows = [row for row in self.ledger.rows(before, shard) if is_open(row)]
        over, writing = threading.Event(), threading.Lock()
        with appended(self.ledger.path(self.name, shard, ".part")) as (lines, write):
            done = {row["id"]: row for row in lines}
            for row in lines:
                self.budget.add(row)
            progress(len(done))
            waiting = iter([row for row in rows if row["id"] not in done])

            def work():
                try:
                    while not over.is_set() and (row := next(waiting, None)):
                        found = self.guarded(row)
                        with writing:
                            write(found)
                            done[row["id"]] = found
                            progress(1)
                            self.budget.add(found)
                except BaseException:
                    over.set()
                    raise

            pool = ThreadPoolExecutor(self.args.workers)
            try:
                for worker in wait([pool.submit(work) for _ in range(self.args.workers)]).done:
                    worker.result()
            except KeyboardInterrupt:
                print("\nnote        records under way are finished; Ctrl-C once more leaves them", file=sys.stderr)
                raise
            finally:
                over.set()
                pool.shutdown()
        self.ledger.write(self.name, shard, [done[row["id"]] for row in rows])

    def guarded(self, row):
        try:
            return {"id": row["id"], **self.one(row)}
        except Rejected as reason:
            return {"id": row["id"], **reason.found, **ended(self.name, "rejected", reason)}
        except FORESEEN as error:
            full = (getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in (error, error.__context__))
            if isinstance(error, Barred) or any(full):  # no record's fault; MediaErrors have theirs as context
                raise
            return {"id": row["id"], **ended(self.name, "failed", error)}

    @property
    def models(self):
        with self.lock:
            if self.loaded is None:
                try:
                    models = load_models(self.args)
                    models.setup(self.name)
                except FORESEEN as error:  # loading takes minutes: those that wait need not fail one by one
                    models = Barred(f"{self.name}: {error}")
                self.loaded = models
        if isinstance(self.loaded, Barred):
            raise self.loaded
        return self.loaded

    def file(self, row, key):
        """A record's file: a clip below its base, a mask or reference below --out."""
        return inside(self.args.out if key in ("mask", "ref_image") else self.bases[row["base"]], row[key], row["id"])

    def clips(self, row):
        return self.file(row, "src_video"), self.file(row, "tgt_video")

    def place(self, folder, row, suffix):
        """(name below --out, path) of a record's picture."""
        name = f"{folder}/{row['id'][:2]}/{row['id']}{suffix}"
        path = Path(self.args.out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return name, path


class Score(Stage):
    """How well the edit was made, 0..10: all frames' scores, their mean, and what the record is good for."""

    def one(self, row):
        found = {}
        if "frames" not in row:  # a missing source is no good for tuning either, whoever scored the pair
            found["frames"] = [measure(path)[0] for path in self.clips(row)][1]
        if "edit_score" not in row:
            found["frame_scores"] = [round(s, 3) for s in self.models.score(*self.clips(row), row)]
            found["edit_score"] = round(sum(found["frame_scores"]) / len(found["frame_scores"]), 3)
        score, kind = (row | found)["edit_score"], row["kind"]
        found["tuning"] = score >= self.args.min_score
        if not found["tuning"]:
            raise Rejected(f"score {score:g} is below {self.args.min_score:g}", found)
        if kind not in KINDS and not (kind == "unknown" and self.args.models == "paper"):  # a grounder will say it
            raise Rejected(f"no reference for {kind} edits", found)
        if score < self.args.min_ref_score:
            text = f"score {score:g} is below {self.args.min_ref_score:g}, enough for instruction tuning only"
            raise Rejected(text, found)
        return found


class Ground(Stage):
    """Where the new object is, or the foreground before a new background: box, mask, key frame."""

    def one(self, row):
        if row.keys() & {"mask", "given_ref_image", "ref_image"}:
            return {}
        if isinstance(row.get("given_mask"), str) and self.file(row, "given_mask").is_file():
            mask, key, more = read_image(self.file(row, "given_mask"))[..., 0] > 127, 0, {}
            box = row.get("box") or (box_of(mask) if mask.any() else [0, 0, 1, 1])
        else:
            box, mask, key, more = self.models.ground(*self.clips(row), row)
        area = mask.float().mean().item()
        if (kind := more.get("kind", row["kind"])) not in KINDS:
            raise Rejected(f"no reference for {kind} edits", more)
        if area < 2e-4:
            raise Rejected("the mask is empty", more)
        if area > 0.8:
            raise Rejected(f"the mask covers {area:.0%} of the frame", more)
        name, path = self.place("masks", row, ".png")
        write_image(path, mask[..., None].expand(-1, -1, 3).to(torch.uint8) * 255)
        return {"box": [round(v, 4) for v in box], "mask": name, "key": key, **more}


class Synthesize(Stage):
    """The reference picture, a JPEG; extreme shapes and small ones are dropped."""

    def one(self, row):
        if "ref_image" in row:
            self.check(*row["ref_size"])
            return {}
        name, path = self.place("refs", row, ".jpg")
        if "given_ref_image" in row:
            given = row["given_ref_image"]
            image = read_reference(str(self.file(row, "given_ref_image")) if isinstance(given, str) else tuple(given))
        else:
            mask = read_image(self.file(row, "mask"))[..., 0] > 127
            image = self.models.synthesize(*self.clips(row), mask, row)
        self.check(*image.shape[:2])
        write_image(path, image)
        return {"ref_image": name, "ref_size": list(image.shape[:2])}

    def check(self, height, width):
        shape = f"the reference has {width}x{height} pixels"
        if min(height, width) < self.args.min_side:
            raise Rejected(f"{shape}, a side below {self.args.min_side}")
        if max(height / width, width / height) > self.args.max_aspect:
            raise Rejected(f"{shape}, an aspect above {self.args.max_aspect:g}")


class Verify(Stage):
    """Do the reference and the edited clip show the same? And the reference's feature."""

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
        return found


class Guard(Stage):
    """With --guard: does the reference or the first frame resemble a picture of a benchmark?"""

    def setup(self):
        self.files = guard_files(self.args.guard) if self.args.guard else []
        theirs = [
            self.models.embed([read_image(file)])[0] for file in tqdm(self.files, "guard", disable=not self.files)
        ]
        self.theirs = torch.stack(theirs) if theirs else None  # (files, D)

    def one(self, row):
        if self.theirs is None:
            return {}
        shown = self.models.embed([read_image(self.file(row, "src_video"))])[0]
        kept = torch.tensor(unpack(row["feature"])).to(shown)  # of the reference, since `Verify`
        for own in (shown, kept):
            near = self.theirs @ own
            if near.max() > self.args.duplicate:
                name = self.files[near.argmax()].relative_to(self.args.guard)
                raise Rejected(f"resembles {name} of the benchmark", {"tuning": False})
        return {}


TEXTS = ".txt .md .csv .tsv .json .jsonl .yaml .yml .parquet .html .py .zip".split()


def guard_files(folder):
    """The pictures and clips of a benchmark: every file that is no text."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix.lower() not in TEXTS]
    if not files:
        raise ValueError(f"--guard {folder}: no pictures or clips there")
    return files


PIPELINE = [Score, Ground, Synthesize, Verify, Guard]  # another stage: one line here; all else is derived from the list


def pack(feature):
    """(D,) -> text: float16, which moves a cosine by less than 0.0005."""
    return base64.b64encode(feature.half().cpu().numpy().tobytes()).decode()


def unpack(text):
    return np.frombuffer(base64.b64decode(text), dtype=np.float16)


def run_local(args, ledger, rank, world):
    """Stage after stage, so that one stage's models are loaded at a time; this process has every world-th shard."""
    sizes, threads, budget = ledger.told["shards"], torch.get_num_threads(), Budget(args.max_bad)
    torch.set_num_threads(max(1, threads // args.workers))  # records share the cores
    for name, make in zip(ledger.stages[1:], PIPELINE):
        if todo := ledger.todo(name, range(rank, len(sizes), world)):
            stage, total = make(args, ledger, budget), sum(sizes[shard] for shard in todo)
            with tqdm(total=total, desc=name, unit=" records", mininterval=1, disable=rank > 0) as bar:
                for shard in todo:
                    stage.run(shard, bar.update)
            stage = None  # its models go before others come
            torch.cuda.empty_cache()
    torch.set_num_threads(threads)


class Actor:
    """What Ray Data calls, with the numbers of shards."""

    def __init__(self, make, *known):
        self.stage = make(*known)

    def __call__(self, batch):
        for shard in self.stage.ledger.todo(self.stage.name, batch["shard"].tolist()):
            self.stage.run(shard)
        return batch


def run_ray(args, ledger):
    """One stage at a time, a pool of up to --workers actors; all machines see --out and the data under one path."""
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray Data; pip install 'ray[data]'") from None
    theirs, gpus = ray.is_initialized(), GPUS[args.models]
    try:
        for name, make in zip(ledger.stages[1:], PIPELINE):
            if shards := ledger.todo(name, range(len(ledger.told["shards"]))):
                if not ray.is_initialized():
                    ray.init(log_to_driver=False, logging_level="ERROR")
                data = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
                pool = {"num_gpus": gpus, "num_cpus": 1 if gpus else 0.25, "batch_size": 1}
                pool |= {"concurrency": (1, min(args.workers, len(shards)))}
                data = data.map_batches(Actor, fn_constructor_args=(make, args, ledger, Budget(args.max_bad)), **pool)
                for _ in tqdm(data.iter_batches(batch_size=1), total=len(shards), desc=f"ray {name}", unit="shard"):
                    pass
    except ray.exceptions.RayError as error:
        raise ValueError(f"--engine ray: {getattr(error, 'cause', None) or error}") from None
    finally:
        if not theirs:
            ray.shutdown()


@torch.no_grad()
def deduplicate(features, order, threshold, block=2048, device="cpu"):
    """Which records stand for which: features (N, D) of length 1, in any order; `order` (N,) best first.

    A record goes only if it is closer than `threshold` to one that is kept, so a chain of small steps does not collapse
    into its best end. -> of each record the kept one it belongs to (itself if kept), int64 (N,), and its cosine to the
    nearest kept one before it, float32 (N,), -1 without one. Blocks against blocks, N^2 D FLOP if all are kept.
    """
    belongs, nearest, kept = np.arange(len(order)), np.full(len(order), -1.0, np.float32), []
    for start in tqdm(range(0, len(order), block), desc="deduplicate", unit="block", mininterval=1):
        rows = order[start : start + block]
        own = features[rows].to(device).float()  # (block, D)
        best, place = nearest[rows], belongs[rows]
        for others, theirs in kept:
            value, index = (x.cpu().numpy() for x in (own @ theirs.T).max(dim=1))
            best, place = np.maximum(value, best), np.where(value > best, others[index], place)
        among, new = (own @ own.T).cpu().numpy(), []  # new: kept of this block
        for i in range(len(rows)):
            if new:
                j = new[int(among[i, new].argmax())]
                if among[i, j] > best[i]:
                    best[i], place[i] = among[i, j], rows[j]
            if best[i] <= threshold:
                new.append(i)
                place[i] = rows[i]
        belongs[rows], nearest[rows] = place, best
        if new:
            kept.append((rows[new], own[new]))
    return belongs, nearest


def deduplicate_all(args, ledger, rejects):
    """The last step, over all shards: what a person rejected leaves, a benchmark's pictures, copies of a kept one."""
    told, path, shards = ledger.told, ledger.folder / "deduplicate/made.json", range(len(ledger.told["shards"]))
    made_with = {"rejects": rejects, "shards": told["shards"], "stages": told["stages"]}
    if not ledger.todo("deduplicate", shards) and path.is_file() and parsed(path.read_text()) == made_with:
        return
    for old in (ledger.folder / "deduplicate", ledger.out / "refvie"):
        shutil.rmtree(old, ignore_errors=True)
    opened = lambda shard: (row for row in ledger.rows(ledger.stages[-2], shard) if is_open(row))
    ids, scores, features, decided = [], [], [], {}
    for row in (row for shard in shards for row in opened(shard)):
        if row["id"] in rejects:
            decided[row["id"]] = {"tuning": False, **ended("person", "rejected", rejects[row["id"]])}
        else:
            ids.append(row["id"])
            scores.append(row["edit_score"])
            features.append(unpack(row["feature"]))
    if ids:
        matrix, order = torch.from_numpy(np.stack(features)), np.argsort(-np.array(scores), kind="stable")
        belongs, nearest = deduplicate(matrix, order, args.duplicate, device=pick_device(args.device))
        for key, kept, cosine in zip(ids, (ids[i] for i in belongs), nearest.tolist()):
            same = ended("deduplicate", "rejected", f"the reference is that of {kept} again (cosine {cosine:.3f})")
            status = {"status": "kept"} if kept == key else same
            decided[key] = {"cluster": kept, "nearest": round(cosine, 4), **status}
    for shard in shards:
        ledger.write("deduplicate", shard, [{"id": row["id"], **decided[row["id"]]} for row in opened(shard)])
    write_text(path, json.dumps(made_with))


def main(argv=None):
    args = parse_arguments(argv)
    if given := [name for name in MODELS if has_secret(getattr(args, name))]:
        raise ValueError(f"--set {given[0]}: no user, password or query in an address; put the key into OPENAI_API_KEY")
    rank, world = rank_and_world()
    if world > 1 and args.engine == "ray":
        raise ValueError("--engine ray finds its own processes: start it without torchrun")
    args.out = str(Path(args.out).resolve())
    ledger = Ledger(args.out, [*(stage.__name__.lower() for stage in PIPELINE), "deduplicate"])
    with locked(ledger.folder / f"lock.{rank}"):
        meet = lambda: None
        if world > 1:  # torchrun ends all when one dies
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=20))
            meet = torch.distributed.barrier
        rejects = read_rejects(args.rejects)
        if rank == 0:  # fail before days of work, not after them
            for path in guard_files(args.guard) if args.guard else ():
                read_image(path)
            read_all(args, ledger)
            shards = range(len(ledger.told["shards"]))
            for shard in shards if args.retry_failed else ():
                ledger.reopen_failed(shard)
            if todo := [stage for stage in ledger.stages[1:-1] if ledger.todo(stage, shards)]:
                load_models(args).preflight(todo)  # a gated model is found out now, not after days of scoring
        meet()
        run_ray(args, ledger) if args.engine == "ray" else run_local(args, ledger, rank, world)
        meet()
        if rank == 0:
            deduplicate_all(args, ledger, rejects)
            report(args, *write_results(args, ledger, rejects))


def report(args, funnel, common):
    written = [name for name in (*FILES.values(), "refvie", "statistics.json") if (Path(args.out) / name).exists()]
    print(f"{funnel.markdown()}\nwrite       {args.out}: {', '.join(written)}, funnel.md; look at page.html")
    if funnel.failed == funnel.total:
        raise ValueError(f"not one of {funnel.total} records could be worked on; see above why; then --retry-failed")
    if funnel.kinds:
        where = f"--ref-csv {shlex.quote(args.out)}/ref_video.csv --base-path {shlex.quote(common)}"
        print(f"train       python train.py --stage 3 {where} --data DIR")
    else:
        print("train       nothing: not one quadruplet was kept; the table above says why")


def run():
    """main, with every foreseeable failure as one line on stderr and a non-zero exit code."""
    with one_line("curate.py", "stopped; the same command goes on from here"):
        main()


if __name__ == "__main__":
    run()
