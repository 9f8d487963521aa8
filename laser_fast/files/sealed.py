"""Sealed folders: `seal.json` has the size and SHA-256 of every file, compared when the folder is opened and read.

A seal finds files that are damaged, swapped, edited or left out. It is no signature: whoever may write the folder can
seal it again, so what is read is validated as well.
"""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field, field_validator

from laser_fast.files.atomic import write_json
from laser_fast.files.descriptions import Description, parse_description

SEAL = "seal.json"
_FORMAT = 1
_AGAIN = "write it again with this version of laser_fast"
_CARD = "README.md"  # of a model: people and the hub edit it, and nothing reads it


class _SealedFile(Description):
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Seal(Description):
    format: int
    files: dict[str, _SealedFile]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, _SealedFile]) -> dict[str, _SealedFile]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name:
                raise ValueError(f"names must lie in the folder, got {name!r}")
        return files


def seal(folder: Path) -> None:
    """Write `seal.json`, the last file of a folder, about all others in it and its inner folders, but README.md."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name != _CARD and name != SEAL:
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / SEAL, {"format": _FORMAT, "files": files})


class SealedFolder:
    """A folder that `seal` sealed: opening it compares sizes, asking for a file compares its content.

    Raises:
        ValueError: there is no seal, it is damaged, or a file of it is missing or of another size; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._compared: set[str] = set()
        try:
            content = (path / SEAL).read_bytes()
        except FileNotFoundError:
            remedy = f"copy the whole folder, or {_AGAIN}"
            raise ValueError(f"SealedFolder: {path} must have {SEAL}, got none; {remedy}") from None
        where = f"SealedFolder: {SEAL} of {path}"
        self._files = parse_description(_Seal, content, where, version=("format", _FORMAT), remedy=_AGAIN).files
        for name, known in self._files.items():
            file = path / name
            if not file.is_file():
                missing = f"got no {name} ({SEAL} names it); copy the whole folder"
                raise ValueError(f"SealedFolder: {path} must be whole, {missing}")
            if (size := file.stat().st_size) != known.size:
                raise self._another(name, f"of {known.size} bytes", size)

    def file(self, name: str) -> Path:
        """The path of a file, whose SHA-256 is compared once; raises ValueError for another than was sealed."""
        known = self._known(name)
        if name not in self._compared:
            self._compare(name, known, file_sha256(self.path / name))
        return self.path / name

    def read(self, name: str) -> bytes:
        """The content of a file; errors as of `file`."""
        known = self._known(name)
        content = (self.path / name).read_bytes()
        self._compare(name, known, hashlib.sha256(content).hexdigest())
        return content

    def compare_all(self) -> None:
        """Compare every file that was not compared yet; errors as of `file`."""
        for name in self._files:
            self.file(name)

    def _known(self, name: str) -> _SealedFile:
        if name not in self._files:
            got = "one that was added" if (self.path / name).exists() else "none"
            rule = f"{name} must be among the files of {SEAL} in {self.path}"
            raise ValueError(f"SealedFolder: {rule}, got {got}; copy the whole folder")
        return self._files[name]

    def _compare(self, name: str, known: _SealedFile, found: str) -> None:
        if found != known.sha256:
            raise self._another(name, f"with SHA-256 {known.sha256[:12]}", found[:12])
        self._compared.add(name)

    def _another(self, name: str, known: str, got: object) -> ValueError:
        rule = f"{name} of {self.path} must be the file that was written, {known}"
        return ValueError(f"SealedFolder: {rule}, got {got}; copy it again")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
