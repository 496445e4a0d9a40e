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

import vlm
from connectors import PIXEL_MEAN, PIXEL_STD
from curators import KINDS, Rejected, around, box_of, frame_at, moments
from curators.classical import grow, inked, large_regions, resized
from load import local_path
from lora import read_lora, updates
from media import frame_rate, open_media, pad_reference, read_image, resize, write_image
from metrics import as_float
from parallel import pick_device
from vlm import Malformed

GROUND = (
    "The image is a frame of a video that was edited by this instruction: {prompt}\n"
    "First say what kind of edit that is: subject (an object was added or replaced), background (the background was "
    "replaced), remove, style or other. Then find the one object that the edit has brought or changed, as it now "
    "looks, or before a new background the foreground that stands before it: one box around all of it.\n"
    'Answer with JSON only: {{"kind": {kinds}, "bbox_2d": [x1, y1, x2, y2], "label": "<what it is, in brief>"}}. '
    "If it is not to be seen, give an empty bbox_2d."
)
SYNTHESIZE = {
    "subject": "The picture shows the {label}, cut out of a video frame. Show it alone and complete on a plain white "
    "background, with nothing else in the picture. Keep its colours, material and details exactly as they are.",
    "background": "The {label} in this picture is painted over in plain grey. Fill the grey area with the background "
    "that would be seen there, without shadows or reflections of it. Change nothing else.",
}
VERIFY = (
    "The first image is a frame of a video that was edited by this instruction: {prompt}\n"
    "The second image is meant to show {meant}\n"
    'Answer with JSON only: {{"reason": "<one sentence>", "match": true or false}}'
)
MEANT = {
    "subject": "the object that the edit brought. Is it the same object, of the same colour, shape and material, the "
    "right way up, alone and complete enough to be recognised?",
    "background": "the new background without any foreground. Is it the same place in the same style and light, the "
    "right way up, with nothing left of the foreground and no smears?",
}
NUMBERS, TEXT = {"type": "array", "items": {"type": "number"}}, {"type": "string"}
SCORES = {"type": "object", "properties": {"reasoning": TEXT, "score": NUMBERS}}
BOX = {"type": "object", "properties": {"kind": TEXT, "label": TEXT, "bbox_2d": NUMBERS}}
VERDICT = {"type": "object", "properties": {"reason": TEXT, "match": {"type": "boolean"}}}
PIXELS = "Qwen2.5-VL counts boxes in pixels of its own; take Qwen3-VL"
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


def answered(text, key, sane, what):
    """The JSON objects of an answer whose `key` is sane. Malformed without one: a failed parse is a failed record,
    never a middling score."""
    if found := [found for found in vlm.json_objects(text) if sane(found.get(key))]:
        return found
    raise Malformed(f"no {what} in the answer: {' '.join(text.split())[:120]!r}")


def numbers(value, count, high):
    sane = lambda v: type(v) in (int, float) and 0 <= v <= high  # true and false are ints to isinstance
    return isinstance(value, list) and len(value) == count and all(map(sane, value))


def read_scores(text):
    """A judge's answer -> the smaller of its two scores."""
    found = answered(text, "score", lambda value: numbers(value, 2, 25), "pair of scores from 0 to 25")
    return float(min(found[-1]["score"]))


def read_box(text):
    """A grounder's answer, whose coordinates count to 1000 -> box [x1, y1, x2, y2] in 0..1, label, kind or None; of
    several boxes the largest. Rejected for a box that is no object's."""
    found = answered(text, "bbox_2d", lambda value: value == [] or numbers(value, 4, math.inf), "box")
    boxes = [[min(side / 1000, 1) for side in one["bbox_2d"] or [0] * 4] for one in found]
    areas = [max(x2 - x1, 0) * max(y2 - y1, 0) for x1, y1, x2, y2 in boxes]
    best = areas.index(max(areas))
    if not 1e-3 < areas[best] < 0.95:
        raise Rejected(f"the grounder's box {boxes[best]} is empty, tiny or the whole frame")
    return boxes[best], vlm.sound(str(found[best].get("label") or "object"))[:80], found[best].get("kind")


def read_verdict(text):
    """A verifier's answer -> (bool, reason)."""
    words = {"true": True, "yes": True, "false": False, "no": False}  # JSON's true, or the word
    said = lambda value: str(value).strip().lower()
    found = answered(text, "match", lambda value: said(value) in words, "verdict")[-1]
    return words[said(found["match"])], vlm.sound(str(found.get("reason", "")))[:200]


def open_model(name, args, device):
    """A model to ask: http://HOST/v1#MODEL, or a folder or hub id, BASE+ADAPTER with a LoRA. ValueError."""
    settings = vlm.Settings(max_pixels=1280 * 720, max_tokens=512, deadline=120.0, as_user=True)
    settings = replace(settings, device=device, concurrency=args.workers)
    if name.startswith("http"):
        model = vlm.OpenAICompatible(served(name), replace(settings, endpoint=name.partition("#")[0]))
    else:
        base, _, adapter = name.partition("+")
        model = vlm.Local(local_path(base), settings)
        if adapter:
            add_adapter(model.mllm, local_path(adapter))
    return vlm.Asker(model, settings)


def served(name):
    """The model of an OpenAI-compatible server: that of ADDRESS#MODEL, or the only one. ValueError."""
    address, _, model = name.partition("#")
    key = vlm.key_of("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{address.rstrip('/')}/models", headers=headers)
        with urllib.request.build_opener(vlm.NoRedirect).open(request, timeout=30) as answer:
            names = [entry["id"] for entry in json.load(answer)["data"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{address}: no OpenAI-compatible server answers there ({error}); start it") from None
    if (model or len(names) != 1) and model not in names:
        raise ValueError(f"{address}: serves {len(names)} models, {', '.join(names[:8])}: say which, {address}#MODEL")
    return model or names[0]


def add_adapter(module, folder):
    """Merge a LoRA (adapter_config.json, adapter_model.safetensors) into a model's weights as peft would: alphas by
    pattern, rslora. ValueError if some of it finds no place."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = {name.removesuffix(".weight"): p for name, p in module.named_parameters() if name.endswith(".weight")}
    for layer, parts in read_lora(folder / "adapter_model.safetensors").items():
        tail = re.search(r"((language_model|visual)\.)?(layers|blocks|merger|deepstack_merger_list)\..*", layer)
        places = [name for name in weights if tail and name.endswith(tail[0])]
        if "visual" not in layer:  # names of transformers 4 leave out language_model.; both towers have layers
            places = [name for name in places if "visual" not in name]
        if len(places) != 1:
            raise ValueError(f"{folder}: {layer} has {len(places)} places in {type(module).__name__}, not one")
        alphas = [v for key, v in (config.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?{key}", layer)]
        alpha, rank = [*alphas, config["lora_alpha"]][0], len(parts["lora_A.weight"])
        parts["alpha"] = torch.tensor(alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha))
        weights[places[0]].data += updates(f"{folder}: {layer}", parts)["weight"].to(weights[places[0]])


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


NEEDS = {
    "score": ["scorer"], "ground": ["grounder", "segmenter"], "synthesize": ["editor"],
    "verify": ["verifier", "embedder"], "guard": ["embedder"],
}  # fmt: skip


class Paper:
    """The models of one stage at a time; several threads ask them."""

    def __init__(self, args):
        self.args, self.device, self.lock = args, pick_device(args.device), threading.Lock()

    def preflight(self, stages):
        """ValueError for what is missing, before days of work: models (SAM 3 is gated), packages, servers, words."""
        if "score" in stages:
            editscore_prompts(self.args.prompts)
        if "synthesize" in stages:
            try:
                import torchvision  # noqa: F401
                from diffusers import QwenImageEditPlusPipeline  # noqa: F401
            except (ImportError, RuntimeError) as error:
                told = "--models paper makes references with diffusers: pip install diffusers pillow torchvision"
                raise ValueError(f"{told} ({error})") from None
        for need in (need for stage in stages for need in NEEDS.get(stage, ())):
            name = getattr(self.args, need)
            model = served(name) if name.startswith("http") else name
            for part in () if name.startswith("http") else name.split("+"):
                check_model(part, f"--set {need}={name}")
            if need == "grounder" and re.search("qwen2[._]5.vl", model, re.IGNORECASE):
                raise ValueError(f"--set grounder={name}: {PIXELS}")

    def setup(self, stage):
        from transformers import CLIPModel, Sam3TrackerModel

        whole = lambda kind: lambda name: kind.from_pretrained(local_path(name)).to(self.device).eval()
        openers = {"segmenter": whole(Sam3TrackerModel), "embedder": whole(CLIPModel)}
        openers["editor"] = lambda name: open_editor(name, self.device)
        asked = lambda name: open_model(name, self.args, self.device)
        for need in NEEDS.get(stage, ()):
            setattr(self, need, openers.get(need, asked)(getattr(self.args, need)))
        if stage == "ground" and getattr(self.grounder.model, "positions_a_second", None):
            raise ValueError(f"--set grounder={self.args.grounder}: {PIXELS}")
        if stage == "score":
            self.words = editscore_prompts(self.args.prompts)

    def ask(self, asker, prompt, images, read, schema):
        """read(the answer) to a prompt about images, uint8 (H, W, 3) by label. A server that was busy, or whose answer
        cannot be read, is asked again."""
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
        frames = (vlm.sampled_frames(path, self.args.fps, rate, 1280 * 720)[0] for path in (source_path, target_path))
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
        """-> box, mask (H, W), index of its frame, label and kind."""
        frame, more, box = frame_at(target_path, 0), {}, row.get("box")
        if box is None:
            known = row["kind"] in KINDS
            kinds = f'"{row["kind"]}"' if known else '"subject", "background", "remove", "style" or "other"'
            prompt = GROUND.format(prompt=row["prompt"], kinds=kinds)
            box, more["label"], kind = self.ask(self.grounder, prompt, {"frame": frame}, read_box, BOX)
            if not known:
                more["kind"] = str(kind or "unknown")
        with self.lock:
            mask = segment(self.segmenter, frame, box)
        x1, y1, x2, y2 = (round(v * side) for v, side in zip(box, mask.shape[::-1] * 2))
        if not mask.any() or mask[y1:y2, x1:x2].sum() < 0.5 * mask.sum():
            raise Rejected("the mask does not lie in its box", more)
        return box, mask, 0, more

    def synthesize(self, source_path, target_path, mask, row):
        """The editor's picture of what the mask leaves; its generator starts from the record's id."""
        from PIL import Image

        frame = frame_at(target_path, row["key"])
        mask = resized(mask, frame.shape[:2])
        soft = grow(mask, max(1, min(mask.shape) // 180))[..., None]
        if row["kind"] == "subject":
            frame = around(torch.where(soft, frame, torch.tensor(255, dtype=torch.uint8)), box_of(mask), 0.1)
        else:
            frame = torch.where(soft, torch.tensor(128, dtype=torch.uint8), frame)
        prompt = SYNTHESIZE[row["kind"]].format(label=row.get("label", "object"))
        steps, guidance = STEPS["+" in self.args.editor]
        seed = (int(row["id"], 16) + 1_000_003 * self.args.seed) % 2**63
        known = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        known |= {"true_cfg_scale": guidance, "negative_prompt": " "}  # without it guidance is left out in silence
        with self.lock:
            made = self.editor(image=[Image.fromarray(frame.numpy())], prompt=prompt, **known)
        image = torch.from_numpy(np.array(made.images[0].convert("RGB")))
        if row["kind"] == "background":
            return image
        ink = inked(as_float(image[None])[0])
        if not ink.any():
            raise Rejected("the editor's picture is empty")
        return around(image, box_of(large_regions(ink[None], 0.01)[0]), 0.05)

    def verify(self, source_path, target_path, ref_path, row):
        images = {"edited": frame_at(target_path, row.get("key", 0)), "reference": read_image(ref_path)}
        prompt = VERIFY.format(prompt=row["prompt"], meant=MEANT[row["kind"]])
        return self.ask(self.verifier, prompt, images, read_verdict, VERDICT)

    def embed(self, images):
        with self.lock:
            return clip_features(self.embedder, images)


def check_model(name, where):
    """Is a folder there, or a hub id in the cache or to be had? Nothing is downloaded. ValueError."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    files = ("config.json", "model_index.json", "adapter_config.json")
    if Path(name).exists() or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    try:
        HfApi().auth_check(name)
    except Exception as error:  # the hub client raises many kinds, from DNS to gated repositories
        gated = "for a gated model ask for access on its page, then `hf auth login`"
        raise ValueError(f"{where}: {name} is no folder, nor to be had from the hub; {gated} ({error})") from None
