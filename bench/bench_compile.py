"""The private step of VGG-11 (32x32x3, B = 64) through torch.compile (inductor) against the eager one.

    python bench/bench_compile.py [--models vgg11] [--batch-size 64] [--rounds 9] [--json FILE]

First the compiled step is checked: one graph and no graph break, the clipped gradient and the norms within 1e-5 of
eager's, and the clipped gradient the one of a float64 per-sample loop. Then private and ordinary steps, compiled and
eager, run in turn in one process, on the same batch, with the same threads; ratios are taken pair by pair, compiled
against eager. Batches are padded to one size, so nothing is compiled while time is taken.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics

import pytest
import torch
import torch.nn.functional as F
from bench_step import describe, loop, make_batch, make_model, ordinary, ours, true_sum
from torch import nn
from torch._dynamo.utils import counters

from adaclip.benchmark import alternate, median_ratio
from adaclip.testing import private_step, relative_error

LIMIT = 1e-5


def through_inductor(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True)


compiled = functools.partial(loop, forward=through_inductor)


def clipped(model: nn.Module, batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    x, y = make_batch(batch_size)
    found, norms = private_step(model, x, y, F.cross_entropy, max_grad_norm=1.0)
    return {name.replace("_orig_mod.", ""): total for name, total in found.items()}, norms


def error_of(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def check(model_name: str, batch_size: int = 8) -> dict:
    """The compiled step's errors against eager's; AssertionError above the limit, or with more than one graph."""
    torch._dynamo.reset()
    counters.clear()
    found, norms = clipped(through_inductor(make_model(model_name)), batch_size)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    plain, eager_norms = clipped(make_model(model_name), batch_size)
    errors = {
        "clipped sum": max(error_of(found[name], total) for name, total in plain.items()),
        "norms": error_of(norms, eager_norms),
    }
    if graphs != 1 or breaks:
        raise AssertionError(f"{model_name} compiled to {graphs} graphs with {breaks} graph breaks")
    for name, error in errors.items():
        if not error <= LIMIT:
            raise AssertionError(f"{name} of {model_name} is off by {error:.1e} from eager's")
    if batch_size == 8:
        truth = true_sum(model_name)
        loop_error = max(relative_error(found[name], total) for name, total in truth.items())
        if not loop_error <= 1e-4:
            raise AssertionError(
                f"clipped sum of {model_name} is off by {loop_error:.1e} from the float64 loop's"
            )
    return {"graphs": graphs, "graph_breaks": breaks, **errors}


def make_steps(model_name: str, batch_size: int) -> dict:
    x, y = make_batch(batch_size)
    base = make_model(model_name)
    padded = functools.partial(ours, pad_to=batch_size)
    return {
        "private": padded(copy.deepcopy(base), x, y, 1.0)[0],
        "private, compiled": padded(copy.deepcopy(base), x, y, 1.0, whole=compiled)[0],
        "ordinary": ordinary(copy.deepcopy(base), x, y, 1.0)[0],
        "ordinary, compiled": ordinary(copy.deepcopy(base), x, y, 1.0, whole=compiled)[0],
    }


def run(models: list[str], batch_size: int, rounds: int) -> list[dict]:
    rows = []
    for model_name in models:
        errors = check(model_name)
        torch._dynamo.reset()
        times = alternate(make_steps(model_name, batch_size), rounds)
        for name, seconds in times.items():
            ratio = median_ratio(seconds, times[name.removesuffix(", compiled")])
            rows.append(
                {
                    "model": model_name,
                    "step": name,
                    "ms": round(1e3 * statistics.median(seconds), 1),
                    "time_ratio": round(ratio.median, 3),
                    "time_ratio_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                    "checked": errors if name == "private, compiled" else None,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vgg11"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    rows, where = run(args.models, args.batch_size, args.rounds), describe()
    print(f"B = {args.batch_size}, 3x32x32, {where}")
    print(f"{'model':8}{'step':20}{'ms':>9}{'x eager':>10}{'quartiles':>18}")
    for r in rows:
        spread = "{:.3f} to {:.3f}".format(*r["time_ratio_quartiles"])
        print(f"{r['model']:8}{r['step']:20}{r['ms']:9.1f}{r['time_ratio']:10.3f}{spread:>18}")
        if r["checked"]:
            print("        " + ", ".join(f"{k.replace('_', ' ')} {v:.2g}" for k, v in r["checked"].items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": where, "batch_size": args.batch_size, "rows": rows}, file, indent=1)
            file.write("\n")


@pytest.mark.parametrize("step", ["private", "private, compiled"])
def test_compiled_step(benchmark, step):
    check("vgg11")
    benchmark.group = "compiled step vgg11, B = 64"
    benchmark.pedantic(make_steps("vgg11", 64)[step], rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
