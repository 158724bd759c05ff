"""Learning-rate schedulers, state dicts and averages around a private optimizer: as torch's users write them."""

import copy
import warnings

import pytest
import torch
from small_engine import batch_of, data, flat, private, small_model, train
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

from adaclip.smoothing import moving_average
from adaclip.testing import square_loss

STEPS = 4

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.7),
    # Both move the momentum as well.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=STEPS),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 2)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_missing():
    theirs = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type)
        and issubclass(kind, lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and name not in ("LRScheduler", "EPOCH_DEPRECATION_WARNING")
    }
    assert theirs <= SCHEDULERS.keys()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def advance(scheduler):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def rates(optimizer):
    return [(g["lr"], g["momentum"]) for g in optimizer.param_groups]


@pytest.mark.parametrize("made", ["before, on the original", "after, on the original", "after, on ours"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_are_those_of_ordinary_training_and_nothing_warns(name, made):
    plain_model = small_model()
    plain = sgd(plain_model)
    plain_scheduler = SCHEDULERS[name](plain)
    model = small_model()
    original = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](original) if made.startswith("before") else None
        _, model, optimizer, loader = private(model, optimizer=original, sigma=0.5)
        if scheduler is None:
            scheduler = SCHEDULERS[name](original if made.endswith("original") else optimizer)
        for step, (x, y) in enumerate(loader, 1):
            optimizer.zero_grad()
            square_loss(model(x), y).backward()
            before, lr = flat(model), optimizer.param_groups[0]["lr"]
            optimizer.step()
            if step == 1:
                # The rate in the groups is the one that moves the parameters.
                moved = (flat(model) - before).norm()
                momentum = torch.cat(
                    [optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]
                )
                assert moved == pytest.approx(lr * momentum.norm().item(), rel=1e-4)
            advance(scheduler)
            plain.step()
            advance(plain_scheduler)
            assert rates(optimizer) == rates(plain)
    assert step == STEPS


def test_a_scheduler_of_logical_steps_moves_with_the_last_part_of_a_batch():
    """`step` acts where `loader.current.last`; a OneCycleLR of len(loader) steps is stepped there."""
    model = small_model()
    _, model, optimizer, loader = private(model, optimizer=sgd(model), max_batch_size=3)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=len(loader))
    parts = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            optimizer.zero_grad()
            square_loss(model(x), y).backward()
            optimizer.step()
            parts += 1
            if loader.current.last:
                scheduler.step()
    assert parts > len(loader)
    assert scheduler.last_epoch == len(loader) == optimizer.releases


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adagrad])
def test_state_dicts_go_to_an_ordinary_optimizer_and_back(kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model = small_model()
    _, model, optimizer, loader = private(model, optimizer=kind(model.parameters(), lr=0.01, **options))
    train(model, optimizer, loader)
    plain_model = small_model()
    plain_model.load_state_dict(model.state_dict())
    plain = kind(plain_model.parameters(), lr=0.5, **options)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 0.01
    # One more step of both, from the same gradients (the same clipped sum, and no noise), ends at the same place.
    optimizer.noise_multiplier = 0.0
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    plain.step()
    assert torch.allclose(flat(model), flat(plain_model), atol=1e-6)
    optimizer.load_state_dict(plain.state_dict())
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        ours, theirs = optimizer.state[p], plain.state[q]
        assert ours.keys() == theirs.keys()
        assert all(
            torch.allclose(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k]), atol=1e-6) for k in ours
        )
    train(model, optimizer, loader)


@pytest.mark.parametrize("make", [AveragedModel, lambda m: moving_average(m, 0.9)], ids=["swa", "ema"])
def test_averages_of_a_private_model(make):
    _, model, optimizer, loader = private()
    average = make(model)
    history = []
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
        history.append(flat(model))
    if isinstance(average, AveragedModel) and make is AveragedModel:
        assert torch.allclose(flat(average), torch.stack(history).mean(0), atol=1e-6)
    # It is an ordinary model: its gradients are autograd's, and they go into no private sum.
    x, y = data(4)
    square_loss(average.train()(x), y).backward()
    assert all(p.grad is not None for p in average.parameters())
    assert all(p.grad is None for p in model.parameters())
    averaged = flat(average)
    train(model, optimizer, loader)
    assert torch.equal(flat(average), averaged)


def test_a_copy_of_a_private_model_within_a_step():
    """A copy between backward and step leaves the private model's step as it is."""
    one, two = private(), private()
    train(*one[1:])
    _, model, optimizer, loader = two
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        copied = copy.deepcopy(model)
        copied.zero_grad()
        square_loss(copied(x), y).backward()
        optimizer.step()
    assert torch.equal(flat(one[1]), flat(model))


def step_by_closure(model, optimizer, loader):
    for x, y in loader:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = square_loss(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure).isfinite()


@pytest.mark.parametrize("size", [None, 3])
def test_a_closure(size):
    one, two = private(max_batch_size=size), private(max_batch_size=size)
    train(*one[1:])
    step_by_closure(*two[1:])
    assert torch.equal(flat(one[1]), flat(two[1]))


# --- gradient accumulation: one private step is one logical batch ---------------------------------------


def accumulate(model, optimizer, loader, k, criterion=square_loss):
    optimizer.zero_grad()
    for i, (x, y) in enumerate(loader):
        criterion(model(x), y).backward()
        if (i + 1) % k == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 3}, {"poisson_sampling": False}])
@pytest.mark.filterwarnings("ignore:shuffled batches")
def test_accumulating_over_logical_batches_is_refused_with_the_cure(options):
    engine, model, optimizer, loader = private(**options)
    with pytest.raises(RuntimeError, match=r"a batch_size that many times larger.*max_batch_size") as caught:
        accumulate(model, optimizer, loader, 7)
    assert "optimizer.step() after every batch" in str(caught.value)
    assert len(engine.accountant) <= 1


@pytest.mark.filterwarnings("ignore:shuffled batches")
def test_shuffled_batches_in_parts_are_the_whole_batches():
    """What accumulation is for: a large batch in little memory. The loader splits it, and the loop steps always."""
    made = [private(poisson_sampling=False, max_batch_size=size) for size in (None, 3)]
    for _, model, optimizer, loader in made:
        train(model, optimizer, loader, epochs=2)
    (one, *first), (two, *second) = made
    assert torch.allclose(flat(first[0]), flat(second[0]), atol=1e-6)
    assert one.get_epsilon(1e-5) == two.get_epsilon(1e-5)


def test_several_losses_of_one_forward_are_added_up_first():
    _, model, optimizer, loader = private()
    x, y = batch_of(loader)
    out = model(x)
    square_loss(out, y).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"add the losses and call backward\(\) once"):
        out.square().mean().backward()
    optimizer.zero_grad()
    out = model(x)
    (square_loss(out, y) + out.square().sum(1).mean()).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    ],
)
def test_clipping_by_hand_is_refused_with_the_cure(change):
    _, model, optimizer, loader = private()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    change(model)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_"):
        optimizer.step()


def test_the_wrapped_optimizer_does_not_step_by_itself():
    """Its step would apply the clipped sum without noise, and nothing would be booked."""
    model = small_model()
    original = sgd(model)
    engine, model, optimizer, loader = private(model, optimizer=original)
    scheduler = lr_scheduler.StepLR(original, 1)
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match="make_private returned"):
        original.step()
    assert torch.equal(flat(model), before)
    assert len(engine.accountant) == 0
    optimizer.step()
    scheduler.step()
    engine.detach(model)
    square_loss(model(x), y).backward()
    original.step()
