"""Trains, evaluates and uses an image classifier, with a v0 for Adam if asked.

python scripts/run_image_classification.py CONFIG.yaml --output_dir outputs/mine

The same as `hf-v0init images`, and as `python -m hf_v0init.tasks.images.script`; `--help` lists the flags.
"""

from hf_v0init.cli.scripts import run_named

if __name__ == "__main__":
    run_named("images")
