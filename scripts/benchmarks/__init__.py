"""What v0 and the scripts cost, each beside its limit: ratios of two things measured in one run.

    python scripts/benchmark.py --quick                    # the table, beside the committed record
    python scripts/benchmark.py --quick --compare          # what got worse; exit status 1 if anything did
    python scripts/benchmark.py --quick --write_record     # configs/benchmark/record.json

`measuring` takes interleaved pairs, `record` keeps and compares them, `rows_...` say what is measured.
"""
