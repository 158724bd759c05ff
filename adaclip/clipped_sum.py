"""The clipped gradient sum of one logical batch, built up in `p.grad` by one or more backwards.

At the end of each backward: layers' norms -> the strategy's factors -> weighted gradients into
`p.grad`, already divided by the public expected batch size q N; and what the step releases beside the
gradient is added to `statistics`, which live and die with `p.grad`. What ends up there has bounded
sensitivity only if every sample went in once, clipped, and nothing else went in: most of this file
is about noticing when that is not so, before anything is released.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adaclip import ops
from adaclip.batches import BatchInfo
from adaclip.clipping import NORM_KEY, Clipping, Setting
from adaclip.groups import LabelGroups
from adaclip.layers import Layer, Part, Tape, part_from_samples
from adaclip.processes import Processes
from adaclip.reference import wide_dtype
from adaclip.shards import reshard, shared_out
from adaclip.step_release import Statistics

__all__ = ["ClippedSum", "FixedBatch"]


class FixedBatch(NamedTuple):
    """What a captured backward reads on the device, where others ask the private loader on the host.

    real: int64 [1], how many of the rows are samples. labels: int64 [B], or None where nobody needs them.
    """

    real: Tensor
    labels: Tensor | None


class ClippedSum:
    """Owns the tape of a model and the meaning of its parameters' `.grad`.

    parameters: called for the parameters that are trained, in the order the noise is drawn.
    param_groups: called for the optimizer's parameter groups.
    batch: called for what the private loader says of the batch in hand; None without one.
    denominator: the public expected batch size, q N.
    groups, labels: the label groups, if any, and what is called for the labels of the batch in hand.
    views: how many consecutive rows of the model are views of one sample. A sample's gradient is their
      mean, which is what is clipped.
    processes: those that make the sum together, each of its own samples.
    sharded: the model whose parameters are cut up among them (`adaclip.shards`), if they are.

    Making one changes nothing; `reset` begins its work.
    """

    def __init__(
        self,
        layers: list[Layer],
        tape: Tape,
        clipping: Clipping,
        *,
        parameters: Callable[[], Iterable[nn.Parameter]],
        param_groups: Callable[[], list[dict]],
        batch: Callable[[], BatchInfo | None],
        denominator: float,
        loss_reduction: str,
        backend: str,
        groups: LabelGroups | None = None,
        labels: Callable[[], Tensor | None] | None = None,
        views: int = 1,
        processes: Processes | None = None,
        sharded: nn.Module | None = None,
    ):
        self._processes = Processes.alone() if processes is None else processes
        self._sharded = sharded
        self._layers = layers
        self._tape = tape
        self._parameters = parameters
        self._batch = batch
        self._denominator = denominator
        self._mean = loss_reduction == "mean"
        self._backend = backend
        self._labels = labels
        self._views = views
        self.clipping = clipping
        self.groups = groups
        wanted = set(parameters())
        if clipping.per_parameter:
            blocks = [[p] for p in dict.fromkeys(parameters())]
        else:
            blocks = [layer.parameters() for layer in layers if wanted.intersection(layer.trainable())]
        setting = Setting(
            layers=len(blocks),
            parameters=tuple(sum(p.numel() for p in wanted.intersection(block)) for block in blocks),
            expected_batch_size=denominator,
            device=next(iter(parameters())).device,
            backend=backend,
            param_groups=param_groups,
        )
        # An optimizer's own hyper-parameter may have that name.
        self._param_groups = param_groups
        self._numbers = {
            p: i for i, p in enumerate(dict.fromkeys(p for lay in layers for p in lay.parameters()))
        }
        self._with_norms = any(NORM_KEY in group for group in param_groups())
        groups_of_clipping = clipping.bind(setting)
        self._group_of: dict[nn.Parameter, int] = {}
        for k, block in enumerate(blocks):
            for p in block:
                self._group_of.setdefault(p, k if groups_of_clipping > 1 else 0)
        sides = [] if clipping.side is None else [clipping.side]
        if groups is not None:
            groups.bind(setting)
            sides.append(groups)
        self.statistics = Statistics(sides, setting.device, backend)
        # The number of the release that this sum is for. Addresses the keystream, so it never goes back.
        self.release = 0
        # Norms [B] of the last backward's samples (of all its rows, if they are counted on the device), before
        # clipping. Private: for debugging only.
        self.sample_norms: Tensor | None = None
        # How many samples were dropped because their gradient was not finite. Private as well.
        self.non_finite = torch.zeros((), dtype=torch.int64, device=setting.device)
        # Which forward passes (and, negative, calls outside of one) are in the sum; those in sums before it are
        # numbered from the first to the second of `_spent`.
        self._seen: set[int] = set()
        self._spent = 0, 0
        self._fixed: FixedBatch | None = None
        # Why the sum cannot be used, if the last backward did not come to its end.
        self.broken: str | None = None
        self._forget()

    # --- the state of the sum ----------------------------------------------------------------------

    def reset(self) -> None:
        """Drop the sum: `p.grad` of every trained parameter becomes None, and the statistics zero."""
        # Also of those that were frozen since: they get no noise, and their sums would stay.
        for p in {*self._parameters(), *self._made}:
            p.grad = None
        self.statistics.clear()
        self._forget()

    def _forget(self) -> None:
        # The thresholds this sum is clipped to, once it has begun.
        self._thresholds: tuple[Tensor, int] | None = None
        self._made: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._step: int | None = None
        self._spent = min({self._spent[0], *self._seen}), max({self._spent[1], *self._seen})
        self._seen = set()
        self._physical: BatchInfo | None = None
        self._rows_done = 0
        self._complete = False
        self.broken = None

    def begin(self) -> None:
        """Fix the thresholds of the logical batch in hand; nothing if that is done."""
        if self._thresholds is None:
            if not self._with_norms and any(NORM_KEY in group for group in self._param_groups()):
                raise ValueError(
                    f"a parameter group was given a {NORM_KEY!r} after make_private, which clips by "
                    f"{self.clipping.name!r}: give every group its own norm before it"
                )
            self.clipping.begin(self.release)
            self._thresholds = self.clipping.thresholds, self.clipping.thresholds._version

    @property
    def begun(self) -> bool:
        """Whether the thresholds of the logical batch in hand are fixed: something may have been clipped to them."""
        return self._thresholds is not None

    def open(self, info: BatchInfo) -> None:
        """`begin` the sum of that batch: the host's part of its backward, where a replay is what follows."""
        self.begin()
        self._step = info.step

    @property
    def labels(self) -> Tensor | None:
        """int64 [padded rows]: the labels of the batch in hand, for label groups; None without groups."""
        return None if self.groups is None or self._labels is None else self._labels()

    @contextmanager
    def reading(self, fixed: FixedBatch) -> Iterator[None]:
        """In here a backward takes the number of samples and the labels from there, all of a logical batch's."""
        self._fixed = fixed
        try:
            yield
        finally:
            self._fixed = None

    def holds(self, step: int) -> bool:
        """Whether the sum is (part of) that logical batch's, if only of rows that trained nothing."""
        return self._step == step

    def group_of(self, parameter: nn.Parameter) -> int:
        """The clipping group of a trained parameter; of layers, a new one (unfrozen later) joins group 0."""
        group = self.clipping.group_of(parameter)
        return self._group_of.get(parameter, 0) if group is None else group

    def agreed(self) -> int:
        """What stands for the trained parameters, their order and their clipping groups: the same in all processes."""
        trained = [(self._numbers.get(p, -1), *p.shape, self.group_of(p)) for p in self._parameters()]
        return zlib.crc32(repr(trained).encode())

    def check_intact(self) -> None:
        """Raise RuntimeError unless every `p.grad` is exactly what `finish` left there."""
        if self.broken:
            raise RuntimeError(f"the last backward failed ({self.broken}); call optimizer.zero_grad() first")
        if self._thresholds is not None:
            thresholds, version = self._thresholds
            if self.clipping.thresholds is not thresholds or thresholds._version != version:
                raise RuntimeError(
                    "the clipping thresholds were changed between backward() and step(): the noise would no "
                    "longer cover what was clipped to the old ones"
                )
        for p in self._parameters():
            if self.begun:
                self.group_of(p)
            made = self._made.get(p)
            if p.grad is None:
                if made is not None:
                    raise RuntimeError(
                        "a gradient sum was dropped before it was used: call optimizer.zero_grad(), not "
                        "model.zero_grad(), which knows nothing of logical batches"
                    )
            elif made is None:
                raise RuntimeError(
                    f"parameter {self._name_of(p)} holds a gradient that was not clipped: it was used outside "
                    "its module's forward, trained in evaluation mode (call model.train() first), or unfrozen in a "
                    "module of your own that has parameters itself (detach the model, then make_private again)"
                )
            elif p.grad is not made[0] or p.grad._version != made[1]:
                raise RuntimeError(
                    f"the gradient of parameter {self._name_of(p)} was changed between backward() and step(): "
                    "the noise would no longer cover it. Leave out what does so (clip_grad_norm_, a trainer's "
                    "gradient clipping, scaling by hand): gradients are clipped already, one sample at a time"
                )

    def check_rows(self) -> None:
        """Raise RuntimeError unless the last physical batch came through whole, a row for each sample."""
        info = self._physical
        if info is not None and self._rows_done not in (0, info.rows, info.padded_rows):
            raise RuntimeError(
                f"the private loader handed out {info.padded_rows} rows ({info.rows} of them samples), but "
                f"backward() has seen {self._rows_done}: every sample must come once, as one row along "
                f"dimension 0{self._and_views()}, from the batch the loader gave last (do not fetch batches ahead)"
            )

    def _and_views(self) -> str:
        return (
            "" if self._views == 1 else f" for each of its {self._views} views (rows are counted in samples)"
        )

    def _name_of(self, parameter: nn.Parameter) -> str:
        for layer in self._layers:
            for name, p in layer.module.named_parameters():
                if p is parameter:
                    return f"{layer.name}.{name}" if layer.name else name
        return f"of shape {tuple(parameter.shape)}"

    def combine(self) -> None:
        """Put the whole logical batch's sums into the place of this process's own; once, before their release.

        Every process calls it at the same point. Raises RuntimeError if one of them was lost.
        """
        if self._processes.size == 1:
            return
        # Sharded ones were added up as they were made.
        params = [p for p in self._parameters() if self._sharded is None]
        for p in params:
            if p.grad is None:
                _set_grad(p, torch.zeros_like(p, dtype=wide_dtype(p.dtype)))
        self._processes.add_up([*(p.grad for p in params), self.statistics.sums])

    # --- the end of a backward ---------------------------------------------------------------------

    def finish(self) -> None:
        """Turn what the backward recorded into factors and add the weighted gradients to `p.grad`."""
        used = [layer for layer in self._layers if layer.slot.uses]
        if self._sharded is not None:
            reshard(self._sharded)
        try:
            if not used:
                raise RuntimeError(
                    "a backward inside the backward took its records away: use activation checkpointing with "
                    "use_reentrant=False"
                )
            # First of all: an ordinary gradient in p.grad must not be wiped away unseen.
            self.check_intact()
            rows = self._check_uses(used)
            self._check_batch(rows)
            self._accumulate(used, rows)
        except BaseException as error:
            self.broken = self.broken or f"{type(error).__name__}: {error}"
            raise

    def _check_uses(self, used: list[Layer]) -> int:
        """The number of samples of this backward, each with all of its views."""
        # Calls outside the whole model's forward have a number of their own, each; for them, and behind this check,
        # the rows are counted.
        numbers = _numbers_of(used)
        if sum(n > 0 for n in numbers) > 1:
            raise RuntimeError(
                "one backward covers two forward passes of the model, so a row no longer is one sample: call "
                "backward() for each, or put both passes inside one module's forward"
            )
        if any(n in self._seen or self._spent[0] <= n <= self._spent[1] for n in numbers):
            raise RuntimeError(
                "two backward passes over one forward pass would clip every sample twice: add the losses and "
                "call backward() once (and use activation checkpointing with use_reentrant=False)"
            )
        sizes = {layer.rows(use): layer.name for layer in used for use in layer.slot.uses}
        if len(sizes) > 1:
            raise RuntimeError(
                "every layer must see the samples along dimension 0, but they see different numbers of rows: "
                + ", ".join(f"{n} in {name or 'the model'}" for n, name in sorted(sizes.items()))
            )
        samples, rest = divmod(next(iter(sizes)), self._views)
        if rest:
            raise RuntimeError(
                f"backward() has seen {next(iter(sizes))} rows, which must be {self._views} views of every sample"
            )
        return samples

    def _check_batch(self, rows: int) -> None:
        info = self._batch()
        if info is None:
            return
        if self._step != info.step:
            if self._made and self._complete:
                raise RuntimeError(
                    "gradients of two logical batches would be added up: call optimizer.step() after every batch of "
                    "the loader (it acts on the last part of a logical batch only). To accumulate gradients, give the "
                    "DataLoader a batch_size that many times larger, and make_private max_batch_size, the old one"
                )
            self.reset()
            self._step = info.step
        if self._physical is not info:
            self.check_rows()
            self._physical, self._rows_done = info, 0
        if self._rows_done + rows > info.padded_rows:
            raise RuntimeError(
                f"the private loader handed out {info.padded_rows} rows, but backward() has seen "
                f"{self._rows_done + rows}: every sample may enter a step once, along dimension 0"
            )
        self._complete = info.last

    def _accumulate(self, used: list[Layer], rows: int) -> None:
        info = self._physical
        real: int | Tensor = rows if info is None else max(0, min(rows, info.rows - self._rows_done))
        if self._fixed is not None:
            real = self._fixed.real
        self._rows_done += rows
        self._seen |= _numbers_of(used)
        if self._fixed is not None and self._thresholds is None:
            raise RuntimeError(
                "a captured backward needs thresholds that were set outside of it: call open() first"
            )
        self.begin()
        if self._sharded is not None:
            # Weights are fetched and gradients added up as they are made: all processes make the same ones, in one order.
            uses = [(layer.name, len(layer.slot.uses)) for layer in used]
            numbers = {
                "the layers used": zlib.crc32(repr(uses).encode()),
                "whether there are rows": int(rows > 0),
                "the trained parameters and their groups": self.agreed(),
            }
            self._processes.agree("backward()", None, numbers)
        if rows == 0:
            self.sample_norms = self.statistics.sums.new_zeros(0)
            return
        parts = self._parts(used)
        if not parts:
            return
        device = parts[0][1].sqnorms.device
        sqnorms = torch.zeros(len(self.clipping.thresholds), rows, dtype=torch.float64, device=device)
        for k, part in parts:
            sqnorms[k] += part.sqnorms
        # A mean loss hands out g/(B V) for each of a sample's V views, and the mean over views is wanted.
        unit = float(rows) if self._mean else 1.0 / self._views
        thresholds = self.clipping.thresholds
        outputs = self.statistics.outputs()
        weights = None
        if self.groups is not None:
            outputs["labels"] = labels = self._labels_of(rows).to(device, non_blocking=True)
            weights = self.groups.weights(labels, real)
        factors, norms, shares = ops.clip_factors(
            sqnorms,
            thresholds,
            self.clipping.rule,
            unit=unit,
            denominator=self._denominator,
            real=real,
            weights=weights,
            backend=self._backend,
        )
        if outputs:
            ops.sample_statistics(
                sqnorms, thresholds, unit=unit, real=real, shares=shares, backend=self._backend, **outputs
            )
        if isinstance(real, Tensor):
            self.sample_norms = norms
            samples = torch.arange(rows, device=real.device) < real
            self.non_finite += (samples & ~norms.isfinite()).sum()
        else:
            self.sample_norms = norms[:real]
            self.non_finite += (~self.sample_norms.isfinite()).sum()
        if self._sharded is None:
            # The largest tensors are released first: the weight gradients take their place.
            parts.sort(key=lambda kp: kp[1].held)
        else:
            parts.reverse()
        while parts:
            k, part = parts.pop()
            for p, grad in part.weigh(factors[k]):
                self._add(p, grad)

    def _labels_of(self, rows: int) -> Tensor:
        """int64 [rows]: the labels of the rows of this backward, the last ones of those seen so far."""
        if self._fixed is not None and self._fixed.labels is not None:
            return self._fixed.labels
        labels = self._labels()
        if labels is None or self._physical is None:
            raise RuntimeError(
                "label groups need a batch of the private loader, which hands out the labels: iterate over the "
                "loader that make_private returned"
            )
        return labels[self._rows_done - rows : self._rows_done]

    def _parts(self, used: list[Layer]) -> list[tuple[int, Part]]:
        """(clipping group, part) of everything that this backward recorded, which is forgotten."""
        wanted = set(self._parameters())
        parts: list[tuple[int, Part]] = []
        loose: dict[nn.Parameter, Tensor] = {}
        # Counted now, not at the start: parameters can be tied at any time.
        owners = Counter(p for layer in used for p in layer.trainable())
        for layer in used:
            mine = wanted.intersection(layer.trainable())
            # In the layer's order, the same in every process: a set's is not.
            groups: dict[int, set[nn.Parameter]] = {}
            for p in layer.trainable():
                if p in mine:
                    groups.setdefault(self.group_of(p), set()).add(p)
            # One after the other: the same uses with views as positions take memory of their own.
            uses = [layer.fold(use, self._views) for use in layer.slot.uses]
            layer.slot.uses.clear()
            whole = layer.merge(uses)
            if whole is not None and all(owners[p] == 1 for p in mine):
                parts += [(k, layer.measure(whole, own)) for k, own in groups.items()]
            elif mine:
                # Used twice, or shared: the sample's gradient is the sum over uses, and the norm of a
                # sum needs the summands themselves.
                for use in uses:
                    for p, grads in layer.sample_grads(use, mine).items():
                        loose[p] = loose[p] + grads if p in loose else grads
            del uses, whole
        for p, grads in loose.items():
            parts.append((self.group_of(p), part_from_samples({p: grads}, self._backend)))
        return parts

    def _add(self, p: nn.Parameter, grad: Tensor) -> None:
        if self._sharded is not None:
            grad = shared_out(p, grad)
        if p.grad is None:
            _set_grad(p, grad.detach())
        else:
            p.grad.add_(grad)
        self._made[p] = p.grad, p.grad._version


def _set_grad(p: nn.Parameter, grad: Tensor) -> None:
    if p.grad_dtype != grad.dtype:
        # 16-bit parameters: their sum is kept in float32, and rounded when noise is in it.
        p.grad_dtype = grad.dtype
    p.grad = grad


def _numbers_of(used: list[Layer]) -> set[int]:
    return {use.forward for layer in used for use in layer.slot.uses}
