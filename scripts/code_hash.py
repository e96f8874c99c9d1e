"""Hash of the code that a run used, so that an edit to another paper makes nothing stale. Imports no torch."""

import ast
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "datamodules", "callbacks")


def code_hash(config: dict[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 over the project files that a resolved config names, and what they import.

    Args:
        config: resolved config; each `class_path` inside it that lies in this project counts.
    """
    todo = {file for name in _class_paths(config) if (file := _file_of(name))}
    done: set[Path] = set()
    while todo - done:
        file = (todo - done).pop()
        done.add(file)
        todo |= set(_imports(file))
    digest = hashlib.sha256()
    for file in sorted(done):
        digest.update(file.relative_to(SOURCE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def project_classes(config: dict[str, Any]) -> list[str]:
    """Class paths of this project that a resolved config names, sorted; all that `code_hash` needs of it."""
    return sorted({name for name in _class_paths(config) if name.split(".")[0] in PACKAGES})


def code_hash_of(classes: Sequence[str]) -> str:
    """The `code_hash` of a config that names these classes."""
    return code_hash({"classes": [{"class_path": name} for name in classes]})


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            # settings may come with dotted keys
            if isinstance(item, str) and str(key).split(".")[-1] == "class_path":
                yield item
            yield from _class_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _class_paths(item)


def _file_of(dotted: str) -> Path | None:
    """File of the longest prefix of a dotted name that is a module of this project."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return None
    for end in range(len(parts), 0, -1):
        base = SOURCE.joinpath(*parts[:end])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


@functools.cache
def _imports(file: Path) -> tuple[Path, ...]:
    names: list[str] = []
    try:
        tree = ast.parse(file.read_text())
    except SyntaxError:
        # half-edited: `list` and `leaderboard` still work, and its bytes alone make the hash differ
        return ()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found for name in names if (found := _file_of(name)))
