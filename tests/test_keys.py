"""Every key of a checkpoint comes to its one place, or is named: mapping, rules, archives, claims.

Each case runs through both loaders: the streaming one, and ``from_pretrained`` behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from sameness import differences, from_pretrained
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, LlamaModel

import llmload
from llmload import hookimpl
from llmload.builtin.coati.keys import undo as undo_coati
from llmload.plugin import some
from llmload.spec.renaming import RULES, Renaming
from llmload.spec.schema import json_schema
from llmload.testing import tiny_checkpoint, tiny_llama, tiny_model

LOADERS = ["streaming", "transformers"]
NORM = "model.norm.weight"
opens_pickles = pytest.mark.skipif(
    not hasattr(torch, "accelerator"), reason="torch 2.5 opens no pickle"
)


def load(
    folder: Path, loader: str = "streaming", plugins: tuple[object, ...] = (), **keys: Any
) -> llmload.LoadResult:
    block = {"streaming"} if loader == "transformers" else set()
    registry = llmload.create_registry(plugins, block=block, environ={})
    result = llmload.load({"model": str(folder), **keys}, registry=registry)
    assert result.report.loader == loader
    return result


def refusal(*args: Any, error: type[Exception] = llmload.RequestError, **keys: Any) -> str:
    with pytest.raises(error) as caught:
        load(*args, **keys)
    return str(caught.value)


def rename(folder: Path, new_name: Callable[[str], str]) -> Path:
    """Rewrite the weights of ``folder`` under other keys."""
    path = folder / "model.safetensors"
    tensors = {new_name(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


# --- key_map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("new_name", "key_map"),
    [
        # Every match of one expression, where transformers 5 would replace the first alone.
        (lambda key: "blk.blk." + key, {r"blk\.": ""}),
        # One expression after the other, where transformers 4.51 would stop at the first.
        (lambda key: "a." + key, {"^a": "b", "^b": "c", r"^c\.": ""}),
        (lambda key: key.replace("layers", "h"), {r"\.h\.(\d+)\.": r".layers.\1."}),
    ],
    ids=["every match", "in order", "groups"],
)
def test_expressions_act_as_in_re_sub(
    new_name: Callable[[str], str], key_map: dict[str, str], loader: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    generation = GenerationConfig(temperature=0.5, do_sample=True, bos_token_id=1, eos_token_id=2)
    generation.save_pretrained(folder)
    theirs = from_pretrained(AutoModelForCausalLM, folder)
    result = load(rename(folder, new_name), loader, key_map=key_map)
    assert differences(result.model, theirs) == []
    assert result.report.compared == len(list(theirs.named_parameters()))


def test_the_plan_says_how_many_keys_each_rule_renames(tmp_path: Path) -> None:
    folder = rename(tiny_llama(tmp_path), lambda key: "module.a." + key)
    spec = {"model": str(folder), "key_map": {r"a\.model\.norm": "a.model.norm", r"\.a\.": "."}}
    plan = llmload.plan({**spec, "key_rules": ["ddp", "compiled"]})
    assert plan.keys == [
        r"1 renamed by a\.model\.norm",
        r"21 renamed by \.a\.",
        "21 renamed by ddp",
        "0 renamed by compiled",
    ]


def test_an_expression_that_matches_no_key_is_refused_in_the_plan(tmp_path: Path) -> None:
    spec = {"model": str(tiny_llama(tmp_path)), "key_map": {"^model": "model", "^modle": "model"}}
    (problem,) = llmload.plan(spec).errors
    assert str(problem) == (
        "key_map['^modle']: the regular expression matches none of the 21 keys of the checkpoint,"
        " which are 'lm_head.weight', 'model.embed_tokens.weight',"
        " 'model.layers.0.input_layernorm.weight' and 18 more. Correct the rule, or remove it."
        " Rules are applied one after the other, each to what the one before it left."
    )


def test_two_keys_mapped_to_one_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    rules = {"^lm_head": "model.norm", r"layers\.\d\.mlp": "mlp"}
    assert refusal(folder, key_map=rules) == "\n".join(
        f"key_map: the keys {keys} of the checkpoint would all be called {name!r}. Make the rules"
        " map each key to a name of its own."
        for keys, name in [
            ("'lm_head.weight', 'model.norm.weight'", "model.norm.weight"),
            *(
                (
                    f"'model.layers.0.mlp.{part}.weight', 'model.layers.1.mlp.{part}.weight'",
                    f"model.mlp.{part}.weight",
                )
                for part in ("down_proj", "gate_proj", "up_proj")
            ),
        ]
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights_from", "policy.pt"), ("key_map", {"^a": "b"}), ("key_rules", ["ddp"])],
)
def test_random_weights_have_no_keys(key: str, value: Any) -> None:
    with pytest.raises(llmload.SpecError) as caught:
        llmload.LoadSpec(**{"model": "gpt2", "weights": "random", key: value})
    assert str(caught.value) == (
        f"`weights: random` reads no checkpoint, and `{key}` is set. Remove one or the other."
    )


# --- key_rules --------------------------------------------------------------------------------


def test_a_rule_that_nobody_has_is_refused_with_the_nearest() -> None:
    registry = llmload.create_registry(environ={})
    assert list(registry.key_rules) == [*RULES, "coati"]
    with pytest.raises(llmload.SpecError) as caught:
        registry.validate({"model": "m", "key_rules": ["ddp", "deepspeed-chat", 3]})
    assert [str(problem) for problem in caught.value.problems] == [
        "key_rules[2]: expected text, found 3. Put it in quotes.",
        "key_rules[1]: expected 'deepspeed_chat', 'ddp', 'compiled', 'fsdp',"
        " 'activation_checkpointing', 'fabric', 'peft' or 'coati', found"
        " 'deepspeed-chat'. Did you mean 'deepspeed_chat'?",
    ]
    without = llmload.create_registry(block=["coati"], environ={})
    with pytest.raises(llmload.SpecError, match=r"'fabric' or 'peft', found 'coati'"):
        without.validate_group({"models": {"a": {"model": "m", "key_rules": ["coati"]}}})


def test_the_schema_names_the_rules_that_there_are() -> None:
    registry = llmload.create_registry([WithRules], environ={})
    schema = json_schema(registry.sections, registry.key_rules)
    spec = {"model": "m", "key_rules": ["ddp", "upper", "by_model"]}
    jsonschema.validate(spec, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "key_rules": ["uper"]}, schema)


class WithRules:
    """Has a rule of each kind, and a section that no spec here has."""

    name = "with_rules"
    key_rules: ClassVar[dict[str, Any]] = {
        "upper": ((r"^MODEL\.", "model."), (r"^LM_HEAD\.", "lm_head.")),
        "by_model": lambda keys, of_model: {
            key: name for key in keys for name in of_model if key == f"theirs.{name}"
        },
        "wrong": lambda keys, of_model: {"no such key": "x"},
        "failing": lambda keys, of_model: 1 / 0,
    }

    class Section(llmload.Section):
        """Nothing to say."""


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("upper", lambda key: re.sub("^(model|lm_head)", lambda found: found[0].upper(), key)),
        ("by_model", lambda key: f"theirs.{key}"),
    ],
)
def test_a_plugin_has_rules_of_its_own(rule: str, theirs: Any, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    expected = llmload.load({"model": str(folder)}).model.state_dict()
    rename(folder, theirs)
    registry = llmload.create_registry([WithRules], environ={})
    spec = {"model": str(folder), "key_rules": [rule]}
    found = llmload.load(spec, registry=registry)
    assert all(torch.equal(v, expected[k]) for k, v in found.model.state_dict().items())
    assert found.plan.keys == [f"{len(expected)} renamed by {rule}"]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("wrong", "TypeError: it must return a mapping of keys of the checkpoint to names"),
        ("failing", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_rule_that_fails_is_named(rule: str, reason: str, tmp_path: Path) -> None:
    registry = llmload.create_registry([WithRules], environ={})
    spec = {"model": str(tiny_llama(tmp_path)), "key_rules": [rule]}
    (problem,) = llmload.plan(spec, registry=registry).errors
    assert str(problem) == (
        f"the key rule {rule!r} failed: {reason}. The plugin that has it is at fault; say in"
        " `key_map` how keys are renamed."
    )


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        (("ddp",), "its `key_rules` is ('ddp',), and must map names to llmload.plugin.KeyRule"),
        ({"ddp": ()}, "its key rule 'ddp' is called as one of llmload's own"),
        (
            {"mine": "^a"},
            "its key rule 'mine' is neither a function nor a tuple of regular expressions with"
            " their replacements",
        ),
        (
            {"mine": (("(", ""),)},
            "its key rule 'mine' is neither a function nor a tuple of regular expressions with"
            " their replacements",
        ),
        ({"coati": ()}, "its key rule 'coati' is also that of 'coati'"),
    ],
)
def test_rules_that_cannot_be_break_their_plugin(rules: Any, fault: str) -> None:
    with pytest.raises(llmload.PluginError) as caught:
        llmload.create_registry([SimpleNamespace(name="mine", key_rules=rules)], environ={})
    assert caught.value.problems[0].message == f"plugin 'mine' breaks the hook contract: {fault}"


@pytest.mark.parametrize(
    ("rule", "stored", "wanted"),
    [
        ("deepspeed_chat", "rwtranrsformer.h.0.w", "rwtransformer.h.0.w"),
        ("deepspeed_chat", "a.rwtranrsformer.h", "a.rwtranrsformer.h"),
        ("ddp", "module.module.w", "module.w"),
        ("ddp", "model.module.w", "model.module.w"),
        ("compiled", "_orig_mod.a._orig_mod.w", "a.w"),
        ("compiled", "not_orig_mod.w", "not_orig_mod.w"),
        ("fsdp", "_fsdp_wrapped_module.a._fsdp_wrapped_module.w", "a.w"),
        ("activation_checkpointing", "a._checkpoint_wrapped_module.w", "a.w"),
        ("fabric", "_forward_module.a.w", "a.w"),
        ("peft", "base_model.model.model.q_proj.base_layer.weight", "model.q_proj.weight"),
        ("peft", "base_model.model.q.lora_A.default.weight", "q.lora_A.weight"),
        ("peft", "base_model.model.e.lora_embedding_A.default", "e.lora_embedding_A"),
        ("peft", "base_model.model.score.modules_to_save.default.weight", "score.weight"),
        ("peft", "a.default.weight", "a.default.weight"),
    ],
)
def test_a_rule_undoes_what_it_names_and_nothing_else(rule: str, stored: str, wanted: str) -> None:
    renaming = Renaming([stored])
    renaming.by_rule(rule, RULES[rule])
    assert renaming.names == {stored: wanted}
    assert renaming.counts == {rule: int(stored != wanted)}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_compiled_model_saved_from_ddp_loads(loader: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    theirs = from_pretrained(AutoModelForCausalLM, folder)
    rename(folder, lambda key: "module._orig_mod." + key)
    result = load(folder, loader, key_rules=["ddp", "compiled"])
    assert differences(result.model, theirs) == []


def test_a_model_saved_from_within_peft_loads_if_its_adapter_may_be_left_out(
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tiny_llama(tmp_path)
    theirs = from_pretrained(AutoModelForCausalLM, folder)
    wrapped = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"])
    )
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = [f"model.layers.{n}.self_attn.q_proj.lora_{ab}.weight" for n in "01" for ab in "AB"]
    assert refusal(folder, key_rules=["peft"]) == (
        f"strict: the model has no place for {some(adapter)} of the checkpoint."
        " Map the keys with `key_map`, or list what may be left out in"
        " `strict: {allow_unexpected: [...]}`."
    )
    result = load(folder, key_rules=["peft"], strict={"allow_unexpected": [r"\.lora_[AB]\."]})
    assert differences(result.model, theirs) == []
    assert result.report.left_out == dict.fromkeys(adapter, "no place in the model")


# --- the rule for old coati -------------------------------------------------------------------


def saved_by_coati(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Do to the keys of a wrapper what ColossalAI v0.3.4 did when it saved one."""
    return {key.replace("model.", "", 1): value.clone() for key, value in state.items()}


def wrapped(model: torch.nn.Module, **others: torch.nn.Module) -> torch.nn.Module:
    """Make an ``Actor``, ``Critic`` or ``RewardModel``: the transformer is ``model``."""
    return torch.nn.ModuleDict({"model": model, **others})


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["actor", "plain model", "backbone of a critic"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_what_old_coati_saved_loads_by_the_models_own_names(
    model_type: str, kind: str, loader: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "saved", model_type)
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = from_pretrained(AutoModelForCausalLM, folder)
    exceptions: dict[str, Any] = {}
    if kind == "actor":
        state = wrapped(model).state_dict()
    elif kind == "plain model":
        state = model.state_dict()
    else:
        state = wrapped(model.base_model, value_head=torch.nn.Linear(16, 1)).state_dict()
        # transformers 4.51 names a key it has no place for with the prefix of the base model.
        head = r"^(transformer\.)?value_head"
        exceptions = {"allow_unexpected": [head], "allow_missing": ["^lm_head"]}
    save_file(saved_by_coati(state), folder / "model.safetensors", metadata={"format": "pt"})
    result = load(folder, loader, key_rules=["coati"], strict=exceptions or True)
    theirs_state = theirs.base_model.state_dict()
    ours_state = result.model.base_model.state_dict()
    assert ours_state.keys() == theirs_state.keys()
    assert all(torch.equal(value, theirs_state[name]) for name, value in ours_state.items())
    if kind != "backbone of a critic":
        assert differences(result.model, theirs) == []


def test_the_silent_loss_of_old_coatis_reward_models_cannot_happen(tmp_path: Path) -> None:
    """A reward model saved by coati lost its ``model.``; loading it back was not strict."""
    trained = wrapped(tiny_model("llama", auto_class="base", seed=1), head=torch.nn.Linear(16, 1))
    fresh = wrapped(tiny_model("llama", auto_class="base", seed=2), head=torch.nn.Linear(16, 1))
    state = saved_by_coati(trained.state_dict())
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    # What happened then: no error, and all but the head stayed as it was.
    assert len(fresh.load_state_dict(state, strict=False).missing_keys) == len(before) - 2
    kept = [name for name, value in fresh.state_dict().items() if torch.equal(value, before[name])]
    assert len(kept) == len(before) - 2

    # What happens here: a causal model, whose names have a `model.`, gets none of it unless asked.
    folder = tiny_llama(tmp_path)
    for name in ("head.weight", "head.bias"):
        del state[name]
    renamed = {f"net.{name}": value for name, value in state.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder)
    assert "strict: the checkpoint has no values for 'lm_head.weight', 'model." in message
    assert "strict: the model has no place for '" in message
    # Even where strictness is given up, everything that was lost is named.
    warnings = load(folder, strict=False).report.warnings
    assert [warning.partition("'")[0] for warning in warnings] == [
        "strict: the checkpoint has no values for ",
        "strict: the model has no place for ",
    ]
    # With the rule for it the whole model is there.
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    result = load(folder, key_rules=["coati"], auto_class="base")
    assert isinstance(result.model, LlamaModel)
    theirs = trained["model"].state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in result.model.state_dict().items())
    assert result.report.warnings == []


def test_a_key_that_two_names_may_have_become_is_refused() -> None:
    with pytest.raises(llmload.CheckpointError) as caught:
        undo_coati(["a.b", "c"], ["model.a.b", "a.model.b", "c"])
    assert str(caught.value) == (
        "key_rules: old coati may have made the key 'a.b' from 'a.model.b' or 'model.a.b'. Say"
        " which in `key_map`, instead of the rule `coati`."
    )


# --- weights_from -----------------------------------------------------------------------------


def archive(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Write what the trainer of the DPO reference code writes."""
    path = folder / "policy.pt"
    metrics = {"rewards_eval/accuracies": 0.75, "logps_eval/chosen": -12.5}
    torch.save({"step_idx": 96, "state": dict(state), "metrics": metrics}, path)
    return path


@opens_pickles
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_archive_of_the_dpo_reference_code_fills_the_model(
    model_type: str, loader: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "base", model_type)
    trained = tiny_model(model_type, seed=5)
    path = archive(tmp_path, trained.state_dict())
    result = load(folder, loader, weights_from=str(path), allow_pickle=True)
    ours, theirs = result.model.state_dict(), trained.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert result.model.name_or_path == str(folder)
    assert not result.model.training


@opens_pickles
@pytest.mark.parametrize("loader", LOADERS)
def test_an_archive_is_held_to_the_model_as_strictly_as_upstream_does(
    loader: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    state = tiny_model("llama").state_dict()
    state["extra"] = state.pop(NORM)
    path = archive(tmp_path, state)
    assert refusal(
        folder, loader, error=llmload.PlanError, weights_from=path, allow_pickle=True
    ) == (
        f"strict: the checkpoint has no values for {NORM!r}. Map the keys with `key_map`, or list"
        " what may be newly initialised in `strict: {allow_missing: [...]}`.\n"
        "strict: the model has no place for 'extra' of the checkpoint. Map the keys with"
        " `key_map`, or list what may be left out in `strict: {allow_unexpected: [...]}`."
    )


def test_an_archive_is_a_pickle_and_wants_leave(tmp_path: Path) -> None:
    path = archive(tmp_path, tiny_model("llama").state_dict())
    assert refusal(tiny_llama(tmp_path), weights_from=path) == (
        f"{path}: the only weights here are a pickle, and opening a pickle can run code. Convert it"
        " to safetensors elsewhere, or set allow_pickle: true with torch >= 2.10."
    )


@opens_pickles
def test_a_damaged_archive_is_refused_by_name(tmp_path: Path) -> None:
    path = archive(tmp_path, tiny_model("llama").state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(tiny_llama(tmp_path), weights_from=path, allow_pickle=True) == (
        f"{path}: the file is cut off or of torch's oldest layout. Save it again as safetensors, on"
        " a machine that may open pickles."
    )
    torch.save({"step_idx": 1, "state": [1], "metrics": {}}, path)
    assert refusal(tiny_llama(tmp_path), weights_from=path, allow_pickle=True) == (
        f"{path}: the pickle is no mapping of names to plain tensors. Save it again as safetensors,"
        " on a machine that may open pickles."
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_weights_may_come_from_another_folder_or_file(
    place: str, loader: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    other = tiny_llama(tmp_path, name="other", seed=3)
    result = load(folder, loader, weights_from=other / place)
    theirs = from_pretrained(AutoModelForCausalLM, other)
    theirs.config.name_or_path = str(folder)
    theirs.name_or_path = str(folder)
    assert differences(result.model, theirs) == []


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    assert refusal(tiny_llama(tmp_path), weights_from=tmp_path / "none.pt") == (
        f"{tmp_path / 'none.pt'}: there is no checkpoint at {tmp_path / 'none.pt'}. Check the path."
    )


# --- what plugins claim -----------------------------------------------------------------------


class Claiming:
    """Takes the final norm out of the checkpoint, and does with it as told."""

    name = "claiming"

    def __init__(self, answer: Any, does: str = "") -> None:
        self.answer = answer
        self.does = does

    @hookimpl
    def map_keys(self, ctx: Any, keys: tuple[str, ...]) -> Any:
        assert NORM in keys
        return self.answer

    @hookimpl
    def check(self, ctx: Any) -> None:
        ctx.to_initialise[NORM] = "made by the test"

    @hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if self.does == "read" and not ctx.rehearsing:
            with torch.no_grad():
                model.model.norm.weight.copy_(2 * ctx.read(NORM))
        elif self.does == "leave out":
            ctx.left_out[NORM] = "not wanted"
        return model


@pytest.mark.parametrize("loader", LOADERS)
def test_a_claimed_tensor_is_the_plugins_to_read(loader: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    result = load(folder, loader, (Claiming({NORM: None}, "read"),))
    stored = load_file(folder / "model.safetensors")[NORM]
    assert torch.equal(result.model.model.norm.weight, 2 * stored)
    assert result.report.newly_initialised[NORM] == "made by the test"
    assert result.report.left_out == {}


def test_a_claimed_tensor_may_be_left_out_with_a_reason(tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path), "streaming", (Claiming({NORM: None}, "leave out"),))
    assert result.report.left_out == {NORM: "not wanted"}


@pytest.mark.refused_late  # what a plugin reads shows when it does
def test_a_claimed_tensor_that_is_forgotten_is_an_error(tmp_path: Path) -> None:
    plugin = Claiming({NORM: None})
    error = llmload.AuditError
    assert refusal(tiny_llama(tmp_path), "streaming", (plugin,), error=error) == (
        f"{NORM!r} of the checkpoint were claimed by a plugin in map_keys, which neither read them"
        " nor said why they are left out. The plugin is at fault; report this to its makers."
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            ["a"],
            "plugin 'claiming' (given as an object) returned a list from map_keys, which must"
            " return a mapping of keys to new names or None",
        ),
        (
            {NORM: 1},
            "plugin 'claiming' (given as an object) returned a dict from map_keys, which must"
            " return a mapping of keys to new names or None",
        ),
        (
            {"a": "b"},
            "plugin 'claiming' (given as an object) renames 'a' in map_keys, which is no key"
            " of the checkpoint",
        ),
        (
            {NORM: "lm_head.weight"},
            f"key_map: the keys 'lm_head.weight', {NORM!r} of the checkpoint would all be called"
            " 'lm_head.weight'. Make the rules map each key to a name of its own",
        ),
    ],
    ids=["list", "number", "no key", "collision"],
)
def test_an_answer_that_makes_no_sense_is_refused(
    answer: Any, message: str, tmp_path: Path
) -> None:
    assert refusal(tiny_llama(tmp_path), "streaming", (Claiming(answer),)).rstrip(".") == message


@pytest.mark.parametrize(
    ("prefix", "rule"),
    [
        ("module.", "ddp"),
        ("_orig_mod.", "compiled"),
        ("_fsdp_wrapped_module.", "fsdp"),
        ("_checkpoint_wrapped_module.", "activation_checkpointing"),
        ("_forward_module.", "fabric"),
    ],
)
def test_the_refusal_of_wrapped_keys_names_the_rule_that_mends_it(
    tmp_path: Path, prefix: str, rule: str
) -> None:
    folder = tiny_llama(tmp_path)
    file = folder / "model.safetensors"
    save_file({prefix + key: value for key, value in load_file(file).items()}, file)
    with pytest.raises(llmload.RequestError, match=rf"Write `key_rules: \[{rule}\]`"):
        llmload.load({"model": str(folder)})
    llmload.load({"model": str(folder), "key_rules": [rule]})
