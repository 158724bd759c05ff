"""PrivacyEngine: the front door. Assembles loader, layers, clipping, optimizer and accountant."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from adaclip import arguments, checkpoint
from adaclip.accounting import Accountant, Ledger, SubsampledGaussian, create_accountant
from adaclip.attached import Attached
from adaclip.augment import Augmentation
from adaclip.batches import BatchInfo, class_labels
from adaclip.budget import Budget
from adaclip.clipped_sum import ClippedSum
from adaclip.clipping import Clipping, make_clipping
from adaclip.epochs import EpochLoader
from adaclip.errors import PrivacyBudgetExceeded
from adaclip.groups import LabelGroups
from adaclip.layers import Tape, build_layers, plain_module
from adaclip.noise import NoiseSource
from adaclip.optimizer import DPOptimizer
from adaclip.planning import calibrate_schedule, planned_events, planned_releases, quantized
from adaclip.processes import Processes
from adaclip.sampler import PoissonLoader
from adaclip.schedules import Schedule, check_schedule
from adaclip.shards import check_shards
from adaclip.smoothing import EvaluationPoint, SmoothedLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PrivacyEngine"]


class PrivacyEngine:
    """Makes a model, an optimizer and a data loader train with differential privacy.

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.1, max_grad_norm=1.0)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        engine.get_epsilon(delta=1e-5)

    Guarantee: what `optimizer.step` releases over time is (epsilon, delta)-differentially private with
    respect to one example of the data set (Abadi et al. 2016, arXiv 1607.00133), with epsilon from the
    accountant's upper bound. It covers the parameters and everything computed from them; it does not cover
    losses, `optimizer.sample_norms` or anything else read off training examples.

    One engine trains one model at a time: `detach` gives the model back.

    Args:
        accountant: "pld", certified on both sides to about 1e-3, or "rdp".
        adjacency: which two data sets are neighbors: "add_remove" (one example more or fewer), "replace_one"
          or "zero_out" (one example contributes nothing). None: add_remove for Poisson batches, and zero_out
          for shuffled ones, for which add_remove has no guarantee.
    """

    # What `adaclip.opacus` puts in their place.
    _optimizer_class: type[DPOptimizer] = DPOptimizer
    _make_loader = staticmethod(arguments.make_loader)
    _planned_loader = staticmethod(arguments.planned_loader)

    def __init__(self, accountant: str = "pld", adjacency: str | None = None):
        self.accountant: Accountant = create_accountant(
            accountant, "add_remove" if adjacency is None else adjacency
        )
        self._adjacency = adjacency
        self._attached: Attached | None = None
        self._budget: Budget | None = None
        self._booked_epoch: tuple[int, float] | None = None
        self._used_keys: list[NoiseSource] = []
        self._lineage = checkpoint.Lineage()

    # --- making things private ---------------------------------------------------------------------

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float] | None = None,
        poisson_sampling: bool = True,
        clipping: str | Clipping = "flat",
        noise_schedule: Schedule | None = None,
        groups: LabelGroups | None = None,
        labels: Callable[[Any], torch.Tensor] | None = None,
        smoothing: SmoothedLoss | None = None,
        views_per_sample: int = 1,
        augmentation: Augmentation | None = None,
        max_batch_size: int | None = None,
        pad_to: int | str | None = None,
        backend: str = "auto",
        loss_reduction: str = "mean",
        noise_generator: bytes | int | torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> tuple[nn.Module, DPOptimizer, PoissonLoader | EpochLoader]:
        """Return (module, optimizer, loader) for an unchanged training loop.

        Args:
            module: the model; the same object comes back, its `forward`s replaced until `detach`.
              Every module along it must treat samples independently, samples along dimension 0.
            optimizer: any torch optimizer over (a subset of) the module's parameters; SGD, Adam, AdamW
              and NAdam get a fused noise + update pass. Parameters it does not hold are not trained.
            data_loader: an ordinary DataLoader; its batch_size / len(dataset) becomes the sampling rate.
            noise_multiplier: sigma of a whole step. Without statistics beside the gradient, noise has
              standard deviation sigma C; with them it has more (`adaclip.step_release`). 0 is exact clipped SGD.
            max_grad_norm: C, the clipping norm, 1.0 if left out (a sequence for per-layer clipping: one
              a layer). Where the optimizer's parameter groups have a key "max_grad_norm" each is clipped to its own
              (`adaclip.clipping.PerGroupClipping`), and this is left out.
            poisson_sampling: False keeps the loader's own shuffled batches, and the accountant then
              books one full-batch release an epoch: no amplification by sampling (with a warning).
            clipping: a strategy's name or an `adaclip.clipping` object (which is copied: read the one at
              work from `optimizer.clipping`).
            noise_schedule: an `adaclip.schedules` object: release t has the noise multiplier sigma times
              schedule(t), and is booked with it. For Poisson batches only.
            groups: label groups, whose noisy statistics every step releases (copied: `optimizer.groups`).
            labels: for groups: a batch -> its labels, int64, one an example; None: the second element of it.
            smoothing: take gradients at randomly moved weights (`adaclip.smoothing`); costs no privacy.
            views_per_sample: V: the loader yields each example as V rows, one after the other, and what is
              clipped is the mean of their gradients. A row for each view, in the loader's order.
            augmentation: what is done to the images of each view, a name or a function (`adaclip.augment`).
            max_batch_size: split logical batches into physical ones of at most so many rows; the loop
              stays as it is, `step` and `zero_grad` act on the last one only.
            pad_to: fill physical batches with zero-weight rows to this size ("auto": the largest usual one).
            backend: "auto" or one of `adaclip.backends.BACKENDS`, which says what is what.
            loss_reduction: "mean" or "sum", as the criterion does over the rows of the batch. A mean over
              anything else (class weights, ignored targets, only some of the rows) makes one sample's
              gradient depend on the others, and the clipping norm mean something else.
            noise_generator: None takes a key from the operating system (the only private choice); a 32-byte key,
              an int or a torch.Generator is for tests and replay (noise repeats where a run is resumed with it).
            process_group: the processes that train the model together, each calling this (`adaclip.processes`); None:
              all of torch.distributed's where it is initialized. The model may be wrapped by
              DistributedDataParallel, sharded by FSDP2's `fully_shard` before the optimizer is made, or neither: then
              all start from the first process's parameters. The loader's batch_size is that of all processes
              together, or, with a DistributedSampler, of each. Its data set must be the whole one, in the same order,
              in every process: each takes its part of one Poisson sample. (Only the size is compared. Of parts cut by
              hand who takes what would depend on an example's presence elsewhere: no amplification by sampling.)

        Raises:
            ValueError, TypeError: an argument is wrong. UnsupportedModuleError: the model cannot be
            trained privately as it is; the message names each problem and its cure. Nothing has been
            changed in either case.
        """
        self._check_free()
        processes = Processes(process_group)
        with processes.together("make_private"):
            arguments.check_options(
                noise_multiplier=noise_multiplier,
                noise_schedule=noise_schedule,
                poisson_sampling=poisson_sampling,
                groups=groups,
                labels=labels,
                backend=backend,
                loss_reduction=loss_reduction,
            )
            # Whichever of both was compiled.
            wrapper = plain_module(module)
            model = plain_module(arguments.unwrapped(wrapper, processes))
            arguments.check_model(model)
            arguments.check_optimizer(model, optimizer, smoothing)
            sharded = check_shards(model, processes)
            strategy = make_clipping(clipping, max_grad_norm, optimizer)
            source = arguments.make_source(noise_generator, self._used_keys)
        # One key for all, and the first process's.
        source = processes.share(source)
        with processes.together("make_private"):
            loader = self._make_loader(
                data_loader,
                poisson_sampling,
                processes,
                max_batch_size=max_batch_size,
                pad_to=pad_to,
                views=views_per_sample,
                augmentation=augmentation,
                source=source,
            )
            if groups is not None:
                loader.labels_of = class_labels if labels is None else labels
            accountant = self._accountant_for(poisson_sampling)

            def batch() -> BatchInfo | None:
                return loader.current

            def trained() -> list[nn.Parameter]:
                return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

            # The tape is needed to build the layers, and the layers to build what the tape reports to.
            tape = Tape(lambda: clipped_sum.finish())
            layers = build_layers(model, tape, backend)
            clipped_sum = ClippedSum(
                layers,
                tape,
                strategy,
                parameters=trained,
                param_groups=lambda: optimizer.param_groups,
                batch=batch,
                denominator=loader.expected_batch_size,
                loss_reduction=loss_reduction,
                backend=backend,
                groups=copy.deepcopy(groups),
                labels=lambda: loader.labels,
                views=views_per_sample,
                processes=processes,
                sharded=model if sharded else None,
            )
            point = EvaluationPoint.needed(optimizer, smoothing, source, backend)
            private = self._optimizer_class(
                optimizer,
                clipped_sum,
                noise_multiplier=float(noise_multiplier),
                expected_batch_size=loader.expected_batch_size,
                source=source,
                book=self._book,
                batch=batch,
                noise_schedule=noise_schedule,
                point=point,
                backend=backend,
                processes=processes,
                account=self._account,
            )
        processes.agree_on("make_private", arguments.common(model, private, loader, accountant))
        # One run, whose checkpoints the first one writes: loaded back, they count alike in all.
        self._lineage.run = processes.told("make_private", self._lineage.run)
        if not sharded:
            processes.start_alike(model)
        clipped_sum.reset()
        self.accountant, self._booked_epoch = accountant, None
        self._attached = Attached(module, model, private, loader, tape, layers)
        return module, private, loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int | None = None,
        steps: int | None = None,
        poisson_sampling: bool = True,
        noise_schedule: Schedule | None = None,
        **options: Any,
    ) -> tuple[nn.Module, DPOptimizer, PoissonLoader | EpochLoader]:
        """`make_private` with the noise multiplier that spends (target_epsilon, target_delta) on a schedule.

        Args:
            epochs, steps: the planned length; exactly one of them. An epoch is len(loader) logical steps.
            noise_schedule: as in `make_private`; the noise multiplier that it scales is calibrated for all of
              the planned releases together. A schedule of more than 32 values is taken as 32 constant pieces.
            options: the other arguments of `make_private`.

        The budget is enforced: an `optimizer.step()` that would pass it raises PrivacyBudgetExceeded and
        changes nothing. The schedule is certified as a whole by the engine's accountant, and is then the only
        one allowed. If the engine's accountant holds releases already (earlier training, a noisy mean), they
        count, and because the schedule may have been chosen in their light, RDP calibrates the noise and an
        RDP filter guards the budget (`adaclip.budget.Budget` says which rule is valid when).
        """
        self._check_free()
        if "noise_multiplier" in options:
            raise TypeError("noise_multiplier must not be given: it is calibrated from target_epsilon")
        # Made once more in make_private: here for its checks, and for how it counts an epoch.
        planned = self._planned_loader(data_loader, poisson_sampling)
        sampling = "poisson" if poisson_sampling else "shuffled"
        releases = planned_releases(epochs, steps, len(planned), sampling)
        budget = Budget(target_epsilon, target_delta)
        if check_schedule(noise_schedule, "noise_schedule") is not None:
            noise_schedule = quantized(noise_schedule, releases)
        spent = self.accountant.history
        sigma = calibrate_schedule(
            target_epsilon=target_epsilon,
            delta=target_delta,
            sample_rate=planned.sample_rate,
            steps=releases,
            accountant="rdp" if spent else self.accountant.name,
            adjacency=self._accountant_for(poisson_sampling).adjacency,
            sampling=sampling,
            spent=spent,
            schedule=noise_schedule,
        )
        made = self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=sigma,
            noise_schedule=noise_schedule,
            poisson_sampling=poisson_sampling,
            **options,
        )
        if not spent:
            plan = planned_events(sigma, noise_schedule, releases, planned.sample_rate, sampling)
            budget = Budget(target_epsilon, target_delta, plan)
        self._budget = budget
        return made

    def set_budget(self, target_epsilon: float, target_delta: float) -> None:
        """From now on refuse every step after which epsilon(target_delta) would pass target_epsilon.

        An RDP filter decides (see `adaclip.budget.Budget`), so noise, sampling rate and the end of training
        may be chosen on the way. Not for a run that `make_private_with_epsilon` planned and that has begun.
        """
        if self._budget is not None and self._budget.plan is not None and self.accountant.history:
            raise RuntimeError(
                "set_budget must come before the first step of a planned run: leaving the plan on grounds of what "
                "was released is not covered by its guarantee"
            )
        self._budget = Budget(target_epsilon, target_delta)

    def _accountant_for(self, poisson_sampling: bool) -> Accountant:
        """The engine's accountant, under an adjacency for which the sampling has a guarantee."""
        if poisson_sampling or self.accountant.adjacency != "add_remove":
            return self.accountant
        if self._adjacency is not None or self.accountant.history:
            raise ValueError(
                f"adjacency must be 'zero_out' or 'replace_one' for shuffled batches, got "
                f"{self.accountant.adjacency!r}: make the engine with PrivacyEngine(adjacency='zero_out'), or use "
                "poisson_sampling=True"
            )
        return create_accountant(self.accountant.name, "zero_out")

    def detach(self, module: nn.Module | None = None) -> nn.Module:
        """Give the model back as it was: ordinary forwards, no hook, no private gradients."""
        if self._attached is None:
            raise RuntimeError("no model is attached to this engine")
        if module is not None and not self._attached.is_of(module):
            raise ValueError("module must be the one given to make_private")
        attached = self._attached
        attached.detach()
        self._used_keys += [attached.optimizer.source] if attached.optimizer.releases else []
        self._attached = None
        return attached.module

    # --- privacy spent -----------------------------------------------------------------------------

    def get_epsilon(self, delta: float) -> float:
        """The accountant's upper bound on epsilon for everything released so far.

        As a guarantee it is for a length of training that was fixed in advance, or that does not depend on
        the data. Who stops on grounds of what was released reports the budget, which covers every such stop.
        """
        return self.accountant.get_epsilon(delta)

    def can_step(self) -> bool:
        """Whether the budget, if there is one, leaves room for the next `optimizer.step()`."""
        if self._budget is None or self._attached is None:
            return True
        optimizer, loader = self._attached.optimizer, self._attached.loader
        schedule = optimizer.noise_schedule
        sigma = optimizer.base_noise_multiplier * (1.0 if schedule is None else schedule(optimizer.releases))
        try:
            release = self._due(loader, optimizer.batch, sigma)
            if release is not None:
                self._budget.check(self.accountant.ledger, release)
        except PrivacyBudgetExceeded:
            return False
        return True

    def _due(
        self, loader: PoissonLoader | EpochLoader, info: BatchInfo | None, sigma: float
    ) -> SubsampledGaussian | None:
        """The release that a step of this batch has to book; None for the rest of an epoch that was booked whole."""
        if not isinstance(loader, EpochLoader):
            return SubsampledGaussian(loader.sample_rate, sigma, "poisson")
        if info is not None and self._booked_epoch is not None and info.epoch == self._booked_epoch[0]:
            # Every example enters one step of an epoch: the epoch is one release, booked at its start.
            booked = self._booked_epoch[1]
            if sigma < booked:
                raise RuntimeError(
                    f"noise_multiplier must not fall within an epoch, which was booked with {booked}, got {sigma}"
                )
            return None
        return SubsampledGaussian(loader.sample_rate, sigma, "shuffled")

    def _account(self) -> int:
        """What stands for what is spent and the budget: the same in all processes that train together."""
        budget, ledger = self._budget, self.accountant.ledger
        rule = None if budget is None else (budget.epsilon, budget.delta, budget.plan is None)
        return zlib.crc32(repr((rule, ledger.steps, len(ledger))).encode())

    def _book(self, optimizer: DPOptimizer, info: BatchInfo | None) -> None:
        """Book one release, or raise PrivacyBudgetExceeded with nothing booked."""
        if self._attached is None or optimizer is not self._attached.optimizer:
            raise RuntimeError("this optimizer's engine was detached: its steps are no longer accounted")
        if info is None:
            raise RuntimeError(
                "step() needs a batch of the private loader: its sampling is what the accountant books. "
                "Iterate over the loader that make_private returned"
            )
        release = self._due(self._attached.loader, info, optimizer.noise_multiplier)
        if release is None:
            return
        if self._budget is not None:
            self._budget.check(self.accountant.ledger, release)
        self.accountant.add(release)
        self._booked_epoch = info.epoch, optimizer.noise_multiplier

    # --- checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        path: str | os.PathLike,
        *,
        module: nn.Module,
        optimizer: DPOptimizer,
        extra: dict | None = None,
        ledger: str | os.PathLike | None = None,
    ) -> None:
        """Write model, optimizer, thresholds and other released state, ledger and counters to `path`, atomically.

        The noise key is not in it: a resumed run draws a new one. Of several processes each calls this, and the first
        one writes. A sharded model is written whole, so that any number of processes can go on from it.

        Args:
            extra: plain values of your own (numbers, text, lists, dicts, tensors).
            ledger: the run's ledger file, one for all of its checkpoints: written first, so that a process killed at
              any point leaves no byte of a step that is not on the account. Before anything else of the model is shown
              (an evaluation, weights sent away), call `engine.accountant.ledger.save(ledger)` yourself.

        Raises OSError, with the old checkpoint unchanged, if it cannot be written.
        """
        held = self._check_attached(module, optimizer)
        here = held.loader, self.accountant, self._budget, self._lineage.run
        state = checkpoint.collect(held.model, optimizer, *here, extra)
        with optimizer.processes.together("save_checkpoint"):
            if optimizer.processes.rank == 0:
                if ledger is not None:
                    self.accountant.ledger.save(ledger)
                checkpoint.save(path, state)

    def load_checkpoint(
        self,
        path: str | os.PathLike,
        *,
        module: nn.Module,
        optimizer: DPOptimizer,
        ledger: str | os.PathLike | None = None,
    ) -> dict[str, Any]:
        """Continue from `path`; returns the `extra` it was saved with. Loading executes no code.

        ledger: the file that `save_checkpoint` was given. Steps that it holds beyond the checkpoint may have been seen:
          they are booked, and, done again with new noise, count again. (With a given key they are a replay, the same
          noise on the same batches, and count again all the same.)

        Raises ValueError, with nothing changed, if the file is damaged or of another version, or belongs
        to another model, optimizer, clipping, groups, smoothing, noise multiplier, schedule or data set.
        """
        held = self._check_attached(module, optimizer)
        with optimizer.processes.together("load_checkpoint"):
            state = checkpoint.load(path)
            here = held.loader, self.accountant, self._budget
            saved, budget = checkpoint.check(state, held.model, optimizer, *here)
            counted = saved if ledger is None else Ledger.load(ledger).longer(saved)
        optimizer.processes.agree_on(
            "load_checkpoint", {"checkpoint": (state["run"], state["releases"], counted.state_dict())}
        )
        # The sum in hand was clipped to other thresholds, and its parameters are about to change.
        optimizer._sum.reset()
        lost = counted.steps - saved.steps
        checkpoint.restore(state, held.model, optimizer, held.loader, lost=lost)
        self._lineage.adopt(self.accountant, state["run"], counted)
        self._budget = budget
        return state["extra"]

    # --- checks ------------------------------------------------------------------------------------

    def _check_free(self) -> None:
        if self._attached is not None:
            raise RuntimeError("this engine trains a model already: detach it first, or use another engine")

    def _check_attached(self, module: nn.Module, optimizer: DPOptimizer) -> Attached:
        held = self._attached
        if held is None or optimizer is not held.optimizer or not held.is_of(module):
            raise ValueError("module and optimizer must be those that make_private of this engine returned")
        return held
