"""adaclip.train with every strategy, schedules, label groups, views and the whole scheme."""

import json

import pytest
import torch
from tiny_runs import SETTINGS

from adaclip.accounting import Event, Ledger, SubsampledGaussian
from adaclip.runs import RunFolder
from adaclip.schemes import SCHEMES
from adaclip.train import Training
from adaclip.train_sources import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


ADAPTING = ("adaptive", "per_layer_adaptive", "dc_sgd", "dc_sgd_error")


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "psac", *ADAPTING])
def test_every_strategy_trains_and_books_the_planned_release(tmp_path, tiny_run, clipping):
    training = tiny_run(tmp_path / "run", steps=3, eval_every=1, clipping=clipping, max_batch_size=16)
    training.run(quiet=True)
    rows = training.folder.read_metrics()
    release = SubsampledGaussian(0.2, training.optimizer.noise_multiplier)
    assert training.engine.accountant.history == [Event(release, 3)]
    assert rows[-1]["epsilon"] <= 3.0
    # The norm of a row is the one that clipped its step, not the next one's.
    assert rows[0]["max_grad_norm"] == pytest.approx(1.0)
    if "adaptive" in clipping:
        assert training.optimizer.max_grad_norm != pytest.approx(rows[-1]["max_grad_norm"])
    elif clipping not in ADAPTING:
        assert {row["max_grad_norm"] for row in rows} == {rows[0]["max_grad_norm"]}
    assert (rows[0]["gradient_noise_multiplier"] > rows[0]["noise_multiplier"]) == (clipping in ADAPTING)


def test_schedules_go_from_one_to_their_end(tmp_path, tiny_run):
    training = tiny_run(
        tmp_path / "run", steps=4, eval_every=1, norm_schedule="linear:0.5", noise_schedule="exponential:0.25"
    )
    base = training.folder.read_config()["run"]["noise_multiplier"]
    training.run(quiet=True)
    rows = training.folder.read_metrics()
    assert [row["max_grad_norm"] for row in rows] == pytest.approx([1.0, 0.875, 0.75, 0.625])
    noise = [row["noise_multiplier"] for row in rows]
    assert noise == pytest.approx([base * 0.25 ** (t / 4) for t in range(4)])
    assert 2.9 < rows[-1]["epsilon"] <= 3.0


@pytest.mark.parametrize("groups", ["report", "reweight", "select"])
def test_groups_are_released_with_noise_and_shown_without_it_in_private(tmp_path, digits, groups):
    config = resolve(SETTINGS | {"data_dir": str(digits), "steps": 3, "groups": groups, "group_noise": 5.0})
    training = Training(config, RunFolder.create(tmp_path / "run"), private_diagnostics=True)
    training.run(quiet=True)
    row = training.folder.read_metrics()[-1]
    assert row["selected_group"] in range(10)
    assert len(row["group_ratios"]) == 10
    (private,) = training.folder.path.rglob("diagnostics.jsonl")
    diagnosed = [json.loads(line) for line in private.read_text().splitlines()]
    for each in diagnosed:
        assert sum(each["group_counts"]) == each["rows"]
        assert all(
            0 <= s <= n * (1 + 1e-6) for s, n in zip(each["group_sums"], each["group_counts"], strict=True)
        )
    assert "group_counts" not in training.folder.metrics.read_text()


def test_views_are_averaged_in_steps_of_their_own_size(tmp_path, digits):
    config = resolve(
        SETTINGS
        | {"data_dir": str(digits), "steps": 2, "views": 3, "augment": "crop-flip", "max_batch_size": 30}
    )
    training = Training(config, RunFolder.create(tmp_path / "run"), private_diagnostics=True)
    training.run(quiet=True)
    release = SubsampledGaussian(0.2, training.optimizer.noise_multiplier)
    assert training.engine.accountant.history == [Event(release, 2)]
    (private,) = training.folder.path.rglob("diagnostics.jsonl")
    rows = [json.loads(line)["rows"] for line in private.read_text().splitlines()]
    # Samples, not their views: 40 are expected, and 90 or more have probability below 1e-12.
    assert all(10 < n < 90 for n in rows)


def test_the_whole_scheme_continues_where_it_was_left(tmp_path, digits):
    """A run of four steps, left after two, has the state of one that was not: all that is released adds up."""
    settings = {"data_dir": str(digits), "scheme": "adaptive", "steps": 4, "eval_every": 2}
    config = resolve({k: v for k, v in SETTINGS.items() if k not in ("optimizer", "lr")} | settings)
    folder = RunFolder.create(tmp_path / "run")
    first = Training(config, folder)
    first.total = 2
    first.run(quiet=True)
    first.finished = False
    first._save()
    second = Training(config, folder, saved=folder.read_config())
    assert (second.step, second.optimizer.releases) == (2, 2)
    assert torch.equal(second.optimizer.clipping.thresholds, first.optimizer.clipping.thresholds)
    assert second.optimizer.groups.selected == first.optimizer.groups.selected
    second.run(quiet=True)
    release = SubsampledGaussian(0.2, second.optimizer.noise_multiplier)
    assert Ledger.load(folder.ledger).after(Ledger()) == [Event(release, 4)]
    assert [row["step"] for row in folder.read_metrics()] == [2, 4]
    assert second.optimizer.gradient_noise_multiplier > second.optimizer.noise_multiplier


def test_a_noise_schedule_of_many_values_continues_after_steps_that_were_lost(tmp_path, digits):
    """The ledger is one step ahead of the checkpoint: the next steps take the values that follow in the plan."""
    settings = {"data_dir": str(digits), "steps": 40, "noise_schedule": "linear:0.5", "eval_every": 40}
    config = resolve(SETTINGS | settings)
    folder = RunFolder.create(tmp_path / "run")
    first = Training(config, folder)
    planned = first.engine._budget.plan
    assert len(planned) == 32
    first.total = 2
    first.run(quiet=True)
    first.finished = False
    first._save()
    first.engine.accountant.add([release for release, count in planned for _ in range(count)][2])
    first.engine.accountant.ledger.save(folder.ledger)
    second = Training(config, folder, saved=folder.read_config())
    assert (second.step, second.optimizer.releases) == (2, 3)
    second.run(quiet=True)
    # The plan has 40 releases, one of which was lost: training ends a step early, within its budget.
    assert second.step == 39
    assert second.engine.accountant.history == planned
    assert second.engine.get_epsilon(config.delta) <= 3.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_takes_its_steps_within_the_budget(tmp_path, digits, scheme):
    shared = {k: v for k, v in SETTINGS.items() if k not in ("optimizer", "lr", "epsilon", "ema")}
    config = resolve(shared | {"data_dir": str(digits), "scheme": scheme, "steps": 2})
    training = Training(config, RunFolder.create(tmp_path / "run"))
    before = [p.detach().clone() for p in training.model.parameters()]
    summary = training.run(quiet=True)
    assert all(not torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in training.model.parameters())
    saved = training.folder.read_config()
    assert saved["train"]["scheme"] == scheme
    assert saved["run"]["clipping"]["name"] == training.optimizer.clipping.name
    assert (saved["run"]["groups"] is None) == (config.groups == "off")
    if scheme == "non-private":
        assert summary["epsilon"] == float("inf")
        assert any("nothing of this run is private" in note for note in training.notes)
    else:
        assert 2.5 < summary["epsilon"] <= 3.0
