"""Everything that a plugin may import beside :mod:`llmload` and :mod:`llmload.hookspecs`.

**The promise.** What ``__all__`` of these three modules names is public, and nothing else of
llmload is. A public name keeps its meaning; a function may get further arguments that have a
default, an object further attributes. Nothing is removed or changes its meaning before a release
has warned of it. The built-in plugins are held to the same three modules, so that what they can do
any plugin can; what cannot be written with them is a fault of this page.

Nothing here is imported before it is used: ``import llmload.plugin`` imports no torch.

What every plugin speaks in, the same as in :mod:`llmload`:

- ``LoadContext``, ``LoadSpec``, ``Section``: one load, what is asked of it, and a part of that.
- ``Problem``, ``Note``, ``Decline``, ``Conflict``: what hooks find and plugins declare.
- ``LlmloadError`` and below it ``RequestError`` (``SpecError``, ``InvalidValueError``,
  ``PluginError``, ``CheckpointError``, ``PlanError``) for what the user can mend, and
  ``LoadFailedError`` (``AuditError``) for what failed on the way.

Values of a section:

- ``Regex``: a field that holds a regular expression, refused where it is none; ``replacements``:
  holds a mapping of them to replacements to what ``re.sub`` takes; ``patterns``: matching one
  within a budget of time, as it is somebody else's.
- ``Dtype``: a field that holds the name of a dtype to train in; ``AUTO_CLASSES``: the words of
  ``auto_class``, and what transformers and PEFT call each.
- ``Spelling``: what another tool calls a key, for ``Section.spellings``; ``switch``, ``words`` and
  ``listed`` turn its value into ours, ``DTYPE_WORDS`` are others' names of dtypes; ``Removal`` says
  that there is nothing to write, ``Keys`` that several keys are, ``Sentence`` what else to do.
- ``explain``: pydantic's error as problems, for a file of the plugin's own.
- ``nearest``: "Did you mean 'x'?"; ``closest``: the known words most like one.
- ``parse_yaml``: a YAML or JSON text, read as strictly as a spec, as plain data.

Files of a checkpoint:

- ``Checkpoint``, ``CheckpointFile``, ``TensorInfo``: names, dtypes, shapes and places of tensors,
  known before a weight is read. The hook ``open_checkpoint`` makes its own with
  ``Checkpoint.described``, of files that ``CheckpointFile.on_disk`` looks at or
  ``CheckpointFile.fetched`` gets from elsewhere. ``torch_dtype`` is the dtype that a header names,
  ``dtype_name`` what torch calls one. ``checkpoint_by_ranges`` describes weights on the hub of
  which only what is read is fetched.
- ``MappedCheckpoint``: the same files mapped, and tensors over their pages; ``Reading``: how their
  bytes come into memory.
- ``Proof``: what a loader read, and the digest of what it placed.
- ``UntrustedFolder``: configs and other small files of a folder, each read by strict rules;
  ``local_path`` and ``read_file``: a path that a spec names, and a small file there.
- ``hold_adapter``: a saved adapter's config held to what its weights bear;
  ``matching_within_budget``: PEFT's matching of names held to a budget of time;
  ``replicated_layers``: how many a ``layer_replication`` makes.
- ``unwrapped``: a key of a saved adapter without what wrappers put into it; ``WRAPPERS``: the
  rules that take it away; ``Renaming``: keys on their way to other names, by regular expressions.
- ``KeyRule``: how what a system did to keys is undone, in a plugin's ``key_rules``.
- ``main_file``: the file that another library wants to be pointed to.
- ``filesystem``: on what kind of file system a file lies, and whether other machines write to it.
- ``KeptFolders``: folders that are made once and kept, each under the key that ``key_of`` gives;
  ``usual_place`` is where they lie if nobody says otherwise.

Memory that a load takes:

- ``Forecast``: what the hook ``cost`` corrects and ``relieve`` tries things on; ``Weight`` is one
  parameter in it, ``Cost`` what a plugin takes beside them, ``PHASES`` when, ``Room`` what there
  is.
- ``Machine``: what a plan is made for, as ``ctx.machine`` has it.

Where and how a weight is stored:

- ``Placement``: what ``ctx.placement`` answers; ``Splitting``: one that keeps a part of each value.
- ``Target``, ``Source``, ``Part``: what it is asked, and one of its answers.
- ``Plain``: the placement where no plugin sets one.
- ``WORTH_MAPPING``: bytes from which on it pays to leave a part on the file's own pages.

Models:

- ``partitions``: sizes and values of whole and partitioned parameters alike, and of those that wrap
  other tensors; ``Span`` is the part of a parameter that one rank holds.
- ``Accounting``: how a checkpoint's keys fit a model, as ``ctx.accounting`` finds it out.
- ``AdapterSwitch``: turns off an adapter of the plugin's own, as ``ctx.adapter_switch``, so that a
  member of a group can be the model without it.
- ``probe``, ``ProbeResult``, ``RandomOp``: a forward pass without storage, and what came of it.

Loaders:

- ``track``: go through a long list, and show how far it is where transformers shows its loops.
- ``from_pretrained``: load as transformers does, and account for every key.
- ``account``: refuse a checkpoint that does not fit, and list what is missing and unexpected;
  ``MISSING`` is the reason that ``strict`` must excuse.
- ``installed_transformers``: what differs between versions of transformers behind one interface,
  ``Transformers``.
- ``default_dtype``: a context to build modules in.
- ``locate_files``, ``read_config``: of another model than the one that is loaded; ``cache_dir``:
  the hub cache of a spec, where transformers finds code of another repository.

What plugins declare:

- ``ABILITIES``: the words of ``provides``, and what each says.

Several processes of one load:

- ``rank``, ``world_size``: of the launcher that started this process, if one did.
- ``Rendezvous``: brings the ranks of a section's loads together, for the hooks of its plugin. What
  it is made of: ``Presence`` shows the other ranks that this one lives while it plans, and
  ``store_is_there`` that the ranks have a store that none has to wait for;
  ``connect`` waits for all ranks and makes the process group; ``tell`` says that one fails.
- ``Ranks``: they agree, go on together, or all stop with the name of the one that failed;
  ``request_of``: what they agree on.

Words and versions:

- ``size_text``: bytes in KiB, MiB or GiB; ``alike``: names that differ in their numbers, once.
- ``some``: the first few names, and how many more there are.
- ``in_one_line``: what another library's error says, for a message.
- ``version_of``: an installed distribution's version; ``installed_versions``: those of the stack.
- ``name_and_version``: of a distribution whose metadata is at hand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmload import leaving

if TYPE_CHECKING:
    from llmload.checkpoint import filesystem as filesystem
    from llmload.checkpoint.accounting import Accounting as Accounting
    from llmload.checkpoint.contents import Checkpoint as Checkpoint
    from llmload.checkpoint.contents import CheckpointFile as CheckpointFile
    from llmload.checkpoint.dtypes import torch_dtype as torch_dtype
    from llmload.checkpoint.folder import main_file as main_file
    from llmload.checkpoint.header import TensorInfo as TensorInfo
    from llmload.checkpoint.kept import KeptFolders as KeptFolders
    from llmload.checkpoint.kept import key_of as key_of
    from llmload.checkpoint.kept import usual_place as usual_place
    from llmload.checkpoint.mapped import MappedCheckpoint as MappedCheckpoint
    from llmload.checkpoint.placement import WORTH_MAPPING as WORTH_MAPPING
    from llmload.checkpoint.placement import Part as Part
    from llmload.checkpoint.placement import Placement as Placement
    from llmload.checkpoint.placement import Plain as Plain
    from llmload.checkpoint.placement import Source as Source
    from llmload.checkpoint.placement import Splitting as Splitting
    from llmload.checkpoint.placement import Target as Target
    from llmload.checkpoint.proof import Proof as Proof
    from llmload.checkpoint.reading import Reading as Reading
    from llmload.checkpoint.untrusted import UntrustedFolder as UntrustedFolder
    from llmload.checkpoint.untrusted import local_path as local_path
    from llmload.checkpoint.untrusted import read_file as read_file
    from llmload.context.context import LoadContext as LoadContext
    from llmload.context.forecast import PHASES as PHASES
    from llmload.context.forecast import Cost as Cost
    from llmload.context.forecast import Forecast as Forecast
    from llmload.context.forecast import Room as Room
    from llmload.context.forecast import Weight as Weight
    from llmload.context.machine import Machine as Machine
    from llmload.context.peers import ABILITIES as ABILITIES
    from llmload.context.switch import AdapterSwitch as AdapterSwitch
    from llmload.errors import AuditError as AuditError
    from llmload.errors import CheckpointError as CheckpointError
    from llmload.errors import Conflict as Conflict
    from llmload.errors import Decline as Decline
    from llmload.errors import LlmloadError as LlmloadError
    from llmload.errors import LoadFailedError as LoadFailedError
    from llmload.errors import Note as Note
    from llmload.errors import PlanError as PlanError
    from llmload.errors import PluginError as PluginError
    from llmload.errors import Problem as Problem
    from llmload.errors import RequestError as RequestError
    from llmload.errors import SpecError as SpecError
    from llmload.errors import in_one_line as in_one_line
    from llmload.errors import some as some
    from llmload.hf.adapters import hold_adapter as hold_adapter
    from llmload.hf.adapters import matching_within_budget as matching_within_budget
    from llmload.hf.adapters import replicated_layers as replicated_layers
    from llmload.hf.bars import track as track
    from llmload.hf.hub import cache_dir as cache_dir
    from llmload.hf.interface import Transformers as Transformers
    from llmload.hf.locating import locate as locate_files
    from llmload.hf.locating import read_config as read_config
    from llmload.hf.spans import checkpoint_by_ranges as checkpoint_by_ranges
    from llmload.hf.versions import installed_transformers as installed_transformers
    from llmload.host.distributions import installed_versions as installed_versions
    from llmload.host.distributions import name_and_version as name_and_version
    from llmload.host.distributions import version_of as version_of
    from llmload.loading.audit import MISSING as MISSING
    from llmload.loading.loaders import account as account
    from llmload.loading.loaders import from_pretrained as from_pretrained
    from llmload.model import partitions as partitions
    from llmload.model.dry_run import ProbeResult as ProbeResult
    from llmload.model.dry_run import probe as probe
    from llmload.model.partitions import Span as Span
    from llmload.model.randomness import RandomOp as RandomOp
    from llmload.model.torch_defaults import default_dtype as default_dtype
    from llmload.ranks.agreement import request_of as request_of
    from llmload.ranks.environment import rank as rank
    from llmload.ranks.environment import store_is_there as store_is_there
    from llmload.ranks.environment import world_size as world_size
    from llmload.ranks.launcher import connect as connect
    from llmload.ranks.launcher import tell as tell
    from llmload.ranks.meeting import Ranks as Ranks
    from llmload.ranks.presence import Presence as Presence
    from llmload.ranks.rendezvous import Rendezvous as Rendezvous
    from llmload.spec import patterns as patterns
    from llmload.spec.foreign_keys import DTYPE_WORDS as DTYPE_WORDS
    from llmload.spec.foreign_keys import Keys as Keys
    from llmload.spec.foreign_keys import Removal as Removal
    from llmload.spec.foreign_keys import Sentence as Sentence
    from llmload.spec.foreign_keys import Spelling as Spelling
    from llmload.spec.foreign_keys import listed as listed
    from llmload.spec.foreign_keys import switch as switch
    from llmload.spec.foreign_keys import words as words
    from llmload.spec.loadspec import LoadSpec as LoadSpec
    from llmload.spec.loadspec import Regex as Regex
    from llmload.spec.loadspec import Section as Section
    from llmload.spec.refusals import InvalidValueError as InvalidValueError
    from llmload.spec.refusals import explain as explain
    from llmload.spec.renaming import WRAPPERS as WRAPPERS
    from llmload.spec.renaming import KeyRule as KeyRule
    from llmload.spec.renaming import Renaming as Renaming
    from llmload.spec.renaming import unwrapped as unwrapped
    from llmload.spec.suggest import closest as closest
    from llmload.spec.suggest import nearest as nearest
    from llmload.spec.values import dtype_name as dtype_name
    from llmload.spec.values import replacements as replacements
    from llmload.spec.wording import alike as alike
    from llmload.spec.wording import size_text as size_text
    from llmload.spec.words import AUTO_CLASSES as AUTO_CLASSES
    from llmload.spec.words import Dtype as Dtype
    from llmload.spec.yaml_read import parse as parse_yaml

__all__ = [
    "ABILITIES",
    "AUTO_CLASSES",
    "DTYPE_WORDS",
    "MISSING",
    "PHASES",
    "WORTH_MAPPING",
    "WRAPPERS",
    "Accounting",
    "AdapterSwitch",
    "AuditError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFile",
    "Conflict",
    "Cost",
    "Decline",
    "Dtype",
    "Forecast",
    "InvalidValueError",
    "KeptFolders",
    "KeyRule",
    "Keys",
    "LlmloadError",
    "LoadContext",
    "LoadFailedError",
    "LoadSpec",
    "Machine",
    "MappedCheckpoint",
    "Note",
    "Part",
    "Placement",
    "Plain",
    "PlanError",
    "PluginError",
    "Presence",
    "ProbeResult",
    "Problem",
    "Proof",
    "RandomOp",
    "Ranks",
    "Reading",
    "Regex",
    "Removal",
    "Renaming",
    "Rendezvous",
    "RequestError",
    "Room",
    "Section",
    "Sentence",
    "Source",
    "Span",
    "SpecError",
    "Spelling",
    "Splitting",
    "Target",
    "TensorInfo",
    "Transformers",
    "UntrustedFolder",
    "Weight",
    "account",
    "alike",
    "cache_dir",
    "checkpoint_by_ranges",
    "closest",
    "connect",
    "default_dtype",
    "dtype_name",
    "explain",
    "filesystem",
    "from_pretrained",
    "hold_adapter",
    "in_one_line",
    "installed_transformers",
    "installed_versions",
    "key_of",
    "listed",
    "local_path",
    "locate_files",
    "main_file",
    "matching_within_budget",
    "name_and_version",
    "nearest",
    "parse_yaml",
    "partitions",
    "patterns",
    "probe",
    "rank",
    "read_config",
    "read_file",
    "replacements",
    "replicated_layers",
    "request_of",
    "size_text",
    "some",
    "store_is_there",
    "switch",
    "tell",
    "torch_dtype",
    "track",
    "unwrapped",
    "usual_place",
    "version_of",
    "words",
    "world_size",
]

_HOME = {
    "LoadContext": "context.context",
    **dict.fromkeys(
        (
            "AuditError",
            "CheckpointError",
            "Conflict",
            "Decline",
            "LlmloadError",
            "LoadFailedError",
            "Note",
            "PlanError",
            "PluginError",
            "Problem",
            "RequestError",
            "SpecError",
        ),
        "errors",
    ),
    **dict.fromkeys(("LoadSpec", "Section"), "spec.loadspec"),
    "InvalidValueError": "spec.refusals",
    "ABILITIES": "context.peers",
    **dict.fromkeys(("PHASES", "Cost", "Forecast", "Room", "Weight"), "context.forecast"),
    "Machine": "context.machine",
    "AdapterSwitch": "context.switch",
    "Accounting": "checkpoint.accounting",
    **dict.fromkeys(("Checkpoint", "CheckpointFile"), "checkpoint.contents"),
    **dict.fromkeys(("KeptFolders", "key_of", "usual_place"), "checkpoint.kept"),
    "MappedCheckpoint": "checkpoint.mapped",
    "Proof": "checkpoint.proof",
    "Reading": "checkpoint.reading",
    "TensorInfo": "checkpoint.header",
    **dict.fromkeys(("UntrustedFolder", "local_path", "read_file"), "checkpoint.untrusted"),
    **dict.fromkeys(("WRAPPERS", "KeyRule", "Renaming", "unwrapped"), "spec.renaming"),
    "replacements": "spec.values",
    "main_file": "checkpoint.folder",
    "dtype_name": "spec.values",
    "torch_dtype": "checkpoint.dtypes",
    **dict.fromkeys(
        ("WORTH_MAPPING", "Part", "Placement", "Plain", "Source", "Splitting", "Target"),
        "checkpoint.placement",
    ),
    **dict.fromkeys(("in_one_line", "some"), "errors"),
    **dict.fromkeys(("installed_versions", "name_and_version", "version_of"), "host.distributions"),
    **dict.fromkeys(("hold_adapter", "matching_within_budget", "replicated_layers"), "hf.adapters"),
    "Transformers": "hf.interface",
    "installed_transformers": "hf.versions",
    "default_dtype": "model.torch_defaults",
    "cache_dir": "hf.hub",
    "checkpoint_by_ranges": "hf.spans",
    "track": "hf.bars",
    **dict.fromkeys(("locate_files", "read_config"), "hf.locating"),
    "MISSING": "loading.audit",
    **dict.fromkeys(("account", "from_pretrained"), "loading.loaders"),
    **dict.fromkeys(("alike", "size_text"), "spec.wording"),
    "filesystem": "checkpoint.filesystem",
    "partitions": "model.partitions",
    "patterns": "spec.patterns",
    "Span": "model.partitions",
    **dict.fromkeys(("ProbeResult", "probe"), "model.dry_run"),
    "RandomOp": "model.randomness",
    "request_of": "ranks.agreement",
    **dict.fromkeys(("rank", "store_is_there", "world_size"), "ranks.environment"),
    **dict.fromkeys(("connect", "tell"), "ranks.launcher"),
    "Ranks": "ranks.meeting",
    "Presence": "ranks.presence",
    "Rendezvous": "ranks.rendezvous",
    **dict.fromkeys(
        ("DTYPE_WORDS", "Keys", "Removal", "Sentence", "Spelling", "listed", "switch", "words"),
        "spec.foreign_keys",
    ),
    "Regex": "spec.loadspec",
    **dict.fromkeys(("AUTO_CLASSES", "Dtype"), "spec.words"),
    "explain": "spec.refusals",
    **dict.fromkeys(("closest", "nearest"), "spec.suggest"),
    "parse_yaml": "spec.yaml_read",
}
"""Name -> the module that it is fetched from on first use."""
_MODULES = ("filesystem", "partitions", "patterns")
_THERE = {"locate_files": "locate", "parse_yaml": "parse"}
"""Name -> what it is called there, where that differs."""


if not TYPE_CHECKING:  # a name that is not there is for mypy to find

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise leaving.lacking(__name__, name)
        home = importlib.import_module(f"llmload.{_HOME[name]}")
        value = home if name in _MODULES else getattr(home, _THERE.get(name, name))
        if not leaving.warn(f"{__name__}.{name}"):  # else it warns everybody who asks
            globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
