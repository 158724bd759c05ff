"""Cases of PrivacyEngine: after an error nothing has changed, nothing is spent, and the engine still works."""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from fuzz.bounds import DOCUMENTED, attempt
from fuzz.options import NORM
from fuzz.values import ANYTHING, PLAIN, arguments, changed, damaged
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.clipping import AdaptiveClipping
from adaclip.groups import LabelGroups
from adaclip.schedules import Linear, Piecewise
from adaclip.smoothing import NoiseCorrectedNadam, SmoothedLoss

_BOTH = (*DOCUMENTED, RuntimeError)  # RuntimeError: an engine or a run in the wrong state


def _model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def _loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 1, 2, 2), torch.arange(16) % 2), batch_size=4)


def _snapshot(model: nn.Module) -> list[Any]:
    """The parameters, and what each module and parameter carries besides."""
    held = [(name, p.detach().clone().tolist(), p.grad) for name, p in model.named_parameters()]
    return [
        held,
        [sorted(m.__dict__) for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
    ]


def _train(model: nn.Module, optimizer: Any, loader: Any, steps: int = 2) -> None:
    done = 0
    while done < steps:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


def _options(model: nn.Module) -> dict[str, st.SearchStrategy]:
    size = st.none() | st.integers(1, 8)
    return {
        "module_": st.just(model) | st.just(nn.BatchNorm1d(2)) | st.just(nn.Linear(2, 2)),
        "optimizer_": st.builds(lambda: torch.optim.SGD(model.parameters(), lr=0.1))
        | st.builds(lambda: NoiseCorrectedNadam(model.parameters()))
        | st.builds(lambda: torch.optim.LBFGS(model.parameters())),
        "data_loader_": st.builds(_loader),
        "max_grad_norm": st.none() | NORM | st.lists(NORM, min_size=2, max_size=2),
        "poisson_sampling": st.booleans(),
        "clipping": st.sampled_from(
            [
                "flat",
                "per_layer",
                "adaptive",
                "automatic",
                "psac",
                "dc_sgd",
                "dc_sgd_error",
                AdaptiveClipping(2.0),
            ]
        ),
        "noise_schedule": st.none() | st.just(Linear(1.0, 0.5, 9)) | st.just(Piecewise(((0, 1.0), (3, 2.0)))),
        "groups": st.none()
        | st.just(LabelGroups(groups=2))
        | st.just(LabelGroups("reweight", groups=[0, 0])),
        "labels": st.none() | st.just(lambda batch: batch[1]),
        "smoothing": st.none() | st.just(SmoothedLoss(0.01)) | st.just(SmoothedLoss(0.01, signal="always")),
        "views_per_sample": st.integers(1, 3),
        "augmentation": st.none() | st.just("shift") | st.just(lambda images, generator: images),
        "max_batch_size": size,
        "pad_to": size | st.just("auto"),
        "backend": st.sampled_from(["auto", "reference", "cpp"]),
        "loss_reduction": st.sampled_from(["mean", "sum"]),
        "noise_generator": st.none() | st.just(bytes(32)) | st.integers(0, 9),
    }


def make_private(draw: Any) -> str:
    """make_private and make_private_with_epsilon with anything."""
    model = _model()
    engine = PrivacyEngine()
    planned = draw(st.booleans())
    if planned:
        more = {
            "target_epsilon_": st.floats(0.5, 10),
            "target_delta_": st.sampled_from([1e-5, 1e-3]),
            draw(st.sampled_from(["epochs_", "steps_"])): st.integers(1, 9),
        }
    else:
        more = {"noise_multiplier_": st.sampled_from([0.0, 0.7, 30.0])}
    given = arguments(draw, **more, **_options(model))
    before = _snapshot(model)
    make = engine.make_private_with_epsilon if planned else engine.make_private
    how, made = attempt(lambda: make(**given))
    assert engine.accountant.history == []
    if how != "ok":
        assert _snapshot(model) == before, "the model was changed"
        # The engine and the model are as good as new.
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=_loader(),
            noise_multiplier=1.0,
        )
        engine.detach()
        return how
    private, optimizer, loader = made
    views = given.get("views_per_sample", 1)
    if (
        views > 50
        or max(given.get("max_batch_size") or 0, loader.max_batch_size or 0, loader.pad_to or 0) > 10**5
    ):
        engine.detach()
        return "a batch of gigabytes"
    # A step is made and booked, or refused with a reason and then not booked with less than it released.
    how, _ = attempt(lambda: _train(private, optimizer, loader, 1), _BOTH, deliberate=False)
    assert how == "ok" or optimizer.releases == 0
    assert sum(event.count for event in engine.accountant.history) >= optimizer.releases
    assert all(bool(p.isfinite().all()) for p in private.parameters()) or how == "ok"
    engine.detach()
    assert [sorted(m.__dict__) for m in model.modules()] == before[1]
    return f"step: {how}"


def budgets(draw: Any) -> str:
    """Questions and budgets; what is refused leaves budget and account as they were."""
    engine = PrivacyEngine(draw(st.sampled_from(["pld", "rdp"])))
    if draw(st.booleans()):
        how, _ = attempt(
            lambda: PrivacyEngine(
                **arguments(
                    draw,
                    accountant=st.sampled_from(["pld", "rdp"]),
                    adjacency=st.sampled_from([None, "zero_out", "replace_one", "add_remove"]),
                )
            )
        )
        return f"engine: {how}"
    engine.accountant.step(0.1, 1.0, draw(st.integers(0, 3)))
    before, spent = engine._budget, engine.accountant.state_dict()
    if draw(st.booleans()):
        how, value = attempt(
            lambda: engine.get_epsilon(**arguments(draw, delta_=st.sampled_from([1e-5, 0.1])))
        )
        assert how != "ok" or value >= 0
    else:
        given = arguments(draw, target_epsilon_=st.floats(0.1, 9), target_delta_=st.sampled_from([1e-5, 0.1]))
        how, _ = attempt(lambda: engine.set_budget(**given))
        assert how == "ok" or engine._budget is before
    assert engine.accountant.state_dict() == spent
    return how


class _Run:
    """A run with every kind of state, stepped once; made once a process, since only failed loads leave it as it was."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = _model()
        self.engine = PrivacyEngine()
        _, self.optimizer, self.loader = self.engine.make_private(
            module=self.model,
            optimizer=torch.optim.Adam(self.model.parameters(), lr=0.01),
            data_loader=_loader(),
            noise_multiplier=5.0,
            clipping=AdaptiveClipping(1.0, sigma_b=20.0),
            groups=LabelGroups(groups=2),
            smoothing=SmoothedLoss(0.01),
            noise_generator=1,
        )
        self.engine.set_budget(50.0, 1e-5)
        _train(self.model, self.optimizer, self.loader)
        self.optimizer.zero_grad()
        file = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "c.pt")
            self.engine.save_checkpoint(
                path, module=self.model, optimizer=self.optimizer, extra={"a": [1, None]}
            )
            file.write(path.read_bytes())
        self.saved = file.getvalue()

    def state(self) -> str:
        torch.set_printoptions(precision=12)
        return repr(
            [
                self.model.state_dict(),
                self.optimizer.state_dict(),
                self.engine.accountant.state_dict(),
                self.loader.state_dict(),
                self.optimizer.clipping.state_dict(),
                self.optimizer.groups.state_dict(),
                self.optimizer.releases,
                None if self.engine._budget is None else self.engine._budget.state_dict(),
            ]
        )


_run: list[_Run] = []


def checkpoints(draw: Any) -> str:
    """Damaged and altered checkpoints: ValueError and nothing changed, or a run that goes on and has forgotten nothing."""
    run = _run[0] if _run else _Run()
    _run[:] = [run]
    content = run.saved
    if draw(st.integers(0, 3)) == 0:
        content = damaged(draw, content)
    else:
        tensors = st.sampled_from(
            [
                torch.zeros(2),
                torch.full((3, 4), math.nan),
                torch.tensor(1),
                torch.zeros(1, dtype=torch.float64),
            ]
        )
        state = changed(draw, torch.load(io.BytesIO(content), weights_only=True), PLAIN | tensors)
        file = io.BytesIO()
        torch.save(state, file)
        content = file.getvalue()
    before, spent = run.state(), run.engine.accountant.ledger.events
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.pt")
        path.write_bytes(content)
        how, _ = attempt(lambda: run.engine.load_checkpoint(path, module=run.model, optimizer=run.optimizer))
    if how != "ok":
        assert run.state() == before, "the run was changed"
        return how
    _run.clear()
    # Whether an altered state of torch's optimizer fits its parameters shows in a step, and is torch's to say.
    saved, loaded = (torch.load(io.BytesIO(c), weights_only=True)["optimizer"] for c in (run.saved, content))
    if repr(saved) != repr(loaded):
        return "ok, with another optimizer state"
    _train(run.model, run.optimizer, run.loader, 1)
    assert sum(e.count for e in run.engine.accountant.history) > sum(e.count for e in spent)
    return how


def saving(draw: Any) -> str:
    """save_checkpoint with any path and extra: what was saved can be loaded."""
    run = _run[0] if _run else _Run()
    _run[:] = [run]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.pt")
        given = arguments(
            draw,
            path_=st.just(path) | st.just(str(path)) | st.just(Path(folder, "no", "such.pt")),
            module_=st.just(run.model),
            optimizer_=st.just(run.optimizer),
            extra=st.none()
            | st.dictionaries(st.text(max_size=3), PLAIN, max_size=3)
            | ANYTHING.map(lambda v: {"v": v}),
        )
        how, _ = attempt(
            lambda: run.engine.save_checkpoint(**given), (*DOCUMENTED, OSError), deliberate=False
        )
        if how == "ok":
            extra = run.engine.load_checkpoint(given["path"], module=run.model, optimizer=run.optimizer)
            assert repr(extra) == repr(given.get("extra") or {})
        return how


TARGETS = {
    "make_private": (make_private, 5),
    "budgets": (budgets, 2),
    "checkpoints": (checkpoints, 3),
    "saving": (saving, 1),
}
