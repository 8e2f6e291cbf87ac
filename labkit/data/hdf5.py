"""HDF5 files as the readers open them: what a file says of its arrays is checked against its size before memory is taken for it.

An HDF5 file of a few kB may claim arrays of any shape, and may name other files, whose content it then shows as its own: by external
links, external storage and virtual data sets. Such names are followed only where the user asks for it (`external=True`).

Used by `labkit.data.arrays`, `labkit.showers.files`, `labkit.jets.files` and `labkit.jets.anomaly`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit.data.cache import CHUNK_BYTES, reading
from labkit.errors import DataError

DEFLATED = 1100  # bytes at most that come out of one in a file: deflate packs 1,032 into one
SOFT_LINKS = 32  # one behind the other
ASK = "Give external=True if you know the file and those that it names."


@contextmanager
def opened(path: Path, external: bool = False) -> Iterator[Members]:
    """The file at `path`; DataError with its name for whatever is wrong with it.

    With `external` also what it shows of other files is read.
    """
    import h5py

    with reading(path, advice="Is it a whole HDF5 file?"), h5py.File(path, "r") as file:
        yield Members(path, file, external)


def named_files(path: Path) -> list[Path]:
    """Other files that the links and data sets at the top of an HDF5 file name, of those that are there; in order."""
    import h5py

    found: set[str] = set()
    with reading(path, advice="Is it a whole HDF5 file?"), h5py.File(path, "r") as file:
        for name in file:
            link = file.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                found.add(link.filename)
            elif isinstance(link, h5py.HardLink) and isinstance(data := file[name], h5py.Dataset):
                found |= {part[0] for part in data.external or ()}
                found |= {part.file_name for part in (data.virtual_sources() if data.is_virtual else ())}
    paths = {path.parent / os.fsdecode(name) for name in found}
    return sorted(other for other in paths if other.is_file() and other != path)


class Members:
    """The members of an HDF5 file or of a group in it, by name: each is checked before it is handed out.

    `members[name]` is a `Members` or an h5py.Dataset. DataError for what is in another file, unless that is asked for, and for a data set
    that claims more than its file can hold.
    """

    def __init__(self, path: Path, group: Any, external: bool) -> None:
        self._path, self._group, self._external = path, group, external
        self.attrs = group.attrs

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __contains__(self, name: str) -> bool:
        return self._group.get(name, getlink=True) is not None

    def __getitem__(self, name: str) -> Any:
        import h5py

        found = self._group[name] if self._external else self._inside(self._group, name, SOFT_LINKS)
        if isinstance(found, h5py.Group):
            return Members(self._path, found, self._external)
        if isinstance(found, h5py.Dataset):
            self._check(name, found)
        return found

    def _inside(self, group: Any, name: str, links: int) -> Any:
        """What `name` is, reached by links within this file alone."""
        import h5py

        group = group.file["/"] if name.startswith("/") else group
        for part in filter(None, name.split("/")):
            link = group.get(part, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise DataError(f"{self._path}: {part} is a link to another file, {link.filename}. {ASK}")
            if isinstance(link, h5py.SoftLink):
                if not links:
                    raise DataError(f"{self._path}: {part} is a link that leads to no data. Write the file again.")
                group = self._inside(group, link.path, links - 1)
            else:
                group = group[part]
        return group

    def _check(self, name: str, data: Any) -> None:
        elsewhere = "made of other data sets" if data.is_virtual else "stored in other files" if data.external else ""
        if elsewhere and not self._external:
            raise DataError(f"{self._path}: {name} is {elsewhere}. {ASK}")
        if elsewhere or data.shape is None:
            return
        width = data.id.get_type().get_size()
        packed = data.id.get_create_plist().get_nfilters() > 0
        claimed = math.prod(data.shape) * width
        if packed:  # a chunk is unpacked as a whole
            claimed = max(claimed, math.prod(data.chunks) * width)
        held = min(data.id.get_storage_size(), os.path.getsize(data.file.filename))
        if claimed > max(CHUNK_BYTES, held * (DEFLATED if packed else 1)):
            raise DataError(
                f"{self._path}: {name} of shape {data.shape} would be {claimed:,} bytes, and the file holds {held:,} of them. What was "
                "never written or is packed more than 1,100 times is not read: write the file again."
            )
