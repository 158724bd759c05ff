"""The table of docs/migrating-from-opacus.md: complete, current, and of things that exist."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("opacus", reason="its public names are what the table must hold")

import opacus
import opacus_names
from opacus.accountants import utils as their_utils
from opacus.utils.batch_memory_manager import BatchMemoryManager

import adaclip.opacus
from adaclip.opacus import _replacements, accountants
from adaclip.opacus.utils import batch_memory_manager

PAGE = (Path(__file__).parents[1] / "docs" / "migrating-from-opacus.md").read_text(encoding="utf-8")
ARGUMENTS = PAGE.split("#### Arguments")[1].split("\n### ")[0]


def rows(text):
    """(the names in the first column, the first column, the second one) of every table row."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 2 and cells[0] not in ("Opacus", "---"):
            yield re.findall(r"`([^`]+)`", cells[0]), *cells


@functools.cache
def table():
    """{module: names in its section}, without the arguments."""
    sections = re.split(r"^### `([\w.]+)`$", PAGE, flags=re.M)[1:]
    found = {}
    for module, text in zip(sections[::2], sections[1::2], strict=True):
        text = text.split("#### Arguments")[0]
        names = [name for row, *_ in rows(text) for name in row]
        assert len(names) == len(set(names)), module
        found[module] = set(names)
    return found


def test_every_public_name_is_in_the_table():
    missing = {
        module: sorted(names - table().get(module, set()))
        for module, names in opacus_names.public_names().items()
        if names - table().get(module, set())
    }
    assert not missing


def test_packages_export_nothing_else():
    """What a package's __all__ names is defined in a module that the table covers."""
    known = {name for names in table().values() for name in names}
    for module in opacus_names.modules():
        for name in getattr(module, "__all__", []):
            # One of them is misspelled, and names nothing.
            value = getattr(module, name, module)
            assert name in known or name.startswith("_") or inspect.ismodule(value), (module.__name__, name)


@pytest.mark.skipif(opacus.__version__ != "1.6.0", reason="the table is of Opacus 1.6.0")
def test_the_table_holds_nothing_else():
    collected = opacus_names.public_names()
    importable = {module.__name__ for module in opacus_names.modules()}
    stale = {
        module: sorted(names - collected.get(module, set()))
        for module, names in table().items()
        # Lightning need not be installed.
        if names - collected.get(module, set()) and (module in importable or module != "opacus.lightning")
    }
    assert not stale


def arguments_of(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


METHODS = {
    "PrivacyEngine": "__init__",
    "make_private": "make_private",
    "make_private_with_epsilon": "make_private_with_epsilon",
    "get_epsilon": "get_epsilon",
    "is_compatible": "is_compatible",
    "validate": "validate",
    "get_compatible_module": "get_compatible_module",
    "save_checkpoint": "save_checkpoint",
    "load_checkpoint": "load_checkpoint",
}


@pytest.mark.parametrize("shown", METHODS)
def test_every_argument_is_in_the_table_and_taken(shown):
    method = METHODS[shown]
    theirs = arguments_of(getattr(opacus.PrivacyEngine, method))
    told = [name for (first, *names), *_ in rows(ARGUMENTS) if first == shown for name in names]
    assert sorted(told) == sorted(theirs)
    ours = arguments_of(getattr(adaclip.opacus.PrivacyEngine, method))
    assert set(theirs) - {"kwargs"} <= set(ours)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (their_utils.get_noise_multiplier, accountants.get_noise_multiplier),
        (BatchMemoryManager.__init__, batch_memory_manager.BatchMemoryManager.__init__),
        (opacus.accountants.RDPAccountant.get_epsilon, accountants.RDPAccountant.get_epsilon),
        (opacus.accountants.RDPAccountant.get_privacy_spent, accountants.RDPAccountant.get_privacy_spent),
    ],
)
def test_arguments_are_taken(theirs, ours):
    assert set(arguments_of(theirs)) - {"kwargs"} <= set(arguments_of(ours))


def resolve(dotted):
    """What an adaclip name stands for; AttributeError or ImportError if nothing."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            value = getattr(value, part)
        return value
    raise ImportError(dotted)


def adaclip_names(text):
    return sorted(set(re.findall(r"\badaclip(?:\.\w+)+", text)))


def test_every_adaclip_name_exists():
    names = adaclip_names(PAGE)
    assert len(names) > 50
    for name in names:
        resolve(name)
    for line in re.findall(r"^(from adaclip\S* import \w+)", PAGE, flags=re.M):
        exec(line)
    with pytest.raises(AttributeError):
        resolve("adaclip.accounting.no_such_name")


def test_errors_name_what_exists_and_stand_for_what_opacus_has():
    known = {
        f"{module}.{name}".removeprefix("opacus.") for module, names in table().items() for name in names
    }
    last = {name.rsplit(".", 1)[-1] for name in known}
    for name, text in _replacements._INSTEAD.items():
        for dotted in adaclip_names(text):
            resolve(dotted)
        if not text.startswith(_replacements._OLD):
            # An attribute that a constructor sets is no public name of the class.
            assert name.rsplit(".", 1)[-1] in last | {"generator", "step_hook", "secure_rng"}, name


def test_the_same_means_the_same_name():
    """Where the page says "the same", the import line with adaclip.opacus in place of opacus works."""
    for text in re.split(r"^### ", PAGE, flags=re.M)[1:]:
        module = re.match(r"`([\w.]+)`", text)[1]
        for names, _, here in rows(text.split("#### Arguments")[0]):
            if here.startswith("the same"):
                for name in names:
                    home, member = re.fullmatch(r"(\w+)((?:\.\w+)?)", name).groups()
                    package = "adaclip." + module
                    try:
                        value = getattr(importlib.import_module(package), home)
                    except ModuleNotFoundError:
                        # Defined in a module that has no file of its own here: the package exports it.
                        value = getattr(importlib.import_module(package.rpartition(".")[0]), home)
                    if member:
                        assert hasattr(value, member[1:]), name
