"""Trains, evaluates and uses an encoder-decoder model for translation, with a v0 for Adam if asked.

    python scripts/run_translation.py FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 scripts/run_translation.py FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    set_seed,
)

from hf_v0init import V0InitSeq2SeqTrainer, V0InitSeq2SeqTrainingArguments

from ...errors import InputError
from ...extras import require_extra
from ..checkpoint_averaging import require_enough_checkpoints
from ..early_stopping import EarlyStoppingArguments, make_early_stopping
from ..learning_rate_bounds import LearningRateBoundsArguments, LearningRateBoundsMixin
from ..probing import ProbeArguments, probe_and_print, turn_into_probe
from ..run_identity import describe_run, require_same_model
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
    require_buildable,
    require_positive_counts,
    require_possible_run,
    require_sole_model_source,
    train_and_save,
)
from ..script_support import explain_hub_errors, parse_arguments, run_script, start_logging
from ..script_trainer import ScriptTrainerMixin
from ..token_budget import TokenBudgetMixin, build_token_budget_sampler
from ..token_loss import ExactEvaluationMixin, TokenCrossEntropy
from ..tokenizer_training import train_bpe_tokenizer, train_on_main_process
from ..value_checks import require_available_metric
from .generation import GenerationArguments, GenerationMixin, choose_generation, require_effect
from .metrics import TranslationMetrics, make_bleu
from .pairs import (
    ROLES,
    PairCollator,
    leave_out_empty_pairs,
    leave_out_unlike_lengths,
    load_pair_files,
    select_pairs,
    tokenize_pairs,
)
from .post_norm import apply_xavier_initialization, build_post_norm_config
from .sorted_evaluation import LengthSortedEvaluationMixin

logger = logging.getLogger("hf_v0init")

POST_NORM = "post_norm"
EMBEDDED, NUM_EMBEDDED_PAIRS = "embedded", 2000  # pairs: 1,800 for training, 100 each for validation and test
MULTILINGUAL_TOKENIZERS = ("MBart", "M2M100", "Nllb", "SeamlessM4T")
MAX_TOKENIZER_PAIRS = 1_000_000  # of a stream: a vocabulary does not get better from more
PLACEHOLDER_VOCABULARY = 16  # until the tokenizer is known
TRANSLATION_METRICS = ("bleu", "chrf", "gen_len")
EXAMPLES = """
# the paper's model on two parallel files, with its random v0
run_translation.py --train_source_file a.de --train_target_file a.en --do_train --v0_init random --output_dir out
# flags from a file, a smaller model, BLEU and chrF on validation data after every epoch
run_translation.py FILE.yaml --config_overrides d_model=256 --eval_strategy epoch --predict_with_generate
# go on with a pretrained model
run_translation.py FILE.yaml --model_name_or_path facebook/nllb-200-distilled-600M \\
  --source_lang deu_Latn --target_lang eng_Latn
# translate a file for which there are no references
run_translation.py --model_name_or_path out --test_source_file new.de --do_predict --num_beams 5 --output_dir new
# two processes
torchrun --nproc_per_node 2 run_translation.py FILE.yaml --output_dir out
"""


@dataclass
class ModelArguments(HubArguments):
    """The encoder-decoder model."""

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
    dtype: str | None = flag(
        None,
        "Type of the weights; 'auto' takes the checkpoint's. Default: float32.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = flag(None, "Attention: eager, sdpa, flash_attention_2, ... Default: by itself.")
    vocab_size: int = flag(
        10000, "From scratch without a tokenizer: entries of the joint BPE trained on the training set. Default: 10000."
    )

    def __post_init__(self):
        require_sole_model_source(self)
        if self.vocab_size < 1:
            raise InputError(f"--vocab_size={self.vocab_size}: must be 1 or more")
        if self.model_name_or_path and (self.config_overrides or self.weight_initialization):
            raise InputError(
                "--config_overrides and --weight_initialization are for training from scratch; "
                f"drop them, or --model_name_or_path={self.model_name_or_path}"
            )


@dataclass
class DataArguments(DatasetArguments):
    """The sentence pairs."""

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
        None,
        "Longest generated sentence in tokens, and longest evaluation target for eval_loss (BLEU and chrF take the whole "
        "references). Default: --max_target_length.",
    )
    max_length_ratio: float | None = flag(
        None, "Leave training pairs out whose one side has more than so many times the tokens of the other, such as 2."
    )
    streaming: bool = flag(
        False, "Read the training data while training instead of before; needs --max_steps. Nothing of it is cached."
    )
    shuffle_buffer_size: int | None = flag(
        None, "With --streaming: draw training pairs at random from a buffer of this many. Default: in order."
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
        "Training batches by token budget: max(padded source, padded target) tokens per batch, process and forward "
        "pass; replaces --per_device_train_batch_size.",
    )
    average_checkpoints: int | None = flag(
        None, "After training, average the last so many checkpoints; evaluate and save the average."
    )
    overwrite_output_dir: bool = flag(False, "Start afresh in an output folder that has checkpoints or files.")

    def __post_init__(self):
        require_positive_counts(self)
        self.val_max_target_length = self.val_max_target_length or self.max_target_length
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise InputError(f"--max_length_ratio={self.max_length_ratio}: must be 1 or more, such as 2")
        if self.source_lang is not None and self.source_lang == self.target_lang:
            raise InputError(
                f"--source_lang={self.source_lang} and --target_lang={self.target_lang}: are the same; name two languages"
            )
        if self.shuffle_buffer_size and not self.streaming:
            raise InputError(f"--shuffle_buffer_size={self.shuffle_buffer_size}: is for --streaming; drop it")
        if self.streaming and self.max_tokens_per_batch:
            raise InputError(
                f"--max_tokens_per_batch={self.max_tokens_per_batch}: not with --streaming; drop one of the two"
            )
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
    ScriptTrainerMixin,
    LearningRateBoundsMixin,
    TokenBudgetMixin,
    LengthSortedEvaluationMixin,
    ExactEvaluationMixin,
    GenerationMixin,
    V0InitSeq2SeqTrainer,
):
    """With token-budget batches, evaluation in batches of like length, an exact `eval_loss` (nats per target token, without
    label smoothing), and a limit to the length of every translation.
    """


def load_pairs(data: DataArguments, model: ModelArguments, training) -> dict[str, datasets.Dataset]:
    """Returns the sentence pairs of each role that the run needs; of the test set, perhaps the sources alone."""
    limits = dict(zip(ROLES, (data.max_train_samples, data.max_eval_samples, data.max_predict_samples), strict=True))
    hub = data.load_dataset(model) if data.dataset_name and not data.streaming else {}
    streams = data.load_dataset(model, streaming=True) if data.dataset_name and data.streaming else {}
    pairs = {}
    for role in find_needed_roles(training):
        is_stream = data.streaming and role == "train"
        raw = streams.get(role) or hub.get(role) or load_pair_files(
            role,
            getattr(data, f"{role}_file"),
            getattr(data, f"{role}_source_file"),
            getattr(data, f"{role}_target_file"),
            is_stream,
        )  # fmt: skip
        if raw is None:
            raise InputError(
                f"there is no {role} data; give --{role}_file, or --{role}_source_file and --{role}_target_file, "
                "or a --dataset_name that has this split"
            )
        limit = limits[role]
        if isinstance(raw, datasets.IterableDataset):
            raw = raw.take(limit) if limit is not None else raw
            raw = raw if is_stream else datasets.Dataset.from_list(list(raw))
        elif limit is not None:
            raw = raw.select(range(min(limit, len(raw))))
        pairs[role] = select_pairs(
            raw,
            role=role,
            source_column=data.source_column,
            target_column=data.target_column,
            source_lang=data.source_lang,
            target_lang=data.target_lang,
            may_lack_target=role == "test",
        )
    if "train" in pairs:
        pairs["train"] = leave_out_empty_pairs(pairs["train"])
        if data.shuffle_buffer_size:
            pairs["train"] = pairs["train"].shuffle(seed=training.seed, buffer_size=data.shuffle_buffer_size)
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
        if isinstance(train, datasets.IterableDataset):
            train = train.take(MAX_TOKENIZER_PAIRS)
        texts = (text for rows in train.iter(1000) for column in ("source", "target") for text in rows[column])
        return train_on_main_process(lambda: train_bpe_tokenizer(texts, model.vocab_size, for_translation=True))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **model.get_hub_options())
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {name!r} cannot be loaded ({error}); check the name") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name!r} has no padding or end token; choose another")
    return tokenizer


def load_model_config(model: ModelArguments) -> PreTrainedConfig:
    """The configuration of the model, before its vocabulary is known; refuses one of which no model can be built."""
    if model.model_name_or_path is None and model.model_type is None and model.config_name in (None, POST_NORM):
        config = build_post_norm_config(PLACEHOLDER_VOCABULARY, pad_token_id=0, eos_token_id=1)
    else:
        config = load_config(model.model_type, model.model_name_or_path or model.config_name, None, model)
    if not config.is_encoder_decoder:
        raise InputError(f"a {config.model_type} model is no encoder-decoder; choose one such as marian, bart or t5")
    if model.config_overrides:
        override_config(config, model.config_overrides)
    if model.model_name_or_path is None:
        require_buildable(config, AutoModelForSeq2SeqLM, describe_source(model))
    return config


def describe_source(model: ModelArguments) -> str:
    """The flags that say what the model from scratch is."""
    source = (
        f"--model_type={model.model_type}" if model.model_type else f"--config_name={model.config_name or POST_NORM}"
    )
    return f"--config_overrides={model.config_overrides}" if model.config_overrides else source


def load_model(model: ModelArguments, config: PreTrainedConfig, tokenizer):
    """The pretrained model named, or one from scratch that fits the tokenizer."""
    options = {"dtype": model.dtype or "float32", "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        if model.model_name_or_path:
            network = AutoModelForSeq2SeqLM.from_pretrained(
                model.model_name_or_path, **(model.get_hub_options() | options)
            )
            if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
                network.resize_token_embeddings(len(tokenizer))
            return network
        fit_config(config, tokenizer)
        if options["dtype"] == "auto":
            options["dtype"] = "float32"
        network = AutoModelForSeq2SeqLM.from_config(config, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"the model cannot be made: {error}") from error
    rule = model.weight_initialization or ("fairseq_xavier" if config.model_type == "marian" else "model_default")
    if rule == "fairseq_xavier":
        apply_xavier_initialization(network)
    logger.info(f"From scratch: {type(network).__name__}, {network.num_parameters():,} parameters, weights: {rule}")
    return network


def fit_config(config: PreTrainedConfig, tokenizer) -> None:
    """Gives the configuration of a new model the tokenizer's vocabulary and special tokens."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, value in {**special, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}.items():
        setattr(config, name, value)
    if hasattr(config, "decoder_vocab_size"):
        config.decoder_vocab_size = len(tokenizer)
    if getattr(config, "forced_eos_token_id", None) is not None:
        config.forced_eos_token_id = tokenizer.eos_token_id
    config.decoder_start_token_id = tokenizer.pad_token_id
    config.name_or_path = ""  # it is a new model


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
        if kind.startswith("MBartTokenizer"):
            # Unlike all others it puts the language at the end of the labels, from where it is wrapped around to start the
            # decoder; the first token to be generated is the first of the sentence.
            network.config.decoder_start_token_id = target_id
            network.generation_config.decoder_start_token_id = target_id
            network.generation_config.forced_bos_token_id = None
        elif first_token is None:
            network.generation_config.forced_bos_token_id = target_id
    if first_token is not None:
        first_token_id = tokenizer.convert_tokens_to_ids(first_token)
        if first_token_id in (None, tokenizer.unk_token_id):
            raise InputError(f"--forced_bos_token={first_token}: is no token of the tokenizer; give one that is")
        network.generation_config.forced_bos_token_id = first_token_id


def find_language_id(tokenizer, flag_name: str, language: str) -> int:
    """Find the id of a language's token; refuse a language that the tokenizer does not know."""
    try:
        has_own_way = hasattr(tokenizer, "get_lang_id")  # M2M100 writes __de__ for de
        token_id = (tokenizer.get_lang_id if has_own_way else tokenizer.convert_tokens_to_ids)(language)
    except KeyError:
        token_id = None
    if token_id in (None, tokenizer.unk_token_id):
        raise InputError(f"--{flag_name}={language}: {type(tokenizer).__name__} does not know it; check its codes")
    return token_id


def require_lengths_fit(data: DataArguments, config: PreTrainedConfig) -> None:
    """Refuse lengths beyond the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    for name in ("max_source_length", "max_target_length", "val_max_target_length"):
        value = getattr(data, name)
        if limit is not None and value > limit:
            raise InputError(
                f"--{name}={value}: the model has {limit} positions; lower it, or max_position_embeddings=..."
            )


def build_metrics(role: str, pairs, tokenizer, data: DataArguments, generation: GenerationArguments, num_best: int = 1):
    """What measures and keeps the translations of a role's pairs."""
    rows = pairs[role]
    return TranslationMetrics(
        tokenizer,
        references=rows["target"] if "target" in rows.column_names else [],
        sources=rows["source"],
        num_samples=generation.num_sample_translations,
        num_best=num_best,
        tokenize=generation.sacrebleu_tokenize,
        lowercase=generation.sacrebleu_lowercase,
        target_language=get_language(data.target_lang),
    )


def get_language(code: str | None) -> str:
    """The two letters of a language code, for sacrebleu: "zh" of zh_CN, zho_Hans or __zh__."""
    code = (code or "").strip("_").split("_")[0].lower()
    return {"zho": "zh", "jpn": "ja", "kor": "ko"}.get(code, code)


def tokenize_roles(pairs, tokenizer, data: DataArguments, training, cache_dir) -> dict[str, datasets.Dataset]:
    """Tokenize the pairs of each role, from the cache where they are there."""
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
        if not isinstance(tokenized[role], datasets.IterableDataset) and not data.pad_to_max_length:
            count_truncated(tokenized[role], role, data)
        if role == "train":
            tokenized[role] = leave_out_unlike_lengths(tokenized[role], data.max_length_ratio)
    return tokenized


def count_truncated(tokenized: datasets.Dataset, role: str, data: DataArguments) -> None:
    """Says in one line how many sentences are as long as is allowed: what they had beyond that is cut off."""
    max_target_length = data.max_target_length if role == "train" else data.val_max_target_length
    limits = {"input_ids": ("sources", data.max_source_length), "labels": ("targets", max_target_length)}
    for column in [name for name in limits if name in tokenized.column_names]:
        name, limit = limits[column]
        full = sum(len(ids) >= limit for rows in tokenized.select_columns([column]).iter(1000) for ids in rows[column])
        if full:
            logger.info(
                f"{role}: {full} of {len(tokenized)} {name} fill the {limit} tokens allowed; what is longer is truncated"
            )


def require_possible(
    model: ModelArguments, data: DataArguments, generation: GenerationArguments, bounds, training
) -> None:
    """Refuses what the arguments alone rule out."""
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise InputError("--streaming: the length of a stream is unknown; give --max_steps")
    if training.batch_eval_metrics:
        raise InputError("--batch_eval_metrics: BLEU and chrF are of the whole set; leave it out")
    if training.do_train:
        bounds.require_fits(training)
    if model.model_name_or_path is None:  # or the model has generation settings of its own
        beams = generation.num_beams or training.generation_num_beams or 1
        require_effect(generation, beams, data.val_max_target_length)
    make_bleu(generation.sacrebleu_tokenize, generation.sacrebleu_lowercase, get_language(data.target_lang))
    generated = TRANSLATION_METRICS if training.predict_with_generate else ()
    missing = dict.fromkeys(TRANSLATION_METRICS, "for BLEU and chrF add --predict_with_generate")
    require_available_metric(training, ("loss", *generated), missing)


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    GenerationArguments,
    LearningRateBoundsArguments,
    EarlyStoppingArguments,
    ProbeArguments,
    V0InitSeq2SeqTrainingArguments,
)


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    parsed = parse_arguments(ARGUMENTS, argv, EXAMPLES)
    model_args, data_args, generation_args, bounds_args, stopping_args, probe_args, training_args = parsed
    if probe_args.probe_only:
        turn_into_probe(training_args)
    require_possible(model_args, data_args, generation_args, bounds_args, training_args)
    callbacks = make_early_stopping(stopping_args, training_args)
    start_logging(training_args)
    run = describe_run(training_args, model_args, data_args)
    overwrite = data_args.overwrite_output_dir
    checkpoint = require_possible_run(training_args, model_args.model_name_or_path, overwrite, run)
    config = load_model_config(model_args)
    require_same_model(checkpoint, config)
    require_lengths_fit(data_args, config)
    set_seed(training_args.seed)

    pairs = load_pairs(data_args, model_args, training_args)
    tokenizer = load_tokenizer(model_args, pairs, checkpoint)
    network = load_model(model_args, config, tokenizer)
    if network.config.model_type == "t5" and model_args.model_name_or_path and not data_args.source_prefix:
        logger.warning(
            "T5 was pretrained with a task prefix; give --source_prefix, such as 'translate English to German: '"
        )
    choose_languages(data_args, tokenizer, network)
    choose_generation(generation_args, data_args.val_max_target_length, training_args, network)
    tokenized = tokenize_roles(pairs, tokenizer, data_args, training_args, model_args.cache_dir)

    # A stream's batches are cut and joined across processes, so they must all be of one length.
    joins_batches = data_args.streaming and training_args.world_size > 1
    collator = PairCollator(
        tokenizer,
        model=network,
        label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
        padding="max_length" if joins_batches else True,
        max_length=max(data_args.max_source_length, data_args.max_target_length) if joins_batches else None,
        pad_to_multiple_of=8 if training_args.fp16 or training_args.bf16 else None,
    )
    if training_args.do_train:
        require_trainable(data_args, training_args, tokenized["train"], collator)
    metrics = None
    if "validation" in pairs and training_args.predict_with_generate:
        metrics = build_metrics("validation", pairs, tokenizer, data_args, generation_args)
    with explain_hub_errors(training_args):
        trainer = TranslationTrainer(
            model=network,
            args=training_args,
            train_dataset=tokenized.get("train"),
            eval_dataset=tokenized.get("validation"),
            processing_class=tokenizer,
            data_collator=collator,
            compute_metrics=metrics,
            compute_loss_func=TokenCrossEntropy(training_args.label_smoothing_factor),
            max_tokens_per_batch=data_args.max_tokens_per_batch,
            generation=generation_args,
            learning_rate_bounds=bounds_args,
            run_identity=run,
            callbacks=callbacks,
        )
    if probe_args.probe_only:
        probe_and_print(trainer, probe_args)
        return
    if training_args.do_train:
        train_metrics = train_and_save(trainer, checkpoint, overwrite, data_args.average_checkpoints)
        save_results(trainer, "train", train_metrics, {})
        trainer.save_state()
    if training_args.do_eval:
        results = {**trainer.evaluate(metric_key_prefix="eval"), "eval_samples": len(tokenized["validation"])}
        save_results(trainer, "eval", results, metrics.signatures if metrics else {})
        trainer.card_samples = metrics.samples if metrics else []
    if training_args.do_predict:
        predict(trainer, pairs, tokenized["test"], data_args, generation_args)
    files = [
        file
        for file in (
            data_args.train_file,
            data_args.train_source_file,
            data_args.train_target_file,
            data_args.test_source_file,
        )
        if file
    ][:2]
    card = describe_for_card("translation", model_args.model_name_or_path, data_args, files)
    if data_args.dataset_name == EMBEDDED:  # the Hub has no such data set to link to
        card.pop("dataset_tags")
    languages = [lang.split("_")[0] for lang in (data_args.source_lang, data_args.target_lang) if lang]
    publish_card(trainer, card | ({"language": languages} if languages else {}))


def predict(trainer: TranslationTrainer, pairs, tokenized: datasets.Dataset, data: DataArguments, generation) -> None:
    """Translates the test set, measures the translations if there are references, and writes them down."""
    num_best = generation.num_return_sequences or 1
    metrics = build_metrics("test", pairs, trainer.processing_class, data, generation, num_best)
    trainer.args.predict_with_generate, trainer.num_best = True, num_best
    trainer.compute_metrics = metrics if metrics.references else None
    prediction = trainer.predict(tokenized, metric_key_prefix="predict")
    results = {**prediction.metrics, "predict_samples": len(tokenized)}
    save_results(trainer, "predict", results, metrics.signatures)
    texts = metrics.decode(prediction.predictions)
    if not metrics.references:
        metrics.keep_samples([best[0] for best in texts])
    trainer.card_samples = metrics.samples
    if trainer.is_world_process_zero():
        write_predictions(Path(trainer.args.output_dir), pairs["test"]["source"], texts)


def require_trainable(data: DataArguments, training, train_dataset, collator) -> None:
    """Refuses what would only show during or after training."""
    if data.average_checkpoints is not None:
        is_known = data.max_tokens_per_batch is None and not isinstance(train_dataset, datasets.IterableDataset)
        num_samples = len(train_dataset) if is_known else None
        num_steps = count_steps(training, num_samples)
        require_enough_checkpoints(training, data.average_checkpoints, num_steps)
    if isinstance(train_dataset, datasets.IterableDataset):
        return
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


def write_predictions(folder: Path, sources: list[str], texts: list[list[str]]) -> None:
    """Writes the best translation of each sentence to a line of generated_predictions.txt; if there are more, all of them beside
    their source to a line of generated_nbest.jsonl. In the order of the test set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(best[0].split()) + "\n" for best in texts]
    (folder / "generated_predictions.txt").write_text("".join(lines), encoding="utf-8")
    if texts and len(texts[0]) > 1:
        rows = [{"source": source, "translations": best} for source, best in zip(sources, texts, strict=True)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "generated_nbest.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
