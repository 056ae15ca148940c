"""What is kept for later loads: listed, and cleared."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from llmload.checkpoint.kept import KeptFolder, KeptFolders, usual_place
from llmload.errors import RequestError
from llmload.spec.suggest import nearest

ACTIONS = ("list", "clear")


class Kept(BaseModel):
    """Answer of the command ``cache``."""

    place: str
    """Where folders are kept."""
    folders: list[KeptFolder]
    """Those that are there, or that were removed; the last used first."""
    size: int
    """Bytes of all of them."""
    removed: bool
    """Whether they are gone now."""


def answer(action: str, keys: list[str], folder: Path | None) -> Kept:
    """List or clear what is kept.

    :raises RequestError: the action is none, or nothing is kept under a key.
    """
    if action not in ACTIONS:
        raise RequestError(
            f"the action {action!r} is none",
            fix=nearest(action, ACTIONS) or "Write `llmload cache list` or `llmload cache clear`.",
        )
    if action == "list" and keys:
        raise RequestError("`list` takes no keys", fix="Leave them out.")
    place = KeptFolders(folder or usual_place())
    found = place.clear(keys) if action == "clear" else place.entries()
    return Kept(
        place=str(place.place),
        folders=found,
        size=sum(each.size for each in found),
        removed=action == "clear",
    )
