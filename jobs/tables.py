"""`aang table` for a cluster: `ray job submit --working-dir . -- python jobs/tables.py ...`, same arguments."""

import sys

from aang_ray.cli import run

if __name__ == "__main__":
    run(["table", *sys.argv[1:]])
