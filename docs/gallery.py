"""The gallery of mechanisms: a picture of each pass and each recipe, its line of code, its law and its cost.

A picture is computed: values are the unit vectors of the tokens, so that the outputs of a head are its attention map.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnopt
from attnopt import passes, patterns, recipes
from attnopt.compiler import plugins
from attnopt.render.page import picture_svg
from attnopt.render.png import data_uri

PASSES = Path(__file__).with_name("passes.md")
TOKENS, HEADS, SIZE = 16, 4, 8  # tokens in a grid of 4 x 4
LENGTH = 64  # of the picture of a recipe
FAR = 4096  # tokens at which its density is told

# For each pass an example; `x` are the tokens of the pictured model, [1, 16, 16].
LINES = {
    "fuse": '"fuse"',
    "local-window": "LocalWindow(left=2, sinks=1)",
    "sparse": "Sparse(Neighborhood((4, 4), kernel=3))",
    "dynamic-sparse": "DynamicSparse(keep=0.5, block=4)",
    "prune-heads": "PruneHeads(heads=[1, 3])",
    "grouped-query": "GroupedQuery(kv_heads=2, merge='mean')",
    "scale-heads": "ScaleHeads({1: 0.3, 2: 0.3})",
    "route-heads": "RouteHeads(shared=[0], routed=1)",
    "segment-gain": "SegmentGain([0, 5], 0.2, normalise='redistribute', to=range(8, 16))",
    "soft-pag": "SoftPAG(heads=[0, 2], u=0.6)",
    "head-patch": "HeadPatch([2], 'silence')",
    "steer": "Steer(x[0, 9] / 2, heads=[1], tokens=[3, 4])",
    "add-values": "AddValues(tokens=[2, 3], alpha=0.3, heads=[0, 1])",
    "extend-keys": "ExtendKeys(x[0, 12:14], weight=4.0, heads=[0, 1])",
    "pool-keys": "PoolKeys(2, grid=(4, 4), heads=[2, 3])",
    "mix-map": "MixMap(torch.eye(16).roll(1, 0), gate=0.5, heads=[0, 3])",
    "transplant": "Transplant(map=torch.eye(16).flip(0)[None], heads=[1])",
    "evict-keys": "[Sparse(Causal()), EvictKeys('sinks', budget=6)]",
    "query-rows": "QueryRows('norm', keep=0.5)",
    "replace": "Replace('conv(kernel=3)')",
    "refit": "[LocalWindow(left=2, sinks=1), Refit()]",
    "latent-kv": "LatentKv(rank=8)",
}
FITTED = ("replace", "refit", "latent-kv")  # which need data
# For each recipe an example, at the length of the picture.
RECIPES = {
    "longformer": "recipes.longformer(window=16, global_tokens=2)",
    "bigbird": "recipes.bigbird(block=4, window=3, random=2, global_blocks=1)",
    "sparse_transformer_strided": "recipes.sparse_transformer_strided(8)",
    "sparse_transformer_fixed": "recipes.sparse_transformer_fixed(8, 2)",
    "streaming_llm": "recipes.streaming_llm(window=12, sinks=4)",
    "s2_attn": "recipes.s2_attn(group=16, heads=4)",
    "longnet": "recipes.longnet([16, 64], [1, 4], heads=4)",
    "swin": "recipes.swin((8, 8), window=4, shift=2)",
    "halonet": "recipes.halonet((8, 8), block=4, halo=1)",
    "nat": "recipes.nat((8, 8), kernel=3)",
    "dinat": "recipes.dinat((8, 8), kernel=3, dilation=2)",
    "gna": "recipes.gna((8, 8), kernel=4, stride=2)",
    "axial": "recipes.axial((8, 8))",
    "local_global_heads": "recipes.local_global_heads(global_heads=1, window=12, sinks=2)",
}


class Pictured(nn.Module):
    """One attention between 16 tokens, each a unit vector; what a head gives a token is its row of the attention map."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(TOKENS, HEADS * SIZE, bias=False) for _ in range(2))
        self.v, self.out = nn.Linear(TOKENS, HEADS * TOKENS, bias=False), nn.Linear(HEADS * TOKENS, HEADS * TOKENS)
        near = -(torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() / 4.0
        with torch.no_grad():
            self.v.weight.copy_(torch.eye(TOKENS).repeat(HEADS, 1))
            self.out.weight.copy_(torch.eye(HEADS * TOKENS))
            self.out.bias.zero_()
            noise = torch.randn(2, HEADS * SIZE, TOKENS, generator=torch.Generator().manual_seed(3))
            smooth = near.exp() @ noise.mT / 2  # tokens that are near have similar queries and keys
            self.q.weight.copy_(smooth[0].mT)
            self.k.weight.copy_((smooth[0] + 0.5 * noise[1].mT).mT)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (HEADS, TOKENS)).transpose(1, 2)
        weights = (q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


def of_passes() -> str:
    """A section for each pass of attnopt."""
    ours = [p.name for p in plugins.passes().values() if p.distribution == plugins.OURS]
    model, x = Pictured().eval(), torch.eye(TOKENS)[None]
    own = _maps(model, x)
    sections = [f"As it is:\n\n{_tiles(own, 'the attention maps of four heads')}"]
    texts = _sections(PASSES.read_text("utf-8"))
    for name in sorted(ours, key=list(texts).index):
        line = LINES[name]
        data = [torch.randn(1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(i)) for i in range(16)]
        fast = attnopt.optimize(model, _value(line, x), (x,), calibration=data if name in FITTED else None)
        if fast.report.sites[0].status != "rewritten":
            raise RuntimeError(f"{line} in the gallery is refused:\n{fast.report}")
        sections.append(
            f"### [{name}](passes.md#{name})\n\n{_papers(plugins.load_pass(name))}"
            f"{_tiles(_maps(fast, x), f'the maps of four heads under {line}')}\n\n"
            f"```py\nattnopt.optimize(model, {line}, args)\n```\n\n"
            f"**Law.** {_told(texts[name], 'Law')}\n\n**Cost.** {_first(_told(texts[name], 'Cost'))}"
        )
    return "\n\n".join(sections)


def of_recipes() -> str:
    """A section for each function of ``attnopt.recipes``."""
    return "\n\n".join(_recipe(name) for name in recipe_names())


def recipe_names() -> list[str]:
    """The public functions of ``attnopt.recipes``, in its order."""
    own = vars(recipes).items()
    return [name for name, f in own if getattr(f, "__module__", "") == recipes.__name__ and not name.startswith("_")]


def _recipe(name: str) -> str:
    line = RECIPES[name]
    pattern = _value(line)
    svg = re.sub(r"\s*\n\s*", " ", picture_svg(pattern, LENGTH)).strip()
    share = f"{pattern.density(LENGTH, LENGTH):.0%} of the pairs of {LENGTH} tokens"
    if pattern.lengths is None:
        share += f", {pattern.density(FAR, FAR):.2%} of those of {FAR:,}"
    meaning = " ".join((getattr(recipes, name).__doc__ or "").partition("\n\n")[0].split()).replace("``", "`")
    return (
        f'### {name}\n\n<div style="display:flex;flex-wrap:wrap;gap:.3rem">{svg}</div>\n\n'
        f"{_linked(meaning)}\n\n```py\nattnopt.optimize(model, Sparse({line}), args)\n```\n\n"
        f"**Cost.** {share}."
    )


def _value(line: str, x: Tensor | None = None) -> Any:
    names = {n: getattr(passes, n) for n in passes.__all__} | {n: getattr(patterns, n) for n in patterns.__all__}
    return eval(line, {**names, "recipes": recipes, "torch": torch, "x": x})


def _maps(model: nn.Module, x: Tensor) -> Tensor:
    """[heads, queries, keys]"""
    with torch.inference_mode():
        found: Tensor = model(x)[0].unflatten(-1, (HEADS, TOKENS)).transpose(0, 1)
    return found


def _tiles(maps: Tensor, told: str) -> str:
    style = "width:5rem;height:5rem;image-rendering:pixelated;border:1px solid #8888"
    pictures = "".join(
        f'<img src="{data_uri(one.clamp(0, 1).sqrt().double().numpy())}" alt="" style="{style}">' for one in maps
    )
    return f'<div role="img" aria-label="{escape(told)}" style="display:flex;gap:.3rem">{pictures}</div>'


def _sections(page: str) -> dict[str, str]:
    """The text of each section of a page, by its title."""
    return {title: text for title, _, text in (s.partition("\n") for s in page.split("\n## ")[1:])}


def _told(section: str, title: str) -> str:
    """The paragraph that begins with ``**title.**``"""
    (paragraph,) = re.findall(rf"^\*\*{title}\.\*\* (.*?)\n\n", section + "\n\n", re.MULTILINE | re.DOTALL)[:1]
    return " ".join(paragraph.split())


def _first(text: str) -> str:
    """Its first sentence."""
    return re.split(r"(?<=\.)\s+(?=[A-Z`\"])", text)[0]


def _papers(kind: type[Any]) -> str:
    """Links to the papers that a docstring names, as a line of their own."""
    found = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", kind.__doc__ or ""))
    return "".join(f"[arXiv:{n}](https://arxiv.org/abs/{n}) " for n in found) + ("\n\n" if found else "")


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
