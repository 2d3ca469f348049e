"""Checkpoints whose layers differ in heads: what the class builds otherwise, as an entry of the configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from attnopt.conversion.class_settings import Setting, empty_model
from attnopt.conversion.reordered_weights import put_into
from attnopt.errors import ConversionError

ENTRY = "attnopt_heads"  # of a configuration


@dataclass(frozen=True)
class LayerHeads:
    """``attributes``: by module and attribute, the integers that a class sets otherwise.  ``shapes``: of the parameters that it
    builds otherwise, by name."""

    attributes: Mapping[str, Mapping[str, int]]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any, settings: Iterable[Setting]) -> LayerHeads | None:
        """What ``model``, of transformers, has after ``settings``; None if its class cannot be built from its configuration or
        differs in more than parameters."""
        built = empty_model(type(model), model.config, model.config.to_dict())
        if built is None:
            return None
        wanted, shapes = _parameters(model), {name: tuple(p.shape) for name, p in _parameters(built).items()}
        if wanted.keys() != shapes.keys():
            return None
        names = {id(module): name for name, module in model.named_modules()}
        attributes: dict[str, dict[str, int]] = {}
        for s in settings:
            if id(s.owner) in names and isinstance(s.value, int):
                attributes.setdefault(names[id(s.owner)], {})[s.name] = s.value
        return cls(attributes, {n: tuple(p.shape) for n, p in wanted.items() if tuple(p.shape) != shapes[n]})

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises ConversionError."""
        try:
            attributes = {str(m): {str(k): _whole(v) for k, v in own.items()} for m, own in data["attributes"].items()}
            shapes = {str(n): tuple(map(_whole, shape)) for n, shape in data["shapes"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ConversionError(f"invalid entry {ENTRY!r} of the configuration: {e!r}") from e
        return cls(attributes, shapes)

    def to_json(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"attributes": {m: dict(own) for m, own in self.attributes.items()}, "shapes": shapes}

    def put_into(self, model: nn.Module) -> None:
        """Set attributes and shapes in a model that its class has just built.  Raises ConversionError."""
        modules, known = dict(model.named_modules()), _parameters(model)
        for name, own in self.attributes.items():
            for attribute, value in own.items():
                if type(getattr(modules.get(name), attribute, None)) is not int:
                    raise _unknown(model, f"integer {name}.{attribute}")
                setattr(modules[name], attribute, value)
        for name in self.shapes:
            if name not in known:
                raise _unknown(model, f"parameter {name}")
        put_into(
            model,
            {n: torch.empty(s, dtype=known[n].dtype, device=known[n].device) for n, s in self.shapes.items()},
        )


def note_heads(model: Any, settings: Iterable[Setting]) -> bool:
    """Note in the configuration of ``model``, of transformers, what its class would build otherwise; whether that is possible."""
    found = LayerHeads.of(model, settings)
    if found is None:
        return False
    before = getattr(model.config, ENTRY, None)
    if before is not None:  # a model that was converted before
        old = LayerHeads.from_json(before).attributes
        names = {*old, *found.attributes}
        joined = {name: {**old.get(name, {}), **found.attributes.get(name, {})} for name in names}
        found = LayerHeads(joined, found.shapes)
    setattr(model.config, ENTRY, found.to_json())
    return True


def forget_heads(model: Any) -> None:
    """The configuration alone describes the heads of ``model``."""
    if hasattr(model.config, ENTRY):
        delattr(model.config, ENTRY)


def load_pretrained(folder: str | os.PathLike[str], kind: type[Any] | None = None, **options: Any) -> Any:
    """Load a folder that ``save_pretrained`` wrote of a converted model, into the class of transformers that it names.

    Layers may differ in heads; patterns and evictions are applied as ``apply_patterns`` does.  The form of the checkpoint is
    in ``docs/convert.md``.  ``kind``: the class, if transformers has none of that name.  ``options``: those of
    ``from_pretrained``.

    Raises ConversionError if the folder is no such checkpoint, or lacks weights.
    """
    import transformers

    from attnopt.conversion.hf_install import EVICTIONS, PATTERNS, install

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise ConversionError(f"{folder} is not a checkpoint of transformers: {e}") from e
    kind = kind or _class_of(config)
    entry = getattr(config, ENTRY, None)
    built = kind if entry is None else _resized(kind, LayerHeads.from_json(entry))
    model, found = built.from_pretrained(folder, **options, output_loading_info=True)
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found[what]:
            listed = ", ".join(sorted(map(str, found[what]))[:3])
            raise ConversionError(
                f"the weights in {folder} do not fit {kind.__name__}: {what.replace('_', ' ')}: {listed}",
                hint="load the folder that save_pretrained wrote of the converted model",
            )
    model.__class__ = kind
    if getattr(config, PATTERNS, None) or getattr(config, EVICTIONS, None):
        install(model)
    return model


def _class_of(config: Any) -> type[Any]:
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise ConversionError(
        f"transformers has no model class {config.architectures}", hint="pass the class of the model as kind="
    )


def _resized(kind: type[Any], heads: LayerHeads) -> type[Any]:
    """``kind`` that builds these heads: ``from_pretrained`` reads the weights into what its class has built."""

    def build(self: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        heads.put_into(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _unknown(model: nn.Module, what: str) -> ConversionError:
    return ConversionError(
        f"{type(model).__name__} has no {what}, which the configuration sets",
        hint="load it with the version of transformers that it was converted with",
    )
