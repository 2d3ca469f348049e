"""The data of the atlas page, computed before the template: pictures, bars, and where numbers lie on their scales."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnopt.base.cells import regridded
from attnopt.render.png import data_uri
from attnopt.report.atlas import Atlas, HeadMaps

CELLS = 32  # of a side of the mean map of a cluster
HEIGHT = 20  # of the bars of a profile
PITCH = 4  # of its bars
HUES = (215, 25, 145, 330, 45, 190, 265, 0)
GOLDEN = 137.5  # degrees between the hues of further clusters


@dataclass(frozen=True)
class Bar:
    """One octave of distances: its left edge and its height in a picture, and in words."""

    x: int
    height: float
    share: float
    distances: str


@dataclass(frozen=True)
class Value:
    """One number of a head: as text, and where it lies between the least and the largest of all heads, 0 to 1."""

    text: str
    level: float


@dataclass(frozen=True)
class HeadView:
    """One head."""

    number: int  # among all heads of the page
    site: str
    label: str  # of the site
    head: int
    cluster: int
    picture: str
    bars: tuple[Bar, ...]
    place: tuple[float, float]  # in the drawing of the components
    values: Mapping[str, Value | None]
    queries: str
    keys: str

    @property
    def name(self) -> str:
        return f"{self.site}, head {self.head}"

    @property
    def hue(self) -> float:
        return hue(self.cluster)

    @property
    def levels(self) -> str:
        """Of each statistic the level, "" where there is none: what the script reads."""
        return " ".join("-" if v is None else f"{v.level:.3f}" for v in self.values.values())

    @property
    def texts(self) -> str:
        return "|".join("" if v is None else v.text for v in self.values.values())

    @property
    def summary(self) -> str:
        """What a screen reader says of the picture."""
        far = max(self.bars, key=lambda b: b.share, default=None)
        reach = f", most of its attention {far.distances} away" if far is not None else ""
        return f"{self.name}: cluster {self.cluster}{reach}"


@dataclass(frozen=True)
class ClusterView:
    """One kind of heads: what its heads do on average, and the head that is nearest to that."""

    number: int
    picture: str
    bars: tuple[Bar, ...]
    heads: tuple[HeadView, ...]
    typical: HeadView

    @property
    def hue(self) -> float:
        return hue(self.number)


@dataclass(frozen=True)
class Scale:
    """The numbers of one statistic: the least and the largest."""

    method: str
    least: str
    largest: str


@dataclass(frozen=True)
class AtlasView:
    """All heads, by attention and by cluster, and the scales of their numbers."""

    atlas: Atlas

    @cached_property
    def heads(self) -> tuple[HeadView, ...]:
        found: list[HeadView] = []
        values, places = _values(self.atlas), _placed(self.atlas)
        for site, own in self.atlas.items():
            pictures = own.maps.numpy()
            for i, head in enumerate(own.heads):
                found.append(
                    HeadView(
                        len(found), site or "(root)", label(site), head, own.clusters[i],
                        data_uri(np.sqrt(np.clip(pictures[i], 0, 1))), _bars(own, i), places[len(found)],
                        {method: of.get((site, i)) for method, of in values.items()}, _span(own.queries), _span(own.keys),
                    )
                )  # fmt: skip
        return tuple(found)

    @cached_property
    def layers(self) -> dict[str, list[HeadView]]:
        """The heads by their attention."""
        found: dict[str, list[HeadView]] = {}
        for view in self.heads:
            found.setdefault(view.site, []).append(view)
        return found

    @property
    def most(self) -> int:
        """Heads in one attention: as many stand in a row where there is room."""
        return max(len(own.heads) for own in self.atlas.values())

    @cached_property
    def clusters(self) -> tuple[ClusterView, ...]:
        maps = np.concatenate([regridded(own.maps, CELLS, CELLS).numpy() for own in self.atlas.values()])
        profiles = [_profile(own, i) for own in self.atlas.values() for i in range(len(own.heads))]
        found = []
        for number in sorted({view.cluster for view in self.heads}):
            members = [i for i, view in enumerate(self.heads) if view.cluster == number]
            mean = maps[members].mean(0)
            nearest = members[int(((maps[members] - mean) ** 2).sum((1, 2)).argmin())]
            known = [profiles[i] for i in members if profiles[i]]
            found.append(
                ClusterView(
                    number,
                    data_uri(np.sqrt(np.clip(mean, 0, 1))),
                    _bars_of(_mean(known)),
                    tuple(self.heads[i] for i in members),
                    self.heads[nearest],
                )
            )
        return tuple(found)

    @cached_property
    def scales(self) -> tuple[Scale, ...]:
        found = []
        for method, of in self.atlas.statistics.items():
            numbers = [x for row in of.values() for x in row]
            if numbers:
                found.append(Scale(method, f"{min(numbers):.3g}", f"{max(numbers):.3g}"))
        return tuple(found)


def label(site: str) -> str:
    """The part of a name that tells attentions apart: its numbers, or otherwise its last word."""
    numbers = re.findall(r"\d+", site)
    return ".".join(numbers) if numbers else (site or "(root)").rpartition(".")[2]


def hue(cluster: int) -> float:
    return HUES[cluster] if cluster < len(HUES) else cluster * GOLDEN % 360


def distances(k: int) -> str:
    """The distances of an octave, in words."""
    if k < 2:
        return f"{k} token{'s' if k == 0 else ''}"
    return f"{2 ** (k - 1)} to {2**k - 1} tokens"


def _values(atlas: Atlas) -> dict[str, dict[tuple[str, int], Value]]:
    """By statistic, and by the site and the place of a head in it."""
    found: dict[str, dict[tuple[str, int], Value]] = {}
    for method, of in atlas.statistics.items():
        numbers = [x for row in of.values() for x in row]
        if not numbers:
            continue
        low, high = min(numbers), max(numbers)
        across = high - low or 1.0
        found[method] = {
            (site, i): Value(f"{x:.3g}", (x - low) / across) for site, row in of.items() for i, x in enumerate(row)
        }
    return found


def _placed(atlas: Atlas) -> list[tuple[float, float]]:
    """The places of all heads in a drawing of 100 x 60, with a margin."""
    at = np.array([place for own in atlas.values() for place in own.places], dtype=float)
    low, high = at.min(0), at.max(0)
    across = np.where(high - low > 0, high - low, 1.0)
    x, y = ((at - low) / across).T
    return [(round(4 + 92 * a, 2), round(56 - 52 * b, 2)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _profile(own: HeadMaps, i: int) -> tuple[float, ...]:
    return () if own.profile is None else own.profile.values[i]


def _bars(own: HeadMaps, i: int) -> tuple[Bar, ...]:
    return _bars_of(_profile(own, i))


def _bars_of(shares: Sequence[float]) -> tuple[Bar, ...]:
    most = max(shares, default=0.0) or 1.0
    return tuple(Bar(k * PITCH, round(HEIGHT * s / most, 1), s, distances(k)) for k, s in enumerate(shares))


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    longest = max(map(len, rows), default=0)
    padded: NDArray[np.float64] = np.zeros((len(rows), longest))
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return tuple(padded.mean(0).tolist()) if rows else ()


def _span(lengths: tuple[int, int]) -> str:
    least, most = lengths
    return str(most) if least == most else f"{least} to {most}"
