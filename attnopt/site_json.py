"""A site as JSON and back, for saved models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnopt.dynamic_blocks import DynamicBlocks
from attnopt.head_routes import edit_from_json
from attnopt.patterns import Pattern
from attnopt.site import Projection, Site
from attnopt.spec import AttentionSpec


def site_to_json(site: Site) -> dict[str, Any]:
    """A site as plain dicts, lists, strings and numbers."""
    spec = site.spec
    return {
        "name": site.name,
        "where": site.where,
        "notes": list(site.notes),
        "q_len": site.q_len,
        "kv_len": site.kv_len,
        "is_dynamic": site.is_dynamic,
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
        "spec": {
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
            "softcap": spec.softcap,
            "selection": None if spec.selection is None else spec.selection.to_json(),
            "gains": None if spec.gains is None else list(spec.gains),
            "is_cross": spec.is_cross,
            "seen_as": None if spec.seen_as is None else spec.seen_as.to_json(),
            "positions": list(spec.positions),
            "after": [edit.to_json() for edit in spec.after],
        },
    }


def site_from_json(data: Mapping[str, Any], live: Mapping[str, Tensor]) -> Site:
    """What ``site_to_json`` wrote, with the model's parameters ``live`` by name."""
    spec = dict(data["spec"])
    for key in ("heads", "kv_heads", "kv_of_head", "positions"):
        spec[key] = tuple(spec[key])
    spec["gains"] = None if spec["gains"] is None else tuple(spec["gains"])
    spec["pattern"] = Pattern.from_json(spec["pattern"])
    spec["seen_as"] = None if spec["seen_as"] is None else Pattern.from_json(spec["seen_as"])
    spec["selection"] = None if spec["selection"] is None else DynamicBlocks.from_json(spec["selection"])
    spec["after"] = tuple(edit_from_json(edit) for edit in spec.get("after", ()))
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
        AttentionSpec(**spec),
        projections,
        data["where"],
        tuple(data["notes"]),
        parameters=live,
        q_len=data["q_len"],
        kv_len=data["kv_len"],
        is_dynamic=data["is_dynamic"],
        alignment=data.get("alignment", "first"),
    )
