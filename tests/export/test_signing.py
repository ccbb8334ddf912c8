"""A signature over the manifest covers the artifact, and others can check it without mmopt."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from mmopt_export import verify
from mmopt_export.files import same_artifact
from mmopt_export.signing import is_signed, read_private_key, require_signature, sign
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError
from tiny_artifacts import edit_graph, make_artifact, refuse_sessions, save_pair


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return save_pair(tmp_path)


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    artifact = make_artifact(tmp_path / "artifact")
    sign(artifact, read_private_key(keys[0]))
    return artifact


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_sessions(monkeypatch)


def test_a_signed_artifact_verifies_with_the_public_key(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    report = verify(signed, public_key=keys[1])
    assert (report.exit_code, report.signature) == (0, "holds")
    assert (signed / "mmopt.json.sig").stat().st_size == 64


def test_without_a_public_key_a_signature_is_said_to_be_unchecked(
    signed: Path, tmp_path: Path
) -> None:
    assert verify(signed).signature == "not checked"
    assert verify(make_artifact(tmp_path / "unsigned")).signature is None


def test_openssl_alone_makes_the_keys_and_checks_the_signature(tmp_path: Path) -> None:
    """Whoever gets the artifact needs nothing of ours."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")

    def openssl(*arguments: object) -> int:
        return subprocess.run(
            ["openssl", *map(str, arguments)], cwd=artifact, capture_output=True
        ).returncode

    artifact = make_artifact(tmp_path / "artifact")
    private, public = tmp_path / "k.pem", tmp_path / "k.pub"
    assert openssl("genpkey", "-algorithm", "ed25519", "-out", private) == 0
    assert openssl("pkey", "-in", private, "-pubout", "-out", public) == 0
    sign(artifact, read_private_key(private))
    require_signature(artifact, public)
    check = (
        *("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"),
        *("-in", "mmopt.json", "-sigfile", "mmopt.json.sig"),
    )
    assert openssl(*check) == 0
    (artifact / "mmopt.json").write_bytes((artifact / "mmopt.json").read_bytes() + b" ")
    assert openssl(*check) != 0


def test_two_signed_artifacts_are_byte_identical(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    first, second = (make_artifact(tmp_path / side / "artifact") for side in "ab")
    for artifact in (first, second):
        sign(artifact, read_private_key(keys[0]))
    assert same_artifact(first, second) == []


@pytest.mark.usefixtures("no_session")
def test_another_key_does_not_verify(signed: Path, tmp_path: Path) -> None:
    _, other = save_pair(tmp_path, name="other")
    with pytest.raises(CheckFailedError, match=r"was not signed with the key of .*other\.pub"):
        verify(signed, public_key=other)


@pytest.mark.usefixtures("no_session")
def test_a_changed_manifest_does_not_verify_though_its_hashes_are_right(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    """The graph computes something else, and the manifest was written to fit it."""

    def swap(model: object) -> None:
        model.graph.node[1].op_type = "Sub"  # type: ignore[attr-defined]

    edit_graph(signed, swap)
    with pytest.raises(CheckFailedError, match=r"its mmopt\.json was changed after it was signed"):
        verify(signed, public_key=keys[1])


@pytest.mark.usefixtures("no_session")
def test_a_changed_file_under_a_signature_that_holds_is_found(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    (signed / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckFailedError, match=r"model\.onnx has 1 bytes"):
        verify(signed, public_key=keys[1])


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("content", [b"", b"x" * 64, b"x" * 65])
def test_a_damaged_signature_does_not_verify(
    signed: Path, keys: tuple[Path, Path], content: bytes
) -> None:
    (signed / "mmopt.json.sig").write_bytes(content)
    with pytest.raises(CheckFailedError, match="was not signed with the key"):
        verify(signed, public_key=keys[1])


@pytest.mark.usefixtures("no_session")
def test_a_missing_or_linked_signature_does_not_verify(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    signature = signed / "mmopt.json.sig"
    elsewhere = signed.parent / "sig"
    signature.rename(elsewhere)
    with pytest.raises(CheckFailedError, match=r"is not signed: it has no mmopt\.json\.sig"):
        verify(signed, public_key=keys[1])
    signature.symlink_to(elsewhere)
    with pytest.raises(CheckFailedError, match="is not signed"):
        verify(signed, public_key=keys[1])


def test_a_folder_without_manifest_is_bad_input(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"not an artifact: it has no mmopt\.json"):
        verify(tmp_path, public_key=keys[1])


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "rsa", "p256", "other-half"])
@pytest.mark.parametrize("option", ["--sign", "--public-key"])
def test_a_key_that_cannot_be_used_is_bad_input(
    tmp_path: Path, keys: tuple[Path, Path], option: str, kind: str
) -> None:
    half = 0 if option == "--sign" else 1
    path = tmp_path / "bad.pem"
    expected = {
        "missing": "cannot be read",
        "folder": "is no file",
        "text": "is no (private|public) key, expected an Ed25519 key in PEM",
        "rsa": "is an RSA key, which is not supported, expected an Ed25519 key",
        "p256": "is an (EllipticCurve|EC) key, which is not supported",
        "other-half": f"is a {('public', 'private')[half]} key, expected the",
    }[kind]
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("-----BEGIN NOTHING-----\n")
    elif kind == "rsa":
        path = save_pair(tmp_path, rsa.generate_private_key(65537, 2048), "bad")[half]
    elif kind == "p256":
        path = save_pair(tmp_path, ec.generate_private_key(ec.SECP256R1()), "bad")[half]
    elif kind == "other-half":
        path = keys[1 - half]
    artifact = make_artifact(tmp_path / "artifact")

    def use() -> object:
        if option == "--sign":
            return read_private_key(path)
        return require_signature(artifact, path)

    with pytest.raises(InputError, match=expected) as caught:
        use()
    assert str(caught.value).startswith(option)
    assert caught.value.exit_code == 2


def test_an_encrypted_key_says_how_to_decrypt_it(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        )
    )
    with pytest.raises(InputError, match=r"is encrypted, expected a key without a password"):
        read_private_key(path)


@pytest.mark.usefixtures("no_session")
def test_without_the_library_the_message_says_what_to_install(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MmoptError, match=r"pip install 'mmopt\[sign\]'") as caught:
        verify(signed, public_key=keys[1])
    assert caught.value.exit_code == 3
    with pytest.raises(MmoptError, match=r"pip install 'mmopt\[sign\]'"):
        read_private_key(keys[0])
    assert is_signed(signed)
