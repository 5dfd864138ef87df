"""What lasp needs: the library PyTorch and NumPy alone, the command the extra `train`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from lasp.__main__ import main

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("rich", "tyro", "yaml", "tokenizers", "tensorboard", "matplotlib", "transformers", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import lasp.data, lasp.kernels, lasp.models, lasp.parallel, lasp.training.recipes
print("imported", flush=True)
main()
"""


def test_the_library_needs_pytorch_and_numpy_alone():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "imported\n")
    assert done.stderr == "lasp: got no tyro, expected it: pip install 'lasp-sp[train]'\n"
