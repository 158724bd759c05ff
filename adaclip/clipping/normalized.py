"""Normalized clipping: every gradient is scaled to about the same length, so there is no threshold to tune."""

from __future__ import annotations

from typing import Any

import torch

from adaclip.clipping.base import Clipping, Rule, Setting, check_norm

__all__ = ["AutomaticClipping", "PSACClipping"]


class _Normalized(Clipping):
    """One fixed C and a rule in which n times the factor never reaches it."""

    def __init__(self, max_grad_norm: float):
        self._initial = check_norm(max_grad_norm)
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64)

    def bind(self, setting: Setting) -> int:
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64, device=setting.device)
        return 1


class AutomaticClipping(_Normalized):
    """AUTO-S: g_b -> C g_b / (|g_b| + s) (Bu et al. 2023, arXiv 2206.07136).

    Releases the noisy sum only, at the whole noise multiplier: an example adds C n/(n + s) < C, whatever its
    gradient, and no more if the norm n that is used is an upper bound. Noise std sigma C. C does no more than
    scale the learning rate (of SGD; adaptive optimizers undo even that).

    Args:
        max_grad_norm: C.
        stability: s > 0, below which a gradient keeps some of its size instead of being blown up to C.

    Raises:
        ValueError: an argument is not a positive finite number.
    """

    name = "automatic"

    def __init__(self, max_grad_norm: float = 1.0, stability: float = 0.01):
        super().__init__(max_grad_norm)
        self.rule = Rule("normalized", check_norm(stability, "stability"))

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "max_grad_norm": self._initial, "stability": self.rule.stability}


class PSACClipping(_Normalized):
    """DP-PSAC: g_b -> C g_b / (|g_b| + r/(|g_b| + r)) (Xia et al. 2023, arXiv 2212.00328).

    A weight that does not favor small gradients as much as AUTO-S's: it tends to C, not to C/s, for |g| -> 0.

    Releases the noisy sum only, at the whole noise multiplier. An example adds w(n) |g| <= n w(n) =
    C n/(n + r/(n + r)) < C for every upper bound n on its norm (w itself is not monotone and need not be).
    Noise std sigma C.

    Args:
        max_grad_norm: C.
        r: positive.

    Raises:
        ValueError: an argument is not a positive finite number.
    """

    name = "psac"

    def __init__(self, max_grad_norm: float = 1.0, r: float = 0.1):
        super().__init__(max_grad_norm)
        self.rule = Rule("psac", check_norm(r, "r"))

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "max_grad_norm": self._initial, "r": self.rule.stability}
