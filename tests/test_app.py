"""The page of app.py in headless Chromium: an edit of the bundled example, by clicks."""

import base64
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

import app
from conftest import HOUSE
from media import read_clip

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_page = pytest.mark.skipif(
    not (CHROMIUM and importlib.util.find_spec("gradio") and app.NANO.is_dir()), reason="needs chromium and gradio"
)


@pytest.fixture
def page(tmp_path):
    """The page in a browser, driven over pipes (DevTools protocol) -> wait(script): the script's value, once true."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, HOUSE / "app.py", "--port", str(port)]
    server = subprocess.Popen(command, cwd=HOUSE, stdout=subprocess.PIPE, text=True)
    assert "page " in server.stdout.readline()
    (answers, out), (into, questions) = os.pipe(), os.pipe()
    flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path} --remote-debugging-pipe about:blank"
    command = ["bash", "-c", f"exec {CHROMIUM} {flags} 3<&{into} 4>&{out}"]
    browser = subprocess.Popen(command, pass_fds=(into, out), stderr=subprocess.DEVNULL)
    os.close(out)

    def ask(method, session=None, **params):
        message = {"id": 1, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(questions, json.dumps(message).encode() + b"\0")
        while "id" not in (answer := json.loads(b"".join(iter(lambda: os.read(answers, 1) or exit("ended"), b"\0")))):
            pass  # an event
        return answer["result"]

    target = ask("Target.createTarget", url=f"http://127.0.0.1:{port}")["targetId"]
    session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def wait(script, seconds=120):
        for _ in range(3 * seconds):
            result = ask("Runtime.evaluate", session, expression=script, returnByValue=True)["result"]
            if value := result.get("value"):
                return value
            time.sleep(1 / 3)
        raise AssertionError(f"not true after {seconds} s: {script}")

    yield wait
    for process in (browser, server):
        process.kill()
        process.wait()


@needs_page
def test_the_bundled_example_is_edited_by_two_clicks(page, tmp_path):
    page("!!document.querySelector('#example tbody tr')")
    page("(document.querySelector('#example tbody tr').click(), true)")
    loaded = "[...document.querySelectorAll('%s video')].filter(v => v.readyState > 1).map(v => v.src)"
    page("document.querySelector('textarea').value.startsWith('Substitute') && " + loaded % "body" + ".length")
    page("(document.querySelector('#go').click(), true)")
    page(loaded % "#result" + ".length == 2")
    clips = []
    for address in page(loaded % "#result"):
        (tmp_path / "clip.mp4").write_bytes(base64.b64decode(address.partition(",")[2]))
        clips.append(read_clip(tmp_path / "clip.mp4").frames.float())
    assert clips[0].shape == clips[1].shape == (9, 64, 64, 3)
    changed = (clips[0] - clips[1]).abs().mean(dim=(0, 3))
    assert changed[24:44, 20:44].mean() > 4 * changed[-12:].mean(), "the sun became something else, the sea stayed"
    page("(r => (r.value = 20, r.dispatchEvent(new Event('input')), true))(document.querySelector('#result input'))")
    assert page("document.querySelectorAll('#result video')[1].style.clipPath") == "inset(0px 0px 0px 20%)"


def test_the_page_is_for_this_computer_alone_and_its_flags_parse_without_torch():
    assert app.parse_arguments([]).host == "127.0.0.1"
    probe = "import app, sys; app.parse_arguments([]); assert not {'torch', 'gradio', 'av'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", probe], cwd=HOUSE, check=True)
