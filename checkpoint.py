"""The folder of a training run: what is written to it, and what is made of it.

    RUN/config.json  metrics.jsonl  bad.jsonl  shapes.jsonl  samples/
        step-NNNNNN/{weights,ema}.safetensors, state/, train.json

`Checkpoints` writes while training goes on; `open_run` finds where to resume; `export` and `export_lora` make weights
for others of it; `plot_losses` draws it.
"""

import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from load import began_with, find_checkpoint, only_weights, read_json, released_name, step_of, valid_checkpoints
from lora import merge_lora, write_lora
from media import write_text
from model import KiwiEdit, read_weights
from report import plot


@contextmanager
def locked(out, ranks, shared=False):
    """Hold the run's folder: a requeued job that starts while the old one still runs would mix with it.

    shared: a cache, which several may fill."""
    told = file = None
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            told = f"--out {out}: another process works there; wait, or give another folder"
        except OSError:  # a file system without locks
            pass
    if told := ranks.from_first(told):
        raise ValueError(told)
    try:
        yield
    finally:
        file and file.close()


def open_run(args, ranks):
    """The checkpoint to resume from, or None. ValueError where one would be written over."""
    out = Path(args.out)
    last = ranks.from_first([None, *valid_checkpoints(out)][-1])
    if args.resume is None and last:
        raise ValueError(f"{out} has checkpoints already; give --resume auto to continue, or another --out")
    own = find_checkpoint(Path(args.weights)) if args.weights and Path(args.weights).exists() else None
    if own and own.parent.resolve() == out.resolve():  # noted as what the run began with, it would lead in a circle
        raise ValueError(f"--weights {args.weights}: is --out itself; give what this run began with "
                         f"(--weights in {out}/config.json)")  # fmt: skip
    if args.resume in (None, "auto"):
        return last
    checkpoint = checkpoint_of(Path(args.resume), "--resume")
    if last and step_of(last) > read_json(checkpoint / "train.json")["counts"]["step"]:
        raise ValueError(f"{out} has later checkpoints than {checkpoint}: move them away, or give another --out")
    return checkpoint


class Checkpoints:
    """Folders step-NNNNNN of a run: weights.safetensors (what the stage trains, released names), ema.safetensors,
    state/ (moments and the like, torch.distributed.checkpoint), train.json (counters, what shapes the course).

    A save copies to memory and returns; a thread writes to a hidden folder and renames it when whole. So every
    step-NNNNNN is complete, whenever the run was killed.
    """

    def __init__(self, out, keep, ranks):
        self.out, self.keep, self.ranks = out, keep, ranks
        self.thread, self.written = ThreadPoolExecutor(1), None
        self.last = None  # the newest that is on disk, or will be
        if ranks.first:
            for left in out.glob(".step-*"):  # of a run that was killed
                shutil.rmtree(left)
        ranks.barrier()

    def path(self, step):
        return self.out / f"step-{step:06d}"

    def save(self, train, weights, state, ema):
        """train: JSON of train.json; weights, ema: {name: parameter or shard}; state: {part: {name: tensor}}."""
        self.wait()
        self.last = self.path(train["counts"]["step"])
        files = {"weights": self.whole(weights)} | ({"ema": self.whole(weights | ema)} if ema else {})
        state = {
            part: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            for part, tensors in state.items()
        }
        self.written = self.thread.submit(self.write, self.last, train, files, state)

    def whole(self, tensors):
        """Full copies in memory on the first rank, by released names; nothing on the others."""
        found = {}
        for name, p in tensors.items():
            p = p.detach()
            p = p.full_tensor() if hasattr(p, "full_tensor") else p
            if self.ranks.first:
                found[released_name(name)] = p.to("cpu", copy=True).contiguous()
        return found

    def write(self, path, train, files, state):
        if self.ranks.device.type == "cuda":  # a new thread begins on the first GPU
            torch.cuda.set_device(self.ranks.device)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            writer = dcp.FileSystemWriter(temporary / "state")
            dcp.save(state, storage_writer=writer, process_group=self.ranks.background)
            if not self.ranks.first:
                return
            for name, tensors in files.items():
                save_file(tensors, temporary / f"{name}.safetensors")
                (temporary / f"{name}.safetensors").chmod(0o644)  # safetensors makes them 0600
            (temporary / "train.json").write_text(json.dumps(train, indent=1))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        if path.exists():  # not whole, or the run would have gone on from it
            shutil.rmtree(path)
        os.replace(temporary, path)
        for old in valid_checkpoints(self.out)[: -self.keep]:
            hidden = old.with_name(f".{old.name}.old")
            os.replace(old, hidden)
            shutil.rmtree(hidden)

    def load(self, state, checkpoint):
        """Fill {part: {name: tensor}} from a checkpoint, however many ranks wrote it. ValueError if it is damaged."""
        try:
            dcp.load(state, checkpoint_id=checkpoint / "state")
        except (CheckpointException, RuntimeError, AssertionError) as error:
            raise ValueError(f"{checkpoint}/state: cannot be read ({reason(error)}); resume from an older checkpoint, "
                             "or begin anew with --weights") from None  # fmt: skip

    def wait(self):
        """Raise what went wrong in the thread."""
        if error := self.written and self.written.exception():
            raise OSError(f"{self.out}: the checkpoint cannot be written ({reason(error)}); disk full?") from error


def reason(error):
    """The last line of an error's text: the others are a traceback of another thread or rank."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def begin_run(args, stage, model, out, step):
    """Write config.json: what the run was asked for, resolved; paths that it began with start at its folder. Cut from
    the logs what will be trained again after `step`, and a last line that is not whole."""
    typed = {name: Path(vars(args)[name]) for name in ("weights", "base", "qwen") if vars(args)[name]}
    began = {name: path for name, path in typed.items() if path.exists() and not path.is_absolute()}
    config = {"format": "nanokiwi run", "args": vars(args), "stage": asdict(stage), "model": asdict(model.config),
              "began": {name: os.path.relpath(p.resolve(), out.resolve()) for name, p in began.items()}}  # fmt: skip
    write_text(out / "config.json", json.dumps(config, indent=1))
    for name, last in (("metrics.jsonl", step or -1), ("bad.jsonl", step)):  # the metrics of step 0 come anew
        if (out / name).is_file():
            lines = [line for line in (out / name).read_text().split("\n")[:-1] if json.loads(line)["step"] <= last]
            write_text(out / name, "".join(line + "\n" for line in lines))


def checkpoint_of(run, flag):
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"{flag} {run}: not the folder of a run or of a checkpoint")
    return checkpoint


def export(run, folder, base=None, qwen=None):
    """The last checkpoint of a run (or the one given, or its ema.safetensors) as a whole model, LoRA merged in float32.
    base, qwen: of what the run began with, where that has moved."""
    only_weights(folder)
    checkpoint = checkpoint_of(run, "--export")
    begun = began_with(checkpoint.parent)
    starts = [start for start in (base, begun["weights"], begun["base"], begun["qwen"]) if start]
    if Path(folder).resolve() in [Path(start).resolve() for start in starts]:
        raise ValueError(f"--out {folder}: {run} lies over these weights and needs them as they are; give another")
    config, files = read_weights(run if run.is_file() else checkpoint, base, qwen)
    model = KiwiEdit.with_weights(config, files, "cpu", torch.float32)[0]
    merge_lora(model)
    model.save(folder)
    print(f"{folder}, in float32")


def export_lora(run, path, style):
    """The DiT's LoRA of a run's last checkpoint, or of the file given, in a spelling that others read."""
    checkpoint = checkpoint_of(run, "--export-lora")
    write_lora(run if run.is_file() else checkpoint / "weights.safetensors", path, style)
    student = read_json(checkpoint / "train.json")["course"]["student"]
    steps = f" --re-noise {','.join(f'{t:g}' for t in student)}" if student else ""
    print(f'{path}: {style}; python sample.py in.mp4 "..." --lora {path}{steps}')


def plot_losses(run):
    """Draw metrics.jsonl as loss.svg: losses of training, as a running mean, and of the held-out rows."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --plot takes the folder of a run")
    series = {}
    for line in path.read_text().split("\n")[:-1]:  # the last may be half written
        line = json.loads(line)
        for name, value in line.items():
            if value is not None and (name == "loss" or name.startswith(("loss_", "val"))):
                series.setdefault(name, []).append((line["step"], value))
    if "loss" not in series:
        raise ValueError(f"{path}: has no losses yet")
    shown = {name: points if name.startswith("val") else running_mean(points) for name, points in series.items()}
    write_text(run / "loss.svg", str(plot(shown, run.name, "step")))
    print(run / "loss.svg")


def running_mean(points, most=500):
    """At most so many (step, loss), each with the mean of the losses around it."""
    mean, found, share = points[0][1], [], min(1, 20 / len(points))
    for step, loss in points:
        mean += (loss - mean) * share
        found.append((step, mean))
    return found[:: -(-len(found) // most)] + found[-1:]
