"""A non-zero start for Adam's second moment (`v0`) in Hugging Face Transformers training.

Names are loaded when they are first used, so that `import hf_v0init` and the command line stay light.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers, which see nothing of `__getattr__`
    from .diagnostics import V0DiagnosticsCallback as V0DiagnosticsCallback
    from .errors import InputError as InputError
    from .estimation.trust_radius import TrustRadius as TrustRadius
    from .hook import attach_v0 as attach_v0, measure_trust_radius as measure_trust_radius
    from .loop.initialize import initialize_v0 as initialize_v0
    from .method.length import compute_warmup_length as compute_warmup_length
    from .method.multiplier import (
        compute_multiplier as compute_multiplier,
        compute_scale_for_warmup as compute_scale_for_warmup,
        compute_steps_to_multiplier as compute_steps_to_multiplier,
    )
    from .second_moment.state import read_second_moment as read_second_moment
    from .settings import V0InitArguments as V0InitArguments
    from .trainer.arguments import (
        V0InitSeq2SeqTrainingArguments as V0InitSeq2SeqTrainingArguments,
        V0InitTrainingArguments as V0InitTrainingArguments,
    )
    from .trainer.callback import V0InitCallback as V0InitCallback
    from .trainer.mixin import (
        V0InitMixin as V0InitMixin,
        V0InitSeq2SeqTrainer as V0InitSeq2SeqTrainer,
        V0InitTrainer as V0InitTrainer,
    )
    from .trainer.safe_checkpoints import SafeCheckpointsMixin as SafeCheckpointsMixin

_HOME = {
    "InputError": "errors",
    "V0InitArguments": "settings",
    "V0InitTrainingArguments": "trainer.arguments",
    "V0InitSeq2SeqTrainingArguments": "trainer.arguments",
    "V0InitCallback": "trainer.callback",
    "V0InitMixin": "trainer.mixin",
    "V0InitTrainer": "trainer.mixin",
    "V0InitSeq2SeqTrainer": "trainer.mixin",
    "SafeCheckpointsMixin": "trainer.safe_checkpoints",
    "V0DiagnosticsCallback": "diagnostics",
    "attach_v0": "hook",
    "initialize_v0": "loop.initialize",
    "measure_trust_radius": "hook",
    "TrustRadius": "estimation.trust_radius",
    "compute_warmup_length": "method.length",
    "read_second_moment": "second_moment.state",
    "compute_multiplier": "method.multiplier",
    "compute_scale_for_warmup": "method.multiplier",
    "compute_steps_to_multiplier": "method.multiplier",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
