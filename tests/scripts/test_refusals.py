"""Wrong flags and wrong data, by kinds: exit status 2, one line that names value, what is allowed and remedy, before any token is made, and
not a file touched."""

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
        "no_language.jsonl": '{"translation": {"de": "a", "en": "b"}}\n{"translation": {"de": "a"}}\n',
        "null_language.jsonl": '{"translation": {"de": "a", "en": "b"}}\n{"translation": null}\n',
        "number.jsonl": '{"source": "a", "target": "b"}\n{"source": "a", "target": 7}\n',
        "short_row.csv": "source,target\na,b\nc\n",
        "long_row.csv": "source,target\na,b\nc,d,e\n",
        "open_quote.csv": 'source,target\na,b\n"c,d\ne,f\n',
        "semicolons.csv": "source;target\na;b\n",
        "tabs.csv": "source\ttarget\na\tb\n",
        "header_only.csv": "source,target\n",
        "not_json.jsonl": '{"source": "a", "target": "b"}\n{"source": "a"\n',
        "list.json": "[1, 2]",
        "no_tab.txt": "a\tb\nc\n",
        "nul.de": "ein haus\nzwei\0katzen\ndrei hunde\n",
        "nul.jsonl": '{"source": "a\\u0000", "target": "b"}\n',
        "all_empty.txt": "a\t\n \tb\n",
        "twice.yaml": "seed: 1\nlearning_rate: 1e-3\nseed: 2\n",
        "twice_spelt.yaml": "learning_rate: 1e-3\nlearning-rate: 2e-3\n",
        "twice.json": '{"seed": 1, "seed": 2}',
        "nan.yaml": "learning_rate: .nan\n",
        "a_file": "not a folder",
        "empty_folder/x": "",
        "prompts.jsonl": '{"q": "a", "a": "b"}\n{"q": "a", "a": null}\n',
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "utf16.de").write_text(GERMAN, encoding="utf-16")
    (folder / "class_a").mkdir()
    return folder


PARALLEL = "--train_source_file {0}/a.de --train_target_file {0}/a.en"
GPT2 = "--model_type gpt2 --train_file {0}/a.de"

# Flags of the Trainer that every script shares. Of each: what is given, and words of the one line.
SHARED = [
    ("--learning_rate -1e-3", ["--learning_rate=-0.001", "0 or more", "1e-3"]),
    ("--learning_rate nan", ["--learning_rate=nan", "finite"]),
    ("--learning_rate inf", ["--learning_rate=inf", "finite"]),
    ("--learning_rate fast", ["--learning_rate", "'fast'", "float"]),
    ("--per_device_train_batch_size 0", ["--per_device_train_batch_size=0", "1 or more"]),
    ("--per_device_train_batch_size -8", ["--per_device_train_batch_size=-8", "1 or more"]),
    ("--per_device_train_batch_size 2.5", ["--per_device_train_batch_size", "2.5", "int"]),
    ("--per_device_eval_batch_size 0", ["--per_device_eval_batch_size=0", "1 or more"]),
    ("--gradient_accumulation_steps 0", ["--gradient_accumulation_steps=0", "1 or more"]),
    ("--eval_accumulation_steps 0", ["--eval_accumulation_steps=0", "1 or more"]),
    ("--num_train_epochs 0", ["--num_train_epochs=0", "above 0"]),
    ("--num_train_epochs -1", ["--num_train_epochs=-1", "above 0"]),
    ("--num_train_epochs nan", ["--num_train_epochs=nan", "above 0"]),
    ("--max_steps 0", ["--max_steps=0", "1 or more", "--num_train_epochs"]),
    ("--max_steps -5", ["--max_steps=-5", "1 or more"]),
    ("--warmup_steps -1", ["warmup_steps", "-1"]),
    ("--warmup_steps 2.5", ["--warmup_steps=2.5", "a share of the run"]),
    ("--warmup_steps inf", ["--warmup_steps=inf", "a share of the run"]),
    ("--logging_steps -1", ["--logging_steps=-1", "1 or more"]),
    ("--save_steps 0", ["--save_steps=0", "1 or more"]),
    ("--eval_steps -2", ["--eval_steps=-2", "1 or more"]),
    ("--save_total_limit 0", ["--save_total_limit=0", "1 or more"]),
    ("--adam_beta1 1.0", ["--adam_beta1=1.0", "less than 1"]),
    ("--adam_beta2 1", ["--adam_beta2=1.0", "less than 1"]),
    ("--adam_beta2 1.5", ["--adam_beta2=1.5", "less than 1"]),
    ("--adam_beta2 -0.1", ["--adam_beta2=-0.1", "at least 0"]),
    ("--adam_beta2 nan", ["--adam_beta2=nan", "less than 1"]),
    ("--adam_epsilon -1e-8", ["--adam_epsilon=-1e-08", "0 or more"]),
    ("--weight_decay -0.1", ["--weight_decay=-0.1", "0 or more"]),
    ("--weight_decay inf", ["--weight_decay=inf", "finite"]),
    ("--max_grad_norm -1", ["--max_grad_norm=-1.0", "0 or more"]),
    ("--max_grad_norm nan", ["--max_grad_norm=nan", "finite"]),
    ("--label_smoothing_factor 1", ["--label_smoothing_factor=1.0", "less than 1"]),
    ("--label_smoothing_factor -0.1", ["--label_smoothing_factor=-0.1", "at least 0"]),
    ("--seed -1", ["--seed=-1", "4294967295"]),
    ("--seed 4294967296", ["--seed=4294967296", "4294967295"]),
    ("--data_seed -3", ["--data_seed=-3"]),
    ("--dataloader_num_workers -1", ["--dataloader_num_workers=-1", "0 or more"]),
    ("--lr_scheduler_type linaer", ["--lr_scheduler_type", "linaer", "linear"]),
    ("--lr_scheduler_kwargs {\"cycles\":2}", ["--lr_scheduler_type=linear", "cycles"]),
    ("--lr_scheduler_kwargs {cycles", ["JSON"]),
    ("--optim adamm", ["--optim", "adamm", "closest are"]),
    ("--optim_args beta9", ["--optim_args=beta9", "key=value"]),
    ("--optim_args amsgrad", ["--optim_args=amsgrad", "key=value"]),
    ("--cache_dir {0}/a_file/cache", ["--cache_dir", "a_file is a file"]),
    ("--cache_dir /proc/nowhere", ["--cache_dir=/proc/nowhere", "cannot be written"]),
    ("--output_dir {0}/a_file", ["a_file", "is a file", "--output_dir"]),
    ("--output_dir /proc/nowhere/out", ["/proc/nowhere/out", "--output_dir"]),
    ("--report_to nowhere", ["--report_to=nowhere", "none"]),
    ("--resume_from_checkpoint {0}/nosuch", ["there is no folder", "nosuch"]),
    ("--resume_from_checkpoint true", ["holds no checkpoint"]),
    ("--seed=1 stray", ["'stray'", "belongs to no flag"]),
    ("--learnin_rate 1", ["--learnin_rate", "did you mean --learning_rate?"]),
]  # fmt: skip

# (script, what is given beside the usual flags, words)
OWN = [
    # a metric that will not be there
    ("translation", "--metric_for_best_model bleu", ["--metric_for_best_model=bleu", "gives loss", "--predict_with_generate"]),
    ("translation", "--metric_for_best_model eval_accuracy", ["=eval_accuracy", "gives loss"]),
    ("translation", "--metric_for_best_model blue --predict_with_generate", ["=blue", "did you mean bleu?"]),
    ("clm", "--metric_for_best_model perplexty", ["=perplexty", "did you mean perplexity?"]),
    ("images", "--metric_for_best_model bleu", ["=bleu", "loss, accuracy"]),
    # configurations out of range
    ("translation", "--config_overrides d_model=0", ["d_model=0", "1 or more"]),
    ("translation", "--config_overrides d_model=-16", ["d_model=-16", "1 or more"]),
    ("translation", "--config_overrides d_model=big", ["d_model=big", "a whole number"]),
    ("translation", "--config_overrides encoder_layers=0", ["encoder_layers=0", "1 or more"]),
    ("translation", "--config_overrides dropout=1.5", ["dropout=1.5", "less than 1"]),
    ("translation", "--config_overrides dropout=-0.1", ["dropout=-0.1", "at least 0"]),
    ("translation", "--config_overrides dropout=nan", ["dropout=nan", "finite"]),
    ("translation", "--config_overrides d_model=30", ["d_model=30", "marian"]),
    ("translation", "--config_overrides activation_function=rleu", ["activation_function=rleu", "an activation", "relu"]),
    ("translation", "--config_overrides d_modell=16", ["no d_modell", "did you mean d_model?"]),
    ("translation", "--config_overrides d_model", ["'d_model' is not key=value"]),
    ("translation", "--config_overrides d_model=16,,dropout=0", ["'' is not key=value"]),
    ("clm", "--config_overrides n_embd=0", ["n_embd=0", "1 or more"]),
    ("clm", "--config_overrides n_embd=10,n_head=3", ["n_embd=10,n_head=3", "gpt2"]),
    ("clm", "--config_overrides activation_function=gelo", ["activation_function=gelo", "an activation", "gelu"]),
    ("images", "--config_overrides hidden_size=-1", ["hidden_size=-1", "1 or more"]),
    # languages
    ("translation", "--source_lang de --target_lang de", ["--source_lang=de and --target_lang=de", "the same"]),
    # names and folders
    ("translation", "--model_name_or_path ./nosuch", ["--model_name_or_path=./nosuch", "no such file or folder"]),
    ("translation", "--tokenizer_name ./no/such", ["--tokenizer_name=./no/such", "no such file or folder"]),
    ("translation", "--config_name nosuch.json", ["--config_name=nosuch.json", "no such file"]),
    ("translation", "--tokenizer_name {0}/a_file", ["--tokenizer_name", "is a file"]),
    ("translation", "--tokenizer_name {0}/empty_folder", ["empty_folder", "cannot be loaded"]),
    ("clm", "-model_type --model_name_or_path ~/nosuch", ["=~/nosuch", "no such file or folder"]),
    ("clm", "-model_type --model_name_or_path {0}/empty_folder", ["empty_folder", "config.json"]),
    ("clm", "-model_type --model_name_or_path a|b", ["'a|b'", "cannot be loaded"]),
    ("images", "-model_type --model_name_or_path /no/such/model", ["=/no/such/model", "no such file or folder"]),
    ("clm", "--model_type gtp2", ["--model_type=gtp2", "gpt2"]),
    # generation
    ("translation", "--num_beams 0", ["--num_beams=0", "1 or more"]),
    ("translation", "--length_penalty nan --num_beams 2", ["--length_penalty=nan", "finite"]),
    ("translation", "--num_return_sequences 3", ["--num_return_sequences=3", "--num_beams 3"]),
    ("translation", "--min_length 300", ["--min_length=300", "--val_max_target_length=256"]),
    ("translation", "--no_repeat_ngram_size 0", ["--no_repeat_ngram_size=0", "1 or more"]),
    ("translation", "--max_length_a -1", ["--max_length_a=-1", "0 or more"]),
    ("translation", "--max_length_a 0", ["leave no token", "--max_length_b"]),
    ("translation", "--num_sample_translations -1", ["--num_sample_translations=-1"]),
    ("translation", "--sacrebleu_tokenize moses", ["--sacrebleu_tokenize=moses", "13a"]),
    ("translation", "--generation_num_beams 0", ["--generation_num_beams=0", "1 or more"]),
    # the schedule
    ("translation", "--warmup_init_lr -1 --warmup_steps 5", ["--warmup_init_lr=-1", "0 or more"]),
    ("translation", "--warmup_init_lr 1e-7", ["--warmup_init_lr=1e-07", "--warmup_steps"]),
    ("translation", "--min_lr 1", ["--min_lr=1.0", "--learning_rate"]),
    # data flags
    ("translation", "--streaming", ["--streaming", "--max_steps"]),
    ("translation", "--streaming --max_steps 2 --max_tokens_per_batch 64", ["--max_tokens_per_batch=64", "--streaming"]),
    ("translation", "--shuffle_buffer_size 5", ["--shuffle_buffer_size=5", "--streaming"]),
    ("translation", "--max_source_length 0", ["--max_source_length=0", "1 or more"]),
    ("translation", "--max_source_length 5000", ["--max_source_length=5000", "1024 positions"]),
    ("translation", "--vocab_size 0", ["--vocab_size=0", "1 or more"]),
    ("translation", "--batch_eval_metrics", ["--batch_eval_metrics"]),
    ("translation", "--dtype float8", ["--dtype", "float8", "bfloat16"]),
    # flags without effect, and what would end in a traceback
    ("images", "--crop_padding 2", ["--crop_padding=2", "--random_crop pad"]),
    ("images", "--lr_decay_factor 0.5", ["--lr_decay_factor=0.5", "--lr_decay_epochs"]),
    ("images", "--max_tokens_per_batch 64", ["--max_tokens_per_batch=64", "images"]),
    ("clm", "--save_strategy best", ["--save_strategy=best", "--metric_for_best_model"]),
    ("clm", "--save_strategy best --metric_for_best_model loss", ["--save_strategy=best", "--eval_strategy"]),
    ("clm", "--fsdp full_shard", ["--fsdp", "torchrun"]),
    ("clm", "--deepspeed {0}/list.json", ["list.json", "one JSON object"]),
    ("gan", "--do_predict", ["--do_predict=True", "no effect"]),
    ("gan", "--save_strategy best --metric_for_best_model loss", ["--save_strategy=best"]),
    # files of flags
    ("translation", "{0}/twice.yaml", ["twice.yaml", "'seed' is given twice", "line 3"]),
    ("translation", "{0}/twice_spelt.yaml", ["'learning_rate' is given twice"]),
    ("translation", "{0}/twice.json", ["'seed' is given twice"]),
    ("translation", "{0}/nan.yaml", ["--learning_rate=nan"]),
    # rows and lines
    ("translation", "-train --train_file {0}/no_language.jsonl --source_lang de --target_lang en", ["example 2", "target is missing"]),
    ("translation", "-train --train_file {0}/null_language.jsonl --source_lang de --target_lang en", ["example 2", "source is missing"]),
    ("translation", "-train --train_file {0}/no_language.jsonl --source_lang de --target_lang fr", ["--target_lang=fr", "de, en"]),
    ("translation", "-train --train_file {0}/number.jsonl", ["example 2", "its target is no text but 7"]),
    ("translation", "-train --train_file {0}/short_row.csv", ["line 3", "1 fields", "source, target"]),
    ("translation", "-train --train_file {0}/long_row.csv", ["line 3", "3 fields", "quotes"]),
    ("translation", "-train --train_file {0}/open_quote.csv", ["line 3", "quote", "never closed"]),
    ("translation", "-train --train_file {0}/semicolons.csv", ["separated by ';'"]),
    ("translation", "-train --train_file {0}/tabs.csv", ["separated by tabs"]),
    ("translation", "-train --train_file {0}/header_only.csv", ["no rows"]),
    ("translation", "-train --train_file {0}/not_json.jsonl", ["line 2", "JSON"]),
    ("translation", "-train --train_file {0}/list.json", ["list of JSON objects"]),
    ("translation", "-train --train_file {0}/no_tab.txt", ["line 2", "<TAB>"]),
    ("translation", "-train --train_file {0}/nul.jsonl", ["example 1", "NUL"]),
    ("translation", "-train --train_file {0}/all_empty.txt", ["all pairs have an empty side"]),
    ("translation", "-train --train_file {0}/empty_folder", ["empty_folder", "is a folder"]),
    ("translation", "-train --train_source_file {0}/nul.de --train_target_file {0}/a.en", ["line 2", "NUL"]),
    ("translation", "-train --train_source_file {0}/utf16.de --train_target_file {0}/a.en", ["UTF-8", "iconv"]),
    ("clm", "--train_file {0}/short_row.csv", ["line 3", "1 fields"]),
    ("clm", "--train_file {0}/nul.de", ["line 2", "NUL"]),
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
    assert len(line) < 1500, "a whole list of choices"
    assert read_all(inputs) == before and not (inputs / "out").exists()
    return line


@pytest.mark.parametrize(("given", "words"), SHARED, ids=[case[0] for case in SHARED])
def test_flags_that_all_scripts_share(inputs, capsys, monkeypatch, given, words):
    script = list(SCRIPTS)[[case[0] for case in SHARED].index(given) % 3]  # one of the scripts each, in turn
    if script == "clm" and "label_smoothing" in given:
        script = "translation"
    line = refuse_before_tokenizing(script, given, inputs, capsys, monkeypatch)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("script", "given", "words"), OWN, ids=[f"{case[0]} {case[1]}" for case in OWN])
def test_flags_and_data_of_one_script(inputs, capsys, monkeypatch, script, given, words):
    line = refuse_before_tokenizing(script, given, inputs, capsys, monkeypatch)
    assert all(word in line for word in words), line
