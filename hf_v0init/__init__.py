"""A non-zero start for Adam's second moment (`v0`) in Hugging Face Transformers training.

Names are loaded when they are first used, so that `import hf_v0init` and the command line stay light.
"""

import importlib

_HOME = {
    "InputError": "errors",
    "V0InitArguments": "settings",
    "V0InitTrainingArguments": "trainer.arguments",
    "V0InitSeq2SeqTrainingArguments": "trainer.arguments",
    "V0InitCallback": "trainer.callback",
    "V0InitMixin": "trainer.mixin",
    "V0InitTrainer": "trainer.mixin",
    "V0InitSeq2SeqTrainer": "trainer.mixin",
    "V0DiagnosticsCallback": "diagnostics.callback",
    "attach_v0": "initialization.first_steps",
    "initialize_v0": "loop.initialize",
    "read_second_moment": "optimizers.state",
    "compute_multiplier": "closed_form.multiplier",
    "compute_scale_for_warmup": "closed_form.multiplier",
    "compute_steps_to_multiplier": "closed_form.multiplier",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
