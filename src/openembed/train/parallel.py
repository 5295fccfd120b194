"""How the gradient of one step is made by several ranks: replicated weights (``ddp``) or sharded ones (``fsdp``).

Every rank knows the whole batch, a pure function of (seed, step). The micro-batches are cut as one process would cut them
and dealt out to the ranks; each rank runs its own, the vectors of all texts are brought together on every rank, and every
rank differentiates the same loss over the whole batch. Negatives therefore cross devices for free, and the gradient of a
step is the plain *sum* of what the ranks' own texts contribute: the single-process gradient, up to the order of summation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openembed.backbones.prepacked import PrepackedLinear
from openembed.encoder import Encoder
from openembed.train.distributed import ALONE, World, share

BUCKET_BYTES = 256 * 2**20
"""Gradients are summed in flat pieces of about this size."""

KeepWhole = Literal["nothing", "gradients", "weights"]


class Replicated:
    """Every rank holds all weights; gradients are summed once a step, after the last micro-batch of the last batch."""

    sharded = False

    def __init__(self, world: World = ALONE) -> None:
        self.world = world

    def assigned(self, tokens: Sequence[int]) -> list[int | None]:
        """Returns which micro-batches this rank runs, given the tokens of each; None is a pass without effect."""
        return list(share(list(tokens), self.world.size)[self.world.rank])

    def gather(self, own_UD: Tensor) -> Tensor:
        """Returns the vectors of all texts; ``own_UD`` has zeros where another rank computes. Exact: x + 0 = x."""
        return self.world.sum_(own_UD)

    def before_backward(self, *, last: bool) -> None:
        """Is told of each backward pass; ``last``: no other follows in this step."""

    def split(self) -> None:
        """Nothing to do: weights are whole."""

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over all ranks. A parameter without one on every rank stays without one."""
        if self.world.size == 1:
            return
        device = parameters[0].device
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
        touched = [p for p, count in zip(parameters, self.world.sum_(has).tolist(), strict=True) if count]
        for parameter in touched:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in touched]):
            flat = self.world.sum_(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


class Sharded(Replicated):
    """FSDP2: weights, gradients and moments are split over the ranks; layers are made whole while they run.

    Each layer's passes are collective, so all ranks run equally many; a rank with fewer micro-batches repeats the shortest
    text with a gradient of zero. ``keep_whole``: what stays whole on a rank until the last micro-batch of a step.
    """

    sharded = True

    def __init__(self, world: World, encoder: Encoder, keep_whole: KeepWhole, *, bf16: bool) -> None:
        super().__init__(world)
        self.encoder, self.keep_whole = encoder, keep_whole
        _shard(encoder, world, bf16=bf16, reshard=keep_whole != "weights")

    def assigned(self, tokens: Sequence[int]) -> list[int | None]:
        """As :meth:`Replicated.assigned`, filled up with None to the longest share."""
        shares = share(list(tokens), self.world.size)
        own = shares[self.world.rank]
        return [None] * (max(map(len, shares)) - len(own)) + own

    def before_backward(self, *, last: bool) -> None:
        """Defers the reduction of gradients, and the splitting of weights, to the last pass."""
        self.encoder.set_is_last_backward(last)
        if self.keep_whole != "nothing":
            self.encoder.set_requires_gradient_sync(last)
        if self.keep_whole == "weights":
            self.encoder.set_reshard_after_backward(last)

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is left to do: the last backward pass has summed the gradients."""

    def split(self) -> None:
        """Splits what a pass without gradients has left whole: a parameter's name then means its part again."""
        for module in self.encoder.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Returns a detached tensor in full; a split one is brought together, for which all ranks must call."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's part of ``tensor`` as ``like`` is split; ``tensor`` on its device where ``like`` is whole."""
    moved = tensor.to(like.device)
    if not hasattr(like, "full_tensor"):
        return moved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def hollow(encoder: Encoder) -> Encoder:
    """Returns a copy of ``encoder`` whose parameters have shapes but no values (on the meta device)."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for p in encoder.parameters()
    }
    return copy.deepcopy(encoder, memo)


def assembled(encoder: Encoder, shell: Encoder, world: World) -> Encoder:
    """Returns ``shell`` (a hollow copy) with the whole weights of a split ``encoder``, in the main memory of rank 0.

    All ranks must call; on the others the shell stays hollow.
    """
    weights = {}
    for name, parameter in encoder.named_parameters():
        full = whole(parameter)
        if world.leads:
            weights[name] = full.cpu()
    if world.leads:
        shell.load_state_dict(weights, strict=False, assign=True)
        shell.to("cpu")
    return shell


def _shard(encoder: Encoder, world: World, *, bf16: bool, reshard: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(world.device or "cpu").type, (world.size,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers(encoder):
        fully_shard(layer, mesh=mesh, mp_policy=half, reshard_after_forward=reshard)
    fully_shard(encoder, mesh=mesh, mp_policy=half)
    encoder.backbone.fused = None  # its copies of the weights could not be seen to be old
    for module in encoder.modules():
        if isinstance(module, PrepackedLinear):
            module.keeps_copy = False
        if hasattr(module, "set_gradient_divide_factor"):
            # The default divides by the number of ranks, as for a mean of losses; ours is one loss over the whole batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def layers(encoder: Encoder) -> list[nn.Module]:
    """Returns the members of the backbone's longest list of modules: its transformer layers."""
    lists = [module for module in encoder.backbone.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type in groups of about :data:`BUCKET_BYTES`."""
    group: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in group) + gradient.nbytes > BUCKET_BYTES
        if group and (full or group[0].dtype != gradient.dtype):
            yield group
            group = []
        group.append(gradient)
    if group:
        yield group
