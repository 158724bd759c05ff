"""Runs that are killed, that run out of disk, that diverge or meet an error: what is left, counted, and resumed."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import file_size_limit
from small_engine import KEY, flat, private, train
from tiny_runs import flags
from torch.utils.data import DataLoader, TensorDataset

import adaclip.optimizer
from adaclip import PrivacyBudgetExceeded, PrivacyEngine, checkpoint
from adaclip import train as training_module
from adaclip.accounting import Ledger
from adaclip.cli import main
from adaclip.files import leftovers
from adaclip.runs import RunFolder
from adaclip.schedules import Piecewise
from adaclip.train import Training
from adaclip.train_sources import resume_with

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent


def harness(*words, code=None):
    """fault_runs.py in a process of its own, without threads: its runs are forked."""
    command = [sys.executable, *(("-c", code) if code else ("fault_runs.py",)), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


# --- SIGKILL ------------------------------------------------------------------------------------------------


def test_killed_anywhere_a_run_can_be_resumed_and_its_ledger_counts_what_it_shows():
    """`make faults` tries 200 points and every line that writes."""
    done = harness("--points", 20, "--every", 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every ledger counts what its folder shows" in done.stdout


PLANTED = """
import os, signal, sys, tempfile
from pathlib import Path
import torch
import fault_runs
from adaclip import checkpoint, engine, train

torch.set_num_threads(1)
dying = False

def die():
    if dying:
        os.kill(os.getpid(), signal.SIGKILL)

def saving(state, output):
    save(state, output)
    if state["extra"]["step"] == 4:
        die()

def checkpoint_before_ledger(self):
    self._write_checkpoint()
    self._write_ledger()

def forgetting(self, path, *, module, optimizer, ledger=None):
    return load(self, path, module=module, optimizer=optimizer)

def moving_on(state, module, optimizer, loader, lost=0):
    restore(state, module, optimizer, loader)
    optimizer.releases += lost

save, load, restore = torch.save, engine.PrivacyEngine.load_checkpoint, checkpoint.restore
in_order = train.Training._save
checkpoint.torch.save = saving
with tempfile.TemporaryDirectory() as name:
    campaign = fault_runs.Campaign(Path(name), "run", fault_runs.FREE, lines={"none": 0})
    for kind in ("nothing", "order", "forgetting", "places"):
        train.Training._save = checkpoint_before_ledger if kind == "order" else in_order
        engine.PrivacyEngine.load_checkpoint = forgetting if kind == "forgetting" else load
        checkpoint.restore = moving_on if kind == "places" else restore
        folder = Path(name) / kind
        dying = True
        assert os.WIFSIGNALED(campaign._wait(campaign._fork(folder)))
        dying = False
        try:
            campaign.check_killed(folder)
            assert campaign._wait(campaign._fork(folder)) == 0
            campaign.check_killed(folder)
            campaign.check_finished(folder)
            print(kind, "not found")
        except AssertionError as error:
            print(kind, "found:", str(error)[:100])
"""


def test_planted_faults_are_found():
    """The ledger after the checkpoint; the ledger file left out on resuming; steps done again with other noise."""
    done = harness(code=PLANTED)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "nothing not found"
    assert said[1].startswith("order found: ([Seen(start=0, shown=4)], Ledger([]")
    assert said[2].startswith("forgetting found: ([Seen(start=0, shown=4), Seen(start=0, shown=12)], Ledger(")
    assert said[3] == "places found: another state at step 12"


def test_a_start_that_was_cut_off_begins_anew(digits, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(flags(digits, folder, "--steps", 1, "--epsilon", 3, "--quiet")) == 0
    for name in (
        "checkpoint.pt",
        "metrics.jsonl",
        "ledger.json",
        "accuracy_epsilon.png",
        "clipping_norm.png",
    ):
        (folder / name).unlink()
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == [1]
    assert Ledger.load(folder / "ledger.json").steps == 1


def test_a_run_in_use_is_refused(digits, tmp_path, capsys):
    folder = RunFolder.create(tmp_path / "run")
    assert main(flags(digits, folder.path, "--steps", 1, "--epsilon", 3)) == 2
    assert "is in use: another process trains in it" in capsys.readouterr().err
    folder.close()


def resumed(path):
    folder = RunFolder.open(path)
    saved = folder.read_config()
    return Training(resume_with(saved["train"], {}), folder, saved=saved)


def test_an_older_ledger_is_not_taken_for_the_runs(tmp_path, tiny_run):
    training = tiny_run(tmp_path / "run", steps=3, eval_every=1)
    old_checkpoint = training.folder.checkpoint.read_bytes()
    old_ledger = training.folder.ledger.read_bytes()
    training.run(quiet=True)
    training.folder.close()
    training.folder.checkpoint.write_bytes(old_checkpoint)
    # The old checkpoint alone: all three steps have been seen, and the plan has no room left.
    again = resumed(tmp_path / "run")
    assert again.engine.accountant.ledger.steps == 3
    assert any("3 steps more than the checkpoint" in note for note in again.notes)
    again.folder.close()
    # With the old ledger as well: what metrics.jsonl shows is not on the account.
    training.folder.ledger.write_bytes(old_ledger)
    folder = RunFolder.open(tmp_path / "run")
    saved = folder.read_config()
    with pytest.raises(ValueError, match=r"ledger\.json counts 0 steps, fewer than the 3 whose results"):
        Training(resume_with(saved["train"], {}), folder, saved=saved)


# --- the disk -----------------------------------------------------------------------------------------------


def limited_from(monkeypatch, step, size):
    """From that step on no file may grow beyond `size` bytes; returns what undoes it."""
    before, train_on = resource.getrlimit(resource.RLIMIT_FSIZE), Training._train_on

    def filling(self, *args):
        if self.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return train_on(self, *args)

    monkeypatch.setattr(Training, "_train_on", filling)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "counted"), [(2000, 4), (0, 2)])
def test_a_full_disk_ends_a_run_that_can_be_resumed(digits, tmp_path, monkeypatch, capsys, size, counted):
    """With room for the ledger and not for the checkpoint, or for neither."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        undo = limited_from(patch, 3, size)
        try:
            code = main(flags(digits, path, "--steps", 6, "--eval-every", 2, "--noise-multiplier", 1))
        finally:
            undo()
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written: [Errno 27] File too large: " in said
    assert (
        f"What it held is whole; once it can be written, continue with: adaclip train --resume {path}" in said
    )
    folder = RunFolder(path)
    assert leftovers(path) == []
    assert checkpoint.load(folder.checkpoint)["extra"]["step"] == 2
    assert Ledger.load(folder.ledger).steps == counted
    assert [row["step"] for row in folder.read_metrics()] == [2]
    assert main(["train", "--resume", str(path), "--quiet"]) == 0
    assert Ledger.load(folder.ledger).steps == 6 + counted - 2
    assert [row["step"] for row in folder.read_metrics()] == [2, 4, 6]


def test_a_start_for_which_there_is_no_room_leaves_nothing(digits, tmp_path, capsys):
    with file_size_limit(3000):
        assert main(flags(digits, tmp_path / "run", "--steps", 1, "--epsilon", 3)) == 2
    assert "File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- errors on the way --------------------------------------------------------------------------------------


def test_an_error_between_two_steps_loses_nothing(tmp_path, tiny_run, monkeypatch):
    training = tiny_run(tmp_path / "run", steps=6, eval_every=4, ema=0.9)
    train_on = Training._train_on

    def failing(self, *args):
        if self.step == 3:
            raise MemoryError("no room for activations")
        return train_on(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_on", failing)
        with pytest.raises(MemoryError, match="no room"):
            training.run(quiet=True)
    training.folder.close()
    assert Ledger.load(training.folder.ledger).steps == 3
    again = resumed(tmp_path / "run")
    assert (again.step, again.notes) == (3, [])
    assert torch.equal(flat(again.model), flat(training.model))
    assert torch.equal(flat(again.average.module), flat(training.average.module))
    again.run(quiet=True)
    assert again.step == 6
    assert Ledger.load(training.folder.ledger).steps == 6


def test_an_error_inside_a_step_counts_the_step_and_keeps_the_checkpoint(tmp_path, tiny_run, monkeypatch):
    training = tiny_run(tmp_path / "run", steps=6, eval_every=2)
    update, calls = adaclip.optimizer.noisy_update, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the device is gone")
        update(*args, **kwargs)

    monkeypatch.setattr(adaclip.optimizer, "noisy_update", failing)
    with pytest.raises(RuntimeError, match="device is gone"):
        training.run(quiet=True)
    training.folder.close()
    assert Ledger.load(training.folder.ledger).steps == 4
    assert checkpoint.load(training.folder.checkpoint)["extra"]["step"] == 2
    again = resumed(tmp_path / "run")
    again.run(quiet=True)
    # Six steps are paid for, and two of them were lost.
    assert (again.step, Ledger.load(training.folder.ledger).steps) == (4, 6)
    assert again.engine.get_epsilon(1e-5) <= 3.0


# --- values that are not finite -----------------------------------------------------------------------------


def test_parameters_that_diverge_end_the_run_and_keep_the_checkpoint(digits, tmp_path, capsys):
    path = tmp_path / "run"
    words = ["--steps", 6, "--eval-every", 2, "--noise-multiplier", 1, "--lr", 1e38, "--max-grad-norm", 100]
    assert main(flags(digits, path, *words)) == 2
    said = capsys.readouterr().err
    assert "adaclip train: error: training diverged: " in said
    assert "parameters are not finite after step 2 of 6 (" in said
    state = checkpoint.load(path / "checkpoint.pt")
    assert state["extra"]["step"] == 0
    assert all(t.isfinite().all() for t in state["module"].values())
    assert Ledger.load(path / "ledger.json").steps == 2
    assert not (path / "metrics.jsonl").exists()


def test_samples_whose_loss_is_not_a_number_leave_noise_alone(tmp_path, tiny_run, monkeypatch):
    """Whatever the data, a step is then the same noise."""
    ends = []
    options, loss = training_module.privacy_options, Training._loss
    monkeypatch.setattr(
        training_module, "privacy_options", lambda *a, **k: options(*a, **k) | {"noise_generator": KEY}
    )
    for name, broken in (("a", True), ("b", True), ("c", False)):
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(Training, "_loss", lambda *args: loss(*args) * float("nan"))
            training = tiny_run(tmp_path / name, steps=3)
            if name == "b":
                training.data.train_labels.copy_(training.data.train_labels.roll(1))
                training.data.train_images.copy_(255 - training.data.train_images)
            training.run(quiet=True)
        ends.append(flat(training.model))
        assert Ledger.load(training.folder.ledger).steps == 3
    assert ends[0].isfinite().all()
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_an_evaluation_that_is_not_a_number_is_said_and_written(tmp_path, tiny_run, monkeypatch, capsys):
    training = tiny_run(tmp_path / "run", steps=2, eval_every=1)
    monkeypatch.setattr(training_module, "evaluate", lambda *args: (0.1, float("nan")))
    assert training.run()["test_accuracy"] == 0.1
    said = capsys.readouterr().err
    assert "the test loss at step 1 is not finite" in said
    # How many training samples were left out is private, and said nowhere.
    assert not re.search(r"\d+ (training )?samples", said)
    assert [row["test_loss"] for row in training.folder.read_metrics()] == ["nan", "nan"]


# --- the library without the command line ---------------------------------------------------------------------


def test_the_ledger_file_is_written_before_the_checkpoint_is_begun(tmp_path, monkeypatch):
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    ledger, path = tmp_path / "ledger.json", tmp_path / "run.pt"

    def dying(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        engine.save_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    assert Ledger.load(ledger) == engine.accountant.ledger
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


@pytest.mark.parametrize("key", [KEY, None])
def test_both_branches_of_steps_done_again_count(tmp_path, key):
    ledger, path = tmp_path / "ledger.json", tmp_path / "run.pt"
    engine, model, optimizer, loader = private(noise_generator=key)
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    train(model, optimizer, loader)
    engine.accountant.ledger.save(ledger)  # and then the weights of step 8 are shown
    first = flat(model)
    for done_again in (4, 8):
        engine, model, optimizer, loader = private(noise_generator=key)
        engine.load_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
        assert engine.accountant.ledger.steps == 4 + done_again
        train(model, optimizer, loader)
        assert engine.accountant.ledger.steps == 8 + done_again
        assert torch.equal(flat(model), first) == (key is not None)
        engine.accountant.ledger.save(ledger)
    # A ledger that is behind the checkpoint takes nothing away.
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    Ledger().save(ledger)
    engine, model, optimizer, loader = private(noise_generator=key)
    engine.load_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    assert engine.accountant.ledger.steps == 16


def test_a_ledger_of_another_run_changes_nothing(tmp_path):
    ledger, path = tmp_path / "ledger.json", tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    other, _, _, _ = private(sigma=2.0)
    other.accountant.step(0.25, 2.0, 9)
    other.accountant.ledger.save(ledger)
    engine, model, optimizer, loader = private()
    before = flat(model)
    with pytest.raises(ValueError, match="different runs"):
        engine.load_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    with pytest.raises(FileNotFoundError):
        engine.load_checkpoint(path, module=model, optimizer=optimizer, ledger=tmp_path / "none.json")
    assert torch.equal(flat(model), before)
    assert len(engine.accountant) == 0


def planned(schedule=None):
    model = torch.nn.Linear(4, 2)
    engine = PrivacyEngine()
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.ones(40, 4), torch.ones(40, 2)), batch_size=10),
        target_epsilon=2.0,
        target_delta=1e-3,
        steps=12,
        noise_schedule=schedule,
    )
    return engine, *made


@pytest.mark.parametrize("schedule", [None, Piecewise(((0, 1.0), (3, 1.25), (6, 0.75)))])
def test_steps_done_again_use_up_the_plan_at_its_own_places(tmp_path, schedule):
    ledger, path = tmp_path / "ledger.json", tmp_path / "run.pt"
    engine, model, optimizer, loader = planned(schedule)
    train(model, optimizer, loader, epochs=1)
    engine.save_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    train(model, optimizer, loader, epochs=1)
    engine.accountant.ledger.save(ledger)
    plan = engine._budget.plan
    engine, model, optimizer, loader = planned(schedule)
    engine.load_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    train(model, optimizer, loader, epochs=1)
    assert engine.accountant.history == plan
    with pytest.raises(PrivacyBudgetExceeded, match="all 12 releases"):
        train(model, optimizer, loader, epochs=1)
    assert engine.get_epsilon(1e-3) <= 2.0


def test_a_filter_counts_steps_done_again(tmp_path):
    ledger, path = tmp_path / "ledger.json", tmp_path / "run.pt"

    def made():
        run = private(sigma=1.0, noise_generator=None)
        run[0].set_budget(6.0, 1e-3)
        return run

    def until_the_end(engine, model, optimizer, loader):
        with pytest.raises(PrivacyBudgetExceeded):
            train(model, optimizer, loader, epochs=50)
        return engine.accountant.ledger.steps

    whole = until_the_end(*made())
    engine, model, optimizer, loader = made()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    train(model, optimizer, loader)
    engine.accountant.ledger.save(ledger)
    engine, model, optimizer, loader = made()
    engine.load_checkpoint(path, module=model, optimizer=optimizer, ledger=ledger)
    assert until_the_end(engine, model, optimizer, loader) == whole
    assert optimizer.releases == whole
