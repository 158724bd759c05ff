"""A CUDA graph on the CPU: operations and Triton kernels are recorded with the tensors they got, and run again on those.

As with a real graph, nothing else of the Python that ran while recording runs again: numbers are what they were,
addresses stay, and what is not an operation on tensors is missing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
# Its effect is on Python, on the way from the backward's records to the clipped sum.
_PYTHON = {"adaclip::record"}


class HostRead(AssertionError):
    """A value was read, which a capture forbids."""


class _Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.quiet = 0
        # What is written to while recording: (its memory, what was there).
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS:
            raise HostRead(name)
        self._keep(func, args, kwargs)
        self.quiet += 1
        try:
            out = func(*args, **kwargs)
        finally:
            self.quiet -= 1
        if name not in _PYTHON and not func.is_view and not name.startswith("aten::empty"):
            self.calls.append(lambda: _again(func, args, kwargs, out))
        return out

    def _keep(self, func, args, kwargs):
        for i, given in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(given.name)
            if isinstance(value, torch.Tensor) and given.alias_info is not None and given.alias_info.is_write:
                memory = value.untyped_storage()
                if memory.data_ptr() not in self.before:
                    self.before[memory.data_ptr()] = memory, memory.clone()

    def undo(self):
        """A capture only notes what is to be done: take back what the operations did meanwhile."""
        for memory, before in self.before.values():
            memory.copy_(before)


def _again(func, args, kwargs, out):
    given = {id(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
    for old, new in zip(tree_flatten(out)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
        if isinstance(old, torch.Tensor) and id(old) not in given and old.data_ptr() != new.data_ptr():
            old.copy_(new)


class Recorded:
    """`adaclip.graphed.CudaGraphs` for CPU tensors and interpreted kernels."""

    recording = None

    def __init__(self, device):
        self.rehearsals = self.recorded = self.replays = 0

    def rehearse(self, run):
        self.rehearsals += 1
        run()

    def record(self, run):
        self.recorded += 1
        calls = []
        recorder = _Recorder(calls)
        launch = InterpretedFunction.run

        def note(kernel, *args, **kwargs):
            if not recorder.quiet:
                calls.append(lambda: launch(kernel, *args, **kwargs))
            # A launch that is captured does nothing.

        Recorded.recording = recorder
        InterpretedFunction.run = note
        try:
            with recorder:
                run()
            recorder.undo()
        finally:
            InterpretedFunction.run = launch
            Recorded.recording = None

        def replay():
            self.replays += 1
            with torch.no_grad():
                for call in calls:
                    call()

        return replay
