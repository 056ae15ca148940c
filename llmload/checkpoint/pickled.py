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

if TYPE_CHECKING:
    from llmload.errors import CheckpointError

MIN_TORCH = (2, 10)
"""First torch whose restricted unpickler has no known hole (CVE-2025-32434, CVE-2026-24747)."""

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

    Raises ``CheckpointError`` where the file is not a plain state dict in torch's zip layout.
    """
    import torch

    _check_archive(path, file)
    file.seek(0)
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # the restricted unpickler raises many kinds
        reason = str(error).partition("\n")[0]
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


def _check_archive(path: Path, file: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
            orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
            native = all(archive.read(name).decode() == sys.byteorder for name in orders)
    except (zipfile.BadZipFile, UnicodeDecodeError):
        raise refuse(path, "the file is cut off or of torch's oldest layout", _CONVERT) from None
    if not (stored and native):
        raise refuse(path, "the archive is compressed or of another byte order", _CONVERT)


def _locate(path: Path, name: str, tensor: Any, size: int) -> TensorInfo:
    from llmload.checkpoint.dtypes import safetensors_dtype

    check_name(name)
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or not tensor.is_contiguous():
        raise refuse(path, f"tensor {name!r} does not lie in one piece in the file", _CONVERT)
    start = offset + tensor.storage_offset() * tensor.element_size()
    stop = start + tensor.numel() * tensor.element_size()
    if stop > size:
        raise refuse(path, f"tensor {name!r} ends at byte {stop} of a file of {size} bytes")
    dtype = safetensors_dtype(tensor.dtype)
    return TensorInfo(name, path, dtype, tuple(tensor.shape), start, stop)
