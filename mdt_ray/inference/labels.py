"""Class names: what a data set calls its classes, and the words that people ask for them by."""

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdt_ray import config_io

IMAGENET = Path(__file__).parents[1] / "assets" / "imagenet_classes.tsv"
"""ImageNet's 1,000 classes in the usual order: WordNet synset, tab, its words."""


def imagenet_classes() -> dict[str, str]:
    """Synset -> words, in class order: {'n01440764': 'tench, Tinca tinca', ...}."""
    return dict(line.split("\t") for line in IMAGENET.read_text().splitlines())


def id2label(class_names: Sequence[str]) -> dict[int, str]:
    """Class number -> name; ImageNet's synsets become their words."""
    words = imagenet_classes()
    return {number: words.get(name, name) for number, name in enumerate(class_names)}


def asked_for(classes: Sequence[str], facts: dict[str, Any]) -> list[int]:
    """Class numbers of numbers and names typed by people; `facts` is the state.json of a checkpoint.

    Raises ValueError as `class_ids`, and where the model is unconditional.
    """
    if classes and not facts["num_classes"]:
        raise ValueError(f"classes = {classes}: the model is unconditional; leave them out")
    asked = [int(name) if name.isdigit() else name for name in classes]
    return class_ids(asked, id2label(facts["class_names"]), facts["num_classes"])


def class_ids(labels: Sequence[int | str], names: dict[int, str], num_classes: int) -> list[int]:
    """Class numbers of labels given as numbers or as names (any of the comma-separated words, in any case).

    Raises ValueError for a number out of range, an unknown name (with the nearest one) or one of several classes.
    """
    known: dict[str, list[int]] = {}
    for number, text in names.items():
        for word in {text.lower(), *(part.strip().lower() for part in text.split(","))}:
            known.setdefault(word, []).append(int(number))
    ids = []
    for label in labels:
        if not isinstance(label, str):
            if not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
                raise ValueError(f"class_labels: {label!r}: must be a class number in 0..{num_classes - 1}, or a name")
            ids.append(int(label))
            continue
        found = known.get(label.strip().lower(), [])
        if not found:
            near = config_io.suggestion(label.lower(), known) if known else "; this model has no class names, give numbers"
            raise ValueError(f"class_labels: unknown class {label!r}{near[:300]}")
        if len(found) > 1:
            raise ValueError(f"class_labels: {label!r} names the classes {found}; give the number")
        ids += found
    return ids
