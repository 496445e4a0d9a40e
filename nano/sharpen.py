"""The decoder alone, trained once more for sharp pictures: latents stay as they are, so nothing else is trained again.

latents of the truth, and of the model's own edits of training clips -> decoder -> frames, against the truth's:
pixels and their differences, less for edits, which are never quite the truth; amplitudes of 8x8 windows and the mean
|Laplacian|, which do not care where a detail lies; and a patch discriminator (hinge) that also sees fine detail alone.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from media import whole_file
from model import KiwiEdit
from nano.data import read_case
from nano.pretrain import Trainer, batch_of, decoded, stills_and_videos


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
    trainer = Trainer("decoder", trained, args, device, 1500, 8e-4)
    optimiser = torch.optim.AdamW(patches.parameters(), 1e-3, (0.5, 0.95), weight_decay=0)
    if judge.is_file():
        patches.load_state_dict(torch.load(judge, weights_only=True, map_location=device))

    def loss_of(generator):
        group = clips if clips and trainer.step % 3 == 2 else stills
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
        if trainer.step < 40:  # the discriminator first; then half as strong as the distance
            return loss
        pull, push = (torch.autograd.grad(x, output, retain_graph=True)[0].norm() for x in (loss, doubt))
        return loss + 0.5 * pull / push.clamp_min(1e-12) * doubt

    done = trainer.run(loss_of)
    with whole_file(judge) as path:
        torch.save(patches.state_dict(), path)
    tensors = {f"vae.{name}": value.bfloat16().contiguous() for name, value in trained.state_dict().items()}
    with whole_file(out / "decoder.safetensors") as path:
        save_file(tensors, path)
    print(f"write       {out}/decoder.safetensors: `ship` lays it over {args.weights}")
    return done
