"""Trains, evaluates and uses an encoder-decoder model for translation, with a v0 for Adam if asked.

python scripts/run_translation.py CONFIG.yaml --output_dir outputs/mine

The same as `hf-v0init translate`, and as `python -m hf_v0init.tasks.translation.script`; `--help` lists the flags.
"""

from hf_v0init.cli.scripts import run_named

if __name__ == "__main__":
    run_named("translate")
