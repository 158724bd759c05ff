"""DPOptimizer: what turns the clipped sum into a released, accounted update."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adaclip.batches import BatchInfo
from adaclip.clipped_sum import ClippedSum
from adaclip.clipping import NORM_KEY, Clipping, PerGroupClipping
from adaclip.groups import LabelGroups
from adaclip.master import keep_wide_state
from adaclip.noise import STREAM_GRADIENT, NoiseSource
from adaclip.processes import Processes
from adaclip.schedules import Schedule
from adaclip.smoothing import EvaluationPoint
from adaclip.step_release import check_noise, gradient_sigma
from adaclip.update import noisy_update

__all__ = ["DPOptimizer"]

_NO_SCALER = (
    "torch.amp.GradScaler scales the loss before gradients are clipped, so C would bound something else, and its scale "
    "follows private gradients without noise: call loss.backward() and optimizer.step() without it, from the next batch "
    "on. bfloat16 autocast needs no scaler; under float16, multiply the loss and max_grad_norm, and divide lr, by one "
    "constant"
)


class DPOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is private. Made by `PrivacyEngine.make_private`.

    Shares `param_groups`, `state` and `defaults` with the optimizer it wraps, so learning-rate
    schedulers and `state_dict` work as they do there.

    `step()` releases one logical batch, in this order: check that `p.grad` is the clipped sum and
    nothing else; ask `book` (the accountant), which raises `PrivacyBudgetExceeded` with nothing
    changed; add noise of standard deviation sigma_g C_t / (q N) and apply the update, in one fused pass
    for SGD, Adam, AdamW and NAdam; release the step's noisy side statistics, from which the strategy and
    the label groups make what they use from the next step on. A crash in between can only over-count. For a
    physical batch that is not the last of its logical batch, `step()` and `zero_grad()` do nothing.

    `noise_multiplier` is that of the whole step, gradient and statistics together, and the one that is booked;
    the gradient's share is `gradient_noise_multiplier` (`adaclip.step_release`). It may be changed between
    steps, or follow a schedule; every step books the value it uses.

    16-bit parameters are updated on a float32 master copy, part of `state_dict` (`adaclip.master`).
    """

    # Makes torch.amp.GradScaler hand us its scale instead of changing the gradients behind our back.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clipped_sum: ClippedSum,
        *,
        noise_multiplier: float,
        expected_batch_size: float,
        source: NoiseSource,
        book: Callable[[DPOptimizer, BatchInfo | None], None],
        batch: Callable[[], BatchInfo | None],
        noise_schedule: Schedule | None = None,
        point: EvaluationPoint | None = None,
        backend: str = "auto",
        processes: Processes | None = None,
        account: Callable[[], int] = int,
    ):
        # Not super().__init__(): the groups and the state are the wrapped optimizer's, not new ones.
        self.original_optimizer = optimizer
        self._sum = clipped_sum
        self._source = source
        self._book = book
        self._account = account
        self._batch = batch
        self._point = point
        self._backend = backend
        self._processes = Processes.alone() if processes is None else processes
        self._noise_schedule = noise_schedule
        self._base_noise = noise_multiplier
        if noise_schedule is not None:
            # A schedule that would fail on its way is refused now; the largest sigma leaves the least.
            most = max(noise_schedule(t) for t in range(noise_schedule.length + 1))
            gradient_sigma(noise_multiplier * most, clipped_sum.statistics.sensitivities)
            self._follow_schedule()
        else:
            self._set_noise(noise_multiplier)
        self._expected_batch_size = expected_batch_size
        # The thresholds of the last release, which its own statistics may have moved since.
        self.used_thresholds = clipped_sum.clipping.thresholds.clone()
        # The clipping group of each trained parameter, on the thresholds' device.
        self._group_index: tuple[list[int], Tensor] = [], torch.empty(0, dtype=torch.int64)
        self._released: int | None = None
        # How many releases have come to their end here, or were loaded.
        self._completed = 0
        self._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks

    @property
    def param_groups(self) -> list[dict]:
        # GradScaler.unscale_ changes gradients in a way that their version counters do not tell. It asks for them here.
        if sys._getframe(1).f_code.co_name == "_unscale_grads_":
            raise RuntimeError(_NO_SCALER)
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self):
        return self.original_optimizer.state

    @state.setter
    def state(self, state) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict:
        return self.original_optimizer.defaults

    @property
    def expected_batch_size(self) -> float:
        """q N, the public denominator of every step."""
        return self._expected_batch_size

    @property
    def releases(self) -> int:
        """How many releases there were; the number of the next one. It addresses the keystream."""
        return self._sum.release

    @releases.setter
    def releases(self, number: int) -> None:
        if number < self._sum.release:
            raise ValueError(f"releases must not go back from {self._sum.release}, got {number}")
        self._sum.release = self._completed = number

    @property
    def noise_multiplier(self) -> float:
        """sigma of a whole step: of the next one, or, under a schedule, of the last one."""
        return self._noise

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        if self._noise_schedule is not None:
            raise ValueError(f"noise_multiplier must be left to noise_schedule, got {value!r}")
        check_noise(value)
        self._set_noise(float(value))
        self._base_noise = self._noise

    @property
    def base_noise_multiplier(self) -> float:
        """What noise_schedule multiplies; noise_multiplier itself without one."""
        return self._base_noise

    @property
    def gradient_noise_multiplier(self) -> float:
        """sigma_g: the gradient's noise standard deviation over C, above sigma if a step releases statistics."""
        return self._gradient_noise

    @property
    def batch(self) -> BatchInfo | None:
        """What the private loader says of the batch in hand; private, as its size is."""
        return self._batch()

    @property
    def source(self) -> NoiseSource:
        """Where the noise comes from."""
        return self._source

    @property
    def processes(self) -> Processes:
        """Those that train together; this one alone, mostly."""
        return self._processes

    @property
    def backend(self) -> str:
        """The backend that `make_private` was given."""
        return self._backend

    @property
    def clipping(self) -> Clipping:
        """The strategy at work (the engine's own copy of an object that it was given)."""
        return self._sum.clipping

    @property
    def groups(self) -> LabelGroups | None:
        """The label groups at work (the engine's own copy), if there are any."""
        return self._sum.groups

    @property
    def smoothing(self) -> EvaluationPoint | None:
        """Where gradients are taken, if not at the parameters themselves."""
        return self._point

    @property
    def noise_schedule(self) -> Schedule | None:
        """What sigma is multiplied by, release by release."""
        return self._noise_schedule

    @property
    def max_grad_norm(self) -> float:
        """The norm that a sample's whole gradient is clipped to in the logical batch in hand.

        After step() that is the next batch's, if it adapts; a schedule moves when the next batch begins. Reads the
        device.
        """
        return self._sum.clipping.max_grad_norm

    @property
    def sample_norms(self) -> Tensor | None:
        """Norms [B] (float64) of the last backward's per-sample gradients. Private: never log them."""
        return self._sum.sample_norms

    @property
    def non_finite_samples(self) -> int:
        """How many samples were left out because their gradient was not finite. Private."""
        return int(self._sum.non_finite)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that receive noise and updates, in the order the noise is drawn."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def note_batch(self, info: BatchInfo | None) -> None:
        """The loop gets that batch next, or has had its last one: be where its gradients are to be taken."""
        if self._point is None:
            return
        if info is None:
            self._point.leave()
        else:
            self._point.enter(self.releases)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the clipped sum, unless the batch in hand continues its logical batch."""
        info = self._batch()
        if info is None or self._sum.broken or not self._sum.holds(info.step):
            self._sum.reset()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Release the logical batch; returns the closure's loss, if there is one.

        Raises PrivacyBudgetExceeded (nothing changed, nothing spent) when the step would pass the
        budget, and RuntimeError when `p.grad` is not the clipped sum or the batch was released before.

        Of several processes each makes the step, of the same logical batch and with the same settings, or none does:
        RuntimeError in all where one cannot. One that fails or is lost after that leaves a release booked that was not
        made everywhere; the others' next step then says so, until all load a checkpoint.
        """
        # Before the closure, which would make a gradient. It leaves them on us where step() raises.
        if self.__dict__.keys() & {"grad_scale", "found_inf"}:
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise RuntimeError(_NO_SCALER)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        info = self._batch()
        if info is not None and not info.last:
            return loss
        self._check_together(info)
        if self._point is not None:
            self._point.leave()
        # Nobody releases what somebody has not booked.
        with self._processes.together("step(), after booking it"):
            step, params, stds = self.begin_release(info)
        self._sum.combine()
        noisy_update(
            self.original_optimizer,
            params,
            stds,
            self._source,
            step,
            stream=STREAM_GRADIENT,
            backend=self._backend,
        )
        if self._point is not None:
            self._point.observe(stds)
        self._sum.statistics.release(self._source, step)
        self._completed = self.releases
        self._sum.reset()
        return loss

    def _check_together(self, info: BatchInfo | None) -> None:
        """Raise unless this process, and every other, has the sum of the same logical batch to release."""
        numbers = {"the release's number": self.releases, "the batch": -1 if info is None else info.step}
        with self._processes.together("step()", numbers):
            if self._processes.size > 1 and self._completed != self.releases:
                raise RuntimeError(
                    "an earlier step failed here after it was booked, so parameters or thresholds are no longer those "
                    "of the other processes: load the last checkpoint in all of them"
                )
            self.check_release(info)
            self._sum.check_intact()
            self._sum.check_rows()
            if info is not None and not self._sum.holds(info.step):
                # No backward for this batch (the loop skipped it): the step is noise alone, of the norms there are now.
                self._sum.reset()
            self._sum.begin()
            if self._processes.size > 1:
                # All make the same noise. With one deviation here and another there, who sees both results sees their
                # difference, and the noise, and then the sum.
                numbers["noise_multiplier"] = struct.unpack("<q", struct.pack("<d", abs(self._noise)))[0]
                numbers["the clipping norms"] = self._sum.clipping.agreed()
                numbers["the trained parameters and their groups"] = self._sum.agreed()
                # All are refused by the budget, or none is.
                numbers["the account and its budget"] = self._account()

    def check_release(self, info: BatchInfo | None) -> None:
        """Take the noise of the release that is next; RuntimeError if it would be of a batch released before."""
        self._follow_schedule()
        if info is not None and info.step == self._released:
            raise RuntimeError(
                "this logical batch was released already: two steps on one Poisson sample cost more than the "
                "accountant books; draw the next batch from the private loader"
            )

    def begin_release(self, info: BatchInfo | None) -> tuple[int, list[nn.Parameter], Tensor]:
        """Book the next release and count it; from here on what it releases may be enqueued.

        Returns (its number, the parameters that it updates, the noise in each one's gradient: float64 [P] on the
        thresholds' device). Raises PrivacyBudgetExceeded with nothing changed.
        """
        self._book(self, info)
        if info is not None:
            self._released = info.step
        step = self.releases
        self._sum.release += 1
        self.used_thresholds = self._sum.clipping.thresholds.clone()
        params = self.trained()
        return step, params, self._stds(params)

    def _stds(self, params: list[nn.Parameter]) -> Tensor:
        """float64 [P] on the thresholds' device: the standard deviation of the noise in each `p.grad`."""
        scale = self._sum.clipping.noise_scale() * (self._gradient_noise / self._expected_batch_size)
        groups = [self._sum.group_of(p) for p in params]
        if groups != self._group_index[0]:
            self._group_index = groups, torch.tensor(groups, dtype=torch.int64, device=scale.device)
        return scale[self._group_index[1]]

    def _set_noise(self, sigma: float) -> None:
        """Take sigma for the step to come; ValueError, with nothing changed, if it cannot be split."""
        self._gradient_noise = gradient_sigma(sigma, self._sum.statistics.sensitivities)
        self._noise = sigma
        self._sum.clipping.note_noise(self._gradient_noise)

    def _follow_schedule(self) -> None:
        """Without a schedule the noise is set already."""
        if self._noise_schedule is not None:
            self._set_noise(self._base_noise * self._noise_schedule(self.releases))

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; ValueError, with nothing changed, if it carries a clipping norm where the others do not, or vice
        versa. Within a logical batch of clipping by parameter groups it is refused: RuntimeError.
        """
        self._sum.clipping.check_groups([*self.param_groups, param_group], self.defaults)
        if self._sum.begun and isinstance(self.clipping, PerGroupClipping):
            raise RuntimeError(
                "add_param_group must come between two logical batches, whose norms are fixed: call optimizer.step() "
                "or optimizer.zero_grad() first"
            )
        self.original_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict:
        """The wrapped optimizer's state; the privacy state is in `PrivacyEngine.save_checkpoint`."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's. Clipping norms of parameter groups are restored too, where it has them, for the next batch on.

        ValueError, with nothing changed, if it has norms and this run clips all groups to one.
        """
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            # A plain optimizer's groups have no norms: ours stay.
            pairs = zip(groups, self.param_groups, strict=True)
            groups = [{**{k: v for k, v in ours.items() if k == NORM_KEY}, **g} for g, ours in pairs]
        self._sum.clipping.check_groups(groups, self.defaults)
        self.original_optimizer.load_state_dict({**state_dict, "param_groups": groups})
        keep_wide_state(self.original_optimizer, state_dict)

    def __repr__(self) -> str:
        return f"DPOptimizer(noise_multiplier={self.noise_multiplier}, {self.original_optimizer!r})"
