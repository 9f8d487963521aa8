"""Sealed folders: size and SHA-256 of every file in `seal.json`, compared when the folder is opened and read.

A seal finds damage, and files that were swapped, edited or left out. It is no signature: whoever may write the folder
can seal it again. So what is read is validated as well.
"""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field, field_validator

from laser_fast.files.descriptions import Description, parse_description
from laser_fast.files.folders import write_json

SEAL = "seal.json"
_FORMAT = 1
_PIECE_BYTES = 1 << 20

# the card of a model, which people and the hub edit, and which nothing reads
_UNSEALED = frozenset({"README.md"})


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
    """Write `seal.json` about every other file of a folder, those of inner folders included; the last to be written.

    Files called README.md are left out: they may be edited.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in _UNSEALED and name != SEAL:
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / SEAL, {"format": _FORMAT, "files": files})


class SealedFolder:
    """A folder that `seal` sealed: opening it compares sizes, asking for a file compares its content.

    Files that the seal does not name are nobody's business, and are never given out.

    Args:
        path: the folder.

    Raises:
        ValueError: there is no seal, it is damaged, or a file of it is missing or of another size; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._compared: set[str] = set()
        try:
            content = (path / SEAL).read_bytes()
        except FileNotFoundError:
            raise ValueError(
                f"SealedFolder: {path} must have {SEAL}, got none; copy the whole folder, or write it again with "
                "this version of laser_fast"
            ) from None
        where, remedy = f"SealedFolder: {SEAL} of {path}", "write it again with this version of laser_fast"
        self._files = parse_description(_Seal, content, where, version=("format", _FORMAT), remedy=remedy).files
        for name, known in self._files.items():
            file = path / name
            if not file.is_file():
                raise ValueError(
                    f"SealedFolder: {path} must be whole, got no {name} ({SEAL} names it); copy the whole folder"
                )
            if (size := file.stat().st_size) != known.size:
                raise ValueError(
                    f"SealedFolder: {name} of {path} must be the file that was written, of {known.size} bytes, "
                    f"got {size}; copy it again"
                )

    def file(self, name: str) -> Path:
        """The path of a file, which is read once to compare its SHA-256 before it is given out for the first time.

        Raises:
            ValueError: it is not the file that was sealed, or none was.
        """
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
        """Compare every file that was not asked for yet; errors as of `file`."""
        for name in self._files:
            self.file(name)

    def _known(self, name: str) -> _SealedFile:
        if name not in self._files:
            raise ValueError(
                f"SealedFolder: {name} must be among the files of {SEAL} in {self.path}, got "
                f"{'one that was added' if (self.path / name).exists() else 'none'}; copy the whole folder"
            )
        return self._files[name]

    def _compare(self, name: str, known: _SealedFile, found: str) -> None:
        if found != known.sha256:
            raise ValueError(
                f"SealedFolder: {name} of {self.path} must be the file that was written, with SHA-256 "
                f"{known.sha256[:12]}, got {found[:12]}; copy it again"
            )
        self._compared.add(name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
