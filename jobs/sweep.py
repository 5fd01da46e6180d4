"""`aang sweep` for a cluster: `ray job submit --working-dir . -- python jobs/sweep.py ...`, same arguments."""

import sys

from aang_ray.cli import run

if __name__ == "__main__":
    run(["sweep", *sys.argv[1:]])
