"""Ask a multimodal model about videos, over HTTP or on this machine, and read its answer with care.

    (instruction text, [(label, path), ...], frames a second) -> judge.ask -> Answer(text, tokens)
    answer text, names of criteria -> read_answer -> {name: whole number from 1 to 5}

Three judges: Gemini's native API (an OpenAI-style call drops videos in silence), any OpenAI-compatible server, and
Qwen2.5-VL / Qwen3-VL through transformers. What goes wrong is one of three things: TryAgain (busy, slow, cut off),
Barred (it refuses us), Malformed (an answer, but no score in it). Nothing is guessed into a score.
"""

import base64
import http.client
import inspect
import json
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from connectors import PIXEL_MEAN, PIXEL_STD, patchify
from media import decode, frame_rate, open_media, read_image, resize, write_image
from parallel import pick_device

GEMINI = "https://generativelanguage.googleapis.com/v1beta"
INLINE_LIMIT = 20_000_000  # bytes of a Gemini request with inline data
MAX_WAIT = 60.0  # seconds, the longest pause between two tries
FRAME_PIXELS = 448 * 448  # larger frames are shrunk


class JudgeError(ValueError):
    """Input that cannot be judged; the text says what, in which file, and what to do next."""


class TryAgain(Exception):
    """The judge could not be reached or had no time. busy: it is overrun; after: the seconds it asked to wait."""

    def __init__(self, reason, busy=False, after=None):
        super().__init__(reason)
        self.busy, self.after = busy, after


class Barred(JudgeError):
    """The judge refuses us altogether, or is not there: no further question is sent."""


class Malformed(ValueError):
    """An answer that has no score in it, or an impossible one; the next may be better."""


class Unusable(Malformed):
    """Asking the same again would not help: the request is wrong, or the videos do not reach the model."""


def sound(text):
    """Text that can be written to any file: half of a surrogate pair, which JSON lets through, becomes "?"."""
    return text.encode("utf-8", "replace").decode()


@dataclass
class Answer:
    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None

    def __post_init__(self):
        self.text = sound(self.text)


def has_secret(address):
    """Whether an address brings a user, a password or a query (?key=...), which would stand in ledgers and reports."""
    host, _, path = (address or "").partition("://")[2].partition("/")
    return "@" in host or "?" in host + path


def key_of(name):
    """A key from the environment, without the line's end that a file of secrets gives it; None where there is none.
    JudgeError where it cannot be sent: what refuses it there would print it."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(f"{name} has a character that no key has, a line's end perhaps; export the key alone")
    return key or None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # would carry the key to another host
        return None


def post(url, headers, body, deadline, secret=None, trusted=False):
    """POST JSON, get JSON, within `deadline` seconds in all (while headers dribble in: of each silence). TryAgain, Barred or
    Unusable where that fails.

    trusted: it answered before, so that 403 is about this request (OpenRouter says so of what a moderator stopped).
    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    hide = lambda text: text.replace(secret, "***") if secret else text
    end = time.monotonic() + deadline
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=deadline) as response:
            answer = json.loads(read_all(response, end))
            if not isinstance(answer, dict):
                raise TryAgain("the server's answer is not a JSON object")
            return answer
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}: {hide(error_text(error, end))[:300]}"
        if error.code == 404:
            raise Barred(f"the judge has no such model or address ({reason}); check --judge and --endpoint") from None
        if (
            error.code in (401, 402) or (error.code == 403 and not trusted) or "API key not valid" in reason
        ):  # the latter is Gemini's, with a 400
            raise Barred(
                f"the judge refuses the key ({reason}); check the environment variable, and what is left to pay with"
            ) from None
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            busy = error.code in (429, 503)
            raise TryAgain(reason, busy, float(after) if after.isdigit() else None) from None
        raise Unusable(reason) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise TryAgain(f"no answer within {deadline:g} s") from None
        raise TryAgain(hide(f"connection lost ({type(reason).__name__}: {reason})")) from None
    except (ValueError, RecursionError):
        raise TryAgain("the server's answer is not JSON") from None


def read_all(response, end):
    """The body of a response, read piece by piece; TimeoutError at the monotonic time `end`."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError
    body = b"".join(parts)
    if len(body) < int(response.headers.get("Content-Length") or 0):
        raise http.client.IncompleteRead(body)
    return body


def error_text(error, end):
    """What a server says of an error, until the monotonic time `end`."""
    try:
        with error:
            return " ".join(read_all(error, end)[:100_000].decode("utf-8", "replace").split())
    except (OSError, ValueError, http.client.HTTPException):
        return "no text"


def count_of(usage, name):
    """A number of tokens; None where the server gives none that is one."""
    value = usage.get(name)
    return value if type(value) is int else None  # true is an int to isinstance


def mime(path):
    kinds = {".mp4": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm", ".png": "image/png",
             ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}  # fmt: skip
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise Unusable(f"{path}: a judge takes {', '.join(kinds)}")
    return kind


def encoded(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


def data_uri(path):
    return f"data:{mime(path)};base64,{encoded(path)}"


class Server:
    """What both kinds of server share."""

    trusted = False  # until it has answered

    def exchange(self, headers, body, text):
        answer = post(self.url, headers, body, self.deadline, self.key, self.trusted)
        self.trusted = True
        try:
            said = self.reply(answer)
        except (AttributeError, TypeError, KeyError, IndexError):
            raise Malformed(f"the server's answer has another shape: {json.dumps(answer)[:200]}") from None
        if said.tokens_in is not None and said.tokens_in <= len(text) / 3:  # some proxies drop videos in silence
            raise Unusable(
                f"{said.tokens_in} prompt tokens are no more than the text: the server dropped the videos; see --send"
            )
        return said


class Gemini(Server):
    """Google's native generateContent, videos as inline data with an explicit frame rate."""

    def __init__(self, model, args):
        self.model, self.deadline = model, args.deadline
        self.url = f"{(args.endpoint or GEMINI).rstrip('/')}/models/{urllib.parse.quote(model)}:generateContent"
        self.key = key_of("GEMINI_API_KEY")
        if not self.key and not args.dry_run:
            raise JudgeError("GEMINI_API_KEY is not set: export the key, or choose another --judge")
        if not self.url.startswith("https://") and urllib.parse.urlsplit(self.url).hostname not in (
            "127.0.0.1",
            "localhost",
        ):
            raise JudgeError(f"--endpoint {args.endpoint}: the key goes over https only")

    def ask(self, text, media, fps):
        parts, size = [], 0
        for label, path in media:
            part = {"inlineData": {"mimeType": mime(path), "data": encoded(path)}}
            if mime(path).startswith("video"):
                part["videoMetadata"] = {"fps": fps}
            parts += [{"text": label + ":"}, part]
            size += len(part["inlineData"]["data"])
        if size > INLINE_LIMIT:
            raise Unusable(f"{size / 1e6:.0f} MB of videos are more than one request takes; re-encode them smaller")
        body = {
            "systemInstruction": {"parts": [{"text": text}]},
            "contents": [{"role": "user", "parts": parts}],
            "generationConfig": {"responseMimeType": "application/json"},
        }
        return self.exchange({"x-goog-api-key": self.key}, body, text)

    def reply(self, answer):
        usage = answer.get("usageMetadata") or {}
        candidate = (answer.get("candidates") or [{}])[0]
        said = "".join(
            p.get("text", "") for p in (candidate.get("content") or {}).get("parts", []) if not p.get("thought")
        )
        if not said:
            blocked = (answer.get("promptFeedback") or {}).get("blockReason") or candidate.get("finishReason")
            raise Malformed(f"refused to answer ({blocked or 'no text'})")
        out = (count_of(usage, "candidatesTokenCount") or 0) + (count_of(usage, "thoughtsTokenCount") or 0)
        return Answer(said, count_of(usage, "promptTokenCount"), out)


class OpenAICompatible(Server):
    """chat/completions; videos as frames at the given rate (any server), or as video_url (vLLM)."""

    def __init__(self, model, args):
        if not (args.endpoint or "").startswith(("http://", "https://")):
            raise JudgeError("--judge openai:... needs --endpoint, e.g. http://localhost:8000/v1")
        self.model, self.deadline, self.send = model, args.deadline, args.send
        self.url = f"{args.endpoint.rstrip('/')}/chat/completions"
        self.key = key_of("OPENAI_API_KEY")

    def ask(self, text, media, fps):
        content = []
        for label, path in media:
            as_frames = self.send == "frames" and mime(path).startswith("video")
            urls = [jpeg_uri(frame) for frame in sampled_frames(path, fps)[0]] if as_frames else [data_uri(path)]
            kind = "image_url" if as_frames else f"{mime(path).split('/')[0]}_url"
            content.append({"type": "text", "text": label + ":"})
            content += [{"type": kind, kind: {"url": url}} for url in urls]
        messages = [{"role": "system", "content": text}, {"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages}
        if self.send == "video":
            body["mm_processor_kwargs"] = {"fps": fps}  # vLLM's name for the frame rate
        return self.exchange({"Authorization": f"Bearer {self.key}"} if self.key else {}, body, text)

    def reply(self, answer):
        usage = answer.get("usage") or {}
        message = ((answer.get("choices") or [{}])[0]).get("message") or {}
        if not isinstance(message.get("content"), str) or not message["content"]:
            raise Malformed(f"refused to answer ({message.get('refusal') or 'no text'})")
        return Answer(message["content"], count_of(usage, "prompt_tokens"), count_of(usage, "completion_tokens"))


def sampled_frames(path, fps, rate=None):
    """Frames of a clip at `fps`, shrunk to FRAME_PIXELS: uint8 (n, H, W, 3), and the seconds at which they stand.

    rate: frames a second to be taken for the file's own, so that two clips give the same numbers of frames.
    """
    frames, seconds, due = [], [], 0.0
    with open_media(path) as (container, stream):
        source_rate = rate or float(frame_rate(stream))
        for index, rgb in decode(path, container, stream):
            if index / source_rate >= due - 1e-6:
                scale = min(1.0, math.sqrt(FRAME_PIXELS / (rgb.shape[0] * rgb.shape[1])))
                frames.append(resize(rgb[None], [max(2, round(side * scale / 2) * 2) for side in rgb.shape[:2]])[0])
                seconds.append(index / source_rate)
                due += 1 / min(fps, source_rate)
    return torch.stack(frames), seconds


def jpeg(image):
    """uint8 (H, W, 3) -> the bytes of a JPEG."""
    with tempfile.TemporaryDirectory() as folder:
        write_image(Path(folder) / "x.jpg", image)
        return (Path(folder) / "x.jpg").read_bytes()


def jpeg_uri(image):
    """uint8 (H, W, 3) -> a data URI of a JPEG."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(image)).decode()}"


QWEN = {  # patch, mean, std, time step in positions a second (None: a text stamp before each pair of frames)
    "qwen2_5_vl": (14, PIXEL_MEAN, PIXEL_STD, 2),
    "qwen3_vl": (16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None),
}


class Local:
    """Qwen2.5-VL or Qwen3-VL through transformers, greedy; patches and positions are made here (no torchvision)."""

    def __init__(self, folder, args, max_pixels=FRAME_PIXELS):
        from transformers import AutoConfig, AutoModelForImageTextToText

        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in QWEN:
            raise JudgeError(f"{folder}: a {kind} model; --judge local: takes {' or '.join(QWEN)}")
        self.patch, self.mean, self.std, self.positions_a_second = QWEN[kind]
        self.device = pick_device(args.device)
        if not (folder / "tokenizer.json").is_file():
            raise JudgeError(f"{folder}: has no tokenizer.json; give the folder of a Qwen2.5-VL or Qwen3-VL model")
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.mllm = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # an instruction's text is text, never a control token
        self.max_tokens, self.max_pixels = args.max_tokens, max_pixels

    def ask(self, text, media, fps):
        try:
            return self.answer(text, media, fps)
        except torch.OutOfMemoryError:
            raise Unusable(f"out of memory on {self.device}: give a smaller --fps or another --device") from None

    def answer(self, text, media, fps):
        from transformers import DynamicCache

        ids, positions, pixels = self.prepare(text, media, fps)
        place = lambda x: x.to(self.device)
        named = (
            "cache" if "cache" in inspect.signature(self.mllm.forward).parameters else "past_key_values"
        )  # of an older transformers
        kept = {named: DynamicCache()}
        with torch.no_grad():
            out = self.mllm(
                input_ids=place(ids), position_ids=place(positions), use_cache=True, **kept,
                **{name: place(value) for name, value in pixels.items()},
            )  # fmt: skip
            said, at = [], int(positions.max()) + 1
            for _ in range(self.max_tokens):
                token = out.logits[0, -1].argmax()
                if token.item() in self.ends:
                    break
                said.append(token.item())
                here = torch.full((3, 1, 1), at, device=self.device)
                out = self.mllm(input_ids=token.view(1, 1), position_ids=here, use_cache=True, **kept)
                at += 1
        return Answer(self.tokenizer.decode(said), ids.shape[1], len(said))

    @property
    def ends(self):
        return {self.token("<|im_end|>"), self.token("<|endoftext|>")}

    def token(self, name):
        number = self.tokenizer.token_to_id(name)
        if number is None:
            raise JudgeError(f"the judge's tokenizer.json has no token {name}: not a Qwen-VL model")
        return number

    def prepare(self, text, media, fps):
        """-> ids (1, S), positions (3, 1, S), and pixel values and grids by the model's names."""
        words = lambda s: self.tokenizer.encode(s, add_special_tokens=False).ids
        start, end = [self.token("<|im_start|>")], [self.token("<|im_end|>")]
        open_, close = [self.token("<|vision_start|>")], [self.token("<|vision_end|>")]
        pieces = [start + words("system\n" + text) + end + words("\n") + start + words("user\n")]
        kinds = {"image": ([], []), "video": ([], [])}
        for label, path in media:
            pieces.append(words(label + ": "))
            kind = mime(path).split("/")[0]
            frames, seconds = (read_image(path)[None], [0.0]) if kind == "image" else sampled_frames(path, fps)
            frames = resize(frames, self.seen_size(*frames.shape[1:3]))
            patches, grid = patchify(frames, self.patch, self.mean, self.std)  # in the vision tower's order
            kinds[kind][0].append(patches)
            kinds[kind][1].append(grid)
            pad = self.token(f"<|{kind}_pad|>")
            if self.positions_a_second is None and kind == "video":
                for t in range(grid[0]):
                    stamp = (seconds[2 * t] + seconds[min(2 * t + 1, len(seconds) - 1)]) / 2
                    pieces += [words(f"<{stamp:.1f} seconds>") + open_, (pad, (1, *grid[1:]), 0), close]
            else:
                rate = (len(seconds) - 1) / seconds[-1] if seconds[-1] else 1.0
                step = (self.positions_a_second or 0) * 2 / rate
                pieces += [open_, (pad, grid, step), close]
        pieces.append(end + words("\n") + start + words("assistant\n"))
        pixels = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if kinds[kind][0]:
                pixels[name] = torch.cat(kinds[kind][0]).to(next(self.mllm.parameters()).dtype)
                pixels[f"{kind}_grid_thw"] = torch.tensor(kinds[kind][1])
        return *self.lay_out(pieces), pixels

    def lay_out(self, pieces):
        """Pieces (lists of ids, or (pad id, grid, time step)) -> ids (1, S), positions (3, 1, S).

        What follows a visual counts on from its largest position, as both models were trained.
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

    def seen_size(self, height, width):
        """[height, width] at which the model sees a picture of that size."""
        unit = 2 * self.patch
        scale = min(1.0, math.sqrt(self.max_pixels / (height * width)))
        return [max(unit, round(side * scale / unit) * unit) for side in (height, width)]


LONGEST = 20_000  # characters of an answer that are read: its last, for some models think aloud before
NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?"


def read_score(text):
    """ "4", 4, "4/5", "**4**" -> 4. Malformed for anything but a whole number from 1 to 5."""
    match = re.fullmatch(NUMBER, str(text).strip(" *_`\"'.,"))
    if isinstance(text, bool) or not match:
        raise Malformed(f"{text!r} is not a score")
    if match[2] and match[2] != "5":
        raise Malformed(f"{text!r} is not on the scale from 1 to 5")
    value = float(match[1])
    if value not in (1, 2, 3, 4, 5):
        raise Malformed(f"{match[1]} is not a whole number from 1 to 5")
    return int(value)


def json_objects(text):
    """Every JSON object in a text, whatever stands around it; inner objects too."""
    decoder = json.JSONDecoder()
    for at in (m.start() for m in re.finditer(r"\{", text)):
        try:
            yield decoder.raw_decode(text, at)[0]
        except (ValueError, RecursionError):
            continue


def flat_name(name):
    return re.sub(r"[^a-z]+", "_", str(name).lower()).strip("_")


def spoken(text):
    """The end of an answer, without what its model thought aloud before."""
    return text.rpartition("</think>")[2][-LONGEST:]


def read_answer(text, names):
    """A judge's answer -> {name: score} for all of `names`, by name and not by order; Malformed with the reason.

    JSON first, whatever stands around it; else lines such as "**Visual quality:** 4/5", also out of half a JSON.
    """
    text = spoken(text)
    for found in reversed(list(json_objects(text))):
        flat = {flat_name(k): v for k, v in found.items()}
        if all(name in flat for name in names):
            return {name: read_score(flat[name]) for name in names}
    scores = {}
    for name in names:
        pattern = (
            rf"{name.replace('_', '[ _]')}[^\n:=]{{0,60}}[:=][\s*_\"']*{NUMBER}(?![\d.]*\d|\s*(?:/|-|–|to|or)\s*\d)"
        )
        pattern += (
            r"(?(2)|(?![ \t]+(?!stars?\b|points?\b|of 5\b)[a-z]))"  # "2 of the hats" is no score, "4/5 good" is one
        )
        given = {m.group(0)[m.start(1) - m.start() :] for m in re.finditer(pattern, text, re.IGNORECASE)}
        values = {read_score(value) for value in given}
        if len(values) != 1:
            said = " ".join(text.split())[:120]
            raise Malformed(f"{name} is {'given twice' if values else 'missing'} in the answer: {said!r}")
        scores[name] = values.pop()
    return scores


def read_reason(text):
    """Why, from the object that `read_answer` reads."""
    text = spoken(text)
    for found in reversed(list(json_objects(text))):
        if isinstance(found.get("reasoning"), str):
            return found["reasoning"]
    return " ".join(text.split())[:400]


def read_winner(text, names=()):
    """A pairwise answer -> {"winner": "1" | "2" | "tie"}."""
    text = spoken(text)
    given = re.findall(r"winner[\"'*\s]*[:=][\s\"'*]*(1|2|tie)(?=[\"'*\s]*(?:[,}.;(\n]|$))", text, re.IGNORECASE)
    if len({g.lower() for g in given}) != 1:
        raise Malformed(f"no winner in the answer: {' '.join(text.split())[:120]!r}")
    return {"winner": given[0].lower()}


def enforce(scores):
    """The hierarchy: {name: score} in order -> (the same with none above the first, whether it was broken)."""
    first = next(iter(scores.values()))
    kept = {name: min(score, first) for name, score in scores.items()}
    return kept, kept != scores
