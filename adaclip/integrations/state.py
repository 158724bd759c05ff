"""The privacy state of a run whose model and optimizer are saved by somebody else's checkpoints."""

from __future__ import annotations

from typing import Any

from adaclip import checkpoint
from adaclip.engine import PrivacyEngine

__all__ = ["PrivacyState"]


class PrivacyState:
    """What `PrivacyEngine.save_checkpoint` writes beside model and optimizer, as `state_dict` and `load_state_dict`.

    Ledger, budget, thresholds and other released state, counters: tensors and plain values; never the noise key, and a
    resumed run draws a new one. It must be saved and loaded with the parameters of the same moment: parameters
    without their ledger would look as if they had cost nothing.
    """

    def __init__(self, engine: PrivacyEngine):
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        engine, held = self._engine, self._engine._attached
        here = held.loader, engine.accountant, engine._budget, engine._lineage.run
        state = checkpoint.collect(held.model, held.optimizer, *here, None)
        own = {name: value for name, value in state.items() if name not in ("module", "optimizer", "extra")}
        return {"version": checkpoint.VERSION, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the model's and the optimizer's own states are loaded by others.

        Raises:
            ValueError: with nothing changed, if it is of another version, or of another clipping, noise multiplier,
              data set and so on (as `PrivacyEngine.load_checkpoint`).
        """
        engine, held = self._engine, self._engine._attached
        module, optimizer, loader = held.model, held.optimizer, held.loader
        if state.get("version") != checkpoint.VERSION:
            raise ValueError(
                f"the privacy state must have version {checkpoint.VERSION}, got {state.get('version')!r}"
            )
        whole = {**state, "module": module.state_dict(), "optimizer": optimizer.state_dict(), "extra": {}}
        ledger, budget = checkpoint.check(whole, module, optimizer, loader, engine.accountant, engine._budget)
        optimizer._sum.reset()
        checkpoint.restore(whole, module, optimizer, loader)
        engine._lineage.adopt(engine.accountant, state.get("run"), ledger)
        engine._budget = budget
