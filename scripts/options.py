"""Options: command-line words before LightningCLI sees them, its settings afterwards, and its complaints."""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from scripts.errors import UserError

PRINTING = ("enable_progress_bar", "enable_model_summary")
WHERE_AND_HOW = ("accelerator", "devices", "num_nodes", "strategy", *PRINTING)
"""Trainer options that say where a run happens and what it prints, not what it computes."""
HOUSEKEEPING = ("ckpt_path", "runs", "overwrite", "resume", "fallback", "wandb")
NOT_SETTINGS = ("seed_everything", *HOUSEKEEPING, "weights_only", "verbose", "return_predictions", "model_summary")


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides what a run computes, apart from its seed."""
    kept = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
    kept["trainer"] = {
        key: value
        for key, value in config["trainer"].items()
        if key not in (*WHERE_AND_HOW, "logger", "default_root_dir", "enable_checkpointing")
    }
    kept["checkpoint"] = {key: value for key, value in config["checkpoint"].items() if key != "dirpath"}
    kept["data"] = {key: value for key, value in flat(config.get("data") or {}).items() if not is_location(key)}
    return kept


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


def without_options(words: list[str], dropped: Callable[[str], bool]) -> list[str]:
    """Command-line words without the options (`name value` or `name=value` after `--`) that are to be dropped."""
    kept, take = [], True
    for word in words:
        if word.startswith("--"):
            take = not dropped(word.removeprefix("--").split("=")[0])
        if take:
            kept.append(word)
    return kept


def overrides(words: list[str]) -> list[str]:
    """What a command line changes of a recipe's settings; empty for a run that a claim may use."""
    free = {"seed_everything", *HOUSEKEEPING, *(f"trainer.{name}" for name in WHERE_AND_HOW)}
    return without_options(words, lambda name: name in free or is_location(name))


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
    lines = re.findall(r"^ *- (.+)$", text, re.M)
    own = [line for line in lines if not line.startswith(("Expected a", "Does not validate"))]
    return own[-1] if own and "Does not validate" in text else text


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def is_location(key: str) -> bool:
    """Whether a dotted key says where data lie or how they are fetched, and so changes no result."""
    return key.split(".")[-1] in ("root", "num_workers")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}".lstrip(".")).items()}
