"""The README's numbers are those of bench/results, and those are a run's."""

import json
from pathlib import Path

import pytest

from bench import publish
from contract import config as config_module
from contract import disk
from contract.artifacts import stage_output
from eval import table

ROOT = Path(__file__).parents[2]
BLOCK = "<!-- results:{0} -->{1}<!-- /results:{0} -->"


def test_the_readme_shows_the_published_results_and_no_others():
    readme = (ROOT / "README.md").read_text()
    files = [file for file in (ROOT / "bench" / "results").glob("*.json") if '"models"' in file.read_text()]
    published = {file.stem: publish.read_published(file) for file in files}
    for name, results in published.items():
        assert results.name == name
        assert publish.with_block(readme, results) == readme, f"publish {name} again: python bench/publish.py"
        drawn = (ROOT / "bench" / "results" / f"{name}.md").read_text()
        assert drawn.endswith(table.markdown(results))
    marked = [line.split("results:")[1].split(" ")[0] for line in readme.splitlines() if "<!-- results:" in line]
    assert sorted(marked) == sorted(published)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "README.md").write_text("before\n" + BLOCK.format("small", "\nold\n") + "\nafter\n")
    return folder


def make_run(folder: Path, **metrics: float) -> Path:
    """The artifacts of a run named small, all but eval/ empty."""
    file = folder / "small.toml"
    file.write_text(f'work = "{folder / "work"}"\n[data]\npath = "/secret/folder"\n')
    config, digests = config_module.load(str(file)), {}
    estimates = {name: {"mean": mean, "low": mean, "high": mean} for name, mean in metrics.items()}
    for stage in ("corpus", "gid", "model", "eval"):
        with stage_output(config, stage) as output:
            (output.path / "data.bin").write_bytes(stage.encode())
            if stage == "eval":
                results = table.Results("small", {"data": "few"}, {"ColaRec": estimates}, {})
                table.write(results, output.path / "metrics.json")
            digests[stage] = output.commit({"num_users": 3}, dict(digests)).digest
    return config.work_dir


def test_publishing_copies_the_run(tmp_path, checkout):
    work = make_run(tmp_path, ndcg_at_5=0.125)
    assert publish.publish(work, checkout) == "small"
    results = publish.read_published(checkout / "bench" / "results" / "small.json")
    assert results == table.read(work / "eval" / "metrics.json")
    shown = table.markdown(results)
    assert "0.1250" in shown
    assert (checkout / "README.md").read_text() == "before\n" + BLOCK.format("small", f"\n{shown}") + "\nafter\n"
    assert (checkout / "bench" / "results" / "small.md").read_text() == f"# small\n\n{shown}"
    text = (checkout / "bench" / "results" / "small.json").read_text()
    assert json.loads(text)["manifests"]["corpus"]["counts"] == {"num_users": 3}
    assert "secret" not in text
    assert str(tmp_path) not in text


def test_publishing_again_replaces_the_numbers(tmp_path, checkout):
    publish.publish(make_run(tmp_path, ndcg_at_5=0.125), checkout)
    publish.publish(make_run(tmp_path, ndcg_at_5=0.25), checkout)
    readme = (checkout / "README.md").read_text()
    assert "0.2500" in readme
    assert "0.1250" not in readme
    assert readme.count("<!-- results:small -->") == 1


@pytest.mark.parametrize("readme", ["", BLOCK.format("other", ""), 2 * BLOCK.format("small", "")])
def test_a_readme_without_a_place_is_refused(tmp_path, checkout, readme):
    (checkout / "README.md").write_text(readme)
    with pytest.raises(ValueError, match="<!-- results:small -->"):
        publish.publish(make_run(tmp_path, ndcg_at_5=0.125), checkout)
    assert not (checkout / "bench").exists()


def test_an_unfinished_run_names_the_command(tmp_path, checkout):
    with pytest.raises(FileNotFoundError, match="run first: spark-submit"):
        publish.publish(tmp_path / "nothing", checkout)


def test_numbers_changed_by_hand_are_refused(tmp_path, checkout):
    work = make_run(tmp_path, ndcg_at_5=0.125)
    metrics = work / "eval" / "metrics.json"
    metrics.write_text(metrics.read_text().replace("0.125", "0.925"))
    with pytest.raises(ValueError, match="was changed after eval wrote it"):
        publish.publish(work, checkout)


def test_an_evaluation_of_another_model_is_refused(tmp_path, checkout):
    work = make_run(tmp_path, ndcg_at_5=0.125)
    manifest = work / "model" / "manifest.json"
    disk.write_record(manifest, disk.read_record(manifest, "") | {"digest": "another"})
    with pytest.raises(ValueError, match=r"model/ was rebuilt after"):
        publish.publish(work, checkout)
