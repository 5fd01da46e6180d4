"""`python -m aang_ray`: the same as the command `aang`."""

from aang_ray.cli import run

if __name__ == "__main__":
    run()
