"""`noisebench submit` and `sweep`: the script that is written, and what they say to bad input. No SLURM needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train
from scripts.__main__ import main
from scripts.errors import UserError
from scripts.settings import combinations, parse_setting

ROOT = Path(__file__).parents[1]


def script(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Lines that a dry run prints."""
    assert main(["submit", "elr/mini-sym40", "--dry-run", *words]) == 0
    return capsys.readouterr().out.splitlines()


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", "elr/mini-sym40", "--dry-run", *words]) == 1
    return capsys.readouterr().err


# the script


def test_script_states_job_signal_and_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/env/bin/noisebench"])
    words = ["--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "3", "--time", "08:00:00", "--memory", "32G"]
    words += ["--partition", "gpu", "--account", "lab", "--runs", "/data/runs"]
    assert script(capsys, *words, "--", "--data.source.root", "my data") == [
        "#!/bin/bash",
        "# Written by: noisebench submit elr/mini-sym40 --dry-run --nodes 2 --gpus-per-node 4 --cpus-per-task 3 "
        "--time 08:00:00 --memory 32G --partition gpu --account lab --runs /data/runs -- --data.source.root 'my data'",
        "#SBATCH --job-name=elr-mini-sym40",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=08:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --mem=32G",
        "#SBATCH --output=/data/runs/elr/mini-sym40/elr-mini-sym40-%j.out",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=SIGUSR1@90",
        "#SBATCH --requeue",
        "",
        "set -eo pipefail",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))",
        "export MASTER_ADDR MASTER_PORT WANDB_MODE=offline OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        "",
        "# one task that fails ends the others; a requeued job continues in its own folder",
        'srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\',
        "    /opt/env/bin/noisebench fit --config elr/mini-sym40 --runs /data/runs --resume true "
        "--trainer.accelerator gpu --trainer.num_nodes 2 --trainer.devices 4 --trainer.strategy ddp "
        "--data.source.root 'my data'",
    ]


def test_one_process_needs_no_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    lines = script(capsys, "--gpus-per-node", "0")
    assert "--trainer.accelerator cpu --trainer.num_nodes 1 --trainer.devices 1" in lines[-1]
    assert "strategy" not in lines[-1]
    assert not any("gpus" in line for line in lines if line.startswith("#SBATCH"))


def test_strategy_of_the_user_comes_last_and_so_wins(capsys: pytest.CaptureFixture[str]) -> None:
    command = script(capsys, "--gpus-per-node", "2", "--", "--trainer.strategy", "fsdp")[-1]
    assert command.index("--trainer.strategy ddp") < command.index("--trainer.strategy fsdp")


def test_seeds_and_sweep_are_an_array_over_their_product(capsys: pytest.CaptureFixture[str]) -> None:
    lines = script(capsys, "--sweep", "model.lam=1,3", "--seeds", "0..1")
    assert "#SBATCH --array=0-3" in lines
    assert "3) run=(--model.lam 3 --seed_everything 1) ;;" in lines
    assert any(line.startswith("#SBATCH --output=") and line.endswith("-%A_%a.out") for line in lines)
    assert lines[-1].endswith('"${run[@]}"')


def test_each_array_task_runs_its_own_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = script(capsys, "--sweep", "model.lam=1,3", "--setup", "export MASTER_ADDR=here")
    for name, text in (("scontrol", "echo n1"), ("srun", 'echo "$MASTER_ADDR" "${@: -2}"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash"], input="\n".join(lines) + "\n", env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "here --model.lam 3\n"


def test_profile_gives_defaults_and_the_command_line_wins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text('partition: gpu\ngpus-per-node: 8\ntime: "1-00"\nsetup: [module load cuda]\n')
    lines = script(capsys, "--profile", str(profile), "--partition", "debug", "--setup", "ulimit -n 4096")
    assert {"#SBATCH --partition=debug", "#SBATCH --gpus-per-node=8", "#SBATCH --time=1-00"} <= set(lines)
    assert lines.index("module load cuda") + 1 == lines.index("ulimit -n 4096")


# what it says


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes must be a whole number of at least 1, got 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node must be a whole number of at least 0, got -1"),
        (["--time", "8h"], "--time must be minutes, HH:MM:SS or D-HH:MM:SS, e.g. 08:00:00; got '8h'"),
        (["--tasks-per-node", "2"], "--tasks-per-node is one per GPU: 1 or left out, got 2"),
        (["--job-name", "bash"], "--job-name bash would make Lightning take the job for an interactive shell"),
        (["--job-name", "a b"], "--job-name may hold letters, digits, '.', '_' and '-', got 'a b'"),
        (["--sweep", "model.lam"], "--sweep takes key=a,b,c with different values, e.g. model.lam=1,3,5"),
        (["--seeds", "x"], "--seeds must name at least two seeds, as 0..4 or 0,3,5; got 'x'"),
        (["--profile", "absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_bad_value_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(capsys, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patition: gpu", "'patition' is not an option; did you mean partition? accepted are nodes, gpus-per-node"),
        ("time: 10:00:00", "time must be text in quotes, got 36000"),
        ("nodes: two", "--nodes must be a whole number of at least 1, got 'two'"),
        ("setup: module load cuda", "setup must be a list of shell lines, got 'module load cuda'"),
    ],
)
def test_bad_profile_is_named(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text(text)
    assert message in complaint(capsys, "--profile", str(profile))


def test_unknown_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "elr/mini-sym41", "--dry-run"]) == 1
    assert "no recipe 'elr/mini-sym41'" in capsys.readouterr().err


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script(capsys, "--runs", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_the_message_names_the_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "elr/mini-sym40", "--runs", str(tmp_path)]) == 1
    assert "sbatch is not on the PATH" in (error := capsys.readouterr().err)
    assert "--dry-run shows the script" in error


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that runs what the test writes into it."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "sbatch"
    path.touch(0o755)
    return path


def test_submitted_job_can_be_followed_and_cancelled(
    sbatch: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sbatch.write_text("#!/bin/sh\necho '42;here'\n")
    assert main(["submit", "elr/mini-sym40", "--runs", str(tmp_path), "--seeds", "0..1"]) == 0
    folder = tmp_path / "elr" / "mini-sym40"
    assert capsys.readouterr().out.splitlines() == [
        f"job 42 is submitted ({folder}/submit-elr-mini-sym40.sh)",
        f"follow: tail -F {folder}/elr-mini-sym40-42_0.out",
        "queue:  squeue --job 42",
        "cancel: scancel 42",
    ]
    assert (folder / "submit-elr-mini-sym40.sh").read_text().startswith("#!/bin/bash\n")


def test_refusal_is_shown_as_slurm_words_it(sbatch: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    assert main(["submit", "elr/mini-sym40", "--runs", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "sbatch: error: no such partition"


# sweeps


def test_product_takes_every_combination_with_seeds_innermost() -> None:
    assert combinations([("a", ["1", "2"]), ("b", ["x"])], [0, 1]) == [
        ["--a", "1", "--b", "x", "--seed_everything", "0"],
        ["--a", "1", "--b", "x", "--seed_everything", "1"],
        ["--a", "2", "--b", "x", "--seed_everything", "0"],
        ["--a", "2", "--b", "x", "--seed_everything", "1"],
    ]
    assert combinations([], []) == [[]]


@pytest.mark.parametrize("text", ["model.lam", "=1,2", "model.lam=", "model.lam=1,,2", "model.lam=1,1"])
def test_setting_without_distinct_values_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--set takes key=a,b,c with different values"):
        parse_setting(text, "--set")


def test_key_swept_twice_is_refused() -> None:
    with pytest.raises(UserError, match="each key can be swept once; a is named twice"):
        combinations([("a", ["1"]), ("a", ["2"])], [])


def test_sweep_runs_every_combination_and_fails_if_one_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def fit(name: str, words: list[str]) -> int:
        ran.append(words)
        if "1" in words:
            raise UserError("diverged")
        return 0

    monkeypatch.setattr(train, "verb", fit)
    assert main(["sweep", "elr/mini-sym40", "--set", "model.lam=1,3", "--", "--wandb", "false"]) == 1
    shared = ["--config", "elr/mini-sym40", "--resume", "true"]
    assert ran == [[*shared, "--model.lam", value, "--wandb", "false"] for value in ("1", "3")]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "1 of 2 runs finished"
    assert "diverged" in captured.err
