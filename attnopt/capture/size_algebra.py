"""Algebra on size relations: which always hold, and which are equivalent.

Sizes are positive integers between known bounds.  Every step is an identity or a bound, so what might fail at some
sizes is never considered certain; unsupported expressions stay unchanged.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import sympy

Bounds = Mapping[str, tuple[int, int | None]]
LONGEST = 400  # characters: a longer relation stays unchanged
_COMPARED = 40  # relations that are compared with each other
_floordiv, _mod = sympy.Function("floordiv", integer=True), sympy.Function("mod", integer=True)


@dataclass(frozen=True)
class Relation:
    """``form``: "==", "!=" or ">=", of ``apart`` and 0."""

    form: str
    apart: sympy.Expr


def told_once(relations: Iterable[str], bounds: Bounds) -> tuple[str, ...]:
    """Those that could fail, without equivalents and implied ones."""
    trees = [(text, ast.parse(text, mode="eval").body if len(text) <= LONGEST else None) for text in relations]
    same = _equal_sizes([tree for _, tree in trees if tree is not None], bounds)
    known: dict[object, tuple[str, Relation | None]] = {
        ("==", name): (f"{name} == {of}", None) for name, of in same.items()
    }
    for text, tree in trees:
        tree = None if tree is None else _Renamed(same).visit(copy.deepcopy(tree))
        if tree is not None and always_holds(tree, bounds):
            continue
        made = None if tree is None else _read(tree, bounds)
        key = text if made is None else made
        if key not in known or len(text) < len(known[key][0]):
            known[key] = text, made
    found = list(known.values())
    return tuple(text for text, made in found if not _follows(made, [m for _, m in found], bounds))


def _equal_sizes(trees: Sequence[ast.expr], bounds: Bounds) -> dict[str, str]:
    """Sizes that must equal another one, by its name.  Their own bounds apply to it, too."""
    same: dict[str, str] = {}
    for tree in trees:
        made = _read(_Renamed(same).visit(copy.deepcopy(tree)), bounds)
        if made is None or made.form != "==":
            continue
        match sorted(made.apart.as_coefficients_dict().items(), key=lambda term: str(term[0])):
            case [(sympy.Symbol() as first, 1 | -1 as c), (sympy.Symbol() as second, d)] if c == -d:
                same = {n: first.name if of == second.name else of for n, of in same.items()} | {
                    second.name: first.name
                }
    return same


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        name = ast.unparse(node)
        return ast.parse(self.names[name], mode="eval").body if name in self.names else node


def always_holds(tree: ast.expr, bounds: Bounds) -> bool:
    match tree:
        case ast.BoolOp(ast.And(), parts):
            return all(always_holds(p, bounds) for p in parts)
        case ast.BoolOp(ast.Or(), parts):
            return any(always_holds(p, bounds) for p in parts)
    made = _read(tree, bounds)
    if made is None:
        return False
    if made.form == "==":
        return bool(made.apart == 0)
    if made.form == ">=":
        return _at_least(made.apart, 0, bounds)
    return _at_least(made.apart, 1, bounds) or _at_least(sympy.expand(-made.apart), 1, bounds)


def _follows(relation: Relation | None, others: Sequence[Relation | None], bounds: Bounds) -> bool:
    """Implied by a stronger relation."""
    if relation is None or relation.form != ">=" or len(others) > _COMPARED:
        return False
    return any(
        other is not None
        and other != relation
        and other.form == ">="
        and _at_least(sympy.expand(relation.apart - other.apart), 0, bounds)
        for other in others
    )


def _read(tree: ast.expr, bounds: Bounds) -> Relation | None:
    match tree:
        case ast.Compare(left, [how], [right]):
            pass
        case _:
            return None
    a, b = _worked_out(left, bounds), _worked_out(right, bounds)
    if a is None or b is None:
        return None
    apart = sympy.expand(a - b)
    match how:
        case ast.Eq() | ast.NotEq():
            apart = _without_factor(apart)
            negative = sympy.expand(-apart)
            first = min(apart, negative, key=lambda x: (str(x).startswith("-"), str(x)))
            return Relation("==" if isinstance(how, ast.Eq) else "!=", first)
        case ast.GtE():
            return Relation(">=", apart)
        case ast.Gt():
            return Relation(">=", sympy.expand(apart - 1))
        case ast.LtE():
            return Relation(">=", sympy.expand(-apart))
        case ast.Lt():
            return Relation(">=", sympy.expand(-apart - 1))
    return None


def _without_factor(x: sympy.Expr) -> sympy.Expr:
    """An expression with the same zeros as ``x``: without common factors, none of which is 0."""
    if x == 0 or not x.is_polynomial(*x.free_symbols) or x.atoms(sympy.core.function.AppliedUndef):
        return x
    _, terms = x.primitive()
    common = reduce(sympy.gcd, sympy.Add.make_args(terms))
    return sympy.expand(sympy.cancel(terms / common))


def _worked_out(node: ast.expr, bounds: Bounds) -> sympy.Expr | None:
    """None for anything but a sum, product, quotient, remainder, minimum or maximum of sizes."""
    match node:
        case ast.Constant(bool()):
            return None
        case ast.Constant(int(number)):
            return sympy.Integer(number)
        case ast.Subscript():
            return sympy.Symbol(ast.unparse(node), integer=True, positive=True)
        case ast.UnaryOp(ast.USub(), operand):
            found = _worked_out(operand, bounds)
            return None if found is None else sympy.expand(-found)
        case ast.BinOp(left, how, right):
            a, b = _worked_out(left, bounds), _worked_out(right, bounds)
            return None if a is None or b is None else _calculated(how, a, b, bounds)
        case ast.Call(ast.Name("min" | "max" as name), [*given], []):
            parts = [_worked_out(g, bounds) for g in given]
            return None if None in parts else reduce(lambda a, b: _extreme(name, a, b, bounds), parts)
    return None


def _calculated(how: ast.operator, a: sympy.Expr, b: sympy.Expr, bounds: Bounds) -> sympy.Expr | None:
    match how:
        case ast.Add():
            return sympy.expand(a + b)
        case ast.Sub():
            return sympy.expand(a - b)
        case ast.Mult():
            return sympy.expand(a * b)
        case ast.FloorDiv() if _at_least(b, 1, bounds):
            whole, rest = _divided(a, b)
            return sympy.expand(whole + _quotient(rest, b, bounds))
        case ast.Mod() if _at_least(b, 1, bounds):
            _, rest = _divided(a, b)
            return rest if _is_within(rest, b, bounds) else _mod(rest, b)
    return None


def _extreme(name: str, a: sympy.Expr, b: sympy.Expr, bounds: Bounds) -> sympy.Expr:
    if _at_least(sympy.expand(a - b), 0, bounds):
        return a if name == "max" else b
    if _at_least(sympy.expand(b - a), 0, bounds):
        return b if name == "max" else a
    return (sympy.Max if name == "max" else sympy.Min)(a, b)


def _quotient(rest: sympy.Expr, by: sympy.Expr, bounds: Bounds) -> sympy.Expr:
    return sympy.Integer(0) if _is_within(rest, by, bounds) else _floordiv(rest, by)


def _is_within(rest: sympy.Expr, by: sympy.Expr, bounds: Bounds) -> bool:
    return _at_least(rest, 0, bounds) and _at_least(sympy.expand(by - rest), 1, bounds)


def _divided(a: sympy.Expr, by: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(quotient, remainder) in integers, with a = quotient * by + remainder."""
    if by.is_Integer:
        number = int(by)
        terms = a.as_coefficients_dict()
        whole = sympy.Add(*(sympy.Integer(int(c) // number) * term for term, c in terms.items()))
        return whole, sympy.expand(a - whole * by)
    try:
        whole, rest = sympy.div(a, by)
    except sympy.PolynomialError:
        return sympy.Integer(0), a
    numbers = [*whole.as_coefficients_dict().values(), *rest.as_coefficients_dict().values()]
    return (whole, rest) if all(n.is_Integer for n in numbers) else (sympy.Integer(0), a)


def _at_least(x: sympy.Expr, least: int, bounds: Bounds) -> bool:
    """``x >= least`` at all sizes within the bounds; False if unproven."""
    for atom in sorted(x.atoms(sympy.Min, sympy.Max), key=str):
        times = x.coeff(atom)
        is_linear = times.is_Number and not sympy.expand(x - times * atom).has(atom)
        enough = (
            any if is_linear and (times > 0) == (atom.func == sympy.Max) else all
        )  # it is one of its parts, and beyond all
        return enough(_at_least(sympy.expand(x.subs(atom, part)), least, bounds) for part in atom.args)
    for atom in sorted(x.atoms(sympy.core.function.AppliedUndef), key=lambda a: (-len(str(a)), str(a))):
        coefficient = x.coeff(atom)
        rest = sympy.expand(x - coefficient * atom)
        if not coefficient.is_Number or rest.has(atom):
            return False
        low, high = _ends(atom)
        return _at_least(sympy.expand(rest + coefficient * (low if coefficient > 0 else high)), least, bounds)
    return _polynomial_at_least(x, least, bounds)


def _ends(atom: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Bounds of a quotient or a remainder by something positive."""
    a, by = atom.args
    return (sympy.Integer(0), by - 1) if atom.func == _mod else ((a - by + 1) / by, a / by)


def _polynomial_at_least(x: sympy.Expr, least: int, bounds: Bounds) -> bool:
    if not x.is_polynomial():
        return False
    shifted = x.subs({s: s + (_limits(s, bounds)[0]) for s in x.free_symbols}, simultaneous=True)
    terms = sympy.expand(shifted).as_coefficients_dict()
    if terms.get(sympy.Integer(1), 0) >= least and all(c >= 0 for c in terms.values()):
        return True
    smallest = 0
    for term, c in x.as_coefficients_dict().items():
        ends = {s: _limits(s, bounds)[0 if c > 0 else 1] for s in term.free_symbols}
        if None in ends.values():
            return False
        smallest += c * term.subs(ends)
    return bool(smallest >= least)


def _limits(symbol: sympy.Symbol, bounds: Bounds) -> tuple[int, int | None]:
    lower, upper = bounds.get(symbol.name, (1, None))
    return max(1, lower), upper
