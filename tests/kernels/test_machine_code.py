"""Machine code that reads what nothing has written is found, and the kernels have none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

machine_code = pytest.importorskip("tests.kernels.machine_code")
ROOT = Path(__file__).parents[2]
CODE = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   UMOV UR7, 0x40000040 ;
.L_x_1:
        /*0040*/                   UIADD3 UR6, UP0, {base}, 0x40, URZ ;
        /*0050*/                   HGMMA.64x32x16.F32 R24, R132, gdesc[UR4].tnspB, R24 ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(("base", "found"), [("UR4", 0), ("UR9", 1)])
def test_reads_before_any_write_are_found(base, found):
    assert len(machine_code.unwritten(CODE.replace("{base}", base))) == found


def test_both_descriptors_of_a_product_are_read():
    code = CODE.replace("{base}", "UR4").replace("R24, R132, gdesc", "R24, gdesc")
    assert machine_code.unwritten(code) == []
    assert len(machine_code.unwritten(code.replace("ULDC.64 UR4", "ULDC UR5"))) == 3


def test_narrow_heads_read_what_was_written():
    """One block of 32 columns of K, without a loop, did not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.machine_code", "scalar delta", "32", "16", "float16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and "delta 32 16 float16" in lines[0], done.stdout
