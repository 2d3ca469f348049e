"""What sequence parallelism makes of every special attention: on several ranks it is exact, or refused, and never wrong.

Run by ``ranks.on_ranks``, as ``parallel_checks``; what is refused is also refused by a plan, without ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import linear_models
import sending_models
import torch
import zoo
from parallel_checks import same
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import attnopt
from attnopt import Input
from attnopt.distributed import context_parallel
from attnopt.passes import (
    AddValues,
    ExtendKeys,
    LocalWindow,
    PruneHeads,
    QueryRows,
    Replace,
    RouteHeads,
    SegmentGain,
    Sparse,
)
from attnopt.patterns import Causal, Keys, Segments, Window

WIDTH, IDS = sending_models.WIDTH, Input("ids")
H, D = 3, 4
LENGTH, OTHERS = 10, (9, 13)  # of the example, and others: none divides by the numbers of ranks


class Plain(nn.Module):
    """[B, N, WIDTH] -> [B, N, WIDTH]"""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, H * D) for _ in range(3))
        self.out = nn.Linear(H * D, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made: Tensor = self.out(self.mixed(q, k, v).transpose(1, 2).flatten(2))
        return made

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * D**-0.5).softmax(-1) @ v


class Talking(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(H, H))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("hj,bjls->bhls", self.map, q @ k.mT * D**-0.5).softmax(-1) @ v


class Channels(Plain):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (nn.functional.normalize(x.mT, dim=-1) for x in (q, k))
        return ((q @ k.mT).softmax(-1) @ v.mT).mT


class Clamped(Plain):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).clamp(-1, 1).softmax(-1) @ v


class Stack(nn.Module):
    """Attentions one after the other, with what acts token by token between them."""

    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(kind() for kind in kinds)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for attention, norm in zip(self.attentions, self.norms, strict=True):
            x = x + attention(norm(x))
        return x.relu()


@dataclass(frozen=True)
class Special:
    """``kinds``: of the attentions of a model; ``policy``: of the second; ``refused``: a part of the error, if it is not exact.
    ``backend``: "auto" for what "blocked" does not compute.  Each call brings "ids" if the policy reads them."""

    kinds: tuple[type[nn.Module], ...]
    policy: object = "fuse"
    refused: str | None = None
    backend: str = "blocked"


_IN_PLAIN = "reads the tokens of all ranks: it is computed in plain operators\n  hint: run this model on one rank"
_NONE = "no attention over tokens in one operator.*\n  hint: .* without a softmax, with a map across heads, or between channels"
Reversed, Fading, Steady = sending_models.Reversed, linear_models.Retention, linear_models.StateFirst
GAIN = SegmentGain(Segments(IDS, [(None, 1)]), 0.5)
MOVED = SegmentGain(Segments(IDS, [(None, 1)]), 0.5, normalise="redistribute", to=Segments(IDS, [(None, 2)]))


def _everywhere(name: str, kind: type[nn.Module], refused: str | None = None) -> dict[str, Special]:
    """``refused``: between two others, whose tokens are on several ranks."""
    return {
        f"{name}, before": Special((kind, Plain), backend="auto"),
        f"{name}, behind": Special((Plain, kind), backend="auto"),
        f"{name}, between": Special((Plain, kind, Plain), refused=refused, backend="auto"),
        f"{name}, alone": Special((kind,), refused=_NONE, backend="auto"),
    }


SPECIALS = {
    "sends, before": Special((Reversed, Plain)),
    "sends, behind": Special((Plain, Reversed)),
    "sends, twice": Special((Reversed, Reversed), PruneHeads(heads=[1])),
    "sends, in a window": Special((Plain, Reversed, Plain), LocalWindow(3, 1)),
    "sends, to earlier ones": Special((Plain, Reversed, Plain), Sparse(Causal()), backend="auto"),
    **_everywhere("fading", Fading, _IN_PLAIN),
    **_everywhere("steady", Steady),
    **_everywhere("talking", Talking),
    **_everywhere("clamped", Clamped),
    **_everywhere("channels", Channels, "is an attention between channels"),
    # what passes make
    "gains": Special((Plain, Plain), SegmentGain([Keys([0, 5]), Window(2, 0)], (0.5, 2.0))),
    "gains of segments": Special((Plain, Plain, Plain), GAIN),
    "gains that move": Special((Plain, Plain, Plain), MOVED),
    "segments": Special((Plain, Plain, Plain), Sparse(Segments(IDS))),
    "zeros beyond the edges": Special((Plain, Plain, Plain), Sparse(Window(2, 2), zero_pad=True)),
    "keys of other tokens": Special((Plain, Plain), ExtendKeys(torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH))),
    "routed": Special((Plain, Plain, Plain), RouteHeads(routed=2), _IN_PLAIN),
    "values that are added": Special((Plain, Plain, Plain), AddValues([0, 2], 0.5)),
    "chosen rows": Special((Plain, Plain, Plain), QueryRows("norm"), _IN_PLAIN),
    "a mixer": Special((Plain, Plain, Plain), Replace("pool"), _IN_PLAIN),
}


@cache
def optimized(name: str) -> attnopt.OptimizedModel:
    special = SPECIALS[name]
    torch.manual_seed(0)
    model = zoo.loud(Stack(*special.kinds)).double()
    policy = special.policy if special.policy == "fuse" else {"*": "fuse", "attentions.1": special.policy}
    beside = given(name, LENGTH)
    x = beside.pop("x")
    data = None if beside else [x]
    fast = attnopt.optimize(
        model, policy, (x,), beside, dynamic_shapes="auto", calibration=data, backend=special.backend
    )
    if special.policy != "fuse":
        assert fast.report.sites[1].status == "rewritten", fast.report
    return fast


def given(name: str, length: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(length)
    found = {"x": torch.randn(2, length, WIDTH, dtype=torch.float64, generator=random)}
    if "ids" in str(SPECIALS[name].policy):
        found["ids"] = torch.randint(3, (2, length), generator=random)
    return found


def _exact(name: str) -> Callable[[DeviceMesh], None]:
    def check(mesh: DeviceMesh) -> None:
        one = optimized(name)
        alone, parallel = copy.deepcopy(one), context_parallel(one, mesh)
        for length in (*OTHERS, LENGTH):
            want, got = alone(**given(name, length)), parallel(**given(name, length))
            is_whole = got.shape == want.shape  # behind the last attention, tokens were collected
            same(got, want if is_whole else parallel.own(want), 1e-12)
        want.square().sum().backward()
        (got.square().sum() / (mesh.size() if is_whole else 1)).backward()
        parallel.reduce_gradients()
        _compare_gradients(one, alone)

    return check


def _compare_gradients(got: nn.Module, want: nn.Module) -> None:
    """Beside the largest of all: that of a bias of keys is 0 but for rounding."""
    wanted = {name: p.grad for name, p in want.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, p in got.named_parameters():
        if name in wanted:
            assert float((p.grad - wanted[name]).abs().max()) <= 1e-11 * largest, name
        p.grad = None


CHECKS = {name: _exact(name) for name, special in SPECIALS.items() if special.refused is None}
