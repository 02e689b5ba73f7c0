"""One DMD2 iteration written the straightforward way, from the paper and plain diffusers modules: what benches compare with.

Three whole networks (teacher, generator, fake score), a call of the teacher for each branch of the guidance, text encoders
that run at every iteration, AdamW over two whole networks. Nothing here knows of the package's Triple or Denoiser. Noise
comes from the same `Draws`, so that losses can be held against the package's own (`tests/tools/test_bench_step.py` does).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from stepdistill.diffusion.draws import Draws


class _Reached(Exception):
    """Leaves a forward pass with the mid block's output, which is all that the discriminator wants."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


class PlainDMD2:
    """DMD2 (Yin et al. 2024) for Stable Diffusion 1.x: latents (B, 4, h, w), epsilon prediction, backward simulation, GAN.

    Args:
        teacher: frozen here; generator and fake score start as its copies.
        head: the discriminator, mid-block features (B, C, h, w) -> logits (B,).
        scheduler: gives the noise levels.
        steps: network calls of the student.
        ratio: fake-score updates per generator update.
        guidance: teacher guidance scale w.
        dtype: in bfloat16 the teacher is held in it and the trained networks are float32 under autocast, as is usual.
        gan_weight, critic_weight: of the adversarial terms.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        head: nn.Module,
        scheduler: DDPMScheduler,
        *,
        steps: int = 4,
        ratio: int = 5,
        guidance: float = 7.0,
        gan_weight: float = 5e-3,
        critic_weight: float = 1e-2,
        lr: float = 1e-5,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.dtype = next(teacher.parameters()).device, dtype
        self.generator, self.fake_score = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
        self.teacher = teacher.eval().requires_grad_(False).to(dtype)
        if checkpointing:
            for network in (self.generator, self.fake_score):
                network.enable_gradient_checkpointing()
        self.tokenizer, self.text_encoder = tokenizer, text_encoder.eval().requires_grad_(False)
        self.head, self.scheduler = head, scheduler
        self.ratio, self.guidance = ratio, guidance
        self.gan_weight, self.critic_weight = gan_weight, critic_weight
        self.timesteps = [999 - i * (1000 // steps) for i in range(steps)]
        self.critic_parameters = [*self.fake_score.parameters(), *head.parameters()]
        self.generator_optimizer = torch.optim.AdamW(self.generator.parameters(), lr=lr, weight_decay=0.01)
        self.critic_optimizer = torch.optim.AdamW(self.critic_parameters, lr=lr, weight_decay=0.01)

    def iteration(self, number: int, prompts: Sequence[str], images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Train on prompts and as many latents of real images; returns the losses by role."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._iteration(number, prompts, images, draws)

    def _iteration(self, number: int, prompts: Sequence[str], images: Tensor, draws: Draws) -> dict[str, Tensor]:
        cond, null = self.encode(prompts), self.encode([""] * len(prompts))
        losses = {}
        due = number % self.ratio == 0
        sample = self.rollout(cond, images.shape[1:], draws, graph=due)
        if due:
            losses["generator"] = self.train_generator(sample, cond, null, draws.for_role("generator"))
        losses["fake_score"] = self.train_fake_score(sample.detach(), cond, images, draws.for_role("fake_score"))
        return losses

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token embeddings (B, 77, D)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]  # type: ignore[no-any-return]

    def rollout(self, cond: Tensor, shape: Sequence[int], draws: Draws, *, graph: bool) -> Tensor:
        """The student's sample at a random step of its own walk (backward simulation, section 4.5)."""
        draws = draws.for_role("rollout")
        leave = int(draws.batch_uniform("exit") * len(self.timesteps))
        x = draws.normal("noise", shape)
        for index in range(leave):
            with torch.no_grad():
                x0 = self.x0(self.generator, x, self.times(self.timesteps[index], cond), cond)
            x = self.noised(x0, draws.normal(f"fresh{index}", shape), self.times(self.timesteps[index + 1], cond))
        with torch.set_grad_enabled(graph):
            return self.x0(self.generator, x, self.times(self.timesteps[leave], cond), cond)

    def train_generator(self, x: Tensor, cond: Tensor, null: Tensor, draws: Draws) -> Tensor:
        """Distribution matching (section 3) plus the generator's side of the GAN (section 4.3)."""
        self.fake_score.requires_grad_(False)
        self.head.requires_grad_(False)
        t = 20 + (draws.uniform("dm.t") * 961).long()
        with torch.no_grad():
            noisy = self.noised(x, draws.normal("dm.eps", x.shape[1:]), t)
            real_cond = self.x0(self.teacher, noisy, t, cond)
            real_null = self.x0(self.teacher, noisy, t, null)
            real = real_null + self.guidance * (real_cond - real_null)
            fake = self.x0(self.fake_score, noisy, t, cond)
            direction = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        matching = 0.5 * F.mse_loss(x, (x - direction).detach())
        adversarial = F.softplus(-self.logits(x, cond, "gan", draws)).mean()
        loss = matching + self.gan_weight * adversarial
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 10.0)
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad()
        self.fake_score.requires_grad_(True)
        self.head.requires_grad_(True)
        return loss.detach()

    def train_fake_score(self, x: Tensor, cond: Tensor, images: Tensor, draws: Draws) -> Tensor:
        """Denoising of generated samples plus the discriminator's loss."""
        t = (draws.uniform("fake.t") * 1000).long()
        eps = draws.normal("fake.eps", x.shape[1:])
        predicted = self.fake_score(self.noised(x, eps, t), t, encoder_hidden_states=cond).sample
        denoising = F.mse_loss(predicted, eps)
        real = self.logits(images, cond, "gan.real", draws)
        fake = self.logits(x, cond, "gan.fake", draws)
        loss = denoising + self.critic_weight * (F.softplus(-real).mean() + F.softplus(fake).mean())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.critic_parameters, 10.0)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        return loss.detach()

    def logits(self, x: Tensor, cond: Tensor, purpose: str, draws: Draws) -> Tensor:
        """The discriminator on noised samples, by the fake score's mid block."""

        def leave(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> None:
            raise _Reached(output)

        t = (draws.uniform(f"{purpose}.t") * 1000).long()
        noisy = self.noised(x, draws.normal(f"{purpose}.eps", x.shape[1:]), t)
        handle = self.fake_score.mid_block.register_forward_hook(leave)
        try:
            self.fake_score(noisy, t, encoder_hidden_states=cond)
        except _Reached as reached:
            return self.head(reached.features)  # type: ignore[no-any-return]
        finally:
            handle.remove()
        raise RuntimeError("the mid block was never called")

    def x0(self, network: UNet2DConditionModel, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The network's estimate of the clean latents."""
        bar = self.scheduler.alphas_cumprod.to(self.device)[t].reshape(-1, 1, 1, 1)
        eps = network(x, t, encoder_hidden_states=cond).sample
        return (x - (1 - bar).sqrt() * eps) / bar.sqrt()

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(x0, eps, t)  # type: ignore[no-any-return]

    @staticmethod
    def times(t: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), t, device=like.device)
