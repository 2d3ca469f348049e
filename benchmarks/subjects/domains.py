"""Texts of five domains, no two of which are alike, from what installed packages ship and from Python's own library.

`verse.txt` holds sonnets of Shakespeare and Shelley and poems of Blake, which are in the public domain.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from common import package

CHARACTERS = 400  # of each text
MODULES = (
    "argparse", "asyncio/base_events", "asyncio/streams", "calendar", "collections/__init__", "concurrent/futures/thread",
    "configparser", "csv", "decimal", "difflib", "email/message", "fractions", "heapq", "http/client", "inspect", "ipaddress",
    "json/encoder", "logging/__init__", "mailbox", "multiprocessing/pool", "pathlib", "pickle", "random", "shutil", "smtplib",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "threading", "turtle", "typing", "unittest/case",
    "urllib/parse", "zipfile",
)  # fmt: skip


def news() -> list[str]:
    file = package("gensim") / "test" / "test_data" / "lee_background.cor"
    texts = file.read_text("latin-1").splitlines()
    return [s.strip() + "." for text in texts for s in text.split(". ") if len(s) > 30]


def documentation() -> list[str]:
    """Descriptions of functions and classes."""
    found = [_plain(text) for node in _definitions() if (text := ast.get_docstring(node)) is not None]
    return [text for text in dict.fromkeys(found) if len(text) > 40]


def code() -> list[str]:
    """Functions without their descriptions."""
    found: list[str] = []
    for node in _definitions():
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            found.append(ast.unparse(ast.Module([_with_body(node, body or [ast.Pass()])], [])))
    return [text for text in dict.fromkeys(found) if len(text) > 80]


def glosses() -> list[str]:
    """Definitions of nouns (WordNet)."""
    file = package("timm") / "data" / "_info" / "imagenet_synset_to_definition.txt"
    return [line.partition("\t")[2] for line in file.read_text("utf-8").splitlines()]


def verse() -> list[str]:
    """Couplets."""
    lines = (Path(__file__).parent / "verse.txt").read_text("utf-8").splitlines()
    return [f"{a} {b}" for a, b in zip(lines[::2], lines[1::2], strict=True)]


DOMAINS = {"news": news, "documentation": documentation, "glosses": glosses, "verse": verse, "code": code}


def texts(domain: str) -> list[str]:
    """All of a domain, in a random order that is always the same, each cut to ``CHARACTERS``."""
    found = [text[:CHARACTERS] for text in DOMAINS[domain]()]
    return random.Random(0).sample(found, len(found))


def _definitions() -> Iterator[ast.FunctionDef | ast.ClassDef]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        path = library / f"{name}.py"
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node


def _with_body(node: ast.FunctionDef, body: list[ast.stmt]) -> ast.FunctionDef:
    return ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": body, "lineno": 1})


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
