"""Trains, evaluates and uses an encoder-decoder model for translation, with a v0 for Adam if asked.

    python scripts/run_translation.py FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 scripts/run_translation.py FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    set_seed,
)
from transformers.utils import logging

from hf_v0init import SafeCheckpointsMixin, V0InitSeq2SeqTrainer, V0InitSeq2SeqTrainingArguments

from ...errors import InputError
from ...extras import require_extra
from ..checkpoint_averaging import require_enough_checkpoints
from ..probing import ProbeArguments, probe_and_print, turn_into_probe
from ..script_stages import (
    DatasetArguments,
    HubArguments,
    count_steps,
    describe_for_card,
    find_needed_roles,
    flag,
    load_config,
    override_config,
    publish_card,
    require_positive_counts,
    require_possible_run,
    require_sole_model_source,
    train_and_save,
)
from ..script_support import explain_hub_errors, parse_arguments, run_script, start_logging
from ..token_budget import TokenBudgetMixin, build_token_budget_sampler
from ..token_loss import ExactEvaluationMixin, TokenCrossEntropy
from ..tokenizer_training import train_bpe_tokenizer, train_on_main_process
from .metrics import SacreBleu
from .pairs import ROLES, load_pair_files, select_pairs, tokenize_pairs
from .post_norm import apply_xavier_initialization, build_post_norm_config
from .sorted_evaluation import LengthSortedEvaluationMixin

logger = logging.get_logger("run_translation")

POST_NORM = "post_norm"
EMBEDDED, NUM_EMBEDDED_PAIRS = "embedded", 2000  # pairs: 1,800 for training, 100 each for validation and test
MULTILINGUAL_TOKENIZERS = ("MBart", "M2M100", "Nllb", "SeamlessM4T")


@dataclass
class ModelArguments(HubArguments):
    model_name_or_path: str | None = flag(
        None, "Pretrained model, by Hub name or folder. Without it a model is trained from scratch."
    )
    config_name: str | None = flag(
        None,
        f"From scratch: '{POST_NORM}' (the paper's Transformer, the default), or a Hub name, folder or JSON file.",
    )
    model_type: str | None = flag(None, "From scratch: a transformers model type with its default configuration.")
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example d_model=256,encoder_layers=3."
    )
    weight_initialization: str | None = flag(
        None,
        "From scratch: 'fairseq_xavier' or 'model_default'. Default: fairseq_xavier for Marian (post-norm) models.",
        choices=["fairseq_xavier", "model_default"],
    )
    tokenizer_name: str | None = flag(None, "Tokenizer, by Hub name or folder. Default: the model's.")
    vocab_size: int = flag(
        10000, "From scratch without a tokenizer: entries of the joint BPE trained on the training set. Default: 10000."
    )

    def __post_init__(self):
        require_sole_model_source(self)
        if self.model_name_or_path and (self.config_overrides or self.weight_initialization):
            raise InputError(
                "--config_overrides and --weight_initialization are for training from scratch; "
                f"drop them, or --model_name_or_path={self.model_name_or_path}"
            )


@dataclass
class DataArguments(DatasetArguments):
    dataset_name: str | None = flag(
        None,
        f"Data set by Hub name or folder; or '{EMBEDDED}': {NUM_EMBEDDED_PAIRS:,} German-English pairs that the package "
        "generates, the same ones each time.",
    )
    train_file: str | None = flag(
        None, "Local training data: .json, .jsonl, .csv, or text with source<TAB>target lines; also .gz."
    )
    validation_file: str | None = flag(None, "The same for validation.")
    test_file: str | None = flag(None, "The same for test.")
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
    forced_bos_token: str | None = flag(
        None, "First token of every generated sentence. Default: the target language for multilingual tokenizers."
    )
    max_source_length: int = flag(256, "Longest source in tokens; longer ones are truncated. Default: 256.")
    max_target_length: int = flag(256, "Longest target in tokens, likewise. Default: 256.")
    val_max_target_length: int | None = flag(
        None, "Longest generated sentence and evaluation target in tokens. Default: --max_target_length."
    )
    max_train_samples: int | None = flag(None, "Use only the first so many training samples.")
    max_eval_samples: int | None = flag(None, "Use only the first so many validation samples.")
    max_predict_samples: int | None = flag(None, "Use only the first so many test samples.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize. Default: none beside this one.")
    overwrite_cache: bool = flag(False, "Tokenize again although a cached result exists.")
    pad_to_max_length: bool = flag(False, "Pad everything to the maximum lengths, not to the longest of the batch.")
    ignore_pad_token_for_loss: bool = flag(True, "Leave padding out of the loss. Default: True.")
    max_tokens_per_batch: int | None = flag(
        None,
        "Training batches by token budget: max(padded source, padded target) tokens a batch, process and forward "
        "pass; replaces --per_device_train_batch_size.",
    )
    num_beams: int | None = flag(None, "Beams of the search when generating. Default: the model's (1 from scratch).")
    length_penalty: float | None = flag(None, "Exponent of the length by which beam scores are divided.")
    average_checkpoints: int | None = flag(
        None, "After training, average the last so many checkpoints; evaluate and save the average."
    )
    overwrite_output_dir: bool = flag(False, "Start afresh in an output folder that has checkpoints or files.")

    def __post_init__(self):
        require_positive_counts(self)
        self.val_max_target_length = self.val_max_target_length or self.max_target_length
        if self.length_penalty is not None and not math.isfinite(self.length_penalty):
            raise InputError(f"--length_penalty={self.length_penalty}: must be a finite number")
        files = [name for name in vars(self) if name.endswith("_file") and getattr(self, name)]
        if self.dataset_name and files:
            raise InputError(f"--dataset_name and --{files[0]}: give one source of data, not both")
        if not self.dataset_name and not files:
            raise InputError(
                "no data: give --dataset_name, --train_file, or --train_source_file and --train_target_file"
            )
        if self.dataset_name == EMBEDDED:
            require_extra("demo")

    def load_dataset(self, hub: HubArguments, streaming: bool = False):
        """Load the data set of the Hub, or generate the corpus that needs no network."""
        if self.dataset_name != EMBEDDED:
            return super().load_dataset(hub, streaming)
        from .embedded_corpus import generate_embedded_corpus  # needs the extra `demo`

        return generate_embedded_corpus(NUM_EMBEDDED_PAIRS, seed=0)


class TranslationTrainer(
    TokenBudgetMixin, LengthSortedEvaluationMixin, ExactEvaluationMixin, SafeCheckpointsMixin, V0InitSeq2SeqTrainer
):
    """With token-budget batches, evaluation in batches of like length, and an exact `eval_loss` (nats a target token, without
    label smoothing)."""


def load_pairs(data: DataArguments, model: ModelArguments, training) -> dict[str, datasets.Dataset]:
    """Returns the sentence pairs of each role that the run needs."""
    limits = dict(zip(ROLES, (data.max_train_samples, data.max_eval_samples, data.max_predict_samples), strict=True))
    hub = data.load_dataset(model) if data.dataset_name else {}
    pairs = {}
    for role in find_needed_roles(training):
        raw = hub.get(role) or load_pair_files(
            role,
            getattr(data, f"{role}_file"),
            getattr(data, f"{role}_source_file"),
            getattr(data, f"{role}_target_file"),
        )
        if raw is None:
            raise InputError(
                f"there is no {role} data; give --{role}_file, or --{role}_source_file and --{role}_target_file, "
                "or a --dataset_name that has this split"
            )
        if limits[role] is not None:
            raw = raw.select(range(min(limits[role], len(raw))))
        pairs[role] = select_pairs(
            raw,
            role=role,
            source_column=data.source_column,
            target_column=data.target_column,
            source_lang=data.source_lang,
            target_lang=data.target_lang,
        )
    return pairs


def load_tokenizer(model: ModelArguments, pairs, checkpoint: str | None):
    """The tokenizer named, or that of the checkpoint resumed, or a joint BPE trained on the training pairs."""
    name = model.tokenizer_name or model.model_name_or_path
    if name is None and checkpoint is not None and (Path(checkpoint) / "tokenizer.json").is_file():
        name = checkpoint
    if name is None:
        if "train" not in pairs:
            raise InputError("no model and no tokenizer given, and no training to make them; give --model_name_or_path")
        train = pairs["train"]
        texts = (text for rows in train.iter(1000) for column in ("source", "target") for text in rows[column])
        return train_on_main_process(lambda: train_bpe_tokenizer(texts, model.vocab_size, for_translation=True))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **model.get_hub_options())
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {name!r} cannot be loaded ({error}); check the name") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name!r} has no padding or end token; choose another")
    return tokenizer


def load_model(model: ModelArguments, tokenizer):
    """The pretrained model named, or one from scratch that fits the tokenizer."""
    try:
        if model.model_name_or_path:
            network = AutoModelForSeq2SeqLM.from_pretrained(model.model_name_or_path, **model.get_hub_options())
            if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
                network.resize_token_embeddings(len(tokenizer))
            return network
        config = build_config(model, tokenizer)
        network = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the model cannot be made: {error}") from error
    rule = model.weight_initialization or ("fairseq_xavier" if config.model_type == "marian" else "model_default")
    if rule == "fairseq_xavier":
        apply_xavier_initialization(network)
    logger.info(f"From scratch: {type(network).__name__}, {network.num_parameters():,} parameters, weights: {rule}")
    return network


def build_config(model: ModelArguments, tokenizer):
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if model.model_type is None and model.config_name in (None, POST_NORM):
        config = build_post_norm_config(len(tokenizer), **special)
    else:
        config = load_config(model.model_type, model.config_name, None, model)
    if not config.is_encoder_decoder:
        raise InputError(f"a {config.model_type} model is no encoder-decoder; choose one such as marian, bart or t5")
    if model.config_overrides:
        override_config(config, model.config_overrides)
    for name, value in {**special, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}.items():
        setattr(config, name, value)
    if hasattr(config, "decoder_vocab_size"):
        config.decoder_vocab_size = len(tokenizer)
    if getattr(config, "forced_eos_token_id", None) is not None:
        config.forced_eos_token_id = tokenizer.eos_token_id
    config.decoder_start_token_id = tokenizer.pad_token_id
    config.name_or_path = ""  # it is a new model
    return config


def choose_languages(data: DataArguments, tokenizer, network) -> None:
    """Tells multilingual tokenizers from what language into what, and the model what a translation begins with."""
    kind = type(tokenizer).__name__
    first_token = data.forced_bos_token
    if kind.startswith(MULTILINGUAL_TOKENIZERS):
        for name in ("source_lang", "target_lang"):
            if getattr(data, name) is None:
                raise InputError(f"--{name} is missing: {kind} is multilingual; give a language code such as de_DE")
            find_language_id(tokenizer, name, getattr(data, name))
        tokenizer.src_lang, tokenizer.tgt_lang = data.source_lang, data.target_lang
        target_id = find_language_id(tokenizer, "target_lang", data.target_lang)
        if kind.startswith("MBartTokenizer"):  # unlike MBart50, it starts the decoder with the language
            network.config.decoder_start_token_id = target_id
            network.generation_config.decoder_start_token_id = target_id
        if first_token is None:
            network.generation_config.forced_bos_token_id = target_id
    if first_token is not None:
        first_token_id = tokenizer.convert_tokens_to_ids(first_token)
        if first_token_id in (None, tokenizer.unk_token_id):
            raise InputError(f"--forced_bos_token={first_token}: is no token of the tokenizer; give one that is")
        network.generation_config.forced_bos_token_id = first_token_id


def find_language_id(tokenizer, flag_name: str, language: str) -> int:
    try:
        has_own_way = hasattr(tokenizer, "get_lang_id")  # M2M100 writes __de__ for de
        token_id = (tokenizer.get_lang_id if has_own_way else tokenizer.convert_tokens_to_ids)(language)
    except KeyError:
        token_id = None
    if token_id in (None, tokenizer.unk_token_id):
        raise InputError(f"--{flag_name}={language}: {type(tokenizer).__name__} does not know it; check its codes")
    return token_id


def require_lengths_fit(data: DataArguments, network) -> None:
    limit = getattr(network.config, "max_position_embeddings", None)
    for name in ("max_source_length", "max_target_length", "val_max_target_length"):
        value = getattr(data, name)
        if limit is not None and value > limit:
            raise InputError(
                f"--{name}={value}: the model has {limit} positions; lower it, or max_position_embeddings=..."
            )


def build_metrics(tokenizer):
    """A Trainer's `compute_metrics`, and the dictionary in which it leaves sacrebleu's signatures."""
    metric, signatures = SacreBleu(keep_in_memory=True), {}

    def decode(token_ids) -> list[str]:
        token_ids = np.where(token_ids < 0, tokenizer.pad_token_id, token_ids)
        return [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    def compute_metrics(evaluation) -> dict[str, float]:
        predictions, labels = evaluation
        result = metric.compute(predictions=decode(predictions), references=decode(labels))
        signatures.update(bleu_signature=result.pop("bleu_signature"), chrf_signature=result.pop("chrf_signature"))
        lengths = np.isin(predictions, (-100, tokenizer.pad_token_id), invert=True).sum(axis=1)
        return {**result, "gen_len": float(lengths.mean())}

    return compute_metrics, decode, signatures


def tokenize_roles(pairs, tokenizer, data: DataArguments, training, cache_dir) -> dict[str, datasets.Dataset]:
    tokenized = {}
    for role, role_pairs in pairs.items():
        with training.main_process_first(desc=f"tokenizing {role}"):
            tokenized[role] = tokenize_pairs(
                role_pairs,
                tokenizer,
                max_source_length=data.max_source_length,
                max_target_length=data.max_target_length if role == "train" else data.val_max_target_length,
                source_prefix=data.source_prefix,
                pad_to_max_length=data.pad_to_max_length,
                label_pad_token_id=-100 if data.ignore_pad_token_for_loss else tokenizer.pad_token_id,
                num_workers=data.preprocessing_num_workers,
                overwrite_cache=data.overwrite_cache and training.local_process_index == 0,
                cache_dir=cache_dir,
            )
    return tokenized


def choose_generation(data: DataArguments, training, network) -> None:
    """Puts beams, length penalty and longest output into the model's generation settings, saved with it."""
    generation = network.generation_config
    generation.max_length = data.val_max_target_length + 1  # counts the start token
    beams = data.num_beams or training.generation_num_beams or generation.num_beams or 1
    generation.num_beams = training.generation_num_beams = beams
    if data.length_penalty is not None:
        if beams == 1 and data.length_penalty != 1.0:
            raise InputError(f"--length_penalty={data.length_penalty}: has no effect without --num_beams of 2 or more")
        generation.length_penalty = data.length_penalty


ARGUMENTS = (ModelArguments, DataArguments, ProbeArguments, V0InitSeq2SeqTrainingArguments)


def main(argv: list[str]) -> None:
    model_args, data_args, probe_args, training_args = parse_arguments(ARGUMENTS, argv)
    if probe_args.probe_only:
        turn_into_probe(training_args)
    start_logging(training_args)
    checkpoint = require_possible_run(training_args, model_args.model_name_or_path, data_args.overwrite_output_dir)
    set_seed(training_args.seed)

    pairs = load_pairs(data_args, model_args, training_args)
    tokenizer = load_tokenizer(model_args, pairs, checkpoint)
    network = load_model(model_args, tokenizer)
    if network.config.model_type == "t5" and model_args.model_name_or_path and not data_args.source_prefix:
        logger.warning(
            "T5 was pretrained with a task prefix; give --source_prefix, such as 'translate English to German: '"
        )
    choose_languages(data_args, tokenizer, network)
    choose_generation(data_args, training_args, network)
    require_lengths_fit(data_args, network)
    tokenized = tokenize_roles(pairs, tokenizer, data_args, training_args, model_args.cache_dir)

    collator = DataCollatorForSeq2Seq(
        tokenizer,
        model=network,
        label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
        pad_to_multiple_of=8 if training_args.fp16 or training_args.bf16 else None,
    )
    if training_args.do_train:
        require_trainable(data_args, training_args, tokenized["train"], collator)
    compute_metrics, decode, signatures = build_metrics(tokenizer)
    with explain_hub_errors(training_args):
        trainer = TranslationTrainer(
            model=network,
            args=training_args,
            train_dataset=tokenized.get("train"),
            eval_dataset=tokenized.get("validation"),
            processing_class=tokenizer,
            data_collator=collator,
            compute_metrics=compute_metrics if training_args.predict_with_generate else None,
            compute_loss_func=TokenCrossEntropy(training_args.label_smoothing_factor),
            max_tokens_per_batch=data_args.max_tokens_per_batch,
        )
    if probe_args.probe_only:
        probe_and_print(trainer, probe_args)
        return
    if training_args.do_train:
        overwrite, average = data_args.overwrite_output_dir, data_args.average_checkpoints
        save_results(trainer, "train", train_and_save(trainer, checkpoint, overwrite, average), {})
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="eval")
        save_results(trainer, "eval", {**metrics, "eval_samples": len(tokenized["validation"])}, signatures)
    if training_args.do_predict:
        training_args.predict_with_generate, trainer.compute_metrics = True, compute_metrics
        prediction = trainer.predict(tokenized["test"], metric_key_prefix="predict")
        metrics = {**prediction.metrics, "predict_samples": len(tokenized["test"])}
        save_results(trainer, "predict", metrics, signatures)
        write_predictions(trainer, decode(prediction.predictions))
    files = [file for file in (data_args.train_file, data_args.train_source_file, data_args.train_target_file) if file]
    card = describe_for_card("translation", model_args.model_name_or_path, data_args, files)
    if data_args.dataset_name == EMBEDDED:  # the Hub has no such data set to link to
        card.pop("dataset_tags")
    languages = [lang.split("_")[0] for lang in (data_args.source_lang, data_args.target_lang) if lang]
    publish_card(trainer, card | ({"language": languages} if languages else {}))


def require_trainable(data: DataArguments, training, train_dataset, collator) -> None:
    """Refuses what would only show during or after training."""
    if data.average_checkpoints is not None:
        num_samples = len(train_dataset) if data.max_tokens_per_batch is None else None
        num_steps = count_steps(training, num_samples)
        require_enough_checkpoints(training, data.average_checkpoints, num_steps)
    if data.max_tokens_per_batch is not None:
        build_token_budget_sampler(train_dataset, training, collator, data.max_tokens_per_batch)


def save_results(trainer, role: str, metrics: dict, signatures: dict) -> None:
    """Prints one stage's metrics, and writes them to its JSON file and to all_results.json."""
    trainer.log_metrics(role, metrics)
    if f"{role}_bleu" in metrics:
        metrics = {**metrics, **{f"{role}_{name}": text for name, text in signatures.items()}}
        if trainer.is_world_process_zero():
            print(f"{role}: BLEU {metrics[f'{role}_bleu']:.2f} [{signatures['bleu_signature']}]")
            print(f"{role}: chrF {metrics[f'{role}_chrf']:.2f} [{signatures['chrf_signature']}]")
    trainer.save_metrics(role, metrics)


def write_predictions(trainer, texts: list[str]) -> None:
    """Writes one generated sentence a line, in the order of the test set."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir, "generated_predictions.txt")
        path.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
