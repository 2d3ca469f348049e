"""A site, and the spec of one attention call, as JSON and back, for saved models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from attnopt.base.registry import OURS, Registry, distribution_of, target_of
from attnopt.errors import ArchiveError, AttnoptError
from attnopt.ir.call_segments import CallSegments
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.edit_registry import HEAD_EDITS, edit_from_json
from attnopt.ir.extended_keys import ExtendedKeys
from attnopt.ir.linear_weights import LinearWeights
from attnopt.ir.mixer_registry import MIXERS
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.projection import Projection
from attnopt.ir.query_rows import ChosenRows
from attnopt.ir.score_registry import ROW_SCORES, SCORES
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.token_mixing import TokenMixing
from attnopt.ir.transplants import Transplanted
from attnopt.ir.weight_gains import WeightGains
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.patterns import Pattern, parse
from attnopt.patterns.registry import PATTERNS, is_readable


def site_to_json(site: Site) -> dict[str, object]:
    """A site as plain dicts, lists, strings and numbers.  Raises ArchiveError if load() could not find one of its classes."""
    return {
        "plugins": _plugins(site),
        "name": site.name,
        "where": site.where,
        "notes": list(site.notes),
        "q_len": site.q_len,
        "kv_len": site.kv_len,
        "is_dynamic": site.is_dynamic,
        "bias_hides": site.bias_hides,
        "kv_step": site.kv_step,
        "alignment": site.alignment,
        "projections": {
            role: {
                "weight": p.weight,
                "bias": p.bias,
                "transposed": p.transposed,
                "why": p.why,
                "direct": p.direct,
                "rows": None if p.rows is None else [list(r) for r in p.rows],
            }
            for role, p in site.projections.items()
        },
        "spec": spec_to_json(site.spec),
    }


def site_from_json(data: Mapping[str, Any], live: Mapping[str, Tensor]) -> Site:
    """What ``site_to_json`` wrote, with the model's parameters ``live`` by name.

    Its classes are those that are installed or registered by their names; ArchiveError names one that is not.
    """
    _require(data)
    projections = {
        role: Projection(
            p["weight"],
            p["bias"],
            p["transposed"],
            None if p["rows"] is None else tuple(tuple(r) for r in p["rows"]),
            p["why"],
            p.get("direct", True),
        )
        for role, p in data["projections"].items()
    }
    return Site(
        data["name"],
        spec_from_json(data["spec"]),
        projections,
        data["where"],
        tuple(data["notes"]),
        parameters=live,
        q_len=data["q_len"],
        kv_len=data["kv_len"],
        is_dynamic=data["is_dynamic"],
        bias_hides=data.get("bias_hides", False),
        kv_step=data.get("kv_step", int(data["is_dynamic"])),
        alignment=data.get("alignment", "first"),
    )


def spec_to_json(spec: AttentionSpec) -> dict[str, object]:
    return {
        "heads": list(spec.heads),
        "kv_heads": list(spec.kv_heads),
        "kv_of_head": list(spec.kv_of_head),
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        "scale": spec.scale,
        "pattern": spec.pattern.to_json(),
        "has_bias": spec.has_bias,
        "has_mask": spec.has_mask,
        "has_sinks": spec.has_sinks,
        "has_map": spec.has_map,
        "has_score_map": spec.has_score_map,
        "has_weight_map": spec.has_weight_map,
        "softcap": spec.softcap,
        "linear": None if spec.linear is None else spec.linear.to_json(),
        "sends": spec.sends,
        "clamp": None if spec.clamp is None else list(spec.clamp),
        "selection": None if spec.selection is None else spec.selection.to_json(),
        "segments": None if spec.segments is None else spec.segments.to_json(),
        "pooling": None if spec.pooling is None else spec.pooling.to_json(),
        "rows": None if spec.rows is None else spec.rows.to_json(),
        "between_channels": spec.between_channels,
        "is_cross": spec.is_cross,
        "seen_as": None if spec.seen_as is None else spec.seen_as.to_json(),
        "zero_keys": None if spec.zero_keys is None else spec.zero_keys.to_json(),
        "extension": None if spec.extension is None else spec.extension.to_json(),
        "weight_gains": None if spec.weight_gains is None else spec.weight_gains.to_json(),
        "positions": list(spec.positions),
        "before": [moved.to_json() for moved in spec.before],
        "after": [edit.to_json() for edit in spec.after],
    }


def spec_from_json(data: Mapping[str, Any]) -> AttentionSpec:
    spec = dict(data)
    for key in ("heads", "kv_heads", "kv_of_head", "positions"):
        spec[key] = tuple(spec[key])
    spec["pattern"] = parse(spec["pattern"])
    spec["seen_as"] = None if spec["seen_as"] is None else parse(spec["seen_as"])
    spec["selection"] = None if spec["selection"] is None else DynamicBlocks.from_json(spec["selection"])
    spec["linear"] = None if spec.get("linear") is None else LinearWeights.from_json(spec["linear"])
    spec["clamp"] = None if spec.get("clamp") is None else tuple(spec["clamp"])
    spec["segments"] = None if spec.get("segments") is None else CallSegments.from_json(spec["segments"])
    spec["pooling"] = None if spec.get("pooling") is None else PooledKeys.from_json(spec["pooling"])
    spec["rows"] = None if spec.get("rows") is None else ChosenRows.from_json(spec["rows"])
    spec["zero_keys"] = None if spec["zero_keys"] is None else ZeroKeys.from_json(spec["zero_keys"])
    spec["extension"] = None if spec.get("extension") is None else ExtendedKeys.from_json(spec["extension"])
    spec["weight_gains"] = None if spec["weight_gains"] is None else WeightGains.from_json(spec["weight_gains"])
    spec["before"] = tuple(Transplanted.from_json(moved) for moved in spec.get("before", ()))
    spec["after"] = tuple(edit_from_json(edit) for edit in spec.get("after", ()))
    return AttentionSpec(**spec)


_KINDS: tuple[Registry[Any], ...] = (PATTERNS, HEAD_EDITS, MIXERS, SCORES, ROW_SCORES)


def _plugins(site: Site) -> list[dict[str, str]]:
    """Kind, name and distribution of each class that is not attnopt's own."""
    found: list[dict[str, str]] = []
    for kind, thing in _things(site.spec):
        cls = type(thing)
        if not kind.knows(cls):
            raise ArchiveError(
                f"cannot save: {kind.kind} {thing} is an instance of {target_of(cls)}, which load() cannot find by name",
                site=site.name,
                hint="decorate the class with @attnopt.register, or declare it as an entry point",
            )
        if (distribution := distribution_of(cls)) != OURS:
            found.append({"kind": kind.kind, "name": kind.name_of(cls), "distribution": distribution or target_of(cls)})
    if not all(map(is_readable, _patterns(site.spec))):
        raise ArchiveError(
            f"cannot save: attnopt.patterns.parse does not reproduce pattern {site.spec.pattern} from its text",
            site=site.name,
            hint="make repr() of the pattern return the call that constructs it",
        )
    return found


def _require(data: Mapping[str, Any]) -> None:
    for entry in data.get("plugins", ()):
        kind = next(k for k in _KINDS if k.kind == entry["kind"])
        try:
            kind.load(entry["name"])
        except AttnoptError as e:
            raise ArchiveError(
                f"the saved model needs {entry['kind']} {entry['name']!r} of {entry['distribution']}: {e.message}",
                site=data["name"],
                hint=f"install {entry['distribution']}, or import the module that registers it, and load again",
            ) from e


def _things(spec: AttentionSpec) -> Iterator[tuple[Registry[Any], object]]:
    for pattern in _patterns(spec):
        yield from ((PATTERNS, p) for p in pattern.leaves())
    yield from ((HEAD_EDITS, edit) for edit in spec.after)
    yield from ((MIXERS, edit.mixer) for edit in spec.after if isinstance(edit, TokenMixing))
    if spec.selection is not None:
        yield SCORES, spec.selection.scores
    if spec.rows is not None:
        yield ROW_SCORES, spec.rows.scores


def _patterns(spec: AttentionSpec) -> list[Pattern]:
    of_gains = (
        [] if spec.weight_gains is None else [*(p.pattern for p in spec.weight_gains.parts), spec.weight_gains.to]
    )
    of_zeros = None if spec.zero_keys is None else spec.zero_keys.pattern
    return [p for p in (spec.pattern, spec.seen_as, of_zeros, *of_gains) if p is not None]
