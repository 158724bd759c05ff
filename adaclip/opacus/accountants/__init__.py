"""`opacus.accountants`: the same questions to adaclip's certified accountants. torch is not imported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np

from adaclip import accounting
from adaclip.accounting import Accountant, Event, SubsampledGaussian, rdp_to_epsilon, subsampled_gaussian_rdp
from adaclip.opacus._replacements import raise_attribute_error, raise_import_error

__all__ = ["IAccountant", "PRVAccountant", "RDPAccountant", "create_accountant", "get_noise_multiplier"]

_State = Mapping[str, Any]


class IAccountant(ABC):
    """Opacus's accountant over one of adaclip's own, or over that of an engine, which `of` gives.

    `len()` is the number of releases. (Opacus's is the number of runs of equal ones.)
    """

    kind: ClassVar[str]  # adaclip's name of it

    def __init__(self, of: Callable[[], Accountant] | None = None) -> None:
        own = accounting.create_accountant(self.kind) if of is None else None
        self._of: Callable[[], Accountant] = of or (lambda: self._own)
        self._own = own

    @classmethod
    @abstractmethod
    def mechanism(cls) -> str:
        """Opacus's name of it."""

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Book one release. An engine books its own: this is for releases made elsewhere on the same data."""
        self._of().step(sample_rate, noise_multiplier)

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sampling rate, steps) of every run of equal releases, in order.

        Raises ValueError if the ledger holds releases that are not of this kind (a noisy mean, shuffled batches).
        """
        return [_as_tuple(event) for event in self._of().history]

    @history.setter
    def history(self, runs: Iterable[tuple[float, float, int]]) -> None:
        runs = list(runs)
        if self._own is None:
            raise RuntimeError(
                "history must not be set on an engine's accountant: what was released stays on its account. "
                "Make an accountant of your own for other questions"
            )
        fresh = accounting.create_accountant(self.kind)
        for noise_multiplier, sample_rate, steps in runs:
            fresh.step(sample_rate, noise_multiplier, steps)
        self._own = fresh

    def get_epsilon(self, delta: float, **options: Any) -> float:
        """A certified upper bound on epsilon for everything booked.

        eps_error, delta_error: taken and not needed: the bound is at most about 1e-3 of itself above the truth.
        """
        unknown = options.keys() - {"eps_error", "delta_error"}
        if unknown:
            raise TypeError(f"get_epsilon() got unexpected arguments {sorted(unknown)}")
        return self._of().get_epsilon(delta)

    def __len__(self) -> int:
        return len(self._of())

    def __bool__(self) -> bool:
        return True

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """Opacus's: {"history": …, "mechanism": …}."""
        state = OrderedDict() if destination is None else destination
        state["history"], state["mechanism"] = self.history, self.mechanism()
        return state

    def load_state_dict(self, state_dict: _State) -> None:
        """Book the history of such a state. It takes the place of an accountant's own, never of an engine's.

        Raises:
            ValueError: it is no such state, or of another mechanism. RuntimeError: the engine's accountant holds
            releases already, and cannot tell whether these are among them.
        """
        if not isinstance(state_dict, Mapping) or not {"history", "mechanism"} <= state_dict.keys():
            raise ValueError(f"state_dict must hold 'history' and 'mechanism', got {state_dict!r}")
        if state_dict["mechanism"] != self.mechanism():
            raise ValueError(
                f"state_dict must be of the mechanism {self.mechanism()!r}, got {state_dict['mechanism']!r}"
            )
        if self._own is not None:
            self.history = state_dict["history"]
            return
        if len(self):
            raise RuntimeError(
                "load_state_dict must come before the engine's first release; load_checkpoint adds up"
            )
        book(self._of(), state_dict["history"])

    def __getattr__(self, name: str) -> NoReturn:
        raise_attribute_error(self, "accountants.IAccountant", name)


class PRVAccountant(IAccountant):
    """Opacus's PRV figure from adaclip's privacy loss distributions, certified on both sides.

    Opacus reports its estimate plus `eps_error` (0.01); this lies between its bounds, and closer to the truth.
    """

    kind = "pld"

    @classmethod
    def mechanism(cls) -> str:
        return "prv"


class RDPAccountant(IAccountant):
    """Opacus's Rényi accountant. With its orders it gives its figure to 1e-9, with ours never a larger one."""

    kind = "rdp"
    # Opacus's orders, 1.1 to 10.9 and 12 to 63, all of which are among adaclip.accounting.DEFAULT_ORDERS.
    DEFAULT_ALPHAS: ClassVar[list[float]] = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))

    @classmethod
    def mechanism(cls) -> str:
        return "rdp"

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None, **options: Any) -> float:
        """A certified upper bound on epsilon.

        Args:
            delta: in (0, 1).
            alphas: the orders to choose from; None: `adaclip.accounting.DEFAULT_ORDERS`. They differ from
              `DEFAULT_ALPHAS` where epsilon is so small (below about 0.3 at 1e-5) that an order above 63 is best.
        """
        return super().get_epsilon(delta, **options) if alphas is None else self._at(delta, alphas)[0]

    def get_privacy_spent(
        self, *, delta: float, alphas: Sequence[float] | None = None
    ) -> tuple[float, float]:
        """(epsilon, the order it is least at), of `alphas` or Opacus's `DEFAULT_ALPHAS`; (0, 0) if all is unused."""
        return self._at(delta, self.DEFAULT_ALPHAS if alphas is None else alphas)

    def _at(self, delta: float, alphas: Sequence[float]) -> tuple[float, float]:
        orders = np.array(alphas, dtype=np.float64)
        if orders.ndim != 1 or not orders.size or not (orders > 1).all() or not np.isfinite(orders).all():
            raise ValueError(f"alphas must be finite numbers above 1, got {alphas!r}")
        if not isinstance(delta, float) or not 0 < delta < 1:
            raise ValueError(f"delta must be a number in (0, 1), got {delta!r}")
        runs = self.history
        if not runs:
            return 0.0, 0.0
        total = np.zeros_like(orders)
        for sigma, q, steps in runs:
            total += steps * subsampled_gaussian_rdp(q, sigma, orders)
        each = [rdp_to_epsilon(total[i : i + 1], delta, orders[i : i + 1]) for i in range(len(orders))]
        best = int(np.argmin(each))
        return float(each[best]), float(orders[best])


def create_accountant(mechanism: str) -> IAccountant:
    """ "prv" or "rdp". "gdp" is refused: its figure is usually below the true epsilon."""
    for kind in (PRVAccountant, RDPAccountant):
        if mechanism == kind.mechanism():
            return kind()
    raise ValueError(mechanism_error(mechanism))


def mechanism_error(mechanism: object) -> str:
    if mechanism == "gdp":
        return (
            "accountant 'gdp' is an approximation that is usually below the true epsilon, so it is no guarantee: use "
            "'prv' or 'rdp'; adaclip.accounting.gdp_epsilon computes its figure for display"
        )
    return f"accountant must be 'prv' or 'rdp', got {mechanism!r}"


def book(accountant: Accountant, history: Iterable[Sequence[float]]) -> None:
    """Book runs of Opacus's history, all or none.

    Raises:
        ValueError, TypeError: an entry is no (noise multiplier, sampling rate, steps); nothing is booked.
    """
    runs = []
    for run in history:
        if not isinstance(run, (tuple, list)) or len(run) != 3:
            raise ValueError(f"history must hold (noise_multiplier, sample_rate, steps), got {run!r}")
        sigma, q, steps = run
        trial = accounting.create_accountant("rdp")
        trial.step(q, sigma, steps)
        runs.append((q, sigma, steps))
    for q, sigma, steps in runs:
        accountant.step(q, sigma, steps)


def _as_tuple(event: Event) -> tuple[float, float, int]:
    release, count = event
    if not isinstance(release, SubsampledGaussian) or release.sampling != "poisson":
        raise ValueError(
            f"history holds steps on Poisson batches only, but the ledger has {release}: read "
            "privacy_engine.engine.accountant.history"
        )
    return release.sigma, release.q, count


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: float | None = None,
    steps: int | None = None,
    accountant: str = "rdp",
    epsilon_tolerance: float = 0.01,
    **options: Any,
) -> float:
    """The noise multiplier that spends (target_epsilon, target_delta) in so many steps, never more.

    Args:
        epochs, steps: exactly one; an epoch is 1/sample_rate steps.
        accountant: "rdp" or "prv".
        epsilon_tolerance, options: taken and not needed: the search ends within 0.1 % below the target
          (`adaclip.accounting.calibrate_noise`).
    """
    unknown = options.keys() - {"eps_error", "delta_error", "alphas"}
    if unknown:
        raise TypeError(f"get_noise_multiplier() got unexpected arguments {sorted(unknown)}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"exactly one of epochs and steps must be given, got {epochs} and {steps}")
    return accounting.calibrate_noise(
        target_epsilon=target_epsilon,
        delta=target_delta,
        sample_rate=sample_rate,
        steps=int(epochs / sample_rate) if steps is None else steps,
        accountant=type(create_accountant(accountant)).kind,
    )


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
