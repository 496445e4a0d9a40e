"""Qwen2.5-VL as a reader: its hidden states in plain PyTorch, nothing is generated (arXiv 2502.13923, Section 2.1).

    patches (N, 1176) of pictures, grids [(t, h, w)] -> VisionTower -> tokens (N / 4, D), 2x2 patches each
    embeddings (B, S, D), positions (3, B, S)        -> LanguageModel -> hidden states (B, S, D)

Parameters have the names of released checkpoints. Equal to transformers' model to the last bit in float32 on a CPU
(tests/test_connectors.py); importing that takes longer than a whole edit with the bundled weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class QwenConfig:
    """Sizes of both towers. `sections`: how many rotary frequencies turn with time, height and width."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    eps: float
    theta: float
    sections: tuple[int, int, int]
    vision_hidden: int
    vision_ffn: int
    vision_layers: int
    vision_heads: int
    whole_layers: tuple[int, ...]  # of the vision tower: they see a whole frame, the others windows
    patch: int
    window: int  # pixels a side

    @classmethod
    def from_dict(cls, values):
        """From Qwen's config.json, its text sizes at the top or in `text_config`. KeyError, TypeError, ValueError."""
        text, vision = values.get("text_config") or values, values["vision_config"]
        if values.get("model_type", "qwen2_5_vl") != "qwen2_5_vl":
            raise ValueError(f"model_type {values['model_type']}, expected qwen2_5_vl")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        return cls(
            hidden=text["hidden_size"], ffn=text["intermediate_size"], layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            vocab=text["vocab_size"], eps=text.get("rms_norm_eps", 1e-5),
            theta=rope.get("rope_theta") or text.get("rope_theta", 1e6),
            sections=tuple(rope.get("mrope_section", (16, 24, 24))),
            vision_hidden=vision["hidden_size"], vision_ffn=vision["intermediate_size"],
            vision_layers=vision["depth"], vision_heads=vision["num_heads"],
            whole_layers=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
            patch=vision.get("patch_size", 14), window=vision.get("window_size", 112),
        )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim, ffn, bias):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, ffn, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(ffn, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def frequencies(count, theta):
    """(count,) angles a position, from 1 down to nearly 1 / theta."""
    return 1.0 / theta ** (torch.arange(0, 2 * count, 2, dtype=torch.float) / (2 * count))


def rotate(x, cos, sin):
    """Rotary embedding: number i of a head turns with number i + d/2. x: (..., d), cos and sin likewise."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# The vision tower


class VisionAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, cos, sin, lengths):
        """x: (N, D). Patches see those of the same of the N's consecutive parts of `lengths`."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # (N, H, d) each
        q, k = (rotate(z.float(), cos[:, None], sin[:, None]).to(x.dtype) for z in (q, k))
        parts = zip(*(z.transpose(0, 1)[None].split(lengths, dim=2) for z in (q, k, v)))  # (1, H, n, d)
        out = torch.cat([F.scaled_dot_product_attention(*part).transpose(1, 2) for part in parts], dim=1)
        return self.proj(out.reshape(len(x), -1))


class VisionBlock(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.vision_hidden), RMSNorm(c.vision_hidden)
        self.attn = VisionAttention(c.vision_hidden, c.vision_heads)
        self.mlp = MLP(c.vision_hidden, c.vision_ffn, bias=True)

    def forward(self, x, cos, sin, lengths):
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """2x2 neighbouring patches -> a token of the language model."""

    def __init__(self, c: QwenConfig):
        super().__init__()
        self.ln_q, four = RMSNorm(c.vision_hidden), 4 * c.vision_hidden
        self.mlp = nn.Sequential(nn.Linear(four, four), nn.GELU(), nn.Linear(four, c.hidden))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(len(x) // 4, -1))


class PatchEmbed(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        size = (2, c.patch, c.patch)
        self.proj = nn.Conv3d(3, c.vision_hidden, size, size, bias=False)

    def forward(self, patches):
        return self.proj(patches.view(-1, 3, *self.proj.kernel_size)).flatten(1)


class VisionTower(nn.Module):
    """Pictures and videos in pairs of frames; each pair by itself, most layers in windows of 112 pixels."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_layers))
        self.merger = PatchMerger(config)

    def forward(self, patches, grids):
        """patches: (N, 1176), 2x2 neighbours in succession; grids: [(t, h, w)] in patches -> (N / 4, D)."""
        c, device = self.config, patches.device
        order, windows = self.windows(grids)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        patch_order = (4 * order[:, None] + torch.arange(4)).flatten()
        angles = self.angles(grids)[patch_order].to(device)
        cos, sin = angles.cos(), angles.sin()
        x = self.patch_embed(patches)[patch_order.to(device)]
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, frames if i in c.whole_layers else windows)
        return self.merger(x)[order.argsort().to(device)]

    def windows(self, grids):
        """The order of the tokens (N / 4,) in which windows follow one another, and each window's patches."""
        side, order, lengths, start = self.config.window // self.config.patch // 2, [], [], 0
        for t, h, w in grids:
            rows, cols = torch.arange(h // 2) // side, torch.arange(w // 2) // side
            number = rows[:, None] * (cols[-1] + 1) + cols  # (h/2, w/2): which window of its frame
            number = (torch.arange(t)[:, None, None] * (number[-1, -1] + 1) + number).flatten()
            order.append(start + number.argsort(stable=True))
            lengths += (4 * number.bincount()).tolist()
            start += len(number)
        return torch.cat(order), lengths

    def angles(self, grids):
        """(N, d) rotary angles: half of the frequencies turn with a patch's row, half with its column."""
        parts, f = [], frequencies(self.config.vision_hidden // self.config.vision_heads // 4, 1e4)
        for t, h, w in grids:
            places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
            places = places.view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(h * w, 2)
            parts.append((places[..., None] * f).flatten(1).repeat(t, 2))
        return torch.cat(parts)


# The language model


class Attention(nn.Module):
    """Causal, grouped queries."""

    def __init__(self, c: QwenConfig):
        super().__init__()
        self.dim = c.hidden // c.heads
        self.q_proj = nn.Linear(c.hidden, c.hidden)
        self.k_proj, self.v_proj = (nn.Linear(c.hidden, c.kv_heads * self.dim) for _ in range(2))
        self.o_proj = nn.Linear(c.hidden, c.hidden, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (p(x).unflatten(2, (-1, self.dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, S, d)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape != k.shape)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c.hidden, c.ffn, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.hidden, c.eps), RMSNorm(c.hidden, c.eps)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab, config.hidden), freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)

    def forward(self, x, positions):
        """x: (B, S, D) embeddings; positions: (3, B, S) in time, height, width -> (B, S, D). Nobody looks ahead, so
        what pads a row's end changes nothing before it."""
        c = self.config
        angles = positions[..., None] * frequencies(c.hidden // c.heads // 2, c.theta).to(x.device)
        angles = torch.cat([part[i] for i, part in enumerate(angles.split(c.sections, dim=-1))], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, S, d)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Qwen(nn.Module):
    """Both towers; matrices start as in the release's code, normal with a deviation of 0.02."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.language_model, self.visual = LanguageModel(config), VisionTower(config)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # random numbers there make torch import its compiler, for a second
                continue
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
