"""Signatures of a manifest: who made a run, for those who have a public key of theirs (ed25519)."""

import base64
from pathlib import Path
from typing import Any

from sparsekit.model import read_json
from sparsekit.results.manifest import MANIFEST
from sparsekit.system import write_atomically

SIGNATURE = "manifest.sig"


def private_key(file: Path) -> Any:
    """An ed25519 key from a PEM file, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ValueError: there is none, it is another kind of key, or the package cryptography is not installed.
    """
    return _key(file, "load_pem_private_key", "Ed25519PrivateKey", password=None)


def sign(run: Path, key: Any) -> None:
    """Write manifest.sig: the signature of the manifest's digest."""
    signature = key.sign(str(read_json(run / MANIFEST)["digest"]).encode())
    text = base64.b64encode(signature).decode() + "\n"
    write_atomically(run / SIGNATURE, lambda aside: aside.write_text(text, encoding="ascii"))


def signature_failures(run: Path, public: Path) -> list[str]:
    """Why a run's manifest is not signed by the owner of a public key (a PEM file), as sentences.

    Raises:
        ValueError: there is no such key, or the package cryptography is not installed.
    """
    key = _key(public, "load_pem_public_key", "Ed25519PublicKey")
    if not (run / MANIFEST).is_file() or not (run / SIGNATURE).is_file():
        return [f"{run} has no signed manifest ({SIGNATURE})"]
    from cryptography.exceptions import InvalidSignature

    try:
        signature = base64.b64decode((run / SIGNATURE).read_text(encoding="ascii").strip(), validate=True)
        key.verify(signature, str(read_json(run / MANIFEST).get("digest")).encode())
    except (InvalidSignature, ValueError):
        return [f"the signature of {run / MANIFEST} was not made with the key of {public}"]
    return []


def _key(file: Path, load: str, kind: str, **options: Any) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ValueError(
            "signatures need the package cryptography, which is not installed: pip install 'sparsekit-lightning[sign]'"
        ) from error
    try:
        key = getattr(serialization, load)(file.read_bytes(), **options)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no key that can be read ({error}); give a PEM file without password") from error
    if not isinstance(key, getattr(ed25519, kind)):
        raise ValueError(f"{file} holds a {type(key).__name__}, must be an ed25519 key")
    return key
