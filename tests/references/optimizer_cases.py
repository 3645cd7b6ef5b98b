"""How to build the optimizer of each row of the table, with the reference for it, and how far the two are apart."""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import optimizer_references as slow
import pytest
import torch
from torch import nn

from hf_v0init import read_second_moment
from hf_v0init.second_moment.state import SecondMoment
from hf_v0init.second_moment.table import ROWS, SUPPORTED_ROWS
from hf_v0init.sharding.parts import ParamShard, get_local_part

LR = 1e-2
SHAPE = (64, 128)  # 8,192 elements: 8-bit optimizers quantise from 4,096 on


@dataclass(frozen=True)
class Case:
    """A way to build the optimizer of a row, and the reference for it."""

    row: tuple[str, str]  # name, package
    path: str  # module:Class
    reference: Callable
    options: dict = field(default_factory=dict)
    num_steps: int = 2

    def make(self, parameters):
        return load(self.path)(parameters, **self.options)


def load(path: str):
    """The class at module:Class; skips the test where the package is not installed."""
    module, name = path.split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            pytest.skip(f"{module} cannot be imported here: {error}")


BETAS, B2 = {"betas": (0.9, 0.98)}, {"b2": 0.98}
DECAYED = (BETAS | {"weight_decay": 0.1}, B2 | {"decay": 0.1})
BY_DEFAULT = (BETAS, B2 | {"decay": 1e-2})  # which they have themselves
BNB, AO, PO = "bitsandbytes", "torchao", "pytorch-optimizer"
KINDS = ({"foreach": False, "fused": False}, {"foreach": True}, {"fused": True})
ADEMAMIX = [
    {"optim_bits": bits, "is_paged": paged, "betas": (0.9, 0.98, 0.999)} for bits in (8, 32) for paged in (False, True)
]

# row (name, package), its classes, the reference, (options, those of the reference) of each variant, steps
TABLE = [
    (("AdamW", "torch"), "torch.optim:AdamW", slow.adam, [(kind | DECAYED[0], DECAYED[1]) for kind in KINDS], 2),
    (("Adam", "torch"), "torch.optim:Adam", slow.adam, [({}, {}), *((kind | DECAYED[0], B2 | {"l2": 0.1}) for kind in KINDS)], 2),
    (("AMSGrad", "torch"), "torch.optim:Adam torch.optim:AdamW", slow.adam,
     [(BETAS | kind | {"amsgrad": True, "weight_decay": 0.0}, B2 | {"amsgrad": True}) for kind in KINDS], 4),
    (("NAdam", "torch"), "torch.optim:NAdam", slow.nadam, [(BETAS, B2)], 2),
    (("RAdam", "torch"), "torch.optim:RAdam", slow.radam, [(BETAS, B2)], 8),
    (("Adamax", "torch"), "torch.optim:Adamax", slow.adamax, [(BETAS, B2)], 2),
    (("RMSprop", "torch"), "torch.optim:RMSprop", slow.rmsprop,
     [(o, o) for o in ({}, {"momentum": 0.9}, {"centered": True, "alpha": 0.9}, {"alpha": 0.9})], 2),
    (("Adagrad", "torch"), "torch.optim:Adagrad", slow.adagrad, [({}, {}), ({"initial_accumulator_value": 0.5}, {})], 2),
    (("Adadelta", "torch"), "torch.optim:Adadelta", slow.adadelta, [({"lr": 1.0}, {"lr": 1.0})], 2),
    (("AdamW 8-bit", AO), "torchao.optim:AdamW8bit", slow.adam, [BY_DEFAULT], 2),
    (("AdamW 8-bit", AO), "torchao.optim:Adam8bit", slow.adam, [(BETAS, B2)], 2),
    (("AdamW 4-bit", AO), "torchao.optim:AdamW4bit", slow.adam, [BY_DEFAULT], 2),
    (("AdamW fp8", AO), "torchao.optim:AdamWFp8", slow.adam, [BY_DEFAULT], 2),
    (("AdamW 8-bit", BNB), " ".join(f"bitsandbytes.optim:{name}" for name in ("AdamW8bit", "PagedAdamW8bit", "Adam8bit")), slow.adam, [DECAYED], 2),
    (("AdamW 32-bit", BNB), " ".join(f"bitsandbytes.optim:{name}" for name in ("AdamW", "AdamW32bit", "PagedAdamW", "PagedAdamW32bit", "Adam")),
     slow.adam, [DECAYED], 2),
    (("AdEMAMix 8-bit", BNB), "bitsandbytes.optim:AdEMAMix", slow.ademamix, [(o, B2 | {"b3": 0.999, "decay": 1e-2}) for o in ADEMAMIX[:2]], 2),
    (("AdEMAMix 32-bit", BNB), "bitsandbytes.optim:AdEMAMix", slow.ademamix, [(o, B2 | {"b3": 0.999, "decay": 1e-2}) for o in ADEMAMIX[2:]], 2),
    (("RMSprop 8-bit", BNB), "bitsandbytes.optim:RMSprop", slow.rmsprop, [({"optim_bits": 8}, {})], 2),
    (("RMSprop 32-bit", BNB), "bitsandbytes.optim:RMSprop", slow.rmsprop, [({"alpha": 0.9}, {"alpha": 0.9})], 2),
    (("Adagrad", BNB), "bitsandbytes.optim:Adagrad", slow.adagrad, [({}, {})], 2),
    (("Schedule-free AdamW", "schedulefree"), "schedulefree:AdamWScheduleFree", slow.schedule_free,
     [(BETAS | {"foreach": foreach}, B2) for foreach in (True, False)], 3),
    (("Schedule-free RAdam", "schedulefree"), "schedulefree:RAdamScheduleFree", slow.schedule_free, [(BETAS, B2 | {"rectified": True})], 8),
    (("GrokAdamW", "grokadamw"), "grokadamw:GrokAdamW", slow.grokadamw, [(BETAS | {"lr": 1.0}, B2 | {"lr": 1.0, "decay": 1e-2})], 2),
    (("AdaBelief", PO), "pytorch_optimizer:AdaBelief", slow.adabelief, [(BETAS, B2), ({}, {})], 2),
    (("AdaBound", PO), "pytorch_optimizer:AdaBound", slow.adabound,
     [(BETAS, B2), (BETAS | {"ams_bound": True}, B2 | {"amsbound": True})], 3),
    (("ADOPT", PO), "pytorch_optimizer:ADOPT", slow.adopt, [({}, {}), (BETAS, B2)], 3),
    (("Yogi", PO), "pytorch_optimizer:Yogi", slow.yogi, [(BETAS, B2)], 2),
]  # fmt: skip
CASES = [
    Case(row, path, partial(reference, **{"lr": LR} | theirs), {"lr": LR} | ours, num_steps)
    for row, paths, reference, variants, num_steps in TABLE
    for path in paths.split()
    for ours, theirs in variants
]


def name_of(case: Case) -> str:
    options = ",".join(f"{key}={value}" for key, value in case.options.items() if key not in ("betas", "lr"))
    return f"{case.row[0]}-{case.path.split(':')[1]}-{options}".replace(" ", "_")


def row_of(case: Case):
    return next(row for row in SUPPORTED_ROWS if (row.name, row.package) == case.row)


@contextlib.contextmanager
def quiet_and_eager():
    """torchao compiles its step, a minute and a half on this CPU; the same code runs uncompiled."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield


def make_parameter(shape=SHAPE, dtype=torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(1)
    return nn.Parameter((torch.randn(shape, generator=generator) * 0.01).to(dtype))


def make_gradients(num: int, shape=SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(num)]


def make_v0(shape=SHAPE) -> torch.Tensor:
    """Within a factor of 10, as quantised state with one scale a block is made for."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.1


def find_shard(optimizer, parameter) -> tuple[SecondMoment, ParamShard]:
    """The second moment of an optimizer, and what of this parameter is in it."""
    moments = SecondMoment(optimizer)
    return moments, next(shard for shard in moments.list_shards({}) if shard.param is parameter)


def prime(optimizer, parameter) -> dict:
    """The state that the optimizer has made of a parameter without any, or the one that was there."""
    moments, shard = find_shard(optimizer, parameter)
    moments.prime([shard])
    return get_state(optimizer, parameter)


def get_state(optimizer, parameter) -> dict | None:
    moments, shard = find_shard(optimizer, parameter)
    return moments.format.get_state(moments.inner, shard.param, shard.group)


def has_state(optimizer, parameter) -> bool:
    moments, shard = find_shard(optimizer, parameter)
    return moments.find_state(shard.param, shard.group) is not None


def write(optimizer, parameter, v0) -> None:
    moments, shard = find_shard(optimizer, parameter)
    with torch.no_grad():
        moments.change(shard, lambda moment: get_local_part(moment).copy_(get_local_part(v0)))


def step(optimizer, parameter, gradient) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    parameter.grad = gradient.clone()
    optimizer.step()


def measure(case: Case, shape=SHAPE) -> tuple[float, float, float]:
    """The largest errors: of v0 as stored, of the second moment after the steps (a share of each element), of the updates (a
    share of the largest)."""
    parameter = make_parameter(shape)
    optimizer = case.make([parameter])
    v0, gradients = make_v0(shape), make_gradients(case.num_steps, shape)
    write(optimizer, parameter, v0)
    stored = ((read_second_moment(optimizer, parameter) - v0).abs() / v0).max().item()
    expected = case.reference(parameter.detach(), v0, gradients)
    of_moment = of_update = 0.0
    before, expected_before = parameter.detach().double().clone(), parameter.detach().double()
    for gradient, (w, v) in zip(gradients, expected, strict=True):
        step(optimizer, parameter, gradient)
        now = read_second_moment(optimizer, parameter).double()
        of_moment = max(of_moment, ((now - v).abs() / v).max().item())
        update, wanted = parameter.detach().double() - before, w - expected_before
        if wanted.any():
            of_update = max(of_update, ((update - wanted).abs().max() / wanted.abs().max()).item())
        else:
            assert not update.any()
        before, expected_before = parameter.detach().double().clone(), w
    return stored, of_moment, of_update


REFUSED_ROWS = tuple(row for row in ROWS if row.refusal)


def find_row_of_optim(value: str):
    """Find the row of a value of `TrainingArguments.optim`; None if no row names it."""
    return next((row for row in ROWS if value in row.optim), None)
