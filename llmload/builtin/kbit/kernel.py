"""Exact 4-bit quantisation on the CPU, many times faster than bitsandbytes' own.

bitsandbytes 0.50.2 has no CPU kernel for ``quantize_4bit``: its default makes about ten passes over
a whole tensor in float32 and searches the code of each value by itself. Here each value is compared
with each of the 15 bounds between codes, and the outcomes are added up: in C where that can be
compiled, else with torch, in chunks that fit into the cache. There, 16-bit values are compared as
integers: what a value of a block is compared with depends on the block's largest magnitude alone,
so the largest value below each bound is looked up in a table.

The results are bitsandbytes' own, bit by bit. Imported lazily, by functions: it needs torch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from llmload.builtin.kbit import compiled
from llmload.builtin.kbit.methods import MANTISSA_BITS, ByFloats, ByIntegers, Compiled, Method

_OP = "bitsandbytes::quantize_4bit"
_BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
_QUANT_TYPES = frozenset({"nf4", "fp4"})


@contextmanager
def fast_quantisation() -> Iterator[Kernel | None]:
    """Let bitsandbytes quantise to 4 bits with :class:`Kernel` wherever it does so on the CPU.

    Registered as torch provides for, and taken back at the end. Nothing is done where there is a
    CPU kernel already: a later bitsandbytes' own, or that of another load in this process. So is
    where torch is older than 2.9, which cannot hand over the kernel that is being replaced.
    """
    import bitsandbytes  # noqa: F401 - defines the operator

    if (
        sys.byteorder != "little"
        or not hasattr(torch.library, "get_kernel")
        or torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CPU")
    ):
        yield None
        return
    kernel = Kernel(torch.library.get_kernel(_OP, "CPU"))
    registration = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    try:
        registration.impl(  # type: ignore[no-untyped-call]
            "quantize_4bit", kernel, "CPU", with_keyset=True
        )
        yield kernel
    finally:
        # A registration lives as long as its library.
        del registration


class Kernel:
    """The operator ``bitsandbytes::quantize_4bit`` for tensors on the CPU.

    :param default: the kernel that it takes the place of, which does what this one cannot do
        exactly: blocks that are not full or hold NaN or infinity, and the dtypes, block sizes and
        codes that bitsandbytes does not have today. A code and dtype are left to it altogether if
        the two do not agree on a sample.
    """

    def __init__(self, default: Any) -> None:
        self.values: Counter[str] = Counter()
        """Values that were quantised by each: ``compiled``, ``torch``, ``bitsandbytes``."""
        self.not_compiled: str | None = None
        """Why there is no compiled kernel, once that is known."""
        self._default = default
        self._methods: dict[tuple[str, torch.dtype], Method | None] = {}

    @torch.no_grad()
    def __call__(
        self,
        keys: torch.DispatchKeySet,
        values: torch.Tensor,
        blocksize: int,
        quant_type: str,
        quant_storage: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise ``values`` of any shape; all arguments but ``keys`` are the operator's.

        :returns: two codes to the byte, shape ``(bytes, 1)`` viewed as ``quant_storage``, and the
            largest magnitude of each block, float32.
        """
        method = self._method(keys, values.dtype, blocksize, quant_type)
        if method is None:
            self.values["bitsandbytes"] += values.numel()
            return self._default.call_boxed(  # type: ignore[no-any-return]
                keys, values, blocksize, quant_type, quant_storage
            )
        packed, absmax = self._quantise(keys, values.reshape(-1), blocksize, method)
        return packed.view(quant_storage).unsqueeze(1), absmax

    def _method(
        self, keys: torch.DispatchKeySet, dtype: torch.dtype, blocksize: int, quant_type: str
    ) -> Method | None:
        if (
            blocksize not in _BLOCK_SIZES
            or quant_type not in _QUANT_TYPES
            or dtype not in (torch.float32, *MANTISSA_BITS)
        ):
            return None
        key = quant_type, dtype
        if key not in self._methods:
            before = self.values.copy()
            sample = _sample(dtype)
            theirs = self._default.call_boxed(keys, sample, 64, quant_type, torch.uint8)
            self._methods[key] = None
            for method in self._candidates(quant_type, dtype):
                ours = self._quantise(keys, sample, 64, method)
                if torch.equal(ours[0], theirs[0][:, 0]) and torch.equal(ours[1], theirs[1]):
                    self._methods[key] = method
                    break
            self.values = before
        return self._methods[key]

    def _candidates(self, quant_type: str, dtype: torch.dtype) -> Iterator[Method]:
        try:
            yield Compiled(quant_type, dtype, compiled.library())
        except compiled.NotCompiledError as error:
            self.not_compiled = str(error)
        yield (ByFloats if dtype == torch.float32 else ByIntegers)(quant_type, dtype)

    def _quantise(
        self, keys: torch.DispatchKeySet, flat: torch.Tensor, blocksize: int, method: Method
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = flat.numel()
        full = count - count % blocksize
        packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(count // -blocksize), dtype=torch.float32)
        for start, stop in pairwise(sorted({*range(0, full, method.chunk), full, count})):
            part = flat[start:stop]
            codes = packed[start // 2 : (stop + 1) // 2]
            largest = absmax[start // blocksize : -(stop // -blocksize)]
            done_by = method.name
            if stop > full or not method(part.view(-1, blocksize), codes, largest):
                theirs = self._default.call_boxed(
                    keys, part, blocksize, method.quant_type, torch.uint8
                )
                codes.copy_(theirs[0][:, 0])
                largest.copy_(theirs[1])
                done_by = "bitsandbytes"
            self.values[done_by] += part.numel()
        return packed, absmax


def _sample(dtype: torch.dtype) -> torch.Tensor:
    """Make values all over the range, so that another way of rounding would show."""
    unit = torch.linspace(-1, 1, 4095)
    scales = torch.tensor([1.0, 0.0215, 3e-5, 0.0]).unsqueeze(1)
    return (unit * scales).flatten().to(dtype)
