"""Several processes as one: which rank am I, which device, and how ranks share weights, data and sequences.

    torchrun -> Ranks: dp x sp processes. Data-parallel ranks take other samples, the sp ranks of a sequence the same
    parallelise(model) -> DDP (whole weights on each rank) or FSDP2 (float32 shards, gathered block by block)
    Ulysses: tokens (B, N, D) split over sp ranks; in self-attention all tokens, heads split (arXiv 2309.14509)

`pick_device` and `rank_and_world` serve every command, without opening a process group.
"""

import math
import os
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from kernels import attention


def rank_and_world():
    """This process's number under torchrun and how many there are; else 0 and 1, even if WORLD_SIZE is set."""
    return (int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))) if "RANK" in os.environ else (0, 1)


def pick_device(name=None):
    """The torch device of that name; by default this process's GPU (torchrun: LOCAL_RANK), or the CPU. ValueError."""
    name = name or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: not available here; leave it out to use what there is") from None


class Ranks:
    """The processes that torchrun started, or one alone. Ranks that share a sequence (sp) are neighbours."""

    def __init__(self, parallel="", dtype="", sp=1, whole=True):
        """whole: whole modules are trained, whose float32 master weights in 16-bit training are FSDP2's."""
        from torch.distributed.device_mesh import init_device_mesh

        launched, has_gpu = "RANK" in os.environ, torch.cuda.is_available()
        self.ours = not dist.is_initialized()  # who calls train.main several times may keep one group for all
        self.world, self.sp = rank_and_world()[1] if self.ours else dist.get_world_size(), sp
        if self.world % sp:  # refuse before a group is open
            raise ValueError(f"--sp {sp} does not divide the {self.world} processes")
        self.parallel = parallel or ("fsdp" if has_gpu and (whole or self.world > 1) else "ddp")
        self.dtype = getattr(torch, dtype or ("bfloat16" if has_gpu else "float32"))
        if self.dtype != torch.float32 and self.parallel == "ddp" and whole:
            raise ValueError("dtype=bfloat16 keeps float32 master weights by FSDP2: take --set parallel=fsdp")
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if has_gpu else "cpu")
        if has_gpu:
            torch.cuda.set_device(self.device)
        if self.ours:
            alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            # NCCL gives up after 10 minutes; writing a cache or 60 GB of checkpoint takes longer
            patience = {"timeout": timedelta(hours=2)} if has_gpu else {}
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", **patience, **alone)
        self.rank = dist.get_rank()
        self.first = self.rank == 0
        self.dp, self.data_rank = self.world // sp, self.rank // sp
        self.mesh = init_device_mesh(self.device.type, (self.world,))
        pairs = init_device_mesh(self.device.type, (self.dp, sp), mesh_dim_names=("data", "sequence"))
        self.sequence = pairs["sequence"].get_group()
        self.background = dist.new_group(backend="gloo")  # for the thread that writes checkpoints

    def total(self, numbers):
        """Sums over all ranks of {name: number}."""
        sums = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(sums)
        return dict(zip(numbers, sums.tolist()))

    def any(self, flag):
        return self.total({"flag": float(flag)})["flag"] > 0

    def from_first(self, value):
        """The first rank's Python value, on all."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, values):
        """Lists of all ranks, joined."""
        boxes = [None] * self.world
        dist.all_gather_object(boxes, values)
        return [value for box in boxes for value in box]

    def say(self, text):
        """A line on stderr, once."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def barrier(self):
        dist.barrier()

    def leave(self):
        if self.ours:
            dist.destroy_process_group()


def parallelise(model, ranks, checkpointing=True):
    """Activation checkpointing, sequence parallelism and DDP or FSDP2 -> the module to call."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    layers = model.mllm.blocks() if model.mllm else []
    if ranks.sp > 1:
        Ulysses(model.dit, ranks.sequence)
    if checkpointing:
        for block in (*model.dit.blocks, *layers):
            block.forward = partial(checkpointed, block.forward)
    if ranks.parallel == "ddp":
        if ranks.world == 1:
            return model
        by_turns = any(".fake." in name for name, _ in model.named_parameters())  # distil.py: one LoRA a step
        return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=by_turns)
    policy = MixedPrecisionPolicy(param_dtype=ranks.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (*model.dit.blocks, *layers):
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    model.dit.blocks[0].register_forward_pre_hook(reached_by_the_backward, prepend=True)  # before FSDP's own
    if layers and any(p.requires_grad for name, p in model.mllm.named_parameters() if "connector" not in name):
        layers[0].register_forward_pre_hook(reached_by_the_backward, prepend=True)
    # The vision tower runs once a picture, not equally often on every rank: the root gathers it. The VAE stays whole:
    # it is called before the rest and apart from it.
    apart = set(model.vae.parameters()) if model.vae else set()
    return fully_shard(model, mesh=ranks.mesh, mp_policy=policy, ignored_params=apart)


def reached_by_the_backward(block, arguments):
    """Ranks must run identical backward graphs, or FSDP deadlocks: whatever a kind of data trains before the blocks,
    the backward goes through all of them."""
    if torch.is_grad_enabled():
        arguments[0].requires_grad_()


def checkpointed(forward, *inputs, **more):
    """Recompute a block in the backward, all but self-attention: 6 KB a token and layer spare a tenth of a step."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **more)


def keep_attention(context, operator, *inputs, **more):
    from torch.utils.checkpoint import CheckpointPolicy

    name, shapes = operator.name(), [getattr(x, "shape", None) for x in inputs[:2]]
    over_itself = len(inputs) > 2 and shapes[0] == shapes[1]
    kept = over_itself and "attention" in name and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compute_in(model, dtype):
    """Let linears and convolutions with float32 master weights compute in `dtype` without FSDP2: each casts its weights
    when it is called, in a recomputed block once more."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Linear, nn.Conv3d)) and any(p.requires_grad for p in own.values()):
            module.forward = partial(with_weights_in, module, type(module).forward, dtype)


def with_weights_in(module, forward, dtype, x):
    cast = {name: p.to(dtype) for name, p in module.named_parameters(recurse=False)}
    with _reparametrize_module(module, cast):
        return forward(module, x)


class Ulysses:
    """Sequence parallelism over heads: between the blocks each rank has its share of the tokens, and in self-attention
    all tokens of its share of the heads.

    It hangs on the DiT by hooks: tokens are split before the first block and joined after the last. The context is
    whole on every rank, so cross-attention needs no exchange. Every rank computes the same loss from the joined
    tokens; the join's backward adds the ranks' gradients, so that their mean over all ranks is the true one.
    """

    def __init__(self, dit, group):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.entrance = dit.blocks[0]
        for block in dit.blocks:
            block.self_attn.attend = self.attend
            block.register_forward_pre_hook(self.enter)
        dit.blocks[-1].register_forward_hook(lambda block, arguments, x: Join.apply(x, self))  # -> (B, N, D)

    def enter(self, block, arguments):
        """Give a block the rotary table of this rank's tokens, and the first block these tokens."""
        x, time_mod, context, (cos, sin) = arguments
        self.counts = [len(cos) // self.size + (rank < len(cos) % self.size) for rank in range(self.size)]
        mine = slice(sum(self.counts[: self.rank]), sum(self.counts[: self.rank + 1]))
        return x[:, mine] if block is self.entrance else x, time_mod, context, (cos[mine], sin[mine])

    def attend(self, q, k, v):
        """q, k, v (B, n, H, d), this rank's tokens -> (B, n, H, d)."""
        return self.to_tokens(attention(*(self.to_heads(x) for x in (q, k, v))))

    def to_heads(self, x):
        """(B, n, H, d), this rank's tokens -> (B, N, H / ranks, d), its heads."""
        b, _, h, d = x.shape
        parts = [part.reshape(-1) for part in x.split(h // self.size, dim=2)]
        received = self.exchange(parts, [b * count * (h // self.size) * d for count in self.counts])
        return torch.cat([part.view(b, -1, h // self.size, d) for part in received], dim=1)

    def to_tokens(self, x):
        """The way back: (B, N, H / ranks, d) -> (B, n, H, d)."""
        b, _, h, d = x.shape
        parts = [part.reshape(-1) for part in x.split(self.counts, dim=1)]
        received = self.exchange(parts, [b * self.counts[self.rank] * h * d] * self.size)
        return torch.cat([part.view(b, -1, h, d) for part in received], dim=2)

    def exchange(self, parts, sizes):
        """Send part i to rank i -> what the ranks sent here, of `sizes` numbers each."""
        return Exchange.apply(torch.cat(parts), [len(part) for part in parts], sizes, self.group).split(sizes)


class Exchange(torch.autograd.Function):
    """all_to_all of flat tensors; its backward is the same the other way round."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.way_back = (received, sent, group)
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return Exchange.apply(gradient.contiguous(), *ctx.way_back), None, None, None


class Join(torch.autograd.Function):
    """The tokens of all ranks, (B, n, D) -> (B, N, D). Backward: this rank's part of the sum of all ranks' gradients,
    which are equal, since each computes the loss."""

    @staticmethod
    def forward(ctx, x, ulysses):
        ctx.ulysses, counts = ulysses, ulysses.counts
        x = torch.nn.functional.pad(x, (0, 0, 0, max(counts) - x.shape[1]))
        pieces = [torch.empty_like(x) for _ in counts]
        dist.all_gather(pieces, x.contiguous(), ulysses.group)
        return torch.cat([piece[:, :count] for piece, count in zip(pieces, counts)], dim=1)

    @staticmethod
    def backward(ctx, gradient):
        u = ctx.ulysses
        return u.size * gradient.split(u.counts, dim=1)[u.rank], None


class SharedFrames:
    """Ranks that edit one clip encode and decode its frames by tiles: `vae.shared`."""

    def __init__(self, group):
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def tile(self, height, width):
        """Latent pixels a side of the largest tiles that are no fewer than the ranks; None where there are none."""
        longest = max(height, width)
        sides = (math.ceil(longest / parts) for parts in range(1, longest + 1))
        enough = (side for side in sides if math.ceil(height / side) * math.ceil(width / side) >= self.size)
        return next(enough, None)

    def mine(self, windows):
        return windows[self.rank :: self.size]

    def join(self, pieces, height, width):
        """This rank's [(core, picture)] -> the whole picture, on all: a sum of zeros and one value is exact."""
        ((y0, y1), _), picture = pieces[0]
        scale = picture.shape[-2] // (y1 - y0)
        out = picture.new_zeros(*picture.shape[:-2], height * scale, width * scale)
        for ((y0, y1), (x0, x1)), picture in pieces:
            out[..., y0 * scale : y1 * scale, x0 * scale : x1 * scale] = picture
        dist.all_reduce(out, group=self.group)
        return out
