"""The run as diffusers knows models: `DiffuSSMPipeline.from_pretrained(FOLDER)`, without remote code.

Importing this module also registers the pipeline's name with diffusers, so that `DiffusionPipeline.from_pretrained`
finds it. Nothing in an exported folder is a program; the classes are those of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from diffussm.config.schema import DiffusionConfig, ModelConfig, PosEmbed, Precision, Sampler
from diffussm.data.autoencoder import Autoencoder
from diffussm.diffusion.process import Process
from diffussm.diffusion.sampling import sample
from diffussm.errors import ConfigError
from diffussm.model.network import DiffuSSM
from diffussm.model.presets import LatentShape
from diffussm.sample import autocast

SAMPLERS = {
    "DDPMScheduler": Sampler.ddpm,
    "DDIMScheduler": Sampler.ddim,
    "DPMSolverMultistepScheduler": Sampler.dpm,
}
"""Schedulers whose update rules `diffussm sample` uses; the folder names one of them."""


class DiffuSSMModel(ModelMixin, DiffuSSM, ConfigMixin):
    """The network with its sizes as a diffusers config; parameter names are those of the training.

    Args:
        width, depth, hourglass, state, pos_embed: as in the `model` section of a run's config.
        channels, height, latent_width: latent (C, H, W).
        class_names: names in label order; label `len(class_names)` is the null class.
        guidance_channels: noise channels that guidance acts on; 0 for all.
        backend: operator backend.
        precision: of the training. With bf16 pictures are drawn under autocast on CUDA, as `diffussm sample` does.
    """

    @register_to_config
    def __init__(
        self,
        width: int,
        depth: int,
        hourglass: int,
        state: int,
        pos_embed: str,
        channels: int,
        height: int,
        latent_width: int,
        class_names: Sequence[str],
        guidance_channels: int = 0,
        backend: str = "auto",
        precision: str = "fp32",
    ) -> None:
        cfg = ModelConfig(
            width=width, depth=depth, hourglass=hourglass, state=state, pos_embed=PosEmbed(pos_embed), backend=backend
        )
        DiffuSSM.__init__(self, cfg, LatentShape(channels, height, latent_width, classes=len(class_names)))


class DiffuSSMPipeline(DiffusionPipeline):
    """Pictures of classes from an exported run.

    The scheduler says which sampler is used and carries the forward process; swap it as diffusers does
    (`pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`). The three in `SAMPLERS` are run over the
    respaced chain and with the noise of `diffussm sample`, so that both give the same pictures.
    """

    model_cpu_offload_seq = "network->vae"

    def __init__(self, network: DiffuSSMModel, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae, scheduler=scheduler)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in label order."""
        return list(self.network.config.class_names)

    def labels(self, classes: Sequence[int | str]) -> list[int]:
        """Labels of class names or numbers; raises ConfigError for one that the model does not know."""
        names = self.class_names
        found = []
        for wanted in classes:
            label = names.index(wanted) if wanted in names else wanted
            if not isinstance(label, int) or not 0 <= label < len(names):
                raise ConfigError(
                    f"class_labels: found {wanted!r}; allowed: 0 to {len(names) - 1}, or {', '.join(names[:20])}"
                    + (", ..." if len(names) > 20 else ""),
                    "see pipe.class_names",
                )
            found.append(label)
        return found

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        seed: int = 0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture for each label.

        Args:
            class_labels: a label or class name, or several.
            guidance_scale: classifier-free guidance scale; 1 is the conditional model.
            num_inference_steps: reverse steps, 1 to T.
            seed: seed of all noise; picture i belongs to (seed, first_index + i), whatever is drawn beside it.
            first_index: index of the first picture.
            generator: if given, the seed is drawn from it instead.
            output_type: pil, np ((N, H, W, 3) uint8) or latent ((N, C, H, W) float32).
            return_dict: an ImagePipelineOutput, else a tuple.

        Raises:
            ConfigError: an unknown class, scheduler or output type.
        """
        kind = SAMPLERS.get(type(self.scheduler).__name__)
        if kind is None:
            raise ConfigError(
                f"scheduler: found {type(self.scheduler).__name__}; allowed: {', '.join(SAMPLERS)}",
                "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)",
            )
        if output_type not in ("pil", "np", "latent"):
            raise ConfigError(f"output_type: found {output_type!r}; allowed: pil, np, latent")
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        several = [class_labels] if isinstance(class_labels, int | str) else class_labels
        config = self.network.config
        with self.progress_bar(total=num_inference_steps) as bar:
            device = self._execution_device
            with autocast(Precision(config.precision), device):
                latents = sample(
                    self.network,
                    self._process(),
                    torch.tensor(self.labels(several), dtype=torch.int64),  # (N,)
                    (config.channels, config.height, config.latent_width),
                    sampler=kind,
                    steps=num_inference_steps,
                    guidance=guidance_scale,
                    guidance_channels=config.guidance_channels,
                    seed=seed,
                    null_class=self.network.null_label,
                    first_index=first_index,
                    device=device,
                    progress=lambda done, total: bar.update(),
                )  # (N, C, H, W)
        images = self._finished(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _finished(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pictures = Autoencoder(self.vae, "vae", "").decode(latents)  # (N, H, W, 3) uint8
        return self.numpy_to_pil(pictures / 255.0) if output_type == "pil" else pictures

    def _process(self) -> Process:
        config = self.scheduler.config
        return Process(
            DiffusionConfig(
                timesteps=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end
            )
        )


def scheduler(kind: Sampler, cfg: DiffusionConfig) -> Any:
    """diffusers' scheduler of a sampler, over the whole forward process of `cfg`.

    Betas are quoted for T = 1000 in a config and rescaled for other T; the scheduler carries the config's own numbers
    and T, from which the pipeline builds the very same process.
    """
    common: dict[str, Any] = {
        "num_train_timesteps": cfg.timesteps,
        "beta_start": cfg.beta_start,
        "beta_end": cfg.beta_end,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }
    if kind is Sampler.ddpm:
        return diffusers.DDPMScheduler(**common, variance_type="learned_range", clip_sample=False)
    if kind is Sampler.ddim:
        return diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    return diffusers.DPMSolverMultistepScheduler(
        **common, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )


diffusers.DiffuSSMPipeline = DiffuSSMPipeline
