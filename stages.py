"""What a run trains, on what, and how: `STAGES`, and the `--set` of the command line on top of it.

    --preset paper --stage 2 --set steps=100 workers=4 dit.num_layers=2 -> STAGES["paper"][2] -> Stage

Paper, Section 5.1. Imports no torch, so that arguments are checked at once.
"""

import math
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import get_args, get_origin

ALIGN = ("lora", "mllm.image_queries", "mllm.connector")
EDIT = (*ALIGN, "mllm.video_queries", "dit", "source_embedder")
REFER = (*EDIT, "mllm.ref_queries", "mllm.ref_connector", "ref_embedder")
SPEAK = tuple(part for part in REFER if part.startswith(("lora", "mllm.")))  # what `--mllm` adds to a LoRA on the DiT
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DIT_LORA = ("q", "k", "v", "o", "ffn.0", "ffn.2")
MODEL_PARTS = ("model", "dit", "vae", "mllm")  # before the dot of a setting


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run goes, whatever it learns."""

    dtype: str = ""  # float32 or bfloat16, of computing; trained weights are float32. "": by device
    parallel: str = ""  # ddp or fsdp. "": fsdp on GPUs; ddp on CPUs, and for a LoRA on one GPU
    checkpointing: bool = True  # recompute blocks in the backward
    workers: int = 2  # processes a rank that decode
    max_bad: float = 5.0  # per cent of broken samples above which the run stops
    save_every: int = 500  # steps
    save_minutes: float = 30.0  # save after so long too
    keep: int = 3  # checkpoints that stay
    val_every: int = 100  # steps
    sample_every: int = 0  # steps; edit the first row of each table of --val; 0: never
    sample_steps: int = 20  # denoising steps of that
    write_cache: str = ""  # encode rows to this folder and train nothing; what `python data.py cache` sets


@dataclass(frozen=True)
class Stage(Run):
    """What is trained, on what, and how."""

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
    seed: int = 0  # of the order of the data, of noise, and of what the weights lack
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
    student: tuple[float, ...] = ()  # timesteps of a distilled student (distil.py), e.g. 1000,757,522

    def __post_init__(self):
        for name, allowed in WORDS.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: {value!r}, expected one of {', '.join(filter(None, allowed))}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not all(low <= each <= high for each in (value if isinstance(value, tuple) else [value])):
                raise ValueError(f"{name}: {value}, expected from {low}{f' to {high}' if high < math.inf else ''}")
        if self.global_batch % self.batch:
            raise ValueError(f"global_batch: {self.global_batch} is not a multiple of batch {self.batch}")
        if not any(self.ratio.values()):
            raise ValueError("image, video, ref: all 0, so there is nothing to train on")
        if self.balance and not self.source:
            raise ValueError("balance: needs the source, which this stage hides from the DiT")
        if "dit.lora" in self.trains and self.dit_lora_rank < 1:
            raise ValueError("trains: dit.lora needs a rank; --set dit_lora_rank=32")
        if self.student and self.trains != ("dit.lora",):
            raise ValueError("student: is trained as a LoRA of the DiT alone")
        if list(self.student) != sorted(set(self.student), reverse=True):
            raise ValueError(f"student: {self.student}, expected falling timesteps")

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


WORDS = {
    "schedule": ("constant", "cosine", "linear"),
    "optimizer": ("adamw", "muon"),
    "weighting": ("bell", "none"),
    "dtype": ("", "float32", "bfloat16"),
    "parallel": ("", "ddp", "fsdp"),
}
BOUNDS = dict.fromkeys(
    ("steps", "global_batch", "batch", "frames", "pixels", "lora_rank", "keep", "save_every", "val_every",
     "sample_steps"), (1, math.inf),
) | dict.fromkeys(
    ("image", "video", "ref", "seed", "clip", "workers", "max_bad", "save_minutes", "sample_every"), (0, math.inf)
) | {"ref_shrink": (0.01, 1), "ema": (0, 0.99999), "student": (1, 1000)}  # fmt: skip

LORA = Stage(("dit.lora",), 1, 1, 1, pixels=(409_600,), frames=49, steps=2_000, global_batch=4, dit_lora_rank=32,
             lr=1e-4, warmup=20)  # fmt: skip
DISTIL = replace(LORA, steps=6_000, global_batch=8, dit_lora_rank=64, lr=2e-5, weight_decay=0.0, weighting="none",
                 student=(1000.0, 757.0, 522.0))  # fmt: skip
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
    "distil": dict.fromkeys((1, 2, 3), DISTIL),  # likewise
}
ON_WEIGHTS = ("lora", "distil")  # presets of one stage, on released weights unless others are given


def choose_stage(args):
    """The stage asked for, with its settings. The release trains the 14B model's DiT by LoRA, on shorter clips (at half
    the learning rate at 720p), and gives its language model a larger LoRA."""
    stage = STAGES[args.preset][args.stage]
    if args.preset == "released" and args.config == "wan21_14b":
        stage = replace(stage, lora_rank=256, lora_targets=(*ATTENTION, "gate_proj", "down_proj", "up_proj"))
        if args.stage > 1:
            trains = tuple("dit.lora" if part == "dit" else part for part in stage.trains)
            stage = replace(stage, trains=trains, dit_lora_rank=128, frames=49)
    if args.mllm:
        stage = replace(stage, trains=tuple(dict.fromkeys((*stage.trains, *SPEAK))))
    return with_settings(stage, [setting for setting in args.set if not part_of(setting)])


def with_model_settings(config, settings):
    """A KiwiConfig with `model.key=value`, `dit.key=value`, `vae.`, `mllm.` settings."""
    for part in dict.fromkeys(filter(None, map(part_of, settings))):
        own = [setting.removeprefix(f"{part}.") for setting in settings if part_of(setting) == part]
        if part not in MODEL_PARTS:
            raise ValueError(f"--set {part}.{own[0]}: no such part; there are {', '.join(MODEL_PARTS)}")
        if part == "model":
            config = with_settings(config, own)
        else:
            config = replace(config, **{part: with_settings(getattr(config, part), own)})
    return config


def part_of(setting):
    """The model's part that a setting is for, or "" where it is the stage's."""
    return setting.partition("=")[0].rpartition(".")[0]


def with_settings(config, settings):
    """A dataclass with `key=value` settings, each parsed as its field's type. ValueError for a key it has not."""
    known, changes = {field.name: field.type for field in fields(config)}, {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(f"--set {setting}: {type(config).__name__} has no {key!r}; it has {', '.join(known)}")
        try:
            changes[key] = parse(value, known[key])
        except (ValueError, KeyError):
            kind = str(known[key]).removeprefix("<class '").removesuffix("'>")
            raise ValueError(f"--set {setting}: {value!r} is not of the kind {kind}") from None
    return replace(config, **changes)


def parse(text, kind):
    """A text as a value of a field's type; a tuple's parts stand between commas."""
    inner = get_args(kind)
    if NoneType in inner:
        return None if text.lower() == "none" else parse(text, inner[0])
    if get_origin(kind) is tuple:
        return tuple(parse(part, inner[0]) for part in text.split(",") if part)
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
