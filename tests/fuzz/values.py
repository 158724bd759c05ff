"""What the fuzzers feed in: values of every type and range, and structures with one part changed."""

from __future__ import annotations

import copy
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

_HUGE = 10**400  # beyond floats

NUMBERS = st.sampled_from(
    [
        0, 1, -1, 2, 7, 255, 2**31, -(2**31), 2**32, 2**53, 2**63, 2**64, 2**256, _HUGE, -_HUGE, True, False,
        0.0, -0.0, 5e-324, -5e-324, 1e-320, 1e-30, 1e-12, 1e-5, 0.3, 0.5, 1 - 2**-53, 1.0, 1.5, 1e6, 1e30, 1e39,
        1.7e308, math.nan, math.inf, -math.inf,
    ]
)  # fmt: skip
# Made anew for each case: some of them can be written to.
_OTHERS: tuple[Any, ...] = (
    lambda: None,
    lambda: "",
    lambda: "1",
    lambda: "nan",
    lambda: "flat",
    lambda: "poisson",
    lambda: "\0\n\ud800",
    lambda: b"1",
    lambda: 1j,
    lambda: [],
    lambda: [1.0],
    lambda: [math.nan, "x"],
    lambda: (),
    lambda: (0.5, 0.5),
    lambda: {},
    lambda: {0: 1},
    lambda: {"a": None},
    lambda: {1, 2},
    lambda: range(3),
    object,
    lambda: int,
    lambda: len,
    lambda: lambda *_: math.nan,
    lambda: iter([1]),
    lambda: Fraction(1, 3),
    lambda: Decimal("0.5"),
    lambda: Decimal("nan"),
    lambda: np.float64(0.5),
    lambda: np.float32("nan"),
    lambda: np.int64(3),
    lambda: np.bool_(True),
    lambda: np.complex128(1j),
    lambda: np.array(0.5),
    lambda: np.array([]),
    lambda: np.array([0.5, 2.0]),
    lambda: np.array(["x"]),
    lambda: np.array([None], dtype=object),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(3),
    lambda: torch.tensor([]),
    lambda: torch.tensor([0.5, 2.0]),
    lambda: torch.tensor([[1, 2]]),
    lambda: torch.tensor(True),
    lambda: torch.tensor(1j),
    lambda: torch.empty(2, device="meta"),
    lambda: torch.device("cpu"),
    lambda: torch.float32,
    lambda: torch.nn.ReLU(),
)
OTHERS = st.integers(0, len(_OTHERS) - 1).map(lambda i: _OTHERS[i]())
ANYTHING = NUMBERS | OTHERS | st.integers() | st.floats() | st.text(max_size=5)


def mostly(valid: st.SearchStrategy, share: int = 4) -> st.SearchStrategy:
    """`valid`, and anything else once in so many."""
    return st.integers(1, share).flatmap(lambda i: ANYTHING if i == 1 else valid)


def arguments(draw: Any, **valid: st.SearchStrategy) -> dict[str, Any]:
    """Keyword arguments: some left out, most of them valid, the rest anything. A name that ends in _ is never left out."""
    made = {}
    hostile = draw(st.integers(0, 2))  # how many at most
    names = list(valid)
    bad = draw(st.sets(st.sampled_from(names), max_size=hostile)) if names else set()
    for name, strategy in valid.items():
        if name in bad:
            made[name.rstrip("_")] = draw(ANYTHING)
        elif name.endswith("_") or draw(st.integers(0, 3)):
            made[name.rstrip("_")] = draw(strategy)
    return made


# --- structures -----------------------------------------------------------------------------------------

PLAIN = (
    NUMBERS.filter(lambda x: not isinstance(x, int) or abs(x) < 2**70)
    | st.sampled_from([None, "", "x", "inf", "nan", [], {}, [1], {"a": 1}, [[]], [None]])
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
)


def changed(draw: Any, tree: Any, leaf: st.SearchStrategy = PLAIN) -> Any:
    """A copy of a structure of dicts and lists in which one to three places are replaced, removed, renamed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        tree = _changed_once(draw, tree, leaf)
    return tree


def _changed_once(draw: Any, tree: Any, leaf: st.SearchStrategy) -> Any:
    deeper = isinstance(tree, dict | list) and len(tree) > 0 and draw(st.integers(0, 4)) > 0
    if not deeper:
        return copy.deepcopy(draw(leaf))  # what strategies hold is not to be written to
    key = draw(
        st.sampled_from(sorted(tree, key=repr)) if isinstance(tree, dict) else st.integers(0, len(tree) - 1)
    )
    how = draw(st.sampled_from(["inside", "inside", "inside", "remove", "double"]))
    if how == "inside":
        tree[key] = _changed_once(draw, tree[key], leaf)
    elif how == "remove":
        del tree[key]
    elif isinstance(tree, list):
        tree.insert(key, copy.deepcopy(tree[key]))
    else:
        tree[f"{key}2"] = copy.deepcopy(tree[key])
    return tree


def damaged(draw: Any, content: bytes) -> bytes:
    """The bytes of a file, with some flipped, cut off, put in or moved; headers and trailers more often."""
    data = bytearray(content)
    how = draw(st.sampled_from(["flip", "flip", "cut", "insert", "repeat", "replace"]))
    if how == "cut" or not data:
        return bytes(data[: draw(st.integers(0, max(len(data) - 1, 0)))])
    if how == "replace":
        return draw(st.binary(max_size=64))
    end = len(data)
    near = st.integers(0, min(40, end) - 1) | st.integers(max(end - 40, 0), end - 1) | st.integers(0, end - 1)
    at = draw(near)
    if how == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=8))
    elif how == "repeat":
        data[at:at] = data[at : at + draw(st.integers(1, 64))]
    else:
        for _ in range(draw(st.integers(1, 4))):
            data[draw(near)] ^= draw(st.integers(1, 255))
    return bytes(data)
