"""Several translations of each sentence, their scores, language tokens, test sets without references."""

import json
import math
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from sacrebleu.metrics import CHRF
from script_runs import quiet_logging, to_argv  # noqa: F401
from test_right_results import LONG
from test_run_translation import TINY
from transformers import (
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

from hf_v0init.errors import InputError
from hf_v0init.tasks.translation import script as run_translation
from hf_v0init.tasks.translation.generation import GenerationArguments
from hf_v0init.tasks.translation.metrics import compute_scores, make_bleu
from hf_v0init.tasks.translation.pairs import PairCollator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model that has hardly been trained, and flags to use it."""
    folder = tmp_path_factory.mktemp("model")
    lines = [" ".join(line.split()[: 2 + number]) for number, line in enumerate(LONG)]  # 2 to 17 words
    for name in ("source", "target"):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    common = {
        "use_cpu": True, "report_to": "none", "log_level": "error", "cache_dir": folder / "cache", "disable_tqdm": True,
        "test_source_file": folder / "source",
    }  # fmt: skip
    train = {
        "train_source_file": folder / "source",
        "train_target_file": folder / "target",
        "do_train": True,
        "max_steps": 1,
    }
    run_translation.main(to_argv({**TINY, **common, **train, "save_strategy": "no", "output_dir": folder / "out"}))
    return folder, {**common, "model_name_or_path": folder / "out", "do_predict": True, "val_max_target_length": 40}


def translate(model, out, **flags) -> list[str]:
    run_translation.main(to_argv({**model[1], "output_dir": out, **flags}))
    return (out / "generated_predictions.txt").read_text().splitlines()


def test_beams_and_penalty_reach_the_models_settings():
    settings = SimpleNamespace(max_length=20, num_beams=1, length_penalty=1.0)
    network, training = SimpleNamespace(generation_config=settings), SimpleNamespace(generation_num_beams=None)
    run_translation.choose_generation(GenerationArguments(num_beams=4, length_penalty=0.6), 30, training, network)
    assert vars(settings) == {"max_length": 31, "num_beams": 4, "length_penalty": 0.6}


# ---- test sets --------------------------------------------------------------------------------------------------------------


def test_sources_alone_are_translated(model, tmp_path):
    flags = {"val_max_target_length": 8}
    lines = translate(model, tmp_path / "alone", **flags)
    results = json.loads((tmp_path / "alone" / "all_results.json").read_text())
    assert len(lines) == 16 and results["predict_samples"] == 16
    assert not {"predict_loss", "predict_bleu"} & results.keys()
    assert not (tmp_path / "alone" / "README.md").exists()  # the model and its card are elsewhere
    assert translate(model, tmp_path / "beside", test_target_file=model[0] / "target", **flags) == lines
    rows = [{"source": line} for line in (model[0] / "source").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {**model[1], **flags, "test_file": tmp_path / "test.jsonl", "output_dir": tmp_path / "table"}
    del table["test_source_file"]
    run_translation.main(to_argv(table))
    assert (tmp_path / "table" / "generated_predictions.txt").read_text().splitlines() == lines


def test_the_best_translations_are_written_best_first(model, tmp_path):
    flags = {"num_beams": 3, "val_max_target_length": 8, "test_target_file": model[0] / "target"}
    best = translate(model, tmp_path / "one", **flags)
    first = translate(model, tmp_path / "three", num_return_sequences=3, **flags)
    assert first == best
    rows = [json.loads(line) for line in (tmp_path / "three" / "generated_nbest.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == (model[0] / "source").read_text().splitlines()
    assert all(len(row["translations"]) == 3 and len(set(row["translations"])) > 1 for row in rows)
    assert [" ".join(row["translations"][0].split()) for row in rows] == best
    scores = [
        json.loads((tmp_path / name / "all_results.json").read_text())["predict_chrf"] for name in ("one", "three")
    ]
    assert scores[0] == scores[1]


def test_sacrebleus_flags_decide_the_score(model, tmp_path):
    (tmp_path / "upper").write_text((model[0] / "source").read_text().upper())
    flags = {"test_target_file": tmp_path / "upper", "val_max_target_length": 8}
    lines = translate(model, tmp_path / "out", **flags, sacrebleu_tokenize="char", sacrebleu_lowercase=True)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    references = [(tmp_path / "upper").read_text().splitlines()]
    expected = sacrebleu.corpus_bleu(lines, references, tokenize="char", lowercase=True).score
    assert results["predict_bleu"] == pytest.approx(expected)
    assert "case:lc" in results["predict_bleu_signature"] and "tok:char" in results["predict_bleu_signature"]


def test_sacrebleu_chooses_by_the_target_language():
    assert run_translation.get_language("zho_Hans") == "zh" and run_translation.get_language("de_DE") == "de"
    assert "tok:zh" in score(["我们都很好"], ["我们都很好吗"], target_language="zh")["bleu_signature"]
    with pytest.raises(InputError, match=r"--sacrebleu_tokenize=moses: .* 13a"):
        make_bleu("moses", lowercase=False)


def score(predictions, references, **options) -> dict:
    return compute_scores(predictions, references, make_bleu(None, False, **options), CHRF())


def test_scores_are_those_counted_by_hand():
    # 7 tokens; n-grams right: 6 of 7, 5 of 6, 4 of 5, 3 of 4; equal length, so no brevity penalty
    result = score(["a b c d e f x"], ["a b c d e f g"], target_language="de")
    assert result["bleu"] == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    assert result["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert score(["a b c d e"], ["a b c d e f g"])["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert score(["a b c d"], ["a b c d"])["chrf"] == 100


# ---- languages ------------------------------------------------------------------------------------------------------------------


VOCABULARY = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *(f"▁{word}" for word in "ein haus zwei katzen a house two cats".split()),
]
SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
SIZES |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "init_std": 0.1}
SIZES |= {"dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def make_mbart():
    tokenizer = MBartTokenizer(vocab=[(piece, -2.0) for piece in VOCABULARY])
    return tokenizer, MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **SIZES)), ("de_DE", "en_XX")


def make_mbart50():
    tokenizer = MBart50Tokenizer(vocab=[(piece, -2.0) for piece in VOCABULARY])
    config = MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=2, **SIZES)
    return tokenizer, MBartForConditionalGeneration(config), ("de_DE", "en_XX")


def make_nllb():
    tokenizer = NllbTokenizer(vocab={piece: number for number, piece in enumerate(VOCABULARY)}, merges=[])
    tokenizer.add_tokens(["ein", "haus", "zwei", "katzen", "house", "two", "cats"])
    config = M2M100Config(vocab_size=len(tokenizer), **SIZES)
    return tokenizer, M2M100ForConditionalGeneration(config), ("deu_Latn", "eng_Latn")


@pytest.mark.parametrize("make", [make_mbart, make_mbart50, make_nllb])
def test_a_multilingual_model_generates_as_it_was_trained(make):
    """What the decoder starts from in training is what generation starts from; a model that has learnt two pairs by heart says them."""
    torch.manual_seed(0)
    tokenizer, network, (source_lang, target_lang) = make()
    run_translation.choose_languages(source_lang, target_lang, tokenizer, network)
    sources, targets = ["ein haus", "zwei katzen"], ["two cats", "house two cats"]
    rows = tokenizer(sources, text_target=targets)
    language = tokenizer.convert_tokens_to_ids(target_lang)
    assert all(language in labels for labels in rows["labels"])
    assert all(tokenizer.convert_tokens_to_ids(source_lang) in ids for ids in rows["input_ids"])
    collator = PairCollator(tokenizer, model=network)
    batch = collator([{name: rows[name][i] for name in ("input_ids", "attention_mask", "labels")} for i in range(2)])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = network(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    network.eval()
    generated = network.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=12)
    said = tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert [text.replace(" ", "") for text in said] == [text.replace(" ", "") for text in targets]
    decoder_inputs = batch["decoder_input_ids"]
    for made, given in zip(generated.tolist(), decoder_inputs.tolist(), strict=True):
        num_words = given.index(tokenizer.eos_token_id, 1) if tokenizer.eos_token_id in given[1:] else len(given)
        assert made[:num_words] == given[:num_words]
    assert (generated == language).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("make", "model_type"),
    [(make_mbart, "mbart"), (make_mbart50, "mbart"), (make_nllb, "m2m_100")],
    ids=lambda x: str(x)[:20],
)
def test_multilingual_models_are_fine_tuned_by_the_script(tmp_path, make, model_type):
    """With label smoothing, which the Trainer has the loss function see to: the model never gets the labels."""
    tokenizer, network, (source_lang, target_lang) = make()
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "source").write_text("ein haus\nzwei katzen\n" * 8)
    (tmp_path / "target").write_text("two cats\nhouse two cats\n" * 8)
    sides = {f"{role}_{side}_file": tmp_path / side for role in ("train", "test") for side in ("source", "target")}
    flags = {
        **sides, "model_name_or_path": tmp_path / "model", "do_train": True, "do_predict": True, "max_steps": 100, "use_cpu": True,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16, "report_to": "none",
        "log_level": "error", "source_lang": source_lang, "target_lang": target_lang, "max_source_length": 16, "max_target_length": 16,
        "save_strategy": "no", "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "label_smoothing_factor": 0.01,
    }  # fmt: skip
    run_translation.main(to_argv(flags))
    said = (tmp_path / "out" / "generated_predictions.txt").read_text().replace(" ", "").splitlines()
    assert said == ["twocats", "housetwocats"] * 8
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["predict_loss"] < 0.5
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(saved) is type(tokenizer)
