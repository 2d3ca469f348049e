"""Which attributes and configuration entries of a class hold head counts, found by trying changed values."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnopt.ir.spec import AttentionSpec

MOST = 256  # trials, of configurations and of attributes each
_PLAIN = (bool, int, float, str, type(None), tuple)


@dataclass(frozen=True)
class Setting:
    """An attribute of a module or of a configuration, and its new value."""

    owner: object
    name: str
    value: object

    def swap(self) -> Setting:
        """Set it, and return the inverse."""
        before = Setting(self.owner, self.name, getattr(self.owner, self.name, None))
        setattr(self.owner, self.name, self.value)
        return before


@dataclass(frozen=True)
class Counts:
    """Query and key/value heads of a site and their sizes, before and after."""

    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, old: AttentionSpec, new: AttentionSpec) -> Counts:
        return cls((old.num_heads, new.num_heads), (old.num_kv_heads, new.num_kv_heads), old.head_dim, old.value_dim)

    @property
    def change(self) -> bool:
        return self.heads[0] != self.heads[1] or self.kv_heads[0] != self.kv_heads[1]

    @property
    def quantities(self) -> dict[str, tuple[int, int]]:
        """Integer attributes of an attention module: name -> (before, after)."""
        (H, h), (G, g), D, Dv = self.heads, self.kv_heads, self.head_dim, self.value_dim
        return {
            "heads": (H, h),
            "key/value heads": (G, g),
            "queries for each": (H // G, h // g),
            "query features": (H * D, h * D),
            "key features": (G * D, g * D),
            "value features": (G * Dv, g * Dv),
            "output features": (H * Dv, h * Dv),
            "all features": (H * D + G * (D + Dv), h * D + g * (D + Dv)),
        }


def settle(candidates: Iterator[tuple[Setting, ...]], agrees: Callable[[], bool]) -> tuple[Setting, ...] | None:
    """Apply the first candidate for which ``agrees`` is true; None, with nothing changed, if there is none."""
    for settings in candidates:
        undo = [s.swap() for s in settings]
        if agrees():
            return settings
        for before in reversed(undo):
            before.swap()
    return None


# ------------------------------------------------------------ a configuration from which the class builds the same shapes
def configurations(home: Any, counts: Counts) -> Iterator[tuple[Setting, ...]]:
    """Changes of the configuration of ``home``, a transformers model with its new weights, from which its class
    builds a model of exactly these shapes; including the attributes that the class then sets differently."""
    kind, config = type(home), home.config
    data = config.to_dict()
    wanted, before = _shapes(home), empty_model(kind, config, data)
    if before is None:
        return
    for changes in itertools.islice(_changed_entries(config, data, counts), MOST):
        after_data = copy.deepcopy(data)
        for path, value in changes.items():
            _at(after_data, path[:-1])[path[-1]] = value
        after = empty_model(kind, config, after_data)
        if after is None or _shapes(after) != wanted:
            continue
        entries = (Setting(_within(config, path[:-1]), path[-1], value) for path, value in changes.items())
        yield (*entries, *_differences(home, before, after))


Path = tuple[str, ...]


def _changed_entries(config: object, data: Mapping[str, object], counts: Counts) -> Iterator[dict[Path, int]]:
    """Combinations of new counts in the entries with an old one, names with "head" first."""
    moves = [move for move in (counts.heads, counts.kv_heads) if move[0] != move[1]]
    options: dict[Path, list[int | None]] = {}
    for path, value in _entries(config, data):
        new = list(dict.fromkeys(b for a, b in moves if a == value))
        if new and type(value) is int:
            options[path] = [None, *new]
        if path[-1] == "head_dim" and value is None:
            options[path] = [None, counts.head_dim]
    if ("head_dim",) not in dict(_entries(config, data)):
        options[("head_dim",)] = [None, counts.head_dim]
    combinations = [
        {path: value for path, value in zip(options, chosen, strict=True) if value is not None}
        for chosen in itertools.islice(itertools.product(*options.values()), 2**14)
    ]
    yield from sorted((c for c in combinations if c), key=lambda c: (sum("head" not in p[-1] for p in c), len(c)))


def _entries(config: object, data: Mapping[str, object], path: Path = ()) -> Iterator[tuple[Path, object]]:
    """The plain entries of a configuration and of those inside it."""
    for name, value in data.items():
        if name in getattr(config, "sub_configs", {}) and isinstance(value, Mapping):
            yield from _entries(getattr(config, name), value, (*path, name))
        elif isinstance(value, _PLAIN):
            yield (*path, name), value


def _at(data: Any, path: Path) -> Any:
    for name in path:
        data = data[name]
    return data


def _within(config: object, path: Path) -> object:
    for name in path:
        config = getattr(config, name)
    return config


def empty_model(kind: type[nn.Module], config: Any, data: Mapping[str, object]) -> nn.Module | None:
    """A model of this class without weights; None if the class rejects the configuration."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return kind(type(config).from_dict(copy.deepcopy(dict(data))))
    except Exception:  # anything that a class raises for inconsistent numbers
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: tuple(t.shape) for name, t in tensors}


def _differences(model: nn.Module, before: nn.Module, after: nn.Module) -> Iterator[Setting]:
    """The plain attributes of modules that the class sets otherwise for the new configuration."""
    modules, others = dict(model.named_modules()), dict(after.named_modules())
    for name, old in before.named_modules():
        new = others.get(name)
        if name not in modules or new is None:
            continue
        for attribute, value in vars(new).items():
            known = vars(old).get(attribute)
            if isinstance(value, _PLAIN) and isinstance(known, _PLAIN) and known != value:
                yield Setting(modules[name], attribute, value)


# ------------------------------------------------------------ attributes of the attention modules
Slot = tuple[type[nn.Module], str]


def attributes(sites: Sequence[tuple[Sequence[nn.Module], Counts]]) -> Iterator[tuple[Setting, ...]]:
    """Changes of numbers in the modules around all sites; one attribute of a class means the same at each of them, also at
    unchanged ones.  Candidates with the most changes come first."""
    options: dict[Slot, list[str]] = {}
    for modules, counts in sites:
        for module in modules:
            for name, value in vars(module).items():
                if type(value) is not int:
                    continue
                fits = [quantity for quantity, (old, _) in counts.quantities.items() if old == value]
                slot = (type(module), name)
                options[slot] = [quantity for quantity in options.get(slot, fits) if quantity in fits]
    moving = {quantity for _, counts in sites for quantity, (old, new) in counts.quantities.items() if old != new}
    chances = {slot: [*found, None] for slot, held in options.items() if (found := [q for q in held if q in moving])}
    for chosen in itertools.islice(itertools.product(*chances.values()), MOST):
        meaning = {slot: q for slot, q in zip(chances, chosen, strict=True) if q is not None}
        if meaning:
            yield tuple(_assignments(sites, meaning))


def _assignments(sites: Sequence[tuple[Sequence[nn.Module], Counts]], meaning: Mapping[Slot, str]) -> Iterator[Setting]:
    for modules, counts in sites:
        for module in modules:
            for (kind, name), quantity in meaning.items():
                if type(module) is kind and name in vars(module):
                    yield Setting(module, name, counts.quantities[quantity][1])
