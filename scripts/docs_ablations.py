"""Copy what docs/ablations.md shows out of the folders of its sweeps: the report's pictures, and a row a judged checkpoint.

    python scripts/docs_ablations.py runs/fashion/mdt-against-dit runs/fashion/mask-ratio-decoder-depth
"""

import argparse
import base64
import csv
import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs" / "ablations"
PICTURE = re.compile(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"')


def copy(sweep: Path) -> None:
    """Pictures as <sweep>-<what they show>.png, checkpoints as <sweep>.csv."""
    for alt, data in PICTURE.findall((sweep / "report" / "index.html").read_text()):
        name = re.sub(r"\W+", "-", alt).strip("-")
        (DOCS / f"{sweep.name}-{name}.png").write_bytes(base64.b64decode(data))
    table = json.loads((sweep / "results.json").read_text())
    rows = [trial["point"] | {"seed": trial["seed"], "step": judged["step"], "images_seen": judged["images_seen"],
                              "train_seconds": round(judged["train_seconds"], 1)} | judged["metrics"]
            for trial in table["trials"] for judged in trial["judged"]]
    with (DOCS / f"{sweep.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+")
    DOCS.mkdir(exist_ok=True)
    for folder in parser.parse_args().sweeps:
        copy(folder)
