"""Tokens of a language model over its own cache in ONNX Runtime: all keys or those of a window, in float32 or in int8.

Each file of ``export_decoder`` generates a few tokens a call, as many as one turn of a rolling buffer, so that moving it
is counted.  All start from the same keys and values, those that int8 can represent.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved
from onnx_models import smollm2
from onnx_sessions import session

import attnopt
from attnopt.passes import LocalWindow

WINDOW, SPARE = 256, 16  # keys that a query sees; entries of a rolling buffer beside them
TURN = SPARE + 1  # tokens between two moves of its entries
LENGTHS = (2048, 8192, 32768)
CLOSE, COARSE, ROUGH = 1e-3, 0.05, 0.25  # relative to the largest logit: of float32, of int8, of random weights in int8
Half = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """``windows``, ``kv`` and ``quantize`` of ``export_decoder``; ``every``: of so many layers one has a window, 0 for none."""

    every: int
    windows: Any = "masked"
    kv: Any = "float32"
    quantize: Any = None


CONTENDERS = {
    "float32": Contender(0),
    "int8": Contender(0, kv="int8"),
    "int8, weights too": Contender(0, kv="int8", quantize="int8"),
    "every window masked": Contender(1),
    "every window rolling": Contender(1, "rolling"),
    "every window rolling, int8": Contender(1, "rolling", "int8"),
    "half masked": Contender(2),
    "half rolling": Contender(2, "rolling"),
}


class Steps:
    """A file and its buffers, filled as after ``length`` tokens; a call is ``TURN`` tokens more."""

    def __init__(self, file: Path, length: int, rounds: int, filled: Mapping[str, Half]) -> None:
        import onnxruntime

        self.ort, self.session, self.length = onnxruntime.OrtValue.ortvalue_from_numpy, session(file), length
        self.cache = {}
        for i in self.session.get_inputs():
            if len(i.shape) == 4:
                rolls = i.shape[2] == f"window_{WINDOW}"
                room = WINDOW + SPARE if rolls else length + TURN * (rounds + 2)
                self.cache[i.name] = self.ort(_buffer(filled[i.name], length, room, i.type == "tensor(int8)"))

    def __call__(self) -> list[Any]:
        return [self._token(7 + n) for n in range(TURN)]

    def _token(self, token: int) -> Any:
        self.length += 1
        feed = {
            "input_ids": np.array([[token]]),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.array([[self.length - 1]]),
        }
        binding = self.session.io_binding()
        for name, x in feed.items():
            binding.bind_ortvalue_input(name, self.ort(x))
        for name, x in self.cache.items():
            binding.bind_ortvalue_input(name, x)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), x)
        binding.bind_output(self.session.get_outputs()[0].name)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    @property
    def megabytes(self) -> float:
        return float(sum(x.numpy().nbytes for x in self.cache.values()) / 1e6)


def _buffer(filled: Half, length: int, room: int, is_int8: bool) -> Any:
    """The last entries of a buffer after ``length`` tokens, as the operator would have left them."""
    spare = room - WINDOW + 1
    there = length if length <= room else length - spare * -(-(length - room) // spare)
    values = filled["int8"][:, :, length - there :]
    made = np.zeros((*values.shape[:2], room, values.shape[3]), np.int8 if is_int8 else np.float32)
    made[:, :, :there] = values if is_int8 else values * filled["scale"]
    return made


def measured_caches(lengths: Sequence[int], rounds: int, whole: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """A row of each length.  ``whole``: wraps a model of transformers for export."""
    torch.manual_seed(0)
    logits, _ = smollm2(max(lengths))
    model = logits.eval().model
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = _exported(whole(model), Path(folder), model.config.num_hidden_layers, model.config.vocab_size)
        return [_measured(files, length, rounds) for length in lengths]


def _exported(model: torch.nn.Module, folder: Path, layers: int, vocabulary: int) -> dict[str, Path]:
    ids = torch.randint(0, vocabulary, (2, 16))
    calibration = [_inputs(torch.randint(0, vocabulary, (2, 128))) for _ in range(8)]
    files = {}
    for title, c in CONTENDERS.items():
        policy = _policy(c.every, layers)
        fast = attnopt.optimize(model, policy, (), _inputs(ids), dynamic_shapes="auto", backend="sdpa")
        data = calibration if c.kv == "int8" else None
        to = folder / title
        fast.export_decoder(
            to, context_length=65536, eos_token_id=0, windows=c.windows, kv=c.kv, calibration=data, quantize=c.quantize
        )
        files[title] = to / "model.onnx"
    return files


def _measured(files: Mapping[str, Path], length: int, rounds: int) -> dict[str, Any]:
    filled = _filled(files["int8"], length)
    calls = {title: Steps(file, length, rounds, filled) for title, file in files.items()}
    _check({title: call() for title, call in calls.items()})
    megabytes = {f"{title}, MB": call.megabytes for title, call in calls.items()}
    times = interleaved(calls, rounds)
    base = "float32"
    about = {"model": "SmolLM2, a token", "length": length, "float32, ms": 1000 * times.median(base) / TURN}
    return {**about, **{t: times.ratio(t, base) for t in calls if t != base}, **megabytes}


def _inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def _policy(every: int, layers: int) -> Any:
    window = LocalWindow(WINDOW - 1, 0)
    if every < 2:
        return window if every else "fuse"
    return {"*": "fuse", **{f"*.layers.{i}.*": window for i in range(0, layers, every)}}


def _filled(file: Path, length: int) -> dict[str, Half]:
    """Random int8 keys and values of each input, with the scales that stand in the file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    weights = {x.name: x for x in graph.initializer}
    rng, found = np.random.default_rng(0), {}
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            for past, scale in ((3, 12), (4, 13)):
                scales = numpy_helper.to_array(weights[node.input[scale]])
                size = (1, scales.shape[1], length, scales.shape[3])
                values = np.clip(rng.normal(0, 40, size).round(), -127, 127).astype(np.int8)
                found[node.input[past]] = {"int8": values, "scale": scales}
    return found


def _check(made: Mapping[str, list[Any]]) -> None:
    for title, other, room in (
        ("int8", "float32", COARSE),
        ("int8, weights too", "float32", ROUGH),
        ("every window rolling", "every window masked", CLOSE),
        ("every window rolling, int8", "every window masked", COARSE),
        ("half rolling", "half masked", CLOSE),
    ):
        got, want = np.concatenate(made[title]), np.concatenate(made[other])
        error = float(np.abs(got - want).max() / np.abs(want).max())
        if not error <= room:
            raise SystemExit(f"{title} gives other logits than {other}: {error:.2g} relative")
