"""Gives the manifests of an earlier version, which held no checksum of themselves, the one that they lack.

    python -m contract.seal runs/phone

All files that a manifest lists are compared with it first, large ones as well. What the manifest alone says, counts and
settings, is taken at its word: who seals it vouches for it.
"""

import argparse
import json
from pathlib import Path

from contract import cli
from contract.artifacts import MANIFEST, STAGES, digest_of
from contract.disk import CHECKSUM, difference, write_record, writing


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="work folder whose artifacts an earlier version made")
    work = parser.parse_args(argv).work
    found = [work / name for name in STAGES if (work / name / MANIFEST).is_file()]
    if not found:
        raise FileNotFoundError(f"{work} holds no artifacts")
    for path in found:
        print(f"{path / MANIFEST} {'is sealed now' if seal(path) else 'has a checksum'}", flush=True)


def seal(path: Path) -> bool:
    """Seals the manifest of the artifact at `path`; False when it has a checksum.

    Raises:
        ValueError: it, or a file that it lists, is damaged.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes().decode())
        files, digest = manifest["files"], manifest["digest"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged; run the stage again") from None
    if CHECKSUM in manifest:
        return False
    if digest_of(files) != digest:
        raise ValueError(f"{file} is damaged: its list of files differs from its digest; run the stage again")
    for name, expected in files.items():
        if problem := difference(path / name, expected):
            raise ValueError(f"{path / name} {problem}, by the manifest beside it; run the stage again")
    with writing(file, "see who may write there"):
        write_record(file, manifest)
    return True


if __name__ == "__main__":
    cli.run(main)
