"""`noisebench sweep`: the product of settings, one ordinary run after another in this process."""

import argparse
import importlib
import shlex
import sys

from scripts import recipes
from scripts.errors import UserError
from scripts.reproduce import parse_seeds
from scripts.settings import combinations, parse_setting

EXAMPLES = """examples:
  noisebench sweep elr/mini-sym40 --set model.lam=1,3,5 --set model.beta=0.5,0.7 -- --trainer.max_epochs 10
  noisebench sweep elr/mini-sym40 --set model.lam=1,3,5 --seeds 0..4

Each combination is a run of its own, in the folder that `noisebench fit` with these settings has. What was cut off
continues. `noisebench submit --sweep` runs the same as a SLURM array."""


def verb(argv: list[str]) -> int:
    """Entry of `noisebench sweep`; 1 if a run failed, after all others have run."""
    own, passed = split_at_dashes(argv)
    parser = argparse.ArgumentParser(
        prog="noisebench sweep",
        description=(__doc__ or "").partition(": ")[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="e.g. elr/mini-sym40")
    parser.add_argument("--set", action="append", required=True, metavar="KEY=A,B,C", help="repeatable")
    parser.add_argument("--seeds", metavar="A..B", help="each combination with these seeds")
    options = parser.parse_args(own)
    recipes.find_recipe(options.recipe)
    seeds = parse_seeds(options.seeds) if options.seeds else []
    chosen = combinations([parse_setting(text, "--set") for text in options.set], seeds)
    failed = 0
    for number, words in enumerate(chosen, 1):
        print(f"run {number} of {len(chosen)}: {shlex.join(words)}", flush=True)
        try:
            importlib.import_module("scripts.train").verb(
                "fit", ["--config", options.recipe, "--resume", "true", *words, *passed]
            )
        except UserError as error:
            failed += 1
            print(f"noisebench sweep: error: {error}", file=sys.stderr)
        finally:
            if "wandb" in sys.modules:
                # or the next run would write into this one's W&B run
                sys.modules["wandb"].finish()
    print(f"{len(chosen) - failed} of {len(chosen)} runs finished")
    return 1 if failed else 0


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Words before and after the first `--`; those after it are for `noisebench fit`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]
