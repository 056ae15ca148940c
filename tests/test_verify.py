"""Signatures checked before a folder is read, and weights held to being finite."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import IS_MODERN

import llmload
from llmload import AuditError, PlanError, SpecError
from llmload.testing import save_checkpoint, tiny_llama, tiny_model

signed = pytest.mark.skipif(not IS_MODERN, reason="the colossalai stack has no model-signing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path, shards=2)


def key(place: Path, name: str) -> Path:
    """Make a pair of keys, and return the private one; the public one lies beside it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    file = place / name
    file.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    file.with_suffix(".pub").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return file


def sign(folder: Path, place: Path) -> dict[str, Any]:
    """Sign a folder, and return the spec that asks for it."""
    from model_signing import signing

    private = key(place, "key.pem")
    bundle = place / "model.sig"
    signing.Config().use_elliptic_key_signer(private_key=private).sign(folder, bundle)
    public = str(private.with_suffix(".pub"))
    return {
        "model": str(folder),
        "verify": {"signature": {"bundle": str(bundle), "public_key": public}},
    }


def refusal(spec: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        llmload.load(spec)
    (problem,) = caught.value.problems
    assert problem.where == "verify.signature"
    return problem.message


@signed
def test_a_folder_that_is_as_it_was_signed_is_loaded(folder: Path, tmp_path: Path) -> None:
    spec = sign(folder, tmp_path)
    result = llmload.load(spec)
    notes = [note for step in result.plan.steps for note in step.notes]
    assert f"signed: '{tmp_path / 'model.sig'}' covers every file" in notes


@signed
def test_one_flipped_bit_in_any_file_refuses_the_folder_before_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sign(folder, tmp_path)
    monkeypatch.setattr(
        "llmload.hf.locating.read_config", lambda *args: pytest.fail("the config was read")
    )
    for file in sorted(folder.iterdir()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        message = refusal(spec)
        assert message.startswith(f"the folder {str(folder)!r} is not what was signed: ")
        assert file.name in message
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


@signed
def test_files_that_are_added_or_removed_refuse_the_folder(folder: Path, tmp_path: Path) -> None:
    spec = sign(folder, tmp_path)
    (folder / "modeling.py").write_text("")
    assert "modeling.py" in refusal(spec)
    spec["verify"]["signature"]["ignore_unsigned_files"] = True
    llmload.load(spec)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(spec)


@signed
def test_somebody_elses_key_and_a_missing_bundle_are_refused(folder: Path, tmp_path: Path) -> None:
    spec = sign(folder, tmp_path)
    signature = spec["verify"]["signature"]
    other = key(tmp_path, "other.pem").with_suffix(".pub")
    wrong = spec | {"verify": {"signature": signature | {"public_key": str(other)}}}
    assert "is not what was signed: " in refusal(wrong)
    missing = spec | {"verify": {"signature": signature | {"bundle": str(tmp_path / "none")}}}
    assert "none" in refusal(missing)


def test_without_the_package_a_signature_is_refused_with_the_way_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    spec = {"model": str(folder), "verify": {"signature": {"bundle": "a", "public_key": "b"}}}
    with pytest.raises(PlanError) as caught:
        llmload.plan(spec)
    assert str(caught.value) == (
        "verify.signature: signatures are checked by the package model-signing: import of"
        " model_signing halted; None in sys.modules. Install it with `pip install"
        " 'llmload[signing]'`."
    )


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (
            {"bundle": "a"},
            "a signature is by one signer, and none is given. Give one of `public_key`,"
            " `certificate_chain` and `identity`.",
        ),
        (
            {"bundle": "a", "public_key": "b", "identity": "c", "oidc_issuer": "d"},
            "a signature is by one signer, and public_key and identity is given. Give one of"
            " `public_key`, `certificate_chain` and `identity`.",
        ),
        (
            {"bundle": "a", "identity": "c"},
            "`identity` and `oidc_issuer` go together. Give both, or another kind of signer.",
        ),
    ],
)
def test_a_signer_that_is_none_or_two_is_refused(
    folder: Path, signature: dict[str, str], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        llmload.plan({"model": str(folder), "verify": {"signature": signature}})
    assert str(caught.value) == f"verify.signature: {message}"


# --- finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.refused_late  # only the weights tell
def test_a_value_that_is_not_finite_anywhere_fails_the_load(folder: Path, value: float) -> None:
    spec = {"model": str(folder), "verify": {"finite": True}}
    llmload.load(spec)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / index[name]
    weights = load_file(file)
    weights[name].view(-1)[77] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(AuditError) as caught:
        llmload.load(spec)
    assert str(caught.value) == (
        f"verify.finite: {name!r} hold NaN or infinity. Check the checkpoint; where it is finite,"
        " load in a wider dtype."
    )
    llmload.load({"model": str(folder)})


@pytest.mark.refused_late  # only the weights tell
def test_a_cast_that_overflows_is_found(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e30
    folder = save_checkpoint(model, tmp_path / "large")
    spec = {"model": str(folder), "verify": {"finite": True}}
    llmload.load(spec | {"dtype": "bfloat16"})
    with pytest.raises(AuditError, match=r"'lm_head\.weight' hold NaN or infinity"):
        llmload.load(spec | {"dtype": "float16"})


@pytest.mark.skipif(not IS_MODERN, reason="transformers 4.51 quantises on accelerators only")
@pytest.mark.parametrize("bits", [{}, {"double_quant": True}, {"bits": 8}])
@pytest.mark.refused_late  # only the weights tell
def test_quantised_weights_are_looked_at_by_what_scales_them(
    tmp_path: Path, bits: dict[str, Any]
) -> None:
    model = tiny_model()
    folder = save_checkpoint(model, tmp_path / "fine")
    spec = {"verify": {"finite": True}, "kbit": bits, "lora": {"r": 2}}
    llmload.load(spec | {"model": str(folder)})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    broken = save_checkpoint(model, tmp_path / "broken")
    with pytest.raises(AuditError, match="hold NaN or infinity"):
        llmload.load(spec | {"model": str(broken)})


@signed
def test_weights_outside_of_the_signed_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    elsewhere = tiny_llama(tmp_path, name="elsewhere")
    spec = sign(folder, tmp_path) | {"weights_from": str(elsewhere)}
    (error,) = llmload.plan(spec).errors
    assert str(error) == (
        f"verify.signature: the signature covers the folder {str(folder)!r}, and"
        " 'model.safetensors' of the weights lie elsewhere. Sign the folder with its weights, or"
        " leave out what takes them from elsewhere."
    )
