"""What is loaded for which method."""

from __future__ import annotations

import subprocess
import sys


def test_only_a_run_that_needs_torchjd_waits_for_it() -> None:
    code = "import sys, aang_ray.methods.registry; sys.exit('torchjd' in sys.modules or 'cvxpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
