"""What a run starts from: arguments and a stage -> its data, and the model with what is trained in float32.

--data, --val -> tables -> shapes -> buckets -> Curriculum                                          `open_data`
--weights, --base, --qwen -> config and files -> KiwiEdit, LoRA in place, base in 16 or 8 bits      `load_model`
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cache import Cache, Shapes, cache_parts, report_bad
from data import FILES, Curriculum, Mixture, bucket, fill_buckets, find_tables, read_table
from distil import FAKE
from load import HUB_BASES, QWEN_BASE, TensorFiles, as_trained, from_dict, load_weights, local_path
from lora import add_adapter, inject_lora, loras, quantise
from model import PRESETS, KiwiConfig, KiwiEdit, read_weights
from parallel import compute_in
from stages import DIT_LORA, ON_WEIGHTS, REFER, with_model_settings

NANO = Path(__file__).parent / "weights" / "nano"  # its mllm/ has sizes and tokenizer of a small Qwen2.5-VL
HELD_OUT = 16  # rows of each table of --val


# Data


@dataclass
class Data:
    """Tables of the stage's kinds of data, the order in which their rows come, and the held-out rows."""

    tables: dict  # kind -> [Row]
    curriculum: Curriculum
    shapes: Shapes
    held_out: list  # (kind, row, shape)

    def buckets(self):
        """(kind, shape, row numbers) of all phases."""
        for _, mixture in self.curriculum.phases:
            for kind, buckets in mixture.buckets.items():
                for shape, numbers in buckets.items():
                    yield kind, shape, numbers

    def rows(self):
        """(row, shape) of everything that is trained or held out, each once."""
        trained = ((self.tables[kind][i], shape) for kind, shape, numbers in self.buckets() for i in numbers)
        return list(dict.fromkeys([*trained, *(each[1:] for each in self.held_out)]))

    @property
    def largest(self):
        return max((shape for _, shape, _ in self.buckets()), key=math.prod)

    @property
    def previews(self):
        """The first held-out (kind, row, shape) of each kind."""
        return list({each[0]: each for each in reversed(self.held_out)}.values())


def tables_of(args, kind):
    """The rows of a kind of data. FileNotFoundError where it has no table."""
    own = {"image": args.image_csv, "video": args.video_csv, "ref": args.ref_csv}
    if own[kind]:
        return read_table(own[kind], kind, args.base_path)
    base = None if any(own.values()) else args.base_path  # with tables of other names it is theirs alone
    return [row for path in find_tables(args.data, kind) for row in read_table(path, kind, base)]


def open_data(args, stage, ranks):
    """Read the tables, measure their files, and lay out buckets and order -> Data and the stage as it will be trained.

    Presets of one stage take whichever tables are there, and a batch more where ranks would have none."""
    if args.preset in ON_WEIGHTS:
        stage = replace(stage, global_batch=-(-stage.batches // ranks.dp) * ranks.dp * stage.batch)
    elif stage.batches % ranks.dp:
        raise ValueError(f"global_batch / batch is {stage.batches}, not a multiple of {ranks.dp} data-parallel ranks")
    tables, held, chosen = {}, {}, [kind for kind in FILES if stage.ratio[kind]]
    for kind in chosen:
        try:
            tables[kind] = tables_of(args, kind)
        except FileNotFoundError:
            if vars(args)[f"{kind}_csv"]:
                raise
        if args.val and kind in tables:
            with suppress(FileNotFoundError):
                rows = [row for path in find_tables([args.val], kind) for row in read_table(path, kind)]
                held[kind] = rows[:: -(-len(rows) // HELD_OUT)]
    absent = [kind for kind in chosen if kind not in tables]
    if absent and (args.preset not in ON_WEIGHTS or not tables):
        tables_of(args, absent[-1])  # says what is missing
    stage = replace(stage, **dict.fromkeys(absent, 0))
    if stage.sample_every and not args.val:
        raise ValueError(f"--set sample_every={stage.sample_every}: previews are of held-out rows; give --val")
    if args.val and not held:
        raise FileNotFoundError(f"--val {args.val}: has no table of {', '.join(tables)}")

    shapes = Shapes(args.cache or stage.write_cache, args.out)
    shapes.measure([row for part in (tables, held) for rows in part.values() for row in rows], ranks)
    if ranks.first:
        shapes.save(stage.write_cache or args.out)
    found = {kind: [shapes.of_row(row, kind) for row in rows] for kind, rows in tables.items()}
    for kind, rows in tables.items():
        broken = [(row.target, shape) for row, shape in zip(rows, found[kind]) if isinstance(shape, str)]
        if ranks.first and not (Path(args.out) / "metrics.jsonl").exists():  # a run that resumes has logged them
            report_bad(args.out, ranks, 0, broken)
        if 100 * len(broken) > stage.max_bad * len(rows) or len(broken) == len(rows):
            raise ValueError(f"{len(broken)} of {len(rows)} {kind} rows cannot be read (max_bad={stage.max_bad:g}); "
                             f"the first: {broken[0][1]}")  # fmt: skip

    phases = []
    for i, pixels in enumerate(stage.pixels):
        buckets = {kind: fill_buckets(found[kind], stage.frames, pixels) for kind in tables}
        begin = i * stage.steps // len(stage.pixels) * stage.batches
        phases.append((begin, Mixture(buckets, stage.ratio, stage.batch, f"{stage.seed} {i}")))
    held_out = []
    for kind, row in ((kind, row) for kind, rows in held.items() for row in rows):
        if isinstance(shape := shapes.of_row(row, kind), str):
            raise ValueError(f"--val {args.val}: {shape}")
        held_out.append((kind, row, bucket(shape, stage.frames, stage.pixels[-1])))
    return Data(tables, Curriculum(phases), shapes, held_out), stage


# Model


def load_model(args, stage, ranks, checkpoint, data):
    """The model with the weights to start from, LoRA in place, trained parts in float32 and the rest in `dtype`,
    exactly what the stage trains requiring gradients; and the cache. What a cache holds the output of is not loaded."""
    config, files = read_start(args, stage, ranks)
    config = config_of(args, config, checkpoint)
    if stage.student:
        config = replace(config, re_noise=stage.student, ref_guidance=1.0)  # the teacher's guidance while distilling
    if config.dit.num_heads % ranks.sp:
        raise ValueError(f"--sp {ranks.sp} does not divide the {config.dit.num_heads} heads of the DiT")
    folder = args.cache or stage.write_cache
    cache = Cache(folder, data.shapes, cache_parts(config, files, stage, ranks), stage.ref_shrink) if folder else None
    if stage.write_cache:
        return start_model(config, files, stage, ranks.device, ranks.dtype, ("dit.blocks.",)), cache
    if args.cache:
        cache.check(data.rows())
    cached = args.cache and not stage.sample_every  # previews need every part
    without = ["vae.", *([] if stage.trains_mllm else ["mllm."])] if cached else []
    model = start_model(config, files, stage, "cpu" if args.quantise else ranks.device, None, without)
    if cached and hasattr(model.mllm, "look"):
        model.mllm.model.visual = None  # its output is cached
    if args.cache and stage.sample_every and ranks.parallel == "ddp":  # previews bring them to the device
        model.vae.to("cpu"), stage.trains_mllm or model.mllm.to("cpu")
    if args.quantise:
        quantise(model, args.quantise, ranks.device, [part for part in ("dit", "mllm") if part not in stage.trains])
        model.to(ranks.device)
    torch.manual_seed(stage.seed)  # a LoRA begins the same with and without a cache
    choose_trained(model, stage, ranks)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else ranks.dtype)
    if ranks.parallel == "ddp" and ranks.dtype != torch.float32:
        compute_in(model, ranks.dtype)
    if checkpoint:  # only now: in the 16 bits of the weights it started from it would lose half its digits
        load_weights(model, TensorFiles().add(checkpoint / "weights.safetensors"), partial=True)
    query_connector = getattr(model.mllm, "connector", None)
    if "dit" in stage.trains and query_connector is not None and not query_connector[2].weight.any():
        ranks.say("warning: the Query Connector is untrained, so stage 1 was left out; the paper measured 1.47/3.01 "
                  "without it against 2.84/3.98 (Table 5)")  # fmt: skip
    return model.train(), cache


def read_start(args, stage, ranks):
    """Config and files of the weights to start from. `--weights random` makes some, once, in the run's folder; so does
    nano, which trains with nothing at hand."""
    made, nano = Path(args.out) / "init", args.config == "nano"
    if nano and not args.weights and not args.base:
        args.weights = str(NANO) if NANO.exists() and not made.exists() else "random"
    if args.weights != "random":
        return read_weights(args.weights, args.base, args.qwen, HUB_BASES[args.config])
    ranks.say("start: random weights")
    if ranks.first and not made.exists():
        preset = PRESETS[args.config]
        folder = local_path(args.qwen or (NANO / "mllm" if nano else QWEN_BASE))
        torch.manual_seed(stage.seed)
        preset = replace(preset, mllm=replace(preset.mllm, folder=str(folder)))
        KiwiEdit(with_model_settings(preset, args.set)).save(made)
    ranks.barrier()
    return read_weights(made)


def config_of(args, config, checkpoint=None):
    """The weights' config as this run changes it."""
    own, preset = config.mllm, PRESETS[args.config].mllm  # which has counts for the kinds of data new to the weights
    sizes = ("num_image_queries", "num_video_queries", "num_ref_queries", "max_ref_tokens")
    config = replace(config, mllm=replace(own, **{name: getattr(own, name) or getattr(preset, name) for name in sizes}))
    if checkpoint:
        config = from_dict(KiwiConfig, as_trained(vars(config), checkpoint), checkpoint)
    if args.preset == "released" and args.config == "wan22_5b":  # whose scripts show the language model larger frames
        config = replace(config, mllm=replace(config.mllm, max_pixels=None))
    return with_model_settings(config, args.set)


def start_model(config, files, stage, device, dtype, without):
    """A model with the weights of `files`, but for the parts whose output is cached or not needed: their prefixes."""
    files.drop([name for name in files if name.startswith(tuple(without))])
    small = {part: None for part in ("vae", "mllm") if f"{part}." in without}
    if "dit.blocks." in without:
        small["dit"] = replace(config.dit, num_layers=0)
    torch.manual_seed(stage.seed)  # of what the weights lack
    model = KiwiEdit.with_weights(replace(config, **small), files, device, dtype)[0]
    model.config = config
    return model


def choose_trained(model, stage, ranks):
    """Put LoRA in place; set requires_grad for exactly what the stage trains. ValueError for a part that is absent."""
    if "lora" in stage.trains and model.mllm.language_model is not None:
        held = {len(p) for name, p in model.mllm.named_parameters() if ".lora_A." in name}
        if not held:
            inject_lora(model.mllm.language_model, stage.lora_rank, stage.lora_targets)
        elif held != {stage.lora_rank}:
            ranks.say(f"warning: the weights have LoRA of rank {max(held)}, which goes on: lora_rank={stage.lora_rank} "
                      "is for weights without")  # fmt: skip
    if stage.student and loras(model.dit):
        raise ValueError("--preset distil: the weights hold a LoRA of the DiT, which would be no part of the teacher: "
                         "merge it by --export")  # fmt: skip
    if "dit.lora" in stage.trains and not loras(model.dit):
        inject_lora(model.dit, stage.dit_lora_rank, DIT_LORA)
    if stage.student:
        add_adapter(model.dit, FAKE)
    known = {*REFER, "dit.lora"}
    for part in stage.trains:
        if part not in known and not any(is_part(name, part) for name, _ in model.named_parameters()):
            raise ValueError(f"--set trains: the model has no {part!r}; the stages train {', '.join(sorted(known))}")
    for name, parameter in model.named_parameters():
        # Wan's projection of T5 features is saved with the DiT and never used: DDP would wait for its gradient
        used = not name.startswith("dit.text_embedding.")
        parameter.requires_grad_(used and (belongs(name, stage.trains) or f".{FAKE}." in name))


def belongs(name, trains):
    """Whether a parameter is of the parts that are trained and saved."""
    if f".{FAKE}." in name:  # it serves training alone
        return False
    if ".lora_" in name:
        return bool({"dit.lora", "dit"} & set(trains)) if name.startswith("dit.") else "lora" in trains
    return any(is_part(name, part) for part in trains)


def is_part(name, part):
    return name == part or name.startswith(part + ".")
