"""Sentence pairs: found in whatever columns a data set has, tokenized, and cached on disk by content."""

import hashlib
import json
from pathlib import Path

import datasets

from ...errors import InputError
from ..text_files import load_local_files, load_parallel_files

ROLES = ("train", "validation", "test")
CACHE_FOLDER = "hf_v0init_tokenized"


def load_pair_files(role: str, file=None, source_file=None, target_file=None) -> datasets.Dataset | None:
    """Loads one role's local data: a table or tab-separated `file`, or two parallel text files, or None.

    Raises:
        InputError: both ways at once, one of two parallel files missing, or what the loaders refuse.
    """
    if (source_file is None) != (target_file is None):
        given, missing = ("source", "target") if target_file is None else ("target", "source")
        raise InputError(f"--{role}_{given}_file: needs --{role}_{missing}_file beside it; give both")
    if source_file is not None:
        if file is not None:
            raise InputError(f"--{role}_file and --{role}_source_file: give one way of reading, not both")
        return load_parallel_files(source_file, target_file)
    if file is None:
        return None
    dataset = load_local_files(file, role=role)
    return _split_at_tab(dataset["text"], file) if dataset.column_names == ["text"] else dataset


def select_pairs(
    dataset: datasets.Dataset,
    *,
    role: str,
    source_column: str | None = None,
    target_column: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> datasets.Dataset:
    """Finds the sentence pairs of a data set.

    Looked for in this order: the columns named; a column "translation" of dictionaries by language code, as
    on the Hub; columns named like the languages; columns "source" and "target".

    Returns:
        A data set with the columns "source" and "target" only.

    Raises:
        InputError: the data set is empty, has none of these columns, lacks the language, or has an entry
            that is no text.
    """
    if len(dataset) == 0:
        raise InputError(f"the {role} set has no examples; give data, or raise --max_{role}_samples")
    columns = dataset.column_names
    if source_column is not None or target_column is not None:
        pair = (source_column or "source", target_column or "target")
    elif "translation" in columns:
        return _select_from_translation_column(dataset, role, source_lang, target_lang)
    elif source_lang in columns and target_lang in columns:
        pair = (source_lang, target_lang)
    else:
        pair = ("source", "target")
    for name in pair:
        if name not in columns:
            raise InputError(
                f"the {role} set has no column {name!r}, only {', '.join(map(repr, columns))}; "
                "name the columns with --source_column and --target_column"
            )
    if pair[0] == pair[1]:
        raise InputError(f"--source_column and --target_column are both {pair[0]!r}; name two columns")
    dataset = dataset.select_columns(list(pair))
    if pair != ("source", "target"):
        dataset = dataset.rename_columns({pair[0]: "\0s", pair[1]: "\0t"})
        dataset = dataset.rename_columns({"\0s": "source", "\0t": "target"})
    return _require_text(dataset, role)


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    pad_to_max_length: bool = False,
    label_pad_token_id: int = -100,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
    cache_dir=None,
) -> datasets.Dataset:
    """Tokenizes the columns "source" and "target".

    The result is kept under `cache_dir` (default: the `datasets` cache), named by a hash of texts, tokenizer
    and options, so that the next start with the same ones reads it.

    Returns:
        A data set with "input_ids", "attention_mask" and "labels", truncated to the lengths given, padded
        only if asked to (labels with `label_pad_token_id`).
    """
    padding = "max_length" if pad_to_max_length else False

    def tokenize(rows):
        inputs = tokenizer(
            [source_prefix + text for text in rows["source"]],
            max_length=max_source_length,
            padding=padding,
            truncation=True,
            return_token_type_ids=False,
        )
        targets = tokenizer(text_target=rows["target"], max_length=max_target_length, padding=padding, truncation=True)
        labels = targets["input_ids"]
        if pad_to_max_length:
            labels = [
                [token if real else label_pad_token_id for token, real in zip(row, mask, strict=True)]
                for row, mask in zip(labels, targets["attention_mask"], strict=True)
            ]
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "labels": labels,
        }

    options = [source_prefix, max_source_length, max_target_length, pad_to_max_length, label_pad_token_id]
    fingerprint = _compute_fingerprint(pairs, tokenizer, options)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / CACHE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return pairs.map(
        tokenize,
        batched=True,
        remove_columns=pairs.column_names,
        num_proc=num_workers,
        load_from_cache_file=not overwrite_cache,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="Tokenizing",
    )


def _split_at_tab(lines, path) -> datasets.Dataset:
    sources, targets = [], []
    for number, line in enumerate(lines, start=1):
        source, tab, target = line.partition("\t")
        if not tab or "\t" in target:
            raise InputError(f"{path}: line {number} is not 'source<TAB>target'; repair it, or give two parallel files")
        sources.append(source)
        targets.append(target)
    return datasets.Dataset.from_dict({"source": sources, "target": targets})


def _select_from_translation_column(dataset, role, source_lang, target_lang) -> datasets.Dataset:
    languages = sorted(dataset[0]["translation"])
    codes = []
    for flag, lang in (("--source_lang", source_lang), ("--target_lang", target_lang)):
        # multilingual tokenizers say de_DE or deu_Latn where data sets say de
        code = next((c for c in (lang, (lang or "").split("_")[0]) if c in languages), None)
        if code is None:
            raise InputError(
                f"{flag}={lang}: the {role} set's translations are {', '.join(languages)}; name one of these"
            )
        codes.append(code)
    pairs = dataset.map(
        lambda rows: {
            "source": [row[codes[0]] for row in rows["translation"]],
            "target": [row[codes[1]] for row in rows["translation"]],
        },
        batched=True,
        remove_columns=dataset.column_names,
    )
    return _require_text(pairs, role)


def _require_text(pairs: datasets.Dataset, role: str) -> datasets.Dataset:
    row = 0
    for rows in pairs.iter(batch_size=1000):
        for source, target in zip(rows["source"], rows["target"], strict=True):
            for name, text in (("source", source), ("target", target)):
                if not isinstance(text, str):
                    raise InputError(
                        f"the {role} set's example {row} has no text as {name} but {text!r}; repair the data"
                    )
            row += 1
    return pairs


def _compute_fingerprint(pairs: datasets.Dataset, tokenizer, options: list) -> str:
    """A hash of texts, tokenizer and options: equal hashes, equal tokenizations."""
    digest = hashlib.sha256()
    for rows in pairs.iter(batch_size=1000):
        digest.update(json.dumps([rows["source"], rows["target"]]).encode())
    settings = [
        type(tokenizer).__name__,
        getattr(tokenizer, "src_lang", None),
        getattr(tokenizer, "tgt_lang", None),
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None  # left behind by whoever used the tokenizer last
    else:
        state = tokenizer.get_vocab()
    digest.update(json.dumps([state, settings, options], sort_keys=True).encode())
    return digest.hexdigest()[:32]
