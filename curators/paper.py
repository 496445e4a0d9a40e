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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from connectors import PIXEL_MEAN, PIXEL_STD
from curators import KINDS, Rejected, box_of, frame_at, moments
from curators.classical import grow, inked, large_regions
from load import local_path
from media import frame_rate, open_media, pad_reference, read_image, resize, write_image
from metrics import as_float
from parallel import pick_device
from vlm import (
    Answer,
    Asker,
    Local,
    Malformed,
    NoRedirect,
    OpenAICompatible,
    Settings,
    json_objects,
    key_of,
    sampled_frames,  # fmt: skip
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
    "verify_subject": (
        "The first image is a frame of a video that was edited by this instruction: {prompt}\n"
        "The second image is meant to show the object that the edit brought. Is it the same object, of the same "
        "colour, shape and material, the right way up, alone and complete enough to be recognised?\n"
        'Answer with JSON only: {{"reason": "<one sentence>", "match": true or false}}'
    ),
    "verify_background": (
        "The first image is a frame of a video whose background was replaced by this instruction: {prompt}\n"
        "The second image is meant to show that background without any foreground. Is it the same place in the same "
        "style and light, the right way up, with nothing left of the foreground and no smears?\n"
        'Answer with JSON only: {{"reason": "<one sentence>", "match": true or false}}'
    ),
}  # fmt: skip
SCORES = {"type": "object", "properties": {"reasoning": {"type": "string"},
          "score": {"type": "array", "items": {"type": "number"}}}}  # fmt: skip
BOX = {"type": "object", "properties": {"kind": {"type": "string"}, "label": {"type": "string"},
       "bbox_2d": {"type": "array", "items": {"type": "number"}}}}  # fmt: skip
VERDICT = {"type": "object", "properties": {"reason": {"type": "string"}, "match": {"type": "boolean"}}}
NUMBERS = r"-?\d+(?:\.\d+)?"
STEPS = {False: (40, 4.0), True: (4, 1.0)}  # of the editor, without and with a Lightning LoRA: steps, guidance


def editscore_prompts(path=None):
    """The two questions of EditScore, {"success", "quality"}, out of its vie_prompts.py: read as text, never run."""
    spec = None if path else importlib.util.find_spec("editscore")
    path = Path(path) if path else spec and Path(spec.submodule_search_locations[0]) / "vie_prompts.py"
    if not path or not path.is_file():
        raise ValueError(
            "EditScore's words are missing: pip install --no-deps editscore, or give its vie_prompts.py with --prompts"
        )
    texts = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts[node.targets[0].id] = node.value.value
    try:
        context, rule = texts["_context_no_delimit_reasoning_first"], texts["_prompts_0shot_two_image_edit_rule"]
        scale = lambda text: text.replace("10", "25")  # tuned on 0..25
        return {"success": "\n".join([context, rule, scale(texts["_prompts_0shot_tie_rule_SC"])]),
                "quality": "\n".join([context, scale(texts["_prompts_0shot_rule_PQ"])])}  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; give the vie_prompts.py of EditScore") from None


def show_prompts(path=None):
    for name, prompt in PROMPTS.items():
        print(f"--- {name}\n{prompt.replace('{{', '{').replace('}}', '}')}\n")
    try:
        for name, prompt in editscore_prompts(path).items():
            print(f"--- EditScore, {name}\n{prompt}\n")
    except ValueError as error:
        print(f"--- EditScore\n{error}")


# ---- answers


def is_number(value):
    return type(value) in (int, float)  # true and false are ints to isinstance


def read_scores(text, highest=25):
    """A judge's answer -> its smallest number. Malformed: a failed parse is a failed record, never a middling score."""
    found = [f["score"] for f in json_objects(text) if isinstance(f.get("score"), list)]
    if not found:  # half a JSON, or none
        lists = re.findall(rf"score\W{{0,6}}\[\s*({NUMBERS})\s*,\s*({NUMBERS})\s*\]", text, re.IGNORECASE)
        found = [[float(a), float(b)] for a, b in lists]
    if not found:
        raise Malformed(f"no score in the answer: {' '.join(text.split())[:120]!r}")
    if len(found[-1]) != 2 or not all(is_number(v) and 0 <= v <= highest for v in found[-1]):
        raise Malformed(f"{found[-1]} are not two numbers from 0 to {highest}")
    return float(min(found[-1]))


def read_box(text, size=(1000, 1000)):
    """A grounder's answer -> box [x1, y1, x2, y2] in 0..1, label, kind or None; of several boxes the largest.

    size: what coordinates count, (width, height): 1000 for Qwen3-VL; of the resized picture for Qwen2.5-VL. Malformed
    without a box; Rejected for a box that is no object's.
    """
    objects = list(json_objects(text))
    kind = next((f["kind"] for f in objects if isinstance(f.get("kind"), str)), None)
    if any(f.get("bbox_2d") == [] for f in objects) or re.search(r"\[\s*\]", text) and "bbox" not in text:
        raise Rejected("the grounder sees nothing of the kind")
    found = [(f.get("bbox_2d", f.get("bbox")), f.get("label")) for f in objects]
    found = [
        (box, label) for box, label in found if isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    ]
    if not found:  # half a JSON, or none
        four = r"\s*,\s*".join([f"({NUMBERS})"] * 4)
        for match in re.finditer(rf"bbox(?:_2d)?[\"']?\s*:\s*\[\s*{four}\s*\]", text):
            label = re.match(r"[^{}]{0,40}?label[\"']?\s*:\s*([\"'])(.{1,80}?)\1\s*(?:[,}\]]|$)", text[match.end() :])
            found.append(([float(v) for v in match.groups()], label and label[2]))
    boxes = []
    for four, label in found:
        x1, y1, x2, y2 = (min(max(v / side, 0), 1) for v, side in zip(four, size * 2))
        boxes.append(((x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0, [x1, y1, x2, y2], label))
    if not boxes:
        raise Malformed(f"no box in the answer: {' '.join(text.split())[:120]!r}")
    area, box, label = max(boxes, key=lambda b: b[0])
    if area < 1e-3:
        raise Rejected(f"the box {[round(v, 3) for v in box]} is empty or tiny")
    if area > 0.95:
        raise Rejected("the box is the whole frame")
    return box, sound(label.strip())[:80] if isinstance(label, str) and label.strip() else "object", kind


def read_verdict(text):
    """A verifier's answer -> (bool, reason). Malformed if it does not say."""
    for found in reversed(list(json_objects(text))):
        match = str(found.get("match")).strip().lower()  # JSON's true, or the word
        if match in ("true", "yes", "false", "no"):
            return match in ("true", "yes"), sound(str(found.get("reason", "")))[:200]
    said = {m.lower() for m in re.findall(r"match\W{0,6}(true|false)\b", text, re.IGNORECASE)}
    if len(said) != 1:
        raise Malformed(f"no verdict in the answer: {' '.join(text.split())[:120]!r}")
    return said == {"true"}, ""


# ---- loading


def open_model(name, device, workers=1):
    """A model to ask: http://HOST/v1#MODEL, or a folder or hub id, BASE+ADAPTER with a LoRA. ValueError."""
    settings = Settings(
        device=device,
        max_pixels=1280 * 720,
        max_tokens=512,
        deadline=120.0,
        as_user=True,
        temperature=0.0,
        concurrency=workers,
    )
    if name.startswith(("http://", "https://")):
        address, _, model = name.partition("#")
        return OpenAICompatible(served(address, model), settings.__class__(**{**vars(settings), "endpoint": address}))
    base, _, adapter = name.partition("+")
    asked = Batch(local_path(base), settings)
    if adapter:
        add_adapter(asked.mllm, local_path(adapter))
    return asked


class Batch(Local):
    """Questions that wait while others are answered go through the model together, at most settings.concurrency."""

    def __init__(self, folder, settings):
        super().__init__(folder, settings)
        self.waiting, self.turn = [], threading.Lock()

    def answer(self, text, media, fps):
        job = {"asked": self.prepare(text, media, fps)}
        self.waiting.append(job)  # lists are appended to and cut by one thread at a time
        with self.turn:
            while "said" not in job and "error" not in job:
                jobs = [self.waiting.pop(0) for _ in range(min(len(self.waiting), self.settings.concurrency))]
                self.settle(jobs)
        if "error" in job:
            raise job["error"]
        return job["said"]

    def settle(self, jobs):
        try:
            for job, said in zip(jobs, self.answers([job["asked"] for job in jobs])):
                job["said"] = said
        except torch.OutOfMemoryError as error:
            if len(jobs) > 1:
                return [self.settle([job]) for job in jobs]
            jobs[0]["error"] = error
        except Exception as error:  # each of them tells its own thread
            for job in jobs:
                job["error"] = error

    @torch.no_grad()
    def answers(self, asked):
        """[(ids (1, S), positions (3, 1, S), pixels), ...], padded on the left -> [Answer or Malformed]"""
        from transformers import DynamicCache

        longest, place = max(ids.shape[1] for ids, *_ in asked), lambda x: x.to(self.device)
        pad = lambda x: F.pad(x, (longest - x.shape[-1], 0))
        ids, mask = (torch.cat([pad(x) for x in xs]) for xs in zip(*((ids, torch.ones_like(ids)) for ids, *_ in asked)))
        positions = torch.cat([pad(at) for _, at, _ in asked], dim=1)
        pixels = {name: place(torch.cat([p[name] for *_, p in asked])) for name in asked[0][2]}
        newer = "cache" in inspect.signature(self.mllm.forward).parameters
        kept = {"cache" if newer else "past_key_values": DynamicCache(), "use_cache": True}
        step, at = {"input_ids": place(ids), **pixels}, place(positions)
        said, ends, mask = [], torch.tensor([self.token("<|im_end|>"), self.token("<|endoftext|>")]), place(mask)
        going = torch.ones(len(asked), dtype=torch.bool)
        while going.any() and len(said) <= self.settings.max_tokens:
            out = self.mllm(position_ids=at, attention_mask=mask, **kept, **step)
            token = out.logits[:, -1].argmax(-1)
            said.append(token.cpu())
            going &= ~torch.isin(said[-1], ends)
            at, step, mask = (
                at[:, :, -1:] + 1 if len(said) > 1 else at.amax(dim=(0, 2), keepdim=True).expand(3, -1, 1) + 1,
                {"input_ids": token[:, None]},
                F.pad(mask, (0, 1), value=1),
            )
        out = []
        for row, (own, *_) in zip(torch.stack(said, dim=1), asked):
            stop = torch.isin(row, ends).nonzero()[:, 0].tolist()
            text = self.tokenizer.decode(row[: stop[0]].tolist()) if stop else ""
            out.append(Answer(text if stop else "cut off", own.shape[1], stop[0] if stop else len(row), self.model))
        return out


def served(address, model):
    """The model of an OpenAI-compatible server: `model`, or the only one. ValueError."""
    key = key_of("OPENAI_API_KEY")
    request = urllib.request.Request(
        f"{address.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as answer:
            names = [entry["id"] for entry in json.load(answer)["data"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{address}: no OpenAI-compatible server answers there ({error}); start it, or name a model"
        ) from None
    if (model or len(names) != 1) and model not in names:
        raise ValueError(f"{address}: serves {len(names)} models, {', '.join(names[:8])}: say which, {address}#MODEL")
    if re.search("qwen2[._]5.vl", model or names[0], re.IGNORECASE):
        raise ValueError(
            f"{address}: Qwen2.5-VL counts boxes in pixels of a size that only its server knows: serve Qwen3-VL"
        )
    return model or names[0]


def add_adapter(module, folder):
    """Merge a LoRA (adapter_config.json, adapter_model.safetensors) into a model's weights as peft would: ranks and
    alphas by pattern, rslora. ValueError for other kinds of adapter, or if some of it finds no place."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise ValueError(f"{folder}: only LoRA adapters without DoRA or modules_to_save are read")
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = {name.removesuffix(".weight"): p for name, p in module.named_parameters() if name.endswith(".weight")}
    lower = {name for name in tensors if ".lora_A." in name}
    other = tensors.keys() - lower - {name.replace(".lora_A.", ".lora_B.") for name in lower}
    if other or len(tensors) != 2 * len(lower):
        raise ValueError(
            f"{folder}: not pairs of lora_A and lora_B alone ({', '.join(sorted(other)[:3]) or 'a lora_B is missing'})"
        )
    for name in lower:
        layer = name.split(".lora_A.")[0]
        tail = re.search(
            r"(?:language_model\.|visual\.|model\.)?(?:layers|blocks|merger|deepstack_merger_list)\..*", layer
        )
        places = [w for w in weights if tail and w.endswith(re.sub(r"^model\.", "", tail[0]))]
        if "visual" not in layer:  # names of transformers 4 leave out language_model.; both towers have layers
            places = [w for w in places if "visual" not in w]
        if len(places) != 1:
            raise ValueError(
                f"{folder}: {layer} finds {'no place' if not places else 'several places'} in {type(module).__name__}"
            )
        by_name = lambda field, value: next(
            (v for key, v in (config.get(field) or {}).items() if re.fullmatch(rf"(.*\.)?{key}", layer)), value
        )
        rank, alpha = by_name("rank_pattern", config["r"]), by_name("alpha_pattern", config["lora_alpha"])
        update = tensors[name.replace(".lora_A.", ".lora_B.")].float() @ tensors[name].float()
        with torch.no_grad():
            weights[places[0]] += (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * update).to(
                weights[places[0]]
            )


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

    def told(module, arguments, keywords):
        if "mm_token_type_ids" in keywords or keywords.get("input_ids") is None:
            return None
        return arguments, keywords | {
            "mm_token_type_ids": (keywords["input_ids"] == module.config.image_token_id).int()
        }

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


class Paper:
    """The models of one stage at a time; several threads ask them."""

    def __init__(self, args):
        self.args, self.device, self.lock, self.askers = args, pick_device(args.device), threading.Lock(), {}

    def preflight(self, stages):
        """ValueError or FileNotFoundError for what is missing, before days of work: models (SAM 3 is gated), packages,
        servers, EditScore's words."""
        need = {
            "score": ["scorer"],
            "ground": ["grounder", "segmenter"],
            "synthesize": ["editor"],
            "verify": ["verifier", "embedder"],
        }
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
        for name in (name for stage in stages for name in need.get(stage, ())):
            value = getattr(self.args, name)
            if value.startswith(("http://", "https://")):
                served(*value.partition("#")[::2])
                continue
            for part in value.split("+"):
                try:
                    reachable(part)
                except (ValueError, OSError) as error:
                    raise ValueError(f"--set {name}={value}: {error}") from None

    def setup(self, stage):
        if stage == "score":
            self.scorer, self.words = (
                open_model(self.args.scorer, self.device, self.args.workers),
                editscore_prompts(self.args.prompts),
            )
        elif stage == "ground":
            from transformers import Sam3TrackerModel

            self.grounder = open_model(self.args.grounder, self.device, self.args.workers)
            self.segmenter = Sam3TrackerModel.from_pretrained(local_path(self.args.segmenter)).to(self.device).eval()
        elif stage == "synthesize":
            self.editor = open_editor(self.args.editor, self.device)
        elif stage == "verify":
            self.verifier = open_model(self.args.verifier, self.device, self.args.workers)
        if stage in ("verify", "guard"):
            from transformers import CLIPModel

            self.embedder = CLIPModel.from_pretrained(local_path(self.args.embedder)).to(self.device).eval()

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
        frame, more = frame_at(target_path, 0), {}
        if "box" in row:
            box = row["box"]
        else:
            absolute = isinstance(self.grounder, Local) and self.grounder.positions_a_second  # Qwen2.5-VL
            size = self.grounder.seen_size(*frame.shape[:2])[::-1] if absolute else (1000, 1000)
            kinds = (
                f'"{row["kind"]}"' if row["kind"] in KINDS else '"subject", "background", "remove", "style" or "other"'
            )
            prompt = PROMPTS["ground"].format(prompt=row["prompt"], what=PROMPTS[row["kind"]], kinds=kinds)
            box, more["label"], kind = self.ask(
                self.grounder, prompt, {"frame": frame}, lambda said: read_box(said, tuple(size)), BOX
            )
            if row["kind"] not in KINDS:
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
        soft = (grow(mask[None, None].float(), max(1, min(mask.shape) // 180))[0, 0] > 0.5)[..., None]
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
        return self.ask(
            self.verifier, PROMPTS[f"verify_{row['kind']}"].format(prompt=row["prompt"]), images, read_verdict, VERDICT
        )

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
    ink = inked(as_float(image[None]))[0]
    if not ink.any():
        raise Rejected("the editor's picture is empty")
    return around(image, box_of(large_regions(ink[None], 0.01)[0]), margin)


def reachable(name):
    """Is a folder there, or a hub id in the cache or to be had? Nothing is downloaded. FileNotFoundError."""
    if Path(name).exists():
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    if any(
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("config.json", "model_index.json", "adapter_config.json")
    ):
        return
    try:
        HfApi().auth_check(name)
    except Exception as error:  # the hub client raises many kinds, from DNS to gated repositories
        reason = str(error).strip().split("\n")[0][:160]
        raise FileNotFoundError(
            f"{name} is no folder, and not to be had from the hub ({reason}); for a gated model ask for access on its "
            "page, then `hf auth login`"
        ) from None
