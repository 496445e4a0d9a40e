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

NANO = Path(__file__).parents[1] / "weights" / "nano"
EXAMPLES = """examples:
  python -m nano data data/nano --clips 64                    # the README's stories train on these
  python -m nano data ../nano_test --clips 400 --split test
  python -m nano eval --weights weights/nano --data ../nano_test --out ../report
"""


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    about = {"description": "A small world to learn editing in.", "epilog": EXAMPLES, "formatter_class": raw}
    parser = argparse.ArgumentParser("python -m nano", **about)
    commands = parser.add_subparsers(required=True)

    def command(name, function, says):
        chosen = commands.add_parser(name, help=says, description=says)
        chosen.set_defaults(function=function)  # "the file's name.the function's"
        return chosen.add_argument

    def draws(add):
        add("out", metavar="OUT", help="a folder")
        add("--assets", metavar="DIR", help="what `assets` filled; without it shapes and textures alone")
        add("--workers", type=number(1), default=2, help="processes; the files are the same (default 2)")
        add("--seed", type=int, default=0, help="of every clip (default 0)")
        add("--size", type=number(1), default=64, help="pixels a side, a multiple of 32 (default 64)")
        add("--frames", type=number(1), default=9, help="4k + 1 (default 9)")

    add = command("assets", "data.fetch_assets", "fetch emoji and panoramas with npm (100 MB)")
    add("out", metavar="DIR", help="a folder, outside the repository or ignored by it")

    add = command("data", "data.make_data", "draw clips and write the three CSVs")
    draws(add)
    add("--clips", type=number(1), default=1000, help="images, videos and reference videos 2:1:1 (default 1000)")
    add("--split", choices=("train", "test"), default="train", help="test: held-out things, places and wordings")

    add = command("bench", "data.make_bench", "draw held-out reference cases in RefVIE-Bench's layout")
    draws(add)
    add("--items", type=number(1), default=24, help="cases (default 24)")

    add = command("pretrain", "pretrain.pretrain", "train the parts that Kiwi-Edit starts from, in pieces that resume")
    add("part", choices=("vae", "mllm", "dit", "decoder"), help="in this order; decoder: sharper, over --weights")
    add("--data", required=True, metavar="DIR", help="what `data` wrote")
    add("--out", required=True, metavar="DIR", help="states to resume from, and weights/ for `train.py --weights`")
    add("--weights", metavar="DIR", default=str(NANO), help="whose decoder to train (default: weights/nano)")
    add("--minutes", type=float, default=9, help="then stop with exit code 75; the next call goes on (default 9)")
    add("--steps", type=number(1), help="of the whole training (default 4000, 1000, 800, 1500)")
    add("--batch", type=number(1), help="(default 16 stills or 8 clips, 16, 64, 16 stills or 4 clips)")
    add("--seed", type=int, default=0, help="of weights and batches (default 0)")

    add = command("ship", "ship.ship", "make a training checkpoint a folder of weights of its own")
    add("checkpoint", metavar="CHECKPOINT", help="a run of train.py (its last checkpoint), or a weights.safetensors")
    add("--weights", required=True, metavar="DIR", help="what `pretrain` wrote, from which training started")
    add("--data", required=True, metavar="DIR", help="held-out clips, of the size that training saw")
    add("--example", required=True, type=int, metavar="INDEX", help="the clip that bare `python sample.py` edits")
    add("--steps", type=number(1), default=2, help="denoising steps of an edit (default 2)")
    add("--ref-guidance", type=float, default=1.0, metavar="G", help="of an edit (default 1, as trained)")
    add("--made-by", required=True, metavar="TEXT", help='the machine, for the model card, e.g. "one H100"')
    add("--out", required=True, metavar="DIR", help="e.g. weights/nano")

    add = command("eval", "evaluate.evaluate", "measure weights on held-out cases whose truth is known")
    add("--weights", required=True, metavar="PATH", help="a folder with trained weights")
    add("--data", required=True, metavar="DIR", help="what `data --split test` wrote")
    add("--out", required=True, metavar="DIR", help="for eval.md, eval.json and sheet.png")
    add("--cases", type=number(1), default=400, help="at most so many (default 400)")
    add("--steps", type=number(1), help="denoising steps (default: what the weights ask for)")
    add("--ref-guidance", type=float, metavar="G", help="how far references are followed (default: likewise)")
    add("--card", action="store_true", help="put the table into the model card that `ship` wrote")

    add = command("compare", "evaluate.compare", "how much better some reports are than others")
    add("reports", nargs="+", metavar="DIR", help="what `eval` wrote: one way, a folder for each seed")
    add("--to", nargs="+", required=True, metavar="DIR", help="another way, on the same cases")

    args = parser.parse_args(argv)
    if "size" in args and (args.size % 32 or args.frames % 4 != 1):
        parser.error(f"--size {args.size} --frames {args.frames}: a multiple of 32, and 4k + 1 (5, 9, 17, ...)")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    module, function = args.function.split(".")
    getattr(import_module(f"nano.{module}"), function)(args)  # torch arrives here


if __name__ == "__main__":
    with one_line("nano", "interrupted; pretraining goes on from its last minute, everything else begins anew"):
        main()
