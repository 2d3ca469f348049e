"""The ways to choose the key/value heads that become one, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from attnopt.base.options import whole
from attnopt.base.registry import Registry
from attnopt.errors import PolicyError
from attnopt.fit.kv_search import adjacent, agglomerated, optimal, queries_by_norm
from attnopt.fit.merge_methods import Mean
from attnopt.ir.blame import blamed, fault
from attnopt.ir.kv_partition import Group, KvPartition, Loss
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

KIND = "KV partition"


@dataclass(frozen=True)
class Adjacent(KvPartition):
    """Runs of neighbours, as many heads in each; without ``even``, as equal in size as can be."""

    name: ClassVar[str] = "adjacent"
    even: bool = True

    def fits(self, heads: int, count: int) -> bool:
        return count <= heads and not (self.even and heads % count)

    def groups(self, site: Site, count: int, loss: Loss) -> Sequence[Group]:
        return _named(site, adjacent(site.num_kv_heads, count))

    def choices(self, site: Site, counts: Sequence[int], loss: Loss) -> Mapping[int, Sequence[Group]]:
        return {n: self.groups(site, n, loss) for n in counts}  # under a common budget, also uneven runs


@dataclass(frozen=True)
class Similarity(KvPartition):
    """The two groups whose union costs least are joined, again and again."""

    name: ClassVar[str] = "similarity"
    needs_loss: ClassVar[bool] = True

    def groups(self, site: Site, count: int, loss: Loss) -> Sequence[Group]:
        return self.choices(site, (count,), loss)[count]

    def choices(self, site: Site, counts: Sequence[int], loss: Loss) -> Mapping[int, Sequence[Group]]:
        joined = agglomerated(site.num_kv_heads, _of_places(site, loss))
        return {n: _named(site, joined[n]) for n in counts}


@dataclass(frozen=True)
class KeyNorm(Adjacent):
    """Runs of neighbours, with more queries for larger keys (KDGQA, arXiv:2408.08454)."""

    name: ClassVar[str] = "key-norm"
    moves_queries: ClassVar[bool] = True

    def readers(self, site: Site, groups: Sequence[Group]) -> Sequence[int]:
        counts = queries_by_norm([_key_norm(site, group) for group in groups], site.num_heads)
        return tuple(g for g, n in enumerate(counts) for _ in range(n))


@dataclass(frozen=True)
class Optimal(KvPartition):
    """The partition with the least loss."""

    name: ClassVar[str] = "optimal"
    needs_loss: ClassVar[bool] = True

    def groups(self, site: Site, count: int, loss: Loss) -> Sequence[Group]:
        return self.choices(site, (count,), loss)[count]

    def choices(self, site: Site, counts: Sequence[int], loss: Loss) -> Mapping[int, Sequence[Group]]:
        found = optimal(site.num_kv_heads, _of_places(site, loss), counts)
        return {n: _named(site, groups) for n, groups in found.items()}


@dataclass(frozen=True)
class ByNumber(KvPartition):
    """The group number of each head that there is: 0 to ``kv_heads`` - 1, each of them used."""

    name: ClassVar[str] = "given"
    numbers: tuple[int, ...]

    @staticmethod
    def read(owner: str, given: object, count: int) -> tuple[int, ...]:
        """The numbers, as an option gives them.  Raises PolicyError."""
        if not isinstance(given, (list, tuple)):
            known = tuple(KV_PARTITIONS.listed())
            raise PolicyError(f"{owner}: invalid value grouping={given!r}: expected one of {known} or numbers")
        numbers = tuple(whole(owner, "grouping", g) for g in given)
        if len(set(numbers)) != count or max(numbers) >= count:
            raise PolicyError(
                f"{owner}: invalid value grouping={given!r}: expected one group per head, "
                f"numbered 0 to {count - 1}, with every group used"
            )
        return numbers

    def check(self, site: Site) -> Refusal | None:
        heads, given = site.num_kv_heads, len(self.numbers)
        if given == heads:
            return None
        expected = f"one group per head ({heads})"
        return site.refuse("kv-heads-do-not-fit", expected=expected, found=f"{given} numbers")

    def groups(self, site: Site, count: int, loss: Loss) -> Sequence[Group]:
        heads = list(zip(site.spec.kv_heads, self.numbers, strict=True))
        return tuple(tuple(h for h, n in heads if n == g) for g in range(count))

    def choices(self, site: Site, counts: Sequence[int], loss: Loss) -> Mapping[int, Sequence[Group]]:
        own = len(set(self.numbers))
        return {own: self.groups(site, own, loss)}


KV_PARTITIONS = Registry(
    "attnopt.kv_partitions",
    KIND,
    KvPartition,  # type: ignore[type-abstract]
    {kind.name: kind for kind in (Adjacent, Similarity, KeyNorm, Optimal)},
    lambda cls: getattr(cls, "name", None),
)


def fitting_counts(how: KvPartition, site: Site) -> list[int]:
    """The numbers of groups that the key/value heads can become.  Raises PluginError."""
    with blamed(how, KIND, "fits", site.name):
        return [n for n in range(1, site.num_kv_heads + 1) if how.fits(site.num_kv_heads, n)]


def partitions(how: KvPartition, site: Site, counts: Sequence[int], loss: Loss) -> dict[int, tuple[Group, ...]]:
    """The groups for each of ``counts`` for which there are some.  Raises PluginError."""
    with blamed(how, KIND, "groups", site.name):
        found = {n: tuple(tuple(group) for group in groups) for n, groups in how.choices(site, counts, loss).items()}
    for count, groups in found.items():
        heads = [h for group in groups for h in group]
        if len(groups) != count or not all(groups) or sorted(heads, key=repr) != sorted(site.spec.kv_heads, key=repr):
            wanted = f"{count} groups with each of the key/value heads {site.spec.kv_heads} in one"
            raise fault(how, KIND, f"groups gave {groups}, expected {wanted}", site.name)
    return found


def groups_of(how: KvPartition, site: Site, count: int, loss: Loss) -> tuple[Group, ...]:
    """``count`` groups.  Raises PluginError."""
    found = partitions(how, site, [count], loss)
    if count not in found:
        raise fault(how, KIND, f"choices gave {[*found]} groups, expected {count}", site.name)
    return found[count]


def merged_spec(how: KvPartition, site: Site, groups: Sequence[Group]) -> AttentionSpec:
    """The spec with one key/value head for each group.  Raises PluginError."""
    with blamed(how, KIND, "readers", site.name):
        readers = how.readers(site, groups)
    spec = site.spec.merging(groups)
    if readers is None:
        return spec
    if len(readers) != site.num_heads or {*readers} != {*range(len(groups))}:
        wanted = f"for each of {site.num_heads} heads one of {len(groups)} groups, each of them read"
        raise fault(how, KIND, f"readers gave {readers}, expected {wanted}", site.name)
    return spec.reading(readers)


def _named(site: Site, groups: Sequence[Sequence[int]]) -> tuple[Group, ...]:
    """Groups of places, by the numbers of their heads."""
    return tuple(tuple(site.spec.kv_heads[place] for place in group) for group in groups)


def _of_places(site: Site, loss: Loss) -> Loss:
    return lambda groups: loss(_named(site, groups))


def _key_norm(site: Site, group: Group) -> float:
    mean: Any = Mean().merge(site, "k", group)
    return float(mean.weight.double().norm())
