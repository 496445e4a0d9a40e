"""Tests of dit.py"""

import pytest
import torch

from bench.speed import built, diffusers_dit, peak_of_live_tensors
from conftest import close, golden, golden_dit_config, randomise, recorded, tiny_dit, tiny_vae
from dit import DiT, rope_3d
from load import load_weights
from model import KiwiConfig, KiwiEdit
from vae import VAE


@golden
@pytest.mark.parametrize("moment", ["t1", "t37"])
def test_velocity_matches_the_release_for_every_condition(moment):
    weights, case_data = recorded("dit_weights.safetensors"), recorded("dit_cases.safetensors")
    spec = recorded("dit.json")
    take = lambda name: case_data[name.removesuffix("[:1]")][: 1 if name.endswith("[:1]") else None]
    for name, case in spec["cases"].items():
        config = KiwiConfig(golden_dit_config(spec["config"]), ref_pad_first=case.get("ref_pad_first", False))
        model = KiwiEdit(config)
        load_weights(model, weights)
        x, context = take(case["latents"]), take(case["context"])
        source = take(case["source"]) if "source" in case else None
        ref = take(case["ref"][0]) if "ref" in case else None
        with torch.no_grad():
            out = model.velocity(x, case_data[f"in.timestep.{moment}"].expand(len(x)), context, source, ref)
        assert close(out, case_data[f"out.{name}.{moment}"], 1e-5), name


@golden
def test_rope_and_the_time_embedding_match_the_release_in_float64():
    cases = recorded("dit_cases.safetensors")
    expected = cases["debug.source_ref_last.t37.rope"]  # (3 frames + 1 reference) x 3 x 5
    assert torch.allclose(torch.stack(rope_3d((4, 3, 5), 32, "cpu"), -1).double(), expected, atol=1e-6)
    model = DiT(golden_dit_config(recorded("dit.json")["config"]))
    load_weights(model, {k[4:]: v for k, v in recorded("dit_weights.safetensors").items() if k.startswith("dit.")})
    assert close(model.embed_time(cases["in.timestep.t37"])[1].detach(), cases["debug.none.t37.t_mod"], 1e-5)


def test_the_dit_agrees_with_diffusers_and_in_bfloat16_is_no_further_from_float32():
    pytest.importorskip("diffusers")
    theirs = randomise(diffusers_dit(tiny_dit()))
    ours, t = DiT(tiny_dit()), torch.tensor([625.0, 40.0])
    load_weights(ours, theirs.state_dict())
    x, text, out = torch.randn(2, 16, 3, 6, 10), torch.randn(2, 7, 24), {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), text.to(dtype)
        with torch.no_grad():
            out[dtype] = ours.to(dtype)(a, t, ours.text_embedding(b)), theirs.to(dtype)(a, t, b).sample
    exact, (our_half, their_half) = out[torch.float32][1], out[torch.bfloat16]
    assert close(out[torch.float32][0], exact)
    assert (our_half - exact).square().mean() < 1.5 * (their_half - exact).square().mean()


def test_cached_keys_and_values_of_a_context_change_nothing():
    model = randomise(DiT(tiny_dit()))
    x, t, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 64)
    tokens, grid = model.patch_embedding(x).flatten(2).transpose(1, 2), model.grid(x)
    kept = model.denoise(tokens, t, model.context_keys_values(context), grid)
    assert torch.equal(kept, model.denoise(tokens, t, context, grid))


@pytest.mark.parametrize("wrong", [dict(num_heads=3), dict(dim=128, num_heads=2), dict(patch_size=(2, 2, 2))])
def test_an_impossible_dit_config_is_refused_by_the_name_of_its_field(wrong):
    with pytest.raises(ValueError, match=r"DiTConfig\.(num_heads|dim|patch_size)"):
        tiny_dit(**wrong)


def test_the_peak_of_a_decoding_is_computed_without_a_device_and_grows_with_the_frame(triton_backend):
    vae = built("meta", torch.bfloat16, lambda: VAE(tiny_vae()))
    decode = lambda n: vae.decode(torch.empty(1, 12, 2, n, n, device="meta"), out_device="cpu")
    with torch.no_grad():
        small, large = (peak_of_live_tensors(lambda n=n: decode(n), vae) for n in (8, 16))
    features = 6 * 4 * 256 * 256 * 2 / 2**30  # of the last level, six channels of four frames, in bfloat16
    assert 3 * features < large < 6 * features and 2.5 < large / small < 4
