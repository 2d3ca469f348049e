"""Single entries of a tensor equal those of the whole, whatever operators make it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph import entries
from attnopt.graph.entries import Entries, InvalidSizesError
from attnopt.graph.entry_rules import UnsupportedError
from attnopt.graph.evaluate import evaluate, symbols

TABLE = torch.arange(40 * 40).reshape(40, 40)


def ij(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None, :]


FORMS: dict[str, Callable[[int], Tensor]] = {
    "compared": lambda n: ij(n)[0] - ij(n)[1] < 5,
    "triangles": lambda n: torch.full((n, n), -1.5).triu(1) + torch.ones(n, n).tril(-3),
    "selected": lambda n: torch.arange(2 * n * n).view(2, n, n)[1],
    "sliced": lambda n: torch.arange(n * (n + 3)).view(n, n + 3)[:, 2:-1] * 2,
    "stepped": lambda n: torch.arange(3, 3 + 2 * n, 2)[:, None] + torch.arange(n)[None],
    "flipped": lambda n: torch.arange(n * n).view(n, n).flip(0),
    "repeated": lambda n: torch.arange(n).repeat(3, n, 1)[1],
    "stacked": lambda n: torch.stack([ij(n)[0].expand(n, n), ij(n)[1].expand(n, n)], 1)[:, 1],
    "rolled": lambda n: torch.arange(n * n).view(n, n).roll((2, -1), (0, 1)),
    "repeated one by one": lambda n: torch.arange(3 * n).view(3, n).repeat_interleave(n, 0)[:n],
    "one of two parts": lambda n: torch.arange(n * 2 * n).view(n, 2 * n).chunk(2, -1)[1],
    "one of uneven parts": lambda n: torch.arange(n * (n + 3)).view(n, n + 3).split([1, n, 2], 1)[1],
    "one of many": lambda n: torch.arange(2 * n * n).view(2, n, n).unbind(0)[1],
    "padded": lambda n: nn.functional.pad(torch.ones(n - 2, n - 3), (1, 2, 2, 0), value=-3.5),
    "padded with zeros": lambda n: nn.functional.pad(torch.arange(n - 1) + torch.ones(n, 1), (1, 0)),
    "chosen by index": lambda n: TABLE.index_select(0, torch.arange(n - 1, -1, -1))[:, :n],
    "joined": lambda n: torch.cat([torch.zeros(n, 2), ij(n)[0].expand(n, n - 2).float()], 1),
    "permuted": lambda n: torch.arange(n * n * 2).view(n, 2, n).permute(1, 2, 0).transpose(-1, -2)[0].mT,
    "looked up": lambda n: TABLE[ij(n)[0], ij(n)[1]],
    "looked up backwards": lambda n: TABLE[-1 - ij(n)[0], ij(n)[1]],
    "made, then looked up backwards": lambda n: (torch.arange(n)[:, None] * 3 + torch.arange(n))[
        -1 - ij(n)[0], ij(n)[1]
    ],
    "stored": lambda n: TABLE[:n, :n],
    "chosen": lambda n: torch.where(ij(n)[0] > ij(n)[1], ij(n)[0].float(), -2.5),
    "filled": lambda n: ij(n)[0].float().expand(n, n).masked_fill(ij(n)[1] > 3, -7.0),
    "in the form of": lambda n: torch.zeros_like(ij(n)[0].expand(n, n)) + torch.full_like(ij(n)[1], 3),
    "cast": lambda n: (ij(n)[0] / 3).to(torch.int32) * ij(n)[1].to(torch.float64),
    "squeezed": lambda n: torch.arange(n * n).view(n, 1, n).squeeze(1).unsqueeze(0).squeeze(0),
    "flattened": lambda n: torch.arange(n * n).view(n, n).flatten().unflatten(0, (n, n)),
}


class Made(nn.Module):
    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x.shape[0])


def program(make: Callable[[int], Tensor]) -> tuple[fx.GraphModule, fx.Node]:
    captured = capture(Made(make), CallInputs((torch.zeros(7),), {}), {"x": {0: Dim.DYNAMIC}})
    returned = next(n for n in captured.module.graph.nodes if n.op == "output").args[0]
    return captured.module, returned[0] if isinstance(returned, (tuple, list)) else returned


@pytest.mark.parametrize("name", FORMS)
def test_entries_of_what_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_WHOLE", -1)  # nothing is small enough to be made at once
    gm, node = program(FORMS[name])
    for n in (7, 11, 20):
        sizes = dict.fromkeys(symbols(gm.graph), n)
        want = evaluate(gm, node, sizes)
        found = Entries(gm, sizes)
        assert found.shape(node) == tuple(want.shape)
        rows, columns = torch.tensor([[0], [3], [n - 1]]), torch.tensor([[n - 1, 0, 2, 5]])
        got = found.at(node, (rows, columns))
        assert got.dtype == want.dtype
        assert torch.equal(got.expand(3, 4), want[rows, columns])


def test_what_cannot_be_told() -> None:
    gm, node = program(lambda n: torch.arange(n * n).view(n, n).cumsum(0))
    with pytest.raises(UnsupportedError, match="cumsum"):
        Entries(gm, dict.fromkeys(symbols(gm.graph), 4000)).at(
            node, (torch.zeros(1, 1).long(), torch.zeros(1, 1).long())
        )


def test_sizes_at_which_the_graph_does_not_run() -> None:
    gm, node = program(lambda n: torch.ones(n, 40) + TABLE[:n].float())
    assert Entries(gm, dict.fromkeys(symbols(gm.graph), 40)).shape(node) == (40, 40)
    with pytest.raises(InvalidSizesError):
        Entries(gm, dict.fromkeys(symbols(gm.graph), 50)).shape(node)
