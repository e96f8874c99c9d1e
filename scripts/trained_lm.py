"""The language model of a finished run, with the tokenizer of its data. Heavy imports stay inside the functions."""

import importlib
import os
from pathlib import Path
from typing import Any

from scripts import recipes
from scripts.errors import UserError


def run_config(run: Path) -> dict[str, Any]:
    """The resolved settings of a run.

    Raises:
        UserError: no run folder, or the run trained no language model of transformers.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"RUN must be a run's folder with config.yaml, there is no {path}")
    config = recipes.read_yaml(path)
    net = (config.get("model") or {}).get("init_args", {}).get("lm") or {}
    if not str(net.get("class_path", "")).endswith(".PretrainedLM"):
        found = net.get("class_path", "no lm")
        raise UserError(f"RUN must have trained a model of transformers (model.lm PretrainedLM), {run} has {found}")
    return config


def load_trained(run: Path) -> tuple[Any, Any]:
    """(`PretrainedLM` with the weights of the run's last checkpoint, tokenizer).

    Raises:
        UserError: no such run, no checkpoint, or a sharded one.
    """
    from lightning_modules.language.weights import load_start

    config = run_config(run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is in shards; `noisebench consolidate {checkpoint}` and name its file last.ckpt")
    if not checkpoint.is_file():
        raise UserError(f"RUN must have a checkpoint, there is no {checkpoint}")
    lm = _made(config["model"]["init_args"]["lm"])
    try:
        load_start(lm, str(checkpoint), None)
    except ValueError as error:
        raise UserError(str(error)) from error
    return lm.eval(), _tokenizer(config["data"])


def _made(settings: dict[str, Any]) -> Any:
    module, _, name = settings["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**settings.get("init_args", {}))


def _tokenizer(settings: dict[str, Any]) -> Any:
    """That of the data; data of whole words get one of their words."""
    source = settings.get("init_args", {}).get("tokenizer")
    if source is not None:
        from datamodules.prompt_answers import load_tokenizer

        return load_tokenizer(source)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = _made(settings).words
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=words[0], eos_token=".")


def write_lm_eval(run: Path, results: dict[str, Any]) -> dict[str, float]:
    """Keeps lm-eval's results in `lm_eval.json`, and its numbers among the metrics of the run's record.

    Args:
        run: folder.
        results: of `lm_eval.simple_evaluate`.

    Returns:
        `lm_eval/<task>/<metric>` -> value, as they stand in the record.
    """
    import json

    from callbacks.files import write_atomic, write_record

    metrics = {
        f"lm_eval/{task}/{name.removesuffix(',none').replace(',', '_')}": float(value)
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, int | float) and not name.startswith(("sample_", "alias"))
    }
    kept = {name: results.get(name) for name in ("results", "groups", "versions", "n-shot", "n-samples", "configs")}
    write_atomic(run / "lm_eval.json", json.dumps(kept, indent=1, default=str))
    record = run / "record.json"
    if record.is_file():
        facts = json.loads(record.read_text())
        numbers = {name: float("nan") if value is None else value for name, value in facts["metrics"].items()}
        write_record(run, {**facts, "metrics": numbers | metrics})
    return metrics


def offline() -> bool:
    """Whether the hub's own switch forbids its use."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
