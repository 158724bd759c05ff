"""`adaclip compare`: schemes side by side at equal ε, and their tuning."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_compare_parser"]

_DEFAULT = "adaptive,dpsgd,dp-nadam,non-private"


def add_compare_parser(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to `adaclip`'s."""
    from adaclip.schemes import OWNED, SCHEMES
    from adaclip.train_sources import add_flags

    parser = commands.add_parser(
        "compare",
        help="train several schemes at equal ε and report them side by side",
        description="Trains each scheme with each seed on the same data, model, budget and number of steps, every run "
        "in a process of its own, and writes table, report and curves after every run. Started again with the same "
        "folder and settings it makes what is missing. Schemes: " + ", ".join(SCHEMES) + ".",
    )
    what = parser.add_argument_group("the comparison")
    what.add_argument(
        "--schemes", default=_DEFAULT, metavar="A,B,…", help=f"schemes, or all (default {_DEFAULT})"
    )
    what.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each scheme (default 3)")
    what.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where everything goes; new, empty or of this comparison",
    )
    what.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="settings of all in [train], of some in [scheme.NAME]",
    )
    what.add_argument(
        "--export",
        type=Path,
        metavar="PREFIX",
        help="copy the report to PREFIX.md, PREFIX.json and PREFIX.png",
    )
    what.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    what.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="[SCHEME:]KEY=V,V,…",
        help="instead of comparing, try these values (x2 means twice the scheme's own) on held-out training images, "
        "see --validation, and write the best to DIR/tuned.toml; may be repeated, the values are then combined",
    )
    what.add_argument("--quiet", action="store_true", help="no progress, only the result")
    what.add_argument("--json", action="store_true", help="print the result as one JSON object")
    # What schemes decide is refused with a message that says where it belongs.
    shared = parser.add_argument_group("settings of all runs (as for adaclip train)")
    add_flags(shared, without=("scheme", "seed"), hidden=OWNED)
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from adaclip.compare import Comparison, recipe_of
    from adaclip.compare_report import export, table_text
    from adaclip.runs import standard
    from adaclip.schemes import SCHEMES
    from adaclip.train_config import MACHINE
    from adaclip.train_sources import flags_given

    flags = flags_given(args)
    options: dict[str, Any] = {
        "machine": {name: value for name, value in flags.items() if name in MACHINE},
        "schemes": list(SCHEMES) if args.schemes == "all" else args.schemes.split(","),
        "command": shlex.join(["adaclip", *args.argv]),
    }
    if args.tune:
        return _tune(args, flags, options)
    comparison = Comparison(args.out, recipe_of(flags, args.config), seeds=args.seeds, **options)
    done = comparison.run(jobs=args.jobs, say=_say(args))
    table = comparison.report()
    if args.export is not None:
        export(args.out, args.export)
    if args.json:
        print(json.dumps(standard(table)))
    elif table["rows"]:
        print(table_text(table))
        print(f"report: {args.out / 'report.md'}")
    return 0 if done else _interrupted(args)


def _tune(args: argparse.Namespace, flags: dict[str, Any], options: dict[str, Any]) -> int:
    from adaclip.compare import recipe_of
    from adaclip.compare_tune import Tuning, parse_grid
    from adaclip.runs import standard

    if args.export is not None:
        raise ValueError("--export must be left out with --tune, which makes no report")
    shared = {name: value for name, value in flags.items() if name != "validation"}
    tuning = Tuning(
        args.out,
        recipe_of(shared, args.config),
        grids=[parse_grid(text) for text in args.tune],
        fraction=flags.get("validation", 0.1),
        **options,
    )
    done = tuning.run(jobs=args.jobs, say=_say(args))
    best = tuning.best(tuning.rows())
    if args.json:
        print(json.dumps(standard({name: dict(row) for name, row in best.items()})))
    else:
        for name, row in best.items():
            point = ", ".join(f"{key} = {value}" for key, value in row["point"].items()) or "as it is"
            print(f"{name}: {point} (validation accuracy {row['accuracy']:.2%})")
        print(f"best settings: {args.out / 'tuned.toml'}")
    return 0 if done else _interrupted(args)


def _say(args: argparse.Namespace) -> Any:
    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    return say


def _interrupted(args: argparse.Namespace) -> int:
    print(f"interrupted; the same command goes on with what is in {args.out}", file=sys.stderr)
    return 130
