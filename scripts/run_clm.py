"""Trains, evaluates and samples from a causal language model, with a v0 for Adam if asked.

    python scripts/run_clm.py FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 scripts/run_clm.py FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

The text is one stream of tokens cut into blocks, or, with --prompt_column and --completion_column, one sample a
row with the loss on the completion. Losses and perplexities are exact: each token of the set counts once.
"""

import difflib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_v0init import V0InitTrainer, V0InitTrainingArguments
from hf_v0init.checkpoint_averaging import load_average_of_last, require_enough_checkpoints
from hf_v0init.completions import generate_completions
from hf_v0init.data.language_modeling import (
    CausalCollator,
    StreamedTokenWindows,
    TokenWindows,
    encode_prompts,
    find_first_token,
    list_columns,
    tokenize_completions,
    tokenize_texts,
)
from hf_v0init.data.text_files import load_local_files
from hf_v0init.data.token_budget import TokenBudgetMixin
from hf_v0init.data.tokenizer_training import train_bpe_tokenizer, train_on_main_process, train_word_tokenizer
from hf_v0init.errors import InputError
from hf_v0init.perplexity import ExactPerplexityMixin
from hf_v0init.script_support import (
    RemoveOldCheckpoints,
    explain_hub_errors,
    find_checkpoint_to_resume,
    parse_arguments,
    require_writable_output,
    run_script,
    start_logging,
)

logger = logging.get_logger("run_clm")

TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv"}
LONGEST_DEFAULT_BLOCK = 1024
MAX_TOKENIZER_TEXTS = 2_000_000  # a vocabulary does not get better from more, but memory runs out


def flag(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = flag(
        None, "Pretrained model, by Hub name or folder. Without it a model is trained from scratch."
    )
    model_type: str | None = flag(
        None, "From scratch: a transformers model type, such as gpt2, with its default configuration."
    )
    config_name: str | None = flag(None, "From scratch: a configuration, by Hub name, folder or JSON file.")
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example n_embd=256,n_layer=4."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer, by Hub name or folder. Default: the model's.")
    tokenizer_kind: str = flag(
        "bpe",
        "From scratch without a tokenizer, one is trained on the training text and saved: 'bpe' (byte-level BPE), or "
        "'word' (words between white space and a </s> after every line or row, as PTB perplexities count).",
        choices=["bpe", "word"],
    )
    vocab_size: int = flag(10000, "Entries of that tokenizer at most, its 4 special tokens included.")
    cache_dir: str | None = flag(None, "Folder for what comes from the Hub and for tokenized data.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = flag(None, "Access token for the Hub. Default: that of `hf auth login`.")
    trust_remote_code: bool = flag(False, "Run code that the Hub repositories contain.")
    dtype: str | None = flag(
        None,
        "Type of the weights; 'auto' takes the checkpoint's. Default: float32.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = flag(None, "Attention: eager, sdpa, flash_attention_2, ... Default: by itself.")

    def __post_init__(self):
        ways = [name for name in ("model_name_or_path", "config_name", "model_type") if getattr(self, name)]
        if len(ways) > 1:
            raise InputError(f"--{ways[0]} and --{ways[1]}: give one source of the model, not both")
        if not ways:
            raise InputError(
                "no model: give --model_name_or_path (pretrained), or --model_type or --config_name (from scratch)"
            )
        if self.model_name_or_path and self.config_overrides:
            raise InputError(
                f"--config_overrides={self.config_overrides}: is for training from scratch; drop it, or "
                f"--model_name_or_path={self.model_name_or_path}"
            )


@dataclass
class DataArguments:
    dataset_name: str | None = flag(None, "Data set by Hub name or folder.")
    dataset_config_name: str | None = flag(None, "Configuration of that data set.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of that data set.")
    train_file: str | None = flag(
        None, "Local training data: .json, .jsonl, .csv, or text, one document a line; also .gz."
    )
    validation_file: str | None = flag(None, "The same for validation.")
    test_file: str | None = flag(None, "The same for test.")
    validation_split_percentage: float = flag(
        5.0, "Without validation data, --do_eval takes this percentage from the beginning of the training data."
    )
    text_column: str | None = flag(None, "Column with the text. Default: 'text', else the first column.")
    prompt_column: str | None = flag(
        None, "Column with prompts; needs --completion_column. One sample a row, the loss on the completion only."
    )
    completion_column: str | None = flag(None, "Column with the completions.")
    prompt_prefix: str = flag("", "Text put before every prompt.")
    block_size: int | None = flag(
        None,
        "Tokens of a block, and the longest prompt with completion (longer ones lose the beginning of the prompt). "
        f"Default: what model and tokenizer take, at most {LONGEST_DEFAULT_BLOCK}.",
    )
    keep_linebreaks: bool = flag(True, "Text files: keep the line break at the end of every line.")
    append_eos: bool = flag(False, "End every line or row with the tokenizer's end-of-text token.")
    streaming: bool = flag(
        False, "Read the data while training instead of before; needs --max_steps. Nothing is cached."
    )
    shuffle_buffer_size: int = flag(
        0, "With --streaming: draw training rows at random from a buffer of this many. Default: 0, in order."
    )
    max_train_samples: int | None = flag(None, "Use only the first so many blocks (or rows) for training.")
    max_eval_samples: int | None = flag(None, "Use only the first so many blocks (or rows) for validation.")
    max_predict_samples: int | None = flag(None, "Use only the first so many blocks (or rows) of the test set.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize. Default: none beside this one.")
    overwrite_cache: bool = flag(False, "Tokenize again although a cached result exists.")

    def __post_init__(self):
        require_positive_counts(self, may_be_zero=("shuffle_buffer_size",))
        files = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if self.dataset_name and files:
            raise InputError(f"--dataset_name and --{files[0]}: give one source of data, not both")
        if not self.dataset_name and not files:
            raise InputError("no data: give --dataset_name, or --train_file and --validation_file")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise InputError("--prompt_column and --completion_column: give both or neither")
        if self.prompt_column is None and self.prompt_prefix:
            raise InputError(f"--prompt_prefix={self.prompt_prefix!r}: needs --prompt_column and --completion_column")
        if self.prompt_column is not None and (self.text_column or self.append_eos):
            raise InputError(
                "--text_column and --append_eos: are for running text; drop them, or --prompt_column and "
                "--completion_column"
            )
        smallest = 2 if self.prompt_column is None else 3
        if self.block_size is not None and self.block_size < smallest:
            raise InputError(f"--block_size={self.block_size}: must be {smallest} or more")
        if not 0 < self.validation_split_percentage < 100:
            raise InputError(
                f"--validation_split_percentage={self.validation_split_percentage}: must lie between 0 and 100"
            )
        if self.shuffle_buffer_size and not self.streaming:
            raise InputError(f"--shuffle_buffer_size={self.shuffle_buffer_size}: is for --streaming; drop it")


@dataclass
class RunArguments:
    overwrite_output_dir: bool = flag(
        False, "Start afresh in an output folder that has files; checkpoints of the earlier run are deleted."
    )
    average_checkpoints: int | None = flag(
        None, "After training, average the last so many checkpoints; evaluate and save the average."
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "With --prompt_column: training batches by token budget, padded tokens a batch, process and forward pass; "
        "replaces --per_device_train_batch_size. Blocks are all of one size and need none.",
    )
    sample_prompt: str | None = flag(
        None, "At the end, continue this text by sampling; printed and saved to generated_sample.txt."
    )
    max_new_tokens: int = flag(64, "Tokens generated at most, for --sample_prompt and for completions of the test set.")

    def __post_init__(self):
        require_positive_counts(self)


def require_positive_counts(arguments, may_be_zero: tuple[str, ...] = ()) -> None:
    for name, value in vars(arguments).items():
        smallest = 0 if name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < smallest:
            raise InputError(f"--{name}={value}: must be {smallest} or more")


class CausalTrainer(ExactPerplexityMixin, TokenBudgetMixin, V0InitTrainer):
    """With exact evaluation and, if asked, token-budget batches."""


def require_possible(data: DataArguments, run: RunArguments, model: ModelArguments, training) -> None:
    """Refuses what the arguments alone rule out."""
    if not (training.do_train or training.do_eval or training.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if not training.do_train and model.model_name_or_path is None:
        raise InputError("evaluation needs a trained model; give --model_name_or_path, or --do_train")
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise InputError("--streaming: the length of a stream is unknown; give --max_steps")
    if data.streaming and run.max_tokens_per_batch:
        raise InputError(
            f"--max_tokens_per_batch={run.max_tokens_per_batch}: not with --streaming; drop one of the two"
        )
    if run.max_tokens_per_batch and data.prompt_column is None:
        raise InputError(
            f"--max_tokens_per_batch={run.max_tokens_per_batch}: blocks all have --block_size tokens, so give "
            "--per_device_train_batch_size instead; the budget is for --prompt_column"
        )


# ------------------------------------------------------------------------------------------------------ data


def load_rows(data: DataArguments, model: ModelArguments, training) -> dict:
    """The rows of each role that the run needs: "train", "validation", "test"."""
    needs_validation = training.do_eval or (training.do_train and training.eval_strategy != "no")
    roles = {"train": training.do_train, "validation": needs_validation, "test": training.do_predict}
    hub = load_hub_dataset(data, model) if data.dataset_name else {}
    rows = {}
    for role in (role for role, needed in roles.items() if needed):
        path = getattr(data, f"{role}_file")
        if role in hub:
            rows[role] = hub[role]
        elif path is not None:
            rows[role] = open_stream(path) if data.streaming else load_local_files(path, role=role)
        elif role != "validation":
            raise InputError(f"there is no {role} data; give --{role}_file, or a data set that has that split")
    if needs_validation and "validation" not in rows:
        rows |= split_off_validation(rows.get("train"), data)
    for role, role_rows in rows.items():
        if not data.streaming and len(role_rows) == 0:
            raise InputError(f"the {role} data has no rows; give a file or split with at least one")
        require_columns(role_rows, role, data)
    if "train" in rows and data.shuffle_buffer_size:
        rows["train"] = rows["train"].shuffle(seed=training.seed, buffer_size=data.shuffle_buffer_size)
    return rows


def load_hub_dataset(data: DataArguments, model: ModelArguments):
    try:
        return datasets.load_dataset(
            data.dataset_name,
            data.dataset_config_name,
            revision=data.dataset_revision,
            cache_dir=model.cache_dir,
            token=model.token,
            streaming=data.streaming,
        )
    except Exception as error:  # of many kinds: no network, no such name, no such configuration
        raise InputError(
            f"--dataset_name={data.dataset_name}: cannot be loaded ({error}); check name and network"
        ) from error


def open_stream(path: str) -> datasets.IterableDataset:
    """A local file as a stream of rows, read line by line."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    kind = TABLE_SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"
    stream = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True)
    try:
        first = next(iter(stream), None)
    except Exception as error:  # of many kinds, from the readers of each format
        raise InputError(f"{path}: cannot be read as {kind} ({error}); repair the file") from error
    if first is None:
        raise InputError(f"{path}: is empty; give a file with at least one row")
    return stream


def split_off_validation(train, data: DataArguments) -> dict:
    if train is None or data.streaming:
        raise InputError("there is no validation data; give --validation_file, or a data set that has that split")
    num_validation = round(len(train) * data.validation_split_percentage / 100)
    if not 0 < num_validation < len(train):
        raise InputError(
            f"--validation_split_percentage={data.validation_split_percentage}: of {len(train)} rows that leaves "
            f"{num_validation} for validation and {len(train) - num_validation} for training; give --validation_file"
        )
    return {
        "train": train.select(range(num_validation, len(train))),
        "validation": train.select(range(num_validation)),
    }


def require_columns(rows, role: str, data: DataArguments) -> None:
    names = list_columns(rows)
    for flag_name in ("text_column", "prompt_column", "completion_column"):
        column = getattr(data, flag_name)
        if column is not None and column not in names:
            raise InputError(f"--{flag_name}={column}: the {role} data has no such column, only {', '.join(names)}")


def choose_text_column(rows, data: DataArguments) -> str:
    names = list_columns(rows)
    return data.text_column or ("text" if "text" in names else names[0])


def iterate_texts(rows, data: DataArguments) -> Iterator[str]:
    """The training texts, for a tokenizer to be trained on."""
    columns = [data.prompt_column, data.completion_column] if data.prompt_column else [choose_text_column(rows, data)]
    suffix = choose_text_suffix(data, "train")
    for row in itertools.islice(rows, MAX_TOKENIZER_TEXTS):
        for column in columns:
            if not isinstance(row[column], str):
                raise InputError(f"column {column!r} holds {row[column]!r} in some row; every row must hold text there")
            yield row[column] + suffix


def choose_text_suffix(data: DataArguments, role: str) -> str:
    """The line break that reading a text file by lines took away."""
    path = getattr(data, f"{role}_file") or data.train_file
    is_text = path is not None and not any(suffix.lower() in TABLE_SUFFIXES for suffix in Path(path).suffixes)
    return "\n" if is_text and data.keep_linebreaks and data.prompt_column is None else ""


def prepare_samples(rows, role: str, tokenizer, block_size: int, data: DataArguments, model: ModelArguments, training):
    """Blocks, or prompts with completions: what the Trainer indexes or iterates."""
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    limit = limits[role]
    options = {}
    if not data.streaming:
        options = {
            "num_proc": data.preprocessing_num_workers,
            "cache_dir": model.cache_dir,
            # the other processes read what the first has just written
            "overwrite_cache": data.overwrite_cache and training.local_process_index == 0,
        }
    if data.prompt_column is not None:
        rows = limit_rows(rows, limit)
        return tokenize_completions(
            rows,
            tokenizer,
            data.prompt_column,
            data.completion_column,
            max_length=block_size,
            prompt_prefix=data.prompt_prefix,
            **options,
        )
    tokenized = tokenize_texts(
        rows,
        tokenizer,
        choose_text_column(rows, data),
        text_suffix=choose_text_suffix(data, role),
        append_eos=data.append_eos,
        **options,
    )
    windows = StreamedTokenWindows if data.streaming else TokenWindows
    return windows(tokenized, block_size, find_first_token(tokenizer), limit)


def limit_rows(rows, limit: int | None):
    if limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, datasets.IterableDataset) else rows.select(range(min(limit, len(rows))))


# ----------------------------------------------------------------------------------------------------- model


def hub_options(model: ModelArguments) -> dict:
    return {
        "cache_dir": model.cache_dir,
        "revision": model.model_revision,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }


def load_tokenizer(model: ModelArguments, data: DataArguments, rows: dict, checkpoint: str | None):
    """The tokenizer named, or that of the checkpoint resumed, or one trained on the training text."""
    name = model.tokenizer_name or model.model_name_or_path
    if name is None and checkpoint is not None and (Path(checkpoint) / "tokenizer_config.json").is_file():
        name = checkpoint
    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(name, **hub_options(model))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the tokenizer of {name!r} cannot be loaded ({error}); check the name") from error
    texts = iterate_texts(rows["train"], data)

    def train() -> PreTrainedTokenizerBase:
        if model.tokenizer_kind == "word":
            return train_word_tokenizer(texts, model.vocab_size)
        return train_bpe_tokenizer(texts, model.vocab_size, for_translation=False)

    tokenizer = train_on_main_process(train)
    logger.info(f"Tokenizer trained on the training text: {model.tokenizer_kind}, {len(tokenizer)} entries")
    return tokenizer


def load_config(model: ModelArguments):
    """The configuration of the model, before the tokenizer is known."""
    if model.model_type is not None and model.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        closest = difflib.get_close_matches(model.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1, cutoff=0)
        raise InputError(f"--model_type={model.model_type}: is no causal language model; for example {closest[0]}")
    name = model.model_name_or_path or model.config_name
    try:
        config = AutoConfig.from_pretrained(name, **hub_options(model)) if name else CONFIG_MAPPING[model.model_type]()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the configuration of {name!r} cannot be loaded ({error}); check the name") from error
    if model.config_overrides:
        try:
            config.update_from_string(model.config_overrides)
        except (ValueError, TypeError) as error:
            raise InputError(f"--config_overrides={model.config_overrides}: {error}; write n_layer=4,...") from error
    return config


def load_model(model: ModelArguments, config, tokenizer) -> PreTrainedModel:
    """The pretrained model named, or one from scratch that fits the tokenizer."""
    options = {"trust_remote_code": model.trust_remote_code, "dtype": model.dtype or "float32"}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        if model.model_name_or_path is not None:
            network = AutoModelForCausalLM.from_pretrained(
                model.model_name_or_path, config=config, **{**hub_options(model), **options}
            )
            if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
                network.resize_token_embeddings(len(tokenizer))
            return network
        if "vocab_size=" not in (model.config_overrides or ""):
            config.vocab_size = len(tokenizer)
        elif config.vocab_size < len(tokenizer):
            raise InputError(
                f"--config_overrides: vocab_size={config.vocab_size} is less than the tokenizer's {len(tokenizer)}"
            )
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, special, getattr(tokenizer, special))
        if options["dtype"] == "auto":
            options["dtype"] = "float32"
        network = AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"the model cannot be made: {error}") from error
    logger.info(f"From scratch: {type(network).__name__}, {network.num_parameters():,} parameters")
    return network


def choose_block_size(data: DataArguments, config, tokenizer) -> int:
    """Tokens of a block: as asked, else as many as model and tokenizer take; refuses more than that."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if isinstance(limit, int) and limit > 0]
    if data.block_size is None:
        return min([LONGEST_DEFAULT_BLOCK, *limits])
    if limits and data.block_size > min(limits):
        raise InputError(
            f"--block_size={data.block_size}: model and tokenizer take {min(limits)} tokens; lower it, or raise the "
            "number of positions with --config_overrides"
        )
    return data.block_size


# ----------------------------------------------------------------------------------------------- after training


def save_results(trainer: CausalTrainer, role: str, metrics: dict) -> None:
    """Prints one stage's metrics, and writes them to its JSON file and to all_results.json."""
    trainer.log_metrics(role, metrics)
    trainer.save_metrics(role, metrics)
    if f"{role}_perplexity" in metrics and trainer.is_world_process_zero():
        figures = f"perplexity {metrics[f'{role}_perplexity']:.3f}, accuracy {metrics[f'{role}_accuracy']:.4f}"
        print(f"{role}: {figures} over {metrics[f'{role}_num_tokens']:,} tokens")


def complete(trainer: CausalTrainer, prompts: list[list[int]], max_new_tokens: int, **options) -> list[str]:
    network = trainer.accelerator.unwrap_model(trainer.model)
    first_token = find_first_token(trainer.processing_class)
    prompts = [ids or first_token for ids in prompts]
    return generate_completions(
        network, trainer.processing_class, prompts, max_new_tokens, trainer.accelerator, **options
    )


def write_test_completions(trainer: CausalTrainer, rows, data: DataArguments, max_new_tokens: int) -> None:
    """Greedy completions of the test prompts, beside the true ones, to generated_completions.jsonl."""
    rows = list(limit_rows(rows, data.max_predict_samples))
    prompts = [row[data.prompt_column] for row in rows]
    token_ids = encode_prompts(prompts, trainer.processing_class, data.prompt_prefix)
    generated = complete(trainer, token_ids, max_new_tokens, do_sample=False)
    if trainer.is_world_process_zero():
        write_lines(
            Path(trainer.args.output_dir, "generated_completions.jsonl"),
            (
                json.dumps(
                    {"prompt": row[data.prompt_column], "completion": row[data.completion_column], "generated": text},
                    ensure_ascii=False,
                )
                for row, text in zip(rows, generated, strict=True)
            ),
        )


def write_sample(trainer: CausalTrainer, prompt: str, max_new_tokens: int) -> None:
    """One sampled continuation of `prompt`, printed and to generated_sample.txt."""
    set_seed(trainer.args.seed)
    prompts = encode_prompts([prompt], trainer.processing_class)
    text = prompt + complete(trainer, prompts, max_new_tokens, do_sample=True)[0]
    if trainer.is_world_process_zero():
        print(f"sample: {text}")
        write_lines(Path(trainer.args.output_dir, "generated_sample.txt"), [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def count_steps(training, num_samples: int, max_tokens_per_batch: int | None) -> int | None:
    """Optimizer steps of the run, where they are known before the Trainer exists."""
    if training.max_steps > 0:
        return training.max_steps
    if max_tokens_per_batch is not None:
        return None
    batches = math.ceil(num_samples / (training.train_batch_size * training.world_size))
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def describe_for_card(model: ModelArguments, data: DataArguments) -> dict:
    card = {"tasks": "text-generation"}
    if model.model_name_or_path is not None:
        card["finetuned_from"] = model.model_name_or_path
    if data.dataset_name is not None:
        card |= {"dataset_tags": data.dataset_name, "dataset": data.dataset_name}
        if data.dataset_config_name is not None:
            card["dataset_args"] = data.dataset_config_name
            card["dataset"] = f"{data.dataset_name} {data.dataset_config_name}"
    return card


def main(argv: list[str]) -> None:
    model_args, data_args, run_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments), argv
    )
    require_possible(data_args, run_args, model_args, training_args)
    start_logging(training_args)
    checkpoint = None
    if training_args.do_train:
        checkpoint = find_checkpoint_to_resume(training_args, run_args.overwrite_output_dir)
    else:
        require_writable_output(training_args.output_dir, overwrite=True)
    set_seed(training_args.seed)

    rows = load_rows(data_args, model_args, training_args)
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args, data_args, rows, checkpoint)
    block_size = choose_block_size(data_args, config, tokenizer)
    if run_args.max_tokens_per_batch is not None and run_args.max_tokens_per_batch < block_size:
        raise InputError(
            f"--max_tokens_per_batch={run_args.max_tokens_per_batch}: is less than the {block_size} tokens that a sample "
            "may have; raise it, or lower --block_size"
        )
    if training_args.do_train and run_args.average_checkpoints is not None:
        require_enough_checkpoints(training_args, run_args.average_checkpoints)
    network = load_model(model_args, config, tokenizer)
    samples = {}
    for role, role_rows in rows.items():
        with training_args.main_process_first(desc=f"tokenizing {role}"):
            samples[role] = prepare_samples(
                role_rows, role, tokenizer, block_size, data_args, model_args, training_args
            )
    if training_args.do_train and run_args.average_checkpoints is not None and not data_args.streaming:
        num_steps = count_steps(training_args, len(samples["train"]), run_args.max_tokens_per_batch)
        require_enough_checkpoints(training_args, run_args.average_checkpoints, num_steps)

    with explain_hub_errors(training_args):
        trainer = CausalTrainer(
            model=network,
            args=training_args,
            train_dataset=samples.get("train"),
            eval_dataset=samples.get("validation"),
            processing_class=tokenizer,
            # A stream's batches are cut and joined across processes, so they must all be of one length.
            data_collator=CausalCollator(tokenizer.pad_token_id, length=block_size if data_args.streaming else None),
            max_tokens_per_batch=run_args.max_tokens_per_batch if training_args.do_train else None,
        )

    if training_args.do_train:
        if checkpoint is None and run_args.overwrite_output_dir:
            trainer.add_callback(RemoveOldCheckpoints())  # added last, so called when v0 has been written
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if run_args.average_checkpoints is not None:
            folders = load_average_of_last(trainer, run_args.average_checkpoints)
            logger.info(f"The model is now the average of {', '.join(folder.name for folder in folders)}")
        trainer.save_model()
        metrics = dict(result.metrics)
        if not data_args.streaming:
            metrics["train_samples"] = len(samples["train"])
        save_results(trainer, "train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        save_results(trainer, "eval", trainer.evaluate(metric_key_prefix="eval"))
    if training_args.do_predict:
        save_results(trainer, "test", trainer.predict(samples["test"], metric_key_prefix="test").metrics)
        if data_args.prompt_column is not None:
            write_test_completions(trainer, rows["test"], data_args, run_args.max_new_tokens)
    if run_args.sample_prompt is not None:
        write_sample(trainer, run_args.sample_prompt, run_args.max_new_tokens)

    card = describe_for_card(model_args, data_args)
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
