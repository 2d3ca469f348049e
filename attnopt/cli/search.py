"""``attnopt search``: the best policy within a budget."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attnopt.cli import data
from attnopt.cli.output import require_model, resolved, show
from attnopt.cli.ranks import first_alone, launched

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.cli.ranks import Job
    from attnopt.policy_search.result import Search
    from attnopt.policy_search.search import Progress

TARGETS = ("torch", "onnxruntime", "onnxruntime-int8", "token")
RESOURCES = ("latency", "flops", "parameters", "kv-bytes", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All but the model."""
    from pathlib import Path

    data.add_arguments(parser, size=16, default=None)
    parser.add_argument(
        "--policy", help="a policy with choices: text, or a YAML or JSON file (default: a space made for the model)"
    )
    for name in RESOURCES:
        parser.add_argument(
            f"--{name}", type=_amount, metavar="X", help=f"most {name}: a share such as 0.6, or absolute above 1"
        )
    parser.add_argument(
        "--at", type=_sizes, metavar="B[,L]", help="batch, or batch and length, of the call that counts"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--target",
        default="torch",
        choices=TARGETS,
        help="what latency is measured in (default: torch); token: a decoder's",
    )
    parser.add_argument(
        "--divergence", default="auto", choices=("auto", "kl", "cosine"), help="what is kept small (default: auto)"
    )
    parser.add_argument("--evaluations", type=int, default=200, metavar="N", help="judged models, about (default: 200)")
    parser.add_argument("--minutes", type=float, metavar="M", help="end the search after this time")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep all measurements there, and go on from them")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the policy: .yaml or .json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the front as an HTML page")


def run(arguments: argparse.Namespace) -> int:
    """Under torchrun, the processes divide the judging."""
    with launched() as job:
        return _run(arguments, job)


def _run(arguments: argparse.Namespace, job: Job | None) -> int:
    import attnopt

    limits = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in RESOURCES}
    budget = attnopt.Budget(**limits, at=arguments.at, device=arguments.device, target=arguments.target)
    named = resolved(arguments, needs_sizes=True)
    require_model(arguments.model, named, "it is already optimized")
    source = data.Source(arguments.data, arguments.tokenizer, arguments.batch)
    calibration = data.data_of(source, named).batches
    with _live(arguments) as progress:
        found = attnopt.search(
            named.model,
            arguments.policy,
            named.args,
            named.kwargs,
            calibration=calibration,
            budget=budget,
            divergence=arguments.divergence,
            evaluations=arguments.evaluations,
            minutes=arguments.minutes,
            resume=arguments.resume,
            progress=progress,
            seed=arguments.seed,
            peers=None if job is None else job.peers,
        )
    return first_alone(job, lambda: _written(arguments, found))


def _written(arguments: argparse.Namespace, found: Search) -> int:
    from attnopt.render.policy_search import search_table

    written = {}
    if arguments.out:
        found.policy.save(arguments.out)
        written["policy"] = str(arguments.out)
    if arguments.html:
        written["html"] = str(found.report.to_html(arguments.html))
    policy = None if found.report.best is None else found.policy.to_json()
    show(
        arguments, {"search": found.report.to_json(), "policy": policy, "written": written}, search_table(found.report)
    )
    if not arguments.json:
        for kind, path in written.items():
            print(f"{kind}: {path}")
    return 0


@contextlib.contextmanager
def _live(arguments: argparse.Namespace) -> Iterator[Callable[[Progress], None] | None]:
    """A table on stderr that grows with the search, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
        yield lambda now: live.update(progress_table(now))


def progress_table(now: Progress) -> RenderableType:
    """One line each: the stage, the evaluations, the best so far and what it costs."""
    from attnopt.render.tables import table

    best = "nothing yet" if now.best is None else f"{now.best:.4g}"
    rows = [("evaluations", f"{now.evaluations:.1f}"), ("best within the budget", best)]
    rows += [(name, f"{cost:.4g}") for name, cost in _costs(now.costs)]
    return table(f"searching: {now.stage}", ("", "now"), rows)


def _costs(costs: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, float(cost)) for name, cost in costs.items()]


def _amount(text: str) -> float | int:
    """An integer is absolute."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError("a share such as 0.6, or a number above 1") from None


def _sizes(text: str) -> int | tuple[int, int]:
    parts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise argparse.ArgumentTypeError("a batch, or a batch and a length, as in 1,512")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])
