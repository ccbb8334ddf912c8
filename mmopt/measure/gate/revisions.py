"""Two revisions of a repository, checked out side by side and built, and nothing left behind."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmopt.measure.gate.config import GateConfig
from mmopt.measure.suites.collection import pytest_environment
from mmopt_export.progress import Progress
from mmopt_kernels.errors import InputError, MmoptError

# Lines of a failed command's output that an error repeats.
TAIL_LINES = 15


@dataclass(frozen=True)
class Revision:
    """A commit, and the name that the user gave for it."""

    ref: str
    commit: str


@dataclass(frozen=True)
class Checkout:
    """One side of the comparison.

    Attributes:
        side: `base` or `head`: names of equal length, so that paths are as well.
        revision: what is checked out.
        root: where.
        sources: folders that go on PYTHONPATH.
        own: folders whose packages must be imported from this checkout.
        repository: the user's own tree, which must not be what is measured.
    """

    side: str
    revision: Revision
    root: Path
    sources: tuple[Path, ...]
    own: tuple[Path, ...]
    repository: Path

    def environment(self) -> dict[str, str]:
        """The process environment in which this checkout's code is the one imported."""
        before = os.environ.get("PYTHONPATH")
        path = [*map(str, self.sources), *([before] if before else [])]
        return {**pytest_environment(), "PYTHONPATH": os.pathsep.join(path)}


def repository_root(folder: Path) -> Path:
    """The root of the git repository that `folder` is in.

    Raises:
        InputError: it is in none.
        MmoptError: git is not installed.
    """
    if shutil.which("git") is None:
        raise MmoptError("gate: git is not installed. Install it (apt-get install git).")
    ran = _git(folder, "rev-parse", "--show-toplevel", check=False)
    if ran.returncode:
        raise InputError(
            f"gate: {folder} is not in a git repository ({ran.stderr.strip()}). "
            "Run the gate inside the repository whose revisions it compares."
        )
    return Path(ran.stdout.strip())


def from_root(root: Path, path: Path) -> Path:
    """A path of the command line, which is relative to the working directory, from the root.

    Raises:
        InputError: it is outside the repository.
    """
    place = path.resolve()
    if not place.is_relative_to(root.resolve()):
        raise InputError(
            f"gate: {path} is outside the repository {root}. Name a folder or a file in it."
        )
    return place.relative_to(root.resolve())


def resolve(root: Path, ref: str, option: str) -> Revision:
    """The commit that `ref` names.

    Raises:
        InputError: there is none.
    """
    ran = _git(
        root,
        "rev-parse",
        "--verify",
        "--quiet",
        "--end-of-options",
        f"{ref}^{{commit}}",
        check=False,
    )
    if ran.returncode:
        shallow = _git(root, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        hint = (
            "This clone is shallow: fetch the revision first (in GitHub Actions, fetch-depth: 0)."
            if shallow
            else "`git log --oneline --all` lists what there is."
        )
        raise InputError(f"{option} {ref}: the repository has no such revision. {hint}")
    return Revision(ref, ran.stdout.strip())


def require_clean(root: Path, suite: Path) -> None:
    """Refuse changes that no revision holds: they would not be measured.

    Raises:
        InputError: tracked files differ from HEAD, or the suite has files that git does not know.
    """
    changed = _git(root, "status", "--porcelain", "--untracked-files=no").stdout.splitlines()
    changed += _git(
        root, "ls-files", "--others", "--exclude-standard", "--", str(suite)
    ).stdout.splitlines()
    if changed:
        names = ", ".join(line.strip() for line in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"gate: the working tree has changes that HEAD does not hold ({names}{more}), so they "
            "would not be measured. Commit them, or name what to measure with --head REF. Nothing "
            "was stashed or changed."
        )


@contextmanager
def checked_out(
    root: Path, base: Revision, head: Revision, config: GateConfig, progress: Progress
) -> Iterator[tuple[Checkout, Checkout]]:
    """Both revisions in a temporary folder, built; removed when the block ends.

    Raises:
        InputError: a source folder of the configuration is in neither checkout.
        MmoptError: git could not check out, or a build failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="mmopt-gate-")).resolve()
    added: list[Path] = []
    try:
        sides = []
        with progress("check out and build", 2) as advance:
            for side, revision in (("base", base), ("head", head)):
                place = folder / side
                added.append(place)
                _git(root, "worktree", "add", "--quiet", "--detach", str(place), revision.commit)
                sources = tuple(place / path for path in config.sources if (place / path).is_dir())
                if not sources:
                    raise InputError(
                        f"gate: {side} ({revision.ref}) has none of the source folders "
                        f"{', '.join(map(str, config.sources))}. Set sources in [tool.mmopt.gate]."
                    )
                # Unless the user says where the packages are, any folder may hold them.
                folders = () if "sources" in config.model_fields_set else place.glob("[!.]*/")
                own = tuple({*sources, *folders})
                checkout = Checkout(side, revision, place, sources, own, root)
                _build(checkout, config.build)
                sides.append(checkout)
                advance(1)
        yield sides[0], sides[1]
    finally:
        for place in added:
            _git(root, "worktree", "remove", "--force", str(place), check=False)
        shutil.rmtree(folder, ignore_errors=True)
        _git(root, "worktree", "prune", check=False)


def changed_files(root: Path, base: Revision, head: Revision, suite: Path) -> list[str]:
    """Files of the suite that differ between the revisions."""
    names = _git(root, "diff", "--name-only", base.commit, head.commit, "--", str(suite)).stdout
    return names.splitlines()


def _build(checkout: Checkout, commands: Sequence[str]) -> None:
    for command in commands:
        ran = subprocess.run(
            command,
            shell=True,
            cwd=checkout.root,
            env=checkout.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if ran.returncode:
            raise MmoptError(
                f"gate: `{command}` failed in {checkout.side} ({checkout.revision.ref}) with "
                f"status {ran.returncode}:\n{tail(ran.stdout)}"
            )


def tail(text: str) -> str:
    """The last lines of an output, for an error."""
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


def git_environment() -> dict[str, str]:
    """The process environment in which git works on the repository of its working directory."""
    # Hooks set GIT_DIR and others, which would point git at their repository.
    listed = subprocess.run(
        ["git", "rev-parse", "--local-env-vars"], capture_output=True, text=True, check=False
    )
    local = listed.stdout.split()
    return {name: value for name, value in os.environ.items() if name not in local}


def _git(folder: Path, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    ran = subprocess.run(
        # The user's hooks are for the user's checkouts, not for these.
        ["git", "-c", f"core.hooksPath={os.devnull}", *arguments],
        cwd=folder,
        env=git_environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if check and ran.returncode:
        raise MmoptError(f"gate: git {arguments[0]} failed: {ran.stderr.strip()}")
    return ran
