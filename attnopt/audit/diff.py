"""Does a file that was exported from a model still have the model's attentions?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attnopt.audit.beyond import fits, pattern_differences, reach
from attnopt.audit.calls import Call, Sides, output_errors, sides_of
from attnopt.audit.compare import differences, is_known, masks_apart, sizes_apart
from attnopt.audit.pairs import paired
from attnopt.audit.scores import KINDS as OF_SCORES
from attnopt.audit.seen import Apart
from attnopt.audit.trace import Attended, traced
from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.errors import AttnoptError, CaptureError
from attnopt.ir.site import NearMiss, Site
from attnopt.report.audit import Audit, ComparedOutputs, ComparedSite, Difference, Setting, Verdict


@compiling()
def diff(
    model: nn.Module,
    file: str | os.PathLike[str],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
) -> Audit:
    """Compare the attentions of ``model`` with those of an ONNX file that was exported from it, by any exporter.

    ``args``, ``kwargs``: an example of the model's inputs.  ``inputs``: the file's inputs by name, where it takes others; an
    empty past, positions and a mask of ones need not be given.

    Each attention is compared by what it computes: heads, scale, positions, norms, mask, window, bias, sinks and soft cap, on the
    example, with padding if the model takes a mask, and at lengths beyond every window, if the file takes such lengths.  A
    difference is shown with its effect on the attention's output.  ``.verdict`` is "same", "differs" or "not compared".

    Raises CaptureError if the model or the file cannot be read or run.
    """
    with torch.no_grad():
        return _Audit(sides_of(model, file, CallInputs.of(args, kwargs), inputs or {})).result()


@dataclass
class _Pair:
    """What is known of one attention so far; ``differences`` by kind, of which the first seen counts; ``masks``: how they differ
    in the example without padding."""

    model: int | None
    file: int | None
    differences: dict[str, Difference]
    tokens: list[int]
    why: str = ""
    masks: Apart | None = None

    def add(self, found: Sequence[Difference]) -> None:
        """Scores that differ need one reason."""
        is_explained = bool(OF_SCORES & self.differences.keys())
        for d in found:
            if not (is_explained and d.kind in OF_SCORES):
                self.differences.setdefault(d.kind, d)


class _Audit:
    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self.model = [f.site for f in sides.model.findings.found]
        self.file = [f.site for f in sides.file.findings.found]
        self.pairs = [_Pair(i, j, {}, []) for i, j in paired(self.model, self.file)]
        self.notes: list[str] = list(sides.notes)
        self.outputs: list[ComparedOutputs] = []

    def result(self) -> Audit:
        base, padded = self.sides.calls()
        try:
            self._compare(base)
        except AttnoptError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{self.sides.source.path} and the model cannot be run side by side: {_first_line(error)}",
                hint="pass an example of other sizes, with at least two tokens",
            ) from error
        self._try([*self.sides.longer(base, self._reach())], f"a longer example than {base.tokens} tokens")
        self._try([] if padded is None else [padded], "an example with padding")
        for pair in self.pairs:
            self._beyond(pair)
        sites = [*map(self._told, self.pairs), *map(_unread, self.sides.model.findings.near_misses)]
        if sites and all(s.verdict == "same" for s in sites) and any(o.differs for o in self.outputs):
            self.notes.append("the outputs differ, and no attention does: the difference is in the other layers")
        return Audit(str(self.sides.source.path), tuple(sites), tuple(self.outputs), tuple(self.notes))

    # ------------------------------------------------------------ calls
    def _compare(self, call: Call) -> None:
        """Every pair in this call; the file's layers get the outputs that the model's attentions have."""
        there = {p.file: p.model for p in self.pairs if p.model is not None and p.file is not None}
        of_model = traced(self.sides.model, call.given.call)
        forced = {j: of_model[i].output for j, i in there.items() if self._fits(i, j)}
        of_file = traced(self.sides.file, CallInputs(tuple(call.given.feed.values()), {}), forced)
        for pair in self.pairs:
            if pair.model is not None and pair.file is not None:
                self._compare_pair(pair, of_model[pair.model], of_file[pair.file], call)
        if call.setting != "padded":
            self.outputs += output_errors(self.sides, call)

    def _fits(self, i: int, j: int) -> bool:
        a, b = self.model[i].spec, self.file[j].spec
        return (a.num_heads, a.value_dim) == (b.num_heads, b.value_dim)

    def _compare_pair(self, pair: _Pair, a: Attended, b: Attended, call: Call) -> None:
        sizes = [[*x.operands.q.shape[:3], x.operands.k.shape[2]] for x in (a, b)]
        apart = sizes_apart(a, b)
        if apart is not None and sizes[0][0] == sizes[1][0]:
            pair.add([apart])
            return
        if apart is not None or sizes[0] != sizes[1]:
            pair.why = f"the example gives it {_sizes(sizes[0])} in the model and {_sizes(sizes[1])} in the file"
            return
        setting: Setting = "longer" if call.setting == "longer" else "example"
        if call.setting == "example":
            pair.masks = masks_apart(a, b)
        unpadded = pair.masks if call.setting == "padded" else None
        pair.add(differences(a, b, self.sides.tolerance, setting, unpadded))
        pair.tokens.append(b.operands.k.shape[2])

    def _reach(self) -> int:
        return max((reach(s.spec) for s in (*self.model, *self.file)), default=0)

    def _try(self, calls: Sequence[Call], what: str) -> None:
        """The first of these calls that both take; a note if none is."""
        why = ""
        for call in calls:
            before = [(dict(p.differences), list(p.tokens)) for p in self.pairs]
            try:
                self._compare(call)
                return
            except Exception as error:  # positions that a table does not have, or a size that a graph does not take
                why = _first_line(error)
                for pair, (known, tokens) in zip(self.pairs, before, strict=True):
                    pair.differences, pair.tokens = known, tokens
        if why:
            self.notes.append(f"{what} cannot be run: {why}")

    # ------------------------------------------------------------ lengths beyond
    def _beyond(self, pair: _Pair) -> None:
        if pair.model is None or pair.file is None or pair.why or not pair.tokens:
            return
        a, b = self.model[pair.model], self.file[pair.file]
        tokens = max(reach(a.spec), reach(b.spec))
        if a.is_cross or not b.is_dynamic or (tokens <= max(pair.tokens) and pair.differences):
            return
        tokens = max(tokens, *pair.tokens)
        if is_known(a.spec) and is_known(b.spec) and fits(a.spec, tokens) and fits(b.spec, tokens):
            pair.add(pattern_differences(a, b, tokens))
            pair.tokens.append(tokens)
        elif tokens > max(pair.tokens) and not pair.differences:
            who = "the file" if is_known(a.spec) else "the model"
            pair.why = f"equal at {max(pair.tokens)} tokens; what the mask of {who} hides at {tokens} is not known"

    # ------------------------------------------------------------ results
    def _told(self, pair: _Pair) -> ComparedSite:
        a = None if pair.model is None else self.model[pair.model]
        b = None if pair.file is None else self.file[pair.file]
        if a is None or b is None:
            return self._alone(a, b)
        found = tuple(pair.differences.values())
        verdict: Verdict = "differs" if found else "not compared" if pair.why else "same"
        return ComparedSite(
            a.name,
            a.where,
            b.name,
            verdict,
            str(a.spec),
            str(b.spec),
            found,
            tuple(sorted(set(pair.tokens))),
            "" if found else pair.why,
            _of_fixed_length(a, b),
        )

    def _alone(self, a: Site | None, b: Site | None) -> ComparedSite:
        """A site without a partner: one of the other side may not have been read."""
        unread = (self.sides.file if b is None else self.sides.model).findings.near_misses
        site = a or b
        assert site is not None
        made = ComparedSite(
            "" if a is None else a.name,
            site.where if b is None else "",
            "" if b is None else b.name,
            "not compared",
            "" if a is None else str(a.spec),
            "" if b is None else str(b.spec),
        )
        if unread:
            whose = "the file" if b is None else "the model"
            return replace(made, why=f"{whose} has candidates that are not read: {_refusals(unread)}")
        kind = "missing" if b is None else "extra"
        texts = ("an attention", "none") if b is None else ("none", "an attention")
        return replace(made, verdict="differs", differences=(Difference(kind, *texts),))


def _of_fixed_length(a: Site, b: Site) -> tuple[str, ...]:
    if b.is_dynamic or reach(a.spec) <= b.kv_len:
        return ()
    return (f"the file takes {b.kv_len} tokens alone, at which {a.spec.visible_pattern} does not show as a whole",)


def _unread(miss: NearMiss) -> ComparedSite:
    why = f"not read in the model: {_refusals([miss])}"
    return ComparedSite(miss.name, miss.where, "", "not compared", why=why)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _refusals(found: Sequence[NearMiss]) -> str:
    texts = dict.fromkeys(f"[{m.refusal.code}] expected {m.refusal.expected}, found {m.refusal.found}" for m in found)
    return "; ".join(texts)


def _sizes(sizes: Sequence[int]) -> str:
    batch, heads, queries, keys = sizes
    return f"{batch} x {heads} heads, {queries} queries and {keys} keys"
