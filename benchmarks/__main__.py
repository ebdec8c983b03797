"""``python -m benchmarks`` (``make bench``): what is measured so far, and the commands that measure it."""

import runpy

BENCHMARKS = ("benchmarks.roles", "benchmarks.sync")

if __name__ == "__main__":
    for name in BENCHMARKS:
        runpy.run_module(name, run_name="__main__")
