"""Quantised weights that are kept: found instead of made, by the next load of the same base.

What is kept is a model folder that transformers reads, codes and statistics under their usual
names. Of it a load takes codes and statistics alone, over the file's pages; everything else is read
from the source, as ever. The key covers all that decides on their bits; `prepare`, `cast`,
`compute_dtype` and `quant_storage` do not. Imported lazily: it needs torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

from llmload.plugin import (
    Checkpoint,
    CheckpointError,
    KeptFolders,
    MappedCheckpoint,
    TensorInfo,
    dtype_name,
    installed_transformers,
    key_of,
    size_text,
    some,
    usual_place,
    version_of,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.builtin.kbit.section import KbitSection
    from llmload.plugin import LoadContext, Target

LAYOUT: Final = 1
"""Of what is kept; another one is not found."""
FILE: Final = "model.safetensors"
_DECIDING: Final = ("bitsandbytes", "torch", "transformers")
"""Distributions whose versions may decide on a bit."""
_GB: Final = 10**9
_ALIGNMENT: Final = 64
_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Those that models have, as the format names them."""


def folders(section: KbitSection) -> KeptFolders:
    """Return where a section keeps its folders.

    :raises RequestError: it is a place that others can write to.
    """
    assert section.cache is not None
    folder = section.cache.folder
    return KeptFolders(usual_place() if folder is None else Path(folder))


def reads_all(ctx: LoadContext, section: KbitSection) -> bool:
    """Say whether every byte of source and cache is to be hashed: as asked, or for a proof."""
    asked = section.cache is not None and section.cache.verify
    return asked or ctx.spec.lock is not None or "verify" in ctx.sections


class KeptWeights:
    """The weights that were kept of one load's base, or that will be."""

    def __init__(self, ctx: LoadContext, section: KbitSection) -> None:
        assert section.cache is not None
        self._ctx = ctx
        self._section = section
        self._limit = int(section.cache.max_gb * _GB)
        self._folders = folders(section)
        self._made_from: dict[str, Any] = {}
        self._key = ""
        self._files: MappedCheckpoint | None = None
        self._statistics: dict[str, list[str]] = {}
        self._uncast: dict[str, torch.Tensor] = {}

    @property
    def found(self) -> bool:
        """Whether they are there."""
        return self._files is not None

    def look(self, names: list[str], devices: str) -> None:
        """Look for the weights of those names.

        :param devices: on which they are quantised, which may round otherwise than others.
        :raises CheckpointError: a file of the source changed while it was being hashed.
        """
        whole = reads_all(self._ctx, self._section)
        assert self._ctx.checkpoint is not None
        digests = self._folders.digests(self._ctx.checkpoint, anew=whole)
        self._made_from = made_from(self._ctx, self._section, names, devices, digests)
        self._key = key_of(self._made_from)
        folder = self._folders.find(self._key, whole=whole)
        if folder is None:
            return
        with suppress(CheckpointError):  # somebody clears them just now
            files = MappedCheckpoint(Checkpoint.open(folder))
            if {*names} <= files.checkpoint.tensors.keys():
                self._files = files
                for name in files.checkpoint.tensors:
                    path, dot, _ = name.partition(".weight.")
                    if dot:
                        self._statistics.setdefault(f"{path}.weight", []).append(name)

    def weight(self, target: Target, device: torch.device, *, may_stay: bool) -> Any:
        """Return a kept weight as quantising gives it: a ``Params4bit`` or ``Int8Params``.

        :param may_stay: leave its values on the pages of the file.
        :raises CheckpointError: it is not that of the target's layer.
        """
        layer: Any = target.module
        old = layer.weight
        take = partial(self._tensor, device=device, may_stay=may_stay)
        codes = take(target.name)
        elements = layer.in_features * layer.out_features
        if isinstance(layer, Linear4bit):
            if codes.dtype != torch.uint8 or codes.numel() != (elements + 1) // 2:
                raise self._damaged(target.name)
            state = self._state(target.name, device, take)
            if state.shape is None or state.shape.numel() != elements:
                raise self._damaged(target.name)
            as_stored = codes.view(-1).view(layer.quant_storage).view(-1, 1)
            made = Params4bit(as_stored, requires_grad=False, **vars(old))
            made.quant_state = state
            made.bnb_quantized = True
            layer.quant_state = state
            layer._is_hf_initialized = True
            return made
        scales = take(f"{target.name.removesuffix('weight')}SCB")
        if codes.dtype != torch.int8 or codes.shape != (layer.out_features, layer.in_features):
            raise self._damaged(target.name)
        others = {key: value for key, value in vars(old).items() if key not in ("CB", "SCB")}
        return Int8Params(codes, requires_grad=False, CB=codes, SCB=scales, **others)

    def remember(self, name: str, value: torch.Tensor) -> None:
        """Note a value that is about to be cast, as transformers would load it."""
        if not self.found:
            self._uncast[name] = value

    def finish(self, model: PreTrainedModel, *, splits: bool) -> None:
        """Keep what was quantised, if it was not found, and say what came of it."""
        if self._files is not None:
            self._files.check()
            self._files.__exit__()
            self._say("found", f"the quantised weights are those kept as {self._key}")
            return
        if splits:
            why: str | None = "each process has a part of them: fill the cache by one process alone"
        else:
            why = self._folders.keep(
                self._key,
                self._made_from,
                lambda folder: self._write(model, folder),
                about=f"{self._ctx.spec.model}, {self._section.bits} bits",
                limit=self._limit,
            )
        self._uncast.clear()
        if why is None:
            self._say("kept", f"the quantised weights are kept as {self._key}")
        else:
            self._say("not kept", f"the quantised weights are not kept: {why}")

    def _say(self, outcome: str, text: str) -> None:
        place = str(self._folders.place)
        facts = {"outcome": outcome, "key": self._key, "folder": place}
        self._ctx.record("kbit", {"cache": facts})
        self._ctx.show("kbit", "cache", f"{text}, in {place}" if outcome != "not kept" else text)

    def _tensor(self, name: str, *, device: torch.device, may_stay: bool) -> torch.Tensor:
        assert self._files is not None
        info: TensorInfo | None = self._files.checkpoint.tensors.get(name)
        if info is None:
            raise self._damaged(name)
        value = self._files.tensor(info)
        if device.type != "cpu":
            return value.to(device)
        return value if may_stay else value.clone()

    def _state(self, name: str, device: torch.device, take: Callable[[str], torch.Tensor]) -> Any:
        parts = {
            part.removeprefix(f"{name}."): take(part) for part in self._statistics.get(name, [])
        }
        try:
            return bnb.QuantState.from_dict(parts, device)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
            raise self._damaged(name) from None

    def _damaged(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"what is kept of {name!r} is not that of its layer",
            fix=f"Remove it with `llmload cache clear {self._key}`.",
            where="kbit.cache",
        )

    # --- writing ----------------------------------------------------------------------------------

    def _write(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the base as transformers would, and compare what was written bit by bit."""
        state = dict(self._state_of(model))
        _write_safetensors(folder / FILE, state)
        with MappedCheckpoint(Checkpoint.open(folder)) as files:
            stored = files.checkpoint.tensors
            wrong = [
                name
                for name, value in state.items()
                if name not in stored or not _same(value, files.tensor(stored[name]))
            ]
        if wrong or stored.keys() != state.keys():
            raise CheckpointError(f"what was written is not what the model holds: {some(wrong)}")
        _config(model).save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None and model.can_generate():
            generation.to_json_file(folder / "generation_config.json")

    def _state_of(self, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what transformers would save, values as they were before the preparation."""
        ties = installed_transformers().ties(model)
        accounted = self._ctx.accounted
        missing = {*accounted.missing, *accounted.excused} if accounted is not None else set()
        seen: set[int] = set()
        for name, value in model.state_dict().items():
            weight = name.partition(".weight.")[0] + ".weight"
            if name in ties or name in missing or weight in missing:
                continue
            if isinstance(value, torch.Tensor) and value.data_ptr() in seen and value.numel():
                continue
            found = self._uncast.get(name, value).detach()
            parameter = found if found.dtype != value.dtype else value
            if _is_codes(model, name):
                parameter = parameter.detach().view(torch.uint8).view(-1, 1)
            seen.add(value.data_ptr())
            yield name, parameter.detach().cpu().contiguous()


def made_from(
    ctx: LoadContext,
    section: KbitSection,
    names: list[str],
    devices: str,
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Return all that decides on the bits of quantised weights, as plain data.

    :param names: of the weights that are quantised.
    :param digests: SHA-256 of each file of the checkpoint, by name.
    """
    assert ctx.checkpoint is not None
    of = {file.path: digests[file.name] for file in ctx.checkpoint.files}
    places = sorted(
        (info.name, of[info.file], info.start, info.stop, info.dtype, list(info.shape))
        for info in ctx.checkpoint.tensors.values()
    )
    config = {k: v for k, v in ctx.config.to_dict().items() if not k.startswith("_")}
    config.pop("quantization_config", None)
    code = sorted(ctx.folder.glob("*.py")) if ctx.spec.trust_remote_code else []
    how: dict[str, Any] = {"bits": section.bits}
    if section.bits == 4:
        how |= {
            "quant_type": section.quant_type,
            "double_quant": section.double_quant,
            "block_size": section.block_size,
        }
    return {
        "layout": LAYOUT,
        "how": how,
        "dtype": dtype_name(ctx.dtype),
        "devices": devices,
        "class": f"{ctx.model_class.__module__}.{ctx.model_class.__qualname__}",
        "files": sorted(digests.values()),
        "tensors": _digest(places),
        "config": _digest(config),
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
        "weights": _digest(sorted(names)),
        "versions": {name: version_of(name) for name in _DECIDING},
    }


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def device_names(places: Iterable[Any]) -> str:
    """Return what may round otherwise than another: the kinds of devices, and their makes."""
    found = {torch.device(place) for place in places}
    return ", ".join(
        sorted(
            {f"cuda {torch.cuda.get_device_name(d)}" if d.type == "cuda" else d.type for d in found}
        )
    )


def _config(model: PreTrainedModel) -> Any:
    """Return the config that goes with the weights: codes are kept as bytes."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and hasattr(quantised, "bnb_4bit_quant_storage"):
        quantised.bnb_4bit_quant_storage = torch.uint8
    return config


def _is_codes(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    if attribute != "weight":
        return False
    return isinstance(model.get_submodule(path), Linear4bit)


def _write_safetensors(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors so that each begins where every dtype may, as ``save_file`` does not.

    The largest come first, and of those that are left only descriptions have odd sizes. Codes can
    then be taken as any dtype of storage where they lie.
    """
    order = sorted(state, key=lambda name: (-state[name].nbytes, name))
    # What is no multiple of the alignment comes last, so that it shifts nothing else.
    order.sort(key=lambda name: state[name].nbytes % _ALIGNMENT != 0)
    order.sort(key=lambda name: state[name].nbytes % 4 != 0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in order:
        start, stop = stop, stop + state[name].nbytes
        header[name] = {
            "dtype": _DTYPES[state[name].dtype],
            "shape": list(state[name].shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            written.write(state[name].reshape(-1).view(torch.uint8).numpy().data)


def _same(value: torch.Tensor, stored: torch.Tensor) -> bool:
    if (value.dtype, value.shape) != (stored.dtype, stored.shape):
        return False
    one, two = (each.reshape(-1).view(torch.uint8) for each in (value, stored))
    return torch.equal(one, two)


def described(section: KbitSection) -> str:
    """Return what the plan says of the cache.

    :raises RequestError: it is a place that others can write to.
    """
    place = folders(section)
    assert section.cache is not None
    entries = place.entries()
    taken = size_text(sum(entry.size for entry in entries))
    return (
        f"take the quantised weights from {str(place.place)!r} if they are kept there, else keep"
        f" them ({len(entries)} kept, {taken} of {size_text(int(section.cache.max_gb * _GB))})"
    )
