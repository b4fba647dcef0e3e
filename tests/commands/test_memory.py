"""What a command does with memory that it does not need any more."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

RESIDENT = """
import numpy
from spark_dist.cli import keep_freed_memory
keep_freed_memory()
large = numpy.ones({megabytes} * 2**17)
del large
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * os.sysconf("SC_PAGE_SIZE") // 2**20)
"""


def megabytes_left(megabytes: int, **environment: str) -> int:
    """What a process holds after it has freed so much."""
    code = "import os" + RESIDENT.format(megabytes=megabytes)
    line, environment = [sys.executable, "-c", code], os.environ | environment | {"PYTHONPATH": str(ROOT)}
    return int(subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_kept_up_to_a_gigabyte():
    assert megabytes_left(256) > 256
    assert megabytes_left(1200) < 256
    assert megabytes_left(256, MALLOC_TRIM_THRESHOLD_="131072") < 256
