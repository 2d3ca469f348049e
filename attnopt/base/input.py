"""An argument of the rewritten model, by its name."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.errors import PolicyError


@dataclass(frozen=True)
class Input:
    """A tensor that each call of the rewritten model brings, as the keyword argument ``name``.

    It is an argument that the model already has, or else a new one.  The example inputs have to include it.  Raises
    PolicyError.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise PolicyError(f"Input: invalid name {self.name!r}: expected a Python identifier")

    def to_json(self) -> dict[str, str]:
        """As an option of a pass is written in a policy file."""
        return {"input": self.name}

    def __repr__(self) -> str:
        return f"Input({self.name!r})"
