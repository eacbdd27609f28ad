"""Entry point for `ray job submit`: images -> VAE latents. The same arguments as `mdt-ray precompute`.

    ray job submit --working-dir . -- python pipelines/precompute.py digits --output s3://my-bucket/latents
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # an uploaded working directory is not installed

from mdt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["precompute", *sys.argv[1:]]))
