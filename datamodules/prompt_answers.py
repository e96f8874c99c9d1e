"""Prompts with their answers, as token sequences for a causal language model."""

import re
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import BatchOrder, loader
from datamodules.token_rows import IGNORED, BucketOrder, Row, TokenRows, kept_rows, pack

Format = Literal["chat", "chatml", "alpaca", "plain"]
CHATML = ("<|im_start|>user\n{prompt} <|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA += "### Instruction:\n{prompt}\n\n### Response:\n"
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_rows(source: str, prompt_field: str, answer_field: str, split: str) -> list[tuple[str, str]]:
    """(prompt, answer) of each row of a CSV, JSON or Parquet file, or of a hub data set.

    Raises:
        ValueError: no such file, one without rows or of another format, a missing field, or an empty prompt or answer,
            by row.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = READERS.get(Path(source).suffix)
    if kind is not None and not Path(source).is_file():
        raise ValueError(f"data: no file {source}; give a {', '.join(READERS)} file or the id of a hub data set")
    try:
        # a file is one split, which datasets calls train
        options = {"split": split} if kind is None else {"data_files": source, "split": "train"}
        rows: Any = load_dataset(kind or source, **options)
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"data: {source} has no rows or cannot be read: {error}") from error
    for name in (prompt_field, answer_field):
        if name not in rows.column_names:
            raise ValueError(f"data: {source} has no field {name!r}, it has {', '.join(rows.column_names)}")
    found = list(zip(rows[prompt_field], rows[answer_field], strict=True))
    for number, pair in enumerate(found, start=1):
        for name, text in zip((prompt_field, answer_field), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"data: row {number} of {source} has no text in the field {name!r}, got {text!r}")
    return found


def load_tokenizer(source: str) -> Any:
    """Tokenizer of a hub id, a folder or a `.gguf` file (its chat template comes along)."""
    from transformers import AutoTokenizer

    if source.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(str(Path(source).parent), gguf_file=Path(source).name)
    return AutoTokenizer.from_pretrained(source)


def as_text(prompt: str, answer: str, form: Format, tokenizer: Any) -> tuple[str, str, str]:
    """What stands before the answer, the answer, and what ends it.

    Raises:
        ValueError: `chat` with a tokenizer that has no chat template, or one that changes the answer.
    """
    if form == "chatml":
        return CHATML[0].format(prompt=prompt), answer, CHATML[1]
    if form != "chat":
        before = ALPACA.format(prompt=prompt) if form == "alpaca" else f"{prompt} "
        return before, answer, tokenizer.eos_token or ""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "data.form chat needs a tokenizer with a chat template; this one has none: take chatml or plain"
        )
    asked = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    answered = [*asked, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(before + answer):
        raise ValueError(f"data.form chat: the chat template changes the answer {answer!r}; take chatml or plain")
    return before, answer, whole[len(before + answer) :]


def key_spans(prompt: str, answer: str) -> list[tuple[int, int]]:
    """Characters of the answer's words that the prompt does not contain."""
    known = {word.lower() for word in re.findall(r"\w+", prompt)}
    return [found.span() for found in re.finditer(r"\w+", answer) if found[0].lower() not in known]


def tokenize(
    rows: list[tuple[str, str]], tokenizer: Any, form: Format, loss_on: Literal["response", "all"], max_length: int
) -> list[Row]:
    """Per row `input_ids`, `labels` and `key`, all (T,): spans are found by characters, never by token numbers.

    Raises:
        ValueError: a row is longer than `max_length`.
    """
    found = []
    for number, (prompt, answer) in enumerate(rows, start=1):
        before, answer, end = as_text(prompt, answer, form, tokenizer)
        options = {"return_offsets_mapping": True, "add_special_tokens": form in ("plain", "alpaca")}
        encoded = tokenizer(before + answer + end, **options)
        ids = torch.tensor(encoded["input_ids"])
        if len(ids) > max_length:
            raise ValueError(f"data: row {number} has {len(ids)} tokens, data.max_length is {max_length}")
        starts, ends = torch.tensor(encoded["offset_mapping"]).T
        labels = ids if loss_on == "all" else ids.where(ends > len(before), IGNORED)
        key = torch.zeros(len(ids), dtype=torch.bool)
        for first, last in key_spans(prompt, answer):
            key |= (ends > len(before) + first) & (starts < len(before) + last)
        found.append({"input_ids": ids, "labels": labels, "key": key})
    return found


class PromptAnswers(L.LightningDataModule):
    """Question and answer pairs to tune on, and others to test with.

    A batch is a dict: `input_ids`, `labels`, `attention_mask` (B, T) int64; `key` (B, T) bool, tokens of the answer's
    words that are not in the prompt; `index`. Test rows without such words are left out. Each row keeps its end token
    as a label, also where the padding is the same token. Tokens are made once and kept in the user's cache.

    Args:
        train, test: CSV, JSON or Parquet file, or hub id.
        tokenizer: hub id, folder or `.gguf` file; that of the model.
        form: `chat`, the tokenizer's own template; `chatml`, as the official code v1 writes it; `alpaca` (v2); `plain`.
        loss_on: the response, or all tokens (official code).
        max_length: longest row in tokens; a longer one is an error.
        batch_size: global; rows, packed ones where they are packed.
        batching: of the training rows: `shuffled`; `bucketed`, rows of similar length together, less padding; `packed`,
            several in a row of at most max_length tokens that do not see each other: best for many short documents.
        num_train: takes only the first rows; None takes all.
        prompt_field, answer_field: names of the columns.
        splits: of hub data sets.
    """

    eval_parts = ("test",)

    def __init__(
        self,
        train: str,
        test: str,
        tokenizer: str,
        form: Format = "chat",
        loss_on: Literal["response", "all"] = "response",
        max_length: int = 512,
        batch_size: int = 16,
        batching: Literal["shuffled", "bucketed", "packed"] = "shuffled",
        num_train: int | None = None,
        prompt_field: str = "prompt",
        answer_field: str = "response",
        splits: tuple[str, str] = ("train", "test"),
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "test": test}
        self.tokenizer_source, self.form = tokenizer, form
        self.loss_on, self.max_length = loss_on, max_length
        self.batch_size, self.batching, self.num_train = batch_size, batching, num_train
        self.fields, self.splits = (prompt_field, answer_field), splits
        self._parts: dict[str, TokenRows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises; the same on every rank."""
        if self._parts:
            return
        self.tokenizer = load_tokenizer(self.tokenizer_source)
        self.pairs = {
            part: read_rows(source, *self.fields, split)
            for (part, source), split in zip(self.sources.items(), self.splits, strict=True)
        }
        self.pairs["train"] = self.pairs["train"][: self.num_train]
        rows = {part: self._tokens(pairs) for part, pairs in self.pairs.items()}
        rows["test"] = [row for row in rows["test"] if bool(row["key"].any())]
        if self.batching == "packed":
            rows["train"] = pack(rows["train"], self.max_length)
        self._parts = {part: TokenRows(found, self.tokenizer.pad_token_id or 0) for part, found in rows.items()}

    def _tokens(self, pairs: list[tuple[str, str]]) -> list[Row]:
        options = (self.form, self.loss_on, self.max_length)
        state = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.tokenizer.eos_token)
        # the code of this file is part of what the rows are a function of
        description = [Path(__file__).read_text(), state, options, pairs]
        return kept_rows(description, lambda: tokenize(pairs, self.tokenizer, *options))

    def examples(self, part: str) -> TokenRows:
        """Rows of a part by position."""
        return self._parts[part]

    def asked(self, part: str) -> list[tuple[str, str, Tensor]]:
        """Prompt, answer and the tokens (T,) that stand before the answer, of each row of the file."""
        found = []
        for prompt, answer in self.pairs[part]:
            before, _, _ = as_text(prompt, answer, self.form, self.tokenizer)
            special = self.form in ("plain", "alpaca")
            encoded = self.tokenizer(before.rstrip(" "), add_special_tokens=special)
            found.append((prompt, answer, torch.tensor(encoded["input_ids"])))
        return found

    def train_dataloader(self) -> DataLoader:
        """Rows to tune on; the order is a function of (seed, epoch)."""
        return loader(self._parts["train"], self._order("train", shuffle=True))

    def val_dataloader(self) -> list[DataLoader]:
        """Test rows."""
        return [self.test_dataloader()]

    def test_dataloader(self) -> DataLoader:
        """Test rows."""
        return loader(self._parts["test"], self._order("test", shuffle=False))

    def _order(self, part: str, shuffle: bool) -> BatchOrder:
        place = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if shuffle and self.batching == "bucketed":
            return BucketOrder(self._parts[part].lengths, self.batch_size, *place)
        return BatchOrder(len(self._parts[part]), self.batch_size, shuffle, 1, *place)
