"""`noisebench lm-eval`: public benchmarks, or tasks of one's own, on the language model of a finished run."""

import argparse
from pathlib import Path

from scripts.errors import UserError
from scripts.trained_lm import load_trained, run_config, write_lm_eval


def verb(argv: list[str]) -> int:
    """Entry of `noisebench lm-eval`."""
    parser = argparse.ArgumentParser(
        prog="noisebench lm-eval",
        description="Evaluates the last checkpoint of a run with lm-eval (pip install 'noisebench[eval]'). Writes "
        "lm_eval.json into the run's folder, and adds lm_eval/<task>/<metric> to the metrics of its record.",
        epilog="example: noisebench lm-eval runs/noisefit/llama-3.2-1b-auto/HASH/seed0 --tasks leaderboard "
        "truthfulqa_mc1 truthfulqa_mc2",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks or groups of lm-eval")
    parser.add_argument(
        "--tasks-folder", type=Path, metavar="FOLDER", help="YAML files of one's own tasks; then only these are known"
    )
    parser.add_argument("--limit", type=int, help="only the first examples of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    options = parser.parse_args(argv)
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        raise UserError(f"--batch-size and --limit must be positive, got {options.batch_size} and {options.limit}")
    if options.tasks_folder is not None and not options.tasks_folder.is_dir():
        raise UserError(f"--tasks-folder must be a folder, there is no {options.tasks_folder}")
    metrics = evaluate(
        options.run, options.tasks, options.tasks_folder, options.limit, options.batch_size, options.device
    )
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.4f}")
    print(f"written: {options.run / 'lm_eval.json'}")
    return 0


def evaluate(
    run: Path, tasks: list[str], tasks_folder: Path | None, limit: int | None, batch_size: int, device: str
) -> dict[str, float]:
    """Runs lm-eval on a run's model; the arguments are the options of the verb.

    Returns:
        `lm_eval/<task>/<metric>` -> value.

    Raises:
        UserError: lm-eval is not installed, no such run or no such task.
    """
    run_config(run)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval is needed: pip install 'noisebench[eval]' ({error})") from error
    # reading all 14,000 tasks of lm-eval takes a minute: not where the tasks are one's own
    folder = None if tasks_folder is None else str(tasks_folder)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        place = "lm-eval" if folder is None else folder
        raise UserError(f"--tasks: no task {', '.join(unknown)} in {place}")
    lm, tokenizer = load_trained(run)
    model = HFLM(pretrained=lm.model.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device)
    results = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return write_lm_eval(run, results)
