"""The noisy update: Gaussian noise and the optimizer's arithmetic in one pass over the parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import load, resolve_backend
from .layout import is_flat
from .master import float32_parameters
from .noise import (
    STREAM_GRADIENT,
    NoiseSource,
    address,
    check_chunks,
    checked_std,
    chunks,
    rounded_up,
)
from .shards import add_noise, is_sharded
from .step_rule import FusedStep, StepRule
from .torch_rules import RULES

if TYPE_CHECKING:
    from adaclip.kernels.step_table import StepTable

__all__ = ["PrivateStepOnly", "Update", "begin_update", "fusable", "noisy_update", "rehearse"]


class PrivateStepOnly:
    """Has an optimizer step in `noisy_update` only: by itself it would apply a clipped sum without its noise.

    A step pre-hook, from `attach` to `detach`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self.allowed = False

    def attach(self) -> None:
        self._handle = self._optimizer.register_step_pre_hook(self)

    def detach(self) -> None:
        self._handle.remove()

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self.allowed:
            raise RuntimeError(
                "the step() of the optimizer that was given to make_private would apply the clipped sum without noise "
                "and without an entry in the ledger: call step() of the one that make_private returned"
            )


@torch.no_grad()
def noisy_update(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor],
    stds: Iterable[float] | Tensor,
    source: NoiseSource,
    step: int | Tensor,
    *,
    stream: int = STREAM_GRADIENT,
    backend: str = "auto",
) -> None:
    """Adds N(0, std^2) to each parameter's gradient and lets the optimizer take one step.

    Args:
        optimizer: any torch optimizer. Its learning rates and options are read now.
        params: the parameters to update, each one that the optimizer holds. Their order addresses the noise:
            parameter i takes the ``chunks(numel)`` chunks of the stream after those of the parameters before
            it. A ``p.grad`` of None counts as zeros: an empty batch still releases noise.
        stds: one noise standard deviation per parameter, finite, at least 0; rounded up to a float32. A tensor
            [len(params)] on another device than the CPU is used there without being read: it must be of a floating
            dtype, and the caller answers for its values.
        source: the key.
        step: the number of this release, 0 to 2^64 - 1. Never use one twice with the same key and stream. On a GPU it
            may be an int64 tensor [1] there (`NoiseSource.normal_`).
        stream: 0 to 2^32 - 1.
        backend: what makes the noise and updates the parameters (`adaclip.backends`).

    Raises:
        ValueError: for a parameter that the optimizer does not hold, a repeated one, a sparse gradient, stds
            of another length, shape or dtype or out of range, a step or stream out of range, or LBFGS. Nothing has
            changed then.

    Parameters of the optimizer that are not in ``params`` are left alone, whatever their gradient. State is kept
    in ``optimizer.state`` under torch's own keys, so checkpoints are torch's and a plain ``optimizer.step()``
    could go on from them. With stds of 0 the result is ``optimizer.step()``'s, up to rounding.

    For exactly SGD, Adam, AdamW, NAdam and the optimizers of adaclip.smoothing on float32 tensors, all on the CPU or all
    on one GPU that adaclip has kernels for, that fill one block of memory each, with equally strided gradients and
    plain options, everything is one pass and ``p.grad`` is only read. On a GPU no value is read back. All else
    (amsgrad, capturable, differentiable, tensor options, step hooks, float64, other devices or optimizers) adds the
    noise to ``p.grad`` and calls ``optimizer.step()``, after ``optimizer.note_noise(params, stds)`` where the optimizer
    has that method.

    bfloat16 and float16 parameters are float32 for the time of the update, with any optimizer: a float32 master copy in
    ``optimizer.state`` takes noise and update, and the parameter is its rounded value (`adaclip.master`). Their
    gradients may be float32 (``p.grad_dtype``).
    """
    step, stream = address(step, stream)
    params, stds = list(params), _checked_stds(stds)
    _check(optimizer, params, stds)
    with float32_parameters(optimizer, params):
        begin_update(optimizer, params, stds, backend).apply(source, step, stream)


Stds = list[float] | Tensor


@dataclass
class Update:
    """A noisy update, begun: the host's part is done (a fused optimizer has counted its step), the device's is `apply`.

    Made by `begin_update`, and to be applied once.

    fused: what one pass does, without the gradients; None where the optimizer's own step has to do it.
    touched: the tensors that the pass changes.
    """

    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    stds: Stds
    backend: str
    fused: FusedStep | None
    touched: list[Tensor]

    def apply(self, source: NoiseSource, step: int | Tensor, stream: int = STREAM_GRADIENT) -> None:
        """Noise and update, with every ``p.grad`` as it is now; arguments as in `noisy_update`.

        A CUDA graph may capture it, if there is a fused pass, `step` is on the device, and `refresh` came before. For
        a replay another Update is begun, and its `refresh` and, afterwards, `done` are called in place of this.
        """
        if self.fused is None:
            rest = source, step, stream, self.backend
            _generic_update(self.optimizer, self.params, self.stds, *rest)
            return
        self.fused.tensors = self._with({p: p.grad for p in self.params})
        self._module().noisy_step(source.key, step, stream, self.fused)
        self.done()

    def done(self) -> None:
        """Say that the tensors have changed, to whom it concerns on the host."""
        torch.autograd.graph.increment_version(self.touched)
        # What a learning-rate scheduler looks for, to warn when it runs before the optimizer.
        self.optimizer._opt_called = True

    def refresh(self, grads: Mapping[Tensor, Tensor | None]) -> StepTable | None:
        """Write this update's numbers, and where these gradients lie, to where a captured `apply` reads them.

        Waits for nothing. Returns that place, by which a capture is known to be of these parameters still; None for
        a backend that has none.
        """
        if self.fused is None or _backend_of(self.fused.tensors, self.backend) not in ("cuda", "triton"):
            return None
        from .backends.device_table import step_table

        averages = self.fused.averages
        # The captured pass moves the averages itself.
        averages = None if averages is None else averages.clone()
        return step_table(replace(self.fused, tensors=self._with(grads), averages=averages))

    def _with(self, grads: Mapping[Tensor, Tensor | None]) -> list[tuple[Tensor | None, ...]]:
        for p in self.params:
            grad = grads.get(p)
            if grad is not None and (grad.dtype, grad.device, grad.shape, grad.stride()) != (
                *(p.dtype, p.device, p.shape),
                p.stride(),
            ):
                raise RuntimeError(f"the gradient of {_show(p)} must be laid out as it is, got {_show(grad)}")
        return [(p, grads.get(p), *state) for p, _, *state in self.fused.tensors]

    def _module(self) -> Any:
        return load(_backend_of(self.fused.tensors, self.backend))


@torch.no_grad()
def begin_update(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor],
    stds: Iterable[float] | Tensor,
    backend: str = "auto",
) -> Update:
    """Begin a noisy update; arguments and errors as in `noisy_update`, and nothing is enqueued that reads ``p.grad``.

    A float32 tensor of stds on a device is read when `Update.apply` runs, and by every replay of its capture.
    """
    params, stds = list(params), _checked_stds(stds)
    _check(optimizer, params, stds)
    near = isinstance(stds, list) or all(p.device == stds.device for p in params)
    fused, touched = None, []
    if near and _fusable(optimizer, params, backend):
        fused, touched = _fused_step(optimizer, params, stds)
    return Update(optimizer, params, stds, backend, fused, touched)


def fusable(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], backend: str = "auto") -> bool:
    """Whether one pass makes noise and update of these parameters and their gradients, as `noisy_update` says."""
    return _fusable(optimizer, list(params), backend)


@torch.no_grad()
def rehearse(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor],
    source: NoiseSource,
    step: int | Tensor,
    backend: str,
) -> None:
    """Run the fused pass with numbers that change nothing: without gradients, noise, or a move.

    Kernels are loaded then, and tables made, as they must be before a CUDA graph is captured.
    """
    params = list(params)
    step, stream = address(step, STREAM_GRADIENT)
    pairs = list(_with_first_chunk(params))
    fused = FusedStep(
        tensors=[(p, None, None, None) for p in params],
        first_chunks=[first for first, _ in pairs],
        rules=[(0.0, *StepRule())] * len(params),
        cache=_caches.setdefault(optimizer, {}),
    )
    load(_backend_of(fused.tensors, backend)).noisy_step(source.key, step, stream, fused)


def _checked_stds(stds: Iterable[float] | Tensor) -> Stds:
    if isinstance(stds, Tensor):
        if stds.dim() != 1 or not stds.is_floating_point():
            raise ValueError(f"stds must be floating and of shape [parameters], got {_show(stds)}")
        if stds.device.type != "cpu":
            return stds
        stds = stds.tolist()
    return [checked_std(std) for std in stds]


def _check(optimizer: torch.optim.Optimizer, params: list[Tensor], stds: Stds) -> None:
    if len(stds) != len(params):
        raise ValueError(f"stds must be one per parameter, got {len(stds)} for {len(params)} parameters")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must take one gradient per step, got LBFGS, which asks for more of them")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    seen: set[int] = set()
    for i, p in enumerate(params):
        if id(p) not in held:
            raise ValueError(f"params[{i}] must be a parameter of the optimizer, got {_show(p)}")
        if id(p) in seen:
            raise ValueError(f"params[{i}] is there twice: {_show(p)}")
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(f"params[{i}] must have a dense gradient, got {p.grad.layout}")
        if not p.is_floating_point():
            raise ValueError(f"params[{i}] must have a floating dtype, got {_show(p)}")
        seen.add(id(p))
    check_chunks(0, sum(chunks(p.numel()) for p in params))


def _show(p: Tensor) -> str:
    return f"a tensor {list(p.shape)} of {p.dtype}"


def _with_first_chunk(params: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for p in params:
        yield first, p
        first += chunks(p.numel())


# --- any optimizer


def _generic_update(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    stds: Stds,
    source: NoiseSource,
    step: int | Tensor,
    stream: int,
    backend: str,
) -> None:
    updated = {id(p) for p in params}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in updated]
    hidden = [(p, p.grad) for p in others if p.grad is not None]
    absent = [p for p in params if p.grad is None]
    guards = [h for h in optimizer._optimizer_step_pre_hooks.values() if isinstance(h, PrivateStepOnly)]
    try:
        for guard in guards:
            guard.allowed = True
        for p, _ in hidden:
            p.grad = None
        for p in absent:
            p.grad = torch.zeros_like(p)
        for (first, p), std in zip(_with_first_chunk(params), stds, strict=True):
            if is_sharded(p):
                add_noise(source, p, step, stream, std, first, backend)
            else:
                source.normal_(p.grad, step, stream, std, first, add=True, backend=backend)
        if hasattr(optimizer, "note_noise"):
            optimizer.note_noise(params, stds)
        optimizer.step()
    finally:
        for guard in guards:
            guard.allowed = False
        for p, grad in hidden:
            p.grad = grad
        for p in absent:
            p.grad = None


# --- in one pass


def _fusable(optimizer: torch.optim.Optimizer, params: list[Tensor], backend: str = "auto") -> bool:
    # The exact type: a subclass may do anything in its step.
    if type(optimizer) not in RULES:
        return False
    # A hook of the user's, or a gradient scaler's verdict, belongs to optimizer.step().
    hooks = optimizer._optimizer_step_pre_hooks.values(), optimizer._optimizer_step_post_hooks.values()
    if any(not isinstance(hook, PrivateStepOnly) for kind in hooks for hook in kind):
        return False
    if (
        getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
    ):
        return False
    for group in optimizer.param_groups:
        if group.get("amsgrad") or group.get("capturable") or group.get("differentiable"):
            return False
        options = (group["lr"], group["weight_decay"], group.get("momentum"), *group.get("betas", ()))
        if any(isinstance(option, Tensor) for option in options):
            return False
    if not all(is_flat(p) and _grad_and_state_match(optimizer, p) for p in params):
        return False
    return _backend_of([(p,) for p in params], backend) != "reference"


def _grad_and_state_match(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    state = optimizer.state.get(p, {})
    device, shape, stride = p.device, p.shape, p.stride()
    beside = (p, p.grad, *(state.get(name) for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")))
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dtype == torch.float32
        and t.device == device
        and t.shape == shape
        and t.stride() == stride
        for t in beside
        if t is not None
    )


def _backend_of(tensors: Sequence[tuple[Tensor | None, ...]], backend: str) -> str:
    """What updates these, the parameters first; float32 as they are. The reference has no fused update."""
    params = [row[0] for row in tensors]
    if len({p.device for p in params}) > 1:
        return "reference"
    return resolve_backend("noisy_step", backend, *params)


# What backends keep about an optimizer's parameters from step to step.
_caches: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[str, Any]] = weakref.WeakKeyDictionary()


def _fused_step(
    optimizer: torch.optim.Optimizer, params: list[Tensor], stds: Stds
) -> tuple[FusedStep, list[Tensor]]:
    """Begins every parameter's step; returns what is to be done, and the tensors that it changes."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    begin = RULES[type(optimizer)]
    known = stds if isinstance(stds, list) else [None] * len(params)
    tensors, firsts, rules, terms, touched = [], [], [], [], []
    for (first, p), std in zip(_with_first_chunk(params), known, strict=True):
        momentum, square, rule, noise = begin(optimizer, groups[id(p)], p, std)
        tensors.append((p, p.grad, momentum, square))
        firsts.append(first)
        rules.append((0.0 if std is None else std, *rule))
        terms.append(noise)
        touched += [t for t in (p, momentum, square) if t is not None]
    fused = FusedStep(tensors, firsts, rules, cache=_caches.setdefault(optimizer, {}))
    if not isinstance(stds, list):
        fused.stds = rounded_up(stds)
        if any(noise is not None for noise in terms):
            fused.terms, fused.averages = terms, _averages(optimizer, params)
    return fused, touched


def _averages(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Tensor:
    """float64 [P]: the parameters' `noise_sq` in one block of memory, so that one operation moves them all."""
    averages: list[Tensor] = [optimizer.state[p]["noise_sq"] for p in params]
    size, start = averages[0].element_size(), averages[0].data_ptr()
    together = averages[0]._base
    if (
        together is None
        or len(together) != len(params)
        or any(t._base is not together or t.data_ptr() != start + i * size for i, t in enumerate(averages))
    ):
        together = torch.stack([t.to(params[0].device) for t in averages])
        for p, mine in zip(params, together.unbind(), strict=True):
            optimizer.state[p]["noise_sq"] = mine
    return together
