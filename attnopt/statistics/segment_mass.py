"""Cross-modal mass: how much of the attention goes from the tokens of one segment to those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.options import whole
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.ir.weight_rows import WeightRows
from attnopt.statistics.calibrated import calibrated, rows_of

Span = tuple[int, int | None]


@dataclass(frozen=True)
class SegmentMass(Importance):
    """The mean over the queries of one segment of their attention to the keys of another::

        1/|Q| sum_{i in Q} sum_{j in K} p_ij

    such as from text to image, whose decay with depth ``attnopt.plot.depth`` shows (MODA, arXiv:2507.04635).

    ``queries``, ``keys``: spans (first, last + 1) of token positions, the same in every sequence; below 0 they count from the
    end, and None as the second is the end.  With ``ids``, for each calibration batch the segment of every token [B, L]:
    numbers of segments.  ``queries=None``: all.  Padding does not count, nor do sequences without tokens of ``keys``.
    Raises PolicyError, and CalibrationError for a segment that no token belongs to.
    """

    name: ClassVar[str] = "segment-mass"
    needs_calibration: ClassVar[bool] = True
    queries: Span | int | None
    keys: Span | int
    ids: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(_listed(batch) for batch in self.ids))
        for option in ("queries", "keys"):
            given = getattr(self, option)
            if given is not None or option == "keys":
                object.__setattr__(self, option, self._read(option, given))

    def scores(self, site: Site) -> Sequence[float]:
        total, rows, met = (
            torch.zeros(site.num_heads, dtype=torch.float64),
            0,
            dict.fromkeys(("queries", "keys"), False),
        )
        for block in rows_of(site):
            counted = torch.zeros(block.queries, dtype=torch.bool)
            counted[block.rows.cpu()] = True
            queries = self._members(site, block, "queries", block.queries) & counted
            keys = self._members(site, block, "keys", len(block.keys)) & block.keys.cpu()
            met = {"queries": met["queries"] or bool(queries.any()), "keys": met["keys"] or bool(keys.any())}
            if not keys.any():
                continue
            own = queries[block.rows.cpu()]
            total += block.weights.cpu()[:, own][..., keys].sum((1, 2))
            rows += int(own.sum())
        absent = next((option for option, found in met.items() if not found), None)
        if absent is not None or not rows:
            told = self._told(absent) if absent else f"both {self._told('queries')} and {self._told('keys')}"
            raise CalibrationError(
                f"no sequence has {told}",
                site=site.name,
                hint="give segments that exist in the calibration data",
            )
        return (total / rows).tolist()

    def _read(self, option: str, given: Any) -> Span | int:
        if self.ids is not None:
            return whole(self.name, option, given)
        if isinstance(given, (list, tuple)) and len(given) == 2:
            first, end = given
            if _is_whole(first) and (end is None or (_is_whole(end) and (end > first or (first >= 0) != (end >= 0)))):
                return first, end
        raise PolicyError(
            f"{self.name}: invalid value {option}={given!r}: expected a span of tokens such as (0, 9) or (9, None), or the "
            "number of a segment and ids="
        )

    def _members(self, site: Site, block: WeightRows, option: str, length: int) -> Tensor:
        """Bool [length]: the tokens of the segment.  Raises CalibrationError if the span or the ids do not fit."""
        chosen: Span | int | None = getattr(self, option)
        if isinstance(chosen, int):
            return torch.eq(self._numbers(site, block, length), chosen)
        first, end = (0, None) if not isinstance(chosen, tuple) else chosen
        beyond = any(x is not None and not -length <= x <= length for x in (first, end))
        places = torch.arange(length)[first:end]
        if beyond or not len(places):
            raise CalibrationError(
                f"{self._told(option)} lie outside of a sequence of {length}",
                site=site.name,
                hint="give segments that exist, or score the sites with such keys alone with sites=",
            )
        return torch.zeros(length, dtype=torch.bool).index_fill(0, places, True)

    def _numbers(self, site: Site, block: WeightRows, length: int) -> Tensor:
        assert self.ids is not None
        batches = len(calibrated(site).batches) // calibrated(site).calls
        if len(self.ids) != batches:
            raise CalibrationError(f"{self.name}: ids of {len(self.ids)} batches for {batches}", site=site.name)
        ids = self.ids[block.batch % batches]
        own = ids[block.sequence] if block.sequence < len(ids) else ()
        if len(own) != length:
            raise CalibrationError(
                f"{self.name}: ids of {len(own)} tokens for the {length} of sequence {block.sequence} in batch {block.batch}",
                site=site.name,
                hint="give one integer for each token, [batch, length], and score sites with other keys apart with sites=",
            )
        return torch.tensor(own)

    def _told(self, option: str) -> str:
        chosen = getattr(self, option)
        return f"the {option} of segment {chosen}" if self.ids is not None else f"the {option} {chosen}"


def _listed(batch: Any) -> tuple[tuple[int, ...], ...]:
    """Ids [B, L] as plain numbers, which compare and print."""
    listed = batch.tolist() if isinstance(batch, Tensor) else batch
    try:
        return tuple(tuple(map(int, row)) for row in listed)
    except TypeError as e:
        raise PolicyError(f"{SegmentMass.name}: expected ids [batch, length] for each calibration batch") from e


def _is_whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
