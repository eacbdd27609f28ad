"""`mdt-ray convert` and `train --init-from`, by the command line, on files as they are published."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from mdt_ray import checkpoints, run_folder, storage
from mdt_ray.cli import main
from mdt_ray.config import ModelConfig
from mdt_ray.inference.convert import fingerprint_of, load_any
from mdt_ray.inference.inpaint import MDTInpaintPipeline
from mdt_ray.inference.pipeline import MDTPipeline
from mdt_ray.jobs.train import prepare
from mdt_ray.models import layers, official
from mdt_ray.training.contract import INIT_FROM
from tests.conftest import relative_error, with_prefix
from tests.helpers import make_latents, tiny_training
from tests.training.test_training import run

PUBLISHED = {"mdt_v1": [], "mdt_v2": [], "dit": ["--num-heads", "4"]}


@pytest.fixture
def published(vectors, tmp_path) -> dict[str, Path]:
    """The reference weights as the files that people download."""
    files = {}
    for layout in PUBLISHED:
        files[layout] = tmp_path / f"{layout}_ckpt.pt"
        torch.save(with_prefix(vectors, f"{layout}.weights."), files[layout])
    return files


@torch.no_grad()
@pytest.mark.parametrize("layout", PUBLISHED)
def test_there_and_back_by_the_command_line(vectors, published, tmp_path, capsys, layout):
    out, back = tmp_path / "ours", tmp_path / "back.pt"
    assert main(["convert", "--source", str(published[layout]), "--output", str(out), *PUBLISHED[layout]]) == 0
    model = load_any(str(out))
    assert relative_error(model(vectors["x"], vectors["t"], vectors["y"]), vectors[f"{layout}.out_full"]) <= 1e-4
    assert checkpoints.damage(str(out)) is None
    assert main(["convert", "--source", str(out), "--output", str(back), "--to", layout]) == 0
    a, b = (torch.load(file, weights_only=True) for file in (published[layout], back))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = (out / "checksums.json").stat().st_mtime_ns
    assert main(["convert", "--source", str(published[layout]), "--output", str(out), *PUBLISHED[layout]]) == 0
    assert (out / "checksums.json").stat().st_mtime_ns == before


def test_the_card_carries_the_licence_and_what_was_inferred(published, tmp_path):
    assert main(["convert", "--source", str(published["mdt_v1"]), "--output", str(tmp_path / "ours"),
                 "--vae.path", "digits"]) == 0
    pipe = MDTPipeline.from_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_text() == pipe.card
    for part in ('license: "cc-by-nc-4.0"', "taken for the null label",
                 "non-commercial", "layout mdt_v1", "decode_layer = 2", "indexed by nothing",
                 "| decode_layer | 2 |", "| VAE | digits |"):
        assert part in pipe.card
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3], num_inference_steps=2, output_type="latent").images
    assert images.shape == (1, 4, 8, 8)
    assert isinstance(MDTInpaintPipeline.from_pretrained(tmp_path / "ours"), MDTPipeline)


def test_diffusers_folder_there_and_back(published, tmp_path):
    weights = torch.load(published["dit"], weights_only=True)
    weights["pos_embed"] = layers.sincos_positions(48, (4, 4))  # as DiT has it; the vectors' is random
    torch.save(weights, published["dit"])
    dit, folder, again = (tmp_path / name for name in ("dit", "diffusers", "again"))
    assert main(["convert", "--source", str(published["dit"]), "--output", str(dit), "--num-heads", "4"]) == 0
    assert main(["convert", "--source", str(dit), "--output", str(folder), "--to", "diffusers_dit"]) == 0
    DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    assert main(["convert", "--source", str(folder), "--output", str(again)]) == 0
    a, b = load_any(str(dit)), load_any(str(again))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
               if x.shape != a.pos_embed.shape)
    torch.testing.assert_close(a.pos_embed, b.pos_embed, atol=1e-5, rtol=0)
    assert b.config.num_heads == 4


def test_a_training_checkpoint_of_dit_gives_its_average(vectors, tmp_path):
    weights = with_prefix(vectors, "dit.weights.")
    content = {"model": {k: v * 0 for k, v in weights.items()}, "ema": weights, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "0400000.pt")
    assert main(["convert", "--source", str(tmp_path / "0400000.pt"), "--output", str(tmp_path / "ours"),
                 "--num-heads", "4"]) == 0
    state_dict = load_any(str(tmp_path / "ours")).state_dict()
    assert all(torch.equal(state_dict[name], weights[name]) for name in weights)


class NotATensor:
    pass


def test_bad_sources_are_named(published, tmp_path, capsys):
    def message(*arguments: str) -> str:
        assert main(["convert", "--output", str(tmp_path / "out"), *arguments]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no such file" in message("--source", str(tmp_path / "none.pt"))
    torch.save({"a": NotATensor()}, tmp_path / "pickle.pt")
    assert "not a file of plain tensors" in message("--source", str(tmp_path / "pickle.pt"))
    for name, data in (("text.pt", b"hello"), ("empty.pt", b""), ("page.pt", b"<html></html>")):
        (tmp_path / name).write_bytes(data)
        assert "not a file of plain tensors" in message("--source", str(tmp_path / name))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "none of the known layouts" in message("--source", str(tmp_path / "other.pt"))
    assert "neither a checkpoint of ours" in message("--source", str(published["dit"]), "--to", "dit")
    assert "num_heads: the shapes do not show it" in message("--source", str(published["dit"]))
    assert main(["convert", "--source", str(published["mdt_v1"]), "--output", str(tmp_path / "ours")]) == 0
    assert "cannot hold this MDT" in message("--source", str(tmp_path / "ours"), "--to", "dit")
    assert main(["convert", "--source", str(published["mdt_v2"]), "--output", str(tmp_path / "ours")]) == 1
    assert "holds another run" in capsys.readouterr().err
    assert main(["convert", "--source", str(tmp_path / "ours"), "--output", str(published["dit"]), "--to", "mdt_v1"]) == 1
    assert "exists; name another" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert main(["convert", "--source", str(published["dit"]), "--output", str(tmp_path / "mine")]) == 1
    assert "holds other files; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine" / "file").exists()
    assert main(["convert", "digits", "--source", "a", "--output", "b"]) == 2
    assert "convert has no presets" in capsys.readouterr().err


# train --init-from

MODEL = {"hidden_size": 48, "depth": 4, "num_heads": 4, "patch_size": 1}


def test_training_starts_from_published_weights(published, tmp_path):
    """Another resolution (4x4 tokens of patch 1 for those of patch 2), 7 classes for 10."""
    make_latents(tmp_path / "latents", num_classes=7, side=8)
    config = tiny_training(tmp_path / "latents", tmp_path / "run", num_steps=2, init_from=str(published["mdt_v1"]),
                           model=ModelConfig(**MODEL | {"patch_size": 2}))
    first = run(dataclasses.replace(config, num_steps=1, checkpoint_every_steps=1))
    text = storage.read_bytes(str(tmp_path / "run" / INIT_FROM)).decode()
    assert "new: y_embedder.embedding_table.weight: 7 classes for 10, the null label taken" in text
    assert "tensors taken as they are" in text
    source = load_any(str(published["mdt_v1"]))
    step_zero = MDTPipeline.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000000").transformer
    assert torch.equal(step_zero.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)
    published["mdt_v1"].unlink()
    again = run(config)  # a resume goes on from its own checkpoint, and needs the start no more
    assert (first.step, again.step) == (1, 2)
    card = MDTPipeline.from_pretrained(tmp_path / "run").card  # the licence stays with what grew out of the weights
    for part in ('license: "cc-by-nc-4.0"', "started from the weights of `mdt_v1_ckpt.pt`"):
        assert part in card


def test_the_source_may_grow_or_go_once_a_run_has_begun(published, tmp_path):
    make_latents(tmp_path / "latents", side=8)
    config = tiny_training(tmp_path / "latents", tmp_path / "run", num_steps=1, init_from=str(published["mdt_v1"]),
                           model=ModelConfig(**MODEL | {"patch_size": 2}))
    resolved, _, described = prepare(config)
    with run_folder.claim(resolved.output, described):
        run(resolved)
    published["mdt_v1"].unlink()
    assert prepare(dataclasses.replace(config, num_steps=2))[2]["name"] == described["name"]
    with pytest.raises(ValueError, match="no such file"):
        prepare(dataclasses.replace(config, output=str(tmp_path / "another")))


def test_a_saved_pipeline_is_a_start(published, tmp_path):
    assert main(["convert", "--source", str(published["mdt_v1"]), "--output", str(tmp_path / "ours"),
                 "--vae.path", "digits"]) == 0
    MDTPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "pipeline")
    a, b = load_any(str(tmp_path / "ours")), load_any(str(tmp_path / "pipeline"))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_name_of_a_diffusers_folder_follows_its_weights(tmp_path):
    """Also where they are .bin files."""
    made = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
                                 sample_size=4, patch_size=1, num_embeds_ada_norm=3)
    names = []
    for _ in range(2):
        made.save_pretrained(tmp_path / "dit", safe_serialization=False)
        names.append(fingerprint_of(str(tmp_path / "dit")))
        with torch.no_grad():
            made.proj_out_2.bias += 1
    assert names[0] != names[1]


def test_prefixes_other_types_and_sizes(vectors, tmp_path):
    weights = with_prefix(vectors, "mdt_v1.weights.")
    changed = {f"module.{k}": v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(changed, tmp_path / "weights.safetensors")
    assert main(["convert", "--source", str(tmp_path / "weights.safetensors"), "--output", str(tmp_path / "ours"),
                 "--image-size", "128", "--license", "mit"]) == 0
    state = storage.read_json(str(tmp_path / "ours" / "state.json"))
    assert state["image_size"] == 128
    assert any("stored as torch.bfloat16" in note for note in state["origin"]["notes"])
    assert 'license: "mit"' in (tmp_path / "ours" / "README.md").read_text()
    assert load_any(str(tmp_path / "ours")).dtype == torch.float32


def test_a_dit_becomes_an_mdt(published, tmp_path):
    make_latents(tmp_path / "latents", side=8)
    state_dict = torch.load(published["dit"], weights_only=True)
    dit = official.load(state_dict, official.infer_config(state_dict, num_heads=4))
    with checkpoints.create(str(tmp_path / "dit")) as folder:
        dit.save_pretrained(folder / "ema")
        (folder / "state.json").write_text("{}")
    config = tiny_training(tmp_path / "latents", tmp_path / "run", num_steps=1, init_from=str(tmp_path / "dit"),
                           model=ModelConfig(**MODEL | {"patch_size": 2}))
    run(config)
    text = storage.read_bytes(str(tmp_path / "run" / INIT_FROM)).decode()
    assert "new: blocks.*.attn.relative_position_bias_table: starts at 0 (x4)" in text
    with pytest.raises(ValueError, match=r"model.depth = 3: the checkpoint to start from has 4"):
        run(dataclasses.replace(config, output=str(tmp_path / "other"), model=ModelConfig(**MODEL | {"depth": 3})))
