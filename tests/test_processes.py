"""Several processes of torch.distributed train one model as one process would."""

import os
import time

import numpy as np
import pytest
import torch
from scipy import stats
from shared_training import KINDS, go_on, made, numbers, trained
from small_engine import data
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from two_processes import run

from adaclip import PrivacyEngine
from adaclip.clipping import AdaptiveClipping, DCSGDClipping, PerLayerClipping
from adaclip.groups import LabelGroups
from adaclip.processes import Processes
from adaclip.smoothing import NoiseCorrectedNadam, SmoothedLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def several(jobs):
    """[trained(*job) for job in jobs], in this process."""
    return [trained(*job) for job in jobs]


def assert_alike(mine, theirs, tolerance=1e-6):
    for name in ("parameters", "state", "thresholds", "selected"):
        if mine[name] is not None:
            scale = mine[name].abs().max()
            assert (mine[name] - theirs[name]).abs().max() <= tolerance * scale, name
    assert mine["ledger"] == theirs["ledger"]


NOISELESS = {"sigma": 0.0, "momentum": 0.0, "lr": 1.0}
# What is asked of every way to hand over a model.
CASES = {
    "the clipped sum": (1, NOISELESS),
    "noise": (4, {}),
    "uneven micro-batches": (3, {"max_batch_size": 2}),
    "padding": (3, {"pad_to": "auto"}),
    "adaptive": (6, {"clipping": AdaptiveClipping(sigma_b=4.0)}),
    "per layer": (3, {"clipping": "per_layer"}),
    "per parameter": (3, {"clipping": PerLayerClipping(1.0, per_parameter=True)}),
    "histogram": (4, {"clipping": DCSGDClipping(sigma_h=8.0)}),
    "label groups": (3, {"groups": LabelGroups("select", groups=3)}),
    "few samples": (6, {"batch_size": 1}),
    "Adam": (3, {"optimizer": lambda p: torch.optim.Adam(p, lr=0.1)}),
}


@pytest.fixture(scope="module")
def alone():
    """Each case in one process."""
    return {name: trained("plain", *case) for name, case in CASES.items()}


def _cases(kind):
    return several([(kind, *case) for case in CASES.values()])


@pytest.fixture(scope="module", params=KINDS)
def together(request):
    """Each case in two processes: a list of what both have."""
    both = run(_cases, request.param)
    for found in both:
        if isinstance(found, Exception):
            raise found
    return {name: [found[i] for found in both] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(together, alone, case):
    first, second = together[case]
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["thresholds"], second["thresholds"])
    assert_alike(alone[case], first)
    sizes = [sum(found["rows"]) for found in (first, second)]
    assert sum(sizes) == sum(alone[case]["rows"])


def test_some_process_had_nothing(together):
    rows = [found["rows"] for found in together["few samples"]]
    assert any(a == 0 and b > 0 for a, b in zip(*rows, strict=True)) or any(
        a > 0 and b == 0 for a, b in zip(*rows, strict=True)
    )
    assert any(a == b == 0 for a, b in zip(*rows, strict=True))


def _with_nan(kind):
    images, _ = data(40)
    images[3] = float("nan")
    options = {"images": images, "batch_size": 40, "sigma": 0.0}
    return trained(kind, 2, options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_is_not_finite_adds_nothing_to_any(kind):
    alone, both = _with_nan("plain"), run(_with_nan, kind)
    assert_alike(alone, both[0])
    assert alone["parameters"].isfinite().all()
    assert sum(found["non_finite"] for found in both) == alone["non_finite"] == 2


def _released(kind, draws):
    """(sum of squares of what `draws` releases without samples added to the parameters, how many these are)."""
    model = nn.Linear(13, 7)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.ones(20, 13)), batch_size=1),
        noise_multiplier=2.0,
        max_grad_norm=0.5,
    )
    before, total = numbers(optimizer.trained()), 0.0
    for _ in range(draws):
        # A batch without a backward: the step is noise alone.
        next(iter(loader))
        optimizer.step()
        after = numbers(optimizer.trained())
        total += float((after - before).square().sum())
        before = after
    return total, len(before)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_noise_enters_once_in_total(kind):
    draws = 1000
    (total, size), (other, _) = run(_released, kind, draws)
    assert total == other
    # The expected batch size is 1, so each entry's variance is sigma^2 C^2 = 1.
    count = draws * size
    assert 1e-4 < stats.chi2(count).cdf(total) < 1 - 1e-4


def _adaptive(steps):
    _, module, optimizer, loader = made("ddp", clipping=AdaptiveClipping(sigma_b=4.0), noise_generator=None)
    go_on(module, optimizer, loader, steps)
    return optimizer.clipping.history, numbers(module.parameters())


def test_thresholds_stay_equal_to_the_last_bit():
    (first, theta), (second, other) = run(_adaptive, 50)
    assert len(first) == 51
    assert torch.equal(first, second)
    assert torch.equal(theta, other)
    assert len(set(first.tolist())) == 51


def _drawn(steps):
    """uint8 [steps, N]: which examples this process took."""
    x = torch.arange(30)
    _, _, _, loader = made("plain", n=30, batch_size=9, noise_generator=None)
    taken = np.zeros((steps, 30), dtype=np.uint8)
    loader._columns._tensors = (loader._columns._tensors[0], x)
    for t in range(steps):
        batch = next(iter(loader))
        taken[t, batch[1][: loader.current.rows].numpy()] += 1
    return taken


def test_the_union_is_a_poisson_sample():
    steps, q = 2000, 0.3
    first, second = run(_drawn, steps)
    taken = first + second
    assert taken.max() == 1
    # Each example as often as it should, and each pair: chi-squared over both.
    expected = steps * q
    found = ((taken.sum(0) - expected) ** 2 / (expected * (1 - q))).sum()
    assert 1e-4 < stats.chi2(30).cdf(found) < 1 - 1e-4
    sizes = np.bincount(taken.sum(1), minlength=31)
    binomial = stats.binom(30, q).pmf(np.arange(31)) * steps
    usual = binomial >= 5
    found = ((sizes - binomial)[usual] ** 2 / binomial[usual]).sum()
    assert 1e-4 < stats.chi2(usual.sum() - 1).cdf(found) < 1 - 1e-4
    both = int((taken[:, 1:] & taken[:, :-1]).sum())
    assert stats.binomtest(both, steps * 29, q * q).pvalue > 1e-4


def _keys():
    _, _, optimizer, _ = made("plain", noise_generator=None)
    return optimizer.source.key.host, optimizer.source.secure, repr(optimizer.source)


def test_one_secret_key_for_all():
    first, second = run(_keys)
    assert first == second
    assert first[1:] == (True, "NoiseSource(<secret key>)")
    assert run(_keys)[0][0] != first[0]


# --- what goes wrong -------------------------------------------------------------------------------


def _one_raises(where):
    engine, module, optimizer, loader = made("ddp")
    go_on(module, optimizer, loader, 2)
    start = time.monotonic()
    try:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            if dist.get_rank() == 1 and where == "loop":
                raise KeyError("of this process alone")
            if dist.get_rank() == 1 and where == "death":
                os._exit(9)
            if dist.get_rank() == 1 and where == "gradient":
                next(p for p in optimizer.trained()).grad.mul_(2)
            if dist.get_rank() == 1 and where == "skipped":
                break
            optimizer.step()
        if where == "skipped":
            go_on(module, optimizer, loader, 1)
    except Exception as error:
        if where == "loop" and dist.get_rank() == 1:
            raise
        return str(error), time.monotonic() - start, engine.accountant.ledger.steps
    return "went on", 0.0, 0


@pytest.mark.parametrize("where", ["loop", "death"])
def test_the_others_stop_where_one_is_lost(where):
    (message, seconds, steps), other = run(_one_raises, where, timeout=30)
    assert isinstance(other, Exception)
    assert message.startswith("step(): process 0 has lost another one")
    assert "Start all of them again, from the last checkpoint" in message
    assert seconds < 30
    assert steps == 2


def test_nobody_steps_where_one_must_not():
    (message, _, steps), (theirs, _, others) = run(_one_raises, "gradient")
    assert message == "step(): another process could not, and says why; none of them has done it"
    assert "was changed between backward() and step()" in theirs
    assert (steps, others) == (2, 2)


def test_processes_at_different_batches_are_noticed():
    for message, _, steps in run(_one_raises, "skipped"):
        assert "the processes are not at the same point" in message
        assert steps == 2


def _budget():
    engine, module, optimizer, loader = made("plain")
    engine.set_budget(engine_epsilon(3), 1e-5)
    try:
        go_on(module, optimizer, loader, 10)
    except Exception as error:
        return type(error).__name__, engine.accountant.ledger.steps
    return None


def engine_epsilon(steps):
    from adaclip.accounting import create_accountant

    accountant = create_accountant("rdp")
    accountant.step(q=0.25, sigma=1.0, count=steps)
    return accountant.get_epsilon(1e-5) * 1.02


def test_all_stop_at_the_budget():
    first, second = run(_budget)
    assert first == second
    assert first[0] == "PrivacyBudgetExceeded"


def _differing():
    """{what differs: (the error's class, its message)}, of this process."""
    mine = dist.get_rank()
    found = {}
    for name, options in {
        "noise_multiplier": {"sigma": 1.0 + mine},
        "clipping": {"max_grad_norm": 1.0 + mine},
        "size of the data set": {"n": 40 + mine},
        "max_batch_size": {"max_batch_size": 4 + mine},
        "noise_generator": {"noise_generator": 5 + mine},
        "optimizer": {"optimizer": torch.optim.SGD if mine else lambda p: torch.optim.Adam(p, lr=0.1)},
        "a bad argument": {"max_grad_norm": -1.0 if mine else 1.0},
        "nothing": {},
    }.items():
        try:
            made("plain", **options)
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    return found


def test_what_differs_is_refused_by_all():
    both = run(_differing)
    assert both[0].keys() == both[1].keys()
    for rank, found in enumerate(both):
        kind, message = found.pop("a bad argument")
        assert kind == ("ValueError" if rank else "RuntimeError")
        expected = "max_grad_norm must be a positive" if rank else "make_private: another process could not"
        assert message.startswith(expected)
        assert len(found) == 6
        for name, (kind, message) in found.items():
            assert kind == "ValueError"
            assert message.startswith(f"make_private: {name} must be the same in all processes")


def _refused():
    """(message, whether the model was left alone) of each thing that several processes may not do."""
    messages = []

    def refused(make):
        try:
            make()
        except (ValueError, TypeError) as error:
            messages.append(str(error))
        else:
            messages.append("accepted")

    x, _ = data(40)

    def engine_with(sampler, **options):
        model = nn.Linear(36, 3)
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(x.flatten(1)), batch_size=5, sampler=sampler),
            noise_multiplier=1.0,
            **options,
        )

    refused(lambda: engine_with(DistributedSampler(x, num_replicas=3, rank=1)))
    refused(lambda: engine_with(DistributedSampler(x, num_replicas=2, rank=1 - dist.get_rank())))
    refused(lambda: engine_with(None, poisson_sampling=False))
    refused(lambda: made(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), process_group="world"))
    return messages


def test_what_several_processes_may_not_do():
    for rank, messages in enumerate(run(_refused)):
        assert "data_loader's DistributedSampler (1, 3)" in messages[0]
        assert f"data_loader's DistributedSampler ({1 - rank}, 2)" in messages[1]
        assert messages[2].startswith("poisson_sampling must be True for 2 processes")
        assert messages[3].startswith("process_group must be a torch.distributed group")


def test_a_sampler_of_several_processes_in_one():
    x, _ = data(40)
    model = nn.Linear(36, 3)
    with pytest.raises(
        ValueError, match=r"data_loader.sampler must be for this process, 0 of 1, got a Distrib"
    ):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(
                TensorDataset(x.flatten(1)), batch_size=5, sampler=DistributedSampler(x, 2, 1)
            ),
            noise_multiplier=1.0,
        )


def test_no_group_without_torch_distributed():
    assert (Processes().rank, Processes().size) == (0, 1)
    with pytest.raises(ValueError, match=r"process_group must be None where torch\.distributed is not init"):
        Processes("world")


def _distributed_sampler():
    """Expected batch size and sample rate where a DistributedSampler says how data are shared."""
    x, _ = data(40)
    model = nn.Linear(36, 3)
    engine = PrivacyEngine()
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=DistributedDataParallel(model),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x.flatten(1)), batch_size=5, sampler=DistributedSampler(x)),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=1,
    )
    return loader.sample_rate, optimizer.expected_batch_size, optimizer.noise_multiplier


def test_a_distributed_sampler_counts_per_process():
    first, second = run(_distributed_sampler)
    assert first == second
    assert first[:2] == (0.25, 10.0)


# --- checkpoints, wrappers -------------------------------------------------------------------------


def _saved(kind, path, steps):
    engine, module, optimizer, loader = made(
        kind, noise_generator=None, clipping=AdaptiveClipping(sigma_b=4.0)
    )
    go_on(module, optimizer, loader, steps)
    engine.save_checkpoint(path, module=module, optimizer=optimizer, extra={"steps": steps})
    return numbers(module.parameters()), optimizer.clipping.thresholds


def _loaded(kind, path):
    engine, module, optimizer, loader = made(
        kind, noise_generator=None, clipping=AdaptiveClipping(sigma_b=4.0)
    )
    extra = engine.load_checkpoint(path, module=module, optimizer=optimizer)
    theta, thresholds = numbers(module.parameters()), optimizer.clipping.thresholds.clone()
    state = numbers(s["momentum_buffer"] for s in optimizer.state.values())
    go_on(module, optimizer, loader, 2)
    return theta, thresholds, state, extra, engine.accountant.ledger.steps, numbers(module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path, kind):
    path = str(tmp_path / "checkpoint.pt")
    saved = run(_saved, kind, path, 3)
    alone = _loaded("plain", path)
    # Three: one has no row of the smallest layers.
    others = run(_loaded, "ddp" if kind == "fsdp2" else "fsdp2", path, world=3)
    for found in [alone, *others]:
        assert torch.equal(found[0], saved[0][0])
        assert torch.equal(found[1], saved[0][1])
        assert torch.equal(found[2], alone[2])
        assert found[3:5] == ({"steps": 3}, 5)
    assert all(torch.equal(others[0][5], mine[5]) for mine in others)


def _unwritable():
    engine, module, optimizer, loader = made("ddp")
    go_on(module, optimizer, loader, 1)
    try:
        engine.save_checkpoint("/nowhere/at/all", module=module, optimizer=optimizer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_all_learn_that_a_checkpoint_was_not_written():
    first, second = run(_unwritable)
    assert first.startswith("FileNotFoundError")
    assert second.startswith("RuntimeError: save_checkpoint: another process could not")


def _detached():
    engine, module, optimizer, loader = made("ddp")
    go_on(module, optimizer, loader, 1)
    inside = module.require_backward_grad_sync
    engine.detach(module)
    optimizer.original_optimizer.zero_grad()
    x = torch.full((2, 1, 6, 6), float(dist.get_rank()))
    module(x).square().sum().backward()
    return inside, module.module.head.weight.grad


def test_a_detached_model_is_torchs_again():
    (inside, mine), (_, theirs) = run(_detached)
    assert inside is False
    # The wrapper's own reduction is back.
    assert torch.equal(mine, theirs)


def _smoothed():
    return trained(
        "ddp",
        3,
        {
            "smoothing": SmoothedLoss(0.01, signal="always"),
            "optimizer": lambda p: NoiseCorrectedNadam(p, lr=0.05),
        },
    )


def test_smoothing_and_its_optimizers():
    first, second = run(_smoothed)
    assert torch.equal(first["parameters"], second["parameters"])
