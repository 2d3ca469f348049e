"""attnopt's ONNX files in ONNX Runtime: CPU time against torch's own export, ONNX Runtime's optimizer and torch itself.

Whole models first, exact rewrites only; then one attention alone, dense and sparse, against torch's of the same causality.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, let_transformers_import, one_thread, picture, publish

import attnopt
from attnopt.backends import Blocked
from attnopt.calling import Signature
from attnopt.origin import Origin
from attnopt.patterns import BlockLayout, Causal, Full, Pattern, Sinks, Window
from attnopt.report import Report
from attnopt.spec import AttentionSpec
from attnopt.to_onnx.export import export_onnx

Built = tuple[torch.nn.Module, dict[str, Any]]
HEADS, DIM = 12, 64


# ---------------------------------------------------------------- whole models
def minilm(length: int) -> Built:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return _bert(BertModel, config, length)


def bert(length: int) -> Built:
    from transformers import BertConfig, BertModel

    return _bert(BertModel, BertConfig(), length)


def _bert(kind: Any, config: Any, length: int) -> Built:
    config.max_position_embeddings = 2048
    return kind(config, add_pooling_layer=False), {"input_ids": torch.randint(0, 30000, (1, length))}


def vit(length: int) -> Built:
    from transformers import ViTConfig, ViTModel

    side = {197: 224, 577: 384}[length]
    return ViTModel(ViTConfig(image_size=side), add_pooling_layer=False), {
        "pixel_values": torch.randn(1, 3, side, side)
    }


MODELS: dict[str, tuple[Callable[[int], Built], tuple[int, ...]]] = {
    "MiniLM-L6": (minilm, (128, 512, 2048)),
    "BERT-base": (bert, (128, 512, 2048)),
    "ViT-B/16": (vit, (197, 577)),
}


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting is not work
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    loaded = session(path)
    feed = {i.name: t.numpy() for i, t in zip(loaded.get_inputs(), tensors, strict=True)}
    return lambda: loaded.run(None, feed)


def contenders(model: torch.nn.Module, kwargs: dict[str, Any], folder: Path) -> dict[str, Callable[[], Any]]:
    from onnxruntime.transformers import optimizer

    tensors = list(kwargs.values())
    torch.onnx.export(
        model, (), kwargs=kwargs, f=str(folder / "torch.onnx"), dynamo=True, opset_version=20, verbose=False
    )
    torch.onnx.export(model, (), kwargs=kwargs, f=str(folder / "23.onnx"), dynamo=True, opset_version=23, verbose=False)
    optimized = optimizer.optimize_model(
        str(folder / "torch.onnx"), "bert", num_heads=12, hidden_size=model.config.hidden_size, opt_level=0
    )
    optimized.save_model_to_file(str(folder / "ort.onnx"))
    attnopt.optimize(model, "fuse", (), kwargs, backend="sdpa").export_onnx(folder / "attnopt.onnx")
    files = {"attnopt": "attnopt", "torch export": "torch", "torch export, opset 23": "23", "ORT optimizer": "ort"}
    calls = {name: runner(folder / f"{file}.onnx", tensors) for name, file in files.items()}
    return {"torch": lambda: model(**kwargs), **calls}


def models(rounds: int, only: str) -> Iterator[dict[str, Any]]:
    for name, (build, lengths) in MODELS.items():
        for length in lengths if only in name else ():
            torch.manual_seed(0)
            model, kwargs = build(length)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                calls = contenders(model.eval(), kwargs, Path(folder))
                times = interleaved(calls, max(3, rounds // (1 + length // 512)))
            best = min((c for c in calls if c != "attnopt"), key=times.median)
            yield {
                "model": name,
                "length": length,
                **{c: times.ratio(c, "torch") for c in calls if c != "torch"},
                "attnopt / best other": times.ratio("attnopt", best),
            }


# ---------------------------------------------------------------- one attention
class Attention(torch.nn.Module):
    """Between the layouts that projections have: [1, S, H * D]."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        heads = tuple(range(HEADS))
        self.attend = Blocked().lower(AttentionSpec(heads, heads, heads, DIM, DIM, DIM**-0.5, pattern))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = map(by_head, (q, k, v))
        return self.attend(q, k, v, bias=None, mask=None, sinks=None).transpose(1, 2).flatten(2)


def by_head(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
    o = F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), is_causal=is_causal)
    return o.transpose(1, 2).flatten(2)


def exported(pattern: Pattern, args: tuple[torch.Tensor, ...], file: Path) -> str:
    """Writes the file; the form that the attention took."""
    gm = torch.export.export(Attention(pattern), args, strict=False).run_decompositions({}).module()
    origin = Origin(Report(sites=()), (), Signature((), (), ()), args, {})
    export_onnx(gm, origin, file, flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    import onnx

    said = {p.key: p.value for p in onnx.load(file).metadata_props}
    return str(json.loads(said["attnopt.attention"])[0]["form"])


def scattered(length: int, block: int = 128, share: int = 8) -> Pattern:
    """The same number of random blocks in each row of blocks."""
    blocks = length // block
    random = torch.Generator().manual_seed(0)
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in table:
        row[torch.randperm(blocks, generator=random)[: blocks // share]] = True
    return BlockLayout(table.tolist(), block)


ATTENTIONS: list[tuple[str, bool, tuple[int, ...], Callable[[int], Pattern]]] = [
    ("dense", False, (512, 2048, 4096), lambda n: Full()),
    ("dense, causal", True, (512, 2048, 4096), lambda n: Causal()),
    ("causal window 256", True, (2048, 4096, 8192), lambda n: Window(255, 0)),
    ("causal window 64", True, (2048,), lambda n: Window(63, 0)),
    ("causal window 256 and 4 sinks", True, (4096,), lambda n: Causal() & (Window(255, 0) | Sinks(4))),
    ("blocks of 128, 1/8", False, (4096,), scattered),
]


def attentions(rounds: int, only: str) -> Iterator[dict[str, Any]]:
    for name, is_causal, lengths, pattern_at in ATTENTIONS:
        for length in lengths if only in name else ():
            torch.manual_seed(0)
            pattern, args = pattern_at(length), tuple(torch.randn(3, 1, length, HEADS * DIM).unbind())
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                form = exported(pattern, args, Path(folder) / "m.onnx")
                ours = runner(Path(folder) / "m.onnx", list(args))
                calls = {"torch": lambda a=args, c=is_causal: in_torch(*a, is_causal=c), "attnopt": ours}
                times = interleaved(calls, max(5, rounds * 1024 // length))
            ideal = pattern.density(length, length) / (Causal().density(length, length) if is_causal else 1.0)
            ratio = times.ratio("attnopt", "torch")
            yield {
                "attention": name,
                "length": length,
                "form": form,
                "time / torch": ratio,
                "ideal": f"{ideal:.3f}",
                "share of ideal": f"{100 * ideal / ratio:.0f} %",
            }


def draw(_: Any, axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [c for c in rows[0] if c not in ("model", "length", "attnopt / best other")]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.bar([x + i * width for x in range(len(rows))], [row[name] for row in rows], width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    places = [x + width * (len(names) - 1) / 2 for x in range(len(rows))]
    axes.set_xticks(places, [f"{row['model']}\n{row['length']}" for row in rows], fontsize=6)
    axes.set_ylabel("CPU time / torch")
    axes.legend(fontsize=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="models and attentions whose names contain this")
    arguments = parser.parse_args()
    one_thread()
    let_transformers_import()
    if alone := list(attentions(arguments.rounds, arguments.only)):
        publish("onnx_attention", alone, "One attention in ONNX Runtime: CPU time relative to torch's, 12 heads of 64")
    if whole := list(models(arguments.rounds, arguments.only)):
        publish("onnx_models", whole, "Whole models in ONNX Runtime: CPU time relative to torch")
        picture("onnx_models", lambda figure, axes: draw(figure, axes, whole))


if __name__ == "__main__":
    main()
