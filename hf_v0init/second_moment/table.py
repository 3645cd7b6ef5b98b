"""The one table of optimizers: where each keeps its second moment, how v0 is written there, how exactly, or why it is refused.

Plain data, no torch: `optimizer_state` looks optimizers up here by the full name of their class, the README shows the table
(`make_markdown_table`), and the tests hold every row to a slow reference.
"""

from dataclasses import dataclass

TORCH = "torch"
TRANSFORMERS = "transformers"
BITSANDBYTES = "bitsandbytes"
TORCHAO = "torchao"
SCHEDULEFREE = "schedulefree"
PYTORCH_OPTIMIZER = "pytorch-optimizer"

NO_SECOND_MOMENT = "it keeps no second moment that a v0 could start"
PROJECTED = (
    "its second moment is of gradients projected into a space chosen at the first step, for which no v0 can be taken"
)
RESET = "it weights the old second moment by 0 at step 1, so a v0 has no effect"
FACTORED = "it keeps only row and column means of g^2 and weights the old ones by 0 at step 1, so a v0 has no effect"
FACTORED_IN_BACKWARD = (
    "it keeps only row and column means of g^2, outside `optimizer.state`, and steps inside the backward pass"
)

EXACT = 5e-6  # fp32 rounding over two steps, with room


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer.

    Attributes:
        name: what people call it.
        classes: full names of its classes, module.qualname. Rows that share a class share the layout.
        optim: the values of `TrainingArguments.optim` that select it.
        package: the distribution on PyPI that holds it.
        layout: key into `optimizer_layouts.LAYOUTS`; None if refused or left to the dry run.
        second_moment: where the second moment is kept.
        start: how v0 is written there.
        stored_error: the largest error of v0 as it is stored, a share of the element, for elements within a factor of 10 of
            the largest of their quantisation block; 0 where it is stored in the parameter's dtype or fp32.
        error: the largest error over the first steps against a slow fp64 reference that starts at v0: of the second moment,
            a share of the element (of such elements, if quantised); of the update, a share of the largest one.
        note: what else to know.
        refusal: why no v0 is written; "" if one is.
    """

    name: str
    classes: tuple[str, ...]
    optim: tuple[str, ...] = ()
    package: str = TORCH
    layout: str | None = None
    second_moment: str = "`exp_avg_sq`"
    start: str = "v0"
    stored_error: float = 0.0
    error: float = EXACT
    note: str = ""
    refusal: str = ""

    @property
    def is_probed(self) -> bool:
        """Whether nothing is known in advance, so that the dry run of `optimizer_probe` decides on the user's machine."""
        return self.layout is None and not self.refusal


def _names(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


def _torchao(bits: str) -> tuple[str, ...]:
    homes = ("torchao.optim.adam", "torchao.prototype.low_bit_optim.adam")
    return tuple(f"{home}.{name}{bits}" for home in homes for name in ("AdamW", "Adam"))


_BNB_ADAM = tuple(
    f"bitsandbytes.optim.{module}.{paged}{name}{bits}"
    for module, name in (("adamw", "AdamW"), ("adam", "Adam"))
    for paged in ("", "Paged")
    for bits in ("", "8bit", "32bit")
)
_BNB_ADEMAMIX = _names("bitsandbytes.optim.ademamix", "AdEMAMix", "AdEMAMix8bit", "PagedAdEMAMix", "PagedAdEMAMix8bit")
_BNB_RMSPROP = _names("bitsandbytes.optim.rmsprop", "RMSprop", "RMSprop8bit", "RMSprop32bit")
_BNB_ADAGRAD = _names("bitsandbytes.optim.adagrad", "Adagrad", "Adagrad8bit", "Adagrad32bit")

_FP32 = "tensors under 4,096 elements stay fp32"
_DYNAMIC = "0.18 stored for elements within 10⁴ of their block's largest, 0 below 10⁻⁷ of it; " + _FP32
_BNB_DYNAMIC = "0.23 stored for elements within 10⁴ of their block's largest; " + _FP32 + ", embeddings too"

SUPPORTED_ROWS: tuple[OptimizerRow, ...] = (
    OptimizerRow(
        "AdamW",
        _names("torch.optim.adamw", "AdamW"),
        optim=("adamw_torch", "adamw_torch_fused"),
        layout="adam",
        note="the Trainer's default; plain, foreach and fused",
    ),
    OptimizerRow(
        "Adam",
        _names("torch.optim.adam", "Adam"),
        layout="adam",
        note="with `weight_decay` (coupled L2) its second moment is of g + wd·w, v0 of g",
    ),
    OptimizerRow(
        "AMSGrad",
        _names("torch.optim.adam", "Adam") + _names("torch.optim.adamw", "AdamW"),
        layout="adam",
        start="v0; `max_exp_avg_sq` 0",
        note="`amsgrad=True`. The maximum starts with v1, so what of v0 exceeds E[g²] never washes out, and m(t) does not hold",
    ),
    OptimizerRow("NAdam", _names("torch.optim.nadam", "NAdam"), layout="nadam"),
    OptimizerRow(
        "RAdam",
        _names("torch.optim.radam", "RAdam"),
        layout="radam",
        note="steps 1 to 5 are momentum SGD: v0 acts from step 6 on",
    ),
    OptimizerRow(
        "Adamax",
        _names("torch.optim.adamax", "Adamax"),
        layout="adamax",
        second_moment="`exp_inf`, a maximum of abs(g)",
        start="sqrt(v0)",
        note="no mean of g²: m(t) does not hold. v0 acts while beta2^t·sqrt(v0) exceeds abs(g)",
    ),
    OptimizerRow(
        "RMSprop",
        _names("torch.optim.rmsprop", "RMSprop"),
        optim=("rmsprop",),
        layout="rmsprop",
        second_moment="`square_avg`",
        note="beta2 is `alpha`; also with momentum and centered",
    ),
    OptimizerRow(
        "Adagrad",
        _names("torch.optim.adagrad", "Adagrad"),
        optim=("adagrad",),
        layout="adagrad",
        second_moment="`sum`",
        start="v0 for `initial_accumulator_value`",
        note="a sum that never decays: v0 never washes out, m(t) does not hold",
    ),
    OptimizerRow(
        "Adadelta",
        _names("torch.optim.adadelta", "Adadelta"),
        layout="adadelta",
        second_moment="`square_avg`",
        note="its numerator follows its own updates: m(t) does not hold",
    ),
    OptimizerRow(
        "AdamW 8-bit",
        _torchao("8bit"),
        optim=("adamw_torch_8bit",),
        package=TORCHAO,
        layout="torchao",
        second_moment="`exp_avg_sq`, 8-bit codes",
        stored_error=0.036,
        error=0.07,
        note=_DYNAMIC,
    ),
    OptimizerRow(
        "AdamW 4-bit",
        _torchao("4bit"),
        optim=("adamw_torch_4bit",),
        package=TORCHAO,
        layout="torchao",
        second_moment="`exp_avg_sq`, 4-bit codes",
        stored_error=0.25,
        error=0.55,
        note="16 levels per block: elements under 1/16 of its largest are stored as that, anything under 6·10⁻¹⁴ as that, so v0 is too large there; "
        + _FP32,
    ),
    OptimizerRow(
        "AdamW fp8",
        _torchao("Fp8"),
        package=TORCHAO,
        layout="torchao",
        second_moment="`exp_avg_sq`, fp8 codes",
        stored_error=0.059,
        error=0.18,
        note="as much for elements down to 10⁻⁴ of their block's largest; " + _FP32,
    ),
    OptimizerRow(
        "AdamW 8-bit",
        _BNB_ADAM,
        optim=("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"),
        package=BITSANDBYTES,
        layout="bitsandbytes",
        second_moment="`state2`, 8-bit codes",
        stored_error=0.036,
        error=0.07,
        note=_BNB_DYNAMIC,
    ),
    OptimizerRow(
        "AdamW 32-bit",
        _BNB_ADAM,
        optim=("paged_adamw_32bit",),
        package=BITSANDBYTES,
        layout="bitsandbytes",
        second_moment="`state2`",
    ),
    OptimizerRow(
        "AdEMAMix 8-bit",
        _BNB_ADEMAMIX,
        optim=("ademamix_8bit", "paged_ademamix_8bit"),
        package=BITSANDBYTES,
        layout="bitsandbytes",
        second_moment="`state2`, 8-bit codes",
        stored_error=0.036,
        error=0.07,
        note=_BNB_DYNAMIC,
    ),
    OptimizerRow(
        "AdEMAMix 32-bit",
        _BNB_ADEMAMIX,
        optim=("ademamix", "paged_ademamix_32bit"),
        package=BITSANDBYTES,
        layout="bitsandbytes",
        second_moment="`state2`",
    ),
    OptimizerRow(
        "RMSprop 8-bit",
        _BNB_RMSPROP,
        optim=("rmsprop_bnb_8bit",),
        package=BITSANDBYTES,
        layout="bitsandbytes_rmsprop",
        second_moment="`state1`, 8-bit signed codes",
        stored_error=0.071,
        error=0.14,
        note="0.29 stored for elements within 10⁴ of their block's largest; beta2 is `alpha`; "
        + _FP32
        + ", embeddings too",
    ),
    OptimizerRow(
        "RMSprop 32-bit",
        _BNB_RMSPROP,
        optim=("rmsprop_bnb", "rmsprop_bnb_32bit"),
        package=BITSANDBYTES,
        layout="bitsandbytes_rmsprop",
        second_moment="`state1`",
        note="beta2 is `alpha`",
    ),
    OptimizerRow(
        "Adagrad",
        _BNB_ADAGRAD,
        package=BITSANDBYTES,
        layout="bitsandbytes_adagrad",
        second_moment="`state1`",
        note="as torch's Adagrad; its 8-bit version stores v0 as RMSprop's does",
    ),
    OptimizerRow(
        "Schedule-free AdamW",
        _names("schedulefree.adamw_schedulefree", "AdamWScheduleFree"),
        optim=("schedule_free_adamw",),
        package=SCHEDULEFREE,
        layout="schedule_free",
        start="v0; `z` the parameter",
    ),
    OptimizerRow(
        "Schedule-free RAdam",
        _names("schedulefree.radam_schedulefree", "RAdamScheduleFree"),
        optim=("schedule_free_radam",),
        package=SCHEDULEFREE,
        layout="schedule_free",
        start="v0; `z` the parameter",
        note="steps 1 to 4 move nothing: v0 acts from step 5 on",
    ),
    OptimizerRow(
        "GrokAdamW",
        _names("grokadamw.grokadamw", "GrokAdamW"),
        optim=("grokadamw",),
        package="grokadamw",
        layout="grokadamw",
        second_moment='`exp_avg_sq` in `group["state"]`',
        note="its second moment is of g + 2·(slow mean of g), 1.04²·g² at step 1; v0 is of g",
    ),
    OptimizerRow(
        "AdaBelief",
        _names("pytorch_optimizer.optimizer.adabelief", "AdaBelief"),
        package=PYTORCH_OPTIMIZER,
        layout="adabelief",
        second_moment="`exp_avg_var`, of g − m",
        note="v0 is of g as for the others: with m0 = 0, g − m is beta1·g at step 1. It settles lower, at 2·beta1²/(1+beta1)·Var[g]",
    ),
    OptimizerRow(
        "AdaBound",
        _names("pytorch_optimizer.optimizer.adabound", "AdaBound"),
        package=PYTORCH_OPTIMIZER,
        layout="adabound",
        note="the step size is clipped from step 1 on, so v0 acts inside the bounds; also `ams_bound`",
    ),
    OptimizerRow(
        "ADOPT",
        _names("pytorch_optimizer.optimizer.adopt", "ADOPT"),
        package=PYTORCH_OPTIMIZER,
        layout="adopt",
        note="step 1 moves nothing and sets v1 = v0 + g²; no bias correction, so m(t) does not hold",
    ),
    OptimizerRow(
        "Yogi",
        _names("pytorch_optimizer.optimizer.yogi", "Yogi"),
        package=PYTORCH_OPTIMIZER,
        layout="yogi",
        start="v0 for `initial_accumulator`",
        note="moves towards g² by (1−beta2)·g² per step, however far off: m(t) does not hold, a large v0 stays long",
    ),
)

PROBED_ROWS: tuple[OptimizerRow, ...] = (
    OptimizerRow(
        "AdamW (XLA)", _names("torch_xla.amp.syncfree.adamw", "AdamW"), optim=("adamw_torch_xla",), package="torch-xla"
    ),
    OptimizerRow(
        "AdamW (NPU, fused)",
        _names("torch_npu.optim.npu_fused_adamw", "NpuFusedAdamW"),
        optim=("adamw_torch_npu_fused",),
        package="torch-npu",
    ),
    OptimizerRow(
        "AnyPrecisionAdamW",
        _names("torchdistx.optimizers.anyprecision_optimizer", "AnyPrecisionAdamW"),
        optim=("adamw_anyprecision",),
        package="torchdistx",
    ),
)

REFUSED_ROWS: tuple[OptimizerRow, ...] = (
    OptimizerRow("SGD", _names("torch.optim.sgd", "SGD"), optim=("sgd",), refusal=NO_SECOND_MOMENT),
    OptimizerRow("Adafactor", ("torch.optim.Adafactor", "torch.optim._adafactor.Adafactor"), refusal=FACTORED),
    OptimizerRow(
        "Adafactor",
        _names("transformers.optimization", "Adafactor"),
        optim=("adafactor",),
        package=TRANSFORMERS,
        refusal=FACTORED,
    ),
    OptimizerRow(
        "StableAdamW",
        _names("optimi.stableadamw", "StableAdamW"),
        optim=("stable_adamw",),
        package="torch-optimi",
        refusal=RESET,
    ),
    OptimizerRow(
        "StableAdamW",
        _names("pytorch_optimizer.optimizer.adamw", "StableAdamW"),
        package=PYTORCH_OPTIMIZER,
        refusal=RESET,
    ),
    OptimizerRow(
        "Lion",
        _names(
            "bitsandbytes.optim.lion",
            *(f"{paged}Lion{bits}" for paged in ("", "Paged") for bits in ("", "8bit", "32bit")),
        ),
        optim=("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
        package=BITSANDBYTES,
        refusal=NO_SECOND_MOMENT,
    ),
    OptimizerRow(
        "Schedule-free SGD",
        _names("schedulefree.sgd_schedulefree", "SGDScheduleFree"),
        optim=("schedule_free_sgd",),
        package=SCHEDULEFREE,
        refusal=NO_SECOND_MOMENT,
    ),
    OptimizerRow(
        "LOMO", _names("lomo_optim.lomo", "Lomo"), optim=("lomo",), package="lomo-optim", refusal=NO_SECOND_MOMENT
    ),
    OptimizerRow(
        "AdaLomo",
        _names("lomo_optim.adalomo", "AdaLomo"),
        optim=("adalomo",),
        package="lomo-optim",
        refusal=FACTORED_IN_BACKWARD,
    ),
    OptimizerRow(
        "GaLore AdamW, AdamW 8-bit, Adafactor",
        ("galore_torch.adamw.AdamW", "galore_torch.adamw8bit.AdamW8bit", "galore_torch.adafactor.Adafactor"),
        optim=("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
        package="galore-torch",
        refusal=PROJECTED,
    ),
    OptimizerRow(
        "APOLLO",
        _names("apollo_torch.apollo", "AdamW") + _names("apollo_torch.q_apollo", "AdamW"),
        optim=("apollo_adamw",),
        package="apollo-torch",
        refusal=PROJECTED,
    ),
    OptimizerRow(
        "GaLore and APOLLO, layerwise",
        _names("transformers.trainer_pt_utils", "LayerWiseDummyOptimizer"),
        optim=(
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
        ),
        package="galore-torch, apollo-torch",
        refusal=PROJECTED,
    ),
)

TABLE_HEADINGS = ("optimizer", "`--optim`", "second moment", "starts as", "error", "remark")

ROWS = SUPPORTED_ROWS + PROBED_ROWS + REFUSED_ROWS

_BY_CLASS = {name: row for row in reversed(ROWS) for name in row.classes}
_BY_OPTIM = {value: row for row in ROWS for value in row.optim}


def find_row(class_name: str) -> OptimizerRow | None:
    """Find the first row that lists a class by its full name (module.qualname); None if no row does."""
    return _BY_CLASS.get(class_name)


def find_row_of_optim(value: str) -> OptimizerRow | None:
    """Find the row of a value of `TrainingArguments.optim`; None if no row names it."""
    return _BY_OPTIM.get(value)


def make_markdown_table() -> str:
    """Make the table of this folder's README: one line per optimizer, in GitHub's Markdown, without a trailing newline."""
    lines = [TABLE_HEADINGS, ("---",) * len(TABLE_HEADINGS), *make_cells()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def make_cells() -> list[tuple[str, ...]]:
    """Make the cells of the table under `TABLE_HEADINGS`, in Markdown."""
    cells = []
    for row in ROWS:
        package = "" if row.package == TORCH else f" ({row.package})"
        optim = ", ".join(f"`{value}`" for value in row.optim)
        if row.refusal:
            rest = ("", "refused", "", row.refusal)
        elif row.is_probed:
            rest = ("", "v0, if the dry run finds where", "", "not measured: needs hardware or a build of its own")
        else:
            start = f"{row.start}, quantised" if row.stored_error else row.start
            rest = (row.second_moment, start, _describe_error(row), row.note)
        cells.append((row.name + package, optim, *rest))
    cells.append(
        (
            "any other",
            "`--v0_optimizer package:Class`",
            "found by a dry run",
            "v0, or refused",
            "",
            "if one state tensor obeys v1 = beta2·v0 + (1−beta2)·g² at a copy's first step and all else starts at zero",
        )
    )
    return cells


def _describe_error(row: OptimizerRow) -> str:
    if row.stored_error == 0.0:
        return "exact"
    return f"{row.stored_error:.2g} stored, {row.error:.2g} after 2 steps"
