"""Three laws by which Opacus moves a number of the optimizer from epoch to epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from adaclip.opacus.optimizers.optimizer import DPOptimizer


class Scheduler(ABC):
    """Sets `optimizer.<attribute>` at every `step()`. Every release books the noise multiplier that it used.

    Args:
        optimizer: the one that make_private returned.
        last_epoch: how many steps there were, less 1.
    """

    attribute: ClassVar[str]

    def __init__(self, optimizer: DPOptimizer, *, last_epoch: int = -1):
        if not isinstance(optimizer, DPOptimizer):
            raise TypeError(
                f"optimizer must be the one that make_private returned, got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.step()

    @abstractmethod
    def _value(self, now: float) -> float:
        """The value of `last_epoch`, from the one before."""

    def step(self) -> None:
        """Go on by one epoch."""
        now = getattr(self.optimizer, self.attribute)
        self.last_epoch += 1
        value = self._value(now)
        if value != now:
            setattr(self.optimizer, self.attribute, value)

    def state_dict(self) -> dict[str, Any]:
        """Its numbers; neither the optimizer nor a function."""
        return {k: v for k, v in vars(self).items() if k != "optimizer" and not callable(v)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class Exponential(Scheduler):
    """Times `gamma` every epoch."""

    def __init__(self, optimizer: DPOptimizer, *, gamma: float, last_epoch: int = -1):
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def _value(self, now: float) -> float:
        return now if self.last_epoch == 0 else now * self.gamma


class Step(Scheduler):
    """Times `gamma` every `step_size` epochs."""

    def __init__(self, optimizer: DPOptimizer, *, step_size: int, gamma: float, last_epoch: int = -1):
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def _value(self, now: float) -> float:
        return now if self.last_epoch == 0 or self.last_epoch % self.step_size else now * self.gamma


class Lambda(Scheduler):
    """The first value times a function of the epoch."""

    def __init__(self, optimizer: DPOptimizer, function: Callable[[int], float], last_epoch: int):
        self._function = function
        self.base = getattr(optimizer, self.attribute, None)
        super().__init__(optimizer, last_epoch=last_epoch)

    def _value(self, now: float) -> float:
        return self.base * self._function(self.last_epoch)
