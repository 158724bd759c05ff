"""Several processes go on only while everything that decides a release is the same in all of them."""

import pytest
import torch
from shared_training import made, numbers
from torch import distributed as dist
from torch import nn
from two_processes import run

from adaclip.clipping import AdaptiveClipping
from adaclip.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")


def _step(module, optimizer, loader):
    x, y = next(iter(loader))
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()


CHANGES = {
    "noise_multiplier": lambda engine, module, optimizer: setattr(optimizer, "noise_multiplier", 2.0),
    "the clipping norms": lambda engine, module, optimizer: optimizer.clipping.thresholds.mul_(2),
    "the trained parameters and their groups": lambda engine, module, optimizer: freeze(module),
    "the account and its budget": lambda engine, module, optimizer: engine.set_budget(0.01, 1e-5),
}


def freeze(module):
    next(p for name, p in module.named_parameters() if name.endswith("second.weight")).requires_grad_(False)


def _changed(kind):
    """What each change in one process only leads to: (message, whether anything was released)."""
    found = {}
    for name, change in CHANGES.items():
        engine, module, optimizer, loader = made(kind, clipping=AdaptiveClipping(sigma_b=4.0))
        _step(module, optimizer, loader)
        before = numbers(module.parameters())
        if dist.get_rank() == 1:
            change(engine, module, optimizer)
        try:
            _step(module, optimizer, loader)
        except RuntimeError as error:
            done = optimizer.releases, engine.accountant.ledger.steps
            found[name] = str(error), done, torch.equal(before, numbers(module.parameters()))
    return found


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_a_change_in_one_process_releases_nothing(kind):
    # Of two results with one noise and two deviations the difference would give the noise away.
    for found in run(_changed, kind):
        assert found.keys() == CHANGES.keys()
        for name, (message, done, same) in found.items():
            assert f"the processes are not at the same point ({name} must be the same in all)" in message
            assert done == (1, 1)
            assert same


def _unbooked(kind):
    """(messages of two steps, releases on the account, whether parameters moved) where one process fails to book."""
    engine, module, optimizer, loader = made(kind)
    _step(module, optimizer, loader)
    before, messages = numbers(module.parameters()), []
    for t in range(2):
        with pytest.MonkeyPatch.context() as patch:
            if t == 0 and dist.get_rank() == 0:
                patch.setattr(optimizer, "_book", _no_memory)
            try:
                _step(module, optimizer, loader)
            except (RuntimeError, MemoryError) as error:
                messages.append(str(error))
    return messages, engine.accountant.ledger.steps, torch.equal(before, numbers(module.parameters()))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_nobody_releases_what_one_has_not_booked(kind):
    # The first one's ledger is what is written.
    (first, steps, same), (second, others, also) = run(_unbooked, kind, timeout=20)
    assert first == ["no memory", "step(): another process could not, and says why; none of them has done it"]
    assert second[0].startswith("step(), after booking it: another process could not")
    assert second[1].startswith("an earlier step failed here after it was booked")
    assert (steps, others) == (1, 2)
    assert same
    assert also


def _grouped(border):
    def make(params):
        k = border + dist.get_rank()
        groups = [{"params": params[:k], "max_grad_norm": 0.1}, {"params": params[k:], "max_grad_norm": 10.0}]
        return torch.optim.SGD(groups, lr=0.1)

    return make


def _reversed(params):
    return torch.optim.SGD(params[::-1] if dist.get_rank() else params, lr=0.1)


def _other_optimizers():
    found = []
    for make in (_grouped(3), _reversed):
        try:
            made("plain", optimizer=make)
        except ValueError as error:
            found.append(str(error))
    return found


def test_parameters_in_another_order_or_group_are_refused():
    for messages in run(_other_optimizers):
        assert len(messages) == 2
        for message in messages:
            assert message.startswith(
                "make_private: optimizer.param_groups must be the same in all processes"
            )


def _moved_between_groups():
    _, module, optimizer, loader = made("plain", optimizer=_grouped_alike)
    _step(module, optimizer, loader)
    if dist.get_rank() == 1:
        small, large = (group["params"] for group in optimizer.param_groups)
        large.insert(0, small.pop())
    try:
        _step(module, optimizer, loader)
    except RuntimeError as error:
        return str(error), optimizer.releases
    return "", optimizer.releases


def _grouped_alike(params):
    groups = [{"params": params[:3], "max_grad_norm": 0.1}, {"params": params[3:], "max_grad_norm": 10.0}]
    return torch.optim.SGD(groups, lr=0.1)


def _skipped():
    """A norm that one process changes after a batch that both left, before one that both skip."""
    _, module, optimizer, loader = made("plain", optimizer=_grouped_alike)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(module(x), y).backward()
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["max_grad_norm"] = 0.2
    next(iter(loader))
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), optimizer.releases
    return "", optimizer.releases


def test_a_norm_that_is_read_for_a_skipped_batch_is_compared():
    for message, releases in run(_skipped):
        assert "(the clipping norms must be the same in all)" in message
        assert releases == 0


def test_a_parameter_in_another_group_is_noticed():
    for message, releases in run(_moved_between_groups):
        assert "(the trained parameters and their groups must be the same in all)" in message
        assert releases == 1


def _rows_differ():
    """What one process's batch without rows leads to where gradients are added up as they are made."""
    _, module, _, loader = made("fsdp2", sigma=0.0)
    x, y = next(iter(loader))
    if dist.get_rank() == 1:
        x, y = x[:0], y[:0]
    try:
        nn.functional.cross_entropy(module(x), y).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_backward_without_rows_in_one_process_ends_all():
    for message in run(_rows_differ, timeout=20):
        assert "backward(): the processes are not at the same point (whether there are rows" in message


def _at_different_points():
    processes = Processes()
    try:
        if dist.get_rank() == 0:
            processes.agree("backward()", None, {"gradients": 3})
        else:
            processes.agree("step()", None, {"release": 3, "batch": 4})
    except RuntimeError as error:
        return str(error)
    return ""


def test_different_agreements_that_meet_are_told_apart():
    for message in run(_at_different_points):
        assert "the processes are not at the same point (what they do must be the same in all)" in message


def _started():
    """What each tensor of a model is after `start_alike`, and the memory between and behind its elements."""
    rank = dist.get_rank()
    model = nn.Module()
    image = torch.arange(48.0).view(2, 3, 2, 4) + 100 * rank
    # Another layout in each process.
    model.weight = nn.Parameter(image if rank else image.to(memory_format=torch.channels_last))
    memory = torch.arange(8) + 100 * rank
    model.register_buffer("every_other", memory[::2])
    few = torch.arange(4.0) + 100 * rank
    model.register_buffer("expanded", few[:1].expand(4))
    model.register_buffer("scalar", torch.tensor(rank))
    model.register_buffer("flags", torch.tensor([True, False]) ^ bool(rank))
    Processes().start_alike(model)
    values = [t.detach().tolist() for t in (*model.parameters(), *model.buffers())]
    return values, memory[1::2].tolist(), few[1:].tolist()


def test_all_start_from_the_first_ones_tensors_whatever_their_strides():
    (first, *_), (second, between, behind) = run(_started)
    assert first == second
    assert first[0][0][0][0][:2] == [0.0, 1.0]
    assert between == [101, 103, 105, 107]
    assert behind == [101.0, 102.0, 103.0]


def _failing_update(path):
    """Messages of the steps after one that failed in the second process, in the middle of its update."""
    engine, module, optimizer, loader = made(
        "ddp", noise_generator=None, clipping=AdaptiveClipping(sigma_b=4.0)
    )
    _step(module, optimizer, loader)
    engine.save_checkpoint(path, module=module, optimizer=optimizer)
    messages = []
    for t in range(3):
        with pytest.MonkeyPatch.context() as patch:
            if t == 0 and dist.get_rank() == 1:
                patch.setattr("adaclip.optimizer.noisy_update", _no_memory)
            try:
                _step(module, optimizer, loader)
            except (RuntimeError, MemoryError) as error:
                messages.append(str(error))
            else:
                messages.append("")
    engine.load_checkpoint(path, module=module, optimizer=optimizer)
    _step(module, optimizer, loader)
    return (
        messages,
        engine.accountant.ledger.steps,
        numbers(module.parameters()),
        optimizer.clipping.thresholds,
    )


def _no_memory(*_, **__):
    raise MemoryError("no memory")


def test_nobody_goes_on_after_an_update_that_one_has_not_made(tmp_path):
    (first, steps, theta, thresholds), (second, others, same, also) = run(
        _failing_update, str(tmp_path / "checkpoint.pt")
    )
    assert first[0] == ""
    assert second[0] == "no memory"
    for mine, theirs in zip(first[1:], second[1:], strict=True):
        assert mine == "step(): another process could not, and says why; none of them has done it"
        assert theirs.startswith("an earlier step failed here after it was booked")
    # The one step that failed is on the account, the refused ones are not.
    assert steps == others == 3
    assert torch.equal(theta, same)
    assert torch.equal(thresholds, also)
