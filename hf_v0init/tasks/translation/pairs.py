"""Sentence pairs: found in whatever columns a data set has, tokenized, and padded to batches."""

import csv
import logging

import datasets
import pandas
from transformers import DataCollatorForSeq2Seq

from hf_v0init import InputError

from ..data import map_rows
from ..text_files import find_kind, get_format, load_local_files

logger = logging.getLogger("hf_v0init")

SIDES = ["source", "target"]
HEADERS = ({"source", "target"}, {"src", "tgt"}, {"src", "trg"}, {"german", "english"}, {"de", "en"})


def load_pair_files(
    role: str, file=None, source_file=None, target_file=None, cache_dir: str | None = None
) -> datasets.Dataset | None:
    """Load one role's local data: a table or tab-separated `file`, or two parallel text files, or None.

    Returns:
        The data; of a test set with `source_file` alone a data set with the single column "source".

    Raises:
        InputError: both ways at once, one of two parallel files missing, or what the loaders refuse.
    """
    given = {side: path for side, path in zip(SIDES, (source_file, target_file), strict=True) if path is not None}
    if given and file is not None:
        raise InputError(f"--{role}_file and --{role}_{next(iter(given))}_file: give one way of reading, not both")
    if len(given) == 1 and not (role == "test" and source_file is not None):
        raise InputError(f"--{role}_source_file and --{role}_target_file: give both")
    if given:
        sides = [
            load_local_files(path, role=role, cache_dir=cache_dir).rename_column("text", side)
            for side, path in given.items()
        ]
        if len({len(side) for side in sides}) > 1:
            raise InputError(
                f"{source_file} has {len(sides[0])} lines but {target_file} has {len(sides[1])}; line n of one must translate "
                "line n of the other"
            )
        return datasets.concatenate_datasets(sides, axis=1)
    if file is None:
        return None
    if find_kind(file) == "text" or get_format(file) == ".tsv":
        return read_tabs(file)
    return load_local_files(file, role=role, cache_dir=cache_dir)


def read_tabs(path) -> datasets.Dataset:
    """Read lines `source<TAB>target`; a first line that names the two sides is left out, and that is logged."""
    try:
        table = pandas.read_csv(
            path, sep="\t", header=None, names=SIDES, quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False,
            skip_blank_lines=False,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as lines source<TAB>target ({error})") from error
    if not isinstance(table.index, pandas.RangeIndex) or not (table["target"] != "").any():
        raise InputError(f"{path}: its lines are not source<TAB>target; repair it, or give two parallel files")
    first = table.iloc[0].tolist()
    if {text.strip().lower() for text in first} in HEADERS:
        logger.info(f"{path}: its first line, {first[0]!r} and {first[1]!r}, names the columns and is no pair")
        table = table[1:]
    return datasets.Dataset.from_pandas(table, preserve_index=False)


def select_pairs(
    dataset: datasets.Dataset,
    *,
    role: str,
    source_column: str | None = None,
    target_column: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> datasets.Dataset:
    """Find the sentence pairs of a data set.

    Looked for in this order: the columns named; columns named like the languages, also within a column "translation" of
    dictionaries by language code, as on the Hub; columns "source" and "target".

    Returns:
        A data set with the columns "source" and "target" only; of a test set that has no translations, "source" alone.

    Raises:
        InputError: the data set is empty, has none of these columns, or has an entry that is no text.
    """
    if len(dataset) == 0:
        raise InputError(f"the {role} set has no examples; give data, or raise --max_{role}_samples")
    if "translation" in dataset.column_names and source_column is None and target_column is None:
        dataset = dataset.select_columns("translation").flatten()
        dataset = dataset.rename_columns({name: name.split(".", 1)[-1] for name in dataset.column_names})
    columns = dataset.column_names

    def find(side: str, named: str | None, language: str | None) -> str:
        # multilingual tokenizers say de_DE or deu_Latn where data sets say de
        by_language = [code for code in (language, (language or "").split("_")[0]) if code in columns]
        return named or next(iter(by_language), side)

    pair = [find("source", source_column, source_lang), find("target", target_column, target_lang)]
    if role == "test" and target_column is None and pair[0] in columns and pair[1] not in columns:
        pair = pair[:1]
    for name in pair:
        if name not in columns:
            raise InputError(
                f"the {role} set has no column {name!r}, only {', '.join(map(repr, columns))}; name the columns with "
                "--source_column and --target_column, or the languages with --source_lang and --target_lang"
            )
    if len(set(pair)) < len(pair):
        raise InputError(f"--source_column and --target_column are both {pair[0]!r}; name two columns")
    pairs = dataset.select_columns(pair).rename_columns(dict(zip(pair, SIDES, strict=False)))
    for rows in pairs.iter(1000):
        for side, texts in rows.items():
            wrong = [text for text in texts if not isinstance(text, str)]
            if wrong:
                raise InputError(f"the {role} set has a {side} that is no text but {wrong[0]!r}; repair the data")
    return pairs


def leave_out_empty_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    """Leave training pairs out of which a side is empty or white space; say how many.

    Raises:
        InputError: all are.
    """
    kept = [
        bool(source.strip() and target.strip())
        for rows in pairs.iter(1000)
        for source, target in zip(rows["source"], rows["target"], strict=True)
    ]
    if not any(kept):
        raise InputError("the train set: all pairs have an empty side; give pairs of sentences")
    if all(kept):
        return pairs
    logger.info(f"train: {kept.count(False)} of {len(kept)} pairs have an empty side and are left out")
    return pairs.select([index for index, keep in enumerate(kept) if keep])


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Tokenize the columns "source" and "target", in `num_proc` processes.

    Returns:
        A data set with "input_ids", "attention_mask" and, where there are targets, "labels", truncated to the
        lengths given.
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

    return map_rows(pairs, tokenize, num_proc=num_proc)


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
