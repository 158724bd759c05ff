"""Reading no more than a file can honestly hold.

A header is a claim: no buffer is sized from it before it has been compared with the file, and a compressed
stream is never expanded past what was announced (plus the one byte that shows there is more).
"""

from __future__ import annotations

import os
from typing import BinaryIO

# DEFLATE cannot expand by more than 1032:1 (a 258-byte match costs at least two bits).
MAX_DEFLATE_RATIO = 1032
_CHUNK = 1 << 20


def read_exactly(stream: BinaryIO, expected: int, held: int = 0) -> bytearray:
    """The next ``expected`` bytes of ``stream``, which must then be at its end; ``held`` were read before.

    Memory grows with what really arrives, never with ``expected`` alone. Reading to the end also makes gzip
    and zip streams check their CRC.

    Raises:
        ValueError: the stream is shorter or longer, or memory does not hold it.
    """
    check_fits(held + expected)
    data = bytearray()
    try:
        while len(data) <= expected:
            chunk = stream.read(min(_CHUNK, expected + 1 - len(data)))
            if not chunk:
                break
            data += chunk
    except MemoryError:
        raise ValueError(f"its {expected:,} bytes of data do not fit in memory") from None
    if len(data) < expected:
        raise ValueError(f"it ends after {len(data):,} of {expected:,} bytes of data")
    if len(data) > expected:
        raise ValueError(f"it holds more than the {expected:,} bytes of data its header announces")
    return data


def check_fits(size: int) -> None:
    """Raise ValueError if `size` bytes are more than three quarters of this machine's memory.

    A file of zeros is a thousand times smaller than what it announces truthfully, and Linux hands out memory that it
    does not have, until it ends the process that uses it.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory // 4 * 3:
        raise ValueError(f"its {size:,} bytes of data do not fit in memory, which has {memory:,}")
