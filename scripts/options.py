"""Command-line words, before LightningCLI sees them."""

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
