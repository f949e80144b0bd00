"""DiffuSSM: attention-free latent diffusion, trained at scale."""

__version__ = "0.1.0"
