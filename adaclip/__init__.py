"""adaclip: differentially private training of convolutional networks at the cost of ordinary training.

    from adaclip import PrivacyEngine

Everything is loaded on first use: `import adaclip.accounting` needs neither torch nor the C++ core.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "PrivacyEngine": "adaclip.engine",
    "DPOptimizer": "adaclip.optimizer",
    "GraphedStep": "adaclip.graphed",
    "PoissonLoader": "adaclip.sampler",
    "PrivacyBudgetExceeded": "adaclip.errors",
    "UnsupportedModuleError": "adaclip.errors",
    "validate": "adaclip.validation",
    "fix": "adaclip.validation",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
