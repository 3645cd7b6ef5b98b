"""Does a v0 do what the warmup does on a task: a grid of training runs from one YAML file, tuned, confirmed and reported.

`comparison_file` reads the file and lays out its runs (`axes` knows the words), `stages` adds those of the second stage, `executor`
trains what is missing (`process` is one run and its end, `cluster` uses submitit), `results` reads the runs, `statistics` and
`summary` compute, `report` and `figures` write. `session` is one call of the command.
Nothing here imports torch or transformers: runs are processes of their own.
"""
