"""How a captured graph is called: with the model's own signature, and only with inputs that it covers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.containers import OF_EACH_KIND
from attnopt.errors import CaptureError
from attnopt.graph.nodes import input_name, inputs_of


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model's ``forward``; its default, which may be any object, is stored as text."""

    name: str
    kind: str
    default: object = inspect.Parameter.empty


@dataclass(frozen=True)
class Signature:
    """The parameters of ``forward``, and which of them were passed at capture, and how."""

    parameters: tuple[Parameter, ...]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    @classmethod
    def of(cls, forward: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> Signature:
        found = inspect.signature(forward)
        names = [p for p in found.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = [f"*{i}" for i in range(max(0, len(args) - len(names)))]
        parameters = tuple(Parameter(p.name, p.kind.name, p.default) for p in found.parameters.values())
        return cls(parameters, (*(p.name for p in names[: len(args)]), *rest), tuple(kwargs))

    def signature(self) -> inspect.Signature:
        kinds = {k.name: k for k in inspect._ParameterKind}
        return inspect.Signature([inspect.Parameter(p.name, kinds[p.kind], default=p.default) for p in self.parameters])

    def arrange(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> CallInputs:
        """The arguments in the form in which the graph was captured.  Raises CaptureError."""
        bound = self.signature().bind(*args, **kwargs)
        given: dict[str, object] = {}
        for p in self.parameters:
            if p.name not in bound.arguments:
                continue
            value = bound.arguments[p.name]
            if p.kind == "VAR_POSITIONAL":
                given.update({f"*{i}": v for i, v in enumerate(value)})
            elif p.kind == "VAR_KEYWORD":
                given.update(value)
            else:
                given[p.name] = value
        wanted = (*self.positional, *self.keywords)
        defaults = {p.name: p.default for p in self.parameters}
        extra = [n for n, v in given.items() if n not in wanted and not _is_default(v, defaults.get(n))]
        if extra:
            raise CaptureError(
                f"called with {', '.join(extra)}, which {'was' if len(extra) == 1 else 'were'} not in the example inputs",
                hint=f"optimize the model with example inputs that include {', '.join(extra)}",
            )
        missing = [
            n for n in wanted if n not in given and defaults.get(n, inspect.Parameter.empty) is inspect.Parameter.empty
        ]
        if missing:
            raise CaptureError(
                f"called without {', '.join(missing)}", hint="pass every input that was in the example inputs"
            )
        values = {**defaults, **given}
        return CallInputs(tuple(values[n] for n in self.positional), {n: values[n] for n in self.keywords})

    def to_json(self) -> dict[str, object]:
        plain = (type(None), bool, int, float, str)
        return {
            "parameters": [
                {
                    "name": p.name,
                    "kind": p.kind,
                    **(
                        {"default": p.default}
                        if isinstance(p.default, plain)
                        else {"required": p.default is inspect.Parameter.empty}
                    ),
                }
                for p in self.parameters
            ],
            "positional": list(self.positional),
            "keywords": list(self.keywords),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        parameters = tuple(
            Parameter(
                str(p["name"]),
                str(p["kind"]),
                p["default"] if "default" in p else inspect.Parameter.empty if p.get("required", True) else None,
            )
            for p in data["parameters"]
        )
        return cls(parameters, tuple(map(str, data["positional"])), tuple(map(str, data["keywords"])))


def _is_default(value: object, default: object) -> bool:
    if isinstance(value, Tensor) or isinstance(default, Tensor):
        return False
    return value is default or value is None or bool(value == default)


def is_guard(e: BaseException) -> bool:
    """torch's error for size constraints that do not hold (see ``relations``)."""
    return isinstance(e, AssertionError) and str(e).startswith("Guard failed")


def check_inputs(
    module: torch.fx.GraphModule,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    fixed: Collection[str] = (),
    is_inside: Callable[[int], bool] = lambda _: False,
    remedy: Callable[[str], str | None] = lambda _: None,
) -> None:
    """Refuse inputs that the graph was not captured for, naming the input and the axis.  Raises CaptureError.

    ``fixed``: the report's lines about requested axes that stayed static.  ``is_inside``: the input of this number is part of
    an object, such as a cache.  ``remedy``: what to do about an input of this name, if it is known."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    nodes = inputs_of(module.graph)
    if len(leaves) != len(nodes):
        raise CaptureError(
            f"called with {len(leaves)} values, but captured with {len(nodes)}",
            hint="pass inputs with the same structure as the example",
        )
    symbols: dict[sympy.Symbol, int] = {}
    for number, (node, leaf) in enumerate(zip(nodes, leaves, strict=True)):
        expected = node.meta.get("val")
        if not isinstance(expected, Tensor):
            continue
        name = input_name(node)
        if not isinstance(leaf, Tensor):
            raise CaptureError(f"{name} is {type(leaf).__name__}, captured as a tensor", hint=remedy(name))
        if leaf.dtype != expected.dtype:
            raise CaptureError(
                f"{name} has dtype {leaf.dtype}, captured with {expected.dtype}",
                hint=f"convert it to {expected.dtype}",
            )
        kinds = OF_EACH_KIND if is_inside(number) else None
        _check_shape(name, tuple(leaf.shape), tuple(expected.shape), symbols, fixed, kinds, remedy)
    for node, leaf in zip(nodes, leaves, strict=True):
        if isinstance(leaf, Tensor):
            _check_computed_sizes(input_name(node), tuple(leaf.shape), node.meta["val"].shape, symbols, remedy)


def _check_shape(
    name: str,
    got: tuple[int, ...],
    expected: tuple[int | torch.SymInt, ...],
    symbols: dict[sympy.Symbol, int],
    fixed: Collection[str],
    kinds: str | None,
    remedy: Callable[[str], str | None],
) -> None:
    if len(got) != len(expected):
        raise CaptureError(f"{name} has {len(got)} axes, captured with {len(expected)}", hint=remedy(name))
    for axis, (size, want) in enumerate(zip(got, expected, strict=True)):
        if isinstance(want, int):
            if size != want:
                raise CaptureError(
                    f"{name} has length {size} along axis {axis}, but was captured for {want} only",
                    hint=kinds or remedy(name) or _remedy(name, axis, size, f"{name}[{axis}] = {want}" in fixed),
                )
        elif want.node.expr.is_symbol and symbols.setdefault(want.node.expr, size) != size:
            raise CaptureError(
                f"{name} has length {size} along axis {axis}, but another input has {symbols[want.node.expr]} for it",
                hint=remedy(name),
            )


def _check_computed_sizes(
    name: str,
    got: tuple[int, ...],
    expected: tuple[int | torch.SymInt, ...],
    symbols: Mapping[sympy.Symbol, int],
    remedy: Callable[[str], str | None],
) -> None:
    """Sizes that follow from those of other inputs, such as the number of tokens beside a class token."""
    for axis, (size, want) in enumerate(zip(got, expected, strict=True)):
        if isinstance(want, int) or not want.node.expr.free_symbols <= symbols.keys():
            continue
        known = {s: symbols[s] for s in want.node.expr.free_symbols}
        if not all(isinstance(n, int) for n in known.values()):
            continue  # symbolic while the model is captured anew
        wanted = int(want.node.expr.subs(known))
        if size != wanted:
            raise CaptureError(
                f"{name} has length {size} along axis {axis}, but the other inputs require {wanted}", hint=remedy(name)
            )


def _remedy(name: str, axis: int, size: int, is_stuck: bool) -> str:
    if is_stuck:
        return (
            f"the model fixes this axis: optimize with an example of length {size} there, "
            "or export a program anew with this axis dynamic"
        )
    return f'optimize with dynamic_shapes="auto", or {{"{name}": {{{axis}: torch.export.Dim.DYNAMIC}}}}'
