"""A text classification task from real text that is already on the machine.

The task: tell from a docstring whether it documents a function, a class, a method or a property.
The docstrings are those of the installed sympy, networkx and torch, read from their source
without importing it. Modules, not docstrings, are split into train and test, so that no module's
vocabulary helps in both halves, and a docstring that occurs twice is dropped.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("sympy", "networkx", "torch")
KINDS = ("class", "function", "method", "property")
TEST_SHARE = 0.3


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, docstring) of each public definition in a source file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # templates and test data that are not Python
    yield from _walk(tree, inside_class=False)


def _walk(node: ast.AST, *, inside_class: bool) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            kind = "class"
        elif isinstance(child, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
            is_property = any("property" in decorator for decorator in decorators)
            kind = "property" if is_property else "method" if inside_class else "function"
        else:
            yield from _walk(child, inside_class=inside_class)
            continue
        text = ast.get_docstring(child)
        if text and not child.name.startswith("_"):
            yield kind, text
        if kind == "class":
            yield from _walk(child, inside_class=True)


def collect() -> list[tuple[str, str, str]]:
    """Return unique (module, kind, first paragraph) of every package, in a fixed order."""
    seen: set[str] = set()
    rows = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package} is not installed. Run `make demo`, which installs it.")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            module = f"{package}/{path.relative_to(root).as_posix()}"
            for kind, docstring in docstrings(path):
                text = " ".join(docstring.split("\n\n")[0].split())
                if len(text) >= 20 and text not in seen:
                    seen.add(text)
                    rows.append((module, kind, text))
    return rows


def is_test(module: str) -> bool:
    """Whether a module belongs to the test half: decided by its name alone."""
    digest = hashlib.sha256(module.encode()).digest()
    return digest[0] / 256 < TEST_SHARE


def balanced(rows: list[tuple[str, str]], limit: int, generator: random.Random) -> list[dict]:
    """Take `limit` rows, as many of each kind, in random order."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, text in rows:
        by_kind[kind].append(text)
    chosen = []
    for kind in KINDS:
        count = min(limit // len(KINDS), len(by_kind[kind]))
        chosen += [{"text": t, "label": kind} for t in generator.sample(by_kind[kind], count)]
    generator.shuffle(chosen)
    return chosen


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="rows of train.jsonl")
    parser.add_argument("--test", type=int, default=1200, help="rows of test.jsonl")
    arguments = parser.parse_args()
    rows = collect()
    generator = random.Random(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, limit, half in (
        ("train", arguments.train, False),
        ("test", arguments.test, True),
    ):
        pool = [(kind, text) for module, kind, text in rows if is_test(module) is half]
        chosen = balanced(pool, limit, generator)
        path = arguments.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        counts = {kind: sum(row["label"] == kind for row in chosen) for kind in KINDS}
        print(f"{path}: {len(chosen)} docstrings, {counts}")


if __name__ == "__main__":
    main()
