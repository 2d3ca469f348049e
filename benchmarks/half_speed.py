"""Dense attention in half precision: CPU time against our float32 and torch's SDPA, and the share of what registers alone allow.

Wanted of bfloat16: at most 0.6 of our float32, at most 0.33 of SDPA.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, one_thread, publish
from peak import peak_rates
from torch import Tensor

from attnopt.backends import native
from attnopt.backends.attention_operator import attention
from attnopt.backends.native import Form

H = 8
TYPES = (torch.bfloat16, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    forms = [form for form in Form if form <= native.library().attnopt_best_form()]
    peaks = peak_rates()
    print(
        *(f"{form.name.lower()}: {peaks[form] / 1e9:.0f} GFLOP/s in registers" for form in forms), sep="\n", flush=True
    )
    rows = [
        row
        for dtype in TYPES
        for dim in arguments.dims
        for length in arguments.lengths
        for row in measured(length, dim, dtype, forms, peaks, arguments.rounds)
    ]
    publish("half_speed", rows, "Dense attention in half precision, CPU time of one call")


def measured(
    length: int, dim: int, dtype: torch.dtype, forms: list[Form], peaks: dict[Form, float], rounds: int
) -> Iterator[dict[str, Any]]:
    if dtype == torch.float16:  # in pairs, it is float32
        forms = [form for form in forms if form is not Form.PAIRS]
    narrow = torch.randn(3, 1, H, length, dim).to(dtype)
    wide = narrow.float()
    exact = sdpa(wide.double())

    def as_form(form: Form) -> Tensor:
        os.environ["ATTNOPT_HALF"] = form.name.lower()
        return ours(narrow)

    calls: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: ours(wide),
        "sdpa": lambda: sdpa(narrow),
        "sdpa float32": lambda: sdpa(wide),
        **{form.name: (lambda form=form: as_form(form)) for form in forms},  # type: ignore[misc]
    }
    with torch.inference_mode():
        times = interleaved(calls, rounds, warm_up=2)
        errors = {name: float((call().double() - exact).square().mean().sqrt()) for name, call in calls.items()}
    flops = 4.0 * H * length**2 * dim
    for form in forms:
        rate = flops / times.median(form.name)
        yield {
            "type": str(dtype).removeprefix("torch."),
            "head size": dim,
            "tokens": length,
            "computed as": form.name.lower(),
            "ms": 1e3 * times.median(form.name),
            "/ our float32": times.ratio(form.name, "float32"),
            "/ SDPA": times.ratio(form.name, "sdpa"),
            "/ SDPA float32": times.ratio(form.name, "sdpa float32"),
            "GFLOP/s": rate / 1e9,
            "share of peak, %": 100 * rate / peaks[form],
            "error / SDPA's": errors[form.name] / errors["sdpa"],
        }


def ours(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind()
    made: Tensor = attention(q, k, v, None, None, None, "Full()", list(range(H)), q.shape[3] ** -0.5, None)
    return made


def sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.unbind())


if __name__ == "__main__":
    main()
