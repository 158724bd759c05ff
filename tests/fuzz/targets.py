"""All targets: a function of hypothesis' `draw` that runs one case and says how it ended, by group and name, with its
share of the group's cases."""

from fuzz import accounting, commands, engine, options, readers

GROUPS = {
    "api": accounting.TARGETS | options.TARGETS | engine.TARGETS,
    "commands": commands.TARGETS,
    "run folders": commands.FOLDERS,
    **readers.TARGETS,
}

# Certified accounting at the ends of the ranges can take minutes: known, and no hang.
CERTIFIED = frozenset({"accountants", "calibration", "curves", "epsilon", "calibrate", "ledgers"})
