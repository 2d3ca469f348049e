"""What a rewritten model may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnopt.base.options import choice, whole
from attnopt.errors import PolicyError
from attnopt.policy_search.targets import TARGETS, TORCH

RESOURCES = ("latency", "flops", "parameters", "kv_bytes", "memory")
UNITS = {"latency": "ms", "flops": "FLOPs", "parameters": "parameters", "kv_bytes": "bytes", "memory": "bytes"}
KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class Budget:
    """The most that the rewritten model may cost of each given resource; several hold together.

    A float of at most 1 is a share of the original's cost; an integer, or a float above 1, is absolute.

    ``latency``: milliseconds of one call, measured on this machine: CPU time of one thread, or elapsed time on a GPU.
    ``target``: what that call is: "torch"; "onnxruntime" or "onnxruntime-int8", the file of ``export_onnx``; "token", the file
    of ``export_decoder`` for one token after as many as a call has, windows keeping only their keys.
    ``flops``: of the attentions (their products and projections), as in reports.
    ``parameters``: of the whole model, each counted once.
    ``kv_bytes``: of the keys and values that a cache keeps: under a causal window only those that a later query can see.
    ``memory``: bytes of all weights, and of ``kv_bytes``.
    ``at``: batch, or (batch, length), of the call that is measured; None: the sizes of the example inputs.
    ``device``: "cpu" or "cuda"; where the model is.  Raises PolicyError.
    """

    latency: float | None = None
    flops: float | None = None
    parameters: float | None = None
    kv_bytes: float | None = None
    memory: float | None = None
    at: int | tuple[int, int] | None = None
    device: str = "cpu"
    target: str = TORCH

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < float("inf"):
                raise PolicyError(
                    f"Budget: invalid value {name}={value!r}: expected a share of the original's cost above 0 and up to 1.0, "
                    f"or a number of {UNITS[name]}"
                )
        if not self.given:
            raise PolicyError("Budget: no resource is limited", hint=f"give one of {', '.join(RESOURCES)}")
        if self.at is not None:
            sizes = (self.at,) if isinstance(self.at, int) else tuple(self.at)
            if len(sizes) not in (1, 2):
                raise PolicyError(f"Budget: invalid value at={self.at!r}: expected a batch, or (batch, length)")
            for size in sizes:
                whole("Budget", "at", size, least=1)
        if str(self.device).partition(":")[0] not in KINDS:
            raise PolicyError(f'Budget: invalid value device={self.device!r}: expected "cpu" or "cuda"')
        choice("Budget", "target", self.target, tuple(TARGETS))
        if self.target != TORCH and (self.latency is None or self.device != "cpu"):
            raise PolicyError(
                f"Budget: target={self.target!r} is what latency on a CPU is measured in",
                hint="give latency=, and leave device out, or leave target out",
            )

    @property
    def given(self) -> dict[str, float]:
        """The limits by resource, as they were given."""
        return {name: value for name in RESOURCES if (value := getattr(self, name)) is not None}

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Batch and length of ``at``."""
        if self.at is None:
            return None, None
        return (self.at, None) if isinstance(self.at, int) else self.at

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """By resource the most that a model may cost, given what the original costs."""
        shares = {name: isinstance(value, float) and value <= 1 for name, value in self.given.items()}
        return {name: value * original[name] if shares[name] else value for name, value in self.given.items()}

    def __str__(self) -> str:
        return ", ".join(self._told(name, value) for name, value in self.given.items())

    def _told(self, name: str, value: float) -> str:
        if name == "latency" and self.target != TORCH:
            name = f"latency in {TARGETS[self.target]}"
        if isinstance(value, float) and value <= 1:
            return f"{name} {value:.3g} of the original"
        return f"{value:g} parameters" if name == "parameters" else f"{name} {value:g} {UNITS[name.split()[0]]}"
