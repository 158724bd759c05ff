"""Fine-tuning of models as torchvision and timm make them: frozen parts, frozen BatchNorm, their constructs."""

import copy
import warnings

import pytest
import torch
from pretrained_models import BasicBlock, BatchNormAct2d, ConvNeXt, MobileNet, ResNet, ViT, pretrain
from small_engine import batch_of, data, flat, private, train
from torch import nn

from adaclip import UnsupportedModuleError, fix, validate
from adaclip.layers import FrozenBatchNorm
from adaclip.testing import clipped_sum, private_step, relative_error, sample_grads, square_loss


def freeze_batch_norm(model):
    for module in model.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def check_step(model):
    """The engine's clipped sum is a loop's over samples, with the model as it is."""
    reference = copy.deepcopy(model)
    x, y = data(6)
    sums, norms = private_step(model, x, y, square_loss, max_grad_norm=0.5)
    grads = sample_grads(reference, x, y, square_loss)
    truth = clipped_sum(grads, 0.5)
    assert sums.keys() == truth.keys()
    for name, t in truth.items():
        assert relative_error(sums[name], t) < 2e-5, name
    exact = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
    assert bool((norms >= exact * (1 - 1e-6)).all())


MODELS = {
    "resnet, GroupNorm": lambda: fix(pretrain(ResNet())),
    "resnet, frozen": lambda: fix(pretrain(ResNet()), batch_norm="frozen"),
    "resnet, evaluated": lambda: freeze_batch_norm(pretrain(ResNet())),
    "resnet, without affine": lambda: freeze_batch_norm(
        pretrain(ResNet(norm=lambda c: nn.BatchNorm2d(c, affine=False)))
    ),
    "mobilenet, GroupNorm": lambda: fix(pretrain(MobileNet())),
    "mobilenet, frozen": lambda: fix(pretrain(MobileNet()), batch_norm="frozen"),
    "mobilenet, evaluated": lambda: freeze_batch_norm(pretrain(MobileNet())),
    "convnext": ConvNeXt,
    "vit": ViT,
    "with activation, GroupNorm": lambda: fix(pretrain(ResNet(norm=BatchNormAct2d))),
    "with activation, frozen": lambda: fix(pretrain(ResNet(norm=BatchNormAct2d)), batch_norm="frozen"),
}


@pytest.mark.filterwarnings("ignore:adaclip has no fast", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_constructs_are_clipped_sample_by_sample(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    assert validate(model) == []
    check_step(model)


def test_only_what_needs_it_takes_the_slow_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (fix(ResNet()), freeze_batch_norm(ResNet()), fix(MobileNet(), batch_norm="frozen")):
            private(model)


def test_stochastic_depth_drops_samples_of_the_fast_layers_as_they_come():
    torch.manual_seed(0)
    model = fix(MobileNet(drop=0.5))
    reference = copy.deepcopy(model)
    x, y = data(8)
    sums, _ = private_step(model, x, y, square_loss, max_grad_norm=0.5)
    assert {v.item() for v in model.drop.masks[0].flatten()} == {0.0, 2.0}
    reference.drop.masks = model.drop.masks
    rows = []
    for b in range(8):
        reference.drop.row = slice(b, b + 1)
        rows.append(sample_grads(reference, x[b : b + 1], y[b : b + 1], square_loss))
    truth = clipped_sum({n: torch.cat([r[n] for r in rows]) for n in rows[0]}, 0.5)
    for name, t in truth.items():
        assert relative_error(sums[name], t) < 2e-5, name


@pytest.mark.filterwarnings("ignore:adaclip has no fast", "ignore:There is a performance drop")
@pytest.mark.parametrize("model", [ConvNeXt(drop=0.5), ViT(dropout=0.5)], ids=["convnext", "vit"])
def test_randomness_inside_of_the_generic_gradient_is_refused_with_the_cure(model):
    engine, model, optimizer, loader = private(model)
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match="dropout") as caught:
        square_loss(model(x), y).backward()
    assert "set its rate to 0" in str(caught.value)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert len(engine.accountant) == 0


# --- frozen parts ---------------------------------------------------------------------------------------


def head_only(model):
    head = model.fc if hasattr(model, "fc") else model.head
    model.requires_grad_(False)
    head.requires_grad_(True)
    return head


FROZEN = {
    "resnet": lambda: freeze_batch_norm(pretrain(ResNet())),
    "vit": ViT,
    "convnext": ConvNeXt,
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_backbone_costs_no_sample_gradients_and_keeps_nothing(name, recwarn):
    torch.manual_seed(0)
    model = FROZEN[name]()
    head = head_only(model)
    plain = copy.deepcopy(model)

    def kept(run):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return run(), sum(sizes)

    check_step(copy.deepcopy(model))
    _, model, optimizer, loader = private(model, optimizer=torch.optim.SGD(head.parameters(), lr=0.1))
    assert not [w for w in recwarn if "no fast per-sample gradient" in str(w.message)]
    x, y = batch_of(loader)
    _, expected = kept(lambda: square_loss(plain(x), y))
    loss, ours = kept(lambda: square_loss(model(x), y))
    # The head's input and weight are saved by our operation, its input alone by torch's.
    assert ours <= expected + head.weight.numel()
    used = []
    layers = optimizer._sum._layers
    finish = optimizer._sum._check_uses
    optimizer._sum._check_uses = lambda uses: used.extend(layer.module for layer in uses) or finish(uses)
    loss.backward()
    assert used == [head]
    assert len([layer for layer in layers if layer.trainable()]) == 1
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def clipped_step(model, optimizer, loader):
    """One backward of the next batch against the loop."""
    reference = copy.deepcopy(model)
    x, y = batch_of(loader)
    optimizer.zero_grad()
    square_loss(model(x), y).backward()
    truth = clipped_sum(sample_grads(reference, x, y, square_loss), 1.0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert relative_error(p.grad * 10, truth[name]) < 2e-5, name
    optimizer.step()


@pytest.mark.parametrize("held", [True, False], ids=["held from the start", "added later"])
def test_unfreezing_a_backbone_later(held):
    torch.manual_seed(0)
    model = freeze_batch_norm(pretrain(ResNet()))
    head_only(model)
    parameters = model.parameters() if held else model.fc.parameters()
    _, model, optimizer, loader = private(model, optimizer=torch.optim.SGD(parameters, lr=0.1))
    clipped_step(model, optimizer, loader)
    model.layer2.requires_grad_(True)
    if not held:
        optimizer.add_param_group({"params": model.layer2.parameters(), "lr": 0.01})
    clipped_step(model, optimizer, loader)
    model.layer2.requires_grad_(False)
    clipped_step(model, optimizer, loader)


def test_unfreezing_a_parameter_that_no_layer_answers_for_is_refused_with_the_cure():
    torch.manual_seed(0)
    model = ViT()
    head_only(model)
    engine, model, optimizer, loader = private(model)
    clipped_step(model, optimizer, loader)
    model.cls_token.requires_grad_(True)
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match=r"unfrozen in a module of your own.*detach"):
        square_loss(model(x), y).backward()
    engine.detach(model)
    with pytest.warns(UserWarning, match="no fast per-sample gradient"):
        _, model, optimizer, loader = private(model)
    clipped_step(model, optimizer, loader)


# --- BatchNorm that is frozen ---------------------------------------------------------------------------


def statistics(model):
    return [b.clone() for b in model.buffers()]


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False), nn.SyncBatchNorm]
)
def test_a_frozen_batch_norm_stays_frozen_whatever_train_says(norm):
    torch.manual_seed(0)
    model = freeze_batch_norm(pretrain(ResNet(norm=nn.BatchNorm2d)))
    if norm is not nn.BatchNorm2d:
        replaced = norm(4)
        replaced.load_state_dict(model.bn1.state_dict(), strict=False)
        model.bn1 = replaced.eval()
    reference = copy.deepcopy(model)
    engine, model, optimizer, loader = private(model)
    kept = statistics(model)
    for _ in range(2):
        model.train()
        x, _ = batch_of(loader)
        reference.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x), reference(x))
        train(model, optimizer, loader)
    assert_equal(statistics(model), kept)
    engine.detach(model)
    model.train()(x)
    assert not torch.equal(model.bn1.running_mean, kept[0])


def test_a_frozen_batch_norm_inside_of_a_module_with_parameters_of_its_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BasicBlock(1, 4)
            self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.5))
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc((self.block(x) * self.gamma).mean((2, 3)))

    torch.manual_seed(0)
    model = freeze_batch_norm(pretrain(Scaled()))
    with pytest.warns(UserWarning, match="no fast per-sample gradient"):
        _, model, optimizer, loader = private(model)
    kept = statistics(model)
    reference = copy.deepcopy(model)
    model.train()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    truth = clipped_sum(sample_grads(reference, x, y, square_loss), 1.0)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 10, truth[name]) < 2e-5, name
    train(model, optimizer, loader)
    assert_equal(statistics(model), kept)


def test_a_batch_norm_for_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    check_step(freeze_batch_norm(pretrain(model)))
    check_step(fix(pretrain(model), batch_norm="frozen"))


def test_views_of_a_sample():
    torch.manual_seed(0)
    model = fix(pretrain(ResNet()), batch_norm="frozen")
    reference = copy.deepcopy(model)
    _, model, _, loader = private(model, views_per_sample=2)
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    truth = clipped_sum(sample_grads(reference, x, y, square_loss, views=2), 1.0)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 10, truth[name]) < 2e-5, name


def test_a_model_in_evaluation_mode_has_not_frozen_its_batch_norms_on_purpose():
    model = ResNet().eval()
    with pytest.raises(UnsupportedModuleError, match=r"bn1 \(BatchNorm2d\).*batch_norm='frozen'"):
        private(model)
    assert validate(freeze_batch_norm(model)) == []
    untracked = ResNet(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    assert len(validate(freeze_batch_norm(untracked))) == 6


def test_a_compiled_model_with_frozen_batch_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model = freeze_batch_norm(pretrain(model))
    one, two = private(copy.deepcopy(model), sigma=0.0), private(model, sigma=0.0)
    train(*one[1:])
    _, model, optimizer, loader = two
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    train(compiled, optimizer, loader)
    assert torch.allclose(flat(one[1]), flat(model), atol=1e-5)


# --- the modules themselves -----------------------------------------------------------------------------


def test_a_frozen_batch_norm_is_a_batch_norm_in_evaluation():
    x = torch.randn(5, 8, 4, 4) * 3 + 1
    batch_norm = pretrain(nn.BatchNorm2d(8), shape=(8, 4, 4)).eval()
    frozen = FrozenBatchNorm(8)
    frozen.load_state_dict(batch_norm.state_dict())
    for mode in (True, False):
        assert torch.equal(frozen.train(mode)(x), batch_norm(x))
    assert "num_batches_tracked" not in frozen.state_dict()
    assert repr(frozen) == "FrozenBatchNorm(8, eps=1e-05, affine=True)"
    assert list(FrozenBatchNorm(8, affine=False).parameters()) == []
