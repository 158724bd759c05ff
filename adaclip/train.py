"""Trains one model privately on one data set: the assembler behind `adaclip train`."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adaclip import checkpoint
from adaclip.assembly import (
    build_model,
    build_optimizer,
    learning_rate,
    load_data,
    pick_device,
    privacy_options,
)
from adaclip.batches import BatchInfo
from adaclip.diagnostics import Diagnostics
from adaclip.engine import PrivacyEngine
from adaclip.errors import PrivacyBudgetExceeded, TrainingDiverged
from adaclip.evaluation import Interrupted, evaluate
from adaclip.interrupts import Interrupts
from adaclip.plots import plot_run
from adaclip.processes import Processes
from adaclip.progress import make_reporter
from adaclip.runs import RunFolder
from adaclip.smoothing import moving_average
from adaclip.train_config import TrainConfig
from adaclip.train_device import Place
from adaclip.train_records import evaluation_row, run_settings, step_settings, summary

__all__ = ["Training", "evaluate", "is_finished"]


def is_finished(folder: RunFolder) -> bool:
    """Whether the run in `folder` has come to its end."""
    return bool(checkpoint.load(folder.checkpoint)["extra"].get("finished"))


class Training:
    """One run: everything is loaded and checked when the object exists, and `run` trains.

    `config.seed` decides the initial weights alone. torch's global generator is then seeded from the operating
    system, for dropout; random views are drawn from a key of the private loader's.

    Args:
        config: checked settings.
        folder: where the run is kept; written to only once everything else has succeeded.
        saved: None for a new run, or what `folder.read_config` gave, to continue from its checkpoint.
        private_diagnostics: write per-step diagnostics of training examples into a marked folder.

    Attributes:
        step: logical steps done; total: logical steps planned; seconds: spent on them and on evaluations.
        notes: remarks for the user, one paragraph each.
        finished: the planned steps are done, or the budget is spent.

    Raises:
        ValueError, TypeError, OSError, RuntimeError: a setting, a data file, a folder or a checkpoint is at
        fault; the message says which. Nothing has been written to `folder` then.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        *,
        saved: dict[str, Any] | None = None,
        private_diagnostics: bool = False,
    ):
        self.config, self.folder, self.notes = config, folder, []
        # Those that torchrun has started; the first one writes and shows.
        self.processes = Processes()
        self.leads = self.processes.rank == 0
        if private_diagnostics and self.processes.size > 1:
            raise ValueError(
                f"--private-diagnostics is for a run in one process, got {self.processes.size}: each sees its own examples"
            )
        self.split = "validation" if config.validation else "test"
        self.step, self.finished, self._private = 0, False, private_diagnostics
        self.seconds = self._training_seconds = 0.0
        self._evaluated_at: int | None = None
        # Of a step that an earlier process made; None after one of this one's own.
        self._last: dict[str, Any] | None = None
        # How many releases were on the account when the last step was done, or the run was restored.
        self._booked = 0
        # By the number of rows: the outputs of the last batch of that many. Private.
        self._logits: dict[int, Tensor] = {}
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        self.place = Place(config, self.device, alone=self.processes.size == 1)
        # The first one downloads, where that is asked for.
        with self.processes.together("reading the data"):
            loaded = load_data(config) if self.leads else None
        self.data = load_data(config) if loaded is None else loaded
        self.size = len(self.data.train_labels)
        if config.batch_size > self.size:
            raise ValueError(
                f"batch_size must be at most the number of training images, {self.size}, got {config.batch_size}"
            )
        self.sample_rate = config.batch_size / self.size
        self.total = config.steps or config.epochs * max(1, round(1 / self.sample_rate))
        self.eval_every = config.eval_every or max(1, math.ceil(self.total / 10))
        torch.manual_seed(config.seed)
        self.model = self.place.model(build_model(config, self.data, self.device))
        # The seed is in config.json, and dropout masks go by position in the batch: were they known, removing one
        # example would change what every later row contributes. They are drawn anew by every process, and
        # nothing of them is stored; so are the random views, from the loader's own key. (torch's CPU generator
        # uses 32 bits of a seed, whatever is given.)
        torch.seed()
        # Copied before the engine attaches: the copy is an ordinary model.
        self.average = moving_average(self.model, config.ema) if config.ema else None
        self._make_private(None if saved is None else saved["run"])
        self._test = self.place.data(self.data.test_images, self.data.test_labels)
        self._step = self.place.step(self.model, self.optimizer, self._loss)
        self._diagnostics = Diagnostics(self.folder) if self._private else None
        if config.delta >= 1 / self.size:
            self.notes.append(
                f"warning: delta {config.delta:g} is not below 1/N = {1 / self.size:.2g}: a mechanism that "
                "publishes one whole training example would satisfy it"
            )
        if self.optimizer.noise_multiplier == 0:
            self.notes.append("warning: noise_multiplier is 0: nothing of this run is private")
        if saved is None:
            if self.leads:
                self.folder.write_config(**run_settings(self))
            self._save()
        else:
            self._restore()

    def _make_private(self, saved: dict[str, Any] | None) -> None:
        config = self.config
        options: dict[str, Any] = {
            "module": self.model,
            "optimizer": build_optimizer(config, self.model),
            "data_loader": DataLoader(
                TensorDataset(*self.place.data(self.data.train_images, self.data.train_labels)),
                batch_size=config.batch_size,
                shuffle=True,
                pin_memory=self.place.gpu,
            ),
            "max_batch_size": config.max_batch_size,
            "pad_to": self.place.pad_to,
            "loss_reduction": "sum",
            **privacy_options(config, self.data, self.total, diagnostics=self._private),
        }
        self.engine = PrivacyEngine(accountant=config.accountant, adjacency=config.adjacency)
        if saved is not None:
            if not {"dataset_size", "noise_multiplier"} <= saved.keys():
                raise ValueError(
                    f"{self.folder.config} lacks dataset_size or noise_multiplier: it is damaged"
                )
            if saved["dataset_size"] != self.size:
                raise ValueError(
                    f"the training set must have the {saved['dataset_size']} images that the run was started "
                    f"with, got {self.size}"
                )
            made = self.engine.make_private(noise_multiplier=saved["noise_multiplier"], **options)
        elif config.epsilon is not None:
            made = self.engine.make_private_with_epsilon(
                target_epsilon=config.epsilon, target_delta=config.delta, steps=self.total, **options
            )
        else:
            made = self.engine.make_private(noise_multiplier=config.noise_multiplier, **options)
        _, self.optimizer, self.loader = made
        self.groups = None if config.groups == "off" else self.optimizer.groups

    def _restore(self) -> None:
        """Go on from the checkpoint, with the larger of its account and the ledger file's (`adaclip.runs`)."""
        extra = self.engine.load_checkpoint(
            self.folder.checkpoint, module=self.model, optimizer=self.optimizer, ledger=self.folder.ledger
        )
        if not {"step", "finished", "seconds", "training_seconds", "ema", "last"} <= extra.keys():
            raise ValueError(f"{self.folder.checkpoint} was not written by `adaclip train`")
        if self.average is not None:
            self.average.load_state_dict(extra["ema"])
        self.step, self.finished, self._last = extra["step"], extra["finished"], extra["last"]
        self.seconds, self._training_seconds = extra["seconds"], extra["training_seconds"]
        self._booked = self.engine.accountant.ledger.steps
        published = self.folder.published()
        if self._booked < max(published, self.step):
            raise ValueError(
                f"{self.folder.ledger} counts {self._booked} steps, fewer than the {max(published, self.step)} whose "
                "results are in this folder: an older copy of it must have been put back. Restore the newest one"
            )
        if self._booked > self.step:
            early = "" if self.config.epsilon is None else ", and training ends as many steps early"
            self.notes.append(
                f"the ledger holds {self._booked - self.step} steps more than the checkpoint: their results may have "
                f"been seen, so they stay on the account{early}"
            )
        if published == self.step and self.folder.metrics.exists():
            self._evaluated_at = self.step

    # --- the loop ------------------------------------------------------------------------------------

    def run(self, *, quiet: bool = False) -> dict[str, Any] | None:
        """Train to the end; return the summary, or None if SIGINT or SIGTERM came before the end.

        Of several processes the first one writes the folder and returns the summary, the others an empty one.

        Either way the folder then holds ledger, checkpoint and plots. Where anything raises, it holds the ledger of
        what was released, and, unless that was in the middle of a step, the checkpoint of the last one.

        Raises:
            TrainingDiverged: parameters are not finite; the folder keeps its last checkpoint.
            OSError: the folder cannot be written any more; it holds what was there before.
        """
        reporter = make_reporter(
            quiet=quiet or not self.leads, start=self.step, total=self.total, split=self.split
        )
        with Interrupts() as interrupts, reporter:
            self._reporter, self._interrupts = reporter, interrupts
            reporter.step(self.step, self.epsilon, self.rate())
            try:
                try:
                    self._train()
                    if self._evaluated_at != self.step:
                        self._evaluate()
                    rows = self._plot()
                    # Said last: from here on there is nothing left to resume.
                    self.finished = True
                    self._save()
                except Interrupted:
                    self._save()
                    self._plot()
            except BaseException:
                # The error that is under way is the one to tell of.
                with contextlib.suppress(OSError, TrainingDiverged):
                    self._keep_what_happened()
                raise
        if not self.finished:
            return None
        return summary(self, rows[-1]) if self.leads else {}

    def _train(self) -> None:
        self.model.train()
        if self._due():
            # Resumed from the checkpoint of a step whose evaluation was cut off.
            self._evaluate()
        while self.step < self.total:
            started = time.perf_counter()
            for images, labels in self.loader:
                if not self._train_on(images, labels):
                    return
                if not self.loader.current.last:
                    self._stop_if_asked()
                    continue
                self._clock(started)
                self._stop_if_asked()
                if self._due():
                    self._evaluate()
                if self.step == self.total:
                    return
                started = time.perf_counter()

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if a signal came, to any process."""
        if self.processes.any("a signal", self._interrupts.requested):
            raise Interrupted

    def _due(self) -> bool:
        """Whether the step that is done is one to evaluate after, and that has not happened."""
        at = self.step > 0 and self.step % self.eval_every == 0
        return (at or self.step == self.total) and self._evaluated_at != self.step

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Copied to a place of its own, where a replayed step leaves it too.
        kept = self._logits.get(len(logits))
        if kept is None:
            kept = self._logits[len(logits)] = torch.empty_like(logits)
        kept.copy_(logits.detach())
        # Smoothing moves every target alike, whatever the data: it costs no privacy. A sum: a mean would divide by
        # the rows drawn, and round each sample's gradient by how many others there are.
        return cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing, reduction="sum")

    def _train_on(self, images: Tensor, labels: Tensor) -> bool:
        """Train on a physical batch; False, with nothing changed, if the privacy budget is spent."""
        info = self.loader.current
        if info.first:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.step, self.total)
        images, labels = self.place.here(images), self.place.here(labels)
        try:
            self._step(self.place.images(self.data.normalize(images)), labels)
        except PrivacyBudgetExceeded as reason:
            self._reporter.say(f"training ends at step {self.step} of {self.total}: {reason}")
            return False
        if info.rows and (self._reporter.wants_batches or self._diagnostics):
            self._show(info, labels)
        if info.last:
            self.step += 1
            self._last = None
            if self.average is not None:
                self.average.update_parameters(self.model)
            # The state is whole again.
            self._booked = self.engine.accountant.ledger.steps
            if self._diagnostics:
                flat = self.optimizer.clipping.rule.kind == "threshold"
                flat = flat and len(self.optimizer.used_thresholds) == 1
                self._diagnostics.write(
                    self.step,
                    self.last["max_grad_norm"] if flat else None,
                    self.optimizer.non_finite_samples,
                    None if self.groups is None else self.groups.private,
                )
        return True

    @torch.no_grad()
    def _show(self, info: BatchInfo, labels: Tensor) -> None:
        """The batch's (private) loss and accuracy, to those that may see them."""
        rows = info.rows * info.views
        logits, labels = self._logits[info.padded_rows * info.views][:rows].float(), labels[:rows]
        losses = cross_entropy(logits, labels, reduction="none")
        correct = (logits.argmax(1) == labels).float()
        # A sample's views lie one behind the other.
        losses, correct = (each.view(info.rows, -1).mean(1) for each in (losses, correct))
        if self._reporter.wants_batches:
            self._reporter.batch(float(losses.mean()), float(correct.mean()))
        if self._diagnostics:
            self._diagnostics.add(losses, correct, self.optimizer.sample_norms)

    def _clock(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._training_seconds += seconds
        self._reporter.step(self.step, self.epsilon, self.rate())

    @property
    def last(self) -> dict[str, Any]:
        """`step_settings` of the last step."""
        return step_settings(self) if self._last is None else self._last

    def epsilon(self) -> float:
        return self.engine.get_epsilon(self.config.delta)

    def rate(self) -> float:
        """Images/s by the expected batch size: the realised sizes are private."""
        return self.loader.expected_batch_size * self.step / max(self._training_seconds, 1e-9)

    # --- what is released ----------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Ledger, checkpoint, evaluation, metrics: in this order (`adaclip.runs`)."""
        self._save()
        cut_off = False
        if self.leads:
            try:
                self._measure()
            except Interrupted:
                cut_off = True
        if self.processes.any("an evaluation", cut_off):
            raise Interrupted
        self._evaluated_at = self.step

    def _measure(self) -> None:
        """Evaluate, and write and show the result. Raises Interrupted if a signal came meanwhile."""
        started = time.perf_counter()
        model = self.model if self.average is None else self.average.module
        with self.place.autocast():
            accuracy, loss = evaluate(model, *self._test, self.data.normalize, self._interrupts)
        self.seconds += time.perf_counter() - started
        row = evaluation_row(self, accuracy, loss)
        self.folder.append_metrics(row)
        self._reporter.evaluation(row, self.split, self.total)
        if not math.isfinite(loss):
            # Of released parameters and images that are not trained on. How many training samples are left out because
            # of such values is private.
            self._reporter.say(
                f"the {self.split} loss at step {self.step} is not finite: training samples for which it is not, "
                "either, are left out, and their steps are noise alone"
            )

    def _save(self) -> None:
        """Ledger, then checkpoint. Raises TrainingDiverged in between, with the old checkpoint kept."""
        self._write_ledger()
        self._check_finite()
        self._write_checkpoint()

    def _write_ledger(self) -> None:
        if self.leads:
            self.engine.accountant.ledger.save(self.folder.ledger)

    def _write_checkpoint(self) -> None:
        extra = {
            "step": self.step,
            "finished": self.finished,
            "seconds": self.seconds,
            "training_seconds": self._training_seconds,
            "ema": None if self.average is None else self.average.state_dict(),
            "last": self.last,
        }
        self.engine.save_checkpoint(
            self.folder.checkpoint, module=self.model, optimizer=self.optimizer, extra=extra
        )

    def _check_finite(self) -> None:
        """Raise TrainingDiverged if a parameter is not finite: a function of released values, so nothing leaks."""
        bad = [name for name, p in self.model.named_parameters() if not bool(p.isfinite().all())]
        if bad:
            raise TrainingDiverged(
                f"training diverged: {len(bad)} parameters are not finite after step {self.step} of {self.total} "
                f"({', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}). The ledger counts these steps; the checkpoint "
                f"in {self.folder.path} is of an earlier one. A lower lr or fp32 may help, in a new run"
            )

    def _keep_what_happened(self) -> None:
        """After an error: the ledger, and the state of the last step unless another one had begun to be released."""
        self._write_ledger()
        # A checkpoint takes all processes, and another one may be gone.
        if self.processes.size == 1 and self._booked == self.engine.accountant.ledger.steps:
            self._save()

    def _plot(self) -> list[dict[str, Any]]:
        if not self.leads:
            return []
        rows = self.folder.read_metrics()
        plot_run(self.folder.path, rows, split=self.split)
        return rows
