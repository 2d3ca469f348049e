"""Verification of a decoder file in actual use: a prompt, then token by token, with sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.graph.nodes import inputs_of
from attnopt.onnx.export.builder import Array
from attnopt.onnx.export.deviation import Deviation, deviation
from attnopt.onnx.export.kv_cache import ROLLING
from attnopt.onnx.export.quantizer import Quantization
from attnopt.onnx.export.verify import in_bfloat16, open_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

LONGEST, STEPS = 48, 3  # tokens of a prompt, and those after it
BEYOND, MOST = 8, 1024  # tokens of a prompt beyond a window that rolls, and those of a prompt in any case

_ELEMENTS = {"tensor(float)": np.float32, "tensor(int8)": np.int8}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids [B, L], positions, the tokens of each sequence so far -> logits


@dataclass(frozen=True)
class Whole:
    """The model ``gm`` on whole sequences, with which a decoder is compared.

    ``logits``: the name of a file's output.  ``window``: from how many tokens on all buffers that roll do, or 0 if none does.
    ``runs``: how a file runs, given its session, ``logits`` and the number of tokens; by default as ``DecoderRun``.
    """

    gm: fx.GraphModule
    origin: Origin
    logits: str
    window: int
    runs: Callable[[InferenceSession, str, int], Run] | None = None

    def verify(self, file: Path, allowed: float | None) -> float:
        """The largest relative difference of the file's logits.  ``allowed``: what it may be; by default, what rounding
        explains.  Raises ExportError."""
        return max(_compare(got, want, when, allowed) for got, want, when in self._in_use(file, exact=True))

    def verify_run(self, run: Run) -> None:
        """The same for what is no file, without a cache so far.  Raises ExportError."""
        for got, want, when in self._compared(lambda _: run):
            _compare(got, want, when, None)

    def deviation_of(self, file: Path, how: Quantization) -> Deviation:
        """Of the logits of a quantized file.  Raises ExportError if it is too large."""
        worst = Deviation(1.0, 0.0, 0)
        for got, want, when in self._in_use(file, exact=False):
            worst = worst.joined(deviation([got], [want], [self.logits], how, when, "leave quantize out"))
        return worst

    def _in_use(self, file: Path, exact: bool) -> Iterator[tuple[Tensor, Tensor, str]]:
        session, runs = open_session(file, in_bfloat16(self.gm), exact), self.runs or DecoderRun
        return self._compared(lambda capacity: runs(session, self.logits, capacity))

    def _compared(self, running: Callable[[int], Run]) -> Iterator[tuple[Tensor, Tensor, str]]:
        """Logits over a cache, and of the model: of a prompt, and of each token after it.  ``running``: with room for so many
        tokens."""
        ids = _two_sequences(self.gm, self.origin, self.window)
        want = _whole(self.gm, self.origin, ids)
        length = ids.shape[1] - STEPS
        shorter = (
            0 if self.window else 2
        )  # the second prompt is padded at its end, which buffers that roll do not allow
        lengths = torch.tensor([length, length - shorter])
        run = running(ids.shape[1] + 5)
        got = run(ids[:, :length], torch.arange(length).expand(2, -1), lengths)
        prompt = torch.cat([got[b, :n] for b, n in enumerate(lengths)])
        yield prompt, torch.cat([want[b, :n] for b, n in enumerate(lengths)]), "for a prompt"
        for _ in range(STEPS):
            at = lengths[:, None]
            lengths = lengths + 1
            got = run(ids.gather(1, at), at, lengths)
            yield got, want.take_along_dim(at[..., None], 1), "for a token after its prompt"


def _two_sequences(gm: fx.GraphModule, origin: Origin, window: int) -> Tensor:
    ids = _inputs(gm, origin)["input_ids"]
    assert isinstance(ids, Tensor)
    beyond = min(window + BEYOND, MOST) if window else 0
    length = max(min(max(ids.shape[1], 8), LONGEST), beyond) + STEPS
    first = ids[:1, torch.arange(length) % ids.shape[1]]
    return torch.cat([first, first.flip(1)])


def _inputs(gm: fx.GraphModule, origin: Origin) -> dict[str, Tensor | int]:
    names = [n.name for n in inputs_of(gm.graph)]
    return dict(zip(names, pytree.tree_leaves(origin.inputs), strict=True))


def _whole(gm: fx.GraphModule, origin: Origin, ids: Tensor) -> Tensor:
    """[B, L, V] of the graph itself."""
    new = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])}
    given = _inputs(gm, origin)
    leaves = [new[n].expand_as(ids).to(x.dtype) if isinstance(x, Tensor) else x for n, x in given.items()]
    inputs: CallInputs = pytree.tree_unflatten(leaves, pytree.tree_structure(origin.inputs))
    try:
        found = outputs_of(gm, inputs)
    except Exception as e:
        raise ExportError(
            f"the captured graph is not valid for {tuple(ids.shape)} tokens: {type(e).__name__}: {str(e)[:200]}",
            hint="optimize the model with an example of several sequences of several tokens",
        ) from e
    return next(t for t in found if t.dim() == 3)


class DecoderRun:
    """A session with one buffer for past and present, ``capacity`` tokens long; one that rolls has room for its window alone.

    A call takes token ids [B, L], their positions, and the number of tokens of each sequence, these included."""

    def __init__(self, session: InferenceSession, logits: str, capacity: int, batch: int = 2) -> None:
        self.session, self.logits = session, logits
        inputs = self.session.get_inputs()
        self.names = {i.name: np.int32 if "int32" in i.type else np.int64 for i in inputs}
        self.cache = {
            i.name: _ort(np.zeros((batch, i.shape[1], _room(i.shape[2], capacity), i.shape[3]), _ELEMENTS[i.type]))
            for i in inputs
            if len(i.shape) == 4
        }

    def __call__(self, ids: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        seen = torch.arange(int(lengths.max())) < lengths[:, None]
        given = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
        feed = {name: _ort(given[name].numpy().astype(self.names[name])) for name in given if name in self.names}
        binding = self.session.io_binding()
        for name, value in (feed | self.cache).items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self.cache.items():
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output(self.logits)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as e:
            raise ExportError(f"ONNX Runtime cannot run the exported decoder: {str(e)[:300]}") from e
        return torch.from_numpy(binding.get_outputs()[-1].numpy())


def _room(length: str | int, capacity: int) -> int:
    """``length``: the name of the axis, or its size."""
    if isinstance(length, int):
        return length
    return int(length.removeprefix(ROLLING)) if length.startswith(ROLLING) else capacity


def _ort(array: Array) -> OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _compare(got: Tensor, want: Tensor, when: str, allowed: float | None) -> float:
    error = difference([got], [want])
    if error <= (ROOM * tolerance([want]) if allowed is None else allowed):
        return error
    raise ExportError(
        f"the logits of the decoder and the model differ {when} (relative difference {error:.2g}), so nothing was written",
        hint="positions must come from position_ids, and only the attentions may mix tokens"
        if allowed is None
        else 'int8 keys and values are too coarse for this model or calibration; pass more calibration data or kv="float32"',
    )
