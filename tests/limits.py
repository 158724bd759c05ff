"""Limits of the operating system, for a while: what fails then fails as it does on a full disk or machine."""

import contextlib
import resource


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow beyond so many bytes (the error is EFBIG, where a full disk's is ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def memory_limit(more):
    """No more address space than so many bytes beyond what the process has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
