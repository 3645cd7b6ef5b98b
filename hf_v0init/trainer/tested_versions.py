"""Which major versions of transformers this release was tested with. Its Trainer is extended here in places that it documents
and in some that it does not.
"""

import logging
from importlib.metadata import version

TESTED_TRANSFORMERS = (5,)

logger = logging.getLogger("hf_v0init")


def warn_of_untested_transformers(installed: str | None = None) -> None:
    """Log a warning if the major version of transformers is not one of `TESTED_TRANSFORMERS`.

    Args:
        installed: the version, "MAJOR.MINOR..."; default: of the transformers that is installed.
    """
    installed = installed or version("transformers")
    if int(installed.split(".")[0]) not in TESTED_TRANSFORMERS:
        tested = " and ".join(f"{major}.x" for major in TESTED_TRANSFORMERS)
        logger.warning(
            f"transformers {installed}: this release of hf_v0init was tested with {tested} only. If anything about v0 looks "
            f"wrong, type: pip install 'transformers>={TESTED_TRANSFORMERS[0]},<{TESTED_TRANSFORMERS[-1] + 1}'"
        )
