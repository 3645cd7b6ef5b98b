"""Does a v0 beat the warmup on a task: a grid of training runs from one YAML file, and the report on them.

`plan` reads the file (`axes` knows its words), `runs` trains what is missing, `run_state` tells how a run ended, `results` reads
the folders, `summary` computes, `report` writes. Nothing here imports torch or transformers: runs are processes of their own.
"""
