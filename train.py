"""Train Kiwi-Edit: `torchrun --nproc-per-node 8 train.py --stage 3 --data DIR --weights RUN --out RUN`.

    CSV rows -> batches of one shape, decoded by workers (data.py)
      -> latents of target, source and reference (VAE, frozen); requests (MLLMEncoder.prepare)
      -> noise and a timestep from the sample's number -> KiwiEdit.forward -> loss -> gradients of the global batch
      -> AdamW -> every N steps a checkpoint, written while training goes on

Three stages (paper, Section 5.1): the MLLM learns to speak to the DiT, both learn to edit, both learn references.
What a stage trains is a row of `STAGES`. Randomness belongs to samples, by their number, and not to processes: one
process, DDP, FSDP2, sequence parallelism and a run that was killed and resumed give the same losses. The release
cannot resume, takes one sample at a time and replaces broken ones in silence.
"""

import argparse
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
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path

EXAMPLES = """examples:
  python train.py --config nano --stage 1 --data data/nano --weights weights/nano --out runs/1 --set steps=200
  torchrun --nproc-per-node 8 train.py --stage 2 --data DIR --weights runs/1 --out runs/2 --resume auto

where training starts (--weights): a run of this program (its last checkpoint), a checkpoint folder of one, a folder
  that nanoKiwi saved, the released diffusers layout, or a released training checkpoint (.safetensors) over --base and
  --qwen. Without it: --base and --qwen alone (nano: weights/nano, or random if it is not there), or, with --init
  random, nothing but --qwen's config and tokenizer (nano: those of weights/nano/mllm).
several processes (torchrun): data parallel by --parallel, and --sp N of them share each sequence.
a run is watched by metrics.jsonl, TensorBoard if installed, and `python train.py --plot RUN` (an SVG).
"""
ALIGN = ("lora", "mllm.image_queries", "mllm.connector")
EDIT = (*ALIGN, "mllm.video_queries", "dit", "source_embedder")
REFER = (*EDIT, "mllm.ref_queries", "mllm.ref_connector", "ref_embedder")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NANO = Path(__file__).parent / "weights" / "nano"
NANO_MLLM = NANO / "mllm"  # sizes and tokenizer of a small Qwen2.5-VL
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
    lr: float = 2e-5
    warmup: int = 100  # steps
    schedule: str = "constant"  # or "cosine", "linear": down to nothing
    optimizer: str = "adamw"  # or "muon": orthogonalised updates for matrices, AdamW for the rest
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0  # of the gradient's norm; 0: none
    shift: float = 5.0
    weighting: str = "bell"  # of the loss over the timesteps, or "none" (FlowMatch)
    balance: bool = False  # what an edit changes and what it keeps count by the roots of their shares (balance_weights)
    ref_shrink: float = 0.7  # a reference is shrunk by a random factor between this and 1
    ema: float = 0.0  # decay of the averaged weights; 0: none

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"Stage.schedule: {self.schedule!r}, expected constant, cosine or linear")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"Stage.optimizer: {self.optimizer!r}, expected adamw or muon")
        if self.weighting not in ("bell", "none"):
            raise ValueError(f"Stage.weighting: {self.weighting!r}, expected bell or none")
        if self.balance and not self.source:
            raise ValueError("Stage.balance: this stage shows the DiT no source, so nothing tells what an edit changes")
        for name in ("steps", "global_batch", "batch", "frames", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage.{name}: {getattr(self, name)}, expected at least 1")
        if min(self.pixels) < 1:
            raise ValueError(f"Stage.pixels: {min(self.pixels)}, expected at least 1")
        if not self.clip >= 0:
            raise ValueError(f"Stage.clip: {self.clip}, expected the largest norm of a gradient, or 0 for none")
        if not 0 < self.ref_shrink <= 1:
            raise ValueError(f"Stage.ref_shrink: {self.ref_shrink}, expected a factor above 0, at most 1")
        if self.global_batch % self.batch:
            raise ValueError(f"Stage.global_batch: {self.global_batch} is not a multiple of batch {self.batch}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"Stage.ema: {self.ema}, expected 0, or the decay of an average, below 1")
        if min(self.ratio.values()) < 0:
            raise ValueError(f"Stage.image, Stage.video, Stage.ref: {self.ratio}, expected shares of at least 0")
        if not any(self.ratio.values()):
            raise ValueError("Stage.image, Stage.video, Stage.ref: all 0, so there is nothing to train on")

    @property
    def ratio(self):
        return {"image": self.image, "video": self.video, "ref": self.ref}

    @property
    def batches(self):
        """Forwards of one update, over all ranks."""
        return self.global_batch // self.batch


STAGES = {
    "paper": {
        1: Stage(ALIGN, source=False, steps=30_000),
        2: Stage(EDIT, 1, 1, pixels=(360_000, 960_000)),
        3: Stage(REFER, 2, 1, 1),
    },
    # its global batch is the number of kinds of data on each of, here, 8 GPUs, its gradients are not clipped; stage 2 is
    # 20K steps at each size, and of stage 3 there is one for references alone: --set image=0 video=0 steps=30000 global_batch=8
    "released": {
        1: Stage(ALIGN, source=False, pixels=(1024 * 1024,), lr=1e-5, warmup=0, clip=0, steps=30_000, global_batch=8),
        2: Stage(EDIT, 1, 1, pixels=(600 * 600, 720 * 1280), lr=1e-5, warmup=0, clip=0, steps=40_000, global_batch=16),
        3: Stage(REFER, 1, 1, 1, pixels=(720 * 1280,), lr=5e-6, warmup=0, clip=0, steps=15_000, global_batch=24),
    },
}


def choose_stage(args):
    """The stage asked for; the release trains the 14B model's DiT by LoRA, on shorter clips (with half the learning rate at
    720p), and gives its language model a larger LoRA."""
    stage = STAGES[args.preset][args.stage]
    if args.preset == "released" and args.config == "wan21_14b":
        stage = replace(stage, lora_rank=256, lora_targets=(*ATTENTION, "gate_proj", "down_proj", "up_proj"))
        if args.stage > 1:
            trains = tuple("dit.lora" if part == "dit" else part for part in stage.trains)
            stage = replace(stage, trains=trains, dit_lora_rank=128, frames=49)
    return with_settings(stage, [s for s in args.set if "." not in s.split("=")[0]])


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Train Kiwi-Edit in three stages, on a laptop or on many GPUs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="wan22_5b", choices=("wan22_5b", "wan21_14b", "wan21_1_3b", "nano"),
        help="sizes, where the weights do not tell (default %(default)s)")  # fmt: skip
    add("--stage", type=int, choices=(1, 2, 3), help="1 align, 2 edit, 3 edit with references")
    add("--preset", choices=list(STAGES), default="paper", help="whose numbers (default %(default)s)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="steps=100 lr=1e-4 model.source=add_unscaled ...",
    )
    add("--data", nargs="+", default=["data"], metavar="DIR",
        help="have image.csv, video.csv, ref_video.csv (or .parquet); several are trained as one (default: data)")  # fmt: skip
    add("--image-csv", metavar="FILE", help="this instead of DIR/image.csv")
    add("--video-csv", metavar="FILE", help="likewise")
    add("--ref-csv", metavar="FILE", help="likewise")
    add("--base-path", metavar="DIR", help="what the paths in the tables start from (default: the table's folder); "
        "with any --*-csv, in those alone")  # fmt: skip
    add("--out", metavar="RUN", help="folder of the run: config.json, metrics.jsonl, checkpoints (default: runs/STAGE)")
    add("--weights", metavar="PATH|HUB_ID", help="where to start (see below; default, without --out: the run before)")
    add("--base", metavar="PATH|HUB_ID", help="Wan's weights (default: those of --config on the hub)")
    add("--qwen", metavar="PATH|HUB_ID", help="Qwen2.5-VL's (default: Qwen/Qwen2.5-VL-3B-Instruct)")
    add("--init", choices=("weights", "random"), default="weights", help="random: no weights at all")
    add(
        "--resume",
        metavar="auto|PATH",
        help="continue from the run's last checkpoint if there is one, or from this one",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="order of the data, noise and what is not in the weights (default %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of computing; the trained weights are float32 (default: by device)",
    )
    add("--parallel", choices=("ddp", "fsdp"), help="how ranks share the work (default: fsdp on GPUs, ddp on CPUs)")
    add("--sp", type=int, default=1, metavar="N", help="ranks that share a sequence (Ulysses; default %(default)s)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute blocks in the backward")
    add("--cache", metavar="DIR", help="take latents from here, where `python data.py cache` wrote them")
    add("--write-cache", metavar="DIR", help="write them there, and train nothing (what `python data.py cache` calls)")
    add("--workers", type=int, default=2, help="processes a rank that decode (default %(default)s)")
    add(
        "--max-bad",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="stop if more samples are broken (default %(default)s)",
    )
    add("--save-every", type=int, default=500, metavar="STEPS", help="default %(default)s")
    add("--save-minutes", type=float, default=30.0, metavar="M", help="save after so long too (default %(default)g)")
    add("--keep", type=int, default=3, metavar="K", help="checkpoints that stay (default %(default)s)")
    add(
        "--sample-every", type=int, default=0, metavar="STEPS", help="edit the first row of each table (default: never)"
    )
    add("--sample-steps", type=int, default=20, metavar="STEPS", help="denoising steps of that (default %(default)s)")
    add("--dry-run", action="store_true", help="print the stage, sizes, memory and first batches; train nothing")
    add("--export", metavar="RUN", help="write a run's last checkpoint, or a file of one such as ema.safetensors, as a "
        "whole model to --out, LoRA merged; nothing else")  # fmt: skip
    add("--plot", metavar="RUN", help="draw the losses of a run to RUN/loss.svg, nothing else")
    args = parser.parse_args(argv)
    for flag, least in (
        ("save_every", 1),
        ("keep", 1),
        ("sample_every", 0),
        ("sample_steps", 1),
        ("workers", 0),
        ("max_bad", 0),
    ):
        if not getattr(args, flag) >= least:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least {least}")
    if args.export and args.out is None:
        parser.error("--export needs --out")
    if not args.plot and not args.export and args.stage is None:
        parser.error("--stage is needed")
    if args.out is None and args.stage:
        args.out, before = f"runs/{args.stage}", Path(f"runs/{args.stage - 1}")
        if (
            args.weights is None and args.init == "weights" and any(before.glob("step-*"))
        ):  # not of one that never began
            args.weights = str(before)
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and slips of the pen answer before torch is there

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from connectors import inject_lora, merge_lora
from data import (
    SHARD,
    CachedPairs,
    Curriculum,
    Mixture,
    Pairs,
    fill_buckets,
    find_tables,
    fingerprint,
    measure_rows,
    read_pair,
    read_table,
    shard_path,
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
from media import MediaError, pad_reference, whole_file, write_image, write_text, write_video
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit, read_weights
from parallel import Ranks, parallelise


def main(argv=None):
    args = parse_arguments(argv)
    with suppress(
        ValueError, OSError
    ):  # workers hand over every tensor of a batch as an open file; macOS refuses "all"
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if args.plot:
        return plot(Path(args.plot))
    if args.export:
        return export(Path(args.export), Path(args.out), args.base, args.qwen)
    stage = choose_stage(args)
    ranks = Ranks(args.parallel, args.dtype, args.sp, args.dry_run)
    try:
        if stage.batches % ranks.dp:
            raise ValueError(
                f"global_batch / batch is {stage.batches}, not a multiple of {ranks.dp} data-parallel ranks"
            )
        checkpoint = open_run(args, ranks)
        curriculum, tables = open_data(args, stage, ranks)  # first: a slip here should not cost the loading of 5B
        model = load_model(args, stage, ranks, checkpoint)
        if args.dry_run:
            return ranks.first and describe(args, stage, ranks, model, curriculum)
        if args.write_cache:
            return write_cache(args, stage, ranks, model, curriculum, tables)
        trainer = Trainer(args, stage, ranks, model, curriculum, tables)
        trainer.train(checkpoint)
    finally:
        ranks.leave()


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


# The model


def load_model(args, stage, ranks, checkpoint):
    """The model with the weights to start from, LoRA in place, trained parts in float32 and the rest in `dtype`, and
    exactly what the stage trains requiring gradients."""
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
    torch.manual_seed(args.seed)  # of what the weights lack
    model = start_model(config, None if args.dry_run else files, ranks.device)
    held = {len(p) for name, p in model.mllm.named_parameters() if ".lora_A." in name}  # ranks
    if not held:
        inject_lora(model.mllm.language_model, stage.lora_rank, stage.lora_targets)
    elif held != {stage.lora_rank} and ranks.first:
        print(f"warning: the weights have LoRA of rank {max(held)}, which goes on: lora_rank={stage.lora_rank} is for weights without",
              file=sys.stderr)  # fmt: skip
    if stage.dit_lora_rank and not has_lora(model.dit):
        inject_lora(model.dit, stage.dit_lora_rank, ("q", "k", "v", "o", "ffn.0", "ffn.2"))
    choose_trained(model, stage)
    if args.dry_run:
        return model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else ranks.dtype)
    if checkpoint:  # only now: in the 16 bits of the weights it started from it would lose half its digits
        load_weights(model, TensorFiles().add(checkpoint / "weights.safetensors"), partial=True)
    if args.stage > 1 and not model.mllm.connector[2].weight.any() and ranks.first:
        print("warning: the Query Connector is untrained, so stage 1 was left out; the paper measured 1.47/3.01 without "
              "it against 2.84/3.98 (Table 5)", file=sys.stderr)  # fmt: skip
    return model.train()


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
    if args.dry_run:
        return config, TensorFiles()
    if not (out / "init").exists() and ranks.first:
        torch.manual_seed(args.seed)
        KiwiEdit(with_model_settings(config, args.set)).save(out / "init")
    ranks.barrier()
    return read_weights(out / "init")


def start_model(config, files, device):
    """A model with the weights of `files`, and initial values for what they lack of Kiwi-Edit. files None: on meta."""
    return KiwiEdit(config, empty=True) if files is None else KiwiEdit.with_weights(config, files, device)[0]


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


def export(run, folder, base=None, qwen=None):
    """The last checkpoint of a run as a whole model, LoRA merged, in a folder that sample.py takes; or the one given, or
    its ema.safetensors. base, qwen: of what the run began with, where that has moved."""
    only_weights(folder)
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"--export {run}: not the folder of a run or of a checkpoint")
    begun = began_with(checkpoint.parent)
    if Path(folder).resolve() in [
        Path(start).resolve() for start in (base, begun["weights"], begun["base"], begun["qwen"]) if start
    ]:
        raise ValueError(
            f"--out {folder}: {run} lies over these weights and needs them as they are; give another folder"
        )
    model = start_model(*read_weights(run if run.is_file() else checkpoint, base, qwen), "cpu")
    merge_lora(model)
    model.save(folder)
    print(folder)


# The data


def open_data(args, stage, ranks):
    """The tables of the stage's kinds of data, and the order in which their rows come."""
    own = {"image": args.image_csv, "video": args.video_csv, "ref": args.ref_csv}
    kinds = [kind for kind, share in stage.ratio.items() if share]
    tables, shapes = {}, {}
    for kind in kinds:
        paths = [own[kind]] if own[kind] else find_tables(args.data, kind)
        # with tables of other names --base-path is theirs alone: those of --data begin at their folder
        base = args.base_path if own[kind] or not any(own.values()) else None
        tables[kind] = [row for path in paths for row in read_table(path, kind, base)]
    for kind, rows in tables.items():
        shapes[kind] = shapes_of(args, ranks, kind, rows)
        broken = [(rows[i].target, shape) for i, shape in enumerate(shapes[kind]) if isinstance(shape, str)]
        if ranks.first and not (Path(args.out) / "metrics.jsonl").exists():  # a run that resumes has logged them
            report_bad(args, ranks, 0, broken)
        if 100 * len(broken) > args.max_bad * len(rows) or len(broken) == len(rows):
            raise ValueError(f"{len(broken)} of {len(rows)} {kind} rows cannot be read (--max-bad {args.max_bad:g}); "
                             f"the first: {broken[0][1]}")  # fmt: skip
    phases = []
    for i, pixels in enumerate(stage.pixels):
        buckets = {kind: fill_buckets(shapes[kind], stage.frames, pixels) for kind in kinds}
        start = i * stage.steps // len(stage.pixels) * stage.batches
        phases.append((start, Mixture(buckets, stage.ratio, stage.batch, f"{args.seed} {i}")))
    return Curriculum(phases), tables


def shapes_of(args, ranks, kind, rows):
    """The shape of every row, or the reason why it has none: measured by all ranks, or as the cache remembers it, for
    opening tens of thousands of files takes minutes."""
    folder = args.cache or args.write_cache
    known = folder and Path(folder) / f"shapes-{kind}-{fingerprint(rows)}.json"
    if args.cache and known.is_file():
        return [shape if isinstance(shape, str) else tuple(shape) for shape in read_json(known)]
    mine = range(ranks.rank, len(rows), ranks.world)
    measured = measure_rows([rows[i] for i in mine], kind == "image")
    shapes = [shape for _, shape in sorted(ranks.gathered(list(zip(mine, measured))), key=lambda x: x[0])]
    if args.write_cache and ranks.first:
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text(known, json.dumps(shapes))
    return shapes


def write_cache(args, stage, ranks, model, curriculum, tables):
    """Latents of every row at every size of the stage, and what the MLLM will see of it: a file for 64 rows of a table.

    A file that is there stays: the command can be interrupted. References are shrunk once and for all.
    """
    folder = Path(args.write_cache)
    folder.mkdir(parents=True, exist_ok=True)
    begun = begin_cache(folder, cached_buckets(model, stage, curriculum, tables), ranks)
    shards = [
        (kind, shape, k, list(rows))
        for (kind, shape), numbers in rows_of_shapes(curriculum).items()
        for k, rows in groupby(numbers, lambda number: number // SHARD)
    ]
    for kind, shape, k, rows in tqdm(
        shards[ranks.rank :: ranks.world], desc="cache", unit="file", disable=not ranks.first
    ):
        path, tensors = shard_path(folder, kind, shape, k), {}
        if path.is_file():
            continue
        for number in rows:
            row = tables[kind][number]
            try:
                target, source, ref = read_pair(row, shape)
            except MediaError as error:
                report_bad(args, ranks, 0, [(row.target, str(error))])
                continue
            parts = zip(
                ("target", "source", "ref"), encode(model, stage, target, source, ref, random.Random(number).random())
            )
            tensors |= {
                f"{number}.{name}": latents.cpu().contiguous() for name, latents in parts if latents is not None
            }
            for name, frames in model.mllm.resize(source, ref)[1].items():
                tensors[f"{number}.mllm.{name}"] = frames.contiguous()
        with whole_file(path) as temporary:
            save_file(tensors, temporary)
    ranks.barrier()
    if ranks.first:
        write_text(folder / "cache.json", json.dumps(begun))
        print(folder)


def rows_of_shapes(curriculum):
    """{(kind, shape): numbers of the rows, rising}, of all phases: one phase may give a shape fewer rows than another."""
    found = {}
    for _, mixture in curriculum.phases:
        for kind, buckets in mixture.buckets.items():
            for shape, numbers in buckets.items():
                found.setdefault((kind, shape), set()).update(numbers)
    return {key: sorted(numbers) for key, numbers in found.items()}


def begin_cache(folder, wanted, ranks):
    """Note what is being written, before its first file: a file that is there already is of the same -> all that the
    folder will hold. ValueError where it was begun with something else."""
    path = folder / "begun.json"
    told = next((p for p in (path, folder / "cache.json") if p.is_file()), None)
    held = read_json(told) if told else {}
    if other := sorted(name for name, value in wanted.items() if held.get(name, value) != value):
        raise ValueError(
            f"{folder}: was begun with other rows, weights or settings ({', '.join(other)}); give another --out, or delete it"
        )
    ranks.barrier()  # all have looked
    if ranks.first:
        write_text(path, json.dumps(held | wanted))
    return held | wanted


def cached_buckets(model, stage, curriculum, tables):
    """What a cache holds: {"image-1x64x64": fingerprint of its rows, of their numbers (by which
    tensors are found) and of what made latents and pictures of them, ...}."""
    c = model.config
    vae = [(name, p.detach().flatten()[:16].bfloat16().tolist()) for name, p in model.vae.named_parameters()]
    made = [
        json.dumps(asdict(c.vae)),
        vae,
        c.mllm.max_pixels,
        c.mllm.max_frames,
    ]  # JSON: a list or a tuple, as it was read
    return {
        shard_path("", kind, shape, 0).name.rsplit("-", 1)[0]: fingerprint(
            [tables[kind][i] for i in rows], [rows, *made] + [c.mllm.max_ref_tokens, stage.ref_shrink] * (kind == "ref")
        )
        for (kind, shape), rows in rows_of_shapes(curriculum).items()
    }


def fits_cache(folder, held):
    """ValueError unless the cache has what `held` names (`cached_buckets`); it may have more, such as another stage's."""
    path = Path(folder) / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data.py cache --out {folder} ...` writes it")
    if other := sorted(held.items() - read_json(path).items()):
        raise ValueError(f"{folder}: was written for other tables, pixels, frames, weights or settings "
                         f"({', '.join(name for name, _ in other)}); write another with data.py cache")  # fmt: skip


def report_bad(args, ranks, step, broken):
    """Append broken samples, (path, reason), to the run's bad.jsonl."""
    if broken and not args.dry_run and ranks.rank % ranks.sp == 0:
        with (Path(args.out) / "bad.jsonl").open("a") as file:
            file.write("".join(json.dumps({"step": step, "path": p, "reason": r}) + "\n" for p, r in broken))


def rank_batches(curriculum, stage, ranks, step):
    """The numbers of this rank's batches in a step. Which batches a step has does not depend on the ranks; they are
    dealt out by size, so that ranks which wait for one another have the same amount of work."""
    numbers = range(step * stage.batches, (step + 1) * stage.batches)
    by_size = sorted(numbers, key=lambda n: (math.prod(curriculum[n][2]), n))
    return by_size[ranks.data_rank :: ranks.dp]


# Training


def of_one_rank(tensor, ranks):
    """A DTensor's memory as a plain tensor where one rank has all of it, else what is given: each of Muon's thirty
    operations a matrix takes longer to dispatch on a DTensor than a small model's to do."""
    if tensor is None or ranks.world > 1 or not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


def make_optimizers(stage, trained):
    """AdamW (paper, Section 5.1); or Muon for what is a matrix, its updates as large as AdamW's would be (arXiv
    2502.16982, Eq. 4), and AdamW for the rest: queries, norms, modulations, patch embeddings. ValueError for one with
    fewer rows than there are ranks that share it: torch's Muon cannot update that."""
    matrices = {name: p for name, p in trained.items() if stage.optimizer == "muon" and is_matrix(name, p)}
    for name, p in matrices.items():
        if len(p) < (ranks := p.device_mesh.size() if hasattr(p, "device_mesh") else 1):
            raise ValueError(
                f"--set optimizer=muon: {name} has {len(p)} rows for {ranks} ranks; take a larger lora_rank, or adamw"
            )
    chosen, optimizers = set(matrices.values()), []
    if matrices:
        muon = torch.optim.Muon(
            list(matrices.values()), stage.lr, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    if rest := [p for p in trained.values() if p not in chosen]:
        adamw = torch.optim.AdamW(rest, lr=stage.lr, betas=(0.9, stage.beta2), weight_decay=stage.weight_decay)
        optimizers.append(adamw)
    return optimizers


def is_matrix(name, parameter):
    """Whether Muon may orthogonalise its updates: not a table of queries, not a row such as `source_scale`."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and not name.endswith("_queries")


class Trainer:
    """The loop and what it keeps: model, optimizers, averaged weights, and the counters that a checkpoint holds."""

    def __init__(self, args, stage, ranks, model, curriculum, tables):
        self.args, self.stage, self.ranks, self.model = args, stage, ranks, model
        self.curriculum, self.tables = curriculum, tables
        self.counts = Counter(
            {"step": 0, "updates": 0, "samples": 0, "tokens": 0, "bad": 0, "skipped": 0, "seconds": 0.0}
        )
        self.module = parallelise(model, ranks, args.checkpointing)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.updated = {name: of_one_rank(p, ranks) for name, p in self.trained.items()}
        self.optimizers = make_optimizers(stage, self.updated)
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()} if stage.ema else {}
        self.saver = Checkpoints(Path(args.out), args.keep, ranks)
        self.begun_with = {kind: fingerprint(rows) for kind, rows in tables.items()}
        self.batches, self.stop = None, None
        self.trouble = 0  # steps skipped in a row

    def train(self, checkpoint):
        if checkpoint:
            self.restore(checkpoint)
        before = {name: signal.signal(name, self.ask_to_stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.loop()
        finally:  # of an error too
            self.saver.thread.shutdown()  # it needs the process groups
            if hasattr(
                self.batches, "_shutdown_workers"
            ):  # they ignore SIGTERM: the interpreter would wait for them for ever
                self.batches._shutdown_workers()
            for name, handler in before.items():
                signal.signal(name, handler)

    def loop(self):
        out, stage, counts, saved = Path(self.args.out), self.stage, self.counts, time.monotonic()
        if self.ranks.first:
            write_config(self.args, stage, self.model, out)
            cut_log(out / "metrics.jsonl", counts["step"])
            cut_log(out / "bad.jsonl", counts["step"])
        self.batches = iter(self.loader())
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)  # `memory_gib` is of the steps, not of the loading
        with (
            closing(Log(out, self.ranks.first)) as log,
            tqdm(
                total=stage.steps, initial=counts["step"], desc=f"stage {self.args.stage}", disable=not self.ranks.first
            ) as bar,
        ):
            while counts["step"] < stage.steps:
                line = self.step()
                if line is None:
                    break
                self.saver.check()
                log.write(line)
                bar.set_postfix(
                    loss=f"{line['loss']:.4f}", lr=f"{line['lr']:.1e}", samples_s=f"{line['samples_s']:.2f}"
                )
                bar.update()
                step, late = counts["step"], self.ranks.any(time.monotonic() - saved > 60 * self.args.save_minutes)
                if (step % self.args.save_every == 0 or late) and step < stage.steps:
                    self.save()
                    saved = time.monotonic()
                if self.args.sample_every and step % self.args.sample_every == 0:
                    self.sample(step)
        if counts["step"] not in self.saver.steps:
            self.save()
        self.saver.wait()
        if self.ranks.first:
            print(f"{self.stop + ': ' if self.stop else ''}step {counts['step']} of {stage.steps}, {self.saver.path(counts['step'])}"
                  f"{'; go on with --resume auto' if self.stop else ''}")  # fmt: skip

    def ask_to_stop(self, number, frame):
        if self.ranks.first and not self.stop:
            print(
                f"{signal.Signals(number).name}: the step under way is finished and saved", file=sys.stderr, flush=True
            )
        self.stop = signal.Signals(number).name

    def loader(self):
        if self.args.cache:
            fits_cache(self.args.cache, cached_buckets(self.model, self.stage, self.curriculum, self.tables))
            pairs = CachedPairs(self.tables, self.curriculum, self.args.cache)
        else:
            pairs = Pairs(self.tables, self.curriculum, self.model.mllm.resize)
        steps = range(self.counts["step"], self.stage.steps)
        order = (number for step in steps for number in rank_batches(self.curriculum, self.stage, self.ranks, step))
        context = "fork" if self.args.workers else None  # a worker has the tokenizer of this process
        return torch.utils.data.DataLoader(
            pairs, None, sampler=order, num_workers=self.args.workers, multiprocessing_context=context,
            worker_init_fn=leave_signals_to_the_trainer,
        )  # fmt: skip

    def step(self):
        """One update -> its line of metrics; None if a signal came before its end: then it leaves no trace."""
        started, stage = time.perf_counter(), self.stage
        here = stage.batches // self.ranks.dp
        loss_sum, tokens, flops, broken, paths = 0.0, 0, 0.0, [], []
        for i in range(here):
            batch = next(self.batches)
            if self.ranks.any(self.stop is not None):
                self.module.zero_grad()
                self.stop = self.stop or "a signal to another rank"
                return None
            if "fatal" in batch:
                raise ValueError(batch["fatal"])
            last = i == here - 1
            with nullcontext() if last or not hasattr(self.module, "no_sync") else self.module.no_sync():
                loss, size = self.loss(batch)
                (loss / here).backward()
            loss_sum += loss.item()
            tokens += size
            flops += batch_flops(self.model, stage, batch, size)
            broken += batch["bad"]
            paths += [] if math.isfinite(loss.item()) else batch["paths"]
        rate = learning_rate(stage, self.counts["step"])
        norm = self.update(rate, paths, batch["paths"][0])
        report_bad(self.args, self.ranks, self.counts["step"] + 1, broken)
        sums = self.ranks.total([loss_sum, tokens, flops, len(broken)])
        loss_sum, tokens, flops, bad = (x / self.ranks.sp for x in sums)
        seconds = time.perf_counter() - started
        self.count(tokens, bad, seconds)
        line = {"step": self.counts["step"], "loss": loss_sum / stage.batches, "grad_norm": norm, "lr": rate,
                "seconds": seconds, "samples_s": stage.global_batch / seconds, "tokens_s": tokens / seconds,
                "bad": self.counts["bad"], "skipped": self.counts["skipped"]}  # fmt: skip
        return line | machine_use(self.ranks, flops / seconds)

    def loss(self, batch):
        """The mean loss of a batch and the number of its tokens in the DiT."""
        flow, model = FlowMatch(self.stage.shift, weighting=self.stage.weighting), self.model
        draws = [draw(self.args.seed, number, flow, model.config.dit.bf16_timesteps) for number in batch["numbers"]]
        generators, t, chance = zip(*draws)
        pictures = [(target, source if self.stage.source else None, ref) for target, source, ref in batch["pictures"]]
        if not self.args.cache:
            pictures = [encode(model, self.stage, *own, c) for own, c in zip(pictures, chance)]
        latents, source, ref = (
            None if part[0] is None else torch.stack(part).to(self.ranks.device).float() for part in zip(*pictures)
        )
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(self.ranks.device)
        t = torch.stack(t).to(self.ranks.device)
        requests = [model.mllm.assemble(prompt, *seen) for prompt, seen in zip(batch["prompts"], batch["visuals"])]
        frames = latents.shape[2] + (0 if ref is None else ref.shape[2])
        tokens = len(latents) * frames * math.prod(model.dit.grid(latents)[1:])
        apart = self.ranks.world > 1 and self.stage.ref > 0
        return self.module(requests, latents, t, source, ref, noise, flow, self.stage.balance, apart), tokens

    def update(self, rate, suspects, last):
        """Clip the gradients and step the optimizers, unless they are not finite -> the gradients' norm."""
        for p, updated in zip(self.trained.values(), self.updated.values()):
            updated.grad = of_one_rank(p.grad, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(self.updated.values(), self.stage.clip or math.inf)
        norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            self.counts["updates"] += 1
            self.trouble = 0
            if self.ema:
                torch._foreach_lerp_(
                    list(self.ema.values()), [p.detach() for p in self.trained.values()], 1 - self.stage.ema
                )
        else:
            self.skip(norm, suspects, last)
        self.module.zero_grad()
        for updated in self.updated.values():
            updated.grad = None
        return norm

    def skip(self, norm, suspects, last):
        """Tell of a step whose gradient is not finite, and of the samples whose loss is not. ValueError for five in a row."""
        self.counts["skipped"] += 1
        self.trouble += 1
        suspects = self.ranks.gathered(suspects)
        samples = ", ".join(suspects[:4]) or f"none has a loss that is not finite; the last was {last}"
        message = f"step {self.counts['step'] + 1} skipped: its gradient is {norm}; samples: {samples}"
        if self.trouble == 5:
            raise ValueError(
                f"5 steps in a row were skipped, the loss has diverged: lower lr, or look at the data. {message}"
            )
        if self.ranks.first:
            print(f"warning: {message}", file=sys.stderr)

    def count(self, tokens, bad, seconds):
        counts = self.counts
        counts.update(step=1, samples=self.stage.global_batch, tokens=tokens, bad=bad, seconds=seconds)
        if 100 * counts["bad"] > self.args.max_bad * max(counts["samples"], 100):
            raise ValueError(f"{counts['bad']:.0f} of {counts['samples']} samples could not be read, more than --max-bad "
                             f"{self.args.max_bad:g} per cent; see {self.args.out}/bad.jsonl")  # fmt: skip

    def save(self):
        told = {"counts": dict(self.counts), "stage": asdict(self.stage), "tables": self.begun_with}
        self.saver.save(told, self.stage, self.model, self.optimizer_state(), self.ema)

    def optimizer_state(self):
        """The optimizers' moments by parameter name; before the first update zeros."""
        names, moments = {p: name for name, p in self.updated.items()}, {}
        for optimizer in self.optimizers:
            for p in optimizer.param_groups[0]["params"]:
                state = optimizer.state[p]
                state.setdefault("step", torch.tensor(0.0))  # AdamW counts by parameter
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
        if (old := saved["stage"].get("optimizer", "adamw")) != self.stage.optimizer:
            raise ValueError(
                f"{checkpoint} was trained by {old}: add --set optimizer={old}, or begin anew with --weights"
            )
        if sorted(saved["stage"]["trains"]) != sorted(self.stage.trains):
            raise ValueError(
                f"{checkpoint} is of a stage that trains other parts: a next stage begins with --weights {checkpoint.parent}"
            )
        if self.ema and not saved["stage"].get("ema"):
            raise ValueError(f"{checkpoint} has no averaged weights: leave out --set ema, or begin anew with --weights")
        changed = self.changed_since(saved, read_json(checkpoint.parent / "config.json")["args"])
        if changed and self.ranks.first:
            print(f"warning: not as when {checkpoint} was written: {', '.join(changed)}", file=sys.stderr)
        state = {"optimizer": self.optimizer_state(), "ema": self.ema}
        try:
            dcp.load(state, checkpoint_id=checkpoint / "state")
        except (CheckpointException, RuntimeError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(
                f"{checkpoint}/state: cannot be read ({reason}); resume from an older checkpoint, or begin anew with --weights"
            ) from None
        for optimizer in self.optimizers:
            for moments in optimizer.state.values():
                moments["step"].fill_(self.counts["updates"])

    def changed_since(self, saved, begun):
        """What is not as a checkpoint's train.json and the arguments of its run have it, in words."""
        now = json.loads(json.dumps(asdict(self.stage)))  # lists for tuples
        then = {field.name: field.default for field in fields(self.stage)} | saved[
            "stage"
        ]  # an older one lacks what is new
        changed = [f"{key} {then[key]} -> {now[key]}" for key in now if now[key] != then[key]]
        asked, of_run = vars(self.args), ("config", "init", "weights", "base", "qwen", "seed", "data", "base_path")
        changed += [
            f"--{key} {begun[key]} -> {asked[key]}" for key in of_run if key in begun and begun[key] != asked[key]
        ]
        held = saved.get("tables", self.begun_with)
        anew = [kind for kind, rows in self.begun_with.items() if held.get(kind) != rows]
        return changed + [f"the {kind} rows, whose order begins anew" for kind in anew]

    def sample(self, step):
        """Edit the first sound row of each table, and write source, edit and target side by side."""
        self.model.eval()
        for kind, buckets in self.curriculum.phases[0][1].buckets.items():
            number, shape = min((numbers[0], shape) for shape, numbers in buckets.items())
            row = self.tables[kind][number]
            pair = None
            try:
                pair = read_pair(row, shape)
            except MediaError as error:  # no reason to end a training
                print(f"warning: no sample of {kind}: {error}", file=sys.stderr)
            if self.ranks.any(pair is None):  # one rank alone would leave the others waiting
                continue
            target, source, ref = pair
            sharded = hasattr(
                self.model, "unshard"
            )  # its parts, called one by one, need what lies outside of the blocks
            sharded and self.model.unshard()
            edited = self.model.edit(source, row.prompt, ref, self.args.sample_steps, flow=FlowMatch(self.stage.shift))
            sharded and self.model.reshard()
            if self.ranks.first:
                picture = torch.cat([source, edited, target], dim=2)
                path = (
                    Path(self.args.out) / "samples" / f"step-{step:06d}-{kind}{'.png' if kind == 'image' else '.mp4'}"
                )
                path.parent.mkdir(exist_ok=True)
                write_image(path, picture[0]) if kind == "image" else write_video(path, picture, 15)
        self.model.train()


def leave_signals_to_the_trainer(worker):
    """torchrun and Ctrl-C signal workers too; they are needed until the trainer has stopped."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


@torch.no_grad()
def encode(model, stage, target, source, ref, chance):
    """Latents (C, T, h, w) of target, source and reference. The reference is shrunk by a factor between the stage's
    `ref_shrink` and 1, as `chance` in [0, 1) has it, and centred on white."""
    if ref is not None:
        ref = pad_reference(ref, target.shape[1:3], stage.ref_shrink + (1 - stage.ref_shrink) * chance)[None]
    device = model.vae.conv1.weight.device
    return tuple(None if x is None else model.encode_frames(x.to(device))[0] for x in (target, source, ref))


def draw(seed, number, flow, rounded):
    """Generator of the noise, timestep and a number in [0, 1) of a sample: the same however the run is divided."""
    # scattered by Python's generator: torch's reads the lower 32 bits of a seed alone
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {number}").getrandbits(32))
    t = flow.timesteps(1000)[torch.randint(1000, (), generator=generator)]
    return generator, t.bfloat16().float() if rounded else t, torch.rand((), generator=generator).item()


def learning_rate(stage, step):
    """Linear warm-up, then constant or down to nothing."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return stage.lr * decay[stage.schedule]


# Checkpoints


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
            for left in [*out.glob(".step-*")]:  # of a run that was killed
                shutil.rmtree(left)
        ranks.barrier()

    def path(self, step):
        return self.out / f"step-{step:06d}"

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
        writer = dcp.FileSystemWriter(temporary / "state")
        dcp.save(snapshot["state"], storage_writer=writer, process_group=self.ranks.background)
        if not self.ranks.first:
            return
        save_file(snapshot["weights"], temporary / "weights.safetensors")
        if snapshot["ema"]:
            save_file(snapshot["ema"], temporary / "ema.safetensors")
        (temporary / "train.json").write_text(json.dumps(snapshot["train"], indent=1))
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


def copied(tensors):
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def open_run(args, ranks):
    """Make the run's folder -> the checkpoint to resume from, or None. ValueError where one would be written over."""
    out = Path(args.out)
    if ranks.first and not args.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    found = ranks.from_first([None, *valid_checkpoints(out)][-1])
    if args.resume is None and found:
        raise ValueError(f"{out} has checkpoints already; give --resume auto to continue, or another --out")
    own = find_checkpoint(Path(args.weights)) if args.weights and Path(args.weights).exists() else None
    if (
        own and own.parent.resolve() == out.resolve()
    ):  # it would be noted as what the run began with, and lead in a circle
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
    ):  # they would be taken for this run's last
        raise ValueError(f"{out} has later checkpoints than {checkpoint}: move them away, or give another --out")
    return checkpoint


# Watching


class Log:
    """metrics.jsonl, one line a step, and TensorBoard if it is installed."""

    def __init__(self, out, first):
        self.file, self.board = None, None
        if not first:
            return
        self.file = (out / "metrics.jsonl").open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))
        except ImportError:
            pass

    def write(self, line):
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, line["step"])

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


def batch_flops(model, stage, batch, tokens):
    """Floating-point operations of a batch's forward and backward in the DiT, the recomputing not counted.

    Linear layers: 2 a weight and token, twice that in the backward (once where the weights are frozen). Attention:
    4 N^2 D a layer, twice that in the backward.
    """
    c, samples = model.config.dit, len(batch["prompts"])
    n, context = tokens / samples, sum(model.mllm.num_queries.values()) / 3
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


def describe(args, stage, ranks, model, curriculum):
    """--dry-run: the stage, the sizes, the memory a rank will need, the shapes of the first batches."""
    print(f"stage {args.stage} ({args.preset}): " + ", ".join(f"{k} {v}" for k, v in asdict(stage).items()))
    for name, part in model.named_children():
        trained, frozen = (
            numbers(p for p in part.parameters() if p.requires_grad == wanted) / 1e6 for wanted in (True, False)
        )
        print(f"  {name:<15} {trained:10.1f} M trained {frozen:10.1f} M frozen")
    dp = ranks.dp
    print(
        f"one update: {stage.global_batch} samples = {stage.batches // dp} forwards of {stage.batch} on {dp} data-parallel ranks"
    )
    shapes = Counter(curriculum[n][1:3] for n in range(min(stage.batches, 4096)))
    for (kind, (frames, height, width)), count in sorted(shapes.items()):
        print(f"  {count:>6} {kind:<6} {frames} frames of {width}x{height}")
    largest = max((shape for _, shape in rows_of_shapes(curriculum)), key=math.prod)
    need = memory_estimate(model, stage, ranks, largest, args.checkpointing)
    saving = need.pop("snapshot")
    print(f"memory of a rank at {'x'.join(map(str, largest))}, {ranks.parallel} on {ranks.world}, {str(ranks.dtype)[6:]}: "
          f"{sum(need.values()) / 2**30:.2f} GiB; while a checkpoint is written {saving / 2**30:.2f} GiB of host memory more, "
          "without gradients and activations")  # fmt: skip
    for name, size in need.items():
        print(f"  {name:<12} {size / 2**30:10.2f} GiB")


def memory_estimate(model, stage, ranks, shape, checkpointing):
    """Bytes a rank needs, by purpose, for batches of `shape` (frames, height, width)."""
    sharded, size = ranks.parallel == "fsdp", ranks.dtype.itemsize
    share = ranks.world if sharded else 1
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained, vae = numbers(parameters.values()), numbers(model.vae.parameters())
    frozen = numbers(model.parameters()) - trained - vae
    average = trained * (stage.ema > 0)
    moments = sum(
        len(MOMENTS[type(o)]) * numbers(o.param_groups[0]["params"]) for o in make_optimizers(stage, parameters)
    )
    blocks = [numbers(block.parameters()) for block in (*model.dit.blocks, *model.mllm.model.language_model.layers)]
    gathered = size * (trained + frozen - sum(blocks) + sum(sorted(blocks)[-2:])) if sharded else 0
    activations = activation_numbers(model, stage, ranks, shape, checkpointing) * size
    if (
        sharded and stage.optimizer == "adamw"
    ):  # when they are gone it takes, on a GPU, a float32 copy of all that it updates
        activations = max(activations, 4 * trained / share - gathered)
    return {
        "weights": 4 * trained / share + size * (frozen / share + vae), "gathered": gathered,
        "gradients": 4 * trained / share, "moments": 4 * moments / share, "average": 4 * average / share,
        "activations": activations,
        "snapshot": 4 * (moments + average) / share + 4 * trained * ranks.first,
    }  # fmt: skip


def numbers(parameters):
    return sum(p.numel() for p in parameters)


def activation_numbers(model, stage, ranks, shape, checkpointing):
    """The input of every block, and what the backward of one block keeps inside it (of all blocks without checkpointing),
    some 20 D + 4 F numbers a token with its gradients; the same for the language model."""
    c, (frames, height, width) = model.config.dit, shape
    latent_frames = model.config.vae.latent_frames(frames) + (stage.ref > 0)
    tokens = stage.batch * latent_frames * height * width // model.config.pixel_grid**2 / ranks.sp
    mllm, text = model.mllm, model.mllm.model.config.text_config
    blank = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    _, h, w, _ = mllm.resize_source(blank, "image" if frames == 1 else "video").shape
    visual_tokens = -(-min(frames, mllm.config.max_frames) // 2) * (h // 28) * (w // 28)
    seen = stage.batch * (max(mllm.num_queries.values()) + visual_tokens)
    inside = [tokens * (20 * c.dim + 4 * c.ffn_dim), seen * (20 * text.hidden_size + 6 * text.intermediate_size)]
    kept = [tokens * c.dim * c.num_layers, seen * text.hidden_size * text.num_hidden_layers]
    if not checkpointing:
        kept = [inside[0] * c.num_layers * 0.6, inside[1] * text.num_hidden_layers * 0.6]
    return sum(kept) + max(inside)


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
