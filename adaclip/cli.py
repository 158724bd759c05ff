"""The `adaclip` command. Each subcommand imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adaclip import __version__

__all__ = ["main"]


class _UserError(Exception):
    """What the user can mend: shown as one paragraph, exit code 2."""


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """In here an error of these kinds has its cause in the arguments, the files or the machine."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise _UserError(" ".join(str(error).split()) or type(error).__name__) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 2: the arguments, the data or the machine are at fault (a disk that is full, a checkpoint that is damaged,
    a folder in use, parameters that diverge), and stderr says how in one paragraph.
    130: interrupted. 1: `doctor` or `audit` found a fault; a fault of adaclip's own raises and leaves its traceback.
    """
    try:
        args = _parser().parse_args(argv)
        # For reports that say which command made them.
        args.argv = list(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed help, the version or the error
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return args.run(args)
    except _UserError as error:
        print(f"adaclip {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"adaclip {args.command}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """One whose errors are one paragraph, whatever was given."""

    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))


def _parser() -> argparse.ArgumentParser:
    from adaclip.cli_audit import add_audit_parser
    from adaclip.cli_compare import add_compare_parser
    from adaclip.cli_privacy import add_calibrate_parser, add_epsilon_parser

    parser = _Parser(prog="adaclip", description="Differentially private training of convolutional networks.")
    parser.add_argument("--version", action="version", version=f"adaclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    add_compare_parser(commands)
    add_epsilon_parser(commands)
    add_calibrate_parser(commands)
    add_audit_parser(commands)
    _add_bench(commands)
    _add_doctor(commands)
    for name in ("compare", "epsilon", "calibrate", "audit"):
        command = commands.choices[name]
        command.set_defaults(run=_guarded(command.get_default("run")))
    return parser


def _guarded(run: Any) -> Any:
    def guarded(args: argparse.Namespace) -> int:
        with _user_errors():
            return run(args)

    return guarded


# --- train --------------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction) -> None:
    from adaclip.train_sources import add_flags

    parser = commands.add_parser(
        "train",
        help="train a model privately",
        description="Trains a model with differential privacy and keeps the run in a folder. Settings come from "
        "the data set's shipped config, then --config, then these flags; the last one wins. A scheme counts as "
        "part of whichever of these names it.",
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="settings, in the table [train], and of schemes in tables [scheme.NAME]",
    )
    run.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="default: runs/<dataset>-<model>-<time>; must be new or empty",
    )
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder")
    run.add_argument(
        "--private-diagnostics",
        action="store_true",
        help="write training loss, gradient norms and the like, which no guarantee covers, into a marked subfolder",
    )
    run.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")
    run.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_flags(parser.add_argument_group("settings (keys of [train], with underscores)"))
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from adaclip.allocator import keep_freed_memory
    from adaclip.launch import launched
    from adaclip.runs import RunFolder

    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        with _user_errors():
            stack.enter_context(launched())
            training = _resume(args, RunFolder) if args.resume else _start(args, RunFolder)
        if training is None:
            return 0
        stack.callback(training.folder.close)
        return _run(training, args)


def _led(make: Callable[[], Any], folders: Any) -> Any:
    """The run folder: made by the first of the processes that torchrun has started, and joined by the others."""
    from adaclip.launch import process_count

    # Without torch, where there is no other process: the cheapest mistakes are found early.
    if process_count() == 1:
        return make()
    from adaclip.processes import Processes

    processes, folder = Processes(), None
    with processes.together("the run folder"):
        if processes.rank == 0:
            folder = make()
    path = processes.told("the run folder", None if folder is None else str(folder.path))
    return folders.join(path) if folder is None else folder


def _run(training: Any, args: argparse.Namespace) -> int:
    from adaclip.backends import kernels_on
    from adaclip.errors import TrainingDiverged

    folder = training.folder.path
    for note in training.notes if training.leads else ():
        print(note, file=sys.stderr)
    if training.leads and not args.quiet:
        print(
            f"{training.config.dataset}: {training.size} training images, {training.config.model}, expected batch "
            f"{training.config.batch_size}, noise multiplier {training.optimizer.noise_multiplier:.4g}, "
            f"{training.total} steps; run folder {folder}",
            file=sys.stderr,
        )
        if training.processes.size > 1:
            print(f"{training.processes.size} processes share each batch", file=sys.stderr)
        print(f"kernels on {training.device.type}: {kernels_on(training.device)}", file=sys.stderr)
    try:
        summary = training.run(quiet=args.quiet)
    except TrainingDiverged as error:
        raise _UserError(str(error)) from error
    except OSError as error:
        raise _UserError(
            f"the run folder {folder} cannot be written: {error}. What it held is whole; once it can be written, "
            f"continue with: adaclip train --resume {folder}"
        ) from error
    if summary is None:
        if training.leads:
            print(
                f"stopped after step {training.step} of {training.total}; continue with: adaclip train --resume "
                f"{folder}",
                file=sys.stderr,
            )
        return 130
    if training.leads:
        _print_summary(summary, args.json)
    return 0


def _start(args: argparse.Namespace, folders: Any) -> Any:
    from adaclip.train_sources import flags_given, resolve

    config = resolve(flags_given(args), args.config)
    # Before torch is imported and data is read: the cheapest mistake to find out about early.
    folder = _led(
        lambda: folders.create(args.run_dir or _default_folder(config.dataset, config.model)), folders
    )
    try:
        from adaclip.train import Training

        return Training(config, folder, private_diagnostics=args.private_diagnostics)
    except BaseException:
        folder.abandon()
        raise


def _resume(args: argparse.Namespace, folders: Any) -> Any:
    from adaclip.train_sources import flags_given, resume_with

    if args.config is not None:
        raise ValueError(
            "--config cannot be combined with --resume: the run keeps the settings it was started with"
        )
    if args.run_dir is not None and args.run_dir.resolve() != args.resume.resolve():
        raise ValueError(f"--run-dir must be the folder given to --resume, {args.resume}, got {args.run_dir}")
    folder = _led(lambda: folders.open(args.resume), folders)
    try:
        saved = folder.read_config()
        config = resume_with(saved["train"], flags_given(args))
        from adaclip.train import Training, is_finished

        if folder.begun and is_finished(folder):
            print(f"the run in {folder.path} is finished: there is nothing to resume", file=sys.stderr)
            folder.close()
            return None
        # Cut off before its first checkpoint, a run is started anew: it has released nothing.
        saved = saved if folder.begun else None
        return Training(config, folder, saved=saved, private_diagnostics=args.private_diagnostics)
    except BaseException:
        folder.close()
        raise


def _default_folder(dataset: str, model: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{dataset.rstrip('/').replace(':', '/').split('/')[-1]}-{model}")
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, n = Path("runs", stem), 1
    while path.exists():
        n += 1
        path = Path("runs", f"{stem}-{n}")
    return path


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    from adaclip.runs import epsilon_text, standard

    if as_json:
        print(json.dumps(standard(summary)))
        return
    split = next(key for key in summary if key.endswith("_accuracy")).removesuffix("_accuracy")
    print(f"{split} accuracy: {summary[f'{split}_accuracy']:.2%}")
    print(f"epsilon: {epsilon_text(summary['epsilon'])}")
    print(f"delta: {summary['delta']:g}")
    print(f"images/s: {summary['images_per_second']:.0f}")
    print(f"time: {summary['seconds']:.1f} s")
    print(f"run folder: {summary['run_folder']}")


# --- bench and doctor ---------------------------------------------------------------------------------------


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a private step against an ordinary one, for your model",
        description="Alternates an ordinary step and a private step of the same model in one process, after "
        "checking the private one's clipped sum against the reference backend.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="vgg11", help="a model of adaclip.models (default vgg11)")
    what.add_argument(
        "--module", metavar="MODULE:FACTORY", help="a function of yours that returns a torch module"
    )
    for flag, default, text in (
        ("--batch-size", 64, "images in a batch"),
        ("--image-size", 32, "pixels squared"),
        ("--channels", 3, "of the images"),
        ("--classes", 10, "outputs of the model"),
        ("--repeats", 7, "timed rounds"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    with _user_errors():
        from adaclip.cli_bench import run_bench

        return run_bench(args)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor", help="what this installation can do, what is missing and why, and a self-test"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from adaclip.doctor import run_doctor

    return run_doctor(as_json=args.json)
