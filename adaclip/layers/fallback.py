"""Any other module with parameters: its per-sample gradients by vmap over the module itself.

Right for every module that treats samples independently, along dimension 0, without randomness; and
that is checked at every backward: the module run one sample at a time must give the outputs it gave
on the batch. Slower than a supported layer (one more forward and backward of the module).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaclip import ops
from adaclip.layers.base import Layer, sum_views
from adaclip.layers.tape import Tape, Use
from adaclip.shards import whole

__all__ = ["FallbackLayer"]


class _Watch(torch.autograd.Function):
    """Identity on a module's outputs; its backward records their gradients."""

    @staticmethod
    def forward(ctx, layer: FallbackLayer, call: _Call, anchor: Tensor, *outputs: Tensor):
        ctx.layer, ctx.call, ctx.forward_count = layer, call, layer.slot.tape.call_number()
        ctx.set_materialize_grads(True)
        # Copies, not views: autograd forbids changing a view in place here, and a ReLU may follow.
        return tuple(t.clone() for t in outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        layer, call = ctx.layer, ctx.call
        layer.slot.tape.on_record()
        layer.slot.uses.append(CallUse([*grads], ctx.forward_count, call=call))
        return None, None, None, *grads


class _Call:
    """The arguments of one call, and the outputs that carry gradients."""

    def __init__(self, args, kwargs, outputs: list[Tensor]):
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        self.outputs = [t.detach() for t in outputs]
        # A backward usually runs after the user's autocast has ended; the module must run as it did.
        self._device = outputs[0].device
        self._autocast = ops.autocast_dtype(self._device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The autocast, or its absence, that the call was made under."""
        kind = self._device.type
        if not torch.amp.is_autocast_available(kind):
            return contextlib.nullcontext()
        active = self._autocast is not None
        # No cache: it would keep the tensors of one transformation for the next.
        return torch.autocast(kind, dtype=self._autocast, enabled=active, cache_enabled=False)

    def batched(self, batch: int) -> list[list[bool]]:
        """Guesses of which arguments belong to the samples, the likeliest first; the others are shared by all.

        A tensor whose first dimension is the batch belongs to the samples, and an attention mask [T, T] does
        not. Where T happens to be the batch size only a trial tells: without the tensors of another number of
        dimensions than the first one, then with the first one alone.
        """
        sized = [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch for t in self.leaves]
        if not any(sized):
            return [sized]
        first = sized.index(True)
        like_first = [
            b and t.dim() == self.leaves[first].dim() for t, b in zip(self.leaves, sized, strict=True)
        ]
        alone = [i == first for i in range(len(sized))]
        guesses = []
        for guess in (sized, like_first, alone):
            if guess not in guesses:
                guesses.append(guess)
        return guesses


@dataclass(kw_only=True)
class CallUse(Use):
    """tensors: the gradients of the call's outputs."""

    call: _Call


class _Body(nn.Module):
    """A module's forward without its hooks, which the call around it has run.

    Pre-hooks run for what they set on the module (weight_norm's weight, from parameters that are replaced
    here); what they make of the arguments is here already.
    """

    def __init__(self, module: nn.Module, original):
        super().__init__()
        self.module = module
        self._original = original

    def forward(self, *args, **kwargs):
        for key, hook in self.module._forward_pre_hooks.items():
            if key in self.module._forward_pre_hooks_with_kwargs:
                hook(self.module, args, kwargs)
            else:
                hook(self.module, args)
        return self._original(*args, **kwargs)


class FallbackLayer(Layer):
    """Answers for every parameter below the module, its children's included."""

    capturable = False  # what compares the outputs with the batch's is read back

    def __init__(self, name: str, module: nn.Module, tape: Tape, root: nn.Module, backend: str):
        super().__init__(name, module, tape, root, backend)
        self._inside = False

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    @torch.compiler.disable(reason="adaclip runs this module once more in its backward, one sample at a time")
    def __call__(self, *args, **kwargs):
        if self._inside:
            return self.original(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _functional(self, params: dict[str, Tensor], args, kwargs):
        self._inside = True
        try:
            body = _Body(self.module, self.original)
            named = {f"module.{k}": p for k, p in params.items()}
            return torch.func.functional_call(body, named, args, kwargs)
        finally:
            self._inside = False

    def forward(self, *args, **kwargs):
        detached = {k: p.detach() for k, p in self.module.named_parameters()}
        result = self._functional(detached, args, kwargs)
        leaves, spec = pytree.tree_flatten(result)
        carriers = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        if not carriers:
            raise ValueError(f"{self.name or 'the model'} returned no floating-point tensor to learn from")
        outputs = [leaves[i] for i in carriers]
        # The anchor makes autograd ask for the backward even when no input needs a gradient.
        anchor = torch.empty(0, requires_grad=True)
        watched = _Watch.apply(self, _Call(args, kwargs, outputs), anchor, *outputs)
        for i, t in zip(carriers, watched, strict=True):
            leaves[i] = t
        return pytree.tree_unflatten(leaves, spec)

    def sample_grads(self, use: CallUse, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        problem: RuntimeError | None = None
        values = {k: whole(p) for k, p in self.module.named_parameters()}
        for batched in use.call.batched(use.tensors[0].shape[0]):
            try:
                rows = self._sample_grads(use, wanted, values, batched)
                return {p: sum_views(grads, use.views) for p, grads in rows.items()}
            except RuntimeError as error:
                problem = problem or error
        raise problem

    def _sample_grads(
        self, use: CallUse, wanted: set[nn.Parameter], values: dict[str, Tensor], batched: list[bool]
    ) -> dict[nn.Parameter, Tensor]:
        """The rows' gradients if the rows' arguments are those; RuntimeError if the outputs are others."""
        call, grads = use.call, use.tensors
        named = dict(self.module.named_parameters())
        learned = {k: values[k] for k, p in named.items() if p in wanted}
        frozen = {k: values[k] for k, p in named.items() if p not in wanted}

        def loss(params, leaves, outs):
            leaves = [t.unsqueeze(0) if b else t for t, b in zip(leaves, batched, strict=True)]
            args, kwargs = pytree.tree_unflatten(leaves, call.spec)
            result = pytree.tree_leaves(self._functional({**params, **frozen}, args, kwargs))
            made = [t for t in result if isinstance(t, Tensor) and t.is_floating_point()]
            made = [t.squeeze(0) if t.dim() > 0 else t for t in made]
            if [t.shape for t in made] != [g.shape for g in outs]:
                raise RuntimeError("one sample gives outputs of other shapes than its share of the batch's")
            return sum((t * g).sum() for t, g in zip(made, outs, strict=True)), made

        per_sample = torch.func.vmap(
            torch.func.grad(loss, has_aux=True),
            in_dims=(None, [0 if b else None for b in batched], 0),
            randomness="error",
        )
        try:
            with torch.enable_grad(), call.autocast():
                found, made = per_sample(learned, call.leaves, grads)
        # ValueError: an output has another first dimension than the batch.
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"{self.name or 'the model'} ({type(self.module).__name__}) cannot be run one sample at a "
                "time, so its per-sample gradients are unknown. Where it is random (dropout, stochastic depth), "
                f"set its rate to 0: {error}"
            ) from error
        for one, batch in zip(made, call.outputs, strict=True):
            # 16-bit outputs are only known to their own precision.
            tolerance = max(1e-3, 4 * torch.finfo(batch.dtype).eps)
            finite = batch.isfinite()
            scale = torch.where(finite, batch, 0).abs().amax().clamp_min(1e-3) if batch.numel() else 1.0
            if not bool((((one - batch).abs() <= tolerance * scale) | ~finite).all()):
                raise RuntimeError(
                    f"{self.name or 'the model'} ({type(self.module).__name__}) gives other outputs one "
                    "sample at a time than on the batch: it mixes samples, is random (dropout, stochastic depth: "
                    "set its rate to 0), or does not keep them along dimension 0. Its gradients cannot be made "
                    "private per sample"
                )
        return {named[k]: v.detach() for k, v in found.items()}
