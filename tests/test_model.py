"""Tests of model.py"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import (
    close,
    golden,
    manifest,
    moving_picture,
    randomise,
    save_training_layout,
    small_edit,
    small_model,
    tiny_dit,
)
from dit import DiT
from load import TensorFiles, load_weights
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit, balance_weights


def test_a_loss_without_the_bell_takes_all_timesteps_alike_also_the_first_of_an_edit():
    t = torch.tensor([1000.0, 700.0])
    bell, none = (FlowMatch(20.0, weighting=w).training_sigmas(t)[1] for w in ("bell", "none"))
    assert bell[0] == 0 < bell[1] and none.tolist() == [1, 1]


def test_a_balanced_loss_hears_a_small_change_and_a_small_rest():
    source = torch.randn(3, 16, 2, 4, 4)
    target = source.clone()
    target[0, :, 0, 0, 0] += 30  # one place of 32
    target[1, :, :, 1:] += 30  # all but 8
    weights = balance_weights(target, source)
    assert torch.allclose(weights.mean(dim=(1, 2, 3, 4)), torch.ones(3)) and torch.allclose(weights[2], torch.ones(()))
    small, rest = weights[0, 0, 0, 0, 0] / weights[0, 0, 1, 0, 0], weights[1, 0, 0, 0, 0] / weights[1, 0, 0, 1, 0]
    assert abs(small - 31**0.5) < 0.1 and abs(rest - 3**0.5) < 0.1  # the root of (kept / changed)
    model, t, context = denoiser(), torch.tensor([300.0]), torch.randn(1, 3, 64)
    noise = torch.randn(1, 16, 2, 4, 4)
    sigma, weight = FlowMatch().training_sigmas(t)
    noisy = (1 - sigma) * target[:1] + sigma * noise
    error = model.velocity(noisy, t, context, source[:1]) - (noise - target[:1])
    loss = model.training_loss(target[:1], context, t, source[:1], noise=noise, balance=True)
    assert torch.allclose(loss, weight * (weights[:1] * error.square()).mean(), rtol=1e-5)


def denoiser(**changes):
    return randomise(KiwiEdit(KiwiConfig(tiny_dit(), **changes)))


def test_a_batch_with_sources_and_two_references_equals_its_items():
    model = denoiser()
    x, source, context = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 64)
    ref, t = torch.randn(2, 16, 2, 4, 6), torch.tensor([900.0, 100.0])
    both = model.velocity(x, t, context, source, ref)
    for i in range(2):
        one = slice(i, i + 1)
        assert close(model.velocity(x[one], t[one], context[one], source[one], ref[one]), both[one], 1e-5)


@pytest.mark.parametrize("how, share", [
    ("add_scaled", 0.3), ("add_learned", 0.3), ("add_unscaled", 1), ("add_shared_patch_embed", 0.3),
    ("channel_concat", 1),
])  # fmt: skip
def test_every_way_to_inject_the_source_of_the_paper_adds_its_patches(how, share):
    model, t = denoiser(source=how), torch.tensor([300.0])
    for name, parameter in model.source_embedder.named_parameters():
        if name.startswith("learned"):  # starts as sigma(t)
            torch.nn.init.zeros_(parameter)
    x, source, context = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 64)
    patch = getattr(model.source_embedder, "patch_embedding", model.dit.patch_embedding)
    if how == "channel_concat":  # the source's channels come second
        patch = lambda z: torch.nn.functional.conv3d(z, model.source_embedder.weight, stride=(1, 2, 2))
    assert close(model.inject(x, t, source) - model.inject(x, t, None), patch(source) * share, 1e-4)
    assert not close(model.velocity(x, t, context, source), model.velocity(x, t, context))


def test_latents_of_another_size_are_refused_and_not_broadcast():
    model, x, context, t = denoiser(), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 64), torch.tensor([300.0])
    with pytest.raises(ValueError, match="source latents"):
        model.velocity(x, t, context, source=x[:, :, :1])
    for ref in (x[:, :, :, :2], x[:, :, :0]):
        with pytest.raises(ValueError, match="reference latents"):
            model.velocity(x, t, context, ref=ref)


@golden
def test_a_14b_checkpoint_whose_dit_has_lora_is_taken_in_full(real_qwen_folder):
    preset = PRESETS["wan21_14b"]
    preset = replace(preset, vae=None, mllm=replace(preset.mllm, folder=str(real_qwen_folder)))
    with torch.device("meta"):
        model = KiwiEdit(preset)
    load_weights(model, manifest("trainable_14b_stage2"), partial=True)
    assert model.dit.blocks[0].ffn[0].lora_A["default"].weight.shape == (128, 5120)


def test_guidance_goes_from_the_edit_without_the_references_to_that_with_them_and_beyond(qwen_folder):
    model = small_model(qwen_folder).eval()
    noise, source, ref = (torch.randn(1, 48, frames, 2, 4) for frames in (2, 2, 1))
    shown, unshown = torch.randn(1, 8, 32), torch.randn(1, 4, 32)
    with_ref = model.denoise(noise, shown, source, ref, steps=1)
    without = model.denoise(noise, unshown, source, steps=1)
    guided = model.denoise(noise, shown, source, ref, steps=1, unshown=unshown, guidance=1.5)
    assert close(guided, without + 1.5 * (with_ref - without), 1e-5)


def test_an_edit_is_guided_as_its_weights_ask_unless_told_otherwise(qwen_folder):
    model, calls, picture = small_model(qwen_folder).eval(), [], moving_picture(1, 32, 32)
    velocity = model.velocity
    model.velocity = lambda *given: calls.append(given[4:] not in ((), (None,))) or velocity(*given)

    def asked(ref, **more):
        calls.clear()
        model.edit(picture, "Replace the sky.", ref, steps=1, **more)
        return calls[:]

    assert asked(picture[0]) == [True] and asked(None) == [False]
    model.config = replace(model.config, ref_guidance=1.5)
    assert asked(picture[0]) == [True, False] and asked(picture[0], ref_guidance=1) == [True]


@pytest.mark.parametrize("wrong, says", [
    ({"ref_guidance": 0}, "ref_guidance: 0, expected a number above 0"), ({"steps": -1}, "steps: -1"),
    ({"ref": moving_picture(1, 32, 32)}, r"ref: expected uint8 \(H, W, 3\) each"),
    ({"mask": torch.ones(1, 32, 64)}, "mask: .* does not fit"),
])  # fmt: skip
def test_an_edit_refuses_what_does_not_fit(qwen_folder, wrong, says):
    with pytest.raises(ValueError, match=says):
        small_model(qwen_folder).edit(moving_picture(1, 32, 32), "Replace the sky.", **wrong)


@pytest.mark.parametrize("full", [torch.OutOfMemoryError("CUDA out of memory."),
                                  RuntimeError("GET was unable to find an engine to execute")])  # fmt: skip
def test_an_edit_whose_decoding_does_not_fit_the_card_is_decoded_in_tiles(qwen_folder, capsys, full):
    model, source = small_model(qwen_folder).eval(), moving_picture(1, 32, 704)  # 44 latent pixels wide

    def small_card(module, inputs):
        if inputs[0].shape[-1] > 300:  # pixels; a tile and its halo have 272
            raise full

    plain = model.edit(source, "Replace the sky.", steps=1)
    model.vae.decoder.head["0"].register_forward_pre_hook(small_card)
    assert (plain.int() - model.edit(source, "Replace the sky.", steps=1).int()).abs().max() <= 1
    assert "in tiles" in capsys.readouterr().err
    with pytest.raises(type(full)):
        model.edit(source, "Replace the sky.", steps=1, tile=44)


def test_weights_of_an_earlier_stage_edit_but_refuse_a_reference(tmp_path, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path, stage=2)
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=tmp_path / "wan", qwen=tmp_path / "qwen")
    assert small_edit(model, ref=False).shape == (6, 32, 64, 3) and model.config.dit.bf16_timesteps
    with pytest.raises(ValueError, match="no ref queries"):
        small_edit(model)


def test_below_float32_released_weights_see_timesteps_rounded_to_bfloat16():
    assert all(PRESETS[name].dit.bf16_timesteps for name in PRESETS if name != "nano")
    a, b = torch.tensor([997.0]), torch.tensor([996.0])  # one number in bfloat16
    cases = (True, torch.bfloat16, True), (False, torch.bfloat16, False), (True, torch.float32, False)
    for rounds, dtype, same in cases:
        dit = randomise(DiT(tiny_dit(bf16_timesteps=rounds))).to(dtype)
        assert torch.equal(dit.embed_time(a)[0], dit.embed_time(b)[0]) == same


def test_the_loss_of_a_batch_is_the_mean_of_its_items_whatever_the_lengths_of_their_contexts(qwen_folder):
    model, clip = small_model(qwen_folder), moving_picture(5, 32, 64)
    refs = [torch.randint(255, (*size, 3), dtype=torch.uint8) for size in ((40, 50), (60, 80), (40, 50))]
    requests = [model.mllm.prepare(f"Use it, {i}.", clip, ref) for i, ref in enumerate(refs)]
    latents, source, noise = torch.randn(3, 3, 48, 2, 2, 4)
    rest = (latents, torch.tensor([900.0, 500.0, 100.0]), source, torch.randn(3, 48, 1, 2, 4), noise)
    alone = [model(requests[i : i + 1], *(z[i : i + 1] for z in rest)) for i in range(3)]
    for apart in (False, True):
        assert close(model(requests, *rest, apart=apart), torch.stack(alone).mean(), 1e-5)


def test_bfloat16_weights_edit_and_what_a_killed_copy_left_is_ignored(tmp_path, qwen_folder):
    small_model(qwen_folder).save(tmp_path / "own")
    (tmp_path / "own/.dit.1.tmp.safetensors").write_text("of a copy that was killed")
    model = KiwiEdit.from_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not list(model.buffers())
    assert small_edit(model).shape == (6, 32, 64, 3)


def damage(folder, name, change):
    """Change a file's bytes or, of a JSON file, its values; None removes it."""
    path = folder / name
    if change is None:
        path.unlink()
    elif path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name, change, says", [
    ("dit.safetensors", lambda data: data[:-100], r"dit\.safetensors: cannot be read"),
    ("dit.safetensors", None, r"missing: dit\."), ("mllm/tokenizer.json", None, r"tokenizer\.json is missing"),
    ("config.json", lambda c: {**c, "dit": {**c["dit"], "ffn_dim": 64}}, "of another size"),
    ("config.json", lambda c: {**c, "dit": {**c["dit"], "width": 1}}, "unexpected keyword argument .width."),
    ("config.json", lambda c: [c], r"config\.json: expected a JSON object"),
    ("config.json", lambda c: {**c, "dit": [1]}, r"config\.json: DiTConfig: "),
    ("config.json", lambda c: {**c, "dit": {**c["dit"], "dim": "x"}}, r"config\.json: DiTConfig: "),
    ("config.json", lambda c: {**c, "mllm": {**c["mllm"], "folder": "../elsewhere"}}, "leads out"),
])  # fmt: skip
def test_damaged_weights_are_refused_with_the_reason(tmp_path, small_weights, name, change, says):
    damage(Path(shutil.copytree(small_weights, tmp_path / "own")), name, change)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        KiwiEdit.from_pretrained(tmp_path / "own", dtype=torch.float32)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_is_more_than_tensors_is_not_executed(tmp_path, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path)
    torch.save({"conv1.weight": Bomb(tmp_path / "executed")}, tmp_path / "wan" / "Wan2.2_VAE.pth")
    with pytest.raises(ValueError, match=r"Wan2\.2_VAE\.pth: cannot be read"):
        KiwiEdit.from_pretrained(checkpoint, base=tmp_path / "wan", qwen=tmp_path / "qwen")
    assert not (tmp_path / "executed").exists()


def test_saved_weights_replace_nothing_but_weights_and_whole_ones_take_no_base(tmp_path, small_weights):
    shutil.copytree(small_weights, tmp_path / "own")
    (tmp_path / "own" / "thesis.txt").write_text("my only copy")
    with pytest.raises(ValueError, match="thesis.txt"):
        KiwiEdit.from_pretrained(small_weights).save(tmp_path / "own")
    with pytest.raises(ValueError, match="small is whole: --base"):
        KiwiEdit.from_pretrained(small_weights, base=tmp_path / "wna")


def test_latents_stay_float32_between_the_steps_of_a_bfloat16_model():
    x = denoiser().bfloat16().denoise(torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 64), steps=3)
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


def test_a_state_dict_inside_of_a_pth_is_read(tmp_path):
    torch.save({"state_dict": {"a.weight": torch.ones(2)}}, tmp_path / "in.pth")
    assert TensorFiles().add(tmp_path / "in.pth")["a.weight"].tolist() == [1, 1]


def test_weights_with_nan_are_told_from_an_overflow(qwen_folder):
    model = small_model(qwen_folder)
    torch.nn.init.constant_(model.dit.blocks[0].ffn[0].weight, float("nan"))
    with pytest.raises(ValueError, match="not finite in float32: do the weights hold NaN"):
        small_edit(model)
