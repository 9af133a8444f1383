"""Write docs/reference/models.md, the table of architectures that the tests cover: `python tests/supported.py`."""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"


def table() -> str:
    """Return the page, made of the families that the adapters' tests iterate over."""
    sys.path.insert(0, str(Path(__file__).parent / "plugins"))
    import test_llama
    import test_timm
    import test_vit

    lines = [
        "# Supported architectures",
        "",
        "Made by `python tests/supported.py` from the families that the tests prune, save and load. Others of the same "
        "shape load too: adapters look at a model's blocks, not at its name, and say why they decline one.",
        "",
        "## Language models of transformers (`llama`)",
        "",
        "| family | transformers `model_type` |",
        "|---|---|",
    ]
    for family in test_llama.FAMILIES:
        name, _, variant = family.partition(", ")
        lines.append(f"| {name}{f' with {variant}' if variant else ''} | `{name}` |")
    lines += [
        "",
        "## Image classifiers of timm (`timm`)",
        "",
        "Named `timm:NAME` or `hf-hub:OWNER/NAME`, or a folder in timm's layout.",
        "",
        "| family | tested on a tiny |",
        "|---|---|",
    ]
    lines += [f"| {family} | `{name}` |" for family, (name, _, _) in test_timm.FAMILIES.items()]
    lines += ["", "## Image classifiers of transformers (`vit`)", "", "| family | class |", "|---|---|"]
    lines += [f"| {family} | `{cls.__name__}` |" for family, (_, cls) in test_vit.FAMILIES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table())
