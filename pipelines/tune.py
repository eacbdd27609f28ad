"""Entry point for `ray job submit`: a sweep of training settings. The same arguments as `mdt-ray tune`.

    ray job submit --working-dir . -- python pipelines/tune.py digits --train.latents s3://my-bucket/latents --output s3://my-bucket/sweep
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # an uploaded working directory is not installed

from mdt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
