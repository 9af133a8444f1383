"""Images in a folder with one subfolder per class, or in a zip or tar archive of such a folder."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from pydantic import Field

from pruneforge import ImageSet, ImageSource, PruneForgeError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
"""What a truncated or damaged archive raises."""

LARGEST = 1 << 28
"""Bytes of an image in an archive, unpacked; more may be meant to fill the memory."""


class ImageFiles(ImageSource):
    """A folder, zip or tar in ImageNet's layout: each class is a folder of images.

    With several levels of folders, `split` names the one to read below (`train`, `val`). An image's class is the folder
    that contains it. Images directly in the root have no class.
    """

    argument = "path"

    class Options(ImageSource.Options):
        """Options of an image folder."""

        path: str = Field(description="the folder or archive")
        split: str | None = Field(None, description="only what stands below a folder of this name")

    options: Options

    @classmethod
    def reads(cls, path: str) -> bool:
        """Return whether the path is an archive, or a folder that does not hold a model."""
        file = Path(path)
        if file.is_file():
            return file.name.lower().endswith(ARCHIVES)
        return file.is_dir() and not (file / "config.json").exists()

    def images(self, part: str) -> ImageSet:
        """Return the images, whatever the part.

        Raises:
            PruneForgeError: The path cannot be read or holds no images.
        """
        path = Path(self.options.path)
        try:
            files: _Files = _Folder(path) if path.is_dir() else _Archive(path)
        except DAMAGED as error:
            raise PruneForgeError(f"images {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
        files.choose(self.options.split)
        if not len(files):
            below = f" below a folder {self.options.split!r}" if self.options.split else ""
            raise PruneForgeError(f"{str(path)!r} holds no images{below} ({', '.join(sorted(SUFFIXES))})")
        return files

    def describe(self, part: str) -> dict[str, Any]:
        """Return the name of the folder or archive, the split, and the number of images and classes."""
        files = self.images(part)
        labels = {files.label(index) for index in range(len(files))} - {None}
        description = {"file": Path(self.options.path).name, "split": self.options.split, "images": len(files)}
        return description | {"classes": len(labels)}


class _Files(ImageSet):
    """Images by path, in alphabetical order."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        # Archives made on macOS contain a hidden `._NAME` file for every file.
        self.names = sorted(
            name
            for name in names
            if PurePosixPath(name).suffix.lower() in SUFFIXES and not PurePosixPath(name).name.startswith("._")
        )

    def choose(self, split: str | None) -> None:
        """Keep the images below a folder called `split`, or all of them.

        Raises:
            PruneForgeError: Two folders of the same name would be one class.
        """
        if split is not None:
            self.names = [name for name in self.names if split in PurePosixPath(name).parts[:-1]]
        parents: dict[str, PurePosixPath] = {}
        for name in self.names:
            parent = PurePosixPath(name).parent
            other = parents.setdefault(parent.name, parent)
            if other != parent:
                raise PruneForgeError(
                    f"{str(self.path)!r} holds class {parent.name!r} twice, in {str(other)!r} and {str(parent)!r}; "
                    "name the split with `source_options` split=NAME"
                )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def label(self, index: int) -> str | None:
        return PurePosixPath(self.names[index]).parent.name or None


class _Folder(_Files):
    """Images below a folder."""

    def __init__(self, path: Path) -> None:
        files = (Path(base, name) for base, _, names in os.walk(path) for name in names)
        super().__init__(path, [file.relative_to(path).as_posix() for file in files])

    def open(self, index: int) -> Image.Image:
        path = self.path / self.names[index]
        if not path.is_file():  # a pipe would be waited for
            raise OSError("it is not a regular file")
        with Image.open(path) as image:
            image.load()
            return image


class _Archive(_Files):
    """Images in a zip or tar archive."""

    def __init__(self, path: Path) -> None:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as file:
                names = file.namelist()
        else:
            with tarfile.open(path) as file:
                self._members = {member.name: member for member in file.getmembers()}
            names = list(self._members)
        super().__init__(path, names)
        self._handle: tuple[int, Any] | None = None

    def open(self, index: int) -> Image.Image:
        with Image.open(io.BytesIO(self._read(self.names[index]))) as image:
            image.load()
            return image

    def _read(self, name: str) -> bytes:
        """Return the bytes of one file of the archive."""
        # A file handle cannot be shared between processes, so each opens its own.
        if self._handle is None or self._handle[0] != os.getpid():
            is_zip = self.path.name.lower().endswith(".zip")
            opened = zipfile.ZipFile(self.path) if is_zip else tarfile.open(self.path)  # noqa: SIM115
            self._handle = (os.getpid(), opened)
        archive: Any = self._handle[1]
        zipped = isinstance(archive, zipfile.ZipFile)
        size = archive.getinfo(name).file_size if zipped else self._members[name].size
        if size > LARGEST:
            raise OSError(f"it has {size:,} bytes, and {LARGEST:,} are the most")
        member = archive.open(name) if zipped else archive.extractfile(self._members[name])
        if member is None:
            raise OSError("it is not a regular file in the archive")
        with member:
            content: bytes = member.read(LARGEST)
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}
