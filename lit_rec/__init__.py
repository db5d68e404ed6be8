"""lit_rec: LLM-enhanced recommendation on Lightning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_rec.api import Recommender

__version__ = "0.1.0"
# When PEFT imports it, it complains on some processors about a package that nobody needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load(run_dir: str | Path) -> Recommender:
    """Open the run that `fit` has finished in a folder; see `lit_rec.api`.

    Raises:
        UserError: There is no finished run, or its data or models are no longer where they were.
    """
    from lit_rec.api import open_run  # torch is imported there: `import lit_rec` stays light

    return open_run(run_dir)
