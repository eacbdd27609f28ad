"""What is refused before any metric, and what is not."""

import dataclasses

import numpy as np

from mdt_ray.evaluation import gate

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)


def facts(pictures: np.ndarray = PICTURES, labels: np.ndarray | None = None) -> gate.Facts:
    return gate.Facts(digests=gate.digests_of(pictures), flat=gate.flat_of(pictures), finite=np.ones(len(pictures), bool),
                      labels=np.arange(len(pictures)) % 10 if labels is None else labels)


def reasons(found: gate.Facts, **changes) -> str:
    return " / ".join(gate.reasons(found, **{"num_expected": 400, "num_classes": 10, "labels": "balanced"} | changes))


def test_a_sound_set_passes():
    assert reasons(facts()) == ""
    assert reasons(facts(labels=RNG.integers(0, 10, 400)), labels="random") == ""
    assert reasons(facts(labels=np.full(400, -1)), num_classes=0, labels="random") == ""
    assert reasons(facts(labels=np.zeros(400, int)), labels="") == ""  # anyone's labels


def test_pictures_are_equal_where_their_pixels_are():
    copied = PICTURES.copy()
    copied[1] = copied[0]
    digests = gate.digests_of(copied)
    assert digests[0] == digests[1]
    assert len(np.unique(digests)) == 399
    assert np.array_equal(gate.digests_of(copied.transpose(0, 2, 1, 3).transpose(0, 2, 1, 3)), digests)
    flat = copied[:3].copy()
    flat[1] = [7, 8, 9]
    assert gate.flat_of(flat).tolist() == [False, True, False]


def test_each_fault_is_named():
    assert "400 images, but 500 were asked for" in reasons(facts(), num_expected=500)
    assert reasons(facts(PICTURES[:0]), num_expected=0) == ""
    copies = PICTURES.copy()
    copies[:4] = copies[4]  # 4 of 400: what a real data set has
    assert reasons(facts(copies)) == ""
    copies[:5] = copies[5]
    assert "5 of 400 images are copies of others" in reasons(facts(copies))
    flat = PICTURES.copy()
    flat[:5] = np.arange(5, dtype=np.uint8)[:, None, None, None]
    assert reasons(facts(flat)).startswith("5 of 400 images have one colour only")
    finite = np.ones(400, bool)
    finite[[7, 9]] = False
    broken = dataclasses.replace(facts(), finite=finite)
    assert "the features of 2 images are not finite (first: image 7)" in reasons(broken)


def test_labels_must_be_what_they_are_said_to_be():
    skewed = np.minimum(RNG.integers(0, 14, 400), 9)
    assert "labels = random, but classes have" in reasons(facts(labels=skewed), labels="random")
    assert "labels = balanced, but classes have" in reasons(facts(labels=RNG.integers(0, 10, 400)))
    assert "labels lie in 0..9, but must be in 0..8" in reasons(facts(), num_classes=9)
    assert reasons(facts(PICTURES[:395], np.arange(395) % 10), num_expected=395) == ""  # the last round is not whole


def test_all_faults_are_named_at_once():
    found = gate.reasons(facts(np.zeros_like(PICTURES)), num_expected=9, num_classes=10, labels="balanced")
    assert len(found) == 3
