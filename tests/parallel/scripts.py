"""Scripts that torchrun would start, run in the ranks of the launch that there is."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> str:
    """What this rank prints; modules beside the script are found, and its process group is the one that is open."""
    dtype, destroy = torch.get_default_dtype(), dist.destroy_process_group
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(path), *arguments])
            patch.syspath_prepend(path.parent)
            patch.setattr(dist, "init_process_group", lambda *args, **options: None)
            patch.setattr(dist, "destroy_process_group", lambda group=None: group and destroy(group))
            for name in _modules_in(path.parent):
                patch.delitem(sys.modules, name)  # they are imported anew: one may keep groups, which end with a test
            try:
                runpy.run_path(str(path), run_name="__main__")
            finally:
                for name in _modules_in(path.parent):
                    del sys.modules[name]
    finally:
        torch.set_default_dtype(dtype)
    return capsys.readouterr().out


def _modules_in(folder: Path) -> list[str]:
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name != "__main__"}
    return [name for name, file in files.items() if file and Path(file).parent == folder]
