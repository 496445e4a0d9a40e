"""Edit a video or a picture: `python sample.py in.mp4 "replace the car" --ref car.png`.

read (data.py) -> understand the request (connectors.py) -> encode (vae.py) -> denoise (dit.py, model.py)
-> decode (vae.py) -> write (data.py), with a progress bar for each phase. A still picture gives a picture.
"""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python sample.py in.mp4 "Replace the car with a vintage bus." --weights linyq/kiwi-edit-5b-instruct-only-diffusers
  python sample.py in.mp4 "Replace the car with the one shown." --ref car.png -o bus.mp4 --compare --offload

weights (--weights):
  a folder in the released diffusers layout, or its hub id (linyq/kiwi-edit-5b-{instruct-only,reference-only,
  instruct-reference}-diffusers); a folder that nanoKiwi saved; or a training checkpoint, one .safetensors,
  which lies over --base (Wan's DiT and VAE) and --qwen (Qwen2.5-VL), folders or hub ids too.

a 24 GB card: add --offload, which keeps on the GPU only the part at work; smaller still: --tile 16, --max-pixels 399360
"""
DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "nano"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Edit a video or a picture as an instruction says.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", help="a video or picture file")
    add("instruction", help='what to change, e.g. "replace the car"')
    add("--ref", nargs="+", default=[], metavar="IMG", help="one or more pictures of what the edit should look like")
    add("-o", "--out", metavar="OUT", help="the result (default: <input name>_edited.mp4, or .png for a picture)")
    add("--weights", default=str(DEFAULT_WEIGHTS), metavar="PATH|HUB_ID", help="default: weights/nano")
    add("--base", default="Wan-AI/Wan2.2-TI2V-5B", metavar="PATH|HUB_ID", help="under a .safetensors: %(default)s")
    add("--qwen", default="Qwen/Qwen2.5-VL-3B-Instruct", metavar="PATH|HUB_ID", help="likewise: %(default)s")
    add("--steps", type=positive, default=50, help="denoising steps (default %(default)s)")
    add("--shift", type=float, default=5.0, help="shift of the noise schedule (default %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same result (default %(default)s)")
    add("--frames", type=positive, default=81, help="at most so many frames, reduced to 4k + 1 (default %(default)s)")
    add("--max-pixels", type=positive, default=720 * 1280, help="larger frames are shrunk (default %(default)s)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    add("--offload", action="store_true", help="keep on the GPU only the part at work")
    add("--tile", type=positive, metavar="N", help="VAE: work on N x N latent pixels at once; the same result, less memory")
    add("--compare", action="store_true", help="also write source and edit side by side, <out>_compare")
    return parser.parse_args(argv)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(argv=None):
    args = parse_arguments(argv)
    if not args.instruction.strip():
        raise ValueError('the instruction is empty: say what to change, e.g. "replace the car"')
    import torch

    from data import MediaError, read_clip, read_image, writable

    device = pick_device(torch, args)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    weights_exist(args.weights)

    clip = read_clip(args.input, args.frames, args.max_pixels)
    refs = [read_image(path) for path in args.ref]
    out = Path(args.out or f"{Path(args.input).stem}_edited{'.png' if clip.still else '.mp4'}")
    if not clip.still and out.suffix.lower() != ".mp4":
        raise MediaError(f"{out}: a video is written as .mp4")
    writable(out)
    count, height, width, _ = clip.frames.shape
    print(f"read        {args.input}: {count} frame{'s' * (count > 1)} of {width}x{height}, {float(clip.fps):g} fps")

    from model import KiwiEdit

    print(f"load        {args.weights} on {device}, {str(dtype).removeprefix('torch.')}")
    home = "cpu" if args.offload else device
    model = KiwiEdit.from_pretrained(args.weights, home, dtype, args.base, args.qwen)
    with Progress() as progress:
        edited = model.edit(
            clip.frames, args.instruction, refs or None, args.steps, args.seed, args.shift, args.tile,
            device if args.offload else None, progress,
        )  # fmt: skip
    write(out, edited, clip)
    if args.compare:
        write(out.with_stem(out.stem + "_compare"), torch.cat([clip.frames, edited], dim=2), clip)


def pick_device(torch, args):
    """The device asked for, or the best there is. ValueError if it is not there."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: not available here; leave it out to use the CPU") from None
    if args.offload and device.type == "cpu":
        raise ValueError("--offload moves parts between the CPU and a GPU, and there is no GPU; leave it out")
    return device


def weights_exist(weights):
    """The default weights may be absent from a checkout: say so before any work."""
    if Path(weights) == DEFAULT_WEIGHTS and not DEFAULT_WEIGHTS.exists():
        raise FileNotFoundError("weights/nano is not in this checkout: say which weights with --weights (see --help)")


class Progress:
    """A tqdm bar for each phase of `KiwiEdit.edit`."""

    def __enter__(self):
        self.phase, self.bar = None, None
        return self

    def __call__(self, phase, done, total):
        from tqdm import tqdm

        if phase != self.phase:
            self.__exit__()
            self.phase, self.bar = phase, tqdm(total=total, desc=f"{phase:<10}", bar_format=BAR)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


BAR = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def write(out, frames, clip):
    from data import write_image, write_video

    if clip.still:
        write_image(out, frames[0])
    else:
        write_video(out, frames, clip.fps, audio_from=clip.path)
    print(f"write       {out}")


def run():
    """main, with every foreseeable failure as one line on stderr and an exit code that is not 0."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsample.py: interrupted; nothing was written")
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit("sample.py: out of GPU memory; try --offload, --tile 16, fewer --frames or --max-pixels 399360")


if __name__ == "__main__":
    run()
