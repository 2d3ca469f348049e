"""How much each head contributes, and what it does, measured on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from attnopt.base.compile_lock import compiling
from attnopt.base.notation import shortened
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.compiler.graph_probe import GraphProbe
from attnopt.compiler.head_results import HeadImportance, HeadProfile, HeadSet
from attnopt.errors import CalibrationError, PolicyError
from attnopt.fit.importance_methods import IMPORTANCE, KIND, Random, checked, importance, scored
from attnopt.ir.blame import blamed, fault
from attnopt.ir.curves import Curves
from attnopt.ir.head_probe import Loss, ToLogits
from attnopt.ir.importance import AblationImportance, Importance, ModelImportance
from attnopt.ir.plugin_calls import check_part
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic

TOLD = 200  # characters of a method in a result; segment ids make thousands
Method = str | Importance | Statistic[Any]


def methods() -> tuple[str, ...]:
    """Every method that there is, those of third parties included."""
    return tuple(IMPORTANCE.listed())


@compiling()
def head_importance(
    model: nn.Module,
    calibration: Iterable[Batch] | Calibration,
    method: Method = "obs",
    *,
    sites: Sequence[Site] | None = None,
    loss: Loss | None = None,
    behaviour: ToLogits | None = None,
    seed: int = 0,
) -> HeadImportance:
    """For each site, the score of each of its heads, in the order of ``site.spec.heads``; higher means keep.

    ``method``: a name, with options as in ``"distance(grid=(14, 14), prefix=1)"``; an ``attnopt.Importance``, such as those
    of ``attnopt.statistics``; or a ``Statistic`` that measures one number for each head.

    Per site, from its weights and from what it computes on ``calibration``:
    ``"obs"``: the increase of the squared error of the layer without the head, after the others compensate optimally
    (OSSCAR, arXiv:2403.12983); ``"output-norm"``: mean norm of the head's contribution to the layer output; ``"flap"``:
    the variance of that (arXiv:2312.11983); ``"wanda"`` (arXiv:2306.11695); ``"weights"``: norm of value times output
    weights; ``"entropy"``: distance of the attention from uniform; ``"distance"``: how far the attention reaches, and
    ``"locality"``: minus that; ``"sink-mass"``: the attention on the first or heaviest key; ``"segment-mass"``: that from
    one segment to another; ``"massive-features"``, ``"max-logit"``, ``"query-norm"``, ``"key-norm"``: sizes of queries and
    keys; ``"qk-rank"``, ``"ov-rank"``: the rank that the data need; ``"random"``.

    With the whole model or its inputs:
    ``"induction"``: attention to the successor of an earlier occurrence of the query token (arXiv:2209.11895);
    ``"retrieval"``: how often a head copies a needle (arXiv:2404.15574); ``"counterfactual"``: how much its output depends on
    a segment (arXiv:2412.13949); ``"unique-codes"``: codes of its output that occur only in a task (arXiv:2405.12522);
    ``"ablation"``: relative change of the model output with that head silenced, or with ``behaviour`` (output -> logits) the
    KL divergence of these; ``"ships"``: that of the last token (arXiv:2410.13708); ``"sahara"``: the angle by which hidden
    states turn; ``"taylor"``: mean over batches of |d loss / d gate| (arXiv:1905.10650); ``"fisher"``: mean of its square
    (arXiv:2204.09656).  Without ``loss`` (output, batch -> scalar), taylor is label-free (Gauss-Newton).

    Padding does not count.  A site whose module runs several times (shared weights) has an entry for each run.
    ``sites``: only the sites of these names, with their remaining heads.  Raises CalibrationError if there is no batch
    or a site cannot be scored, PolicyError for an unknown method.
    """
    how = _method("head_importance", method, loss, behaviour, seed)
    probe = _probe(model, calibration, how, sites, loss, behaviour, seed)
    if isinstance(how, ModelImportance):
        scores = of_model(how, probe)
    else:
        scores = {site.name: scored(how, _applicable(how, site)) for site in probe.sites()}
    return HeadImportance(shortened(how.to_json(), TOLD), *_remaining(probe, scores, sites))


Scores = dict[str, tuple[float, ...] | Refusal]  # by site


def several_scores(probed: Sequence[tuple[Importance, GraphProbe]]) -> list[Scores]:
    """For each method the scores of the sites of its probe, or why it does not apply to one; the probes are of one model.

    Methods of one attention share one run.  Raises CalibrationError, PluginError."""
    found: list[Scores] = [{**of_model(how, p)} if isinstance(how, ModelImportance) else {} for how, p in probed]
    alone = [(how, own) for (how, _), own in zip(probed, found, strict=True) if not isinstance(how, ModelImportance)]
    for site in probed[0][1].sites() if alone else ():
        for how, own in alone:
            refused = check_part(how, KIND, site)
            own[site.name] = scored(how, site) if refused is None else refused
    return found


@compiling()
def head_profile(
    model: nn.Module,
    calibration: Iterable[Batch] | Calibration,
    method: Method,
    *,
    sites: Sequence[Site] | None = None,
) -> HeadProfile:
    """For each site and each of its heads many numbers along an axis: the mass at each distance ("distance") or on each of the
    first keys ("sink-mass"), the sizes of features ("massive-features"), the share that r dimensions explain ("qk-rank",
    "ov-rank"), or a ``Statistic`` that measures ``Curves``.  Arguments and errors as of ``head_importance``.
    """
    how = _method("head_profile", method, None, None, 0)
    if isinstance(how, ModelImportance):
        raise PolicyError(
            f"head_profile: {how.name!r} has one number for each head", hint="use attnopt.head_importance"
        )
    probe = _probe(model, calibration, how, sites, None, None, 0)
    curves = {site.name: _profile(how, _applicable(how, site)) for site in probe.sites()}
    rows, heads = _remaining(probe, {name: c.values for name, c in curves.items()}, sites)
    kept = {name: Curves(c.axis, c.at, rows[name]) for name, c in curves.items()}
    return HeadProfile(shortened(how.to_json(), TOLD), kept, heads)


@compiling()
def greedy_heads(
    model: nn.Module,
    calibration: Iterable[Batch] | Calibration,
    method: Method = "sahara",
    *,
    size: int = 3,
    sites: Sequence[Site] | None = None,
    behaviour: ToLogits | None = None,
    seed: int = 0,
) -> HeadSet:
    """The set of heads that a greedy search finds: in each of ``size`` steps the head is added whose ablation, with those
    found before, moves the model most (Sahara, arXiv:2410.13708).  ``method``: "sahara", "ships", "ablation", or another
    ``AblationImportance``; other arguments and errors as of ``head_importance``.
    """
    how = _method("greedy_heads", method, None, behaviour, seed)
    if not isinstance(how, AblationImportance):
        raise PolicyError(
            f"greedy_heads: {how.name!r} does not ablate sets of heads", hint='use "sahara", "ships" or "ablation"'
        )
    probe = _probe(model, calibration, how, sites, None, behaviour, seed)
    wanted = {site.name: set(site.spec.heads) for site in sites or ()}
    left = [(n, i) for n, heads in probe.heads.items() for i, h in enumerate(heads) if h in wanted.get(n, heads)]
    if type(size) is not int or not 1 <= size <= len(left):
        raise PolicyError(f"greedy_heads: invalid value size={size!r}: expected an integer from 1 to {len(left)}")
    steps: list[tuple[str, int, float]] = []
    with blamed(how, KIND, "moved"):
        before, off = how.before(probe), dict[str, list[int]]()
        for _ in range(size):
            moved = how.with_each(probe, before, off)
            n, i = best = max(left, key=moved.__getitem__)
            left.remove(best)
            off.setdefault(n, []).append(i)
            steps.append((n, probe.heads[n][i], moved[best]))
    return HeadSet(shortened(how.to_json(), TOLD), tuple(steps))


def of_model(how: ModelImportance, probe: GraphProbe) -> dict[str, tuple[float, ...]]:
    """For each site one number for each head.  Raises CalibrationError, PluginError."""
    with blamed(how, KIND, "of_model"):
        found = {site: tuple(map(float, scores)) for site, scores in how.of_model(probe).items()}
    _require_sites(how, probe, found)
    return {site: checked(how, site, found[site], len(heads)) for site, heads in probe.heads.items()}


def _method(owner: str, method: object, loss: Loss | None, behaviour: ToLogits | None, seed: int) -> Importance:
    """Raises PolicyError."""
    how = importance(owner, "method", method)
    of_model = how if isinstance(how, ModelImportance) else None
    if loss is not None and not (of_model and of_model.uses_loss):
        raise PolicyError(f"{owner}: loss is not used by {how.name!r}; omit it or use method='taylor'")
    if behaviour is not None and not (of_model and of_model.uses_behaviour):
        raise PolicyError(f"{owner}: behaviour is not used by {how.name!r}; omit it or use method='ablation'")
    if loss is None and of_model and of_model.needs_loss:
        raise PolicyError(f"{owner}: {how.name!r} needs a loss; pass loss=, or use method='taylor', which needs none")
    return Random(seed) if how == Random() else how


def _probe(
    model: nn.Module,
    calibration: Iterable[Batch] | Calibration,
    how: Importance,
    sites: Sequence[Site] | None,
    loss: Loss | None,
    behaviour: ToLogits | None,
    seed: int,
) -> GraphProbe:
    """The captured model in eval mode, its batches in the form of its graph, and the sites to score."""
    data = Calibration.of(calibration)
    brought = how.more if isinstance(how, ModelImportance) else ()
    more = Calibration.of(brought).batches if brought else ()
    analyzed, batches = analyze_batches(model, Calibration((*data, *more)))
    found = [f for f in analyzed.findings.found if sites is None or f.site.name in {s.name for s in sites}]
    missing = {s.name for s in sites or ()} - {f.site.name for f in found}
    if missing or not found:
        names = ", ".join(repr(n) for n in sorted(missing)) or "any name"
        raise CalibrationError(f"no attention of {names} was found", hint="attnopt.inspect lists the sites")
    own, others = batches[: len(data)], batches[len(data) :]
    return GraphProbe(analyzed.program, found, own, others, loss, behaviour, seed)


def _applicable(how: Importance, site: Site) -> Site:
    """``site``, if ``how`` applies to it.  Raises CalibrationError."""
    refused = check_part(how, KIND, site)
    if refused is None:
        return site
    hint = refused.hint or "score the other sites alone, with sites="
    raise CalibrationError(
        f"{how.to_json()} does not apply [{refused.code}]: expected {refused.expected}, found {refused.found}",
        site=site.name,
        hint=hint,
    )


def _profile(how: Importance, site: Site) -> Curves:
    with blamed(how, KIND, "profile", site.name):
        found = how.profile(site)
    if not isinstance(found, Curves) or len(found.values) != site.num_heads:
        what = f"{len(found.values)} curves" if isinstance(found, Curves) else type(found).__name__
        raise fault(how, KIND, f"profile gave {what}, expected Curves of {site.num_heads} heads", site.name)
    return found


def _require_sites(how: Importance, probe: GraphProbe, found: Mapping[str, object]) -> None:
    if set(found) != set(probe.heads):
        raise fault(how, KIND, f"of_model gave scores of {sorted(found)}, expected those of {sorted(probe.heads)}")


def _remaining(
    probe: GraphProbe, of_sites: Mapping[str, Sequence[Any]], sites: Sequence[Site] | None
) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[int, ...]]]:
    """What there is for the heads of each site that remain, and their numbers."""
    wanted = {site.name: site.spec.heads for site in sites or ()}
    heads = {name: tuple(wanted.get(name, known)) for name, known in probe.heads.items()}
    rows = {n: dict(zip(probe.heads[n], of_sites[n], strict=True)) for n in heads}
    return {n: tuple(rows[n][h] for h in numbers) for n, numbers in heads.items()}, heads
