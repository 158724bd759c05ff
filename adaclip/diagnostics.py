"""Diagnostics of training examples, for whoever may see the training data. No guarantee covers them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaclip.runs import RunFolder, append_row

__all__ = ["Diagnostics"]

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Diagnostics:
    """One JSON line per logical step, in the run folder's private subfolder.

    step, rows (the realised batch size), loss, accuracy, gradient_norm_quantiles {level: norm},
    clipped_fraction (one clipping norm only), non_finite_samples (of the whole run so far), and with label groups
    group_sums and group_counts (of clipped norms over C, and of samples, without noise).
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, losses: Tensor, correct: Tensor, norms: Tensor) -> None:
        """Note one physical batch: [rows] each, real rows only."""
        self._batches.append((losses, correct, norms))

    def write(
        self,
        step: int,
        max_grad_norm: float | None,
        non_finite: int,
        groups: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the row of a logical step from the batches noted since the last one.

        max_grad_norm: what a threshold clipped to; groups: `LabelGroups.private`.
        """
        row: dict = {"step": step, "rows": 0, "non_finite_samples": non_finite}
        for name, values in (groups or {}).items():
            row[f"group_{name}"] = values.tolist()
        if self._batches:
            losses, correct, norms = (
                torch.cat(parts).double().cpu() for parts in zip(*self._batches, strict=True)
            )
            self._batches.clear()
            row |= {"rows": len(losses), "loss": float(losses.mean()), "accuracy": float(correct.mean())}
            finite = norms[norms.isfinite()]
            if len(finite):
                levels = torch.tensor(_QUANTILES, dtype=finite.dtype)
                values = torch.quantile(finite, levels).tolist()
                row["gradient_norm_quantiles"] = dict(zip(map(str, _QUANTILES), values, strict=True))
                if max_grad_norm is not None:
                    row["clipped_fraction"] = float((finite > max_grad_norm).double().mean())
        append_row(self._folder.private_file("diagnostics.jsonl"), row)
