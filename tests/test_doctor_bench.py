"""`adaclip doctor`, `adaclip bench` and adaclip.benchmark. Nothing here asserts how fast anything is."""

import json

import numpy as np
import pytest
import torch

from adaclip import benchmark, cli_bench, doctor
from adaclip.cli import main

TINY = ["--image-size", "8", "--batch-size", "4", "--repeats", "2"]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_doctor_reports_and_tests(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (
        "versions: adaclip",
        "C++ core: loaded",
        "SIMD:",
        "torch threads:",
        "CUDA kernels: ",
        "GPU:",
        "optional medmnist:",
    ):
        assert part in text
    assert text.count(": ok\n") == 2
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert report["core"]["simd"] in ("portable", "avx2", "avx512")


def test_doctor_fails_when_a_self_test_does(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_RFC_BLOCK", (0,) * 16)
    assert main(["doctor"]) == 1
    assert "failed: another block came out\n" in capsys.readouterr().out


def test_doctor_says_why_the_core_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_load_core", lambda: (None, "not built"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "C++ core: not loaded: not built" in text
    assert "something is broken" in text


def test_doctor_is_plain_about_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Big GPU")
    lines = doctor._lines(doctor.examine())
    assert "GPU: Big GPU" in lines


def test_doctor_says_whether_cuda_kernels_are_built():
    report = doctor.examine()
    assert report["core"]["cuda"]["note"]
    report["core"]["cuda"] = {"built": False, "note": "nvcc was not found"}
    assert "CUDA kernels: not built: nvcc was not found (README, Build with CUDA)" in doctor._lines(report)
    report["core"]["cuda"] = {"built": True, "note": "nvcc 13.0"}
    assert "CUDA kernels: built by nvcc 13.0" in doctor._lines(report)


def test_alternating_takes_turns():
    calls = []
    times = benchmark.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    for arguments in (({}, 1), ({"a": int}, 0)):
        with pytest.raises(ValueError, match="alternate needs"):
            benchmark.alternate(*arguments)


def test_ratios_are_paired():
    # Each pair has ratio 2, whatever the machine did in between.
    assert benchmark.median_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == (2.0, 2.0, 2.0)
    assert benchmark.median_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    ratio = benchmark.median_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert ratio == (3.0, 2.0, 4.0)
    assert str(ratio) == "3.000 (2.000 to 4.000)"


def test_peak_memory_sees_what_is_freed_again():
    def touch():
        np.ones(64 << 17)  # 64 MiB

    peak = benchmark.peak_memory(touch)
    if peak is None:
        pytest.skip("the peak of resident memory cannot be reset on this system")
    assert 60 << 20 < peak < 80 << 20


def test_bench_checks_and_times_a_model(capsys):
    assert main(["bench", "--model", "vgg-mini", *TINY]) == 0
    text = capsys.readouterr().out
    assert "clipped sum: relative error" in text
    assert "private / ordinary:" in text


def test_bench_takes_a_users_own_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
        "def batch(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.BatchNorm1d(10))\n"
        "def number(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--module", "my_nets:linear", "--json", *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "my_nets:linear"
    assert report["relative_error"] < 1e-5
    assert set(report["milliseconds"]) == {"ordinary", "private"}
    for module, message in (
        ("my_nets:batch", "adaclip.fix"),
        ("my_nets:number", "must return a torch.nn.Module, got int"),
        ("my_nets:other", "has no attribute 'other'"),
        ("no_such_nets:x", "No module named 'no_such_nets'"),
        ("my_nets", "must be MODULE:FACTORY"),
    ):
        assert main(["bench", "--module", module, *TINY]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "--module", "my_nets:linear", "--batch-size", "2", "--image-size", "9"]) == 2
    assert "cannot take an input of shape [2, 3, 9, 9]" in capsys.readouterr().err
    assert main(["bench", "--module", "my_nets:linear", "--classes", "3", *TINY]) == 2
    assert "logits [B, 3]" in capsys.readouterr().err


def test_bench_times_nothing_when_the_step_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(cli_bench, "_error", lambda *args: float("nan"))
    monkeypatch.setattr(cli_bench, "alternate", lambda *args: pytest.fail("timed a wrong step"))
    assert main(["bench", "--model", "vgg-mini", *TINY]) == 1
    assert "Nothing was timed" in capsys.readouterr().err
