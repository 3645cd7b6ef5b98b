"""Sentence pairs: found in whatever columns a data set has, tokenized, and cached on disk by content."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import datasets
from transformers import DataCollatorForSeq2Seq

from ...errors import InputError
from ..text_files import iterate_lines, load_local_files, load_parallel_files, open_table_stream, read_lines

logger = logging.getLogger("hf_v0init")

ROLES = ("train", "validation", "test")
CACHE_FOLDER = "hf_v0init_tokenized"


def load_pair_files(
    role: str, file=None, source_file=None, target_file=None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset | None:
    """Loads one role's local data: a table or tab-separated `file`, or two parallel text files, or None.

    Args:
        streaming: read the data as a stream, again in every epoch.

    Returns:
        The data; of a test set with `source_file` alone a data set with the single column "source".

    Raises:
        InputError: both ways at once, one of two parallel files missing, or what the loaders refuse.
    """
    if source_file is not None and target_file is None and role == "test" and file is None:
        return datasets.Dataset.from_dict({"source": read_lines(source_file)})
    if (source_file is None) != (target_file is None):
        given, missing = ("source", "target") if target_file is None else ("target", "source")
        raise InputError(f"--{role}_{given}_file: needs --{role}_{missing}_file beside it; give both")
    if source_file is not None:
        if file is not None:
            raise InputError(f"--{role}_file and --{role}_source_file: give one way of reading, not both")
        if streaming:
            return _stream(_iterate_parallel, source_file, target_file)
        return load_parallel_files(source_file, target_file)
    if file is None:
        return None
    if streaming:
        table = open_table_stream(file)
        return _stream(_iterate_tabs, file) if table is None else table
    dataset = load_local_files(file, role=role)
    return _split_at_tab(dataset["text"], file) if dataset.column_names == ["text"] else dataset


def _stream(generator, *paths) -> datasets.IterableDataset:
    stream = datasets.IterableDataset.from_generator(generator, gen_kwargs={"paths": tuple(map(str, paths))})
    next(iter(stream), None)  # a file that cannot be read is an error now
    return stream.cast(datasets.Features({name: datasets.Value("string") for name in ("source", "target")}))


def _iterate_parallel(paths: tuple[str, ...]) -> Iterator[dict[str, str]]:
    iterators, number = [iterate_lines(path) for path in paths], 0
    while True:
        source, target = (next(lines, None) for lines in iterators)
        if source is None and target is None:
            return
        if source is None or target is None:
            shorter = paths[0] if source is None else paths[1]
            raise InputError(
                f"{shorter}: ends after line {number}, before the file beside it; both need the same number of lines"
            )
        number += 1
        yield {"source": source, "target": target}


def _iterate_tabs(paths: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for number, line in enumerate(iterate_lines(paths[0]), start=1):
        source, target = _split_line(line, number, paths[0])
        yield {"source": source, "target": target}


def select_pairs(
    dataset: datasets.Dataset,
    *,
    role: str,
    source_column: str | None = None,
    target_column: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    may_lack_target: bool = False,
) -> datasets.Dataset:
    """Finds the sentence pairs of a data set, or of a stream.

    Looked for in this order: the columns named; a column "translation" of dictionaries by language code, as
    on the Hub; columns named like the languages; columns "source" and "target".

    Args:
        may_lack_target: that there may be no translations, for a test set that is only to be translated.

    Returns:
        A data set with the columns "source" and "target" only, or "source" alone.

    Raises:
        InputError: the data set is empty, has none of these columns, lacks the language, or has an entry
            that is no text.
    """
    is_stream = isinstance(dataset, datasets.IterableDataset)
    if not is_stream and len(dataset) == 0:
        raise InputError(f"the {role} set has no examples; give data, or raise --max_{role}_samples")
    columns = list_columns(dataset)
    if source_column is not None or target_column is not None:
        pair = (source_column or "source", target_column or "target")
    elif "translation" in columns:
        return _select_from_translation_column(dataset, role, source_lang, target_lang)
    elif source_lang in columns and target_lang in columns:
        pair = (source_lang, target_lang)
    else:
        pair = ("source", "target")
    if may_lack_target and target_column is None and pair[0] in columns and pair[1] not in columns:
        pair = pair[:1]
    for name in pair:
        if name not in columns:
            raise InputError(
                f"the {role} set has no column {name!r}, only {', '.join(map(repr, columns))}; "
                "name the columns with --source_column and --target_column"
            )
    if pair[0] == pair[-1] and len(pair) == 2:
        raise InputError(f"--source_column and --target_column are both {pair[0]!r}; name two columns")
    dataset = dataset.select_columns(list(pair))
    if pair != ("source", "target")[: len(pair)]:
        dataset = dataset.rename_columns(dict(zip(pair, ("\0s", "\0t"), strict=False)))
        dataset = dataset.rename_columns(dict(zip(("\0s", "\0t")[: len(pair)], ("source", "target"), strict=False)))
    return _require_text(dataset, role)


def leave_out_empty_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    """Leave training pairs out of which a side is empty or white space, and say how many in one line.

    Raises:
        InputError: all are.
    """

    def is_full(rows) -> list[bool]:
        return [bool(s.strip() and t.strip()) for s, t in zip(rows["source"], rows["target"], strict=True)]

    if isinstance(pairs, datasets.IterableDataset):
        return pairs.filter(is_full, batched=True)
    full = [index for index, keep in enumerate(is_full(pairs[:])) if keep]
    if len(full) == len(pairs):
        return pairs
    if not full:
        raise InputError("the train set: all pairs have an empty side; give pairs of sentences")
    first = next((index for index, place in enumerate(full) if index != place), len(full)) + 1
    logger.info(
        f"train: {len(pairs) - len(full)} of {len(pairs)} pairs have an empty side (the first: {first}) and are left out"
    )
    return pairs.select(full)


def leave_out_unlike_lengths(tokenized: datasets.Dataset, max_ratio: float | None) -> datasets.Dataset:
    """Leave training pairs out whose one side has more than `max_ratio` times the tokens of the other; None: none.

    Raises:
        InputError: all have.
    """
    if max_ratio is None:
        return tokenized

    def is_alike(rows) -> list[bool]:
        lengths = [(len(s), len(t)) for s, t in zip(rows["input_ids"], rows["labels"], strict=True)]
        return [max(pair) <= max_ratio * min(pair) for pair in lengths]

    if isinstance(tokenized, datasets.IterableDataset):
        return tokenized.filter(is_alike, batched=True)
    alike, start = [], 0
    for rows in tokenized.select_columns(["input_ids", "labels"]).iter(batch_size=1000):
        keep = is_alike(rows)
        alike += [start + index for index, kept in enumerate(keep) if kept]
        start += len(keep)
    if not alike:
        raise InputError(f"--max_length_ratio={max_ratio}: leaves none of {len(tokenized)} training pairs; raise it")
    logger.info(
        f"train: {len(tokenized) - len(alike)} of {len(tokenized)} pairs differ by more than {max_ratio} times in tokens and are left out"
    )
    return tokenized.select(alike)


def list_columns(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """List the columns of a data set, or of a stream, whose first row may have to be read for it."""
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset), {}))


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
        A data set with "input_ids", "attention_mask" and, where there are targets, "labels", truncated to the
        lengths given, padded only if asked to (labels with `label_pad_token_id`). Of a stream, a stream.
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
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if "target" not in rows:
            return tokens
        targets = tokenizer(text_target=rows["target"], max_length=max_target_length, padding=padding, truncation=True)
        labels = targets["input_ids"]
        if pad_to_max_length:
            labels = [
                [token if real else label_pad_token_id for token, real in zip(row, mask, strict=True)]
                for row, mask in zip(labels, targets["attention_mask"], strict=True)
            ]
        return {**tokens, "labels": labels}

    if isinstance(pairs, datasets.IterableDataset):
        return pairs.map(tokenize, batched=True, remove_columns=list_columns(pairs))
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


class PairCollator(DataCollatorForSeq2Seq):
    """Pads pairs to a batch, with what the decoder reads.

    transformers leaves that to the model where it cannot shift the labels beforehand (M2M100, NLLB); but the Trainer keeps the
    labels to itself when the loss is computed outside of the model.
    """

    def __call__(self, features, return_tensors=None):
        """Return the batch as tensors of shape (samples, tokens)."""
        batch = super().__call__(features, return_tensors)
        labels = batch.get("labels")
        if labels is not None and "decoder_input_ids" not in batch:
            shifted = labels.new_full(labels.shape, self.model.config.decoder_start_token_id)
            shifted[:, 1:] = labels[:, :-1]
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, self.tokenizer.pad_token_id)
        return batch


def _split_at_tab(lines, path) -> datasets.Dataset:
    sources, targets = [], []
    for number, line in enumerate(lines, start=1):
        source, target = _split_line(line, number, path)
        sources.append(source)
        targets.append(target)
    return datasets.Dataset.from_dict({"source": sources, "target": targets})


def _split_line(line: str, number: int, path) -> tuple[str, str]:
    source, tab, target = line.partition("\t")
    if line.strip() and (not tab or "\t" in target):
        raise InputError(f"{path}: line {number} is not 'source<TAB>target'; repair it, or give two parallel files")
    return source, target


def _select_from_translation_column(dataset, role, source_lang, target_lang) -> datasets.Dataset:
    first = next(iter(dataset), {}).get("translation")
    if not isinstance(first, dict):
        raise InputError(f"the {role} set's column 'translation' holds {first!r}; it must hold texts by language code")
    languages = sorted(first)
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
            "source": [(row or {}).get(codes[0]) for row in rows["translation"]],
            "target": [(row or {}).get(codes[1]) for row in rows["translation"]],
        },
        batched=True,
        remove_columns=list_columns(dataset),
    )
    return _require_text(pairs, role)


def _require_text(pairs: datasets.Dataset | datasets.IterableDataset, role: str):
    """Refuse an entry that is no text: now, or, of a stream, when it is read."""

    def require(rows, number: int) -> None:
        for column in rows:
            for offset, text in enumerate(rows[column]):
                if not isinstance(text, str):
                    what = "is missing" if text is None else f"is no text but {text!r}"
                elif "\0" in text:
                    what = "holds a NUL character"
                else:
                    continue
                raise InputError(
                    f"the {role} set's example {number + offset + 1} (counted from 1, empty lines left out): its {column} {what}; "
                    "repair the data"
                )

    if isinstance(pairs, datasets.IterableDataset):

        def check(rows, indices):
            require(rows, indices[0])
            return rows

        return pairs.map(check, batched=True, with_indices=True)
    number = 0
    for rows in pairs.iter(batch_size=1000):
        require(rows, number)
        number += len(rows["source"])
    return pairs


def _compute_fingerprint(pairs: datasets.Dataset, tokenizer, options: list) -> str:
    """A hash of texts, tokenizer and options: equal hashes, equal tokenizations."""
    digest = hashlib.sha256()
    for rows in pairs.iter(batch_size=1000):
        digest.update(json.dumps([rows[name] for name in pairs.column_names]).encode())
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
