"""16-bit parameters: sums, noise and updates in float32, rounded once into the parameter."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import KEY, private, small_model, train
from torch import nn
from two_processes import run

from adaclip.master import MASTER, float32_parameters, keep_wide_state
from adaclip.noise import STREAM_GRADIENT, NoiseSource, chunks
from adaclip.smoothing import DiSK, DPAdamBC, NoiseCorrectedNadam, SmoothedLoss
from adaclip.testing import square_loss
from adaclip.update import noisy_update

SHORT = [torch.bfloat16, torch.float16]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    # Makes its state when it is constructed, in 16 bits.
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "noise-nadam": lambda p: NoiseCorrectedNadam(p, lr=0.01),
    "adambc": lambda p: DPAdamBC(p, lr=0.01),
    "disk": lambda p: DiSK(p, lr=0.1),
}


def short_parameters(dtype):
    g = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((5, 7), (300,))]


def gradients(step, params):
    g = torch.Generator().manual_seed(step)
    for p in params:
        p.grad_dtype = torch.float32
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_parameter_is_the_rounded_value_of_a_float32_one(backend, name, dtype):
    short = short_parameters(dtype)
    long = [nn.Parameter(p.detach().float()) for p in short]
    source = NoiseSource(KEY)
    both = [(params, OPTIMIZERS[name](params)) for params in (short, long)]
    if name == "adagrad":
        # 0.1 in 16 bits is another number.
        for p, q in zip(short, long, strict=True):
            both[1][1].state[q]["sum"].copy_(both[0][1].state[p]["sum"])
    for step in range(6):
        for params, optimizer in both:
            gradients(step, params)
            noisy_update(optimizer, params, [0.1, 0.2], source, step, backend=backend)
    for p, q in zip(short, long, strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q.to(dtype))
        states = [optimizer.state[k] for k, (_, optimizer) in zip((p, q), both, strict=True)]
        assert torch.equal(states[0].pop(MASTER), q)
        assert states[0].keys() == states[1].keys()
        for key, value in states[1].items():
            assert torch.equal(torch.as_tensor(states[0][key]), torch.as_tensor(value))


@pytest.mark.parametrize("dtype", SHORT)
def test_noise_below_the_parameters_own_steps_is_added_up(dtype):
    """Against a float64 sum of the same noise: nothing is rounded before it is in the sum."""
    (p,) = params = [nn.Parameter(torch.ones(1000, dtype=dtype))]
    optimizer, source = torch.optim.SGD(params, lr=1.0), NoiseSource(KEY)
    std = torch.finfo(dtype).eps / 64
    truth = torch.ones(1000, dtype=torch.float64)
    for step in range(200):
        # No gradient: the step of an empty batch.
        noisy_update(optimizer, params, [std], source, step)
        truth -= source.normal_(torch.empty(1000), step, STREAM_GRADIENT, std).double()
    assert float((optimizer.state[p][MASTER].double() - truth).abs().max()) < 5e-6 < float(truth.std()) / 20
    assert float((p.double() - truth).abs().max()) <= torch.finfo(dtype).eps / 2 * 1.01
    assert len(set(p.tolist())) > 2


def test_updates_that_a_bfloat16_cannot_hold_are_not_lost():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for step in range(100):
        p.grad_dtype, p.grad = torch.float32, torch.full((3,), 1e-3)
        noisy_update(optimizer, [p], [0.0], NoiseSource(KEY), step)
    assert p.tolist() == pytest.approx([0.9] * 3, abs=2e-3)


def test_gradients_of_16_bits_get_their_noise_in_float32():
    (p,) = params = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))]
    optimizer, source = torch.optim.RMSprop(params, lr=1.0), NoiseSource(KEY)
    p.grad = torch.full((1000,), 100.0, dtype=torch.bfloat16)
    noisy_update(optimizer, params, [0.01], source, 0)
    noise = source.normal_(torch.empty(1000), 0, STREAM_GRADIENT, 0.01)
    square = optimizer.state[p]["square_avg"] / 0.01
    assert torch.allclose(square.sqrt(), 100 + noise, rtol=1e-6)
    assert p.grad.dtype == torch.bfloat16
    assert p.grad.unique().tolist() == [100.0]


def test_what_somebody_sets_goes_into_the_master():
    (p,) = params = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimizer, source = torch.optim.SGD(params, lr=1.0), NoiseSource(KEY)
    noisy_update(optimizer, params, [1e-3], source, 0)
    before = optimizer.state[p][MASTER].clone()
    with torch.no_grad():
        p[1] = 5.0
        p[2] = float("nan")
    noisy_update(optimizer, params, [0.0], source, 1)
    master = optimizer.state[p][MASTER]
    assert torch.equal(master[[0, 3]], before[[0, 3]])
    assert master[1] == 5.0
    assert master[2].isnan()


def test_an_error_leaves_16_bit_parameters():
    params = short_parameters(torch.bfloat16)
    optimizer = torch.optim.SGD(params, lr=1.0)
    before = [p.detach().clone() for p in params]
    grads = [torch.ones_like(p) for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad

    def fail():
        with float32_parameters(optimizer, params):
            assert {p.dtype for p in params} == {torch.float32}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for p, was, grad in zip(params, before, grads, strict=True):
        assert torch.equal(p, was)
        assert p.grad is grad


def test_a_bad_argument_changes_nothing():
    params = short_parameters(torch.bfloat16)
    optimizer = torch.optim.Adam(params)
    with pytest.raises(ValueError, match="stds must be one per parameter"):
        noisy_update(optimizer, params, [0.0], NoiseSource(KEY), 0)
    assert not optimizer.state


# --- under the engine ------------------------------------------------------------------------------------


def short_model(dtype=torch.bfloat16):
    return small_model().to(dtype)


def short_train(model, optimizer, loader, dtype=torch.bfloat16):
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(model(x.to(dtype)).float(), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["momentum", "adam", "noise-nadam", "disk"])
def test_a_bfloat16_model_follows_the_float64_update(name):
    """Sum, noise and update again in float64, from the clipped sums that p.grad held."""
    model = short_model()
    _, model, optimizer, loader = private(
        model, optimizer=OPTIMIZERS[name](model.parameters()), max_batch_size=4
    )
    twin = copy.deepcopy(model).double()
    wide = OPTIMIZERS[name](twin.parameters())
    params, twins = list(model.parameters()), list(twin.parameters())
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(model(x.bfloat16()).float(), y).backward()
        info, step = optimizer.batch, optimizer.releases
        sums = [p.grad for p in params]
        assert {g.dtype for g in sums if g is not None} <= {torch.float32}
        sums = [None if g is None else g.double() for g in sums]
        optimizer.step()
        if info.last:
            std, first = 1.0 / optimizer.expected_batch_size, 0
            for p, q, total in zip(params, twins, sums, strict=True):
                noise = NoiseSource(KEY).normal_(torch.empty(p.shape), step, STREAM_GRADIENT, std, first)
                q.grad = noise.double() + (0 if total is None else total)
                first += chunks(p.numel())
            if hasattr(wide, "note_noise"):
                wide.note_noise(twins, [std] * len(twins))
            wide.step()
    assert optimizer.releases > 2
    for p, q in zip(params, twins, strict=True):
        master = optimizer.state[p][MASTER]
        assert torch.equal(p, master.bfloat16())
        assert torch.allclose(master.double(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["momentum", "adam", "noise-nadam"])
def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path, name):
    def make():
        model = short_model()
        return private(model, optimizer=OPTIMIZERS[name](model.parameters()))

    engine, model, optimizer, loader = make()
    short_train(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer)
    other_engine, other, resumed, again = make()
    other_engine.load_checkpoint(tmp_path / "c.pt", module=other, optimizer=resumed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert resumed.state[q][key].dtype == value.dtype
            assert torch.equal(resumed.state[q][key], value)
    for pair in ((model, optimizer, loader), (other, resumed, again)):
        pair[0].eval()
        noisy_update(
            pair[1].original_optimizer,
            pair[1].trained(),
            [0.1] * len(pair[1].trained()),
            NoiseSource(KEY),
            99,
        )
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_detach_gives_a_model_with_gradients_of_its_own_dtype():
    engine, model, optimizer, loader = private(short_model())
    short_train(model, optimizer, loader)
    engine.detach(model)
    x, y = loader.dataset[:4]
    square_loss(model(x.bfloat16()), y.bfloat16()).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("smoothing", [None, SmoothedLoss(tau=0.1, signal="always")], ids=["", "smoothed"])
@pytest.mark.parametrize("name", ["sgd", "disk"])
@pytest.mark.parametrize("dtype", SHORT)
def test_evaluation_points_of_16_bit_parameters(dtype, name, smoothing):
    model = short_model(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    _, model, optimizer, loader = private(model, optimizer=optimizer, smoothing=smoothing)
    before = [p.detach().clone() for p in model.parameters()]
    short_train(model, optimizer, loader, dtype)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, optimizer.state[p][MASTER].to(dtype))
        assert p.isfinite().all()
        assert not torch.equal(p, was)


def test_a_mixed_model_keeps_each_dtype():
    model = small_model()
    model[3:].bfloat16()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model[:3], model[3:]

        def forward(self, x):
            return self.head(self.body(x).bfloat16()).float()

    _, mixed, optimizer, loader = private(Mixed())
    train(mixed, optimizer, loader)
    assert {p.dtype for p in mixed.body.parameters()} == {torch.float32}
    assert {p.dtype for p in mixed.head.parameters()} == {torch.bfloat16}
    assert all(MASTER not in optimizer.state[p] for p in mixed.body.parameters())


@given(
    moves=st.lists(st.sampled_from(["step", "set", "save"]), min_size=1, max_size=8),
    lr=st.floats(1e-6, 10.0),
    std=st.floats(0.0, 1.0),
    dtype=st.sampled_from(SHORT),
)
@settings(max_examples=40, deadline=None)
def test_the_parameter_is_always_the_masters_rounded_value(moves, lr, std, dtype):
    params = short_parameters(dtype)
    optimizer, source = torch.optim.SGD(params, lr=lr, momentum=0.9), NoiseSource(KEY)
    for step, move in enumerate(moves):
        if move == "step":
            noisy_update(optimizer, params, [std] * 2, source, step)
            assert all(torch.equal(p, optimizer.state[p][MASTER].to(dtype)) for p in params)
        elif move == "set":
            with torch.no_grad():
                params[0][step % 5] = step
        else:
            saved = optimizer.state_dict()
            optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
            optimizer.load_state_dict(saved)
            keep_wide_state(optimizer, saved)
        wide = [t for p in params for t in optimizer.state[p].values()]
        assert {t.dtype for t in wide} <= {torch.float32}
    # An element that was set is what the next update starts from.
    before = params[0].detach().clone()
    noisy_update(optimizer, params, [0.0] * 2, source, 99)
    moved = optimizer.state[params[0]][MASTER] + lr * optimizer.state[params[0]]["momentum_buffer"]
    assert bool(
        (
            (moved - before.float()).abs() <= before.float().abs() * torch.finfo(dtype).eps + 1e-4 * (1 + lr)
        ).all()
    )


def a_few_examples():
    model = short_model()
    _, model, optimizer, loader = private(model, n=6, batch_size=1)
    rows = []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            # A loop may leave out the backward of a batch without samples.
            if optimizer.batch.rows:
                square_loss(model(x.bfloat16()).float(), y).backward()
            optimizer.step()
            rows.append(optimizer.batch.rows)
    return [p.detach().float() for p in model.parameters()], rows


def test_two_processes_one_of_them_with_nothing():
    """Its sum is of zeros in float32, as the other's is in float32."""
    (ours, mine), (theirs, others) = run(a_few_examples)
    assert any((a == 0) != (b == 0) for a, b in zip(mine, others, strict=True)), (mine, others)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
