"""Trains a DCGAN on images, with a v0 for both optimizers if asked, and measures what it generates.

python scripts/run_dcgan.py CONFIG.yaml --output_dir outputs/mine

The same as `hf-v0init dcgan`, and as `python -m hf_v0init.tasks.gan.script`; `--help` lists the flags.
"""

from hf_v0init.cli.scripts import run_named

if __name__ == "__main__":
    run_named("dcgan")
