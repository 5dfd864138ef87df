"""The command `lasp`: how its words are read, and how errors are told; what they do is in lasp.commands."""

import functools
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from io import StringIO
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Positional

from lasp import __version__, installed, launched
from lasp.text_commands import prepare, tokenizer

TEXT_COMMANDS: dict[str, Callable[..., None]] = {"prepare": prepare, "tokenizer": tokenizer}
DESCRIPTION = f"lasp {__version__}: sequence-parallel training of linear-attention and hybrid language models."


def resume_with(overrides: list[str]) -> Callable[[str], None]:
    """The command `resume`, with what follows the directory; which fields there are is known when it is read."""

    def resume(run_dir: Positional[str]) -> None:
        """Go on with a run as it was started last, wherever its directory is now.

        Fields may follow, as of `lasp train`: --steps 2000 --parallel.sequence-parallel 4.

        Args:
            run_dir: the run's directory.
        """
        from lasp.config import TrainConfig
        from lasp.training.starts import last_config
        from lasp.training.train import train

        default = last_config(run_dir)
        with _one_rank_speaks():
            config = tyro.cli(TrainConfig, default=default, args=overrides, prog=f"lasp resume {run_dir}")
        train(config)

    return resume


def main(args: list[str] | None = None) -> None:
    """Parses the command line (of this process, if args is None) and runs the command."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"lasp {__version__}")
        return
    if args and args[0] in TEXT_COMMANDS:
        _one_of_commands(TEXT_COMMANDS, args)()
        return
    with installed.whole():
        from lasp import commands
        from lasp.chosen import choose
        from lasp.evaluation.evaluate import EVALUATIONS
        from lasp.evaluation.quality.config import TABLES
        from lasp.evaluation.recall.config import SWEEPS
        from lasp.evaluation.tasks import TASKS
        from lasp.training.recipes import RECIPES

    if args[:1] in (["train"], ["config"]):
        with _one_rank_speaks():
            chosen = choose(args[0], args[1:], {**RECIPES, **SWEEPS, **TABLES})
        _deferred(getattr(commands, args[0]))(chosen)()
        return
    for command in (commands.train, commands.config):
        command.__annotations__["config"] = Positional[str]  # for the list of commands; `choose` reads their words
    args, overrides = (args[:2], args[2:]) if args[:1] == ["resume"] else (args, [])
    tasks = {name.replace("_", "-"): task for name, task in TASKS.items()}
    commands.synthesize.__annotations__["task"] = Annotated[_one_of(tasks), tyro.conf.arg(name="")]
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in EVALUATIONS.items())
    commands.evaluate.__annotations__["what"] = Annotated[Union[kinds], tyro.conf.arg(name="")]  # noqa: UP007
    functions: dict[str, Callable[..., None]] = {
        **TEXT_COMMANDS,
        "synthesize": commands.synthesize,
        "train": commands.train,
        "config": commands.config,
        "resume": resume_with(overrides),
        "plan": commands.plan,
        "generate": commands.generate,
        "report": commands.report,
        "plot": commands.plot,
        "eval": commands.evaluate,
        "extend": commands.extend,
        "export": commands.export_weights,
        "import": commands.import_weights,
    }
    _one_of_commands(functions, args)()


def _one_of_commands(functions: Mapping[str, Callable[..., None]], args: list[str]) -> Callable[[], None]:
    """The command that the words say, with its arguments."""
    commands = {name: _deferred(function) for name, function in functions.items()}
    with _one_rank_speaks():
        return tyro.extras.subcommand_cli_from_dict(commands, prog="lasp", description=DESCRIPTION, args=args)


def _one_rank_speaks() -> AbstractContextManager:
    """Inside it only one of the ranks says what is wrong with the command line."""
    return nullcontext() if launched.is_spokesman() else redirect_stderr(StringIO())


def console() -> None:
    """The shell's command: what is wrong with its input takes one line, on one rank, and gives the exit code 1."""
    try:
        launched.recorded(main)()
    except Exception as error:
        if not _explains(error):
            raise
        if launched.is_spokesman():
            print("lasp:", *" ".join([str(error), *getattr(error, "__notes__", [])]).split(), file=sys.stderr)
        sys.exit(1)


def _explains(error: Exception) -> bool:
    """Whether it says what is wrong with the input: what lasp raises, and the system's about files. Others are bugs."""
    if type(error).__name__ != "OutOfMemoryError" and not isinstance(error, ValueError | OSError | FloatingPointError):
        return False  # the first is PyTorch's, which may not be loaded
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError) or frame.f_globals["__name__"].startswith("lasp.")


def _one_of(defaults: dict[str, Any]) -> Any:
    """The type of a subcommand for each default, by its name, with its fields as options."""
    return tyro.extras.subcommand_type_from_defaults(defaults, prefix_names=False)


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Parses like the function but only binds its arguments: the command's own errors are not the command line's."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    return bind


if __name__ == "__main__":
    console()
