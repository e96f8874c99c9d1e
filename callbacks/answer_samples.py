"""What a tuned language model answers, as a table, and how often that is right."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.files import write_atomic
from callbacks.rng import make_generator


def contains_key_words(prompt: str, reference: str, answer: str) -> bool:
    """Whether an answer has every word of the reference that the prompt does not have, whatever their case."""
    known, wanted, found = ({word.lower() for word in re.findall(r"\w+", text)} for text in (prompt, reference, answer))
    return wanted - known <= found


class AnswerSamples(Callback):
    """Writes `answers.csv` into the run's folder when training has finished.

    A row is a prompt: reference, answers, `agreement` (share of the answers that are the most frequent one) and `right`
    (share of the answers that contain the reference's key words: those that the prompt does not have). The means of the
    last two are in `answers.json`. Words are a strict judge: another spelling is wrong, a denial with the right name is
    right. The official judge is a language model.

    Works on modules with `lm.model.generate` of transformers and data with `asked(part)` and `tokenizer`, as
    `PromptAnswers`. Draws have a seed of their own; training does not notice.

    Args:
        count: prompts, the first ones of the test part.
        samples: answers per prompt; 1 decodes greedily.
        max_new_tokens: length of an answer.
        temperature, top_p, top_k, repetition_penalty: of the official script.
    """

    def __init__(
        self,
        count: int = 16,
        samples: int = 5,
        max_new_tokens: int = 50,
        temperature: float = 0.5,
        top_p: float = 0.9,
        top_k: int = 40,
        repetition_penalty: float = 1.2,
    ) -> None:
        if count < 1 or samples < 1 or max_new_tokens < 1:
            raise ValueError(
                f"count, samples and max_new_tokens must be positive, got {count}, {samples}, {max_new_tokens}"
            )
        self.count, self.samples = count, samples
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
        if samples > 1:
            self.options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        else:
            self.options |= {"do_sample": False}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generates and writes, on the first rank; a model in shards cannot generate on one rank and is left out."""
        if not trainer.is_global_zero or hasattr(pl_module.lm, "reshard"):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["prompt", "reference", *(f"answer{k}" for k in range(self.samples)), "agreement", "right"])
        scores: list[tuple[float, float]] = []
        for prompt, reference, ids in data.asked("test")[: self.count]:
            found = self.answers(pl_module, data.tokenizer, ids)
            agreement = max(found.count(answer) for answer in found) / len(found)
            right = sum(contains_key_words(prompt, reference, answer) for answer in found) / len(found)
            scores.append((agreement, right))
            writer.writerow([prompt, reference, *found, f"{agreement:.2f}", f"{right:.2f}"])
        folder = Path(trainer.default_root_dir)
        write_atomic(folder / "answers.csv", table.getvalue())
        agreement, right = (sum(column) / len(scores) for column in zip(*scores, strict=True))
        summary = {"prompts": len(scores), "samples": self.samples, "agreement": agreement, "right": right}
        write_atomic(folder / "answers.json", json.dumps(summary, indent=1))

    def answers(self, pl_module: L.LightningModule, tokenizer: Any, ids: torch.Tensor) -> list[str]:
        """Texts after a prompt's tokens (T,)."""
        model: Any = pl_module.lm.model  # type: ignore[union-attr]
        training = model.training
        model.eval()
        batch = ids.to(pl_module.device).expand(self.samples, -1)
        # transformers draws from the global state only
        with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
            torch.manual_seed(make_generator("answers").initial_seed())
            with torch.no_grad():
                found = model.generate(
                    input_ids=batch,
                    attention_mask=torch.ones_like(batch),
                    pad_token_id=tokenizer.pad_token_id or 0,
                    eos_token_id=tokenizer.eos_token_id,
                    **self.options,
                )
        model.train(training)
        return [tokenizer.decode(row[len(ids) :], skip_special_tokens=True).strip() for row in found]
