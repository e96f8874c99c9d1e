"""Jobs on a real SLURM cluster of two nodes: they end as local runs do, go back into the queue, and survive a kill."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from slurm_cluster import NODES, cluster, missing_programs

from lightning_modules.stacks.table import read_members
from scripts.consolidate import consolidate

ROOT = Path(__file__).parents[1]
RECIPE = "elr/mini-sym40"
EPOCHS = 4
QUIET = ["--wandb", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
PLACE = ["--setup", "export MASTER_ADDR=127.0.0.1", "--gpus-per-node", "0"]
"""Both nodes are this machine, whose name resolves to no address that gloo could use."""
VIT = "{img_size: 28, patch_size: 7, in_chans: 1, embed_dim: 15, depth: 2, num_heads: 3}"
FSDP2 = ["--trainer.strategy", "fsdp2", "--model.net", "lightning_modules.networks.image.TimmNet"]
FSDP2 += ["--model.net.name", "vit_tiny_patch16_224", "--model.net.num_classes", "10", "--model.net.options", VIT]
"""A ViT in the place of the recipe's net; its width does not divide by two."""

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """Environment of a running cluster. Without SLURM the tests are skipped, but never where CI is set."""
    missing = missing_programs()
    if missing and not os.environ.get("CI"):
        pytest.skip(f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge")
    # a short path: the munge socket may have 107 characters
    with tempfile.TemporaryDirectory(prefix="nb") as folder, cluster(Path(folder) / "slurm") as environment:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        yield {**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "OFF"}


class Cluster:
    """Submits, watches and disturbs jobs."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def call(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in the cluster's environment."""
        done = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, runs: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`noisebench submit` of the mini recipe."""
        return self.call(
            sys.executable, "-m", "scripts", "submit", RECIPE, "--runs", str(runs), *PLACE, *words, check=check
        )

    def start(self, runs: Path, *words: str) -> str:
        """Submits; returns the job's number."""
        found = re.match(r"job (\d+) is submitted", self.submit(runs, *words).stdout)
        assert found
        return found[1]

    def state(self, job: str) -> str:
        """State of a job, or of the tasks of an array, joined by commas."""
        text = self.call("scontrol", "show", "job", "--oneliner", job).stdout
        return ",".join(sorted(set(re.findall(r"JobState=(\w+)", text))))

    def wait(self, job: str, *states: str, seconds: float = 180) -> str:
        """Waits until the job is in one of these states."""
        self.until(lambda: self.state(job) in states, f"job {job} in {states}", seconds)
        return self.state(job)

    def until(self, reached: Callable[[], Any], what: str, seconds: float = 120) -> None:
        """Waits for a condition."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"not reached: {what}"
            time.sleep(0.1)


@pytest.fixture
def jobs(slurm: dict[str, str]) -> Cluster:
    return Cluster(slurm)


def two_nodes(*words: str) -> list[str]:
    return ["--nodes", "2", "--time", "10", *words, "--", "--trainer.max_epochs", str(EPOCHS), *QUIET]


def run_folder(runs: Path) -> Path:
    (path,) = runs.glob("elr/mini-sym40/*/seed10")
    return path


def saved(runs: Path) -> bool:
    """Whether the first epoch is over and its checkpoint written."""
    return any(runs.glob("elr/mini-sym40/*/seed10/checkpoints/last.ckpt"))


def output(runs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(runs.glob("elr/mini-sym40/*.out")))


def restored(runs: Path) -> list[str]:
    """Names of the checkpoints from which jobs have continued."""
    return [Path(path).name for path in re.findall(r"Restored all states from the checkpoint at (\S+)", output(runs))]


def task(job: str, rank: int) -> int:
    """Process number of one rank of a job."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            if {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(variables) and b"fit" in words:
                return int(folder.name)
    raise AssertionError(f"no task {rank} of job {job}")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def daemon(node: str, environment: dict[str, str]) -> int:
    """Process number of a node's slurmd."""
    words = ["slurmd", "-D", "-N", node, "-f", environment["SLURM_CONF"]]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_text().split("\0")[:-1] == words:
                return int(folder.name)
    raise AssertionError(f"no slurmd of {node}")


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of `last.ckpt`, whose shards are joined first."""
    path = folder / "checkpoints" / "last.ckpt"
    with tempfile.TemporaryDirectory() as place:
        if path.is_dir():
            consolidate(path, Path(place) / "full.ckpt")
            path = Path(place) / "full.ckpt"
        return torch.load(path, weights_only=True)


def assert_equal_runs(one: Path, other: Path) -> None:
    """Metrics, weights, targets and optimizer of two run folders agree bit for bit."""
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    ours, theirs = last_checkpoint(one), last_checkpoint(other)
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    assert torch.equal(ours["targets"], theirs["targets"])
    for key, state in theirs["optimizer_states"][0]["state"].items():
        assert torch.equal(ours["optimizer_states"][0]["state"][key]["momentum_buffer"], state["momentum_buffer"])


@pytest.fixture(scope="session")
def undisturbed(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-node run that nothing disturbed."""
    runs, jobs = tmp_path_factory.mktemp("whole"), Cluster(slurm)
    job = jobs.start(runs, *two_nodes())
    assert jobs.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(runs)
    return run_folder(runs)


def test_two_nodes_end_with_the_metrics_of_two_local_processes(
    undisturbed: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scripts"]
    words += ["fit", "--config", RECIPE, "--runs", str(tmp_path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", str(EPOCHS), *QUIET]
    Cluster(slurm).call(*words)
    assert_equal_runs(undisturbed, run_folder(tmp_path))
    record = json.loads((undisturbed / "record.json").read_text())
    assert (record["status"], record["world_size"]) == ("finished", 2)


def test_signal_within_an_epoch_requeues_and_the_run_ends_as_an_undisturbed_one(
    jobs: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    job = jobs.start(tmp_path, *two_nodes())
    jobs.until(lambda: saved(tmp_path), "the first epoch")
    jobs.call("scancel", "--signal=USR1", job)
    jobs.until(lambda: "is requeued" in output(tmp_path), "the requeue")
    found = re.search(r"step (\d+): \S+requeue.ckpt is written ([\d.]+) s after SIGUSR1", output(tmp_path))
    assert found
    print(f"checkpoint {found[2]} s after the signal, at step {found[1]}")
    assert int(found[1]) % 40 != 0  # an epoch has 40 steps
    assert not (run_folder(tmp_path) / "record.json").exists()
    assert jobs.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(tmp_path)
    assert restored(tmp_path) == ["requeue.ckpt"]
    assert_equal_runs(run_folder(tmp_path), undisturbed)


def test_array_of_three_seeds_gives_three_records(jobs: Cluster, tmp_path: Path) -> None:
    small = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"]
    job = jobs.start(tmp_path, "--seeds", "0..2", "--time", "10", "--", *small, *QUIET)
    assert jobs.wait(job, "COMPLETED", "FAILED", "COMPLETED,FAILED") == "COMPLETED", output(tmp_path)
    records = [json.loads(path.read_text()) for path in tmp_path.glob("elr/mini-sym40/*/seed*/record.json")]
    assert sorted((r["seed"], r["status"]) for r in records) == [(k, "finished") for k in range(3)]


def test_parts_of_a_grid_from_an_array_are_gathered_as_the_whole(jobs: Cluster, tmp_path: Path) -> None:
    recipe, quiet = "sgd_noise/mini-perceptron-chi1", ["--trainer.callbacks", "null", *QUIET]
    grid = ["--model.train_sizes", "[32,64]", "--data.dim", "4", *quiet]
    words = [sys.executable, "-m", "scripts", "submit", recipe, "--runs", str(tmp_path / "parts"), *PLACE]
    words += ["--time", "10", "--sweep", "model.shard=0,1,2", "--", "--model.shards", "3", *grid]
    found = re.match(r"job (\d+) is submitted", jobs.call(*words).stdout)
    assert found
    assert jobs.wait(found[1], "COMPLETED", "FAILED", "COMPLETED,FAILED") == "COMPLETED"
    parts = [str(path) for path in tmp_path.glob("parts/sgd_noise/*/*/seed0/members.parquet")]
    fit = [sys.executable, "-m", "scripts", "fit", "--config", recipe, *grid, "--runs"]
    jobs.call(*fit, str(tmp_path / "whole"))
    jobs.call(*fit, str(tmp_path / "gathered"), "--model.done", json.dumps(parts))
    whole, gathered = (next((tmp_path / name).rglob("members.parquet")) for name in ("whole", "gathered"))
    assert len(parts) == 3
    assert read_members([str(gathered)]) == read_members([str(whole)])


def test_cancelled_job_leaves_a_folder_that_resumes(jobs: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    job = jobs.start(tmp_path, *two_nodes())
    jobs.until(lambda: saved(tmp_path), "the first epoch")
    jobs.call("scancel", job)
    assert jobs.wait(job, "CANCELLED", "FAILED", "COMPLETED") == "CANCELLED"
    jobs.until(lambda: "stopped by SIGTERM" in output(tmp_path), "the checkpoint after SIGTERM")
    assert not (run_folder(tmp_path) / "record.json").exists()
    script = tmp_path / "elr" / "mini-sym40" / "submit-elr-mini-sym40.sh"
    again = jobs.call("sbatch", "--parsable", str(script)).stdout.strip()
    assert jobs.wait(again, "COMPLETED", "FAILED") == "COMPLETED", output(tmp_path)
    assert restored(tmp_path) == ["requeue.ckpt"]
    assert_equal_runs(run_folder(tmp_path), undisturbed)


def test_killed_task_ends_the_job_promptly_and_a_requeue_resumes(
    jobs: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    job = jobs.start(tmp_path, *two_nodes())
    jobs.until(lambda: saved(tmp_path), "the first epoch")
    os.kill(task(job, 1), signal.SIGKILL)
    assert jobs.wait(job, "FAILED", "COMPLETED", seconds=30) == "FAILED"
    jobs.call("scontrol", "requeue", job)
    jobs.wait(job, "RUNNING", "COMPLETED")
    assert jobs.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(tmp_path)
    assert restored(tmp_path) == ["last.ckpt"]
    assert_equal_runs(run_folder(tmp_path), undisturbed)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--nodes", "5"], "Batch job submission failed"),
        (["--memory", "9999999G"], "Batch job submission failed"),
        (["--gpus-per-node", "8"], "Invalid generic resource (gres) specification"),
    ],
)
def test_impossible_options_show_the_reason_that_slurm_gives(
    jobs: Cluster, words: list[str], reason: str, tmp_path: Path
) -> None:
    done = jobs.submit(tmp_path, *words, check=False)
    assert done.returncode == 1
    assert "noisebench submit: error: SLURM refused" in done.stderr
    assert reason in done.stderr


def test_frozen_node_requeues_the_job_and_it_resumes_once_the_node_is_back(
    jobs: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    job = jobs.start(tmp_path, *two_nodes())
    jobs.until(lambda: saved(tmp_path), "the first epoch")
    lost, slurmd = task(job, 1), daemon(NODES[1], jobs.environment)
    frozen = [lost, parent(lost), slurmd]
    try:
        # no answer and no closed connection, as of a machine without power
        for process in frozen:
            os.kill(process, signal.SIGSTOP)
        jobs.call("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=no answer")
        jobs.wait(job, "PENDING", "COMPLETED", "FAILED", "NODE_FAIL", seconds=60)
    finally:
        for process in frozen[:2]:
            os.kill(process, signal.SIGKILL)
        os.kill(slurmd, signal.SIGCONT)
    jobs.call("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
    assert jobs.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(tmp_path)
    assert restored(tmp_path) == ["last.ckpt"]
    assert_equal_runs(run_folder(tmp_path), undisturbed)


# sharded over both nodes


@pytest.fixture(scope="session")
def sharded(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-node FSDP2 run that nothing disturbed."""
    runs, jobs = tmp_path_factory.mktemp("sharded"), Cluster(slurm)
    job = jobs.start(runs, *two_nodes(), *FSDP2)
    assert jobs.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(runs)
    return run_folder(runs)


def test_two_sharded_nodes_end_as_two_sharded_local_processes(
    sharded: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scripts"]
    words += ["fit", "--config", RECIPE, "--runs", str(tmp_path), "--trainer.devices", "2", "--trainer.accelerator"]
    Cluster(slurm).call(*words, "cpu", "--trainer.max_epochs", str(EPOCHS), *QUIET, *FSDP2)
    assert (sharded / "checkpoints" / "last.ckpt").is_dir()
    assert_equal_runs(sharded, run_folder(tmp_path))


def test_signal_to_a_sharded_job_requeues_it_and_it_ends_as_an_undisturbed_one(
    jobs: Cluster, sharded: Path, tmp_path: Path
) -> None:
    job = jobs.start(tmp_path, *two_nodes(), *FSDP2)
    jobs.until(lambda: saved(tmp_path), "the first epoch")
    jobs.call("scancel", "--signal=USR1", job)
    jobs.until(lambda: "is requeued" in output(tmp_path), "the requeue")
    found = re.search(r"step (\d+): \S+requeue.ckpt is written ([\d.]+) s after SIGUSR1", output(tmp_path))
    assert found
    print(f"sharded checkpoint {found[2]} s after the signal, at step {found[1]}")
    assert int(found[1]) % 40 != 0
    assert (run_folder(tmp_path) / "checkpoints" / "requeue.ckpt" / "meta.pt").is_file()
    assert jobs.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(tmp_path)
    assert restored(tmp_path) == ["requeue.ckpt"]
    assert_equal_runs(run_folder(tmp_path), sharded)
