"""Wrong flags and wrong data, by kinds: exit status 2 and one line that names the value, before any token is made, and not a file touched."""

import gzip
from pathlib import Path

import pytest
from script_runs import load_script, quiet_logging, refuse  # noqa: F401

GERMAN, ENGLISH = "ein haus\nzwei katzen\ndrei hunde\n", "a house\ntwo cats\nthree dogs\n"
SCRIPTS = {"translation": "translate", "clm": "clm", "images": "images", "gan": "dcgan"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    texts = {
        "a.de": GERMAN,
        "a.en": ENGLISH,
        "short.en": "a house\n",
        "empty.txt": "",
        "null.jsonl": '{"source": "a", "target": "b"}\n{"source": "a", "target": null}\n',
        "columns.jsonl": '{"x": "a"}\n',
        "long_row.csv": "source,target\na,b\nc,d,e\n",
        "semicolons.csv": "source;target\na;b\n",
        "not_json.jsonl": '{"source": "a", "target": "b"}\n{"source": "a"\n',
        "list.json": "[1, 2]",
        "all_empty.txt": "a\t\n \tb\n",
        "nan.yaml": "learning_rate: .nan\n",
        "twice_spelt.yaml": "learning_rate: 1.0e-3\nlearning-rate: 1.0e-3\n",
        "a_file": "not a folder",
        "empty_folder/x": "",
        "prompts.jsonl": '{"q": "a", "a": "b"}\n{"q": "a", "a": null}\n',
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "utf16.de").write_text(GERMAN, encoding="utf-16")
    (folder / "cut.de.gz").write_bytes(gzip.compress(GERMAN.encode() * 200)[:60])
    (folder / "class_a").mkdir()
    return folder


PARALLEL = "--train_source_file {0}/a.de --train_target_file {0}/a.en"
GPT2 = "--model_type gpt2 --train_file {0}/a.de"

# Flags of the Trainer that every script shares; the line must name the first.
SHARED = """
--learning_rate -1e-3
--learning_rate nan
--learning_rate fast
--per_device_train_batch_size 0
--per_device_train_batch_size 2.5
--gradient_accumulation_steps 0
--num_train_epochs 0
--max_steps 0
--max_steps -5
--warmup_steps -1
--warmup_steps 2.5
--logging_steps -1
--save_steps 0
--save_total_limit 0
--adam_beta1 1.0
--adam_beta2 nan
--adam_epsilon -1e-8
--weight_decay -0.1
--max_grad_norm -1
--label_smoothing_factor 1
--seed -1
--seed 4294967296
--dataloader_num_workers -1
--lr_scheduler_type linaer
--lr_scheduler_kwargs {"cycles":2}
--optim adamm
--optim_args beta9
--cache_dir {0}/a_file/cache
--output_dir {0}/a_file
--report_to nowhere
--resume_from_checkpoint {0}/nosuch
--resume_from_checkpoint true
--v0_init newton
--v0_scale -3
--v0_inti random
""".strip().splitlines()

# (script, what is given beside the usual flags, words of the line)
OWN = [
    # a metric that will not be there
    ("translation", "--metric_for_best_model bleu", ["bleu", "gives loss"]),
    ("clm", "--metric_for_best_model perplexty", ["perplexty", "perplexity"]),
    # configurations
    ("translation", "--config_overrides d_model=big", ["d_model=big"]),
    ("translation", "--config_overrides d_modell=16", ["d_modell"]),
    ("translation", "--config_overrides d_model", ["d_model"]),
    ("translation", "--config_overrides d_model=30", ["30"]),
    ("clm", "--config_overrides n_embd=10,n_head=3", ["10", "3"]),
    ("clm", "--model_type gtp2", ["gtp2"]),
    ("translation", "--model_type gpt2", ["gpt2"]),
    ("translation", "--model_type bart --config_name post_norm", ["--config_name", "--model_type"]),
    ("clm", "-model_type", ["--model_type"]),
    # names and folders
    ("translation", "--model_name_or_path ./nosuch", ["./nosuch"]),
    ("translation", "--tokenizer_name {0}/empty_folder", ["empty_folder"]),
    ("clm", "-model_type --model_name_or_path {0}/empty_folder", ["empty_folder"]),
    ("clm", "-model_type --model_name_or_path a|b", ["a|b"]),
    # flags that have no effect, or exclude each other
    ("translation", "--source_lang de --target_lang de", ["--source_lang=de"]),
    ("translation", "--num_beams 0", ["--num_beams=0"]),
    ("translation", "--length_penalty 2", ["--length_penalty=2.0", "--num_beams"]),
    ("translation", "--num_return_sequences 3", ["--num_return_sequences=3", "--num_beams 3"]),
    ("translation", "--sacrebleu_tokenize moses", ["moses", "13a"]),
    ("translation", "--batch_eval_metrics", ["--batch_eval_metrics"]),
    ("clm", "--streaming", ["--streaming", "--max_steps"]),
    ("clm", "--shuffle_buffer_size 5", ["--shuffle_buffer_size=5", "--streaming"]),
    ("translation", "--max_source_length 5000", ["--max_source_length=5000", "1024"]),
    ("translation", "--vocab_size 0", ["--vocab_size=0"]),
    ("translation", "--vocab_size 100", ["100"]),
    ("translation", "--average_checkpoints 3 --save_total_limit 2", ["=3", "--save_total_limit"]),
    ("translation", "--v0_init random --optim sgd", ["SGD"]),
    ("images", "--lr_decay_factor 0.5", ["--lr_decay_factor=0.5", "--lr_decay_epochs"]),
    ("images", "--max_tokens_per_batch 64", ["--max_tokens_per_batch=64"]),
    ("clm", "--early_stopping_patience 2", ["--early_stopping_patience=2", "--eval_strategy"]),
    ("clm", "--streaming --max_steps 5 --max_tokens_per_batch 64", ["--max_tokens_per_batch", "--streaming"]),
    # what would end in a traceback
    ("clm", "--save_strategy best", ["--save_strategy=best", "--metric_for_best_model"]),
    ("clm", "--save_strategy best --metric_for_best_model loss", ["--save_strategy=best", "--eval_strategy"]),
    ("clm", "--fsdp full_shard", ["--fsdp"]),
    ("clm", "--deepspeed {0}/list.json", ["list.json"]),
    ("gan", "--do_predict", ["--do_predict=True"]),
    ("gan", "--save_strategy best --metric_for_best_model loss", ["--save_strategy=best"]),
    # files of flags
    ("translation", "{0}/twice_spelt.yaml", ["'learning_rate' is given twice"]),
    ("translation", "{0}/nan.yaml", ["--learning_rate=nan"]),
    ("translation", "{0}/a.de", ["a.de"]),
    # data
    ("translation", "-train", ["no data"]),
    ("translation", "--dataset_name nobody/nothing", ["--dataset_name"]),
    ("translation", "-train --train_file {0}/null.jsonl", ["None"]),
    ("translation", "-train --train_file {0}/columns.jsonl", ["'source'", "'x'"]),
    ("translation", "-train --train_file {0}/long_row.csv", ["long_row.csv", "line 3"]),
    ("translation", "-train --train_file {0}/semicolons.csv", ["source;target"]),
    ("translation", "-train --train_file {0}/not_json.jsonl", ["not_json.jsonl"]),
    ("translation", "-train --train_file {0}/list.json", ["'source'"]),
    ("translation", "-train --train_file {0}/a.de", ["a.de", "<TAB>"]),
    ("translation", "-train --train_file {0}/all_empty.txt", ["empty side"]),
    ("translation", "-train --train_file {0}/empty_folder", ["empty_folder"]),
    ("translation", "-train --train_source_file {0}/a.de", ["--train_target_file"]),
    ("translation", "-train --train_source_file {0}/a.de --train_target_file {0}/short.en", ["3 lines", "has 1"]),
    ("translation", "-train --train_source_file {0}/utf16.de --train_target_file {0}/a.en", ["utf16.de", "utf-8"]),
    ("translation", "-train --train_source_file {0}/cut.de.gz --train_target_file {0}/a.en", ["cut.de.gz"]),
    ("translation", "--do_eval", ["no validation data"]),
    ("clm", "--train_file {0}/empty.txt", ["empty.txt"]),
    ("clm", "--train_file {0}/missing.txt", ["missing.txt"]),
    ("clm", "--train_file {0}/prompts.jsonl --prompt_column q --completion_column a", ["'a'", "None"]),
]  # fmt: skip


def usual(script: str) -> dict[str, str]:
    flags = {
        "translation": f"{PARALLEL} --do_train",
        "clm": f"{GPT2} --do_train",
        "images": "--model_type vit --train_dir {0}/class_a --do_train",
        "gan": "--train_dir {0}/class_a --do_train",
    }[script].split()
    named = {}
    for token in flags:
        if token.startswith("--"):
            name = token
            named[name] = ""
        else:
            named[name] = token
    return named


def compose_argv(script: str, given: str, folder: Path) -> list[str]:
    flags, words = usual(script), given.split()
    file = [words.pop(0)] if words and not words[0].startswith("-") else []
    if words and words[0] == "-train":
        flags = {name: value for name, value in flags.items() if not name.startswith("--train_")}
        words.pop(0)
    elif words and words[0] == "-model_type":
        del flags["--model_type"]
        words.pop(0)
    names = {word for word in words if word.startswith("--")}
    rest = [part for name, value in flags.items() if name not in names for part in (name, value) if part]
    if "--output_dir" not in names:
        rest += ["--output_dir", str(folder / "out")]
    if "--report_to" not in names:
        rest += ["--report_to", "none"]
    return [word.replace("{0}", str(folder)) for word in [*file, *rest, "--use_cpu", *words]]


def read_all(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_before_tokenizing(script: str, given: str, inputs: Path, capsys, monkeypatch) -> str:
    """The one line with which the script ends, before a token is made and without a file touched."""
    module = load_script(SCRIPTS[script])
    before = read_all(inputs)

    def must_not_be_called(*args, **kwargs):
        raise AssertionError("tokenizing has begun")

    for name in ("tokenize_pairs", "tokenize_texts", "tokenize_completions"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, must_not_be_called)
    line = refuse(module, compose_argv(script, given, inputs), [], capsys, monkeypatch)
    assert read_all(inputs) == before and not (inputs / "out").exists()
    return line


@pytest.mark.parametrize("given", SHARED)
def test_flags_that_all_scripts_share(inputs, capsys, monkeypatch, given):
    script = list(SCRIPTS)[SHARED.index(given) % 3]  # one of the scripts each, in turn
    if script == "clm" and "label_smoothing" in given:
        script = "translation"
    line = refuse_before_tokenizing(script, given, inputs, capsys, monkeypatch)
    name, value = given.removeprefix("--").split()
    assert name in line or value.rpartition("/")[2] in line, line


@pytest.mark.parametrize(("script", "given", "words"), OWN, ids=[f"{case[0]} {case[1]}" for case in OWN])
def test_flags_and_data_of_one_script(inputs, capsys, monkeypatch, script, given, words):
    line = refuse_before_tokenizing(script, given, inputs, capsys, monkeypatch)
    assert all(word in line for word in words), line
