"""Distil an edit of many forwards into one of 2 to 4: `train.py --preset distil` (DMD2, arXiv 2405.14867).

    noise -> student: x0 = x - sigma v, noised anew to the next of its timesteps, ... -> x0     (sampler.py, `re_noise`)
    fake's turn (5 of 6):    the fake score learns by flow matching what the student makes now
    student's turn (1 of 6): x0 noised to a random t; teacher and fake each guess what is clean; x0 moves by the
                             difference, which is the gradient of KL(student || teacher) (Eq. 3 and 4)

One DiT is all three: the teacher without LoRA, student and fake score with a LoRA each, so it fits where LoRA training
fits. The student is trained on what its own earlier steps made (Section 4.5). Data are the training tables: a row gives
source, words and references; its target only measures the student (`--val`). Without the paper's GAN loss
(Section 4.3): the edit's target would be its real sample, and training would ask for a discriminator's head too.
"""

import random

import torch

from lora import use_adapter

STUDENT, FAKE, TEACHER = "default", "fake", None  # adapters; the student's is what a checkpoint holds
TURNS = 6  # the last is the student's (Section 4.2: five updates of the fake score for one of the student)
NOISIEST, CLEANEST = 980, 20  # timesteps of the score: nearer to the ends one of the two guesses is exact


class Distillation:
    """The loss of a `model` whose DiT has LoRA of both names, for a student of the timesteps `stage.student`."""

    def __init__(self, model, stage):
        self.model, self.timesteps, self.seed = model, stage.student, stage.seed
        self.noises = len(stage.student) + 1  # that a sample needs: one a step of the student, one for the score
        self.begin(0)

    def begin(self, step):
        """Choose whose turn it is, and after how many of its steps the student's result is taken -> how many forwards
        the loss takes beside the one that learns."""
        self.turn = "student" if step % TURNS == TURNS - 1 else "fake"
        self.taken = 1 + random.Random(f"{self.seed} {step}").randrange(len(self.timesteps))
        return self.taken + (self.turn == "student")

    def loss(self, latents, context, t, source, ref, noise, flow, balance):
        """As `KiwiEdit.training_loss`, but noise is (B, noises, C, T, H, W). In eval mode the mean squared distance of
        the student's edit to the target."""
        known = (context, *self.model.cast(source, ref))
        if not self.model.training:
            return (self.edit(noise, known, len(self.timesteps), False) - latents).square().mean()
        t, last = t.clamp(CLEANEST, NOISIEST), noise[:, -1]
        x0 = self.edit(noise, known, self.taken, self.turn == "student")
        if self.turn == "fake":
            use_adapter(self.model.dit, FAKE)
            return self.model.training_loss(x0, context, t, source, ref, last, flow)
        with torch.no_grad():
            sigma = (t / 1000).view(-1, 1, 1, 1, 1)
            noisy = (1 - sigma) * x0 + sigma * last
            fake, real = (noisy - sigma * self.velocity(who, noisy, t, known) for who in (FAKE, TEACHER))
            direction = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        use_adapter(self.model.dit, STUDENT)  # recomputed blocks of the backward are the student's
        return 0.5 * (x0 - (x0 - direction).detach()).square().mean()  # its gradient is `direction` over the count

    def edit(self, noise, known, steps, learning):
        """The student's x0 (B, C, T, H, W) after so many of its steps; only the last is differentiated."""
        x = noise[:, 0]
        for i, at in enumerate(self.timesteps[:steps]):
            with torch.set_grad_enabled(learning and i == steps - 1):
                x0 = x - at / 1000 * self.velocity(STUDENT, x, x.new_full((len(x),), at), known)
            if i + 1 < steps:
                sigma = self.timesteps[i + 1] / 1000
                x = (1 - sigma) * x0 + sigma * noise[:, i + 1]
        return x0

    def velocity(self, who, x, t, known):
        use_adapter(self.model.dit, who)
        return self.model.velocity(*self.model.cast(x), t, *known).float()
