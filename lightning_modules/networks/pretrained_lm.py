"""Causal language models of transformers, with LoRA of peft: from a hub id, a folder or a GGUF file."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from lightning_modules.language.hooks import find_decoder_layers


def cache_folder() -> Path:
    """Where converted models are kept: `noisebench` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "noisebench"


def load_causal_lm(source: str, dtype: torch.dtype) -> Any:
    """A model with dense weights, ready to be trained.

    Args:
        source: hub id, folder, or `.gguf` file; the latter is converted to safetensors once, in `cache_folder`.
        dtype: of the weights.

    Raises:
        ValueError: no such file, or a GGUF file that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM

    folder = str(_converted(Path(source), dtype)) if source.endswith(".gguf") else source
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"lm.source {source!r} is no hub id, folder or .gguf file that can be read: {error}"
        ) from error


def _converted(file: Path, dtype: torch.dtype) -> Path:
    """Folder with the safetensors of a GGUF file; made by one process, the others wait."""
    from filelock import FileLock
    from transformers import AutoModelForCausalLM, GgufConfig

    if not file.is_file():
        raise ValueError(f"lm.source: no file {file}; recipes/noisefit/README.md says where to get one")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
    target = cache_folder() / f"{file.stem}-{digest}-{str(dtype).removeprefix('torch.')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        options: dict[str, Any] = {"gguf_file": file.name, "dtype": dtype}
        try:
            # without dequantize the model stays marked as quantised and cannot be saved
            config = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), quantization_config=config, **options)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise ValueError(f"lm.source {file} is a GGUF file of an unsupported kind: {error}") from error
        partial = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            model.save_pretrained(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def positions_in_documents(documents: Tensor) -> Tensor:
    """Position of each token since its document's first one, (B, T) int64 of (B, T) int64 document numbers."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(first, index, 0).cummax(1).values


class PretrainedLM(nn.Module):
    """Tokens (B, T) -> logits, (n, V) at the positions in `keep`; the head is not computed elsewhere.

    Args:
        source: see `load_causal_lm`; None builds a Llama from `config` (tests).
        config: arguments of LlamaConfig.
        lora_rank: 0 trains all weights; else these are frozen and adapters, in float32, are trained.
        lora_alpha, lora_dropout, target_modules: of LoRA.
        lora_layers: decoder layers, counted from 0, that get adapters; None for all.
        dropout: of attention and of every dropout layer of the model itself; None keeps the model's own.
        dtype: of the frozen or trained weights.
        gradient_checkpointing: True recomputes decoder layers in the backward pass, a third slower, less memory.
    """

    def __init__(
        self,
        source: str | None = None,
        config: dict[str, int] | None = None,
        lora_rank: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.05,
        target_modules: tuple[str, ...] = ("q_proj", "v_proj"),
        lora_layers: list[int] | None = None,
        dropout: float | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (source is None) == (config is None):
            raise ValueError(f"give either lm.source or lm.config, got {source!r} and {config!r}")
        torch_dtype = getattr(torch, dtype)
        model = load_causal_lm(source, torch_dtype) if source is not None else _llama(config or {}).to(torch_dtype)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # frozen embeddings give no gradient to the first recomputed layer
            model.enable_input_require_grads()
        if dropout is not None:
            _set_dropout(model, dropout)
        # transformers hands out loaded models in eval mode, in which nothing is recomputed
        self.model: Any = model.train()
        self.has_adapter = lora_rank > 0
        if self.has_adapter:
            from peft import LoraConfig, get_peft_model

            options: dict[str, Any] = {"r": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            options |= {"target_modules": list(target_modules), "layers_to_transform": lora_layers}
            lora = LoraConfig(**options, bias="none", task_type="CAUSAL_LM")
            self.model = get_peft_model(model, lora, autocast_adapter_dtype=True)

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """Layers whose outputs are the residual stream."""
        return find_decoder_layers(self._base.get_decoder())

    @property
    def embedding(self) -> nn.Module:
        """Of the tokens."""
        return self._base.get_input_embeddings()

    def forward(self, input_ids: Tensor, keep: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """`attention_mask` (B, T) int64 is 0 at padding, else the number of the token's document in its row."""
        base = self._base
        longest = getattr(base.config, "max_position_embeddings", None)
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(f"sequences may have at most the model's {longest} tokens, got {input_ids.shape[1]}")
        positions = None
        if attention_mask is not None and bool((attention_mask > 1).any()):
            # transformers separates documents by their positions if there is neither a mask nor a cache
            positions, attention_mask = positions_in_documents(attention_mask), None
        hidden = base.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        logits = base.get_output_embeddings()(hidden if keep is None else hidden[keep])
        cap = getattr(base.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def save(self, folder: Path, write: bool = True) -> None:
        """Writes the adapter as peft reads it, or the whole model as transformers reads it.

        Sharded weights are gathered: then every rank must call this, all but one with `write` False.
        """
        state = None
        if isinstance(self, FSDPModule):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.has_adapter)
            full = get_model_state_dict(self, options=options)
            state = {name.removeprefix("model."): value for name, value in full.items()}
        if write:
            self.model.save_pretrained(folder, state_dict=state)


def _set_dropout(model: nn.Module, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"lm.dropout must be in [0, 1), got {rate}")
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = rate
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate


def _llama(config: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**config))
