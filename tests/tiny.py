"""A tiny corpus/ and gid/, written without Spark and without clustering, for tests of the later rooms."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from contract import config as config_module
from contract import schema
from contract.artifacts import open_artifact, stage_output
from contract.settings import Config
from gid import neighbours
from trainer import inputs, packing
from trainer import model as model_module
from trainer.inputs import read_catalog

VOCAB_SIZE = 50
EVENTS = ["view", "purchase"]
EVENT_WEIGHTS = [0.5, 1.5]
USERS_PER_MEMBER = 6  # so that a shard has several members

OVERRIDES = {
    "gid.branching": "4",
    "model.d_model": "16",
    "model.d_ff": "32",
    "model.d_kv": "8",
    "model.num_heads": "2",
    "model.num_encoder_layers": "1",
    "model.num_decoder_layers": "1",
    "model.code_vectors": "2",
    "model.dropout": "0",
    "loss.index": "0.3",
    "loss.bpr": "0.3",
    "loss.contrastive": "0.1",
    "loss.softmax": "0.5",
    "train.negatives": "32",
    "history.attention": "full",
    "history.train_items": "5",
    "history.eval_items": "5",
    "history.user_slots": "2",
    "train.global_batch": "16",
    "train.lr": "3e-3",
    "train.streams": "4",
    "train.length_groups": "2",
    "train.epochs": "2",
    "eval.beams": "20",
    "eval.hybrid": "0",
    "eval.neighbours": "0",
    "eval.baselines": "popularity,item_knn,lightgcn",
    "eval.sasrec_epochs": "2",
    "eval.batch": "7",
}


def tiny_config(work: Path, **overrides: str) -> Config:
    """A small model on the artifacts that `write_corpus` and `write_gids` make. Keys: section__name."""
    file = work.parent / "tiny.toml"
    file.write_text("")
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    uri = f"sqlite:///{work.parent / 'mlflow.db'}"
    return config_module.load(str(file), OVERRIDES | {"work": str(work), "tracking.uri": uri} | changes)


def tiny_room(work: Path, **overrides: str):
    """Writes corpus/ and gid/; returns (config, corpus artifact, catalog, an untrained model in eval mode)."""
    config = tiny_config(work, **overrides)
    write_corpus(config)
    write_gids(config)
    corpus = open_artifact(config, "corpus")
    catalog = read_catalog(corpus, open_artifact(config, "gid"))
    torch.manual_seed(0)
    return config, corpus, catalog, model_module.ColaRec(model_module.model_config(config, catalog)).eval()


@torch.no_grad()
def move_from_start(model) -> None:
    """Weights far from their start: the decoder says something, and codes and items are told apart clearly."""
    for codes in model.parameters_of_codes():
        codes.mul_(100 if model.config.codebooks == "level" else 30)
    if model.config.leaves_are_items:
        for bias in model.code_biases:
            bias.normal_()
    norm = model.decoder.final_layer_norm.weight
    norm.copy_(torch.linspace(0.5, 1.5, len(norm)))
    model.start_D.mul_(10)
    model.item.weight.mul_(30)


@torch.no_grad()
def log_p_of_all_items(config: Config, model, catalog, batch: dict) -> torch.Tensor:
    """log p of the codes of every item for each user of an eval batch, (B, I, l), by what training computes."""
    states = model.encode(batch["user"])
    every = np.arange(1, catalog.num_items + 1)
    arrays = {"item": every} | inputs.content_bags(config, catalog, every)
    v_ID = model.item_vectors(packing.to_tensors(arrays))
    leaf, choice = (torch.from_numpy(part) for part in inputs.items_of_prefix(catalog, every))
    read, gids, rows = batch["user"]["mask"][:, None], torch.from_numpy(catalog.gids), []
    for item in every:
        gid = gids[item].expand(len(states), -1)
        d = model.decode(states, read, gid[:, None])[:, 0]
        one = torch.full((len(states),), item - 1)
        leaves = {"row": leaf[one], "choice": choice[one], "v": torch.nn.functional.pad(v_ID, (0, 0, 1, 0))}
        rows.append(-model.path_loss(d, gid, leaves if model.config.leaves_are_items else None))
    return torch.stack(rows, 1)


def sequences(num_users: int, num_items: int, seed: int = 0) -> list[np.ndarray]:
    """Item sequences that walk along the ids: after i comes i + 1, mostly."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(num_users):
        steps = rng.choice([1, 1, 1, 2], size=rng.integers(4, 9))
        result.append(1 + (rng.integers(num_items) + np.cumsum(steps)) % num_items)
    return result


def write_corpus(config: Config, num_users: int = 60, num_items: int = 40, num_shards: int = 4) -> list[np.ndarray]:
    """Writes corpus/ with the last item of each user as test and the one before as valid; returns the sequences."""
    users = sequences(num_users, num_items)
    rng = np.random.default_rng(1)
    with stage_output(config, "corpus") as output:
        tokens = [rng.integers(3, VOCAB_SIZE, rng.integers(1, 6)).tolist() for _ in range(num_items)]
        train = [s[:-2] for s in users]
        num_train = np.bincount(np.concatenate(train), minlength=num_items + 1)[1:]
        idx = list(range(1, num_items + 1))
        texts = [f"item {i}" for i in idx]
        items = [idx, [f"i{i}" for i in idx], texts, tokens, num_train.tolist(), [0] * num_items]
        _write(output.path / "items.parquet", schema.ITEMS, items)
        user_idx = list(range(1, num_users + 1))
        _write(output.path / "users.parquet", schema.USERS, [user_idx, [f"u{u}" for u in user_idx]])
        owners = [[u for u, s in zip(user_idx, train, strict=True) if i in s] for i in idx]
        _write(output.path / "item_users.parquet", schema.ITEM_USERS, [idx, owners])
        rows = [
            (u, int(item), 3_600_000 * t, 1 + int(item) % 2, max(0, 3 + t - len(s)))
            for u, s in zip(user_idx, users, strict=True)
            for t, item in enumerate(s)
        ]
        (output.path / "interactions").mkdir()
        columns = [list(column) for column in zip(*rows, strict=True)]
        _write(output.path / "interactions/part-0.parquet", schema.INTERACTIONS, columns)
        shards = {}
        for split, end in (("train", -2), ("valid", -1), ("test", None)):
            shards[split] = []
            for k in range(num_shards):
                part = [(u, users[u - 1][:end]) for u in user_idx[k::num_shards]]
                name = f"{split}-{k:05d}.tar"
                _write_shard(output.path / name, part, split)
                num_events = sum(len(s) for _, s in part)
                shards[split].append({"file": name, "num_users": len(part), "num_events": num_events})
        counts = {"num_users": num_users, "num_items": num_items, "vocab_size": VOCAB_SIZE}
        extra = {"events": EVENTS, "event_weights": EVENT_WEIGHTS, "shards": shards, "time_unit": "ms"}
        output.commit(counts, {"raw": "none"}, **extra)
    return users


def write_gids(config: Config, num_items: int = 40) -> np.ndarray:
    """Writes gid/: the base-K digits of item_idx - 1, random embeddings, and neighbours. Returns int64 (I + 1, l)."""
    branching = config.gid.branching
    length = int(np.ceil(np.log(num_items) / np.log(branching) - 1e-9))
    digits = (np.arange(num_items)[:, None] // branching ** np.arange(length)[::-1]) % branching
    rng = np.random.default_rng(2)
    corpus = config.work_dir / "corpus" / "manifest.json"
    with stage_output(config, "gid") as output:
        _write(output.path / "gids.parquet", schema.GIDS, [list(range(1, num_items + 1)), digits.tolist()])
        np.save(output.path / "item_embeddings.npy", rng.normal(size=(num_items + 1, 8)).astype(np.float32))
        np.save(output.path / "user_embeddings.npy", rng.normal(size=(61, 8)).astype(np.float32))
        train = [s[:-2] for s in sequences(60, num_items)]
        user = np.repeat(np.arange(1, 61), [len(s) for s in train])
        neighbours.write(output.path, neighbours.find(user, np.concatenate(train), 60, num_items, count=6))
        inputs = {"corpus": json.loads(corpus.read_text())["digest"]}
        output.commit({"num_items": num_items, "branching": branching, "length": length}, inputs)
    return np.concatenate([np.zeros((1, length), np.int64), digits])


def _write(path: Path, table_schema: pa.Schema, columns: list[list]) -> None:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, table_schema, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=table_schema), path)


def _write_shard(path: Path, users: list[tuple[int, np.ndarray]], split: str) -> None:
    with tarfile.open(path, "w") as tar:
        for number, begin in enumerate(range(0, len(users), USERS_PER_MEMBER)):
            content = _member(users[begin : begin + USERS_PER_MEMBER], split)
            member = tarfile.TarInfo(f"{number:06d}.arrow")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _member(users: list[tuple[int, np.ndarray]], split: str) -> bytes:
    columns = [
        [u for u, _ in users],
        [s.tolist() for _, s in users],
        [[3_600_000 * t for t in range(len(s))] for _, s in users],
        [(1 + s % 2).tolist() for _, s in users],
        [[split == "train" or t == len(s) - 1 for t in range(len(s))] for _, s in users],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema.SEQUENCES, strict=True)]
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, schema.SEQUENCES) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema.SEQUENCES))
    return stream.getvalue()
