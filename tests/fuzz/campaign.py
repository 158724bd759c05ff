"""`make fuzz`: every target with so many cases, and how they ended.

python tests/fuzz/campaign.py [--cases 10000] [--seed 0] [GROUP or TARGET …]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.bounds import Slow
from fuzz.targets import CERTIFIED, GROUPS
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException


def run(name: str, target: Callable[[Any], str], cases: int, number: int) -> tuple[Counter, dict[str, str]]:
    """How the cases ended, and the failures by where they happened: the first of each, with what was drawn.

    Nothing is minimized, and a failure does not end the run: the tests do the one, and many at once are wanted here.
    """
    ended: Counter = Counter()
    failures: dict[str, str] = {}

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def cases_of(data: st.DataObject) -> None:
        drawn: list[Any] = []

        def draw(strategy: st.SearchStrategy) -> Any:
            drawn.append(data.draw(strategy))
            return drawn[-1]

        try:
            ended[target(draw)] += 1
        except HypothesisException:
            raise
        except Slow as error:
            # Certified accounting of releases at the ends of the ranges can take minutes. It is counted, and shown.
            ended["SLOW"] += 1
            if name not in CERTIFIED:
                failures["too slow"] = f"{error}; drawn: {', '.join(repr(d)[:200] for d in drawn)}"
        except Exception as error:
            ended["FAILED"] += 1
            inner = error.__cause__ or error
            frame = traceback.extract_tb(inner.__traceback__)[-1]
            where = f"{type(inner).__name__} at {frame.filename}:{frame.lineno}"
            if where not in failures:
                text = "".join(traceback.format_exception(error)[-6:])
                failures[where] = f"{text}drawn: {', '.join(repr(d)[:200] for d in drawn)}"

    cases_of()
    return ended, failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of each group (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("chosen", nargs="*", metavar="NAME", help="groups or targets; default: all")
    args = parser.parse_args()
    found: dict[str, str] = {}
    for group, targets in GROUPS.items():
        weights = sum(weight for _, weight in targets.values())
        total, start = 0, time.monotonic()
        for name, (target, weight) in targets.items():
            if args.chosen and not {name, group} & set(args.chosen):
                continue
            began = time.monotonic()
            ended, failures = run(name, target, -(-args.cases * weight // weights), args.seed)
            found |= failures
            total += ended.total()
            shown = ", ".join(f"{how} {count}" for how, count in ended.most_common(8))
            print(f"  {name}: {ended.total()} cases, {time.monotonic() - began:.0f} s: {shown}", flush=True)
        if total:
            print(f"{group}: {total} cases, {time.monotonic() - start:.0f} s", flush=True)
    for where, text in found.items():
        print(f"\n{where}\n{text}")
    print(f"{len(found)} places failed")
    return 1 if found else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        tempfile.tempdir = scratch
        sys.exit(main())
