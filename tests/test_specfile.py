"""Reading a spec as plain data with places, and writing it so that it reads back the same."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmload import LoadSpec, Problem, Section, SpecError
from llmload.spec import files, yaml_read, yaml_write
from llmload.spec.loadspec import KeyExceptions, validate


class Part(Section):
    """Stands for a plugin's section."""

    text: str = ""
    number: float = 0.0
    count: int | None = None
    names: tuple[str, ...] = ()
    rest: dict[str, bool | int | float | str | None] | None = None


# Text that YAML makes something else of, in one version or the other, or that is hard to write.
TRAPS = [
    "", " ", "~", "null", "no", "Off", "true", "0o17", "017", "0x1f", "1_000", "1:30", "12e3",
    "1e-4", ".5", "-.inf", ".NaN", "2001-01-01", "<<", "=", "*a", "&a", "!a", "@a", "%a", "`a",
    "? a", "- a", "-", "a: b", "a #b", "#", "{a", "[a", "'", '"', "---", "...", "\t", " a", "a ",
    "a\n", "\na", " \n a\n\n", "a\n b\n", "\r", "\r\n", "\x85", "\u2028", "\ufeff", "\x00",
    "\x7f", "\U0001f600", "{{ messages }}",
]  # fmt: skip

patient = settings(deadline=None)  # the machine may be busy

text = st.one_of(
    st.sampled_from(TRAPS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), floats, text)
plain_data = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=12,
)
mappings = st.dictionaries(text, plain_data, max_size=5)
parts = st.builds(
    Part,
    text=text,
    number=floats,
    count=st.none() | st.integers(),
    names=st.lists(text, max_size=3).map(tuple),
    rest=st.none() | st.dictionaries(text, scalars, max_size=3),
)
patterns = st.lists(st.sampled_from(["^a", r"b\.", "(c|d)", "é"]), max_size=2).map(tuple)
specs = st.fixed_dictionaries(
    {"model": text.filter(bool)},
    optional={
        "revision": st.none() | text,
        "dtype": st.sampled_from(["auto", "bfloat16"]),
        "device_map": st.sampled_from([None, "auto", 0, {"": 0, "a.b": "cpu"}]),
        "cache_dir": st.none() | text | st.lists(text, max_size=3).map(tuple),
        "key_map": st.dictionaries(st.sampled_from(["^a", r"b\.", "(c|d)"]), st.just(r"\g<0>")),
        "strict": st.booleans()
        | st.builds(KeyExceptions, allow_missing=patterns, allow_unexpected=patterns),
        "allow_pickle": st.booleans(),
        "part": parts,
        "other": parts,
    },
).map(lambda keys: LoadSpec(**{key: value for key, value in keys.items() if value is not None}))
# Null for a key means without it: a file that says so is read as one that does not.


def parsed(text: str, file: str = "s.yaml") -> Any:
    return yaml_read.parse(text, file)[0]


def refusal(source: files.SpecLike) -> str:
    with pytest.raises(SpecError) as caught:
        files.read(source)
    return str(caught.value)


def refusal_of_text(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        files.parse(text, "s.yaml")
    return str(caught.value)


# --- there and back -------------------------------------------------------------------------------


@patient
@given(specs)
def test_a_spec_as_plain_data_is_the_same_spec(spec: LoadSpec) -> None:
    again = validate(files.read(dict(files.read(spec).data)), {"part": Part, "other": Part})
    assert again == spec
    assert again.model_fields_set == spec.model_fields_set


@settings(patient, max_examples=25)
@given(data=mappings)
@example(data={trap: [trap] for trap in TRAPS})
@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_json_is_read_as_json_has_it(
    data: dict[str, Any], indent: int | str | None, ensure_ascii: bool
) -> None:
    written = json.dumps(data, indent=indent, ensure_ascii=ensure_ascii)
    assert parsed(written, "s.json") == data


@patient
@given(plain_data)
def test_inline_yaml_is_one_line_that_reads_back_the_same(data: Any) -> None:
    written = yaml_write.dump_inline(data)
    assert "\n" not in written
    assert parsed(f"key: {written}") == {"key": data}
    assert yaml.safe_load(written) == data


# --- YAML as people mean it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("NO", "NO"),
        ("true", True), ("True", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("5.", 5.0), ("1.", 1.0),
        ("10", 10), ("-3", -3), ("+3", 3), ("0o17", 15), ("0x1f", 31), ("017", 17),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2001-01-01", "2001-01-01"), ("0b11", "0b11"),
        ("'1'", "1"), ('"true"', "true"), ("'~'", "~"), ("1.2.3", "1.2.3"), ("e5", "e5"),
        ("1e5x", "1e5x"), ("-", [None]), ("|\n  1\n", "1\n"), ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)  # fmt: skip
def test_plain_words_are_read_by_yaml_1_2(written: str, value: Any) -> None:
    got = parsed(f"key: {written}" if written != "-" else "key:\n-")["key"]
    assert got == value
    assert type(got) is type(value)


def test_anchors_and_merges_share_settings_within_a_file() -> None:
    document = files.parse(
        "base: &base\n"
        "  model: gpt2\n"
        "  part: &part {count: 1, text: a}\n"
        "more: &more {dtype: float16, model: opt}\n"
        "one:\n"
        "  <<: [*base, *more]\n"
        "  part: {<<: *part, count: 2}\n"
        "two: *part\n",
        "s.yaml",
    )
    assert document.data["one"] == {
        "model": "gpt2",
        "dtype": "float16",
        "part": {"count": 2, "text": "a"},
    }
    assert document.data["two"] == {"count": 1, "text": "a"}
    # A merged key stands where it was written.
    assert document.position("one.model") == (2, 3)
    assert document.position("one.dtype") == (4, 14)
    assert document.position("one.part") == (7, 3)
    assert document.position("one.part.count") == (7, 21)
    assert document.position("one.part.text") == (3, 26)


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: gpt2\r\ndtype: auto\r\n")
    assert files.read(path).data == {"model": "gpt2", "dtype": "auto"}


# --- places ---------------------------------------------------------------------------------------


DOCUMENT = """\
model: gpt2
part:
  text: a
  names: [a,
    b]
key_map:
  '^a\\.': b
"""


@pytest.mark.parametrize(
    ("where", "position"),
    [
        ("model", (1, 1)),
        ("part.text", (3, 3)),
        ("part.names[0]", (4, 11)),
        ("part.names[1]", (5, 5)),
        (r"key_map['^a\\.']", (7, 3)),
        ("part.not_set", (2, 1)),
        ("part.names[7].deeper", (4, 3)),
        ("not_set.at_all", (1, 1)),
        ("", (1, 1)),
    ],
)
def test_the_place_of_a_key_or_of_the_nearest_key_around_it(
    where: str, position: tuple[int, int]
) -> None:
    assert files.parse(DOCUMENT, "s.yaml").position(where) == position


def test_problems_are_placed_and_put_in_the_order_of_the_file() -> None:
    problems = [Problem(message="late", where="part.text"), Problem(message="early", where="model")]
    placed = files.parse(DOCUMENT, "s.yaml").placed(problems)
    assert [str(problem) for problem in placed] == [
        "s.yaml:1:1: model: early",
        "s.yaml:3:3: part.text: late",
    ]


def test_a_spec_from_python_has_no_places() -> None:
    document = files.read({"model": "gpt2"})
    assert document.position("model") is None
    problems = [Problem(message="late", where="z"), Problem(message="early", where="a")]
    assert document.placed(problems) == problems


# --- files that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, ["model"], 7, b"spec.yaml"])
def test_what_is_neither_a_mapping_nor_a_name_is_refused(source: Any) -> None:
    assert refusal(source) == (
        "a spec is a mapping or the name of a file, found an object of type"
        f' {type(source).__name__}. Give at least `{{"model": ...}}`.'
    )


def test_a_missing_file_a_folder_and_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    missing = tmp_path / "s.yaml"
    assert refusal(missing) == f"{missing}: the spec file does not exist. Check the name."
    assert refusal(tmp_path) == (
        f"{tmp_path}: this is a folder, not a spec file."
        " Write a spec with `model:` set to the folder, and give the spec's name."
    )
    assert refusal("a" * 300) == (
        f"{'a' * 300}: the spec file cannot be read: File name too long. Check the name."
    )
    assert refusal("a\0b") == (
        "a\\x00b: the spec file cannot be read: embedded null byte. Check the name."
    )


def test_an_endless_file_is_not_read_to_its_end() -> None:
    assert refusal(os.devnull) == (
        f"{os.devnull}:1:1: the document is empty. Write at least `model: ...`."
    )
    if Path("/dev/zero").exists():
        assert refusal("/dev/zero") == (
            "/dev/zero: the spec file is larger than 256 KiB."
            " Check that it is a spec; give a spec of that size from Python."
        )


@pytest.mark.parametrize(
    "text", ["a: &a [*a, *a]\n", "a: &a {<<: *a}\n", "a: " + "[" * 2_000, "- " * 2_000]
)
def test_a_document_without_end_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="nested deeper than 32 levels"):
        files.parse(text)


def test_all_that_is_not_plain_in_a_file_is_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        files.parse("a: !b c\nd: .nan\nd: 1\n2: e\n? [f]\n: g\n", "s.yaml")
    assert [str(problem) for problem in caught.value.problems] == [
        "s.yaml:1:4: the tag '!b' is not allowed: a spec is plain data. Remove the tag.",
        "s.yaml:3:1: d: the key stands twice, first on line 2, column 1. Keep one of the two.",
        "s.yaml:4:1: a key must be text. Put it in quotes: '2'.",
        "s.yaml:5:3: a key must be text. Put text that starts with a bracket or brace in quotes.",
        "s.yaml:2:4: d: .nan is not a finite number."
        " Write a number, or put it in quotes if it is text.",
    ]


# --- data from Python -----------------------------------------------------------------------------


class dtype:
    __module__ = "torch"

    def __str__(self) -> str:
        return "torch.bfloat16"


SELF: list[Any] = []
SELF.append(SELF)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dtype(), "k: a spec is plain data, found an object of type torch.dtype."
                  " Write 'bfloat16'."),
        (object(), "k: a spec is plain data, found an object of type builtins.object."
                   " Write text, a number, true, false, null, a list or a mapping."),
        ({"a": [b"x"]}, "k.a[0]: a spec is plain data, found an object of type builtins.bytes."
                        " Write text, a number, true, false, null, a list or a mapping."),
        (math.nan, "k: nan is not a finite number. Write a number."),
        ([-math.inf], "k[0]: -inf is not a finite number. Write a number."),
        ("\ud800", "k: the text has half of a surrogate pair, which is no character."
                   " Write the whole pair, or the character itself."),
        ({1: 2}, "k: a key must be text, found 1. Write '1'."),
        (SELF, "k[0][0]: the spec is nested deeper than 32 levels."
               " Flatten it; a list or mapping must not contain itself."),
    ],
)  # fmt: skip
def test_python_objects_that_no_file_could_hold_are_refused(value: Any, message: str) -> None:
    assert refusal({"model": "gpt2", "k": value}) == message


def test_paths_tuples_and_sections_become_plain(tmp_path: Path) -> None:
    document = files.read({"model": tmp_path, "a": (1, [True]), "part": Part(names=("a",))})
    assert document.data == {"model": str(tmp_path), "a": [1, [True]], "part": {"names": ["a"]}}


# --- what would be waited for, or exhausts its reader --------------------------------------------


def test_a_fifo_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "spec.yaml"
    os.mkfifo(fifo)
    with pytest.raises(SpecError) as refused:
        files.read(fifo)
    assert str(refused.value) == (
        f"{fifo}: the spec file cannot be read: it is a terminal or a pipe, not a file. Check the"
        " name."
    )


def test_a_pipe_that_a_shell_makes_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"model: m\n")
    os.close(writing)
    try:
        assert files.read(f"/dev/fd/{reading}").data == {"model": "m"}
    finally:
        os.close(reading)


@pytest.mark.parametrize("number", ["0x" + "f" * 4000, "9" * 5000, "0o" + "7" * 101])
def test_a_number_that_python_would_not_show_is_refused(number: str) -> None:
    with pytest.raises(SpecError) as refused:
        files.parse(f"model: m\nlora: {{r: {number}}}\n", "s.yaml")
    assert str(refused.value) == (
        f"s.yaml:2:11: lora.r: {number[:20]}... is a number of {len(number)} digits. Write one of"
        " at most 100, or put it in quotes if it is text."
    )
    with pytest.raises(SpecError) as refused:
        files.read({"model": "m", "lora": {"r": 16**4000}})
    assert str(refused.value) == (
        "lora.r: a whole number of 16001 bits is more than anything here takes. Write a smaller"
        " one."
    )


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "a: &a [" + "x," * 1000 + "]\nb: [" + "*a," * 80_000 + "]\n",
        "a: &a " + "x" * 100_000 + "\nb: [" + "*a," * 50_000 + "]\n",
        "a: [" + "x," * 20_000 + "]\n",
    ],
    ids=["laughs", "many aliases", "aliases of long text", "no aliases"],
)
def test_a_document_of_more_values_than_any_spec_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="more than 10,000 values once its aliases are expanded"):
        files.parse(text)
