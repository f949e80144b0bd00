"""Every key of a config: type, default and one line of help, the literal string under the field.

Lengths of training are counted in images (`_images`), never in steps, so that batch size and cluster may change
without changing what a config means. Other units: `_s` seconds, `_px` pixels, `_bytes` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from diffussm.config.schema_data import DataConfig, Precision, PrepareConfig
from diffussm.config.schema_data import OnCorrupt as OnCorrupt
from diffussm.config.schema_data import Source as Source
from diffussm.config.schema_data import Stored as Stored
from diffussm.config.schema_jobs import KubernetesConfig, PlanConfig, SlurmConfig


class SnapshotDtype(Enum):
    """Numbers in which stored snapshots of the averages are kept."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class PosEmbed(Enum):
    """Positional embedding added after the stem."""

    none = "none"
    sincos = "sincos"


class Sampler(Enum):
    """Reverse process used for sampling."""

    ddpm = "ddpm"
    ddim = "ddim"
    dpm = "dpm"


class Labels(Enum):
    """Classes of the generated pictures of an evaluation."""

    data = "data"
    balanced = "balanced"
    random = "random"


class Pace(Enum):
    """How checkpoint.every_images is meant."""

    fixed = "fixed"
    auto = "auto"


class WandbMode(Enum):
    """How metrics reach Weights & Biases."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class ModelConfig:
    """The DiffuSSM network."""

    preset: str = "S"
    """Named size (tiny, emoji, S, B, L, XL); width and depth override it when set."""
    width: Optional[int] = None
    """Channels D of the residual stream; null takes the preset's."""
    depth: Optional[int] = None
    """Number of blocks; null takes the preset's."""
    hourglass: int = 2
    """Hourglass ratio M: dense layers run on a sequence M times shorter; divides latent height times width."""
    state: int = 64
    """State size N of each channel's state-space model (N/2 conjugate pairs); even."""
    pos_embed: PosEmbed = PosEmbed.none
    """Positional embedding after the stem; the state-space model itself knows positions."""
    backend: str = "auto"
    """Operator backend: auto, or one named by `diffussm doctor`; a named backend is used or refused."""


@dataclass
class DiffusionConfig:
    """Forward process and loss."""

    timesteps: int = 1000
    """Length T of the forward process."""
    beta_start: float = 1e-4
    """First beta of the linear schedule (for T = 1000; rescaled by 1000/T otherwise)."""
    beta_end: float = 0.02
    """Last beta of the linear schedule (for T = 1000; rescaled by 1000/T otherwise)."""
    label_drop: float = 0.1
    """Probability that a sample's label is replaced by the null class, for guidance."""


@dataclass
class ProfileConfig:
    """Traces of single steps, in the run's folder `profiles`."""

    at_images: list[int] = field(default_factory=list)
    """Each step in which the image of one of these numbers is seen is traced; [] traces none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace."""
    memory: bool = True
    """Also say which operators take memory, and on a GPU keep a snapshot of the allocator."""


@dataclass
class TrainConfig:
    """Optimisation."""

    images: int = MISSING
    """Length of the training in images seen."""
    global_batch: int = 256
    """Images for each optimiser step over all ranks; fixed for the run."""
    micro_batch: int = 0
    """Images for each forward pass on one rank; 0: global_batch / workers. Accumulation follows from it."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    beta1: float = 0.9
    """First AdamW beta."""
    beta2: float = 0.999
    """Second AdamW beta."""
    weight_decay: float = 0.0
    """AdamW weight decay of the dense layers; state-space parameters never decay."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0."""
    decay_images: int = 0
    """Images at the end over which the learning rate falls linearly to 0; 0 keeps it constant."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    precision: Precision = Precision.bf16
    """bf16 (autocast; parameters stay fp32) or fp32."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage 0, 1, 2 or 3."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    ema: float = 0.9999
    """Decay of the weights' exponential moving average for each 256 images' step; scaled to the global batch."""
    power_ema: list[float] = field(default_factory=list)
    """Relative widths (EDM2's sigma_rel) of power-function averages that are kept besides; [] keeps none."""
    ema_snapshot_images: int = 0
    """Images between two snapshots of the power averages, of which `diffussm ema` makes any length; 0: images / 64."""
    ema_snapshot_dtype: SnapshotDtype = SnapshotDtype.fp32
    """Numbers in the snapshots: fp32, or bf16 or fp16 in half the room (a slice that fp16 cannot hold stays fp32)."""
    keep_ema_snapshots: int = 0
    """Newest snapshots that are kept; 0 keeps all, and lengths can be made as of any time of the training."""
    start_from: str = ""
    """Run whose newest checkpoint, or <run>/checkpoints/<images>, gives the first weights, averages and moments."""
    log_images: int = 25_600
    """Images between two logged lines."""
    max_nonfinite_steps: int = 20
    """Non-finite steps in a row after which the run stops; each is skipped, counted and shown."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of single steps."""


@dataclass
class CheckpointConfig:
    """Saved state. It is copied in the step and written on a thread."""

    every_images: int = 2_560_000
    """Images between two checkpoints in storage; one is always saved at the end."""
    pace: Pace = Pace.fixed
    """fixed; or auto: shorter than every_images where measured cost and faults make it pay (Young and Daly)."""
    fault_every_s: float = 86_400
    """Seconds between faults that auto expects before the run has had any; then what happened counts too."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones go once a newer one was read back and verified."""
    milestone_images: int = 0
    """Images between two checkpoints that are kept for ever; 0 keeps none for ever."""
    deadline_s: float = 600
    """Seconds each rank has to bring its file of a checkpoint to storage; later the save counts as failed."""
    max_failures: int = 3
    """Failed saves in a row after which the run stops; each is told and tried again at the next interval."""
    local: str = ""
    """Folder on the node for more frequent checkpoints besides those in storage; all ranks must see it. Empty: none."""
    local_every_images: int = 0
    """Images between two checkpoints in the local folder."""
    local_keep: int = 1
    """Newest checkpoints that are kept in the local folder."""


@dataclass
class ClusterConfig:
    """Ray workers."""

    workers: int = 1
    """Training workers (ranks)."""
    workers_per_node: int = 0
    """Workers on each node, equally many on all; 0: all on one node. A run shrinks and grows by whole nodes."""
    gpus_per_worker: float = 0
    """GPUs of each worker; 0 trains on the CPU with gloo."""
    cpus_per_worker: float = 1
    """CPU cores Ray reserves for each worker."""
    threads_per_worker: int = 1
    """Threads torch uses in each worker."""
    address: str = ""
    """Address of a running Ray cluster; empty starts one on this machine for the run."""
    min_workers: int = 0
    """Smallest number of workers to go on with when nodes are lost; 0 never shrinks and waits for nodes."""
    wait_nodes_s: float = 600
    """Seconds to wait for missing nodes before the run stops with `infrastructure`."""
    max_failures: int = 3
    """Faults of one cause (worker, node, hang ...) that are answered by a new start before the run stops."""
    failure_window_s: float = 3600
    """Seconds after which a fault no longer counts against max_failures."""
    health_check_interval_s: float = 0.5
    """Seconds between two looks at the workers."""
    heartbeat_interval_s: float = 0.5
    """Seconds between two heartbeats of a rank; they bring back what is asked of it."""
    hang_s: float = 300
    """Seconds without progress after which the group counts as hung and is restarted, once it has made a step."""
    start_s: float = 1800
    """Seconds that a start until the first step, or a save, may take before it counts as hung."""
    standby: bool = False
    """Keep beside each rank one more process that has imported everything (about 1 GB): a restart finds it ready."""
    grace_s: float = 30
    """Seconds between a warning (SIGTERM, SIGUSR1, notice file) and the kill: the time there is to save."""
    notice_file: str = ""
    """File whose appearance on a node of the job is a warning, as clouds write it; empty watches none."""


@dataclass
class SampleConfig:
    """Pictures drawn from the model."""

    sampler: Sampler = Sampler.ddpm
    """ddpm (ancestral), ddim or dpm (DPM-Solver++)."""
    steps: int = 250
    """Reverse steps, respaced from diffusion.timesteps."""
    guidance: float = 1.5
    """Classifier-free guidance scale; 1 samples the conditional model alone."""
    guidance_channels: int = 3
    """Guide the first n latent channels (3, as DiT's code does) or all of them (0)."""
    every_images: int = 0
    """Images of training between two grids of saved checkpoints, while training goes on; 0: only at the end."""
    per_class: int = 8
    """Columns of the sample grid: pictures for each class."""
    batch: int = 64
    """Pictures in one forward pass (guidance doubles it)."""
    seed: int = 0
    """Seed of noise; picture i is the same for any batch size and number of workers."""
    ema: str = "plain"
    """Weights to sample from: plain (train.ema), power-0.050 (0.05 of train.power_ema) or none (as trained)."""
    weights: str = ""
    """Safetensors file or s3:// object of weights that `diffussm ema` wrote, instead of a checkpoint's; empty: none."""


@dataclass
class EvaluateConfig:
    """The score."""

    enabled: bool = True
    """Score the model at the end of training."""
    every_images: int = 0
    """Images of training between two evaluations of saved checkpoints, while training goes on; 0: only at the end."""
    images: int = 50_000
    """Generated pictures the score is computed from."""
    labels: Labels = Labels.data
    """Classes of the pictures: data (in its proportions), balanced (each equally often) or random (as DiT does)."""
    extractor: str = "efflite0"
    """Feature network: efflite0 (FD-EffLite0), inception (FID, sFID, IS) or module:attribute (any torch module)."""
    weights: str = ""
    """Weights file of the extractor inception; empty looks where torch's hub keeps downloads."""
    reference: str = ""
    """An .npz of real pictures and statistics, as ADM publishes; empty: the whole training set."""
    batch: int = 64
    """Pictures in one forward pass of the extractor."""
    block_images: int = 256
    """Pictures that are stored at a time: a killed evaluation loses less than these for each worker."""
    workers: int = 0
    """Ray workers that draw and score; 0: as many as train."""


@dataclass
class ObserveConfig:
    """Where progress goes besides the terminal and metrics.jsonl."""

    wandb: WandbMode = WandbMode.auto
    """auto follows WANDB_MODE and WANDB_API_KEY and is offline without them; or offline, online, disabled."""
    project: str = "diffussm"
    """W&B project."""
    tensorboard: bool = False
    """Also write event files for TensorBoard into the run's folder `tensorboard`."""
    telemetry_images: int = 25_600
    """Images between two looks at norms by block, averages and nodes (telemetry.jsonl); 0: none, nor loss by t."""


@dataclass
class Config:
    """A run: everything that decides its result, and where it lives."""

    name: str = MISSING
    """Name of the run; its folder below storage. Starting the same name again resumes it."""
    storage: str = "runs"
    """Folder or s3:// URL that holds all runs."""
    seed: int = 0
    """Seed of initial weights, sample order, noise, timesteps, label drops and flips; frozen after the first start."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and latents."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Making of the latents."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Forward process and loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saved state."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Workers."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Pictures."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Score."""
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    """Logging."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Cost."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """Kubernetes job."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Slurm job."""
