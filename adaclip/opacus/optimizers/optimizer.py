"""`opacus.optimizers.DPOptimizer`: the engine's optimizer with what else Opacus's answers to."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from adaclip.clipping import check_norm
from adaclip.opacus._replacements import raise_attribute_error
from adaclip.optimizer import DPOptimizer as Base

__all__ = ["DPOptimizer"]


class DPOptimizer(Base):
    """`adaclip.DPOptimizer`, of which `max_grad_norm` can be set. What Opacus's has beyond says what replaces it."""

    @property
    def params(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return self.trained()

    @property
    def accumulated_iterations(self) -> int:
        """1: the physical batches of a logical one are parts of it, not iterations."""
        return 1

    @property
    def secure_mode(self) -> bool:
        """True: noise always comes from ChaCha20 with a key of the operating system."""
        return True

    @property
    def max_grad_norm(self) -> float:
        """The norm that a sample's whole gradient is clipped to. Setting it scales every layer's, and the noise.

        Raises, when set:
            ValueError: not a positive finite number, or the strategy moves the norm itself. RuntimeError: a sum
            clipped to the old norm is unfinished: set it after step() and before the next backward().
        """
        return super().max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        value = check_norm(value)
        if self.clipping.side is not None:
            raise ValueError(
                f"max_grad_norm must be left to the {self.clipping.name!r} clipping, which moves it, got {value}"
            )
        if self._sum.begun:
            raise RuntimeError(
                f"max_grad_norm must be set after step() and before the next backward(), got {value} in between: "
                "the noise would no longer cover what was clipped to the old norm"
            )
        thresholds = self.clipping.thresholds
        if thresholds.numel() == 1:
            thresholds.fill_(value)
        else:
            thresholds.mul_(value / super().max_grad_norm)

    def __getattr__(self, name: str) -> NoReturn:
        raise_attribute_error(self, "optimizers.DPOptimizer", name)
