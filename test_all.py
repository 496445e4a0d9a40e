"""The house, tested: one section per file, in the order of the floors. `pytest test_all.py`, a few minutes on 2 cores.

Recorded outputs of the released code lie in ../shared/golden, real clips in ../shared/demo; a test that needs them
skips aloud without them. diffusers, a second witness of the same architecture, is a requirement of the tests alone.
"""

import ast
import base64
import csv
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

if os.environ.get("KIWI_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bounds are those of float32 on a CPU; the kernels' tests alone are for both

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: the kernels run on a CPU too, interpreted

import curate
import data
import judge
import judges
import kernels
import metrics
import nano
import sample
import train
import world
from connectors import (
    MLLMConfig, MLLMEncoder, fit_pixels, inject_lora, merge_lora, sample_frames, video_frame_sizes,
)  # fmt: skip
from data import (
    Curriculum, MediaError, Mixture, Pairs, bucket, fit_frames, measure, measure_rows, nearest_size, pad_reference, read_clip, read_image,
    read_table, usable_frames, whole_file, working_size, write_image, write_video,
)  # fmt: skip
from dit import DiT, DiTConfig, rope_3d
from kernels.bench import built, diffusers_dit, diffusers_vae, diffusers_vae_name, norm_rows, peak_of_live_tensors, table
from model import PRESETS, FlowMatch, KiwiConfig, KiwiEdit, balance_weights, load_weights, our_name, read_for, read_weights, released_name, valid_checkpoints, working_on
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
    "kernels": 0, "dit": 1, "vae": 1, "connectors": 1, "data": 1, "model": 2, "world": 2, "metrics": 2, "judges": 2,
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


COMMANDS = (sample, train, judge, curate, nano)


@pytest.mark.parametrize("command, line", [(c, line) for c in COMMANDS for line in readme_commands(f"{c.__name__}.py")])
def test_the_readme_s_commands_parse(command, line):
    words = shlex.split(line, comments=True)
    command.parse_arguments(words[words.index(f"{command.__name__}.py") + 1 :])


def test_the_readme_points_at_code_that_exists():
    pointers = re.findall(rf"`((?:{'|'.join(FLOORS)})\.[A-Za-z_.]+)`", (HOUSE / "README.md").read_text())
    for pointer in pointers:
        module, *names = pointer.split(".")
        if names[-1] not in ("py", "jsonl"):  # a file's name
            assert functools.reduce(getattr, names, importlib.import_module(module)), pointer


def test_the_readme_s_figures_are_those_of_the_committed_benchmark():
    readme, quoted = (HOUSE / "README.md").read_text(), 0
    for path in (HOUSE / "bench").glob("*.json"):
        for section, results in json.loads(path.read_text()).items():
            if section in ("dit", "vae", "memory"):
                quoted += 1
                assert table(results["rows"]) in readme, f"{section} of {path.name}: paste its table"
    assert quoted >= 3


@pytest.mark.parametrize("machine", ["h100", "cpu"])
def test_the_recipes_are_bash_whose_commands_parse(tmp_path, capsys, machine):
    nano.main(["recipe", machine])
    tell = 'python() { printf "%q " "$@"; echo; }; timeout() { shift; "$@"; }; torchrun() { shift 2; python "$@"; }\n'
    done = subprocess.run(["bash", "-c", tell + capsys.readouterr().out], capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines.pop() == ["0", "minutes"] and len(lines) == 14
    for program, *words in lines:
        importlib.import_module(Path(program).stem).parse_arguments(words)


@pytest.mark.parametrize("command", (sample, train, curate, nano), ids=lambda command: command.__name__)
def test_every_flag_of_a_command_is_read(command):
    text = (HOUSE / f"{command.__name__}.py").read_text()
    flags = re.findall(r'add\(\s*(?:"-\w", )?"--([\w-]+)"', text)
    assert flags and all(re.search(rf"args\.{flag.replace('-', '_')}\b", text) for flag in flags)


# ------------------------------------------------------------------------------------------------ kernels/
# On a GPU the kernels as they are, else under Triton's interpreter (which has no bfloat16 constants, so no bfloat16).

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
LOADS = {"pointers": (False, False), "tma": (True, False), "specialised": (True, True)}  # TMA, SPECIALISE


@pytest.fixture
def triton_backend(monkeypatch):
    """The kernels; what one of them forgets to write is NaN."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # a patch embedding in ten bits would be the difference
    kernels.set_backend("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    kernels.set_backend("auto")


@pytest.fixture(params=LOADS)
def one_kind_of_load(request, monkeypatch):
    """Attention with one of its ways to load: on a GPU in its own configurations, else in small blocks."""
    tma, specialise = LOADS[request.param]
    if DEVICE == "cuda" and tma and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("TMA and warp specialisation are for Hopper")
    module = sys.modules["kernels.attention"]
    for name, configs in module.CONFIGS.items():
        kind = (tma, specialise) if name == "attention_forward" else (tma,)
        real = [config for config in configs if config[2:-2] == kind]
        monkeypatch.setitem(module.CONFIGS, name, real if DEVICE == "cuda" else [(16, 32, *kind, 4, 1)])
    module.compiled.cache_clear()
    yield request.param
    module.compiled.cache_clear()


def test_attention_is_measured_inside_a_checkpoint_without_a_trace(capsys):
    def block(x):  # in the forward, as the first block of a training on a GPU does; it is known when that is recomputed
        if not measured:
            with kernels.left_out("a candidate"):
                measured.append(kernels.run_alone(kernels.ATTENTION["ref"], [torch.randn(1, 4, 2, 8) for _ in range(3)], trains=True))
        return x.sin().cos()

    measured, x = [], torch.randn(5, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, -x.sin().sin() * x.cos()) and "left out" not in capsys.readouterr().out
    assert len(measured) == 1 and all(gradient.any() for gradient in measured[0])


def agrees_with_float64(function, *inputs):
    """A function of `kernels` on the backend chosen, forward and backward, against the float64 definition."""
    results = []
    for dtype in (None, torch.float64):
        leaves = [x.to(device=DEVICE, dtype=dtype or x.dtype).detach().requires_grad_() for x in inputs]
        kernels.set_backend("triton" if dtype is None else "ref")
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # a GPU counts in the dtype asked for: half precision ends at 65,504
        weights = [torch.linspace(-1, 1, o.numel(), device=DEVICE, dtype=torch.float64).view_as(o).sin().to(o.dtype) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    tol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[inputs[0].dtype]
    return all(actual.dtype != torch.float64 and close(actual, exact, tol) for actual, exact in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_matches_float64_at_lengths_with_tails(triton_backend, one_kind_of_load, dtype):
    if DEVICE == "cuda" and dtype == torch.float32 and one_kind_of_load != "pointers":
        pytest.skip("on a GPU float32 is loaded by pointers alone")
    lengths = [(37, 53, 2, 64), (33, 64, 1, 128)] + [(300, 515, 2, 128)] * (DEVICE == "cuda")
    lengths += [(5, 7, 3, 16)] * (DEVICE == "cpu" or one_kind_of_load != "specialised")  # that is for heads of 64 and more
    for queries, keys, heads, dim in lengths:
        q, k, v = (torch.randn(2, n, heads, dim).to(dtype) for n in (queries, keys, keys))
        assert agrees_with_float64(kernels.attention, q, k, v)


@pytest.mark.parametrize("keys", [(2, 0, 3, 16), (2, 7, 2, 16), (2, 7, 3, 32), (1, 7, 3, 16)])
def test_attention_in_triton_refuses_keys_that_do_not_fit(triton_backend, keys):
    with pytest.raises(ValueError, match="do not fit"):
        kernels.attention(torch.randn(2, 5, 3, 16, device=DEVICE), *torch.randn(2, *keys, device=DEVICE))


def test_attention_by_slices_of_the_batch_is_attention(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention"], "SLICE", 2 * 5 * 7 * 3)
    q, k, v = (torch.randn(5, n, 3, 16, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    actual, exact = (f(q, k, v) for f in (kernels.attention_slices, kernels.attention_ref))
    weights = torch.randn_like(exact)
    assert close(actual, exact, 1e-12)
    for ours, theirs in zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (actual, exact))):
        assert close(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_norms_match_float64_at_widths_with_tails(triton_backend, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.norm"], "PROGRAMS", 5)  # several rows a program
    grid, heads, D = (2, 3, 4), 3, 72
    x, y = (torch.randn(2, 24, D).to(dtype) for _ in range(2))
    gate, shift, scale = (torch.randn(2, 1, D) for _ in range(3))
    shared, rope = torch.randn(1, 1, D), rope_3d(grid, D // heads, torch.device(DEVICE))
    assert agrees_with_float64(lambda x, w: kernels.rms_norm_rope(x, w, rope, heads, 1e-6), x, torch.randn(D).to(dtype))
    assert agrees_with_float64(lambda x, w: kernels.rms_norm_rope(x, w, None, heads, 1e-6), x, torch.randn(D).to(dtype))
    assert agrees_with_float64(lambda x, *m: kernels.layer_norm_modulate(x, *m, 1e-6), x, shift, scale)
    assert agrees_with_float64(kernels.gate_residual, x, y, gate)
    assert agrees_with_float64(lambda *all: kernels.gate_residual_norm(*all, 1e-6), x, y, gate, shared, scale)
    assert agrees_with_float64(lambda x, y, *m: kernels.gate_residual_norm(x, y, None, *m, 1e-6), x, y, shift, shared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vae_s_fused_norm_matches_float64_in_any_layout(triton_backend, dtype):
    for channels in (5, 600):
        x, gamma = torch.randn(2, channels, 3, 2, 7).to(dtype), torch.randn(channels, 1, 1, 1).to(dtype)
        for video in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            assert agrees_with_float64(kernels.channel_norm_silu, video, gamma)
    x, gamma = x.to(DEVICE) * 0, gamma.to(DEVICE)
    kernels.set_backend("triton")
    assert not kernels.channel_norm_silu(x, gamma).any()  # what has no direction keeps none
    with pytest.raises(ValueError, match="do not fit"):
        kernels.channel_norm_silu(x, gamma[:4])


def test_the_fused_norms_read_no_memory_that_is_not_theirs(triton_backend):
    x, weight = torch.randn(2, 5, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    turn = torch.randn(3, 5, device=DEVICE).T  # one row a position, columns apart
    kernels.set_backend("ref")
    wanted = kernels.rms_norm_rope(x, weight, (turn, turn), 4, 1e-6), kernels.gate_residual(x, x[:1], weight[None, None])
    kernels.set_backend("triton")
    assert close(kernels.rms_norm_rope(x, weight, (turn, turn), 4, 1e-6), wanted[0], 1e-5)
    assert close(kernels.gate_residual(x, x[:1], weight[None, None]), wanted[1], 1e-5)
    for table, w in (((turn[:2], turn[:2]), weight), (None, weight[:4])):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.rms_norm_rope(x, w, table, 4, 1e-6)


def test_a_residual_without_a_gate_keeps_no_update_for_its_backward(triton_backend):
    x, y, m, kept = torch.randn(1, 5, 24, device=DEVICE), torch.randn(1, 5, 24, device=DEVICE), torch.randn(1, 1, 24, device=DEVICE), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        kernels.gate_residual_norm(x, y.requires_grad_(), None, m, m, 1e-6)[1].sum().backward()
    assert kept and y.data_ptr() not in kept and y.grad is not None


def test_the_plain_norms_take_float64_and_any_layout_of_their_input():
    x, m, rope = torch.randn(1, 24, 5).transpose(1, 2), torch.randn(1, 1, 24), rope_3d((5, 1, 1), 6, torch.device("cpu"))
    for run in (lambda x: kernels.layer_norm_modulate(x, m, m, 1e-6), lambda x: kernels.rms_norm_rope(x, m[0, 0], rope, 4, 1e-6)):
        assert close(run(x), run(x.double().contiguous()).float(), 1e-5)


def test_a_dit_trains_on_the_kernels_as_on_the_definitions(triton_backend):
    model = randomise(DiT(tiny_dit(num_layers=1))).to(DEVICE)
    assert agrees_with_float64(
        lambda x, context: model.to(x.dtype)(x, torch.tensor([300.0, 40.0], device=DEVICE), context),
        torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 64),
    )  # fmt: skip


def test_the_kernels_register_as_operators_that_autograd_and_compile_accept(triton_backend):
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE, requires_grad=True) for n in (5, 7, 7))
    x, weight = (torch.randn(*s, 32, device=DEVICE, requires_grad=True) for s in ((1, 5), ()))
    gate = torch.randn(1, 1, 32, device=DEVICE)
    for op, arguments in (("attention", (q, k, v)), ("rms_norm_rope", (x, weight, None, None, 2, 1e-6)),
                          ("residual_norm", (x, x.detach(), gate, gate, gate, 1e-6))):  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.nanokiwi, op), arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_backend_that_cannot_run_is_refused_and_auto_takes_what_can(monkeypatch):
    q = torch.randn(1, 4, 2, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="auto, ref, sdpa, cudnn, slices, triton"):
        kernels.set_backend("cuda")
    assert kernels.choose(q, measured=True) == kernels.choose(q.bfloat16()) == "sdpa"
    assert kernels.choose(q.bfloat16(), measured=True) == "slices"
    assert kernels.choose(torch.empty(1, 4096, 2, 16, dtype=torch.bfloat16), measured=True) == "sdpa", "scores that fill the memory"
    kernels.set_backend("triton")
    with pytest.raises(RuntimeError, match="needs a GPU"):
        kernels.attention(q, q, q)
    kernels.set_backend("auto")


def test_the_benchmark_s_two_sides_answer_the_same_question():
    rows = list(norm_rows(1, (1, 2, 2), 2, torch.float32))
    assert [row["direction"] for row in rows] == ["forward", "backward"] * 4
    assert all(row["relative difference"] < 1e-5 for row in rows)


def test_keys_behind_the_last_weigh_nothing_however_low_the_others_score(triton_backend, one_kind_of_load):
    axis = F.normalize(torch.ones(64), dim=0)
    q, k = 8 * axis + 0.1 * torch.randn(1, 37, 1, 64), -8 * axis + 0.1 * torch.randn(1, 53, 1, 64)  # each score about -8
    assert agrees_with_float64(kernels.attention, 2 * q, 2 * k, torch.randn(1, 53, 1, 64))


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
    with torch.no_grad():
        small, large = (peak_of_live_tensors(lambda: vae.decode(torch.empty(1, 12, 2, n, n, device="meta"), out_device="cpu"), vae)
                        for n in (8, 16))  # fmt: skip
    features = 6 * 4 * 256 * 256 * 2 / 2**30  # of the last level, six channels of four frames, in bfloat16
    assert 3 * features < large < 6 * features and 2.5 < large / small < 4


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


@pytest.mark.parametrize("version", ["2.2", "2.1"])
def test_the_vae_agrees_with_diffusers(version):
    pytest.importorskip("diffusers")
    ours = randomise(VAE(tiny_vae(version)))
    theirs = diffusers_vae(ours.config).eval()
    theirs.load_state_dict({diffusers_vae_name(k, ours.config): v for k, v in ours.state_dict().items()})
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(video)
        assert close(latents, theirs.encode(video).latent_dist.mean)
        assert close(ours.decode(latents), theirs.decode(latents).sample)


def test_a_vae_used_for_inference_first_can_be_trained_later_and_tells_of_an_overflow():
    vae, video = randomise(VAE(tiny_vae())), torch.rand(1, 3, 1, 32, 32) * 2 - 1
    with torch.inference_mode():
        latents = vae.encode(video)
    vae.encode(video).sum().backward()
    assert vae.conv1.weight.grad is not None
    with torch.no_grad(), pytest.raises(ValueError, match="tile: -1, expected at least 1"):
        vae.decode(latents, tile=-1)
    vae.decoder.head["2"].weight.data.fill_(float("inf"))
    with torch.no_grad(), pytest.raises(ValueError, match="overflowed in float32: take bfloat16 or float32"):
        vae.decode(latents, levels=True)


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
        assert sizes[frames] == sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor)), "a view keeps its chunk alive"
    assert sizes[41] == sizes[9] == sizes[5]


def test_wrong_lengths_and_sizes_are_refused_and_not_cut():
    vae = VAE(tiny_vae())
    with pytest.raises(ValueError, match="6 frames"):
        vae.encode(torch.zeros(1, 3, 6, 32, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        vae.encode(torch.zeros(1, 3, 5, 40, 32))
    with pytest.raises(ValueError, match="VAEConfig.dim_mult"):
        tiny_vae(dim_mult=(1, 2, 4, 8))


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
    encoder = MLLMEncoder.from_config(qwen_folder, dit_dim=16, num_image_queries=3, num_video_queries=4, num_ref_queries=5)
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


# ------------------------------------------------------------------------------------------------ data.py


def moving_picture(count=9, height=70, width=102):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frame = lambda t: torch.stack([2 * x + 3 * t, 3 * y, x + y], dim=-1) % 256
    return torch.stack([frame(t) for t in range(count)]).to(torch.uint8)


def write_clip(path, frames, times=None, rate=25, sound=None, late=0.0, pixels=Fraction(1)):
    """A clip of pixels so wide with frames at `times` in milliseconds and, with sound, a 440 Hz tone of 2 s in that codec, `late` s in."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=rate, options={"crf": "1"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.time_base, video.codec_context.sample_aspect_ratio = Fraction(1, 1000), pixels
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
                piece.rate, piece.pts = 48000, i + round(48000 * late)
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


def test_a_small_size_keeps_the_picture_s_aspect_and_uses_the_pixels():
    sizes = {(704, 1280): (48, 80), (1280, 720): (80, 48), (480, 640): (48, 64), (1000, 1000): (64, 64), (64, 64): (64, 64)}
    for (height, width), expected in sizes.items():
        h, w = nearest_size(height, width, 64 * 64, 16)
        assert (h, w) == expected and 0.75 <= h * w / 64**2 <= 1
        assert 0.9 < h * width / (w * height) < 1.1
    with pytest.raises(ValueError, match="too few"):
        nearest_size(15, 640, 64 * 64, 16)


def test_a_clip_of_a_higher_rate_gives_every_kth_frame(tmp_path):
    frames = (torch.arange(20, dtype=torch.uint8) * 12).view(-1, 1, 1, 1).expand(-1, 64, 64, 3)
    write_video(tmp_path / "in.mp4", frames, 30)
    clip = read_clip(tmp_path / "in.mp4", 9, max_fps=8)
    assert clip.fps == Fraction(30, 4) and len(clip.frames) == 5
    assert (clip.frames[:, 0, 0, 0].int() - frames[::4, 0, 0, 0].int()).abs().max() <= 2
    assert len(read_clip(tmp_path / "in.mp4", 9, max_fps=30).frames) == 9


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


def test_sound_that_sets_in_late_stays_late(tmp_path):
    source = write_clip(tmp_path / "in.mkv", moving_picture(30), sound="pcm_s16le", late=0.4)
    write_video(tmp_path / "out.mp4", read_clip(source).frames, 25, audio_from=source)
    with av.open(str(tmp_path / "out.mp4")) as out:
        heard = [(frame.time, np.abs(frame.to_ndarray()).max() > 0.05) for frame in out.decode(audio=0)]
    assert abs(next(time for time, loud in heard if loud) - 0.4) < 0.05


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
    wide = write_clip(tmp_path / "wide.mp4", moving_picture(1, 64, 96), pixels=Fraction(4, 3))
    assert measure_rows([SimpleNamespace(source=wide, target=wide, ref=None)], still=False) == [(1, 64, 128)] and read_image(wide).shape[1] == 128
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 40, 40, "rgba", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((40, 40, 4), (200, 100, 0, 51), dtype=np.uint8), format="rgba")
    (tmp_path / "glass.png").write_bytes(b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)]))
    assert read_image(tmp_path / "glass.png")[0, 0].tolist() == [244, 224, 204]  # a fifth over white
    assert read_clip(tmp_path / "glass.png").still


def test_what_metadata_mirror_is_mirrored(tmp_path):
    write_image(tmp_path / "plain.jpg", moving_picture(1, 64, 96)[0])
    plain, jpeg = read_image(tmp_path / "plain.jpg"), (tmp_path / "plain.jpg").read_bytes()
    ways = {2: plain.flip(1), 4: plain.flip(0), 5: plain.transpose(0, 1), 6: plain.rot90(-1), 7: plain.transpose(0, 1).flip(0, 1)}
    for orientation, seen in ways.items():
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
        (tmp_path / "exif.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
        assert torch.equal(read_image(tmp_path / "exif.jpg"), seen), orientation
    path = write_clip(tmp_path / "in.mp4", moving_picture(1, 64, 96))
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # the track header's display matrix
    data[matrix : matrix + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 96 << 16, 0, 1 << 30)
    (tmp_path / "selfie.mp4").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "selfie.mp4"), read_image(path).flip(1))


def test_a_clip_cut_without_encoding_it_anew_has_the_frames_that_are_shown(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(60))
    with av.open(str(source)) as old, av.open(str(tmp_path / "cut.mp4"), "w") as new:
        stream = old.streams.video[0]
        track, cut = new.add_stream_from_template(stream), round(Fraction(48, 25) / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, track
                new.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as clip:
        assert clip.streams.video[0].frames == 60  # what makes it hard
    assert measure(tmp_path / "cut.mp4")[0] == 12
    assert torch.equal(read_clip(tmp_path / "cut.mp4").frames, read_clip(source).frames[48:57])


def test_a_clip_whose_header_says_neither_length_nor_rate_has_those_of_its_frames(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(20))
    for options in ({}, {"live": "1"}):  # of Matroska's time stamps, 1000 a second, or of no length
        with av.open(str(source)) as old, av.open(str(tmp_path / "copy.mkv"), "w", options=options) as new:
            stream = old.streams.video[0]
            track = new.add_stream_from_template(stream)
            for packet in old.demux(stream):
                if packet.size:
                    packet.stream = track
                    new.mux(packet)
        assert measure(tmp_path / "copy.mkv") == measure(source) and measure(source)[0] == 20
        assert torch.equal(read_clip(tmp_path / "copy.mkv").frames, read_clip(source).frames)


def test_of_two_to_four_frames_all_are_kept_for_one_alone_would_be_a_picture(tmp_path):
    for count, read in ((1, 1), (2, 2), (4, 4), (5, 5), (8, 5)):
        write_video(str(tmp_path / "in.mp4"), moving_picture(count, 64, 64), 25)
        assert len(read_clip(tmp_path / "in.mp4").frames) == read


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


def test_every_bad_file_is_one_media_error_that_names_it(tmp_path):
    bad_media(tmp_path)
    for name in ("half.mp4", "flipped.mp4", "empty.mp4", "words.png", "dot.png", "half.jpg", "sound.mp3", "absent.mp4", "drawing.svg"):
        with pytest.raises(MediaError, match=re.escape(name)) as error:
            read_clip(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_name_is_a_name_and_no_pattern(tmp_path):
    for name in ("100%done.png", "my%20dog.png", "a%d.png", "clip12:30.png"):
        write_image(tmp_path / name, moving_picture(1)[0])
        assert torch.equal(read_image(tmp_path / name), moving_picture(1)[0])


def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "out.mp4") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_mixture_gives_each_row_once_an_epoch_in_the_ratio_asked_for_and_has_no_state():
    buckets = {"image": {(1, 64, 64): list(range(10)), (1, 64, 96): [10, 11, 12]}, "video": {(9, 64, 64): list(range(5))}}
    mixture = Mixture(buckets, {"image": 2, "video": 1, "ref": 0}, 2, seed=3)
    batches = [mixture[n] for n in range(300)]
    assert [kind for kind, *_ in batches[:6]] == ["image", "video", "image"] * 2
    seen = [row for kind, _, rows in batches if kind == "image" for row in rows]
    for row in range(13):  # 400 samples are 30.8 epochs; buckets of an odd size cut their batches across epochs
        assert 29 <= seen.count(row) <= 32
    assert sorted(seen[:26]) == sorted([*range(13)] * 2)  # 10 + 3 rows by two: even after two epochs
    again = Mixture(buckets, {"image": 2, "video": 1}, 2, seed=3)
    assert [again[n] for n in (299, 7, 100)] == [batches[n] for n in (299, 7, 100)]
    assert [Mixture(buckets, {"image": 2, "video": 1}, 2, seed=4)[n] for n in range(9)] != batches[:9]


def test_the_order_of_a_million_rows_is_made_once_an_epoch_and_not_for_every_batch():
    mixture, took = Mixture({"image": {(1, 64, 64): range(1_000_000)}}, {"image": 1}, 1, seed=0), []
    for numbers in (range(1), range(1, 2000)):
        started = time.perf_counter()
        assert len({mixture[n][2][0] for n in numbers}) == len(numbers)
        took.append(time.perf_counter() - started)
    assert took[1] < took[0]


def write_table(path, rows, ref=False):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["src_video", "tgt_video", "prompt", *["ref_image"] * ref], *rows])
    return path


def test_a_broken_sample_is_replaced_by_the_next_of_its_shape_and_reported(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(tmp_path / name, moving_picture(9, 64, 64))
    rows = read_table(write_table(tmp_path / "video.csv", [[n, n, "Mirror it."] for n in ("a.mp4", "b.mp4", "c.mp4")]), "video")
    assert measure_rows(rows, still=False) == [(9, 64, 64)] * 3
    mixture = Mixture({"video": {(9, 64, 64): [0, 1, 2]}}, {"video": 1}, 3, seed=0)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:900])
    batch = Pairs({"video": rows}, Curriculum([(0, mixture)]), lambda source, ref: None)[0]
    order = ["abc"[row] for row in mixture[0][2]]
    assert [Path(p).stem for p in batch["paths"]] == ["c" if name == "b" else name for name in order]
    assert [Path(path).name for path, _ in batch["bad"]] == ["b.mp4"] and "b.mp4" in batch["bad"][0][1]
    for name in "ac":
        (tmp_path / f"{name}.mp4").unlink()
    assert "none of the 3" in Pairs({"video": rows}, Curriculum([(0, mixture)]), None)[0]["fatal"]


@pytest.mark.parametrize("text, says", [
    ("src_video,prompt\na.png,x\n", "no column tgt_video"), ("src_video,tgt_video,prompt\n", "has no rows"),
    ("src_video,tgt_video,prompt\na.png,,x\n", "line 2: an empty field"), ("", "no column src_video"),
    ("src_video,tgt_video,prompt\na.png,../../etc/passwd,x\n", "is outside of"),
    ("src_video,tgt_video,prompt\na.png,b.png,make it red, shiny\n", "line 2: more fields than columns"),
    ('src_video,tgt_video,prompt\na.png,b.png,"x\na.png,b.png,y\n', "is a quote not closed"),
    ('src_video,tgt_video,"' + "p" * 140_000, "is a quote not closed"),
    ("src_video,tgt_video,prompt\na.png,b.png,caf\u00e9\n", "image.csv: is not UTF-8"),
])  # fmt: skip
def test_a_bad_table_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "image.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(ValueError, match=says):
        read_table(tmp_path / "image.csv", data.kind_of(tmp_path / "image.csv"))


@pytest.mark.parametrize("rate, seconds", [(48000, 0.5), (11000, 0.3), (192000, 0.3)])
def test_sound_that_mp4_cannot_hold_becomes_aac_to_its_last_sample(tmp_path, rate, seconds):
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        video, sound = out.add_stream("libx264", rate=25), out.add_stream("pcm_s16le", rate=rate)
        video.width = video.height = 64
        sound.layout = "mono"
        for image in moving_picture(25, 64, 64):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        tone = (np.sin(np.arange(round(rate * seconds)) * 2 * np.pi * 440 / rate) * 20000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.rate, frame.pts = rate, 0
        out.mux(sound.encode(frame)), out.mux(sound.encode(None)), out.mux(video.encode(None))
    write_video(tmp_path / "out.mp4", moving_picture(25, 64, 64), 25, audio_from=tmp_path / "in.mkv")
    with av.open(str(tmp_path / "out.mp4")) as out:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in out.decode(audio=0)])
        loud = np.flatnonzero(np.abs(heard) > 0.2) / out.streams.audio[0].rate
    assert abs(loud[-1] - loud[0] - seconds) < 0.01


def test_a_table_has_references_where_a_column_says_so(tmp_path):
    for columns, kind in (("src_video,tgt_video,prompt,ref_image", "ref"), ("src_video,tgt_video,prompt,ref_image_note", "video")):
        (tmp_path / "t.csv").write_text(columns + "\n")
        assert data.kind_of(tmp_path / "t.csv") == kind


def test_parquet_with_reference_bytes_gives_the_rows_that_a_csv_gives(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_image(tmp_path / "ref.png", moving_picture(1, 50, 40)[0])
    content = (tmp_path / "ref.png").read_bytes()
    columns = {"iid": ["1", "2", "3"], "prompt": ["x"] * 3, "src_video": ["a.mp4"] * 3, "tgt_video": ["b.mp4"] * 3,
               "ref_image_bytes": [content, None, content]}  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "ref.parquet", row_group_size=2)
    (tmp_path / "refvie_477k").mkdir()
    (tmp_path / "refvie_477k" / "chunk_0001.parquet").symlink_to(tmp_path / "ref.parquet")
    assert [path.name for path in data.find_tables([tmp_path / "refvie_477k"], "ref")] == ["chunk_0001.parquet"]
    rows = read_table(tmp_path / "ref.parquet", "ref")
    assert [row.source for row in rows] == [str(tmp_path / "a.mp4")] * 3
    assert torch.equal(data.read_reference(rows[2].ref), moving_picture(1, 50, 40)[0])
    with pytest.raises(MediaError, match="row 1 of group 0: has no ref_image_bytes"):
        data.read_reference(rows[1].ref)
    damaged = bytearray((tmp_path / "ref.parquet").read_bytes())
    at = data.parquet_file(tmp_path / "ref.parquet").metadata.row_group(1).column(4)
    start = at.dictionary_page_offset or at.data_page_offset
    damaged[start : start + 16] = b"\xff" * 16
    (tmp_path / "bad.parquet").write_bytes(damaged)
    bad = read_table(tmp_path / "bad.parquet", "ref")[2]
    with pytest.raises(MediaError, match=r"bad.parquet, row group 1: cannot be read \([^\n]*\)$"):
        data.read_reference(bad.ref)


def test_large_clips_share_a_few_shapes_and_small_ones_keep_theirs():
    assert bucket((100, 480, 832), 81, 720 * 1280) == (81, 480, 832)
    assert bucket((50, 1080, 1920), 81, 360_000) == bucket((49, 1070, 1930), 81, 360_000) == (49, 448, 800)


def test_check_names_what_is_wrong_with_a_table(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", moving_picture(9, 64, 64))
    write_clip(tmp_path / "b.mp4", moving_picture(7, 64, 96))
    (tmp_path / "c.mp4").write_text("no clip")
    pairs = [["a.mp4", "a.mp4", "x"], ["a.mp4", "b.mp4", "x"], ["a.mp4", "c.mp4", "x"]]
    with pytest.raises(SystemExit, match="2 rows have faults"):
        data.main(["check", str(write_table(tmp_path / "video.csv", pairs))])
    said = capsys.readouterr()
    said = said.out + said.err
    for words in ("b.mp4: has 7 frames, its source 9", "crops will not match", "c.mp4: cannot be decoded", "3 rows, 2 with faults"):
        assert words in said


def test_a_path_into_a_sibling_whose_name_begins_alike_is_outside(tmp_path):
    with pytest.raises(ValueError, match="is outside of"):
        data.inside(tmp_path / "data", "../data-secret/x.png", "here")


def test_a_pair_is_as_long_as_its_shorter_file_and_two_lost_frames_are_forgiven(tmp_path):
    long, short = (write_clip(tmp_path / f"{count}.mp4", moving_picture(count, 64, 64)) for count in (13, 9))
    rows = [SimpleNamespace(source=a, target=b, ref=None) for a, b in ((long, short), (short, long))]
    assert measure_rows(rows, still=False) == [(9, 64, 64)] * 2
    assert len(data.read_frames(short, 11, (64, 64))) == 11
    with pytest.raises(MediaError, match="ends after 9 of 12"):
        data.read_frames(short, 12, (64, 64))


def test_sound_that_mp4_can_hold_is_copied_and_ends_with_the_pictures(tmp_path):
    source = write_clip(tmp_path / "in.mp4", moving_picture(30), sound="aac")
    write_video(tmp_path / "out.mp4", read_clip(source, 21).frames, 25, audio_from=source)
    with av.open(str(tmp_path / "out.mp4")) as out:
        heard = [(frame.time, np.abs(frame.to_ndarray()).max() > 0.05) for frame in out.decode(audio=0)]
    assert next(time for time, loud in heard if loud) < 0.1 and abs(heard[-1][0] - 21 / 25) < 0.1


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


def test_a_loss_without_the_bell_takes_all_timesteps_alike_also_the_first_of_an_edit():
    t = torch.tensor([1000.0, 700.0])
    bell, none = (FlowMatch(20.0, weighting=w).training_sigmas(t)[1] for w in ("bell", "none"))
    assert bell[0] == 0 < bell[1] and none.tolist() == [1, 1]
    with pytest.raises(ValueError, match="weighting: 'flat', expected bell or none"):
        FlowMatch(weighting="flat")
    with pytest.raises(ValueError, match="FlowMatch.shift: 0"):
        FlowMatch(0)


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
    with pytest.raises(ValueError, match="nothing tells what an edit changes"):
        replace(train.STAGES["paper"][1], balance=True)  # the DiT of stage 1 sees no source


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
        assert close(ours, scaled.velocity(x, torch.tensor([300.0]), context, source), 1e-6) and not close(ours, with_source)
        return
    t = torch.tensor([300.0])
    added = model.inject(x, t, source) - model.inject(x, t, None)
    if how == "channel_concat":  # the source's channels come second
        torch.nn.init.zeros_(model.dit.patch_embedding.weight[:, 16:])
        assert torch.equal(model.inject(x, t, source), model.inject(x, t, None))
    else:
        embedder = model.dit.patch_embedding if how == "add_shared_patch_embed" else model.source_embedder
        assert close(added, embedder(source) * (1.0 if how == "add_unscaled" else 0.3), 1e-5)


def test_latents_of_another_size_are_refused_and_not_broadcast():
    model, x, context, t = denoiser(), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 64), torch.tensor([300.0])
    with pytest.raises(ValueError, match="source latents"):
        model.velocity(x, t, context, source=x[:, :, :1])
    for ref in (x[:, :, :, :2], x[:, :, :0]):
        with pytest.raises(ValueError, match="reference latents"):
            model.velocity(x, t, context, ref=ref)


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


def test_guidance_goes_from_the_edit_without_the_references_to_that_with_them_and_beyond(qwen_folder):
    model = small_model(qwen_folder).eval()
    noise, source, ref = (torch.randn(1, 48, frames, 2, 4) for frames in (2, 2, 1))
    shown, unshown = torch.randn(1, 8, 32), torch.randn(1, 4, 32)
    with_ref = model.denoise(noise, shown, source, ref, steps=1)
    without = model.denoise(noise, unshown, source, steps=1)
    for guidance in (1.0, 1.5):
        guided = model.denoise(noise, shown, source, ref, steps=1, unshown=unshown, guidance=guidance)
        assert close(guided, without + guidance * (with_ref - without), 1e-5)


def test_an_edit_is_guided_as_its_weights_ask_unless_told_otherwise(qwen_folder):
    model, calls = small_model(qwen_folder).eval(), []
    model.velocity = lambda *given: calls.append(len(given) > 4 and given[4] is not None) or KiwiEdit.velocity(model, *given)
    small_edit(model), small_edit(model, ref=False)
    assert calls == [True, True, False, False]
    model.config = replace(model.config, ref_guidance=1.5)
    small_edit(model), small_edit(model, ref=False)
    assert calls[4:] == [True, False, True, False, False, False]
    model.edit(moving_picture(1, 32, 32), "Replace the sky.", moving_picture(1, 32, 32)[0], steps=1, ref_guidance=1)
    assert calls[10:] == [True]
    picture = moving_picture(1, 32, 32)
    for wrong, says in (({"ref_guidance": 0}, "ref_guidance: 0, expected a number above 0"), ({"steps": -1}, "steps: -1"),
                        ({"ref": picture}, r"ref: expected uint8 \(H, W, 3\) each")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            model.edit(picture, "Replace the sky.", **wrong)
    assert len(calls) == 11


@pytest.mark.parametrize("full", [torch.OutOfMemoryError(), RuntimeError("GET was unable to find an engine to execute this computation")])
def test_an_edit_whose_decoding_does_not_fit_the_card_is_decoded_in_tiles(qwen_folder, capsys, full):
    model = small_model(qwen_folder).eval()
    source = moving_picture(1, 32, 704)  # 44 latent pixels wide

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
    assert small_edit(model, ref=False).shape == (6, 32, 64, 3)
    with pytest.raises(ValueError, match="no ref queries"):
        small_edit(model)


def test_below_float32_released_weights_see_timesteps_rounded_to_bfloat16():
    a, b = torch.tensor([997.0]), torch.tensor([996.0])  # one number in bfloat16
    for rounds, dtype, same in ((True, torch.bfloat16, True), (False, torch.bfloat16, False), (True, torch.float32, False)):
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


def test_bfloat16_weights_leave_transformers_rotary_tables_in_float32(tmp_path, qwen_folder):
    small_model(qwen_folder).save(tmp_path / "own")
    (tmp_path / "own/.dit.1.tmp.safetensors").write_text("of a copy that was killed")
    model = KiwiEdit.from_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert buffers and all(b.dtype == torch.float32 and not b.is_meta for b in buffers.values())
    assert small_edit(model).shape == (6, 32, 64, 3)


WRONG_CONFIGS = {
    "unknown key": lambda config: {**config, "dit": {**config["dit"], "width": 1}}, "a list": lambda config: [config],
    "no fields": lambda config: {**config, "dit": [1]}, "a word": lambda config: {**config, "dit": {**config["dit"], "dim": "x"}},
}  # fmt: skip


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
    elif how in WRONG_CONFIGS:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(WRONG_CONFIGS[how](config)))
    elif how == "no tokenizer":
        (folder / "mllm" / "tokenizer.json").unlink()


@pytest.mark.parametrize("how, says", [
    ("truncated", r"dit\.safetensors: cannot be read"), ("absent", r"missing: dit\."), ("another size", "of another size"),
    ("unknown key", "unknown key width"), ("a list", r"config\.json: expected a JSON object"),
    ("no fields", r"config\.json: expected the fields of DiTConfig"), ("a word", r"config\.json: DiTConfig: "), ("no tokenizer", r"tokenizer\.json is missing"),
])  # fmt: skip
def test_damaged_weights_are_refused_with_the_reason(tmp_path, qwen_folder, how, says):
    small_model(qwen_folder).save(tmp_path / "own")
    damage(tmp_path / "own", how)
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


def test_all_of_wan_s_dits_round_timesteps_and_read_four_tokens_of_a_reference(tmp_path, qwen_folder):
    model = small_model(qwen_folder)
    configs = [read_weights(save_diffusers_layout(model, tmp_path / "diffusers"))[0]]
    configs.append(read_weights(save_training_layout(model, tmp_path), tmp_path / "wan", tmp_path / "qwen")[0])
    assert all(config.mllm.max_ref_tokens == 4 for config in configs)  # as many as the model saved has
    assert all(config.dit.bf16_timesteps for config in [*configs, *(PRESETS[name] for name in ("wan22_5b", "wan21_14b", "wan21_1_3b"))])


def test_weights_neither_lead_out_of_their_folder_nor_lack_a_shard_nor_replace_what_is_not_theirs(tmp_path, qwen_folder):
    model, own = small_model(qwen_folder), tmp_path / "own"
    model.save(own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "mllm": {**config["mllm"], "folder": str(qwen_folder)}}))
    with pytest.raises(ValueError, match="leads out"):
        KiwiEdit.from_pretrained(own)
    (own / "thesis.txt").write_text("my only copy")
    with pytest.raises(ValueError, match="thesis.txt"):
        model.save(own)
    checkpoint = save_training_layout(model, tmp_path)
    index = {"weight_map": {"head.modulation": "diffusion_pytorch_model-00003-of-00003.safetensors"}}
    (tmp_path / "wan" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="00003-of-00003.safetensors is missing"):
        KiwiEdit.from_pretrained(checkpoint, base=tmp_path / "wan", qwen=tmp_path / "qwen")


def test_whole_weights_refuse_a_base_that_they_would_not_read(tmp_path, qwen_folder):
    small_model(qwen_folder).save(tmp_path / "own")
    with pytest.raises(ValueError, match="own is whole: --base"):
        KiwiEdit.from_pretrained(tmp_path / "own", base=tmp_path / "wna")


def test_latents_stay_float32_between_the_steps_of_a_bfloat16_model():
    x = denoiser().bfloat16().denoise(torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 64), steps=3)
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


def test_a_clip_of_another_length_is_filled_with_its_last_frame(qwen_folder):
    model, seen = small_model(qwen_folder).eval(), []
    model.mllm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    video = moving_picture(6, 32, 64)
    model.edit(video, "Replace the sky.", steps=1)
    assert torch.equal(seen[0], torch.cat([video, video[-1:].expand(3, -1, -1, -1)]))


def test_after_its_work_a_part_has_its_own_tensors_back():
    layer = torch.nn.Linear(3, 3)
    home = layer.weight.data_ptr()
    with working_on(layer, "cpu"):
        layer.weight.data = layer.weight.data.clone()  # as on another device
    assert layer.weight.data_ptr() == home


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
    if layout != "own":  # source, reference and edit
        assert read_clip(tmp_path / "out_compare.mp4").frames.shape == (frames, height, 3 * width, 3)


def test_a_still_picture_gives_a_picture(tmp_path, small_weights):
    write_image(tmp_path / "in.jpg", moving_picture(1, 70, 102)[0])
    done = run_sample(tmp_path / "in.jpg", "--weights", small_weights, "--steps", 1, "Make it night.", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_image(tmp_path / "in_edited.png").shape == (64, 96, 3)


@pytest.fixture
def knowing_weights(tmp_path, small_weights):
    """Weights that were trained on one kind of clip, and know an example."""
    folder = Path(shutil.copytree(small_weights, tmp_path / "knowing"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trained": [5, 64, 64, 8], "steps": 1}))
    (folder / "example").mkdir()
    write_video(folder / "example/source.mp4", moving_picture(5, 64, 64), 8)
    write_image(folder / "example/reference.png", moving_picture(1, 50, 70)[0])
    (folder / "example/prompt.txt").write_text("Make it night.\n")
    return str(folder)


def enlarged(frame):
    return frame.repeat_interleave(4, 0).repeat_interleave(4, 1)


def test_alone_it_edits_the_example_of_its_weights(tmp_path, knowing_weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(["--weights", knowing_weights, "--device", "cpu"])
    source, ref = read_clip("knowing/example/source.mp4").frames, read_image("knowing/example/reference.png")
    edited = KiwiEdit.from_pretrained(knowing_weights, dtype=torch.float32).edit(source, "Make it night.", ref, steps=1)
    assert read_clip("out.mp4").frames.shape == edited.shape == read_clip("out_compare.mp4").frames[:, ::4, ::12].shape
    expected = torch.cat([source[2], pad_reference(ref, (64, 64)), edited[2]], dim=1)
    assert torch.equal(read_image("out_compare.png"), enlarged(expected))
    assert "Make it night." in capsys.readouterr().out


def test_weights_that_know_one_kind_of_clip_edit_others_at_about_that_size_and_say_so(tmp_path, knowing_weights, capsys):
    frames = moving_picture(20, 240, 300)
    for clip, rate, note in ((frames, 16, True), (frames[:5, :64, :64], 16, True), (frames[:5, :64, :64], 8, False)):
        write_video(tmp_path / "in.mp4", clip, rate)
        words = ["x", "--weights", knowing_weights, "--steps", "1", "--device", "cpu", "-o", str(tmp_path / "out.mp4")]
        sample.main([str(tmp_path / "in.mp4"), *words])
        edited = read_clip(tmp_path / "out.mp4")
        assert edited.frames.shape[1:] == (64, 64, 3) and edited.fps == 8
        assert ("know 5 frames of 64x64 at 8 fps alone" in capsys.readouterr().out) == note


@pytest.mark.skipif(not sample.DEFAULT_WEIGHTS.is_dir(), reason="needs weights/nano, which are not in this checkout")
def test_the_bundled_weights_edit_their_example_in_a_minute(tmp_path):
    start = time.time()
    done = run_sample(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.time() - start < 60
    source, edited = read_clip(sample.DEFAULT_WEIGHTS / "example/source.mp4").frames, read_clip(tmp_path / "out.mp4").frames
    assert source.shape == edited.shape and (source.int() - edited.int()).abs().float().mean() > 3
    assert sum(path.stat().st_size for path in sample.DEFAULT_WEIGHTS.rglob("*") if path.is_file()) <= 32e6


@pytest.mark.parametrize("case, says", [
    ([], "has no example"), (["whole.mp4"], '"whole.mp4" is given'), (["--ref", "whole.jpg"], "has no example"),
    (["whole.mp4", ""], "the instruction is empty"), (["", ""], "the instruction is empty"),
    (["absent.mp4", "x"], "no such file"), (["half.mp4", "x"], "cannot be decoded"), (["sound.mp3", "x"], "no pictures"),
    (["dot.png", "x"], "too few"), (["whole.jpg", " "], "instruction is empty"),
    (["whole.jpg", "x", "--ref", "half.jpg"], "half.jpg"), (["whole.jpg", "x", "--device", "cuda"], "not available"),
    (["whole.jpg", "x", "-o", "words.png/out.png"], "cannot be written"), (["whole.jpg", "x", "--offload"], "no GPU"),
    (["whole.jpg", "x", "--weights", "nowhere"], "no such file or folder"), (["whole.mp4", "x", "-o", "out.avi"], ".mp4"),
    (["whole.jpg", "x", "-o", "out.webp"], ".png"), (["whole.jpg", "x", "-o", "../" + "{}" + "/whole.jpg"], "would be replaced"),
    (["whole.jpg", "x", "--ref", "its_compare.png", "-o", "its.png", "--compare"], "its_compare.png: would be replaced"),
    (["drawing.svg", "x"], "no decoder"),
    (["--ref", "whole.jpg", "whole.mp4", "make it red"], '"make it red"; a clip and an instruction are needed'), (["whole.jpg", "x", "--shift", "0"], "above 0"),
    (["whole.jpg", "x", "--ref", "whole.jpg", "--ref-guidance", "-1"], "above 0"),
    (["whole.jpg", "x", "--seed", str(2**64)], "--seed"), (["..", "x"], "..: a folder; give a clip"),
    (["whole.jpg", "x", "--ref-guidance", "2"], "give --ref, or leave it out"),
    (["whole.jpg", "x", "--weights", "words.png"], "words.png: cannot be read"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_a_failure(tmp_path, small_weights, case, says, capsys, monkeypatch):
    if "cuda" in case and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    bad_media(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    case = [word.format(tmp_path.name) for word in case]
    weights = [] if "--weights" in case else ["--weights", str(small_weights)]
    monkeypatch.setattr(sys, "argv", ["sample.py", *case, *weights, *([] if "--device" in case else ["--device", "cpu"])])
    with pytest.raises(SystemExit) as exit_:
        sample.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_run_leaves_no_file(tmp_path, small_weights):
    write_clip(tmp_path / "in.mp4", moving_picture(9, 64, 64))
    command = [sys.executable, str(HOUSE / "sample.py"), "in.mp4", "x", "--weights", str(small_weights), "--steps", "100000"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    text = ""
    while "denoise" not in text:
        text += process.stderr.read(1) or pytest.fail(text)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0 and "interrupted" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_seed_steps_shift_and_guidance_reach_the_denoising(monkeypatch, tmp_path, small_weights):
    asked, first = [], ["--weights", str(small_weights), "--device", "cpu", "-o", str(tmp_path / "out.png")]
    denoised = lambda self, noise, *rest: asked.append((noise[0, 0, 0, 0, 0].item(), *rest[3:5], rest[-1])) or noise
    monkeypatch.setattr(KiwiEdit, "denoise", denoised)
    write_image(tmp_path / "in.png", moving_picture(1, 64, 64)[0])
    for flags in ((), ("--shift", "3"), ("--steps", "7"), ("--seed", "1"), ("--ref-guidance", "2", "--ref", str(tmp_path / "in.png"))):
        sample.main([str(tmp_path / "in.png"), "Make it snow.", *first, *flags])
    assert [(steps, flow.shift) for _, steps, flow, _ in asked] == [(50, 5.0), (50, 3.0), (7, 5.0), (50, 5.0), (50, 5.0)]
    assert [guidance for *_, guidance in asked] == [1, 1, 1, 1, 2]
    assert asked[0][0] == asked[1][0] != asked[3][0]


def test_a_judge_s_edits_have_every_frame_of_the_file(tmp_path):
    write_video(tmp_path / "in.mp4", moving_picture(9, 64, 64), 16)
    config = replace(PRESETS["nano"], trained=(9, 64, 64, 8))
    assert [read_for(config, tmp_path / "in.mp4", every_frame=every).fps for every in (False, True)] == [8, 16]


# ------------------------------------------------------------------------------------------------ train.py


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
    mllm = MLLMConfig(str(qwen_folder), 48, 4, 4, 4, max_ref_tokens=4, max_pixels=64 * 64)
    dit = tiny_dit(dim=48, ffn_dim=48, num_heads=2, in_dim=48, out_dim=48)
    model = KiwiEdit(KiwiConfig(dit, VAEConfig(dim=4, dec_dim=4, z_dim=48, num_res_blocks=1), mllm))
    randomise(model, 0.5).save(folder / "weights")
    return folder


SMALL = ["global_batch=4", "pixels=6144", "frames=9", "warmup=0", "lr=1e-3", "lora_rank=2"]


def lessons(lesson, out, *flags, stage=3, weights="weights", settings=()):
    """The command line of a small run."""
    words = ["--stage", stage, "--data", lesson, "--out", out, "--weights", lesson / weights, "--workers", 0, *flags]
    return [*map(str, words), "--set", *SMALL, *settings]


def losses(out, name="loss"):
    return [json.loads(line)[name] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same_course(out, expected, tol=1e-5):
    """Losses and gradient norms agree (AdamW would forgive gradients of a wrong scale)."""
    pairs = [[torch.tensor(losses(run, name)) for run in (out, expected)] for name in ("loss", "grad_norm")]
    return all(close(a, b, 10 * tol if i else tol) for i, (a, b) in enumerate(pairs))


def part_of(name):
    if ".lora_" in name:
        return "lora"
    if name.startswith("dit."):
        return "text_embedding" if ".text_embedding." in name else "dit"
    return ".".join(name.split(".")[: 2 if name.startswith("mllm.") else 1])


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_changes_exactly_the_parameters_that_the_stage_trains(tmp_path, lesson, preset, stage):
    args = train.parse_arguments(lessons(lesson, tmp_path, "--preset", preset, stage=stage, settings=["global_batch=6"]))
    chosen = train.choose_stage(args)
    ranks = train.Ranks(args)
    try:
        model = train.load_model(args, chosen, ranks, None)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first, and then A would have no gradient
                torch.nn.init.normal_(parameter)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = train.Trainer(args, chosen, ranks, model, *train.open_data(args, chosen, ranks))
        trainer.batches = iter(trainer.loader())
        assert trainer.step()["skipped"] == 0
    finally:
        ranks.leave()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"lora", "mllm.image_queries", "mllm.connector"}
    expected |= {"mllm.video_queries", "dit", "source_embedder"} if stage > 1 else set()
    expected |= {"mllm.ref_queries", "mllm.ref_connector", "ref_embedder"} if stage > 2 else set()
    assert changed == {name for name in before if part_of(name) in expected}


@golden
@pytest.mark.parametrize("config, stage", [("5b", 1), ("5b", 2), ("5b", 3), ("14b", 1), ("14b", 2)])
def test_what_a_stage_saves_has_exactly_the_released_names_and_shapes(tmp_path, real_qwen_folder, config, stage):
    name = f"wan2{'2_5b' if config == '5b' else '1_14b'}"
    args = train.parse_arguments(["--config", name, "--stage", str(stage), "--preset", "released", "--init", "random",
                                  "--qwen", str(real_qwen_folder), "--out", str(tmp_path), "--dry-run"])  # fmt: skip
    chosen = train.choose_stage(args)
    ranks = train.Ranks(args)
    try:
        with torch.device("meta"):
            model = train.load_model(args, chosen, ranks, None)
    finally:
        ranks.leave()
    saved = {released_name(n): tuple(p.shape) for n, p in model.named_parameters() if train.belongs(n, chosen)}
    assert saved == {n: tuple(t.shape) for n, t in manifest(f"trainable_{config}_stage{stage}").items()}
    assert all(our_name(released_name(n)) == n for n, _ in model.named_parameters())
    assert (model.mllm.config.max_pixels is None) == (config == "5b")  # so their scripts


def on_two_ranks(tmp_path, runs, first=""):
    """Trainings on the same two CPU processes, after some lines of Python."""
    (tmp_path / "all.py").write_text(f"import sys\nsys.path.insert(0, {str(HOUSE)!r})\nimport train\n{first}\n"
                                     f"train.dist.init_process_group('gloo')\nfor words in {runs!r}:\n    train.main(words)\n"
                                     "train.dist.destroy_process_group()\n")  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "all.py")]
    done = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    print(done.stderr[-3000:])
    return done


def test_ddp_fsdp_and_sequence_parallelism_give_the_losses_of_one_process_and_resume_on_another_number(tmp_path, lesson):
    short, long = ["steps=3", "pixels=4096,6144"], ["steps=20", "pixels=4096,6144", "ema=0.9"]
    muon = [*short, "optimizer=muon"]
    odd = ["steps=3", "pixels=3072", "image=0"]  # a token a frame, three or four in a sequence: not for two to share
    train.main(lessons(lesson, tmp_path / "one", "--save-every", "13", settings=long))
    runs = [lessons(lesson, tmp_path / name, "--save-every", "13", *flags, settings=settings) for name, flags, settings in (
        ("ddp", [], long), ("fsdp", ["--parallel", "fsdp"], long), ("sp", ["--sp", "2"], short), ("odd", ["--sp", "2"], odd),
        ("matrices", ["--parallel", "fsdp"], muon),
        ("half", ["--sp", "2", "--parallel", "fsdp", "--dtype", "bfloat16"], short))]  # fmt: skip
    assert on_two_ranks(tmp_path, runs).returncode == 0
    train.main(lessons(lesson, tmp_path / "short", settings=short))
    train.main(lessons(lesson, tmp_path / "muon", settings=muon))
    train.main(lessons(lesson, tmp_path / "whole", settings=odd))
    assert same_course(tmp_path / "odd", tmp_path / "whole")
    assert len(losses(tmp_path / "fsdp")) == 20
    assert same_course(tmp_path / "matrices", tmp_path / "muon") and losses(tmp_path / "muon") != losses(tmp_path / "short")
    assert same_course(tmp_path / "ddp", tmp_path / "one") and same_course(tmp_path / "fsdp", tmp_path / "one")
    assert same_course(tmp_path / "sp", tmp_path / "short") and same_course(tmp_path / "half", tmp_path / "short", 3e-2)
    shutil.rmtree(tmp_path / "fsdp" / "step-000020")
    train.main(lessons(lesson, tmp_path / "fsdp", "--resume", "auto", settings=long))  # 7 more steps on one process
    assert same_course(tmp_path / "fsdp", tmp_path / "one")
    for name in ("weights", "ema"):
        a, b = (load_file(tmp_path / run / "step-000020" / f"{name}.safetensors") for run in ("one", "fsdp"))
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_sharded_ranks_do_not_wait_for_ever_where_one_kind_of_data_trains_what_another_has_not(tmp_path, lesson):
    kinds = ["steps=2", "batch=2"]  # a batch a rank, of which one is an image, the other a clip
    runs = [(1, [*kinds, "video=1"]), (3, [*kinds, "trains=ref_embedder", "video=0"]), (3, [*kinds, "model.source=add_learned", "optimizer=muon"])]
    words = [[lessons(lesson, tmp_path / f"{name}{i}", *flags, stage=stage, settings=settings) for i, (stage, settings) in enumerate(runs)]
             for name, flags in (("one", []), ("two", ["--parallel", "fsdp"]))]  # fmt: skip
    for run in words[0]:
        train.main(run)
    assert on_two_ranks(tmp_path, words[1]).returncode == 0
    assert all(same_course(tmp_path / f"two{i}", tmp_path / f"one{i}", 1e-4) for i in range(len(runs)))


def test_a_sample_that_one_rank_cannot_read_is_left_out_by_all_and_a_dry_run_of_two_ranks_says_it_once(tmp_path, lesson):
    lost = """
def read_pair(row, shape, read=train.read_pair):
    if train.dist.get_rank() and row.target.endswith(".png"):
        raise train.MediaError("is not here")
    return read(row, shape)
train.read_pair = read_pair"""
    more = (["--dry-run"], ["--sample-every", "1", "--sample-steps", "1"])
    done = on_two_ranks(tmp_path, [lessons(lesson, tmp_path / "run", "--parallel", "fsdp", *flags, settings=["steps=1"]) for flags in more], lost)
    assert done.returncode == 0 and "no sample of image: is not here" in done.stderr and done.stdout.count("one update: ") == 1
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == ["step-000001-ref.mp4", "step-000001-video.mp4"]


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(tmp_path, lesson):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command, run = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run")], tmp_path / "run"
    ranks = [subprocess.Popen(command, env=both | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.DEVNULL) for r in "01"]
    try:
        while not (run / "metrics.jsonl").exists() or len(losses_so_far(run)) < 2:
            time.sleep(0.02)
            assert [rank.poll() for rank in ranks] == [None, None]
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(300) for rank in ranks] == [0, 0]
        assert train.valid_checkpoints(run)[-1].name == f"step-{len(losses(run)):06d}"
    finally:
        for rank in ranks:
            rank.kill()


def test_a_run_killed_at_any_point_goes_on_to_the_same_weights_bit_for_bit(tmp_path, lesson):
    settings = ["steps=7", "pixels=4096,6144", "optimizer=muon"]  # which has AdamW beside it
    train.main(lessons(lesson, tmp_path / "whole", settings=settings))
    dice, kills, out = random.Random(0), 0, tmp_path / "killed"
    while True:
        flags = ["--resume", "auto", "--save-every", "1", "--workers", kills % 3]
        command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, out, *flags, settings=settings)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        before = len(losses(out)) if (out / "metrics.jsonl").exists() else 0
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(losses_so_far(out)) > before):
            time.sleep(0.01)
        time.sleep(dice.random() * 0.3)
        if process.poll() is not None or kills == 3:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait(100) == 0, process.stderr.read()
    assert kills and losses(out) == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match="was trained by muon: add --set optimizer=muon"):
        train.main(lessons(lesson, out, "--resume", "auto", settings=settings[:2]))
    a, b = (load_file(run / "step-000007" / "weights.safetensors") for run in (tmp_path / "whole", out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in out.iterdir() if "step" in p.name) == ["step-000005", "step-000006", "step-000007"]


def losses_so_far(out):
    return [line for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_a_signal_saves_the_last_whole_step_and_exits_with_success(tmp_path, lesson):
    command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run", "--workers", "1")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses_so_far(tmp_path / "run")) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # the workers too, as torchrun does
    assert process.wait(60) == 0
    steps = len(losses(tmp_path / "run"))
    assert f"SIGTERM: step {steps} of" in process.stdout.read()
    assert (tmp_path / "run" / f"step-{steps:06d}" / "train.json").is_file()


def test_each_stage_starts_from_the_one_before_and_its_checkpoint_edits(tmp_path, lesson):
    for stage in (1, 2, 3):
        before = f"{tmp_path}/{stage - 1}" if stage > 1 else lesson / "weights"
        train.main(lessons(lesson, tmp_path / str(stage), "--weights", before, stage=stage, settings=["steps=1"]))
    checkpoint = tmp_path / "3" / "step-000001" / "weights.safetensors"
    model = KiwiEdit.from_pretrained(checkpoint, dtype=torch.float32, base=lesson / "weights")
    assert small_edit(model).shape == (6, 32, 64, 3)
    first, last = (load_file(tmp_path / stage / "step-000001" / "weights.safetensors") for stage in "13")
    name = "mllm.model.model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert first[name].any() and not torch.equal(first[name], last[name]) and first.keys() < last.keys()


@pytest.mark.parametrize("how", ["add_learned", "add_unscaled", "add_shared_patch_embed", "channel_concat"])
def test_every_ablation_of_the_source_trains_from_the_same_weights(tmp_path, lesson, how):
    train.main(lessons(lesson, tmp_path / "run", stage=2, settings=["steps=1", f"model.source={how}", "mllm.context=queries"]))
    trained = load_file(tmp_path / "run" / "step-000001" / "weights.safetensors")
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    with pytest.raises(ValueError, match="is there and not weights of ours"):
        train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "run")])
    assert small_edit(KiwiEdit.from_pretrained(tmp_path / "model", dtype=torch.float32), ref=False).shape == (6, 32, 64, 3)
    with pytest.raises(ValueError, match="needs them as they are"):
        train.main(["--export", str(tmp_path / "run"), "--out", str(lesson / "weights")])
    if how == "channel_concat":  # the weights' own half, and a half that started from zero
        own, source = trained["dit.patch_embedding.weight"].split(48, dim=1)
        assert own.abs().max() > 0.01 > source.abs().max() > 0
    assert ("source_scale.weight" in trained) == (how == "add_learned")
    train.main(lessons(lesson, tmp_path / "next", "--weights", tmp_path / "run", settings=["steps=1"]))
    saved = tmp_path / "run/step-000001/weights.safetensors"
    over = KiwiEdit.from_pretrained(saved, dtype=torch.float32, base=lesson / "weights")
    assert (over.config.source, over.config.mllm.context) == (how, "queries"), "the checkpoint edits as it is"
    for path in (saved, saved.parent, tmp_path / "run"):
        same = KiwiEdit.from_pretrained(path, dtype=torch.float32)
        assert same.config == over.config
        assert all(torch.equal(a, b) for a, b in zip(same.parameters(), over.parameters())), "it lies over what it began with"
    config = json.loads((tmp_path / "next" / "config.json").read_text())["model"]
    assert (config["source"], config["mllm"]["context"]) == (how, "queries"), "the next stage goes on with the same model"


@pytest.mark.parametrize("how", ["add_learned", "channel_concat"])
def test_a_run_that_does_not_train_what_its_source_needs_edits_as_its_export(tmp_path, lesson, how):
    train.main(lessons(lesson, tmp_path / "run", stage=1, settings=["steps=1", f"model.source={how}"]))
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    run, model = (KiwiEdit.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("run", "model"))
    assert torch.equal(small_edit(run, ref=False), small_edit(model, ref=False))


def test_a_released_training_checkpoint_goes_on_training(tmp_path, lesson, qwen_folder):
    checkpoint = save_training_layout(small_model(qwen_folder), tmp_path, stage=2)
    flags = ["--weights", checkpoint, "--base", tmp_path / "wan", "--qwen", tmp_path / "qwen", "--config", "nano"]
    train.main(lessons(lesson, tmp_path / "run", *flags, settings=["steps=1"]))
    trained, before = load_file(tmp_path / "run" / "step-000001" / "weights.safetensors"), load_file(checkpoint)
    assert before.keys() < trained.keys()  # references are new
    assert all((trained[k] - before[k]).abs().max() < 0.01 for k in before)
    model = KiwiEdit.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert len(model.mllm.ref_queries) and not model.dit.patch_embedding.weight.is_meta
    (tmp_path / "wan").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="began with .*--base, or --qwen, says where it is"):
        KiwiEdit.from_pretrained(tmp_path / "run")
    moved = ["--base", str(tmp_path / "moved"), "--qwen", str(tmp_path / "qwen")]
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "whole"), *moved])


def test_what_a_run_began_with_is_found_from_any_folder(tmp_path, lesson, monkeypatch):
    monkeypatch.chdir(lesson.parent)
    begun = lesson.relative_to(lesson.parent) / "weights"
    (tmp_path / "elsewhere" / "disk").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere" / "disk")
    settings = ["steps=1", "model.steps=3", "dit.bf16_timesteps=true"]
    train.main(lessons(lesson, tmp_path / "runs" / "1", "--weights", begun, settings=settings))
    monkeypatch.chdir(tmp_path)
    config = KiwiEdit.from_pretrained(tmp_path / "runs" / "1").config
    assert config.steps == 3 and config.dit.bf16_timesteps


def test_training_from_a_cache_gives_the_same_losses_and_opens_no_file(tmp_path, lesson, monkeypatch):
    settings = ["steps=3", "ref_shrink=1"]
    train.main(lessons(lesson, tmp_path / "plain", settings=settings))
    train.main(lessons(lesson, tmp_path / "plain1", stage=1, settings=["steps=1"]))  # which shows no source
    train.main(lessons(lesson, tmp_path / "cache", "--write-cache", tmp_path / "cache", settings=settings))
    monkeypatch.setattr(train, "measure_rows", None)
    train.main(lessons(lesson, tmp_path / "run", "--cache", tmp_path / "cache", settings=settings))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    for stage in (1, 2):
        train.main(lessons(lesson, tmp_path / f"part{stage}", "--cache", tmp_path / "cache", stage=stage, settings=["steps=1"]))
    assert losses(tmp_path / "part1") == losses(tmp_path / "plain1")
    for other in ("frames=5", "mllm.max_frames=2", "ref_shrink=0.5"):
        with pytest.raises(ValueError, match="written for other tables, pixels, frames, weights or settings"):
            train.main(lessons(lesson, tmp_path / "other", "--cache", tmp_path / "cache", settings=["steps=1", "ref_shrink=1", other]))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="begun with other rows"):
        train.main(lessons(lesson, tmp_path / "cache", "--write-cache", tmp_path / "cache", settings=["ref_shrink=0.5"]))


def test_a_cache_is_refused_where_a_row_before_its_rows_is_gone(tmp_path, lesson):
    mine = Path(shutil.copytree(lesson, tmp_path / "mine", ignore=shutil.ignore_patterns("weights")))
    header, *rows = (mine / "image.csv").read_text().splitlines()
    (mine / "broken.png").write_text("none")
    (mine / "image.csv").write_text("\n".join([header, rows[1], "broken.png,broken.png,Which is in no cache.", rows[2], rows[4]]))
    words = lessons(lesson, tmp_path / "c", "--data", mine, "--max-bad", 50, settings=["steps=1", "video=0", "ref=0"])
    train.main([*words, "--write-cache", str(tmp_path / "c")])
    (mine / "image.csv").write_text("\n".join([header, rows[1], rows[2], rows[4]]))  # the last would get the second's latents
    with pytest.raises(ValueError, match="was written for other tables"):
        train.main([*words, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "c")])


def test_several_folders_are_trained_as_one(tmp_path, lesson):
    for half, rows in (("a", slice(1, 4)), ("b", slice(4, None))):
        (tmp_path / half).mkdir()
        for table in lesson.glob("*.csv"):
            head, *lines = table.read_text().splitlines()
            (tmp_path / half / table.name).write_text("\n".join([head, *[head, *lines][rows]]))
    train.main(lessons(lesson, tmp_path / "one", settings=["steps=2"]))
    halves = ["--data", tmp_path / "a", tmp_path / "b", "--base-path", lesson]
    train.main(lessons(lesson, tmp_path / "two", *halves, settings=["steps=2"]))
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    (tmp_path / "b" / "image.csv").unlink()
    with pytest.raises(FileNotFoundError, match="b: has no image.csv"):
        train.main(lessons(lesson, tmp_path / "none", "--data", tmp_path / "b", "--base-path", lesson, settings=["steps=2"]))


def test_broken_samples_are_logged_and_too_many_stop_the_run(tmp_path, lesson):
    for file in lesson.glob("*.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "video_1_tgt.mp4").write_bytes((tmp_path / "video_1_tgt.mp4").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"1 of 5 video rows cannot be read \(--max-bad 5\).*video_1_tgt"):
        train.main(lessons(lesson, tmp_path / "run", "--data", tmp_path))
    train.main(lessons(lesson, tmp_path / "run2", "--data", tmp_path, "--max-bad", "30", settings=["steps=2"]))
    line = json.loads((tmp_path / "run2" / "bad.jsonl").read_text())
    assert line["path"].endswith("video_1_tgt.mp4") and "cannot be decoded" in line["reason"]


def test_noise_and_timestep_depend_on_the_seed_and_the_sample_and_on_nothing_else():
    taken = {}
    for seed in (0, 1):
        for number in (0, 1, 2**33):
            torch.manual_seed(number)
            generator, t, chance = train.draw(seed, number, FlowMatch(), rounded=False)
            taken[seed, number] = (t.item(), chance, torch.randn(3, generator=generator).tolist())
    again = train.draw(1, 2**33, FlowMatch(), rounded=False)
    assert taken[1, 2**33] == (again[1].item(), again[2], torch.randn(3, generator=again[0]).tolist())
    for a, b in zip(taken.values(), list(taken.values())[1:]):
        assert a[0] != b[0] and a[1] != b[1] and a[2] != b[2]


def test_the_learning_rate_rises_and_falls_as_its_schedule_says():
    stage = replace(train.STAGES["paper"][1], lr=2.0, warmup=2, steps=12)
    for schedule, end in (("constant", [2, 2, 2]), ("linear", [2, 1, 0.2]), ("cosine", [2, 1, 1 - np.cos(np.pi / 10)])):
        rates = [train.learning_rate(replace(stage, schedule=schedule), step) for step in (0, 1, 2, 7, 11)]
        assert rates == pytest.approx([1, 2, *end])


def test_every_number_of_a_stage_changes_what_is_learned(tmp_path, lesson):
    def learned(name, *more):
        train.main(lessons(lesson, tmp_path / name, settings=["steps=3", *more]))
        return load_file(tmp_path / name / "step-000003/weights.safetensors")

    plain = learned("plain")
    for number in ("warmup=9", "schedule=linear", "clip=1e-9", "shift=20", "beta2=0.5", "weight_decay=0.5", "ref_shrink=0.3",
                   "weighting=none", "balance=true"):  # fmt: skip
        other = learned(number, number)
        assert any(not torch.equal(plain[k], other[k]) for k in plain), number


def test_a_stage_says_that_the_lora_of_its_weights_keeps_its_rank(tmp_path, lesson, capsys):
    for stage, weights, settings in ((1, lesson / "weights", []), (2, tmp_path / "1", ["lora_rank=4"])):
        assert "LoRA" not in capsys.readouterr().err
        train.main(lessons(lesson, tmp_path / str(stage), "--weights", weights, stage=stage, settings=["steps=1", *settings]))
    assert "have LoRA of rank 2, which goes on: lora_rank=4" in capsys.readouterr().err


def test_a_run_that_goes_on_with_another_loss_says_so(tmp_path, lesson, capsys):
    train.main(lessons(lesson, tmp_path / "run", settings=["steps=1"]))
    written = tmp_path / "run" / "step-000001" / "train.json"
    saved = json.loads(written.read_text())
    del saved["stage"]["balance"]  # as before there was such a setting
    written.write_text(json.dumps(saved))
    train.main(lessons(lesson, tmp_path / "run", "--resume", "auto", settings=["steps=2", "balance=true"]))
    assert "balance False -> True" in capsys.readouterr().err


def test_each_size_of_a_stage_has_its_share_of_the_steps():
    small, large = (Mixture({"image": {(1, n, n): [0, 1]}}, {"image": 1}, 2, seed=0) for n in (64, 96))
    both = Curriculum([(0, small), (6, large)])
    assert [both[n][2][1] for n in range(12)] == [64] * 6 + [96] * 6 and both[7][1:] == large[1]


def test_averaged_weights_are_what_their_decay_says(tmp_path, lesson):
    train.main(lessons(lesson, tmp_path / "run", "--save-every", "1", settings=["steps=3", "ema=0.75"]))
    file = lambda step, name: load_file(tmp_path / f"run/step-{step:06d}/{name}.safetensors")
    before, ema, weights = file(2, "ema"), file(3, "ema"), file(3, "weights")
    assert all(torch.allclose(ema[k], 0.75 * before[k] + 0.25 * weights[k], atol=1e-6) for k in ema)
    assert any(not torch.equal(ema[k], weights[k]) for k in ema)
    train.main(["--export", str(tmp_path / "run/step-000003/ema.safetensors"), "--out", str(tmp_path / "average")])
    head = load_file(tmp_path / "average/dit.safetensors")["dit.head.head.weight"]
    assert torch.equal(head, ema["dit.head.head.weight"]), "the file given is what is exported"


def test_another_run_goes_on_from_a_checkpoint_given_by_its_path(tmp_path, lesson):
    KiwiEdit.from_pretrained(lesson / "weights").save(tmp_path / "half")  # bfloat16, from which float32 goes on
    train.main(lessons(lesson, tmp_path / "a", "--weights", tmp_path / "half", "--save-every", "1", settings=["steps=2"]))
    resume = ["--weights", tmp_path / "half", "--resume", tmp_path / "a/step-000001"]
    train.main(lessons(lesson, tmp_path / "b", *resume, settings=["steps=2"]))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[1:]
    with pytest.raises(ValueError, match="later checkpoints"):
        train.main(lessons(lesson, tmp_path / "a", *resume, settings=["steps=2"]))


def test_a_run_is_never_what_it_began_with_itself(tmp_path, lesson):
    train.main(lessons(lesson, tmp_path / "run", "--save-every", "1", settings=["steps=1"]))
    for own in ("run", "run/step-000001", "run/step-000001/weights.safetensors"):
        with pytest.raises(ValueError, match="is --out itself; give what this run began with"):
            train.main(lessons(lesson, tmp_path / "run", "--weights", tmp_path / own, "--resume", "auto", settings=["steps=2"]))
    assert small_edit(KiwiEdit.from_pretrained(tmp_path / "run", dtype=torch.float32)).shape == (6, 32, 64, 3)


def test_checkpoints_are_in_the_order_of_their_steps_and_a_renamed_one_stays(tmp_path, lesson):
    words = lessons(lesson, tmp_path, "--resume", "auto", "--save-every", "1", "--keep", "1")
    train.main([*words, "steps=1"])
    (tmp_path / "step-000001").rename(tmp_path / "step-000001-good")
    train.main([*words, "steps=2"])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001-good", "step-000002"]
    for name in ("step-999999", "step-1000000"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    assert [p.name for p in valid_checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_a_shape_of_two_phases_has_the_rows_of_both_in_a_cache():
    small, large = (Mixture({"image": {(1, 64, 64): numbers}}, {"image": 1}, 2, seed=0) for numbers in ([0, 2, 130], [2]))
    assert train.rows_of_shapes(Curriculum([(0, large), (6, small)])) == {("image", (1, 64, 64)): [0, 2, 130]}


def test_a_row_of_a_cache_is_its_own(tmp_path):
    save_file({"1.target": torch.ones(1), "10.target": torch.zeros(1)}, data.shard_path(tmp_path, "image", (1, 64, 64), 0))
    assert data.read_shard(tmp_path, "image", (1, 64, 64), 0, 1)["target"] == 1


def test_a_folder_is_whole_or_as_it_was(tmp_path, monkeypatch):
    for word in ("old", "new"):
        with data.whole_folder(tmp_path / "w") as temporary:
            (temporary / "x").write_text(word)
    with pytest.raises(KeyboardInterrupt), data.whole_folder(tmp_path / "w"):
        raise KeyboardInterrupt
    assert (tmp_path / "w/x").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["w"]
    moved, rename = [], os.replace

    def interrupted(a, b):
        moved.append(a)
        if len(moved) == 2:  # the old folder is aside, the new one not yet in its place
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), data.whole_folder(tmp_path / "w"):
        pass
    assert (tmp_path / "w/x").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["w"]


def test_after_an_error_no_worker_waits_and_the_last_checkpoint_is_whole(tmp_path, lesson, monkeypatch):
    save, loss = train.save_file, train.Trainer.loss

    def slowly(*tensors):
        time.sleep(1)
        save(*tensors)

    def no_memory(trainer, batch):
        if trainer.counts["step"] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(trainer, batch)

    monkeypatch.setattr(train, "save_file", slowly)
    monkeypatch.setattr(train.Trainer, "loss", no_memory)
    with pytest.raises(torch.OutOfMemoryError) as error:
        train.main(lessons(lesson, tmp_path, "--workers", 2, "--save-every", 1, settings=["steps=2"]))
    assert multiprocessing.active_children() == [] and error.tb  # which keeps the loader
    assert [path.name for path in valid_checkpoints(tmp_path)] == ["step-000001"] and not list(tmp_path.glob(".step-*"))


def test_a_checkpoint_of_another_stage_or_that_is_damaged_is_not_resumed_from_and_other_rows_are_told_of(tmp_path, lesson, capsys):
    mine = Path(shutil.copytree(lesson, tmp_path / "mine", ignore=shutil.ignore_patterns("weights")))
    train.main(lessons(lesson, tmp_path / "run", "--data", mine, stage=1, settings=["steps=1"]))
    table = mine / "image.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    again = ["--data", mine, "--resume", "auto"]
    train.main(lessons(lesson, tmp_path / "run", *again, stage=1, settings=["steps=2"]))
    assert "the image rows, whose order begins anew" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trains other parts: a next stage begins with --weights"):
        train.main(lessons(lesson, tmp_path / "run", *again, stage=2, settings=["steps=3"]))
    state = next((tmp_path / "run" / "step-000002" / "state").glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000002/state: cannot be read"):
        train.main(lessons(lesson, tmp_path / "run", *again, stage=1, settings=["steps=3"]))


def test_a_base_path_is_of_the_tables_named_where_some_are(tmp_path, lesson):
    shutil.copy(lesson / "ref_video.csv", tmp_path / "curated.csv")
    named = ["--ref-csv", tmp_path / "curated.csv", "--base-path", lesson]
    train.main(lessons(lesson, tmp_path / "named", *named, settings=["steps=1"]))
    train.main(lessons(lesson, tmp_path / "plain", settings=["steps=1"]))
    assert losses(tmp_path / "named") == losses(tmp_path / "plain")


def test_a_diverged_run_skips_steps_and_stops_with_the_sample(tmp_path, lesson, capsys):
    with pytest.raises(ValueError, match=r"5 steps in a row were skipped.*_tgt\.(png|mp4)"):
        train.main(lessons(lesson, tmp_path / "run", settings=["lr=1e30", "weight_decay=0"]))
    assert "skipped: its gradient is" in capsys.readouterr().err


def test_a_limit_of_pixels_is_a_number_or_none():
    for value, pixels in (("none", None), ("9000", 9000)):
        for config in (MLLMConfig("qwen"), MLLMConfig("qwen", max_pixels=None)):
            assert train.with_settings(config, [f"max_pixels={value}"]).max_pixels == pixels
    with pytest.raises(ValueError, match="max_pixels=lots: 'lots' is not of the kind"):
        train.with_settings(MLLMConfig("qwen"), ["max_pixels=lots"])


@pytest.mark.parametrize("words, says", [
    (["--set", "speed=2"], "Stage has no 'speed'; it has"), (["--set", "steps=many"], "not of the kind"),
    (["--set", "weighting=no"], "Stage.weighting: 'no', expected bell or none"),
    (["--set", "schedule=never"], "expected constant, cosine or linear"), (["--sp", "2"], "does not divide the 1 processes"),
    (["--weights", "nowhere"], "no such file or folder"), (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--dtype", "bfloat16", "--parallel", "ddp"], "take --parallel fsdp"), (["--set", "batch=3"], "not a multiple of batch"),
    (["--resume", "nowhere"], "not a checkpoint folder"), (["--set", "paint.dim=3"], "there are model, dit, vae, mllm"),
    (["--set", "ema=1.5"], "Stage.ema: 1.5"), (["--set", "image=-1"], "shares of at least 0"),
    (["--set", "trains=lora,dti"], "the model has no 'dti'"), (["--set", "lora_targets=q_proj,key"], "no linear layer 'key'"),
    (["--init", "random"], "leave out --weights"), (["--weights", __file__], "cannot be read"),
    (["--set", "pixels=0"], "Stage.pixels: 0"), (["--set", "clip=-1"], "Stage.clip: -1"),
    (["--set", "ref_shrink=1.5"], "Stage.ref_shrink: 1.5"), (["--set", "lora_rank=0"], "Stage.lora_rank: 0"),
])  # fmt: skip
def test_a_bad_request_to_train_is_one_clear_line(tmp_path, lesson, monkeypatch, words, says):
    plain = lessons(lesson, tmp_path / "run", settings=words[1:] if words[0] == "--set" else [])
    plain[plain.index("--set"):plain.index("--set")] = [] if words[0] == "--set" else words
    monkeypatch.setattr(sys, "argv", ["train.py", *plain])
    with pytest.raises(SystemExit) as exit_:
        train.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code and not train.dist.is_initialized()


def test_a_setting_that_had_no_value_takes_a_number_or_several():
    mllm, model = (train.with_settings(config, [text]) for config, text in (
        (MLLMConfig("x", max_pixels=None), "max_pixels=262144"), (KiwiConfig(), "trained=9,64,64,8")))  # fmt: skip
    assert mllm.max_pixels == 262144 and model.trained == (9, 64, 64, 8)
    assert train.cast("0.5,1", ()) == (0.5, 1)
    with pytest.raises(ValueError, match="max_pixels=many: 'many' is not of the kind of None"):
        train.with_settings(MLLMConfig("x", max_pixels=None), ["max_pixels=many"])


@pytest.mark.parametrize("flag, least", [("--max-bad", 0), ("--workers", 0), ("--sample-steps", 1), ("--sample-every", 0), ("--keep", 1)])
def test_a_number_too_small_is_refused_before_anything_is_read(capsys, flag, least):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--stage", "1", flag, str(least - 1)])
    assert f"{flag} {least - 1}" in capsys.readouterr().err and train.parse_arguments(["--stage", "1", flag, str(least)])


@pytest.mark.parametrize("error, says", [
    (KeyboardInterrupt(), "train.py: interrupted"), (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --workers"),
])  # fmt: skip
def test_an_interrupt_before_the_first_step_and_a_lost_worker_are_one_line(monkeypatch, error, says):
    def fails():
        raise error

    monkeypatch.setattr(train, "main", fails)
    with pytest.raises(SystemExit) as exit_:
        train.run()
    assert says in exit_.value.code and "\n" not in exit_.value.code.strip()


def test_nano_starts_from_nothing_but_no_run_is_written_over(tmp_path, lesson, capsys, monkeypatch):
    monkeypatch.setattr(train, "NANO", tmp_path / "none")
    words = ["--config", "nano", "--stage", 1, "--data", lesson, "--out", tmp_path / "run", "--set", *SMALL, "steps=1"]
    train.main([str(word) for word in words])
    assert "random weights" in capsys.readouterr().err and (tmp_path / "run/init").is_dir()
    with pytest.raises(ValueError, match="give --resume auto to continue"):
        train.main([str(word) for word in words])
    train.main([*map(str, words), "--set", "steps=2", "--resume", "auto"])
    train.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "whole")])
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "whole/config.json").is_file()


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_checkpoint(tmp_path, lesson):
    command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run", settings=["steps=2"])]
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; {shlex.join(command)}"], capture_output=True, text=True)
    assert done.returncode != 0 and "the checkpoint cannot be written" in done.stderr.splitlines()[-1]
    assert train.valid_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_dry_run_writes_nothing_and_a_plot_shows_the_losses(tmp_path, lesson, capsys, parallel):
    train.main(lessons(lesson, tmp_path / "run", "--dry-run"))
    said = capsys.readouterr().out
    assert "M trained" in said and "frames of 64x64" in said and "GiB" in said and not (tmp_path / "run").exists()
    flags = ["--sample-every", "2", "--sample-steps", "1", "--parallel", parallel]
    train.main(lessons(lesson, tmp_path / "run", *flags, settings=["steps=2"]))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    train.main(["--plot", str(tmp_path / "run")])
    assert "<polyline" in (tmp_path / "run" / "loss.svg").read_text()
    assert read_clip(tmp_path / "run" / "samples" / "step-000002-ref.mp4").frames.shape[2] == 3 * 96


def test_the_help_of_the_other_commands_answers_without_torch():
    for name in ("train.py", "data.py", "curate.py", "judge.py", "nano.py"):
        probe = f"import runpy, sys; sys.argv = [{name!r}, '--help']\ntry: runpy.run_path({name!r}, run_name='__main__')\n"
        probe += "except SystemExit: assert not {'torch', 'av', 'transformers', 'numpy'} & sys.modules.keys()"
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=HOUSE)
        assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


def test_the_paper_s_numbers_are_the_defaults():
    told = {1: ({"image": 1, "video": 0, "ref": 0}, 30_000), 2: ({"image": 1, "video": 1, "ref": 0}, 10_000), 3: ({"image": 2, "video": 1, "ref": 1}, 10_000)}
    for number, stage in train.STAGES["paper"].items():  # FACTS.md, "Training"
        assert (stage.ratio, stage.steps) == told[number] and stage.source == (number > 1)
        assert (stage.global_batch, stage.lr, stage.optimizer, stage.lora_rank, stage.shift) == (128, 2e-5, "adamw", 64, 5.0)
    assert [stage.lr for stage in train.STAGES["released"].values()] == [1e-5, 1e-5, 5e-6]


def test_timesteps_are_drawn_over_the_whole_schedule_and_rounded_where_weights_see_them_so():
    draws = torch.tensor([train.draw(0, number, FlowMatch(), False)[1].item() for number in range(2000)])
    assert len(draws.unique()) > 800 and abs((draws < FlowMatch().timesteps(1000)[500]).float().mean() - 0.5) < 0.05
    rounded = torch.stack([train.draw(0, number, FlowMatch(), True)[1] for number in range(50)])
    assert torch.equal(rounded, rounded.bfloat16().float())


@contextmanager
def trainer_of(lesson, out, *settings):
    args = train.parse_arguments(lessons(lesson, out, settings=settings))
    stage, ranks = train.choose_stage(args), train.Ranks(args)
    try:
        model = train.load_model(args, stage, ranks, None)
        yield train.Trainer(args, stage, ranks, model, *train.open_data(args, stage, ranks))
    finally:
        ranks.leave()


def test_a_batch_has_the_mean_loss_of_its_items_each_with_its_own_words(tmp_path, lesson):
    per_item = ("numbers", "prompts", "paths", "pictures", "visuals")
    with trainer_of(lesson, tmp_path, "batch=2", "ref=0", "ref_shrink=1") as trainer:
        batch = next(iter(trainer.loader())) | {"prompts": ["Invert it.", "Make it snow."]}
        singles = [{k: v[i : i + 1] if k in per_item else v for k, v in batch.items()} for i in range(2)]
        whole, *parts = (trainer.loss(each)[0].detach() for each in (batch, *singles))
    assert close(whole, torch.stack(parts).mean(), 1e-5) and abs(parts[0] - parts[1]) > 1e-3 * whole


def test_phases_begin_and_samples_are_numbered_by_batches_and_items(tmp_path, lesson):
    with trainer_of(lesson, tmp_path, "steps=20", "pixels=4096,6144", "batch=2") as trainer:
        pairs = Pairs(trainer.tables, trainer.curriculum, lambda source, row: None)
        assert [start for start, _ in trainer.curriculum.phases] == [0, 10 * trainer.stage.batches]
        assert pairs[0]["numbers"] + pairs[1]["numbers"] == [0, 1, 2, 3]


def test_a_batch_of_two_is_estimated_to_need_twice_the_activations_of_one(tmp_path, lesson):
    with trainer_of(lesson, tmp_path) as trainer:
        stages = [replace(trainer.stage, batch=size) for size in (1, 2)]
        one, two = (train.activation_numbers(trainer.model, stage, trainer.ranks, (9, 64, 64), True) for stage in stages)
    assert two == 2 * one


def test_muon_takes_matrices_of_the_blocks_and_adamw_the_rest():
    shapes = {"dit.blocks.0.ffn.0.weight": (4, 3), "mllm.ref_queries": (4, 3), "dit.blocks.0.modulation": (1, 6, 3), "source_scale.weight": (1, 3)}
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    stage = replace(train.STAGES["paper"][3], optimizer="muon")
    muon, adamw = train.make_optimizers(stage, trained)
    assert [len(o.param_groups[0]["params"]) for o in (muon, adamw)] == [1, 3] and adamw.defaults["betas"] == (0.9, 0.999)
    trained["dit.blocks.0.ffn.0.weight"].device_mesh = SimpleNamespace(size=lambda: 8)
    with pytest.raises(ValueError, match="has 4 rows for 8 ranks"):
        train.make_optimizers(stage, trained)


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


def test_a_folder_has_tables_for_the_kinds_of_its_clips_alone(tmp_path):
    small = ["--frames", "1", "--workers", "1", "--clips"]
    nano.main(["data", str(tmp_path), *small, "4"])
    assert len(list(tmp_path.glob("*.csv"))) == 3
    nano.main(["data", str(tmp_path), *small, "1", "--tasks", "subject=1"])
    assert [path.name for path in tmp_path.glob("*.csv")] == ["ref_video.csv"]
    (tmp_path / "world.json").unlink()  # as where the table is a person's own
    with pytest.raises(ValueError, match=r"has ref_video\.csv, truth\.jsonl that nano\.py did not write"):
        nano.main(["data", str(tmp_path), *small, "1"])


def test_a_world_that_is_half_drawn_over_another_has_no_tables(tmp_path, monkeypatch):
    words, write = ["data", str(tmp_path), "--clips", "40", "--frames", "1", "--workers", "1"], nano.write_share
    nano.main(words)

    def interrupted(out, world, indices):
        if indices[0]:
            raise KeyboardInterrupt
        return write(out, world, indices)

    monkeypatch.setattr(nano, "write_share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nano.main([*words, "--seed", "1"])
    assert [path.name for path in tmp_path.glob("*.*")] == ["world.json"]


def test_a_world_of_chosen_tasks_has_no_others_and_in_their_shares(library):
    tasks = Counter(world.draw_edit(library, "train", 0, i, 1, 64, {"change": 3, "add": 1, "subject": 1}).task for i in range(160))
    assert set(tasks) == {"change", "add", "subject"} and tasks["change"] > 2 * tasks["add"]
    assert {world.draw_edit(library, "train", 0, i, 1, 64, {"style": 1}).kind for i in range(8)} == {"image", "video"}
    with pytest.raises(SystemExit):
        nano.parse_arguments(["data", "x", "--tasks", "changes=2"])


def test_what_is_tested_was_never_trained_on(library):
    train, test = ([world.draw_edit(library, split, 0, i, 1, 64) for i in range(200)] for split in ("train", "test"))

    def seen(edits):
        things = {thing.sprite.name for e in edits for thing in e.source.things}
        photos = {scene.photo.name for e in edits for scene in (e.source, e.target) if "plain" not in scene.photo.name}
        return things | photos | {e.new.name for e in edits if e.new}

    assert not seen(train) & seen(test) and len(seen(test)) > 20
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert library.names("train") and not set(library.names("train")) & set(library.names("test"))


def test_wordings_have_the_blanks_that_edits_fill_and_the_held_out_are_no_rearranged_ones():
    common = set("the to in of is are be it and has for as you could please from a would like".split())
    asked = {"style": "s", "background": "p", "change": "ab", "remove": "a", "add": "bw", "subject": "a", "subject_add": "w"}
    allowed = {"subject": "b", "subject_add": "b"}

    def telling(wording):
        return set(re.findall(r"(?<!{)\b[a-z']+", wording.lower())) - common

    assert world.WORDINGS.keys() == world.HELD_WORDINGS.keys() == {task for tasks in world.TASKS.values() for task in tasks}
    for task, wordings in world.WORDINGS.items():
        held = world.HELD_WORDINGS[task]
        for wording in (*wordings, *held):
            blanks = set(re.findall(r"{(\w+)}", wording)) - {"clip"}
            assert set(asked.get(task, "")) <= blanks <= set(asked.get(task, "") + allowed.get(task, "")), wording
        assert not [(a, b) for a in wordings for b in held if telling(b) <= telling(a)]
        assert len(set(wordings)) == len(wordings) >= 64 and len(held) == 4


def test_training_alone_sees_other_colours_and_heaps_of_leaves(library):
    own = {id(photo) for photo in library.photos} | {id(look) for looks in library.sprites.values() for look in looks}
    strange = {}
    for split in ("train", "test"):
        scenes = [world.draw_edit(library, split, 0, i, 1, 64).source for i in range(60)]
        places, things = [s.photo for s in scenes], [thing.sprite for s in scenes for thing in s.things]
        strange[split] = [sum(id(one) not in own for one in group) / len(group) for group in (places, things)]
    assert strange["test"] == [0, 0] and 0.5 < strange["train"][0] < 0.9
    assert strange["train"][1] == 0, "a coloured shape keeps the colour of its name"


def test_other_colours_stay_under_the_same_alpha_and_leaves_are_seamless(library):
    rng, sprite = np.random.default_rng(0), library.sprites["red star"][0]
    other = world.recoloured(rng, sprite)
    for old, new in zip(sprite.levels, other.levels):
        assert torch.equal(old[3], new[3]) and (new[:3] <= new[3:]).all() and new.min() >= 0
        assert (old[:3] - new[:3]).abs().max() > 0.1
    for _ in range(5):
        leaves = world.draw_leaves(rng, library.photos_of("train")[1]).image
        inner = (leaves[:, 1:] - leaves[:, :-1]).abs().mean()
        assert (leaves[:, 0] - leaves[:, -1]).abs().mean() < 3 * inner and 0 <= leaves.min() and leaves.max() <= 1


def test_the_truth_follows_from_what_is_shown(library):
    for i in range(120):
        edit = world.draw_edit(library, "train", 2, i, 1 if i % 4 in (0, 3) else 5, 64)
        if edit.kind == "image":
            assert edit.source.camera.tolist() == [[0, 0, 1]], "a still does not show where its camera will go"
        if edit.new:
            thing = edit.target.things[edit.changed[1]]
            assert thing.path[0, 3] == 0, "how askew the old thing stood cannot be told"
            assert thing.flip is False or edit.ref is not None, "words do not say which side"


def test_words_say_which_of_several_things_is_meant(library):
    ahead = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
    said = {"train": [], "test": []}
    for split, index in itertools.product(said, range(120)):
        edit = world.draw_edit(library, split, 3, index, 1 if index % 4 in (0, 3) else 5, 64)
        things = edit.source.things
        if edit.task in ("change", "remove", "subject") and len(things) > 1:
            which = edit.changed[0]
            name = things[which].sprite.name
            side = next((side for side in (*ahead, "in the middle") if f"{name} {side}" in edit.prompt), None)
            said[split].append(side is not None)
            if side in ahead:
                x, y = ahead[side]
                places = [x * float(thing.path[0, 0]) + y * float(thing.path[0, 1]) for thing in things]
                assert places.index(max(places)) == which, edit.prompt
    assert all(said["test"]) and len(said["test"]) > 10, "nobody has heard the names of its things"
    assert 0 < sum(said["train"]) < len(said["train"]), "names count too"


def test_a_reference_shows_the_side_that_is_meant(library):
    arrow = library.sprites["red arrow"][0]  # its head, the heavier half, is on the right
    for seed in range(8):
        for flip in (False, True):
            thing = world.Thing(arrow, torch.tensor([[0.0, 0.0, 0.4, 0.0]]), flip)
            shown = world.show_reference(np.random.default_rng(seed), thing, 64)
            columns = ((shown - shown[:, :1, :1]).abs().amax(dim=0) > 0.1).sum(dim=0)
            first, last = columns.nonzero()[[0, -1], 0]
            left, right = columns[first : last + 1].chunk(2)
            assert (right.sum() < left.sum()) == flip


def test_a_perfect_edit_is_recognised_and_the_source_is_not(library):
    for index in range(0, 40, 3):
        edit = world.draw_edit(library, "test", 0, index, 5, 64)
        source, target, region = world.draw_frames(edit, 64)
        measures = nano.measure(target, target, region)
        assert measures["psnr_in"] == 60 and measures["ssim_in"] == pytest.approx(1)
        assert nano.region_psnr(source, target, region) < 40
        if edit.new or edit.task == "remove":
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


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, nano_data):
    folder = tmp_path_factory.mktemp("pretrained")
    for part in ("vae", "mllm", "dit"):
        run_pretrain(part, nano_data, folder)
    return folder


def run_ship(checkpoint, weights, test_data, out, *more, example=2):
    words = [checkpoint, "--weights", weights, "--data", test_data, "--example", example, "--made-by", "a test"]
    nano.main(["ship", *map(str, [*words, "--out", out, *more])])


@pytest.fixture(scope="session")
def test_clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano_test")
    nano.main(["data", str(folder), "--clips", "4", "--frames", "5", "--workers", "1", "--split", "test"])
    return folder


def test_pretraining_in_pieces_is_one_training(tmp_path, nano_data, pretrained):
    with pytest.raises(SystemExit, match="75"):
        run_pretrain("vae", nano_data, tmp_path, "--minutes", "0")
    first = torch.load(tmp_path / "vae.pt", weights_only=True)
    run_pretrain("vae", nano_data, tmp_path)
    whole, pieces = (torch.load(folder / "vae.pt", weights_only=True) for folder in (pretrained, tmp_path))
    assert first["step"] == 1 and pieces["step"] == 2 and pieces["seconds"] > first["seconds"] > 0
    assert all(torch.equal(whole["masters"][name], pieces["masters"][name]) for name in whole["masters"])
    model = KiwiEdit.from_pretrained(pretrained / "weights", dtype=torch.float32)
    assert torch.equal(model.vae.encoder.conv1.weight, whole["masters"]["encoder.conv1.weight"])


def test_a_checkpoint_ships_as_small_weights_that_edit(tmp_path, pretrained, test_clips):
    model = KiwiEdit.from_pretrained(pretrained / "weights", dtype=torch.float32)
    inject_lora(model.mllm.model.language_model, 4)
    trained = {f"mllm.model.language_model.{k}": v + 0.1 for k, v in model.mllm.model.language_model.state_dict().items() if ".lora_" in k}
    save_file({**trained, "dit.head.head.bias": model.dit.head.head.bias + 1}, tmp_path / "step.safetensors")
    run_ship(tmp_path / "step.safetensors", pretrained / "weights", test_clips, tmp_path / "shipped")
    assert sum(path.stat().st_size for path in (tmp_path / "shipped").rglob("*.*")) < 32e6
    model, before = KiwiEdit.from_pretrained(tmp_path / "shipped", dtype=torch.float32), model.dit.head.head.bias
    assert close(model.dit.head.head.bias, before + 1, 1e-2) and tuple(model.config.trained) == (5, 64, 64, 8)
    tokenizer = model.mllm.tokenizer
    text = "Replace the bicycle with the one shown, s'il vous plaît."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    frames, ref = moving_picture(5, 64, 64), moving_picture(1, 50, 40)[0]
    assert model.edit(frames, text, ref, steps=1).shape == frames.shape


def test_what_ships_has_an_example_and_says_how_it_was_trained_and_is_the_same_each_time(
    tmp_path, nano_data, pretrained, test_clips
):
    def train_from(weights, run):
        words = ["--config", "nano", "--stage", "3", "--data", nano_data, "--weights", weights, "--workers", "0", "--out", run]
        train.main([*map(str, words), "--set", "steps=1", "global_batch=2"])
        return run / "step-000001/weights.safetensors"

    checkpoint = train_from(pretrained / "weights", tmp_path / "run")
    run_ship(checkpoint, pretrained / "weights", test_clips, tmp_path / "plain")
    nano.main(["eval", *map(str, ["--weights", tmp_path / "plain", "--data", test_clips, "--out", tmp_path])])
    for name in "ab":
        run_ship(checkpoint, pretrained / "weights", test_clips, tmp_path / name, "--eval", str(tmp_path))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 12
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    card, table = (tmp_path / "a/MODEL_CARD.md").read_text(), (tmp_path / "eval.md").read_text()
    clips = "16 of `nano.py data --seed 0 --frames 5`"
    for text in ("| pretrain vae | 0 | 2 |", "| train.py stage 3 | 0 | 1 | 2 |", clips, table.strip()):
        assert text in card
    row = json.loads((test_clips / "truth.jsonl").read_text().splitlines()[2])
    assert (tmp_path / "a/example/prompt.txt").read_text().strip() == row["prompt"]
    assert (tmp_path / "a/example/reference.png").read_bytes() == (test_clips / row["ref_image"]).read_bytes()
    (tmp_path / "a/MODEL_CARD.md").write_text(card.replace(clips, f"{clips}, 3 of others"))
    more = train_from(tmp_path / "a", tmp_path / "more")
    with pytest.raises(ValueError, match="measured other weights"):
        run_ship(more, tmp_path / "a", test_clips, tmp_path / "c", "--eval", str(tmp_path))
    run_ship(more, tmp_path / "a", test_clips, tmp_path / "c")
    rows = [line for line in card.splitlines() if line.startswith("| pretrain ")]
    again = (tmp_path / "c/MODEL_CARD.md").read_text()
    assert again.count(clips) == 1 == again.count("3 of others")
    assert rows and all(row in again for row in rows) and again.count("| train.py stage 3 | 0 | 1 | 2 |") == 2
    drawn = {"clips": 9, "seed": 1, "frames": 5, "tasks": {"change": 2, "add": 1}}
    (tmp_path / "world.json").write_text(json.dumps(drawn))
    (tmp_path / "run/config.json").write_text(json.dumps({"args": {"data": [str(tmp_path)], "weights": None}}))
    assert nano.clips_seen(checkpoint, tmp_path) == "9 of `nano.py data --seed 1 --frames 5 --tasks change=2 add=1`"


def test_a_card_tells_of_every_run_before_from_whatever_folder_it_is_written(tmp_path):
    for run, began in (("1", {}), ("2", {"weights": "../1"})):
        checkpoint = tmp_path / run / "step-000005"
        checkpoint.mkdir(parents=True)
        (checkpoint / "train.json").write_text(json.dumps({"counts": {"step": 5, "samples": 10, "seconds": 3}}))
        args = {"seed": 0, "stage": int(run), "weights": began and "runs/1", "data": []}
        (tmp_path / run / "config.json").write_text(json.dumps({"args": args, "began": began}))
    rows = nano.phases_of(checkpoint / "weights.safetensors", tmp_path)
    assert rows == ["| train.py stage 1 | 0 | 5 | 10 | 3 |", "| train.py stage 2 | 0 | 5 | 10 | 3 |"]


def test_bench_writes_what_judge_reads_and_eval_wants_held_out_clips(tmp_path, nano_data):
    nano.main(["bench", str(tmp_path), "--items", "2", "--frames", "5"])
    items = judge.read_bench("refvie", tmp_path / "refvie_bench.yaml", tmp_path / "edits")
    assert len(items) == 2 and all(item.source.is_file() and item.ref.is_file() for item in items)
    with pytest.raises(ValueError, match="of the train split"):
        nano.main(["eval", "--weights", "w", "--data", str(nano_data), "--out", str(tmp_path / "r")])


def test_the_goals_are_differences_of_the_measures():
    edit, copy = {"psnr_in": 20.0, "psnr_out": 30.0, "right": True}, {"psnr_in": 12.5, "psnr_out": 60.0, "right": False}
    measures = {"edit": edit, "copy": copy, "ceiling": {"psnr_in": 25.0, "psnr_out": 32.0}}
    without = {**measures, "edit": {**edit, "right": False}, "edit, no reference": {"psnr_in": 18.0}}
    lines = nano.goals([{"task": "change", "measures": measures}, {"task": "subject", "measures": without}]).splitlines()
    assert lines[2] == "| change | +7.5 dB (asked +6) | 2.0 dB (asked at most 3) | 100% (asked 60%) |  |"
    assert lines[3] == "| subject | +7.5 dB | 2.0 dB (asked at most 3) | 0% (asked 70%) | +2.0 dB (asked more than 0) |"
    told = {"task": "subject", "wording": "Swap the {a}."}
    lines = nano.by_wording([{**told, "measures": measures}, {**told, "measures": without}]).splitlines()
    assert lines[2:] == ["| subject | Swap the {a}. | 2 | +7.5 dB | 2.0 dB | 50% |"]


def test_a_small_denoiser_learns_two_edits_by_heart(tmp_path, library):
    """Both of the same picture: only the instruction tells them apart. Latents are the pixels of 4x4 cells."""
    edit = next(e for e in (world.draw_edit(library, "train", 1, i, 1, 32) for i in range(200)) if "plain" in e.prompt)
    source, changed, _ = world.draw_frames(edit, 32)
    pictures = [x.permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (source, changed, 255 - source)]  # (1, 3, 32, 32)
    before, *targets = (F.pixel_unshuffle(x, 4)[:, :, None] for x in pictures)  # (1, 48, 1, 8, 8)
    clean, before = torch.cat(targets), before.expand(2, -1, -1, -1, -1)

    world.write_mllm_folder(tmp_path / "mllm", [edit.prompt])
    dit = DiTConfig(128, 256, 4, 2, 48, 48, freq_dim=32, text_dim=8, patch_size=(1, 1, 1))
    model = KiwiEdit(KiwiConfig(dit, None, MLLMConfig(str(tmp_path / "mllm"), 128, 4, 0, 0)))
    torch.nn.init.normal_(model.mllm.connector[2].weight)
    with torch.no_grad():
        contexts = torch.cat([model.mllm(text, source) for text in (edit.prompt, "Show the negative.")])
    optimiser = torch.optim.AdamW((p for name, p in model.named_parameters() if "mllm" not in name), 2e-3, (0.9, 0.98))
    for step in range(600):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
        t = FlowMatch().timesteps(1000)[torch.randint(1000, (8,))]
        model.training_loss(clean.repeat(4, 1, 1, 1, 1), contexts.repeat(4, 1, 1), t, before.repeat(4, 1, 1, 1, 1)).backward()
        optimiser.step()
        optimiser.zero_grad()
    result = model.denoise(torch.randn_like(clean), contexts, before, steps=10)
    error, copied = ((x - clean).square().flatten(1).mean(dim=1) for x in (result, before))
    assert (error < copied / 8).all(), (error, copied)


@pytest.mark.parametrize("arguments, says", [
    (["data", "x", "--size", "50"], "multiple of 32"), (["data", "x", "--frames", "8"], "4k + 1"),
    (["data", "x", "--assets", "."], "nano.py assets"), (["pretrain", "vae", "--data", "x", "--out", "y"], "nano.py data"),
    (["eval", "--weights", "w", "--data", "x", "--out", "y"], "nano.py data"),
    (["ship", "c", "--weights", "w", "--data", "x", "--example", "1", "--made-by", "m", "--out", "y"], "train.py checkpoint"),
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


def test_an_answer_s_word_is_read_off_before_the_model_sees_it(monkeypatch, qwen_folder):
    encoder, seen = randomise(MLLMEncoder.from_config(qwen_folder, dit_dim=16, num_image_queries=3)), []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, wanted: seen.append((logits, wanted)) or logits.sum())
    still = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    for answer in ("ab", "xb"):
        nano.answer_loss(encoder, [(still, "Describe this.", None, answer)])
    (a, wanted_a), (x, wanted_x) = seen
    assert wanted_a[0] != wanted_x[0] and torch.equal(wanted_a[1:], wanted_x[1:])
    assert close(a[0], x[0], 1e-5) and not close(a[1], x[1], 1e-3)


def test_eval_asks_with_and_without_the_reference_and_copies_the_source(library, test_clips):
    row = next(r for r in nano.read_truth(test_clips) if "ref_image" in r and r["task"].startswith("subject"))
    asked, same = [], lambda x: x
    answer = lambda source, prompt, ref=None, **more: asked.append(ref is not None) or source
    model = SimpleNamespace(edit=answer, encode_frames=same, decode_frames=same)
    edit = world.redraw_edit(library, nano.read_world(test_clips), row["index"])
    measures, _ = nano.evaluate_case(model, library, edit, "test", test_clips, row)
    assert asked == [True, False] and measures["copy"]["psnr_in"] < 30 < measures["ceiling"]["psnr_in"]


def test_a_box_encloses_the_thing_as_it_is_drawn(library):
    edits = [world.draw_edit(library, "train", 0, i, 5, 64, {"remove": 1}) for i in range(80)]
    edits = [edit for edit in edits if len(edit.source.things) == 1]
    for edit in edits:
        x0, y0, x1, y1 = curate.box_of(world.render(edit.source, 64)[2][0][0, 0] > 0.5)
        a, b, c, d = next(iter(world.boxes(edit.source).values()))
        assert a - 0.05 < x0 and x1 < c + 0.05 and b - 0.05 < y0 and y1 < d + 0.05
    assert len(edits) > 5


# ------------------------------------------------------------------------------------------------ metrics.py, judges.py, judge.py


def smooth_clip(colour, count=8, size=64):
    """A coloured square that moves over a grey slope: uint8 (count, size, size, 3)."""
    frames = torch.linspace(60, 160, size).repeat(count, size, 1)[..., None].repeat(1, 1, 1, 3)
    for t in range(count):
        frames[t, 16:48, 8 + 2 * t : 40 + 2 * t] = torch.tensor(colour, dtype=torch.float)
    return frames.to(torch.uint8)


RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (40, 60, 220)


def as_clip(colour, **more):
    return metrics.as_float(smooth_clip(colour, **more))


def test_metrics_know_the_copy_the_edit_the_wrong_reference_and_shuffled_frames():
    source, edit, (red, green) = as_clip(BLUE), as_clip(RED), (as_clip(c)[:1, :, 16:48, 8:40] for c in (RED, GREEN))
    copy, true = metrics.measure(source, source, [red]), metrics.measure(source, edit, [red, green])
    assert copy["edit_strength"] == copy["edited_area"] == copy["reference_gain"] == copy["flicker_excess"] == 0
    assert copy["preserved_psnr"] == 60 and copy["preserved_ssim"] == pytest.approx(1)
    assert true["edited_area"] == pytest.approx(0.25, abs=0.06) and true["preserved_psnr"] == 60
    assert true["reference_gain"] > 0.3 > true["control_wrong_gains"][0]
    assert true["control_shuffled_flicker"] > 2 * true["flicker"]


def test_a_small_edit_is_not_drowned_by_what_stayed():
    source, ref = as_clip(BLUE, size=256), as_clip(RED)[:1, :, 16:48, 8:40]
    edit = source.clone()
    edit[:, :, 180:204, 200:224] = ref[..., :24, :24]
    changed = metrics.reference_scores(source, edit, metrics.change_map(source, edit), [ref])[0]
    everywhere = metrics.reference_scores(source, edit, torch.ones(8, 32, 32), [ref])[0]
    assert changed[1] > 0.3 and changed[1] > everywhere[1] + 0.05


def test_a_re_encoded_copy_changes_little_and_keeps_its_length():
    for count in (1, 9):
        frames = smooth_clip(BLUE, count)
        copy = metrics.reencoded(frames, 8)
        assert copy.shape == frames.shape and 0 < (copy.float() - frames.float()).abs().mean() < 6


def test_damage_to_what_should_stay_lowers_the_preserved_psnr_as_its_formula_says():
    source, edit = as_clip(BLUE), as_clip(RED) + 0.02
    expected = -20 * np.log10(0.02)
    assert metrics.measure(source, edit)["preserved_psnr"] == pytest.approx(expected, abs=0.3)
    noisy = (as_clip(RED) + 0.1 * torch.randn_like(source)).clamp(0, 1)
    assert metrics.measure(source, noisy)["flicker_excess"] > 10


def test_correlations_and_intervals_are_right_on_numbers_done_by_hand():
    assert judge.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert judge.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert judge.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5) and judge.spearman([1, 1, 1], [1, 2, 3]) is None
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean = judge.mean_of([list(values)])
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert judge.mean_of([[1.0, 1.0], [3.0, 3.0]]).value == 2  # tasks weigh the same
    assert judge.mean_of([[1.0, 2.0]], missing=1, allow_missing=False).value is None


def test_every_flag_of_judge_is_read():
    text = (HOUSE / "judge.py").read_text() + (HOUSE / "judges.py").read_text()
    flags = re.findall(r'add\(\s*"--([\w-]+)"', text)
    assert len(flags) > 25 and all(f"args.{flag.replace('-', '_')}" in text for flag in flags)


NAMES = ["instruction_compliance", "consistency_detail", "visual_quality"]


@pytest.mark.parametrize("text", [
    '{"reasoning": "ok", "instruction_compliance": 4, "consistency_detail": 3, "visual_quality": 2}',
    'Sure!\n```json\n{"visual_quality": 2, "consistency_detail": "3/5", "instruction_compliance": "**4**"}\n```\nDone.',
    '{"scores": {"Instruction Compliance": 4, "consistency detail": 3.0, "visual_quality": "2 out of 5"}}',
    "Brief reasoning: 2 hats, 5 dogs.\nVisual Quality & Stability: 2\n**Instruction Compliance**: **4/5**\nConsistency & Detail: 3"
    .replace("Consistency & Detail", "Consistency Detail"),
    '{"reasoning": "cut", "instruction_compliance": 4, "consistency_detail": 3, "visual_quality": 2',
    "Instruction compliance: 4 stars\nConsistency detail: 3 of 5, good\nVisual quality: 2/5 poor",
])  # fmt: skip
def test_an_answer_is_read_by_its_names_whatever_stands_around_the_numbers(text):
    assert judges.read_answer(text, NAMES) == dict(zip(NAMES, (4, 3, 2)))


@pytest.mark.parametrize("text, says", [
    ('{"instruction_compliance": 6, "consistency_detail": 3, "visual_quality": 2}', "6 is not a whole number"),
    ('{"instruction_compliance": 3.5, "consistency_detail": 3, "visual_quality": 2}', "3.5 is not a whole"),
    ('{"instruction_compliance": "8/10", "consistency_detail": 3, "visual_quality": 2}', "scale"),
    ('{"instruction_compliance": true, "consistency_detail": 3, "visual_quality": 2}', "not a score"),
    ('{"instruction_compliance": 4, "consistency_detail": 3, "visual_qu', "visual_quality is missing"),
    ("Visual quality: 3\nVisual quality: 4\nInstruction compliance: 4\nConsistency detail: 1", "given twice"),
    ("Instruction compliance: 3-4\nConsistency detail: 1\nVisual quality: 1", "instruction_compliance is missing"),
    ("Instruction compliance: 2 of the hats are red, so 4/5\nConsistency detail: 1\nVisual quality: 1", "compliance is missing"),
    ("Instruction compliance: 4/10 because it is late\nConsistency detail: 1\nVisual quality: 1", "scale"),
    ("Instruction compliance: 2/3 of the hats are red, so 4/5\nConsistency detail: 1\nVisual quality: 1", "scale"),
    ("Instruction compliance: -4\nConsistency detail: 1\nVisual quality: 1", "-4 is not"),
    ("I cannot judge this video.", "instruction_compliance is missing"), ("", "missing"),
])  # fmt: skip
def test_an_answer_without_a_possible_score_is_refused_and_never_guessed(text, says):
    with pytest.raises(judges.Malformed, match=says):
        judges.read_answer(text, NAMES)


def write_refvie(folder, count=3):
    """A benchmark in RefVIE-Bench's format with edits under the released names: sources blue, edits and refs red."""
    (folder / "edits").mkdir(parents=True)
    lines = []
    for i in range(count):
        task = "background" if i == count - 1 else "subject"
        instruction = f"Replace the square by number {i}."
        write_video(folder / f"{i}_src.mp4", smooth_clip(BLUE, 8 + i), 4)
        write_image(folder / f"{i}.png", smooth_clip((220 - 40 * i, 30 + 50 * i, 30))[0])
        write_video(folder / "edits" / f"{i}_{instruction[:10]}_{i}_src.mp4", smooth_clip(RED, 8 + i), 4)
        lines += [f"- src_video: {i}_src.mp4", f'  instruction: "{instruction}"', f"  ref_img: {i}.png", f"  edit_type: {task}"]
    (folder / "bench.yaml").write_text("\n".join(lines))
    return folder


def good_answer(request, scores=(4, 3, 2)):
    names = [n for task in judge.REFERENCE_TASKS.values() for n in task[1] if f"\n{n}:" in request["text"]]
    return json.dumps({"reasoning": "as seen", **dict(zip(names, scores))})


class FakeJudge:
    """A server in the shapes of Gemini and OpenAI. `say(request, nth)` gives the answer's text, or a special tuple:
    ("status", code, headers), ("hang",), ("drop",), ("raw", bytes)."""

    def __init__(self, say=lambda request, nth: good_answer(request)):
        fake, self.say, self.requests, self.lock, self.over = self, say, [], threading.Lock(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.answer(self, fake.understand(self.path, self.headers, body))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def understand(self, path, headers, body):
        gemini = path.endswith(":generateContent")
        text = body["systemInstruction"]["parts"][0]["text"] if gemini else body["messages"][0]["content"]
        parts = body["contents"][0]["parts"] if gemini else body["messages"][1]["content"]
        return dict(path=path, headers=dict(headers), gemini=gemini, text=text, parts=parts, item=text.split("\n")[-1])

    def answer(self, handler, request):
        with self.lock:
            nth = sum(r["item"] == request["item"] for r in self.requests)
            self.requests.append(request)
        said = self.say(request, nth)
        code, extra = 200, {}
        if isinstance(said, str):
            tokens = len(request["text"])
            shape = {"choices": [{"message": {"content": said}}], "usage": {"prompt_tokens": tokens, "completion_tokens": 9}}
            if request["gemini"]:
                usage = {"promptTokenCount": tokens, "candidatesTokenCount": 9}
                shape = {"candidates": [{"content": {"parts": [{"text": said}]}}], "usageMetadata": usage}
            data = json.dumps(shape).encode()
        elif said[0] == "status":
            code, extra, data = said[1], said[2], b"API key not valid. " * (said[1] == 400) + str(request["headers"]).encode()
        elif said[0] == "raw":
            data = said[1]
        elif said[0] == "dribble":
            handler.send_response(200)
            handler.end_headers()
            for _ in range(200):
                self.over.wait(0.02)
                handler.wfile.write(b" ")
            return
        else:
            if said[0] == "hang":
                self.over.wait(20)
            handler.connection.close()
            return
        try:
            handler.send_response(code)
            for name, value in {"Content-Length": len(data), **extra}.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            handler.wfile.write(data)
            request["served"] = True
        except OSError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="session")
def refvie_original(tmp_path_factory):
    return write_refvie(tmp_path_factory.mktemp("bench") / "refvie")


@pytest.fixture
def refvie(tmp_path, refvie_original):
    return Path(shutil.copytree(refvie_original, tmp_path / "refvie"))


def score(folder, fake, *more, judge_="openai:m", out="out"):
    arguments = ["score", "--bench", "refvie", folder / "bench.yaml", "--edits", folder / "edits", "--judge", judge_,
                 "--endpoint", fake.url, "--wait", 0.01, "--out", folder / out, *more]  # fmt: skip
    judge.main(list(map(str, arguments)))


def lines_of(folder, out="out"):
    lines = [json.loads(line) for line in (folder / out / "answers.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "answer" and "metrics" not in line]


@pytest.mark.parametrize("judge_, key", [("gemini-x", "GEMINI_API_KEY"), ("openai:m", "OPENAI_API_KEY")])
def test_a_judge_gets_the_media_at_an_explicit_rate_and_the_key_stays_out_of_every_file(refvie, monkeypatch, judge_, key):
    monkeypatch.setenv(key, "secret-key-123")
    busy_once = lambda request, nth: ("status", 429, {"Retry-After": "0"}) if nth == 0 else good_answer(request)
    with FakeJudge(busy_once) as fake:
        score(refvie, fake, "--mode", "strict", "--controls", 0, judge_=judge_)
        request = fake.requests[-1]
    assert "secret" not in request["path"] and "secret-key-123" in str(request["headers"])
    if judge_ == "gemini-x":
        videos = [p for p in request["parts"] if "videoMetadata" in p]
        assert len(videos) == 2 and all(p["videoMetadata"] == {"fps": 4.0} for p in videos)
        assert base64.b64decode(videos[1]["inlineData"]["data"]) in [p.read_bytes() for p in (refvie / "edits").iterdir()]
    else:
        pictures = [p for p in request["parts"] if p["type"] == "image_url"]
        count = 8 + int(re.search(r"number (.)", request["item"])[1])  # frames of the clips, which have 4 a second too
        assert len(pictures) == 1 + 2 * count
    written = b"".join(p.read_bytes() for p in (refvie / "out").rglob("*") if p.is_file())
    assert b"HTTP 429" in written and b"secret-key-123" not in written


def test_the_hierarchy_is_enforced_in_code_and_its_breaches_are_counted(refvie):
    with FakeJudge(lambda request, nth: good_answer(request, (2, 5, 1))) as fake:
        score(refvie, fake, "--controls", 0)
    text = (refvie / "out" / "refvie.md").read_text()
    assert "broke the hierarchy in 3 of 3 answers" in text
    assert [line["scores"].popitem()[1] for line in lines_of(refvie)] == [1] * 3  # the raw answers stay as they were
    assert (refvie / "out" / "refvie.csv").read_text().splitlines()[1].split(",")[3:6] == ["2.0000", "2.0000", "1.0000"]


TROUBLES = {
    "429 storm": lambda n: ("status", 429, {}) if n < 3 else None,
    "503": lambda n: ("status", 503, {}) if n < 2 else None,
    "drop": lambda n: ("drop",) if n < 2 else None,
    "hang": lambda n: ("hang",) if n < 1 else None,
    "half an answer": lambda n: ("raw", b'{"choices": [{"mess') if n < 1 else None,
    "out of range": lambda n: '{"identity_consistency": 9, "temporal_consistency": 1, "physical_integration": 1}' if n < 1 else None,
    "refusal": lambda n: "I cannot help with that.",
    "another shape": lambda n: ("raw", b'{"choices": "none"}') if n < 1 else None,
    "bad request": lambda n: ("status", 413, {}),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_trouble_ends_in_the_right_score_or_in_a_report_and_nothing_is_lost(refvie, trouble, capsys):
    def say(request, nth):
        bad = TROUBLES[trouble](nth) if "number 1" in request["item"] else None
        return good_answer(request) if bad is None else bad

    with FakeJudge(say) as fake:
        deadline = 0.7 if trouble == "hang" else 30
        run = lambda *more: score(refvie, fake, "--controls", 0, "--deadline", deadline, "--retries", 3, *more)
        if trouble not in ("refusal", "bad request"):
            run()
            assert "0 cut off" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit, match="1 of 3 items lack a result"):
                run()
            assert "(1 missing)" in (refvie / "out" / "refvie.md").read_text()
            before = len(fake.requests)  # a refusal may be a mood, a bad request stays bad
            assert sum("number 1" in r["item"] for r in fake.requests) == (4 if trouble == "refusal" else 1)
            run("--allow-missing")
            asked_again = {request["item"] for request in fake.requests[before:]}
            assert len(asked_again) == 1 and "4.00 (1 missing)" in (refvie / "out" / "refvie.md").read_text()
    lines = lines_of(refvie)
    assert len(lines) == len(fake.requests) and all(line["ok"] or line["error"] for line in lines)
    assert {line["item"] for line in lines if line["ok"]} >= {"0", "2"}


@pytest.mark.parametrize("how", ["hang", "dribble"])
def test_a_server_that_hangs_or_dribbles_meets_the_deadline(how):
    began = time.monotonic()
    with FakeJudge(lambda request, nth: (how,)) as fake, pytest.raises(judges.TryAgain, match=r"no answer within 0\.3 s"):
        judges.post(fake.url + "/chat/completions", {}, {"messages": [{"content": "x"}, {"content": []}]}, 0.3)
    assert time.monotonic() - began < 3, "the dribble lasts 4 s"


@pytest.mark.parametrize("code, says", [(401, "refuses the key"), (402, "left to pay with"), (400, "refuses the key"), (404, "no such model")])
def test_a_refused_key_or_model_stops_the_run_at_once(refvie, monkeypatch, code, says):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key-9")
    with FakeJudge(lambda request, nth: ("status", code, {})) as fake:
        with pytest.raises(SystemExit, match=says) as stopped:
            score(refvie, fake, "--repeats", 5, "--concurrency", 2)
        assert len(fake.requests) <= 2 and "wrong-key" not in str(stopped.value)


def test_a_dry_run_names_the_price_and_asks_nothing(refvie, capsys):
    with FakeJudge() as fake:
        score(refvie, fake, "--dry-run", "--price", 2, 10, "--limit", 2, "--controls", 0)
        score(refvie, fake, "--dry-run", judge_="gemini-x")  # needs no key
    said = capsys.readouterr().out
    assert not fake.requests and "2 of 2 questions to ask" in said and "$" in said


@pytest.mark.parametrize("url, says", [("http://example.com/v1", "https only"), ("https://me:p@host/v1", "no user, password or query"),
                                       ("https://host/v1?key=s3cret", "no user, password or query")])  # fmt: skip
def test_a_key_goes_to_no_open_address(refvie, monkeypatch, url, says):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    with pytest.raises(SystemExit, match=says):
        score(refvie, SimpleNamespace(url=url), judge_="gemini-x")


def test_two_runs_never_share_a_folder(tmp_path):
    held = judge.Ledger(tmp_path / "answers.jsonl")
    with pytest.raises(judge.JudgeError, match="another judge.py"):
        judge.Ledger(tmp_path / "answers.jsonl")
    held.close()
    with curate.only_run(curate.Ledger(tmp_path), 0), pytest.raises(ValueError, match="another curate.py"):
        with curate.only_run(curate.Ledger(tmp_path), 0):
            pass


def test_a_broken_line_of_the_ledger_is_put_aside(tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text('{}\nnull\n{"event": "answer"}\n{"event": "sent", "key": "k"}\n{"ev')
    ledger = judge.Ledger(tmp_path / "answers.jsonl")
    ledger.close()
    assert "4 broken line(s)" in capsys.readouterr().err and ledger.lines == [{"event": "sent", "key": "k"}]


def test_a_server_that_is_not_there_is_not_asked_a_hundred_times(refvie):
    with FakeJudge() as fake:
        pass
    with pytest.raises(SystemExit, match="cannot be reached"):
        score(refvie, fake, "--repeats", 30, "--retries", 1)
    assert len(lines_of(refvie)) < 20


def test_a_question_that_waits_is_not_sent_when_the_run_stops():
    asker = judge.Asker(None, SimpleNamespace(retries=0), None)  # no judge and no ledger: sending would fail
    asker.not_before = time.monotonic() + 20
    threading.Timer(0.1, setattr, (asker, "stop", judge.Barred("no such key"))).start()
    asker.ask(None)
    assert time.monotonic() < asker.not_before - 10


def test_the_key_is_not_carried_to_where_a_server_redirects(refvie, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-123")
    with FakeJudge() as other, FakeJudge(lambda request, nth: ("status", 302, {"Location": other.url})) as fake:
        with pytest.raises(SystemExit, match="3 of 3 items lack a result"):
            score(refvie, fake, "--controls", 0)
        assert len(fake.requests) == 3 and not other.requests


def test_a_judge_that_was_not_shown_the_videos_is_found_out(refvie):
    with FakeJudge() as fake:
        fake.understand = (lambda old: lambda *a: {**old(*a), "text": ""})(fake.understand)
        fake.say = lambda request, nth: '{"identity_consistency": 4, "temporal_consistency": 3, "physical_integration": 2}'
        with pytest.raises(SystemExit):
            score(refvie, fake, "--controls", 0, "--retries", 0)
    assert all("dropped the videos" in line["error"] for line in lines_of(refvie))


def test_after_kill_9_a_rerun_pays_for_no_item_twice(refvie):
    served = threading.Event()

    def say(request, nth):
        if sum(r.get("served", False) for r in fake.requests) >= 3 and not served.is_set():
            return ("hang",)
        return good_answer(request)

    with FakeJudge(say) as fake:
        arguments = ["score", "--bench", "refvie", "bench.yaml", "--edits", "edits", "--judge", "openai:m", "--endpoint", fake.url,
                     "--repeats", "3", "--controls", "0", "--concurrency", "1"]  # fmt: skip
        process = subprocess.Popen([sys.executable, str(HOUSE / "judge.py"), *arguments, "--out", "out"], cwd=refvie,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        path, until = refvie / "out" / "answers.jsonl", time.time() + 60
        while time.time() < until and (not path.exists() or path.read_text().count('"scores"') < 3 or len(fake.requests) < 4):
            time.sleep(0.05)
        process.kill()
        process.wait()
        served.set()
        with path.open("a") as file:
            file.write('{"event": "answer", "ok": true, "key": "ha')  # as a crash in the middle of a line leaves it
        score(refvie, fake, "--repeats", 3, "--controls", 0)
    paid = [request for request in fake.requests if request.get("served")]
    assert len(paid) == 9 and len(lines_of_whole(path)) == 9
    assert "1 cut off (perhaps paid)" in (refvie / "out" / "refvie.md").read_text()


def lines_of_whole(path):
    """The keys that were answered, each once; broken lines are passed over as judge.py does."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    keys = [line["key"] for line in found if line["event"] == "answer" and "scores" in line]
    assert len(keys) == len(set(keys))
    return keys


def test_answers_that_are_no_plain_text_and_a_character_cut_in_two_are_paid_once(refvie):
    odd = '"reasoning": "a line\u2028and \\ud83d half an emoji, \u00e9", '
    with FakeJudge(lambda request, nth: good_answer(request).replace("{", "{" + odd, 1)) as fake:
        score(refvie, fake, "--controls", 0)
        path = refvie / "out" / "answers.jsonl"
        path.write_bytes(path.read_bytes() + '{"event": "é'.encode()[:-1])
        score(refvie, fake, "--controls", 0)
        assert len(fake.requests) == 3 and "\u2028" in json.loads(path.read_text(errors="replace").split("\n")[-3])["raw"]


def test_an_answer_missing_among_repeats_is_missing_and_no_mean_is_given(refvie):
    say = lambda request, nth: "No." if "number 1" in request["item"] and nth else good_answer(request)
    with FakeJudge(say) as fake:
        run = lambda *more: score(refvie, fake, "--controls", 0, "--repeats", 2, "--retries", 0, *more)
        with pytest.raises(SystemExit, match="1 of 3 items lack a result"):
            run()
        assert "## Missing" in (refvie / "out" / "refvie.md").read_text()
        run("--allow-missing")
        assert "4.00 [4.00, 4.00] (1 missing)" in (refvie / "out" / "refvie.md").read_text()


def test_a_key_that_a_server_repeats_is_hidden_before_its_text_is_cut(refvie, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-" + "k" * 400)
    with FakeJudge(lambda request, nth: ("status", 413, {})) as fake, pytest.raises(SystemExit):
        score(refvie, fake, "--controls", 0)
    assert "HTTP 413" in (refvie / "out" / "answers.jsonl").read_text()
    assert "kkkk" not in (refvie / "out" / "answers.jsonl").read_text()


@pytest.mark.parametrize("text, says", [("item,q\n0,nan\n", "not a number"), ("item,q\n0,1,2\n", "more fields"), ('item,q\n0,1\n"1,3\n2,5\n', "people.csv"),
                                        ("item,q\nx,1\n", "none of its items")])  # fmt: skip
def test_human_scores_are_read_before_the_judge_is_paid(refvie, text, says):
    (refvie / "people.csv").write_text(text)
    with FakeJudge() as fake, pytest.raises(SystemExit, match=says):
        score(refvie, fake, "--human", refvie / "people.csv")
    assert not fake.requests


def seeing(refvie):
    """A judge with eyes: it knows the copy, the wrong reference and shuffled frames by their bytes."""
    def say(request, nth):
        number = re.search(r"number (.)", request["item"])[1]
        media = [base64.b64decode(p["inlineData"]["data"]) for p in request["parts"] if "inlineData" in p]
        ref, source, edit = media
        if edit == source or ref != (refvie / f"{number}.png").read_bytes():
            return good_answer(request, (1, 1, 1))
        return good_answer(request, (5, 5, 5) if edit in [p.read_bytes() for p in (refvie / "edits").iterdir()] else (5, 1, 1))

    return say


def test_known_answers_hold_for_a_judge_with_eyes_and_not_for_a_blind_one(refvie, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    for out, say, held in (("seeing", seeing(refvie), 2), ("blind", lambda request, nth: good_answer(request, (5, 5, 5)), 0)):
        with FakeJudge(say) as fake:
            score(refvie, fake, "--controls", 2, judge_="gemini-x", out=out)
        text = (refvie / out / "refvie.md").read_text()
        table = text[text.index("Controls of the judge") : text.index("## Metrics")]
        assert re.findall(r"\| (\d) \| (\d) \|", table) == [(str(held), "2")] * 3
    with FakeJudge(lambda request, nth: good_answer(request, (1, 1, 1))) as fake:
        score(refvie, fake, "--controls", 2, judge_="gemini-x", out="strict")
    table = (refvie / "strict" / "refvie.md").read_text()  # what has 1 already cannot fall: neither held nor failed
    assert re.findall(r"scores? lower .*\| (\d) \| (\d) \| (\d) \| (\d) \|", table) == [("0", "0", "2", "0")] * 2


def test_repeats_give_a_spread_and_human_scores_a_correlation(refvie):
    (refvie / "people.csv").write_text("item,quality\n0,1\n1,3\n2,5\n")
    say = lambda request, nth: good_answer(request, [int(re.search(r"number (.)", request["item"])[1]) + 1 + nth % 2] * 3)
    with FakeJudge(say) as fake:
        score(refvie, fake, "--repeats", 2, "--controls", 0, "--human", refvie / "people.csv")
    text = (refvie / "out" / "refvie.md").read_text()
    assert "mean over items: 0.71" in text and "| quality | mean score | 3 | 1.00 | 1.00 |" in text


@pytest.mark.parametrize("taste, expected", [("first", "| 0 | 0 | 3 | 3 | 3 |"), ("red", "| 3 | 0 | 0 | 0 | 3 |")])
def test_comparison_counts_a_win_only_in_both_orders(refvie, monkeypatch, taste, expected):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    (refvie / "other").mkdir()
    for path in (refvie / "edits").iterdir():
        write_video(refvie / "other" / path.name, smooth_clip(GREEN, len(read_clip(path).frames)), 4)

    def say(request, nth):
        videos = [base64.b64decode(p["inlineData"]["data"]) for p in request["parts"] if "videoMetadata" in p]
        red = [p.read_bytes() for p in (refvie / "edits").iterdir()]
        return json.dumps({"winner": "1" if taste == "first" or videos[1] in red else "2"})

    with FakeJudge(say) as fake:
        judge.main(["compare", "--bench", "refvie", str(refvie / "bench.yaml"), str(refvie / "edits"), str(refvie / "other"),
                    "--judge", "gemini-x", "--endpoint", fake.url, "--out", str(refvie / "out")])  # fmt: skip
    assert expected in (refvie / "out" / "refvie_compare.md").read_text()
    next((refvie / "other").iterdir()).unlink()
    with pytest.raises(SystemExit, match="1 of 3 pairs are incomplete"):
        judge.main(["compare", "--bench", "refvie", str(refvie / "bench.yaml"), str(refvie / "edits"), str(refvie / "other"),
                    "--out", str(refvie / "out")])  # fmt: skip
    text = (refvie / "out" / "refvie_compare.md").read_text()
    assert "| edit_strength |  | - (1 missing) |" in text and "missing: " in text[text.index("## Missing") :]


def test_a_missing_and_a_broken_edit_are_counted_and_shown(refvie, capsys):
    edits = sorted((refvie / "edits").iterdir())
    (refvie / "1.png").write_bytes(b"no picture")
    edits[0].unlink()
    edits[1].write_bytes(edits[1].read_bytes()[:100])
    arguments = ["score", "--bench", "refvie", str(refvie / "bench.yaml"), "--edits", str(refvie / "edits"), "--out", str(refvie / "out"),
                 "--endpoint", "https://me:p%40ss@host/v1?key=s3cret"]  # fmt: skip
    with pytest.raises(SystemExit, match="2 of 3 items lack a result"):
        judge.main(arguments)
    text = (refvie / "out" / "refvie.md").read_text()
    assert "p%40ss" not in text and "s3cret" not in text and "missing: " in text and "unreadable: " in text and "| background | 1 of 1 |" in text
    assert "| subject | 0 of 2 | - (2 missing)" in text
    page = (refvie / "out" / "refvie.html").read_text()
    assert "data:image/jpeg;base64," in page and not re.search(r'(src|href)="(?!data:)', page)


def test_a_folder_of_edits_that_is_not_there_replaces_no_report(refvie, tmp_path):
    (tmp_path / "refvie.md").write_text("good")
    (tmp_path / "refvie_compare.md").write_text("good")
    bench, out = ["--bench", "refvie", str(refvie / "bench.yaml")], ["--judge", "metrics", "--out", str(tmp_path)]
    for words in (["score", *bench, "--edits", "nope", *out], ["compare", *bench, str(refvie / "edits"), "nope", *out]):
        with pytest.raises(SystemExit, match="nope: no such folder of edits"):
            judge.main(words)
    assert [(tmp_path / name).read_text() for name in ("refvie.md", "refvie_compare.md")] == ["good", "good"]


def test_averages_of_the_released_score_files_are_theirs_and_ours_are_equal_where_the_rule_was_kept(tmp_path, capsys):
    answer = "Brief reasoning: fine.\nInstruction Compliance: {}\nVisual Quality & Stability: {}\nConsistency & Detail Fidelity: {}"
    rows = [("global_style", (4, 3, 2)), ("global_style", (5, 5, 5)), ("local_add", (2, 2, 1))]
    line = lambda task, s: json.dumps({"scores": list(s), "prompt": "p", "edited_type": task, "result": answer.format(*s)})
    path = tmp_path / "openve_g_score.jsonl"
    path.write_text("\n".join(line(*row) for row in rows))
    judge.main(["averages", str(path)])
    text = capsys.readouterr().out
    assert "| global_style | 4.0000 | 4.00 [" in text and "| local_add | 1.6667 | 1.67 |" in text
    assert "| mean of the tasks | 2.8333 | 2.83 |" in text and "| mean of all scores | 3.2222 | 3.22 [" in text
    named = "Physical Integration & Tracking: 1\nIdentity Consistency & Compliance: 3\nTemporal Consistency & Texture Fidelity: 2"
    path.write_text(json.dumps({"scores": [1, 3, 2], "result": named, "subtask": "subject", "meta_info": {}}))
    judge.main(["averages", str(path)])
    assert "| subject | 2.0000 | 2.00 | 1 | 0 | 0 |" in capsys.readouterr().out  # by name: nothing was broken
    path.write_text(line("local_add", (2, 5, 1)))
    judge.main(["averages", str(path)])
    assert "| local_add | 2.6667 | 1.67 | 1 | 0 | 1 |" in capsys.readouterr().out


def test_benchmarks_are_read_in_their_own_formats_and_lead_nowhere_else(tmp_path, capsys):
    rows = "original_video,prompt,edited_type\nvideos/a.mp4,Add a hat.,local_add\nvideos/b.mp4,Zoom in.,camera_edit\n"
    (tmp_path / "b.csv").write_text(rows)
    (item,) = judge.read_bench("openve", tmp_path / "b.csv", "edits")
    assert (item.edit, item.task, item.source) == (Path("edits/a_edited.mp4"), "local_add", tmp_path / "videos/a.mp4")
    (tmp_path / "i.json").write_text('{"12": {"id": "animal/7.jpg", "prompt": "Add a hat.", "edit_type": "add"}}')
    assert judge.read_bench("imgedit", tmp_path / "i.json", "edits")[0].edit == Path("edits/add/127.jpg")
    (tmp_path / "b.csv").write_text(rows.replace("videos/a", f"{tmp_path.name}/videos/a"))  # as published
    (tmp_path / "videos").mkdir()
    (tmp_path / "blob").touch()
    (tmp_path / "videos/a.mp4").symlink_to("../blob")  # as the hub's cache has it
    (item,) = judge.read_bench("openve", tmp_path / "b.csv", "edits")
    assert item.source == tmp_path / "videos/a.mp4"
    (tmp_path / "b.csv").write_text(rows.replace("b.mp4,Zoom in.,camera_edit", "a.mp4,Zoom in.,local_add"))
    assert len(judge.read_bench("openve", tmp_path / "b.csv", "edits")) == 2
    assert "share the edit a_edited.mp4" in capsys.readouterr().err
    (tmp_path / "b.csv").write_text(rows.replace("videos/a", "../a"))
    with pytest.raises(ValueError, match="is outside of"):
        judge.read_bench("openve", tmp_path / "b.csv", "edits")
    with pytest.raises(judge.JudgeError, match="right"):
        judge.read_bench("refvie", tmp_path / "i.json", "edits")


def test_run_makes_the_edits_under_the_released_names_each_once_and_in_shards(refvie, small_weights, monkeypatch, capsys):
    arguments = ["run", "--bench", "refvie", str(refvie / "bench.yaml"), "--weights", str(small_weights), "--edits",
                 str(refvie / "new"), "--steps", "1", "--device", "cpu"]  # fmt: skip
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        judge.main(arguments)
    made = sorted((refvie / "new").glob("*.mp4"))
    assert [path.name for path in made] == sorted(path.name for path in (refvie / "edits").iterdir())
    with av.open(str(made[0])) as small:
        assert small.streams.video[0].pix_fmt == "yuv444p"  # so that the metrics see the model and not the codec
    judge.main(arguments)
    assert "0 of 1 edits to make" in capsys.readouterr().out
    rows = "original_video,prompt,edited_type\n" + "".join(f"{made[0]},Add a hat{end},local_add\n" for end in ".!")
    (refvie / "new" / "twice.csv").write_text(rows.replace(f"{made[0].parent}/", ""))
    monkeypatch.delenv("RANK")  # and WORLD_SIZE alone is not torchrun's
    twice = ["run", "--bench", "openve", str(refvie / "new/twice.csv"), *arguments[4:6], "--edits", str(refvie / "twice"), *arguments[8:]]
    judge.main(twice)
    judge.main(["run", *twice[1:]])
    said = capsys.readouterr()
    assert said.out.count("_edited.mp4") == 1 and "of the first" in said.err
    judge.main([*arguments, "--edits", str(refvie / "plain"), "--no-ref"])
    assert len(list((refvie / "plain").glob("*.mp4"))) == len(made)
    assert not torch.equal(read_clip(refvie / "plain" / made[0].name).frames, read_clip(made[0]).frames)
    with pytest.raises(SystemExit, match="edits are there of seed 0, not 1; give another --edits"):
        judge.main([*arguments, "--seed", "1"])
    with pytest.raises(SystemExit, match="edits are there of ref_guidance 1.0, not 1.5; give another --edits"):
        judge.main([*arguments, "--ref-guidance", "1.5"])
    other = Path(shutil.copytree(small_weights, refvie / "weights"))
    on_other = [word.replace(str(small_weights), str(other)) for word in [*arguments, "--edits", str(refvie / "others")]]
    judge.main(on_other)
    dit = load_file(other / "dit.safetensors")
    save_file({name: tensor + 1 for name, tensor in dit.items()}, other / "dit.safetensors")
    with pytest.raises(SystemExit, match="edits are there of files .*; give another --edits"):
        judge.main(on_other)  # the same folder, with other weights in it
    (refvie / "new" / "run.json").unlink()
    with pytest.raises(SystemExit, match="no .*run.json says whose edit it is"):
        judge.main(arguments)
    with pytest.raises(SystemExit, match="--device cuda:9: not available here"):
        judge.main([*arguments, "--device", "cuda:9"])


@demo
def test_metrics_rank_real_edits_above_the_copy_and_a_wrong_reference(tmp_path):
    path = SHARED / "demo" / "refvie_bench.yaml"
    args = ["score", "--bench", "refvie", str(path), "--edits", str(SHARED / "demo" / "edits" / "refvie"), "--out", str(tmp_path)]
    judge.main(args)
    text = (tmp_path / "refvie.md").read_text()
    held = {what: int(n) for what, n in re.findall(r"\| (reference_gain[^|]*) \| (\d) \| 6 \|", text)}
    assert len(held) == 2 and all(n >= 5 for n in held.values())


def tiny_local_judge(folder, kind):
    """A folder with a random Qwen2.5-VL or Qwen3-VL of some 100,000 weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    write_qwen_folder(folder)
    tokenizer = judges.json.loads((folder / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {f"{n}_token_id": ids[f"<|{n}|>" if n.startswith("vision") else f"<|{n}_pad|>"]
               for n in ("vision_start", "vision_end", "image", "video")}  # fmt: skip
    text = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
                vocab_size=max(ids.values()) + 1, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4})  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    if kind == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, **special)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        extra = dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
        config = Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config={**vision, **extra}, **special)
        model = Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fps, expected", [(1, [0, 1, 2, 3]), (4, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]), (99, 28)])
def test_frames_for_a_judge_stand_where_its_frame_rate_says(tmp_path, fps, expected):
    write_video(tmp_path / "v.mp4", smooth_clip(BLUE, 28, 32), 8)
    frames, seconds = judges.sampled_frames(tmp_path / "v.mp4", fps)
    assert len(frames) == len(seconds) == (28 if fps == 99 else len(expected) if fps == 1 else 14)
    assert fps == 99 or seconds[: len(expected)] == expected


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_local_judge_numbers_and_generates_as_transformers_does(tmp_path, kind):
    write_image(tmp_path / "ref.png", smooth_clip(RED)[0])
    write_video(tmp_path / "v.mp4", smooth_clip(BLUE), 4)
    folder = tiny_local_judge(tmp_path / "judge", kind)
    ours = judges.Local(folder, judge.parse_arguments(["score", "x", "--bench", "refvie", "--edits", "x", "--max-tokens", "8", "--device", "cpu"]))
    media = [("Reference image", tmp_path / "ref.png"), ("Edited video", tmp_path / "v.mp4")]
    ids, positions, pixels = ours.prepare("Judge it.", media, 4.0)
    frames = judges.sampled_frames(tmp_path / "v.mp4", 4.0)[0]
    seen = pixels["pixel_values_videos"].reshape(4, 2, 2, 2, 2, 3, 2, ours.patch, ours.patch).permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    seen = seen.reshape(8, 4 * ours.patch, 4 * ours.patch, 3) * torch.tensor(ours.std) + torch.tensor(ours.mean)
    assert (seen * 255 - F.interpolate(frames.permute(0, 3, 1, 2).float(), seen.shape[1:3]).permute(0, 2, 3, 1)).abs().mean() < 6
    kinds = torch.zeros_like(ids)
    kinds[ids == ours.token("<|image_pad|>")], kinds[ids == ours.token("<|video_pad|>")] = 1, 2
    if kind == "qwen3_vl":  # transformers numbers what follows a Qwen2.5-VL video otherwise than it was trained (FACTS.md)
        theirs = ours.mllm.model.get_rope_index(ids, kinds, pixels["image_grid_thw"], pixels["video_grid_thw"])[0]
        assert torch.equal(positions, theirs)
        expected = ours.mllm.generate(ids, mm_token_type_ids=kinds, **pixels, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        expected = [t for t in expected.tolist() if t not in ours.ends]
        assert ours.ask("Judge it.", media, 4.0).text == ours.tokenizer.decode(expected)
    else:
        grid = pixels["video_grid_thw"][0].tolist()
        video = positions[0, 0][kinds[0] == 2]
        assert video.unique().diff().tolist() == [1] * (grid[0] - 1)  # 2 positions a second, 4 frames a second, 2 a step
        assert ours.ask("Judge it.", media, 4.0).tokens_in == ids.shape[1]


def test_an_item_s_average_is_over_its_criteria_and_the_overall_over_the_tasks():
    told = [("0", "subject", (5, 4, 3)), ("1", "subject", (3, 1, 2)), ("2", "background", (2, 1, 0))]
    rows = []
    for key, task, scores in told:
        answer = dict(zip(judge.REFERENCE_TASKS[task][1], scores))
        rows.append(judge.Row(judge.Item(key, task, "x", None, None), answers=[answer]))
    by_task, overall = judge.score_means("refvie", rows, False)
    assert by_task["subject"]["average"].value == 3 and overall.value == 2


def test_compared_metrics_are_the_first_less_the_second_and_columns_are_those_published():
    pairs = [tuple(judge.Row(None, metrics=dict.fromkeys(metrics.METRICS) | {"flicker": value}) for value in (3.0, 1.0))]
    assert [str(cell) for cell in judge.paired_metrics(pairs, 0, True)[2][1][2:]] == ["2.00", "1", "1"]
    by_task = dict.fromkeys(("local_add", "global_style"))
    assert judge.published_cells("openve", by_task, (1, 2, 3, 4, 5, 3)) == ["5.00", "1.00", "-"]


def test_a_wrong_reference_is_another_one_of_the_same_task_first():
    told = [("subject", "vae.py"), ("background", "dit.py"), ("subject", "vae.py"), ("subject", "data.py")]
    items = [judge.Item(str(i), task, "x", None, None, HOUSE / ref) for i, (task, ref) in enumerate(told)]
    assert [path.name for path in judge.wrong_references(items, items[0])] == ["data.py", "dit.py"]


def test_run_edits_the_benchmark_with_the_seed_and_guidance_asked_for(refvie, small_weights, monkeypatch):
    asked = []
    monkeypatch.setattr(KiwiEdit, "edit", lambda self, frames, *rest, **more: asked.append((len(frames), more["seed"], more["ref_guidance"])) or frames)
    words = ["run", "--bench", "refvie", refvie / "bench.yaml", "--weights", small_weights, "--edits", refvie / "new"]
    judge.main([str(word) for word in (*words, "--seed", 7, "--ref-guidance", 2, "--limit", 1, "--device", "cpu")])
    assert asked == [(5, 7, 2)]


def test_edit_strength_is_in_levels_and_the_area_a_share():
    source = torch.zeros(2, 3, 16, 16)
    edit = source.clone()
    edit[..., :8] = 51 / 255
    measured = metrics.measure(source, edit)
    assert measured["edit_strength"] == pytest.approx(25.5) and measured["edited_area"] == 0.5


def test_what_gemini_only_thinks_is_no_answer():
    parts = [{"text": "perhaps 5", "thought": True}, {"text": "4"}]
    reply = {"candidates": [{"content": {"parts": parts}}], "usageMetadata": {"promptTokenCount": 900, "candidatesTokenCount": 9}}
    assert judges.Gemini.reply(None, reply).text == "4"


def test_what_a_judge_thinks_aloud_is_not_its_answer_and_a_winner_is_one():
    draft, final = ('{"quality": %d, "consistency": %d}' % (score, score) for score in (5, 1))
    thought = "Let me see. " * 2000
    for text in (draft + thought + final, f"<think>{draft}</think>\nQuality: 1\nConsistency: 1"):
        assert judges.read_answer(text, ("quality", "consistency")) == {"quality": 1, "consistency": 1}
    assert judges.read_winner("**Winner:** 2 (sharper)") == {"winner": "2"} and judges.read_winner('{"winner": "tie"}') == {"winner": "tie"}
    assert judges.read_winner(f"Winner: 1. {thought} Winner: 2") == {"winner": "2"}
    assert judges.read_reason('<think>{"reasoning": "none"}</think>{"reasoning": "a hat"}') == "a hat"
    for text in ('{"winner": "1 or 2"}', '{"winner": "1/2"}', "winner: 1 and 2 are equal"):
        with pytest.raises(judges.Malformed):
            judges.read_winner(text)


def test_a_refusal_of_one_request_is_no_refusal_of_the_key():
    fake = FakeJudge(lambda request, nth: ("status", 403, {}))
    body = {"messages": [{"content": "Judge."}, {"content": []}]}
    for trusted, error in ((False, judges.Barred), (True, judges.Unusable)):
        with pytest.raises(error, match="HTTP 403"):
            judges.post(f"{fake.url}/chat/completions", {}, body, 10, trusted=trusted)


def test_frames_closer_than_a_position_share_it():
    _, positions = judges.Local.lay_out(None, [[1, 2], (7, (4, 2, 2), 0.5)])
    assert positions[0, 0].tolist() == [0, 1, 2, 2, 3, 3]


# ------------------------------------------------------------------------------------------------ curate.py


def curated(data, out, *more, tables=("ref_video.csv", "video.csv", "image.csv")):
    """Curate the small world's pairs, shards of 5 -> the records of the last stage."""
    curate.main([*map(str, [*(data / name for name in tables), "--out", out, "--min-side", 8, "--shard-rows", 5, *more])])
    return records_in(out)


def records_in(out, stage="deduplicate"):
    return [row for path in sorted((Path(out) / "ledger" / stage).glob("*.jsonl")) for row in curate.read_json_lines(path)]


@pytest.fixture(scope="session")
def quadruplets(tmp_path_factory, nano_data):
    out = tmp_path_factory.mktemp("curate") / "out"
    curated(nano_data, out)
    return out


def test_pairs_become_quadruplets_that_training_reads(quadruplets, nano_data):
    rows = records_in(quadruplets)
    kept = [row for row in rows if row["status"] == "kept"]
    assert len(rows) == 16 and len(kept) >= 4 and {row["kind"] for row in kept} == {"subject", "background"}
    assert all(row["reason"] and row["stage"] in curate.STAGES for row in rows if row["status"] != "kept")
    common = os.path.commonpath([quadruplets, nano_data])
    table = read_table(quadruplets / "ref_video.csv", "ref", common)
    assert [Path(row.ref) for row in table] == [quadruplets / row["ref_image"] for row in kept]
    assert all(data.read_reference(row.ref).shape[0] >= 8 and not data.check_row(row)[1] for row in table)
    page = (quadruplets / "page.html").read_text()
    assert page.count('class="card"') == len(kept) and not re.search(r'(src|href)="(?!data:)', page) and "%(" not in page
    assert f"| deduplicate | {len(kept)} |" in (quadruplets / "funnel.md").read_text()


def test_refvie_s_parquet_holds_the_references(quadruplets, nano_data):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    kept = [row for row in records_in(quadruplets) if row["status"] == "kept"]
    table = read_table(quadruplets / "refvie.parquet", "ref", nano_data)
    for row, record in zip(table, kept, strict=True):
        assert torch.equal(data.read_reference(row.ref), read_image(quadruplets / record["ref_image"]))


def test_classical_models_find_what_was_edited(nano_data):
    things, pixels, psnr, (precision, recall) = (
        [float(x) for x in re.findall(r"[\d.]+", line.split("|")[-2])] for line in curate.measure_on_truth(nano_data).splitlines()[2:]
    )
    assert things[0] > 0.7 and things[1] > 0.8 and pixels[0] > 0.6 and pixels[1] > 0.65 and psnr[0] > 20 and precision == recall == 1


def test_a_ledger_read_again_takes_other_thresholds_and_asks_no_model(tmp_path, quadruplets, monkeypatch):
    for work in ("setup", "score", "ground", "synthesize", "verify", "embed"):
        monkeypatch.setattr(curate.Classical, work, None)
    scores = sorted(row["edit_score"] for row in records_in(quadruplets, "verify") if row["status"] == "open")
    rows = curated(quadruplets, tmp_path / "strict", "--min-ref-score", scores[-1], tables=["ledger/verify"])
    kept = [row for row in rows if row["status"] == "kept"]
    assert 0 < len(kept) == scores.count(scores[-1])
    small = curated(quadruplets, tmp_path / "large", "--min-side", 2000, tables=["ledger/verify"])
    assert any("a side below 2000" in row.get("reason", "") for row in small) and not any(row["status"] == "kept" for row in small)
    with pytest.raises(ValueError, match="features of --models classical"):
        curated(quadruplets, tmp_path / "mixed", "--models", "paper", tables=["ledger/verify"])
    assert all((tmp_path / "strict" / row["ref_image"]).is_file() for row in kept)
    again = curated(quadruplets, tmp_path / "strict", "--min-ref-score", scores[-1], tables=["ledger/verify"])
    assert again == rows
    with pytest.raises(ValueError, match="was made with min_score 6.0, not 7.0: give another --out"):
        curated(quadruplets, tmp_path / "strict", "--min-ref-score", scores[-1], "--min-score", 7, tables=["ledger/verify"])


def test_what_failed_in_another_run_is_not_asked_again_when_its_ledger_is_read(tmp_path, quadruplets, monkeypatch):
    monkeypatch.setattr(curate.Classical, "setup", None)
    shutil.copytree(quadruplets, tmp_path / "first")
    path = min((tmp_path / "first" / "ledger" / "verify").glob("*.jsonl"))
    row, *rows = curate.read_json_lines(path)
    row = {key: value for key, value in row.items() if key not in ("edit_score", "frame_scores")}
    curate.write_json_lines(path, [row | {"status": "failed", "stage": "score", "reason": "no memory"}, *rows])
    found = curated(tmp_path / "first", tmp_path / "second", tables=["ledger/verify"])
    assert [row["reason"] for row in found if row["status"] == "failed"] == ["no memory"] and not found[0].get("tuning")
    monkeypatch.undo()
    again = curated(tmp_path / "first", tmp_path / "second", "--retry-failed", tables=["ledger/verify"])
    assert not any(row["status"] == "failed" for row in again) and again[0]["edit_score"] > 0


def test_bad_pairs_cost_only_themselves_and_can_be_tried_again(tmp_path, nano_data, quadruplets, capsys):
    for file in ("ref_video.csv", "ref_video"):
        (tmp_path / file).symlink_to(nano_data / file) if file == "ref_video" else shutil.copy(nano_data / file, tmp_path)
    shutil.copytree(nano_data / "ref_video", tmp_path / "clips")
    lines = (tmp_path / "ref_video.csv").read_text().replace("ref_video/", "clips/").splitlines()
    broken = sorted((tmp_path / "clips").glob("*_tgt.mp4"))[0]
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    (tmp_path / "p.csv").write_text("\n".join([*lines, "clips/none.mp4,clips/none.mp4,Add a hat.,x", "../a.mp4,b.mp4,Add a hat.,x", "a,b,,x"]))
    rows = curated(tmp_path, tmp_path / "out", tables=["p.csv"])
    reasons = [row["reason"] for row in rows if row["status"] == "failed"]
    assert len(reasons) == 4 and len([row for row in rows if row["status"] == "kept"]) >= 1
    for reason, words in zip(reasons, ("has no pictures", "no such file", "is outside of", "prompt is empty")):
        assert words in reason
    before = records_in(tmp_path / "out")
    broken.write_bytes(content)
    after = curated(tmp_path, tmp_path / "out", "--retry-failed", tables=["p.csv"])
    healed = [new for old, new in zip(before, after) if old["status"] == "failed" != new["status"]]
    assert len(healed) == 1 and broken.name in healed[0]["tgt_video"]


def test_odd_lines_of_a_table_cost_only_themselves_and_odd_fields_nothing(tmp_path, nano_data, quadruplets):
    good = {key: line[key] for line in [next(csv.DictReader((nano_data / "ref_video.csv").open()))] for key in data.COLUMNS["video"]}
    odd = {"edit_type": 7, "frames": "9", "edit_score": "high", "mask": "/etc/passwd", "ref_image": b"".hex(), "verdict": "yes"}
    made = {"edit_score": 9.5, "box": [0, 0, 1, 1], "key": 0, "mask": "masks/x.png", "ref_image": "/etc/passwd", "verdict": True, "feature": "AAAA"}
    lines = [json.dumps(good | odd), "{half", "[]", json.dumps(good | {"prompt": ["x"]}), json.dumps(good | made),
             json.dumps(good | {"edit_score": 10**400}), json.dumps(good | {"prompt": "half \ud83d"})]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows = curated(tmp_path, tmp_path / "out", "--base-path", nano_data, "--duplicate", 1, tables=["p.jsonl"])
    assert [row["status"] == "failed" for row in rows] == [False, True, True, True, False, False, True]
    first = next(row for row in records_in(quadruplets) if row["src_video"] == good["src_video"])
    assert [row["edit_score"] for row in rows if "edit_score" in row] == [first["edit_score"], 9.5, first["edit_score"]]
    assert "passwd" not in (tmp_path / "out/ref_video.csv").read_text()
    shutil.copytree(tmp_path / "out/ledger", tmp_path / "theirs/ledger")
    shard = tmp_path / "theirs/ledger/verify/00000.jsonl"
    shard.write_text(re.sub(r"masks/[^\"]*", "../../secret.png", shard.read_text()))
    with pytest.raises(ValueError, match="line 1: ../../secret.png is outside of"):
        curated(tmp_path, tmp_path / "again", tables=["theirs/ledger/verify"])


def test_a_run_that_is_barred_keeps_what_was_answered_and_asks_it_no_more(tmp_path, nano_data, monkeypatch):
    asked, score = [], curate.Classical.score

    def barred_at_the_fourth(models, source, target, row):
        asked.append(row["id"])
        if len(asked) == 4:
            raise curate.Barred("the key is refused")
        return score(models, source, target, row)

    monkeypatch.setattr(curate.Classical, "score", barred_at_the_fourth)
    with pytest.raises(curate.Barred):
        curated(nano_data, tmp_path / "out", "--workers", 1, "--shard-rows", 100)
    curated(nano_data, tmp_path / "out", "--workers", 1, "--shard-rows", 100)
    assert asked.count(asked[3]) == 2 and len(asked) == len(set(asked)) + 1


def test_a_full_disk_stops_the_run_and_fails_no_record(tmp_path, nano_data, monkeypatch):
    def full(path, image):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise MediaError(f"{path}: cannot be written") from None

    monkeypatch.setattr(curate, "write_image", full)
    with pytest.raises(MediaError, match="cannot be written"):
        curated(nano_data, tmp_path / "out")
    monkeypatch.undo()
    assert not any(row["status"] == "failed" for row in curated(nano_data, tmp_path / "out"))


def test_a_ledger_is_an_input_only_where_its_stage_is_whole_and_what_failed_stays_so(tmp_path, nano_data, quadruplets, monkeypatch):
    theirs = Path(shutil.copytree(quadruplets, tmp_path / "theirs"))
    shard = theirs / "ledger/verify/00000.jsonl"
    rows = list(curate.read_json_lines(shard))
    number = next(i for i, row in enumerate(rows) if row["status"] == "open")
    rows[number] = curate.ended(rows[number], "verify", "failed", "no answer") | {"verdict": None}
    curate.write_json_lines(shard, rows)
    before = records_in(theirs, "verify")
    kept = curated(theirs / "ledger", tmp_path / "again", tables=["verify"])
    assert (kept[number]["status"], kept[number]["reason"]) == ("failed", "no answer") and len(kept) == len(before)
    assert curated(theirs / "ledger", tmp_path / "asked", "--retry-failed", tables=["verify"])[number]["status"] == "kept"
    last = sorted(shard.parent.iterdir())[-1]
    last.unlink()
    with pytest.raises(ValueError, match="that stage is not done"):
        curated(theirs / "ledger", tmp_path / "part", tables=["verify"])
    with pytest.raises(ValueError, match="ledger/synthesize as its input keeps what was paid for"):
        curated(nano_data, theirs, "--min-ref-score", 9)


@pytest.mark.parametrize("line, says", [("a.mp4,b.mp4,Replace it, then leave", "line 3: more fields"), ('a.mp4,b.mp4,"Add a hat', "a quote not closed")])
def test_a_table_that_csv_would_misread_is_refused(tmp_path, line, says):
    (tmp_path / "p.csv").write_text(f"src_video,tgt_video,prompt\na.mp4,b.mp4,Add a hat.\n{line}\n")
    with pytest.raises(ValueError, match=says):
        curated(tmp_path, tmp_path / "out", tables=["p.csv"])


def test_json_that_begins_with_a_mark_is_read_and_what_is_broken_is_named(tmp_path):
    table, told, bench = tmp_path / "p.json", tmp_path / "ledger" / "read.json", tmp_path / "b.yaml"
    table.write_text('[{"src_video": "a.mp4"}]', encoding="utf-8-sig")
    assert len(list(curate.read_lines(table))) == 1
    told.parent.mkdir()
    table.write_text("[" * 100_000), told.write_text(""), bench.write_text("- instruction: 2020-13-45")
    for says, read in (
        ("p.json: is not JSON", lambda: list(curate.read_lines(table))), ("read.json: is not JSON", lambda: curate.Ledger(tmp_path).told),
        ("b.yaml: is not YAML", lambda: judge.read_bench("refvie", bench, "edits")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            read()


@pytest.mark.parametrize("name, more, says", [
    ("caf\udce9", (), "its name is no UTF-8 text"), ("in", ("--rejects", "none.json"), "none.json"), ("in", ("--guard", "in"), "broken.png"),
])  # fmt: skip
def test_what_would_spoil_the_result_is_told_of_before_the_work(tmp_path, nano_data, monkeypatch, name, more, says):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    shutil.copy(nano_data / "ref_video.csv", name)
    Path("in").mkdir(exist_ok=True)
    Path("in/broken.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError), match=says):
        curated(Path(name), Path("out"), *more, tables=["ref_video.csv"])
    assert not Path("out/ledger/score").exists()


def test_the_measure_of_scale_runs_the_real_bookkeeping(tmp_path):
    assert "40 records through four stages" in curate.measure_scale(tmp_path, records=40, vectors=30, width=8)


def test_a_key_with_a_line_s_end_is_that_key_and_never_told(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    assert judges.key_of("OPENAI_API_KEY") == "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has a character that no key has") as error:
        curate.open_model("http://127.0.0.1:9/v1", "cpu")
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize("gone_on", [True, False])
def test_a_shard_that_fails_as_a_whole_stops_the_run_and_is_tried_again_when_it_is_mended(tmp_path, nano_data, gone_on):
    pair = next(csv.DictReader((nano_data / "ref_video.csv").open()))
    (tmp_path / "p.csv").write_text("src_video,tgt_video,prompt\n" + "refs/a.mp4,refs/b.mp4,Add a hat.\n" * 20)  # not --out's refs
    with pytest.raises(ValueError, match="all 20 records of a shard failed in `score`.*mend that and add --retry-failed"):
        curated(tmp_path, tmp_path / "out", "--shard-rows", 20, tables=["p.csv"])
    if gone_on:
        with pytest.raises(ValueError, match="not one of 20 records could be worked on"):
            curated(tmp_path, tmp_path / "out", "--shard-rows", 20, tables=["p.csv"])
        assert all(row["status"] == "failed" for row in records_in(tmp_path / "out"))
    (tmp_path / "refs").mkdir()
    for name, key in (("a", "src_video"), ("b", "tgt_video")):
        shutil.copy(nano_data / pair[key], tmp_path / "refs" / f"{name}.mp4")
    rows = curated(tmp_path, tmp_path / "out", "--shard-rows", 20, "--retry-failed", tables=["p.csv"])
    assert len(rows) == 20 and not any(row["status"] == "failed" for row in rows)


def test_a_shard_half_done_is_finished_without_asking_again(tmp_path, nano_data, quadruplets, monkeypatch):
    out = Path(shutil.copytree(quadruplets, tmp_path / "out"))
    whole = out / "ledger/verify/00000.jsonl"
    done = [line for line in whole.read_text().splitlines(True) if json.loads(line).get("passed") == "verify"]
    whole.with_suffix(".part").write_text("".join(done) + "\0\0\n" + '{"id": "00000')  # what died left zeros, and half a line
    whole.unlink(), shutil.rmtree(out / "ledger/deduplicate")
    for work in ("setup", "score", "ground", "synthesize", "verify", "embed"):
        monkeypatch.setattr(curate.Classical, work, None)
    curated(nano_data, out)
    assert done and same_result(out, quadruplets)


def test_a_run_in_which_every_record_fails_ends_in_an_error(tmp_path, nano_data):
    shutil.copy(nano_data / "ref_video.csv", tmp_path / "p.csv")  # away from its clips
    with pytest.raises(ValueError, match="not one of [0-9]+ records could be worked on"):
        curated(tmp_path, tmp_path / "out", tables=["p.csv"])


def test_a_middling_edit_is_for_instruction_tuning_alone_and_a_poor_one_for_nothing(tmp_path, nano_data):
    pair = next(csv.DictReader((nano_data / "ref_video.csv").open()))
    good = {key: pair[key] for key in data.COLUMNS["video"]}
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(good | {"edit_score": s}) for s in (5.9, 6.0, 7.9)))
    rows = curated(tmp_path, tmp_path / "out", "--base-path", nano_data, tables=["p.jsonl"])
    assert [(row["status"], row["tuning"]) for row in rows] == [("rejected", False), ("rejected", True), ("rejected", True)]
    assert len(list(csv.DictReader((tmp_path / "out/video.csv").open()))) == 2


def test_a_score_that_a_table_brings_does_not_make_up_for_a_missing_source(tmp_path, nano_data):
    target = next(csv.DictReader((nano_data / "video.csv").open()))["tgt_video"]
    (tmp_path / "p.csv").write_text(f"src_video,tgt_video,prompt,edit_score\nnone.mp4,{target},Add a hat.,7\n{target},{target},Add a hat.,7\n")
    gone, there = curated(tmp_path, tmp_path / "out", "--base-path", nano_data, tables=["p.csv"])
    assert "none.mp4: no such file" in gone["reason"] and "enough for instruction tuning only" in there["reason"]
    assert len((tmp_path / "out" / "video.csv").read_text().splitlines()) == 2


def test_frames_to_be_scored_correspond_whatever_rate_the_files_claim(tmp_path):
    frames = moving_picture(65, 32, 32)
    for name, fps, count in (("source", 30, 65), ("edit", 15, 61)):  # cut to 4k + 1, as the release does
        write_video(tmp_path / f"{name}.mp4", frames[:count], fps, None, data.EXACT_VIDEO_CODEC)
    source, edit, indices = curate.look_at_pair(tmp_path / "source.mp4", tmp_path / "edit.mp4")
    assert (source - edit).abs().mean() < 0.005 and indices[-1] == 60
    asked = []
    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    models.scorer = None
    models.ask = lambda model, prompt, images, read: asked.append(images) or read('{"score": [20, 20]}')
    assert models.score(tmp_path / "source.mp4", tmp_path / "edit.mp4", {"prompt": "x"}) == [8.0] * 5
    pairs = [images for images in asked if len(images) == 2]
    assert all((p["source"].float() - p["edited"].float()).abs().mean() < 3 for p in pairs)


@pytest.mark.parametrize("edit_type, prompt, kind", [
    ("Local Modification", "x", "subject"), ("Background Replacement", "x", "background"), ("camera_edit", "Replace it.", "other"),
    ("object swap", "Remove the dog.", "remove"), (None, "Make it look like a painting.", "style"),
    (None, "Cut the cat out of the video.", "remove"), (None, "I want a hat on it.", "subject"), (None, "Let it be night.", "style"),
    (None, "Remove the man in front of the shop.", "remove"), (None, "Add a red car in front of the house.", "subject"),
    (None, "Replace the woman behind the counter with a robot.", "subject"), (None, "Delete the dog in the background.", "remove"),
    (None, "Remove the background and show a beach.", "background"), (None, "Move everything in front of a lake.", "background"),
    (None, "Replace her hair with a hair style of the eighties.", "subject"), (None, "Zoom in slowly.", "other"),
    (None, "Add a lamp that blends into the surroundings.", "subject"), (None, "Delete the cat and put a dog there.", "subject"),
    (None, "Replace his coat with a red one, matching the lighting and colours of the environment.", "subject"),
])  # fmt: skip
def test_an_edit_s_kind_is_its_type_where_that_is_known_else_what_its_words_say(edit_type, prompt, kind):
    assert curate.kind_of(edit_type, prompt) == kind


def test_the_kind_of_an_edit_is_told_from_nearly_all_of_the_world_s_wordings():
    fill = {"a": "red car on the left", "b": "a lamp", "w": "at the top", "s": "night", "p": "blue stripes", "clip": "video"}
    for table, least in ((world.WORDINGS, 0.95), (world.HELD_WORDINGS, 1)):
        told = [curate.kind_of(None, w.format(**fill)) == curate.TYPES[task] for task, ws in table.items() for w in ws]
        assert sum(told) >= least * len(told)


def same_result(out, expected):
    """Two runs left the same ledger and pictures, and nothing half done."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.suffix in (".jsonl", ".png", ".part")) for f in (out, expected)]
    return names[0] == names[1] and all((out / name).read_bytes() == (expected / name).read_bytes() for name in names[0])


def start_curate(data, out, *more, **environment):
    tables = [data / name for name in ("ref_video.csv", "video.csv", "image.csv")]
    words = [sys.executable, HOUSE / "curate.py", *tables, "--out", out, "--min-side", 8, "--shard-rows", 5, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def test_runs_that_are_killed_and_resumed_end_as_one_run(tmp_path, nano_data, quadruplets):
    stages = ("score", "ground", "verify")
    for stage in stages:
        process = start_curate(nano_data, tmp_path / "out", "--workers", "1")
        while process.poll() is None and not (tmp_path / "out" / "ledger" / stage).is_dir():
            time.sleep(0.005)
        process.kill()
        process.wait()
    part = tmp_path / "out" / "ledger" / "verify" / "00000.part"
    part.write_bytes(part.read_bytes() + b'{"id": "00000') if part.is_file() else None
    curated(nano_data, tmp_path / "out")
    assert same_result(tmp_path / "out", quadruplets)


def test_two_processes_do_what_one_does(tmp_path, nano_data, quadruplets):
    runs = [start_curate(nano_data, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2") for rank in (1, 0)]
    assert [run.wait(timeout=600) for run in runs] == [0, 0]
    assert same_result(tmp_path / "out", quadruplets)


def test_a_world_size_without_torchrun_is_not_waited_for(tmp_path, nano_data, quadruplets, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(curate, "wait_for", lambda ready, what: ready() or pytest.fail(f"waits for {what}"))
    curated(nano_data, tmp_path / "out")
    assert same_result(tmp_path / "out", quadruplets)


def test_ray_data_does_what_one_process_does(tmp_path, nano_data, quadruplets):
    pytest.importorskip("ray", reason="needs Ray Data: pip install 'ray[data]'")
    run = start_curate(nano_data, tmp_path / "out", "--engine", "ray")
    text = run.communicate(timeout=300)[0].decode()
    assert run.returncode == 0, text[-2000:]
    assert same_result(tmp_path / "out", quadruplets)


def test_a_person_s_rejects_and_a_benchmark_s_pictures_leave_the_result(tmp_path, nano_data, quadruplets):
    kept = [row["id"] for row in records_in(quadruplets) if row["status"] == "kept"]
    out = shutil.copytree(quadruplets, tmp_path / "out")
    (tmp_path / "rejects.json").write_text(json.dumps({kept[0]: "torn"}))
    curated(nano_data, out, "--rejects", tmp_path / "rejects.json")
    table = list(csv.DictReader((out / "ref_video.csv").open()))
    assert len(table) == len(kept) - 1 and "| person | rejected | torn | 1 |" in (out / "funnel.md").read_text()
    assert f'out={{"{kept[0]}": "torn"}}' in (out / "page.html").read_text()  # saved again with what comes to it
    tuned = lambda folder: sum(len((folder / name).read_text().splitlines()) - 1 for name in ("video.csv", "image.csv"))
    assert tuned(out) == tuned(quadruplets) - 1
    (tmp_path / "bench/b").mkdir(parents=True)
    shutil.copy(quadruplets / "refs" / kept[1][:-3] / f"{kept[1]}.png", tmp_path / "bench" / "theirs.png")
    write_image(tmp_path / "bench/b/theirs.png", torch.zeros(64, 64, 3, dtype=torch.uint8))  # of the same name
    rows = curated(nano_data, tmp_path / "guarded", "--guard", tmp_path / "bench", tables=["ref_video.csv"])
    assert [row["id"] for row in rows if "resembles theirs.png of the benchmark" in row.get("reason", "")] == [kept[1]]
    assert not any(row["tuning"] for row in rows if row["id"] == kept[1])


def test_duplicates_go_only_where_they_are_close_to_one_that_is_kept():
    angle = torch.arange(40) * 0.1 + 0.02 * torch.rand(40)  # a chain: neighbours 0.995 alike, its ends not at all
    chain = torch.stack([angle.cos(), angle.sin()], dim=1)
    order = np.random.default_rng(0).permutation(40)
    expected, kept = np.arange(40), []
    for i in order:
        near = max(kept, key=lambda k: float(chain[i] @ chain[k]), default=None)
        if near is not None and float(chain[i] @ chain[near]) > 0.99:
            expected[i] = near
        else:
            kept.append(i)
    for block in (3, 7, 64):
        belongs, nearest = curate.deduplicate(chain, order, 0.99, block)
        assert np.array_equal(belongs, expected)
        assert all((nearest[i] > 0.99) == (belongs[i] != i) for i in range(40))
    assert 10 < len(kept) < 40


GOOD_BOX, WHOLE_BOX = '{"bbox_2d": [100, 200, 500, 800], "label": "a red car"}', '{"bbox_2d": [0, 0, 1000, 1000]}'


@pytest.mark.parametrize("answer, box", [
    (f"[{GOOD_BOX}]", "a red car"), (f"```json\n[{GOOD_BOX}]\n```", "a red car"), (f"Here: {GOOD_BOX} and so on", "a red car"),
    ("[" + f"{GOOD_BOX}, " * 30 + '{"bbox_2d": [100, 2', "a red car"), ('[{"bbox_2d": [100, 200, 500, 800]}]', "object"),
    ("{'bbox': [100.0,200.0,500.0,800.0]}", "object"), (f'[{{"bbox_2d": [1, 1, 50, 60]}}, {GOOD_BOX}]', "a red car"),
    (GOOD_BOX.replace("a red car", "the man's hat"), "the man's hat"), ('[{"label": "a dog", "bbox_2d": [100, 200, 500, 800]}]', "a dog"),
    ("[]", curate.Rejected), ("I see no car.", curate.Malformed), ('[{"bbox_2d": [500, 200, 100, 800]}]', curate.Rejected),
    (f"[{WHOLE_BOX}]", curate.Rejected), ('[{"bbox_2d": [10, 10, 12, 12]}]', curate.Rejected), ('{"bbox_2d": [1, 2, 3]}', curate.Malformed),
])  # fmt: skip
def test_a_grounder_s_answer_gives_a_box_or_a_reason(answer, box):
    if isinstance(box, str):
        assert curate.read_box(answer) == ([0.1, 0.2, 0.5, 0.8], box)
    else:
        pytest.raises(box, curate.read_box, answer)


@pytest.mark.parametrize("answer, scores", [
    ('{"reasoning": "fine", "score": [20, 25]}', [20, 25]), ('```json\n{"score": [7, 0]}\n```', [7, 0]), ('So {"score": [3, 4', None),
    ('"score": [12, 13], "reasoning": "broke off', [12, 13]), ('{"score": [20, 26]}', None), ('{"score": [20]}', None), ("20 and 25", None),
    ('{"score": [true, 20]}', None), ("", None),
])  # fmt: skip
def test_a_scorer_s_answer_that_cannot_be_read_is_no_score(answer, scores):
    if scores:
        assert curate.read_scores(answer) == scores
    else:
        pytest.raises(curate.Malformed, curate.read_scores, answer)


def test_a_verifier_s_answer_is_read_or_refused():
    assert curate.read_verdict('Well. {"reason": "same cup", "match": true}') == (True, "same cup")
    assert curate.read_verdict('{"match": "No", "reason": "blue"}') == (False, "blue")
    assert curate.read_verdict('{"match": true, "reason": "half \\ud83d"}')[1].encode()  # or no table could be written any more
    for answer in ('{"match": "perhaps"}', "", '"match": true or "match": false'):
        pytest.raises(curate.Malformed, curate.read_verdict, answer)


def tiny_paper_models(folder, kind, said):
    """The paper's models, each of some 100,000 random weights, that answer as `said` has it (prompt -> text): they run,
    and what they mumble is replaced at the last moment."""
    from transformers import CLIPConfig, CLIPModel, Sam3TrackerConfig, Sam3TrackerModel

    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--models", "paper", "--device", "cpu"]))
    asked = judges.Local(tiny_local_judge(folder, kind), curate.Settings(device="cpu"), max_pixels=64 * 64)
    asked.max_tokens, mumble = 2, asked.ask
    asked.ask = lambda prompt, media, fps: replace(mumble(prompt, media, fps), text=said(prompt, media))
    models.scorer = models.grounder = models.verifier = asked
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    backbone = dict(small, image_size=112, patch_size=14, window_size=4, global_attn_indexes=[0], pretrain_image_size=112)
    sizes = [[32, 32], [16, 16], [8, 8]]
    config = Sam3TrackerConfig(
        vision_config=dict(backbone_config=dict(backbone, model_type="sam3_vit_model"), fpn_hidden_size=32, backbone_feature_sizes=sizes),
        prompt_encoder_config=dict(hidden_size=32, image_size=112), mask_decoder_config=dict(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32),
    )  # fmt: skip
    models.segmenter = Sam3TrackerModel(config).eval()
    models.embedder = CLIPModel(CLIPConfig(text_config=small, vision_config=dict(small, image_size=32, patch_size=8), projection_dim=24)).eval()
    return models


def paper_answers(prompt, media):
    if "two whole numbers" in prompt:
        return '{"score": [25, 16]}' if "natural" in prompt else '{"score": [25, 25]}'
    return f"[{GOOD_BOX}]" if "bbox_2d" in prompt else '{"match": true, "reason": "same"}'


def in_pixels(prompt, media):  # as Qwen2.5-VL counts: a frame of 64 x 64 is shown to it as 56 x 56
    return paper_answers(prompt, media).replace("[100, 200, 500, 800]", "[5.6, 11.2, 28, 44.8]")


class Editor:
    """Stands where diffusers' pipeline of 20 billion weights would, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, image, prompt, negative_prompt, true_cfg_scale, generator):
        from PIL import Image

        self.asked.append((prompt, negative_prompt, true_cfg_scale, torch.rand(1, generator=generator).item()))
        picture = torch.full((96, 96, 3), 255, dtype=torch.uint8)
        picture[24:80, 16:72] = torch.from_numpy(np.array(image[0]).reshape(-1, 3).mean(axis=0).astype(np.uint8))
        return type("Made", (), {"images": [Image.fromarray(picture.numpy())]})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_paper_s_models_go_through_all_stages(tmp_path, nano_data, kind, monkeypatch):
    pytest.importorskip("PIL", reason="needs Pillow, as diffusers does: pip install pillow")
    models = tiny_paper_models(tmp_path / "mllm", kind, in_pixels if kind == "qwen2_5_vl" else paper_answers)
    models.editor = Editor()
    monkeypatch.setattr(curate, "segment", lambda model, frame, box, true=curate.segment: (
        true(model, frame, box) | True) & torch.nn.functional.pad(torch.ones(20, 20, dtype=bool), (10, 34, 15, 29)))  # fmt: skip
    monkeypatch.setattr(curate.Paper, "setup", lambda self, stage: self.__dict__.update(models.__dict__))
    monkeypatch.setattr(curate, "editor_is_installed", lambda: None)
    rows = curated(nano_data, tmp_path / "out", "--models", "paper", tables=["ref_video.csv"])
    live = [row for row in rows if row["status"] != "rejected" or row["stage"] == "deduplicate"]
    assert len(live) == len([row for row in rows if row["kind"] in curate.KINDS]) >= 2
    assert all(row["edit_score"] == 8.0 and row["label"] == "a red car" and row["verdict_reason"] == "same" for row in live)
    assert {asked[1:3] for asked in models.editor.asked} == {(" ", 4.0)} and len({seed for *_, seed in models.editor.asked}) == len(live)
    assert all("a red car" in prompt for prompt, *_ in models.editor.asked)


def test_sam_s_mask_and_clip_s_features_have_the_frame_s_shape_and_length_one(tmp_path):
    models = tiny_paper_models(tmp_path / "mllm", "qwen3_vl", paper_answers)
    frame = torch.randint(255, (60, 90, 3), dtype=torch.uint8)
    mask = curate.segment(models.segmenter, frame, [0.1, 0.2, 0.5, 0.8])
    assert mask.shape == (60, 90) and mask.dtype == torch.bool
    features = models.embed([frame, frame.flip(0)])
    assert features.shape == (2, 24) and close(features.norm(dim=1), torch.ones(2))
    assert torch.equal(models.embed([frame])[0], models.embed([frame])[0])


@pytest.mark.parametrize("style", ["base_model.model.model.language_model.layers", "base_model.model.model.layers"])
def test_a_released_adapter_is_merged_as_its_file_says(tmp_path, style):
    asked = judges.Local(tiny_local_judge(tmp_path / "mllm", "qwen3_vl"), curate.Settings(device="cpu"))
    weight = asked.mllm.model.language_model.layers[1].self_attn.q_proj.weight
    before, a, b = weight.detach().clone(), torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    name = f"{style}.1.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    curate.add_adapter(asked.mllm, tmp_path)
    assert close(weight - before, 2 * b @ a)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}))
    curate.add_adapter(asked.mllm, tmp_path)
    assert close(weight - before, 6 * b @ a)  # 8 / sqrt(4) more
    save_file({"base_model.model.elsewhere.layers.9.q.lora_A.weight": a, "base_model.model.elsewhere.layers.9.q.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="finds no place"):
        curate.add_adapter(asked.mllm, tmp_path)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.bias": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="not pairs of lora_A and lora_B alone"):
        curate.add_adapter(asked.mllm, tmp_path)


def test_the_published_sets_are_read_in_their_own_formats(tmp_path, capsys):
    (tmp_path / "ditto" / "training_metadata").mkdir(parents=True)
    line = {"source_path": "s/a.mp4", "edited_path": "e/a.mp4", "instruction": "Replace the background with snow."}
    (tmp_path / "ditto" / "training_metadata" / "x.json").write_text(json.dumps([line]))
    (tmp_path / "reco" / "remove").mkdir(parents=True)
    (tmp_path / "reco" / "remove" / "remove_data_configs.json").write_text(json.dumps([{"src_video": "1.mp4", "instruction": "Remove it."}]))
    (tmp_path / "openve.csv").write_text("original_video,video,prompt\no/1.mp4,v/1.mp4,Add a hat.\n")
    inputs = [str(tmp_path / name) for name in ("ditto", "reco", "openve.csv")]
    rows = list(curate.records_of(curate.parse_arguments([*inputs, "--out", "x"]), []))
    assert [(r["src_video"], r["tgt_video"], r["kind"]) for r in rows] == [
        ("s/a.mp4", "e/a.mp4", "background"), ("remove/src_videos/1.mp4", "remove/tar_videos/1.mp4", "remove"), ("o/1.mp4", "v/1.mp4", "subject"),
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert "Ditto-1M: CC-BY-NC-SA-4.0" in text and "OpenVE-3M: CC-BY-NC-4.0" in text
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="bad.csv, line 2: has no column src_video, tgt_video, prompt; it has a, b"):
        list(curate.records_of(curate.parse_arguments([str(tmp_path / "bad.csv"), "--out", "x"]), []))


@demo
def test_a_reference_is_cut_out_of_a_real_edit_and_a_wrong_one_is_noticed(tmp_path):
    models, row = curate.Classical(None), {"kind": "subject"}
    source, target, other = (SHARED / "demo" / "videos" / name for name in ("31_src.mp4", "31_tgt.mp4", "22_tgt.mp4"))
    assert sum(models.score(source, target, row)) / curate.LOOKS > 8
    box, mask, row["key"] = models.ground(source, target, row)
    write_image(tmp_path / "glasses.png", models.synthesize(source, target, mask, row))
    picture = read_image(tmp_path / "glasses.png").float()
    ink = picture[picture.amin(dim=2) < 240]
    assert 1.5 < picture.shape[1] / picture.shape[0] < 3 and ink[:, 0].mean() > 1.3 * ink[:, 1].mean()  # wide, and red
    assert models.verify(source, target, tmp_path / "glasses.png", row)[0]
    write_image(tmp_path / "wrong.png", curate.frame_at(other, 0))
    assert not models.verify(source, target, tmp_path / "wrong.png", row)[0]


def test_of_two_alike_the_better_is_kept(tmp_path):
    feature, ledger = curate.pack(torch.tensor([1.0, 0.0])), curate.Ledger(tmp_path)
    rows = [{"id": name, "status": "open", "edit_score": score, "feature": feature} for name, score in (("a", 8.0), ("b", 9.0))]
    ledger.write("verify", 0, rows)
    (ledger.folder / "read.json").write_text(json.dumps({"records": 2, "shards": 1}))
    curate.deduplicate_all(SimpleNamespace(guard=None, duplicate=0.9), ledger)
    assert [row["status"] for row in ledger.rows("deduplicate", 0)] == ["rejected", "kept"]


def test_a_deduplication_that_is_killed_after_a_retry_is_done_anew_as_a_whole(tmp_path, monkeypatch):
    ledger, again = curate.Ledger(tmp_path), lambda: curate.deduplicate_all(SimpleNamespace(guard=None, duplicate=0.9), ledger)
    row = {"status": "open", "edit_score": 9.0, "feature": curate.pack(torch.tensor([1.0, 0.0])), "stage": "verify", "reason": "no memory"}
    ledger.write("verify", 0, [row | {"id": "a", "status": "failed"}]), ledger.write("verify", 1, [row | {"id": "b"}])
    (ledger.folder / "read.json").write_text(json.dumps({"records": 2, "shards": 2}))
    again()
    ledger.write("verify", 0, [row | {"id": "a"}])
    ledger.path("deduplicate", 0).unlink()  # as --retry-failed does it
    write = ledger.write
    with monkeypatch.context() as killed, pytest.raises(SystemExit):
        killed.setattr(ledger, "write", lambda stage, shard, rows: sys.exit() if shard else write(stage, shard, rows))
        again()
    again()
    assert [row["status"] for row in records_in(tmp_path)] == ["kept", "rejected"]


def test_a_clip_whose_first_frame_is_the_benchmark_s_is_left_out(tmp_path, nano_data, quadruplets):
    kept = next(row for row in records_in(quadruplets) if row["status"] == "kept")
    (tmp_path / "bench").mkdir()
    write_image(tmp_path / "bench" / "first.png", curate.frame_at(nano_data / kept["src_video"], 0))
    rows = curated(nano_data, tmp_path / "out", "--guard", tmp_path / "bench", tables=["ref_video.csv"])
    row = next(row for row in rows if row["id"] == kept["id"])
    assert "of the benchmark" in row["reason"] and not row["tuning"]


def test_limits_are_of_the_longer_side_to_the_shorter_of_the_mask_and_of_the_same_moments(tmp_path):
    stage = curate.Synthesize(SimpleNamespace(min_side=8, max_aspect=4.0), [])
    stage.check(40, 10)
    for height, width in ((41, 10), (10, 41)):
        with pytest.raises(curate.Rejected, match="aspect above 4"):
            stage.check(height, width)
    for name, count, height in (("a", 9, 64), ("b", 21, 64), ("c", 9, 96)):
        write_clip(tmp_path / f"{name}.mp4", moving_picture(count, height, 64))
    for other, says in (("b", "not the same moments"), ("c", "another aspect")):
        with pytest.raises(MediaError, match=says):
            curate.look_at_pair(tmp_path / "a.mp4", tmp_path / f"{other}.mp4")
    ground = curate.Ground(SimpleNamespace(out=tmp_path), [tmp_path])
    for share, says in ((0.81, "covers 81%"), (0, "is empty")):
        mask = torch.arange(10_000).view(100, 100) < share * 10_000
        ground.loaded = SimpleNamespace(ground=lambda source, target, row: ([0, 0, 1, 1], mask, 0))
        with pytest.raises(curate.Rejected, match=says):
            ground.one({"id": "1", "src_video": "a.mp4", "tgt_video": "a.mp4", "base": 0})


def test_the_funnel_counts_one_reason_as_one_whatever_file_or_line_it_speaks_of_and_the_page_shows_every_record():
    funnel, file, line = curate.Funnel(), "/my clips/{}.mp4: no such file", "pairs.csv, line 3: {}.mp4 is outside of /base; give paths"
    for reason in (file, line, "pairs.csv, line 4: prompt is empty, or no text"):
        for name in ("seaside", "a---b"):
            funnel.add({"status": "failed", "stage": "read", "reason": reason.format(name)})
    assert {reason: count for (_, _, reason), count in funnel.reasons.items()} == {
        "no such file": 2, "is outside of /base; give paths": 2, "prompt is empty, or no text": 2,
    }  # fmt: skip
    row = {"name": "a---b", "kind": "style", "status": "failed", "stage": "read", "reason": file}
    assert "<td>a---b</td>" in curate.markdown_to_html(curate.pair_by_pair([row]))


def test_styles_and_removals_are_for_tuning_alone(tmp_path):
    stage = curate.Score(SimpleNamespace(min_score=6.0, min_ref_score=8.0), [])
    for kind, score, says in (("style", 9.0, "a style is no object"), ("remove", 9.0, "leaves nothing"), ("subject", 7.0, "tuning only")):
        with pytest.raises(curate.Rejected, match=says) as error:
            stage.judged({"edit_score": score, "kind": kind})
        assert error.value.found["tuning"]
    assert stage.judged({"edit_score": 8.0, "kind": "subject"})["tuning"]


def test_the_paper_s_scorer_and_verifier_see_the_frames_they_are_told_of(tmp_path):
    for name, colour in (("source", BLUE), ("target", RED)):
        write_video(tmp_path / f"{name}.mp4", smooth_clip(colour), 4)
    write_image(tmp_path / "ref.png", smooth_clip(GREEN)[0])
    asked, models = [], curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    models.scorer = models.verifier = None

    def ask(model, prompt, images, read):
        asked.append({label: "RGB"[image.float()[40, 30].argmax()] for label, image in images.items()})
        return read('{"score": [20, 20]}' if "score" in prompt else '{"match": true, "reason": "same"}')

    models.ask = ask
    files = tmp_path / "source.mp4", tmp_path / "target.mp4"
    models.score(*files, {"prompt": "x"})
    assert asked[:2] == [{"source": "B", "edited": "R"}, {"edited": "R"}]
    models.verify(*files, tmp_path / "ref.png", {"prompt": "x", "kind": "subject", "key": 0})
    assert asked[-1] == {"edited": "R", "reference": "G"}


def test_sam_sees_boxes_in_its_pixels_and_colours_from_minus_one_to_one():
    class Segmenter(torch.nn.Module):
        config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(image_size=100))

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values, input_boxes, multimask_output):
            self.seen = pixel_values, input_boxes
            return SimpleNamespace(pred_masks=torch.ones(1, 1, 1, 4, 4))

    for level in (0, 255):
        model = Segmenter()
        curate.segment(model, torch.full((60, 90, 3), level, dtype=torch.uint8), [0.1, 0.2, 0.5, 0.8])
        assert close(model.seen[0], torch.full((1, 3, 100, 100), level / 127.5 - 1))
        assert model.seen[1].flatten().tolist() == pytest.approx([10, 20, 50, 80])


def test_a_server_of_several_models_is_told_which(monkeypatch):
    class Listing(BaseHTTPRequestHandler):
        def do_GET(self):
            data = json.dumps({"data": [{"id": "first"}, {"id": "wanted-VL"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    assert curate.open_model(f"{url}#wanted-VL", "cpu").model == "wanted-VL"
    for name in (url, f"{url}#absent"):
        with pytest.raises(ValueError, match="serves 2 models, first, wanted-VL.*say which"):
            curate.open_model(name, "cpu")
    server.shutdown()


def test_a_server_s_answer_that_cannot_be_read_is_asked_for_again_and_a_local_one_is_not(tmp_path):
    models, said = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"])), iter(["hm", '{"score": [20, 20]}', "hm"])
    server = object.__new__(judges.OpenAICompatible)
    server.ask = lambda *_: judges.Answer(next(said))
    assert models.ask(server, "How good?", {"edited": smooth_clip(RED)[0]}, curate.read_scores) == [20, 20]
    with pytest.raises(judges.Malformed):
        models.ask(SimpleNamespace(ask=server.ask), "How good?", {}, curate.read_scores)


def test_what_a_grounder_or_a_verifier_thinks_aloud_is_not_its_answer(tmp_path):
    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    asked = lambda said, read: models.ask(SimpleNamespace(ask=lambda *_: judges.Answer(said)), "What is it?", {}, read)
    thought = '<think>{"bbox_2d": [0, 0, 900, 900], "label": "room"}? {"match": false}? Else [].</think>'
    assert asked(f'{thought}[{{"bbox_2d": [100, 100, 300, 300], "label": "hat"}}]', curate.read_box) == ([0.1, 0.1, 0.3, 0.3], "hat")
    assert asked(f"{thought}**match**: true", curate.read_verdict) == (True, "")


def test_ctrl_c_keeps_the_records_under_way_and_begins_no_other(monkeypatch, capsys):
    stage, pressed = curate.Score(SimpleNamespace(workers=2), []), []
    stage.one = lambda row: time.sleep(0.3) or {"done": True}

    def interrupted(busy, wait=curate.wait, **how):
        if not pressed:
            raise KeyboardInterrupt(pressed.append(1))
        return wait(busy, **how)

    monkeypatch.setattr(curate, "wait", interrupted)
    finished = []
    with pytest.raises(KeyboardInterrupt):
        finished += iter(stage({"id": str(i)} for i in range(20)))
    with pytest.raises(KeyboardInterrupt):
        pressed.clear()
        for row in stage({"id": str(i)} for i in range(20)):
            finished.append(row)
    assert 1 <= len(finished) <= 4 and all(row["done"] for row in finished) and "once more" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_are_loaded_once(monkeypatch):
    tries = []
    monkeypatch.setattr(curate.Classical, "setup", lambda self, stage: tries.append(stage) or int("no such model"))
    stage = curate.Score(curate.parse_arguments(["x", "--out", "x", "--workers", "4"]), [])
    with pytest.raises(curate.Barred, match="score: invalid literal"):
        list(stage([{"id": str(i), "frames": 9, "src_video": "a", "tgt_video": "b", "base": 0} for i in range(8)]))
    assert tries == ["score"]


def test_a_shard_that_lost_records_is_not_taken_for_whole_and_features_of_another_embedder_are_not_compared(tmp_path, nano_data, quadruplets):
    out = Path(shutil.copytree(quadruplets, tmp_path / "out"))
    shard = out / "ledger/synthesize/00000.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(True)[:-1]))
    shutil.rmtree(out / "ledger/verify"), shutil.rmtree(out / "ledger/deduplicate")
    with pytest.raises(ValueError, match=r"synthesize/00000\.jsonl: has lost records, 4 are left"):
        curated(nano_data, out)
    settings = quadruplets / "ledger/settings.json"
    told = json.loads(settings.read_text()) | {"models": "paper", "embedder": "A"}
    shutil.copytree(quadruplets, tmp_path / "paper")
    (tmp_path / "paper/ledger/settings.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="features of --embedder A"):
        curated(tmp_path / "paper/ledger", tmp_path / "again", "--models", "paper", "--embedder", "B", tables=["verify"])


def test_features_that_an_earlier_stage_has_of_another_embedder_are_made_anew(tmp_path, quadruplets):
    theirs = Path(shutil.copytree(quadruplets, tmp_path / "theirs")) / "ledger"
    settings = json.loads((theirs / "settings.json").read_text()) | {"models": "paper", "embedder": "A"}
    (theirs / "settings.json").write_text(json.dumps(settings))
    for shard in (theirs / "synthesize").iterdir():  # as a run leaves them that began from another ledger's features
        curate.write_json_lines(shard, [row | {"feature": curate.pack(torch.ones(4))} for row in curate.read_json_lines(shard)])
    rows = curated(theirs, tmp_path / "again", tables=["synthesize"])
    features = [[row.get("feature") for row in records_in(out, "verify")] for out in (tmp_path / "again", quadruplets)]
    assert features[0] == features[1] and any(features[0]) and any(row["status"] == "kept" for row in rows)


def test_clips_of_other_moments_are_not_scored_by_the_paper_s_models_either(tmp_path):
    for name, count in (("source", 49), ("target", 3)):
        write_clip(tmp_path / f"{name}.mp4", moving_picture(count, 64, 64))
    models = curate.Paper(curate.parse_arguments(["x", "--out", "x", "--device", "cpu"]))
    with pytest.raises(MediaError, match="not the same moments"):
        models.score(tmp_path / "source.mp4", tmp_path / "target.mp4", {"prompt": "x"})


def test_the_editor_s_language_model_is_told_which_tokens_are_a_picture_s(tmp_path):
    mllm = randomise(judges.Local(tiny_local_judge(tmp_path / "mllm", "qwen2_5_vl"), curate.Settings(device="cpu")).mllm)
    picture = mllm.config.image_token_id
    ids = torch.tensor([[5, 6, *[picture] * 4, 7]])
    words = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(16, 1176), image_grid_thw=torch.tensor([[1, 4, 4]]))
    plain, right = mllm(**words).logits, mllm(**words, mm_token_type_ids=(ids == picture).int()).logits
    curate.tell_of_pictures(mllm)
    assert torch.equal(mllm(**words).logits, right) and not close(plain, right, 1e-3)
