"""How translations are generated: the flags, and the languages of multilingual tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_v0init import InputError

from ..script_support import flag

MULTILINGUAL_TOKENIZERS = ("MBart", "M2M100", "Nllb", "SeamlessM4T")


@dataclass
class GenerationArguments:
    """generation: how text is generated"""

    num_beams: int | None = flag(None, "Beams of the search when generating. Default: the model's (1 from scratch).")
    length_penalty: float | None = flag(None, "Exponent of the length by which beam scores are divided.")
    num_return_sequences: int | None = flag(
        None, "Best translations of each test sentence, at most --num_beams, to generated_nbest.jsonl. Default: 1."
    )
    sacrebleu_tokenize: str | None = flag(
        None,
        "sacrebleu's --tokenize, such as 13a, intl, zh, ja-mecab, char, none. Default: what sacrebleu takes for --target_lang.",
    )
    sacrebleu_lowercase: bool = flag(False, "sacrebleu's --lowercase: BLEU and chrF without regard to case.")


def choose_generation(generation: GenerationArguments, max_length: int, training, network: PreTrainedModel) -> None:
    """Put beams, penalty and the longest output into the model's generation settings, which are saved with it.

    Args:
        max_length: tokens of the longest translation.

    Raises:
        InputError: a penalty that has no effect with one beam, or more translations than beams.
    """
    settings = network.generation_config
    settings.max_length = max_length + 1  # counts the start token
    beams = generation.num_beams or training.generation_num_beams or settings.num_beams or 1
    settings.num_beams = training.generation_num_beams = beams
    penalty, wanted = generation.length_penalty, generation.num_return_sequences or 1
    if penalty not in (None, 1.0) and beams == 1:
        raise InputError(f"--length_penalty={penalty}: has no effect without --num_beams of 2 or more")
    if wanted > beams:
        raise InputError(f"--num_return_sequences={wanted}: needs as many beams; give --num_beams {wanted} or more")
    if penalty is not None:
        settings.length_penalty = penalty


def choose_languages(source_lang: str | None, target_lang: str | None, tokenizer, network) -> None:
    """Tell multilingual tokenizers from what language into what, and the model what a translation begins with.

    Raises:
        InputError: a language is missing or unknown.
    """
    kind = type(tokenizer).__name__
    if not kind.startswith(MULTILINGUAL_TOKENIZERS):
        return
    find_language_id(tokenizer, "source_lang", source_lang)
    target_id = find_language_id(tokenizer, "target_lang", target_lang)
    tokenizer.src_lang, tokenizer.tgt_lang = source_lang, target_lang
    if kind.startswith("MBartTokenizer"):
        # Unlike all others it puts the language at the end of the labels, from where it is wrapped around to start the
        # decoder; the first token to be generated is the first of the sentence.
        network.config.decoder_start_token_id = target_id
        network.generation_config.decoder_start_token_id = target_id
        network.generation_config.forced_bos_token_id = None
    else:
        network.generation_config.forced_bos_token_id = target_id


def find_language_id(tokenizer, flag_name: str, language: str | None) -> int:
    """Find the id of a language's token; refuse a language that is missing, or that the tokenizer does not know."""
    has_own_way = hasattr(tokenizer, "get_lang_id")  # M2M100 writes __de__ for de
    try:
        token_id = (tokenizer.get_lang_id if has_own_way else tokenizer.convert_tokens_to_ids)(str(language))
    except KeyError:
        token_id = None
    if token_id in (None, tokenizer.unk_token_id):
        raise InputError(
            f"--{flag_name}={language}: is no language of {type(tokenizer).__name__}; give a code such as de_DE or deu_Latn"
        )
    return token_id


def get_language(code: str | None) -> str:
    """The two letters of a language code, for sacrebleu: "zh" of zh_CN, zho_Hans or __zh__."""
    code = (code or "").strip("_").split("_")[0].lower()
    return {"zho": "zh", "jpn": "ja", "kor": "ko"}.get(code, code)
