"""Graphed steps: what a replay must find in place, on the CPU, where a graph is emulated by running its function again."""

import pytest
import torch
from small_engine import CLASSES, flat, private
from torch import nn

from adaclip.clipping import AdaptiveClipping, DCSGDClipping, FlatClipping, PerLayerClipping
from adaclip.graphed import GraphedStep
from adaclip.groups import LabelGroups
from adaclip.schedules import Linear
from adaclip.smoothing import DiSK, NoiseCorrectedNadam, SmoothedLoss

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES, BATCH = 30, 6


class Again:
    """In the place of CUDA graphs: a recorded function is not run, and then run at every replay."""

    def __init__(self, device):
        self.rehearsals = self.recorded = self.replays = 0

    def rehearse(self, run):
        self.rehearsals += 1
        run()

    def record(self, run):
        self.recorded += 1

        def replay():
            self.replays += 1
            run()

        return replay


class Emulated(GraphedStep):
    recorder = Again


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)
    )


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=1e-3)


def adam(params):
    return torch.optim.Adam(params, lr=0.02)


def nadam(params):
    return NoiseCorrectedNadam(params, lr=0.02, floor=0.5)


def disk(params):
    return DiSK(params, lr=0.2)


def groups(use):
    return LabelGroups(use, groups=CLASSES, sigma_s=3.0, sigma_n=3.0, diagnostics=True)


CASES = {
    "SGD": (sgd, lambda: {"max_grad_norm": 0.5}),
    "Adam, norm schedule": (adam, lambda: {"clipping": FlatClipping(0.5, Linear(1.0, 0.2, 12))}),
    "Nadam, noise schedule": (nadam, lambda: {"max_grad_norm": 0.5, "noise_schedule": Linear(1.0, 0.4, 9)}),
    "DiSK, per layer": (disk, lambda: {"clipping": PerLayerClipping(0.5, quantile=0.5, sigma_b=3.0)}),
    "histogram": (sgd, lambda: {"clipping": DCSGDClipping(0.5, criterion="error", sigma_h=3.0)}),
    "everything": (
        nadam,
        lambda: {
            "clipping": AdaptiveClipping(0.5, sigma_b=3.0),
            "groups": groups("reweight"),
            "smoothing": SmoothedLoss(0.1, signal="snr", threshold=2.0, every=3),
        },
    ),
    "views, selection, always smooth": (
        sgd,
        lambda: {
            "max_grad_norm": 0.5,
            "groups": groups("select"),
            "smoothing": SmoothedLoss(0.1, signal="always"),
            "views_per_sample": 2,
            "augmentation": "shift-flip",
        },
    ),
}


def make(case, graphed, pad_to=10, **options):
    """(engine, model, optimizer, loader, step(x, y) -> loss)."""
    make_optimizer, given = CASES[case]
    model = network()
    usual = {"n": EXAMPLES, "batch_size": BATCH, "classes": True, "pad_to": pad_to, "sigma": 0.8}
    made = private(model, optimizer=make_optimizer(model.parameters()), **(usual | given() | options))
    _, model, optimizer, _ = made
    criterion = nn.functional.cross_entropy

    def loop(x, y):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return *made, Emulated(model, optimizer, criterion) if graphed else loop


def train(model, optimizer, loader, step, until, found):
    """Appends what is left after every logical batch, until there were so many releases."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)
    schedule.last_epoch = optimizer.releases
    while optimizer.releases < until:
        for x, y in loader:
            loss = step(x, y)
            if not loader.current.last:
                continue
            schedule.step()
            state = [
                optimizer.clipping.state_dict(),
                None if optimizer.groups is None else optimizer.groups.state_dict(),
            ]
            norms = optimizer.sample_norms.clone()
            found.append((loader.current, loss, norms, flat(model), optimizer.non_finite_samples, state))
            if optimizer.releases == until:
                return


def same(a, b):
    """Whether nested values are equal, tensors bit for bit (nan included)."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_the_loops(case):
    runs = []
    for graphed in (False, True):
        engine, model, optimizer, loader, step = make(case, graphed)
        found = []
        train(model, optimizer, loader, step, 20, found)
        runs.append((found, engine.accountant.ledger.state_dict(), optimizer.state_dict()["state"], step))
    (theirs, ledger, state, _), (ours, our_ledger, our_state, step) = runs
    for number, (mine, true) in enumerate(zip(ours, theirs, strict=True)):
        assert same(mine, true), number
    assert our_ledger == ledger
    assert same(our_state, state)
    whole = sum(info.first for info, *_ in ours)
    assert step._recorder.replays == whole < 20 or pytest.fail("some batch must overflow and some not")
    assert step._recorder.recorded <= 2


def test_an_empty_batch_is_replayed_too():
    runs = []
    for graphed in (False, True):
        _, model, optimizer, loader, step = make("everything", graphed, batch_size=1, pad_to=4)
        found = []
        train(model, optimizer, loader, step, 8, found)
        assert any(info.rows == 0 for info, *_ in found)
        runs.append(found)
    assert all(map(same, *runs))
