"""`python -m hf_v0init` is `hf-v0init`."""

from .cli.main import main

if __name__ == "__main__":
    main()
