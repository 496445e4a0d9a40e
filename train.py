"""Train Kiwi-Edit: three stages of the paper on many GPUs, or a LoRA on your own clips on one card.

    tables -> batches of one shape, decoded by workers or taken from a cache (data.py)
      -> latents of target, source, reference; requests, or their cached contexts
      -> noise and a timestep from the sample's number -> KiwiEdit.forward -> loss -> gradients of the global batch
      -> AdamW -> every N steps a checkpoint, written while training goes on

Paper, Section 5.1: the MLLM learns to speak to the DiT, both learn to edit, both learn references. A row of
`STAGES` says what a stage trains. Randomness belongs to samples, by their number, and not to processes: one process,
DDP, FSDP2, sequence parallelism and a run that was killed and resumed give the same losses. The release
cannot resume, takes one sample at a time and replaces broken ones in silence.
"""

import argparse
import json
import math
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from command import number, one_line
from stages import ON_WEIGHTS, STAGES, Stage, choose_stage, with_model_settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: busy-waiting threads slow small steps tenfold

EXAMPLES = """examples:
  python train.py --preset lora --data MY --out runs/mine                    # a LoRA on your own clips, one card
  python train.py --preset distil --data MY --set student=1000,757,522       # a student of 3 forwards, as a LoRA
  python train.py --preset lora --dry-run --cache c --quantise fp8           # what it needs, without weights or data
  torchrun --nproc-per-node 8 train.py --stage 2 --data DIR --weights runs/1 --out runs/2 --resume auto
  python train.py --resume runs/2                                            # go on, with the run's own arguments

--weights is a run (its last checkpoint), a checkpoint folder, a folder that nanoKiwi saved, the released diffusers
  layout, a released training checkpoint (.safetensors) over --base and --qwen, or `random`, with --qwen's config and
  tokenizer. Without it: --base and --qwen alone (nano: weights/nano, or random).
--set takes every field of stages.Stage and stages.Run (steps, lr, seed, workers, save_every, dtype, parallel, ...), and
  of the model's configs (model., dit., vae., mllm.).
"""
KIWI = "linyq/kiwi-edit-5b-instruct-reference-diffusers"  # what a LoRA is trained on by default


def parse_arguments(argv=None):
    doc = "Train Kiwi-Edit: the paper's three stages, a LoRA on your own clips, or a student of few forwards."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, epilog=EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add("--config", default="wan22_5b", choices=("wan22_5b", "wan21_14b", "wan21_1_3b", "nano"), help="model sizes")
    add("--preset", choices=list(STAGES), default="paper", help="whose numbers (default %(default)s)")
    add("--stage", type=int, choices=(1, 2, 3), help="1 align, 2 edit, 3 edit with references (paper, released)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. steps=100 workers=4 (below)")
    add("--mllm", action="store_true", help="also train the language model's LoRA, queries and connectors")
    add("--data", nargs="+", default=["data"], metavar="DIR", help="with image.csv, video.csv, ref_video.csv")
    add("--image-csv", metavar="FILE", help="this instead of DIR/image.csv")
    add("--video-csv", metavar="FILE", help="likewise")
    add("--ref-csv", metavar="FILE", help="likewise")
    add("--base-path", metavar="DIR", help="where paths start in the --*-csv given, or in all tables (default: there)")
    add("--val", metavar="DIR", help="held-out rows, in the same tables: their loss and previews")
    add("--out", metavar="RUN", help="folder of the run: config.json, metrics.jsonl, checkpoints (default: runs/STAGE)")
    add("--weights", metavar="PATH|HUB_ID", help="where to start (see below; default, without --out: the run before)")
    add("--base", metavar="PATH|HUB_ID", help="Wan's weights (default: those of --config on the hub)")
    add("--qwen", metavar="PATH|HUB_ID", help="Qwen2.5-VL's (default: Qwen/Qwen2.5-VL-3B-Instruct)")
    add("--quantise", choices=("fp8", "int8"), help="frozen linears in 8 bits: half the memory of a LoRA's base")
    add("--resume", metavar="auto|PATH", help="auto: from --out's last checkpoint, if any. A run or checkpoint, alone: "
        "with the run's own arguments")  # fmt: skip
    add("--sp", type=number(1), default=1, metavar="N", help="ranks that share a sequence (Ulysses; default 1)")
    add("--cache", metavar="DIR", help="encoded rows, written by `python data.py cache`")
    add("--dry-run", action="store_true", help="print the memory that a card needs, from sizes alone; train nothing")
    add("--gpus", type=number(1), default=1, metavar="N", help="cards of a --dry-run (default %(default)s)")
    add("--export", metavar="RUN", help="write a run's last checkpoint, or a file of one such as ema.safetensors, as a "
        "whole model to --out, LoRA merged")  # fmt: skip
    add("--export-lora", metavar="RUN", help="write the DiT's LoRA of a run to --out")
    add("--format", choices=("peft", "comfy", "kohya"), default="peft", help="of that (default %(default)s)")
    add("--plot", metavar="RUN", help="draw the losses of a run to RUN/loss.svg")
    args = parser.parse_args(argv)
    alone = args.preset in ON_WEIGHTS
    if args.resume not in (None, "auto") and args.stage is None and not alone:
        begun = arguments_of(parser, args.resume)
        parser.set_defaults(**begun)
        args = parser.parse_args(argv)
        args.resume, alone = begun["resume"], args.preset in ON_WEIGHTS
    if (args.export or args.export_lora) and args.out is None:
        parser.error("--export and --export-lora need --out")
    if args.plot or args.export or args.export_lora:
        return args
    if alone:
        args.stage = args.stage or 3
        if args.config == "wan22_5b" and not args.base:
            args.weights = args.weights or KIWI
    elif args.stage is None:
        parser.error("--stage is needed, or --preset lora or distil")
    if args.out is None:
        args.out, before = f"runs/{args.preset if alone else args.stage}", Path(f"runs/{args.stage - 1}")
        if args.weights is None and any(before.glob("step-*")):
            args.weights = str(before)
    return args


def arguments_of(parser, resume):
    """The arguments of the run that --resume names, to be the defaults of this one."""
    path = Path(resume)
    run = path if (path / "config.json").is_file() else path.parent
    try:
        config = json.loads((run / "config.json").read_text())
        begun = config["args"] | {name: str((run / to).resolve()) for name, to in config["began"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"--resume {resume}: not a run or checkpoint; without --stage or --preset give one of these")
    return begun | {"out": str(run), "resume": "auto" if run == path else resume, "dry_run": False}


if __name__ == "__main__":
    parse_arguments()  # parse before importing torch

import torch
from tqdm import tqdm

from cache import CachedPairs, encode, report_bad, write_cache
from checkpoint import Checkpoints, begin_run, export, export_lora, locked, open_run, plot_losses
from data import Pairs, fingerprint, read_pair
from distil import STUDENT, Distillation
from load import HUB_BASES, read_json
from lora import use_adapter
from media import MediaError, write_image, write_video
from model import PRESETS, Contexts, FlowMatch
from parallel import Ranks, parallelise
from sampler import Sampler
from sizing import batch_flops, machine_use, report
from start import belongs, load_model, open_data


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot:
        return plot_losses(Path(args.plot))
    if args.export:
        return export(Path(args.export), Path(args.out), args.base, args.qwen)
    if args.export_lora:
        return export_lora(Path(args.export_lora), Path(args.out), args.format)
    stage = choose_stage(args)
    if args.dry_run:
        config = with_model_settings(PRESETS[args.config], args.set)
        return print(report(config, stage, args.gpus, args.cache, args.quantise))
    ranks = Ranks(stage.parallel, stage.dtype, args.sp, whole="dit" in stage.trains and not stage.write_cache)
    try:
        with locked(Path(args.out), ranks, shared=bool(stage.write_cache)):
            checkpoint = open_run(args, ranks)
            data, stage = open_data(args, stage, ranks)  # first: a slip here should not cost the loading of 5B
            model, cache = load_model(args, stage, ranks, checkpoint, data)
            if stage.write_cache:
                return write_cache(stage, ranks, model, cache, data)
            Trainer(args, stage, ranks, model, data, cache).train(checkpoint)
    finally:
        ranks.leave()


# The loop


class Stopped(BaseException):
    """A signal came while a batch was waited for. No Exception, or a reader of files would take it for a bad sample."""


class Trainer:
    """The loop and what it keeps: model, optimizers, averaged weights, and the counters that a checkpoint holds."""

    def __init__(self, args, stage, ranks, model, data, cache):
        self.args, self.stage, self.ranks, self.model, self.data = args, stage, ranks, model, data
        self.out, self.flow = Path(args.out), FlowMatch(stage.shift, weighting=stage.weighting)
        self.rounded = model.config.dit.bf16_timesteps
        self.counts = Counter(step=0, updates=0, samples=0, tokens=0, bad=0, skipped=0, seconds=0.0)
        self.module = parallelise(model, ranks, stage.checkpointing)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.updated = {name: of_one_rank(p, ranks) for name, p in self.trained.items()}
        self.saved = [name for name in self.trained if belongs(name, stage.trains)]
        self.optimizers = make_optimizers(stage, self.updated)
        self.ema = {name: self.trained[name].detach().clone() for name in self.saved} if stage.ema else {}
        self.distillation = Distillation(model, stage) if stage.student else None
        self.saver = Checkpoints(self.out, stage.keep, ranks)
        if cache:
            self.pairs = CachedPairs(data.tables, data.curriculum, cache)
        else:
            self.pairs = Pairs(data.tables, data.curriculum, model.mllm.resize)
        self.batches, self.stop, self.waiting = None, None, False
        self.trouble = 0  # steps skipped in a row

    def train(self, checkpoint):
        if checkpoint:
            self.restore(checkpoint)
        before = {name: signal.signal(name, self.ask_to_stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.loop()
        finally:  # of an error too
            self.saver.thread.shutdown()  # it needs the process groups
            if hasattr(self.batches, "_shutdown_workers"):  # they ignore SIGTERM: the interpreter would wait for ever
                self.batches._shutdown_workers()
            for name, handler in before.items():
                signal.signal(name, handler)

    def loop(self):
        args, stage, counts, saved = self.args, self.stage, self.counts, time.monotonic()
        if self.ranks.first:
            begin_run(args, stage, self.model, self.out, counts["step"])
        self.ranks.say(self.summary())
        self.batches = iter(self.loader())
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)  # `memory_gib` is of the steps, not of the loading
        if args.val and not counts["step"]:
            self.log({"step": 0, **self.validate()})
        how = {"initial": counts["step"], "desc": f"stage {args.stage}", "disable": not self.ranks.first}
        with tqdm(total=stage.steps, **how) as bar:
            while counts["step"] < stage.steps and (line := self.step()):
                step, late = counts["step"], self.ranks.any(time.monotonic() - saved > 60 * stage.save_minutes)
                if args.val and (step % stage.val_every == 0 or step == stage.steps):
                    line |= self.validate()
                self.log(line)
                shown = {"loss": "{:.4f}", "val": "{:.4f}", "lr": "{:.1e}", "samples_s": "{:.2f}"}
                bar.set_postfix({name: form.format(line[name]) for name, form in shown.items() if name in line})
                bar.update()
                if (step % stage.save_every == 0 or late) and step < stage.steps:
                    self.save()
                    saved = time.monotonic()
                if stage.sample_every and step % stage.sample_every == 0:
                    self.sample(step)
                if self.saver.written and self.saver.written.done():
                    self.saver.wait()  # a full disk is told at once
        if self.saver.last != self.saver.path(counts["step"]):
            self.save()
        self.saver.wait()
        if self.ranks.first:
            hint = f"; go on with --resume {self.out}" if self.stop else ""
            print(f"{self.stop or 'done'}: step {counts['step']} of {stage.steps}, {self.saver.last}{hint}")

    def log(self, line):
        """Append a line to metrics.jsonl."""
        if self.ranks.first:
            with (self.out / "metrics.jsonl").open("a") as file:  # NaN is no JSON
                file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")

    def step(self):
        """One update -> its line of metrics; None if a signal came before its end: then it leaves no trace."""
        started, stage, ranks, counts = time.perf_counter(), self.stage, self.ranks, self.counts
        here, batches, losses, tokens, flops = stage.batches // ranks.dp, [], [], 0, 0.0
        more = self.distillation.begin(counts["step"]) if self.distillation else 0
        for i in range(here):
            batch = self.next_batch()
            if ranks.any(batch is None):
                self.module.zero_grad()
                self.stop = self.stop or "a signal to another rank"
                return None
            if "fatal" in batch:
                raise ValueError(batch["fatal"])
            self.reduce_gradients(i == here - 1)
            draws = [draw(stage.seed, number, self.flow, self.rounded) for number in batch["numbers"]]
            loss, size = self.loss(batch, draws, self.flow, stage.balance)
            (loss / here).backward()
            batch["pictures"] = batch["seen"] = None  # frees them
            batches.append(batch)
            losses.append(loss.detach())
            tokens, flops = tokens + size, flops + batch_flops(self.model.config, stage, size, more)
        rate = learning_rate(stage, counts["step"])
        norm, losses = self.update(rate, losses)
        broken = [bad for batch in batches for bad in batch["bad"]]
        report_bad(self.out, ranks, counts["step"] + 1, broken)
        if not math.isfinite(norm):
            self.skip(norm, batches, losses)
        own = {"tokens": tokens, "flops": flops, "bad": len(broken)}
        for kind in stage.ratio:
            of_kind = [loss for batch, loss in zip(batches, losses) if batch["kind"] == kind]
            own |= {f"loss_{kind}": sum(of_kind), f"batches_{kind}": len(of_kind)}
        all_ = {name: total / ranks.sp for name, total in ranks.total(own).items()}
        seconds = time.perf_counter() - started
        counts.update(step=1, samples=stage.global_batch, tokens=all_["tokens"], bad=all_["bad"], seconds=seconds)
        if 100 * counts["bad"] > stage.max_bad * max(counts["samples"], 100):
            raise ValueError(f"{counts['bad']:.0f} of {counts['samples']} samples cannot be read, more than max_bad="
                             f"{stage.max_bad:g} per cent; see {self.out}/bad.jsonl")  # fmt: skip
        loss = sum(all_[f"loss_{kind}"] for kind in stage.ratio) / stage.batches
        line = {"step": counts["step"], "loss": loss, "grad_norm": norm, "lr": rate, "seconds": seconds,
                "samples_s": stage.global_batch / seconds, "tokens_s": all_["tokens"] / seconds,
                "bad": counts["bad"], "skipped": counts["skipped"]}  # fmt: skip
        for kind in stage.ratio:
            if all_[f"batches_{kind}"]:
                line[f"loss_{kind}"] = all_[f"loss_{kind}"] / all_[f"batches_{kind}"]
        if self.distillation:
            line[f"loss_{self.distillation.turn}"] = loss
        return line | machine_use(ranks, all_["flops"] / seconds)

    def loss(self, batch, draws, flow, balance=False):
        """The mean loss of a batch and the number of its tokens in the DiT."""
        model, device, stage = self.model, self.ranks.device, self.stage
        generators, t, chance = zip(*draws)
        pictures = batch["pictures"]
        if not self.args.cache:
            pictures = [encode(model, stage, *own, c) for own, c in zip(pictures, chance)]
        stack = lambda parts: None if parts[0] is None else torch.stack(parts).to(device).float()
        latents, source, ref = map(stack, zip(*pictures))
        if not stage.source:
            source = None
        loss_of, shape = None, latents.shape[1:]
        if self.distillation:
            loss_of, shape = self.distillation.loss, (self.distillation.noises, *shape)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        if isinstance(batch["seen"][0], torch.Tensor):  # contexts (L, D) from the cache
            requests = Contexts(context[None].to(device, self.ranks.dtype) for context in batch["seen"])
        else:
            requests = [model.mllm.assemble(prompt, *seen) for prompt, seen in zip(batch["prompts"], batch["seen"])]
        frames = latents.shape[2] + (0 if ref is None else ref.shape[2])
        tokens = len(latents) * frames * math.prod(model.dit.grid(latents)[1:])
        apart = self.ranks.world > 1 and stage.ref > 0
        t = torch.stack(t).to(device)
        return self.module(requests, latents, t, source, ref, noise, flow, balance, apart, loss_of), tokens

    def update(self, rate, losses):
        """Clip the gradients and step the optimizers, unless they are not finite -> the gradients' norm and the losses
        as numbers: here a step waits for the device, once."""
        for p, updated in zip(self.trained.values(), self.updated.values()):
            updated.grad = of_one_rank(p.grad, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(self.updated.values(), self.stage.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm, *losses = torch.stack([norm, *losses]).tolist()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                optimizer.step()
            self.counts["updates"] += 1
            self.trouble = 0
            if self.ema:
                weights = [self.trained[name].detach() for name in self.ema]
                torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.stage.ema)
        self.module.zero_grad()
        for updated in self.updated.values():
            updated.grad = None
        return norm, losses

    def skip(self, norm, batches, losses):
        """Report a step whose gradient is not finite, and samples whose loss is not. ValueError for five in a row."""
        self.counts["skipped"] += 1
        self.trouble += 1
        suspects = [path for b, loss in zip(batches, losses) if not math.isfinite(loss) for path in b["paths"]]
        suspects = self.ranks.gathered(suspects)
        samples = ", ".join(suspects[:4]) or f"every loss is finite; the last sample was {batches[-1]['paths'][0]}"
        message = f"step {self.counts['step'] + 1} skipped: its gradient is {norm}; samples: {samples}"
        if self.trouble == 5:
            raise ValueError(f"5 steps in a row were skipped, the loss has diverged: lower lr, or look at the data. "
                             f"The last sound checkpoint: {self.saver.last}. {message}")  # fmt: skip
        self.ranks.say(f"warning: {message}; nothing is saved until a step succeeds")

    def reduce_gradients(self, last):
        """Ranks add their gradients once an update; at each backward where FSDP2 trains whole blocks, since no rank has
        room for all gradients."""
        if hasattr(self.module, "require_backward_grad_sync"):
            self.module.require_backward_grad_sync = last  # DDP
        elif hasattr(self.module, "set_requires_gradient_sync") and "dit" not in self.stage.trains:
            self.module.set_requires_gradient_sync(last)

    # Batches

    def loader(self):
        """Batches of this rank in order, made by worker processes."""
        stage, curriculum, workers = self.stage, self.data.curriculum, self.stage.workers
        steps = range(self.counts["step"], stage.steps)
        order = (number for step in steps for number in rank_batches(curriculum, stage, self.ranks, step))
        if workers:
            room_for_batches(self.data.largest, stage, self.model.config if self.args.cache else None)
        return torch.utils.data.DataLoader(
            self.pairs, None, sampler=order, num_workers=workers, worker_init_fn=leave_signals_to_the_trainer,
            multiprocessing_context="fork" if workers else None,  # a worker has the tokenizer of this process
            timeout=1800 if workers else 0,
        )  # fmt: skip

    def next_batch(self):
        """The next batch; None where a signal asks to stop, also while it is waited for."""
        try:
            self.waiting = True
            batch = None if self.stop else next(self.batches)
            self.waiting = False  # here and not in a `finally`, where the signal would still raise
            return batch
        except Stopped:
            return None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise ValueError(f"{error} Out of memory? Take fewer --set workers=, go on with --resume auto") from None

    def ask_to_stop(self, number, frame):
        if not self.stop:
            self.ranks.say(f"{signal.Signals(number).name}: stopping after the last whole step")
        self.stop = signal.Signals(number).name
        if self.waiting:
            self.waiting = False
            raise Stopped

    # What is looked at

    @torch.no_grad()
    def validate(self):
        """Mean squared error of the held-out rows, each at a timestep in every quarter of the schedule, noise fixed by
        the row's number -> means by kind and by quarter."""
        self.model.eval()
        rows, ranks, flow = self.data.held_out, self.ranks, FlowMatch(self.stage.shift, weighting="none")
        names = [*(f"val_{kind}" for kind in self.stage.ratio), *(f"val_q{q}" for q in (1, 2, 3, 4))]
        sums = dict.fromkeys([*names, *(f"rows of {name}" for name in names)], 0.0)
        for i in range(-(-len(rows) // ranks.dp)):  # as often on every rank
            place = i * ranks.dp + ranks.data_rank
            kind, row, shape = rows[min(place, len(rows) - 1)]
            try:
                pictures, seen = self.pairs.read(row, shape)
            except MediaError as error:
                raise ValueError(f"--val {self.args.val}: {error}") from None
            batch = {"prompts": [row.prompt], "pictures": [pictures], "seen": [seen]}
            for quarter in range(4):
                drawn = draw("held out", 4 * place + quarter, flow, self.rounded, quarter)
                loss = self.loss(batch, [drawn], flow)[0].item()
                for name in (f"val_{kind}", f"val_q{quarter + 1}") if place < len(rows) else ():
                    sums[name] += loss
                    sums[f"rows of {name}"] += 1
        self.model.train()
        sums = ranks.total(sums)
        means = {name: sums[name] / count for name in names if (count := sums[f"rows of {name}"])}
        return {"val": sum(means[f"val_q{q}"] for q in (1, 2, 3, 4)) / 4, **means}

    def sample(self, step):
        """Edit a held-out row of each kind; write source, edit and target side by side."""
        self.model.eval()
        sharded = hasattr(self.model, "unshard")  # called part by part, it needs what lies outside of the blocks
        home = self.ranks.device if self.args.cache and not sharded else None
        for kind, row, shape in self.data.previews:
            pair = None
            try:
                pair = read_pair(row, shape)
            except MediaError as error:  # no reason to end a training
                self.ranks.say(f"warning: no sample of {kind}: {error}")
            if self.ranks.any(pair is None):  # one rank alone would leave the others waiting
                continue
            target, source, ref = pair
            sharded and self.model.unshard()
            if self.distillation:
                use_adapter(self.model.dit, STUDENT)
            how = {"flow": self.flow, "sampler": Sampler(re_noise=self.stage.student), "offload_to": home}
            edited = self.model.edit(source, row.prompt, ref, self.stage.sample_steps, **how)
            sharded and self.model.reshard()
            if self.ranks.first:
                picture = torch.cat([source, edited, target], dim=2)
                path = self.out / "samples" / f"step-{step:06d}-{kind}{'.png' if kind == 'image' else '.mp4'}"
                path.parent.mkdir(exist_ok=True)
                write_image(path, picture[0]) if kind == "image" else write_video(path, picture, 15)
        self.model.train()

    def summary(self):
        """What is trained from what, on what, for how long."""
        stage, args, ranks = self.stage, self.args, self.ranks
        begun, bits = args.weights or args.base or HUB_BASES[args.config], f", base in {args.quantise}"
        lines = [f"from        {begun}, {ranks.parallel} on {ranks.world}, {ranks.dtype}{bits * bool(args.quantise)}"]
        for part in stage.trains:
            if own := [self.trained[name].numel() for name in self.saved if belongs(name, (part,))]:
                lines.append(f"train       {part:<22} {sum(own) / 1e6:10.2f} M parameters")
        for kind, buckets in self.data.curriculum.phases[-1][1].buckets.items():
            sizes = sorted(((len(rows), shape) for shape, rows in buckets.items()), reverse=True)
            rows = sum(count for count, _ in sizes)
            epoch = rows * sum(stage.ratio.values()) / stage.ratio[kind] / stage.global_batch
            shown = ", ".join(f"{count} of {'x'.join(map(str, shape))}" for count, shape in sizes[:4])
            lines.append(f"{kind:<11} {rows} rows, an epoch in {epoch:.4g} steps: {shown}{' ...' * (len(sizes) > 4)}")
        if self.data.held_out:
            lines.append(f"held out    {len(self.data.held_out)} rows of {args.val}")
        return "\n".join(lines)

    # What a checkpoint holds

    def save(self):
        if self.trouble:  # what diverged would push sound checkpoints out
            self.ranks.say(f"warning: not saved; the last sound checkpoint: {self.saver.last}")
            return
        told = {"counts": dict(self.counts), "course": self.course()}
        weights = {name: p for name, p in self.model.named_parameters() if belongs(name, self.stage.trains)}
        self.saver.save(told, weights, self.state(), self.ema)

    def state(self):
        """What a resumed run needs beside weights and counters, as tensors by name; moments before the first update are
        zeros."""
        names, moments = {p: name for name, p in self.updated.items()}, {}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                state = optimizer.state[p]
                for moment in MOMENTS[type(optimizer)]:
                    if moment not in state:
                        state[moment] = torch.zeros((), device=p.device) if moment == "step" else torch.zeros_like(p)
                    moments[f"{names[p]}.{moment}"] = state[moment]
        fake = {name: p.detach() for name, p in self.trained.items() if name not in self.saved}  # the fake score's
        return {"optimizer": moments, "ema": self.ema, "fake": fake}

    def course(self):
        """What shapes the losses, as JSON: {name: value}."""
        here = lambda value: str(Path(value).resolve()) if value and Path(value).exists() else value
        found = {name: getattr(self.stage, name) for name in Stage.__annotations__}  # without those of Run
        found |= {name: here(vars(self.args)[name]) for name in ("config", "weights", "base", "qwen", "quantise")}
        found |= {f"{kind} rows": fingerprint(rows) for kind, rows in self.data.tables.items()}
        return json.loads(json.dumps(found))

    def restore(self, checkpoint):
        """Counters, moments and averaged weights; the weights themselves are loaded with the model."""
        saved = read_json(checkpoint / "train.json")
        self.counts = Counter(saved["counts"])
        if checkpoint.resolve() == self.saver.path(self.counts["step"]).resolve():
            self.saver.last = self.saver.path(self.counts["step"])
        before, now = saved["course"], self.course()
        changed = {name: f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]}
        for name in {"optimizer", "trains", *(["ema"] if not before["ema"] else [])} & changed.keys():
            raise ValueError(f"{checkpoint}: cannot go on with {changed[name]}; leave it, or begin a next stage with "
                             f"--weights {checkpoint.parent} and another --out")  # fmt: skip
        if changed:
            self.ranks.say(f"warning: not as when {checkpoint} was written: {', '.join(changed.values())}")
        self.saver.load(self.state(), checkpoint)


# Order and chance


def draw(seed, number, flow, rounded, quarter=None):
    """Generator of the noise, timestep and a number in [0, 1) of a sample: the same however the run is divided.

    quarter: 0 (the noisiest) to 3 of the schedule's timesteps; None: all of them."""
    # scattered by Python's generator: torch's reads the lower 32 bits of a seed alone
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {number}").getrandbits(32))
    low, high = (0, 1000) if quarter is None else (250 * quarter, 250 * quarter + 250)
    t = flow.timesteps(1000)[torch.randint(low, high, (), generator=generator)]
    return generator, t.bfloat16().float() if rounded else t, torch.rand((), generator=generator).item()


def rank_batches(curriculum, stage, ranks, step):
    """The numbers of this rank's batches in a step. Which batches a step has does not depend on the ranks; they are
    dealt out by size, so that ranks which wait for one another have the same amount of work."""
    numbers = range(step * stage.batches, (step + 1) * stage.batches)
    by_size = sorted(numbers, key=lambda n: (math.prod(curriculum[n][2]), n))
    return by_size[ranks.data_rank :: ranks.dp]


def leave_signals_to_the_trainer(worker):
    """torchrun and Ctrl-C signal workers too; they are needed until the trainer has stopped."""
    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def room_for_batches(shape, stage, cached=None):
    """Workers hand batches over in /dev/shm, two each on their way. ValueError where they do not fit: the loader would
    hang for ever. cached: the config of a model whose latents come from a cache."""
    frames, height, width = shape
    size = 6 * frames * height * width
    if cached:
        size = 8 * cached.vae.z_dim * cached.vae.latent_frames(frames) * height * width // cached.vae.space_stride**2
    need, disk = size * stage.batch * (2 * stage.workers + 1), Path("/dev/shm")
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize if disk.is_dir() else math.inf
    if room < need:
        raise ValueError(f"/dev/shm has {room >> 20} MiB, batches in flight need {need >> 20}: "
                         "docker run --shm-size=8g, or --set workers=0")  # fmt: skip


# Optimizers


def learning_rate(stage: Stage, step):
    """Linear warm-up, then constant or down to nothing."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return stage.lr * decay[stage.schedule]


def of_one_rank(tensor, ranks):
    """A DTensor's memory as a plain tensor where one rank has all of it: each of Muon's thirty operations a matrix
    takes longer to dispatch on a DTensor than a small model's to do."""
    if tensor is None or ranks.world > 1 or not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


def make_optimizers(stage: Stage, trained):
    """AdamW (paper, Section 5.1); or Muon for what is a matrix, its updates as large as AdamW's would be (arXiv
    2502.16982, Eq. 4), and AdamW for the rest. Norms, biases, modulations and queries do not decay.

    A LoRA's alpha is a learning rate of B, alpha / rank times the others': AdamW's steps have the size of the rate, so
    this trains as if the update were scaled, and files keep the factor 1. ValueError for a matrix with fewer rows than
    ranks that share it: torch's Muon cannot update that."""
    boost, muon, adamw = stage.dit_lora_alpha / max(stage.dit_lora_rank, 1) or 1.0, {}, {}
    for name, p in trained.items():
        scale = boost if name.startswith("dit.") and ".lora_B." in name else 1.0
        decay = stage.weight_decay if p.ndim > 1 and not name.endswith(("modulation", "_queries")) else 0.0
        matrix = stage.optimizer == "muon" and p.ndim == 2 and min(p.shape) > 1 and not name.endswith("_queries")
        if matrix and len(p) < (ranks := p.device_mesh.size() if hasattr(p, "device_mesh") else 1):
            raise ValueError(f"--set optimizer=muon: {name} has {len(p)} rows for {ranks} ranks; take a larger "
                             "lora_rank, or adamw")  # fmt: skip
        own = {"params": [], "scale": scale, "weight_decay": decay}
        (muon if matrix else adamw).setdefault((scale, decay), own)["params"].append(p)
    optimizers = []
    if muon:
        optimizers.append(torch.optim.Muon([*muon.values()], stage.lr, adjust_lr_fn="match_rms_adamw"))
    if adamw:
        optimizers.append(torch.optim.AdamW([*adamw.values()], stage.lr, betas=(0.9, stage.beta2), fused=True))
    return optimizers


if __name__ == "__main__":  # the trainer itself saves and ends well when it is interrupted
    with one_line(
        "train.py", "interrupted; a cache that is written goes on where it stopped",
        "--dry-run says what a card needs: take more GPUs, --cache, --quantise, or fewer --set pixels= or frames=",
    ):  # fmt: skip
        main()
