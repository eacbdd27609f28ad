"""MDTPipeline: three lines from a checkpoint to images, and what diffusers' users expect of any pipeline."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import diffusers
import numpy as np
import pytest
import torch

from mdt_ray.config import SamplingConfig
from mdt_ray.inference import card, labels
from mdt_ray.inference.pipeline import MDTPipeline
from mdt_ray.inference.sampler import Sampler
from tests.conftest import ROOT
from tests.inference.conftest import make_checkpoint

FEW = {"num_inference_steps": 4, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(checkpoint) -> MDTPipeline:
    pipe = MDTPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_scheduler(pipe: MDTPipeline, scheduler) -> MDTPipeline:
    changed = MDTPipeline(pipe.transformer, pipe.vae, scheduler, id2label=pipe.config.id2label)
    changed.set_progress_bar_config(disable=True)
    return changed


# Opening and saving


def test_it_opens_a_training_output_and_draws(checkpoint):
    pipe = MDTPipeline.from_pretrained(checkpoint.partition("/checkpoints/")[0])
    image, = pipe(class_labels=[7], num_inference_steps=4, generator=seeded()).images
    assert image.size == (32, 32)
    assert np.asarray(image).std() > 1


def test_saved_and_opened_it_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == ["mdt_ray.models.mdt", "MDT"]
    again = MDTPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    assert again.config.id2label == pipe.config.id2label
    assert again.card == pipe.card
    a, b = (p(class_labels=["digit 3", 4], generator=seeded(), **FEW).images for p in (pipe, again))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_card_tells_the_run(pipe):
    for part in ("library_name: diffusers", "| batch size | 256 |", "| hidden_size | 32 |", "| loss_full | 0.75 |",
                 "| VAE | digits |", "class_labels=[0]", "| optim.lr | 0.0003 |"):
        assert part in pipe.card
    assert "license" not in pipe.card


def test_the_card_of_a_strangers_checkpoint_is_no_markup():
    rows = card._table("Model", {"vae": "x |\n<script>alert(1)</script> `rm`", "a": 1})
    assert rows == "## Model\n\n| | |\n|---|---|\n| vae | x \\| &lt;script&gt;alert(1)&lt;/script&gt; 'rm' |\n| a | 1 |\n\n"
    text = card._origin({"file": "a`\n# b[0]", "layout": "dit", "sha256": "0", "notes": ["one\ntwo"]})
    assert text == "Converted from `a' # b[0]` (layout dit, sha256 0).\n\n- one two\n\n"
    assert card._line("![a](https://b) [c](d) \\") == r"\!\[a\](https://b) \[c\](d) \\"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few calls of the Hugging Face hub that an upload makes, with every file sent inline."""

    files: dict[str, bytes]

    def do_HEAD(self):
        self.answer(404, {})

    do_GET = do_HEAD

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": self.repository(), "name": "me/digits"})
        if self.path.endswith("/validate-yaml"):
            return self.answer(200, {"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            return self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer(200, {"commitUrl": f"{self.repository()}/commit/1", "commitOid": "1", "success": True})

    def repository(self):
        return f"http://{self.headers['Host']}/me/digits"

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_push_to_hub_uploads_a_pipeline_and_its_card(checkpoint, tmp_path):
    """The real client against a small server that speaks the hub's upload calls."""
    files: dict[str, bytes] = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = ("import sys; from mdt_ray.inference.pipeline import MDTPipeline\n"
            "MDTPipeline.from_pretrained(sys.argv[1]).push_to_hub('me/digits', token='hf_x')")
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
                                "HF_HUB_DISABLE_XET": "1"}
    try:
        done = subprocess.run([sys.executable, "-c", code, checkpoint], cwd=ROOT, env=environment, capture_output=True,
                              text=True, timeout=120)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"model_index.json", "README.md", "transformer/config.json", "vae/config.json",
            "transformer/diffusion_pytorch_model.safetensors"} <= files.keys()
    assert b"| batch size | 256 |" in files["README.md"]


# Sampling


def test_it_is_the_sampler_of_evaluate(pipe, checkpoint):
    """Same noise, same scheduler: the same pixels as the evaluation's sampler, within one grey level."""
    sampler = Sampler(checkpoint, SamplingConfig(num_sampling_steps=4, cfg_scale=3.0, sampler="ddim"))
    expected = sampler.draw(0, torch.tensor([3, 9]), seed=5)
    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(2 * (5 + i))) for i in range(2)])
    changed = with_scheduler(pipe, diffusers.DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"))
    images = changed(class_labels=[3, 9], guidance_scale=3.0, guidance_power=0, latents=noise, **FEW).images
    assert (images * 255 - expected.float()).abs().max() <= 1.01


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler",
                                  "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_any_scheduler_made_from_the_config_of_the_first(pipe, name):
    """The config says learned_range, which makes DPM-Solvers drop channels: nothing here may depend on it."""
    config = pipe.scheduler.config
    assert config.variance_type == "learned_range"
    cls = getattr(diffusers, name)
    swapped = with_scheduler(pipe, cls.from_config(config))
    images = swapped(class_labels=[1, 2], generator=seeded(), **FEW).images
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    again = swapped(class_labels=[1, 2], generator=seeded(), **FEW).images
    assert torch.equal(images, again)
    if name != "DDPMScheduler":
        plain = cls.from_config({k: v for k, v in config.items() if k != "variance_type"})
        assert torch.equal(with_scheduler(pipe, plain)(class_labels=[1, 2], generator=seeded(), **FEW).images, images)


def test_guidance_and_generators(pipe):
    def draw(**arguments):
        return pipe(class_labels=[1, 2], **FEW | {"generator": seeded()} | arguments).images

    assert not torch.equal(draw(guidance_scale=1), draw(guidance_scale=3.8))
    assert not torch.equal(draw(guidance_power=0), draw(guidance_power=4))
    assert not torch.equal(draw(guidance_channels=3), draw())
    both = draw(generator=[seeded(1), seeded(2)])
    alone = pipe(class_labels=2, **FEW | {"generator": [seeded(2)]}).images
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)
    latent = draw(output_type="latent")
    assert latent.shape == (2, 4, 4, 4)
    assert draw(output_type="np").shape == (2, 32, 32, 3)
    assert isinstance(pipe(class_labels=1, return_dict=False, **FEW)[0], torch.Tensor)


def test_bf16_weights_and_compiled_blocks(checkpoint):
    pipe = MDTPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    images = pipe(class_labels=[1], generator=seeded(), **FEW).images
    assert images.isfinite().all()
    exact = MDTPipeline.from_pretrained(checkpoint)
    exact.set_progress_bar_config(disable=True)
    expected = exact(class_labels=[1], generator=seeded(), **FEW).images
    assert (images - expected).abs().mean() < 0.02
    exact.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(exact(class_labels=[1], generator=seeded(), **FEW).images, expected, atol=1e-4, rtol=0)


def test_offload_and_loading_as_accelerate_does_it(pipe, tmp_path):
    """With accelerate, from_pretrained builds models without memory and fills them; offload moves whole models."""
    pipe.save_pretrained(tmp_path)
    offloaded = MDTPipeline.from_pretrained(tmp_path)
    offloaded.set_progress_bar_config(disable=True)
    assert not any(tensor.is_meta for tensor in (*offloaded.transformer.parameters(), *offloaded.transformer.buffers()))
    offloaded.enable_model_cpu_offload(device="cpu")
    a, b = (p(class_labels=[1], generator=seeded(), **FEW).images for p in (offloaded, pipe))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_an_unconditional_model(tmp_path):
    pipe = MDTPipeline.from_pretrained(make_checkpoint(tmp_path, num_classes=0))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_images=3, **FEW).images.shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="the model is unconditional"):
        pipe(class_labels=[1])


# Labels


def test_imagenet_names():
    classes = list(labels.imagenet_classes())
    assert len(classes) == 1000
    assert classes == sorted(classes)  # the order of the class numbers
    names = labels.id2label(classes)
    assert labels.class_ids(["golden retriever", 207, "Great Grey Owl"], names, 1000) == [207, 207, 24]
    with pytest.raises(ValueError, match=r"unknown class 'golden retreiver'; did you mean 'golden retriever'"):
        labels.class_ids(["golden retreiver"], names, 1000)
    with pytest.raises(ValueError, match=r"'crane' names the classes \[134, 517\]"):
        labels.class_ids(["crane"], names, 1000)
    with pytest.raises(ValueError, match=r"1000: must be a class number in 0..999"):
        labels.class_ids([1000], names, 1000)


def test_bad_arguments_are_named(pipe, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="name one of the 10 classes"):
        pipe()
    with pytest.raises(ValueError, match=r"latents has shape \(1, 4, 8, 8\): must be \(1, 4, 4, 4\)"):
        pipe(class_labels=1, latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="2 for 1 images"):
        pipe(class_labels=1, generator=[seeded(), seeded()])
    with pytest.raises(ValueError, match=r"class_labels: 3.7: must be a class number in 0..9"):
        pipe(class_labels=[3.7])
    with pytest.raises(ValueError, match="name at least one"):
        pipe(class_labels=[])
    with pytest.raises(ValueError, match=r"guidance_channels = 9: must be in 1..4"):
        pipe(class_labels=np.int64(1), guidance_channels=9)
    with pytest.raises(ValueError, match="num_steps = 0"):
        pipe(class_labels=1, num_inference_steps=0)
    with pytest.raises(ValueError, match="predicts 'v_prediction'"):
        with_scheduler(pipe, diffusers.DDIMScheduler(prediction_type="v_prediction"))(class_labels=1)
    for path in (tmp_path, tmp_path / "none", "back.pt"):
        with pytest.raises(ValueError, match="holds neither a pipeline"):
            MDTPipeline.from_pretrained(path)
    with pytest.raises(ValueError, match="weights = 'best'"):
        MDTPipeline.from_pretrained(checkpoint, weights="best")
    with pytest.raises(ValueError, match="no meaning for a checkpoint"):
        MDTPipeline.from_pretrained(checkpoint, variant="fp16")
    without_null = MDTPipeline.from_pretrained(make_checkpoint(tmp_path, class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="no null label"):
        without_null(class_labels=1)
