"""At first use on a GPU or a CPU: is each block of the model right there, and what computes it fastest?

Predictions hold for the machine that they were made for, if at all. So before the first step every distinct block, and
stem and head, runs on random images of its true size in each of its forms. Our forms are held to PyTorch by the
tolerance rule, output, gradients and batch statistics; one that breaks it, does not compile, does not fit or has no
memory is out. Of what is left the fastest is taken. The launch configurations of our kernels are measured before that,
all at once: run i takes candidate i everywhere, and each launch is timed by itself.

On a CPU there are two forms, ours in C++ and PyTorch's, and a part of the batch is measured.

What was found is kept (`kept`), and set where blocks and launches look it up (`fastnet.forms`, `kernels.configs`),
before anything is traced or recorded. It depends on shapes alone, never on a tensor's values.
"""

from fastnet.training.tuning.measure import words_for
from fastnet.training.tuning.precision import pick_precision
from fastnet.training.tuning.tuner import Tuner, make_tuner, prepare_inference

__all__ = ["Tuner", "make_tuner", "pick_precision", "prepare_inference", "words_for"]
