"""Limits to translations, several translations of each, language tokens, and what else `run_translation` offers beside training."""

import json
import logging
from types import SimpleNamespace

import datasets
import pytest
import sacrebleu
import torch
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
from hf_v0init.tasks.run import RunArguments
from hf_v0init.tasks.schedules import shape_schedule
from hf_v0init.tasks.translation import script as run_translation
from hf_v0init.tasks.translation.generation import EndAtLimit, GenerationArguments
from hf_v0init.tasks.translation.metrics import SacreBleu, make_bleu
from hf_v0init.tasks.translation.pairs import (
    PairCollator,
    leave_out_empty_pairs,
    load_pair_files,
)


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


# ---- limits ----------------------------------------------------------------------------------------------------------------


def test_a_sentence_ends_at_its_own_limit():
    process = EndAtLimit(torch.tensor([2, 3]), end_id=1)
    scores = torch.tensor(
        [[0.5, 0.1, 0.2], [0.3, 0.2, 0.9], [0.1, 0.6, 0.3], [0.9, 0.1, 0.0]]
    )  # two sentences, two beams
    one_made, two_made = (
        torch.zeros(4, 2, dtype=torch.long),
        torch.zeros(4, 3, dtype=torch.long),
    )  # beside the start token
    ended = torch.tensor([-torch.inf, 0.0, -torch.inf]).expand(2, 3)
    assert torch.equal(process(one_made, scores), torch.cat((ended, scores[2:])))
    assert torch.equal(process(two_made, scores), torch.cat((ended, ended)))
    assert torch.equal(process(one_made[:, :1], scores), scores)


@pytest.mark.parametrize(
    ("a", "b", "tokens", "expected"), [(None, None, 9, None), (1.5, 4, 9, 17), (None, 7, 9, 7), (2, None, 9, 18)]
)
def test_limits_are_a_times_length_plus_b(a, b, tokens, expected):
    assert GenerationArguments(max_length_a=a, max_length_b=b).limit_length(tokens) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_limits_hold_for_each_sentence_whatever_its_batch_is(model, tmp_path, beams):
    """An untrained model generates to the limit: as many tokens as the source has, and 1."""
    tokenizer = AutoTokenizer.from_pretrained(model[0] / "out")
    limits = [len(tokenizer(line)["input_ids"]) + 1 for line in (model[0] / "source").read_text().splitlines()]
    made = {}
    for batch in (1, 16):
        flags = {"per_device_eval_batch_size": batch, "num_beams": beams, "max_length_a": 1.0, "max_length_b": 1}
        heard = []
        decode = run_translation.TranslationMetrics.decode

        def listen(self, ids, heard=heard, decode=decode):
            heard.append([self.count_tokens(row) for row in ids])
            return decode(self, ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_translation.TranslationMetrics, "decode", listen)
            made[batch] = translate(model, tmp_path / str(batch), **flags)
        assert all(length <= limit for length, limit in zip(heard[-1], limits, strict=True))
        assert sum(length == limit for length, limit in zip(heard[-1], limits, strict=True)) > 8
    assert made[1] == made[16]


def test_min_length_and_ngrams_reach_the_models_settings(model, tmp_path):
    settings = SimpleNamespace(max_length=20, num_beams=1, length_penalty=1.0, min_length=0, no_repeat_ngram_size=0)
    network = SimpleNamespace(generation_config=settings)
    generation = GenerationArguments(min_length=7, no_repeat_ngram_size=2, num_beams=4, length_penalty=0.6)
    run_translation.choose_generation(generation, 30, SimpleNamespace(generation_num_beams=None), network)
    assert vars(settings) == {
        "max_length": 31,
        "num_beams": 4,
        "length_penalty": 0.6,
        "min_length": 8,
        "no_repeat_ngram_size": 2,
    }
    words = [line.split() for line in translate(model, tmp_path / "a", no_repeat_ngram_size=1, max_length_b=12)]
    assert all(len(set(line)) == len(line) for line in words)


# ---- test sets --------------------------------------------------------------------------------------------------------------


def test_sources_alone_are_translated(model, tmp_path):
    flags = {"val_max_target_length": 8, "num_sample_translations": 2}
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
    short = translate(model, tmp_path / "short", **flags, **{"tokenize": "char"})  # sacrebleu's own name of the flag
    assert short == lines
    assert "tok:char" in json.loads((tmp_path / "short" / "all_results.json").read_text())["predict_bleu_signature"]


def test_sacrebleu_chooses_by_the_target_language():
    assert run_translation.get_language("zho_Hans") == "zh" and run_translation.get_language("de_DE") == "de"
    result = SacreBleu().compute(predictions=["我们都很好"], references=["我们都很好吗"], target_language="zh")
    assert "tok:zh" in result["bleu_signature"] and result["bleu"] > 50
    plain = SacreBleu().compute(predictions=["a"], references=["a"], target_language="de")
    assert "tok:13a" in plain["bleu_signature"]
    with pytest.raises(InputError, match="--sacrebleu_tokenize=moses: choose one of 13a"):
        make_bleu("moses", lowercase=False)


# ---- training pairs -----------------------------------------------------------------------------------------------------------


def test_empty_pairs_are_left_out_and_counted(caplog):
    pairs = datasets.Dataset.from_dict({"source": ["a", " ", "b", ""], "target": ["x", "y", "", ""]})
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        assert leave_out_empty_pairs(pairs).to_dict() == {"source": ["a"], "target": ["x"]}
    assert "3 of 4 pairs have an empty side (the first: 2)" in caplog.text
    with pytest.raises(InputError, match="all pairs have an empty side"):
        leave_out_empty_pairs(pairs.select([1, 2]))


def test_a_stream_gives_the_run_of_the_same_data_in_order(tmp_path):
    for name in ("source", "target"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in [*LONG[:5], "", *LONG[5:]]))
    flags = {
        **TINY, "train_source_file": tmp_path / "source", "train_target_file": tmp_path / "target", "do_train": True, "max_steps": 6,
        "per_device_train_batch_size": 4, "cache_dir": tmp_path / "cache", "save_strategy": "no",
    }  # fmt: skip
    losses = {}
    for name, changes in (("whole", {"train_sampling_strategy": "sequential"}), ("stream", {"streaming": True})):
        run_translation.main(to_argv({**flags, **changes, "output_dir": tmp_path / name}))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [row["loss"] for row in history if "loss" in row]
    assert losses["stream"] == pytest.approx(losses["whole"], rel=1e-5) and len(losses["stream"]) == 6
    assert losses["whole"][0] - losses["whole"][-1] > 1e-3


def test_streams_of_local_files_are_read_again_and_say_what_is_wrong(tmp_path):
    (tmp_path / "a").write_text("eins\nzwei\n")
    (tmp_path / "b").write_text("one\n")
    (tmp_path / "c.txt").write_text("eins\tone\nzwei\ttwo\n")
    stream = load_pair_files("train", tmp_path / "c.txt", streaming=True)
    assert list(stream) == list(stream) == [{"source": "eins", "target": "one"}, {"source": "zwei", "target": "two"}]
    with pytest.raises(InputError, match="ends after line 1"):
        list(load_pair_files("train", None, tmp_path / "a", tmp_path / "b", streaming=True))
    with pytest.raises(InputError, match="no such file"):
        load_pair_files("train", tmp_path / "nosuch.txt", streaming=True)


# ---- learning rates -------------------------------------------------------------------------------------------------------------


def test_the_papers_schedule_from_its_start_to_its_floor():
    """fairseq's inverse_sqrt: from 1e-7 in a straight line to 5e-4 at step 4, from there 5e-4 * sqrt(4 / t), not below 2e-4."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    scheduler = get_scheduler("inverse_sqrt", optimizer, num_warmup_steps=4)
    shape_schedule(scheduler, RunArguments(warmup_init_lr=1e-7, min_lr=2e-4), 4, None)
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [
        1e-7 + step * (5e-4 - 1e-7) / 4 if step < 4 else max(2e-4, 5e-4 * (4 / step) ** 0.5) for step in range(30)
    ]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert rates[-1] == pytest.approx(2e-4) and rates[0] == pytest.approx(1e-7)


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
    data = SimpleNamespace(forced_bos_token=None, source_lang=source_lang, target_lang=target_lang)
    run_translation.choose_languages(data, tokenizer, network)
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
