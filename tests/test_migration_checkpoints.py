"""Checkpoints under Opacus's names, and those that Opacus itself saved."""

import pytest
import torch
from opacus_style import CLASSES, loader, network, private, train
from torch import nn

from adaclip.opacus import PrivacyEngine

opacus = pytest.importorskip("opacus", reason="what is compared with")


def test_checkpoints_go_on(tmp_path):
    from adaclip.opacus.schedulers import ExponentialGradClip, ExponentialNoise

    path = tmp_path / "run.pt"
    engine, model, optimizer, ours = private()
    noise = ExponentialNoise(optimizer, gamma=0.5)
    norm = ExponentialGradClip(optimizer, gamma=0.5)
    train(model, optimizer, ours)
    engine.save_checkpoint(
        path=path,
        module=model,
        noise_scheduler=noise,
        grad_clip_scheduler=norm,
        checkpoint_dict={"epoch": 3},
    )
    spent = engine.get_epsilon(1e-5)

    engine, other, optimizer, ours = private()
    noise = ExponentialNoise(optimizer, gamma=0.5)
    norm = ExponentialGradClip(optimizer, gamma=0.5)
    train(other, optimizer, ours, steps=1)
    extra = engine.load_checkpoint(
        path=path, module=other, optimizer=optimizer, noise_scheduler=noise, grad_clip_scheduler=norm
    )
    assert extra == {"epoch": 3}
    assert (noise.last_epoch, norm.last_epoch) == (0, 0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    # The step made here counts as well.
    assert engine.get_epsilon(1e-5) > spent
    with pytest.raises(ValueError, match="torch_save_kwargs must be left out"):
        engine.save_checkpoint(path=path, module=other, torch_save_kwargs={"pickle_protocol": 2})
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is damaged"):
        engine.load_checkpoint(path=path, module=other)


def opacus_checkpoint(path, steps=3):
    model = network()
    engine = opacus.PrivacyEngine()
    model, optimizer, data = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader(),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    train(model, optimizer, data, steps=steps)
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 1})
    return model, optimizer


@pytest.mark.parametrize("compiled", ["no", "whole", "in parts"])
def test_a_checkpoint_of_opacus_s_goes_on(tmp_path, compiled):
    path = tmp_path / "opacus.pt"
    theirs, their_optimizer = opacus_checkpoint(path)
    model = network()
    if compiled == "whole":
        model = torch.compile(model, backend="eager")
    elif compiled == "in parts":
        model[0] = torch.compile(model[0], backend="eager")
    engine = PrivacyEngine()
    model, optimizer, ours = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader(),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    extra = engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert extra == {"epoch": 1}
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    momenta = [s["momentum_buffer"] for s in their_optimizer.state.values()]
    assert all(map(torch.equal, momenta, [s["momentum_buffer"] for s in optimizer.state.values()]))
    assert engine.accountant.history == [(2.0, 1 / 7, 3)]
    train(model, optimizer, ours)
    assert engine.accountant.history == [(2.0, 1 / 7, 10)]


def test_a_checkpoint_of_opacus_s_that_does_not_fit(tmp_path):
    path = tmp_path / "opacus.pt"
    opacus_checkpoint(path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    engine, model, optimizer, _ = private(model=other)
    with pytest.raises(ValueError, match="another model"):
        engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert len(engine.accountant) == 0

    model = network()
    engine = PrivacyEngine()
    engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader(),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    with pytest.raises(RuntimeError, match="set_budget"):
        engine.load_checkpoint(path=path, module=model)
    state = torch.load(path, weights_only=True)
    state["privacy_accountant_state_dict"]["history"].append((1.0, 2.0, 5))
    torch.save(state, path)
    engine, model, optimizer, _ = private()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="q must be in"):
        engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert len(engine.accountant) == 0
    assert all(map(torch.equal, before, model.parameters()))
