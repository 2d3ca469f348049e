"""What a saved graph may contain: checked before torch, which would trust it, sees it.

torch's graph reader turns names and guards into source code, imports modules named in a structure of inputs, evaluates
size expressions, and looks any dotted name up as an operator.  An untrusted file must contain nothing of the kind.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


class NotAGraphError(ValueError):
    """The file contains something that ``save`` never writes."""


def check_graph(parsed: object) -> None:
    """Raises NotAGraphError."""
    if not isinstance(parsed, dict):
        raise NotAGraphError(f"expected a graph, found a {type(parsed).__name__}")
    for key, value in _items(parsed):
        check = _CHECKS.get(key, _name)
        if isinstance(value, str) and not check(value):
            raise NotAGraphError(f"the graph contains {value[:60]!r} as {key or 'a name'}")


def check_operators(module: nn.Module) -> None:
    """Everything that is called, or handed on to be called, is an operator that torch has registered, or arithmetic.

    Raises NotAGraphError.
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            called = [node.target] if node.op == "call_function" else []
            called += [
                a for a in pytree.tree_leaves((node.args, node.kwargs)) if callable(a) and not isinstance(a, fx.Node)
            ]
            if wrong := [c for c in called if not _is_operator(c)]:
                raise NotAGraphError(f"the graph calls {str(wrong[0])[:60]}, which is not a known operator")


def _is_operator(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return not any(a.name in _FILES and str(a.type) == "str" for a in target._schema.arguments)
    return isinstance(target, torch._ops.HigherOrderOperator) or target in _ARITHMETIC


_FILES = ("filename", "path")  # of the few operators that read or write files
_ARITHMETIC = {
    *(getattr(operator, n) for n in (
        "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "abs", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_",
        "or_", "xor", "not_", "lshift", "rshift", "getitem",
    )),
    *(getattr(math, n) for n in ("trunc", "floor", "ceil", "sqrt")),
    *(getattr(torch, n) for n in dir(torch) if n.startswith("sym_")),
}  # fmt: skip


def _items(parsed: object) -> Iterator[tuple[str, object]]:
    """Every value with its key, and every key that is a name."""
    stack: list[tuple[str, object]] = [("", parsed)]
    while stack:
        key, value = stack.pop()
        yield key, value
        if isinstance(value, list):
            stack.extend((key, v) for v in value)
        elif isinstance(value, dict) and key not in _TEXT:
            stack.extend((k, v) for k, v in value.items())
            yield from (("", k) for k in value)


def _anything(_: str) -> bool:
    return True


def _name(text: str) -> bool:
    """Only what is a plain name in source code."""
    return re.fullmatch(r"[\w .:/@+-]*", text) is not None


def _structure(text: str) -> bool:
    """A structure of inputs or outputs, as torch writes it: no module to import, and only plain names."""
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        return False
    stack: list[object] = [spec]
    while stack:
        value = stack.pop()
        if isinstance(value, str) and value[:1] in ("[", "{"):  # a context, serialized separately
            try:
                stack.append(json.loads(value))
            except (ValueError, RecursionError):
                return False
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            if "__enum__" in value or value.get("default_factory_module", "builtins") != "builtins":
                return False
            stack.extend(value.values())
    return True


def _inputs(text: str) -> bool:
    """Names of keyword arguments become names in source code."""
    return _structure(text) and re.fullmatch(r'[\w\s.:/@+\-"\\\[\]{},]*', text) is not None


_FUNCTIONS = (
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "Eq", "Ne", "Lt", "Le", "Gt",
    "Ge", "Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan", "And", "Or", "Not",
    "Piecewise", "ceiling", "floor", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt",
    "FloorToInt", "CeilDiv", "PowByNatural", "FloatTrueDiv", "IntTrueDiv", "TruncToInt", "TruncToFloat", "RoundToInt",
    "ToFloat", "Identity", "IsNonOverlappingAndDenseIndicator",
)  # fmt: skip
_LARGEST_POWER, _LONGEST = 8, 2_000


def _expression(text: str) -> bool:
    """Arithmetic on symbols and numbers that sympy evaluates quickly."""
    try:
        tree = ast.parse(text.strip(), mode="eval") if len(text) <= _LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return tree is not None and all(_is_arithmetic(node) for node in ast.walk(tree))


_HOW = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_PARTS = (
    *_HOW, ast.Pow, ast.Expression, ast.Tuple, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop,
    ast.keyword, ast.Load,
)  # fmt: skip


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value):
            return isinstance(value, (bool, int, float)) or (
                isinstance(value, str) and re.fullmatch(r"\w+", value) is not None
            )
        case ast.Name(name):
            return "__" not in name
        case ast.Call(ast.Name("Pow" | "PowByNatural"), [base, power], []):
            return not _is_number(base) and _is_small(power)
        case ast.Call(ast.Name(name), _, keywords):
            return name in _FUNCTIONS and not name.startswith("Pow") and all(k.arg is not None for k in keywords)
        case ast.BinOp(base, ast.Pow(), power):
            return not _is_number(base) and _is_small(power)
        case ast.BinOp(_, how, _):
            return isinstance(how, _HOW)
    return isinstance(node, _PARTS)


def _is_number(node: ast.AST) -> bool:
    """Without symbols: sympy would evaluate its power."""
    return not any(
        (isinstance(n, ast.Name) and n.id not in _FUNCTIONS)
        or (isinstance(n, ast.Constant) and isinstance(n.value, str))
        for n in ast.walk(node)
    )


def _is_small(node: ast.AST) -> bool:
    match node:
        case (
            ast.Constant(int(value))
            | ast.UnaryOp(ast.USub(), ast.Constant(int(value)))
            | ast.Call(ast.Name("Integer"), [ast.Constant(int(value))])
        ):
            return value <= _LARGEST_POWER
    return False


def _guard(text: str) -> bool:
    """A relation between input sizes, which torch turns into code: arithmetic, and ``L['x'].size()[1]``, on one line."""
    if len(text) > _LONGEST or re.search(r"[#\"\\\n\r]", text):
        return False
    try:
        return _is_relation(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_relation(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value):
            return isinstance(value, (bool, int, float))
        case ast.Subscript(ast.Call(ast.Attribute(path, "size"), [], []), ast.Constant(int())):
            return _is_input(path)
        case ast.Subscript():  # a number among the inputs
            return _is_input(node)
        case ast.BinOp(base, ast.Pow(), power):
            return _is_relation(base) and not _is_number(base) and _is_small(power)
        case ast.BinOp(left, how, right):
            return isinstance(how, _HOW) and _is_relation(left) and _is_relation(right)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            return _is_relation(operand)
        case ast.BoolOp(_, parts):
            return all(map(_is_relation, parts))
        case ast.Compare(left, _, others):
            return all(map(_is_relation, (left, *others)))
        case ast.Call(function, given, []):
            return ast.unparse(function) in _COUNTING and all(map(_is_relation, given))
    return False


_COUNTING = ("max", "min", "abs", "float", "round", "math.floor", "math.ceil", "math.trunc", "math.sqrt")


def _is_input(node: ast.expr) -> bool:
    """``L['x']['y'][0]``, whose names end up in quoted text in torch."""
    match node:
        case ast.Name("L"):
            return True
        case ast.Subscript(outer, ast.Constant(key)):
            return _is_input(outer) and (isinstance(key, int) or re.fullmatch(r"\w+", str(key)) is not None)
    return False


_SAID = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "as_string")  # text that is not a name
_TEXT = ("metadata", "custom", "from_node")  # metadata of a node that is never read
_CHECKS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(_SAID, _anything), "expr_str": _expression, "guards_code": _guard, "in_spec": _inputs, "out_spec": _structure,
}  # fmt: skip
