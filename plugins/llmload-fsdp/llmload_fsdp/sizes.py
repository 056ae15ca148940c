"""Sizes of the mesh, resolved against the ranks that there are. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmload import Problem, RequestError
from llmload.plugin import in_one_line
from llmload_fsdp.section import ParallelSection


@dataclass(frozen=True)
class Sizes:
    """How many ranks each dimension of the mesh has."""

    fsdp: int
    dp_replicate: int
    tp: int
    ep: int

    @property
    def ranks(self) -> int:
        """All of them: experts are spread over ranks that the others have already."""
        return self.fsdp * self.dp_replicate * self.tp

    @property
    def shards_only(self) -> bool:
        """Whether each layer is computed whole on every rank: nothing but FSDP2."""
        return self.tp == 1 and self.ep == 1

    def config(self, section: ParallelSection) -> Any:
        """Return transformers' ``DistributedConfig``.

        :raises RequestError: transformers refuses it.
        """
        from transformers.distributed import DistributedConfig

        plans = {
            name: dict(plan) if plan is not None and plan != "auto" else plan
            for name, plan in (
                ("fsdp_plan", section.fsdp_plan),
                ("tp_plan", section.tp_plan),
                ("ep_plan", section.ep_plan),
            )
        }
        try:
            return DistributedConfig(
                fsdp_size=self.fsdp,
                dp_replicate_size=self.dp_replicate,
                tp_size=self.tp,
                ep_size=self.ep,
                fsdp_cpu_offload=section.fsdp_cpu_offload,
                fsdp_mixed_precision=section.fsdp_mixed_precision,
                **plans,
            )
        except (OSError, ValueError) as error:
            raise RequestError(
                f"transformers refuses these sizes: {in_one_line(error).rstrip('.')}",
                fix="Change the sizes that it names.",
                where="parallel",
            ) from error


def resolve(section: ParallelSection, ranks: int | None) -> Sizes | None:
    """Return all sizes; None where they follow from ranks that no launcher has started yet.

    :param ranks: how many there are.
    :raises RequestError: they are not as many ranks as there are.
    """
    tp = section.tp_size
    if tp is None and section.tp_plan is None:
        tp = 1
    open_sizes = [name for name, size in (("fsdp", section.fsdp_size), ("tp", tp)) if size is None]
    if len(open_sizes) == 2:  # as transformers: what is left goes to tensor parallel
        return _filled(section, 1, None, ranks)
    return _filled(section, section.fsdp_size, tp, ranks)


def _filled(
    section: ParallelSection, fsdp: int | None, tp: int | None, ranks: int | None
) -> Sizes | None:
    given = section.dp_replicate_size * (fsdp or 1) * (tp or 1)
    if fsdp is None or tp is None:
        if ranks is None:
            return None
        rest, over = divmod(ranks, given)
        if over or not rest:
            raise RequestError(_unfit(section, ranks, "a multiple of"))
        fsdp, tp = fsdp or rest, tp or rest
    sizes = Sizes(fsdp, section.dp_replicate_size, tp, section.ep_size)
    if ranks is not None and sizes.ranks != ranks:
        raise RequestError(_unfit(section, ranks, "exactly"))
    return sizes


def _unfit(section: ParallelSection, ranks: int, need: str) -> Problem:
    names = ("fsdp_size", "dp_replicate_size", "tp_size")
    said = {name: getattr(section, name) for name in names if getattr(section, name) is not None}
    product = 1
    for size in said.values():
        product *= size
    return Problem(
        where=f"parallel.{next(iter(said))}",
        message=f"{' x '.join(f'{name} {size}' for name, size in said.items())} needs {need}"
        f" {product} ranks, and the launcher has started {ranks}",
        fix=f"Start {product} ranks, or leave `fsdp_size` out, which takes all there are.",
    )


def dtype_problems(section: ParallelSection, dtype: str, *, quantised: bool) -> Iterator[Problem]:
    """Refuse a cast of packed codes: they are floats in name only."""
    if section.fsdp_mixed_precision and quantised and dtype != "bfloat16":
        yield Problem(
            where="parallel.fsdp_mixed_precision",
            message="it casts every parameter to bfloat16 when it is used, codes of 4 bits that are"
            f" stored as {dtype} too, which ruins them",
            fix="Set `dtype: bfloat16`, or remove `fsdp_mixed_precision`: quantised layers compute"
            " in `kbit.compute_dtype` as it is.",
        )
