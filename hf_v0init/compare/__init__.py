"""Does a v0 do what the warmup does on a task: a grid of training runs from one YAML file, tuned, confirmed and reported.

`plan` reads the file (`axes` knows its words) and lays out both stages, `executor` trains what is missing (`process` is one run,
`claims` shares a folder, `cluster` uses submitit), `results` reads the runs into tables, `statistics` and `summary` compute,
`report` and `figures` write. Nothing here imports torch or transformers: runs are processes of their own.
"""
