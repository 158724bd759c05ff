"""A few cases of every fuzz target; `make fuzz` runs thousands. A target's own assertions say what must hold."""

import contextlib
import os

import pytest
from fuzz.bounds import Slow
from fuzz.targets import CERTIFIED, GROUPS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Cases of each target: a second or so.
_SLOW = {"calibration": 3, "calibrate": 3, "curves": 8, "accountants": 8, "epsilon": 8, "run_folders": 8}
_TARGETS = {name: target for targets in GROUPS.values() for name, (target, _) in targets.items()}


@pytest.mark.parametrize("name", _TARGETS)
def test_a_few_cases(name, tmp_path, monkeypatch, one_thread):
    # What a case leaves in the folder it runs in stays here.
    monkeypatch.chdir(tmp_path)

    @settings(
        max_examples=_SLOW.get(name, 25),
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(st.data())
    def cases(data):
        with contextlib.suppress(Slow) if name in CERTIFIED else contextlib.nullcontext():
            assert _TARGETS[name](data.draw)

    cases()
    assert os.getcwd() == str(tmp_path)
