"""How the example script starts and ends: a quiet log, nothing compiled without need, one message on failure."""

import logging
import os
import sys
import time
import warnings

#: said by the hosts on every ordinary start; each is true and asks nothing of the user
_USUAL = ("Attempting to get learning rate from scheduler before it has started",)

#: how long the other ranks leave the message of an error to rank 0
OTHERS_WAIT_SECONDS = 10.0


def announce(text: str) -> None:
    """Say on the first rank what takes the next seconds; for the time before there is a `Progress`."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def quiet() -> None:
    """Leave out the hosts' usual warnings, so that those that matter are seen. Call it before importing the hosts."""
    for module in ("megatron", "torch", "deepspeed"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}\.")
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(_USUAL))


def skip_inference_kernel() -> None:
    """For a script that starts communication before it calls `ds_plugin.initialize`, which does this itself."""
    from ds_plugin import compat  # late: it imports torch, which `quiet` comes before

    compat.skip_inference_kernel()


def fail(error: Exception) -> int:
    """Print the message of an error that every rank has raised, once; the script's exit code, 2.

    Without a collective, which would hang if it were not every rank after all: the launcher ends the others as soon as
    rank 0 is gone; a rank that is still there seconds later failed alone (or on another node) and speaks for itself.
    """
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
    """End the process groups after a run that has succeeded on every rank.

    The barrier is for gloo: a thread of it that still holds the tensors of the last collective needs the interpreter to
    let go of them, and aborts the process when that is already shutting down. Waiting in a barrier lets it through.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
