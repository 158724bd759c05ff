"""PyTorch Lightning: one callback, and the train loader passed through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from adaclip.engine import PrivacyEngine
from adaclip.epochs import EpochLoader
from adaclip.integrations.state import PrivacyState
from adaclip.sampler import PoissonLoader

__all__ = ["PrivateTraining"]

_THROUGH = "the train loader must come through the callback: trainer.fit(model, private.loader(train_loader))"


class PrivateTraining(pl.Callback):
    """Makes a LightningModule, its optimizer and its train loader private when `fit` begins, until it ends.

        private = PrivateTraining(target_epsilon=3, target_delta=1e-5, epochs=20, max_grad_norm=1.0)
        trainer = pl.Trainer(max_epochs=20, callbacks=[private])
        trainer.fit(model, private.loader(train_loader), val_loader)
        private.engine.get_epsilon(1e-5)

    The module is made private as a whole; `training_step`, `configure_optimizers` (one optimizer, any schedulers) and
    everything else in it stay as they are. Checkpoints of the trainer carry the privacy state, and `fit(ckpt_path=…)`
    goes on with it. Epsilon is logged as "epsilon" after every epoch. Where a budget leaves no room for another step,
    training stops as it does for early stopping: at the end of the batch, with validation, callbacks and checkpoints.
    A scheduler of interval "step" steps with logical batches, not with the parts that `max_batch_size` makes of them.
    Trainer.max_steps and global_step count parts.

    What is logged from `training_step` (losses, accuracies) is computed from private examples without noise: no
    guarantee covers it, nor what is decided by it (a plateau scheduler, early stopping, the best checkpoint).
    Decide by a public validation set.

    Args:
        engine: None: a new one.
        delta: for the epsilon that is logged; None: target_delta, or 1e-5.
        options: arguments of `make_private`, or, with a target_epsilon, of `make_private_with_epsilon`, but module,
          optimizer and data_loader.

    Raises (when `fit` begins, with nothing changed):
        ValueError: the trainer does what private training cannot have: gradient clipping of its own,
          accumulate_grad_batches, a gradient scaler, several processes or optimizers; or the loader did not come through
          `loader`, or ckpt_path was saved without the callback. The errors of `make_private`.
    """

    def __init__(self, engine: PrivacyEngine | None = None, *, delta: float | None = None, **options: Any):
        self.engine = PrivacyEngine() if engine is None else engine
        self.delta = options.get("target_delta", 1e-5) if delta is None else delta
        self._options = options
        self._loader: _Loader | None = None
        self._saved: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}

    def loader(self, data_loader: DataLoader) -> _Loader:
        """What to give to `Trainer.fit`, or to return from `train_dataloader`, in the place of an ordinary loader."""
        whole = self._options.get("max_batch_size") is None and self._options.get("pad_to") is None
        poisson = self._options.get("poisson_sampling", True)
        self._loader = _Loader(data_loader, poisson=poisson, sized=whole)
        return self._loader

    # --- the trainer's hooks -----------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)
        with_epsilon = "target_epsilon" in self._options
        make = self.engine.make_private_with_epsilon if with_epsilon else self.engine.make_private
        (plain,) = trainer.optimizers
        _, private, made = make(
            module=pl_module, optimizer=plain, data_loader=self._loader.plain, **self._options
        )
        # The trainer looks one batch ahead to know the last one, unless it knows their number.
        made.fetched_ahead = True
        self._loader.private = made
        trainer.optimizers = [private]
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step":
                config.scheduler = _LogicalSteps(config.scheduler, made)
        if trainer.ckpt_path is not None:
            PrivacyState(self.engine).load_state_dict(self._saved)
        self._saved = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A trainer may be given several loaders, as a list or a dict.
        if not any(each is self._loader for each in pytree.tree_leaves(trainer.train_dataloader)):
            raise ValueError(_THROUGH)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._loader.private.take_up()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._loader.private.current.last and not self.engine.can_step():
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loader.private.leave()
        if not self.engine.can_step():
            trainer.should_stop = True
        if self.engine.accountant.history:
            pl_module.log("epsilon", self.engine.get_epsilon(self.delta))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_back(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._give_back(pl_module)

    def state_dict(self) -> dict[str, Any]:
        attached = self._loader is not None and self._loader.private is not None
        return PrivacyState(self.engine).state_dict() if attached else self._last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    # --- helpers -----------------------------------------------------------------------------------

    def _give_back(self, pl_module: pl.LightningModule) -> None:
        if self._loader is not None and self._loader.private is not None:
            # For who saves a checkpoint when `fit` has ended.
            self._last = self.state_dict()
            self._loader.private = None
            self.engine.detach(pl_module)

    def _check(self, trainer: pl.Trainer) -> None:
        if self._loader is None:
            raise ValueError(_THROUGH)
        if trainer.ckpt_path is not None and not self._saved:
            raise ValueError(
                f"{trainer.ckpt_path} was saved without this callback, so what its parameters have cost is unknown. To "
                "start from public weights, load them (load_from_checkpoint) and call fit without ckpt_path"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"configure_optimizers must make one optimizer, got {len(trainer.optimizers)}")
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val must be None, got {trainer.gradient_clip_val}: gradients are clipped one sample at a "
                "time, by max_grad_norm"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches must be 1, got {trainer.accumulate_grad_batches}: give the DataLoader a "
                "batch_size that many times larger, and max_batch_size, the old one"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"precision must be one without a gradient scaler (bf16-mixed has none), got {trainer.precision!r}"
            )
        if trainer.world_size != 1:
            raise ValueError(f"the trainer must be of one process, got {trainer.world_size}")


class _Loader:
    """An ordinary loader until `fit` begins, and the private one from then on.

    The trainer may ask for its length, and for an iterator, before the optimizer is made (estimated_stepping_batches
    does), but for no batch.
    """

    def __init__(self, plain: DataLoader, *, poisson: bool, sized: bool):
        self.plain, self.private, self._sized = plain, None, sized
        # Poisson batches have a number of their own to an epoch.
        self._length = len((PoissonLoader.from_data_loader if poisson else EpochLoader)(plain))

    def __iter__(self) -> Iterator[Any]:
        if self.private is None:
            raise RuntimeError(
                "this loader gives batches within Trainer.fit only, with its callback among the trainer's. Where it is "
                "estimated_stepping_batches that asked: with max_batch_size that number is unknown, and schedulers "
                "count len(data_loader) steps an epoch"
            )
        yield from self.private

    def __len__(self) -> int:
        if not self._sized:
            raise TypeError("how many parts the logical batches have is not known beforehand")
        return self._length


class _LogicalSteps:
    """A scheduler that steps where a logical batch ends."""

    def __init__(self, scheduler: Any, loader: Any):
        self._scheduler, self._loader = scheduler, loader

    def step(self, *args: Any) -> None:
        if self._loader.current is None or self._loader.current.last:
            self._scheduler.step(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._scheduler, name)
