"""What the tests of a plugin need: real tiny models, contexts, ranks, and a suite that holds it to
the contract.

The whole test of a plugin can be::

    from llmload.testing import assert_plugin
    from my_package.plugin import MyPlugin

    def test_the_plugin_keeps_the_contract():
        assert_plugin(MyPlugin)

Importing this package imports neither torch nor pytest; every name is fetched on first use. Its
fixtures (:mod:`llmload.testing.pytest_plugin`) are there in every run of pytest where llmload is
installed. It is used by llmload's own tests, and as stable as the hooks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmload import leaving

if TYPE_CHECKING:
    from llmload.testing.checkpoints import IDS as IDS
    from llmload.testing.checkpoints import SENTENCES as SENTENCES
    from llmload.testing.checkpoints import edit_config as edit_config
    from llmload.testing.checkpoints import losses as losses
    from llmload.testing.checkpoints import save_checkpoint as save_checkpoint
    from llmload.testing.checkpoints import tiny_checkpoint as tiny_checkpoint
    from llmload.testing.checkpoints import tiny_llama as tiny_llama
    from llmload.testing.checkpoints import tiny_model as tiny_model
    from llmload.testing.checkpoints import tiny_tokenizer as tiny_tokenizer
    from llmload.testing.conformance import RULES as RULES
    from llmload.testing.conformance import Finding as Finding
    from llmload.testing.conformance import assert_plugin as assert_plugin
    from llmload.testing.conformance import findings as findings
    from llmload.testing.contexts import context_of as context_of
    from llmload.testing.distributions import FakeDistributions as FakeDistributions
    from llmload.testing.distributions import fake_distributions as fake_distributions
    from llmload.testing.leftovers import changes as changes
    from llmload.testing.leftovers import nothing_left_behind as nothing_left_behind
    from llmload.testing.leftovers import snapshot as snapshot
    from llmload.testing.models import example_spec as example_spec
    from llmload.testing.models import hold_frozen as hold_frozen
    from llmload.testing.models import parameters as parameters
    from llmload.testing.models import same as same
    from llmload.testing.models import trainable as trainable
    from llmload.testing.ranks import RanksFailedError as RanksFailedError
    from llmload.testing.ranks import run_on_ranks as run_on_ranks
    from llmload.testing.shrinking import VOCABULARY as VOCABULARY
    from llmload.testing.shrinking import tiny_config as tiny_config

_HOME = {
    **dict.fromkeys(
        (
            "IDS",
            "SENTENCES",
            "edit_config",
            "losses",
            "save_checkpoint",
            "tiny_checkpoint",
            "tiny_llama",
            "tiny_model",
            "tiny_tokenizer",
        ),
        "checkpoints",
    ),
    **dict.fromkeys(("RULES", "Finding", "assert_plugin", "findings"), "conformance"),
    "context_of": "contexts",
    **dict.fromkeys(("FakeDistributions", "fake_distributions"), "distributions"),
    **dict.fromkeys(("changes", "nothing_left_behind", "snapshot"), "leftovers"),
    **dict.fromkeys(("example_spec", "hold_frozen", "parameters", "same", "trainable"), "models"),
    **dict.fromkeys(("RanksFailedError", "run_on_ranks"), "ranks"),
    **dict.fromkeys(("VOCABULARY", "tiny_config"), "shrinking"),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise leaving.lacking(__name__, name)
    value = getattr(importlib.import_module(f"llmload.testing.{_HOME[name]}"), name)
    if not leaving.warn(f"{__name__}.{name}"):  # else it warns everybody who asks
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
