"""Write docs/reference/models.md, the table of architectures that the tests cover: `python tests/supported.py`."""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"


def table() -> str:
    """Return the page, made of the families that the adapters' tests iterate over."""
    sys.path.insert(0, str(Path(__file__).parent / "plugins"))
    import test_bert
    import test_gpt
    import test_llama
    import test_timm
    import test_vit

    lines = [
        "# Supported architectures",
        "",
        "Made by `python tests/supported.py` from the families that the tests prune, save and load. Others of the same "
        "shape load too: adapters look at a model's blocks, not at its name, and say why they decline one.",
    ]
    for title, families in (
        ("Language models of LLaMA's shape (`llama`)", test_llama.FAMILIES),
        ("Language models of GPT's shape (`gpt`)", test_gpt.FAMILIES),
        ("Encoders of text (`bert`)", test_bert.FAMILIES),
    ):
        lines += ["", f"## {title}", "", "| family | transformers `model_type` |", "|---|---|"]
        for family in families:
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
