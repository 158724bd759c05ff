"""The public names of the installed Opacus, by introspection."""

import importlib
import inspect
import pkgutil

import opacus


def modules():
    """Opacus's modules, without its tests and scripts, and without those whose own imports are not installed."""
    for found in pkgutil.walk_packages(opacus.__path__, "opacus."):
        parts = found.name.split(".")
        if "tests" in parts or "scripts" in parts or any(part.startswith("_") for part in parts):
            continue
        try:
            yield importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("opacus"):
                raise


def public_names():
    """{module: its public classes, functions and constants, and `Class.member` of what its classes define}."""
    names = {}
    for module in modules():
        own = set()
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                if value.__module__ != module.__name__:
                    continue
                own.add(name)
                if inspect.isclass(value):
                    own |= {f"{name}.{member}" for member in vars(value) if not member.startswith("_")}
            elif name.isupper() and not inspect.ismodule(value):
                own.add(name)
        if own:
            names[module.__name__] = own
    return names
