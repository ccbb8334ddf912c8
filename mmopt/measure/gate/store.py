"""Where the last self-test of this machine is kept, so that every report can carry it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmopt.measure.gate.decision import LOOKS
from mmopt.measure.suites.files import write_json

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
        theirs = stored["fingerprint"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # never measured here, or a file of another version
    same = all(theirs.get(name) == machine.get(name) for name in MACHINE_FIELDS)
    return stored if same and stored.get("looks") == list(LOOKS) else None


def store_self_test(result: Mapping[str, Any]) -> Path:
    """Keep a self-test's result for later reports.

    Raises:
        MmoptError: the file system refused.
    """
    path = self_test_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(result))
    return path
