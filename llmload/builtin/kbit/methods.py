"""The ways to quantise whole blocks to 4 bits on the CPU: in C, or in torch by floats or integers.

Each gives what bitsandbytes gives, bit by bit, or says that it cannot. Imported lazily, by
functions: it needs torch.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import ClassVar

import torch

from llmload.plugin import dtype_name

CHUNK = 2**20
"""Elements per chunk: a multiple of every block size, small enough for a cache, and large enough
that threads which must wait for a core at the end of each pass do not wait too often."""

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


class Method:
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
        # Halfway between neighbours: the nearest code is found by counting bounds, as in
        # bitsandbytes.
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


class Compiled(Method):
    """Does all in one pass, in C, in as many threads as torch would take."""

    name = "compiled"
    chunk = 2**24
    # Values that are worth a thread of their own.
    _PER_THREAD = 2**18

    def __init__(self, quant_type: str, dtype: torch.dtype, library: ctypes.CDLL) -> None:
        super().__init__(quant_type)
        self._bounds = self._bounds.contiguous()
        self._steps_in_c = torch.tensor(self._steps, dtype=torch.int32)
        self._function = library[f"quantise_{dtype_name(dtype)}"]
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [pointer, count, count, pointer, pointer, ctypes.c_int32]
        self._function.argtypes += [pointer, pointer]

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        """Quantise blocks in the compiled kernel."""
        # torch's number heeds OMP_NUM_THREADS, which launchers set where ranks share a machine.
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
        # ctypes lets go of the interpreter's lock: the parts do run at once.
        with ThreadPoolExecutor(threads, "llmload-kbit") as pool:
            return all(list(pool.map(work, pairwise(parts))))


class ByTorch(Method):
    """Works on whole chunks with buffers of its own, one at a time."""

    def __init__(self, quant_type: str, buffers: torch.dtype) -> None:
        super().__init__(quant_type)
        self._buffers = torch.empty((3, CHUNK), dtype=buffers)

    @staticmethod
    def _pack(codes: torch.Tensor, spare: torch.Tensor, packed: torch.Tensor) -> None:
        """Put pairs of codes, int16, into one byte each: the first into the upper half."""
        # Little-endian: the first of two codes is the lower half of 32 bits. Moved up by four, with
        # the second from the upper half behind it, it is the lowest byte, the one that the copy
        # keeps.
        pairs = codes.view(torch.int32)
        second = torch.bitwise_right_shift(pairs, 16, out=spare.view(torch.int32))
        packed.copy_(pairs.bitwise_left_shift_(4).bitwise_or_(second))


class ByFloats(ByTorch):
    """Compares as bitsandbytes does: values divided by the block's largest magnitude."""

    def __init__(self, quant_type: str, dtype: torch.dtype) -> None:
        super().__init__(quant_type, dtype)

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        """Quantise blocks into the two buffers; False where a value is not finite."""
        values, outcome, codes = (b.view(blocks.shape) for b in self._buffers[:, : blocks.numel()])
        torch.amax(torch.abs(blocks, out=outcome), 1, out=absmax)
        if not absmax.isfinite().all():
            return False
        # The bound is bitsandbytes' own, for blocks of zeros. It multiplies by the inverse: to
        # divide would round some values to the other side of a bound.
        torch.mul(blocks, (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1), out=values)
        codes.fill_(self._top)
        for bound, step in zip(self._bounds.tolist(), self._steps, strict=True):
            codes.sub_(torch.le(values, bound, out=outcome), alpha=step)
        spare = outcome.view(torch.int16).view(-1)[: blocks.numel()]
        self._pack(codes.to(torch.int16).view(-1), spare, packed)
        return True


class ByIntegers(ByTorch):
    """Compares 16-bit values in place with the largest one that is not above each bound.

    The bits of a float, read as an integer with those of negative ones turned, are in its order. A
    value counts as ``value * (1 / magnitude)`` rounded to float32, which rises with the value; so
    the last value not above a bound is found by bisection, for all magnitudes of one power of two
    when a block first needs one of them. A model has a dozen or two, a few milliseconds each.
    """

    def __init__(self, quant_type: str, dtype: torch.dtype) -> None:
        super().__init__(quant_type, torch.int16)
        self._dtype = dtype
        self._mantissa = MANTISSA_BITS[dtype]
        self._infinity = int(torch.tensor(torch.inf, dtype=dtype).view(torch.int16))
        # A row for each finite magnitude of 16 bits, a megabyte in all; rows are found as blocks
        # need them.
        self._thresholds = torch.empty((self._infinity, 15), dtype=torch.int16)
        self._known = torch.zeros(self._infinity >> self._mantissa, dtype=torch.bool)

    def __call__(self, blocks: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        """Quantise blocks into the two buffers; False where a value is not finite."""
        values, outcome, codes = (b.view(blocks.shape) for b in self._buffers[:, : blocks.numel()])
        bits = blocks.view(torch.int16)
        magnitudes = torch.bitwise_and(bits, 0x7FFF, out=codes).amax(1)
        # NaN has larger bits than infinity.
        if (magnitudes >= self._infinity).any():
            return False
        absmax.copy_(magnitudes.view(self._dtype))
        # The shift fills with the sign: all ones for a negative value, whose other bits are turned.
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
        # The exponent: what is found for one of its magnitudes is found for all, in one bisection.
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
