"""Many runs of one recipe: settings with several values, and seeds, as words of a command line. Imports no torch."""

from itertools import product

from scripts.errors import UserError


def parse_setting(text: str, option: str) -> tuple[str, list[str]]:
    """`model.lam=1,3,5` as (`model.lam`, [`1`, `3`, `5`]).

    Args:
        text: key and values; the key as an option of `noisebench fit`, with or without `--`.
        option: the option it was given with, for the message.

    Raises:
        UserError: no key, no value, or the same value twice.
    """
    key, equals, values = text.removeprefix("--").partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not (key and equals and all(parts)) or len(set(parts)) < len(parts):
        raise UserError(f"{option} takes key=a,b,c with different values, e.g. model.lam=1,3,5; got {text!r}")
    return key, parts


def combinations(settings: list[tuple[str, list[str]]], seeds: list[int]) -> list[list[str]]:
    """Words of `noisebench fit` for each combination, seeds innermost; one empty combination if there is nothing.

    Raises:
        UserError: a key is named twice.
    """
    keys = [key for key, _ in settings]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"each key can be swept once; {', '.join(repeated)} is named twice")
    axes = [[(f"--{key}", value) for value in values] for key, values in settings]
    if seeds:
        axes.append([("--seed_everything", str(seed)) for seed in seeds])
    return [[word for pair in chosen for word in pair] for chosen in product(*axes)]
