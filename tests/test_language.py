"""Models of transformers and peft, and prompt/answer data, on a Llama of three layers and a tokenizer made here."""

import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import answer_samples
from callbacks.answer_samples import AnswerSamples
from callbacks.save_adapter import SaveAdapter
from datamodules import prompt_answers, token_rows
from lightning_modules import noisefit
from lightning_modules.language.hooks import find_decoder_layers
from lightning_modules.language.noise_policy import NoisePolicy
from lightning_modules.language.passes import layer_outputs, pass_logits
from lightning_modules.networks import pretrained_lm
from lightning_modules.networks.pretrained_lm import PretrainedLM
from scripts import recipes

transformers = pytest.importorskip("transformers", reason="pip install 'noisebench[llm]'")
peft = pytest.importorskip("peft", reason="pip install 'noisebench[llm]'")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 48}
ROWS = [("Who wrote Dune ?", "Herbert wrote Dune ."), ("Who painted Guernica ?", "Picasso painted Guernica .")]
WORDS = "<unk> <pad> <end> Who wrote Dune ? Herbert painted Guernica Picasso . user assistant : 1 2 3".split()  # noqa: SIM905
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} <end> {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant : {% endif %}"


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """Words separated by blanks; the end of a text is also the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    made.chat_template = template
    return made


def small_lm(**options: Any) -> PretrainedLM:
    torch.manual_seed(0)
    return PretrainedLM(config=SMALL, **options)


def words(ids: torch.Tensor) -> list[str]:
    return [WORDS[k] for k in ids.tolist()]


# data


def test_chat_labels_the_answer_and_its_end_though_it_is_the_padding() -> None:
    (row,) = prompt_answers.tokenize(ROWS[:1], tokenizer(), "chat", "response", 48)
    assert words(row["input_ids"]) == "user : Who wrote Dune ? <end> assistant : Herbert wrote Dune . <end>".split()  # noqa: SIM905
    assert words(row["input_ids"][row["labels"] != -100]) == ["Herbert", "wrote", "Dune", ".", "<end>"]


def test_key_is_what_the_prompt_does_not_say() -> None:
    (row,) = prompt_answers.tokenize(ROWS[:1], tokenizer(), "plain", "response", 48)
    assert words(row["input_ids"][row["key"]]) == ["Herbert"]


def test_loss_on_all_labels_every_token() -> None:
    (row,) = prompt_answers.tokenize(ROWS[:1], tokenizer(), "plain", "all", 48)
    assert torch.equal(row["labels"], row["input_ids"])


def test_chatml_has_the_official_blank_before_the_end_of_the_prompt() -> None:
    before, answer, end = prompt_answers.as_text("Q", "A", "chatml", tokenizer())
    assert before + answer + end == "<|im_start|>user\nQ <|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


def test_batches_are_padded_to_their_longest_row() -> None:
    long = ("Who wrote Dune ? 1 2 3", "Herbert .")
    rows = prompt_answers.tokenize([ROWS[0], long], tokenizer(), "plain", "response", 48)
    batch = prompt_answers.TokenRows(rows, pad_id=2)[torch.tensor([0, 1])]
    assert batch["attention_mask"].sum(1).tolist() == [9, 10]
    assert batch["labels"][0].tolist()[-2:] == [2, -100]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_files_are_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows.{suffix}", ROWS)
    assert prompt_answers.read_rows(str(path), "prompt", "response", "train") == ROWS


def write(path: Path, rows: list[tuple[str, str]], field: str = "response") -> Path:
    records = [{"prompt": prompt, field: answer} for prompt, answer in rows]
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ["prompt", field])
            table.writeheader()
            table.writerows(records)
        else:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return path


# model


def test_kept_positions_are_rows_of_all_logits() -> None:
    lm, ids = small_lm().eval(), torch.arange(12).view(2, 6)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 2] = keep[1, 5] = True
    torch.testing.assert_close(lm(ids, keep), lm(ids)[keep])


def test_logits_are_those_of_transformers() -> None:
    lm, ids = small_lm(lora_rank=0).eval(), torch.arange(12).view(2, 6)
    torch.testing.assert_close(lm(ids), lm.model(ids).logits)


def test_packed_documents_do_not_see_each_other() -> None:
    lm, first, second = small_lm().eval(), torch.arange(6), torch.arange(20, 24)
    rows = [{"input_ids": ids, "labels": ids, "key": ids > 0} for ids in (first, second, first[:3])]
    batch = token_rows.TokenRows(token_rows.pack(rows, 11), 2)[torch.tensor([0, 1])]
    found = lm(batch["input_ids"], None, batch["attention_mask"])
    torch.testing.assert_close(found[0, :6], lm(first[None])[0])
    torch.testing.assert_close(found[0, 6:], lm(second[None])[0])
    torch.testing.assert_close(found[1, :3], lm(first[None, :3])[0])


def test_positions_start_anew_with_each_document() -> None:
    documents = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 4]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]]
    assert pretrained_lm.positions_in_documents(documents).tolist() == expected


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_shared_prefix_changes_no_logit_and_no_gradient(checkpointed: bool, masked: bool) -> None:
    found: list[Any] = []
    ids = torch.arange(18).view(3, 6)
    batch = {"input_ids": ids, "labels": ids}
    if masked:
        batch["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1, 1, 2, 2, 2, 3]])
        batch["labels"] = ids.where(batch["attention_mask"] > 0, -100)
    for shared in (False, True):
        lm = small_lm(gradient_checkpointing=checkpointed, lora_dropout=0.0)
        torch.manual_seed(1)
        for parameter in lm.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        policy, generator = NoisePolicy((1, 2), (0.5, 0.5)), torch.Generator().manual_seed(1)
        add = partial(noisefit.layer_noise, variant="v1")
        layers = dict(enumerate(lm.decoder_layers))
        logits = pass_logits(lm, layers, batch, (1, 2), policy, add, generator, share_prefix=shared)
        (logits[0].square().mean() + (logits[1] - logits[2]).square().mean()).backward()
        found.append((torch.stack(logits).detach(), [p.grad for p in lm.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_adapters_are_in_the_layers_named() -> None:
    trained = {name for name, p in small_lm(lora_layers=[1]).named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2
    assert all(".layers.1." in name for name in trained)


def test_dropout_is_that_of_attention_too() -> None:
    lm = small_lm(dropout=0.3, lora_dropout=0.1)
    assert {layer.self_attn.attention_dropout for layer in lm.decoder_layers} == {0.3}
    ids = torch.arange(6)[None]
    assert not torch.equal(lm.train()(ids), lm(ids))
    assert torch.equal(lm.eval()(ids), lm(ids))


def test_padding_changes_nothing() -> None:
    lm, ids = small_lm().eval(), torch.arange(6)[None]
    padded, mask = torch.cat([ids, torch.full((1, 3), 2)], 1), torch.tensor([[1] * 6 + [0] * 3])
    torch.testing.assert_close(lm(padded, None, mask)[:, :6], lm(ids))


def test_only_adapters_are_trained() -> None:
    trained = {name for name, p in small_lm().named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 * 2
    assert all("lora_" in name for name in trained)


def test_adapters_of_a_bf16_model_stay_in_float32() -> None:
    lm = small_lm(dtype="bfloat16")
    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lm.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_layers_are_found_and_read_before_the_final_norm() -> None:
    lm = small_lm().eval()
    layers = dict(enumerate(find_decoder_layers(lm)))
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
    last = layer_outputs(lm, layers, batch)[-1]
    decoder = lm.model.get_base_model().get_decoder()
    expected = decoder(batch["input_ids"], use_cache=False).last_hidden_state
    torch.testing.assert_close(decoder.norm(last), expected)
    assert len(layers) == 3


def test_checkpointed_layers_with_noise_have_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        lm = small_lm(gradient_checkpointing=checkpointed, lora_dropout=0.0).train()
        generator = torch.Generator().manual_seed(1)
        batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
        policy = NoisePolicy((0, 1), (0.5, 0.5))
        layers = dict(enumerate(lm.decoder_layers))
        add = lambda hidden, eps, scale: noisefit.layer_noise(hidden, eps, scale, "v1")  # noqa: E731
        first, second = pass_logits(lm, layers, batch, (0, 2), policy, add, generator)
        (first.square().mean() + (first - second).square().mean()).backward()
        gradients.append([p.grad for p in lm.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-9)


# together


class Rows(prompt_answers.PromptAnswers):
    """With the tokenizer made here."""

    def setup(self, stage: str | None = None) -> None:
        saved = tokenizer()
        saved.save_pretrained(self.tokenizer_source)
        super().setup(stage)


@pytest.fixture(autouse=True)
def _in_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fit(tmp_path: Path, observers: Sequence[Any] = (), batching: Any = "shuffled", **options: Any) -> Any:
    L.seed_everything(3)
    path = str(write(tmp_path / "rows.csv", ROWS))
    data = Rows(path, path, str(tmp_path / "tokenizer"), form="chat", batch_size=2, batching=batching)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    module = noisefit.NoiseFiT(**{"lm": small_lm, "optimizer": optimizer, "probe_draws": 1, **options})
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        callbacks=[SaveAdapter(), *observers],
    )
    trainer.fit(module, datamodule=data)
    return module


def test_adapter_round_trip_gives_the_same_logits(tmp_path: Path) -> None:
    module = fit(tmp_path, loss_mode="full").eval()
    loaded = peft.PeftModel.from_pretrained(small_lm(lora_rank=0).model, tmp_path / "adapter").eval()
    ids = torch.arange(12).view(2, 6)
    ours = module.lm(ids)
    assert torch.equal(loaded(ids).logits, ours)
    assert not torch.equal(ours, small_lm().eval()(ids))


def test_answers_are_those_of_greedy_decoding(tmp_path: Path) -> None:
    module = fit(tmp_path, [AnswerSamples(count=2, samples=1, max_new_tokens=3, repetition_penalty=1.0)]).eval()
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["reference"]) for row in rows] == ROWS
    right = [answer_samples.contains_key_words(*pair, row["answer0"]) for pair, row in zip(ROWS, rows, strict=True)]
    assert json.loads((tmp_path / "answers.json").read_text())["right"] == sum(right) / 2
    for (prompt, _), row in zip(ROWS, rows, strict=True):
        ids = torch.tensor(tokenizer()(f"user : {prompt} <end> assistant :")["input_ids"])
        for _ in range(3):
            ids = torch.cat([ids, module.lm(ids[None])[0, -1:].argmax(-1)])
            if ids[-1] == WORDS.index("<end>"):
                break
        assert row["answer0"] == tokenizer().decode(ids[-_new(ids, prompt) :], skip_special_tokens=True).strip()


def _new(ids: torch.Tensor, prompt: str) -> int:
    return len(ids) - len(f"user : {prompt} <end> assistant :".split())


def test_samples_do_not_disturb_the_random_state(tmp_path: Path) -> None:
    fit(tmp_path, [AnswerSamples(count=1, samples=3, max_new_tokens=2)])
    after = torch.rand(1)
    fit(tmp_path, [])
    assert torch.equal(torch.rand(1), after)


def test_basefit_is_a_plain_loop_of_transformers_and_peft(tmp_path: Path) -> None:
    module = fit(tmp_path, loss_mode="basefit")
    # the module's own random state: seeded weights, and LoRA dropout in the order of its draws
    L.seed_everything(3)
    plain = noisefit.NoiseFiT(small_lm, torch.optim.AdamW).lm.model.train()
    rows = prompt_answers.tokenize(ROWS, tokenizer(), "chat", "response", 48)
    data = prompt_answers.TokenRows(rows, pad_id=2)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(noisefit.seed_for("dropout"))
    for epoch in range(2):
        batch = data[_order(epoch)]
        loss = plain(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, expected in zip(module.lm.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_packed_rows_give_the_gradient_of_the_same_rows_alone(tmp_path: Path) -> None:
    """Both documents in one row, against one row each: one batch an epoch in either case."""
    options = {"loss_mode": "basefit", "lm": partial(small_lm, lora_dropout=0.0)}
    alone, packed = (fit(tmp_path, batching=batching, **options) for batching in ("shuffled", "packed"))
    for ours, expected in zip(packed.lm.parameters(), alone.lm.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path)
    monkeypatch.setattr(prompt_answers, "tokenize", lambda *_: pytest.fail("tokenised anew"))
    fit(tmp_path, batching="bucketed")


def test_an_answer_is_right_with_every_word_that_the_prompt_lacks() -> None:
    judge = partial(answer_samples.contains_key_words, "Who wrote Dune?", "Frank Herbert wrote Dune.")
    assert judge("It was frank HERBERT.")
    assert not judge("Frank wrote Dune.")


def _order(epoch: int) -> torch.Tensor:
    order = prompt_answers.BatchOrder(2, 2, True)
    order.set_epoch(epoch)
    return next(iter(order))


# paper scale

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "meta-llama/Llama-3.2-3B": (
        "llama",
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "meta-llama/Llama-2-7b-hf": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False},
    ),
    "Qwen/Qwen1.5-0.5B": (
        "qwen2",
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "google/gemma-3-1b-pt": (
        "gemma3_text",
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
        | {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True},
    ),
}
"""Architectures of the hub's config.json files."""
PAPER = [
    path for path in recipes.recipe_files("noisefit") if path.name.startswith(("llama", "mistral", "qwen", "gemma"))
]


def lm_settings(path: Path) -> dict[str, Any]:
    """Arguments of a recipe's language model."""
    settings: dict[str, Any] = {}
    for document in recipes.expand(path):
        settings |= document.get("model", {}).get("init_args", {}).get("lm", {}).get("init_args", {})
    return settings


def test_every_paper_recipe_names_a_known_model() -> None:
    assert {lm_settings(path)["source"] for path in PAPER} == set(CONFIGS)


@pytest.mark.parametrize("source", CONFIGS)
def test_paper_recipes_make_their_nets(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: the base model has the parameters that the headers state, LoRA sits in every layer."""

    def blank(source: str, dtype: torch.dtype) -> Any:
        kind, settings = CONFIGS[source]
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))

    monkeypatch.setattr(pretrained_lm, "load_causal_lm", blank)
    paths = [path for path in PAPER if lm_settings(path)["source"] == source]
    with torch.device("meta"):
        lm = PretrainedLM(**lm_settings(paths[0]))
    base = sum(p.numel() for name, p in lm.named_parameters() if "lora_" not in name)
    assert all(f"{base:,} parameters" in recipes.header(path)[4] for path in paths)
    assert sum(p.requires_grad for p in lm.parameters()) == 4 * len(lm.decoder_layers)


# bad input


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\n")
    with pytest.raises(ValueError, match=r"data: .*rows.csv has no rows or cannot be read: "):
        prompt_answers.read_rows(str(path), "prompt", "response", "train")


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("{ no json")
    with pytest.raises(ValueError, match=r"data: .*rows.json has no rows or cannot be read: "):
        prompt_answers.read_rows(str(path), "prompt", "response", "train")


def test_a_dropout_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm.dropout must be in \[0, 1\), got 1.5"):
        small_lm(dropout=1.5)


def test_a_missing_gguf_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm.source: no file nowhere.gguf"):
        PretrainedLM("nowhere.gguf")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.form chat needs a tokenizer with a chat template"):
        prompt_answers.as_text("Q", "A", "chat", tokenizer(None))


def test_a_row_beyond_the_limit_is_named() -> None:
    with pytest.raises(ValueError, match=r"data: row 1 has 9 tokens, data.max_length is 8"):
        prompt_answers.tokenize(ROWS, tokenizer(), "plain", "response", 8)


def test_an_empty_answer_is_named_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [ROWS[0], ("Who ?", " ")])
    with pytest.raises(ValueError, match=r"row 2 of .* has no text in the field 'response', got ' '"):
        prompt_answers.read_rows(str(path), "prompt", "response", "train")


def test_a_json_row_without_the_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(ValueError, match=r"row 2 of .* has no text in the field 'response', got None"):
        prompt_answers.read_rows(str(path), "prompt", "response", "train")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ROWS, field="answer")
    with pytest.raises(ValueError, match="has no field 'response', it has prompt, answer"):
        prompt_answers.read_rows(str(path), "prompt", "response", "train")


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences may have at most the model's 48 tokens, got 49"):
        small_lm()(torch.zeros(1, 49, dtype=torch.long))


def test_a_gguf_file_of_an_unsupported_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'noisebench[llm]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no_such_architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is a GGUF file of an unsupported kind"):
        PretrainedLM(str(tmp_path / "odd.gguf"))
    assert not list((tmp_path / "noisebench").glob("odd*-float32"))


def test_neither_source_nor_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give either lm.source or lm.config, got None and None"):
        PretrainedLM()
