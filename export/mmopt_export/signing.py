"""Signs an artifact and checks its signature: Ed25519 over `mmopt.json`, beside it.

The manifest holds the SHA-256 of every other file, so one signature over its bytes covers all of
them. The signature is the plain 64 bytes, so that others can check it without mmopt:

    openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in mmopt.json -sigfile mmopt.json.sig

Ed25519 is deterministic: two exports signed with one key stay byte-identical.

The library is cryptography. Sigstore's model-signing, made for this, was tried first: its release
1.1.1 cannot be imported beside the sigstore that pip resolves for it (no module OpenSSL), and
brings 30 packages to 3.
"""

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmopt_export.files import SIGNATURE_NAME
from mmopt_export.manifest import MANIFEST_NAME
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_SIGNATURE_BYTES = 64
# A PEM key of this kind has 120 bytes; what is far larger is no key.
_MOST_KEY_BYTES = 64 << 10
_MAKE_KEY = (
    "Make one with `openssl genpkey -algorithm ed25519 -out private.pem` and "
    "`openssl pkey -in private.pem -pubout -out public.pem`."
)


def read_private_key(path: Path) -> "Ed25519PrivateKey":
    """Read the key that `--sign` names, before any work is done.

    Raises:
        InputError: the file is missing, encrypted, a public key, or no Ed25519 key in PEM.
        MmoptError: the package cryptography is missing (exit 3).
    """
    content = _read_key(path, "--sign")
    _require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if b"PUBLIC KEY" in content:
        raise InputError(f"--sign {path} is a public key, expected the private one of the pair.")
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError as error:
        raise InputError(
            f"--sign {path} is encrypted, expected a key without a password. Decrypt it with "
            f"`openssl pkey -in {path} -out private.pem`, and remove that file afterwards."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"--sign {path} is no private key, expected an Ed25519 key in PEM. {_MAKE_KEY}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            f"--sign {path} is an {_kind(key)} key, which is not supported, expected an Ed25519 "
            f"key. {_MAKE_KEY}"
        )
    return key


def sign(folder: Path, key: "Ed25519PrivateKey") -> None:
    """Write `mmopt.json.sig` over the `mmopt.json` in `folder`, which must not change after it."""
    (folder / SIGNATURE_NAME).write_bytes(key.sign((folder / MANIFEST_NAME).read_bytes()))


def is_signed(folder: Path) -> bool:
    """Whether a signature lies in the folder; whose it is and whether it holds is not said."""
    return (folder / SIGNATURE_NAME).is_file()


def require_signature(folder: Path, public_key: Path) -> None:
    """Raise unless `mmopt.json` was signed with the private half of `public_key`.

    Raises:
        InputError: the key's file is missing, a private key, or no Ed25519 key in PEM; or the
            folder is no artifact.
        CheckFailedError: there is no signature, or it does not hold.
        MmoptError: the package cryptography is missing (exit 3).
    """
    content = _read_key(public_key, "--public-key")
    _require_library()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in content:
        raise InputError(
            f"--public-key {public_key} is a private key, expected the public one of the pair: "
            f"`openssl pkey -in {public_key} -pubout`."
        )
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"--public-key {public_key} is no public key, expected an Ed25519 key in PEM. "
            f"{_MAKE_KEY}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(
            f"--public-key {public_key} is an {_kind(key)} key, which is not supported, expected "
            f"an Ed25519 key. {_MAKE_KEY}"
        )
    manifest = folder / MANIFEST_NAME
    if not _is_plain(manifest):
        raise InputError(
            f"{folder} is not an artifact: it has no {MANIFEST_NAME}. "
            "Pass a folder that `mmopt export` wrote."
        )
    path = folder / SIGNATURE_NAME
    if not _is_plain(path):
        raise CheckFailedError(
            f"{folder} is not signed: it has no {SIGNATURE_NAME}. "
            "Export it with --sign, or verify without --public-key."
        )
    with path.open("rb") as file:
        signature = file.read(_SIGNATURE_BYTES + 1)
    try:
        key.verify(signature, manifest.read_bytes())
    except InvalidSignature as error:
        raise CheckFailedError(
            f"{folder} was not signed with the key of {public_key}, or its {MANIFEST_NAME} was "
            "changed after it was signed. Do not run it; get the artifact and the key from whoever "
            "exported it."
        ) from error


def _read_key(path: Path, option: str) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{option} {path} is no file, expected an Ed25519 key in PEM.")
        with path.open("rb") as file:
            return file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be read ({error.strerror}), expected an Ed25519 key in PEM. "
            f"{_MAKE_KEY}"
        ) from error


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MmoptError(
            "cryptography is not installed, expected it to sign artifacts and check signatures. "
            "Run `pip install 'mmopt[sign]'`."
        ) from error


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _kind(key: Any) -> str:
    """`RSA` of an `RSAPrivateKey`."""
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
