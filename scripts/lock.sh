#!/usr/bin/env bash
# Compile both lock files from pyproject.toml. Run it by `make lock` after changing a dependency; the versions move.
# No index lines and no URLs get into them: where a package comes from is the machine's business (scripts/setup.py).
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || echo .bootstrap/bin/uv)
compile=("$uv" pip compile pyproject.toml --quiet --no-config --python-version 3.11
         --no-header --no-annotate --no-emit-index-url --no-emit-find-links --upgrade)

# The CPU lock needs a place that holds torch's +cpu build: pip's find-links, or torch's own index named in UV_INDEX.
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}}
UV_FIND_LINKS=${links// /,} "${compile[@]}" --extra cpu --extra dev \
  --only-binary :all: --excludes scripts/excludes.txt --excludes scripts/cpu-excludes.txt -o requirements-cpu.txt

# The GPU lock must see none of that, or torch's CPU build would win.
env -u UV_FIND_LINKS -u PIP_FIND_LINKS "${compile[@]}" --extra gpu --extra dev \
  --excludes scripts/excludes.txt -o requirements-gpu.txt
