"""Tests of kernels/"""

import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
from conftest import close, randomise, tiny_dit
from dit import DiT, rope_3d
from kernels.conv import upsample_conv, upsample_conv_plain, warn_of_slow_conv3d
from kernels.hopper import attention_blocks
from kernels.linear import QuantLinear, quantise_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(params=["pointers", "tma"])
def one_kind_of_load(request, monkeypatch):
    """Attention with one of its ways to load: on a GPU in its own configurations, else in small blocks."""
    tma = request.param == "tma"
    if DEVICE == "cuda" and tma and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA is for Hopper and later")
    module = sys.modules["kernels.attention"]
    for name, configs in module.CONFIGS.items():
        real = [config for config in configs if config[2] == tma]
        monkeypatch.setitem(module.CONFIGS, name, real if DEVICE == "cuda" else [(16, 32, tma, 4, 1)])
    module.compiled.cache_clear()
    yield request.param
    module.compiled.cache_clear()


def test_attention_is_measured_inside_a_checkpoint_without_a_trace(capsys):
    def block(x):  # in the forward, as the first block of a training on a GPU does; it is known when that is recomputed
        if not measured:
            with kernels.left_out("a candidate"):
                measured.append(
                    kernels.run_alone(
                        kernels.ATTENTION["ref"], [torch.randn(1, 4, 2, 8) for _ in range(3)], trains=True
                    )
                )
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
        weights = [
            torch.linspace(-1, 1, o.numel(), device=DEVICE, dtype=torch.float64).view_as(o).sin().to(o.dtype)
            for o in outputs
        ]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    tol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[inputs[0].dtype]
    return all(actual.dtype != torch.float64 and close(actual, exact, tol) for actual, exact in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_matches_float64_at_lengths_with_tails(triton_backend, one_kind_of_load, dtype):
    if DEVICE == "cuda" and dtype == torch.float32 and one_kind_of_load != "pointers":
        pytest.skip("on a GPU float32 is loaded by pointers alone")
    lengths = [(37, 53, 2, 64), (33, 64, 1, 128), (5, 7, 3, 16)] + [(300, 515, 2, 128)] * (DEVICE == "cuda")
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
        past = torch.randn(2, channels, 2, 2, 7).to(dtype)
        assert agrees_with_float64(kernels.channel_norm_silu, x, gamma, past)
    x, gamma = x.to(DEVICE) * 0, gamma.to(DEVICE)
    kernels.set_backend("triton")
    assert not kernels.channel_norm_silu(x, gamma).any()  # what has no direction keeps none
    with pytest.raises(ValueError, match="do not fit"):
        kernels.channel_norm_silu(x, gamma[:4])


def test_the_fused_norms_read_no_memory_that_is_not_theirs(triton_backend):
    x, weight = torch.randn(2, 5, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    turn = torch.randn(3, 5, device=DEVICE).T  # one row a position, columns apart
    kernels.set_backend("ref")
    wanted = (
        kernels.rms_norm_rope(x, weight, (turn, turn), 4, 1e-6),
        kernels.gate_residual(x, x[:1], weight[None, None]),
    )
    kernels.set_backend("triton")
    assert close(kernels.rms_norm_rope(x, weight, (turn, turn), 4, 1e-6), wanted[0], 1e-5)
    assert close(kernels.gate_residual(x, x[:1], weight[None, None]), wanted[1], 1e-5)
    for table, w in (((turn[:2], turn[:2]), weight), (None, weight[:4])):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.rms_norm_rope(x, w, table, 4, 1e-6)


def test_a_residual_without_a_gate_keeps_no_update_for_its_backward(triton_backend):
    x, y, m, kept = (
        torch.randn(1, 5, 24, device=DEVICE),
        torch.randn(1, 5, 24, device=DEVICE),
        torch.randn(1, 1, 24, device=DEVICE),
        [],
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        kernels.gate_residual_norm(x, y.requires_grad_(), None, m, m, 1e-6)[1].sum().backward()
    assert kept and y.data_ptr() not in kept and y.grad is not None


def test_the_plain_norms_take_float64_and_any_layout_of_their_input():
    x, m, rope = (
        torch.randn(1, 24, 5).transpose(1, 2),
        torch.randn(1, 1, 24),
        rope_3d((5, 1, 1), 6, torch.device("cpu")),
    )
    for run in (
        lambda x: kernels.layer_norm_modulate(x, m, m, 1e-6),
        lambda x: kernels.rms_norm_rope(x, m[0, 0], rope, 4, 1e-6),
    ):
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
    with pytest.raises(ValueError, match="auto, ref, sdpa, cudnn, slices, triton, hopper"):
        kernels.set_backend("cuda")
    assert kernels.choose(q, measured=True) == kernels.choose(q.bfloat16()) == "sdpa"
    assert kernels.choose(q.bfloat16(), measured=True) == "slices"
    assert kernels.choose(torch.empty(1, 4096, 2, 16, dtype=torch.bfloat16), measured=True) == "sdpa", (
        "scores that fill the memory"
    )
    kernels.set_backend("triton")
    with pytest.raises(RuntimeError, match="needs a GPU"):
        kernels.attention(q, q, q)
    kernels.set_backend("hopper")
    with pytest.raises(RuntimeError, match="cpu is no Hopper GPU"):
        kernels.attention(q, q, q)
    kernels.set_backend("auto")


def test_keys_behind_the_last_weigh_nothing_however_low_the_others_score(triton_backend, one_kind_of_load):
    axis = F.normalize(torch.ones(64), dim=0)
    q, k = (
        8 * axis + 0.1 * torch.randn(1, 37, 1, 64),
        -8 * axis + 0.1 * torch.randn(1, 53, 1, 64),
    )  # each score about -8
    assert agrees_with_float64(kernels.attention, 2 * q, 2 * k, torch.randn(1, 53, 1, 64))


@pytest.mark.parametrize("kind, error", [("fp8", 2**-4), ("int8", 2**-7)])
def test_a_quantised_row_keeps_its_zeros_and_its_largest_value(kind, error):
    weight = torch.randn(6, 40) * torch.logspace(-20, 20, 6)[:, None]
    weight[2] = 0
    stored, scale = quantise_rows(weight, kind)
    back, largest = stored.float() * scale, weight.abs().amax(1, keepdim=True)
    assert stored.itemsize == 1 and scale.shape == (6, 1) and scale.dtype == torch.float32
    assert ((back - weight).abs() <= error * largest).all() and close(back.abs().amax(1, keepdim=True), largest, 1e-6)
    with pytest.raises(ValueError, match="'int4', expected one of fp8, int8"):
        quantise_rows(weight, "int4")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_linear_is_a_linear_of_its_dequantised_weight_and_keeps_no_copy_of_it(kind, dtype):
    linear = torch.nn.Linear(24, 10)
    ours = QuantLinear.from_linear(linear, kind).to(dtype)
    assert ours.stored.itemsize == 1 and ours.scale.dtype == torch.float32 and ours.bias.dtype == dtype
    linear.weight.data = ours.weight
    linear.to(dtype)
    x, grad, kept = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True), torch.randn(2, 5, 10, dtype=dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(x)
    assert close(y, linear(x)) and all(t.itemsize == 1 or t.numel() == 10 for t in kept)
    for mine, theirs in zip(*(torch.autograd.grad(f(x), (x, f.bias), grad) for f in (ours, linear))):
        assert close(mine, theirs)


def test_a_quantised_linear_reloads_moves_without_storage_and_takes_one_scale_for_all_rows():
    ours = QuantLinear.from_linear(torch.nn.Linear(8, 4, bias=False), "fp8")
    with torch.device("meta"):
        again = QuantLinear.from_linear(torch.nn.Linear(8, 4, bias=False), "fp8")
    again.to(torch.bfloat16).to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert torch.equal(again(torch.eye(8)), ours(torch.eye(8))) and set(ours.state_dict()) == {"stored", "scale"}
    assert torch.equal(QuantLinear(ours.stored, torch.tensor(2.0)).weight, 2 * ours.stored.float())


@pytest.mark.parametrize("queries, keys", [(130, 70), (5, 128), (64, 257), (3, 1000)])
def test_the_hopper_kernel_s_blocks_in_their_order_are_attention(queries, keys):
    q, k, v = (torch.randn(2, n, 2, 128) for n in (queries, keys, keys))
    out, lse = attention_blocks(q, k, v)
    q, k, v = (x.double() for x in (q, k, v))
    assert close(out, kernels.attention_ref(q, k, v).float(), 1e-5)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 128**-0.5
    assert close(lse, (scores.logsumexp(-1) / torch.tensor(2.0).log()).float(), 1e-5)


@pytest.mark.parametrize("channels", [3, 40])
def test_upsampling_folded_into_its_convolution_is_the_same_picture_and_the_same_gradients(channels):
    x = torch.randn(2, channels, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, channels, 3, 3), (6,)))
    plain, folded = (f(x, weight, bias) for f in (upsample_conv_plain, upsample_conv))
    assert close(folded, plain, 1e-12) and folded.is_contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn_like(plain)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight, bias), grad) for y in (folded, plain))):
        assert close(ours, theirs, 1e-12)


def test_slow_conv3d_of_torch_2_9_is_warned_of_once(capsys):
    for version, cudnn in (
        ("2.9.1+cu128", 91002),
        ("2.9.1+cu128", 91002),
        ("2.9.0", 91500),
        ("2.10", 91002),
        ("2.9", None),
    ):
        warn_of_slow_conv3d(version, cudnn)
    assert capsys.readouterr().out.count("nvidia-cudnn-cu12>=9.15") == 1
