"""Taps: the nodes that hold what is asked of each attention, and its value from theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.graph.emitter import Emitter
from attnopt.ir.activations import of_heads
from attnopt.ir.operands import OperandTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.match.find import Found
from attnopt.match.rearrange import Arranger
from attnopt.observe import maps
from attnopt.observe.chosen import OF_KEYS, OF_QUERIES, at
from attnopt.observe.contribution import contribution, read_for, require_projection
from attnopt.observe.projected import input_of, tokens
from attnopt.observe.residual import Branch

_OPERANDS = {
    "q": ("q",),
    "k": ("q", "k"),
    "v": ("q", "v"),
    "scores": ("q", "k", "bias", "mask", "sinks"),
    "lse": ("q", "k", "bias", "mask", "sinks"),
    "weights": ("q", "k", "bias", "mask", "sinks", "keep", "added"),
}
Values = dict[fx.Node, Any]


def outputs_node(f: Found) -> fx.Node:
    """The heads' outputs [B, H, L, Dv] as the model itself computes them, in its graph."""
    region = f.raised.region
    at_end = Emitter(region.out.node.graph, region.out.node.next, {"site": f.site.name})
    groups = (region.batch, region.heads, region.queries, region.value_features)
    return Arranger(at_end, region).arrange(region.out.node, region.out.axes, groups)


@dataclass(frozen=True)
class Question:
    """What is asked: kinds, and positions of queries (``rows``) and keys (``columns``) in the order of the result."""

    owner: str
    kinds: tuple[str, ...]
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """One value, whose tokens lie along ``axis``, and which of them count: ``rows`` bool [B, R] of queries, ``columns`` bool
    [B, C] of keys."""

    value: Tensor
    axis: int = 2
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class MapBlocks:
    """``real`` bool [B, L], ``seen`` bool [B, S]: the queries and keys that are no padding.  ``blocks``: some queries [R] and
    their weights [B, H, R, S]."""

    real: Tensor
    seen: Tensor
    blocks: Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Tap:
    """One attention: ``places`` are those of the heads that are asked for.  ``branch``: what adds its output to a stream."""

    question: Question
    found: Found
    places: tuple[int, ...]
    branch: Branch | None = None

    @property
    def name(self) -> str:
        return self.found.site.name

    @cached_property
    def spec(self) -> AttentionSpec:
        """Of these heads alone."""
        spec = self.found.raised.spec
        return spec if self.has_all_heads else spec.keeping(spec.heads[p] for p in self.places)

    @property
    def has_all_heads(self) -> bool:
        return len(self.places) == self.found.raised.spec.num_heads

    @cached_property
    def padding(self) -> frozenset[fx.Node]:
        """The nodes that tell which tokens are padding."""
        given = self.found.raised.operands.given
        return frozenset(n for role, n in given.items() if role in ("bias", "mask"))

    @cached_property
    def reads(self) -> frozenset[fx.Node]:
        """The nodes whose values ``answers`` needs."""
        given, kinds = self.found.raised.operands.given, self.question.kinds
        nodes = {*self.padding, *(n for kind in kinds for n in self.operands_of(kind).values())}
        if {"outputs", "contribution"} & {*kinds}:
            nodes.add(self.out)
        if "contribution" in kinds:
            require_projection(self.question.owner, self.found, self.branch)
            nodes |= {*read_for(self.branch)}
        if "input" in kinds:
            ways = self.found.dirty["q"]
            nodes |= {self.input, given["q"], *(i for n in (*ways, given["q"]) for i in n.all_input_nodes)}
        return frozenset(nodes)

    @cached_property
    def out(self) -> fx.Node:
        return outputs_node(self.found)

    def operands_of(self, kind: str) -> dict[str, fx.Node]:
        """Those that the kind is computed from, by role; of a kind of queries alone, these tell the sizes."""
        roles = _OPERANDS.get(kind, ())
        return {role: n for role, n in self.found.raised.operands.given.items() if role in roles}

    def of_heads(self, given: Mapping[str, Tensor]) -> OperandTensors:
        """These operands of the heads that are asked for."""
        operands = operands_from(given, self.spec.is_cross)
        return operands if self.has_all_heads else of_heads(self.spec, operands)

    @property
    def out_weight(self) -> Tensor:
        """As the output projection stores it."""
        name = self.found.site.projections["out"].weight
        assert name is not None
        return self.found.site.parameters[name].detach()

    @cached_property
    def input(self) -> fx.Node:
        return input_of(self.question.owner, self.found)

    def answers(self, gm: fx.GraphModule, values: Values) -> Mapping[str, Answer]:
        """By kind, from the values of ``reads``."""
        reading = _Reading(self, gm, values)
        return {kind: reading.answer(kind) for kind in self.question.kinds}

    def column_means(self, gm: fx.GraphModule, values: Values) -> Answer:
        """The mean weight [B, H, C] that each key gets from the queries that count."""
        return _Reading(self, gm, values).column_means()

    def map_blocks(self, gm: fx.GraphModule, values: Values) -> MapBlocks:
        """The weights of all queries, some at a time."""
        reading = _Reading(self, gm, values)
        return MapBlocks(reading.operands.real, reading.operands.seen, reading.map_blocks())


@dataclass(frozen=True)
class BranchTap:
    """Another branch of a residual stream, such as an MLP, or the start of the stream: what it adds, [B, L, C].

    ``beside``: an attention of the same model, whose masks tell which tokens are padding."""

    question: Question
    branch: Branch
    beside: Tap

    @property
    def name(self) -> str:
        return self.branch.name

    @cached_property
    def reads(self) -> frozenset[fx.Node]:
        return self.beside.padding | {self.branch.node}

    def answers(self, gm: fx.GraphModule, values: Values) -> Mapping[str, Answer]:
        x: Tensor = values[self.branch.node]
        x = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        real = self._real(x, values)
        wanted = self.question.rows
        rows = None if wanted is None else at(self.question.owner, "rows", wanted, x.shape[1], self.name, x.device)
        return {"contribution": Answer(_taken(x, 1, rows).detach(), 1, _taken(real, 1, rows))}

    def _real(self, x: Tensor, values: Values) -> Tensor:
        given = self.beside.found.raised.operands.given
        masks = {role: values[n] for role, n in given.items() if n in self.beside.padding}
        B, L = x.shape[:2]
        if not masks or any(m.shape[0] not in (1, B) or m.shape[-1] not in (1, L) for m in masks.values()):
            return torch.ones(B, L, dtype=torch.bool, device=x.device)
        return operands_from({"q": x.unsqueeze(1), **masks}, self.beside.spec.is_cross).real


def operands_from(given: Mapping[str, Tensor], is_cross: bool) -> OperandTensors:
    """Of keys and values that are not given only the number is read: that of a mask, or of queries."""
    q = given["q"]
    keys = max((given[role].shape[-1] for role in ("bias", "mask") if role in given), default=1)
    like = q if keys == 1 else q.new_empty(*q.shape[:2], keys, 0)
    return OperandTensors(
        q,
        given.get("k", given.get("v", like)),
        given.get("v", like),
        given.get("bias"),
        given.get("mask"),
        given.get("sinks"),
        keep=given.get("keep"),
        added=given.get("added"),
        is_cross=is_cross,
    )


class _Reading:
    """One attention on one batch."""

    def __init__(self, tap: Tap, gm: fx.GraphModule, values: Values) -> None:
        self.tap, self.gm, self.values = tap, gm, values
        given = tap.found.raised.operands.given
        self.held = {role: values[n] for role, n in given.items() if n in values}
        self.form: Tensor = self.held["q"] if "q" in self.held else values[tap.out]
        self.operands = operands_from({"q": self.form, **self.held}, tap.spec.is_cross)

    @cached_property
    def of_heads(self) -> OperandTensors:
        return self.tap.of_heads(self.held)

    @cached_property
    def rows(self) -> Tensor | None:
        return self._at("rows", self.tap.question.rows, self.form.shape[2])

    @cached_property
    def columns(self) -> Tensor | None:
        return self._at("columns", self.tap.question.columns, self.operands.k.shape[2])

    def _at(self, option: str, wanted: tuple[int, ...] | None, length: int) -> Tensor | None:
        if wanted is None:
            return None
        return at(self.tap.question.owner, option, wanted, length, self.tap.name, self.form.device)

    def answer(self, kind: str) -> Answer:
        return Answer(
            self._value(kind).detach(),
            1 if kind == "input" else 2,
            _taken(self.operands.real, 1, self.rows) if kind in OF_QUERIES else None,
            _taken(self.operands.seen, 1, self.columns) if kind in OF_KEYS else None,
        )

    def column_means(self) -> Answer:
        counted = self.operands.real.to(torch.promote_types(self.form.dtype, torch.float32))
        sums = maps.column_sums(self.tap.spec, self.of_heads, counted, self.rows)
        asked = counted if self.rows is None else counted.index_select(1, self.rows)
        means = sums / asked.sum(1).clamp(min=1)[:, None, None]
        return Answer(_taken(means, 2, self.columns), columns=_taken(self.operands.seen, 1, self.columns))

    def map_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        spec, t = self.tap.spec, self.of_heads
        if spec.weight_gains is not None:  # which may compare whole rows of blocks
            yield torch.arange(t.q.shape[2], device=t.q.device), maps.weights(spec, t)
            return
        for rows in maps.blocks(t, spec.num_heads, None):
            yield rows, maps.weights(spec, t, rows)

    def _value(self, kind: str) -> Tensor:
        tap = self.tap
        match kind:
            case "q":
                return _taken(self.of_heads.q, 2, self.rows)
            case "k" | "v":
                return _taken(self.of_heads.k if kind == "k" else self.of_heads.v, 2, self.columns)
            case "outputs":
                return _taken(self._out(), 2, self.rows)
            case "contribution":
                known = self.values.__getitem__
                return contribution(tap.found, tap.branch, self._out(), tap.out_weight, tap.places, known, self.rows)
            case "input":
                return _taken(tokens(self.gm, tap.found, tap.input, self.values, self.operands.q), 1, self.rows)
            case "lse":
                return self._in_blocks(maps.log_sum_exp)
        compute = maps.scores if kind == "scores" else maps.weights
        if self.columns is None or tap.spec.weight_gains is not None:
            return _taken(compute(tap.spec, self.of_heads, self.rows), 3, self.columns)
        return self._in_blocks(lambda *of_block: _taken(compute(*of_block), 3, self.columns))

    def _in_blocks(self, compute: Callable[[AttentionSpec, OperandTensors, Tensor], Tensor]) -> Tensor:
        """Of the queries that are asked for, with no larger map than that of a block."""
        t, spec = self.of_heads, self.tap.spec
        return torch.cat([compute(spec, t, block) for block in maps.blocks(t, spec.num_heads, self.rows)], 2)

    def _out(self) -> Tensor:
        out: Tensor = self.values[self.tap.out]
        return out if self.tap.has_all_heads else out.index_select(1, torch.tensor(self.tap.places, device=out.device))


def _taken(x: Tensor, axis: int, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(axis, places)
