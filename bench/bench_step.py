"""One whole training step of VGG-11 and VGG-16 (32x32x3, B = 64): private against ordinary.

    python bench/bench_step.py [--models vgg11 vgg16] [--batch-size 64] [--rounds 9] [--json FILE]

Every variant is checked first: its clipped gradient must be the one of a float64 per-sample loop. Then
all run in turn in one process, on the same batch, with the same threads; ratios are taken pair by pair
against the ordinary PyTorch step. Opacus (hooks and ghost clipping) and fastDP (MixOpt) are measured
beside ours where they can be imported; fastDP is not on PyPI: put its checkout on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine, _core
from adaclip.benchmark import alternate, median_ratio, peak_memory
from adaclip.models import build
from adaclip.testing import clipped_sum, relative_error, sample_grads

C = 1.0
Step = Callable[[], None]


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=g), torch.randint(0, 10, (size,), generator=g)


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name, num_classes=10)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    # A step of length 0 keeps the work and leaves every round the same model.
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def loader_of(x: torch.Tensor, y: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=len(x))


def out_of_place(model: nn.Module) -> nn.Module:
    """Opacus's hooks forbid in-place activations."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def grads(model: nn.Module, key: str = "grad") -> dict[str, torch.Tensor]:
    return {n.removeprefix("_module."): getattr(p, key).detach().clone() for n, p in model.named_parameters()}


# Each maker returns (step, gradient): one whole step, and the clipped sum it would release without noise.
# make: model -> optimizer. whole: model, optimizer -> a function of a batch, one step.


def itself(model: nn.Module) -> Callable:
    return model


def loop(model, optimizer, forward: Callable[[nn.Module], Callable] = itself):
    """The body of an ordinary training loop. forward: what is called for the outputs (torch.compile, for one)."""
    run = forward(model)

    def one(x, y):
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()

    return one


def ordinary(model, x, y, noise, *, make=sgd, whole=loop):
    one = whole(model, make(model))
    return lambda: one(x, y), None


def ours(model, x, y, noise, *, make=sgd, whole=loop, **options):
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=make(model),
        data_loader=loader_of(x, y),
        noise_multiplier=noise,
        max_grad_norm=C,
        **options,
    )
    one = whole(model, optimizer)

    def step():
        for a, b in loader:
            one(a, b)

    def gradient():
        for a, b in loader:
            F.cross_entropy(model(a), b).backward()
            found = {n: g * len(x) for n, g in grads(model).items()}
            optimizer.zero_grad()
            return found

    return step, gradient


def opacus(model, x, y, noise, mode="hooks", *, make=sgd):
    from opacus import PrivacyEngine as OpacusEngine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = OpacusEngine(accountant="rdp").make_private(
            module=out_of_place(model),
            optimizer=make(model),
            data_loader=loader_of(x, y),
            noise_multiplier=noise,
            max_grad_norm=C,
            poisson_sampling=False,
            grad_sample_mode=mode,
            criterion=nn.CrossEntropyLoss(),
        )
    private, optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else F.cross_entropy

    def step():
        optimizer.zero_grad()
        criterion(private(x), y).backward()
        optimizer.step()

    def gradient():
        step()
        # After step, p.grad is the (noiseless) clipped sum over the expected batch size.
        return {n: g * len(x) for n, g in grads(private).items()}

    return step, gradient


def fastdp(model, x, y, noise, *, make=sgd):
    from fastDP import PrivacyEngine as FastEngine

    optimizer = make(model)
    engine = FastEngine(
        out_of_place(model),
        batch_size=len(x),
        sample_size=50_000,
        epochs=1,
        noise_multiplier=noise,
        max_grad_norm=C,
        clipping_fn="Abadi",
        clipping_mode="MixOpt",
        clipping_style="all-layer",
        loss_reduction="mean",
    )
    engine.attach(optimizer)

    def step():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, None


def without_noise(name: str) -> str | None:
    """Why a variant's gradient is not compared, if it is not."""
    return {"ordinary": "nothing is clipped", "fastDP MixOpt": "noise is part of its backward"}.get(name)


VARIANTS: dict[str, Callable] = {
    "ordinary": ordinary,
    "adaclip": ours,
    "Opacus hooks": opacus,
    "Opacus ghost": functools.partial(opacus, mode="ghost"),
    "fastDP MixOpt": fastdp,
}


def available() -> dict[str, Callable]:
    found = dict(VARIANTS)
    for module, names in (("opacus", ["Opacus hooks", "Opacus ghost"]), ("fastDP", ["fastDP MixOpt"])):
        try:
            __import__(module)
        except Exception as error:  # a peer that does not import is left out, whatever its reason
            print(f"{module} is left out: {type(error).__name__}: {error}", file=sys.stderr)
            for name in names:
                del found[name]
    return found


@functools.cache
def true_sum(model_name: str) -> dict[str, torch.Tensor]:
    x, y = make_batch(8)
    return clipped_sum(sample_grads(make_model(model_name), x, y, F.cross_entropy), C)


def check(name: str, maker: Callable, model_name: str) -> float | None:
    """Error of a variant's clipped sum against the float64 loop, on 8 samples.

    Raises AssertionError above 1e-4 for ours, and above 1e-2 for peers, which clip with float32 norms.
    """
    if without_noise(name):
        return None
    x, y = make_batch(8)
    truth = true_sum(model_name)
    _, gradient = maker(make_model(model_name), x, y, 0.0)
    found = gradient()
    error = max(relative_error(found[n], t) for n, t in truth.items())
    if error > (1e-4 if name == "adaclip" else 1e-2):
        raise AssertionError(f"{name} on {model_name}: clipped sum is off by {error:.1e}")
    return error


def memory(model_name: str, variant: str, batch_size: int) -> int:
    """Peak memory of a step beyond model and batch, in a process of its own."""
    command = [sys.executable, __file__, "--memory", variant, "--models", model_name]
    done = subprocess.run(
        [*command, "--batch-size", str(batch_size)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def measure_memory(model_name: str, variant: str, batch_size: int) -> int:
    x, y = make_batch(batch_size)
    model = make_model(model_name)
    step, _ = VARIANTS[variant](model, x, y, 1.0)
    # The first step also allocates what stays (momentum, gradients): it is part of what training needs.
    return max(peak_memory(step), peak_memory(step))


def run(models: list[str], batch_size: int, rounds: int) -> list[dict]:
    rows = []
    for model_name in models:
        variants = available()
        errors = {name: check(name, maker, model_name) for name, maker in variants.items()}
        x, y = make_batch(batch_size)
        base = make_model(model_name)
        steps = {n: maker(copy.deepcopy(base), x, y, 1.0)[0] for n, maker in variants.items()}
        times = alternate(steps, rounds)
        peaks = {name: memory(model_name, name, batch_size) for name in variants}
        for name, seconds in times.items():
            ratio = median_ratio(seconds, times["ordinary"])
            peak, plain = peaks[name], peaks["ordinary"]
            rows.append(
                {
                    "model": model_name,
                    "step": name,
                    "ms": round(1e3 * statistics.median(seconds), 1),
                    "time_ratio": round(ratio.median, 3),
                    "time_ratio_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                    "peak_mb": round(peak / 2**20, 1),
                    "memory_ratio": round(peak / plain, 3),
                    "error": errors[name],
                }
            )
    return rows


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def describe() -> dict:
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": _core.simd_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vgg11", "vgg16"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(measure_memory(args.models[0], args.memory, args.batch_size))
        return
    rows, where = run(args.models, args.batch_size, args.rounds), describe()
    print(f"B = {args.batch_size}, 3x32x32, {where}")
    print(
        f"{'model':8}{'step':16}{'ms':>9}{'x ordinary':>12}{'quartiles':>18}{'peak MB':>10}{'x':>7}{'error':>10}"
    )
    for r in rows:
        spread = "{:.3f} to {:.3f}".format(*r["time_ratio_quartiles"])
        error = "-" if r["error"] is None else f"{r['error']:.0e}"
        print(
            f"{r['model']:8}{r['step']:16}{r['ms']:9.1f}{r['time_ratio']:12.3f}{spread:>18}"
            f"{r['peak_mb']:10.1f}{r['memory_ratio']:7.2f}{error:>10}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": where, "batch_size": args.batch_size, "rows": rows}, file, indent=1)
            file.write("\n")


@pytest.mark.parametrize("variant", ["ordinary", "adaclip"])
@pytest.mark.parametrize("model_name", ["vgg11", "vgg16"])
def test_step(benchmark, model_name, variant):
    check(variant, VARIANTS[variant], model_name)
    x, y = make_batch(64)
    step, _ = VARIANTS[variant](make_model(model_name), x, y, 1.0)
    benchmark.group = f"step {model_name}, B = 64"
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
