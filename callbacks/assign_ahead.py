"""Noise assignment of the next batch in the background, while the current step runs."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class AssignAhead(Callback):
    """Pairs images with noise one batch ahead, in a thread; every number is what it would be without.

    The thread sees a batch as the step will: moved, augmented and encoded, with the generators' states of its turn. The
    batch then carries its `pairs`, and the module's noise generator stands where its own draw would have left it, so
    checkpoints within an epoch hold nothing of the batch that was looked at ahead. Augmentation and encoding are
    computed twice: worth it where assignment is slower than they are (large batches of latents or pictures).

    Works on any module with `coupling`, `encoder` and `noise_generator`, as `lightning_modules.diffusion.module` has,
    whose step takes `batch["pairs"]`.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Puts itself between the data module's training loader and the Trainer.

        Raises:
            ValueError: the module has no coupling, there is no data module, or the coupling talks to other ranks.
        """
        if stage != "fit":
            return
        model: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not all(hasattr(model, name) for name in ("coupling", "encoder")) or data is None:
            raise ValueError(
                f"AssignAhead needs a module with coupling and encoder and a data module, {type(pl_module).__name__} "
                "or the call of fit has none"
            )
        if trainer.world_size > 1 and model.coupling.shared_noise:
            # its collectives would race with those of the backward pass
            raise ValueError("AssignAhead needs model.coupling.scope local on several processes, got global")
        make = data.train_dataloader
        data.train_dataloader = lambda: AheadLoader(make(), lambda: _Preparation(data, model))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the data module its own method back."""
        vars(trainer.datamodule).pop("train_dataloader", None)  # type: ignore[attr-defined]


class _Preparation:
    """Pairs of successive batches from one epoch's turn on, without touching the run's own generators."""

    def __init__(self, data: Any, model: Any) -> None:
        self.model = model
        # a shallow copy draws its augmentation from a generator of its own
        self.data = copy.copy(data)
        if (generator := getattr(data, "augment_generator", None)) is not None:
            self.data.augment_generator = generator.clone_state()
        self.noise_generator = model.noise_generator.clone_state()

    @torch.no_grad()
    def __call__(self, batch: Any) -> tuple[Any, Tensor]:
        """Pairs of a batch as the loader gives it, and the state of the noise generator afterwards."""
        moved = self.data.transfer_batch_to_device(dict(batch), self.model.device, 0)
        image = self.data.on_after_batch_transfer(moved, 0)["image"]
        pairs = self.model.coupling(self.model.encoder(image), self.noise_generator)
        return pairs, self.noise_generator.get_state()

    def hand_out(self, state: Tensor) -> None:
        """The batch's turn has come."""
        self.model.noise_generator.set_state(state)


class AheadLoader:
    """A loader whose batches carry `pairs`; the next batch is prepared in a thread while the Trainer has this one.

    Args:
        loader: of batches that are dicts; its position in a checkpoint counts only what was handed out.
        begin: makes the preparation of an epoch, when its first batch is asked for.
    """

    def __init__(self, loader: Any, begin: Callable[[], Any]) -> None:
        self.loader, self.begin = loader, begin
        self.sampler = loader.sampler
        self._ahead = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # a pool of this epoch: its thread has the number of threads of the main one, for equal sums
        pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        with pool:
            batches = iter(self.loader)
            following: tuple[Any, Future] | None = None
            preparation = None
            self._ahead = 0
            for batch in batches:
                preparation = preparation or self.begin()
                current, following = following, (batch, pool.submit(preparation, batch))
                self._ahead = 1
                if current is not None:
                    yield self._with_pairs(*current, preparation)
            self._ahead = 0
            if following is not None:
                yield self._with_pairs(*following, preparation)

    def state_dict(self) -> dict[str, int]:
        """That of the loader, without the batch that was taken ahead."""
        state = self.loader.state_dict()
        return {**state, "batches": state["batches"] - self._ahead}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Passes it on."""
        self.loader.load_state_dict(state_dict)

    @staticmethod
    def _with_pairs(batch: Any, future: Future, preparation: Any) -> Any:
        pairs, state = future.result()
        preparation.hand_out(state)
        return {**batch, "pairs": pairs}
