"""Cases of what make_private is given: strategies, groups, schedules, smoothing, keys, loaders, models; and of
adaclip.functional."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from fuzz.bounds import attempt
from fuzz.values import PLAIN, arguments, changed, mostly
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from adaclip import clipping, fix, functional, models, schedules, smoothing, validate
from adaclip.clipping import Setting
from adaclip.epochs import EpochLoader
from adaclip.groups import LabelGroups
from adaclip.noise import NoiseSource
from adaclip.sampler import PoissonLoader

NORM = st.floats(1e-3, 1e3) | st.sampled_from([1e-30, 1.0, 1e30])
_FRACTION = st.floats(0.01, 0.99)
_FLAG = st.booleans()
_SMALL = st.integers(1, 5)


def _like(draw: Any, state: Any) -> Any:
    """A strategy's state with something changed, tensors as leaves."""
    tensors = st.sampled_from(
        [
            torch.zeros(1, dtype=torch.float64),
            torch.full((1,), math.nan, dtype=torch.float64),
            torch.full((3,), -1.0, dtype=torch.float64),
            torch.zeros(2, 1),
            torch.tensor(7),
        ]
    )
    return changed(draw, state, PLAIN | tensors)


def _check_thresholds(strategy: Any) -> None:
    assert bool(((strategy.thresholds > 0) & strategy.thresholds.isfinite()).all())


def strategies(draw: Any) -> str:
    """Clipping strategies: made, bound to a model, given a state."""
    schedule = st.just(schedules.Linear(1.0, 0.5, 10))
    norms = NORM | st.lists(NORM, min_size=1, max_size=3)
    optional = st.none() | NORM
    kind, valid = draw(
        st.sampled_from(
            [
                (clipping.FlatClipping, {"max_grad_norm": NORM, "schedule": schedule}),
                (
                    clipping.PerLayerClipping,
                    {
                        "max_grad_norm": norms,
                        "allocation": st.sampled_from(["threshold", "equal"]),
                        "quantile": st.none() | _FRACTION,
                        "rate": NORM,
                        "sigma_b": optional,
                        "accelerate": _FLAG,
                    },
                ),
                (
                    clipping.AdaptiveClipping,
                    {
                        "max_grad_norm": NORM,
                        "quantile": _FRACTION,
                        "rate": NORM,
                        "sigma_b": optional,
                        "accelerate": _FLAG,
                    },
                ),
                (clipping.AutomaticClipping, {"max_grad_norm": NORM, "stability": NORM}),
                (clipping.PSACClipping, {"max_grad_norm": NORM, "r": NORM}),
                (
                    clipping.DCSGDClipping,
                    {
                        "max_grad_norm": NORM,
                        "criterion": st.sampled_from(["percentile", "error"]),
                        "percentile": _FRACTION,
                        "bins": st.integers(4, 50),
                        "sigma_h": optional,
                        "memory": st.floats(0, 0.99),
                    },
                ),
                (
                    clipping.make_clipping,
                    {
                        "clipping_": st.sampled_from(["flat", "per_layer", "adaptive", "dc_sgd", "psac"]),
                        "max_grad_norm_": st.none() | norms,
                    },
                ),
            ]
        )
    )
    how, strategy = attempt(lambda: kind(**arguments(draw, **valid)))
    if how != "ok":
        return f"{how}"
    setting = Setting(2, (30, 4), 10.0, torch.device("cpu"))
    how, groups = attempt(lambda: strategy.bind(setting))
    if how != "ok":
        return f"bind: {how}"
    assert groups in (1, 2)
    assert strategy.thresholds.shape == (groups,)
    _check_thresholds(strategy)
    strategy.begin(0)
    before = strategy.state_dict()
    state = _like(draw, before)
    how, _ = attempt(lambda: strategy.check_state(state))
    if how == "ok":
        strategy.load_state_dict(state)
        _check_thresholds(strategy)
    else:
        assert repr(before) == repr(strategy.state_dict())
    return f"state: {how}"


def groups(draw: Any) -> str:
    """Label groups: made, given labels and a state."""
    tables = st.lists(st.integers(0, 3), max_size=5) | st.dictionaries(
        st.integers(0, 3), st.integers(0, 2), max_size=3
    )
    how, made = attempt(
        lambda: LabelGroups(
            **arguments(
                draw,
                use=st.sampled_from(["report", "reweight", "select"]),
                groups_=_SMALL | tables,
                sigma_s=NORM,
                sigma_n=NORM,
                floor=st.none() | NORM,
                weight=_FRACTION,
                memory=_FRACTION,
                diagnostics=_FLAG,
            )
        )
    )
    if how != "ok":
        return how
    made.bind(Setting(1, (3,), 10.0, torch.device("cpu")))
    labels = torch.tensor(draw(st.lists(st.integers(-2, 6), max_size=4)), dtype=torch.int64)
    attempt(lambda: made.weights(labels, draw(st.integers(0, 4))))
    state = _like(draw, made.state_dict())
    how, _ = attempt(lambda: made.check_state(state))
    if how == "ok":
        made.load_state_dict(state)
    return f"state: {how}"


def noise_schedules(draw: Any) -> str:
    """Schedules: made, asked, described and made again."""
    kind = draw(
        st.sampled_from([schedules.Linear, schedules.Exponential, schedules.Cosine, schedules.Piecewise])
    )
    factor = st.floats(1e-3, 1e3)
    if kind is schedules.Piecewise:
        pieces = st.lists(st.tuples(st.integers(0, 20), factor), max_size=3).map(lambda p: [(0, 1.0), *p])
        how, made = attempt(lambda: kind(**arguments(draw, pieces_=pieces)))
    else:
        how, made = attempt(
            lambda: kind(**arguments(draw, start_=factor, end_=factor, steps_=st.integers(1, 50)))
        )
    if how != "ok":
        return how
    t = draw(mostly(st.integers(0, 60)))
    asked, value = attempt(lambda: made(t))
    assert asked != "ok" or 0 < value < math.inf
    assert schedules.schedule_from_dict(made.state_dict()) == made
    state = changed(draw, made.state_dict())
    how, _ = attempt(lambda: schedules.schedule_from_dict(state))
    return f"{asked}, from_dict: {how}"


def optimizers(draw: Any) -> str:
    """Optimizers for noisy gradients, the smoothed loss, the moving average."""
    rate, betas = st.floats(0, 1), st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))
    model = nn.Linear(2, 1)
    params = st.just(list(model.parameters())) | st.just([{"params": list(model.parameters()), "lr": 0.1}])
    kind, valid = draw(
        st.sampled_from(
            [
                (
                    smoothing.SmoothedLoss,
                    {
                        "tau": rate,
                        "signal": st.sampled_from(["snr", "plateau", "always"]),
                        "threshold": NORM,
                        "every": _SMALL,
                        "decay": _FRACTION,
                        "refresh": _SMALL,
                    },
                ),
                (smoothing.moving_average, {"model_": st.just(model), "decay_": _FRACTION}),
                (
                    smoothing.DPAdamBC,
                    {
                        "params_": params,
                        "lr": rate,
                        "betas": betas,
                        "gamma": NORM,
                        "weight_decay": rate,
                        "noise_std": rate,
                    },
                ),
                (
                    smoothing.DiSK,
                    {
                        "params_": params,
                        "lr_": rate,
                        "kappa": _FRACTION,
                        "weight_decay": rate,
                        "lookahead": _FLAG,
                    },
                ),
                (
                    smoothing.NoiseCorrectedNadam,
                    {
                        "params_": params,
                        "lr": rate,
                        "betas": betas,
                        "eps": NORM,
                        "weight_decay": rate,
                        "noise_std": rate,
                        "floor": NORM,
                        "absolute_floor": rate,
                        "nesterov": _FLAG,
                    },
                ),
            ]
        )
    )
    given = arguments(draw, **valid)
    # What torch's own base class says of parameters is torch's to say.
    how, made = attempt(lambda: kind(**given), deliberate=_is_params(given.get("params", model)))
    # Numbers beyond float32 are torch's to refuse.
    options = made.param_groups[0].values() if isinstance(made, torch.optim.Optimizer) else ()
    if options and not any(isinstance(v, (int, float)) and v > 1e30 for v in options):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        made.step()
    return f"{kind.__name__}: {how}"


def _is_params(value: Any) -> bool:
    return isinstance(value, nn.Module) or (
        isinstance(value, list) and bool(value) and not isinstance(value[0], float)
    )


def noise_sources(draw: Any) -> str:
    """Keys, and what is drawn with them; a tensor is unchanged by what is refused."""
    key = st.none() | st.just(bytes(32)) | st.integers(0, 2**256 - 1) | st.builds(torch.Generator)
    how, source = attempt(lambda: NoiseSource(**arguments(draw, key=key)))
    if how != "ok":
        return f"key: {how}"
    step, stream = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
    if draw(st.booleans()):
        given = arguments(draw, n_=st.integers(0, 3000), q_=st.floats(0, 1), step_=step, stream=stream)
        if isinstance(given["n"], int) and 10**7 < given["n"] <= 2**35:
            return "n of many gigabytes"
        how, taken = attempt(lambda: source.bernoulli(**given))
        assert how != "ok" or (
            len(taken) <= given["n"] and (len(taken) < 2 or (taken[1:] > taken[:-1]).all())
        )
        return f"bernoulli: {how}"
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(
        st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    )
    tensor = torch.ones(shape, dtype=dtype)
    given = arguments(
        draw,
        tensor_=st.just(tensor),
        step_=step,
        stream=stream,
        std=NORM,
        first_chunk=_SMALL,
        add=_FLAG,
        backend=st.sampled_from(["auto", "reference", "cpp"]),
    )
    how, _ = attempt(lambda: source.normal_(**given))
    assert how == "ok" or bool((tensor == 1).all())
    return f"normal_: {how}"


_GRADS = st.sampled_from(
    [
        lambda: torch.randn(3, 4),
        lambda: torch.randn(0, 4),
        lambda: torch.randn(2, 0),
        lambda: torch.randn(2),
        lambda: torch.randn(3, 2, 2, dtype=torch.float64),
        lambda: torch.randn(3, 4, dtype=torch.bfloat16),
        lambda: torch.randn(3, 4, dtype=torch.float16) * math.inf,
        lambda: torch.full((3, 5), math.nan),
        lambda: torch.randn(4, 3).t(),
        lambda: torch.randn(1, 4).expand(3, 4),
        lambda: torch.randn(6, 4)[::2, 1:],
        lambda: torch.randn(3, 4, requires_grad=True),
        lambda: [torch.randn(3, 4), torch.randn(3, 2, 2)],
        lambda: (torch.randn(3, 4), torch.randn(2, 4)),
        lambda: {"a": torch.randn(3), "b": torch.randn(3, 1)},
        lambda: torch.randn(3, 4).to_sparse(),
        lambda: torch.ones(3, 4, dtype=torch.int32),
        lambda: torch.ones(3, 4, dtype=torch.complex64),
        lambda: torch.empty(3, 4, device="meta"),
        lambda: [torch.randn(3, 4), None],
    ]
).map(lambda make: make())


def functionals(draw: Any) -> str:
    """adaclip.functional; without noise, what is released is no longer than C times the samples."""
    which = draw(
        st.sampled_from(
            ["clip_and_noise", "clip_and_noise", "clip_factors", "sample_sqnorms", "weighted_sum"]
        )
    )
    if which == "clip_factors":
        norms = st.sampled_from(
            [torch.tensor([0.0, 1.0, math.inf, math.nan, -3.0], dtype=torch.float64), torch.ones(0)]
        )
        given = arguments(draw, norms_=norms, max_grad_norm_=NORM)
        how, factors = attempt(lambda: functional.clip_factors(**given))
        assert how != "ok" or bool(((factors >= 0) & (factors <= 1)).all())
        return f"{which}: {how}"
    if which == "sample_sqnorms":
        how, _ = attempt(lambda: functional.sample_sqnorms(**arguments(draw, per_sample_grads_=_GRADS)))
        return f"{which}: {how}"
    if which == "weighted_sum":
        factors = st.sampled_from(
            [torch.ones(3), torch.zeros(3, dtype=torch.float64), torch.ones(0), torch.ones(3, 1)]
        )
        how, _ = attempt(lambda: functional.weighted_sum(**arguments(draw, x_=_GRADS, factors_=factors)))
        return f"{which}: {how}"
    given = arguments(
        draw,
        per_sample_grads_=_GRADS,
        max_grad_norm_=NORM,
        noise_multiplier_=st.sampled_from([0.0, 0.0, 1.0, 1e-30]),
        denominator=st.none() | st.just(2.0),
        source=st.none() | st.integers(0, 9) | st.just(bytes(32)),
        step=st.integers(0, 2**64 - 1),
        stream=st.integers(0, 2**32 - 1),
        return_norms=_FLAG,
    )
    before = (
        copy.deepcopy(given["per_sample_grads"])
        if isinstance(given["per_sample_grads"], torch.Tensor) and given["per_sample_grads"].is_leaf
        else None
    )
    how, made = attempt(lambda: functional.clip_and_noise(**given))
    if before is not None and before.device.type == "cpu" and not before.is_sparse:
        assert torch.equal(before.nan_to_num(), given["per_sample_grads"].nan_to_num())
    if how == "ok" and given["noise_multiplier"] == 0 and given.get("denominator") in (None, 2.0):
        released = made[0] if given.get("return_norms") else made
        parts = (
            [released]
            if isinstance(released, torch.Tensor)
            else list(released.values() if isinstance(released, dict) else released)
        )
        length = math.sqrt(sum(float(p.double().square().sum()) for p in parts))
        assert not math.isnan(length)
        assert length <= 3 * given["max_grad_norm"] * 1.01 or given["max_grad_norm"] < 1e-20
    return f"{which}: {how}"


class _Endless(IterableDataset):
    def __iter__(self):
        return iter([1])


def loaders(draw: Any) -> str:
    """Private loaders: made, and two batches of them."""
    x, y = torch.randn(12, 2), torch.arange(12)
    data = st.sampled_from([TensorDataset(x, y), (x, y), x, [x], list(zip(x, y, strict=True))])
    rows = st.none() | st.integers(1, 12)
    options = {
        "max_batch_size": rows,
        "pad_to": rows | st.just("auto"),
        "views": st.just(1) | _SMALL,
        "augmentation": st.none(),
    }
    if draw(st.booleans()):
        given = arguments(
            draw, dataset_=data, sample_rate_=st.floats(0.05, 1), steps_per_epoch=st.integers(1, 3), **options,
            rank=st.just(0), world_size=st.integers(1, 3), num_workers=st.just(0), pin_memory=st.just(False),
            timeout=st.just(0), source=st.builds(NoiseSource),
        )  # fmt: skip
        if isinstance(given.get("num_workers"), int) and given["num_workers"] > 0:
            return "worker processes"
        how, made = attempt(lambda: PoissonLoader(**given))
    else:
        base = st.sampled_from(
            [
                DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
                DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True),
                DataLoader(TensorDataset(x, y), batch_size=None),
                DataLoader(_Endless(), batch_size=2),
                DataLoader(TensorDataset(x, y), batch_size=40),
            ]
        )
        how, made = attempt(lambda: EpochLoader(**arguments(draw, data_loader_=base, **options)))
    if how != "ok":
        return how

    def two() -> None:
        for i, _ in enumerate(made):
            assert made.current.rows <= made.current.padded_rows
            if i == 1:
                break

    if max(made.max_batch_size or 0, made.pad_to or 0, made.views) > 10**6:
        return "a batch of gigabytes"
    used, _ = attempt(two)
    state = changed(draw, made.state_dict())
    loaded, _ = attempt(lambda: made.load_state_dict(state))
    return f"batches: {used}, state: {loaded}"


_MODULES = st.sampled_from(
    [
        lambda: nn.Linear(2, 1),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        lambda: nn.BatchNorm1d(3),
        lambda: nn.LazyLinear(3),
        lambda: nn.Sequential(),
        lambda: nn.ModuleDict({"a": nn.InstanceNorm2d(2, track_running_stats=True)}),
        lambda: nn.LSTM(2, 3),
        lambda: nn.Embedding(3, 2, max_norm=1.0, sparse=True),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
        lambda: nn.Flatten(0),
        lambda: nn.Softmax(0),
    ]
).map(lambda make: make())


def modules(draw: Any) -> str:
    """validate and fix on any module; models by name."""
    if draw(st.booleans()):
        model = draw(mostly(_MODULES))
        how, problems = attempt(lambda: validate(model))
        assert how != "ok" or all(isinstance(p, str) for p in problems)
        fixed, made = attempt(lambda: fix(model))
        if fixed == "ok":
            assert made is not model
            assert not any("adaclip.fix" in p for p in validate(made))
        return f"validate: {how}, fix: {fixed}"
    given = arguments(
        draw,
        name_=st.sampled_from(["vgg-mini", "vgg-mini", "vgg-small", "vgg11"]),
        num_classes_=st.integers(2, 12),
        in_channels=st.sampled_from([1, 3]),
        image_size=st.sampled_from([8, 28, 32, (32, 40)]),
        norm=st.sampled_from(["group", "none"]),
        groups=st.none() | st.integers(1, 16),
        weight_standardization=st.none() | _FLAG,
        head=st.sampled_from(["pool", "pool", "fc"]),
        fc_width=st.none() | st.integers(1, 64),
        dropout=st.floats(0, 0.9),
        width=st.integers(1, 16),
        activation=st.sampled_from(["relu", "tanh", "gelu"]),
        plan=st.none() | st.lists(st.integers(1, 8) | st.just("M"), max_size=5),
    )
    given.setdefault("width", 4)
    how, made = attempt(lambda: models.build(**given))
    if how == "ok":
        assert sum(p.numel() for p in made.parameters()) > 0
        assert models.build(**made.config).config == made.config
    return f"build: {how}"


TARGETS = {
    "strategies": (strategies, 4),
    "groups": (groups, 3),
    "schedules": (noise_schedules, 3),
    "optimizers": (optimizers, 3),
    "noise_sources": (noise_sources, 4),
    "functionals": (functionals, 4),
    "loaders": (loaders, 3),
    "modules": (modules, 2),
}
