"""Measures, on this GPU, how convolutions' norms and sums are taken fastest, and writes adaclip/backends/table.json.

    python -m bench.tune_backends [--batch-size 256] [--rounds 7] [--dry-run] [--limit 300] [--out FILE]

For every shape class of the VGGs and 16-bit dtype, first the two ways of summing a weighted gradient are timed, cuDNN's
and Triton's. Then for every dtype all ways of taking norms are, in turn in one process, each with what the layer still
needs after it: the weight gradient, by the faster sum, or the weighted sum of the gradients it kept. A way is timed
only if it is right: norms bound the float64 ones and are close to them, sums are no further from the float64 one than
rounding explains. Entries of other architectures stay as they are; without
--dry-run the table is written after every shape, so that a run that is cut off leaves what it has. Shapes that are
not in the table are decided by adaclip/backends/choice.py's cost model.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adaclip import reference
from adaclip.backends import ConvGeometry, Method, choice, cudnn_grads, load, triton_grads, why_not
from adaclip.benchmark import alternate

# (input channels, output channels, height = width) of 3x3 convolutions; dp_vgg's among them.
LAYERS = [
    (3, 64, 32),
    (64, 64, 32),
    (64, 64, 16),
    (64, 128, 16),
    (128, 128, 16),
    (128, 128, 8),
    (128, 256, 8),
    (256, 256, 8),
    (256, 512, 4),
    (512, 512, 4),
    (512, 512, 2),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GEOMETRY = ConvGeometry([3, 3], [1, 1], [1, 1], [1, 1], 1)
# A kept gradient may take this many times the memory of the output's gradient.
LARGEST_KEPT = 1.5
# How far a norm may exceed the exact one, in units of the root of the magnitude.
CLOSE = 2.0**-8
CALLS = 10

Ways = dict[str, tuple[dict, Callable[[], Tensor], Callable[[], object]]]


SUMS = {"cudnn": cudnn_grads, "triton": triton_grads}


def sums(x: Tensor, g: Tensor, factors: Tensor) -> dict[str, Callable[[], Tensor]]:
    """{what sums: the weighted gradient} of one layer."""
    weight = x.new_empty(g.shape[1], x.shape[1], 3, 3, dtype=torch.float32)
    names = SUMS if x.dtype != torch.float32 else ["cudnn"]
    return {
        name: functools.partial(SUMS[name].conv_weighted_grad, x, g, factors, weight, GEOMETRY)
        for name in names
    }


def wrong_sum(name: str, total: Tensor, x: Tensor, g: Tensor, factors: Tensor) -> str | None:
    """What is wrong with a weighted gradient of these, normally distributed values; None if nothing is."""
    _, stride, padding, dilation, groups = GEOMETRY
    exact = total.new_empty(total.shape, dtype=torch.float64)
    args = list(stride), list(padding), list(dilation), groups
    exact = reference.conv_weighted_grad(x.double(), g.double(), factors, exact, *args)
    off = float((total - exact).norm() / exact.norm())
    # The part that rounding an operand moves it by, and more than adding up in float32 does.
    allowed = 2 * SUMS[name].conv_grad_rounding(x, g, GEOMETRY).operands + 2.0**-14
    return None if off <= allowed else f"the sum is off by {off:.1e}, where rounding explains {allowed:.1e}"


def ways(x: Tensor, g: Tensor, factors: Tensor, weigh: Callable[[], Tensor]) -> Ways:
    """{name: (table entry, norms, norms and the weighted gradient)} of one layer, whose gradient `weigh` makes."""
    triton = load("triton")
    from adaclip.kernels.conv_sample_norms import conv_sample_norms

    def norms(gram: Callable, method: Method):
        return triton.conv_norms(gram, x, g, GEOMETRY, False, method)

    def make(gram: Callable, method: Method) -> tuple[Callable[[], Tensor], Callable[[], object]]:
        def whole() -> object:
            found = norms(gram, method)
            if found.kept is not None:
                return triton.weighted_sum(found.kept, factors)
            return weigh()

        return (lambda: norms(gram, method).sqnorms), whole

    plain, kept = Method("gram", False), Method("instantiate", True)
    found: Ways = {}
    if why_not("conv_sample_norms", "cuda", x, g) is None:
        entry = {"way": "gram", "keep": False, "backend": "cuda"}
        found["cuda gram"] = entry, *make(load("cuda").gram, plain)
    entry = {"way": "gram", "keep": False, "backend": "triton"}
    found["triton gram"] = entry, *make(conv_sample_norms, plain)
    entry = {"way": "instantiate", "keep": False}
    found["instantiate"] = entry, *make(conv_sample_norms, Method("instantiate", False))
    if x.shape[1] * 9 * 4 <= LARGEST_KEPT * g[0, 0].numel() * g.element_size():
        found["keep"] = {"way": "instantiate", "keep": True}, *make(conv_sample_norms, kept)
    return found


def wrong(norms: Tensor, x: Tensor, g: Tensor) -> str | None:
    """What is wrong with the first two samples' squared norms; None if nothing is."""
    args = (*(list(v) for v in GEOMETRY[:4]), GEOMETRY.groups)
    x, g, norms = x[:2].double(), g[:2].double(), norms[:2]
    exact = reference.row_sqnorms(reference.conv_sample_grads(x, g, *args))
    scale = reference.position_norms_product(x, g, *args).sqrt()
    # Kept gradients have norms of their own, a rounding away from the exact ones.
    above = (norms.sqrt() - exact.sqrt()) / scale
    if not bool((above >= -(2.0**-20)).all()):
        return f"norms are below the exact ones by {-float(above.min()):.1e} of the magnitude"
    if not bool((above <= CLOSE).all()):
        return f"norms are above the exact ones by {float(above.max()):.1e} of the magnitude"
    return None


def measure(
    batch: int, layer: tuple[int, int, int], dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, object]]:
    """The table's entries for one layer, by operation, with the median milliseconds of each way."""
    cin, cout, size = layer
    rng = torch.Generator(device="cuda").manual_seed(0)
    shapes = (batch, cin, size, size), (batch, cout, size, size)
    x, g = (torch.randn(s, generator=rng, device="cuda").to(dtype) for s in shapes)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    factors = torch.rand(batch, generator=rng, device="cuda")
    found, right = {}, {}
    for name, weigh in sums(x, g, factors).items():
        error = wrong_sum(name, weigh(), x, g, factors)
        if error is None:
            right[name] = weigh
        else:
            print(f"{name}'s sum is left out: {error}", file=sys.stderr)
    if not right:
        raise RuntimeError(f"no way of summing the gradient of {layer} in {dtype} is right")
    best = "cudnn"
    if dtype != torch.float32:
        best, medians = _fastest(right, rounds)
        found["conv_weighted_grad"] = {"backend": best, "ms": medians}
    calls, entries = {}, {}
    for name, (entry, norms, whole) in ways(x, g, factors, right[best]).items():
        error = wrong(norms(), x, g)
        if error is not None:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        calls[name], entries[name] = whole, entry
    if not calls:
        raise RuntimeError(f"no way of taking the norms of {layer} in {dtype} is right")
    best, medians = _fastest(calls, rounds)
    found["conv_sample_norms"] = {**entries[best], "ms": medians}
    return found


def _fastest(calls: dict[str, Callable[[], object]], rounds: int) -> tuple[str, dict[str, float]]:
    """(the name of the fastest, every one's median milliseconds)."""
    repeated = {name: lambda call=call: [call() for _ in range(CALLS)] for name, call in calls.items()}
    times = alternate(repeated, rounds)
    medians = {name: 1e3 * statistics.median(t) / CALLS for name, t in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best, {name: float(f"{ms:.4g}") for name, ms in medians.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which to stop")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the table as it is")
    parser.add_argument("--out", type=Path, default=choice.TABLE, help="where the table is written")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "tune_backends: torch finds no CUDA GPU here, and there is nothing else to measure",
            file=sys.stderr,
        )
        return 2
    table = json.loads(choice.TABLE.read_text())
    architecture = choice.architecture(torch.device("cuda", torch.cuda.current_device()))
    rows = table["entries"].setdefault(architecture, {})
    table["note"] = (
        "Written by python -m bench.tune_backends; milliseconds of norms and weighted gradient together."
    )
    table.setdefault("measured", {})[architecture] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "batch_size": args.batch_size,
        "date": time.strftime("%Y-%m-%d"),
    }
    start = time.monotonic()
    for layer in LAYERS:
        for dtype in DTYPES:
            if time.monotonic() - start > args.limit:
                print("tune_backends: out of time; the rest is left to the cost model", file=sys.stderr)
                return 0
            cin, cout, size = layer
            for operation, entry in measure(args.batch_size, layer, dtype, args.rounds).items():
                kind = choice.conv_class((size, size), cin, cout, GEOMETRY, dtype, operation)
                rows[kind] = entry
                print(f"{kind}: {entry}", flush=True)
            if not args.dry_run:
                args.out.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
