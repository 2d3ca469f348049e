"""Values that a graph reads by name: adding one under a free name."""

from __future__ import annotations

from torch import Tensor, nn


def store(owner: nn.Module, name: str, held: Tensor | nn.Module) -> str:
    """Store ``held`` in ``owner`` as ``name``, or as "name__1", "name__2", ... if something else has that name.

    ``name`` may be a path, such as "layers.0.q.weight", whose modules are made where they are missing.  Returns the name.
    """
    *path, leaf = name.split(".")
    taken: list[str] = []
    for part in path:
        part = part if isinstance(getattr(owner, part, None), nn.Module) else free_name(owner, part)
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner, taken = owner.get_submodule(part), [*taken, part]
    leaf = free_name(owner, leaf)
    if isinstance(held, Tensor) and not isinstance(held, nn.Parameter):
        owner.register_buffer(leaf, held)
    else:
        setattr(owner, leaf, held)
    return ".".join([*taken, leaf])


def free_name(owner: nn.Module, name: str) -> str:
    """``name``, or "name__1", "name__2", ..., of which ``owner`` has no attribute."""
    found, n = name, 0
    while hasattr(owner, found):
        n += 1
        found = f"{name}__{n}"
    return found


def put(owner: nn.Module, name: str, x: Tensor) -> None:
    """Store ``x`` in the place of the tensor ``name``."""
    path, _, leaf = name.rpartition(".")
    module = owner.get_submodule(path)
    if isinstance(x, nn.Parameter):
        module.register_parameter(leaf, x)
    elif leaf in module._buffers:
        module._buffers[leaf] = x
    else:
        setattr(module, leaf, x)
