"""Reading a policy file: YAML or JSON, small, without aliases, and with no key that stands twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnopt.errors import PolicyError

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST = 1 << 20  # bytes
DEEPEST = 100  # collections in one another; the YAML parser's time grows with the square of it


def read_file(path: Path) -> Any:
    """The plain data in a policy file.  Raises PolicyError that names the file."""
    if path.suffix not in SUFFIXES:
        raise PolicyError(f"{path}: a policy file ends in {', '.join(SUFFIXES)}")
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise PolicyError(f"{path}: {size} bytes are too many for a policy; at most {LARGEST} are read")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: cannot be read: {error}") from error
    try:
        return _json(text) if path.suffix == ".json" else _yaml(text)
    except RecursionError as error:
        raise PolicyError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise PolicyError(f"{path}: {error}") from error


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct)


def _yaml(text: str) -> Any:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*name) are not read; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise RecursionError
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode):
            _distinct([(key.value, None) for key, _ in root.value if isinstance(key, yaml.ScalarNode)])
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping; a key that stands twice would silently lose its first value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice")
        found[key] = value
    return found
