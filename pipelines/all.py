"""Entry point for `ray job submit`: all four jobs in order, then the report. The same arguments as `mdt-ray quickstart`.

    ray job submit --working-dir . -- python pipelines/all.py digits --output s3://my-bucket/digits
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # an uploaded working directory is not installed

from mdt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
