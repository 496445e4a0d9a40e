"""What a stage of training trains, on what, and how: `STAGES`, and the settings of the command line on top of it.

    --preset paper --stage 2 --set steps=100 dit.num_layers=2 -> STAGES["paper"][2] -> Stage

Paper, Section 5.1; FACTS.md, "Training". Imports no torch, so that arguments are checked at once.
"""

from ast import literal_eval
from dataclasses import dataclass, fields, replace

ALIGN = ("lora", "mllm.image_queries", "mllm.connector")
EDIT = (*ALIGN, "mllm.video_queries", "dit", "source_embedder")
REFER = (*EDIT, "mllm.ref_queries", "mllm.ref_connector", "ref_embedder")
SPEAK = tuple(part for part in REFER if part.startswith(("lora", "mllm.")))  # what `--mllm` adds to a LoRA on the DiT
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DIT_LORA = ("q", "k", "v", "o", "ffn.0", "ffn.2")


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
    student: tuple[float, ...] = ()  # timesteps of a distilled student (distil.py), e.g. 1000,757,522

    def __post_init__(self):
        words = {
            "schedule": ("constant", "cosine", "linear"),
            "optimizer": ("adamw", "muon"),
            "weighting": ("bell", "none"),
        }
        for name, allowed in words.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Stage.{name}: {value!r}, expected one of {', '.join(allowed)}")
        for name in ("steps", "global_batch", "batch", "frames", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage.{name}: {getattr(self, name)}, expected at least 1")
        rest, lora = self.global_batch % self.batch, "dit.lora" in self.trains
        wrong = {
            f"pixels: {min(self.pixels)}, expected at least 1": min(self.pixels) < 1,
            f"clip: {self.clip}, expected the largest norm of a gradient, or 0 for none": not self.clip >= 0,
            f"ref_shrink: {self.ref_shrink}, expected a factor above 0, at most 1": not 0 < self.ref_shrink <= 1,
            f"ema: {self.ema}, expected 0, or the decay of an average, below 1": not 0 <= self.ema < 1,
            f"global_batch: {self.global_batch} is not a multiple of batch {self.batch}": rest,
            "balance: needs the source, which this stage hides from the DiT": self.balance and not self.source,
            f"student: {self.student}, expected falling timesteps in (0, 1000]": not falling(self.student),
            "student: is trained as a LoRA of the DiT alone": self.student and self.trains != ("dit.lora",),
            "trains: dit.lora needs a rank; --set dit_lora_rank=32": lora and self.dit_lora_rank < 1,
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


def falling(timesteps):
    return all(1000 >= a > b for a, b in zip(timesteps, (*timesteps[1:], 0)))


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
    return with_settings(stage, [s for s in args.set if "." not in s.split("=")[0]])


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
    try:
        return replace(config, **changes)
    except TypeError as error:
        raise ValueError(f"--set {' '.join(settings)}: {error}") from None


def cast(value, old, kind=None):
    """Parse `value` as the type of `old`; if that is None or (), as a literal. kind: the field's type. ValueError."""
    if kind == int | None:
        return None if value.lower() == "none" else int(value)
    if isinstance(old, bool):
        return bool(("false", "true").index(value.lower()))
    if kind == tuple[float, ...]:
        return tuple(float(part) for part in value.split(",") if part)
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
