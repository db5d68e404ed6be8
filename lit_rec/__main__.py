"""`python -m lit_rec`."""

import sys

from lit_rec.cli import main

if __name__ == "__main__":
    sys.exit(main())
