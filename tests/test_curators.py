"""Tests of curators/: the models that curation asks"""

import csv
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_curate import curated, kept_in

import curate
import media
import vlm
from conftest import (
    BLUE,
    GREEN,
    RED,
    SHARED,
    close,
    demo,
    moving_picture,
    randomise,
    smooth_clip,
    tiny_local_judge,
    write_clip,  # fmt: skip
)
from curators import Rejected, classical, paper
from curators.classical import Classical
from curators.paper import Paper
from media import MediaError, read_image, write_image, write_video

with_and_without_opencv = pytest.mark.parametrize("opencv", [True, False])


@pytest.fixture
def arguments(tmp_path):
    return lambda *words: curate.parse_arguments(["x", "--out", str(tmp_path), "--device", "cpu", *words])


def disc(count=9, size=96, colour=RED, places=((48, 48, 20),), ground=90):
    """A clip of a plain textured ground with discs (x, y, radius) on it: uint8 (count, size, size, 3)."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    frame = (ground + 20 * torch.sin(rows / 5.0) + 20 * torch.cos(columns / 7.0))[..., None].repeat(1, 1, 3)
    for x, y, radius in places:
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        frame[inside] = torch.tensor(colour).float() + 25 * (rows[inside] / size)[:, None]  # lighter below
    return frame.clamp(0, 255).to(torch.uint8).repeat(count, 1, 1, 1)


def made(folder, places, opencv, monkeypatch, prompt="Add a red ball.", **more):
    """Ground and synthesize an edit that brings discs -> models, clips, row, reference."""
    if not opencv:
        monkeypatch.setattr(classical, "cv2", None)
    elif classical.cv2 is None:
        pytest.skip("needs opencv: pip install opencv-contrib-python-headless")
    clips = folder / "a.mp4", folder / "b.mp4"
    for path, frames in zip(clips, (disc(places=()), disc(places=places))):
        write_video(path, frames, 8, None, media.EXACT_VIDEO_CODEC)
    models, row = Classical(SimpleNamespace(out=str(folder))), {"kind": "subject", "prompt": prompt, **more}
    row["box"], mask, row["key"], _ = models.ground(*clips, row)
    write_image(folder / "mask.png", mask[..., None].expand(-1, -1, 3).to(torch.uint8) * 255)
    return models, clips, row | {"mask": "mask.png"}, models.synthesize(*clips, mask, row)


@with_and_without_opencv
def test_a_reference_that_is_shuffled_turned_or_cut_fails_verification(tmp_path, monkeypatch, opencv):
    models, clips, row, picture = made(tmp_path, [(48, 40, 22), (48, 58, 14)], opencv, monkeypatch)
    height, width = picture.shape[:2]
    tries = {"own": picture, "shuffled": picture.reshape(-1, 3)[torch.randperm(height * width)].view(picture.shape),
             "turned": picture.flip(0), "quarter": picture[: height // 2, : width // 2].contiguous()}  # fmt: skip
    verdicts = {}
    for name, image in tries.items():
        write_image(tmp_path / f"{name}.jpg", image)
        verdicts[name] = models.verify(*clips, tmp_path / f"{name}.jpg", row)[0]
    assert verdicts == {"own": True, "shuffled": False, "turned": False, "quarter": False}


@with_and_without_opencv
@pytest.mark.parametrize("places, says", [
    ([(25, 30, 14), (70, 60, 14)], "the edit is in 2 large parts"), ([(-35, 48, 60)], "border cuts the object off"),
    ([], "nothing changed"),
])  # fmt: skip
def test_what_is_no_one_whole_object_is_rejected(tmp_path, monkeypatch, opencv, places, says):
    with pytest.raises(Rejected, match=says):
        made(tmp_path, places, opencv, monkeypatch)


@with_and_without_opencv
def test_colours_that_contradict_the_difference_are_rejected(tmp_path, monkeypatch, opencv):
    monkeypatch.setattr(classical, "cv2", classical.cv2 if opencv else None)
    models, frame = Classical(None), disc(1)[0]
    mask = torch.zeros(96, 96, dtype=torch.bool)
    mask[20:80, 5:90] = True  # much more than the disc
    changed = torch.zeros_like(mask)
    changed[30:66, 30:66] = True
    with pytest.raises(Rejected, match="colours and difference disagree"):
        models.whole_object(frame, mask, changed)


@with_and_without_opencv
def test_a_background_is_filled_only_where_little_of_it_is_never_seen(monkeypatch, opencv):
    monkeypatch.setattr(classical, "cv2", classical.cv2 if opencv else None)
    frame, foreground = disc(1, 128, places=())[0], torch.zeros(128, 128, dtype=torch.bool)
    foreground[50:62, 50:62] = True
    shown = torch.where(foreground[..., None], torch.tensor(BLUE, dtype=torch.uint8), frame)
    filled = classical.without_foreground(shown, foreground)
    assert (filled.float() - frame.float()).abs().mean() < 4
    assert (filled[50:62, 50:62, 2] > 180).float().mean() < 0.05
    foreground[20:100, 20:100] = True
    with pytest.raises(Rejected, match="of the background is never seen"):
        classical.without_foreground(shown, foreground)


@pytest.mark.parametrize(
    "prompt, exchanged", [("Add a red ball.", True), ("Replace the ball with a red one.", True), ("Add a ball.", False)]
)
def test_a_pair_whose_source_and_target_are_exchanged_is_found_by_the_colour_that_the_words_name(
    tmp_path, prompt, exchanged
):
    for name, places in (("a", [(48, 48, 20)]), ("b", [])):
        write_video(tmp_path / f"{name}.mp4", disc(places=places), 8, None, media.EXACT_VIDEO_CODEC)
    score = lambda a, b: np.mean(
        Classical(None).score(tmp_path / a, tmp_path / b, {"kind": "subject", "prompt": prompt})
    )
    assert score("b.mp4", "a.mp4") > 8 and (score("a.mp4", "b.mp4") < 6) == exchanged


def test_frames_to_be_scored_correspond_whatever_rate_the_files_claim(tmp_path, arguments):
    frames = moving_picture(65, 32, 32)
    for name, fps, count in (("source", 30, 65), ("edit", 15, 61)):  # cut to 4k + 1, as the release does
        write_video(tmp_path / f"{name}.mp4", frames[:count], fps, None, media.EXACT_VIDEO_CODEC)
    clips = tmp_path / "source.mp4", tmp_path / "edit.mp4"
    source, edit, indices = classical.look_at_pair(*clips)
    assert (source - edit).abs().mean() < 0.005 and indices[-1] == 60
    asked, models = [], Paper(arguments("--set", "fps=1"))
    models.scorer, models.words = None, {"success": "<instruction>", "quality": "q"}
    models.ask = lambda model, prompt, images, read, schema: asked.append(images) or read('{"score": [20, 20]}')
    assert models.score(*clips, {"prompt": "x"}) == [8.0] * 5
    together = [images for images in asked if len(images) == 2]
    assert len(asked) == 10 and all((p["source"].float() - p["edited"].float()).abs().mean() < 3 for p in together)
    asked.clear()
    models.ask = lambda model, prompt, images, read, schema: asked.append(images) or read('{"score": [9, 9]}')
    assert models.score(*clips, {"prompt": "x"}) == [3.6] and len(asked) == 2  # the middle pair alone


def test_clips_of_other_moments_or_another_aspect_are_not_compared(tmp_path, arguments):
    for name, count, height in (("a", 9, 64), ("b", 21, 64), ("c", 9, 96)):
        write_clip(tmp_path / f"{name}.mp4", moving_picture(count, height, 64))
    for other, says in (("b", "not the same moments"), ("c", "another aspect")):
        with pytest.raises(MediaError, match=says):
            classical.look_at_pair(tmp_path / "a.mp4", tmp_path / f"{other}.mp4")
    with pytest.raises(MediaError, match="not the same moments"):
        Paper(arguments()).score(tmp_path / "a.mp4", tmp_path / "b.mp4", {"prompt": "x"})


@demo
def test_real_edits_are_cut_out_and_real_rubble_is_rejected(tmp_path):
    rows = {row["id"]: row for row in csv.DictReader((SHARED / "demo/pairs.csv").open())}
    table = tmp_path / "p.jsonl"
    drop = lambda row: {key: value for key, value in row.items() if key != "ref_image"}
    table.write_text("\n".join(json.dumps(drop(rows[name])) for name in ("30", "31")))
    torn, glasses = curated(tmp_path / "out", table, "--base-path", SHARED / "demo")
    assert "in 3 large parts" in torn["reason"] and glasses["status"] == "kept"
    picture = read_image(tmp_path / "out" / glasses["ref_image"]).float()
    ink = picture[picture.amin(dim=2) < 240]
    assert 1.5 < picture.shape[1] / picture.shape[0] < 3 and ink[:, 0].mean() > 1.3 * ink[:, 1].mean()  # wide, and red
    brought = curated(tmp_path / "own", SHARED / "demo/pairs.csv", "--min-score", 10)
    assert len(brought) == 23


# ---- answers of the paper's models

GOOD_BOX, WHOLE_BOX = '{"bbox_2d": [100, 200, 500, 800], "label": "a red car"}', '{"bbox_2d": [0, 0, 1000, 1000]}'


@pytest.mark.parametrize("answer, box", [
    (f"[{GOOD_BOX}]", "a red car"), (f"```json\n[{GOOD_BOX}]\n```", "a red car"),
    (f"Here: {GOOD_BOX} and so on", "a red car"),
    ("[" + f"{GOOD_BOX}, " * 30 + '{"bbox_2d": [100, 2', "a red car"),
    ('[{"bbox_2d": [100, 200, 500, 800]}]', "object"),
    ("{'bbox': [100.0,200.0,500.0,800.0]}", "object"), (f'[{{"bbox_2d": [1, 1, 50, 60]}}, {GOOD_BOX}]', "a red car"),
    (GOOD_BOX.replace("a red car", "the man's hat"), "the man's hat"),
    ("[]", Rejected), ('{"bbox_2d": [], "label": ""}', Rejected), ("I see no car.", vlm.Malformed),
    ('[{"bbox_2d": [500, 200, 100, 800]}]', Rejected),
    (f"[{WHOLE_BOX}]", Rejected), ('[{"bbox_2d": [10, 10, 12, 12]}]', Rejected),
    ('{"bbox_2d": [1, 2, 3]}', vlm.Malformed),
])  # fmt: skip
def test_a_grounder_s_answer_gives_a_box_or_a_reason(answer, box):
    if isinstance(box, str):
        assert paper.read_box(answer) == ([0.1, 0.2, 0.5, 0.8], box, None)
    else:
        pytest.raises(box, paper.read_box, answer)


@pytest.mark.parametrize("answer, score", [
    ('{"reasoning": "fine", "score": [20, 25]}', 20), ('```json\n{"score": [7, 0]}\n```', 0),
    ('So {"score": [3, 4', None),
    ('"score": [12, 13], "reasoning": "broke off', 12), ('{"score": [20, 26]}', None), ('{"score": [20]}', None),
    ("20 and 25", None),
    ('{"score": [true, 20]}', None), ("", None),
])  # fmt: skip
def test_a_scorer_s_answer_that_cannot_be_read_is_no_score(answer, score):
    if score is None:
        pytest.raises(vlm.Malformed, paper.read_scores, answer)
    else:
        assert paper.read_scores(answer) == score


def test_a_verifier_s_answer_is_read_or_refused():
    assert paper.read_verdict('Well. {"reason": "same cup", "match": true}') == (True, "same cup")
    assert paper.read_verdict('{"match": "No", "reason": "blue"}') == (False, "blue")
    assert paper.read_verdict('{"match": true, "reason": "half \\ud83d"}')[1].encode()  # or no table could be written
    for answer in ('{"match": "perhaps"}', "", '"match": true or "match": false'):
        pytest.raises(vlm.Malformed, paper.read_verdict, answer)


def test_editscore_is_asked_in_its_own_words_read_but_never_run(tmp_path):
    names = (
        "_context_no_delimit_reasoning_first",
        "_prompts_0shot_two_image_edit_rule",
        "_prompts_0shot_tie_rule_SC",
        "_prompts_0shot_rule_PQ",
    )
    text = "\n".join(f'{name} = """{name[-3:]} 0 to 10, of <instruction>"""' for name in names)
    (tmp_path / "vie_prompts.py").write_text(text + "\nraise SystemExit('run')\n")
    words = paper.editscore_prompts(tmp_path / "vie_prompts.py")
    assert words["success"].split("\n")[2] == "_SC 0 to 25, of <instruction>" and "_PQ 0 to 25" in words["quality"]
    (tmp_path / "other.py").write_text("x = 1")
    for path, says in (
        (tmp_path / "other.py", "has no '_context"),
        (tmp_path / "none.py", "give its vie_prompts.py with --prompts"),
    ):
        with pytest.raises(ValueError, match=says):
            paper.editscore_prompts(path)


# ---- the paper's models, tiny


def tiny_paper_models(folder, kind, said, args):
    """The paper's models, each of some 100,000 random weights, that answer as `said` has it (prompt -> text): they run,
    and what they mumble is replaced at the last moment."""
    from transformers import CLIPConfig, CLIPModel, Sam3TrackerConfig, Sam3TrackerModel

    models = Paper(args)
    asked = paper.Batch(
        tiny_local_judge(folder, kind), vlm.Settings(device="cpu", max_pixels=64 * 64, max_tokens=2, as_user=True)
    )
    mumble = asked.ask
    asked.ask = lambda prompt, media, fps, schema: replace(mumble(prompt, media, fps), text=said(prompt, media))
    models.scorer = models.grounder = models.verifier = asked
    models.words = {"success": "two whole numbers: <instruction>", "quality": "two whole numbers, natural"}
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    backbone = dict(
        small, image_size=112, patch_size=14, window_size=4, global_attn_indexes=[0], pretrain_image_size=112
    )
    config = Sam3TrackerConfig(
        vision_config=dict(backbone_config=dict(backbone, model_type="sam3_vit_model"), fpn_hidden_size=32,
                           backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]]),
        prompt_encoder_config=dict(hidden_size=32, image_size=112),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32),
    )  # fmt: skip
    models.segmenter = Sam3TrackerModel(config).eval()
    vision = dict(small, image_size=32, patch_size=8)
    models.embedder = CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=24)).eval()
    return models


def paper_answers(prompt, media):
    if "two whole numbers" in prompt:
        return '{"score": [25, 16]}' if "natural" in prompt else '{"score": [25, 25]}'
    return GOOD_BOX.replace("{", '{"kind": "subject", ') if "bbox_2d" in prompt else '{"match": true, "reason": "same"}'


def in_pixels(prompt, media):  # as Qwen2.5-VL counts: a frame of 64 x 64 is shown to it as 56 x 56
    return paper_answers(prompt, media).replace("[100, 200, 500, 800]", "[5.6, 11.2, 28, 44.8]")


class Editor:
    """Stands where diffusers' pipeline of 20 billion weights would, and keeps what it was asked."""

    def __init__(self):
        self.asked, self.seen = [], []

    def __call__(self, image, prompt, negative_prompt, true_cfg_scale, num_inference_steps, generator):
        from PIL import Image

        self.asked.append(
            (prompt, negative_prompt, true_cfg_scale, num_inference_steps, torch.rand(1, generator=generator).item())
        )
        self.seen.append(torch.from_numpy(np.array(image[0])))
        picture = torch.full((96, 96, 3), 255, dtype=torch.uint8)
        picture[24:80, 16:72] = self.seen[-1].float().mean(dim=(0, 1)).to(torch.uint8) // 2
        return SimpleNamespace(images=[Image.fromarray(picture.numpy())])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_paper_s_models_go_through_all_stages_and_say_the_kind(tmp_path, nano_data, kind, monkeypatch, arguments):
    pytest.importorskip("PIL", reason="needs Pillow, as diffusers does: pip install pillow")
    models = tiny_paper_models(
        tmp_path / "mllm", kind, in_pixels if kind == "qwen2_5_vl" else paper_answers, arguments()
    )
    models.editor = Editor()
    monkeypatch.setattr(
        paper,
        "segment",
        lambda model, frame, box, true=paper.segment: (
            (true(model, frame, box) | True) & torch.nn.functional.pad(torch.ones(20, 20, dtype=bool), (10, 34, 15, 29))
        ),
    )
    monkeypatch.setattr(Paper, "setup", lambda self, stage: self.__dict__.update(models.__dict__))
    monkeypatch.setattr(Paper, "preflight", lambda self, stages: None)
    rows = curated(tmp_path / "out", nano_data / "video.csv", "--models", "paper", duplicate=1.1)
    live = [row for row in kept_in(rows)]
    assert len(live) == len(rows) >= 2 and {row["kind"] for row in rows} == {"subject"}  # of which no table spoke
    assert all(
        row["edit_score"] == 8.0 and row["label"] == "a red car" and row["verdict_reason"] == "same" for row in live
    )
    assert {asked[1:4] for asked in models.editor.asked} == {(" ", 4.0, 40)}
    assert len({seed for *_, seed in models.editor.asked}) == len(live) and all(
        "a red car" in prompt for prompt, *_ in models.editor.asked
    )
    white = [(seen == 255).all(-1).float().mean() for seen in models.editor.seen]  # what the mask leaves out
    assert all(0.02 < share < 0.6 for share in white)


def test_several_questions_go_through_a_local_model_together_and_get_their_own_answers(tmp_path):
    folder = tiny_local_judge(tmp_path / "mllm", "qwen3_vl")
    settings = vlm.Settings(device="cpu", max_pixels=64 * 64, max_tokens=6, as_user=True)
    model, alone = paper.Batch(folder, settings), vlm.Local(folder, settings)
    randomise(model.mllm, 0.2), alone.mllm.load_state_dict(model.mllm.state_dict())
    for name, size, colour in (("a", 64, RED), ("b", 96, BLUE), ("c", 64, GREEN)):
        write_image(tmp_path / f"{name}.png", smooth_clip(colour, 1, size)[0])
    questions = [(f"What is {name * 9}?", [("image", tmp_path / f"{name}.png")]) for name in "abc"]
    ends = {alone.token("<|im_end|>"), alone.token("<|endoftext|>")}
    together, expected = model.answers([model.prepare(*question, 1.0) for question in questions]), []
    for question in questions:
        try:
            expected.append(alone.answer(*question, 1.0).text)
        except vlm.Malformed:
            expected.append("cut off")
    assert [answer.text for answer in together] == expected and ends


def test_sam_s_mask_and_clip_s_features_have_the_frame_s_shape_and_length_one(tmp_path, arguments):
    models = tiny_paper_models(tmp_path / "mllm", "qwen3_vl", paper_answers, arguments())
    frame = torch.randint(255, (60, 90, 3), dtype=torch.uint8)
    mask = paper.segment(models.segmenter, frame, [0.1, 0.2, 0.5, 0.8])
    assert mask.shape == (60, 90) and mask.dtype == torch.bool
    features = models.embed([frame, frame.flip(0)])
    assert features.shape == (2, 24) and close(features.norm(dim=1), torch.ones(2))


def test_sam_sees_boxes_in_its_pixels_and_colours_from_minus_one_to_one():
    class Segmenter(torch.nn.Module):
        config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(image_size=100))

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values, input_boxes, multimask_output):
            self.seen = pixel_values, input_boxes
            return SimpleNamespace(pred_masks=torch.ones(1, 1, 1, 4, 4))

    for level in (0, 255):
        model = Segmenter()
        paper.segment(model, torch.full((60, 90, 3), level, dtype=torch.uint8), [0.1, 0.2, 0.5, 0.8])
        assert close(model.seen[0], torch.full((1, 3, 100, 100), level / 127.5 - 1))
        assert model.seen[1].flatten().tolist() == pytest.approx([10, 20, 50, 80])


@pytest.mark.parametrize("style", ["base_model.model.model.language_model.layers", "base_model.model.model.layers"])
def test_an_adapter_is_merged_as_peft_would(tmp_path, style):
    asked = vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen3_vl"), vlm.Settings(device="cpu"))
    weight = asked.mllm.model.language_model.layers[1].self_attn.q_proj.weight
    before, a, b = weight.detach().clone(), torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    name = f"{style}.1.self_attn.q_proj"

    def merge(tensors, **config):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})
        )
        paper.add_adapter(asked.mllm, tmp_path)

    good = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    merge(good)
    assert close(weight - before, 2 * b @ a)
    merge(good, use_rslora=True)  # 8 / sqrt(4) more
    merge(good, alpha_pattern={"q_proj": 16})
    assert close(weight - before, 10 * b @ a)
    elsewhere = {key.replace("layers.1", "elsewhere.9"): value for key, value in good.items()}
    for tensors, config, says in (
        (elsewhere, {}, "finds no place"),
        (good | {f"{name}.bias": torch.zeros(3)}, {}, "not pairs of lora_A and lora_B alone"),
        (good, {"use_dora": True}, "only LoRA"),
    ):
        with pytest.raises(ValueError, match=says):
            merge(tensors, **config)


def test_the_paper_s_scorer_and_verifier_see_the_frames_they_are_told_of(tmp_path, arguments):
    for name, colour in (("source", BLUE), ("target", RED)):
        write_video(tmp_path / f"{name}.mp4", smooth_clip(colour), 4)
    write_image(tmp_path / "ref.png", smooth_clip(GREEN)[0])
    asked, models = [], Paper(arguments())
    models.scorer = models.verifier = None
    models.words = {"success": "score <instruction>", "quality": "score"}

    def ask(model, prompt, images, read, schema):
        asked.append({label: "RGB"[image.float()[40, 30].argmax()] for label, image in images.items()})
        return read('{"score": [20, 20]}' if "score" in prompt else '{"match": true, "reason": "same"}')

    models.ask = ask
    files = tmp_path / "source.mp4", tmp_path / "target.mp4"
    models.score(*files, {"prompt": "x"})
    assert asked[:2] == [{"source": "B", "edited": "R"}, {"edited": "R"}]
    models.verify(*files, tmp_path / "ref.png", {"prompt": "x", "kind": "subject", "key": 0})
    assert asked[-1] == {"edited": "R", "reference": "G"}


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of two models; answers come from `said`, what it was asked goes to `asked`."""

    said, asked = [], []

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({"data": [{"id": "first"}, {"id": "wanted-VL"}]})

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"content": self.said.pop(0)}
        self.reply({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 900}})

    def log_message(self, *_):
        pass


def test_a_server_is_asked_in_the_user_s_turn_with_a_schema_and_again_when_it_mumbles(arguments):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    for name in (url, f"{url}#absent"):
        with pytest.raises(ValueError, match="serves 2 models, first, wanted-VL: say which"):
            paper.open_model(name, "cpu")
    model, models = paper.open_model(f"{url}#wanted-VL", "cpu"), Paper(arguments())
    Server.said[:] = ["hm", '<think>{"match": false}</think>{"match": true, "reason": "same"}']
    image = {"edited": smooth_clip(RED)[0]}
    assert models.ask(model, "Is it?", image, paper.read_verdict, paper.VERDICT) == (True, "same")
    body = Server.asked[-1]
    assert (
        [turn["role"] for turn in body["messages"]] == ["user"]
        and body["temperature"] == 0
        and body["max_tokens"] == 512
    )
    assert [part["type"] for part in body["messages"][0]["content"]] == ["text", "image_url", "text"]
    assert body["response_format"]["json_schema"]["schema"]["properties"].keys() == {"reason", "match"}
    server.shutdown()


def test_all_models_are_looked_for_before_the_first_record(tmp_path, monkeypatch, arguments):
    for name in ("scorer", "grounder", "verifier", "embedder"):
        (tmp_path / name).mkdir()
    there = [f"{name}={tmp_path / name}" for name in ("scorer", "grounder", "verifier", "embedder")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = Paper(arguments("--set", *there, "segmenter=nobody/gated"))
    with pytest.raises(ValueError, match="segmenter=nobody/gated: .*ask for access on its page"):
        models.preflight(["ground"])
    with pytest.raises(ValueError, match="pip install --no-deps editscore, or give its vie_prompts.py"):
        models.preflight(["score", "ground"])
    models.preflight(["verify"])


def test_the_editor_s_language_model_is_told_which_tokens_are_a_picture_s(tmp_path):
    mllm = randomise(vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen2_5_vl"), vlm.Settings(device="cpu")).mllm)
    picture = mllm.config.image_token_id
    ids = torch.tensor([[5, 6, *[picture] * 4, 7]])
    words = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(16, 1176),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
    )
    plain, right = mllm(**words).logits, mllm(**words, mm_token_type_ids=(ids == picture).int()).logits
    paper.tell_of_pictures(mllm)
    assert torch.equal(mllm(**words).logits, right) and not close(plain, right, 1e-3)
