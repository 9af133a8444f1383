"""GGUF files, the format of llama.cpp, which transformers reads and de-quantises."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pruneforge import PruneForgeError

SUFFIX = ".gguf"


def is_gguf(reference: str) -> bool:
    """Return whether a reference is a GGUF file, by its name."""
    return Path(reference).suffix.lower() == SUFFIX and Path(reference).is_file()


@contextmanager
def source(reference: str) -> Iterator[dict[str, str]]:
    """Yield the arguments by which `from_pretrained` of transformers loads a folder, a hub id or a GGUF file.

    Of a GGUF file it takes a folder too, and prefers other files there, such as another model's tokenizer; so it is
    given one in which nothing else lies.

    Raises:
        PruneForgeError: It is a GGUF file, and the package that reads them is not installed.
    """
    if not is_gguf(reference):
        yield {"pretrained_model_name_or_path": reference}
        return
    if find_spec("gguf") is None:
        raise PruneForgeError("reading a GGUF file takes the extra 'gguf' (in a clone: pip install '.[gguf]')")
    with tempfile.TemporaryDirectory(prefix="pruneforge-gguf-") as folder:
        (Path(folder) / "model.gguf").symlink_to(Path(reference).resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


def config_of_gguf(reference: str) -> Any:
    """Return the configuration in a GGUF file, which is parsed once: with a large vocabulary that takes seconds."""
    stat = Path(reference).stat()
    return copy.deepcopy(_config(reference, stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=1)
def _config(reference: str, changed: int, size: int) -> Any:
    import transformers

    with source(reference) as arguments:
        return transformers.AutoConfig.from_pretrained(**arguments, trust_remote_code=False)


def unpacked() -> dict[str, Any]:
    """Return the arguments by which `from_pretrained` de-quantises a GGUF file wherever it could keep it packed."""
    import transformers

    # Versions that have no such class always de-quantise.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def forget_quantization(model: Any) -> None:
    """Make a de-quantised model an ordinary one, which transformers saves."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def what_lies_in(folder: Path) -> str:
    """Return the end of a message that a folder has no configuration: the GGUF files in it that could be named."""
    files = sorted(path for path in folder.glob("*") if is_gguf(str(path)))
    return f", but {len(files)} GGUF; name the file, such as {str(files[0])!r}" if files else ""


def remarks(reference: str) -> Sequence[str]:
    """Return that the weights come from a GGUF file, and of what types; nothing of another reference."""
    if not is_gguf(reference):
        return ()
    from gguf import GGUFReader

    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(reference).tensors)
    said = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    return (f"the weights are those of a GGUF file, de-quantised where they were packed; tensors by type: {said}",)
