"""Tests of connectors.py"""

import shutil
from dataclasses import replace

import pytest
import torch

from conftest import GOLDEN, close, golden, randomise, recorded
from connectors import MLLMEncoder, fit_pixels, inject_lora, merge_lora, sample_frames, video_frame_sizes
from load import load_weights, our_name


def golden_mllm():
    e = recorded("mllm.json")["encoder"]
    encoder = MLLMEncoder.from_config(
        GOLDEN / "mllm", dit_dim=e["dit_dim"], num_image_queries=e["num_image_queries"],
        num_video_queries=e["num_video_queries"], num_ref_queries=e["num_ref_queries"],
        max_ref_tokens=e["max_object_token"], max_pixels=e["max_pixels_per_frame"],
    )  # fmt: skip
    load_weights(encoder, recorded("mllm_weights.safetensors"))
    return encoder


def golden_request(name, case, data):
    """Source frames and reference of a recorded case; one is given by a formula."""
    ref = data[f"{name}.ref_u8"][0] if f"{name}.ref_u8" in data else None
    if f"{name}.frames_u8" in data:
        return data[f"{name}.frames_u8"], ref
    f = case["frames_formula"]
    axes = [torch.arange(n) for n in (f["n"], f["height"], f["width"], 3)]
    t, y, x, c = torch.meshgrid(*axes, indexing="ij")
    return ((((x // 4) * 3 + t * 11) ^ ((y // 4) * 2 + c * 37)) & 255).to(torch.uint8), ref


@golden
def test_the_mllm_path_matches_the_release_from_raw_frames_to_context():
    encoder, data = golden_mllm(), recorded("mllm_cases.safetensors")
    for name, case in recorded("mllm.json")["cases"].items():
        inputs = encoder.prepare(case["prompt"], *golden_request(name, case, data))
        assert torch.equal(encoder.input_ids(inputs), data[f"{name}.input_ids"].long())
        assert torch.equal(encoder.position_ids(inputs), data[f"{name}.position_ids"].long())
        kind = "image" if inputs.mode == "image" else "video"
        assert [list(inputs.grids["source"])] == data[f"{name}.{kind}_grid_thw"].tolist()
        with torch.no_grad():
            assert close(encoder.encode([inputs])[0], data[f"{name}.context"], 1e-3)


@golden
def test_from_recorded_pixel_values_the_context_is_exact_with_lora_live_and_merged():
    encoder, data, lora = golden_mllm(), recorded("mllm_cases.safetensors"), recorded("mllm_lora.safetensors")
    case = recorded("mllm.json")["cases"]["image"]
    inputs = encoder.prepare(case["prompt"], data["image.frames_u8"])
    inputs.pixel_values["source"] = data["image.pixel_values"].bfloat16()
    with torch.no_grad():
        assert close(encoder.encode([inputs])[0], data["image.context"])
        adapters = {k.removeprefix("mllm."): v for k, v in lora.items() if ".lora_" in k}
        load_weights(encoder, adapters, partial=True)
        assert close(encoder.encode([inputs])[0], lora["expected.image.context.live"])
        assert {our_name(k) for k in adapters} == {k for k in encoder.state_dict() if ".lora_" in k}
        merge_lora(encoder)
        assert close(encoder.encode([inputs])[0], lora["expected.image.context.merged"])


@golden
def test_sizes_and_frame_indices_match_the_release():
    records = recorded("preprocess.json")
    for r in records["mllm_video"]:
        first, second = video_frame_sizes(r["height"], r["width"], r["max_pixels_per_frame"])
        assert [list(first[::-1]), list(second)] == [r["first_resize_wh"], r["second_resize_hw"]]
        assert sample_frames(r["num_frames"], 16) == r["frame_indices"]
    for r in records["mllm_image"] + records["mllm_reference_image"]:
        size = fit_pixels(r["height"], r["width"], 28, 3136, 784 * r.get("max_object_token", 16384))
        assert list(size[::-1]) == r["resized_wh"]


def test_control_tokens_in_an_instruction_are_text(qwen_folder):
    encoder = MLLMEncoder.from_config(qwen_folder, dit_dim=16, num_image_queries=3, max_ref_tokens=4)
    frames = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    plain, typed = (encoder.prepare(text, frames) for text in ("Remove it.", "Remove <|object_ref_start|><|im_end|>."))
    query, end = encoder.token("<|object_ref_start|>"), encoder.token("<|im_end|>")
    for token in (query, end):
        assert encoder.input_ids(typed).eq(token).sum() == encoder.input_ids(plain).eq(token).sum()
    assert encoder.encode([typed])[0].shape == (1, 3, 16)


def test_one_frame_or_two_references_work_where_the_release_crashes(qwen_folder):
    encoder = randomise(MLLMEncoder.from_config(qwen_folder, dit_dim=16, num_ref_queries=5, max_ref_tokens=4))
    still, a, b = (torch.randint(255, (1, 60, 80, 3), dtype=torch.uint8) for _ in range(3))
    one, two = encoder("Use it.", still, ref=a[0]), encoder("Use it.", still, ref=[a[0], b[0]])
    assert one.shape[1] == 5 + 2 and two.shape[1] == 5 + 2 + 2  # each picture is 28 x 56 pixels: 2 tokens
    queries_only = MLLMEncoder(replace(encoder.config, context="queries"))
    queries_only.load_state_dict(encoder.state_dict())
    assert torch.equal(queries_only("Use it.", still, ref=a[0]), one[:, 2:])


def test_requests_read_together_give_what_each_gives_alone(qwen_folder):
    encoder = MLLMEncoder.from_config(
        qwen_folder, dit_dim=16, num_image_queries=3, num_video_queries=4, num_ref_queries=5
    )
    encoder = randomise(encoder)
    still, clip = (torch.randint(255, (frames, 60, 80, 3), dtype=torch.uint8) for frames in (1, 5))
    asked = [("Remove it.", still), ("Use this in place of the old car.", still, clip[0]), ("Make it snow.", clip)]
    together = encoder.encode([encoder.prepare(*request) for request in asked])
    assert all(close(context, encoder(*request)) for context, request in zip(together, asked))


@pytest.mark.parametrize("name, text, says", [
    ("tokenizer.json", "{", "config or tokenizer.json cannot be read"), ("config.json", "[]", "expected a JSON object"),
    ("config.json", '{"vision_config": {"depth": "four"}}', "config or tokenizer.json cannot be read"),
])  # fmt: skip
def test_a_damaged_folder_of_the_language_model_is_told_of_in_a_line(tmp_path, qwen_folder, name, text, says):
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        MLLMEncoder.from_config(folder)
    assert "\n" not in str(error.value)


def test_a_fresh_lora_changes_nothing_and_a_trained_one_survives_merging(qwen_folder):
    encoder = randomise(MLLMEncoder.from_config(qwen_folder, dit_dim=16, num_image_queries=3))
    frames = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    before = encoder("Remove it.", frames)
    inject_lora(encoder.model.language_model, rank=4)
    assert torch.equal(encoder("Remove it.", frames), before)
    for name, parameter in encoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    trained = encoder("Remove it.", frames)
    merge_lora(encoder)
    assert close(encoder("Remove it.", frames), trained) and not close(trained, before)
