"""SmolLM2-135M with keys and values that are maps of a latent, a third as wide, without training: perplexity on news.

With the layer's input x, a token keeps c = (x - mean) A, before the rotation by position.  Where attention needs them, keys are
the rotated c B_k + mean W_k, and values c B_v + mean W_v (as in TransMLA, arXiv:2502.07864, without its split of the heads).
[B_k, B_v] and A are the truncated SVD of [w W_k S_k, W_v S_v] under the covariance of x: S_k S_k' is the second moment of the
queries that read a head, averaged over rotations, and S_v S_v' that of the output weights.  The weight w is the better one on
held-out text.  Layer after layer, each with the inputs that those before it now give, the output projection is fitted to the
original layer's output by least squares.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import one_thread, publish
from smollm2 import Logits
from subjects.smollm2 import SmolLM2
from torch import Tensor, nn

from attnopt.base.closeness import difference
from attnopt.fit.least_squares import Sums, fit

WEIGHTS = (3.0, 8.0)  # of keys against values
DISTANCES = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 120, 180, 260, 380)  # between a query and its key
HELD = 8  # one sequence in so many chooses among candidates
FLOOR = 1e-6  # of the largest eigenvalue


@dataclass(frozen=True)
class Latent:
    """``down`` [in, width], ``up`` [width, keys and values], ``mean`` [in] and what it gives, ``offset``."""

    down: Tensor
    up: Tensor
    mean: Tensor
    offset: Tensor

    def kept(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.down

    def keys_and_values(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (kept @ self.up + self.offset).chunk(2, -1)
        return k, v


class Rewriter:
    """Rewrites a model of transformers in place, with the same tokens ``ids`` [N, L] for all layers."""

    def __init__(self, model: Any, ids: Tensor, width: int) -> None:
        self.model, self.width, self.fitted = model.model, width, len(ids) - max(1, len(ids) // HELD)
        self.original = self.now = self.model.embed_tokens(ids)
        self.rotation = self.model.rotary_emb(self.now, torch.arange(ids.shape[1])[None])
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads

    def run(self) -> list[Latent]:
        return [self._layer(layer) for layer in self.model.layers]

    def _layer(self, layer: Any) -> Latent:
        start, attention = time.process_time(), layer.self_attn
        target = self._attended(layer, self.original)
        self.original = self._whole(layer, self.original)
        weight = attention.o_proj.weight.T.double()
        x = layer.input_layernorm(self.now)
        scale_k, back_k = self._of_queries(attention, x[: self.fitted])
        scale_v, back_v = self._of_outputs(weight)
        found = [
            self._latent(attention, x[: self.fitted], (w * scale_k, back_k / w), (scale_v, back_v)) for w in WEIGHTS
        ]
        errors = []
        for latent in found:
            _put(attention, latent)
            got = self._attended(layer, self.now[self.fitted :])
            errors.append(float((got - target[self.fitted :]).square().sum()))
        best = found[errors.index(min(errors))]
        _put(attention, best)
        before, after = self._refit(layer, target, weight)
        self.now = self._whole(layer, self.now)
        print(f"error {before:.4f} -> {after:.4f}, {time.process_time() - start:.0f} s", flush=True)
        return best

    # ------------------------------------------------------------ the latent
    def _latent(
        self, attention: Any, x: Tensor, of_keys: tuple[Tensor, Tensor], of_values: tuple[Tensor, Tensor]
    ) -> Latent:
        """Each pair: a scale and its inverse."""
        inputs = x.flatten(0, 1).double()
        mean = inputs.mean(0)
        centred = inputs - mean
        root, inverse = _roots(centred.T @ centred / len(centred))
        w_k, w_v = (p.weight.T.double() for p in (attention.k_proj, attention.v_proj))
        scaled = torch.cat([w_k @ of_keys[0], w_v @ of_values[0]], 1)
        u, s, vh = torch.linalg.svd(root @ scaled, full_matrices=False)
        down = inverse @ (u * s)[:, : self.width]
        up = vh[: self.width] @ torch.block_diag(of_keys[1], of_values[1])
        offset = mean @ torch.cat([w_k, w_v], 1)
        return Latent(down.float(), up.float(), mean.float(), offset.float())

    def _of_queries(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        q = attention.q_proj(x).flatten(0, 1).double().unflatten(-1, (self.heads, self.dim))
        shared = self.heads // self.kv_heads
        turns = [self._turn(n) for n in DISTANCES]
        found = []
        for g in range(self.kv_heads):
            own = q[:, g * shared : (g + 1) * shared].flatten(0, 1)
            moments = own.T @ own / len(q)
            found.append(_roots(sum((t.T @ moments @ t for t in turns), torch.zeros_like(moments)) / len(turns)))
        root, inverse = (torch.block_diag(*side) for side in zip(*found, strict=True))
        return root * self.dim**-0.5, inverse * self.dim**0.5

    def _of_outputs(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        per_head = weight.unflatten(0, (self.kv_heads, -1, self.dim))
        found = [_roots(sum((w @ w.T for w in own), torch.zeros(self.dim, self.dim).double())) for own in per_head]
        root, inverse = (torch.block_diag(*side) for side in zip(*found, strict=True))
        return root, inverse

    def _turn(self, distance: int) -> Tensor:
        """The rotation [D, D] by so many positions."""
        cos, sin = (x[0, distance].double() for x in self.rotation)
        eye, half = torch.eye(self.dim).double(), self.dim // 2
        turned = torch.cat([-eye[:, half:], eye[:, :half]], 1)
        return eye * cos + turned * sin

    # ------------------------------------------------------------ the layer
    def _attended(self, layer: Any, x: Tensor) -> Tensor:
        """What the attention adds to ``x``."""
        run = layer.self_attn
        return torch.cat(
            [run(layer.input_layernorm(piece), self.rotation, attention_mask=None)[0] for piece in x.split(2)]
        )

    def _whole(self, layer: Any, x: Tensor) -> Tensor:
        return torch.cat([layer(piece, position_embeddings=self.rotation, attention_mask=None) for piece in x.split(2)])

    def _refit(self, layer: Any, target: Tensor, weight: Tensor) -> tuple[float, float]:
        """The output projection, with a bias; the held-out error before and after."""
        layer.self_attn.o_proj = nn.Identity()
        z = self._attended(layer, self.now)
        fitting, held = Sums(), Sums()
        for sums, part in ((fitting, slice(self.fitted)), (held, slice(self.fitted, None))):
            features = z[part].flatten(0, 1).double()
            ones = torch.ones_like(features[:, :1])
            sums.add(torch.cat([features, ones], 1), target[part].flatten(0, 1).double())
        today = torch.cat([weight, torch.zeros_like(weight[:1])])
        found = fit(fitting.moments(), held.moments(), today, has_bias=True)
        layer.self_attn.o_proj = _linear(found.weights[:-1], found.weights[-1])
        return found.before, found.after


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive matrix, and its inverse."""
    w, u = torch.linalg.eigh(moments)
    w = w.clamp(min=FLOOR * float(w[-1])).sqrt()
    return (u * w) @ u.T, (u / w) @ u.T


def _put(attention: Any, latent: Latent) -> None:
    """Projections of low rank, of the same shape."""
    whole, offset = latent.down @ latent.up, latent.offset - latent.mean @ latent.down @ latent.up
    (k, v), (of_k, of_v) = whole.chunk(2, 1), offset.chunk(2)
    attention.k_proj, attention.v_proj = _linear(k, of_k), _linear(v, of_v)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """``weight`` [in, out]"""
    made = nn.Linear(*weight.shape)
    made.weight.data, made.bias.data = weight.T.float().contiguous(), bias.float()
    return made


def from_latents(model: Any, latents: list[Latent], ids: Tensor) -> Tensor:
    """Logits [1, L, V], token by token, over a cache that holds latents alone."""
    run, config = model.model, model.config
    dim = config.hidden_size // config.num_attention_heads
    cos, sin = run.rotary_emb(run.embed_tokens(ids), torch.arange(ids.shape[1])[None])
    kept: list[Tensor] = [torch.zeros(1, 0, latent.down.shape[1]) for latent in latents]

    def rotated(x: Tensor, start: int) -> Tensor:
        half, stop = dim // 2, start + x.shape[2]
        return x * cos[:, None, start:stop] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None, start:stop]

    logits = []
    for at in range(ids.shape[1]):
        h = run.embed_tokens(ids[:, at : at + 1])
        for n, (layer, latent) in enumerate(zip(run.layers, latents, strict=True)):
            x = layer.input_layernorm(h)
            kept[n] = torch.cat([kept[n], latent.kept(x)], 1)
            q = layer.self_attn.q_proj(x)
            q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, *latent.keys_and_values(kept[n])))
            o = nn.functional.scaled_dot_product_attention(rotated(q, at), rotated(k, 0), v, enable_gqa=True)
            h = h + layer.self_attn.o_proj(o.transpose(1, 2).flatten(2))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        logits.append(model.lm_head(run.norm(h)))
    return torch.cat(logits, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128], help="numbers of a token and layer; 384 now")
    parser.add_argument("--sequences", type=int, default=20, help="of 512 tokens, for calibration")
    options = parser.parse_args()
    one_thread()
    torch.set_grad_enabled(False)
    about = SmolLM2()
    rows: list[dict[str, Any]] = [
        {"a token keeps": 384, **about.figures(about.model()), "seconds": 0.0, "token by token": 0.0}
    ]
    for width in options.widths:
        about, start = SmolLM2(), time.process_time()
        model: Any = about.model()
        ids = torch.cat([batch for (batch,) in about.calibration(0)[: options.sequences]])
        latents = Rewriter(model.model, ids, width).run()
        seconds, few = time.process_time() - start, about.pieces[0][:, :24]
        apart = difference([from_latents(model.model, latents, few)], [Logits(model.model)(few)])
        rows.append({"a token keeps": width, **about.figures(model), "seconds": seconds, "token by token": apart})
        print(rows[-1], flush=True)
    publish(
        "latent_kv",
        rows,
        f"SmolLM2-135M with latent keys and values, calibrated on {options.sequences} x 512 tokens",
        digits=6,
    )


if __name__ == "__main__":
    main()
