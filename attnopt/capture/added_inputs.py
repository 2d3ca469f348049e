"""Arguments that a policy adds to a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from attnopt.base.input import Input
from attnopt.errors import PolicyError

_ADDED = "_attnopt_added"


def taking(
    model: nn.Module, inputs: Iterable[Input], given: Mapping[str, object], dynamic_shapes: object
) -> tuple[nn.Module, object]:
    """``model`` with those of ``inputs`` that it does not have as further keyword arguments.  It ignores them, unless
    it takes any keyword; an optimized model, called with any, takes those of its own example alone.

    ``given``: the keyword arguments of the example.  ``dynamic_shapes`` also comes back, with axes for what was added, which
    are those of what reads it.  Raises PolicyError.
    """
    names = [i.name for i in inputs]
    own = [*inspect.signature(model.forward).parameters, *getattr(model, "argument_names", ())] if names else []
    added = [name for name in names if name not in own]
    if not added:
        return model, dynamic_shapes
    if taken := [name for name in added if name in getattr(model, "inner_names", ())]:
        raise PolicyError(
            f"the policy reads the input {taken[0]}, but the file has a value or a weight of this name, which is no input",
            hint="choose another name for the input",
        )
    if missing := [name for name in added if name not in given]:
        listed = ", ".join(missing)
        raise PolicyError(
            f"the policy reads the input {listed}, which is not among the example inputs",
            hint=f"pass an example in kwargs, as in kwargs={{{missing[0]!r}: tensor}}, and in every call of the result",
        )
    made = copy.copy(model)
    kind, forward = type(model), vars(made).pop("forward", None)
    about = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": _ignoring(kind, forward, added, known=hasattr(model, "argument_names")),
        _ADDED: tuple(added),
    }
    made.__class__ = type(kind.__name__, (kind,), about)
    if isinstance(dynamic_shapes, Mapping) and dynamic_shapes:
        free = {name: _free_axes(x, dynamic_shapes) for name in added if isinstance(x := given[name], Tensor)}
        asked = {name: axes for name, axes in dynamic_shapes.items() if axes is not None or name not in added}
        return made, {**dynamic_shapes, **free, **asked}
    return made, dynamic_shapes


def added_to(model: nn.Module) -> tuple[str, ...]:
    """The keyword arguments that ``taking`` added to ``model``."""
    names: tuple[str, ...] = getattr(type(model), _ADDED, ())
    return names


def _free_axes(x: Tensor, dynamic_shapes: Mapping[str, object]) -> dict[int, object]:
    """All axes, except a batch of one where no other input has a dynamic one: it stays one."""
    batches = any(isinstance(axes, Mapping) and axes.get(0) is not None for axes in dynamic_shapes.values())
    first = 1 if x.dim() > 1 and x.shape[0] == 1 and not batches else 0
    return dict.fromkeys(range(first, x.dim()), Dim.AUTO)


def _ignoring(
    kind: type[nn.Module], of_instance: Callable[..., Any] | None, names: Collection[str], *, known: bool
) -> Callable[..., object]:
    """``known``: the model takes no other keywords than it tells, whatever the signature of its ``forward``."""
    own: Any = kind.forward if of_instance is None else lambda _, *args, **kwargs: of_instance(*args, **kwargs)
    signature = inspect.signature(kind.forward if of_instance is None else of_instance)
    parameters = list(signature.parameters.values())
    takes_any = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    ignored = names if known or not takes_any else ()

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        return own(self, *args, **{name: x for name, x in kwargs.items() if name not in ignored})

    if of_instance is not None:
        parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
    last = len(parameters) - takes_any
    parameters[last:last] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward
