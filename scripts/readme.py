"""Text that is generated inside a page written by hand. Imports no torch."""

from scripts.errors import UserError


def between_markers(text: str, name: str, new: str, place: str = "README.md") -> str:
    """`text` with what stands between `<!-- noisebench:NAME -->` and `<!-- /noisebench:NAME -->` replaced by `new`.

    The markers stay, each on the far side of a line break, so that a second pass finds them and changes nothing.

    Args:
        text: the page.
        name: of the markers.
        new: goes between them; line breaks at its ends do not count.
        place: the page's name, for messages.

    Raises:
        UserError: a marker is missing or there twice, or the closing one comes first.
        ValueError: `new` holds one of the markers.
    """
    start, end = f"<!-- noisebench:{name} -->", f"<!-- /noisebench:{name} -->"
    for marker in (start, end):
        if marker in new:
            raise ValueError(f"the text for marker {name!r} must not hold {marker}")
        count = text.count(marker)
        if count != 1:
            found = "is missing" if count == 0 else f"is there {count} times"
            raise UserError(f"{place}: marker {marker} {found}; it must stand there once, as {start} ... {end}")
    before, _, rest = text.partition(start)
    if end not in rest:
        raise UserError(f"{place}: marker {end} comes before {start}; it must come after it")
    after = rest.partition(end)[2]
    inside = new.strip("\n")
    return f"{before}{start}\n{inside}\n{end}{after}"
