"""Tests of kernels/"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
from conftest import close, randomise, tiny_dit
from dit import DiT, rope_3d
from kernels.conv import upsample_conv, upsample_conv_plain, warn_of_slow_conv3d
from kernels.graph import replayed
from kernels.hopper import attention_blocks
from kernels.linear import QuantLinear, Rows8, dequantise, product8, product8_plain, quantise_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
randn = lambda *shape, dtype=torch.float32: torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Attention in small blocks, but on a GPU in its own configurations."""
    module = sys.modules["kernels.attention"]
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "CONFIGS", {name: [(16, 32, 4, 1)] for name in module.CONFIGS})
    module.compiled.cache_clear()
    yield
    module.compiled.cache_clear()


def values_and_gradients(function, inputs):
    """What a function returns and the gradients of its inputs, for fixed gradients of the outputs, in a list."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, o.numel(), device=o.device).double().view_as(o).sin().to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def agree(ours, theirs, inputs, tol):
    return all(close(*pair, tol) for pair in zip(*(values_and_gradients(f, inputs) for f in (ours, theirs))))


def agrees_with_float64(function, *inputs):
    """A function of `kernels` in Triton, forward and backward, against the float64 definition."""
    kernels.set_backend("triton")
    ours = values_and_gradients(function, inputs)
    kernels.set_backend("ref")
    exact = values_and_gradients(function, [x.double() for x in inputs])
    tol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[inputs[0].dtype]
    return all(x.dtype != torch.float64 and close(x, y, tol) for x, y in zip(ours, exact))


def test_attention_is_measured_inside_a_checkpoint_without_a_trace(capsys):
    def block(x):  # as the first block of a training on a GPU does; it is known when the forward is recomputed
        if not measured:
            with kernels.left_out("a candidate"):
                qkv = [torch.randn(1, 4, 2, 8) for _ in range(3)]
                measured.append(kernels.run_alone(kernels.ATTENTION["ref"], qkv, trains=True))
        return x.sin().cos()

    measured, x = [], torch.randn(5, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, -x.sin().sin() * x.cos()) and "left out" not in capsys.readouterr().out
    assert len(measured) == 1 and all(gradient.any() for gradient in measured[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_matches_float64_at_lengths_with_tails(triton_backend, small_blocks, dtype):
    lengths = [(37, 53, 2, 64), (33, 64, 1, 128), (5, 7, 3, 16)] + [(300, 515, 2, 128)] * (DEVICE == "cuda")
    for queries, keys, heads, dim in lengths:
        assert agrees_with_float64(
            kernels.attention, *(randn(2, n, heads, dim, dtype=dtype) for n in (queries, keys, keys))
        )


def test_keys_behind_the_last_weigh_nothing_however_low_the_others_score(triton_backend, small_blocks):
    axis = F.normalize(torch.ones(64, device=DEVICE), dim=0)
    q, k = 8 * axis + 0.1 * randn(1, 37, 1, 64), -8 * axis + 0.1 * randn(1, 53, 1, 64)  # each score about -8
    assert agrees_with_float64(kernels.attention, 2 * q, 2 * k, randn(1, 53, 1, 64))


@pytest.mark.parametrize("keys", [(2, 0, 3, 16), (2, 7, 2, 16), (2, 7, 3, 32), (1, 7, 3, 16)])
def test_attention_in_triton_refuses_keys_that_do_not_fit(triton_backend, keys):
    with pytest.raises(ValueError, match="do not fit"):
        kernels.attention(randn(2, 5, 3, 16), *randn(2, *keys))


def test_attention_by_slices_of_the_batch_is_attention(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention"], "SLICE", 2 * 5 * 7 * 3)
    qkv = [torch.randn(5, n, 3, 16, dtype=torch.float64) for n in (5, 7, 7)]
    assert agree(kernels.attention_slices, kernels.attention_ref, qkv, 1e-12)


@pytest.mark.parametrize("queries, keys", [(130, 70), (5, 128), (64, 257), (3, 1000)])
def test_the_hopper_kernel_s_blocks_in_their_order_are_attention(queries, keys):
    q, k, v = (torch.randn(2, n, 2, 128) for n in (queries, keys, keys))
    out, lse = attention_blocks(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 128**-0.5
    assert close(out, kernels.attention_ref(q, k, v), 1e-5)
    assert close(lse, scores.logsumexp(-1) / torch.tensor(2.0).log(), 1e-5)


COMPILE_OFFLINE = """
import sys, torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
import kernels
target = GPUTarget("cuda", 90, 32)
driver = SimpleNamespace(get_current_target=lambda: target, get_benchmarker=lambda: None)
driver.get_current_device, driver.get_current_stream = (lambda: 0), (lambda device: 0)
triton.runtime.driver.set_active(driver)
ours = sys.modules["kernels.attention"]
ours.CONFIGS["attention_forward"] = [(32, 32, 4, 1), (64, 32, 4, 2)]
q, lse = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16), torch.empty(1, 2, 256)
arguments, constants = (q, q, q, q, lse, 256, 256, 0.1, 5, 2), {"DIM": 64, "PRECISION": "tf32"}
both = ours.compile_side_by_side(ours.compiled("attention_forward"), arguments, constants)
print(*(".entry attention_forward" in kernel.asm["ptx"] for kernel in both))
"""


def test_the_configurations_that_are_to_be_timed_are_compiled_side_by_side(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    said = subprocess.run([sys.executable, "-c", COMPILE_OFFLINE], capture_output=True, text=True, env=environment)
    assert said.stdout == "True True\n", said.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_norms_match_float64_at_widths_with_tails(triton_backend, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.norm"], "PROGRAMS", 5)  # several rows a program
    grid, heads, D = (2, 3, 4), 3, 72
    x, y, w = (randn(*shape, dtype=dtype) for shape in ((2, 24, D), (2, 24, D), (D,)))
    gate, shift, scale, shared = (randn(n, 1, D) for n in (2, 2, 2, 1))
    for rope in (rope_3d(grid, D // heads, torch.device(DEVICE)), None):
        assert agrees_with_float64(lambda x, w, r=rope: kernels.rms_norm_rope(x, w, r, heads, 1e-6), x, w)
    assert agrees_with_float64(lambda x, *m: kernels.layer_norm_modulate(x, *m, 1e-6), x, shift, scale)
    assert agrees_with_float64(kernels.gate_residual, x, y, gate)
    assert agrees_with_float64(lambda *all: kernels.gate_residual_norm(*all, 1e-6), x, y, gate, shared, scale)
    assert agrees_with_float64(lambda x, y, *m: kernels.gate_residual_norm(x, y, None, *m, 1e-6), x, y, shift, shared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vae_s_fused_norm_matches_float64_in_any_layout_and_behind_the_past(triton_backend, dtype):
    for channels in (5, 600):
        x, gamma = randn(2, channels, 3, 2, 7, dtype=dtype), randn(channels, 1, 1, 1, dtype=dtype)
        for video in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            assert agrees_with_float64(kernels.channel_norm_silu, video, gamma)
        assert agrees_with_float64(kernels.channel_norm_silu, x, gamma, randn(2, channels, 2, 2, 7, dtype=dtype))
    kernels.set_backend("triton")
    assert not kernels.channel_norm_silu(x * 0, gamma).any()  # what has no direction keeps none
    for wrong in ((gamma[:4],), (gamma, x[..., :5])):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.channel_norm_silu(x, *wrong)


def test_the_fused_norms_read_no_memory_that_is_not_theirs(triton_backend):
    x, weight, turn = randn(2, 5, 24), randn(24), randn(3, 5).T  # one row a position, columns apart
    results = []
    for backend in ("ref", "triton"):
        kernels.set_backend(backend)
        residual = kernels.gate_residual(x, x[:1], weight[None, None])
        results.append((kernels.rms_norm_rope(x, weight, (turn, turn), 4, 1e-6), residual))
    assert all(close(ours, plain, 1e-5) for plain, ours in zip(*results))
    for table, w in (((turn[:2], turn[:2]), weight), (None, weight[:4])):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.rms_norm_rope(x, w, table, 4, 1e-6)


def test_a_residual_without_a_gate_keeps_no_update_for_its_backward(triton_backend):
    x, y, m, kept = randn(1, 5, 24), randn(1, 5, 24), randn(1, 1, 24), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        kernels.gate_residual_norm(x, y.requires_grad_(), None, m, m, 1e-6)[1].sum().backward()
    assert kept and y.data_ptr() not in kept and y.grad is not None


def test_the_plain_norms_take_float64_and_any_layout_of_their_input():
    x, m = torch.randn(1, 24, 5).transpose(1, 2), torch.randn(1, 1, 24)
    rope = rope_3d((5, 1, 1), 6, torch.device("cpu"))
    for run in (lambda x: kernels.layer_norm_modulate(x, m, m, 1e-6),
                lambda x: kernels.rms_norm_rope(x, m[0, 0], rope, 4, 1e-6)):  # fmt: skip
        assert close(run(x), run(x.double().contiguous()).float(), 1e-5)


def test_a_dit_trains_on_the_kernels_as_on_the_definitions(triton_backend):
    model, t = randomise(DiT(tiny_dit(num_layers=1))).to(DEVICE), torch.tensor([300.0, 40.0], device=DEVICE)
    run = lambda x, context: model.to(x.dtype)(x, t, context)
    assert agrees_with_float64(run, randn(2, 16, 2, 4, 6), randn(2, 5, 64))


def test_the_kernels_register_as_operators_that_autograd_and_compile_accept(triton_backend):
    q, k, v = (randn(1, n, 2, 16).requires_grad_() for n in (5, 7, 7))
    x, weight, gate = randn(1, 5, 32).requires_grad_(), randn(32).requires_grad_(), randn(1, 1, 32)
    video, gamma = randn(1, 4, 2, 3, 3).requires_grad_(), randn(4, 1, 1, 1)
    for op, arguments in (("attention", (q, k, v)), ("rms_norm_rope", (x, weight, None, None, 2, 1e-6)),
                          ("residual_norm", (x, x.detach(), gate, gate, gate, 1e-6, False)),
                          ("residual_norm", (x.detach(), None, None, gate, gate, 1e-6, True)),
                          ("channel_norm_silu", (video, gamma, video.detach()))):  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.nanokiwi, op), arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_backend_that_cannot_run_is_refused_and_auto_takes_what_can(monkeypatch):
    q = torch.randn(1, 4, 2, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="auto, ref, sdpa, cudnn, slices, triton, hopper"):
        kernels.set_backend("cuda")
    assert kernels.choose(q, measured=True) == kernels.choose(q.bfloat16()) == "sdpa"
    assert kernels.choose(q.bfloat16(), measured=True) == "slices"
    long = torch.empty(1, 4096, 2, 16, dtype=torch.bfloat16)
    assert kernels.choose(long, measured=True) == "sdpa", "scores that fill the memory"
    for backend, message in (("triton", "needs a GPU"), ("hopper", "cpu is no Hopper GPU")):
        kernels.set_backend(backend)
        with pytest.raises(RuntimeError, match=message):
            kernels.attention(q, q, q)
    kernels.set_backend("auto")


@pytest.mark.parametrize("channels", [3, 40])
def test_upsampling_folded_into_its_convolution_is_the_same_picture_and_the_same_gradients(channels, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.conv"], "folding_pays", lambda x, weight: True)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, channels, 3, 5, 4), (6, channels, 3, 3), (6,))]
    assert agree(lambda *inputs: upsample_conv(*inputs, {}), upsample_conv_plain, inputs, 1e-12)
    first, again = (upsample_conv(*inputs, kept) for kept in [{}] * 2)
    assert torch.equal(first, again) and first.is_contiguous(memory_format=torch.channels_last_3d)


def test_slow_conv3d_of_torch_2_9_is_warned_of_once(capsys):
    for version, cudnn in (("2.9.1", 91002), ("2.9.1", 91002), ("2.9.0", 91500), ("2.10", 91002), ("2.9", None)):
        warn_of_slow_conv3d(version, cudnn)
    assert capsys.readouterr().out.count("nvidia-cudnn-cu12>=9.15") == 1


def test_a_norm_hands_rows_of_8_bits_to_linears_that_multiply_them(triton_backend):
    x, y, gate, shift, scale = (randn(*shape) for shape in ((2, 5, 48), (2, 5, 48), (2, 1, 48), (2, 1, 48), (1, 1, 48)))
    shift[0], scale[:] = 0, -1  # a sample of zeros
    for run in (lambda: (None, kernels.layer_norm_modulate(x, shift, scale, 1e-6, True)),
                lambda: kernels.gate_residual_norm(x, y, gate, shift, scale, 1e-6, True)):  # fmt: skip
        results = []
        for backend in ("ref", "triton"):
            kernels.set_backend(backend)
            results.append(run())
        (new, plain), (fused_new, fused) = results
        assert new is None or close(new, fused_new, 1e-6)
        assert fused.stored.dtype == torch.float8_e4m3fn and close(fused.scale, plain.scale, 1e-6)
        assert ((dequantise(*fused) - dequantise(*plain)).abs() <= 32 * plain.scale).all()  # a step of e4m3 below 448
    linear = torch.nn.Linear(48, 32, device=DEVICE).bfloat16()
    ours, x = QuantLinear.from_linear(linear, "w8a8"), x.bfloat16()
    rows = Rows8.of(x)
    assert torch.equal(ours(x), ours(rows)) and close(ours(x), linear(x), 0.05)
    assert close(product8(rows, ours.stored, ours.scale), product8_plain(rows, ours.stored, ours.scale), 0.01)


@pytest.mark.parametrize("width", [48, 64])
def test_a_linear_with_gelu_as_its_epilogue_is_the_linear_and_its_gelu(triton_backend, width):
    x, linear = randn(2, 5, 32), torch.nn.Linear(32, width, device=DEVICE)
    plain = F.gelu(linear(x), approximate="tanh")
    with torch.no_grad():
        assert close(kernels.linear_gelu(x, linear), plain, 1e-2 if DEVICE == "cuda" else 0)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU (KIWI_TEST_GPU=1)")
def test_a_replayed_graph_gives_the_bits_of_its_function_for_every_input(monkeypatch):
    monkeypatch.setenv("KIWI_GRAPH", "1")
    model, x, t = randomise(DiT(tiny_dit())).to(DEVICE), randn(1, 16, 1, 4, 6), randn(1)
    step, context = torch.no_grad()(lambda x, t: model(x, t, context)), randn(1, 5, 64)
    again = replayed(step, x, t)
    for given in ((x, t), (randn(*x.shape), t * 500)):
        assert torch.equal(again(*given), step(*given))


@pytest.mark.parametrize("kind, error", [("fp8", 2**-4), ("int8", 2**-7)])
def test_a_quantised_row_keeps_its_zeros_and_its_largest_value(kind, error):
    weight = torch.randn(6, 40) * torch.logspace(-20, 20, 6)[:, None]
    weight[2] = 0
    stored, scale = quantise_rows(weight, kind)
    back, largest = stored.float() * scale, weight.abs().amax(1, keepdim=True)
    assert stored.itemsize == 1 and scale.shape == (6, 1) and scale.dtype == torch.float32
    assert ((back - weight).abs() <= error * largest).all() and close(back.abs().amax(1, keepdim=True), largest, 1e-6)
    with pytest.raises(ValueError, match="'int4', expected one of fp8, int8, w8a8"):
        quantise_rows(weight, "int4")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_linear_is_a_linear_of_its_dequantised_weight_and_keeps_no_copy_of_it(kind, dtype):
    linear = torch.nn.Linear(24, 10)
    ours, x, kept = QuantLinear.from_linear(linear, kind).to(dtype), torch.randn(2, 5, 24, dtype=dtype), []
    assert ours.stored.itemsize == 1 and ours.scale.dtype == torch.float32 and ours.bias.dtype == dtype
    linear.weight.data = ours.weight
    assert agree(ours, linear.to(dtype), (x,), None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x.requires_grad_()).sum().backward()
    assert all(t.itemsize == 1 or t.numel() == 10 for t in kept) and (ours.bias.grad == 10).all()


def test_a_quantised_linear_reloads_moves_without_storage_and_takes_one_scale_for_all_rows():
    ours = QuantLinear.from_linear(torch.nn.Linear(8, 4, bias=False), "fp8")
    with torch.device("meta"):
        again = QuantLinear.from_linear(torch.nn.Linear(8, 4, bias=False), "fp8")
    again.to(torch.bfloat16).to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert torch.equal(again(torch.eye(8)), ours(torch.eye(8))) and set(ours.state_dict()) == {"stored", "scale"}
    assert torch.equal(QuantLinear(ours.stored, torch.tensor(2.0)).weight, 2 * ours.stored.float())
