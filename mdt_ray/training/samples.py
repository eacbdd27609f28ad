"""What is known of the samples that are drawn on the way, as files below a training output. Drawn in jobs/previews.py.

    samples/step-<step>/preview.json    columns for the row of metrics of that step, or why there are none; written last
"""

from mdt_ray import checkpoints, storage

SAMPLES = "samples"
PREVIEW = "preview.json"


def folder_of(output: str, step: int) -> str:
    """Where the samples of a step are (URI)."""
    return storage.join(output, SAMPLES, checkpoints.name(step))


def due(output: str, every_steps: int) -> list[int]:
    """Multiples of `every_steps` (0: none) whose checkpoint is there and whose samples are not, oldest first."""
    steps = [checkpoints.step_of(uri) for uri in checkpoints.list_finished(output)] if every_steps else []
    return [step for step in steps if step and step % every_steps == 0
            and not storage.exists(storage.join(folder_of(output, step), PREVIEW))]


def with_columns(output: str, rows: list[dict]) -> list[dict]:
    """Rows of metrics with the columns of the samples of their steps."""
    names = [name for name in storage.list_names(storage.join(output, SAMPLES)) if name.startswith("step-")]
    found = {checkpoints.step_of(name): storage.join(output, SAMPLES, name, PREVIEW) for name in names}
    columns = {step: storage.read_json(uri)["columns"] for step, uri in found.items() if storage.exists(uri)}
    return [row | columns.get(row["step"], {}) for row in rows]
