"""Releases: what left the data set, as data, and under which adjacency each kind has a guarantee.

A ``SubsampledGaussian`` is one training step: Gaussian noise of standard deviation ``sigma`` times C on a sum of
vectors, one per example of a batch, each of norm at most C. ``Laplace``, ``PureDP`` and ``ApproximateDP`` are
releases outside training, such as a noisy mean of the data set; a Gaussian one is ``SubsampledGaussian(1.0, sigma)``
with every example in the batch.

Two data sets are neighbors when they differ in one example:

| adjacency | the neighbor |
|---|---|
| ``"add_remove"`` | has one example more or one fewer |
| ``"replace_one"`` | has another example in its place, so one contribution moves by up to 2C |
| ``"zero_out"`` | has a null example in its place, which may be sampled but contributes nothing |

| sampling | a batch holds | guarantee under |
|---|---|---|
| ``"poisson"`` | every example independently with probability q | all three |
| ``"truncated_poisson"`` | the same, cut to a cap that it exceeds with probability ≤ ``overflow`` | all three |
| ``"fixed_size"`` | B = qN examples, uniformly without replacement | replace_one, zero_out |
| ``"shuffled"`` | (one event per epoch) every example at most once an epoch, q = 1 | replace_one, zero_out |

Fixed-size and shuffled batches need a data set of the same size on both sides. A shuffled epoch counts as one
Gaussian release, without amplification: shuffling may not be accounted like Poisson sampling (Chua et al. 2024,
arXiv 2403.17673).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isinf
from typing import Any, NamedTuple

from adaclip.accounting import checks

ADJACENCIES = ("add_remove", "replace_one", "zero_out")
SAMPLINGS = ("poisson", "truncated_poisson", "fixed_size", "shuffled")


@dataclass(frozen=True)
class SubsampledGaussian:
    """One noisy sum over a batch, or one epoch of them for ``"shuffled"``.

    Attributes:
        q: sampling rate, in [0, 1]: the probability that an example is in the batch; B/N for ``"fixed_size"``; 1 for
            ``"shuffled"``. 0: nothing is released.
        sigma: noise standard deviation / C, where C bounds the norm of one example's contribution; ≥ 0. 0: no noise.
            inf: nothing is released.
        sampling: one of ``SAMPLINGS``.
        overflow: for ``"truncated_poisson"``, an upper bound, for either of two neighbors, on the probability that a
            step's Poisson batch exceeds the cap; in [0, 1]. 0 for the others.

    Raises:
        ValueError, TypeError: naming the argument, its rule and its value.
    """

    q: float
    sigma: float
    sampling: str = "poisson"
    overflow: float = 0.0

    def __post_init__(self) -> None:
        _set(self, "q", checks.probability("q", self.q))
        _set(self, "sigma", checks.noise("sigma", self.sigma))
        checks.one_of("sampling", self.sampling, SAMPLINGS)
        _set(self, "overflow", checks.probability("overflow", self.overflow))
        if self.overflow and self.sampling != "truncated_poisson":
            raise ValueError(
                f"overflow must be 0 for sampling {self.sampling!r} (it is truncated_poisson's), got {self.overflow!r}"
            )
        if self.sampling == "shuffled" and self.q != 1.0:
            raise ValueError(
                f"q must be 1 for sampling 'shuffled', got {self.q!r}: an epoch is one release of every example"
            )


@dataclass(frozen=True)
class Laplace:
    """A value released with Laplace noise; ``scale`` (> 0, finite) is the noise scale / its L1 sensitivity.

    The sensitivity is that of the ledger's adjacency.
    """

    scale: float

    def __post_init__(self) -> None:
        _set(self, "scale", checks.positive_finite("scale", self.scale))


@dataclass(frozen=True)
class PureDP:
    """Any (epsilon, 0)-differentially private release, under the ledger's adjacency; epsilon ≥ 0, finite."""

    epsilon: float

    def __post_init__(self) -> None:
        _set(self, "epsilon", checks.nonnegative_finite("epsilon", self.epsilon))


@dataclass(frozen=True)
class ApproximateDP:
    """Any (epsilon, delta)-differentially private release, under the ledger's adjacency.

    epsilon ≥ 0 and finite; delta in [0, 1].
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        _set(self, "epsilon", checks.nonnegative_finite("epsilon", self.epsilon))
        _set(self, "delta", checks.probability("delta", self.delta))


Release = SubsampledGaussian | Laplace | PureDP | ApproximateDP


class Event(NamedTuple):
    """``count`` releases of one kind, one after the other."""

    release: Release
    count: int


def _set(release: Any, name: str, value: float) -> None:
    # Frozen: what was checked is what is kept, as a plain float. + 0.0 turns -0.0 into 0.0.
    object.__setattr__(release, name, value + 0.0)


def check_guarantee(release: Release, adjacency: str) -> None:
    """Raise unless the release has a guarantee under ``adjacency``.

    Raises:
        ValueError: fixed-size or shuffled batches under add_remove; the message names both and the cure.
        TypeError: not a release.
    """
    if not isinstance(release, SubsampledGaussian | Laplace | PureDP | ApproximateDP):
        raise TypeError(
            "release must be a SubsampledGaussian, Laplace, PureDP or ApproximateDP of adaclip.accounting, "
            f"got {release!r}"
        )
    sampling = getattr(release, "sampling", "")
    if adjacency == "add_remove" and sampling in ("fixed_size", "shuffled"):
        raise ValueError(
            f"sampling {sampling!r} has no guarantee under adjacency 'add_remove', which changes the size of the data "
            "set: account under adjacency 'zero_out' or 'replace_one', or sample the batches by Poisson sampling"
        )


def checked_event(release: Release, count: int, adjacency: str) -> Event:
    """The event, or ValueError/TypeError as ``check_guarantee`` and for a count that is no integer in [0, 2**53]."""
    check_guarantee(release, adjacency)
    return Event(release, checks.integer("count", count, 0))


def event_pairs(name: str, events: object) -> list[tuple[Any, Any]]:
    """``events`` as a list of (release, count) pairs, whose parts are still to be checked.

    Raises:
        TypeError: anything else; the message calls it ``name``.
    """
    try:
        return [(release, count) for release, count in events]  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError):  # not iterable, not pairs, a tensor without data
        pass
    raise TypeError(f"{name} must be (release, count) pairs, got {events!r}")


def is_silent(release: Release) -> bool:
    """Whether nothing is released: q = 0, infinite noise, or (0, 0)-differential privacy."""
    if isinstance(release, SubsampledGaussian):
        return release.q == 0.0 or isinf(release.sigma)
    return isinstance(release, PureDP | ApproximateDP) and not any(asdict(release).values())


def is_noiseless(release: Release) -> bool:
    """Whether an example that is sampled is seen without noise (σ = 0, also by underflow of σ², and q > 0)."""
    return (
        isinstance(release, SubsampledGaussian) and release.q > 0.0 and release.sigma * release.sigma == 0.0
    )


_KINDS: dict[str, type] = {
    "subsampled_gaussian": SubsampledGaussian,
    "laplace": Laplace,
    "pure_dp": PureDP,
    "approximate_dp": ApproximateDP,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def release_to_dict(release: Release) -> dict[str, Any]:
    """The release as plain strings and floats; infinity is the string "inf", so that JSON of it is standard."""
    fields = {k: "inf" if v == float("inf") else v for k, v in asdict(release).items()}
    return {"release": _NAMES[type(release)], **fields}


def release_from_dict(fields: Mapping[str, Any]) -> Release:
    """The release that ``release_to_dict`` described.

    Raises:
        ValueError, TypeError: an unknown kind, a missing or unknown field, or a value out of range.
    """
    fields = dict(fields)
    name = fields.pop("release", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"release must be one of {', '.join(_KINDS)}, got {name!r}")
    known = kind.__dataclass_fields__.keys()
    if fields.keys() != known:
        raise ValueError(
            f"release {name!r} must have the fields {', '.join(known)}, got {', '.join(map(str, fields))}"
        )
    if fields.get("sigma") == "inf":
        fields["sigma"] = float("inf")
    return kind(**fields)
