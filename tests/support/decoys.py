"""Modules that look like attention and are not plain attention, with what a wrong raise would make of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, H, L = 12, 3, 6
D = E // H


class Decoy(nn.Module):
    """[B, L, E] -> [B, L, E] (some return more)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E) for _ in range(4))
        for p in self.parameters():
            p.data *= 2

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, L, D] each."""
        B, n, _ = x.shape
        q, k, v = (f(x).view(B, n, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def merged(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))


class SoftmaxGate(Decoy):
    """A mixture over channels, weighted token by token."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.softmax(self.q(x), -1) * self.v(x))


class Routing(Decoy):
    """A mixture of experts: the weights choose experts, not tokens."""

    def __init__(self, experts: int = 4, top: int = 0) -> None:
        super().__init__()
        self.router = nn.Linear(E, experts)
        self.experts = nn.ModuleList(nn.Linear(E, E) for _ in range(experts))
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.top:
            best, index = weights.topk(self.top, -1)
            weights = torch.zeros_like(weights).scatter(-1, index, best / best.sum(-1, keepdim=True))
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)  # [B, L, X, E]
        return (weights.unsqueeze(-2) @ outputs).squeeze(-2)


class DenseRouting(Routing):
    """As Routing, spelled as an einsum over one stacked weight."""

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([e.weight for e in self.experts])
        return torch.einsum("blx,xef,blf->ble", self.router(x).softmax(-1), stacked, x)


class SoftRouting(Decoy):
    """Expert prototypes are compared with tokens: a product, a softmax and a product, over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(5, E))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.prototypes.T, dim=-1)
        return (
            self.o(weights * weights.sum(-1, keepdim=True)) if False else self.o(F.pad(weights, (0, E - 5)) * self.v(x))
        )


class LinearAttention(Decoy):
    """Two softmaxes, on features of q and on tokens of k (Shen et al.)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v))


class KernelAttention(Decoy):
    """elu + 1 features, no softmax at all."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return self.merged(q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2)))


class OverQueries(Decoy):
    """Each key divides itself among the queries: an attention of its own kind."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-1, -2) / 2).softmax(-2) @ v)


class SlotAttention(Decoy):
    """Softmax over slots (queries), then normalised over inputs (Locatello et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, 4, E))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(self.slots.expand(len(x), -1, -1)), self.k(x), self.v(x)
        weights = torch.softmax(k @ q.transpose(-1, -2) * E**-0.5, dim=-1) + 1e-8  # [B, L, slots]
        weights = weights / weights.sum(dim=1, keepdim=True)
        return self.o(weights.transpose(1, 2) @ v)


class OverChannels(Decoy):
    """Channels attend to channels (XCA)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(-1, -2) for t in self.heads(x))  # [B, H, D, L]
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-1, -2) * 2).softmax(-1)
        return self.o((weights @ v).permute(0, 3, 1, 2).flatten(2))


class SlotsOverFeatures(Decoy):
    """Learned mixtures of tokens choose among features: keys are channels, queries are none."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(16 * L, 16 * L))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        weights = (self.slots[:n, :n] @ self.k(x)).softmax(-1)  # [B, slots, E]
        return self.o((weights @ self.v(x).mT).mT @ self.q(x))


class OverHeads(Decoy):
    """Heads of one token attend to each other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))  # [B, L, H, D]
        return self.o(((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).flatten(2))


class MaskedAfter(Decoy):
    """The mask is multiplied with the weights, which are then divided by what is left of their sum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1) * torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
        return self.merged(weights / weights.sum(-1, keepdim=True) @ v)


class TalkingHeads(Decoy):
    """Heads are mixed before and after the softmax (Shazeer et al.)."""

    def __init__(self, before: bool = True, after: bool = True) -> None:
        super().__init__()
        self.before = nn.Linear(H, H, bias=False) if before else None
        self.after = nn.Linear(H, H, bias=False) if after else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = q @ k.transpose(-1, -2) / 2
        if self.before is not None:
            weights = self.before(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = weights.softmax(-1)
        if self.after is not None:
            weights = self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.merged(weights @ v)


class MappedElsewhere(Decoy):
    """A linear map of scores or weights across the keys, which are as many as the matrix has columns."""

    def __init__(self, after: bool = False) -> None:
        super().__init__()
        self.after, self.map = after, nn.Parameter(torch.randn(16 * L, 16 * L))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        n = x.shape[1]
        across = self.map[:n, :n]
        weights = F.linear(scores.softmax(-1), across) if self.after else F.linear(scores, across).softmax(-1)
        return self.merged(weights @ v)


class MappedTwice(Decoy):
    """Something between the products and the softmax that is no map: a maximum of heads and their map."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(H, H, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        return self.merged(torch.maximum(self.map(scores), scores).softmax(-1) @ v)


class NonLocal(Decoy):
    """Dot-product non-local block: no normaliser but the number of keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(q @ k.transpose(-1, -2) / x.shape[1] @ v)


class Sigmoid(Decoy):
    """Sigmoid attention: weights do not compete."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(torch.sigmoid(q @ k.transpose(-1, -2) / 2 - 1.8) @ v)


class SoftmaxPlusOne(Decoy):
    """exp / (1 + sum exp) by hand: a sink of logit 0, unless it is taken for a plain softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        e = torch.exp(q @ k.transpose(-1, -2) / 2)
        return self.merged(e / (1 + e.sum(-1, keepdim=True)) @ v)


class Entmax(Decoy):
    """Squared softmax, normalised again."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1) ** 2
        return self.merged(weights / weights.sum(-1, keepdim=True) @ v)


class TopK(Decoy):
    """Only the best keys of each query stay, which depends on the scores themselves."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        least = scores.topk(3, -1).values[..., -1:]
        return self.merged(scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v)


class Differential(Decoy):
    """The difference of two softmaxes (Ye et al.)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a, b = ((q[..., i::2] @ k[..., i::2].transpose(-1, -2)).softmax(-1) for i in (0, 1))
        return self.merged((a - 0.5 * b) @ v)


class ScoresReturned(Decoy):
    """Plain attention, but somebody else wants its scores."""

    def __init__(self, after: bool = False) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        weights = scores.softmax(-1)
        return self.merged(weights @ v), weights if self.after else scores


class GatedWeights(Decoy):
    """Weights times a gate that each query makes for each key."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        return self.merged(scores.softmax(-1) * torch.sigmoid(scores) @ v)


class CubedScores(Decoy):
    """A nonlinearity between the product and the softmax that is no softcap."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-1, -2) / 2).relu().softmax(-1) @ v)


class ClassPooling(Decoy):
    """Softmax over tokens of a learned score: pooling, without queries."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(E, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o((self.score(x).softmax(1) * self.v(x)).sum(1, keepdim=True))


class SmoothedScores(Decoy):
    """Scores are averaged over neighbouring keys before the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        return self.merged(((scores + scores.roll(1, -1)) / 2).softmax(-1) @ v)


class Transposed(Decoy):
    """With as many queries as keys: the weights are transposed before the values, so that the softmax is over queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-1, -2) / 2).softmax(-1).transpose(-1, -2) @ v)


class SummedHeads(Decoy):
    """Heads are summed together with the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(D, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.o(torch.einsum("bhls,bhsd->bld", weights, v))


class Shuffled(Decoy):
    """With as many keys as queries: keys are flipped between the softmax and the values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-1, -2) / 2).softmax(-1).flip(-1) @ v)


class DroppedColumn(Decoy):
    """One real key takes weight and its value is left out: a slice as a sink's, of a column that is no sink."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)[..., :-1]
        return self.merged(weights @ v[..., :-1, :])


class FirstColumnDropped(Decoy):
    """A sink in the last column, but the first column is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
        return self.merged(scores.softmax(-1)[..., 1:] @ v)


class OneBesideShifted(Decoy):
    """Softmax-one of scores from which the row maximum was taken: what takes weight depends on the scores."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / 2
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return self.merged(e / (1 + e.sum(-1, keepdim=True)) @ v)


class PaddedElsewhere(Decoy):
    """A column of zeros behind the keys, but the first key is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(F.pad(q @ k.transpose(-1, -2) / 2, (0, 1)).softmax(-1)[..., 1:] @ v)


class PaddedTwice(Decoy):
    """Two columns of zeros, of which one stays."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = F.pad(q @ k.transpose(-1, -2) / 2, (1, 1)).softmax(-1)[..., :-1]
        return self.merged(weights @ F.pad(v, (0, 0, 0, 1)))


# Never raised as plain attention: no site at all, or (where the meaning does have a spec) one that equals it.
NEVER = [
    SoftmaxGate, Routing, DenseRouting, SoftRouting, LinearAttention, SlotAttention,
    SlotsOverFeatures, MaskedAfter, MappedElsewhere, MappedTwice, NonLocal, Sigmoid, Entmax, TopK, Differential,
    GatedWeights, CubedScores, ClassPooling, SmoothedScores, SummedHeads, Shuffled, DroppedColumn, FirstColumnDropped,
    OneBesideShifted, PaddedElsewhere, PaddedTwice,
]  # fmt: skip
