"""Trains and evaluates a translation model on the corpus that the package generates; nothing has to be downloaded.

python scripts/run_embedded_translation.py --do_train --do_eval --max_steps 50 --output_dir outputs/embedded

The same as `python -m hf_v0init.tasks.translation.embedded_script`; `--help` lists the flags.
"""

from hf_v0init.tasks.script_support import run_script
from hf_v0init.tasks.translation.embedded_script import main

if __name__ == "__main__":
    run_script(main)
