"""Ask a vision-language model about pictures and videos, over HTTP or on this machine.

    text, [(label, path), ...], frames a second -> model.ask -> Answer(text, tokens, model)
    Asker(model, settings).ask(text, media, fps, read) -> read(answer): retries, quotas, and when to stop

Gemini's native API (OpenAI-style calls lose its videos), any OpenAI-compatible server, Qwen2.5-VL and Qwen3-VL through
transformers. Three things go wrong: TryAgain (busy, slow, connection lost), Malformed (an answer without what was asked
for) and Barred (nothing more is to be sent). An answer that was cut off is Malformed; its tokens count.
"""

import base64
import http.client
import json
import math
import os
import queue
import random
import re
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from connectors import PIXEL_MEAN, PIXEL_STD, lay_out, patchify
from media import MediaError, decode, frame_rate, open_media, read_image, resize, shown_frames, write_image
from parallel import pick_device

GEMINI = "https://generativelanguage.googleapis.com/v1beta"
INLINE_LIMIT = 20_000_000  # bytes of a Gemini request with inline data
ANSWER_LIMIT = 4_000_000  # bytes of an answer that are read
FRAME_PIXELS = 448 * 448  # larger frames are shrunk
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MIME = {**PICTURES, ".mp4": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm"}
STOPS = (None, "STOP", "stop", "eos", "eos_token", "end_turn", "stop_sequence")  # any other end is no answer
UNREAD = 10  # answers of which none could be read, before the first that could
TOKENS = (  # per frame of a video, and per picture, at low, medium, high resolution; their documentation, 2026-11
    ("gemini-[34]", (70, 70, 280), (280, 560, 1120)),
    ("gemini-", (66, 258, 258), (66, 258, 258)),
    ("(?i)qwen.?3", (98, 98, 98), (196, 196, 196)),
    ("", (256, 256, 256), (256, 256, 256)),
)


def tokens_of(path, model, settings):
    """About how many tokens a picture or a clip costs, from its header alone."""
    at = ("low", "medium", "high").index(settings.resolution)
    a_frame, a_picture = next((frame[at], picture[at]) for name, frame, picture in TOKENS if re.search(name, model))
    if path.suffix.lower() in PICTURES:
        return a_picture
    try:
        with open_media(path) as (container, stream):
            frames = max(1, round(shown_frames(container, stream) / frame_rate(stream) * settings.fps))
    except MediaError:
        frames = 1
    return frames * (a_picture if model.startswith("openai:") and settings.send == "frames" else a_frame)


@dataclass(frozen=True)
class Settings:
    """How a model is asked; `--set name=value` on the command line."""

    endpoint: str = ""
    fps: float = 1.0  # frames of a video a second
    resolution: str = "medium"  # Gemini's media resolution: low, medium, high
    temperature: float | None = 0.0  # None: the server's own
    send: str = "frames"  # to an OpenAI-compatible server; "video" for vLLM, which samples by itself
    deadline: float = 180.0  # seconds for one answer
    tries: int = 5
    wait: float = 2.0  # seconds before the second try, then doubled
    patience: float = 1800.0  # seconds that one question waits for a quota; a 429 uses up no try
    concurrency: int = 4
    max_tokens: int = 400  # of an answer of a local model
    max_pixels: int = FRAME_PIXELS
    device: str = ""
    as_user: bool = False  # text after the pictures in the user's turn, max_tokens sent along; else a system prompt


class TryAgain(Exception):
    """No answer. busy: the quota is used up; after: seconds the server asks to wait; paid: it may have been charged."""

    def __init__(self, reason, busy=False, after=None, paid=False):
        super().__init__(reason)
        self.busy, self.after, self.paid = busy, after, paid


class Barred(ValueError):
    """The model refuses us altogether, or is not there: no further question is sent."""


class Malformed(ValueError):
    """An answer without what was asked for; the next may be better. answer: what is known of it, tokens at least."""

    def __init__(self, reason, answer=None):
        super().__init__(reason)
        self.answer = answer


class Unusable(Malformed):
    """Asking the same again would not help: the request is wrong, or the videos do not reach the model."""


@dataclass
class Answer:
    text: str
    tokens_in: int | None
    tokens_out: int | None
    model: str | None  # who answered: providers redirect old names


def sound(text):
    """Text that any file can hold: half of a surrogate pair, which JSON lets through, becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def has_secret(address):
    """Whether an address brings a user, a password or a query (?key=...), which would stand in ledgers and reports."""
    host, _, path = (address or "").partition("://")[2].partition("/")
    return "@" in host or "?" in host + path


def key_of(name):
    """A key from the environment, stripped; None without one. ValueError for a key that cannot be sent in a header."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{name} has a character that no key has, a line's end perhaps; export the key alone")
    return key or None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # would carry the key to another host
        return None


def post(url, headers, body, deadline, secret=None, trusted=False):
    """POST JSON, get a JSON object, within `deadline` seconds. TryAgain, Barred or Unusable.

    trusted: the server answered before, so a 403 is about this request alone. What it says of `secret` becomes ***.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    hide = lambda text: sound(without(secret, text))
    end = time.monotonic() + deadline
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=deadline) as response:
            text = read_all(response, end)
    except urllib.error.HTTPError as error:
        try:
            with error:
                text = read_all(error, end)
        except (http.client.HTTPException, OSError):  # the status says enough
            text = "no text"
        raise refusal(error, hide(" ".join(text.split())), trusted) from None
    except (http.client.HTTPException, OSError) as error:
        reason, sent = getattr(error, "reason", error), not isinstance(error, urllib.error.URLError)
        if isinstance(reason, TimeoutError):
            raise TryAgain(f"no answer within {deadline:g} s", paid=True) from None
        raise TryAgain(hide(f"connection lost ({type(reason).__name__}: {reason})"), paid=sent) from None
    try:
        answer = json.loads(hide(json.dumps(json.loads(text), ensure_ascii=False)))  # whatever way it was spelled
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise TryAgain("the server's answer is not a JSON object", paid=True)
    return answer


def without(secret, text):
    """A text with *** in place of the key, as it is or as JSON spells it."""
    for spelled in (secret, json.dumps(secret)[1:-1]) if secret else ():
        text = text.replace(spelled, "***")
    return text


def read_all(response, end):
    """The text of a response, piece by piece; TimeoutError at the monotonic time `end`."""
    content = b""
    while part := response.read1(1 << 16):
        content += part
        if time.monotonic() > end:
            raise TimeoutError
        if len(content) > ANSWER_LIMIT:
            raise http.client.HTTPException(f"more than {ANSWER_LIMIT / 1e6:.0f} MB")
    return content.decode("utf-8", "replace")


def refusal(error, text, trusted):
    """An HTTP error and its body -> the exception that says what to do."""
    reason = f"HTTP {error.code}: {text[:300]}"
    if error.code == 404:
        return Barred(f"no such model or address ({reason}); check the model's name and --endpoint")
    if "insufficient_quota" in text or error.code == 402:
        return Barred(f"no quota is left on this account ({reason}); pay, or export another key")
    if error.code == 401 or (error.code == 403 and not trusted) or "API key not valid" in text:
        return Barred(f"the server refuses the key ({reason}); check the environment variable")
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        return TryAgain(reason, error.code == 429, seconds_to_wait(error.headers.get("Retry-After", ""), text))
    return Unusable(reason)


def seconds_to_wait(header, text):
    """Google's RetryInfo, or Retry-After as seconds or a date -> seconds; None if neither says."""
    if asked := re.search(r'"retryDelay"\s*:\s*"(\d+(?:\.\d+)?)s"', text):
        return float(asked[1])
    if re.fullmatch(r"\s*\d+(\.\d*)?\s*", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def mime(path):
    kind = MIME.get(Path(path).suffix.lower())
    if kind is None:
        raise Unusable(f"{path}: a judge takes {', '.join(MIME)}")
    return kind


def jpeg(image):
    """uint8 (H, W, 3) -> the bytes of a JPEG."""
    with tempfile.TemporaryDirectory() as folder:
        write_image(Path(folder) / "x.jpg", image)
        return (Path(folder) / "x.jpg").read_bytes()


def data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg_uri(image):
    return data_uri("image/jpeg", jpeg(image))


def within(height, width, max_pixels, unit):
    """[height, width] of about the aspect, at most max_pixels, in multiples of unit."""
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    return [max(unit, round(side * scale / unit) * unit) for side in (height, width)]


def sampled_frames(path, fps, rate=None, max_pixels=FRAME_PIXELS):
    """Frames of a clip at `fps`, shrunk to max_pixels: uint8 (n, H, W, 3), and the seconds at which they stand.

    rate: frames a second to take for the file's own, so that two clips give the same numbers of frames.
    """
    frames, seconds, due = [], [], 0.0
    with open_media(path) as (container, stream):
        source_rate = rate or float(frame_rate(stream))
        for index, rgb in decode(path, container, stream):
            if index / source_rate >= due - 1e-6:
                frames.append(resize(rgb[None], within(*rgb.shape[:2], max_pixels, 2))[0])
                seconds.append(index / source_rate)
                due += 1 / min(fps, source_rate)
    return torch.stack(frames), seconds


@lru_cache(maxsize=256)
def kept_uris(path, fps, changed):
    if fps is None:
        return [data_uri(mime(path), Path(path).read_bytes())]
    return [jpeg_uri(frame) for frame in sampled_frames(path, fps)[0]]


DECODING = threading.Lock()


def uris(path, fps=None):
    """The file as a data URI or, at fps, its frames: made once for all questions, while other threads wait."""
    with DECODING:
        return kept_uris(path, fps, os.stat(path).st_mtime_ns)


class Server:
    """What both kinds of server share: exchange(a question's body) -> Answer."""

    again = True  # another answer may be better
    trusted = False  # until it has answered

    def __init__(self, model, settings, url, key, headers):
        self.model, self.settings, self.url, self.key, self.headers = model, settings, url, key, headers
        self.refused = set()  # parameters

    def exchange(self, body, optional, text):
        """optional: what a server may refuse; then it is left out from there on."""
        while True:
            asked = {name: value for name, value in optional.items() if name not in self.refused}
            try:
                answer = post(self.url, self.headers, body | asked, self.settings.deadline, self.key, self.trusted)
                break
            except Unusable as error:
                named = [name for name in asked if name in str(error)]
                if not named:
                    raise
                self.refused.update(named)
        self.trusted = True
        tokens = [counted(answer.get(self.usage), names) for names in self.tokens]
        try:
            said, end, model = self.reply(answer)
            found = Answer(sound(said), *tokens, model and str(model))
        except (AttributeError, TypeError, KeyError, IndexError):
            reason = f"the server's answer has another shape: {json.dumps(answer)[:200]}"
            raise Malformed(reason, Answer("", *tokens, None)) from None
        if end not in STOPS or not said:
            raise Malformed(f"refused or cut off ({'no text' if end in STOPS else end})", found)
        if found.tokens_in is not None and found.tokens_in <= len(text) / 3:
            told = f"{found.tokens_in} prompt tokens are no more than the text: the server dropped the videos"
            raise Unusable(f"{told}; see --set send=video", found)
        return found


def counted(usage, names):
    """The sum of these counts of tokens; None where the answer has none of them."""
    counts = [usage[name] for name in names if type(usage.get(name)) is int] if isinstance(usage, dict) else []
    return sum(counts) if counts else None


class Gemini(Server):
    """Google's native generateContent, videos as inline data with an explicit frame rate."""

    usage, tokens = "usageMetadata", (["promptTokenCount"], ["candidatesTokenCount", "thoughtsTokenCount"])

    def __init__(self, model, settings):
        key, url = key_of("GEMINI_API_KEY"), urllib.parse.urlsplit(settings.endpoint or GEMINI)
        if not key:
            raise ValueError("GEMINI_API_KEY is not set: export the key, or choose another --judge")
        if url.scheme != "https" and url.hostname not in ("127.0.0.1", "localhost"):
            raise ValueError(f"--endpoint {settings.endpoint}: the key goes over https only")
        path = f"/models/{urllib.parse.quote(model)}:generateContent"
        super().__init__(model, settings, url.geturl().rstrip("/") + path, key, {"x-goog-api-key": key})

    def ask(self, text, media, fps, schema=None):
        parts, size = [], 0
        for label, path in media:
            part = {"inlineData": {"mimeType": mime(path), "data": uris(path)[0].partition(",")[2]}}
            if mime(path).startswith("video"):
                part["videoMetadata"] = {"fps": fps}
            parts += [{"text": label + ":"}, part]
            size += len(part["inlineData"]["data"])
        if size > INLINE_LIMIT:
            raise Unusable(f"{size / 1e6:.0f} MB of videos are more than one request takes; re-encode them smaller")
        config = {"responseMimeType": "application/json", "temperature": self.settings.temperature}
        config["mediaResolution"] = f"MEDIA_RESOLUTION_{self.settings.resolution.upper()}"
        if schema:
            config["responseSchema"] = {**schema, "propertyOrdering": list(schema["properties"])}
        contents = {"systemInstruction": {"parts": [{"text": text}]}, "contents": [{"role": "user", "parts": parts}]}
        return self.exchange({**contents, "generationConfig": config}, {}, text)

    def reply(self, answer):
        """-> text, why it ended, who answered."""
        candidate = (answer.get("candidates") or [{}])[0]
        parts = (candidate.get("content") or {}).get("parts") or []
        text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        end = (answer.get("promptFeedback") or {}).get("blockReason") or candidate.get("finishReason")
        return text, end, answer.get("modelVersion")


class OpenAICompatible(Server):
    """chat/completions; videos as frames at the given rate (any server), or as video_url (vLLM)."""

    usage, tokens = "usage", (["prompt_tokens"], ["completion_tokens"])

    def __init__(self, model, settings):
        if not settings.endpoint.startswith(("http://", "https://")):
            raise ValueError("--judge openai:... needs --endpoint, e.g. http://localhost:8000/v1")
        key, url = key_of("OPENAI_API_KEY"), f"{settings.endpoint.rstrip('/')}/chat/completions"
        super().__init__(model, settings, url, key, {"Authorization": f"Bearer {key}"} if key else {})

    def ask(self, text, media, fps, schema=None):
        content = []
        for label, path in media:
            as_frames = self.settings.send == "frames" and mime(path).startswith("video")
            kind = "image_url" if as_frames else f"{mime(path).split('/')[0]}_url"
            content.append({"type": "text", "text": label + ":"})
            content += [{"type": kind, kind: {"url": url}} for url in uris(path, fps if as_frames else None)]
        messages = [{"role": "system", "content": text}, {"role": "user", "content": content}]
        optional = {} if self.settings.temperature is None else {"temperature": self.settings.temperature}
        if self.settings.as_user:
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
            optional["max_tokens"] = self.settings.max_tokens
        if schema:
            strict = {**schema, "required": list(schema["properties"]), "additionalProperties": False}
            told = {"name": "answer", "schema": strict, "strict": True}
            optional["response_format"] = {"type": "json_schema", "json_schema": told}
        body = {"model": self.model, "messages": messages}
        if self.settings.send == "video":
            body["mm_processor_kwargs"] = {"fps": fps}  # vLLM's name for the frame rate
        return self.exchange(body, optional, text)

    def reply(self, answer):
        """-> text without what was only thought, why it ended, who answered."""
        choice = (answer.get("choices") or [{}])[0]
        message = choice.get("message") or {}
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(p.get("text") or "" for p in text if p.get("type") in (None, "text", "output_text"))
        return text, message.get("refusal") or choice.get("finish_reason"), answer.get("model")


QWEN = {  # patch, mean, std, time step in positions a second (None: a text stamp before each pair of frames)
    "qwen2_5_vl": (14, PIXEL_MEAN, PIXEL_STD, 2),
    "qwen3_vl": (16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None),
}


class Local:
    """Qwen2.5-VL or Qwen3-VL through transformers, greedy; patches and positions are made here (no torchvision)."""

    again = False  # a greedy model says the same again

    def __init__(self, folder, settings):
        from transformers import AutoConfig, AutoModelForImageTextToText

        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in QWEN:
            raise ValueError(f"{folder}: a {kind} model; expected {' or '.join(QWEN)}")
        self.patch, self.mean, self.std, self.positions_a_second = QWEN[kind]
        self.settings, self.device, self.model = settings, pick_device(settings.device), str(folder)
        self.waiting, self.turn = queue.SimpleQueue(), threading.Lock()
        self.tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.tokenizer.encode_special_tokens = True  # an instruction's text is text, never a control token
        self.token = lambda name: self.tokenizer.token_to_id(f"<|{name}|>")
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.mllm = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(self.device).eval()

    def ask(self, text, media, fps, schema=None):
        """Questions that wait while others are answered go through the model together."""
        own = Future()
        self.waiting.put((self.prepare(text, media, fps), own))
        with self.turn:
            if not own.done():
                self.settle([self.waiting.get() for _ in range(self.waiting.qsize())])
        return own.result()

    def settle(self, jobs):
        """Answer the (prepared question, Future) together; where that fails one by one, each to its own thread."""
        try:
            said = self.answers([asked for asked, _ in jobs])
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                error = Unusable(f"out of memory on {self.device}: give a smaller fps or another device")
            if len(jobs) > 1:
                for job in jobs:
                    self.settle([job])
                return
            said = [error]
        for (_, future), answer in zip(jobs, said):
            future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)

    @torch.no_grad()
    def answers(self, asked):
        """What `prepare` made of several questions, padded on the left -> an Answer or Malformed each, greedy."""
        longest, place = max(ids.shape[1] for ids, *_ in asked), lambda x: x.to(self.device)
        pad = lambda x: F.pad(x, (longest - x.shape[-1], 0))
        names = {name for *_, pixels in asked for name in pixels}
        shown = {name: place(torch.cat([p[name] for *_, p in asked if name in p])) for name in names}
        ends = [self.token("im_end"), self.token("endoftext")]
        made = self.mllm.generate(
            input_ids=place(torch.cat([pad(ids) for ids, *_ in asked])),  # (B, S)
            attention_mask=place(torch.cat([pad(torch.ones_like(ids)) for ids, *_ in asked])),
            position_ids=place(torch.cat([pad(positions) for _, positions, _ in asked], dim=1)),  # (3, B, S)
            **shown, max_new_tokens=self.settings.max_tokens, do_sample=False, repetition_penalty=1.0,
            eos_token_id=ends, pad_token_id=ends[1],
        )  # fmt: skip
        return [self.read(row.tolist(), ends, ids.shape[1]) for row, (ids, *_) in zip(made[:, longest:], asked)]

    def read(self, row, ends, tokens_in):
        """Generated ids up to the first of `ends` -> Answer; without one Malformed."""
        count = next((i for i, token in enumerate(row) if token in ends), len(row))
        found = Answer(sound(self.tokenizer.decode(row[:count])), tokens_in, count, self.model)
        return found if count < len(row) else Malformed(f"cut off after {count} tokens; see --set max_tokens", found)

    def prepare(self, text, media, fps):
        """-> ids (1, S), positions (3, 1, S), and pixel values and grids by the model's names."""
        words = lambda s: self.tokenizer.encode(s, add_special_tokens=False).ids
        names = ("im_start", "im_end", "vision_start", "vision_end")
        start, end, open_, close = ([self.token(name)] for name in names)
        system = [] if self.settings.as_user else start + words("system\n" + text) + end + words("\n")
        pieces, patches, grids = [system + start + words("user\n")], {}, {}
        for label, path in media:
            kind = mime(path).split("/")[0]
            frames, seconds = (read_image(path)[None], [0.0]) if kind == "image" else sampled_frames(path, fps)
            frames = resize(frames, self.seen_size(*frames.shape[1:3]))
            made, grid = patchify(frames, self.patch, self.mean, self.std)  # in the vision tower's order
            patches.setdefault(kind, []).append(made.to(self.mllm.dtype))
            grids.setdefault(kind, []).append(grid)
            pieces.append(words(label + ": "))
            pad = self.token(f"{kind}_pad")
            if self.positions_a_second is None and kind == "video":
                for t in range(grid[0]):
                    stamp = (seconds[2 * t] + seconds[min(2 * t + 1, len(seconds) - 1)]) / 2
                    pieces += [words(f"<{stamp:.1f} seconds>") + open_, (pad, (1, *grid[1:]), 0), close]
            else:
                rate = (len(seconds) - 1) / seconds[-1] if seconds[-1] else 1.0
                pieces += [open_, (pad, grid, (self.positions_a_second or 0) * 2 / rate), close]
        pieces.append((words(text) if self.settings.as_user else []) + end + words("\n") + start + words("assistant\n"))
        values = {"image": "pixel_values", "video": "pixel_values_videos"}
        pixels = {values[kind]: torch.cat(made) for kind, made in patches.items()}
        return *lay_out(pieces), pixels | {f"{kind}_grid_thw": torch.tensor(grid) for kind, grid in grids.items()}

    def seen_size(self, height, width):
        """[height, width] at which the model sees a picture of that size."""
        return within(height, width, self.settings.max_pixels, 2 * self.patch)


def spoken(text):
    """The end of an answer, without what its model thought aloud. Malformed for a thought that never ended."""
    if "<think>" in text.rpartition("</think>")[2]:
        raise Malformed("the answer ends within a thought; raise the server's token limit")
    return text.rpartition("</think>")[2][-20_000:]


def json_objects(text):
    """Every JSON object in a text, whatever stands around it; inner objects too."""
    decoder = json.JSONDecoder()
    for at in (m.start() for m in re.finditer(r"\{", text)):
        try:
            yield decoder.raw_decode(text, at)[0]
        except (ValueError, RecursionError):
            continue


class Asker:
    """Asks one model many questions, from several threads. Until one answer was read, questions go one at a time."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        self.alone, self.not_before = threading.Lock(), 0.0
        self.heard, self.unread = False, 0
        self.stop = None  # why nothing more is sent

    def ask(self, text, media, fps, read, schema=None, note=lambda **event: None):
        """read(what the model said). note: takes every request and answer. Raises the last problem; Barred for all."""
        tries, until = 0, time.monotonic() + self.settings.patience
        while True:
            with nullcontext() if self.heard else self.alone:
                self.pause(self.not_before)
                if self.stop:
                    raise self.stop
                note(event="sent")
                began, answer, value = time.monotonic(), None, None
                try:
                    answer = self.model.ask(text, media, fps, schema)
                    value = read(spoken(answer.text))
                    self.heard, problem = True, None
                except (TryAgain, ValueError, OSError) as error:
                    problem, answer = error, answer or getattr(error, "answer", None)
                told = {"value": value} if problem is None else {"error": str(problem)}
                told |= {"seconds": round(time.monotonic() - began, 2), **(vars(answer) if answer else {})}
                note(event="answer", ok=problem is None, perhaps_paid=getattr(problem, "paid", False), **told)
                if problem is None:
                    return value
                tries += not getattr(problem, "busy", False)
                self.pause(self.next_try(problem, tries, until))

    def next_try(self, problem, tries, until):
        """The monotonic time of the next try; raises the problem where none is worth it, or what stops them all."""
        lost, busy, wait = isinstance(problem, TryAgain), getattr(problem, "busy", False), 0.0
        if lost:
            backoff = self.settings.wait * 2 ** max(tries - 1, 0) * (1 + random.random() / 4)
            wait = backoff if problem.after is None else problem.after
        then = time.monotonic() + wait
        late, spent = lost and then > until, tries >= self.settings.tries
        self.unread += isinstance(problem, Malformed) and not self.heard
        if isinstance(problem, Barred):
            self.stop = problem
        elif self.unread >= UNREAD:
            self.stop = Barred(f"{UNREAD} answers, and none could be read ({problem}); choose another model")
        elif busy and late:
            told = f"the quota is used up for {wait:.0f} s more, beyond --set patience={self.settings.patience:g}"
            self.stop = Barred(f"{told} ({problem}); run it again later")
        elif lost and spent and not busy and not self.heard and not self.unread:
            self.stop = Barred(f"the model cannot be reached ({problem}); check --endpoint, and that it is up")
        lasting = not lost and type(problem) is not Malformed
        if self.stop or late or spent or lasting or not self.model.again:
            raise self.stop or problem
        if busy:
            self.not_before = max(self.not_before, then)  # everybody waits
        return then

    def pause(self, when):
        while not self.stop and (left := when - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def in_threads(function, items, workers):
    """Yield function(item) of each item, in order. Whoever stops early waits for no thread."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
