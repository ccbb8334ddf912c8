"""Which modules of a model are compiled: the model, or what data parallelism leaves in one piece.

`DistributedDataParallel` and `fully_shard` do their work (gathering, reducing, bookkeeping) in
Python around modules, in a wrapper's forward or in hooks, which no graph can hold. So the modules
inside are compiled and that Python stays as it is: for `DistributedDataParallel` the model in it,
for `fully_shard` each sharded module that has no other inside, as PyTorch's own recipes for FSDP2
compile each block.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo.backends.distributed
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from mmopt.attach.peft_layers import within_peft
from mmopt_kernels.errors import InputError


def refuse_compiled(model: Any) -> None:
    """Raise InputError for a model that torch.compile has compiled already."""
    for module in _wrappers(model):
        if isinstance(module, OptimizedModule):
            raise InputError(
                "the model is already compiled by torch.compile, expected one that is not. Pass "
                "the model that was given to torch.compile."
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{type(module).__name__} is already compiled by its compile() method, expected a "
                "model that is not. Leave out that call: mmopt.compile takes its place."
            )


def _wrappers(model: Any) -> Iterator[Any]:
    """The model and what is inside it, while that is one wrapper around another."""
    yield model
    if isinstance(model, DistributedDataParallel):
        yield from _wrappers(model.module)
    elif not isinstance(model, OptimizedModule) and (inner := within_peft(model)) is not model:
        yield inner


def regions_of(model: nn.Module) -> list[nn.Module]:
    """The modules to compile, one graph each; `[model]` when nothing is around or inside it."""
    if isinstance(model, DistributedDataParallel):
        return regions_of(model.module)
    sharded = [module for module in model.modules() if is_sharded(module)]
    innermost = [
        module
        for module in sharded
        if not any(is_sharded(inside) for inside in module.modules() if inside is not module)
    ]
    return innermost or [model]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this very module."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_bucket_end(place: traceback.FrameSummary) -> bool:
    """Whether a graph break is where Dynamo cut one traced graph at the end of a DDP bucket.

    Python does not go on there; the bucket is reduced while backward does. Users who would rather
    have one graph set `torch._dynamo.config.optimize_ddp = False`.
    """
    return place.filename == torch._dynamo.backends.distributed.__file__


def run_regions(
    model: nn.Module, regions: list[nn.Module], compiler: Callable[..., Any]
) -> Callable[..., Any]:
    """What calls `model` with each region compiled.

    `_compiled_call_impl` is where `nn.Module.compile` puts what calls are to run. It is set during
    a call only, so that the model itself stays as it was.
    """
    compiled = [(region, compiler(region._call_impl)) for region in regions]
    # Blocks that are alike share their code and its graphs. Where no two are (a block that reads
    # its own index), each needs a graph of its own before Dynamo gives up on the code.
    limit = torch._dynamo.config.patch(
        recompile_limit=torch._dynamo.config.recompile_limit + len(regions)
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        before = [region._compiled_call_impl for region in regions]
        try:
            for region, implementation in compiled:
                region._compiled_call_impl = implementation
            with limit:
                return model(*args, **kwargs)
        finally:
            for region, implementation in zip(regions, before, strict=True):
                region._compiled_call_impl = implementation

    return run


def alone(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which a step tries the model out: `DistributedDataParallel` reduces nothing.

    Its reducer waits for hooks of stored gradients, and none is stored.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def try_backward(model: nn.Module, loss: Tensor, trainable: list[nn.Parameter]) -> None:
    """Run backward and leave every `grad` as it is."""
    if not any(is_sharded(module) for module in model.modules()):
        torch.autograd.grad(loss, trainable, allow_unused=True)
        return
    # Sharded parameters are not part of the graph. Their gradients come from hooks, of which a
    # backward that asks for other tensors runs some, and the next step trips over the rest.
    with _gradients_kept(trainable):
        torch.autograd.backward(loss)


@contextmanager
def _gradients_kept(parameters: list[nn.Parameter]) -> Iterator[None]:
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
