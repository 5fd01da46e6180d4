"""`aang train` for a cluster: `ray job submit --working-dir . -- python jobs/train.py ...`, same arguments."""

import sys

from aang_ray.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
