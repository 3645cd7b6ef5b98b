"""Tokenizers trained on the run's own text: byte-level BPE, and whole words for PTB-like corpora.

Both come back as `PreTrainedTokenizerFast`, so they save, load and push like any other tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import InputError

PAD, BOS, EOS, UNK, MASK = "<pad>", "<s>", "</s>", "<unk>", "<mask>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)  # ids 0, 1, 2, 3
MASKING_SPECIAL_TOKENS = (*SPECIAL_TOKENS, MASK)  # with id 4, for masked language models


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, *, for_translation: bool, for_masking: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: no text is unknown to it and `decode(encode(x)) == x`.

    Args:
        texts: the training text, read once; for a joint vocabulary, both languages.
        vocab_size: number of entries, special tokens and the 256 bytes included, which are always there; a small corpus gives fewer.
        for_translation: append `</s>` to every encoding (both sides), and let a word at the beginning of a
            text be the same token as in the middle of it. Without it, as GPT-2 has it: nothing is appended.
        for_masking: for a masked language model, as RoBERTa has it: `<mask>` as id 4, every encoding between `<s>` and `</s>`.

    Returns:
        A tokenizer with `<pad>`, `<s>`, `</s>`, `<unk>` as ids 0 to 3. The round trip holds with
        `skip_special_tokens=True`, for texts that do not contain these literally.
    """
    special_tokens = MASKING_SPECIAL_TOKENS if for_masking else SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if for_translation:
        # A space before every text, and off again when decoding: unlike `add_prefix_space` this is
        # unconditional, so that texts which begin with a space survive the round trip too.
        tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if for_translation or for_masking:
        _frame(tokenizer, for_masking)
    return _wrap(tokenizer, for_masking)


def train_word_tokenizer(
    texts: Iterable[str], vocab_size: int, *, for_masking: bool = False
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, split at white space: the vocabulary of a corpus such as PTB.

    Every encoding ends with `</s>`, the end-of-line word that word-level perplexities count by convention.

    Args:
        texts: the training text, one line or document each, read once.
        vocab_size: number of entries, the special tokens included; the most frequent words are kept.
        for_masking: for a masked language model: `<mask>` as id 4, and `<s>` at the beginning of every encoding.

    Returns:
        A tokenizer with `<pad>`, `<s>`, `</s>`, `<unk>` as ids 0 to 3. A literal `<unk>` in the text is the
        unknown word. `decode` joins the words by single spaces.

    Raises:
        InputError: `vocab_size` leaves no room for a word.
    """
    special_tokens = MASKING_SPECIAL_TOKENS if for_masking else SPECIAL_TOKENS
    if vocab_size <= len(special_tokens):
        raise InputError(
            f"a vocabulary of {vocab_size} leaves no room for words beside the {len(special_tokens)} special "
            "tokens; raise --vocab_size"
        )
    counts = Counter(word for text in texts for word in text.split())
    for special_token in special_tokens:
        counts.pop(special_token, None)
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(special_tokens)]
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special_tokens))
    _frame(tokenizer, for_masking)
    return _wrap(tokenizer, for_masking)


def train_on_main_process(train: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Call `train` on the main process only and return its tokenizer on every process; writes no file."""
    return broadcast_object_list([train() if PartialState().is_main_process else None])[0]


def _frame(tokenizer: Tokenizer, for_masking: bool) -> None:
    """End every encoding with `</s>`, and for masking begin it with `<s>`."""
    first = f"{BOS} " if for_masking else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A {EOS}",
        pair=f"{first}$A {EOS} $B:1 {EOS}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
    )


def _wrap(tokenizer: Tokenizer, for_masking: bool) -> PreTrainedTokenizerFast:
    roles = {"mask_token": MASK, "cls_token": BOS, "sep_token": EOS} if for_masking else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **roles,
    )
