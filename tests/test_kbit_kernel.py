"""The CPU kernel for 4-bit quantisation: bit by bit what bitsandbytes gives, and only on loan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import needs_kernel_handover

from llmload.builtin.kbit import methods
from llmload.builtin.kbit.kernel import fast_quantisation

pytestmark = needs_kernel_handover

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QUANTISE = torch.ops.bitsandbytes.quantize_4bit.default


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs on both paths; module-wide, as hypothesis wants it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("CC", "no-such-compiler")
        yield request.param


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each chunk that our kernel quantised."""
    calls: list[int] = []

    def counting(call: Any) -> Any:
        def counted(self: Any, blocks: torch.Tensor, *others: Any) -> bool:
            done: bool = call(self, blocks, *others)
            calls.append(blocks.numel() if done else 0)
            return done

        return counted

    for method in (methods.Compiled, methods.ByFloats, methods.ByIntegers):
        monkeypatch.setattr(method, "__call__", counting(method.__call__))
    return calls


def is_registered() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(values: torch.Tensor, block_size: int, quant_type: str, **options: Any) -> None:
    """Compare the packed codes and every tensor of the state, bit by bit."""
    arguments = {"blocksize": block_size, "quant_type": quant_type, **options}
    packed, state = bnb.quantize_4bit(values, **arguments)
    with fast_quantisation():
        ours, our_state = bnb.quantize_4bit(values, **arguments)
    assert ours.shape == packed.shape
    assert ours.dtype == packed.dtype
    assert torch.equal(bits(ours), bits(packed))
    theirs, mine = state.as_dict(packed=True), our_state.as_dict(packed=True)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(bits(mine[name]), bits(tensor)), name


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_weights_of_more_than_one_chunk_and_a_ragged_end(
    block_size: int,
    dtype: torch.dtype,
    quant_type: str,
    fast_calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods.Compiled, "chunk", methods.CHUNK)
    count = methods.CHUNK + 3 * block_size + 17
    values = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    assert_same(values, block_size, quant_type)
    assert fast_calls[-2:] == [methods.CHUNK, 3 * block_size]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_nested_statistics(dtype: torch.dtype, quant_type: str, double_quant: bool) -> None:
    values = torch.randn(96, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_same(values, 64, quant_type, compress_statistics=double_quant)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtypes(storage: torch.dtype) -> None:
    assert_same(torch.randn(64, 64).bfloat16(), 64, "nf4", quant_storage=storage)


@settings(max_examples=300, deadline=None)
@given(
    pattern=st.binary(min_size=1, max_size=700),
    repeat=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES[:4]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_any_bit_pattern_of_any_size(
    pattern: bytes, repeat: int, dtype: torch.dtype, block_size: int, quant_type: str
) -> None:
    """NaN, infinities, denormals and zeros of both signs among them."""
    raw = bytearray(pattern * repeat * dtype.itemsize)
    assert_same(torch.frombuffer(raw, dtype=dtype), block_size, quant_type)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-40, 38),
    count=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_finite_weights_of_any_scale(
    seed: int, exponent: int, count: int, dtype: torch.dtype, block_size: int, quant_type: str
) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    values = (values * 10.0**exponent).to(dtype)
    assert_same(values, block_size, quant_type)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.slow
def test_every_pair_of_sixteen_bit_value_and_largest_magnitude(
    dtype: torch.dtype, quant_type: str
) -> None:
    """Exhaustive in the significands; exponents differ by so much that the code is the least."""
    mantissa = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    one = int(torch.tensor(1.0, dtype=dtype).view(torch.int16))
    top = torch.arange(one, one + 2**mantissa, dtype=torch.int16)[:: 1 if mantissa == 7 else 23]
    below = torch.arange(one - 10 * 2**mantissa, one + 2**mantissa, dtype=torch.int16)
    below = torch.cat([below, below + torch.tensor(-(2**15), dtype=torch.int16)])
    rows = []
    for magnitude in top:
        fits = below[(below & 0x7FFF) <= magnitude].view(-1)
        fits = torch.nn.functional.pad(fits, (0, -len(fits) % 63)).view(-1, 63)
        rows.append(torch.cat([magnitude.expand(len(fits), 1), fits], dim=1))
    assert_same(torch.cat(rows).view(dtype), 64, quant_type)


@pytest.mark.parametrize("values", [torch.empty(0), torch.zeros(64), -torch.zeros(130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_and_zero_tensors(values: torch.Tensor, dtype: torch.dtype) -> None:
    assert_same(values.to(dtype), 64, "nf4")


def test_a_transposed_weight_that_requires_gradients() -> None:
    values = torch.randn(48, 80).bfloat16().requires_grad_().t()
    packed, absmax = QUANTISE(values.detach(), 64, "nf4", torch.uint8)
    with fast_quantisation():
        ours = QUANTISE(values, 64, "nf4", torch.uint8)
    assert torch.equal(ours[0], packed)
    assert torch.equal(ours[1], absmax)


def test_only_the_chunk_with_an_infinity_or_nan_is_left_to_bitsandbytes(
    fast_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods.Compiled, "chunk", methods.CHUNK)
    values = torch.randn(methods.CHUNK + 256).bfloat16()
    values[3], values[5] = torch.inf, torch.nan
    assert_same(values, 64, "nf4")
    assert fast_calls[-2:] == [0, 256]


# --- on loan ------------------------------------------------------------------------------------


def test_the_kernel_is_registered_only_inside_the_context() -> None:
    assert not is_registered()
    with fast_quantisation():
        assert is_registered()
    assert not is_registered()


def test_the_kernel_is_taken_back_after_an_error() -> None:
    with pytest.raises(KeyError), fast_quantisation():
        raise KeyError
    assert not is_registered()


def test_a_kernel_that_is_there_already_is_left_alone(fast_calls: list[int]) -> None:
    with fast_quantisation():
        with fast_quantisation():
            pass
        assert is_registered()


def test_a_load_in_another_thread_may_end_first(fast_calls: list[int]) -> None:
    values = torch.randn(64, 64)
    expected = QUANTISE(values, 64, "nf4", torch.uint8)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fast_quantisation():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with fast_quantisation():
        leave.set()
        thread.join()
        assert torch.equal(QUANTISE(values, 64, "nf4", torch.uint8)[0], expected[0])
    assert not is_registered()


def test_what_bitsandbytes_would_round_otherwise_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, fast_calls: list[int]
) -> None:
    """As a later bitsandbytes might: then sample and default differ."""
    values = torch.randn(64, 64)
    expected = QUANTISE(values, 64, "nf4", torch.uint8)
    monkeypatch.setattr(methods.Method, "__init__", other_bounds(methods.Method.__init__))
    with fast_quantisation() as kernel:
        ours = QUANTISE(values, 64, "nf4", torch.uint8)
    assert torch.equal(ours[0], expected[0])
    assert 4096 not in fast_calls
    assert kernel is not None
    assert kernel.values == {"bitsandbytes": 4096}


def other_bounds(init: Any) -> Any:
    def changed(self: Any, quant_type: str) -> None:
        init(self, quant_type)
        self._bounds = self._bounds + 1e-4

    return changed


def test_block_sizes_that_bitsandbytes_refuses_are_left_to_it(fast_calls: list[int]) -> None:
    with fast_quantisation():
        QUANTISE(torch.randn(96), 48, "nf4", torch.uint8)
    assert fast_calls == []


# --- which path ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_quantised_how_much_is_counted(path: str, threads: int) -> None:
    values = torch.randn(2**20 + 65, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fast_quantisation() as kernel:
            QUANTISE(values, 64, "nf4", torch.uint8)
        assert kernel is not None
        assert kernel.values == {path: 2**20 + 64, "bitsandbytes": 1}
        assert kernel.not_compiled == (
            None if path == "compiled" else "no C compiler 'no-such-compiler' is found"
        )
        assert_same(values, 64, "nf4")
    finally:
        torch.set_num_threads(before)
