"""LoRA: low-rank updates of frozen linears, their files in five dialects, and the 8-bit base below them.

    y = x W^T + b + (x A^T) B^T,  A (rank, in), B (out, rank); a file's update is alpha / rank * B A, ours has factor 1

W may be 16 bits or `kernels.linear.QuantLinear`. Files of others are merged into W in float32, before quantising; every
key is accounted for. Dialects: diffusers/PEFT, ComfyUI, kohya/musubi, DiffSynth, FastVideo (`wan_name`).
"""

import re
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kernels.linear import QuantLinear
from media import whole_file

BLOCK_LINEAR = re.compile(
    r"(^|\.)(blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|language_model\.layers\.\d+\..*_proj)$"
)


class LoRA:
    """y = x W^T + b + (x A^T) B^T for a linear. alpha equals the rank, so the update's factor is 1.

    The names are those that peft gives in a checkpoint: `lora_A.default.weight` (rank, in), `lora_B.default.weight`
    (out, rank), beside the frozen layer's own. adapter: whose update is added, None: no one's.
    """

    adapter = "default"

    def forward(self, x):
        y, own = super().forward(x), self.adapter
        return y if own is None else y + self.lora_B[own](self.lora_A[own](x))


class LoRALinear(LoRA, nn.Linear):
    """A LoRA on 16 or 32 bits."""


class QuantLoRALinear(LoRA, QuantLinear):
    """A LoRA on an 8-bit weight."""


KINDS = {nn.Linear: LoRALinear, QuantLinear: QuantLoRALinear}


def give_lora(linear, rank):
    """Make a linear one with a LoRA, in place: its own parameters stay and keep their names."""
    own = next(iter(linear.state_dict().values()))
    place = {"bias": False, "device": own.device, "dtype": own.dtype if type(linear) is nn.Linear else torch.float32}
    linear.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, rank, **place)})
    linear.lora_B = nn.ModuleDict({"default": nn.Linear(rank, linear.out_features, **place)})
    nn.init.zeros_(linear.lora_B["default"].weight)
    linear.__class__ = KINDS[type(linear)]


def inject_lora(module, rank, targets):
    """Give every linear of `module` whose name ends in one of `targets` ("q_proj", "ffn.0", ...) a LoRA. ValueError for
    a target that no linear has."""
    linears = {f".{name}": child for name, child in module.named_modules() if type(child) in KINDS}
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linears):
            raise ValueError(f"LoRA: {type(module).__name__} has no linear layer {target!r}")
    for name, child in linears.items():
        if name.endswith(tuple(f".{target}" for target in targets)):
            give_lora(child, rank)


def loras(module):
    return [m for m in module.modules() if isinstance(m, LoRA)]


def add_adapter(module, name):
    """A second LoRA beside every one of `module`, which begins as a copy of the first."""
    for lora in loras(module):
        for matrix in (lora.lora_A, lora.lora_B):
            matrix[name] = deepcopy(matrix["default"])


def use_adapter(module, name):
    """Let the LoRA of that name act, or none (None)."""
    for lora in loras(module):
        lora.adapter = name


def merge_lora(module):
    """Add every LoRA of `module` to its weight, in float32, and drop it: the same outputs, faster."""
    for lora in loras(module):
        if isinstance(lora, QuantLinear):
            continue
        update = lora.lora_B["default"].weight.float() @ lora.lora_A["default"].weight.float()
        lora.weight.data = (lora.weight.float() + update).to(lora.weight.dtype).detach()
        del lora.lora_A, lora.lora_B
        lora.__class__ = nn.Linear


def quantise(model, kind, device="cpu", parts=("dit", "mllm")):
    """Replace the linears of the DiT's blocks and of the language model's layers by 8-bit ones, one at a time on
    `device`, so that the card never holds the 16 bits. Modulations, norms, embeddings, head and LoRA stay; the language
    model never multiplies in 8 bits."""
    for name in [name for name, child in model.named_modules() if type(child) is nn.Linear]:  # names hold no weights
        part, (place, _, leaf) = name.split(".")[0], name.rpartition(".")
        if BLOCK_LINEAR.search(name) and part in parts:
            own = "fp8" if part == "mllm" and kind == "w8a8" else kind
            parent = model.get_submodule(place)
            setattr(parent, leaf, QuantLinear.from_linear(parent.get_submodule(leaf).to(device), own))


# Files


MATRIX = r"(?:lora_[AB](?:\.default)?|lora_down|lora_up)(?:\.weight|\.bias)?"
LORA_PARTS = re.compile(rf"(.+?)\.({MATRIX}|(?:lora_)?alpha|lora_rank|diff(?:_[bm])?)$")
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_alpha": "alpha", "lora_rank": "rank"}
UNSUPPORTED = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT",
    "lora_mid": "LoCon with a middle matrix", "reshape_weight": "a reshaped weight", "set_weight": "a replaced weight",
}  # fmt: skip
PREFIX = re.compile(r"^(transformer|diffusion_model|model\.diffusion_model|base_model\.model|pipe\.dit|dit)\.")
TO_WAN = [(re.compile(rf"{pattern}(?=\.|$)"), ours) for pattern, ours in (
    (r"\.attn1", ".self_attn"), (r"\.attn2", ".cross_attn"), (r"_attn\.to_([qkv])", r"_attn.\1"),
    (r"_attn\.to_out(\.0)?", "_attn.o"), (r"^(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"\.ffn\.(net\.0\.proj|fc_in)", ".ffn.0"), (r"\.ffn\.(net\.2|fc_out)", ".ffn.2"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"), (r"^proj_out", "head.head"),
    (r"^(blocks\.\d+)\.scale_shift_table", r"\1.modulation"), (r"^scale_shift_table", "head.modulation"),
)]  # fmt: skip


def to_wan(name):
    """A layer or parameter of the DiT in diffusers' or FastVideo's spelling -> Wan's."""
    for pattern, ours in TO_WAN:
        name = pattern.sub(ours, name)
    return name


def wan_name(name, modules):
    """A layer in any dialect -> the DiT's name. kohya writes dots as underscores: look it up among `modules`."""
    if name.startswith("lora_unet_"):
        flat = name.removeprefix("lora_unet_").strip("_")
        return next((own for own in modules if own.replace(".", "_") == flat), flat)
    return to_wan(PREFIX.sub("", name))


def read_lora(path):
    """The tensors of a LoRA file: {layer as written: {part: tensor}}. ValueError names what is not supported."""
    path, layers = Path(path), {}
    if not path.is_file():
        raise FileNotFoundError(f"--lora {path}: no such file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as .safetensors ({error})") from None
    for key, tensor in tensors.items():
        if kind := next((kind for mark, kind in UNSUPPORTED.items() if mark in key), None):
            raise ValueError(f"{path}: {key}: is {kind}, which is not supported; export it as a plain LoRA")
        if not (found := LORA_PARTS.match(key)):
            raise ValueError(f"{path}: {key}: not a key of a LoRA in a known dialect")
        layer, part = found.groups()
        part = part.replace(".default", "").replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        if part == "diff_m" and not layer.endswith("modulation"):
            layer += ".modulation"
        layers.setdefault(layer, {})[PARTS.get(part, part)] = tensor.float()
    return layers


def add_lora(dit, path, scale=1.0):
    """Merge a file into a DiT's weights in float32, times `scale` -> a line about what was merged and what not."""
    own = dict(dit.named_parameters())
    layers = {name if name.endswith("modulation") else name.rpartition(".")[0] for name in own}
    merged = unused = 0
    for written, parts in read_lora(path).items():
        layer = wan_name(written, layers)
        if layer not in layers:
            raise ValueError(f"{path}: {written}: the DiT has no such layer")
        if layer.startswith("text_embedding."):  # Kiwi-Edit's context bypasses it
            unused += len(parts)
            continue
        for name, update in updates(f"{path}: {written}", parts).items():
            parameter = own.get(layer if layer in own else f"{layer}.{name}")
            if parameter is None or parameter.numel() != update.numel():
                expected = None if parameter is None else tuple(parameter.shape)
                raise ValueError(f"{path}: {written}: {name}: is {tuple(update.shape)}, expected {expected}")
            update = update.to(parameter.device).reshape(parameter.shape)
            parameter.data = (parameter.data.float() + scale * update).to(parameter.dtype)
            merged += 1
    if not merged:
        raise ValueError(f"{path}: nothing in it changes this DiT")
    left = f"; {unused} keys of text_embedding are unused here" if unused else ""
    return f"{path}: {merged} parameters changed, scale {scale:g}{left}"


def updates(where, parts):
    """What a layer's parts add: {"weight": tensor, "bias": tensor}. Every part is used, or refused by name."""
    down, up, alpha, _ = (parts.pop(name, None) for name in ("lora_A.weight", "lora_B.weight", "alpha", "rank"))
    if (down is None) != (up is None):
        raise ValueError(f"{where}: has one of the two matrices of a LoRA")
    found, factor = {}, 1.0
    if down is not None:
        factor = 1.0 if alpha is None else alpha.item() / len(down)
        found["weight"] = factor * (up.flatten(1) @ down.flatten(1))
    for part, name, times in (("lora_B.bias", "bias", factor), ("diff", "weight", 1), ("diff_m", "weight", 1),
                              ("diff_b", "bias", 1)):  # fmt: skip
        if part in parts:
            found[name] = found.get(name, 0) + times * parts.pop(part)
    if parts:
        raise ValueError(f"{where}: {', '.join(parts)}: not a part of a LoRA that is known here")
    return found


FROM_WAN = [(r"self_attn\.([qkv])$", r"attn1.to_\1"), (r"cross_attn\.([qkv])$", r"attn2.to_\1"),
            (r"self_attn\.o$", "attn1.to_out.0"), (r"cross_attn\.o$", "attn2.to_out.0"),
            (r"ffn\.0$", "ffn.net.0.proj"), (r"ffn\.2$", "ffn.net.2")]  # fmt: skip


def write_lora(weights, path, style):
    """Write the DiT's LoRA of a checkpoint's weights.safetensors as peft (diffusers), comfy or kohya."""
    found, others = {}, []
    for key, tensor in load_file(weights).items():
        parts = re.fullmatch(r"dit\.(.+)\.lora_([AB])\.default\.weight", key)
        if parts is None:
            others.append(key)
            continue
        layer, which = parts.groups()
        if style == "peft":
            for pattern, theirs in FROM_WAN:
                layer = re.sub(pattern, theirs, layer)
            found[f"transformer.{layer}.lora_{which}.weight"] = tensor
            continue
        layer = f"diffusion_model.{layer}" if style == "comfy" else f"lora_unet_{layer.replace('.', '_')}"
        found[f"{layer}.lora_{'down' if which == 'A' else 'up'}.weight"] = tensor
        if which == "A":
            found[f"{layer}.alpha"] = torch.tensor(float(len(tensor)))
    if not found:
        raise ValueError(f"{weights}: has no LoRA of the DiT; train one by --preset lora")
    if others:
        print(f"note: {len(others)} tensors are not the DiT's LoRA, such as {others[0]}; --export has all")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(found, temporary)
        temporary.chmod(0o644)
