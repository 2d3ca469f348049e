"""Whether a fit is used on data like those that it was fitted to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from attnopt.base.compile_lock import compiling
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.compiler.graph_probe import GraphProbe
from attnopt.errors import CalibrationError
from attnopt.fit.leverage import MeanMoments, relative_leverage

FAR = 4.0  # times the leverage of the calibration data


@compiling()
def calibration_distance(
    model: nn.Module, calibration: Iterable[Batch] | Calibration, data: Iterable[Batch] | Calibration
) -> dict[str, float]:
    """By site how far ``data`` lie from ``calibration``: the mean leverage of their tokens, those of ``calibration`` being 1.

    The variance of what a least-squares fit predicts for a token is proportional to its leverage.  It is that of the
    heads' outputs in ``model``, the original one, whatever their scale or basis.  A mean over the sites above 4 warns: a
    fit knows little of such data.  Other data of the same kind have 1 to 2, or more beside a calibration of few sequences.
    Raises CalibrationError and CaptureError.
    """
    known, asked = Calibration.of(calibration), Calibration.of(data)
    analyzed, batches = analyze_batches(model, Calibration((*known, *asked)))
    if not analyzed.findings.found:
        raise CalibrationError("no attention was found", hint="attnopt.inspect tells why")
    probe = GraphProbe(analyzed.program, analyzed.findings.found, batches)
    both = zip(probe.sites(batches[: len(known)]), probe.sites(batches[len(known) :]), strict=True)
    moments = MeanMoments()
    found = {home.name: relative_leverage(moments.of(home), moments.of(away)) for home, away in both}
    if (mean := sum(found.values()) / len(found)) > FAR:
        warn(
            f"the data lie far from the calibration data: the leverage of their tokens is {mean:.2g} times as large; "
            "calibrate on data that are like them, too"
        )
    return found
