"""The point that gradients are taken at: the parameters, moved by smoothing and by the optimizer's look-ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaclip.backends import load, resolve_backend
from adaclip.layout import is_flat
from adaclip.noise import STREAM_SMOOTHING, NoiseSource, check_chunks, checked_std, chunks
from adaclip.smoothing.loss import NoiseSignal, SmoothedLoss
from adaclip.smoothing.saved import check_smoothing
from adaclip.step_rule import Move

__all__ = ["EvaluationPoint"]


class _Hook:
    """A hook of a module; in a copied or pickled module it does nothing."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def __call__(self, *_: Any) -> None:
        self._call()

    def __reduce__(self) -> tuple:
        return _Hook, (_nothing,)


def _nothing() -> None:
    pass


def _like(p: Tensor, buffer: Tensor | None) -> Tensor:
    """The buffer, if it fits p still, or a new one."""
    kind = p.dtype, p.device, p.shape, p.stride()
    if buffer is not None and (buffer.dtype, buffer.device, buffer.shape, buffer.stride()) == kind:
        return buffer
    return torch.empty_like(p)


def _alike(move: Move) -> bool:
    """Whether one pass over memory can make it, with the same place for an element in all tensors."""
    there = [t for t in move[:4] if t is not None]
    return all(
        t.device == move.param.device
        and is_flat(t)
        and t.shape == move.param.shape
        and t.stride() == move.param.stride()
        for t in there
    )


def _make(move: Move, source: NoiseSource, draw: int, fresh: bool, sign: float, backend: str) -> None:
    """One move in torch's operations."""
    param, out, shift, direction, first, std, length = move
    out.copy_(param)
    if shift is not None:
        if fresh:
            source.normal_(shift, draw, STREAM_SMOOTHING, std, first, backend=backend)
        out.add_(shift, alpha=sign)
    if direction is not None:
        out.add_(direction, alpha=length)


class EvaluationPoint:
    """Puts a model at theta' = theta + tau_t scale z + lookahead while it computes gradients, and back.

        point = EvaluationPoint(optimizer, SmoothedLoss(tau=0.01, signal="always"))
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            point.enter(step)
            criterion(model(x), y).backward()
            point.leave()
            optimizer.step()
            point.observe(noise_stds)

    A private engine does all of this. The parameters stay the same objects: only the memory behind them is
    swapped, so `leave` gives theta back bit for bit, gradients made at theta' stay, and nothing is rounded.

    z is a function of (key, step) alone: the same for every physical batch of a logical one, whatever is in them.
    (A z for each physical batch would let one example's gradient depend on how many stand before it.) It needs no
    secrecy, only independence of the data. `SmoothedLoss` says what is perturbed, when, and why it costs no
    privacy; look-ahead is that of an optimizer with a method `lookahead` (`DiSK`).

    Args:
        optimizer: the torch optimizer whose parameters (those that require gradients) are moved.
        smoothing: None: look-ahead alone.
        source: the key of z; None: one of its own.
        backend: what makes z and moves the parameters (`adaclip.backends`).

    Raises:
        ValueError: the smoothing's condition needs a momentum that the optimizer does not have.
        TypeError: smoothing is no SmoothedLoss.

    Memory: theta' and z, two copies of the parameters, made when first needed; where tau is 0 and there is no
    look-ahead, `enter` does nothing (and what is there is kept).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        smoothing: SmoothedLoss | None = None,
        source: NoiseSource | None = None,
        backend: str = "auto",
    ):
        if smoothing is not None and not isinstance(smoothing, SmoothedLoss):
            raise TypeError(f"smoothing must be a SmoothedLoss or None, got {type(smoothing).__name__}")
        self._optimizer = optimizer
        self._smoothing = smoothing
        self._source = NoiseSource() if source is None else source
        self._signal = None if smoothing is None else NoiseSignal(smoothing, optimizer)
        self._backend = backend
        # What the backend keeps about the parameters from step to step.
        self._cache: dict[str, Any] = {}
        self._looks: Callable | None = getattr(optimizer, "lookahead", None)
        self._scales: dict[Tensor, float] = {}
        if smoothing is not None:
            self._measure_scales()
        # tau scale z of every parameter, and the number of its draw.
        self._shifts: dict[Tensor, Tensor] = {}
        self._drawn: int | None = None
        # What theta' was made for: (step, versions of the parameters). None: it has to be made.
        self._made: tuple[int, dict[Tensor, tuple[int, int]]] | None = None
        self._moved: dict[Tensor, Tensor] = {}
        # The memory of theta', which stays the same: a captured graph reads it there.
        self._memory: dict[Tensor, Tensor] = {}
        self._home: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []

    @classmethod
    def needed(
        cls,
        optimizer: torch.optim.Optimizer,
        smoothing: SmoothedLoss | None,
        source: NoiseSource,
        backend: str = "auto",
    ) -> EvaluationPoint | None:
        """The point that training needs, or None where gradients are taken at the parameters themselves."""
        if smoothing is None and not hasattr(optimizer, "lookahead"):
            return None
        return cls(optimizer, smoothing, source, backend)

    # --- there and back ----------------------------------------------------------------------------

    @property
    def inside(self) -> bool:
        """Whether the parameters are at theta' now."""
        return bool(self._home)

    @property
    def tau(self) -> float:
        """tau_t of the step in hand, or of the next one."""
        return 0.0 if self._signal is None else self._signal.tau

    @property
    def signal_to_noise(self) -> float | None:
        """The momentum's averaged signal-to-noise ratio, a function of released values; None before the first look."""
        return None if self._signal is None else self._signal.ratio

    @torch.no_grad()
    def enter(self, step: int) -> None:
        """Move the parameters to theta' of that step (the release it is for); nothing if they are there already.

        Call it before the forward of every physical batch. What was entered for another step is left first.
        """
        if self.inside:
            if self._made[0] == step:
                return
            self.leave()
        if self._made is None or self._made[0] != step or self._made[1] != self._versions():
            self._make(step)
        if self._moved:
            for p, moved in self._moved.items():
                self._home[p] = p.data
                p.data = moved

    @torch.no_grad()
    def leave(self) -> None:
        """Move the parameters back to theta; nothing if they are there.

        Raises:
            RuntimeError: a parameter was written to at theta', which would be lost. theta is back all the same.
        """
        if not self.inside:
            return
        exchanged = {p for p, moved in self._moved.items() if p.data_ptr() != moved.data_ptr()}
        for p, home in self._home.items():
            p.data = home
        self._home = {}
        versions = self._versions()
        made = self._made[1].items()
        written = [p for p, version in made if versions.get(p, version) != version or p in exchanged]
        if written:
            self._made = None
            raise RuntimeError(
                f"{len(written)} parameters were changed while they were at the evaluation point of smoothing or "
                "look-ahead, and the change is lost: change them after optimizer.step(), before the next batch"
            )

    @contextmanager
    def away(self) -> Iterator[None]:
        """theta for the time of a with block (evaluation, checkpoints), and then where the parameters were."""
        step = self._made[0] if self.inside else None
        self.leave()
        try:
            yield
        finally:
            if step is not None:
                self.enter(step)

    def observe(self, stds: Iterable[float] | Tensor) -> None:
        """Tell of an update just made, whose gradients held noise of `stds`, one for each parameter that is moved.

        The condition on tau looks at it. Everything it sees is released or public.
        """
        if self._signal is not None:
            self._signal.observe(self._params(), stds)

    def attach(self, module: nn.Module) -> None:
        """Let `module.state_dict()` and `load_state_dict()` see theta wherever the parameters are.

        Loading leaves theta', so a batch in hand must be fetched anew.
        """
        came_from: list[int] = []

        def leave() -> None:
            came_from[:] = [self._made[0]] if self.inside else []
            self.leave()

        def back() -> None:
            if came_from:
                self.enter(came_from.pop())

        self._hooks = [
            module.register_state_dict_pre_hook(_Hook(leave)),
            module.register_state_dict_post_hook(_Hook(back)),
            module.register_load_state_dict_pre_hook(_Hook(self.leave)),
        ]

    def detach(self) -> None:
        """Move the parameters back for good and forget the hooks and the memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.leave()
        self._made, self._moved, self._memory, self._shifts, self._drawn = None, {}, {}, {}, None

    # --- making theta' -----------------------------------------------------------------------------

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _versions(self) -> dict[Tensor, tuple[int, int]]:
        """What changes when a parameter is written to, or its memory is exchanged."""
        return {p: (p._version, p.data_ptr()) for p in self._params()}

    def _measure_scales(self) -> None:
        for p in self._params():
            if p not in self._scales:
                norm = torch.linalg.vector_norm(p.detach(), dtype=torch.float64)
                self._scales[p] = float(norm) / max(1, p.numel()) ** 0.5

    def _make(self, step: int) -> None:
        groups = [(group, p) for group in self._optimizer.param_groups for p in group["params"]]
        ahead = {p: self._looks(group, p) for group, p in groups if p.requires_grad} if self._looks else {}
        smooth = self.tau > 0
        params = self._params()
        if not smooth and not any(ahead.values()):
            self._moved, self._made = {}, (step, self._versions())
            return
        old_shifts, draw, sign = self._shifts, 0, 1.0
        self._moved = self._memory = {p: _like(p, self._memory.get(p)) for p in params}
        if smooth:
            self._measure_scales()
            self._shifts = {p: _like(p, old_shifts.get(p)) for p in params}
            draw, place = divmod(step, self._smoothing.refresh)
            sign = -1.0 if place % 2 else 1.0
        # What was drawn for an earlier step serves this one too, if it is the same draw for the same tensors.
        same = len(old_shifts) == len(params) and all(old_shifts.get(p) is self._shifts[p] for p in params)
        fresh = smooth and not (same and self._drawn == draw)
        first, moves = 0, []
        for p in params:
            shift, std = (self._shifts[p], self._smoothing.tau * self._scales[p]) if smooth else (None, 0.0)
            direction, length = ahead.get(p) or (None, 0.0)
            moves.append(Move(p, self._moved[p], shift, direction, first, checked_std(std), length))
            first += chunks(p.numel())
        check_chunks(0, first)
        self._carry_out(moves, draw, fresh, sign)
        if smooth:
            self._drawn = draw
        self._made = step, self._versions()

    def _carry_out(self, moves: list[Move], draw: int, fresh: bool, sign: float) -> None:
        tensors = [t for move in moves for t in move[:4] if t is not None]
        # Parameters of other dtypes get their noise from the backend, and the rest from torch.
        singles = {(t.device, t.dtype == torch.float32) for t in tensors}
        fits = len(singles) == 1 and singles.pop()[1] and all(_alike(move) for move in moves)
        backend = resolve_backend("perturb", self._backend, *tensors) if fits else "reference"
        if backend == "reference":
            for move in moves:
                _make(move, self._source, draw, fresh, sign, self._backend)
        else:
            run = load(backend).perturb
            run(self._source.key, draw, STREAM_SMOOTHING, moves, fresh, sign, self._cache)

    # --- checkpoints -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any] | None:
        """The smoothing's settings as plain values: a run goes on with the same ones."""
        return None if self._smoothing is None else self._smoothing.config()

    def state_dict(self) -> dict[str, Any]:
        """Scales and the condition's state. z is made anew from the key."""
        params = self._params()
        return {
            "scales": [self._scales.get(p) for p in params],
            "signal": None if self._signal is None else self._signal.state_dict(params),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, with nothing changed, unless `load_state_dict` can take `state`."""
        params = self._params()
        check_smoothing(state, len(params), None if self._signal is None else self._signal.state_dict(params))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s. Leaves theta'."""
        self.check_state(state)
        self.leave()
        params = self._params()
        self._scales = {p: s for p, s in zip(params, state["scales"], strict=True) if s is not None}
        if self._signal is not None:
            self._signal.load_state_dict(params, state["signal"])
        self._made, self._drawn = None, None
