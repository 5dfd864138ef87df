"""Builds the native code of csrc/ with ninja: ahead of time by setup.py, where there is no PyTorch yet, or when it is
first needed.

What is built is named after all that it is built from: sources, headers, flags, the compiler's version and the kind of
machine. So what is there is never out of date, whatever files' times say, and a folder may serve several checkouts.
"""

import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LASP = Path(__file__).parents[1]
SOURCES = LASP / "csrc" if (LASP / "csrc").is_dir() else LASP.parent / "csrc"  # installed, or in a checkout
CACHE = Path.home() / ".cache" / "lasp" / "native"


# A library is moved when it is whole, so that nobody takes it for one before.
RULES = """\
rule compile
  command = $using -c $in -o $out
rule link
  command = $using -shared $in -o $out.part && mv $out.part $out
"""


class Unavailable(RuntimeError):
    """There is no compiler or no ninja, or what they said."""


@dataclass(frozen=True)
class Library:
    """All sources of one suffix, each compiled and then linked by `command`."""

    name: str
    suffix: str
    command: tuple[str, ...]

    def sources(self) -> list[Path]:
        found = sorted(SOURCES.glob(f"*{self.suffix}"))
        if not found:
            raise Unavailable(f"{SOURCES} has no *{self.suffix}")
        return found

    def digest(self, *more: str, sources: Sequence[Path] | None = None) -> str:
        texts = [path.read_bytes() for path in [*sorted(SOURCES.glob("*.h")), *(sources or self.sources())]]
        facts = [sysconfig.get_platform(), *self.command, *more]
        return hashlib.sha256(b"\0".join([*texts, *(fact.encode() for fact in facts)])).hexdigest()[:16]

    def ahead(self) -> str:
        """Where setup.py puts it, under csrc/. Any compiler's will do."""
        return f"built/{self.name}-{self.digest()}.so"

    def file(self) -> str:
        return f"{self.name}-{self.digest(version(self.command[0]))}.so"

    def edges(self) -> list[str]:
        """How ninja makes it."""
        lines, objects, using = [], [], f"  using = {' '.join(self.command)}"
        for source in self.sources():
            objects.append(f"{source.stem}-{self.digest(version(self.command[0]), sources=[source])}.o")
            lines += [f"build {objects[-1]}: compile {_escaped(source)}", using]
        return [*lines, f"build {self.file()}: link {' '.join(objects)}", using]


HOST = Library("host", ".cpp", ("c++", "-O2", "-std=c++17", "-Wall", "-fPIC"))


def device(architecture: str) -> Library:
    """For GPUs of one architecture, such as "90"."""
    gencode = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ("nvcc", "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-gencode", gencode)
    return Library(f"device-{architecture}", ".cu", command)


def find(library: Library) -> Path:
    """The library, built now unless that has been done before."""
    ahead = SOURCES / library.ahead()
    return ahead if ahead.is_file() else build([library], CACHE)[0]


def build(libraries: Sequence[Library], folder: Path) -> list[Path]:
    """The libraries, in this folder; all that has to be compiled for them is compiled side by side, by one process at a
    time. If something fails, the rest is built nevertheless.

    Raises:
        Unavailable: no compiler, no ninja, or the commands that failed and what they said.
    """
    made = [folder / library.file() for library in libraries]
    if all(library.is_file() for library in made):
        return made
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise Unavailable("there is no ninja: pip install 'lasp-sp[native]'")
    import fcntl  # not everywhere; where there is none, neither is this compiler

    edges = [line for library in libraries for line in library.edges()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed; also by a process that dies
            (folder / "build.ninja").write_text("\n".join([RULES, *edges, ""]))
            done = subprocess.run([ninja, "-k", "0"], cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        raise Unavailable(f"{ninja} failed in {folder}:\n{done.stdout}{done.stderr}".rstrip())
    return made


@cache
def version(compiler: str) -> str:
    """What this compiler says of itself."""
    path = shutil.which(compiler)
    if path is None:
        raise Unavailable(f"there is no {compiler}")
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def _escaped(path: Path) -> str:
    """As ninja wants paths."""
    return re.sub(r"([ :$])", r"$\1", str(path))
