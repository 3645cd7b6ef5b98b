"""The table of optimizers, `optimizers.csv`: where each keeps its second moment, how exactly a v0 is kept there, or why it is refused.

Plain data, no torch. Optimizers are looked up here by the full name of their class, and the tests hold every row to a slow reference. A
new optimizer is a new row.
"""

import csv
import itertools
import re
from dataclasses import dataclass, fields
from pathlib import Path

TABLE_FILE = Path(__file__).with_name("optimizers.csv")
EXACT = 5e-6  # fp32 rounding over two steps, with room

LARGEST_OPTIONS = ("amsgrad", "ams_bound")  # with these the largest second moment is what counts


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer, or one way to set it up. Rows that share a class keep their state alike.

    Attributes:
        name: what people call it.
        package: the distribution on PyPI that holds it.
        classes: full names of its classes, module.qualname. In the file braces stand for choices, as in a shell.
        optim: the values of `TrainingArguments.optim` that select it.
        format: how its state is kept, see `formats.FORMATS`; "" for plain tensors.
        key: of the second moment in a tensor's state; "" if it is refused or left to the dry run.
        beta2: the option of a parameter group by which the second moment decays: "betas[1]", "betas[0]" or "alpha"; "" where it is
            no decaying mean of g^2.
        starts: key=start of the state tensors that do not start at zero: a number, an option of the group, or "parameter".
        kept: what to add to the key to say how the second moment is kept.
        start: how v0 is written there.
        stored_error: the largest error of v0 as it is stored, as a fraction of the element, for elements within a factor of 10 of the
            largest of their quantisation block; 0 where it is stored in the parameter's dtype or fp32.
        error: the largest error over the first steps against a slow fp64 reference that starts at v0: of the second moment,
            as a fraction of the element (of such elements, if quantised); of the update, as a fraction of the largest one.
        no_linear: why v0 cannot decay linearly; "" if nothing but the options is in the way.
        note: what else to know.
        refusal: why no v0 is written; "" if one is.
    """

    name: str
    package: str = "torch"
    classes: tuple[str, ...] = ()
    optim: tuple[str, ...] = ()
    format: str = ""
    key: str = ""
    beta2: str = ""
    starts: tuple[str, ...] = ()
    kept: str = ""
    start: str = "v0"
    stored_error: float = 0.0
    error: float = EXACT
    no_linear: str = ""
    note: str = ""
    refusal: str = ""

    @property
    def full_name(self) -> str:
        """Its name, with the package where that is not torch."""
        return self.name if self.package == "torch" else f"{self.name} ({self.package})"

    @property
    def is_probed(self) -> bool:
        """Whether nothing is known in advance, so that a dry run (`probe`) decides on the user's machine."""
        return not (self.key or self.refusal)

    def read_beta2(self, group: dict) -> float | None:
        """Read beta2 of the closed form m(t) from a parameter group; None where m(t) does not hold."""
        return None if any(group.get(option) for option in LARGEST_OPTIONS) else read_option(group, self.beta2)

    def explain_no_linear_decay(self, group: dict) -> str:
        """Say why v0 cannot decay linearly in a parameter group; "" if it can."""
        if self.no_linear:
            return self.no_linear
        if any(group.get(option) for option in LARGEST_OPTIONS):
            return "it keeps the largest second moment, which never decays"
        if self.beta2 != "betas[1]" or "betas" not in group:
            return "its second moment is no mean of g^2 that decays by betas[1]"
        return ""

    def describe_linear_decay(self) -> str:
        """Say whether v0 can decay linearly with the optimizer's usual options: "yes", or "no: why"."""
        if not self.key:
            return "no"
        reason = self.explain_no_linear_decay({"betas": (0.9, 0.999), "amsgrad": self.name == "AMSGrad"})
        if not reason and self.stored_error:
            reason = "its second moment is kept in few bits, in which g^2 is lost beside v0"
        return f"no: {reason}" if reason else "yes"


def read_option(group: dict, option: str) -> float | None:
    """Read a number such as "alpha" or "betas[1]" from the options of a parameter group; None where it is not there."""
    name, _, place = option.rstrip("]").partition("[")
    value = group.get(name)
    if place and isinstance(value, (tuple, list)):
        value = value[int(place)] if int(place) < len(value) else None
    return None if value is None or isinstance(value, (str, tuple, list)) else float(value)


def _read_rows() -> tuple[OptimizerRow, ...]:
    """Read the file; an empty cell is the attribute's default."""
    kinds = {field.name: type(field.default) for field in fields(OptimizerRow)}
    rows = []
    with open(TABLE_FILE, encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            given = {name: cell for name, cell in cells.items() if cell}
            for name, cell in given.items():
                if kinds[name] is tuple:
                    given[name] = tuple(one for word in cell.split() for one in _expand_braces(word))
                elif kinds[name] is float:
                    given[name] = float(cell)
            rows.append(OptimizerRow(**given))
    return tuple(rows)


def _expand_braces(word: str) -> list[str]:
    """Expand "a.{b,c}{,d}" to ["a.b", "a.bd", "a.c", "a.cd"], as a shell does."""
    parts = [part.split(",") for part in re.split(r"[{}]", word)]
    return ["".join(choice) for choice in itertools.product(*parts)]


ROWS = _read_rows()
SUPPORTED_ROWS = tuple(row for row in ROWS if row.key)

_BY_CLASS = {name: row for row in reversed(ROWS) for name in row.classes}


def find_row(class_name: str) -> OptimizerRow | None:
    """Find the first row that lists a class by its full name (module.qualname); None if no row does."""
    return _BY_CLASS.get(class_name)
