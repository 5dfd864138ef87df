"""What the command `lasp` does: each of its commands, a function whose parameters are its options."""

from dataclasses import replace
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from lasp.chosen import as_yaml
from lasp.config import require
from lasp.distillation.config import Distillation, Linear
from lasp.evaluation.extension import Extension
from lasp.evaluation.quality.config import QualityTable
from lasp.evaluation.recall.config import RecallSweep
from lasp.text_commands import require_transformers

LINEAR, DISTILLATION = Linear(), Distillation()


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
    """Train a recipe, or what a file says; alone, or on the ranks that torchrun started.

    A run whose directory holds a checkpoint goes on from it. `lasp train --help` lists the recipes.
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


def config(config: Any) -> None:
    """Print as YAML what `lasp train` with the same words would run, for its --config."""
    several = {RecallSweep: "a sweep", QualityTable: "a table"}.get(type(config))
    require(several is None, "recipe", several, "a recipe of one run")
    print(as_yaml(config), end="")


def plan(
    model: Positional[str],
    gpu: str = "H200",
    gpus: int | None = None,
    host_memory: float | None = None,
    context: int | None = None,
    pattern: str | None = None,
    mixer: str | None = None,
    sequence_parallel: int | None = None,
    recompute: Literal["auto", "none", "selective", "full"] = "auto",
    recompute_layers: int | None = None,
    offload_activations: bool | None = None,
    segment_tokens: int | None = None,
    segment_offload: bool | None = None,
    segment_graphs: int | None = None,
    json: bool = False,
    plot: str | None = None,
) -> None:
    """Say what a training step takes of GPUs' memory and time, whether it fits, and which settings are best.

    Args:
        model: a preset (linear_llama3_1b), a recipe (linear-llama3-1b-128k), or the directory of a run.
        gpu: its name: H100, H200, A100-40, A100-80, B200, RTX-4090 …, or "here", measured.
        gpus: how many; 1, or as many as the recipe splits contexts over.
        host_memory: GiB for each GPU; what servers with such GPUs usually have if not given, or what is left here.
        context: tokens; the recipe's or the run's if not given.
        pattern: of the model's layers: L linear, N softmax.
        mixer: of the linear layers.
        sequence_parallel: ranks that share a context. With none of these seven the best settings are planned.
        recompute: what of the layers is computed again in the backward pass; auto: as little as fits.
        recompute_layers: how many of the layers, the others less; all if not given.
        offload_activations: whether layers' inputs wait in the host's memory.
        segment_tokens: of a stream's segments.
        segment_offload: whether what they hand on to each other waits in the host's memory.
        segment_graphs: how many of them, the last ones, are computed once.
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
        segment_graphs=segment_graphs,
    )
    asked = planning.Asked(gpus, host_memory, context, pattern, mixer)
    planning.show(model, gpu, asked, wishes, as_json=json, picture=plot)


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
        run_dir: the run's directory, whose last checkpoint is read, or a checkpoint.
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


def plot(run_dirs: Positional[tuple[str, ...]], output: str | None = None) -> None:
    """Draw runs side by side as a PNG: loss, tokens a second, memory, gradient norm.

    Args:
        run_dirs: the runs' directories.
        output: the picture; plot.png in the first run's directory if not given.
    """
    from lasp.training.plot import plot

    print(plot(run_dirs, output))


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
        run_dir: the run's directory, whose last checkpoint is read, or a checkpoint.
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
        require_transformers()
        from lasp.distillation import run

        run.distill(source, output, distill, linear, settings)
        return
    unused = replace(settings, seed=0)
    require(unused == DISTILLATION, "distill", None, "the token files for the settings of a distillation")
    if megatron_weights.is_checkpoint(source):
        print(megatron_weights.import_weights(source, output))
        return
    print(_exchange().import_weights(source, output, vars(linear), seed=settings.seed))


def _exchange() -> Any:
    require_transformers()
    from lasp.integrations import convert

    return convert
