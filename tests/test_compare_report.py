"""The report of `adaclip compare`: what its table, page and curves say about finished runs."""

import json
import math

import pytest

from adaclip.compare_report import export, summarize, table_text, write_report
from adaclip.plots import plot_comparison


def finished_row(scheme, seed, accuracy, **more):
    return {
        "run": f"{scheme}-s{seed}", "scheme": scheme, "seed": seed, "split": "test", "accuracy": accuracy, "loss": 1.0,
        "steps": 9, "epsilon": 2.5, "delta": 1e-5, "max_grad_norm": 1.0, "noise_multiplier": 1.5,
        "gradient_noise_multiplier": 1.6, "seconds": 3.0, "seconds_per_epoch": 2.0, "images_per_second": 10.0,
        "threads": 1,
    } | more  # fmt: skip


FACTS = {
    "train": {
        "dataset": "medical_mnist", "model": "vgg-mini", "model_option": {}, "batch_size": 40, "delta": 1e-5,
        "adjacency": "add_remove",
    },
    "run": {
        "dataset_size": 47163, "evaluated_on": {"split": "test", "size": 11653}, "duplicates_removed": 138,
        "trained_parameters": 1234, "steps": 9, "device": "cpu", "threads": 1,
    },
    "versions": {"adaclip": "0.1.0", "torch": "2.13.0", "python": "3.11"},
}  # fmt: skip


def test_the_table_holds_means_deviations_and_paired_differences(tmp_path):
    whole, part = (0.95, 0.96, 0.97), (0.94, 0.94, 0.96)
    rows = [finished_row("adaptive", s, a, epsilon=2.5 + s / 10) for s, a in enumerate(whole)]
    rows += [finished_row("adaptive-flat", s, a) for s, a in enumerate(part)]
    rows += [finished_row("adaptive-no-ema", 2, 0.98)]
    planned = {"adaptive": 3, "adaptive-flat": 3, "adaptive-no-ema": 3, "dpsgd": 3}
    table = summarize(rows, facts=FACTS, planned=planned, command="adaclip compare")
    first, _, third = table["rows"]
    assert first["accuracy_mean"] == pytest.approx(0.96)
    assert first["accuracy_std"] == pytest.approx(0.01)
    assert first["epsilon"] == 2.7
    assert third["accuracy_std"] is None
    assert table["missing"] == {"adaptive-no-ema": 2, "dpsgd": 3}
    flat, ema = table["ablations"]
    # Differences 0.01, 0.02, 0.01; Student's t with two degrees of freedom has its 97.5 % point at 4.302653.
    assert (flat["scheme"], flat["n"]) == ("adaptive-flat", 3)
    assert flat["difference"] == pytest.approx(0.04 / 3)
    assert flat["half_width"] == pytest.approx(4.302653 * (0.01 / math.sqrt(3)) / math.sqrt(3), rel=1e-6)
    assert ema["difference"] == pytest.approx(-0.01)
    assert ema["half_width"] is None

    curves = {row["run"]: [{"step": 9, "test_accuracy": row["accuracy"]}] for row in rows}
    written = write_report(
        tmp_path, rows, curves, facts=FACTS, planned=planned, command="adaclip compare", seconds=90.0
    )
    assert written == table | {"seconds": 90.0}
    report = (tmp_path / "report.md").read_text()
    for text in (
        "96.00 ± 1.00 %", "98.00 %", "(138 more left out, which equal a training image)", "11,653 test images",
        "not distinguishable", "one run: no verdict",
        "    adaclip compare", "All of it took 1.5 minutes.",
    ):  # fmt: skip
        assert text in report
    files = export(tmp_path, tmp_path / "results" / "compare.v1")
    assert [file.name for file in files] == ["compare.v1.md", "compare.v1.json", "compare.v1.png"]
    assert "![accuracy over steps](compare.v1.png)" in files[0].read_text()
    assert (
        json.loads(files[1].read_text())["rows"] == json.loads((tmp_path / "table.json").read_text())["rows"]
    )
    shown = table_text(table).splitlines()
    assert len(shown) == 4
    assert len({len(line) for line in shown}) == 1


@pytest.mark.parametrize(
    ("part", "verdict"), [((0.80, 0.81, 0.82), "the step helps"), ((0.99, 0.999, 1.0), "the step hurts")]
)
def test_a_clear_difference_has_a_verdict(tmp_path, part, verdict):
    rows = [finished_row("adaptive", s, 0.90 + s / 100) for s in range(3)]
    rows += [finished_row("adaptive-rdp", s, a) for s, a in enumerate(part)]
    curves = {row["run"]: [{"step": 1, "test_accuracy": 0.5}] for row in rows}
    write_report(
        tmp_path,
        rows,
        curves,
        facts=FACTS,
        planned={"adaptive": 3, "adaptive-rdp": 3},
        command="",
        seconds=0.0,
    )
    report = (tmp_path / "report.md").read_text()
    assert verdict in report
    assert "## Command" not in report


def test_no_rows_are_a_report_too(tmp_path):
    table = write_report(tmp_path, [], {}, facts={}, planned={"dpsgd": 2}, command="", seconds=0.0)
    assert table["rows"] == []
    assert table["missing"] == {"dpsgd": 2}
    assert "No run is finished yet" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "curves.png").exists()


def test_many_curves_of_unequal_length(tmp_path):
    runs = [[{"step": s, "test_accuracy": s / 10} for s in range(1, n)] for n in (3, 5)]
    plot_comparison(tmp_path / "c.png", {f"scheme {i}": runs for i in range(20)}, split="test")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
