"""What ranks would read of models that no machine here can hold: ``python -m benchmarks.simulate``.

The checkpoint has true headers and no data: files as long as the real ones, which take no room on a
disk that knows holes. Up to the placement all is the code of a load: index and headers, the model
on the meta device, transformers' mapping, the rule by which a rank's part is cut. Nothing is
copied, so that one run stands for every rank of every number of ranks.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from llmload.builtin.zero3.parts import dtype_of, own_span
from llmload.checkpoint.header import TensorInfo
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.checkpoint.placement import Part, Source, Target
from llmload.checkpoint.proof import Proof
from llmload.context.machine import Machine
from llmload.hf import installed_transformers
from llmload.host.registry import create_registry
from llmload.loading import planning

SHARD_BYTES = 5 * 10**9
"""What ``save_pretrained`` puts into one file."""


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the config of a Llama 3.1, with what differs between its sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    }


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": False,
}
"""The config of Mixtral 8x22B, whose experts are stored one by one and merged by transformers."""

HOST_RANKS = 8
"""Ranks of one host, which fetches from the hub what they read (``streaming: {fetch: spans}``)."""

MODELS = {
    "Llama 70B": llama(8192, 28672, 80, 64),
    "Llama 405B": llama(16384, 53248, 126, 128),
    "Mixtral 8x22B": MIXTRAL,
}


@dataclass
class Rank:
    """What one rank of one number of ranks does."""

    read: dict[Path, int] = field(default_factory=lambda: defaultdict(int))
    """Bytes by file; every file that is opened for its data is in it."""
    reads: dict[Path, int] = field(default_factory=lambda: defaultdict(int))
    """Pieces in which they are read."""
    largest: int = 0
    """Bytes of the largest piece."""
    kept: int = 0
    """Bytes of the partitions, padding included."""


@dataclass
class Simulated:
    """One number of ranks."""

    ranks: list[Rank]
    pieces: dict[str, list[tuple[int, int]]]
    """Tensor -> first and last byte, one past it, of each piece that any rank reads."""

    def fetched(self) -> list[int]:
        """Return how many bytes each host fetches, beside headers: what its ranks read.

        No byte is read by two ranks, for which :meth:`faults` stands.
        """
        read = [sum(rank.read.values()) for rank in self.ranks]
        return [sum(read[at : at + HOST_RANKS]) for at in range(0, len(read), HOST_RANKS)]

    def faults(self, tensors: Iterable[TensorInfo]) -> list[str]:
        """Return the tensors of which the ranks together do not read every byte exactly once."""
        found = []
        for info in tensors:
            end = 0
            for start, stop in sorted(self.pieces.get(info.name, [])):
                if start != end:
                    break
                end = stop
            if end != info.nbytes:
                found.append(info.name)
        return found


class _Recording(MappedCheckpoint):
    """Notes who asked for which piece."""

    who: tuple[Rank, Simulated] | None = None

    def count(self, info: TensorInfo, nbytes: int, first: int = 0) -> None:
        assert self.who, f"{info.name} is computed with: read whole by every rank"
        if not nbytes:
            return
        rank, together = self.who
        rank.read[info.file] += nbytes
        rank.reads[info.file] += 1
        rank.largest = max(rank.largest, nbytes)
        together.pieces.setdefault(info.name, []).append((first, first + nbytes))

    def read(self, info: TensorInfo, first: int, out: torch.Tensor) -> None:
        pass


class _Everyone:
    """Places for every rank what :class:`~llmload.builtin.zero3.placement.Partitioned` would."""

    def __init__(self, files: _Recording, simulated: Sequence[Simulated], dtype: Any) -> None:
        self._files = files
        self._simulated = simulated
        self._dtype = dtype

    def prepare(self, model: Any) -> None:
        pass

    def place(self, target: Target, source: Source) -> Part:
        dtype = dtype_of(target.like, self._dtype)
        elements = source.shape.numel()
        for together in self._simulated:
            for number, rank in enumerate(together.ranks):
                self._files.who = (rank, together)
                span = own_span(
                    target.module, target.attribute, elements, number, len(together.ranks)
                )
                nowhere = torch.empty(span.length, dtype=source.dtype, device="meta")
                source.fill(nowhere, span.start, span.stop)
                rank.kept += span.size * dtype.itemsize
        self._files.who = None
        ghost = torch.empty(1, dtype=dtype).expand(source.shape)
        return Part(torch.nn.Parameter(ghost, requires_grad=False), ghost[:0])

    def finish(self, model: Any) -> None:
        pass


def simulate(folder: Path, numbers: Sequence[int]) -> list[Simulated]:
    """Load the folder for every rank of each number of ranks, copying nothing."""
    registry = create_registry()
    spec = registry.validate({"model": str(folder), "dtype": "bfloat16", "zero3": {}})
    prepared = planning.prepare(
        spec, registry, download=planning.Download.NOTHING, machine=Machine(host_memory="1000TB")
    )
    prepared.plan.raise_for_errors()
    ctx = prepared.ctx.for_run(rehearsing=False)
    assert ctx.checkpoint
    simulated = [Simulated([Rank() for _ in range(number)], {}) for number in numbers]
    model = ctx.model_to_fill()
    with _Recording(ctx.checkpoint) as files, Proof() as proof:
        installed_transformers().fill(
            model,
            files,
            _Everyone(files, simulated, ctx.dtype),
            proof,
            ctx.accounting(model),
            dtype=ctx.dtype,
            device_map=None,
            name_or_path=str(folder),
        )
    for together in simulated:
        faults = together.faults(ctx.checkpoint.tensors.values())
        assert not faults, f"not every byte is read exactly once: {faults}"
    return simulated


def write_headers(folder: Path, config: dict[str, Any]) -> None:
    """Write config, index and shards of true length that hold nothing but their headers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        nbytes = 2 * tensor.numel()
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tuple(tensor.shape)
        room -= nbytes
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        _write_header(folder / file, shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_header(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + end)


def _rows(name: str, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    from llmload.checkpoint import Checkpoint

    with tempfile.TemporaryDirectory() as made:
        folder, start = Path(made), time.perf_counter()
        write_headers(folder, MODELS[name])
        checkpoint = Checkpoint.open(folder)
        headers = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        headers -= checkpoint.total_bytes
        for together in simulate(folder, numbers):
            ranks = together.ranks
            read = [sum(rank.read.values()) for rank in ranks]
            yield {
                "model": name,
                "files": len(checkpoint.files),
                "tensors": len(checkpoint.tensors),
                "bytes": checkpoint.total_bytes,
                "ranks": len(ranks),
                "read": {"least": min(read), "most": max(read)},
                "host": {"share": checkpoint.total_bytes * HOST_RANKS / len(ranks)}
                | {"fetches": max(together.fetched()), "headers": headers},
                "kept": max(rank.kept for rank in ranks),
                "opened": max(len(rank.read) for rank in ranks),
                "reads_per_file": max(max(rank.reads.values()) for rank in ranks),
                "largest_read": max(rank.largest for rank in ranks),
            }
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def page(found: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    under = found["under"]
    versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items())
    lines = [
        "# ZeRO-3 beyond this machine, simulated",
        "",
        "`python -m benchmarks.simulate`: real headers and no data, the code of a real load. All"
        " ranks together read every byte of the checkpoint exactly once; the command fails where"
        " they do not. GB are 10^9 bytes; bfloat16 on disk and in memory. What a rank keeps"
        " includes padding; nothing else of a tensor is ever in its memory. With"
        " `streaming: {fetch: spans}` a host fetches from the hub what its ranks read, once, and"
        " the headers of all files.",
        "",
        "| model | checkpoint | ranks | a rank reads | a rank keeps | files opened"
        " | reads per file, at most | largest read"
        f" | a host of {HOST_RANKS} ranks fetches | headers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        read = sorted({f"{row['read'][end] / 1e9:.3f}" for end in ("least", "most")})
        lines.append(
            f"| {row['model']} | {row['bytes'] / 1e9:.1f} GB in {row['files']} files,"
            f" {row['tensors']} tensors | {row['ranks']} | {' to '.join(read)} GB"
            f" | {row['kept'] / 1e9:.3f} GB | {row['opened']} | {row['reads_per_file']}"
            f" | {row['largest_read'] / 1e6:.1f} MB | {row['host']['fetches'] / 1e9:.3f} GB,"
            f" {row['host']['fetches'] / row['host']['share']:.4f} of its share"
            f" | {row['host']['headers'] / 1e6:.2f} MB |"
        )
    return "\n".join([*lines, "", f"{under['date']}; {under['machine']}; {versions}."]) + "\n"


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks.")] = None,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("benchmarks/results"),
) -> None:
    """Say what each rank would read, keep and open, for models of any size."""
    from transformers.utils.logging import disable_progress_bar

    from . import results  # needs packages that the simulation does not

    disable_progress_bar()
    rows = [row for name in model or MODELS for row in _rows(name, ranks or (8, 64, 512))]
    found = {"under": results.conditions(sys.executable, 1), "rows": rows}
    (out / "simulated.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "simulated.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    typer.run(main)
