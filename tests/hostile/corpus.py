"""Model folders that somebody made to do harm, each with what a refusal must name.

Every row starts from a copy of a sound folder; :func:`rows` yields them all. A row that says
``IMMUNE`` loads as if the harm were not there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

Damage = Callable[[Path], object]

IMMUNE = ""
WEIGHTS = "model.safetensors"
MANY = 10**6


class Row(NamedTuple):
    """One hostile folder."""

    name: str
    damage: Damage
    """Done to the copy of the folder."""
    says: str
    """What the refusal must name: a key, a file, a limit; ``IMMUNE``."""
    spec: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Further keys; ``{folder}`` in a text stands for the folder."""


class Canary:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


# --- damage -------------------------------------------------------------------------------------


def fields(name: str, **changed: Any) -> Damage:
    """Change keys of a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | changed))

    return damage


def written(name: str, content: bytes | str) -> Damage:
    """Put other content into a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def link(name: str, target: str) -> Damage:
    """Leave a link in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def moved_out(name: str) -> Damage:
    """Leave a link to the file itself, which now lies outside the folder."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        (folder / name).symlink_to(folder.parent / f"outside-{name}")

    return damage


def fifo(name: str) -> Damage:
    """Leave a fifo that nobody writes to."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def directory(name: str) -> Damage:
    """Leave a folder in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def enormous(name: str) -> Damage:
    """Make a file eight GiB long, none of which is on the disk."""
    return lambda folder: os.truncate(folder / name, 8 << 30)


def header(entries: dict[str, Any], data: bytes = b"") -> Damage:
    """Put another header before other bytes of weights."""
    text = json.dumps(entries).encode()
    return written(WEIGHTS, struct.pack("<Q", len(text)) + text + data)


def tensor(shape: list[int], start: int = 0, nbytes: int = 0, dtype: str = "F32") -> dict[str, Any]:
    """An entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + nbytes]}


def tokens(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change ``tokenizer.json``."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def archive(make: Callable[[Path, bytes], object]) -> Damage:
    """Replace the weights by ``pytorch_model.bin``, made of the bytes of a sound one."""

    def damage(folder: Path) -> None:
        sound = io.BytesIO()
        torch.save(load_file(folder / WEIGHTS), sound)
        (folder / WEIGHTS).unlink()
        make(folder / "pytorch_model.bin", sound.getvalue())

    return damage


def bomb(path: Path, sound: bytes) -> None:
    """Write an archive of a few KB that unpacks to 64 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/byteorder", b"l" * 2**26)
        made.writestr("archive/data.pkl", b"")


def canary(name: str) -> Damage:
    """Leave a pickle that runs code."""
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Canary()))


def both(*damages: Damage) -> Damage:
    """Do several things."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def adapter(damage: Damage = lambda folder: None) -> Damage:
    """Damage the adapter that lies in ``adapter``."""
    return lambda folder: damage(folder / "adapter")


def config(**changed: Any) -> Damage:
    """Change keys of ``config.json``."""
    return fields("config.json", **changed)


# --- the rows -----------------------------------------------------------------------------------


def rows() -> Iterator[Row]:
    """Yield every hostile folder."""
    yield from _pickles()
    yield from _code()
    yield from _malformed()
    yield from _without_bound()
    yield from _links_and_devices()
    yield from _tokenizers()
    yield from _adapters()


def _pickles() -> Iterator[Row]:
    bait = canary("adapter_model.bin")
    yield Row(
        "weights named by the config are a pickle",
        both(bait, config(transformers_weights="adapter_model.bin")),
        "adapter_model.bin",
    )
    yield Row(
        "weights named by the config are a pickle that runs code, and pickles are allowed",
        both(bait, config(transformers_weights="adapter_model.bin")),
        "adapter_model.bin",
        {"allow_pickle": True},
    )
    for target in ("/dev/zero", "../x.safetensors", "config.json", ["a"], {"a": 1}):
        damage = config(transformers_weights=target)
        yield Row(f"weights named by the config are {target}", damage, "")._replace(
            says="transformers_weights" if not isinstance(target, str) else target
        )
    index = json.dumps({"weight_map": {"a": "adapter_model.bin"}})
    yield Row(
        "an index named by the config leads to a pickle",
        both(
            bait,
            written("x.safetensors.index.json", index),
            config(transformers_weights="x.safetensors.index.json"),
        ),
        "adapter_model.bin",
    )
    yield Row(
        "an index named by the config is a fifo",
        both(
            fifo("x.safetensors.index.json"),
            config(transformers_weights="x.safetensors.index.json"),
        ),
        "x.safetensors.index.json",
    )
    beside = [canary(name) for name in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    yield Row("pickles lie beside the weights", both(bait, *beside), IMMUNE)
    allowed = {"allow_pickle": True}
    made: dict[str, Callable[[Path, bytes], object]] = {
        "a pickle that runs code": lambda path, sound: path.write_bytes(pickle.dumps(Canary())),
        "an archive that runs code": lambda path, sound: torch.save({"a": Canary()}, path),
        "a zip bomb": bomb,
        "cut off": lambda path, sound: path.write_bytes(sound[:-100]),
        "empty": lambda path, sound: path.write_bytes(b""),
        "of zeros": lambda path, sound: path.write_bytes(b"\0" * 1000),
        "a list": lambda path, sound: torch.save([1], path),
        "sparse": lambda path, sound: torch.save({"a": torch.ones(2, 2).to_sparse()}, path),
        "of a bad name": lambda path, sound: torch.save({"../x": torch.ones(2)}, path),
        "expanded": lambda path, sound: torch.save({"a": torch.ones(1).expand(MANY)}, path),
        "of an odd dtype": lambda path, sound: torch.save(
            {"a": torch.ones(2, dtype=torch.complex128)}, path
        ),
    }
    for name, make in made.items():
        yield Row(f"pickle {name}, allowed", archive(make), "pytorch_model.bin", allowed)
        yield Row(f"pickle {name}, not allowed", archive(make), "allow_pickle: true")


def _code() -> Iterator[Row]:
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        for value in ("someone/kernel", {"": "someone/kernel"}, {"text_config": {"": "a/b:f"}}):
            yield Row(f"{key} {value}", config(**{key: value}), key)
        yield Row(f"{key} below", config(text_config={key: {"": "someone/kernel"}}), key)
    for key, value in (
        ("_attn_implementation_internal", "a/b"),
        ("trust_remote_code", True),
        ("configuration_files", ["config.4.0.0.json"]),
        ("auto_map", "evil.Config"),
        ("auto_map", 5),
        ("__deepcopy__", 5),
        ("__class__", "x"),
        ("to_dict", 5),
        ("get_text_config", {}),
        ("kernel_config", {"a": "someone/kernel"}),
    ):
        yield Row(f"config {key} {value}", config(**{key: value}), key)
    other = both(
        written("config.4.0.0.json", '{"model_type": "llama", "trust_remote_code": true}'),
        config(configuration_files=["config.4.0.0.json"]),
    )
    yield Row("another config beside it", other, "configuration_files")
    for name in ("generation_config.json", "processor_config.json", "preprocessor_config.json"):
        yield Row(f"{name} trusts", fields(name, trust_remote_code=True), "trust_remote_code")
        yield Row(f"{name} is no JSON", written(name, "oops"), name)
    yield Row(
        "generation config with code",
        fields("generation_config.json", custom_generate="someone/code"),
        "custom_generate",
    )


def _malformed() -> Iterator[Row]:
    texts: dict[str, bytes | str] = {
        "deeply nested": '{"a":' * 985 + "1" + "}" * 985,
        "nested": '{"a":' * 60 + "1" + "}" * 60,
        "with half a surrogate": '{"model_type": "llama", "x": "\\ud800"}',
        "with half a surrogate as a key": '{"model_type": "llama", "\\udfff": 1}',
        "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
        "with a key twice": '{"model_type": "llama", "model_type": "gpt2"}',
        "with a long number": '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
        "a list": "[]",
        "empty": "",
        "text": '"llama"',
    }
    for name, text in texts.items():
        yield Row(f"config {name}", written("config.json", text), "config.json")
    yield Row("config of eight GiB", enormous("config.json"), "config.json")
    for key, value in (
        ("model_type", 5),
        ("model_type", "../x"),
        ("dtype", "exec"),
        ("dtype", "Tensor"),
        ("dtype", "int8"),
        ("dtype", 5),
        ("id2label", 5),
        ("id2label", {"a": "b"}),
        ("num_attention_heads", 0),
        ("hidden_size", 0),
        ("hidden_size", "x"),
        ("hidden_act", "nope"),
        ("rope_parameters", {"rope_type": "nope"}),
        ("attn_implementation", 5),
        ("layer_types", [5]),
        ("quantization_config", 5),
        ("pad_token_id", 10**30),
    ):
        yield Row(f"config {key} {value}", config(**{key: value}), "config")


def _without_bound() -> Iterator[Row]:
    for key in (
        "num_hidden_layers",
        "num_local_experts",
        "num_labels",
        "encoder_layers",
        "n_layer",
    ):
        for count in (MANY, 10**12):
            yield Row(f"{key} {count}", config(**{key: count}), key)
    yield Row("layers", config(num_hidden_layers=4000), "parameters and modules")
    yield Row("layers below", config(text_config={"depths": [1, MANY]}), "text_config.depths")
    yield Row("vocabulary", config(vocab_size=10**9), "vocab")._replace(says="lm_head.weight")
    yield Row("vocabulary beyond 64 bits", config(vocab_size=10**20), "config")
    yield Row("heads", config(head_dim=10**9), "buffers")
    yield Row("positions", config(max_position_embeddings=10**12), IMMUNE)
    yield Row("drawn", config(vocab_size=10**12), "random weights", {"weights": "random"})
    yield Row("keys", config(**{f"k{n}": 0 for n in range(30_000)}), "30,")
    yield Row("labels", config(id2label={str(n): "" for n in range(110_000)}), "100,000 values")
    yield Row("rope factors", config(rope_scaling={"x": [1.0] * 110_000}), "100,000 values")
    none = {f"t{n}": tensor([0]) for n in range(30_000)}
    yield Row("empty tensors", header(none), "30,000 tensors")
    yield Row("dimensions", header({"a": tensor([1] * 100_000, 0, 4)}, b"\0" * 4), "'a'")
    yield Row("digits", header({"a": tensor([2**63 - 1] * 100_000, 0, 4)}, b"\0" * 4), "'a'")
    yield Row("name", header({"a" * MANY: tensor([0])}), "1000000 characters")
    shards = {f"t{n}": f"model-{n}.safetensors" for n in range(20_000)}
    index = json.dumps({"weight_map": shards})
    named = both(
        lambda folder: (folder / WEIGHTS).unlink(), written(f"{WEIGHTS}.index.json", index)
    )
    yield Row("shards", named, "20,000 shards")
    sick = ("(a+)+$", "((.*)*)*!", r"^(\w+\.?)*!$", "(.*.*.*.*.*)*!")
    for pattern in sick:
        yield Row(f"key_map {pattern}", lambda folder: None, "key_map", {"key_map": {pattern: ""}})
        target = {"lora": {"target_modules": pattern}}
        yield Row(f"targets {pattern}", lambda folder: None, "target_modules", target)
        rank = {"lora": {"target_modules": ["q_proj"], "rank_pattern": {pattern: 4}}}
        yield Row(f"ranks {pattern}", lambda folder: None, "rank_pattern", rank)


def _links_and_devices() -> Iterator[Row]:
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    for name in (*names, WEIGHTS, "chat_template.jinja", "special_tokens_map.json"):
        yield Row(f"{name} linked to a secret", link(name, "/etc/passwd"), name)
        yield Row(f"{name} linked to a device", link(name, "/dev/zero"), name)
        yield Row(f"{name} linked to itself", link(name, name), name)
        yield Row(f"{name} a fifo", fifo(name), name)
    for name in (*names, WEIGHTS):
        yield Row(f"{name} moved out", moved_out(name), name)
    yield Row("config.json linked to memory", link("config.json", "/proc/self/mem"), "config.json")
    yield Row("config.json a folder", directory("config.json"), "config.json")
    yield Row(
        "templates linked to secrets", link("additional_chat_templates", "/etc"), "chat_templates"
    )
    yield Row(
        "config linked within",
        lambda folder: (
            (folder / "config.json").rename(folder / "c.json"),
            (folder / "config.json").symlink_to("c.json"),
        ),
        IMMUNE,
    )


def _long_texts(flags: dict[str, bool]) -> Iterator[Row]:
    """Tokens and pieces whose length costs more than their bytes do."""

    def added(*texts: str) -> list[dict[str, Any]]:
        return [{"id": 1000 + n, "content": text, **flags} for n, text in enumerate(texts)]

    def rewritten(change: Callable[[str], str], *texts: str) -> Damage:
        def damage(folder: Path) -> None:
            path = folder / "tokenizer.json"
            content = json.loads(path.read_text())
            path.write_text(change(json.dumps({**content, "added_tokens": added(*texts)})))

        return damage

    def unigram(*pieces: str) -> Damage:
        vocabulary = [[piece, -1.0] for piece in ("<unk>", *pieces)]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
        return tokens(lambda t: t.update(model=model))

    long = "x" * 20_000
    plain = tokens(lambda t: t["added_tokens"].extend(added(long)))
    yield Row("a token of 20,000 in tokenizer.json", plain, "20,000")
    hidden = rewritten(lambda text: text.replace('"added_', '"\\u0061dded_'), long)
    yield Row("the same under an escaped key", hidden, "20,000")
    twice = rewritten(lambda text: '{"added_tokens": [],' + text[1:], long)
    yield Row("the same under a key that is there twice", twice, "20,000")
    deep = rewritten(lambda text: text.replace(': [{"id', ": " + "[" * 100_000 + '{"id'), "x")
    yield Row("added tokens that are nested deeply", deep, "nested too deeply")
    many = tokens(lambda t: t["added_tokens"].extend(added(*(f"{n:0100}" for n in range(1000)))))
    yield Row("a thousand tokens of 100", many, "which cost more")
    yield Row("a piece of two million bytes", unigram("x" * 2_000_000), "2,000,000 bytes")
    yield Row("pieces of 400", unigram(*(f"{n:0400}" for n in range(20_000))), "8,000,005 bytes")
    piece = b"\x0a" + b"\x82\x9c\x01" + b"\x0a\xff\x9b\x01" + b"x" * 19_966
    yield Row("a piece in tokenizer.model", written("tokenizer.model", piece), "19,970 bytes")


def _growing_texts() -> Iterator[Row]:
    """Tokenizers that make one character many, step by step."""

    def steps(kind: str, name: str, several: list[dict[str, Any]]) -> Damage:
        return tokens(lambda t: t.update({kind: {"type": "Sequence", name: several}}))

    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    empty = {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"}
    prepended = {"type": "Prepend", "prepend": "é" * 2_000_000}
    by_bytes = {"type": "ByteLevel"}
    table = base64.b64encode(struct.pack("<I8x", 8) + b"a" * 3_000_000 + b"\0").decode()
    mapped = {"type": "Precompiled", "precompiled_charsmap": table}
    for name, normalizers in (
        ("replaced by more", [longer] * 4),
        ("replaced where nothing is", [empty] * 40),
        ("prepended", [prepended]),
        ("bytes of bytes", [by_bytes] * 40),
        ("a table of three megabytes", [mapped]),
    ):
        yield Row(f"texts {name}", steps("normalizer", "normalizers", normalizers), "of one")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pieces = steps("pre_tokenizer", "pretokenizers", [{**level, "use_regex": False}] * 40)
    yield Row("texts split by bytes of bytes", pieces, "of one")
    again = {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100, "pair": []}
    again |= {"type": "TemplateProcessing", "special_tokens": {}}
    yield Row("texts a hundred times", steps("post_processor", "processors", [again] * 6), "of one")
    ids = {"id": "<s>", "ids": [1] * 20_000, "tokens": ["<s>"] * 20_000}
    one = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    framed = {**again, "single": [one] * 1000, "special_tokens": {"<s>": ids}}
    yield Row("a frame of many ids", steps("post_processor", "processors", [framed]), "of one")


def _tokenizers() -> Iterator[Row]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    many = [{"id": 1000 + n, "content": f"<{n}>", "special": True, **flags} for n in range(40_000)]
    named = "tokenizer_config.json"
    yield Row("tokens", tokens(lambda t: t["added_tokens"].extend(many)), "added tokens")
    yield Row(
        "tokens in the config",
        fields(
            named,
            added_tokens_decoder={str(n): {**flags, "content": f"<{n}>"} for n in range(40_000)},
        ),
        "added tokens",
    )
    yield Row(
        "special tokens", fields(named, extra_special_tokens=[str(n) for n in range(9000)]), "9,000"
    )
    yield Row("a token of 20,000 characters", fields(named, pad_token="x" * 20_000), "20,000")
    added = {"0": {"content": "x" * 20_000, "special": True}}
    yield Row("an added token of 20,000", fields(named, added_tokens_decoder=added), "20,000")
    yield Row(
        "tokens of old",
        written("added_tokens.json", json.dumps({f"<{n}>": n for n in range(40_000)})),
        "added",
    )
    yield from _long_texts(flags)
    yield from _growing_texts()
    words = {f"w{n}": 1000 + n for n in range(200_000)}
    yield Row("words", tokens(lambda t: t["model"]["vocab"].update(words)), "words")
    far = tokens(lambda t: t["model"]["vocab"].update(zz=2**31))
    yield Row("an id far away", far, "2,147,483,648")
    yield Row("an id far away, to be embedded", far, "2,147,483,648", {"embeddings": {}})
    yield Row(
        "ten thousand files",
        lambda folder: [(folder / f"tokenizer{n}.json").touch() for n in range(10_000)],
        "10,00",
    )
    yield Row(
        "ten thousand templates",
        lambda folder: (
            (folder / "additional_chat_templates").mkdir(),
            [(folder / f"additional_chat_templates/{n}.jinja").touch() for n in range(10_000)],
        ),
        "10,000 files",
    )
    for name in ("../../x", "", None, "a b", "x" * 200):
        template = [{"name": name, "template": "{{ 1 }}"}]
        for file in (named, "processor_config.json", "chat_template.json"):
            yield Row(f"template {name} of {file}", fields(file, chat_template=template), file)
    panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    yield Row("panic in Rust", tokens(lambda t: t.update(normalizer=panics)), "panics")
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
    }
    processor = template | {"pair": [], "special_tokens": {}}
    yield Row("panic in use", tokens(lambda t: t.update(post_processor=processor)), "panics")
    yield Row("no words", tokens(lambda t: t["model"].update(vocab={})), "vocabulary")
    yield Row("unknown is empty", fields(named, unk_token=""), "recursion")
    for key, value in (
        ("vocab_file", "/etc/passwd"),
        ("tokenizer_file", "/dev/zero"),
        ("fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
        ("init_inputs", ["/etc/passwd"]),
        ("auto_map", 5),
        ("__class__", 5),
        ("trust_remote_code", True),
    ):
        yield Row(f"tokenizer config {key}", fields(named, **{key: value}), key)
    for key, value in (
        ("tokenizer_class", 5),
        ("tokenizer_class", "RagTokenizer"),
        ("model_max_length", "x"),
        ("padding_side", "up"),
        ("bos_token", 5),
        ("get_vocab", 5),
    ):
        yield Row(f"tokenizer config {key} {value}", fields(named, **{key: value}), "tokenizer")


def _adapters() -> Iterator[Row]:
    resume = {"lora": {"adapter": "{folder}/adapter"}}
    named = "adapter_config.json"
    for key, value in (
        ("megatron_core", "evil"),
        ("r", 10**9),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", {f"q{n}": 4 for n in range(9000)}),
        ("trainable_token_indices", list(range(60_000))),
        ("layer_replication", [[0, MANY]]),
        ("layer_replication", [[0, 1]] * 9000),
        ("layers_to_transform", list(range(9000))),
        ("target_modules", [f"q{n}" for n in range(20_000)]),
        ("peft_type", 5),
        ("__class__", 5),
        ("lora_alpha", float("inf")),
    ):
        says = key if key != "peft_type" else "PEFT's type"
        yield Row(f"adapter {key}", adapter(fields(named, **{key: value})), says, resume)
    yield Row(
        "adapter for a sick pattern",
        adapter(fields(named, target_modules="((.*)*)*!")),
        "is for modules called ((.*)*)*!",
        resume,
    )
    yield Row(
        "adapter auto_mapping",
        adapter(fields(named, auto_mapping={"base_model_class": "X", "parent_library": "evil"})),
        IMMUNE,
        resume,
    )
    for name in (named, "adapter_model.safetensors"):
        yield Row(f"adapter's {name} a fifo", adapter(fifo(name)), name, resume)
        yield Row(f"adapter's {name} linked out", adapter(link(name, "/etc/passwd")), name, resume)
    yield Row("adapter of text", adapter(written(named, "oops")), named, resume)
    yield Row(
        "adapter of pickles",
        adapter(
            lambda folder: (folder / "adapter_model.safetensors").rename(
                folder / "adapter_model.bin"
            )
        ),
        "pickle",
        resume,
    )
