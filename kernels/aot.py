"""Ahead-of-time compilation: every kernel to machine code for GPUs that need not be there.

    python -m adaclip.kernels.aot [--fewer] [80 90 ...]

compiles `variants()` and prints one line of JSON for each; --fewer: `fewer_variants()`. TRITON_INTERPRET must not be set:
under the interpreter there is nothing to compile.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Compiled", "Variant", "compile_variant", "fewer_variants", "variants", "with_ones"]


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    kernel: what `@triton.jit` made.
    signature: {argument: Triton type} of everything that is no constexpr, such as "*bf16", "i32", "fp64".
    constexprs: {argument: value}; an argument that is None at run time is a constexpr None here.
    hot: a kernel that must keep everything in registers; a test refuses one that spills.
    label: tells variants of one kernel apart.
    divisible: integer arguments that the launch finds to be multiples of 16, as it finds every pointer to be.
    options: further ones of the compiler, such as {"num_stages": 2, "enable_fp_fusion": False}.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    hot: bool = False
    label: str = ""
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a compiled variant takes: registers and spilled bytes of a thread, bytes of shared memory of a block.

    spills: local memory of a thread, as the driver would report it: spilled registers, and arrays that could not be
      registers.
    ptx: the assembly that the machine code was made from.
    """

    registers: int
    spills: int
    shared: int
    ptx: str = field(repr=False)


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile for one architecture, 80 or 90 for example; needs no GPU and no driver.

    Raises:
        ValueError: the signature and constexprs are not the kernel's arguments.
        RuntimeError: under the interpreter.
        triton's own errors, where the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(variant.kernel, JITFunction):
        raise RuntimeError(
            f"nothing to compile: {variant.kernel!r} is no compiled kernel (TRITON_INTERPRET=1?)"
        )
    names = variant.kernel.arg_names
    given = [*(n for n, kind in variant.signature.items() if kind != "constexpr"), *variant.constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(f"{variant.kernel.__name__} takes {sorted(names)}, got {sorted(given)}")
    signature = {n: "constexpr" if n in variant.constexprs else variant.signature[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in variant.divisible]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(variant.kernel, signature, variant.constexprs, attributes)
    options = {"num_warps": variant.num_warps, **variant.options}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _usage(built.asm["cubin"])
    return Compiled(registers, spills, built.metadata.shared, built.asm["ptx"])


def _check_compiles(variant: Variant) -> None:
    from triton.runtime.jit import JITFunction

    if not isinstance(variant.kernel, JITFunction):
        raise RuntimeError(f"{variant.kernel!r} cannot be compiled: is TRITON_INTERPRET=1 set?")


def _usage(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread, which Triton itself only learns from a driver."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def with_ones(variant: Variant) -> Variant:
    """The variant for integers that are 1: a launch makes constants of those, which some code does not bear."""
    _check_compiles(variant)
    special = {p.name for p in variant.kernel.params if not p.do_not_specialize}
    ones = [n for n, kind in variant.signature.items() if n in special and kind in ("i32", "i64")]
    signature = {n: kind for n, kind in variant.signature.items() if n not in ones}
    constexprs = variant.constexprs | dict.fromkeys(ones, 1)
    divisible = tuple(n for n in variant.divisible if n not in ones)
    made = {"signature": signature, "constexprs": constexprs, "divisible": divisible, "hot": False}
    return dataclasses.replace(variant, label=f"{variant.label}; ones".lstrip("; "), **made)


def variants() -> Iterator[tuple[str, Variant]]:
    """(module, variant) of every kernel module, and for each kernel one more `with_ones`."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{__package__}.{info.name}")
        made = module.aot() if hasattr(module, "aot") else []
        first = {id(variant.kernel): variant for variant in reversed(made)}
        yield from ((info.name, variant) for variant in [*made, *map(with_ones, first.values())])


def fewer_variants() -> Iterator[tuple[str, Variant]]:
    """Of `variants`, the first one of each kernel, and every hot one.

    For a second architecture: what the others are there for, the types and constants of a launch, is no matter of it.
    """
    seen = set()
    for module, variant in variants():
        if variant.hot or id(variant.kernel) not in seen:
            seen.add(id(variant.kernel))
            yield module, variant


def _main(words: list[str]) -> None:
    fewer = "--fewer" in words
    capabilities = [int(word) for word in words if word != "--fewer"] or [80, 90]
    for module, variant in fewer_variants() if fewer else variants():
        for capability in capabilities:
            built = dataclasses.asdict(compile_variant(variant, capability))
            del built["ptx"]
            named = {"module": module, "kernel": variant.kernel.__name__, "label": variant.label}
            print(json.dumps({**named, "capability": capability, "hot": variant.hot, **built}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
