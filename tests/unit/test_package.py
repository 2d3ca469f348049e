"""A package of AOTInductor: it computes what the model computes, without attnopt."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.archive.package import in_torch
from attnopt.backends.attention_operator import ATTENTION
from attnopt.base.closeness import difference
from attnopt.passes import LocalWindow


class Model(nn.Module):
    """One attention of four heads with a softcap, which torch's own attention has not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = 5 * torch.tanh(q @ k.mT * 0.7 / 5)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def optimized(dynamic: Any = None) -> attnopt.OptimizedModel:
    return attnopt.optimize(Model().eval(), LocalWindow(9), (x(1),), dynamic_shapes=dynamic, backend="blocked")


def x(batch: int, length: int = 150) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("dynamic", [None, "auto"], ids=["blocks", "under a mask"])
def test_operators_of_torch_alone(dynamic: Any) -> None:
    fast = optimized(dynamic)
    assert any(n.target is ATTENTION for n in fast.graph_module.graph.nodes)
    told: AbstractContextManager[Any] = (
        nullcontext() if dynamic is None else pytest.warns(attnopt.AttnoptWarning, match="all pairs are computed")
    )
    with told:
        plain = in_torch(fast.graph_module)
    assert not any("attnopt" in str(n.target) for n in plain.graph.nodes)
    for given in (x(1),) if dynamic is None else (x(1), x(3, 77)):
        with torch.no_grad():
            assert difference([plain(given)], [fast(given)]) < 1e-5


@pytest.mark.slow  # compiles C++
@pytest.mark.subprocess
@pytest.mark.filterwarnings("ignore:all pairs are computed")
def test_a_program_without_attnopt(tmp_path: Path) -> None:
    fast = optimized("auto")
    fast.export_package(tmp_path / "m.pt2")
    given = [x(1), x(3, 77)]
    torch.save({"given": given, "wanted": [fast(g).detach() for g in given]}, tmp_path / "wanted.pt")
    code = f"""
import sys, torch
sys.modules["attnopt"] = None
run = torch._inductor.aoti_load_package({str(tmp_path / "m.pt2")!r})
known = torch.load({str(tmp_path / "wanted.pt")!r})
for x, y in zip(known["given"], known["wanted"]):
    torch.testing.assert_close(run(x), y, atol=1e-4, rtol=0)
print("alike")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("alike\n"), done.stderr
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["m.pt2", "wanted.pt"]


def test_another_ending(tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=r"ends in .pt2"):
        optimized().export_package(tmp_path / "m.so")


@pytest.mark.parametrize("dynamic", [None, "auto"], ids=["fixed", "dynamic"])
def test_compiled_without_a_break(dynamic: Any) -> None:
    fast = optimized(dynamic)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        for given in (x(1),) if dynamic is None else (x(1), x(3, 77)):
            assert difference([compiled(given)], [fast(given)]) < 1e-6


class Two(nn.Module):
    """Keys of another sequence, whose two inputs are given by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, x: Tensor, *, keys: Tensor, scale: Tensor) -> Tensor:
        scores = (x @ keys.mT) * scale[:, None]
        return self.model(scores.softmax(-1) @ keys)  # type: ignore[no-any-return]


def test_keywords_in_another_order_and_calls_that_do_not_fit() -> None:
    given = {"keys": x(2, 150), "scale": torch.ones(2, 1) / 6}
    fast = attnopt.optimize(Two().eval(), "fuse", (x(2),), given, dynamic_shapes="auto")
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = fast(x(2), **given)
        assert difference([compiled(x(2), scale=given["scale"], keys=given["keys"])], [wanted]) < 1e-6
        torch.compiler.reset()
        breaks = torch.compile(fast, backend="eager")  # where it may break, the error is that of an ordinary call
        with pytest.raises(attnopt.CaptureError, match=r"but another input has|require"):
            breaks(x(2), keys=x(3, 150), scale=given["scale"])
        with pytest.raises(attnopt.CaptureError, match=r"has dtype torch.float64"):
            breaks(x(2).double(), **given)
