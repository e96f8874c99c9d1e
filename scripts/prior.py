"""`noisebench prior`: the checkpoint of a frozen prior, trained once on first need. Imports no torch."""

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts import recipes
from scripts.code_hash import SOURCE, code_hash
from scripts.errors import UserError
from scripts.records import read_records

CACHE = Path("~/.cache/noisebench/priors")
"""Runs of priors that were trained on first need lie here, in the folders that `noisebench fit` gives them."""


def verb(argv: list[str]) -> int:
    """Entry of `noisebench prior`."""
    parser = argparse.ArgumentParser(
        prog="noisebench prior",
        description=(__doc__ or "").partition(": ")[2],
        epilog="example: noisebench prior prior/mini",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="e.g. prior/mini")
    parser.add_argument("--seed", type=int, default=10, help="of its training (default: 10)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs that is looked through first")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default: {CACHE}")
    options = parser.parse_args(argv)
    print(prior_checkpoint(options.recipe, options.seed, options.runs, options.cache))
    return 0


def prior_checkpoint(recipe: str, seed: int = 10, runs: Path = Path("runs"), cache: Path = CACHE) -> Path:
    """The last checkpoint of a finished run of this recipe with today's code; trains it where there is none.

    The address is what a run's folder and record hold: what the recipe says, the seed, and the hash of every code file
    that it names. A checkpoint of other code or other settings is never taken. Two processes that need it at once train
    it once: the second waits.

    Args:
        recipe: e.g. `prior/mini`.
        seed: of the training.
        runs, cache: folders of runs, looked through in this order; training goes into `cache`.

    Raises:
        UserError: no such recipe, its training failed, or the cache cannot be written.
    """
    path = recipes.find_recipe(recipe)
    cache = cache.expanduser()
    if (found := find_prior(path, seed, (runs, cache))) is not None:
        return found
    with _lock(cache / f".{recipes.recipe_hash(path)}-{seed}.lock"):
        if (found := find_prior(path, seed, (cache,))) is None:
            _train(path, seed, cache)
            found = find_prior(path, seed, (cache,))
    if found is None:
        raise UserError(f"the run of {recipe} in {cache} is finished, but its checkpoint is not there")
    return found


def find_prior(recipe: Path, seed: int, folders: tuple[Path, ...]) -> Path | None:
    """Checkpoint of the first finished run without overrides whose recipe and code are those of today."""
    name, wanted = recipes.recipe_name(recipe), recipes.recipe_hash(recipe)
    for folder in folders:
        below = folder / name
        if not below.is_dir():
            continue
        for record in read_records(folder)[0]:
            facts = record.data
            checkpoint = record.path.parent / "checkpoints" / "last.ckpt"
            same = facts.get("recipe") == name and facts.get("recipe_hash") == wanted and facts.get("seed") == seed
            if same and record.finished and not _other_settings(facts) and checkpoint.is_file():
                return checkpoint
    return None


def _other_settings(facts: dict[str, Any]) -> bool:
    """Whether the run had settings of its own, or other code."""
    own = [words for words in facts.get("overrides", []) if not words.startswith("--seed_everything")]
    return bool(own) or facts.get("code_hash") != code_hash(facts.get("config", {}))


def _train(recipe: Path, seed: int, cache: Path) -> None:
    """In a process of its own: the caller's seeds, threads and Trainer do not notice."""
    print(f"no checkpoint of {recipes.recipe_name(recipe)} seed {seed} yet: training it into {cache}", file=sys.stderr)
    words = ["fit", "--config", str(recipe), "--seed_everything", str(seed), "--runs", str(cache), "--resume", "true"]
    words += ["--wandb", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    # ranks of the caller's own run are none of this one's business
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    search = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "scripts", *words],
        env={**inherited, "PYTHONPATH": search},
        stdout=sys.stderr,
    )
    if done.returncode:
        raise UserError(f"the training of {recipes.recipe_name(recipe)} failed, see above")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for the lock; the kernel frees it with the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"--cache: cannot write {path}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
