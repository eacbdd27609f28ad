"""How the driver watches over workers, on real actors; the workers are stand-ins."""

import time

import pytest

from mdt_ray.config import TrainConfig
from mdt_ray.interrupts import Wish

pytestmark = pytest.mark.ray


@pytest.fixture
def channel(ray_session):
    from mdt_ray.jobs import control

    channel = control.open_control()
    yield channel
    ray_session.kill(channel)


def watch(fit, channel, wish=None, on_row=lambda row: None, meanwhile=lambda: None):
    from mdt_ray.jobs import control

    config = TrainConfig(latents="l", output="o")
    return control.watch(fit, channel, config, config.workers.num_workers, wish or Wish(), on_row, meanwhile)


def test_rows_arrive_in_order_and_once(ray_session, channel):
    seen = []

    def fit():
        for step in range(30):
            channel.put.remote({"step": step})
            time.sleep(0.03)
        ray_session.get(channel.asked.remote())  # after all of them

    assert watch(fit, channel, on_row=seen.append) is None
    assert [row["step"] for row in seen] == list(range(30))


def test_trouble_on_the_driver_leaves_no_workers_alone(channel, caplog):
    """What fails while watching is a warning; the call returns when the workers have ended, not before."""
    ended = []

    def fit():
        time.sleep(1.5)
        ended.append(True)

    def meanwhile():
        raise OSError("the store does not answer")

    assert watch(fit, channel, meanwhile=meanwhile) is None
    assert ended
    assert "the store does not answer" in caplog.text


def test_a_wish_reaches_the_workers(channel):
    from mdt_ray.jobs import control

    wish, asked = Wish(), control.Asked(channel)

    def fit():
        wish.signum = 15
        while not asked():
            time.sleep(0.05)

    assert watch(fit, channel, wish) == control.STOPPED


def test_what_the_workers_raise_comes_out(channel):
    def fit():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        watch(fit, channel)
