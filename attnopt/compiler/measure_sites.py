"""What the conditions of a policy ask of each attention, measured once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.program import Program
from attnopt.compiler.graph_probe import GraphProbe
from attnopt.compiler.importance import of_model
from attnopt.compiler.where import Scores, Where
from attnopt.errors import CalibrationError
from attnopt.fit.importance_methods import KIND, Random, importance, scored
from attnopt.ir.importance import Importance, ModelImportance
from attnopt.ir.plugin_calls import check_part
from attnopt.ir.site import Site
from attnopt.match.find import Found


def measured(
    conditions: Iterable[Where], program: Program, found: Sequence[Found], batches: Sequence[CallInputs], seed: int
) -> Scores:
    """The statistics that ``conditions`` read, at every site that they apply to.  Raises CalibrationError."""
    asked = {name: _method(name, where, seed, bool(batches)) for where in conditions for name in where.measures}
    scores: dict[str, dict[str, Sequence[float]]] = {name: {} for name in asked}
    probe = GraphProbe(program, found, batches, seed=seed)
    local = {name: how for name, how in asked.items() if not isinstance(how, ModelImportance)}
    for site in _sites(probe) if local else ():
        for name, how in local.items():
            if check_part(how, KIND, site) is None:
                scores[name][site.name] = scored(how, site)
    for name, how in asked.items():
        if isinstance(how, ModelImportance):
            scores[name].update(of_model(how, probe))
    return scores


def _method(name: str, where: Where, seed: int, is_calibrated: bool) -> Importance:
    how = importance("where", "statistics", name)
    if how.needs_calibration and not is_calibrated:
        raise CalibrationError(f"{where} needs calibration data, on which {name} is measured", hint="pass calibration=")
    return Random(seed) if how == Random() else how


def _sites(probe: GraphProbe) -> Iterator[Site]:
    return probe.sites() if probe.batches else (f.site for f in probe.found)
