"""The plugin ``signed_only``: no folder is read unless one of the trusted keys has signed it.

It has no section: whoever runs the machine decides, and no spec can leave it out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import llmload

KEYS = "LLMLOAD_TRUSTED_KEYS"
"""The environment variable with the folder of public keys, each a file ``NAME.pem``. Without it
everything is read."""
SIGNATURE = "model.sig"
"""The signature, in the model folder, in the OpenSSF's format for models."""


class SignedOnly:
    """Refuses what nobody signed, before any file of it is opened."""

    name = "signed_only"
    requires = ("model-signing>=1.1",)
    rehearsed = False

    @llmload.hookimpl
    def admit(self, spec: llmload.LoadSpec, folder: Path) -> Iterator[llmload.Problem]:
        """Hold every byte of the folder to its signature."""
        place = os.environ.get(KEYS)
        if place is None:
            return
        keys = sorted(Path(place).expanduser().glob("*.pem"))
        if not keys:
            yield llmload.Problem(
                message=f"{KEYS} names {place!r}, which holds no file *.pem",
                fix="Put the public keys of those who may sign models there, or unset it.",
            )
        elif not (folder / SIGNATURE).is_file():
            yield llmload.Problem(
                where="model",
                message=f"the folder {str(folder)!r} holds no {SIGNATURE}, and only signed models"
                " are loaded here",
                fix="Have it signed by one of those whose keys are trusted: "
                f"{', '.join(key.stem for key in keys)}.",
            )
        elif why := _unsigned(folder, keys):
            yield llmload.Problem(
                where="model",
                message=f"the folder {str(folder)!r} is not what a trusted key has signed: {why}",
                fix="Fetch it again from whoever signed it.",
            )

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note | llmload.Problem]:
        """Say so in the plan, and refuse weights that the signature does not cover."""
        if KEYS not in os.environ:
            return
        yield llmload.Note(text=f"signed: {SIGNATURE} covers every file of the folder")
        root, files = ctx.folder.resolve(), ctx.checkpoint.files if ctx.checkpoint else ()
        # A snapshot of the hub has links to files beside it, which were hashed through them.
        linked = {file.resolve() for file in root.iterdir()}
        elsewhere = [
            file.name
            for file in files
            if not (file.path.is_relative_to(root) or file.path in linked)
        ]
        if elsewhere:
            yield llmload.Problem(
                where="model",
                message=f"{', '.join(elsewhere)} with weights lies outside of the signed folder",
                fix="Load a signed folder with its own weights.",
            )


def _unsigned(folder: Path, keys: list[Path]) -> str:
    """Return why no key has signed the folder; nothing where one has."""
    from model_signing import verifying

    reasons = []
    for key in keys:
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key)
            config.verify(folder, folder / SIGNATURE)
        except Exception as error:  # of many kinds: for files, keys and signatures
            reasons.append(f"{key.stem}: {' '.join(str(error).split()) or type(error).__name__}")
        else:
            return ""
    return "; ".join(reasons)
