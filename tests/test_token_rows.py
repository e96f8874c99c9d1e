"""Token rows: kept on disk, packed, bucketed. No transformers needed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.token_rows import IGNORED, BucketOrder, Row, TokenRows, kept_rows, pack


def row(*tokens: int) -> Row:
    ids = torch.tensor(tokens)
    return {"input_ids": ids, "labels": ids.clone(), "key": ids % 2 == 0}


ROWS = [row(1, 2, 3), row(4, 5), row(6, 7, 8, 9), row(10)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "noisebench"


def same(first: list[Row], second: list[Row]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def test_kept_rows_are_those_made(cache: Path) -> None:
    assert same(kept_rows(["a"], lambda: ROWS), ROWS)
    assert len(list(cache.glob("tokens-*.pt"))) == 1


def test_rows_are_made_once(cache: Path) -> None:
    kept_rows(["a"], lambda: ROWS)
    assert same(kept_rows(["a"], lambda: pytest.fail("made anew")), ROWS)


def test_another_description_makes_other_rows(cache: Path) -> None:
    kept_rows(["a"], lambda: ROWS)
    assert same(kept_rows(["b"], lambda: ROWS[:1]), ROWS[:1])


def test_a_failure_leaves_nothing_behind(cache: Path) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        kept_rows(["a"], lambda: (_ for _ in ()).throw(ValueError("on purpose")))
    assert not list(cache.glob("tokens-*.pt"))


def test_packed_rows_hold_every_token_in_order() -> None:
    packed = pack(ROWS, 5)
    assert [found["input_ids"].tolist() for found in packed] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert [found["documents"].tolist() for found in packed] == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]]


def test_no_document_predicts_the_next_ones_first_token() -> None:
    assert [found["labels"].tolist() for found in pack(ROWS, 5)] == [
        [IGNORED, 2, 3, IGNORED, 5],
        [IGNORED, 7, 8, 9, IGNORED],
    ]


def test_packing_leaves_the_rows_as_they_are() -> None:
    pack(ROWS, 5)
    assert ROWS[0]["labels"].tolist() == [1, 2, 3]


def test_a_row_that_fits_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match="data: row 3 has 4 tokens, packed rows have 3"):
        pack(ROWS, 3)


def test_mask_numbers_the_documents_and_is_zero_at_padding() -> None:
    batch = TokenRows(pack(ROWS[:3], 5), pad_id=0)[torch.tensor([0, 1])]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]


def test_mask_is_one_where_nothing_is_packed() -> None:
    batch = TokenRows(ROWS, pad_id=0)[torch.tensor([0, 3])]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [10, IGNORED, IGNORED]]


def lengths() -> Tensor:
    return torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))


def test_buckets_hold_each_row_once() -> None:
    found = torch.cat(list(BucketOrder(lengths(), 8)))
    assert torch.equal(found.sort().values, torch.arange(1000))


def test_buckets_have_little_padding() -> None:
    """Tokens with padding over those without: near 1, where shuffled batches of 8 have 1.7 or so."""
    size, shuffled, bucketed = lengths(), torch.arange(1000).split(8), list(BucketOrder(lengths(), 8))
    ratio = lambda batches: sum(len(b) * int(size[b].max()) for b in batches) / int(size.sum())  # noqa: E731
    assert ratio(bucketed) < 1.05
    assert ratio(shuffled) > 1.5


def test_order_of_buckets_is_that_of_the_epoch() -> None:
    first, again, other = (BucketOrder(lengths(), 8) for _ in range(3))
    other.set_epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_ranks_share_the_batches_of_one_process() -> None:
    whole = list(BucketOrder(lengths(), 8))
    halves = [list(BucketOrder(lengths(), 8, rank, 2)) for rank in range(2)]
    assert all(torch.equal(torch.cat(pair), batch) for *pair, batch in zip(*halves, whole, strict=True))


def test_buckets_continue_within_an_epoch() -> None:
    order = BucketOrder(lengths(), 8)
    whole = list(order)
    order.start = 5
    assert all(torch.equal(a, b) for a, b in zip(order, whole[5:], strict=True))
