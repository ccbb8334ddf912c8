"""`mmopt.load_compiled`: a compiled model from a store, without compiling."""

from pathlib import Path
from typing import Any

from mmopt.compilation.model import CompiledModel
from mmopt.compilation.store import open_store
from mmopt_kernels.errors import InputError


def load_compiled(
    folder: str | Path, model: Any = None, *, sha256: str | None = None
) -> CompiledModel:
    """Load a store that `CompiledModel.save` or `mmopt compile -o` wrote.

    Nothing is compiled: the first call runs the stored graph. A call that the graph does not fit
    (another dtype, a switched-off adapter, eval instead of train mode) is compiled as usual, and
    counted with its reason in `recompiles`.

    A store is code, and loading it runs it. It is trusted when this user's key signed it or when
    `sha256` names it, and every file is held against its SHA-256 before it is opened.

    Args:
        folder: the store.
        model: prepared as it was when it was stored: the same `mmopt.optimize`, adapters, dtype,
            device, and train or eval mode; its values may differ. None makes the model from where
            `mmopt compile` found it.
        sha256: what was returned or printed when the store was made.

    Returns:
        The compiled model.

    Raises:
        InputError: not a store, not trusted, changed, or made for another version, machine, model
            or state; says which.
    """
    store = open_store(Path(folder), digest=sha256)
    if model is None:
        if store.record["source"] is None:
            raise InputError(
                f"{folder} does not say how its model is made, expected a model. Pass the model, "
                "prepared as it was when it was stored."
            )
        from mmopt.compilation.checkpoint import prepare_model

        model = prepare_model(**store.record["source"])
    options = store.record["options"]
    return CompiledModel(
        model, mode=options["mode"], dynamic=options["dynamic"], stored=store.graph(model)
    )
