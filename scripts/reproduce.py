"""`noisebench reproduce`: runs what the claims of a paper still lack, many runs in few processes, and judges them."""

import argparse
import contextlib
import difflib
import os
import queue
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from scripts import recipes
from scripts.claims import Claim, load_paper
from scripts.errors import UserError
from scripts.leaderboard import board_of_runs, write_pages
from scripts.markdown import verdict_lines
from scripts.options import overrides
from scripts.records import evaluate, read_records
from scripts.worker import quiet, train_one

EXAMPLES = """examples:
  noisebench reproduce elr                                  the mini claims of one paper
  noisebench reproduce elr --claim elr-beats-ce-sym40       one claim
  noisebench reproduce elr --seeds 0..4                     other seeds than the claims' own
  noisebench reproduce --all --jobs 2                       every paper
  noisebench reproduce elr --scale paper --data.source.root data/cifar10

Finished runs are skipped while their recipe and code are unchanged; runs that were cut off continue from their last
checkpoint. Each run uses one CPU thread, so that results do not depend on --jobs."""


@dataclass(frozen=True)
class Job:
    """One training run that a claim needs."""

    recipe: str
    seed: int

    @classmethod
    def of(cls, run: tuple[str, int]) -> "Job":
        """From (recipe, seed)."""
        return cls(*run)

    @property
    def max_epochs(self) -> int:
        """Epochs that the recipe asks for, for the progress bar."""
        trainers = [document.get("trainer", {}) for document in recipes.expand(recipes.find_recipe(self.recipe))]
        return int(next((t["max_epochs"] for t in reversed(trainers) if "max_epochs" in t), 1))


def parse_seeds(text: str) -> list[int]:
    """`0..4` or `0,3,5` as a list.

    Raises:
        UserError: neither form, or fewer than two seeds.
    """
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            seeds = list(range(first, last + 1))
        else:
            seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if len(set(seeds)) < 2 or min(seeds) < 0:
        raise UserError(f"--seeds must name at least two seeds, as 0..4 or 0,3,5; got {text!r}")
    return sorted(set(seeds))


def chosen_claims(slugs: list[str], which: str | None, scale: str) -> list[Claim]:
    """Claims of these papers in their order.

    Args:
        slugs: papers.
        which: a claim id, `all` for the extra ones too, None for the ordinary ones of this scale.
        scale: mini or paper; an id is found at any scale.

    Raises:
        UserError: unknown paper or claim.
    """
    claims = [claim for slug in slugs for claim in load_paper(slug).claims]
    if which is None or which == "all":
        return [c for c in claims if c.scale == scale and (which == "all" or not c.extra)]
    found = [c for c in claims if c.id == which]
    if not found:
        close = difflib.get_close_matches(which, [c.id for c in claims], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"`noisebench list {slugs[0]}` shows them"
        raise UserError(f"--claim: {', '.join(slugs)} has no claim {which!r}; {hint}")
    return found


def verb(argv: list[str]) -> int:
    """Entry of `noisebench reproduce`."""
    parser = argparse.ArgumentParser(
        prog="noisebench reproduce",
        description=(__doc__ or "").partition(": ")[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("papers", nargs="*", metavar="PAPER", help="slugs, see `noisebench list`")
    parser.add_argument("--all", action="store_true", help="every paper")
    parser.add_argument("--claim", metavar="ID", help="one claim; `all` adds those that need more time")
    parser.add_argument("--seeds", metavar="A..B", help="these seeds instead of the claims' own")
    parser.add_argument("--scale", choices=("mini", "paper"), default="mini", help="default: mini")
    parser.add_argument("--jobs", type=int, help="runs at once; default: CPU cores, 1 for recipes that may use a GPU")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--wandb", action="store_true", help="mirror each run to Weights & Biases")
    options, where = parser.parse_known_args(argv)
    if changes := overrides(where):
        raise UserError(
            f"reproduce runs recipes as they are, so it takes no {' '.join(changes)}; `noisebench fit` does. "
            "It passes on options of place: --data.source.root, --data.num_workers, --trainer.accelerator"
        )
    options.where = where
    slugs = recipes.papers() if options.all else options.papers
    unknown = [slug for slug in slugs if slug not in recipes.papers()]
    if unknown or not slugs:
        problem = f"no paper {unknown[0]!r}" if unknown else "name a paper or --all"
        raise UserError(f"{problem}; there are {', '.join(recipes.papers())}")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    claims = chosen_claims(slugs, options.claim, options.scale)
    if not claims:
        raise UserError(f"{', '.join(slugs)} has no claims of scale {options.scale}")
    if options.seeds is not None:
        claims = [claim.with_seeds(parse_seeds(options.seeds)) for claim in claims]
        print("seeds other than the claims' own: these verdicts are yours, the table of all claims does not count them")
    _check_writable(options.runs)
    return _reproduce(claims, options)


def _check_writable(runs: Path) -> None:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--runs: cannot write {runs.absolute()}: {error.strerror}") from error


def _reproduce(claims: list[Claim], options: argparse.Namespace) -> int:
    records, problems = read_records(options.runs)
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    waiting = {claim: set(map(Job.of, evaluate(claim, records).to_run)) for claim in claims}
    jobs = list(dict.fromkeys(job for claim in claims for job in map(Job.of, claim.runs()) if job in waiting[claim]))
    total = len({run for claim in claims for run in claim.runs()})
    print(f"{len(claims)} claims need {total} runs; {total - len(jobs)} are there, {len(jobs)} to run")
    errors = _judge(waiting, set(), options.runs, print)
    if jobs:
        done: set[Job] = set()
        with _Progress(jobs) as progress:
            for job, error in _train(jobs, options, progress):
                done.add(job)
                if error is not None:
                    errors += 1
                    progress.say(f"FAILED {job.recipe} seed {job.seed}: {error}")
                errors += _judge(waiting, done, options.runs, progress.say)
    page = write_pages(board_of_runs(options.runs), options.runs / "leaderboard", "--runs")
    print(f"page of all claims: {page}")
    return 1 if errors or problems else 0


def _judge(waiting: dict[Claim, set[Job]], done: set[Job], runs: Path, say: Callable[[str], None]) -> int:
    """Prints the verdict of each claim whose last run has just ended; returns how many could not be judged."""
    ready = [claim for claim in waiting if waiting[claim] <= done]
    if not ready:
        return 0
    records, _ = read_records(runs)
    errors = 0
    for claim in ready:
        del waiting[claim]
        try:
            say(verdict_lines(evaluate(claim, records)))
        except UserError as error:
            # such as a metric that the runs do not have: the other claims still get their runs
            errors += 1
            say(f"ERROR {error}")
    return errors


def _train(jobs: list[Job], options: argparse.Namespace, progress: "_Progress") -> Iterator[tuple[Job, str | None]]:
    """Runs all jobs; yields (job, error text or None) as each ends."""
    context = get_context("spawn")
    events = context.Queue()
    workers = min(options.jobs or _default_jobs(jobs), len(jobs))
    with ProcessPoolExecutor(workers, context, quiet, (events,)) as pool:
        futures: dict[Future, Job] = {
            pool.submit(train_one, number, job.recipe, job.seed, str(options.runs), options.wandb, options.where): job
            for number, job in enumerate(jobs)
        }
        try:
            while futures:
                with contextlib.suppress(queue.Empty):
                    progress.epoch(*events.get(timeout=0.2))
                for future in [future for future in futures if future.done()]:
                    yield futures.pop(future), _result(future)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(future: Future) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory, or killed); finished runs are kept, the same command continues"
        ) from error
    except Exception as error:
        # a mistake in one method must not cost the other runs
        return f"{type(error).__name__}: {error}"


def _default_jobs(jobs: list[Job]) -> int:
    for job in jobs:
        documents = recipes.expand(recipes.find_recipe(job.recipe))
        if not any(document.get("trainer", {}).get("accelerator") == "cpu" for document in documents):
            return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Progress:
    """One bar over the epochs of all runs."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.epochs = [job.max_epochs for job in jobs]
        self.seen = [0] * len(jobs)
        quiet_terminal = not sys.stderr.isatty()
        self.bar = tqdm(total=sum(self.epochs), unit="epoch", mininterval=30 if quiet_terminal else 0.5)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def epoch(self, number: int, epochs_done: int) -> None:
        """Run `number` has finished this many epochs."""
        job = self.jobs[number]
        self.bar.set_description(
            f"run {number + 1} of {len(self.jobs)}, {job.recipe} seed {job.seed}, "
            f"epoch {epochs_done}/{self.epochs[number]}",
            refresh=False,
        )
        self.bar.update(epochs_done - self.seen[number])
        self.seen[number] = epochs_done

    def say(self, text: str) -> None:
        """Prints above the bar."""
        self.bar.write(text)
