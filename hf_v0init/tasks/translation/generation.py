"""How translations are generated: the flags, a length limit for every sentence, several translations of each."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, Seq2SeqTrainer

from hf_v0init import InputError

from ..script_support import flag

logger = logging.getLogger("hf_v0init")


@dataclass
class GenerationArguments:
    """generation: how text is generated"""

    num_beams: int | None = flag(None, "Beams of the search when generating. Default: the model's (1 from scratch).")
    length_penalty: float | None = flag(None, "Exponent of the length by which beam scores are divided.")
    min_length: int | None = flag(None, "Fewest tokens of a translation, its end not counted.")
    no_repeat_ngram_size: int | None = flag(None, "Let no sequence of so many tokens occur twice in a translation.")
    num_return_sequences: int | None = flag(
        None, "Best translations of each test sentence, at most --num_beams, to generated_nbest.jsonl. Default: 1."
    )
    max_length_a: float | None = flag(
        None,
        "Longest translation as a * source tokens + b (fairseq's --max-len-a, --max-len-b), at most --val_max_target_length. "
        "An untrained model generates to the limit. Default: no such limit; 0 with --max_length_b.",
    )
    max_length_b: int | None = flag(None, "The b of it, in tokens. Default: 0 with --max_length_a.")
    num_sample_translations: int = flag(
        3, "Sentences shown with their translations in the log and on the card; 0: none."
    )
    sacrebleu_tokenize: str | None = flag(
        None,
        "sacrebleu's --tokenize, such as 13a, intl, zh, ja-mecab, char, none. Default: what sacrebleu takes for --target_lang.",
        aliases=["--tokenize"],
    )
    sacrebleu_lowercase: bool = flag(
        False, "sacrebleu's --lowercase: BLEU and chrF without regard to case.", aliases=["--lowercase"]
    )

    def require_room(self) -> None:
        """Refuse a limit that leaves no token for a translation."""
        if (self.max_length_a is not None or self.max_length_b is not None) and self.limit_length(1) < 1:
            raise InputError(
                f"--max_length_a={self.max_length_a or 0} and --max_length_b={self.max_length_b or 0} leave no token for a "
                "translation; raise --max_length_b, for example to 10"
            )

    def limit_length(self, num_source_tokens: int) -> int | None:
        """Return the most tokens, the end included, of a translation of so many source tokens; None: no limit of this kind."""
        if self.max_length_a is None and self.max_length_b is None:
            return None
        return int((self.max_length_a or 0.0) * num_source_tokens + (self.max_length_b or 0))


def require_effect(generation: GenerationArguments, num_beams: int, max_length: int) -> None:
    """Refuse flags that have no effect with so many beams, or that exclude each other.

    Args:
        max_length: tokens of the longest translation.

    Raises:
        InputError: naming the flag and the one it needs.
    """
    if generation.length_penalty not in (None, 1.0) and num_beams == 1:
        raise InputError(
            f"--length_penalty={generation.length_penalty}: has no effect without --num_beams of 2 or more"
        )
    wanted = generation.num_return_sequences or 1
    if wanted > num_beams:
        raise InputError(f"--num_return_sequences={wanted}: needs as many beams; give --num_beams {wanted} or more")
    if generation.min_length is not None and generation.min_length >= max_length:
        raise InputError(
            f"--min_length={generation.min_length}: must be less than the longest translation, --val_max_target_length={max_length}"
        )


def choose_generation(generation: GenerationArguments, max_length: int, training, network: PreTrainedModel) -> None:
    """Put beams, penalties and the longest output into the model's generation settings, which are saved with it.

    Raises:
        InputError: as `require_effect`.
    """
    settings = network.generation_config
    settings.max_length = max_length + 1  # counts the start token
    beams = generation.num_beams or training.generation_num_beams or settings.num_beams or 1
    settings.num_beams = training.generation_num_beams = beams
    require_effect(generation, beams, max_length)
    if generation.length_penalty is not None:
        settings.length_penalty = generation.length_penalty
    if generation.min_length is not None:
        settings.min_length = generation.min_length + 1
    if generation.no_repeat_ngram_size is not None:
        settings.no_repeat_ngram_size = generation.no_repeat_ngram_size


class EndAtLimit(LogitsProcessor):
    """Ends every sentence of a batch at its own length, whatever the others of the batch are.

    Args:
        limits: most tokens generated for each sentence, the end included; shape (sentences,), int64.
        end_id: the token that ends a sentence.
    """

    def __init__(self, limits: torch.Tensor, end_id: int) -> None:
        self.limits = limits
        self.end_id = end_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, shape (sentences * beams, vocabulary), with the end alone possible where the limit is reached."""
        limits = self.limits.repeat_interleave(len(scores) // len(self.limits))
        at_limit = input_ids.shape[1] >= limits  # with the start token, that many
        only_end = torch.full_like(scores, float("-inf"))
        only_end[:, self.end_id] = 0.0
        return torch.where(at_limit[:, None], only_end, scores)


class GenerationMixin(Seq2SeqTrainer):
    """Put before a Seq2SeqTrainer: `generation` limits the length of each sentence; `num_best` asks for several of each.

    With several, predictions have shape (samples, num_best * length), the best first.
    """

    def __init__(self, *args, generation: GenerationArguments | None = None, **kwargs) -> None:
        self.generation = generation or GenerationArguments()
        self.num_best = 1
        super().__init__(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Predict as the Trainer does, within the limits."""
        if prediction_loss_only or not self.args.predict_with_generate:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        options = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        num_sources = inputs["attention_mask"].sum(dim=1)
        limits = [self.generation.limit_length(count) for count in num_sources.tolist()]
        if limits and limits[0] is not None:
            longest = self.model.generation_config.max_length
            options["max_length"] = min(longest, max(limits) + 1)
            end_id = self.processing_class.eos_token_id
            options["logits_processor"] = LogitsProcessorList(
                [EndAtLimit(torch.tensor(limits, device=num_sources.device), end_id)]
            )
        if self.num_best > 1:
            options["num_return_sequences"] = self.num_best
        loss, generated, labels = super().prediction_step(model, inputs, False, ignore_keys, **options)
        return loss, generated.reshape(len(num_sources), -1), labels
