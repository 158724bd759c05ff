"""Triton's counts over samples against the reference."""

import math

import pytest
import torch

pytest.importorskip("triton")

from test_clip_ops import f64

from adaclip import reference
from adaclip.kernels.sample_statistics import sample_statistics

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning"
    ),  # NumPy's, in the interpreter
]
OUTPUTS = ("below", "histogram", "group_sums", "group_counts")
NEEDS = {
    "below": (),
    "histogram": ("edges",),
    "group_sums": ("labels", "table", "shares"),
    "group_counts": ("labels", "table"),
}


def arguments(groups, rows, real):
    """Everything that can be counted, with samples that must not be."""
    sqnorms = torch.rand(groups, rows, dtype=torch.float64) * 4
    if rows > 20:
        sqnorms[0, 3], sqnorms[groups - 1, 7], sqnorms[0, 9] = math.nan, math.inf, -1.0
        sqnorms[:, 11] = 0.0
        sqnorms[:, 12] = 1e300
    labels = torch.randint(0, 5, (rows,))
    labels[real:] = 999
    shares = torch.rand(rows, dtype=torch.float64)
    shares[real:] = math.nan
    return {
        "sqnorms": sqnorms,
        "thresholds": torch.linspace(2.0, 5.0, groups, dtype=torch.float64),
        "edges": f64([1.0, 2.0, 2.0, 4.0, 6.0, 8.0]),
        "labels": labels,
        "table": torch.tensor([0, 1, 1, 2, 0]),
        "shares": shares,
        "below": torch.full((groups,), 0.5, dtype=torch.float64),
        "histogram": torch.full((7,), 0.25, dtype=torch.float64),
        "group_sums": torch.full((4,), -1.5, dtype=torch.float64),
        "group_counts": torch.full((4,), 3.0, dtype=torch.float64),
    }


def compare(device, given, *, real, unit, count=None):
    """Count on both, and compare every sum."""
    ours = {name: t if t is None else t.to(device, copy=True) for name, t in given.items()}
    theirs = {name: t if t is None else t.clone() for name, t in given.items()}
    sample_statistics(**ours, real=real if count is None else count.to(device), unit=unit)
    reference.sample_statistics(**theirs, real=real, unit=unit)
    for name in OUTPUTS:
        if given[name] is None:
            continue
        exact = name != "group_sums"
        rtol = 0.0 if exact else 1e-13
        torch.testing.assert_close(ours[name].cpu(), theirs[name], rtol=rtol, atol=0.0, msg=name)
    return ours


@pytest.mark.parametrize("rows", [0, 1, 50, 700])
@pytest.mark.parametrize("groups", [1, 3])
def test_all_at_once(gpu_or_interpreter, rows, groups):
    real = max(0, rows - 4) if rows > 1 else rows
    compare(gpu_or_interpreter, arguments(groups, rows, real), real=real, unit=3.0)


@pytest.mark.parametrize("wanted", [*OUTPUTS, "groups"])
def test_one_at_a_time(gpu_or_interpreter, wanted):
    given = arguments(2, 40, 40)
    outputs = ("group_sums", "group_counts") if wanted == "groups" else (wanted,)
    keep = {"sqnorms", "thresholds", *outputs, *(need for name in outputs for need in NEEDS[name])}
    given = {name: t if name in keep else None for name, t in given.items()}
    ours = compare(gpu_or_interpreter, given, real=40, unit=1.0)
    assert all(not torch.equal(ours[name].cpu(), given[name]) for name in outputs)


def test_the_number_of_samples_may_live_on_the_device(gpu_or_interpreter):
    for real in (0, 1, 33):
        given = arguments(2, 40, real)
        compare(gpu_or_interpreter, given, real=real, unit=1.0, count=torch.tensor([real]))


def test_a_norm_on_an_edge_is_in_the_bin_below(gpu_or_interpreter):
    given = dict.fromkeys((*OUTPUTS, "labels", "table", "shares"))
    given["sqnorms"], given["thresholds"] = f64([[0.0, 1.0, 4.0, 16.0, 17.0]]), f64([4.0])
    given["edges"], given["histogram"], given["below"] = f64([1.0, 2.0, 4.0]), f64([0.0] * 4), f64([0.0])
    ours = compare(gpu_or_interpreter, given, real=5, unit=1.0)
    assert ours["histogram"].tolist() == [2.0, 1.0, 1.0, 1.0]
    assert ours["below"].tolist() == [1.5]


def test_a_label_outside_of_the_table_belongs_to_no_group(gpu_or_interpreter):
    given = arguments(1, 6, 6)
    given["labels"] = torch.tensor([-1, 5, 0, 4, 1 << 40, 3])
    ours = compare(gpu_or_interpreter, given, real=6, unit=1.0)
    assert ours["group_counts"].sum() == 4 * 3.0 + 3


def test_micro_batches_add_up_to_the_whole(gpu_or_interpreter):
    sqnorms = torch.rand(2, 30, dtype=torch.float64).to(gpu_or_interpreter)
    thresholds = f64([0.6, 0.7]).to(gpu_or_interpreter)
    whole, parts = torch.zeros_like(thresholds), torch.zeros_like(thresholds)
    sample_statistics(sqnorms, thresholds, unit=1.0, real=30, below=whole)
    for piece in sqnorms.split(7, dim=1):
        sample_statistics(piece.contiguous(), thresholds, unit=1.0, real=piece.shape[1], below=parts)
    assert torch.equal(whole, parts)
    assert whole.any()
