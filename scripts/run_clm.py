"""Trains, evaluates and samples from a causal language model, with a v0 for Adam if asked.

python scripts/run_clm.py CONFIG.yaml --output_dir outputs/mine

The same as `hf-v0init clm`, and as `python -m hf_v0init.tasks.language_modeling.script`; `--help` lists the flags.
"""

from hf_v0init.cli.scripts import run_named

if __name__ == "__main__":
    run_named("clm")
