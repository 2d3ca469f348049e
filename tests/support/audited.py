"""A small decoder or encoder whose attention has whatever its settings say, and exports of it; for ``attnopt.diff``."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 40, 12


@dataclass(frozen=True)
class Layer:
    """``window``: keys that a query sees, itself included; ``turn``: the base of rotary positions, None for none; ``shift``: of
    those; ``tiled``: query head h reads K/V head h % kv; ``zeroed``: heads without values; ``order`` of the heads."""

    heads: int = 4
    kv: int = 2
    dim: int = 8
    causal: bool = True
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float = 8**-0.5
    alibi: float = 0.0
    turn: float | None = 100.0
    shift: int = 0
    normed: bool = False
    padding: bool = True
    tiled: bool = False
    zeroed: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    skipped: bool = False


class Attention(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        width = layer.heads * layer.dim
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, layer.kv * layer.dim) for _ in "kv")
        self.q_norm, self.k_norm = (nn.Parameter(torch.rand(layer.dim) + 0.5) for _ in "qk")
        self.sinks = nn.Parameter(torch.randn(layer.heads))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        s = self.layer
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, -1, s.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if s.normed:
            q, k = (
                t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * w
                for t, w in ((q, self.q_norm), (k, self.k_norm))
            )
        if s.turn is not None:
            q, k = self.turned(q), self.turned(k)
        k, v = self.shared(k), self.shared(v)
        if s.order is not None:
            q, k, v = (t[:, list(s.order)] for t in (q, k, v))
        if s.zeroed:
            v = v * torch.tensor([0.0 if h in s.zeroed else 1.0 for h in range(s.heads)]).view(1, -1, 1, 1)
        scores = q @ k.transpose(-1, -2) * s.scale
        if s.softcap is not None:
            scores = torch.tanh(scores / s.softcap) * s.softcap
        i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
        if s.alibi:
            slopes = s.alibi * 2.0 ** -torch.arange(1, s.heads + 1).float()
            scores = scores + slopes.view(1, -1, 1, 1) * (j - i).float()
        seen = torch.ones(L, L, dtype=torch.bool)
        if s.causal:
            seen = seen & (j <= i)
        if s.window is not None:
            seen = seen & (j > i - s.window) & (j < i + s.window)
        seen = seen[None, None]
        if s.padding:
            seen = seen & mask[:, None, None, :].bool()
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if s.sinks:
            sinks = self.sinks.view(1, -1, 1, 1).expand(B, -1, L, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(B, L, -1))

    def shared(self, x: Tensor) -> Tensor:
        s = self.layer
        times = s.heads // s.kv
        if times == 1:
            return x
        B, G, L, D = x.shape
        if s.tiled:
            return x.unsqueeze(1).expand(B, times, G, L, D).reshape(B, s.heads, L, D)
        return x.unsqueeze(2).expand(B, G, times, L, D).reshape(B, s.heads, L, D)

    def turned(self, x: Tensor) -> Tensor:
        s = self.layer
        assert s.turn is not None
        rates = s.turn ** (-torch.arange(0, s.dim, 2).float() / s.dim)
        angles = (torch.arange(x.shape[2]) + s.shift)[:, None] * rates
        if s.shift:  # positions that are off for queries and keys alike change nothing; twice as far apart they do
            angles = angles * 2
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin


class Model(nn.Module):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = layers[0].heads * layers[0].dim
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Attention(s) for s in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        for p in self.layers.parameters():
            p.data.mul_(1.7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            if not layer.layer.skipped:
                x = x + layer(norm(x), attention_mask)
        return x


def inputs(batch: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones(batch, length, dtype=torch.long)


def changed(model: Model, at: int, **settings: Any) -> Model:
    """A copy with the same weights in which one attention is another."""
    made = copy.deepcopy(model)
    layer: Any = made.layers[at]
    layer.layer = replace(layer.layer, **settings)
    return made


# ---------------------------------------------------------------- exporters
NAMES = ["input_ids", "attention_mask"]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def by_dynamo(
    model: nn.Module, args: tuple[Any, ...], path: Path, opset: int = 18, names: list[str] = NAMES, is_free: bool = True
) -> Path:
    free: dict[str, Any] = {"dynamic_shapes": _free(model, args)} if is_free else {}
    with _quietly():
        torch.onnx.export(
            model.eval(), args, str(path), dynamo=True, opset_version=opset, input_names=names, verbose=False, **free
        )
    return path


def _free(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """Batch and length of each input, also of a model that takes any number of them."""
    axes = tuple(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for _ in args)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return (axes,) if kinds == [inspect.Parameter.VAR_POSITIONAL] else axes


def by_script(
    model: nn.Module,
    args: tuple[Any, ...],
    path: Path,
    names: list[str] = NAMES,
    free: tuple[str, ...] = ("batch", "length"),
) -> Path:
    axes = {name: dict(enumerate(free)) for name in names}
    with _quietly():
        torch.onnx.export(
            model.eval(), args, str(path), dynamo=False, opset_version=17, dynamic_axes=axes, input_names=names
        )
    return path


def at_one_size(model: nn.Module, args: tuple[Any, ...], path: Path) -> Path:
    return by_dynamo(model, args, path, is_free=False)


def by_onnxscript(model: nn.Module, args: tuple[Any, ...], path: Path) -> Path:
    """torch's exporter, then onnxscript's fusions for ONNX Runtime."""
    return fused_by_onnxscript(by_dynamo(model, args, path))


def fused_by_onnxscript(path: Path) -> Path:
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with _quietly():
        made: Any = optimize_for_ort(onnx_ir.load(str(path)))
        onnx_ir.save(made[0] if isinstance(made, tuple) else made, str(path))
    return path


def by_runtime(model: nn.Module, args: tuple[Any, ...], path: Path, kind: str = "bert") -> Path:
    """The TorchScript exporter, then the optimizer of ``onnxruntime.transformers``."""
    return fused_by_runtime(by_script(model, args, path), kind)


def fused_by_runtime(path: Path, kind: str) -> Path:
    from onnxruntime.transformers import optimizer

    with _quietly():
        made = optimizer.optimize_model(str(path), kind, num_heads=0, hidden_size=0, opt_level=0)
        made.save_model_to_file(str(path))
    return path


def by_session(model: nn.Module, args: tuple[Any, ...], path: Path) -> Path:
    return fused_by_session(by_dynamo(model, args, path.with_suffix(".plain.onnx")), path)


def fused_by_session(plain: Path, path: Path) -> Path:
    """ONNX Runtime's own graph optimizations, as it writes them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    return path


def quantized(model: nn.Module, args: tuple[Any, ...], path: Path) -> Path:
    return in_eight_bits(by_script(model, args, path.with_suffix(".plain.onnx")), path)


def in_eight_bits(plain: Path, path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    with _quietly():
        quantize_dynamic(str(plain), str(path), op_types_to_quantize=["MatMul", "Gemm"])
    return path


Exporter = Callable[[nn.Module, tuple[Any, ...], Path], Path]
EXPORTERS: dict[str, Exporter] = {
    "dynamo-18": by_dynamo,
    "dynamo-20": lambda m, a, p: by_dynamo(m, a, p, 20),
    "dynamo-23": lambda m, a, p: by_dynamo(m, a, p, 23),
    "script-17": by_script,
    "one-size": at_one_size,
    "onnxscript": by_onnxscript,
    "runtime-bert": by_runtime,
    "runtime-gpt2": lambda m, a, p: by_runtime(m, a, p, "gpt2"),
    "session": by_session,
    "quantized": quantized,
}


# ---------------------------------------------------------------- faults
@dataclass(frozen=True)
class Fault:
    """What an exporter loses: ``layer`` becomes one with ``lost``; ``kind``: how it is to be named."""

    kind: str
    layer: Layer
    lost: dict[str, Any]


_PLAIN = Layer()
_MANY = Layer(kv=4)
_BOTH = Layer(causal=False)
FAULTS: dict[str, Fault] = {
    "window": Fault("window", Layer(window=4), {"window": None}),
    "window-second-layer": Fault("window", Layer(window=5), {"window": None}),
    "window-beyond-the-example": Fault("window", Layer(window=30), {"window": None}),
    "window-4096": Fault("window", Layer(window=4096), {"window": None}),
    "window-off-by-one": Fault("window", Layer(window=5), {"window": 6}),
    "window-off-by-one-less": Fault("window", Layer(window=5), {"window": 4}),
    "window-off-by-one-beyond": Fault("window", Layer(window=40), {"window": 41}),
    "window-added": Fault("window", _PLAIN, {"window": 6}),
    "window-of-an-encoder": Fault("window", Layer(window=4, causal=False), {"window": None}),
    "sinks": Fault("sinks", Layer(sinks=True), {"sinks": False}),
    "sinks-and-window": Fault("sinks", Layer(sinks=True, window=4), {"sinks": False}),
    "sinks-added": Fault("sinks", _PLAIN, {"sinks": True}),
    "softcap": Fault("softcap", Layer(softcap=5.0), {"softcap": None}),
    "softcap-changed": Fault("softcap", Layer(softcap=5.0), {"softcap": 6.0}),
    "softcap-second-layer": Fault("softcap", Layer(softcap=8.0, window=4), {"softcap": None}),
    "scale": Fault("scale", _PLAIN, {"scale": 0.25}),
    "scale-one": Fault("scale", Layer(scale=0.3, turn=None), {"scale": 1.0}),
    "scale-slightly": Fault("scale", _PLAIN, {"scale": 8**-0.5 * 1.05}),
    "causal": Fault("causal", _PLAIN, {"causal": False}),
    "causal-second-layer": Fault("causal", _MANY, {"causal": False}),
    "causal-added": Fault("causal", _BOTH, {"causal": True}),
    "padding": Fault("padding", _BOTH, {"padding": False}),
    "padding-of-a-decoder": Fault("padding", _PLAIN, {"padding": False}),
    "alibi": Fault("bias", Layer(alibi=1.0, turn=None), {"alibi": 0.0}),
    "alibi-changed": Fault("bias", Layer(alibi=1.0, turn=None), {"alibi": 0.5}),
    "alibi-of-an-encoder": Fault("bias", Layer(alibi=0.5, turn=None, causal=False), {"alibi": 0.0}),
    "kv-tiled": Fault("kv-map", _PLAIN, {"tiled": True}),
    "kv-repeated": Fault("kv-map", Layer(tiled=True), {"tiled": False}),
    "heads-zeroed": Fault("heads", _MANY, {"zeroed": (2,)}),
    "heads-zeroed-two": Fault("heads", Layer(kv=4, turn=None), {"zeroed": (0, 3)}),
    "heads-swapped": Fault("head-order", _MANY, {"order": (1, 0, 2, 3)}),
    "heads-reversed": Fault("head-order", Layer(kv=4, turn=None), {"order": (3, 2, 1, 0)}),
    "rope-base": Fault("positions", _PLAIN, {"turn": 10.0}),
    "rope-dropped": Fault("positions", _PLAIN, {"turn": None}),
    "rope-scaled": Fault("positions", _MANY, {"shift": 1}),
    "norm": Fault("queries", Layer(normed=True), {"normed": False}),
}
