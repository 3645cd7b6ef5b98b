"""Trains, evaluates and uses an encoder-decoder model for translation, with a v0 for Adam if asked."""

import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
from sacrebleu.metrics import CHRF
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_v0init import InputError, V0InitSeq2SeqTrainer, V0InitSeq2SeqTrainingArguments

from ..data import ROLES, TextDataArguments, limit_rows
from ..models import TextModelArguments, override_config
from ..run import RunArguments, TextTask, run
from ..script_support import flag, run_script
from ..script_trainer import ScriptTrainerMixin
from ..token_budget import TokenBudgetMixin
from ..token_loss import ExactEvaluationMixin
from ..tokenizer_training import train_bpe_tokenizer
from .embedded_corpus import NUM_SMALL, load_embedded_corpus
from .generation import GenerationArguments, choose_generation, choose_languages, get_language
from .metrics import TranslationMetrics, make_bleu, write_predictions
from .pairs import SIDES, PairCollator, leave_out_empty_pairs, load_pair_files, select_pairs, tokenize_pairs
from .post_norm import apply_xavier_initialization, build_post_norm_config

logger = logging.getLogger("hf_v0init")

POST_NORM, EMBEDDED = "post_norm", "embedded"
PLACEHOLDER_VOCABULARY = 16  # until the tokenizer is known
EXAMPLES = """
# the paper's model on two parallel files, with its random v0
{} --train_source_file a.de --train_target_file a.en --do_train --v0_init random --output_dir out
# flags from a file, a smaller model, BLEU and chrF on validation data after every epoch
{} FILE.yaml --config_overrides d_model=256 --eval_strategy epoch --predict_with_generate
# go on with a pretrained model
{} FILE.yaml --model_name_or_path facebook/nllb-200-distilled-600M \\
  --source_lang deu_Latn --target_lang eng_Latn
# translate a file for which there are no references
{} --model_name_or_path out --test_source_file new.de --do_predict --num_beams 5 --output_dir new
# two processes
torchrun --nproc_per_node 2 -m hf_v0init.tasks.translation.script FILE.yaml --output_dir out
"""


@dataclass
class ModelArguments(TextModelArguments):
    """model: which model, which tokenizer"""

    auto_class: ClassVar[type] = AutoModelForSeq2SeqLM
    kind: ClassVar[str] = "encoder-decoder"
    needs_source: ClassVar[bool] = False

    config_name: str | None = flag(
        None,
        f"From scratch: '{POST_NORM}' (the paper's Transformer, the default), or a Hub name, folder or JSON file.",
    )
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example d_model=256,encoder_layers=3."
    )
    weight_initialization: str | None = flag(
        None,
        "From scratch: 'fairseq_xavier' or 'model_default'. Default: fairseq_xavier for Marian (post-norm) models.",
        choices=["fairseq_xavier", "model_default"],
    )

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration; from scratch and without a name, the paper's."""
        if self.model_name_or_path or self.model_type or self.config_name not in (None, POST_NORM):
            return super().load_config()
        config = build_post_norm_config(PLACEHOLDER_VOCABULARY, pad_token_id=0, eos_token_id=1)
        if self.config_overrides:
            override_config(config, self.config_overrides)
        return config


@dataclass
class DataArguments(TextDataArguments):
    """data: what it is trained and measured on"""

    local_flags: ClassVar[tuple[str, ...]] = tuple(
        f"{role}_{kind}" for kind in ("file", "source_file", "target_file") for role in ROLES
    )

    dataset_name: str | None = flag(
        None,
        f"Data set by Hub name (such as bentrevett/multi30k) or folder; or '{EMBEDDED}': {NUM_SMALL:,} German-English pairs that "
        "come with the package.",
    )
    train_file: str | None = flag(
        None, "Local training data: .json, .jsonl, .csv, .parquet, or text with source<TAB>target lines; also .gz."
    )
    train_source_file: str | None = flag(None, "Source sentences, one a line, plain or gzipped UTF-8.")
    train_target_file: str | None = flag(None, "Their translations, line by line.")
    validation_source_file: str | None = flag(None, "The same for validation.")
    validation_target_file: str | None = flag(None, "The same for validation.")
    test_source_file: str | None = flag(None, "The same for test.")
    test_target_file: str | None = flag(None, "The same for test.")
    source_lang: str | None = flag(
        None, "Source language code: key of a 'translation' column; multilingual tokenizers."
    )
    target_lang: str | None = flag(None, "Target language code, likewise.")
    source_column: str | None = flag(None, "Column with source sentences. Default: found by itself.")
    target_column: str | None = flag(None, "Column with target sentences. Default: found by itself.")
    source_prefix: str = flag("", "Text put before every source sentence, for example T5's task prefix.")
    max_source_length: int = flag(256, "Longest source in tokens; longer ones are truncated. Default: 256.")
    max_target_length: int = flag(256, "Longest target in tokens, likewise. Default: 256.")
    val_max_target_length: int | None = flag(
        None,
        "Longest generated sentence in tokens, and longest evaluation target for eval_loss (BLEU and chrF take the whole "
        "references). Default: --max_target_length.",
    )

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        self.val_max_target_length = self.val_max_target_length or self.max_target_length

    def load_dataset(self, hub):
        """Load the data set of the Hub, or the corpus that comes with the package."""
        return load_embedded_corpus() if self.dataset_name == EMBEDDED else super().load_dataset(hub)

    def load_local(self, role: str, hub):
        """Load a role's table or its two parallel files; of the test set, perhaps the sources alone."""
        files = [getattr(self, f"{role}_{kind}") for kind in ("file", "source_file", "target_file")]
        return load_pair_files(role, *files, cache_dir=hub.cache_dir)

    def select(self, rows: datasets.Dataset, role: str) -> datasets.Dataset:
        """Select the sentence pairs, as many as are asked for; of the training data those without an empty side."""
        pairs = select_pairs(
            limit_rows(rows, self.get_limit(role)),
            role=role,
            source_column=self.source_column,
            target_column=self.target_column,
            source_lang=self.source_lang,
            target_lang=self.target_lang,
        )
        return leave_out_empty_pairs(pairs) if role == "train" else pairs


class TranslationTrainer(ScriptTrainerMixin, TokenBudgetMixin, ExactEvaluationMixin, V0InitSeq2SeqTrainer):
    """With token-budget batches, and an exact `eval_loss`: nats per target token, without label smoothing."""


class TranslationTask(TextTask):
    """Translation: pairs of sentences, beam search, BLEU and chrF."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitSeq2SeqTrainingArguments, GenerationArguments)
    trainer_class = TranslationTrainer
    examples = EXAMPLES
    card_task = "translation"

    def __init__(self, *parsed) -> None:
        super().__init__(*parsed)
        (self.generation,) = self.others
        self.orders: dict[str, np.ndarray] = {}  # of the samples of each role that is measured
        if self.training.predict_with_generate:
            self.metrics = ("loss", "bleu", "chrf", "gen_len")

    def refuse(self) -> None:
        """Refuse what the flags alone rule out."""
        if self.training.batch_eval_metrics:
            raise InputError("--batch_eval_metrics: BLEU and chrF are of the whole set; leave it out")
        options = self.generation
        language = get_language(self.data.target_lang)
        self.bleu = make_bleu(options.sacrebleu_tokenize, options.sacrebleu_lowercase, language)
        self.chrf = CHRF(lowercase=options.sacrebleu_lowercase)

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration, and refuse lengths beyond its positions."""
        config = self.model.load_config()
        limit = getattr(config, "max_position_embeddings", None)
        for name in ("max_source_length", "max_target_length", "val_max_target_length"):
            value = getattr(self.data, name)
            if limit is not None and value > limit:
                raise InputError(
                    f"--{name}={value}: the model has {limit} positions; lower it, or max_position_embeddings=..."
                )
        return config

    def iterate_texts(self, rows: datasets.Dataset) -> Iterator[str]:
        """Yield the training sentences of both languages, for a joint vocabulary."""
        return (text for part in rows.iter(1000) for side in SIDES for text in part[side])

    def train_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """Train a joint BPE."""
        return train_bpe_tokenizer(texts, self.model.vocab_size, for_translation=True)

    def build_network(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Load the pretrained model, or make one from scratch that fits the tokenizer; set languages and generation."""
        model, tokenizer = self.model, self.tokenizer
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no padding or end token; give --tokenizer_name of another")
        if model.model_name_or_path is None:
            if hasattr(config, "decoder_vocab_size"):
                config.decoder_vocab_size = len(tokenizer)
            if getattr(config, "forced_eos_token_id", None) is not None:
                config.forced_eos_token_id = tokenizer.eos_token_id
            config.decoder_start_token_id = tokenizer.pad_token_id
        elif config.model_type == "t5" and not self.data.source_prefix:
            logger.warning(
                "T5 was pretrained with a task prefix; give --source_prefix, such as 'translate English to German: '"
            )
        network = model.build_for(config, tokenizer)
        rule = model.weight_initialization or ("fairseq_xavier" if config.model_type == "marian" else "model_default")
        if model.model_name_or_path is None and rule == "fairseq_xavier":
            apply_xavier_initialization(network)
        choose_languages(self.data.source_lang, self.data.target_lang, tokenizer, network)
        choose_generation(self.generation, self.data.val_max_target_length, self.training, network)
        return network

    def make_samples(self, rows, role: str) -> datasets.Dataset:
        """Tokenize the pairs of a role; say how many are cut off. What is measured goes from the longest source to the shortest:
        its batches hold samples of like length, and a generation ends when its few longest end.
        """
        data = self.data
        max_target_length = data.max_target_length if role == "train" else data.val_max_target_length
        tokenized = tokenize_pairs(
            rows,
            self.tokenizer,
            max_source_length=data.max_source_length,
            max_target_length=max_target_length,
            source_prefix=data.source_prefix,
            num_proc=data.preprocessing_num_workers,
        )
        for name, limit in (("input_ids", data.max_source_length), ("labels", max_target_length)):
            if name in tokenized.column_names:
                lengths = [len(ids) for part in tokenized.select_columns([name]).iter(1000) for ids in part[name]]
                full = sum(length >= limit for length in lengths)
                if full:
                    logger.info(
                        f"{role}: {full} of {len(rows)} {name} fill the {limit} tokens allowed; the rest is cut off"
                    )
                if name == "input_ids":
                    self.orders[role] = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
        return tokenized if role == "train" else tokenized.select(self.orders[role])

    def make_collator(self) -> PairCollator:
        """Make what pads pairs to a batch."""
        multiple = 8 if self.training.fp16 or self.training.bf16 else None
        return PairCollator(self.tokenizer, model=self.network, pad_to_multiple_of=multiple)

    def choose_trainer_options(self, samples: dict) -> dict:
        """Choose tokenizer, token budget and metrics."""
        measures = "validation" in samples and self.training.predict_with_generate
        self.validation_metrics = self.make_metrics("validation") if measures else None
        return super().choose_trainer_options(samples) | {"compute_metrics": self.validation_metrics}

    def make_metrics(self, role: str, num_best: int = 1) -> TranslationMetrics:
        """Make what measures the translations of a role's pairs."""
        rows = self.rows[role]
        references = rows["target"] if "target" in rows.column_names else []
        return TranslationMetrics(self.tokenizer, references, self.orders[role], self.bleu, self.chrf, num_best)

    def evaluate(self, trainer: TranslationTrainer) -> dict:
        """Evaluate, with the signatures of BLEU and chrF."""
        results = {**trainer.evaluate(metric_key_prefix="eval"), "eval_samples": len(trainer.eval_dataset)}
        if self.validation_metrics is not None:
            results |= {f"eval_{name}": text for name, text in self.validation_metrics.signatures.items()}
        return results

    def predict(self, trainer: TranslationTrainer, samples) -> None:
        """Translate the test set, measure the translations if there are references, and write them down."""
        num_best = self.generation.num_return_sequences or 1
        metrics = self.make_metrics("test", num_best)
        trainer.args.predict_with_generate = True
        trainer.compute_metrics = metrics if metrics.references else None
        prediction = trainer.predict(samples, metric_key_prefix="predict", num_return_sequences=num_best)
        signatures = {f"predict_{name}": text for name, text in metrics.signatures.items()}
        trainer.save_metrics("predict", {**prediction.metrics, "predict_samples": len(samples), **signatures})
        texts = metrics.decode(prediction.predictions)
        if trainer.is_world_process_zero():
            write_predictions(Path(trainer.args.output_dir), self.rows["test"]["source"], texts)

    def describe_for_card(self) -> dict:
        """Describe the run, with the languages."""
        card, data = super().describe_for_card(), self.data
        if data.dataset_name == EMBEDDED:  # the Hub has no such data set to link to
            card.pop("dataset_tags")
        languages = [lang.split("_")[0] for lang in (data.source_lang, data.target_lang) if lang]
        return card | ({"language": languages} if languages else {})


ARGUMENTS = TranslationTask.arguments
main = functools.partial(run, TranslationTask)


if __name__ == "__main__":
    run_script(main)
