"""Sequences for recurrent nets, fresh trials in each iteration: a two-alternative decision, pictures read row by row.

Legend: T steps, B trials, I inputs, N iterations of a block, which is what a net gets as one batch.
"""

from abc import abstractmethod
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from callbacks.rng import make_generator
from datamodules.sources import ImageSource

IGNORED = -100
"""Target of a step that has none, as in `torch.nn.functional.cross_entropy`."""
COHERENCES = (0.0, 6.4, 12.8, 25.6, 51.2)


def two_alternatives(count: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""Trials of the two-alternative decision: seven stimulus steps, one decision step.

    Inputs are (fixation, s_1, s_2): fixation 1 and s_k = 0.5 + c / 200, the other one 0.5 - c / 200, plus noise on
    both; in the decision step all are 0. k is uniform, the coherence c uniform in `COHERENCES`: for c = 0 the choice is
    a coin flip, so no net gets above 0.9 of the decisions.

    Args:
        count: trials B.
        noise: standard deviation on s_1 and s_2 in a stimulus step.
        generator: of these draws.

    Returns:
        (8, B, 3) float32, and (8, B) int64: 0 for fixating, k in {1, 2} in the decision step.

    Source: arXiv 2310.08513, task 2AF of neurogym, at steps of 100 ms.
    """
    choice = torch.randint(2, (count,), generator=generator)
    coherence = torch.tensor(COHERENCES)[torch.randint(len(COHERENCES), (count,), generator=generator)]
    inputs = torch.zeros(8, count, 3)
    inputs[:7, :, 0] = 1
    shift = coherence / 200 * (1 - 2 * choice)
    means = torch.stack([0.5 + shift, 0.5 - shift], 1)
    inputs[:7, :, 1:] = means + noise * torch.randn(7, count, 2, generator=generator)
    targets = torch.zeros(8, count, dtype=torch.int64)
    targets[7] = 1 + choice
    return inputs, targets


class _Numbers(Sampler[int]):
    """Numbers of an epoch's blocks: `epoch * blocks` and on, so that its draws are a function of (seed, epoch)."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.blocks

    def __iter__(self) -> Iterator[int]:
        yield from range(self.epoch * self.blocks, (self.epoch + 1) * self.blocks)


class Sequences(L.LightningDataModule):
    """A batch is a block of N iterations: {`input` (N, T, B, I) float32, `target` (N, T, B) int64}.

    Draws are a function of (seed, epoch), the same on all ranks; a target of -100 has no loss.

    Args:
        batch_size: trials B of an iteration.
        iterations: N.
        blocks: blocks of an epoch.
        stored_trials: trials that stay the same, on which a net is looked at before and after training.
        data_seed: seed of all trials; None takes the run's seed.
    """

    num_inputs: int
    num_outputs: int

    def __init__(
        self, batch_size: int, iterations: int, blocks: int, stored_trials: int, data_seed: int | None
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "iterations": iterations, "blocks": blocks, "stored_trials": stored_trials}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.iterations = iterations
        self.blocks = blocks
        self.stored_trials = stored_trials
        self.data_seed = data_seed

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` trials: inputs (T, count, I) and targets (T, count)."""

    def stored(self) -> tuple[Tensor, Tensor]:
        """The stored trials, always the same."""
        return self.draw(self.stored_trials, make_generator("trials/stored", seed=self.data_seed))

    def block(self, number: int) -> dict[str, Tensor]:
        """The trials of block `number`, counted over all epochs."""
        generator = make_generator(f"trials/{number}", seed=self.data_seed)
        inputs, targets = self.draw(self.iterations * self.batch_size, generator)
        shape = (self.iterations, self.batch_size)
        return {
            "input": inputs.unflatten(1, shape).transpose(0, 1).contiguous(),
            "target": targets.unflatten(1, shape).transpose(0, 1).contiguous(),
        }

    def train_dataloader(self) -> DataLoader:
        """The blocks of an epoch."""
        order = _Numbers(self.blocks)
        return DataLoader(_Blocks(self), sampler=order, batch_size=None, generator=make_generator("loader"))


class _Blocks(Dataset):
    """Blocks by number."""

    def __init__(self, data: Sequences) -> None:
        self.data = data

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.data.block(number)


class TwoAlternatives(Sequences):
    """The two-alternative decision, see `two_alternatives`.

    Args:
        noise: standard deviation of the stimulus.
        batch_size, iterations, blocks, stored_trials, data_seed: as in `Sequences`.
    """

    num_inputs, num_outputs = 3, 3

    def __init__(
        self,
        noise: float = 0.1,
        batch_size: int = 32,
        iterations: int = 20,
        blocks: int = 10,
        stored_trials: int = 320,
        data_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, iterations, blocks, stored_trials, data_seed)
        if noise < 0:
            raise ValueError(f"data.noise must not be negative, got {noise}")
        self.noise = noise

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As in `Sequences`."""
        return two_alternatives(count, self.noise, generator)


class PictureRows(Sequences):
    """Pictures read row by row; the class is asked for in the last step. Trials are drawn with replacement.

    Args:
        source: where the pictures are.
        batch_size, iterations, blocks, stored_trials, data_seed: as in `Sequences`.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int = 200,
        iterations: int = 20,
        blocks: int = 10,
        stored_trials: int = 320,
        data_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, iterations, blocks, stored_trials, data_seed)
        self.source = source

    def prepare_data(self) -> None:
        """Downloads, on one process."""
        self.source.load()

    def setup(self, stage: str | None = None) -> None:
        """Sizes of input and output."""
        sets = self.source.load()
        images = sets.train_images
        if not isinstance(images, Tensor) or images.shape[1] != 1:
            raise ValueError("data.source must hold grey pictures in memory")
        self._images, self._labels = images[:, 0], sets.train_labels
        self.num_inputs, self.num_outputs = images.shape[3], sets.num_classes

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As in `Sequences`."""
        chosen = torch.randint(len(self._labels), (count,), generator=generator)
        inputs = (self._images[chosen].float() / 255).transpose(0, 1).contiguous()
        targets = torch.full(inputs.shape[:2], IGNORED)
        targets[-1] = self._labels[chosen]
        return inputs, targets
