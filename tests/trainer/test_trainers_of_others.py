"""TRL's and sentence-transformers' own trainers, with one callback or the mixin: they train, v0 is there, the first log is the stock run's."""

import os
import random
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trainers import Recorder, assert_equal_weights, assert_recurrence, read_logs

from hf_v0init import V0InitArguments, V0InitCallback, V0InitMixin, read_second_moment
from hf_v0init.hook import find_hook
from hf_v0init.records.model_card import compose_v0_section, list_tags
from hf_v0init.records.report import read_report
from hf_v0init.second_moment.state import unwrap_optimizer

WORDS = "the a cat dog owl sees eats small old mouse fish runs".split()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, "[PAD]", "[EOS]", "[UNK]"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


def make_llama(tokenizer, cls=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=13, eos_token_id=13, pad_token_id=12, **more,
    )  # fmt: skip
    return cls(config)


def say(seed: int, num: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num))


PAIRS = [{"prompt": say(i, 4), "chosen": " " + say(-i - 1, 4), "rejected": " " + say(i + 999, 4)} for i in range(24)]


KINDS = {"sft": "data_driven", "dpo": "random", "kto": "first_gradient", "reward": "data_driven", "orpo": "data_driven",
         "cpo": "data_driven", "grpo": "data_driven", "rloo": "data_driven"}  # the strategy that each is tried with  # fmt: skip


def list_kinds() -> dict:
    """name -> (trainer class, configuration class, rows, further arguments of the trainer, of the configuration)."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    labelled = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(PAIRS)]
    reward = {
        "reward_funcs": lambda prompts, completions, **_: [float(c.count("cat")) + 0.01 * len(c) for c in completions]
    }
    sampled = {"num_generations": 4, "max_completion_length": 5}
    prompts = [{"prompt": p["prompt"]} for p in PAIRS]
    kto = (trl.KTOTrainer, trl.KTOConfig) if hasattr(trl, "KTOTrainer") else None
    if kto is None:
        from trl.experimental.kto import KTOConfig, KTOTrainer

        kto = (KTOTrainer, KTOConfig)
    return {
        "sft": (trl.SFTTrainer, trl.SFTConfig, [{"text": p["prompt"]} for p in PAIRS], {}, {}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}, {}),
        "kto": (*kto, labelled, {}, {}),
        "reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS, {}, {}),
        "orpo": (ORPOTrainer, ORPOConfig, PAIRS, {}, {}),
        "cpo": (CPOTrainer, CPOConfig, PAIRS, {}, {}),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig, prompts, reward, sampled),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig, prompts, reward, sampled),
    }


def read_own_logs(trainer) -> list[dict]:
    """The logs of the steps, without what is of the clock."""
    logs = [entry for entry in read_logs(trainer) if "loss" in entry]
    return [{k: v for k, v in entry.items() if "time" not in k and "tokens_per" not in k} for entry in logs]


def make_trainer(kind: str, tokenizer, folder, by_mixin: bool = False, callbacks=(), **v0):
    """A trainer for three steps; with `by_mixin` of a class of ours, with these v0 settings."""
    import datasets

    trainer_class, config_class, rows, further, of_config = list_kinds()[kind]
    if by_mixin:
        trainer_class = type("Ours", (V0InitMixin, trainer_class), {})
        config_class = dataclass(type("OurConfig", (V0InitArguments, config_class), {}))
        globals()["OurConfig"] = config_class  # where pickle looks for it
    model = make_llama(tokenizer)
    if kind == "reward":
        model = make_llama(tokenizer, LlamaForSequenceClassification, num_labels=1)
    model.save_pretrained(folder / "model")  # some make a reference model from where this one came from
    model = type(model).from_pretrained(folder / "model")
    options = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    return trainer_class(
        model=model,
        args=config_class(**options | of_config | v0),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **further,
    )


def run(kind: str, tokenizer, folder, settings: dict | None = None):
    """Train three steps, with v0 from one callback or (None) without; (logs, trainer, callback)."""
    trainer = make_trainer(kind, tokenizer, folder)
    callback = None if settings is None else V0InitCallback(**settings).attach(trainer)
    trainer.train()
    return read_own_logs(trainer), trainer, callback


@pytest.mark.parametrize("kind", KINDS)
def test_trl_trains_and_its_first_log_is_the_stock_one(kind, tokenizer, tmp_path):
    stock, _, _ = run(kind, tokenizer, tmp_path / "a")
    settings = {"v0_init": KINDS[kind], "v0_decay": "beta2"}
    settings |= {"v0_estimation_steps": 2} if KINDS[kind] == "data_driven" else {}
    ours, trainer, callback = run(kind, tokenizer, tmp_path / "b", settings)
    assert ours[0] == stock[0]
    assert len(ours) == 3 and callback.report["v0_max"] > 0
    with_v0 = [name for name, p in trainer.model.named_parameters() if p.dim() >= 2]
    missing = set(callback.report["without_gradient"])
    assert {*callback.report["parameters"], *missing} == set(with_v0) and len(with_v0) >= 8
    steps = find_hook(trainer.optimizer)
    assert steps is not None and steps.is_attached == bool(missing)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trl_measures_its_length_in_the_first_step(kind, tokenizer, tmp_path):
    """With nothing read or generated for it: the second batch, or the completions of it, are those of the run of that length."""
    ours, _, callback = run(kind, tokenizer, tmp_path / "a", {"v0_init": "data_driven", "v0_decay_steps": "auto"})
    steps = callback.length["steps"]
    assert callback.length["num_forwards"] >= 3
    # TRL's GRPO divides the policy by itself where it samples anew at each step: its loss has a gradient, and one value for all weights.
    assert (callback.length["reason"] is None) == (kind != "grpo")
    expected, _, _ = run(kind, tokenizer, tmp_path / "b", {"v0_init": "data_driven", "v0_decay_steps": steps})
    assert ours == expected


def test_trls_trainer_and_configuration_with_the_mixin(tokenizer, tmp_path):
    """With its own data preparation, loss and metrics; the card and the record are written."""
    recorder = Recorder()
    recorder.trainer = trainer = make_trainer(
        "sft", tokenizer, tmp_path / "a", True, [recorder], v0_init="data_driven", v0_scale=3.0, v0_estimation_steps=2
    )
    trainer.train()
    assert len(recorder.v0) == 9 and all(trainer.model.get_parameter(name).dim() >= 2 for name in recorder.v0)
    for name, v0 in recorder.v0.items():  # at step 1; the second refines it
        torch.testing.assert_close(v0, 3.0 * recorder.gradients[0][name].square(), rtol=1e-6, atol=0)
    assert_recurrence(recorder, trainer.args.adam_beta2)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny", tags=["mine"])
    card, report = (tmp_path / "a" / "README.md").read_text(), trainer.get_v0_report()
    assert all(card.count(f"- {tag}\n") == 1 for tag in [*list_tags(report), "mine", "sft"])
    assert card.count(compose_v0_section(report)) == 1 and read_report(tmp_path / "a") == report

    stock = run("sft", tokenizer, tmp_path / "b")[1]
    zeros = make_trainer("sft", tokenizer, tmp_path / "c", True, v0_init="zeros")
    zeros.train()
    assert_equal_weights(stock, zeros)
    assert zeros.get_v0_report() is None and read_own_logs(stock)[0] == read_own_logs(trainer)[0]


# ---- sentence-transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, **size)).save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def make_sentence_run(kind: str, model):
    """(training data, loss) of a kind of training."""
    import datasets
    from sentence_transformers import losses

    pairs = datasets.Dataset.from_list([{"anchor": say(i, 5), "positive": say(i + 500, 5)} for i in range(40)])
    scored = datasets.Dataset.from_list(
        [{"sentence1": say(i, 4), "sentence2": say(i + 99, 6), "score": i % 7 / 7} for i in range(40)]
    )
    classes = datasets.Dataset.from_list(
        [{"sentence1": say(i, 4), "sentence2": say(i + 99, 6), "label": i % 3} for i in range(40)]
    )

    class Two(torch.nn.Module):
        """A loss that returns a dict of components, which the trainer logs."""

        def __init__(self):
            super().__init__()
            self.inner = losses.CosineSimilarityLoss(model)

        def forward(self, features, labels):
            loss = self.inner(features, labels)
            return {"base": loss, "extra": loss * 0.1}

    if kind == "dict_of_data":
        ranking, similarity = losses.MultipleNegativesRankingLoss(model), losses.CosineSimilarityLoss(model)
        return {"pairs": pairs, "scored": scored}, {"pairs": ranking, "scored": similarity}
    return {
        "ranking": (pairs, losses.MultipleNegativesRankingLoss(model)),
        "cached_ranking": (pairs, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)),
        "components": (scored, Two()),
        "softmax": (classes, losses.SoftmaxLoss(model, model.get_sentence_embedding_dimension(), num_labels=3)),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("ranking", "data_driven"), ("cached_ranking", "first_gradient"), ("cached_ranking", "data_driven"),
     ("dict_of_data", "data_driven"), ("components", "random"), ("softmax", "data_driven")],
)  # fmt: skip
def test_sentence_transformers_train_with_default_arguments(kind, strategy, bert_folder, tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.models import Pooling, Transformer

    logs = []
    for settings in (None, {"v0_init": strategy, "v0_decay": "beta2"}):
        torch.manual_seed(0)
        inner = Transformer(str(bert_folder))
        model = st.SentenceTransformer(modules=[inner, Pooling(16)], device="cpu")
        data, loss = make_sentence_run(kind, model)
        arguments = st.SentenceTransformerTrainingArguments(
            str(tmp_path / str(settings is None)), max_steps=3, logging_steps=1, per_device_train_batch_size=4, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
        if settings is not None:
            callback = V0InitCallback(**settings).attach(trainer)
        trainer.train()
        entry = next(e for e in trainer.state.log_history if "loss" in e)
        logs.append({k: entry[k] for k in ("loss", "base", "extra", "grad_norm") if k in entry})
    assert logs[0] == logs[1]
    stored = [p for group in unwrap_optimizer(trainer.optimizer).param_groups for p in group["params"]]
    moments = [read_second_moment(trainer.optimizer, p) for p in stored if p.dim() >= 2]
    with_gradient = [moment for moment in moments if moment is not None and moment.any()]
    assert len(callback.report["parameters"]) == len(with_gradient) > 10
    if kind == "softmax":  # its classifier is no part of the model
        assert any(name.startswith("group ") for name in callback.report["parameters"])
