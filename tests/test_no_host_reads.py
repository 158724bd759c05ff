"""A step's statistics, factors and thresholds never read a device: on "meta", which has no values, they run."""

import pytest
import torch
from one_step import STRATEGIES

from adaclip import ops
from adaclip.clipping import PerLayerClipping, Setting
from adaclip.groups import LabelGroups
from adaclip.step_release import Statistics

META = torch.device("meta")
ROWS = 6


class Zeros:
    """A noise source that leaves tensors as they are: making noise is not what is looked at here."""

    def normal_(self, tensor, *address, **options):
        return tensor


def test_a_value_cannot_be_read_there():
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device=META).item()


@pytest.mark.parametrize("use", ["report", "reweight", "select"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_reads_nothing_back(name, use):
    clipping, groups = STRATEGIES[name](1.0), LabelGroups(use, groups=[0, 1, 1], diagnostics=True)
    setting = Setting(layers=3, parameters=(5, 6, 7), expected_batch_size=4.0, device=META)
    layers = clipping.bind(setting)
    assert layers == (3 if isinstance(clipping, PerLayerClipping) else 1)
    clipping.note_noise(1.0)
    groups.bind(setting)
    statistics = Statistics([*([] if clipping.side is None else [clipping.side]), groups], META)
    sqnorms = torch.ones(layers, ROWS, dtype=torch.float64, device=META)
    labels = torch.zeros(ROWS, dtype=torch.int64, device=META)
    for t in range(3):
        clipping.begin(t)
        factors, norms, shares = ops.clip_factors(
            sqnorms,
            clipping.thresholds,
            clipping.rule,
            unit=2.0,
            denominator=4.0,
            real=ROWS - 1,
            weights=groups.weights(labels, ROWS - 1),
        )
        assert factors.shape == (layers, ROWS)
        assert norms.shape == shares.shape == (ROWS,)
        ops.sample_statistics(
            sqnorms,
            clipping.thresholds,
            unit=2.0,
            real=ROWS - 1,
            shares=shares,
            labels=labels,
            **statistics.outputs(),
        )
        statistics.release(Zeros(), t)
        assert clipping.noise_scale().shape == (layers,)
    for state in (clipping.state_dict(), groups.state_dict()):
        assert all(v.device == META for v in state.values() if isinstance(v, torch.Tensor))
