"""Where the settings of `adaclip train` come from, and which source wins. Needs no torch.

Precedence: built-in defaults < the data set's shipped config < --config FILE < flags. A scheme stands just below the
source that names it: naming one is setting all that it sets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from adaclip.schemes import SCHEMES, chain
from adaclip.train_config import MACHINE, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Tables",
    "add_flags",
    "as_flags",
    "flags_given",
    "overlay",
    "read_tables",
    "resolve",
    "resume_with",
    "setting_of",
    "write_tables",
]

_FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_EXCLUSIVE = (("epsilon", "noise_multiplier"), ("epochs", "steps"))
# A setting, and those that mean something else once it changes.
_TIED = {
    "model": ("model_option",),
    "optimizer": ("lr", "momentum", "weight_decay", "floor"),
    "clipping": ("norm_schedule",),
}


class Tables(NamedTuple):
    """A file's settings: those of [train], and by scheme those of [scheme.NAME]."""

    train: dict[str, Any]
    schemes: dict[str, dict[str, Any]]


# --- flags ----------------------------------------------------------------------------------------------


def add_flags(
    parser: argparse.ArgumentParser, without: Collection[str] = (), hidden: Collection[str] = ()
) -> None:
    """Add a flag for every setting not in `without`; --help does not show those in `hidden`.

    Flags that are not given leave no trace in the namespace.
    """
    for name, spec in _FIELDS.items():
        if name in without:
            continue
        meta = spec.metadata
        options: dict[str, Any] = {"help": meta["help"], "default": argparse.SUPPRESS, "dest": name}
        if meta["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif meta["kind"] is dict:
            options |= {"action": _KeyValue, "metavar": meta["metavar"]}
        else:
            options["type"] = meta["kind"]
            if meta["choices"]:
                options["choices"] = meta["choices"]
            elif meta["metavar"]:
                options["metavar"] = meta["metavar"]
            if spec.default not in (None, MISSING):
                options["help"] += f" (default {spec.default})"
        if name in hidden:
            options["help"] = argparse.SUPPRESS
        parser.add_argument("--" + name.replace("_", "-"), **options)


class _KeyValue(argparse.Action):
    """Collects key=value pairs into a dict."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        key, equals, text = values.partition("=")
        if not key or not equals:
            parser.error(f"--{self.dest.replace('_', '-')} must be KEY=VALUE, got {values!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | {key: value})


def flags_given(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name: value for name, value in vars(namespace).items() if name in _FIELDS}


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The command line's flags that give these settings; those that are None are left out."""
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, Mapping):
            words += [f"{flag}={key}={json.dumps(item)}" for key, item in value.items()]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def setting_of(name: str, text: str) -> Any:
    """The value of a setting, from text. Raises ValueError for an unknown setting, or text of another kind."""
    if name not in _FIELDS:
        raise ValueError(f"unknown setting {name!r}; known are {', '.join(_FIELDS)}")
    kind = _FIELDS[name].metadata["kind"]
    try:
        value = text if kind is str else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {text!r}") from error
    return _checked({name: value}, "the command line")[name]


# --- files and precedence -------------------------------------------------------------------------------


def resolve(flags: Mapping[str, Any], config: str | Path | Tables | None = None) -> TrainConfig:
    """The checked settings of a new run.

    Args:
        flags: settings by name, the last word.
        config: a TOML file with a [train] table, [scheme.NAME] tables, or both; or what `read_tables` made of one.

    A source that sets one of an exclusive pair (epsilon | noise_multiplier, epochs | steps) overrides the
    other; one that changes the model or the optimizer drops what lower sources set for another one (model
    options; lr, momentum, weight_decay, floor). A scheme's settings, followed by the [scheme.NAME] tables of the
    data set's config and of `config`, stand just below the source that names the scheme: a scheme given as a flag
    overrides a file's [train], and further flags override the scheme.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, an unreadable file, an unknown
        data set. OSError: the file cannot be read.
    """
    given = config if isinstance(config, Tables) else Tables({}, {})
    if isinstance(config, str | Path):
        given = read_tables(Path(config))
    named = str(config) if isinstance(config, str | Path) else "the recipe"
    dataset = flags.get("dataset", given.train.get("dataset", TrainConfig.dataset))
    shipped = _shipped(dataset)
    sources = [("the data set's config", shipped.train), (named, given.train), ("flags", flags)]
    naming = [at for at, (_, layer) in enumerate(sources) if layer.get("scheme") is not None]
    merged: dict[str, Any] = {}
    for at, (source, layer) in enumerate(sources):
        if naming and at == naming[-1]:
            for name in chain(layer["scheme"]):
                merged = overlay(merged, SCHEMES[name].settings, f"scheme {name}")
                for origin, tables in (("the data set's config", shipped), (named, given)):
                    merged = overlay(merged, tables.schemes.get(name, {}), f"[scheme.{name}] of {origin}")
        merged = overlay(merged, layer, source)
    return TrainConfig(**merged).check()


def resume_with(saved: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainConfig:
    """The settings of a resumed run: the saved ones, with the `MACHINE` settings of `flags`.

    Raises:
        ValueError: a flag contradicts the saved settings, or these are not settings of this version.
    """
    saved = _checked(saved, "config.json")
    merged = dict(saved)
    for name, value in flags.items():
        before = saved.get(name)
        if name in MACHINE:
            merged[name] = value
        elif (name != "model_option" and value != before) or (
            name == "model_option" and value.items() - before.items()
        ):
            raise ValueError(
                f"--{name.replace('_', '-')} must be what the run was started with, {before!r}, "
                f"got {value!r}: start a new run to change it"
            )
    return TrainConfig(**merged).check()


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`lower` with the settings of `upper`, by the rules of `resolve`. Raises ValueError, naming `source`."""
    merged = dict(lower)
    for pair in _EXCLUSIVE:
        set_here = [name for name in pair if upper.get(name) is not None]
        if len(set_here) == 2:
            raise ValueError(f"only one of {pair[0]} and {pair[1]} may be given, got both in {source}")
        if set_here:
            for name in pair:
                merged.pop(name, None)
    for name, dependents in _TIED.items():
        if name in upper and upper[name] != merged.get(name, _FIELDS[name].default):
            for dependent in dependents:
                merged.pop(dependent, None)
    options = merged.get("model_option", {}) | dict(upper.get("model_option", {}))
    return merged | dict(upper) | ({"model_option": options} if options else {})


def read_tables(path: Path) -> Tables:
    """The checked settings of a TOML file. Raises ValueError or OSError, as `resolve` does."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    schemes = tables.get("scheme", {})
    groups = [tables.get("train", {}), schemes, *(schemes.values() if isinstance(schemes, dict) else ())]
    if not tables or set(tables) - {"train", "scheme"} or not all(isinstance(each, dict) for each in groups):
        raise ValueError(
            f"{path} must hold the table [train], tables [scheme.NAME] or both, got "
            f"{', '.join(map(repr, tables)) or 'nothing'}"
        )
    unknown = [name for name in schemes if name not in SCHEMES]
    if unknown:
        raise ValueError(
            f"{path} has tables for unknown schemes {', '.join(map(repr, unknown))}; known are {', '.join(SCHEMES)}"
        )
    for name, table in schemes.items():
        if "scheme" in table or "dataset" in table:
            raise ValueError(f"[scheme.{name}] in {path} must not set scheme or dataset: [train] does")
    return Tables(
        _checked(tables.get("train", {}), str(path)),
        {name: _checked(table, f"[scheme.{name}] of {path}") for name, table in schemes.items()},
    )


def write_tables(tables: Tables) -> str:
    """The text of a TOML file that `read_tables` reads as `tables`; settings that are None are left out."""
    parts = {"train": tables.train} | {f"scheme.{name}": table for name, table in tables.schemes.items()}
    return "\n".join(
        f"[{title}]\n"
        + "".join(f"{key} = {_toml(value)}\n" for key, value in table.items() if value is not None)
        for title, table in parts.items()
    )


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON's numbers, truth values and strings are TOML's; but TOML has no surrogate pairs.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _shipped(dataset: str) -> Tables:
    kind = dataset.partition(":")[0]
    folder = resources.files("adaclip") / "configs"
    names = {entry.name for entry in folder.iterdir()}
    if f"{kind}.toml" not in names:
        # Only now: knowing every MedMNIST name costs an import of torch.
        from adaclip.data import NAMES

        if kind not in NAMES:
            raise ValueError(f"dataset must be one of {', '.join(NAMES)} or folder:PATH, got {dataset!r}")
        kind = "medmnist"
    with resources.as_file(folder / f"{kind}.toml") as path:
        return read_tables(path)


def _checked(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`table` with every key known and every value of its kind."""
    unknown = [key for key in table if key not in _FIELDS]
    if unknown:
        raise ValueError(
            f"{source} has unknown settings {', '.join(map(repr, unknown))}; known are {', '.join(_FIELDS)}"
        )
    checked = {}
    for name, value in table.items():
        kind, choices = _FIELDS[name].metadata["kind"], _FIELDS[name].metadata["choices"]
        if kind is float and type(value) is int:
            value = float(value)
        if value is None and _FIELDS[name].default is None:
            checked[name] = None
            continue
        if type(value) is not kind:
            raise ValueError(f"{name} in {source} must be {_KINDS[kind]}, got {value!r}")
        if choices and value not in choices:
            raise ValueError(f"{name} in {source} must be one of {', '.join(choices)}, got {value!r}")
        checked[name] = value
    return checked


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a table"}
