"""Retrieval heads: heads that copy a needle from the context while the model decodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.head_probe import HeadProbe
from attnopt.ir.importance import ModelImportance
from attnopt.ir.site import Site
from attnopt.ir.weight_rows import of_sequence, weights_of
from attnopt.statistics.calibrated import calibrated
from attnopt.statistics.logits import logits_of_output
from attnopt.statistics.token_ids import token_ids, with_ids

Span = tuple[int, int]
AHEAD = 1e-3  # of the largest logit: what later tokens may change of earlier logits by rounding


@dataclass(frozen=True)
class _Copy:
    """One retrieval that succeeds: the steps at which the model copies, as rows of the attention, and the tokens it makes."""

    batch: int
    sequence: int
    rows: Tensor
    made: Tensor
    ids: Tensor
    needle: Span


@dataclass(frozen=True)
class Retrieval(ModelImportance):
    """Retrieval score of a causal language model (arXiv:2404.15574): how often a head copies while a needle is decoded::

        #{steps : j = argmax_j p_tj lies in the needle, and token j is the token generated at t} / #steps

    over the decoding steps whose token is one of the needle's, of the retrievals that succeed.  (The paper divides by the
    number of needle tokens, which is the same where the answer is the needle.)

    Each sequence of the calibration data is a prompt followed by the expected answer.  ``needles``, ``answers``: for each
    sequence the span (first, last + 1) of its tokens; ``needle_task`` makes all three.  A retrieval succeeds if greedy
    decoding gives the answer.  A causal model does so exactly if it predicts each of its tokens from those before, which one
    run on the whole text shows.  Raises PolicyError, and CalibrationError for a model that is not causal, and if it never
    succeeds.
    """

    name: ClassVar[str] = "retrieval"
    uses_behaviour: ClassVar[bool] = True
    needles: Sequence[Span]
    answers: Sequence[Span]

    def __post_init__(self) -> None:
        for option in ("needles", "answers"):
            object.__setattr__(self, option, tuple(self._span(option, s) for s in getattr(self, option)))
        if len(self.needles) != len(self.answers) or not self.needles:
            raise PolicyError(
                f"retrieval: {len(self.needles)} needles for {len(self.answers)} answers: expected one of each per sequence"
            )

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        copies = list(self._copies(probe))
        return {site.name: self._of_site(site, copies) for site in probe.sites()}

    def _span(self, option: str, given: Any) -> Span:
        if isinstance(given, (list, tuple)) and len(given) == 2 and all(type(x) is int for x in given):
            first, end = given
            if 0 <= first < end and (option == "needles" or first > 0):
                return first, end
        raise PolicyError(
            f"retrieval: invalid span {given!r} in {option}: expected (first, last + 1) of token positions"
        )

    def _copies(self, probe: HeadProbe) -> Iterator[_Copy]:
        """Raises CalibrationError."""
        texts = [(i, n) for i, batch in enumerate(probe.batches) for n in range(len(token_ids(batch)))]
        if len(texts) != len(self.needles):
            raise CalibrationError(f"retrieval: needles of {len(self.needles)} sequences for {len(texts)} sequences")
        succeeded, copied, outputs = 0, 0, dict[int, Tensor]()
        for (i, n), needle, answer in zip(texts, self.needles, self.answers, strict=True):
            ids = token_ids(probe.batches[i])[n]
            if max(needle[1], answer[1]) > len(ids) or needle[1] > answer[0]:
                raise CalibrationError(
                    f"needle {needle} and answer {answer} do not fit sequence {n} of batch {i}, which has {len(ids)} tokens",
                    hint="give spans inside the sequence, with the answer after the needle",
                )
            if i not in outputs:
                outputs = {i: _logits(probe, probe.batches[i])}
                _require_causal(
                    probe, i, outputs[i], min(a[0] for t, a in zip(texts, self.answers, strict=True) if t[0] == i)
                )
            rows = torch.arange(answer[0] - 1, answer[1] - 1)
            made = ids[answer[0] : answer[1]].cpu()
            if not torch.equal(outputs[i][n, rows].argmax(-1).cpu(), made):
                continue
            succeeded += 1
            ids = ids.cpu()
            inside = torch.isin(made, ids[needle[0] : needle[1]])
            copied += int(inside.sum())
            yield _Copy(i, n, rows[inside], made[inside], ids, needle)
        if not copied:
            why = (
                "none of the tokens of the answers is in their needles"
                if succeeded
                else f"the model decodes none of the {len(texts)} answers"
            )
            raise CalibrationError(f"retrieval: {why}", hint="give needles that the model retrieves word for word")

    def _of_site(self, site: Site, copies: Sequence[_Copy]) -> Sequence[float]:
        now, hits, steps = calibrated(site), torch.zeros(site.num_heads, dtype=torch.float64), 0
        batches = list(now.operands(site.spec))
        for c in copies:
            t = of_sequence(batches[c.batch], c.sequence)
            if t.q.shape[2] != len(c.ids) or t.k.shape[2] != len(c.ids):
                raise CalibrationError(
                    f"its {t.q.shape[2]} queries and {t.k.shape[2]} keys are not the {len(c.ids)} tokens of the text",
                    site=site.name,
                    hint="score the attentions between the tokens alone, with sites=",
                )
            top_HN = weights_of(site.spec, t, c.rows.to(t.q.device)).argmax(-1).cpu()
            inside = (top_HN >= c.needle[0]) & (top_HN < c.needle[1])
            hits += (inside & (c.ids[top_HN] == c.made)).sum(1)
            steps += len(c.rows)
        return (hits / steps).tolist()


def needle_task(
    prompts: Sequence[Any], needles: Sequence[Span], expected: Sequence[Any]
) -> tuple[list[Tensor], Retrieval]:
    """Calibration data and the importance for it: ``head_importance(model, *needle_task(...))``.

    ``prompts``: token ids [length] of each prompt; ``needles``: the span (first, last + 1) of the needle in it; ``expected``:
    the token ids that the model is to answer.  Raises PolicyError.
    """
    if not len(prompts) == len(needles) == len(expected):
        raise PolicyError(f"needle_task: {len(prompts)} prompts, {len(needles)} needles and {len(expected)} answers")
    texts, answers = [], []
    for prompt, answer in zip(prompts, expected, strict=True):
        ids = [torch.as_tensor(x, dtype=torch.long).flatten() for x in (prompt, answer)]
        texts.append(torch.cat(ids).unsqueeze(0))
        answers.append((len(ids[0]), len(ids[0]) + len(ids[1])))
    return texts, Retrieval(needles, answers)


def _logits(probe: HeadProbe, batch: CallInputs) -> Tensor:
    logits = logits_of_output(probe, probe.output(batch))
    if logits.dim() != 3 or logits.shape[:2] != token_ids(batch).shape:
        raise CalibrationError(
            f"retrieval: logits {list(logits.shape)} are not those of a language model for tokens {list(token_ids(batch).shape)}",
            hint="pass behaviour=, a function from the model's output to logits [batch, tokens, vocabulary]",
        )
    return logits.detach()


def _require_causal(probe: HeadProbe, number: int, logits: Tensor, end: int) -> None:
    """Raises CalibrationError if the tokens from ``end`` on change logits before."""
    batch = probe.batches[number]
    ids = token_ids(batch).clone()
    ids[:, end:] = (ids[:, end:] + 1) % logits.shape[2]
    changed = _logits(probe, with_ids(batch, ids))[:, :end]
    if float((changed - logits[:, :end]).abs().max()) > AHEAD * float(logits[:, :end].abs().max()):
        raise CalibrationError(
            "retrieval: the model is not causal: logits of the prompt depend on the tokens after it",
            hint="use a causal language model",
        )
