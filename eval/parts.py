"""A large table in parts: several processes write them, a run that was stopped goes on from them, one file comes of it.

recs.parquet.parts/     manifest.json: what the parts are from; part-00000.parquet ..: complete ones
recs.parquet            written last, with the same manifest in its metadata; then the folder goes
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contract.artifacts import MANIFEST, write_atomically

ROWS_PER_GROUP = 1 << 16  # of the table
_ORIGIN = b"colarec"  # in the metadata of the table


@dataclass(frozen=True)
class Parts:
    """The parts of a table that is to be `output`."""

    output: Path

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    def file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.parquet"

    def begin(self, origin: dict, keys: np.ndarray) -> bool:
        """Makes the folder ready for parts of this origin; False when the table itself is there and of this origin.

        Args:
            origin: JSON-ready; what the table follows from.
            keys: what is to be divided into parts, for all processes to read with `keys`.

        Raises:
            ValueError: the folder holds parts of another origin.
        """
        if self._origin_of_output() == origin:
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        self.folder.mkdir(exist_ok=True)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():  # killed before it began
            np.save(self.folder / "keys.npy", keys)
            write_atomically(manifest, json.dumps(origin, indent=1))
        found = json.loads(manifest.read_text())
        differing = [name for name in origin | found if origin.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.folder} holds parts with {name} = {found.get(name)!r}, now it is {origin.get(name)!r}; go on "
                "as they were begun, delete the folder to start over, or write elsewhere with --out=..."
            )
        return True

    def keys(self) -> np.ndarray:
        return np.load(self.folder / "keys.npy", mmap_mode="r")

    def write(self, part: int, table: pa.Table) -> None:
        temporary = self.folder / f".{self.file(part).name}.tmp"
        pq.write_table(table, temporary)
        temporary.rename(self.file(part))

    def finish(self, num_parts: int) -> int:
        """Makes the table of its parts, in their order, and removes them. Returns the number of its rows."""
        origin = (self.folder / MANIFEST).read_text()
        schema = pq.read_schema(self.file(0)).with_metadata({_ORIGIN: origin})
        temporary = self.output.with_name(f".{self.output.name}.tmp")
        waiting, num_rows = [], 0
        with pq.ParquetWriter(temporary, schema) as writer:
            for part in range(num_parts):
                waiting.append(pq.read_table(self.file(part)))
                num_waiting = sum(table.num_rows for table in waiting)
                if num_waiting >= ROWS_PER_GROUP or part == num_parts - 1:
                    writer.write_table(pa.concat_tables(waiting).cast(schema), row_group_size=num_waiting)
                    waiting, num_rows = [], num_rows + num_waiting
        temporary.rename(self.output)
        shutil.rmtree(self.folder)
        return num_rows

    def _origin_of_output(self) -> dict | None:
        try:
            return json.loads(pq.read_schema(self.output).metadata[_ORIGIN])
        except (OSError, pa.ArrowException, TypeError, KeyError, json.JSONDecodeError):
            return None  # not there, or another table
