"""Command-line words before LightningCLI sees them, and what it says of them afterwards."""

import difflib
import importlib
import inspect
import re

from scripts.errors import UserError


def split_config_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The values of all `--config X`, `--config=X`, `-c X`, and the other arguments, both in order."""
    names, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("--config", "-c"):
            if not words:
                raise UserError(f"{word} needs the name of a recipe, e.g. --config elr/mini-sym40")
            names.append(words.pop(0))
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return names, rest


def without_options(words: list[str], names: tuple[str, ...]) -> list[str]:
    """Command-line words without the options of these names (`--name value` or `--name=value`)."""
    free, kept, take = {f"--{name}" for name in names}, [], True
    for word in words:
        if word.startswith("--"):
            take = word.split("=")[0] not in free
        if take:
            kept.append(word)
    return kept


def plain_message(text: str) -> str:
    """One line for jsonargparse's nested report: the option, what is wrong with it, what is accepted."""
    keys = re.findall(r'Parser key "([^"]+)"', text)
    option = "--" + ".".join(keys)
    if unknown := re.search(r"Option '(\w+)' is not accepted", text):
        classes = re.findall(r"class_path '([\w.]+)'", text)
        # a class may be left out of the report; the last one named is then not the one in question
        accepted = _arguments(classes[-1]) if len(classes) == len(keys) else []
        close = difflib.get_close_matches(unknown[1], accepted, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return f"{option}.{unknown[1]} is not an option{hint}" + (f" (of {', '.join(accepted)})" if accepted else "")
    kinds = re.findall(r"Expected a (?:<class '(?!NoneType)([\w.]+)'>|typing.Literal\[(.+?)\])", text)
    kinds = [kind or f"one of {choices}" for kind, choices in kinds]
    value = re.search(r"Got value: (.+)", text) or re.search(r"Given value: (.+)", text)
    if kinds and value:
        return f"{option} must be {' or '.join(dict.fromkeys(kinds))}, got {value[1].strip()!r}"
    # an error of a class's own constructor stands among those of the types that were tried beside it
    own = [
        line for line in re.findall(r"^ *- (.+)$", text, re.M) if not line.startswith(("Expected a", "Does not val"))
    ]
    return own[-1] if own and "Does not validate" in text else text


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
