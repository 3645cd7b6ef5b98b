"""Multilingual tokenizers: from what language into what, and what a translation begins with."""

from hf_v0init import InputError

MULTILINGUAL_TOKENIZERS = ("MBart", "M2M100", "Nllb", "SeamlessM4T")


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
