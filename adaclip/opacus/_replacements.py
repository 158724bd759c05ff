"""What to do instead of the names of Opacus that are not offered here: the text of the errors."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["raise_attribute_error", "raise_import_error"]

_NO_WRAPPER = (
    "the model is not wrapped: make_private returns the same object, with its own state_dict keys, and "
    "PrivacyEngine.detach() gives it back as it was"
)
_FUSED = "clipping happens at the end of backward(), and step() adds noise and updates in one pass"
_GIVE_LOADER = "give the ordinary DataLoader to make_private, which samples it itself (adaclip.PoissonLoader)"
_PLAIN_RNN = (
    "recurrent layers have no per-sample gradients here: write the cell with torch.nn.Linear (a layer used many "
    "times is one sample's), or stay with Opacus for such models"
)
_ATTENTION = "torch.nn.MultiheadAttention(batch_first=True) is trained privately as it is"
_SPLIT = "use BatchMemoryManager, or make_private(max_batch_size=…)"
_ONE_CLASS = "there is one optimizer class, adaclip.DPOptimizer: clipping= and the engine decide what it does"
_REGISTRY = "modules without a fast path are handled by torch.func (adaclip.layers), and need no registration"
_OLD = "it is of Opacus before 1.0: "

# By the dotted name in Opacus, without the leading "opacus."; a package's re-exports have their own entries.
_INSTEAD: dict[str, str] = {
    "GradSampleModule": _NO_WRAPPER,
    "GradSampleModuleFastGradientClipping": _NO_WRAPPER,
    "accountants.GaussianAccountant": (
        "its figure is usually below the true epsilon; adaclip.accounting.gdp_epsilon computes it for display, and "
        "PRVAccountant and RDPAccountant give bounds"
    ),
    "accountants.register_accountant": (
        "subclass adaclip.accounting.Accountant, and read it from adaclip.accounting.Ledger.events"
    ),
    "accountants.IAccountant.get_optimizer_hook_fn": (
        "the engine books every release itself before its noise is drawn; a hook would book it twice"
    ),
    "data_loader.DPDataLoader": _GIVE_LOADER,
    "data_loader.switch_generator": "sampling and noise always come from the operating system's keys",
    "distributed.average_gradients": "the engine reduces the clipped sums itself",
    "grad_sample.GradSampleModule": _NO_WRAPPER,
    "grad_sample.AbstractGradSampleModule": _NO_WRAPPER,
    "grad_sample.GradSampleModuleFastGradientClipping": _NO_WRAPPER,
    "grad_sample.GradSampleModuleExpandedWeights": _NO_WRAPPER,
    "grad_sample.GradSampleModuleNoOp": "adaclip.functional.clip_and_noise takes per-sample gradients of your own",
    "grad_sample.register_grad_sampler": _REGISTRY,
    "grad_sample.register_norm_sampler": _REGISTRY,
    "grad_sample.wrap_model": _NO_WRAPPER,
    "grad_sample.functorch.prepare_layer": _REGISTRY,
    "grad_sample.functorch.ft_compute_per_sample_gradient": "write torch.func.vmap(torch.func.grad(loss))",
    "layers.DPLSTM": _PLAIN_RNN,
    "layers.DPGRU": _PLAIN_RNN,
    "layers.DPRNN": _PLAIN_RNN,
    "layers.DPMultiheadAttention": _ATTENTION,
    "layers.SequenceBias": "it is a part of Opacus's attention: " + _ATTENTION,
    "lightning.DPLightningDataModule": _GIVE_LOADER,
    "optimizers.AdaClipDPOptimizer": _ONE_CLASS,
    "optimizers.DPPerLayerOptimizer": _ONE_CLASS,
    "optimizers.DistributedDPOptimizer": _ONE_CLASS,
    "optimizers.DPOptimizerFastGradientClipping": _ONE_CLASS,
    "optimizers.get_optimizer_class": _ONE_CLASS,
    "optimizers.DPOptimizer.accumulate": _FUSED,
    "optimizers.DPOptimizer.add_noise": _FUSED,
    "optimizers.DPOptimizer.attach_step_hook": (
        "accounting cannot be hooked away; optimizer.register_step_post_hook runs a function after every release"
    ),
    "optimizers.DPOptimizer.clip_and_accumulate": _FUSED,
    "optimizers.DPOptimizer.generator": "noise comes from ChaCha20 with a key of the operating system",
    "optimizers.DPOptimizer.grad_samples": (
        "per-sample gradients are not formed where their norms suffice; optimizer.sample_norms holds the norms"
    ),
    "optimizers.DPOptimizer.pre_step": _FUSED,
    "optimizers.DPOptimizer.scale_grad": _FUSED,
    "optimizers.DPOptimizer.signal_skip_step": _SPLIT,
    "optimizers.DPOptimizer.step_hook": "optimizer.register_step_post_hook runs a function after every release",
    "privacy_engine.PrivacyEngine.attach": _OLD + "call make_private",
    "privacy_engine.PrivacyEngine.get_privacy_spent": _OLD + "call get_epsilon(delta)",
    "privacy_engine.PrivacyEngine.secure_rng": "noise and sampling come from ChaCha20 with keys of their own",
    "privacy_engine.PrivacyEngine.step": _OLD + "optimizer.step() does it",
    "privacy_engine.PrivacyEngine.steps": _OLD + "len(privacy_engine.accountant) counts the releases",
    "privacy_engine.PrivacyEngine.virtual_step": _OLD + _SPLIT,
    "utils.batch_memory_manager.BatchSplittingSampler": _SPLIT,
    "utils.batch_memory_manager.wrap_data_loader": _SPLIT,
    "utils.uniform_sampler.UniformWithReplacementSampler": _GIVE_LOADER,
    "utils.uniform_sampler.DistributedUniformWithReplacementSampler": _GIVE_LOADER,
    "validators.register_module_validator": "adaclip.validate finds the problems by what a module computes with",
    "validators.register_module_fixer": "change the model before make_private; adaclip.fix does the usual repairs",
}


def _instead(name: str) -> str | None:
    text = _INSTEAD.get(name)
    return None if text is None else f"opacus.{name} has no counterpart in adaclip: {text}"


def raise_import_error(module: str, name: str) -> NoReturn:
    """For a module's `__getattr__`. An ImportError passes through `from module import name` with its text."""
    text = _instead(f"{module}.{name}".removeprefix("adaclip.opacus."))
    if text is not None:
        raise ImportError(text)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def raise_attribute_error(owner: object, dotted: str, name: str) -> NoReturn:
    """For the `__getattr__` of an object that stands for Opacus's `dotted`."""
    text = _instead(f"{dotted}.{name}")
    raise AttributeError(text or f"{type(owner).__name__!r} object has no attribute {name!r}")
