"""A module of the user in the place of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from attnopt.errors import PluginError, PolicyError
from attnopt.ir.constant import Constant, Weight
from attnopt.ir.mixer import Mixer, Tokens, wide
from attnopt.ir.site import Site


@dataclass(frozen=True)
class ModuleMixer(Mixer):
    """``make(site)`` is a module that maps the values of all heads, [B, L, H * Dv], to their outputs, of the same shape.

    It is distilled in eval mode.  A text only names it, and so does a saved model, whose graph has its operators and weights.
    """

    name: ClassVar[str] = "module"
    by_head: ClassVar[bool] = False
    called: str
    make: Callable[[Site], nn.Module] | None = None
    module: nn.Module | None = field(default=None, init=False)

    def at(self, site: Site) -> ModuleMixer:
        assert self.make is not None
        made = self.make(site)
        if not isinstance(made, nn.Module):
            raise PolicyError(
                f"the mixer {self.called} made a {type(made).__name__}, expected an nn.Module",
                hint="pass a function of the site that returns a new module",
            )
        placed = replace(self)
        object.__setattr__(placed, "module", made.eval().float())
        return placed

    def mix(self, x: Tokens, weights: Sequence[Tensor]) -> Tensor:
        if self.module is None:
            raise ValueError(f"only the graph has the operators of {self.called}")
        v = wide(x.v)
        held = _state(self.module)
        state = {name: w.to(v.dtype).reshape(own.shape) for (name, own), w in zip(held.items(), weights, strict=True)}
        try:
            made = functional_call(self.module, state, (v.transpose(1, 2).flatten(2),))
            mixed: Tensor = made.reshape(*made.shape[:2], v.shape[1], -1).transpose(1, 2).to(x.v.dtype)
            return mixed
        except Exception as e:  # whatever a module of the user raises
            raise PluginError(
                f"the mixer {self.called} failed: {type(e).__name__}: {e}",
                hint="it gets [batch, length, heads * values of a head], and has to give the same shape",
            ) from e

    def start(self, site: Site) -> Sequence[Tensor]:
        assert self.module is not None
        return [held.detach().clone() for held in _state(self.module).values()]

    def stored(self, weights: Sequence[Tensor]) -> tuple[Constant, ...]:
        assert self.module is not None
        kinds = (Weight if isinstance(held, nn.Parameter) else Constant for held in _state(self.module).values())
        return tuple(kind.of(w.detach().float().reshape(w.shape or 1)) for kind, w in zip(kinds, weights, strict=True))

    def work(self, length: int) -> int:
        return 0

    def to_json(self) -> str:
        return f"{self.name}({self.called!r})"


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Its floating-point parameters and buffers."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: held for name, held in found.items() if held.is_floating_point()}
