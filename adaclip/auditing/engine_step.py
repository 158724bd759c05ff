"""The real engine under audit: `make_private`'s loader, clipped sum, noise and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip.auditing.step import Released
from adaclip.clipping import DCSGDClipping
from adaclip.engine import PrivacyEngine
from adaclip.groups import LabelGroups

__all__ = ["EngineStep"]


class _Probe(nn.Module):
    """Linear layers on slices of the input, summed: the gradient of an output is its input row."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.sizes = [len(part) for part in np.array_split(np.arange(width), layers)]
        self.layers = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, dim=1)
        return sum(layer(part) for layer, part in zip(self.layers, parts, strict=True))


class EngineStep:
    """An `AuditedStep` that is the product itself.

    The data set's examples are the given gradients: the model is a sum of linear layers and the loss its
    mean output, so that an example's per-sample gradient is its input row, whatever the weights are. The
    optimizer is SGD with learning rate 1 and the weights start every step at zero, so that the step leaves
    minus the released gradient in them, to the last bit. What the step lets out beside it, the thresholds and
    the group selected for the next step, is reported as `Released.side`.

    Args:
        gradients: float32 [N, d].
        noise_multiplier: sigma of the whole step, > 0.
        batch_size: expected batch size; q = batch_size / N.
        sample_rate: q instead, for builders of data sets of several sizes: a batch holds round(q N) examples
          on average, at least 1, and a data set too small for that is filled up with gradients of zero.
        max_grad_norm: C; None where `clipping` is an object, which has its own.
        layers: over how many linear layers the d parameters are spread, in equal shares.
        accountant: a name for `PrivacyEngine`.
        groups: label groups for `make_private`; example i has the label i modulo the number of classes.
        options: more arguments of `make_private` (clipping, max_batch_size, pad_to, backend,
          noise_generator). As noise_generator a key repeats the same noise in every step that is built with
          it: None or a torch.Generator does not.

    Raises:
        ValueError, TypeError: as `make_private`; not exactly one of batch_size and sample_rate.
    """

    def __init__(
        self,
        gradients: np.ndarray,
        *,
        noise_multiplier: float,
        batch_size: int | None = None,
        sample_rate: float | None = None,
        max_grad_norm: float | None = 1.0,
        layers: int = 2,
        accountant: str = "pld",
        groups: LabelGroups | None = None,
        **options: object,
    ) -> None:
        rows = torch.from_numpy(np.ascontiguousarray(gradients, dtype=np.float32))
        self._size = len(rows)
        if (batch_size is None) == (sample_rate is None):
            raise ValueError("exactly one of batch_size and sample_rate must be given")
        if sample_rate is not None:
            if not 0.0 < sample_rate <= 1.0:
                raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate!r}")
            rows = torch.cat(
                [rows, rows.new_zeros(max(0, math.ceil(1 / sample_rate) - len(rows)), rows.shape[1])]
            )
            batch_size = max(1, round(sample_rate * len(rows)))
        numbers = torch.arange(len(rows))
        labels = numbers if groups is None else numbers % groups.classes
        model = _Probe(rows.shape[1], layers)
        self.engine = PrivacyEngine(accountant=accountant)
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(rows, labels, numbers), batch_size=batch_size),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            groups=groups,
            **options,
        )
        self.sample_rate = self.loader.sample_rate
        self.denominator = self.loader.expected_batch_size
        self._batches: Iterator = iter(())

    def __call__(self) -> Released:
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
        sampled = np.zeros(len(self.loader.dataset), dtype=bool)
        done = False
        while not done:
            rows, _, numbers = self._next_batch()
            self.optimizer.zero_grad()
            self.model(rows).mean().backward()
            # Before step(), after which it is the next step's.
            norm = self.optimizer.max_grad_norm
            self.optimizer.step()
            info = self.loader.current
            sampled[numbers[: info.rows].numpy()] = True
            done = info.last
        change = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return Released(
            -change.double().numpy(),
            sampled[: self._size],
            norm,
            self.optimizer.gradient_noise_multiplier,
            self.optimizer.noise_multiplier,
            self._side(),
        )

    def _side(self) -> dict[str, float]:
        """What the last step let out beside the gradient: the state that the next one starts from."""
        side = {}
        clipping = self.optimizer.clipping
        if clipping.side is not None:
            for k, threshold in enumerate(clipping.thresholds.tolist()):
                side[f"threshold {k} of the next step"] = threshold
        if isinstance(clipping, DCSGDClipping):
            for k, count in enumerate(clipping.histogram.tolist()):
                side[f"bin {k} of the noisy histogram"] = count
        groups = self.optimizer.groups
        if groups is not None:
            side["the selected group"] = groups.selected
            for name in ("sums", "counts"):
                for group, value in enumerate(groups.released[name].tolist()):
                    side[f"group {group} of the noisy {name}"] = value
        return side

    def epsilon(self, delta: float) -> float:
        return self.engine.get_epsilon(delta)

    def _next_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.loader)
            batch = next(self._batches)
        return batch
