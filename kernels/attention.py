import torch.nn.functional as F


def attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
