"""Texts of news with facts in them, and a question at their end, as RULER makes them (arXiv:2404.06654).

The answer is a number of five digits, which nobody could guess.  Every text has the same number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from smollm2 import CITIES, news, tokenizer

NEEDLES = 4  # facts of which one is asked for
HOPS = 2  # of a chain of variables


@dataclass(frozen=True)
class Fact:
    """Sentences that lie apart in the text, in this order; the question, which the answer completes."""

    sentences: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """``ids``: the whole text with the answer at its end.  ``needle``: (first, last + 1) of the answer in the sentence that
    holds it."""

    ids: list[int]
    needle: tuple[int, int]
    answer: list[int]


def needle(draw: random.Random) -> Fact:
    city, number = draw.choice(CITIES), _number(draw)
    return Fact((f" The special number of {city} is{number}.",), f" The special number of {city} is", number)


def several_needles(draw: random.Random) -> Fact:
    """One of several is asked for."""
    cities, numbers = draw.sample(CITIES, NEEDLES), [_number(draw) for _ in range(NEEDLES)]
    asked = draw.randrange(NEEDLES)
    said = [f" The special number of {c} is{n}." for c, n in zip(cities, numbers, strict=True)]
    rest = said[:asked] + said[asked + 1 :]
    return Fact((said[asked], *rest), f" The special number of {cities[asked]} is", numbers[asked])


def variables(draw: random.Random) -> Fact:
    """A value that is handed on from one variable to the next; of the last one it is asked."""
    number, names = _number(draw), draw.sample([f"X{n}" for n in range(10, 100)], HOPS + 1)
    given = [f" VAR {names[0]} ={number}."]
    given += [f" VAR {b} = VAR {a}." for a, b in pairwise(names)]
    return Fact(tuple(given), f" The value of VAR {names[-1]} is", number)


KINDS: dict[str, Callable[[random.Random], Fact]] = {
    "needle": needle,
    f"one of {NEEDLES} needles": several_needles,
    f"variable, {HOPS} hops": variables,
}


def tasks(kind: str, count: int, tokens: int, seed: int) -> list[Task]:
    """Their depths in the text vary.  News of the first half if ``seed`` is even, of the second half if it is odd."""
    draw = random.Random(f"{kind} {seed}")
    return [_task(KINDS[kind](draw), tokens, draw, seed % 2) for _ in range(count)]


def texts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """News alone, from the same halves."""
    draw = random.Random(f"news {seed}")
    return [_filler(tokens, draw, seed % 2) for _ in range(count)]


def _task(fact: Fact, tokens: int, draw: random.Random, half: int) -> Task:
    answer, question = _ids(fact.answer), _ids(fact.question)
    said = [_ids(s) for s in fact.sentences]
    filler = _filler(tokens - sum(map(len, said)) - len(question) - len(answer), draw, half)
    places = [draw.randrange(round(0.05 * len(filler)), round(0.95 * len(filler))) for _ in said]
    if "VAR" in fact.question:  # a chain is told in its order
        places.sort()
    ids, at, start = list[int](), 0, 0
    for place, sentence in sorted(zip(places, said, strict=True), key=lambda x: x[0]):
        ids += filler[at:place]
        start = len(ids) if sentence is said[0] else start
        ids, at = ids + sentence, place
    ids += filler[at:] + question + answer
    first = start + _inside(said[0], answer)
    return Task(ids, (first, first + len(answer)), answer)


def _inside(sentence: list[int], answer: list[int]) -> int:
    return next(i for i in range(len(sentence)) if sentence[i : i + len(answer)] == answer)


def _filler(count: int, draw: random.Random, half: int) -> list[int]:
    ids = news().tolist()
    middle = len(ids) // 2
    start = draw.randrange(middle - count) + half * middle
    return ids[start : start + count]


def _ids(text: str) -> list[int]:
    found: list[int] = tokenizer()(text).input_ids
    return found


def _number(draw: random.Random) -> str:
    return f" {draw.randrange(10_000, 100_000)}"
