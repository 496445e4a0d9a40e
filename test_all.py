"""The house, tested: the second documentation. `pytest` runs this file and tests/ (faults, formats, kills).

Recorded outputs of the released code lie in ../shared/golden; a test that needs them skips aloud without them.
"""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import (
    GOLDEN,
    HOUSE,
    begun,
    close,
    go,
    golden,
    golden_pipeline,
    losses,
    manifest,
    moving_picture,
    recorded,
    save_diffusers_layout,
    save_training_layout,
    small_edit,
    small_model,
    steps_of,
    trainer_of,
    write_qwen_folder,
)
from connectors import MLLMConfig, MLLMEncoder, fit_pixels, sample_frames, video_frame_sizes
from dit import DiT
from load import load_weights, our_name
from lora import merge_lora
from model import PRESETS, FlowMatch, KiwiEdit
from vae import VAE

# Parity with the release


def golden_mllm():
    names = ("dit_dim", "num_image_queries", "num_video_queries", "num_ref_queries", "max_object_token")
    sizes = [recorded("mllm.json")["encoder"][name] for name in (*names, "max_pixels_per_frame")]
    encoder = MLLMEncoder(MLLMConfig(str(GOLDEN / "mllm"), *sizes[:5], max_pixels=sizes[5]))
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


@golden
def test_the_schedules_match_the_release():
    schedules = recorded("scheduler.json")
    for kind, sigma_min in (("official", 0.0), ("released_diffusers", 0.003 / 1.002)):
        for r in schedules[kind]["inference"]:
            if r["denoising_strength"] == 1.0:
                sigmas = FlowMatch(r["shift"], sigma_min).sigmas(r["num_inference_steps"])
                assert sigmas[:-1].tolist() == r["sigmas"] and sigmas[-1] == 0
    training, sampled = schedules["training"], schedules["training"]["sampled"]
    assert FlowMatch().timesteps(1000).tolist() == training["timesteps"]
    for suffix, names in (
        ("", ("timestep", "sigma", "weight")),
        ("bf16", ("timestep_bf16", "sigma_from_bf16", "weight_from_bf16")),
    ):
        t, sigma, weight = (torch.tensor([r[name] for r in sampled]) for name in names)
        ours = FlowMatch().training_sigmas(t)
        assert torch.allclose(ours[0], sigma, atol=1e-6) and torch.allclose(ours[1], weight, atol=1e-5), suffix


@golden
def test_the_whole_edit_matches_the_release_from_pictures_to_pictures():
    model, spec, data = golden_pipeline()
    for name, case in spec["cases"].items():
        ref = data[f"{name}.ref_u8"][0] if case["has_reference"] else None
        edited = model.edit(data[f"{name}.source_u8"], case["prompt"], ref, steps=4, seed=case["seed"])
        assert (edited.int() - data[f"{name}.frames_u8"].int()).abs().max() <= 1
        latents = (data[f"{name}.source_latents"], data.get(f"{name}.ref_latents"))
        final = model.denoise(data[f"{name}.noise"], data[f"{name}.context"], *latents, steps=4)
        assert close(final, data[f"{name}.latents.3"], 1e-5)


@golden
def test_the_training_loss_and_its_gradients_match_the_release():
    model, spec, data = golden_pipeline()
    take = lambda name: data[f"training.{name}"]
    for i, r in enumerate(spec["training"]):
        model.zero_grad()
        t = torch.tensor([r["timestep"]])
        loss = model.training_loss(
            take("input_latents"), take("context"), t, take("source_latents"), take("ref_latents"), take("noise")
        )
        loss.backward()
        assert abs(loss.item() - r["loss"]) < 1e-4 * r["loss"]
        for ours, theirs in (("source_embedder", "vae_condition"), ("ref_embedder", "ref_vae_condition")):
            gradient = getattr(model, ours).patch_embedding.bias.grad
            assert close(gradient, take(f"{i}.grad.{theirs}.patch_embedding.bias"))


MANIFESTS = {
    "dit_wan2.2_ti2v_5b": "wan22_5b", "dit_wan2.1_t2v_14b": "wan21_14b", "dit_wan2.1_t2v_1.3b": "wan21_1_3b",
    "vae_wan2.2": "wan22_5b", "vae_wan2.1": "wan21_14b",
}  # fmt: skip


@golden
@pytest.mark.parametrize("name", MANIFESTS)
def test_the_real_sizes_take_exactly_the_published_names_and_shapes(name):
    preset = PRESETS[MANIFESTS[name]]
    with torch.device("meta"):
        module = VAE(preset.vae) if name.startswith("vae") else DiT(preset.dit)
    weights = manifest(name)
    assert load_weights(module, weights) == []
    lost = next(iter(weights))
    with pytest.raises(ValueError, match=re.escape(lost)):
        load_weights(module, {k: v for k, v in weights.items() if k != lost})
    with pytest.raises(ValueError, match="1 unexpected: stranger"):
        load_weights(module, {**weights, "stranger": weights[lost]})


@golden
def test_the_released_checkpoints_of_every_stage_and_layout_are_taken_in_full(real_qwen_folder):
    preset = PRESETS["wan22_5b"]
    preset = replace(preset, mllm=replace(preset.mllm, folder=str(real_qwen_folder)))
    base = {f"mllm.{k}": v for k, v in manifest("qwen2.5_vl_3b_instruct").items()}
    base |= {f"dit.{k}": v for k, v in manifest("dit_wan2.2_ti2v_5b").items()}
    base |= {f"vae.model.{k}": v for k, v in manifest("vae_wan2.2").items()}
    for stage in (1, 2, 3):
        with torch.device("meta"):
            model = KiwiEdit(preset)
        missing = load_weights(model, base, partial=True)
        lora = load_weights(model, manifest(f"trainable_5b_stage{stage}"), partial=True)
        untrained = {name for name in set(missing) & set(lora) if ".lora_" not in name}
        assert bool(untrained) == (stage < 3), sorted(untrained)[:9]
    folder = {"transformer": "dit", "mllm_encoder": "mllm"}
    with torch.device("meta"):
        model = KiwiEdit(replace(preset, vae=None))
    weights = {
        re.sub(r"^(\w+)/", lambda m: folder.get(m[1], m[1]) + ".", k): v for k, v in manifest("diffusers_5b").items()
    }
    weights |= {f"mllm.{k}": v for k, v in manifest("qwen2.5_vl_3b_instruct").items()}
    assert load_weights(model, {k: v for k, v in weights.items() if not k.startswith("vae.")}) == []


def test_all_three_layouts_load_to_the_same_model(tmp_path, qwen_folder):
    model = small_model(qwen_folder).eval()
    model.config = replace(model.config, ref_pad_first=True)
    model.save(tmp_path / "own")
    diffusers = save_diffusers_layout(model, tmp_path / "diffusers")
    checkpoint = save_training_layout(model, tmp_path)
    expected = model.state_dict()
    for path in (tmp_path / "own", diffusers):
        loaded = KiwiEdit.from_pretrained(path, dtype=torch.float32)
        assert loaded.config.ref_pad_first and loaded.config.mllm.max_pixels == 64 * 64
        loaded = loaded.state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in expected)
    for path in (diffusers / "ref_embedder").glob("*.safetensors"):  # as the converter leaves instruct-only weights
        path.unlink()
    plain = KiwiEdit.from_pretrained(diffusers, dtype=torch.float32)
    assert not plain.ref_embedder.patch_embedding.weight.any()
    (tmp_path / "hub").mkdir()  # as a repository that holds a training checkpoint alone
    checkpoint = checkpoint.rename(tmp_path / "hub" / "step-15000.safetensors").parent
    bases = dict(base=tmp_path / "wan", qwen=tmp_path / "qwen", ref_pad_first=True)
    loaded = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, **bases)
    assert loaded.config.ref_pad_first
    loaded = loaded.state_dict()
    differing = {k for k in expected if not torch.equal(loaded[k], expected[k])}
    assert loaded.keys() == expected.keys()
    assert differing == {"mllm.model.language_model.layers.0.self_attn.q_proj.weight"}  # where the LoRA was merged


def test_an_index_names_the_files_that_are_read_and_copies_are_refused(tmp_path):
    folder = save_diffusers_layout(small_model(write_qwen_folder(tmp_path / "qwen")), tmp_path / "d")
    expected = KiwiEdit.from_pretrained(folder, dtype=torch.float32).state_dict()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v.half() + 7 for k, v in tensors.items()}, file.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match=r"model.fp16.safetensors and .*model.safetensors both hold"):
        KiwiEdit.from_pretrained(folder)
    index = {"weight_map": dict.fromkeys(tensors, file.name)}
    (file.parent / f"{file.name}.index.json").write_text(json.dumps(index))
    loaded = KiwiEdit.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())
    file.rename(file.with_name("moved.safetensors"))
    with pytest.raises(FileNotFoundError, match=f"{file.name} is missing"):
        KiwiEdit.from_pretrained(folder)


# An edit


def test_an_edit_is_reproducible_keeps_its_shape_and_survives_offload_and_tiles(qwen_folder):
    model = small_model(qwen_folder).eval()
    torch.manual_seed(1)
    first = small_edit(model)
    torch.manual_seed(1)
    assert first.shape == (6, 32, 64, 3) and torch.equal(small_edit(model), first)
    picture = torch.randint(255, (40, 50, 3), dtype=torch.uint8)
    source = moving_picture(6, 32, 64)
    plain = model.edit(source, "Replace the sky.", [picture, picture], steps=2, seed=3)
    other = model.edit(source, "Replace the sky.", [picture, picture], steps=2, seed=3, tile=1, offload_to="cpu")
    assert (plain.int() - other.int()).abs().max() <= 1
    assert not torch.equal(plain, model.edit(source, "Replace the sky.", [picture, picture], steps=2, seed=4))


# Training


def part_of(name):
    if ".lora_" in name:
        return "lora"
    if name.startswith("dit."):
        return "text_embedding" if ".text_embedding." in name else "dit"
    return ".".join(name.split(".")[: 2 if name.startswith("mllm.") else 1])


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_changes_exactly_the_parameters_that_the_stage_trains(tmp_path, lesson, preset, stage):
    with trainer_of(lesson, tmp_path, "global_batch=6", flags=["--preset", preset], stage=stage) as trainer:
        model = trainer.model
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first, and then A would have no gradient
                torch.nn.init.normal_(parameter)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.batches = iter(trainer.loader())
        assert trainer.step()["skipped"] == 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"lora", "mllm.image_queries", "mllm.connector"}
    expected |= {"mllm.video_queries", "dit", "source_embedder"} if stage > 1 else set()
    expected |= {"mllm.ref_queries", "mllm.ref_connector", "ref_embedder"} if stage > 2 else set()
    assert changed == {name for name in before if part_of(name) in expected}


def test_each_stage_starts_from_the_one_before_and_its_checkpoint_edits(tmp_path, lesson):
    for stage in (1, 2, 3):
        before = f"{tmp_path}/{stage - 1}" if stage > 1 else lesson / "weights"
        go(lesson, tmp_path / str(stage), "--weights", before, stage=stage, settings=["steps=1"])
    checkpoint = tmp_path / "3" / "step-000001" / "weights.safetensors"
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=lesson / "weights")
    assert small_edit(model).shape == (6, 32, 64, 3)
    first, last = (load_file(tmp_path / stage / "step-000001" / "weights.safetensors") for stage in "13")
    name = "mllm.model.model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert first[name].any() and not torch.equal(first[name], last[name]) and first.keys() < last.keys()


def test_a_run_killed_at_any_point_goes_on_to_the_same_weights_bit_for_bit(tmp_path, lesson):
    settings = ["steps=7", "pixels=4096,6144", "optimizer=muon"]  # which has AdamW beside it
    go(lesson, tmp_path / "whole", settings=settings)
    dice, kills, out = random.Random(0), 0, tmp_path / "killed"
    while True:
        before, workers = steps_of(out), f"workers={kills % 3}"
        process = begun(lesson, out, "--resume", "auto", settings=[*settings, "save_every=1", workers])
        while process.poll() is None and steps_of(out) <= before:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.3)
        if process.poll() is not None or kills == 3:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait(100) == 0, process.stderr.read()
    assert kills and losses(out) == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match="cannot go on with optimizer muon -> adamw"):
        go(lesson, out, "--resume", "auto", settings=settings[:2])
    a, b = (load_file(run / "step-000007" / "weights.safetensors") for run in (tmp_path / "whole", out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in out.iterdir() if "step" in p.name) == ["step-000005", "step-000006", "step-000007"]


# The stories of README's "Change it"


def stories():
    """(title, [(language, code)]) of every change that README's section shows."""
    section = re.search(r"^## Change it\n(.*?)^## ", (HOUSE / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    for title, text in re.findall(r"^\*\*(.*?)\*\*(.*?)(?=^\*\*|\Z)", section, re.DOTALL | re.MULTILINE):
        yield title, re.findall(r"```(python|yaml|bash)\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("title, blocks", list(stories()), ids=[title for title, _ in stories()])
def test_a_story_of_the_readme_runs_in_a_copy_of_the_house(tmp_path, nano_data, title, blocks):
    copy = tmp_path / "house"
    copy.mkdir()
    for name in subprocess.check_output(["git", "ls-files"], cwd=HOUSE, text=True).splitlines():
        if not name.startswith(("weights/", "tests/")) and (HOUSE / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(HOUSE / name, copy / name)
    (copy / "weights").symlink_to(HOUSE / "weights")
    shutil.copytree(nano_data, copy / "data" / "nano")
    rows = [dict(row) for row in csv.DictReader((nano_data / "image.csv").open())]
    (copy / "data" / "nano" / "image.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for language, code in blocks:
        if language != "bash":
            target = copy / re.match(r"# (\S+)", code)[1]
            text, last, run = (target.read_text() if target.is_file() else "").rpartition("\n\nif __name__ ==")
            target.write_text(f"{text}\n\n{code}{last}{run}" if last else f"{run}\n\n{code}")
            continue
        for line in code.strip().splitlines():
            words = shlex.split(line, comments=True)
            done = subprocess.run([sys.executable, *words[1:]], cwd=copy, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
