"""Which class of a model's head each image has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pruneforge.documents import read_json
from pruneforge.errors import PruneForgeError

if TYPE_CHECKING:
    from pruneforge.data.images import ImageProcessor, ImageSet

MENDED = "say which is which with `source_options` classes=FILE"
"""What to do about classes that do not fit."""


def class_indices(
    images: ImageSet, processor: ImageProcessor, mapping: Mapping[str, int | str] | None = None
) -> list[int | None]:
    """Return each image's class as an index of the head, or `None` if it has none.

    What the classes of the data are called decides, the first of these that fits:

    - `mapping` says it for each class.
    - All are called like classes of the head (by WordNet ids, for example). They may be a part of the head's.
    - All are called by numbers, which are indices of the head: "10" is class 10. They may be a part of the head's.
    - They are as many as the head's classes, and in the order of their names, or of the data set if it has one, no name
      is that of another class of the head.

    Labels that are integers without names are indices of the head.

    Args:
        images: The images.
        processor: The model's classes.
        mapping: For each class of the data, by name, the head's class, as an index or a name.

    Raises:
        PruneForgeError: The classes do not fit the head.
    """
    labels = [images.label(index) for index in range(len(images))]
    if images.class_names is not None:
        heads = dict(enumerate(_heads_classes(images.class_names, processor, mapping)))
        # Unlabelled parts of hub data sets have -1 for every label.
        return [heads.get(label) if isinstance(label, int) else None for label in labels]
    if mapping is not None:
        labels = [None if label is None else str(label) for label in labels]
    class_names = sorted({label for label in labels if isinstance(label, str)})
    if class_names:
        position = dict(zip(class_names, _heads_classes(class_names, processor, mapping), strict=True))
        return [position[label] if isinstance(label, str) else None for label in labels]
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and not 0 <= min(numbers) <= max(numbers) < processor.classes:
        raise PruneForgeError(
            f"labels run from {min(numbers)} to {max(numbers)}, and the head has {processor.classes} classes"
        )
    return [label if isinstance(label, int) else None for label in labels]


def read_mapping(path: str) -> dict[str, int | str]:
    """Return a mapping of names to classes from a JSON file.

    Raises:
        PruneForgeError: It cannot be read, or is no such mapping.
    """
    mapping = read_json(Path(path), "classes")
    if not isinstance(mapping, dict) or not all(type(head) in (int, str) for head in mapping.values()):
        raise PruneForgeError(f"classes {path!r} must map each name to the index or the name of a class of the head")
    return mapping


def _heads_classes(
    class_names: Sequence[str], processor: ImageProcessor, mapping: Mapping[str, int | str] | None
) -> list[int]:
    """Return the head's index of each class of the data.

    Raises:
        PruneForgeError: The classes do not fit the head.
    """
    names, count = list(processor.names or []), len(class_names)
    if mapping is not None:
        return [_mapped(name, mapping, names, processor.classes) for name in class_names]
    position = {name: index for index, name in enumerate(names)}
    if set(class_names) <= set(names) and len(position) == len(names):
        return [position[name] for name in class_names]
    if all(name.isdecimal() for name in class_names):
        numbers = [int(name) for name in class_names]
        if max(numbers) < processor.classes:
            return numbers
        raise PruneForgeError(
            f"the images have a class {max(numbers)}, and the head has 0 to {processor.classes - 1}; {MENDED}"
        )
    in_order = all(name not in position or names[index] == name for index, name in enumerate(class_names[: len(names)]))
    if count == processor.classes and in_order:
        return list(range(count))
    known = f", called like {names[0]!r}" if names else ""
    stranger = next((name for name in class_names if name not in position), class_names[0])
    raise PruneForgeError(
        f"the images have {count} classes, such as {stranger!r}, and the head has {processor.classes}{known}; {MENDED}"
    )


def _mapped(name: str, mapping: Mapping[str, int | str], names: Sequence[str], classes: int) -> int:
    """Return the head's index of one class of the data, as a mapping says."""
    if name not in mapping:
        raise PruneForgeError(f"the images have a class {name!r}, which the file of classes does not name")
    head = mapping[name]
    if isinstance(head, str) and names.count(head) != 1:
        raise PruneForgeError(
            f"class {name!r} is {head!r} by the file of classes, which names no one class of the head"
        )
    index = names.index(head) if isinstance(head, str) else head
    if not 0 <= index < classes:
        raise PruneForgeError(f"class {name!r} is {index} by the file of classes, and the head has 0 to {classes - 1}")
    return index
