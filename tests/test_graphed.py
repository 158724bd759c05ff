"""Graphed steps: what a replay must find in place, on the CPU, where a graph is emulated by running its function again."""

import pytest
import torch
from emulated_graph import Emulated
from small_engine import CLASSES, flat, private
from torch import nn

from adaclip.clipping import AdaptiveClipping, DCSGDClipping, FlatClipping, PerLayerClipping
from adaclip.errors import PrivacyBudgetExceeded
from adaclip.graphed import CudaGraphs, GraphedStep
from adaclip.groups import LabelGroups
from adaclip.schedules import Linear
from adaclip.smoothing import DiSK, NoiseCorrectedNadam, SmoothedLoss

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES, BATCH = 30, 6


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


@pytest.mark.parametrize("case", ["everything", "histogram"])
def test_a_resumed_run_goes_on_as_the_loop_does(case, tmp_path):
    ends = []
    for graphed in (False, True):
        engine, model, optimizer, loader, step = make(case, graphed)
        train(model, optimizer, loader, step, 5, [])
        engine.save_checkpoint(tmp_path / "here", module=model, optimizer=optimizer)
        # Into a run under way, whose captures are of other state tensors, and into a new one.
        train(model, optimizer, loader, step, 8, [])
        for again in (False, True):
            if again:
                engine, model, optimizer, loader, step = make(case, graphed)
            engine.load_checkpoint(tmp_path / "here", module=model, optimizer=optimizer)
            train(model, optimizer, loader, step, optimizer.releases + 4, found := [])
            ends.append((graphed, [entry[1:] for entry in found], optimizer.state_dict()["state"]))
    loops, replays = ([end[1:] for end in ends if end[0] is kind] for kind in (False, True))
    assert same(replays, loops)


def whole_batch(loader):
    """A logical batch that comes as one."""
    return next(batch for batch in loader if loader.current.first and loader.current.last)


def snapshot(engine, model, optimizer):
    parts = [part for part in (optimizer.clipping, optimizer.groups) if part is not None]
    inner = optimizer._sum
    return [
        # Of the parameters themselves, wherever gradients are taken.
        {name: t.clone() for name, t in model.state_dict().items()},
        [p.grad for p in model.parameters()],
        optimizer.state_dict(),
        [part.state_dict() for part in parts],
        engine.accountant.ledger.state_dict(),
        optimizer.releases,
        optimizer.non_finite_samples,
        inner.statistics.sums.clone(),
        inner.sample_norms,
        inner.release,
        torch.get_rng_state(),
        None if optimizer.groups is None else optimizer.groups.private,
    ]


@pytest.mark.parametrize("case", CASES)
def test_rehearsals_leave_everything_as_it_was(case, monkeypatch):
    engine, model, optimizer, loader, step = make(case, True)
    model.insert(2, Counts())
    train(model, optimizer, loader, step, 2, [])
    step._captured.clear()
    x, y = whole_batch(loader)
    # A schedule's threshold of the coming release, which the batch's begin sets.
    optimizer.clipping.begin(optimizer.releases)
    before, taken = snapshot(engine, model, optimizer), {}

    def stop(info):
        taken["now"] = snapshot(engine, model, optimizer)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "begin_release", stop)
    rehearsed = step._recorder.rehearsals
    with pytest.raises(KeyboardInterrupt):
        step(x, y)
    assert step._recorder.rehearsals == rehearsed + 3
    # Private diagnostics of the last batch are given up.
    assert same(taken["now"][:-1], before[:-1])


class Counts(nn.Module):
    """Changes a buffer in its forward, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
            torch.rand(3)
        return x


def test_rehearsals_see_no_sample(monkeypatch):
    _, model, optimizer, loader, step = make("everything", True)
    sums = []
    reset = type(optimizer._sum).reset

    def looked_at(total):
        sums.extend(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)
        sums.extend(total.statistics.sums.tolist())
        reset(total)

    monkeypatch.setattr(type(optimizer._sum), "reset", looked_at)
    monkeypatch.setattr(optimizer, "begin_release", lambda info: pytest.fail("far enough", pytrace=False))
    x, y = whole_batch(loader)
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        step(x, y)
    assert len(sums) > 10
    assert not any(sums)


def test_the_budget_is_asked_before_anything_is_enqueued():
    engine, model, optimizer, loader, step = make("SGD", True)
    train(model, optimizer, loader, step, 1, [])
    engine.set_budget(engine.get_epsilon(1e-5) + 1e-9, 1e-5)
    x, y = whole_batch(loader)
    before, replays = snapshot(engine, model, optimizer), step._recorder.replays
    with pytest.raises(PrivacyBudgetExceeded):
        step(x, y)
    assert same(snapshot(engine, model, optimizer), before)
    assert step._recorder.replays == replays


def test_one_batch_is_released_once():
    _, _, _, loader, step = make("SGD", True)
    x, y = whole_batch(loader)
    step(x, y)
    with pytest.raises(RuntimeError, match="released already"):
        step(x, y)


def test_a_batch_that_the_loader_did_not_give_is_refused():
    _, _, optimizer, loader, step = make("SGD", True)
    x, y = whole_batch(loader)
    with pytest.raises(RuntimeError, match="handed out 10 rows"):
        step(x[:4], y[:4])
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="handed out 10 rows"):
        step(torch.cat([x, x]), torch.cat([y, y]))


def test_captures_follow_what_they_are_of():
    _, model, optimizer, loader, step = make("Adam, norm schedule", True)
    train(model, optimizer, loader, step, 3, [])
    assert step._recorder.recorded == 1
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    train(model, optimizer, loader, step, 6, [])
    assert step._recorder.recorded == 2
    assert torch.equal(model[0].weight, frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, optimizer, loader, step, 9, [])
    assert step._recorder.recorded == 3
    model[0].requires_grad_(True)
    train(model, optimizer, loader, step, 12, [])
    assert step._recorder.recorded == 3
    assert not torch.equal(model[0].weight, frozen)


def test_what_cannot_be_captured_is_refused():
    _, model, optimizer, _, _ = make("SGD", False)
    with pytest.raises(ValueError, match="CUDA GPU, got cpu"):
        GraphedStep(model, optimizer, nn.functional.cross_entropy)
    with pytest.raises(TypeError, match="make_private's, got SGD"):
        Emulated(model, optimizer.original_optimizer, nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        Emulated(model, optimizer, nn.functional.cross_entropy, warmup=0)
    assert GraphedStep.recorder is CudaGraphs


def test_an_optimizer_of_its_own_step_is_refused_before_it_is_booked():
    engine, _, optimizer, loader, step = make("SGD", True)
    optimizer.original_optimizer.register_step_pre_hook(lambda *_: None)
    x, y = whole_batch(loader)
    with pytest.raises(RuntimeError, match="fused update"):
        step(x, y)
    assert optimizer.releases == len(engine.accountant.history) == 0


class Scale(nn.Module):
    """A layer that only the generic fallback can train."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 4, 4))

    def forward(self, x):
        return x * self.scale


@pytest.mark.filterwarnings("ignore:adaclip has no fast per-sample gradient")
def test_a_layer_that_reads_the_device_is_refused_before_it_is_booked():
    model = nn.Sequential(*network()[:3], Scale(), nn.Flatten(), nn.Linear(32, CLASSES))
    engine, _, optimizer, loader = private(model, classes=True, pad_to=40)
    step = Emulated(model, optimizer, nn.functional.cross_entropy)
    x, y = whole_batch(loader)
    with pytest.raises(RuntimeError, match=r"reading the device, as those of 3 \(Scale\) are"):
        step(x, y)
    assert optimizer.releases == len(engine.accountant.history) == step._recorder.rehearsals == 0
    model[3].scale.requires_grad_(False)
    step(*whole_batch(loader))
    assert optimizer.releases == step._recorder.replays == 1


def test_a_side_release_that_does_not_split_is_refused(monkeypatch):
    _, model, optimizer, _, _ = make("everything", False)
    monkeypatch.setattr(type(optimizer._sum.statistics), "unsplit", ["Mine"])
    with pytest.raises(ValueError, match="SplitRelease, got Mine"):
        Emulated(model, optimizer, nn.functional.cross_entropy)


def test_a_compiled_module_takes_the_same_steps(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module: compiled(module, backend="aot_eager", fullgraph=True)
    )
    ends = []
    for compile in (False, True):
        _, model, optimizer, loader, _ = make("SGD", False, pad_to=16)
        step = Emulated(model, optimizer, nn.functional.cross_entropy, compile=compile, warmup=1)
        train(model, optimizer, loader, step, 4, [])
        assert step._recorder.replays == 4
        ends.append(flat(model))
    torch.testing.assert_close(*ends)
