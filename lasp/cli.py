"""The command `lasp`: prepare data, train a recipe, generate text, report on a run."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from lasp.training.recipes import RECIPES


def prepare(
    inputs: Positional[tuple[str, ...]],
    output: str,
    tokenizer: str = "byte",
    eod: str | None = None,
    valid_fraction: float = 0.05,
) -> None:
    """Turn text files and folders into token files.

    Args:
        inputs: files, folders, or the word "stdlib": the source text of Python's standard library.
        output: path prefix; the files are PREFIX_train and PREFIX_valid, .bin and .idx each.
        tokenizer: "byte", or the path of a Hugging Face tokenizer.json.
        eod: the tokenizer's end-of-document token; found by its usual names if not given.
        valid_fraction: the part of the documents that is held out.
    """
    from lasp.data.prepare import prepare

    print(prepare(inputs, output, tokenizer, eod=eod, valid_fraction=valid_fraction))


def train(config: Any) -> None:
    """Train a recipe; alone, or on the ranks that torchrun started.

    A run whose directory holds a checkpoint goes on from it.
    """
    from lasp.training.train import train

    train(config)


def generate(
    run_dir: Positional[str],
    prompt: str = "",
    tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> None:
    """Continue a prompt with a run's last checkpoint.

    Args:
        run_dir: the run's directory.
        prompt: the text to go on from.
        tokens: how many to generate, at most: a document's end ends the text.
        temperature: 0 takes the likeliest token every time.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the sampling.
    """
    from lasp.training.generate import generate

    print(prompt, end="")
    for text in generate(run_dir, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed):
        print(text, end="", flush=True)
    print()


def report(run_dir: Positional[str]) -> None:
    """Draw a run's loss curves and print its held-out loss.

    Args:
        run_dir: the run's directory; the curves go to loss.png in it.
    """
    from lasp.training.report import report

    print(report(run_dir))


def main(args: list[str] | None = None) -> None:
    """Parses the command line (of this process, if args is None) and runs the command."""
    recipes = {name.replace("_", "-"): recipe for name, recipe in RECIPES.items()}
    configs = {name: recipe() for name, recipe in recipes.items()}
    texts = {name: (recipe.__doc__ or "").strip() for name, recipe in recipes.items()}
    chosen = tyro.extras.subcommand_type_from_defaults(configs, texts, prefix_names=False)
    train.__annotations__["config"] = Annotated[chosen, tyro.conf.arg(name="")]
    commands = {f.__name__: _deferred(f) for f in (prepare, train, generate, report)}
    tyro.extras.subcommand_cli_from_dict(commands, prog="lasp", args=args)()


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Parses like the function but only binds its arguments: the command's own errors are not the command line's."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    return bind


if __name__ == "__main__":
    main()
