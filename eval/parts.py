"""A large table in parts: several processes write them, a run that was stopped goes on from them, one file comes of it.

recs.parquet.parts/     manifest.json: what the parts are from, and the checksum of keys.npy
                        part-00000.parquet ..: complete ones; part-00000.json ..: their checksums
recs.parquet            written last, with what it is from in its metadata; then the folder goes
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contract import disk
from contract.artifacts import MANIFEST

ROWS_PER_GROUP = 1 << 16  # of the table
_ORIGIN = b"colarec"  # in the metadata of the table
OTHER_OUT = "write elsewhere with --out=..."  # what to do, beside making room


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
            ValueError: the folder holds parts of another origin, is damaged, or cannot be written.
        """
        if self._origin_of_output() == origin:
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        try:
            found = self._manifest()["origin"]
        except FileNotFoundError:  # nothing is there, or it was killed before it began
            self._create(origin, keys)
            return True
        differing = [name for name in origin | found if origin.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.folder} holds parts with {name} = {found.get(name)!r}, now it is {origin.get(name)!r}; go on "
                "as they were begun, delete the folder to start over, or write elsewhere with --out=..."
            )
        return True

    def _create(self, origin: dict, keys: np.ndarray) -> None:
        if any(self.folder.glob("part-*.parquet")):
            raise ValueError(f"{self.folder} holds parts and no {MANIFEST}, which says of what; {self._over}")
        file = self.folder / "keys.npy"
        with disk.writing(self.folder, OTHER_OUT, keys.nbytes):
            try:
                self.folder.mkdir(exist_ok=True)
                disk.save_array(file, keys)
                disk.write_record(self.folder / MANIFEST, {"origin": origin, "keys": disk.fingerprint(file)})
            except OSError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    @property
    def _over(self) -> str:
        return f"delete the folder {self.folder} to start over"

    def _manifest(self) -> dict:
        return disk.read_record(self.folder / MANIFEST, self._over)

    def keys(self) -> np.ndarray:
        """Raises ValueError when they are no longer as they were written."""
        file = self.folder / "keys.npy"
        if problem := disk.difference(file, self._manifest()["keys"]):
            raise ValueError(f"{file} {problem}; {self._over}")
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def is_whole(self, part: int) -> bool:
        """Whether a part is there, as it was written."""
        try:
            expected = disk.read_record(self._record(part), "")
        except (FileNotFoundError, ValueError):
            return False
        return not disk.difference(self.file(part), expected)

    def _record(self, part: int) -> Path:
        return self.file(part).with_suffix(".json")

    @property
    def _again(self) -> str:
        return f"{OTHER_OUT}; the same command goes on from the parts in {self.folder}"

    def write(self, part: int, table: pa.Table) -> None:
        """Raises ValueError when there is no room; the parts before stay."""
        temporary = self.folder / f".{self.file(part).name}.tmp"
        with disk.writing(self.file(part), self._again, table.nbytes):
            try:
                pq.write_table(table, temporary)
                disk.write_record(self._record(part), disk.fingerprint(temporary))
                temporary.rename(self.file(part))
            except OSError:
                disk.remove(temporary)
                raise

    def finish(self, num_parts: int) -> int:
        """Makes the table of its parts, in their order, and removes them. Returns the number of its rows.

        Raises:
            ValueError: a part is damaged, or there is no room; the parts stay.
        """
        for part in range(num_parts):
            if not self.is_whole(part):
                raise ValueError(f"{self.file(part)} is damaged; the same command makes it again")
        origin = json.dumps(self._manifest()["origin"], indent=1)
        temporary = self.output.with_name(f".{self.output.name}.tmp")
        num_bytes = sum(self.file(part).stat().st_size for part in range(num_parts))
        with disk.writing(self.output, self._again, num_bytes):
            try:
                num_rows = self._join(num_parts, origin, temporary)
                temporary.rename(self.output)
            except OSError:
                disk.remove(temporary)
                raise
        shutil.rmtree(self.folder)
        return num_rows

    def _join(self, num_parts: int, origin: str, file: Path) -> int:
        schema = pq.read_schema(self.file(0)).with_metadata({_ORIGIN: origin})
        waiting, num_rows = [], 0
        with pq.ParquetWriter(file, schema) as writer:
            for part in range(num_parts):
                waiting.append(pq.read_table(self.file(part)))
                num_waiting = sum(table.num_rows for table in waiting)
                if num_waiting >= ROWS_PER_GROUP or part == num_parts - 1:
                    writer.write_table(pa.concat_tables(waiting).cast(schema), row_group_size=num_waiting)
                    waiting, num_rows = [], num_rows + num_waiting
        return num_rows

    def _origin_of_output(self) -> dict | None:
        try:
            return json.loads(pq.read_schema(self.output).metadata[_ORIGIN])
        except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):
            return None  # not there, or another table
