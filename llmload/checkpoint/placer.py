"""One weight from its place in the file to its place in the model, counted and proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from llmload.checkpoint.copying import Copies
from llmload.checkpoint.libc import populate
from llmload.checkpoint.placement import Part, Source, Target
from llmload.checkpoint.staging import Staging, current_stream, pieces

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.assembled import Assembled
    from llmload.checkpoint.header import TensorInfo
    from llmload.checkpoint.mapped import MappedCheckpoint
    from llmload.checkpoint.placement import Placement
    from llmload.checkpoint.proof import Proof


_PIECE = 2**22
"""Bytes that are cast at a time."""


class Placer(AbstractContextManager["Placer"]):
    """Hands finished tensors to the placement, each with what it is for and where it came from.

    Copies that the placement leaves to other threads are made by :meth:`finish`, and have arrived
    then; at the end of the ``with`` block no thread is left, and no pinned memory.

    :param model: prepared by the placement, its weights on the meta device.
    :param state: ``model.state_dict()``.
    :param devices: by the same names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        state: dict[str, torch.Tensor],
        files: MappedCheckpoint,
        placement: Placement,
        proof: Proof,
        devices: Mapping[str, int | str | torch.device],
    ) -> None:
        self.state = state
        """The meta tensors to be replaced."""
        self.modules = dict(model.named_modules(remove_duplicate=False))
        """The modules that own them, by name."""
        self._files = files
        self._placement = placement
        self._proof = proof
        self._devices = devices
        self._copies = Copies()
        self._staging = Staging()

    def __exit__(self, *exc: object) -> None:
        self._copies.__exit__(*exc)
        self._staging.__exit__(*exc)

    def finish(self) -> None:
        """Wait until every weight that was placed has its values, and raise what went wrong."""
        self._copies.finish()
        self._staging.finish()

    def place(
        self,
        name: str,
        dtype: torch.dtype,
        value: torch.Tensor | Assembled,
        info: TensorInfo | None,
        behind: Iterable[TensorInfo] = (),
    ) -> torch.Tensor:
        """Place ``value`` and return what the model gets.

        :param dtype: the final one.
        :param info: where ``value`` lies in the file; None for one that was converted.
        :param behind: for a converted value, the tensors of the file whose pages it lies on.
        """
        import torch

        path, _, attribute = name.rpartition(".")
        target = Target(
            name=name,
            module=self.modules[path],
            attribute=attribute,
            like=self.state[name],
            dtype=dtype,
            device=torch.device(self._devices[name]),
        )
        # The placement decides what is read, and asks this source for it through the functions
        # below: what it asked for, not what the file holds, is counted and goes into the digest.
        reading = self._proof.reading()

        def origin(part: torch.Tensor) -> TensorInfo | None:
            return info if isinstance(value, torch.Tensor) else value.origin(part)

        def asked(part: torch.Tensor, *, later: bool = False) -> None:
            found = origin(part)
            if found is not None:  # a computed value was counted when its tensors were read
                self._files.ask(found, part, later=later and not reading.hashes)
            reading.add(part)

        def release() -> None:
            # Hashed in another thread, over the pages that go now.
            reading.wait()
            self.drop(behind if info is None else [info])

        # What stays on the pages is proven by its address; a part that is mapped by itself has
        # another.
        address = None if info is None else self._files.address(info)

        def own(part: torch.Tensor) -> torch.Tensor | None:
            nonlocal address
            # Tensors of a file stand close together: behind one of a narrower dtype the next may
            # begin at an address that torch cannot take as its own dtype. It is copied then.
            if info is None or info.start % part.itemsize:
                return None
            pages = self._files.part(info, _first_byte(part), part.nbytes)
            if pages is None:
                return None
            address = pages.data_ptr()
            return pages.view(part.dtype)

        def send(out: torch.Tensor, part: torch.Tensor) -> None:
            self._send(origin(part), part, out)

        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        source = Source(
            value,
            asked,
            release,
            lambda *copy: copies.append(copy),
            send,
            own,
            info,
            may_stay=self._files.may_stay,
        )
        placed = self._placement.place(target, source)
        stored = placed.stored if isinstance(placed, Part) else placed
        self._proof.count(name, stored, address)

        def copy() -> None:
            for out, part in copies:
                self._copy(origin(part), part, out)
            release()
            self._proof.compare(name, stored, reading)

        if copies:
            # A computed value takes memory until it is copied: the next one is made after that.
            computed = info is None and isinstance(value, torch.Tensor)
            nbytes = 0 if computed else sum(out.nbytes for out, _ in copies)
            self._copies.add(_in_this_mode(copy, copies[0][0].device), nbytes)
        else:
            self._proof.compare(name, stored, reading)
        return placed.parameter if isinstance(placed, Part) else placed

    def _send(self, info: TensorInfo | None, part: torch.Tensor, out: torch.Tensor) -> None:
        """Begin to copy a part to an accelerator, its pieces read by several threads."""
        split = [(out, part)]
        if self._staging.serves(out) and _are_laid_out_alike(out, part):
            split = list(pieces(out, part))
        for sent, piece in split:
            job = partial(self._copy, info, piece, sent)
            # Nothing is done beside a single one: it needs no thread.
            nbytes = sent.nbytes if len(split) > 1 else 0
            self._copies.add(_in_this_mode(job, out.device), nbytes)
        self._copies.finish()

    def _copy(self, info: TensorInfo | None, part: torch.Tensor, out: torch.Tensor) -> None:
        """Give ``out`` the values of a part of a tensor of the file, or of one that was made."""
        if info is not None:
            self._files.arrive(info, part)
        if out.device.type == "cpu":
            self._fill(info, part, out)
        elif self._staging.serves(out) and _are_laid_out_alike(out, part):
            for sent, piece in pieces(out, part):
                self._staging.send(sent, piece.dtype, partial(self._fill, info, piece))
        else:
            out.copy_(part)

    def _fill(self, info: TensorInfo | None, part: torch.Tensor, out: torch.Tensor) -> None:
        """Write what has arrived to memory of the host."""
        # Computed or fetched, so that it is in memory, or a part with gaps, which torch has to walk
        # through.
        is_in_file = info is not None and self._files.is_mapped(info)
        if info is None or not is_in_file or not _are_laid_out_alike(out, part):
            populate(out)
            out.copy_(part)
        # The bytes as they are: read past the mapping, so that no page of the file counts as ours.
        elif out.dtype == part.dtype:
            populate(out)
            self._files.read(info, _first_byte(part), out)
        else:
            self._cast(info, part, out)

    def _cast(self, info: TensorInfo, part: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a part of a tensor of the file to another dtype.

        Piece by piece, each with its pages let go of: while they are mapped they count as memory of
        this process, and an embedding at float32 may have a tenth of the model's bytes.
        """
        source, target, step = part.view(-1), out.view(-1), _PIECE // part.itemsize
        for start in range(0, source.numel(), step):
            piece, cast = source[start : start + step], target[start : start + step]
            populate(cast)
            cast.copy_(piece)
            self._files.drop(info, _first_byte(piece), piece.nbytes)

    def read_for_conversion(self, infos: Iterable[TensorInfo]) -> None:
        """Count tensors of the file that were read whole to be converted."""
        for info in infos:
            self._files.count(info, info.nbytes)

    def drop(self, infos: Iterable[TensorInfo]) -> None:
        """Take the pages of tensors of the file out of this process."""
        for info in infos:
            self._files.drop(info)


def _first_byte(part: torch.Tensor) -> int:
    """Return where in its tensor of the file a part begins; the storage begins with that tensor."""
    return int(part.storage_offset()) * part.itemsize


def _are_laid_out_alike(out: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether both have the same elements in the same order, without gaps."""
    return out.numel() == part.numel() and out.is_contiguous() and part.is_contiguous()


def _in_this_mode(job: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return ``job`` as this thread would do it, without gradients.

    Each thread has its modes, and its streams of an accelerator.
    """
    import torch

    inference = torch.is_inference_mode_enabled()
    stream = current_stream(device)

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad(), stream():
            job()

    return run
