"""Tests of report.py and of the pages in templates/, in headless Chromium"""

import json
import re
import shutil
import subprocess

import pytest

import judge
import report
from conftest import BLUE, RED, smooth_clip
from media import write_video

chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt install chromium")


FITS = "document.documentElement.scrollWidth"
PLAYED = """async function played() {
  const videos = [...items.find(i => !i.hidden).querySelectorAll('video')];
  videos[0].click();
  await new Promise(done => setTimeout(done, 1500));
  return [videos.map(v => v.readyState), videos.map(v => v.paused), videos.map(v => v.currentTime),
          videos.every(v => v.poster), videos[0].getBoundingClientRect().width];
}"""


def in_browser(page, script, width=1280, milliseconds=6000):
    """What `script`, the body of an async function, returns in the page after it has loaded."""
    text = page.read_text()
    run = f"{PLAYED} (async () => {{ {script} }})().catch(e => ({{error: String(e)}}))"
    tell = "document.body.insertAdjacentHTML('beforeend', `<pre id=told>${JSON.stringify(told)}</pre>`)"
    probe = page.with_name("probe.html")
    probe.write_text(text.replace("</body>", f"<script>{run}.then(told => {tell});</script></body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required", "--dump-dom",
             f"--window-size={width},1600", f"--virtual-time-budget={milliseconds}"]  # fmt: skip
    done = subprocess.run(["chromium", *words, probe.as_uri()], capture_output=True, text=True, timeout=120)
    told = re.search(r"<pre id=\"told\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert told, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(told[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, a comparison and a page for people, of three drawn edits of two tasks."""
    folder = tmp_path_factory.mktemp("pages")
    rows = ["original_video,prompt,edited_type"]
    for i, task in enumerate(("local_add", "local_add", "global_style")):
        write_video(folder / f"{i}.mp4", smooth_clip(BLUE, 12), 4)
        rows.append(f"{i}.mp4,Make it <b>{i}</b>.,{task}")
        for name, colour in (("a", RED), ("b", (200, 30 + 60 * i, 30))):
            (folder / name).mkdir(exist_ok=True)
            write_video(folder / name / f"{i}_edited.mp4", smooth_clip(colour, 12), 4)
    (folder / "bench.csv").write_text("\n".join(rows))
    bench = ["--bench", "openve", str(folder / "bench.csv"), "--out", str(folder / "out")]
    judge.main(["score", *bench, "--edits", str(folder / "b")])
    judge.main(["compare", *bench, str(folder / "a"), str(folder / "b")])
    judge.main(["people", *bench, str(folder / "a"), str(folder / "b")])
    return folder / "out"


def test_tables_and_plots_are_written_and_their_words_escaped():
    assert report.table([["a", "b"], ["x|y", 1]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    drawn = report.plot({"loss <1>": [(0, 3.0), (10, 1.0), (20, float("nan"))], "none": []}, "T", "step")
    assert drawn.startswith("<svg") and "loss &lt;1&gt;" in drawn and "nan" not in drawn
    assert "<svg" in report.plot({"a": []}, "T", "step")
    assert report.grid([["<a>"]]) == '<div class="wide"><table><tr><th>&lt;a&gt;</th></tr></table></div>'


@chromium
def test_items_are_sorted_filtered_and_escaped_and_their_clips_play_together(pages):
    told = in_browser(pages / "openve.html", """
        const keys = () => items.filter(i => !i.hidden).map(i => i.dataset.key);
        const out = [document.querySelector('.verdict').innerText];
        $('sort').value = 'edit_strength'; show(); out.push(keys());
        $('order').click(); out.push(keys());
        $('task').value = 'local_add'; show(); out.push(keys());
        $('words').value = '<b>1'; show();
        out.push(keys(), $('count').textContent, document.querySelectorAll('#items b b').length);
        return [out, await played()];""")  # fmt: skip
    (verdict, lowest, highest, of_task, found, count, bold), (ready, paused, at, posters, width) = told
    assert verdict.startswith("No judge was asked") and lowest == highest[::-1] and len(lowest) == 3
    assert of_task == [key for key in highest if key != "2"] and found == ["1"] and count == "1 of 3" and bold == 0
    assert len(ready) == 2 and posters and width == 360 and not any(paused), told
    assert max(at) - min(at) < 0.3 and min(at) > 0, told


@chromium
def test_a_comparison_fits_a_telephone_and_plays_its_three_clips_together(pages):
    told = in_browser(pages / "openve_compare.html", f"return [await played(), {FITS}]", width=500)
    (ready, paused, at, *_), width = told
    assert len(ready) == 3 and not any(paused) and max(at) - min(at) < 0.3 and min(at) > 0 and width <= 500, told


@chromium
def test_people_are_asked_blind_and_their_csv_is_read_by_compare(pages, tmp_path):
    told = in_browser(pages / "people.html", f"""
        $('rater').value = 'me'; $('rater').oninput();
        const shown = document.querySelector('#pair').innerText, width = {FITS};
        for (const n of [0, 1, 2]) document.querySelectorAll('[data-side]')[0].click();
        return [shown, csv(), $('asked').textContent, width];""", width=500)  # fmt: skip
    shown, text, last, width = told
    assert "first" in shown and "edited" not in shown and last.startswith("All done") and width <= 500
    (tmp_path / "people.csv").write_text(text)
    items = [judge.Item(str(i), "x", "x", None, None) for i in range(3)]
    told = judge.read_human(tmp_path / "people.csv", items)["winner"]["me"]
    assert told.keys() == {"0", "1", "2"} and set(told.values()) <= {0, 1}
