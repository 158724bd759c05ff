"""The tests that run kernels on the device, in a process of their own with a time limit."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["run_checks", "verdicts"]

_TESTS = Path(__file__).parents[2] / "tests"
_FILES = (
    "test_cuda_kernels.py",
    "test_cuda_graphs.py",
    "test_triton_*.py",
    "test_backend_triton.py",
    "test_backends.py",
    "test_graphed.py",
    "test_current_device.py",
    "test_device_data.py",
    "test_no_host_reads.py",
)
_DRY_FILES = ("test_triton_follow_quantile.py",)
_WORDS = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
# pytest -v, by itself and with pytest-xdist: "file.py::test VERDICT", "[gw0] [ 1%] VERDICT file.py::test".
_LINE = re.compile(
    rf"^(?:\S*?(?P<a>\w+\.py::.+?) (?P<b>{_WORDS})\b|\[gw\d+\].*?(?P<c>{_WORDS}) \S*?(?P<d>\w+\.py::.+))"
)


def verdicts(output: str) -> dict[str, str]:
    """{test: verdict in lower case} from what pytest -v printed, also if it was cut off."""
    found = {}
    for line in output.splitlines():
        match = _LINE.match(line)
        if match:
            test, verdict = (match["a"], match["b"]) if match["a"] else (match["d"], match["c"])
            found[test.strip()] = verdict.lower()
    return found


def run_checks(limit: float, dry_run: bool) -> dict[str, Any]:
    """Run them for at most `limit` seconds.

    Returns status "ok", "failed" (a test failed, or none could be run) or "cut off" (none failed so far), counts by
    verdict, the names of those that failed and the end of the output.
    """
    patterns = _DRY_FILES if dry_run else _FILES
    files = sorted(path.name for pattern in patterns for path in _TESTS.glob(pattern))
    command = [
        sys.executable,
        "-u",
        "-m",
        "pytest",
        "-v",
        "-rN",
        "--tb=short",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
    ]
    if not dry_run and importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling kernels, on the CPU.
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    env = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry_run else {})
    start = time.monotonic()
    # In tests/: the folder above would hide an installed adaclip behind its sources.
    with subprocess.Popen(
        [*command, *files],
        cwd=_TESTS,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            over = False
        except subprocess.TimeoutExpired:
            # Its own session: pytest's workers end with it.
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            over = True
    found = verdicts(output)
    failed = sorted(name for name, verdict in found.items() if verdict in ("failed", "error"))
    complete = process.returncode == 0 and "passed" in found.values()
    status = "failed" if failed or not (complete or over) else "cut off" if over else "ok"
    result = {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "counts": dict(Counter(found.values())),
        "failed": failed,
    }
    if status != "ok":
        result |= {
            "why": f"{len(failed)} failed after {limit:.0f} s"
            if over
            else f"pytest returned {process.returncode}"
        }
        result["output"] = output[-4000:]
    return result
