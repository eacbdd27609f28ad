"""Who may ask anything of a local Ray."""

import subprocess
import sys

import pytest

from mdt_ray.jobs import session


@pytest.mark.ray
def test_a_local_ray_answers_nobody_without_its_token(ray_session):
    """Its ports are open to the network, for Ray knows no other way."""
    code = "import ray; ray.init(logging_level='ERROR'); print('in', len(ray.nodes()))"
    mine = session.environment()
    for environment, is_in in ((mine, True), (mine | {"RAY_AUTH_MODE": "disabled"}, False)):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
        assert ("in 1" in done.stdout, done.returncode == 0) == (is_in, is_in), done.stderr[-2000:]
        assert is_in or "auth" in done.stderr.lower()
