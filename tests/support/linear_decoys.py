"""What looks like an attention without a softmax and is none, or none that a spec can express."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from linear_models import WIDTH, D, H, Linear, V
from torch import Tensor, nn


class Undivided(Linear):
    """No sums (dot-product form of non-local blocks)."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ (k.mT @ v)) * 0.5


class Normalised(Linear):
    """Softmaxes of features and of tokens, of one packed projection (arXiv:1812.01243): no softmax over keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, H * (2 * D + V))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (H, -1)).transpose(1, 2).split((D, D, V), -1)
        return q.softmax(-1), k.softmax(-2), v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhld,bhde->bhle", q, torch.einsum("bhld,bhle->bhde", k, v))


class Gram(Linear):
    """The covariance of features, applied to the same tokens."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v @ (v.mT @ v)


class Bilinear(Linear):
    """Features of a token times those of another projection, pooled over tokens: no third tensor."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = self.heads(x)
        return self.v(x) @ self.v.weight + 0 * (q.mT @ k).sum()


class Gated(Linear):
    """A decay that each token chooses (Mamba-2, gated linear attention)."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fading = F.logsigmoid(v.mean(-1)).cumsum(-1)
        return (q @ k.mT * torch.exp(fading[..., :, None] - fading[..., None, :]).tril()) @ v


class GatedFeatures(Linear):
    """The same decay in the features of queries and keys."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fading = F.logsigmoid(v.mean(-1, keepdim=True)).cumsum(-2)
        return ((q * fading.exp()) @ (k * (-fading).exp()).mT).tril() @ v


class Delta(Linear):
    """Values less what the keys before them recall."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recalled = (k @ k.mT).tril(-1) @ v
        return (q @ k.mT).tril() @ (v - 0.1 * recalled)


class Squared(Linear):
    """Scores to the power of two: no linear attention."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT) ** 2 @ v


class TwoSided(Linear):
    """A decay to both sides."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return (q @ k.mT * 0.9 ** (i[:, None] - i).abs()) @ v


class Bent(Linear):
    """A decay that stops beyond a distance longer than the example."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return (q @ k.mT * 0.9 ** (i[:, None] - i).clamp(0, 50)).tril() @ v


class DividedByNorm(Linear):
    """Rows divided by something else than their sum."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).tril()
        return weights @ v / weights.abs().sum(-1, keepdim=True).clamp(min=1)


class Agents(Linear):
    """Two softmax attentions, one of the result of the other."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        agents = q[:, :, :3]
        return (q @ agents.mT).softmax(-1) @ ((agents @ k.mT).softmax(-1) @ v)


class Ones(Linear):
    """A column of ones among the values, whose sum divides: gains of the output would cancel."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
        return o[..., :-1] / (o[..., -1:] + 1e-6)


class LearnedDecay(Linear):
    """A decay that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.5, 0.1, 0.2]))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return (q @ k.mT * torch.exp(-self.rate[:, None, None].abs() * (i[:, None] - i)).tril()) @ v


class WithState(Linear):
    """Two chunks, with a state between them."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q, q2), (k, k2), (v, v2) = (x.tensor_split([3], dim=2) for x in (q, k, v))
        own, later = ((a @ b.mT).tril() @ c for a, b, c in ((q, k, v), (q2, k2, v2)))
        return torch.cat([own, later + q2 @ (k.mT @ v)], 2)


class DynamicFilter(Linear):
    """A matrix of features that pooled tokens choose: nothing is summed over tokens."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        left, right = k.mean(2).unsqueeze(-1), v.mean(2).unsqueeze(-2)
        return q @ (left @ right)


DECOYS: dict[type[Linear], set[str]] = {
    Undivided: {"undivided"}, Normalised: {"undivided", "no-query-key-product"},
    Gram: set(), Bilinear: set(), Gated: {"data-dependent-decay"}, GatedFeatures: {"data-dependent-decay"},
    Delta: {"nested-products"}, Squared: set(), TwoSided: {"unread-decay"}, Bent: {"unread-decay"},
    DividedByNorm: {"other-normaliser"}, WithState: {"in-pieces"},
    Ones: {"other-normaliser"}, LearnedDecay: {"unread-decay"}, DynamicFilter: set(),
}  # fmt: skip
