"""A channels_last model: its sums lie as its parameters do, so that the fused update takes them and a graph can."""

import pytest
import torch
from emulated_graph import Emulated
from small_engine import KEY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.layout import laid_as
from adaclip.models import build
from adaclip.testing import relative_error
from adaclip.update import fusable

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, EXAMPLES = 3, 12
LAST = torch.channels_last


def network(layout):
    """A VGG behind a window of one position, in which both layouts are one, and a grouped convolution."""
    torch.manual_seed(0)
    vgg = build("vgg11", num_classes=CLASSES, image_size=8, plan=[4, 5, "M", 8], groups=1)
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3), vgg).to(
        memory_format=layout
    )


def small_network(layout):
    """For the interpreter: per-sample gradients are kept in the first two layers, and not in the last."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2)
    return nn.Sequential(*layers, nn.Flatten()).to(memory_format=layout)


def train(backend, layout, steps, sigma, graphed=False):
    """(the clipped sums of the loop's steps, the parameters after the last step, the optimizer)."""
    small, rng = backend == "triton", torch.Generator().manual_seed(5)
    model, size = (small_network(layout), 4) if small else (network(layout), 8)
    x = torch.randn(EXAMPLES, 3, size, size, generator=rng).contiguous(memory_format=layout)
    y = torch.arange(EXAMPLES) % CLASSES
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=4),
        noise_multiplier=sigma,
        max_grad_norm=0.3,
        noise_generator=KEY,
        pad_to=12,
        backend=backend,
    )
    criterion, sums = nn.functional.cross_entropy, []
    step = Emulated(model, optimizer, criterion, warmup=1) if graphed else None
    while optimizer.releases < steps:
        for images, labels in loader:
            assert images.is_contiguous(memory_format=layout)
            if graphed:
                step(images, labels)
            else:
                optimizer.zero_grad()
                criterion(model(images), labels).backward()
                for name, p in model.named_parameters():
                    assert p.grad.stride() == p.stride(), name
                assert fusable(optimizer.original_optimizer, list(model.parameters()), backend)
                sums.append([p.grad.clone() for p in model.parameters()])
                optimizer.step()
            if optimizer.releases == steps:
                break
    return sums, [p.detach().clone() for p in model.parameters()], optimizer


@pytest.mark.parametrize(("backend", "steps"), [("cpp", 3), ("triton", 1)])
def test_sums_are_those_of_the_contiguous_model_and_graphs_replay_them(backend, steps, request):
    if backend == "triton":
        pytest.importorskip("triton")
        if request.getfixturevalue("gpu_or_interpreter").type != "cpu":
            pytest.skip("bench/gpu_parts/steps.py checks channels_last steps on a GPU")
    ours, after, _ = train(backend, LAST, steps, 0.8)
    theirs, _, _ = train(backend, torch.contiguous_format, steps, 0.8)
    assert any(p.is_contiguous(memory_format=LAST) and not p.is_contiguous() for p in after)
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert relative_error(one, other) <= 1e-4
    _, replayed, optimizer = train(backend, LAST, steps, 0.8, graphed=True)
    assert all(torch.equal(one, other) for one, other in zip(replayed, after, strict=True))
    assert optimizer.releases == steps


def test_a_tensor_is_copied_only_into_another_order():
    like = torch.empty(4, 3, 2, 2).to(memory_format=LAST)
    last, plain = torch.randn(4, 3, 2, 2).to(memory_format=LAST), torch.randn(4, 3, 2, 2)
    assert laid_as(last, like) is last
    found = laid_as(plain, like)
    assert found.stride() == like.stride()
    assert torch.equal(found, plain)
    # Windows of one position: the strides differ, the memory does not.
    narrow, like = torch.randn(9, 4, 3, 1, 1)[5], torch.empty(4, 3, 1, 1).to(memory_format=LAST)
    assert narrow.stride() != like.stride()
    found = laid_as(narrow, like)
    assert found.stride() == like.stride()
    assert found.data_ptr() == narrow.data_ptr()
    assert torch.equal(found, narrow)
    # No block of memory: nothing can lie as this does.
    sparse = torch.empty(4, 6)[:, ::2]
    assert torch.equal(laid_as(plain[:, :, 0, 0], sparse), plain[:, :, 0, 0])
