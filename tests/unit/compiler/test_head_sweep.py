"""A sweep over heads computes what comes before a layer once, and the heads of a layer together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from stacks import stack
from torch import Tensor, nn

import attnopt
from attnopt.compiler import head_sweep
from attnopt.graph import interpreter, resume
from attnopt.graph.nodes import calls, run_call
from attnopt.graph.ops import Kind, of

LAYERS, PER_LAYER = 6, 4  # projections of a layer
X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


@contextmanager
def projections() -> Iterator[list[tuple[int, ...]]]:
    """The sizes of what each projection that runs is given."""
    seen: list[tuple[int, ...]] = []

    def run(node: Any, args: Any, kwargs: Any) -> Any:
        if (
            calls(node, of(Kind.PRODUCT))
            and "attention" not in node.name
            and node.target.name().startswith("aten::linear")
        ):
            seen.append(tuple(args[0].shape))
        return run_call(node, args, kwargs)

    with mock.patch.object(resume, "run_call", run), mock.patch.object(interpreter, "run_call", run):
        yield seen


def swept() -> int:
    """Projections behind a head, over all layers."""
    return sum(1 + PER_LAYER * (LAYERS - 1 - layer) for layer in range(LAYERS))


@pytest.mark.parametrize("rows", [1, 512])
def test_what_comes_before_runs_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_sweep, "ROWS", {"cpu": rows, "cuda": rows})
    with projections() as seen:
        attnopt.head_importance(stack(LAYERS), [X], "ablation")
    whole = PER_LAYER * LAYERS
    runs = 4 if rows == 1 else 1  # for the heads of a layer
    checked = 0 if rows == 1 else 1 + PER_LAYER * (LAYERS - 1)  # the first stack, against one of its heads
    assert len(seen) == whole + (whole - 1) + runs * swept() + checked  # the original, the prefix, the rest
    assert len(seen) < 0.7 * 4 * LAYERS * whole


def test_memory_bounds_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(2)
    want = attnopt.head_importance(model, [X], "ablation")
    for size in (1, 2 * 12 * 64 * 4 * 3):
        monkeypatch.setattr(head_sweep, "BYTES", size)
        got = attnopt.head_importance(model, [X], "ablation")
        assert all(got[name] == pytest.approx(want[name], rel=1e-3) for name in want)


def test_batches_of_several_sizes() -> None:
    model, data = stack(2), [torch.randn(2, 12, 16), torch.randn(3, 7, 16)]
    both = attnopt.head_importance(model, data, "ablation")
    alone = [attnopt.head_importance(model, [x], "ablation") for x in data]
    for name in both:
        want = [(a + b) / 2 for a, b in zip(alone[0][name], alone[1][name], strict=True)]
        assert both[name] == pytest.approx(want, rel=1e-3)


def test_a_behaviour_gets_the_output_of_the_model() -> None:
    """Also where a graph returns the tensors of a cache."""
    import circuits

    def last(output: Any) -> Tensor:
        assert output.past_key_values.get_seq_length() == 9
        logits: Tensor = output.logits[:, -1]
        return logits

    scores = attnopt.head_importance(
        circuits.gpt2(2), [{"input_ids": circuits.IDS[0], "use_cache": True}], "ablation", behaviour=last
    )
    assert all(s > 0 for values in scores.values() for s in values)


def test_state_is_left_as_it_is() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack(2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            out: Tensor = self.stack(x) * self.count
            return out

    model = Counting().eval()
    scores, want = attnopt.head_importance(model, [X], "ablation"), attnopt.head_importance(stack(2), [X], "ablation")
    assert float(model.count) == 0
    for got, values in zip(scores.values(), want.values(), strict=True):
        assert got == pytest.approx(values, rel=1e-3)
