"""Pictures that a run leaves in its folder (`figures/*.png`, `*.svg`), shown for the first seed of each recipe."""

import base64
import os
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from callbacks.files import write_atomic
from scripts.errors import UserError
from scripts.records import Record

KINDS = {".png": "image/png", ".svg": "image/svg+xml"}
LARGEST = 200_000
"""Bytes; larger ones stay in the run's folder: all pages together should stay light."""
EMBEDDED = 1_000_000
"""Bytes of pictures that a page holds itself; the others are links to their files."""


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it.

    Args:
        caption: recipe, seed and name of the file.
        address: the picture itself, as a `data:` address, or where its file lies, seen from the page.
        embedded: which of the two.
        pixelated: whether its pixels should stay sharp when it is enlarged.
    """

    caption: str
    address: str
    embedded: bool
    pixelated: bool


def folder_of(record: Record) -> Path:
    """Where the pictures of a local or of a published record lie."""
    local = record.path.name == "record.json"
    return record.path.parent / "figures" if local else record.path.with_suffix("")


def relative_address(file: Path, target: Path) -> str:
    """Address of a file from a page in `target`."""
    return urllib.parse.quote(Path(os.path.relpath(file, target)).as_posix())


def first_seeds(records: Iterable[Record]) -> list[Record]:
    """Of each recipe the record with the lowest seed, in the order of the recipes."""
    lowest: dict[str, Record] = {}
    for record in records:
        name, seed = record.run
        if name not in lowest or seed < lowest[name].run[1]:
            lowest[name] = record
    return list(lowest.values())


def files_of(record: Record) -> list[Path]:
    """The pictures of a record that are small enough, sorted by name."""
    folder = folder_of(record)
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix in KINDS and f.is_file() and f.stat().st_size <= LARGEST)


def read_pictures(records: Iterable[Record], target: Path) -> tuple[list[Picture], list[str]]:
    """Pictures of the first seed of each recipe, and a line for each file that cannot be read.

    The first ones, `EMBEDDED` bytes of them, are part of a page in the folder `target`.
    """
    found, broken, embedded = [], [], 0
    for record in first_seeds(records):
        for file in files_of(record):
            try:
                content = file.read_bytes()
            except OSError as error:
                broken.append(f"{file}: {error.strerror}")
                continue
            recipe, seed = record.run
            caption = f"{recipe.partition('/')[2]}, seed {seed}: {file.stem.replace('_', ' ')}"
            embedded += len(content)
            inside = embedded <= EMBEDDED
            data = f"data:{KINDS[file.suffix]};base64,{base64.b64encode(content).decode()}" if inside else ""
            found.append(Picture(caption, data or relative_address(file, target), inside, file.suffix == ".png"))
    return found, broken


def publish_pictures(records: Iterable[Record], file_of: dict[Path, Path]) -> None:
    """Copies the pictures of the first seed of each recipe beside its published record.

    Args:
        records: that are published.
        file_of: published file of each record, by the record's own.

    Raises:
        UserError: a file cannot be read or written.
    """
    for record in first_seeds(records):
        target = file_of[record.path].with_suffix("")
        for file in files_of(record):
            try:
                write_atomic(target / file.name, file.read_bytes())
            except OSError as error:
                raise UserError(f"--publish: cannot write {target / file.name}: {error.strerror}") from error
