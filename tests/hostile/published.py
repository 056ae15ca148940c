"""The published weaknesses of loaders, fed to llmload: a row each.

Run as a script on each stack, it tries them all, keeps what happened in ``published.json`` and
writes the table in SECURITY.md. What concerns no file of a model folder has no row: conversion
scripts, command lines, texts that a tokenizer is given later.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "hostile")]

from corpus import (  # noqa: E402
    IMMUNE,
    Damage,
    Row,
    adapter,
    both,
    canary,
    config,
    fields,
    fifo,
    tokens,
    written,
)
from stacks import IS_MODERN  # noqa: E402
from watching import Seen, watching  # noqa: E402

import llmload  # noqa: E402
from llmload.errors import RequestError  # noqa: E402
from llmload.testing import tiny_checkpoint, tiny_model  # noqa: E402

KEPT = Path(__file__).with_name("published.json")
SECURITY = TESTS.parent / "SECURITY.md"
STACK = "modern" if IS_MODERN else "colossalai"
BEGIN, END = "<!-- published weaknesses: python tests/hostile/published.py -->\n", "<!-- end -->\n"
_INJECTION = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}"


_LONG = 20_000
_TEXTS = (
    ("CVE-2025-1194", "the tokenizer of GPT-NeoX-Japanese", "1" * _LONG + "円億"),
    ("CVE-2025-2099", "`testing_utils.preprocess_string`", "```" + "\n" * _LONG),
    ("CVE-2025-3262", "settings of the chat command", "a=" + "a." * _LONG + "!"),
    ("CVE-2025-3777", "addresses of images", "https://www.youtube.com@" + "a" * _LONG),
    ("CVE-2025-3933", "`DonutProcessor.token2json`", "<s_" * _LONG),
    ("CVE-2025-6051", "numbers of Clvp", "1" * _LONG + "!"),
    ("CVE-2025-6638", "language codes of Marian", ">>" * _LONG),
    ("CVE-2025-6921", "names for TensorFlow's AdamWeightDecay", "a" * _LONG + "!"),
    ("CVE-2024-12720", "what Nougat writes", "\n**" * _LONG),
)
"""Weaknesses of functions that no load calls, and texts that they cannot bear."""


class Published(NamedTuple):
    """A weakness that somebody published."""

    names: str
    what: str
    """What the folder has."""
    row: Row


def _row(damage: Damage, says: str, spec: dict[str, Any] | None = None) -> Row:
    return Row("", damage, says, spec or {})


def _no_weights_but(damage: Damage) -> Damage:
    def replaced(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        damage(folder)

    return replaced


def _index(shard: str) -> Damage:
    return written("model.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}))


def _word(text: str) -> Damage:
    """Give the tokenizer a text for one of its words, and keep the number of words."""

    def rename(content: dict[str, Any]) -> None:
        words = content["model"]["vocab"]
        words[text] = words.pop(max(words, key=words.get))

    return both(tokens(rename), fields("config.json", task_specific_params={"text": text}))


def published() -> Iterator[Published]:
    """Yield every weakness."""
    pickles = "pytorch_model.bin"
    yield Published(
        "CVE-2025-32434, CVE-2026-24747",
        "weights in a pickle that runs code, which old unpicklers let pass",
        _row(_no_weights_but(canary(pickles)), pickles),
    )
    if IS_MODERN:
        yield Published(
            "CVE-2025-32434, CVE-2026-24747, with `allow_pickle`",
            "the same, and pickles are allowed",
            _row(_no_weights_but(canary(pickles)), pickles, {"allow_pickle": True}),
        )
    else:
        yield Published(
            "CVE-2025-32434, CVE-2026-24747, with `allow_pickle`",
            "the same, and pickles are allowed",
            _row(_no_weights_but(canary(pickles)), "2.10", {"allow_pickle": True}),
        )
    for names, file in (
        ("CVE-2026-1839", "rng_state.pth"),
        ("CVE-2026-4538", "model.pt2"),
        ("CVE-2024-3568", "extra_data.pickle"),
        ("CVE-2025-53002", "value_head.bin"),
        ("CVE-2025-50472", ".mdl"),
    ):
        yield Published(names, f"a pickle `{file}` beside the weights", _row(canary(file), IMMUNE))
    yield Published(
        "CVE-2024-11392, CVE-2024-11393, CVE-2024-11394",
        "weights as a pickle of another name, the only ones",
        _row(_no_weights_but(canary("model.ckpt")), "model"),
    )
    yield Published(
        "CVE-2026-4372",
        "`_attn_implementation_internal` that names a repository",
        _row(config(_attn_implementation_internal="a/b"), "_attn_implementation_internal"),
    )
    yield Published(
        "CVE-2026-5241",
        "a config within the config that sets `trust_remote_code`",
        _row(config(keypoint_detector_config={"trust_remote_code": True}), "trust_remote_code"),
    )
    yield Published(
        "CVE-2026-80047",
        "`custom_generate` in a file, and in the generation config",
        _row(
            both(
                lambda folder: (folder / "custom_generate").mkdir(),
                written("custom_generate/generate.py", "import os\nos.system('touch canary')"),
                fields("generation_config.json", custom_generate="someone/code"),
            ),
            "custom_generate",
        ),
    )
    yield Published(
        "CVE-2026-9856",
        "a chat template that is called as a path",
        _row(
            fields(
                "tokenizer_config.json", chat_template=[{"name": "../../x", "template": "{{ 1 }}"}]
            ),
            "chat_template",
        ),
    )
    yield Published(
        "CVE-2026-69112, CVE-2026-75104",
        "an index that names a shard outside",
        _row(_no_weights_but(_index("../x.safetensors")), "../x.safetensors"),
    )
    yield Published(
        "CVE-2026-69112, with a named pipe",
        "an index that names a pipe that nobody writes to",
        _row(_no_weights_but(both(_index("x.safetensors"), fifo("x.safetensors"))), "plain file"),
    )
    yield Published(
        "CVE-2026-22807",
        "`auto_map` to a module of the folder",
        _row(
            both(
                config(model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
                written("evil.py", "import os\nos.system('touch canary')"),
            ),
            "trust_remote_code",
        ),
    )
    yield Published(
        "PEFT, `auto_mapping`",
        "an adapter that names a module to import",
        _row(
            adapter(
                fields(
                    "adapter_config.json",
                    auto_mapping={"base_model_class": "X", "parent_library": "evil"},
                )
            ),
            IMMUNE,
            {"lora": {"adapter": "{folder}/adapter"}},
        ),
    )
    yield Published(
        "PEFT 0.13, `megatron_core`",
        "an adapter that names a module to import",
        _row(
            adapter(fields("adapter_config.json", megatron_core="evil")),
            "megatron_core",
            {"lora": {"adapter": "{folder}/adapter"}},
        ),
    )
    yield Published(
        "CVE-2026-71281",
        "an adapter whose `corda_config` names a pickle",
        _row(
            adapter(
                both(
                    canary("x.pt"),
                    fields(
                        "adapter_config.json",
                        init_lora_weights="corda",
                        corda_config={"cache_file": "x.pt", "covariance_file": "x.pt"},
                    ),
                )
            ),
            "corda",
            {"lora": {"adapter": "{folder}/adapter"}},
        ),
    )
    yield Published(
        "CVE-2024-34359, CVE-2026-5760",
        "a chat template that reaches for Python's classes",
        _row(written("chat_template.jinja", _INJECTION), IMMUNE),
    )
    yield Published(
        "CVE-2025-3263",
        "`configuration_files` with a name that backtracks for ever",
        _row(config(configuration_files=["config." + "0." * 50_000 + "x"]), "configuration_files"),
    )
    yield Published(
        "CVE-2025-3264",
        "a module whose imports backtrack for ever",
        _row(
            written("modeling_evil.py", "try:" + " " * 200_000 + "x\n" + "import a\n" * 50_000),
            IMMUNE,
        ),
    )
    yield Published(
        "CVE-2025-5197",
        "weights of TensorFlow, the only ones",
        _row(_no_weights_but(written("tf_model.h5", "/".join("a" * 50_000))), "tf_model.h5"),
    )
    for names, where, text in _TEXTS:
        yield Published(names, f"a word that backtracks in {where}", _row(_word(text), IMMUNE))


def make_sound(place: Path) -> Path:
    """Make a folder that loads, with an adapter in a folder of its own."""
    import peft

    folder = tiny_checkpoint(place / "model")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(folder / "adapter")
    return folder


def spec_of(row: Row, folder: Path) -> dict[str, Any]:
    """Return the spec of a load of the folder as the row wants it."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return value.replace("{folder}", str(folder)) if isinstance(value, str) else value

    return {"model": str(folder), **filled(row.spec)}


def harm(seen: Seen) -> list[str]:
    """Return what was done beyond reading files of the folder."""
    outside = [name for name in seen.names() if name.startswith("/")]
    return [*outside, *seen.reached_out, *({"evil"} & seen.imported)]


def attempt(row: Row, folder: Path) -> tuple[str, list[str]]:
    """Load what the row makes of a sound folder; return the refusal, if any, and the harm."""
    row.damage(folder)
    refusal = ""
    with watching(folder) as seen:
        try:
            result = llmload.load(spec_of(row, folder))
            if "chat_template.jinja" in {path.name for path in folder.iterdir()}:
                _render(result.tokenizer)
        except RequestError as error:
            refusal = str(error)
    done = harm(seen)
    if refusal and seen.mapped:
        done.append("weights were mapped")
    return refusal, done


def _render(tokenizer: Any) -> None:
    from jinja2.exceptions import SecurityError, UndefinedError

    try:
        said = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except (SecurityError, UndefinedError):
        return
    assert "class" not in said, said


def table(kept: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table of SECURITY.md."""
    lines = [
        "| published | the folder has | modern stack | colossalai stack |",
        "|---|---|---|---|",
    ]
    for one in published():
        cells = []
        for stack in ("modern", "colossalai"):
            found = kept.get(stack, {}).get(one.names)
            cells.append(f"{found['outcome']}, {found['ms']} ms" if found else "not run")
        lines.append(f"| {one.names} | {one.what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all rows on this stack, and write down what happened."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        sound = make_sound(Path(place))
        llmload.load({"model": str(sound)})  # what is imported is imported
        found = {}
        for number, one in enumerate(published()):
            folder = Path(place, str(number), "model")
            shutil.copytree(sound, folder)
            began = time.perf_counter()
            refusal, done = attempt(one.row, folder)
            assert not done, (one, done)
            ms = round(1000 * (time.perf_counter() - began))
            found[one.names] = {"outcome": "refused" if refusal else "no harm", "ms": ms}
    kept[STACK] = found
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    before, _, rest = SECURITY.read_text().partition(BEGIN)
    SECURITY.write_text(before + BEGIN + table(kept) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
