"""What tests share: recordings, drawn clips, small models and data sets."""

import csv
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch, as the commands do
if os.environ.get("KIWI_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bounds are those of float32 on a CPU; kernels' tests are for both

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: the kernels run on a CPU too, interpreted

import judge
import kernels
import start
import train
from connectors import MLLMConfig
from dit import DiTConfig
from load import load_weights, released_name
from media import write_image, write_video
from model import KiwiConfig, KiwiEdit
from nano.__main__ import main as nano_main
from vae import VAEConfig

HOUSE = Path(__file__).parent
SHARED = HOUSE.parent / "shared"
GOLDEN = SHARED / "golden"
TOL = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest expected value

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden, outputs recorded from the release")
demo = pytest.mark.skipif(not (SHARED / "demo").is_dir(), reason="needs ../shared/demo, real clips")


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


@pytest.fixture
def triton_backend(monkeypatch):
    """The kernels; what one of them forgets to write is NaN."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or a patch embedding has ten bits
    kernels.set_backend("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    kernels.set_backend("auto")


def tiny_dit(**changes):
    return DiTConfig(**{**dict(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=16, out_dim=16, freq_dim=32,
                               text_dim=24), **changes})  # fmt: skip


def tiny_vae(version="2.2", **changes):
    return VAEConfig(**{**dict(version=version, dim=8, dec_dim=6, z_dim=12, num_res_blocks=1), **changes})


def write_qwen_folder(folder):
    """A tiny Qwen2.5-VL config and a byte-level tokenizer with its special tokens: what a hub folder has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    names = "endoftext im_start im_end object_ref_start vision_start vision_end image_pad video_pad".split()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>") for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    vision["fullatt_block_indexes"] = [0]
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


def moving_picture(count=9, height=70, width=102):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frame = lambda t: torch.stack([2 * x + 3 * t, 3 * y, x + y], dim=-1) % 256
    return torch.stack([frame(t) for t in range(count)]).to(torch.uint8)


def write_clip(
    path, frames, codec="libx264", pix="yuv420p", rate=25, times=None, pixels=1, options=None, container=None
):
    """A clip with frames at `times` (in units of 1 / rate) and pixels of that aspect."""
    with av.open(str(path), "w", container_options=container or {}) as out:
        video = out.add_stream(codec, rate=rate, options=options or ({"crf": "1"} if codec == "libx264" else {}))
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], pix
        video.codec_context.sample_aspect_ratio = Fraction(pixels)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24").reformat(format=pix)
            frame.pts, frame.time_base = (times[i] if times else i), 1 / Fraction(rate)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return path


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
    write_image(folder / "its_compare.png", moving_picture(1)[0])
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>')
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    with av.open(str(folder / "sound.mp3"), "w") as out:
        track = out.add_stream("mp3", rate=44100)
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 44100), dtype=np.float32), format="fltp", layout="mono")
        piece.rate = 44100
        out.mux([*track.encode(piece), *track.encode()])


def write_table(path, rows, ref=False):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["src_video", "tgt_video", "prompt", *["ref_image"] * ref], *rows])
    return path


def manifest(name):
    tensors = recorded(f"manifest/{name}.json")["tensors"]
    return {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}


@pytest.fixture(scope="session")
def real_qwen_folder(tmp_path_factory, qwen_folder):
    """Qwen2.5-VL-3B's published config, with the small tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-3B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(recorded("manifest/qwen2.5_vl_3b_instruct.json")["config"]))
    (folder / "tokenizer.json").write_bytes((qwen_folder / "tokenizer.json").read_bytes())
    return folder


def small_model(qwen_folder, dim=32, heads=1):
    """A whole Kiwi-Edit of some 100,000 random weights."""
    mllm = MLLMConfig(str(qwen_folder), dim, 4, 4, 4, max_ref_tokens=4, max_pixels=64 * 64)
    dit = tiny_dit(dim=dim, ffn_dim=48, num_heads=heads, in_dim=48, out_dim=48)
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
    late = ("mllm.ref_", "ref_embedder.") if stage < 3 else ()
    names = [k for k in model.state_dict() if not k.startswith(("vae.", "mllm.model.", *late))]
    trained = {released_name(k): model.state_dict()[k].contiguous() for k in names}
    layer = "mllm.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    trained |= {f"{layer}A.default.weight": torch.randn(2, 32), f"{layer}B.default.weight": torch.randn(32, 2)}
    save_file(trained, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


TO_DIFFUSERS = [
    (r"self_attn\.([qkv])\.", r"attn1.to_\1."), (r"cross_attn\.([qkv])\.", r"attn2.to_\1."),
    (r"self_attn\.o", "attn1.to_out.0"),
    (r"cross_attn\.o", "attn2.to_out.0"), (r"self_attn", "attn1"), (r"cross_attn", "attn2"), (r"norm3", "norm2"),
    (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2"), (r"head\.modulation", "scale_shift_table"),
    (r"modulation", "scale_shift_table"), (r"head\.head", "proj_out"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"(text|time)_embedding\.0", r"condition_embedder.\1_embedder.linear_1"),
    (r"(text|time)_embedding\.2", r"condition_embedder.\1_embedder.linear_2"),
]  # fmt: skip


def save_diffusers_layout(model, folder):
    """The folder that the released converter writes."""
    d, m, dit = model.config.dit, model.config.mllm, {}
    for name, value in model.dit.state_dict().items():
        for ours, theirs in TO_DIFFUSERS:
            name = re.sub(ours, theirs, name)
        dit[name] = value
    transformer = dict(
        patch_size=d.patch_size, in_channels=d.in_dim, out_channels=d.out_dim, num_attention_heads=d.num_heads,
        attention_head_dim=d.head_dim, text_dim=d.text_dim, freq_dim=d.freq_dim, ffn_dim=d.ffn_dim,
        num_layers=d.num_layers, eps=d.eps,
    )  # fmt: skip
    mean, std = model.config.vae.statistics
    encoder = dict(dit_dim=m.dit_dim, max_object_token=m.max_ref_tokens, max_frames=16,
                   max_pixels_per_frame=m.max_pixels)  # fmt: skip
    own = {k: v for k, v in model.mllm.state_dict().items() if not k.startswith("model.")}
    pad = {"ref_pad_first": model.config.ref_pad_first}
    for name, config, state in (
        ("transformer", transformer, dit),
        ("vae", {"z_dim": 48, "latents_mean": mean, "latents_std": std}, model.vae.state_dict()),
        ("mllm_encoder", encoder, own),
        ("source_embedder", pad, model.source_embedder.state_dict()),
        ("ref_embedder", pad, model.ref_embedder.state_dict()),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file({k: v.contiguous() for k, v in state.items()}, folder / name / "diffusion_pytorch_model.safetensors")
    save_file(published_qwen(model), folder / "mllm_encoder" / "model-00001-of-00001.safetensors")
    write_qwen_folder(folder / "processor")
    (folder / "processor" / "config.json").rename(folder / "processor" / "qwen_config.json")
    return folder


def small_edit(model, ref=True):
    picture = torch.randint(255, (40, 50, 3), dtype=torch.uint8) if ref else None
    return model.edit(moving_picture(6, 32, 64), "Replace the sky.", picture, steps=2)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory, qwen_folder):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "small"
    small_model(qwen_folder).save(folder)
    return folder


@pytest.fixture(scope="session")
def nano_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "data"
    nano_main(["data", str(folder), "--clips", "16", "--frames", "5", "--workers", "1"])
    return folder


def smooth_clip(colour, count=8, size=64):
    """A coloured square that moves over a grey slope: uint8 (count, size, size, 3)."""
    frames = torch.linspace(60, 160, size).repeat(count, size, 1)[..., None].repeat(1, 1, 1, 3)
    for t in range(count):
        frames[t, 16:48, 8 + 2 * t : 40 + 2 * t] = torch.tensor(colour, dtype=torch.float)
    return frames.to(torch.uint8)


RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (40, 60, 220)


def score(folder, fake, *more, judge_="openai:m", out="out"):
    arguments = ["score", "--bench", "refvie", folder / "bench.yaml", "--edits", folder / "edits", "--judge", judge_,
                 "--endpoint", fake.url, "--set", "wait=0.01", "--out", folder / out, *more]  # fmt: skip
    judge.main(list(map(str, arguments)))


def tiny_local_judge(folder, kind):
    """A folder with a random Qwen2.5-VL or Qwen3-VL of some 100,000 weights."""
    import transformers

    write_qwen_folder(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {t["content"].strip("<|>"): t["id"] for t in tokenizer["added_tokens"]}
    special = {"vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
               "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"]}  # fmt: skip
    text = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
                vocab_size=max(ids.values()) + 1,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4})  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    if kind == "qwen2_5_vl":
        name, vision = "Qwen2_5_VL", {**vision, "fullatt_block_indexes": [0]}
    else:
        vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
        name, text = "Qwen3VL", {**text, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **special)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lesson(tmp_path_factory, qwen_folder):
    """A data set of some tiny pairs of every kind, and weights of a tiny model with two heads."""
    folder = tmp_path_factory.mktemp("lesson")
    tables = {"image.csv": [], "video.csv": [], "ref_video.csv": []}
    for name, rows in tables.items():
        for i in range(5):
            frames = moving_picture(1 if name == "image.csv" else 5 + 4 * (i % 2), 64, 64 + 32 * (i % 3 == 0))
            files = [f"{name[:-4]}_{i}_{part}.{'png' if len(frames) == 1 else 'mp4'}" for part in ("src", "tgt")]
            for file, pixels in zip(files, (frames, 255 - frames)):
                write_image(folder / file, pixels[0]) if len(frames) == 1 else write_video(folder / file, pixels, 8)
            write_image(folder / f"ref_{i}.png", frames[0, : 40 + 7 * i])
            rows.append([*files, f"Invert it, {i}.", *[f"ref_{i}.png"] * (name == "ref_video.csv")])
        write_table(folder / name, rows, ref=name == "ref_video.csv")
    torch.manual_seed(0)
    small_model(qwen_folder, 48, 2).save(folder / "weights")
    return folder


@pytest.fixture(scope="session")
def held(tmp_path_factory, lesson):
    """A row of each kind, held out."""
    folder = tmp_path_factory.mktemp("held")
    for table in lesson.glob("*.csv"):
        head, row, *_ = table.read_text().splitlines()
        (folder / table.name).write_text(f"{head}\n{row}\n")
        for name in (name for name in row.split(",") if name.endswith((".png", ".mp4"))):
            (folder / name).symlink_to(lesson / name)
    return folder


SMALL = ["global_batch=4", "pixels=6144", "frames=9", "warmup=0", "lr=1e-3", "lora_rank=2", "workers=0"]


def lessons(lesson, out, *flags, stage=3, weights="weights", settings=()):
    """The command line of a small run."""
    words = ["--stage", stage, "--data", lesson, "--out", out, "--weights", lesson / weights, *flags]
    return [*map(str, words), "--set", *SMALL, *settings]


def losses(out, name="loss"):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def same_course(out, expected, tol=1e-5):
    """Losses and gradient norms agree (AdamW would forgive gradients of a wrong scale)."""
    pairs = [[torch.tensor(losses(run, name)) for run in (out, expected)] for name in ("loss", "grad_norm")]
    return all(close(a, b, 10 * tol if i else tol) for i, (a, b) in enumerate(pairs))


def go(*words, **more):
    train.main(lessons(*words, **more))


@contextmanager
def trainer_of(lesson, out, *settings, flags=(), stage=3):
    args = train.parse_arguments(lessons(lesson, out, *flags, stage=stage, settings=settings))
    stage = train.choose_stage(args)
    ranks = train.Ranks(stage.parallel, stage.dtype, args.sp)
    try:
        rows, stage = start.open_data(args, stage, ranks)
        model, cache = start.load_model(args, stage, ranks, None, rows)
        yield train.Trainer(args, stage, ranks, model, rows, cache)
    finally:
        ranks.leave()


def begun(lesson, out, *flags, settings=()):
    """A training in a process group of its own."""
    command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, out, *flags, settings=settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def steps_of(out):
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0


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
