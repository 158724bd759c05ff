"""What the whole scheme adds to a private step: adaptive clipping, group selection, corrected Nadam, smoothed loss.

    python bench/bench_adaptive_step.py [--cases NAME ...] [--rounds 21] [--threads N] [--json FILE]

A step is a logical one: loader, forward, backward, clipping, noise, update, and every release beside the gradient.
The variants add one part after the other; smoothing is on at every step, which is the most its condition can
cost. Each variant is checked first: the gradient it is about to release is the sum of its samples' gradients, clipped
one by one in float64 at the threshold in force (and taken at the perturbed weights), and the update is its optimizer's formula under noise that
follows the threshold. Then all run in turn in one process on the same data; ratios are taken pair by pair against
the flat step with torch's SGD with momentum, and against the flat step with torch's NAdam, which keeps as much
state as ours.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bench_step import describe
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.benchmark import alternate, median_ratio
from adaclip.clipping import AdaptiveClipping
from adaclip.groups import LabelGroups
from adaclip.models import build
from adaclip.noise import NoiseSource, checked_std, chunks
from adaclip.smoothing import NoiseCorrectedNadam, SmoothedLoss
from adaclip.testing import clipped_sum, relative_error

SIGMA = 1.0
LIMIT = 1.03


class Case(NamedTuple):
    """A model, the shape of its images, the samples of a logical batch, and of a physical one."""

    model: str
    channels: int
    size: int
    batch: int
    physical: int


CASES = {
    "vgg-mini, 28x28, B = 512": Case("vgg-mini", 1, 28, 512, 512),
    "vgg-small, 32x32, B = 64": Case("vgg-small", 3, 32, 64, 64),
    "vgg11, 32x32, B = 4 x 64": Case("vgg11", 3, 32, 256, 64),
    "vgg11, 32x32, B = 64": Case("vgg11", 3, 32, 64, 64),
}


def sgd(params):
    return torch.optim.SGD(params, lr=0.0, momentum=0.9)


def nadam(params):
    return torch.optim.NAdam(params, lr=0.0)


def corrected(params):
    return NoiseCorrectedNadam(params, lr=0.0)


def clipping() -> dict:
    return {"clipping": AdaptiveClipping(1.0, sigma_b=4.0)}


def selection() -> dict:
    return {**clipping(), "groups": LabelGroups("reweight", groups=10)}


def everything(**options) -> dict:
    return {**selection(), "smoothing": SmoothedLoss(0.01, signal="always", **options)}


# A step of length 0 keeps the work and leaves every round the same model.
VARIANTS: dict[str, tuple[Callable, Callable]] = {
    "flat, SGD": (sgd, dict),
    "flat, NAdam": (nadam, dict),
    "adaptive clipping, SGD": (sgd, clipping),
    "+ group selection, SGD": (sgd, selection),
    "+ smoothed loss, SGD": (sgd, everything),
    "all, corrected Nadam": (corrected, everything),
    "all, a draw for 4 steps": (corrected, functools.partial(everything, refresh=4)),
}


def make_data(case: Case, samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, case.channels, case.size, case.size, generator=g)
    return x, torch.randint(0, 10, (samples,), generator=g)


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return build(case.model, num_classes=10, in_channels=case.channels, image_size=case.size)


class Private:
    """One variant, ready to step. Every example is in every batch, so that rounds can be compared."""

    def __init__(self, variant: str, case: Case, data: tuple[Tensor, Tensor], physical: int, **options):
        make_optimizer, parts = VARIANTS[variant]
        self.model = make_model(case)
        self.data = data
        loader = DataLoader(TensorDataset(*data), batch_size=len(data[0]))
        _, self.optimizer, self.loader = PrivacyEngine().make_private(
            module=self.model,
            optimizer=make_optimizer(self.model.parameters()),
            data_loader=loader,
            noise_multiplier=SIGMA,
            max_batch_size=physical,
            **parts(),
            **options,
        )

    def step(self) -> None:
        for _ in self.backwards():
            self.optimizer.step()

    def backwards(self):
        for x, y in self.loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            yield


def check(variant: str, case: Case) -> float:
    """Error of two released gradients of a variant, on 8 samples in two physical batches, against float64.

    Raises AssertionError where it is above 1e-4, or where an update is not its optimizer's.
    """
    data = make_data(case, 8)
    private = Private(variant, case, data, 4, noise_generator=1)
    optimizer, worst = private.optimizer, 0.0
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for step in range(2):
        batches = private.backwards()
        next(batches)
        optimizer.step()
        next(batches)
        if optimizer.smoothing is not None and not optimizer.smoothing.inside:
            raise AssertionError(f"{variant}: the gradient was not taken at perturbed weights")
        # The threshold of this batch, which step() moves, and the weights that its gradients were taken at.
        c, weights = optimizer.max_grad_norm, selected_weights(optimizer, data[1])
        halves = [by_sample(private.model, x, y) for x, y in zip(*(t.split(4) for t in data), strict=True)]
        grads = {n: torch.cat([half[n] for half in halves]) for n in halves[0]}
        truth = weighted_sum(grads, c, weights)
        ours = {n: p.grad.double() * 8 for n, p in private.model.named_parameters()}
        worst = max(worst, *(relative_error(ours[n], t) for n, t in truth.items()))
        if worst > 1e-4:
            raise AssertionError(
                f"{variant} on {case.model}: clipped sum is off by {worst:.1e} in step {step}"
            )
        check_update(private, c * optimizer.gradient_noise_multiplier / 8, step)
        if next(batches, None) is not None:
            raise AssertionError("a logical batch of 8 samples must come as two physical ones")
    return worst


def by_sample(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """{name: [B, *shape]} float64 gradients of each sample's loss, one backward after the other.

    All from one float32 forward of the same rows as the step's: another would round differently, and a ReLU or a
    maximum that falls the other way changes a gradient by far more than its rounding.
    """
    twin = copy.deepcopy(model)
    names, params = zip(*twin.named_parameters(), strict=True)
    losses = F.cross_entropy(twin(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return {n: torch.stack(grads).double() for n, grads in zip(names, zip(*rows, strict=True), strict=True)}


def selected_weights(optimizer, labels: Tensor) -> Tensor:
    """[B]: what group selection makes of each sample before the clip."""
    weights = None if optimizer.groups is None else optimizer.groups.weights(labels, len(labels))
    return torch.ones(len(labels)) if weights is None else weights


def weighted_sum(grads: dict[str, Tensor], c: float, weights: Tensor) -> dict[str, Tensor]:
    """`sum_b min(w_b, C/|g_b|) g_b` in float64: the clipped sum, for each weight by itself."""
    total = {n: torch.zeros_like(g[0]) for n, g in grads.items()}
    for w in weights.unique().tolist():
        chosen = {n: w * g[weights == w] for n, g in grads.items()}
        for n, s in clipped_sum(chosen, c).items():
            total[n] += s
    return total


def check_update(private: Private, std: float, step: int) -> None:
    """step() must be the optimizer's own update by the clipped sum plus noise of `std` for every element."""
    optimizer = private.optimizer
    with optimizer.smoothing.away() if optimizer.smoothing else torch.no_grad():
        twin = copy.deepcopy(private.model)
    for p, q in zip(twin.parameters(), private.model.parameters(), strict=True):
        p.grad = q.grad.clone()
    params = list(twin.parameters())
    plain = type(optimizer.original_optimizer)(params, **optimizer.defaults)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first = 0
    for p in params:
        NoiseSource(1).normal_(p.grad, step, std=std, first_chunk=first, add=True)
        first += chunks(p.numel())
    if hasattr(plain, "note_noise"):
        plain.note_noise(params, [checked_std(std)] * len(params))
    plain.step()
    optimizer.step()
    for p, q in zip(params, private.model.parameters(), strict=True):
        if relative_error(q.detach(), p.detach().double()) > 1e-5:
            raise AssertionError(f"{type(plain).__name__}: the update of a parameter {list(p.shape)} is off")


def run(names: list[str], rounds: int) -> list[dict]:
    rows = []
    for name in names:
        case = CASES[name]
        errors = {variant: check(variant, case) for variant in VARIANTS}
        data = make_data(case, case.batch)
        steps = {variant: Private(variant, case, data, case.physical).step for variant in VARIANTS}
        times = alternate(steps, rounds)
        for variant, seconds in times.items():
            row = {"case": name, "step": variant, "ms": round(1e3 * statistics.median(seconds), 2)}
            for base in ("flat, SGD", "flat, NAdam"):
                ratio = median_ratio(seconds, times[base])
                row[f"to {base}"] = [round(r, 4) for r in ratio]
            rows.append({**row, "error": errors[variant]})
    return rows


def show(rows: list[dict]) -> None:
    print(f"{'case':26}{'step':26}{'ms':>9}  {'to flat, SGD':26}{'to flat, NAdam':26}{'error':>8}")
    for r in rows:
        ratios = (
            "{:.3f} ({:.3f} to {:.3f})".format(*r[f"to {base}"]) for base in ("flat, SGD", "flat, NAdam")
        )
        first, second = ratios
        print(f"{r['case']:26}{r['step']:26}{r['ms']:9.2f}  {first:26}{second:26}{r['error']:8.0e}")
    for r in rows:
        if r["step"].startswith("all"):
            ratio = r["to flat, SGD"][0]
            verdict = "within" if ratio <= LIMIT else "above"
            print(f"{r['case']}: {r['step']}: {ratio:.3f} of the flat step with SGD, {verdict} {LIMIT}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = run(args.cases, args.rounds)
    print(f"{describe()}, {args.rounds} rounds; ratios: median (quartiles)")
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": describe(), "rounds": args.rounds, "rows": rows}, file, indent=1)
            file.write("\n")


@pytest.mark.parametrize("variant", VARIANTS)
def test_step(benchmark, variant):
    case = CASES["vgg-mini, 28x28, B = 512"]
    check(variant, case)
    private = Private(variant, case, make_data(case, 128), 128)
    benchmark.group = "step of vgg-mini, B = 128"
    benchmark.pedantic(private.step, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
