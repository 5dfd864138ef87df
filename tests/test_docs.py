"""The documentation is true: its examples run, its links lead somewhere, the equations that code cites are there."""

import functools
import gzip
import json
import re
import shlex
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lasp import cli
from lasp.chosen import as_yaml
from lasp.training.recipes import quickstart

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
    pytest.param(page, line, id=f"{page.relative_to(ROOT)}: {line[:60]}")
    for page in PAGES
    for code in blocks(page, "bash")
    for line in code.replace("\\\n", "").splitlines()
    if re.match("lasp |bash launch/", line)
]
RUN = {
    "README.md",
    "data.md",
    "log-linear.md",
    "model.md",
    "mixer.md",
    "moe.md",
    "training.md",
}  # lasp commands run here
ELSEWHERE = {  # commands of these kinds run in tests of their own
    "lasp eval": "tests/evaluation",
    "lasp synthesize": "tests/evaluation/test_tasks.py",
    "lasp train mqar": "tests/evaluation/test_sweep.py",
    "lasp train quality": "tests/evaluation/test_quality.py",
    "lasp extend": "tests/evaluation/test_extension.py",
    "lasp plan": "tests/training/test_planning.py",
    "lasp export": "tests/integrations/test_exchange.py",
    "lasp import": "tests/integrations/test_exchange.py",
    "lasp prepare": "tests/data/test_prepare.py",
    "bash launch/": "tests/launch",
}
TRAIN = "--steps 1 --context-length 64 --model.hidden-size 16 --device cpu --eval-every 1"
SMALL = {
    "train": TRAIN.split(),
    "config": TRAIN.split(),
    "resume": ["--steps", "2"],
    "generate": ["--tokens", "2"],
}
BEFORE_RECIPE = {"torchrun.sh": 1, "multinode.sh": 3, "deepspeed.sh": 2}  # arguments of a launcher


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_one(page: Path, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lasp takes its arguments; a launcher gets as many as it needs."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(as_yaml(quickstart()))
    asked: list[object] = []
    monkeypatch.setattr(cli, "_deferred", lambda f: functools.wraps(f)(lambda *a, **k: lambda: asked.append((a, k))))
    words = shlex.split(command.split(" > ")[0], comments=True)
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


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_run_or_says_what_it_needs(page: Path, command: str) -> None:
    run_here = page.name in RUN and command.startswith("lasp ")
    elsewhere = [test for kind, test in ELSEWHERE.items() if command.startswith(kind) and (ROOT / test).exists()]
    assert run_here or elsewhere or re.search(r"# .*needs ", command)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """What the pages' commands read, in the working directory."""
    monkeypatch.chdir(tmp_path)
    texts = [f"the text of number {number}, which goes on " * 5 for number in range(30)]
    for folder in ("library", "my_corpus", "data", "my_model"):
        (tmp_path / folder).mkdir()
    for number, text in enumerate(texts):
        for name in (f"library/{number}.py", f"my_corpus/{number}.txt"):
            (tmp_path / name).write_text(f"{name} {text}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, vocab_size=300)
    tokenizer.train_from_iterator(texts, trainer)
    for name in ("my_tokenizer.json", "data/tokenizer.json", "my_model/tokenizer.json"):
        tokenizer.save(name)
    Path("my_texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = (json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts)
    Path("chats.jsonl").write_text("".join(chats))
    with gzip.open("more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in texts)
    for output, text in (("runs/data/stdlib", "stdlib"), ("data/code", "my_corpus"), ("data/books", "my_texts.jsonl")):
        cli.main(["prepare", text, "--output", output])


@pytest.mark.parametrize("name", sorted({param.values[0].name for param in COMMANDS} & RUN))
def test_the_commands_of_a_page_run(name, corpora, capsys) -> None:
    """On one process, in their order, as they stand but for their size."""
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    commands = [param.values[1] for param in COMMANDS if param.values[0] == page and param.values[1].startswith("lasp")]
    for command in commands:
        words, *file = (shlex.split(part, comments=True) for part in command.split(" > "))
        if re.search(r"# .*needs |--help|train mqar", command):  # sweeps have tests of their own
            continue
        small = [*SMALL.get(words[1], []), *(["--curriculum", "32:1"] if "--curriculum" in words else [])]
        capsys.readouterr()
        cli.main([*words[1:], *small])
        if file:
            Path(file[0][0]).write_text(capsys.readouterr().out)


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


def test_the_api_page_has_every_public_name() -> None:
    """As mkdocstrings finds them: it shows a function, say, only where no module has its name."""
    griffe = pytest.importorskip("griffe")
    page = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    package = griffe.load("lasp", search_paths=[ROOT])
    for name in ("kernels", "parallel", "models", "data", "plan", "integrations.huggingface", "integrations.megatron"):
        assert f"lasp.{name}" in page
        for public in map(str, package[name].exports):
            shown = not package[name].members[public].is_module
            assert shown or f"lasp.{name}.{public}" in page, f"lasp.{name}.{public}"


def test_the_first_page_has_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(cli, "_one_of_commands", lambda functions, args: lambda: commands.extend(functions))
    cli.main(["--help"])
    assert set(re.findall(r"^\| `lasp (\w+)", (ROOT / "docs/index.md").read_text(), re.MULTILINE)) == set(commands)
