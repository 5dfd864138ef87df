"""Who may import whom, who may communicate, who may read the environment, and how long a file may be."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lasp").rglob("*.py"))

# What a part of lasp may import of the rest: kernels <- parallel <- training -> models, data, plan; evaluation of all.
MAY_IMPORT = {
    "kernels": set(),
    "parallel": {"kernels", "names"},
    "models": {"kernels", "config", "own"},
    "data": {"config"},
    "plan": {"models", "config", "pictures"},
    "training": {"kernels", "parallel", "models", "data", "config", "launched", "pictures", "plan"},
    "integrations": {"kernels", "parallel", "models", "data", "config", "fields", "launched", "training"},
    "distillation": {"parallel", "models", "data", "config", "fields", "training", "integrations"},
    "evaluation": {"parallel", "models", "data", "config", "fields", "names", "pictures", "training", "integrations"},
}
# And a room of lasp/kernels/triton of the others; "" are the files beside the rooms that know of none.
ROOMS = {
    "": set(),
    "shared": {""},
    "scalar": {"", "shared"},
    "diagonal": {"", "shared"},
    "delta": {"", "shared", "diagonal"},
    "hopper": {"", "shared", "scalar", "diagonal", "delta"},
    "log_linear": {"", "shared", "scalar"},
    "log_linear_delta": {"", "shared", "delta", "log_linear"},
}
KNOWS_ROOMS = {  # where one of them is chosen
    "lasp/kernels/triton/dispatch.py": {"scalar.op", "diagonal.op", "delta.op", "log_linear.op", "log_linear_delta.op"},
    "lasp/kernels/triton/decode.py": {"shared"},
    "lasp/kernels/triton/scalar/op.py": {"hopper.scalar"},
    "lasp/kernels/triton/diagonal/op.py": {"hopper.diagonal"},
    "lasp/kernels/triton/delta/op.py": {"hopper.delta"},
}
GLUON = "lasp/kernels/triton/hopper/"  # whose programs multiply by one file and get no positional tuples
PRODUCT = "triton.experimental.gluon.language.nvidia.hopper.warpgroup_mma"
WITHOUT_TORCH = ("lasp.text_commands", "lasp.cli", "lasp.data.prepare", "lasp.data.bpe", "lasp.launched")
MEETING_PLACE = "lasp/parallel/apply.py"  # where models and parallelism meet
READS_ENVIRONMENT = {
    "lasp/training/runtime.py",  # a process learns its rank from its launcher
    "lasp/launched.py",  # and whether it has one
    "lasp/training/storage.py",  # PyTorch is told by a variable to read nothing but data
}
# Outside lasp/parallel: process start-up, checkpoints and sharded parameters, but never a collective.
KNOWS_DISTRIBUTED = {
    "lasp/launched.py": {"torch.distributed.elastic"},
    "lasp/training/runtime.py": {"torch.distributed"},
    "lasp/training/checkpoint.py": {"torch.distributed"},
    "lasp/training/deepspeed.py": {"torch.distributed"},
    "lasp/training/numerics.py": {"torch.distributed.tensor"},
    "lasp/training/storage.py": {"torch.distributed.checkpoint"},
    "lasp/training/optimizer.py": {"torch.distributed.tensor", "torch.distributed.device_mesh"},
    "lasp/training/planning.py": {"torch.distributed"},
    "lasp/training/reading.py": {"torch.distributed"},
    "lasp/training/train.py": {"torch.distributed"},
    "lasp/distillation/run.py": {"torch.distributed"},
    "lasp/evaluation/evaluate.py": {"torch.distributed"},
    "lasp/evaluation/extension.py": {"torch.distributed"},
    "lasp/evaluation/quality/run.py": {"torch.distributed"},
    "lasp/evaluation/remembered.py": {"torch.distributed"},
    "lasp/evaluation/subject.py": {"torch.distributed"},
    "lasp/evaluation/recall/sweep.py": {"torch.distributed"},
    "lasp/integrations/megatron/train.py": {"torch.distributed"},
    "lasp/integrations/megatron_weights.py": {"torch.distributed.checkpoint"},
}
COLLECTIVES = (  # first words of their names
    "all_",
    "reduce",
    "gather",
    "scatter",
    "broadcast",
    "barrier",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_",
)


def mentioned(source: str) -> set[str]:
    """Dotted names, in full, of what a module imports and of the attributes that it uses of its imports."""
    aliases: dict[str, str] = {}
    names: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}")
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for chain in ast.walk(tree):
        if isinstance(chain, ast.Attribute) and id(chain) not in inner:
            first, *rest = ast.unparse(chain).split(".")
            if first in aliases:
                names.add(".".join([aliases[first], *rest]))
    return names


def loaded(source: str) -> set[str]:
    """Dotted names, in full, of what a module imports as it is loaded; what types alone need is not among them."""
    later = ast.FunctionDef | ast.ClassDef
    body = [node for node in ast.parse(source).body if not isinstance(node, later)]
    return mentioned(
        "\n".join(ast.unparse(node) for node in body if not ast.unparse(node).startswith("if TYPE_CHECKING"))
    )


def circles(loads: dict[str, set[str]]) -> list[str]:
    """The modules that load each other, and those that load them."""
    left = dict(loads)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    return sorted(left)


def unpacked(source: str) -> list[str]:
    """What kernels tell apart by its order alone: variables from which three others or more are assigned."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if any("jit" in ast.unparse(d) for d in node.decorator_list)]
    assigned = [node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Assign)]
    pairs = [(node.targets[0], node.value) for node in assigned]
    return [y.id for x, y in pairs if isinstance(x, ast.Tuple) and len(x.elts) > 2 and isinstance(y, ast.Name)]


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def may_enter(path: str, name: str) -> bool:
    """Whether a file may import something from the rooms of lasp/kernels/triton."""
    triton = "lasp.kernels.triton."
    if not name.startswith(triton) or not path.startswith(triton.replace(".", "/")):
        return True
    name = name.removeprefix(triton)
    other = first if (first := name.split(".")[0]) in ROOMS else ""
    own = room if (room := Path(path).parts[3]) in ROOMS else ""
    permitted = any(within(name, known) for known in KNOWS_ROOMS.get(path, ()))
    return permitted or other == own or (other in ROOMS[own] and not within(name, f"{other}.op"))


def broken_rules(path: str, source: str) -> list[str]:
    """What the file at `path` (from the repository's root) does that it may not."""
    found = []
    names = mentioned(source)
    part = Path(path).parts[1]
    for name in names:
        other = name.split(".")[1] if name.startswith("lasp.") else part
        if part in MAY_IMPORT and other not in MAY_IMPORT[part] | {part} and path != MEETING_PLACE:
            found.append(f"{path} imports {name}")
    found += [f"{path} imports {name}" for name in names if not may_enter(path, name)]
    if path.startswith(GLUON):
        if PRODUCT in names and path != GLUON + "products.py":
            found.append(f"{path} multiplies without products")
        found += [f"{path} unpacks {name}, which has no names" for name in unpacked(source)]
    if part != "parallel":
        for name in names:
            if not within(name, "torch.distributed"):
                continue
            if not any(within(name, known) for known in KNOWS_DISTRIBUTED.get(path, ())):
                found.append(f"{path} uses {name}")
            elif name.removeprefix("torch.distributed.").startswith(COLLECTIVES):
                found.append(f"{path} calls a collective: {name}")
    if any(within(name, "torch.autograd.Function") for name in names) and path != "lasp/kernels/autocast.py":
        found.append(
            f"{path} has an autograd function that autocast reaches: derive from lasp.kernels.autocast.Function"
        )
    if part == "models":
        identifiers = {getattr(node, "id", getattr(node, "arg", None)) for node in ast.walk(ast.parse(source))}
        found += [
            f"{path} names {name}" for name in identifiers & {"group", "process_group", "ProcessGroup", "world_size"}
        ]
    if path not in READS_ENVIRONMENT and any(within(n, "os.environ") or within(n, "os.getenv") for n in names):
        found.append(f"{path} reads the environment")
    waits_for_nothing = (
        "lasp/kernels/parked.py",
        "lasp/plan/gpus.py",
    )  # from pinned memory alone: other memory may be gone
    if "non_blocking=True" in source and path not in waits_for_nothing:
        found.append(f"{path} copies with non_blocking: lasp.kernels.parked.to_device")
    if len(source.splitlines()) > 400:
        found.append(f"{path} has more than 400 lines")
    return found


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in FILES])
def test_file_keeps_the_rules(path: str) -> None:
    assert broken_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lasp/kernels/x.py", "import torch.distributed as dist"),
        ("lasp/kernels/x.py", "import torch\ntorch.distributed.barrier()"),
        ("lasp/kernels/x.py", "from lasp.config import ModelConfig"),
        ("lasp/parallel/x.py", "import lasp.models.decoder"),
        ("lasp/models/x.py", "from lasp import parallel"),
        ("lasp/models/x.py", "def forward(self, x, group): pass"),
        ("lasp/models/x.py", "from torch.distributed.tensor import DTensor"),
        ("lasp/training/runtime.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("lasp/training/other.py", "import torch.distributed as dist\ndist.init_process_group()"),
        ("lasp/data/x.py", "from os import environ\nenviron['A']"),
        ("lasp/data/x.py", "\n" * 401),
        ("lasp/kernels/triton/launch.py", "from lasp.kernels.triton.shared.tiles import CHUNK"),
        ("lasp/kernels/triton/shared/x.py", "from lasp.kernels.triton.scalar import gates"),
        ("lasp/kernels/triton/delta/x.py", "from lasp.kernels.triton.hopper.delta import Hopper"),
        ("lasp/kernels/triton/hopper/x.py", "from lasp.kernels.triton.delta.op import Plan"),
        ("lasp/kernels/x.py", "x.to(device, non_blocking=True)"),
        ("lasp/kernels/x.py", "import torch\nclass F(torch.autograd.Function): pass"),
        ("lasp/kernels/triton/hopper/x.py", "@gluon.jit\ndef f(numbers): begin, count, chunk = numbers"),
        ("lasp/kernels/triton/hopper/x.py", f"from {PRODUCT.rpartition('.')[0]} import warpgroup_mma"),
    ],
)
def test_rules_notice(path: str, source: str) -> None:
    assert len(broken_rules(path, source)) >= 1


def test_nothing_is_loaded_in_a_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    loads = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in loaded(path.read_text())}
        loads[module] = names & modules.keys() - {module}
    assert circles(loads) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_texts_become_tokens_without_torch() -> None:
    """It takes seconds to load. Nor is there a picture to draw when a run starts."""
    told = f"import sys, {', '.join(WITHOUT_TORCH)}; assert 'torch' not in sys.modules\n"
    told += "import lasp.commands, lasp.training.train; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", told], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
