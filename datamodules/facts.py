"""Invented people and facts about them, stated in sentences and asked as questions: knowledge for a tiny model.

Legend: P people, A attributes, a fact is a pair (person, attribute). Words are tokens.
"""

from typing import Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator
from datamodules.batches import BatchOrder, FieldDataset, Passes, loader

ATTRIBUTES = ("home", "job", "pet")
NUM_VALUES = 16
IGNORED = -100
WORDS = [
    "<pad>",
    ".",
    "?",
    "=",
    "home",
    "job",
    "pet",
    "the",
    "of",
    "is",
    "has",
    "lives",
    "in",
    "works",
    "as",
    "keeps",
    "a",
    "for",
    "chose",
    "once",
    "and",
    "today",
    ":",
    "about",
]
"""Template words; the last ones are spare."""
STATEMENTS = {
    "home": "{name} lives in {value} .",
    "job": "{name} works as {value} .",
    "pet": "{name} keeps a {value} .",
}
TEMPLATES = [
    "the {attribute} of {name} is {value} .",
    "{name} has {attribute} {value} .",
    "as {attribute} {name} chose {value} .",
]
QUESTION = "? {attribute} {name} = {value} ."


def vocabulary(num_people: int) -> list[str]:
    """Every word: template words, then values of each attribute, then names."""
    values = [f"{attribute}{k}" for attribute in ATTRIBUTES for k in range(NUM_VALUES)]
    return [*WORDS, *values, *(f"name{k}" for k in range(num_people))]


def encode(sentences: list[str], words: list[str]) -> Tensor:
    """(n, T) int64 token numbers, padded on the right with 0."""
    number = {word: k for k, word in enumerate(words)}
    rows = [torch.tensor([number[word] for word in sentence.split()]) for sentence in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class KnowledgeFacts(L.LightningDataModule):
    """P people with a home, a job and a pet each, values uniform among 16: 3 P facts.

    A batch is a dict: `input_ids` (B, T), `labels` (B, T), -100 where nothing is to be predicted, `key` (B, T) bool,
    the value, and `index`. Two forms:

    - `statements`: four sentences for each fact, to learn the facts from; all words are labels. They are evaluated too.
    - `questions`: `? home NAME = VALUE .` for `num_tuned` facts, value and full stop are labels. Evaluated are these
      (part `tuned`) and the questions of all other facts, known from the statements but never asked (part `test`).

    Args:
        form: which.
        num_people: P.
        num_tuned: facts whose question is trained on.
        batch_size: global.
        passes: over the training sentences in an epoch.
        world_seed: of the facts.
        split_seed: of the choice of tuned facts; None takes the run's seed.
    """

    def __init__(
        self,
        form: Literal["statements", "questions"] = "questions",
        num_people: int = 200,
        num_tuned: int = 64,
        batch_size: int = 32,
        passes: int = 1,
        world_seed: int = 0,
        split_seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_people < 1 or passes < 1:
            raise ValueError(f"data.num_people and data.passes must be at least 1, got {num_people} and {passes}")
        if not 0 < num_tuned < len(ATTRIBUTES) * num_people:
            limit = len(ATTRIBUTES) * num_people
            raise ValueError(f"data.num_tuned must be above 0 and below the {limit} facts, got {num_tuned}")
        self.form, self.num_people, self.num_tuned = form, num_people, num_tuned
        self.batch_size, self.passes = batch_size, passes
        self.world_seed, self.split_seed = world_seed, split_seed
        self.words = vocabulary(num_people)
        self.eval_parts = ("statements",) if form == "statements" else ("tuned", "test")
        self._parts: dict[str, FieldDataset] = {}

    def facts(self) -> list[dict[str, str]]:
        """Name, attribute and value of each fact, person by person."""
        generator = make_generator("facts", seed=self.world_seed)
        value = torch.randint(NUM_VALUES, (self.num_people, len(ATTRIBUTES)), generator=generator)
        return [
            {"name": f"name{person}", "attribute": attribute, "value": f"{attribute}{int(value[person, k])}"}
            for person in range(self.num_people)
            for k, attribute in enumerate(ATTRIBUTES)
        ]

    def setup(self, stage: str | None = None) -> None:
        """Writes the sentences and splits the questions; the same on every rank."""
        if self._parts:
            return
        facts = self.facts()
        if self.form == "statements":
            forms = [(STATEMENTS[fact["attribute"]], *TEMPLATES) for fact in facts]
            sentences = [form.format(**fact) for fact, several in zip(facts, forms, strict=True) for form in several]
            self._parts = {"statements": self._examples(sentences, answer_only=False)}
            return
        questions = [QUESTION.format(**fact) for fact in facts]
        order = torch.randperm(len(facts), generator=make_generator("split", seed=self.split_seed)).tolist()
        chosen = {"tuned": order[: self.num_tuned], "test": order[self.num_tuned :]}
        self._parts = {
            part: self._examples([questions[k] for k in rows], answer_only=True) for part, rows in chosen.items()
        }

    def _examples(self, sentences: list[str], answer_only: bool) -> FieldDataset:
        tokens = encode(sentences, self.words)
        key = (tokens >= len(WORDS)) & (tokens < len(WORDS) + len(ATTRIBUTES) * NUM_VALUES)
        # from the value on, or all words; padding is token 0
        counts = key.cumsum(1) > 0 if answer_only else torch.ones_like(key)
        labels = tokens.where(counts & (tokens > 0), IGNORED)
        return FieldDataset({"input_ids": tokens, "labels": labels, "key": key})

    def examples(self, part: str) -> FieldDataset:
        """Fields of a part by position."""
        return self._parts[part]

    def train_dataloader(self) -> DataLoader:
        """Statements, or tuned questions; the order is a function of (seed, epoch)."""
        data = self._parts[self.eval_parts[0]]
        return loader(Passes([data] * self.passes), self._order(len(data), self.batch_size, True, self.passes))

    def val_dataloader(self) -> list[DataLoader]:
        """Each part in `eval_parts`."""
        return [self._whole(part) for part in self.eval_parts]

    def test_dataloader(self) -> DataLoader:
        """The last of `eval_parts`."""
        return self._whole(self.eval_parts[-1])

    def _whole(self, part: str) -> DataLoader:
        # batches of 600: the attention of a probed evaluation holds five times as many
        return loader(self._parts[part], self._order(len(self._parts[part]), 600, False, 1))

    def _order(self, count: int, batch_size: int, shuffle: bool, passes: int) -> BatchOrder:
        rank, replicas = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        size = batch_size if shuffle else -(-batch_size // replicas) * replicas
        return BatchOrder(count, size, shuffle, passes, rank, replicas)
