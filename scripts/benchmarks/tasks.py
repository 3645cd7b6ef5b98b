"""The models and data that the rows are measured on: GPT-2 on Penn Treebank or random tokens, a small translation model."""

import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer
from hf_v0init.tasks.translation.embedded_corpus import NUM_SMALL, load_embedded_corpus
from hf_v0init.tasks.translation.pairs import load_pair_files, select_pairs, tokenize_pairs
from hf_v0init.tasks.translation.post_norm import apply_xavier_initialization, build_post_norm_config
from hf_v0init.trainer.arguments import V0InitSeq2SeqTrainingArguments, V0InitTrainingArguments

VOCABULARY, LENGTH = 4_000, 128
MULTI30K, PENN_TREEBANK = "multi30k", "ptb"


def make_gpt2(
    num_layers: int = 4, width: int = 128, vocabulary: int = VOCABULARY, dropout: float = 0.1
) -> GPT2LMHeadModel:
    """Make a GPT-2 from scratch, the same each time, for sequences of up to 128 tokens."""
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=LENGTH,
            n_layer=num_layers,
            n_embd=width,
            n_head=max(1, width // 32),
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def make_random_sequences(num: int, vocabulary: int = VOCABULARY, length: int = LENGTH) -> list[dict]:
    """Make sequences of random tokens with themselves as labels."""
    rows = torch.randint(vocabulary, (num, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def read_penn_treebank(data_dir: Path, length: int, num: int) -> tuple[list[dict], int] | None:
    """Read the first `num` windows of the training text, by words; return them and the vocabulary's size, or None."""
    path = data_dir / PENN_TREEBANK / "ptb.train.txt.gz"
    if not path.is_file():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as file:
        words = file.read().replace("\n", " <eos> ").split()
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokens = torch.tensor([numbers[word] for word in words[: length * num]])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows], len(numbers)


@dataclass
class TranslationTask:
    """Sentence pairs, their tokenizer, and what a Trainer needs of them.

    Attributes:
        name: of the data.
        pairs: columns "source" and "target".
        tokenized: columns "input_ids", "attention_mask" and "labels".
    """

    name: str
    pairs: datasets.Dataset
    tokenizer: PreTrainedTokenizerFast
    tokenized: datasets.Dataset

    def make_model(self, num_layers: int = 6) -> nn.Module:
        """Make the pocket-size post-norm Transformer of 6+6 layers (or fewer) of 96, the same each time."""
        set_seed(0)
        tokenizer = self.tokenizer
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = {"d_model": 96, "ffn_dim": 192, "num_layers": num_layers, "dropout": 0.1}
        config = build_post_norm_config(len(tokenizer), **special, **sizes)
        config.decoder_start_token_id = tokenizer.pad_token_id
        model = AutoModelForSeq2SeqLM.from_config(config)
        apply_xavier_initialization(model)
        return model

    def make_collator(self, model: nn.Module) -> DataCollatorForSeq2Seq:
        """Make the collator of run_translation.py."""
        return DataCollatorForSeq2Seq(self.tokenizer, model=model)


def load_translation_task(data_dir: Path, num_pairs: int) -> TranslationTask:
    """Load the first `num_pairs` of Multi30k's 29,000 German-English pairs, or else of the corpus that the package generates."""
    files = [data_dir / MULTI30K / f"train.{language}.gz" for language in ("de", "en")]
    if all(file.is_file() for file in files):
        name, raw = "Multi30k", load_pair_files("train", None, *map(str, files))
    else:
        name = "the embedded corpus"
        wanted = math.ceil(num_pairs / 0.9)
        raw = load_embedded_corpus(wanted, large=wanted > NUM_SMALL)["train"]
    pairs = select_pairs(raw.select(range(min(num_pairs, len(raw)))), role="train")
    tokenizer = train_bpe_tokenizer(_list_texts(pairs), 4000, for_translation=True)
    return TranslationTask(name, pairs, tokenizer, tokenize(pairs, tokenizer))


def _list_texts(pairs: datasets.Dataset) -> Iterable[str]:
    return (text for rows in pairs.iter(1000) for column in ("source", "target") for text in rows[column])


def tokenize(pairs: datasets.Dataset, tokenizer) -> datasets.Dataset:
    """Tokenize pairs as run_translation.py does."""
    return tokenize_pairs(pairs, tokenizer, max_source_length=64, max_target_length=64)


def make_arguments(folder: Path, for_translation: bool = False, **settings):
    """Make training arguments for the CPU that save nothing; what is written nevertheless goes into `folder`."""
    kind = V0InitSeq2SeqTrainingArguments if for_translation else V0InitTrainingArguments
    common = {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10}
    return kind(str(folder), **common | settings)
