"""Head numbers of the trained model, which stay valid after pruning, and shared refusals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attnopt.base.options import whole_tuple
from attnopt.errors import PolicyError
from attnopt.fit.absorbable_maps import is_linear
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES, CallTensor, Size, Source
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.head_edits import HeadEdit
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.tokens import out_of_range, shortest, told
from attnopt.patterns import Pattern, Segments
from attnopt.patterns.algebra import FULL

HINT_IDS = (
    "give one id for each token that this attention sees, class and register tokens included, or exclude the site"
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BUDGETS = ("site", "global")  # heads counted at each site, or over all sites together


def refuse_unknown_heads(site: Site, heads: Iterable[int]) -> Refusal | None:
    """Refuse heads that the model never had; pruned heads are accepted."""
    count = site.trained_heads
    unknown = sorted(h for h in set(heads) if not 0 <= h < count)
    if not unknown:
        return None
    found = f"head {', '.join(map(str, unknown))}"
    return site.refuse("unknown-head", expected=f"heads from 0 to {count - 1}", found=found)


def distinct_heads(owner: str, heads: Any) -> tuple[int, ...]:
    """``heads`` as at least one int, each listed once, in their order.  Raises PolicyError."""
    found = whole_tuple(owner, "heads", heads, None)
    if not found or len(set(found)) < len(found):
        raise PolicyError(f"{owner}: invalid value heads={heads!r}: expected at least one head, each listed once")
    return found


def refuse_unknown_tokens(site: Site, tokens: Iterable[int] | None, length: int) -> Refusal | None:
    """Refuse positions that the example, of ``length`` tokens, does not have."""
    unknown = out_of_range(tokens or (), length)
    if not unknown:
        return None
    found = told(unknown)
    return site.refuse("unknown-token", expected=f"tokens from {-length} to {length - 1}", found=found)


def note_absent_tokens(owner: str, site: Site, tokens: Iterable[int] | None) -> tuple[str, ...]:
    """What the report says about sequences that lack some of ``tokens``."""
    least = shortest(tokens or ())
    if not site.is_dynamic or least < 2:
        return ()
    return (f"{owner}: sequences of fewer than {least} tokens lack some of the positions, which are ignored there",)


def refuse_other_keys(site: Site, past: bool = False) -> Refusal | None:
    """Refuse keys that are not at the positions of the queries; ``past``: earlier tokens may precede them."""
    hint = 'exclude cross-attention with a mapping such as {"decoder.*.cross": []}'
    found = ""
    if site.is_cross and site.alignment == "none":
        found = "query and key inputs with independent lengths"
        hint = "use one torch.export.Dim for both lengths in dynamic_shapes, or remove both"
    elif site.is_cross:
        found = "keys from another sequence"
    elif site.alignment == "last":
        found = "" if past else f"{site.q_len} queries after {site.kv_len - site.q_len} past keys"
    elif site.q_len != site.kv_len:
        found = f"{site.q_len} queries and {site.kv_len} keys"
    elif site.alignment == "none":
        found = "queries and keys with independent lengths"
    if not found:
        return None
    return site.refuse(
        "needs-self-attention", expected="queries and keys from the same sequence", found=found, hint=hint
    )


def refuse_edits(site: Site, edits: Iterable[HeadEdit | None], hint: str) -> Refusal | None:
    """Refuse the first of these head edits, whose meaning would change."""
    edit = next((e for e in edits if e is not None), None)
    if edit is None:
        return None
    expected = "head outputs that are not edited yet"
    return site.refuse("already-edited", expected=expected, found=str(edit), hint=hint)


def refuse_transplants(site: Site, hint: str) -> Refusal | None:
    """Refuse other queries or keys where some are those of another run."""
    if not site.spec.before:
        return None
    expected = "an attention with its own queries and keys"
    return site.refuse("already-edited", expected=expected, found=str(site.spec.before[0]), hint=hint)


def refuse_fitted_selection(site: Site, hint: str) -> Refusal | None:
    """Refuse other queries or keys where blocks are chosen by scores that were fitted to those of now."""
    if site.spec.selection is None or not site.spec.selection.fitted:
        return None
    expected = "an attention without fitted block selection"
    return site.refuse("already-selected", expected=expected, found=str(site.spec.selection), hint=hint)


def refuse_looking_ahead(site: Site, selection: DynamicBlocks | None, pattern: Pattern = FULL) -> Refusal | None:
    """Refuse blocks chosen from the whole sequence where, with ``pattern``, no query may see a later key."""
    if selection is None or not selection.scores.looks_ahead or not site.spec.restricted(pattern).is_causal:
        return None
    return site.refuse(
        "looks-ahead",
        expected="block scores that depend on no later token, because the attention is causal",
        found=str(selection.scores),
        hint='use scores="routing(balanced=False)"',
    )


def refuse_rows(site: Site, hint: str) -> Refusal | None:
    """Refuse an attention that already chooses its rows."""
    if site.spec.rows is None:
        return None
    expected = "an attention that computes all rows"
    return site.refuse("already-chosen", expected=expected, found=str(site.spec.rows), hint=hint)


def refuse_causal_rows(site: Site, spec: AttentionSpec) -> Refusal | None:
    """Refuse ``spec``, a form of ``site``, if it chooses rows among all tokens but no query may see a later key."""
    if spec.rows is None or not spec.is_causal:
        return None
    return site.refuse(
        "looks-ahead",
        expected="queries that may see later keys",
        found=str(spec.visible_pattern),
        hint="whether a row is chosen depends on later tokens; route-heads decides for each token by itself",
    )


def refuse_pooled(site: Site, hint: str) -> Refusal | None:
    """Refuse heads that already pool their keys."""
    if site.spec.pooling is None:
        return None
    expected = "an attention without pooled keys"
    return site.refuse("already-pooled", expected=expected, found=str(site.spec.pooling), hint=hint)


def refuse_segmented(site: Site) -> Refusal | None:
    """Refuse an attention that already reads the ids of segments of a call."""
    if site.spec.call_segments is None:
        return None
    found = site.spec.segments or site.spec.weight_gains
    hint = "number the intersections of both as segments of one input"
    return site.refuse("already-segmented", expected="an attention without segments", found=str(found), hint=hint)


def refuse_extended(site: Site, hint: str) -> Refusal | None:
    """Refuse heads that already read keys of other tokens."""
    if site.spec.extension is None:
        return None
    expected = "an attention of its own keys alone"
    return site.refuse("already-extended", expected=expected, found=str(site.spec.extension), hint=hint)


def refuse_gained(site: Site, hint: str) -> Refusal | None:
    """Refuse weights that already have gains."""
    if site.spec.weight_gains is None:
        return None
    found = str(site.spec.weight_gains)
    return site.refuse("already-gained", expected="weights without gains", found=found, hint=hint)


def refuse_causal_pools(site: Site, spec: AttentionSpec, hint: str) -> Refusal | None:
    """Refuse ``spec``, a form of ``site``, if a head that pools its keys sees no later ones: they would reach it all the same."""
    pooling = () if spec.pooling is None else spec.pooling.heads
    seen = spec.visible_pattern
    causal = next((p for i, h in enumerate(spec.heads) if h in pooling and (p := seen.for_head(i)).is_causal), None)
    if causal is None:
        return None
    return site.refuse(
        "causal-pools",
        expected="queries that may see later keys",
        found=str(causal),
        hint=f"the mean of a pool mixes later keys into visible ones; {hint}",
    )


def expected_projections(roles: Sequence[str]) -> str:
    """ "known value and output projections", "a known output projection"."""
    names = {"q": "query", "k": "key", "v": "value", "out": "output"}
    if not roles:
        return "no projection"
    *first, last = [names.get(r, r) for r in roles]
    return f"known {', '.join(first)} and {last} projections" if first else f"a known {last} projection"


def refuse_unknown_projections(
    site: Site, roles: Iterable[str], expected: str, give: str, direct: bool = True
) -> Refusal | None:
    """Refuse if a projection in ``roles`` is unknown or, if ``direct``, the output projection reads anything but the
    head outputs.  ``give`` names the alternative.
    """
    for role in roles:
        p = site.projections.get(role)
        if p is not None and p.rows is not None and (p.direct or not direct):
            continue
        is_known = p is not None and p.rows is not None
        why = "the head outputs are scaled before it" if is_known else (p and p.why) or "not found"
        hint = f"use {give}" if give else ""
        return site.refuse("unknown-projection", expected=expected, found=f"{role}: {why}", hint=hint)
    return None


def refuse_no_data(site: Site, hint: str = "pass calibration= to attnopt.optimize") -> Refusal | None:
    """Refuse a site without calibration data."""
    if site.activations is not None:
        return None
    if site.spec.before:
        hint = "let this pass come before transplant, whose queries and keys calibration does not know"
    elif site.spec.extension is not None:
        hint = "let this pass come before extend-keys, whose tokens calibration does not know"
    elif site.spec.inputs:
        listed = ", ".join(dict.fromkeys(map(str, site.spec.inputs)))
        hint = f"let this pass come before those that read {listed} of each call, which calibration does not know"
    return site.refuse("needs-calibration", expected="calibration data", found="none", hint=hint)


def refuse_no_single_run(site: Site) -> Refusal | None:
    """Refuse a site of which calibration data knows no run, or several."""
    if site.activations is None or site.activations.calls == 1:
        return refuse_no_data(site)
    found = f"{site.activations.calls} calls with different values"
    hint = "give each call its own rule, as in {'attention#2': ...}"
    return site.refuse("several-calls", expected="weights that are used by one call", found=found, hint=hint)


def refuse_transforms(site: Site, hint: str) -> Refusal | None:
    """Refuse if maps of keys, queries and values cannot be folded into their projections."""
    if is_linear(site):
        return None
    return site.refuse(
        "features-are-not-linear",
        expected="queries and keys that are only projected or rotated before the scores",
        found="a norm or another transform after the projection",
        hint=hint,
    )


def refuse_unfit_inputs(site: Site, brought: Iterable[Source], remedy: str = "") -> Refusal | None:
    """Refuse the first of what a call brings for ``site`` whose example has another size or kind."""
    known: dict[str, Size] = {BATCH: site.batch, QUERIES: site.q_len, KEYS: site.kv_len, **site.own_sizes}
    for tensor in brought:
        if isinstance(tensor, Constant):
            continue
        given = site.inputs.get(tensor.input.name)
        if given is None:
            listed = ", ".join(site.inputs) or "none"
            expected, found = "a tensor among the inputs of the model", f"{tensor.input} beside {listed}"
            return site.refuse("unknown-input", expected=expected, found=found)
        kinds = (torch.bool,) if tensor.is_mask else _INTEGERS if tensor.is_ids else _FLOATS
        if given.dtype not in kinds:
            found = f"{tensor} of {str(given.dtype).removeprefix('torch.')}"
            if tensor.is_mask:
                return site.refuse(
                    "not-a-mask", expected="a bool for each token", found=found, hint="convert it to torch.bool"
                )
            if tensor.is_ids:
                hint = "number the segments from 0, as torch.int64"
                return site.refuse("not-ids", expected="an integer for each token", found=found, hint=hint)
            hint = "convert it to the dtype of the model"
            return site.refuse("not-numbers", expected="floating-point numbers", found=found, hint=hint)
        known = {**dict.fromkeys(map(str, tensor.axes), -1), **tensor.lengths(given.shape), **known}
        wanted = [known[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
        fitting = [wanted, [1, *wanted[1:]], wanted[1:]] if tensor.axes[0] == BATCH else [wanted]
        if list(given.shape) not in fitting:
            code = "wrong-length" if tensor.is_ids else "other-sizes"
            return site.refuse(code, expected=_expected(tensor, wanted), found=_told(given.shape), hint=remedy)
    return None


def _expected(tensor: CallTensor, sizes: Sequence[Size]) -> str:
    for_all = f", or of {_told(sizes[1:])} for all sequences" if tensor.axes[0] == BATCH else ""
    return f"{tensor} of {_told(sizes)}{for_all}"


def _told(sizes: Sequence[Size]) -> str:
    """ "2 x 12", an unknown size as "any number" """
    return " x ".join("any number" if n < 0 else str(n) for n in sizes) or "a single number"


def refuse_other_lengths(site: Site, pattern: Pattern) -> Refusal | None:
    """Refuse a sequence length that the pattern does not fit."""
    made_for = pattern.lengths
    if made_for is None or (site.kv_len in made_for and not site.is_dynamic):
        return None
    if not made_for:
        return site.refuse("wrong-length", expected="a pattern for one length", found=f"several lengths in {pattern}")
    least, most = made_for[0], made_for[-1]
    expected = f"a sequence of {least} tokens" if least == most else f"a sequence of {least} to {most} tokens"
    if site.is_dynamic:
        hint = "remove the sequence axis from dynamic_shapes"
        return site.refuse("wrong-length", expected=expected, found="a dynamic length", hint=hint)
    hint = "put class and register tokens before a grid with Prefix(n, ...)" if site.kv_len > most else ""
    if any(isinstance(leaf, Segments) for leaf in pattern.leaves()):
        hint = HINT_IDS
    return site.refuse("wrong-length", expected=expected, found=f"{site.kv_len} tokens", hint=hint)
