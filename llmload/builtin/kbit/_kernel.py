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

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar

import torch

from llmload.builtin.kbit import _compiled

CHUNK = 2**20
"""Elements per chunk: a multiple of every block size, small enough for a cache, and large enough
that threads which must wait for a core at the end of each pass do not wait too often."""

_OP = "bitsandbytes::quantize_4bit"
_BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
_QUANT_TYPES = frozenset({"nf4", "fp4"})
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


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
        self._methods: dict[tuple[str, torch.dtype], _Method | None] = {}

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
    ) -> _Method | None:
        if (
            blocksize not in _BLOCK_SIZES
            or quant_type not in _QUANT_TYPES
            or dtype not in (torch.float32, *_MANTISSA_BITS)
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

    def _candidates(self, quant_type: str, dtype: torch.dtype) -> Iterator[_Method]:
        try:
            yield _Compiled(quant_type, dtype, _compiled.library())
        except _compiled.NotCompiledError as error:
            self.not_compiled = str(error)
        yield (_ByFloats if dtype == torch.float32 else _ByIntegers)(quant_type, dtype)

    def _quantise(
        self, keys: torch.DispatchKeySet, flat: torch.Tensor, blocksize: int, method: _Method
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


class _Method:
    """Quantises whole blocks of one dtype to one code.

    Codes are counted down from the top one by what passing each bound takes away, so that codes
    need not be in the order of their values: those of fp4 are not.
    """

    name: ClassVar[str] = "torch"
    chunk: ClassVar[int] = CHUNK

    def __init__(self, quant_type: str) -> None:
        from bitsandbytes.functional import get_4bit_type

        values = get_4bit_type(quant_type, device="cpu")
        # Of the two zeros of fp4, sorting makes the first one or the other: as in bitsandbytes.
        order = torch.argsort(values)
        self.quant_type = quant_type
        self._bounds = (values[order[:-1]] + values[order[1:]]) / 2
        self._top = int(order[-1])
        self._steps: list[int] = order.diff().tolist()

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        """Fill ``packed`` and ``absmax``; returns False instead if a value is not finite.

        :param blocks: at most ``chunk`` values, shape ``(blocks, blocksize)``, contiguous.
        :param packed: uint8, half as many as there are values.
        :param absmax: float32, one for each block.
        """
        raise NotImplementedError


class _Compiled(_Method):
    """Does all in one pass, in C, in as many threads as torch would take."""

    name = "compiled"
    chunk = 2**24
    # Values that are worth a thread of their own.
    _PER_THREAD = 2**18

    def __init__(self, quant_type: str, dtype: torch.dtype, library: ctypes.CDLL) -> None:
        super().__init__(quant_type)
        self._bounds = self._bounds.contiguous()
        self._steps_in_c = torch.tensor(self._steps, dtype=torch.int32)
        self._function = library[f"quantise_{str(dtype).removeprefix('torch.')}"]
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [pointer, count, count, pointer, pointer, ctypes.c_int32]
        self._function.argtypes += [pointer, pointer]

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        threads = max(1, min(torch.get_num_threads(), blocks.numel() // self._PER_THREAD))
        parts = [len(blocks) * part // threads for part in range(threads + 1)]

        def work(part: tuple[int, int]) -> int:
            start, stop = part
            half = blocks.shape[1] // 2
            done: int = self._function(
                blocks[start:].data_ptr(),
                stop - start,
                blocks.shape[1],
                self._bounds.data_ptr(),
                self._steps_in_c.data_ptr(),
                self._top,
                packed[start * half :].data_ptr(),
                absmax[start:].data_ptr(),
            )
            return done

        if threads == 1:
            return bool(work((0, len(blocks))))
        with ThreadPoolExecutor(threads, "llmload-kbit") as pool:
            return all(list(pool.map(work, pairwise(parts))))


class _ByTorch(_Method):
    """Works on whole chunks with buffers of its own, one at a time."""

    def __init__(self, quant_type: str, buffers: torch.dtype) -> None:
        super().__init__(quant_type)
        self._buffers = torch.empty((3, CHUNK), dtype=buffers)

    @staticmethod
    def _pack(codes: torch.Tensor, spare: torch.Tensor, packed: torch.Tensor) -> None:
        """Put pairs of codes, int16, into one byte each: the first into the upper half."""
        pairs = codes.view(torch.int32)
        second = torch.bitwise_right_shift(pairs, 16, out=spare.view(torch.int32))
        packed.copy_(pairs.bitwise_left_shift_(4).bitwise_or_(second))


class _ByFloats(_ByTorch):
    """Compares as bitsandbytes does: values divided by the block's largest magnitude."""

    def __init__(self, quant_type: str, dtype: torch.dtype) -> None:
        super().__init__(quant_type, dtype)

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        values, outcome, codes = (b.view(blocks.shape) for b in self._buffers[:, : blocks.numel()])
        torch.amax(torch.abs(blocks, out=outcome), 1, out=absmax)
        if not absmax.isfinite().all():
            return False
        torch.mul(blocks, (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1), out=values)
        codes.fill_(self._top)
        for bound, step in zip(self._bounds.tolist(), self._steps, strict=True):
            codes.sub_(torch.le(values, bound, out=outcome), alpha=step)
        spare = outcome.view(torch.int16).view(-1)[: blocks.numel()]
        self._pack(codes.to(torch.int16).view(-1), spare, packed)
        return True


class _ByIntegers(_ByTorch):
    """Compares 16-bit values in place with the largest one that is not above each bound.

    The bits of a float, read as an integer with those of negative ones turned, are in its order. A
    value counts as ``value * (1 / magnitude)`` rounded to float32, which rises with the value; so
    the last value not above a bound is found by bisection, for all magnitudes of one power of two
    when a block first needs one of them. A model has a dozen or two, a few milliseconds each.
    """

    def __init__(self, quant_type: str, dtype: torch.dtype) -> None:
        super().__init__(quant_type, torch.int16)
        self._dtype = dtype
        self._mantissa = _MANTISSA_BITS[dtype]
        self._infinity = int(torch.tensor(torch.inf, dtype=dtype).view(torch.int16))
        self._thresholds = torch.empty((self._infinity, 15), dtype=torch.int16)
        self._known = torch.zeros(self._infinity >> self._mantissa, dtype=torch.bool)

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        values, outcome, codes = (b.view(blocks.shape) for b in self._buffers[:, : blocks.numel()])
        bits = blocks.view(torch.int16)
        magnitudes = torch.bitwise_and(bits, 0x7FFF, out=codes).amax(1)
        if (magnitudes >= self._infinity).any():
            return False
        absmax.copy_(magnitudes.view(self._dtype))
        torch.bitwise_right_shift(bits, 15, out=outcome).bitwise_and_(0x7FFF)
        torch.bitwise_xor(bits, outcome, out=values)
        codes.fill_(self._top)
        for threshold, step in zip(self._of(magnitudes).unbind(1), self._steps, strict=True):
            codes.sub_(torch.le(values, threshold.unsqueeze(1), out=outcome), alpha=step)
        self._pack(codes.view(-1), outcome.view(-1), packed)
        return True

    def _of(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Return the thresholds, shape ``(blocks, 15)``, of blocks with these magnitudes."""
        index = magnitudes.long()
        octaves = index >> self._mantissa
        for octave in set(octaves[~self._known[octaves]].tolist()):
            self._find(octave)
        return self._thresholds.index_select(0, index)

    def _find(self, octave: int) -> None:
        magnitudes = torch.arange(octave << self._mantissa, (octave + 1) << self._mantissa)
        inverses = (1.0 / self._floats(magnitudes).clamp(min=1e-38)).unsqueeze(1)
        # From just below the least value of such a block, which is above no bound, to its greatest.
        low = (-magnitudes - 2).unsqueeze(1).expand(-1, 15)
        high = magnitudes.unsqueeze(1).expand(-1, 15)
        while (low < high).any():
            middle = (low + high + 1) >> 1
            fits = self._floats(middle) * inverses <= self._bounds
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
        self._thresholds[magnitudes] = low.to(torch.int16)
        self._known[octave] = True

    def _floats(self, ordered: torch.Tensor) -> torch.Tensor:
        bits = ordered.to(torch.int16)
        return (bits ^ ((bits >> 15) & 0x7FFF)).view(self._dtype).float()


def _sample(dtype: torch.dtype) -> torch.Tensor:
    """Make values all over the range, so that another way of rounding would show."""
    unit = torch.linspace(-1, 1, 4095)
    scales = torch.tensor([1.0, 0.0215, 3e-5, 0.0]).unsqueeze(1)
    return (unit * scales).flatten().to(dtype)
