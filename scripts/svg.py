"""From Matplotlib's SVG to one that can stand inside a page: small, without styles, with ids of its own."""

import hashlib
import re
from collections.abc import Mapping
from xml.etree import ElementTree

NUMBERS = ("d", "x", "y", "transform", "width", "height", "points")
"""Attributes whose numbers are rounded to a hundredth of a point."""


def clean(data: bytes, title: str, label: str, font: str, colours: Mapping[str, str] | None) -> str:
    """The same drawing without metadata, style sheet, style attributes and ids that nothing refers to.

    Matplotlib's style sheet would apply to the whole page, and its ids occur in each of its figures. Looks become
    presentation attributes, so that any Content-Security-Policy allows them.

    Args:
        data: SVG as Matplotlib writes it.
        title: the drawing's `<title>`.
        label: its aria-label.
        font: font family of all text.
        colours: CSS custom property (without dashes) for each colour that becomes `var(--<property>, <colour>)`, and
            the drawing has no size but its viewBox; None for a file of its own.
    """
    root = ElementTree.fromstring(data)
    prefix = "c" + hashlib.sha256(data + title.encode(errors="replace")).hexdigest()[:8]
    names = {colour: f"var(--{name}, {colour})" for name, colour in (colours or {}).items()}
    used: dict[str, str] = {}
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        _simplify(element, names, used, prefix)
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in used:
            element.attrib["id"] = used[name]
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("g", "defs") and not len(child)]:
            parent.remove(child)
    if colours is not None:
        del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": plain(label)}
    root.attrib |= {"font-family": font, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    heading = ElementTree.Element("title")
    heading.text = plain(title)
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def plain(text: str) -> str:
    """One line of characters that XML allows."""
    return re.sub(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", " ".join(text.split()))


def _simplify(element: ElementTree.Element, colours: Mapping[str, str], used: dict[str, str], prefix: str) -> None:
    """One element: no namespaces, no style, short numbers, references by new ids, which `used` collects."""
    element.tag = _local(element.tag)
    element.text, element.tail = (element.text or "").strip("\n ") or None, None
    attributes = {_local(key): value for key, value in element.attrib.items() if key != "version"}
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font" and (size := re.search(r"[\d.]+px", value)):  # Matplotlib before 3.11
            attributes["font-size"] = size[0]
        elif name not in ("", "font", "font-family"):
            attributes[name] = colours.get(value, value)
    for key in attributes.keys() & NUMBERS:
        attributes[key] = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(attributes[key].split()))
    for key in [key for key in ("href", "clip-path") if key in attributes]:
        name = attributes[key].removeprefix("url(").removesuffix(")").removeprefix("#")
        new = used.setdefault(name, f"{prefix}-{len(used)}")
        attributes[key] = f"#{new}" if key == "href" else f"url(#{new})"
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    element.attrib = attributes


def _local(name: str) -> str:
    return name.rpartition("}")[2]
