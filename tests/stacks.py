"""Which of the two stacks is installed, and marks for tests that need something of one of them.

A test may be skipped on one stack, never on both: ``tests/skipped_everywhere.py`` sees to that.
"""

from __future__ import annotations

import pytest
import torch
from transformers import __version__

IS_MODERN = int(__version__.partition(".")[0]) >= 5

needs_transformers_5 = pytest.mark.skipif(not IS_MODERN, reason="came with transformers 5")

NO_BITSANDBYTES = (
    ""
    if IS_MODERN or torch.cuda.is_available()
    else "transformers 4.51 refuses bitsandbytes on CPU"
)
"""Why nothing can be quantised here; empty where it can."""

needs_bitsandbytes = pytest.mark.skipif(bool(NO_BITSANDBYTES), reason=NO_BITSANDBYTES)

needs_kernel_handover = pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="torch before 2.9 hands over no kernel"
)

OPENS_PICKLES = hasattr(torch, "accelerator")
needs_safe_pickles = pytest.mark.skipif(
    not OPENS_PICKLES, reason="torch 2.5 opens no pickle safely"
)

needs_python_devices = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch before 2.10 has no devices that are made in Python",
)
