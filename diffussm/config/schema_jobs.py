"""Sections that say where and at what cost a run runs; `schema.py` takes them in, and its docstring holds here too."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass
class PlanConfig:
    """What `diffussm plan` cannot know from the run itself."""

    machine: str = "H100"
    """Row of the table of cards: A100, H100, H200 or B200."""
    gpus_per_node: int = 8
    """GPUs in one node."""
    efficiency: float = 0.0
    """Fraction of the card's peak that training reaches; 0 takes the table's."""
    gpu_hour_price: float = 0.0
    """Price of one GPU for one hour; 0 takes the table's."""
    store_bytes_per_s: float = 1e9
    """Bytes that one node writes to the store in a second."""
    dataset_images: int = 0
    """Number of images in the data set, for as long as its latents are not made; 0: not known."""
    dataset_classes: int = 0
    """Number of classes, likewise; 0: those of data.classes."""


@dataclass
class KubernetesConfig:
    """The RayJob that `diffussm submit --to kubernetes` renders."""

    namespace: str = "default"
    """Namespace of all objects."""
    image: str = ""
    """Image of every pod, with tag or digest; cluster/Dockerfile builds one."""
    image_pull_secrets: list[str] = field(default_factory=list)
    """Names of secrets that may fetch the image."""
    env_from_secrets: list[str] = field(default_factory=list)
    """Names of secrets whose keys become variables in the pods: AWS_ACCESS_KEY_ID, WANDB_API_KEY and such."""
    service_account: str = ""
    """Service account of the pods; empty: one is made that may do nothing."""
    queue: str = ""
    """Kueue's local queue; the job waits suspended until there is room for all of its pods."""
    priority_class: str = ""
    """Kueue's workload priority class."""
    node_selector: list[str] = field(default_factory=list)
    """Labels of nodes for the workers, KEY=VALUE."""
    tolerations: list[str] = field(default_factory=list)
    """Taints that the workers tolerate, KEY:EFFECT or KEY=VALUE:EFFECT."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource that a GPU is."""
    extra_resources: list[str] = field(default_factory=list)
    """Further resources of each worker pod, NAME=COUNT, for example rdma/ib=1."""
    claims: list[str] = field(default_factory=list)
    """Persistent volume claims to mount, CLAIM=FOLDER; not needed when everything lies in buckets."""
    head_cpus: float = 4
    """CPU cores of the head's pod, which runs the driver and no rank."""
    head_memory_bytes: int = 16 << 30
    """Memory of the head's pod."""
    worker_memory_bytes: int = 64 << 30
    """Memory of each worker pod, its shared memory included."""
    shm_bytes: int = 8 << 30
    """Size of /dev/shm in each pod: Ray, the data loader and NCCL use it."""
    retries: int = 20
    """New clusters that the operator starts after a preemption or a fault; each goes on from the newest checkpoint."""
    submitter_retries: int = 2
    """Times the small pod that hands the job to its cluster is started again."""
    keep_finished_s: int = 3600
    """Seconds after its end at which the job is removed; the run stays in its storage."""
    deadline_s: int = 0
    """Seconds after which the operator ends the job; 0: never."""
    user_id: int = 1000
    """User and group of all processes; not root."""
    read_only_root: bool = True
    """Whether the root file system of the pods is read-only; /tmp and the home folder are volumes."""


class Container(Enum):
    """What runs a container image on Slurm's nodes."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class SlurmConfig:
    """The job that `diffussm submit --to slurm` renders."""

    partition: str = ""
    """Partition, or several separated by commas; empty takes the cluster's default."""
    account: str = ""
    """Account that is charged; empty takes the user's default."""
    qos: str = ""
    """Quality of service; empty takes the default."""
    constraint: str = ""
    """Features that nodes must have, as Slurm writes them: gpu80gb&ib."""
    exclude: str = ""
    """Nodes not to use, as Slurm writes them: n[01-03]."""
    gres: str = ""
    """Generic resources of each node; empty: gpu:N for the N GPUs that its workers need."""
    time_s: int = 86_400
    """Time limit in seconds; before it ends the run is saved and put into the queue again; 0: the partition's."""
    exclusive: bool = True
    """Whether nodes are used alone."""
    cpus_per_node: int = 0
    """CPU cores of each node; 0: what its workers reserve and two more."""
    node_memory_bytes: int = 0
    """Memory in bytes of each node; 0: all of it on exclusive nodes, else the partition's default."""
    warning_s: int = 300
    """Seconds before the end at which Slurm warns; preemption's grace should be as long."""
    max_restarts: int = 20
    """Infrastructure errors in a row (no saved preemption, no hour of work between them) that are tried again."""
    start_timeout_s: int = 300
    """Seconds within which all nodes must have joined the Ray cluster."""
    dependency: str = ""
    """What must happen before, as Slurm writes it: afterok:1234, singleton."""
    begin: str = ""
    """Earliest start, as Slurm writes it: now+1hour, 2026-01-31T20:00."""
    array_limit: int = 0
    """Jobs of a sweep that run at the same time; 0: any number."""
    logs: str = "logs"
    """Folder on the shared file system for the output of jobs."""
    python: str = ""
    """Python on the nodes, with diffussm installed; empty: the one that submits, in a container its python3."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load, in this order."""
    environment: list[str] = field(default_factory=list)
    """Variables for all processes, NAME=VALUE; no secrets: the scheduler shows the script to others."""
    container: Container = Container.none
    """none, pyxis (srun --container-image) or apptainer."""
    image: str = ""
    """Container image, as the container's runtime names it."""
    mounts: list[str] = field(default_factory=list)
    """Folders to mount into the container, OUTSIDE:INSIDE."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, each --name=value."""
