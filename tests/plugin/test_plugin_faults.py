"""What a third party does wrong ends in an error that names the plugin and the site, and never in wrong numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from torch import Tensor

import attnopt
from attnopt import (
    AttentionSpec,
    BlockScores,
    DynamicBlocks,
    HeadEdit,
    HeadWeights,
    Pass,
    Pattern,
    PluginError,
    Reach,
    Rewrite,
    Site,
)
from attnopt.backends import Reference
from attnopt.compiler import plugins
from attnopt.compiler.explain import explain
from attnopt.ir.head_edits import Scaled
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.passes import DynamicSparse, Sparse
from attnopt.patterns import Keys, PerHead, Window, parse

pytestmark = pytest.mark.usefixtures("one_capture")

MODEL, ARGS = tiny_models.causal()
FIRST = Keys([0])
MODEL.eval()


def optimized(policy: Any, **options: Any) -> attnopt.OptimizedModel:
    return attnopt.optimize(MODEL, policy, ARGS, **options)


@dataclass(frozen=True)
class Makes(Pass):
    """Whatever it is given, as a rewrite."""

    name: ClassVar[str] = "acme.makes"
    exact: ClassVar[bool] = False
    make: Callable[[Site], Any]

    def rewrite(self, site: Site) -> Any:
        return self.make(site)


def spec(**changes: Any) -> Callable[[Site], Rewrite]:
    return lambda site: Rewrite(replace(site.spec, **changes))


def unchecked(**changes: Any) -> Callable[[Site], Rewrite]:
    """A spec that its own constructor would not let through."""

    def make(site: Site) -> Rewrite:
        made = replace(site.spec)
        for name, value in changes.items():
            object.__setattr__(made, name, value)
        return Rewrite(made)

    return make


def gains(listed: Any, of: Any = FIRST, **options: Any) -> Callable[[Site], Rewrite]:
    """Gains on the weights of keys, as ``WeightGains`` lets them through."""
    return spec(weight_gains=WeightGains((Part(of, listed),), **options))


def weights(role: str, head: int, *sizes: int, bias: Tensor | None = None) -> Callable[[Site], Rewrite]:
    return lambda site: Rewrite(site.spec, (HeadWeights(role, head, torch.zeros(sizes), bias),))


# ---------------------------------------------------------------- passes
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (spec(has_bias=True), "has_bias is True, but the attention has False"),
        (spec(has_mask=True), "has_mask is True"),
        (spec(has_sinks=True), "has_sinks is True"),
        (spec(is_cross=True), "is_cross is True"),
        (spec(head_dim=7), "head_dim is 7, but the attention has 8"),
        (spec(value_dim=9), "value_dim is 9"),
        (spec(heads=(0, 5)), "heads is (0, 5), expected a subset of (0, 1) without duplicates"),
        (spec(heads=(1, 1)), "heads is (1, 1)"),
        (spec(kv_heads=(0, 2)), "kv_heads is (0, 2)"),
        (spec(heads=(), kv_heads=(), kv_of_head=()), "heads is ()"),
        (unchecked(kv_of_head=(0, 2)), "kv_of_head is (0, 2) for 2 heads and 2 K/V heads"),
        (
            spec(after=(Scaled(((5, 2.0),)),)),
            "the edit gains 2 of head 5: expected a finite number for each of some heads",
        ),
        (spec(after=(Scaled(((0, float("nan")),)),)), "the edit gains nan of head 0: expected a finite number"),
        (spec(scale=float("inf")), "scale is inf"),
        (spec(scale="1"), "scale is '1'"),
        (spec(softcap=0.0), "softcap is 0.0"),
        (spec(pattern="Causal()"), "pattern is 'Causal()', expected a Pattern"),
        (spec(pattern=PerHead({4: Window(1, 0)})), "pattern refers to head position 4, but there are only 2 heads"),
        (spec(selection="pooled"), "selection is 'pooled', expected DynamicBlocks or None"),
        (spec(after=("clip",)), "after holds 'clip', expected a HeadEdit"),
        (spec(weight_gains="twice"), "weight_gains is 'twice', expected WeightGains with a tuple of Parts, or None"),
        (gains((2.0, 2.0, 2.0)), "has gains (2.0, 2.0, 2.0) in Keys('0'), expected a tuple for 2 heads"),
        (gains(2.0), "has gains 2.0 in Keys('0'), expected a tuple for 2 heads"),
        (gains((1.0, -0.5)), "multiplies by (1.0, -0.5) in Keys('0'), expected finite numbers of at least 0"),
        (gains((1.0, float("nan"))), "multiplies by (1.0, nan) in Keys('0'), expected finite numbers of at least 0"),
        (gains((1.0, float("inf"))), "multiplies by (1.0, inf)"),
        (
            gains((1.5, 1.0), normalise="redistribute", to=Keys([1])),
            "multiplies by (1.5, 1.0) in Keys('0'), expected finite numbers from 0 to 1, because others receive the rest",
        ),
        (gains((2.0, 2.0), normalise="softly"), "weight_gains are normalised by 'softly', expected one of ('logits', "),
        (gains((2.0, 2.0), mass=1.5), "weight_gains has mass 1.5, expected a number from 0 to 1"),
        (gains((2.0, 2.0), share=float("nan")), "weight_gains has share nan, expected a number from 0 to 1"),
        (gains((2.0, 2.0), of="Keys([0])"), "a part of weight_gains is 'Keys([0])', expected a Pattern"),
        (gains((2.0, 2.0), of=PerHead({4: Keys([0])})), "a part of weight_gains refers to head position 4"),
        (gains((0.5, 0.5), normalise="redistribute", to="all"), "the receiver of weight_gains is 'all'"),
        (weights("q", 0, 7, 16), "new 'q' weights of head 0: expected a tensor [8, 16], got [7, 16]"),
        (weights("q", 3, 8, 16), "new 'q' weights of head 3: expected one of (0, 1)"),
        (weights("w", 0, 8, 16), "new 'w' weights of head 0"),
        (weights("k", 0, 8, 16, bias=torch.zeros(7)), "the bias of new 'k' weights of head 0: expected a tensor [8]"),
        (weights("out", 0, 8, 16, bias=torch.zeros(8)), "have a bias, but the projection has none per head"),
        (weights("v", 0, 8, 16, bias=torch.full((8,), torch.nan)), "expected finite floating-point numbers"),
        (lambda site: Rewrite(site.spec, out_bias=torch.zeros(3)), "expected a tensor [16], got [3]"),
        (lambda site: Rewrite(site.spec, ("q",)), "edits holds 'q', expected HeadWeights"),
        (lambda site: Rewrite(site.spec, notes="done"), "notes is 'done', expected a tuple of strings"),  # type: ignore[arg-type]
        (lambda site: None, "rewrite returned NoneType, expected a Rewrite of an AttentionSpec"),
        (lambda site: Rewrite(None), "rewrite returned a Rewrite of NoneType"),  # type: ignore[arg-type]
        (lambda site: 1 / 0, "rewrite failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_rule_names_pass_and_site(make: Any, told: str) -> None:
    with pytest.raises(PluginError) as caught:
        optimized(Makes(make))
    assert told in caught.value.message
    assert "pass 'acme.makes' (test_plugin_faults:Makes)" in caught.value.message
    assert caught.value.site == "layers.0"
    assert caught.value.hint == "exclude the site from the policy, and fix the pass"


@pytest.mark.parametrize("answer", [True, "no", ()])
def test_an_answer_that_is_no_refusal(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Makes, "check", lambda self, site: answer)
    with pytest.raises(PluginError, match=r"check failed: TypeError: it returned .*, expected a Refusal or None"):
        optimized(Makes(spec()))


@pytest.mark.slow
def test_what_keeps_the_rules_is_done() -> None:
    made = optimized(Makes(lambda site: Rewrite(site.spec.scaled({0: 2.0}))))
    assert [s.status for s in made.report.sites] == ["rewritten"] * 2
    same = weights_of(1.0)
    torch.testing.assert_close(optimized(Makes(same))(*ARGS), MODEL(*ARGS))
    assert not torch.allclose(optimized(Makes(weights_of(2.0)))(*ARGS), MODEL(*ARGS))


def test_gains_that_keep_the_rules_are_computed() -> None:
    made = optimized(Makes(gains((0.0, 1.0), mass=0.0, share=1.0)), backend="reference")
    assert not torch.allclose(made(*ARGS), MODEL(*ARGS))


def weights_of(factor: float) -> Callable[[Site], Rewrite]:
    def make(site: Site) -> Rewrite:
        old = site.head_weight("v", 1)
        assert old is not None
        return Rewrite(site.spec, (HeadWeights("v", 1, factor * old, site.head_bias("v", 1)),))

    return make


class Plain(Pass):
    name: ClassVar[str] = "acme.plain"
    exact: ClassVar[bool] = True

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec)


# ---------------------------------------------------------------- backends
class Wrong(Reference):
    """The reference, with something done to what it gives."""

    name: ClassVar[str] = "acme.wrong"

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        self.change = change

    def lower(self, spec: AttentionSpec) -> Any:
        attend = super().lower(spec)
        return lambda q, k, v, **others: self.change(attend(q, k, v, **others))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda o: o[:, :1], "it returned [2, 1, 12, 8] in torch.float32, expected [2, 2, 12, 8] in torch.float32"),
        (lambda o: o.transpose(1, 2), "it returned [2, 12, 2, 8]"),
        (lambda o: o.double(), "it returned [2, 2, 12, 8] in torch.float64, expected [2, 2, 12, 8] in torch.float32"),
        (lambda o: (o,), "it returned tuple, expected a tensor [2, 2, 12, 8]"),
        (lambda o: o.missing, "the lowered attention failed: AttributeError: "),
    ],
)
@pytest.mark.parametrize("shapes", [None, "auto"])
def test_what_a_backend_gives_is_looked_at(change: Any, told: str, shapes: Any) -> None:
    with pytest.raises(PluginError) as caught:
        optimized("fuse", backend=Wrong(change), dynamic_shapes=shapes)
    assert told in caught.value.message
    assert "backend 'acme.wrong' (test_plugin_faults:Wrong)" in caught.value.message
    assert caught.value.site == "layers.0"


def test_wrong_numbers_are_the_backends() -> None:
    with pytest.raises(attnopt.VerificationError) as caught:
        optimized("local-window(left=2)", backend=Wrong(lambda o: o * 1.01))
    assert "backend 'acme.wrong' (test_plugin_faults:Wrong) does not compute what the spec says" in str(caught.value)
    assert caught.value.site == "layers.0"


@pytest.mark.parametrize(
    ("method", "answer", "told"),
    [
        ("check", lambda *_: 1 / 0, "check failed: ZeroDivisionError"),
        ("check", lambda *_: False, "check failed: TypeError: it returned False, expected a Refusal or None"),
        ("cost", lambda *_: None, "cost returned None, expected seconds"),
        ("cost", lambda *_: float("nan"), "cost returned nan, expected seconds"),
        ("lower", lambda *_: 1 / 0, "lower failed: ZeroDivisionError"),
    ],
)
def test_a_backend_that_fails(method: str, answer: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrong, method, answer, raising=False)
    with pytest.raises(PluginError) as caught:
        optimized("fuse", backend=Wrong(lambda o: o))
    assert told in caught.value.message
    assert caught.value.site == "layers.0"


# ---------------------------------------------------------------- patterns, head edits, block scores
@dataclass(frozen=True, repr=False)
class Third(Pattern):
    """Keys 0, 3, 6, ...: the same for all queries, so that [1, S] is a natural slip."""

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return j % 3 == 0


@dataclass(frozen=True, repr=False)
class Liar(Third):
    """Its reach denies the keys that it sees."""

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach.between(0, 4, 0, 0)


@dataclass(frozen=True, repr=False)
class Number(Third):
    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return j - i


@dataclass(frozen=True, repr=False)
class Broken(Third):
    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        raise OverflowError("too far")


@dataclass
class Mutable(Pattern):
    n: int = 3

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i == i) & (j % self.n == 0)


def expected(seen: Tensor) -> Tensor:
    """The model by hand, with a further mask."""
    x = ARGS[0]
    for layer in MODEL.layers:
        q, k, v = (f(x).view(2, 12, 2, 8).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        s = (q @ k.mT / 8**0.5).masked_fill(~(seen & torch.ones(12, 12, dtype=torch.bool).tril()), -torch.inf)
        x = x + layer.o((s.softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 16))
    return x


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "blocked"])
def test_a_pattern_that_nobody_knows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.PATTERNS, "_registered", {})
    if backend == "blocked":
        with pytest.warns(attnopt.AttnoptWarning, match="unnamed-pattern"):
            refused = optimized(Sparse(Third()), backend=backend)
        assert refused.report.sites[0].refusals["blocked"].code == "unnamed-pattern"
        attnopt.register(Third)
    made = optimized(Sparse(Third()), backend=backend)
    assert [s.status for s in made.report.sites] == ["rewritten"] * 2
    torch.testing.assert_close(made(*ARGS), expected(torch.arange(12) % 3 == 0))
    assert made.report.sites[0].form_after is not None
    assert "Third()" in str(made.report)
    assert Third().mask(5, 7).shape == (1, 5, 7)
    assert Third().density(5, 7) == pytest.approx(3 / 7)
    assert Third().look_back is None
    assert Third().bands is None
    seen = made.sites[0].spec.pattern.mask(12, 12)
    assert attnopt.advise(made.sites[0], Third()).density == pytest.approx(float(seen.double().mean()))


def test_what_is_not_registered_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.PATTERNS, "_registered", {})
    made = optimized(Sparse(Third()))
    with pytest.raises(attnopt.ArchiveError) as caught:
        made.save(tmp_path / "saved")
    assert "pattern Third() is an instance of test_plugin_faults:Third" in str(caught.value)
    assert caught.value.hint == "decorate the class with @attnopt.register, or declare it as an entry point"
    assert not (tmp_path / "saved").exists()
    attnopt.register(Third)
    made.save(tmp_path / "saved")
    assert torch.equal(attnopt.load(tmp_path / "saved")(*ARGS), made(*ARGS))
    monkeypatch.setattr(plugins.PATTERNS, "_registered", {})
    with pytest.raises(attnopt.ArchiveError) as caught:
        attnopt.load(tmp_path / "saved")
    assert "the saved model needs pattern 'Third' of test_plugin_faults:Third" in str(caught.value)
    assert caught.value.hint is not None
    assert "import the module that registers it" in caught.value.hint


def test_a_pattern_has_to_be_frozen() -> None:
    with pytest.raises(PluginError, match=r"pattern Mutable.*unhashable type.*\n.*frozen=True"):
        optimized(Sparse(Mutable()))


def test_a_pass_needs_a_name_and_fields() -> None:
    class Nameless(Pass):
        def rewrite(self, site: Site) -> Rewrite:
            return Rewrite(site.spec)

    with pytest.raises(PluginError, match="its class has no name"):
        optimized(Nameless())
    with pytest.raises(PluginError, match="its class is not a dataclass"):
        optimized(Plain())


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (Liar(), "pattern Liar(): reach contradicts visible at 12 queries and 12 keys"),
        (Broken(), "pattern Broken() failed: OverflowError: too far"),
    ],
)
def test_gains_in_patterns_that_contradict_themselves(pattern: Pattern, told: str) -> None:
    with pytest.raises(PluginError) as caught:
        optimized(Makes(gains((2.0, 2.0), of=pattern)))
    assert told in caught.value.message
    assert caught.value.site == "layers.0"


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (Liar(), "pattern Causal() & Liar(): reach contradicts visible at 12 queries and 12 keys"),
        (Broken(), "pattern Causal() & Broken() failed: OverflowError: too far"),
        (Number(), "Number(): visible returned torch.int64, expected a bool tensor"),
    ],
)
def test_patterns_that_contradict_themselves(pattern: Pattern, told: str) -> None:
    with pytest.raises(PluginError) as caught:
        optimized(Sparse(pattern))
    assert told in caught.value.message


@dataclass(frozen=True)
class Halved(HeadEdit):
    kind: ClassVar[str] = "acme.halved"
    heads: tuple[int, ...]
    narrow: bool = False

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    def apply(self, spec: AttentionSpec, o: Tensor, q: Tensor, v: Tensor, constants: Sequence[Tensor]) -> Tensor:
        return o[..., :1] if self.narrow else o / 2

    def keeping(self, kept: Collection[int]) -> HeadEdit | None:
        return self


@dataclass(frozen=True)
class First(BlockScores):
    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        return -torch.arange(k_BHMTD.shape[2]).expand(*q_BHNTD.shape[:3], -1).to(q_BHNTD)


def edited(edit: HeadEdit) -> Makes:
    return Makes(lambda site: Rewrite(site.spec.followed_by(edit)))


def test_head_edits_and_scores_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (plugins.HEAD_EDITS, plugins.SCORES):
        monkeypatch.setattr(kind, "_registered", {})
    scored = DynamicSparse(First(), keep=0.5, block=4)
    for policy, cls, kind in ((edited(Halved((0, 1))), Halved, "head edit"), (scored, First, "block score")):
        made = optimized(policy)
        with pytest.raises(attnopt.ArchiveError, match=f"cannot save: {kind} "):
            made.save(tmp_path / kind)
        attnopt.register(cls)
        made.save(tmp_path / kind)
        loaded = attnopt.load(tmp_path / kind)
        assert torch.equal(loaded(*ARGS), made(*ARGS))
        assert loaded.sites[0].spec == made.sites[0].spec
    assert DynamicBlocks("first").scores == First()


def test_an_edit_that_changes_sizes() -> None:
    with pytest.raises(PluginError, match=r"head edit 'acme.halved' .*it returned \[2, 2, 12, 1\]") as caught:
        optimized(edited(Halved((0, 1), narrow=True)))
    assert caught.value.site == "layers.0"
    with pytest.raises(PluginError, match="changes heads"):
        optimized(Makes(spec(after=(Halved((0, 4)),))))


# ---------------------------------------------------------------- registration
def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (plugins.PASSES, plugins.BACKENDS, plugins.PATTERNS):
        monkeypatch.setattr(kind, "_registered", {})
    assert attnopt.register(Third) is Third
    assert attnopt.register(Third) is Third
    assert parse("Third() & Window(1, 0)").parts[0] == Third()
    attnopt.register(Makes)
    assert plugins.load_pass("acme.makes") is Makes
    attnopt.register(Wrong)
    with pytest.raises(
        PluginError, match=r"backend 'acme.wrong' of this process cannot be constructed without arguments"
    ):
        optimized("fuse", backend="acme.wrong")
    with pytest.raises(PluginError, match=r"pattern 'Window' is already attnopt.patterns.sequence:Window of attnopt"):
        attnopt.register(type("Window", (Third,), {}))
    rival = type("Third", (Third,), {"__module__": "elsewhere"})
    with pytest.raises(PluginError, match="pattern 'Third' is already test_plugin_faults:Third of this process"):
        attnopt.register(rival)
    with pytest.raises(PluginError, match=r"pattern 'Half' .* does not define visible"):
        attnopt.register(type("Half", (Pattern,), {}))
    with pytest.raises(PluginError, match="cannot be registered"):
        attnopt.register(int)
    assert {"Third", "acme.makes"} <= {d.name for d in plugins.describe()}


def test_a_name_that_another_class_has_is_not_read_as_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A third party's own ``Sinks`` prints as ours does, and sees other keys."""
    monkeypatch.setattr(plugins.PATTERNS, "_registered", {})
    theirs = dataclass(frozen=True, repr=False)(
        type("Sinks", (Pattern,), {
            "__annotations__": {"n": int}, "visible": lambda self, i, j: (i == i) & (j >= self.n), "__module__": __name__,
        })
    )  # fmt: skip
    made = optimized(Sparse(theirs(2) | Window(0, 0)))
    torch.testing.assert_close(made(*ARGS), expected((torch.arange(12) >= 2) | torch.eye(12, dtype=torch.bool)))
    with pytest.warns(attnopt.AttnoptWarning, match="unnamed-pattern"):
        optimized(Sparse(theirs(2)), backend="blocked")
    with pytest.raises(attnopt.ArchiveError, match=r"which load\(\) cannot find by name"):
        made.save(tmp_path / "saved")


def test_a_class_that_is_defined_again_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook does when a cell is changed and run again."""
    monkeypatch.setattr(plugins.PATTERNS, "_registered", {})

    def defined(remainder: int) -> type[Pattern]:
        visible = {"visible": lambda self, i, j: (i == i) & (j % 2 == remainder), "__module__": __name__}
        return attnopt.register(dataclass(frozen=True, repr=False)(type("Cell", (Pattern,), visible)))

    for remainder in (0, 1):
        made = optimized(Sparse(defined(remainder)() | Window(0, 0)), backend="blocked")
        seen = (torch.arange(12) % 2 == remainder) | torch.eye(12, dtype=torch.bool)
        torch.testing.assert_close(made(*ARGS), expected(seen))


# ---------------------------------------------------------------- inspect and explain
@dataclass(frozen=True)
class Picky(Pass):
    name: ClassVar[str] = "acme.picky"
    exact: ClassVar[bool] = True
    fails: ClassVar[bool] = False

    def check(self, site: Site) -> Any:
        if self.fails:
            raise OSError("no licence")
        return site.refuse("too-small", expected="1000 queries", found=site.q_len)

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec)


def test_only_those_that_were_asked_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.PASSES, "_registered", {})
    attnopt.register(Picky)
    attnopt.register(Makes)
    (found,) = explain(MODEL, "layers.0", ARGS, {})
    assert found.refusals["acme.picky"].code == "too-small"
    assert not {"acme.makes", "acme.picky", "prune-heads", "scale-heads", "head-patch"} & set(found.accepted)
    assert {"fuse", "local-window", "sparse", "grouped-query", "soft-pag"} <= set(found.accepted)
    assert attnopt.inspect(MODEL, ARGS).sites[0].refusals["acme.picky"].code == "too-small"
    monkeypatch.setattr(Picky, "fails", True)
    refusal = attnopt.inspect(MODEL, ARGS).sites[0].refusals["acme.picky"]
    assert refusal.code == "plugin-failed"
    assert "pass 'acme.picky' (test_plugin_faults:Picky): check failed: OSError: no licence" in refusal.found


# ---------------------------------------------------------------- small honest things
def test_a_cache_in_half_precision_is_half_as_large() -> None:
    sizes = [attnopt.optimize(m, "fuse", a).report.cost_after.kv_bytes_per_token for m, a in models_in_each_precision()]
    assert sizes == [2 * 2 * (8 + 8) * 4, 2 * 2 * (8 + 8) * 2]


def models_in_each_precision() -> list[tuple[Any, tuple[Any, ...]]]:
    model, (x,) = tiny_models.causal()
    half, _ = tiny_models.causal()
    return [(model.eval(), (x,)), (half.bfloat16().eval(), (x.bfloat16(),))]


def test_a_warning_points_at_the_users_line() -> None:
    for call in (lambda: attnopt.optimize(MODEL, [], ARGS), lambda: deferred()(*ARGS)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found = [w for w in caught if issubclass(w.category, attnopt.AttnoptWarning)]
        assert found
        assert {Path(w.filename).name for w in found} == {Path(__file__).name}


def deferred() -> attnopt.OptimizedModel:
    return attnopt.optimize(MODEL, [])
