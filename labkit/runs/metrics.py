"""The curve of a run as it was measured: `metrics.parquet`, a row a retained version, bound to its run by a digest.

The file's metadata hold the id of the run and a digest of every column, so a curve that was damaged, cut short or taken from another
run is refused by name; it can be measured again. Earlier formats have neither: columns, types and order are checked.

Written by `labkit.training.evaluation` and `labkit.simulation.offline`; read by `labkit.runs.record`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labkit.errors import RunError
from labkit.runs.files import check_owner, replacing

if TYPE_CHECKING:
    import pandas as pd

FILE = "metrics.parquet"
COLUMNS = ["seconds", "samples", "version", "loss", "score"]  # then what else the problem measures; a score may be NaN
KEY = b"labkit"  # in the metadata


def write(path: Path, run: str, table: pd.DataFrame) -> None:
    """Write the curve of the run of this id."""
    import pyarrow as pa
    from pyarrow import parquet

    stored = pa.Table.from_pandas(table, preserve_index=False)
    about = json.dumps({"run": run, "digest": _digest(table)}).encode()
    check_owner(path, run)
    with replacing(Path(path) / FILE) as file:
        parquet.write_table(stored.replace_schema_metadata({**stored.schema.metadata, KEY: about}), file)


def read(path: Path, run: str, checked: bool) -> pd.DataFrame:
    """The curve of the run of this id; `RunError` where it is damaged, of another run, or, `checked`, holds no digest."""
    from pyarrow import parquet

    file = Path(path) / FILE
    try:
        stored = parquet.read_table(file)
        about = json.loads((stored.schema.metadata or {}).get(KEY, b"{}"))
        table = stored.to_pandas()
        if about.get("run", run) != run:
            raise RunError(f"{file} belongs to another run: {about['run']}, not {run or 'one without id'}.")
        if list(table.columns)[: len(COLUMNS)] != COLUMNS or any(kind.kind not in "iuf" for kind in table.dtypes):
            raise ValueError(f"it holds {', '.join(map(str, table.columns))}")
        if about.get("digest", None if checked else _digest(table)) != _digest(table):
            raise ValueError("its columns do not fit its digest")
        if not (np.diff(table.version) > 0).all() or not np.isfinite(table[["seconds", "samples"]]).all(axis=None):
            raise ValueError("its versions are not in order")
    except RunError:
        raise
    except Exception as error:  # whatever Arrow makes of damaged bytes
        raise RunError(f"{file} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}.") from error
    return table.reset_index(drop=True)


def _digest(table: pd.DataFrame) -> str:
    sha = hashlib.blake2b(digest_size=16)
    for name, column in table.items():
        values = column.to_numpy()
        sha.update(f"{name} {values.dtype.str} {len(values)} ".encode())
        sha.update(np.ascontiguousarray(values))
    return sha.hexdigest()
