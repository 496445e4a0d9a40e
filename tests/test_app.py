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


class Browser:
    """Chromium driven by its DevTools protocol over a pipe: no library between."""

    def __init__(self, folder):
        (read_here, answers), (questions, self.write) = os.pipe(), os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={folder} --remote-debugging-pipe about:blank"
        command = f"exec {CHROMIUM} {flags} 3<&{questions} 4>&{answers}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(questions, answers), stderr=subprocess.DEVNULL
        )
        os.close(questions), os.close(answers)
        self.read, self.number, self.session = os.fdopen(read_here, "rb"), 0, None

    def ask(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(lambda: self.read.read(1) or exit("chromium ended"), b"\0")))
            if answer.get("id") == self.number:
                return answer["result"]

    def open(self, url):
        target = self.ask("Target.createTarget", url=url)["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def wait(self, script, seconds=120):
        """The value of a script once it is true."""
        for _ in range(3 * seconds):
            if value := self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value"):
                return value
            time.sleep(1 / 3)
        raise AssertionError(f"not true after {seconds} s: {script}")


@pytest.fixture
def page(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, HOUSE / "app.py", "--port", str(port)]
    server = subprocess.Popen(command, cwd=HOUSE, stdout=subprocess.PIPE, text=True)
    assert "page " in server.stdout.readline()
    browser = Browser(tmp_path)
    try:
        browser.open(f"http://127.0.0.1:{port}")
        yield browser
    finally:
        browser.process.kill(), server.terminate()
        browser.process.wait(), server.wait()


@needs_page
def test_the_bundled_example_is_edited_by_two_clicks(page, tmp_path):
    page.wait("!!document.querySelector('#example tbody tr')")
    page.wait("(document.querySelector('#example tbody tr').click(), true)")
    loaded = "[...document.querySelectorAll('%s video')].filter(v => v.readyState > 1).map(v => v.src)"
    page.wait("document.querySelector('textarea').value.startsWith('Substitute') && " + loaded % "body" + ".length")
    page.wait("(document.querySelector('#go').click(), true)")
    page.wait(loaded % "#result" + ".length == 2")
    clips = []
    for address in page.wait(loaded % "#result"):
        (tmp_path / "clip.mp4").write_bytes(base64.b64decode(address.partition(",")[2]))
        clips.append(read_clip(tmp_path / "clip.mp4").frames.float())
    assert clips[0].shape == clips[1].shape == (9, 64, 64, 3)
    changed = (clips[0] - clips[1]).abs().mean(dim=(0, 3))
    assert changed[24:44, 20:44].mean() > 4 * changed[-12:].mean(), "the sun became something else, the sea stayed"
    page.wait(
        "(r => (r.value = 20, r.dispatchEvent(new Event('input')), true))(document.querySelector('#result input'))"
    )
    assert page.wait("document.querySelectorAll('#result video')[1].style.clipPath") == "inset(0px 0px 0px 20%)"


def test_the_page_is_for_this_computer_alone_and_its_flags_parse_without_torch():
    assert app.parse_arguments([]).host == "127.0.0.1"
    probe = "import app, sys; app.parse_arguments([]); assert not {'torch', 'gradio', 'av'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", probe], cwd=HOUSE, check=True)
