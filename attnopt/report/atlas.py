"""What every head of a model does, in one view: mean maps, locality, kinds of heads and numbers of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from attnopt.base.display import shown
from attnopt.base.page import Page
from attnopt.errors import ArchiveError
from attnopt.ir.curves import Curves
from attnopt.report.counted import counted

FORMAT = 1  # of the JSON form
DIGITS = 6  # of a weight in it


@dataclass(frozen=True)
class HeadMaps:
    """The heads of one attention.

    ``maps`` [H, R, C]: the mean over sequences of the attention of each of R runs of queries to each of C runs of keys, of
    the whole sequence: rows sum to 1, or to what sinks leave.  Sequences of one length have a row for each query and a column
    for each key, up to the number of cells that was asked for.  ``queries``, ``keys``: the least and the largest number of
    tokens of a sequence, without padding.
    ``profile``: the share of the attention at each distance, in octaves: 0, 1, 2 to 3, 4 to 7 tokens and so on; None where
    queries and keys have no distance.
    ``clusters``: the kind of each head, 0 the largest; ``places``: where it lies on the first two principal components.
    """

    heads: tuple[int, ...]
    maps: Tensor
    queries: tuple[int, int]
    keys: tuple[int, int]
    profile: Curves | None
    clusters: tuple[int, ...]
    places: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Missing:
    """What the atlas does not have: ``of``, "map", "profile" or a statistic, of one attention, and why."""

    site: str
    of: str
    why: str


@dataclass(frozen=True)
class Atlas(Page, Mapping[str, HeadMaps]):
    """``atlas["layers.0"].maps``: the heads of each attention by its name, in the order in which they run.

    ``statistics``: by their names the numbers of the heads of each attention.  ``missing``: what could not be measured.
    ``sequences``: how many the maps are means of.  Prints as a table.
    """

    sites: Mapping[str, HeadMaps]
    statistics: Mapping[str, Mapping[str, tuple[float, ...]]]
    missing: tuple[Missing, ...] = ()
    sequences: int = 0

    def __getitem__(self, site: str) -> HeadMaps:
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def headline(self) -> str:
        heads = sum(len(found.heads) for found in self.values())
        return (
            f"{counted(heads, 'head')} of {counted(len(self), 'attention')}, on {counted(self.sequences, 'sequence')}"
        )

    def kinds(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """The heads of each cluster: (site, number of the head)."""
        found: dict[int, list[tuple[str, int]]] = {}
        for site, own in self.items():
            for head, cluster in zip(own.heads, own.clusters, strict=True):
                found.setdefault(cluster, []).append((site, head))
        return {cluster: tuple(found[cluster]) for cluster in sorted(found)}

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; ``Atlas.from_json`` reads them back."""
        return {
            "format": FORMAT,
            "sequences": self.sequences,
            "sites": {name: _plain(found) for name, found in self.items()},
            "statistics": {
                method: {site: list(numbers) for site, numbers in of.items()} for method, of in self.statistics.items()
            },
            "missing": [{"site": m.site, "of": m.of, "why": m.why} for m in self.missing],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``, with maps rounded to its digits.  Raises ArchiveError if ``data`` is not an atlas."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}; this version reads format {FORMAT}")
            sites = {str(name): _read(found) for name, found in data["sites"].items()}
            statistics = {
                str(method): {str(site): tuple(map(float, numbers)) for site, numbers in of.items()}
                for method, of in data["statistics"].items()
            }
            for of in statistics.values():
                for site, numbers in of.items():
                    _require(len(numbers) == len(sites[site].heads), f"{len(numbers)} numbers for the heads of {site}")
            missing = tuple(Missing(str(m["site"]), str(m["of"]), str(m["why"])) for m in data["missing"])
            return cls(sites, statistics, missing, int(data["sequences"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArchiveError(f"not an attnopt atlas: {type(error).__name__}: {error}") from error


def _plain(found: HeadMaps) -> dict[str, Any]:
    return {
        "heads": list(found.heads),
        "maps": [[[round(x, DIGITS) for x in row] for row in rows] for rows in found.maps.tolist()],
        "queries": list(found.queries),
        "keys": list(found.keys),
        "profile": None if found.profile is None else found.profile.to_json(),
        "clusters": list(found.clusters),
        "places": [list(place) for place in found.places],
    }


def _read(data: Mapping[str, Any]) -> HeadMaps:
    heads = tuple(map(int, data["heads"]))
    maps = torch.tensor(data["maps"], dtype=torch.float32)
    clusters = tuple(map(int, data["clusters"]))
    places = tuple((float(x), float(y)) for x, y in data["places"])
    profile = data["profile"]
    curves = None
    if profile is not None:
        rows = tuple(tuple(map(float, row)) for row in profile["values"])
        curves = Curves(str(profile["axis"]), tuple(map(float, profile["at"])), rows)
    _require(maps.dim() == 3 and bool(torch.isfinite(maps).all()), "maps that are none")
    counts = {len(heads), len(maps), len(clusters), len(places), len(heads if curves is None else curves.values)}
    _require(len(counts) == 1, f"{len(heads)} heads with numbers of others")
    return HeadMaps(heads, maps, _pair(data["queries"]), _pair(data["keys"]), curves, clusters, places)


def _pair(data: Any) -> tuple[int, int]:
    least, most = data
    return int(least), int(most)


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
