"""Cases of the command line: arguments, config files, run folders. Exit code 2 and one paragraph, or a result."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from data_files import mnist_files, write
from fuzz.bounds import limits
from fuzz.values import PLAIN, changed, damaged
from hypothesis import strategies as st

from adaclip import cli
from adaclip.accounting import Laplace, Ledger, SubsampledGaussian
from adaclip.runs import RunFolder
from adaclip.schemes import SCHEMES
from adaclip.train_config import TrainConfig

_WORDS = st.sampled_from(
    ["", "0", "1", "2", "-1", "0.5", "1e-5", "1e-400", "5e-324", "1e400", "1e308", "nan", "inf", "-inf", "9" * 30,
     "9" * 400, "9" * 5000, "x", "=", "a=b", "lr=x2,1", "\x00", "\n", "\ud800", "ä", "--", "-h", ".", "/", "/dev/null",
     "poisson", "shuffled", "truncated_poisson", "fixed_size", "pld", "rdp", "zero_out", "mnist", "folder:", "folder:x",
     "folder:~nobody", "vgg-mini", "linear:0.5", "linear:nan", "{}", "[[", "true", "dpsgd,adaptive", "all"]
)  # fmt: skip


def _command(draw: Any, *argv: str, codes: tuple[int, ...] = (0, 2)) -> str:
    """Run it in this process; how it ended."""
    out, err = io.StringIO(), io.StringIO()
    with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(argv))
    assert code in codes, (code, argv)
    if code == 2:
        said = err.getvalue()
        assert "Traceback" not in said
        paragraph = said[said.rindex("adaclip") :]
        assert ": error: " in said
        assert paragraph.count("\n") <= 1, said
    return f"exit code {code}"


def _flags(draw: Any, flags: dict[str, st.SearchStrategy | None]) -> list[str]:
    """Some of the flags, most with words that fit; None: a flag without a value. A name that ends in _ is always there."""
    words: list[str] = []
    for name, value in flags.items():
        if not name.endswith("_") and draw(st.integers(0, 2)):
            continue
        words.append(f"--{name.rstrip('_')}")
        if value is not None:
            words.append(draw(_WORDS if draw(st.integers(0, 8)) == 0 else value.map(str)))
    return words + draw(st.lists(_WORDS, max_size=1) if draw(st.integers(0, 9)) == 0 else st.just([]))


_RATE = st.sampled_from([1e-3, 0.01, 0.5, 1])
_MECHANISM: dict[str, st.SearchStrategy | None] = {
    "noise-multiplier": st.sampled_from([0, 0.7, 3]),
    "sample-rate": _RATE,
    "batch-size": st.integers(1, 50),
    "dataset-size": st.integers(50, 9999),
    "steps": st.integers(0, 500),
    "epochs": st.sampled_from([0, 0.5, 2]),
    "sampling": st.sampled_from(["poisson", "truncated_poisson", "fixed_size", "shuffled"]),
    "overflow": st.sampled_from([0, 1e-9]),
    "adjacency": st.sampled_from(["add_remove", "replace_one", "zero_out"]),
    "delta": st.sampled_from([1e-5, 0.1]),
    "accountant": st.sampled_from(["pld", "rdp"]),
    "json": None,
}


def epsilon(draw: Any) -> str:
    """adaclip epsilon from parameters."""
    usual = {
        "noise-multiplier_": _MECHANISM["noise-multiplier"],
        "sample-rate_": _RATE,
        "steps_": st.integers(0, 500),
    }
    flags = usual if draw(st.booleans()) else {}
    rest = {
        k: v
        for k, v in _MECHANISM.items()
        if f"{k}_" not in flags and (not flags or k not in ("epochs", "batch-size", "dataset-size"))
    }
    return _command(draw, "epsilon", *_flags(draw, {**flags, **rest, "group-size": st.just(1)}))


def calibrate(draw: Any) -> str:
    """adaclip calibrate."""
    solve = draw(st.sampled_from(["noise", "steps", "sample-rate"]))
    usual = {
        "noise": {"sample-rate_": _RATE, "steps_": st.integers(1, 500)},
        "steps": {"sample-rate_": _RATE, "noise-multiplier_": st.sampled_from([0.7, 3])},
        "sample-rate": {"noise-multiplier_": st.sampled_from([0.7, 3]), "steps_": st.integers(1, 500)},
    }[solve]
    more = {k: _MECHANISM[k] for k in ("delta", "accountant", "adjacency", "json")}
    if draw(st.integers(0, 3)) == 0:
        more = _MECHANISM
    flags = {"epsilon_": st.sampled_from([0.5, 3]), "solve_": st.just(solve), **usual}
    return _command(draw, "calibrate", *_flags(draw, {**flags, **more}))


def ledgers(draw: Any) -> str:
    """adaclip epsilon --ledger of a damaged or altered file."""
    ledger = Ledger([(SubsampledGaussian(0.01, 1.0), 40), (Laplace(3.0), 2)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ledger.json")
        content = json.dumps(ledger.state_dict()).encode()
        path.write_bytes(_document(draw, content))
        return _command(draw, "epsilon", "--ledger", draw(st.sampled_from([folder, str(path)])), "--json")


def _document(draw: Any, content: bytes) -> bytes:
    """A JSON file, damaged or with other values; or one that is nested deeper than a parser can follow."""
    how = draw(st.integers(0, 8))
    if how == 0:
        return draw(
            st.sampled_from(
                [b"[" * 10**5, b'{"a":' * 10**5, b"", b"null", b"\xff\xfe", b"1e999", b"9" * 5000]
            )
        )
    if how < 4:
        return damaged(draw, content)
    return json.dumps(changed(draw, json.loads(content), PLAIN)).encode()


# --- train -----------------------------------------------------------------------------------------------


class _Stop(ValueError):
    """Where a command would begin to train."""


@contextlib.contextmanager
def _untrained() -> Iterator[None]:
    def stop(*_: Any, **__: Any) -> None:
        raise _Stop("would train")

    with contextlib.ExitStack() as stack:
        for target in (
            "adaclip.train.Training",
            "adaclip.compare.Comparison.run",
            "adaclip.compare_tune.Tuning.run",
            "adaclip.auditing.component_audit",
            "adaclip.auditing.one_run_audit",
            "adaclip.auditing.two_run_audit",
            "adaclip.cli_bench._error",
        ):
            stack.enter_context(mock.patch(target, stop))
        yield


def _settings() -> dict[str, st.SearchStrategy | None]:
    """A flag for every setting of a run."""
    flags: dict[str, st.SearchStrategy | None] = {}
    for name, spec in TrainConfig.__dataclass_fields__.items():
        kind, choices = spec.metadata["kind"], spec.metadata["choices"]
        flag = name.replace("_", "-")
        if kind is bool:
            flags[flag] = None
        elif choices:
            flags[flag] = st.sampled_from(choices)
        else:
            words = {
                int: ["1", "7"],
                float: ["0.5", "1e-5"],
                dict: ["width=4", "plan=[4]"],
                str: ["x", "linear:0.5"],
            }
            flags[flag] = st.sampled_from(words[kind])
    flags["dataset"] = st.sampled_from(["mnist", "mnist-mini", "cifar10", "breastmnist", "folder:x"])
    flags["model"] = st.sampled_from(["vgg-mini", "vgg11"])
    del flags["download"]
    return flags


def train(draw: Any) -> str:
    """adaclip train and compare up to where they would train, by flags."""
    with tempfile.TemporaryDirectory() as folder, _untrained():
        some = dict(
            draw(st.lists(st.sampled_from(sorted(_settings().items(), key=lambda f: f[0])), max_size=5))
        )
        words = _flags(draw, {f"{name}_": value for name, value in some.items()})
        if draw(st.booleans()):
            argv = [
                "train",
                "--run-dir",
                f"{folder}/run",
                *words,
                *_flags(draw, {"private-diagnostics": None, "quiet": None, "json": None, "config": _WORDS}),
            ]
        else:
            more = {
                "seeds": st.integers(1, 2),
                "jobs": st.integers(1, 2),
                "schemes": st.sampled_from(["all", "dpsgd", "adaptive,dpsgd"]),
                "tune": st.sampled_from(["lr=1,x2", "dpsgd:lr=1"]),
            }
            argv = ["compare", "--out", f"{folder}/out", *words, *_flags(draw, more)]
        how = _command(draw, *argv)
        left = [p for p in Path(folder).rglob("*") if p.is_file()]
        assert argv[0] == "compare" or not left, left
        return f"{argv[0]}: {how}"


def configs(draw: Any) -> str:
    """adaclip train with a config file: damaged text, and tables with any values."""
    names = st.sampled_from([*sorted(TrainConfig.__dataclass_fields__), "x"])
    values = st.sampled_from(
        [
            "1",
            "-1",
            "0.5",
            "nan",
            "inf",
            "1e400",
            "9" * 30,
            '"x"',
            '"flat"',
            "true",
            "[]",
            "[1, [2]]",
            "{}",
            "{ a = 1 }",
            "1979-05-27",
            "[" * 3000,
        ]
    )
    lines = [f"{draw(names)} = {draw(values)}" for _ in range(draw(st.integers(0, 4)))]
    title = draw(
        st.sampled_from(
            [
                "[train]",
                "[train]",
                f"[scheme.{draw(st.sampled_from(sorted(SCHEMES)))}]",
                "[x]",
                "train = 1",
                "[[train]]",
            ]
        )
    )
    text = "\n".join([title, *lines]).encode()
    if draw(st.integers(0, 3)) == 0:
        text = damaged(draw, text)
    with tempfile.TemporaryDirectory() as folder, _untrained():
        path = Path(folder, "c.toml")
        path.write_bytes(text)
        argv = (
            ["train", "--run-dir", f"{folder}/run"]
            if draw(st.booleans())
            else ["compare", "--out", f"{folder}/out"]
        )
        return _command(draw, *argv, "--config", str(path))


def tools(draw: Any) -> str:
    """adaclip audit and bench up to where they would run; and words that are no command."""
    number = st.sampled_from([1, 3, 40])
    audit = {
        "method": st.sampled_from(["component", "one-run", "two-run"]), "noise-multiplier": st.sampled_from([0.5, 2]), "sample-rate": _RATE,
        "steps": number, "delta": st.just(1e-5), "canaries": number, "runs": number, "max-grad-norm": number, "clipping": st.sampled_from(["flat", "adaptive", "dc_sgd"]),
        "groups": number, "side-trials": number, "confidence": st.just(0.9), "accountant": st.just("pld"), "seed": number, "json": None,
    }  # fmt: skip
    bench = {
        "model": st.just("vgg-mini"), "module": st.sampled_from(["os:getcwd", "json:loads", "no.such:f", "x"]), "batch-size_": number,
        "image-size_": st.sampled_from([28, 32]), "channels": number, "classes": number, "repeats": st.just(1), "device": st.just("cpu"), "json": None,
    }  # fmt: skip
    with _untrained():
        which = draw(st.sampled_from(["audit", "audit", "bench", "words"]))
        if which == "words":
            return _command(draw, *draw(st.lists(_WORDS.filter(lambda w: w != "doctor"), max_size=4)))
        words = _flags(draw, audit if which == "audit" else bench)
        return f"{which}: {_command(draw, which, *words)}"


# --- run folders -----------------------------------------------------------------------------------------

_FOLDER: dict[str, bytes] = {}
_DATA = mnist_files(n=40)


def _finished_half(data: Path) -> dict[str, bytes]:
    """The files of a run that was interrupted after its first of two steps; made once."""
    if not _FOLDER:
        from adaclip.train import Training
        from adaclip.train_sources import resolve

        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "dataset": "mnist", "data_dir": str(data), "model": "vgg-mini", "model_option": {"width": 4},
                "batch_size": 20, "epsilon": 3.0, "steps": 2, "eval_every": 1, "optimizer": "sgd", "lr": 0.1,
            }  # fmt: skip
            training = Training(resolve(settings), RunFolder.create(Path(folder, "run")))
            training.total = 1
            training.run(quiet=True)
            training.finished = False
            training._save()
            _FOLDER.update(
                {p.name: p.read_bytes() for p in Path(folder, "run").iterdir() if p.suffix != ".png"}
            )
    return _FOLDER


def run_folders(draw: Any) -> str:
    """adaclip train --resume of a folder with one file damaged, altered or gone; refused, it is left as it was."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder, "data"), Path(folder, "run")
        write(data, {f"mnist/{name}": content for name, content in _DATA.items()})
        files = dict(_finished_half(data))
        name = draw(
            st.sampled_from(["config.json", "config.json", "metrics.jsonl", "ledger.json", "checkpoint.pt"])
        )
        how = draw(st.integers(0, 9))
        if how == 0:
            del files[name]
        elif name == "checkpoint.pt":
            files[name] = damaged(draw, files[name])
        elif name == "metrics.jsonl":
            files[name] = b"\n".join(_document(draw, line) for line in files[name].splitlines()) + b"\n"
        else:
            files[name] = _document(draw, files[name])
        write(run, files)

        def stop(*_: Any, **__: Any) -> None:
            raise _Stop("would train")

        torch.manual_seed(0)
        # Resuming comes as far as the loop; what that writes is not looked at here.
        with mock.patch("adaclip.train.Training._train", stop), contextlib.suppress(_Stop):
            ended = _command(draw, "train", "--resume", str(run), "--data-dir", str(data), "--quiet")
            if ended == "exit code 2":
                assert {p.name: p.read_bytes() for p in run.iterdir()} == files
            return ended
        return "would train"


TARGETS = {
    "epsilon": (epsilon, 4),
    "calibrate": (calibrate, 1),
    "ledgers": (ledgers, 4),
    "train": (train, 6),
    "configs": (configs, 6),
    "tools": (tools, 6),
}
FOLDERS = {"run_folders": (run_folders, 1)}
