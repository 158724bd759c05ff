"""`adaclip` in process: whole runs, interruptions, resuming, and errors that are paragraphs."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from tiny_runs import flags

import adaclip
from adaclip import train
from adaclip.accounting import Ledger, SubsampledGaussian
from adaclip.cli import main
from adaclip.runs import PRIVATE, RunFolder

PRIVATE_WORDS = (
    "train_loss",
    "train_accuracy",
    "rows",
    "norm_quantiles",
    "clipped_fraction",
    "non_finite",
    "sample_norms",
)


pytestmark = pytest.mark.usefixtures("one_thread")


def raise_signal_in_step(monkeypatch, step, number=signal.SIGINT):
    """Ctrl-C while logical step `step` (from 0) is prepared."""
    original = train.learning_rate

    def learning_rate(config, at, total):
        if at == step:
            signal.raise_signal(number)
        return original(config, at, total)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def failure(capsys, argv):
    """The message of a command that must fail with exit code 2 and one paragraph."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.splitlines()[-1]
    assert re.match(r"adaclip( \w+)?: error: ", message)
    assert "Traceback" not in captured.err
    return message


# --- a whole run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "deep" / "run"
    argv = flags(
        digits,
        folder,
        "--steps",
        6,
        "--eval-every",
        2,
        "--epsilon",
        3,
        "--json",
        "--ema",
        0.9,
        "--threads",
        1,
    )
    out = subprocess.run(
        [sys.executable, "-c", "import sys; from adaclip.cli import main; sys.exit(main())", *argv],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return folder, out


def test_a_run_prints_its_facts(run):
    folder, out = run
    summary = json.loads(out.stdout)
    assert set(summary) == {
        "test_accuracy", "epsilon", "delta", "images_per_second", "seconds", "run_folder",
    }  # fmt: skip
    assert summary["run_folder"] == str(folder)
    assert 2.9 < summary["epsilon"] <= 3.0
    assert "step 2/6: test accuracy" in out.stderr
    assert "private" not in out.stderr


def test_a_run_folder_holds_everything_and_nothing_private(run):
    folder, _ = run
    assert {str(path) for path in files_of(folder)} == {
        "config.json", "ledger.json", "metrics.jsonl", "checkpoint.pt", "accuracy_epsilon.png", "clipping_norm.png",
        ".lock",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["adaclip"] == adaclip.__version__
    assert config["versions"]["torch"] == torch.__version__
    assert config["run"]["dataset_size"] == 200
    assert config["run"]["sample_rate"] == 0.2
    assert config["run"]["steps"] == 6
    assert config["run"]["max_grad_norm"] == config["train"]["max_grad_norm"] == 1.0
    assert config["run"]["trained_parameters"] > 1000
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert set(rows[0]) == {
        "step", "epoch", "test_accuracy", "test_loss", "epsilon", "delta", "lr", "max_grad_norm",
        "noise_multiplier", "gradient_noise_multiplier", "seconds", "images_per_second",
    }  # fmt: skip
    assert rows[0]["epsilon"] < rows[1]["epsilon"] < rows[2]["epsilon"] <= 3.0
    ledger = Ledger.load(folder / "ledger.json")
    assert ledger.events == [(SubsampledGaussian(0.2, config["run"]["noise_multiplier"]), 6)]
    public = "".join((folder / n).read_text() for n in ("config.json", "metrics.jsonl", "ledger.json"))
    assert not [word for word in PRIVATE_WORDS if word in public]
    extra = torch.load(folder / "checkpoint.pt", weights_only=True)["extra"]
    assert set(extra) == {"step", "finished", "seconds", "training_seconds", "ema", "last"}


def test_a_finished_run_says_so_when_resumed(run, capsys):
    before = files_of(run[0])
    assert main(["train", "--resume", str(run[0])]) == 0
    assert "is finished" in capsys.readouterr().err
    assert files_of(run[0]) == before


def test_a_run_folder_is_never_overwritten(run, digits, capsys):
    before = files_of(run[0])
    assert "holds a run already" in failure(capsys, flags(digits, run[0], "--steps", 1))
    assert files_of(run[0]) == before


def test_the_ledger_of_a_run_is_what_epsilon_reads(run, capsys):
    assert main(["epsilon", "--ledger", str(run[0]), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["epsilon_upper"]
    assert shown == json.loads(run[1].stdout)["epsilon"]


def test_private_diagnostics_go_into_a_folder_that_says_so(digits, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = flags(
        digits, folder, "--steps", 3, "--epsilon", 3, "--private-diagnostics", "--max-batch-size", 16
    )
    assert main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == [
        "test accuracy", "epsilon", "delta", "images/s", "time", "run folder",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / PRIVATE / "diagnostics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(
        {"rows", "loss", "accuracy", "gradient_norm_quantiles", "clipped_fraction"} <= set(r) for r in rows
    )
    assert max(row["rows"] for row in rows) > 16
    assert (folder / PRIVATE / "README.md").exists()
    public = "".join((folder / n).read_text() for n in ("config.json", "metrics.jsonl", "ledger.json"))
    assert not [word for word in PRIVATE_WORDS if word in public]


def test_without_noise_epsilon_is_infinite_and_the_user_is_told(digits, tmp_path, capsys):
    argv = flags(
        digits, tmp_path / "run", "--steps", 1, "--noise-multiplier", 0, "--delta", "0.01", "--quiet"
    )
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "epsilon: inf" in captured.out
    assert "nothing of this run is private" in captured.err
    assert "delta 0.01 is not below 1/N = 0.005" in captured.err


# --- interrupted and resumed --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_resumed_with_its_ledger(digits, tmp_path, capsys, monkeypatch, number):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_signal_in_step(patch, 3, number)
        argv = flags(digits, folder, "--steps", 5, "--epsilon", 3, "--eval-every", 2, "--ema", 0.9)
        assert main(argv) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"stopped after step 4 of 5; continue with: adaclip train --resume {folder}" in captured.err
    assert Ledger.load(folder / "ledger.json").steps == 4
    assert (folder / "accuracy_epsilon.png").exists()
    assert main(["train", "--resume", str(folder), "--threads", str(torch.get_num_threads()), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert Ledger.load(folder / "ledger.json").steps == 5
    # The signal came in step 4, before its evaluation, which the resumed run makes up for.
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == [2, 4, 5]
    assert 2.9 < summary["epsilon"] <= 3.0


def test_an_interrupted_logical_batch_is_abandoned_unbooked(digits, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_signal_in_step(patch, 1)
        assert main(flags(digits, folder, "--steps", 2, "--epsilon", 3, "--max-batch-size", 16)) == 130
    assert "stopped after step 1 of 2" in capsys.readouterr().err
    assert Ledger.load(folder / "ledger.json").steps == 1
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert Ledger.load(folder / "ledger.json").steps == 2


def test_an_interrupted_evaluation_is_done_after_resuming(digits, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def evaluate(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    original = train.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert main(flags(digits, folder, "--steps", 1, "--epsilon", 3)) == 130
    assert RunFolder(folder).read_metrics() == []
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == [1]
    assert Ledger.load(folder / "ledger.json").steps == 1


class _Killed(BaseException):
    """As final as SIGKILL: nothing catches it."""


def test_a_crash_between_ledger_and_checkpoint_over_counts(digits, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    calls = []

    def dying(self, *args, **kwargs):
        calls.append(args)
        if len(calls) >= 3:  # the first is the start's, the second the evaluation's after step 2
            raise _Killed
        return save(self, *args, **kwargs)

    save = train.PrivacyEngine.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(train.PrivacyEngine, "save_checkpoint", dying)
        with pytest.raises(_Killed):
            main(flags(digits, folder, "--steps", 6, "--epsilon", 3, "--eval-every", 2))
    assert Ledger.load(folder / "ledger.json").steps == 4
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "the ledger holds 2 steps more than the checkpoint" in captured.err
    # Two of the six steps of the budget were lost in the crash.
    assert "training ends at step 4 of 6: all 6 releases" in captured.err
    assert Ledger.load(folder / "ledger.json").steps == 6
    epsilon = float(re.search(r"^epsilon: (.*)$", captured.out, re.MULTILINE)[1])
    assert 2.9 < epsilon <= 3.0
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == [2, 4]
    assert main(["train", "--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(digits, tmp_path_factory):
    """A run stopped after its first step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        raise_signal_in_step(patch, 0)
        assert main(flags(digits, folder, "--steps", 2, "--epsilon", 3)) == 130
    return folder


def test_a_resumed_run_refuses_other_settings(stopped, tmp_path, capsys):
    before = files_of(stopped)
    resume = ["train", "--resume", stopped]
    assert "--model must be what the run was started with, 'vgg-mini'" in failure(
        capsys, [*resume, "--model", "vgg11"]
    )
    assert "--config cannot be combined" in failure(capsys, [*resume, "--config", "x.toml"])
    assert "--run-dir must be the folder" in failure(capsys, [*resume, "--run-dir", tmp_path])
    assert "holds no run that could be resumed" in failure(capsys, ["train", "--resume", tmp_path])
    assert files_of(stopped) == before


def test_a_checkpoint_of_another_model_is_refused_and_kept(stopped, capsys):
    config = stopped / "config.json"
    original = config.read_text()
    try:
        config.write_text(original.replace('"width": 4', '"width": 8'))
        before = files_of(stopped)
        assert "the checkpoint is of another model" in failure(capsys, ["train", "--resume", stopped])
        assert files_of(stopped) == before
    finally:
        config.write_text(original)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("checkpoint.pt", b"rubbish", "it is damaged"),
        ("ledger.json", b"{}", "is not a ledger"),
        ("config.json", b"{", "cannot be read"),
    ],
)
def test_a_damaged_run_is_refused_and_kept(stopped, capsys, file, content, message):
    original = (stopped / file).read_bytes()
    try:
        (stopped / file).write_bytes(content)
        before = files_of(stopped)
        assert message in failure(capsys, ["train", "--resume", stopped])
        assert files_of(stopped) == before
    finally:
        (stopped / file).write_bytes(original)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-grad-norm", "-1"], "max_grad_norm must be a positive finite number, got -1.0"),
        (["--noise-multiplier", "-0.5"], "noise_multiplier must be finite and at least 0, got -0.5"),
        (["--delta", "1"], "delta must be in (0, 1), got 1.0"),
        (["--epsilon", "0"], "epsilon must be a positive finite number, got 0.0"),
        (["--dataset", "imagenet"], "dataset must be one of mnist-mini, mnist,"),
        (["--model", "resnet"], "model must be one of vgg11"),
        (["--model-option", "wings=2"], "model_option does not fit vgg-mini"),
        (["--model-option", "groups=0"], "groups must be"),
        (["--batch-size", "201"], "batch_size must be at most the number of training images, 200, got 201"),
        (["--accountant", "hope"], "accountant must be one of"),
        (["--data-dir", "/nowhere"], "MNIST is not complete in /nowhere"),
        (["--steps", "2", "--epochs", "2"], "only one of epochs and steps"),
        (["--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--model-option", "width"], "must be KEY=VALUE, got 'width'"),
        (["--config", "/nowhere.toml"], "No such file"),
    ],
)
def test_a_users_mistake_is_one_paragraph_and_leaves_nothing(digits, tmp_path, capsys, more, message):
    assert message in failure(capsys, flags(digits, tmp_path / "runs" / "run", *more))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_run_folder_is_found_before_any_data_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda config: pytest.fail("data was read"))
    (tmp_path / "file").write_text("mine")
    message = failure(capsys, flags("/nowhere", tmp_path / "file" / "run", "--steps", 1))
    assert "cannot be written" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_a_fault_of_adaclips_own_keeps_its_traceback(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(flags(digits, tmp_path / "run", "--steps", 1, "--epsilon", 3))


def test_config_files_reach_the_run(digits, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nepsilon = 2.0\nsteps = 1\nseed = 5\nwings = 2\n")
    argv = flags(digits, tmp_path / "run", "--config", path)
    assert "unknown settings 'wings'" in failure(capsys, argv)
    path.write_text("[train]\nepsilon = 2.0\nsteps = 1\nseed = 5\n")
    assert main([*argv, "--seed", "6"]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (settings["epsilon"], settings["steps"], settings["seed"], settings["epochs"]) == (2.0, 1, 6, None)


def test_the_default_run_folder_is_named_after_data_model_and_time(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [a for a in flags(digits, "x", "--steps", 1, "--quiet") if a not in ("--run-dir", "x")]
    assert main(argv) == 0
    assert main(argv) == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    assert all(re.fullmatch(r"mnist-vgg-mini-\d{8}-\d{6}(-2)?", name) for name in names)


# --- the other commands -------------------------------------------------------------------------------------


def test_version_help_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert adaclip.__version__ in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "sampling, noise, augmentation and dropout always draw from the operating system" in words
    assert main([]) == 2


def test_help_and_the_privacy_commands_need_no_torch():
    code = (
        "import sys; from adaclip.cli import main;"
        "assert main(['train', '--help']) == 0;"
        "assert main(['calibrate', '--epsilon', '3', '--sample-rate', '0.1', '--steps', '10']) == 0;"
        "assert main(['epsilon', '--noise-multiplier', '-1', '--sample-rate', '0.1', '--steps', '10']) == 2;"
        "assert not {'torch', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert out.returncode == 0, out.stderr
    assert out.stderr.startswith("adaclip epsilon: error: ")
