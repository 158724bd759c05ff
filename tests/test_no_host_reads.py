"""A step's statistics, factors and thresholds never read a device: on "meta", which has no values, they run."""

import pytest
import torch
from one_step import STRATEGIES

from adaclip import ops
from adaclip.clipping import PerGroupClipping, PerLayerClipping, Setting
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
@pytest.mark.parametrize("name", [*STRATEGIES, "per_group", "per_group, equal"])
def test_a_step_reads_nothing_back(name, use):
    made = STRATEGIES | {
        "per_group": lambda c: PerGroupClipping(),
        "per_group, equal": lambda c: PerGroupClipping("equal"),
    }
    clipping, groups = made[name](1.0), LabelGroups(use, groups=[0, 1, 1], diagnostics=True)
    param_groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "max_grad_norm": c} for c in (1.0, 2.0, 3.0)
    ]
    setting = Setting(3, (5, 6, 7), 4.0, META, param_groups=lambda: param_groups)
    layers = clipping.bind(setting)
    assert layers == (3 if isinstance(clipping, (PerLayerClipping, PerGroupClipping)) else 1)
    clipping.note_noise(1.0)
    groups.bind(setting)
    statistics = Statistics([*([] if clipping.side is None else [clipping.side]), groups], META)
    sqnorms = torch.ones(layers, ROWS, dtype=torch.float64, device=META)
    labels = torch.zeros(ROWS, dtype=torch.int64, device=META)
    for t in range(3):
        param_groups[0]["max_grad_norm"] += t
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
