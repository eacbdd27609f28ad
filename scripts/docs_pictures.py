"""Draw the pictures of docs/: the architecture, and inpainting by a checkpoint of the digits.

    python scripts/docs_pictures.py --checkpoint runs/digits-v2
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import DPMSolverMultistepScheduler
from matplotlib.patches import FancyBboxPatch

from mdt_ray.data import images, listings, readers, sources
from mdt_ray.data.vae import to_unit_range
from mdt_ray.evaluation.small import is_held_out
from mdt_ray.inference.inpaint import MDTInpaintPipeline

DOCS = Path(__file__).parents[1] / "docs"
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
KEPT, HIDDEN, PART, ONLY_V2 = "#3b6ea5", "#d9d9d9", "#f4efe6", "#b5563c"


def architecture(path: Path) -> None:
    """The masked pass from left to right, the full pass below it; v2's skips in red."""
    figure, axes = plt.subplots(figsize=(11, 5.4))
    axes.set(xlim=(0, 110), ylim=(-2, 54))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, text: str, colour: str = PART) -> None:
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.3", facecolor=colour, edgecolor="#444"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = "#444", curve: float = 0.0) -> None:
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={
            "arrowstyle": "-|>", "color": colour, "lw": 1.4, "connectionstyle": f"arc3,rad={curve}"})

    def tokens(x: float, y: float, kept: list[bool], below: str) -> None:
        for i, keep in enumerate(kept):
            axes.add_patch(plt.Rectangle((x + 1.7 * i, y), 1.4, 2.6, facecolor=KEPT if keep else HIDDEN, edgecolor="white"))
        axes.text(x + 0.85 * len(kept), y - 0.8, below, ha="center", va="top", fontsize=7.5, color="#444")

    some = [True, False, True, True, False, True]
    for y, title in ((36, "Masked pass\n(training)"), (10, "Full pass\n(training,\ninference)")):
        axes.text(0, y + 4, title, fontsize=10, weight="bold", va="center")
    # The masked pass.
    tokens(14, 38, [True] * 6, "patches\n+ pos_embed, L")
    arrow(24.6, 39.3, 27.4, 39.3)
    tokens(28, 38, [True] * 4, "kept, K")
    arrow(35, 39.3, 37, 39.3)
    box(37.5, 35.5, 13, 8, "encoder\nblocks[:N1]")
    arrow(51.2, 39.3, 54, 39.3)
    tokens(54.5, 38, some, "+ mask_token\n+ decoder_pos_embed\nL")
    arrow(65.3, 39.3, 68, 39.3)
    box(68.5, 35.5, 12, 8, "side-\ninterpolator\nsideblocks")
    arrow(59.5, 41, 85.5, 44.6, KEPT, -0.35)
    axes.text(72, 50.3, "masked_shortcut: kept tokens pass unchanged", fontsize=8, color=KEPT, ha="center")
    arrow(81, 39.3, 84, 39.3)
    box(84.5, 35.5, 11, 8, "decoder\nblocks[N1:]")
    arrow(96, 39.3, 99, 39.3)
    box(99.5, 35.5, 9, 8, "final_layer\n(noise, v)")
    # The full pass.
    tokens(14, 12, [True] * 6, "patches\n+ pos_embed, L")
    arrow(24.6, 13.3, 37, 13.3)
    box(37.5, 9.5, 13, 8, "encoder\nblocks[:N1]")
    arrow(51.2, 13.3, 59, 13.3)
    box(59.5, 10.8, 18.5, 5, "+ decoder_pos_embed")
    arrow(78.6, 13.3, 84, 13.3)
    box(84.5, 9.5, 11, 8, "decoder\nblocks[N1:]")
    arrow(96, 13.3, 99, 13.3)
    box(99.5, 9.5, 9, 8, "final_layer\n(noise, v)")
    # Version 2.
    for y in (35.2, 9.2):
        arrow(40, y, 48, y, ONLY_V2, 0.6)
        arrow(17, y - 2.4, 90, y, ONLY_V2, 0.13)
    axes.text(54, 22.6, "long_skips (MDTv2): first half of the encoder to its second half; patches to every decoder block",
              fontsize=8, color=ONLY_V2, ha="center")
    axes.text(54, -1.0, "Every block: adaLN-Zero from c = t_embedder(t) + y_embedder(y); attention + relative position "
              "bias; MLP.  Both passes share all weights.", fontsize=8, ha="center", color="#444")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def inpainting(checkpoint: str, path: Path, num_images: int = 8) -> None:
    """Held-out digits; for every mask ratio, what is known of them and what the model makes of that and the label."""
    rows = [i for i in range(400) if is_held_out(i) and i % 3 == 0][:num_images]
    source = sources.open_source("digits")
    read = readers.read_few(source.folder, source.kind, listings.list_images(source).table.slice(0, 400))
    crops = images.decode_piece(read, 32).images[rows]  # (B, H, W, 3)
    pictures = to_unit_range(torch.from_numpy(crops)) / 2 + 0.5  # (B, 3, H, W)
    pipe = MDTInpaintPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    shown = [("image", pictures)]
    for ratio in RATIOS:
        hidden = pipe.hidden_tokens(num_images, mask_ratio=ratio, generator=torch.Generator().manual_seed(1))
        mask = hidden.reshape(-1, 1, *pipe.transformer.grid).repeat_interleave(8, 2).repeat_interleave(8, 3).float()
        shown.append((f"{ratio:.0%} masked", pictures * (1 - mask) + 0.45 * mask))
        out = pipe(pictures, mask, class_labels=[read.labels[i] for i in rows], num_inference_steps=50,
                   generator=torch.Generator().manual_seed(2), output_type="pt")
        shown.append(("inpainted", out.images))
    figure, axes = plt.subplots(len(shown), num_images, figsize=(num_images * 0.75, len(shown) * 0.75))
    for line, (name, batch) in zip(axes, shown, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for cell, picture in zip(line, batch, strict=True):
            cell.imshow(picture.permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a training output on the digits, best of MDTv2")
    arguments = parser.parse_args()
    architecture(DOCS / "architecture.png")
    if arguments.checkpoint:
        inpainting(arguments.checkpoint, DOCS / "inpainting.png")
