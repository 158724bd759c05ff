"""The point that gradients are taken at: the parameters, moved by smoothing and by the optimizer's look-ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaclip.noise import STREAM_SMOOTHING, NoiseSource, chunks
from adaclip.smoothing.loss import NoiseSignal, SmoothedLoss

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

    Raises:
        ValueError: the smoothing's condition needs a momentum that the optimizer does not have.
        TypeError: smoothing is no SmoothedLoss.

    Memory: theta' and z, two copies of the parameters, made when first needed; where tau is 0 and there is no
    look-ahead, `enter` does nothing.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        smoothing: SmoothedLoss | None = None,
        source: NoiseSource | None = None,
    ):
        if smoothing is not None and not isinstance(smoothing, SmoothedLoss):
            raise TypeError(f"smoothing must be a SmoothedLoss or None, got {type(smoothing).__name__}")
        self._optimizer = optimizer
        self._smoothing = smoothing
        self._source = NoiseSource() if source is None else source
        self._signal = None if smoothing is None else NoiseSignal(smoothing, optimizer)
        self._looks: Callable | None = getattr(optimizer, "lookahead", None)
        self._scales: dict[Tensor, float] = {}
        if smoothing is not None:
            self._measure_scales()
        self._perturbation: dict[Tensor, Tensor] = {}
        self._draw: int | None = None
        # What theta' was made for: (step, versions of the parameters). None: it has to be made.
        self._made: tuple[int, dict[Tensor, int]] | None = None
        self._moved: dict[Tensor, Tensor] = {}
        self._home: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []

    @classmethod
    def needed(
        cls, optimizer: torch.optim.Optimizer, smoothing: SmoothedLoss | None, source: NoiseSource
    ) -> EvaluationPoint | None:
        """The point that training needs, or None where gradients are taken at the parameters themselves."""
        if smoothing is None and not hasattr(optimizer, "lookahead"):
            return None
        return cls(optimizer, smoothing, source)

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
        for p, home in self._home.items():
            p.data = home
        self._home = {}
        versions = self._versions()
        written = [p for p, version in self._made[1].items() if versions.get(p, version) != version]
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
        self._made, self._moved, self._perturbation, self._draw = None, {}, {}, None

    # --- making theta' -----------------------------------------------------------------------------

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _versions(self) -> dict[Tensor, int]:
        return {p: p._version for p in self._params()}

    def _measure_scales(self) -> None:
        for p in self._params():
            if p not in self._scales:
                norm = torch.linalg.vector_norm(p.detach(), dtype=torch.float64)
                self._scales[p] = float(norm) / max(1, p.numel()) ** 0.5

    def _make(self, step: int) -> None:
        groups = [(group, p) for group in self._optimizer.param_groups for p in group["params"]]
        ahead = {p: self._looks(group, p) for group, p in groups if p.requires_grad} if self._looks else {}
        smooth = self.tau > 0
        self._made = step, self._versions()
        if not smooth and not any(ahead.values()):
            self._moved = {}
            return
        sign = 1.0
        if smooth:
            self._measure_scales()
            draw, place = divmod(step, self._smoothing.refresh)
            sign = -1.0 if place % 2 else 1.0
            if self._draw != draw or self._perturbation.keys() != self._made[1].keys():
                self._perturb(draw)
        moved: dict[Tensor, Tensor] = {}
        for p in self._made[1]:
            out = self._moved.get(p)
            if out is None or out.stride() != p.stride() or out.dtype != p.dtype:
                out = torch.empty_like(p)
            if smooth:
                torch.add(p.detach(), self._perturbation[p], alpha=sign, out=out)
            else:
                out.copy_(p)
            if ahead.get(p) is not None:
                direction, length = ahead[p]
                out.add_(direction, alpha=length)
            moved[p] = out
        self._moved = moved

    def _perturb(self, draw: int) -> None:
        """tau scale z of every parameter, for the steps that share a draw."""
        first = 0
        made: dict[Tensor, Tensor] = {}
        for p in self._made[1]:
            z = self._perturbation.get(p)
            if z is None or z.shape != p.shape or z.dtype != p.dtype or z.device != p.device:
                z = torch.empty_like(p)
            std = self._smoothing.tau * self._scales[p]
            made[p] = self._source.normal_(z, draw, STREAM_SMOOTHING, std, first)
            first += chunks(p.numel())
        self._perturbation, self._draw = made, draw

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
        count = len(self._params())
        if len(state["scales"]) != count:
            raise ValueError(f"the smoothing's state is of {len(state['scales'])} parameters, got {count}")
        if (state["signal"] is None) != (self._signal is None):
            raise ValueError("the smoothing's state is of a run with another smoothing")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s. Leaves theta'."""
        self.check_state(state)
        self.leave()
        params = self._params()
        self._scales = {p: s for p, s in zip(params, state["scales"], strict=True) if s is not None}
        if self._signal is not None:
            self._signal.load_state_dict(params, state["signal"])
        self._made, self._draw = None, None
