"""A private step in several processes against an ordinary DistributedDataParallel one (32x32x3, gloo, one CPU).

    python bench/bench_processes.py [--model vgg11] [--batch-size 64] [--processes 2] [--rounds 9] [--json FILE]

First the private step is checked: with the same key, and without noise, its update must be the one that a single
process makes. Then ordinary and private steps, DistributedDataParallel and FSDP2, run in turn in the same processes, on
the same batches, with one thread each; ratios are taken pair by pair against the ordinary step of the same kind. The
batch is that of all processes together.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile

import torch
import torch.nn.functional as F
from bench_step import C, describe, loader_of, make_batch, make_model, sgd
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adaclip import PrivacyEngine
from adaclip.benchmark import alternate, median_ratio
from adaclip.shards import whole

KINDS = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}
KEY = bytes(range(32))
LIMIT = 1e-5


def ordinary(model: nn.Module, x: torch.Tensor, y: torch.Tensor):
    optimizer = sgd(model)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def private(model: nn.Module, x: torch.Tensor, y: torch.Tensor, noise: float = 1.0, make=sgd):
    """One step on the whole of x, y, of which each process takes its part."""
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=make(model),
        data_loader=loader_of(x, y),
        noise_multiplier=noise,
        max_grad_norm=C,
        noise_generator=KEY,
    )

    def step():
        for a, b in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()

    return step


def moved(model: nn.Module, kind: str | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What one step without noise, of length 1, moves the parameters by."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    model = model if kind is None else KINDS[kind](model)
    private(model, x, y, 0.0, lambda m: torch.optim.SGD(m.parameters(), lr=1.0))()
    return torch.cat([whole(p).flatten() for p in model.parameters()]) - before


def _measure(rank: int, store: str, truth: torch.Tensor, args: argparse.Namespace, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    errors, steps = {}, {}
    base = make_model(args.model)
    # Every example is in the batch: as many for each process as the ordinary step takes.
    x, y = make_batch(args.batch_size)
    for kind, wrap in KINDS.items():
        few = make_batch(8)
        found = moved(copy.deepcopy(base), kind, *few)
        errors[kind] = float((found - truth).norm() / truth.norm())
        if not errors[kind] <= LIMIT:
            raise AssertionError(
                f"{kind} of {args.model} moves by {errors[kind]:.1e} from what one process does"
            )
        mine = slice(rank, None, args.processes)
        steps[f"ordinary {kind}"] = ordinary(wrap(copy.deepcopy(base)), x[mine], y[mine])
        steps[f"private {kind}"] = private(wrap(copy.deepcopy(base)), x, y)
    times = alternate(steps, args.rounds)
    if rank == 0:
        torch.save({"times": times, "errors": errors}, out)
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> list[dict]:
    truth = moved(make_model(args.model), None, *make_batch(8))
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/times.pt"
        multiprocessing.spawn(_measure, (f"{folder}/store", truth, args, out), nprocs=args.processes)
        found = torch.load(out, weights_only=True)
    rows = []
    for name, seconds in found["times"].items():
        kind = name.split()[1]
        ratio = median_ratio(seconds, found["times"][f"ordinary {kind}"])
        rows.append(
            {
                "model": args.model,
                "step": name,
                "ms": round(1e3 * statistics.median(seconds), 1),
                "time_ratio": round(ratio.median, 3),
                "time_ratio_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                "error_to_one_process": found["errors"][kind] if name.startswith("private") else None,
            }
        )
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vgg11")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    rows, where = run(args), describe()
    print(f"B = {args.batch_size}, {args.processes} processes of one thread, 3x32x32, {where}")
    print(f"{'model':8}{'step':18}{'ms':>9}{'x ordinary':>12}{'quartiles':>18}")
    for r in rows:
        spread = "{:.3f} to {:.3f}".format(*r["time_ratio_quartiles"])
        print(f"{r['model']:8}{r['step']:18}{r['ms']:9.1f}{r['time_ratio']:12.3f}{spread:>18}")
    if args.json:
        settings = {"batch_size": args.batch_size, "processes": args.processes}
        with open(args.json, "w") as file:
            json.dump({"machine": where, **settings, "rows": rows}, file, indent=1)
            file.write("\n")


def test_processes(benchmark):
    args = parse(["--rounds", "5", "--batch-size", "16"])
    rows = benchmark.pedantic(run, (args,), rounds=1)
    assert len(rows) == 4


if __name__ == "__main__":
    main()
