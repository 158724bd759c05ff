"""What a backward pass leaves behind, and the moment it is over.

Every layer has a slot number. The backward of its forward operation calls
`torch.ops.adaclip.record(ticket, tensors, slot, ...)`, which appends the tensors to the slot's
`uses`; the first record of a backward asks autograd to call the tape's owner when that backward has
ended. Nothing is read back from a traced graph: compiled code calls the same operation.

Which forward pass a use is of is known when the layer is called in eager mode. In compiled code a number would be
traced as a constant; there `record` asks for the autograd node that it runs in, one for each call of a compiled
region, and for the forward pass that this node was made in: autograd numbers nodes in the order they are made, and
the tape knows how far it had come when each forward pass began and ended.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Slot", "Tape", "Use", "called", "mark", "record"]

_numbers = itertools.count()
_calls = itertools.count(1)
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
_tapes: weakref.WeakValueDictionary[int, Tape] = weakref.WeakValueDictionary()
# Forward passes that may wait for their backwards at a time.
_MOST_WAITING = 1 << 16
# Where a node keeps its number among the calls outside of forward passes.
_CALL = "adaclip call"
_COMPILED_BACKWARD = (
    "a backward that is compiled as a whole (torch._dynamo.compiled_autograd) hides which forward pass it is of, and "
    "when it is over: compile the model alone"
)


@dataclass
class Use:
    """One use of a layer in one forward pass.

    tensors: rows first; `views` consecutive rows belong to one sample, whose gradient is the sum of theirs.
      `Layer.fold` sets it, and leaves more than one only to the kinds whose `sample_grads` adds them up.
    forward: which forward pass of the root module; negative, and another number for each call (in compiled code:
      of each call of a compiled region), where a layer was called outside of one.
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

    def renew(self) -> None:
        """A fresh ticket for the next call of a compiled region, as for every use in eager mode."""
        self.ticket = self.ticket.new_empty(0)

    def call_args(self) -> tuple[Tensor, int, int, bool]:
        """The arguments (ticket, slot, forward, copy) every layer operation ends with."""
        if torch.compiler.is_compiling():
            # Inductor reuses the memory of what it recorded, intermediates and saved activations alike, and nothing
            # but being an output keeps a tensor from that: it must copy. Its forward count is not traced, it would
            # recompile at every step.
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
        # it, and while compiling.
        self.forwards = 0
        self.current = 0
        # (number, first, end): the autograd nodes made in a forward pass are numbered first <= n < end.
        self._spans: deque[tuple[int, int, float]] = deque(maxlen=_MOST_WAITING)
        # For the operations that say so in compiled code.
        self.number = next(_numbers)
        self.ticket = torch.zeros(0)
        _tapes[self.number] = self

    def enter(self, back: int = 0) -> None:
        """A forward pass of the root module begins; `back` autograd nodes of it are made already."""
        self.forwards += 1
        self.current = self.forwards
        self._spans.append((self.forwards, torch.autograd._get_sequence_nr() - back, float("inf")))

    def leave(self) -> None:
        """It is over."""
        number, first, _ = self._spans.pop()
        self._spans.append((number, first, torch.autograd._get_sequence_nr()))
        self.current = 0

    def call_number(self) -> int:
        """`Use.forward` of a call that is made now, or of a compiled region's whose backward runs now."""
        if torch.compiler.is_compiling():
            return 0
        return self.current or -next(_calls)

    def number_of(self, node: torch.autograd.graph.Node) -> int:
        """`Use.forward` of a compiled region, by the node of its backward."""
        made = node._sequence_nr()
        for number, first, end in reversed(self._spans):
            if first <= made:
                if made < end:
                    return number
                break
        # The node itself remembers, so that a second backward is known to be one.
        return node.metadata.setdefault(_CALL, -next(_calls))

    def new_slot(self, device: torch.device) -> Slot:
        slot = Slot(self, device)
        self.slots.append(slot)
        # Where the model is, for the same reason.
        self.ticket = self.ticket.to(device)
        return slot

    def clear(self) -> None:
        for slot in self.slots:
            slot.uses.clear()

    def on_record(self) -> None:
        if torch._C._current_autograd_node() is None:
            raise RuntimeError(_COMPILED_BACKWARD)
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
    tape = place.tape
    tape.on_record()
    number = forward or tape.number_of(torch._C._current_autograd_node())
    place.uses.append(Use([t.clone() if copy else t.detach() for t in tensors], number))


def called(slot: int, copy: bool) -> None:
    """A layer is called; by its forward operation when it runs, which is not when it is traced."""
    place = _slots.get(slot) if copy else None
    if place is not None:
        place.renew()


def mark(tape: int, ends: bool) -> None:
    """A compiled forward pass begins or ends; called by the operation `adaclip::mark` only."""
    place = _tapes.get(tape)
    if place is None:
        return
    if ends:
        place.leave()
    else:
        # The node of the compiled region is made before the region runs.
        place.enter(back=1)
