"""`opacus.validators.errors`: one class here, by all of Opacus's names."""

from adaclip.errors import UnsupportedModuleError

UnsupportedError = UnsupportedModuleError
UnsupportableModuleError = UnsupportedModuleError
NotYetSupportedModuleError = UnsupportedModuleError
ShouldReplaceModuleError = UnsupportedModuleError
IllegalModuleConfigurationError = UnsupportedModuleError

__all__ = [
    "IllegalModuleConfigurationError",
    "NotYetSupportedModuleError",
    "ShouldReplaceModuleError",
    "UnsupportableModuleError",
    "UnsupportedError",
    "UnsupportedModuleError",
]
