"""Curation by the models that the paper names (Section 3), each of which may be another:

    score       EditScore (LoRA over Qwen3-VL) on frame pairs: sqrt(min SC, min PQ); the middle pair first
    ground      Qwen3-VL gives kind, box and label, SAM 3 the mask of what is in the box
    synthesize  Qwen-Image-Edit: the masked object alone on white, or the frame with its foreground painted grey
    verify      Qwen3-VL: does the reference show what the edit brought?       embed  CLIP ViT-L/14

A Qwen runs here (in batches of up to --workers questions) or behind an OpenAI-compatible server, http://HOST/v1#NAME.
EditScore is asked in the words it was tuned on, read from its package or from --prompts; the other prompts are our own.
"""

import ast
import importlib.util
import inspect
import json
import math
import re
import tempfile
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from connectors import PIXEL_MEAN, PIXEL_STD
from curators import KINDS, Rejected, box_of, frame_at, moments
from curators.classical import grow, inked, large_regions
from ledger import parsed
from load import local_path
from media import frame_rate, open_media, pad_reference, read_image, resize, write_image
from metrics import as_float
from parallel import pick_device
from vlm import (
    Asker,
    Local,
    Malformed,
    NoRedirect,
    OpenAICompatible,
    Settings,
    json_objects,
    key_of,
    sampled_frames,
    sound,
)

PROMPTS = {
    "ground": (
        "The image is a frame of a video that was edited by this instruction: {prompt}\n{what}\n"
        'Answer with JSON only: {{"kind": {kinds}, "bbox_2d": [x1, y1, x2, y2], "label": "<what it is, in brief>"}}. '
        "If it is not to be seen, give an empty bbox_2d."
    ),
    "subject": "Find the one object that the edit has brought or changed, as it now looks.",
    "background": "The background was replaced. Find the foreground that stands before it: one box around all of it.",
    "unknown": (
        "First say what kind of edit that is: subject (an object was added or replaced), background (the background "
        "was replaced), remove, style or other. Then find the object that it brought, or before a new background the "
        "foreground."
    ),
    "extract": (
        "The picture shows the {label}, cut out of a video frame. Show it alone and complete on a plain white "
        "background, with nothing else in the picture. Keep its colours, material and details exactly as they are."
    ),
    "clear": (
        "The {label} in this picture is painted over in plain grey. Fill the grey area with the background that would "
        "be seen there, without shadows or reflections of it. Change nothing else."
    ),
    "verify": (
        "The first image is a frame of a video that was edited by this instruction: {prompt}\n"
        "The second image is meant to show {meant}\n"
        'Answer with JSON only: {{"reason": "<one sentence>", "match": true or false}}'
    ),
    "verify_subject": (
        "the object that the edit brought. Is it the same object, of the same colour, shape and material, the right "
        "way up, alone and complete enough to be recognised?"
    ),
    "verify_background": (
        "the new background without any foreground. Is it the same place in the same style and light, the right way "
        "up, with nothing left of the foreground and no smears?"
    ),
}
TYPES = {"numbers": {"type": "array", "items": {"type": "number"}}, "text": {"type": "string"},
         "truth": {"type": "boolean"}}  # fmt: skip
schema = lambda **fields: {"type": "object", "properties": {name: TYPES[kind] for name, kind in fields.items()}}
SCORES = schema(reasoning="text", score="numbers")
BOX = schema(kind="text", label="text", bbox_2d="numbers")
VERDICT = schema(reason="text", match="truth")
STEPS = {False: (40, 4.0), True: (4, 1.0)}  # of the editor, without and with a Lightning LoRA: steps, guidance


def editscore_prompts(path=None):
    """The two questions of EditScore, {"success", "quality"}, out of its vie_prompts.py: read as text, never run."""
    if path is None and (found := importlib.util.find_spec("editscore")):
        path = Path(found.submodule_search_locations[0]) / "vie_prompts.py"
    if not path or not Path(path).is_file():
        raise ValueError(
            "EditScore's words are missing: pip install --no-deps editscore, or give its vie_prompts.py with --prompts"
        )
    assigned = [node for node in ast.parse(Path(path).read_text("utf-8")).body if isinstance(node, ast.Assign)]
    texts = {node.targets[0].id: node.value.value for node in assigned if isinstance(node.value, ast.Constant)}
    scale = lambda name: texts[name].replace("10", "25")  # tuned on 0..25
    try:
        context, rule = texts["_context_no_delimit_reasoning_first"], texts["_prompts_0shot_two_image_edit_rule"]
        success, quality = scale("_prompts_0shot_tie_rule_SC"), scale("_prompts_0shot_rule_PQ")
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; give the vie_prompts.py of EditScore") from None
    return {"success": f"{context}\n{rule}\n{success}", "quality": f"{context}\n{quality}"}


def show_prompts(path=None):
    for name, prompt in PROMPTS.items():
        print(f"--- {name}\n{prompt.replace('{{', '{').replace('}}', '}')}\n")
    try:
        for name, prompt in editscore_prompts(path).items():
            print(f"--- EditScore, {name}\n{prompt}\n")
    except ValueError as error:
        print(f"--- EditScore\n{error}")


def number_list(text, count, high):
    """The inside of a JSON list -> its numbers; None unless there are `count`, from 0 to `high`."""
    found = parsed(f"[{text}]")
    sane = lambda v: type(v) in (int, float) and 0 <= v <= high  # true and false are ints to isinstance
    return found if found and len(found) == count and all(map(sane, found)) else None


def malformed(what, text):
    return Malformed(f"no {what} in the answer: {' '.join(text.split())[:120]!r}")


def read_scores(text, highest=25):
    """A judge's answer, whole JSON or cut off after its scores -> the smaller of two. Malformed: a failed parse is a
    failed record, never a middling score."""
    lists = re.findall(r"score\W{0,6}\[([^\]]*)\]", text, re.IGNORECASE)
    scores = number_list(lists[-1], 2, highest) if lists else None
    if scores is None:
        raise malformed(f"pair of scores from 0 to {highest}", text)
    return float(min(scores))


def read_box(text, size=(1000, 1000)):
    """A grounder's answer -> box [x1, y1, x2, y2] in 0..1, label, kind or None; of several boxes the largest.

    size: what coordinates count, (width, height): 1000 for Qwen3-VL; of the resized picture for Qwen2.5-VL. Malformed
    without a box; Rejected for a box that is no object's.
    """
    word = lambda key, piece: re.search(rf"{key}[\"']?\s*:\s*([\"'])(.{{1,80}}?)\1\s*(?:[,}}\]]|$)", piece)
    boxes = []
    for piece in text.split("{"):  # a cut off list of objects has whole ones, too
        inside = re.search(r"bbox\w*[\"']?\s*:\s*\[([^\]]*)\]", piece)
        if four := inside and number_list(inside[1], 4, math.inf):
            x1, y1, x2, y2 = (min(v / side, 1) for v, side in zip(four, size * 2))
            label = word("label", piece)
            boxes.append((max(x2 - x1, 0) * max(y2 - y1, 0), [x1, y1, x2, y2], label[2].strip() if label else ""))
    if not boxes and re.search(r"\[\s*\]", text):
        raise Rejected("the grounder sees nothing of the kind")
    if not boxes:
        raise malformed("box", text)
    area, box, label = max(boxes, key=lambda found: found[0])
    if area < 1e-3:
        raise Rejected(f"the box {[round(v, 3) for v in box]} is empty or tiny")
    if area > 0.95:
        raise Rejected("the box is the whole frame")
    kind = word("kind", text)
    return box, sound(label) or "object", kind and kind[2]


def read_verdict(text):
    """A verifier's answer -> (bool, reason). Malformed if it does not say."""
    for found in reversed(list(json_objects(text))):
        match = str(found.get("match")).strip().lower()  # JSON's true, or the word
        if match in ("true", "yes", "false", "no"):
            return match in ("true", "yes"), sound(str(found.get("reason", "")))[:200]
    raise malformed("verdict", text)


def open_model(name, args, device):
    """A model to ask: http://HOST/v1#MODEL, or a folder or hub id, BASE+ADAPTER with a LoRA. ValueError."""
    settings = Settings(device=device, max_pixels=1280 * 720, max_tokens=512, deadline=120.0, as_user=True,
                        concurrency=args.workers)  # fmt: skip
    if is_address(name):
        return OpenAICompatible(served(name), replace(settings, endpoint=name.partition("#")[0]))
    base, _, adapter = name.partition("+")
    asked = Local(local_path(base), settings)
    if adapter:
        add_adapter(asked.mllm, local_path(adapter))
    return asked


def is_address(name):
    return name.startswith(("http://", "https://"))


def served(name):
    """The model of an OpenAI-compatible server: that of ADDRESS#MODEL, or the only one. ValueError."""
    address, _, model = name.partition("#")
    key = key_of("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{address.rstrip('/')}/models", headers=headers)
        with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as answer:
            names = [entry["id"] for entry in json.load(answer)["data"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{address}: no OpenAI-compatible server answers there ({error}); start it") from None
    if (model or len(names) != 1) and model not in names:
        raise ValueError(f"{address}: serves {len(names)} models, {', '.join(names[:8])}: say which, {address}#MODEL")
    if re.search("qwen2[._]5.vl", model or names[0], re.IGNORECASE):
        raise ValueError(
            f"{address}: Qwen2.5-VL counts boxes in pixels of a size that only its server knows: serve Qwen3-VL"
        )
    return model or names[0]


def add_adapter(module, folder):
    """Merge a LoRA (adapter_config.json, adapter_model.safetensors) into a model's weights as peft would: alphas by
    pattern, rslora. ValueError for other kinds of adapter, or if some of it finds no place."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise ValueError(f"{folder}: only LoRA adapters without DoRA or modules_to_save are read")
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = {name.removesuffix(".weight"): p for name, p in module.named_parameters() if name.endswith(".weight")}
    lower = {name: name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    if other := tensors.keys() ^ {*lower, *lower.values()}:
        raise ValueError(f"{folder}: not pairs of lora_A and lora_B alone ({', '.join(sorted(other)[:3])})")
    for a, b in lower.items():
        layer = a.split(".lora_A.")[0]
        tail = re.search(r"((language_model|visual)\.)?(layers|blocks|merger|deepstack_merger_list)\..*", layer)
        places = [name for name in weights if tail and name.endswith(tail[0])]
        if "visual" not in layer:  # names of transformers 4 leave out language_model.; both towers have layers
            places = [name for name in places if "visual" not in name]
        if len(places) != 1:
            raise ValueError(f"{folder}: {layer} has {len(places)} places in {type(module).__name__}, not one")
        alphas = [v for key, v in (config.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?{key}", layer)]
        alpha, rank = [*alphas, config["lora_alpha"]][0], len(tensors[a])
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        weights[places[0]].data += (factor * tensors[b].float() @ tensors[a].float()).to(weights[places[0]])


def open_editor(name, device):
    from diffusers import QwenImageEditPlusPipeline

    base, _, lora = name.partition("+")
    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    pipeline = QwenImageEditPlusPipeline.from_pretrained(local_path(base), torch_dtype=dtype).to(device)
    tell_of_pictures(pipeline.text_encoder)
    if lora:
        pipeline.load_lora_weights(str(local_path(lora)))
    return pipeline


def tell_of_pictures(mllm):
    """diffusers 0.42 does not say which tokens are a picture's, and transformers then gives Qwen2.5-VL the positions of
    text: say it."""

    def told(module, _, words):
        return (), {"mm_token_type_ids": (words["input_ids"] == module.config.image_token_id).int(), **words}

    if "mm_token_type_ids" in inspect.signature(mllm.forward).parameters:  # older ones see it from the tokens
        mllm.register_forward_pre_hook(told, with_kwargs=True)


@torch.no_grad()
def segment(model, frame, box):
    """SAM 3's mask, bool (H, W), of what is in a box [x1, y1, x2, y2] of 0..1 of a frame uint8 (H, W, 3)."""
    side = model.config.prompt_encoder_config.image_size
    weight = next(model.parameters())
    pixels = resize(frame[None], (side, side)).permute(0, 3, 1, 2).to(weight) / 127.5 - 1
    boxes = (torch.tensor(box) * side).view(1, 1, 4).to(weight)
    masks = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks  # (1, 1, 1, h, w)
    return F.interpolate(masks[:, 0].float(), frame.shape[:2], mode="bilinear", align_corners=False)[0, 0].cpu() > 0


@torch.no_grad()
def clip_features(model, images):
    """CLIP's features of length 1, (N, D) float32, of pictures uint8 (H, W, 3): each whole, on white."""
    side = model.config.vision_config.image_size
    weight = next(model.parameters())
    pixels = as_float(torch.stack([pad_reference(image, (side, side)) for image in images]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    out = model.get_image_features(pixel_values=((pixels - mean) / std).to(weight))
    return F.normalize(getattr(out, "pooler_output", out).float(), dim=-1).cpu()


NEEDS = {"score": ["scorer"], "ground": ["grounder", "segmenter"], "synthesize": ["editor"],
         "verify": ["verifier", "embedder"], "guard": ["embedder"]}  # fmt: skip


class Paper:
    """The models of one stage at a time; several threads ask them."""

    def __init__(self, args):
        self.args, self.device, self.lock, self.askers = args, pick_device(args.device), threading.Lock(), {}

    def preflight(self, stages):
        """ValueError or FileNotFoundError for what is missing, before days of work: models (SAM 3 is gated), packages,
        servers, EditScore's words."""
        if "score" in stages:
            editscore_prompts(self.args.prompts)
        if "synthesize" in stages:
            try:
                import torchvision  # noqa: F401
                from diffusers import QwenImageEditPlusPipeline  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    f"--models paper makes references with diffusers ({error}); pip install diffusers pillow "
                    f"torchvision torch=={torch.__version__.partition('+')[0]}"
                ) from None
        for need in (need for stage in stages for need in NEEDS.get(stage, ())):
            name = getattr(self.args, need)
            try:
                for part in [name] if is_address(name) else name.split("+"):
                    served(part) if is_address(part) else reachable(part)
            except (ValueError, OSError) as error:
                raise ValueError(f"--set {need}={name}: {error}") from None

    def setup(self, stage):
        from transformers import CLIPModel, Sam3TrackerModel

        whole = lambda kind: lambda name: kind.from_pretrained(local_path(name)).to(self.device).eval()
        asked = lambda name: open_model(name, self.args, self.device)
        openers = {"segmenter": whole(Sam3TrackerModel), "embedder": whole(CLIPModel),
                   "editor": lambda name: open_editor(name, self.device)}  # fmt: skip
        for need in NEEDS.get(stage, ()):
            setattr(self, need, openers.get(need, asked)(getattr(self.args, need)))
        if stage == "score":
            self.words = editscore_prompts(self.args.prompts)

    def ask(self, model, prompt, images, read, schema):
        """read(the answer) to a prompt about images, uint8 (H, W, 3) by label. A server that was busy, or whose answer
        cannot be read, is asked again."""
        with self.lock:
            asker = self.askers.setdefault(id(model), Asker(model, model.settings))
        with tempfile.TemporaryDirectory() as folder:
            media = [(label, Path(folder) / f"{label}.jpg") for label in images]
            for label, path in media:
                write_image(path, images[label])
            return asker.ask(prompt, media, 1.0, read, schema)

    def score(self, source_path, target_path, row):
        """EditScore of each pair of frames, from 0..25 to 0..10; the middle pair first, alone if it is below `cascade`.
        Frame i of the edit belongs to frame i of the source, whatever rates the files claim: the release writes 15."""
        moments(source_path, target_path)
        with open_media(target_path) as (_, stream):
            rate = float(frame_rate(stream))
        frames = [sampled_frames(path, self.args.fps, rate, 1280 * 720)[0] for path in (source_path, target_path)]
        pairs = list(zip(*frames))
        first = len(pairs) // 2
        scores = {first: self.pair_score(*pairs[first], row["prompt"])}
        if scores[first] >= self.args.cascade:
            scores |= {i: self.pair_score(*pair, row["prompt"]) for i, pair in enumerate(pairs) if i != first}
        return [scores[i] for i in sorted(scores)]

    def pair_score(self, source, target, prompt):
        success, quality = self.words["success"].replace("<instruction>", prompt), self.words["quality"]
        success = self.ask(self.scorer, success, {"source": source, "edited": target}, read_scores, SCORES)
        return math.sqrt(success * self.ask(self.scorer, quality, {"edited": target}, read_scores, SCORES)) * 10 / 25

    def ground(self, source_path, target_path, row):
        frame, more, box = frame_at(target_path, 0), {}, row.get("box")
        if box is None:
            absolute = isinstance(self.grounder, Local) and self.grounder.positions_a_second  # Qwen2.5-VL
            size = tuple(self.grounder.seen_size(*frame.shape[:2])[::-1]) if absolute else (1000, 1000)
            known = row["kind"] in KINDS
            kinds = f'"{row["kind"]}"' if known else '"subject", "background", "remove", "style" or "other"'
            prompt = PROMPTS["ground"].format(prompt=row["prompt"], what=PROMPTS[row["kind"]], kinds=kinds)
            read = lambda said: read_box(said, size)
            box, more["label"], kind = self.ask(self.grounder, prompt, {"frame": frame}, read, BOX)
            if not known:
                more["kind"] = kind or "unknown"
        with self.lock:
            mask = segment(self.segmenter, frame, box)
        x1, y1, x2, y2 = (round(v * side) for v, side in zip(box, mask.shape[::-1] * 2))
        if not mask.any() or mask[y1:y2, x1:x2].sum() < 0.5 * mask.sum():
            raise Rejected("the mask does not lie in its box", more)
        return box, mask, 0, more

    def synthesize(self, source_path, target_path, mask, row):
        """The editor's picture of what the mask leaves; its generator starts from the record's id."""
        from PIL import Image

        frame, label = frame_at(target_path, row["key"]), row.get("label", "object")
        mask = F.interpolate(mask[None, None].float(), frame.shape[:2])[0, 0] > 0.5
        soft = grow(mask, max(1, min(mask.shape) // 180))[..., None]
        if row["kind"] == "subject":
            frame = around(torch.where(soft, frame, torch.tensor(255, dtype=torch.uint8)), box_of(mask))
        else:
            frame = torch.where(soft, torch.tensor(128, dtype=torch.uint8), frame)
        prompt = PROMPTS["extract" if row["kind"] == "subject" else "clear"].format(label=label)
        steps, guidance = STEPS["+" in self.args.editor]
        generator = torch.Generator().manual_seed((int(row["id"], 16) + 1_000_003 * self.args.seed) % 2**63)
        with self.lock:  # without a negative prompt the pipeline leaves guidance out in silence
            made = self.editor(image=[Image.fromarray(frame.numpy())], prompt=prompt, negative_prompt=" ",
                               true_cfg_scale=guidance, num_inference_steps=steps, generator=generator)  # fmt: skip
        image = torch.from_numpy(np.array(made.images[0].convert("RGB")))
        return trimmed(image) if row["kind"] == "subject" else image

    def verify(self, source_path, target_path, ref_path, row):
        images = {"edited": frame_at(target_path, row.get("key", 0)), "reference": read_image(ref_path)}
        prompt = PROMPTS["verify"].format(prompt=row["prompt"], meant=PROMPTS[f"verify_{row['kind']}"])
        return self.ask(self.verifier, prompt, images, read_verdict, VERDICT)

    def embed(self, images):
        with self.lock:
            return clip_features(self.embedder, images)


def around(frame, box, margin=0.1):
    """The part of a frame (H, W, 3) around a box [x1, y1, x2, y2] in 0..1."""
    height, width = frame.shape[:2]
    x, y = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    left, top = max(int((box[0] - x) * width), 0), max(int((box[1] - y) * height), 0)
    return frame[top : math.ceil((box[3] + y) * height), left : math.ceil((box[2] + x) * width)].contiguous()


def trimmed(image, margin=0.05):
    """A picture of an object on white, uint8 (H, W, 3), tightly cropped. Rejected if it is empty."""
    ink = inked(as_float(image[None])[0])
    if not ink.any():
        raise Rejected("the editor's picture is empty")
    return around(image, box_of(large_regions(ink[None], 0.01)[0]), margin)


def reachable(name):
    """Is a folder there, or a hub id in the cache or to be had? Nothing is downloaded. FileNotFoundError."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    files = ("config.json", "model_index.json", "adapter_config.json")
    if Path(name).exists() or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    try:
        HfApi().auth_check(name)
    except Exception as error:  # the hub client raises many kinds, from DNS to gated repositories
        reason = str(error).strip().split("\n")[0][:160]
        raise FileNotFoundError(
            f"{name} is no folder, and not to be had from the hub ({reason}); for a gated model ask for access on its "
            "page, then `hf auth login`"
        ) from None
