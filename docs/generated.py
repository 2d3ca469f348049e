"""The parts of the documentation that are generated from the code and its tests, so they stay up to date.

A page asks for one with a line such as ``<!-- pass: local-window -->``.  MkDocs calls ``on_page_markdown``.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- (\w+)(?:: (.+?))? -->$", re.MULTILINE)
PICTURE_LENGTH = 32

# The meaning of the values of Spelling in ``tests/support/models.py``; a test compares them with the required spellings.
SPELLINGS: dict[str, tuple[str, dict[Any, str]]] = {
    "op": (
        "Projection",
        {
            "linear": "`nn.Linear`", "parameter": "`x @ weight + bias`", "addmm": "`addmm` (GPT-2's `Conv1D`)",
            "conv1d": "1x1 `nn.Conv1d`", "conv2d": "1x1 `nn.Conv2d`", "einsum": "`einsum` with a 3-D weight",
        },
    ),
    "packing": (
        "Packing of q, k and v",
        {
            "separate": "three projections", "fused": "one projection, q, k and v concatenated in any order",
            "kv": "one projection for k and v", "per-head": "one projection, q, k and v of each head together",
            "per-group": "one projection, the queries of each group with its key and value",
        },
    ),
    "unpack": (
        "Unpacking",
        {
            "split": "`split`", "chunk": "`chunk`", "slice": "slices", "unbind": "`unbind`", "select": "an index",
            "index": "a list of one",
        },
    ),
    "core": (
        "Products",
        {
            "matmul": "`@`", "bmm": "`bmm` on batch times heads", "baddbmm": "`baddbmm`", "einsum": "`einsum`",
            "heads-last": "heads behind the tokens", "channels": "channels first", "transposed": "scores as keys x queries",
            "mulsum": "multiply and sum", "sdpa": "`scaled_dot_product_attention`",
            "flex": "`flex_attention`", "grouped": "5-D, groups of query heads",
            "grouped-einsum": "`einsum` over groups",
        },
    ),
    "share": (
        "Shared key/value heads",
        {
            "expand": "`expand` and `reshape`", "repeat_interleave": "`repeat_interleave`", "tiled": "`repeat`",
            "index": "a list of heads",
            "enable_gqa": "`enable_gqa=True`", "broadcast": "broadcasting of one head",
        },
    ),
    "rope": (
        "Rotary positions",
        {
            "": "none", "half": "two halves", "chunks": "two halves, by `chunk`",
            "interleaved": "pairs", "in-place": "pairs, written in place",
            "complex": "`view_as_complex`",
        },
    ),
    "norm": (
        "Norm of queries and keys",
        {"": "none", "layer": "layer norm of each head", "rms": "RMS norm of each head", "across": "layer norm over all heads"},
    ),
    "scale": (
        "Scale",
        {
            "q": "on the queries", "k": "on the keys", "mul": "multiplied with the scores", "div": "scores divided by a number",
            "alpha": "`alpha` of `baddbmm`", "none": "none", "buffer": "a buffer",
            "temperature": "a learned temperature per head",
            "over": "divided by one", "root": "divided by the root of a tensor",
        },
    ),
    "mask": (
        "Mask",
        {
            "causal": "causal", "window": "a window", "left": "a causal window", "padding": "padding, as an input",
            "float-padding": "padding, as an input of numbers", "given": "any additive mask, as an input",
        },
    ),
    "made": ("Making of the mask", {"tril": "`tril`", "triu": "`triu`", "arange": "comparison of positions",
                                    "like": "`ones_like` of the scores"}),
    "apply": (
        "Application of the mask",
        {
            "where": "`where`", "masked_fill": "`masked_fill`", "add-inf": "add -inf",
            "add-min": "add the minimum of the dtype",
            "lerp": "a 0/1 mask times the minimum", "old-gpt": "scores times mask, -10000 elsewhere",
            "moderate": "write -10000", "assigned": "`scores[mask] = -inf`",
        },
    ),
    "after": (
        "Weights after the softmax",
        {
            "": "unchanged", "again": "masked again", "flags": "times a 0/1 mask",
            "rows": "0 for fully masked queries", "clean": "`nan_to_num`",
        },
    ),
    "bias_kind": (
        "Bias",
        {
            "": "none", "alibi": "ALiBi", "table": "a table of relative positions", "addend": "the addend of `baddbmm`",
        },
    ),
    "sink": (
        "Sink logits",
        {
            "learned": "a learned column", "padded": "a column of zeros by `F.pad`",
            "one": "1 added to the sum of exponentials, or exp(-m) where m was subtracted from the scores",
        },
    ),
    "softmax": (
        "Softmax",
        {
            "F": "`F.softmax`", "positive": "with a positive axis", "float32": "in float32", "upcast": "scores cast before",
            "shifted": "scores minus their overall maximum",
            "exp": "`exp` over its sum", "stable-exp": "the same, after subtracting the maximum",
            "eps": "the same with 1e-9 added to the sum", "inverse": "the same times the inverse of the sum",
            "exp2": "powers of 2 over their sum", "again": "`softmax`, divided by its sum again",
            "log": "`exp` of `log_softmax`",
            "lse": "`exp` of scores minus `logsumexp`", "lse-rows": "the same with `logsumexp` of rows",
            "late": "`exp`, and the division after the values",
            "later": "`exp`, and the division after the values and their reshapes",
        },
    ),
}  # fmt: skip
FLAGS = {"cross": "cross-attention", "softcap": "softcap", "sinks": "sink logits", "pre_norm": "a norm before it",
         "residual": "a residual around it", "dropout": "dropout in eval mode"}  # fmt: skip


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return MARKER.sub(lambda marker: MAKERS[marker[1]](*([marker[2]] if marker[2] else [])), markdown)


def picture(pattern: str) -> str:
    """A pattern drawn for 32 tokens, next to the previous one."""
    from html import escape

    from attnopt.patterns import parse
    from attnopt.render.page import picture_svg

    svg = re.sub(r"\s*\n\s*", " ", picture_svg(parse(pattern), PICTURE_LENGTH)).strip()
    row = "display:flex;gap:.3rem;justify-content:center"
    return (
        f'<figure style="display:inline-block;vertical-align:top;margin:.5rem 1rem .5rem 0;max-width:16rem">'
        f'<div style="{row}">{svg}</div><figcaption><code>{escape(pattern)}</code></figcaption></figure>'
    )


def about_pass(name: str) -> str:
    """The docstring of a pass, and its options."""
    from attnopt.compiler import plugins

    return _about(plugins.load_pass(name), name)


def about_backends() -> str:
    """The docstring of every built-in backend."""
    from attnopt.compiler import plugins

    ours = [p for p in plugins.backends().values() if p.distribution == plugins.OURS]
    return "\n\n".join(f"### {p.name}\n\n{_prose(plugins.load_backend(p.name))}" for p in ours)


def _about(kind: type[Any], name: str) -> str:
    parameters = inspect.signature(kind).parameters.values()
    rows = [f"| `{p.name}` | {'required' if p.default is p.empty else f'`{p.default!r}`'} |" for p in parameters]
    table = ["| option | default |", "|---|---|", *rows] if rows else []
    exact = "Exact: the model output does not change." if kind.exact else "Not exact: the model output changes."
    return "\n".join(
        [_prose(kind), "", f"{exact} As text: `{name}({', '.join(p.name + '=...' for p in parameters)})`", "", *table]
    )


def _prose(kind: type[Any]) -> str:
    return _markdown(inspect.getdoc(kind) or "")


def _markdown(text: str) -> str:
    text = text.replace("``", "`")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def spellings() -> str:
    """The spellings that the tests require, part by part."""
    from models import Spelling

    must_match = _beside("test_spellings").MUST_MATCH
    plain = Spelling()
    lines = ["| part | tested spellings |", "|---|---|"]
    for field, (title, meanings) in SPELLINGS.items():
        values = _values(field, [s for s, _ in must_match], plain)
        lines.append(f"| {title} | {'; '.join(meanings[v] for v in meanings if v in values)} |")
    told = f"{len(must_match)} combinations must match and are verified down to single weight rows."
    return "\n".join([*lines, f"| And with | {'; '.join(FLAGS.values())} |", "", told])


def _values(field: str, shown: list[Any], plain: Any) -> set[Any]:
    found = [getattr(s, field) for s in [*shown, plain]]
    return {v for value in found for v in (value if isinstance(value, tuple) else (value,))}


def refusals() -> str:
    """Every refusal code in the source, by stage, with its golden text from the tests."""
    tests = _beside("test_refusals")
    golden = {code: text for code, (_, text) in tests.CASES.items()} | tests.OTHERS
    lines = ["| code | issued by | example |", "|---|---|---|"]
    for code, stage in sorted(refusal_codes().items(), key=lambda pair: (pair[1], pair[0])):
        text = golden[code].removeprefix(f"[{code}]").replace(" (at LINE)", "").replace("\n  hint:", "; hint:")
        lines.append(f"| `{code}` | {stage} | {_cell(text)} |")
    return "\n".join(lines)


def refusal_codes() -> dict[str, str]:
    """Code -> the part of attnopt that issues it."""
    found: dict[str, str] = {}
    for folder, stage in (("passes", "passes"), ("attnopt", "matching"), ("backends", "backends")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for code in re.findall(
                r'\b(?:Refusal\(|refuse\(|rejected\([^"]*?,)\s*"([a-z-]+)"', file.read_text(encoding="utf-8")
            ):
                found.setdefault(code, stage)
    return found


def _cell(text: str) -> str:
    told = " ".join(text.split())
    for sign in "|<*{}_":  # special in Markdown
        told = told.replace(sign, f"&#{ord(sign)};")
    return told


def usage(command: str) -> str:
    """The help of a command."""
    import argparse

    from attnopt.cli import main as cli

    actions = cli._parser()._actions
    (commands,) = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return f"```text\n{commands.choices[command].format_help().rstrip()}\n```"


def commands() -> str:
    """The help of every command."""
    import argparse

    from attnopt.cli import main as cli

    (found,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return "\n\n".join(f"## {name}\n\n{usage(name)}" for name in found.choices)


def results() -> str:
    """The table and figure of each benchmark result."""
    sections = []
    for table in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        text = re.sub(r"^#", "##", table.read_text(encoding="utf-8").strip(), flags=re.MULTILINE)
        if table.with_suffix(".png").exists():
            text += f"\n\n![{table.stem}]({table.stem}.png)"
        sections.append(text)
    return "\n\n".join(sections)


def layers(part: str) -> str:
    """The packages and their imports: ``figure`` or ``table``."""
    made: str = getattr(_beside("layers"), part)()
    return made


def gallery(part: str) -> str:
    """The mechanisms, pictured: ``passes`` or ``recipes``."""
    made: str = getattr(_beside("gallery"), f"of_{part}")()
    return made


def _beside(module: str) -> Any:
    """A module of the documentation or of the tests."""
    import importlib

    for folder in ("docs", "tests/support", "tests/spellings"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module(module)


MAKERS: dict[str, Any] = {
    "picture": picture, "pass": about_pass, "backends": about_backends, "spellings": spellings, "refusals": refusals,
    "commands": commands, "results": results, "layers": layers, "gallery": gallery,
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs once: adds the benchmark figures to the files of the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, path.name, abs_src_path=str(path)))
    return files
