"""Hugging Face Accelerate, by `adaclip.integrations.accelerate.prepare` and by hand."""

import warnings

import pytest
import torch
from small_engine import KEY, data, flat, private, small_model, train
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyBudgetExceeded, PrivacyEngine
from adaclip.clipping import AdaptiveClipping
from adaclip.testing import square_loss

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from adaclip.integrations.accelerate import prepare  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator(**options):
    return accelerate.Accelerator(cpu=True, **options)


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=10)


def prepared(made, engine=None, **options):
    engine = PrivacyEngine() if engine is None else engine
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"noise_multiplier": 1.0, "noise_generator": KEY, **options}
    if "target_epsilon" in options:
        del options["noise_multiplier"]
    return engine, *prepare(made, engine, module=model, optimizer=optimizer, data_loader=loader(), **options)


def loop(made, model, optimizer, loader, schedule=None, epochs=1):
    rates = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            made.backward(square_loss(model(x), y))
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return rates


@pytest.mark.parametrize("size", [None, 3])
def test_the_loop_is_the_plain_one(size):
    made = accelerator()
    engine, model, optimizer, batches = prepared(made, max_batch_size=size)
    schedule = made.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = loop(made, model, optimizer, batches, schedule)
    plain_engine, plain_model, plain_optimizer, plain_batches = private(max_batch_size=size)
    plain_schedule = torch.optim.lr_scheduler.ExponentialLR(plain_optimizer, 0.9)
    for x, y in plain_batches:
        plain_optimizer.zero_grad()
        square_loss(plain_model(x), y).backward()
        plain_optimizer.step()
        if plain_batches.current.last:
            plain_schedule.step()
    assert torch.equal(flat(model), flat(plain_model))
    assert engine.accountant.history == plain_engine.accountant.history
    assert list(dict.fromkeys(rates)) == [pytest.approx(0.1 * 0.9**i) for i in range(4)]
    assert len(batches) == 4
    assert batches.sample_rate == 0.25


def test_without_the_function_make_private_comes_first():
    made = accelerator()
    _, model, optimizer, batches = private()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, batches, schedule = made.prepare(model, optimizer, batches, schedule)
    loop(made, model, optimizer, batches, schedule)
    plain = private()
    schedule = torch.optim.lr_scheduler.ExponentialLR(plain[2], 0.9)
    for x, y in plain[3]:
        plain[2].zero_grad()
        square_loss(plain[1](x), y).backward()
        plain[2].step()
        schedule.step()
    assert torch.equal(flat(model), flat(plain[1]))


def test_what_is_prepared_already_is_refused_with_the_cure():
    made = accelerator()
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, wrapped, batches = made.prepare(model, optimizer, loader())
    options = {"noise_multiplier": 1.0}
    with pytest.raises(
        TypeError, match=r"AcceleratedOptimizer around it: give make_private the plain optimizer"
    ):
        PrivacyEngine().make_private(module=model, optimizer=wrapped, data_loader=loader(), **options)
    with pytest.raises(ValueError, match=r"DataLoaderShard.*Give make_private the plain DataLoader"):
        PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=batches, **options)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_bf16_is_autocast():
    made = accelerator(mixed_precision="bf16")
    _, model, optimizer, batches = prepared(made, noise_multiplier=0.0)
    dtypes = []
    model[0].register_forward_hook(lambda m, inputs, out: dtypes.append(out.dtype))
    loop(made, model, optimizer, batches)
    assert set(dtypes) == {torch.bfloat16}
    full = private(sigma=0.0)
    train(*full[1:])
    assert torch.allclose(flat(model), flat(full[1]), atol=2e-3)
    assert not torch.equal(flat(model), flat(full[1]))


def test_the_budget_holds():
    made = accelerator()
    engine, model, optimizer, batches = prepared(made, target_epsilon=3.0, target_delta=1e-5, epochs=1)
    loop(made, model, optimizer, batches)
    assert not engine.can_step()
    with pytest.raises(PrivacyBudgetExceeded):
        loop(made, model, optimizer, batches)
    assert engine.get_epsilon(1e-5) <= 3.0


def test_accelerates_checkpoints_carry_the_ledger(tmp_path):
    made = accelerator()
    engine, model, optimizer, batches = prepared(made, clipping=AdaptiveClipping(1.0, sigma_b=5.0))
    loop(made, model, optimizer, batches)
    made.save_state(tmp_path / "state")
    thresholds = optimizer.optimizer.clipping.thresholds.clone()
    kept = flat(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    made = accelerator()
    other, model, optimizer, batches = prepared(
        made, clipping=AdaptiveClipping(1.0, sigma_b=5.0), noise_generator=bytes(32)
    )
    made.load_state(tmp_path / "state")
    assert torch.equal(flat(model), kept)
    assert torch.equal(optimizer.optimizer.clipping.thresholds, thresholds)
    assert other.accountant.history == engine.accountant.history
    loop(made, model, optimizer, batches)
    assert len(other.accountant) == 8


def test_a_state_of_another_set_up_is_refused(tmp_path):
    made = accelerator()
    _, model, optimizer, batches = prepared(made)
    loop(made, model, optimizer, batches)
    made.save_state(tmp_path / "state")
    AcceleratorState._reset_state(reset_partial_state=True)
    made = accelerator()
    prepared(made, noise_multiplier=0.5)
    with pytest.raises(ValueError, match="noise_multiplier must be the checkpoint's"):
        made.load_state(tmp_path / "state")


def test_accumulation_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps must be 1, got 4.*max_batch_size"):
        prepared(accelerator(gradient_accumulation_steps=4))


def test_clipping_by_the_accelerator_is_refused_with_the_cure():
    made = accelerator()
    engine, model, optimizer, batches = prepared(made)
    x, y = next(iter(batches))
    made.backward(square_loss(model(x), y))
    made.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="clipped already, one sample at a time"):
        optimizer.step()
    assert len(engine.accountant) == 0
