"""What a backward pass leaves behind, and the moment it is over.

Every layer has a slot number. The backward of its forward operation calls
`torch.ops.adaclip.record(ticket, tensors, slot, ...)`, which appends the tensors to the slot's
`uses`; the first record of a backward asks autograd to call the tape's owner when that backward has
ended. Nothing is read back from a traced graph: compiled code calls the same operation.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Slot", "Tape", "Use"]

_numbers = itertools.count()
_calls = itertools.count(1)
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


@dataclass
class Use:
    """One use of a layer in one forward pass.

    tensors: rows first; `views` consecutive rows belong to one sample, whose gradient is the sum of theirs.
      `Layer.fold` sets it, and leaves more than one only to the kinds whose `sample_grads` adds them up.
    forward: which forward pass of the root module; 0 if unknown; negative, and another number for each call, where a
      layer was called outside of one.
    """

    tensors: list[Tensor]
    forward: int
    views: int = 1


class Slot:
    """A layer's place on the tape."""

    def __init__(self, tape: Tape, device: torch.device):
        self.number = next(_numbers)
        self.tape = tape
        self.uses: list[Use] = []
        # Mutated (in name) by `record`, so that no compiler drops or reorders it. Where the layer is: a CUDA graph
        # takes no tensors of the CPU.
        self.ticket = torch.zeros(0, device=device)
        _slots[self.number] = self

    def call_args(self) -> tuple[Tensor, int, int, bool]:
        """The arguments (ticket, slot, forward, copy) every layer operation ends with."""
        if torch.compiler.is_compiling():
            # A compiled graph may reuse the memory of what it recorded: it must copy. Its forward
            # count is not traced, it would recompile at every step.
            return self.ticket, self.number, 0, True
        # A fresh ticket for each use: autograd would refuse one saved twice and mutated in between.
        return self.ticket.new_empty(0), self.number, self.tape.call_number(), False


class Tape:
    """All slots of one model, and the callback at the end of a backward."""

    def __init__(self, finish: Callable[[], None]):
        self._finish = finish
        self._graph_task = -1
        self.slots: list[Slot] = []
        # Forward passes of the root module so far, and the number of the one under way: 0 outside of
        # it, and in compiled code.
        self.forwards = 0
        self.current = 0

    def call_number(self) -> int:
        """`Use.forward` of a call that is made now."""
        if self.current or torch.compiler.is_compiling():
            return self.current
        return -next(_calls)

    def new_slot(self, device: torch.device) -> Slot:
        slot = Slot(self, device)
        self.slots.append(slot)
        return slot

    def clear(self) -> None:
        for slot in self.slots:
            slot.uses.clear()

    def on_record(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._graph_task:
            return
        # Uses left by a backward that raised midway belong to nobody.
        self.clear()
        self._graph_task = task
        torch.autograd.Variable._execution_engine.queue_callback(self._at_end)

    def _at_end(self) -> None:
        self._graph_task = -1
        try:
            self._finish()
        finally:
            self.clear()


def record(tensors: list[Tensor], slot: int, forward: int, copy: bool) -> None:
    """Append one use to a slot; called by the operation `adaclip::record` only."""
    place = _slots.get(slot)
    if place is None:
        # The model was detached between forward and backward: nobody asks for this gradient.
        return
    place.tape.on_record()
    place.uses.append(Use([t.clone() if copy else t.detach() for t in tensors], forward))
