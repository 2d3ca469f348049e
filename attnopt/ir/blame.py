"""Plugin faults as errors that name the plugin and its distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from attnopt.base.registry import OURS, distribution_of, target_of
from attnopt.base.sizes import hint
from attnopt.errors import AttnoptError, PluginError
from attnopt.ir.head_edits import HeadEdit
from attnopt.ir.spec import AttentionSpec


def applied(
    e: HeadEdit,
    spec: AttentionSpec,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    **masks: Tensor | None,
) -> Tensor:
    """``o`` after the edit; ``masks``: the operands ``mask`` and ``bias``.  Raises PluginError without the site."""
    read = {**({"k": k} if e.reads_keys else {}), **(masks if e.reads_masks else {})}
    with blamed(e, "head edit", "apply"):
        made = e.apply(spec, o, q, v, tensors, **read)
    check_output(e, "head edit", made, tuple(o.shape), o.dtype)
    return made


def is_ours(plugin: object) -> bool:
    return type(plugin).__module__.partition(".")[0] == OURS


def told(plugin: object, kind: str) -> str:
    """Description of a plugin: "pass 'acme.last-k' of acme-attnopt (acme_attnopt:LastK)"."""
    cls = type(plugin)
    name = next((n for n in (getattr(plugin, "name", None), getattr(plugin, "kind", None)) if n), cls.__name__)
    distribution = distribution_of(cls)
    return f"{kind} {name!r}{' of ' + distribution if distribution else ''} ({target_of(cls)})"


def fault(plugin: object, kind: str, what: str, site: str | None = None) -> PluginError:
    remedy = "report the model" if is_ours(plugin) else f"fix the {kind}"
    return PluginError(
        f"{told(plugin, kind)}: {what}", hint=f"exclude the site from the policy, and {remedy}", site=site
    )


def check_output(plugin: object, kind: str, o: object, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    wanted = list(map(hint, sizes))
    if not isinstance(o, Tensor):
        raise fault(plugin, kind, f"it returned {type(o).__name__}, expected a tensor {wanted}")
    got = list(map(hint, o.shape))
    if got != wanted or o.dtype != dtype:
        raise fault(plugin, kind, f"it returned {got} in {o.dtype}, expected {wanted} in {dtype}")


@contextmanager
def blamed(plugin: object, kind: str, method: str, site: str | None = None) -> Iterator[None]:
    """Wrap faults of third-party plugins in a PluginError; attnopt's own errors and faults pass through."""
    try:
        yield
    except AttnoptError:
        raise
    except Exception as e:
        if is_ours(plugin):
            raise
        raise fault(plugin, kind, f"{method} failed: {type(e).__name__}: {e}", site) from e
