"""Whole training steps on a GPU: private against ordinary under the same treatment, and against peers.

Treatments: "eager"; "graph", one CUDA graph of the whole step; "compiled", torch.compile of forward and backward; both.
Before anything is timed, one step of ours is checked at the size and in the form that is timed: with SGD at learning
rate 1 the parameters must move by the clipped sum of float64 per-sample gradients. Then the learning rate is 0. Noise
is made as always, but with a standard deviation too small to hide the sum.

The batch is a few samples over and over, so that float64 gradients of few samples say what the whole sum is.
"""

from __future__ import annotations

import functools
import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip.benchmark import median_ratio
from adaclip.models import build
from adaclip.testing import clipped_sum, sample_grads
from bench import bench_step
from bench.gpu_parts.timing import alternate_steps, out_of_memory, peak_of, release

__all__ = ["Case", "Wrong", "measure_peer", "measure_treatment"]

SAMPLES = 8
_TOY = {"name": "vgg11", "image_size": 8, "plan": [4, "M", 8], "groups": 2}
_SIGMA = 1e-6
# A norm is an upper bound: with what TF32 and bfloat16 round it may be this part above, and the sum as much shorter.
_LARGEST_SHRINKAGE = 0.1


class Wrong(Exception):
    """A step did not do what it should: its time says nothing."""


@dataclass(frozen=True)
class Case:
    """precision: "bf16" (autocast), "fp32" (torch's defaults: convolutions in TF32) or "ieee" (no TF32 anywhere)."""

    model: str
    batch_size: int
    precision: str
    device: torch.device
    toy: bool = False

    def network(self, autocast: bool = True) -> nn.Module:
        torch.manual_seed(0)
        options: dict[str, Any] = _TOY if self.toy else {"name": self.model}
        net = Network(build(num_classes=10, **options), autocast and self.precision == "bf16")
        return net.to(self.device, memory_format=self._layout)

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def batch(self) -> tuple[Tensor, Tensor]:
        pixels = _TOY["image_size"] if self.toy else 32
        rng = torch.Generator().manual_seed(1)
        x, y = torch.randn(SAMPLES, 3, pixels, pixels, generator=rng), torch.arange(SAMPLES)
        x, y = (t[torch.arange(self.batch_size) % SAMPLES].to(self.device) for t in (x, y))
        return x.contiguous(memory_format=self._layout), y

    def set_precision(self) -> None:
        torch.backends.cudnn.allow_tf32 = self.precision != "ieee"
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True


class Network(nn.Module):
    """A model, under autocast if asked for; its logits are float32."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, x: Tensor) -> Tensor:
        if not self.autocast:
            return self.model(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x).float()


# --- what is right


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    # On the CPU: the memory of the steps themselves is measured.
    return torch.cat([t.detach().double().flatten().cpu() for t in tensors.values()])


def truth(case: Case) -> tuple[Tensor, float]:
    """The clipped sum of the 8 samples, and how far one is off that ordinary backwards give, one sample at a time.

    Those run in the case's own precision, and everything else about them is float64: what is left is the precision.
    """
    return _truth(replace(case, batch_size=SAMPLES))


@functools.cache
def _truth(case: Case) -> tuple[Tensor, float]:
    x, y = case.batch()
    exact = _flat(
        clipped_sum(sample_grads(case.network(autocast=False), x, y, F.cross_entropy), bench_step.C)
    )
    model = case.network()
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for b in range(SAMPLES):
        model.zero_grad()
        F.cross_entropy(model(x[b : b + 1]), y[b : b + 1]).backward()
        for name, p in model.named_parameters():
            rows[name].append(p.grad.double())
    rough = _flat(clipped_sum({name: torch.stack(grads) for name, grads in rows.items()}, bench_step.C))
    return exact, float((rough - exact).norm() / exact.norm())


def judge(found: Tensor, exact: Tensor, rough: float) -> float:
    """The error of a clipped sum relative to the exact one.

    Raises:
        Wrong: it is longer, or points elsewhere, than twice the precision's own error explains; or it is much shorter.
    """
    if not bool(found.isfinite().all()):
        raise Wrong("the clipped sum is not finite")
    error = float((found - exact).norm() / exact.norm())
    scale = float(found @ exact / (exact @ exact))
    aside = float((found - scale * exact).norm() / exact.norm())
    allowed = 2 * rough + 1e-4
    # Samples are not shortened all alike.
    if (
        not (1 - _LARGEST_SHRINKAGE - allowed <= scale <= 1 + allowed)
        or aside > allowed + max(0, 1 - scale) / 4
    ):
        raise Wrong(
            f"the clipped sum is off by {error:.1e} ({scale:.4f} times as long, {aside:.1e} aside), where the "
            f"precision explains {rough:.1e}"
        )
    return error


# --- the steps


class Running:
    """A step that can be taken, and the optimizer and model behind it."""

    def __init__(self, case: Case, maker: Callable, *, checked: bool = True, **options: Any) -> None:
        self._case, self._checked = case, checked
        self._model = case.network()
        self._start = _flat(dict(self._model.named_parameters()))

        def make(model: nn.Module) -> torch.optim.Optimizer:
            self._optimizer = bench_step.sgd(model)
            return self._optimizer

        self.step, _ = maker(self._model, *case.batch(), _SIGMA, make=make, **options)

    def check(self) -> float | None:
        """Take the first steps; the error of what the first one released, None where that is not compared."""
        self._set_rate(1.0 if self._checked else 0.0)
        self.step()
        moved = self._start - _flat(dict(self._model.named_parameters()))
        self._set_rate(0.0)
        self.step()
        for state in self._optimizer.state.values():
            momentum = state.get("momentum_buffer")
            if momentum is not None and not bool(momentum.isfinite().all()):
                raise Wrong("the momentum is not finite")
        if not self._checked:
            return None
        # The denominator is the batch size; every sample is in there batch_size / SAMPLES times.
        return judge(SAMPLES * moved, *truth(self._case))

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def _compile(model: nn.Module, mode: str | None = None) -> Callable:
    if next(model.parameters()).device.type == "cpu":
        return torch.compile(model, backend="aot_eager", dynamic=False)
    return torch.compile(model, dynamic=False, mode=mode)


def _loop(compiled: bool, mode: str | None = None) -> Callable:
    if not compiled:
        return bench_step.loop
    return functools.partial(bench_step.loop, forward=functools.partial(_compile, mode=mode))


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The step as one CUDA graph; on a CPU the step itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def ordinary(case: Case, compiled: bool, graph: bool, mode: str | None = None) -> Running:
    running = Running(case, bench_step.ordinary, checked=False, whole=_loop(compiled, mode))
    if graph:
        running.step = captured(running.step, case.device)
    return running


class _Again:
    """In the place of CUDA graphs, for a dry run on a CPU: what would be replayed is run again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rehearse(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return run


def ours(case: Case, compiled: bool, graph: bool) -> Running:
    if not graph:
        return Running(case, bench_step.ours, whole=_loop(compiled))
    from adaclip.graphed import GraphedStep

    class Graphed(GraphedStep):
        recorder = GraphedStep.recorder if case.device.type == "cuda" else _Again

    def whole(model: nn.Module, optimizer: Any) -> Callable:
        return Graphed(model, optimizer, F.cross_entropy, compile=compiled)

    return Running(case, bench_step.ours, whole=whole, pad_to=case.batch_size)


def _has_graph() -> str | None:
    """Why there is no graph of our step; None if there is."""
    try:
        from adaclip import graphed  # noqa: F401
    except ImportError as error:
        return f"adaclip.graphed cannot be imported: {error}"
    return None


# --- measuring


def measure_treatment(case: Case, treatment: str, rounds: int) -> dict[str, Any]:
    """Ours against ordinary training, both under one treatment."""
    compiled, graph = "compiled" in treatment, "graph" in treatment
    mode = "reduce-overhead" if treatment == "reduce-overhead" else None
    if mode is not None:
        compiled = graph = True
    label = f", {treatment}" if mode is None else ", compiled graph"
    plain = f"ordinary, {treatment}"
    builders = {plain: lambda: ordinary(case, compiled, graph and mode is None, mode)}
    why = _has_graph() if graph else None
    if why is None:
        builders["adaclip" + label] = lambda: ours(case, compiled, graph)
    result = measure(case, builders, rounds)
    if why is not None:
        result["rows"].append({"name": "adaclip" + label, "status": "not available", "why": why})
    return result


def measure_peer(case: Case, peer: str, rounds: int) -> dict[str, Any]:
    """A peer against our eager step."""
    package = "fastDP" if peer.startswith("fastDP") else "opacus"
    if importlib.util.find_spec(package) is None:
        return {"status": "not available", "why": f"{package} is not installed"}
    builders = {
        "adaclip, eager": lambda: ours(case, False, False),
        peer: lambda: Running(case, bench_step.VARIANTS[peer], checked=False),
    }
    return measure(case, builders, rounds)


def measure(case: Case, builders: dict[str, Callable[[], Running]], rounds: int) -> dict[str, Any]:
    """{"rows": one a step, "status": "ok" or the worst of theirs}; ratios are to the first step's."""
    case.set_precision()
    torch._dynamo.reset()
    truth(case)
    rows, running = [], {}
    for name, builder in builders.items():
        row = _prepared(case, builder, name, running)
        rows.append(row)
    times = (
        alternate_steps({name: r.step for name, r in running.items()}, rounds, case.device) if running else {}
    )
    running.clear()
    release(case.device)
    base = rows[0]
    for row in rows:
        if row["status"] != "ok":
            continue
        seconds = times[row["name"]]
        middle = sorted(seconds)[len(seconds) // 2]
        row |= {
            "ms": 1e3 * middle,
            "samples_per_second": case.batch_size / middle,
            "ms_rounds": [1e3 * t for t in seconds],
        }
        if row is not base and base["status"] == "ok":
            ratio = median_ratio(seconds, times[base["name"]])
            row |= {"ratio": ratio.median, "ratio_quartiles": [ratio.low, ratio.high]}
            if row["peak_bytes"] and base["peak_bytes"]:
                row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]
    states = [row["status"] for row in rows]
    worst = next((s for s in ("red", "failed", "oom", "not available") if s in states), "ok")
    why = next((row["why"] for row in rows if row["status"] == worst and "why" in row), None)
    return {"status": worst, "rows": rows} | ({} if why is None else {"why": why})


def _prepared(case: Case, builder: Callable[[], Running], name: str, running: dict[str, Running]) -> dict:
    """Build, check and warm up a step; its row, without times. It joins `running` if it is right."""
    row: dict[str, Any] = {"name": name, "status": "ok", "ms": None}
    before = release(case.device)
    try:
        made = builder()
        row["error"] = made.check()
        row["peak_bytes"] = peak_of(made.step, before, case.device)
        running[name] = made
    except Wrong as wrong:
        row |= {"status": "red", "why": str(wrong)}
    except Exception as error:  # a variant that fails is a result, and the others go on
        if out_of_memory(error):
            row |= {"status": "oom", "why": f"with {before.allocated >> 20} MiB held beside it"}
        else:
            last = traceback.format_exc(limit=-6)
            row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:2000], "traceback": last}
    made = None
    if row["status"] != "ok":
        release(case.device)
    return row
