"""How much each head contributes, measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import CalibrationError
from attnopt.site import Site

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


def head_importance(
    model: nn.Module, calibration: Iterable[Batch], *, sites: Sequence[Site] | None = None
) -> dict[str, tuple[float, ...]]:
    """For each site the score of each of its heads, in the order of ``site.spec.heads``.

    The score of head h is the mean over tokens of ``|| z_h W_o,h ||``: the length of what the head, through its columns
    of the output projection, adds to the layer's output.  Every position counts, so give texts without padding.  A site
    whose module runs several times (shared weights) gets the mean over all its runs.

    ``calibration`` are batches: a tensor, a tuple of args or a dict of kwargs.  ``sites`` defaults to all that
    ``attnopt.inspect`` finds on the first batch.  CalibrationError if there is no batch, or if a site's output
    projection is no nn.Linear with known columns.
    """
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise CalibrationError("there is no calibration batch", hint="give at least one")
    if sites is None:
        import attnopt

        sites = attnopt.inspect(model, *_arguments(first)).sites

    totals = {site.name: torch.zeros(site.num_heads, dtype=torch.float64) for site in sites}
    tokens = dict.fromkeys(totals, 0)
    was_training, handles = model.training, []
    try:
        for site in sites:
            linear, columns = _out_projection(model, site)
            handles.append(linear.register_forward_pre_hook(_adding(site.name, linear, columns, totals, tokens)))
        model.eval()
        with torch.no_grad():
            _call(model, first)
            for batch in batches:
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return {site.name: _mean(site, totals[site.name], tokens[site.name]) for site in sites}


def _out_projection(model: nn.Module, site: Site) -> tuple[nn.Linear, list[Tensor]]:
    """The module, and for each head that remains the indices of its input features."""
    out = site.projections.get("out")
    if out is None or out.weight is None or out.rows is None:
        why = out.why if out is not None and out.why else "it was not found"
        raise CalibrationError(f"the output projection is not known: {why}", site=site.name)
    name = out.weight.removesuffix(".weight")
    module = model.get_submodule(name) if name != out.weight else None
    if not isinstance(module, nn.Linear):
        raise CalibrationError(
            f"the output projection {out.weight} belongs to a {type(module).__name__}, expected an nn.Linear",
            site=site.name,
            hint="leave this site out of `sites`",
        )
    rows = out.rows
    return module, [torch.as_tensor(rows[head], device=module.weight.device) for head in site.spec.heads]


def _adding(
    name: str, linear: nn.Linear, columns: list[Tensor], totals: dict[str, Tensor], tokens: dict[str, int]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    weights = [linear.weight.detach()[:, column] for column in columns]

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        z = inputs[0].detach()
        z = z.reshape(-1, z.shape[-1])
        sums = [(z[:, column] @ weight.T).norm(dim=-1).sum() for column, weight in zip(columns, weights, strict=True)]
        totals[name] += torch.stack(sums).double().cpu()
        tokens[name] += z.shape[0]

    return hook


def _mean(site: Site, total: Tensor, tokens: int) -> tuple[float, ...]:
    if not tokens:
        raise CalibrationError("it did not run on the calibration data", site=site.name)
    mean = total / tokens
    if not bool(mean.isfinite().all()):
        raise CalibrationError("its outputs on the calibration data are not finite", site=site.name)
    return tuple(mean.tolist())


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match batch:
        case Tensor():
            return (batch,), {}
        case tuple() | list():
            return tuple(batch), {}
        case Mapping():
            return (), dict(batch)
    raise CalibrationError(
        f"a batch is a {type(batch).__name__}, expected a tensor, a tuple of args or a dict of kwargs"
    )


def _call(model: nn.Module, batch: Batch) -> None:
    args, kwargs = _arguments(batch)
    model(*args, **kwargs)
