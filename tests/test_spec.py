"""What a spec may say, and the words in which everything else is refused."""

from __future__ import annotations

import enum
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import pytest
from bad_specs import BAD_SPECS, BadSpec
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

import llmload
from llmload import LoadSpec, Section, SpecError, create_registry
from llmload.spec import files
from llmload.spec.foreign_keys import VALUES, Spelling, of_sections
from llmload.spec.loadspec import KeyExceptions, validate
from llmload.spec.refusals import InvalidValueError, fields_of
from llmload.spec.schema import json_schema

SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"


class Nested(Section):
    """A part of a section."""

    depth: int = 0
    """How deep."""


class Adapter(Section):
    """Stands for a plugin's section, with one field of each kind."""

    spellings: ClassVar[Mapping[str, Spelling]] = {
        "lora_r": Spelling("TRL and axolotl", "adapter.r")
    }

    r: Annotated[int, Field(gt=0)] = 8
    scale: Annotated[float, Field(ge=0, lt=2)] = 1.0
    bias: bool = False
    bits: Literal[4, 8] = 4
    mode: Literal["a", "b", True] = "a"
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    names: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] = ("x",)
    alias: Annotated[str, Field(alias="class", pattern="^[a-z]+$")] = "a"
    nested: Nested | None = None
    many: tuple[str | Nested, ...] = ()
    by_name: Mapping[str, Nested] = {}
    path: Path | None = None
    api_key: Annotated[str, Field(max_length=3)] | None = None

    @field_validator("scale")
    @classmethod
    def _no_quarters(cls, scale: float) -> float:
        if scale == 0.25:
            raise InvalidValueError("a quarter is not a scale", fix="Write a half.")
        if scale == 0.75:
            raise ValueError("three quarters are too many")
        return scale

    @model_validator(mode="after")
    def _no_bias_with_8_bits(self) -> Adapter:
        if self.bias and self.bits == 8:
            raise InvalidValueError("bias needs 4 bits", fix="Write `bits: 4`.")
        return self


class Dropout(Section):
    """Stands for a second plugin's section."""

    p: float = 0.0


SECTIONS: dict[str, type[BaseModel]] = {"adapter": Adapter, "dropout": Dropout}


def check(data: dict[str, Any]) -> LoadSpec:
    return validate(files.read(data), SECTIONS)


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        check({"model": "gpt2", **data})
    return str(caught.value)


@pytest.mark.parametrize("bad", BAD_SPECS, ids=[bad.name for bad in BAD_SPECS])
def test_a_bad_spec_file_is_refused_with_every_fault_and_its_place(
    bad: BadSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = bad.text if isinstance(bad.text, bytes) else bad.text.encode()
    Path(bad.file).write_bytes(content)
    with pytest.raises(SpecError) as caught:
        validate(files.read(bad.file), create_registry(environ={}).sections)
    assert str(caught.value) == bad.message
    assert caught.value.exit_code == 2


def test_null_is_as_if_the_key_were_not_there_in_a_spec_as_in_a_group() -> None:
    null = dict.fromkeys(LoadSpec.model_fields.keys() - {"model"} | SECTIONS.keys())
    spec = validate(files.read({"model": "gpt2", **null}), SECTIONS)
    assert spec == validate(files.read({"model": "gpt2"}), SECTIONS)
    assert (spec.sections, spec.model_fields_set) == ({}, {"model"})
    with pytest.raises(SpecError, match="lorra: unknown key"):
        validate(files.read({"model": "gpt2", "lorra": None}), SECTIONS)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (True, ": expected a mapping, found true. Write `adapter: {}` for its defaults."),
        ("on", ": expected a mapping, found 'on'. Write `adapter: {}` for its defaults."),
        (False, ": expected a mapping, found false. Remove the key."),
        ([], ": expected a mapping, found a list. `llmload explain adapter` shows what it takes."),
        (7, ": expected a mapping, found 7. `llmload explain adapter` shows what it takes."),
        ({"r": "16"}, ".r: expected a whole number, found '16'. Remove the quotes."),
        ({"r": True}, ".r: expected a whole number, found true"),
        ({"r": 16.0}, ".r: expected a whole number, found 16.0. Write 16."),
        ({"r": 1.5}, ".r: expected a whole number, found 1.5"),
        ({"r": 0}, ".r: must be greater than 0, found 0"),
        ({"scale": "1e-4"}, ".scale: expected a number, found '1e-4'. Remove the quotes."),
        ({"scale": "much"}, ".scale: expected a number, found 'much'"),
        ({"scale": False}, ".scale: expected a number, found false"),
        ({"scale": -1}, ".scale: must be 0.0 or more, found -1"),
        ({"scale": 2}, ".scale: must be less than 2.0, found 2"),
        ({"scale": 0.25}, ".scale: a quarter is not a scale. Write a half."),
        ({"scale": 0.75}, ".scale: three quarters are too many"),
        ({"bias": 1}, ".bias: expected true or false, found 1"),
        ({"bias": "no"}, ".bias: expected true or false, found 'no'. Write false."),
        ({"bias": True, "bits": 8}, ": bias needs 4 bits. Write `bits: 4`."),
        ({"bits": 5}, ".bits: expected 4 or 8, found 5"),
        ({"bits": "4"}, ".bits: expected 4 or 8, found '4'"),
        ({"mode": "c"}, ".mode: expected 'a', 'b' or true, found 'c'"),
        ({"target_modules": "all"},
         ".target_modules: expected 'all-linear' or a list, found 'all'. Write all-linear."),
        ({"target_modules": "all-liner"},
         ".target_modules: expected 'all-linear' or a list, found 'all-liner'."
         " Did you mean 'all-linear'?"),
        ({"target_modules": ["q", 1]},
         ".target_modules[1]: expected text, found 1. Put it in quotes."),
        ({"names": []}, ".names: must have 1 or more entries, found 0"),
        ({"names": ["a", "b", "c"]}, ".names: must have 2 or fewer entries, found 3"),
        ({"names": "a"}, ".names: expected a list, found 'a'. Write [a]."),
        ({"class": "A"}, ".class: must match the regular expression ^[a-z]+$, found 'A'"),
        ({"clas": "a"}, ".clas: unknown key. Did you mean 'class'?"),
        ({"nested": {"deep": 1}}, ".nested.deep: unknown key. Did you mean 'depth'?"),
        ({"nested": {"depth": "1"}},
         ".nested.depth: expected a whole number, found '1'. Remove the quotes."),
        ({"many": ["a", {"depth": None}]},
         ".many[1].depth: expected a whole number, found nothing (null)."
         " Remove the key, or give it a value."),
        ({"many": ["a", {"bits": 1}]}, ".many[1].bits: unknown key. Move it to adapter."),
        ({"by_name": {"a.b": {"depth": []}}},
         ".by_name['a.b'].depth: expected a whole number, found a list"),
        ({"path": 5}, ".path: expected a path, found 5"),
        ({"model": "gpt2"}, ".model: unknown key. Move it to the top level."),
        ({"p": 0.1}, ".p: unknown key. Move it to dropout."),
        ({"lora_r": 4},
         ".lora_r: unknown key, known from TRL and axolotl. Write `adapter: {r: 4}`."),
        ({"unheard_of": 4},
         ".unheard_of: unknown key. Known keys are: r, scale, bias, bits, mode, target_modules,"
         " names, class, nested, many, by_name, path, api_key."),
        ({"scale": "x" * 100},
         f".scale: expected a number, found '{'x' * 59}...'"),
    ],
)  # fmt: skip
def test_a_bad_section_is_refused_in_these_words(section: Any, message: str) -> None:
    assert refusal({"adapter": section}) == f"adapter{message}"


def test_an_unknown_key_is_answered_with_its_section() -> None:
    assert refusal({"scale": 1}) == "scale: unknown key. Move it to adapter."


def test_an_unknown_key_is_answered_with_the_nearest_section() -> None:
    assert refusal({"droput": {}}) == "droput: unknown key. Did you mean 'dropout'?"


def test_an_unknown_key_like_no_other_is_answered_with_all_keys() -> None:
    assert refusal({"unheard_of": 1}) == (
        "unheard_of: unknown key. Known keys are: model, revision, subfolder, auto_class, labels,"
        " dtype, config, weights, weights_from, lock, device_map, max_memory, attn_implementation,"
        " trust_remote_code, ignore_adapter, allow_pickle, local_files_only, cache_dir, key_map,"
        " key_rules, strict, trainable, adapter, dropout."
    )


def test_faults_of_core_keys_and_of_all_sections_come_at_once_in_the_order_of_the_file() -> None:
    text = "adapter: {r: 0}\nmodel: 1\nunheard: 1\ndropout: {q: 1, p: x}\nweights: 2\n"
    with pytest.raises(SpecError) as caught:
        validate(files.parse(text, "s.yaml"), SECTIONS)
    assert [(p.where, p.file, p.line, p.column) for p in caught.value.problems] == [
        ("adapter.r", "s.yaml", 1, 11),
        ("model", "s.yaml", 2, 1),
        ("unheard", "s.yaml", 3, 1),
        ("dropout.q", "s.yaml", 4, 11),
        ("dropout.p", "s.yaml", 4, 17),
        ("weights", "s.yaml", 5, 1),
    ]


def test_the_constructor_refuses_core_keys_in_the_same_words_all_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        LoadSpec(model="", dtype="half", strict={"dtype": "auto"})  # type: ignore[arg-type]
    assert str(caught.value) == (
        "model: must have 1 or more characters, found ''\n"
        "dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'half'. Write float16.\n"
        "strict.dtype: unknown key. Move it to the top level."
    )


def test_a_spec_is_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        LoadSpec("gpt2")  # type: ignore[misc]
    spec = check({"model": "gpt2", "dropout": {"p": 0.5}})
    for part, key in ((spec, "model"), (spec, "dropout"), (spec.sections["dropout"], "p")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, "x")
    with pytest.raises(TypeError, match="does not support item assignment"):
        spec.sections["dropout"] = None  # type: ignore[index]


def test_sections_are_instances_of_their_models_in_the_order_given() -> None:
    spec = check({"dropout": {"p": 1}, "model": "gpt2", "adapter": {"r": 2}})
    assert list(spec.sections.items()) == [("dropout", Dropout(p=1)), ("adapter", Adapter(r=2))]


def test_a_spec_from_python_may_hold_sections_as_instances() -> None:
    spec = LoadSpec(model="gpt2", adapter=Adapter(r=2, nested=Nested(depth=3)))
    assert validate(files.read(spec), SECTIONS) == spec
    assert check({"model": "gpt2", "adapter": Adapter(r=2, nested=Nested(depth=3))}) == spec


def test_a_section_under_another_plugins_key_is_refused() -> None:
    assert refusal({"dropout": Adapter(bits=8)}) == "dropout.bits: unknown key. Move it to adapter."


def test_validating_twice_changes_nothing() -> None:
    once = check({"model": "gpt2", "adapter": {"class": "b", "many": [{"depth": 1}]}})
    assert validate(files.read(once), SECTIONS) == once
    assert once.model_fields_set == {"model", "adapter"}


def test_a_spec_can_be_sent_to_another_process() -> None:
    spec = check({"model": "gpt2", "adapter": {"r": 2}, "key_map": {"^a": "b"}})
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_paths_become_text(tmp_path: Path) -> None:
    spec = LoadSpec(model=tmp_path, cache_dir=[tmp_path, "x"])  # type: ignore[arg-type]
    assert (spec.model, spec.cache_dir) == (str(tmp_path), (str(tmp_path), "x"))
    assert check({"model": tmp_path, "adapter": {"path": tmp_path}}).model == str(tmp_path)


@pytest.mark.parametrize(
    ("cache_dir", "candidates"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))]
)
def test_cache_candidates_are_a_tuple_however_they_were_written(
    cache_dir: Any, candidates: tuple[str, ...]
) -> None:
    assert LoadSpec(model="gpt2", cache_dir=cache_dir).cache_candidates == candidates


@pytest.mark.parametrize(
    ("strict", "missing", "unexpected"),
    [
        (True, False, False),
        (False, True, True),
        (KeyExceptions(allow_missing=("score",)), True, False),
        (KeyExceptions(allow_unexpected=(r"\.score\.",)), False, True),
        (KeyExceptions(allow_missing=("^score",)), False, False),
    ],
)
def test_strict_says_which_keys_may_be_missing_or_unexpected(
    strict: bool | KeyExceptions, missing: bool, unexpected: bool
) -> None:
    exceptions = LoadSpec(model="gpt2", strict=strict).key_exceptions
    assert exceptions.allows_missing("model.score.weight") is missing
    assert exceptions.allows_unexpected("model.score.weight") is unexpected


@pytest.mark.parametrize(
    "device_map",
    [None, "auto", "balanced", "sequential", "cpu", "cuda", "cuda:1", "mps", 0, {"": 0},
     {"model.embed": "cpu", "lm_head": "cuda:0", "model.layers": 1, "rest": "xpu:0"}],
)  # fmt: skip
def test_device_maps_of_transformers_are_taken(device_map: Any) -> None:
    assert LoadSpec(model="gpt2", device_map=device_map).device_map == device_map


@pytest.mark.parametrize("name", ["base", "my_package.modeling:MyModel", "m:C"])
def test_auto_classes_and_class_paths_are_taken(name: str) -> None:
    assert LoadSpec(model="gpt2", auto_class=name).auto_class == name


def test_key_map_keeps_its_order() -> None:
    rules = {f"^{letter}": r"\g<0>" for letter in "zyxabc"}
    assert list(LoadSpec(model="gpt2", key_map=rules).key_map) == list(rules)


class Colour(enum.Enum):
    RED = "red"


class Behind(Section):
    """A section whose validators run before pydantic's own."""

    names: tuple[str, ...] = ()
    colours: frozenset[Colour] = frozenset()
    r: int = 0

    @model_validator(mode="before")
    @classmethod
    def _as_it_is(cls, data: Any) -> Any:
        return data


def test_lists_and_text_are_taken_for_tuples_sets_and_enums_behind_a_before_validator() -> None:
    document = files.read({"model": "gpt2", "b": {"names": ["a"], "colours": ["red"]}})
    section = validate(document, {"b": Behind}).sections["b"]
    assert section == Behind(names=("a",), colours=frozenset({Colour.RED}))


def test_scalars_stay_strict_behind_a_before_validator_and_in_python() -> None:
    with pytest.raises(ValidationError, match="valid integer"):
        Behind(r="1")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="valid integer"):
        Behind(r=True)


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "use_auth_token", "hub_token", "password", "passwd", "api_key",
     "wandb_api_key", "client_secret", "credentials", "access_token"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["swordfish", 31337, ["swordfish", 31337], {"a": "swordfish"}])
def test_the_value_of_a_secret_key_is_never_shown(key: str, value: Any) -> None:
    for data in ({key: value}, {"adapter": {key: value}}, {"adapter": {"nested": {key: value}}}):
        text = refusal(data)
        assert "swordfish" not in text
        assert "31337" not in text


def test_the_value_of_a_secret_field_is_not_shown_either() -> None:
    assert refusal({"adapter": {"api_key": "swordfish"}}) == (
        "adapter.api_key: must have 3 or fewer characters, found a value that is not shown"
    )


@pytest.mark.parametrize(
    "data",
    [
        {"auto_class": SECRET},
        {"device_map": SECRET},
        {"key_map": {"a": f"{SECRET}\\1"}},
        {"attn_implementation": {"a": SECRET}},
        {"adapter": {"class": SECRET}},
        {"adapter": {"r": SECRET}},
        {"adapter": {"names": SECRET}},
        {"torch_dtype": SECRET},
        {"lora_target_modules": [SECRET]},
        {"cache_dir": 5, "model_name_or_path": f"https://me:{SECRET}@example.org/x"},
    ],
    ids=lambda data: next(iter(data)),
)
def test_a_hub_token_is_not_shown_wherever_it_stands(data: dict[str, Any]) -> None:
    assert SECRET not in refusal(data)


def spellings() -> Mapping[str, Spelling]:
    return of_sections(create_registry(environ={}).sections.values())


def test_a_section_carries_what_other_tools_call_its_keys() -> None:
    class Ours:
        name = "ours"

        class Section(llmload.Section):
            rank: int = 8
            spellings: ClassVar[Mapping[str, Spelling]] = {
                "their_rank": Spelling("their tool", "ours.rank"),
                "ours.r": Spelling("their tool", "ours.rank"),
            }

    registry = create_registry([Ours], environ={})
    with pytest.raises(SpecError) as caught:
        registry.validate({"model": "m", "their_rank": 4, "ours": {"r": 4}})
    assert [str(problem) for problem in caught.value.problems] == [
        "ours.r: unknown key, known from their tool. Write `ours: {rank: 4}`.",
        "their_rank: unknown key, known from their tool. Write `ours: {rank: 4}`.",
    ]
    with pytest.raises(SpecError, match=r"their_rank: unknown key\. Known keys are: "):
        create_registry(environ={}).validate({"model": "m", "their_rank": 4})


@pytest.mark.parametrize(
    ("spellings", "fault"),
    [
        ({"r": "rank"}, "its `Section.spellings` must map keys to llmload.plugin.Spelling"),
        (
            {"r": Spelling("their tool", "lora.r")},
            "its `Section.spellings` leads from 'r' to 'lora.r', which is no key of 'ours'",
        ),
    ],
)
def test_spellings_that_lead_nowhere_break_the_plugin(spellings: Any, fault: str) -> None:
    section = type("Section", (llmload.Section,), {"spellings": spellings})
    with pytest.raises(llmload.PluginError) as caught:
        create_registry([SimpleNamespace(name="ours", Section=section)], environ={})
    assert caught.value.problems[0].message.endswith(fault)


def test_every_spelling_is_answered_with_a_sentence() -> None:
    for theirs, spelling in spellings().items():
        assert theirs not in LoadSpec.model_fields, theirs
        assert bool(spelling.ours) != bool(spelling.instead), theirs
        for value in (True, False, None, 4, "bf16", "lora", ["a"], {"a": 1}, "x" * 1000):
            fix = spelling.fix(value)
            assert fix.endswith("."), theirs
            assert len(fix) < 160, theirs


def test_every_spelling_leads_to_a_key_that_exists() -> None:
    sections = create_registry().sections
    known = json_schema(sections)["properties"].keys() | {"kbit", "zero3"}
    for theirs, spelling in spellings().items():
        first, *rest = spelling.ours.split(".") if spelling.ours else ["model"]
        assert first in known, theirs
        if rest and first in sections:
            assert rest[0] in fields_of(sections[first]), theirs


def test_every_word_of_other_tools_is_answered_with_one_of_ours() -> None:
    for theirs, ours in VALUES.items():
        assert theirs == theirs.lower()
        assert theirs != ours


def test_reading_and_checking_a_spec_imports_no_ml_library() -> None:
    code = """
import sys
from llmload.spec import files as specfile
from llmload.spec.schema import json_schema
from llmload.spec.loadspec import validate
validate(specfile.parse("model: gpt2"), {})
json_schema({})
heavy = {"torch", "transformers", "peft", "accelerate", "numpy", "deepspeed", "safetensors"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
