"""Randomness for privacy: a ChaCha20 keystream addressed by (key, step, stream, element).

The keystream is RFC 8439's block function with a 256-bit key. A value is a pure function of its address:
it is the same for every instruction set, thread count and order of calls. Nothing is consumed, so there is
no generator state to save, and two values with different addresses are independent.

The nonce holds the step (u64) and the stream (u32), so each (step, stream) owns 2^32 blocks: 4.3e10 normals
or 3.4e10 Bernoulli draws. An address must be released once only: two releases of the same noise cancel.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import torch

from . import _core
from .backends import Key, implementation
from .layout import is_flat

__all__ = [
    "STREAM_GRADIENT",
    "STREAM_SAMPLER",
    "STREAM_SMOOTHING",
    "STREAM_STATISTICS",
    "STREAM_USER",
    "STREAM_VIEWS",
    "NoiseSource",
]

STREAM_GRADIENT = 0
"""Noise on the gradient."""
STREAM_SAMPLER = 1
"""Poisson sampling of the batches."""
STREAM_STATISTICS = 2
"""Noise on the statistics that a step releases beside the gradient."""
STREAM_SMOOTHING = 3
"""Perturbation of the weights that gradients are taken at."""
STREAM_VIEWS = 4
"""Random views of examples."""
STREAM_USER = 1 << 16
"""Streams from here on are never used by the library."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_TWISTER_WORDS = 624
_MAX_DRAWS = 1 << 35  # 2^32 blocks of eight 64-bit draws


class NoiseSource:
    """A ChaCha20 key and what is drawn from it.

    Args:
        key: None (default): 32 bytes from the operating system's CSPRNG, the only choice that gives privacy
            against someone who knows the code. For tests and replay: 32 bytes; a non-negative int below
            2^256 (little-endian key); or a CPU or GPU ``torch.Generator``, from which 32 bytes are drawn.

    Raises:
        TypeError: for a key of another type.
        ValueError: for bytes that are not 32 long, or an int out of range.

    The key is never shown by ``repr`` and leaves the process only for those that train the same model with it
    (`adaclip.processes`; on a GPU it is in its memory, too): pickling and copying raise TypeError, so that it cannot
    travel in a checkpoint beside the model it protects.
    """

    __slots__ = ("_key", "_secure")

    def __init__(self, key: bytes | int | torch.Generator | None = None) -> None:
        self._secure = key is None
        self._key = Key(_key_bytes(key))

    @classmethod
    def of(cls, key: bytes, secure: bool) -> NoiseSource:
        """The source of another process: 32 bytes, and whether the operating system's generator made them there."""
        source = cls(key)
        source._secure = secure
        return source

    @property
    def secure(self) -> bool:
        """True if the key came from the operating system's CSPRNG."""
        return self._secure

    def same_key(self, other: NoiseSource) -> bool:
        """Whether both draw the same numbers."""
        return secrets.compare_digest(self._key.host, other._key.host)

    def __repr__(self) -> str:
        return f"NoiseSource(<{'secret' if self._secure else 'given'} key>)"

    def __reduce_ex__(self, protocol: object) -> object:
        raise TypeError(
            "a NoiseSource cannot be pickled or copied: its key must not leave the process; "
            "make a new one after loading"
        )

    @property
    def key(self) -> Key:
        """For the operations of `adaclip.backends`."""
        return self._key

    @torch.no_grad()
    def normal_(
        self,
        tensor: torch.Tensor,
        step: int | torch.Tensor,
        stream: int = STREAM_GRADIENT,
        std: float | torch.Tensor = 1.0,
        first_chunk: int = 0,
        add: bool = False,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Fills a tensor with independent N(0, std^2), or adds them to it, in place.

        Args:
            tensor: any shape, float32 or another floating dtype, any strides, any device. Noise is made in
                float32, where the tensor is. Another dtype receives it in its own precision, at least float32.
            step: 0 to 2^64 - 1. On a GPU it may be an int64 tensor [1] there, whose bits are read as unsigned when
                the noise is made; a CUDA graph can only be captured with one.
            stream: 0 to 2^32 - 1.
            std: standard deviation, at least 0. It is rounded up to a float32, never down. A 0-dim tensor on an
                accelerator is not read back, so it is not checked either.
            first_chunk: where in the stream to begin, in chunks of 160 normals. A tensor takes
                ``chunks(tensor.numel())`` of them, a new one for its first element.
            add: add to the tensor instead of overwriting it.
            backend: what makes the noise (`adaclip.backends`); all give the same bits.

        Returns:
            The tensor.

        Raises:
            ValueError: for an argument outside its range; the tensor is then unchanged.

        Element i of the tensor takes normal i % 160 of chunk first_chunk + i // 160: i counts in memory order
        if the elements fill one block of memory (contiguous, channels_last, transposed), else in index order.
        """
        step, stream = address(step, stream)
        on_device = isinstance(std, torch.Tensor) and std.device.type != "cpu"
        std = rounded_up(std) if on_device else checked_std(std)
        check_chunks(first_chunk, chunks(tensor.numel()))
        if not tensor.is_floating_point():
            raise ValueError(f"tensor must have a floating dtype, got {tensor.dtype}")
        if not on_device and std == 0.0:
            return tensor if add else tensor.zero_()
        flat = is_flat(tensor)
        near = not on_device or std.device == tensor.device
        if flat and near and tensor.dtype == torch.float32:
            block = tensor.as_strided((tensor.numel(),), (1,))
            run = implementation("normal_fill", backend, block)
            run(self._key, step, stream, block, std, first_chunk, add)
            torch.autograd.graph.increment_version(tensor)
            return tensor
        noise = torch.empty(tensor.numel(), dtype=torch.float32, device=tensor.device)
        implementation("normal_fill", backend, noise)(self._key, step, stream, noise, 1.0, first_chunk, False)
        noise = noise.as_strided(tensor.shape, tensor.stride()) if flat else noise.view(tensor.shape)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        noise = noise.to(tensor.device, wide) * (std.to(tensor.device, wide) if on_device else std)
        return tensor.copy_(tensor.to(wide) + noise if add else noise)

    def bernoulli(self, n: int, q: float, step: int, stream: int = STREAM_SAMPLER) -> np.ndarray:
        """Takes each of n examples independently with probability q (Poisson sampling).

        Args:
            n: number of examples, 0 to 2^35.
            q: rate in [0, 1].
            step: 0 to 2^64 - 1.
            stream: 0 to 2^32 - 1.

        Returns:
            int64 [taken], ascending indices below n.

        Guarantee: the probability is exactly floor(q * 2^64) / 2^64, never above q (1 for q = 1), so an
        accountant that is told q does not under-count.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 0 <= n <= _MAX_DRAWS:
            raise ValueError(f"n must be an int in [0, 2^35], got {n!r}")
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must be in [0, 1], got {q!r}")
        step, stream = address(step, stream)
        return _core.bernoulli(self._key.host, step, stream, int(n), float(q), torch.get_num_threads())

    def generator(self, step: int, stream: int) -> torch.Generator:
        """A CPU generator for one address, for code that draws its numbers from a ``torch.Generator``.

        Args:
            step: 0 to 2^64 - 1.
            stream: 0 to 2^32 - 1.

        All 624 words of the Mersenne Twister's state come from the keystream. Torch seeds it from 32 bits, which
        someone who knows the code could try one after the other.

        Raises:
            RuntimeError: this torch keeps the state of its generator in another form.
        """
        step, stream = address(step, stream)
        blocks = [_core.chacha20_block(self._key.host, i, step, stream) for i in range(_TWISTER_WORDS // 16)]
        generator = torch.Generator().manual_seed(_TWISTER_WORDS)
        state = generator.get_state().numpy().copy().view(np.uint64)
        # The seed, flags, the position, then the words, the first of which is the seed.
        words = state[3 : 3 + _TWISTER_WORDS]
        if len(words) != _TWISTER_WORDS or words[0] != _TWISTER_WORDS or state[0] != _TWISTER_WORDS:
            raise RuntimeError(
                f"torch {torch.__version__} keeps its CPU generator's state in an unknown form"
            )
        state[0] = 0
        words[:] = np.array(blocks, dtype=np.uint64).ravel()
        generator.set_state(torch.from_numpy(state.view(np.uint8)))
        return generator


def _key_bytes(key: bytes | int | torch.Generator | None) -> bytes:
    if key is None:
        return secrets.token_bytes(32)
    if isinstance(key, (bytes, bytearray)):
        if len(key) != 32:
            raise ValueError(f"key must be 32 bytes, got {len(key)}")
        return bytes(key)
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        if not 0 <= key < 1 << 256:
            raise ValueError("an int key must be in [0, 2^256)")
        return int(key).to_bytes(32, "little")
    if isinstance(key, torch.Generator):
        drawn = torch.randint(0, 256, (32,), generator=key, device=key.device, dtype=torch.uint8)
        return bytes(drawn.tolist())
    raise TypeError(f"key must be None, 32 bytes, an int or a torch.Generator, got {type(key).__name__}")


def address(step: int | torch.Tensor, stream: int) -> tuple[int | torch.Tensor, int]:
    on_device = isinstance(step, torch.Tensor)
    if on_device and (step.device.type == "cpu" or step.dtype != torch.int64 or step.shape != (1,)):
        raise ValueError(f"step must be an int, or int64 [1] on a GPU, got {step.dtype} {list(step.shape)}")
    numbers = [("stream", stream, 32)] if on_device else [("step", step, 64), ("stream", stream, 32)]
    for name, value, bits in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be an int in [0, 2^{bits}), got {value!r}")
    return step if on_device else int(step), int(stream)


def chunks(numel: int) -> int:
    """How many chunks of 160 normals a tensor of that many elements takes."""
    return -(-numel // _core.CHUNK_NORMALS)


def check_chunks(first: int, count: int) -> None:
    if isinstance(first, bool) or not isinstance(first, (int, np.integer)) or first < 0:
        raise ValueError(f"first_chunk must be an int of at least 0, got {first!r}")
    if first + count > _core.STREAM_CHUNKS:
        raise ValueError(
            f"a stream holds 2^28 chunks of 160 normals, asked for {count} from chunk {first}: use another stream"
        )


def rounded_up(std: torch.Tensor) -> torch.Tensor:
    """`checked_std` of a tensor, element by element, without reading its device; float32, or the tensor if it is."""
    if std.dtype == torch.float32:
        return std
    rounded = std.to(torch.float32)
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < std.double(), above, rounded)


def checked_std(std: float | torch.Tensor) -> float:
    """std as the least float32 that is not below it, so that rounding never takes noise away."""
    std = float(std)
    if not 0.0 <= std <= _FLOAT32_MAX:
        raise ValueError(f"std must be finite and at least 0, got {std!r}")
    rounded = np.float32(std)
    if float(rounded) < std:
        rounded = np.nextafter(rounded, np.float32(math.inf))
    return float(rounded)
