"""Loads that must be refused, with every word of the refusal: bad folders and misfits.

Each starts from a copy of a tiny Llama in three shards, with a tokenizer that has no pad token.
``test_cli_refusals.py`` gives them to the command line, beside the files of ``bad_specs.py``.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from stacks import IS_MODERN

from llmload.testing import edit_config

Damage = Callable[[Path], object]

INDEX = "model.safetensors.index.json"
FIRST, LAST = (f"model-0000{n}-of-00003.safetensors" for n in (1, 3))
ADAPTER = "adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
RESUME = "lora: {adapter: {folder}/adapter}"

# Transformers' own words and files, which changed with version 5.
TOKENIZER_FILES = (
    "tokenizer.json, tokenizer_config.json"
    if IS_MODERN
    else "special_tokens_map.json, tokenizer.json, tokenizer_config.json"
)
DAMAGED = (
    "Expecting value: line 1 column 1 (char 0)"
    if IS_MODERN
    else "expected value at line 1 column 1"
)


class BadLoad(NamedTuple):
    """One bad load: what the spec says, the answer, and what is done to the folder before.

    ``{folder}`` and ``{parent}`` stand for the model folder and the folder that it is in.
    """

    name: str
    spec: str
    """Keys of the spec; ``model: {folder}`` goes before them, unless they begin with a model."""
    message: str
    damage: Damage = lambda folder: None

    @property
    def text(self) -> str:
        """The whole spec."""
        return self.spec if self.spec.startswith("model:") else f"model: {{folder}}\n{self.spec}"


# --- damage -------------------------------------------------------------------------------------


def written(name: str, content: str | bytes) -> Damage:
    """Put other content into a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def config(**fields: Any) -> Damage:
    """Change fields of ``config.json``."""
    return lambda folder: edit_config(folder, **fields)


def removed(*patterns: str) -> Damage:
    """Remove files."""

    def damage(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = LAST) -> Damage:
    """Change the tensors of a file."""

    def damage(folder: Path) -> None:
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name, metadata={"format": "pt"})

    return damage


def index(name: str, shard: str) -> Damage:
    """Let the index place a tensor in another shard."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"][name] = shard
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def duplicate_in_index(folder: Path) -> None:
    """Name a tensor twice."""
    text = (folder / INDEX).read_text()
    twice = f'"weight_map": {{"lm_head.weight": "{FIRST}",'
    (folder / INDEX).write_text(text.replace('"weight_map": {', twice))


def cut_off(folder: Path) -> None:
    """Lose the last 100 bytes of the last shard."""
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-100])


def linked_out(folder: Path) -> None:
    """Leave a link where the first shard was."""
    target = folder.parent / "elsewhere.safetensors"
    (folder / FIRST).rename(target)
    (folder / FIRST).symlink_to(target)


def pickled(folder: Path) -> None:
    """Leave no weights but a pickle."""
    removed("*.safetensors*")(folder)
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def padded(folder: Path) -> None:
    """Give the tokenizer a pad token."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<unk>"}))


def adapter(damage: Damage = lambda folder: None) -> Damage:
    """Put the saved adapter beside the weights, and damage it."""

    def place(folder: Path) -> None:
        shutil.copytree(folder.parent.parent / "adapter", folder / "adapter")
        damage(folder / "adapter")

    return place


def pickled_adapter(folder: Path) -> None:
    """Leave the weights of an adapter under the name of a pickle."""
    (folder / ADAPTER).rename(folder / "adapter_model.bin")


BAD_LOADS = [
    # --- the place ---
    BadLoad(
        "folder that is not there",
        "model: nowhere/model",
        (
            "model: 'nowhere/model' is not a folder, and the hub repository of that name is"
            " neither in the cache nor could it be fetched (HF_HUB_OFFLINE is set). Give a"
            " local folder, or fetch it beforehand with `hf download`."
        ),
    ),
    BadLoad(
        "hub repository that is not in the cache",
        "model: org/name",
        (
            "model: 'org/name' is not a folder, and the hub repository of that name is neither"
            " in the cache nor could it be fetched (HF_HUB_OFFLINE is set). Give a local"
            " folder, or fetch it beforehand with `hf download`."
        ),
    ),
    BadLoad(
        "one word",
        "model: pythia",
        (
            "model: 'pythia' is not a folder, and the hub repository of that name is neither"
            " in the cache nor could it be fetched (HF_HUB_OFFLINE is set). Give a local"
            " folder, or fetch it beforehand with `hf download`."
        ),
    ),
    BadLoad(
        "revision of a folder",
        "revision: main",
        (
            "revision: revision 'main' was asked for, but '{folder}' is a local folder, which"
            " has none. Remove `revision`, or give the id of a hub repository."
        ),
    ),
    BadLoad(
        "subfolder that is not there",
        "subfolder: nowhere",
        (
            "model: the folder '{folder}/nowhere' holds no config.json. Give a folder written"
            " by save_pretrained."
        ),
    ),
    # --- the config ---
    BadLoad(
        "no config",
        "",
        (
            "model: the folder '{folder}' holds no config.json. Give a folder written by"
            " save_pretrained."
        ),
        removed("config.json"),
    ),
    BadLoad(
        "config that is not JSON",
        "",
        (
            "{folder}/config.json: the config is not valid JSON: Expecting value: line 1 column"
            " 1 (char 0). Save or download the folder again."
        ),
        written("config.json", "oops"),
    ),
    BadLoad(
        "config that is a list",
        "",
        (
            "{folder}/config.json: the config is a JSON list, not an object. Save or download"
            " the folder again."
        ),
        written("config.json", "[]"),
    ),
    BadLoad(
        "config that runs code",
        "",
        (
            "{folder}/config.json: _attn_implementation_internal: the config sets"
            " '_attn_implementation_internal' to 'org/kernel', by which a model folder can make"
            " code run that nobody here chose. Remove the key from the config, or set"
            " `trust_remote_code: true` if you trust whoever made the folder."
        ),
        config(_attn_implementation_internal="org/kernel"),
    ),
    BadLoad(
        "config of a model with own code",
        "",
        (
            "{folder}/config.json: transformers has no model type 'own', and the folder brings"
            " code of its own for it. Set `trust_remote_code: true` if you trust whoever made it."
        ),
        config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
    ),
    # --- the class ---
    BadLoad(
        "head that the model type lacks",
        "auto_class: seq2seq_lm",
        (
            "auto_class: model type 'llama' has no class for 'seq2seq_lm'. Use one of"
            " causal_lm, sequence_classification, token_classification, base, or"
            " `module:Class`."
        ),
    ),
    BadLoad(
        "module that is not there",
        "auto_class: no_such_module:Model",
        (
            "auto_class: 'no_such_module:Model' cannot be imported: No module named"
            " 'no_such_module'. Write it as `module:Class`, and check that the module is on the"
            " path."
        ),
    ),
    BadLoad(
        "class that is not there",
        "auto_class: transformers:LlamaForCausalLMs",
        (
            "auto_class: 'transformers:LlamaForCausalLMs' cannot be imported: module"
            " transformers has no attribute LlamaForCausalLMs. Write it as `module:Class`, and"
            " check that the module is on the path."
        ),
    ),
    BadLoad(
        "class of something else",
        "auto_class: collections:OrderedDict",
        (
            "auto_class: 'collections:OrderedDict' is not a subclass of"
            " transformers.PreTrainedModel. Name a model class, such as"
            " `transformers:LlamaForCausalLM`."
        ),
    ),
    # --- the files ---
    BadLoad(
        "no weights",
        "",
        (
            "{folder}: the folder holds neither model.safetensors nor"
            " model.safetensors.index.json; found config.json, generation_config.json,"
            f" {TOKENIZER_FILES}. Give a folder written by save_pretrained, or name where the"
            " weights are in `weights_from`."
        ),
        removed("*.safetensors*"),
    ),
    BadLoad(
        "pickle alone",
        "",
        (
            "{folder}/pytorch_model.bin: the only weights here are a pickle, and opening a"
            " pickle can run code. Convert it to safetensors elsewhere, or set allow_pickle:"
            " true with torch >= 2.10."
        ),
        pickled,
    ),
    BadLoad(
        "truncated shard",
        "",
        (
            "{folder}/model-00003-of-00003.safetensors: the file is cut off: expected 8312"
            " bytes, found 8212. Download or save the file again."
        ),
        cut_off,
    ),
    BadLoad(
        "missing shard",
        "",
        (
            "{folder}/model-00003-of-00003.safetensors: the file is missing. Download or save"
            " the folder again."
        ),
        removed(LAST),
    ),
    BadLoad(
        "empty shard",
        "",
        (
            "{folder}/model-00003-of-00003.safetensors: the file has 0 bytes, too few for a"
            " safetensors header. Download or save the file again."
        ),
        written(LAST, b""),
    ),
    BadLoad(
        "enormous header",
        "",
        (
            "{folder}/model-00003-of-00003.safetensors: the header claims 1099511627776 bytes,"
            " more than the 25000000 allowed. Download or save the file again."
        ),
        written(LAST, struct.pack("<Q", 2**40) + b"{}"),
    ),
    BadLoad(
        "header of something else",
        "",
        (
            "{folder}/model-00003-of-00003.safetensors: the header does not begin with '{'."
            " Download or save the file again."
        ),
        written(LAST, struct.pack("<Q", 8) + b"garbage!"),
    ),
    BadLoad(
        "link out of the folder",
        "",
        (
            "{folder}/model-00001-of-00003.safetensors: a link leads out of the model folder,"
            " to {parent}/elsewhere.safetensors. Copy the file into the folder, or name the"
            " folder that holds it."
        ),
        linked_out,
    ),
    BadLoad(
        "index that leads out of the folder",
        "",
        (
            "{folder}: the index names the shard '../x.safetensors', which is not a"
            " .safetensors file here"
        ),
        index("lm_head.weight", "../x.safetensors"),
    ),
    BadLoad(
        "index that leads to a pickle",
        "",
        "{folder}: the index names the shard 'model.bin', which is not a .safetensors file here",
        index("lm_head.weight", "model.bin"),
    ),
    BadLoad(
        "index with a tensor twice",
        "",
        (
            "{folder}/model.safetensors.index.json: the index is unreadable: key"
            " 'lm_head.weight' appears twice"
        ),
        duplicate_in_index,
    ),
    BadLoad(
        "index that is not JSON",
        "",
        (
            "{folder}/model.safetensors.index.json: the index is unreadable: not JSON at"
            " character 0: Expecting value"
        ),
        written(INDEX, "oops"),
    ),
    BadLoad(
        "index without a map",
        "",
        (
            "{folder}/model.safetensors.index.json: the index has no weight_map of tensor names"
            " to file names"
        ),
        written(INDEX, "{}"),
    ),
    BadLoad(
        "tensor in another shard than the index says",
        "",
        (
            "{folder}/model.safetensors.index.json: the index does not list"
            " model-00003-of-00003.safetensors, which lies beside its shards. Download or save"
            " the whole folder again."
        ),
        index("lm_head.weight", FIRST),
    ),
    BadLoad(
        "tensor that the index does not list",
        "",
        (
            "{folder}/model-00003-of-00003.safetensors: the shard holds 'x', which the index"
            " does not list. Download or save the whole folder again."
        ),
        tensors(lambda t: t.update(x=torch.zeros(1))),
    ),
    # --- the keys ---
    BadLoad(
        "checkpoint that lacks a parameter",
        "",
        (
            "strict: the checkpoint has no values for 'model.layers.2.input_layernorm.weight',"
            " 'model.layers.2.mlp.down_proj.weight', 'model.layers.2.mlp.gate_proj.weight'"
            " and 6 more. Map the keys with"
            " `key_map`, or list what may be newly initialised in `strict: {allow_missing:"
            " [...]}`."
        ),
        config(num_hidden_layers=3),
    ),
    BadLoad(
        "checkpoint that has too much",
        "",
        (
            "strict: the model has no place for 'model.layers.1.input_layernorm.weight',"
            " 'model.layers.1.mlp.down_proj.weight', 'model.layers.1.mlp.gate_proj.weight'"
            " and 6 more of the checkpoint."
            " Map the keys with `key_map`, or list what may be left out in `strict:"
            " {allow_unexpected: [...]}`."
        ),
        config(num_hidden_layers=1),
    ),
    BadLoad(
        "tensor of another shape",
        "",
        (
            "lm_head.weight: the checkpoint has float32 (128, 16), the model takes float32"
            " (100, 16). Check that config.json and weights belong together.\n"
            "model.embed_tokens.weight: the checkpoint has float32 (128, 16), the model takes"
            " float32 (100, 16). Check that config.json and weights belong together."
        ),
        config(vocab_size=100),
    ),
    BadLoad(
        "keys mapped onto others",
        "key_map: {layers.0.mlp.down_proj: embed_tokens}",
        (
            "key_map: the keys 'model.embed_tokens.weight',"
            " 'model.layers.0.mlp.down_proj.weight' of the checkpoint would all be called"
            " 'model.embed_tokens.weight'. Make the rules map each key to a name of its own."
        ),
    ),
    # --- tokenizer and embeddings ---
    BadLoad(
        "pad token that is not in the vocabulary",
        "tokenizer: {pad_token: '[PAD]'}",
        (
            "tokenizer.pad_token: the pad token '[PAD]' is not among the 51 tokens of the"
            " vocabulary. List it in `tokenizer.add_tokens` to add it."
        ),
    ),
    BadLoad(
        "another pad token",
        "tokenizer: {pad_token: eos}",
        (
            "tokenizer.pad_token: the tokenizer already has the pad token '<unk>', and '</s>'"
            " was asked for. Set `tokenizer.keep_pad: true` to keep it, or `overwrite_pad: true`."
        ),
        padded,
    ),
    BadLoad(
        "tokenizer wanted where there is none",
        "tokenizer: {padding_side: right}",
        (
            "tokenizer.name_or_path: the folder '{folder}' holds no tokenizer files. Name a"
            " folder or hub id that holds some in `tokenizer.name_or_path`, or remove the"
            " section `tokenizer`."
        ),
        removed("tokenizer*"),
    ),
    BadLoad(
        "damaged tokenizer",
        "",
        (
            f"tokenizer.name_or_path: the tokenizer in '{{folder}}' cannot be loaded: {DAMAGED}."
            " Save or download it again, or name another in `tokenizer.name_or_path`."
        ),
        written("tokenizer.json", "oops"),
    ),
    BadLoad(
        "unknown side",
        "tokenizer: {padding_side: middle}",
        "spec.yaml:2:13: tokenizer.padding_side: expected 'left' or 'right', found 'middle'",
    ),
    BadLoad(
        "chat template that is not there",
        "tokenizer: {chat_template: nowhere.jinja}",
        (
            "tokenizer.chat_template: the chat template file 'nowhere.jinja' does not exist."
            " Write the template itself, the path of a file that holds it, or a folder or hub id"
            " whose tokenizer has one."
        ),
    ),
    BadLoad(
        "name of a template in another tool",
        "tokenizer: {chat_template: chatml}",
        (
            "tokenizer.chat_template: 'chatml' is no chat template: it has no `{{` and no `{%`, and"
            " no file or folder is called so. Write the template itself, the path of a file that"
            " holds it, or a folder or hub id whose tokenizer has one."
        ),
    ),
    BadLoad(
        "multiple of nothing",
        "embeddings: {pad_to_multiple_of: 0}",
        "spec.yaml:2:14: embeddings.pad_to_multiple_of: must be 1 or more, found 0",
    ),
    BadLoad(
        "misspelt initialisation of rows",
        "embeddings: {init_new: means}",
        (
            "spec.yaml:2:14: embeddings.init_new: expected 'mean', 'normal' or 'zero', found"
            " 'means'. Did you mean 'mean'?"
        ),
    ),
    # --- dropout and checkpointing ---
    BadLoad(
        "certain dropout",
        "dropout: {p: 1.5}",
        "spec.yaml:2:11: dropout.p: must be less than 1.0, found 1.5",
    ),
    BadLoad(
        "unknown key of dropout",
        "dropout: {prob: 0.1}",
        "spec.yaml:2:11: dropout.prob: unknown key. Known keys are: p.",
    ),
    BadLoad(
        "misspelt key of gradient checkpointing",
        "gradient_checkpointing: {use_rentrant: false}",
        (
            "spec.yaml:2:26: gradient_checkpointing.use_rentrant: unknown key. Did you mean"
            " 'use_reentrant'?"
        ),
    ),
    # --- lora ---
    BadLoad(
        "rank 0",
        "lora: {r: 0}",
        (
            "spec.yaml:2:8: lora.r: a LoRA of rank 0 has no parameters. Give a rank of 1 or"
            " more, or remove the section `lora` to load without an adapter."
        ),
    ),
    BadLoad(
        "section that is a number",
        "lora: 8",
        (
            "spec.yaml:2:1: lora: expected a mapping, found 8. `llmload explain lora` shows what it"
            " takes."
        ),
    ),
    BadLoad(
        "target that matches nothing",
        "lora: {target_modules: [query]}",
        (
            "lora.target_modules: no module of LlamaForCausalLM is called 'query'. Names are"
            " down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj,"
            " v_proj."
        ),
    ),
    BadLoad(
        "module to save that matches nothing",
        "lora: {target_modules: [q_proj], modules_to_save: [score]}",
        (
            "lora.modules_to_save: no module of LlamaForCausalLM is called 'score'. Names are"
            " down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj,"
            " v_proj."
        ),
    ),
    BadLoad(
        "dropout of the adapter",
        "lora: {lora_dropout: 1.5}",
        "spec.yaml:2:8: lora.lora_dropout: must be less than 1.0, found 1.5",
    ),
    BadLoad(
        "misspelt initialisation",
        "lora: {init_lora_weights: pisa}",
        (
            "spec.yaml:2:8: lora.init_lora_weights: 'pisa' is not an initialisation of PEFT."
            " Did you mean 'pissa'?"
        ),
    ),
    BadLoad(
        "adapter that is not there",
        RESUME,
        (
            "lora.adapter: the adapter folder '{folder}/adapter' does not exist. Give a folder"
            " written by save_pretrained of a PeftModel."
        ),
    ),
    BadLoad(
        "adapter with a missing key",
        RESUME,
        (
            "lora.adapter: the adapter in '{folder}/adapter' lacks"
            " 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'. Save it again,"
            " complete; or check that model and adapter belong together."
        ),
        adapter(tensors(lambda t: t.pop(LORA_A), ADAPTER)),
    ),
    BadLoad(
        "adapter with a key too many",
        RESUME,
        (
            "lora.adapter: the model has no place for 'x' of the adapter in '{folder}/adapter'."
            " Check that model and adapter belong together."
        ),
        adapter(tensors(lambda t: t.update(x=torch.zeros(1)), ADAPTER)),
    ),
    BadLoad(
        "adapter of another shape",
        RESUME,
        (
            "lora.adapter: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' has"
            " the shape [8, 16] in '{folder}/adapter' and [4, 16] in the model. Check that"
            " model and adapter belong together, and that the embeddings have the adapter's"
            " size."
        ),
        adapter(tensors(lambda t: t.update({LORA_A: torch.zeros(8, 16)}), ADAPTER)),
    ),
    BadLoad(
        "adapter in a pickle",
        RESUME,
        (
            "lora.adapter: the adapter's weights in '{folder}/adapter' are a pickle, which can"
            " run code when opened. Load it elsewhere with PEFT and save it again, which writes"
            " adapter_model.safetensors."
        ),
        adapter(pickled_adapter),
    ),
    BadLoad(
        "another rank than the adapter's",
        "lora: {adapter: {folder}/adapter, r: 2}",
        (
            "lora.r: the section says 2, and the adapter in '{folder}/adapter' says 4. Remove"
            " `r` from the section."
        ),
        adapter(),
    ),
    # --- keys of other tools, and sections that conflict ---
    BadLoad(
        "misspelt section",
        "lorra: {r: 8}",
        "spec.yaml:2:1: lorra: unknown key. Did you mean 'lora'?",
    ),
    BadLoad(
        "spelling of TRL",
        "lora_r: 8",
        "spec.yaml:2:1: lora_r: unknown key, known from TRL and axolotl. Write `lora: {r: 8}`.",
    ),
    BadLoad(
        "spelling of LLaMA-Factory",
        "lora: {rank: 8}",
        (
            "spec.yaml:2:8: lora.rank: unknown key, known from LLaMA-Factory and ms-swift."
            " Write `lora: {r: 8}`."
        ),
    ),
    BadLoad(
        "random weights to quantise",
        "weights: random\nkbit: {bits: 4}",
        (
            "kbit: 'kbit' cannot be combined with 'weights': random weights are not read, so"
            " nothing can be quantised on the way. Remove `kbit`, or load a checkpoint."
        ),
    ),
    BadLoad(
        "PiSSA of a quantised model",
        "kbit: {bits: 4}\nlora: {target_modules: all-linear, init_lora_weights: pissa}",
        (
            "lora: 'lora' cannot be combined with 'kbit': this `init_lora_weights` decomposes"
            " weights that are not quantised. Use `init_lora_weights: true` or olora, or"
            " prepare adapter and residual model beforehand from the unquantised model."
        ),
    ),
]
