"""The spec key ``object_store``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

import llmload


class ObjectStoreSection(llmload.Section):
    """Weights that are fetched from an object store as they are placed, and never lie on a disk."""

    url: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.+", examples=["s3://bucket/model"])]
    """The folder there, with `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Any address that fsspec knows: `s3://`, `gs://`, `https://`, `file://`.
    """
    options: dict[str, Any] = Field(default_factory=dict)
    """For fsspec's file system of that kind, such as `{anon: true}`.

    Keys and passwords belong where its library looks for them, not into a spec.
    """
