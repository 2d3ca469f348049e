"""How much each head contributes, measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.display import shown
from attnopt.base.options import choice
from attnopt.capture.calibration import Batch, Calibration, shapes_of
from attnopt.capture.program import Program
from attnopt.capture.signature import Signature
from attnopt.compiler.analyze import analyze_in_eval
from attnopt.compiler.check import all_fitting
from attnopt.compiler.gate_scores import ablation, fisher, sensitivity, taylor
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.errors import CalibrationError, PolicyError
from attnopt.fit.importance_methods import IMPORTANCE, scores_at
from attnopt.fit.induction_score import retrieval
from attnopt.ir.site import Site
from attnopt.match.find import Found

IN_MODEL = ("ablation", "taylor", "fisher")

Loss = Callable[[Any, CallInputs], Tensor]  # (the model's output, the batch as args and kwargs) -> a scalar
Behaviour = Callable[[Any], Tensor]  # the model's output -> logits [..., classes]


@dataclass(frozen=True)
class HeadImportance(Mapping[str, tuple[float, ...]]):
    """Scores by site name: one number per head, higher means keep; ``heads`` holds the head numbers.

    Prints as a table; can be passed to ``PruneHeads(importance=...)``.
    """

    method: str
    scores: Mapping[str, tuple[float, ...]]
    heads: Mapping[str, tuple[int, ...]]

    def __getitem__(self, site: str) -> tuple[float, ...]:
        return self.scores[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "method": self.method,
            "scores": {site: list(scores) for site, scores in self.scores.items()},
            "heads": {site: list(numbers) for site, numbers in self.heads.items()},
        }


def methods() -> tuple[str, ...]:
    """Every method that there is, those of third parties included."""
    return (*IMPORTANCE.listed(), "retrieval", *IN_MODEL)


@compiling()
def head_importance(
    model: nn.Module,
    calibration: Iterable[Batch] | Calibration,
    method: str = "obs",
    *,
    sites: Sequence[Site] | None = None,
    loss: Loss | None = None,
    behaviour: Behaviour | None = None,
    seed: int = 0,
) -> HeadImportance:
    """For each site, the score of each of its heads, in the order of ``site.spec.heads``; higher means keep.

    Per site, from its weights and from what it computes on ``calibration``:
    ``"obs"``: the increase of the squared error of the layer without the head, after the others compensate optimally
    (OSSCAR, arXiv:2403.12983); ``"output-norm"``: mean norm of the head's contribution to the layer output; ``"flap"``:
    the variance of that (arXiv:2312.11983); ``"wanda"`` (arXiv:2306.11695); ``"weights"``: norm of value times output
    weights; ``"entropy"``: distance of the attention from uniform; ``"locality"``: how local the attention is;
    ``"retrieval"``: attention to the successor of an earlier occurrence of the query token (induction heads,
    arXiv:2209.11895), for models that take token ids; ``"random"``.

    With the whole model:
    ``"ablation"``: relative change of the model output with that head silenced; with ``behaviour`` (output -> logits),
    the KL divergence of these (SHIPS, arXiv:2410.13708). ``"taylor"``: mean over batches of |d loss / d gate|
    (arXiv:1905.10650); ``"fisher"``: mean of its square (arXiv:2204.09656).  Without ``loss`` (output, batch ->
    scalar), taylor is label-free: the squared norm of d output / d gate (Gauss-Newton).

    Padding does not count.  A site whose module runs several times (shared weights) has an entry for each run.
    ``sites``: only the sites of these names, with their remaining heads.  Raises CalibrationError if there is no batch
    or a site cannot be scored, PolicyError for an unknown method.
    """
    choice("head_importance", "method", method, methods())
    if loss is not None and method not in ("taylor", "fisher"):
        raise PolicyError(f"head_importance: loss is not used by {method!r}; omit it or use method='taylor'")
    if behaviour is not None and method != "ablation":
        raise PolicyError("head_importance: behaviour is only used by 'ablation'; omit it or use that method")
    if method == "fisher" and loss is None:
        raise PolicyError(
            "head_importance: 'fisher' needs a loss; pass loss=, or use method='taylor', which needs none"
        )
    program, batches, found = _captured(model, Calibration.of(calibration), sites)
    if method in IN_MODEL:
        scores = _in_model(program, batches, found, method, loss, behaviour, seed)
    else:
        scores = {f.site.name: _one(site, batches, method, seed) for f, site in _seen(program, batches, found)}
    wanted = {site.name: site.spec.heads for site in sites or ()}
    heads = {name: wanted.get(name, f.site.spec.heads) for name, f in zip(scores, found, strict=True)}
    chosen = {
        name: tuple(s[f.site.spec.heads.index(h)] for h in heads[name]) if len(s) > len(heads[name]) else tuple(s)
        for (name, s), f in zip(scores.items(), found, strict=True)
    }
    for name, s in chosen.items():
        if not all(torch.tensor(s).isfinite()):
            raise CalibrationError(
                f"its {method} on the calibration data is not finite", site=name, hint="remove such batches"
            )
    return HeadImportance(method, chosen, heads)


def _captured(
    model: nn.Module, calibration: Calibration, sites: Sequence[Site] | None
) -> tuple[Program, list[CallInputs], list[Found]]:
    """The model in eval mode, the batches in the form of its graph, and the sites to score."""
    first = calibration.batches[0]
    shapes = "auto" if len({shapes_of(b) for b in calibration}) > 1 else None
    analyzed = analyze_in_eval(model, first, shapes)
    batches = all_fitting(analyzed.program, Signature.of(model.forward, *first), calibration)
    found = [f for f in analyzed.findings.found if sites is None or f.site.name in {s.name for s in sites}]
    missing = {s.name for s in sites or ()} - {f.site.name for f in found}
    if missing or not found:
        names = ", ".join(repr(n) for n in sorted(missing)) or "any name"
        raise CalibrationError(f"no attention of {names} was found", hint="attnopt.inspect lists the sites")
    return analyzed.program, batches, found


def _seen(program: Program, batches: Sequence[CallInputs], found: Sequence[Found]) -> Iterator[tuple[Found, Site]]:
    for f, activations in Stream(program.module, found, batches).sites():
        yield f, replace(f.site, activations=activations)


def _one(site: Site, batches: Sequence[CallInputs], method: str, seed: int) -> tuple[float, ...]:
    return retrieval(site, batches) if method == "retrieval" else scores_at(site, method, seed)


def _in_model(
    program: Program, batches: Sequence[CallInputs], found: Sequence[Found], method: str, loss: Loss | None,
    behaviour: Behaviour | None, seed: int,
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    if method == "ablation":
        return ablation(program.module, found, batches, behaviour)
    if loss is None:
        return sensitivity(program.module, found, batches, seed)
    return (taylor if method == "taylor" else fisher)(program.module, found, batches, loss)
