"""Old ``.bin`` checkpoints, read only where the spec allows pickles and torch reads them safely.

The unpickler (``weights_only=True``) runs once and sees no tensor data: it tells names, dtypes,
shapes and where each storage lies in the archive. From there on such a file is bytes at known
places like a safetensors file.
"""

from __future__ import annotations

import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmload.checkpoint.folder import refuse
from llmload.checkpoint.header import TensorInfo, check_name
from llmload.checkpoint.strict_json import short

if TYPE_CHECKING:
    from llmload.errors import CheckpointError

MIN_TORCH = (2, 10)
"""First torch whose restricted unpickler has no known hole (CVE-2025-32434, CVE-2026-24747)."""

_MAX_PICKLE_BYTES = 64 * 2**20
"""Of the pickle in an archive, which holds names and shapes: a hundred bytes for each tensor."""
_SHOWN = 200
_CONVERT = "Save it again as safetensors, on a machine that may open pickles."


def refuse_pickle(path: Path) -> CheckpointError:
    """The refusal of a folder whose only weights are pickles, with the way out."""
    return refuse(
        path,
        "the only weights here are a pickle, and opening a pickle can run code",
        "Convert it to safetensors elsewhere, or set allow_pickle: true with torch >= 2.10.",
    )


def require_safe_torch(path: Path) -> None:
    """Refuse ``path`` unless the installed torch is new enough to unpickle it safely."""
    installed = version("torch")
    if tuple(int(part) for part in installed.split(".")[:2]) < MIN_TORCH:
        raise refuse(
            path,
            f"torch {installed} cannot open pickles safely; torch >= 2.10 is needed",
            "Convert the file to safetensors elsewhere, or upgrade torch.",
        )


def read_pickle(path: Path, file: IO[bytes], size: int) -> list[TensorInfo]:
    """The tensors of the torch archive ``file`` (``size`` bytes), none of whose data is read.

    :raises CheckpointError: the file is not a plain state dict in torch's zip layout.
    """
    import torch

    _check_archive(path, file, size)
    file.seek(0)
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # the restricted unpickler raises many kinds
        reason = str(error).partition("\n")[0][:_SHOWN]
        raise refuse(path, f"the pickle cannot be read safely: {reason}", _CONVERT) from error
    if _is_dpo_archive(content):
        content = content["state"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and type(value) in (torch.Tensor, torch.nn.Parameter)
        for name, value in content.items()
    ):
        raise refuse(path, "the pickle is no mapping of names to plain tensors", _CONVERT)
    return [_locate(path, name, value, size) for name, value in content.items()]


def _is_dpo_archive(content: Any) -> bool:
    """Whether this is what the DPO reference code writes as ``policy.pt``."""
    return isinstance(content, dict) and content.keys() == {"step_idx", "state", "metrics"}


def _check_archive(path: Path, file: IO[bytes], size: int) -> None:
    """Refuse an archive unless all in it lies there once, as it is: nothing is to be unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            items = archive.infolist()
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in items)
            fits = sum(item.file_size for item in items) <= size
            pickles = [item for item in items if item.filename.endswith(".pkl")]
            small = all(item.file_size <= _MAX_PICKLE_BYTES for item in pickles)
            orders = [item for item in items if item.filename.endswith("/byteorder")]
            native = stored and all(
                item.file_size < _SHOWN and archive.read(item).decode() == sys.byteorder
                for item in orders
            )
    except Exception:  # zipfile raises many kinds for what is no archive, or half of one
        raise refuse(path, "the file is cut off or of torch's oldest layout", _CONVERT) from None
    if not (stored and native):
        raise refuse(path, "the archive is compressed or of another byte order", _CONVERT)
    if not (fits and small):
        raise refuse(path, f"the archive holds more than its {size:,} bytes", _CONVERT)


def _locate(path: Path, name: str, tensor: Any, size: int) -> TensorInfo:
    from llmload.checkpoint.dtypes import safetensors_dtype

    try:
        check_name(name)
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        in_one_piece = offset is not None and tensor.is_contiguous()
        dtype = safetensors_dtype(tensor.dtype)
    except Exception as error:  # sparse ones have no storage, quantised ones no dtype of ours
        reason = str(error).partition("\n")[0][:_SHOWN]
        raise refuse(path, f"tensor {short(name)} is not a plain one: {reason}", _CONVERT) from None
    if not in_one_piece:
        raise refuse(path, f"tensor {short(name)} does not lie in one piece in the file", _CONVERT)
    start = offset + tensor.storage_offset() * tensor.element_size()
    stop = start + tensor.numel() * tensor.element_size()
    if stop > size:
        raise refuse(path, f"tensor {short(name)} ends at byte {stop} of a file of {size} bytes")
    return TensorInfo(name, path, dtype, tuple(tensor.shape), start, stop)
