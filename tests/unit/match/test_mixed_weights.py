"""Models that mix a map which no input changes into their attention weights, as ConViT does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
import zoo
from sites import a_site
from torch import Tensor, nn

import attnopt
from attnopt.errors import ConversionError, ExportError
from attnopt.onnx.export.decoder_inputs import check_edits
from attnopt.passes import GroupedQuery, HeadPatch, LocalWindow, MixMap, PruneHeads, RouteHeads, ScaleHeads, Steer

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
B, H, N, D, WIDTH = 3, 4, 9, 3, 12


@dataclass(frozen=True)
class Gpsa:
    """How gated positional self-attention is written."""

    mix: str = "sum"  # sum, swapped, commuted, lerp, lerp-back, chosen, by-hand, minus, parts, in-place, over, bias
    gate: str = "sigmoid"  # sigmoid, plain (a parameter), buffer, number, one (for all heads)
    places: str = (
        "projected"  # projected (for each sequence), once, table, alibi, raw (no softmax), all-heads, all-queries
    )
    divide: str = ""  # unsqueezed, keepdim, in-place
    groups: int = H
    cross: bool = False
    causal: bool = False
    core: str = "matmul"  # matmul, einsum, bmm


class Attention(nn.Module):
    def __init__(self, s: Gpsa) -> None:
        super().__init__()
        self.s, random = s, torch.Generator().manual_seed(1)

        def noise(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=random))

        self.q, self.out = nn.Linear(WIDTH, H * D), nn.Linear(H * D, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, s.groups * D) for _ in "kv")
        self.gating, self.one, self.plain = noise(H), noise(1), nn.Parameter(torch.linspace(0.1, 0.7, H))
        self.register_buffer("gates", torch.linspace(0.2, 0.8, H))
        self.place, self.table, self.raw = nn.Linear(3, H), noise(H, N, self.keys), noise(H, N, self.keys)
        relative = torch.randn(1, N, self.keys, 3, generator=random)
        self.register_buffer("relative", relative, persistent=False)
        self.visible: Tensor | None = None

    @property
    def keys(self) -> int:
        return 5 if self.s.cross else N

    def gate(self) -> Any:
        match self.s.gate:
            case "sigmoid":
                return torch.sigmoid(self.gating.view(1, -1, 1, 1))
            case "one":
                return torch.sigmoid(self.one)
            case "plain":
                return self.plain[:, None, None]
            case "buffer":
                return self.gates.reshape(H, 1, 1)
        return 0.375

    def map(self, batch: int) -> Tensor:
        match self.s.places:
            case "projected":
                return self.place(self.relative.expand(batch, -1, -1, -1)).permute(0, 3, 1, 2).softmax(-1)
            case "once":
                return self.place(self.relative).permute(0, 3, 1, 2).softmax(-1)
            case "table":
                return self.table.softmax(-1)
            case "raw":
                return self.raw
            case "all-heads":
                return self.table[0].softmax(-1)
            case "all-queries":
                return self.table[:, :1].softmax(-1)
        far = (torch.arange(N)[:, None] - torch.arange(self.keys)).abs()
        return (-far * torch.arange(1.0, H + 1)[:, None, None]).softmax(-1)

    def mixed(self, p: Tensor, m: Tensor, g: Any) -> Tensor:
        match self.s.mix:
            case "swapped":
                return g * m + (1.0 - g) * p
            case "commuted":
                return p * (1 - g) + m * g
            case "lerp":
                return torch.lerp(p, m.expand_as(p), g)
            case "lerp-back":
                return torch.lerp(m.expand_as(p), p, 1 - g)
            case "by-hand":
                return p + g * (m - p)
            case "minus":
                return p - g * p - (-(g * m))
            case "parts":
                return torch.add(p * (1 - g), m, alpha=2) - (2 - g) * m
            case "in-place":
                weights = p.clone()
                weights *= 1 - g
                weights += g * m
                return weights
            case "chosen":  # as torch.lerp is exported to ONNX
                w = torch.as_tensor(g)
                return torch.where(w < 0.5, p + w * (m - p), m - (m - p) * (1 - w))
            case "bias":
                return (1.0 - g) * p + g * m + 0.01 * self.plain[:, None, None]
            case "over":
                return (p / (1 / (1 - g)) + m / (1 / g)) / 1.0
        return (1.0 - g) * p + g * m

    def divided(self, weights: Tensor) -> Tensor:
        match self.s.divide:
            case "unsqueezed":
                weights = weights / weights.sum(dim=-1).unsqueeze(-1)
            case "keepdim":
                weights = weights / weights.sum(-1, keepdim=True)
            case "in-place":
                weights /= weights.sum(dim=-1).unsqueeze(-1)
        return weights

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = (f(source).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(H // self.s.groups, 1) for t in (k, v))
        scores = q @ k.mT * D**-0.5
        if self.s.causal:
            scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible, -torch.inf)
        weights = self.divided(self.mixed(scores.softmax(-1), self.map(len(x)), self.gate()))
        if self.s.core == "einsum":
            o = torch.einsum("bhls,bhsd->blhd", weights, v)
        elif self.s.core == "bmm":
            o = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, H)).transpose(1, 2)
        else:
            o = (weights @ v).transpose(1, 2)
        return self.out(o.flatten(2))


def inputs(s: Gpsa, batch: int = B) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, N, WIDTH, generator=random)
    return (x, torch.randn(batch, 5, WIDTH, generator=random)) if s.cross else (x,)


READ = [
    Gpsa(),
    *(
        Gpsa(mix)
        for mix in ("swapped", "commuted", "lerp", "lerp-back", "by-hand", "minus", "in-place", "over", "bias")
    ),
    Gpsa("parts", "number", "table"),
    Gpsa("chosen", "plain", "table", "keepdim"),
    Gpsa("bias", "plain", "raw", "keepdim"),
    *(Gpsa("commuted", gate) for gate in ("plain", "buffer", "number", "one")),
    *(Gpsa("sum", "sigmoid", places) for places in ("once", "table", "alibi", "raw", "all-heads", "all-queries")),
    *(Gpsa("sum", "plain", "projected", divide) for divide in ("unsqueezed", "keepdim", "in-place")),
    Gpsa("lerp", "one", "raw", "keepdim"),  # rows of any sum
    Gpsa("by-hand", "number", "raw", "in-place"),
    Gpsa("sum", "sigmoid", "table", "keepdim", groups=2),
    Gpsa("sum", "buffer", "projected", "in-place", cross=True),
    Gpsa("sum", "sigmoid", "once", "in-place", causal=True),
    Gpsa(core="einsum"),
    Gpsa("swapped", "plain", "table", "keepdim", core="bmm"),
]


# ---------------------------------------------------------------- reading
@pytest.mark.parametrize("s", READ, ids=str)
def test_the_map_is_read(s: Gpsa) -> None:
    model, args = Attention(s).eval(), inputs(s)
    found = attnopt.inspect(model, args)
    assert [site.spec.has_map for site in found.sites] == [True], found
    assert not found.near_misses, "the softmax of the map is a part of the attention"
    (site,) = found.sites
    assert (site.num_heads, site.num_kv_heads, site.head_dim) == (H, s.groups, D)
    assert all(site.projections[role].rows is not None for role in ("q", "k", "v", "out")), site.projections
    fast = attnopt.optimize(
        model, "fuse", args, dynamic_shapes={n: {0: torch.export.Dim("b")} for n in ("x", "memory")[: len(args)]}
    )
    for batch in (B, 1, 5):
        other = inputs(s, batch)
        oracle.assert_same(oracle.run(fast, other), oracle.run(model, other))
    assert "map" in fast.report.sites[0].spec_after


def test_a_map_that_differs_from_sequence_to_sequence() -> None:
    class Own(Attention):
        def map(self, batch: int) -> Tensor:
            return self.raw.unsqueeze(0) * torch.arange(1.0, B + 1)[:, None, None, None]

    for groups in (H, 2):
        model, args = Own(Gpsa(groups=groups, divide="keepdim")).eval(), inputs(Gpsa())
        fast = attnopt.optimize(model, [LocalWindow(20), PruneHeads(heads=[0])], args)
        assert fast.sites[0].spec.has_map
        oracle.assert_same(oracle.run(fast, args), oracle.run(without(model, {0: 0.0}), args))


def test_gates_and_places_can_be_trained() -> None:
    s = Gpsa(divide="in-place")
    model, args = Attention(s).eval(), inputs(s)
    fast = attnopt.optimize(model, "fuse", args)
    ours, own = dict(fast.named_parameters()), dict(model.named_parameters())
    shared = {id(p) for p in ours.values()}
    used = [n for n in own if n.partition(".")[0] in ("q", "k", "v", "out", "gating", "place")]
    assert shared == {id(own[n]) for n in used}, "parameters are shared, not folded"
    with torch.no_grad():
        model.gating += torch.tensor([3.0, -2.0, 1.0, 0.0])
        model.place.weight *= -1.5
    want = oracle.run(model, args)
    oracle.assert_same(oracle.run(fast, args), want)
    fast(*args).square().sum().backward()
    given = {n: own[n].grad.clone() for n in used if own[n].grad is not None}
    model.zero_grad()
    model(*args).square().sum().backward()
    for n, grad in given.items():
        oracle.assert_same([grad], [own[n].grad], n, limit=1e-4)
    assert bool(given["gating"].any())


def test_the_map_is_made_once_for_all_sequences() -> None:
    s = Gpsa(divide="in-place")
    fast = attnopt.optimize(Attention(s).eval(), "fuse", inputs(s, 5), dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    made = (n.meta.get("val") for n in fast.graph_module.graph.nodes if n.op == "call_function")
    maps = [tuple(x.shape) for x in made if isinstance(x, Tensor) and tuple(x.shape[-2:]) == (N, N)]
    assert maps
    assert set(maps) <= {(1, H, N, N), (H, N, N)}, "nothing of size [L, S] is made for each sequence"


def test_a_map_of_each_sequence_keeps_its_own_parameter() -> None:
    """Two of three are one parameter, and the third has the same values until it is trained."""

    class Stacked(Attention):
        def __init__(self) -> None:
            super().__init__(Gpsa(gate="number"))
            self.last = nn.Parameter(self.raw.detach().clone())

        def map(self, batch: int) -> Tensor:
            return torch.stack([self.raw, self.raw, self.last])

    model = Stacked().eval()
    (x,) = inputs(model.s, 3)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert fast.sites[0].spec.has_map
    with torch.no_grad():
        model.last.copy_(torch.randn(H, N, N))
    oracle.assert_same(oracle.run(fast, (x,)), oracle.run(model, (x,)))


@pytest.mark.parametrize("length", [N, 6, 14])
def test_maps_at_other_lengths(length: int) -> None:
    class Alibi(Attention):
        def map(self, batch: int) -> Tensor:
            far = (torch.arange(self.length)[:, None] - torch.arange(self.length)).abs()
            return (-far * torch.arange(1.0, H + 1)[:, None, None]).softmax(-1)

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            self.length = x.shape[1]
            return super().forward(x)

    model = Alibi(Gpsa(divide="keepdim")).eval()
    x = torch.randn(2, N, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes={"x": {1: torch.export.Dim("n", min=2)}})
    assert fast.sites[0].spec.has_map
    other = torch.randn(2, length, WIDTH)
    oracle.assert_same(oracle.run(fast, (other,)), oracle.run(model, (other,)))


# ---------------------------------------------------------------- passes
SOME = [
    Gpsa(divide="in-place"),
    Gpsa("lerp", "one", "raw", "keepdim"),
    Gpsa("sum", "sigmoid", "table", "keepdim", groups=2),
    Gpsa(places="all-heads"),
]


def without(model: Attention, gains: dict[int, float]) -> Attention:
    """The same with heads scaled where the output projection reads them."""
    made = type(model)(model.s)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        for h, gain in gains.items():
            made.out.weight[:, h * D : h * D + D] *= gain
    return made.eval()


@pytest.mark.parametrize("s", SOME, ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_passes_see_the_whole_head(s: Gpsa, backend: str) -> None:
    model, args = Attention(s).eval(), inputs(s)
    window = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 2
    for policy, gains, visible in (
        (PruneHeads(heads=[1]), {1: 0.0}, None),
        (ScaleHeads({0: 2.0, 3: -1.0}), {0: 2.0, 3: -1.0}, None),
        (HeadPatch([2]), {2: 0.0}, None),
        (LocalWindow(2), {}, window),
        ([PruneHeads(heads=[0, 2]), LocalWindow(2)], {0: 0.0, 2: 0.0}, window),
        ([LocalWindow(2), ScaleHeads({1: 3.0}), PruneHeads(heads=[3])], {1: 3.0, 3: 0.0}, window),
    ):
        by_hand = without(model, gains)
        by_hand.visible = visible
        fast = attnopt.optimize(model, policy, args, backend=backend)
        assert fast.report.sites[0].status == "rewritten", fast.report
        oracle.assert_same(oracle.run(fast, args), oracle.run(by_hand, args), str(policy))


def test_the_parameters_of_pruned_heads_are_gone() -> None:
    s = Gpsa(divide="in-place")
    model, args = Attention(s).eval(), inputs(s)
    fast = attnopt.optimize(model, PruneHeads(heads=[1, 2]), args)
    of_heads = 3 * (2 * D * WIDTH + 2 * D) + WIDTH * 2 * D + 2 * (1 + 3 + 1)
    assert sum(p.numel() for p in fast.parameters()) == of_heads + WIDTH
    assert fast.report.cost_after.flops < fast.report.cost_before.flops


@pytest.mark.slow
def test_mixed_again_and_steered_and_routed() -> None:
    s = Gpsa("sum", "number", "table")
    model, (x,) = Attention(s).eval(), inputs(s)
    maps, by = torch.randn(N, N), torch.randn(D)
    v = model.v(x).unflatten(-1, (H, D)).transpose(1, 2)
    o = (0.5 * model.table.softmax(-1) * 0 + maps) @ v
    plain = model(x)
    fast = attnopt.optimize(model, [MixMap(maps, 0.25), Steer(by, [1])], (x,))
    W = model.out.weight.unflatten(1, (H, D))
    want = 0.75 * (plain - model.out.bias) + 0.25 * model.out(o.transpose(1, 2).flatten(2)) - 0.25 * model.out.bias
    oracle.assert_same([fast(x)], [want + W[:, 1] @ by + model.out.bias])
    routed = [attnopt.optimize(model, RouteHeads([0], 1), (x,), backend=b)(x) for b in ("reference", "auto")]
    q = model.q(x).unflatten(-1, (H, D)).norm(dim=-1)[..., 1:]
    used = nn.functional.one_hot(q.argmax(-1) + 1, H).bool()
    used[..., 0] = True
    heads = attended(model, x) * used[..., None]
    oracle.assert_same([routed[0]], [model.out(heads.flatten(2))])
    oracle.assert_same([routed[1]], [routed[0]])


def attended(model: Attention, x: Tensor) -> Tensor:
    """[B, L, H, D]"""
    out, model.out = model.out, nn.Identity()  # type: ignore[assignment]
    try:
        return model(x).unflatten(-1, (H, D))
    finally:
        model.out = out


def test_grouped_values_are_read_by_the_map() -> None:
    s = Gpsa(divide="keepdim")
    model, args = Attention(s).eval(), inputs(s)
    with torch.no_grad():
        for layer in (model.k, model.v):
            for p in layer.parameters():
                pairs = p.unflatten(0, (2, 2, D))
                pairs[:, 1] = pairs[:, 0]
    for merge in ("mean", "first"):
        fast = attnopt.optimize(model, GroupedQuery(kv_heads=2, merge=merge), args)
        assert fast.sites[0].spec.num_kv_heads == 2
        oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))


def test_calibrated_passes_know_the_map() -> None:
    s = Gpsa(divide="in-place")
    model, (x,) = Attention(s).eval(), inputs(s)
    fast = attnopt.optimize(model, HeadPatch([1], "mean"), (x,), calibration=[(x,)])
    means = attended(model, x)[:, :, 1].mean((0, 1))
    W = model.out.weight.unflatten(1, (H, D))
    oracle.assert_same([fast(x)], [without(model, {1: 0.0})(x) + W[:, 1] @ means])
    scores = attnopt.head_importance(model, [(x,)])
    assert scores


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("s", SOME[:3], ids=str)
def test_saved_and_exported(s: Gpsa, tmp_path: Path) -> None:
    model, args = Attention(s).eval(), inputs(s)
    fast = attnopt.optimize(
        model,
        [PruneHeads(heads=[1])] if s.groups == H else "fuse",
        args,
        dynamic_shapes={"x": {0: torch.export.Dim("b")}},
    )
    fast.save(tmp_path / "saved")
    fast.export_onnx(tmp_path / "m.onnx")
    loaded = attnopt.load(tmp_path / "saved")
    assert [site.spec for site in loaded.sites] == [site.spec for site in fast.sites]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    by_hand = without(model, {1: 0.0}) if s.groups == H else model
    for batch in (B, 1, 5):
        (x,) = inputs(s, batch)
        want = oracle.run(by_hand, (x,))
        oracle.assert_same(oracle.run(fast, (x,)), want)
        oracle.assert_same(oracle.run(loaded, (x,)), oracle.run(fast, (x,)), limit=0.0)
        oracle.assert_same([torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})], want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("s", [Gpsa(divide="in-place"), Gpsa("lerp", "plain", "table", "keepdim")], ids=str)
def test_a_file_is_rewritten_in_place(s: Gpsa, tmp_path: Path) -> None:
    model, (x,) = Attention(s).eval(), inputs(s)
    torch.onnx.export(model, (x,), tmp_path / "own.onnx", dynamo=True, verbose=False)
    fast = attnopt.optimize(tmp_path / "own.onnx", PruneHeads(heads=[1]), (x,))
    assert [site.spec.has_map for site in fast.sites] == [True]
    fast.export_onnx(tmp_path / "fast.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "fast.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    oracle.assert_same([torch.from_numpy(y) for y in found], oracle.run(without(model, {1: 0.0}), (x,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    s = Gpsa(divide="in-place")
    model, args = Attention(s).eval().to(dtype), tuple(x.to(dtype) for x in inputs(s))
    fast = attnopt.optimize(model, "fuse", args)
    assert fast.sites[0].spec.has_map
    oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))


def test_no_class_takes_a_pattern_beside_a_map() -> None:
    s = Gpsa(divide="in-place")
    with pytest.raises(ConversionError, match="a pattern beside a map that is mixed into the weights cannot be"):
        attnopt.convert(Attention(s).eval(), LocalWindow(2), inputs(s))


# ---------------------------------------------------------------- what is none
class Other(Attention):
    """``change`` gives the weights from the softmax, the map, the gates and the input."""

    def __init__(self, change: Callable[[Attention, Tensor, Tensor, Any, Tensor], Tensor]) -> None:
        super().__init__(Gpsa("sum", "sigmoid", "table"))
        self.change = change
        self.of_input = nn.Linear(WIDTH, H)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        self.x = x
        return super().forward(x)

    def mixed(self, p: Tensor, m: Tensor, g: Any) -> Tensor:
        return self.change(self, p, m, g, self.x)


@pytest.mark.parametrize(
    "change",
    [
        lambda self, p, m, g, x: (1 - g) * p + g * self.of_input(x).transpose(1, 2)[..., None].softmax(2) * m,
        lambda self, p, m, g, x: (1 - g) * p + self.of_input(x).mT.unsqueeze(2).softmax(-1),
        lambda self, p, m, g, x: (gate := torch.sigmoid(self.of_input(x).mT[..., None])) * p + (1 - gate) * m,
        lambda self, p, m, g, x: (1 - g) * p + g * p.mT,
        lambda self, p, m, g, x: (1 - g) * p + g / 2 * (p.mT + m),
        lambda self, p, m, g, x: (1 - g) * p + g * p.roll(1, 1),
        lambda self, p, m, g, x: (1 - g) * p * m + g * m,
        lambda self, p, m, g, x: (1 - g) * p + g,
        lambda self, p, m, g, x: (1 - g) * p + g * m.sum(-1, keepdim=True),
        lambda self, p, m, g, x: (w := (1 - g) * p + g * m) / w.sum(-2, keepdim=True),
        lambda self, p, m, g, x: (w := (1 - g) * p + g * m) / w.sum((-1, -3), keepdim=True),
        lambda self, p, m, g, x: ((1 - g) * p + g * m).square(),
        lambda self, p, m, g, x: p * p + g * m,
        lambda self, p, m, g, x: 0.0 * p + g * m,
        lambda self, p, m, g, x: torch.where(m > 0.1, (1 - g) * p + g * m, 0.5),
    ],
)
def test_what_is_no_such_map(change: Any) -> None:
    model, args = Other(change).eval(), inputs(Gpsa())
    found = attnopt.inspect(model, args)
    assert not found.sites
    assert [miss.refusal.code for miss in found.near_misses][:1] == ["weights-changed"], found


class Sunk(Attention):
    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.cat([q @ k.mT, self.plain.view(1, H, 1, 1).expand(len(x), -1, N, 1)], -1)
        weights = self.divided(self.mixed(scores.softmax(-1)[..., :-1], self.map(len(x)), self.gate()))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_a_map_beside_a_sink() -> None:
    model, args = Sunk(Gpsa()).eval(), inputs(Gpsa())
    fast = attnopt.optimize(model, "fuse", args, backend="blocked")
    assert fast.sites[0].spec.has_map
    assert fast.sites[0].spec.has_sinks
    oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))
    divided = attnopt.inspect(Sunk(Gpsa(divide="keepdim")).eval(), args)
    assert [miss.refusal.code for miss in divided.near_misses][:1] == ["weights-changed"], (
        "the weights of a row sum to less than 1 beside a sink"
    )


def test_a_decoder_of_one_token_at_a_time_has_no_map() -> None:
    with pytest.raises(ExportError, match="mixed with a map, which depends on the positions"):
        check_edits([a_site(has_map=True)])


# ---------------------------------------------------------------- a real model
@pytest.mark.slow
def test_convit(tmp_path: Path) -> None:
    model = zoo.timm_model(
        "convit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, local_up_to_layer=2
    )
    with torch.no_grad():
        for block in model.blocks[:2]:  # type: ignore[union-attr, index]
            block.attn.gating_param.copy_(torch.tensor([1.0, -0.5, 2.0, 0.25]))  # type: ignore[union-attr]
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(x)  # its indices are made by the first call
    found = attnopt.inspect(model, (x,))
    assert [(s.name, s.spec.has_map) for s in found.sites] == [
        ("blocks.0.attn", True), ("blocks.1.attn", True), ("blocks.2.attn", False),
    ]  # fmt: skip
    assert not found.near_misses
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for batch in (3, 1, 4):
        other = torch.randn(batch, 3, 32, 32)
        want = oracle.run(model, (other,))
        oracle.assert_same(oracle.run(fast, (other,)), want)
        (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        oracle.assert_same([torch.from_numpy(y)], want)
    pruned = attnopt.optimize(model, {"blocks.[01].*": PruneHeads(heads=[1, 2])}, (x,))
    with torch.no_grad():
        for block in model.blocks[:2]:  # type: ignore[union-attr, index]
            block.attn.proj.weight[:, 24:72] = 0  # type: ignore[union-attr, index]
    oracle.assert_same(oracle.run(pruned, (x,)), oracle.run(model, (x,)))
