"""Publishes the results of a run, so that no number in the README is typed by hand.

    python bench/publish.py --work runs/phone

Copies <work>/eval/metrics.json to bench/results/<name>.json, with facts of the run's manifests, draws
bench/results/<name>.md, and puts the same table into README.md between these two lines, which must be there:

    <!-- results:<name> -->
    <!-- /results:<name> -->
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

from contract import cli
from contract.artifacts import STAGES, read_manifest
from contract.disk import sha256, write_atomically
from eval import table

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder of the run, which eval has finished")
    name = publish(parser.parse_args(argv).work, ROOT)
    print(f"published {name}: bench/results/{name}.json, bench/results/{name}.md and README.md")


def publish(work: Path, root: Path) -> str:
    """Copies the results of `work` into the checkout at `root` and returns their name.

    Raises:
        FileNotFoundError: the run has no finished evaluation.
        ValueError: metrics.json is not what eval wrote or not of these artifacts, or the README has no place for it.
    """
    manifests = {
        stage: read_manifest(work / stage, f"{about.command} --config <your config>") for stage, about in STAGES.items()
    }
    metrics = work / "eval" / "metrics.json"
    if sha256(metrics) != manifests["eval"]["files"]["metrics.json"]["sha256"]:
        raise ValueError(f"{metrics} was changed after eval wrote it; run again: {STAGES['eval'].command}")
    for need, digest in manifests["eval"]["inputs"].items():
        if digest != manifests[need]["digest"]:
            raise ValueError(f"{need}/ was rebuilt after {metrics.parent}; run again: {STAGES['eval'].command}")
    results = table.read(metrics)
    # The README first: it is what can fail.
    readme = root / "README.md"
    write_atomically(readme, with_block(readme.read_text(), results))
    folder = root / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {stage: _facts(manifest) for stage, manifest in manifests.items()}
    published = {**dataclasses.asdict(results), "manifests": facts}
    write_atomically(folder / f"{results.name}.json", json.dumps(published, indent=1) + "\n")
    write_atomically(folder / f"{results.name}.md", f"# {results.name}\n\n{table.markdown(results)}")
    return results.name


def read_published(file: Path) -> table.Results:
    """The results in bench/results/<name>.json."""
    published = json.loads(file.read_text())
    published.pop("manifests")
    return table.Results(**published)


def with_block(readme: str, results: table.Results) -> str:
    """The README with the table of these results between their markers. Raises ValueError without the markers."""
    begin, end = f"<!-- results:{results.name} -->", f"<!-- /results:{results.name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"README.md must hold these two lines once, for the table to go between:\n{begin}\n{end}")
    # A function: a table is not a replacement pattern, whatever it holds.
    return pattern.sub(lambda _: f"{begin}\n{table.markdown(results)}{end}", readme)


def _facts(manifest: dict) -> dict:
    """What made an artifact, without the folders of the machine that it was made on."""
    settings = {key: value for key, value in manifest["config"].items() if key != "data.path"}
    return {key: manifest[key] for key in ("written", "git", "digest", "counts", "inputs")} | {"config": settings}


if __name__ == "__main__":
    cli.run(main)
