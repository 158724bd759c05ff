"""`opacus.PrivacyEngine` over adaclip's: Opacus's arguments in, the same training out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from adaclip import arguments, checkpoint
from adaclip.batches import LoaderBase
from adaclip.clipping import Clipping
from adaclip.engine import PrivacyEngine as Engine
from adaclip.layers import renamed
from adaclip.opacus._arguments import MODES, SEARCH, strategy_of, with_reduction
from adaclip.opacus._loader import make_loader, original_of
from adaclip.opacus._replacements import raise_attribute_error
from adaclip.opacus.accountants import PRVAccountant, RDPAccountant, book, mechanism_error
from adaclip.opacus.optimizers.optimizer import DPOptimizer
from adaclip.opacus.schedulers._scheduler import Scheduler
from adaclip.opacus.validators.module_validator import ModuleValidator
from adaclip.shards import is_sharded

__all__ = ["PrivacyEngine"]

_PREFIX = "_module."  # what a GradSampleModule puts before every name of the model's


class _Engine(Engine):
    """Samples and divides as Opacus does."""

    _optimizer_class = DPOptimizer
    averaged = True

    def _make_loader(self, *positional: Any, **options: Any) -> LoaderBase:
        return make_loader(arguments.make_loader, *positional, averaged=self.averaged, **options)

    def _planned_loader(self, *positional: Any, **options: Any) -> LoaderBase:
        return make_loader(arguments.planned_loader, *positional, averaged=self.averaged, **options)


class Hooks:
    """What make_private returns for the model with wrap_model=False: its `cleanup()` gives the model back."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def cleanup(self) -> None:
        """Ordinary forwards, no private gradients (`adaclip.PrivacyEngine.detach`)."""
        self._engine.detach()

    remove_hooks = cleanup


class PrivacyEngine:
    """Opacus's front door. `engine` is the adaclip.PrivacyEngine behind it, for what Opacus has no name for.

    Args:
        accountant: "prv" (adaclip's "pld") or "rdp". "gdp" is refused: it is no guarantee.
        secure_mode: either way noise and sampling come from ChaCha20 with keys of the operating system. True
          also refuses a noise_generator.

    Raises:
        ValueError: another accountant.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False):
        kind = {"prv": PRVAccountant, "rdp": RDPAccountant}.get(accountant)
        if kind is None:
            raise ValueError(mechanism_error(accountant))
        self.engine = _Engine(kind.kind)
        self.secure_mode = secure_mode
        # Asked for anew each time: shuffled batches give the engine another one.
        self.accountant = kind(lambda: self.engine.accountant)

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        criterion: nn.Module | None = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str | Clipping = "flat",
        noise_generator: torch.Generator | bytes | int | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **options: Any,
    ) -> tuple:
        """(module, optimizer, data_loader), or (module, optimizer, criterion, data_loader) in "ghost" modes.

        Args:
            module: the same object comes back: see `adaclip.PrivacyEngine.make_private`.
            data_loader: its inverse length is the sampling rate, and int(N/length) the denominator.
            max_grad_norm: C; for clipping="per_layer" a list with a norm for every trained parameter.
            criterion: handed back in "ghost" modes, as a copy with `loss_reduction`. Default: cross-entropy.
            batch_first: must be True: samples lie along dimension 0.
            loss_reduction: "mean", or "sum": then the noisy sum is not divided, as in Opacus.
            poisson_sampling: False books an epoch of shuffled batches without amplification. (Opacus books it as
              if its batches had been Poisson samples, which is no guarantee.)
            clipping: "flat", "per_layer", "adaptive", or adaclip's others. For "adaptive" Opacus's five further
              arguments are translated; adaclip's defaults hold without them.
            grad_sample_mode: any but "no_op" is the same single backward.
            wrap_model: the model is never wrapped; False returns `Hooks` in its place, as Opacus does.
            rand_on_empty: taken and not needed: an empty batch comes as one row of zeros that weighs nothing.
            options: of `adaclip.PrivacyEngine.make_private`, such as max_batch_size, backend or groups.

        Raises:
            as `adaclip.PrivacyEngine.make_private`, with nothing changed.
        """
        return self._make(
            self.engine.make_private,
            optimizer=optimizer,
            data_loader=data_loader,
            criterion=criterion,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            noise_generator=noise_generator,
            clipping=clipping,
            max_grad_norm=max_grad_norm,
            module=module,
            noise_multiplier=noise_multiplier,
            poisson_sampling=poisson_sampling,
            **options,
        )

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Sequence[float],
        criterion: nn.Module | None = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str | Clipping = "flat",
        noise_generator: torch.Generator | bytes | int | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **options: Any,
    ) -> tuple:
        """`make_private` with the noise for (target_epsilon, target_delta) after `epochs`, which is enforced.

        A step that would pass the target raises PrivacyBudgetExceeded. What was spent before counts: Opacus only
        warns of it. Other arguments are those of `make_private`; the options of Opacus's search (epsilon_tolerance,
        eps_error, delta_error, alphas) are taken and not needed.
        """
        for name in SEARCH:
            options.pop(name, None)
        return self._make(
            self.engine.make_private_with_epsilon,
            optimizer=optimizer,
            data_loader=data_loader,
            criterion=criterion,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            noise_generator=noise_generator,
            clipping=clipping,
            max_grad_norm=max_grad_norm,
            module=module,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            epochs=epochs,
            poisson_sampling=poisson_sampling,
            **options,
        )

    def _make(
        self,
        make: Any,
        *,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        criterion: nn.Module | None,
        batch_first: bool,
        loss_reduction: str,
        grad_sample_mode: str,
        wrap_model: bool,
        noise_generator: Any,
        clipping: str | Clipping,
        max_grad_norm: float | Sequence[float],
        **options: Any,
    ) -> tuple:
        if not batch_first:
            raise ValueError(
                "batch_first must be True: samples lie along dimension 0, and modules that take them along another "
                "are made with batch_first=True"
            )
        if grad_sample_mode == "no_op":
            raise ValueError(
                "grad_sample_mode must not be 'no_op': gradients of your own go through "
                "adaclip.functional.clip_and_noise, which returns the noisy update"
            )
        if grad_sample_mode not in MODES:
            raise ValueError(f"grad_sample_mode must be one of {MODES}, got {grad_sample_mode!r}")
        if self.secure_mode and noise_generator is not None:
            raise ValueError("noise_generator must be None with secure_mode, whose noise cannot be repeated")
        strategy, norm = strategy_of(clipping, max_grad_norm, options)
        if loss_reduction == "sum" and (clipping not in ("flat", "per_layer") or options.get("groups")):
            raise ValueError(
                "loss_reduction must be 'mean' for label groups and for other clipping than 'flat' and 'per_layer', "
                f"which may count in shares of the expected batch, got 'sum' with clipping={clipping!r}"
            )
        self.engine.averaged = loss_reduction != "sum"
        # Opacus takes what it made private before, for another run.
        if isinstance(optimizer, DPOptimizer):
            optimizer = optimizer.original_optimizer
        module, optimizer, loader = make(
            optimizer=optimizer,
            data_loader=original_of(data_loader),
            loss_reduction=loss_reduction,
            noise_generator=noise_generator,
            clipping=strategy,
            max_grad_norm=norm,
            **options,
        )
        first = module if wrap_model else Hooks(self.engine)
        if grad_sample_mode.startswith("ghost"):
            return first, optimizer, with_reduction(criterion, loss_reduction), loader
        return first, optimizer, loader

    def get_epsilon(self, delta: float) -> float:
        """A certified upper bound on epsilon for everything released so far."""
        return self.accountant.get_epsilon(delta)

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether the model can be trained privately; the others are checked by make_private."""
        return ModuleValidator.is_valid(module)

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise UnsupportedModuleError with every problem of the model."""
        ModuleValidator.validate(module, strict=True)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A repaired copy (`adaclip.fix`)."""
        return ModuleValidator.fix_and_validate(module)

    # --- checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Scheduler | None = None,
        grad_clip_scheduler: Scheduler | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write everything the run continues from, atomically.

        Args:
            optimizer: the private one; None: the engine's own, which is saved in any case.
            checkpoint_dict: tensors and plain values of your own, returned by `load_checkpoint`.
            module_state_dict_kwargs, torch_save_kwargs: must be empty: a checkpoint is whole, and of one format.
        """
        _check_empty(module_state_dict_kwargs=module_state_dict_kwargs, torch_save_kwargs=torch_save_kwargs)
        extra = {
            "checkpoint_dict": checkpoint_dict or {},
            "noise_scheduler": None if noise_scheduler is None else noise_scheduler.state_dict(),
            "grad_clip_scheduler": None if grad_clip_scheduler is None else grad_clip_scheduler.state_dict(),
        }
        self.engine.save_checkpoint(path, module=module, optimizer=self._own(optimizer), extra=extra)

    def load_checkpoint(
        self,
        *,
        path: str | os.PathLike,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Scheduler | None = None,
        grad_clip_scheduler: Scheduler | None = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Continue from `path`, also from a file that Opacus saved; returns its checkpoint_dict. No code is executed.

        Of Opacus's file come the model, the optimizer's state and the history, which is added to what the
        engine's accountant holds: loaded twice, it counts twice. It is believed to be of Poisson batches.

        Raises:
            ValueError: the file is damaged, or of something else; nothing has been changed. RuntimeError: a file
            of Opacus's, after `make_private_with_epsilon` planned a budget without it, or for a sharded model.
        """
        _check_empty(module_load_dict_kwargs=module_load_dict_kwargs, torch_load_kwargs=torch_load_kwargs)
        optimizer = self._own(optimizer)
        state = _opacus_checkpoint(path)
        if state is not None:
            return self._continue(state, module, optimizer, noise_scheduler, grad_clip_scheduler)
        extra = self.engine.load_checkpoint(path, module=module, optimizer=optimizer)
        for scheduler, name in (
            (noise_scheduler, "noise_scheduler"),
            (grad_clip_scheduler, "grad_clip_scheduler"),
        ):
            if scheduler is not None and extra.get(name) is not None:
                scheduler.load_state_dict(extra[name])
        return extra.get("checkpoint_dict", extra)

    def _own(self, optimizer: DPOptimizer | None) -> DPOptimizer:
        held = self.engine._attached
        return held.optimizer if optimizer is None and held is not None else optimizer

    def _continue(
        self, state: dict[str, Any], module, optimizer, noise_scheduler, grad_clip_scheduler
    ) -> dict:
        module = self.engine._check_attached(module, optimizer).model
        if self.engine._budget is not None and self.engine._budget.plan is not None:
            raise RuntimeError(
                "a checkpoint of Opacus's must be loaded after make_private, and be followed by "
                "privacy_engine.engine.set_budget: make_private_with_epsilon has planned the budget without it"
            )
        if any(map(is_sharded, module.parameters())):
            raise RuntimeError("a checkpoint of Opacus's must be loaded into a model that is not sharded")
        weights = {k.removeprefix(_PREFIX): v for k, v in state.pop("module_state_dict").items()}
        checkpoint.check_module(weights, module)
        booked = state.pop("privacy_accountant_state_dict")
        if not isinstance(booked, dict) or "history" not in booked:
            raise ValueError("the checkpoint's accountant must hold a history, got none")
        # Before what was released is put to use. It raises with nothing booked.
        book(self.engine.accountant, booked["history"])
        # Its parameters are about to change.
        optimizer._sum.reset()
        if state.get("optimizer_state_dict"):
            optimizer.load_state_dict(state.pop("optimizer_state_dict"))
        module.load_state_dict(renamed(weights, module.state_dict()))
        for scheduler, name in (
            (noise_scheduler, "noise_scheduler"),
            (grad_clip_scheduler, "grad_clip_scheduler"),
        ):
            saved = state.pop(f"{name}_state_dict", None)
            if scheduler is not None and saved:
                scheduler.load_state_dict(saved)
        return state

    def __getattr__(self, name: str) -> NoReturn:
        raise_attribute_error(self, "privacy_engine.PrivacyEngine", name)


def _check_empty(**options: dict[str, Any] | None) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name} must be left out: a checkpoint is whole, and of one format, got {value!r}"
            )


def _opacus_checkpoint(path: str | os.PathLike) -> dict[str, Any] | None:
    """What Opacus's save_checkpoint wrote, or None if the file is something else (or nothing)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # adaclip's own reader says what is wrong
        return None
    theirs = {"module_state_dict", "privacy_accountant_state_dict"}
    return state if isinstance(state, dict) and theirs <= state.keys() else None
