"""Recipes as files: where they lie, how `base:` unfolds, what identifies them. Imports no torch."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from scripts.errors import UserError

ROOT = Path(__file__).parents[1] / "recipes"
"""Recipes travel with the package: in a checkout and in an installed wheel they lie beside `scripts/`."""


def papers() -> list[str]:
    """Slugs of all papers that have claims, sorted."""
    return sorted(path.parent.name for path in ROOT.glob("*/claims.yaml"))


def recipe_files(slug: str) -> list[Path]:
    """Recipes of one paper, sorted; files that start with `_` are bases only."""
    return sorted(p for p in (ROOT / slug).glob("*.yaml") if p.name != "claims.yaml" and not p.name.startswith("_"))


def recipe_name(path: Path) -> str:
    """`<slug>/<recipe>`, e.g. `elr/mini-sym40`; for a recipe elsewhere its folder and file name."""
    path = path.resolve()
    return f"{path.parent.name}/{path.stem}"


def find_recipe(name: str) -> Path:
    """File of a recipe.

    Args:
        name: a path that exists; or a path below `recipes/` of the package, with or without `recipes/` and `.yaml`.

    Raises:
        UserError: nothing of this name; the message lists the closest names.
    """
    if Path(name).is_file():
        return Path(name)
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    packaged = ROOT / f"{short}.yaml"
    if packaged.is_file():
        return packaged
    known = [recipe_name(path) for slug in papers() for path in recipe_files(slug)]
    close = difflib.get_close_matches(short, known, n=5, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else "`noisebench list` shows all"
    raise UserError(f"no recipe {name!r}: neither a file here nor one of the {len(known)} recipes; {hint}")


def expand(path: Path) -> list[dict[str, Any]]:
    """The documents of a recipe in the order in which they apply: its bases, then itself, without `base:`."""
    return _expand(path.resolve(), ())


def recipe_hash(path: Path) -> str:
    """Hash of what the recipe says, its bases included; comments and layout do not count."""
    return short_hash(expand(path))


def short_hash(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def header(path: Path) -> list[str]:
    """Leading comment lines of a recipe, without `#`."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UserError: unreadable, broken YAML, or not a mapping.
    """
    try:
        # the C parser reads ten times as fast, where PyYAML was built with it
        document = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a YAML mapping, got {type(document).__name__}")
    return document


def _expand(path: Path, above: tuple[Path, ...]) -> list[dict[str, Any]]:
    if path in above:
        raise UserError(f"base: of {path} leads back to itself: {' -> '.join(p.name for p in (*above, path))}")
    document = read_yaml(path)
    bases = document.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise UserError(f"base: in {path} must be a list of file names, got {bases!r}")
    documents: list[dict[str, Any]] = []
    for name in bases:
        base = (path.parent / name).resolve()
        if not base.is_file():
            raise UserError(f"base: in {path} names {name!r}, which is not there ({base})")
        documents += _expand(base, (*above, path))
    return [*documents, document]
