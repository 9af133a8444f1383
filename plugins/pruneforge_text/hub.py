"""Text data sets of the Hub, read with `datasets`. None of them runs remote code.

The named data sets are stored as files. `HF_HOME`, `HF_TOKEN` and `HF_DATASETS_OFFLINE` have their usual meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge_text.slices import Slice, split_slice


def load_rows(source: str, location: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """Download a data set, or read it from the cache.

    Args:
        source: What messages call it.
        location: Arguments of `datasets.load_dataset`.
        columns: The columns that it must have.

    Returns:
        Its rows, a `datasets.Dataset`.

    Raises:
        PruneForgeError: It cannot be loaded, or lacks a column.
    """
    import datasets

    try:
        rows = datasets.load_dataset(**location)
    except Exception as error:
        # datasets, its download backends and its file readers raise many kinds of errors.
        reason = " ".join(str(error).split())[:300]
        raise PruneForgeError(
            f"source {source!r} cannot be loaded ({location['path']}): {reason}; "
            "give a local file with `calibration` or `data` instead, or try again"
        ) from error
    lacking = next((name for name in columns if name not in rows.column_names), None)
    if lacking is not None:
        raise PruneForgeError(
            f"source {source!r} ({location['path']}) has no column {lacking!r}; it has {', '.join(rows.column_names)}"
        )
    return rows


class _HubText(TextSource):
    """Text of a Hub data set; a subclass gives its location.

    Attributes:
        field: Name of the column that holds the text.
    """

    field: ClassVar[str] = "text"

    def location(self, part: Part) -> dict[str, Any]:
        """Return the arguments of `datasets.load_dataset` for one part."""
        raise NotImplementedError

    def slice(self) -> Slice:
        """Return which rows to read; all by default."""
        return Slice()

    def documents(self, part: Part) -> Sequence[str]:
        """Download the documents, or read them from the cache.

        Raises:
            PruneForgeError: They cannot be loaded, or have no such column.
        """
        location = self.location(part)
        rows = load_rows(self.name, location, [self.field])
        kind = getattr(rows.features[self.field], "dtype", "list")
        if kind not in ("string", "large_string"):
            raise PruneForgeError(
                f"column {self.field!r} of source {self.name!r} ({location['path']}) is of type {kind}, not text; name "
                "another with `source_options` column=NAME"
            )
        start, stop = self.slice().bounds(len(rows))
        return [text or "" for text in rows.select(range(start, stop))[self.field][:]]

    def describe(self, part: Part) -> dict[str, Any]:
        """Return the data set, column and rows of the documents."""
        location = {key: value for key, value in self.location(part).items() if value is not None}
        return {"dataset": location.pop("path"), **location, "column": self.field, "rows": str(self.slice())}


class C4(_HubText):
    """C4, English: the first training file for calibration, the first validation file for evaluation."""

    def location(self, part: Part) -> dict[str, Any]:
        """Return one file of the part, since all of C4 is 300 GB."""
        split = "train" if part == "calibration" else "validation"
        shards = {"train": "01024", "validation": "00008"}[split]
        files = {split: f"en/c4-{split}.00000-of-{shards}.json.gz"}
        return {"path": "allenai/c4", "data_files": files, "split": split}


class _Running(_HubText):
    """Rows too short to crop. For calibration they are joined by spaces into one text, as in the authors' code."""

    def documents(self, part: Part) -> Sequence[str]:
        """Return the rows, for calibration as one document."""
        rows = super().documents(part)
        return [" ".join(rows)] if part == "calibration" else rows


class WikiText2(_Running):
    """WikiText-2, raw: the training split for calibration, the test split for evaluation."""

    def location(self, part: Part) -> dict[str, Any]:
        """Return the split of the part."""
        split = "train" if part == "calibration" else "test"
        return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split}


class PTB(_Running):
    """Penn Treebank, text only: the training split for calibration, the test split for evaluation.

    Sentences are joined by a space. The data set's own script no longer runs, so its Parquet conversion on the Hub is
    read instead.
    """

    field = "sentence"
    separator = " "

    def location(self, part: Part) -> dict[str, Any]:
        """Return the converted split of the part."""
        split = "train" if part == "calibration" else "test"
        return {
            "path": "ptb-text-only/ptb_text_only",
            "name": "penn_treebank",
            "revision": "refs/convert/parquet",
            "split": split,
        }


class Hub(_HubText):
    """Any text data set: `hub:OWNER/NAME`, with rows `[10%:20%]` behind it if not all are wanted."""

    argument = "path"

    class Options(TextSource.Options):
        """Options of a Hub data set."""

        path: str = Field(description="OWNER/NAME on the Hub, or a local folder that `datasets` reads")
        config: str | None = Field(None, description="configuration of the data set")
        split: str = Field("train", description="split to read")
        column: str = Field("text", description="column that holds the text")
        revision: str | None = Field(None, description="branch, tag or commit of the data set")

    options: Options

    @property
    def field(self) -> str:  # type: ignore[override]
        """The `column` option."""
        return self.options.column

    def slice(self) -> Slice:
        """Return the slice after the path."""
        return split_slice(self.options.path)[1]

    def location(self, part: Part) -> dict[str, Any]:
        """Return the arguments from the options, whatever the part."""
        options = self.options
        path = split_slice(options.path)[0]
        return {"path": path, "name": options.config, "split": options.split, "revision": options.revision}
