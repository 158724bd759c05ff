"""How a case ends: with a result or a documented error, within seconds and a bounded part of memory."""

from __future__ import annotations

import contextlib
import linecache
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adaclip

SECONDS = 30
BYTES = 3 << 30  # beyond what the process holds
_PACKAGE = str(Path(adaclip.__file__).parent)
DOCUMENTED = (TypeError, ValueError)


class Hang(BaseException):
    """The case took longer than it may."""


class Slow(AssertionError):
    """The same, outside of what was called."""


@contextlib.contextmanager
def limits(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """In here a case that takes too long raises Hang, and one that takes too much memory MemoryError (or torch's
    RuntimeError)."""

    def stop(*_: Any) -> None:
        raise Hang(f"not done after {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Hang as error:
        raise Slow(str(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def attempt(
    call: Callable[[], Any], documented: tuple[type[BaseException], ...] = DOCUMENTED, deliberate: bool = True
) -> tuple[str, Any]:
    """("ok", the result), or (the error's name, the error) if it is one of `documented`; any other error goes on.

    deliberate: the error must have been raised on purpose, by a `raise` in adaclip: what Python, numpy or torch say
    about a value that went too far names neither the argument nor its rule.
    """
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "ok", call()
    except documented as error:
        message = str(error)
        if not message.strip() or "\n" in message:
            raise AssertionError(f"not a paragraph: {message!r}") from error
        if deliberate and not _on_purpose(error):
            raise AssertionError(f"{type(error).__name__} by accident: {message}") from error
        return type(error).__name__, error


def _on_purpose(error: BaseException) -> bool:
    """Whether the innermost frame is a `raise` of adaclip's, or a call that does not fit the signature."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    if not any(file.startswith(_PACKAGE) or file == "<string>" for file, _ in frames):
        return True
    file, line = frames[-1]
    return file.startswith(_PACKAGE) and linecache.getline(file, line).lstrip().startswith("raise")
