"""Where the last self-test of this machine is kept, so that every report can carry it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmopt.measure.gate.decision import LOOKS
from mmopt.measure.suites.files import write_json
from mmopt_kernels.errors import MmoptError

MACHINE_FIELDS = ("cpu", "cores", "quota_cores", "governor", "system")
"""Fields of a fingerprint on which the gate's noise depends."""


def self_test_file() -> Path:
    """`gate-self-test.json` in mmopt's cache folder, after the XDG base directory specification."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mmopt" / "gate-self-test.json"


def stored_self_test(machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `--self-test` last measured on a machine like this one; None when it never did."""
    try:
        stored: dict[str, Any] = json.loads(self_test_file().read_text(encoding="utf-8"))
        theirs = {name: stored["fingerprint"].get(name) for name in MACHINE_FIELDS}
        method = stored["looks"]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None  # never measured here, no home, or a file of another version
    same = theirs == {name: machine.get(name) for name in MACHINE_FIELDS}
    return stored if same and method == list(LOOKS) else None


def prepare_store() -> Path:
    """The file for a self-test's result, its folder made: before hours of measuring, not after.

    Raises:
        MmoptError: the file system refused, or the user has no home.
    """
    try:
        path = self_test_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is not writable")
    except (OSError, RuntimeError) as error:
        raise MmoptError(
            f"self-test: the result cannot be kept for later reports: {error}. "
            "Set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    return path


def store_self_test(result: Mapping[str, Any]) -> Path:
    """Keep a self-test's result for later reports.

    Raises:
        MmoptError: the file system refused.
    """
    path = prepare_store()
    write_json(path, dict(result))
    return path
