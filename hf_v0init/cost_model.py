"""What a v0 costs on large models: seconds and bytes of the statistics pass and of the random draw, from a few constants.

For P parameters, N samples of T tokens in batches of b, and W accelerators:

    where            replicated on each accelerator if 16 P bytes (fp32 weight, gradient, two moments) fit into 80% of its memory,
                     else sharded (FSDP2, ZeRO-3); neither, if 16 P / W do not
    state            8 bytes an element that lies on the accelerator: Adam's own, nothing beyond it
    batches          N / b. Replicated, they are dealt out to the accelerators, and one all-reduce of 8 P bytes follows;
                     sharded, all run each batch together, b / W samples each
    a batch          the longer of computing, 6 P T FLOPs a sample, and, sharded, moving weights (bf16, for forward and backward) and
                     gradients (fp32): 8 P bytes through each accelerator's link; times what the pass adds (measured); and the
                     two sums: 20 bytes an element through its memory
    draw             elements that lie on the accelerator, on one CPU core (measured), and their copy to the device
    share            N T tokens of the pass over the 20 P tokens of a training at the compute-optimal length (Hoffmann et al., 2022)

It counts no start-up, no overlap beyond that of moving and computing, and no reading of data. Imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from .errors import InputError

SIZES = (1e8, 1e9, 8e9, 7e10)
ACCELERATORS = (1, 8, 64, 1024)
BYTES_OF_TRAINING = 16  # an element: weight, gradient and two moments in fp32
USABLE_MEMORY = 0.8  # the rest is activations
STATE_BYTES = 8
BYTES_MOVED = 8  # sharded, an element and batch: bf16 weights twice, fp32 gradient once
SUM_BYTES = 20  # an element and batch: the gradient and two sums read, the sums written
FLOPS_PER_TOKEN = 6  # a parameter: 2 forward, 4 backward
TRAINING_TOKENS = 20  # a parameter
MINUTE, HOUR = 60.0, 3600.0


def _constant(default: float, unit: str, text: str, source: str):
    return field(default=default, metadata={"unit": unit, "help": text, "source": source})


@dataclass(frozen=True)
class CostConstants:
    """What the model is fed with: the pass, the accelerator, what was measured. Units and sources are in the fields' metadata.

    Raises:
        InputError: a value that is not a finite number > 0.
    """

    num_samples: float = _constant(5000, "samples", "Samples of the pass.", "the default of --v0_num_samples")
    tokens_per_sample: float = _constant(2048, "tokens", "Tokens of a sample.", "assumed")
    stats_batch_size: float = _constant(
        64, "samples", "Samples a batch of the pass, over all accelerators if sharded.", "assumed"
    )
    peak_tflops: float = _constant(989, "TFLOP/s", "Peak of an accelerator.", "data sheet of the H100 SXM, dense bf16")
    utilization: float = _constant(
        0.4, "", "Share of the peak that training reaches.", "38 to 43% on H100s in Llama 3 (arXiv 2407.21783)"
    )
    memory_gb: float = _constant(80, "GB", "Memory of an accelerator.", "data sheet of the H100 SXM")
    memory_gb_per_s: float = _constant(3350, "GB/s", "Bandwidth of that memory.", "data sheet of the H100 SXM")
    link_gb_per_s: float = _constant(
        50, "GB/s", "Bandwidth of an accelerator's link to other nodes.", "400 Gb/s InfiniBand, nominal"
    )
    node_link_gb_per_s: float = _constant(450, "GB/s", "The same within a node.", "NVLink 4 data sheet, one direction")
    accelerators_per_node: float = _constant(8, "", "Accelerators in a node.", "assumed")
    host_copy_gb_per_s: float = _constant(
        50, "GB/s", "Bandwidth from the host's memory to an accelerator.", "PCIe 5 x16, 80% of nominal"
    )
    draw_ns: float = _constant(
        4.2, "ns", "Drawing, squaring and writing one element.", "measured on one core, scripts/benchmark.py"
    )
    pass_factor: float = _constant(
        1.01, "", "The pass over forward and backward alone.", "measured, scripts/benchmark.py"
    )

    def __post_init__(self) -> None:
        """Refuse what no machine has."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{one.name}={value}: must be a finite number > 0; the default is {one.default:g}")


@dataclass(frozen=True)
class Cost:
    """What a v0 costs on one model and number of accelerators; seconds, and bytes on each accelerator.

    Attributes:
        layout: "replicated", "sharded", or "too large" (the seconds are NaN then).
        num_batches: forward and backward passes, one after another, that the pass takes.
        is_bound_by_links: moving the weights takes longer than computing with them.
        share_of_training: tokens of the pass over those of a compute-optimal training.
    """

    layout: str
    state_bytes: float
    num_batches: int
    pass_seconds: float
    draw_seconds: float
    is_bound_by_links: bool
    share_of_training: float


def compute_cost(num_parameters: float, num_accelerators: int, constants: CostConstants) -> Cost:
    """Compute the cost of a v0 on `num_parameters` parameters over `num_accelerators` accelerators; see the top of the file.

    Raises:
        InputError: a number below 1.
    """
    for name, value in (("num_parameters", num_parameters), ("num_accelerators", num_accelerators)):
        if not value >= 1:
            raise InputError(f"{name}={value}: must be >= 1")
    c = constants
    share = c.num_samples * c.tokens_per_sample / (TRAINING_TOKENS * num_parameters)
    usable = USABLE_MEMORY * c.memory_gb * 1e9
    if BYTES_OF_TRAINING * num_parameters <= usable:
        layout, local = "replicated", num_parameters
    elif BYTES_OF_TRAINING * num_parameters / num_accelerators <= usable:
        layout, local = "sharded", num_parameters / num_accelerators
    else:
        local = num_parameters / num_accelerators
        return Cost("too large", STATE_BYTES * local, 0, math.nan, math.nan, False, share)
    link = (c.link_gb_per_s if num_accelerators > c.accelerators_per_node else c.node_link_gb_per_s) * 1e9
    of_others = (num_accelerators - 1) / num_accelerators
    of_sample = FLOPS_PER_TOKEN * num_parameters * c.tokens_per_sample / (c.peak_tflops * 1e12 * c.utilization)
    batches, moving, reduction = math.ceil(c.num_samples / c.stats_batch_size), 0.0, 0.0
    if layout == "replicated":
        batches = math.ceil(batches / num_accelerators)
        computing = of_sample * min(c.stats_batch_size, c.num_samples)
        reduction = 2 * STATE_BYTES * num_parameters * of_others / link
    else:
        computing = of_sample * math.ceil(c.stats_batch_size / num_accelerators)
        moving = BYTES_MOVED * num_parameters * of_others / link
    summing = SUM_BYTES * local / (c.memory_gb_per_s * 1e9)
    seconds = batches * (max(computing, moving) * c.pass_factor + summing) + reduction
    draw = local * (c.draw_ns * 1e-9 + 4 / (c.host_copy_gb_per_s * 1e9))
    return Cost(layout, STATE_BYTES * local, batches, seconds, draw, moving > computing, share)


def format_parameters(num_parameters: float) -> str:
    """Write a number of parameters as people do: 0.1B, 8B, 70B."""
    return f"{num_parameters / 1e9:.4g}B"


def format_seconds(seconds: float) -> str:
    """Write a duration with a unit; "-" for NaN."""
    if math.isnan(seconds):
        return "-"
    for unit, name in ((HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def make_cells(constants: CostConstants, sizes=SIZES, accelerators=ACCELERATORS) -> list[list[str]]:
    """Make the rows of the table: parameters, then for each number of accelerators "pass, draw, GB of state"."""
    rows = []
    for size in sizes:
        costs = [compute_cost(size, number, constants) for number in accelerators]
        rows.append([format_parameters(size), *map(_describe, costs)])
    return rows


def _describe(cost: Cost) -> str:
    if cost.layout == "too large":
        return "does not fit"
    mark = "*" if cost.is_bound_by_links else ""
    state = cost.state_bytes / 1e9
    pass_time, draw_time = format_seconds(cost.pass_seconds), format_seconds(cost.draw_seconds)
    return f"{pass_time}{mark}, {draw_time}, {state:.2g} GB"


def make_markdown_table(constants: CostConstants, sizes=SIZES, accelerators=ACCELERATORS) -> str:
    """Make the table in Markdown."""
    lines = ["| parameters | " + " | ".join(f"{number:,} accelerators" for number in accelerators) + " |"]
    lines[0] = lines[0].replace(" 1 accelerators ", " 1 accelerator ")
    lines.append("| --- |" + " --- |" * len(accelerators))
    lines += ["| " + " | ".join(row) + " |" for row in make_cells(constants, sizes, accelerators)]
    return "\n".join(lines)


def list_conclusions(constants: CostConstants) -> list[str]:
    """Say what the model says about `random`, `data_driven` and fewer samples, with its numbers at these constants."""
    small, large = compute_cost(1e9, 8, constants), compute_cost(7e10, 1024, constants)
    fewer = CostConstants(
        **{one.name: getattr(constants, one.name) for one in fields(constants)} | {"num_samples": 512}
    )
    lines = [
        "random: its draw is seconds everywhere, and less the more a model is sharded; choose it by what it does, not by cost.",
        f"data_driven: as much as training on its {constants.num_samples:,.0f} samples, "
        f"{small.share_of_training:.2g} of a compute-optimal training at 1B and {large.share_of_training:.1g} at 70B.",
    ]
    if not math.isnan(large.pass_seconds):
        rare = compute_cost(7e10, 1024, fewer)
        lines.append(
            f"Fewer samples: sharded, a batch costs a step whatever its size, so the pass is {large.num_batches} steps at "
            f"{constants.stats_batch_size:g} samples a batch and {rare.num_batches} at 512 samples. On short runs use "
            "--v0_num_samples auto or a few hundred."
        )
    return lines
