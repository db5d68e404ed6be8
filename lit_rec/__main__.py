"""`python -m lit_rec`."""

import gc
import sys

from lit_rec.stopping import stoppable


def run() -> int:
    """Run the command line, which a signal may stop from its first import on; return the exit code."""
    with stoppable(last=True) as stop:
        try:
            from lit_rec.cli import main

            return main()
        except BaseException:
            if stop.number is None:
                raise
        finally:
            if "torch" not in sys.modules:
                gc.freeze()  # the last search for garbage, on the way out, took a tenth of `--help` and `show-config`
    print(stop, file=sys.stderr)
    return stop.code


if __name__ == "__main__":
    sys.exit(run())
