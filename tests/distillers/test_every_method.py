"""What holds for every distillation method under several processes."""

import pytest
from safetensors.torch import load_file

from spark_dist.distillers import DISTILLERS

OF_EACH_PROCESS = {"mgd", "rkd", "sp"}
"""Methods whose step depends on how the batch is shared: over the samples, or by what is drawn for them."""


@pytest.mark.launch
@pytest.mark.slow
def test_a_step_does_not_depend_on_how_the_batch_is_shared(launch, tmp_path):
    """Five samples in shares of 5, 3 + 2 and 2 + 2 + 1 have the same gradients, batch statistics being fixed."""
    of = {}
    for processes in (1, 2, 3):
        launch(processes, "method_gradients.py", tmp_path / str(processes), cwd=tmp_path)
        of[processes] = load_file(tmp_path / str(processes))
    assert {key.split("/")[0] for key in of[1]} == set(DISTILLERS)
    differing = set()
    for key, one in of[1].items():
        for other in (of[2][key], of[3][key]):
            if (other - one).norm() > 1e-4 * one.norm() + 1e-9:
                differing.add(key.split("/")[0])
    assert differing == OF_EACH_PROCESS


@pytest.mark.slow
def test_twenty_steps_do_not_depend_on_the_number_of_processes(jobs, tmp_path):
    """Weights, to 1e-5 of their norm, for 1, 2 and 4 processes and uneven shares, batch statistics being fixed."""
    of = {}
    for processes in (1, 2, 4):
        codes, log = jobs("twenty_steps.py", tmp_path / str(processes), folder=tmp_path, processes=processes)
        assert not any(codes), log
        of[processes] = load_file(tmp_path / str(processes))
    differing = {
        key.split("/")[0]
        for key, one in of[1].items()
        for other in (of[2][key], of[4][key])
        if (other - one).norm() > 1e-5 * one.norm()
    }
    assert differing == OF_EACH_PROCESS


@pytest.mark.parametrize("method", sorted(OF_EACH_PROCESS))
def test_a_method_that_depends_on_it_says_so(method):
    assert "each process" in DISTILLERS[method].__doc__
