"""`aang sweep` for a cluster: `ray job submit --working-dir . -- python jobs/sweep.py ...`, same arguments."""

import sys

from aang_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
