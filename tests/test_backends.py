"""What decides and prepares a GPU's kernels, as far as it can be looked at without them."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adaclip import _core, reference, update
from adaclip.backends import (
    ConvGeometry,
    Key,
    Like,
    choice,
    cuda,
    cudnn_grads,
    describe,
    kernels_on,
    resolve_backend,
    support,
)
from adaclip.backends.device_table import step_table
from adaclip.backends.planes import as_planes
from adaclip.layers.base import rounding_bound
from adaclip.noise import checked_std
from adaclip.smoothing import DPAdamBC, NoiseCorrectedNadam
from adaclip.step_rule import FusedStep

CONVOLUTIONS = [
    # (x, Cout, geometry)
    ((3, 4, 7), 6, ConvGeometry([3], [2], [1], [1], 2)),
    ((2, 4, 6, 5), 4, ConvGeometry([3, 2], [1, 2], [1, 0], [2, 1], 1)),
    ((2, 2, 3, 5, 4), 4, ConvGeometry([1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 1)),
    ((2, 4, 2, 7, 6), 4, ConvGeometry([1, 3, 2], [1, 2, 3], [0, 2, 1], [1, 2, 1], 2)),
    ((1, 2, 4, 4, 4), 3, ConvGeometry([1, 4, 1], [1, 4, 1], [0, 0, 0], [1, 1, 1], 1)),
    ((0, 2, 2, 5, 5), 3, ConvGeometry([1, 3, 3], [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)),
]


def tensors(shape, out_channels, geometry, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    g = torch.randn((shape[0], out_channels, *geometry.out(shape[2:])), generator=rng, dtype=torch.float64)
    return x.to(dtype), g.to(dtype)


def as_lists(geometry):
    return [list(v) for v in geometry[:4]] + [geometry.groups]


@pytest.mark.parametrize(("shape", "out_channels", "geometry"), CONVOLUTIONS)
def test_planes_have_the_same_gradients_and_magnitudes(shape, out_channels, geometry):
    x, g = tensors(shape, out_channels, geometry)
    plane_x, plane_g, plane = as_planes(x, g, geometry)
    assert plane_x.dim() == plane_g.dim() == 4
    assert tuple(plane_g.shape[2:]) == tuple(plane.out(plane_x.shape[2:]))
    ours = reference.conv_sample_grads(plane_x, plane_g, *as_lists(plane))
    truth = reference.conv_sample_grads(x, g, *as_lists(geometry))
    torch.testing.assert_close(ours.reshape(truth.shape), truth)
    exact = reference.position_norms_product(x, g, *as_lists(geometry))
    torch.testing.assert_close(reference.position_norms_product(plane_x, plane_g, *as_lists(plane)), exact)


def test_a_kernel_that_reaches_across_three_axes_is_no_plane():
    assert not ConvGeometry([3, 3, 3], [1, 1, 1], [1, 1, 1], [1, 1, 1], 1).planar()
    assert not ConvGeometry([1, 3, 3], [2, 1, 1], [0, 0, 0], [1, 1, 1], 1).planar()


# --- weighted gradients by cuDNN and cuBLAS (on the CPU: the same calls) -------------------------------


@pytest.mark.parametrize(("shape", "out_channels", "geometry"), CONVOLUTIONS[:5])
@pytest.mark.parametrize("longest", [1, 1 << 16])
def test_convolution_gradients(shape, out_channels, geometry, longest, monkeypatch):
    monkeypatch.setattr(cudnn_grads, "_LONGEST", longest)
    x, g = tensors(shape, out_channels, geometry, torch.float32)
    factors = torch.linspace(0.0, 1.0, shape[0] + 1)[1:]
    factors[0], x[0, 0] = 0.0, torch.nan
    weight = x.new_empty(out_channels, shape[1] // geometry.groups, *geometry.kernel)
    ours = cudnn_grads.conv_weighted_grad(x, g, factors, weight, geometry)
    grads = reference.conv_sample_grads(x.double(), g.double(), *as_lists(geometry))
    truth = reference.weighted_sum(grads, factors)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [1, 1 << 16])
def test_linear_gradients(longest, monkeypatch):
    monkeypatch.setattr(cudnn_grads, "_LONGEST", longest)
    rng = torch.Generator().manual_seed(1)
    a, g = torch.randn(4, 3, 5, generator=rng), torch.randn(4, 3, 2, generator=rng)
    factors = torch.tensor([0.5, 0.0, 1.0, 0.1])
    a[1] = torch.inf
    ours = cudnn_grads.linear_weighted_grad(a, g, factors)
    torch.testing.assert_close(ours, reference.linear_weighted_grad(a, g, factors))
    none = cudnn_grads.linear_weighted_grad(a[:0], g[:0], factors[:0])
    assert torch.equal(none, torch.zeros(2, 5))


def test_torchs_settings_are_as_they_were(monkeypatch):
    cudnn = torch.backends.cudnn
    for setting in ("ieee", "tf32"):
        cudnn.conv.fp32_precision = setting
        try:
            with cudnn_grads._convolutions("ieee" if setting == "tf32" else "tf32"):
                assert cudnn.deterministic
                assert cudnn.conv.fp32_precision != setting
            assert not cudnn.deterministic
            assert cudnn.conv.fp32_precision == setting
        finally:
            cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize(
    ("convolutions", "products", "enabled", "found"),
    [
        ("tf32", "ieee", True, "tf32"),
        ("ieee", "tf32", True, "ieee"),
        ("ieee", "tf32", False, "tf32"),
        ("ieee", "ieee", False, "ieee"),
    ],
)
def test_what_is_rounded_is_what_multiplies(convolutions, products, enabled, found):
    """Without cuDNN a convolution is cuBLAS's, and rounds as that is told to."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.conv.fp32_precision, cublas.fp32_precision, cudnn.enabled
    there = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    try:
        cudnn.conv.fp32_precision, cublas.fp32_precision, cudnn.enabled = convolutions, products, enabled
        assert cudnn_grads._precision("conv", there) == found
        assert cudnn_grads._precision("matmul", there) == products
        assert (cudnn_grads.conv_grad_rounding(there, None, None).operands > 0) == (found == "tf32")
    finally:
        cudnn.conv.fp32_precision, cublas.fp32_precision, cudnn.enabled = before


def cut(t, bits):
    """float32 with that many bits of significand, cut off as TF32's are."""
    return (t.view(torch.int32) & (-1 << (24 - bits))).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_exact_in_tf32(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite() & ((values == 0) | (values.abs() >= 2.0**-126))]
    assert torch.equal(cut(values, 11), values)


def test_rounded_operands_are_covered(monkeypatch):
    """The worst there is: values that lose all that cutting can take, in positions that cancel."""
    monkeypatch.setattr(cudnn_grads, "_precision", lambda kind, x: "tf32")
    geometry = ConvGeometry([1, 1], [1, 1], [0, 0], [1, 1], 1)
    worst = 2.0 - 2.0**-22  # cut to 2 - 2^-10
    x = torch.tensor([[1.0, worst, worst]]).reshape(1, 1, 1, 3)
    g = torch.tensor([[0.5, worst, -worst]]).reshape(1, 1, 1, 3)
    exact = reference.conv_sample_grads(x.double(), g.double(), *as_lists(geometry))
    for operands, kept in (((x, cut(g, 11)), (x.half(), g)), ((cut(x, 11), cut(g, 11)), (x, g))):
        formed = reference.conv_sample_grads(*(t.double() for t in operands), *as_lists(geometry))
        bound = rounding_bound(
            exact.square().sum((1, 2, 3, 4)),
            reference.position_norms_product(x.double(), g.double(), *as_lists(geometry)),
            cudnn_grads.conv_grad_rounding(*kept, geometry),
        )
        assert float(bound) >= float(formed.square().sum())
    one_sided = torch.tensor([[0.0, worst, 0.0]]).reshape(1, 1, 1, 3)
    lost = reference.conv_sample_grads((x - cut(x, 11)).double(), one_sided.double(), *as_lists(geometry))
    full = reference.position_norms_product(x.double(), one_sided.double(), *as_lists(geometry)).sqrt()
    assert float(lost.abs().sum()) <= cudnn_grads.conv_grad_rounding(x, one_sided, geometry).operands * float(
        full
    )
    # No more than twice what this example loses: the bound is not vacuous.
    assert cudnn_grads.conv_grad_rounding(x, one_sided, geometry).operands * float(full) <= 4.1 * float(
        lost.abs().sum()
    )


# --- the choice of a method ----------------------------------------------------------------------------


def method(spatial, cin, cout, dtype=torch.bfloat16, kernel=3):
    pad = kernel // 2
    geometry = ConvGeometry([kernel] * 2, [1, 1], [pad] * 2, [1, 1], 1)
    return choice.conv_method(torch.device("cpu"), spatial, cin, cout, geometry, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cost_model_on_a_vgg(dtype):
    """As algorithms go on paper: keep what is small and shallow, Gram matrices where positions are few."""
    assert method((32, 32), 3, 64, dtype) == ("instantiate", True)
    assert method((8, 8), 256, 256, dtype) == ("gram", False)
    assert method((4, 4), 512, 512, dtype) == ("gram", False)
    assert method((2, 2), 512, 512, dtype) == ("gram", False)


def test_linear_layers_of_one_position_have_a_closed_form():
    assert choice.linear_method(torch.device("cpu"), 1, 512, 10, torch.float32) == ("gram", False)
    assert choice.linear_method(torch.device("cpu"), 4096, 8, 8, torch.float32).way == "instantiate"


def test_the_committed_table_can_be_read():
    entries = choice.read_table()
    for architecture, rows in entries.items():
        assert architecture.startswith("sm_")
        for kind, entry in rows.items():
            if kind.startswith("conv_weighted_grad "):
                assert entry["backend"] in ("cudnn", "triton")
                continue
            assert kind.split()[0] in ("conv_sample_norms", "linear_sample_norms")
            assert entry["way"] in ("gram", "instantiate")
            assert isinstance(entry["keep"], bool)
            assert entry.get("backend") in (None, "cuda", "triton")


def test_a_measured_class_overrules_the_cost_model(tmp_path, monkeypatch):
    geometry = ConvGeometry([3, 3], [1, 1], [1, 1], [1, 1], 1)
    kind = choice.conv_class((8, 8), 200, 256, geometry, torch.float32)
    assert kind == choice.conv_class((8, 8), 256, 129, geometry, torch.float32)
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"entries": {"sm_90": {kind: {"way": "instantiate", "keep": False}}}}))
    monkeypatch.setattr(choice, "_entries", lambda: choice.read_table(path))
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_90")
    there = torch.device("cuda", 0)
    assert choice.conv_method(there, (8, 8), 200, 256, geometry, torch.float32) == ("instantiate", False)
    assert choice.conv_method(there, (8, 8), 200, 256, geometry, torch.bfloat16) == ("gram", False)


def test_what_runs_where_can_be_printed():
    assert set(describe("cpu").values()) == {"cpp"}
    assert kernels_on("cpu") == "cpp for everything"
    assert set(describe("cpu", "reference").values()) == {"reference"}
    assert "CUDA" in describe("cpu", "cuda")["noisy_step"]


# --- the fused update's numbers on a device ------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: NoiseCorrectedNadam(p, lr=0.1, floor=0.5, absolute_floor=0.01),
        lambda p: DPAdamBC(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
    ],
)
def test_noise_terms_made_on_the_device_are_the_hosts(make):
    def parameters():
        return [nn.Parameter(torch.ones(s)) for s in ((3,), (2, 161))]

    mine, true = parameters(), parameters()
    ours, theirs = make(mine), make(true)
    for step in range(4):
        stds = torch.tensor([0.1 * (step + 1), 0.3], dtype=torch.float64)
        fused, _ = update._fused_step(ours, mine, stds)
        table = step_table(fused)
        expected, _ = update._fused_step(theirs, true, [checked_std(s) for s in stds.tolist()])
        torch.testing.assert_close(table.rules, torch.tensor(expected.rules), rtol=1e-6, atol=0)
        assert table.pointers[:, 0].tolist() == [p.data_ptr() for p in mine]
        if step == 1:
            # A checkpoint in between: the averages come back as tensors of their own.
            ours.load_state_dict(ours.state_dict())
        if step == 2:
            again = step_table(update._fused_step(theirs, true, [0.1, 0.1])[0])
            assert again is not table
            theirs.load_state_dict(ours.state_dict())
            for p in true:
                theirs.state[p]["step"] = ours.state[mine[0]]["step"].clone()


def test_a_table_is_made_once_for_its_parameters():
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))]
    optimizer = torch.optim.SGD(params, lr=0.1)
    first = step_table(update._fused_step(optimizer, params, [0.1, 0.2])[0])
    params[0].grad = torch.ones(5)
    second = step_table(update._fused_step(optimizer, params, [0.3, 0.2])[0])
    assert second is first
    assert first.pointers[0, 1] == params[0].grad.data_ptr()
    assert first.rules[0, 0] == torch.tensor(0.3)
    assert step_table(update._fused_step(optimizer, params[:1], [0.3])[0]) is not first


def test_a_table_is_made_and_written_whatever_the_default_device():
    """`torch.set_default_device("cuda")` is no reason to look for the host's numbers on a GPU."""
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))]
    optimizer = NoiseCorrectedNadam(params, lr=0.1)
    for std in (0.1, 0.2):
        stds = torch.full((2,), std, dtype=torch.float64)
        fused, _ = update._fused_step(optimizer, params, stds)
        with torch.device("meta"):
            table = step_table(fused)
        torch.testing.assert_close(table.rules[:, 0], stds.float())


# --- CUDA C++ -------------------------------------------------------------------------------------------


def test_strides_of_the_two_layouts():
    x = torch.empty(2, 3, 4, 5)
    assert cuda._strides(x) == (60, 20, 1)
    assert cuda._strides(x.contiguous(memory_format=torch.channels_last)) == (60, 1, 3)
    assert cuda._strides(torch.empty(2, 1, 4, 5)) == (20, 20, 1)
    assert cuda._strides(torch.empty(2, 7, 1, 1)) == (7, 1, 1)


@pytest.mark.skipif(
    support.cuda_missing() is not None or torch.cuda.is_available(),
    reason="the launch must get as far as asking for a GPU, and find none",
)
def test_the_bindings_take_what_they_are_handed(monkeypatch):
    monkeypatch.setattr(cuda, "_place", lambda device: (-1, 0))
    monkeypatch.setattr(cuda, "_refused", cuda._refused.__wrapped__)
    x, g = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    pairs = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with pytest.raises(RuntimeError, match="CUDA"):
            cuda.gram(x.to(dtype), g.to(dtype), **pairs, groups=1)
    assert [t.shape for t in cuda.gram(x[:0], g[:0], **pairs, groups=1)] == [(0,), (0,)]
    step = FusedStep([(x, None, None, None)], [0], [(1.0,) * 14])
    with pytest.raises(RuntimeError, match="CUDA"):
        cuda.noisy_step(Key(bytes(32)), 1 << 63, 1, step)


# --- GPUs that are there, and cannot run what we have ---------------------------------------------------

FIRST = Like((2,), torch.float32, torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): as if torch had found such a GPU."""

    def found(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        forget()

    def forget():
        support._older.cache_clear()
        support._runtime_refuses.cache_clear()

    yield found
    monkeypatch.undo()
    forget()


def test_older_gpus_than_the_bounds_speak_of_get_plain_torch(gpu):
    pytest.importorskip("triton", reason="triton is not installed")
    gpu((7, 5))
    for operation in support.OPERATIONS:
        if support.OPERATIONS[operation] != support.DOUBLES:
            assert resolve_backend(operation, "auto", FIRST) == "reference"
    with pytest.raises(RuntimeError, match=r"8\.0"):
        resolve_backend("row_sqnorms", "triton", FIRST)


def test_another_makers_gpus_get_plain_torch(gpu, monkeypatch):
    gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert resolve_backend("conv_sample_norms", "auto", FIRST) == "reference"


def test_a_driver_older_than_the_linked_runtime_leaves_the_triton_kernels(gpu, monkeypatch):
    """ "auto" must not choose kernels whose every launch would fail."""
    pytest.importorskip("triton", reason="triton is not installed")
    answers = {0: "the CUDA runtime says: CUDA driver version is insufficient", 1: ""}
    kernels = SimpleNamespace(device_refusal=answers.get)
    monkeypatch.setattr(support, "_core", SimpleNamespace(CUDA_BUILT=True, cuda=kernels))
    gpu((9, 0))
    assert resolve_backend("noisy_step", "auto", FIRST) == "triton"
    with pytest.raises(RuntimeError, match="driver version is insufficient"):
        resolve_backend("noisy_step", "cuda", FIRST)
    other = FIRST._replace(device=torch.device("cuda", 1))
    assert resolve_backend("noisy_step", "auto", other) == "cuda"


@pytest.mark.skipif(
    support.cuda_missing() is not None or torch.cuda.is_available(), reason="needs CUDA kernels, and no GPU"
)
def test_the_linked_runtime_says_that_there_is_no_gpu():
    assert "the CUDA runtime says" in _core.cuda.device_refusal(0)
