"""Fail when the newest release in CHANGELOG.md is not the version in the code."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return 0 when changelog and code agree."""
    code = re.search(
        r'__version__ = "([^"]+)"',
        (ROOT / "kernels/mmopt_kernels/_version.py").read_text(encoding="utf-8"),
    )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (?:\[)?(\d[^\s\]]*)", changelog, flags=re.MULTILINE)
    version = code.group(1) if code else None
    if not releases or releases[0] != version:
        print(
            f"CHANGELOG.md's newest release is {releases[0] if releases else 'missing'}, expected "
            f"{version}, the version in kernels/mmopt_kernels/_version.py.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
