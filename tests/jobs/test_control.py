"""How the driver watches over workers, on real actors; the workers are stand-ins."""

import time

import pytest

from mdt_ray.config import TrainConfig, WorkersConfig
from mdt_ray.interrupts import Wish
from tests import harness

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


def test_trouble_on_the_driver_keeps_no_stop_from_the_workers(channel):
    from mdt_ray.jobs import control

    wish, asked = Wish(), control.Asked(channel)

    def fit():
        wish.signum = 15
        end = time.monotonic() + 20
        while not asked() and time.monotonic() < end:
            time.sleep(0.05)
        assert asked()

    def meanwhile():
        raise OSError("the store does not answer")

    assert watch(fit, channel, wish, meanwhile=meanwhile) == control.STOPPED


def test_a_wish_reaches_the_workers(channel):
    from mdt_ray.jobs import control

    wish, asked = Wish(), control.Asked(channel)

    def fit():
        wish.signum = 15
        while not asked():
            time.sleep(0.05)

    assert watch(fit, channel, wish) == control.STOPPED


def test_more_workers_are_asked_for_when_the_others_have_started(channel):
    """Before, what asks would take the room that they start in."""
    from mdt_ray.jobs import control, nodes

    config = TrainConfig(latents="l", output="o", min_workers=1, workers=WorkersConfig(num_workers=2, cpus_per_worker=1))
    asked = []

    def fit():
        time.sleep(4 * control.POLL_SECONDS)
        asked.append(len(nodes.reserved()))
        channel.arrive.remote(0, "node")
        end = time.monotonic() + 20
        while not nodes.reserved() and time.monotonic() < end:
            time.sleep(0.05)
        asked.append(len(nodes.reserved()))

    assert control.watch(fit, channel, config, 1, Wish(), lambda row: None, lambda: None) is None
    assert asked == [0, 1]
    assert harness.open_placement_groups() == []


def test_workers_are_asked_to_stop_where_there_is_room_for_more(channel):
    from mdt_ray.jobs import control

    config = TrainConfig(latents="l", output="o", min_workers=1, workers=WorkersConfig(num_workers=2, cpus_per_worker=1))
    asked = control.Asked(channel)

    def fit():
        channel.arrive.remote(0, "node")
        while not asked():
            time.sleep(0.05)

    assert control.watch(fit, channel, config, 1, Wish(), lambda row: None, lambda: None, 1.0) == control.GROWS
    assert harness.open_placement_groups() == []


def test_what_the_workers_raise_comes_out(channel):
    def fit():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        watch(fit, channel)
