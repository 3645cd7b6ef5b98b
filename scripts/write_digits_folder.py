"""Writes scikit-learn's digits, real 8x8 scans that come with that package, as image folders. Needs no network.

    python scripts/write_digits_folder.py data/digits

makes data/digits/train, validation and test with one folder per digit, as the configs/image_classification/digits_*.yaml
expect them. Needs scikit-learn: pip install 'hf_v0init[images]'
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_v0init.tasks.images.digits import PIXELS, write_digits_folder
from hf_v0init.tasks.script_support import run_script


@dataclass
class DigitsArguments:
    size: int = field(default=PIXELS, metadata={"help": "Height and width in pixels; more than 8 are interpolated."})
    seed: int = field(default=0, metadata={"help": "Which images become training, validation and test images."})


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(DigitsArguments, allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Folder to write; must not hold anything.")
    arguments = parser.parse_args(argv)
    counts = write_digits_folder(arguments.folder, arguments.seed, arguments.size)
    print(f"{arguments.folder}: " + ", ".join(f"{number} images for {split}" for split, number in counts.items()))


if __name__ == "__main__":
    run_script(main)
