"""The diffusion transformer of Wan, from scratch.

    latents (B, C, T, H, W) -> patch embedding -> tokens (B, N, D), N = T * H/2 * W/2
    timestep (B,) -> sinusoid -> MLP -> shift, scale and gate of every block
    block: self-attention (3D RoPE), cross-attention to the context (B, L, D), feed-forward
    head -> unpatchify -> velocity (B, C, T, H, W)

`DiT.forward` is Wan's text-to-video model as it stands. What Kiwi-Edit adds to it, the source
latents and the reference tokens (paper, Section 4), is in `model.KiwiEdit.velocity`, which embeds
patches and calls `denoise` and `unpatchify` itself. Kiwi-Edit's context goes straight into the
cross-attention: `text_embedding` (Wan's projection of T5 features) is in every checkpoint and is
used only by whoever feeds text features, as Wan does. Parameters keep Wan's names.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from kernels import attention, gate_residual, gate_residual_norm, layer_norm_modulate, linear_gelu, rms_norm_rope


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan DiT; the presets stand in `model.PRESETS`. The default is Wan2.2-TI2V-5B.

    bf16_timesteps: below float32 the timestep is rounded to bfloat16 before its embedding. Kiwi-Edit's released
    weights were trained so (FACTS.md, "The DiT"); near t = 1000 that is a step of 4, or 4 radians of the fastest wave.
    """

    dim: int = 3072
    ffn_dim: int = 14336
    num_heads: int = 24
    num_layers: int = 30
    in_dim: int = 48
    out_dim: int = 48
    freq_dim: int = 256
    text_dim: int = 4096
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    bf16_timesteps: bool = False

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON has lists
        if self.dim % self.num_heads:
            raise ValueError(f"DiTConfig.num_heads: {self.num_heads} does not divide dim {self.dim}")
        if self.head_dim % 2 or self.head_dim // 3 % 2:
            raise ValueError(
                f"DiTConfig.dim / num_heads: head_dim {self.head_dim} and head_dim // 3 must be even, "
                "RoPE splits it into time, height and width and rotates pairs"
            )
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise ValueError(f"DiTConfig.patch_size: {self.patch_size}, expected (1, p, q)")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def time_sinusoid(t, dim):
    """Timesteps (B,) in [0, 1000] -> (B, dim) float64, cosines first."""
    frequency = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float64, device=t.device))
    angle = t.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # the table is cached and may meet autograd later
def rope_3d(grid, head_dim, device):
    """Rotary table of a (frames, height, width) grid of tokens: cos and sin, each (N, head_dim / 2), float32.

    head_dim is split into time d - 2 * (d // 3), height d // 3 and width d // 3; theta is 10000 and
    positions count from 0 on each axis. Made once per shape.
    """
    split = (head_dim - 2 * (head_dim // 3), head_dim // 3, head_dim // 3)
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, split)):
        frequency = 10000 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency  # (length, dim/2)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(angle.view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)  # (N, head_dim/2)
    return angle.cos().float(), angle.sin().float()


class RMSNorm(nn.Module):
    """The weight of a full-width RMSNorm; `rms_norm_rope` applies it together with RoPE."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over the full width D, as in Wan.

    `attend`: what mixes the tokens; several ranks that share a sequence put their own there (`parallel.Ulysses`).
    """

    attend = staticmethod(attention)

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)

    def keys_values(self, context, rope=None):
        """context (B, L, D) -> k, v, each (B, L, heads, head_dim)."""
        k = rms_norm_rope(self.k(context), self.norm_k.weight, rope, self.num_heads, self.eps)
        return k, self.v(context).unflatten(-1, (self.num_heads, -1))

    def forward(self, x, keys_values, rope=None):
        """Queries from x (B, N, D), keys and values from `keys_values` -> (B, N, D)."""
        q = rms_norm_rope(self.q(x), self.norm_q.weight, rope, self.num_heads, self.eps)
        return self.o(self.attend(q, *keys_values).flatten(2))


def modulation(rows, dim):
    """(1, rows, dim), normal with a deviation of 1 / sqrt(dim); on the meta device torch would import its compiler."""
    table = torch.empty(1, rows, dim)
    return nn.Parameter(table if table.is_meta else table.normal_(std=dim**-0.5))


class Block(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = modulation(6, config.dim)

    def forward(self, x, time_mod, context, rope):
        """One transformer block.

        x (B, N, D); time_mod (B, 6, D); context (B, L, D), or its keys and values where they are kept
        over the steps of an edit (`DiT.context_keys_values`); rope from `rope_3d`.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + time_mod).split(1, dim=1)
        rows8 = getattr(self.ffn[0], "products8", False)  # the norms then hand their rows over in 8 bits
        y = layer_norm_modulate(x, shift_a, scale_a, self.eps, rows8)
        y = self.self_attn(y, self.self_attn.keys_values(y, rope), rope)
        x, y = gate_residual_norm(x, y, gate_a, *self.norm3_as_modulation(), self.eps, rows8)
        if isinstance(context, torch.Tensor):
            context = self.cross_attn.keys_values(context)
        y = self.cross_attn(y, context)
        x, y = gate_residual_norm(x, y, None, shift_f, scale_f, self.eps, rows8)
        return gate_residual(x, self.ffn[2](linear_gelu(y, self.ffn[0])), gate_f)

    def norm3_as_modulation(self):
        """The affine norm before cross-attention as float32 shift and scale (1, 1, D): one kernel for all norms."""
        return self.norm3.bias.float()[None, None], self.norm3.weight.float()[None, None] - 1


class Head(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = modulation(2, config.dim)

    def forward(self, x, time):
        """x (B, N, D), time (B, D) -> (B, N, out_dim * patch)."""
        shift, scale = (self.modulation + time[:, None]).split(1, dim=1)
        return self.head(layer_norm_modulate(x, shift, scale, self.eps))


class DiT(nn.Module):
    """Wan's diffusion transformer. `forward` is text-to-video; Kiwi-Edit calls the parts."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(self, x, t, context):
        """Velocity of plain Wan.

        x (B, C, T, H, W) with H and W multiples of the patch; t (B,) in [0, 1000]; context (B, L, D), text
        features that went through `text_embedding` -> (B, C, T, H, W).
        """
        grid = self.grid(x)
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (B, N, D)
        return self.unpatchify(self.denoise(tokens, t, context, grid), grid)

    def grid(self, x) -> tuple[int, int, int]:
        """The token grid (frames, height, width) of latents (B, C, T, H, W); ValueError if patches do not fit."""
        frames, height, width = x.shape[2:]
        _, p, q = self.config.patch_size
        if height % p or width % q:
            raise ValueError(f"latents of {height}x{width} are not a multiple of the patch {p}x{q}")
        return frames, height // p, width // q

    def embed_time(self, t):
        """t (B,) in [0, 1000] -> time (B, D) for the head and (B, 6, D) for the blocks."""
        dtype = self.patch_embedding.weight.dtype
        if self.config.bf16_timesteps and dtype.itemsize < 4:
            t = t.bfloat16()
        time = self.time_embedding(time_sinusoid(t, self.config.freq_dim).to(dtype))
        return time, self.time_projection(time).unflatten(1, (6, -1))

    def context_keys_values(self, context):
        """The cross-attention's keys and values of a context (B, L, D), for every block: once per edit."""
        return [block.cross_attn.keys_values(context) for block in self.blocks]

    def denoise(self, tokens, t, context, grid, keep=slice(None)):
        """All blocks and the head: tokens (B, N, D) laid out as `grid` -> (B, N kept, out_dim * patch).

        context: (B, L, D), or the list of `context_keys_values`. keep: the tokens whose output is wanted
        (those of references are dropped before the head).
        """
        time, time_mod = self.embed_time(t)
        rope = rope_3d(grid, self.config.head_dim, tokens.device)
        contexts = context if isinstance(context, list) else [context] * len(self.blocks)
        tokens = tokens.contiguous()  # as a convolution leaves them, channels lie apart and every norm would copy them
        for block, block_context in zip(self.blocks, contexts):
            tokens = block(tokens, time_mod, block_context, rope)
        return self.head(tokens[:, keep], time)

    def unpatchify(self, x, grid):
        """(B, N, patch * C) -> (B, C, T, H, W)."""
        x = x.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)  # (B, f, h, w, 1, p, q, C)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, f, 1, h, p, w, q)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
