"""Which class of a model's head each image has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pruneforge.documents import read_json
from pruneforge.errors import PruneForgeError

if TYPE_CHECKING:
    from pruneforge.data.images import ImageProcessor, ImageSet

Asked = Mapping[str, "int | str"] | Literal["position", "none"] | None
"""What says which class is which: a mapping by name, an order, nothing at all, or the names themselves."""

MENDED = (
    "say which is which with `source_options` classes=FILE, or classes=position if the head's classes are in the order "
    "of their names, or calibrate without labels: classes=none"
)
"""What to do about classes that do not fit."""


def class_indices(images: ImageSet, processor: ImageProcessor, mapping: Asked = None) -> list[int | None]:
    """Return each image's class as an index of the head, or `None` if it has none.

    What the classes of the data are called decides, the first of these that fits:

    - `mapping` says it for each class; "none" gives no image a class; "position" takes the classes in the order of
      their names, or of the data set if it has one, which must be as many as the head's.
    - All are called like classes of the head: by its names, or by other names that it is known under (WordNet ids and
      descriptions, for example). They may be a part of the head's.
    - All are called by numbers, which are indices of the head: "10" is class 10. They may be a part of the head's.

    Anything else is refused: a single name that differs would shift all that follow. Labels that are integers without
    names are indices of the head.

    Args:
        images: The images.
        processor: The model's classes.
        mapping: For each class of the data, by name, the head's class, as an index or a name; or "position", or
            "none".

    Raises:
        PruneForgeError: The classes do not fit the head.
    """
    if mapping == "none":
        return [None] * len(images)
    labels = [images.label(index) for index in range(len(images))]
    if images.class_names is not None:
        heads = dict(enumerate(_heads_classes(images.class_names, processor, mapping)))
        # Unlabelled parts of hub data sets have -1 for every label.
        return [heads.get(label) if isinstance(label, int) else None for label in labels]
    if isinstance(mapping, Mapping):
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


def read_mapping(asked: str | None) -> Asked:
    """Return what the option `classes` asks for: an order, no classes, the names themselves, or a JSON file's mapping.

    Raises:
        PruneForgeError: It cannot be read, or is no such mapping.
    """
    if asked is None:
        return None
    if asked == "position":
        return "position"
    if asked == "none":
        return "none"
    mapping = read_json(Path(asked), "classes")
    if not isinstance(mapping, dict) or not all(type(head) in (int, str) for head in mapping.values()):
        raise PruneForgeError(f"classes {asked!r} must map each name to the index or the name of a class of the head")
    return mapping


def _heads_classes(class_names: Sequence[str], processor: ImageProcessor, mapping: Asked) -> list[int]:
    """Return the head's index of each class of the data.

    Raises:
        PruneForgeError: The classes do not fit the head.
    """
    names = list(processor.names or [])
    if isinstance(mapping, Mapping):
        return [_mapped(name, mapping, names, processor.classes) for name in class_names]
    if mapping == "position":
        return _by_position(class_names, processor.classes)
    for known in (names, *processor.aliases):
        of_one = {name for name, count in Counter(known).items() if count == 1}  # a crane is a bird and a machine
        position = {name: index for index, name in enumerate(known) if name in of_one}
        if of_one.issuperset(class_names):
            return [position[name] for name in class_names]
    if all(name.isdecimal() and len(name) < 10 for name in class_names):
        numbers = [int(name) for name in class_names]
        if max(numbers) < processor.classes:
            return numbers
        raise PruneForgeError(
            f"the images have a class {max(numbers)}, and the head has 0 to {processor.classes - 1}; {MENDED}"
        )
    unknown = [name for name in class_names if name not in names] or list(class_names)
    called = f", called like {names[0]!r}" if names else " without names"
    raise PruneForgeError(
        f"the images have {len(class_names)} classes, of which {len(unknown)} are no class of the head by name, such "
        f"as {', '.join(map(repr, unknown[:3]))}; the head has {processor.classes}{called}; {MENDED}"
    )


def _by_position(class_names: Sequence[str], classes: int) -> list[int]:
    """Return the head's index of each class of the data, in order.

    Raises:
        PruneForgeError: There are not as many as the head has.
    """
    if len(class_names) != classes:
        raise PruneForgeError(
            f"the images have {len(class_names)} classes and the head has {classes}, so position does not say which is "
            "which; say it with `source_options` classes=FILE"
        )
    return list(range(classes))


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
