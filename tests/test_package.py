"""What a plain `pip install .` carries along, and what the README promises."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import recipes
from scripts.__main__ import LIGHTNING_VERBS, MODULES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel: what lies in site-packages after an installation."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("noisebench-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_every_recipe_and_the_sample_with_its_licence(site: Path) -> None:
    ours = {path.relative_to(ROOT) for path in recipes.ROOT.rglob("*.yaml")}
    assert ours <= {path.relative_to(site) for path in site.rglob("*.yaml")}
    assert (site / "datamodules/sample/fashion_mnist_8k.npz").stat().st_size > 3_000_000
    assert "Zalando" in (site / "datamodules/sample/LICENSE").read_text()


def test_installed_command_lists_and_reads_its_data_from_any_folder(site: Path, tmp_path: Path) -> None:
    code = "from scripts.__main__ import main; from datamodules.sources import EmbeddedSample; import datamodules\n"
    code += "print(datamodules.__file__); print(len(EmbeddedSample().load().train_labels)); main(['list'])"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[:2] == [str(site / "datamodules/__init__.py"), "6000"], done.stderr
    assert "elr: Early-Learning Regularization" in done.stdout


def test_installed_command_makes_the_pages(site: Path, tmp_path: Path) -> None:
    """The templates travel along."""
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "scripts", "leaderboard"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<style>" in (tmp_path / "runs" / "leaderboard" / "elr.html").read_text()


def test_readme_starts_with_the_two_commands() -> None:
    assert (ROOT / "README.md").read_text().split("```")[1].split("\n")[1:3] == [
        "make reproduce     # does early-learning regularization (ELR) beat cross entropy? trains both and says",
        "make test          # runs the test suite",
    ]


def test_readme_names_only_verbs_and_recipes_that_exist() -> None:
    pages = [ROOT / "README.md", *recipes.ROOT.glob("*/README.md")]
    # code blocks only: the text speaks of noisebench too
    text = "\n".join("".join(page.read_text().split("```")[1::2]) for page in pages)
    assert set(re.findall(r"^noisebench ([\w-]+)", text, re.M)) <= {*MODULES, *LIGHTNING_VERBS}
    named = re.findall(r"--config (?:recipes/)?([\w-]+/[\w-]+)", text)
    assert named
    for name in named:
        assert recipes.find_recipe(name).is_file()
