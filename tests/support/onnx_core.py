"""One attention as an ONNX file, and its comparison with the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from attnopt.backends import Blocked, Reference
from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import TOLERANCE, difference
from attnopt.capture.signature import Signature
from attnopt.compiler.origin import Origin
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.export import export_onnx
from attnopt.patterns import Blocks, Causal, Dilated, Full, Global, Pattern, PerHead, Sinks, Strided, Window
from attnopt.report.report import Report

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
    Blocks(16, 3, edge="shift"),
    Global((0, 5)) | Window(4, 4),
    HIDING,
    PerHead({0: Window(3, 0), 2: Causal()}),
    PerHead({(1, 2): Blocks(8)}, default=Window(5, 5) | Sinks(1)),
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
    return program.module(), Origin(Report(sites=()), (), Signature((), (), ()), CallInputs(tuple(args), {}))


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
