"""`adaclip bench`: a private step against an ordinary one, for a model of adaclip's or of the user's."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adaclip import models, testing
from adaclip.assembly import pick_device
from adaclip.benchmark import alternate, median_ratio, peak_memory
from adaclip.engine import PrivacyEngine

__all__ = ["run_bench"]

# A sample's gradient is materialized by the reference: a few samples are as telling as a batch.
_CHECKED_SAMPLES = 4
# Two float32 roundings of a deep network differ by about 1e-5, and bounds on norms of standardized convolutions are up to
# 1e-4 above them; a wrong layer differs by far more. (float64 as the truth would flip near-ties of max pools and ReLUs, which says nothing about the private step.)
_TOLERANCE = 5e-4
_NORM, _NOISE, _RATE = 1.0, 1.0, 1e-3


def run_bench(args: argparse.Namespace) -> int:
    """Check, time, print. Returns 0, or 1 if the private step is wrong (then nothing is timed).

    Raises:
        ValueError, TypeError, RuntimeError: arguments, or a model that cannot be built, run or made private.
    """
    for name in ("batch_size", "image_size", "channels", "classes", "repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    torch.manual_seed(0)
    model = _model(args).to(device).train()
    x = torch.randn(args.batch_size, args.channels, args.image_size, args.image_size, device=device)
    y = torch.randint(args.classes, (args.batch_size,), device=device)
    _check_forward(model, x[:2], args.classes)

    error = _error(model, x[:_CHECKED_SAMPLES], y[:_CHECKED_SAMPLES])
    if not error <= _TOLERANCE:
        print(
            f"adaclip bench: the private step is wrong for this model: relative error {error:.1e} of the clipped "
            f"sum against the reference backend, at most {_TOLERANCE:g} is allowed. Nothing was timed.",
            file=sys.stderr,
        )
        return 1
    steps = {"ordinary": _ordinary_step(copy.deepcopy(model), x, y), "private": _private_step(model, x, y)}
    times = alternate(steps, args.repeats)
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    ratio = median_ratio(times["private"], times["ordinary"])
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    if args.json:
        report = {
            "model": args.module or args.model,
            "input": list(x.shape),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "repeats": args.repeats,
            "relative_error": error,
            "milliseconds": ms,
            "ratio": ratio._asdict(),
            "peak_bytes": memory,
        }
        print(json.dumps(report, indent=1))
        return 0
    print(f"{args.module or args.model}, input {list(x.shape)}, {device}, {torch.get_num_threads()} threads")
    print(
        f"clipped sum: relative error {error:.1e} against the reference backend on {_CHECKED_SAMPLES} samples"
    )
    for name in steps:
        held = "" if memory[name] is None else f", {memory[name] / 2**20:,.0f} MiB at its peak"
        print(f"{name} step: {ms[name]:.1f} ms{held}")
    print(f"private / ordinary: {ratio.median:.3f} (quartiles {ratio.low:.3f} to {ratio.high:.3f})")
    return 0


def _model(args: argparse.Namespace) -> nn.Module:
    if args.module is None:
        if args.model not in models.NAMES:
            raise ValueError(f"model must be one of {', '.join(models.NAMES)}, got {args.model!r}")
        return models.build(
            args.model, num_classes=args.classes, in_channels=args.channels, image_size=args.image_size
        )
    place, colon, name = args.module.partition(":")
    if not (place and colon and name):
        raise ValueError(f"module must be MODULE:FACTORY, got {args.module!r}")
    # As `python -m` does: the user's own file is mostly in the folder they stand in.
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"module {args.module!r} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{args.module} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _check_forward(model: nn.Module, x: Tensor, classes: int) -> None:
    with torch.no_grad():
        try:
            out = model(x)
        except Exception as error:  # the user's forward may raise anything
            raise ValueError(
                f"the model cannot take an input of shape {list(x.shape)}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(out, Tensor) or out.shape != (len(x), classes):
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the model must give logits [B, {classes}] (see --classes), got {got}")


def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest relative error of the clipped sum, tensor by tensor, against the reference backend."""

    def clipped(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
        return testing.private_step(model, x, y, cross_entropy, max_grad_norm=_NORM, backend=backend)[0]

    ours = clipped(copy.deepcopy(model), x, "auto")
    truth = clipped(copy.deepcopy(model), x, "reference")
    return max(testing.relative_error(ours[name], truth[name]) for name in truth)


def _ordinary_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _private_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    # Every example is drawn in every step (rate 1), so that both steps see the same batch.
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    arguments: dict[str, Any] = {"noise_multiplier": _NOISE, "max_grad_norm": _NORM}
    model, optimizer, private = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=_RATE),
        data_loader=loader,
        **arguments,
    )

    def step() -> None:
        for batch_x, batch_y in private:
            optimizer.zero_grad()
            cross_entropy(model(batch_x), batch_y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step
