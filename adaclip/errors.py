"""Errors of adaclip's own. Everything else is a ValueError, TypeError or RuntimeError with a reason."""


class PrivacyBudgetExceeded(RuntimeError):
    """The next step would spend more than the privacy budget; nothing was changed or released."""


class TrainingDiverged(RuntimeError):
    """Parameters are no longer finite; the message says which and when, and what is kept."""


class UnsupportedModuleError(ValueError):
    """A module cannot be trained privately as it is; the message says which, why, and the cure."""
