"""Trains and evaluates a masked language model (BERT), with a v0 for Adam if asked.

python scripts/run_mlm.py CONFIG.yaml --output_dir outputs/mine

The same as `hf-v0init mlm`, and as `python -m hf_v0init.tasks.language_modeling.masked_script`; `--help` lists the flags.
"""

from hf_v0init.cli.scripts import run_named

if __name__ == "__main__":
    run_named("mlm")
