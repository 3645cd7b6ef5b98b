"""Trains a DCGAN on images, with a v0 for both optimizers if asked, and measures what it generates.

python scripts/run_dcgan.py CONFIG.yaml --output_dir outputs/mine

The same as `python -m hf_v0init.tasks.gan.script`; `--help` lists the flags.
"""

from hf_v0init.tasks.gan.script import main
from hf_v0init.tasks.script_support import run_script

if __name__ == "__main__":
    run_script(main)
