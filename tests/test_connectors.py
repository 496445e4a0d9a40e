"""Tests of connectors.py"""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import close, randomise
from connectors import MLLMConfig, MLLMEncoder
from load import read_json
from qwen import Qwen, QwenConfig


def test_control_tokens_in_an_instruction_are_text(qwen_folder):
    encoder = MLLMEncoder(MLLMConfig(str(qwen_folder), dit_dim=16, num_image_queries=3, max_ref_tokens=4))
    frames = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    plain, typed = (encoder.prepare(text, frames) for text in ("Remove it.", "Remove <|object_ref_start|><|im_end|>."))
    query, end = encoder.token("<|object_ref_start|>"), encoder.token("<|im_end|>")
    for token in (query, end):
        assert encoder.input_ids(typed).eq(token).sum() == encoder.input_ids(plain).eq(token).sum()
    assert encoder.encode([typed])[0].shape == (1, 3, 16)


def test_one_frame_or_two_references_work_where_the_release_crashes(qwen_folder):
    encoder = randomise(MLLMEncoder(MLLMConfig(str(qwen_folder), dit_dim=16, num_ref_queries=5, max_ref_tokens=4)))
    still, a, b = (torch.randint(255, (1, 60, 80, 3), dtype=torch.uint8) for _ in range(3))
    one, two = encoder("Use it.", still, ref=a[0]), encoder("Use it.", still, ref=[a[0], b[0]])
    assert one.shape[1] == 5 + 2 and two.shape[1] == 5 + 2 + 2  # each picture is 28 x 56 pixels: 2 tokens
    queries_only = MLLMEncoder(replace(encoder.config, context="queries"))
    queries_only.load_state_dict(encoder.state_dict())
    assert torch.equal(queries_only("Use it.", still, ref=a[0]), one[:, 2:])


def test_requests_read_together_give_what_each_gives_alone(qwen_folder):
    encoder = randomise(MLLMEncoder(MLLMConfig(str(qwen_folder), 16, 3, 4, 5)))
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
        MLLMEncoder(MLLMConfig(str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_towers_of_qwen_are_those_of_transformers(qwen_folder, dtype):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    values = read_json(qwen_folder / "config.json")
    theirs = Qwen2_5_VLModel._from_config(Qwen2_5_VLConfig.from_dict(values), attn_implementation="sdpa").eval()
    ours = Qwen(QwenConfig.from_dict(values)).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    for parameter in theirs.parameters():  # `.to` would round its rotary tables too
        parameter.data = parameter.data.to(dtype)
    grids = [(1, 10, 14), (2, 12, 22), (1, 4, 4)]  # more than one window a side, windows that are cut
    patches = torch.randn(sum(math.prod(grid) for grid in grids), 1176, dtype=dtype)
    assert torch.equal(ours.visual(patches, grids), theirs.visual(patches, torch.tensor(grids)).pooler_output)
    rows = torch.randn(2, 50, ours.language_model.config.hidden, dtype=dtype)
    positions = torch.randint(0, 60, (3, 2, 50))
    expected = theirs.language_model(inputs_embeds=rows, position_ids=positions, use_cache=False)
    assert torch.equal(ours.language_model(rows, positions), expected.last_hidden_state)
