"""All targets: a function of hypothesis' `draw` that runs one case and says how it ended, by group and name, with its
share of the group's cases."""

from fuzz import accounting, engine, options

GROUPS = {"api": accounting.TARGETS | options.TARGETS | engine.TARGETS}
