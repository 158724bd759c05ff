"""`adaclip train` under torchrun: one run, whatever the number of processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_runs import flags
from torch import distributed as dist
from two_processes import run

from adaclip import checkpoint
from adaclip.runs import PRIVATE, RunFolder
from adaclip.train import Training
from adaclip.train_sources import resolve, resume_with

pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "adaclip", *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_run_of_two_processes(digits, tmp_path):
    folder = tmp_path / "run"
    out, err = torchrun(*flags(digits, folder, "--epsilon", 3, "--steps", 4, "--json")).communicate(
        timeout=120
    )
    summary = json.loads(out)
    assert "2 processes share each batch" in err
    assert err.count("kernels on cpu") == 1
    assert summary["run_folder"] == str(folder)
    assert summary["epsilon"] <= 3
    held = checkpoint.load(folder / "checkpoint.pt")
    assert held["extra"]["finished"]
    assert held["releases"] == 4
    assert [row["step"] for row in RunFolder.join(folder).read_metrics()][-1] == 4


def test_a_wrong_argument_ends_all(digits, tmp_path):
    process = torchrun(*flags(digits, tmp_path / "run", "--epsilon", 3, "--steps", 4, "--batch-size", 1000))
    _, err = process.communicate(timeout=120)
    assert process.returncode
    assert err.count("batch_size must be at most the number of training images, 200, got 1000") == 2
    assert not (tmp_path / "run").exists()


def _trained(data, path, steps, settings):
    """Begin or resume a run in this process's part; returns (the summary or None, parameters, epsilon)."""
    leads = dist.get_rank() == 0 if dist.is_initialized() else True
    begun = settings is None
    if begun:
        folder = RunFolder.open(path) if leads else RunFolder.join(path)
        saved = folder.read_config()
        config = resume_with(saved["train"], {})
    else:
        saved, config = None, resolve({"data_dir": data, "dataset": "mnist", "steps": steps, **settings})
        folder = RunFolder.create(path) if leads else RunFolder.join(path)
    training = Training(config, folder, saved=saved)
    summary = training.run(quiet=True)
    folder.close()
    theta = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    return summary, theta, training.epsilon(), training.step


SETTINGS = {
    "model": "vgg-mini",
    "model_option": {"width": 4},
    "batch_size": 40,
    "epsilon": 3.0,
    "optimizer": "sgd",
    "lr": 0.1,
    "ema": 0.9,
    "eval_every": 2,
    "max_batch_size": 8,
    "augment": "shift",
}


def test_processes_hold_the_same_model_and_account(digits, tmp_path):
    settings = SETTINGS | {"scheme": "adaptive", "epsilon": 8.0, "optimizer": "noise-nadam"}
    first, second = run(_trained, str(digits), str(tmp_path / "run"), 4, settings)
    assert first[0]["epsilon"] == first[2] == second[2] <= 8
    assert second[0] == {}
    assert torch.equal(first[1], second[1])


def _interrupted(data, path):
    if dist.get_rank() == 1:
        # To one process only: all of them stop after the same step.
        clock = Training._clock

        def signaled(training, started):
            clock(training, started)
            if training.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        Training._clock = signaled
    return _trained(data, path, 2000, SETTINGS | {"eval_every": 1000})


@pytest.mark.parametrize("world", [1, 3])
def test_a_signal_to_one_stops_all_and_any_number_goes_on(digits, tmp_path, world):
    path = str(tmp_path / "run")
    both = run(_interrupted, str(digits), path)
    (summary, theta, epsilon, step), other = both
    assert summary is other[0] is None
    assert step == other[3] == 3
    assert torch.equal(theta, other[1])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["steps"] == 2000
    found = run(_resumed_for_a_step, path, world=world)
    for at, held, spent, ahead in found:
        assert at == step
        assert torch.equal(held, theta)
        assert spent == epsilon
        assert ahead > epsilon


def _resumed_for_a_step(path):
    leads = dist.get_rank() == 0
    folder = RunFolder.open(path) if leads else RunFolder.join(path)
    saved = folder.read_config()
    training = Training(resume_with(saved["train"], {}), folder, saved=saved)
    theta = torch.cat([p.detach().flatten() for p in training.model.parameters()]).clone()
    at, spent = training.step, training.epsilon()
    # The rest of a run that long is not waited for.
    training.total = at + 1
    training.run(quiet=True)
    folder.close()
    return at, theta, spent, training.epsilon()


def _full_disk(data, path):
    if dist.get_rank() == 0:
        RunFolder.append_metrics = _no_space
    start = time.monotonic()
    try:
        _trained(data, path, 8, SETTINGS)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def _no_space(self, row):
    raise OSError(28, "No space left on device")


def test_a_full_disk_of_the_first_ends_all(digits, tmp_path):
    (kind, _, _), (other, message, seconds) = run(_full_disk, str(digits), str(tmp_path / "run"), timeout=40)
    assert (kind, other) == ("OSError", "RuntimeError")
    assert "has lost another one" in message
    assert seconds < 60


def _diagnostics(data, path):
    folder = RunFolder.join(path)
    config = resolve({"data_dir": data, "dataset": "mnist", "steps": 2, **SETTINGS})
    try:
        Training(config, folder, private_diagnostics=True)
    except ValueError as error:
        return str(error)
    return None


def test_private_diagnostics_are_of_one_process(digits, tmp_path):
    for message in run(_diagnostics, str(digits), str(tmp_path)):
        assert message.startswith("--private-diagnostics is for a run in one process, got 2")
    assert not (tmp_path / PRIVATE).exists()
