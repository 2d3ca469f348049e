"""Every law, checked on one case."""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import decoys
import oracle
import torch
from any_linear import AnyLinear
from caches import Lists
from captures import captured_once
from models import MAX, Attention, Spelling
from torch import Tensor, nn

import attnopt
from attnopt.ir.constant import Weight
from attnopt.ir.interfaces import Pass
from fuzzing.calls import Call, calls
from fuzzing.edits import Edit, edit_of, meant
from fuzzing.grammar import Block, Case
from fuzzing.modules import build, inputs

AS_NEAR = 2.0  # times as far from the exact numbers as the user's own model


@dataclass
class Outcome:
    """``found`` of ``attentions`` runs; ``missed`` and ``refused``: why not, by code; ``failure``: what must never happen."""

    case: Case
    attentions: int = 0
    found: int = 0
    missed: list[tuple[str, Spelling]] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    laws: list[str] = field(default_factory=list)
    failure: str = ""  # "wrong" or "crashed"
    why: str = ""


def checked(case: Case) -> Outcome:
    """The outcome of ``case``; never raises."""
    outcome = Outcome(case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(case, outcome)
    except AssertionError as e:
        outcome.failure, outcome.why = "wrong", f"{e}\n{traceback.format_exc(limit=-4)}"
    except Exception as e:
        outcome.failure, outcome.why = "crashed", f"{type(e).__name__}: {e}\n{traceback.format_exc(limit=-6)}"
    return outcome


def _check(case: Case, outcome: Outcome) -> None:
    case = _without_overflow(case)
    model, given = build(case), inputs(case)
    own = oracle.run(model, (), given)
    assert _finite(own), "the user's model itself overflows"
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    ran = calls(case, model, given)
    outcome.attentions = len(ran)
    if case.branch == "data":
        outcome.missed = [(_capture_error(model, given), c.block.spelling) for c in ran]
        return
    with captured_once():
        fast = attnopt.optimize(model, "fuse", (), given)
        _same(case, oracle.run(fast, (), given), own, "fuse", lambda: _exact(model, given))
        outcome.laws.append("fuse")
        found = _match(model, ran, fast, outcome)
        edits = _edits(case, model, given, [call for call, _ in found.values()])
        whole = _with_brought(given, edits)
        if edits:
            learns = any(p.name == "replace" for e in edits.values() for p in e.passes)
            fast = attnopt.optimize(model, _policy(edits), (), whole, calibration=[whole] if learns else None)
            _rewritten(case, model, given, own, edits, fast, outcome)
    if case.saved:
        _saved(fast, whole)
        outcome.laws.append("saved")
    if case.onnx:
        _in_onnx(fast, whole)
        outcome.laws.append("onnx")
    if case.dynamic:
        read = _at_other_sizes(case, model, given)
        outcome.laws.append("dynamic")
        if _called_at_other_sizes(case, model, given, [call for call, site in found.values() if site.name in read]):
            outcome.laws.append("inputs of the call")
    if case.cached:
        _with_a_cache(case, model, given["x"])
        outcome.laws.append("cached")
    after = model.state_dict()
    for name, (place, value) in before.items():
        assert after[name].data_ptr() == place, f"{name} of the user's model was replaced"
        assert torch.equal(after[name], value), f"{name} of the user's model was changed"


def _without_overflow(case: Case) -> Case:
    """Bare exponentials of large scores overflow in the user's model too: there the maximum is taken off first."""
    given = [inputs(case), *(_at_others(case) if case.dynamic else ())]
    if all(_finite(oracle.run(build(case), (), g)) for g in given):
        return case
    stable = {"exp": "stable-exp", "late": "later"}
    blocks = [
        replace(b, spelling=replace(b.spelling, softmax=stable.get(b.spelling.softmax, b.spelling.softmax)))
        for b in case.blocks
    ]
    return replace(case, blocks=tuple(blocks))


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _with_softmax(case: Case, model: nn.Module, fused: list[Block]) -> nn.Module:
    """The same model with torch's softmax in the place of exponentials in the ``fused`` blocks.  Where keys are hidden after
    the maximum of all of them was taken off, what is left of these may be 0 / 0, or a few bits of a subnormal number."""
    written_out = [b for b in fused if b.spelling.exponentials]
    if not written_out:
        return model
    blocks = [
        replace(b, spelling=replace(b.spelling, softmax="F")) if any(b is w for w in written_out) else b
        for b in case.blocks
    ]
    written = build(replace(case, blocks=tuple(blocks)))
    written.load_state_dict(model.state_dict())
    return written


def _same(
    case: Case, got: list[Tensor], want: list[Tensor], what: str, exact: Callable[[], list[Tensor]] | None = None
) -> None:
    """Rounding adds up from block to block.  A model may make that of half precision so large that its own numbers say
    nothing: there the rewritten one has to be as near to what single precision gives (``exact``) as the user's is."""
    blocks = len(case.blocks) + (case.reuse == "twice")
    limit = blocks * oracle.LIMITS[getattr(torch, case.dtype)]
    if exact is not None and case.dtype in ("float16", "bfloat16") and oracle.distance(got, want) > limit:
        true = exact()
        oracle.assert_same(got, true, f"{what}, against single precision", limit=AS_NEAR * oracle.distance(want, true))
        return
    oracle.assert_same(got, want, what, limit=limit)


def _exact(model: nn.Module, given: Mapping[str, Tensor]) -> list[Tensor]:
    single, wide = _in_single(model, given)
    return oracle.run(single, (), wide)


def _in_single(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    wide = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
    return copy.deepcopy(model).float(), wide


def _capture_error(model: nn.Module, given: Mapping[str, Tensor]) -> str:
    """A branch on values is told, with a remedy."""
    told: attnopt.CaptureError | None = None
    try:
        attnopt.optimize(model, "fuse", (), dict(given))
    except attnopt.CaptureError as e:
        told = e
    assert told is not None, "a branch that depends on the input's values was captured as if there were none"
    assert told.hint, "a CaptureError without a remedy"
    return "CaptureError"


# ---------------------------------------------------------------- what was found
def _match(
    model: nn.Module, ran: list[Call], fast: attnopt.OptimizedModel, outcome: Outcome
) -> dict[str, tuple[Call, attnopt.Site]]:
    """The sites that are attentions, each read off exactly; nothing else may be a site."""
    sites = {s.name: s for s in fast.sites}
    found = {c.site: (c, sites[c.site]) for c in ran if c.site in sites}
    own = {name for name, s in sites.items() if s.spec.has_own_maps}
    near = {n.name: n.refusal.code for n in fast.report.near_misses}
    others = sites.keys() - own
    told = {name for name, m in model.named_modules() if isinstance(m, AnyLinear) and near.get(name) == "in-pieces"}
    assert others | told == _without_own_maps(model), (
        f"between channels, talking heads, or without a plain softmax: {others}, near misses {told}"
    )
    strange = own - found.keys()
    assert not strange, f"raised, and no attention: {strange}"
    assert list(found) == [s for s in sites if s in own], "sites are not in the order in which they run"
    outcome.found = len(found)
    codes = {c.site: "one-key" if c.kv_len == 1 else near.get(c.path, "not-a-candidate") for c in ran}
    outcome.missed = [(codes[c.site], c.block.spelling) for c in ran if c.site not in found]
    for call, site in found.values():
        attention = model.get_submodule(call.path)
        assert isinstance(attention, Attention)
        _read_off(attention, site, call)
    return found


def _without_own_maps(model: nn.Module) -> set[str]:
    """The names of attentions between channels, of talking heads and without a plain softmax over keys: found, and left as they
    are.  A state whose sums divide in pieces may be a near miss."""
    kinds = (
        decoys.OverChannels, decoys.TalkingHeads, decoys.KernelAttention, decoys.OverQueries, decoys.Transposed,
        AnyLinear,
    )  # fmt: skip
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def _read_off(attention: Attention, site: attnopt.Site, call: Call) -> None:
    s = attention.s
    read = (site.num_heads, site.num_kv_heads, site.spec.kv_of_head, site.head_dim, site.value_dim)
    want = (s.heads, s.kv_heads, s.kv_of_head, s.head_dim, s.value_dim)
    assert read == want, f"{site.name}: read off {read}, which is {want}"
    assert site.is_cross == s.cross, f"{site.name}: is_cross"
    assert site.spec.has_sinks == s.sinks, f"{site.name}: has_sinks"
    assert (site.spec.softcap is None) == (s.softcap is None), f"{site.name}: softcap {site.spec.softcap}"
    for role, expected in attention.expected_projections().items():
        rows = site.projections[role].rows
        if rows is None:
            assert site.projections[role].why
        elif role != "out" or s.out:
            assert rows == expected["rows"], f"{site.name}: rows of {role}"


# ---------------------------------------------------------------- what was rewritten
def _edits(
    case: Case, model: nn.Module, given: Mapping[str, Tensor], found: Iterable[Call], only_called: bool = False
) -> dict[str, Edit]:
    made: dict[str, Edit] = {}
    for call in found:
        attention = model.get_submodule(call.path)
        assert isinstance(attention, Attention)
        edit = edit_of(case, call, attention, given, only_called)
        if edit is not None:
            made[call.site] = edit
    return made


def _policy(edits: Mapping[str, Edit]) -> dict[str, list[Pass]]:
    return {site: list(e.passes) for site, e in edits.items()}


def _with_brought(given: Mapping[str, Tensor], edits: Mapping[str, Edit]) -> dict[str, Tensor]:
    return {**given, **{name: x for e in edits.values() for name, x in e.tensors.items()}}


def _refusals(fast: attnopt.OptimizedModel, edits: Mapping[str, Edit]) -> dict[str, set[str]]:
    """By site, the names of passes that did nothing there, each of which says why."""
    entries, refused = {e.name: e for e in fast.report.sites}, dict[str, set[str]]()
    for site, edit in edits.items():
        entry = entries[site]
        assert (entry.status == "rewritten") or entry.refusals, f"{site}: {entry.status} without a reason"
        refused[site] = set(entry.refusals) if entry.status == "rewritten" else {p.name for p in edit.passes}
        for name, r in entry.refusals.items():
            assert r.code, f"{site}: {name} refused without a code"
            assert r.expected or r.found, f"{site}: {name} refused without a reason"
    return refused


def _rewritten(
    case: Case, model: nn.Module, given: dict[str, Tensor], own: list[Tensor], edits: Mapping[str, Edit],
    fast: attnopt.OptimizedModel, outcome: Outcome,
) -> None:  # fmt: skip
    entries = {e.name: e for e in fast.report.sites}
    refused = _refusals(fast, edits)
    for site, edit in edits.items():
        outcome.refused += [(name, r.code) for name, r in entries[site].refusals.items()]
        outcome.rewritten += [p.name for p in edit.passes if p.name not in refused[site]]
    fused = [(e, refused[site]) for site, e in edits.items() if entries[site].status == "rewritten"]
    written = _with_softmax(case, model, [e.call.block for e, less in fused if e.visible.keys() - less])
    want = meant(written, given, edits, refused)
    if not _finite(want):
        written = _with_softmax(case, model, [e.call.block for e, _ in fused])
        want = meant(written, given, edits, refused)
    got = oracle.run(fast, (), _with_brought(given, edits))
    _same(case, got, want, "rewritten", lambda: meant(*_in_single(written, given), edits, refused))
    if not case.reuse:
        pruned = [e for e in edits.values() if "prune-heads" in {p.name for p in e.passes} - refused[e.call.site]]
        gone = sum(_parameters_gone(e, fast) for e in pruned)
        gone -= sum(
            prod(t.shape) for site in fast.sites for e in site.spec.after for t in e.tensors if isinstance(t, Weight)
        )
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, fast))
        assert before - after >= gone, f"{before} parameters before, {after} after; {gone} belong to pruned heads"


def _parameters_gone(edit: Edit, fast: attnopt.OptimizedModel) -> int:
    """How many weights belong to no other head than those that are pruned, where rows are known."""
    s = edit.call.block.spelling
    site = next(x for x in fast.sites if x.name == edit.call.site)
    lost = set(edit.gains["prune-heads"])
    kept = {s.kv_of_head[h] for h in range(s.heads) if h not in lost}
    sizes = {"q": len(lost) * s.head_dim, "k": (s.kv_heads - len(kept)) * s.head_dim,
             "v": (s.kv_heads - len(kept)) * s.value_dim, "out": len(lost) * s.value_dim}  # fmt: skip
    known = [r for r in sizes if site.projections[r].rows is not None]
    return sum(sizes[role] * s.width for role in known)


# ---------------------------------------------------------------- files and sizes
def _saved(fast: attnopt.OptimizedModel, given: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fast.save(Path(folder) / "model")
        loaded = attnopt.load(Path(folder) / "model")
    assert [s.name for s in loaded.sites] == [s.name for s in fast.sites]
    oracle.assert_same(oracle.run(loaded, (), given), oracle.run(fast, (), given), "saved and loaded", limit=0.0)


def _in_onnx(fast: attnopt.OptimizedModel, *several: dict[str, Tensor]) -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        fast.export_onnx(path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = [i.name for i in session.get_inputs()]
    for given in several:
        got = session.run(None, {name: given[name].numpy() for name in wanted})
        oracle.assert_same([torch.from_numpy(g) for g in got], oracle.run(fast, (), given), "ONNX Runtime")


def _at_others(case: Case) -> list[dict[str, Tensor]]:
    """Inputs of other lengths and batches than at capture."""
    sizes = (case.length + 3, case.batch + 1), (MAX - 3, case.batch + 2)
    return [inputs(case, length=length, batch=batch) for length, batch in sizes]


def _at_other_sizes(case: Case, model: nn.Module, given: dict[str, Tensor]) -> set[str]:
    """The sites that are also read where lengths are free."""
    fast = attnopt.optimize(model, "fuse", (), given, dynamic_shapes=_free(case, given))
    own = oracle.run(model, (), given)
    _same(case, oracle.run(fast, (), given), own, "dynamic, at the traced sizes", lambda: _exact(model, given))
    for other in _at_others(case):
        want = oracle.run(model, (), other)
        got = _unless_fixed(fast, (), other)
        if got is None:
            break
        _same(case, got, want, "dynamic, at other sizes", lambda: _exact(model, other))  # noqa: B023
    return {s.name for s in fast.sites}


def _free(case: Case, given: Mapping[str, Tensor]) -> Any:
    if case.axes != "folded":
        return "auto"
    # The length is behind two axes, and "auto" means the first two.
    return {name: dict.fromkeys(range(min(3, t.dim())), torch.export.Dim.AUTO) for name, t in given.items()}


def _called_at_other_sizes(case: Case, model: nn.Module, given: dict[str, Tensor], found: list[Call]) -> bool:
    """What each call brings, at lengths and batches that no example had; False where there is nothing of the kind."""
    edits = _edits(case, model, given, found, only_called=True)
    if not edits:
        return False
    shapes = _free(case, given)
    fast = attnopt.optimize(model, _policy(edits), (), _with_brought(given, edits), dynamic_shapes=shapes)
    refused, sites, seen = _refusals(fast, edits), {c.site for c in found}, list[dict[str, Tensor]]()
    for other in (given, *_at_others(case)):
        now = _edits(case, model, other, [c for c in calls(case, model, other) if c.site in sites], only_called=True)
        whole = _with_brought(other, now)
        got = _unless_fixed(fast, (), whole)
        if got is None:
            break
        assert [e.passes for e in now.values()] == [e.passes for e in edits.values()]
        want = meant(model, other, now, refused)
        _same(
            case,
            got,
            want,
            "inputs of the call, at other sizes",
            lambda: meant(*_in_single(model, other), now, refused),  # noqa: B023
        )
        seen.append(whole)
    if case.onnx and seen:
        _in_onnx(fast, *seen)
    return bool(seen)


def _unless_fixed(fast: attnopt.OptimizedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """None if these sizes are refused because an axis is fixed, which the report has to say."""
    try:
        return oracle.run(fast, args, kwargs)
    except attnopt.CaptureError:
        assert fast.report.fixed_axes, "other sizes are refused, and no axis was reported as fixed"
        return None


def _with_a_cache(case: Case, model: nn.Module, x: Tensor) -> None:
    """A text read in parts: the first by the model, the others by the optimized model after a cache of those before it."""
    prompt, *parts = torch.cat([x, *(x[:, :1] * (0.9 - i / 10) for i in range(6))], 1).split([case.length, 2, 1, 3], 1)

    def read_by_model() -> Lists:
        cache = Lists(len(case.blocks))
        oracle.run(model, (prompt,), {"cache": cache})
        return cache

    fast = attnopt.optimize(model, "fuse", (parts[0],), {"cache": read_by_model()}, dynamic_shapes="auto")
    ours, theirs = read_by_model(), read_by_model()
    for part in parts:
        want = oracle.run(model, (part,), {"cache": theirs})
        got = _unless_fixed(fast, (part,), {"cache": ours})
        if got is None:
            return
        _same(case, got, want, "after a cache")
        _same(case, oracle.leaves([ours.k, ours.v]), oracle.leaves([theirs.k, theirs.v]), "the cache")
