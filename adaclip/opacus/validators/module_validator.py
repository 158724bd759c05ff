"""`opacus.validators.ModuleValidator`: `adaclip.validate` and `adaclip.fix` by Opacus's names."""

from __future__ import annotations

from torch import nn

from adaclip.errors import UnsupportedModuleError
from adaclip.validation import fix, validate

__all__ = ["ModuleValidator"]


class ModuleValidator:
    """Finds what keeps a model from being trained privately, and repairs the usual."""

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
        """One error for each problem; raised, all in one, if `strict`."""
        problems = validate(module)
        if strict and problems:
            raise UnsupportedModuleError("; ".join(problems))
        return [UnsupportedModuleError(problem) for problem in problems]

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        return not validate(module)

    @classmethod
    def fix(cls, module: nn.Module) -> nn.Module:
        """A repaired copy."""
        return fix(module)

    @classmethod
    def fix_and_validate(cls, module: nn.Module) -> nn.Module:
        """A repaired copy; UnsupportedModuleError for what is left."""
        fixed = fix(module)
        cls.validate(fixed, strict=True)
        return fixed
