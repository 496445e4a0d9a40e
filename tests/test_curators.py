"""Tests of curators/: the models that curation asks"""

import csv
import json
import sys
import threading
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
from conftest import BLUE, GREEN, RED, SHARED, close, demo, moving_picture, randomise, smooth_clip, tiny_local_judge
from curators import Rejected, classical, paper
from curators.classical import Classical
from curators.paper import Paper
from media import MediaError, read_image, write_image, write_video


@pytest.fixture
def arguments(tmp_path):
    return lambda *words: curate.parse_arguments(["x", "--out", str(tmp_path), "--device", "cpu", *words])


def disc(count=9, size=96, places=((48, 48, 20),)):
    """A clip of a plain textured ground with red discs (x, y, radius) on it: uint8 (count, size, size, 3)."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    frame = (90 + 20 * torch.sin(rows / 5.0) + 20 * torch.cos(columns / 7.0))[..., None].repeat(1, 1, 3)
    for x, y, radius in places:
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        frame[inside] = torch.tensor(RED).float() + 25 * (rows[inside] / size)[:, None]  # lighter below
    return frame.clamp(0, 255).to(torch.uint8).repeat(count, 1, 1, 1)


def exact(path, frames, fps=8):
    write_video(path, frames, fps, None, media.EXACT_VIDEO_CODEC)
    return path


def made(folder, places):
    """Ground and synthesize an edit that brings discs -> models, clips, row, reference."""
    clips = exact(folder / "a.mp4", disc(places=())), exact(folder / "b.mp4", disc(places=places))
    models, row = Classical(SimpleNamespace(out=str(folder))), {"kind": "subject", "prompt": "Add a red ball."}
    row["box"], mask, row["key"], _ = models.ground(*clips, row)
    write_image(folder / "mask.png", mask[..., None].expand(-1, -1, 3).to(torch.uint8) * 255)
    return models, clips, row | {"mask": "mask.png"}, models.synthesize(*clips, mask, row)


def test_a_reference_that_is_shuffled_turned_or_cut_fails_verification(tmp_path):
    models, clips, row, picture = made(tmp_path, [(48, 40, 22), (48, 58, 14)])
    height, width = picture.shape[:2]
    tries = {"own": picture, "shuffled": picture.reshape(-1, 3)[torch.randperm(height * width)].view(picture.shape),
             "turned": picture.flip(0), "quarter": picture[: height // 2, : width // 2].contiguous()}  # fmt: skip
    for name, image in tries.items():
        write_image(tmp_path / f"{name}.jpg", image)
        assert models.verify(*clips, tmp_path / f"{name}.jpg", row)[0] == (name == "own"), name
    write_image(tmp_path / "noise.jpg", torch.randint(255, (200, 200, 3), dtype=torch.uint8))
    given = lambda name: models.verify(*clips, tmp_path / name, row | {"given_ref_image": name})
    assert given("own.jpg")[0] and given("noise.jpg") == (False, "it is noise")


@pytest.mark.parametrize("places, says", [
    ([(25, 30, 14), (70, 60, 14)], "the edit is in 2 large parts"), ([(-35, 48, 60)], "border cuts the object off"),
    ([], "nothing changed"),
])  # fmt: skip
def test_what_is_no_one_whole_object_is_rejected(tmp_path, places, says):
    with pytest.raises(Rejected, match=says):
        made(tmp_path, places)


def test_colours_that_contradict_the_difference_are_rejected():
    mask = torch.zeros(96, 96, dtype=torch.bool)
    mask[20:80, 5:90] = True  # much more than the disc
    with pytest.raises(Rejected, match="colours and difference disagree"):
        classical.whole_object(disc(1)[0], mask, mask.float())


def test_a_background_is_filled_only_where_little_of_it_is_never_seen():
    frame, foreground = disc(1, 128, places=())[0], torch.zeros(128, 128, dtype=torch.bool)
    foreground[44:68, 44:68] = True
    shown = torch.where(foreground[..., None], torch.tensor(BLUE, dtype=torch.uint8), frame)
    filled = classical.without_foreground(shown, foreground)
    assert torch.equal(filled[:36], frame[:36]) and (filled.float() - frame.float()).abs().mean() < 1.5
    hole = filled[46:66, 46:66].float()
    assert (hole[..., 2] > 180).float().mean() < 0.05 and hole.std() > 5  # waves like those around, no average
    foreground[20:100, 20:100] = True
    with pytest.raises(Rejected, match="of the background is never seen"):
        classical.without_foreground(shown, foreground)


@pytest.mark.parametrize("prompt, exchanged", [
    ("Add a red ball.", True), ("Replace the blue ball with a red one.", True), ("Add a ball.", False),
])  # fmt: skip
def test_a_pair_that_is_exchanged_is_found_by_the_colour_that_the_words_name(tmp_path, prompt, exchanged):
    a, b = exact(tmp_path / "a.mp4", disc()), exact(tmp_path / "b.mp4", disc(places=()))
    score = lambda *clips: np.mean(Classical(None).score(*clips, {"kind": "subject", "prompt": prompt}))
    assert score(b, a) > 8 and (score(a, b) < 6) == exchanged


def test_frames_to_be_scored_correspond_whatever_rate_the_files_claim(tmp_path, arguments):
    frames = moving_picture(65, 32, 32)  # and are cut to 4k + 1, as the release does
    clips = exact(tmp_path / "source.mp4", frames, 30), exact(tmp_path / "edit.mp4", 255 - frames[:61], 15)
    source, edit, indices = classical.look_at_pair(*clips)
    assert (source + edit - 1).abs().mean() < 0.005 and indices[-1] == 60
    asked, models = [], Paper(arguments("--set", "fps=1"))
    models.scorer, models.words = None, {"success": "<instruction>", "quality": "q"}
    for said, scores in (("[20, 20]", [8.0] * 5), ("[9, 9]", [3.6])):  # [3.6]: the middle pair alone
        asked.clear()
        models.ask = lambda model, prompt, images, read, schema: asked.append(images) or read(f'{{"score": {said}}}')
        assert models.score(*clips, {"prompt": "x"}) == scores
        assert [list(images) for images in asked] == [["source", "edited"], ["edited"]] * len(scores)
        assert (asked[0]["source"].float() - frames[30].float()).abs().mean() < 3
        assert all((pair["source"].float() + pair["edited"] - 255).abs().mean() < 3 for pair in asked[::2])


def test_clips_of_other_moments_or_another_aspect_are_not_compared(tmp_path, arguments):
    for name, count, height in (("a", 9, 64), ("b", 21, 64), ("c", 9, 96)):
        write_video(tmp_path / f"{name}.mp4", moving_picture(count, height, 64), 8)
    paths = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for compare in (classical.look_at_pair, lambda *clips: Paper(arguments()).score(*clips, {"prompt": "x"})):
        with pytest.raises(MediaError, match="not the same moments"):
            compare(*paths)
    with pytest.raises(MediaError, match="another aspect"):
        classical.look_at_pair(tmp_path / "a.mp4", tmp_path / "c.mp4")


@demo
def test_real_edits_are_cut_out_and_real_rubble_is_rejected(tmp_path):
    rows = {row["id"]: row for row in csv.DictReader((SHARED / "demo/pairs.csv").open())}
    table = tmp_path / "p.jsonl"
    table.write_text("\n".join(json.dumps(rows[name] | {"ref_image": ""}) for name in ("30", "31")))
    torn, glasses = curated(tmp_path / "out", table, "--base-path", SHARED / "demo")
    assert "in 3 large parts" in torn["reason"] and glasses["status"] == "kept"
    picture = read_image(tmp_path / "out" / glasses["ref_image"]).float()
    ink = picture[picture.amin(dim=2) < 240]
    assert 1.5 < picture.shape[1] / picture.shape[0] < 3 and ink[:, 0].mean() > 1.3 * ink[:, 1].mean()  # wide, and red


BOX, WHOLE = '{"bbox_2d": [100, 200, 500, 800], "label": "the man\'s hat"}', '{"bbox_2d": [0, 0, 1000, 1000]}'
HAT = ([0.1, 0.2, 0.5, 0.8], "the man's hat", None)


@pytest.mark.parametrize("read, answer, found", [
    (paper.read_box, f"```json\n[{BOX}]\n```", HAT), (paper.read_box, f"Here: {BOX} and so on", HAT),
    (paper.read_box, "[" + f"{BOX}, " * 30 + '{"bbox_2d": [100, 2', HAT),
    (paper.read_box, '{"bbox_2d": [100, 200, 500, 800]}', (HAT[0], "object", None)),
    (paper.read_box, f'[{BOX}, {{"bbox_2d": [1, 1, 50, 60]}}]', HAT),
    (paper.read_box, '{"bbox_2d": [], "label": ""}', Rejected), (paper.read_box, "I see no car.", vlm.Malformed),
    (paper.read_box, '[{"bbox_2d": [500, 200, 100, 800]}]', Rejected), (paper.read_box, f"[{WHOLE}]", Rejected),
    (paper.read_box, '[{"bbox_2d": [10, 10, 12, 12]}]', Rejected),
    (paper.read_box, '{"bbox_2d": [1, 2, 3]}', vlm.Malformed),
    (paper.read_scores, '{"reasoning": "fine", "score": [20, 25]}', 20),
    (paper.read_scores, '```json\n{"score": [7, 0]}\n```', 0), (paper.read_scores, 'So {"score": [3, 4', vlm.Malformed),
    (paper.read_scores, '{"score": [20, 26]}', vlm.Malformed), (paper.read_scores, '{"score": [20]}', vlm.Malformed),
    (paper.read_scores, '{"score": [true, 20]}', vlm.Malformed), (paper.read_scores, "20 and 25", vlm.Malformed),
    (paper.read_verdict, 'Well. {"reason": "same cup", "match": true}', (True, "same cup")),
    (paper.read_verdict, '{"match": "No", "reason": "half \\ud83d"}', (False, "half ?")),  # tables are UTF-8
    (paper.read_verdict, '{"match": "perhaps"}', vlm.Malformed), (paper.read_verdict, "", vlm.Malformed),
])  # fmt: skip
def test_an_answer_is_read_whatever_stands_around_it_and_never_guessed(read, answer, found):
    if isinstance(found, type):
        pytest.raises(found, read, answer)
    else:
        assert read(answer) == found


def test_editscore_is_asked_in_its_own_words_read_but_never_run(tmp_path):
    names = "context_no_delimit_reasoning_first 0shot_two_image_edit_rule 0shot_tie_rule_SC 0shot_rule_PQ".split()
    names = [f"_prompts_{name}" if name[0] == "0" else f"_{name}" for name in names]
    text = "\n".join(f'{name} = """{name[-3:]} 0 to 10, of <instruction>"""' for name in names)
    (tmp_path / "vie_prompts.py").write_text(text + "\nraise SystemExit('run')\n")
    words = paper.editscore_prompts(tmp_path / "vie_prompts.py")
    assert words["success"].split("\n")[2] == "_SC 0 to 25, of <instruction>" and "_PQ 0 to 25" in words["quality"]
    (tmp_path / "other.py").write_text("x = 1")
    with pytest.raises(ValueError, match="has no '_context"):
        paper.editscore_prompts(tmp_path / "other.py")


def tiny_paper_models(folder, args):
    """The paper's models, each of some 100,000 random weights: they run, `paper_answers` replaces their mumbling."""
    from transformers import CLIPConfig, CLIPModel, Sam3TrackerConfig, Sam3TrackerModel

    models, settings = Paper(args), vlm.Settings(device="cpu", max_pixels=64 * 64, max_tokens=2, as_user=True)
    asked = vlm.Local(tiny_local_judge(folder, "qwen3_vl"), settings)

    def ask(prompt, media, fps, schema):
        asked.answers([asked.prepare(prompt, media, fps)])
        return vlm.Answer(paper_answers(prompt), 1, 1, "tiny")

    asked.ask = ask
    models.scorer = models.grounder = models.verifier = vlm.Asker(asked, settings)
    models.words = {"success": "two whole numbers: <instruction>", "quality": "two whole numbers, natural"}
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    backbone = dict(small, model_type="sam3_vit_model", image_size=112, patch_size=14, window_size=4,
                    global_attn_indexes=[0], pretrain_image_size=112)  # fmt: skip
    config = Sam3TrackerConfig(
        vision_config=dict(backbone_config=backbone, fpn_hidden_size=32,
                           backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]]),
        prompt_encoder_config=dict(hidden_size=32, image_size=112),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32),
    )  # fmt: skip
    models.segmenter = Sam3TrackerModel(config).eval()
    vision = dict(small, image_size=32, patch_size=8)
    models.embedder = CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=24)).eval()
    return models


def paper_answers(prompt):
    if "two whole numbers" in prompt:
        return '{"score": [25, 16]}' if "natural" in prompt else '{"score": [25, 25]}'
    return BOX.replace("{", '{"kind": "subject", ') if "bbox_2d" in prompt else '{"match": true, "reason": "same"}'


class Editor:
    """Stands where diffusers' pipeline of 20 billion weights would, and keeps what it was asked."""

    def __init__(self):
        self.asked, self.seen = [], []

    def __call__(self, image, prompt, negative_prompt, true_cfg_scale, num_inference_steps, generator):
        from PIL import Image

        seed = torch.rand(1, generator=generator).item()
        self.asked.append((prompt, negative_prompt, true_cfg_scale, num_inference_steps, seed))
        self.seen.append(torch.from_numpy(np.array(image[0])))
        picture = torch.full((96, 96, 3), 255, dtype=torch.uint8)
        picture[24:80, 16:72] = self.seen[-1].float().mean(dim=(0, 1)).to(torch.uint8) // 2
        return SimpleNamespace(images=[Image.fromarray(picture.numpy())])


def test_the_paper_s_models_go_through_all_stages(tmp_path, nano_data, monkeypatch, arguments):
    pytest.importorskip("PIL", reason="needs Pillow, as diffusers does: pip install pillow")
    models = tiny_paper_models(tmp_path / "mllm", arguments())
    models.editor, frame, seen = Editor(), torch.randint(255, (60, 90, 3), dtype=torch.uint8), []
    models.segmenter.register_forward_pre_hook(lambda model, _, words: seen.append(words), with_kwargs=True)
    for level in (0, 1):
        assert paper.segment(models.segmenter, frame * 0 + 255 * level, HAT[0]).shape == (60, 90)
        assert (seen[-1]["pixel_values"] == 2 * level - 1).all()
    assert seen[0]["input_boxes"].flatten().tolist() == pytest.approx([11.2, 22.4, 56, 89.6])  # of 112 pixels
    assert close(models.embed([frame, frame.flip(0)]).norm(dim=1), torch.ones(2))
    part, true = torch.zeros(64, 64, dtype=torch.bool), paper.segment
    part[15:35, 10:30] = True
    monkeypatch.setattr(paper, "segment", lambda *asked: (true(*asked) | True) & part)
    monkeypatch.setattr(Paper, "setup", lambda self, stage: self.__dict__.update(models.__dict__))
    monkeypatch.setattr(Paper, "preflight", lambda self, stages: None)
    rows = curated(tmp_path / "out", nano_data / "video.csv", "--models", "paper", duplicate=1.1)
    assert len(kept_in(rows)) == len(rows) >= 2 and {row["kind"] for row in rows} == {"subject"}  # no table said it
    assert {(row["edit_score"], row["label"], row["verdict_reason"]) for row in rows} == {(8.0, HAT[1], "same")}
    assert {asked[1:4] for asked in models.editor.asked} == {(" ", 4.0, 40)}
    assert len({seed for *_, seed in models.editor.asked}) == len(rows)
    assert all(HAT[1] in prompt for prompt, *_ in models.editor.asked)
    white = [(seen == 255).all(-1).float().mean() for seen in models.editor.seen]  # what the mask leaves out
    assert all(0.02 < share < 0.6 for share in white)


def test_several_questions_go_through_a_local_model_together_and_get_their_own_answers(tmp_path):
    settings = vlm.Settings(device="cpu", max_pixels=64 * 64, max_tokens=6, as_user=True)
    model, asked = vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen3_vl"), settings), []
    randomise(model.mllm, 0.2)
    for name, size, colour in (("a", 64, RED), ("b", 96, BLUE), ("c", 64, GREEN)):
        write_image(tmp_path / f"{name}.png", smooth_clip(colour, 1, size)[0])
        asked.append(model.prepare(f"What is {name * 9}?", [("image", tmp_path / f"{name}.png")], 1.0))
    text = lambda said: getattr(said, "answer", said).text
    alone = [text(model.answers([question])[0]) for question in asked]
    assert list(map(text, model.answers(asked))) == alone and len(set(alone)) > 1


@pytest.mark.parametrize("style", ["base_model.model.model.language_model.layers", "base_model.model.model.layers"])
def test_an_adapter_is_merged_as_peft_would(tmp_path, style):
    asked = vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen3_vl"), vlm.Settings(device="cpu"))
    weight = asked.mllm.model.language_model.layers[1].self_attn.q_proj.weight
    before, a, b = weight.detach().clone(), torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    good = {f"{style}.1.self_attn.q_proj.lora_{part}.weight": x for part, x in (("A", a), ("B", b))}

    def merge(tensors, **config):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        paper.add_adapter(asked.mllm, tmp_path)

    for config, factor in (({}, 2), ({"use_rslora": True}, 4), ({"alpha_pattern": {"q_proj": 16}}, 4)):
        merge(good, **config)
        assert close(weight - before, factor * b @ a)
        before = weight.detach().clone()
    elsewhere = {key.replace("layers.1", "elsewhere.9"): value for key, value in good.items()}
    for tensors, says in ((elsewhere, "has 0 places"), (good | {"x.bias": torch.zeros(3)}, "not a key of a LoRA")):
        with pytest.raises(ValueError, match=says):
            merge(tensors)


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
    url, models = f"http://127.0.0.1:{server.server_port}/v1", Paper(arguments())
    for name in (url, f"{url}#absent"):
        with pytest.raises(ValueError, match="serves 2 models, first, wanted-VL: say which"):
            paper.open_model(name, models.args, "cpu")
    model = paper.open_model(f"{url}#wanted-VL", models.args, "cpu")
    Server.said[:] = ["hm", '<think>{"match": false}</think>{"match": true, "reason": "same"}']
    image = {"edited": smooth_clip(RED)[0]}
    assert models.ask(model, "Is it?", image, paper.read_verdict, paper.VERDICT) == (True, "same")
    (turn,) = (body := Server.asked[-1])["messages"]
    assert turn["role"] == "user" and body["temperature"] == 0 and body["max_tokens"] == 512
    assert [part["type"] for part in turn["content"]] == ["text", "image_url", "text"]
    assert body["response_format"]["json_schema"]["schema"]["properties"].keys() == {"reason", "match"}
    server.shutdown()


def test_all_models_are_looked_for_before_the_first_record(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "Qwen2.5-VL-7B").mkdir()
    there = [f"{name}={tmp_path}" for name in ("scorer", "grounder", "verifier", "embedder")]
    for stage, setting, says in (
        ("ground", "segmenter=nobody/gated", "segmenter=nobody/gated: .*ask for access on its page"),
        ("ground", f"grounder={tmp_path}/Qwen2.5-VL-7B", "take Qwen3-VL"),
        ("score", "fps=1", "pip install --no-deps editscore, or give its vie_prompts.py"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Paper(arguments("--set", *there, setting)).preflight([stage])
    Paper(arguments("--set", *there)).preflight(["verify"])
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="pip install diffusers pillow torchvision"):
        Paper(arguments("--set", *there)).preflight(["synthesize"])
    monkeypatch.setitem(paper.NEEDS, "ground", ["grounder"])
    with pytest.raises(ValueError, match="take Qwen3-VL"):  # whatever its folder is called
        judge = tiny_local_judge(tmp_path / "judge", "qwen2_5_vl")
        Paper(arguments("--set", f"grounder={judge}", "--device", "cpu")).setup("ground")


def test_the_editor_s_language_model_is_told_which_tokens_are_a_picture_s(tmp_path):
    mllm = randomise(vlm.Local(tiny_local_judge(tmp_path / "mllm", "qwen2_5_vl"), vlm.Settings(device="cpu")).mllm)
    picture = mllm.config.image_token_id
    ids = torch.tensor([[5, 6, *[picture] * 4, 7]])
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16, 1176),
             "image_grid_thw": torch.tensor([[1, 4, 4]])}  # fmt: skip
    plain, right = mllm(**words).logits, mllm(**words, mm_token_type_ids=(ids == picture).int()).logits
    paper.tell_of_pictures(mllm)
    assert torch.equal(mllm(**words).logits, right) and not close(plain, right, 1e-3)
