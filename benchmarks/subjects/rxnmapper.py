"""An ALBERT of chemical reactions: twelve calls of one set of weights, so that one rewrite serves all of them.

Reactions are amide couplings put together from acids and amines; those to test on share neither with those to calibrate.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from common import let_transformers_import, package
from torch import Tensor, nn

from subjects import Rewrite, grouped, pruned

ACIDS = (
    "CC", "CCC", "CC(C)", "CC(C)C", "C1CC1", "C1CCCC1", "C1CCCCC1", "c1ccccc1", "Cc1ccc(cc1)", "COc1ccc(cc1)",
    "Clc1ccc(cc1)", "Fc1ccc(cc1)", "Brc1ccc(cc1)", "c1ccncc1", "c1ccoc1", "c1ccsc1", "CCOC", "CSCC", "N#CC", "FC(F)(F)C",
)  # fmt: skip
AMINES = (  # what follows the nitrogen
    "C", "CC", "CCC", "C(C)C", "CCCC", "1CCCC1", "1CCCCC1", "1CCOCC1", "1CCN(C)CC1", "Cc1ccccc1", "c1ccccc1", "c1ccc(C)cc1",
    "c1ccc(OC)cc1", "c1ccc(F)cc1", "c1ccc(Cl)cc1", "CC1CC1", "C1CCCC1", "C1CCCCC1", "CCO", "CCOC",
)  # fmt: skip
PIECE = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")
SEEN, UNSEEN = (tuple(product(ACIDS[n::2], AMINES[n::2])) for n in (0, 1))  # what calibration has, and what tests have
MASKED = 0.15


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask).logits  # type: ignore[no-any-return]


class RXNMapper:
    name = "rxnmapper"
    title = "An ALBERT of reactions (twelve calls of one set of weights) with fewer heads, without training"
    drawn = "masked accuracy"

    def __init__(self) -> None:
        let_transformers_import()
        from transformers import AlbertConfig, AlbertForMaskedLM

        folder = package("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
        model = AlbertForMaskedLM(AlbertConfig.from_pretrained(folder))
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert not missing, missing
        self._model = Logits(model).eval()
        words = (folder / "vocab.txt").read_text().splitlines()
        self.number = {word: n for n, word in enumerate(words)}

    def model(self) -> nn.Module:
        return self._model

    def dynamic_shapes(self) -> Any:
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        return {"input_ids": dict(axes), "attention_mask": dict(axes)}

    def calibration(self, seed: int, given: Sequence[tuple[str, str]] = SEEN) -> Sequence[tuple[Tensor, Tensor]]:
        reactions = [_reaction(*parts) for parts in given]
        random.Random(seed).shuffle(reactions)
        batches = [self._tokens(reactions[i : i + 16]) for i in range(0, len(reactions), 16)]
        generator = torch.Generator().manual_seed(seed)
        return [(self._hidden(ids, mask, generator)[0], mask) for ids, mask in batches]

    def rewrites(self) -> Iterator[Rewrite]:
        yield from pruned("6 of 8 heads", 0.25, 8)
        yield from pruned("4 of 8 heads", 0.5, 8)
        yield from grouped("8 -> 4 KV heads", 4)

    def figures(self, model: nn.Module) -> Mapping[str, float]:
        """How many of the hidden tokens are told right."""
        generator, right, asked = torch.Generator().manual_seed(0), 0, 0
        reactions = [_reaction(*parts) for parts in UNSEEN]
        with torch.no_grad():
            for i in range(0, len(reactions), 20):
                ids, mask = self._tokens(reactions[i : i + 20])
                seen, hidden = self._hidden(ids, mask, generator)
                found = model(seen, mask).argmax(-1)
                right += int((found == ids)[hidden].sum())
                asked += int(hidden.sum())
        numbers = {id(p): p.numel() for p in model.parameters()}
        return {"masked accuracy": right / asked, "parameters": sum(numbers.values())}

    def _tokens(self, reactions: Sequence[str]) -> tuple[Tensor, Tensor]:
        split = [["[CLS]", *PIECE.findall(r), "[SEP]"] for r in reactions]
        longest = max(map(len, split))
        ids = torch.tensor([[self.number[w] for w in s] + [0] * (longest - len(s)) for s in split])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in split])
        return ids, mask

    def _hidden(self, ids: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        special = torch.isin(ids, torch.tensor([self.number[w] for w in ("[CLS]", "[SEP]")]))
        hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & mask.bool() & ~special
        return ids.masked_fill(hidden, self.number["[MASK]"]), hidden


def _reaction(acid: str, amine: str) -> str:
    """SMILES of acid and amine, and of the amide that they give."""
    return f"{acid}C(=O)O.N{amine}>>{acid}C(=O)N{amine}"
