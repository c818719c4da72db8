"""Tensors here are tiny: one thread is faster than handing them round. Triton is interpreted without a GPU."""

import os

import torch
from small_runs import command, quick_runs, student_run, teacher_run  # noqa: F401 (fixtures)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
