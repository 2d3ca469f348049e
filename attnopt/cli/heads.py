"""``attnopt heads``: the atlas of a model's heads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from attnopt.base.progress import working
from attnopt.cli.data import Data, Source, data_of, is_function
from attnopt.cli.load_model import called
from attnopt.cli.output import require_model, require_original, resolved, show
from attnopt.errors import AttnoptError


def run(arguments: argparse.Namespace) -> int:
    import attnopt
    from attnopt.compiler.importance import methods
    from attnopt.render.atlas_table import atlas_table
    from attnopt.statistics import Distance

    asked = split(arguments.what)
    require_statistics(asked)
    model, data = _given(arguments, methods())
    what = [_statistic(text, data) for text in asked]
    distance = None if arguments.distance is None else _statistic(arguments.distance, data)
    if not (distance is None or isinstance(distance, Distance)):
        raise AttnoptError(
            f"--distance {arguments.distance} is no distance",
            hint='as in --distance "distance(grid=(14, 14), prefix=1)"',
        )
    found = attnopt.atlas(
        model,
        data.batches,
        what,
        arguments.sites or "*",
        clusters=arguments.clusters,
        distance=distance,
        seed=arguments.seed,
    )
    written = {}
    if arguments.html:
        with working(f"writing {arguments.html}"):
            written["html"] = str(found.to_html(arguments.html))
    show(arguments, {"atlas": found.to_json(), "written": written}, atlas_table(found))
    if not arguments.json:
        for kind, path in written.items():
            print(f"{kind}: {path}")
    return 0


def split(text: str) -> list[str]:
    """At the commas outside of parentheses."""
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            found.append("")
        else:
            found[-1] += sign
    return [part.strip() for part in found if part.strip()]


def require_statistics(asked: Sequence[str]) -> None:
    """Before anything is loaded.  Raises PolicyError for a name that there is not."""
    from attnopt.base.options import choice
    from attnopt.compiler.importance import methods

    for text in asked:
        if not is_function(text):
            choice("heads", "--what", text.partition("(")[0].strip(), methods())


def _given(arguments: argparse.Namespace, statistics: Sequence[str]) -> tuple[Any, Data]:
    """The model, or the path of its file, and its batches.  Raises AttnoptError."""
    from attnopt.base.call_inputs import CallInputs
    from attnopt.capture.calibration import Calibration
    from attnopt.cli.onnx_inputs import input_names, is_onnx

    if arguments.data is None:
        named = resolved(arguments)
        require_model(arguments.model, named, "`heads` needs the original model")
        return named.model, Data(Calibration((CallInputs(named.args, named.kwargs),)))
    if arguments.inputs is not None or arguments.size:
        raise AttnoptError("--data brings the inputs", hint="omit --inputs and --size")
    source = Source(arguments.data, arguments.tokenizer, arguments.batch)
    if is_onnx(arguments.model):
        names = input_names(Path(arguments.model))
        return arguments.model, data_of(source, None, names, statistics)
    named = resolved(arguments)
    require_original(arguments.model, named, "`heads` needs the original model")
    return named.model, data_of(source, named, (), statistics)


def _statistic(text: str, data: Data) -> Any:
    """With the options that the data file has for it.  Raises AttnoptError."""
    from attnopt.fit.importance_methods import importance

    if is_function(text):
        return called(text)
    name, called_with = text.partition("(")[::2]
    options = data.options.get(name.strip(), {})
    if options and not called_with:
        given = ", ".join(f"{key}={x.tolist()!r}" for key, x in options.items())
        return importance("heads", "--what", f"{name}({given})")
    if not called_with and (missing := _missing(name)):
        raise AttnoptError(f"heads: {name!r} needs {' and '.join(missing)}", hint=_remedy(name, missing))
    return importance("heads", "--what", text)


def _missing(name: str) -> list[str]:
    """The options without a default."""
    from attnopt.fit.importance_methods import IMPORTANCE

    cls = IMPORTANCE.load(name)
    if not is_dataclass(cls):
        return []
    return [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]


def _remedy(name: str, missing: Sequence[str]) -> str:
    from attnopt.fit.importance_methods import IMPORTANCE
    from attnopt.ir.importance import ModelImportance

    cls = IMPORTANCE.load(name)
    function = f"pass a function that returns the statistic, as in --what my_models:{name.replace('-', '_')}"
    if issubclass(cls, ModelImportance) and cls.more is not ModelImportance.more:  # batches, which no option can hold
        return f"{function}; see attnopt.statistics.{cls.__name__}"
    arrays = " and ".join(f"{name}.{option}" for option in missing)
    return f"add arrays {arrays} to the file of --data, write them as {name}({missing[0]}=...), or {function}"
