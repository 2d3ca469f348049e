"""The golden text of every refusal code: what a user reads when an attention is left as it is."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import decoys
import linear_decoys
import merged_models
import pytest
import sending_models
import torch
import torch.nn.functional as F
from decoys import Decoy, E, H, L
from models import Attention, Spelling, inputs
from places import ROOT
from torch import Tensor, nn

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.match.anchors import normalisers
from attnopt.match.recognize import recognise
from attnopt.match.rejection import NotAttentionError
from attnopt.passes import (
    AddValues,
    DynamicSparse,
    EvictKeys,
    ExtendKeys,
    GroupedQuery,
    HeadPatch,
    LatentKv,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    QueryRows,
    Replace,
    RouteHeads,
    ScaleHeads,
    SegmentGain,
    Sparse,
)
from attnopt.patterns import Blocks, Causal, Neighborhood, Segments, Window

BY_IDS = Sparse(Segments(attnopt.Input("ids")))


class Scored(Decoy):
    """Attention with something done to its scores."""

    def __init__(self, change: Callable[[Tensor], Tensor], dim: int = -1) -> None:
        super().__init__()
        self.change, self.dim = change, dim
        self.gate = nn.Parameter(torch.rand(L, L))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e4)
        return self.merged(self.change(scores).softmax(self.dim)[..., :L] @ v)


class Gated(Scored):
    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-1, -2) * self.gate).softmax(-1) @ v)


class Mixing(Scored):
    """A map of its own beside the weights."""

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((0.5 * (q @ k.transpose(-1, -2)).softmax(-1) + 0.5 * self.gate) @ v)


class Unused(Decoy):
    """Weights that meet no values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = self.heads(x)
        return (q @ k.transpose(-1, -2)).softmax(-1).square()


class OneKey(Decoy):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = k.mean(-2, keepdim=True), v.mean(-2, keepdim=True)
        return self.merged((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Misdivided(Decoy):
    """Each feature is divided by the sum of the query with its number."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(len(x), L, E // L, L).transpose(1, 2) for f in (self.q, self.k, self.v))
        e = torch.exp(q @ k.transpose(-1, -2) / 8)
        return self.merged(e @ v / e.sum(-1).unsqueeze(-2))


class Dropping(Decoy):
    def forward(self, x: Tensor) -> Tensor:
        return self.merged(F.scaled_dot_product_attention(*self.heads(x), dropout_p=0.1))


def first_key(scores: Tensor) -> Tensor:
    return torch.cat([scores, scores[..., :1].detach() * 0 + 1.0], -1)


def missed(model: nn.Module, width: int = E, **more: Any) -> Refusal:
    """Why the only candidate of ``model`` is no attention; also where that is too common to be reported."""
    args = (torch.randn(2, L, width),)
    near = attnopt.inspect(model.eval(), args, more).near_misses
    if near:
        (miss,) = near
        return miss.refusal
    (anchor,) = normalisers(capture(model, CallInputs(args, more)).module.graph)
    with pytest.raises(NotAttentionError) as caught:
        recognise(anchor)
    return caught.value.refusal


def misses(model: nn.Module, width: int = E) -> list[Refusal]:
    found = attnopt.inspect(model.eval(), (torch.randn(2, L, width),), dynamic_shapes="auto").near_misses
    return [miss.refusal for miss in found]


def refused_decoy(model: nn.Module, policy: Any, **options: Any) -> Refusal:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(model.eval(), policy, (torch.randn(2, L, E),), **options)
    (refusal,) = fast.report.sites[0].refusals.values()
    return refusal


def gained_twice() -> Refusal:
    model, given = Attention(Spelling()), inputs(Spelling())
    fast = attnopt.optimize(model, [SegmentGain([0], 0.5), SegmentGain([1], 0.5)], (), given)
    (entry,) = fast.report.sites
    return entry.refusals["segment-gain"]


def refused(s: Spelling, policy: Any, **options: Any) -> Refusal:
    """Why the only attention of ``s`` is left as it is."""
    model, given = Attention(s), inputs(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(model, policy, (), given, **options)
    (entry,) = fast.report.sites
    assert entry.status == "refused"
    (refusal,) = entry.refusals.values()
    assert str(refusal).splitlines()[0][:20] in str(fast.report).replace(" refused", "")
    return refusal


def explained_too_little() -> Refusal:
    """With a number that does not depend on rounding."""
    found = refused(Spelling(), Replace("conv", minimum_r2=2), calibration=[inputs(Spelling())])
    assert re.match(r"-?\d\.\d{4} by ", found.found)
    return replace(found, found=re.sub(r"-?\d\.\d{4}", "0.1234", found.found))


class OneProjection(nn.Module):
    """Keys that are the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (self.q, self.kv))
        made: Tensor = self.out(F.scaled_dot_product_attention(q, kv, kv).transpose(1, 2).flatten(2))
        return made


def one_projection() -> Refusal:
    batches = [(torch.randn(4, L, E),)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(OneProjection().eval(), LatentKv(2), batches[0], calibration=batches)
    return fast.report.sites[0].refusals["latent-kv"]


def selected_twice() -> Refusal:
    policy = [DynamicSparse(), DynamicSparse(keep=2)]
    (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), inputs(Spelling())).report.sites
    return entry.refusals["dynamic-sparse"]


def pooled_twice() -> Refusal:
    policy = [PoolKeys(7, heads=[1, 2]), PoolKeys(7)]
    (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), inputs(Spelling())).report.sites
    return entry.refusals["pool-keys"]


def chosen_twice() -> Refusal:
    policy = [QueryRows("norm", 3), QueryRows("norm", 3)]
    (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), inputs(Spelling())).report.sites
    return entry.refusals["query-rows"]


def mixed_and_chosen() -> Refusal:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        model = Mixing(lambda s: s).eval()
        (entry,) = attnopt.optimize(model, QueryRows("norm", 3), (torch.randn(2, L, E),)).report.sites
    return entry.refusals["query-rows"]


def refused_with(ids: object, policy: Any) -> Refusal:
    """Why ``policy`` leaves segments by ``ids`` alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        given = {**inputs(Spelling()), "ids": ids}
        (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), given).report.sites
    (refusal,) = entry.refusals.values()
    return refusal


def extended_twice() -> Refusal:
    policy = [ExtendKeys(torch.ones(3, 12), heads=[1]), ExtendKeys(torch.ones(2, 12))]
    (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), inputs(Spelling())).report.sites
    return entry.refusals["extend-keys"]


def extended_with(**brought: Tensor) -> Refusal:
    """Why a reference that is no constant leaves the attention alone."""
    policy = ["fuse", ExtendKeys(attnopt.Input("features"), mask=attnopt.Input("seen"))]
    given = {**inputs(Spelling()), "features": torch.ones(3, 12), **brought}
    (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), given).report.sites
    return entry.refusals["extend-keys"]


def of_three_inputs() -> Refusal:
    class Bare(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    given = tuple(torch.randn(2, 4, 7, 8) for _ in "qkv")
    (entry,) = attnopt.optimize(Bare(), ["fuse", ExtendKeys(torch.ones(3, 8))], given).report.sites
    return entry.refusals["extend-keys"]


def of_a_saved_model() -> Refusal:
    with tempfile.TemporaryDirectory() as folder:
        attnopt.optimize(Attention(Spelling()), "fuse", (), inputs(Spelling())).save(folder)
        refusal = ExtendKeys(torch.ones(3, 12)).check(attnopt.load(folder).sites[0])
    assert refusal is not None
    return refusal


def padded_and_pooled() -> Refusal:
    policy = [Sparse(Blocks(4, 1), zero_pad=True), PoolKeys(7)]
    (entry,) = attnopt.optimize(Attention(Spelling()), policy, (), inputs(Spelling())).report.sites
    return entry.refusals["pool-keys"]


def evicted_twice() -> Refusal:
    spec = AttentionSpec.of(4, 4, 8, 8, scale=0.3, pattern=Causal())
    once = EvictKeys("h2o", 9).rewrite(Site("", spec, {})).spec
    refusal = EvictKeys("snapkv", 9).check(Site("", once, {}))
    assert refusal is not None
    return refusal


class Continued(Decoy):
    """Attention over the keys and values of earlier tokens, too."""

    def forward(self, x: Tensor, k_past: Tensor, v_past: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(F.scaled_dot_product_attention(q, torch.cat([k_past, k], 2), torch.cat([v_past, v], 2)))


def pooled_past() -> Refusal:
    past = torch.randn(2, 2, H, 5, E // H)
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(Continued().eval(), PoolKeys(2), (torch.randn(2, L, E), *past))
    return fast.report.sites[0].refusals["pool-keys"]


def routed_and_pruned() -> Refusal:
    policy = [RouteHeads([0], 1), PruneHeads(heads=[1])]
    model, given = Attention(Spelling()), inputs(Spelling())
    (entry,) = attnopt.optimize(model, policy, (), given, backend="sdpa").report.sites
    return entry.refusals["prune-heads"]


class Twice(Decoy):
    """One set of weights, two calls."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.heads(x)
            x = x + self.merged((q @ k.transpose(-1, -2)).softmax(-1) @ v)
        return x


def patched_in_both_calls() -> Refusal:
    x = torch.randn(2, L, E)
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(Twice().eval(), HeadPatch([1], "run"), (x,), calibration=[x])
    assert len(fast.sites) == 2
    return fast.report.sites[1].refusals["head-patch"]


def sink_and_constant() -> Refusal:
    sink = torch.zeros(1, H, 1, 1)
    return missed(Scored(lambda s: torch.cat([s + 1.0, sink.expand(s.shape[0], -1, L, 1)], -1)))


class Normed(nn.Module):
    """Queries and keys pass a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (nn.functional.layer_norm(t, (2,)) for t in (q, k))
        out: Tensor = self.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return out


class NormedTogether(Decoy):
    """Norms over all heads before the core, and a sum behind it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.layer_norm(f(x), (E,)).view(*x.shape[:2], H, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        made: Tensor = self.o(y + x)
        return made


def heads_that_no_weight_has() -> Refusal:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = attnopt.optimize(NormedTogether(), PruneHeads(heads=[1]), (torch.randn(2, L, E),))
    assert fast.report.sites[0].status == "refused"
    return fast.report.sites[0].refusals["prune-heads"]


def behind_a_norm() -> Refusal:
    x = torch.randn(4, 6, 8)
    policy = GroupedQuery(kv_heads=2, merge="svd")
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(Normed().eval(), policy, (x,), calibration=[x])
    return fast.report.sites[0].refusals["grouped-query"]


CASES: dict[str, tuple[Callable[[], Refusal], str]] = {
    # ---- matching
    "no-query-key-product": (
        lambda: missed(decoys.CubedScores()),
        "[no-query-key-product] expected scores computed from a product of queries and keys, found relu = "
        "relu.default (at LINE)",
    ),
    "no-value-product": (
        lambda: missed(Unused()),
        "[no-value-product] expected weights multiplied with values, found square = square (at LINE)",
    ),
    "weights-changed": (
        lambda: missed(decoys.GatedWeights()),
        "[weights-changed] expected weights that feed directly into the value product, found mul = mul on the "
        "weights (at LINE)\n  hint: weights that an input mixes or gates after the softmax, or masked unlike the scores, "
        "are not supported",
    ),
    "one-key": (
        lambda: missed(OneKey()),
        "[one-key] expected more than one key, found a softmax over a single element (at LINE)",
    ),
    "softmax-axis": (
        lambda: missed(Scored(lambda s: s, dim=1)),
        "[softmax-axis] expected a softmax over an axis of the keys alone, found an axis shared by both operands (at "
        "LINE)",
    ),
    "value-axis": (
        lambda: missed(decoys.SummedHeads()),
        "[value-axis] expected values summed over the keys, found a product over another axis (at LINE)",
    ),
    "unreadable-layout": (
        lambda: missed(decoys.DroppedColumn()),
        "[unreadable-layout] expected weights with traceable axes, found slice_1 = slice (at LINE)",
    ),
    "late-division": (
        lambda: missed(Misdivided()),
        "[late-division] expected the output of each query divided by its own sum of exponentials, found div_1, "
        "which divides by the sum of another query (at LINE)",
    ),
    "channel-attention": (
        lambda: missed(decoys.SlotsOverFeatures()),
        "[channel-attention] expected queries that are features of a projection, as the keys are, found a softmax over the "
        "features of a projection, of other queries (at LINE)",
    ),
    "active-dropout": (
        lambda: missed(Dropping()),
        "[active-dropout] expected no active dropout, found dropout of 0.1 (at LINE)\n  hint: call model.eval() first",
    ),
    "negated-mask": (
        lambda: missed(Scored(lambda s: -s.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf))),
        "[negated-mask] expected a positive factor after a mask, found -1.0 (at LINE)",
    ),
    "moderate-mask": (
        lambda: missed(Scored(lambda s: s + torch.arange(float(L))), seen=torch.ones(L, dtype=torch.bool)),
        "[moderate-mask] expected a mask of -inf or the dtype's minimum, found -10000 written over scores in rows "
        "that may be fully masked (at LINE)\n  hint: mask with -inf or torch.finfo(dtype).min",
    ),
    "sink-and-constant": (
        sink_and_constant,
        "[sink-and-constant] expected a sink without an added constant, found a constant added to the scores (at LINE)",
    ),
    "scores-feed-back": (
        lambda: missed(decoys.TopK()),
        "[scores-feed-back] expected masks and biases independent of the scores, found lt, which depends on the "
        "scores (at LINE)",
    ),
    "scores-multiplied": (
        lambda: missed(Gated(lambda s: s)),
        "[scores-multiplied] expected a factor that depends on queries or keys alone, or a 0/1 mask with a matching "
        "bias, found gate, which depends on both",
    ),
    # ---- the driver
    "escapes": (
        lambda: refused(Spelling(returns="weights"), LocalWindow(1)),
        "[escapes] expected scores and weights that are used only inside the attention, found softmax used by the "
        "model's output (at LINE)\n  hint: call the model so that it does not return attention weights",
    ),
    # ---- passes
    "needs-self-attention": (
        lambda: refused(Spelling(cross=True), Sparse(Window(1))),
        "[needs-self-attention] expected queries and keys from the same sequence, found keys from another sequence "
        '(at LINE)\n  hint: exclude cross-attention with a mapping such as {"decoder.*.cross": []}',
    ),
    "unknown-head": (
        lambda: refused(Spelling(), PruneHeads(heads=[1, 4, 7])),
        "[unknown-head] expected heads from 0 to 3, found head 4, 7 (at LINE)",
    ),
    "unknown-token": (
        lambda: refused(Spelling(), AddValues([3, 7, -9, -8], 1.0)),
        "[unknown-token] expected tokens from -7 to 6, found tokens 7 and -9 to -8 (at LINE)",
    ),
    "unknown-mask": (
        lambda: refused(Spelling(bias_kind="alibi"), AddValues([0], 1.0)),
        "[unknown-mask] expected keys that a pattern or a boolean mask hides, found a bias, which may hide some (at LINE)\n  "
        "hint: say which of its numbers do, as in hidden_below=-1e3",
    ),
    "explains-too-little": (
        explained_too_little,
        "[explains-too-little] expected an R^2 of at least 2 on held-out tokens, found 0.1234 by conv(causal=False) (at LINE)\n"
        "  hint: keep this attention, or use a mixer that reads more tokens",
    ),
    "unknown-module": (
        lambda: refused(Spelling(), Replace("module('gated')")),
        "[unknown-module] expected a module, found only its name, gated (at LINE)\n"
        "  hint: pass the factory of the module to Replace",
    ),
    "wrong-length": (
        lambda: refused(Spelling(), Sparse(Neighborhood((2, 3), 1))),
        "[wrong-length] expected a sequence of 6 tokens, found 7 tokens (at LINE)\n  hint: put class and register "
        "tokens before a grid with Prefix(n, ...)",
    ),
    "already-selected": (
        selected_twice,
        "[already-selected] expected an attention without block selection, found DynamicBlocks(scores=Pooled(), "
        "keep=0.25, block=64, sinks=1, local=1) (at LINE)\n  hint: apply dynamic-sparse only once per site",
    ),
    "already-segmented": (
        lambda: refused_with(torch.zeros(7, dtype=torch.int64), [BY_IDS, BY_IDS]),
        "[already-segmented] expected an attention without segments, found segments by ids (at LINE)\n  hint: number the "
        "intersections of both as segments of one input",
    ),
    "unknown-input": (
        lambda: refused_with([0] * 7, BY_IDS),
        "[unknown-input] expected a tensor among the inputs of the model, found Input('ids') beside x (at LINE)",
    ),
    "not-ids": (
        lambda: refused_with(torch.zeros(7), BY_IDS),
        "[not-ids] expected an integer for each token, found ids of float32 (at LINE)\n  hint: number the segments from 0, as "
        "torch.int64",
    ),
    "not-numbers": (
        lambda: refused_with(torch.zeros(4, dtype=torch.int64), ScaleHeads(attnopt.Input("ids"))),
        "[not-numbers] expected floating-point numbers, found ids of int64 (at LINE)\n  hint: convert it to the dtype of the "
        "model",
    ),
    "already-pooled": (
        pooled_twice,
        "[already-pooled] expected an attention without pooled keys, found heads 1, 2 read keys pooled by 7 (at LINE)\n  "
        "hint: apply pool-keys only once per site",
    ),
    "already-chosen": (
        chosen_twice,
        "[already-chosen] expected an attention that computes all rows, found heads 0 to 3 compute 3 of the rows by Norm() "
        "(at LINE)\n  hint: apply query-rows only once per site",
    ),
    "already-mixed": (
        mixed_and_chosen,
        "[already-mixed] expected weights of a softmax alone, found a map mixed into them (at LINE)\n  hint: exclude the site "
        "from query-rows",
    ),
    "already-extended": (
        extended_twice,
        "[already-extended] expected an attention of its own keys alone, found head 1 reads 3 more keys (at LINE)\n  hint: give "
        "all tokens to one extend-keys",
    ),
    "not-a-mask": (
        lambda: extended_with(seen=torch.ones(3)),
        "[not-a-mask] expected a bool for each token, found seen of float32 (at LINE)\n  hint: convert it to torch.bool",
    ),
    "other-features": (
        lambda: refused(Spelling(), ExtendKeys(torch.ones(3, 5))),
        "[other-features] expected a reference of tokens x 12, or of 1 or 2 x tokens x 12 numbers, found 3 x 5 (at LINE)\n  "
        "hint: give what the key projection of this site reads, such as the input of the layer after its norm",
    ),
    "not-token-wise": (
        lambda: refused(Spelling(rope="half"), ExtendKeys(torch.ones(3, 12))),
        "[not-token-wise] expected keys and values that are computed from each token alone, wherever it stands, found mul (LINE) "
        "(at LINE)\n  hint: the reference has no places in the sequence of the tokens, which rotated keys, caches and "
        "convolutions need; exclude the site from extend-keys",
    ),
    "several-sources": (
        of_three_inputs,
        "[several-sources] expected keys and values that are computed from one tensor of features, found k, v (at LINE)\n  hint: "
        "exclude the site from extend-keys",
    ),
    "unknown-features": (
        of_a_saved_model,
        "[unknown-features] expected known features of tokens, found a site of a saved model (at LINE)\n  hint: optimize the "
        "model itself with this pass",
    ),
    "zero-padded": (
        padded_and_pooled,
        "[zero-padded] expected keys that are all tokens, found zero keys beyond the edges of Blocks(size=4, halo=1) (at "
        "LINE)\n  hint: use either zero_pad or pool-keys at a site",
    ),
    "bias-beyond-edge": (
        lambda: refused(Spelling(bias_kind="alibi"), Sparse(Blocks(4, 1), zero_pad=True)),
        "[bias-beyond-edge] expected scores without a bias, found a bias, which has no entries for keys beyond the edge "
        "(at LINE)\n  hint: leave zero_pad out: keys beyond the edge are then masked",
    ),
    "keys-already-hidden": (
        lambda: refused(Spelling(mask=("causal",)), Sparse(Blocks(4, 1), zero_pad=True)),
        "[keys-already-hidden] expected queries that see all keys, found Causal() (at LINE)\n  hint: leave zero_pad out, or "
        "let the zero-padded pattern come first",
    ),
    "looks-ahead": (
        lambda: refused(Spelling(mask=("causal",)), DynamicSparse("routing")),
        "[looks-ahead] expected block scores that depend on no later token, because the attention is causal, found "
        "Routing(clusters=16, balanced=True, width=1.0, seed=0) (at LINE)\n  hint: use "
        'scores="routing(balanced=False)"',
    ),
    "needs-cache": (
        lambda: refused(Spelling(mask=("causal",)), EvictKeys("h2o", 4)),
        "[needs-cache] expected a model that decodes from the cache of its class, found a graph, for a cache evicted by h2o "
        '(budget=4, recent=2) (at LINE)\n  hint: use attnopt.convert; or evict-keys(method="sinks"), which is a pattern',
    ),
    "needs-causal": (
        lambda: refused(Spelling(), EvictKeys("sinks", 4)),
        "[needs-causal] expected queries that see no later keys, found Full() (at LINE)\n  hint: use local-window or sparse to "
        "restrict the keys of an encoder",
    ),
    "already-evicting": (
        evicted_twice,
        "[already-evicting] expected a cache without eviction, found cache evicted by h2o (budget=9, recent=5)\n  hint: use "
        "one method per site",
    ),
    "causal-pools": (
        lambda: refused(Spelling(mask=("causal",)), PoolKeys(7)),
        "[causal-pools] expected queries that may see later keys, found Causal() (at LINE)\n  hint: the mean of a pool "
        "mixes later keys into visible ones; use grouped-query or local-window",
    ),
    "masked-pools": (
        lambda: refused(Spelling(mask=("padding",)), PoolKeys(7)),
        "[masked-pools] expected keys that are never hidden, found a bias that may be a mask (at LINE)\n  hint: hidden keys, "
        "such as padding, would enter the means; capture the model without padding and its mask",
    ),
    "cached-keys": (
        pooled_past,
        f"[cached-keys] expected keys that are all computed in this call, found {L} queries after 5 past keys (at LINE)\n  "
        "hint: pools would change with every new token; capture the model without its cache",
    ),
    "already-edited": (
        routed_and_pruned,
        "[already-edited] expected head outputs that are not edited yet, found heads 0 and 1 of 3 heads for each "
        "token by query norm (at LINE)\n  hint: apply prune-heads before route-heads",
    ),
    "other-sizes": (
        lambda: refused(Spelling(), HeadPatch([1], torch.zeros(1, 1, 9, 4))),
        "[other-sizes] expected values for 7 tokens in every call, found values for 9 tokens (at LINE)",
    ),
    "several-calls": (
        patched_in_both_calls,
        "[several-calls] expected weights that are used by one call, found 2 calls with different values (at LINE)\n  "
        "hint: give each call its own rule, as in {'attention#2': ...}",
    ),
    "all-heads": (
        lambda: refused(Spelling(), PruneHeads(heads=[0, 1, 2, 3])),
        "[all-heads] expected at least one remaining head, found all 4 heads removed (at LINE)\n  hint: use "
        "whole_layers=True to remove the whole attention",
    ),
    "nothing-to-remove": (
        heads_that_no_weight_has,
        "[nothing-to-remove] expected weights that can be separated by head, found q: heads cannot be separated "
        "before layer_norm (LINE); k: heads cannot be separated before layer_norm (LINE); v: heads cannot be "
        "separated before layer_norm (LINE); out: heads cannot be separated before add (LINE) (at LINE)\n  hint: zero "
        "the heads with scale-heads and gains of 0 (their parameters stay)",
    ),
    "no-such-site-size": (
        lambda: refused(Spelling(), PruneHeads(fraction=0.5, importance=[1, 2, 3])),
        "[no-such-site-size] expected one importance score per head (4), found 3 numbers (at LINE)",
    ),
    "mapped-axis": (
        lambda: missed(decoys.MappedElsewhere(after=True)),
        "[mapped-axis] expected a linear map of scores or weights across all heads, found a map along another axis (at LINE)",
    ),
    "talking-heads": (
        lambda: refused_decoy(decoys.TalkingHeads(), PruneHeads(heads=[0])),
        "[talking-heads] expected heads that do not depend on each other, found talking heads: scores or weights are mapped "
        "across them (at LINE)\n  hint: local-window, sparse and scale-heads apply; exclude the site from prune-heads",
    ),
    "between-channels": (
        lambda: refused_decoy(decoys.OverChannels(), LocalWindow(1)),
        "[between-channels] expected queries and keys that are tokens, found channels of each head, whose features are tokens "
        "(at LINE)\n  hint: prune-heads and scale-heads apply; exclude the site from local-window",
    ),
    "no-softmax": (
        lambda: refused_decoy(decoys.KernelAttention(), GroupedQuery(kv_heads=1)),
        "[no-softmax] expected a plain softmax over keys, found no softmax, weights divided by their sum (at LINE)\n  hint: "
        "local-window, sparse, prune-heads and scale-heads apply; exclude the site from grouped-query",
    ),
    "other-softmax": (
        lambda: refused_decoy(decoys.Transposed(), GroupedQuery(kv_heads=1)),
        "[other-softmax] expected a plain softmax over keys, found softmax over queries (at LINE)\n  hint: local-window, sparse, "
        "prune-heads and scale-heads apply; exclude the site from grouped-query",
    ),
    "softmax-over-queries": (
        lambda: missed(sending_models.HiddenByNumber(), sending_models.WIDTH),
        "[softmax-over-queries] expected masks of -inf beside a softmax over queries, found -1e+09 written over scores (at LINE)"
        "\n  hint: write -inf where a mask hides, by masked_fill or where",
    ),
    "merged-heads": (
        lambda: missed(merged_models.OtherOrderBehind(), merged_models.WIDTH),
        "[merged-heads] expected heads on an axis of their own, or merged with a batch in one order, found 6 places of one axis, "
        "some of which read the same rows of a weight (at LINE)\n  hint: merge queries, keys and values in one order, or keep "
        "[batch, heads, tokens, features]",
    ),
    "not-exchanged": (
        lambda: refused_decoy(decoys.Transposed(), Sparse(Causal()), backend="blocked"),
        "[not-exchanged] expected all pairs or a window, which keys see from the other side, found Causal()",
    ),
    "data-dependent-decay": (
        lambda: missed(linear_decoys.Gated(), linear_decoys.WIDTH),
        "[data-dependent-decay] expected a decay that is the same for all inputs, found tril, which inputs change from pair to "
        "pair, as in Mamba-2 and gated linear attention (at LINE)",
    ),
    "nested-products": (
        lambda: missed(linear_decoys.Delta(), linear_decoys.WIDTH),
        "[nested-products] expected queries, keys and values made by projections, found a product of activations in them, "
        "matmul_1, as in a delta rule or a recurrence (at LINE)",
    ),
    "undivided": (
        lambda: missed(linear_decoys.Undivided(), linear_decoys.WIDTH),
        "[undivided] expected weights that fade, hide keys, or are divided by their sum, found products of queries and keys as "
        "they are, as in non-local blocks (at LINE)",
    ),
    "unread-decay": (
        lambda: missed(linear_decoys.TwoSided(), linear_decoys.WIDTH),
        "[unread-decay] expected weights times a mask, or times a number to the power of the distance to earlier keys, found "
        "another factor of pairs of queries and keys (at LINE)",
    ),
    "other-normaliser": (
        lambda: missed(linear_decoys.DividedByNorm(), linear_decoys.WIDTH),
        "[other-normaliser] expected weights that are not divided, or by their sum and a number, found div, which divides by "
        "something else that queries and keys make (at LINE)",
    ),
    "in-pieces": (
        lambda: misses(linear_decoys.WithState(), linear_decoys.WIDTH)[0],
        "[in-pieces] expected queries, keys and values that one attention alone reads, found matmul_3 = matmul, as of a state "
        "beside the pairs of a chunk (at LINE)",
    ),
    "needs-linear": (
        lambda: refused(Spelling(), LocalWindow(1), backend="chunked"),
        "[needs-linear] expected an attention without a softmax, found a softmax",
    ),
    "no-state": (
        lambda: refused_decoy(decoys.KernelAttention(), LocalWindow(1), backend="chunked"),
        "[no-state] expected queries that see all keys, or all earlier ones, found Window(left=1, right=1)",
    ),
    "wrong-number-of-gains": (
        lambda: refused(Spelling(), ScaleHeads([1.0, 2.0])),
        "[wrong-number-of-gains] expected one gain per head (4), found 2 gains (at LINE)",
    ),
    "unknown-keys": (
        lambda: refused(Spelling(), SegmentGain([7], 0.5)),
        "[unknown-keys] expected key positions below 7, found position 7 (at LINE)",
    ),
    "already-gained": (
        gained_twice,
        "[already-gained] expected weights without gains, found weights x 0.5 in Keys('0') (logits) (at LINE)\n  hint: give "
        "all segments to one segment-gain; a factor that the model itself has cannot be combined with others",
    ),
    "kv-heads-do-not-fit": (
        lambda: refused(Spelling(), GroupedQuery(kv_heads=3)),
        "[kv-heads-do-not-fit] expected kv_heads to be one of 1, 2, 4, found 3 (at LINE)",
    ),
    "unknown-projection": (
        lambda: refused(Spelling(norm="across"), GroupedQuery(kv_heads=2)),
        "[unknown-projection] expected known key and value projections, found k: heads cannot be separated before "
        "layer_norm (LINE) (at LINE)",
    ),
    "shared-projection": (
        one_projection,
        "[shared-projection] expected keys and values from rows of their own, found rows of kv.weight that make both (at LINE)",
    ),
    "needs-calibration": (
        lambda: refused(Spelling(), GroupedQuery(kv_heads=2, merge="svd")),
        "[needs-calibration] expected calibration data, found none (at LINE)\n  hint: pass calibration= to attnopt.optimize",
    ),
    "features-are-not-linear": (
        behind_a_norm,
        "[features-are-not-linear] expected queries and keys that are only projected or rotated before the scores, "
        'found a norm or another transform after the projection (at LINE)\n  hint: use merge="mean" and '
        'grouping="adjacent"',
    ),
    # ---- backends
    "no-softcap": (
        lambda: refused(Spelling(softcap=5.0), LocalWindow(1), backend="sdpa"),
        "[no-softcap] expected scores without softcap, found softcap 5.0",
    ),
    "other-blocks": (
        lambda: refused(Spelling(), DynamicSparse(block=32), backend="blocked"),
        "[other-blocks] expected a block size that is a multiple of 64, found blocks of 32",
    ),
    "no-sinks": (
        lambda: refused(Spelling(sinks=True), LocalWindow(1), backend="sdpa"),
        "[no-sinks] expected a softmax over keys alone, found sink logits beside them",
    ),
}


def generic(refusal: Refusal) -> str:
    """Its text, with LINE for a source line."""
    return re.sub(r"\w+\.py:\d+", "LINE", str(refusal))


@pytest.mark.parametrize("code", CASES)
def test_golden_text(code: str) -> None:
    make, text = CASES[code]
    refusal = make()
    assert refusal.code == code
    assert generic(refusal) == text


def test_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.match.find.site_error", lambda *_: 0.25)
    assert generic(missed(Scored(lambda s: s))) == OTHERS["not-equal"]


def test_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("axis")

    monkeypatch.setattr("attnopt.match.find.recognise", broken)
    monkeypatch.delenv("ATTNOPT_DEBUG")
    assert generic(missed(Scored(lambda s: s))) == OTHERS["not-understood"]


@pytest.mark.parametrize("value", ["1", "0"])
def test_a_fault_of_the_matcher_surfaces_where_it_is_debugged(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("axis")

    assert os.environ["ATTNOPT_DEBUG"] == "1", "in every test"
    monkeypatch.setattr("attnopt.match.find.recognise", broken)
    monkeypatch.setenv("ATTNOPT_DEBUG", value)
    with pytest.raises(KeyError, match="axis") if value == "1" else contextlib.nullcontext():
        assert missed(Scored(lambda s: s)).code == "not-understood"


def only_miss(model: nn.Module, *args: Tensor) -> str:
    (miss,) = attnopt.inspect(model.eval(), args).near_misses
    return generic(miss.refusal)


def test_no_elements() -> None:
    x = torch.zeros(0, 5, 16)
    assert only_miss(nn.MultiheadAttention(16, 2, batch_first=True), x, x, x) == OTHERS["no-elements"]


def test_in_a_region() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(16, 16)

        def attend(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), x, x)

        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda t: self.attend(t), lambda t: 2 * t, (x,))

    assert only_miss(Branching(), torch.randn(1, 5, 16)) == OTHERS["in-a-region"]


def test_opaque_operator() -> None:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Any:
            weights = self.wide.weight, self.wide.bias, self.out.weight, self.out.bias
            return torch.ops.aten._native_multi_head_attention(x, x, x, 16, 2, *weights)[0]

    assert only_miss(Kernel(), torch.randn(1, 5, 16)) == OTHERS["opaque-operator"]


def test_no_such_scale() -> None:
    from attnopt.backends import Sdpa

    refusal = Sdpa().check(AttentionSpec((0,), (0,), (0,), 4, 4, -0.5))
    assert refusal is not None
    assert generic(refusal) == OTHERS["no-such-scale"]


def test_plain_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.backends.speed import Speed

    slow_call = Speed(1e11, 1e11, 1e11, 1e11, dense_call=1e-6, blocked_call=1.0)
    monkeypatch.setattr("attnopt.backends.speed._of_cpu", lambda *_: slow_call)
    sinks = Spelling(sinks=True)
    with pytest.warns(attnopt.AttnoptWarning, match="refused, the first by blocked"):
        fast = attnopt.optimize(Attention(sinks), "fuse", (), inputs(sinks))
    assert generic(fast.report.sites[0].refusals["blocked"]) == OTHERS["plain-is-faster"]


def test_not_on_target() -> None:
    from attnopt.policy_search.targets import refusal

    error = attnopt.errors.ExportError("the pattern is Full()", site="layers.0", hint="use export_onnx")
    assert str(refusal("token", error)) == OTHERS["not-on-target"]


def test_no_weight_gains() -> None:
    from attnopt.backends import Sdpa
    from attnopt.ir.plugin_calls import accepts
    from attnopt.ir.weight_gains import Part, WeightGains
    from attnopt.patterns import Keys

    gains = WeightGains((Part(Keys([0]), (0.5,)),))
    refusal = accepts(Sdpa(), Site("", AttentionSpec((0,), (0,), (0,), 4, 4, 0.5, weight_gains=gains), {}))
    assert refusal is not None
    assert generic(refusal) == OTHERS["no-weight-gains"]


def test_unnamed_pattern() -> None:
    from dataclasses import dataclass

    from attnopt.backends import Blocked
    from attnopt.patterns import Pattern

    @dataclass(frozen=True, repr=False)
    class Even(Pattern):
        def visible(self, i: Tensor, j: Tensor) -> Tensor:
            return (i == i) & (j % 2 == 0)

    refusal = Blocked().check(AttentionSpec((0,), (0,), (0,), 4, 4, 0.5, pattern=Even()))
    assert refusal is not None
    assert generic(refusal) == OTHERS["unnamed-pattern"]


def test_plugin_failed() -> None:
    from attnopt.ir.plugin_calls import no_answer

    site = Site("", AttentionSpec((0,), (0,), (0,), 4, 4, 0.5), {})
    error = attnopt.PluginError("pass 'acme.last-k' of acme (acme:LastK): check failed: OSError: no licence")
    assert generic(no_answer(site, error)) == OTHERS["plugin-failed"]


def test_every_code_is_tested() -> None:
    found: set[str] = set()
    for folder in ("attnopt", "passes", "backends"):
        for file in (ROOT / folder).rglob("*.py"):
            found |= set(
                re.findall(
                    r'\b(?:Refusal\(|refuse\(|rejected\([^"]*?,)\s*"([a-z-]+)"', file.read_text(encoding="utf-8")
                )
            )
    tested = {*CASES, *OTHERS}
    assert found == tested
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in found)


OTHERS = {
    "plain-is-faster": "[plain-is-faster] expected lengths at which it is faster than plain operators, found 7 queries and 7 "
    'keys (at LINE)\n  hint: backend="blocked" uses it all the same',
    "no-attention": "[no-attention] expected a chain of two products, found products over other axes",
    "no-weight-gains": "[no-weight-gains] expected no gains on attention weights, found weights x 0.5 in Keys('0') (logits)",
    "not-equal": "[not-equal] expected the canonical attention to equal the model's own computation, found a "
    "relative difference of 0.25 (at LINE)\n  hint: please report the model: this is a gap in matching, "
    "and the site was left unchanged",
    "not-understood": "[not-understood] expected a layout that the matcher supports, found KeyError: 'axis' (at "
    "LINE)\n  hint: please report the model: this is a gap in matching, and the attention was left "
    "unchanged",
    "no-elements": "[no-elements] expected non-empty scores, found scores of 0 x 5 x 5 (at LINE)\n  hint: pass "
    "example inputs with at least one sequence and one token",
    "in-a-region": "[in-a-region] expected code that runs unconditionally, found true_graph_0\n  hint: remove the "
    "branch or loop from the model, or optimize the module inside it on its own",
    "opaque-operator": "[opaque-operator] expected supported operators, found _native_multi_head_attention (at LINE)\n"
    "  hint: disable the inference fast path before capture: torch.backends.mha.set_fastpath_enabled(False)",
    "unnamed-pattern": "[unnamed-pattern] expected a pattern that can be reconstructed from its text, found Even()\n  "
    "hint: decorate its class with @attnopt.register, and make its repr the call that constructs "
    "it",
    "plugin-failed": "[plugin-failed] expected an answer from the plugin, found pass 'acme.last-k' of acme "
    "(acme:LastK): check failed: OSError: no licence\n  hint: fix or uninstall the plugin",
    "not-on-target": "[not-on-target] expected what runs in ONNX Runtime, for one token, found layers.0: the pattern is "
    "Full()\n  hint: use export_onnx",
    "no-such-scale": "[no-such-scale] expected a scale above 0, found -0.5",
}
