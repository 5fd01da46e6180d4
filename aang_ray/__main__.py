"""`python -m aang_ray`: the same as the command `aang`."""

import sys

from aang_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
