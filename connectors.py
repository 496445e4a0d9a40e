"""What Kiwi-Edit adds to a video diffusion model: a multimodal LLM that reads the request (paper, Section 4).

    source frames (T, H, W, 3), instruction, optional reference image
      -> chat text + patches -> Qwen2.5-VL (frozen, with LoRA) -> hidden states (1, S, 2048)
    learnable queries, placed in the text by embedding -> Query Connector  -> (1, n, D)   } the context of the
    the reference's visual tokens                      -> Latent Connector -> (1, m, D)   } DiT's cross-attention

The two towers are in qwen.py. The chat text, frame sampling, resizing, patches and positions are made here, because
released weights depend on details that a processor would decide anew with each version: two resizes of video frames,
pixel values rounded to bfloat16, temporal positions 0, 2, 4, ... at any frame rate (FACTS.md, "The MLLM"). Special
tokens typed into an instruction are plain text here; in the release a typed query token crashes. Several reference
images follow one another; the release takes one.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from qwen import Qwen, QwenConfig

SYSTEM_PROMPT = (
    "You will be given an image and instruction. Please describe the content of the image in detail based on "
    "instruction in your own words."
)
REFERENCE_HINT = " Use the reference input from last frame."
QUERY_TOKEN = "<|object_ref_start|>"
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class MLLMConfig:
    """The MLLM side. `folder` holds Qwen's config.json (or qwen_config.json) and tokenizer.json.

    A query count of 0 leaves out the mode and its parameters. `max_ref_tokens` limits the visual tokens of a
    reference image, `max_frames` and `max_pixels` the frames of a source video and the pixels of each;
    max_pixels None is what the released 5B training scripts use. `context` is the paper's ablation (Table 5):
    "queries+latents", or "queries" without the Latent Connector's tokens. `encoder` names a class (`Encoder.named`).
    """

    folder: str
    dit_dim: int = 3072
    num_image_queries: int = 256
    num_video_queries: int = 512
    num_ref_queries: int = 768
    max_ref_tokens: int = 768
    max_frames: int = 16
    max_pixels: int | None = 262144
    context: str = "queries+latents"
    encoder: str = "qwen2.5-vl"

    def __post_init__(self):
        if self.context not in ("queries", "queries+latents"):
            raise ValueError(f'MLLMConfig.context: {self.context!r}, expected "queries" or "queries+latents"')
        if self.encoder not in Encoder.named:
            raise ValueError(f"MLLMConfig.encoder: {self.encoder!r}, expected one of {', '.join(Encoder.named)}")


def fit_pixels(height, width, factor, min_pixels, max_pixels):
    """Qwen's image size: multiples of `factor`, near the aspect, within the pixel limits (Python's round)."""
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def video_frame_sizes(height, width, max_pixels):
    """The two sizes (h, w) through which the released code resizes a video frame.

    First multiples of 56, where 28 was meant, then multiples of 28 with a higher floor; kept, since released
    weights were trained on such pictures.
    """
    first = fit_pixels(height, width, 56, 4 * 56 * 56, max_pixels or 16384 * 56 * 56)
    return first, fit_pixels(*first, 28, 128 * 28 * 28, min(max_pixels or math.inf, 768 * 28 * 28))


def sample_frames(num_frames, max_frames):
    """Indices of at most max_frames frames, evenly from the first to the last."""
    if num_frames <= max_frames:
        return list(range(num_frames))
    return torch.linspace(0, num_frames - 1, max_frames).round().long().tolist()


def resize_like_pillow(frames, size):
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3), bicubic and antialiased: Pillow's picture within 1."""
    x = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1)


def resize_like_torchvision(frames, size):
    """The same in float32, clamped and rounded: what torchvision makes of a stack of frames."""
    x = F.interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
    return x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def patchify(frames, patch=14, mean=PIXEL_MEAN, std=PIXEL_STD):
    """uint8 frames (T, H, W, 3), H and W multiples of 28 -> (patches (t*h*w, 1176), grid (t, h, w)).

    A patch is 2 frames (an odd count repeats the last) x 14 x 14 pixels; 2x2 neighbours, which the vision
    tower merges to one token, follow one another. Values are normalised and rounded to bfloat16.
    Another patch, mean and std are those of another Qwen (vlm.py).
    """
    x = (frames.float() - 255 * torch.tensor(mean)) / (255 * torch.tensor(std))
    if len(x) % 2:
        x = torch.cat([x, x[-1:]])
    t, h, w = len(x) // 2, x.shape[1] // patch, x.shape[2] // patch
    x = x.reshape(t, 2, h // 2, 2, patch, w // 2, 2, patch, 3)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, 3, 2, 14, 14)
    return x.reshape(t * h * w, -1).bfloat16(), (t, h, w)


def lay_out(pieces):
    """Pieces (lists of ids, or (pad id, grid, time step) of a visual) -> ids (1, S), positions (3, 1, S).

    Text counts on from the largest position so far; a visual's tokens have their place in its grid.
    """
    ids, positions, at = [], [], 0
    for piece in pieces:
        if isinstance(piece, tuple):
            pad, (t, h, w), step = piece
            axes = ((step * torch.arange(t)).long(), torch.arange(h // 2), torch.arange(w // 2))
            here = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
            ids += [pad] * here.shape[1]
        else:
            here = torch.arange(len(piece)).expand(3, -1)
            ids += piece
        if here.numel():
            positions.append(at + here)
            at = int(positions[-1].max()) + 1
    return torch.tensor([ids]), torch.cat(positions, 1)[:, None]


@dataclass
class MLLMInputs:
    """One request, ready for the model. `pieces` is the sequence in order: lists of token ids, the name of a
    visual ("source", "ref0", "ref1", ...) or "queries"."""

    mode: str  # "image", "video" or "ref": which queries are placed
    pieces: list
    pixel_values: dict = field(default_factory=dict)  # name -> (patches, 1176)
    tokens: dict = field(default_factory=dict)  # instead: name -> (n, hidden), what the vision tower made of them
    grids: dict = field(default_factory=dict)  # name -> (t, h, w) in patches


class Encoder(nn.Module):
    """What reads the request. A subclass is chosen by its name, `--set mllm.encoder=NAME`; nobody else asks which.

    __init__(config: MLLMConfig, empty): with `empty` the pretrained parts are built on the meta device.
    resize(source, ref): frames uint8 (T, H, W, 3) and one or more references (H, W, 3), or None -> the mode ("image",
        "video" or "ref") and {name: uint8 (T, H, W, 3)}, "source" first, as the encoder sees them. Workers call it.
    assemble(instruction, mode, visuals): what `resize` made -> a request, anything that `encode` takes.
    encode(requests) -> their contexts, a list of (1, L, dit_dim).
    """

    named = {}
    backbones = ()  # attributes that hold pretrained weights; all other parameters are Kiwi-Edit's own
    language_model = None  # the module that gets LoRA, if any

    def __init_subclass__(cls, name):
        Encoder.named[name] = cls

    def forward(self, instruction, source, ref=None):
        """The context of one request.

        instruction: text. source: uint8 (T, H, W, 3), the frames as cropped for the VAE; T = 1 without a reference
        is the image mode. ref: uint8 (H, W, 3), or a list of such. -> (1, L, dit_dim).
        ValueError for an empty instruction, wrong arrays, or a mode without queries.
        """
        return self.encode([self.prepare(instruction, source, ref)])[0]

    def prepare(self, instruction, source, ref=None):
        """The request; arguments as for `forward`."""
        return self.assemble(instruction, *self.resize(source, ref))

    def blocks(self):
        """Layers that training shards and recomputes one by one."""
        return []

    def files(self):
        """Files of `config.folder` that saved weights need beside the tensors."""
        return []


class MLLMEncoder(Encoder, name="qwen2.5-vl"):
    """Qwen2.5-VL with learnable queries and the two connectors: (frames, instruction, reference) -> context.

    Parameters: `model.language_model.*` and `model.visual.*` (qwen.py), `image_queries`, `video_queries`,
    `ref_queries` (n, hidden), `connector.{0,2}` and `ref_connector.{0,2}`.
    """

    backbones = ("model",)

    def __init__(self, config: MLLMConfig, empty=False):
        from tokenizers import Tokenizer

        super().__init__()
        self.config = config
        folder = Path(config.folder)
        released = (folder / "qwen_config.json").is_file()  # the diffusers layout
        name = "qwen_config.json" if released else "config.json"
        values, tokenizer = read_json(folder / name), existing(folder / "tokenizer.json")
        try:
            qwen = QwenConfig.from_dict(values)
            self.tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # tokenizers raises nothing more particular
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{folder}: its config or tokenizer.json cannot be read ({reason}); fetch them again"
            ) from None
        self.tokenizer.encode_special_tokens = True  # what a user types is text, never a control token
        with torch.device("meta") if empty else nullcontext():
            self.model = Qwen(qwen)
        hidden = qwen.hidden
        for mode, count in self.num_queries.items():
            if count:
                self.register_parameter(f"{mode}_queries", nn.Parameter(0.02 * torch.randn(count, hidden)))
        self.connector = connector(hidden, config.dit_dim)
        if config.num_ref_queries:
            self.ref_connector = connector(hidden, config.dit_dim)

    @property
    def num_queries(self):
        c = self.config
        return {"image": c.num_image_queries, "video": c.num_video_queries, "ref": c.num_ref_queries}

    @property
    def language_model(self):
        return self.model.language_model

    def blocks(self):
        return list(self.model.language_model.layers)

    def files(self):
        names = ("config.json", "qwen_config.json", "tokenizer.json")
        return [path for name in names if (path := Path(self.config.folder) / name).is_file()]

    def resize(self, source, ref=None):
        """-> mode and the pictures as the vision tower takes them, {name: uint8 (T, H, W, 3)}."""
        source = as_frames(source, "source")
        refs = [] if ref is None else [as_frames(r, "ref")[:1] for r in (ref if isinstance(ref, list) else [ref])]
        mode = "ref" if refs else "image" if len(source) == 1 else "video"
        if not self.num_queries[mode]:
            raise ValueError(f"these weights have no {mode} queries: they were not trained for this kind of request")
        visuals = {"source": self.resize_source(source, mode)}
        for i, image in enumerate(refs):
            size = fit_pixels(*image.shape[1:3], 28, 4 * 28 * 28, 28 * 28 * self.config.max_ref_tokens)
            visuals[f"ref{i}"] = resize_like_pillow(image, size)
        return mode, visuals

    def assemble(self, instruction, mode, visuals) -> MLLMInputs:
        """The request of an instruction and what `resize` made of its pictures."""
        instruction = instruction.strip()
        if not instruction:
            raise ValueError('the instruction is empty: say what to change, e.g. "replace the car"')
        text = instruction + (REFERENCE_HINT if mode == "ref" else "")

        start, end, vision_start, vision_end = (
            [self.token(f"<|{name}|>")] for name in ("im_start", "im_end", "vision_start", "vision_end")
        )
        pieces = [start + self.ids("system\n" + SYSTEM_PROMPT) + end + self.ids("\n") + start + self.ids("user\n")]
        pieces += [vision_start, "source", vision_end, self.ids(text)]
        for name in list(visuals)[1:]:
            pieces += [vision_start, name, vision_end]
        inputs = MLLMInputs(mode, pieces + ["queries", end + self.ids("\n")])
        for name, frames in visuals.items():
            if not isinstance(frames, torch.Tensor):  # tokens and grid from a cache
                inputs.tokens[name], inputs.grids[name] = frames[0], tuple(frames[1])
            else:
                inputs.pixel_values[name], inputs.grids[name] = patchify(frames)
        return inputs

    def resize_source(self, frames, mode):
        """Source frames (T, H, W, 3) as the vision tower takes them."""
        height, width = frames.shape[1:3]
        if mode == "image":
            return resize_like_pillow(frames, fit_pixels(height, width, 28, 4 * 28 * 28, 16384 * 28 * 28))
        first, second = video_frame_sizes(height, width, self.config.max_pixels)
        frames = frames[sample_frames(len(frames), self.config.max_frames)]
        return resize_like_torchvision(resize_like_pillow(frames, first), second)

    def token(self, name):
        number = self.tokenizer.token_to_id(name)
        if number is None:
            raise ValueError(f"{self.config.folder}/tokenizer.json has no token {name}: not Qwen2.5-VL's tokenizer")
        return number

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def laid_out(self, inputs: MLLMInputs):
        """Token ids (1, S), one for each visual token and query, and positions (3, 1, S); 2 a step in time.

        transformers 5 would number the text after a video differently: so positions are passed in.
        """
        pieces = []
        for piece in inputs.pieces:
            if piece == "queries":
                piece = [self.token(QUERY_TOKEN)] * self.num_queries[inputs.mode]
            elif isinstance(piece, str):
                still = piece != "source" or inputs.mode == "image"
                piece = (self.token("<|image_pad|>" if still else "<|video_pad|>"), inputs.grids[piece], 2)
            pieces.append(piece)
        return lay_out(pieces)

    def input_ids(self, inputs):
        return self.laid_out(inputs)[0]

    def position_ids(self, inputs):
        return self.laid_out(inputs)[1]

    def encode(self, requests):
        """Run the model on prepared requests at once -> their contexts, a list of (1, L, dit_dim).

        Requests are padded at their ends, where causal attention never looks.
        """
        embed = self.model.language_model.embed_tokens
        device, dtype = embed.weight.device, embed.weight.dtype
        seen = iter(self.look(requests))
        rows, spans = [], []  # of each request: (S, hidden), and where its references stand
        for inputs in requests:
            parts, at, length = [], [], 0
            for piece in inputs.pieces:
                if piece == "queries":
                    part = getattr(self, f"{inputs.mode}_queries").to(dtype)
                elif isinstance(piece, str):
                    part = next(seen)
                    at += [slice(length, length + len(part))] * (piece != "source")
                else:
                    part = embed(torch.tensor(piece, device=device))
                parts.append(part)
                length += len(part)
            rows.append(torch.cat(parts))
            spans.append(at)
        positions = [self.position_ids(inputs)[:, 0].T for inputs in requests]  # (S, 3) each
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        hidden = self.model.language_model(pad(rows), pad(positions).permute(2, 0, 1).to(device))  # (B, S, hidden)
        return [self.context(r.mode, h[: len(row)], at) for r, h, row, at in zip(requests, hidden, rows, spans)]

    def look(self, requests):
        """The vision tower's tokens (n, hidden) of all pictures of the requests, in order, or those from a cache."""
        weight = self.model.language_model.embed_tokens.weight
        if requests[0].tokens:
            return [tokens.to(weight.device, weight.dtype) for r in requests for tokens in r.tokens.values()]
        pixels = torch.cat([p for r in requests for p in r.pixel_values.values()]).to(weight.device, weight.dtype)
        grids = [grid for r in requests for grid in r.grids.values()]
        seen = self.model.visual(pixels, grids)
        return seen.split([num_tokens(grid) for grid in grids])

    def context(self, mode, hidden, spans):
        """What the DiT sees of a request's hidden states (S, hidden), its references' at `spans` -> (1, L, dit_dim)."""
        # The last n positions, as released weights were trained: the two tokens that close the turn follow the
        # queries, so the first two queries are not read and those two tokens are.
        context = self.connector(hidden[None, -self.num_queries[mode] :])
        if mode != "ref" or self.config.context == "queries":
            return context
        latents = torch.cat([hidden[None, span] for span in spans], dim=1)
        return torch.cat([self.ref_connector(latents), context], dim=1)


def connector(in_dim, out_dim):
    """Linear, GELU, Linear; the last is zero, so training starts from a context of zeros."""
    layers = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(approximate="tanh"), nn.Linear(out_dim, out_dim))
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    return layers


def num_tokens(grid):
    return math.prod(grid) // 4  # 2x2 patches make a token


def as_frames(frames, name):
    """uint8 (T, H, W, 3) or (H, W, 3), torch or numpy -> torch (T, H, W, 3)."""
    frames = torch.as_tensor(frames)
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise ValueError(f"{name}: expected uint8 frames (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    return frames


def existing(path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: the folder is not complete")
    return Path(path)


def read_json(path) -> dict:
    """The fields of a JSON object. ValueError where a file holds something else."""
    try:
        values = json.loads(existing(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values
