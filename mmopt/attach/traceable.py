"""Methods of transformers that no compiler can trace whole, in other words for compiled calls.

They wait on the host for a device value (to check it, or to split by it), or flag a tensor for
autograd in place. Each is compiled again from its source with those lines changed, and put on the
instance. A call that is not traced still does what the method of the class does, but for attention
within pieces of a sequence, which mmopt's op takes all at once.
"""

import ast
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from mmopt.attach.attention import NAME, branches_for_flash, hands_over_pieces
from mmopt.attach.method import method_of
from mmopt.attach.report import Row
from mmopt.attach.source import (
    TRACEABLE,
    CannotRewriteError,
    compiled_again,
    definition_of,
    placed,
)
from mmopt_kernels.errors import InputError

# A rule changes a method's source in place and says what the change is, or None without one.
Rule = Callable[[ast.FunctionDef], str | None]


def attach_traceable(model: nn.Module, base: Any) -> tuple[list[Row], Callable[[], None]]:
    """Replace what stops a compiler in `base`, the `PreTrainedModel` within `model`.

    Returns:
        A row per method, and what undoes all of them.
    """
    names = {module: name for name, module in model.named_modules()}
    rows, attached = [], []
    for module in base.modules():
        for name, rule in _rules(module):
            method = getattr(type(module), name)
            try:
                definition = definition_of(method, name)
                remark = rule(definition)
                if remark is None:
                    continue
                if name in module.__dict__ and not _is_ours(module.__dict__[name]):
                    raise CannotRewriteError(f"its {name} is already replaced by something else")
                make = partial(_marked, definition, method, name)
                made = make()
            except CannotRewriteError as reason:
                rows.append(Row(names[module], "graph", None, str(reason)))
                continue
            setattr(module, name, method_of(module, made, make))
            attached.append((module, name))
            rows.append(Row(names[module], "graph", f"traceable {name}", remark))
    return rows, lambda: _restore(attached)


def _restore(attached: list[tuple[Any, str]]) -> None:
    for module, name in attached:
        if _is_ours(module.__dict__.get(name)):
            delattr(module, name)


def _marked(
    definition: ast.FunctionDef, method: Callable[..., Any], name: str
) -> Callable[..., Any]:
    made = compiled_again(definition, method, name, _NAMES)
    setattr(made, TRACEABLE, True)
    return made


def _is_ours(method: Any) -> bool:
    return hasattr(getattr(method, "__func__", method), TRACEABLE)


def _rules(module: nn.Module) -> Iterator[tuple[str, Rule]]:
    """The methods of this module that may stop a compiler, and how to change them."""
    from transformers import PreTrainedModel

    # A feature encoder of speech models, which transformers copies from Wav2Vec2 to its like.
    if hasattr(module, "_freeze_parameters") and hasattr(module, "_requires_grad"):
        yield "forward", _flags_nothing
    if hands_over_pieces(type(module).forward):
        yield "forward", _hands_over_pieces
    if isinstance(module, PreTrainedModel):
        if hasattr(module, "get_placeholder_mask"):
            yield "get_placeholder_mask", _asserts
        for name in ("get_image_features", "get_video_features"):
            if hasattr(module, name):
                yield name, _splits_nothing
        if type(module).__name__.endswith("ForCTC"):
            yield "forward", _counts_on_device


# --- rules ----------------------------------------------------------------------------------------


def _hands_over_pieces(definition: ast.FunctionDef) -> str | None:
    """Attention within windows and images: flash attention is given their ends, once.

    What is not flash attention is called for one after the other, cut by lengths on the host, or
    (Pixtral's tower) gets a mask of all against all.
    """
    found = branches_for_flash(definition)
    for node in found:
        source = f"self.config._attn_implementation == {NAME!r} or {ast.unparse(node.test)}"
        node.test = placed(ast.parse(source, mode="eval").body, node.test)
    return "windows and images in one call of the op, where the tower has it" if found else None


def _asserts(definition: ast.FunctionDef) -> str | None:
    """`torch_compilable_check(condition, message)` waits when it is traced: an assertion instead.

    Its message would also make every number of images a constant of the graph.
    """
    if not _replace_checks(definition):
        return None
    return "compiled, the device checks that features and placeholders are equally many"


def _replace_checks(definition: ast.FunctionDef) -> int:
    class Checks(ast.NodeTransformer):
        found = 0

        def visit_Expr(self, node: ast.Expr) -> Any:
            call = node.value
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch_compilable_check":
                if len(call.args) != 2 or call.keywords:
                    raise CannotRewriteError(f"a check of it is not known: {ast.unparse(call)}")
                self.found += 1
                condition, message = (ast.unparse(argument) for argument in call.args)
                source = f"mmopt_check(mmopt_checks, {condition}, lambda: {message})"
                return placed(ast.parse(source).body[0], node)
            return node

        def visit_Return(self, node: ast.Return) -> Any:
            if node.value is not None:
                source = f"return mmopt_checked({ast.unparse(node.value)}, mmopt_checks)"
                return placed(ast.parse(source).body[0], node)
            return node

    checks = Checks()
    checks.visit(definition)
    definition.body.insert(0, placed(ast.parse("mmopt_checks = []").body[0], definition.body[0]))
    return checks.found


def _splits_nothing(definition: ast.FunctionDef) -> str | None:
    """`torch.split(features, sizes.tolist())`: the caller joins what was split."""
    names = {
        statement.targets[0].id
        for statement in ast.walk(definition)
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and ast.unparse(statement.value).endswith(".tolist()")
    }

    class Splits(ast.NodeTransformer):
        found: set[str] = set()  # noqa: RUF012 - of one object

        def visit_Assign(self, node: ast.Assign) -> Any:
            self.generic_visit(node)
            if isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
                source = f"None if mmopt_is_traced() else {ast.unparse(node.value)}"
                node.value = placed(ast.parse(source, mode="eval").body, node.value)
            return node

        def visit_Call(self, node: ast.Call) -> Any:
            self.generic_visit(node)
            if ast.unparse(node.func) == "torch.split" and len(node.args) == 2:
                sizes = ast.unparse(node.args[1])
                if sizes in names and not node.keywords:
                    self.found = self.found | {sizes}
                    node.func = placed(ast.Name("mmopt_split", ast.Load()), node.func)
            return node

    splits = Splits()
    splits.visit(definition)
    if not splits.found or splits.found != names:
        return None
    return "compiled, it returns the features of all images in one tensor"


def _flags_nothing(definition: ast.FunctionDef) -> str | None:
    """`hidden_states.requires_grad = True`, for re-entrant checkpointing, which no graph has."""
    found = 0
    for node in ast.walk(definition):
        if isinstance(node, ast.If) and any(
            isinstance(line, ast.Assign) and ast.unparse(line.targets[0]).endswith(".requires_grad")
            for line in node.body
        ):
            source = f"not mmopt_is_traced() and ({ast.unparse(node.test)})"
            node.test = placed(ast.parse(source, mode="eval").body, node.test)
            found += 1
    return "compiled, it leaves its input's requires_grad as it is" if found else None


def _counts_on_device(definition: ast.FunctionDef) -> str | None:
    """CTC: the range of labels, and a loss whose shapes depend on the number of labels."""

    class Labels(ast.NodeTransformer):
        found = 0

        def visit_If(self, node: ast.If) -> Any:
            self.generic_visit(node)
            test = ast.unparse(node.test)
            known = "labels is not None and labels.max() >= "
            if test.startswith(known) and isinstance(node.body[0], ast.Raise) and not node.orelse:
                error = node.body[0].exc
                if not isinstance(error, ast.Call) or ast.unparse(error.func) != "ValueError":
                    raise CannotRewriteError(f"a check of it is not known: {test}")
                source = (
                    "if labels is not None:\n"
                    "    mmopt_checks = []\n"
                    f"    mmopt_check(mmopt_checks, labels.max() < {test.removeprefix(known)},"
                    f" lambda: {ast.unparse(error.args[0])})\n"
                    "    labels = mmopt_checked(labels, mmopt_checks)\n"
                )
                return placed(ast.parse(source).body[0], node)
            return node

        def visit_Call(self, node: ast.Call) -> Any:
            self.generic_visit(node)
            if ast.unparse(node.func) == "self.loss_function":
                self.found += 1
                node.args.insert(0, node.func)
                node.func = placed(ast.Name("mmopt_ctc_loss", ast.Load()), node.func)
            return node

    labels = Labels()
    labels.visit(definition)
    if not labels.found:
        return None
    return "compiled, the device checks the labels, and the loss is mmopt::ctc_losses"


# --- what the changed lines call ------------------------------------------------------------------


def _check(checks: list[Any], condition: Any, message: Callable[[], str]) -> None:
    """transformers' check, or while it is traced a note of what is to hold."""
    from transformers.utils import torch_compilable_check

    if torch.compiler.is_compiling():
        checks.append(condition)
    else:
        torch_compilable_check(condition, message)


def _checked(value: Any, checks: list[Any]) -> Any:
    """The value, once all checks hold: what depends on it depends on them."""
    conditions = [condition for condition in checks if isinstance(condition, Tensor)]
    for condition in checks:
        if not isinstance(condition, Tensor):
            torch._check(condition)  # type: ignore[no-untyped-call]
    if not conditions:
        return value
    holds = torch.stack([condition.all() for condition in conditions])
    if isinstance(value, Tensor):
        return _held(value, holds)
    return tuple(_held(x, holds) if isinstance(x, Tensor) else x for x in value)


_NOT_HELD = (
    "the batch does not fit the model: as many image, video or audio features as placeholder "
    "tokens are expected, and labels below the vocabulary's size. Run the model on this batch "
    "without mmopt.compile to see the numbers."
)


# An op of its own for the reason of `mmopt::proven_bounds` in attention.py.
@torch.library.custom_op("mmopt::held", mutates_args=())
def _held(value: Tensor, holds: Tensor) -> Tensor:
    if holds.device.type != "cpu":
        # The host must not wait for a device value.
        torch._assert_async(holds.all(), _NOT_HELD)
    elif not holds.all():
        raise InputError(_NOT_HELD)
    return value.clone()


@_held.register_fake
def _held_fake(value: Tensor, holds: Tensor) -> Tensor:
    return torch.empty_like(value)


def _split(features: Tensor, sizes: list[int] | None) -> tuple[Tensor, ...]:
    return (features,) if sizes is None else torch.split(features, sizes)


def _ctc_loss(
    own: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    logit_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCTCLoss, `own`, or while it is traced the same without a dynamic shape."""
    from transformers.loss.loss_utils import ForCTCLoss

    if own is not ForCTCLoss or not torch.compiler.is_compiling():
        return own(
            logits=logits,
            labels=labels,
            logit_lengths=logit_lengths,
            blank_token_id=blank_token_id,
            reduction=reduction,
            zero_infinity=zero_infinity,
            ignore_index=ignore_index,
            **kwargs,
        )
    labels = labels.to(logits.device)
    real = (labels != ignore_index) & (labels != blank_token_id)
    lengths = real.sum(-1)
    # To the front of each row; what is behind the length is not read.
    targets = labels.gather(1, torch.argsort(~real, dim=1, stable=True))
    log_probs = log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    losses: Tensor = _ctc_losses(
        log_probs, targets, logit_lengths, lengths, blank_token_id, zero_infinity
    )[0]
    # As torch.nn.functional.ctc_loss reduces them.
    if zero_infinity:
        losses = losses.where(losses != torch.inf, 0.0)
    if reduction == "mean":
        losses = (losses / lengths.clamp(min=1)).mean()
    elif reduction == "sum":
        losses = losses.sum()
    return losses


@torch.library.custom_op("mmopt::ctc_losses", mutates_args=())
def _ctc_losses(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> tuple[Tensor, Tensor]:
    """The CTC loss of each row `[N]`, and its gradient with respect to `log_probs` `[T, N, C]`.

    Torch's own, whose intermediate result has a shape that depends on lengths: here it stays
    inside. Torch takes the lengths to the host, from a GPU too.
    """
    given = (log_probs, targets, input_lengths, target_lengths)
    losses, alpha = torch.ops.aten._ctc_loss.Tensor(*given, blank, zero_infinity)
    gradient = torch.ops.aten._ctc_loss_backward.Tensor(
        torch.ones_like(losses), *given, losses, alpha, blank, zero_infinity
    )
    return losses, gradient.contiguous()


@_ctc_losses.register_fake
def _ctc_losses_fake(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> tuple[Tensor, Tensor]:
    return log_probs.new_empty(log_probs.shape[1]), log_probs.new_empty(log_probs.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _ctc_backward(ctx: Any, of_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return gradient * of_losses[None, :, None], None, None, None, None, None


_ctc_losses.register_autograd(_ctc_backward, setup_context=_save)


_NAMES: dict[str, Any] = {
    "mmopt_check": _check,
    "mmopt_checked": _checked,
    "mmopt_is_traced": torch.compiler.is_compiling,
    "mmopt_split": _split,
    "mmopt_ctc_loss": _ctc_loss,
}
