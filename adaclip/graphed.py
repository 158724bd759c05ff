"""The whole private step as one CUDA graph: forward, backward, clipped sum, noise and update in one replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaclip.batches import BatchInfo, check_count
from adaclip.clipped_sum import FixedBatch
from adaclip.noise import STREAM_GRADIENT, NoiseSource, rounded_up
from adaclip.ops import autocast_dtype
from adaclip.optimizer import DPOptimizer
from adaclip.update import Update, begin_update, fusable, rehearse

__all__ = ["CudaGraphs", "GraphedStep"]

# Captures that are kept: with and without smoothing, say, or of two precisions.
_MOST_GRAPHS = 4


class CudaGraphs:
    """Captures functions without arguments as CUDA graphs of one device, which share their memory."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"a graphed step needs its model on a CUDA GPU, got {device}")
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Of this device: torch's own stream for captures is of the device that was current when it was made, and what
        # runs on another device is carried out there instead of captured.
        self._aside, self._capturing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run it on a stream of its own, as capturing does: libraries and kernels are loaded then."""
        here = torch.cuda.current_stream(self._device)
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            run()
        here.wait_stream(self._aside)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture what `run` enqueues, without doing it; returns what does it, every time it is called."""
        graph = torch.cuda.CUDAGraph()
        # In torch's usual mode a thread that pins a loader's batches meanwhile would break the capture, and itself.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"
            ),
        ):
            run()
        return graph.replay


@dataclass
class _Captured:
    """A recorded step, and where it leaves its results.

    table: where it reads the update's numbers; averages: the address of those it moves. It is of no use without them.
    """

    replay: Callable[[], None] | None = None
    loss: Tensor | None = None
    norms: Tensor | None = None
    grads: dict[Tensor, Tensor | None] = field(default_factory=dict)
    table: object = None
    averages: int = 0


class GraphedStep:
    """A private step that a GPU replays without waiting for Python: `step(x, y)` in place of the loop's body.

        step = GraphedStep(model, optimizer, criterion)
        for x, y in loader:
            loss = step(x, y)

    is, number for number,

        for x, y in loader:
            optimizer.zero_grad(); loss = criterion(model(x), y); loss.backward(); optimizer.step()

    A call that gets a whole logical batch in the shape of the first one replays a CUDA graph. Other calls (a logical
    batch that comes in several physical ones, another shape) take the steps above one by one; so give the loader
    `pad_to="auto"`, which makes nearly all batches alike. The first call captures, and a later one does so again
    where parameters were exchanged or frozen, or modules put into another mode, or under another autocast.

    What is random in the model draws new numbers at every replay. What is Python in it runs during capture only, and
    `warmup` times before.

    Privacy: each call books its release before anything of it is enqueued. Rehearsals, before the first capture, go
    through all of a step's kernels with zero samples and without noise of the run's own key: they release nothing
    and leave parameters, optimizer, thresholds and counters as they were. What changes from step to step (the
    release's number, how many rows are samples, learning rates, thresholds) is moved to the device before a replay,
    without waiting for it.

    Args:
        module, optimizer, criterion: of the loop. optimizer is `make_private`'s, with a fused update
          (`adaclip.update`), and everything is on one CUDA GPU.
        compile: whether the module goes through `torch.compile`.
        warmup: rehearsals before a capture, at least 1.

    `step(x, y)` takes tensors, rows first, anywhere, and returns the loss: 0-dimensional, on the device, detached. It is
    private, as losses are. Under `torch.autocast` it runs in its precision.

    Raises:
        ValueError: the model is not on a CUDA GPU, or a side release cannot be captured (`SplitRelease`).
        PrivacyBudgetExceeded: from a call; nothing has changed then.
        RuntimeError: from a call: whatever `DPOptimizer.step` refuses, or, with nothing booked, an optimizer without a
          fused update or a layer that reads the device (embeddings, and what only the generic fallback trains).
    """

    # What captures and replays.
    recorder: Callable[[torch.device], Any] = CudaGraphs

    def __init__(
        self,
        module: nn.Module,
        optimizer: DPOptimizer,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        compile: bool = False,
        warmup: int = 3,
    ):
        if not isinstance(optimizer, DPOptimizer):
            raise TypeError(f"optimizer must be make_private's, got {type(optimizer).__name__}")
        check_count("warmup", warmup)
        if optimizer.processes.size > 1:
            raise ValueError(
                f"a graphed step is one process's, got an optimizer of {optimizer.processes.size}: use the ordinary loop"
            )
        self._module, self._optimizer, self._criterion = module, optimizer, criterion
        self._forward = torch.compile(module) if compile else module
        self._warmup = warmup
        self._sum, self._point = optimizer._sum, optimizer.smoothing
        unsplit = self._sum.statistics.unsplit
        if unsplit:
            raise ValueError(
                f"a graphed step needs side releases that are SplitRelease, got {', '.join(unsplit)}"
            )
        self._device = self._sum.non_finite.device
        self._recorder = type(self).recorder(self._device)
        self._captured: dict[Any, _Captured] = {}
        # Static memory: what a replay reads.
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._labels: Tensor | None = None
        self._stds: Tensor | None = None
        self._real, self._counter = torch.zeros(2, 1, dtype=torch.int64, device=self._device).unbind()
        self._number = 0
        self._update: Update | None = None
        # Where the last step was enqueued.
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        optimizer, info = self._optimizer, self._optimizer.batch
        self._follow()
        if not self._fits(info, x, y):
            return self._eager(x, y)
        self._take(x, y)
        optimizer.zero_grad()
        optimizer.check_release(info)
        params = optimizer.trained()
        if not fusable(optimizer.original_optimizer, params, optimizer.backend):
            raise RuntimeError(
                f"a graphed step needs an optimizer with a fused update, which {type(optimizer.original_optimizer)} "
                "is not, with these options, hooks and parameters (see adaclip.update): use the ordinary loop"
            )
        key = self._key(params)
        if key not in self._captured:
            self._rehearse(params, info)
        self._sum.check_intact()
        self._sum.open(info)
        if self._point is not None:
            self._point.leave()
        self._number, params, stds = optimizer.begin_release(info)
        self._sum.statistics.prepare(self._number)
        self._real.fill_(info.rows)
        self._counter.fill_(self._number)
        self._update = begin_update(
            optimizer.original_optimizer, params, self._static_stds(stds), optimizer.backend
        )
        step = self._current(key)
        step.replay()
        self._finish(step, info, stds)
        return step.loss.clone()

    # --- the host's part ---------------------------------------------------------------------------

    def _fits(self, info: BatchInfo | None, x: Tensor, y: Tensor) -> bool:
        if info is None or not (info.first and info.last) or self._sum.holds(info.step):
            return False
        if not self._module.training or x.shape[0] != info.padded_rows * info.views:
            return False
        return self._x is None or all(
            given.shape == ours.shape and given.dtype == ours.dtype
            for given, ours in ((x, self._x), (y, self._y))
        )

    def _follow(self) -> None:
        """Come after the step before, also where the caller has changed streams.

        Else its replay could find the next release's number in the place of its own, and two releases share a noise.
        """
        if self._device.type != "cuda":
            return
        here = torch.cuda.current_stream(self._device)
        if self._stream not in (None, here):
            here.wait_stream(self._stream)
        self._stream = here

    def _eager(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (t.to(self._device, non_blocking=True) for t in (x, y))
        self._optimizer.zero_grad()
        loss = self._criterion(self._forward(x), y)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _take(self, x: Tensor, y: Tensor) -> None:
        if self._x is None:
            self._x, self._y = (torch.empty_like(t, device=self._device) for t in (x, y))
        self._x.copy_(x, non_blocking=True)
        self._y.copy_(y, non_blocking=True)
        labels = self._sum.labels
        if labels is not None:
            if self._labels is None:
                self._labels = torch.empty_like(labels, device=self._device)
            self._labels.copy_(labels, non_blocking=True)

    def _key(self, params: list[nn.Parameter]) -> tuple:
        """What a capture is of: it holds while this stays the same."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return (
            autocast_dtype(self._device),
            tuple((t.data_ptr(), t.requires_grad) for t in tensors),
            tuple(m.training for m in self._module.modules()),
            tuple(map(id, params)),
        )

    def _static_stds(self, stds: Tensor) -> Tensor:
        """The noise, where a replay reads it; on the CPU the update's own numbers say it."""
        if self._device.type == "cpu":
            return stds
        stds = rounded_up(stds)
        if self._stds is None or self._stds.shape != stds.shape:
            self._stds = torch.empty_like(stds)
        return self._stds.copy_(stds)

    def _rehearse(self, params: list[nn.Parameter], info: BatchInfo) -> None:
        """Run all that will be captured, for zero samples, and leave everything as it was."""
        total, optimizer = self._sum, self._optimizer
        reading = [
            f"{layer.name or 'the model'} ({type(layer.module).__name__})"
            for layer in total._layers
            if not layer.capturable and set(params).intersection(layer.trainable())
        ]
        if reading:
            raise RuntimeError(
                "a graphed step cannot hold per-sample gradients that are made by reading the device, as those of "
                f"{', '.join(reading)} are: freeze them, or use the ordinary loop"
            )
        parts = [part for part in (total.clipping, total.groups) if part is not None]
        states = [part.state_dict() for part in parts]
        buffers = [(b, b.clone()) for b in self._module.buffers()]
        norms, nobody = total.sample_norms, NoiseSource()
        self._real.zero_()
        self._counter.zero_()
        devices = [self._device.index] if self._device.type == "cuda" else []
        number = optimizer.releases

        def once() -> None:
            total.open(info)
            self._backward(number)
            rehearse(optimizer.original_optimizer, params, nobody, self._address(number), optimizer.backend)
            total.statistics.prepare(number)
            total.statistics.release_prepared(nobody, self._address(number))
            total.reset()

        try:
            with torch.random.fork_rng(devices):
                for _ in range(self._warmup):
                    self._recorder.rehearse(once)
        finally:
            total.reset()
            total.sample_norms = norms
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        # Copied to the device now: a capture may not.
        optimizer.source.key.on(self._device)

    def _current(self, key: tuple) -> _Captured:
        """The capture for the update that was begun, with that update's numbers where it reads them."""
        averages = self._update.fused.averages
        place = 0 if averages is None else averages.data_ptr()
        step = self._captured.pop(key, None)
        table = self._update.refresh({} if step is None else step.grads)
        if step is None or step.table is not table or step.averages != place:
            step = _Captured(table=table, averages=place)
            step.replay = self._recorder.record(lambda: self._run(step))
            self._update.refresh(step.grads)
        # The last one used is the last to go.
        self._captured[key] = step
        while len(self._captured) > _MOST_GRAPHS:
            del self._captured[next(iter(self._captured))]
        return step

    def _finish(self, step: _Captured, info: BatchInfo, stds: Tensor) -> None:
        self._update.done()
        self._optimizer._opt_called = True
        torch.autograd.graph.increment_version(self._sum.clipping.thresholds)
        self._sum.reset()
        self._sum.sample_norms = step.norms[: info.rows]
        if self._point is not None:
            self._point.observe(stds)

    # --- the device's part -------------------------------------------------------------------------

    def _run(self, step: _Captured) -> None:
        """A whole step of the static batch. Its Python runs when it is captured, its kernels when it is replayed."""
        optimizer, total = self._optimizer, self._sum
        step.loss = self._backward(self._number)
        where = optimizer.source, self._address(self._number)
        self._update.apply(*where, STREAM_GRADIENT)
        total.statistics.release_prepared(*where)
        step.grads = {p: p.grad for p in self._update.params}
        step.norms = total.sample_norms
        total.reset()

    def _backward(self, number: int) -> Tensor:
        """The clipped sum of the static batch into every `p.grad`; returns the loss."""
        if self._point is not None:
            self._point.enter(number)
        labels = None if self._sum.labels is None else self._labels
        with torch.enable_grad(), self._sum.reading(FixedBatch(self._real, labels)):
            with self._autocast():
                loss = self._criterion(self._forward(self._x), self._y)
            loss.backward()
        if self._point is not None:
            self._point.leave()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager:
        """The caller's autocast without its cache: weights it had cast before would stay those of the capture."""
        dtype = autocast_dtype(self._device)
        if dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=dtype, cache_enabled=False)

    def _address(self, number: int) -> int | Tensor:
        """The release's number: on a GPU, in its memory, where a replay finds the one that is due."""
        return number if self._device.type == "cpu" else self._counter
