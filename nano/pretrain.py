"""Stand-ins for what Kiwi-Edit starts from, trained from nothing on the world's clips, in pieces that resume.

vae   reconstruction of clips and stills               -> vae.pt      (Wan's VAE)
mllm  captions, what an instruction asks for, places   -> mllm.pt     (Qwen2.5-VL)
dit   captions to clips by flow matching               -> dit.pt      (Wan's text-to-video DiT), weights/

decoder: that of finished weights once more, for sharp pictures; latents stay as they are, so nothing else is trained
again. Latents of the truth, and of the model's own edits -> frames, against the truth's: pixels and their differences,
less for edits, which are never quite the truth; amplitudes of 8x8 windows and the mean |Laplacian|, which do not care
where a detail lies; and a patch discriminator (hinge) that also sees fine detail alone.
"""

import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from connectors import MLLMEncoder
from media import whole_file
from model import PRESETS, FlowMatch, KiwiEdit
from nano.data import read_case, read_many, read_truth, read_world
from nano.world import pick
from parallel import pick_device
from vae import VAE, chunks

MLLM = Path(__file__).parents[1] / "weights/nano/mllm"  # sizes; a tokenizer of 2,048 pieces of the world's sentences
GRID = 16  # grounding answers count sixteenths of the frame
CAPTION_TOKENS = 32


def train(name, module, args, device, steps, rate, loss_of):
    """Minimise loss_of(step, generator), a scalar, from where --out stands, for --minutes but at least one step; saved
    every minute -> whether all steps are done.

    Forward and backward run in bfloat16; masters, which the module has in the end, are float32. Muon updates the
    matrices (a convolution's kernels are rows of one), AdamW the rest: after 160 steps the VAE reaches 22.3 dB, with
    AdamW alone 19.4 dB. The learning rate rises over 2 % of the steps and falls as a cosine to 0. Step n draws its
    batch from (seed, n): pieces and one long run are the same training.
    """
    path, steps = Path(args.out) / f"{name}.pt", args.steps or steps
    begun, step, seconds = {"seed": args.seed, "steps": steps}, 0, 0.0
    weights = {n: p for n, p in module.to(device).named_parameters() if p.requires_grad}
    masters = {n: p.detach().float().flatten(min(1, p.ndim - 1)).clone() for n, p in weights.items()}
    muon, adamw = [], []
    for n, master in masters.items():  # tables of vectors and rows are no matrices
        matrix = master.ndim > 1 and min(master.shape) > 1 and not re.search("embed_tokens|modulation", n)
        (muon if matrix else adamw).append(master)
    optimisers = [
        torch.optim.Muon(muon, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, rate, (0.9, 0.98), weight_decay=0.01),
    ]

    def write_weights(dtype):
        for n, p in weights.items():
            p.data = masters[n].view_as(p).to(dtype, copy=True)

    def save():
        state = {"begun": begun, "step": step, "seconds": seconds, "optimisers": [o.state_dict() for o in optimisers]}
        with whole_file(path) as temporary:
            torch.save(state | {"masters": {n: masters[n].view_as(p) for n, p in weights.items()}}, temporary)

    if path.is_file():
        state = torch.load(path, weights_only=True, map_location="cpu")  # where AdamW wants its step counts
        if state["begun"] != begun:
            raise ValueError(f"{path}: begun with {state['begun']}; go on with those, or give another --out")
        step, seconds = state["step"], state["seconds"]
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        for n, master in masters.items():
            master.copy_(state["masters"][n].view_as(master))
    write_weights(torch.bfloat16)
    began, first, saved = seconds, step, seconds
    with tqdm(total=steps, initial=step, desc=name, mininterval=5) as bar:
        while step < steps and (step == first or seconds - began < 60 * args.minutes):
            start = time.time()
            loss = loss_of(step, torch.Generator().manual_seed(1_000_003 * args.seed + step))
            loss.backward()
            for n, p in weights.items():
                masters[n].grad = None if p.grad is None else p.grad.float().reshape(masters[n].shape)
                p.grad = None
            if torch.nn.utils.clip_grad_norm_(masters.values(), 1.0).isfinite():
                warmth, decay = (step + 1) / (0.02 * steps), (1 + math.cos(math.pi * step / steps)) / 2
                for optimiser in optimisers:
                    optimiser.param_groups[0]["lr"] = rate * min(1, warmth) * decay
                    optimiser.step()
                write_weights(torch.bfloat16)
            step, seconds = step + 1, seconds + time.time() - start
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            bar.update()
            if seconds - saved > 60:
                saved = seconds
                save()
    save()
    write_weights(torch.float32)
    return step == steps


def load_trained(name, module, folder):
    """Read the weights that `pretrain NAME` reached into `module`."""
    state = torch.load(Path(folder) / f"{name}.pt", weights_only=True, map_location="cpu")
    module.load_state_dict(state["masters"], strict=False)
    return module.eval().requires_grad_(False)


def nano_config(args):
    """The preset for clips of --data's size."""
    nano, mllm = PRESETS["nano"], replace(PRESETS["nano"].mllm, folder=str(MLLM))
    if read_world(args.data)["size"] > 64:  # else the MLLM would shrink frames to 56x56 and enlarge them to 336x336
        mllm = replace(mllm, max_pixels=112 * 112)
    return replace(nano, mllm=mllm)


def stills_and_videos(rows):
    return [[row for row in rows if (row["kind"] == "image") == still] for still in (True, False)]


def batch_of(clips, wanted):
    """Clips (T, H, W, 3) of the wanted indices as one batch in [-1, 1], (B, 3, T, H, W)."""
    return torch.stack([clips[i] for i in wanted]).permute(0, 4, 1, 2, 3).float() * (2 / 255) - 1


def decoded(vae, z):
    """Latents, not normalised -> video, not clamped."""
    z, state = vae.conv2(z, {}), {}
    parts = [vae.decoder.up(vae.decoder.bottom(z[:, :, a:b], state), state) for a, b in chunks(z.shape[2], 99)]
    return torch.cat(parts, dim=2)


def vae_loss(vae, video, generator):
    """Reconstruction of (B, 3, T, H, W) from a sample of the posterior: L1 and squared error of pixels, L1 of their
    differences in space and time, a little KL."""
    mean, log_variance = vae.moments(video.bfloat16(), chunk=99)
    log_variance = log_variance.clamp(-20, 10)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    error = decoded(vae, mean + noise * (0.5 * log_variance).exp()).float() - video
    loss = error.abs().mean() + 5 * error.square().mean()
    for axis in (2, 3, 4):
        if video.shape[axis] > 1:
            loss = loss + 0.25 * error.diff(dim=axis).abs().mean()
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + 1e-4 * divergence


def pretrain_vae(args, rows, device):
    """Reconstruction of the world's clips: still frames on three steps of four, whole clips on the fourth."""
    vae, folder = VAE(nano_config(args).vae), Path(args.data)
    with torch.no_grad():  # begin with shortcuts alone and a narrow posterior: 18.7 dB after 160 steps instead of 16.7
        for name, parameter in vae.named_parameters():
            if ".residual.6." in name or ".proj." in name:
                parameter.zero_()
        vae.conv1.bias[vae.config.z_dim :] -= 6
    ends = ("src_video", "tgt_video")
    stills, videos = (read_many(folder / r[end] for r in some for end in ends) for some in stills_and_videos(rows))
    stills += [ref[:, ::2, ::2] for ref in read_many(folder / r["ref_image"] for r in rows if "ref_image" in r)]

    def loss_of(step, generator):
        clips = videos if step % 4 == 3 and videos else stills
        wanted = torch.randint(len(clips), (args.batch or (8 if clips is videos else 16),), generator=generator)
        video = batch_of(clips, wanted).to(device)
        if torch.randint(2, (), generator=generator):
            video = video.flip(4)
        return vae_loss(vae, video, generator)

    return train("vae", vae, args, device, 4000, 2e-3, loss_of)


class Speaker(MLLMEncoder, name="speaker"):
    """The MLLM as a language model: hidden states of whole requests in place of a context."""

    def context(self, mode, hidden, spans):
        return hidden


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


def answer_loss(speaker, conversations):
    """Next-token cross-entropy of the answers to (frames, question, reference or None, answer)."""
    start, end = ([speaker.token(f"<|im_{which}|>")] for which in ("start", "end"))
    requests = []
    for frames, question, ref, answer in conversations:
        request = speaker.prepare(question, frames, ref)
        turn = request.pieces[-1] + start + speaker.ids("assistant\n")  # after the queries, which are left out
        requests.append(replace(request, pieces=[*request.pieces[:-2], turn, speaker.ids(answer) + end]))
    answers = [request.pieces[-1] for request in requests]
    before = [h[-len(answer) - 1 : -1] for h, answer in zip(speaker.encode(requests), answers)]
    logits = (torch.cat(before) @ speaker.model.language_model.embed_tokens.weight.T).float()
    wanted = torch.tensor(sum(answers, []), device=logits.device)
    return F.cross_entropy(logits, wanted)


def pretrain_mllm(args, rows, device):
    """Captions, captions of what an instruction asks for, and grounding, by next-token prediction."""
    speaker, folder = Speaker(nano_config(args).mllm), Path(args.data)
    for name, parameter in speaker.named_parameters():
        parameter.requires_grad_(name.startswith("model."))

    def loss_of(step, generator):
        rng = np.random.default_rng([args.seed, step])
        wanted = rng.integers(len(rows), size=args.batch or 16)
        clips, questions, refs, answers = zip(*(conversation(rng, rows[i]) for i in wanted))
        seen = iter(read_many(folder / name for name in (*clips, *filter(None, refs))))
        clips, refs = [next(seen) for _ in clips], [ref and next(seen)[0] for ref in refs]
        return answer_loss(speaker, list(zip(clips, questions, refs, answers)))

    return train("mllm", speaker, args, device, 1000, 1e-3, loss_of)


def caption_features(encoder, captions):
    """Hidden states of captions, (B, CAPTION_TOKENS, hidden), zero after the end like Wan's T5 features."""
    embed = encoder.model.language_model.embed_tokens
    ids = [torch.tensor(encoder.ids(caption)[:CAPTION_TOKENS]) for caption in captions]
    padded = pad_sequence([*ids, torch.zeros(CAPTION_TOKENS, dtype=torch.long)], batch_first=True)[:-1]
    told = torch.arange(CAPTION_TOKENS) < torch.tensor([[len(row)] for row in ids])
    places = torch.arange(CAPTION_TOKENS, device=embed.weight.device).expand(3, *padded.shape)
    hidden = encoder.model.language_model(embed(padded.to(places.device)), places)
    return hidden * told[..., None].to(places.device)


@torch.no_grad()
def encode_targets(vae, folder, rows):
    """Posterior means of the rows' targets, (N, z, t, h, w)."""
    parts = []
    for i in tqdm(range(0, len(rows), 32), desc="encode", mininterval=5):
        frames = read_many(folder / row["tgt_video"] for row in rows[i : i + 32])
        video = batch_of(frames, range(len(frames))).to(vae.conv1.weight.device)
        parts.append(vae.moments(video, chunk=99)[0].cpu())
    return torch.cat(parts)


def pretrain_dit(args, rows, device):
    """Captions to clips of the world, by flow matching. Then the three parts become weights/."""
    kinds, model = [some for some in stills_and_videos(rows) if some], KiwiEdit(nano_config(args))
    load_trained("vae", model.vae, args.out).to(device)
    load_trained("mllm", model.mllm, args.out).to(device)
    latents = [encode_targets(model.vae, Path(args.data), some) for some in kinds]
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1)
    statistics = {"mean": tuple(flat.mean(dim=1).tolist()), "std": tuple(flat.std(dim=1).tolist())}
    model.vae.config = replace(model.vae.config, **statistics)
    model.config = replace(model.config, vae=model.vae.config)
    timesteps = FlowMatch().timesteps(1000)

    def loss_of(step, generator):
        kind = step % len(kinds)
        wanted = torch.randint(len(kinds[kind]), (args.batch or 64,), generator=generator)
        clean = model.vae.normalise(latents[kind][wanted]).to(device, torch.bfloat16)
        t = timesteps[torch.randint(1000, (len(wanted),), generator=generator)].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        with torch.no_grad():
            features = caption_features(model.mllm, [kinds[kind][i]["target_caption"] for i in wanted])
        return model.training_loss(clean, model.dit.text_embedding(features.to(clean)), t, noise=noise)

    done = train("dit", model.dit, args, device, 800, 1e-3, loss_of)
    model.save(Path(args.out) / "weights")
    print(f"write       {args.out}/weights: what train.py --weights starts from")
    return done


class Patches(nn.Module):
    """Real (above 1) or decoded (below -1), for overlapping patches of 22 pixels: (N, 3, H, W) -> (N, 1, H/4, W/4)."""

    def __init__(self, width=40):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(2 * width, 1, 3, 1, 1),
        )  # fmt: skip
        for layer in self.layers[::2]:
            nn.init.kaiming_normal_(layer.weight, 0.2)  # torch's own is so small that the decoder outruns it

    def forward(self, x):
        fine = x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return self.layers(torch.cat([x, 6 * fine], dim=1))


def amplitudes(x):
    """|FFT| of overlapping 8x8 windows of (N, 3, H, W)."""
    window = torch.hann_window(8, periodic=False, device=x.device)
    f = torch.fft.rfft2(x.unfold(2, 8, 4).unfold(3, 8, 4) * window * window[:, None])
    return (f.real.square() + f.imag.square() + 1e-4).sqrt()


def laplacians(x):
    """Mean |Laplacian| of overlapping 4x4 windows of (N, 3, H, W)."""
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    y = 4 * x - p[..., :-2, 1:-1] - p[..., 2:, 1:-1] - p[..., 1:-1, :-2] - p[..., 1:-1, 2:]
    return F.avg_pool2d((y.square() + 1e-4).sqrt(), 4, 2)


def frames_of(video):
    return video.transpose(1, 2).flatten(0, 1)  # (B * T, 3, H, W)


def distance(output, target, certain):
    """certain (B,): how much each clip's pixels count."""
    certain, error = certain.view(-1, 1, 1, 1, 1), output - target
    a, b, grid = frames_of(output), frames_of(target), F.pixel_unshuffle(frames_of(error), 4).unflatten(1, (3, 16))
    grid = F.avg_pool3d(grid, (1, 4, 4))  # (N, 3, 16, ...): the mean error at each place of a 4x4 raster
    halves = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    terms = [
        (1, certain * error),
        (0.5, F.avg_pool2d(frames_of(error), 4)),
        *((0.2, certain * error.diff(dim=axis)) for axis in (2, 3, 4) if target.shape[axis] > 1),
        (0.75, amplitudes(a) - amplitudes(b)),
        (1, laplacians(a) - laplacians(b)),
        *((1.5, (laplacians(x) - laplacians(y)).mean(dim=(2, 3))) for x, y in ((a, b), halves)),  # a blur lacks detail
        (8, grid - grid.mean(dim=2, keepdim=True)),  # a raster is the cheapest detail
    ]
    return sum(weight * term.abs().mean() for weight, term in terms)


@torch.no_grad()
def edits_of(model, folder, rows):
    """((latents of the truth, of the model's own edit), the truth's frames) of each row; of clips the start."""
    caught, items = [], []
    model.decode_fitting = lambda latents, *_: caught.append(latents) or torch.zeros(9999, 1)
    for row in tqdm(rows, desc="edit", mininterval=5):
        source, target, ref, _ = read_case(folder, row)
        model.edit(source, row["prompt"], ref, seed=row["index"])
        items.append(((model.encode_frames(target)[0, :, :2], caught.pop()[0, :, :2]), target[:5]))
    return items


def pretrain_decoder(args, rows, device):
    """-> decoder.safetensors, which `ship` lays over the weights. Stills on two steps of three, clips on the third."""
    out, judge = Path(args.out), Path(args.out) / "patches.pt"
    model = KiwiEdit.from_pretrained(args.weights, device, torch.float32)
    stills, clips = (edits_of(model, Path(args.data), some) for some in stills_and_videos(rows[:1300]))  # a second each
    vae, patches = model.vae, Patches().to(device)
    trained = nn.ModuleDict({"conv2": vae.conv2, "decoder": vae.decoder})
    optimiser = torch.optim.AdamW(patches.parameters(), 1e-3, (0.5, 0.95), weight_decay=0)
    if judge.is_file():
        patches.load_state_dict(torch.load(judge, weights_only=True, map_location=device))

    def loss_of(step, generator):
        group = clips if clips and step % 3 == 2 else stills
        count = args.batch or (4 if group is clips else 16)
        wanted = torch.randint(len(group), (count,), generator=generator)
        edit = torch.randint(2, (count,), generator=generator)
        z = torch.stack([group[i][0][e] for i, e in zip(wanted, edit)]).to(device)
        target = batch_of([frames for _, frames in group], wanted).to(device)
        output = decoded(vae, vae.denormalise(z).bfloat16()).float()
        real, fake = patches(frames_of(target)), patches(frames_of(output.detach()))
        optimiser.zero_grad()
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        optimiser.step()
        loss, doubt = distance(output, target, 1 - 0.7 * edit.to(device)), -patches(frames_of(output)).mean()
        if step < 40:  # the discriminator first; then half as strong as the distance
            return loss
        pull, push = (torch.autograd.grad(x, output, retain_graph=True)[0].norm() for x in (loss, doubt))
        return loss + 0.5 * pull / push.clamp_min(1e-12) * doubt

    done = train("decoder", trained, args, device, 1500, 8e-4, loss_of)
    with whole_file(judge) as path:
        torch.save(patches.state_dict(), path)
    tensors = {f"vae.{name}": value.bfloat16().contiguous() for name, value in trained.state_dict().items()}
    with whole_file(out / "decoder.safetensors") as path:
        save_file(tensors, path)
    print(f"write       {out}/decoder.safetensors: `ship` lays it over {args.weights}")
    return done


def pretrain(args):
    Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    parts = {"vae": pretrain_vae, "mllm": pretrain_mllm, "dit": pretrain_dit, "decoder": pretrain_decoder}
    if not parts[args.part](args, read_truth(args.data), pick_device()):
        sys.exit(75)  # "call me again": sysexits' EX_TEMPFAIL
