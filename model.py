"""Kiwi-Edit: a video diffusion transformer that reads the request with a multimodal LLM.

    video, instruction, reference -> Encoder -> context (B, L, D)                              (connectors.py)
    video, reference -> VAE -> source latents (B, C, T, H, W), ref latents (B, C, R, H, W)     (vae.py)
    noise -> 50 Euler steps of `velocity` -> latents -> VAE -> the edited video                (dit.py)

`KiwiEdit.velocity` is the heart: what the paper adds to Wan (Section 4, Eq. 1) in a few lines. Above it stand the ways
in which the source may enter (Table 4), one class each; around it flow matching, the training loss and the sampler.
"""

import json
import math
import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from command import is_out_of_memory
from connectors import Encoder, MLLMConfig
from dit import DiT, DiTConfig
from kernels.graph import replayed
from load import QWEN_BASE, WAN_BASE, from_dict, listed, load_weights, only_weights, read_fields
from lora import merge_lora
from media import MAX_PIXELS, FrameFile, nearest_size, pad_reference, read_clip, whole_folder
from parallel import pick_device
from sampler import (
    FlowMatch,
    Sampler,
    agreed,
    crossfaded,
    filled,
    in_windows,
    mask_latents,
    outside,
    pasted,
    window_frames,
    windows,
)
from vae import VAE, VAEConfig


def patch_embedding(config: DiTConfig):
    """A patch embedding of zeros for source or reference latents, so that training starts from Wan."""
    conv = nn.Conv3d(config.out_dim, config.dim, config.patch_size, config.patch_size)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class Source(nn.Module):
    """How the source latents enter the DiT: a subclass is chosen by its name, `--set model.source=NAME`.

    forward(dit, x, t, source): noisy latents and source latents (B, C, T, H, W), t (B,) in [0, 1000] -> tokens
    (B, D, T, H/2, W/2). Parameters keep the values that the constructor gives them until weights replace them.
    """

    named = {}

    def __init_subclass__(cls, name):
        Source.named[name] = cls


class AddScaled(Source, name="add_scaled"):
    """The paper's way (Section 4.1, Eq. 1): patch(x) + sigma(t) patch_source(source)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_embedding = patch_embedding(config)

    def forward(self, dit, x, t, source):
        added = self.patch_embedding(source) * self.scale(dit, t).view(-1, 1, 1, 1, 1)
        return dit.patch_embedding(x) + added.to(x.dtype)

    def scale(self, dit, t):
        return t / 1000  # float32, as in the release: sigma in bfloat16 would be off by up to 0.2 %


class AddLearned(AddScaled, name="add_learned"):
    """The scale is a learnable function of the timestep that starts as sigma(t)."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.learned = nn.Linear(config.dim, 1)
        nn.init.zeros_(self.learned.weight)
        nn.init.zeros_(self.learned.bias)

    def scale(self, dit, t):
        return t / 1000 + self.learned(dit.embed_time(t)[0])[:, 0]


class AddUnscaled(AddScaled, name="add_unscaled"):
    """The same at all timesteps."""

    def scale(self, dit, t):
        return torch.ones_like(t)


class AddShared(Source, name="add_shared_patch_embed"):
    """The source passes the patch embedding of the noisy latents."""

    def __init__(self, config: DiTConfig):
        super().__init__()

    def forward(self, dit, x, t, source):
        return dit.patch_embedding(x) + (dit.patch_embedding(source) * (t / 1000).view(-1, 1, 1, 1, 1)).to(x.dtype)


class ChannelConcat(Source, name="channel_concat"):
    """A patch embedding of twice the channels: noisy latents, then source latents, whose weights start at zero."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.dim, config.out_dim, *config.patch_size))

    def forward(self, dit, x, t, source):
        patch = dit.patch_embedding
        weight = torch.cat([patch.weight, self.weight.to(patch.weight.dtype)], dim=1)
        return F.conv3d(torch.cat([x, source], dim=1), weight, patch.bias, stride=patch.stride)


class RefEmbedder(nn.Module):
    """The patch embedding of reference latents."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_embedding = patch_embedding(config)

    def forward(self, latents):
        return self.patch_embedding(latents)


@dataclass(frozen=True)
class KiwiConfig:
    """The parts, and the two choices about how they meet. `vae` and `mllm` None: the denoiser alone.

    source: how the source latents enter, a name in `Source.named` (paper, Table 4).
    ref_pad_first: reference tokens before the video's, as one released checkpoint has them, or after.
    trained: (frames, height, width, frames a second) of the one kind of clip that the weights know. None: many sizes.
    steps: denoising steps of an edit for which no other number is given.
    ref_guidance: likewise how far references are followed (`KiwiEdit.denoise`); 1, as the release has it: as trained.
    re_noise: the timesteps of a distilled student (`Sampler`), which take the place of `steps`.
    """

    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig | None = None
    mllm: MLLMConfig | None = None
    source: str = "add_scaled"
    ref_pad_first: bool = False
    trained: tuple[int, int, int, int] | None = None
    steps: int = 50
    ref_guidance: float = 1.0
    re_noise: tuple[float, ...] = ()

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"KiwiConfig.steps: {self.steps}, expected at least 1")
        if not 0 < self.ref_guidance < math.inf:
            raise ValueError(f"KiwiConfig.ref_guidance: {self.ref_guidance}, expected a number above 0")
        object.__setattr__(self, "trained", self.trained and tuple(self.trained))  # a list in JSON
        object.__setattr__(self, "re_noise", tuple(self.re_noise))
        if self.trained is not None and (len(self.trained) != 4 or min(self.trained) < 1):
            raise ValueError(f"KiwiConfig.trained: {self.trained!r}, expected frames, height, width, frames a second")
        if self.source not in Source.named:
            raise ValueError(f"KiwiConfig.source: {self.source!r}, expected one of {', '.join(Source.named)}")

    @property
    def window(self):
        """Frames that the weights were trained on; a longer clip is edited in windows of so many."""
        return self.trained[0] if self.trained else 81

    @property
    def pixel_grid(self):
        """Pixels of which both sides of a frame are multiples."""
        return self.vae.space_stride * self.dit.patch_size[1]


PRESETS = {
    "wan22_5b": KiwiConfig(DiTConfig(bf16_timesteps=True), VAEConfig(), MLLMConfig(QWEN_BASE)),
    "wan21_14b": KiwiConfig(
        DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16, bf16_timesteps=True),
        VAEConfig(version="2.1", dim=96, z_dim=16),
        MLLMConfig(QWEN_BASE, dit_dim=5120, num_ref_queries=384, max_ref_tokens=384),
    ),
    "wan21_1_3b": KiwiConfig(
        DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, bf16_timesteps=True),
        VAEConfig(version="2.1", dim=96, z_dim=16),
        MLLMConfig(QWEN_BASE, dit_dim=1536),
    ),
    "nano": KiwiConfig(
        # patches of one latent: 2x2 of 32 channels, noise and source in one token, would fill its 256 numbers
        DiTConfig(256, 768, 8, 9, in_dim=32, out_dim=32, freq_dim=128, text_dim=192, patch_size=(1, 1, 1)),
        VAEConfig(dim=24, dec_dim=32, z_dim=32, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)),
        # below 112x112 the MLLM sees a 64x64 frame of a video at 84x84, in 9 tokens (a picture in 4); else at 336x336
        MLLMConfig("weights/nano/mllm", 256, 16, 32, 48, max_ref_tokens=48, max_frames=4, max_pixels=112 * 112 - 1),
    ),
}


def balance_weights(latents, source, scale=0.1):
    """Weights of the places of a loss, (B, 1, T, H, W) with a mean of 1 in each sample: what an edit changes and what
    it keeps count by the square roots of their shares.

    A thing on 3 of 100 places has 3 % of a plain mean and 15 % of this one. A place has changed as far as its squared
    difference, mean over channels, stands above `scale`, in variances of a latent. latents, source: (B, C, T, H, W).
    """
    changed = (latents.float() - source.float()).square().mean(dim=1, keepdim=True)
    changed = changed / (changed + scale)
    share = changed.mean(dim=(2, 3, 4), keepdim=True).clamp(1e-3, 1 - 1e-3)
    weights = changed * share.rsqrt() + (1 - changed) * (1 - share).rsqrt()
    return weights / weights.mean(dim=(2, 3, 4), keepdim=True)


class Contexts(list):
    """Contexts (1, L, D) from a cache, in place of requests."""


class KiwiEdit(nn.Module):
    """The whole model. Parts: dit, source_embedder, ref_embedder and, unless the config leaves them out, vae, mllm.

    empty: Wan's and the language model's parameters are on the meta device, for weights to take their place.
    """

    def __init__(self, config: KiwiConfig, empty=False):
        super().__init__()
        self.config = config
        with torch.device("meta") if empty else nullcontext():
            self.dit = DiT(config.dit)
            self.vae = VAE(config.vae) if config.vae else None
        self.source_embedder = Source.named[config.source](config.dit)
        self.ref_embedder = RefEmbedder(config.dit)
        self.mllm = Encoder.named[config.mllm.encoder](config.mllm, empty) if config.mllm else None

    @property
    def dtype(self):
        return self.dit.patch_embedding.weight.dtype

    def cast(self, *tensors):
        """Tensors in the model's dtype; None stays None."""
        return [z if z is None else z.to(self.dtype) for z in tensors]

    def additions(self):
        """{name: parameter} of all that Kiwi-Edit adds to Wan and to the language model."""
        backbones = ["dit.", "vae.", *[f"mllm.{name}." for name in (self.mllm.backbones if self.mllm else ())]]
        return {name: p for name, p in self.named_parameters() if not name.startswith(tuple(backbones))}

    def inject(self, x, t, source):
        """Noisy latents and source latents, if any -> tokens (B, D, T, H/2, W/2)."""
        return self.dit.patch_embedding(x) if source is None else self.source_embedder(self.dit, x, t, source)

    def velocity(self, x, t, context, source=None, ref=None):
        """What the model predicts at time t: the direction from the clean latents to the noise.

        x: noisy latents (B, C, T, H, W); t: (B,) in [0, 1000]; context: (B, L, D), or the keys and values that
        `dit.context_keys_values` made of it; source: latents like x; ref: (B, C, R, H, W), R reference images,
        each with a time position of its own (the released call is broken for more than one). -> like x.
        ValueError where a shape does not fit: the release would broadcast in silence.
        """
        if source is not None and source.shape != x.shape:
            raise ValueError(f"source latents {tuple(source.shape)} differ from the noisy ones {tuple(x.shape)}")
        frames, height, width = self.dit.grid(x)
        tokens = self.inject(x, t, source)  # (B, D, T, H/2, W/2)
        video = slice(None)
        if ref is not None:
            if ref.shape[:2] != x.shape[:2] or ref.shape[3:] != x.shape[3:] or not ref.shape[2]:
                raise ValueError(f"reference latents {tuple(ref.shape)} do not fit the noisy ones {tuple(x.shape)}")
            tokens, video = self.append_reference(tokens, self.ref_embedder(ref))
        grid = (tokens.shape[2], height, width)
        tokens = tokens.flatten(2).transpose(1, 2)  # (B, N, D)
        return self.dit.unpatchify(self.dit.denoise(tokens, t, context, grid, video), (frames, height, width))

    def append_reference(self, tokens, ref_tokens):
        """Put reference tokens behind the video's, or before them, as more frames: RoPE goes on counting.

        Both (B, D, frames, h, w) -> their join and where the video's tokens are in the flat sequence.
        """
        area = math.prod(tokens.shape[3:])
        video, ref = tokens.shape[2] * area, ref_tokens.shape[2] * area
        if self.config.ref_pad_first:
            return torch.cat([ref_tokens, tokens], dim=2), slice(ref, ref + video)
        return torch.cat([tokens, ref_tokens], dim=2), slice(0, video)

    def training_loss(self, latents, context, t, source=None, ref=None, noise=None, flow=FlowMatch(), balance=False):
        """Weighted flow-matching loss, a float32 scalar. latents: clean target (B, C, T, H, W); t: (B,); rest as
        `velocity`. noise: like latents, drawn if not given. balance: weigh places by `balance_weights`."""
        noise = torch.randn_like(latents) if noise is None else noise
        sigma, weight = flow.training_sigmas(t)
        s = sigma.to(latents.dtype).view(-1, 1, 1, 1, 1)
        places = balance_weights(latents, source) if balance else 1
        noisy, source, ref = self.cast((1 - s) * latents + s * noise, source, ref)
        prediction = self.velocity(noisy, t, context, source, ref)
        error = places * (prediction.float() - (noise - latents).float()).square()
        return (weight * error.flatten(1).mean(dim=1)).mean()

    def forward(
        self, requests, latents, t, source=None, ref=None, noise=None, flow=FlowMatch(), balance=False, apart=False,
        loss_of=None,
    ):  # fmt: skip
        """The training loss of a batch: `training_loss`, or another of the same arguments (`loss_of`), on what the MLLM
        makes of the requests (`MLLMEncoder.prepare`), or on `Contexts`.

        Contexts with references differ in length and are not padded: equal ones go together. apart: one by one, where
        several ranks train with references, for sharded ranks must call the blocks equally often.
        """
        contexts = requests if isinstance(requests, Contexts) else self.mllm.encode(requests)
        groups = {}
        for i, context in enumerate(contexts):
            groups.setdefault(i if apart else context.shape[1], []).append(i)
        loss = 0
        for rows in groups.values():
            x, at, *rest = (z if z is None else z[rows] for z in (latents, t, source, ref, noise))
            context = torch.cat([contexts[i] for i in rows])
            loss = loss + len(rows) / len(t) * (loss_of or self.training_loss)(x, context, at, *rest, flow, balance)
        # What this kind of data does not use gets a gradient of zero: all ranks must reduce the same parameters.
        return loss + 0 * sum(p.float().sum() for p in self.additions().values() if p.requires_grad)

    @torch.no_grad()
    def denoise(
        self, noise, context, source=None, ref=None, steps=50, flow=FlowMatch(), on_step=None, unshown=None,
        guidance=1.0, sampler=Sampler(), stay=None, draw=None, spans=None,
    ):  # fmt: skip
        """From noise (B, C, T, H, W), float32, to latents: `Sampler.sample` of the velocity. One forward a step:
        Kiwi-Edit has no classifier-free guidance. The latents stay float32 between the steps (the release: bfloat16).

        unshown: the context of the same request without its references, for a second forward a step without them: the
        velocity is then v_unshown + guidance (v - v_unshown), as InstructPix2Pix has it of its picture (arXiv
        2211.09800, Eq. 3); above 1 the edit is more like the references, and less like what it was trained to be.
        spans: the windows in latent time (`sampler.windows`) that the rows of a batch are; rows then have a context
        each, in a list, go through the model one by one, and agree where they overlap.
        """
        rows = len(spans) if spans else 1
        source, ref = self.cast(source, ref)
        sources = [None] * rows if source is None else source.chunk(rows)
        contexts, shy = (self.cast(*(z if isinstance(z, list) else [z] * rows)) for z in (context, unshown))
        if rows == 1 and not hasattr(self.dit.blocks[0], "unshard"):  # a sharded block has weights while it is called
            contexts, shy = ([z if z is None else self.dit.context_keys_values(z)] for (z,) in (contexts, shy))

        def of_window(context, unshown, source, x, t):
            v = self.velocity(x, t, context, source, ref).float()
            if unshown is None:
                return v
            return torch.lerp(self.velocity(x, t, unshown, source).float(), v, guidance)

        forwards = [partial(of_window, *given) for given in zip(contexts, shy, sources)]
        if noise.shape[0] == noise.shape[2] == 1:  # a picture
            forwards = [replayed(forwards[0], noise.to(self.dtype), noise.new_ones(1))]

        def velocity(x, t, on_window):
            parts = []
            for forward, *given in zip(forwards, x.to(self.dtype).chunk(rows), t.chunk(rows)):
                parts.append(forward(*given))
                on_window(len(parts))
            return agreed(torch.cat(parts), spans) if rows > 1 else parts[0]

        return sampler.sample(velocity, noise.float(), sampler.sigmas(flow, steps), stay, on_step, draw, rows)

    def edit(self, *args, **kwargs):
        """`edit_stream`, all of it: -> uint8 torch (T, H, W, 3), on the CPU."""
        return torch.stack(list(self.edit_stream(*args, **kwargs)))

    @torch.no_grad()
    def edit_stream(
        self, video, instruction, ref=None, steps=None, seed=0, flow=FlowMatch(), tile=None, offload_to=None,
        progress=None, ref_guidance=None, sampler=None, mask=None,
    ):  # fmt: skip
        """Edit a clip. Yields uint8 frames (H, W, 3) on the CPU as they are decoded.

        video: uint8 (T, H, W, 3), torch or numpy, H and W multiples of 32 (`media.read_clip` makes them so), or a
        `media.FrameFile`; a T other than 4k + 1 is filled by repeating the last frame and cut again. A clip longer than
        `config.window` is edited in windows (sampler.py), the frames of one in memory. instruction: text. ref: uint8
        (H, W, 3) of any size, or a list of such. steps: of denoising, `config.steps` if not given; flow: their
        schedule. tile: latent pixels a side for the VAE on small cards. offload_to: a device to which each part is
        brought only while it works. progress(phase, done, total) is called as work goes on. ref_guidance: above 0,
        `config.ref_guidance` if not given; other than 1 it takes two forwards a step (`denoise`), one of them as if
        there were no reference, which weights for references alone cannot. sampler: how the steps are taken; by default
        Euler's, or, if steps are not given either, those of `config.re_noise`. mask: like video, (T, H, W) or
        (T, H, W, 3), white or true where it may change. Same seed, same result.
        ValueError where an argument does not fit.
        """
        tell, vae = progress or (lambda phase, done, total: None), self.config.vae
        video = video if isinstance(video, FrameFile) else torch.as_tensor(video).cpu()
        refs = [] if ref is None else list(ref) if isinstance(ref, (list, tuple)) else [ref]
        refs = [torch.as_tensor(picture).cpu() for picture in refs]
        guidance = self.config.ref_guidance if ref_guidance is None else ref_guidance
        sampler = sampler or Sampler(re_noise=self.config.re_noise if steps is None else ())
        steps = self.config.steps if steps is None else steps
        self.check_edit(video, refs, mask, steps, guidance)
        count, height, width = video.shape[:3]
        length = count + (1 - count) % vae.time_stride
        latent_frames = vae.latent_frames(length)
        spans = windows(latent_frames, vae.latent_frames(self.config.window))
        of_windows = lambda frames: window_frames(filled(frames, length), spans, vae.time_stride)
        part_of = lambda phase, i: lambda done, total: tell(phase, i * total + done, len(spans) * total)

        contexts, unshown = [], []
        with working_on(self.mllm, offload_to):
            for i, clip in enumerate(of_windows(video)):
                tell("understand", i, len(spans))
                contexts.append(self.mllm(instruction, clip, refs or None))
                unshown.append(self.mllm(instruction, clip) if refs and guidance != 1 else None)
            tell("understand", len(spans), len(spans))

        with working_on(self.vae, offload_to):
            clips = enumerate(of_windows(video))
            source = torch.cat([self.encode_frames(clip, tile, part_of("encode", i)) for i, clip in clips])
            pictures = [pad_reference(image, (height, width))[None] for image in refs]
            ref_latents = torch.cat([self.encode_frames(p, tile) for p in pictures], dim=2) if refs else None

        generator, stay = torch.Generator().manual_seed(seed), None
        shape = (1, source.shape[1], latent_frames, *source.shape[3:])
        draw = lambda: in_windows(torch.randn(shape, generator=generator), spans).to(source.device)
        noise = draw()
        if mask is not None:
            changes = [mask_latents(part, vae) for part in of_windows(mask)]
            stay = outside(torch.stack(changes).to(source.device), source.float(), noise)
        denoiser = tuple(part for name, part in self.named_children() if name not in ("vae", "mllm"))
        with working_on(denoiser, offload_to):
            latents = self.denoise(
                noise, contexts, source, ref_latents, steps, flow, partial(tell, "denoise"), unshown, guidance,
                sampler, stay, draw, spans,
            )  # fmt: skip

        with working_on(self.vae, offload_to):
            clips = (self.decode_fitting(z[None], tile, part_of("decode", i)) for i, z in enumerate(latents))
            frames = crossfaded(clips, spans, vae.time_stride)
            if mask is not None:
                frames = map(pasted, frames, filled(video, length), filled(mask, length))
            yield from islice(frames, count)

    def check_edit(self, video, refs, mask, steps, guidance):
        """ValueError where an argument of an edit does not fit."""
        unit, shape = self.config.pixel_grid, tuple(video.shape)
        if len(shape) != 4 or video.dtype != torch.uint8 or shape[-1] != 3 or not len(video):
            raise ValueError(f"video: expected uint8 (T, H, W, 3), got {video.dtype} {shape}")
        if shape[1] % unit or shape[2] % unit or not shape[1] * shape[2]:
            raise ValueError(f"frames of {shape[2]}x{shape[1]}: both must be multiples of {unit}; see media.fit_frames")
        for picture in refs:
            if picture.ndim != 3 or picture.dtype != torch.uint8 or picture.shape[-1] != 3 or not picture.numel():
                raise ValueError(f"ref: expected uint8 (H, W, 3) each, got {picture.dtype} {tuple(picture.shape)}")
        if mask is not None and tuple(mask.shape[:3]) != shape[:3]:
            raise ValueError(f"mask: {tuple(mask.shape)} does not fit the clip's {shape[:3]}")
        if steps < 1:
            raise ValueError(f"steps: {steps}, expected at least 1")
        if not 0 < guidance < math.inf:
            raise ValueError(f"ref_guidance: {guidance}, expected a number above 0")

    def encode_frames(self, frames, tile=None, on_chunk=None):
        """uint8 frames (T, H, W, 3) -> latents (1, z, 1 + (T-1)/4, h, w), on the VAE's device."""
        return self.vae.encode(frames.permute(3, 0, 1, 2)[None], tile, on_chunk=on_chunk)

    def decode_frames(self, latents, tile=None, on_chunk=None):
        """Latents (1, z, t, h, w) -> uint8 frames (4t - 3, H, W, 3) on the CPU; rounded, where the release cuts off."""
        pixels = self.vae.decode(latents, tile, on_chunk=on_chunk, out_device="cpu", levels=True)
        return pixels[0].permute(1, 2, 3, 0).contiguous()

    def decode_fitting(self, latents, tile, on_chunk):
        """`decode_frames`, in tiles where the card is too small: an edit needs most memory when its steps are done."""
        try:
            return self.decode_frames(latents, tile, on_chunk)
        except RuntimeError as error:
            if tile is not None or not is_out_of_memory(error):
                raise
        print("note: out of GPU memory: decoding once more, in tiles (tile=16), to the same result", file=sys.stderr)
        return self.decode_frames(latents, 16, on_chunk)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.bfloat16, base=None, qwen=None, ref_pad_first=False):
        """A model with weights, each tensor read straight to `device` in `dtype`, LoRA merged.

        path: a folder that `save` wrote; a folder in the released diffusers layout; a hub id of either; a released
        training checkpoint, one .safetensors (or a folder or hub id with that alone), which lies over `base` (Wan's
        DiT shards and VAE) and `qwen` (Qwen2.5-VL), folders or hub ids, by default the 5B's; or a run of train.py, a
        checkpoint of it or its .safetensors, which by default lies over what the run began with.
        ref_pad_first: it was trained with the references' tokens before the video's, which such a file does not say.
        FileNotFoundError, ValueError where something is missing, unexpected, damaged or of another size.
        """
        device = pick_device(device)
        config, files = read_weights(path, base, qwen)
        config = replace(config, ref_pad_first=ref_pad_first or config.ref_pad_first)
        model, missing = cls.with_weights(config, files, device, dtype)
        lost = [name for name in missing if name.startswith("mllm.")]
        if lost:
            raise ValueError(f"{path}: {listed('missing', lost)}")
        merge_lora(model)
        return model.eval()

    @classmethod
    def with_weights(cls, config, files, device, dtype=None):
        """A model with the weights of `files`, LoRA apart -> it and the names of additions that the files lack.

        Additions keep their constructors' values there. Weights of another `source` or encoder are left out, and named.
        ValueError where anything else is missing or left over.
        """
        model = cls(config, empty=True)
        files.device = device
        own, additions = model.state_dict().keys(), model.additions()
        foreign = ("source_embedder.",) if config.source != KiwiConfig.source else ()
        foreign += ("mllm.",) if config.mllm and config.mllm.encoder != MLLMConfig.encoder else ()
        left = sorted(name for name in files if name.startswith(foreign) and name not in own)
        if left:
            print(f"note: this model has no place for {listed('tensors of the weights', left, 3)}", file=sys.stderr)
            files.drop(left)
        missing = load_weights(model, files, partial=True, device=device, dtype=dtype)
        lost = [name for name in missing if name not in additions]
        if lost:
            raise ValueError(f"the weights are not complete: {listed('missing', lost)}")
        for parameter in additions.values():
            parameter.data = parameter.data.to(device, dtype)
        return model, missing

    def save(self, folder):
        """Write config.json, one safetensors per part, and the MLLM's config and tokenizer, to a folder.

        The folder appears when it is whole; an older one of the same name is replaced then. ValueError where something
        else has that name.
        """
        only_weights(folder)
        with whole_folder(folder) as temporary:
            config = {"format": "nanokiwi", **asdict(self.config)}
            if self.mllm is not None:
                config["mllm"]["folder"] = "mllm"
                (temporary / "mllm").mkdir()
                for file in self.mllm.files():
                    shutil.copyfile(file, temporary / "mllm" / file.name)
            (temporary / "config.json").write_text(json.dumps(config, indent=1))
            for name, part in self.named_children():
                state = {k: v.detach().cpu().contiguous() for k, v in part.state_dict(prefix=f"{name}.").items()}
                save_file(state, temporary / f"{name}.safetensors")


@contextmanager
def working_on(modules, device):
    """Bring modules to `device` for the block; after it their own tensors are back, uncopied. None: leave them."""
    if device is None:
        yield
        return
    modules = modules if isinstance(modules, tuple) else (modules,)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    home = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.to(device, non_blocking=True)
        yield
    finally:
        for t, data in zip(tensors, home):
            t.data = data


def read_weights(path, base=None, qwen=None, usual_base=WAN_BASE):
    """(KiwiConfig, TensorFiles) of weights in any layout; arguments as for `KiwiEdit.from_pretrained`, but a training
    checkpoint may also lie over a nanoKiwi or diffusers folder. path None: `base` and `qwen` alone, from which training
    starts. usual_base: where nothing says which."""
    fields, files = read_fields(path, base, qwen, usual_base)
    return from_dict(KiwiConfig, fields, path or base or usual_base), files


def read_for(config, path, frames=None, max_pixels=None, every_frame=False):
    """A clip file as weights of this config edit it: `media.read_clip`, at their size if they know one kind of clip
    only. every_frame: at the file's own frame rate, so that frame i of the edit is frame i of the file."""
    if config.trained is None:
        return read_clip(path, frames or 81, max_pixels or MAX_PIXELS, held=config.window)
    count, height, width, fps = config.trained
    size_of, rate = partial(nearest_size, grid=config.pixel_grid), None if every_frame else fps
    return read_clip(path, frames or count, max_pixels or height * width, rate, size_of, config.window)
