"""The plugin ``signed_only``: a folder is what a trusted key has signed, or it is not read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing

import llmload
from llmload.testing import assert_plugin, parameters, same, tiny_llama
from llmload_signed_only.plugin import KEYS, SIGNATURE, SignedOnly


def make_key(place: Path, name: str) -> Path:
    """Write ``NAME.key`` and, in a folder of its own, the public ``NAME.pem``; return the first."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = place / f"{name}.key"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (place / "trusted").mkdir(exist_ok=True)
    (place / "trusted" / f"{name}.pem").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private


def sign(folder: Path, key: Path) -> None:
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE]))
    config.sign(folder, folder / SIGNATURE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", shards=2)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The second of two trusted keys."""
    make_key(tmp_path, "archive")
    monkeypatch.setenv(KEYS, str(tmp_path / "trusted"))
    return make_key(tmp_path, "team")


@pytest.fixture
def registry() -> llmload.Registry:
    return llmload.create_registry([SignedOnly])


def refusal(folder: Path, registry: llmload.Registry, **keys: object) -> str:
    found = []
    for ask in (llmload.plan, llmload.load):
        with pytest.raises(llmload.PlanError) as caught:
            ask({"model": str(folder), **keys}, registry=registry).raise_for_errors()
        (problem,) = caught.value.problems
        found.append(problem.message)
    assert found[0] == found[1]
    return found[0]


def test_it_keeps_the_contract() -> None:
    assert_plugin(SignedOnly)


def test_a_folder_that_any_trusted_key_has_signed_is_loaded(
    folder: Path, key: Path, registry: llmload.Registry
) -> None:
    # Where this plugin is installed too, no other load would take it.
    without = llmload.create_registry(block={"signed_only"})
    plain = llmload.load({"model": str(folder)}, registry=without)
    sign(folder, key)
    result = llmload.load({"model": str(folder)}, registry=registry)
    mine, others = parameters(result.model), parameters(plain.model)
    assert mine.keys() == others.keys()
    assert all(same(tensor, others[name]) for name, tensor in mine.items())
    assert "signed: model.sig covers every file of the folder" in str(result.plan.steps)


def test_a_folder_without_a_signature_is_refused(
    folder: Path, key: Path, registry: llmload.Registry
) -> None:
    message = f"the folder {str(folder)!r} holds no model.sig, and only signed models are loaded"
    assert refusal(folder, registry) == f"{message} here"


def test_one_flipped_bit_in_any_file_is_refused_before_one_is_opened(
    folder: Path, key: Path, registry: llmload.Registry
) -> None:
    sign(folder, key)
    opened: set[str] = set()
    armed = False

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if armed and event == "open" and str(arguments[0]).startswith(str(folder)):
            frame = sys._getframe(1)
            while frame is not None and "model_signing" not in frame.f_code.co_filename:
                frame = frame.f_back  # type: ignore[assignment]
            if frame is None:
                opened.add(str(arguments[0]))

    sys.addaudithook(watch)
    for file in sorted(folder.iterdir()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        armed = True
        message = refusal(folder, registry)
        armed = False
        assert message.startswith(
            f"the folder {str(folder)!r} is not what a trusted key has signed"
        )
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    assert opened == set()


def test_files_that_come_or_go_are_refused(
    folder: Path, key: Path, registry: llmload.Registry
) -> None:
    sign(folder, key)
    (folder / "modeling.py").write_text("")
    assert "modeling.py" in refusal(folder, registry)
    (folder / "modeling.py").unlink()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(folder, registry)


def test_a_key_that_is_not_trusted_is_refused_with_what_each_trusted_one_says(
    folder: Path, key: Path, tmp_path: Path, registry: llmload.Registry
) -> None:
    sign(folder, make_key(tmp_path, "stranger"))
    (tmp_path / "trusted" / "stranger.pem").unlink()
    message = refusal(folder, registry)
    assert "archive: " in message
    assert "; team: " in message


def test_weights_of_another_folder_are_refused(
    folder: Path, key: Path, tmp_path: Path, registry: llmload.Registry
) -> None:
    other = tiny_llama(tmp_path / "other")
    sign(folder, key)
    message = refusal(folder, registry, weights_from=str(other))
    assert message == "model.safetensors with weights lies outside of the signed folder"


def test_without_keys_nothing_is_read_and_without_the_variable_everything(
    folder: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = llmload.create_registry([SignedOnly])
    monkeypatch.setenv(KEYS, str(tmp_path))
    message = f"LLMLOAD_TRUSTED_KEYS names {str(tmp_path)!r}, which holds no file *.pem"
    assert refusal(folder, registry) == message
    monkeypatch.delenv(KEYS)
    assert llmload.load({"model": str(folder)}, registry=registry).model is not None
