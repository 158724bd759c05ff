"""Checkpoint files: written atomically, versioned, and loaded without executing anything."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaclip.accounting import Accountant, Ledger
from adaclip.batches import LoaderBase
from adaclip.budget import Budget
from adaclip.layers import plain_names, renamed
from adaclip.optimizer import DPOptimizer
from adaclip.shards import cut, cut_like, is_sharded, whole_state

__all__ = ["VERSION", "Lineage", "check", "check_module", "collect", "load", "restore", "save"]

VERSION = 3


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` is the old file or the whole new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": "adaclip-checkpoint", "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp gives the owner alone access; a checkpoint is an ordinary file.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote. Raises ValueError with the reason if it is anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise ValueError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged"
        ) from error
    if not isinstance(state, dict) or state.get("format") != "adaclip-checkpoint":
        raise ValueError(f"{path} is not an adaclip checkpoint")
    if state["version"] != VERSION:
        raise ValueError(f"checkpoint {path} has version {state['version']}; this adaclip reads {VERSION}")
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
    """What a checkpoint holds: everything that a run continues from, but the noise key."""
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
        "extra": extra or {},
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
    check_module(state["module"], module)
    _check_kinds(state["kinds"], _kinds(optimizer, loader))
    ledger = Ledger.from_state_dict(state["accountant"])
    _check_kinds({"adjacency": ledger.adjacency}, {"adjacency": accountant.adjacency})
    for name, part in _parts(optimizer).items():
        saved = state["parts"][name]
        if (saved is None) != (part is None):
            lacks = "the checkpoint has none" if saved is None else "this run has none"
            raise ValueError(f"{name} must be the checkpoint's, but {lacks}")
        if part is not None:
            _check_kinds({name: saved["config"]}, {name: part.config()})
            part.check_state(saved["state"])
    saved = None if state["budget"] is None else Budget.from_state_dict(state["budget"])
    return ledger, saved if budget is None else budget.continuing(saved)


def restore(state: dict[str, Any], module: nn.Module, optimizer: DPOptimizer, loader: LoaderBase) -> None:
    """Continue from `state`, which `check` has passed."""
    for name, part in _parts(optimizer).items():
        if part is not None:
            part.load_state_dict(state["parts"][name]["state"])
    loader.load_state_dict(state["loader"])
    optimizer.load_state_dict(_as_held(state["optimizer"], optimizer))
    ours = module.state_dict()
    module.load_state_dict(
        {k: cut(t, ours[k]) if is_sharded(ours[k]) else t for k, t in renamed(state["module"], ours).items()}
    )
    optimizer.releases = max(optimizer.releases, state["releases"])


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
    shapes = [k for k in ours.keys() & saved.keys() if ours[k].shape != saved[k].shape]
    for what, names in (("lacks", missing), ("also has", unknown), ("has other shapes for", sorted(shapes))):
        if names:
            raise ValueError(
                f"the checkpoint is of another model: it {what} {', '.join(names[:5])}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            )


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
        if saved[name] != value:
            raise ValueError(f"{name} must be the checkpoint's {saved[name]!r}, got {value!r}")
