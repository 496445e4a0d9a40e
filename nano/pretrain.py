"""Stand-ins for what Kiwi-Edit starts from, trained from nothing on the world's clips, in pieces that resume.

vae   reconstruction of clips and stills               -> vae.pt      (Wan's VAE)
mllm  captions, what an instruction asks for, places   -> mllm.pt     (Qwen2.5-VL)
dit   captions to clips by flow matching               -> dit.pt      (Wan's text-to-video DiT), weights/
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from connectors import MLLMEncoder, num_tokens
from media import whole_file
from model import PRESETS, FlowMatch, KiwiEdit
from nano.data import read_many, read_truth
from nano.world import pick
from parallel import pick_device
from vae import VAE, chunks


class Trainer:
    """Float32 masters of a module whose forward and backward run in bfloat16, trained in pieces that resume.

    Muon updates the matrices (a convolution's kernels are rows of one), AdamW the rest: after 160 steps the VAE reaches
    22.3 dB, with AdamW alone 19.4 dB. The learning rate rises over 2 % of the steps and falls as a cosine to 0. Step n
    draws its batch from (seed, n): pieces and one long run are the same training.
    """

    def __init__(self, name, module, args, steps, rate, device):
        self.name, self.rate, self.minutes, self.path = name, rate, args.minutes, Path(args.out) / f"{name}.pt"
        self.step, self.steps, self.seconds = 0, args.steps or steps, 0.0
        named = {n: p for n, p in module.to(device).named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.masters = [p.detach().float().flatten(1 if p.ndim > 1 else 0).clone() for p in self.parameters]
        matrix = [is_matrix(*item) for item in named.items()]
        matrices, rest = ([m for m, is_ in zip(self.masters, matrix) if is_ == which] for which in (True, False))
        self.optimisers = [
            torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, rate, (0.9, 0.98), weight_decay=0.01),
        ]
        self.begun = {"names": list(named), "seed": args.seed, "steps": self.steps}
        if self.path.is_file():
            self.resume()
        for p, master in zip(self.parameters, self.masters):
            p.data = master.view_as(p).bfloat16()

    def resume(self):
        """Go on from the state in the file. ValueError if it belongs to another training."""
        state = torch.load(self.path, weights_only=True, map_location="cpu")  # where AdamW wants its step counts
        for key, value in self.begun.items():
            if state["begun"][key] != value:
                raise ValueError(f"{self.path}: begun with other {key}; go on with those, or give another --out")
        self.step, self.seconds = state["step"], state["seconds"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        for master, saved in zip(self.masters, state["masters"].values()):
            master.copy_(saved.view_as(master))

    def run(self, loss_of):
        """At least one step, until the minutes are over or all are done. Saves every minute; float32 masters end up in
        the module. loss_of(generator) -> a scalar, and figures to show. -> whether all steps are done."""
        begin = saved = time.time()
        first, shown = self.step, {}
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5) as bar:
            while self.step < self.steps and (self.step == first or time.time() - begin < 60 * self.minutes):
                loss, figures = loss_of(torch.Generator().manual_seed(1_000_003 * self.begun["seed"] + self.step))
                figures["norm"] = self.update(loss)
                bar.update()
                for key, value in {"loss": loss.detach(), **figures}.items():
                    if math.isfinite(value):
                        shown[key] = 0.98 * shown.get(key, float(value)) + 0.02 * float(value)
                bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
                if time.time() - saved > 60:
                    saved = time.time()
                    self.save(saved - begin)
        self.save(time.time() - begin)
        for p, master in zip(self.parameters, self.masters):
            p.data = master.view_as(p).clone()
        figures = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
        print(f"{self.name:<11} step {self.step} of {self.steps}, {time.time() - begin:.0f} s, {figures}")
        return self.step == self.steps

    def update(self, loss):
        """One step on the masters; skipped if the gradient's norm, which it returns, is not finite."""
        rising, done = (self.step + 1) / (0.02 * self.steps), self.step / self.steps
        loss.backward()
        for p, master in zip(self.parameters, self.masters):
            master.grad, p.grad = p.grad if p.grad is None else p.grad.float().reshape(master.shape), None
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, 1.0))
        self.step += 1
        if math.isfinite(norm):
            for optimiser in self.optimisers:
                optimiser.param_groups[0]["lr"] = self.rate * min(1, rising) * (1 + math.cos(math.pi * done)) / 2
                optimiser.step()
            for p, master in zip(self.parameters, self.masters):
                p.data.copy_(master.view_as(p))
        return norm

    def save(self, seconds):
        masters = {n: m.view_as(p) for n, p, m in zip(self.begun["names"], self.parameters, self.masters)}
        state = {"step": self.step, "masters": masters, "optimisers": [o.state_dict() for o in self.optimisers]}
        with whole_file(self.path) as path:
            torch.save(state | {"begun": self.begun, "seconds": self.seconds + seconds}, path)


def is_matrix(name, parameter):
    """Whether Muon may orthogonalise its updates: not a table of vectors, not a row."""
    table = "embed_tokens" in name or "modulation" in name
    return not table and parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) > 1


def load_trained(name, module, folder):
    """Read the weights that `pretrain NAME` reached into `module`."""
    path = Path(folder) / f"{name}.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python -m nano pretrain {name}` first")
    module.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["masters"], strict=False)
    return module.eval().requires_grad_(False)


def stills_and_videos(rows):
    return [[row for row in rows if (row["kind"] == "image") == still] for still in (True, False)]


def rows_of(frames, wanted):
    """Clips of the wanted indices as one batch in [-1, 1], (B, 3, T, H, W)."""
    return torch.stack([frames[i] for i in wanted]).permute(0, 4, 1, 2, 3).float() * (2 / 255) - 1


def reconstruct(vae, video, generator):
    """Video through encoder, a sample of the posterior and decoder, not clamped -> (video, mean, log-variance)."""
    mean, log_variance = vae.moments(video, chunk=99)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    return decoded(vae, mean + noise * (0.5 * log_variance.clamp(-20, 10)).exp()), mean, log_variance


def decoded(vae, z):
    """Latents, not normalised -> video, not clamped."""
    z, state = vae.conv2(z, {}), {}
    parts = [vae.decoder.up(vae.decoder.bottom(z[:, :, a:b], state), state) for a, b in chunks(z.shape[2], 99)]
    return torch.cat(parts, dim=2)


def start_vae(vae):
    """Silence the residual branches, so that the shortcuts carry the picture, and narrow the posterior, so that the
    decoder sees it: after 160 steps of AdamW 18.7 dB instead of 16.7."""
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".residual.6." in name or ".proj." in name:
                parameter.zero_()
        vae.conv1.bias[vae.config.z_dim :] -= 6


def vae_loss(video, output, mean, log_variance):
    """L1 and squared error of pixels, L1 of their differences in space and time, a little KL -> loss, figures."""
    error = output.float() - video
    squared = error.square().mean()
    loss = error.abs().mean() + 5 * squared
    for axis in (2, 3, 4):
        if video.shape[axis] > 1:
            loss = loss + 0.25 * error.diff(dim=axis).abs().mean()
    mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + 1e-4 * divergence, {"psnr": -10 * (squared.detach() / 4).log10(), "kl": divergence.detach()}


def pretrain_vae(args, rows, device):
    """Reconstruction of the world's clips: still frames on three steps of four, whole clips on the fourth."""
    folder = Path(args.data)
    vae = VAE(nano_config(args).vae)
    start_vae(vae)
    trainer = Trainer("vae", vae, args, 4000, 2e-3, device)
    stills, videos = (
        read_many([folder / row[column] for row in some for column in ("src_video", "tgt_video")])
        for some in stills_and_videos(rows)
    )
    stills += [ref[:, ::2, ::2] for ref in read_many([folder / r["ref_image"] for r in rows if "ref_image" in r])]

    def loss_of(generator):
        clips = videos if trainer.step % 4 == 3 and videos else stills
        wanted = torch.randint(len(clips), (args.batch or (8 if clips is videos else 16),), generator=generator)
        video = rows_of(clips, wanted).to(device)
        if torch.randint(2, (), generator=generator):
            video = video.flip(4)
        return vae_loss(video, *reconstruct(vae, video.bfloat16(), generator))

    return trainer.run(loss_of)


MLLM = Path(__file__).parents[1] / "weights/nano/mllm"  # sizes; a tokenizer of 2,048 pieces of the world's sentences
GRID = 16  # grounding answers count sixteenths of the frame
CAPTION_TOKENS = 32


def nano_config(args, **vae_statistics):
    """The preset for clips of --data's size, with the latents' statistics once they are known."""
    nano, size = PRESETS["nano"], json.loads((Path(args.data) / "world.json").read_text())["size"]
    mllm = replace(nano.mllm, folder=str(MLLM))
    if size > 64:  # else the MLLM would shrink frames to 56x56 and enlarge them to 336x336
        mllm = replace(mllm, max_pixels=112 * 112)
    return replace(nano, vae=replace(nano.vae, **vae_statistics), mllm=mllm)


def conversation(rng, row):
    """What the MLLM is asked about a row -> (the clip's file, question, a reference's file or None, answer)."""
    kind = rng.random()
    if kind < 0.6:  # as Kiwi-Edit's system prompt asks: the content after the edit
        return row["src_video"], row["prompt"], row.get("ref_image"), row["target_caption"]
    side, column, places = pick(rng, (("source", "src_video", "boxes"), ("target", "tgt_video", "target_boxes")))
    clip, places = row[column], row[places]
    if kind < 0.8 or not places:
        return clip, "Describe this.", None, row[f"{side}_caption"]
    name = pick(rng, sorted(places))
    return clip, f"Where is the {name}?", None, " ".join(str(round(GRID * v)) for v in places[name])


def answer_loss(encoder, conversations):
    """Next-token cross-entropy of the answers to (frames, question, reference or None, answer), and the share of right
    tokens. One forward, padded at the end, where causal attention never looks."""
    start, end = ([encoder.token(f"<|im_{which}|>")] for which in ("start", "end"))
    embed, pad = encoder.model.language_model.embed_tokens, partial(pad_sequence, batch_first=True)
    requests = []
    for frames, question, ref, answer in conversations:
        inputs = encoder.prepare(question, frames, ref)
        turn = inputs.pieces[-1] + start + encoder.ids("assistant\n")  # pieces end with the queries and the turn's end
        requests.append(replace(inputs, pieces=[*inputs.pieces[:-2], turn, encoder.ids(answer) + end]))
    grids = [grid for request in requests for grid in request.grids.values()]
    pixels = torch.cat([p for request in requests for p in request.pixel_values.values()]).to(embed.weight)
    seen = encoder.model.visual(pixels, grids)
    seen = iter(seen.split([num_tokens(grid) for grid in grids]))

    def embedded(piece):
        return next(seen) if isinstance(piece, str) else embed(torch.tensor(piece, device=pixels.device))

    rows = [torch.cat([embedded(piece) for piece in request.pieces]) for request in requests]
    positions = pad([encoder.position_ids(request)[:, 0].T for request in requests])  # (B, S, 3)
    positions = positions.permute(2, 0, 1).to(pixels.device)
    hidden = encoder.model.language_model(pad(rows), positions)
    answers = [request.pieces[-1] for request in requests]
    before = [h[len(row) - len(answer) - 1 : len(row) - 1] for h, row, answer in zip(hidden, rows, answers)]
    logits = (torch.cat(before) @ embed.weight.T).float()
    wanted = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    return F.cross_entropy(logits, wanted), {"right": (logits.argmax(dim=1) == wanted).float().mean()}


def pretrain_mllm(args, rows, device):
    """Captions, captions of what an instruction asks for, and grounding, by next-token prediction."""
    encoder, folder = MLLMEncoder(nano_config(args).mllm), Path(args.data)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith("model."))
    trainer = Trainer("mllm", encoder, args, 1000, 1e-3, device)

    def loss_of(generator):
        rng = np.random.default_rng([args.seed, trainer.step])
        wanted = rng.integers(len(rows), size=args.batch or 16)
        clips, questions, refs, answers = zip(*(conversation(rng, rows[i]) for i in wanted))
        seen = iter(read_many([folder / name for name in (*clips, *filter(None, refs))], quiet=True))
        clips, refs = [next(seen) for _ in clips], [ref and next(seen)[0] for ref in refs]
        return answer_loss(encoder, list(zip(clips, questions, refs, answers)))

    return trainer.run(loss_of)


def caption_features(encoder, captions):
    """Hidden states of captions, (B, CAPTION_TOKENS, hidden), zero after the end like Wan's T5 features."""
    device = encoder.model.language_model.embed_tokens.weight.device
    ids = [encoder.ids(caption)[:CAPTION_TOKENS] for caption in captions]
    length = torch.tensor([len(row) for row in ids], device=device)
    padded = torch.tensor([row + [0] * (CAPTION_TOKENS - len(row)) for row in ids], device=device)
    places = torch.arange(padded.shape[1], device=padded.device).expand(3, *padded.shape)
    hidden = encoder.model.language_model(encoder.model.language_model.embed_tokens(padded), places)
    return hidden * (torch.arange(CAPTION_TOKENS, device=device) < length[:, None])[..., None]


def encode_world(args, rows, device):
    """Posterior means of every target, cached per state of the VAE and the data. rows: {"still": [...], "video": [...]}
    -> tensors (N, z, t, h, w), without the kinds that have no rows."""
    data, out = Path(args.data), Path(args.out)
    vae = load_trained("vae", VAE(nano_config(args).vae), out).to(device)
    made_of = hashlib.sha256((data / "truth.jsonl").read_bytes() + (out / "vae.pt").read_bytes())
    path = out / f"latents_{made_of.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        latents = {kind: [] for kind in rows if rows[kind]}
        for kind, parts in latents.items():
            for i in tqdm(range(0, len(rows[kind]), 32), desc=f"encode {kind}", mininterval=5):
                frames = read_many([data / row["tgt_video"] for row in rows[kind][i : i + 32]], quiet=True)
                with torch.no_grad():
                    parts.append(vae.moments(rows_of(frames, range(len(frames))).to(device), chunk=99)[0].cpu())
        with whole_file(path) as temporary:
            save_file({kind: torch.cat(parts).contiguous() for kind, parts in latents.items()}, temporary)
    return load_file(path)


def pretrain_dit(args, rows, device):
    """Captions to clips of the world, by flow matching. Then the three parts become weights/."""
    rows = dict(zip(("still", "video"), stills_and_videos(rows)))
    latents = encode_world(args, rows, device)
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents.values()], dim=1)
    mean, std = flat.mean(dim=1), flat.std(dim=1)
    model = KiwiEdit(nano_config(args, mean=tuple(mean.tolist()), std=tuple(std.tolist())))
    load_trained("vae", model.vae, args.out)
    load_trained("mllm", model.mllm, args.out).to(device)
    trainer = Trainer("dit", model.dit, args, 800, 1e-3, device)
    timesteps = FlowMatch().timesteps(1000)

    def loss_of(generator):
        kind = list(latents)[trainer.step % len(latents)]
        wanted = torch.randint(len(rows[kind]), (args.batch or 64,), generator=generator)
        clean = (latents[kind][wanted] - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
        clean = clean.to(device, torch.bfloat16)
        t = timesteps[torch.randint(1000, (len(wanted),), generator=generator)].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        with torch.no_grad():
            features = caption_features(model.mllm, [rows[kind][i]["target_caption"] for i in wanted])
        return model.training_loss(clean, model.dit.text_embedding(features.to(clean)), t, noise=noise), {}

    done = trainer.run(loss_of)
    model.save(Path(args.out) / "weights")
    print(f"write       {args.out}/weights: what train.py --weights starts from")
    return done


def pretrain(args):
    from nano.sharpen import pretrain_decoder  # which builds on this file

    Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    parts = {"vae": pretrain_vae, "mllm": pretrain_mllm, "dit": pretrain_dit, "decoder": pretrain_decoder}
    if not parts[args.part](args, read_truth(args.data), pick_device()):
        sys.exit(75)  # "call me again": sysexits' EX_TEMPFAIL
