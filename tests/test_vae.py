"""Tests of vae.py"""

import sys

import pytest
import torch

from bench.speed import diffusers_vae, give_weights
from conftest import close, golden, golden_vae_config, randomise, recorded, tiny_vae
from load import load_weights
from vae import VAE


@golden
@pytest.mark.parametrize("version", ["2.2", "2.1"])
@pytest.mark.parametrize("chunk, folded", [(1, False), (3, True)])
def test_the_vae_matches_the_release_at_every_length_and_chunk_and_folded(version, chunk, folded, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.conv"], "folding_pays", lambda x, weight: folded)
    name = "vae" + version.replace(".", "")
    vae, cases = VAE(golden_vae_config(version)), recorded(f"{name}_cases.safetensors")
    load_weights(vae, recorded(f"{name}_weights.safetensors"))
    for frames in (1, 5, 9, 17):
        video = cases[f"encode.{frames}.video_u8"][None] * (2 / 255) - 1
        with torch.no_grad():
            assert close(vae.encode(video, chunk=chunk)[0], cases[f"encode.{frames}.latents"], 1e-5)
            decoded = vae.decode(cases[f"decode.{frames}.latents"][None], chunk=chunk)[0]
        assert close(decoded, cases[f"decode.{frames}.video"])


@pytest.mark.parametrize("version", ["2.2", "2.1"])
def test_the_vae_agrees_with_diffusers(version):
    pytest.importorskip("diffusers")
    ours = randomise(VAE(tiny_vae(version)))
    theirs = diffusers_vae(ours.config).eval()
    give_weights(ours, theirs)
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(video)
        assert close(latents, theirs.encode(video).latent_dist.mean)
        assert close(ours.decode(latents), theirs.decode(latents).sample)


def test_a_vae_used_for_inference_first_can_be_trained_later():
    vae, video = randomise(VAE(tiny_vae())), torch.rand(1, 3, 1, 32, 32) * 2 - 1
    with torch.inference_mode():
        vae.encode(video)
    vae.encode(video).sum().backward()
    assert vae.conv1.weight.grad is not None


@pytest.mark.parametrize("version", ["2.2", "2.1"])
def test_tiles_are_seamless_and_their_halo_is_no_larger_than_needed_by_two(version):
    vae = randomise(VAE(tiny_vae(version)))
    stride = vae.config.space_stride
    video = torch.rand(1, 3, 5, 2 * stride, 40 * stride) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video)
        decoded = vae.decode(latents)
        assert close(vae.encode(video, tile=7), latents, 1e-5)
        assert close(vae.decode(latents, tile=9), decoded, 1e-5)
        vae.halo = lambda convs: VAE.halo(vae, convs) - 2
        assert not torch.equal(vae.decode(latents, tile=9), decoded)


def test_levels_and_numbers_between_minus_one_and_one_are_the_same_frames():
    vae, levels = randomise(VAE(tiny_vae())), torch.randint(256, (1, 3, 5, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        latents = vae.encode(levels)
        assert torch.equal(latents, vae.encode(levels.float() * (2 / 255) - 1))
        rounded = ((vae.decode(latents) + 1) * 127.5).round()
        assert torch.equal(vae.decode(latents, levels=True), rounded.to(torch.uint8)) and rounded.unique().numel() > 99


def test_the_memory_of_streaming_does_not_grow_with_the_frames():
    vae = randomise(VAE(tiny_vae()))
    sizes = {}
    for frames in (5, 9, 41):
        state = {}
        with torch.no_grad():
            for start in (0, *range(1, frames, 4)):
                vae.encoder.down(torch.rand(1, 3, 4 if start else 1, 32, 32), state)
        sizes[frames] = sum(t.untyped_storage().nbytes() for t in state.values() if isinstance(t, torch.Tensor))
        held = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        assert sizes[frames] == held, "a view keeps its chunk alive"
    assert sizes[41] == sizes[9] == sizes[5]


def test_wrong_lengths_and_sizes_are_refused_and_not_cut():
    vae = VAE(tiny_vae())
    with pytest.raises(ValueError, match="6 frames"):
        vae.encode(torch.zeros(1, 3, 6, 32, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        vae.encode(torch.zeros(1, 3, 5, 40, 32))
    with pytest.raises(ValueError, match="VAEConfig.dim_mult"):
        tiny_vae(dim_mult=(1, 2, 4, 8))
