"""Spec files that must be refused, with every word of the refusal.

They are about core keys and the file format alone, so they are refused with the same words whatever
plugins are installed. ``test_spec.py`` validates them; the command line's tests run them again.
"""

from __future__ import annotations

from typing import NamedTuple


class BadSpec(NamedTuple):
    """One bad file and the lines of its refusal, in order, without the leading file name."""

    name: str
    text: str | bytes
    lines: tuple[str, ...]
    file: str = "spec.yaml"

    @property
    def message(self) -> str:
        """The refusal as it is printed when the file is given by its name alone."""
        return "\n".join(f"{self.file}:{line}" for line in self.lines)


BAD_SPECS = [
    # --- the file ---
    BadSpec(
        "empty file",
        "",
        ("1:1: the document is empty. Write at least `model: ...`.",),
    ),
    BadSpec(
        "only comments",
        "# model: gpt2\n",
        ("1:1: the document is empty. Write at least `model: ...`.",),
    ),
    BadSpec(
        "a list",
        "- model: gpt2\n",
        ("1:1: a spec is a mapping of keys to values, found a list. Write at least `model: ...`.",),
    ),
    BadSpec(
        "a single word",
        "gpt2\n",
        (
            "1:1: a spec is a mapping of keys to values, found a single value."
            " Write at least `model: ...`.",
        ),
    ),
    BadSpec(
        "not utf-8",
        "model: gpt2\n".encode("utf-16"),
        (" the spec file is not UTF-8 text: byte 0 is 0xff. Save it as UTF-8.",),
    ),
    BadSpec(
        "too large",
        "# " + "x" * 262144,
        (
            " the spec file is larger than 256 KiB. Check that it is a spec; give a spec of that"
            " size from Python.",
        ),
    ),
    BadSpec(
        "two documents",
        "model: gpt2\n---\nmodel: gpt3\n",
        ("2:1: a second document starts here. Keep one: remove `---` and what follows.",),
    ),
    # --- the syntax ---
    BadSpec(
        "tab indentation",
        "model: gpt2\nstrict:\n\tallow_missing: []\n",
        (
            "3:1: this is not valid YAML: found character '\\t' that cannot start any token."
            " Indent with spaces: YAML allows no tabs.",
        ),
    ),
    BadSpec(
        "colon in plain text",
        "model: see: here\n",
        (
            "1:11: this is not valid YAML: mapping values are not allowed here."
            " Put text that contains a colon in quotes, or mend the indentation.",
        ),
    ),
    BadSpec(
        "unclosed bracket",
        "model: gpt2\ncache_dir: [a, b\n",
        (
            "3:1: this is not valid YAML: expected ',' or ']', but got '<stream end>'."
            " Close the bracket.",
        ),
    ),
    BadSpec(
        "unclosed quotes",
        'model: "gpt2\n',
        ("2:1: this is not valid YAML: found unexpected end of stream. Close the quotes.",),
    ),
    BadSpec(
        "ragged indentation",
        "model: gpt2\n  dtype: float32\n",
        (
            "2:8: this is not valid YAML: mapping values are not allowed here."
            " Put text that contains a colon in quotes, or mend the indentation.",
        ),
    ),
    BadSpec(
        "outdented key",
        "model: gpt2\nstrict:\n    allow_missing: []\n  allow_unexpected: []\n",
        (
            "4:3: this is not valid YAML: expected <block end>, but found '<block mapping start>'."
            " Mend the indentation: keys of one mapping start in one column.",
        ),
    ),
    BadSpec(
        "at sign",
        "model: @gpt2\n",
        (
            "1:8: this is not valid YAML: found character '@' that cannot start any token."
            " Put the text in quotes.",
        ),
    ),
    BadSpec(
        "unknown alias",
        "model: *base\n",
        (
            "1:8: this is not valid YAML: found undefined alias 'base'."
            " Define the anchor above its first use, or put the text in quotes.",
        ),
    ),
    BadSpec(
        "control character",
        "model: gpt2\ndtype: \x07\n",
        (
            "2:8: the character U+0007 is not allowed in YAML."
            " Remove it; inside double quotes it can be written as an escape.",
        ),
    ),
    BadSpec(
        "python object",
        "model: !!python/object/apply:os.system [true]\n",
        (
            "1:8: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed:"
            " a spec is plain data. Remove the tag.",
        ),
    ),
    BadSpec(
        "harmless tag",
        "model: !!str gpt2\n",
        (
            "1:8: the tag 'tag:yaml.org,2002:str' is not allowed: a spec is plain data."
            " Remove the tag.",
        ),
    ),
    BadSpec(
        "duplicate key",
        "model: gpt2\ndtype: float32\nmodel: opt\n",
        ("3:1: model: the key stands twice, first on line 1, column 1. Keep one of the two.",),
    ),
    BadSpec(
        "duplicate key in a flow mapping",
        "model: gpt2\nstrict: {allow_missing: [a], allow_missing: [b]}\n",
        (
            "2:30: strict.allow_missing: the key stands twice, first on line 2, column 10."
            " Keep one of the two.",
        ),
    ),
    BadSpec(
        "duplicate key in JSON",
        '{"model": "gpt2",\n\t"model": "opt"}',
        ("2:2: model: the key stands twice, first on line 1, column 2. Keep one of the two.",),
        "spec.json",
    ),
    BadSpec(
        "trailing JSON",
        '{"model": "gpt2"} {}',
        (
            "1:19: this is not valid JSON: expected '<document start>', but found '{'."
            " Mend the indentation, or remove what follows the document.",
        ),
        "spec.json",
    ),
    BadSpec(
        "number as key",
        "model: gpt2\n1: x\n",
        ("2:1: a key must be text. Put it in quotes: '1'.",),
    ),
    BadSpec(
        "template left unfilled",
        "model: {{ model }}\n",
        (
            "1:9: model: a key must be text."
            " Put text that starts with a bracket or brace in quotes.",
        ),
    ),
    BadSpec(
        "merge of text",
        "model: gpt2\n<<: base\n",
        (
            "2:5: `<<` takes a mapping or a list of mappings."
            " Write `<<: *name`, with the anchor `&name` at a mapping.",
        ),
    ),
    BadSpec(
        "infinity",
        "model: gpt2\nrevision: -.inf\n",
        (
            "2:11: revision: -.inf is not a finite number."
            " Write a number, or put it in quotes if it is text.",
        ),
    ),
    BadSpec(
        "commit that reads as a number",
        "model: gpt2\nrevision: 12e34567\n",
        (
            "2:11: revision: 12e34567 is not a finite number."
            " Write a number, or put it in quotes if it is text.",
        ),
    ),
    BadSpec(
        "half a surrogate pair",
        'model: "\\ud83d"\n',
        (
            "1:8: model: the text has half of a surrogate pair, which is no character."
            " Write the whole pair, or the character itself.",
        ),
    ),
    BadSpec(
        "anchor inside itself",
        "model: &m [*m]\n",
        (
            "1:8: the document is nested deeper than 32 levels."
            " Flatten it; an anchor must not contain its own alias.",
        ),
    ),
    BadSpec(
        "deep nesting",
        "model: " + "[" * 40 + "]" * 40 + "\n",
        (
            "1:40: the document is nested deeper than 32 levels."
            " Flatten it; an anchor must not contain its own alias.",
        ),
    ),
    # --- keys ---
    BadSpec(
        "no model",
        "dtype: float32\n",
        ("1:1: model: the key is required. Add it, such as `model: EleutherAI/pythia-2.8b`.",),
    ),
    BadSpec(
        "misspelt key",
        "model: gpt2\ndtpye: float32\n",
        ("2:1: dtpye: unknown key. Did you mean 'dtype'?",),
    ),
    BadSpec(
        "misspelt key of strict",
        "model: gpt2\nstrict:\n  allow_missin: [a]\n",
        ("3:3: strict.allow_missin: unknown key. Did you mean 'allow_missing'?",),
    ),
    BadSpec(
        "core key in the wrong place",
        "model: gpt2\nstrict:\n  dtype: float32\n",
        ("3:3: strict.dtype: unknown key. Move it to the top level.",),
    ),
    BadSpec(
        "everything at once",
        "dtype: float8\nrevsion: main\nallow_pickle: 1\nmodel: ''\n",
        (
            "1:1: dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'float8'."
            " Weights of 8 bits are `kbit: {bits: 8}`.",
            "2:1: revsion: unknown key. Did you mean 'revision'?",
            "3:1: allow_pickle: expected true or false, found 1",
            "4:1: model: must have 1 or more characters, found ''",
        ),
    ),
    # --- values ---
    BadSpec(
        "model is a number",
        "model: 7\n",
        ("1:1: model: expected text, found 7. Put it in quotes.",),
    ),
    BadSpec(
        "model is missing its value",
        "model:\n",
        ("1:1: model: expected text, found nothing (null). Remove the key, or give it a value.",),
    ),
    BadSpec(
        "model as in OmegaConf",
        "model: {name_or_path: gpt2}\n",
        ("1:1: model: expected text, found a mapping",),
    ),
    BadSpec(
        "commit of digits",
        "model: gpt2\nrevision: 0123456\n",
        ("2:1: revision: expected text, found 123456. Put it in quotes.",),
    ),
    BadSpec(
        "dtype of other tools",
        "model: gpt2\ndtype: BF16\n",
        (
            "2:1: dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'BF16'."
            " Write bfloat16.",
        ),
    ),
    BadSpec(
        "dtype of torch",
        "model: gpt2\ndtype: torch.float16\n",
        (
            "2:1: dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found"
            " 'torch.float16'. Write float16.",
        ),
    ),
    BadSpec(
        "weights",
        "model: gpt2\nweights: none\n",
        ("2:1: weights: expected 'pretrained' or 'random', found 'none'",),
    ),
    BadSpec(
        "yes",
        "model: gpt2\ntrust_remote_code: yes\n",
        ("2:1: trust_remote_code: expected true or false, found 'yes'. Write true.",),
    ),
    BadSpec(
        "true in quotes",
        "model: gpt2\nlocal_files_only: 'true'\n",
        ("2:1: local_files_only: expected true or false, found 'true'. Remove the quotes.",),
    ),
    BadSpec(
        "class of transformers",
        "model: gpt2\nauto_class: AutoModelForCausalLM\n",
        (
            "2:1: auto_class: expected 'causal_lm', 'seq2seq_lm', 'sequence_classification',"
            " 'token_classification', 'image_text_to_text', 'base' or 'module:Class',"
            " found 'AutoModelForCausalLM'."
            " Write causal_lm.",
        ),
    ),
    BadSpec(
        "class path without a class",
        "model: gpt2\nauto_class: 'my.module:'\n",
        (
            "2:1: auto_class: expected 'causal_lm', 'seq2seq_lm', 'sequence_classification',"
            " 'token_classification', 'image_text_to_text', 'base' or 'module:Class',"
            " found 'my.module:'",
        ),
    ),
    BadSpec(
        "misspelt device",
        "model: gpt2\ndevice_map: cud:0\n",
        (
            "2:1: device_map: 'cud:0' is neither a device nor a way to spread the model."
            " Did you mean 'cuda'?",
        ),
    ),
    BadSpec(
        "negative device",
        "model: gpt2\ndevice_map: -1\n",
        (
            "2:1: device_map: -1 is neither a device nor a way to spread the model. Write auto,"
            " balanced, balanced_low_0, sequential, a device such as cuda:0, or a mapping of"
            " modules to devices.",
        ),
    ),
    BadSpec(
        "device of a module",
        "model: gpt2\ndevice_map: {lm_head: auto, wte: [0]}\n",
        (
            "2:14: device_map.lm_head: 'auto' is not a device."
            " Write one such as cpu, cuda, cuda:0 or 0.",
            "2:29: device_map.wte: expected a whole number or text, found a list",
        ),
    ),
    BadSpec(
        "disk",
        "model: gpt2\ndevice_map: {'': disk}\n",
        (
            "2:14: device_map['']: weights are not kept on a disk: no loader here does that. Write"
            " a device; ZeRO-3 keeps its partitions on one with `zero3: {offload_param: {device:"
            " nvme, nvme_path: ...}}`.",
        ),
    ),
    BadSpec(
        "disk alone",
        "model: gpt2\ndevice_map: disk\n",
        (
            "2:1: device_map: weights are not kept on a disk: no loader here does that. Write a"
            " device; ZeRO-3 keeps its partitions on one with `zero3: {offload_param: {device:"
            " nvme, nvme_path: ...}}`.",
        ),
    ),
    BadSpec(
        "places of max_memory",
        "model: gpt2\ndevice_map: auto\nmax_memory: {'cuda:1': 1GB, gpu: 1, disk: 1GB, '01': 1}\n",
        (
            "3:14: max_memory['cuda:1']: 'cuda:1' is no place for weights that `max_memory` knows."
            " Accelerators have numbers: write '1'.",
            "3:29: max_memory.gpu: 'gpu' is no place for weights that `max_memory` knows."
            " Write the number of an accelerator, such as '0', or cpu or mps.",
            "3:37: max_memory.disk: weights are not kept on a disk. Remove the key.",
            "3:48: max_memory.01: '01' is no place for weights that `max_memory` knows."
            " Write the number of an accelerator, such as '0', or cpu or mps.",
        ),
    ),
    BadSpec(
        "amounts of max_memory",
        "model: gpt2\ndevice_map: auto\nmax_memory: {'0': a lot, '1': -1, '2': 10Gb, cpu: [1]}\n",
        (
            "3:14: max_memory.0: 'a lot' is no amount of memory. Write bytes, or a number and a"
            " unit, such as 80GB (10**9 bytes) or 80GiB (2**30).",
            "3:26: max_memory.1: -1 is no amount of memory. Write bytes, or a number and a"
            " unit, such as 80GB (10**9 bytes) or 80GiB (2**30).",
            "3:35: max_memory.2: '10Gb' would be bits: transformers takes a small b for those."
            " Write '10GB' for bytes.",
            "3:46: max_memory.cpu: expected a whole number or text, found a list",
        ),
    ),
    BadSpec(
        "max_memory of nothing",
        "model: gpt2\ndevice_map: auto\nmax_memory: {}\n",
        ("3:1: max_memory: must have 1 or more entries, found 0",),
    ),
    BadSpec(
        "max_memory without device_map",
        "model: gpt2\nmax_memory: {cpu: 60GiB}\n",
        (
            "1:1: `max_memory` says how far `device_map` spreads a model, and there is none."
            " Write `device_map: auto`, or remove `max_memory`.",
        ),
    ),
    BadSpec(
        "max_memory beside a device",
        "model: gpt2\ndevice_map: cpu\nmax_memory: {cpu: 60GiB}\n",
        (
            "1:1: `max_memory` says how far `device_map` spreads a model, and it names devices"
            " itself. Write `device_map: auto`, or remove `max_memory`.",
        ),
    ),
    BadSpec(
        "device map is a list",
        "model: gpt2\ndevice_map: [cuda]\n",
        ("2:1: device_map: expected a whole number, text or a mapping, found a list",),
    ),
    BadSpec(
        "cache_dir of numbers",
        "model: gpt2\ncache_dir: [a, 1]\n",
        ("2:16: cache_dir[1]: expected text, found 1. Put it in quotes.",),
    ),
    BadSpec(
        "strict is text",
        "model: gpt2\nstrict: off\n",
        ("2:1: strict: expected true or false or a mapping, found 'off'. Write false.",),
    ),
    BadSpec(
        "strict exception is no list",
        "model: gpt2\nstrict: {allow_missing: lm_head}\n",
        ("2:10: strict.allow_missing: expected a list, found 'lm_head'. Write [lm_head].",),
    ),
    BadSpec(
        "strict exception is no regular expression",
        "model: gpt2\nstrict: {allow_missing: [a, '*.bias']}\n",
        (
            "2:29: strict.allow_missing[1]: '*.bias' is not a regular expression: nothing to"
            " repeat at position 0. To match the text as it stands, write '\\\\*\\\\.bias'.",
        ),
    ),
    BadSpec(
        "key_map pattern",
        "model: gpt2\nkey_map: {'^(a': b}\n",
        (
            "2:11: key_map['^(a']: '^(a' is not a regular expression: missing ), unterminated"
            " subpattern at position 1. To match the text as it stands, write '\\\\^\\\\(a'.",
        ),
    ),
    BadSpec(
        "key_map replacement",
        "model: gpt2\nkey_map: {'^a': '\\2'}\n",
        (
            "2:1: key_map: the replacement '\\\\2' does not fit the pattern '^a': invalid group"
            " reference 2 at position 1. Number the groups of the pattern from \\1, and write a"
            " backslash as \\\\.",
        ),
    ),
    BadSpec(
        "key_map is a list",
        "model: gpt2\nkey_map: [a, b]\n",
        (
            "2:1: key_map: expected a mapping, found a list. `llmload explain key_map` shows what"
            " it takes.",
        ),
    ),
    # --- other tools' spellings ---
    BadSpec(
        "TRL",
        "model_name_or_path: gpt2\ntorch_dtype: bfloat16\nlora_r: 16\nload_in_4bit: true\n",
        (
            "1:1: model: the key is required. Add it, or have a spec made of the whole file:"
            " `llmload convert spec.yaml`.",
            "1:1: model_name_or_path: unknown key, known from TRL, LLaMA-Factory and"
            " DeepSpeed-Chat. Write `model: gpt2`.",
            "2:1: torch_dtype: unknown key, known from transformers, TRL and ms-swift."
            " Write `dtype: bfloat16`.",
            "3:1: lora_r: unknown key, known from TRL and axolotl. Write `lora: {r: 16}`.",
            "4:1: load_in_4bit: unknown key, known from transformers, TRL and axolotl."
            " Write `kbit: {bits: 4}`.",
        ),
    ),
    BadSpec(
        "axolotl",
        "model: gpt2\nmodel_type: AutoModelForCausalLM\nadapter: qlora\nflash_attention: true\n"
        "load_in_8bit: false\ndeepspeed: ds_zero3.json\n",
        (
            "2:1: model_type: unknown key, known from axolotl. Write `auto_class: causal_lm`.",
            "3:1: adapter: unknown key, known from axolotl."
            " Write `kbit: {bits: 4}` and `lora: {}`.",
            "4:1: flash_attention: unknown key, known from axolotl."
            " Write `attn_implementation: flash_attention_2`.",
            "5:1: load_in_8bit: unknown key, known from transformers, TRL and axolotl."
            " Remove it: that is what happens without it.",
            "6:1: deepspeed: unknown key, known from transformers, axolotl and LLaMA-Factory."
            " Write `zero3: {config: ds_zero3.json}`.",
        ),
    ),
    BadSpec(
        "LLaMA-Factory",
        "model: gpt2\nlora_target: q_proj,v_proj\nlora_rank: 8\nquantization_bit: 4\n"
        "flash_attn: fa2\nnew_special_tokens: <a>, <b>\n",
        (
            "2:1: lora_target: unknown key, known from LLaMA-Factory."
            " Write `lora: {target_modules: [q_proj, v_proj]}`.",
            "3:1: lora_rank: unknown key, known from LLaMA-Factory, ms-swift and ColossalChat."
            " Write `lora: {r: 8}`.",
            "4:1: quantization_bit: unknown key, known from LLaMA-Factory."
            " Write `kbit: {bits: 4}`.",
            "5:1: flash_attn: unknown key, known from LLaMA-Factory."
            " Write `attn_implementation: flash_attention_2`.",
            "6:1: new_special_tokens: unknown key, known from LLaMA-Factory and ms-swift. Write"
            " `tokenizer: {add_special_tokens: {additional_special_tokens: [<a>, <b>]}}` and"
            " `embeddings: {}`.",
        ),
    ),
    BadSpec(
        "a token",
        "model: gpt2\ntoken: hf_abcdefghijklmnopqrstuvwxyz012345\n",
        (
            "2:1: token: unknown key, known from transformers."
            " Remove it and set the environment variable HF_TOKEN: a spec holds no secrets.",
        ),
    ),
    BadSpec(
        "a token in the wrong place",
        "model: gpt2\ndtype: hf_abcdefghijklmnopqrstuvwxyz012345\n",
        (
            "2:1: dtype: expected 'auto', 'float32', 'bfloat16' or 'float16',"
            " found a value that is not shown",
        ),
    ),
    BadSpec(
        "a training setting",
        "model: gpt2\nlearning_rate: 1e-4\n",
        (
            "2:1: learning_rate: unknown key, known from training scripts."
            " Remove it and give it to the trainer: llmload only loads the model.",
        ),
    ),
]
