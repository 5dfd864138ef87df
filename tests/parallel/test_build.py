"""How csrc/ is built: what is compiled again and what is not, who compiles, and what is told of failures."""

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lasp.parallel import build

# It notes what it makes, slowly, and fails on what has "mistake" in it.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then cat "$0.version"; exit; fi
for out; do :; done
echo "${out%%-*}.${out##*.}" >>"$0.made"
sleep 0.1
if grep -qe mistake -- "$@" 2>/dev/null; then echo "a mistake is here" >&2; exit 1; fi
touch "$out"
"""
SETUP = Path(__file__).parents[2] / "setup.py"


class Csrc:
    """Two sources and a header, and a compiler for them."""

    def __init__(self, folder: Path):
        self.sources, self.built, self.compiler = folder / "csrc", folder / "built", folder / "compiler"
        self.sources.mkdir()
        for name in ("one.cpp", "two.cpp", "both.h"):
            (self.sources / name).write_text(name)
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(stat.S_IRWXU)
        self.set_version("1.0")

    def set_version(self, version: str) -> None:
        Path(f"{self.compiler}.version").write_text(version)
        build.version.cache_clear()

    def library(self, *flags: str) -> build.Library:
        return build.Library("both", ".cpp", (str(self.compiler), *flags))

    def make(self, *flags: str) -> Path:
        return build.build([self.library(*flags)], self.built)[0]

    def made(self) -> list[str]:
        """What has been compiled and linked since this was last asked."""
        notes = Path(f"{self.compiler}.made")
        lines = notes.read_text().split() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return sorted(lines)


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Csrc:
    if shutil.which("ninja") is None:
        pytest.skip("no ninja")
    made = Csrc(tmp_path)
    monkeypatch.setattr(build, "SOURCES", made.sources)
    monkeypatch.setattr(build, "CACHE", made.built)
    return made


def test_only_what_has_changed_is_compiled_again(csrc: Csrc):
    first = csrc.make()
    assert csrc.made() == ["both.part", "one.o", "two.o"]
    assert csrc.make() == first and csrc.made() == []

    old = (csrc.sources / "one.cpp").stat()
    (csrc.sources / "one.cpp").write_text("changed")
    os.utime(csrc.sources / "one.cpp", ns=(old.st_atime_ns, old.st_mtime_ns))  # as copies of files may have them
    assert csrc.make() != first
    assert csrc.made() == ["both.part", "one.o"]

    (csrc.sources / "both.h").write_text("changed")
    csrc.make()
    assert csrc.made() == ["both.part", "one.o", "two.o"]
    csrc.make("-flag")
    assert csrc.made() == ["both.part", "one.o", "two.o"]
    csrc.set_version("2.0")
    csrc.make("-flag")
    assert csrc.made() == ["both.part", "one.o", "two.o"]


def test_of_many_processes_one_compiles(csrc: Csrc):
    with ThreadPoolExecutor(4) as pool:  # a lock is not of a process, but of who opened its file
        assert len(set(pool.map(lambda _: csrc.make(), range(4)))) == 1
    assert csrc.made() == ["both.part", "one.o", "two.o"]


def test_what_was_built_ahead_is_taken_while_its_sources_are_these(csrc: Csrc):
    library = csrc.library()
    ahead = csrc.sources / library.ahead()
    ahead.parent.mkdir()
    ahead.touch()
    csrc.compiler.rename(csrc.compiler.with_name("gone"))
    assert build.find(library) == ahead
    (csrc.sources / "both.h").write_text("changed")
    with pytest.raises(build.Unavailable, match="there is no .*compiler"):
        build.find(library)


def test_a_failure_names_the_command_and_what_it_said(csrc: Csrc):
    (csrc.sources / "one.cpp").write_text("mistake")
    with pytest.raises(build.Unavailable) as failure:
        csrc.make("-flag")
    for word in (f"{csrc.compiler} -flag -c {csrc.sources / 'one.cpp'}", "a mistake is here"):
        assert word in str(failure.value)
    assert csrc.made() == ["one.o", "two.o"]
    (csrc.sources / "one.cpp").write_text("corrected")
    csrc.make("-flag")
    assert csrc.made() == ["both.part", "one.o"]


def test_without_a_compiler_or_ninja_the_reason_is_told(csrc: Csrc, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(build.Unavailable, match="there is no compiler-that-is-not-there"):
        build.find(build.Library("none", ".cpp", ("compiler-that-is-not-there",)))
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **more: None if name == "ninja" else which(name, **more))
    with pytest.raises(build.Unavailable, match=r"no ninja: pip install 'lasp-sp\[native\]'"):
        csrc.make()


def test_a_folder_that_cannot_be_written_is_no_crash(csrc: Csrc):
    csrc.built.write_text("a file")
    with pytest.raises(build.Unavailable, match="File exists"):
        csrc.make()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_the_device_code_compiles():
    assert build.find(build.device("90")).is_file()


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("ninja") is None, reason="no C++ compiler or no ninja")
def test_setup_builds_ahead(tmp_path: Path):
    """As a wheel has it: the CPU's part always."""
    command = [sys.executable, SETUP, "-q", "build_native", f"--build-lib={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "LASP_CUDA_ARCHITECTURES"}
    subprocess.run(command, cwd=SETUP.parent, env=environment, check=True)
    assert (tmp_path / "lasp" / "csrc" / build.HOST.ahead()).is_file()
    wrong = subprocess.run(
        command, env=environment | {"LASP_CUDA_ARCHITECTURES": "9.0"}, capture_output=True, text=True
    )
    assert "LASP_CUDA_ARCHITECTURES: got '9.0', expected architectures such as '80;90'" in wrong.stderr
