"""The search for the heads whose edit serves an objective best, in one compiled model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.options import choice, whole
from attnopt.base.progress import working
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.chosen_sites import Sites
from attnopt.compiler.compile import Compiled, carried_out
from attnopt.compiler.head_switches import Switched, switched
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.policy import Policy
from attnopt.compiler.rewriting import escapes
from attnopt.errors import PolicyError, SearchError
from attnopt.intervene.metric import require_callable, scalar
from attnopt.intervene.runs import chosen_heads
from attnopt.ir import plugin_calls
from attnopt.ir.interfaces import Pass
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.match.find import Found
from attnopt.model import OptimizedModel
from attnopt.passes.head_patch import HeadPatch
from attnopt.report.head_search import Head, Heads, HeadSearch, SearchStep

METHODS = ("greedy", "swaps")
Objective = Callable[[nn.Module], Any]  # the model with some heads edited -> a scalar, higher is better


def search_heads(
    model: nn.Module,
    objective: Objective,
    k: int,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    method: str = "greedy",
    sites: Sites = "*",
    heads: Iterable[int] | None = None,
    edit: str | Pass = "zero",
    dynamic_shapes: object = None,
    calibration: Iterable[Batch] | Calibration | None = None,
    limit: int | None = None,
    start: HeadSearch | None = None,
    seed: int = 0,
) -> HeadSearch:
    """The ``k`` heads whose edit makes ``objective`` largest, as HeadHunter chooses heads (arXiv:2506.10978).

    ``objective``: a function of the model, in which some heads are edited, that returns a scalar; it may call the model as
    often as it likes, with inputs that fit the example ``args`` and ``kwargs`` (other sizes with ``dynamic_shapes``, as of
    ``optimize``).  The model is compiled once, with a switch at every head; random numbers start from ``seed`` at each
    evaluation, so that it depends on the heads alone.
    ``method``: "greedy" adds in each of ``k`` rounds the head that helps most (at most ``k`` times the number of heads
    evaluations); "swaps" starts from the ``k`` heads that are best alone, and swaps one for another, in an order drawn from
    ``seed``, while that helps.  ``k`` heads are chosen even if the objective falls.
    ``edit``: "zero" for outputs of zeros, or a pass with a ``heads`` option that changes heads one by one and no weights, such as
    ``SoftPAG(u=0.5)``.  ``sites``, ``heads``: the candidates; sites that refuse the edit have none, and a warning
    names them.  ``calibration``: for passes that need data.
    ``limit``: at most this many evaluations.  ``start``: a former result for the same model, edit and objective, whose
    evaluations are not repeated.

    Raises SearchError if the objective raises or returns no finite number, with what was found so far in ``partial``;
    PolicyError for what is not there, and for an edit that every site refuses or that no switch can undo.
    """
    require_callable("search_heads", "objective", objective)
    choice("search_heads", "method", method, METHODS)
    if limit is not None:
        whole("search_heads", "limit", limit, least=1)
    if not (args or kwargs):
        raise PolicyError("search_heads needs example inputs", hint="pass args or kwargs")
    made = _prepared(model, CallInputs.of(args, kwargs), sites, heads, edit, dynamic_shapes, calibration, seed)
    candidates = made.candidates
    if whole("search_heads", "k", k, least=1) > len(candidates):
        raise PolicyError(f"search_heads: invalid value k={k}: there are {len(candidates)} candidates")
    search = _Search(objective, made, method, seed, limit, start)
    with (
        torch.no_grad(),
        working("searching heads", None if method == "swaps" else 1 + _rounds(len(candidates), k)) as tick,
    ):
        search.tick = tick
        return search.run(candidates, k)


def _rounds(candidates: int, k: int) -> int:
    """Evaluations of a greedy search."""
    return sum(candidates - i for i in range(k))


@dataclass(frozen=True)
class _Prepared:
    """The compiled model with its switches, and by site the edit of all of its candidates."""

    compiled: Compiled
    switches: Switched
    edits: Mapping[str, Any]

    @property
    def candidates(self) -> list[Head]:
        return [(site, h) for site, own in self.edits.items() for h in own.heads]

    def turn(self, heads: Heads) -> None:
        """The switches of these heads on, all others off."""
        place = {f.site.name: f.site.spec.heads.index for f in self.compiled.findings.found}
        self.switches.turn({name: [place[name](h) for site, h in heads if site == name] for name in self.edits})

    def policy(self, heads: Sequence[Head]) -> dict[str, Any]:
        """The same edit as a policy for ``attnopt.optimize``."""
        by_site = {name: sorted(h for site, h in heads if site == name) for name in self.edits}
        return {name: replace(self.edits[name], heads=own) for name, own in by_site.items() if own}


@compiling()
def _prepared(
    model: nn.Module, inputs: CallInputs, sites: Sites, heads: Iterable[int] | None, edit: str | Pass,
    shapes: object, calibration: Iterable[Batch] | Calibration | None, seed: int,
) -> _Prepared:  # fmt: skip
    asked, own = _edit(edit)
    batches = () if calibration is None else Calibration.of(calibration).batches
    job = Job(model, Policy.of("fuse"), inputs, shapes, batches, backends_of("auto"), Options(seed=seed))
    compiled = carried_out(job)
    found = compiled.findings.found
    chosen = chosen_heads("search_heads", found, sites, own if heads is None else heads)
    edits, edited, refused = dict[str, Pass](), dict[str, AttentionSpec](), dict[str, Refusal]()
    for f, site in _sites(compiled, job, [f for f in found if f.site.name in chosen], asked.calibrates):
        name = f.site.name
        edits[name] = _with_heads(asked, chosen[name])
        refusal = escapes(f) if f.raised.region.escapes else plugin_calls.check(edits[name], site)
        if refusal is None:
            edited[name] = _edited(site, edits[name])
        else:
            refused[name] = refusal
    _tell(asked, refused, len(chosen))
    made = switched(compiled.program.module, found, edited)
    given = {name: edits[name] for name in chosen if name in edited}
    return _Prepared(replace(compiled, module=made.module), made, given)


def _edit(edit: str | Pass) -> tuple[Pass, Iterable[int] | None]:
    """The edit as a pass, and the heads that it names."""
    if edit == "zero":
        return HeadPatch([0], "silence"), None
    made = Policy.of(edit).passes_for("")
    if len(made) != 1 or "heads" not in {f.name for f in fields(made[0])}:  # type: ignore[arg-type]
        raise PolicyError(
            f"search_heads: invalid value edit={edit!r}",
            hint='use "zero", or one pass with a heads option, such as SoftPAG(u=0.5)',
        )
    return made[0], getattr(made[0], "heads", None)


def _with_heads(edit: Pass, heads: Sequence[int]) -> Pass:
    made: Pass = replace(edit, heads=tuple(heads))  # type: ignore[type-var]
    return made


def _sites(compiled: Compiled, job: Job, found: Sequence[Found], learns: bool) -> Iterator[tuple[Found, Site]]:
    """The sites with what they compute on calibration data, if there is any that the edit reads."""
    if not (learns and job.batches):
        yield from ((f, f.site) for f in found)
        return
    for f, activations in Stream(compiled.program.module, found, job.arranged(compiled.program)).sites():
        yield f, replace(f.site, activations=activations)


def _edited(site: Site, edit: Pass) -> AttentionSpec:
    """The spec with all candidates edited.  Raises PolicyError if that is more than an edit of single heads."""
    made = plugin_calls.rewrite(edit, site)
    changes = {
        "weights": bool(made.edits) or made.out_bias is not None,
        "the number of heads": (made.spec.heads, made.spec.kv_of_head) != (site.spec.heads, site.spec.kv_of_head),
        "the inputs of the model": bool(made.spec.inputs),
        "how tokens are routed over heads": made.spec.route is not None,
        "a cache": made.spec.eviction is not None,
    }
    if (what := next((name for name, does in changes.items() if does), None)) is not None:
        raise PolicyError(
            f"search_heads: {edit.name} changes {what}, which no switch by head can undo",
            hint="use an edit of head outputs or of what heads see, such as SoftPAG, HeadPatch or LocalWindow",
        )
    return made.spec


def _tell(edit: Pass, refused: Mapping[str, Refusal], sites: int) -> None:
    if not refused:
        return
    name, reason = next(iter(refused.items()))
    if len(refused) == sites:
        raise PolicyError(f"search_heads: {edit.name} is refused by every site, the first {name}: {reason}")
    warn(
        f"search_heads: {len(refused)} of {sites} sites refuse {edit.name} and have no candidates, the first {name}: {reason}"
    )


class _LimitError(Exception):
    """No evaluation is left."""


class _Search:
    """Evaluations of sets of heads, each once, and where the search has come to."""

    def __init__(
        self, objective: Objective, made: _Prepared, method: str, seed: int, limit: int | None, start: HeadSearch | None
    ) -> None:
        self.objective, self.made, self.method, self.seed, self.limit = objective, made, method, seed, limit
        self.module = OptimizedModel(made.compiled.module, made.compiled.origin).eval()
        self.known: dict[Heads, float] = {} if start is None else dict(start.evaluated)
        self.evaluated: dict[Heads, float] = {}  # of those, what this search asked for
        self.chosen: list[Head] = []
        self.steps: list[SearchStep] = []
        self.tick: Callable[[], None] = lambda: None
        self.done = 0

    def run(self, candidates: Sequence[Head], k: int) -> HeadSearch:
        """The result; raises SearchError."""
        try:
            self.value(())
            (self.greedy if self.method == "greedy" else self.swaps)(candidates, k)
        except _LimitError:
            return self.result(False)
        except Exception as e:
            raise SearchError(
                f"the search ended after {self.done} evaluations: {type(e).__name__}: {e}",
                hint="what was found is in the error's partial; pass it as start to continue",
                partial=self.result(False),
            ) from e
        finally:
            self.made.turn(frozenset())
        return self.result(True)

    def value(self, heads: Sequence[Head]) -> float:
        """The objective with these heads edited."""
        key = frozenset(heads)
        if key not in self.known:
            if self.limit is not None and self.done >= self.limit:
                raise _LimitError
            self.made.turn(key)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                told = ", ".join(f"head {h} of {site}" for site, h in heads) or "no head"
                self.known[key] = scalar(self.objective(self.module), "objective", f"with {told} edited")
            self.done += 1
            self.tick()
        self.evaluated[key] = self.known[key]
        return self.known[key]

    def greedy(self, candidates: Sequence[Head], k: int) -> None:
        for _ in range(k):
            left = [c for c in candidates if c not in self.chosen]
            self.add(max(left, key=lambda c: self.value([*self.chosen, c])))  # the first of equals

    def add(self, head: Head) -> None:
        self.chosen.append(head)
        self.steps.append(SearchStep(head, None, self.value(self.chosen)))

    def swaps(self, candidates: Sequence[Head], k: int) -> None:
        alone = sorted(candidates, key=lambda c: -self.value([c]))
        for head in alone[:k]:
            self.add(head)
        order = random.Random(self.seed)
        while self._swap(alone, order):
            pass

    def _swap(self, candidates: Sequence[Head], order: random.Random) -> bool:
        """Make the first swap that helps, if there is one."""
        pairs = [(i, c) for i in range(len(self.chosen)) for c in candidates if c not in self.chosen]
        order.shuffle(pairs)
        now = self.value(self.chosen)
        for i, head in pairs:
            trial = [*self.chosen[:i], head, *self.chosen[i + 1 :]]
            if (found := self.value(trial)) > now:
                self.steps.append(SearchStep(head, self.chosen[i], found))
                self.chosen = trial
                return True
        return False

    def result(self, is_complete: bool) -> HeadSearch:
        base = self.known.get(frozenset(), float("nan"))
        value = self.known.get(frozenset(self.chosen), float("nan"))
        return HeadSearch(
            self.method,
            tuple(self.chosen),
            base,
            value,
            tuple(self.steps),
            self.made.policy(self.chosen),
            self.evaluated,
            is_complete,
        )
