"""Tiny multilingual models with their tokenizers and languages."""

from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

WORDS = ["ein", "haus", "zwei", "katzen", "a", "house", "two", "cats"]
VOCABULARY = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS)]
SIZES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "init_std": 0.1, "dropout": 0.0,
    "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip


def make_mbart():
    tokenizer = MBartTokenizer(vocab=[(piece, -2.0) for piece in VOCABULARY])
    return tokenizer, MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **SIZES)), ("de_DE", "en_XX")


def make_mbart50():
    tokenizer = MBart50Tokenizer(vocab=[(piece, -2.0) for piece in VOCABULARY])
    config = MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=2, **SIZES)
    return tokenizer, MBartForConditionalGeneration(config), ("de_DE", "en_XX")


def make_nllb():
    tokenizer = NllbTokenizer(vocab={piece: number for number, piece in enumerate(VOCABULARY)}, merges=[])
    tokenizer.add_tokens(WORDS)
    config = M2M100Config(vocab_size=len(tokenizer), **SIZES)
    return tokenizer, M2M100ForConditionalGeneration(config), ("deu_Latn", "eng_Latn")
