"""Tests of vlm.py, benchmarks/, stats.py and judge.py, against a local server that misbehaves as servers do"""

import base64
import contextlib
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import benchmarks
import command
import judge
import stats
import vlm
from conftest import BLUE, GREEN, HOUSE, RED, score, smooth_clip, tiny_local_judge
from connectors import lay_out
from ledger import appended
from media import open_media, read_clip, write_image, write_video
from model import KiwiEdit

fails = lambda says: pytest.raises((ValueError, SystemExit), match=says)
go = lambda *words: judge.main(list(map(str, words)))
KEY = "secret-key-" + "k" * 400
NAMES = ["instruction_compliance", "consistency_detail", "visual_quality"]


@pytest.fixture(scope="session")
def refvie_original(tmp_path_factory):
    """A benchmark in RefVIE-Bench's format with edits under the released names: sources blue, edits and refs red."""
    folder, rows = tmp_path_factory.mktemp("bench") / "refvie", []
    (folder / "edits").mkdir(parents=True)
    for i in range(3):
        wish = f"Replace the square by number {i}."
        write_video(folder / f"{i}_src.mp4", smooth_clip(BLUE, 8 + i), 4)
        write_image(folder / f"{i}.png", smooth_clip((220 - 40 * i, 30 + 50 * i, 30))[0])
        write_video(folder / "edits" / f"{i}_{wish[:10]}_{i}_src.mp4", smooth_clip(RED, 8 + i), 4)
        task = "background" if i == 2 else "subject"
        rows.append({"src_video": f"{i}_src.mp4", "instruction": wish, "ref_img": f"{i}.png", "edit_type": task})
    (folder / "bench.yaml").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def refvie(tmp_path, refvie_original, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return Path(shutil.copytree(refvie_original, tmp_path / "refvie"))


def answers_of(folder):
    lines = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    return [line for line in lines if "value" in line]


def report_of(folder, out="out", name="refvie"):
    return (folder / out / f"{name}.md").read_text()


def number_of(request):
    return int(re.search(r"number (.)", request["text"])[1])


def good_answer(request, scores=(4, 3, 2)):
    names = re.findall(r"\n(\w+):\n1: ", request["text"])
    return json.dumps({"reasoning": "as seen", **dict(zip(names, scores))})


def openai_says(content, reason="stop", tokens=9000, **more):
    usage = {"prompt_tokens": tokens, "completion_tokens": 7}
    return {"choices": [{"message": {"content": content}, "finish_reason": reason}], "usage": usage, **more}


def gemini_says(text, reason="STOP", tokens=9000):
    usage = {"promptTokenCount": tokens, "candidatesTokenCount": 2, "thoughtsTokenCount": 5}
    return {"candidates": [{"content": {"parts": [{"text": text}]}, "finishReason": reason}], "usageMetadata": usage}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        fake, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        gemini = self.path.endswith(":generateContent")
        text = body["systemInstruction"]["parts"][0]["text"] if gemini else body["messages"][0]["content"]
        parts = body["contents"][0]["parts"] if gemini else body["messages"][1]["content"]
        request = {"headers": dict(self.headers), "text": text, "parts": parts, "body": body}
        with fake.lock:
            nth = sum(r["text"] == text for r in fake.requests)
            fake.requests.append(request)
        said = fake.say(request, nth)
        if said in ("hang", "drop", "dribble"):
            if said == "dribble":
                self.send_response(200)
                self.end_headers()
            while said != "drop" and not fake.over.wait(0.02):
                self.wfile.write(b" " * (said == "dribble"))
            return self.connection.close()
        if isinstance(said, str):
            said = (gemini_says if gemini else openai_says)(said, tokens=len(text))
        code, headers, data = said if isinstance(said, tuple) else (200, {}, said)
        self.send_response(code)
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
        request["served"] = True

    def log_message(self, *_):
        pass


class FakeJudge(ThreadingHTTPServer):
    """A server in the shapes of Gemini and OpenAI. `say(request, nth)` gives a text, a whole answer (dict or bytes),
    (status, headers, body), "hang", "drop" or "dribble"."""

    def __init__(self, say=lambda request, nth: good_answer(request)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.requests, self.lock, self.over = say, [], threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):  # whoever hung up
        pass

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()


ALL_BUT_FIRST = "\nConsistency detail: 1\nVisual quality: 1"


@pytest.mark.parametrize("text, says", [
    ('{"reasoning": "ok", "instruction_compliance": 4, "consistency_detail": 3, "visual_quality": 2}', ""),
    ('```json\n{"visual_quality": 2, "consistency_detail": "3/5", "instruction_compliance": "**4**"}\n```', ""),
    ('{"scores": {"Instruction Compliance": 4, "consistency detail": 3.0, "visual_quality": "2 out of 5"}}', ""),
    ("Seen: 2 hats.\nVisual Quality & Stability: 2\n**Instruction Compliance**: **4/5**\nConsistency & Detail: 3", ""),
    ('{"reasoning": "cut", "instruction_compliance": 4, "consistency_detail": 3, "visual_quality": 2', ""),
    ("Instruction compliance: 4 stars\nConsistency detail: 3 of 5, good\nVisual quality: 2/5 poor", ""),
    ('{"instruction_compliance": {"score": 4}, "consistency_detail": {"score": "3/5"}, "visual_quality": 2}', ""),
    ("### Instruction Compliance\n**Score:** 4/5\n## 2. Consistency Detail\n\nScore: 3\nVisual Quality\nScore: 2", ""),
    ('{"instruction_compliance": 6, "consistency_detail": 3, "visual_quality": 2}', "6 is not a whole"),
    ('{"instruction_compliance": 3.5, "consistency_detail": 3, "visual_quality": 2}', "3.5 is not a whole"),
    ('{"instruction_compliance": "8/10", "consistency_detail": 3, "visual_quality": 2}', "8/10. is not a whole"),
    ('{"instruction_compliance": true, "consistency_detail": 3, "visual_quality": 2}', "True is not a whole"),
    ('{"instruction_compliance": 4, "consistency_detail": 3, "visual_qu', "visual_quality is missing"),
    ("Visual quality: 3\nVisual quality: 4\nInstruction compliance: 4\nConsistency detail: 1", "given twice"),
    (f"Instruction compliance: 3-4{ALL_BUT_FIRST}", "instruction_compliance is missing"),
    (f"Instruction compliance: 2 of the hats, so 4/5{ALL_BUT_FIRST}", "instruction_compliance is missing"),
    (f"Instruction compliance: 2/3 of the hats, so 4/5{ALL_BUT_FIRST}", "2/3. is not a"),
    (f"Instruction compliance: -4{ALL_BUT_FIRST}", "-4. is not a whole"),
    (f"# Instruction compliance\nScore: 4\nScore: 3{ALL_BUT_FIRST}", "instruction_compliance is given twice"),
    ("Instruction compliance\n" + "\n" * 9000, "is missing"),
    ("### Instruction compliance\nFine.\n### Consistency detail\nScore: 3\n## Visual quality\nScore: 2", "is missing"),
])  # fmt: skip
def test_an_answer_is_read_by_its_names_and_without_a_possible_score_never_guessed(text, says):
    began = time.process_time()
    with pytest.raises(vlm.Malformed, match=says) if says else contextlib.nullcontext():
        assert benchmarks.read_answer(text, NAMES) == dict(zip(NAMES, (4, 3, 2)))
    assert time.process_time() - began < 0.5


def test_what_a_judge_thinks_aloud_is_not_its_answer_and_a_winner_is_one():
    draft, final = (json.dumps({"quality": score, "consistency": score}) for score in (5, 1))
    thought = "Let me see. " * 2000
    for text in (draft + thought + final, f"<think>{draft}</think>\nQuality: 1\nConsistency: 1"):
        assert set(benchmarks.read_answer(vlm.spoken(text), ("quality", "consistency")).values()) == {1}
    told = {"**Winner:** 2 (sharper)": "2", '{"winner": "tie"}': "tie", f"Winner: 1. {thought} Winner: 2": "2"}
    assert [benchmarks.read_winner(vlm.spoken(text))["winner"] for text in told] == list(told.values())
    for text in ('{"winner": "1 or 2"}', '{"winner": "1/2"}', "winner: 1 and 2 are equal"):
        with pytest.raises(vlm.Malformed):
            benchmarks.read_winner(text)
    assert benchmarks.read_reason('<think>{"reasoning": "none"}</think>{"reasoning": "a hat"}') == "a hat"
    parts = [{"text": "perhaps 5", "thought": True}, {"text": "4"}]
    assert vlm.Gemini.reply(None, {"candidates": [{"content": {"parts": parts}}]})[0] == "4"


def asked(fake, monkeypatch, kind="openai", times=1, **settings):
    """Ask a server `times` times, in threads -> what is read (or what went wrong), and the ledger's lines."""
    settings, lines = vlm.Settings(fake.url, **{"wait": 0.01, "deadline": 30.0, **settings}), []
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asker = vlm.Asker((vlm.OpenAICompatible if kind == "openai" else vlm.Gemini)("m", settings), settings)

    def ask(number):
        try:
            read = lambda said: benchmarks.read_answer(said, ["quality"])["quality"]
            return asker.ask(f"Grade {number}", [], 1.0, read, {"properties": {}}, lambda **line: lines.append(line))
        except (ValueError, vlm.TryAgain) as error:
            return error

    return list(vlm.in_threads(ask, range(times), settings.concurrency)), lines


GOOD = "Quality: 4"
CUT_OFF = {
    "length": openai_says("… quality: 2 … Wait,", "length"), "thought": openai_says("<think>… quality: 2 … Wait,"),
    "filter": openai_says("Quality: 2", "content_filter"), "MAX_TOKENS": gemini_says("Quality: 2", "MAX_TOKENS"),
    "blocked": {"promptFeedback": {"blockReason": "OTHER"},
                "usageMetadata": {"promptTokenCount": 9000, "thoughtsTokenCount": 7}},
    "kind": openai_says({"quality": 2}), "number": openai_says(4),
    "shape": {"choices": "none", "usage": {"prompt_tokens": 9000, "completion_tokens": 7}},
}  # fmt: skip


@pytest.mark.parametrize("said", CUT_OFF.values(), ids=CUT_OFF)
def test_nothing_is_read_from_what_was_cut_off_and_its_tokens_are_counted(monkeypatch, said):
    with FakeJudge(lambda request, nth: said) as fake:
        (problem,), lines = asked(fake, monkeypatch, "gemini" if "usageMetadata" in said else "openai", tries=1)
    assert isinstance(problem, vlm.Malformed) and not lines[1]["ok"]
    assert (lines[1]["tokens_in"], lines[1]["tokens_out"]) == (9000, 7)


@pytest.mark.parametrize("trouble, requests, says", [
    (lambda n: n < 3 and (429, {}, b""), 4, None), (lambda n: n < 2 and (503, {}, b""), 3, None),
    (lambda n: n < 2 and "drop", 3, None), (lambda n: n < 1 and "hang", 2, None),
    (lambda n: n < 1 and b'{"choices": [{"mess', 2, None), (lambda n: n < 1 and "Quality: 9", 2, None),
    (lambda n: n < 1 and b'{"choices": "none"}', 2, None),
    (lambda n: n < 1 and (429, {}, b" " * 9_000_000), 2, None),
    (lambda n: "I cannot help with that.", 5, "quality is missing"), (lambda n: (413, {}, b"big"), 1, "HTTP 413: big"),
    (lambda n: "dribble", 5, "no answer within"), (lambda n: b" " * 9_000_000, 5, "more than 4 MB"),
    (lambda n: openai_says(GOOD, tokens=2), 1, "dropped the videos"), (lambda n: (403, {}, b""), 1, "refuses"),
])  # fmt: skip
def test_every_trouble_ends_in_the_right_score_or_in_a_report(monkeypatch, trouble, requests, says):
    say = lambda request, nth: trouble(nth) or openai_says(GOOD)
    with FakeJudge(say) as fake:
        (found,), lines = asked(fake, monkeypatch, deadline=0.3 if trouble(0) in ("hang", "dribble") else 30.0)
        assert len(fake.requests) == requests and len(lines) == 2 * requests
    assert re.search(says, str(found)) if says else found == 4
    assert lines[-1]["ok"] == (not says) and all(line["ok"] or line["error"] for line in lines[1::2])


@pytest.mark.parametrize("said, says, most", [
    ((401, {}, b""), "refuses the key", 1), ((402, {}, b""), "no quota is left", 1),
    ((400, {}, b"API key not valid."), "refuses the key", 1), ((401, {}, b" " * 9_000_000), "HTTP 401: no text", 1),
    ((404, {}, b""), "no such model", 1),
    ((429, {}, b'{"error": {"code": "insufficient_quota"}}'), "no quota is left", 1),
    ((429, {"Retry-After": "7200"}, b"{}"), "used up for 7200 s more", 1),
    ("I rate it four stars.", "10 answers, and none could be read", 10), ("drop", "cannot be reached", 20),
])  # fmt: skip
def test_a_judge_that_will_not_answer_is_stopped_at_once_and_costs_no_more(monkeypatch, said, says, most):
    with FakeJudge(lambda request, nth: said) as fake:
        found, _ = asked(fake, monkeypatch, times=20)
        assert 1 <= len(fake.requests) <= most and says in str(found[-1]) and KEY not in str(found)


def test_a_quota_costs_time_and_no_item(monkeypatch):
    times, lock, details = [], threading.Lock(), {"error": {"details": [{"retryDelay": "0.11s"}]}}

    def say(request, nth):  # 9 requests every 0.1 s, and Google's way of saying when to come back
        with lock:
            now = time.monotonic()
            if sum(now - t < 0.1 for t in times) >= 9:
                return 429, {}, details
            times.append(now)
        return openai_says(GOOD)

    with FakeJudge(say) as fake:
        assert asked(fake, monkeypatch, times=36, tries=1)[0] == [4] * 36
    with FakeJudge(lambda request, nth: openai_says(GOOD if nth else "Quality: 9")) as fake:  # waits for no quota
        assert asked(fake, monkeypatch, patience=0)[0] == [4]
    told = [("1.5", ""), (formatdate(time.time() + 90, usegmt=True), ""), ("", '"retryDelay": "34.07s"'), ("soon", "")]
    seconds = [vlm.seconds_to_wait(*words) for words in told]
    assert seconds == [1.5, pytest.approx(90, abs=3), 34.07, None]


def test_a_parameter_that_a_server_refuses_is_left_out(monkeypatch):
    refused = lambda request: "temperature" in request["body"] and (400, {}, b"unsupported: temperature")
    with FakeJudge(lambda request, nth: refused(request) or openai_says(GOOD)) as fake:
        assert asked(fake, monkeypatch, times=2)[0] == [4, 4] and len(fake.requests) == 3


def test_a_key_goes_to_no_open_address_and_to_no_other_host_and_into_no_file(refvie, monkeypatch):
    for url in ("http://example.com/v1", "https://me:p@host/v1", "https://host/v1?key=s3cret"):
        with fails("https only|no user, password or query"):
            score(refvie, SimpleNamespace(url=url), judge_="gemini-x")
    with FakeJudge() as other, FakeJudge(lambda request, nth: (302, {"Location": other.url}, b"")) as fake:
        assert type(asked(fake, monkeypatch)[0][0]) is vlm.Unusable and not other.requests
    echo = lambda request: openai_says(good_answer(request).replace("as seen", KEY), model=KEY)
    spelled = lambda request: json.dumps(echo(request)).replace("secret", "\\u0073ecret").encode()
    says = [spelled, lambda request: (413, {}, KEY.encode()), echo]
    with FakeJudge(lambda request, nth: says[number_of(request)](request)) as fake:
        score(refvie, fake, "--controls", 0, "--allow-missing")
        assert KEY in str(fake.requests[-1]["headers"])
    written = b"".join(path.read_bytes() for path in (refvie / "out").rglob("*") if path.is_file())
    assert b"HTTP 413: ***" in written and b"kkkk" not in written


def test_who_answered_is_kept_and_another_endpoint_or_rate_is_asked_anew(refvie, monkeypatch, capsys):
    decoded = []
    monkeypatch.setattr(vlm, "decode", lambda path, *rest, true=vlm.decode: decoded.append(path) or true(path, *rest))
    parts = lambda text: [{"type": "reasoning", "text": "5"}, {"type": "text", "text": text}]
    say = lambda request, nth: openai_says(parts(good_answer(request)), model="other-7b")
    with FakeJudge(say) as fake, FakeJudge(say) as elsewhere:
        score(refvie, fake, "--controls", 0, "--repeats", 3)
        assert len(decoded) == len(set(decoded)) == 6  # once for all questions
        for server, more in ((elsewhere, ()), (elsewhere, ("--mode", "strict")), (fake, ())):
            score(refvie, server, "--controls", 0, *more)
        assert len(fake.requests) == 9 and len(elsewhere.requests) == 6
        last = elsewhere.requests[-1]  # the reference, and all frames of two clips that have 4 a second too
        assert len([p for p in last["parts"] if p["type"] == "image_url"]) == 1 + 2 * (8 + number_of(last))
        assert {line["model"] for line in answers_of(refvie)} == {"other-7b"}
        assert "Answered by other-7b, not by openai:m." in report_of(refvie)
        score(refvie, fake, "--controls", 0, "--mode", "strict", out="b")
    capsys.readouterr()
    go("leaderboard", refvie / "out", refvie / "b")
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert "/out | openai:m | 3 | 3.00" in first and "other asked than the first" in second
    (refvie / "b" / "summary.json").write_text('{"bench": "refvie"}')
    with fails("b/summary.json: is not of a `judge.py score`"):
        go("leaderboard", refvie / "out", refvie / "b")


def test_a_dry_run_tells_the_price_and_asks_and_measures_nothing(refvie, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    for judge_, limit in (("openai:m", 2), ("gemini-x", 3)):
        with pytest.raises(SystemExit):
            score(refvie, SimpleNamespace(url="http://x"), "--dry-run", "--limit", limit, judge_=judge_)
    said = capsys.readouterr().out
    assert "14 of 14 questions to ask, about " in said and "21 of 21 questions" in said
    assert not (refvie / "out" / "media").exists() and not (refvie / "out" / "controls").exists()


def start(refvie, fake, *more):
    words = "score --bench refvie bench.yaml --edits edits --judge openai:m --out out --endpoint".split()
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it
    command, out = [sys.executable, HOUSE / "judge.py", *words, fake.url, *more], subprocess.DEVNULL
    return subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, preexec_fn=heed, cwd=refvie, text=True)


def wait_for(test, seconds=90):
    until = time.monotonic() + seconds
    while not test() and time.monotonic() < until:
        time.sleep(0.05)


def test_after_kill_9_a_rerun_pays_for_no_item_twice_and_ctrl_c_ends_within_two_seconds(refvie):
    served, path = threading.Event(), refvie / "out" / "answers.jsonl"
    done = lambda: sum(r.get("served", False) for r in fake.requests)
    say = lambda request, nth: "hang" if done() >= 3 and not served.is_set() else good_answer(request)
    more = ("--repeats", "3", "--controls", "0", "--set", "concurrency=1")
    with FakeJudge(say) as fake:
        process = start(refvie, fake, *more)
        wait_for(lambda: path.exists() and path.read_text().count('"value"') >= 3 and len(fake.requests) >= 4)
        process.kill()
        process.communicate()
        with path.open("ab") as file:  # as a crash in the middle of a character leaves it
            file.write('{"event": "answer", "ok": true, "key": "é'.encode()[:-1])
        process = start(refvie, fake, *more)
        wait_for(lambda: len(fake.requests) >= 5)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert "interrupted; run the same command again" in process.communicate(timeout=20)[1]
        assert time.monotonic() - began < 2 and process.returncode == 130
        served.set()
        with appended(path), fails("another run writes to it"):
            score(refvie, fake, *more)
        score(refvie, fake, *more)
        assert done() == 9 and len({line["key"] for line in answers_of(refvie)}) == 9
    assert "2 cut off, 0 timed out (perhaps paid)" in report_of(refvie)


def test_the_hierarchy_is_enforced_in_code_and_odd_answers_are_paid_once(refvie):
    odd = '"reasoning": "a line\u2028and \\ud83d half an emoji, \u00e9", '
    scores = lambda request: (5, 5, 4) if number_of(request) == 2 else (2, 5, 1)
    with FakeJudge(lambda request, nth: good_answer(request, scores(request)).replace("{", "{" + odd, 1)) as fake:
        for _ in range(2):
            score(refvie, fake, "--controls", 0)
        assert len(fake.requests) == 3 and "\u2028" in answers_of(refvie)[-1]["text"]
    assert "broke the hierarchy in 2 of 3 answers" in report_of(refvie)
    assert "| 3.17 | 3.67 |" in report_of(refvie)  # capped and not, of the tasks' means
    with (refvie / "out" / "refvie.csv").open() as file:
        row = next(csv.DictReader(file))
    names = ("identity_consistency", "temporal_consistency", "physical_integration", "score", "uncapped")
    assert [row[name] for name in names] == ["2.0000", "2.0000", "1.0000", "1.6667", "2.6667"]
    told = json.loads((refvie / "out" / "summary.json").read_text())
    assert told["overall"] == "3.17"  # (5 / 3 + 14 / 3) / 2


def test_known_answers_hold_for_a_judge_with_eyes_and_a_blind_one_ends_with_exit_3(refvie):
    def seeing(request, nth):  # it knows the copy, the wrong reference and damaged edits by their bytes
        ref, source, edit = [base64.b64decode(p["inlineData"]["data"]) for p in request["parts"] if "inlineData" in p]
        if edit == source or ref != (refvie / f"{number_of(request)}.png").read_bytes():
            return good_answer(request, (1, 1, 1))
        whole = edit in [path.read_bytes() for path in (refvie / "edits").iterdir()]
        return good_answer(request, (5, 5, 5) if whole else (3, 1, 1))

    always = lambda n: lambda request, nth: good_answer(request, (n, n, n))
    published = "Runway Aleph, published (Gemini-3-Flash; other model, prompts or items: compare ranks)"
    run = lambda fake: score(refvie, fake, "--controls", 2, "--limit", 2, judge_="gemini-x")
    table = lambda: re.findall(r"\| (\d) \| (\d) \|\n", report_of(refvie).partition("## Metrics")[0])
    with FakeJudge(seeing) as fake:
        run(fake)
    assert table() == [("2", "2")] * 6 and "failed 0 of 12 known answers" in report_of(refvie)
    assert published in report_of(refvie)
    (last, *_), rates = fake.requests, {json.dumps(part.get("videoMetadata")) for part in fake.requests[0]["parts"]}
    assert rates == {"null", '{"fps": 1.0}'} and last["body"]["generationConfig"]["temperature"] == 0
    assert last["body"]["generationConfig"]["mediaResolution"] == "MEDIA_RESOLUTION_MEDIUM"
    assert last["body"]["generationConfig"]["responseSchema"]["propertyOrdering"][0] == "reasoning"
    with FakeJudge(always(5)) as fake, fails("3"):
        run(fake)
    text = report_of(refvie)
    assert "Do not trust this judge: gemini-x failed 12 of 12" in text and published not in text
    assert table() == [("0", "2")] * 6
    with FakeJudge(always(1)) as fake:
        run(fake)
    assert table() == [("2", "2"), *[("0", "0")] * 5]  # what has 1 already cannot fall


def test_foreseeable_failures_end_with_one_line_and_others_with_a_traceback():
    full = ("out of GPU memory", RuntimeError("unable to find an engine to execute"))
    for says, error in (("no such file", OSError("no such\nfile")), full):
        with pytest.raises(SystemExit, match=f"judge.py: {says}"), command.one_line("judge.py"):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), command.one_line("judge.py"):
        raise RuntimeError("a bug")


def test_correlations_and_intervals_are_right_on_numbers_done_by_hand():
    about = pytest.approx
    assert stats.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == about(0.8) and stats.spearman([1, 1, 1], [1, 2, 3]) is None
    assert stats.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == about(4 / 6)
    assert stats.kendall([1, 1, 2], [1, 2, 3]) == about(2 / 6**0.5)
    assert stats.pairwise([1, 2, 3], [1, 3, 2]) == about(2 / 3) and stats.pairwise([1, 1], [1, 2]) is None
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean = stats.mean_of([list(values)])
    assert mean.high - mean.low == about(2 * 1.96 * values.std() / 20, rel=0.1)
    assert stats.mean_of([[1.0, 1.0], [3.0, 3.0]]).value == 2  # tasks weigh the same
    assert str(stats.mean_of([[1.0, 2.0]], missing=1, allow_missing=False)) == "– (1 missing)"
    assert str(stats.mean_of([[1.0, 2.0, 3.0]])) == "2.00 (1.00, 2.00, 3.00)"  # too few for an interval
    assert str(stats.share_of([1, 1, 1])) == "1.00 [0.44, 1.00]" and str(stats.share_of([])) == "–"
    assert stats.sign_test(3, 0) == 0.25 and stats.sign_test(5, 5) == 1 and stats.sign_test(10, 0) == 2 / 1024


def test_an_answer_missing_among_repeats_is_missing_and_a_run_that_stops_writes_what_it_has(refvie):
    say = lambda request, nth: "No." if number_of(request) == 1 and nth else good_answer(request)
    run = lambda fake, *more: score(refvie, fake, "--controls", 0, "--repeats", 2, "--set", "tries=1", *more)
    with FakeJudge(say) as fake:
        with fails("1 of 3 items lack a result"):
            run(fake)
        assert "## Missing" in report_of(refvie) and len(fake.requests) == 6
        run(fake, "--allow-missing")
        assert "4.00 (4.00, 4.00) (1 missing)" in report_of(refvie) and number_of(fake.requests[-1]) == 1
    with FakeJudge(lambda request, nth: (401, {}, b"")) as fake, fails("refuses the key"):
        run(fake)
    assert len(fake.requests) == 1 and "3 of 3 items." in report_of(refvie)


def test_repeats_give_a_spread_and_people_s_scores_agreement_per_task_and_among_raters(refvie):
    (refvie / "people.csv").write_text("item,rater,q\n0,x,1\n1,x,3\n2,x,5\n0,y,2\n1,y,5\n2,y,4\n")
    say = lambda request, nth: good_answer(request, [number_of(request) + 1 + nth % 2] * 3)
    broken = {"item,q\n0,nan\n": "not a number", "item,q\n0,1,2\n": "more fields", "item,q\nx,1\n": "none of its items"}
    with FakeJudge(say) as fake:
        score(refvie, fake, "--repeats", 2, "--controls", 0, "--human", refvie / "people.csv")
        text = report_of(refvie)
        for table, says in broken.items():
            (refvie / "people.csv").write_text(table)
            with fails(says):  # before the judge is paid
                score(refvie, fake, "--human", refvie / "people.csv", out="broken")
        assert len(fake.requests) == 6
    assert "mean over items: 0.71" in text and "| q | raters among themselves | all |  |  |  | 0.67 |" in text
    (refvie / "people.csv").write_text("item,q,winner\n0,1,A\n0,4,B\n")  # a line a person
    people = judge.read_human(refvie / "people.csv", [SimpleNamespace(key="0")])
    assert people == {"q": {"": {"0": 2.5}}, "winner": {"": {"0": 0.5}}}
    assert re.search(r"\| q \| score \| all \| 3 \| (1.00|0.8\d) ", text)
    assert "| q | score | subject | 2 | – | – | 1.00 |" in text


@pytest.mark.parametrize("taste, expected", [
    ("first", "| all | 0 | 0 | 3 | 3 | 3 | 0.500 [0.125, 0.875] | 1.000 | – |"),
    ("red", "| all | 3 | 0 | 0 | 0 | 3 | 1.00 [0.44, 1.00] | 0.250 | 0.500 [0.095, 0.905] |"),
])  # fmt: skip
def test_a_win_counts_in_both_orders_only_and_one_that_follows_the_position_ends_with_exit_3(refvie, taste, expected):
    (refvie / "other").mkdir()
    for path in (refvie / "edits").iterdir():
        write_video(refvie / "other" / path.name, smooth_clip(GREEN, len(read_clip(path).frames)), 4)
    (refvie / "people.csv").write_text("item,winner\n0,A\n1,B\n2,tie\n")

    def say(request, nth):
        videos = [base64.b64decode(p["inlineData"]["data"]) for p in request["parts"] if "videoMetadata" in p]
        red = [path.read_bytes() for path in (refvie / "edits").iterdir()]
        return json.dumps({"winner": "1" if taste == "first" or videos[1] in red else "2"})

    words = ["compare", "--bench", "refvie", refvie / "bench.yaml", refvie / "edits", refvie / "other"]
    words += ["--out", refvie / "out"]
    with FakeJudge(say) as fake, fails("3") if taste == "first" else contextlib.nullcontext():
        go(*words, "--judge", "gemini-x", "--human", refvie / "people.csv", "--endpoint", fake.url)
    assert expected in report_of(refvie, name="refvie_compare")
    if taste == "red":
        next((refvie / "other").iterdir()).unlink()
        with fails("1 of 3 items lack a result"):
            go(*words)
        text = report_of(refvie, name="refvie_compare")
        assert "(1 missing) |" in text and "missing: " in text[text.index("## Missing") :]


def test_a_missing_and_a_broken_edit_are_counted_and_shown_and_no_edits_replace_no_report(refvie):
    edits = sorted((refvie / "edits").iterdir())
    (refvie / "1.png").write_bytes(b"no picture")
    edits[0].unlink()
    edits[1].write_bytes(edits[1].read_bytes()[:100])
    measure = lambda: score(refvie, SimpleNamespace(url="https://me:p%40ss@host/v1?key=s3cret"), judge_="metrics")
    with fails("2 of 3 items lack a result"):
        measure()
    text, page = report_of(refvie), (refvie / "out" / "refvie.html").read_text()
    assert "p%40ss" not in text + page and "s3cret" not in text + page
    assert "missing: " in text and "unreadable: " in text and "| background (1 of 1) |" in text
    assert "| subject (0 of 2) |" in text and "| edit_strength |  | – (2 missing) | " in text
    assert page.index("missing: ") < page.index("What the metrics are")
    for found in re.findall(r'(?:src|href|poster)="([^"]+)"', page):
        assert (refvie / "out" / found).is_file() and "://" not in found
    shutil.rmtree(refvie / "edits")
    with fails("edits: no such folder of edits"):
        measure()
    assert report_of(refvie) == text


def test_benchmarks_are_read_in_their_own_formats_and_lead_nowhere_else(tmp_path, capsys):
    read = lambda name, table, edits="edits": judge.read_bench(name, tmp_path / table, edits)
    rows = "original_video,prompt,edited_type\nvideos/a.mp4,Add a hat.,local_add\nvideos/b.mp4,Zoom in.,camera_edit\n"
    write = lambda text: (tmp_path / "b.csv").write_text(text)
    write(rows)
    (item,) = read("openve", "b.csv")
    assert (item.edit, item.source) == (Path("edits/a_edited.mp4").absolute(), tmp_path / "videos/a.mp4")
    (tmp_path / "i.json").write_text('{"12": {"id": "animal/7.jpg", "prompt": "Add a hat.", "edit_type": "add"}}')
    assert read("imgedit", "i.json")[0].edit == Path("edits/add/127.jpg").absolute()
    write(rows.replace("videos/a", f"{tmp_path.name}/videos/a"))  # as published
    (tmp_path / "videos").mkdir()
    (tmp_path / "blob").touch()
    (tmp_path / "videos/a.mp4").symlink_to("../blob")  # as the hub's cache has it
    assert read("openve", "b.csv")[0].source == tmp_path / "videos/a.mp4"
    write(rows.replace("b.mp4,Zoom in.,camera_edit", "a.mp4,Zoom in.,local_add"))
    assert len(read("openve", "b.csv")) == 2 and "share the edit a_edited.mp4" in capsys.readouterr().err
    write(rows.replace("videos/a", "../a"))
    for name, table, says in (("openve", "b.csv", "is outside of"), ("refvie", "i.json", "right")):
        with fails(says):
            read(name, table)
    write("original_video,prompt,edited_type\nsource_videos/a.mp4,Night.,time\n")
    assert read("sparkle", "b.csv")[0].edit == Path("edits/time/a_edited.mp4").absolute()
    (tmp_path / "time" / "night---sky").mkdir(parents=True)
    (tmp_path / "time" / "night---sky" / "a_edited.mp4").touch()
    assert read("sparkle", "b.csv", tmp_path)[0].edit.parent.name == "night---sky"
    told = [("subject", "vae.py"), ("background", "dit.py"), ("subject", "vae.py"), ("subject", "data.py")]
    items = [judge.Item(str(i), task, "x", None, None, HOUSE / ref) for i, (task, ref) in enumerate(told)]
    assert judge.wrong_reference(items, items[0]).name == "data.py"  # another one, of the same task if possible
    assert judge.wrong_reference(items, items[1]).name == "vae.py" and judge.wrong_reference([item], item) is None


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
    words = ["score", "--bench", mine, mine, "--edits", refvie / "edits", "--judge", "openai:m", "--controls", 0]
    with FakeJudge(lambda request, nth: said["Lines" in request["text"]]) as fake:
        words += ["--endpoint", fake.url, "--out", refvie / "out"]
        go(*words)
        text = report_of(refvie, name="mine")
        assert "| edits | 4.00 | 4.00 | 4.50 |" in text
        assert "| Their model, published (Someone; other model, prompts or items: compare ranks) | – | – | 3.5" in text
        assert "1: none" in fake.requests[0]["text"] and "response_format" in fake.requests[0]["body"]
        go(*words, "--prompts", prompts)
        assert "Grade Zoom in. Lines" in fake.requests[1]["text"] and "response_format" not in fake.requests[1]["body"]
    assert "published (Someone; comparable)" in report_of(refvie, name="mine")
    for name in ("score", "flicker"):
        mine.write_text(BENCH.replace("quality:", f"{name}:"))
        with fails(f"--bench mine: a criterion cannot be named {name}"):
            go(*words)


def test_run_makes_the_released_names_once_in_shards_and_mixes_no_other_weights_or_settings(
    refvie, small_weights, monkeypatch, capsys
):
    weights = shutil.copytree(small_weights, refvie / "weights")
    words = ["run", "--weights", weights, "--steps", 1, "--device", "cpu", "--bench", "refvie", refvie / "bench.yaml"]
    run = lambda edits, *more: go(*words, "--edits", refvie / edits, *more)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        run("new")
    made = sorted((refvie / "new").glob("*.mp4"))
    assert [path.name for path in made] == sorted(path.name for path in (refvie / "edits").iterdir())
    with open_media(made[0]) as (_, stream):
        assert stream.pix_fmt == "yuv444p"  # so that the metrics see the model and not the codec
    run("new")
    assert "0 of 1 edits to make" in capsys.readouterr().out
    monkeypatch.delenv("RANK")  # and WORLD_SIZE alone is not torchrun's
    asked, edit = [], KiwiEdit.edit
    monkeypatch.setattr(KiwiEdit, "edit", lambda *a, **more: asked.append(more) or edit(*a, **more))
    run("plain", "--no-ref", "--seed", 7, "--ref-guidance", 2, "--limit", 1)
    assert [(more["seed"], more["ref_guidance"]) for more in asked] == [(7, 2)]
    assert not torch.equal(read_clip(refvie / "plain" / made[0].name).frames, read_clip(made[0]).frames)
    refused = {"--seed": "are there of seed 0, not 1;", "--ref-guidance": "of ref_guidance None, not 1.0; give another"}
    for flag, says in refused.items():
        with fails(says):
            run("new", flag, 1)
    with fails("--device cuda:9: not available here"):
        run("new", "--device", "cuda:9")
    dit = load_file(weights / "dit.safetensors")
    save_file({name: tensor + 1 for name, tensor in dit.items()}, weights / "dit.safetensors")
    with fails("edits are there of weights .*; give another --edits"):
        run("new")  # the same folder, with other weights in it
    (refvie / "new" / "run.json").unlink()
    with fails("edits without .*run.json; use an empty --edits"):
        run("new")


def test_frames_for_a_judge_stand_where_its_frame_rate_says(tmp_path):
    write_video(tmp_path / "v.mp4", smooth_clip(BLUE, 28, 32), 8)
    for fps, count, expected in ((1, 4, [0, 1, 2, 3]), (4, 14, [0, 0.25, 0.5, 0.75, 1]), (99, 28, [0])):
        frames, seconds = vlm.sampled_frames(tmp_path / "v.mp4", fps)
        assert len(frames) == len(seconds) == count and seconds[: len(expected)] == expected
    positions = lay_out([[1, 2], (7, (4, 2, 2), 0.5)])[1]  # frames closer than a position share it
    assert positions[0, 0].tolist() == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_local_judge_numbers_and_generates_as_transformers_does(tmp_path, kind):
    write_image(tmp_path / "ref.png", smooth_clip(RED)[0])
    write_video(tmp_path / "v.mp4", smooth_clip(BLUE), 4)
    ours = vlm.Local(tiny_local_judge(tmp_path / "judge", kind), vlm.Settings(max_tokens=8, device="cpu"))
    media = [("Reference image", tmp_path / "ref.png"), ("Edited video", tmp_path / "v.mp4")]
    ids, positions, pixels = ours.prepare("Judge it.", media, 4.0)
    kinds = torch.zeros_like(ids)
    kinds[ids == ours.token("image_pad")], kinds[ids == ours.token("video_pad")] = 1, 2
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
        ends = (ours.token("im_end"), ours.token("endoftext"))
        assert said.text == ours.tokenizer.decode([t for t in expected[0, ids.shape[1] :].tolist() if t not in ends])
    video = positions[0, 0][kinds[0] == 2]  # 2 positions a second, 4 frames a second, 2 a step
    assert kind == "qwen3_vl" or video.unique().diff().tolist() == [1, 1, 1]
