"""What was published about loaders does nothing here, and SECURITY.md says what happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from published import BEGIN, END, KEPT, SECURITY, STACK, Published, attempt, published, table

ROWS = list(published())


@pytest.mark.parametrize("one", ROWS, ids=[one.names for one in ROWS])
def test_a_published_weakness_is_refused_or_does_no_harm(
    one: Published, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    refusal, done = attempt(one.row, folder)
    assert done == []
    assert bool(refusal) == bool(one.row.says), refusal
    assert one.row.says in refusal
    assert not (tmp_path / "canary").exists()
    outcome = json.loads(KEPT.read_text())[STACK][one.names]["outcome"]
    assert outcome == ("refused" if refusal else "no harm")


def test_the_table_of_published_weaknesses_is_the_one_that_was_measured() -> None:
    _, _, rest = SECURITY.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table(json.loads(KEPT.read_text()))
