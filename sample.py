"""Edit a video or a picture: `python sample.py in.mp4 "replace the car" --ref car.png`; alone, the bundled example.

read (media.py) -> understand the request (connectors.py) -> encode (vae.py) -> denoise (dit.py, sampler.py)
-> decode (vae.py) -> write (media.py), with a progress bar for each phase. A still picture gives a picture, a long clip
streams. Processes that torchrun starts share one edit (parallel.py).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from command import number, one_line

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python sample.py                                             (the example bundled with the weights, on any computer)
  python sample.py in.mp4 "Replace the car with a vintage bus." --weights linyq/kiwi-edit-5b-instruct-only-diffusers
  python sample.py in.mp4 "Replace the car with the one shown." --ref car.png -o bus.mp4 --compare --offload
  torchrun --nproc-per-node 8 sample.py in.mp4 "Make it night." --frames 241 --solver ab2 --steps 25 --weights ...

The bundled weights, weights/nano, know only small clips, 9 frames of 64x64 at 8 a second: whatever they are given is
shrunk to about so many pixels of its own aspect, and every k-th frame is taken. docs/weights.md lists all others.
A 24 GB card: add --offload, which keeps on the GPU only the part at work; smaller still: --tile 16, --max-pixels 399360
"""
DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "nano"
BAR = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
COMPARED_HEIGHT = 256  # pixels up to which a comparison is enlarged


def parse_arguments(argv=None):
    doc, raw = "Edit a video or a picture as an instruction says.", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, epilog=EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("input", nargs="?", help="a video or picture file (without it and the instruction: the example of --weights)")
    add("instruction", nargs="?", help='what to change, e.g. "replace the car"')
    add("--ref", nargs="+", default=[], metavar="IMG", help="one or more pictures of what the edit should look like")
    add("--mask", metavar="PNG|MP4", help="of the input's size: only what is white may change")
    add("-o", "--out", metavar="OUT", help="default: <input name>_edited.mp4 or .png; of the example out.mp4")
    add("--compare", action="store_true", help="also write source, references and edit side by side: <out>_compare")
    add("--weights", default=str(DEFAULT_WEIGHTS), metavar="PATH|HUB_ID", help="default: weights/nano")
    add("--lora", nargs="+", default=[], metavar="FILE[:SCALE]", help="LoRA of the DiT, in any dialect, one or more")
    add("--steps", type=number(1), help="denoising steps (default: 50; nano 2)")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="same seed, same result (default %(default)s)")
    add("--frames", type=number(1), help="at most so many frames, from 5 on reduced to 4k + 1; more than the default "
        "(81; nano 9) are edited in windows")
    add("--max-pixels", type=number(1), help="larger frames are shrunk (default: 921600; nano 4096)")
    add("--offload", action="store_true", help="keep on the GPU only the part at work")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    add = parser.add_argument_group("seldom needed").add_argument
    add("--base", metavar="PATH|HUB_ID", help="under a .safetensors or a run of train.py (default: what the run began "
        "with, else Wan-AI/Wan2.2-TI2V-5B)")
    add("--qwen", metavar="PATH|HUB_ID", help="likewise (default: the run's, else Qwen/Qwen2.5-VL-3B-Instruct)")
    add("--ref-pad-first", action="store_true", help="a released training checkpoint whose name says pad_first")
    add("--quantise", choices=("fp8", "int8", "w8a8"), help="linears in 8 bits: half the memory; w8a8: products too")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    add("--tile", type=number(1), metavar="N", help="VAE: N x N latent pixels at once; the same result, less memory")
    add("--solver", choices=("euler", "ab2"), default="euler", help="ab2: as good in 3 of 4 steps (default euler)")
    add("--reuse", type=float, default=0.0, metavar="T", help="skip a forward while v is predicted to change by less "
        "than T, e.g. 0.02 (default: never)")
    add("--re-noise", type=timesteps, default=(), metavar="T,T,...", help="the steps of distilled weights, e.g. "
        "1000,757,522, noised anew at each")
    add("--shift", type=float, default=5.0, help="shift of the noise schedule (default %(default)s)")
    add("--ref-guidance", type=number(1e-9, kind=float), metavar="G", help="above 1 the edit is more like the "
        "references than trained, in twice the time; 1 is as released (default: 1; nano 1.2)")
    # fmt: on
    argv = sys.argv[1:] if argv is None else argv
    if "--" in argv:  # argparse cannot intermix behind it
        return parser.parse_args(argv)
    return parser.parse_intermixed_args(argv)  # in.mp4 --steps 4 "replace the car" too


def timesteps(text):
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    parse_arguments()  # --help answers before torch is imported

import torch
from tqdm import tqdm

from lora import add_lora, quantise, read_lora
from media import FrameFile, MediaError, fit_frames, measure, pad_reference, read_image, write_image, write_video
from model import FlowMatch, KiwiEdit, read_for, read_weights
from parallel import Ranks, SharedFrames, Ulysses, pick_device, rank_and_world
from sampler import Sampler


def main(argv=None):
    args = with_example(parse_arguments(argv))
    rank, world = rank_and_world()
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first of several processes speaks
    # validate inputs before downloading 20 GB
    device, flow = pick_device(args.device), FlowMatch(args.shift)
    chosen = args.solver != "euler" or args.reuse or args.re_noise
    sampler = Sampler(args.solver, args.reuse, args.re_noise) if chosen else None
    loras, refs = [file_and_scale(text) for text in args.lora], [read_image(path) for path in args.ref]
    for path, _ in loras:
        read_lora(path)
    promised = measure(args.input, count=False)
    out, beside = places(args, still=not promised[3])
    clip = read_source(args, promised)
    mask = read_mask(args.mask, clip) if args.mask else None
    model = load(args, device, loras)
    ranks = share_edit(model, world) if world > 1 else None
    edited = model.edit_stream(
        clip.frames, args.instruction, refs or None, args.steps, args.seed, flow, args.tile,
        device if args.offload else None, None if rank else bars(), args.ref_guidance, sampler, mask,
    )  # fmt: skip
    if rank:
        list(edited)
    elif isinstance(clip.frames, FrameFile):
        write(out, edited, clip)
        edited = FrameFile(str(out), len(clip.frames), clip.frames.size)
    else:
        edited = list(edited)
        write(out, edited, clip)
    if args.compare and not rank:
        compare(beside, clip, refs, edited)
    if ranks:
        ranks.leave()


def with_example(args):
    """The arguments as they are or, without clip and instruction, those of the weights' example."""
    if args.instruction is None:
        if args.input is not None or not all(Path(path).is_file() for path in args.ref):
            raise ValueError(
                "a clip and an instruction are needed, and behind them --ref, which takes all that follows it, e.g. "
                'in.mp4 "replace the car" --ref car.png; without any the bundled example is edited'
            )
        folder = Path(args.weights) / "example"
        if not (folder / "prompt.txt").is_file():
            raise FileNotFoundError(f"{args.weights} has no example: give a clip and an instruction (see --help)")
        args.input, args.instruction = str(folder / "source.mp4"), (folder / "prompt.txt").read_text()
        args.ref = args.ref or [str(path) for path in folder.glob("reference.png")]
        args.out, args.compare = args.out or "out.mp4", True
        print(
            f"example     {args.instruction.strip()}{' (reference: ' + ', '.join(args.ref) + ')' if args.ref else ''}"
        )
    args.instruction = args.instruction.strip()
    if not args.instruction:
        raise ValueError('the instruction is empty: say what to change, e.g. "replace the car"')
    args.instruction.encode()  # UnicodeEncodeError where the terminal is not set to UTF-8
    return args


def file_and_scale(text):
    """FILE:SCALE or FILE -> both."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def places(args, still):
    """Where the edit and its comparison are written. An error where they cannot be, or would replace what is read."""
    endings = (".png", ".jpg", ".jpeg") if still else (".mp4",)
    out = Path(args.out or f"{Path(args.input).stem}_edited{endings[0]}")
    if out.suffix.lower() not in endings:
        raise MediaError(f"{out}: a {'picture' if still else 'video'} is written as {', '.join(endings)}")
    if out.is_dir():
        raise MediaError(f"{out}: is a folder; give -o a file's name")
    beside = out.with_stem(out.stem + "_compare")
    written = [path.resolve() for path in (out, *((beside, beside.with_suffix(".png")) if args.compare else ()))]
    for path in filter(None, (args.input, args.mask, *args.ref)):
        if Path(path).resolve() in written:
            raise MediaError(f"{path}: would be replaced by what is written; give another -o")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # fail before the minutes of an edit
    return out, beside


def read_source(args, promised):
    """The clip at the size for which the weights are made, and a line about it. promised: of `measure`."""
    config = read_weights(args.weights, args.base, args.qwen)[0]
    clip = read_for(config, args.input, args.frames, args.max_pixels)
    count, height, width, _ = clip.frames.shape
    if config.trained and (count, height, width) != (promised[0] or count, *promised[1:3]):
        frames, h, w, fps = config.trained
        print(f"note        these weights know {frames} frames of {w}x{h} at {fps} fps only: it is edited at this size")
    rate = "" if clip.still else f", {float(clip.fps):g} fps"
    print(f"read        {args.input}: {count} frame{'s' * (count > 1)} of {width}x{height}{rate}")
    return clip


def read_mask(path, clip):
    """What may change, at the clip's size: a picture for all frames, or a clip."""
    count, *size = clip.frames.shape[:3]
    total, height, width, fps = measure(path)
    if (height, width) != tuple(clip.source_size):
        h, w = clip.source_size
        raise MediaError(f"{path}: {width}x{height} pixels, and the input has {w}x{h}; give a mask of the input's size")
    if not fps:
        return fit_frames(read_image(path)[None], size).expand(count, -1, -1, -1)
    stride = max(round(fps / clip.fps), 1)
    if total < (count - 1) * stride + 1:
        raise MediaError(f"{path}: {total} frames are too few for the {count} that are edited")
    return FrameFile(path, count, tuple(size), stride)


def load(args, device, loras):
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if args.quantise == "w8a8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            "--quantise w8a8 multiplies in fp8, which this card cannot (Ada, Hopper and later can); take fp8"
        )
    print(f"load        {args.weights} on {device}, {dtype}{', linears in ' + args.quantise if args.quantise else ''}")
    home = "cpu" if args.offload else device
    first = "cpu" if args.quantise else home
    model = KiwiEdit.from_pretrained(
        args.weights, first, getattr(torch, dtype), args.base, args.qwen, args.ref_pad_first
    )
    for path, scale in loras:
        print(f"lora        {add_lora(model.dit, path, scale)}")
    if args.quantise:
        quantise(model, args.quantise, home)
        model.to(home)
    return model


def share_edit(model, world):
    """All processes of torchrun share the sequence of one edit and the frames of its VAE."""
    heads = model.config.dit.num_heads
    if heads % world:
        raise ValueError(f"{world} processes cannot share {heads} attention heads: take a number that divides them")
    ranks = Ranks(sp=world)
    Ulysses(model.dit, ranks.sequence)
    model.vae.shared = SharedFrames(ranks.sequence)
    return ranks


def bars():
    """tell(phase, done, total) for `KiwiEdit.edit`: a tqdm bar for each phase."""
    shown = {}

    def tell(phase, done, total):
        if phase not in shown:
            shown[phase] = tqdm(total=total, desc=f"{phase:<10}", bar_format=BAR)
        shown[phase].update(done - shown[phase].n)
        if done == total:
            shown[phase].close()

    return tell


def compare(out, clip, refs, edited):
    """Source, references and edit side by side, small ones in larger pixels; of a clip also its middle frame, .png."""
    count, *size = clip.frames.shape[:3]
    shown, scale = [pad_reference(ref, size) for ref in refs], max(COMPARED_HEIGHT // size[0], 1)

    def frames():
        for i, (source, edit) in enumerate(zip(clip.frames, edited)):
            frame = torch.cat([source, *shown, edit], dim=1).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            if i == count // 2 and not clip.still:
                write_image(out.with_suffix(".png"), frame)
            yield frame

    write(out, frames(), clip)
    if not clip.still:
        print(f"write       {out.with_suffix('.png')}")


def write(out, frames, clip):
    if clip.still:
        write_image(out, *frames)
    else:
        write_video(out, frames, clip.fps, audio_from=clip.path, count=len(clip.frames))
    print(f"write       {out}")


if __name__ == "__main__":
    with one_line("sample.py", memory="try --offload, --tile 16, fewer --frames or --max-pixels 399360"):
        main()
