"""What was done to every attention of a model: as data, text, JSON and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

from attnopt.base.page import Page
from attnopt.errors import ArchiveError
from attnopt.ir.cost import Cost
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import NearMiss
from attnopt.ir.spec import AttentionSpec
from attnopt.report.axis_text import told
from attnopt.report.counted import counted

Status = Literal["rewritten", "unchanged", "refused"]
STATUSES: tuple[Status, ...] = ("rewritten", "unchanged", "refused")
FORMAT = 1  # of the JSON form


@dataclass(frozen=True)
class Form:
    """What can be drawn of an attention: its heads, the K/V head that each reads, and its pattern.

    Heads have their numbers from the trained model; ``pattern`` is in the notation of ``attnopt.patterns.parse``, and
    ``selection`` describes the blocks chosen at run time, if any, ``pooling`` the heads that read pools of keys, and ``rows`` the
    queries chosen at run time.
    """

    heads: tuple[int, ...]
    kv_of_head: tuple[int, ...]
    pattern: str
    selection: str = ""
    pooling: str = ""
    rows: str = ""

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.kv_of_head):
            raise ValueError(f"{len(self.heads)} heads, of which {len(self.kv_of_head)} read keys")

    @classmethod
    def of(cls, spec: AttentionSpec) -> Self:
        selection = "" if spec.selection is None else str(spec.selection)
        pooling = "" if spec.pooling is None else str(spec.pooling)
        kv_of_head = tuple(spec.kv_heads[g] for g in spec.kv_of_head)
        rows = "" if spec.rows is None else str(spec.rows)
        return cls(spec.heads, kv_of_head, str(spec.visible_pattern), selection, pooling, rows)


@dataclass(frozen=True)
class SiteReport:
    """One attention and its outcome."""

    name: str
    status: Status
    where: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    is_cross: bool
    spec_before: str
    spec_after: str
    cost_before: Cost
    cost_after: Cost
    passes: tuple[str, ...] = ()  # those that were applied, in order
    refusals: Mapping[str, Refusal] = field(default_factory=dict)  # pass or stage -> why not
    backend: str | None = None
    error: float | None = None  # largest difference of the lowered form from the reference form, relative
    notes: tuple[str, ...] = ()
    q_len: int = 0  # L and S at the sizes of the example inputs
    kv_len: int = 0
    form_before: Form | None = None
    form_after: Form | None = None
    importance: tuple[float, ...] | None = None  # of each head of ``form_before``, if measured

    def lines(self) -> Iterable[str]:
        """The entry's text, without indentation."""
        yield _titled(self.name, self.where) + ("" if self.status == "refused" else f"   {self._fate()}")
        for stage, refusal in self.refusals.items():
            yield from _refused(f"{stage} refused", refusal, self.where)
        for note in self.notes:
            yield f"  note: {note}"

    def _fate(self) -> str:
        if self.status == "unchanged":
            return "unchanged"
        change = self.spec_before if self.spec_before == self.spec_after else f"{self.spec_before} -> {self.spec_after}"
        backend = f" on {self.backend}" if self.backend else ""
        error = "" if self.error is None else f", error {self.error:.1e}"
        return f"{', '.join(self.passes)}: {change}{backend}{error}"


@dataclass(frozen=True)
class Report(Page):
    """Every attention found, in execution order, and what was done to it."""

    sites: tuple[SiteReport, ...]
    near_misses: tuple[NearMiss, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    error: float | None = None  # largest relative difference of the whole model's output on the example inputs
    seconds: Mapping[str, float] = field(default_factory=dict)  # by stage
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    fixed_axes: tuple[str, ...] = ()  # requested axes that are static or bounded, and size constraints
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)  # of one call, "before" and "after", if measured
    notes: tuple[str, ...] = ()  # what else of the model was changed

    def count(self, status: Status) -> int:
        return sum(site.status == status for site in self.sites)

    @property
    def cost_before(self) -> Cost:
        return sum((site.cost_before for site in self.sites), Cost(0, 0, 0))

    @property
    def cost_after(self) -> Cost:
        return sum((site.cost_after for site in self.sites), Cost(0, 0, 0))

    @property
    def headline(self) -> str:
        found, rewritten = len(self.sites), self.count("rewritten")
        text = f"{counted(found, 'attention')} found, {rewritten} rewritten, {found - rewritten} left as they were"
        return text + (f", {len(self.near_misses)} not matched" if self.near_misses else "")

    def with_importance(self, scores: Mapping[str, Iterable[float]]) -> Self:
        """The same report with the head scores of each site, as returned by ``attnopt.head_importance``."""
        sites = tuple(
            replace(site, importance=tuple(map(float, scores[site.name]))) if site.name in scores else site
            for site in self.sites
        )
        return replace(self, sites=sites)

    def __str__(self) -> str:
        lines = [f"attnopt: {self.headline}"]
        for site in self.sites:
            lines += [f"  {line}" for line in site.lines()]
        for miss in self.near_misses:
            lines.append(f"  {_titled(miss.name, miss.where)}")
            lines += [f"  {line}" for line in _refused("not matched", miss.refusal, miss.where)]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  {line}" for line in told(self.fixed_axes)]
        lines += [f"  warning: {text}" for text in self.warnings]
        if self.error is not None:
            lines.append(f"  largest relative difference of the outputs on the example inputs: {self.error:.1e}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; ``Report.from_json`` reads them back."""
        return {"format": FORMAT, "headline": self.headline, **_plain(asdict(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``.  Raises ArchiveError if ``data`` is not a report."""
        try:
            return cls._read(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArchiveError(f"not an attnopt report: {type(error).__name__}: {error}") from error

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}; this version reads format {FORMAT}")
        return cls(
            sites=tuple(_site(entry) for entry in data["sites"]),
            near_misses=tuple(
                NearMiss(miss["name"], Refusal(**miss["refusal"]), miss["where"]) for miss in data["near_misses"]
            ),
            policy=dict(data["policy"]),
            error=data["error"],
            seconds=dict(data["seconds"]),
            warnings=tuple(data["warnings"]),
            versions=dict(data["versions"]),
            fixed_axes=tuple(data["fixed_axes"]),
            cpu_seconds={name: float(seconds) for name, seconds in data.get("cpu_seconds", {}).items()},
            notes=tuple(data.get("notes", ())),
        )


def _site(data: Mapping[str, Any]) -> SiteReport:
    known = {f.name for f in fields(SiteReport)}
    values = {key: value for key, value in data.items() if key in known}
    if values["status"] not in STATUSES:
        raise ValueError(f"status {values['status']!r}")
    return SiteReport(
        **{
            **values,
            "passes": tuple(values["passes"]),
            "notes": tuple(values["notes"]),
            "refusals": {stage: Refusal(**refusal) for stage, refusal in values["refusals"].items()},
            "cost_before": Cost(**values["cost_before"]),
            "cost_after": Cost(**values["cost_after"]),
            "form_before": _form(values.get("form_before")),
            "form_after": _form(values.get("form_after")),
            "importance": None if values.get("importance") is None else tuple(map(float, values["importance"])),
        }
    )


def _form(data: Mapping[str, Any] | None) -> Form | None:
    if data is None:
        return None
    heads, kv_of_head = (tuple(map(int, data[name])) for name in ("heads", "kv_of_head"))
    others = (str(data.get(name, "")) for name in ("selection", "pooling", "rows"))
    return Form(heads, kv_of_head, str(data["pattern"]), *others)


def _plain(value: object) -> Any:
    """The same with every container a dict or a list and every unknown leaf a string."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _titled(name: str, where: str) -> str:
    return f"{name or '(root)'}   {where}".rstrip()


def _refused(title: str, refusal: Refusal, where: str) -> Iterable[str]:
    parts = [
        f"expected {refusal.expected}" if refusal.expected else "",
        f"found {refusal.found}" if refusal.found else "",
    ]
    detail = ", ".join(part for part in parts if part)
    place = f" ({refusal.where})" if refusal.where and refusal.where != where else ""
    yield f"  {title} [{refusal.code}]{': ' + detail if detail else ''}{place}"
    if refusal.hint:
        yield f"    hint: {refusal.hint}"
