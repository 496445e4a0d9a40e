"""Tests of vlm.py, benchmarks/, stats.py and judge.py, against a local server that misbehaves as servers do"""

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import judge
import vlm
from conftest import BLUE, GREEN, HOUSE, RED, score, smooth_clip, tiny_local_judge
from media import read_clip, write_image, write_video
from model import KiwiEdit

fails = lambda says: pytest.raises((ValueError, SystemExit), match=says)
LONG_KEY = "secret-key-" + "k" * 400
NAMES = ["instruction_compliance", "consistency_detail", "visual_quality"]


def write_refvie(folder, count=3):
    """A benchmark in RefVIE-Bench's format with edits under the released names: sources blue, edits and refs red."""
    (folder / "edits").mkdir(parents=True)
    rows = []
    for i in range(count):
        wish = f"Replace the square by number {i}."
        write_video(folder / f"{i}_src.mp4", smooth_clip(BLUE, 8 + i), 4)
        write_image(folder / f"{i}.png", smooth_clip((220 - 40 * i, 30 + 50 * i, 30))[0])
        write_video(folder / "edits" / f"{i}_{wish[:10]}_{i}_src.mp4", smooth_clip(RED, 8 + i), 4)
        task = "background" if i == count - 1 else "subject"
        rows.append({"src_video": f"{i}_src.mp4", "instruction": wish, "ref_img": f"{i}.png", "edit_type": task})
    (folder / "bench.yaml").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def refvie_original(tmp_path_factory):
    return write_refvie(tmp_path_factory.mktemp("bench") / "refvie")


@pytest.fixture
def refvie(tmp_path, refvie_original):
    return Path(shutil.copytree(refvie_original, tmp_path / "refvie"))


def lines_of(folder, out="out"):
    lines = [json.loads(line) for line in (folder / out / "answers.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "answer" and "metrics" not in line]


def report_of(folder, out="out", name="refvie"):
    return (folder / out / f"{name}.md").read_text()


def written_in(folder):
    return b"".join(path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file())


def number_of(request):
    return int(re.search(r"number (.)", request["item"])[1])


def good_answer(request, scores=(4, 3, 2)):
    names = re.findall(r"\n(\w+):\n1: ", request["text"])
    return json.dumps({"reasoning": "as seen", **dict(zip(names, scores))})


def openai_says(content, reason="stop", tokens=9000, **more):
    return {"choices": [{"message": {"content": content}, "finish_reason": reason}],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 7}, **more}  # fmt: skip


def gemini_says(text, reason="STOP", tokens=9000):
    usage = {"promptTokenCount": tokens, "candidatesTokenCount": 2, "thoughtsTokenCount": 5}
    return {"candidates": [{"content": {"parts": [{"text": text}]}, "finishReason": reason}], "usageMetadata": usage}


class FakeJudge:
    """A server in the shapes of Gemini and OpenAI. `say(request, nth)` gives a text, a whole answer (dict), or
    ("status", code, headers, body), ("hang",), ("drop",), ("dribble",), ("raw", bytes)."""

    def __init__(self, say=lambda request, nth: good_answer(request)):
        fake, self.say, self.requests, self.lock, self.over = self, say, [], threading.Lock(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.answer(self, fake.understand(self.path, self.headers, body))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def understand(self, path, headers, body):
        gemini = path.endswith(":generateContent")
        text = body["systemInstruction"]["parts"][0]["text"] if gemini else body["messages"][0]["content"]
        parts = body["contents"][0]["parts"] if gemini else body["messages"][1]["content"]
        return {"path": path, "headers": dict(headers), "gemini": gemini, "text": text, "parts": parts, "body": body,
                "item": text.split("\n")[-1]}  # fmt: skip

    def answer(self, handler, request):
        with self.lock:
            nth = sum(r["item"] == request["item"] for r in self.requests)
            self.requests.append(request)
        said, code, extra = self.say(request, nth), 200, {}
        if isinstance(said, str):
            said = (gemini_says if request["gemini"] else openai_says)(said, tokens=len(request["text"]))
        if isinstance(said, dict):
            data = json.dumps(said).encode()
        elif said[0] == "raw":
            data = said[1]
        elif said[0] == "status":
            _, code, extra, *data = said
            data = data[0] if data else b"API key not valid. " * (code == 400) + str(request["headers"]).encode()
        else:
            if said[0] == "dribble":
                handler.send_response(200)
                handler.end_headers()
            for _ in range(200 if said[0] == "dribble" else 0):
                self.over.wait(0.02)
                handler.wfile.write(b" ")
            if said[0] == "hang":
                self.over.wait(20)
            return handler.connection.close()
        try:
            handler.send_response(code)
            for name, value in {"Content-Length": len(data), **extra}.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            handler.wfile.write(data)
            request["served"] = True
        except OSError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("text", [
    '{"reasoning": "ok", "instruction_compliance": 4, "consistency_detail": 3, "visual_quality": 2}',
    'Sure!\n```json\n{"visual_quality": 2, "consistency_detail": "3/5", "instruction_compliance": "**4**"}\n```\nDone.',
    '{"scores": {"Instruction Compliance": 4, "consistency detail": 3.0, "visual_quality": "2 out of 5"}}',
    "Seen: 2 hats.\nVisual Quality & Stability: 2\n**Instruction Compliance**: **4/5**\nConsistency & Detail: 3",
    '{"reasoning": "cut", "instruction_compliance": 4, "consistency_detail": 3, "visual_quality": 2',
    "Instruction compliance: 4 stars\nConsistency detail: 3 of 5, good\nVisual quality: 2/5 poor",
    '{"instruction_compliance": {"score": 4, "why": "x"}, "consistency_detail": {"score": "3/5"}, "visual_quality": 2}',
    "### Instruction Compliance\n**Score:** 4/5\n## 2. Consistency Detail\nScore: 3\n**Visual Quality**\nScore: 2",
])  # fmt: skip
def test_an_answer_is_read_by_its_names_whatever_stands_around_the_numbers(text):
    assert judge.read_answer(text, NAMES) == dict(zip(NAMES, (4, 3, 2)))


@pytest.mark.parametrize("text, says", [
    ('{"instruction_compliance": 6, "consistency_detail": 3, "visual_quality": 2}', "6 is not a whole number"),
    ('{"instruction_compliance": 3.5, "consistency_detail": 3, "visual_quality": 2}', "3.5 is not a whole"),
    ('{"instruction_compliance": "8/10", "consistency_detail": 3, "visual_quality": 2}', "scale"),
    ('{"instruction_compliance": true, "consistency_detail": 3, "visual_quality": 2}', "not a score"),
    ('{"instruction_compliance": 4, "consistency_detail": 3, "visual_qu', "visual_quality is missing"),
    ("Visual quality: 3\nVisual quality: 4\nInstruction compliance: 4\nConsistency detail: 1", "given twice"),
    ("Instruction compliance: 3-4\nConsistency detail: 1\nVisual quality: 1", "instruction_compliance is missing"),
    ("Instruction compliance: 2 of the hats, so 4/5\nConsistency detail: 1\nVisual quality: 1", "is missing"),
    ("Instruction compliance: 4/10 because it is late\nConsistency detail: 1\nVisual quality: 1", "scale"),
    ("Instruction compliance: 2/3 of the hats, so 4/5\nConsistency detail: 1\nVisual quality: 1", "scale"),
    ("Instruction compliance: -4\nConsistency detail: 1\nVisual quality: 1", "-4 is not"),
    ("I cannot judge this video.", "instruction_compliance is missing"), ("", "missing"),
])  # fmt: skip
def test_an_answer_without_a_possible_score_is_refused_and_never_guessed(text, says):
    with pytest.raises(vlm.Malformed, match=says):
        judge.read_answer(text, NAMES)


def test_what_a_judge_thinks_aloud_is_not_its_answer_and_a_winner_is_one():
    draft, final = (json.dumps({"quality": score, "consistency": score}) for score in (5, 1))
    thought = "Let me see. " * 2000
    for text in (draft + thought + final, f"<think>{draft}</think>\nQuality: 1\nConsistency: 1"):
        assert set(judge.read_answer(vlm.spoken(text), ("quality", "consistency")).values()) == {1}
    for text, winner in (
        ("**Winner:** 2 (sharper)", "2"),
        ('{"winner": "tie"}', "tie"),
        (f"Winner: 1. {thought} Winner: 2", "2"),
    ):
        assert judge.read_winner(vlm.spoken(text)) == {"winner": winner}
    assert judge.read_reason('<think>{"reasoning": "none"}</think>{"reasoning": "a hat"}') == "a hat"
    for text in ('{"winner": "1 or 2"}', '{"winner": "1/2"}', "winner: 1 and 2 are equal"):
        with pytest.raises(vlm.Malformed):
            judge.read_winner(text)
    parts, found = [{"text": "perhaps 5", "thought": True}, {"text": "4"}], vlm.Answer("")
    vlm.Gemini.reply(None, {"candidates": [{"content": {"parts": parts}}]}, found)
    assert found.text == "4"


@pytest.mark.parametrize("judge_, key", [("gemini-x", "GEMINI_API_KEY"), ("openai:m", "OPENAI_API_KEY")])
def test_a_judge_gets_the_media_at_an_explicit_rate_and_the_key_stays_out_of_every_file(
    refvie, monkeypatch, judge_, key
):
    monkeypatch.setenv(key, "secret-key-123")
    busy_once = lambda request, nth: ("status", 429, {"Retry-After": "0"}) if nth == 0 else good_answer(request)
    with FakeJudge(busy_once) as fake:
        score(refvie, fake, "--mode", "strict", "--controls", 0, judge_=judge_)
        request = fake.requests[-1]
    assert "secret" not in request["path"] and "secret-key-123" in str(request["headers"])
    if judge_ == "gemini-x":
        videos, config = [p for p in request["parts"] if "videoMetadata" in p], request["body"]["generationConfig"]
        assert len(videos) == 2 and all(p["videoMetadata"] == {"fps": 4.0} for p in videos)
        assert base64.b64decode(videos[1]["inlineData"]["data"]) in [
            p.read_bytes() for p in (refvie / "edits").iterdir()
        ]
        assert config["mediaResolution"] == "MEDIA_RESOLUTION_HIGH" and config["temperature"] == 0
        assert config["responseSchema"]["propertyOrdering"][0] == "reasoning"
    else:  # frames of the clips, which have 4 a second too, and the reference
        assert len([p for p in request["parts"] if p["type"] == "image_url"]) == 1 + 2 * (8 + number_of(request))
    assert b"HTTP 429" in written_in(refvie) and b"secret-key-123" not in written_in(refvie)


TROUBLES = {
    "429 storm": lambda n: ("status", 429, {}) if n < 3 else None,
    "503": lambda n: ("status", 503, {}) if n < 2 else None,
    "drop": lambda n: ("drop",) if n < 2 else None,
    "hang": lambda n: ("hang",) if n < 1 else None,
    "half an answer": lambda n: ("raw", b'{"choices": [{"mess') if n < 1 else None,
    "out of range": lambda n: good_answer({"text": "\nidentity_consistency:\n1: "}, [9]) if n < 1 else None,
    "refusal": lambda n: "I cannot help with that.",
    "another shape": lambda n: ("raw", b'{"choices": "none"}') if n < 1 else None,
    "bad request": lambda n: ("status", 413, {}),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_trouble_ends_in_the_right_score_or_in_a_report_and_nothing_is_lost(refvie, trouble):
    say = lambda request, nth: number_of(request) == 1 and TROUBLES[trouble](nth) or good_answer(request)
    lasting = {"refusal": 5, "bad request": 1}  # a refusal may be a mood, a bad request stays bad
    with FakeJudge(say) as fake:
        deadline = 0.7 if trouble == "hang" else 30
        run = lambda *more: score(refvie, fake, "--controls", 0, "--set", f"deadline={deadline}", *more)
        with fails("1 of 3 items lack a result") if trouble in lasting else nullcontext():
            run()
        if trouble in lasting:
            before = len(fake.requests)
            assert "(1 missing)" in report_of(refvie) and before == 2 + lasting[trouble]
            run("--allow-missing")
            assert {number_of(request) for request in fake.requests[before:]} == {
                1
            } and "4.00 (1 missing)" in report_of(refvie)
    assert len(lines_of(refvie)) == len(fake.requests) and all(line["ok"] or line["error"] for line in lines_of(refvie))
    assert {line["item"] for line in lines_of(refvie) if line["ok"]} >= {"0", "2"}


@pytest.mark.parametrize("how", ["hang", "dribble", "endless"])
def test_a_server_that_hangs_dribbles_or_never_ends_is_left(how):
    say = lambda request, nth: ("raw", b" " * 9_000_000) if how == "endless" else (how,)
    says, deadline = ("more than 4 MB", 30) if how == "endless" else (r"no answer within 0\.3 s", 0.3)
    began = time.monotonic()
    with FakeJudge(say) as fake, pytest.raises(vlm.TryAgain, match=says):
        vlm.post(fake.url + "/chat/completions", {}, {"messages": [{"content": "x"}, {"content": []}]}, deadline)
    assert how == "endless" or time.monotonic() - began < 3, "the dribble lasts 4 s"


@pytest.mark.parametrize("said, says, most", [
    (("status", 401, {}), "refuses the key", 1), (("status", 402, {}), "no quota is left", 1),
    (("status", 400, {}), "refuses the key", 1), (("status", 404, {}), "no such model", 1),
    (("status", 429, {}, b'{"error": {"code": "insufficient_quota"}}'), "no quota is left", 1),
    (("status", 429, {"Retry-After": "7200"}, b"{}"), "used up for 7200 s more", 1),
    (openai_says("I rate it four stars."), "10 answers, and none could be read", 10),
    (("drop",), "cannot be reached", 20),
])  # fmt: skip
def test_a_judge_that_will_not_answer_is_stopped_at_once_and_costs_no_more(refvie, monkeypatch, said, says, most):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key-9")
    with FakeJudge(lambda request, nth: said) as fake, fails(says) as stopped:
        score(refvie, fake, "--repeats", 9)
    assert (len(fake.requests) == most or most == 20 > len(fake.requests)) and "wrong-key" not in str(stopped.value)


THOUGHT = "<think>… identity consistency: 2 … temporal consistency: 1 … physical integration: 1. Wait,"


@pytest.mark.parametrize("said, judge_", [
    (openai_says(THOUGHT, "length"), "openai:m"), (openai_says(THOUGHT), "openai:m"),
    (openai_says(THOUGHT[7:], "content_filter"), "openai:m"), (gemini_says(THOUGHT[7:], "MAX_TOKENS"), "gemini-x"),
    ({"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": {"promptTokenCount": 9000, "thoughtsTokenCount": 7}},
     "gemini-x"),
])  # fmt: skip
def test_nothing_is_read_from_what_was_cut_off_and_its_tokens_are_counted(refvie, monkeypatch, capsys, said, judge_):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    with FakeJudge(lambda request, nth: said) as fake, fails("3 of 3 items lack a result"):
        score(refvie, fake, "--controls", 0, "--set", "tries=1", judge_=judge_)
    assert not any(line["ok"] for line in lines_of(refvie))
    assert "27,000 tokens in, 21 out" in capsys.readouterr().out


def test_who_answered_is_kept_and_another_endpoint_or_rate_is_asked_anew(refvie):
    parts = lambda text: [
        {"type": "reasoning", "text": "5"},
        {"type": "text", "text": text[:9]},
        {"type": "text", "text": text[9:]},
    ]
    say = lambda request, nth: openai_says(parts(good_answer(request)), model="other-7b")
    with FakeJudge(say) as fake, FakeJudge(say) as elsewhere:
        for server, more in ((fake, ()), (elsewhere, ()), (elsewhere, ("--mode", "strict")), (fake, ())):
            score(refvie, server, "--controls", 0, *more)
        assert len(fake.requests) == 3 and len(elsewhere.requests) == 6
    assert {line["model"] for line in lines_of(refvie)} == {"other-7b"}
    assert "Answered by other-7b, not by openai:m." in report_of(refvie)


def test_a_quota_costs_time_and_no_item(refvie):
    asked, lock = [], threading.Lock()

    def say(request, nth):  # 5 requests every 0.3 s, and Google's way of saying when to come back
        with lock:
            now = time.monotonic()
            if sum(now - t < 0.3 for t in asked) >= 5:
                return ("status", 429, {}, b'{"error": {"details": [{"@type": "RetryInfo", "retryDelay": "0.31s"}]}}')
            asked.append(now)
        return good_answer(request)

    with FakeJudge(say) as fake:
        score(refvie, fake, "--controls", 0, "--repeats", 12, "--set", "tries=1")
    assert len([line for line in lines_of(refvie) if line["ok"]]) == 36
    later = formatdate(time.time() + 90, usegmt=True)
    told = [
        vlm.seconds_to_wait(*words)
        for words in (("1.5", ""), (later, ""), ("", '"retryDelay": "34.07s"'), ("soon", ""))
    ]
    assert told[0] == 1.5 and told[1] == pytest.approx(90, abs=3) and told[2] == 34.07 and told[3] is None


def test_what_a_server_refuses_to_be_told_is_left_out(refvie):
    def say(request, nth):
        name = next((name for name in ("temperature", "response_format") if name in request["body"]), None)
        return ("status", 400, {}, f"unsupported parameter: {name}".encode()) if name else good_answer(request)

    with FakeJudge(say) as fake:
        score(refvie, fake, "--controls", 0)
        assert len(fake.requests) == 3 + 2 and len(lines_of(refvie)) == 3


@pytest.mark.parametrize("say, seen", [
    (lambda request, nth: openai_says(good_answer(request).replace("as seen", LONG_KEY), model=LONG_KEY), b"***"),
    (lambda request, nth: ("status", 413, {}), b"HTTP 413"),
])  # fmt: skip
def test_a_key_that_a_server_repeats_reaches_no_file(refvie, monkeypatch, say, seen):
    monkeypatch.setenv("OPENAI_API_KEY", LONG_KEY)
    with FakeJudge(say) as fake:
        score(refvie, fake, "--controls", 0, "--allow-missing")
    assert seen in written_in(refvie) and b"kkkk" not in written_in(refvie)


@pytest.mark.parametrize("url, says", [
    ("http://example.com/v1", "https only"), ("https://me:p@host/v1", "no user, password or query"),
    ("https://host/v1?key=s3cret", "no user, password or query"),
])  # fmt: skip
def test_a_key_goes_to_no_open_address_and_to_no_other_host(refvie, monkeypatch, url, says):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-123")
    with fails(says):
        score(refvie, SimpleNamespace(url=url), judge_="gemini-x")
    with FakeJudge() as other, FakeJudge(lambda request, nth: ("status", 302, {"Location": other.url})) as fake:
        with fails("3 of 3 items lack a result"):
            score(refvie, fake, "--controls", 0)
        assert len(fake.requests) == 3 and not other.requests


def test_a_refusal_of_one_request_is_no_refusal_of_the_key():
    fake = FakeJudge(lambda request, nth: ("status", 403, {}))
    body = {"messages": [{"content": "Judge."}, {"content": []}]}
    for trusted, error in ((False, vlm.Barred), (True, vlm.Unusable)):
        with pytest.raises(error, match="HTTP 403"):
            vlm.post(f"{fake.url}/chat/completions", {}, body, 10, trusted=trusted)


def test_a_judge_that_was_not_shown_the_videos_is_found_out(refvie):
    with (
        FakeJudge(lambda request, nth: openai_says(good_answer(request), tokens=20)) as fake,
        pytest.raises((ValueError, SystemExit)),
    ):
        score(refvie, fake, "--controls", 0, "--set", "tries=1")
    assert all("dropped the videos" in line["error"] for line in lines_of(refvie))


def test_frames_are_decoded_once_for_all_questions(refvie, monkeypatch):
    decoded = []
    monkeypatch.setattr(vlm, "decode", lambda path, *rest, true=vlm.decode: decoded.append(path) or true(path, *rest))
    with FakeJudge() as fake:
        score(refvie, fake, "--controls", 0, "--repeats", 3)
    assert len(decoded) == len(set(decoded)) == 6


def test_a_dry_run_names_the_price_and_asks_and_measures_nothing(refvie, capsys):
    with FakeJudge() as fake:
        score(refvie, fake, "--dry-run", "--price", 2, 10, "--limit", 2, "--controls", 0)
        score(refvie, fake, "--dry-run", judge_="gemini-x")  # needs no key
    said = capsys.readouterr().out
    assert not fake.requests and "2 of 2 questions to ask" in said and "$" in said and "21 of 21 questions" in said
    assert not (refvie / "out" / "media").exists() and not (refvie / "out" / "controls").exists()


def test_two_runs_never_share_a_folder_and_a_broken_line_is_put_aside(tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text('{}\nnull\n{"event": "answer"}\n{"event": "sent", "key": "k"}\n{"ev')
    held = judge.Ledger(tmp_path / "answers.jsonl")
    assert "4 broken line(s)" in capsys.readouterr().err and held.lines == [{"event": "sent", "key": "k"}]
    with pytest.raises(ValueError, match="another judge.py"):
        judge.Ledger(tmp_path / "answers.jsonl")
    held.close()


def test_a_question_that_waits_is_not_sent_when_the_run_stops():
    asker = vlm.Asker(None, vlm.Settings())  # no model: sending would fail
    asker.not_before = time.monotonic() + 20
    threading.Timer(0.1, setattr, (asker, "stop", vlm.Barred("no such key"))).start()
    with pytest.raises(vlm.Barred, match="no such key"):
        asker.ask("", [], 1.0, str)
    assert time.monotonic() < asker.not_before - 10


def start(refvie, fake, *more):
    words = [
        "score",
        "--bench",
        "refvie",
        "bench.yaml",
        "--edits",
        "edits",
        "--judge",
        "openai:m",
        "--endpoint",
        fake.url,
    ]
    return subprocess.Popen([sys.executable, HOUSE / "judge.py", *words, "--out", "out", *more], cwd=refvie, text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)  # fmt: skip


def wait_for(test, seconds=90):
    until = time.monotonic() + seconds
    while not test() and time.monotonic() < until:
        time.sleep(0.05)


def test_after_kill_9_a_rerun_pays_for_no_item_twice(refvie):
    served = threading.Event()
    done = lambda: sum(r.get("served", False) for r in fake.requests)
    with FakeJudge(
        lambda request, nth: ("hang",) if done() >= 3 and not served.is_set() else good_answer(request)
    ) as fake:
        more = ("--repeats", "3", "--controls", "0", "--set", "concurrency=1")
        process, path = start(refvie, fake, *more), refvie / "out" / "answers.jsonl"
        wait_for(lambda: path.exists() and path.read_text().count('"value"') >= 3 and len(fake.requests) >= 4)
        process.kill()
        process.communicate()
        served.set()
        with path.open("ab") as file:  # as a crash in the middle of a character leaves it
            file.write('{"event": "answer", "ok": true, "key": "é'.encode()[:-1])
        score(refvie, fake, *more)
        assert done() == 9
    lines = [line for line in path.read_text(errors="replace").splitlines() if '"value"' in line]
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 9
    assert "1 cut off, 0 timed out (perhaps paid)" in report_of(refvie)


def test_ctrl_c_ends_the_run_within_two_seconds(refvie):
    with FakeJudge(lambda request, nth: ("hang",)) as fake:
        process = start(refvie, fake)
        wait_for(lambda: fake.requests)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert "interrupted; run the same command again" in process.communicate(timeout=20)[1]
        assert time.monotonic() - began < 2 and process.returncode == 1


def test_answers_that_are_no_plain_text_are_paid_once(refvie):
    odd = '"reasoning": "a line\u2028and \\ud83d half an emoji, \u00e9", '
    with FakeJudge(lambda request, nth: good_answer(request).replace("{", "{" + odd, 1)) as fake:
        for _ in range(2):
            score(refvie, fake, "--controls", 0)
        assert len(fake.requests) == 3 and "\u2028" in lines_of(refvie)[-1]["raw"]


def test_the_hierarchy_is_enforced_in_code_and_its_breaches_are_counted(refvie):
    with FakeJudge(lambda request, nth: good_answer(request, (2, 5, 1))) as fake:
        score(refvie, fake, "--controls", 0)
    assert "broke the hierarchy in 3 of 3 answers" in report_of(refvie)
    assert "| the same, uncapped | 2.00 (2.00, 2.00) | 5.00 (5.00, 5.00) |" in report_of(refvie)
    assert [line["value"].popitem()[1] for line in lines_of(refvie)] == [1] * 3  # the raw answers stay as they were
    assert (refvie / "out" / "refvie.csv").read_text().splitlines()[1].split(",")[3:6] == ["2.0000", "2.0000", "1.0000"]


def seeing(refvie):
    """A judge with eyes: it knows the copy, the wrong reference and damaged edits by their bytes."""

    def say(request, nth):
        ref, source, edit = [base64.b64decode(p["inlineData"]["data"]) for p in request["parts"] if "inlineData" in p]
        if edit == source or ref != (refvie / f"{number_of(request)}.png").read_bytes():
            return good_answer(request, (1, 1, 1))
        whole = edit in [path.read_bytes() for path in (refvie / "edits").iterdir()]
        return good_answer(request, (5, 5, 5) if whole else (3, 1, 1))

    return say


def test_known_answers_hold_for_a_judge_with_eyes_and_a_blind_one_ends_with_exit_3(refvie, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    always = lambda n: lambda request, nth: good_answer(request, (n, n, n))
    for out, say, held in (("seeing", seeing(refvie), 2), ("blind", always(5), 0)):
        with FakeJudge(say) as fake, pytest.raises((ValueError, SystemExit)) if not held else nullcontext() as stopped:
            score(refvie, fake, "--controls", 2, judge_="gemini-x", out=out)
        text = report_of(refvie, out)
        table = text[text.index("## Known answers, judge") : text.index("## Metrics")]
        assert re.findall(r"\| (\d) \| (\d) \|", table) == [(str(held), "2")] * 6
        assert (
            "failed 0 of 12 known answers" if held else "Do not trust these scores: gemini-x failed 12 of 12"
        ) in text
        assert ("Runway Aleph, published (Gemini-3-Flash; other model, prompts, items: compare ranks)" in text) == bool(
            held
        )
        assert held or stopped.value.code == 3
    with FakeJudge(always(1)) as fake:
        score(refvie, fake, "--controls", 2, judge_="gemini-x", out="strict")
    table = report_of(refvie, "strict")  # what has 1 already cannot fall: neither held nor failed
    assert re.findall(r"scores? lower .*\| (\d) \| (\d) \| (\d) \| (\d) \|", table) == [("0", "0", "2", "0")] * 5


def test_correlations_and_intervals_are_right_on_numbers_done_by_hand():
    assert judge.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert judge.spearman([1, 1, 1], [1, 2, 3]) is None
    assert judge.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert judge.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)
    assert judge.pairwise([1, 2, 3], [1, 3, 2]) == pytest.approx(2 / 3) and judge.pairwise([1, 1], [1, 2]) is None
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean = judge.mean_of([list(values)])
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert judge.mean_of([[1.0, 1.0], [3.0, 3.0]]).value == 2  # tasks weigh the same
    assert judge.mean_of([[1.0, 2.0]], missing=1, allow_missing=False).value is None
    assert str(judge.mean_of([[1.0, 2.0, 3.0]])) == "2.00 (1.00, 2.00, 3.00)"  # too few for an interval
    assert judge.wilson(1.0, 3) == pytest.approx((0.4385, 1.0), abs=1e-3)
    assert judge.sign_test(3, 0) == 0.25 and judge.sign_test(5, 5) == 1 and judge.sign_test(10, 0) == 2 / 1024


def test_an_item_s_average_is_over_its_criteria_and_the_overall_over_the_tasks():
    bench, rows = judge.open_bench("refvie"), []
    for key, task, scores in [("0", "subject", (5, 4, 3)), ("1", "subject", (3, 1, 2)), ("2", "background", (2, 1, 0))]:
        answer = dict(zip(bench.criteria(task), scores))
        rows.append(judge.Row(judge.Item(key, task, "x", None, None), answers=[answer]))
    means, overall = judge.score_means(bench, rows, False)
    assert means["subject"]["average"].value == 3 and overall.value == 2


def test_an_answer_missing_among_repeats_is_missing_and_no_mean_is_given(refvie):
    say = lambda request, nth: "No." if number_of(request) == 1 and nth else good_answer(request)
    with FakeJudge(say) as fake:
        run = lambda *more: score(refvie, fake, "--controls", 0, "--repeats", 2, "--set", "tries=1", *more)
        with fails("1 of 3 items lack a result"):
            run()
        assert "## Missing" in report_of(refvie)
        run("--allow-missing")
        assert "4.00 (4.00, 4.00) (1 missing)" in report_of(refvie)


def test_repeats_give_a_spread_and_people_s_scores_agreement_per_task_and_among_raters(refvie):
    (refvie / "people.csv").write_text("item,rater,q\n0,x,1\n1,x,3\n2,x,5\n0,y,2\n1,y,5\n2,y,4\n")
    say = lambda request, nth: good_answer(request, [number_of(request) + 1 + nth % 2] * 3)
    with FakeJudge(say) as fake:
        score(refvie, fake, "--repeats", 2, "--controls", 0, "--human", refvie / "people.csv")
    text = report_of(refvie)
    assert "mean over items: 0.71" in text and "| q | raters among themselves | all |  |  |  | 0.67 |" in text
    assert "| q | mean score | all | 3 | 1.00 | 1.00 | 1.00 |" in text or "| q | mean score | all | 3 | 0.8" in text
    assert "| q | mean score | subject | 2 | – | – | 1.00 |" in text


@pytest.mark.parametrize("text, says", [
    ("item,q\n0,nan\n", "not a number"), ("item,q\n0,1,2\n", "more fields"), ('item,q\n0,1\n"1,3\n2,5\n', "people.csv"),
    ("item,q\nx,1\n", "none of its items"),
])  # fmt: skip
def test_human_scores_are_read_before_the_judge_is_paid(refvie, text, says):
    (refvie / "people.csv").write_text(text)
    with FakeJudge() as fake, fails(says):
        score(refvie, fake, "--human", refvie / "people.csv")
    assert not fake.requests


@pytest.mark.parametrize("taste, expected", [
    ("first", "| all | 0 | 0 | 3 | 3 | 3 | 0.500 [0.125, 0.875] | 1.000 |"),
    ("red", "| all | 3 | 0 | 0 | 0 | 3 | 1.000 [0.438, 1.000] | 0.250 |"),
])  # fmt: skip
def test_a_win_counts_in_both_orders_only_and_one_that_follows_the_position_ends_with_exit_3(
    refvie, monkeypatch, taste, expected
):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    (refvie / "other").mkdir()
    for path in (refvie / "edits").iterdir():
        write_video(refvie / "other" / path.name, smooth_clip(GREEN, len(read_clip(path).frames)), 4)

    def say(request, nth):
        videos = [base64.b64decode(p["inlineData"]["data"]) for p in request["parts"] if "videoMetadata" in p]
        red = [path.read_bytes() for path in (refvie / "edits").iterdir()]
        return json.dumps({"winner": "1" if taste == "first" or videos[1] in red else "2"})

    words = ["compare", "--bench", "refvie", *map(str, (refvie / "bench.yaml", refvie / "edits", refvie / "other")),
             "--out", str(refvie / "out")]  # fmt: skip
    with FakeJudge(say) as fake, fails("3") if taste == "first" else nullcontext():
        judge.main([*words, "--judge", "gemini-x", "--endpoint", fake.url])
    assert expected in report_of(refvie, name="refvie_compare")
    next((refvie / "other").iterdir()).unlink()
    with fails("1 of 3 items lack a result"):
        judge.main(words)
    text = report_of(refvie, name="refvie_compare")
    assert "| edit_strength |  | – (1 missing) |" in text and "missing: " in text[text.index("## Missing") :]


def test_a_missing_and_a_broken_edit_are_counted_and_shown(refvie):
    edits = sorted((refvie / "edits").iterdir())
    (refvie / "1.png").write_bytes(b"no picture")
    edits[0].unlink()
    edits[1].write_bytes(edits[1].read_bytes()[:100])
    with fails("2 of 3 items lack a result"):
        score(refvie, SimpleNamespace(url="https://me:p%40ss@host/v1?key=s3cret"), judge_="metrics")
    text, page = report_of(refvie), (refvie / "out" / "refvie.html").read_text()
    assert "p%40ss" not in text + page and "s3cret" not in text + page
    assert "missing: " in text and "unreadable: " in text and "| background (1 of 1) |" in text
    assert "| subject (0 of 2) |" in text and "| edit_strength |  | – | " in text
    assert page.index("missing: ") < page.index("What the metrics are")
    for found in re.findall(r'(?:src|href|poster)="([^"]+)"', page):
        assert (refvie / "out" / found).is_file() and "://" not in found


def test_a_folder_of_edits_that_is_not_there_replaces_no_report(refvie, tmp_path):
    names = ("refvie.md", "refvie_compare.md")
    for name in names:
        (tmp_path / name).write_text("good")
    bench, out = ["--bench", "refvie", str(refvie / "bench.yaml")], ["--judge", "metrics", "--out", str(tmp_path)]
    for words in (["score", *bench, "--edits", "nope", *out], ["compare", *bench, str(refvie / "edits"), "nope", *out]):
        with fails("nope: no such folder of edits"):
            judge.main(words)
    assert [(tmp_path / name).read_text() for name in names] == ["good", "good"]


def test_benchmarks_are_read_in_their_own_formats_and_lead_nowhere_else(tmp_path, capsys):
    rows = "original_video,prompt,edited_type\nvideos/a.mp4,Add a hat.,local_add\nvideos/b.mp4,Zoom in.,camera_edit\n"
    table, read = tmp_path / "b.csv", lambda name="openve": judge.read_bench(judge.open_bench(name), tmp_path / "b.csv", "edits")
    table.write_text(rows)
    (item,) = read()
    assert (item.edit, item.task, item.source) == (
        Path("edits/a_edited.mp4").absolute(),
        "local_add",
        tmp_path / "videos/a.mp4",
    )
    (tmp_path / "i.json").write_text('{"12": {"id": "animal/7.jpg", "prompt": "Add a hat.", "edit_type": "add"}}')
    assert judge.read_bench(judge.open_bench("imgedit"), tmp_path / "i.json", "edits")[0].edit == Path("edits/add/127.jpg").absolute()
    table.write_text(rows.replace("videos/a", f"{tmp_path.name}/videos/a"))  # as published
    (tmp_path / "videos").mkdir()
    (tmp_path / "blob").touch()
    (tmp_path / "videos/a.mp4").symlink_to("../blob")  # as the hub's cache has it
    assert read()[0].source == tmp_path / "videos/a.mp4"
    table.write_text(rows.replace("b.mp4,Zoom in.,camera_edit", "a.mp4,Zoom in.,local_add"))
    assert len(read()) == 2 and "share the edit a_edited.mp4" in capsys.readouterr().err
    table.write_text(rows.replace("videos/a", "../a"))
    with pytest.raises(ValueError, match="is outside of"):
        read()
    with pytest.raises(ValueError, match="right"):
        judge.read_bench(judge.open_bench("refvie"), tmp_path / "i.json", "edits")
    table.write_text("original_video,prompt,edited_type\nsource_videos/a.mp4,Night.,time\n")
    assert read("sparkle")[0].edit == Path("edits/time/a_edited.mp4").absolute()
    (tmp_path / "time" / "night---sky").mkdir(parents=True)
    (tmp_path / "time" / "night---sky" / "a_edited.mp4").touch()
    assert judge.read_bench(judge.open_bench("sparkle"), table, tmp_path)[0].edit.parent.name == "night---sky"


BENCH = """
title: Mine
columns: {source: clip, instruction: wish, task: kind}
edit: "{key}.mp4"
tasks:
  zoom:
    grade: a change of the camera
    criteria: {compliance: [none, little, half, most, all], quality: [bad, poor, fair, good, best]}
items:
  - {clip: 0_src.mp4, wish: Zoom in., kind: zoom}
published: {judge: Someone, model: "openai:m", prompts: mine, items: 1, rows: {Their model: {overall: 3.5}}}
"""


def test_a_benchmark_of_one_s_own_is_a_yaml_file_and_its_prompts_another(refvie):
    mine, prompts = refvie / "mine.yaml", refvie / "prompts.yaml"
    mine.write_text(BENCH)
    prompts.write_text('name: mine\nzoom: "Grade {instruction} Lines: Compliance: n, Quality: n"')
    shutil.copy(next((refvie / "edits").iterdir()), refvie / "edits" / "0.mp4")
    said = ('{"compliance": 4, "quality": 5}', "Compliance: 4\nQuality: 5")
    with FakeJudge(lambda request, nth: said["Lines" in request["text"]]) as fake:
        words = ["score", "--bench", mine, mine, "--edits", refvie / "edits", "--judge", "openai:m", "--endpoint",
                 fake.url, "--controls", 0, "--out", refvie / "out"]  # fmt: skip
        judge.main([str(word) for word in words])
        text = report_of(refvie, name="mine")
        assert "| edits | 4.00 | 4.00 |" in text and "| the same, uncapped | 4.50 | 4.50 |" in text
        assert "| Their model, published (Someone; other prompts: compare ranks) | – | 3.50 |" in text
        assert "1: none" in fake.requests[0]["text"] and "response_format" in fake.requests[0]["body"]
        judge.main([str(word) for word in [*words, "--prompts", prompts]])
        assert "Grade Zoom in. Lines" in fake.requests[1]["text"] and "response_format" not in fake.requests[1]["body"]
    assert "published (Someone; comparable)" in report_of(refvie, name="mine")


def test_a_leaderboard_marks_runs_that_were_asked_otherwise(refvie, capsys):
    with FakeJudge() as fake:
        score(refvie, fake, "--controls", 0, out="a")
        score(refvie, fake, "--controls", 0, "--mode", "strict", "--name", "b", out="b")
    capsys.readouterr()
    judge.main(["leaderboard", str(refvie / "a"), str(refvie / "b")])
    said = capsys.readouterr().out
    assert "| edits | openai:m | 3 | 3.00" in said and "| b | openai:m | 3 | 3.00" in said
    assert "other asked than the first" in said


def test_a_wrong_reference_is_another_one_of_the_same_task_first():
    told = [("subject", "vae.py"), ("background", "dit.py"), ("subject", "vae.py"), ("subject", "data.py")]
    items = [judge.Item(str(i), task, "x", None, None, HOUSE / ref) for i, (task, ref) in enumerate(told)]
    assert [path.name for path in judge.wrong_references(items, items[0])] == ["data.py", "dit.py"]


def test_every_flag_of_judge_is_read():
    text = (HOUSE / "judge.py").read_text()
    flags = re.findall(r'add\(\s*"--([\w-]+)"', text)
    assert len(flags) > 25 and all(f"args.{flag.replace('-', '_')}" in text for flag in flags)


def test_run_makes_the_edits_under_the_released_names_each_once_and_in_shards(
    refvie, small_weights, monkeypatch, capsys
):
    arguments = ["run", "--bench", "refvie", str(refvie / "bench.yaml"), "--weights", str(small_weights), "--edits",
                 str(refvie / "new"), "--steps", "1", "--device", "cpu"]  # fmt: skip
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        judge.main(arguments)
    made = sorted((refvie / "new").glob("*.mp4"))
    assert [path.name for path in made] == sorted(path.name for path in (refvie / "edits").iterdir())
    with av.open(str(made[0])) as small:
        assert small.streams.video[0].pix_fmt == "yuv444p"  # so that the metrics see the model and not the codec
    judge.main(arguments)
    assert "0 of 1 edits to make" in capsys.readouterr().out
    monkeypatch.delenv("RANK")  # and WORLD_SIZE alone is not torchrun's
    judge.main([*arguments, "--edits", str(refvie / "plain"), "--no-ref"])
    assert len(list((refvie / "plain").glob("*.mp4"))) == len(made)
    assert not torch.equal(read_clip(refvie / "plain" / made[0].name).frames, read_clip(made[0]).frames)
    rows = "original_video,prompt,edited_type\n" + "".join(f"{made[0].name},Add a hat{end},local_add\n" for end in ".!")
    (refvie / "new" / "twice.csv").write_text(rows)
    twice = [*arguments, "--edits", str(refvie / "twice")]
    twice[2:4] = "openve", str(refvie / "new" / "twice.csv")
    for _ in range(2):
        judge.main(twice)
    said = capsys.readouterr()
    assert said.out.count("_edited.mp4") == 1 and "of the first" in said.err


def test_edits_of_other_weights_or_settings_are_not_mixed(refvie, small_weights):
    other = Path(shutil.copytree(small_weights, refvie / "weights"))
    arguments = ["run", "--bench", "refvie", str(refvie / "bench.yaml"), "--weights", str(other), "--edits",
                 str(refvie / "new"), "--steps", "1", "--device", "cpu", "--limit", "1"]  # fmt: skip
    judge.main(arguments)
    for more, says in ((["--seed", "1"], "seed 0, not 1"), (["--ref-guidance", "1.5"], "ref_guidance 1.0, not 1.5")):
        with fails(f"edits are there of {says}; give another --edits"):
            judge.main([*arguments, *more])
    with fails("--device cuda:9: not available here"):
        judge.main([*arguments, "--device", "cuda:9"])
    dit = load_file(other / "dit.safetensors")
    save_file({name: tensor + 1 for name, tensor in dit.items()}, other / "dit.safetensors")
    with fails("edits are there of files .*; give another --edits"):
        judge.main(arguments)  # the same folder, with other weights in it
    (refvie / "new" / "run.json").unlink()
    with fails("edits without .*run.json; use an empty --edits"):
        judge.main(arguments)


def test_run_edits_the_benchmark_with_the_seed_and_guidance_asked_for(refvie, small_weights, monkeypatch):
    asked = []

    def edit(self, frames, *rest, **more):
        asked.append((len(frames), more["seed"], more["ref_guidance"]))
        return frames

    monkeypatch.setattr(KiwiEdit, "edit", edit)
    words = ["run", "--bench", "refvie", refvie / "bench.yaml", "--weights", small_weights, "--edits", refvie / "new"]
    judge.main([str(word) for word in (*words, "--seed", 7, "--ref-guidance", 2, "--limit", 1, "--device", "cpu")])
    assert asked == [(5, 7, 2)]


@pytest.mark.parametrize("fps, expected", [(1, [0, 1, 2, 3]), (4, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]), (99, 28)])
def test_frames_for_a_judge_stand_where_its_frame_rate_says(tmp_path, fps, expected):
    write_video(tmp_path / "v.mp4", smooth_clip(BLUE, 28, 32), 8)
    frames, seconds = vlm.sampled_frames(tmp_path / "v.mp4", fps)
    assert len(frames) == len(seconds) == (28 if fps == 99 else len(expected) if fps == 1 else 14)
    assert fps == 99 or seconds[: len(expected)] == expected


def test_frames_closer_than_a_position_share_it():
    _, positions = vlm.lay_out([[1, 2], (7, (4, 2, 2), 0.5)])
    assert positions[0, 0].tolist() == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_local_judge_numbers_and_generates_as_transformers_does(tmp_path, kind):
    write_image(tmp_path / "ref.png", smooth_clip(RED)[0])
    write_video(tmp_path / "v.mp4", smooth_clip(BLUE), 4)
    folder = tiny_local_judge(tmp_path / "judge", kind)
    ours = vlm.Local(folder, vlm.Settings(max_tokens=8, device="cpu"))
    media = [("Reference image", tmp_path / "ref.png"), ("Edited video", tmp_path / "v.mp4")]
    ids, positions, pixels = ours.prepare("Judge it.", media, 4.0)
    frames = vlm.sampled_frames(tmp_path / "v.mp4", 4.0)[0]
    seen = pixels["pixel_values_videos"].reshape(4, 2, 2, 2, 2, 3, 2, ours.patch, ours.patch)
    seen = seen.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(8, 4 * ours.patch, 4 * ours.patch, 3)
    seen = seen * torch.tensor(ours.std) + torch.tensor(ours.mean)
    small = F.interpolate(frames.permute(0, 3, 1, 2).float(), seen.shape[1:3]).permute(0, 2, 3, 1)
    assert (seen * 255 - small).abs().mean() < 6
    kinds = torch.zeros_like(ids)
    kinds[ids == ours.token("<|image_pad|>")], kinds[ids == ours.token("<|video_pad|>")] = 1, 2
    try:
        said = ours.ask("Judge it.", media, 4.0)
    except vlm.Malformed as cut:  # at 8 tokens: no answer, and paid for all the same
        said = cut.answer
        assert "cut off after 8 tokens" in str(cut) and said.tokens_out == 8
    assert said.tokens_in == ids.shape[1]
    if kind == "qwen3_vl":  # transformers numbers what follows a Qwen2.5-VL video otherwise (FACTS.md)
        theirs = ours.mllm.model.get_rope_index(ids, kinds, pixels["image_grid_thw"], pixels["video_grid_thw"])[0]
        assert torch.equal(positions, theirs)
        expected = ours.mllm.generate(ids, mm_token_type_ids=kinds, **pixels, max_new_tokens=8, do_sample=False)
        ends = (ours.token("<|im_end|>"), ours.token("<|endoftext|>"))
        assert said.text == ours.tokenizer.decode([t for t in expected[0, ids.shape[1] :].tolist() if t not in ends])
    else:  # 2 positions a second, 4 frames a second, 2 a step
        video = positions[0, 0][kinds[0] == 2]
        assert video.unique().diff().tolist() == [1] * (pixels["video_grid_thw"][0, 0].item() - 1)
