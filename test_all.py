"""The house, tested: one section per file, in the order of the floors. `pytest test_all.py`, a few minutes on 2 cores.

Recorded outputs of the released code lie in ../shared/golden, real clips in ../shared/demo; a test that needs them
skips aloud without them. diffusers, a second witness of the same architecture, is a requirement of the tests alone.
"""

import ast
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import nano
import sample
import world
from connectors import (
    MLLMConfig, MLLMEncoder, fit_pixels, inject_lora, lora_state_dict, merge_lora, sample_frames, video_frame_sizes,
)  # fmt: skip
from data import (
    MediaError, fit_frames, pad_reference, read_clip, read_image, usable_frames, whole_file, working_size, write_image,
    write_video,
)  # fmt: skip
from dit import DiT, DiTConfig, rope_3d
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit, load_weights, meta_parameters, our_name
from vae import VAE, VAEConfig

HOUSE = Path(__file__).parent
SHARED = HOUSE.parent / "shared"
GOLDEN = SHARED / "golden"
TOL = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest expected value

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden, outputs recorded from the release")
demo = pytest.mark.skipif(not (SHARED / "demo").is_dir(), reason="needs ../shared/demo, real clips")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, tol=None):
    """The largest error, relative to the largest expected value, is under the tolerance of the dtype."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return error.item() < (tol or TOL[actual.dtype])


def recorded(name):
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def only_fields(cls, values):
    return {k: v for k, v in values.items() if k in cls.__dataclass_fields__}


def golden_vae_config(version):
    values = recorded(f"vae{version.replace('.', '')}.json")["config"]
    values["temporal_downsample"] = values["temperal_downsample"]
    return VAEConfig(**{"version": version, **only_fields(VAEConfig, values)})


def golden_dit_config(values):
    return DiTConfig(**only_fields(DiTConfig, values))


def randomise(module, scale=1.0):
    """Fresh random weights everywhere, also where training would start from zeros or ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn_like(parameter) * scale / fan_in**0.5)
    return module


# ------------------------------------------------------------------------------------------------ the house itself

FLOORS = {
    "kernels": 0, "dit": 1, "vae": 1, "connectors": 1, "data": 1, "world": 1, "model": 2,
    "sample": 3, "train": 3, "judge": 3, "curate": 3, "nano": 3, "test_all": 4,
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(HOUSE.glob("*.py")), ids=lambda path: path.name)
def test_a_file_imports_only_from_floors_below_its_own(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    for name in {name.split(".")[0] for name in imported} & FLOORS.keys():
        assert FLOORS[name] < FLOORS[path.stem], f"{path.name} imports {name}"


def readme_commands(program):
    text = re.sub(r"\\\n\s*", "", (HOUSE / "README.md").read_text())
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if re.match(rf"(python|torchrun .*) {program}", line)]


@pytest.mark.parametrize("line", readme_commands("sample.py"))
def test_the_readme_s_sample_commands_parse(line):
    words = shlex.split(line, comments=True)
    sample.parse_arguments(words[words.index("sample.py") + 1 :])


@pytest.mark.parametrize("name", ["sample.py", "nano.py"])
def test_every_flag_of_a_command_is_read(name):
    text = (HOUSE / name).read_text()
    flags = re.findall(r'add\((?:"-\w", )?"--([\w-]+)"', text)
    assert flags and all(f"args.{flag.replace('-', '_')}" in text for flag in flags)


# ------------------------------------------------------------------------------------------------ dit.py


def tiny_dit(**changes):
    return DiTConfig(**{**dict(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=16, out_dim=16, freq_dim=32,
                               text_dim=24), **changes})  # fmt: skip


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
    diffusers = pytest.importorskip("diffusers")
    theirs = randomise(diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=24,
        freq_dim=32, ffn_dim=96, num_layers=2, cross_attn_norm=True, eps=1e-6, rope_max_seq_len=64,
    ))  # fmt: skip
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


# ------------------------------------------------------------------------------------------------ vae.py


def tiny_vae(version="2.2", **changes):
    return VAEConfig(**{**dict(version=version, dim=8, dec_dim=6, z_dim=12, num_res_blocks=1), **changes})


@golden
@pytest.mark.parametrize("version", ["2.2", "2.1"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_vae_matches_the_release_at_every_length_and_chunk(version, chunk):
    name = "vae" + version.replace(".", "")
    vae, cases = VAE(golden_vae_config(version)), recorded(f"{name}_cases.safetensors")
    load_weights(vae, recorded(f"{name}_weights.safetensors"))
    for frames in (1, 5, 9, 17):
        video = cases[f"encode.{frames}.video_u8"][None] * (2 / 255) - 1
        with torch.no_grad():
            assert close(vae.encode(video, chunk=chunk)[0], cases[f"encode.{frames}.latents"], 1e-5)
            decoded = vae.decode(cases[f"decode.{frames}.latents"][None], chunk=chunk)[0]
        assert close(decoded, cases[f"decode.{frames}.video"])


def diffusers_vae_name(name, version):
    """Wan's name of a VAE parameter -> diffusers' name."""
    for wan, theirs in (
        (r"residual\.0\.", "norm1."), (r"residual\.2\.", "conv1."), (r"residual\.3\.", "norm2."),
        (r"residual\.6\.", "conv2."), (r"shortcut", "conv_shortcut"), (r"middle\.0", "mid_block.resnets.0"),
        (r"middle\.1", "mid_block.attentions.0"), (r"middle\.2", "mid_block.resnets.1"), (r"head\.0", "norm_out"),
        (r"head\.2", "conv_out"), (r"coder\.conv1", "coder.conv_in"), (r"^conv1", "quant_conv"),
        (r"^conv2", "post_quant_conv"),
    ):  # fmt: skip
        name = re.sub(wan, theirs, name)
    if version == "2.2":
        name = re.sub(r"downsamples\.(\d)\.downsamples\.\d\.(resample|time)", r"down_blocks.\1.downsampler.\2", name)
        name = re.sub(r"upsamples\.(\d)\.upsamples\.\d\.(resample|time)", r"up_blocks.\1.upsampler.\2", name)
        name = re.sub(r"downsamples\.(\d)\.downsamples\.(\d)", r"down_blocks.\1.resnets.\2", name)
        return re.sub(r"upsamples\.(\d)\.upsamples\.(\d)", r"up_blocks.\1.resnets.\2", name)
    name = name.replace("downsamples", "down_blocks")
    per_level = 3  # num_res_blocks 1: two residual blocks and the upsampling
    flat = re.search(r"upsamples\.(\d+)", name)
    if not flat:
        return name
    level, place = divmod(int(flat[1]), per_level)
    inner = "upsamplers.0" if place == per_level - 1 else f"resnets.{place}"
    return name.replace(flat[0], f"up_blocks.{level}.{inner}")


@pytest.mark.parametrize("version", ["2.2", "2.1"])
def test_the_vae_agrees_with_diffusers(version):
    diffusers = pytest.importorskip("diffusers")
    config = tiny_vae(version)
    extra = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    theirs = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=config.decoder_dim, z_dim=12, num_res_blocks=1, latents_mean=[0.0] * 12,
        latents_std=[1.0] * 12, **(extra if version == "2.2" else {}),
    ).eval()  # fmt: skip
    ours = randomise(VAE(config))
    theirs.load_state_dict({diffusers_vae_name(k, version): v for k, v in ours.state_dict().items()})
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(video)
        assert close(latents, theirs.encode(video).latent_dist.mean)
        assert close(ours.decode(latents), theirs.decode(latents).sample)


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


def test_the_memory_of_streaming_does_not_grow_with_the_frames():
    vae = randomise(VAE(tiny_vae()))
    sizes = {}
    for frames in (5, 9, 41):
        state = {}
        with torch.no_grad():
            for start in (0, *range(1, frames, 4)):
                vae.encoder.down(torch.rand(1, 3, 4 if start else 1, 32, 32), state)
        sizes[frames] = sum(t.numel() for t in state.values() if isinstance(t, torch.Tensor))
    assert sizes[41] == sizes[9] == sizes[5]


def test_wrong_lengths_and_sizes_are_refused_and_not_cut():
    vae = VAE(tiny_vae())
    with pytest.raises(ValueError, match="6 frames"):
        vae.encode(torch.zeros(1, 3, 6, 32, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        vae.encode(torch.zeros(1, 3, 5, 40, 32))


# ------------------------------------------------------------------------------------------------ connectors.py


def write_qwen_folder(folder):
    """A tiny Qwen2.5-VL config and a byte-level tokenizer with its special tokens: what a hub folder has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    names = ["endoftext", "im_start", "im_end", "object_ref_start", "vision_start", "vision_end", "image_pad", "video_pad"]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>") for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0])
    config = dict(
        model_type="qwen2_5_vl", hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=2, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=True, vision_config=vision,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return write_qwen_folder(tmp_path_factory.mktemp("hub") / "qwen")


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
    return (((((x // 4) * 3 + t * 11) ^ ((y // 4) * 2 + c * 37)) & 255)).to(torch.uint8), ref


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
            assert close(encoder.encode(inputs), data[f"{name}.context"], 1e-3)


@golden
def test_from_recorded_pixel_values_the_context_is_exact_with_lora_live_and_merged():
    encoder, data, lora = golden_mllm(), recorded("mllm_cases.safetensors"), recorded("mllm_lora.safetensors")
    case = recorded("mllm.json")["cases"]["image"]
    inputs = encoder.prepare(case["prompt"], data["image.frames_u8"])
    inputs.pixel_values["source"] = data["image.pixel_values"].bfloat16()
    with torch.no_grad():
        assert close(encoder.encode(inputs), data["image.context"])
        adapters = {k.removeprefix("mllm."): v for k, v in lora.items() if ".lora_" in k}
        load_weights(encoder, adapters, partial=True)
        assert close(encoder.encode(inputs), lora["expected.image.context.live"])
        assert {our_name(k) for k in adapters} == lora_state_dict(encoder).keys()
        merge_lora(encoder)
        assert close(encoder.encode(inputs), lora["expected.image.context.merged"])


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
    assert encoder.encode(typed).shape == (1, 3, 16)


def test_one_frame_or_two_references_work_where_the_release_crashes(qwen_folder):
    encoder = randomise(MLLMEncoder.from_config(qwen_folder, dit_dim=16, num_ref_queries=5, max_ref_tokens=4))
    still, a, b = (torch.randint(255, (1, 60, 80, 3), dtype=torch.uint8) for _ in range(3))
    one, two = encoder("Use it.", still, ref=a[0]), encoder("Use it.", still, ref=[a[0], b[0]])
    assert one.shape[1] == 5 + 2 and two.shape[1] == 5 + 2 + 2  # each picture is 28 x 56 pixels: 2 tokens
    queries_only = MLLMEncoder(replace(encoder.config, context="queries"))
    queries_only.load_state_dict(encoder.state_dict())
    assert torch.equal(queries_only("Use it.", still, ref=a[0]), one[:, 2:])


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


# ------------------------------------------------------------------------------------------------ data.py


def moving_picture(count=9, height=70, width=102):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frame = lambda t: torch.stack([2 * x + 3 * t, 3 * y, x + y], dim=-1) % 256
    return torch.stack([frame(t) for t in range(count)]).to(torch.uint8)


def write_clip(path, frames, times=None, rate=25, sound=None):
    """A clip with frames at `times` in milliseconds and, with sound, a 440 Hz tone of 2 s in that codec."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=rate, options={"crf": "1"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        if sound:
            track = out.add_stream(sound, rate=48000)
            track.codec_context.layout = "mono"
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
            frame.pts, frame.time_base = round(times[i] if times else 1000 * i / rate), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if sound:
            tone = (np.sin(np.arange(96000) * 440 * 2 * np.pi / 48000) * 9000).astype(np.int16)
            for i in range(0, 96000, 960):
                piece = av.AudioFrame.from_ndarray(tone[None, i : i + 960], format="s16", layout="mono")
                piece.rate, piece.pts = 48000, i
                out.mux(track.encode(piece))
            out.mux(track.encode())
    return path


@golden
def test_working_sizes_crops_and_reference_boxes_match_the_release():
    records, pictures = recorded("preprocess.json"), recorded("preprocess_frames.safetensors")
    for r in records["vae_inference"]:
        assert working_size(r["height"], r["width"], r["max_pixels"]) == (r["out_height"], r["out_width"])
    for i in range(3):
        image = pictures[f"{i}.image"]
        pairs = [(pad_reference(image, (64, 96)), f"{i}.ref_pad_64x96")]
        for limit, pixels in (("4096", 4096), ("none", 720 * 1280)):
            fitted = fit_frames(image[None], working_size(*image.shape[:2], pixels))[0]
            pairs.append((fitted, f"{i}.max{limit}.inference"))
        for ours, name in pairs:
            assert (ours.int() - pictures[name].int()).abs().float().mean() < 0.05, name
    for r in records["reference_padding"]:
        black = torch.zeros(r["height"], r["width"], 3, dtype=torch.uint8)
        inside = (pad_reference(black, r["target_wh"][::-1])[..., 0] == 0).nonzero()
        assert [*inside.amin(0).flip(0).tolist(), *(inside.amax(0) + 1).flip(0).tolist()] == r["inference_box_xyxy"]


def test_a_clip_keeps_its_frames_its_rate_and_its_sound(tmp_path):
    source = write_clip(tmp_path / "in.mkv", moving_picture(30), rate=Fraction(30000, 1001), sound="pcm_s16le")
    clip = read_clip(source, max_frames=21)
    assert clip.frames.shape == (21, 64, 96, 3) and clip.fps == Fraction(30000, 1001) and not clip.still
    write_video(tmp_path / "out.mp4", clip.frames, clip.fps, audio_from=source)
    again = read_clip(tmp_path / "out.mp4")
    assert again.frames.shape == clip.frames.shape and again.fps == clip.fps
    assert (again.frames.float() - clip.frames.float()).abs().mean() < 3
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert out.streams.video[0].codec_context.pix_fmt == "yuv420p"
        tone = np.concatenate([frame.to_ndarray()[0] for frame in out.decode(audio=0)])
    assert abs(len(tone) / 48000 - 21 * 1001 / 30000) < 0.05  # as long as the pictures
    assert abs(np.abs(np.fft.rfft(tone[9600:19200])).argmax() * 5 - 440) <= 5


def test_a_variable_frame_rate_becomes_a_constant_one_in_step_with_time(tmp_path):
    frames = (torch.arange(9).view(9, 1, 1, 1) * 25).to(torch.uint8).expand(9, 64, 64, 3)
    times = [0, 40, 80, 120, 160, 560, 600, 640, 680]  # 0.4 s of standstill after the fifth
    clip = read_clip(write_clip(tmp_path / "in.mp4", frames, times))
    shown = (clip.frames[:, 32, 32, 0].float() / 25).round().tolist()
    middle = round(0.45 * float(clip.fps))
    assert shown[middle] == 4 and shown == sorted(shown) and len(shown) == usable_frames(round(0.72 * clip.fps))


def test_rotation_alpha_and_stills_are_read_as_a_person_sees_them(tmp_path):
    path = write_clip(tmp_path / "in.mp4", moving_picture(1, 64, 96))
    upright = read_image(path)
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # the track header's display matrix
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in
                                          (0, 65536, 0, -65536, 0, 0, 64 << 16, 0, 1 << 30))  # fmt: skip
    (tmp_path / "phone.mp4").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "phone.mp4"), upright.rot90(-1))
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 40, 40, "rgba", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((40, 40, 4), (200, 100, 0, 51), dtype=np.uint8), format="rgba")
    (tmp_path / "glass.png").write_bytes(b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)]))
    assert read_image(tmp_path / "glass.png")[0, 0].tolist() == [244, 224, 204]  # a fifth over white
    assert read_clip(tmp_path / "glass.png").still


def bad_media(folder):
    whole = write_clip(folder / "whole.mp4", moving_picture(40, 128, 128)).read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    noisy = bytearray(whole)
    start = noisy.find(b"mdat")
    for i in range(start + 2000, start + 20000, 97):
        noisy[i] ^= 255
    (folder / "flipped.mp4").write_bytes(noisy)
    (folder / "empty.mp4").touch()
    (folder / "words.png").write_text("not a picture")
    write_image(folder / "dot.png", np.zeros((1, 1, 3), dtype=np.uint8))
    write_image(folder / "whole.jpg", moving_picture(1)[0])
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    with av.open(str(folder / "sound.mp3"), "w") as out:
        track = out.add_stream("mp3", rate=44100)
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 44100), dtype=np.float32), format="fltp", layout="mono")
        piece.rate = 44100
        out.mux([*track.encode(piece), *track.encode()])


def test_every_bad_file_is_one_media_error_that_names_it(tmp_path):
    bad_media(tmp_path)
    for name in ("half.mp4", "flipped.mp4", "empty.mp4", "words.png", "dot.png", "half.jpg", "sound.mp3", "absent.mp4"):
        with pytest.raises(MediaError, match=re.escape(name)) as error:
            read_clip(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "out.mp4") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ model.py


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
    for suffix, names in (("", ("timestep", "sigma", "weight")), ("bf16", ("timestep_bf16", "sigma_from_bf16", "weight_from_bf16"))):
        t, sigma, weight = (torch.tensor([r[name] for r in sampled]) for name in names)
        ours = FlowMatch().training_sigmas(t)
        assert torch.allclose(ours[0], sigma, atol=1e-6) and torch.allclose(ours[1], weight, atol=1e-5), suffix


def golden_pipeline():
    spec = recorded("pipeline.json")
    e = recorded("mllm.json")["encoder"]
    mllm = MLLMConfig(str(GOLDEN / "mllm"), e["dit_dim"], 6, 8, 10, e["max_object_token"])
    model = KiwiEdit(KiwiConfig(golden_dit_config(spec["dit_config"]), golden_vae_config("2.2"), mllm))
    weights = recorded("pipeline_dit_weights.safetensors")
    weights |= {f"vae.{k}": v for k, v in recorded("vae22_weights.safetensors").items()}
    weights |= {f"mllm.{k}": v for k, v in recorded("mllm_weights.safetensors").items()}
    load_weights(model, weights)
    return model, spec, recorded("pipeline_cases.safetensors")


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


@pytest.mark.parametrize("how", ["add_scaled", "add_learned", "add_unscaled", "add_shared_patch_embed", "channel_concat"])
def test_every_source_condition_of_the_paper_sees_the_source(how):
    model = denoiser(source=how)
    x, source, context = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 64)
    with_source = model.velocity(x, torch.tensor([300.0]), context, source)
    assert not close(with_source, model.velocity(x, torch.tensor([300.0]), context))
    if how == "add_learned":  # starts out as the released scaling
        torch.nn.init.zeros_(model.source_scale.weight), torch.nn.init.zeros_(model.source_scale.bias)
        scaled = KiwiEdit(KiwiConfig(tiny_dit()))
        scaled.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("source_scale")})
        ours = model.velocity(x, torch.tensor([300.0]), context, source)
        assert close(ours, scaled.velocity(x, torch.tensor([300.0]), context, source), 1e-6)


def test_latents_of_another_size_are_refused_and_not_broadcast():
    model, x, context, t = denoiser(), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 64), torch.tensor([300.0])
    with pytest.raises(ValueError, match="source latents"):
        model.velocity(x, t, context, source=x[:, :, :1])
    with pytest.raises(ValueError, match="reference latents"):
        model.velocity(x, t, context, ref=x[:, :, :, :2])


MANIFESTS = {
    "dit_wan2.2_ti2v_5b": "wan22_5b", "dit_wan2.1_t2v_14b": "wan21_14b", "dit_wan2.1_t2v_1.3b": "wan21_1_3b",
    "vae_wan2.2": "wan22_5b", "vae_wan2.1": "wan21_14b",
}  # fmt: skip


def manifest(name):
    tensors = recorded(f"manifest/{name}.json")["tensors"]
    return {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}


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


@pytest.fixture(scope="session")
def real_qwen_folder(tmp_path_factory, qwen_folder):
    """Qwen2.5-VL-3B's published config, with the small tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-3B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(recorded("manifest/qwen2.5_vl_3b_instruct.json")["config"]))
    (folder / "tokenizer.json").write_bytes((qwen_folder / "tokenizer.json").read_bytes())
    return folder


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
    weights = {re.sub(r"^(\w+)/", lambda m: folder.get(m[1], m[1]) + ".", k): v for k, v in manifest("diffusers_5b").items()}
    weights |= {f"mllm.{k}": v for k, v in manifest("qwen2.5_vl_3b_instruct").items()}
    assert load_weights(model, {k: v for k, v in weights.items() if not k.startswith("vae.")}) == []


@golden
def test_a_14b_checkpoint_whose_dit_has_lora_is_taken_in_full(real_qwen_folder):
    preset = PRESETS["wan21_14b"]
    preset = replace(preset, vae=None, mllm=replace(preset.mllm, folder=str(real_qwen_folder)))
    with torch.device("meta"):
        model = KiwiEdit(preset)
    load_weights(model, manifest("trainable_14b_stage2"), partial=True)
    assert model.dit.blocks[0].ffn[0].lora_A["default"].weight.shape == (128, 5120)


def small_model(qwen_folder):
    """A whole Kiwi-Edit of some 100,000 random weights."""
    mllm = MLLMConfig(str(qwen_folder), 32, 4, 4, 4, max_ref_tokens=4, max_pixels=64 * 64)
    dit = tiny_dit(dim=32, ffn_dim=48, num_heads=1, in_dim=48, out_dim=48)
    vae = VAEConfig(dim=4, dec_dim=4, z_dim=48, num_res_blocks=1)
    return randomise(KiwiEdit(KiwiConfig(dit, vae, mllm)), 0.5)


def published_qwen(model):
    """The MLLM's weights under the names that Qwen2.5-VL is published with."""
    state = {k: v for k, v in model.mllm.model.state_dict().items()}
    return {k.replace("language_model.", "model.", 1) if k.startswith("language") else k: v for k, v in state.items()}


def save_training_layout(model, folder, stage=3):
    """The released training checkpoint, with LoRA, over Wan's and Qwen's folders -> the checkpoint's path."""
    wan, qwen = folder / "wan", write_qwen_folder(folder / "qwen")
    wan.mkdir()
    names = ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "eps", "text_dim")
    values = asdict(model.config.dit)
    (wan / "config.json").write_text(json.dumps({"_class_name": "WanModel", **{k: values[k] for k in names}}))
    dit = model.dit.state_dict()
    for i, part in enumerate((list(dit)[::2], list(dit)[1::2])):
        save_file({k: dit[k] * 0 for k in part}, wan / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    torch.save(model.vae.state_dict(), wan / "Wan2.2_VAE.pth")
    save_file(published_qwen(model), qwen / "model-00001-of-00001.safetensors")
    trained = {f"dit.{k}": v for k, v in dit.items()}
    trained |= {f"vae_condition.{k}": v for k, v in model.source_embedder.state_dict().items()}
    trained |= {f"mllm.connetor.{k}": v for k, v in model.mllm.connector.state_dict().items()}
    trained |= {f"mllm.{mode}_queries.q": model.mllm.state_dict()[f"{mode}_queries"] for mode in ("image", "video")}
    if stage == 3:
        trained |= {f"ref_vae_condition.{k}": v for k, v in model.ref_embedder.state_dict().items()}
        trained |= {f"mllm.ref_connector.{k}": v for k, v in model.mllm.ref_connector.state_dict().items()}
        trained["mllm.ref_queries.q"] = model.mllm.ref_queries
    layer = "mllm.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    trained |= {f"{layer}A.default.weight": torch.randn(2, 32), f"{layer}B.default.weight": torch.randn(32, 2)}
    save_file({k: v.detach().contiguous() for k, v in trained.items()}, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


TO_DIFFUSERS = [
    (r"self_attn\.([qkv])\.", r"attn1.to_\1."), (r"cross_attn\.([qkv])\.", r"attn2.to_\1."), (r"self_attn\.o", "attn1.to_out.0"),
    (r"cross_attn\.o", "attn2.to_out.0"), (r"self_attn", "attn1"), (r"cross_attn", "attn2"), (r"norm3", "norm2"),
    (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2"), (r"head\.modulation", "scale_shift_table"),
    (r"modulation", "scale_shift_table"), (r"head\.head", "proj_out"), (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"(text|time)_embedding\.0", r"condition_embedder.\1_embedder.linear_1"),
    (r"(text|time)_embedding\.2", r"condition_embedder.\1_embedder.linear_2"),
]  # fmt: skip


def save_diffusers_layout(model, folder):
    """The folder that the released converter writes."""
    def component(name, config, state, file="diffusion_pytorch_model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if config:
            (folder / name / "config.json").write_text(json.dumps(config))
        save_file({k: v.detach().contiguous() for k, v in state.items()}, folder / name / f"{file}.safetensors")

    d, m = model.config.dit, model.config.mllm
    names = {}
    for name in model.dit.state_dict():
        names[name] = name
        for ours, theirs in TO_DIFFUSERS:
            names[name] = re.sub(ours, theirs, names[name])
    transformer = dict(
        patch_size=d.patch_size, in_channels=d.in_dim, out_channels=d.out_dim, num_attention_heads=d.num_heads,
        attention_head_dim=d.head_dim, text_dim=d.text_dim, freq_dim=d.freq_dim, ffn_dim=d.ffn_dim,
        num_layers=d.num_layers, eps=d.eps,
    )  # fmt: skip
    component("transformer", transformer, {names[k]: v for k, v in model.dit.state_dict().items()})
    mean, std = model.config.vae.statistics
    component("vae", {"z_dim": 48, "latents_mean": mean, "latents_std": std}, model.vae.state_dict())
    encoder = dict(dit_dim=m.dit_dim, max_object_token=m.max_ref_tokens, max_frames=16, max_pixels_per_frame=m.max_pixels)
    own = {k: v for k, v in model.mllm.state_dict().items() if not k.startswith("model.")}
    component("mllm_encoder", encoder, own)
    component("mllm_encoder", None, published_qwen(model), "model-00001-of-00001")
    for name in ("source_embedder", "ref_embedder"):
        component(name, {"ref_pad_first": model.config.ref_pad_first}, getattr(model, name).state_dict())
    write_qwen_folder(folder / "processor")
    (folder / "processor" / "config.json").rename(folder / "processor" / "qwen_config.json")
    return folder


def small_edit(model, ref=True):
    picture = torch.randint(255, (40, 50, 3), dtype=torch.uint8) if ref else None
    return model.edit(moving_picture(6, 32, 64), "Replace the sky.", picture, steps=2)


def test_all_three_layouts_load_to_the_same_model(tmp_path, qwen_folder):
    model = small_model(qwen_folder).eval()
    model.save(tmp_path / "own")
    diffusers = save_diffusers_layout(model, tmp_path / "diffusers")
    checkpoint = save_training_layout(model, tmp_path)
    expected = model.state_dict()
    for path in (tmp_path / "own", diffusers):
        loaded = KiwiEdit.from_pretrained(path, dtype=torch.float32).state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in expected)
    bases = dict(base=tmp_path / "wan", qwen=tmp_path / "qwen")
    loaded = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, **bases).state_dict()
    differing = {k for k in expected if not torch.equal(loaded[k], expected[k])}
    assert loaded.keys() == expected.keys()
    assert differing == {"mllm.model.language_model.layers.0.self_attn.q_proj.weight"}  # where the LoRA was merged


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


def test_weights_of_an_earlier_stage_edit_but_refuse_a_reference(tmp_path, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path, stage=2)
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=tmp_path / "wan", qwen=tmp_path / "qwen")
    assert small_edit(model, ref=False).shape == (6, 32, 64, 3)
    with pytest.raises(ValueError, match="no ref queries"):
        small_edit(model)


def test_bfloat16_weights_leave_transformers_rotary_tables_in_float32(tmp_path, qwen_folder):
    small_model(qwen_folder).save(tmp_path / "own")
    model = KiwiEdit.from_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert buffers and all(b.dtype == torch.float32 and not b.is_meta for b in buffers.values())
    assert small_edit(model).shape == (6, 32, 64, 3)


def damage(folder, how):
    dit = folder / "dit.safetensors"
    if how == "truncated":
        dit.write_bytes(dit.read_bytes()[:-100])
    elif how == "absent":
        dit.unlink()
    elif how == "another size":
        config = json.loads((folder / "config.json").read_text())
        config["dit"]["ffn_dim"] += 16
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "unknown key":
        config = json.loads((folder / "config.json").read_text())
        config["dit"]["width"] = 1
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "no tokenizer":
        (folder / "mllm" / "tokenizer.json").unlink()


@pytest.mark.parametrize("how, says", [
    ("truncated", r"dit\.safetensors: cannot be read"), ("absent", r"missing: dit\."), ("another size", "of another size"),
    ("unknown key", "unknown key width"), ("no tokenizer", r"tokenizer\.json is missing"),
])  # fmt: skip
def test_damaged_weights_are_refused_with_the_reason(tmp_path, qwen_folder, how, says):
    small_model(qwen_folder).save(tmp_path / "own")
    damage(tmp_path / "own", how)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        KiwiEdit.from_pretrained(tmp_path / "own", dtype=torch.float32)


def test_a_pickle_that_is_more_than_tensors_is_not_executed(tmp_path, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path)
    torch.save({"conv1.weight": Path("/etc")}, tmp_path / "wan" / "Wan2.2_VAE.pth")
    with pytest.raises(ValueError, match=r"Wan2\.2_VAE\.pth: cannot be read"):
        KiwiEdit.from_pretrained(checkpoint, base=tmp_path / "wan", qwen=tmp_path / "qwen")


# ------------------------------------------------------------------------------------------------ sample.py


def run_sample(*arguments, cwd=None):
    command = [sys.executable, str(HOUSE / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory, qwen_folder):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "small"
    small_model(qwen_folder).save(folder)
    return folder


def test_help_answers_without_the_heavy_imports():
    probe = "import sys, sample; sys.argv = ['sample.py', '--help']; heavy = {'torch', 'av', 'transformers', 'numpy'}\n"
    probe += "try: sample.main()\nexcept SystemExit: assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=HOUSE)
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


@demo
@pytest.mark.parametrize("layout", ["own", "diffusers", "training"])
def test_the_main_job_on_real_clips_gives_a_playable_edit(tmp_path, qwen_folder, layout):
    model, shared = small_model(qwen_folder), SHARED / "demo"
    if layout == "training":
        checkpoint = save_training_layout(model, tmp_path)
        weights = [checkpoint, "--base", tmp_path / "wan", "--qwen", tmp_path / "qwen"]
    else:
        weights = [tmp_path / layout]
        model.save(weights[0]) if layout == "own" else save_diffusers_layout(model, weights[0])
    if layout == "own":
        request = [shared / "monkey.mp4", "Remove the monkey.", "--max-pixels", 360000]
        frames, height, width, fps = 81, 448, 800, 20
    else:
        towel = "Replace the light blue and white striped towel hanging on the left side of the bathtub with stones."
        request = [shared / "bathtub.mp4", towel, "--ref", shared / "stones.jpg", "--max-pixels", 100000, "--compare"]
        frames, height, width, fps = 81, 224, 416, 16
    done = run_sample(*request, "--weights", *weights, "--steps", 2, "-o", tmp_path / "out.mp4")
    assert done.returncode == 0, done.stderr
    clip = read_clip(tmp_path / "out.mp4")
    assert clip.frames.shape == (frames, height, width, 3) and clip.fps == fps
    if layout != "own":
        assert read_clip(tmp_path / "out_compare.mp4").frames.shape == (frames, height, 2 * width, 3)


def test_a_still_picture_gives_a_picture(tmp_path, small_weights):
    write_image(tmp_path / "in.jpg", moving_picture(1, 70, 102)[0])
    done = run_sample(tmp_path / "in.jpg", "Make it night.", "--weights", small_weights, "--steps", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_image(tmp_path / "in_edited.png").shape == (64, 96, 3)


@pytest.mark.parametrize("case, says", [
    (["absent.mp4", "x"], "no such file"), (["half.mp4", "x"], "cannot be decoded"), (["sound.mp3", "x"], "no pictures"),
    (["dot.png", "x"], "too few"), (["whole.jpg", " "], "instruction is empty"),
    (["whole.jpg", "x", "--ref", "half.jpg"], "half.jpg"), (["whole.jpg", "x", "--device", "cuda"], "not available"),
    (["whole.jpg", "x", "-o", "words.png/out.png"], "cannot be written"), (["whole.jpg", "x", "--offload"], "no GPU"),
    (["whole.jpg", "x", "--weights", "nowhere"], "no such file or folder"), (["whole.mp4", "x", "-o", "out.avi"], ".mp4"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_a_failure(tmp_path, small_weights, case, says, capsys, monkeypatch):
    if "cuda" in case and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    bad_media(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    weights = [] if "--weights" in case else ["--weights", str(small_weights)]
    monkeypatch.setattr(sys, "argv", ["sample.py", *case, *weights, *([] if "--device" in case else ["--device", "cpu"])])
    with pytest.raises(SystemExit) as exit_:
        sample.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_run_leaves_no_file(tmp_path, small_weights):
    write_clip(tmp_path / "in.mp4", moving_picture(9, 64, 64))
    command = [sys.executable, str(HOUSE / "sample.py"), "in.mp4", "x", "--weights", str(small_weights), "--steps", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    text = ""
    while "denoise" not in text:
        text += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0 and "interrupted" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


# ------------------------------------------------------------------------------------------------ nano.py, world.py


@pytest.fixture(scope="session")
def library():
    return world.load_library()


@pytest.fixture(scope="session")
def nano_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "data"
    nano.main(["data", str(folder), "--clips", "16", "--frames", "5", "--workers", "1"])
    return folder


def test_the_world_is_the_same_whoever_draws_it(tmp_path, nano_data):
    nano.main(["data", str(tmp_path), "--clips", "16", "--frames", "5", "--workers", "2"])
    files = sorted(path.relative_to(nano_data) for path in nano_data.rglob("*.*"))
    assert len(files) == 4 * 4 + 4 * 3 + 8 * 3 + 5
    for name in files:
        assert (tmp_path / name).read_bytes() == (nano_data / name).read_bytes(), name


def test_the_world_s_tables_are_those_of_the_real_data(nano_data):
    for kind, count in {"image": 8, "video": 4, "ref_video": 4}.items():
        rows = list(csv.DictReader((nano_data / f"{kind}.csv").open()))
        columns = ["src_video", "tgt_video", "prompt"] + ["ref_image"] * (kind == "ref_video")
        assert len(rows) == count and list(rows[0]) == columns
        source, target = (read_clip(nano_data / rows[0][c]) for c in columns[:2])
        assert source.frames.shape == target.frames.shape == (1 if kind == "image" else 5, 64, 64, 3)
        assert source.still == (kind == "image") and rows[0]["prompt"]
        if kind == "ref_video":
            assert read_image(nano_data / rows[0]["ref_image"]).shape == (128, 128, 3)


def test_outside_the_mask_nothing_changes_and_inside_something_does(library, nano_data):
    for index in range(40):
        edit = world.draw_edit(library, "train", 0, index, 5, 64)
        source, target, region = world.draw_frames(edit, 64)
        assert torch.equal(source[~region], target[~region]), edit.prompt
        assert (source[region] != target[region]).float().mean() > 0.2, edit.prompt
        if edit.task in ("add", "change", "remove", "subject", "subject_add"):
            assert 0.01 < region.float().mean() < 0.5, edit.prompt
    for row in map(json.loads, (nano_data / "truth.jsonl").read_text().splitlines()):
        source, target = (nano.read_frames(nano_data / row[c]).int() for c in ("src_video", "tgt_video"))
        region = nano.read_frames(nano_data / row["mask"])[0, ..., 0].unflatten(0, (-1, 64)) > 127
        assert region.all() or (source - target)[~region].abs().float().mean() < 2, "the codec's share"


def test_what_is_tested_was_never_trained_on(library):
    train, test = ([world.draw_edit(library, split, 0, i, 1, 64) for i in range(200)] for split in ("train", "test"))

    def seen(edits):
        things = {thing.sprite.name for e in edits for thing in e.source.things}
        photos = {scene.photo.name for e in edits for scene in (e.source, e.target) if "plain" not in scene.photo.name}
        return things | photos | {e.new.name for e in edits if e.new}

    assert not seen(train) & seen(test) and len(seen(test)) > 20
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert library.names("train") and not set(library.names("train")) & set(library.names("test"))


def test_a_perfect_edit_is_recognised_and_the_source_is_not(library):
    for index in range(2, 42, 4):
        edit = world.draw_edit(library, "test", 0, index, 5, 64)
        source, target, region = world.draw_frames(edit, 64)
        measures = nano.measure(target, target, region)
        assert measures["psnr_in"] == 60 and measures["ssim_in"] == pytest.approx(1)
        assert nano.region_psnr(source, target, region) < 40
        if edit.new:
            assert all(nano.recognise(edit, library, "test", target, region, index).values())
            assert not all(nano.recognise(edit, library, "test", source, region, index).values())


def test_the_psnr_of_a_region_ignores_the_rest():
    a, region = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.bool)
    region[:, :4] = True
    b = a.clone()
    b[:, :4], b[:, 4:] = 51, 255
    assert nano.region_psnr(a, b, region) == pytest.approx(-20 * np.log10(51 / 255))
    assert np.isnan(nano.region_psnr(a, b, region & False))


def run_pretrain(part, data, out, *more):
    nano.main(["pretrain", part, "--data", str(data), "--out", str(out), "--steps", "2", "--batch", "2", *more])


def test_pretraining_in_pieces_is_one_training_and_its_weights_ship_and_edit(tmp_path, nano_data):
    run_pretrain("vae", nano_data, tmp_path / "whole")
    run_pretrain("vae", nano_data, tmp_path / "pieces", "--minutes", "0.0001")
    assert torch.load(tmp_path / "pieces/vae.pt", weights_only=True)["step"] == 1
    run_pretrain("vae", nano_data, tmp_path / "pieces")
    whole, pieces = (torch.load(tmp_path / name / "vae.pt", weights_only=True)["masters"] for name in ("whole", "pieces"))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    run_pretrain("mllm", nano_data, tmp_path / "whole")
    run_pretrain("dit", nano_data, tmp_path / "whole")
    model = KiwiEdit.from_pretrained(tmp_path / "whole/weights", dtype=torch.float32)
    assert torch.equal(model.vae.encoder.conv1.weight, whole["encoder.conv1.weight"])
    inject_lora(model.mllm.model.language_model, 4)
    trained = {f"mllm.model.language_model.{k}": v + 0.1 for k, v in lora_state_dict(model.mllm.model.language_model).items()}
    save_file({**trained, "dit.head.head.bias": model.dit.head.head.bias + 1}, tmp_path / "step.safetensors")
    base, shipped = str(tmp_path / "whole/weights"), tmp_path / "shipped"
    nano.main(["ship", str(tmp_path / "step.safetensors"), "--weights", base, "--out", str(shipped)])
    assert sum(path.stat().st_size for path in shipped.rglob("*.*")) < 32e6
    model, before = KiwiEdit.from_pretrained(shipped, dtype=torch.float32), model.dit.head.head.bias
    assert close(model.dit.head.head.bias, before + 1, 1e-2)
    tokenizer = model.mllm.tokenizer
    text = "Replace the bicycle with the one shown, s'il vous plaît."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    frames, ref = moving_picture(5, 64, 64), moving_picture(1, 50, 40)[0]
    assert model.edit(frames, text, ref, steps=1).shape == frames.shape


def test_a_small_denoiser_learns_two_edits_by_heart(tmp_path, library):
    """Both of the same picture: only the instruction tells them apart. Latents are the pixels of 4x4 cells."""
    edit = next(e for e in (world.draw_edit(library, "train", 1, i, 1, 32) for i in range(99)) if e.task == "change")
    source, changed, _ = world.draw_frames(edit, 32)
    pictures = [x.permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (source, changed, 255 - source)]  # (1, 3, 32, 32)
    before, *targets = (F.pixel_unshuffle(x, 4)[:, :, None] for x in pictures)  # (1, 48, 1, 8, 8)
    clean, before = torch.cat(targets), before.expand(2, -1, -1, -1, -1)

    nano.write_mllm_folder(tmp_path / "mllm", [edit.prompt])
    dit = DiTConfig(128, 256, 4, 2, 48, 48, freq_dim=32, text_dim=8, patch_size=(1, 1, 1))
    model = KiwiEdit(KiwiConfig(dit, None, MLLMConfig(str(tmp_path / "mllm"), 128, 4, 0, 0)))
    torch.nn.init.normal_(model.mllm.connector[2].weight)
    with torch.no_grad():
        contexts = torch.cat([model.mllm(text, source) for text in (edit.prompt, "Show the negative.")])
    optimiser = torch.optim.AdamW((p for name, p in model.named_parameters() if "mllm" not in name), 2e-3, (0.9, 0.98))
    for _ in range(400):
        t = FlowMatch().timesteps(1000)[torch.randint(1000, (8,))]
        model.training_loss(clean.repeat(4, 1, 1, 1, 1), contexts.repeat(4, 1, 1), t, before.repeat(4, 1, 1, 1, 1)).backward()
        optimiser.step()
        optimiser.zero_grad()
    result = model.denoise(torch.randn_like(clean), contexts, before, steps=10)
    error, copied = ((x - clean).square().flatten(1).mean(dim=1) for x in (result, before))
    assert error[0] < copied[0] / 2 and error[1] < copied[1] / 8, (error, copied)


@pytest.mark.parametrize("arguments, says", [
    (["data", "x", "--size", "50"], "multiple of 32"), (["data", "x", "--frames", "8"], "4k + 1"),
    (["data", "x", "--assets", "."], "nano.py assets"), (["pretrain", "vae", "--data", "x", "--out", "y"], "nano.py data"),
    (["eval", "--weights", "w", "--data", "x", "--out", "y"], "nano.py data"),
])  # fmt: skip
def test_what_nano_cannot_do_is_said_in_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nano.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        nano.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code


def test_an_archive_that_is_not_the_checked_one_is_refused(tmp_path):
    (tmp_path / "pmndrs-assets-1.7.0.tgz").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the archive"):
        nano.fetch_package("@pmndrs/assets", tmp_path)
    assert nano.plain_name({"name": "DOG FACE", "category": "Animals & Nature"}) == "dog"
    assert nano.plain_name({"name": "Clock Face One Oclock", "category": "Travel & Places"}) is None
