"""Make the project's environment, .venv at the root, and do nothing when it is there already.

    python3 scripts/setup.py [cpu|gpu]

Started by whatever Python 3 the machine has, so: standard library only, and a grammar that old Pythons read (they get a
sentence, not a syntax error). Python 3.11 itself is found, or fetched, by uv.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
UV_VERSION = "0.13.8"
PYTHON_VERSION = "3.11"
# The one place that serves torch's CPU build to everybody. Asked only where the machine's own find-links has no such file.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

OLDEST_PYTHON = (3, 8)
OLDEST_GLIBC = (2, 28)  # torch's wheels are manylinux_2_28
MEMORY_GB = 6
DISK_GB = {"cpu": 8, "gpu": 25}  # measured: .venv takes 3.8 GB on cpu, and uv's cache up to as much again on another file system


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


class Machine(NamedTuple):
    """What the preflight looks at."""

    system: str
    architecture: str
    python: tuple
    glibc: Optional[tuple]  # None: another C library
    avx2: bool
    memory_bytes: int
    disk_bytes: int  # free, where .venv goes


def preflight(machine: Machine, extra: str) -> List[str]:
    """What stands in the way on this machine, one sentence each; empty if nothing does."""
    problems = []
    if machine.system != "Linux":
        return ["unsupported system: got {}, needs Linux; use a Linux machine, WSL 2 or a container".format(machine.system)]
    if machine.architecture not in ("x86_64", "AMD64"):
        problems.append("unsupported architecture: got {}, needs x86_64".format(machine.architecture))
    elif extra == "cpu" and not machine.avx2:
        problems.append("unsupported processor: it has no AVX2, which vLLM's CPU build needs")
    if machine.glibc is None or machine.glibc < OLDEST_GLIBC:
        got = "another C library" if machine.glibc is None else "glibc {}.{}".format(*machine.glibc)
        problems.append("unsupported system: got {}, needs glibc {}.{} or later (as in Debian 10)".format(got, *OLDEST_GLIBC))
    if machine.python < OLDEST_PYTHON:
        problems.append(
            "Python too old: got {}.{}, needs {}.{} or later to start with; say which with `make PYTHON=/path/to/python3`".format(
                *(tuple(machine.python[:2]) + OLDEST_PYTHON)
            )
        )
    if machine.memory_bytes < MEMORY_GB * 10**9:
        problems.append("too little memory: got {:.1f} GB, needs {} GB".format(machine.memory_bytes / 1e9, MEMORY_GB))
    if machine.disk_bytes < DISK_GB[extra] * 10**9:
        problems.append(
            "too little disk: got {:.1f} GB free where .venv goes, needs {} GB".format(machine.disk_bytes / 1e9, DISK_GB[extra])
        )
    return problems


def this_machine(root: Path) -> Machine:
    """Measure the machine that this runs on."""
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        python=tuple(sys.version_info[:2]),
        glibc=_glibc(),
        avx2=_has_avx2(),
        memory_bytes=_memory_bytes(),
        disk_bytes=shutil.disk_usage(str(root)).free,
    )


def _glibc() -> Optional[tuple]:
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
    except (AttributeError, ValueError, OSError):
        return None
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else None


def _has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or " avx2" in cpuinfo.read_text(errors="replace")


def _memory_bytes() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    text = limit.read_text().strip() if limit.exists() else "max"
    return memory if text == "max" else min(memory, int(text))


def stamp_text(extra: str, lock: Path) -> str:
    """What the stamp of an environment that holds exactly ``lock`` says."""
    return "{} {}\n".format(extra, hashlib.sha256(lock.read_bytes()).hexdigest())


def is_current(venv: Path, extra: str, lock: Path) -> bool:
    """Whether ``venv`` was completed for this lock and its Python still runs."""
    stamp = venv / ".rondo-stamp"
    return stamp.is_file() and stamp.read_text() == stamp_text(extra, lock) and python_works(venv)


def installed_extra(venv: Path) -> Optional[str]:
    """The extra that ``venv`` was last completed for, if any."""
    stamp = venv / ".rondo-stamp"
    words = stamp.read_text().split() if stamp.is_file() else []
    return words[0] if words and words[0] in DISK_GB else None


def python_works(venv: Path) -> bool:
    """Whether the environment's interpreter starts and is the version that the locks are for."""
    code = "import sys; sys.exit(sys.version_info[:2] != ({}, {}))".format(*PYTHON_VERSION.split("."))
    try:
        return subprocess.call([str(venv / "bin" / "python"), "-I", "-S", "-c", code], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def find_links(environ: dict, pip_config: str) -> str:
    """Where this machine keeps extra wheels, in uv's form (comma-separated): the environment's word, else pip's configuration.

    uv does not read pip's configuration, so that a machine that gives pip a place for torch's CPU build must be asked.
    """
    for value in (environ.get("UV_FIND_LINKS", ""), environ.get("PIP_FIND_LINKS", ""), pip_config):
        places = value.replace(",", " ").split()
        if places:
            return ",".join(places)
    return ""


def pip_find_links() -> str:
    """pip's configured global.find-links, or nothing (none set, or no pip)."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def torch_requirement(lock: Path) -> str:
    """The lock's line for torch."""
    for line in lock.read_text().splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise SetupError("{} names no torch; run `make lock`".format(lock.name))


def say(text: str) -> None:
    print("setup: " + text, flush=True)


def run(command: List[str], environ: dict, quiet: bool = False) -> bool:
    """Run a command; True if it succeeded. ``quiet`` keeps its output to itself."""
    stream = subprocess.DEVNULL if quiet else None
    return subprocess.call(command, env=environ, stdout=stream, stderr=stream) == 0


def find_uv(root: Path) -> str:
    """uv: the one on the PATH, else the one in .bootstrap, which is made first if need be."""
    own = root / ".bootstrap" / "bin" / "uv"
    for candidate in (shutil.which("uv"), str(own)):
        if candidate and os.path.exists(candidate) and run([candidate, "--version"], dict(os.environ), quiet=True):
            return candidate
    say("fetching uv {} into .bootstrap".format(UV_VERSION))
    bootstrap = root / ".bootstrap"
    package = "uv==" + UV_VERSION
    environ = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    shutil.rmtree(str(bootstrap), ignore_errors=True)
    # Debian splits venv's pip off into python3-venv, so this may fail where pip itself is there.
    if run([sys.executable, "-m", "venv", str(bootstrap)], environ, quiet=True):
        run([str(bootstrap / "bin" / "python"), "-m", "pip", "install", "-qq", package], environ)
    else:
        shutil.rmtree(str(bootstrap), ignore_errors=True)
        run([sys.executable, "-m", "pip", "install", "-qq", "--target", str(bootstrap), package], environ)
    if not own.exists():
        raise SetupError(
            "could not install uv (above): put `uv` on the PATH, or give {} venv and pip (Debian: apt-get install "
            "python3-venv) and a reachable package registry, then run this again".format(sys.executable)
        )
    return str(own)


def make_venv(uv: str, venv: Path, environ: dict) -> None:
    """An empty environment of the right Python, unless a working one is there. Relocatable: the checkout may be moved."""
    if python_works(venv):
        return
    shutil.rmtree(str(venv), ignore_errors=True)
    say("making .venv with Python {}".format(PYTHON_VERSION))
    command = [uv, "venv", "--quiet", "--no-project", "--relocatable", "--python", PYTHON_VERSION, str(venv)]
    if not run(command, environ):
        raise SetupError(
            "no Python {0} (above): uv found none and could not fetch one; install python{0}, run this again".format(
                PYTHON_VERSION
            )
        )


def install(uv: str, venv: Path, lock: Path, environ: dict) -> None:
    """Make ``venv`` hold exactly what ``lock`` names."""
    python = str(venv / "bin" / "python")
    torch = torch_requirement(lock)
    options = [] if sys.stderr.isatty() else ["--quiet"]  # a person sees the downloads; a log is spared 200 lines
    if "+cpu" in torch:
        options += ["--only-binary", ":all:"]  # no compiler is needed
        # First by itself: a second index beside the registry would be asked for every other package too.
        command = [uv, "pip", "install", "--python", python, "--no-deps", torch]
        if not run([*command, "--no-index"], environ, quiet=True):
            say("fetching {} from torch's CPU wheel index".format(torch))
            if not run([*command, *options, "--default-index", TORCH_CPU_INDEX], environ):
                raise SetupError(
                    "could not get {} (above): neither this machine's find-links nor torch's CPU wheel index has it; "
                    "put its wheel into a directory and name that in UV_FIND_LINKS".format(torch)
                )
    if not run([uv, "pip", "sync", "--python", python, *options, str(lock)], environ):
        raise SetupError("could not install {} (above); what was fetched is kept, run this again".format(lock.name))


def setup(root: Path, extra: str) -> None:
    """Bring ``root``/.venv to the lock of ``extra``."""
    venv, lock = root / ".venv", root / "requirements-{}.txt".format(extra)
    if is_current(venv, extra, lock):
        return
    problems = preflight(this_machine(root), extra)
    if problems:
        raise SetupError("\n".join(problems))
    start = time.time()
    uv = find_uv(root)
    environ = dict(os.environ)
    links = find_links(environ, pip_find_links())
    if links:
        environ["UV_FIND_LINKS"] = links
    stamp = venv / ".rondo-stamp"
    if stamp.exists():
        stamp.unlink()  # from here to the end the environment is unfinished
    make_venv(uv, venv, environ)
    say("installing {} into .venv".format(lock.name))
    install(uv, venv, lock, environ)
    fresh = venv / ".rondo-stamp.new"
    fresh.write_text(stamp_text(extra, lock))
    os.replace(str(fresh), str(stamp))
    say("done in {:.0f} s".format(time.time() - start))


def main(arguments: List[str]) -> int:
    extra = arguments[0] if arguments else installed_extra(ROOT / ".venv") or "cpu"
    if len(arguments) > 1 or extra not in DISK_GB:
        print("usage: python3 scripts/setup.py [cpu|gpu]   (default: what .venv holds, else cpu)", file=sys.stderr)
        return 2
    try:
        setup(ROOT, extra)
    except SetupError as error:
        for line in str(error).splitlines():
            print("setup: error: " + line, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("setup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
