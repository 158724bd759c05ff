"""`make gpu` without a GPU: every kind of measurement at toy sizes, and what a report tells and withholds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    # Behind the installed packages: only bench is meant.
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])


def listing():
    return sorted((path.name, path.stat().st_mtime_ns) for path in RESULTS.iterdir())


def gpu(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_dry_run_measures_every_kind_of_thing(tmp_path):
    before = listing()
    done = gpu("--dry-run", "--out", str(tmp_path), "--rounds", "5", "--budget", "900")
    assert done.returncode == 0, done.stdout + done.stderr
    assert listing() == before
    (path,) = tmp_path.glob("gpu-cpu-*.json")
    found = json.loads(path.read_text())
    assert found["dry_run"]
    sections = {}
    for result in found["results"]:
        sections.setdefault(result["section"], []).append(result)
    assert sections.keys() == {"checks", "steps", "kernels", "peers"}
    assert sections["checks"][0]["counts"]["passed"] > 0
    for result in (*sections["steps"], *sections["kernels"]):
        assert result["status"] == "ok", result
    for result in sections["steps"]:
        plain, private = result["rows"]
        assert plain["name"].startswith("ordinary")
        assert private["error"] < 0.05
        assert private["ratio"] > 0
    assert all(row["us"] > 0 for result in sections["kernels"] for row in result["rows"])
    text = path.with_suffix(".md").read_text()
    assert "Dry run" in text
    assert text in done.stdout


def test_a_dry_run_may_not_write_where_measurements_live():
    done = gpu("--dry-run", "--out", str(RESULTS))
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_what_the_budget_does_not_reach_is_listed(tmp_path):
    from bench import gpu as command
    from bench.gpu_parts.plan import plan

    class Slow:
        def measure(self, section, arguments, limit):
            if section == "environment":
                keys = ("driver", "torch", "cuda", "triton", "python", "commit")
                return {
                    "status": "ok",
                    "environment": {"gpu": "NVIDIA H100 80GB HBM3", **dict.fromkeys(keys, "1")},
                }
            assert limit <= 14 - 5
            return {"status": "oom", "rows": []}

    args = type("Arguments", (), {"budget": 14.0, "skip_checks": True, "dry_run": False})()
    report = command.Report(tmp_path, False, {})
    # A budget that only measurements of a few seconds fit in.
    items = [command.Item("short", "kernels", 1, {}), *plan()]
    command.run(items, report, Slow(), args)
    states = [r["status"] for r in json.loads(report.path.read_text())["results"]]
    assert report.path.name.startswith("gpu-h100-80gb-hbm3-")
    assert states == ["oom", *["not reached"] * len(plan())]


def report(folder, *results):
    from bench.gpu_parts.report import Report

    made = Report(folder, True, {})
    keys = ("driver", "torch", "cuda", "triton", "python", "commit")
    made.begin({"gpu": "Some GPU", **dict.fromkeys(keys, "1")})
    for result in results:
        made.add(result)
    return made


ROWS = [
    {"name": "ordinary", "status": "ok", "ms": 2.0},
    {
        "name": "adaclip",
        "status": "ok",
        "ms": 2.5,
        "ratio": 1.25,
        "ratio_quartiles": [1.2, 1.3],
        "memory_ratio": 1.1,
    },
]
STEP = {
    "id": "a step",
    "section": "steps",
    "status": "ok",
    "model": "m",
    "batch_size": 1,
    "precision": "p",
    "rows": ROWS,
}


@pytest.mark.parametrize("verdict", ["ok", "cut off", "failed"])
def test_no_ratio_is_told_when_a_test_has_failed(verdict, tmp_path):
    checks = {"id": "tests", "section": "checks", "status": verdict, "counts": {}, "failed": []}
    made = report(tmp_path, checks, STEP)
    told = made.path.read_text() + made.path.with_suffix(".md").read_text()
    assert ("1.25" in told) == (verdict != "failed")
    assert "2.5" in told


def test_a_wrong_sum_is_not_timed():
    from bench.gpu_parts import steps

    case = steps.Case("toy", 8, "fp32", torch.device("cpu"), toy=True)

    def longer(*arguments, **options):
        step, rest = steps.bench_step.ours(*arguments, **options)

        def wrong():
            step()
            with torch.no_grad():
                for p in arguments[0].parameters():
                    p.mul_(1.5)

        return wrong, rest

    result = steps.measure(
        case,
        {
            "ordinary, eager": lambda: steps.ordinary(case, False, False),
            "adaclip, eager": lambda: steps.Running(case, longer),
        },
        5,
    )
    plain, private = result["rows"]
    assert result["status"] == private["status"] == "red"
    assert plain["ms"] > 0
    assert private["ms"] is None
    assert "ratio" not in private


def test_longer_sums_and_turned_ones_are_wrong():
    from bench.gpu_parts.steps import Wrong, judge

    exact, aside = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    exact[0] = aside[1] = 2.0
    assert judge(exact, exact, 0.0) == 0.0
    # A norm that is a bound makes the sum shorter.
    assert judge(0.95 * exact, exact, 0.0) == pytest.approx(0.05)
    for found in (1.01 * exact, 0.8 * exact, exact + 0.01 * aside, exact * float("nan")):
        with pytest.raises(Wrong):
            judge(found, exact, 1e-3)


def test_running_out_of_memory_is_a_result():
    from bench.gpu_parts import steps

    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    case = steps.Case("toy", 8, "fp32", torch.device("cpu"), toy=True)
    result = steps.measure(case, {"ordinary, eager": greedy}, 5)
    assert result["status"] == result["rows"][0]["status"] == "oom"


def test_verdicts_are_read_in_both_forms():
    from bench.gpu_parts.checks import verdicts

    output = """
test_triton_conv.py::test_a[x - y] PASSED                     [ 10%]
test_triton_conv.py::test_b FAILED                            [ 20%]
[gw1] [ 30%] SKIPPED test_triton_linear.py::test_c[1-torch.float16]
[gw0] [ 40%] PASSED test_triton_linear.py::test_d
ERROR while it was cut off: test_x.p
"""
    assert verdicts(output) == {
        "test_triton_conv.py::test_a[x - y]": "passed",
        "test_triton_conv.py::test_b": "failed",
        "test_triton_linear.py::test_c[1-torch.float16]": "skipped",
        "test_triton_linear.py::test_d": "passed",
    }


def test_floors():
    from bench.gpu_parts.kernels import conv_work, sum_work
    from bench.gpu_parts.peaks import Work, floor, peaks_of
    from bench.tune_backends import GEOMETRY

    h100 = peaks_of("NVIDIA H100 80GB HBM3")
    assert peaks_of("NVIDIA H100 PCIe").bytes < h100.bytes < peaks_of("NVIDIA H200").bytes
    assert peaks_of("NVIDIA A100-SXM4-40GB").bytes < peaks_of("NVIDIA A100-SXM4-80GB").bytes
    assert peaks_of("Quadro K600") is None
    assert floor(Work(3e9), None, 3e12) == (1e-3, "bytes")
    assert floor(Work(3e9, 989.4e12), h100, 3e12) == (1.0, "tensor cores")
    assert floor(Work(3e9, 0, "half", 2 * 66.9e12), h100, 3e12) == (2.0, "float32 units")
    gram = {"way": "gram", "keep": False}
    half = conv_work(gram, (128, 128, 16), torch.bfloat16, 2, GEOMETRY)
    assert half.bytes == 2 * 2 * 256 * 256
    assert half.products == 2 * 256**2 * 256
    single = conv_work(gram, (128, 128, 16), torch.float32, 2, GEOMETRY)
    assert (single.bytes, single.products, single.kind) == (2 * half.bytes, 3 * half.products, "tf32")
    kept = conv_work({"way": "instantiate", "keep": True}, (3, 64, 32), torch.bfloat16, 1, GEOMETRY)
    assert kept.products == 2 * 1024 * 27 * 64
    assert kept.bytes == 2 * 1024 * 67 + 4 * 27 * 64
    whole = sum_work((64, 64, 32), torch.bfloat16, 2)
    assert (whole.products, whole.kind) == (2 * 2 * 1024 * 576 * 64, "half")
    assert whole.bytes == 2 * 2 * 1024 * 128 + 4 * 576 * 64
    assert sum_work((64, 64, 32), torch.float32, 2).kind == "tf32"


def test_a_second_run_of_a_day_leaves_the_first_ones_results(tmp_path):
    first, second, third = (report(tmp_path, {**STEP, "id": name}) for name in "abc")
    assert len({made.path for made in (first, second, third)}) == 3
    for made, name in ((first, "a"), (second, "b"), (third, "c")):
        assert json.loads(made.path.read_text())["results"][0]["id"] == name


def test_what_is_promised_is_measured_first():
    """A step as a graph, the noisy step and the costliest norms, well before half of the time is gone."""
    from bench.gpu_parts.plan import plan

    items, spent = plan(), 0
    wanted = {"vgg16, B = 256, bf16, graph", "noisy step", "conv norms and sums 128->128 @ 16x16, bfloat16"}
    assert len({item.id for item in items}) == len(items)
    for item in items:
        spent += item.seconds
        wanted.discard(item.id)
        if not wanted:
            break
    assert not wanted
    assert spent < 200
