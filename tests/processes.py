"""Processes of a job: each starts as a copy of one that has imported the package and done nothing else."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver


def fresh_processes():
    """A context of multiprocessing whose processes interpret kernels when they launch any."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    try:
        context.set_forkserver_preload(["triton_conv.tuning.training"])
        forkserver.ensure_running()
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    return context


def interruptible() -> None:
    """What a new process does first to hear of SIGINT, which shells let their background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
