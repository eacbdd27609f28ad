"""Entry point for `ray job submit`: latents -> checkpoints. The same arguments as `mdt-ray train`.

    ray job submit --working-dir . -- python pipelines/train.py digits --latents s3://my-bucket/latents --output s3://my-bucket/run
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # an uploaded working directory is not installed

from mdt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
