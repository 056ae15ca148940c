"""Groups as data: what members inherit, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bad_groups import BAD_GROUPS
from bad_specs import BadSpec
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from llmload import AdapterSpec, GroupSpec, LoadSpec, PluginError, SpecError, create_registry
from llmload.spec import files, groupspec
from llmload.spec.schema import file_schema


def members(text: str) -> dict[str, Any]:
    """Return the members of a group as plain data."""
    group = groupspec.validate(files.parse(text), {})
    data: dict[str, Any] = files.read(group).data["models"]
    return data


# --- like ---------------------------------------------------------------------------------------


def test_a_key_of_the_member_replaces_the_whole_key_and_null_takes_it_away() -> None:
    registry = create_registry(environ={})
    text = """
models:
  policy: {model: base, dtype: float32, revision: v1, lora: {r: 16, lora_alpha: 4}, dropout: {}}
  reference: {like: policy, dtype: float16, revision: null, lora: {r: 2}, dropout: null}
"""
    group = registry.validate_group(files.parse(text))
    reference = group.models["reference"]
    assert isinstance(reference, LoadSpec)
    assert (reference.model, reference.dtype, reference.revision) == ("base", "float16", None)
    assert list(reference.sections) == ["lora"]
    assert reference.sections["lora"].model_dump(exclude_unset=True) == {"r": 2}


def test_a_member_may_stand_before_the_one_it_is_like_and_be_like_one_that_is_like_another() -> (
    None
):
    text = """
models:
  c: {like: b, weights: random}
  b: {like: a, dtype: float16}
  a: {model: base, dtype: float32, subfolder: s}
"""
    assert members(text) == {
        "c": {"model": "base", "dtype": "float16", "subfolder": "s", "weights": "random"},
        "b": {"model": "base", "dtype": "float16", "subfolder": "s"},
        "a": {"model": "base", "dtype": "float32", "subfolder": "s"},
    }


KEYS = {
    "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "revision": st.sampled_from(["v1", "v2"]),
    "subfolder": st.sampled_from(["x", "y"]),
    "trainable": st.booleans(),
}


@st.composite
def families(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Groups in which each member but the first is like one before it; in any order."""
    given_keys = st.fixed_dictionaries({}, optional=KEYS)
    made: dict[str, dict[str, Any]] = {"m0": {"model": "base", **draw(given_keys)}}
    inherited = {"m0": set(made["m0"])}
    for number in range(1, draw(st.integers(1, 6))):
        other = draw(st.sampled_from(sorted(made)))
        own = draw(given_keys)
        gone = draw(st.sets(st.sampled_from(sorted(inherited[other] - {"model"} or {"model"}))))
        gone -= {"model"}
        name = f"m{number}"
        made[name] = {"like": other, **own, **dict.fromkeys(gone)}
        inherited[name] = (inherited[other] | set(own)) - gone
    return {name: made[name] for name in draw(st.permutations(sorted(made)))}


@given(families())
def test_what_is_inherited_is_what_replacing_key_by_key_gives(
    family: dict[str, dict[str, Any]],
) -> None:
    def resolved(name: str) -> dict[str, Any]:
        own = family[name]
        base = resolved(own["like"]) if "like" in own else {}
        return {k: v for k, v in {**base, **own}.items() if v is not None and k != "like"}

    group = GroupSpec(models=family)
    assert list(group.models) == list(family)
    assert files.read(group).data["models"] == {name: resolved(name) for name in family}


# --- reading and writing --------------------------------------------------------------------------


def test_a_group_is_written_in_full_and_read_back_equal() -> None:
    registry = create_registry(environ={})
    text = """
models:
  policy: {model: &m base, lora: {r: 4}}
  reference: {like: policy, model: *m, lora: null, trainable: false}
  off: {adapter_of: policy}
  frozen: {adapter_of: policy, frozen_copy: true}
"""
    group = registry.validate_group(files.parse(text))
    assert group.models["off"] == AdapterSpec(adapter_of="policy")
    assert list(group.own_models()) == ["policy", "reference"]
    assert "like" not in str(files.read(group).data)
    assert registry.validate_group(group) == group
    assert registry.validate_group(dict(group)) == group


def test_a_group_is_made_in_python_from_specs_or_mappings_and_is_frozen() -> None:
    policy = LoadSpec(model="base", dtype="float32")
    group = GroupSpec(
        models={"policy": policy, "reference": {"like": "policy", "dtype": "float16"}}
    )
    assert group.models["policy"] == policy
    assert group.models["reference"] == LoadSpec(model="base", dtype="float16")
    with pytest.raises(ValidationError):
        group.models = {}  # type: ignore[misc]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_GROUPS, ids=[bad.name for bad in BAD_GROUPS])
def test_a_bad_group_is_refused_with_every_fault_and_its_place(
    bad: BadSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(bad.text, str)
    Path(bad.file).write_text(bad.text)
    with pytest.raises(SpecError) as caught:
        groupspec.validate(files.read(bad.file), {})
    assert str(caught.value) == bad.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bad", BAD_GROUPS, ids=[bad.name for bad in BAD_GROUPS])
def test_the_constructor_refuses_what_a_file_may_not_hold(bad: BadSpec) -> None:
    data = files.parse(bad.text).data
    with pytest.raises(SpecError) as caught:
        groupspec.validate(files.read(data), {})
    assert str(caught.value) == "\n".join(line.split(": ", 1)[1] for line in bad.lines)


def test_faults_of_sections_are_told_where_they_stand() -> None:
    text = """models:
  policy: {model: base, lora: {rr: 1}}
  reference:
    like: policy
    lora: {r: 0}
"""
    with pytest.raises(SpecError) as caught:
        create_registry(environ={}).validate_group(files.parse(text, "g.yaml"))
    assert str(caught.value) == (
        "g.yaml:2:32: models.policy.lora.rr: unknown key. Did you mean 'r'?\n"
        "g.yaml:5:12: models.reference.lora.r: a LoRA of rank 0 has no parameters. Give a rank of 1"
        " or more, or remove the section `lora` to load without an adapter."
    )


def test_a_member_that_names_a_blocked_plugin_is_named() -> None:
    registry = create_registry(block=["lora"], environ={})
    with pytest.raises(
        PluginError, match=r"^models\.policy\.lora: the spec has the section 'lora'"
    ):
        registry.validate_group({"models": {"policy": {"model": "base", "lora": {}}}})


def test_a_group_is_not_loaded_as_one_model_nor_one_model_as_a_group() -> None:
    registry = create_registry(environ={})
    with pytest.raises(SpecError) as caught:
        registry.validate(files.parse("models: {policy: {model: gpt2}}", "g.yaml"))
    assert str(caught.value) == (
        "g.yaml:1:1: models: this is a group of models, and one model was to be loaded."
        " Use `llmload.load_group` or `llmload.plan_group`."
    )
    with pytest.raises(SpecError) as caught:
        registry.validate_group(files.parse("model: gpt2", "s.yaml"))
    assert str(caught.value) == (
        "s.yaml:1:1: models: a group has the key `models`, and there is none."
        " Use `llmload.load` or `llmload.plan` for one model."
    )


# --- the schema -----------------------------------------------------------------------------------

SCHEMA = file_schema(create_registry(environ={}).sections)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("model: gpt2", True),
        ("dtype: float32", False),
        ("models: {policy: {model: gpt2, lora: {r: 4}}}", True),
        ("models: {policy: {model: gpt2, lora: {r: x}}}", False),
        ("models: {policy: {model: gpt2, lara: {}}}", False),
        ("models: {policy: {dtype: float32}}", False),
        ("models: {policy: gpt2}", False),
        ("models: {a.b: {model: gpt2}}", False),
        ("models: {}", False),
        ("models: [gpt2]", False),
        ("{models: {policy: {model: gpt2}}, dtype: float32}", False),
        ("models: {p: {model: gpt2}, r: {like: p, dtype: float16, lora: null}}", True),
        ("models: {p: {model: gpt2}, r: {like: p, dtype: bf16}}", False),
        ("models: {p: {model: gpt2}, r: {like: p, lara: null}}", False),
        ("models: {p: {model: gpt2}, r: {adapter_of: p, frozen_copy: true}}", True),
        ("models: {p: {model: gpt2}, r: {adapter_of: p, dtype: float16}}", False),
        ("models: {p: {model: gpt2}, r: {adapter_of: 1}}", False),
    ],
)
def test_schema_and_models_agree_on_groups(text: str, good: bool) -> None:
    document = files.parse(text)
    assert Draft202012Validator(SCHEMA).is_valid(document.data) is good
    registry = create_registry(environ={})
    try:
        if groupspec.is_group(document.data):
            registry.validate_group(document)
        else:
            registry.validate(document)
        accepted = True
    except SpecError:
        accepted = False
    assert accepted is good


def test_the_schema_is_valid_draft_2020_12() -> None:
    Draft202012Validator.check_schema(SCHEMA)
