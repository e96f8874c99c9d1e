"""Order of batches, fields of a batch, passes, class-balanced epochs."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.batches import BatchOrder, FieldDataset, Passes, loader


def batches(order: BatchOrder, epoch: int = 0) -> list[list[int]]:
    order.set_epoch(epoch)
    return [batch.tolist() for batch in order]


def flat(lists: list[list[int]]) -> list[int]:
    return [item for part in lists for item in part]


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


# order


def test_order_is_a_function_of_seed_and_epoch() -> None:
    used = BatchOrder(50, 8, shuffle=True)
    for epoch in range(3):
        batches(used, epoch)
    assert batches(used, 1) == batches(BatchOrder(50, 8, shuffle=True), 1)


def test_order_does_not_draw_from_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(BatchOrder(50, 8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_differ() -> None:
    order = BatchOrder(50, 8, shuffle=True)
    assert batches(order, 0) != batches(order, 1)


def test_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    first = batches(BatchOrder(50, 8, shuffle=True))
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert batches(BatchOrder(50, 8, shuffle=True)) != first


@pytest.mark.parametrize(("count", "shuffle"), [(54, True), (51, False)], ids=["training", "evaluation"])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_nothing_is_padded_or_lost(count: int, shuffle: bool, replicas: int) -> None:
    seen = [flat(batches(BatchOrder(count, 12, shuffle, rank=rank, num_replicas=replicas))) for rank in range(replicas)]
    assert sorted(flat(seen)) == list(range(count))


def test_two_replicas_share_each_global_batch() -> None:
    alone = batches(BatchOrder(50, 12, shuffle=True))
    first, second = (batches(BatchOrder(50, 12, shuffle=True, rank=rank, num_replicas=2)) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_evaluation_keeps_the_stored_order() -> None:
    assert batches(BatchOrder(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_evaluation_leaves_a_replica_without_a_rest() -> None:
    assert batches(BatchOrder(5, 4, shuffle=False, rank=1, num_replicas=2)) == [[2, 3]]


def test_length_counts_the_smaller_last_batch() -> None:
    order = BatchOrder(50, 12, shuffle=True, num_passes=2)
    assert len(order) == len(batches(order)) == 10


def test_second_pass_counts_on_in_another_order() -> None:
    both = batches(BatchOrder(6, 6, shuffle=True, num_passes=2))
    assert sorted(both[1]) == list(range(6, 12))
    assert [index - 6 for index in both[1]] != both[0]


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size is global .* multiple of the 2 processes, got 7"):
        BatchOrder(50, 7, shuffle=True, num_replicas=2)


@pytest.mark.parametrize(("count", "rest"), [(25, 1), (27, 3)])
def test_last_training_batch_that_does_not_divide_is_refused(count: int, rest: int) -> None:
    """The mean of two means over 2 and 1 examples is not the mean over 3."""
    message = rf"data\.batch_size 8 leaves {rest} of {count} training examples .* do not divide by the 2 processes"
    with pytest.raises(ValueError, match=message):
        BatchOrder(count, 8, shuffle=True, num_replicas=2)


# class-balanced epochs

UNEVEN = torch.tensor([0] * 40 + [1] * 25 + [2] * 4)
"""Three classes; a balanced epoch of 5 batches of 6 draws at most 10 of each."""


def balanced(rank: int = 0, num_replicas: int = 1) -> BatchOrder:
    return BatchOrder(69, 6, True, rank=rank, num_replicas=num_replicas, classes=UNEVEN, num_batches=5)


def test_balanced_epoch_draws_at_most_an_equal_share_of_each_class() -> None:
    drawn = torch.tensor(flat(batches(balanced())))
    assert UNEVEN[drawn].bincount().tolist() == [10, 10, 4]


def test_balanced_epoch_repeats_nothing() -> None:
    drawn = flat(batches(balanced()))
    assert len(set(drawn)) == len(drawn)


def test_balanced_epoch_is_shuffled_over_classes() -> None:
    classes = UNEVEN[torch.tensor(flat(batches(balanced())))].tolist()
    assert classes != sorted(classes)


def test_balanced_epochs_draw_anew() -> None:
    assert set(flat(batches(balanced(), 0))) != set(flat(batches(balanced(), 1)))


def test_balanced_epoch_is_a_function_of_the_epoch() -> None:
    used = balanced()
    batches(used, 0)
    assert batches(used, 4) == batches(balanced(), 4)


def test_balanced_epoch_has_the_stated_length() -> None:
    order = balanced()
    assert len(order) == len(batches(order)) == 4  # 24 examples, since class 2 has but four


def test_two_replicas_share_a_balanced_epoch() -> None:
    first, second = batches(balanced(0, 2)), batches(balanced(1, 2))
    assert [a + b for a, b in zip(first, second, strict=True)] == batches(balanced())


# fields


class OnDemand:
    """Rows that are no tensor, as picture files are."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, rows: Tensor) -> Tensor:
        return rows * 100


def test_indirect_fields_go_through_rows_of() -> None:
    fields = {"image": torch.arange(10) * 10, "label": torch.tensor([7, 8, 9])}
    dataset = FieldDataset(fields, rows_of=torch.tensor([4, 2, 6]), indirect=("image",))
    batch = dataset[torch.tensor([2, 0])]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "image": [60, 40],
        "label": [9, 7],
        "index": [2, 0],
    }


def test_rows_on_demand_are_asked_for_a_whole_batch() -> None:
    assert FieldDataset({"image": OnDemand()})[torch.tensor([3, 1])]["image"].tolist() == [300, 100]


def test_subset_shares_the_images() -> None:
    images = torch.zeros(10, 2)
    dataset = FieldDataset({"image": images}, rows_of=torch.tensor([1, 2]), indirect=("image",))
    assert dataset.fields["image"] is images


def test_extra_travels_along() -> None:
    assert FieldDataset({"label": torch.arange(3)}, extra={"name": "x"})[torch.tensor([0])]["name"] == "x"


def test_fields_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of rows, got \{'image': 4, 'label': 3\}"):
        FieldDataset({"image": torch.zeros(4), "label": torch.zeros(3)})


def test_passes_give_each_batch_its_own_data_set() -> None:
    both = Passes([FieldDataset({"label": torch.arange(3)}), FieldDataset({"label": torch.arange(3) + 10})])
    batch = both[torch.tensor([4, 3])]
    assert (batch["label"].tolist(), batch["index"].tolist(), batch["pass"]) == ([11, 10], [1, 0], 1)


def test_passes_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"passes must have the same length, got \[3, 2\]"):
        Passes([FieldDataset({"label": torch.arange(3)}), FieldDataset({"label": torch.arange(2)})])


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_fetches_whole_batches_in_order(workers: int) -> None:
    order = BatchOrder(10, 4, shuffle=True)
    fetched = loader(FieldDataset({"label": torch.arange(10) * 2}), order, num_workers=workers)
    assert [batch["label"].tolist() for batch in fetched] == [[2 * index for index in b] for b in batches(order)]


# position within an epoch


def training_loader(workers: int = 0) -> Any:
    return loader(FieldDataset({"x": torch.arange(20)}), BatchOrder(20, 4, shuffle=True), num_workers=workers)


def walk(train: Any, epoch: int, stop: int | None = None) -> list[list[int]]:
    train.sampler.set_epoch(epoch)
    return [batch["index"].tolist() for batch in itertools.islice(train, stop)]


@pytest.mark.parametrize("workers", [0, 1])
def test_position_counts_what_was_handed_out(workers: int) -> None:
    first = training_loader(workers)
    taken = walk(first, epoch=1, stop=2)
    assert first.state_dict() == {"epoch": 1, "batches": 2}
    second = training_loader(workers)
    second.load_state_dict(first.state_dict())
    assert taken + walk(second, epoch=1) == walk(training_loader(), epoch=1)


def test_position_holds_once_and_in_its_epoch_only() -> None:
    whole = training_loader()
    resumed = training_loader()
    resumed.load_state_dict({"epoch": 1, "batches": 2})
    assert walk(resumed, epoch=1) == walk(whole, epoch=1)[2:]
    assert walk(resumed, epoch=1) == walk(whole, epoch=1)
    resumed.load_state_dict({"epoch": 1, "batches": 2})
    assert walk(resumed, epoch=2) == walk(whole, epoch=2)


def test_position_goes_on_counting_after_a_resume() -> None:
    resumed = training_loader()
    resumed.load_state_dict({"epoch": 0, "batches": 3})
    walk(resumed, epoch=0, stop=1)
    assert resumed.state_dict() == {"epoch": 0, "batches": 4}
