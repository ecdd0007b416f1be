"""Train in several processes under torchrun; in one, nothing here does anything.

Every process (rank) takes its share of each step. Losses and gradients are divided by the whole step's tokens
and sequences: their sum over the ranks is what one process would have, but for dropout, which each rank draws
for itself. Every rank holds the whole model, or with --fsdp its share of the blocks' weights, gradients and
AdamW (FSDP2, arXiv 2304.11277).

A training loop needs join, micro_batches, add_up with gradients, and clip; what saves and loads, the others.
"""

import atexit
import math
import os
import sys
from collections.abc import Iterator

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


def launched() -> bool:
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if launched() else 0


def micro_batches(examples: list, size: int) -> Iterator[list]:
    """Yield this rank's micro-batches. Every rank has equally many, since FSDP gathers weights in each.

    Where a rank has none left, that is the first example without supervised positions: it adds nothing.
    """
    n_ranks = dist.get_world_size() if launched() else 1
    share = examples[rank() :: n_ranks]
    largest_share = math.ceil(len(examples) / n_ranks)
    idle = examples[0]._replace(start=len(examples[0].ids))
    for start in range(0, largest_share, size):
        yield share[start : start + size] or [idle]


def add_up(tensors: list[Tensor]) -> None:
    """Add up tensors over all ranks, in place."""
    if launched():
        pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in pending:
            work.wait()


def gradients(model) -> list[Tensor]:
    """Return the gradients that every rank has as a whole; FSDP adds up the others by itself."""
    found = []
    for weight in model.parameters():
        if weight.requires_grad and not is_spread(weight):
            if weight.grad is None and launched():  # as the head's, on a rank that had no example
                weight.grad = torch.zeros_like(weight)  # for all have to add up the same
            if weight.grad is not None:
                found.append(weight.grad)
    return found


def clip(model, largest: float) -> Tensor:
    """Scale gradients down to a norm of at most `largest`; returns what it was, over all ranks."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    shares = [p.grad.to_local() for p in parameters if is_spread(p.grad)]
    if not shares:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    square = torch.nn.utils.get_total_norm(shares).square()
    add_up([square])
    norm = (square + torch.nn.utils.get_total_norm(gradients(model)).square()).sqrt()
    for gradient in shares + gradients(model):
        gradient.mul_((largest / (norm + 1e-6)).clamp(max=1))
    return norm


def wait() -> None:
    """Wait until all ranks are here."""
    if launched():
        dist.barrier()


def anyone(wants: bool) -> bool:
    """Tell all ranks whether one of them wants something, to stop for instance."""
    votes = torch.tensor([float(wants)], device="cuda" if torch.cuda.is_available() else "cpu")
    add_up([votes])
    return bool(votes)


def spread(model) -> None:
    """Spread the decoder's blocks over the ranks (FSDP2); embeddings, last norm and head stay on each."""
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()
    blocks = max((x for x in decoder.children() if isinstance(x, torch.nn.ModuleList)), key=len)
    rest = set(model.parameters()) - set(blocks.parameters())
    for module in (*blocks, decoder):  # the decoder has no weights of its own left; it fetches a block ahead
        fully_shard(module, ignored_params=rest)
        module.set_gradient_divide_factor(1.0)  # a sum: losses are divided by the whole step's tokens
        module.set_force_sum_reduction_for_comms(True)


def is_spread(x) -> bool:
    """Tell whether x is a DTensor, of which this rank holds its share, without a second's import of it."""
    return hasattr(x, "full_tensor")


def together(state):
    """Return a state, of nested dicts, with what is spread put together, on the CPU of rank 0."""
    if isinstance(state, dict):
        return {name: together(x) for name, x in state.items()}
    if not is_spread(state):
        return state
    whole = state.full_tensor()  # for which every rank is needed
    return None if rank() else whole.cpu()


def spread_like(other: Tensor, whole: Tensor) -> Tensor:
    """Spread a whole tensor as `other` is, if it has its shape."""
    if not is_spread(other) or whole.shape != other.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)
