"""The process that touches the GPU: takes measurements from its standard input, a JSON line each, and answers them.

    python -m bench.gpu_parts.worker [--dry-run] [--rounds 7]

A kernel that crashes takes this process with it and no more: `bench.gpu` starts another one. Answers go to the standard
output as JSON lines; whatever else is printed goes to the standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


def environment(dry_run: bool) -> dict[str, Any]:
    """What the figures depend on. Raises RuntimeError if there is no GPU to measure, or no core."""
    import torch

    from adaclip import _core
    from adaclip.backends import describe, support

    if not (dry_run or torch.cuda.is_available()):
        raise RuntimeError(
            f"torch {torch.__version__} finds no CUDA GPU (python -m bench.gpu --dry-run needs none)"
        )
    device = _device(dry_run)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition(
            "\n"
        )[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "cuda_kernels": support.cuda_missing() or f"built: {_core.CUDA_NOTE}",
        "backends": describe(device),
        "copy_bytes_per_second": _bandwidth(dry_run),
        "precision": "fp32 is torch's default: convolutions in TF32, matrix products not; ieee has no TF32",
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _device(dry_run: bool):
    import torch

    return torch.device("cpu" if dry_run else "cuda", None if dry_run else torch.cuda.current_device())


@functools.cache
def _bandwidth(dry_run: bool) -> float:
    from bench.gpu_parts.kernels import copy_bandwidth

    return copy_bandwidth(_device(dry_run), dry_run)


def measured(section: str, arguments: dict[str, Any], rounds: int, dry_run: bool) -> dict[str, Any]:
    """One measurement's result."""
    import torch

    device = _device(dry_run)
    if section == "environment":
        return {"status": "ok", "environment": environment(dry_run)}
    if section == "kernels":
        from bench.gpu_parts.kernels import Bench

        bench = Bench(device, _bandwidth(dry_run), 1 if dry_run else 30, dry_run)
        if arguments["kind"] == "conv":
            dtype = getattr(torch, arguments["dtype"])
            return bench.conv(tuple(arguments["layer"]), dtype, arguments["batch_size"])
        return getattr(bench, arguments["kind"])()
    from bench.gpu_parts.steps import Case, measure_peer, measure_treatment

    shape = {k: arguments[k] for k in ("model", "batch_size", "precision")}
    case = Case(**shape, device=device, toy=dry_run)
    if section == "peers":
        return shape | measure_peer(case, arguments["peer"], rounds)
    return shape | measure_treatment(case, arguments["treatment"], rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    # The answers' own channel: whatever a compiler prints to the standard output must not be among them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    if args.dry_run:
        torch.set_num_threads(1)
        with contextlib.suppress(ImportError):
            from adaclip.testing import mend_interpreter

            mend_interpreter()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = measured(request["section"], request["arguments"], args.rounds, args.dry_run)
        except Exception as error:  # it is reported, and the next one may go better
            why = f"{type(error).__name__}: {error}"[:2000]
            result = {"status": "failed", "why": why, "traceback": traceback.format_exc(limit=-8)}
        answers.write(json.dumps(result) + "\n")
        # After an error of the device nothing in this process can be trusted.
        if result["status"] == "failed" and not args.dry_run:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
