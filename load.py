"""Weights in every layout and dialect they come in, each tensor read straight to where it is used.

    path or hub id -> `read_weights` -> fields of a KiwiConfig, TensorFiles {our name: tensor}, nothing read yet
    -> `load_weights` -> parameters; every name is accounted for

Layouts: what `KiwiEdit.save` wrote; the released diffusers folders; a released training checkpoint over Wan's and
Qwen's own folders; a run of train.py over what it began with. Dialects: the spellings of all of them, in DIALECTS.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from connectors import MLLMConfig, read_json
from dit import DiTConfig
from lora import LoRALinear, replace_modules, to_wan
from vae import VAEConfig

WAN_BASE = "Wan-AI/Wan2.2-TI2V-5B"
HUB_BASES = {
    "wan22_5b": WAN_BASE,
    "wan21_14b": "Wan-AI/Wan2.1-T2V-14B",
    "wan21_1_3b": "Wan-AI/Wan2.1-T2V-1.3B",
    "nano": WAN_BASE,
}
QWEN_BASE = "Qwen/Qwen2.5-VL-3B-Instruct"

# Released spellings and ours, but of diffusers' DiT (`lora.to_wan`). Each in its turn is applied to whole dotted names;
# ours match none.
DIALECTS = [(re.compile(pattern), ours) for pattern, ours in (
    # training checkpoints
    (r"^pipe\.", ""),
    (r"^(dit\.)?(model\.)?diffusion_model\.", "dit."),
    (r"^vae_condition\.", "source_embedder."),
    (r"^ref_vae_condition\.", "ref_embedder."),
    (r"(^|\.)connetor\.", r"\1connector."),
    (r"_queries\.q$", "_queries"),
    (r"^(mllm\.)?model\.model\.", r"\1model."),
    (r"^vae\.model\.", "vae."),
    (r"^model\.(encoder|decoder|conv1|conv2)\.", r"\1."),
    # Qwen2.5-VL as published
    (r"^(mllm\.)?visual\.", r"\1model.visual."),
    (r"^(mllm\.)?model\.(layers|embed_tokens|norm)\.", r"\1model.language_model.\2."),
)]  # fmt: skip


def our_name(name):
    """A parameter's name in any released dialect -> ours. None: accounted for and not needed (the tied lm_head)."""
    if name.endswith("lm_head.weight"):
        return None
    for pattern, ours in DIALECTS:
        name = pattern.sub(ours, name)
    part = "dit." if name.startswith("dit.") else ""
    return part + to_wan(name.removeprefix(part))


RELEASED = {"source_embedder.": "vae_condition.", "ref_embedder.": "ref_vae_condition.",
            "mllm.connector.": "mllm.connetor.", "mllm.model.": "mllm.model.model."}  # fmt: skip


def released_name(name):
    """The way back: our name of a parameter -> its name in a released training checkpoint."""
    for ours, theirs in RELEASED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return f"{name}.q" if name.endswith("_queries") else name


def load_weights(module, state_dict, partial=False, device=None, dtype=None):
    """Put a state dict in any released dialect into a module; every name is accounted for.

    module: DiT, VAE, MLLMEncoder or KiwiEdit; parameters on the meta device are replaced by the tensors, on `device`
    in `dtype` where given, others are filled. LoRA tensors inject LoRA where the module has none.
    state_dict: a mapping from names to tensors, read one at a time.
    partial: names may be missing, as in a checkpoint of the trained parameters alone. -> the missing names.
    ValueError that lists missing and unexpected names, or names a tensor of another size.
    """
    names = {ours: name for name in state_dict if (ours := our_name(name))}
    ranks = {n.split(".lora_A.")[0]: state_dict[name].shape[0] for n, name in names.items() if ".lora_A." in n}
    lora = lambda n, child: LoRALinear(child, ranks[n]) if n in ranks and type(child) is nn.Linear else None
    replace_modules(module, lora)  # of the rank that the weights have, where they have it
    own = module.state_dict(keep_vars=True)
    missing, unexpected = sorted(own.keys() - names.keys()), sorted(names[n] for n in names.keys() - own.keys())
    if unexpected or (missing and not partial):
        wrong = listed("missing", [] if partial else missing) + listed("unexpected", unexpected)
        raise ValueError(f"weights do not fit {type(module).__name__}: {wrong}")
    for ours, name in names.items():
        value, parameter = state_dict[name], own[ours]
        if value.shape != parameter.shape:
            sizes = f"{tuple(value.shape)}, expected {tuple(parameter.shape)}"
            raise ValueError(f"weights do not fit {type(module).__name__}: {name} is of another size: {sizes}")
        if parameter.is_meta:
            parent, _, leaf = ours.rpartition(".")
            value = nn.Parameter(value.to(device, dtype or value.dtype), requires_grad=parameter.requires_grad)
            setattr(module.get_submodule(parent), leaf, value)
        else:
            parameter.data.copy_(value)
    return missing


def listed(what, names, show=12):
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return f"{len(names)} {what}: {', '.join(names[:show])}{more}. " if names else ""


class TensorFiles(Mapping):
    """The tensors of several files as one mapping: our names to tensors, read when asked for, straight to `device`.

    ComfyUI's scaled 8-bit weights, of either spelling, become bfloat16: stored number times scale.
    """

    def __init__(self):
        self.device = "cpu"
        self.places = {}  # our name -> (path, name in the file)
        self.handles = {}
        self.scales = {}  # (path, name of a weight in the file) -> name of its scale

    def add(self, *paths, prefix="", over=False):
        """Add a layer of .safetensors or .pth files; `prefix` goes before their names. What earlier layers hold stays,
        or, with `over`, gives way. ValueError where two files of the layer hold the same tensor."""
        layer = {}
        for path in paths:
            for name in self.open(path).keys():
                module, _, part = name.rpartition(".")
                if part in ("scale_weight", "weight_scale"):
                    self.scales[path, f"{module}.weight"] = name
                elif part == "comfy_quant":
                    stored = json.loads(bytes(self.open(path).get_tensor(name).tolist()))["format"]
                    if not stored.startswith(("float8", "int8")):
                        raise ValueError(f"{path}: {module} is stored as {stored}, not read here; take fp8 or 16 bits")
                elif part not in ("scale_input", "input_scale", "scaled_fp8") and (ours := our_name(prefix + name)):
                    if ours in layer:
                        raise ValueError(f"{layer[ours][0]} and {path} both hold {name}: remove the stale one")
                    layer[ours] = (path, name)
        self.places = {**self.places, **layer} if over else {**layer, **self.places}
        return self

    def drop(self, names):
        self.places = {name: place for name, place in self.places.items() if name not in names}

    def open(self, path, device="cpu"):
        if (path, device) not in self.handles:
            self.handles[path, device] = open_tensors(path, device)
        return self.handles[path, device]

    def __getitem__(self, name):
        path, inner = self.places[name]
        file = self.open(path, str(self.device))
        tensor = file[inner] if isinstance(file, dict) else file.get_tensor(inner)
        if (path, inner) in self.scales:
            scale = file.get_tensor(self.scales[path, inner]).float()
            tensor = (tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))).bfloat16()
        return tensor

    def shape(self, name):
        path, inner = self.places[name]
        file = self.open(path)
        return tuple(file[inner].shape if isinstance(file, dict) else file.get_slice(inner).get_shape())

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)


def open_tensors(path, device):
    """Open a .safetensors file, or a .pth of tensors, mapped and not read. ValueError if it is damaged."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt", device=device)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = state.get("state_dict", state)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("holds more than tensors; save its state dict alone")
        return state
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path}: cannot be read ({reason}); fetch the file again") from None


def tensor_files(folder, *patterns):
    """The weight files of a folder that match the patterns: those that an index names, where there is one.

    FileNotFoundError where one is missing, or all are.
    """
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in patterns) and name[0] != "."
    indices = folder.glob("*.safetensors.index.json")
    named = {name for index in indices for name in read_json(index).get("weight_map", {}).values() if wanted(name)}
    found = {path.name for path in folder.iterdir() if wanted(path.name)}  # .step.tmp: half written
    if not named and not found:
        raise FileNotFoundError(f"{folder}: has no {' or '.join(patterns)}; the weights folder is not complete")
    if absent := sorted(named - found):
        raise FileNotFoundError(f"{folder}: {', '.join(absent)} is missing; the weights folder is not complete")
    return [folder / name for name in sorted(named or found)]


def written_as(folder):
    """What a folder's config.json says it is: "nanokiwi" (weights), "nanokiwi run" (of train.py) or None."""
    path = folder / "config.json"
    return read_json(path).get("format") if path.is_file() else None


def only_weights(folder, also=()):
    """ValueError where a folder that is to be replaced holds anything but nanoKiwi weights and `also`."""
    folder, known = Path(folder), ("config.json", "mllm", *also)
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if folder.is_file() or (held and written_as(folder) != "nanokiwi"):
        raise ValueError(f"{folder}: refusing to overwrite: not a nanoKiwi folder; give another name")
    other = sorted(name for name in held if name not in known and not name.endswith(".safetensors"))
    if other:
        raise ValueError(f"{folder}: refusing to overwrite: it also holds {', '.join(other)}; give another name")


def local_path(path):
    """A path as it is; a hub id ("linyq/kiwi-edit-5b-instruct-only-diffusers") is downloaded, or found in the cache."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder; give one, or a hub id such as {QWEN_BASE}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.txt", "*.safetensors", "*VAE.pth"]))
    except Exception as error:  # the hub client raises many kinds, from DNS to gated repositories
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{path}: no such folder, and not to be had from the hub ({reason})") from None


def from_dict(cls, values, where):
    """A config dataclass from JSON. ValueError where a key is unknown, or a text stands where a number belongs."""
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {cls.__name__}: {error}") from None


# Layouts


def read_fields(path, base=None, qwen=None, usual_base=WAN_BASE):
    """(fields of a KiwiConfig, TensorFiles) of weights in any layout; `model.read_weights` is what others call."""
    path = path and local_path(path)
    checkpoint = path and find_checkpoint(path)
    if checkpoint and path.is_dir():
        path = checkpoint / "weights.safetensors"
    elif path and not (path / "config.json").is_file() and len(found := list(path.glob("*.safetensors"))) == 1:
        path = found[0]  # a released training checkpoint as it comes from the hub
    if path is None or path.is_file():
        return read_layers(path, checkpoint, base, qwen, usual_base)
    if base or qwen:
        raise ValueError(f"{path} is whole: --base and --qwen go with a .safetensors or a run of train.py")
    if (path / "transformer").is_dir():
        return read_diffusers_folder(path)
    if (path / "config.json").is_file():
        return read_own_folder(path)
    raise FileNotFoundError(f"{path}: neither a nanoKiwi folder (config.json) nor a diffusers one (transformer/)")


def read_layers(path, checkpoint, base, qwen, usual_base):
    """A file of trained parameters (or None) over the weights it was trained from."""
    path and open_tensors(path, "cpu")  # fail fast before downloading a base
    if checkpoint and base is None:
        fields, files = read_beginning(checkpoint.parent, qwen)
    else:
        base = local_path(base or usual_base)
        if not (base / "transformer").is_dir() and written_as(base) != "nanokiwi":  # Wan's own folder
            return read_training_checkpoint(path, checkpoint, base, local_path(qwen or QWEN_BASE))
        fields, files = read_fields(base, qwen=qwen)
    if path:
        files.add(path, over=True)
        trained = {name: count for name, count in mllm_sizes(files).items() if count}
        fields = fields | {"mllm": fields["mllm"] and replace(fields["mllm"], **trained)}
    return as_trained(fields, checkpoint), files


def read_training_checkpoint(path, checkpoint, base, qwen):
    """Fields and files of a released training checkpoint over the weights it was trained from."""
    files = TensorFiles().add(*[path] if path else [])
    wan = read_json(base / "config.json")
    known = {k: v for k, v in wan.items() if k in DiTConfig.__dataclass_fields__}
    files.add(*tensor_files(base, "diffusion_pytorch_model*.safetensors"), prefix="dit.")
    files.add(tensor_files(base, "Wan2.*_VAE.safetensors", "Wan2.*_VAE.pth")[0], prefix="vae.")
    files.add(*tensor_files(qwen, "model*.safetensors"), prefix="mllm.")
    dit = DiTConfig(**known, bf16_timesteps=True)
    sizes = mllm_sizes(files)
    sizes["max_ref_tokens"] = sizes["num_ref_queries"]  # so it is in every release: 768 of 5B, 384 of 14B
    mllm = MLLMConfig(str(qwen), dit_dim=dit.dim, **sizes)
    return as_trained({"dit": dit, "vae": vae_config(files), "mllm": mllm}, checkpoint), files


def read_diffusers_folder(folder):
    """Fields and files of linyq/kiwi-edit-5b-*-diffusers."""
    files = TensorFiles()
    files_of = {"transformer": "dit.", "vae": "vae.", "source_embedder": "source_embedder.", "mllm_encoder": "mllm."}
    if any((folder / "ref_embedder").glob("*.safetensors")):  # instruct-only weights may have its config alone
        files_of["ref_embedder"] = "ref_embedder."
    configs = {name: read_json(folder / name / "config.json") for name in files_of}
    for name, prefix in files_of.items():
        files.add(*tensor_files(folder / name, "*.safetensors"), prefix=prefix)
    t, v, m = configs["transformer"], configs["vae"], configs["mllm_encoder"]
    same = {name: t[name] for name in ("ffn_dim", "num_layers", "freq_dim", "text_dim", "patch_size", "eps")}
    heads = t["num_attention_heads"]
    dit = DiTConfig(dim=heads * t["attention_head_dim"], num_heads=heads, in_dim=t["in_channels"],
                    out_dim=t["out_channels"], bf16_timesteps=True, **same)  # fmt: skip
    sizes = mllm_sizes(files) | {"max_ref_tokens": m["max_object_token"], "max_frames": m["max_frames"]}
    mllm = MLLMConfig(str(folder / "processor"), m["dit_dim"], max_pixels=m["max_pixels_per_frame"], **sizes)
    vae = vae_config(files, v.get("latents_mean", ()), v.get("latents_std", ()))
    pad_first = configs.get("ref_embedder", {}).get("ref_pad_first", False)
    return {"dit": dit, "vae": vae, "mllm": mllm, "ref_pad_first": pad_first}, files


def read_own_folder(folder):
    path = folder / "config.json"
    fields = typed(read_json(path), path)
    if fields.pop("format", None) != "nanokiwi":
        raise ValueError(f"{path}: not written by KiwiEdit.save")
    if fields.get("mllm"):
        inner = (folder / fields["mllm"].folder).resolve()
        if folder.resolve() not in inner.parents:
            raise ValueError(f"{path}: mllm.folder leads out of the weights folder")
        fields["mllm"] = replace(fields["mllm"], folder=str(inner))
    return fields, TensorFiles().add(*tensor_files(folder, "*.safetensors"))


def typed(values, path):
    """The fields of a KiwiConfig as JSON has them -> with their parts as dataclasses. ValueError."""
    parts = (("dit", DiTConfig), ("vae", VAEConfig), ("mllm", MLLMConfig))
    return values | {name: from_dict(cls, values[name], path) for name, cls in parts if values.get(name)}


def mllm_sizes(files):
    """The query counts that the weights have; 0 for a mode that was not trained yet."""
    names = {mode: f"mllm.{mode}_queries" for mode in ("image", "video", "ref")}
    return {f"num_{mode}_queries": files.shape(name)[0] if name in files.places else 0 for mode, name in names.items()}


def vae_config(files, mean=(), std=()):
    """The sizes of a Wan VAE, read off its tensors: Wan's VAE files come without a config."""
    width = lambda name: files.shape(f"vae.{name}")[0]
    try:
        dim, pixels = files.shape("vae.encoder.conv1.weight")[:2]
        resampled = [n for n in files if re.fullmatch(r"vae\.encoder\.downsamples\..*resample\.1\.weight", n)]
        resampled.sort(key=lambda n: [int(part) for part in n.split(".") if part.isdigit()])
        widths = [*(files.shape(n)[0] for n in resampled), width("encoder.head.0.gamma")]
        return VAEConfig(
            version={12: "2.2", 3: "2.1"}[pixels], dim=dim, dec_dim=width("decoder.head.0.gamma"),
            z_dim=width("conv2.weight"), dim_mult=tuple(w // dim for w in widths),
            num_res_blocks=int(resampled[0].split(".")[-4]),
            temporal_downsample=tuple(n.replace("resample.1", "time_conv") in files.places for n in resampled),
            mean=mean, std=std,
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"the VAE's weights are not those of Wan: {error} is missing or of another size") from None


# Runs of train.py


def began_with(run):
    """The arguments of a run of train.py. Paths of what it began with start at the run, so any folder finds them; hub
    ids stay as typed."""
    config = read_json(run / "config.json")
    return config["args"] | {name: str((run / path).resolve()) for name, path in config.get("began", {}).items()}


def read_beginning(run, qwen=None):
    """Fields and files of what a run of train.py began with."""
    began = began_with(run)
    if began["init"] == "random":
        return read_fields(run / "init")
    base = HUB_BASES[began["config"]]
    try:
        return read_fields(began["weights"], began["base"], qwen or began["qwen"], base)
    except FileNotFoundError as error:
        begun = began["weights"] or began["base"] or base
        raise FileNotFoundError(f"{run} began with {begun}, not found here ({error}); give --base or --qwen") from None


def valid_checkpoints(run):
    """The checkpoint folders of a run, oldest first; manually named ones (step-500-good) are ignored, never pruned."""
    needed = ("weights.safetensors", "train.json", "state/.metadata")
    named = [p for p in run.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return [p for p in sorted(named, key=step_of) if all((p / name).is_file() for name in needed)]


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(path):
    """The checkpoint that a run's folder, a checkpoint's own or a file in it stands for; None if it is none of ours."""
    path = path.absolute()
    folder = path.parent if path.is_file() else path
    if (folder / "train.json").is_file():
        return folder
    if written_as(path) != "nanokiwi run":
        return None
    if found := valid_checkpoints(path):
        return found[-1]
    raise FileNotFoundError(f"{path}: this run has no checkpoint yet")


def as_trained(fields, checkpoint):
    """The fields of a checkpoint's run (`--set model.source=... dit...`), with the VAE, the MLLM's folder and the query
    counts of `fields`; falls back to `fields` for foreign checkpoints."""
    run = checkpoint and Path(checkpoint).absolute().parent
    if not run or written_as(run) != "nanokiwi run":
        return fields
    trained = typed(read_json(run / "config.json")["model"], run / "config.json")
    own = ("folder", "num_image_queries", "num_video_queries", "num_ref_queries")
    mllm = replace(trained["mllm"], **{name: getattr(fields["mllm"], name) for name in own})
    return trained | {"vae": fields["vae"], "mllm": mllm}
