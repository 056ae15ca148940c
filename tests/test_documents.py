"""The pages of docs/: their snippets run, and what the site generates from the code is complete."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from snippets import ROOT, blocks, run
from stacks import IS_MODERN

import llmload
from llmload import create_registry, hookspecs
from llmload.cli import environment
from llmload.spec.loadspec import LoadSpec

DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
OF_A_PACKAGE = ("fsdp.md",)
"""Pages whose snippets need a package of plugins/, whose own tests run them."""
BUILTIN = sorted(info.name for info in create_registry().plugins if info.builtin)


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def build_pages() -> ModuleType:
    """The hooks of mkdocs, which need no mkdocs to make a page's parts."""
    spec = importlib.util.spec_from_file_location("build_pages", DOCS / "build_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.refused_late
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not IS_MODERN, reason="the pages show the classes of the modern stack")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in OF_A_PACKAGE and blocks(text(page))]
)
def test_every_snippet_runs_and_gives_what_stands_under_it(page: str, kept_demo: Path) -> None:
    run(DOCS / page, kept_demo)


def test_the_site_leads_to_every_page_and_to_no_other(build_pages: ModuleType) -> None:
    # As text: mkdocs' own file may hold tags that a safe reader refuses.
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w./-]+\.md", str(nav))
    assert sorted(listed) == sorted([*PAGES, *build_pages.PAGES.values()])


@pytest.mark.parametrize("name", BUILTIN)
def test_every_built_in_plugin_has_a_page_with_all_its_fields(
    name: str, build_pages: ModuleType
) -> None:
    page = text(f"builtin/{name}.md")
    assert [block.kind for block in blocks(page)].count("python") >= 1
    made = build_pages.with_parts(page)
    section = create_registry().sections.get(name)
    for field in section.model_fields if section else ():
        assert f"\n| `{field}` | " in made
    assert f"]({name}.md) |" in text("builtin/index.md")


def test_the_reference_has_every_core_key_hook_and_public_name(build_pages: ModuleType) -> None:
    keys = build_pages.with_parts(text("reference/spec.md"))
    assert all(f"\n| `{key}` | " in keys for key in LoadSpec.model_fields)
    hooks = build_pages.with_parts(text("reference/hooks.md"))
    assert all(f"\n## `{name}`\n" in hooks for name in (*hookspecs.HELPERS, *hookspecs.SPINE))
    names = build_pages.with_parts(text("reference/public.md"))
    for module in (llmload, llmload.plugin, llmload.testing):
        assert all(f"\n## `{name}`\n" in names for name in module.__all__)


def test_the_reference_describes_each_attribute_of_the_context(build_pages: ModuleType) -> None:
    page = build_pages.with_parts(text("reference/public.md"))
    context = re.findall(r"^## `LoadContext`\n.*?(?=^## )", page, re.MULTILINE | re.DOTALL)[0]
    for name in llmload.LoadContext.__annotations__:
        assert re.search(rf"^- `{name}` \(`.+`\): [A-Z`]", context, re.MULTILINE), name


def test_the_index_of_messages_has_them_by_who_says_them(build_pages: ModuleType) -> None:
    parts = build_pages.with_parts(text("reference/messages.md")).split("\n## ")
    said = {part.partition("\n")[0]: part for part in parts}
    assert {f"Plugin `{name}`" for name in ("kbit", "lora", "zero3")} <= said.keys()
    for who, message, fix in (
        ("`llmload.spec`", "the spec file does not exist", "Check the name."),
        ("Plugin `zero3`", "DeepSpeed chooses the device of each partition", "Remove"),
        ("Plugin `cast`", "a Booster gives all parameters the dtype", "Remove `cast`."),
    ):
        row = next(line for line in said[who].splitlines() if message in line)
        assert row.partition(" | ")[2].startswith(fix)


@pytest.mark.parametrize(
    ("page", "key", "ours"),
    [
        ("axolotl", "base_model", "model"),
        ("axolotl", "lora_r", "lora.r"),
        ("llama-factory", "quantization_bit", "kbit.bits"),
        ("trl", "use_peft", "lora"),
        ("deepspeed-chat", "lora_dim", "lora.r"),
        ("colossalchat", "lora_train_bias", "lora.bias"),
        ("dpo-reference", "policy_dtype", "dtype"),
    ],
)
def test_who_migrates_finds_their_keys(
    page: str, key: str, ours: str, build_pages: ModuleType
) -> None:
    made = build_pages.with_parts(text(f"migrating/{page}.md"))
    assert f"\n| `{key}` | `{ours}` |\n" in made


def test_the_reference_shows_no_value_of_the_environment(
    build_pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_to_be_shown")
    assert all("hf_never_to_be_shown" not in build_pages.with_parts(text(page)) for page in PAGES)


def test_links_of_a_page_lead_to_pages_or_files_of_the_site(build_pages: ModuleType) -> None:
    linked: set[str] = set()
    markdown = (
        "[a](../SECURITY.md#x) [b](dpo.md) [c](../llmload/plugin.py) [d](../tests)"
        " [e](build_pages.py) [f](https://g)"
    )
    assert build_pages.with_links_of_the_site(markdown, "docs/sft.md", "sft.md", linked) == (
        "[a](security.md#x) [b](dpo.md) [c](source/llmload/plugin.py) d"
        " [e](source/docs/build_pages.py) [f](https://g)"
    )
    assert linked == {"docs/build_pages.py", "llmload/plugin.py"}


def test_the_page_of_stacks_has_what_cannot_be_combined(build_pages: ModuleType) -> None:
    made = build_pages.with_parts((DOCS / "stacks.md").read_text(encoding="utf-8"))
    table = environment.compatibility(create_registry(environ={}))
    for pair in table.pairs:
        assert f"| `{pair.one}` | `{pair.other}` | {pair.works} | {pair.reason} |" in made
    assert "| `kbit` | yes, on the CPU too | in part, on an accelerator only" in made


def test_agents_find_every_page_in_the_sites_list_and_its_text_in_the_other(
    build_pages: ModuleType, tmp_path: Path
) -> None:
    site = {"site_dir": str(tmp_path), "site_name": "llmload", "site_description": "loads models"}
    for page in PAGES:  # as on_page_markdown does, which needs mkdocs
        build_pages._written[page] = build_pages.with_parts(text(page))
    build_pages.on_post_build(site)
    listed = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^- \[(.+)\]\((.*)\): (.+)$", listed, re.MULTILINE)
    assert len(entries) == len(PAGES)
    assert len({address for _, address, _ in entries}) == len(PAGES)
    whole = (tmp_path / "llms-full.txt").read_text(encoding="utf-8")
    titles = re.findall(r"^# (.+)$", whole, re.MULTILINE)
    assert {title for title, _, _ in entries} <= set(titles)
    assert "<!-- generated" not in whole
