"""Whole private steps through the Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util
from pathlib import Path

import pytest
import torch
from small_engine import KEY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine, backends
from adaclip.clipping import AdaptiveClipping
from adaclip.groups import LabelGroups
from adaclip.noise import NoiseSource
from adaclip.smoothing import NoiseCorrectedNadam, SmoothedLoss
from adaclip.update import noisy_update

CLASSES = 3
EXAMPLES = 16
SIZE = 4


def vgg():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4, CLASSES),
    )


def sgd(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=1e-3)


def nadam(params):
    return NoiseCorrectedNadam(params, lr=0.05, floor=0.5)


def flat():
    return {"max_grad_norm": 0.3}


def adaptive_with_groups():
    groups = LabelGroups("reweight", groups=CLASSES, sigma_s=2.0, sigma_n=2.0)
    return {"clipping": AdaptiveClipping(0.3, sigma_b=1.0), "groups": groups}


def run(backend, device, make_optimizer, options, steps=2, sigma=0.9, model=None):
    """Every step's clipped sums before the noise, and the parameters after it, by name; and the optimizer."""
    model = (vgg() if model is None else model).to(device)
    rng = torch.Generator().manual_seed(5)
    x, y = torch.randn(EXAMPLES, 2, SIZE, SIZE, generator=rng), torch.arange(EXAMPLES) % CLASSES
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=make_optimizer(model.parameters()),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=4),
        noise_multiplier=sigma,
        noise_generator=KEY,
        backend=backend,
        **options(),
    )
    sums, found = [], []
    for step, (images, labels) in enumerate(loader):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        sums.append({n: p.grad.cpu().clone() for n, p in model.named_parameters()})
        optimizer.step()
        found.append({n: p.detach().cpu().clone() for n, p in model.named_parameters()})
        if step + 1 == steps:
            break
    return sums, found, optimizer


def distance(ours, truth):
    """|ours - truth| / |truth|: norms are bounds, so a clipped sum may be shorter by some 1e-6."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


# The interpreter takes seconds for a step.
@pytest.mark.parametrize(
    ("options", "make_optimizer", "steps"), [(flat, sgd, 1), (adaptive_with_groups, nadam, 2)]
)
def test_steps_equal_the_cores(options, make_optimizer, steps, gpu_or_interpreter):
    ours, after, optimizer = run("triton", gpu_or_interpreter, make_optimizer, options, steps)
    theirs, expected, other = run("cpp", torch.device("cpu"), make_optimizer, options, steps)
    for step, (mine, true) in enumerate(zip(ours, theirs, strict=True)):
        for name, total in mine.items():
            # The second step begins at parameters that differ in their last digits.
            assert distance(total, true[name]) <= (1e-5, 1e-4)[step], name
            assert distance(after[step][name], expected[step][name]) <= (1e-5, 1e-4)[step], name
    assert optimizer.max_grad_norm == pytest.approx(other.max_grad_norm, rel=1e-6)
    if optimizer.groups is not None:
        assert optimizer.groups.selected == other.groups.selected


def noise_of_a_step(backend, device):
    """What a step of SGD without gradients moves the parameters by, from 0: the noise itself."""
    params = [nn.Parameter(torch.zeros(s, device=device)) for s in ((7, 3), (401,), ())]
    optimizer = torch.optim.SGD(params, lr=1.0)
    stds = torch.tensor([0.5, 0.1, 2.0], dtype=torch.float64, device=device)
    noisy_update(optimizer, params, stds, NoiseSource(KEY), 7, stream=3, backend=backend)
    return [p.detach().cpu() for p in params]


def test_noise_has_the_cores_bits(gpu_or_interpreter):
    ours = noise_of_a_step("triton", gpu_or_interpreter)
    for mine, core in zip(ours, noise_of_a_step("cpp", torch.device("cpu")), strict=True):
        assert torch.equal(mine, core)


@pytest.mark.parametrize(
    ("dtype", "add"),
    [(torch.float32, False), (torch.float32, True), (torch.float64, True), (torch.bfloat16, False)],
)
def test_filled_tensors_have_the_cores_bits(dtype, add, gpu_or_interpreter):
    for shape in ((0,), (333,), (3, 5, 7)):
        start = torch.ones(shape, dtype=dtype)
        mine, core = (t.transpose(0, -1) for t in (start.to(gpu_or_interpreter), start.clone()))
        where = {"step": (1 << 63) + 5, "stream": 1 << 31, "std": 0.3, "first_chunk": 9, "add": add}
        NoiseSource(KEY).normal_(mine, **where, backend="triton")
        NoiseSource(KEY).normal_(core, **where, backend="cpp")
        assert torch.equal(mine.cpu(), core)


def test_smoothing_moves_the_parameters_alike(gpu_or_interpreter):
    def smoothed():
        return {"max_grad_norm": 0.3, "smoothing": SmoothedLoss(tau=0.1, signal="always", refresh=2)}

    def one_layer():
        torch.manual_seed(4)
        return nn.Sequential(nn.Flatten(), nn.Linear(2 * SIZE * SIZE, CLASSES))

    found = []
    for backend, device in (("triton", gpu_or_interpreter), ("cpp", torch.device("cpu"))):
        sums, after, _ = run(backend, device, sgd, smoothed, model=one_layer(), sigma=0.0)
        found.append((sums[1], after[1]))
    for mine, core in zip(*found, strict=True):
        assert all(distance(mine[name], core[name]) <= 1e-5 for name in core)


def test_views_are_summed_inside_the_norm(gpu_or_interpreter):
    """Convolutions see views as an axis of their own, which the kernels do not have."""

    def two_views():
        return {"max_grad_norm": 0.1, "views_per_sample": 2, "augmentation": "flip"}

    device = gpu_or_interpreter
    found = []
    for backend, where in (("triton", device), ("cpp", torch.device("cpu"))):
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(16, CLASSES))
        torch.manual_seed(2)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        sums, _, _ = run(backend, where, sgd, two_views, steps=1, sigma=0.0, model=model)
        found.append(sums[0])
    for name, total in found[0].items():
        assert distance(total, found[1][name]) <= 1e-5, name


def test_a_named_backend_that_cannot_run_says_why(monkeypatch):
    x = torch.zeros(1, 2, 3, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run row_sqnorms: .*CUDA GPU"):
        backends.resolve_backend("row_sqnorms", "triton", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.resolve_backend("row_sqnorms", "triton", x) == "triton"
    with pytest.raises(RuntimeError, match=r"got torch\.float64"):
        backends.resolve_backend("row_sqnorms", "triton", x.double())
    with pytest.raises(RuntimeError, match="three-dimensional"):
        backends.resolve_backend("conv_sample_norms", "triton", x, planar=False)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run noisy_step"):
        backends.resolve_backend("noisy_step", "cuda", x)
    with pytest.raises(RuntimeError, match=r"got torch\.float32 on meta"):
        backends.resolve_backend("row_sqnorms", "cpp", x.to("meta"))
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.check_backend("tritn")


def test_the_interpreter_is_never_chosen_by_itself(gpu_or_interpreter):
    assert set(backends.describe("cpu").values()) == {"cpp"}


def test_what_tuning_measures_is_checked_first(gpu_or_interpreter):
    path = Path(__file__).parents[1] / "bench" / "tune_backends.py"
    spec = importlib.util.spec_from_file_location("tune_backends", path)
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    rng = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, c, 4, 4, generator=rng).to(gpu_or_interpreter) for c in (1, 3))
    factors = torch.tensor([0.5, 1.0], device=gpu_or_interpreter)
    assert tune.sums(x, g, factors).keys() == {"cudnn"}
    short = x.bfloat16(), g.bfloat16(), factors
    summed = {name: weigh() for name, weigh in tune.sums(*short).items()}
    assert summed.keys() == {"cudnn", "triton"}
    for name, total in summed.items():
        assert tune.wrong_sum(name, total, *short) is None
        assert tune.wrong_sum(name, 1.01 * total, *short).startswith("the sum is off by")
    found = tune.ways(x, g, factors, tune.sums(x, g, factors)["cudnn"])
    assert {"triton gram", "instantiate", "keep"} <= found.keys()
    made = []
    for name, (entry, norms, whole) in found.items():
        assert tune.wrong(norms(), x, g) is None, name
        assert tune.wrong(0.9 * norms(), x, g).startswith("norms are below")
        assert tune.wrong(1.2 * norms(), x, g).startswith("norms are above")
        assert entry["keep"] == (name == "keep")
        made.append(whole())
    for total in made[1:]:
        torch.testing.assert_close(total, made[0], rtol=1e-4, atol=1e-4)
