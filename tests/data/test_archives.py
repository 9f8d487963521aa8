"""Archives: read in place, and refused as a whole for one member that leads out of them."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from laser_fast.data.readers import archive_members, archives, read_rows

ROWS = b"a,b\n1,2\n"


def tar_of(path: Path, *members: tarfile.TarInfo, content: bytes = ROWS) -> Path:
    mode = "w:" + (path.suffix[1:] if path.suffix != ".tar" else "")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(path: Path, *members: zipfile.ZipInfo | str, content: bytes = ROWS) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, content)
    return path


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz"])
def test_members_are_read_in_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".zip"):
        zip_of(path, "deep/", "deep/rows.csv")
    else:
        tar_of(path, tar_info("deep", tarfile.DIRTYPE), tar_info("deep/rows.csv"))
    (member,) = archive_members(path)
    assert (member.name, member.member) == ("rows.csv", "deep/rows.csv")
    assert [row.values for row in read_rows(member, ["b", "a"])] == [["2", "1"]]
    assert [file.name for file in tmp_path.iterdir()] == [name]  # nothing was extracted


@pytest.mark.parametrize("name", ["/etc/x.csv", "../x.csv", "deep/../../x.csv", "C:/x.csv", "..\\x.csv", "\\x.csv"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        zip_of(path, "good.csv", name)
    else:
        tar_of(path, tar_info("good.csv"), tar_info(name))
    with pytest.raises(
        ValueError, match=rf"x\.{kind}: a member .* must have a name inside the archive .*; nothing was read"
    ):
        archive_members(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar_of(tmp_path / "x.tar.gz", tar_info("good.csv"), tar_info("bad.csv", kind, "good.csv"))
    with pytest.raises(ValueError, match=r"must be a file or a folder \(no link, no device\), got 'bad.csv'"):
        archive_members(path)


def test_links_secrets_and_repeated_names_in_a_zip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a file or a folder \(no link, no device\), got 'bad.csv'"):
        archive_members(zip_of(tmp_path / "x.zip", "good.csv", zip_link("bad.csv")))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zip_of(tmp_path / "y.zip", "a.csv", "a.csv")
    with pytest.raises(ValueError, match="must have a name of its own, got 'a.csv'"):
        archive_members(twice)
    content = bytearray(zip_of(tmp_path / "z.zip", "a.csv").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption in the directory
    (tmp_path / "z.zip").write_bytes(content)
    with pytest.raises(ValueError, match="must not be encrypted, got 'a.csv'"):
        archive_members(tmp_path / "z.zip")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_bombs_are_refused_by_what_they_state(tmp_path: Path, kind: str) -> None:
    path, zeros = tmp_path / f"x.{kind}", bytes(3_000_000)
    if kind == "zip":
        zip_of(path, "a.csv", "b.csv", content=zeros)
    else:
        tar_of(path, tar_info("a.csv"), tar_info("b.csv"), content=zeros)
    assert path.stat().st_size < 20_000
    with pytest.raises(
        ValueError, match="unpack to at most 5,000,000 bytes, got 6,000,000 up to 'b.csv'; raise the bound"
    ):
        archive_members(path, max_bytes=5_000_000)
    assert len(archive_members(path, max_bytes=6_000_000)) == 2


def test_a_long_name_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "x.tar.gz", tar_info("n" * 200_000))
    archive_members(path)
    monkeypatch.setattr(archives, "_LONGEST_READ", 100_000)
    with pytest.raises(
        ValueError, match=r"x\.tar\.gz: the file must be a whole zip or tar archive, got .*a record of 200"
    ):
        archive_members(path)


def test_no_more_is_read_than_is_stated(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", "a.csv", content=b"a,b\n" + b"1,2\n" * 100)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = (8).to_bytes(4, "little")  # the directory now says 8 bytes
    path.write_bytes(content)
    (member,) = archive_members(path)
    with pytest.raises(ValueError, match=r"a\.csv: the file must be readable and x\.zip a whole archive, got "):
        assert len(list(read_rows(member, ["a"]))) <= 1


def test_what_is_no_archive(tmp_path: Path) -> None:
    for name in ("x.zip", "x.tar", "x.tgz"):
        (tmp_path / name).write_bytes(b"no archive" * 100)
        with pytest.raises(ValueError, match=rf"{name}: the file must be a whole zip or tar archive, got "):
            archive_members(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="the archive must be a file, got .*nothing"):
        archive_members(tmp_path / "nothing.zip")
    with pytest.raises(ValueError, match="a Parquet file must lie outside of archives, got x.parquet in one"):
        next(read_rows(archive_members(zip_of(tmp_path / "p.zip", "x.parquet"))[0], ["a"]))
