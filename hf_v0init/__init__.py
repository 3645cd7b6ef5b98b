"""A non-zero start for Adam's second moment (`v0`) in Hugging Face Transformers training.

Names are loaded when they are first used, so that `import hf_v0init` and the command line stay light.
"""

import importlib

_HOME = {
    "InputError": "errors",
    "V0InitArguments": "arguments",
    "V0InitTrainingArguments": "arguments",
    "V0InitSeq2SeqTrainingArguments": "arguments",
    "V0InitMixin": "trainer",
    "V0InitTrainer": "trainer",
    "V0DiagnosticsCallback": "diagnostics",
    "initialize_v0": "plain_loop",
    "V0InitSeq2SeqTrainer": "trainer",
    "STRATEGIES": "scales",
    "compute_random_v0_": "strategies",
    "compute_data_driven_v0_": "strategies",
    "compute_first_gradient_v0_": "strategies",
    "visit_gradients": "gradient_statistics",
    "compute_grad_sq_mean_": "gradient_statistics",
    "read_second_moment": "optimizer_state",
    "compute_multiplier": "warmup_equivalence",
    "compute_scale_for_warmup": "warmup_equivalence",
    "compute_steps_to_multiplier": "warmup_equivalence",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
