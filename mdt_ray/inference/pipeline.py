"""MDTPipeline: class labels to images, as a diffusers pipeline. It opens what `train` and `convert` wrote.

    pipe = MDTPipeline.from_pretrained("runs/digits/train")
    images = pipe(class_labels=[7], generator=torch.manual_seed(0)).images

B images, C latent channels, h x w latent, H x W image.
"""

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from mdt_ray import checkpoints, storage
from mdt_ray.config import VaeConfig
from mdt_ray.data.vae import load_vae
from mdt_ray.diffusion.guidance import Denoiser, guided
from mdt_ray.diffusion.sampling import make_scheduler, sample
from mdt_ray.inference import labels
from mdt_ray.inference.card import model_card
from mdt_ray.inference.sampler import check_weights, load_model
from mdt_ray.models import MDT, DiT, layers

CARD = "README.md"
Generators = torch.Generator | list[torch.Generator] | None


class MDTPipeline(DiffusionPipeline):
    """Class-conditional sampling with MDT, MDTv2 or DiT.

    Args:
        transformer: the denoiser.
        vae: decodes its latents.
        scheduler: any of diffusers' for noise prediction; the default is the papers' DDPM. Swap it as in any pipeline:
            `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`.
        id2label: class number -> name, for labels given as words.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ()

    def __init__(self, transformer: MDT | DiT, vae: AutoencoderKL, scheduler: SchedulerMixin,
                 id2label: dict | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        # (model_index.json has text keys)
        self.register_to_config(id2label={int(k): v for k, v in (id2label or {}).items()})
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor, do_convert_rgb=True)
        self.card: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *, weights: str = "ema",
                        **kwargs: Any) -> "MDTPipeline":
        """Open a checkpoint or training output (path or URI; its newest checkpoint), or any pipeline that save_pretrained or
        the Hugging Face hub holds.

        Args:
            weights: `ema` or `model`, the averaged or the raw weights of a checkpoint, or the name of a further average.
            kwargs: as diffusers' from_pretrained. For a checkpoint: `torch_dtype` (of the transformer; the VAE stays in
                float32), and components that replace those of the checkpoint (`vae=`, `scheduler=`).
        Raises ValueError if there is neither, or the checkpoint's VAE cannot be had.
        """
        path = str(pretrained_model_name_or_path)
        if not checkpoints.is_here(path):
            if path.count("/") != 1 and not Path(path, "model_index.json").is_file():  # (a hub id has one slash)
                raise ValueError(f"from_pretrained: {path!r} holds neither a pipeline (model_index.json), nor a checkpoint "
                                 "(checksums.json), nor a training output (checkpoints/); a file of weights must go through "
                                 "`mdt-ray convert` first")
            pipe = super().from_pretrained(path, **kwargs)
            card = Path(path, CARD)
            pipe.card = card.read_text() if card.is_file() else None
            return pipe
        uri = checkpoints.resolve(path)
        check_weights(uri, weights)
        facts = storage.read_json(storage.join(uri, "state.json"))
        named = VaeConfig(path=facts["vae"]["path"], revision=facts["vae"]["revision"])
        vae = kwargs.pop("vae", None) or load_vae(named).model
        transformer = kwargs.pop("transformer", None) or load_model(uri, weights)
        pipe = cls(transformer.to(kwargs.pop("torch_dtype", None)), vae, kwargs.pop("scheduler", make_scheduler("ddpm")),
                   id2label=labels.id2label(facts["class_names"]))
        if kwargs:
            raise ValueError(f"from_pretrained: {sorted(kwargs)[0]!r} has no meaning for a checkpoint; save_pretrained it, "
                             "and open that")
        pipe.card = model_card(uri)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers' (sharded safetensors, `max_shard_size`, `push_to_hub`), with the model card."""
        super().save_pretrained(save_directory, **kwargs)
        self._write_card(save_directory)

    def _upload_folder(self, working_dir: str | Path, repo_id: str, **kwargs: Any) -> Any:
        self._write_card(working_dir)  # push_to_hub has put an empty one there
        return super()._upload_folder(working_dir, repo_id, **kwargs)

    def _write_card(self, folder: str | Path) -> None:
        if self.card is not None:
            Path(folder, CARD).write_text(self.card)

    @torch.no_grad()
    def __call__(self, class_labels: int | str | Sequence[int | str] | None = None, guidance_scale: float = 3.8,
                 guidance_power: float = 4.0, num_inference_steps: int = 50, generator: Generators = None,
                 guidance_channels: int | None = None, latents: torch.Tensor | None = None, num_images: int = 1,
                 output_type: str = "pil", return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """Draw an image for every class label.

        Args:
            class_labels: class numbers or names; None for an unconditional model.
            guidance_scale: classifier-free guidance; 1 is unguided.
            guidance_power: power s of the power-cosine schedule (paper appendix D); 0 keeps the scale constant. The defaults
                3.8 and 4 are the paper's.
            num_inference_steps: denoising steps (the papers' figures: 250 with DDPM).
            generator: one, or one for each image.
            guidance_channels: guide the first n noise channels only (the published MDT and DiT figures: 3); None guides all.
            latents: the start (B, C, h, w), standard normal, instead of a draw.
            num_images: images of an unconditional model.
            output_type: `pil`, `np` (B, H, W, 3), `pt` (B, 3, H, W), both in [0, 1], or `latent` (B, C, h, w), unscaled.
        Returns: an ImagePipelineOutput, or a tuple. Raises ValueError for unknown labels or wrong arguments.
        """
        y = self._labels(class_labels, num_images)  # (B,)
        denoiser = self._guided(self._denoise, guidance_scale, guidance_power, guidance_channels)
        noise = self._noise(len(y), generator, latents)
        x_0 = sample(denoiser, noise, y, self.scheduler, num_inference_steps, generator, progress=self.progress_bar)
        return self._finish(x_0, output_type, return_dict)

    def _labels(self, class_labels: int | str | Sequence[int | str] | None, num_images: int) -> torch.Tensor:
        num_classes = self.transformer.config.num_classes
        if not num_classes:
            if class_labels is not None:
                raise ValueError(f"class_labels = {class_labels!r}: the model is unconditional; leave them out")
            return torch.zeros(num_images, dtype=torch.long, device=self._execution_device)
        if class_labels is None:
            raise ValueError(f"class_labels = None: name one of the {num_classes} classes for each image")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        class_labels = [class_labels] if isinstance(class_labels, numbers.Integral | str) else class_labels
        if not len(class_labels):
            raise ValueError("class_labels = []: name at least one")
        ids = labels.class_ids(class_labels, self.config.id2label, num_classes)
        return torch.tensor(ids, device=self._execution_device)

    def _guided(self, denoiser: Denoiser, scale: float, power: float, channels: int | None) -> Denoiser:
        config = self.transformer.config
        if channels is not None and not 1 <= channels <= config.in_channels:
            raise ValueError(f"guidance_channels = {channels}: must be in 1..{config.in_channels}, or None")
        if scale == 1 or not config.num_classes:
            return denoiser
        if not config.class_dropout_prob:
            raise ValueError(f"guidance_scale = {scale}: the model was trained without label dropout, so it has no null "
                             "label to be guided by; use 1")
        return guided(denoiser, config.num_classes, scale, power, channels)

    def _denoise(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.transformer(x.to(self.transformer.dtype), t, y)

    def _noise(self, batch: int, generator: Generators, latents: torch.Tensor | None) -> torch.Tensor:
        config = self.transformer.config
        shape = (batch, config.in_channels, *layers.latent_size(config.input_size))
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: {len(generator)} for {batch} images; give one, or one for each image")
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents has shape {tuple(latents.shape)}: must be {shape}")
            return latents.to(self._execution_device)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def _finish(self, x_0: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = x_0 / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        if output_type != "latent":
            images = self.vae.decode(images.to(self.vae.dtype)).sample  # (B, 3, H, W)
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
