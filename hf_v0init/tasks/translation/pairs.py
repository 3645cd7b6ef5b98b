"""Sentence pairs: found in whatever columns a data set has, tokenized, and padded to batches."""

import itertools
import logging
from collections.abc import Iterator

import datasets
from transformers import DataCollatorForSeq2Seq

from hf_v0init import InputError

from ..data import is_stream, list_columns, map_with_cache
from ..text_files import find_kind, get_format, iterate_lines, load_local_files, open_stream, read_lines

logger = logging.getLogger("hf_v0init")

HEADERS = ({"source", "target"}, {"src", "tgt"}, {"src", "trg"}, {"german", "english"}, {"de", "en"})


def load_pair_files(
    role: str, file=None, source_file=None, target_file=None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset | None:
    """Load one role's local data: a table or tab-separated `file`, or two parallel text files, or None.

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
    if source_file is not None and file is not None:
        raise InputError(f"--{role}_file and --{role}_source_file: give one way of reading, not both")
    if source_file is not None:
        read, paths = _iterate_parallel, (str(source_file), str(target_file))
    elif file is None:
        return None
    elif find_kind(file) is None or get_format(file) == ".tsv":
        read, paths = _iterate_tabs, (str(file),)
    else:
        return open_stream(file) if streaming else load_local_files(file, role=role)
    if not streaming:
        return datasets.Dataset.from_list(list(read(paths)))
    stream = datasets.IterableDataset.from_generator(read, gen_kwargs={"paths": paths})
    next(iter(stream), None)  # a file that cannot be read is an error now
    return stream.cast(datasets.Features({name: datasets.Value("string") for name in ("source", "target")}))


def _iterate_parallel(paths: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for number, (source, target) in enumerate(itertools.zip_longest(*map(iterate_lines, paths))):
        if source is None or target is None:
            counts = [sum(1 for _ in iterate_lines(path)) for path in paths]
            raise InputError(
                f"{paths[0]} has {counts[0]} lines but {paths[1]} has {counts[1]}: one ends after line {number}; parallel files need "
                "the same number of lines, line n of one translating line n of the other"
            )
        yield {"source": source, "target": target}


def _iterate_tabs(paths: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Split lines `source<TAB>target`; a first line that names the two sides is left out, and that is logged."""
    (path,) = paths
    for number, line in enumerate(iterate_lines(path), start=1):
        source, tab, target = line.partition("\t")
        if line.strip() and (not tab or "\t" in target):
            raise InputError(f"{path}: line {number} is not 'source<TAB>target'; repair it, or give two parallel files")
        if number == 1 and {source.strip().lower(), target.strip().lower()} in HEADERS:
            logger.info(f"{path}: its first line, {source!r} and {target!r}, names the columns and is no pair")
        else:
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
    """Find the sentence pairs of a data set, or of a stream.

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
    if not is_stream(dataset) and len(dataset) == 0:
        raise InputError(f"the {role} set has no examples; give data, or raise --max_{role}_samples")
    columns = list_columns(dataset)
    pair = ("source", "target")
    if source_column is not None or target_column is not None:
        pair = (source_column or "source", target_column or "target")
    elif "translation" in columns:
        return _select_from_translation_column(dataset, role, source_lang, target_lang)
    elif source_lang in columns and target_lang in columns:
        pair = (source_lang, target_lang)
    if may_lack_target and target_column is None and pair[0] in columns and pair[1] not in columns:
        pair = pair[:1]
    for name in pair:
        if name not in columns:
            raise InputError(
                f"the {role} set has no column {name!r}, only {', '.join(map(repr, columns))}; "
                "name the columns with --source_column and --target_column"
            )
    if len(pair) == 2 and pair[0] == pair[1]:
        raise InputError(f"--source_column and --target_column are both {pair[0]!r}; name two columns")
    dataset = dataset.select_columns(list(pair))
    if pair != ("source", "target")[: len(pair)]:
        dataset = dataset.rename_columns(dict(zip(pair, ("\0s", "\0t"), strict=False)))
        dataset = dataset.rename_columns(dict(zip(("\0s", "\0t")[: len(pair)], ("source", "target"), strict=False)))
    return _require_text(dataset, role)


def _select_from_translation_column(dataset, role, source_lang, target_lang) -> datasets.Dataset:
    first = next(iter(dataset), {}).get("translation")
    if not isinstance(first, dict):
        raise InputError(f"the {role} set's column 'translation' holds {first!r}; it must hold texts by language code")
    codes = []
    for name, lang in (("--source_lang", source_lang), ("--target_lang", target_lang)):
        # multilingual tokenizers say de_DE or deu_Latn where data sets say de
        code = next((c for c in (lang, (lang or "").split("_")[0]) if c in first), None)
        if code is None:
            raise InputError(
                f"{name}={lang}: the {role} set's translations are {', '.join(sorted(first))}; name one of these"
            )
        codes.append(code)

    def take(rows) -> dict[str, list]:
        return {
            side: [(row or {}).get(code) for row in rows["translation"]]
            for side, code in zip(("source", "target"), codes, strict=True)
        }

    return _require_text(dataset.map(take, batched=True, remove_columns=list_columns(dataset)), role)


def _require_text(pairs: datasets.Dataset | datasets.IterableDataset, role: str):
    """Refuse an entry that is no text: now, or, of a stream, when it is read."""

    def require(rows, number: int) -> None:
        for column in rows:
            for offset, text in enumerate(rows[column]):
                if not isinstance(text, str) or "\0" in text:
                    what = "is missing" if text is None else f"is no text but {text!r}"
                    what = "holds a NUL character" if isinstance(text, str) else what
                    raise InputError(
                        f"the {role} set's example {number + offset + 1} (counted from 1, empty lines left out): its {column} "
                        f"{what}; repair the data"
                    )

    if is_stream(pairs):

        def check(rows, indices):
            require(rows, indices[0])
            return rows

        return pairs.map(check, batched=True, with_indices=True)
    number = 0
    for rows in pairs.iter(batch_size=1000):
        require(rows, number)
        number += len(rows["source"])
    return pairs


def leave_out_empty_pairs(pairs):
    """Leave training pairs out of which a side is empty or white space; say how many, but of a stream.

    Raises:
        InputError: all are.
    """

    def has_text(rows) -> list[bool]:
        return [bool(s.strip() and t.strip()) for s, t in zip(rows["source"], rows["target"], strict=True)]

    if is_stream(pairs):
        return pairs.filter(has_text, batched=True)
    kept = [keep for rows in pairs.iter(batch_size=1000) for keep in has_text(rows)]
    if all(kept):
        return pairs
    if not any(kept):
        raise InputError("the train set: all pairs have an empty side; give pairs of sentences")
    logger.info(
        f"train: {kept.count(False)} of {len(kept)} pairs have an empty side (the first: {kept.index(False) + 1}) and are left out"
    )
    return pairs.select([index for index, keep in enumerate(kept) if keep])


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    **map_options,
) -> datasets.Dataset:
    """Tokenize the columns "source" and "target".

    Args:
        map_options: `num_proc`, `cache_dir`, `overwrite_cache`; see `map_with_cache`.

    Returns:
        A data set with "input_ids", "attention_mask" and, where there are targets, "labels", truncated to the
        lengths given. Of a stream, a stream.
    """

    def tokenize(rows):
        inputs = tokenizer(
            [source_prefix + text for text in rows["source"]],
            max_length=max_source_length,
            truncation=True,
            return_token_type_ids=False,
        )
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if "target" not in rows:
            return tokens
        targets = tokenizer(text_target=rows["target"], max_length=max_target_length, truncation=True)
        return {**tokens, "labels": targets["input_ids"]}

    key = ("pairs", source_prefix, max_source_length, max_target_length)
    return map_with_cache(pairs, tokenize, tokenizer, None, key, **map_options)


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
