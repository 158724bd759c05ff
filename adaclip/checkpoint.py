"""Checkpoint files: written atomically, versioned, and loaded without executing anything."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from adaclip.accounting import Accountant, Ledger
from adaclip.batches import LoaderBase
from adaclip.budget import Budget
from adaclip.checkpoint_archive import check_archive
from adaclip.checkpoint_form import check_extra, check_form
from adaclip.files import Output, replace_file
from adaclip.layers import plain_names, renamed
from adaclip.optimizer import DPOptimizer
from adaclip.shards import cut, cut_like, is_sharded, whole_state
from adaclip.torch_rules import RULES

__all__ = ["VERSION", "Lineage", "check", "check_module", "collect", "load", "restore", "save"]

VERSION = 3
# What `collect` gives.
_ENTRIES = frozenset(
    ("module", "optimizer", "accountant", "run", "kinds", "parts", "releases", "loader", "budget", "extra")
)


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` is the old file or the whole new one, on disk.

    Raises:
        TypeError: it holds something else (a module's state, say), which could not be read again.
        OSError: it cannot be written; an existing file is unchanged.
    """
    for name, value in state.items():
        check_extra(value, name)

    def write(file: BinaryIO) -> None:
        output = Output(file)
        torch.save({"format": "adaclip-checkpoint", "version": VERSION, **state}, output)
        if output.error is not None:
            raise output.error

    replace_file(path, write)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote; executes nothing, whatever is in the file, and takes memory in proportion to its size.

    Raises:
        ValueError: it is anything else, or damaged in a single bit, with the reason.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise ValueError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged"
        ) from error
    if not isinstance(state, dict) or state.get("format") != "adaclip-checkpoint":
        raise ValueError(f"{path} is not an adaclip checkpoint")
    if state.get("version") != VERSION:
        raise ValueError(
            f"checkpoint {path} has version {state.get('version')!r}; this adaclip reads {VERSION}"
        )
    lacking = _ENTRIES - state.keys()
    if lacking:
        raise ValueError(f"checkpoint {path} lacks {', '.join(sorted(lacking))}: it is damaged")
    return state


def collect(
    module: nn.Module,
    optimizer: DPOptimizer,
    loader: LoaderBase,
    accountant: Accountant,
    budget: Budget | None,
    run: str,
    extra: dict | None,
) -> dict[str, Any]:
    """What a checkpoint holds: everything that a run continues from, but the noise key.

    Raises TypeError for an `extra` that is no dict of plain values: it could not be read again.
    """
    if extra is not None and not isinstance(extra, dict):
        raise TypeError(f"extra must be a dict or None, got {type(extra).__name__}")
    check_extra(extra)
    return {
        "module": whole_state(plain_names(module.state_dict())),
        "optimizer": whole_state(optimizer.state_dict()),
        "accountant": accountant.state_dict(),
        "run": run,
        "kinds": _kinds(optimizer, loader),
        "parts": {
            name: None if part is None else {"config": part.config(), "state": part.state_dict()}
            for name, part in _parts(optimizer).items()
        },
        "releases": optimizer.releases,
        "loader": loader.state_dict(),
        "budget": None if budget is None else budget.state_dict(),
        "extra": {} if extra is None else extra,
    }


def check(
    state: dict[str, Any],
    module: nn.Module,
    optimizer: DPOptimizer,
    loader: LoaderBase,
    accountant: Accountant,
    budget: Budget | None,
) -> tuple[Ledger, Budget | None]:
    """Raise ValueError unless `restore` can continue from `state`; returns its ledger, and the budget to go on with.

    budget: that of the run it is loaded into, which goes before the checkpoint's own.
    """
    try:
        check_form(state, tuple(_parts(optimizer)))
        check_module(state["module"], module)
        _check_kinds(state["kinds"], _kinds(optimizer, loader))
        with _damage():
            _check_optimizer(state["optimizer"], optimizer)
            ledger = Ledger.from_state_dict(state["accountant"])
            saved = None if state["budget"] is None else Budget.from_state_dict(state["budget"])
        _check_kinds({"adjacency": ledger.adjacency}, {"adjacency": accountant.adjacency})
        for name, part in _parts(optimizer).items():
            _check_part(name, state["parts"][name], part)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        # Of a form that `collect` does not give.
        raise ValueError(f"the checkpoint is damaged ({type(error).__name__}: {error})") from error
    return ledger, saved if budget is None else budget.continuing(saved)


def _check_part(name: str, saved: dict[str, Any] | None, part: Any) -> None:
    if (saved is None) != (part is None):
        lacks = "the checkpoint has none" if saved is None else "this run has none"
        raise ValueError(f"{name} must be the checkpoint's, but {lacks}")
    if part is not None:
        _check_kinds({name: saved["config"]}, {name: part.config()})
        with _damage():
            part.check_state(saved["state"])


@contextmanager
def _damage() -> Iterator[None]:
    """In here a ValueError says what the file must be, and is of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the checkpoint is damaged: {error}") from error


def restore(
    state: dict[str, Any], module: nn.Module, optimizer: DPOptimizer, loader: LoaderBase, lost: int = 0
) -> None:
    """Continue from `state`, which `check` has passed.

    lost: steps on the account that the checkpoint has not got. They keep their places in a noise schedule, as a plan
      has it. With a given key, steps done again are replayed at their own places, which is what such a key is for.
    """
    for name, part in _parts(optimizer).items():
        if part is not None:
            part.load_state_dict(state["parts"][name]["state"])
    loader.load_state_dict(state["loader"])
    # After the parts: a smoothing leaves its evaluation point by the state that took it there.
    try:
        optimizer.load_state_dict(_as_held(state["optimizer"], optimizer))
    except Exception as error:  # only torch's optimizers know what they can load, and it may be anything
        raise ValueError(f"the checkpoint's optimizer state cannot be loaded: {error}") from error
    ours = module.state_dict()
    module.load_state_dict(
        {k: cut(t, ours[k]) if is_sharded(ours[k]) else t for k, t in renamed(state["module"], ours).items()}
    )
    here = state["releases"] + (lost if optimizer.source.secure else 0)
    optimizer.releases = max(optimizer.releases, here)


def _as_held(state: dict[str, Any], optimizer: DPOptimizer) -> dict[str, Any]:
    """An optimizer's state with its tensors cut as its parameters are."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    of = dict(zip(numbers, held, strict=True))
    return {**state, "state": {i: cut_like(mine, of[i]) for i, mine in state["state"].items()}}


class Lineage:
    """Whose releases an engine has on its account: its own, and those of checkpoints that other engines saved.

    Two ledgers cannot tell: with the same noise and sampling rate, different releases make equal entries.

    Attributes:
        run: names this engine in the checkpoints that it saves.
    """

    def __init__(self) -> None:
        self.run = secrets.token_hex(16)
        self._booked: dict[str, Ledger] = {}

    def adopt(self, accountant: Accountant, run: str | None, saved: Ledger) -> None:
        """Book what `saved` holds, of a checkpoint by the engine `run` (None: unknown), and is not booked yet.

        Nothing that the accountant holds is ever forgotten, and what cannot be told to be the same counts again.
        """
        if run == self.run and accountant.ledger.after(saved) is not None:
            # Loaded back into the run it came from: the steps since then were released all the same.
            return
        booked = None if run is None else self._booked.get(run)
        if booked is not None and booked.after(saved) is not None:
            return
        more = None if booked is None else saved.after(booked)
        for event in saved.events if more is None else more:
            accountant.add(*event)
        if run is not None:
            self._booked[run] = saved


def _parts(optimizer: DPOptimizer) -> dict[str, Any]:
    """What has a config, which must be the checkpoint's, and a state; None where a run has no such thing."""
    return {
        "clipping": optimizer.clipping,
        "groups": optimizer.groups,
        "smoothing": optimizer.smoothing,
    }


def check_module(saved: dict[str, torch.Tensor], module: nn.Module) -> None:
    """Raise ValueError unless `saved` fits the module exactly, tensor by tensor."""
    ours = plain_names(module.state_dict())
    missing, unknown = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    shapes = [k for k in ours.keys() & saved.keys() if _shape(ours[k]) != _shape(saved[k])]
    for what, names in (("lacks", missing), ("also has", unknown), ("has other shapes for", sorted(shapes))):
        if names:
            raise ValueError(
                f"the checkpoint is of another model: it {what} {', '.join(names[:5])}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            )


def _shape(value: Any) -> torch.Size | None:
    """None for what is no tensor: a module's extra state."""
    return value.shape if isinstance(value, torch.Tensor) else None


def _check_optimizer(saved: dict[str, Any], optimizer: DPOptimizer) -> None:
    """Raise ValueError unless `saved` holds every parameter's state, and of a known optimizer in its shape."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    if len(numbers) != len(params) or len(set(numbers)) != len(numbers):
        raise ValueError(f"the optimizer's state is of {len(numbers)} parameters, got {len(params)}")
    # Others keep what they like (Adafactor: the means of rows and of columns).
    known = type(optimizer.original_optimizer) in RULES
    for i, p in zip(numbers, params, strict=True) if known else ():
        for name, value in saved["state"].get(i, {}).items():
            if isinstance(value, torch.Tensor) and value.shape not in (p.shape, ()):
                raise ValueError(
                    f"the optimizer's {name} must be of shape {tuple(p.shape)}, got {tuple(value.shape)}"
                )
    for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        lacking = ours.keys() - group.keys()
        if lacking:
            raise ValueError(f"the optimizer's parameter groups lack {', '.join(sorted(lacking))}")


def _kinds(optimizer: DPOptimizer, loader: LoaderBase) -> dict[str, Any]:
    """What a run may only be continued with: plain values by name."""
    schedule = optimizer.noise_schedule
    return {
        "noise_multiplier": optimizer.base_noise_multiplier,
        "noise_schedule": None if schedule is None else schedule.state_dict(),
        "optimizer": type(optimizer.original_optimizer).__name__,
        "parameter groups": [len(g["params"]) for g in optimizer.param_groups],
        "loader": type(loader).__name__,
        "data set size": loader.dataset_size,
        "expected batch size": optimizer.expected_batch_size,
        "views per sample": loader.views,
    }


def _check_kinds(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError unless `ours` are the checkpoint's."""
    for name, value in ours.items():
        if name not in saved or saved[name] != value:
            raise ValueError(f"{name} must be the checkpoint's {saved.get(name)!r}, got {value!r}")
