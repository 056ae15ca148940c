"""Hooks of mkdocs that make the pages' generated parts from the code, when the site is built.

A page asks for a part with a comment of its own line, which shows nothing elsewhere::

    <!-- generated: section lora -->

Parts: ``section KEY``, ``spec``, ``hooks``, ``public MODULE``, ``commands``, ``spellings TOOL``,
``messages``, ``compatibility``, ``stacks``, ``versions``, ``libraries``. In a fenced block the line
``# file: NAME`` stands for a file of the repository.
What is public is read from the source without importing it, so that no ML library is needed. Links
of a page that lead out of ``docs/`` lead, in the site, to a page made of that file or to the file
itself. The site also gets ``llms.txt``, a list of its pages, and ``llms-full.txt``, their text.
"""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
PAGES: Final = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/equality.md": "equality.md",
    "benchmarks/results/simulated.md": "simulated.md",
    "benchmarks/results/memory.md": "memory-measured.md",
    "examples/README.md": "examples.md",
    "examples/plugins/README.md": "example-plugins.md",
    "plugins/llmload-fsdp/README.md": "llmload-fsdp.md",
    "plugins/llmload-rlhf/README.md": "llmload-rlhf.md",
}
"""Files outside ``docs/`` that are pages of the site -> where."""
_PART: Final = re.compile(r"^<!-- generated: (\w+) ?(.*?) -->$", re.MULTILINE)
_FILE: Final = re.compile(r"^# file: (\S+)\n", re.MULTILINE)
_LINK: Final = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")
_written: dict[str, str] = {}


# --- what mkdocs calls ------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of files elsewhere."""
    from mkdocs.structure.files import File

    _written.clear()
    for source, place in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the generated parts, and let links lead to where the site has their files."""
    from mkdocs.structure.files import File

    place = page.file.src_uri
    source = {new: old for old, new in PAGES.items()}.get(place, f"docs/{place}")
    linked: set[str] = set()
    text = with_links_of_the_site(with_parts(markdown), source, place, linked)
    for path in sorted(linked):
        uri = f"source/{path}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    _written[place] = text
    return text


def on_post_build(config: Any) -> None:
    """Write the list of pages and their whole text, for agents that read no HTML."""
    site = Path(config["site_dir"])
    pages = {place: _titled(text) for place, text in sorted(_written.items())}
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", "", "## Pages", ""]
    for place, (title, first) in pages.items():
        lines.append(f"- [{title}]({_address(place)}): {first}")
    (site / "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    whole = "\n\n".join(_written[place] for place in pages)
    (site / "llms-full.txt").write_text(whole, encoding="utf-8")


def _titled(text: str) -> tuple[str, str]:
    """Return a page's title and its first sentence."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    title = re.search(r"^# (.+)$", prose, re.MULTILINE)
    blocks = [
        block for block in re.split(r"\n{2,}", prose) if not re.match(r"[#<|-]|    |$", block)
    ]
    first = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(blocks[0].split())) if blocks else ""
    return (title[1] if title else ""), re.split(r"(?<=\.) ", first)[0]


def _address(place: str) -> str:
    return re.sub(r"(^|/)index\.md$|\.md$", "/", place).removeprefix("/")


def with_links_of_the_site(markdown: str, source: str, place: str, linked: set[str]) -> str:
    """Turn the links of the repository's file ``source`` into those of the site's page ``place``.

    :param linked: gets the files that the site is to hold as they are.
    """

    def turned(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path == "README.md":
            new = "index.md"
        elif path in PAGES:
            new = PAGES[path]
        elif path.startswith("docs/") and not path.endswith(".py"):
            new = path.removeprefix("docs/")
        elif (ROOT / path).is_file() and not path.endswith(".md"):
            linked.add(path)
            new = f"source/{path}"
        else:
            return words  # a folder: the site shows none
        return f"[{words}]({posixpath.relpath(new, posixpath.dirname(place) or '.')}{anchor})"

    return _outside_of_fences(markdown, lambda text: _LINK.sub(turned, text))


def _outside_of_fences(markdown: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


# --- the generated parts ----------------------------------------------------------------------


def with_parts(markdown: str) -> str:
    """Put each generated part, and each file, in the place of the comment that asks for it."""
    made = _PART.sub(lambda match: _part(match[1], match[2]).strip("\n"), markdown)
    return _FILE.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), made)


def _part(kind: str, name: str) -> str:
    makers: dict[str, Callable[[str], str]] = {
        "section": section,
        "spec": spec,
        "hooks": hooks,
        "public": public,
        "commands": commands,
        "messages": messages,
        "compatibility": compatibility,
        "stacks": stacks,
        "versions": versions,
        "libraries": libraries,
        "spellings": spellings,
    }
    return makers[kind](name)


def section(key: str) -> str:
    """Describe a plugin: what it needs, what it cannot be combined with, and the fields."""
    registry = _registry()
    plugin: Any = next(info.plugin for info in registry.plugins if info.name == key)
    lines = []
    if needs := getattr(plugin, "requires", ()):
        lines.append(f"Needs {', '.join(f'`{need}`' for need in needs)}.")
    if stage := getattr(plugin, "stage", ""):
        lines.append(f"Acts at the stage `{stage}`.")
    lines.append("")
    for conflict in getattr(plugin, "conflicts", ()):
        sometimes = "" if conflict.when is None else " (some values)"
        other = f"`{conflict.key}`" if conflict.key else f"a plugin for {conflict.ability}"
        lines.append(f"- Not with {other}{sometimes}: {conflict.reason}. {conflict.fix}")
    if key in registry.sections:
        document = _schema()
        name = registry.sections[key].__name__
        lines += ["", document["$defs"][name].get("description", ""), "", *_tables(document, name)]
    return "\n".join(lines)


def spec(_: str = "") -> str:
    """Describe the core keys."""
    return "\n".join(_tables(_schema(), "LoadSpec", plain_only=True))


@cache
def _registry() -> Any:
    from llmload import create_registry

    return create_registry()


@cache
def _schema() -> dict[str, Any]:
    from llmload.spec.schema import file_schema

    return file_schema(_registry().sections)


def _tables(document: dict[str, Any], name: str, *, plain_only: bool = False) -> Iterator[str]:
    """Describe an object's fields, then those of the objects in them."""
    from llmload.spec.loadspec import LoadSpec
    from llmload.spec.schema import keys

    definitions = document["$defs"]
    fields = definitions[name].get("properties", {})
    if plain_only:
        fields = {key: field for key, field in fields.items() if key in LoadSpec.model_fields}
    if not fields:
        yield "No fields: `{}` is all there is to write."
        return
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    for key in keys({**definitions[name], "properties": fields}):
        default = key.default if key.default == "required" else f"`{key.default}`"
        row = (f"`{key.name}`", key.takes, default, key.meaning)
        yield "| " + " | ".join(map(_cell, row)) + " |"
    for inner in sorted(set(re.findall(r"#/\$defs/(\w+)", json.dumps(list(fields.values()))))):
        yield f"\n`{inner}`: {_prose(definitions[inner].get('description', ''))}\n"
        yield from _tables(document, inner)


def _cell(text: str) -> str:
    return _prose(" ".join(text.split())).replace("|", "\\|")


def hooks(_: str = "") -> str:
    """Write out the manual: every hook with its arguments, its text and its example."""
    tree = ast.parse((ROOT / "llmload" / "hookspecs.py").read_text(encoding="utf-8"))
    parts = [_markdown(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _is_hook(node):
            parts.append(_described(node, 2))
    return "\n\n".join(parts)


def _is_hook(node: ast.FunctionDef) -> bool:
    return any("hookspec" in ast.unparse(decorator) for decorator in node.decorator_list)


def public(module: str) -> str:
    """Write out what a module exports, by name."""
    file = _file_of(module)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = [_markdown(ast.get_docstring(tree) or "")]
    for name, (home, original) in sorted(_exports(tree).items()):
        parts.append(_export(name, home, original))
    return "\n\n".join(parts)


def _exports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return public name -> module and name there, as the imports for type checkers say."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmload"):
            for alias in node.names:
                found[alias.asname or alias.name] = (str(node.module), alias.name)
    return found


def _file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _export(name: str, home: str, original: str) -> str:
    file = _file_of(f"{home}.{original}")
    if file.exists():  # a module
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and _is_public(n)]
        body = [_described(function, 4) for function in functions]
        return "\n\n".join([f"## `{name}`", _markdown(ast.get_docstring(tree) or ""), *body])
    tree = ast.parse(_file_of(home).read_text(encoding="utf-8"))
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == original:
            return _described(node, 2, name=name)
        if original in _assigned(node):
            return "\n\n".join([f"## `{name}`", _markdown(_text_of(following))])
    return _export(name, *_exports(tree)[original])


def _assigned(node: ast.stmt) -> set[str]:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _text_of(node: ast.stmt | None) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
    return ""


def _is_public(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return not node.name.startswith("_")


def _described(node: ast.FunctionDef | ast.ClassDef, level: int, *, name: str = "") -> str:
    """Describe a function, or a class with its attributes and methods."""
    text = _markdown(ast.get_docstring(node) or "")
    heading = f"{'#' * level} `{name or node.name}`"
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        call = f"{name or node.name}({_arguments(node)}){returns}"
        return "\n\n".join([heading, f"```text\n{_folded(call)}\n```", text])
    parts = [heading, text]
    attributes = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind, meaning = ast.unparse(statement.annotation), _text_of(following)
            if part := re.fullmatch(r"_(?:ReadOnly|Stated)\[(.+)\]", kind):
                kind, meaning = part[1], _of_the_context(statement.target.id)
            if not statement.target.id.startswith("_") and meaning:
                attributes.append(f"- `{statement.target.id}` (`{kind}`): {_line(meaning)}")
    parts.append("\n".join(attributes))
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and _is_public(method):
            first = (ast.get_docstring(method) or "").partition("\n\n")[0]
            is_property = any("property" in ast.unparse(d) for d in method.decorator_list)
            call = method.name if is_property else f"{method.name}({_arguments(method)})"
            parts.append(f"- `{call}`: {_line(first)}")
    return "\n\n".join(part for part in parts if part)


def _of_the_context(attribute: str) -> str:
    """Return the text of an attribute of LoadContext, which stands with the part that has it."""
    from llmload import LoadContext

    return getattr(LoadContext, attribute).__doc__ or ""


def _arguments(node: ast.FunctionDef) -> str:
    """Return the arguments as the source has them: a default's value can be the environment."""
    text = ast.unparse(node.args)
    return re.sub(r"^(self|cls)(, |$)", "", text)


def _folded(call: str) -> str:
    if len(call) <= 88:
        return call
    head, _, rest = call.partition("(")
    arguments, _, returns = rest.rpartition(")")
    split = re.split(r", (?![^\[(]*[\])])", arguments)
    return f"{head}(\n" + "".join(f"    {part},\n" for part in split) + f"){returns}"


def _line(text: str) -> str:
    return _prose(" ".join(text.split()))


def _markdown(docstring: str) -> str:
    """Turn a docstring, in reStructuredText as far as this project uses it, into Markdown."""
    blocks: list[str] = []
    code: list[str] = []
    for block in re.split(r"\n{2,}", docstring.strip("\n")):
        if code and block.startswith("    "):
            code.append(block)
            continue
        if code:
            blocks.append(_fenced(code))
            code = []
        if block.endswith("::"):
            blocks.append(_fields(block[:-1]))
            code = [""]
        else:
            blocks.append(_fields(block))
    if code:
        blocks.append(_fenced(code))
    return "\n\n".join(blocks)


def _fenced(code: list[str]) -> str:
    lines = "\n\n".join(code[1:]).splitlines()
    text = "\n".join(line.removeprefix("    ") for line in lines)
    language = "python" if re.search(r"^(import|from|class|def|result) ?", text) else "text"
    return f"```{language}\n{text}\n```"


def _fields(block: str) -> str:
    block = re.sub(r"^:param (\w+):", r"- `\1`:", block, flags=re.MULTILINE)
    block = re.sub(r"^:returns:", "- returns", block, flags=re.MULTILINE)
    block = re.sub(r"^:raises ([\w.~]+):", r"- raises `\1`:", block, flags=re.MULTILINE)
    return _prose(block)


def _prose(text: str) -> str:
    text = re.sub(r":\w+:`~([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def spellings(tool: str) -> str:
    """Say what to write for each key of another tool that a spec answers."""
    from llmload.spec.foreign_keys import of_sections

    lines = ["| there | here |", "|---|---|"]
    for key, spelling in of_sections(_registry().sections.values()).items():
        if tool in spelling.tools:
            here = f"`{spelling.ours}`" if spelling.ours else spelling.fix(True)
            lines.append(f"| `{key}` | {spelling.instead or here} |")
    return "\n".join(lines)


def messages(_: str = "") -> str:
    """List what can be said against a load, with the way out, by who says it."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted((ROOT / "llmload").rglob("*.py")):
        room = file.relative_to(ROOT / "llmload").parts
        who = " ".join(room[:2] if room[0] == "builtin" else room[:1]).removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (said := _said(node)):
                found.setdefault(who, {}).setdefault(*said)
    parts = []
    for who, rows in sorted(found.items()):
        table = [f"| {_cell(text)} | {_cell(fix)} |" for text, fix in sorted(rows.items())]
        title = f"Plugin `{who.split()[1]}`" if " " in who else f"`llmload.{who}`"
        parts.append("\n".join([f"## {title}\n", "| message | what to do |", "|---|---|", *table]))
    return "\n\n".join(parts)


_SAYS: Final = re.compile(
    r"((?<!Attribute)Error|Problem|Decline|Conflict)$|refus|problem", re.IGNORECASE
)


def _said(node: ast.Call) -> tuple[str, str] | None:
    """Return message and fix of a call that makes a problem or error, as far as it is written out.

    What is filled in stands there as an ellipsis.
    """
    if not _SAYS.search(ast.unparse(node.func).rpartition(".")[2]):
        return None
    by_name = {keyword.arg: _template(keyword.value) for keyword in node.keywords}
    texts = [text for text in map(_template, node.args) if text]
    fix = by_name.get("fix") or ""
    if not fix and len(texts) > 1:
        fix = texts.pop()
    message = by_name.get("message") or by_name.get("reason") or (texts[-1] if texts else "")
    # One word is a place in the spec, not a sentence.
    return (message, fix) if len(re.findall(r"[a-z]{2,}", message)) > 1 else None


def _template(node: ast.expr) -> str:
    """Return a text literal, an ellipsis for each value in it; empty for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_template(value) or "…" for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (_template(left) or "…") + (_template(right) or "…")
        case ast.IfExp(body=body):
            return _template(body)
        case ast.BoolOp(op=ast.Or(), values=[*_, last]):
            return _template(last)
    return ""


def compatibility(_: str = "") -> str:
    """List what cannot be combined, as ``llmload compat`` has it."""
    from llmload.cli.environment import compatibility as found

    lines = ["| section | with | works | because |", "|---|---|---|---|"]
    for pair in found(_registry()).pairs:
        lines.append(f"| `{pair.one}` | `{pair.other}` | {pair.works} | {pair.reason} |")
    return "\n".join(lines)


def stacks(_: str = "") -> str:
    """Say of each built-in plugin how far it works on each of the tested sets of versions."""
    from llmload.host import tested

    lines = [f"| | {' | '.join(tested.STACKS)} |", "|---|---|---|"]
    for name, found in tested.ON_STACKS.items():
        cells = [f"{works}, {reason}" if reason else works for works, reason in found.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def versions(_: str = "") -> str:
    """Say which loader an ordinary load has on each version of transformers."""
    from llmload.host import tested

    said = {
        "streaming": "`streaming`",
        "transformers": "`transformers`: `streaming` declines",
        "refused": "none: refused by name",
    }
    lines = ["| transformers | loader |", "|---|---|"]
    lines += [f"| {version} | {said[loader]} |" for version, loader in tested.TRANSFORMERS.items()]
    return "\n".join(lines)


def libraries(_: str = "") -> str:
    """Say which releases of the other libraries are taken, and which have been tried."""
    from llmload.host import tested

    lines = ["| library | oldest | newest tried |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(ends)} |" for name, ends in tested.LIBRARIES.items()]
    return "\n".join(lines)


def commands(_: str = "") -> str:
    """Write out what ``--help`` says of each command."""
    from typer.testing import CliRunner

    from llmload.cli import app

    runner = CliRunner()
    names = re.findall(r"^  (\w+) {2,}", _help(runner, app), re.MULTILINE)
    parts = [f"```text\n{_help(runner, app)}\n```"]
    for name in names:
        parts.append(f"## `llmload {name}`\n\n```text\n{_help(runner, app, name)}\n```")
    return "\n\n".join(parts)


def _help(runner: Any, app: Any, *words: str) -> str:
    result = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "90", "TERMINAL_WIDTH": "90"})
    text: str = result.stdout
    return text.replace("Usage: root", "Usage: llmload").strip(os.linesep)
