"""Train in several processes under torchrun; in one, nothing here does anything. Skip this file at first.

Every process (rank) holds the whole model and takes its share of each window. Losses and gradients are
divided by the whole window's tokens and sequences: their sum over the ranks is what one process would have.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Join the other processes, if torchrun started this one; the first alone goes on printing."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # NCCL between GPUs, Gloo between CPUs
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(examples: list) -> list:
    """Return what of a window this rank takes; with fewer examples than ranks that can be none."""
    return examples[rank() :: dist.get_world_size()] if dist.is_initialized() else examples


def gradients(model) -> list[Tensor]:
    """Return the gradients of all that is trained; zeros where this rank had no example."""
    if not dist.is_initialized():
        return []
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [p.grad for p in trained]


def add_up(tensors: list[Tensor]) -> None:
    """Add up tensors over all ranks, in place."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def anyone(wants: bool) -> bool:
    """Tell all ranks whether one of them wants something, to stop for instance."""
    votes = torch.tensor([float(wants)], device="cuda" if torch.cuda.is_available() else "cpu")
    add_up([votes])
    return bool(votes)


def wait() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()
