"""`adaclip doctor`: what this installation can do, what is missing and why, and a self-test.

Nothing here may fail because something is broken: that is what it reports.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable
from typing import Any

from adaclip import __version__

__all__ = ["examine", "run_doctor"]

# RFC 8439, section 2.3.2: key 00 01 … 1f, block counter 1, nonce 00:00:00:09:00:00:00:4a:00:00:00:00.
_RFC_NONCE = (0x09000000, 0x4A000000, 0)
_RFC_BLOCK = (
    0xE4E7F110, 0x15593BD1, 0x1FDD0F50, 0xC47120A3, 0xC7F4D1C7, 0x0368C033, 0x9AAA2204, 0x4E6CD4C3,
    0x466482D2, 0x09AA9F07, 0x05D7C214, 0xA2028BD9, 0xD19C12B5, 0xB94E16DE, 0xE883D0CB, 0x4E3C50A2,
)  # fmt: skip
_OPTIONAL = {
    "medmnist": "the MedMNIST data sets (pip install 'adaclip[medmnist]')",
    "opacus": "comparisons in the tests and benchmarks (pip install 'adaclip[test]')",
}


def run_doctor(*, as_json: bool) -> int:
    """Print the report; returns 0, or 1 if the core is missing or a self-test failed."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        for line in _lines(report):
            print(line)
    return 0 if report["healthy"] else 1


def examine() -> dict[str, Any]:
    """The report as plain JSON-able values; `healthy` is false if the core or a self-test failed."""
    core, why = _load_core()
    report: dict[str, Any] = {
        "versions": {
            "adaclip": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "scipy")},
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "core": {"loaded": core is not None, "why_not": why},
    }
    if core is not None:
        report["core"] |= {
            "simd": core.simd_level(),
            "simd_supported": core.simd_supported(),
            "threading": core.threading_backend(),
            "cuda": {"built": core.CUDA_BUILT, "note": core.CUDA_NOTE},
        }
    report["torch"] = _torch()
    report["optional"] = {
        name: {"installed": importlib.util.find_spec(name) is not None, "for": purpose}
        for name, purpose in _OPTIONAL.items()
    }
    report["self_test"] = {
        "ChaCha20 gives the block of RFC 8439, section 2.3.2": _attempt(lambda: _chacha20(core)),
        "a private step equals a float64 loop over samples": _attempt(_private_step),
    }
    report["healthy"] = core is not None and all(result == "ok" for result in report["self_test"].values())
    return report


def _load_core() -> tuple[Any, str | None]:
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    try:
        import torch  # noqa: F401 - its OpenMP runtime is the one the core joins

        from adaclip import _core
    except ImportError as error:
        return None, f"{error}; build it with `pip install .`, which needs a C++17 compiler"
    return _core, None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"installed": False}
    import torch

    found = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if found else None
    return {"installed": True, "threads": torch.get_num_threads(), "cuda": found, "gpu": gpu}


def _attempt(test: Callable[[], str]) -> str:
    try:
        return test()
    except Exception as error:  # the report is the point, whatever went wrong
        return f"failed: {type(error).__name__}: {error}"


def _chacha20(core: Any) -> str:
    if core is None:
        return "failed: the C++ core is not loaded"
    low, high, stream = _RFC_NONCE
    block = core.chacha20_block(bytes(range(32)), 1, high << 32 | low, stream)
    return "ok" if tuple(block) == _RFC_BLOCK else "failed: another block came out"


def _private_step() -> str:
    import torch
    from torch import nn

    from adaclip import testing

    torch_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128, 10),
        )  # fmt: skip
        x, y = torch.randn(6, 3, 8, 8), torch.randn(6, 10)
    finally:
        torch.random.set_rng_state(torch_state)
    truth = testing.clipped_sum(testing.sample_grads(model, x, y, testing.square_loss), 0.1)
    ours, _ = testing.private_step(model, x, y, testing.square_loss, max_grad_norm=0.1)
    error = max(testing.relative_error(ours[name], truth[name]) for name in truth)
    return "ok" if error <= 1e-5 else f"failed: relative error {error:.1e}"


def _lines(report: dict[str, Any]) -> list[str]:
    core, torch, versions = report["core"], report["torch"], report["versions"]
    lines = [
        "versions: " + ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        f"platform: {report['platform']}",
    ]
    if core["loaded"]:
        lines += [
            "C++ core: loaded",
            f"SIMD: {core['simd']} in use, {core['simd_supported']} supported (ADACLIP_SIMD lowers it)",
            f"threads of the core: {_POOLS.get(core['threading'], core['threading'])}",
            f"CUDA kernels: built by {core['cuda']['note']}"
            if core["cuda"]["built"]
            else f"CUDA kernels: not built: {core['cuda']['note']} (README, Build with CUDA)",
        ]
    else:
        lines.append(f"C++ core: not loaded: {core['why_not']}")
    if torch["installed"]:
        lines.append(f"torch threads: {torch['threads']}")
        lines.append(
            f"GPU: {torch['gpu'] if torch['cuda'] else 'none that torch can use; the CPU kernels run'}"
        )
    for name, entry in report["optional"].items():
        state = "installed" if entry["installed"] else "not installed"
        lines.append(f"optional {name}: {state}; for {entry['for']}")
    lines += [f"self-test, {name}: {result}" for name, result in report["self_test"].items()]
    lines.append("all is well" if report["healthy"] else "something is broken: see above")
    return lines


_POOLS = {"gomp": "torch's OpenMP pool", "std": "std::thread (torch's OpenMP pool was not found)"}
