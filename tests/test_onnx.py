"""ONNX export: every form gives what the reference gives, the file says what it is, and nothing half-written is left."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import oracle
import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import attnopt
from attnopt import onnx_choice, onnx_verify
from attnopt.backends import Blocked, Reference
from attnopt.calling import Signature
from attnopt.compare import TOLERANCE, difference
from attnopt.onnx_bands import Band, bands
from attnopt.onnx_export import export_onnx
from attnopt.origin import Origin
from attnopt.passes import LocalWindow, Sparse
from attnopt.patterns import Blocks, Causal, Dilated, Full, Global, Pattern, PerHead, Sinks, Strided, Window
from attnopt.report import Report
from attnopt.spec import AttentionSpec

HIDING = Sinks(2) & ~Sinks(3) | Window(3, 0) & ~Window(1, 1)  # some queries see nothing
PATTERNS: list[Pattern] = [
    Full(),
    Causal(),
    Window(3, 2),
    Causal() & (Window(40, 0) | Sinks(4)),
    Window(7, 7) | Sinks(3),
    Dilated(3, 1, 4),
    Strided(3) & Causal(),
    Blocks(16, 2),
    Global((0, 5)) | Window(4, 4),
    HIDING,
    PerHead({0: Window(3, 0), 2: Causal()}),
    PerHead({(0, 1): Blocks(8)}, default=Window(5, 5) | Sinks(1)),
]


class Core(nn.Module):
    """One attention between its operands; ``by_token``: as projections give them, [B, L, H, D]."""

    def __init__(self, spec: AttentionSpec, roles: tuple[str, ...], by_token: bool) -> None:
        super().__init__()
        self.spec, self.roles, self.by_token = spec, roles, by_token

    def forward(self, *operands: Tensor) -> Tensor:
        x = dict(zip(self.roles, operands, strict=True))
        q, k, v = (x[role].transpose(1, 2) if self.by_token else x[role] for role in "qkv")
        rest = {role: x.get(role) for role in ("bias", "mask", "sinks")}
        o = Blocked().lower(self.spec)(q, k, v, **rest)
        return o.transpose(1, 2) if self.by_token else o


FULL = Full()


def make_spec(pattern: Pattern = FULL, kv_of_head: tuple[int, ...] = (0, 1, 2, 3), dim: int = 8, **more: Any) -> Any:
    heads, kv_heads = tuple(range(len(kv_of_head))), tuple(range(max(kv_of_head) + 1))
    options = {"value_dim": dim, "scale": dim**-0.5} | more
    return AttentionSpec(heads, kv_heads, kv_of_head, dim, pattern=pattern, **options)


def operands(
    spec: AttentionSpec,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    thin: tuple[int, ...] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random operands; the axes in ``thin`` of bias and mask are to be broadcast."""
    batch, q_len, kv_len = sizes
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    x = {
        "q": normal(batch, spec.num_heads, q_len, spec.head_dim),
        "k": normal(batch, spec.num_kv_heads, kv_len, spec.head_dim),
        "v": normal(batch, spec.num_kv_heads, kv_len, spec.value_dim),
    }
    full = (batch, spec.num_heads, q_len, kv_len)
    pairs = [1 if axis in thin else n for axis, n in enumerate(full)]
    if spec.has_bias:
        x["bias"] = normal(*pairs)
    if spec.has_mask:
        x["mask"] = torch.rand(*pairs, generator=random) > 0.4
    if spec.has_sinks:
        x["sinks"] = normal(1, spec.num_heads, 1, 1)
    return x


def laid_out(x: dict[str, Tensor], by_token: bool) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2).contiguous() if by_token and role in "qkv" else t for role, t in x.items())


def captured(core: nn.Module, args: tuple[Tensor, ...], shapes: Any = None) -> tuple[torch.fx.GraphModule, Origin]:
    program = torch.export.export(core, args, dynamic_shapes=shapes, strict=False).run_decompositions({})
    return program.module(), Origin(Report(sites=()), (), Signature((), (), ()), args, {})


def moving(x: dict[str, Tensor], by_token: bool, is_square: bool) -> Any:
    """Dynamic batch and lengths for the operands."""
    batch, q_len = Dim("batch"), Dim("q_len")
    kv_len = q_len if is_square else Dim("kv_len")
    axes: dict[str, dict[int, Any]] = {
        "q": {0: batch, 2: q_len},
        "k": {0: batch, 2: kv_len},
        "v": {0: batch, 2: kv_len},
        "bias": {0: batch, 2: q_len, 3: kv_len},
        "mask": {0: batch, 2: q_len, 3: kv_len},
    }
    found = []
    for role, t in x.items():
        named = {axis: d for axis, d in axes.get(role, {}).items() if t.shape[axis] != 1}
        found.append({(1 if by_token and role in "qkv" and axis == 2 else axis): d for axis, d in named.items()})
    return (tuple(found),)


def forms(path: Path) -> list[str]:
    said = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    return [site["form"] for site in json.loads(said["attnopt.attention"])]


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(o) for o in session.run(None, feed)]


def check(
    path: Path,
    spec: AttentionSpec,
    sizes: tuple[int, int, int],
    *,
    others: tuple[tuple[int, int, int], ...] = (),
    by_token: bool = True,
    flavor: Any = "onnxruntime",
    dtype: torch.dtype = torch.float32,
    thin: tuple[int, ...] = (),
) -> list[str]:
    """Export, run at all sizes, compare with the reference; the forms that were taken."""
    x = operands(spec, sizes, dtype, thin)
    is_square = sizes[1] == sizes[2]
    args = laid_out(x, by_token)
    gm, origin = captured(Core(spec, tuple(x), by_token), args, moving(x, by_token, is_square) if others else None)
    export_onnx(gm, origin, path, flavor=flavor, opset=None, external_data=False, verify=False)
    onnx.checker.check_model(str(path))
    for at in (sizes, *others):
        y = operands(spec, at, dtype, thin, seed=sum(at))
        want = Reference().lower(spec)(y["q"], y["k"], y["v"], **{r: y.get(r) for r in ("bias", "mask", "sinks")})
        got = run(path, laid_out(y, by_token))[0]
        assert difference([got], [want.transpose(1, 2) if by_token else want]) <= TOLERANCE[dtype], (spec, at)
    return forms(path)


@pytest.fixture
def sparse_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of long sequences, at lengths that a test can afford."""
    monkeypatch.setattr(onnx_choice, "ITERATION", 0.0)
    monkeypatch.setattr(onnx_choice, "DENSE", 100.0)
    onnx_choice._gathered.cache_clear()


# ---------------------------------------------------------------- every form equals the reference
@pytest.mark.parametrize("by_token", [True, False], ids=["by_token", "by_head"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.usefixtures("sparse_pays")
def test_sparse_forms_at_fixed_lengths(pattern: Pattern, by_token: bool, tmp_path: Path) -> None:
    taken = check(tmp_path / "m.onnx", make_spec(pattern), (2, 150, 150), by_token=by_token)
    wanted = "per head" if pattern.is_per_head else "blocks" if bands(pattern) else "gathered"
    assert taken == ["MultiHeadAttention" if pattern == Full() else wanted]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dynamic_lengths(pattern: Pattern, tmp_path: Path) -> None:
    check(tmp_path / "m.onnx", make_spec(pattern), (2, 70, 70), others=((1, 130, 130), (3, 1, 1), (2, 300, 300)))


@pytest.mark.parametrize("pattern", [Causal(), Window(3, 2), Causal() & (Window(9, 0) | Sinks(4))], ids=str)
def test_fewer_and_more_queries_than_keys(pattern: Pattern, tmp_path: Path) -> None:
    others = ((2, 1, 64), (1, 64, 65), (1, 5, 300), (1, 90, 37))
    check(tmp_path / "m.onnx", make_spec(pattern), (2, 37, 90), others=others, by_token=False)


@pytest.mark.parametrize("pattern", [Full(), Window(9, 0) | Sinks(2), Blocks(16, 2), PATTERNS[-1]], ids=str)
@pytest.mark.parametrize("thin", [(), (0, 1), (2,), (1, 2), (0, 1, 3)], ids=str)
@pytest.mark.usefixtures("sparse_pays")
def test_masks_and_biases_with_broadcast_axes(pattern: Pattern, thin: tuple[int, ...], tmp_path: Path) -> None:
    is_static = bool(thin) or pattern.is_per_head
    spec = make_spec(pattern, (0, 0, 1, 1), has_bias=True, has_mask=True, has_sinks=bool(thin), softcap=2.0)
    check(tmp_path / "m.onnx", spec, (2, 70, 70), others=() if is_static else ((1, 33, 33),), thin=thin)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    kv_of_head=st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 150), st.integers(1, 300)),
    dim=st.sampled_from([8, 7]),
    value_dim=st.sampled_from([8, 5]),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([0.4, -0.3]),
    flavor=st.sampled_from(["onnxruntime", "standard"]),
    is_square=st.booleans(),
    by_token=st.booleans(),
)
@pytest.mark.usefixtures("sparse_pays")
def test_random_specs(
    tmp_path: Path, pattern: Pattern, kv_of_head: tuple[int, ...], sizes: Any, dim: int, value_dim: int, has: Any,
    softcap: float | None, scale: float, flavor: str, is_square: bool, by_token: bool,
) -> None:  # fmt: skip
    names = dict(zip(("has_bias", "has_mask", "has_sinks"), has, strict=True))
    spec = make_spec(pattern, kv_of_head, dim, value_dim=value_dim, softcap=softcap, scale=scale, **names)
    batch, q_len, kv_len = sizes
    at = (batch, q_len, q_len if is_square else kv_len)
    check(tmp_path / "m.onnx", spec, at, flavor=flavor, by_token=by_token)


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(20, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("sparse_pays")
def test_other_precisions(pattern: Pattern, dtype: torch.dtype, tmp_path: Path) -> None:
    check(tmp_path / "m.onnx", make_spec(pattern, has_bias=pattern == Full()), (1, 70, 70), dtype=dtype)


# ---------------------------------------------------------------- which form is taken
@pytest.mark.parametrize(
    ("spec", "length", "flavor", "form"),
    [
        (make_spec(dim=64), 300, "onnxruntime", "MultiHeadAttention"),
        (make_spec(dim=63), 300, "onnxruntime", "MultiHeadAttention"),
        (make_spec(dim=64), 300, "standard", "Attention"),
        (make_spec(dim=64), 32, "onnxruntime", "Attention"),
        (make_spec(dim=64, softcap=3.0), 300, "onnxruntime", "Attention"),
        (make_spec(Causal(), dim=8), 1100, "onnxruntime", "GroupQueryAttention"),
        (make_spec(Causal(), (0, 0, 1, 1), dim=8, softcap=2.0), 1100, "onnxruntime", "GroupQueryAttention"),
        (make_spec(Causal(), dim=12), 1100, "onnxruntime", "blocks"),
        (make_spec(Causal(), dim=8), 1100, "standard", "blocks"),
        (make_spec(Causal(), (0, 1, 0, 1), dim=8), 1100, "onnxruntime", "blocks"),
        (make_spec(Window(2, 0)), 16, "onnxruntime", "Attention"),
    ],
    ids=str,
)
def test_the_form_that_is_taken(spec: AttentionSpec, length: int, flavor: Any, form: str, tmp_path: Path) -> None:
    assert check(tmp_path / "m.onnx", spec, (1, length, length), flavor=flavor) == [form]


def test_group_query_attention_at_dynamic_lengths(tmp_path: Path) -> None:
    spec = make_spec(Causal(), (0, 0, 1, 1))
    assert check(tmp_path / "m.onnx", spec, (2, 1030, 1030), others=((1, 1, 1), (3, 70, 70))) == ["GroupQueryAttention"]


def test_the_standard_flavor_has_no_other_operators(tmp_path: Path) -> None:
    check(tmp_path / "m.onnx", make_spec(Causal(), dim=8), (1, 1100, 1100), flavor="standard")
    assert {i.domain for i in onnx.load(tmp_path / "m.onnx").opset_import} == {""}


def test_bands() -> None:
    assert bands(Causal() & (Window(9, 3) | Sinks(4))) == (Band(-9, 0), Band(high=0, first=4))
    assert bands(Dilated(3, 1, 4) & Strided(6)) == (Band(-12, 4, 12),)
    assert bands(Window(3, 3) | Window(1, 1)) == (Band(-3, 3),)
    assert bands(Blocks(4) & Causal()) is None


# ---------------------------------------------------------------- torch's own operator
class Plain(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *operands: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*operands, **self.options)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((3, 9, 8), (3, 11, 8), (3, 11, 8)), {}),
        (((3, 9, 8), (3, 11, 8), (3, 11, 8), (9, 11)), {}),
        (((2, 3, 4, 9, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8)), {"is_causal": True}),
        (((2, 3, 4, 9, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8), (3, 1, 9, 9)), {"scale": 0.3}),
        (((2, 4, 9, 8), (2, 4, 12, 8), (2, 4, 12, 8)), {"is_causal": True}),
        (((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8)), {"enable_gqa": True}),
        (((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)), {"enable_gqa": True}),
    ],
    ids=str,
)
def test_scaled_dot_product_attention(shapes: Any, options: dict[str, Any], tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(*shape, generator=random) for shape in shapes)
    gm, origin = captured(Plain(**options), args)
    export_onnx(gm, origin, tmp_path / "m.onnx", flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    oracle.assert_same(run(tmp_path / "m.onnx", args), [Plain(**options)(*args)])


@pytest.mark.parametrize("floor", [-torch.inf, torch.finfo(torch.float32).min, -1e4], ids=str)
def test_rows_that_see_nothing(floor: float, tmp_path: Path) -> None:
    """Zeros under -inf, the mean of all values under a large number: as torch has it, never NaN."""
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 8, generator=random).unbind()
    mask = torch.zeros(1, 1, 300, 300)
    mask[:, :, :2] = floor
    mask[:, :, 2:, 40:] = floor
    gm, origin = captured(Plain(), (q, k, v, mask))
    export_onnx(gm, origin, tmp_path / "m.onnx", flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    oracle.assert_same(run(tmp_path / "m.onnx", (q, k, v, mask)), [Plain()(q, k, v, mask)])


# ---------------------------------------------------------------- whole models
class Encoder(nn.Module):
    """Two layers of attention."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "out": nn.Linear(dim, dim)}) for _ in "ab"
        )
        self.heads = heads

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            o = functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["out"](o.transpose(1, 2).flatten(2))
        return {"hidden": x, "mean": x.mean(1)}


@pytest.fixture
def fast() -> attnopt.OptimizedModel:
    torch.manual_seed(0)
    return attnopt.optimize(
        Encoder().eval(), LocalWindow(4), (torch.randn(2, 40, 32),), dynamic_shapes="auto", backend="sdpa"
    )


@pytest.mark.parametrize("flavor", ["onnxruntime", "standard"])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_windows_lose_their_masks(flavor: Any, backend: str, tmp_path: Path) -> None:
    """A mask that torch needs is not in the file, whichever backend put the pattern into the graph."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 40, 32)
    fast = attnopt.optimize(model, LocalWindow(4), (x,), dynamic_shapes="auto", backend=backend)
    fast.export_onnx(tmp_path / "m.onnx", flavor=flavor)
    assert forms(tmp_path / "m.onnx") == ["blocks", "blocks"]
    for size in ((2, 40, 32), (1, 7, 32), (3, 300, 32)):
        x = torch.randn(size)
        oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))


def test_names_and_metadata(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    fast.export_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["hidden", "mean"]
    said = {p.key: p.value for p in model.metadata_props}
    assert said["attnopt.version"] == attnopt.__version__
    assert said["attnopt.flavor"] == "onnxruntime"
    assert json.loads(said["attnopt.policy"])["*"][0]["pass"] == "local-window"
    assert Report.from_json(json.loads(said["attnopt.report"])).headline == fast.report.headline
    assert [s["pattern"] for s in json.loads(said["attnopt.attention"])] == ["Window(left=4, right=4)"] * 2


@pytest.mark.parametrize("name", ["electra", "qwen3", "mbart"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    entry = zoo.BY_NAME[name]
    model, args, kwargs = entry.build()
    shapes = "auto" if entry.dynamic else None
    fast = attnopt.optimize(model, LocalWindow(3, 0), args, kwargs, dynamic_shapes=shapes, backend="blocked")
    fast.export_onnx(tmp_path / "m.onnx")
    assert len(forms(tmp_path / "m.onnx")) == len(fast.sites)


def test_a_sparse_pattern_per_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(1, 40, 32)
    fast = attnopt.optimize(model, Sparse(PerHead({1: Blocks(8)}, default=Global((0,)) | Window(2))), (x,))
    fast.export_onnx(tmp_path / "m.onnx")
    oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))


# ---------------------------------------------------------------- files
def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_external_data(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    x = torch.randn(2, 40, 32)
    for _ in range(2):  # the second takes the first one's place
        fast.export_onnx(tmp_path / "m.onnx", external_data=True)
        (data,) = tmp_path.glob("m.onnx.*.data")
        assert names(tmp_path) == ["m.onnx", data.name]
        oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))
    fast.export_onnx(tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("external", [True, False])
def test_a_full_disk_leaves_the_older_model(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    fast.export_onnx(tmp_path / "m.onnx", external_data=external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(attnopt.AttnoptError, match="No space left"):
                fast.export_onnx(tmp_path / "m.onnx", external_data=external)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupted_export_leaves_nothing(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_verify, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert names(tmp_path) == []


def test_a_read_only_folder(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(attnopt.AttnoptError, match="ermission"):
            fast.export_onnx(tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("folder", ["/proc", "no/such/place"])
def test_where_nothing_can_be_written(fast: attnopt.OptimizedModel, folder: str, tmp_path: Path) -> None:
    for external in (True, False):
        with pytest.raises(attnopt.AttnoptError, match="cannot write"):
            fast.export_onnx(tmp_path / folder / "m.onnx", external_data=external)


def test_disagreement_names_the_first_site(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is off by one in the second attention alone."""
    from attnopt import onnx_blocks

    honest, turn = onnx_blocks._inside, [0]

    def off_by_one(b: Any, site: Any, found: Any, *rest: Any) -> Any:
        turn[0] += 1
        wrong = [Band(band.low + 1, band.high) for band in found] if turn[0] == 2 else found
        table = honest(b, site, found, *rest)
        return table if turn[0] != 2 else b.op("And", table, onnx_blocks._seen(b, wrong, rest[0], *rest[1:3]))

    monkeypatch.setattr(onnx_blocks, "_inside", off_by_one)
    with pytest.raises(attnopt.ExportError, match="other numbers than torch") as caught:
        fast.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert caught.value.site == fast.sites[1].name
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flavor": "tensorrt"}, "flavor 'tensorrt'"),
        ({"opset": 26}, "opset 26"),
        ({"opset": 20}, "opset 20"),
        ({"external_data": "yes"}, "external_data='yes'"),
    ],
    ids=str,
)
def test_wrong_options(fast: attnopt.OptimizedModel, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        fast.export_onnx(tmp_path / "m.onnx", **options)
    assert names(tmp_path) == []
