"""How the example script starts and ends: a quiet log, nothing compiled without need, one message on failure."""

import logging
import os
import re
import sys
import time
import warnings

#: How the warnings begin that DeepSpeed, Megatron-core and torch give in every ordinary run, and that ask nothing of
#: the user. Seen with torch 2.13, deepspeed 0.19.8, megatron-core 0.16.1.
USUAL_WARNINGS = (
    # both are optional and take the place of Megatron-core's own code, which gives the same numbers
    "Transformer Engine and Apex are not installed. Falling back to",
    "Apex is not installed. Falling back to Torch Norm",
    # Megatron-core warns about the default of its own setting, also where there are no CUDA graphs
    "full scope is deprecated. Use empty cuda_graph",
    # DeepSpeed calls them, and the new names are not in every torch that is supported
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
)
#: and those that are about a GPU
USUAL_ON_A_CPU = ("When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE",)
#: the same of DeepSpeed's log: it asks for the rate once before the first step
_USUAL_LOG = ("Attempting to get learning rate from scheduler before it has started",)
OTHERS_WAIT_SECONDS = 10.0  # in which the other ranks leave the message of an error to rank 0


def announce(text: str) -> None:
    """Say on the first rank what takes the next seconds; for the time before there is a `Progress`."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def quiet() -> None:
    """Leave out the frameworks' usual warnings. Call it before importing them."""
    on_a_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    for beginning in USUAL_WARNINGS + (USUAL_ON_A_CPU if on_a_cpu else ()):
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(_USUAL_LOG))


def fail(error: Exception) -> int:
    """Print the message of an error that every rank has raised, once; the script's exit code, 2. Without a collective,
    which could hang: the launcher ends the others as soon as rank 0 is gone; one that is still there seconds later
    failed alone (or on another node) and speaks for itself."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    time.sleep(0.5)  # see leave(): the same threads, with no barrier to wait for them in
    return 2


def interrupted() -> int:
    """Say how to go on after Ctrl-C; the exit code, 130 as a shell gives it."""
    announce("interrupted; start again with --resume to go on from the last checkpoint")
    return 130


def leave() -> None:
    """End the process groups after a run that has succeeded on every rank. The barrier lets gloo's threads through: one
    that still holds the last collective's tensors would abort a process whose interpreter is shutting down."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
