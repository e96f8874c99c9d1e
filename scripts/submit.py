"""`noisebench submit`: writes a readable sbatch script for a recipe and hands it to SLURM. Imports no torch."""

import argparse
import difflib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts import recipes
from scripts.errors import UserError
from scripts.reproduce import parse_seeds
from scripts.settings import combinations, parse_setting
from scripts.sweep import split_at_dashes

EXAMPLES = """examples:
  noisebench submit elr/cifar10-sym40 --nodes 2 --gpus-per-node 4 --time 08:00:00 -- --data.source.root data/cifar10
  noisebench submit elr/mini-sym40 --gpus-per-node 0 --seeds 0..4 --time 00:20:00 --dry-run
  noisebench submit elr/cifar10-sym40 --profile cluster.yaml --sweep model.lam=1,3,5

A profile holds the same options as YAML, e.g. `partition: gpu`, `time: "08:00:00"`, `setup: [module load cuda]`; the
command line wins. What follows `--` are options of `noisebench fit`. 90 seconds before the time limit the job writes a
checkpoint, goes back into the queue and continues from its own folder."""

DEFAULTS: dict[str, Any] = {
    "nodes": 1,
    "gpus-per-node": 1,
    "tasks-per-node": None,
    "cpus-per-task": 1,
    "time": None,
    "partition": None,
    "account": None,
    "memory": None,
    "job-name": None,
    "setup": [],
}
NUMBERS = {"nodes": 1, "gpus-per-node": 0, "tasks-per-node": 1, "cpus-per-task": 1}
"""Options that are whole numbers, with the lowest one."""
TIME = re.compile(r"\d+|\d+:[0-5]\d|\d+:[0-5]\d:[0-5]\d|\d+-\d+(:[0-5]\d){0,2}")


def verb(argv: list[str]) -> int:
    """Entry of `noisebench submit`."""
    own, passed = split_at_dashes(argv)
    options = _parser().parse_args(own)
    recipe = recipes.find_recipe(options.recipe)
    given = {name: getattr(options, name.replace("-", "_")) for name in DEFAULTS}
    plan = settle(given, None if options.profile is None else Path(options.profile))
    plan["job-name"] = plan["job-name"] or recipes.recipe_name(recipe).replace("/", "-")
    seeds = parse_seeds(options.seeds) if options.seeds else []
    runs = combinations([parse_setting(text, "--sweep") for text in options.sweep], seeds)
    folder = Path(options.runs) / recipes.recipe_name(recipe)
    fit = ["fit", "--config", options.recipe, "--runs", options.runs, "--resume", "true", *placement(plan), *passed]
    command = shlex.join(["noisebench", "submit", *argv])
    script = sbatch_script(plan, fit, runs, folder.absolute(), command)
    if options.dry_run:
        print(script, end="")
        return 0
    path = folder / f"submit-{plan['job-name']}.sh"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    except OSError as error:
        raise UserError(f"--runs: cannot write {path}: {error}") from error
    job = _submit(path)
    output = _output(folder, plan["job-name"], len(runs) > 1).replace("%A", job).replace("%j", job)
    print(f"job {job} is submitted ({path})")
    print(f"follow: tail -F {output.replace('%a', '0')}")
    print(f"queue:  squeue --job {job}")
    print(f"cancel: scancel {job}")
    return 0


def settle(given: dict[str, Any], profile: Path | None) -> dict[str, Any]:
    """Options of the command line over those of the profile over the defaults, checked.

    Args:
        given: name -> value as in `DEFAULTS`; None (or no set-up line) where the command line says nothing.
        profile: YAML file of such options.

    Raises:
        UserError: an unknown key, or a value that is out of range or of another form.
    """
    stored = {} if profile is None else recipes.read_yaml(profile)
    for key in stored.keys() - DEFAULTS.keys():
        close = difflib.get_close_matches(str(key), DEFAULTS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--profile {profile}: {key!r} is not an option; {hint}accepted are {', '.join(DEFAULTS)}")
    lines = stored.get("setup", [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"--profile {profile}: setup must be a list of shell lines, got {lines!r}")
    plan = {**DEFAULTS, **stored, **{name: value for name, value in given.items() if value is not None}}
    plan["setup"] = [*lines, *(given["setup"] or [])]
    for name, lowest in NUMBERS.items():
        value = plan[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < lowest):
            raise UserError(f"--{name} must be a whole number of at least {lowest}, got {value!r}")
    for name in ("time", "partition", "account", "memory", "job-name"):
        if plan[name] is not None and not isinstance(plan[name], str):
            # YAML reads an unquoted 08:00:00 as a number of seconds
            raise UserError(f"--profile {profile}: {name} must be text in quotes, got {plan[name]!r}")
    _check_text(plan["time"], plan["job-name"])
    gpus, tasks = plan["gpus-per-node"], plan["tasks-per-node"]
    if gpus > 0 and tasks not in (None, gpus):
        raise UserError(
            f"--tasks-per-node is one per GPU: {gpus} or left out, got {tasks}. For tasks on CPUs add --gpus-per-node 0"
        )
    plan["tasks-per-node"] = gpus or tasks or 1
    return plan


def _check_text(limit: str | None, name: str | None) -> None:
    if limit is not None and not TIME.fullmatch(limit):
        raise UserError(f"--time must be minutes, HH:MM:SS or D-HH:MM:SS, e.g. 08:00:00; got {limit!r}")
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--job-name may hold letters, digits, '.', '_' and '-', got {name!r}")
    if name in ("bash", "interactive"):
        raise UserError(f"--job-name {name} would make Lightning take the job for an interactive shell")


def placement(plan: dict[str, Any]) -> list[str]:
    """Trainer options that say where the run happens; the strategy is ddp where there are several processes."""
    tasks, nodes = plan["tasks-per-node"], plan["nodes"]
    words = ["--trainer.accelerator", "gpu" if plan["gpus-per-node"] else "cpu"]
    words += ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(tasks)]
    return words + (["--trainer.strategy", "ddp"] if tasks * nodes > 1 else [])


def sbatch_script(plan: dict[str, Any], fit: list[str], runs: list[list[str]], folder: Path, command: str) -> str:
    """The script.

    Args:
        plan: what `settle` returns, with a job name.
        fit: words of `noisebench` that all runs share.
        runs: words that each run adds; several make an array.
        folder: absolute, of the outputs.
        command: what wrote the script.
    """
    array = len(runs) > 1
    directives = _directives(plan) | {
        "array": f"0-{len(runs) - 1}" if array else None,
        "output": _output(folder, plan["job-name"], array),
        "open-mode": "append",
        "signal": "SIGUSR1@90",
    }
    lines = ["#!/bin/bash", f"# Written by: {command}"]
    lines += [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    lines += ["#SBATCH --requeue", "", "set -eo pipefail"]
    lines += ['MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
    lines += ["MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))"]
    lines += ["export MASTER_ADDR MASTER_PORT WANDB_MODE=offline OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK"]
    lines += plan["setup"]
    if array:
        lines += ["", "case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"{number}) run=({shlex.join(words)}) ;;" for number, words in enumerate(runs)]
        lines += ["esac"]
    words = [shlex.quote(word) for word in (*_noisebench(), *fit)]
    words += ['"${run[@]}"'] if array else [shlex.quote(word) for word in runs[0]]
    lines += ["", "# one task that fails ends the others; a requeued job continues in its own folder"]
    lines += ['srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\', f"    {' '.join(words)}"]
    return "\n".join(lines) + "\n"


def _directives(plan: dict[str, Any]) -> dict[str, Any]:
    """What the job asks of SLURM, under SLURM's names; None asks for nothing."""
    return {
        "job-name": plan["job-name"],
        "nodes": plan["nodes"],
        "ntasks-per-node": plan["tasks-per-node"],
        "cpus-per-task": plan["cpus-per-task"],
        "gpus-per-node": plan["gpus-per-node"] or None,
        "time": plan["time"],
        "partition": plan["partition"],
        "account": plan["account"],
        "mem": plan["memory"],
    }


def _noisebench() -> list[str]:
    """The command as it was called here, so that the job needs no activated environment."""
    called = Path(sys.argv[0])
    return [str(called.absolute())] if called.name == "noisebench" else [sys.executable, "-m", "scripts"]


def _output(folder: Path, name: str, array: bool) -> str:
    return f"{folder}/{name}-{'%A_%a' if array else '%j'}.out"


def _submit(path: Path) -> str:
    """Hands the script to sbatch; returns the job's number."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"sbatch is not on the PATH, so this is no SLURM login node. {path} is written; "
            "--dry-run shows the script without submitting"
        ) from error
    if done.returncode:
        raise UserError(f"SLURM refused {path}:\n{(done.stderr or done.stdout).strip()}")
    return done.stdout.strip().split(";")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="noisebench submit",
        description="Writes a readable sbatch script for a recipe and hands it to SLURM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="e.g. elr/cifar10-sym40")
    parser.add_argument("--nodes", type=int, help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, help="one task each; 0 for tasks on CPUs (default: 1)")
    parser.add_argument("--tasks-per-node", type=int, help="with --gpus-per-node 0 (default: 1)")
    parser.add_argument("--cpus-per-task", type=int, help="also the number of threads (default: 1)")
    parser.add_argument("--time", help="limit of each start, e.g. 08:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--memory", help="per node, e.g. 32G")
    parser.add_argument("--job-name", help="default: the recipe's")
    parser.add_argument("--setup", action="append", metavar="LINE", help="shell line before srun; repeatable")
    parser.add_argument("--profile", metavar="FILE", help="YAML with defaults for the options above")
    parser.add_argument("--seeds", metavar="A..B", help="an array, one task for each seed")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,C", help="an array; repeatable")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    return parser
