"""Train a small Kiwi-Edit from nothing, in a world whose truth is known: runs/nano_cpu.sh runs all of it.

assets, data -> clips and their truth    pretrain -> the VAE, MLLM and DiT that the paper starts from
(train.py runs the paper's three stages) -> ship -> weights/nano    eval, compare, bench -> how good they are
"""

import argparse
import os
from importlib import import_module
from pathlib import Path

from command import number, one_line

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python -m nano assets ../assets && python -m nano data ../nano_train --assets ../assets --clips 4000
  python -m nano data ../tiny --clips 8                 (shapes and textures alone: no asset is needed)
  python -m nano pretrain vae --data ../nano_train --out ../pre                           (then mllm, then dit)
  python -m nano eval --weights weights/nano --data ../nano_test --out ../report
"""
NANO = Path(__file__).parents[1] / "weights" / "nano"
COMMANDS = {  # the module and the function of each
    "assets": ("assets", "fetch_assets"), "data": ("data", "make_data"), "bench": ("data", "make_bench"),
    "pretrain": ("pretrain", "pretrain"), "ship": ("ship", "ship"), "eval": ("evaluate", "evaluate"),
    "compare": ("evaluate", "compare"),
}  # fmt: skip


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they stand, and the default of every option that has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


def parse_arguments(argv=None):
    about = "A small world to learn editing in."
    parser = argparse.ArgumentParser("python -m nano", description=about, epilog=EXAMPLES, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, says):
        return commands.add_parser(name, help=says, formatter_class=Help).add_argument

    add = command("assets", "fetch emoji and panoramas with npm (100 MB)")
    add("out", metavar="DIR", help="a folder, outside the repository or ignored by it")

    add = command("data", "draw clips and write the three CSVs")
    add("out", metavar="OUT", help="a folder")
    add("--clips", type=number(1), default=1000, help="images, videos and reference videos 2:1:1")
    add("--split", choices=("train", "test"), default="train", help="test: held-out things, places and wordings")
    add("--workers", type=number(1), default=2, help="processes; the files are the same")
    add_world(add)

    add = command("bench", "draw held-out reference cases in RefVIE-Bench's layout")
    add("out", metavar="OUT", help="a folder")
    add("--items", type=number(1), default=24, help="cases")
    add_world(add)

    add = command("pretrain", "train the parts that Kiwi-Edit starts from")
    add("part", choices=("vae", "mllm", "dit", "decoder"), help="in this order; decoder: sharper, over --weights")
    add("--data", required=True, metavar="DIR", help="what `data` wrote")
    add("--out", required=True, metavar="DIR", help="states to resume from, and weights/ for `train.py --weights`")
    add("--weights", metavar="DIR", default=str(NANO), help="whose decoder to train")
    add("--minutes", type=float, default=9, help="stop after so long with exit code 75; the next call goes on")
    add("--steps", type=number(1), help="of the whole training; without it 4000, 1000, 800, 1500")
    add("--batch", type=number(1), help="without it 16 stills or 8 clips, 16, 64, 16 stills or 4 clips")
    add("--seed", type=int, default=0, help="of weights and batches")

    add = command("ship", "make a training checkpoint a folder of weights of its own")
    add("checkpoint", metavar="CHECKPOINT", help="a run of train.py (its last checkpoint), or a weights.safetensors")
    add("--weights", required=True, metavar="DIR", help="what `pretrain` wrote, from which training started")
    add("--data", required=True, metavar="DIR", help="held-out clips, of the size that training saw")
    add("--example", required=True, type=int, metavar="INDEX", help="the clip that bare `python sample.py` edits")
    add("--steps", type=number(1), default=2, help="denoising steps of an edit")
    add("--ref-guidance", type=float, default=1.0, metavar="G", help="of an edit; 1: as trained")
    add("--made-by", required=True, metavar="TEXT", help='the machine, for the model card, e.g. "one H100"')
    add("--out", required=True, metavar="DIR", help="e.g. weights/nano")

    add = command("eval", "measure weights on held-out cases whose truth is known")
    add("--weights", required=True, metavar="PATH", help="a folder with trained weights")
    add("--data", required=True, metavar="DIR", help="what `data --split test` wrote")
    add("--out", required=True, metavar="DIR", help="for eval.md, eval.json and sheet.png")
    add("--assets", metavar="DIR", help="without it where the data had them")
    add("--cases", type=number(1), default=400, help="at most so many")
    add("--steps", type=number(1), help="denoising steps; without it what the weights ask for")
    add("--ref-guidance", type=float, metavar="G", help="how far references are followed; likewise")
    add("--card", action="store_true", help="put the table into the model card that `ship` wrote")

    add = command("compare", "how much better some reports are than others")
    add("reports", nargs="+", metavar="DIR", help="what `eval` wrote: one way, a folder for each seed")
    add("--to", nargs="+", required=True, metavar="DIR", help="another way, on the same cases")
    args = parser.parse_args(argv)
    if args.command in ("data", "bench") and (args.size % 32 or args.frames % 4 != 1):
        parser.error(f"--size {args.size} --frames {args.frames}: a multiple of 32, and 4k + 1 (5, 9, 17, ...)")
    return args


def add_world(add):
    add("--assets", metavar="DIR", help="what `assets` filled; without it shapes and textures alone")
    add("--seed", type=int, default=0, help="of every clip")
    add("--size", type=number(1), default=64, help="pixels a side, a multiple of 32")
    add("--frames", type=number(1), default=9, help="4k + 1")
    add("--fps", type=number(1), default=8, help="frames a second")


def main(argv=None):
    args = parse_arguments(argv)
    module, function = COMMANDS[args.command]
    getattr(import_module(f"nano.{module}"), function)(args)  # torch arrives here


if __name__ == "__main__":
    with one_line("nano", "interrupted; pretraining goes on from its last minute, everything else begins anew"):
        main()
