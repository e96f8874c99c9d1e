"""Memory plans: bytes against real tensors, and the advice that follows from them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_sharding import vit
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker

from callbacks.checkpoint_activations import checkpoint_activations
from scripts import memory
from scripts.__main__ import main
from scripts.errors import UserError
from scripts.plan import SHARE, Setting, choose, human, parse_bytes
from scripts.plan_recipe import PlannedRecipe, plan_recipe

ROWS = 64
VIT = ["--data.source", "synthetic.SyntheticImages", "--data.source.num_classes", "4", "--data.source.channels", "1"]
VIT += ["--data.source.size", "8", "--data.source.per_class", "30", "--data.val_fraction", "0.2", "--data.batch_size"]
VIT += ["16", "--model.net", "lightning_modules.networks.image.TimmNet", "--model.net.name", "vit_tiny_patch16_224"]
VIT += ["--model.net.num_classes", "4", "--model.optimizer", "torch.optim.AdamW", "--model.net.options"]
VIT += ["{img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 15, depth: 2, num_heads: 3}"]


def inputs(device: str) -> tuple[Tensor, Tensor]:
    return torch.zeros(ROWS, 1, 8, 8, device=device), torch.zeros(ROWS, dtype=torch.int64, device=device)


def planned(blocks: bool = False) -> memory.Activations:
    with torch.device("meta"):
        net = vit()
    image, label = inputs("meta")
    found = list(net.net.blocks) if blocks else []
    return memory.activations(lambda: F.cross_entropy(net(image), label), net, [image, label], found)


def saved_bytes(net: nn.Module) -> int:
    """Bytes of the real storages, apart from weights and batch, that a real forward saves."""
    image, label = inputs("cpu")
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), image, label)}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(net(image), label)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.fixture(scope="module")
def recipe() -> PlannedRecipe:
    return plan_recipe("elr/mini-sym40", VIT, None, None, None)


def test_activations_are_those_of_real_tensors() -> None:
    assert planned().plain == pytest.approx(saved_bytes(vit()), rel=0.1)


def test_kept_activations_are_those_of_a_really_checkpointed_net() -> None:
    net = vit()
    checkpoint_activations(net)
    assert planned(blocks=True).kept == pytest.approx(saved_bytes(net), rel=0.1)


def test_sum_is_the_measured_peak_of_a_step() -> None:
    """MemTracker follows every real tensor of the second step, when the optimizer has its state."""
    net, batch = vit(), inputs("cpu")
    optimizer = torch.optim.AdamW(net.parameters())
    tracker = MemTracker()
    tracker.track_external(net, optimizer, *batch)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            loss = F.cross_entropy(net(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    weights = memory.tensor_bytes(net.parameters())
    state = memory.tensor_bytes(v for s in optimizer.state.values() for v in s.values())
    assert 2 * weights + state + planned().plain + memory.tensor_bytes(batch) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "make",
    [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1)],
)
def test_optimizer_state_is_exact_to_the_byte(make: Callable[..., torch.optim.Optimizer]) -> None:
    net = vit()
    optimizer = make(net.parameters())
    net(inputs("cpu")[0]).sum().backward()
    optimizer.step()
    real = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    with torch.device("meta"):
        meta = vit()
    assert memory.tensor_bytes(memory.optimizer_state([make(meta.parameters())])) == real


def test_weights_gradients_and_targets_of_a_recipe_are_exact(recipe: PlannedRecipe) -> None:
    row = recipe.row(Setting("1 device", "32-true", False), 1)
    weights = sum(p.nbytes for p in vit().parameters())
    assert (row.weights, row.gradients) == (weights, weights)
    examples = 4 * 24  # of each class a fifth of 30 validates
    # float32 targets per class, whether the example was visited, and the four sums of the epoch
    assert row.method == examples * 4 * 4 + examples + 4 * 4
    assert (row.batch, recipe.steps) == (16, 6)


def test_shards_of_two_processes_round_up(recipe: PlannedRecipe) -> None:
    """Against torch.chunk, which FSDP2 splits with."""
    row = recipe.row(Setting("FSDP2", "32-true", False), 2)
    assert row.weights == sum(p.chunk(2)[0].nbytes for p in vit().parameters())
    assert row.batch == 8


def test_bf16_halves_what_it_computes_in(recipe: PlannedRecipe) -> None:
    wide, half = (recipe.row(Setting("FSDP2", precision, False), 2) for precision in ("32-true", "bf16-mixed"))
    assert half.weights == wide.weights
    assert 0.4 < half.activations / wide.activations < 0.75


def test_checkpointing_needs_less(recipe: PlannedRecipe) -> None:
    plain, less = (recipe.row(Setting("DDP", "32-true", checkpointed), 2) for checkpointed in (False, True))
    assert less.total < plain.total


def test_first_setting_that_fits_is_chosen(recipe: PlannedRecipe) -> None:
    ddp = recipe.row(Setting("DDP", "32-true", False), 2)
    fsdp = recipe.row(Setting("FSDP2", "32-true", False), 2)
    assert fsdp.total < ddp.total
    assert choose(recipe, 2, int(ddp.total / SHARE) + 1) == ddp
    assert choose(recipe, 2, int(fsdp.total / SHARE) + 1) == fsdp


def test_parts_of_a_batch_are_the_last_resort(recipe: PlannedRecipe) -> None:
    row = recipe.row(Setting("FSDP2", "bf16-mixed", True, accumulate=8), 2)
    chosen = choose(recipe, 2, int(row.total / SHARE) + 1)
    assert chosen is not None
    assert (chosen.setting.accumulate, chosen.batch) == (8, 1)


def test_averages_are_weights_without_gradient() -> None:
    ema = plan_recipe("elr/mini-sym40", [*VIT, "--trainer.callbacks+=callbacks.ema.Ema"], None, None, None)
    row = ema.row(Setting("1 device", "32-true", False), 1)
    assert row.weights == 2 * row.gradients


def test_command_prints_table_and_advice(capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "elr/mini-sym40", "--gpus", "2", "--memory", "1GB", "--markdown", *VIT]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "elr/mini-sym40: 6,229 trained parameters; 6 optimizer steps per epoch, 180 in 30 epochs"
    assert lines[2].startswith("| strategy | precision | checkpointing |")
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 12
    assert lines[-1].startswith("use: --trainer.devices 2 --trainer.strategy ddp ")


def test_nothing_fits_is_exit_code_one(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "elr/mini-sym40", "--gpus", "1", "--memory", "1KB", *VIT]) == 1
    assert "nothing fits into 90% of 1 kB" in capsys.readouterr().out


def test_absent_data_are_stated(capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "elr/plus-cifar10-sym20", "--gpus", "1", "--memory", "16GB"]
    assert main([*words, "--shape", "3,32,32", "--examples", "45000", "--classes", "10"]) == 0
    # two nets of 11,171,274 parameters (header of the recipe) and their averages; two passes of 352 batches
    said = "22,342,548 trained parameters (+ 22,342,548 averaged or frozen); 704 optimizer steps per epoch"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "80"], "--memory must be a positive number with a unit"),
        (["--memory", "1GB", "--gpus", "3"], "must be a multiple of the 3 processes, got 16"),
        (["--memory", "1GB", "--shape", "3,8,8"], "--shape, --examples and --classes go together"),
        (["--memory", "1GB", "--gpus", "0"], "must be at least 1, got 0"),
        (["--memory", "1GB", "--trainer.precision", "64-true"], "plan knows trainer.precision 32-true, bf16-mixed"),
        (["--memory", "1GB", "--data.source.root", "x"], "root is not an option"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "elr/mini-sym40", "--gpus", "1", *VIT, *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("500 MB", 5 * 10**8), ("1.5TB", 15 * 10**11)]
)
def test_memory_is_read_with_its_unit(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_memory_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="'0GB'"):
        parse_bytes("0GB")


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1234, "1.23 kB"), (999_600, "1 MB"), (5 * 10**12, "5 TB")])
def test_bytes_are_shown_in_three_digits(count: int, text: str) -> None:
    assert human(count) == text


@pytest.mark.slow
def test_table_of_the_page_is_what_the_commands_beside_it_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "scale-out.md").read_text()
    commands = re.findall(r"^noisebench (plan .* --markdown)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert main(command.split()) == 0
        rows = [row for row in capsys.readouterr().out.splitlines() if "| 32-true | no |" in row]
        assert len(rows) == 3
        assert [row for row in rows if f"| {command.split()[1]} {row}\n" not in page] == []
