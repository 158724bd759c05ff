"""A pytest plugin: the tests run on the core that ADACLIP_SANITIZED_CORE names, in place of the installed one."""

import importlib.util
import os
import sys

path = os.environ["ADACLIP_SANITIZED_CORE"]
spec = importlib.util.spec_from_file_location("adaclip._core", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["adaclip._core"] = module


def pytest_report_header(config):
    return f"core: {path}"


def pytest_sessionfinish(session):
    from adaclip import _core

    if _core is not module:
        raise RuntimeError(f"the tests ran on {_core.__file__}, not on {path}")
