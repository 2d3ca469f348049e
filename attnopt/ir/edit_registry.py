"""Edits of head outputs, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnopt.base.registry import Registry
from attnopt.ir.call_gains import ScaledByCall
from attnopt.ir.head_additions import Shifted, ValuesAdded
from attnopt.ir.head_edits import HeadEdit, Replaced, Scaled, TowardValues
from attnopt.ir.head_routing import Routed
from attnopt.ir.mixed_maps import Mixed
from attnopt.ir.token_mixing import TokenMixing

_OURS = (Scaled, ScaledByCall, TowardValues, Replaced, Shifted, ValuesAdded, Mixed, Routed, TokenMixing)
HEAD_EDITS = Registry(
    "attnopt.head_edits",
    "head edit",
    HeadEdit,  # type: ignore[type-abstract]
    {edit.kind: edit for edit in _OURS},
    lambda cls: getattr(cls, "kind", None),
)


def edit_from_json(data: Mapping[str, Any]) -> HeadEdit:
    """The edit that its ``to_json`` wrote.  Raises PolicyError for an unknown kind."""
    return HEAD_EDITS.load(data["kind"]).from_json(data)
