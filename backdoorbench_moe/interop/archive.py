"""Strict reading of the zip archives of `torch.save`: uncompressed, non-overlapping members with unambiguous names."""

from __future__ import annotations

import itertools
import mmap
import re
import struct
import zlib
from dataclasses import dataclass

from backdoorbench_moe.errors import DataError

LOCAL, CENTRAL, END, END64, LOCATOR64 = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
)
LOCAL_SIZE, CENTRAL_SIZE, END_SIZE, END64_SIZE, LOCATOR64_SIZE = 30, 46, 22, 56, 20
# The state dict of the largest model in torchvision has fewer than 2,000 tensors.
MOST_MEMBERS = 20_000
MOST_DIRECTORY_BYTES = 4 << 20
NAME = re.compile(r"[A-Za-z0-9_.\- ]+(/[A-Za-z0-9_.\- ]+)+")
LONGEST_NAME = 300
ENCRYPTED = 1
# Sizes of 4 GiB and more are stored in another field.
ELSEWHERE = 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """A file in an archive: position and size of its content, and its checksum."""

    start: int
    size: int
    crc: int


class Archive:
    """An archive in a mapped file.

    Args:
        data: The file.

    Attributes:
        members: The files in it, by name without the leading folder.

    Raises:
        DataError: It is not an archive of `torch.save`, or its members are not plain files that lie apart.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        count, size, start = _directory(data)
        self.members: dict[str, Member] = {}
        folders, position = set(), start
        spans = [(start, len(data), "the directory")]
        for _ in range(count):
            name, member, header, position = _entry(data, position, start + size)
            folder, _, inner = name.partition("/")
            folders.add(folder)
            if inner in self.members:
                raise DataError(f"refused member {name!r}, which is there twice")
            self.members[inner] = member
            spans.append((header, member.start + member.size, repr(name)))
        if position != start + size or len(folders) != 1:
            raise DataError(
                "damaged archive: expected one folder of files, and a directory that ends where it says"
            )
        spans.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
            if begin < end:
                raise DataError(f"refused members {name} and {other}, which overlap")

    def read(self, name: str) -> bytearray:
        """Return the content of a member after checking its checksum.

        Raises:
            DataError: There is no such member, or it is damaged.
        """
        if name not in self.members:
            raise DataError(f"damaged archive: {name!r} is missing")
        member = self.members[name]
        content = bytearray(member.size)
        with memoryview(self._data) as view:
            content[:] = view[member.start : member.start + member.size]
        if zlib.crc32(content) != member.crc:
            raise DataError(f"damaged archive: {name!r} does not have its checksum")
        return content


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """Return the number of members, and the size and start of the directory."""
    end = len(data) - END_SIZE
    if end < 0 or data[end : end + 4] != END:
        raise DataError("damaged archive: its end is missing")
    disk, first, here, count, size, start, comment = struct.unpack("<HHHHIIH", data[end + 4 :])
    values = (count, size, start)
    at = end - LOCATOR64_SIZE - END64_SIZE
    if (
        at >= 0
        and data[at : at + 4] == END64
        and data[end - LOCATOR64_SIZE : end - LOCATOR64_SIZE + 4] == LOCATOR64
    ):
        here, count, size, start = struct.unpack("<QQQQ", data[at + 24 : at + 56])
        if any(
            short not in (long, most)
            for short, long, most in zip(values, (count, size, start), LIMITS, strict=True)
        ):
            raise DataError("damaged archive: its two ends differ")
        end = at
    if disk or first or comment or here != count:
        raise DataError("expected an archive in one part and without comment")
    if count > MOST_MEMBERS or size > MOST_DIRECTORY_BYTES:
        raise DataError(f"expected an archive of at most {MOST_MEMBERS} members, got {count} in {size} bytes")
    if start + size != end:
        raise DataError("damaged archive: its directory does not lie before its end")
    return count, size, start


LIMITS = (0xFFFF, ELSEWHERE, ELSEWHERE)


def _entry(data: mmap.mmap, position: int, end: int) -> tuple[str, Member, int, int]:
    """Return name, member, position of its header, and next position for an entry of the directory."""
    if position + CENTRAL_SIZE > end or data[position : position + 4] != CENTRAL:
        raise DataError("damaged archive: an entry of its directory is missing")
    flags, method, _, crc, packed, size, name_size, extra, comment, _, _, _, header = struct.unpack(
        "<8xHHIIIIHHHHHII", data[position : position + CENTRAL_SIZE]
    )
    after = position + CENTRAL_SIZE + name_size + extra + comment
    if after > end:
        raise DataError("damaged archive: an entry of its directory is cut off")
    raw = data[position + CENTRAL_SIZE : position + CENTRAL_SIZE + min(name_size, LONGEST_NAME)]
    name = raw.decode("utf-8", "backslashreplace")
    if (
        name_size > LONGEST_NAME
        or not NAME.fullmatch(name)
        or ".." in name.split("/")
        or "." in name.split("/")
    ):
        raise DataError(
            f"refused member {name[:60]!r}: expected a plain relative name of at most {LONGEST_NAME} letters"
        )
    if flags & ENCRYPTED:
        raise DataError(f"refused member {name!r}, which is encrypted")
    if method or packed != size:
        raise DataError(f"refused member {name!r}, which is compressed; torch.save does not compress")
    if ELSEWHERE in (size, header):
        raise DataError(f"refused member {name!r} of 4 GiB or more")
    if data[header : header + 4] != LOCAL or header + LOCAL_SIZE > len(data):
        raise DataError(f"damaged archive: {name!r} does not lie where the directory says")
    local_name, local_extra = struct.unpack("<HH", data[header + 26 : header + 30])
    start = header + LOCAL_SIZE + local_name + local_extra
    if data[header + LOCAL_SIZE : header + LOCAL_SIZE + local_name] != raw:
        raise DataError(f"refused member {name!r}, which has two names")
    if start + size > len(data):
        raise DataError(f"damaged archive: {name!r} is cut off")
    return name, Member(start, size, crc), header, after
