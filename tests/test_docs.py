"""The documentation is true: its examples run, its links lead somewhere, the equations that code cites are there."""

import functools
import re
import shlex
import sysconfig
from pathlib import Path

import pytest

from lasp import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


EXAMPLES = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]
COMMANDS = [
    line
    for page in PAGES
    for code in blocks(page, "bash")
    for line in code.replace("\\\n", "").splitlines()
    if re.match("lasp |bash launch/", line)
]
BEFORE_RECIPE = {"torchrun.sh": 1, "multinode.sh": 3, "deepspeed.sh": 2}  # arguments of a launcher


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """lasp takes its arguments; a launcher gets as many as it needs."""
    asked: list[object] = []
    monkeypatch.setattr(cli, "_deferred", lambda f: functools.wraps(f)(lambda *a, **k: lambda: asked.append((a, k))))
    words = shlex.split(command, comments=True)
    if words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file()
        if script.name not in BEFORE_RECIPE:
            return
        words = words[2 + BEFORE_RECIPE[script.name] :]
        words = ["lasp", *([] if words[0] == "resume" else ["train"]), *words]
        if script.name == "deepspeed.sh":
            words += ["--engine", "deepspeed", "--parallel.no-fsdp"]
    if words[1:] != ["train", "--help"]:
        cli.main(words[1:])
        assert len(asked) == 1


def test_the_first_commands_of_training_run(tmp_path, monkeypatch, capsys) -> None:
    """On one process, as they stand but for their size."""
    (tmp_path / "library").mkdir()
    for number in range(30):
        (tmp_path / f"library/{number}.py").write_text(f"print({number})\n" * 20)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)
    small = "--steps 1 --context-length 64 --data.eval-contexts 1 --model.hidden-size 16 --device cpu"
    sizes = {"train": small.split(), "generate": ["--tokens", "2"]}
    page = (ROOT / "docs/training.md").read_text()
    prepare, train, generate = (
        shlex.split(re.search(f"^lasp {words}.*$", page, re.MULTILINE)[0], comments=True)[1:]
        for words in ("prepare stdlib", "train quickstart --steps", "generate")
    )
    for words in (prepare, train, generate):
        cli.main([*words, *sizes.get(words[0], [])])
    assert "held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_cited_equations_are_documented() -> None:
    sections = set(re.findall(r"^## §(\d+) ", (ROOT / "docs/mathematics.md").read_text(), re.MULTILINE))
    assert sections
    for path in [*(ROOT / "lasp").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text()
        cited = {
            n for run in re.findall(r"math (§\d+(?:[,–-] ?§?\d+| and §?\d+)*)", text) for n in re.findall(r"\d+", run)
        }
        assert cited <= sections, f"{path.name} cites math §{sorted(cited - sections)}"
