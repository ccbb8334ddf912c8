"""How library functions report progress without knowing who watches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Called with a description and a total (None when unknown); the block advances it by steps."""


@contextmanager
def silent(_description: str, _total: int | None) -> Iterator[Callable[[int], None]]:
    """Report to nobody: the default."""
    yield lambda _steps: None
