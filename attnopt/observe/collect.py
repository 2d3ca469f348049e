"""Collecting what heads do on data: batch by batch, attention by attention."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.progress import working
from attnopt.capture.calibration import Batch, Calibration, as_inputs, shapes_of
from attnopt.capture.signature import Signature
from attnopt.compiler.analyze import Analyzed, analyze_in_eval
from attnopt.compiler.check import fitting
from attnopt.compiler.chosen_sites import between_tokens, chosen_places, site_globs, site_names
from attnopt.errors import CalibrationError
from attnopt.graph.interpreter import Forward, Schedule
from attnopt.match.find import Found
from attnopt.match.prove import example_values
from attnopt.model import OptimizedModel
from attnopt.observe import chosen
from attnopt.observe.reduce import Kept, Reduce, Reduced, reduction
from attnopt.observe.residual import Branch, Residual
from attnopt.observe.taps import Answer, BranchTap, Question, Tap, Values
from attnopt.onnx.load.model_or_file import opened
from attnopt.report.collected import Collected, Taken, own


def collect(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    batches: Iterable[Batch] | Calibration,
    what: str | Sequence[str],
    sites: object = "*",
    *,
    rows: object = None,
    columns: object = None,
    heads: object = None,
    reduce: Reduce = None,
) -> Collected:
    """What the heads of any model do on ``batches``: ``collected["layers.0.attn"]["outputs"]``.

    ``batches``: each a tensor, a tuple of args or a dict of kwargs; they may be a generator, and their lengths may differ.
    ``what``: one or several of

    - ``"q"`` [B, H, L, D], ``"k"`` [B, G, S, D], ``"v"`` [B, G, S, Dv]: as the attention reads them, after position encodings;
    - ``"scores"`` [B, H, L, S]: what the softmax reads, -inf where hidden; ``"weights"``; ``"lse"`` [B, H, L], the
      log-sum-exp of each row;
    - ``"outputs"`` [B, H, L, Dv]: the model's own numbers;
    - ``"contribution"`` [B, H, L, C]: what each head adds to the residual stream, the bias of the output projection apart,
      and [B, L, C] what everything else adds to it: MLPs under the names of their modules, and ``"embedding"``, its start;
    - ``"input"`` [B, L, C]: what the query projection reads.

    ``sites``: names or globs.  ``rows``, ``columns``: only these queries and keys; below 0 they count from the end.  Only
    their part of a map is computed.  ``heads``: only these numbers; of k and v, the heads that they read.
    ``reduce``: ``"mean"`` or ``"sum"`` over the sequences and tokens that are no padding (of maps: over sequences, position
    by position); ``"column-mean"`` of weights: the mean that each key gets, [H, S], without a map; or a function of each
    batch's value and bool [B, L], which of its tokens count.  Without it, all values are kept on the CPU.

    Memory is that of one layer of one batch, and of what is kept.  A module that runs several times has an entry for each
    run.
    Raises PolicyError for names, heads or positions that there are not, CalibrationError for no or unfit batches, CaptureError.
    """
    asked = chosen.kinds("collect", what)
    question = Question(
        "collect",
        asked,
        chosen.numbers_of("collect", "rows", rows),
        chosen.numbers_of("collect", "columns", columns),
    )
    start, globs = reduction(reduce, asked), site_globs("collect", sites)
    stream, first = first_of("collect", batches)
    with compiling():
        opened_model = model.module() if isinstance(model, ExportedProgram) else opened(model, first)
        run = Run(opened_model, first, "auto" if vary(batches) else None, question, globs, heads)
    told: dict[str, _Told] = {}
    with working("collecting what heads do", number_of(batches)) as step:
        for number, batch in enumerate(stream):
            with compiling():
                for tap, values in run.on(batch, number):
                    answers = _answers(tap, run.program.module, values, by_column=reduce == "column-mean")
                    if tap.name not in told:
                        told[tap.name] = _Told({kind: start(tap.name) for kind in answers}, *run.numbers(tap))
                    told[tap.name].add(answers)
            step()
    name = "callable" if callable(reduce) else reduce or ""
    return Collected({name: t.result() for name, t in told.items()}, name, number + 1)


@dataclass
class _Told:
    """What was told of one attention so far."""

    kinds: Mapping[str, Reduced]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    tokens: int = 0

    def __post_init__(self) -> None:
        self.real, self.seen = list[torch.Tensor](), list[torch.Tensor]()

    def add(self, answers: Mapping[str, Answer]) -> None:
        for kind, answer in answers.items():
            self.kinds[kind].add(answer)
        rows = next((a.rows for a in answers.values() if a.rows is not None), None)
        columns = next((a.columns for a in answers.values() if a.columns is not None), None)
        self.tokens += 0 if rows is None else int(rows.sum())
        if all(isinstance(kept, Kept) for kept in self.kinds.values()):
            self.real += [] if rows is None else [own(rows)]
            self.seen += [] if columns is None else [own(columns)]

    def result(self) -> Taken:
        values = {kind: reduced.result() for kind, reduced in self.kinds.items()}
        return Taken(values, self.heads, self.kv_heads, tuple(self.real), tuple(self.seen), self.tokens)


def _answers(tap: Tap | BranchTap, gm: fx.GraphModule, values: Values, by_column: bool) -> Mapping[str, Answer]:
    if by_column and isinstance(tap, Tap):
        return {"weights": tap.column_means(gm, values)}
    return tap.answers(gm, values)


class Run:
    """The model's graph with the taps that are asked for; captured once more, with free sizes, where a batch needs it."""

    def __init__(
        self,
        model: nn.Module,
        first: CallInputs,
        shapes: object,
        question: Question,
        globs: Sequence[str],
        heads: object,
    ) -> None:
        self.model, self.first, self.shapes = model, first, shapes
        self.question, self.globs, self.heads = question, globs, heads
        self.signature = Signature.of(model.forward, *first)
        self.form = shapes_of(first)
        self._analyze()

    def _analyze(self) -> None:
        analyzed = analyze_in_eval(self.model, self.first, self.shapes)
        self.program, self.findings = analyzed.program, analyzed.findings
        self.taps = list(self._taps(analyzed))
        self.stops = _stops(self.program.module.graph, self.taps)
        self.schedule = Schedule(
            self.program.module.graph,
            {stop: frozenset().union(*(t.reads for t in taps)) for stop, taps in self.stops.items()},
        )

    def on(self, batch: CallInputs, number: int) -> Iterator[tuple[Tap | BranchTap, Values]]:
        """Each tap in the order of the model, with the values of what it reads on one batch."""
        if self.shapes is None and shapes_of(batch) != self.form:
            self.shapes = "auto"
            self._analyze()
        program = self.program
        given = fitting(program.module, self.signature, batch, number, program.form, program.fixed_axes)
        run = Forward(program.module, example_values(program.module, *given), self.schedule)
        with torch.no_grad():
            for stop in self.schedule.stops:
                run.up_to(stop)
                for tap in self.stops[stop]:
                    yield tap, run.values

    def numbers(self, tap: Tap | BranchTap) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The original numbers of its heads, and of the key/value heads that they read."""
        if isinstance(tap, BranchTap):
            return (), ()
        heads, kv_heads = original_numbers(self.model, tap.found)
        read = tap.spec.kv_heads
        return tuple(heads[p] for p in tap.places), tuple(kv_heads[g] for g in read)

    def _taps(self, analyzed: Analyzed) -> Iterator[Tap | BranchTap]:
        found = between_tokens(self.question.owner, self.globs, analyzed.findings.found)
        everything = analyzed.findings.found
        streams = Residual(analyzed.program.module.graph, everything) if "contribution" in self.question.kinds else None
        others = [] if streams is None else [b for b in streams.branches if b.site is None]
        names = [*(f.site.name for f in found), *(b.name for b in others)]
        wanted = {*site_names(self.question.owner, self.globs, names)}
        of_site: Mapping[str, Branch] = {} if streams is None else streams.of_site
        for f in (f for f in found if f.site.name in wanted):
            numbers, _ = original_numbers(self.model, f)
            places = chosen_places(self.question.owner, self.heads, f.site.name, numbers)
            yield Tap(self.question, f, places, of_site.get(f.site.name))
        for branch in (b for b in others if b.name in wanted):
            yield BranchTap(self.question, branch, Tap(self.question, _nearest(branch, found), (0,)))


def original_numbers(model: object, f: Found) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the site's heads and key/value heads in the trained model, if ``model`` is an optimized one."""
    spec = f.raised.spec
    if isinstance(model, OptimizedModel):
        for site in model.sites:
            if site.name == f.site.name and (site.num_heads, site.num_kv_heads) == (spec.num_heads, spec.num_kv_heads):
                return site.spec.heads, site.spec.kv_heads
    return spec.heads, spec.kv_heads


def _nearest(branch: Branch, found: Sequence[Found]) -> Found:
    """A self-attention in the module that is nearest to the branch: its tokens are most likely the same."""
    parts = branch.name.split(".")

    def shared(f: Found) -> tuple[int, bool]:
        own = f.site.name.split(".")
        return next((i for i, (a, b) in enumerate(zip(own, parts, strict=False)) if a != b), 0), not f.site.is_cross

    return max(found, key=shared)


def _stops(graph: fx.Graph, taps: Sequence[Tap | BranchTap]) -> dict[fx.Node, list[Tap | BranchTap]]:
    """Where a run stops for each tap: behind everything that it reads."""
    for tap in taps:
        _ = tap.reads  # some make the nodes that they read
    place = {n: i for i, n in enumerate(graph.nodes)}
    found: dict[fx.Node, list[Tap | BranchTap]] = {}
    for tap in taps:
        last = max(tap.reads, key=place.__getitem__)
        found.setdefault(last.next, []).append(tap)
    return found


def first_of(owner: str, batches: Iterable[Batch] | Calibration) -> tuple[Iterator[CallInputs], CallInputs]:
    """All batches, checked one by one, and the first of them.  Raises CalibrationError."""
    if isinstance(batches, (torch.Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{owner}: batches must be an iterable of batches, not {type(batches).__name__}",
            hint="pass a list of inputs, also for one batch: [x]",
        )
    read = (_checked(b, i) for i, b in enumerate(batches))
    first = next(read, None)
    if first is None:
        raise CalibrationError(f"{owner}: there are no batches", hint="pass at least one batch of inputs")
    return chain([first], read), first


def _checked(batch: object, number: int) -> CallInputs:
    return batch if isinstance(batch, CallInputs) else as_inputs(batch, f"batch {number}")


def vary(batches: object) -> bool:
    """The sizes of batches that are all there differ."""
    if not isinstance(batches, (list, tuple, Calibration)):
        return False
    return len({shapes_of(_checked(b, i)) for i, b in enumerate(batches)}) > 1


def number_of(batches: object) -> int | None:
    return len(batches) if isinstance(batches, (list, tuple, Calibration)) else None
