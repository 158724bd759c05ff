"""What tests and benchmarks share: float64 truth by a per-sample loop, and one error metric."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip.engine import PrivacyEngine

__all__ = ["clipped_sum", "mend_interpreter", "private_step", "relative_error", "sample_grads", "square_loss"]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest error relative to the truth's root mean square: free of scale, and of near-zero entries."""
    scale = truth.double().square().mean().sqrt().clamp_min(1e-30)
    return float((ours.double() - truth.double()).abs().max() / scale) if truth.numel() else 0.0


def square_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss with a different, smooth gradient for every sample and position; mean over the batch."""
    return (outputs.flatten(1) * targets.flatten(1) + 0.1 * outputs.flatten(1).square()).sum(1).mean()


def sample_grads(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], *, views: int = 1
) -> dict[str, Tensor]:
    """{name: [B, *shape]} float64 gradients of every trainable parameter, one sample at a time.

    views: rows of x and y that are one sample, one after the other; its loss is `loss` over them.
    """
    model = copy.deepcopy(model).double()
    wide = x.double() if x.is_floating_point() else x
    target = y.double() if y.is_floating_point() else y
    rows: dict[str, list[Tensor]] = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for b in range(0, x.shape[0], views):
        model.zero_grad()
        loss(model(wide[b : b + views]), target[b : b + views]).backward()
        for name, p in model.named_parameters():
            if name in rows:
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def clipped_sum(grads: dict[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """`sum_b min(1, C/|g_b|) g_b` in float64."""
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    factors = (max_grad_norm / norms).clamp_max(1.0)
    return {name: torch.tensordot(factors, g, dims=1) for name, g in grads.items()}


def private_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    max_grad_norm: float,
    reduction: str = "mean",
    **options,
) -> tuple[dict[str, Tensor], Tensor]:
    """One backward of the engine over the whole batch, without noise.

    Returns ({name: clipped sum}, norms [B]); the denominator q N = B is multiplied back.
    """
    engine = PrivacyEngine()
    loader = DataLoader(TensorDataset(x, y), batch_size=x.shape[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    model, optimizer, private = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(parameters, lr=1.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        loss_reduction=reduction,
        **options,
    )
    try:
        for batch_x, batch_y in private:
            loss(model(batch_x), batch_y).backward()
            sums = {
                n: (torch.zeros_like(p) if p.grad is None else p.grad * x.shape[0])
                for n, p in model.named_parameters()
                if p.requires_grad
            }
            norms = optimizer.sample_norms
            break
        return {n: t.detach().clone() for n, t in sums.items()}, norms
    finally:
        engine.detach(model)


@functools.cache
def mend_interpreter() -> None:
    """Let loops have run-time bounds in the interpreter of Triton 3.6 with NumPy 2.4 (triton-lang/triton#9171).

    And let it not work out, for every integer sum and product, whether it overflows: it asserts nothing of that unless
    it debugs, and takes half of a noise kernel's time.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
