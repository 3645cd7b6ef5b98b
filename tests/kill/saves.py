"""Saves one checkpoint after another, without a Trainer and without torch, until it is killed.

    python tests/kill/saves.py OUTPUT_DIR

All files of a save hold the same token. Every third save goes over the checkpoint before, as after a resume by hand.
"""

import itertools
import json
import os
import sys
from pathlib import Path

from hf_v0init.records.checkpoints import begin_save, complete_save, delete_old_checkpoints, list_checkpoints

NAMES = ("model.safetensors", "optimizer_0/__0_0.distcp", "optimizer_0/__1_0.distcp", "v0_init.json")


def save(folder: Path, token: str) -> None:
    begin_save(folder)
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "w") as file:
            for _ in range(20):  # a kill can meet it
                file.write(token)
                file.flush()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "token": token}))
    complete_save(folder)


def main(output_dir: str) -> None:
    done = list_checkpoints(output_dir)
    step = int(done[0].rsplit("-", 1)[1]) if done else 0
    for number in itertools.count():
        step += number % 3 != 2
        folder = Path(output_dir, f"checkpoint-{step}")
        save(folder, f"{os.getpid():08d}{number:06d}\n")
        delete_old_checkpoints(output_dir, 2, str(folder))
        print("saved", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
