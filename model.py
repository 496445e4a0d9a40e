"""Kiwi-Edit: a video diffusion transformer that reads the request with a multimodal LLM.

    video, instruction, reference -> MLLMEncoder -> context (B, L, D)                  (connectors.py)
    video, reference -> VAE -> source latents (B, C, T, H, W), ref latents (B, C, R, H, W)     (vae.py)
    noise -> 50 Euler steps of `velocity` -> latents -> VAE -> the edited video                (dit.py)

`KiwiEdit.velocity` is the heart: what the paper adds to Wan (Section 4, Eq. 1) in a few lines. Around it stand
flow matching, the training loss, the sampler, and the loading of weights in every dialect they come in.
"""

import json
import math
import pickle
import re
import shutil
import sys
from collections import ChainMap
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from connectors import LoRALinear, MLLMConfig, MLLMEncoder, merge_lora, replace_modules
from dit import DiT, DiTConfig
from media import MAX_PIXELS, nearest_size, pad_reference, read_clip, whole_folder
from parallel import pick_device
from vae import VAE, VAEConfig

SOURCE_CONDITIONS = ("add_scaled", "add_learned", "add_unscaled", "add_shared_patch_embed", "channel_concat")
NO_EMBEDDER = ("add_shared_patch_embed", "channel_concat")  # of these the ones that need none of their own
WAN_BASE = "Wan-AI/Wan2.2-TI2V-5B"
HUB_BASES = {
    "wan22_5b": WAN_BASE,
    "wan21_14b": "Wan-AI/Wan2.1-T2V-14B",
    "wan21_1_3b": "Wan-AI/Wan2.1-T2V-1.3B",
    "nano": WAN_BASE,
}
QWEN_BASE = "Qwen/Qwen2.5-VL-3B-Instruct"


@dataclass(frozen=True)
class KiwiConfig:
    """The parts, and the two choices about how they meet. `vae` and `mllm` None: the denoiser alone.

    source: how the source latents enter (paper, Table 4; of a forward `KiwiEdit.inject` alone reads it).
    ref_pad_first: reference tokens before the video's, as one released checkpoint has them, or after.
    trained: (frames, height, width, frames a second) of the one kind of clip that the weights know. None: many sizes.
    steps: denoising steps of an edit for which no other number is given.
    ref_guidance: likewise how far references are followed (`KiwiEdit.denoise`); 1, as the release has it: as trained.
    """

    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig | None = None
    mllm: MLLMConfig | None = None
    source: str = "add_scaled"
    ref_pad_first: bool = False
    trained: tuple[int, int, int, int] | None = None
    steps: int = 50
    ref_guidance: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"KiwiConfig.steps: {self.steps}, expected at least 1")
        if not 0 < self.ref_guidance < math.inf:
            raise ValueError(f"KiwiConfig.ref_guidance: {self.ref_guidance}, expected a number above 0")
        object.__setattr__(self, "trained", self.trained and tuple(self.trained))  # a list in JSON
        if self.trained is not None and (len(self.trained) != 4 or min(self.trained) < 1):
            raise ValueError(f"KiwiConfig.trained: {self.trained!r}, expected frames, height, width, frames a second")
        if self.source not in SOURCE_CONDITIONS:
            raise ValueError(f"KiwiConfig.source: {self.source!r}, expected one of {', '.join(SOURCE_CONDITIONS)}")

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
        # just below 112x112 the MLLM sees a 64x64 frame of a video at 84x84, in 9 tokens (a picture in 4); else at 336x336
        MLLMConfig("weights/nano/mllm", 256, 16, 32, 48, max_ref_tokens=48, max_frames=4, max_pixels=112 * 112 - 1),
    ),
}


@dataclass(frozen=True)
class FlowMatch:
    """Flow matching: x_t = (1 - sigma) x0 + sigma noise, the model predicts noise - x0, t = 1000 sigma.

    shift moves the schedule towards noise: sigma -> shift sigma / (1 + (shift - 1) sigma). sigma_min is where the
    unshifted schedule would end after its last step; the released diffusers pipeline has 0.003 / 1.002 there, the
    released training and inference 0.
    weighting: of the training loss over t. "bell" is the release's (`training_sigmas`), "none" takes all timesteps alike.
    """

    shift: float = 5.0
    sigma_min: float = 0.0
    weighting: str = "bell"

    def __post_init__(self):
        if self.weighting not in ("bell", "none"):
            raise ValueError(f"FlowMatch.weighting: {self.weighting!r}, expected bell or none")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"FlowMatch.shift: {self.shift}, expected a number above 0")

    def sigmas(self, steps):
        """(steps + 1,) float32, from 1 down to a final 0."""
        sigma = torch.linspace(1, self.sigma_min, steps + 1)[:-1]
        return torch.cat([self.shift * sigma / (1 + (self.shift - 1) * sigma), torch.zeros(1)])

    def timesteps(self, steps):
        """(steps,) float32 in (0, 1000]."""
        return 1000 * self.sigmas(steps)[:-1]

    def training_sigmas(self, t):
        """For timesteps t (B,): sigma (B,) and loss weight (B,) of the nearest of the 1000 training steps.

        The weight is a bell over t around 500, lowered until its smallest value is 0, with a mean of 1. So t = 1000,
        where an edit of few steps makes up its mind, weighs nothing: "none" is for weights that edit in few steps.
        """
        timesteps = self.timesteps(1000).to(t.device)
        bell = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
        weight = (bell - bell.min()) / (bell - bell.min()).mean()
        if self.weighting == "none":
            weight = torch.ones_like(weight)
        nearest = (t.float()[:, None] - timesteps).abs().argmin(dim=1)
        return timesteps[nearest] / 1000, weight[nearest]


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


class PatchEmbedder(nn.Module):
    """A patch embedding of its own for source or reference latents; zero, so that training starts from Wan."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_embedding = nn.Conv3d(config.out_dim, config.dim, config.patch_size, config.patch_size)
        nn.init.zeros_(self.patch_embedding.weight)
        nn.init.zeros_(self.patch_embedding.bias)

    def forward(self, latents):
        return self.patch_embedding(latents)


class KiwiEdit(nn.Module):
    """The whole model. Parts: dit, source_embedder, ref_embedder and, unless the config leaves them out, vae, mllm."""

    def __init__(self, config: KiwiConfig):
        super().__init__()
        self.config = config
        dit = config.dit
        if config.source == "channel_concat":
            dit = replace(dit, in_dim=2 * dit.in_dim)
        self.dit = DiT(dit)
        if config.source not in NO_EMBEDDER:
            self.source_embedder = PatchEmbedder(config.dit)
        if config.source == "add_learned":
            self.source_scale = nn.Linear(dit.dim, 1)
            nn.init.zeros_(self.source_scale.weight)
            nn.init.zeros_(self.source_scale.bias)
        self.ref_embedder = PatchEmbedder(config.dit)
        self.vae = VAE(config.vae) if config.vae else None
        self.mllm = MLLMEncoder(config.mllm) if config.mllm else None

    @property
    def dtype(self):
        return self.dit.patch_embedding.weight.dtype

    def inject(self, x, t, source):
        """Noisy latents and source latents -> tokens (B, D, T, H/2, W/2): paper, Section 4.1, Eq. 1.

        tokens = patch(x) + s(t) * patch_source(source); the release has s(t) = sigma(t) = t / 1000.
        """
        how, patch = self.config.source, self.dit.patch_embedding
        if how == "channel_concat":
            return patch(torch.cat([x, torch.zeros_like(x) if source is None else source], dim=1))
        if source is None:
            return patch(x)
        embedder = patch if how == "add_shared_patch_embed" else self.source_embedder
        scale = t / 1000  # float32, as in the release: sigma in bfloat16 would be off by up to 0.2 %
        if how == "add_learned":  # a learnable scalar of the timestep that starts out as sigma(t)
            scale = scale + self.source_scale(self.dit.embed_time(t)[0])[:, 0]
        if how == "add_unscaled":
            scale = torch.ones_like(t)
        return patch(x) + (embedder(source) * scale.view(-1, 1, 1, 1, 1)).to(x.dtype)

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
        if balance and source is None:
            raise ValueError("balance: which places are kept is told by the source; there is none")
        places = balance_weights(latents, source) if balance else 1
        noisy, source, ref = (
            z if z is None else z.to(self.dtype) for z in ((1 - s) * latents + s * noise, source, ref)
        )
        prediction = self.velocity(noisy, t, context, source, ref)
        error = places * (prediction.float() - (noise - latents).float()).square()
        return (weight * error.flatten(1).mean(dim=1)).mean()

    def forward(
        self, requests, latents, t, source=None, ref=None, noise=None, flow=FlowMatch(), balance=False, apart=False
    ):
        """The training loss of a batch: `training_loss` on what the MLLM makes of the requests (`MLLMEncoder.prepare`).

        Contexts with references differ in length and are not padded: equal ones go together. apart: one by one, where
        several ranks train with references, for sharded ranks must call the blocks equally often.
        """
        contexts = self.mllm.encode(requests)
        groups = {}
        for i, context in enumerate(contexts):
            groups.setdefault(i if apart else context.shape[1], []).append(i)
        loss = 0
        for rows in groups.values():
            x, at, *rest = (z if z is None else z[rows] for z in (latents, t, source, ref, noise))
            context = torch.cat([contexts[i] for i in rows])
            loss = loss + len(rows) / len(t) * self.training_loss(x, context, at, *rest, flow, balance)
        # What this kind of data does not use gets a gradient of zero: all ranks must reduce the same parameters.
        additions = [p for name, p in self.named_parameters() if not name.startswith(("dit.", "vae.", "mllm.model."))]
        return loss + 0 * sum(p.float().sum() for p in additions if p.requires_grad)

    @torch.no_grad()
    def denoise(
        self,
        noise,
        context,
        source=None,
        ref=None,
        steps=50,
        flow=FlowMatch(),
        on_step=None,
        unshown=None,
        guidance=1.0,
    ):
        """Euler steps from noise (B, C, T, H, W), float32, to latents. One forward a step: Kiwi-Edit has no
        classifier-free guidance. The latents stay float32 between the steps (the release keeps them in bfloat16).

        unshown: the context of the same request without its references, for a second forward a step without them: the
        velocity is then v_unshown + guidance (v - v_unshown), as InstructPix2Pix has it of its picture (arXiv
        2211.09800, Eq. 3); above 1 the edit is more like the references, and less like what it was trained to be.
        """
        context, unshown, source, ref = (z if z is None else z.to(self.dtype) for z in (context, unshown, source, ref))
        if not hasattr(self.dit.blocks[0], "unshard"):  # a sharded block has its weights only while it is called
            context, unshown = (z if z is None else self.dit.context_keys_values(z) for z in (context, unshown))
        sigmas = flow.sigmas(steps)
        timesteps = (1000 * sigmas).to(noise.device)
        x = noise.float()
        for i, step in enumerate((sigmas[1:] - sigmas[:-1]).tolist()):
            now = x.to(self.dtype), timesteps[i].expand(len(x))
            v = self.velocity(*now, context, source, ref).float()
            if unshown is not None:
                v = torch.lerp(self.velocity(*now, unshown, source).float(), v, guidance)
            x = x + step * v
            on_step and on_step(i + 1, steps)
        return x

    @torch.no_grad()
    def edit(
        self, video, instruction, ref=None, steps=None, seed=0, flow=FlowMatch(), tile=None, offload_to=None,
        progress=None, ref_guidance=None,
    ):  # fmt: skip
        """Edit a clip.

        video: uint8 (T, H, W, 3), torch or numpy, H and W multiples of 32 (`media.read_clip` makes them so); a T other
        than 4k + 1 is filled by repeating the last frame and cut again. instruction: text. ref: uint8 (H, W, 3) of
        any size, or a list of such. steps: of denoising, `config.steps` if not given. flow: their schedule. tile: latent pixels a side for
        the VAE on small cards. offload_to: a device to which each part is brought only while it works.
        progress(phase, done, total) is called as work goes on. ref_guidance: above 0, `config.ref_guidance` if not
        given; other than 1 it takes two forwards a step (`denoise`), one of them as if there were no reference, which
        weights for references alone cannot. Same seed, same result.
        -> uint8 torch (T, H, W, 3), on the CPU. ValueError where an argument does not fit.
        """
        tell = progress or (lambda phase, done, total: None)
        video = torch.as_tensor(video).cpu()
        refs = (
            []
            if ref is None
            else [torch.as_tensor(r).cpu() for r in (ref if isinstance(ref, (list, tuple)) else [ref])]
        )
        unit = self.config.pixel_grid
        if video.ndim != 4 or video.dtype != torch.uint8 or video.shape[-1] != 3 or not len(video):
            raise ValueError(f"video: expected uint8 (T, H, W, 3), got {video.dtype} {tuple(video.shape)}")
        count, height, width = video.shape[:3]
        if height % unit or width % unit or not height * width:
            raise ValueError(f"frames of {width}x{height}: both must be multiples of {unit}; see media.fit_frames")
        guidance = self.config.ref_guidance if ref_guidance is None else ref_guidance
        if not 0 < guidance < math.inf:
            raise ValueError(f"ref_guidance: {guidance}, expected a number above 0")
        for picture in refs:
            if picture.ndim != 3 or picture.dtype != torch.uint8 or picture.shape[-1] != 3 or not picture.numel():
                raise ValueError(f"ref: expected uint8 (H, W, 3) each, got {picture.dtype} {tuple(picture.shape)}")
        steps = self.config.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps: {steps}, expected at least 1")
        padding = (1 - count) % self.config.vae.time_stride
        video = torch.cat([video, video[-1:].expand(padding, -1, -1, -1)])

        tell("understand", 0, 1)
        with working_on(self.mllm, offload_to):
            context = self.mllm(instruction, video, refs or None)
            unshown = self.mllm(instruction, video) if refs and guidance != 1 else None
        tell("understand", 1, 1)

        with working_on(self.vae, offload_to):
            source = self.encode_frames(video, tile, partial(tell, "encode"))
            pictures = [pad_reference(image, (height, width))[None] for image in refs]
            ref_latents = torch.cat([self.encode_frames(p, tile) for p in pictures], dim=2) if refs else None

        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(source.device)
        denoiser = tuple(part for name, part in self.named_children() if name not in ("vae", "mllm"))
        with working_on(denoiser, offload_to):
            told = partial(tell, "denoise")
            latents = self.denoise(noise, context, source, ref_latents, steps, flow, told, unshown, guidance)
        if not latents.isfinite().all():
            raise ValueError(f"the edit's numbers overflowed in {str(self.dtype)[6:]}: take bfloat16 or float32")

        with working_on(self.vae, offload_to):
            return self.decode_fitting(latents, tile, partial(tell, "decode"))[:count]

    def encode_frames(self, frames, tile=None, on_chunk=None):
        """uint8 frames (T, H, W, 3) -> latents (1, z, 1 + (T-1)/4, h, w), on the VAE's device."""
        return self.vae.encode(frames.permute(3, 0, 1, 2)[None], tile, on_chunk=on_chunk)

    def decode_frames(self, latents, tile=None, on_chunk=None):
        """Latents (1, z, t, h, w) -> uint8 frames (4t - 3, H, W, 3) on the CPU; rounded, where the release cuts off."""
        pixels = self.vae.decode(latents, tile, on_chunk=on_chunk, out_device="cpu", levels=True)
        return pixels[0].permute(1, 2, 3, 0).contiguous()

    def decode_fitting(self, latents, tile, on_chunk):
        """`decode_frames`, and in tiles where the card is too small: an edit needs most memory when all its steps are done."""
        try:
            return self.decode_frames(latents, tile, on_chunk)
        except RuntimeError as error:  # cuDNN swallows the OutOfMemoryError of a convolution's workspace
            if tile is not None or not is_out_of_memory(error):
                raise
        print("note: out of GPU memory: decoding once more, in tiles (tile=16), to the same result", file=sys.stderr)
        return self.decode_frames(latents, 16, on_chunk)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.bfloat16, base=None, qwen=None, ref_pad_first=False):
        """A model with weights, each tensor read straight to `device` in `dtype`, LoRA merged.

        path: a folder that `save` wrote; a folder in the released diffusers layout; a hub id of either; a released
        training checkpoint, one .safetensors (or a folder or hub id with that alone), which lies over `base` (Wan's DiT
        shards and VAE) and `qwen` (Qwen2.5-VL), folders or hub ids both, by default those of the 5B; or a run of train.py,
        a checkpoint of it or its .safetensors, which by default lies over what the run began with.
        ref_pad_first: it was trained with the references' tokens before the video's, which such a file does not say.
        FileNotFoundError, ValueError where something is missing, unexpected, damaged or of another size, or no such device.
        """
        device = pick_device(device)
        config, files = read_weights(path, base, qwen)
        config = replace(config, ref_pad_first=ref_pad_first or config.ref_pad_first)
        with meta_parameters():
            model = cls(config)
        files.device = device
        missing = load_weights(model, widened(files, model), partial=True, device=device, dtype=dtype)
        start_untrained(model, missing, device, dtype, path)
        move_buffers(model, device)
        merge_lora(model)
        return model.eval()

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
                for name in ("config.json", "qwen_config.json", "tokenizer.json"):
                    if (file := Path(self.config.mllm.folder) / name).is_file():
                        shutil.copyfile(file, temporary / "mllm" / name)
            (temporary / "config.json").write_text(json.dumps(config, indent=1))
            for name, part in self.named_children():
                state = {k: v.detach().cpu().contiguous() for k, v in part.state_dict(prefix=f"{name}.").items()}
                save_file(state, temporary / f"{name}.safetensors")


def is_out_of_memory(error):
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "unable to find an engine" in str(error)
        or "out of memory" in str(error)
    )


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


# Released spellings and ours. The first that matches is applied, then the next, on whole dotted names; ours match none.
DIALECTS = [(re.compile(pattern), ours) for pattern, ours in (
    # training checkpoints
    (r"^pipe\.", ""),
    (r"^vae_condition\.", "source_embedder."),
    (r"^ref_vae_condition\.", "ref_embedder."),
    (r"(^|\.)connetor\.", r"\1connector."),
    (r"_queries\.q$", "_queries"),
    (r"^(mllm\.)?model\.model\.", r"\1model."),
    (r"^vae\.model\.", "vae."),
    (r"^model\.(encoder|decoder|conv1|conv2)\.", r"\1."),
    # Qwen2.5-VL as published
    (r"^(mllm\.)?visual\.", r"\1model.visual."),
    (r"^(mllm\.)?model\.(layers|embed_tokens|norm)\.", r"\1model.language_model.\2."),
    # the diffusers layout's transformer
    (r"^(dit\.)?condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1\2_embedding.0."),
    (r"^(dit\.)?condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1\2_embedding.2."),
    (r"^(dit\.)?condition_embedder\.time_proj\.", r"\1time_projection.1."),
    (r"^(dit\.)?proj_out\.", r"\1head.head."),
    (r"^(dit\.)?scale_shift_table$", r"\1head.modulation"),
    (r"^((?:dit\.)?blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^((?:dit\.)?blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"^((?:dit\.)?blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^((?:dit\.)?blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"^((?:dit\.)?blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"^((?:dit\.)?blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
)]  # fmt: skip


def our_name(name):
    """A parameter's name in any released dialect -> ours. None: accounted for and not needed (the tied lm_head)."""
    if name.endswith("lm_head.weight"):
        return None
    for pattern, ours in DIALECTS:
        name = pattern.sub(ours, name)
    return name


RELEASED = [(re.compile(pattern), theirs) for pattern, theirs in (
    (r"^source_embedder\.", "vae_condition."),
    (r"^ref_embedder\.", "ref_vae_condition."),
    (r"^mllm\.connector\.", "mllm.connetor."),
    (r"^(mllm\.\w+_queries)$", r"\1.q"),
    (r"^mllm\.model\.", "mllm.model.model."),
)]  # fmt: skip


def released_name(name):
    """The way back: our name of a parameter -> its name in a released training checkpoint."""
    for pattern, theirs in RELEASED:
        name = pattern.sub(theirs, name)
    return name


def load_weights(module, state_dict, partial=False, device=None, dtype=None):
    """Put a state dict in any released dialect into a module; every name is accounted for.

    module: DiT, VAE, MLLMEncoder or KiwiEdit; parameters on the meta device are replaced by the tensors, on `device`
    in `dtype` where given, others are filled. LoRA tensors inject LoRA where the module has none.
    state_dict: a mapping from names to tensors, read one at a time.
    partial: names may be missing, as in a checkpoint of the trained parameters alone. -> the missing names.
    ValueError that lists missing, unexpected and misshapen names.
    """
    names = {}
    for name in state_dict:
        ours = our_name(name)
        if ours in names:
            raise ValueError(f"two names for {ours}: {names[ours]} and {name}")
        if ours is not None:
            names[ours] = name
    adopt_lora(module, {ours: state_dict[name].shape for ours, name in names.items() if ".lora_A." in ours})
    own = module.state_dict(keep_vars=True)
    missing = sorted(own.keys() - names.keys())
    unexpected = sorted(names[n] for n in names.keys() - own.keys())
    if unexpected or (missing and not partial):
        raise ValueError(f"weights do not fit {type(module).__name__}: {listed('missing', missing * (not partial))}"
                         f"{listed('unexpected', unexpected)}")  # fmt: skip
    misshapen = []
    for ours, name in names.items():
        value = state_dict[name]
        if value.shape != own[ours].shape:
            misshapen.append(f"{name} {tuple(value.shape)}, expected {tuple(own[ours].shape)}")
        elif own[ours].is_meta:
            set_parameter(module, ours, value.to(device=device, dtype=dtype or value.dtype))
        else:
            with torch.no_grad():
                own[ours].copy_(value)
    if misshapen:
        raise ValueError(f"weights do not fit {type(module).__name__}: {listed('of another size', misshapen)}")
    return missing


def adopt_lora(module, shapes):
    """Inject LoRA of the rank a checkpoint has, exactly where it has it."""
    ranks = {name.split(".lora_A.")[0]: shape[0] for name, shape in shapes.items()}

    def with_lora(name, child):
        return LoRALinear(child, ranks[name]) if name in ranks and type(child) is nn.Linear else None

    replace_modules(module, with_lora)


def set_parameter(module, name, value):
    """Replace a parameter, which may be on the meta device."""
    parent, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=module.get_parameter(name).requires_grad)
    setattr(module.get_submodule(parent), leaf, parameter)


def listed(what, names, show=12):
    if not names:
        return ""
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return f"{len(names)} {what}: {', '.join(names[:show])}{more}. "


def start_untrained(model, missing, device, dtype, path):
    """Give the additions that a checkpoint of an earlier stage lacks their initial value, zero; the rest must exist."""
    additions = ("source_embedder.", "ref_embedder.", "source_scale.")
    lost = [name for name in missing if not name.startswith(additions)]
    if lost:
        raise ValueError(f"{path}: {listed('missing', lost)}")
    for name in missing:
        set_parameter(model, name, torch.zeros_like(model.get_parameter(name), device=device, dtype=dtype))


def move_buffers(model, device):
    """Rotary tables and the like, which no file holds and which were made on the CPU: not every release of transformers
    moves them to where they are used."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


@contextmanager
def meta_parameters():
    """Modules made in this block have their parameters on the meta device: nothing is allocated or initialised.

    Unlike torch.device("meta") it leaves buffers alone: transformers' rotary tables are in no checkpoint, and would
    stay on the meta device in silence.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self, name, parameter):
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class TensorFiles(Mapping):
    """The tensors of several files under one roof: names to tensors, read when asked for, straight to `device`."""

    def __init__(self, *paths):
        self.device = "cpu"
        self.places = {}  # name -> (path, name in the file)
        self.handles = {}
        for path in paths:
            self.add(path)

    def add(self, path, prefix="", over=False):
        """Add a .safetensors or .pth file; `prefix` goes before its names. Names that are there already stay, or, with
        `over`, give way."""
        for name in self.open(path, "cpu").keys():
            ours = our_name(prefix + name)
            if ours is not None and (over or ours not in self.places):
                self.places[ours] = (path, name)

    def open(self, path, device):
        if (path, device) not in self.handles:
            self.handles[path, device] = open_tensors(path, device)
        return self.handles[path, device]

    def __getitem__(self, name):
        path, inner = self.places[name]
        file = self.open(path, str(self.device))
        return file.get_tensor(inner) if hasattr(file, "get_tensor") else file[inner]

    def shape(self, name):
        path, inner = self.places[name]
        file = self.open(path, "cpu")
        return tuple(file.get_slice(inner).get_shape() if hasattr(file, "get_slice") else file[inner].shape)

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)


def open_tensors(path, device):
    """Open a .safetensors file, or a .pth of tensors alone, mapped and not read. ValueError if it is damaged."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt", device=device)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("holds more than tensors")
        return state
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path}: cannot be read ({reason}); fetch the file again") from None


def only_weights(folder, also=()):
    """ValueError where a folder that is to be replaced by weights holds anything but weights of ours, and `also`."""
    folder = Path(folder)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        path = folder / "config.json"
        if not path.is_file() or read_config(path).get("format") != "nanokiwi":
            raise ValueError(f"{folder}: is there and not weights of ours; it would be replaced: give another name")
        known = ("config.json", "mllm", *also)
        other = sorted(p.name for p in folder.iterdir() if p.name not in known and p.suffix != ".safetensors")
        if other:
            raise ValueError(
                f"{folder}: holds {', '.join(other)} beside weights of ours and would be replaced: give another name"
            )


def read_for(config, path, frames=None, max_pixels=None, every_frame=False):
    """A clip file as weights of this config edit it: `media.read_clip`, and of one kind of clip for weights that know no
    other. every_frame: at the file's own frame rate, so that frame i of the edit is frame i of the file."""
    if config.trained is None:
        return read_clip(path, frames or 81, max_pixels or MAX_PIXELS)
    count, height, width, fps = config.trained
    size_of = partial(nearest_size, grid=config.pixel_grid)
    return read_clip(path, frames or count, max_pixels or height * width, None if every_frame else fps, size_of)


def local_path(path):
    """A path as it is; a hub id ("linyq/kiwi-edit-5b-instruct-only-diffusers") is downloaded, or found in the cache."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder; give one, or a hub id such as {QWEN_BASE}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.txt", "*.safetensors", "*VAE.pth"]))
    except Exception as error:  # the hub client raises many kinds, from DNS to gated repositories
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{path}: no such folder, and not to be had from the hub ({reason})") from None


def read_config(path):
    """The fields of a JSON object. ValueError where it is another thing."""
    if isinstance(values := read_json(path), dict):
        return values
    raise ValueError(f"{path}: expected a JSON object")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the weights folder is not complete") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None


def tensor_files(folder, *patterns):
    """The weight files of a folder that match the patterns. FileNotFoundError if there are none."""
    found = sorted(
        p for pattern in patterns for p in folder.glob(pattern) if not p.name.startswith(".")
    )  # half written
    if not found:
        raise FileNotFoundError(f"{folder}: has no {' or '.join(patterns)}; the weights folder is not complete")
    wanted = {
        name for index in folder.glob("*.safetensors.index.json") for name in read_json(index)["weight_map"].values()
    }
    absent = sorted(name for name in wanted if not (folder / name).is_file())
    if absent:
        raise FileNotFoundError(f"{folder}: {', '.join(absent)} is missing; the weights folder is not complete")
    return found


def from_dict(cls, values, where):
    """A config dataclass from JSON; an unknown key is an error that names it."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected the fields of {cls.__name__}, got {values!r}")
    unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)} in {cls.__name__}")
    try:
        return cls(**values)
    except TypeError as error:  # a text where a number belongs
        raise ValueError(f"{where}: {cls.__name__}: {error}") from None


def read_weights(path, base=None, qwen=None, usual_base=WAN_BASE):
    """Config and files of weights in any layout; arguments as for `KiwiEdit.from_pretrained`, but a training checkpoint
    may also lie over a nanoKiwi or diffusers folder. path None: `base` and `qwen` alone, from which training starts.
    usual_base: where nothing says which."""
    path = local_path(path) if path else None
    checkpoint = find_checkpoint(path) if path else None
    if checkpoint and path.is_dir():
        path = checkpoint / "weights.safetensors"
    elif path and path.is_dir():
        path = single_file(path)
    if path is None or path.is_file():
        path and open_tensors(path, "cpu")  # a file that is none of weights is told of before a base is fetched
        base = None if checkpoint and base is None else local_path(base or usual_base)
        if base and is_wan(base):
            config, files = read_training_checkpoint(path, base, local_path(qwen or QWEN_BASE))
        else:
            config, files = read_weights(base, qwen=qwen) if base else read_beginning(checkpoint.parent, qwen)
            if path:
                files.add(path, over=True)
                trained = {name: count for name, count in mllm_sizes(files).items() if count}
                config = replace(config, mllm=config.mllm and replace(config.mllm, **trained))
        return (as_trained(config, checkpoint, files) if checkpoint else config), files
    if base or qwen:
        raise ValueError(f"{path} is whole: --base and --qwen go with a .safetensors or a run of train.py")
    if (path / "transformer").is_dir():
        return read_diffusers_folder(path)
    if (path / "config.json").is_file():
        return read_own_folder(path)
    raise FileNotFoundError(f"{path}: neither a nanoKiwi folder (config.json) nor a diffusers one (transformer/)")


def single_file(folder):
    """The one .safetensors that is all a folder has of weights, as a released training checkpoint comes from the hub; else
    the folder."""
    found = sorted(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 and not (folder / "config.json").is_file() else folder


def is_wan(folder):
    """Whether a folder is Wan's own release, which is no whole Kiwi-Edit."""
    return not (folder / "transformer").is_dir() and read_config(folder / "config.json").get("format") != "nanokiwi"


def began_with(run):
    """The arguments of a run of train.py. Paths of what it began with are from where the run lies, so that they are found
    from any folder; what was no path stays as it was typed."""
    config = read_config(run / "config.json")
    return config["args"] | {name: str((run / path).resolve()) for name, path in config.get("began", {}).items()}


def read_beginning(run, qwen=None):
    """Config and files of what a run of train.py began with."""
    began = began_with(run)
    if began["init"] == "random":
        return read_weights(run / "init")
    base = HUB_BASES[began["config"]]
    try:
        return read_weights(began["weights"], began["base"], qwen or began["qwen"], base)
    except FileNotFoundError as error:
        begun = began["weights"] or began["base"] or base
        raise FileNotFoundError(
            f"{run} began with {begun}, which is not here ({error}); --base, or --qwen, says where it is"
        ) from None


def valid_checkpoints(run):
    """The checkpoint folders of a run, oldest first. One of another name, such as step-000500-good, is its owner's: it is
    neither the last nor too old."""
    needed = ("weights.safetensors", "train.json", "state/.metadata")
    named = [p for p in run.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return [p for p in sorted(named, key=step_of) if all((p / name).is_file() for name in needed)]


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(path):
    """The checkpoint that a run's folder, a checkpoint's own or a file in it stands for; None if it is none of ours."""
    path = path.absolute()
    folder = path.parent if path.is_file() else path
    if (folder / "train.json").is_file():
        return folder
    if (path / "config.json").is_file() and read_config(path / "config.json").get("format") == "nanokiwi run":
        found = valid_checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path}: this run has no checkpoint yet")
        return found[-1]
    return None


def as_trained(config, checkpoint, files=None):
    """The config of a checkpoint's run (`--set model.source=... dit...`), with the VAE, the MLLM's folder and the query
    counts of `config`, which is what there is where that is no run of ours. files: lose what another way to inject the
    source has no place for."""
    path = Path(checkpoint).absolute().parent / "config.json"
    values = read_config(path) if path.is_file() else {}
    if values.get("format") != "nanokiwi run":
        return config
    run = config_of(asdict(config) | values["model"], path)  # what an older run did not know is as it was
    if files is not None:
        leave_out_source(files, run.source)
    own = ("folder", "num_image_queries", "num_video_queries", "num_ref_queries")
    return replace(run, vae=config.vae, mllm=replace(run.mllm, **{name: getattr(config.mllm, name) for name in own}))


def leave_out_source(files, how):
    """Drop from the files what a way to inject the source (paper, Table 4) has no place for."""
    lost = ("source_embedder.",) * (how in NO_EMBEDDER) + ("source_scale.",) * (how != "add_learned")
    files.places = {name: place for name, place in files.places.items() if not name.startswith(lost)}


def widened(files, model):
    """The files for this model: where they have but half of the patch embedding of channel concatenation (paper, Table 4),
    zeros stand for the source's channels."""
    name = "dit.patch_embedding.weight"
    if name not in files or 2 * files.shape(name)[1] != model.dit.patch_embedding.weight.shape[1]:
        return files
    return ChainMap({name: torch.cat([files[name], torch.zeros_like(files[name])], dim=1)}, files)


def config_of(values, path):
    """A KiwiConfig from what `asdict` made of one and `path` keeps. ValueError for an unknown key."""
    parts = (("dit", DiTConfig), ("vae", VAEConfig), ("mllm", MLLMConfig))
    parts = {name: from_dict(cls, values[name], path) for name, cls in parts if values.get(name)}
    return from_dict(KiwiConfig, {**values, **parts}, path)


def read_own_folder(folder):
    values = read_config(folder / "config.json")
    if values.pop("format", None) != "nanokiwi":
        raise ValueError(f"{folder}/config.json: not written by KiwiEdit.save")
    config = config_of(values, folder / "config.json")
    if config.mllm:
        inner = (folder / config.mllm.folder).resolve()
        if folder.resolve() not in inner.parents:
            raise ValueError(f"{folder}/config.json: mllm.folder leads out of the weights folder")
        config = replace(config, mllm=replace(config.mllm, folder=str(inner)))
    return config, TensorFiles(*tensor_files(folder, "*.safetensors"))


def read_diffusers_folder(folder):
    """Config and files of linyq/kiwi-edit-5b-*-diffusers."""
    files = TensorFiles()
    files_of = {"transformer": "dit.", "vae": "vae.", "source_embedder": "source_embedder.", "mllm_encoder": "mllm."}
    if any(
        (folder / "ref_embedder").glob("*.safetensors")
    ):  # instruct-only weights come without, if maybe with its config
        files_of["ref_embedder"] = "ref_embedder."
    configs = {name: read_config(folder / name / "config.json") for name in files_of}
    for name, prefix in files_of.items():
        for path in tensor_files(folder / name, "*.safetensors"):
            files.add(path, prefix)
    t, v, m = configs["transformer"], configs["vae"], configs["mllm_encoder"]
    dit = DiTConfig(
        dim=t["num_attention_heads"] * t["attention_head_dim"], ffn_dim=t["ffn_dim"], num_heads=t["num_attention_heads"],
        num_layers=t["num_layers"], in_dim=t["in_channels"], out_dim=t["out_channels"], freq_dim=t["freq_dim"],
        text_dim=t["text_dim"], patch_size=t["patch_size"], eps=t["eps"], bf16_timesteps=True,
    )  # fmt: skip
    sizes = mllm_sizes(files) | {"max_ref_tokens": m["max_object_token"], "max_frames": m["max_frames"]}
    mllm = MLLMConfig(str(folder / "processor"), m["dit_dim"], max_pixels=m["max_pixels_per_frame"], **sizes)
    vae = vae_config(files, v.get("latents_mean", ()), v.get("latents_std", ()))
    pad_first = configs.get("ref_embedder", {}).get("ref_pad_first", False)
    return KiwiConfig(dit, vae, mllm, ref_pad_first=pad_first), files


def read_training_checkpoint(path, base, qwen):
    """Config and files of a released training checkpoint over the weights it was trained from."""
    files = TensorFiles()
    path and files.add(path)
    wan = read_config(base / "config.json")
    known = {k: v for k, v in wan.items() if k in DiTConfig.__dataclass_fields__}
    for shard in tensor_files(base, "diffusion_pytorch_model*.safetensors"):
        files.add(shard, "dit.")
    files.add(tensor_files(base, "Wan2.*_VAE.safetensors", "Wan2.*_VAE.pth")[0], "vae.")
    for shard in tensor_files(qwen, "model*.safetensors"):
        files.add(shard, "mllm.")
    dit = DiTConfig(**known, bf16_timesteps=True)
    sizes = mllm_sizes(files)
    sizes["max_ref_tokens"] = sizes["num_ref_queries"]  # so it is in every release: 768 of 5B, 384 of 14B
    return KiwiConfig(dit, vae_config(files), MLLMConfig(str(qwen), dit_dim=dit.dim, **sizes)), files


def mllm_sizes(files):
    """The query counts that the weights have; 0 for a mode that was not trained yet."""
    names = {mode: f"mllm.{mode}_queries" for mode in ("image", "video", "ref")}
    return {f"num_{mode}_queries": files.shape(name)[0] if name in files.places else 0 for mode, name in names.items()}


def vae_config(files, mean=(), std=()):
    """The sizes of a Wan VAE, read off its tensors: Wan's VAE files come without a config."""
    try:
        dim, pixels = files.shape("vae.encoder.conv1.weight")[:2]
        version = {12: "2.2", 3: "2.1"}[pixels]
        top = files.shape("vae.encoder.head.0.gamma")[0]
        resampled = [n for n in files.places if re.fullmatch(r"vae\.encoder\.downsamples\..*resample\.1\.weight", n)]
        resampled.sort(key=lambda n: [int(part) for part in n.split(".") if part.isdigit()])
        dims = [files.shape(n)[0] for n in resampled] + [top]
        in_time = tuple(n.replace("resample.1", "time_conv") in files.places for n in resampled)
        blocks = int(resampled[0].split(".")[-4])
        return VAEConfig(
            version, dim, files.shape("vae.decoder.head.0.gamma")[0], files.shape("vae.conv2.weight")[0],
            tuple(d // dim for d in dims), blocks, in_time, tuple(mean), tuple(std),
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"the VAE's weights are not those of Wan: {error} is missing or of another size") from None
