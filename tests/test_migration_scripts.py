"""What scripts for Opacus touch beside the loop does on adaclip.opacus what it says, or names what replaces it."""

import pytest
import torch
from opacus_style import CLASSES, KEY, loader, network, private, train
from torch import nn
from two_processes import run

import adaclip
from adaclip.groups import LabelGroups
from adaclip.opacus import PrivacyEngine
from adaclip.opacus.optimizers import DPOptimizer
from adaclip.opacus.utils.batch_memory_manager import BatchMemoryManager
from adaclip.opacus.validators import ModuleValidator
from adaclip.opacus.validators.errors import IllegalModuleConfigurationError

opacus = pytest.importorskip("opacus", reason="what is compared with")


def test_large_batches_in_pieces():
    """The sum of the pieces is the sum of the batch, booked once."""
    from opacus.utils.batch_memory_manager import wrap_data_loader

    whole = private(noise_multiplier=0.0, noise_generator=KEY)
    train(*whole[1:])
    engine, model, optimizer, ours = private(noise_multiplier=0.0, noise_generator=KEY)
    with BatchMemoryManager(data_loader=ours, max_physical_batch_size=3, optimizer=optimizer) as pieces:
        assert len(pieces) == len(
            wrap_data_loader(
                data_loader=opacus.data_loader.DPDataLoader.from_data_loader(loader()),
                max_batch_size=3,
                optimizer=None,
            )
        )
        assert pieces.dataset is ours.dataset
        sizes = []
        for x, y in pieces:
            sizes.append(len(x))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert max(sizes) == 3
    assert len(engine.accountant) == 7
    for a, b in zip(model.parameters(), whole[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert max(len(x) for x, _ in ours) > 3
    with pytest.raises(TypeError, match="data_loader must be the one that make_private returned"):
        BatchMemoryManager(data_loader=loader(), max_physical_batch_size=3, optimizer=optimizer)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BatchMemoryManager(data_loader=ours, max_physical_batch_size=0, optimizer=optimizer)


def test_empty_batches_are_releases():
    engine, model, optimizer, ours = private(
        data=loader(50, 1), max_grad_norm=[0.1] * 7, clipping="per_layer"
    )
    empty = 0
    with BatchMemoryManager(data_loader=ours, max_physical_batch_size=1, optimizer=optimizer) as pieces:
        for x, y in pieces:
            empty += ours.current.rows == 0
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert empty > 3
    assert engine.accountant.history == [(1.0, 1 / 50, 50)]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_private_model_has_a_functional_form():
    from adaclip.opacus.grad_sample.functorch import make_functional

    _, model, _, _ = private()
    function, params = make_functional(model)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(function(params, x), network()(x))


def test_a_loader_is_made_private_again_for_another_run():
    _, _, _, first = private()
    _, _, optimizer, second = private(data=first)
    assert second is not first
    assert second.sample_rate == first.sample_rate
    assert optimizer.expected_batch_size == 7


def test_without_wrapping_comes_a_handle():
    model = network()
    hooks, optimizer, ours = private(model=model, wrap_model=False, rand_on_empty=True)[1:]
    train(model, optimizer, ours)
    hooks.cleanup()
    model(torch.randn(1, 1, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="was not clipped"):
        optimizer.step()


def test_ghost_mode_returns_the_criterion():
    engine, model, optimizer, criterion, ours = private(grad_sample_mode="ghost")
    assert isinstance(criterion, nn.CrossEntropyLoss)
    train(model, optimizer, ours, criterion)
    assert len(engine.accountant) == 7
    mine = nn.CrossEntropyLoss(reduction="none")
    made = private(grad_sample_mode="ghost", criterion=mine, loss_reduction="sum")
    assert (made[3].reduction, mine.reduction) == ("sum", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_first": False}, "batch_first must be True"),
        ({"grad_sample_mode": "no_op"}, "clip_and_noise"),
        ({"grad_sample_mode": "magic"}, "grad_sample_mode must be one of"),
        ({"loss_reduction": "sum", "clipping": "adaptive"}, "loss_reduction must be 'mean'"),
        (
            {"loss_reduction": "sum", "groups": LabelGroups(groups=CLASSES)},
            "loss_reduction must be 'mean' for label",
        ),
        ({"clipping": "adaptive", "unclipped_num_std": 2.0}, "all or none of"),
        ({"unclipped_num_std": 2.0}, "must come with clipping='adaptive'"),
        ({"max_grad_nrom": 1.0}, "max_grad_nrom"),
        ({"data": loader(4, 8, drop_last=True)}, "at least 1 batch"),
        ({"data": [1, 2]}, "torch.utils.data.DataLoader, got list"),
    ],
)
def test_refused_before_anything_changes(options, message):
    model = network()
    with pytest.raises((ValueError, TypeError), match=message):
        private(model=model, **options)
    private(model=model)


def test_secure_mode_has_no_seed():
    engine = PrivacyEngine(secure_mode=True)
    with pytest.raises(ValueError, match="noise_generator must be None with secure_mode"):
        private(engine, noise_generator=KEY)
    _, model, optimizer, ours = private(engine)
    assert optimizer.secure_mode
    train(model, optimizer, ours)


def test_adaptive_clipping_is_translated():
    options = {
        "target_unclipped_quantile": 0.3,
        "clipbound_learning_rate": 0.5,
        "max_clipbound": 1.1,
        "min_clipbound": 0.9,
        "unclipped_num_std": 2.0,
    }
    _, model, optimizer, ours = private(clipping="adaptive", noise_multiplier=1.5, **options)
    # Theorem 1 of Andrew et al. 2021, which Opacus computes as well.
    assert optimizer.gradient_noise_multiplier == pytest.approx((1.5**-2 - 4.0**-2) ** -0.5, rel=1e-9)
    assert (optimizer.clipping.quantile, optimizer.clipping.rate) == (0.3, 0.5)
    for _ in range(3):
        train(model, optimizer, ours)
    norms = optimizer.clipping.history
    assert 0.9 <= norms.min() < norms.max() <= 1.1
    # The bounds are what holds it: the same run without them goes further.
    options |= {"max_clipbound": 100.0, "min_clipbound": 0.01}
    _, model, optimizer, ours = private(clipping="adaptive", noise_multiplier=1.5, **options)
    for _ in range(3):
        train(model, optimizer, ours)
    assert not bool(((optimizer.clipping.history >= 0.9) & (optimizer.clipping.history <= 1.1)).all())


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 3.0), (0.1, 0.5), (0.0, 2.0), (0.5,)])
def test_bounds_of_an_adaptive_norm(bounds):
    with pytest.raises(ValueError, match="bounds must be"):
        adaclip.clipping.AdaptiveClipping(1.0, bounds=bounds)


SCHEDULERS = [
    ("ExponentialNoise", "noise_multiplier", {"gamma": 0.9}),
    ("StepNoise", "noise_multiplier", {"step_size": 2, "gamma": 0.5}),
    ("LambdaNoise", "noise_multiplier", {"noise_lambda": lambda epoch: 1 / (epoch + 1)}),
    ("ExponentialGradClip", "max_grad_norm", {"gamma": 0.9}),
    ("StepGradClip", "max_grad_norm", {"step_size": 2, "gamma": 0.5}),
    ("LambdaGradClip", "max_grad_norm", {"scheduler_function": lambda epoch: 1 / (epoch + 1)}),
]


@pytest.mark.parametrize(("name", "attribute", "options"), SCHEDULERS)
def test_schedulers(name, attribute, options):
    from adaclip.opacus import schedulers

    _, model, optimizer, ours = private()
    other = network()
    _, theirs, _ = opacus.PrivacyEngine().make_private(
        module=other,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    mine = getattr(schedulers, name)(optimizer, **options)
    wanted = getattr(opacus.schedulers, name)(theirs, **options)
    for epoch in range(5):
        assert getattr(optimizer, attribute) == pytest.approx(getattr(theirs, attribute), rel=1e-12)
        train(model, optimizer, ours, steps=1)
        if epoch == 2:
            # Neither the optimizer nor a function is in the state.
            state = mine.state_dict()
            assert all(isinstance(v, (int, float)) for v in state.values())
            mine = getattr(schedulers, name)(optimizer, **options)
            mine.load_state_dict(state)
        mine.step()
        wanted.step()
    with pytest.raises(TypeError, match="the one that make_private returned"):
        getattr(schedulers, name)(torch.optim.SGD(other.parameters(), lr=0.1), **options)


def test_a_scheduled_noise_is_booked_as_it_is():
    from adaclip.opacus.schedulers import ExponentialNoise

    engine, model, optimizer, ours = private()
    scheduler = ExponentialNoise(optimizer, gamma=0.5)
    train(model, optimizer, ours)
    scheduler.step()
    train(model, optimizer, ours)
    assert engine.accountant.history == [(1.0, 1 / 7, 7), (0.5, 1 / 7, 7)]


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_the_noise_follows_a_norm_that_is_set(clipping):
    norm = 1.0 if clipping == "flat" else [0.1 * (k + 1) for k in range(7)]
    _, model, optimizer, ours = private(clipping=clipping, max_grad_norm=norm)
    before, scale = optimizer.max_grad_norm, optimizer.clipping.noise_scale().clone()
    thresholds = optimizer.clipping.thresholds.clone()
    optimizer.max_grad_norm = before / 4
    assert optimizer.max_grad_norm == pytest.approx(before / 4, rel=1e-12)
    assert torch.allclose(optimizer.clipping.thresholds, thresholds / 4)
    assert torch.allclose(optimizer.clipping.noise_scale(), scale / 4)
    x, y = next(iter(ours))
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"after step\(\) and before the next backward"):
        optimizer.max_grad_norm = before
    optimizer.step()
    for wrong in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_grad_norm must be a positive finite number"):
            optimizer.max_grad_norm = wrong
    adaptive = private(clipping="adaptive", noise_multiplier=0.5)[2]
    with pytest.raises(ValueError, match="left to the 'adaptive' clipping"):
        adaptive.max_grad_norm = 2.0


def test_optimizer_attributes():
    _, model, optimizer, _ = private()
    assert isinstance(optimizer, DPOptimizer)
    assert isinstance(optimizer, adaclip.DPOptimizer)
    assert optimizer.params == list(model.parameters())
    assert optimizer.accumulated_iterations == 1
    for name, instead in [
        ("attach_step_hook", "register_step_post_hook"),
        ("grad_samples", "sample_norms"),
        ("signal_skip_step", "BatchMemoryManager"),
        ("pre_step", "one pass"),
        ("generator", "ChaCha20"),
    ]:
        with pytest.raises(AttributeError, match=instead):
            getattr(optimizer, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = optimizer.no_such


def test_a_step_hook():
    """What is said to replace attach_step_hook runs once a release, and keeps the books."""
    engine, model, optimizer, ours = private()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(len(engine.accountant)))
    train(model, optimizer, ours)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_old_names_say_what_replaces_them():
    engine = PrivacyEngine()
    for name, instead in [
        ("steps", r"len\(privacy_engine.accountant\)"),
        ("attach", "make_private"),
        ("get_privacy_spent", "get_epsilon"),
        ("virtual_step", "BatchMemoryManager"),
    ]:
        with pytest.raises(AttributeError, match=instead):
            getattr(engine, name)


def test_validation():
    bad = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16))
    engine = PrivacyEngine()
    assert ModuleValidator.is_valid(network())
    assert not ModuleValidator.is_valid(bad)
    assert not engine.is_compatible(module=bad, optimizer=None, data_loader=None)
    problems = ModuleValidator.validate(bad, strict=False)
    assert [type(p) for p in problems] == [adaclip.UnsupportedModuleError]
    with pytest.raises(IllegalModuleConfigurationError, match="GroupNorm"):
        engine.validate(module=bad, optimizer=None, data_loader=None)
    for fixed in (ModuleValidator.fix(bad), engine.get_compatible_module(bad)):
        assert isinstance(fixed[1], nn.GroupNorm)
        engine.validate(module=fixed, optimizer=None, data_loader=None)
    assert isinstance(bad[1], nn.BatchNorm2d)


@pytest.mark.parametrize("tracked", [True, False])
def test_make_functional(tracked):
    from opacus.grad_sample.functorch import make_functional as theirs

    from adaclip.opacus.grad_sample.functorch import make_functional

    model, x = network(), torch.randn(2, 1, 8, 8)
    function, params = make_functional(model, disable_autograd_tracking=not tracked)
    _, wanted = theirs(model, disable_autograd_tracking=not tracked)
    assert [p.requires_grad for p in params] == [p.requires_grad for p in wanted]
    assert torch.equal(function(params, x), model(x))
    doubled = [p * 2 for p in params]
    assert not torch.equal(function(doubled, x), model(x))
    # The values are not kept: only shapes.
    assert all(a is p for a, p in zip(params, model.parameters(), strict=True)) == tracked


def _an_epoch(wrapped):
    """(parameters, history) after one, in each process of a group, or in one alone."""
    from adaclip.opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP

    model = network()
    if wrapped:
        with torch.no_grad():
            for p in model.parameters():
                p += torch.distributed.get_rank()
        model = DPDDP(model)
        # The first process's, before anything else could have made them so.
        assert all(map(torch.equal, model.parameters(), network().parameters()))
    engine, model, optimizer, ours = private(
        model=model, clipping="per_layer", max_grad_norm=[0.3] * 7, noise_generator=KEY
    )
    with BatchMemoryManager(data_loader=ours, max_physical_batch_size=2, optimizer=optimizer) as pieces:
        train(model, optimizer, pieces)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), engine.accountant.history


def test_distributed_data_parallel():
    from adaclip.opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP

    with pytest.raises(RuntimeError, match="init_process_group"):
        DPDDP(network())
    alone, history = _an_epoch(False)
    assert history == [(1.0, 1 / 7, 7)]
    for parameters, booked in run(_an_epoch, True):
        assert booked == history
        assert (parameters - alone).norm() <= 1e-5 * alone.norm()


def test_what_opacus_made_is_not_wrapped_once_more():
    model = network()
    wrapped, optimizer, data = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    rest = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    for engine in (PrivacyEngine(), adaclip.PrivacyEngine()):
        with pytest.raises(TypeError, match=r"the model itself.*to_standard_module"):
            engine.make_private(module=wrapped, optimizer=optimizer, data_loader=loader(), **rest)
        model = wrapped.to_standard_module()
        with pytest.raises(TypeError, match=r"optimizer\.original_optimizer"):
            engine.make_private(module=model, optimizer=optimizer, data_loader=loader(), **rest)
        ordinary = optimizer.original_optimizer
        with pytest.raises(ValueError, match=r"batch_sampler must be the default one"):
            engine.make_private(module=model, optimizer=ordinary, data_loader=data, **rest)
        engine.make_private(module=model, optimizer=ordinary, data_loader=loader(), **rest)
        engine = getattr(engine, "engine", engine)
        engine.detach()
        wrapped = opacus.GradSampleModule(model)


def test_the_plain_engine_knows_opacus_s_accountants():
    with pytest.raises(ValueError, match="'prv' corresponds to 'pld'"):
        adaclip.PrivacyEngine(accountant="prv")
    with pytest.raises(ValueError, match="gdp_epsilon"):
        adaclip.PrivacyEngine(accountant="gdp")
