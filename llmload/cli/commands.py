"""The command line. Standard output is data, standard error is for people.

Exit codes: 0 done, 1 failed, 2 the request is wrong. Every command is a function that returns an
:class:`Answer`; what is common to all (JSON or text, errors, exit codes) is in ``_command``.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json as json_module
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from llmload.cli.streams import greetings_unsaid, temporary_folder_told, written_or_told
from llmload.errors import LlmloadError, RequestError, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmload.host.registry import Registry
    from llmload.loading.prepared import Prepared
    from llmload.spec.groupspec import GroupSpec
    from llmload.spec.loadspec import LoadSpec


class Answer(NamedTuple):
    """What a command found out."""

    data: BaseModel | dict[str, Any]
    """For ``--json``."""
    text: Callable[[], RenderableType]
    """Makes the same for people."""
    exit_code: int = 0


app = typer.Typer(
    name="llmload",
    help="Load a language model as a spec says, with a plan before and a proof after.",
    epilog="Exit codes: 0 done, 1 failed, 2 the request is wrong.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A YAML or JSON file, `-` for standard input, or a model: its folder or hub id.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A value, as YAML, in place of what the spec says: `lora.r=8`. Repeatable.",
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        "-p",
        metavar="NAME",
        help="Use a plugin, by name or as module:attribute; `no:NAME` leaves one out. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say nothing but the answer, and errors.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done, as it is done.")]


def _command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a function a command: write its answer, or its error without a traceback."""

    @wraps(function)
    def run(*, json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
        level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
        try:
            # Some libraries greet on standard output when they are imported.
            told = _said_on_standard_error(level)
            unsaid = nullcontext() if verbose else greetings_unsaid()
            with redirect_stdout(sys.stderr), told, unsaid, temporary_folder_told():
                answer = function(json=json, **arguments)
        except LlmloadError as error:
            if json:
                problems = [problem.model_dump(exclude_defaults=True) for problem in error.problems]
                _write_json({"error": type(error).__name__, "problems": problems})
            typer.secho(str(error), err=True, fg="red")
            raise typer.Exit(error.exit_code) from None
        except Exception as error:  # a fault of llmload's: with its traceback
            if json:
                message = f"{type(error).__name__}: {error}"
                _write_json({"error": type(error).__name__, "problems": [{"message": message}]})
            raise
        with written_or_told():
            if json:
                _write_json(answer.data)
            else:
                _write_text(answer.text())
        raise typer.Exit(answer.exit_code)

    _take_options(run, {"quiet": Quiet, "verbose": Verbose})
    # Of a docstring click would cut the first sentence, in the list of commands.
    summary = (function.__doc__ or "").partition("\n\n")[0]
    return app.command(cls=_Command, short_help=" ".join(summary.split()))(run)


class _Command(TyperCommand):
    """Says to whoever takes a key of a spec for an option how it is set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's, which typer may have as a copy of its own
            said: Any = error
            name = getattr(error, "option_name", "KEY").removeprefix("--")
            amiss = hasattr(error, "option_name") or "extra argument" in str(error)
            if amiss and any("--set" in option.opts for option in self.params):
                said.message += f". Keys of a spec are set by `--set {name}=VALUE`."
            raise


def _take_options(command: Callable[..., None], options: dict[str, Any]) -> None:
    """Let a command take further switches, which its function does not see."""
    taken = signature(command, eval_str=True)
    switches = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in options.items()
    ]
    found: Any = command
    found.__signature__ = taken.replace(parameters=[*taken.parameters.values(), *switches])
    found.__annotations__ = {**command.__annotations__, **options}


class _ToPeople(logging.Handler):
    """Writes what llmload logs to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        colour = "yellow" if record.levelno >= logging.WARNING else None
        said = f"{record.levelname.lower()}: {visible(record.getMessage())}"
        typer.secho(said, err=True, fg=colour)


@contextmanager
def _said_on_standard_error(level: int) -> Iterator[None]:
    """Show what is logged from a level on. Progress is shown where warnings are."""
    logger, handler = logging.getLogger("llmload"), _ToPeople()
    before, propagated = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagated


def _write_json(data: BaseModel | dict[str, Any]) -> None:
    if isinstance(data, BaseModel):
        typer.echo(data.model_dump_json(indent=2))
    else:
        typer.echo(json_module.dumps(data, indent=2, ensure_ascii=False))


def _write_text(text: RenderableType) -> None:
    if isinstance(text, str):
        typer.echo(visible(text))
    else:
        from rich.console import Console

        from llmload.loading.printed import Visible

        # Names that a folder holds are no markup.
        Console(highlight=False, markup=False, emoji=False).print(Visible(text))


@_command
def load(
    *,
    spec: Spec,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page of it too, and JSON beside that."
        ),
    ] = None,
    settings: Settings = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Load the model of a spec, or all of a group, prove that it is right, and report."""
    from llmload.cli import reporting, show
    from llmload.cli.progress import is_wanted, progress
    from llmload.group import loading
    from llmload.loading import pipeline, printed
    from llmload.spec.groupspec import GroupSpec

    reporting.require(page)
    registry = _registry(plugin)
    wanted = _wanted(spec, settings, registry)
    with progress(shown=is_wanted(json=json)):
        if isinstance(wanted, GroupSpec):
            group = loading.load_group(wanted, registry=registry)
            report = group.report
            reporting.write(page, group)
            return Answer(report, lambda: show.group_report(report))
        result = pipeline.load(wanted, registry=registry)
    reporting.write(page, {"": result})
    return Answer(result.report, lambda: printed.report(result.report))


@_command
def plan(
    *,
    spec: Spec,
    settings: Settings = None,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Plan for so many processes, wherever they run."),
    ] = None,
    ranks_per_host: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many share a host's memory; by default at most 8."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of each host they run on, such as 512GB."),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of each one's accelerator, such as 80GB."),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="For the training's memory: transformers' `optim`, or `none`."
        ),
    ] = "adamw_torch_fused",
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Say what `load` would do and take, and what stands in its way, reading no weight."""
    from llmload.cli import show
    from llmload.cli.progress import is_wanted, progress
    from llmload.context.machine import Machine
    from llmload.group import loading
    from llmload.loading import pipeline, printed
    from llmload.spec.groupspec import GroupSpec

    machine = Machine(
        ranks=ranks,
        ranks_per_host=ranks_per_host,
        host_memory=host_memory,
        device_memory=device_memory,
        optimizer=optimizer,
    )
    registry = _registry(plugin)
    wanted = _wanted(spec, settings, registry)
    with progress(shown=is_wanted(json=json)):
        if isinstance(wanted, GroupSpec):
            plans = loading.plan_group(wanted, registry=registry, machine=machine)
            code = RequestError.exit_code if plans.errors else 0
            return Answer(plans, lambda: show.group_plan(plans), code)
        made = pipeline.plan(wanted, registry=registry, machine=machine)
    return Answer(made, lambda: printed.plan(made), RequestError.exit_code if made.errors else 0)


@_command
def save(
    *,
    spec: Spec,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new or an empty folder.")],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of one file of weights, such as 500MB.")
    ] = "5GB",
    settings: Settings = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Load the model of a spec and save it: an adapter, or with `lora.merge` the merged model.

    The folder has safetensors, tokenizer, chat template, generation config and a model card to go
    on from, and loads in plain transformers or PEFT. It is there whole, or not at all.
    """
    from llmload.cli import show
    from llmload.cli.progress import is_wanted, progress
    from llmload.saving import writing
    from llmload.saving.save import save as write

    writing.require_new(to)
    registry = _registry(plugin)
    wanted = _one_model(spec, settings, registry)
    with progress(shown=is_wanted(json=json)):
        saved = write(wanted, to, max_shard_size=max_shard_size, registry=registry)
    return Answer(saved, lambda: show.saved(saved))


@_command
def inspect(
    *,
    spec: Spec,
    every: Annotated[bool, typer.Option("--all", help="A line for each tensor.")] = False,
    settings: Settings = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """List what lies in the folder of a model: files and tensors, by their headers."""
    from llmload.cli import inspecting, show

    registry = _registry(plugin)
    found = inspecting.inspect(_one_model(spec, settings, registry), registry)
    return Answer(found, lambda: show.inspection(found, every=every))


@_command
def targets(
    *, spec: Spec, settings: Settings = None, plugin: Plugins = None, json: Json = False
) -> Answer:
    """List the modules of a model, and which of them the spec's `lora` would take."""
    from llmload.cli import inspecting, show

    registry = _registry(plugin)
    found = inspecting.targets(_one_model(spec, settings, registry), registry)
    return Answer(found, lambda: show.targets(found))


@_command
def validate(
    *, spec: Spec, settings: Settings = None, plugin: Plugins = None, json: Json = False
) -> Answer:
    """Check a spec by itself, without looking at its models."""
    from llmload.spec import files

    checked = _wanted(spec, settings, _registry(plugin))
    data = {"valid": True, "spec": files.read(checked).data}
    name = "<stdin>" if spec == "-" else spec
    return Answer(data, lambda: f"{name}: valid")


@_command
def convert(
    *,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="YAML or JSON; `-` for standard input.")
    ],
    tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TOOL",
            help="Whose it is: axolotl, llama-factory or trl; by default told by its keys.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Write the spec there, not to standard output."),
    ] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Write a config of axolotl, LLaMA-Factory or TRL as a spec, and name what it leaves out.

    What is left out, and why, is said on standard error, unless `-q` is given. The spec is checked;
    look at it with `plan`.
    """
    from llmload.cli import converting
    from llmload.cli.progress import is_quiet

    made = converting.convert(file, tool, _registry(plugin))
    text = converting.spec_text(made, file)
    if to is not None:
        converting.write(text, to)
    if not (json or is_quiet()):
        typer.echo(visible(converting.explained(made, to)), err=True)
    return Answer(made, lambda: text if to is None else str(to))


@_command
def lock(
    *,
    spec: Spec,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path(
        "llmload.lock"
    ),
    settings: Settings = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Write down what a load of the spec opens: size and SHA-256 of every file, and its plugins.

    Set `lock: FILE` in the spec, and a load that differs in anything is refused.
    """
    from llmload.cli.progress import is_wanted, progress
    from llmload.loading import lock as locking
    from llmload.saving.writing import refused, require_place

    registry = _registry(plugin)
    wanted = _one_model(spec, settings, registry)
    require_place(output)
    with progress(shown=is_wanted(json=json)):
        made = locking.make(_prepared(wanted, registry))
    with refused(output):
        locking.write(made, output)
    size = sum(file.size for file in made.files.values())
    return Answer(made, lambda: f"{output}: {len(made.files)} files, {size:,} bytes")


@_command
def verify(
    *,
    spec: Spec,
    lock: Annotated[
        str | None, typer.Option("--lock", help="Lock file; by default the spec's `lock`.")
    ] = None,
    settings: Settings = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Hold every byte that a load of the spec would read to a lock file, without loading.

    Exit code 1 where anything differs.
    """
    from llmload.cli.progress import is_wanted, progress
    from llmload.loading import lock as locking

    registry = _registry(plugin)
    wanted = _one_model(spec, settings, registry)
    path = lock or wanted.lock
    if path is None:
        raise RequestError(
            "there is no lock to verify: the spec has no `lock`, and `--lock` was not given",
            fix="Make one with `llmload lock`.",
        )
    locked = locking.read(path)
    with progress(shown=is_wanted(json=json)):
        prepared = _prepared(wanted, registry)
        found = [*locking.differences(locked, prepared), *locking.wrong_weights(locked, prepared)]
    data = {"lock": path, "files": len(locked.files), "differences": found}
    text = "\n".join(found) or f"{path}: all {len(locked.files)} files are as locked"
    return Answer(data, lambda: text, LlmloadError.exit_code if found else 0)


@_command
def plugins(
    *,
    hooks: Annotated[
        str | None,
        typer.Option(
            "--hooks",
            metavar="NAME",
            help="Say instead who implements a hook, or what a plugin implements, and where.",
        ),
    ] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """List the plugins: built in, installed, left out, broken."""
    from llmload.cli import environment, show

    registry = _registry(plugin)
    if hooks is not None:
        found = environment.list_hooks(registry, hooks)
        return Answer(found, lambda: show.hooks(found))
    listed = environment.list_plugins(registry)
    return Answer(listed, lambda: show.plugins(listed))


@_command
def cache(
    *,
    action: Annotated[str, typer.Argument(metavar="list|clear", help="What to do.")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="What to clear; by default all."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="As `kbit.cache.folder`; by default the usual."),
    ] = None,
    json: Json = False,
) -> Answer:
    """List or clear the quantised weights that `kbit.cache` keeps."""
    from llmload.cli import keeping, show

    found = keeping.answer(action, keys or [], directory)
    return Answer(found, lambda: show.kept(found))


@_command
def compat(
    *,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY", help="Sections or keys of a spec; by default all."),
    ] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Say what cannot be combined, and why, and how far sections work on the tested versions.

    A plan refuses by the same list. Pairs that are not in it go together.
    """
    from llmload.cli import environment, show

    found = environment.compatibility(_registry(plugin), names or ())
    return Answer(found, lambda: show.compatibility(found))


@_command
def doctor(
    *,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Plugins; by default all.")
    ] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Try out the plugins: what works here, what does not, and how to get the rest.

    Exit code 1 where a plugin that is named does not work, or where any is broken.
    """
    from llmload.cli import doctor as examination
    from llmload.cli import show

    found = examination.examine(_registry(plugin), names or ())
    exit_code = 0 if found.healthy(names or ()) else LlmloadError.exit_code
    return Answer(found, lambda: show.diagnoses(found), exit_code)


@_command
def env(*, plugin: Plugins = None, json: Json = False) -> Answer:
    """Describe versions, machine and plugins, to paste into a bug report."""
    from llmload.cli import environment, show

    described = environment.describe(_registry(plugin))
    return Answer(described, lambda: show.environment(described))


@_command
def schema(*, plugin: Plugins = None, json: Json = False) -> Answer:
    """Write the JSON schema of a spec or group, sections of the plugins included."""
    from llmload.spec.schema import file_schema

    registry = _registry(plugin)
    document = file_schema(registry.sections, registry.key_rules)
    return Answer(document, lambda: json_module.dumps(document, indent=2, ensure_ascii=False))


@_command
def explain(
    *,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Such as `lora` or `lora.r`; by default all.")
    ] = "",
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Say what a key of a spec takes, its default and what it does."""
    from llmload.cli import explaining, show

    found = explaining.explain(key, _registry(plugin))
    return Answer(found, lambda: show.explanation(found))


@_command
def new_plugin(
    *,
    name: Annotated[str, typer.Argument(help="Of the plugin: its key in a spec.")],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="The new folder; by default llmload-NAME."),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="`model` changes the loaded model, `lora-layer` adapts modules that PEFT does not"
            " know, `loader` fills the model.",
        ),
    ] = "model",
    json: Json = False,
) -> Answer:
    """Write the package of a new plugin, with tests that pass, to be changed."""
    from llmload.cli import new_plugin as writing

    written = writing.write(name, directory, kind, _registry(None))
    files = list(written)
    return Answer({"files": files}, lambda: "\n".join(files))


@_command
def demo(
    *,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="A new folder for model and spec.")
    ] = Path("demo"),
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Training steps of the small model.")
    ] = 200,
    plugin: Plugins = None,
    json: Json = False,
) -> Answer:
    """Make a small model, load it with an adapter, and fine-tune that. Offline, about a minute.

    On a slow machine it does the same and takes longer. Model and spec stay in `demo`.
    """
    from llmload.cli import demo as demonstration
    from llmload.cli import show
    from llmload.cli.progress import is_quiet, is_wanted, progress, tell
    from llmload.saving.writing import new_folder

    registry = _registry(plugin)
    demonstration.require_new(directory)
    with new_folder(directory, room=demonstration.ROOM):
        promised = f"About a minute on two cores; model and spec will be in {directory}."
        if not is_quiet():
            typer.echo(promised, err=True)
        shown_as_bars = is_wanted(json=json)
        with progress(shown=shown_as_bars) as track:
            track = track if shown_as_bars or is_quiet() else tell
            shown = demonstration.run(directory, steps=steps, registry=registry, track=track)
    exit_code = 0 if shown.fine_tuning.loss_fell else LlmloadError.exit_code
    return Answer(shown, lambda: show.demonstration(shown), exit_code)


def _show_version(asked: bool) -> None:
    if asked:
        from llmload.host.distributions import version_of

        typer.echo(version_of("llmload"))
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Stand for the options that precede a command."""


def _registry(words: list[str] | None) -> Registry:
    from llmload.host.registry import create_registry

    return create_registry(select=words or ())


def _wanted(spec: str, settings: list[str] | None, registry: Registry) -> LoadSpec | GroupSpec:
    from llmload.cli import request

    return request.wanted(spec, settings or (), registry)


def _one_model(spec: str, settings: list[str] | None, registry: Registry) -> LoadSpec:
    from llmload.spec.groupspec import GroupSpec

    wanted = _wanted(spec, settings, registry)
    if isinstance(wanted, GroupSpec):
        raise RequestError(
            f"{spec!r} is a group of models, and this command takes one",
            fix="Give each member in a spec of its own; a lock is named in the member's `lock`.",
        )
    return wanted


def _prepared(wanted: LoadSpec, registry: Registry) -> Prepared:
    """Plan a load without holding it to a lock; raise what stands in its way."""
    from llmload.loading.planning import prepare_to_load

    prepared = prepare_to_load(wanted.model_copy(update={"lock": None}), registry)
    prepared.plan.raise_for_errors()
    return prepared
