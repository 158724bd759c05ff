"""Graphed steps through Triton's kernels, in a graph that replays operations and nothing else of Python."""

import pytest
import torch
from small_engine import CLASSES, flat, private
from torch import nn

pytest.importorskip("triton")

from recorded_ops import HostRead, Recorded

from adaclip import clip_ops, noise, ops, update
from adaclip.backends import cudnn_grads, device_table, triton
from adaclip.clipping import AdaptiveClipping, DCSGDClipping
from adaclip.graphed import GraphedStep
from adaclip.groups import LabelGroups
from adaclip.smoothing import NoiseCorrectedNadam

pytestmark = pytest.mark.usefixtures("one_thread")


class Graphed(GraphedStep):
    recorder = Recorded

    def _address(self, number):
        return self._counter


@pytest.fixture
def as_on_a_gpu(gpu_or_interpreter, monkeypatch):
    """Tensors on the CPU are treated as a GPU's are: nothing looks at their values."""
    if gpu_or_interpreter.type != "cpu":
        pytest.skip("a GPU has graphs of its own")
    check, statistics = clip_ops._check, triton.sample_statistics

    def unread(sqnorms, thresholds, unit, real, backend):
        groups, rows, _ = check(sqnorms, thresholds, unit, 0, backend)
        return groups, rows, real

    def live_rows(factors, *tensors):
        live = (factors != 0).reshape(-1, *[1] * (tensors[0].dim() - 1))
        return factors, *(torch.where(live, t, t.new_zeros(())) for t in tensors)

    def unchecked(sqnorms, thresholds, *, backend, **given):
        names = ("shares", "below", "edges", "histogram", "labels", "table", "group_sums", "group_counts")
        statistics(sqnorms, thresholds, **(dict.fromkeys(names) | given))

    monkeypatch.setattr(clip_ops, "_check", unread)
    monkeypatch.setattr(ops, "sample_statistics", unchecked)
    monkeypatch.setattr(cudnn_grads, "live_rows", live_rows)
    monkeypatch.setattr(triton, "_products", lambda x: cudnn_grads)
    monkeypatch.setattr(device_table, "_capturing", lambda device: Recorded.recording is not None)
    for module in (noise, update):
        monkeypatch.setattr(module, "address", lambda step, stream: (step, stream))


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


def nadam(params):
    return NoiseCorrectedNadam(params, lr=0.02, floor=0.5)


def adaptive():
    groups = LabelGroups("report", groups=CLASSES, sigma_s=3.0, sigma_n=3.0)
    return {"clipping": AdaptiveClipping(0.5, sigma_b=3.0), "groups": groups}


def histogram():
    return {"clipping": DCSGDClipping(0.5, bins=6, sigma_h=3.0)}


def run(graphed, make_optimizer, options, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    made = {"n": 20, "batch_size": 4, "classes": True, "pad_to": 12, "sigma": 0.8, "backend": "triton"}
    _, model, optimizer, loader = private(
        model, optimizer=make_optimizer(model.parameters()), **(made | options())
    )
    criterion, found = nn.functional.cross_entropy, []
    step = Graphed(model, optimizer, criterion, warmup=1) if graphed else None
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for x, y in loader:
        if graphed:
            loss = step(x, y)
        else:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        schedule.step()
        norms = optimizer.sample_norms.clone()
        state = [] if optimizer.groups is None else list(optimizer.groups.released.values())
        clipping = list(optimizer.clipping.state_dict().values())
        found.append([loss.detach(), norms, flat(model), loader.current.rows, *clipping, *state])
        if len(found) == steps:
            break
    if graphed:
        assert (step._recorder.recorded, step._recorder.replays) == (1, steps)
    return found, [s for p in model.parameters() for s in optimizer.state[p].values()]


@pytest.mark.parametrize(("make_optimizer", "options", "steps"), [(nadam, adaptive, 2), (sgd, histogram, 2)])
def test_replays_of_operations_equal_the_loop(make_optimizer, options, steps, as_on_a_gpu):
    ours, our_state = run(True, make_optimizer, options, steps)
    theirs, state = run(False, make_optimizer, options, steps)
    assert len({entry[3] for entry in ours}) > 1, "batches of one size alone"
    for number, (mine, true) in enumerate(zip([*ours, our_state], [*theirs, state], strict=True)):
        for one, other in zip(mine, true, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), number


def test_a_recording_notices_what_is_read():
    recorded = Recorded(torch.device("cpu"))
    with pytest.raises(HostRead):
        recorded.record(lambda: torch.ones(1).add(1).item())


def test_a_recording_replays_operations_alone():
    x, out, calls = torch.ones(3), torch.zeros(3), []

    def once():
        calls.append(1)
        out.add_(x.view(3, 1).square().sum(1) * len(calls))

    replay = Recorded(torch.device("cpu")).record(once)
    out.zero_()
    x.fill_(2.0)
    replay()
    replay()
    assert out.tolist() == [8.0] * 3
    assert calls == [1]
