"""Tests of lora.py, sizing.py and `train.py --preset lora`"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import sizing
import train
from conftest import HOUSE, lessons, losses, small_edit, tiny_dit
from dit import DiT
from kernels.linear import QuantLinear
from load import TensorFiles, load_weights
from lora import add_lora, inject_lora, quantise
from model import PRESETS, KiwiEdit

A, B = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
DOWN, UP = torch.randn(4, 64, generator=A), torch.randn(64, 4, generator=B)
LAYER, SCALE = "blocks.1.self_attn.q", torch.ones(())
DIALECTS = {  # layer, names of the two matrices, what else there is; factor of the update
    "diffusers": ("transformer.blocks.1.attn1.to_q", "lora_A.weight lora_B.weight", {}, 1.0),
    "comfy": (f"diffusion_model.{LAYER}", "lora_down.weight lora_up.weight", {"alpha": torch.tensor(2)}, 0.5),
    "ai-toolkit": (f"diffusion_model.{LAYER}", "lora_A.weight lora_B.weight", {}, 1.0),
    "kohya": ("lora_unet_blocks_1_self_attn_q", "lora_down.weight lora_up.weight", {"alpha": torch.tensor(8.0)}, 2.0),
    "musubi": ("lora_unet__blocks_1_self_attn_q", "lora_down.weight lora_up.weight", {}, 1.0),
    "diffsynth": (LAYER, "lora_A.default.weight lora_B.default.weight", {}, 1.0),
    "fastvideo": ("blocks.1.attn1.to_q", "lora_A lora_B", {"lora_rank": torch.tensor(4), "lora_alpha": 4 * SCALE}, 1.0),
}  # fmt: skip


def changes(tmp_path, tensors, scale=1.0):
    """What a file adds to a small DiT, by parameter, and the line that says so."""
    torch.manual_seed(0)
    dit = DiT(tiny_dit())
    before = {name: p.clone() for name, p in dit.named_parameters()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    said = add_lora(dit, tmp_path / "x.safetensors", scale)
    return {name: p - before[name] for name, p in dit.named_parameters() if not torch.equal(p, before[name])}, said


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_of_every_dialect_adds_alpha_over_rank_times_its_product(tmp_path, dialect):
    layer, names, more, factor = DIALECTS[dialect]
    tensors = dict(zip(names.split(), (DOWN, UP))) | more
    found, _ = changes(tmp_path, {f"{layer}.{name}": tensor for name, tensor in tensors.items()}, 0.5)
    assert found.keys() == {f"{LAYER}.weight"}
    assert torch.allclose(found[f"{LAYER}.weight"], 0.5 * factor * UP @ DOWN, atol=1e-5)


def test_dense_differences_are_added_and_those_of_unused_layers_are_named(tmp_path):
    shapes = {"blocks.0.self_attn.q.diff_b": (64,), "blocks.0.norm3.diff": (64,),
              "patch_embedding.diff": (64, 16, 1, 2, 2), "head.head.diff_b": (64,), "blocks.1.diff_m": (1, 6, 64),
              "head.modulation.diff": (1, 2, 64), "text_embedding.0.diff_b": (64,)}  # fmt: skip
    found, said = changes(tmp_path, {f"diffusion_model.{name}": torch.ones(shape) for name, shape in shapes.items()})
    assert found.keys() == {"blocks.0.self_attn.q.bias", "blocks.0.norm3.weight", "patch_embedding.weight",
                            "head.head.bias", "blocks.1.modulation", "head.modulation"}  # fmt: skip
    assert all(torch.allclose(update, torch.ones(()), atol=1e-5) for update in found.values())
    assert "1 keys of text_embedding are unused" in said


@pytest.mark.parametrize("key, says", [
    (f"{LAYER}.dora_scale", "is DoRA"), (f"{LAYER}.lokr_w1", "is LoKr"), (f"{LAYER}.hada_w1_a", "is LoHa"),
    ("blocks.9.ffn.0.diff_b", "has no such layer"), (f"{LAYER}.speed", "not a key of a LoRA"),
    (f"{LAYER}.lora_up.weight", "one of the two"), (f"{LAYER}.diff", "expected (64, 64)"),
])  # fmt: skip
def test_a_file_that_is_not_understood_whole_is_refused_by_name(tmp_path, key, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        changes(tmp_path, {key: torch.ones(3)})


def test_an_8_bit_base_keeps_what_is_small_and_trains_the_same_lora(tmp_path):
    torch.manual_seed(0)
    dit = DiT(tiny_dit())
    model = torch.nn.ModuleDict({"dit": dit})
    quantise(model, "fp8")
    kinds = {name: type(child) for name, child in dit.named_modules()}
    assert kinds["blocks.0.ffn.0"] is kinds["blocks.1.cross_attn.k"] is QuantLinear
    assert kinds["head.head"] is kinds["time_projection.1"] is torch.nn.Linear
    inject_lora(dit, 4, ("q", "ffn.0"))
    x, t = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0])
    dit(x, t, torch.randn(1, 3, 64)).square().mean().backward()
    assert dit.blocks[0].ffn[0].lora_B["default"].weight.grad.any() and not dit.blocks[0].ffn[0].stored.requires_grad


SMALL_LORA = ("dit_lora_rank=3", "lr=0.02")


def lora_run(lesson, held, out, *flags, settings=("steps=6",)):
    train.main(lessons(lesson, out, "--preset", "lora", "--val", held, *flags, settings=[*SMALL_LORA, *settings]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lesson, held):
    """A LoRA trained from a cache, for some steps that change the edit."""
    out = tmp_path_factory.mktemp("trained")
    lora_run(lesson, held, out / "cache", settings=[f"write_cache={out / 'cache'}"])
    lora_run(lesson, held, out / "run", "--cache", out / "cache")
    return out


def test_a_lora_trains_from_a_cache_as_from_files_without_mllm_and_vae(tmp_path, lesson, held):
    two = ["steps=2", "ref_shrink=1"]
    lora_run(lesson, held, tmp_path / "plain", settings=two)
    lora_run(lesson, held, tmp_path / "c", settings=["ref_shrink=1", f"write_cache={tmp_path / 'c'}"])
    lora_run(lesson, held, tmp_path / "run", "--cache", tmp_path / "c", settings=two)
    for name in ("loss", "val"):
        assert losses(tmp_path / "run", name) == losses(tmp_path / "plain", name)
    saved = load_file(tmp_path / "run/step-000002/weights.safetensors")
    assert saved and all(".lora_" in name and name.startswith("dit.") for name in saved)


def test_a_lora_is_exported_in_each_format_and_edits_as_its_run(tmp_path, lesson, trained, capsys):
    open_ = lambda path: KiwiEdit.from_pretrained(path, dtype=torch.float32)
    run = small_edit(open_(trained / "run")).int()
    assert (small_edit(open_(lesson / "weights")).int() - run).abs().max() > 3
    for style in ("peft", "comfy", "kohya"):
        train.main(["--export-lora", str(trained / "run"), "--format", style, "--out", str(tmp_path / style)])
        model = open_(lesson / "weights")
        assert "parameters changed" in add_lora(model.dit, tmp_path / style)
        assert (small_edit(model).int() - run).abs().max() <= 1
    train.main(["--export", str(trained / "run"), "--out", str(tmp_path / "whole")])
    assert (small_edit(open_(tmp_path / "whole")).int() - run).abs().max() <= 1
    words = [lesson / "video_1_src.mp4", "Invert it.", "--weights", lesson / "weights", "--steps", 1]
    words += ["-o", tmp_path / "o.mp4", "--lora", f"{tmp_path / 'peft'}:0.5", tmp_path / "kohya", "--quantise", "int8"]
    sample.main(list(map(str, words)))
    said = capsys.readouterr().out
    assert "scale 0.5" in said and "scale 1" in said and "int8" in said and (tmp_path / "o.mp4").is_file()


def test_held_out_loss_is_fixed_and_by_kind_and_quarter(tmp_path, lesson, held, trained):
    first, last = losses(trained / "run", "val")[:1], losses(trained / "run", "val")[-1:]
    lora_run(lesson, held, tmp_path / "again", "--cache", trained / "cache", settings=["steps=1", "lr=0.1"])
    assert losses(tmp_path / "again", "val")[:1] == first != last
    line = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[0])
    for names in (("image", "video", "ref"), ("q1", "q2", "q3", "q4")):
        assert line["val"] == pytest.approx(sum(line[f"val_{name}"] for name in names) / len(names))


@pytest.mark.parametrize("flags, dtype", [(["--quantise", "fp8"], ""), (["--quantise", "int8"], "bfloat16"),
                                          (["--mllm"], "")])  # fmt: skip
def test_a_lora_trains_on_an_8_bit_base_in_16_bits_and_with_the_mllm_from_a_cache(
    tmp_path, lesson, held, trained, flags, dtype
):
    settings, cache = ["steps=3", f"dtype={dtype}"], tmp_path / "cache"
    lora_run(lesson, held, cache, *flags, settings=[*settings, f"write_cache={cache}"])
    lora_run(lesson, held, tmp_path / "run", "--cache", cache, *flags, settings=settings)
    val = losses(tmp_path / "run", "val")
    assert val[-1] < val[0] and val[0] == pytest.approx(losses(trained / "run", "val")[0], rel=0.1)
    saved = load_file(next((tmp_path / "run").glob("step-*")) / "weights.safetensors")
    assert any(name.startswith("mllm") for name in saved) == (flags == ["--mllm"])
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


@pytest.mark.parametrize("old", [True, False])
def test_comfyui_s_scaled_8_bit_files_are_read_as_stored_times_scale(tmp_path, old):
    torch.manual_seed(0)
    dit, scale, key = DiT(tiny_dit()), torch.tensor(0.02), f"model.diffusion_model.{LAYER}"
    word = lambda text: torch.tensor(list(text), dtype=torch.uint8)
    state = {f"model.diffusion_model.{name}": p.detach() for name, p in dit.named_parameters()}
    state[f"{key}.weight"] = (state[f"{key}.weight"] / scale).to(torch.float8_e4m3fn)
    stored = state[f"{key}.weight"].float() * scale
    for name in ("scale_weight", "scale_input") if old else ("weight_scale", "input_scale"):
        state[f"{key}.{name}"] = scale.clone()
    if old:
        state["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    else:
        state[f"{key}.comfy_quant"] = word(b'{"format": "float8_e4m3fn"}')
    save_file(state, tmp_path / "x.safetensors")
    model = torch.nn.ModuleDict({"dit": DiT(tiny_dit())})
    load_weights(model, TensorFiles().add(tmp_path / "x.safetensors"))
    assert torch.equal(model["dit"].blocks[1].self_attn.q.weight, stored.bfloat16().float())
    assert torch.equal(model["dit"].blocks[0].ffn[0].weight, dit.blocks[0].ffn[0].weight)
    save_file(state | {f"{key}.comfy_quant": word(b'{"format": "nvfp4"}')}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=f"{LAYER} is stored as nvfp4"):
        TensorFiles().add(tmp_path / "y.safetensors")


STEP = r"""
import re, sys, torch
from dataclasses import replace
from types import SimpleNamespace
import start, train
from model import PRESETS, Contexts, KiwiEdit
from parallel import compute_in, parallelise
from lora import quantise
stage, preset = train.STAGES["lora"][1], PRESETS["wan22_5b"]
config = replace(preset, dit=replace(preset.dit, num_layers=2), vae=None, mllm=None)
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
x, context = torch.randn(1, 48, 5, 16, 20), torch.randn(1, 512, 3072, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16))
before = peak()
torch.set_default_dtype(torch.bfloat16)
ranks = SimpleNamespace(sp=1, world=1, parallel="ddp", dtype=torch.bfloat16)
model = KiwiEdit(config)
if len(sys.argv) > 1:
    quantise(model, sys.argv[1], parts=["dit"])
start.choose_trained(model, stage, ranks)
torch.set_default_dtype(torch.float32)
for p in model.parameters():
    p.data = p.data.float() if p.requires_grad else p.data
compute_in(model, torch.bfloat16)
module = parallelise(model, ranks)
open("/proc/self/clear_refs", "w").write("5")  # the peak of the steps, not of the quantising
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
for p in trained.values():
    p.grad = torch.zeros_like(p)
optimizers = train.make_optimizers(stage, trained)
[optimizer.step() for optimizer in optimizers]  # moments, as from the second step on
module(Contexts([context]), x, torch.tensor([500.0]), x).backward()
[optimizer.step() for optimizer in optimizers]
print(peak() - before)
"""


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_the_dry_run_s_memory_is_what_a_step_at_the_5b_s_widths_takes(kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(HOUSE)}
    words = [sys.executable, "-c", STEP, *[kind] * bool(kind)]
    measured = int(subprocess.run(words, capture_output=True, text=True, env=environment).stdout.split()[-1])
    preset, stage = PRESETS["wan22_5b"], replace(train.STAGES["lora"][1], ref=0)
    config = replace(preset, dit=replace(preset.dit, num_layers=2))
    need = sum(sizing.memory(config, stage, (17, 256, 320), cache=True, quantise=kind).values())
    print(f"measured {measured / 2**30:.2f} GiB, estimated {need / 2**30:.2f}")
    assert abs(need / measured - 1) < 0.15


def test_a_dry_run_needs_no_weights_and_says_which_cards_fit(capsys):
    for flags, card in (([], "16"), (["--quantise", "fp8"], "12")):
        train.main(["--preset", "lora", "--dry-run", "--cache", "none", *flags])
        said = capsys.readouterr().out
        assert "49x480x832" in said and "dit.lora" in said and f"fits cards of {card}," in said
    assert "kiwi-edit-5b" in train.parse_arguments(["--preset", "lora"]).weights, "a LoRA starts from the release"
    train.main(["--config", "wan21_14b", "--preset", "released", "--stage", "2", "--gpus", "8", "--dry-run"])
    assert "GiB of a card (8 cards, 49x" in capsys.readouterr().out
