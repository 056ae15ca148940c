"""The plugin ``verify``: is this folder whose it should be, and are its weights numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.builtin.verify.section import Signature, VerifySection
from llmload.hookspecs import hookimpl
from llmload.plugin import Note, Problem, in_one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmload.plugin import LoadContext, LoadSpec

_PIECE = 2**24
"""Values looked at in one go: what is computed of them takes as much memory again."""


class VerifyPlugin:
    """Holds a folder to a signature and weights to being finite."""

    name = "verify"
    Section = VerifySection
    rehearsed = False

    @hookimpl
    def admit(self, spec: LoadSpec, folder: Path) -> Iterator[Problem]:
        """Check the signature before any file of the folder is used."""
        section: VerifySection = spec.sections[self.name]
        if section.signature is None:
            return
        try:
            from model_signing import verifying
        except ImportError as error:
            yield Problem(
                where="verify.signature",
                message=f"signatures are checked by the package model-signing: {error}",
                fix="Install it with `pip install 'llmload[signing]'`.",
            )
            return
        try:
            checker = _signer(verifying.Config(), section.signature)
            checker.verify(folder, Path(section.signature.bundle).expanduser())
        except Exception as error:  # it raises many kinds, for files, keys and signatures
            yield Problem(
                where="verify.signature",
                message=f"the folder {str(folder)!r} is not what was signed: {in_one_line(error)}",
                fix="Fetch it again from whoever signed it, or check bundle and signer.",
            )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem]:
        """Say what is held to what, and refuse weights that no signature of the folder covers."""
        section = ctx.section(VerifySection)
        if section.signature is not None:
            yield Note(text=f"signed: {section.signature.bundle!r} covers every file")
            yield from _uncovered(ctx)
        if section.finite:
            yield Note(text="every weight must be finite")

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Look at every value that this process holds."""
        from llmload.plugin import some, track

        if not ctx.section(VerifySection).finite:
            return
        named = [*model.named_parameters(), *model.named_buffers()]
        looked_at = track(named, "Looking for what is not finite")
        wrong = [name for name, tensor in looked_at if not all(map(_is_finite, _values(tensor)))]
        if wrong:
            yield Problem(
                where="verify.finite",
                message=f"{some(wrong)} hold NaN or infinity",
                fix="Check the checkpoint; where it is finite, load in a wider dtype.",
            )


def _uncovered(ctx: LoadContext) -> Iterator[Problem]:
    """Yield a problem where weights lie elsewhere than in the folder that was signed."""
    root, files = ctx.folder.resolve(), () if ctx.checkpoint is None else ctx.checkpoint.files
    outside = [
        file.name
        for file in files
        if file.fetch is not None
        or not (file.path.is_relative_to(root) or (ctx.folder / file.name).resolve() == file.path)
    ]
    if outside:
        from llmload.plugin import some

        yield Problem(
            where="verify.signature",
            message=f"the signature covers the folder {str(ctx.folder)!r}, and {some(outside)} of"
            " the weights lie elsewhere",
            fix="Sign the folder with its weights, or leave out what takes them from elsewhere.",
        )


def _signer(config: Any, signature: Signature) -> Any:
    """Return model-signing's configuration that accepts this signer alone."""
    config.set_ignore_unsigned_files(signature.ignore_unsigned_files)
    if signature.public_key is not None:
        return config.use_elliptic_key_verifier(public_key=Path(signature.public_key).expanduser())
    if signature.certificate_chain:
        chain = [Path(file).expanduser() for file in signature.certificate_chain]
        return config.use_certificate_verifier(certificate_chain=chain)
    return config.use_sigstore_verifier(
        identity=signature.identity, oidc_issuer=signature.oidc_issuer
    )


def _values(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor that can be other than finite, flat."""
    from llmload.plugin import partitions

    state = getattr(tensor, "quant_state", None)
    while state is not None:  # 4-bit codes are finite; what scales them need not be
        yield state.absmax.reshape(-1)
        state = state.state2
    scales = getattr(tensor, "SCB", None)
    if scales is not None:
        yield scales.reshape(-1)
    found = None if tensor.is_meta else partitions.held(tensor)
    if found is not None:
        yield found[0]


def _is_finite(flat: torch.Tensor) -> bool:
    if not (flat.is_floating_point() or flat.is_complex()):
        return True
    starts = range(0, flat.numel(), _PIECE)
    return all(_piece_is_finite(flat[start : start + _PIECE]) for start in starts)


def _piece_is_finite(piece: torch.Tensor) -> bool:
    try:
        lowest, highest = piece.aminmax()  # NaN if any is; a tenth of the time of isfinite
    except (RuntimeError, NotImplementedError):  # complex numbers, eight bits
        return bool(piece.isfinite().all())
    return bool(lowest.isfinite() and highest.isfinite())
