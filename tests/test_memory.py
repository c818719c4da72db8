"""Memory stays flat; `make memory` takes 10,000 steps and 1,000 transfers."""

import sys

import pytest
from memory import WARM_UP, after_epochs, after_transfers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def test_transfers_leave_no_hook_and_no_tensor():
    before, after, hooks = after_transfers(50)
    assert hooks == 0
    # Fewer, where tensors of other tests ended meanwhile.
    assert after.tensors <= before.tensors


@pytest.mark.usefixtures("quick_runs")
def test_steps_leave_no_tensor(teacher_run, tmp_path):
    memory = after_epochs(4, teacher_run, tmp_path / "run")  # 256 steps
    assert {epoch.tensors for epoch in memory[WARM_UP:]} == {memory[-1].tensors}
