"""Tensors here are tiny: one thread is faster than handing them round."""

import torch
from small_runs import command, quick_runs, student_run, teacher_run  # noqa: F401 (fixtures)

torch.set_num_threads(1)
