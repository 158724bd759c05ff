"""What in a model forbids per-sample gradients, and the repair of what can be repaired.

A model can be trained privately if the output for one sample depends on that sample and the parameters
alone, and nothing but the optimizer writes to what is kept between steps.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from adaclip.layers.frozen_norm import FrozenBatchNorm

__all__ = ["fix", "validate"]

_FIX = "adaclip.fix(model)"
# At most this many groups, and no fewer channels in one: statistics over less are too noisy.
_MAX_GROUPS = 32
_MIN_CHANNELS = 4
# In place of a trained BatchNorm: the more channels, the nearer a sample's statistics are to the running ones.
_MIN_CHANNELS_TRAINED = 16


def validate(model: nn.Module) -> list[str]:
    """Find what would make private training of ``model`` wrong or impossible.

    Reported, in training and in evaluation mode alike:

    - BatchNorm of any kind (1d, 2d, 3d, synchronized, lazy). Not reported is one of torch's own that is in evaluation
      mode while the model is in training mode: it is frozen on purpose. `PrivacyEngine.make_private` keeps it so,
      whatever `train()` sets later, and its running statistics must come from public data;
    - InstanceNorm that tracks running statistics;
    - Embedding and EmbeddingBag with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``;
    - RNN, LSTM, GRU and their cells, where they are trained: torch cannot run them one sample at a time;
    - modules that keep the batch along another dimension than 0 or work along it: MultiheadAttention and frozen
      RNN, LSTM and GRU without ``batch_first``, Softmax, LogSoftmax and Softmin over ``dim=0``, Flatten from
      ``start_dim=0``;
    - spectral norm, and other parametrizations with a state that their forward may change;
    - lazy modules whose parameters have no shape yet;
    - a model with nothing to train.

    What a module of your own does in its forward is not seen.

    Returns:
        one sentence for each problem: which module, why, and the cure. Empty if none was found.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check(model)
    problems = [
        f"{name or 'the model itself'} ({type(module).__name__}) {problem}"
        for name, module in model.named_modules()
        for problem in _problems(module, model.training)
    ]
    if not any(p.requires_grad for p in model.parameters()):
        problems.append("the model has no parameter to train: set requires_grad on some")
    return problems


def _problems(module: nn.Module, training: bool) -> Iterator[str]:
    if isinstance(module, _BatchNorm) and not (training and _is_frozen(module)):
        cure = "replace it by hand" if _kind_of(module) is None else f"{_FIX} puts GroupNorm in its place"
        if _kind_of(module) is not None and module.running_mean is not None:
            cure += ", or its running statistics, if they come from public data, with batch_norm='frozen'"
        yield f"mixes the samples of a batch in its statistics: {cure}"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        yield f"keeps running statistics of private samples without noise: {_FIX} turns them off"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            yield f"rescales its weight by the samples it sees, without noise (max_norm): {_FIX} turns that off"
        if module.scale_grad_by_freq:
            yield f"scales a gradient by the batch's other samples (scale_grad_by_freq): {_FIX} turns that off"
        if module.sparse:
            yield f"makes sparse gradients, and noise is dense (sparse): {_FIX} turns that off"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and any(p.requires_grad for p in module.parameters()):
        yield "has no per-sample gradients: freeze it, or write its cell with torch.nn.Linear"
    elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first:
        yield "keeps the batch along dimension 1: make it with batch_first=True"
    if isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin)) and module.dim == 0:
        yield "normalizes over the samples of a batch (dim=0): give it the dimension of the classes"
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        yield "joins the samples of a batch (start_dim=0): make it with start_dim=1"
    for name in _stateful_parametrizations(module):
        yield (
            f"has a {name} whose buffers its forward changes, so a sample's gradient depends on the forwards "
            f"before it: remove it (torch.nn.utils.remove_spectral_norm or parametrize.remove_parametrizations)"
        )
    if _shapeless(module):
        yield "has parameters without a shape yet: run one batch of public or random data through the model"


def _shapeless(module: nn.Module) -> bool:
    return any(is_lazy(p) for p in module.parameters(recurse=False)) or (
        isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    )


def _stateful_parametrizations(module: nn.Module) -> Iterator[str]:
    """Names of the parametrizations and hooks known to write to buffers in a forward."""
    if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        yield "spectral norm"
    if parametrize.is_parametrized(module):
        for chain in module.parametrizations.values():
            for step in chain:
                # An orthogonal parametrization's buffer is its constant base.
                kind = type(step).__name__.lstrip("_")
                if kind != "Orthogonal" and any(True for _ in step.buffers()):
                    yield f"parametrization ({kind})"


# A BatchNorm that runs dropout and an activation itself, in timm's models; its class, without a dependency on timm.
_WITH_ACTIVATION = "BatchNormAct2d"


def _kind_of(module: _BatchNorm) -> str | None:
    """How its forward is known: "plain" (torch's own), "activation"; None if it is not."""
    patched = "forward" in module.__dict__ or parametrize.is_parametrized(module)
    if patched or not module._parameters.keys() <= {"weight", "bias"}:
        return None
    torch_own = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
    if any(type(module).forward is kind.forward for kind in torch_own) or isinstance(module, LazyModuleMixin):
        return "plain"
    if type(module).__name__ == _WITH_ACTIVATION and module._modules.keys() >= {"drop", "act"}:
        return "activation"
    return None


def _is_frozen(module: _BatchNorm) -> bool:
    """Whether it is torch's own, and normalizes by its running statistics."""
    return not module.training and module.running_mean is not None and _kind_of(module) == "plain"


def fix(model: nn.Module, *, batch_norm: str = "group") -> nn.Module:
    """A copy of ``model`` that can be trained privately, where that can be had by changing settings.

    ``model`` is left as it is; the copy shares nothing with it (make the optimizer from the copy's
    parameters). In the copy:

    - every BatchNorm that ``validate`` reports is replaced, as ``batch_norm`` says (below). An instance used in two
      places stays shared, hooks on it are gone. Those of timm that run an activation themselves become
      ``Sequential(norm, drop, act)``;
    - InstanceNorm tracks no running statistics;
    - Embedding and EmbeddingBag have max_norm=None, scale_grad_by_freq=False, sparse=False;
    - activations and dropouts with ``inplace=True`` (torch.nn's own and any other module with that attribute)
      work out of place: the output of a module that needs the generic per-sample gradient must not be
      overwritten.

    Everything else is left: what ``validate`` still reports needs your decision.

    Args:
        batch_norm: what a BatchNorm becomes. Both keep the parameters (device, dtype, requires_grad, sharing), eps,
          the training flag, and the state dict's keys of weight and bias.

          "group": a GroupNorm of g groups, g the largest divisor of its channels that is at most 32 and leaves 4
          channels or more in a group, 16 if its statistics have been trained (1 if there is none). Statistics are
          those of the sample at hand. Weight and bias are re-fitted to the running statistics, so that a sample whose
          channels have these means and variances gets the BatchNorm's output: with m, v of a channel and M, V those
          of its whole group, weight' = weight sqrt((V + eps)/(v + eps)), bias' = bias + weight (M - m)/sqrt(v + eps).
          A fresh BatchNorm (m = 0, v = 1) keeps its parameters, and so does one whose parameters are another
          module's too. The running statistics are gone.

          "frozen": an `adaclip.layers.FrozenBatchNorm`, which normalizes by the running statistics in every mode:
          exactly the model's outputs in evaluation mode. For fine-tuning of a pretrained model; a fresh one would
          not be normalized at all.

          Test accuracy of small ResNets trained on MNIST / CIFAR-10 for 1 to 3 minutes, before any fine-tuning:
          BatchNorm, and "frozen", 94.1 / 57.5 %; "group" 85.6 / 47.8 % (of 4 channels each it would have been 75.0 /
          34.6 %); GroupNorm with the weights as they are 18.9 / 15.5 %. After 30 private steps (256 of 8,000 images,
          noise 1, rate 0.25) from the MNIST network "frozen" 93.8 and "group" 91.3 %; on inverted digits, which its
          statistics do not fit, 27.5 and 33.0 %.

    Privacy: both put the running statistics into the model, and nothing protects the examples that they were computed
    from. They must come from public data, like the weights. A model that has seen private data in training mode:
    call `reset_running_stats()` on its BatchNorms first.

    Returns:
        the copy; a model that needs nothing gives an equal copy (so ``fix`` is idempotent).

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a lazy module in it has no shape yet, so that it cannot be copied; ``batch_norm`` is unknown, or
            "frozen" and there is a BatchNorm without running statistics.
    """
    _check(model)
    if batch_norm not in _REPLACEMENTS:
        raise ValueError(f"batch_norm must be one of {sorted(_REPLACEMENTS)}, got {batch_norm!r}")
    for name, module in model.named_modules():
        if _shapeless(module):
            raise ValueError(
                f"model must have all its shapes, got {name or 'itself'} ({type(module).__name__}) without: run "
                "one batch of public or random data through it first"
            )
        if batch_norm == "frozen" and isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"batch_norm must be 'group', got 'frozen': {name or 'the model'} ({type(module).__name__}) keeps no "
                "running statistics"
            )
    root = nn.Module()
    root.model = copy.deepcopy(model)
    owners = Counter(p for module in root.modules() for p in module._parameters.values() if p is not None)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, _BatchNorm) or _kind_of(child) is None:
                continue
            if model.training and _is_frozen(child):
                continue
            if child not in made:
                shared = any(owners[p] > 1 for p in child.parameters(recurse=False))
                made[child] = _with_activation(child, _REPLACEMENTS[batch_norm](child, shared))
            parent._modules[name] = made[child]
    for module in root.modules():
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.max_norm, module.scale_grad_by_freq, module.sparse = None, False, False
        if getattr(module, "inplace", None) is True:
            module.inplace = False
    return root.model


def _with_activation(batch_norm: _BatchNorm, norm: nn.Module) -> nn.Module:
    norm.train(batch_norm.training)
    if _kind_of(batch_norm) == "plain":
        return norm
    parts = OrderedDict(norm=norm, drop=batch_norm.drop, act=batch_norm.act)
    return nn.Sequential(parts).train(batch_norm.training)


def _group_norm(batch_norm: _BatchNorm, shared: bool) -> nn.GroupNorm:
    channels = batch_norm.num_features
    most = min(_MAX_GROUPS, channels // (_MIN_CHANNELS_TRAINED if _is_trained(batch_norm) else _MIN_CHANNELS))
    groups = max((g for g in range(1, most + 1) if channels % g == 0), default=1)
    made = nn.GroupNorm(groups, channels, batch_norm.eps, affine=False)
    # The parameters themselves move over: device, dtype, requires_grad and sharing need no copying.
    made.affine, made.weight, made.bias = batch_norm.affine, batch_norm.weight, batch_norm.bias
    if _is_trained(batch_norm) and not shared:
        _refit(made, batch_norm)
    return made


def _is_trained(batch_norm: _BatchNorm) -> bool:
    """Whether it has running statistics other than those that it is made with."""
    mean, var = batch_norm.running_mean, batch_norm.running_var
    return mean is not None and not mean.is_meta and bool((mean != 0).any() | (var != 1).any())


@torch.no_grad()
def _refit(norm: nn.GroupNorm, batch_norm: _BatchNorm) -> None:
    """Set weight and bias to what gives the BatchNorm's output on a sample with its running statistics."""
    mean, var = batch_norm.running_mean.double(), batch_norm.running_var.double()
    means = mean.reshape(norm.num_groups, -1)
    whole = means.mean(1, keepdim=True)
    # The variance in a group is the mean of its channels' plus that of their means.
    spread = var.reshape(norm.num_groups, -1).mean(1, keepdim=True) + (means - whole).square().mean(
        1, keepdim=True
    )
    whole, spread = (t.expand_as(means).reshape(-1) for t in (whole, spread))
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    bias = bias + weight * (whole - mean) / (var + norm.eps).sqrt()
    # One root of the ratio: it is exactly 1 for a fresh BatchNorm.
    weight = weight * ((spread + norm.eps) / (var + norm.eps)).sqrt()
    if norm.affine:
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    else:
        # There were none to train: these are not trained either.
        norm.affine = True
        like = batch_norm.running_mean
        norm.weight, norm.bias = (nn.Parameter(t.to(like), requires_grad=False) for t in (weight, bias))


def _frozen_norm(batch_norm: _BatchNorm, shared: bool) -> FrozenBatchNorm:
    made = FrozenBatchNorm(batch_norm.num_features, batch_norm.eps, affine=False)
    made.affine, made.weight, made.bias = batch_norm.affine, batch_norm.weight, batch_norm.bias
    made.running_mean, made.running_var = batch_norm.running_mean, batch_norm.running_var
    return made


_REPLACEMENTS = {"group": _group_norm, "frozen": _frozen_norm}


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
