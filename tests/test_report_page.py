"""The page of a load: whole, one file, for people; and what plan, report and result print."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmload
from llmload.cli.commands import app
from llmload.loading import page
from llmload.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("page") / "model")


@pytest.fixture(scope="module")
def result(folder: Path) -> llmload.LoadResult:
    lora = {"target_modules": "all-linear"}
    return llmload.load({"model": str(folder), "dtype": "bfloat16", "lora": lora})


class Balance(HTMLParser):
    """Sees to it that every tag is closed, and that nothing is fetched."""

    ALONE = ("meta", "rect", "polyline", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.ALONE:
            assert self.open.pop() == tag


def held_to_be_whole(text: str) -> None:
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert balance.fetched == []
    assert "url(" not in text
    assert "@import" not in text


def test_the_command_writes_a_page_and_json_beside_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    asked = ["load", str(folder), "--set", "dtype=bfloat16", "--report", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    held_to_be_whole(text)
    assert text.startswith("<!doctype html>")
    for expected in ("prefers-color-scheme: dark", "F32 in the file, bfloat16 in the model"):
        assert expected in text
    data = json.loads(out.with_suffix(".json").read_text())
    (report,) = data["ranks"]
    assert (report["model"], report["spec"]["dtype"]) == (str(folder), "bfloat16")
    assert data["plan"]["memory"]["routes"][0]["route"] == "cast"


def test_members_of_a_group_have_a_part_each(folder: Path, tmp_path: Path) -> None:
    spec = tmp_path / "group.yaml"
    spec.write_text(f"models: {{policy: {{model: {folder}}}, reference: {{like: policy}}}}")
    out = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["load", str(spec), "--report", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    held_to_be_whole(text)
    assert re.findall("<h1>(policy|reference)</h1>", text) == ["policy", "reference"]
    assert json.loads(out.with_suffix(".json").read_text())["members"].keys() == {
        "policy",
        "reference",
    }


def test_a_page_with_another_name_is_refused_before_anything_is_read(folder: Path) -> None:
    done = CliRunner().invoke(app, ["load", str(folder), "--report", "out.pdf"])
    assert done.exit_code == 2
    assert "--report: the report 'out.pdf' would be a page, and is not called so." in done.output
    assert "Call it 'out.html'; JSON is written beside it." in done.output


def test_a_page_without_a_folder_is_refused_before_anything_is_read(folder: Path) -> None:
    done = CliRunner().invoke(app, ["load", str(folder), "--report", "nowhere/out.html"])
    assert done.exit_code == 2
    assert "there is no folder 'nowhere'" in done.output


def test_what_stands_in_a_model_is_no_markup(result: llmload.LoadResult) -> None:
    report = result.report.model_copy(update={"model": "<script>alert(1)</script>"})
    text = page.of_load(result.plan, [report])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_every_rank_has_its_drawing(result: llmload.LoadResult) -> None:
    text = page.of_load(result.plan, [result.report] * 3)
    assert text.count("<svg") == 3
    assert "rank 2," in text


def test_a_notebook_shows_plan_report_and_result(result: llmload.LoadResult) -> None:
    for shown in (result, result.plan, result.report):
        text = shown._repr_html_()
        held_to_be_whole(text)
        assert "all-linear" in text or shown is result.report


def test_what_is_printed_is_a_page_and_its_repr_a_line(result: llmload.LoadResult) -> None:
    model = result.plan.model
    assert repr(result.plan) == (
        f"<Plan of {model!r}: LlamaForCausalLM by 'streaming', 0 errors, 0 warnings>"
    )
    assert re.fullmatch(r"<Report of '.*': [\d.]+ s, [\d,]+ parameters>", repr(result.report))
    assert repr(result) == f"<LoadResult: PeftModelForCausalLM from {result.report!r}>"
    printed = str(result)
    assert printed == str(result.report)
    assert max(map(len, printed.splitlines())) <= 100
    assert f"model        {model}" in printed
    assert "every weight has been used once" in str(result.plan)
