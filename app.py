"""Edit clips on a page: `python app.py` and open http://127.0.0.1:7860 (needs `pip install gradio`).

upload or record -> read_clip at the size the weights know -> KiwiEdit.edit, one at a time -> source | edit, a slider

Served to this computer alone unless --host says otherwise. Uploads are deleted after an hour and at the end; an edit
lives in the page only.
"""

import argparse
import base64
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from command import one_line

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

NANO = Path(__file__).parent / "weights" / "nano"
SIDE_BY_SIDE = """
<div style="position:relative;line-height:0">
  <video src="{source}" autoplay loop muted playsinline style="width:100%;image-rendering:pixelated"></video>
  <video src="{edit}" autoplay loop muted playsinline id="edit"
    style="position:absolute;inset:0;width:100%;image-rendering:pixelated;clip-path:inset(0 0 0 50%)"></video>
</div>
<input type="range" min="0" max="100" value="50" aria-label="source | edit" style="width:100%"
  oninput="const [a, b] = this.parentElement.querySelectorAll('video');
           b.style.clipPath = `inset(0 0 0 ${{this.value}}%)`; b.currentTime = a.currentTime">
<p>source | edit &middot; <a href="{edit}" download="edit.mp4">keep the edit</a></p>
"""


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Edit clips on a page.")
    add = parser.add_argument
    add("--weights", default=str(NANO), metavar="PATH|HUB_ID", help="as for sample.py (default: weights/nano)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    add("--host", default="127.0.0.1", help="0.0.0.0 serves the page to the network (default %(default)s)")
    add("--port", type=int, default=7860, help="default %(default)s")
    add("--max-mb", type=int, default=200, help="largest upload (default %(default)s)")
    return parser.parse_args(argv)


def embedded(clip, frames, folder):
    """Frames as a video in a data: address, with the clip's rate and, at full length, its sound."""
    from media import write_video

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "clip.mp4"
        write_video(path, frames, clip.fps or 1, audio_from=None if clip.still else clip.path)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def build(model, folder, example):
    """The page for a model. example: a folder with source.mp4, prompt.txt and perhaps reference.png."""
    import gradio as gr

    from media import read_image
    from model import read_for

    def edit(video, instruction, pictures, steps, seed, progress=gr.Progress()):  # noqa: B008
        if not video:
            raise gr.Error("give a clip: upload one, record one, or click the example")
        try:
            clip = read_for(model.config, video)
            refs = [read_image(picture) for picture in pictures or []]
            tell = lambda phase, done, total: progress((done, total), desc=phase)
            asked = None if steps == model.config.steps else int(steps)  # a distilled student has steps of its own
            edited = model.edit(clip.frames, instruction, refs or None, asked, int(seed), progress=tell)
            source, edited = (embedded(clip, shown, folder) for shown in (clip.frames, edited))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        return SIDE_BY_SIDE.format(source=source, edit=edited)

    with gr.Blocks(title="nanoKiwi", analytics_enabled=False, delete_cache=(300, 3600)) as page:
        gr.Markdown("# nanoKiwi\nA clip, what to change, and perhaps pictures of what it should look like.")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="clip", sources=["upload", "webcam"])
                instruction = gr.Textbox(label="instruction", placeholder="Replace the car with the one shown.")
                pictures = gr.File(label="reference pictures", file_count="multiple", file_types=["image"])
                steps = gr.Slider(1, 100, model.config.steps, step=1, label="steps")
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
                button = gr.Button("edit", variant="primary", elem_id="go")
            result = gr.HTML(label="source | edit", elem_id="result")
        inputs = [video, instruction, pictures]
        if (example / "prompt.txt").is_file():
            refs = [str(path) for path in example.glob("reference.png")]
            row = [str(example / "source.mp4"), (example / "prompt.txt").read_text().strip(), refs]
            gr.Examples([row], inputs, elem_id="example")
        button.click(edit, [*inputs, steps, seed], result, concurrency_limit=1)
    return page.queue(max_size=8)


def main(argv=None):
    args = parse_arguments(argv)
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install gradio")
    import torch

    from model import KiwiEdit
    from parallel import pick_device

    device = pick_device(args.device)
    model = KiwiEdit.from_pretrained(args.weights, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(model, folder, Path(args.weights) / "example")
        print(f"page        http://{args.host}:{args.port}", flush=True)
        page.launch(server_name=args.host, server_port=args.port, max_file_size=f"{args.max_mb}mb", quiet=True)


if __name__ == "__main__":
    with one_line("app.py"):
        main()
