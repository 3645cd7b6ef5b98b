"""Trains a grid of runs and reports whether v0 beats the warmup; the same as `hf-v0init compare`.

python scripts/compare.py configs/compare/tiny.yaml --output_dir outputs/tiny --jobs 2
"""

import sys

from hf_v0init.commands.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    main()
