"""Warnings of other packages that mean nothing in our programs, each by its exact words; everything else they say is shown.

transformers imports peft, and peft bitsandbytes; transformers' quantizers import torchao; its Trainer, on the way to accelerate,
deepspeed: wherever they are installed, and whether or not a run uses them. Only commands and scripts call this, never the
library: in a program of the user's, what is logged is the user's to decide.
"""

import logging
import re

KNOWN = {
    # Compiled for other versions of CUDA and Python than the one that is there; torchao goes on without them.
    "torchao": r"Failed to load \S*/_C_\w+\S*\.so: Could not load this library: ",
    # torchao registers two enumerations, which newer releases of torch do by themselves.
    "torch.utils._pytree": r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass and is now natively supported",
    # A faster 4-bit kernel, which no optimizer uses.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community: ",
    # Of GPT2LMHeadModel and others whose class has no loss in its name; it is the loss that a causal language model wants.
    "transformers.modeling_utils": r"`loss_type=None` was set in the config but it is unrecognized\. Using the default loss: `For",
    # Said on every machine without a GPU, with or without --deepspeed.
    "DeepSpeed": r"Setting accelerator to CPU\. If you have GPU or other accelerator, we were unable to detect it\.",
}


class _DropKnown(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


_FILTERS = {name: _DropKnown(pattern) for name, pattern in KNOWN.items()}


def drop_known_messages() -> None:
    """Keep the messages of `KNOWN` from the log of this process; call it before transformers is imported."""
    for name, known in _FILTERS.items():
        logging.getLogger(name).addFilter(known)  # which adds the same one once
