"""What a rewritten model should compute, found without attnopt: the original model is run with its softmaxes replaced.

Each normaliser that the model runs is counted; for the sites that the caller names, scores get a mask before it and
probabilities get gains after it.  Nothing here knows how attnopt works or what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.patterns import Pattern  # only its meaning, ``mask``, which test_algebra holds to plain Python

LIMITS = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Edit:
    """``visible``: bool [L, S] or [H, L, S], False hides a key; ``gains``: one factor for each head's output; ``own``: how far
    each head's map goes to the identity; ``raised``: how much each head's map grows where ``shown``, bool [L, S] or [B, 1, L, S];
    ``used``: [B, H, L], or what makes it then, 1 where a query's output is not zero;
    ``weights``: any other change of the map, [..., L, S], with the column of a sink last;
    ``zeros``: bool [L, P], which of P keys and values of zeros a query sees beside its own, at a score of 0;
    ``pools``: [S, S] or [H, S, S], in each row the weights of the keys whose mean takes the place of a key.
    Scores are then linear in the keys, and a key counts as much as it weighs in its own row."""

    visible: Tensor | None = None
    gains: tuple[float, ...] | None = None
    own: tuple[float, ...] | None = None
    raised: tuple[float, ...] | None = None
    shown: Tensor | None = None
    used: Tensor | Callable[[], Tensor] | None = None
    weights: Callable[[Tensor], Tensor] | None = None
    pools: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def is_mask(self) -> bool:
        edits = (self.gains, self.own, self.raised, self.used, self.weights, self.pools, self.zeros)
        return all(x is None for x in edits)


Edits = Mapping[int, Edit] | Callable[[int, tuple[int, ...]], "Edit | None"]


class _Counter:
    """Counts normalisers, and applies the edits to their scores and weights."""

    def __init__(self, edits: Edits, heads: int | None, exponentials: bool) -> None:
        self.edits, self.heads, self.exponentials = edits, heads, exponentials
        self.seen, self.inside = 0, False
        self.pending: list[Edit | None] = []

    def take(self, scores: Tensor) -> Edit | None:
        number, self.seen = self.seen, self.seen + 1
        if callable(self.edits):
            return self.edits(number, tuple(scores.shape))
        return self.edits.get(number)


def _per_head(x: Tensor, ndim: int, heads: int | None, shape: tuple[int, ...]) -> Tensor:
    """A [H, ...] tensor brought to the leading axes of scores: [B, H, ..], [B*H, ..], [B, G, r, ..], [B, H, windows, ..] or
    [B, windows, H, ..]."""
    if ndim == 4:
        return x.unsqueeze(0)
    if ndim == 5:
        if x.shape[0] == shape[1] != shape[2]:
            return x[None, :, None]
        grouped = x.shape[0] == shape[1] * shape[2]
        return x.reshape(1, shape[1], shape[2], *x.shape[1:]) if grouped else x[None, None]
    if ndim == 3 and heads is not None:
        return x.repeat(shape[0] // heads, *(1 for _ in x.shape[1:]))
    raise AssertionError(f"the oracle does not know where the heads of {shape} are")


def _means(scores: Tensor, pools: Tensor, heads: int | None) -> Tensor:
    """``Edit.pools`` where the heads of ``scores`` are; a sink's column stays as it is."""
    missing = scores.shape[-1] - pools.shape[-1]
    if missing:
        pools = F.pad(pools, (0, missing, 0, missing)) + torch.diag(torch.arange(scores.shape[-1]) >= pools.shape[-1])
    pools = pools.to(scores.dtype)
    return _per_head(pools, scores.dim(), heads, tuple(scores.shape)) if pools.dim() == 3 else pools


def _hidden(scores: Tensor, axis: int, edit: Edit | None, heads: int | None) -> Tensor:
    if edit is None:
        return scores
    axis %= scores.dim()
    if edit.pools is not None:
        assert axis == scores.dim() - 1, "the oracle pools only the last axis"
        means = _means(scores, edit.pools, heads)
        scores = scores @ means.mT + means.diagonal(dim1=-2, dim2=-1).log().unsqueeze(-2)
    if edit.visible is None:
        return scores
    visible = edit.visible
    missing = scores.shape[axis] - visible.shape[-1]  # a sink's column stays visible
    if missing:
        visible = F.pad(visible, (0, missing), value=True)
    if visible.dim() == 3:
        visible = _per_head(visible, scores.dim(), heads, tuple(scores.shape))
    if axis == scores.dim() - 2:
        visible = visible.transpose(-1, -2)
    return torch.where(visible, scores, -torch.inf)


def _joined_by_zeros(scores: Tensor, axis: int, edit: Edit | None) -> Tensor:
    """With a column for each zero key, which ``_without_zeros`` takes away from the weights."""
    if edit is None or edit.zeros is None:
        return scores
    columns = torch.zeros(edit.zeros.shape, dtype=scores.dtype).masked_fill(~edit.zeros, -torch.inf)
    if axis % scores.dim() == scores.dim() - 2:
        columns = columns.T
    return torch.cat([scores, columns.expand(*scores.shape[:-2], *columns.shape)], axis)


def _without_zeros(weights: Tensor, axis: int, edit: Edit | None) -> Tensor:
    if edit is None or edit.zeros is None:
        return weights
    return weights.narrow(axis, 0, weights.shape[axis] - edit.zeros.shape[1])


def _weighed(weights: Tensor, edit: Edit | None, heads: int | None, axis: int = -1) -> Tensor:
    """Attention weights after the edits of their maps."""
    if edit is None:
        return weights

    def column(values: tuple[float, ...]) -> Tensor:
        found = torch.tensor(values, dtype=weights.dtype)[:, None, None]
        return _per_head(found, weights.dim(), heads, tuple(weights.shape))

    if edit.weights is not None:
        weights = edit.weights(weights.transpose(axis, -1)).transpose(axis, -1)
    if edit.pools is not None:
        weights = weights @ _means(weights, edit.pools, heads)
    if edit.own is not None:
        u = column(edit.own)
        weights = (1 - u) * weights + u * torch.eye(*weights.shape[-2:], dtype=weights.dtype)
    if edit.raised is not None:
        assert edit.shown is not None
        shown = edit.shown if axis % weights.dim() == weights.dim() - 1 else edit.shown.transpose(-1, -2)
        columns = weights.shape[axis] - edit.shown.shape[-1]  # a sink's column stays as it is
        weights = weights + column(edit.raised) * F.pad(shown, (0, columns)).to(weights.dtype)
    if edit.used is not None:
        used = edit.used if isinstance(edit.used, Tensor) else edit.used()
        assert used.shape == weights.shape[:3], "the oracle routes only scores [B, H, L, S]"
        weights = weights * used.unsqueeze(-1)
    return weights if edit.gains is None else weights * column(edit.gains)


@contextmanager
def edited(edits: Edits, *, heads: int | None = None, exponentials: bool = False) -> Iterator[_Counter]:
    """Inside, every normaliser of at least three axes is counted from 0 and edited.

    ``heads`` is needed where scores are [B*H, L, S].  ``exponentials``: the model writes its softmax by hand with
    ``exp``; only masks can be applied there, gains are an AssertionError.
    """
    counter = _Counter(edits, heads, exponentials)
    softmax, log_softmax, exp = torch.Tensor.softmax, torch.Tensor.log_softmax, torch.Tensor.exp
    exp2, logsumexp = torch.Tensor.exp2, torch.Tensor.logsumexp

    def weights_of(x: Tensor, dim: int, dtype: torch.dtype | None = None, safe: bool = False) -> Tensor:
        edit = counter.take(x)
        # Edited weights may be those that single precision rounds to zero.
        wide = dtype if edit is None else torch.float64
        weights = softmax(_joined_by_zeros(_hidden(x, dim, edit, heads), dim, edit), dim, wide)
        weights = weights.nan_to_num(0.0) if safe else weights
        return _weighed(_without_zeros(weights, dim, edit), edit, heads, dim).to(x.dtype if dtype is None else dtype)

    def on_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, _stacklevel: int = 3, **_: Any) -> Tensor:
        if counter.inside or x.dim() < 3:
            return softmax(x, dim, dtype)
        return weights_of(x, dim, dtype)

    def on_safe_softmax(x: Tensor, dim: int) -> Tensor:  # of flex_attention
        return weights_of(x, dim, safe=True)

    def on_log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, _stacklevel: int = 3, **_: Any) -> Tensor:
        if x.dim() < 3:
            return log_softmax(x, dim, dtype)
        edit = counter.take(x)
        assert edit is None or edit.is_mask
        counter.inside = True
        return log_softmax(_hidden(x, dim, edit, heads), dim, dtype)

    def on_power(power: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def replaced(x: Tensor) -> Tensor:
            if not exponentials or x.dim() < 3 or counter.inside:
                counter.inside = False
                return power(x)
            edit = counter.pending.pop() if counter.pending else counter.take(x)
            assert edit is None or edit.is_mask
            return power(_hidden(x, -1, edit, heads))

        return replaced

    on_exp, on_exp2 = on_power(exp), on_power(exp2)

    def on_logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
        if not exponentials or x.dim() < 3:
            return logsumexp(x, dim, keepdim)
        counter.pending.append(counter.take(x))  # the ``exp`` that follows belongs to it
        return logsumexp(_hidden(x, dim, counter.pending[-1], heads), dim, keepdim)

    def on_sdpa(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert dropout_p == 0
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return weights_of(scores, -1, safe=True).to(v.dtype) @ v

    patches = (
        mock.patch.object(torch, "softmax", on_softmax),
        mock.patch.object(torch.Tensor, "softmax", on_softmax),
        mock.patch.object(F, "softmax", on_softmax),
        mock.patch.object(torch, "log_softmax", on_log_softmax),
        mock.patch.object(torch.Tensor, "log_softmax", on_log_softmax),
        mock.patch.object(F, "log_softmax", on_log_softmax),
        mock.patch.object(torch, "logsumexp", on_logsumexp),
        mock.patch.object(torch.Tensor, "logsumexp", on_logsumexp),
        mock.patch.object(torch, "exp", on_exp),
        mock.patch.object(torch.Tensor, "exp", on_exp),
        mock.patch.object(torch, "exp2", on_exp2),
        mock.patch.object(torch.Tensor, "exp2", on_exp2),
        mock.patch.object(F, "scaled_dot_product_attention", on_sdpa),
        mock.patch.object(torch, "_safe_softmax", on_safe_softmax),
    )
    for patch in patches:
        patch.start()
    try:
        yield counter
    finally:
        for patch in patches:
            patch.stop()


def run(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """Every tensor of the model's output, in order."""
    with torch.no_grad():
        return leaves(model(*args, **dict(kwargs or {})))


def run_edited(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, edits: Edits, **options: Any
) -> list[Tensor]:
    """As ``run``, with edited attentions; an edit of a site that never ran is an AssertionError."""
    with edited(edits, **options) as counter:
        out = run(model, args, kwargs)
    if not callable(edits):
        assert all(site < counter.seen for site in edits), f"only {counter.seen} normalisers ran"
    return out


def normalisers(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, **options: Any
) -> int:
    """How many normalisers the model runs."""
    with edited({}, **options) as counter:
        run(model, args, kwargs)
    return counter.seen


def leaves(output: Any) -> list[Tensor]:
    """Tensors inside dicts, dataclasses, tuples and lists, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for item in output.values() for t in leaves(item)]
    if isinstance(output, (tuple, list)):
        return [t for item in output for t in leaves(item)]
    if hasattr(output, "__dataclass_fields__"):
        return [t for name in output.__dataclass_fields__ for t in leaves(getattr(output, name))]
    return []


def visible(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> Tensor:
    """The pattern's meaning, [1, L, S] or [H, L, S]."""
    mask = pattern.mask(q_len, kv_len, num_heads=heads)
    return mask if mask.shape[0] > 1 else mask[0]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest number but at least to 1; NaN must meet NaN."""
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in want]:
        return float("inf")
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        g, w = g.detach().double(), w.detach().double()
        seen = torch.isfinite(w)
        if not torch.equal(torch.isfinite(g), seen) or not torch.equal(
            g[~seen].nan_to_num(0.5), w[~seen].nan_to_num(0.5)
        ):
            return float("inf")
        if seen.any():
            worst = max(worst, float((g[seen] - w[seen]).abs().max()) / max(1.0, float(w[seen].abs().max())))
    return worst


def assert_same(got: list[Tensor], want: list[Tensor], what: str = "", limit: float | None = None) -> None:
    assert want, "there is nothing to compare"
    if limit is None:
        limit = max(LIMITS[t.dtype] for t in want if t.is_floating_point())
    error = distance(got, want)
    assert error <= limit, f"{what}: relative difference {error:.3g}, allowed {limit:g}"


def assert_differs(got: list[Tensor], want: list[Tensor], what: str = "") -> None:
    """Guards against a test that would pass whatever the rewrite did."""
    assert distance(got, want) > 1e-3, f"{what}: the edit changes nothing that could be seen"


def close(got: Any, want: Tensor) -> bool:
    return torch.allclose(torch.as_tensor(got), want, atol=1e-5)
