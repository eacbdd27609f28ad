"""The settings of the four jobs, as frozen dataclasses: no behaviour beyond checking values.

A field is *identity* unless declared with `operational(...)`: identity fields name a run (their change is refused in an
existing output folder), operational ones are free to change at a resume. The text under a field is its help text.
"""

import re
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

NUM_TIMESTEPS = 1000
"""Steps of the diffusion process (paper section 5.1)."""
NUM_IMAGENET_IMAGES = 1_281_167
"""The training set of ImageNet-1k (ILSVRC 2012)."""
NON_COMMERCIAL = "cc-by-nc-4.0"
"""The licence of the published weights of MDT and DiT."""


def operational(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A dataclass field that may change at a resume without making it another run."""
    return field(default=default, default_factory=default_factory, metadata={"operational": True})


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raise ValueError naming field, value and rule unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


def check_sigma_rel(name: str, value: float) -> None:
    """Raise ValueError unless `value` is the length of a power-function average whose weights grow with the step: 12^-1/2 is
    that of the plain mean of all steps."""
    require(0 < value < 12**-0.5, name, value, "must be between 0 and 0.2886 (a standard deviation, in shares of the run)")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """How many processes a job runs in and what each takes from the cluster."""

    num_workers: int = operational(1)
    """Processes that work at the same time."""
    cpus_per_worker: float = operational(1)
    """CPUs that each reserves from Ray; also its number of torch threads (at least one)."""
    gpus_per_worker: float = operational(0)
    """GPUs that each reserves from Ray."""

    def __post_init__(self):
        require(self.num_workers >= 1, "workers.num_workers", self.num_workers, "must be at least 1")
        require(self.cpus_per_worker > 0, "workers.cpus_per_worker", self.cpus_per_worker, "must be positive")
        require(self.gpus_per_worker >= 0, "workers.gpus_per_worker", self.gpus_per_worker, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Which diffusers AutoencoderKL turns images into latents and back."""

    path: str = "stabilityai/sd-vae-ft-mse"
    """Local folder, hub id (user/repository or user/repository/subfolder), or one in the package: `digits`, `fashion`."""
    revision: str | None = None
    """Hub revision (commit); None takes the newest."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Job `precompute`: images -> VAE posterior (mean and std) -> Parquet."""

    source: str = operational("")
    """Images (URI): a folder with a subfolder per class or a table of labels; Parquet files; WebDataset tars; `digits`."""
    labels: str = operational("")
    """CSV or Parquet with columns file and label (URI), for a folder without a subfolder per class."""
    output: str = operational("")
    """Folder (URI) that gets the latents and their manifest."""
    vae: VaeConfig = VaeConfig()
    """The autoencoder."""
    image_size: int = 256
    """Side of the square centre crop, in pixels."""
    exif_rotation: bool = False
    """Turn each picture as its EXIF data say (the published models were trained without)."""
    flip: bool = False
    """Also encode every mirror image (a latent cannot simply be mirrored)."""
    chunk_size: int = 4096
    """Images per output file: the unit of work and of restart."""
    encode_batch_size: int = 64
    """Images per VAE call; part of the identity, since convolutions are not batch-invariant to the last bit."""
    rows_per_group: int = 128
    """Rows of a Parquet row group, the unit of shuffled reading."""
    validation_share: float = 0.01
    """Share of images held out from training, chosen by a hash of their id."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast dtype of the VAE."""
    max_rejected: float = operational(0.01)
    """Share of images that may turn out unreadable before the job stops."""
    decoders_per_worker: int = operational(4)
    """Tasks, of one CPU each on any node, that read ahead and decode for one encoder."""
    workers: WorkersConfig = operational(WorkersConfig())
    """The pool of encoder actors."""

    def __post_init__(self):
        require(self.image_size > 0, "image_size", self.image_size, "must be positive")
        require(self.chunk_size > 0, "chunk_size", self.chunk_size, "must be positive")
        require(self.encode_batch_size > 0, "encode_batch_size", self.encode_batch_size, "must be positive")
        require(self.rows_per_group > 0, "rows_per_group", self.rows_per_group, "must be positive")
        require(0 <= self.validation_share < 1, "validation_share", self.validation_share, "must be in [0, 1)")
        require(0 <= self.max_rejected <= 1, "max_rejected", self.max_rejected, "must be in [0, 1]")
        require(self.decoders_per_worker > 0, "decoders_per_worker", self.decoders_per_worker, "must be positive")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`latents inspect`: what a folder of latents holds."""

    folder: str = operational("")
    """Folder (URI) that `precompute` wrote."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """`latents verify`: whether a folder of latents is whole."""

    folder: str = operational("")
    """Folder (URI) that `precompute` wrote."""
    decode: int = operational(0)
    """Also decode so many latents beside their source images, into decoded.png there, and give their PSNR."""
    source: str = operational("")
    """Where the source images lie now; by default where `precompute` read them."""

    def __post_init__(self):
        require(self.decode >= 0, "decode", self.decode, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer. Fields left None are taken from the latents."""

    kind: Literal["mdt_v1", "mdt_v2", "dit"] = "mdt_v1"
    """MDT of the paper, MDTv2 (long skips), or the DiT baseline (no masking, no relative bias, fixed positions)."""
    input_size: int | None = None
    """Side of the latent, in latent pixels."""
    in_channels: int | None = None
    """Channels of the latent."""
    num_classes: int | None = None
    """Number of classes; the null label is this number. 0 trains an unconditional model, which ignores the labels."""
    patch_size: int = 2
    """Side of a token, in latent pixels."""
    hidden_size: int = 384
    """Width of a token."""
    depth: int = 12
    """Number of blocks, encoder and decoder together."""
    num_heads: int = 6
    """Attention heads."""
    decode_layer: int = 2
    """Last blocks that form the decoder, which sees all tokens (the paper's N2, Table 4)."""
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null label in training, for classifier-free guidance."""
    masking: Literal["asymmetric", "symmetric"] = "asymmetric"
    """The masked pass: the encoder sees the kept tokens only, or all with mask tokens in the hidden places (Table 5a)."""
    num_side_blocks: int = 1
    """Blocks of the side-interpolator (Table 5f); 0 leaves it out (Table 5b)."""
    masked_shortcut: bool = True
    """Kept tokens pass the side-interpolator unchanged (Table 5c)."""
    decoder_positions: bool = True
    """Add a position embedding before the side-interpolator, at inference before the decoder (Table 5g)."""
    learnable_positions: bool = True
    """Train the position embeddings (Table 5h)."""
    relative_position_bias: bool = True
    """Bias attention by relative position (Table 5i)."""

    def __post_init__(self):
        for name in ("patch_size", "hidden_size", "depth", "num_heads"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(self.hidden_size % self.num_heads == 0, "model.hidden_size", self.hidden_size,
                f"must be divisible by num_heads = {self.num_heads}")
        require(self.hidden_size % 4 == 0, "model.hidden_size", self.hidden_size,
                "must be divisible by 4 (sin-cos positions)")
        require(0 <= self.class_dropout_prob < 1, "model.class_dropout_prob", self.class_dropout_prob,
                "must be in [0, 1)")
        require(self.num_side_blocks >= 0, "model.num_side_blocks", self.num_side_blocks, "must not be negative")
        require(self.num_classes is None or self.num_classes >= 0, "model.num_classes", self.num_classes,
                "must not be negative")
        if self.kind != "dit":
            require(0 <= self.decode_layer <= self.depth, "model.decode_layer", self.decode_layer,
                    f"must be between 0 and depth = {self.depth}")
        if self.kind == "mdt_v2":
            require((self.depth - self.decode_layer) % 2 == 0, "model.decode_layer", self.decode_layer,
                    f"depth = {self.depth} less this must be even: MDTv2 pairs the encoder's blocks")
        if self.input_size is not None:
            require(self.input_size % self.patch_size == 0, "model.patch_size", self.patch_size,
                    f"must divide the latent size {self.input_size}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What a training step asks of the model."""

    mask_ratio: float = 0.3
    """Share of tokens hidden from the encoder in the masked pass (paper Table 3); DiT has no masked pass."""
    mask_ratio_span: float = 0.0
    """Draw the ratio of every step from [mask_ratio, mask_ratio + span], kept tokens in multiples of 8 (MDTv2: 0.2)."""
    passes: Literal["full+masked", "full", "masked"] = "full+masked"
    """Passes of a step, their losses added (Table 5d). With `full` the model has no parts for masking."""
    tokens: Literal["all", "masked"] = "all"
    """Tokens that count in the loss of the masked pass (Table 5e)."""
    min_snr_gamma: float | None = None
    """Weigh the squared error by min(snr, gamma) / snr (MDTv2: 5); None weighs all timesteps alike."""

    def __post_init__(self):
        require(0 <= self.mask_ratio < 1, "loss.mask_ratio", self.mask_ratio, "must be in [0, 1)")
        require(0 <= self.mask_ratio_span < 1 - self.mask_ratio, "loss.mask_ratio_span", self.mask_ratio_span,
                f"mask_ratio = {self.mask_ratio} and the span must sum to less than 1")
        require(self.tokens == "all" or self.mask_ratio > 0, "loss.mask_ratio", self.mask_ratio,
                "must be above 0 for a loss on masked tokens")
        require(self.min_snr_gamma is None or self.min_snr_gamma > 0, "loss.min_snr_gamma", self.min_snr_gamma,
                "must be positive, or None")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its learning rate."""

    name: Literal["adamw", "adan", "muon"] = "adamw"
    """AdamW (the paper), Adan (MDTv2), or Muon for the matrices of the blocks and AdamW for the rest."""
    lr: float = 3e-4
    """Peak learning rate, also of Muon: its updates have the size of AdamW's."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """What follows the warm-up."""
    schedule_steps: int | None = None
    """Step at which the cosine ends, or from which the rate falls as 1 / sqrt(step); needed for those two. It is not
    num_steps, so that a longer run stays the same run."""
    final_lr_share: float = 0.05
    """Share of the peak at which the cosine ends."""
    clip_norm: float | None = None
    """Largest global gradient norm; None does not clip."""

    def __post_init__(self):
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.schedule == "constant" or (self.schedule_steps or 0) > self.warmup_steps, "optim.schedule_steps",
                self.schedule_steps, f"a schedule of kind {self.schedule} needs it, above warmup_steps")
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm,
                "must be positive, or None")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The moving averages of the weights: the one that is sampled from, and further ones kept at the same time."""

    decay: float = 0.9999
    """Decay per step."""
    warmup: bool = False
    """Use min(decay, (1 + n) / (10 + n)) at step n, for short runs."""
    more_decays: tuple[float, ...] = ()
    """Decays of further averages, kept in every checkpoint as ema_<decay>."""
    power_stds: tuple[float, ...] = ()
    """Lengths (sigma_rel) of power-function averages, kept as ema_power_<std>; EDM2 takes 0.05 0.10. `mdt-ray ema` makes
    any other length from their snapshots."""
    snapshot_every_steps: int = operational(0)
    """Steps between two snapshots of the power-function averages, which are never deleted; 16 or more a run are enough."""

    def __post_init__(self):
        for name, decay in [("decay", self.decay), *(("more_decays", d) for d in self.more_decays)]:
            require(0 <= decay < 1, f"ema.{name}", decay, "must be in [0, 1)")
        require(len({f"{d:g}" for d in (self.decay, *self.more_decays)}) == 1 + len(self.more_decays), "ema.more_decays",
                self.more_decays, f"must differ from each other and from decay = {self.decay}, in the first six digits")
        for std in self.power_stds:
            check_sigma_rel("ema.power_stds", std)
        require(len({f"{s:.3f}" for s in self.power_stds}) == len(self.power_stds), "ema.power_stds", self.power_stds,
                "must differ from each other in the first three decimals")
        require(self.snapshot_every_steps >= 0, "ema.snapshot_every_steps", self.snapshot_every_steps,
                "must not be negative")
        require(not self.power_stds or self.snapshot_every_steps > 0, "ema.snapshot_every_steps",
                self.snapshot_every_steps, "must be positive where there are power_stds; a sixteenth of num_steps will do")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where the rows of metrics also go while a run trains; TensorBoard's event files are always written."""

    mlflow: str = operational("")
    """MLflow's tracking URI (http://..., sqlite:///mlflow.db, databricks); empty: off. Needs mdt-ray[mlflow]."""
    experiment: str = operational("mdt-ray")
    """MLflow's experiment; made where there is none."""
    wandb: str = operational("")
    """Project of Weights & Biases, or team/project; empty: off. Needs mdt-ray[wandb]."""
    name: str = operational("")
    """Name that a new run gets in MLflow and Weights & Biases; empty: that of the output folder."""

    def __post_init__(self):
        require(self.experiment != "", "track.experiment", self.experiment, "must not be empty")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an image is drawn from a checkpoint."""

    sampler: Literal["ddpm", "ddim", "dpm-solver++"] = "ddpm"
    """The diffusers scheduler: ancestral (the papers' protocol), DDIM, or second-order DPM-Solver++."""
    num_sampling_steps: int = 250
    """Model evaluations per image."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 is unguided."""
    cfg_power: float = 0.0
    """Power s of the power-cosine guidance schedule (paper appendix D); 0 keeps the scale constant."""
    cfg_channels: int | None = None
    """Guide only the first n noise channels (the published models: 3); None guides all."""
    cfg_interval: tuple[int, int] | None = None
    """Guide only from the first to the last of these timesteps (0 is clean, 999 noise); outside, the unconditional pass is
    skipped. None guides all along."""
    guide: str = operational("")
    """Checkpoint of a smaller or less trained model that takes the place of the unconditional prediction (autoguidance,
    arXiv 2406.02507); its content is part of the identity."""
    guide_weights: str = "ema"
    """Folder of the guide to take, as `weights`."""
    round_pixels: bool = False
    """Round to uint8 (as DiT) instead of truncating (as MDT)."""
    weights: str = "ema"
    """Folder of the checkpoint to take: averaged weights, raw ones (model), or a further average (ema_0.999)."""

    def __post_init__(self):
        require(1 <= self.num_sampling_steps <= 1000, "sampling.num_sampling_steps", self.num_sampling_steps,
                "must be between 1 and 1000")
        require(self.cfg_scale >= 0, "sampling.cfg_scale", self.cfg_scale, "must not be negative")
        require(self.cfg_power >= 0, "sampling.cfg_power", self.cfg_power, "must not be negative")
        require(self.cfg_channels is None or self.cfg_channels > 0, "sampling.cfg_channels", self.cfg_channels,
                "must be positive, or None for all")
        low, high = self.cfg_interval or (0, NUM_TIMESTEPS - 1)
        require(0 <= low <= high < NUM_TIMESTEPS, "sampling.cfg_interval", self.cfg_interval,
                f"must be two timesteps, the smaller first, of 0..{NUM_TIMESTEPS - 1}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Job `sample`: checkpoint -> pictures."""

    checkpoint: str = operational("")
    """Checkpoint folder (URI), or a training output, whose newest checkpoint is taken."""
    output: str = operational("")
    """Folder (URI) for images/, grid.png and samples.npz."""
    classes: tuple[str, ...] = ()
    """Names or numbers of the classes to draw; none: labels at random."""
    num_samples: int = 16
    """Images to draw; where classes are named, of each."""
    seed: int = 0
    """Image i is drawn from seed + i: with labels at random, the image that `evaluate` draws."""
    sampling: SamplingConfig = SamplingConfig(sampler="dpm-solver++", num_sampling_steps=50, cfg_scale=3.8, cfg_power=4.0)
    """The sampler; by default few steps, guided as in the paper's pictures."""
    batch_size: int = operational(32)
    """Images per model call."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast dtype of the model; the VAE always decodes in fp32."""
    compile: bool = False
    """Compile the blocks (torch.compile): some seconds at the start, faster steps, images within a grey level in fp32."""

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """Job `inpaint`: pictures with a part of them hidden -> pictures."""

    checkpoint: str = operational("")
    """Checkpoint folder (URI), or a training output, whose newest checkpoint is taken."""
    images: str = operational("")
    """Pictures, as `precompute --source`: a file, a folder, Parquet; their content is part of the identity."""
    output: str = operational("")
    """Folder (URI) for images/ and grid.png."""
    mask: str = operational("")
    """Picture that is white where to fill in, for all; its content is part of the identity."""
    mask_ratio: float | None = None
    """Instead of a mask, the share of tokens to hide, drawn for each picture."""
    classes: tuple[str, ...] = ()
    """Name or number of the class of all pictures, or of each; none: the null label."""
    num_images: int = 8
    """The first pictures, of which all must be readable."""
    seed: int = 0
    """Picture i is drawn from seed + i."""
    side_interpolator: bool | None = None
    """Use the masked pass; None does where it sees the noise (MDTv2)."""
    sampling: SamplingConfig = SamplingConfig(sampler="dpm-solver++", num_sampling_steps=50)
    """The sampler."""

    def __post_init__(self):
        require(self.num_images > 0, "num_images", self.num_images, "must be positive")
        require(len(self.classes) in (0, 1, self.num_images), "classes", self.classes,
                f"must be none, one, or one for each of num_images = {self.num_images}")
        require(not self.mask or self.mask_ratio is None, "mask_ratio", self.mask_ratio, "give it or a mask, not both")
        require(not self.sampling.guide and self.sampling.cfg_interval is None, "sampling",
                self.sampling.guide or self.sampling.cfg_interval, "inpainting has no guide and no interval; leave them out")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Job `evaluate`: checkpoint -> samples -> metrics; or metrics of pictures made elsewhere."""

    checkpoint: str = operational("")
    """Checkpoint folder (URI), or a training output, whose newest checkpoint is taken."""
    samples: str = operational("")
    """Instead of a checkpoint: pictures made elsewhere, an .npz with arr_0 (N, H, W, 3) uint8, or as `precompute
    --source`."""
    output: str = operational("")
    """Folder (URI) for chunks of features, metrics.json and metrics.parquet."""
    reference: str = operational("")
    """What to compare with: reference statistics (an .npz with mu and sigma: the official ones, or made by `reference`), or
    real images, as `samples`."""
    sampling: SamplingConfig = SamplingConfig()
    """The sampler."""
    extractor: Literal["inception", "dinov2", "digits", "fashion"] = "inception"
    """The feature network. Only Inception's metrics go without its name: fid_50k, but fd_dinov2_50k, fid_digits_1k."""
    extractor_weights: str = operational("")
    """Its weights: a file, URI or URL (Inception), a folder or hub id (DINOv2); by default the published ones."""
    num_samples: int = 50_000
    """Images to draw, or to take of `samples`."""
    num_seed_ranges: int = operational(1)
    """Repeat with as many further ranges of seeds, and report mean, minimum, maximum and spread."""
    seed: int = 0
    """Image i is drawn from seed + i."""
    labels: Literal["random", "balanced"] = "random"
    """Labels uniform at random (the papers' way), or every class in turn."""
    chunk_size: int = 500
    """Images per chunk: the unit of work and of restart."""
    sample_batch_size: int = 100
    """Images per model call."""
    keep_images: int = 1000
    """The first images that are kept, for pictures."""
    latents: str = operational("")
    """The latents that the model was trained on: writes neighbours.png, the training images nearest to the kept samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast dtype of the model; VAE and extractor always compute in fp32."""
    compile: bool = False
    """Compile the blocks (torch.compile): some seconds at the start, faster steps, images within a grey level in fp32."""
    adm_float16: bool = operational(False)
    """Precision and recall by distances in float16, as ADM's evaluator computes them; they move by about 0.001."""
    workers: WorkersConfig = operational(WorkersConfig())
    """The pool of samplers, each with one GPU at most, of which it leaves a fifth to the decoders and feature networks."""

    def __post_init__(self):
        for name in ("num_samples", "num_seed_ranges", "chunk_size", "sample_batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(not (self.samples and self.checkpoint), "samples", self.samples,
                f"have no use for a checkpoint, but checkpoint = {self.checkpoint!r}; leave one out")
        require(self.num_samples >= 4, "num_samples", self.num_samples, "must be at least 4 (three neighbours)")
        require(self.workers.gpus_per_worker <= 1, "workers.gpus_per_worker", self.workers.gpus_per_worker,
                "must be at most 1: a sampler computes on one GPU")
        require(not (self.latents and self.samples), "latents", self.latents,
                "are compared with drawn samples only; leave it out")
        require(not self.latents or self.keep_images > 0, "keep_images", self.keep_images,
                "must be positive where latents are given: kept images are compared with them")
        require(not (self.samples and self.num_seed_ranges > 1), "num_seed_ranges", self.num_seed_ranges,
                "samples that exist have no seeds; leave it out")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Job `reference`: real images -> the statistics that `evaluate` compares with."""

    source: str = operational("")
    """Real images: as `precompute --source`, or an .npz with arr_0 (N, H, W, 3) uint8."""
    output: str = operational("")
    """Folder (URI) for chunks of features and reference.npz."""
    image_size: int = 256
    """Side to crop to, as the model's images; those of an .npz must have it."""
    extractor: Literal["inception", "dinov2", "digits", "fashion"] = "inception"
    """The feature network."""
    extractor_weights: str = operational("")
    """Its weights, as `evaluate`."""
    num_images: int = 10_000
    """Images to keep in the file, spread over all by a fixed shuffle: precision, recall and KID compare with these."""
    chunk_size: int = 500
    """Images per chunk: the unit of work and of restart."""
    workers: WorkersConfig = operational(WorkersConfig())
    """The pool of feature networks."""

    def __post_init__(self):
        for name in ("image_size", "num_images", "chunk_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Job `evaluate sweep`: settings of sampling on one checkpoint, every combination, without training."""

    output: str = operational("")
    """Folder (URI) for an evaluation of each setting, the table, the picture and the best setting."""
    cfg_scale: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Guidance scales."""
    cfg_power: tuple[float, ...] = ()
    """Powers of the guidance schedule; none: as evaluate.sampling, and so below."""
    cfg_interval: tuple[tuple[int, int], ...] = ()
    """Intervals of guidance; 0 999 is all along."""
    num_sampling_steps: tuple[int, ...] = ()
    """Model evaluations per image."""
    weights: tuple[str, ...] = ()
    """Averages of the weights."""
    evaluate: EvaluateConfig = EvaluateConfig(num_samples=5000, keep_images=64)
    """What all have in common."""

    def __post_init__(self):
        require(not self.evaluate.samples, "evaluate.samples", self.evaluate.samples,
                "exist already, a sweep draws its own; name a checkpoint")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Job `train`: latents -> checkpoints."""

    latents: str = operational("")
    """Folder (URI) that `precompute` wrote; its content, not its place, is part of the identity."""
    output: str = operational("")
    """Folder (URI) for checkpoints and metrics."""
    init_from: str = operational("")
    """Weights to start from: a checkpoint, a published file or a diffusers DiT. Its content is part of the identity."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    loss: LossConfig = LossConfig()
    """The training objective."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    ema: EmaConfig = EmaConfig()
    """The averaged weights."""
    batch_size: int = 256
    """Images per step, over all workers."""
    num_lanes: int = 64
    """Equal parts of a batch that each have their own images and random numbers (at most as many workers)."""
    seed: int = 0
    """Seed of weights, order and noise."""
    flip: bool = False
    """Take the mirror image of every image with p = 0.5; needs latents precomputed with --flip."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Autocast to bf16, or float32 (with TF32 matrix products on a GPU, or without); auto takes bf16 where the hardware has
    it, else fp32."""
    gradient_checkpointing: bool = operational(False)
    """Keep a block's inputs only and compute the rest again in the backward pass: less memory, the same bits, slower."""
    compile: bool = operational(False)
    """Compile the blocks, and Adan (torch.compile): some minutes at the start, faster steps, sums in another order."""
    deterministic: bool = operational(False)
    """On a GPU too, kernels that give the same bits every time; slower. (On CPUs they always do.)"""
    num_steps: int = operational(400_000)
    """Steps to train to."""
    workers: WorkersConfig = operational(WorkersConfig())
    """DDP workers."""
    accumulation: int = operational(1)
    """Micro-batches, of whole lanes, that a worker takes one after the other in a step: less memory, same gradients."""
    log_every_steps: int = operational(50)
    """Steps between two rows of metrics."""
    checkpoint_every_steps: int = operational(5_000)
    """Steps between two checkpoints."""
    keep_last: int = operational(2)
    """Newest checkpoints kept."""
    keep_every_steps: int = operational(0)
    """Also keep every checkpoint at a multiple of this step (0: none)."""
    validate_every_steps: int = operational(5_000)
    """Steps between two measurements of the loss on held-out images, by the averaged weights (0: none)."""
    sample_every_steps: int = operational(0)
    """Steps between two previews, drawn from a checkpoint by a task beside training (0: none)."""
    samples: EvaluateConfig = operational(EvaluateConfig(num_samples=1000, keep_images=64))
    """How previews are drawn and measured; without a reference only a picture is made. Checkpoint and output are given."""
    min_workers: int = operational(0)
    """Go on with as few as these when nodes are lost, and with more as nodes come (0: always with num_workers)."""
    hang_timeout_s: float = operational(1800.0)
    """Seconds without a step after which the workers' stacks are written and they are started again (0: never)."""
    track: TrackConfig = operational(TrackConfig())
    """Experiment trackers."""

    def __post_init__(self):
        for name in ("keep_every_steps", "validate_every_steps", "sample_every_steps", "min_workers", "hang_timeout_s"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.sample_every_steps % self.checkpoint_every_steps == 0, "sample_every_steps", self.sample_every_steps,
                f"must be a multiple of checkpoint_every_steps = {self.checkpoint_every_steps}")
        require(self.min_workers <= self.workers.num_workers, "min_workers", self.min_workers,
                f"must not exceed workers.num_workers = {self.workers.num_workers}")
        for name in ("batch_size", "num_lanes", "num_steps", "log_every_steps", "checkpoint_every_steps", "keep_last",
                     "accumulation"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(self.model.kind != "dit" or self.loss.passes != "masked", "loss.passes", self.loss.passes,
                "DiT has no masked pass; use 'full'")
        require(self.batch_size % self.num_lanes == 0, "num_lanes", self.num_lanes,
                f"must divide batch_size = {self.batch_size}")
        require(self.workers.num_workers <= self.num_lanes, "workers.num_workers", self.workers.num_workers,
                f"must not exceed num_lanes = {self.num_lanes}: a worker owns whole lanes")
        require(self.workers.num_workers * self.accumulation <= self.num_lanes, "accumulation", self.accumulation,
                f"times workers.num_workers = {self.workers.num_workers} must not exceed num_lanes = {self.num_lanes}: a "
                "micro-batch is whole lanes")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Job `plan`: what a training run would take. The settings of `train`, and what is assumed of machine and data."""

    gpu: Literal["a100-40gb", "a100-80gb", "h100", "h200"] = operational("a100-40gb")
    """The GPUs: their memory must suffice, their peak speed gives the time (not used with workers.gpus_per_worker 0)."""
    mfu: float = operational(0.35)
    """Assumed share of the GPU's peak that the model's operations reach (the published XL/2's 18.5 images/s are 0.15 of an
    A100's TF32)."""
    images_per_second: float | None = operational(None)
    """Measured rate of all workers together (a run logs it); wins over mfu."""
    num_images: int = operational(NUM_IMAGENET_IMAGES)
    """Images to train on, as long as there are no latents to count."""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.mfu <= 1, "mfu", self.mfu, "must be in (0, 1]")
        require(self.images_per_second is None or self.images_per_second > 0, "images_per_second", self.images_per_second,
                "must be positive, or None")
        require(self.num_images > 0, "num_images", self.num_images, "must be positive")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Job `tune`: a search space over training and sampling settings -> a ranked table.

    Trials are known by their settings: what the folder already holds of them is not run again. Fields that are None take
    what the space says, else the default named.
    """

    output: str = operational("")
    """Folder (URI) for the trials and their table."""
    space: str = operational("mask_ratio_decoder_depth")
    """A file of tune_spaces/ by name, or the path of one of your own."""
    train: TrainConfig = TrainConfig()
    """The settings that a trial changes. Every checkpoint kept for good (keep_every_steps) is judged, the last one ranks."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How a trial is judged, by one process with what a worker of its training has; keys of a space that begin with
    `evaluate.sampling.` change it."""
    search: Literal["grid", "random", "optuna"] | None = operational(None)
    """Which points of the space are tried: all combinations, independent draws, or what Optuna's TPE suggests (grid)."""
    scheduler: Literal["none", "asha", "median"] | None = operational(None)
    """Trials that end early for their validation loss: none, the worse two thirds at each of ASHA's rungs, or those worse
    than the median of the others (none)."""
    grace_share: float = operational(0.2)
    """Share of its steps that every trial is given before it may be ended early."""
    cost: Literal["none", "train_seconds", "num_parameters"] | None = operational(None)
    """What the report draws quality against, and Optuna keeps low too (none)."""
    equal: Literal["steps", "flops"] | None = operational(None)
    """What all trials are given: train.num_steps, or as many steps as cost what these cost with the settings of `train`
    (steps)."""
    num_seeds: int | None = operational(None)
    """Trials of each point, with train.seed and the ones after it: the same seeds for all points (1)."""
    max_trials: int | None = operational(None)
    """At most so many points: needed for draws and suggestions (all of a grid)."""
    max_gpu_hours: float | None = operational(None)
    """Hours of GPUs that the trials may take, over all runs of the command; where they have none, hours of workers. Then
    running trials write a checkpoint, and what has ended is ranked."""
    time_limit: float | None = operational(None)
    """Hours that one run of the command may take, with the same end."""
    max_concurrent_trials: int = operational(0)
    """Trials that run at the same time (0: as many as there is room for)."""
    retry_failed: bool = operational(False)
    """Run trials again that failed."""

    def __post_init__(self):
        require(self.max_concurrent_trials >= 0, "max_concurrent_trials", self.max_concurrent_trials, "must not be negative")
        require(0 < self.grace_share < 1, "grace_share", self.grace_share, "must be in (0, 1)")
        for name in ("num_seeds", "max_trials"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        for name in ("max_gpu_hours", "time_limit"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Job `convert`: weights of MDT, MDTv2, DiT or diffusers' DiT <-> checkpoints. The shapes show nearly all settings."""

    source: str = operational("")
    """A .pt, .pth or .safetensors file, a diffusers folder, or (for a way back) a checkpoint of ours."""
    output: str = operational("")
    """Folder (URI) for the checkpoint; for a way back a .pt file, or a folder for diffusers_dit."""
    to: Literal["mdt_ray", "mdt_v1", "mdt_v2", "dit", "diffusers_dit"] = "mdt_ray"
    """Ours, or the layout of the way back."""
    vae: VaeConfig = VaeConfig()
    """The autoencoder that the weights were trained with; it is named in the checkpoint."""
    num_heads: int | None = None
    """Attention heads, where the shapes do not show them (a DiT of another width than S, B, L, XL)."""
    decode_layer: int | None = None
    """Decoder blocks of an MDT v1 (2 in all published ones)."""
    input_size: int | None = None
    """Side of the latent, where the tokens do not show it."""
    class_dropout_prob: float | None = None
    """0 if the label table has no null label."""
    image_size: int | None = None
    """Side of the images, in pixels; None: 8 times the latent's side."""
    license: str = NON_COMMERCIAL
    """For the model card: the licence of the published weights of MDT and DiT; name that of your own ones."""
    weights: str = "ema"
    """For a way back: folder of the checkpoint to take, as --sampling.weights."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Job `ema`: snapshots of power-function averages -> a checkpoint averaged over any length."""

    source: str = operational("")
    """Output (URI) of a training run with ema.power_stds; the content of its snapshots is part of the identity."""
    output: str = operational("")
    """Folder (URI) for the checkpoint."""
    sigma_rel: float | None = None
    """Length of the average: standard deviation of its weights over the steps, in shares of the run so far."""
    step: int | None = None
    """Step whose average is wanted, from the snapshots up to it; None takes the newest snapshot's."""

    def __post_init__(self):
        if self.sigma_rel is not None:
            check_sigma_rel("sigma_rel", self.sigma_rel)
        require(self.step is None or self.step > 0, "step", self.step, "must be positive")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which cluster `submit list`, `submit logs` and `submit stop` ask, and of which job."""

    job: str = operational("")
    """Its name, as `submit` and `submit list` print it."""
    address: str = operational("")
    """The cluster's dashboard, as http://127.0.0.1:8265; by default that of RAY_API_SERVER_ADDRESS, or of a Ray here."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Job `submit`: another command of mdt-ray, run on a cluster. Its words come after these settings."""

    command: tuple[str, ...] = operational(())
    """The job and its settings, as after `mdt-ray`."""
    address: str = operational("")
    """The cluster's dashboard, as http://127.0.0.1:8265; by default that of RAY_API_SERVER_ADDRESS, or of a Ray here."""
    name: str = operational("")
    """Name of the job on the cluster; without one the command's first words and the time."""
    working_dir: str = operational(".")
    """What is uploaded, but for what its .rayignore or .gitignore names; the command runs in there. Where it holds no
    mdt_ray, the installed package is uploaded beside it."""
    detach: bool = operational(False)
    """Do not wait for its end."""
    stop_seconds: int = operational(120)
    """What a stopped job has to write its checkpoint, before it is killed."""

    def __post_init__(self):
        require(self.stop_seconds > 0, "stop_seconds", self.stop_seconds, "must be positive")
        require(re.fullmatch(r"[\w.-]*", self.name, re.ASCII) is not None, "name", self.name,
                "may have letters, digits, '.', '_' and '-'")  # it is part of a file's name there, and of addresses


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """All four jobs in order, then the report page."""

    output: str = operational("runs/digits")
    """Folder that gets a subfolder for each job and for the report."""
    precompute: PrecomputeConfig = PrecomputeConfig()
    """Images to latents."""
    train: TrainConfig = TrainConfig()
    """Latents to checkpoints."""
    tune: TuneConfig = TuneConfig()
    """The sweep."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Guided samples and their metrics; the unguided ones differ only in cfg_scale."""
