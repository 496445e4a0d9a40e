"""Train Kiwi-Edit: three stages of the paper on many GPUs, or a LoRA on your own clips on one card.

    tables -> batches of one shape, decoded by workers or taken from a cache (data.py)
      -> latents of target, source, reference; requests, or their cached contexts
      -> noise and a timestep from the sample's number -> KiwiEdit.forward -> loss -> gradients of the global batch
      -> AdamW -> every N steps a checkpoint, written while training goes on

Paper, Section 5.1: the MLLM learns to speak to the DiT, both learn to edit, both learn references. A row of `STAGES` says
what a stage trains. Randomness belongs to samples, by their number, and not to processes: one process, DDP, FSDP2,
sequence parallelism and a run that was killed and resumed give the same losses. The release cannot resume, takes one
sample at a time and replaces broken ones in silence.
"""

import argparse
import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from ast import literal_eval
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python train.py --preset lora --data MY --out runs/mine                    # a LoRA on your own clips, one card
  python train.py --preset lora --dry-run --cache c --quantise fp8           # what it needs, without weights or data
  python train.py --config nano --stage 1 --data data/nano --weights weights/nano --out runs/1 --set steps=200
  torchrun --nproc-per-node 8 train.py --stage 2 --data DIR --weights runs/1 --out runs/2 --resume auto
  python train.py --resume runs/2                                            # go on, with the run's own arguments
  python train.py --export-lora runs/mine --format comfy --out mine.safetensors

where training starts (--weights): a run (its last checkpoint), a checkpoint folder, a folder that nanoKiwi saved, the
  released diffusers layout, or a released training checkpoint (.safetensors) over --base and --qwen. Without it: --base
  and --qwen alone (nano: weights/nano, or random), or, with --init random, nothing but --qwen's config and tokenizer.
several processes (torchrun): data parallel by --parallel; --sp N of them share each sequence.
watch a run by metrics.jsonl, TensorBoard if installed, and `python train.py --plot RUN` (an SVG).
"""
ALIGN = ("lora", "mllm.image_queries", "mllm.connector")
EDIT = (*ALIGN, "mllm.video_queries", "dit", "source_embedder")
REFER = (*EDIT, "mllm.ref_queries", "mllm.ref_connector", "ref_embedder")
SPEAK = tuple(part for part in REFER if part.startswith(("lora", "mllm.")))  # what `--mllm` adds to a LoRA on the DiT
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DIT_LORA = ("q", "k", "v", "o", "ffn.0", "ffn.2")
NANO = Path(__file__).parent / "weights" / "nano"
NANO_MLLM = NANO / "mllm"  # sizes and tokenizer of a small Qwen2.5-VL
HELD_OUT = 16  # rows of each table of --val
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16


@dataclass(frozen=True)
class Stage:
    """What a stage trains, on what, and how (paper, Section 5.1; FACTS.md, "Training")."""

    trains: tuple[str, ...]  # parts by name; "lora" is the language model's, "dit.lora" the DiT's
    image: int = 1  # shares of the mixture
    video: int = 0
    ref: int = 0
    source: bool = True  # whether the DiT sees the source latents
    pixels: tuple[int, ...] = (960_000,)  # at most so many, each for an equal share of the steps
    frames: int = 81
    steps: int = 10_000
    global_batch: int = 128  # samples of one update
    batch: int = 1  # samples of one forward
    lora_rank: int = 64
    lora_targets: tuple[str, ...] = ATTENTION
    dit_lora_rank: int = 0
    dit_lora_alpha: float = 0.0  # alpha / rank scales the learning rate of B, see `make_optimizers`; 0: the rank
    lr: float = 2e-5
    warmup: int = 100  # steps
    schedule: str = "constant"  # or "cosine", "linear": down to nothing
    optimizer: str = "adamw"  # or "muon": orthogonalised updates for matrices, AdamW for the rest
    weight_decay: float = 0.01  # of matrices and convolutions
    beta2: float = 0.999
    clip: float = 1.0  # of the gradient's norm; 0: none
    shift: float = 5.0
    weighting: str = "bell"  # of the loss over the timesteps, or "none" (FlowMatch)
    balance: bool = False  # changed and kept places count by the roots of their shares (balance_weights)
    ref_shrink: float = 0.7  # a reference is shrunk by a random factor between this and 1
    ema: float = 0.0  # decay of the averaged weights; 0: none

    def __post_init__(self):
        for name, allowed in (
            ("schedule", ("constant", "cosine", "linear")),
            ("optimizer", ("adamw", "muon")),
            ("weighting", ("bell", "none")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Stage.{name}: {value!r}, expected one of {', '.join(allowed)}")
        for name in ("steps", "global_batch", "batch", "frames", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage.{name}: {getattr(self, name)}, expected at least 1")
        wrong = {
            f"pixels: {min(self.pixels)}, expected at least 1": min(self.pixels) < 1,
            f"clip: {self.clip}, expected the largest norm of a gradient, or 0 for none": not self.clip >= 0,
            f"ref_shrink: {self.ref_shrink}, expected a factor above 0, at most 1": not 0 < self.ref_shrink <= 1,
            f"ema: {self.ema}, expected 0, or the decay of an average, below 1": not 0 <= self.ema < 1,
            f"global_batch: {self.global_batch} is not a multiple of batch {self.batch}": self.global_batch
            % self.batch,
            "balance: needs the source, which this stage hides from the DiT": self.balance and not self.source,
            "trains: dit.lora needs a rank; --set dit_lora_rank=32": "dit.lora" in self.trains
            and self.dit_lora_rank < 1,
            f"image, video, ref: {self.ratio}, expected shares of at least 0": min(self.ratio.values()) < 0,
            "image, video, ref: all 0, so there is nothing to train on": not any(self.ratio.values()),
        }
        if found := next((text for text, holds in wrong.items() if holds), None):
            raise ValueError(f"Stage.{found}")

    @property
    def ratio(self):
        return {"image": self.image, "video": self.video, "ref": self.ref}

    @property
    def batches(self):
        """Forwards of one update, over all ranks."""
        return self.global_batch // self.batch

    @property
    def trains_mllm(self):
        return any(part.startswith(("lora", "mllm")) for part in self.trains)


LORA = Stage(("dit.lora",), 1, 1, 1, pixels=(409_600,), frames=49, steps=2_000, global_batch=4, dit_lora_rank=32,
             lr=1e-4, warmup=20)  # fmt: skip
STAGES = {
    "paper": {
        1: Stage(ALIGN, source=False, steps=30_000),
        2: Stage(EDIT, 1, 1, pixels=(360_000, 960_000)),
        3: Stage(REFER, 2, 1, 1),
    },
    # One sample of each kind of data on each of, here, 8 GPUs; gradients are not clipped. Stage 2 is 20K steps at each
    # size; stage 3 for references alone: --set image=0 video=0 steps=30000 global_batch=8
    "released": {
        1: Stage(ALIGN, source=False, pixels=(1024 * 1024,), lr=1e-5, warmup=0, clip=0, steps=30_000, global_batch=8),
        2: Stage(EDIT, 1, 1, pixels=(600 * 600, 720 * 1280), lr=1e-5, warmup=0, clip=0, steps=40_000, global_batch=16),
        3: Stage(REFER, 1, 1, 1, pixels=(720 * 1280,), lr=5e-6, warmup=0, clip=0, steps=15_000, global_batch=24),
    },
    "lora": dict.fromkeys((1, 2, 3), LORA),  # your own clips, in whichever of the three tables are there
}


def choose_stage(args):
    """The stage asked for, with its settings. The release trains the 14B model's DiT by LoRA, on shorter clips (with half
    the learning rate at 720p), and gives its language model a larger LoRA."""
    stage = STAGES[args.preset][args.stage]
    if args.preset == "released" and args.config == "wan21_14b":
        stage = replace(stage, lora_rank=256, lora_targets=(*ATTENTION, "gate_proj", "down_proj", "up_proj"))
        if args.stage > 1:
            trains = tuple("dit.lora" if part == "dit" else part for part in stage.trains)
            stage = replace(stage, trains=trains, dit_lora_rank=128, frames=49)
    if args.mllm:
        stage = replace(stage, trains=tuple(dict.fromkeys((*stage.trains, *SPEAK))))
    return with_settings(stage, [s for s in args.set if "." not in s.split("=")[0]])


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Train Kiwi-Edit: a LoRA on your own clips, or the paper's three stages.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    flag = lambda name, default, metavar, words: add(
        name, type=type(default), default=default, metavar=metavar, help=words
    )
    add("--config", default="wan22_5b", choices=("wan22_5b", "wan21_14b", "wan21_1_3b", "nano"), help="model sizes")
    add("--preset", choices=list(STAGES), default="paper", help="whose numbers (default %(default)s)")
    add(
        "--stage",
        type=int,
        choices=(1, 2, 3),
        help="1 align, 2 edit, 3 edit with references (--preset lora: not needed)",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="steps=100 lr=1e-4 model.source=add_unscaled",
    )
    add("--mllm", action="store_true", help="also train the language model's LoRA, queries and connectors")
    add(
        "--data",
        nargs="+",
        default=["data"],
        metavar="DIR",
        help="have image.csv, video.csv, ref_video.csv (or .parquet)",
    )
    add("--image-csv", metavar="FILE", help="this instead of DIR/image.csv")
    add("--video-csv", metavar="FILE", help="likewise")
    add("--ref-csv", metavar="FILE", help="likewise")
    add("--base-path", metavar="DIR", help="where the paths in the tables start (default: the table's folder); with any "
        "--*-csv, in those alone")  # fmt: skip
    add("--val", metavar="DIR", help="held-out rows, in the same tables: their loss and previews")
    add("--out", metavar="RUN", help="folder of the run: config.json, metrics.jsonl, checkpoints (default: runs/STAGE)")
    add("--weights", metavar="PATH|HUB_ID", help="where to start (see below; default, without --out: the run before)")
    add("--base", metavar="PATH|HUB_ID", help="Wan's weights (default: those of --config on the hub)")
    add("--qwen", metavar="PATH|HUB_ID", help="Qwen2.5-VL's (default: Qwen/Qwen2.5-VL-3B-Instruct)")
    add("--init", choices=("weights", "random"), default="weights", help="random: no weights at all")
    add("--quantise", choices=("fp8", "int8"), help="frozen linears in 8 bits: half the memory of a LoRA's base")
    add("--resume", metavar="auto|PATH", help="auto: from --out's last checkpoint if there is one. A run or checkpoint, "
        "alone: with the run's own arguments")  # fmt: skip
    flag("--seed", 0, "N", "order of the data, noise, and what the weights lack (default %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of computing; trained weights are float32 (default: by device)",
    )
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="how ranks share weights (default: fsdp on GPUs; ddp on CPUs, and for a LoRA on one GPU)",
    )
    flag("--sp", 1, "N", "ranks that share a sequence (Ulysses; default %(default)s)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute blocks in the backward")
    add("--cache", metavar="DIR", help="encoded rows, written by `python data.py cache`")
    add("--write-cache", metavar="DIR", help="write them, train nothing (what `python data.py cache` calls)")
    flag("--workers", 2, "N", "processes a rank that decode (default %(default)s)")
    flag("--max-bad", 5.0, "PERCENT", "stop if more samples are broken (default %(default)g)")
    flag("--save-every", 500, "STEPS", "default %(default)s")
    flag("--save-minutes", 30.0, "M", "save after so long too (default %(default)g)")
    flag("--keep", 3, "K", "checkpoints that stay (default %(default)s)")
    flag("--val-every", 100, "STEPS", "default %(default)s")
    flag("--sample-every", 0, "STEPS", "edit a row of each table, held out if there is --val (default: never)")
    flag("--sample-steps", 20, "STEPS", "denoising steps of that (default %(default)s)")
    add("--dry-run", action="store_true", help="print the memory that a card needs, from sizes alone; train nothing")
    flag("--gpus", 1, "N", "cards of a --dry-run (default %(default)s)")
    add("--export", metavar="RUN", help="write a run's last checkpoint, or a file of one such as ema.safetensors, as a "
        "whole model to --out, LoRA merged")  # fmt: skip
    add("--export-lora", metavar="RUN", help="write the DiT's LoRA of a run to --out")
    add("--format", choices=("peft", "comfy", "kohya"), default="peft", help="of that (default %(default)s)")
    add("--plot", metavar="RUN", help="draw the losses of a run to RUN/loss.svg")
    args = parser.parse_args(argv)
    if args.resume not in (None, "auto") and args.stage is None and args.preset != "lora":
        set_as_begun(parser, args)
        args = parser.parse_args(argv)
        args.resume = parser.resumed
    for name, least in dict(
        save_every=1, keep=1, val_every=1, sample_every=0, sample_steps=1, workers=0, max_bad=0, gpus=1
    ).items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    if (args.export or args.export_lora) and args.out is None:
        parser.error("--export and --export-lora need --out")
    if args.stage is None and args.preset == "lora":
        args.stage = 3
    if not (args.plot or args.export or args.export_lora) and args.stage is None:
        parser.error("--stage is needed, or --preset lora")
    if args.out is None and args.stage:
        args.out, before = f"runs/{'lora' if args.preset == 'lora' else args.stage}", Path(f"runs/{args.stage - 1}")
        if args.weights is None and args.init == "weights" and args.preset != "lora" and any(before.glob("step-*")):
            args.weights = str(before)
    return args


def set_as_begun(parser, args):
    """Make the arguments of the run that --resume names the defaults of this one."""
    path = Path(args.resume)
    run = path if (path / "config.json").is_file() else path.parent
    try:
        config = json.loads((run / "config.json").read_text())
        begun = config["args"] | {name: str((run / to).resolve()) for name, to in config["began"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"--resume {args.resume}: not a run or checkpoint; without --stage or --preset give one of these")
    parser.set_defaults(**begun | {"out": str(run), "resume": None, "dry_run": False})
    parser.resumed = "auto" if run == path else str(path)


if __name__ == "__main__":
    parse_arguments()  # parse before importing torch

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

import sizing
from connectors import merge_lora
from data import (
    Cache,
    CachedPairs,
    Curriculum,
    Mixture,
    Pairs,
    Shapes,
    bucket,
    digest,
    fill_buckets,
    find_tables,
    fingerprint,
    read_cached,
    read_pair,
    read_table,
)
from load import (
    HUB_BASES,
    QWEN_BASE,
    TensorFiles,
    as_trained,
    began_with,
    find_checkpoint,
    from_dict,
    load_weights,
    local_path,
    only_weights,
    read_json,
    released_name,
    step_of,
    valid_checkpoints,
)
from lora import inject_lora, quantise, write_lora
from media import MediaError, pad_reference, write_image, write_text, write_video
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit, read_weights
from parallel import Ranks, compute_in, parallelise


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot:
        return plot(Path(args.plot))
    if args.export:
        return export(Path(args.export), Path(args.out), args.base, args.qwen)
    if args.export_lora:
        return export_lora(Path(args.export_lora), Path(args.out), args.format)
    stage = choose_stage(args)
    if args.dry_run:
        config = with_model_settings(PRESETS[args.config], args.set)
        return print(sizing.report(config, stage, args.gpus, args.cache, args.quantise, args.checkpointing))
    stage = with_tables_there(args, stage)
    whole = "dit" in stage.trains  # needs float32 master weights beside those it computes with
    alone = not whole and int(os.environ.get("WORLD_SIZE", 1)) == 1
    ranks = Ranks(args.parallel or ("ddp" if alone else None), args.dtype, args.sp, whole)
    try:
        if stage.batches % ranks.dp:
            raise ValueError(
                f"global_batch / batch is {stage.batches}, not a multiple of {ranks.dp} data-parallel ranks"
            )
        with locked(args, ranks):
            checkpoint = open_run(args, ranks)
            data = open_data(args, stage, ranks)  # first: a slip here should not cost the loading of 5B
            model, cache = load_model(args, stage, ranks, checkpoint, data)
            if args.write_cache:
                return write_cache(args, stage, ranks, model, cache, data)
            Trainer(args, stage, ranks, model, data, cache).train(checkpoint)
    finally:
        ranks.leave()


# The loop


class Trainer:
    """The loop and what it keeps: model, optimizers, averaged weights, and the counters that a checkpoint holds."""

    def __init__(self, args, stage, ranks, model, data, cache):
        self.args, self.stage, self.ranks, self.model, self.data, self.cache = args, stage, ranks, model, data, cache
        self.out, self.counts = (
            Path(args.out),
            Counter(step=0, updates=0, samples=0, tokens=0, bad=0, skipped=0, seconds=0.0),
        )
        self.module = parallelise(model, ranks, args.checkpointing)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.updated = {name: of_one_rank(p, ranks) for name, p in self.trained.items()}
        self.optimizers = make_optimizers(stage, self.updated)
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()} if stage.ema else {}
        self.saver = Checkpoints(self.out, args.keep, ranks)
        self.begun_with = {kind: fingerprint(rows) for kind, rows in data.tables.items()}
        if args.cache:
            self.pairs = CachedPairs(data.tables, data.curriculum, cache)
        else:
            self.pairs = Pairs(data.tables, data.curriculum, model.mllm.resize)
        self.batches, self.stop, self.waiting = None, None, False
        self.trouble = 0  # steps skipped in a row

    def train(self, checkpoint):
        if checkpoint:
            self.restore(checkpoint)
        before = {name: signal.signal(name, self.ask_to_stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.loop()
        finally:  # of an error too
            self.saver.thread.shutdown()  # it needs the process groups
            if hasattr(self.batches, "_shutdown_workers"):  # they ignore SIGTERM: the interpreter would wait for ever
                self.batches._shutdown_workers()
            for name, handler in before.items():
                signal.signal(name, handler)

    def loop(self):
        args, stage, counts, saved = self.args, self.stage, self.counts, time.monotonic()
        if self.ranks.first:
            write_config(args, stage, self.model, self.out)
            cut_log(self.out / "metrics.jsonl", counts["step"])
            cut_log(self.out / "bad.jsonl", counts["step"])
            print(self.summary(), file=sys.stderr)
        self.batches = iter(self.loader())
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)  # `memory_gib` is of the steps, not of the loading
        bar = tqdm(total=stage.steps, initial=counts["step"], desc=f"stage {args.stage}", disable=not self.ranks.first)
        with closing(Log(self.out, self.ranks.first)) as log, bar:
            if args.val and not counts["step"]:
                log.write({"step": 0, **self.validate()})
            while counts["step"] < stage.steps and (line := self.step()):
                self.saver.check()
                step, late = counts["step"], self.ranks.any(time.monotonic() - saved > 60 * args.save_minutes)
                if args.val and (step % args.val_every == 0 or step == stage.steps):
                    line |= self.validate()
                log.write(line)
                shown = {"loss": "{:.4f}", "val": "{:.4f}", "lr": "{:.1e}", "samples_s": "{:.2f}"}
                bar.set_postfix({name: form.format(line[name]) for name, form in shown.items() if name in line})
                bar.update()
                if (step % args.save_every == 0 or late) and step < stage.steps:
                    self.save()
                    saved = time.monotonic()
                if args.sample_every and step % args.sample_every == 0:
                    self.sample(step)
        if counts["step"] not in self.saver.steps:
            self.save()
        self.saver.wait()
        if self.ranks.first:
            hint = f"; go on with --resume {self.out}" if self.stop else ""
            print(
                f"{self.stop + ': ' if self.stop else ''}step {counts['step']} of {stage.steps}, {self.saver.last()}{hint}"
            )

    def step(self):
        """One update -> its line of metrics; None if a signal came before its end: then it leaves no trace."""
        started, stage, ranks = time.perf_counter(), self.stage, self.ranks
        here = stage.batches // ranks.dp
        losses, seen, tokens, flops = [], [], 0, 0.0
        for i in range(here):
            batch = self.next_batch()
            if ranks.any(batch is None):
                self.module.zero_grad()
                self.stop = self.stop or "a signal to another rank"
                return None
            if "fatal" in batch:
                raise ValueError(batch["fatal"])
            self.reduce_gradients(i == here - 1)
            draws = [draw(self.args.seed, number, self.flow, self.rounded) for number in batch["numbers"]]
            loss, size = self.loss(batch, draws, self.flow, stage.balance)
            (loss / here).backward()
            losses.append(loss.detach())
            seen.append({name: batch[name] for name in ("kind", "paths", "bad")})
            tokens, flops = tokens + size, flops + batch_flops(self.model.config, stage, batch, size)
        rate = learning_rate(stage, self.counts["step"])
        norm, losses = self.update(rate, losses)
        broken = [bad for batch in seen for bad in batch["bad"]]
        report_bad(self.args, ranks, self.counts["step"] + 1, broken)
        if not math.isfinite(norm):
            self.skip(
                norm, [path for b, loss in zip(seen, losses) if not math.isfinite(loss) for path in b["paths"]], seen
            )
        kinds = [sum(loss for b, loss in zip(seen, losses) if b["kind"] == kind) for kind in stage.ratio]
        parts = [sum(b["kind"] == kind for b in seen) for kind in stage.ratio]
        sums = ranks.total([sum(losses), tokens, flops, len(broken), *kinds, *parts])
        loss, tokens, flops, bad, *kinds = (x / ranks.sp for x in sums)
        seconds = time.perf_counter() - started
        self.count(tokens, bad, seconds)
        line = {"step": self.counts["step"], "loss": loss / stage.batches, "grad_norm": norm, "lr": rate,
                "seconds": seconds, "samples_s": stage.global_batch / seconds, "tokens_s": tokens / seconds,
                "bad": self.counts["bad"], "skipped": self.counts["skipped"]}  # fmt: skip
        line |= {f"loss_{kind}": kinds[i] / kinds[3 + i] for i, kind in enumerate(stage.ratio) if kinds[3 + i]}
        return line | machine_use(ranks, flops / seconds)

    @property
    def flow(self):
        return FlowMatch(self.stage.shift, weighting=self.stage.weighting)

    @property
    def rounded(self):
        return self.model.config.dit.bf16_timesteps

    def next_batch(self):
        """The next batch; None where a signal asks to stop, also while it is waited for."""
        try:
            self.waiting = True
            return None if self.stop else next(self.batches)
        except InterruptedError:
            return None
        finally:
            self.waiting = False

    def ask_to_stop(self, number, frame):
        if self.ranks.first and not self.stop:
            print(f"{signal.Signals(number).name}: stopping after the last whole step", file=sys.stderr, flush=True)
        self.stop = signal.Signals(number).name
        if self.waiting:
            self.waiting = False
            raise InterruptedError

    def reduce_gradients(self, last):
        """Ranks add their gradients once an update; FSDP2 on each backward where it trains whole blocks, whose gradients
        no rank has room for."""
        if hasattr(self.module, "require_backward_grad_sync"):
            self.module.require_backward_grad_sync = last  # DDP
        elif hasattr(self.module, "set_requires_gradient_sync") and "dit" not in self.stage.trains:
            self.module.set_requires_gradient_sync(last)

    def loader(self):
        """Batches of this rank in order, made by worker processes."""
        steps = range(self.counts["step"], self.stage.steps)
        order = (
            number for step in steps for number in rank_batches(self.data.curriculum, self.stage, self.ranks, step)
        )
        workers = self.args.workers
        if workers:
            room_for_batches(
                self.data.largest, self.stage.batch, workers, self.model.config if self.args.cache else None
            )
        return torch.utils.data.DataLoader(
            self.pairs, None, sampler=order, num_workers=workers, worker_init_fn=leave_signals_to_the_trainer,
            multiprocessing_context="fork" if workers else None,  # a worker has the tokenizer of this process
            timeout=1800 if workers else 0,
        )  # fmt: skip

    def loss(self, batch, draws, flow, balance=False):
        """The mean loss of a batch and the number of its tokens in the DiT."""
        model, device, stage = self.model, self.ranks.device, self.stage
        generators, t, chance = zip(*draws)
        pictures = batch["pictures"]
        if not self.args.cache:
            pictures = [encode(model, stage, *own, c) for own, c in zip(pictures, chance)]
        pictures = [(target, source if stage.source else None, ref) for target, source, ref in pictures]
        latents, source, ref = (
            None if part[0] is None else torch.stack(part).to(device).float() for part in zip(*pictures)
        )
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(device)
        if isinstance(batch["seen"][0], torch.Tensor):  # contexts (L, D) from the cache
            requests = [context[None].to(device, self.ranks.dtype) for context in batch["seen"]]
        else:
            requests = [model.mllm.assemble(prompt, *seen) for prompt, seen in zip(batch["prompts"], batch["seen"])]
        frames = latents.shape[2] + (0 if ref is None else ref.shape[2])
        tokens = len(latents) * frames * math.prod(model.dit.grid(latents)[1:])
        apart = self.ranks.world > 1 and stage.ref > 0
        return self.module(
            requests, latents, torch.stack(t).to(device), source, ref, noise, flow, balance, apart
        ), tokens

    def update(self, rate, losses):
        """Clip the gradients and step the optimizers, unless they are not finite -> the gradients' norm, losses as numbers:
        the one place of a step that waits for the device."""
        for p, updated in zip(self.trained.values(), self.updated.values()):
            updated.grad = of_one_rank(p.grad, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(self.updated.values(), self.stage.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm, *losses = torch.stack([norm, *losses]).tolist()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                optimizer.step()
            self.counts["updates"] += 1
            self.trouble = 0
            if self.ema:
                weights = [p.detach() for p in self.trained.values()]
                torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.stage.ema)
        self.module.zero_grad()
        for updated in self.updated.values():
            updated.grad = None
        return norm, losses

    def skip(self, norm, suspects, seen):
        """Report a step whose gradient is not finite, and the samples whose loss is not. ValueError for five in a row."""
        self.counts["skipped"] += 1
        self.trouble += 1
        suspects = self.ranks.gathered(suspects)
        samples = ", ".join(suspects[:4]) or f"every loss is finite; the last sample was {seen[-1]['paths'][0]}"
        message = f"step {self.counts['step'] + 1} skipped: its gradient is {norm}; samples: {samples}"
        if self.trouble == 5:
            raise ValueError(f"5 steps in a row were skipped, the loss has diverged: lower lr, or look at the data. "
                             f"The last sound checkpoint: {self.saver.last()}. {message}")  # fmt: skip
        if self.ranks.first:
            print(f"warning: {message}; nothing is saved until a step succeeds", file=sys.stderr)

    def count(self, tokens, bad, seconds):
        counts = self.counts
        counts.update(step=1, samples=self.stage.global_batch, tokens=tokens, bad=bad, seconds=seconds)
        if 100 * counts["bad"] > self.args.max_bad * max(counts["samples"], 100):
            raise ValueError(f"{counts['bad']:.0f} of {counts['samples']} samples could not be read, more than --max-bad "
                             f"{self.args.max_bad:g} per cent; see {self.args.out}/bad.jsonl")  # fmt: skip

    @torch.no_grad()
    def validate(self):
        """Mean squared error of the held-out rows, each at a timestep in every quarter of the schedule, with noise fixed by
        the row's number -> means by kind and by quarter."""
        self.model.eval()
        rows, ranks, flow = self.data.held_out, self.ranks, FlowMatch(self.stage.shift, weighting="none")
        sums = dict.fromkeys([f"val_{kind}" for kind in self.stage.ratio] + [f"val_q{q}" for q in (1, 2, 3, 4)], 0.0)
        counts = dict(sums)
        for i in range(-(-len(rows) // ranks.dp)):  # as often on every rank
            place = i * ranks.dp + ranks.data_rank
            kind, row, shape = rows[min(place, len(rows) - 1)]
            try:
                pictures, seen = self.read_row(row, shape)
            except MediaError as error:
                raise ValueError(f"--val {self.args.val}: {error}") from None
            batch = {"prompts": [row.prompt], "pictures": [pictures], "seen": [seen]}
            for quarter in range(4):
                drawn = draw("held out", 4 * place + quarter, flow, self.rounded, quarter)
                loss = (
                    self.loss(batch, [drawn], flow)[0].item()
                    if place < len(rows)
                    else 0 * self.loss(batch, [drawn], flow)[0].item()
                )
                for name in (f"val_{kind}", f"val_q{quarter + 1}"):
                    sums[name] += loss
                    counts[name] += place < len(rows)
        self.model.train()
        totals = ranks.total([*sums.values(), *counts.values()])
        means = {name: total / count for name, total, count in zip(sums, totals, totals[len(sums) :]) if count}
        return {"val": sum(means[f"val_q{q}"] for q in (1, 2, 3, 4)) / 4, **means}

    def read_row(self, row, shape):
        """A row as `Pairs` reads it: pictures, or latents, and what the MLLM will see of it."""
        return read_cached(self.cache, row, shape) if self.args.cache else self.pairs.read(row, shape)

    def sample(self, step):
        """Edit a row of each kind, held out if there are any, and write source, edit and target side by side."""
        self.model.eval()
        for kind, row, shape in self.data.previews:
            pair = None
            try:
                pair = read_pair(row, shape)
            except MediaError as error:  # no reason to end a training
                print(f"warning: no sample of {kind}: {error}", file=sys.stderr)
            if self.ranks.any(pair is None):  # one rank alone would leave the others waiting
                continue
            target, source, ref = pair
            sharded = hasattr(self.model, "unshard")  # called part by part, it needs what lies outside of the blocks
            sharded and self.model.unshard()
            flow, home = FlowMatch(self.stage.shift), self.ranks.device if self.args.cache and not sharded else None
            edited = self.model.edit(source, row.prompt, ref, self.args.sample_steps, flow=flow, offload_to=home)
            sharded and self.model.reshard()
            if self.ranks.first:
                picture = torch.cat([source, edited, target], dim=2)
                path = self.out / "samples" / f"step-{step:06d}-{kind}{'.png' if kind == 'image' else '.mp4'}"
                path.parent.mkdir(exist_ok=True)
                write_image(path, picture[0]) if kind == "image" else write_video(path, picture, 15)
        self.model.train()

    def save(self):
        if self.trouble:  # what diverged would push sound checkpoints out
            self.ranks.first and print(
                f"warning: not saved; the last sound checkpoint: {self.saver.last()}", file=sys.stderr
            )
            return
        told = {"counts": dict(self.counts), "stage": asdict(self.stage), "tables": self.begun_with}
        self.saver.save(told, self.stage, self.model, self.optimizer_state(), self.ema)

    def optimizer_state(self):
        """The optimizers' moments by parameter name; before the first update zeros."""
        names, moments = {p: name for name, p in self.updated.items()}, {}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                state = optimizer.state[p]
                state.setdefault(
                    "step", torch.tensor(0.0, device=p.device if isinstance(optimizer, torch.optim.AdamW) else None)
                )
                for moment in MOMENTS[type(optimizer)]:
                    if moment not in state:
                        state[moment] = torch.zeros_like(p)
                    moments[f"{names[p]}.{moment}"] = state[moment]
        return moments

    def restore(self, checkpoint):
        """Counters, moments and averaged weights; the weights themselves are loaded with the model."""
        saved = read_json(checkpoint / "train.json")
        self.counts = Counter(saved["counts"])
        if checkpoint.resolve() == self.saver.path(self.counts["step"]).resolve():
            self.saver.steps.add(self.counts["step"])
        if (old := saved["stage"]["optimizer"]) != self.stage.optimizer:
            raise ValueError(
                f"{checkpoint} was trained by {old}: add --set optimizer={old}, or begin anew with --weights"
            )
        if sorted(saved["stage"]["trains"]) != sorted(self.stage.trains):
            raise ValueError(
                f"{checkpoint} is of a stage that trains other parts: a next stage begins with --weights {checkpoint.parent}"
            )
        if self.ema and not saved["stage"]["ema"]:
            raise ValueError(f"{checkpoint} has no averaged weights: leave out --set ema, or begin anew with --weights")
        changed = self.changed_since(saved, read_json(checkpoint.parent / "config.json")["args"])
        if changed and self.ranks.first:
            print(f"warning: not as when {checkpoint} was written: {', '.join(changed)}", file=sys.stderr)
        state = {"optimizer": self.optimizer_state(), "ema": self.ema}
        try:
            dcp.load(state, checkpoint_id=checkpoint / "state")
        except (CheckpointException, RuntimeError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{checkpoint}/state: cannot be read ({reason}); resume from an older checkpoint, or begin "
                             "anew with --weights") from None  # fmt: skip
        for optimizer in self.optimizers:
            for moments in optimizer.state.values():
                moments["step"].fill_(self.counts["updates"])

    def changed_since(self, saved, begun):
        """What differs from a checkpoint's train.json and the arguments of its run, in words."""
        now, then = json.loads(json.dumps(asdict(self.stage))), saved["stage"]
        changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if now[key] != then.get(key)]
        asked, of_run = (
            vars(self.args),
            ("config", "init", "weights", "base", "qwen", "seed", "data", "base_path", "quantise"),
        )
        same = lambda a, b: (
            a == b or (isinstance(a, str) and isinstance(b, str) and Path(a).resolve() == Path(b).resolve())
        )
        changed += [f"--{key} {begun[key]} -> {asked[key]}" for key in of_run if not same(begun[key], asked[key])]
        anew = [kind for kind, rows in self.begun_with.items() if saved["tables"].get(kind) != rows]
        return changed + [f"the {kind} rows, whose order begins anew" for kind in anew]

    def summary(self):
        """What is trained from what, on what, for how long."""
        stage, args, lines = self.stage, self.args, []
        begun = args.weights or (
            f"--init {args.init}" if args.init == "random" else args.base or HUB_BASES[args.config]
        )
        lines.append(f"from        {begun}, {self.ranks.parallel} on {self.ranks.world}, {str(self.ranks.dtype)[6:]}"
                     f"{', base in ' + args.quantise if args.quantise else ''}")  # fmt: skip
        for part in stage.trains:
            own = [p.numel() for name, p in self.trained.items() if belongs(name, replace(stage, trains=(part,)))]
            own and lines.append(f"train       {part:<22} {sum(own) / 1e6:10.2f} M parameters")
        for kind, buckets in self.data.curriculum.phases[-1][1].buckets.items():
            sizes = sorted(buckets.items(), key=lambda x: -len(x[1]))
            shown = ", ".join(f"{len(rows)} of {t}x{h}x{w}" for (t, h, w), rows in sizes[:4])
            rows = sum(len(rows) for rows in buckets.values())
            epoch = rows * sum(stage.ratio.values()) / stage.ratio[kind] / stage.global_batch
            lines.append(
                f"{kind:<11} {rows} rows, an epoch in {epoch:.4g} steps: {shown}{' ...' if len(sizes) > 4 else ''}"
            )
        if self.data.held_out:
            lines.append(f"held out    {len(self.data.held_out)} rows of {args.val}")
        return "\n".join(lines)


def leave_signals_to_the_trainer(worker):
    """torchrun and Ctrl-C signal workers too; they are needed until the trainer has stopped."""
    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def room_for_batches(shape, batch, workers, cached=None):
    """Workers hand batches over in /dev/shm, two each on their way. ValueError where they do not fit: the loader would
    hang for ever."""
    frames, height, width = shape
    size = 6 * frames * height * width
    if cached:
        size = 8 * cached.vae.z_dim * cached.vae.latent_frames(frames) * height * width // cached.vae.space_stride**2
    need, disk = size * batch * (2 * workers + 1), os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    if disk and disk.f_bavail * disk.f_frsize < need:
        raise ValueError(f"/dev/shm has {disk.f_bavail * disk.f_frsize / 2**20:.0f} MiB, batches on their way need {need / 2**20:.0f}: "
                         "docker run --shm-size=8g, or --workers 0")  # fmt: skip


@torch.no_grad()
def encode(model, stage, target, source, ref, chance):
    """Latents (C, T, h, w) of target, source and reference. The reference is shrunk by a factor between the stage's
    `ref_shrink` and 1, as `chance` in [0, 1) has it, and centred on white."""
    if ref is not None:
        ref = pad_reference(ref, target.shape[1:3], stage.ref_shrink + (1 - stage.ref_shrink) * chance)[None]
    device = model.vae.conv1.weight.device
    return tuple(None if x is None else model.encode_frames(x.to(device))[0] for x in (target, source, ref))


def draw(seed, number, flow, rounded, quarter=None):
    """Generator of the noise, timestep and a number in [0, 1) of a sample: the same however the run is divided.

    quarter: 0 (the noisiest) to 3 of the schedule's timesteps; None: all of them."""
    # scattered by Python's generator: torch's reads the lower 32 bits of a seed alone
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {number}").getrandbits(32))
    low, high = (0, 1000) if quarter is None else (250 * quarter, 250 * quarter + 250)
    t = flow.timesteps(1000)[torch.randint(low, high, (), generator=generator)]
    return generator, t.bfloat16().float() if rounded else t, torch.rand((), generator=generator).item()


def learning_rate(stage, step):
    """Linear warm-up, then constant or down to nothing."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return stage.lr * decay[stage.schedule]


def rank_batches(curriculum, stage, ranks, step):
    """The numbers of this rank's batches in a step. Which batches a step has does not depend on the ranks; they are
    dealt out by size, so that ranks which wait for one another have the same amount of work."""
    numbers = range(step * stage.batches, (step + 1) * stage.batches)
    by_size = sorted(numbers, key=lambda n: (math.prod(curriculum[n][2]), n))
    return by_size[ranks.data_rank :: ranks.dp]


# Optimizers


def of_one_rank(tensor, ranks):
    """A DTensor's memory as a plain tensor where one rank has all of it: each of Muon's thirty operations a matrix takes
    longer to dispatch on a DTensor than a small model's to do."""
    if tensor is None or ranks.world > 1 or not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


def make_optimizers(stage, trained):
    """AdamW (paper, Section 5.1); or Muon for what is a matrix, its updates as large as AdamW's would be (arXiv
    2502.16982, Eq. 4), and AdamW for the rest. Norms, biases, modulations and queries do not decay.

    A LoRA's alpha is a learning rate of B, alpha / rank times the others': AdamW's steps have the size of the rate, so
    this trains as if the update were scaled, and files keep the factor 1. ValueError for a matrix with fewer rows than
    ranks that share it: torch's Muon cannot update that."""
    matrices = {name: p for name, p in trained.items() if stage.optimizer == "muon" and is_matrix(name, p)}
    for name, p in matrices.items():
        if len(p) < (ranks := p.device_mesh.size() if hasattr(p, "device_mesh") else 1):
            raise ValueError(
                f"--set optimizer=muon: {name} has {len(p)} rows for {ranks} ranks; take a larger lora_rank, or adamw"
            )
    groups, optimizers = {}, []
    for name, p in trained.items():
        boost = (
            stage.dit_lora_alpha / stage.dit_lora_rank
            if stage.dit_lora_alpha and name.startswith("dit.") and ".lora_B." in name
            else 1.0
        )
        decay = stage.weight_decay if p.ndim > 1 and not name.endswith(("modulation", "_queries")) else 0.0
        groups.setdefault((name in matrices, boost, decay), []).append(p)
    for muon in (True, False):
        own = [
            {"params": ps, "scale": boost, "weight_decay": decay}
            for (m, boost, decay), ps in groups.items()
            if m == muon
        ]
        if own and muon:
            optimizers.append(torch.optim.Muon(own, stage.lr, adjust_lr_fn="match_rms_adamw"))
        elif own:
            optimizers.append(torch.optim.AdamW(own, stage.lr, betas=(0.9, stage.beta2), fused=True))
    return optimizers


def is_matrix(name, parameter):
    """Whether Muon may orthogonalise its updates: not a table of queries, not a row such as `source_scale`."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and not name.endswith("_queries")


# The model


def load_model(args, stage, ranks, checkpoint, data):
    """The model with the weights to start from, LoRA in place, trained parts in float32 and the rest in `dtype`, exactly
    what the stage trains requiring gradients; and the cache. What a cache holds the output of is not loaded."""
    config, files = read_start(args, ranks)
    own, preset = config.mllm, PRESETS[args.config].mllm  # which has counts for the kinds of data new to the weights
    sizes = ("num_image_queries", "num_video_queries", "num_ref_queries", "max_ref_tokens")
    config = replace(config, mllm=replace(own, **{name: getattr(own, name) or getattr(preset, name) for name in sizes}))
    if checkpoint:
        config = from_dict(KiwiConfig, as_trained(vars(config), checkpoint), checkpoint)
    if args.preset == "released" and args.config == "wan22_5b":  # whose scripts show the language model larger frames
        config = replace(config, mllm=replace(config.mllm, max_pixels=None))
    config = with_model_settings(config, args.set)
    if config.dit.num_heads % ranks.sp:
        raise ValueError(f"--sp {ranks.sp} does not divide the {config.dit.num_heads} heads of the DiT")
    folder = args.cache or args.write_cache
    cache = Cache(folder, data.shapes, cache_parts(config, files, stage, ranks)) if folder else None
    torch.manual_seed(args.seed)  # of what the weights lack
    if args.write_cache:
        return start_model(config, files, ranks.device, ranks.dtype, ("dit.blocks.",)), cache
    if args.cache:
        cache.check([(row, shape) for _, row, shape in data.rows()])
    without = (
        () if not args.cache or args.sample_every else ("vae.", "mllm.model.visual." if stage.trains_mllm else "mllm.")
    )
    model = start_model(config, files, "cpu" if args.quantise else ranks.device, None, without)
    if args.cache and args.sample_every and ranks.parallel == "ddp":  # previews bring them to the device
        model.vae.to("cpu"), stage.trains_mllm or model.mllm.to("cpu")
    if args.quantise:
        quantise(model, args.quantise, ranks.device, [part for part in ("dit", "mllm") if part not in stage.trains])
        model.to(ranks.device)
    if stage.trains_mllm:
        warn_of_ranks(model, stage, ranks)
    if "dit.lora" in stage.trains and not has_lora(model.dit):
        inject_lora(model.dit, stage.dit_lora_rank, DIT_LORA)
    choose_trained(model, stage)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else ranks.dtype)
    if ranks.parallel == "ddp" and ranks.dtype != torch.float32:
        compute_in(model, ranks.dtype)
    if checkpoint:  # only now: in the 16 bits of the weights it started from it would lose half its digits
        load_weights(model, TensorFiles().add(checkpoint / "weights.safetensors"), partial=True)
    if stage.trains_mllm and stage.source and not model.mllm.connector[2].weight.any() and ranks.first:
        print("warning: the Query Connector is untrained, so stage 1 was left out; the paper measured 1.47/3.01 without "
              "it against 2.84/3.98 (Table 5)", file=sys.stderr)  # fmt: skip
    return model.train(), cache


def warn_of_ranks(model, stage, ranks):
    """Give the language model a LoRA, or keep the one that its weights have."""
    held = {len(p) for name, p in model.mllm.named_parameters() if ".lora_A." in name}
    if not held:
        inject_lora(model.mllm.language_model, stage.lora_rank, stage.lora_targets)
    elif held != {stage.lora_rank} and ranks.first:
        print(f"warning: the weights have LoRA of rank {max(held)}, which goes on: lora_rank={stage.lora_rank} is for "
              "weights without", file=sys.stderr)  # fmt: skip


def read_start(args, ranks):
    """Config and files of the weights to start from."""
    out = Path(args.out)
    if args.config == "nano" and args.weights is None and args.init == "weights":
        if NANO.exists() and not (out / "init").exists():
            args.weights = str(NANO)
        else:  # so that the smallest model trains with nothing at hand
            args.init = "random"
            ranks.first and print(
                "start: random weights, for there is no --weights and no weights/nano", file=sys.stderr
            )
    if args.init == "random":
        if args.weights or args.base:
            raise ValueError(
                f"--init random begins with no weights: leave out {'--weights' if args.weights else '--base'}"
            )
        return read_random(args, ranks, out)
    return read_weights(args.weights, args.base, args.qwen, HUB_BASES[args.config])


def read_random(args, ranks, out):
    """Random weights, made once in the run's folder. --qwen gives the language model's sizes and tokenizer."""
    if args.qwen is None and args.config == "nano":
        args.qwen = str(NANO_MLLM)
    preset = PRESETS[args.config]
    config = replace(preset, mllm=replace(preset.mllm, folder=str(local_path(args.qwen or QWEN_BASE))))
    if not (out / "init").exists() and ranks.first:
        torch.manual_seed(args.seed)
        KiwiEdit(with_model_settings(config, args.set)).save(out / "init")
    ranks.barrier()
    return read_weights(out / "init")


def start_model(config, files, device, dtype=None, without=()):
    """A model with the weights of `files`, without the parts whose output is cached or not needed."""
    small = {part: None for part in ("vae", "mllm") if f"{part}." in without}
    if "dit.blocks." in without:
        small["dit"] = replace(config.dit, num_layers=0)
    files.drop([name for name in files if name.startswith(tuple(without) or " ")])
    model = KiwiEdit.with_weights(replace(config, **small), files, device, dtype)[0]
    model.config = config
    return model


def has_lora(module):
    return any(".lora_" in name for name, _ in module.named_parameters())


def choose_trained(model, stage):
    """Set requires_grad for exactly what the stage trains. ValueError for a part that there is not."""
    known = {*REFER, "dit.lora"}  # some of which are not part of every way to inject the source
    for part in stage.trains:
        if part not in known and not any(is_part(name, part) for name, _ in model.named_parameters()):
            raise ValueError(f"Stage.trains: the model has no {part!r}; the stages train {', '.join(sorted(known))}")
    for name, parameter in model.named_parameters():
        # Wan's projection of T5 features is saved with the DiT and never used: DDP would wait for its gradient
        parameter.requires_grad_(belongs(name, stage) and not name.startswith("dit.text_embedding."))


def belongs(name, stage):
    """Whether a parameter is part of what the stage trains and saves."""
    if ".lora_" in name:
        return bool({"dit.lora", "dit"} & set(stage.trains)) if name.startswith("dit.") else "lora" in stage.trains
    return any(is_part(name, part) for part in stage.trains)


def is_part(name, part):
    return name == part or name.startswith(part + ".")


# The data


@dataclass
class Data:
    """Tables of the stage's kinds of data, the order in which their rows come, and the held-out rows."""

    tables: dict  # kind -> [Row]
    curriculum: Curriculum
    shapes: Shapes
    held_out: list  # (kind, row, shape)

    def rows(self):
        """(kind, row, shape) of everything that is trained or held out."""
        found = {}
        for _, mixture in self.curriculum.phases:
            for kind, buckets in mixture.buckets.items():
                for shape, numbers in buckets.items():
                    found |= {(kind, self.tables[kind][i], shape): None for i in numbers}
        return [*found, *self.held_out]

    @property
    def largest(self):
        return max((shape for _, m in self.curriculum.phases for b in m.buckets.values() for shape in b), key=math.prod)

    @property
    def previews(self):
        """A (kind, row, shape) of each kind, held out if there is one."""
        first = [(kind, *min((numbers[0], shape) for shape, numbers in buckets.items()))
                 for kind, buckets in self.curriculum.phases[0][1].buckets.items()]  # fmt: skip
        own = {kind: (kind, self.tables[kind][number], shape) for kind, number, shape in first}
        return list((own | {each[0]: each for each in reversed(self.held_out)}).values())


def with_tables_there(args, stage):
    """--preset lora takes whichever of the three tables are there, and a batch more where ranks would have none."""
    if args.preset != "lora":
        return stage
    own = {"image": args.image_csv, "video": args.video_csv, "ref": args.ref_csv}
    absent = {kind: 0 for kind in own if not own[kind] and not has_table(args.data, kind)}
    if len(absent) == 3:
        find_tables(args.data, "video")  # says what is missing
    ranks = int(os.environ.get("WORLD_SIZE", 1)) // args.sp
    return replace(stage, **absent, global_batch=-(-stage.batches // max(ranks, 1)) * max(ranks, 1) * stage.batch)


def has_table(folders, kind):
    try:
        return bool(find_tables(folders, kind))
    except FileNotFoundError:
        return False


def open_data(args, stage, ranks):
    """Read the tables, measure their files, and lay out buckets and order."""
    own = {"image": args.image_csv, "video": args.video_csv, "ref": args.ref_csv}
    kinds = [kind for kind, share in stage.ratio.items() if share]
    tables, held = {}, {}
    for kind in kinds:
        paths = [own[kind]] if own[kind] else find_tables(args.data, kind)
        # with tables of other names --base-path is theirs alone: those of --data begin at their folder
        base = args.base_path if own[kind] or not any(own.values()) else None
        tables[kind] = [row for path in paths for row in read_table(path, kind, base)]
        if args.val and has_table([args.val], kind):
            rows = [row for path in find_tables([args.val], kind) for row in read_table(path, kind)]
            held[kind] = rows[:: -(-len(rows) // HELD_OUT)]
    if args.val and not held:
        raise FileNotFoundError(f"--val {args.val}: has no table of {', '.join(kinds)}")
    shapes = Shapes(args.cache or args.write_cache, args.out)
    shapes.measure([row for part in (tables, held) for rows in part.values() for row in rows], ranks)
    if ranks.first:
        shapes.save(args.write_cache or args.out)
    found = {kind: [shapes.of_row(row, kind) for row in rows] for kind, rows in tables.items()}
    for kind, rows in tables.items():
        broken = [(row.target, shape) for row, shape in zip(rows, found[kind]) if isinstance(shape, str)]
        if ranks.first and not (Path(args.out) / "metrics.jsonl").exists():  # a run that resumes has logged them
            report_bad(args, ranks, 0, broken)
        if 100 * len(broken) > args.max_bad * len(rows) or len(broken) == len(rows):
            raise ValueError(f"{len(broken)} of {len(rows)} {kind} rows cannot be read (--max-bad {args.max_bad:g}); "
                             f"the first: {broken[0][1]}")  # fmt: skip
    phases = []
    for i, pixels in enumerate(stage.pixels):
        buckets = {kind: fill_buckets(found[kind], stage.frames, pixels) for kind in kinds}
        start = i * stage.steps // len(stage.pixels) * stage.batches
        phases.append((start, Mixture(buckets, stage.ratio, stage.batch, f"{args.seed} {i}")))
    held_out = []
    for kind, row in ((kind, row) for kind, rows in held.items() for row in rows):
        if isinstance(shape := shapes.of_row(row, kind), str):
            raise ValueError(f"--val {args.val}: {shape}")
        held_out.append((kind, row, bucket(shape, stage.frames, stage.pixels[-1])))
    return Data(tables, Curriculum(phases), shapes, held_out)


def report_bad(args, ranks, step, broken):
    """Append broken samples, (path, reason), to the run's bad.jsonl."""
    if broken and ranks.rank % ranks.sp == 0:
        with (Path(args.out) / "bad.jsonl").open("a") as file:
            file.write("".join(json.dumps({"step": step, "path": p, "reason": r}) + "\n" for p, r in broken))


def cache_parts(config, files, stage, ranks):
    """What a cache of this stage holds, and what makes it: settings and weights (`data.Cache`)."""
    m, eyes = config.mllm, [config.mllm.max_pixels, config.mllm.max_frames, config.mllm.max_ref_tokens]
    parts = {"latents": [asdict(config.vae), weights_print(files, "vae."), stage.ref_shrink, stage.trains_mllm * 0]}
    if stage.trains_mllm:
        return parts | {"seen": [eyes, weights_print(files, "mllm.model.visual."), ranks.dtype]}
    sizes = {**asdict(m), "folder": None}
    return parts | {"context": [sizes, weights_print(files, "mllm."), ranks.dtype, REFER[0]]}


def weights_print(files, prefix):
    """Cheap fingerprint of the weights below a prefix: names, shapes and the first numbers of each."""
    found = []
    for name in sorted(name for name in files if name.startswith(prefix)):
        path, inner = files.places[name]
        file = files.open(path, "cpu")
        first = file.get_slice(inner)[:1] if hasattr(file, "get_slice") else file[inner][:1]
        found.append((name, files.shape(name), first.flatten()[:8].tolist()))
    return digest(found)


@torch.no_grad()
def write_cache(args, stage, ranks, model, cache, data):
    """Encode what the cache lacks, each rank its part; it can be interrupted. References are shrunk once and for all."""
    todo = [
        (row, shape, absent)
        for _, row, shape in data.rows()[ranks.rank :: ranks.world]
        if (absent := cache.absent(row, shape))
    ]
    for row, shape, absent in tqdm(todo, desc="cache", unit="row", disable=not ranks.first):
        try:
            target, source, ref = read_pair(row, shape)
        except MediaError as error:
            report_bad(args, ranks, 0, [(row.target, str(error))])
            for part in absent:
                cache.write(part, row, shape, str(error))
            continue
        if "latents" in absent:
            chance = random.Random(row.target).random()
            latents = zip(("target", "source", "ref"), encode(model, stage, target, source, ref, chance))
            cache.write("latents", row, shape, {name: x for name, x in latents if x is not None})
        mode, visuals = model.mllm.resize(source, ref)
        if "context" in absent:
            context = model.mllm.encode([model.mllm.assemble(row.prompt, mode, visuals)])[0][0]
            cache.write("context", row, shape, {"context": context})
        if "seen" in absent:
            seen = model.mllm.look(model.mllm.assemble(row.prompt, mode, visuals))
            tensors = {name: tokens for name, (tokens, _) in seen.items()}
            cache.write(
                "seen", row, shape, tensors | {f"{name}.grid": torch.tensor(grid) for name, (_, grid) in seen.items()}
            )
    ranks.barrier()
    if ranks.first:
        print(f"{args.write_cache}: {len(todo)} rows encoded on this rank, the others were there")


# Checkpoints


@contextmanager
def locked(args, ranks):
    """Hold the run's folder: a requeued job that starts while the old one still runs would mix with it."""
    out, told, file = Path(args.out), None, None
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
        try:
            args.write_cache or fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = f"--out {out}: another process trains there; wait for it, or give another folder"
        except OSError:  # a file system without locks
            pass
    if told := ranks.from_first(told):
        raise ValueError(told)
    try:
        yield
    finally:
        file and file.close()


class Checkpoints:
    """Folders step-NNNNNN of a run: weights.safetensors (what the stage trains, released names), ema.safetensors,
    state/ (the optimizer's moments, torch.distributed.checkpoint), train.json (counters, fingerprints of the tables).

    A save copies to memory and returns; a thread writes to a hidden folder and renames it when whole. So every
    step-NNNNNN is complete, whenever the run was killed.
    """

    def __init__(self, out, keep, ranks):
        self.out, self.keep, self.ranks = out, keep, ranks
        self.thread, self.written = ThreadPoolExecutor(1), None
        self.steps = set()  # that are on disk, or will be
        if ranks.first:
            for left in out.glob(".step-*"):  # of a run that was killed
                shutil.rmtree(left)
        ranks.barrier()

    def path(self, step):
        return self.out / f"step-{step:06d}"

    def last(self):
        return self.path(max(self.steps)) if self.steps else "none"

    def save(self, told, stage, model, moments, ema):
        self.wait()
        step = told["counts"]["step"]
        self.steps.add(step)
        weights = {name: p for name, p in model.named_parameters() if belongs(name, stage)}
        snapshot = {
            "weights": self.whole(weights), "ema": self.whole({**weights, **ema} if ema else {}),
            "state": {"optimizer": copied(moments), "ema": copied(ema)},
            "train": told,
        }  # fmt: skip
        self.written = self.thread.submit(self.write, self.path(step), snapshot)

    def whole(self, tensors):
        """Full copies in memory on the first rank, by released names; nothing on the others."""
        found = {}
        for name, p in tensors.items():
            p = p.detach()
            p = p.full_tensor() if hasattr(p, "full_tensor") else p
            if self.ranks.first:
                found[released_name(name)] = p.to("cpu", copy=True).contiguous()
        return found

    def write(self, path, snapshot):
        if self.ranks.device.type == "cuda":  # a new thread begins on the first GPU
            torch.cuda.set_device(self.ranks.device)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            writer = dcp.FileSystemWriter(temporary / "state")
            dcp.save(snapshot["state"], storage_writer=writer, process_group=self.ranks.background)
            if not self.ranks.first:
                return
            for name in ("weights", *(["ema"] if snapshot["ema"] else [])):
                save_file(snapshot[name], temporary / f"{name}.safetensors")
                os.chmod(temporary / f"{name}.safetensors", 0o666 & ~UMASK)  # safetensors makes them 0600
            (temporary / "train.json").write_text(json.dumps(snapshot["train"], indent=1))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        if path.exists():
            os.replace(path, path.with_name(f".{path.name}.old"))
        os.replace(temporary, path)
        for old in valid_checkpoints(self.out)[: -self.keep]:
            os.replace(old, old.with_name(f".{old.name}.old"))
        for hidden in [*self.out.glob(".step-*.old")]:
            shutil.rmtree(hidden)

    def check(self):
        """Raise what went wrong in the thread."""
        if self.written and self.written.done():
            self.wait()

    def wait(self):
        error = self.written and self.written.exception()
        if error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise OSError(f"{self.out}: the checkpoint cannot be written ({reason}); is the disk full?") from error


os.umask(UMASK := os.umask(0))


def copied(tensors):
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def open_run(args, ranks):
    """The checkpoint to resume from, or None. ValueError where one would be written over."""
    out = Path(args.out)
    found = ranks.from_first([None, *valid_checkpoints(out)][-1])
    if args.resume is None and found:
        raise ValueError(f"{out} has checkpoints already; give --resume auto to continue, or another --out")
    own = find_checkpoint(Path(args.weights)) if args.weights and Path(args.weights).exists() else None
    if own and own.parent.resolve() == out.resolve():  # noted as what the run began with, it would lead in a circle
        raise ValueError(
            f"--weights {args.weights}: is --out itself; give what this run began with (--weights in {out}/config.json)"
        )
    if args.resume in (None, "auto"):
        return found
    checkpoint = find_checkpoint(Path(args.resume))
    if checkpoint is None:
        raise FileNotFoundError(f"--resume {args.resume}: not a checkpoint folder; give auto or RUN/step-NNNNNN")
    if (
        found and step_of(found) > read_json(checkpoint / "train.json")["counts"]["step"]
    ):  # they would count as the last
        raise ValueError(f"{out} has later checkpoints than {checkpoint}: move them away, or give another --out")
    return checkpoint


def export(run, folder, base=None, qwen=None):
    """The last checkpoint of a run (or the one given, or its ema.safetensors) as a whole model, LoRA merged in float32.
    base, qwen: of what the run began with, where that has moved."""
    only_weights(folder)
    checkpoint = checkpoint_of(run, "--export")
    begun = began_with(checkpoint.parent)
    starts = [start for start in (base, begun["weights"], begun["base"], begun["qwen"]) if start]
    if Path(folder).resolve() in [Path(start).resolve() for start in starts]:
        raise ValueError(
            f"--out {folder}: {run} lies over these weights and needs them as they are; give another folder"
        )
    model = start_model(*read_weights(run if run.is_file() else checkpoint, base, qwen), "cpu", torch.float32)
    merge_lora(model)
    model.save(folder)
    print(f"{folder}, in float32")


def export_lora(run, path, style):
    """The DiT's LoRA of a run's last checkpoint, or of the file given, in a spelling that others read."""
    checkpoint = checkpoint_of(run, "--export-lora")
    write_lora(run if run.is_file() else checkpoint / "weights.safetensors", path, style)
    print(f'{path}: {style}; python sample.py in.mp4 "..." --lora {path}')


def checkpoint_of(run, flag):
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"{flag} {run}: not the folder of a run or of a checkpoint")
    return checkpoint


# Watching


class Log:
    """metrics.jsonl, one line a step, and TensorBoard if it is installed."""

    def __init__(self, out, first):
        self.file, self.board = None, None
        if not first:
            return
        self.file = (out / "metrics.jsonl").open("a")
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))

    def write(self, line):
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}  # NaN is no JSON
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.board:
            for name, value in line.items():
                value is None or self.board.add_scalar(name, value, line["step"])

    def close(self):
        self.file and self.file.close()
        self.board and self.board.close()


def cut_log(path, step):
    """Drop the lines after a step, which will be trained again, and a last one that is not whole."""
    if path.is_file():
        lines = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in lines))


def write_config(args, stage, model, out):
    """What the run was asked for, resolved: config.json."""
    typed = {name: Path(vars(args)[name]) for name in ("weights", "base", "qwen") if vars(args)[name]}
    began = {name: path for name, path in typed.items() if path.exists() and not path.is_absolute()}
    config = {"format": "nanokiwi run", "args": vars(args), "stage": asdict(stage), "model": asdict(model.config),
              "began": {name: os.path.relpath(path.resolve(), out.resolve()) for name, path in began.items()}}  # fmt: skip
    write_text(out / "config.json", json.dumps(config, indent=1))


def batch_flops(config, stage, batch, tokens):
    """Floating-point operations of a batch's forward and backward in the DiT, the recomputing not counted.

    Linear layers: 2 a weight and token, twice that in the backward (once where the weights are frozen). Attention:
    4 N^2 D a layer, twice that in the backward.
    """
    c, m, samples = config.dit, config.mllm, len(batch["prompts"])
    n, context = tokens / samples, (m.num_image_queries + m.num_video_queries + m.num_ref_queries) / 3
    linear = n * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + context * 2 * c.dim**2
    attention = 2 * n * (n + context) * c.dim
    passes = 3 if "dit" in stage.trains else 2
    return samples * c.num_layers * 2 * (passes * linear + 3 * attention)


def machine_use(ranks, flops_s):
    """Model FLOPs utilisation and peak memory, on a GPU; on a CPU the process's peak memory alone."""
    if ranks.device.type != "cuda":
        return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "tflop_s": flops_s / 1e12}
    name = torch.cuda.get_device_name(ranks.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    use = {"memory_gib": torch.cuda.max_memory_allocated(ranks.device) / 2**30, "tflop_s": flops_s / 1e12}
    return use | ({"mfu": flops_s / ranks.world / peak} if peak else {})


def plot(run):
    """Draw metrics.jsonl as loss.svg."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --plot takes the folder of a run")
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # the last may be half written
    points = [(line["step"], line["loss"]) for line in lines if math.isfinite(line["loss"])]
    if not points:
        raise ValueError(f"{path}: has no losses yet")
    write_text(run / "loss.svg", svg(points))
    print(run / "loss.svg")


def svg(points, width=800, height=400, margin=60):
    """Points (step, loss) and their running mean as an SVG."""
    steps, losses = zip(*points)
    left, right, low, high = steps[0], max(steps[-1], steps[0] + 1), min(losses), max(max(losses), min(losses) + 1e-9)
    mean, smooth = losses[0], []
    for loss in losses:
        mean += (loss - mean) * min(1, 20 / len(losses))
        smooth.append(mean)

    def line(values, style):
        xy = ((margin + (s - left) / (right - left) * (width - 2 * margin),
               height - margin - (v - low) / (high - low) * (height - 2 * margin)) for s, v in zip(steps, values))  # fmt: skip
        return f'<polyline fill="none" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in xy)}"/>'

    def text(x, y, words):
        return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="13">{words}</text>'

    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><rect width="100%" height="100%" fill="white"/>',
        line(losses, 'stroke="#9bc" stroke-width="1"'), line(smooth, 'stroke="#136" stroke-width="2"'),
        text(5, margin, f"{high:.4g}"), text(5, height - margin, f"{low:.4g}"), text(margin, height - 20, f"step {left}"),
        text(width - margin - 40, height - 20, right), text(width / 2 - 20, 30, "loss"), "</svg>\n",
    ])  # fmt: skip


# Settings


def with_settings(config, settings):
    """A dataclass with `key=value` settings, each cast to its field's type. ValueError for a key it has not."""
    known = {field.name: field.type for field in fields(config)}
    changes = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(f"--set {setting}: {type(config).__name__} has no {key!r}; it has {', '.join(known)}")
        try:
            changes[key] = cast(value, getattr(config, key), known[key])
        except ValueError:
            raise ValueError(f"--set {setting}: {value!r} is not of the kind of {getattr(config, key)!r}") from None
    return replace(config, **changes)


def cast(value, old, kind=None):
    """Text as a value of the type of `old`, or, where that tells of none, as Python has it. kind: the field's, which alone
    tells that a number may also be left out. ValueError where it is none."""
    if kind == int | None:
        return None if value.lower() == "none" else int(value)
    if isinstance(old, bool):
        return bool(("false", "true").index(value.lower()))
    if old is None or old == ():
        try:
            return literal_eval(value)
        except SyntaxError:
            raise ValueError(value) from None
    if isinstance(old, tuple):
        return tuple(cast(part, old[0]) for part in value.split(","))
    return type(old)(value)


def with_model_settings(config, settings):
    """A KiwiConfig with `model.key=value`, `dit.key=value`, `vae.`, `mllm.` settings."""
    grouped = {}
    for setting in settings:
        part, dot, rest = setting.partition(".")
        if dot and "=" not in part:
            grouped.setdefault(part, []).append(rest)
    for part, values in grouped.items():
        if part == "model":
            config = with_settings(config, values)
        elif part in ("dit", "vae", "mllm"):
            config = replace(config, **{part: with_settings(getattr(config, part), values)})
        else:
            raise ValueError(f"--set {part}.{values[0]}: no such part; there are model, dit, vae, mllm")
    return config


def run():
    """main, with every foreseeable failure as one line on stderr and an exit code that is not 0."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except (
        KeyboardInterrupt
    ):  # before the first step or while a cache is written: the trainer itself saves and ends well
        sys.exit("\ntrain.py: interrupted; a cache that is written goes on where it stopped")
    except torch.OutOfMemoryError:
        sys.exit(
            "train.py: out of GPU memory; --dry-run says what a rank needs: take more GPUs, fewer --set pixels= or frames=, or a smaller --config"
        )
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(f"train.py: {str(error).strip()} Out of memory? Take fewer --workers, and go on with --resume auto")


if __name__ == "__main__":
    run()
