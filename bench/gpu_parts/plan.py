"""What `bench.gpu` measures, most important first. Imports nothing that takes time: the parent process reads it, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Item", "dry_plan", "plan"]


@dataclass(frozen=True)
class Item:
    """One measurement. seconds: what it takes at most when all goes well; what is left of the budget must hold it."""

    id: str
    section: str
    seconds: float
    arguments: dict[str, Any]


# 3x3 convolutions of the VGGs, (input channels, output channels, height = width), the costly ones first.
_LAYERS = [
    (128, 128, 16),
    (64, 128, 16),
    (256, 256, 8),
    (128, 256, 8),
    (64, 64, 32),
    (3, 64, 32),
    (512, 512, 4),
    (256, 512, 4),
    (512, 512, 2),
]
_PEERS = ["Opacus ghost", "Opacus hooks", "fastDP MixOpt"]
_SECONDS = {"eager": 12, "graph": 15, "compiled": 60, "compiled graph": 70, "reduce-overhead": 60}


def _step(model: str, batch: int, precision: str, treatment: str, seconds: float | None = None) -> Item:
    arguments = {"model": model, "batch_size": batch, "precision": precision, "treatment": treatment}
    name = f"{model}, B = {batch}, {precision}, {treatment}"
    return Item(name, "steps", _SECONDS[treatment] if seconds is None else seconds, arguments)


def _steps(
    models: list[str], treatments: list[str], precisions: list[str], batches: list[int]
) -> Iterator[Item]:
    for treatment, model, precision, batch in itertools.product(treatments, models, precisions, batches):
        yield _step(model, batch, precision, treatment)


def _conv(layer: tuple[int, int, int], dtype: str, batch: int, seconds: float) -> Item:
    cin, cout, size = layer
    arguments = {"kind": "conv", "layer": layer, "dtype": dtype, "batch_size": batch}
    return Item(f"conv norms and sums {cin}->{cout} @ {size}x{size}, {dtype}", "kernels", seconds, arguments)


def _peer(peer: str, model: str, batch: int, precision: str, seconds: float) -> Item:
    arguments = {"model": model, "batch_size": batch, "precision": precision, "peer": peer}
    return Item(f"{peer}, {model}, B = {batch}, {precision}", "peers", seconds, arguments)


def plan() -> list[Item]:
    """Everything, after the tests: first one of each figure that is promised, then the same for other sizes."""
    main, both, sizes = ["vgg16", "vgg11"], ["bf16", "fp32"], [256, 4096]
    return [
        # A reference without TF32, whose check is the strictest.
        _step("vgg11", 256, "ieee", "eager"),
        *_steps(["vgg16"], ["graph"], ["bf16"], sizes),
        Item("noisy step", "kernels", 20, {"kind": "noisy_step"}),
        *(_conv(layer, "bfloat16", 256, 15) for layer in _LAYERS[:4]),
        *_steps(["vgg16"], ["graph"], ["fp32"], sizes),
        *_steps(["vgg11"], ["graph"], both, sizes),
        *_steps(["vgg16"], ["compiled graph"], ["bf16"], [256]),
        *_steps(main, ["eager"], both, sizes),
        *(_peer(peer, "vgg16", 256, "fp32", 20) for peer in _PEERS),
        *(_conv(layer, "bfloat16", 256, 15) for layer in _LAYERS[4:]),
        *(_conv(layer, "float32", 256, 15) for layer in _LAYERS),
        *_steps(["vgg16"], ["compiled graph"], ["bf16"], [4096]),
        *_steps(["vgg11"], ["compiled graph"], ["bf16"], sizes),
        *_steps(main, ["compiled graph"], ["fp32"], sizes),
        Item("sums of kept gradients, group norm", "kernels", 15, {"kind": "sums"}),
        *_steps(["vgg13"], ["eager", "graph"], both, sizes),
        *_steps(main, ["compiled"], both, sizes),
        *(_peer(p, m, 256, "fp32", 20) for m in ("vgg11", "vgg13") for p in _PEERS),
        *(_peer(p, "vgg16", 4096, "fp32", 30) for p in _PEERS),
        *_steps(["vgg13"], ["compiled graph", "compiled"], both, sizes),
        *_steps(["vgg16"], ["reduce-overhead"], both, sizes),
    ]


def dry_plan() -> list[Item]:
    """Every kind of measurement once, at toy sizes."""
    return [
        _step("toy", 8, "bf16", "eager"),
        _step("toy", 16, "fp32", "graph"),
        _step("toy", 8, "fp32", "compiled"),
        Item("noisy step", "kernels", 20, {"kind": "noisy_step"}),
        _conv((2, 3, 4), "bfloat16", 2, 20),
        Item("sums of kept gradients, group norm", "kernels", 20, {"kind": "sums"}),
        _peer("Opacus hooks", "toy", 8, "fp32", 20),
    ]
