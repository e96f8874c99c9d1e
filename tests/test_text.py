"""Text as bytes and the language models on it."""

import copy
import math
from pathlib import Path

import lightning as L
import pytest
import torch

from datamodules.text import EMBEDDED_TEXT, ByteText
from lightning_modules.networks.byte_transformer import ByteTransformer
from lightning_modules.networks.nm_sparse import sparsify
from lightning_modules.nm_sparsity import NMSparsity, forward_macs


def small(folder: Path, **options: int) -> ByteText:
    """Ten windows of four bytes: 0, 1, 2, ..."""
    path = folder / "text.txt"
    path.write_bytes(bytes(range(42)))
    return ByteText(str(path), batch_size=2, length=4, **options)  # type: ignore[arg-type]


def test_labels_are_the_next_bytes(tmp_path: Path) -> None:
    data = small(tmp_path)
    data.setup()
    batch = data.as_evaluated(data.examples("train")[torch.tensor([0, 3])])
    assert batch["image"].tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert batch["label"].tolist() == [1, 2, 3, 4, 13, 14, 15, 16]


def test_only_the_last_places_are_told_where_it_says_so(tmp_path: Path) -> None:
    data = small(tmp_path, predict=2)
    data.setup()
    assert data.as_evaluated(data.examples("test")[torch.tensor([0])])["label"].tolist() == [39, 40]


def test_parts_follow_each_other_and_share_no_window(tmp_path: Path) -> None:
    data = small(tmp_path)
    data.setup()
    firsts = [data.examples(part).fields["image"][:, 0].tolist() for part in ("train", "val", "test")]
    assert firsts == [list(range(0, 32, 4)), [32], [36]]


def test_embedded_text_has_its_licence_beside_it() -> None:
    data = ByteText()
    data.setup()
    assert len(data.examples("train")) + 2 * len(data.examples("test")) == (400_000 - 1) // 64
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (EMBEDDED_TEXT.parent / "LICENSE-python").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predict": 5}, "data.predict must be between 1 and data.length 4, got 5"),
        ({"held_out": 0.5}, r"data.held_out must be in \(0, 0.5\), got 0.5"),
        ({"held_out": 0.01}, "data.path: 42 bytes are too few for windows of data.length 4"),
    ],
)
def test_impossible_windows_are_refused(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options).setup()


def test_missing_text_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path: no text file nowhere\.txt"):
        ByteText("nowhere.txt").setup()


def test_no_place_sees_what_follows() -> None:
    net = ByteTransformer(dim=16, num_heads=2, length=8).eval()
    codes = torch.arange(8)[None]
    changed = torch.where(codes < 5, codes, codes + 9)
    before, after = net(codes), net(changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


def test_decoder_of_t5_tells_the_last_places_from_the_first() -> None:
    """The logits at a place depend on all bytes of the encoder and on none that follow."""
    pytest.importorskip("transformers")
    from lightning_modules.networks.byte_t5 import ByteT5

    options = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    net = ByteT5(predict=3, options=options).eval()
    meta = copy.deepcopy(net).to("meta")
    assert list(sparsify(net, ["*.DenseReluDense.w?"], 1, 8)) == [
        f"net.{part}.block.0.layer.{number}.DenseReluDense.{name}"
        for part, number in (("encoder", 1), ("decoder", 2))
        for name in ("wi", "wo")
    ]
    codes = torch.arange(8)[None]
    logits = net(codes)
    assert logits.shape == (3, 256)
    later, encoded = codes.clone(), codes.clone()
    later[0, 7], encoded[0, 0] = 99, 99
    assert torch.equal(net(later)[:2], logits[:2])
    assert not torch.equal(net(encoded)[0], logits[0])
    counted = [f"net.encoder.block.0.layer.1.DenseReluDense.{name}" for name in ("wi", "wo")]
    total, sparse = forward_macs(meta, counted, codes.to("meta"))
    assert sparse == 2 * 5 * 16 * 32
    assert total > 2 * sparse
    with pytest.raises(ValueError, match=r"net.predict 3 leaves none of 3 bytes for the encoder"):
        net(codes[:, :3])


def test_language_model_trains_and_counts_its_multiply_adds(tmp_path: Path) -> None:
    """Share of the sparse layers: 11 D^2 of 11 D^2 + D^2 (proj) + 2 T D (attention) in a block, 256 D of the head."""

    def net() -> ByteTransformer:
        return ByteTransformer(dim=16, depth=1, num_heads=2, length=4)

    data = small(tmp_path)
    layers = ("*.mlp.fc?", "*.attn.qkv")
    model = NMSparsity(net, lambda p: torch.optim.AdamW(p, lr=0.01), method="srste", layers=layers, m=16)
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, use_distributed_sampler=False, **options)
    trainer.fit(model, datamodule=data)
    dim, places = 16, 4
    sparse = 11 * dim**2
    total = sparse + dim**2 + 2 * places * dim + 256 * dim
    assert model.forward_share == pytest.approx(sparse / total)
    meta = torch.zeros(1, places, dtype=torch.long, device="meta")
    assert forward_macs(model._shapes[0], [], meta)[0] == places * total
    # chance
    assert float(trainer.callback_metrics["train/loss"]) < math.log(256)
