"""What holds whatever the model: law 9, the driver's options, and how models come and are called."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import oracle
import pytest
import torch
from models import Attention, Spelling
from torch import Tensor, nn

import attnopt
from attnopt.passes import LocalWindow, PruneHeads, ScaleHeads

pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, tuple[Any, ...]]:
    model = nn.Sequential(*(Attention(Spelling(residual=True, mask=("causal",)), seed=i) for i in range(3))).eval()
    return model, (torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(7)),)


def test_law_same_seed_same_result(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    policy = [PruneHeads(fraction=0.5), LocalWindow(2)]
    a, b = (attnopt.optimize(m, policy, args, seed=3) for m in (model, copy.deepcopy(model)))  # captured twice
    oracle.assert_same(oracle.run(a, args), oracle.run(b, args), limit=0.0)
    assert a.graph_module.code == b.graph_module.code
    assert [s.spec for s in a.sites] == [s.spec for s in b.sites]
    for (n, p), (m, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(p, q)


def test_limit_bisects(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    for n in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attnopt.AttnoptWarning)
            fast = attnopt.optimize(model, PruneHeads(heads=[0]), args, limit=n)
        assert [s.status for s in fast.report.sites] == ["rewritten"] * min(n, 3) + ["unchanged"] * (3 - min(n, 3))
        edits = {i: oracle.Edit(gains=(0.0, 1.0, 1.0, 1.0)) for i in range(min(n, 3))}
        oracle.assert_same(oracle.run(fast, args), oracle.run_edited(model, args, None, edits))


def test_strict_raises_a_refusal(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    with pytest.raises(attnopt.RewriteError, match=r"\[unknown-head\]") as caught:
        attnopt.optimize(model, {"1": PruneHeads(heads=[9]), "0": "fuse"}, args, strict=True)
    assert caught.value.site == "1"


def test_tolerance(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    fast = attnopt.optimize(model, LocalWindow(1), args, tolerance=1e6)
    error = oracle.distance(oracle.run(fast, args), oracle.run(model, args))
    assert fast.report.error == pytest.approx(error, rel=1e-3)
    attnopt.optimize(model, LocalWindow(1), args, tolerance=error * 1.01)
    with pytest.raises(attnopt.VerificationError, match="tolerance"):
        attnopt.optimize(model, LocalWindow(1), args, tolerance=error * 0.99)


def test_calibration_is_measured_too(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    loud = args[0] * 3
    alone = attnopt.optimize(model, LocalWindow(1), args).report.error
    both = attnopt.optimize(model, LocalWindow(1), args, calibration=[args[0], (loud,), {"input": loud}]).report.error
    on_loud = attnopt.optimize(model, LocalWindow(1), (loud,)).report.error
    assert alone is not None
    assert on_loud is not None
    assert both == pytest.approx(max(alone, on_loud), rel=1e-4)


def test_deferred_capture_at_the_first_call(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    fast = attnopt.optimize(model, PruneHeads(heads=[0]))
    with pytest.raises(attnopt.AttnoptError, match="not been captured"):
        _ = fast.report
    edits = {i: oracle.Edit(gains=(0.0, 1.0, 1.0, 1.0)) for i in range(3)}
    oracle.assert_same(oracle.run(fast, args), oracle.run_edited(model, args, None, edits))
    assert fast.report.count("rewritten") == 3


# ---------------------------------------------------------------- how models come and are called
def test_fx_graph_module_is_taken_as_it_is(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, args = small
    exported = torch.export.export(model, args).module()
    assert isinstance(exported, torch.fx.GraphModule)
    traced = torch.fx.symbolic_trace(_Traceable().eval())
    for graph, want in ((exported, model), (traced, traced)):
        before = graph.code
        fast = attnopt.optimize(graph, "fuse", args)
        assert fast.report.count("rewritten") == len(fast.sites) >= 1
        oracle.assert_same(oracle.run(fast, args), oracle.run(want, args))
        assert graph.code == before


class _Traceable(nn.Module):
    """Traces symbolically: no size is read."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class _OnlySymbolic(_Traceable):
    """torch.export refuses it (a call that its tracers stop at); symbolic tracing does not see the call."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            raise RuntimeError("not under torch.export")
        return super().forward(x)


def test_a_model_that_only_symbolic_tracing_takes(small: tuple[nn.Module, tuple[Any, ...]]) -> None:
    model, (_, args) = _OnlySymbolic().eval(), small
    fast = attnopt.optimize(model, PruneHeads(heads=[2]), args)
    want = oracle.run_edited(model, args, None, {0: oracle.Edit(gains=(1.0, 1.0, 0.0, 1.0))})
    oracle.assert_same(oracle.run(fast, args), want)


class _Twice(nn.Module):
    """One module called at two places: its weights are shared."""

    def __init__(self, mask: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.attention = Attention(Spelling(residual=True, mask=mask))

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.attention(x)
        return {"first": first, "both": (self.attention(first), [x * 2])}


@pytest.mark.parametrize(
    ("policy", "edits"),
    [
        ("fuse", {}),
        (PruneHeads(heads=[0]), {0: (0.0, 1.0, 1.0, 1.0), 1: (0.0, 1.0, 1.0, 1.0)}),
        ({"attention": PruneHeads(heads=[0])}, {0: (0.0, 1.0, 1.0, 1.0)}),
        ({"attention#2": PruneHeads(heads=[1, 2])}, {1: (1.0, 0.0, 0.0, 1.0)}),
        ({"attention": PruneHeads(heads=[1]), "attention#2": ScaleHeads({0: 3.0})}, {0: (1.0, 0, 1, 1), 1: (3.0, 1, 1, 1)}),
    ],
    ids=["fuse", "both", "first", "second", "each"],
)  # fmt: skip
def test_one_module_called_twice(policy: Any, edits: dict[int, tuple[float, ...]]) -> None:
    model, x = _Twice().eval(), torch.randn(2, 7, 12)
    fast = attnopt.optimize(model, policy, (x,))
    assert [s.name for s in fast.sites] == ["attention", "attention#2"]
    want = oracle.run_edited(model, (x,), None, {i: oracle.Edit(gains=g) for i, g in edits.items()})
    oracle.assert_same(oracle.run(fast, (x,)), want)
    with torch.no_grad():
        out = fast(x)
    assert list(out) == ["first", "both"]
    assert isinstance(out["both"], tuple)
    assert isinstance(out["both"][1], list)


class _TwoInOne(nn.Module):
    """Two attentions in one module, over the same values' projection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.v = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 12)

    def forward(self, x: Tensor, *, flip: Tensor) -> tuple[Tensor, Tensor]:
        v = self.v(x).unflatten(-1, (4, 3)).transpose(1, 2)
        found = []
        for f, y in ((self.a, x), (self.b, flip)):
            q, k = f(y).unflatten(-1, (4, 6)).transpose(1, 2).chunk(2, -1)
            found.append((((q @ k.transpose(-1, -2)).softmax(-1)) @ v).transpose(1, 2).flatten(2))
        return found[0], found[1] + x


def test_several_attentions_in_one_module() -> None:
    model, x = _TwoInOne().eval(), torch.randn(2, 7, 12)
    kwargs = {"flip": x.flip(1)}
    fast = attnopt.optimize(model, {"#2": PruneHeads(heads=[3]), "": ScaleHeads({0: 2.0})}, (x,), kwargs)
    assert [s.name for s in fast.sites] == ["", "#2"]
    want = oracle.run_edited(
        model, (x,), kwargs, {0: oracle.Edit(gains=(2.0, 1, 1, 1)), 1: oracle.Edit(gains=(1.0, 1, 1, 0))}
    )
    oracle.assert_same(oracle.run(fast, (x,), kwargs), want)


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(Spelling(cross=True, mask=("padding",)))

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.attention(x * scale, memory, padding)


def test_arguments_may_be_given_in_any_way() -> None:
    model = _Named().eval()
    x, memory, padding = torch.randn(2, 7, 12), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    padding[0, 3:] = False
    want = oracle.run(model, (x, memory, padding))
    fast = attnopt.optimize(model, "fuse", (x,), {"padding": padding, "memory": memory})
    with torch.no_grad():
        for got in (
            fast(x, memory, padding), fast(x, padding=padding, memory=memory), fast(memory=memory, x=x, padding=padding),
            fast(x, memory, padding=padding, scale=1.0),
        ):  # fmt: skip
            oracle.assert_same([got], want)


def test_parameters_that_the_optimizer_changes_are_its_own() -> None:
    """Weights that stay are shared; those of a pruned head are copies, so that the user's model keeps all of it."""
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    before = copy.deepcopy(model.state_dict())
    fast = attnopt.optimize(model, PruneHeads(heads=[0]), (x,))
    with torch.no_grad():
        for p in fast.parameters():
            if p.data_ptr() not in {q.data_ptr() for q in model.parameters()}:
                p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(oracle.run(model, (x,)), oracle.run(model, (x,)), strict=True))
    fused = attnopt.optimize(model, "fuse", (x,))
    assert {p.data_ptr() for p in fused.parameters()} == {p.data_ptr() for p in model.parameters()}
