"""torch's fast path of nn.TransformerEncoder, used in eval mode without gradients.

It skips padded positions and writes zeros there.  A graph never takes it, so everything here is compared with the
model outside it, and a warning reports a model that differs on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, TOLERANCE, difference, tolerance
from attnopt.capture.run_unchanged import outputs_of

_HAS_ONE = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@contextmanager
def fast_path(is_on: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def leaves_out_padding(model: nn.Module, inputs: CallInputs, state: Sequence[str]) -> tuple[str, ...]:
    """A warning if the model itself returns something else on its fast path."""
    if model.training or not any(isinstance(m, _HAS_ONE) for m in model.modules()):
        return ()
    given = []
    for is_on in (True, False):
        with torch.random.fork_rng(devices=[]), fast_path(is_on), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own warnings about tensors that it creates on this path
            torch.manual_seed(0)
            try:
                given.append(outputs_of(model, inputs, state))
            except Exception:  # sizes that this path does not support
                return ()
    fast, plain = given
    apart = difference(fast, plain)
    if apart <= max(ROOM * tolerance(plain), TOLERANCE[torch.bfloat16]):  # rounding of a part in half precision
        return ()
    zeros = ", where it writes zeros" if _differs_in_zeros(fast, plain) else ""
    return (
        f"without gradients torch's fast path for nn.TransformerEncoder skips padded positions{zeros}: there, the model's "
        f"own outputs differ by {apart:.2g} (relative) from its other path, which attnopt keeps",
    )


def _differs_in_zeros(fast: Sequence[Tensor], plain: Sequence[Tensor]) -> bool:
    return all(
        f.shape == p.shape and difference([f], [p.masked_fill(f == 0, 0.0)]) <= ROOM * tolerance([p])
        for f, p in zip(fast, plain, strict=True)
    )
