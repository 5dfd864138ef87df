"""What lasp needs: the library PyTorch and NumPy alone, the command the extra `train`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from lasp.__main__ import main

absent = sys.argv.pop().split(",")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import lasp.data, lasp.kernels, lasp.models, lasp.parallel, lasp.training.recipes
for name in lasp.data.__all__:
    getattr(lasp.data, name)
print("imported", flush=True)
main()
"""


@pytest.mark.parametrize(
    "absent", ["tyro,yaml,rich,tokenizers,tensorboard,matplotlib,transformers,pyarrow", "yaml,tokenizers"]
)
def test_the_library_needs_pytorch_and_numpy_alone(absent):
    command = [sys.executable, "-c", PROGRAM, "train", "quickstart", absent]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "imported\n")
    assert done.stderr == f"lasp: got no {absent.split(',')[0]}, expected it: pip install 'lasp-sp[train]'\n"
