"""A task of one's own in lm-evaluation-harness, and a model that has learnt it; a minute on a CPU.

    pip install 'lasp-sp[harness,huggingface]'
    python examples/harness_task.py

trains a tiny hybrid on who lives where, exports it, and asks it both ways: for the likeliest of four towns, and for the
town in its own words. Questions stand behind none to five other sentences, so that prompts differ in length. Batches of
1 and of 8 give the same numbers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from lasp.data.prepare import prepare
from lasp.evaluation.harness import HarnessModel
from lasp.evaluation.prompts.words import invented
from lasp.integrations.convert import export_run
from lasp.training.train import train

PEOPLE, TOWNS, QUESTIONS, CHOICES = 16, 8, 40, 4
METRICS = ("acc,", "exact_match,")
TASKS = {
    "town_chosen": """
        output_type: multiple_choice
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    """,
    "town_written": """
        output_type: generate_until
        doc_to_target: town
        generation_kwargs: {until: ["."], max_gen_toks: 12}
        filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", default="runs/harness_task")
    options.add_argument("--steps", type=int, default=400)
    told = options.parse_args()
    folder = Path(told.folder)
    texts, questions = write_texts(folder / "texts")
    write_tasks(folder / "tasks", questions)

    prepare([texts], folder / "data", valid_fraction=0.2)
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=257, hidden_size=64, num_layers=2, num_heads=1, intermediate_size=192, pattern="LN"
        ),
        data=DataConfig(train=str(folder / "data_train"), valid=str(folder / "data_valid"), eval_contexts=1),
        run_dir=str(folder / "run"),
        steps=told.steps,
        context_length=1024,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=told.steps // 10),
        dtype="float32",
        device="cpu",
        eval_every=max(1, told.steps // 4),
        checkpoint_every=told.steps,
    )
    train(config)
    export_run(config.run_dir, str(folder / "exported"))
    found = {size: evaluate(str(folder / "exported"), folder / "tasks", size) for size in (1, 8)}
    for task in TASKS:
        (alone, answers), (together, others) = (found[size][task] for size in (1, 8))
        shown = {
            size: ", ".join(f"{name} {value:.3f}" for name, value in found[size][task][0].items()) for size in found
        }
        print(f"{task}: {shown[1]} in batches of 1, {shown[8]} in batches of 8")
        assert alone == together and len(answers) == len(others) == QUESTIONS
        if task == "town_written":
            assert answers == others
        else:
            difference = np.abs(np.array(answers) - np.array(others)).max()
            print(f"log-likelihoods of {np.size(answers)} choices differ by at most {difference:.1e}")
            assert difference <= 1e-4


def write_texts(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A folder of texts, and questions about what they tell."""
    rng = np.random.default_rng(0)
    names = [word.capitalize() for word in invented(rng, PEOPLE + TOWNS)]
    people, towns = names[:PEOPLE], names[PEOPLE:]
    homes = {person: towns[number % TOWNS] for number, person in enumerate(people)}
    facts = [f"{person} lives in {home}." for person, home in homes.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(200):
        (folder / f"{number}.txt").write_text(" ".join(rng.permutation(facts)))
    questions = []
    for number in range(QUESTIONS):
        person = people[number % PEOPLE]
        others = [town for town in towns if town != homes[person]]
        choices = rng.permutation([homes[person], *rng.choice(others, CHOICES - 1, replace=False)]).tolist()
        before = rng.choice([fact for fact in facts if not fact.startswith(person)], number % 6, replace=False)
        questions.append(
            {
                "text": " ".join([*before, f"{person} lives in"]),
                "choices": choices,
                "answer": choices.index(homes[person]),
                "town": homes[person],
            }
        )
    return folder, questions


def write_tasks(folder: Path, questions: list[dict[str, Any]]) -> None:
    """A file of questions, and for each task a file that says how they are asked."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.absolute() / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: "{file}"}}}}\ntest_split: test\n'
    for name, text in TASKS.items():
        own = "\n".join(line.strip() for line in text.strip().splitlines())
        (folder / f"{name}.yaml").write_text(f'task: {name}\n{data}doc_to_text: "{{{{text}}}}"\n{own}\n')


def evaluate(model: str, tasks: Path, batch_size: int) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """For each task its metrics, and what the model gave for each question: its choices' log-likelihoods or a text."""
    given = lm_eval.simple_evaluate(
        model=HarnessModel(model, batch_size=batch_size, device="cpu"),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    found = {}
    for task in TASKS:
        metrics = {name: value for name, value in given["results"][task].items() if name.startswith(METRICS)}
        samples = [sample["filtered_resps"] for sample in given["samples"][task]]
        found[task] = metrics, [s[0] if isinstance(s[0], str) else [float(x) for x, _ in s] for s in samples]
    return found


if __name__ == "__main__":
    main()
