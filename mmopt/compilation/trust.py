"""Who wrote a store: a signature with a key that only this user can read."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from mmopt_kernels.errors import InputError, MmoptError

KEY_BYTES = 32


def key_file() -> Path:
    """`$XDG_CONFIG_HOME/mmopt/store.key`, by default `~/.config/mmopt/store.key`."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "mmopt" / "store.key"


def sign(content: bytes) -> str:
    """HMAC-SHA-256 of `content` under this user's key, which it makes when there is none.

    Returns:
        64 hex digits.

    Raises:
        MmoptError: the key can be neither read nor written (exit 3).
    """
    return hmac.new(_key(make=True), content, hashlib.sha256).hexdigest()


def signed_here(content: bytes, signature: str) -> bool:
    """Whether `signature` was made by `sign` under this user's key."""
    try:
        key = _key(make=False)
    except FileNotFoundError:
        return False
    made = hmac.new(key, content, hashlib.sha256).hexdigest()
    return hmac.compare_digest(made.encode(), signature.strip().encode())


def _key(*, make: bool) -> bytes:
    path = key_file()
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Linked into place whole: two processes that start at once agree on one key.
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            try:
                os.link(draft, path)
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        status = path.stat()
        key = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MmoptError(
            f"{path}, the key that signs stores, cannot be used: {error.strerror}. Make the folder "
            "writable, or set XDG_CONFIG_HOME to one that is."
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or len(key) != KEY_BYTES:
        raise InputError(
            f"{path}, the key that signs stores, can be read by others or is not {KEY_BYTES} bytes "
            "of this user, expected a file of mode 600. Remove it; the next store makes a new one, "
            "and stores signed with the old one need their sha256."
        )
    return key
