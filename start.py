"""What a run starts from: arguments and a stage -> the model with what is trained in float32, its cache, its data.

--weights, --base, --qwen, --init -> config and files -> KiwiEdit, LoRA in place, base in 16 or 8 bits
--data, --val -> tables -> shapes -> buckets -> Curriculum
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cache import Cache, Shapes, cache_parts, report_bad
from data import Curriculum, Mixture, bucket, fill_buckets, find_tables, read_table
from distil import FAKE
from load import HUB_BASES, QWEN_BASE, TensorFiles, as_trained, from_dict, load_weights, local_path
from lora import add_adapter, inject_lora, quantise
from model import PRESETS, KiwiConfig, KiwiEdit, read_weights
from parallel import compute_in
from stages import DIT_LORA, ON_WEIGHTS, REFER, with_model_settings

NANO = Path(__file__).parent / "weights" / "nano"
NANO_MLLM = NANO / "mllm"  # sizes and tokenizer of a small Qwen2.5-VL
HELD_OUT = 16  # rows of each table of --val


def load_model(args, stage, ranks, checkpoint, data):
    """The model with the weights to start from, LoRA in place, trained parts in float32 and the rest in `dtype`,
    exactly what the stage trains requiring gradients; and the cache. What a cache holds the output of is not loaded."""
    config, files = read_start(args, ranks)
    config = config_of(args, config, checkpoint)
    if stage.student:
        config = replace(config, re_noise=stage.student, ref_guidance=1.0)  # the teacher's guidance while distilling
    if config.dit.num_heads % ranks.sp:
        raise ValueError(f"--sp {ranks.sp} does not divide the {config.dit.num_heads} heads of the DiT")
    folder = args.cache or args.write_cache
    cache = Cache(folder, data.shapes, cache_parts(config, files, stage, ranks), stage.ref_shrink) if folder else None
    torch.manual_seed(args.seed)  # of what the weights lack
    if args.write_cache:
        return start_model(config, files, ranks.device, ranks.dtype, ("dit.blocks.",)), cache
    if args.cache:
        cache.check([(row, shape) for _, row, shape in data.rows()])
    cached = args.cache and not args.sample_every  # previews need every part
    without = ("vae.", *([] if stage.trains_mllm else ["mllm."])) if cached else ()
    model = start_model(config, files, "cpu" if args.quantise else ranks.device, None, without)
    if cached and hasattr(model.mllm, "look"):
        model.mllm.model.visual = None  # its output is cached
    if args.cache and args.sample_every and ranks.parallel == "ddp":  # previews bring them to the device
        model.vae.to("cpu"), stage.trains_mllm or model.mllm.to("cpu")
    if args.quantise:
        quantise(model, args.quantise, ranks.device, [part for part in ("dit", "mllm") if part not in stage.trains])
        model.to(ranks.device)
    torch.manual_seed(args.seed)  # a LoRA begins the same with and without a cache
    choose_trained(model, stage, ranks)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else ranks.dtype)
    if ranks.parallel == "ddp" and ranks.dtype != torch.float32:
        compute_in(model, ranks.dtype)
    if checkpoint:  # only now: in the 16 bits of the weights it started from it would lose half its digits
        load_weights(model, TensorFiles().add(checkpoint / "weights.safetensors"), partial=True)
    query_connector = getattr(model.mllm, "connector", None)
    if "dit" in stage.trains and ranks.first and query_connector is not None and not query_connector[2].weight.any():
        print("warning: the Query Connector is untrained, so stage 1 was left out; the paper measured 1.47/3.01 "
              "without it against 2.84/3.98 (Table 5)", file=sys.stderr)  # fmt: skip
    return model.train(), cache


def config_of(args, config, checkpoint=None):
    """The weights' config as this run changes it."""
    own, preset = config.mllm, PRESETS[args.config].mllm  # which has counts for the kinds of data new to the weights
    sizes = ("num_image_queries", "num_video_queries", "num_ref_queries", "max_ref_tokens")
    config = replace(config, mllm=replace(own, **{name: getattr(own, name) or getattr(preset, name) for name in sizes}))
    if checkpoint:
        config = from_dict(KiwiConfig, as_trained(vars(config), checkpoint), checkpoint)
    if args.preset == "released" and args.config == "wan22_5b":  # whose scripts show the language model larger frames
        config = replace(config, mllm=replace(config.mllm, max_pixels=None))
    config = with_model_settings(config, args.set)
    return config


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


def choose_trained(model, stage, ranks):
    """Put LoRA in place; set requires_grad for exactly what the stage trains. ValueError for a part that is absent."""
    if "lora" in stage.trains and model.mllm.language_model is not None:
        held = {len(p) for name, p in model.mllm.named_parameters() if ".lora_A." in name}
        if not held:
            inject_lora(model.mllm.language_model, stage.lora_rank, stage.lora_targets)
        elif held != {stage.lora_rank} and ranks.first:
            print(f"warning: the weights have LoRA of rank {max(held)}, which goes on: lora_rank={stage.lora_rank} is "
                  "for weights without", file=sys.stderr)  # fmt: skip
    if "dit.lora" in stage.trains and not has_lora(model.dit):
        inject_lora(model.dit, stage.dit_lora_rank, DIT_LORA)
    elif stage.student:
        raise ValueError("--preset distil: the weights hold a LoRA of the DiT, which would be no part of the teacher: "
                         "merge it by --export")  # fmt: skip
    if stage.student:
        add_adapter(model.dit, FAKE)
    known = {*REFER, "dit.lora"}
    for part in stage.trains:
        if part not in known and not any(is_part(name, part) for name, _ in model.named_parameters()):
            raise ValueError(f"Stage.trains: the model has no {part!r}; the stages train {', '.join(sorted(known))}")
    for name, parameter in model.named_parameters():
        # Wan's projection of T5 features is saved with the DiT and never used: DDP would wait for its gradient
        used = not name.startswith("dit.text_embedding.")
        parameter.requires_grad_(used and (belongs(name, stage) or f".{FAKE}." in name))


def belongs(name, stage):
    """Whether a parameter is part of what the stage trains and saves."""
    if f".{FAKE}." in name:  # it serves training alone
        return False
    if ".lora_" in name:
        return bool({"dit.lora", "dit"} & set(stage.trains)) if name.startswith("dit.") else "lora" in stage.trains
    return any(is_part(name, part) for part in stage.trains)


def is_part(name, part):
    return name == part or name.startswith(part + ".")


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
    """Presets of one stage take whichever tables are there, and a batch more where ranks would have none."""
    if args.preset not in ON_WEIGHTS:
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
