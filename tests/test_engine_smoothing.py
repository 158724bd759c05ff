"""Smoothing under a private engine: where gradients are taken, what is released, what comes back."""

import copy
import functools

import pytest
import torch
from small_engine import batch_of, data, flat, private, small_model, train
from torch import nn

from adaclip.clipping import AdaptiveClipping
from adaclip.models import build
from adaclip.smoothing import DiSK, DPAdamBC, NoiseCorrectedNadam, SmoothedLoss
from adaclip.testing import clipped_sum, relative_error, sample_grads, square_loss

ADAPTIVE = functools.partial(AdaptiveClipping, sigma_b=2.0)
ALWAYS = SmoothedLoss(tau=0.2, signal="always")


def _twin(model):
    """An ordinary model with the weights as they are at this moment."""
    return copy.deepcopy(model)


def _step_with_points(model, optimizer, loader):
    """One logical step; returns the weights that each physical batch had, and the sum before it was released."""
    points = []
    for x, y in loader:
        optimizer.zero_grad()
        points.append(flat(model))
        square_loss(model(x), y).backward()
        last = loader.current.last
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        if last:
            return points, grads
    raise AssertionError("no logical batch ended")


def test_the_sum_is_clipped_at_the_point_and_moves_the_parameters():
    model = small_model()
    start = flat(model)
    *_, optimizer, loader = private(model, sigma=0.0, lr=0.1, batch_size=40, smoothing=ALWAYS)
    x, y = batch_of(loader)
    at = _twin(model)
    assert not torch.equal(flat(at), start)
    square_loss(model(x), y).backward()
    truth = clipped_sum(sample_grads(at, *data(), square_loss), 1.0)
    for n, p in model.named_parameters():
        assert relative_error(p.grad.double() * 40, truth[n]) < 1e-5
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    # Exactly clipped SGD from the parameters, not from the point.
    assert torch.equal(flat(model), start - 0.1 * grads)


def test_micro_batches_share_the_point_and_the_sum():
    sums = []
    for size in (None, 7):
        model = small_model()
        *_, optimizer, loader = private(model, batch_size=40, max_batch_size=size, smoothing=ALWAYS)
        points, grads = _step_with_points(model, optimizer, loader)
        assert len(points) == (1 if size is None else 6)
        assert all(torch.equal(p, points[0]) for p in points)
        sums.append((points[0], *grads))
    assert torch.equal(sums[0][0], sums[1][0])
    for whole, parts in zip(*sums, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_the_point_does_not_depend_on_the_batch():
    # One example more or less, and a batch that is empty, have their gradients at the same weights.
    points = []
    for n, batch_size in ((40, 40), (39, 39), (40, 1)):
        model = small_model()
        *_, optimizer, loader = private(model, n=n, batch_size=batch_size, smoothing=ALWAYS)
        points.append(_step_with_points(model, optimizer, loader)[0][0])
    assert torch.equal(points[0], points[1])
    assert torch.equal(points[0], points[2])


def test_standardized_weights_are_read_at_the_point_to_the_end():
    torch.manual_seed(0)
    model = build("vgg-mini", num_classes=3, in_channels=1, image_size=8, plan=[4, "M"], groups=2)
    *_, optimizer, loader = private(model, n=6, batch_size=6, sigma=0.0, smoothing=ALWAYS)
    x, y = data(6)
    images = nn.functional.interpolate(x, 8)

    for _ in loader:
        at = _twin(model)
        square_loss(model(images), y).backward()
        truth = clipped_sum(sample_grads(at, images, y, square_loss), 1.0)
        for name, p in model.named_parameters():
            assert relative_error(p.grad.double() * 6, truth[name]) < 1e-4
        optimizer.step()


def test_whoever_looks_between_batches_sees_the_parameters(tmp_path):
    model = small_model()
    engine, _, optimizer, loader = private(model, batch_size=40, max_batch_size=10, smoothing=ALWAYS)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x, _ = data()
    plain = _twin(model).eval()(x)
    for i, (a, b) in enumerate(loader):
        there = flat(model)
        square_loss(model(a), b).backward()
        saved = model.state_dict()
        assert all(torch.equal(saved[n], v) for n, v in before.items())
        engine.save_checkpoint(tmp_path / "mid.pt", module=model, optimizer=optimizer)
        written = torch.load(tmp_path / "mid.pt", weights_only=True)["module"]
        assert all(torch.equal(written[n], v) for n, v in before.items())
        model.eval()
        assert torch.equal(model(x), plain)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        # And training goes on where it was.
        assert torch.equal(flat(model), there)
        if i == 1:
            break
    engine.detach(model)
    assert torch.equal(flat(model), torch.cat([v.flatten() for v in before.values()]))
    assert torch.equal(model.eval()(x), plain)


def test_an_epochs_end_leaves_the_point():
    model = small_model()
    *_, optimizer, loader = private(model, batch_size=20, smoothing=ALWAYS)
    for _ in loader:
        assert optimizer.smoothing.inside
    assert not optimizer.smoothing.inside
    # Nothing was released: the next epoch's first batch has the same point, which belongs to release 0.
    batch_of(loader)
    first = flat(model)
    optimizer.step()
    assert not optimizer.smoothing.inside
    batch_of(loader)
    assert not torch.equal(flat(model), first)


def test_a_write_at_the_point_stops_the_step_before_it_is_booked():
    model = small_model()
    engine, _, optimizer, loader = private(model, smoothing=ALWAYS)
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed while they were at the evaluation point"):
        optimizer.step()
    assert not engine.accountant.history
    assert optimizer.releases == 0


def test_a_write_at_the_point_can_be_followed_by_detach():
    model = small_model()
    start = flat(model)
    engine, _, _, loader = private(model, smoothing=ALWAYS)
    batch_of(loader)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed while they were at the evaluation point"):
        engine.detach(model)
    engine.detach(model)
    assert torch.equal(flat(model), start)
    assert "forward" not in model.__dict__


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "corrected Nadam": lambda p: NoiseCorrectedNadam(p, lr=0.05),
    "AdamBC": lambda p: DPAdamBC(p, lr=0.05, gamma=1e-4),
    "DiSK": lambda p: DiSK(p, lr=0.05),
}
CONDITIONAL = SmoothedLoss(0.2, "snr", threshold=1e6, every=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("smoothing", [None, CONDITIONAL])
def test_a_resumed_run_goes_on_to_the_last_bit(name, smoothing, tmp_path):
    def start():
        model = small_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        return private(model, optimizer=optimizer, clipping=ADAPTIVE(), smoothing=smoothing)

    engine, model, optimizer, loader = start()
    train(model, optimizer, loader, 2)
    engine.save_checkpoint(tmp_path / "run.pt", module=model, optimizer=optimizer)
    train(model, optimizer, loader, 2)
    again, other, resumed, other_loader = start()
    with torch.no_grad():
        other[0].weight.add_(1.0)
    again.load_checkpoint(tmp_path / "run.pt", module=other, optimizer=resumed)
    train(other, resumed, other_loader, 2)
    assert torch.equal(flat(model), flat(other))
    if smoothing is not None:
        assert optimizer.smoothing.tau == resumed.smoothing.tau == 0.2
        assert optimizer.smoothing.signal_to_noise == resumed.smoothing.signal_to_noise


def test_a_checkpoint_of_another_smoothing_is_refused(tmp_path):
    engine, model, optimizer, _ = private(smoothing=ALWAYS)
    engine.save_checkpoint(tmp_path / "run.pt", module=model, optimizer=optimizer)
    for smoothing in (None, SmoothedLoss(tau=0.3, signal="always")):
        engine, model, optimizer, _ = private(smoothing=smoothing)
        before = flat(model)
        with pytest.raises(ValueError, match="smoothing must be the checkpoint's"):
            engine.load_checkpoint(tmp_path / "run.pt", module=model, optimizer=optimizer)
        assert torch.equal(flat(model), before)


def test_the_optimizer_is_told_the_noise_in_force():
    # What adaptive clipping makes of C is what the correction subtracts.
    model = small_model()
    own = NoiseCorrectedNadam(model.parameters(), lr=0.01, betas=(0.9, 0.5))
    *_, optimizer, loader = private(model, optimizer=own, sigma=0.8, clipping=ADAPTIVE(), batch_size=20)
    expected = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        c = optimizer.max_grad_norm
        optimizer.step()
        expected = 0.5 * expected + 0.5 * (c * optimizer.gradient_noise_multiplier / 20) ** 2
        for p in model.parameters():
            assert own.state[p]["noise_sq"].item() == pytest.approx(expected, rel=1e-6)
    assert optimizer.max_grad_norm != 1.0


def test_disk_looks_ahead_under_an_engine():
    model = small_model()
    own = DiSK(model.parameters(), lr=0.1, kappa=0.5)
    *_, optimizer, loader = private(model, optimizer=own, batch_size=20)
    previous = None
    for x, y in loader:
        point = flat(model)
        with optimizer.smoothing.away():
            here = flat(model)
        # gamma is 1: as far again as the last step went.
        expected = here if previous is None else here + (here - previous)
        torch.testing.assert_close(point, expected, rtol=0, atol=1e-6)
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        optimizer.step()
        previous = here


def test_a_condition_without_momentum_is_refused_before_anything_changes():
    model = small_model()
    with pytest.raises(ValueError, match="signal='snr' needs an optimizer with momentum"):
        private(model, smoothing=SmoothedLoss())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not model._state_dict_pre_hooks


def test_a_compiled_model_computes_at_the_point():
    model = small_model()
    *_, optimizer, loader = private(model, sigma=0.0, batch_size=40, smoothing=ALWAYS)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        x, y = batch_of(loader)
        at = _twin(model)
        optimizer.zero_grad()
        square_loss(compiled(x), y).backward()
        truth = clipped_sum(sample_grads(at, *data(), square_loss), 1.0)
        for n, p in model.named_parameters():
            assert relative_error(p.grad.double() * 40, truth[n]) < 1e-5
        optimizer.step()
