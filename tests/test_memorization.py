"""Shares of wrong labels that are predicted right, or memorized."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.memorization import Memorization, memorization_shares


def test_shares_of_a_known_sample() -> None:
    #                       wrong: right, given, other, given | clean: right, wrong | not seen
    predicted = torch.tensor([0, 2, 1, 2, 3, 1, -1])
    label = torch.tensor([1, 2, 2, 2, 3, 3, 0])
    clean = torch.tensor([0, 0, 0, 0, 3, 3, 1])
    shares = {name: float(value) for name, value in memorization_shares(predicted, label, clean).items()}
    assert shares == {
        "wrong/correct": 0.25,
        "wrong/memorized": 0.5,
        "wrong/other": 0.25,
        "clean/correct": 0.5,
        "clean/incorrect": 0.5,
    }


def test_shares_are_nan_without_wrong_labels() -> None:
    label = torch.tensor([0, 1])
    assert torch.isnan(memorization_shares(label, label, label)["wrong/memorized"])


class Recorder:
    """The parts of Trainer and LightningModule that the callback touches."""

    def __init__(self) -> None:
        labels = {"label": torch.tensor([1, 0, 2]), "clean_label": torch.tensor([0, 0, 2])}
        self.trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(train_labels=lambda: labels), world_size=1)
        self.logged: dict[str, float] = {}
        self.module: Any = SimpleNamespace(device="cpu", log_dict=self._log)

    def _log(self, values: dict[str, torch.Tensor], rank_zero_only: bool) -> None:
        self.logged = {name: float(value) for name, value in values.items()}


def test_callback_counts_the_first_pass_only() -> None:
    recorder, callback = Recorder(), Memorization()
    callback.on_train_epoch_start(recorder.trainer, recorder.module)
    logits = torch.eye(3)
    for number, classes in ((0, [1, 0, 2]), (1, [0, 1, 1])):
        batch = {"index": torch.tensor([0, 1, 2]), "pass": number}
        outputs = {"loss": torch.tensor(0.0), "logits": logits[torch.tensor(classes)]}
        callback.on_train_batch_end(recorder.trainer, recorder.module, outputs, batch, 0)
    callback.on_train_epoch_end(recorder.trainer, recorder.module)
    assert recorder.logged["wrong/memorized"] == 1.0
    assert recorder.logged["clean/correct"] == 1.0


def test_module_without_logits_is_named() -> None:
    recorder, callback = Recorder(), Memorization()
    callback.on_train_epoch_start(recorder.trainer, recorder.module)
    with pytest.raises(ValueError, match="needs training_step of SimpleNamespace to return `logits`"):
        callback.on_train_batch_end(recorder.trainer, recorder.module, torch.tensor(0.0), {"index": torch.arange(3)}, 0)


def test_datamodule_without_labels_is_named() -> None:
    recorder = Recorder()
    recorder.trainer.datamodule = None
    with pytest.raises(ValueError, match=r"datamodule with train_labels\(\), got NoneType"):
        Memorization().on_train_epoch_start(recorder.trainer, recorder.module)
