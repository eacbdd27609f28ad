"""Entry point for `ray job submit`: checkpoint -> samples and metrics. The same arguments as `mdt-ray evaluate`.

    ray job submit --working-dir . -- python pipelines/evaluate.py digits --checkpoint s3://my-bucket/run --output s3://my-bucket/judged
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # an uploaded working directory is not installed

from mdt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
