"""The video autoencoders of Wan 2.2 (z 48, stride 4x16x16) and Wan 2.1 (z 16, stride 4x8x8), from scratch.

    video (B, 3, T, H, W) in [-1, 1], T = 4k + 1
      encoder.down: convolutions, down to the latent grid   } causal in time: a frame sees itself and its past,
      encoder.top: attention within each frame              } so a clip is streamed in chunks; what a layer must
    latents (B, z, 1 + k, H/s, W/s), normalised             } remember of the past lies in `state`, a dict from
      decoder.bottom, decoder.up: the same way back         } the layer to its last frames
    video (B, 3, T, H, W), clamped to [-1, 1]

A clip's length adds only its features at the latent grid to working memory. The first frame stands alone (an image
is a clip of one frame); every latent frame after it stands for four. Parameters keep the names of `Wan2.2_VAE.pth` and
`Wan2.1_VAE.pth`.

Tiles: the released code decodes overlapping tiles, attention included, and blends them; it computes each
pixel up to four times and the result depends on the tiling. Here only the convolutional parts are tiled, with
a halo of their receptive field, and the attention always sees the whole frame: the same result as without tiles.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from kernels import channel_norm_silu
from kernels.conv import conv3d, fastest_convolutions, upsample_conv

# Norms over channels and convolutions are fastest where the channels lie together: on 2 cores the norms take an
# eighth of the time, and tensor cores want it too.
CHANNELS_LAST = torch.channels_last_3d

# Mean and standard deviation of each latent channel, published with Wan's VAEs.
LATENT_STATISTICS = {
    "2.2": (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158,
         0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649,
         0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548,
         -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
    "2.1": (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
         -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
         1.6382, 1.1253, 2.8251, 1.9160),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a Wan VAE; the default is the one of Wan2.2-TI2V-5B.

    version "2.2" adds to "2.1" a 2x2 pixel shuffle at the pixels and averaging shortcuts around each level.
    `mean` and `std` (z_dim numbers each) normalise the latents; without them the published ones of the version
    are used where z_dim fits them, and a VAE of another z_dim is not normalised.
    """

    version: str = "2.2"
    dim: int = 160
    dec_dim: int = 256  # version 2.1 has one width for both halves, `dim`
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if self.version not in LATENT_STATISTICS:
            raise ValueError(f'VAEConfig.version: {self.version!r}, expected "2.2" or "2.1"')
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("VAEConfig.temporal_downsample: expected one entry less than dim_mult has")
        folds = *(4 * (1 + time) for time in self.temporal_downsample), 1  # voxels that a level lays into its channels
        if self.version == "2.2" and any(a * fold % b for a, b, fold in zip((1, *self.dim_mult), self.dim_mult, folds)):
            raise ValueError(f"VAEConfig.dim_mult: {self.dim_mult}, a level's shortcut cannot be averaged to its width")
        if {len(self.mean), len(self.std)} not in ({0}, {self.z_dim}):
            raise ValueError(f"VAEConfig.mean, VAEConfig.std: expected {self.z_dim} numbers each, or none")

    @property
    def decoder_dim(self) -> int:
        return self.dec_dim if self.version == "2.2" else self.dim

    @property
    def patch(self) -> int:
        return 2 if self.version == "2.2" else 1

    @property
    def time_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_stride(self) -> int:
        return self.patch * 2 ** (len(self.dim_mult) - 1)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.mean:
            return self.mean, self.std
        mean, std = LATENT_STATISTICS[self.version]
        return (mean, std) if len(mean) == self.z_dim else ((0.0,) * self.z_dim, (1.0,) * self.z_dim)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip; ValueError unless the length is 4k + 1 (the release drops the rest silently)."""
        if frames < 1 or (frames - 1) % self.time_stride:
            raise ValueError(f"a clip of {frames} frames: the VAE takes {self.time_stride}k + 1 (1, 5, 9, ... 81)")
        return 1 + (frames - 1) // self.time_stride


class CausalConv3d(nn.Conv3d):
    """3D convolution, padded in space, that sees the past in time: the clip begins with zeros before it."""

    def __init__(self, in_dim, out_dim, kernel):
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, state, norm=None):
        """x (B, C, T, H, W), the next T frames -> as many. `state` keeps the last kernel - 1 input frames; norm: a
        NormSiLU before the convolution, which writes right behind them."""
        past = self.kernel_size[0] - 1
        if past:
            if self not in state:
                state[self] = x.new_zeros(*x.shape[:2], past, *x.shape[3:]).contiguous(memory_format=CHANNELS_LAST)
            x = torch.cat([state[self], x], dim=2) if norm is None else norm(x, state[self])
            state[self] = x[:, :, -past:].clone()  # a view would keep the whole chunk alive
        return conv3d(x, self.weight, self.bias, padding=self.padding)


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of (B, C, ...)."""

    def __init__(self, dim, space_dims):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * space_dims))

    def forward(self, x):
        return F.normalize(x, dim=1) * (self.gamma * len(self.gamma) ** 0.5)


class NormSiLU(ChannelNorm):
    """The same and SiLU, of (B, C, T, H, W), behind the frames `past`."""

    def forward(self, x, past):
        return channel_norm_silu(x, self.gamma, past)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the indices are those of the checkpoint (5 was a dropout)."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.residual = nn.ModuleDict({
            "0": NormSiLU(in_dim, 3),
            "2": CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            "3": NormSiLU(out_dim, 3),
            "6": CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        })  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else None

    def forward(self, x, state):
        y = self.residual["2"](x, state, norm=self.residual["0"])
        y = self.residual["6"](y, state, norm=self.residual["3"])
        return y + (x if self.shortcut is None else self.shortcut(x, state))


def apply(layers, x, state):
    for layer in layers:
        x = layer(x, state)
    return x


def residual_blocks(in_dim, out_dim, count):
    return [ResidualBlock(dim, out_dim) for dim in (in_dim, *[out_dim] * (count - 1))]


class FrameAttention(nn.Module):
    """Self-attention of one head among the pixels of each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x, state):
        B, C, T, H, W = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # (B * T, H * W, 3 C)
        y = F.scaled_dot_product_attention(*qkv[:, None].chunk(3, dim=-1))[:, 0]
        y = self.proj(y.transpose(1, 2).unflatten(2, (H, W)))
        return x + y.unflatten(0, (B, T)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width and, with `time`, the frame rate: the first frame stays alone, then two become one."""

    def __init__(self, dim, time):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, state):
        conv = self.resample["1"]
        x = conv3d(F.pad(x, (0, 1, 0, 1)), conv.weight[:, :, None], conv.bias, stride=(1, 2, 2))
        if self.time_conv is None:
            return x
        first = [] if self in state else [x[:, :, :1]]
        x = torch.cat([state[self], x], dim=2) if self in state else x
        state[self] = x[:, :, -1:].clone()
        conv = self.time_conv
        later = [conv3d(x, conv.weight, conv.bias, conv.stride)] if x.shape[2] > 1 else []
        return torch.cat(first + later, dim=2)


class Upsample(nn.Module):
    """Double height and width and, with `time`, the frame rate: the first frame stays alone, then one becomes two."""

    def __init__(self, dim, out_dim, time):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, out_dim, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if time else None

    def forward(self, x, state):
        if self.time_conv is not None:
            parts = [] if self in state else [x[:, :, :1]]
            x = x[:, :, len(parts) :]
            state[self] = True
            if x.shape[2]:
                x = self.time_conv(x, state).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
                parts.append(x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3))  # (B, C, 2 T, H, W)
            x = torch.cat(parts, dim=2).contiguous(memory_format=CHANNELS_LAST)
        conv = self.resample["1"]
        return upsample_conv(x, conv.weight, conv.bias, state.setdefault(conv, {}))


def average_down(x, out_dim, time, space):
    """Wan 2.2's shortcut around a level of the encoder: fold `time` x `space` x `space` voxels into the channels
    and average groups of them down to out_dim. A leading odd frame is paired with a frame of zeros."""
    B, _, T, H, W = x.shape
    if T % time:
        x = F.pad(x, (0, 0, 0, 0, time - T % time, 0))
    x = x.movedim(1, -1).reshape(B, -1, time, H // space, space, W // space, space, x.shape[1])
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # (B, T', H', W', C * time * space * space)
    return x.unflatten(4, (out_dim, -1)).mean(dim=5).movedim(-1, 1)


def repeat_up(x, out_dim, time, space, first):
    """Wan 2.2's shortcut around a level of the decoder: `average_down` backwards, by repetition."""
    x = x.movedim(1, -1).repeat_interleave(out_dim * time * space**2 // x.shape[1], dim=4)
    x = x.unflatten(4, (out_dim, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)  # (B, out_dim, T * time, H * space, W * space)
    return x[:, :, time - 1 :] if first else x


class DownLevel(nn.Module):
    """A level of Wan 2.2's encoder."""

    def __init__(self, in_dim, out_dim, blocks, time, space):
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, 1 + time, 1 + space
        self.downsamples = nn.ModuleList(residual_blocks(in_dim, out_dim, blocks))
        if space:
            self.downsamples.append(Downsample(out_dim, time))

    def forward(self, x, state):
        return apply(self.downsamples, x, state) + average_down(x, self.out_dim, self.time, self.space)


class UpLevel(nn.Module):
    """A level of Wan 2.2's decoder; the last one, which does not upsample, has no shortcut."""

    def __init__(self, in_dim, out_dim, blocks, time, space):
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, 1 + time, space
        self.upsamples = nn.ModuleList(residual_blocks(in_dim, out_dim, blocks))
        if space:
            self.upsamples.append(Upsample(out_dim, out_dim, time))

    def forward(self, x, state):
        first = self not in state
        state[self] = True
        y = apply(self.upsamples, x, state)
        return y + repeat_up(x, self.out_dim, self.time, 2, first) if self.space else y


def levels(config: VAEConfig, down):
    """The convolutional levels of the encoder (down) or decoder, as the checkpoint nests them: 2.2 by level, 2.1 flat,
    and there each upsampling also halves the width."""
    mult = (1, *config.dim_mult) if down else (config.dim_mult[-1], *config.dim_mult[::-1])
    width, blocks = (config.dim, config.num_res_blocks) if down else (config.decoder_dim, config.num_res_blocks + 1)
    layers = nn.ModuleList()
    for i, (in_dim, out_dim) in enumerate(pairwise(width * m for m in mult)):
        space = i < len(config.dim_mult) - 1
        time = space and config.temporal_downsample[:: 1 if down else -1][i]
        if config.version == "2.2":
            layers.append((DownLevel if down else UpLevel)(in_dim, out_dim, blocks, time, space))
            continue
        layers.extend(residual_blocks(in_dim if down or i == 0 else in_dim // 2, out_dim, blocks))
        if space:
            layers.append(Downsample(out_dim, time) if down else Upsample(out_dim, out_dim // 2, time))
    return layers


def middle_layers(dim):
    return nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim)])


def head_layers(in_dim, out_dim):
    return nn.ModuleDict({"0": NormSiLU(in_dim, 3), "2": CausalConv3d(in_dim, out_dim, (3, 3, 3))})


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        top = config.dim * config.dim_mult[-1]
        self.patch = config.patch
        self.conv1 = CausalConv3d(3 * config.patch**2, config.dim, (3, 3, 3))
        self.downsamples = levels(config, down=True)
        self.middle = middle_layers(top)
        self.head = head_layers(top, 2 * config.z_dim)

    def down(self, x, state):
        """Frames (B, 3, t, H, W) -> features (B, D, t/4, H/s, W/s); local, so it may be tiled."""
        p = self.patch
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 6, 4, 2, 3, 5)  # (B, 3, q, p, t, H/p, W/p)
        x = x.flatten(1, 3).contiguous(memory_format=CHANNELS_LAST)
        return apply(self.downsamples, self.conv1(x, state), state)

    def top(self, x, state):
        """Features -> moments (B, 2 z, t, h, w); its attention sees whole frames."""
        x = apply(self.middle, x.contiguous(memory_format=CHANNELS_LAST), state)
        return self.head["2"](x, state, norm=self.head["0"])


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        top = config.decoder_dim * config.dim_mult[-1]
        self.patch = config.patch
        self.conv1 = CausalConv3d(config.z_dim, top, (3, 3, 3))
        self.middle = middle_layers(top)
        self.upsamples = levels(config, down=False)
        self.head = head_layers(config.decoder_dim * config.dim_mult[0], 3 * config.patch**2)

    def bottom(self, z, state):
        """Latents (B, z, t, h, w) -> features (B, D, t, h, w); its attention sees whole frames."""
        z = z.contiguous(memory_format=CHANNELS_LAST)
        return apply(self.middle, self.conv1(z, state), state)

    def up(self, x, state):
        """Features -> frames (B, 3, 4t, H, W), one less in a clip's first chunk; local, so it may be tiled."""
        x = apply(self.upsamples, x.contiguous(memory_format=CHANNELS_LAST), state)
        x = self.head["2"](x, state, norm=self.head["0"])
        x = x.unflatten(1, (3, self.patch, self.patch)).permute(0, 1, 4, 5, 3, 6, 2)  # (B, 3, t, H, q, W, p)
        return x.flatten(5, 6).flatten(3, 4)


def tile_windows(height, width, tile, halo):
    """Split a latent grid into cores of at most tile x tile (None: one) and their windows, `halo` larger on each inner
    side -> [(core, window)], each ((y0, y1), (x0, x1))."""
    if tile is not None and tile < 1:
        raise ValueError(f"tile: {tile}, expected at least 1 latent pixel, or None")

    def spans(size):
        step = tile or size
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield (start, stop), (max(start - halo, 0), min(stop + halo, size))

    return [((cy, cx), (wy, wx)) for cy, wy in spans(height) for cx, wx in spans(width)]


def crop(x, span, scale=1):
    """x (..., H, W) cut to ((y0, y1), (x0, x1)) * scale."""
    (y0, y1), (x0, x1) = span
    return x[..., y0 * scale : y1 * scale, x0 * scale : x1 * scale]


def chunks(latent_frames, chunk):
    """Latent frame ranges of a stream: the first frame alone, then `chunk` at a time."""
    return [(0, 1)] + [(start, min(start + chunk, latent_frames)) for start in range(1, latent_frames, chunk)]


class VAE(nn.Module):
    """Wan's video autoencoder. `encode` and `decode` stream through time, `chunk` latent frames at a time."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self.shared = None  # `parallel.SharedFrames` of ranks that edit one clip

    @torch.inference_mode(False)  # what is laid out once may meet autograd later
    def weights_like_activations(self):
        """Activations are channels last; a kernel in another layout would be copied at every call. Once, in place."""
        for parameter in self.parameters():
            if parameter.ndim in (4, 5):
                layout = CHANNELS_LAST if parameter.ndim == 5 else torch.channels_last
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def halo(self, convs_per_level):
        """Latent pixels beyond its core that a tile needs: the receptive field of the local part, rounded up.

        Level i, counted from the latent grid, has pixels of 2**-i: its 3x3 convolutions reach one pixel each,
        and so do the resampling between levels and the first or last convolution at the finest level.
        """
        levels = len(self.config.dim_mult)
        reach = sum((convs_per_level + (i > 0)) / 2**i for i in range(levels)) + 1 / 2 ** (levels - 1)
        return math.ceil(reach)

    def normalise(self, mu):
        mean, std = (mu.new_tensor(s).view(-1, 1, 1, 1) for s in self.config.statistics)
        return (mu - mean) / std

    def denormalise(self, z):
        mean, std = (z.new_tensor(s).view(-1, 1, 1, 1) for s in self.config.statistics)
        return z * std + mean

    def tiles(self, height, width, tile, convs_per_level):
        """Tiles to work on, all or this rank's, and what joins them."""
        halo = self.halo(convs_per_level)
        windows = tile_windows(height, width, self.shared.tile(height, width) if self.shared else tile, halo)
        if self.shared is None or len(windows) == 1:
            return windows, join_tiles
        return self.shared.mine(windows), self.shared.join

    @fastest_convolutions()
    def moments(self, video, tile=None, chunk=1, on_chunk=None):
        """Mean and log-variance of the posterior, not normalised: each (B, z, 1 + (T-1)/4, H/s, W/s). As `encode`."""
        c = self.config
        self.weights_like_activations()
        spans = chunks(c.latent_frames(video.shape[2]), chunk)
        if video.shape[3] % c.space_stride or video.shape[4] % c.space_stride:
            raise ValueError(f"frames of {tuple(video.shape[3:])}: the VAE takes multiples of {c.space_stride}")
        weight, tiles = self.conv1.weight, []
        height, width = video.shape[3] // c.space_stride, video.shape[4] // c.space_stride
        windows, join = self.tiles(height, width, tile, 2 * c.num_res_blocks)
        for core, window in windows:
            state, features = {}, []
            for start, stop in spans:
                frames = video[:, :, max(0, (start - 1) * c.time_stride + 1) : (stop - 1) * c.time_stride + 1]
                x = crop(frames, window, c.space_stride).to(weight.device)
                x = (x.float() * (2 / 255) - 1 if x.dtype == torch.uint8 else x).to(weight.dtype)
                inner = [(a - w, b - w) for (a, b), (w, _) in zip(core, window)]
                features.append(crop(self.encoder.down(x, state), inner))
                on_chunk and on_chunk(len(tiles) * len(spans) + len(features), len(windows) * len(spans))
            tiles.append((core, torch.cat(features, dim=2)))
        features, state = join(tiles, height, width), {}
        out = [self.encoder.top(features[:, :, a:b], state) for a, b in spans]
        return self.conv1(torch.cat(out, dim=2), {}).chunk(2, dim=1)

    def encode(self, video, tile=None, chunk=1, on_chunk=None):
        """Video to normalised latents, the posterior's mean and not a sample.

        video: (B, 3, T, H, W) in [-1, 1], or uint8, on any device (chunks are moved as they are needed), T = 4k + 1,
        H and W multiples of the space stride -> (B, z, 1 + k, H/s, W/s).
        tile: latent pixels a side that are worked on at once; None: the whole frame. The result is the same.
        on_chunk(done, total): called after each chunk of each tile. ValueError where T, H or W do not fit.
        """
        return self.normalise(self.moments(video, tile, chunk, on_chunk)[0])

    @fastest_convolutions()
    def decode(self, latents, tile=None, chunk=1, on_chunk=None, out_device=None, levels=False):
        """Normalised latents (B, z, 1 + k, h, w) to video (B, 3, 4k + 1, h*s, w*s), clamped to [-1, 1].

        out_device: where the frames are collected (default: the latents' device). levels: as uint8, rounded to the
        nearest of 256 levels on the decoding device. Other arguments as for `encode`.
        """
        c = self.config
        self.weights_like_activations()
        latent_frames, height, width = latents.shape[2:]
        z, state = self.conv2(self.denormalise(latents.to(self.conv2.weight)), {}), {}
        features = [self.decoder.bottom(z[:, :, a:b], state) for a, b in chunks(latent_frames, chunk)]
        (windows, join), tiles, finite = self.tiles(height, width, tile, 2 * c.num_res_blocks + 2), [], []
        for core, window in windows:
            state, frames = {}, []
            inner = [(a - w, b - w) for (a, b), (w, _) in zip(core, window)]
            for part in features:
                x = crop(self.decoder.up(crop(part, window), state), inner, c.space_stride)
                finite.append(x.isfinite().all())  # asked at the end: no chunk waits for the device
                x = x.clamp(-1, 1)
                x = ((x.float() + 1) * 127.5).round().to(torch.uint8) if levels else x
                frames.append(x.to(out_device or latents.device))
                on_chunk and on_chunk(len(tiles) * len(features) + len(frames), len(windows) * len(features))
            tiles.append((core, torch.cat(frames, dim=2)))
        if not torch.stack(finite).all():
            mend = "take bfloat16" if z.dtype == torch.float16 else "do the weights hold NaN?"
            raise ValueError(f"the edit's numbers are not finite in {str(z.dtype)[6:]}: {mend}")
        return join(tiles, height, width)


def join_tiles(tiles, height, width):
    """Cores with their pictures (B, C, T, h, w) side by side -> (B, C, T, height * s, width * s)."""
    if len(tiles) == 1:
        return tiles[0][1]
    ((y0, y1), _), picture = tiles[0]
    scale = picture.shape[-2] // (y1 - y0)
    out = picture.new_empty(*picture.shape[:-2], height * scale, width * scale)
    for core, picture in tiles:
        crop(out, core, scale).copy_(picture)
    return out
