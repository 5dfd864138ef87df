"""The command `lasp`: prepare data, plan and train recipes, generate text, evaluate runs, exchange weights …"""

import functools
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from typing import Annotated, Any, Literal, Union

import torch
import tyro
from tyro.conf import Positional

from lasp import __version__
from lasp.config import require
from lasp.data.sources import SUFFIXES
from lasp.distillation.config import Distillation, Linear
from lasp.evaluation.evaluate import EVALUATIONS
from lasp.evaluation.extension import Extension
from lasp.evaluation.quality.config import TABLES, QualityTable
from lasp.evaluation.recall.config import SWEEPS, RecallSweep
from lasp.evaluation.tasks import TASKS
from lasp.training import runtime
from lasp.training.recipes import RECIPES

LINEAR, DISTILLATION = Linear(), Distillation()
DESCRIPTION = f"lasp {__version__}: sequence-parallel training of linear-attention and hybrid language models."


def prepare(
    inputs: Positional[tuple[str, ...]],
    output: str,
    tokenizer: str = "byte",
    eod: str | None = None,
    text_field: str = "text",
    suffixes: tuple[str, ...] = SUFFIXES,
    valid_fraction: float = 0.05,
    chat: bool = False,
    folders: bool = False,
) -> None:
    """Turn texts into token files: plain text, JSON Lines, parquet, saved data sets; compressed or not.

    Args:
        inputs: files, folders, or the word "stdlib": the source text of Python's standard library.
        output: path prefix; the files are PREFIX_train and PREFIX_valid, .bin and .idx each.
        tokenizer: "byte", or the path of a Hugging Face tokenizer.json.
        eod: the tokenizer's end-of-document token; found by its usual names if not given.
        text_field: of a record (a line of JSON Lines, a row), the field that is its document.
        suffixes: of the files that are read in folders.
        valid_fraction: the part of the documents that is held out.
        chat: records hold conversations, "messages", or "prompt" and "completion"; only what the assistant says, or
            the completion, has a loss. Messages go through the chat template of the tokenizer's directory.
        folders: the texts of a folder are one document, each after a line with its file's name.
    """
    from lasp.data.prepare import prepare

    settings: dict[str, Any] = {
        "text_field": text_field,
        "suffixes": suffixes,
        "valid_fraction": valid_fraction,
        "folders": folders,
    }
    print(prepare(inputs, output, tokenizer, eod=eod, chat=(lambda: _chat(tokenizer)) if chat else None, **settings))


def tokenizer(
    inputs: Positional[tuple[str, ...]],
    output: str,
    vocab_size: int = 32_768,
    text_field: str = "text",
    suffixes: tuple[str, ...] = SUFFIXES,
    characters: int | None = None,
) -> None:
    """Train a tokenizer of one's own (byte-level BPE) on texts, the same as `lasp prepare` reads.

    Args:
        inputs: files, folders, or the word "stdlib".
        output: the tokenizer.json to write.
        vocab_size: tokens, the end of a document included.
        text_field: of a record, the field that is its document.
        suffixes: of the files that are read in folders.
        characters: of longer texts every n-th part is read, about so many characters.
    """
    from lasp.data.bpe import train_on

    settings: dict[str, Any] = {"text_field": text_field, "suffixes": suffixes, "characters": characters}
    print(train_on(inputs, output, vocab_size, **settings))


def synthesize(task: Any, output: str, sequences: int = 20_000, held_out: int = 1_000, seed: int = 0) -> None:
    """Write a recall task's sequences as token files, PREFIX_train and PREFIX_valid, whose labels are the answers.

    Args:
        task: which, and its settings.
        output: path prefix of the files.
        sequences: of the training files; each is a document.
        held_out: sequences of the validation files.
        seed: of the training files; the validation files' is the next one.
    """
    from lasp.evaluation.tasks import write

    for split, number, its_seed in (("train", sequences, seed), ("valid", held_out, seed + 1)):
        write(task, f"{output}_{split}", number, its_seed)
        print(f"{output}_{split}: {number:,} sequences of {task.length:,} tokens, ids below {task.vocab_size:,}")


def train(config: Any) -> None:
    """Train a recipe; alone, or on the ranks that torchrun started.

    A run whose directory holds a checkpoint goes on from it.
    """
    if isinstance(config, RecallSweep):
        from lasp.evaluation.recall import sweep

        sweep.run(config)
        return
    if isinstance(config, QualityTable):
        from lasp.evaluation.quality import run as table

        table.run(config)
        return
    from lasp.training.train import train

    train(config)


def plan(
    model: Positional[str],
    gpu: str = "H200",
    gpus: int | None = None,
    context: int | None = None,
    pattern: str | None = None,
    mixer: str | None = None,
    sequence_parallel: int | None = None,
    recompute: Literal["auto", "none", "selective", "full"] = "auto",
    recompute_layers: int | None = None,
    offload_activations: bool | None = None,
    segment_tokens: int | None = None,
    segment_offload: bool | None = None,
    json: bool = False,
    plot: str | None = None,
) -> None:
    """Say what a training step takes of GPUs' memory and time, whether it fits, and which settings are best.

    Args:
        model: a preset (linear_llama3_1b), a recipe (linear-llama3-1b-128k), or the directory of a run.
        gpu: its name: H100, H200, A100-40, A100-80, B200, RTX-4090 …, or "here", measured.
        gpus: how many; 1, or as many as the recipe splits contexts over.
        context: tokens; the recipe's or the run's if not given.
        pattern: of the model's layers: L linear, N softmax.
        mixer: of the linear layers.
        sequence_parallel: ranks that share a context. With none of these six the best settings are planned.
        recompute: what of the layers is computed again in the backward pass; auto: as little as fits.
        recompute_layers: how many of the layers, the others less; all if not given.
        offload_activations: whether layers' inputs wait in the host's memory.
        segment_tokens: of a stream's segments.
        segment_offload: whether what they hand on to each other waits in the host's memory.
        json: bytes and seconds, as JSON.
        plot: a PNG to write, of memory against the context's length.
    """
    from lasp.training import planning

    wishes = planning.Wishes(
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        recompute_layers=recompute_layers,
        offload_activations=offload_activations,
        segment_tokens=segment_tokens,
        segment_offload=segment_offload,
    )
    planning.show(model, gpu, planning.Asked(gpus, context, pattern, mixer), wishes, as_json=json, picture=plot)


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


def generate(
    run_dir: Positional[str],
    prompt: str = "The",
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

    texts = generate(run_dir, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed)
    print(prompt + next(texts, ""), end="", flush=True)  # an error comes before any text
    for text in texts:
        print(text, end="", flush=True)
    print()


def report(run_dir: Positional[str]) -> None:
    """Draw a run's loss curves and print its held-out loss.

    Args:
        run_dir: the run's directory; the curves go to loss.png in it.
    """
    from lasp.training.report import report

    print(report(run_dir))


def evaluate(what: Any) -> None:
    """Evaluate a run or an exported model; alone, or on the ranks that torchrun started, which share each context.

    Results go to MODEL/evaluation: a JSON file, a table and a picture.
    """
    from lasp.evaluation.evaluate import evaluate

    evaluate(what)


def extend(extension: Annotated[Extension, tyro.conf.arg(name="")]) -> None:
    """Train a run's model on at longer contexts, and look for needles before and after; also under torchrun."""
    from lasp.evaluation import extension as extending

    extending.extend(extension)


def export_weights(
    run_dir: Positional[str], output: Positional[str], to: Literal["huggingface", "llama", "megatron"] = "huggingface"
) -> None:
    """Write a run's last checkpoint as a Hugging Face directory (safetensors, configuration, tokenizer), or Megatron's.

    Args:
        run_dir: the run's directory.
        output: the directory to write. AutoModelForCausalLM loads it after `import lasp.integrations.huggingface`;
            launch/megatron.sh begins from it by --initial-weights.
        to: whose format; llama: Transformers' own class, for models of softmax layers only.
    """
    from lasp.integrations import megatron_weights

    if to == "megatron":
        print(megatron_weights.export_run(run_dir, output))
        return
    print(_exchange().export_run(run_dir, output, as_llama=to == "llama"))


def import_weights(
    source: Positional[str],
    output: Positional[str],
    linear: Annotated[Linear, tyro.conf.arg(name="")] = LINEAR,
    distill: str | None = None,
    settings: Annotated[Distillation, tyro.conf.arg(name="")] = DISTILLATION,
) -> None:
    """Turn a Hugging Face directory or a Megatron checkpoint into weights to begin from (--initial-weights OUTPUT).

    With --distill a Llama's linear layers are trained to do what its softmax layers did; OUTPUT is then the directory
    of a run. Stopped, the same command goes on; also on the ranks that torchrun started.

    Args:
        source: a directory that `lasp export` wrote, that of a Llama, or a checkpoint (step_…) of launch/megatron.sh.
        output: the directory to write.
        linear: what becomes of a Llama's layers.
        distill: prefix of the token files to distil on, as of `lasp prepare`.
        settings: how to distil; the seed is that of what a Llama has no weights for, such as gates, in any case.
    """
    from lasp.integrations import megatron_weights

    if distill is not None:
        _require_transformers()
        from lasp.distillation import run

        run.distill(source, output, distill, linear, settings)
        return
    unused = replace(settings, seed=0)
    require(unused == DISTILLATION, "distill", None, "the token files for the settings of a distillation")
    if megatron_weights.is_checkpoint(source):
        print(megatron_weights.import_weights(source, output))
        return
    print(_exchange().import_weights(source, output, vars(linear), seed=settings.seed))


def main(args: list[str] | None = None) -> None:
    """Parses the command line (of this process, if args is None) and runs the command."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"lasp {__version__}")
        return
    args, overrides = (args[:2], args[2:]) if args[:1] == ["resume"] else (args, [])
    recipes: dict[str, Callable[[], Any]] = {**RECIPES, **SWEEPS, **TABLES}
    configs = {name.replace("_", "-"): recipe() for name, recipe in recipes.items()}
    texts = {name.replace("_", "-"): (recipe.__doc__ or "").strip() for name, recipe in recipes.items()}
    chosen = _one_of(configs, texts)
    train.__annotations__["config"] = Annotated[chosen, tyro.conf.arg(name="")]
    tasks = {name.replace("_", "-"): task for name, task in TASKS.items()}
    synthesize.__annotations__["task"] = Annotated[_one_of(tasks), tyro.conf.arg(name="")]
    training = (train, resume_with(overrides), plan, generate, report)
    commands = {f.__name__: _deferred(f) for f in (prepare, tokenizer, synthesize, *training)}
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in EVALUATIONS.items())
    evaluate.__annotations__["what"] = Annotated[Union[kinds], tyro.conf.arg(name="")]  # noqa: UP007 (made here)
    commands |= {"eval": _deferred(evaluate), "extend": _deferred(extend)}
    commands |= {"export": _deferred(export_weights), "import": _deferred(import_weights)}
    with _one_rank_speaks():
        run = tyro.extras.subcommand_cli_from_dict(commands, prog="lasp", description=DESCRIPTION, args=args)
    run()


def _one_rank_speaks() -> AbstractContextManager:
    """Inside it only one of the ranks says what is wrong with the command line."""
    return nullcontext() if runtime.is_spokesman() else redirect_stderr(StringIO())


def console() -> None:
    """The shell's command: what is wrong with its input takes one line, on one rank, and gives the exit code 1."""
    try:
        runtime.recorded(main)()
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if not _explains(error):
            raise
        if runtime.is_spokesman():
            print("lasp:", *" ".join([str(error), *getattr(error, "__notes__", [])]).split(), file=sys.stderr)
        sys.exit(1)


def _explains(error: Exception) -> bool:
    """Whether it says what is wrong with the input: what lasp raises, and the system's about files. Others are bugs."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError) or frame.f_globals["__name__"].startswith("lasp.")


def _one_of(defaults: dict[str, Any], texts: dict[str, str] | None = None) -> Any:
    """The type of a subcommand for each default, by its name, with its fields as options."""
    return tyro.extras.subcommand_type_from_defaults(defaults, texts or {}, prefix_names=False)


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Parses like the function but only binds its arguments: the command's own errors are not the command line's."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    return bind


def _exchange() -> Any:
    _require_transformers()
    from lasp.integrations import convert

    return convert


def _chat(tokenizer: str) -> Any:
    _require_transformers()
    from lasp.integrations.huggingface.chat import HuggingFaceChat

    return HuggingFaceChat(tokenizer)


def _require_transformers() -> None:
    found = find_spec("transformers") is not None
    require(found, "transformers", "nothing of that name", "lasp's extra: pip install 'lasp-sp[huggingface]'")


if __name__ == "__main__":
    console()
