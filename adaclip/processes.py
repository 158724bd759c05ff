"""Training in several processes: what they say to each other, on top of `torch.distributed`.

Every process clips the gradients of its own samples. At a release the clipped sums and the sums of the side releases
are added up over the processes; then each of them draws the same noise from the same key and makes the same update. So
noise enters once in total, thresholds stay equal to the last bit, and neither sigma nor epsilon depends on the number
of processes: the logical batch is the union of what they hold.

Key, sums and parameters travel over the process group as they are: whoever can read that traffic sees gradients
without noise, so it must not leave what is trusted with the data.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from adaclip.noise import NoiseSource

__all__ = ["Processes"]

# Bytes of small tensors that are copied together for one message, and from which on a tensor is one by itself.
_BUCKET, _ALONE = 4 << 20, 1 << 20
# Numbers that one agreement may compare: all agreements send messages of one length, so that two different ones that
# meet, after an error that somebody caught, are told apart.
_MOST_NUMBERS = 6


class Processes:
    """The processes that train one model together; one process alone, for which everything here is nothing.

    Args:
        group: a process group of torch.distributed; None: the default one where it is initialized, else this process
          alone. Its timeout is how long a process waits for another before it stops with an error.

    Attributes:
        rank, size: of this process in the group, and of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if not dist.is_available() or not dist.is_initialized():
            if group is not None:
                raise ValueError("process_group must be None where torch.distributed is not initialized")
            return
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed group or None, got {group!r}")
        if dist.get_rank(group) < 0:
            raise ValueError("process_group must hold this process, got a group without it")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.size == 1:
            return
        self._group = group
        # What the host has to know goes over gloo, so that no message waits for a GPU.
        self._control = group if "gloo" in dist.get_backend_config(group) else _gloo_beside(group)

    @classmethod
    def alone(cls) -> Processes:
        """This process alone, whatever torch.distributed holds."""
        self = cls.__new__(cls)
        self.rank, self.size, self._group = 0, 1, None
        return self

    # --- agreement ---------------------------------------------------------------------------------

    def agree(
        self, what: str, problem: BaseException | None = None, numbers: Mapping[str, int] | None = None
    ) -> None:
        """Go on together or not at all: every process calls this at the same point.

        Args:
            what: what is about to be done, for the message.
            problem: why this process cannot.
            numbers: what must be the same in all of them, by name, each below 2^63 in size; at most 6.

        Raises:
            problem itself; RuntimeError where another process has one, numbers differ, or a process was lost.
        """
        if self.size > 1:
            names = [] if numbers is None else list(numbers)
            said = [zlib.crc32(what.encode()), *(numbers[name] for name in names)]
            said += [0] * (1 + _MOST_NUMBERS - len(said))
            found = torch.tensor([int(problem is not None), *said, *(-n for n in said)], dtype=torch.int64)
            try:
                dist.all_reduce(found, dist.ReduceOp.MAX, self._control)
            except RuntimeError as error:
                # This process's own problem tells more than that the others are gone.
                raise (problem or self._lost(what, error)) from error
        if problem is not None:
            raise problem
        if self.size > 1:
            failed, *rest = found.tolist()
            if failed:
                raise RuntimeError(
                    f"{what}: another process could not, and says why; none of them has done it"
                )
            differ = [a != -b for a, b in zip(rest[: len(said)], rest[len(said) :], strict=True)]
            if any(differ):
                # Where they do not even do the same, their numbers are of different things.
                unlike = "what they do" if differ[0] else ", ".join(compress(names, differ[1:]))
                raise RuntimeError(
                    f"{what}: the processes are not at the same point ({unlike} must be the same in all): every "
                    "process must take every batch, make every step and have the same settings"
                )

    @contextmanager
    def together(self, what: str, numbers: Mapping[str, int] | None = None) -> Iterator[None]:
        """`agree` on leaving: what is inside succeeds in every process, or each of them raises."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        self.agree(what, problem, numbers)

    def any(self, what: str, flag: bool) -> bool:
        """Whether the flag is set in any process; every process asks at the same point."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)])
        try:
            dist.all_reduce(found, dist.ReduceOp.MAX, self._control)
        except RuntimeError as error:
            raise self._lost(what, error) from error
        return bool(found)

    def told(self, what: str, value: Any) -> Any:
        """The first process's plain value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        try:
            dist.broadcast_object_list(box, group=self._control, group_src=0)
        except RuntimeError as error:
            raise self._lost(what, error) from error
        return box[0]

    def agree_on(self, what: str, mine: Mapping[str, Any]) -> None:
        """Raise ValueError unless these plain values, by name, are the same in all processes."""
        if self.size == 1:
            return
        ours: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(ours, mine, self._control)
        except RuntimeError as error:
            raise self._lost(what, error) from error
        for rank, theirs in enumerate(ours):
            wrong = [name for name in mine if mine[name] != theirs.get(name)]
            if wrong:
                name = wrong[0]
                raise ValueError(
                    f"{what}: {name} must be the same in all processes, got {mine[name]!r} in process "
                    f"{self.rank} and {theirs.get(name)!r} in process {rank}"
                )

    def _lost(self, what: str, error: RuntimeError) -> RuntimeError:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return RuntimeError(
            f"{what}: process {self.rank} has lost another one, which ended or did not come within the process "
            f"group's timeout ({first}). Start all of them again, from the last checkpoint"
        )

    # --- one key, one start ------------------------------------------------------------------------

    def share(self, source: NoiseSource) -> NoiseSource:
        """The source of the first process, in all of them. A key that was given must be given to all.

        Raises:
            ValueError: the processes were given different keys.
        """
        if self.size == 1:
            return source
        given = None if source.secure else hashlib.sha256(source.key.host).hexdigest()
        self.agree_on("make_private", {"noise_generator": given})
        key = torch.frombuffer(bytearray(source.key.host), dtype=torch.uint8)
        dist.broadcast(key, group=self._control, group_src=0)
        return NoiseSource.of(bytes(key.numpy()), secure=source.secure)

    @torch.no_grad()
    def start_alike(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one."""
        if self.size == 1:
            return
        for tensor in [*module.parameters(), *module.buffers()]:
            # A broadcast writes as many numbers in a row as there are elements, whatever the strides. Of an expanded
            # tensor each is there once.
            kept = tensor.detach()[tuple(slice(1 if s == 0 else None) for s in tensor.stride())]
            sent = kept.contiguous()
            dist.broadcast(sent, group=self._group, group_src=0)
            if sent is not kept:
                kept.copy_(sent)

    # --- sums --------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each of the tensors, the same bits in each process.

        The processes bring tensors of the same shapes in the same order. 16-bit ones are added in float32.

        Raises:
            RuntimeError: a process was lost.
        """
        if self.size == 1:
            return
        waiting = []
        try:
            # All are under way at once: a sum of several threads, or of a GPU's streams, waits for no other.
            for bucket in _buckets(tensors):
                flat = _joined(bucket)
                waiting.append((bucket, flat, dist.all_reduce(flat, group=self._group, async_op=True)))
            for bucket, flat, work in waiting:
                work.wait()
                if flat is not bucket[0]:
                    for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                        t.copy_(part.view(t.shape))
        except RuntimeError as error:
            raise self._lost("the sum over all processes", error) from error


def _gloo_beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same processes, with the same timeout."""
    return dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=group._get_backend(torch.device("cuda")).options._timeout,
        backend="gloo",
        use_local_synchronization=True,
    )


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbors of one dtype and device, up to _BUCKET bytes of them; a large tensor alone, which is summed in place."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        mine = t.numel() * t.element_size()
        if mine >= _ALONE and t.is_contiguous() and t.element_size() >= 4:
            yield [t]
            continue
        if bucket and (size + mine > _BUCKET or (t.dtype, t.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += mine
    if bucket:
        yield bucket


def _joined(bucket: list[Tensor]) -> Tensor:
    """The bucket in one tensor, of at least float32: itself, or a copy."""
    first = bucket[0]
    if len(bucket) == 1 and first.is_contiguous() and first.element_size() >= 4:
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    return torch.cat([t.reshape(-1).to(wide) for t in bucket])
