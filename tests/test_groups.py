"""Label groups: what they measure, what they release, whom they select, and their state."""

import math

import pytest
import torch
from one_step import KEY, STRATEGIES, Probe, backward, private
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.clipping import Setting
from adaclip.groups import LabelGroups


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def rows_of(norms):
    rows = torch.zeros(len(norms), 4)
    rows[:, 0] = torch.tensor(norms)
    return rows


def engine(rows, labels, groups, *, batch_size=None, noise_multiplier=1.0, clipping="flat", **options):
    model = Probe(rows.shape[1])
    options.setdefault("noise_generator", KEY)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        data_loader=DataLoader(TensorDataset(rows, labels), batch_size=batch_size or len(rows)),
        noise_multiplier=noise_multiplier,
        clipping=clipping,
        groups=groups,
        **options,
    )


NORMS = [0.5, 3.0, 0.1, math.nan, 0.2, 8.0, 0.0]
LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 3])
# Classes 0 and 2 are one group, 1 and 3 the other.
TABLE = [0, 1, 0, 1]


@pytest.mark.parametrize("path", [{}, {"max_batch_size": 3}, {"max_batch_size": 3, "pad_to": 3}])
@pytest.mark.parametrize("name", ["flat", "adaptive", "psac"])
def test_sums_and_counts_are_those_of_the_groups(path, name):
    groups = LabelGroups(groups=TABLE, diagnostics=True)
    clipping = STRATEGIES[name](1.0)
    model, optimizer, loader = engine(rows_of(NORMS), LABELS, groups, clipping=clipping, **path)
    backward(model, optimizer, loader)
    optimizer.step()
    shares = [n / (n + 0.1 / (n + 0.1)) if name == "psac" else min(n, 1.0) for n in NORMS]
    sums, counts = [0.0, 0.0], [0.0, 0.0]
    for norm, share, label in zip(NORMS, shares, LABELS.tolist(), strict=True):
        if math.isfinite(norm):
            sums[TABLE[label]] += share
            counts[TABLE[label]] += 1.0
    private_ = optimizer.groups.private
    torch.testing.assert_close(private_["sums"], f64(sums), rtol=1e-6, atol=0)
    assert private_["counts"].tolist() == counts
    released = optimizer.groups.released
    assert released["step"] == 0
    # Noise of 40 on a handful of examples: nothing is released as it was counted.
    assert (released["counts"] - f64(counts)).abs().min() > 1e-3
    assert (released["sums"] - f64(sums)).abs().min() > 1e-3
    assert groups.released == {}, "the engine works on a copy"


@pytest.mark.parametrize("use", ["report", "reweight", "select"])
def test_statistics_are_of_all_samples_whatever_their_weight(use):
    groups = LabelGroups(use, groups=TABLE, diagnostics=True)
    model, optimizer, loader = engine(rows_of(NORMS), LABELS, groups)
    for _ in range(3):
        backward(model, optimizer, loader)
        optimizer.step()
        assert optimizer.groups.private["counts"].tolist() == [2.0, 4.0]


def test_diagnostics_are_kept_only_when_asked_for_and_never_in_state():
    model, optimizer, loader = engine(rows_of(NORMS), LABELS, LabelGroups(groups=TABLE))
    backward(model, optimizer, loader)
    optimizer.step()
    assert optimizer.groups.private == {}
    asked = LabelGroups(groups=TABLE, diagnostics=True)
    assert asked.state_dict().keys() == optimizer.groups.state_dict().keys()
    assert asked.config() == optimizer.groups.config()


def bound(use="report", **options):
    made = LabelGroups(use, **{"groups": 3, **options})
    made.bind(Setting(1, (10,), 100.0, torch.device("cpu")))
    return made


def released(sums, counts):
    return f64([*sums, *counts])


def test_the_group_with_the_least_ratio_is_selected():
    groups = bound(memory=0.0, floor=1.0)
    assert groups.selected is None
    assert groups.released == {}
    groups.absorb(released([30.0, 5.0, 12.0], [100.0, 10.0, 100.0]), 0)
    assert groups.selected == 2
    torch.testing.assert_close(groups.released["ratios"], f64([0.3, 0.5, 0.12]))


def test_a_group_too_small_to_be_measured_is_not_selected_unless_all_are():
    groups = bound(memory=0.0, floor=20.0)
    groups.absorb(released([30.0, -9.0, 12.0], [100.0, 10.0, 100.0]), 0)
    assert groups.selected == 2
    groups.absorb(released([3.0, -9.0, 1.0], [1.0, -5.0, 2.0]), 1)
    assert groups.selected == 1
    torch.testing.assert_close(groups.released["ratios"], f64([3.0, -9.0, 1.0]) / 20)


def test_averages_forget_and_count_from_the_first_release():
    groups = bound(memory=0.5, floor=1e-3)
    first, second = released([3.0, 2.0, 1.0], [10.0, 10.0, 10.0]), released([0.0, 9.0, 9.0], [10.0] * 3)
    groups.absorb(first, 0)
    torch.testing.assert_close(groups.released["ratios"], f64([0.3, 0.2, 0.1]))
    groups.absorb(second, 1)
    torch.testing.assert_close(groups.released["ratios"], (f64([0.3, 0.2, 0.1]) + f64([0.0, 1.8, 1.8])) / 3)


def test_the_default_floor_is_twice_the_noise_left_in_an_average():
    assert bound(sigma_n=40.0, memory=0.9).config()["floor"] == pytest.approx(80 * math.sqrt(0.1 / 1.9))
    assert bound(sigma_n=0.1).config()["floor"] == 1.0


def test_weights_follow_the_selection_of_the_step_before():
    labels = torch.tensor([0, 1, 2, 1, 99])
    least = released([9.0, 1.0, 9.0], [100.0, 100.0, 100.0])
    for use, after in (("reweight", [1.0, 0.25, 1.0, 0.25, 0.0]), ("select", [0.0, 1.0, 0.0, 1.0, 0.0])):
        groups = bound(use, memory=0.0, weight=0.25)
        assert groups.weights(labels, 4).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
        groups.absorb(least, 0)
        assert groups.weights(labels, 4).tolist() == after
    report = bound()
    report.absorb(least, 0)
    assert report.weights(labels, 4) is None


def test_select_trains_on_the_selected_group_only():
    rows = torch.eye(4)[:3].repeat(4, 1)
    labels = torch.arange(3).repeat(4)
    model, optimizer, loader = engine(rows, labels, LabelGroups("select", groups=3))
    optimizer.groups.absorb(released([9.0, 1.0, 9.0], [100.0, 100.0, 100.0]), 0)
    backward(model, optimizer, loader)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]) * 12
    torch.testing.assert_close(gradient, torch.tensor([0.0, 4.0, 0.0, 0.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("use", ["report", "reweight", "select"])
def test_the_smallest_group_is_found_in_training(use):
    """Group 2 has gradients a tenth as long; at q N = 600 the default noise lets it be seen in some steps."""
    norms = [1.0, 1.0, 0.1] * 400
    model, optimizer, loader = engine(
        rows_of(norms), torch.arange(1200) % 3, LabelGroups(use, groups=3), batch_size=600
    )
    for _ in range(12):
        for batch in loader:
            optimizer.zero_grad()
            model(batch[0]).mean().backward()
            optimizer.step()
    assert optimizer.groups.selected == 2


@pytest.mark.parametrize("use", ["report", "reweight", "select"])
def test_a_resumed_run_goes_on_to_the_bit(use, tmp_path):
    norms = torch.rand(60, generator=torch.Generator().manual_seed(1)).tolist()

    def start():
        engine_ = PrivacyEngine()
        model = Probe(4)
        made = engine_.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(rows_of(norms), torch.arange(60) % 3), batch_size=20),
            noise_multiplier=1.0,
            clipping="automatic",
            groups=LabelGroups(use, groups=3),
            noise_generator=KEY,
        )
        return engine_, *made

    def train(model, optimizer, loader, epochs):
        for _ in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                model(batch[0]).mean().backward()
                optimizer.step()

    engine_, model, optimizer, loader = start()
    train(model, optimizer, loader, 2)
    engine_.save_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer)
    train(model, optimizer, loader, 2)

    again, other, resumed, other_loader = start()
    again.load_checkpoint(tmp_path / "c.pt", module=other, optimizer=resumed)
    train(other, resumed, other_loader, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(
        optimizer.groups.state_dict().values(), resumed.groups.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    assert optimizer.groups.released["step"] == resumed.groups.released["step"] == 11


def broken(state):
    yield {}
    yield {k: v for k, v in state.items() if k != "average"}
    yield {**state, "average": f64([math.nan] * 6)}
    yield {**state, "last": f64([0.0])}
    yield {**state, "weights": f64([2.0, 1.0, 1.0])}
    yield {**state, "selected": torch.tensor(3)}
    yield {**state, "filled": 1.5}
    yield {**state, "step": -1}


def test_a_damaged_state_is_refused_with_nothing_changed():
    groups = bound("reweight")
    groups.absorb(released([9.0, 1.0, 9.0], [100.0, 100.0, 100.0]), 0)
    before = groups.state_dict()
    for state in broken(before):
        with pytest.raises(ValueError, match="groups state"):
            groups.check_state(state)
    groups.check_state(before)
    assert groups.selected == 1


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["report", "select"])
@pytest.mark.parametrize("bad", [3, -1])
def test_a_label_without_a_group_is_refused_before_anything_is_released(use, bad):
    labels = torch.tensor([0, 1, 2, bad])
    model, optimizer, loader = engine(rows_of([1.0] * 4), labels, LabelGroups(use, groups=3))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        backward(model, optimizer, loader)
    assert not optimizer._sum.statistics.sums.any()
    assert optimizer.releases == 0


def test_labels_can_be_anywhere_in_the_batch():
    rows = rows_of([0.5, 0.25])
    model = Probe(4)
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(rows, torch.zeros(2, 3), torch.tensor([1, 0])), batch_size=2),
        noise_multiplier=1.0,
        groups=LabelGroups(groups=2, diagnostics=True),
        labels=lambda batch: batch[2],
        noise_generator=KEY,
    )
    backward(*made)
    made[1].step()
    assert made[1].groups.private["sums"].tolist() == [0.25, 0.5]


def test_the_second_element_of_a_batch_is_the_label():
    model, optimizer, loader = private(rows_of([1.0] * 5), clipping="flat", groups=LabelGroups(groups=3))
    backward(model, optimizer, loader)
    assert optimizer._sum.statistics.sums[3:].tolist() == [2.0, 2.0, 1.0]


def test_groups_can_be_a_number_a_table_or_a_mapping():
    assert LabelGroups(groups=3).config()["groups"] == [0, 1, 2]
    assert LabelGroups(groups=(1, 0, 1)).config()["groups"] == [1, 0, 1]
    assert LabelGroups(groups={1: 0, 0: 1, 2: 1}).config()["groups"] == [1, 0, 1]
    assert LabelGroups(groups=[0, 0, 1]).count == 2
    assert LabelGroups(groups=[0, 0, 1]).classes == 3


BAD = {
    "use": {"use": "drop"},
    "groups must be at least 1": {"groups": 0},
    "groups must be numbered": {"groups": [0, 2]},
    "groups must hold integers": {"groups": [0, -1]},
    "groups must map every label": {"groups": {0: 0, 2: 1}},
    "sigma_s": {"sigma_s": 0.0},
    "sigma_n": {"sigma_n": math.inf},
    "floor": {"floor": 0.0},
    "weight": {"weight": 1.5},
    "memory": {"memory": 1.0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match=name):
        LabelGroups(**{"groups": 2, **BAD[name]})


@pytest.mark.parametrize("groups", [None, True, "012", 2.0])
def test_groups_of_another_type_are_refused(groups):
    with pytest.raises(TypeError, match="groups must be a number of classes"):
        LabelGroups(groups=groups)


def test_noise_that_cannot_be_afforded_is_refused_before_training():
    with pytest.raises(ValueError, match="must leave something for the gradient"):
        engine(rows_of([1.0]), torch.tensor([0]), LabelGroups(groups=2, sigma_s=1.0), noise_multiplier=1.0)
