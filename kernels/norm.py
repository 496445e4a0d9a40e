import torch
import torch.nn.functional as F


def rms_norm_rope(x, weight, rope, num_heads, eps):
    B, L, D = x.shape
    x = F.rms_norm(x.float(), (D,), weight.float(), eps).unflatten(-1, (num_heads, -1, 2))  # (B, L, H, d/2, 2)
    if rope is None:
        return x.flatten(-2).type_as(weight)
    cos, sin = (r[:, None] for r in rope)  # (L, 1, d/2)
    a, b = x.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(weight)


def layer_norm_modulate(x, shift, scale, eps):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def gate_residual(x, y, gate):
    return x + gate * y
