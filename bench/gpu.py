"""Everything that a GPU has to show, in one command: tests, kernels, whole steps, peers.

    python -m bench.gpu [--budget 460] [--only TEXT] [--rounds 7] [--out DIR] [--skip-checks] [--dry-run]

adaclip must be installed (`pip install --no-build-isolation --no-deps .` builds the CUDA kernels where nvcc is). First the
tests run on the device; then everything of `bench.gpu_parts.plan` is measured, most important first, each behind a check
of its own. After every measurement bench/results/gpu-<name>-<date>.json (with a number, if a run of that day left one)
and a Markdown table beside it are replaced, so that a run that is cut off leaves what it has. The budget is kept: what it does not reach is listed as such.

--dry-run goes through every kind of measurement at toy sizes on the CPU, the kernels in Triton's interpreter; its figures
mean nothing, and it writes to a folder of its own.

Returns 0 if all that was measured is right, 1 if something is not, 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu_parts.checks import run_checks
from bench.gpu_parts.plan import Item, dry_plan, plan
from bench.gpu_parts.report import RESULTS, Report

_ROOT = Path(__file__).parents[1]
# The tests may take this part of the budget.
_CHECKS = 0.3
# Left over for writing and for ending processes.
_RESERVE = 5.0
# From the start of a worker until it can measure: imports, and the device's first use.
_STARTING = 90.0


class Worker:
    """`bench.gpu_parts.worker`, started when it is needed and again when it has died."""

    def __init__(self, dry_run: bool, rounds: int) -> None:
        self._command = [sys.executable, "-m", "bench.gpu_parts.worker", "--rounds", str(rounds)]
        self._env = dict(os.environ)
        if dry_run:
            self._command.append("--dry-run")
            self._env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # The installed adaclip, unless this checkout holds a built one: sources alone would hide it.
        if not list((_ROOT / "adaclip").glob("_core*")):
            self._command[1:3] = ["-c", _WITHOUT_SOURCES]
        self._process: subprocess.Popen | None = None

    def measure(self, section: str, arguments: dict[str, Any], limit: float) -> dict[str, Any]:
        """A measurement's result; "cut off" if it takes longer than `limit` seconds, "failed" if the process dies."""
        if self._process is None:
            self._start()
        start = time.monotonic()
        try:
            self._process.stdin.write(json.dumps({"section": section, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=max(0.0, limit))
        except queue.Empty:
            self.stop()
            return {"status": "cut off", "why": f"it took more than {limit:.0f} s"}
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = self.stop()
            return {"status": "failed", "why": f"the process that measures ended with code {code}"}
        result = json.loads(answer)
        if result["status"] == "failed":
            self.stop()
        return {**result, "seconds": round(time.monotonic() - start, 1)}

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=_ROOT, env=self._env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._answers), daemon=True).start()

    def stop(self) -> int | None:
        """End the process, if there is one; returns its code."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            # One that has crashed says how.
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


# Run with `python -c`, whose first entry of sys.path is the current folder: behind the installed packages instead.
_WITHOUT_SOURCES = (
    "import sys; sys.path.append(sys.path.pop(0)); from bench.gpu_parts.worker import main; sys.exit(main())"
)


def _pass_on(lines: Iterator[str], answers: queue.Queue[str | None]) -> None:
    for line in lines:
        answers.put(line)
    answers.put(None)


def run(items: list[Item], report: Report, worker: Worker, args: argparse.Namespace) -> None:
    """Fill the report until the budget is spent."""
    end = time.monotonic() + args.budget - _RESERVE

    def left() -> float:
        return end - time.monotonic()

    found = worker.measure("environment", {}, min(_STARTING, left()))
    if found["status"] != "ok":
        raise RuntimeError(found.get("why", "the environment cannot be read"))
    report.begin(found["environment"])
    _say(f"{report.environment['gpu']}: results in {report.path}", left())
    if not args.skip_checks:
        result = run_checks(_CHECKS * args.budget, args.dry_run)
        report.add({"id": "tests on the device", "section": "checks", **result})
        _say(f"tests: {result['status']} {result['counts']}", left())
    for item in items:
        result: dict[str, Any] = {"status": "not reached"}
        if left() >= item.seconds:
            result = worker.measure(item.section, item.arguments, min(left(), 3 * item.seconds + 20))
        report.add({"id": item.id, "section": item.section, **result})
        _say(_line(report.told()[-1]), left())


def _line(result: dict[str, Any]) -> str:
    told = [
        f"{row.get('name') or row['way']} {row['ratio']:.3f} times"
        if "ratio" in row
        else f"{row['way']} {row['fraction_of_floor']:.0%} of its floor"
        for row in result.get("rows", ())
        if "ratio" in row or "fraction_of_floor" in row
    ]
    return f"{result['id']}: {result['status']} {'; '.join(told)}"


def _say(text: str, left: float) -> None:
    print(f"[{max(0.0, left):4.0f} s left] {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=460.0, help="seconds, tests included")
    parser.add_argument("--only", default="", help="only measurements whose section or name holds this text")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each step, at least 5")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--skip-checks", action="store_true", help="leave the tests out")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {args.rounds}")
    if args.dry_run and args.out is not None and args.out.resolve() == RESULTS.resolve():
        parser.error("--out must not be bench/results in a dry run")
    if importlib.util.find_spec("torch") is None:
        print("bench.gpu: torch is not installed", file=sys.stderr)
        return 2
    folder = args.out or (Path(tempfile.mkdtemp(prefix="adaclip-gpu-")) if args.dry_run else RESULTS)
    settings = {
        "budget": args.budget,
        "rounds": args.rounds,
        "only": args.only,
        "checks": not args.skip_checks,
    }
    report, worker = Report(folder, args.dry_run, settings), Worker(args.dry_run, args.rounds)
    items = [i for i in (dry_plan() if args.dry_run else plan()) if args.only in f"{i.section}: {i.id}"]
    try:
        run(items, report, worker, args)
    except RuntimeError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    finally:
        worker.stop()
    print(report.markdown())
    return 1 if any(r["status"] in ("red", "failed") for r in report.results) else 0


if __name__ == "__main__":
    sys.exit(main())
