"""`aang table` for a cluster: `ray job submit --working-dir . -- python jobs/tables.py ...`, same arguments."""

import sys

from aang_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", *sys.argv[1:]]))
