"""The command `noisebench`: chooses the verb; nothing heavy is imported before that."""

import difflib
import importlib
import sys

from scripts.errors import UserError

LIGHTNING_VERBS = ("fit", "validate", "test", "predict")
MODULES = {
    "list": "scripts.listing",
    "reproduce": "scripts.reproduce",
    "sweep": "scripts.sweep",
    "submit": "scripts.submit",
    "leaderboard": "scripts.leaderboard",
    "plot": "scripts.plot",
    "plan": "scripts.plan",
    "consolidate": "scripts.consolidate",
    "lm-eval": "scripts.lm_eval",
    "push": "scripts.push",
    "encode-latents": "scripts.encode_latents",
    "prior": "scripts.prior",
    "effect-map": "scripts.effect_map",
}

HELP = """usage: noisebench VERB ...

Train and check papers on noise in deep learning.

  list [PAPER]                     papers, recipes, claims and their verdicts
  reproduce PAPER | --all          run what the claims of a paper still lack, print the verdicts
  fit      --config RECIPE ...     train one recipe; options as in LightningCLI
  validate --config RECIPE ...     evaluate a checkpoint on the validation sets
  test     --config RECIPE ...     evaluate a checkpoint on the test set
  predict  --config RECIPE ...     predict with a checkpoint
  sweep RECIPE --set KEY=A,B       train the product of settings, one run after another
  submit RECIPE ...                train on a SLURM cluster: writes the sbatch script and submits it
  leaderboard                      pages of all claims from the records in runs/
  plot     RUN ...                 learning curves of runs as PNG or SVG
  plan RECIPE --gpus N --memory M  memory of a recipe on one device, under DDP and FSDP2
  consolidate CKPT_FOLDER          one file of a sharded checkpoint
  lm-eval  RUN --tasks TASK ...    benchmarks of lm-eval on a run's language model
  push     RUN --to OWNER/NAME     a run's adapter to the Hugging Face hub
  prior RECIPE                     checkpoint of a frozen prior, trained on first need
  effect-map PAPER                 where its effect lives: process, batch, sampling steps
  encode-latents --images FOLDER   shards of VAE latents for the large diffusion recipes

examples:
  noisebench reproduce elr
  noisebench fit --config recipes/elr/mini-sym40.yaml --model.lam 5 --seed_everything 1

`noisebench VERB --help` shows the options of a verb.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    try:
        return _dispatch(name, rest)
    except UserError as error:
        print(f"noisebench {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, unfinished ones resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe such as `| head` has gone
        sys.stderr.close()
        return 0


def _dispatch(name: str, rest: list[str]) -> int:
    if name in LIGHTNING_VERBS:
        return int(importlib.import_module("scripts.train").verb(name, rest))
    if name in MODULES:
        return int(importlib.import_module(MODULES[name]).verb(rest))
    close = difflib.get_close_matches(name, [*MODULES, *LIGHTNING_VERBS], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"no such verb; {hint}`noisebench --help` lists them")


if __name__ == "__main__":
    sys.exit(main())
