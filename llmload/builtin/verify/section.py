"""The spec key ``verify``."""

from __future__ import annotations

from pydantic import model_validator

from llmload.plugin import InvalidValueError, Section


class Signature(Section):
    """Who must have signed the model folder, as the package ``model-signing`` checks it.

    One of ``public_key``, ``certificate_chain``, or ``identity`` with ``oidc_issuer``.
    """

    bundle: str
    """The signature, a file in the OpenSSF's format for models, such as ``model.sig``."""
    public_key: str | None = None
    """File of the signer's public key, an elliptic curve's, in PEM."""
    certificate_chain: tuple[str, ...] = ()
    """Files of certificates in PEM that lead to the signer's."""
    identity: str | None = None
    """Who signed with sigstore, such as an address of mail."""
    oidc_issuer: str | None = None
    """Who vouched for the identity, as a URL."""
    ignore_unsigned_files: bool = False
    """Let files lie in the folder that the signature does not cover."""

    @model_validator(mode="after")
    def _one_signer(self) -> Signature:
        ways = {
            "public_key": self.public_key is not None,
            "certificate_chain": bool(self.certificate_chain),
            "identity": self.identity is not None,
        }
        given = [way for way, there in ways.items() if there]
        if len(given) != 1:
            raise InvalidValueError(
                f"a signature is by one signer, and {' and '.join(given) or 'none'} is given",
                fix="Give one of `public_key`, `certificate_chain` and `identity`.",
            )
        if (self.identity is None) != (self.oidc_issuer is None):
            raise InvalidValueError(
                "`identity` and `oidc_issuer` go together",
                fix="Give both, or another kind of signer.",
            )
        return self


class VerifySection(Section):
    """What a model folder must prove before it is read, and its weights when they are loaded."""

    signature: Signature | None = None
    """Refuse the folder unless it is signed: every byte of it is read and hashed first."""
    finite: bool = False
    """Refuse weights that hold NaN or infinity: every value of the loaded model is looked at."""
