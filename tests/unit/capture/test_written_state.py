"""Models that write buffers or attributes while they run, and modes inside a model's own code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import Tensor, nn

import attnopt
from attnopt.errors import ArchiveError, CaptureError, ExportError

pytestmark = pytest.mark.usefixtures("one_torchlib")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Caching(nn.Module):
    """Keys and values go to places of a cache; ``counting``: to those after the last call's."""

    def __init__(self, counting: bool = False, in_buffers: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.counting = counting
        keys, values = torch.zeros(1, 4, 12, 4), torch.zeros(1, 4, 12, 4)
        if in_buffers:
            self.register_buffer("keys", keys)
            self.register_buffer("values", values)
        else:
            self.keys, self.values = keys, values
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.ones(12, 12).tril().bool())
        self.calls, self.last = 0, None

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        if self.counting:
            places = self.place + torch.arange(x.shape[1])
            self.place += x.shape[1]
        q, k, v = (p(x).view(1, -1, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        self.keys[:, :, places] = k
        self.values[:, :, places] = v
        o = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.seen[places])
        self.calls, self.last = self.calls + 1, o
        made: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return made


KINDS: list[dict[str, bool]] = [{}, {"counting": True}, {"in_buffers": False}]


def call(step: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(step)), torch.arange(3) + 3 * step


def state_of(model: Caching) -> list[Any]:
    return [model.keys.clone(), model.values.clone(), model.place.clone(), model.calls, model.last]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x is y or x == y for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:each call of the model changes its attribute calls")
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_carried_on_and_the_users_stays(kind: dict[str, bool], tmp_path: Path) -> None:
    model = Caching(**kind).eval()
    before, own = state_of(model), copy.deepcopy(model)
    fast = attnopt.optimize(model, "fuse", call(0))
    assert fast.report.count("rewritten") == 1
    assert all("changes its attribute calls" in w for w in fast.report.warnings)
    attnopt.inspect(model, call(0))
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    for step in range(3):
        want = own(*call(step))
        assert close(fast(*call(step)), want)
        assert close(loaded(*call(step)), want)
    assert same(state_of(model), before)


@pytest.mark.filterwarnings("ignore:each call of the model changes its attribute calls")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cannot_keep_state(kind: dict[str, bool], tmp_path: Path) -> None:
    fast = attnopt.optimize(Caching(**kind).eval(), "fuse", call(0))
    with pytest.raises(ExportError, match=r"carries state in (keys|place) from call to call"):
        fast.export_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_state_that_no_output_reads_is_left_out_of_a_file(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            made: Tensor = self.attend(x, x, x, need_weights=False)[0]
            return made

    model = Counting().eval()
    fast = attnopt.optimize(model, "fuse", (torch.randn(1, 5, 16),))
    fast.export_onnx(tmp_path / "m.onnx")
    assert model.count == fast.graph_module.count == 0
    fast(torch.randn(1, 5, 16))
    assert (model.count, fast.graph_module.count) == (0, 1)


class InMode(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.mode == "autocast" else torch.no_grad():
            made: Tensor = self.encoder(x)
        return made


@pytest.mark.filterwarnings("ignore:the model amplifies rounding")
@pytest.mark.parametrize("mode", ["autocast", "no_grad"])
@pytest.mark.parametrize("policy", ["fuse", "local-window(left=2, right=2)", "prune-heads(heads=[1])"])
def test_modes_inside_the_model(mode: str, policy: str) -> None:
    model, x = InMode(mode).eval(), torch.randn(2, 9, 32)
    with torch.no_grad():
        fast = attnopt.optimize(model, policy, (x,))
        assert [s.name for s in fast.report.sites] == [f"encoder.layers.{n}.self_attn" for n in range(2)]
        assert fast.report.count("rewritten") == 2
        if policy == "fuse":
            assert (fast(x) - model(x)).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_and_is_found() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = torch.vmap(lambda one: self.attend(one, one, one, need_weights=False)[0])(x)
            return made

    model, x = Mapped().eval(), torch.randn(3, 2, 9, 32)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert fast.report.count("rewritten") == 3
    assert close(fast(x), model(x))


def test_weights_that_are_plain_tensors() -> None:
    """torch.nn.utils.prune leaves such ones."""
    from torch.nn.utils import prune

    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 9, 32)
    prune.l1_unstructured(model.self_attn.out_proj, "weight", 0.3)  # type: ignore[no-untyped-call]
    assert close(attnopt.optimize(model, "fuse", (x,))(x), model(x))
    fewer = attnopt.optimize(model, "prune-heads(heads=[1])", (x,))
    assert fewer.sites[0].num_heads == 3


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.count, self.log, self.by_length = 1, list[Tensor](), dict[int, Tensor]()

    def inner(self, x: Tensor) -> Tensor:
        made: Tensor = self.attend(x, x, x, need_weights=False)[0]
        return made


def test_numbers_that_a_call_changes_are_told() -> None:
    class Counting(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.log.append(x)
            self.by_length[x.shape[1]] = x
            return self.inner(x) * self.count

    model, x = Counting().eval(), torch.randn(2, 9, 32)
    with pytest.warns(attnopt.AttnoptWarning, match="changes its attribute count"):
        fast = attnopt.optimize(model, "fuse", (x,))
    assert (model.count, model.log, model.by_length) == (1, [], {})
    assert close(fast(x), model(x))


def test_what_is_in_a_branch_is_told() -> None:
    class Branching(Around):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = torch.cond(x.sum() > 0, lambda t: self.inner(t), lambda t: 2 * self.inner(t), (x,))
            return made

    found = attnopt.inspect(Branching().eval(), (torch.randn(2, 9, 32),))
    assert not found.sites
    codes = {m.refusal.code for m in found.near_misses}
    assert codes
    assert codes <= {"in-a-region", "opaque-operator"}


def test_half_precision_inside_of_single(tmp_path: Path) -> None:
    class Halved(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.half()).float()

    model, x = Halved().eval(), torch.randn(2, 9, 32)
    model.attend.half()
    attnopt.optimize(model, "prune-heads(heads=[1])", (x,)).export_onnx(tmp_path / "m.onnx")


def test_a_structure_that_cannot_be_saved_is_told(tmp_path: Path) -> None:
    class Paired(Around):
        def forward(self, pair: Pair) -> Pair:
            return Pair(self.inner(pair.x), pair.y)

    fast = attnopt.optimize(Paired().eval(), "fuse", (Pair(torch.randn(2, 9, 32), torch.randn(2)),))
    with pytest.raises(ArchiveError, match="cannot serialize the graph"):
        fast.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


class Frozen(dict[str, int]):
    """A dict that refuses to be changed, as diffusers' configurations do."""

    def refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError("it is frozen")

    clear = update = __setitem__ = __delitem__ = refuse  # type: ignore[assignment]


def test_what_no_call_changes_is_not_touched() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    model.settings = Frozen(width=8)
    x = torch.randn(2, 5, 8)
    assert len(attnopt.optimize(model, "fuse", x).sites) == 1
    assert model.settings == {"width": 8}


def test_a_lazy_model_has_to_be_called_first() -> None:
    model, x = (
        nn.Sequential(nn.LazyLinear(32), nn.TransformerEncoderLayer(32, 4, batch_first=True)),
        torch.randn(2, 9, 5),
    )
    with pytest.raises(CaptureError, match=r"0\.weight is a lazy parameter: its size is set by the model's first call"):
        attnopt.inspect(model.eval(), (x,))
    model(x)
    assert len(attnopt.inspect(model, (x,)).sites) == 1


def test_inputs_that_hold_nothing() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    found = attnopt.inspect(model, (torch.zeros(0, 9, 32),))
    assert [m.refusal.code for m in found.near_misses] == ["no-elements"]


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_is_a_model_too(decomposed: bool) -> None:
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 9, 32)
    program = torch.export.export(model, (x,))
    if decomposed:
        program = program.run_decompositions({})
    fast = attnopt.optimize(program, "prune-heads(heads=[1])", (x,))
    assert [(s.name, s.status) for s in fast.report.sites] == [("self_attn", "rewritten")]
    assert close(fast(x), attnopt.optimize(model, "prune-heads(heads=[1])", (x,))(x))
