"""A sweep over heads computes what comes before a layer once, and the heads of a layer together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from stacks import stack
from torch import Tensor, nn

import attnopt
from attnopt.compiler import head_sweep
from attnopt.graph import interpreter, resume
from attnopt.graph.nodes import calls
from attnopt.graph.ops import Kind, of
from attnopt.ir.head_probe import KINDS
from attnopt.statistics import Ablation

LAYERS, PER_LAYER = 6, 4  # projections of a layer
X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


@contextmanager
def seeing(see: Callable[[Any, Any], None]) -> Iterator[None]:
    """``see`` is told of each operator that runs, and its arguments."""
    below = resume.run_call

    def run(node: Any, args: Any, kwargs: Any) -> Any:
        see(node, args)
        return below(node, args, kwargs)

    with mock.patch.object(resume, "run_call", run), mock.patch.object(interpreter, "run_call", run):
        yield


@contextmanager
def projections() -> Iterator[list[tuple[int, ...]]]:
    """The sizes of what each projection that runs is given."""
    seen: list[tuple[int, ...]] = []

    def see(node: Any, args: Any) -> None:
        if (
            calls(node, of(Kind.PRODUCT))
            and "attention" not in node.name
            and node.target.name().startswith("aten::linear")
        ):
            seen.append(tuple(args[0].shape))

    with seeing(see):
        yield seen


@contextmanager
def attentions() -> Iterator[list[str]]:
    """The attentions that run, replacements included; as many at a time as there are heads."""
    seen: list[str] = []

    def see(node: Any, _: Any) -> None:
        if isinstance(node.target, FunctionType):
            seen.append(node.name)

    with seeing(see):
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


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_of_any_kind_shares_what_comes_before(kind: str) -> None:
    """And no attention behind a head is computed twice, as its replacement."""
    with attentions() as zero:
        attnopt.head_importance(stack(LAYERS), [X], "ablation")
    with attentions() as found, projections() as seen:
        attnopt.head_importance(stack(LAYERS), [X], Ablation(kind))
    whole = PER_LAYER * LAYERS
    streamed = whole - 1 if kind in ("mean", "resample") else 0  # to see outputs and padding
    assert len(seen) == whole + (whole - 1) + swept() + 1 + PER_LAYER * (LAYERS - 1) + streamed
    assert len(found) == len(zero) + (LAYERS if kind == "uniform" else 0)


def test_a_greedy_step_is_one_sweep() -> None:
    whole, checked = PER_LAYER * LAYERS, 1 + PER_LAYER * (LAYERS - 1)
    for size in (1, 2, 3):
        with projections() as seen:
            attnopt.greedy_heads(stack(LAYERS), [X], "ablation", size=size)
        sweeps = size * (whole - 1 + swept()) + checked * min(size, 2)  # the first alone has no gates
        assert len(seen) == whole + sweeps


class OneByOne(attnopt.ModelImportance):
    """Nothing, but that a sweep gives what single runs give, also while these run in between."""

    name: ClassVar[str] = "one-by-one"

    def __init__(self, off: dict[str, list[int]]) -> None:
        self.off = off

    def of_model(self, probe: attnopt.HeadProbe) -> dict[str, list[float]]:
        apart: dict[str, list[float]] = {site: [0.0] * len(heads) for site, heads in probe.heads.items()}
        for kind in KINDS:
            heads = []
            for site, h, output in probe.sweep(probe.batches[0], kind, self.off):
                alone = probe.output(probe.batches[0], self.off | {site: [*self.off.get(site, ()), h]}, kind)
                torch.testing.assert_close(output, alone, atol=1e-5, rtol=1e-4)
                apart[site][h] += float((output - probe.output(probe.batches[0])).norm())
                heads.append((site, h))
            assert heads == [(s, h) for s, hs in probe.heads.items() for h in hs if h not in self.off.get(s, ())]
        return apart


@pytest.mark.parametrize("off", [{}, {"layers.0": [1], "layers.2": [0, 3]}])
def test_a_sweep_is_what_heads_give_one_by_one(off: dict[str, list[int]]) -> None:
    apart = attnopt.head_importance(stack(3), [X], OneByOne(off))
    for site, moved in apart.items():
        assert all((x == 0) == (h in off.get(site, ())) for h, x in enumerate(moved))


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
    import hooked_models

    def last(output: Any) -> Tensor:
        assert output.past_key_values.get_seq_length() == 9
        logits: Tensor = output.logits[:, -1]
        return logits

    scores = attnopt.head_importance(
        hooked_models.gpt2(2), [{"input_ids": hooked_models.IDS[0], "use_cache": True}], "ablation", behaviour=last
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
