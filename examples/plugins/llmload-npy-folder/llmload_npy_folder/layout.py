"""The layout: a folder with ``NAME.npy`` for each tensor, as ``numpy.save`` writes it.

NumPy has no bfloat16. Such a tensor is two opaque bytes for each value, ``|V2``, which is also what
``numpy.save`` makes of an array of the package ml_dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmload.plugin import CheckpointError, CheckpointFile, Problem, TensorInfo

if TYPE_CHECKING:
    import torch

SUFFIX: Final = ".npy"
DTYPES: Final[Mapping[str, str]] = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<i2": "I16",
    "<i4": "I32",
    "<i8": "I64",
    "|V2": "BF16",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
}
"""What NumPy calls a dtype of little-endian values -> what headers of safetensors call it."""


def save(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write each tensor to ``NAME.npy`` in ``folder``, which is made."""
    import numpy
    import torch

    folder.mkdir(parents=True)
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            array = value.view(torch.int16).numpy().view("V2")
        else:
            array = value.numpy()
        numpy.save(folder / f"{name}{SUFFIX}", array)


def describe(folder: Path) -> tuple[list[CheckpointFile], list[TensorInfo]]:
    """Return the files of a folder and the tensor in each, of which only headers are read.

    :raises CheckpointError: the folder is not there, or a file is not what this layout has; all
        files at fault are named.
    """
    if not folder.is_dir():
        raise CheckpointError(
            Problem(
                where="npy_folder.folder",
                message=f"there is no folder {str(folder)!r}",
                fix="Name the one that holds the files of the tensors.",
            )
        )
    files: list[CheckpointFile] = []
    tensors: list[TensorInfo] = []
    problems: list[Problem] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            file = CheckpointFile.on_disk(path, folder)
            files.append(file)
            tensors.append(_tensor(file))
        except CheckpointError as error:
            problems += error.problems
    if not files and not problems:
        problems.append(
            Problem(
                where="npy_folder.folder",
                message=f"the folder {str(folder)!r} holds no {SUFFIX} file",
                fix="Name the one that holds the files of the tensors.",
            )
        )
    if problems:
        raise CheckpointError(problems)
    return files, tensors


def _tensor(file: CheckpointFile) -> TensorInfo:
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with file.path.open("rb") as opened:
            version = npy.read_magic(opened)
            if version not in readers:
                raise ValueError(f"its version is {version}, and not 1.0 or 2.0")
            shape, column_by_column, dtype = readers[version](opened)
            start = opened.tell()
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise _refused(file, f"this is no {SUFFIX} file: {text}") from error
    if dtype.str not in DTYPES:
        known = ", ".join(sorted(DTYPES))
        raise _refused(file, f"its values are {dtype.str!r}, of which a model takes {known}")
    if column_by_column:
        raise _refused(file, "it is stored column by column (fortran_order)")
    stop = start + dtype.itemsize * math.prod(shape)
    if stop != file.size:
        raise _refused(file, f"its header asks for {stop} bytes, and it has {file.size}")
    name = file.path.name.removesuffix(SUFFIX)
    return TensorInfo(name, file.path, DTYPES[dtype.str], tuple(shape), start, stop)


def _refused(file: CheckpointFile, message: str) -> CheckpointError:
    fix = "Save it again with numpy.save, from a C-contiguous array of such values."
    return CheckpointError(Problem(where=str(file.path), message=message, fix=fix))
