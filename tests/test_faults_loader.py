"""Loaders whose workers die or raise, loops that end early: an error instead of a hang, and a ledger that is right."""

import contextlib
import os
import signal

import pytest
import torch
from small_engine import CLASSES, KEY, batch_of, flat, private, small_model, train
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from adaclip import PrivacyEngine
from adaclip.testing import square_loss

pytestmark = pytest.mark.usefixtures("one_thread", "no_hang")
SIZE = 40


@pytest.fixture(scope="module")
def no_hang():
    """Two minutes for all of these tests; a hang raises."""

    def ring(*_):
        raise TimeoutError("a loader hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Examples(Dataset):
    """Examples whose loading does harm while the file `trigger` exists: once, in the worker that meets it first."""

    def __init__(self, trigger, harm):
        self.trigger, self.harm = trigger, harm
        g = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(SIZE, 1, 6, 6, generator=g), torch.randn(SIZE, CLASSES, generator=g)

    def tensors(self):
        return self.x, self.y

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        if i % 5 == 0 and get_worker_info() is not None:
            try:
                os.unlink(self.trigger)
            except FileNotFoundError:
                pass
            else:
                self.harm()
        return self.x[i], self.y[i]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def raising():
    raise OSError("example 5 cannot be read")


def made(dataset, **options):
    engine = PrivacyEngine()
    model = small_model()
    return engine, *engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=10, **options),
        noise_multiplier=1.0,
        noise_generator=KEY,
    )


def steps(model, optimizer, loader, count):
    """So many steps; yields after each one that came to its end."""
    done = 0
    while done < count:
        for x, y in loader:
            optimizer.zero_grad()
            square_loss(model(x), y).backward()
            optimizer.step()
            done += 1
            yield done
            if done == count:
                return


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    ("harm", "message"),
    [(killed, "DataLoader worker"), (leave, "DataLoader worker"), (raising, "example 5 cannot be read")],
)
def test_a_worker_that_dies_ends_the_loop_and_nothing_more(tmp_path, harm, message, persistent):
    trigger = tmp_path / "trigger"
    engine, model, optimizer, loader = made(
        Examples(trigger, harm), num_workers=2, persistent_workers=persistent, prefetch_factor=1
    )
    done = list(steps(model, optimizer, loader, 3))
    trigger.touch()
    with pytest.raises((RuntimeError, OSError), match=message) as caught:
        done.extend(steps(model, optimizer, loader, 9))
    # Left to the garbage collector, the iterator in its frames would wait 5 s for each of torch's workers.
    caught.value.__traceback__ = None
    del caught
    # torch's notice of a dead worker may come at any time, also in the middle of a step, which then counts.
    counted = engine.accountant.ledger.steps
    assert counted in (len(done), len(done) + 1)
    assert optimizer.releases == counted
    # A run that is resumed goes on, and so does the same loader, with new workers.
    path = tmp_path / "run.pt"
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    again = made(TensorDataset(*Examples(trigger, harm).tensors()))
    again[0].load_checkpoint(path, module=again[1], optimizer=again[2])
    list(steps(*again[1:], 4))
    assert again[0].accountant.ledger.steps == counted + 4
    if persistent and harm is not raising:
        with pytest.raises(RuntimeError, match="DataLoader worker"):  # they were to stay the same
            list(steps(model, optimizer, loader, 4))
    else:
        list(steps(model, optimizer, loader, 4))
        assert engine.accountant.ledger.steps == counted + 4
        assert torch.equal(flat(model), flat(again[1]))


def test_a_loop_left_early_counts_what_it_did(tmp_path):
    engine, model, optimizer, loader = private()
    for n, (x, y) in enumerate(loader):
        if n == 2:
            break  # fetched, and not trained on
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        optimizer.step()
    assert engine.accountant.ledger.steps == 2
    engine.save_checkpoint(tmp_path / "run.pt", module=model, optimizer=optimizer)
    train(model, optimizer, loader)
    assert engine.accountant.ledger.steps == 2 + len(loader)
    # Resumed, the batch that was thrown away is not drawn again.
    engine, other, optimizer, loader = private()
    engine.load_checkpoint(tmp_path / "run.pt", module=other, optimizer=optimizer)
    train(other, optimizer, loader)
    assert torch.equal(flat(other), flat(model))


def test_an_exception_between_backward_and_step_releases_nothing():
    engine, model, optimizer, loader = private()
    before = flat(model)
    for x, y in loader:
        with contextlib.suppress(ZeroDivisionError):
            optimizer.zero_grad()
            square_loss(model(x), y).backward()
            raise ZeroDivisionError
        break
    assert engine.accountant.ledger.steps == 0
    assert torch.equal(flat(model), before)
    # The sum that was left behind is not added to the next one.
    train(model, optimizer, loader)
    other, again = private(), private()
    batch_of(again[3])
    train(*again[1:])
    assert torch.equal(flat(model), flat(again[1]))
    train(*other[1:])
    assert not torch.equal(flat(model), flat(other[1]))


def test_a_step_that_was_skipped_is_noticed_or_its_sum_is_dropped():
    engine, model, optimizer, loader = private()
    batches = iter(loader)
    x, y = next(batches)
    square_loss(model(x), y).backward()
    x, y = next(batches)
    with pytest.raises(RuntimeError, match="gradients of two logical batches would be added up"):
        square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.zero_grad\(\) first"):
        optimizer.step()
    assert engine.accountant.ledger.steps == 0
    optimizer.zero_grad()
    square_loss(model(x), y).backward()
    optimizer.step()
    assert engine.accountant.ledger.steps == 1


def test_a_data_set_that_shrinks_is_refused(tmp_path):
    engine, model, optimizer, loader = private(n=40)
    train(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "run.pt", module=model, optimizer=optimizer)
    engine, model, optimizer, loader = private(n=36, batch_size=9)
    with pytest.raises(ValueError, match="data set size must be the checkpoint's 40, got 36"):
        engine.load_checkpoint(tmp_path / "run.pt", module=model, optimizer=optimizer)

    class Shrinking(Examples):
        size = SIZE

        def __len__(self):
            return self.size

    dataset = Shrinking(tmp_path / "none", raising)
    engine, model, optimizer, loader = made(dataset)
    for _ in steps(model, optimizer, loader, 2):
        pass
    dataset.size -= 1
    with pytest.raises(RuntimeError, match="dataset must keep its size of 40 examples, got 39"):
        iter(loader)
    assert engine.accountant.ledger.steps == 2
