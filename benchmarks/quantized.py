"""Trained MiniLM as quantized ONNX files: what they cost in quality, what they save in bytes and CPU time.

Beside attnopt's files: torch's export quantized by the same quantizer, and OpenVINO in float32 and, by NNCF, in int8
with static activations.  `--part quality` needs no quiet machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from common import interleaved, one_thread, publish
from onnx_peers import in_int8
from onnx_sessions import openvino, runner, session
from subjects.minilm import MiniLM

import attnopt
from attnopt.cli import demo_data
from attnopt.passes import LocalWindow

FLOAT = "attnopt, float32"
REVIEWS = 1000  # texts whose embeddings are compared with those of the unquantized twin
SIZES = ((1, 512), (8, 128))
Encode = demo_data.Encode


@dataclass(frozen=True)
class Way:
    """A file and how it runs; ``twin``: the way whose embeddings its own should have."""

    name: str
    file: Path
    twin: str
    is_openvino: bool = False

    def encode(self) -> Encode:
        if self.is_openvino:
            return _in_openvino(self.file)
        loaded = session(self.file)
        names = [i.name for i in loaded.get_inputs()]

        def encode(ids: torch.Tensor, mask: torch.Tensor) -> demo_data.Array:
            (made,) = loaded.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
            return np.asarray(made)

        return encode

    def call(self, inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
        return (openvino if self.is_openvino else runner)(self.file, inputs)

    @property
    def megabytes(self) -> float:
        beside = (
            self.file.with_suffix(".bin")
            if self.file.suffix == ".xml"
            else self.file.with_name(f"{self.file.name}.data")
        )
        return sum(f.stat().st_size for f in (self.file, beside) if f.exists()) / 1e6


def _in_openvino(file: Path) -> Encode:
    import openvino as ov

    compiled = ov.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda ids, mask: np.asarray(compiled([ids.numpy(), mask.numpy()])[0])


def ways(about: MiniLM, folder: Path) -> Iterator[Way]:
    model, example = about.model(), demo_data.tokens(about.tokenizer, about.reviews()[:2])
    for label, policy in {"": "fuse", ", window 16": LocalWindow(16)}.items():
        fast = attnopt.optimize(model, policy, example, dynamic_shapes=about.dynamic_shapes())
        twin = f"attnopt{label}, float32"
        for how in (None, "int8", "int4"):
            if label and how == "int4":
                continue
            file = folder / f"{len(list(folder.iterdir()))}.onnx"
            told = fast.export_onnx(file, quantize=how)
            print(told or twin, flush=True)
            yield Way(f"attnopt{label}, {how or 'float32'}", file, twin)
            if how == "int4":
                yield Way("attnopt, int4, activations in int8", _in_int8_between(file), twin)
    exported = folder / "torch.onnx"
    torch.onnx.export(
        model, example, str(exported), dynamo=True, opset_version=20, verbose=False, external_data=False,
        dynamic_shapes=about.dynamic_shapes(),
    )  # fmt: skip
    yield Way("torch export, float32", exported, "torch export, float32")
    yield Way("torch export, int8", _dynamic_int8(exported), "torch export, float32")
    yield Way("OpenVINO, float32", exported, "OpenVINO, float32", is_openvino=True)
    yield Way("OpenVINO, int8", in_int8(exported, about.calibration(0)), "OpenVINO, float32", is_openvino=True)


def _in_int8_between(file: Path) -> Path:
    """The same int4 weights; ONNX Runtime may quantize the activations of each product by blocks."""
    import onnx

    model = onnx.load(file)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
    made = file.with_name(f"fast_{file.name}")
    onnx.save(model, str(made))
    return made


def _dynamic_int8(file: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    made = file.with_name("torch_int8.onnx")
    quantize_dynamic(str(file), str(made), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    return made


def qualities(about: MiniLM, every: list[Way]) -> Iterator[dict[str, Any]]:
    texts = about.reviews()[:REVIEWS]
    own: dict[str, demo_data.Array] = {}
    for way in every:
        encode = way.encode()
        own[way.name] = demo_data.embed(encode, about.tokenizer, texts)
        cosines = (own[way.name] * own[way.twin]).sum(1)
        judged = demo_data.quality(encode, about.tokenizer, about.data)
        yield {
            "file": way.name,
            "MB": way.megabytes,
            "cosine": float(cosines.mean()),
            "lowest cosine": float(cosines.min()),
            **{name.partition(",")[0]: value for name, value in judged.items()},
        }


def times(about: MiniLM, every: list[Way], rounds: int, sizes: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    for batch, length in sizes:
        ids = torch.randint(1000, 20_000, (batch, length), generator=torch.Generator().manual_seed(0))
        calls = {way.name: way.call((ids, torch.ones_like(ids))) for way in every}
        found = interleaved(calls, rounds)
        ratios: Mapping[str, float] = {name: found.ratio(name, FLOAT) for name in calls}
        yield {"inputs": f"{batch} x {length}", "ms of the first": 1e3 * found.median(FLOAT), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("quality", "times", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="times at 1 x 8 only, without publishing: does it run?")
    arguments = parser.parse_args()
    one_thread()
    about = MiniLM()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        every = list(ways(about, Path(folder)))
        if arguments.part in ("quality", "all"):
            rows = list(qualities(about, every))
            publish(
                "quantized_quality", rows, "MiniLM quantized: size, embeddings against the unquantized file, tasks", 3
            )
        if arguments.tiny:
            print(*times(about, every, 2, ((1, 8),)), sep="\n")
        elif arguments.part in ("times", "all"):
            rows = list(times(about, every, arguments.rounds, SIZES))
            publish("quantized_times", rows, f"MiniLM quantized: CPU time relative to {FLOAT}")


if __name__ == "__main__":
    main()
