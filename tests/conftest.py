"""Tiny models and data that every test can afford."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.set_num_threads(1)

VOCAB = 40


def make_gpt2(seed: int = 0, dropout: float = 0.1, **overrides) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **overrides,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_sequences(num: int = 48, length: int = 10, seed: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, VOCAB, (num, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture
def sequences():
    return make_sequences()


@pytest.fixture
def our_log(caplog):
    """What this package logs."""
    with caplog.at_level("INFO", logger="hf_v0init"):
        yield caplog


@pytest.fixture
def make_accelerator():
    """Accelerate keeps its state for the process: a test must not leave it to the next."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def make(**options) -> Accelerator:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def find_data():
    """A function that returns the folder of a data set, "multi30k" or "ptb", or skips the test that asks for it."""

    def find(name: str) -> Path:
        places = [Path(__file__).resolve().parents[1] / "data"]
        if "HF_V0INIT_DATA" in os.environ:
            places.append(Path(os.environ["HF_V0INIT_DATA"]))
        for place in places:
            if (place / name).is_dir():
                return place / name
        pytest.skip(
            f"no {name} in {' or '.join(map(str, places))}: configs/README.md says how to get it (or set HF_V0INIT_DATA)"
        )

    return find
