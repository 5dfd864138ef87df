"""The documentation is true: its examples run, its links lead somewhere, the equations that code cites are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert EXAMPLES


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
