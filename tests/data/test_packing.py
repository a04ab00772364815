import pickle
import time
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from wmtp_modules.data.packing import PackedDataset, collate
from wmtp_modules.loss.mtp_loss import mtp_labels


def make_rows(lengths, noise=True, seed=0):
    """Token u of row r is 1000 r + u, so that a pack tells where everything came from."""
    rng = np.random.default_rng(seed)
    columns = {
        "tokens": [[1000 * r + u for u in range(n)] for r, n in enumerate(lengths)],
        "keep": [(rng.random(n) < 0.6).tolist() for n in lengths],
    }
    if noise:
        columns["noise"] = [(rng.random(n) < 0.3).tolist() for n in lengths]
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features(
            tokens=datasets.List(datasets.Value("int32")),
            keep=datasets.List(datasets.Value("bool")),
            **({"noise": datasets.List(datasets.Value("bool"))} if noise else {}),
        ),
    )  # fmt: skip


LENGTHS = [5, 16, 1, 9, 3, 7, 12, 2, 2, 16, 4, 11]


def test_every_row_is_whole_and_once_in_an_epoch():
    rows = make_rows(LENGTHS)
    packed = PackedDataset(rows, max_seq_len=16, seed=3, pad_id=9)
    for epoch in range(3):
        packed.set_epoch(epoch)
        seen = []
        for pack in packed:
            assert {k: v.dtype for k, v in pack.items()} == {
                "tokens": torch.int64, "keep": torch.bool, "doc": torch.int64,
                "input_pos": torch.int64, "row": torch.int64, "noise": torch.bool,
                "seq_lens": torch.int64,
            }  # fmt: skip
            assert all(len(v) == 16 for k, v in pack.items() if k != "seq_lens")
            assert pack["seq_lens"].sum() == 16
            n_docs = int(pack["doc"].max()) + 1
            parts = {
                k: v.split(pack["seq_lens"].tolist()) for k, v in pack.items() if k != "seq_lens"
            }
            for d in range(n_docs):
                row = int(parts["row"][d][0])
                seen.append(row)
                n = LENGTHS[row]
                assert set(parts["row"][d].tolist()) == {row}
                assert set(parts["doc"][d].tolist()) == {d}
                assert parts["input_pos"][d].tolist() == list(range(n))
                for column in ("tokens", "keep", "noise"):
                    assert parts[column][d].tolist() == rows[row][column]
            if len(pack["seq_lens"]) > n_docs:
                tail = {k: set(v[n_docs].tolist()) for k, v in parts.items() if k != "input_pos"}
                assert tail == {
                    "tokens": {9}, "keep": {False}, "doc": {-1}, "row": {-1}, "noise": {False}
                }  # fmt: skip
        assert sorted(seen) == list(range(len(LENGTHS)))


def flat_rows(packed):
    return [pack["row"].tolist() for pack in packed]


def test_order_depends_on_seed_and_epoch_only():
    rows = make_rows(LENGTHS)

    def order(seed, epoch):
        packed = PackedDataset(rows, max_seq_len=16, seed=seed)
        packed.set_epoch(epoch)
        return flat_rows(packed)

    assert order(0, 1) == order(0, 1)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    packed = PackedDataset(rows, max_seq_len=16, seed=0)
    packed.set_epoch(5)
    packed.set_epoch(1)
    assert flat_rows(packed) == order(0, 1)


def test_packs_are_filled_greedily():
    packed = PackedDataset(make_rows(LENGTHS), max_seq_len=16, seed=0)
    lengths = [
        [LENGTHS[r] for r in dict.fromkeys(pack["row"].tolist()) if r >= 0] for pack in packed
    ]
    for pack, following in pairwise(lengths):
        assert sum(pack) <= 16
        assert sum(pack) + following[0] > 16


def test_labels_never_cross_a_document():
    rows = make_rows(LENGTHS)
    batch = collate(list(PackedDataset(rows, max_seq_len=16, seed=1)))
    labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], 4)
    for b, t, k in np.ndindex(labels_BTK.shape):
        row, u = int(batch["row"][b, t]), int(batch["input_pos"][b, t]) + k + 1
        inside = row >= 0 and u < LENGTHS[row]
        expected = 1000 * row + u if inside and rows[row]["keep"][u] else -100
        assert labels_BTK[b, t, k] == expected


def test_collate_keeps_seq_lens_as_a_list():
    packed = PackedDataset(make_rows(LENGTHS), max_seq_len=16, seed=1)
    items = [packed[0], packed[1]]
    batch = collate(items)
    assert batch["tokens"].shape == (2, 16)
    assert [s.tolist() for s in batch["seq_lens"]] == [i["seq_lens"].tolist() for i in items]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_scores_follow_their_tokens(shape):
    rows = make_rows(LENGTHS, noise=False)
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal((n, *shape)).astype(np.float32) for n in LENGTHS]
    for pack in PackedDataset(rows, max_seq_len=16, seed=2, scores={"reference": scores}):
        assert pack["reference"].dtype == torch.float32
        assert pack["reference"].shape == (16, *shape)
        assert not pack["noise"].any()
        for t in range(16):
            row, u = int(pack["row"][t]), int(pack["input_pos"][t])
            if row < 0:
                assert pack["reference"][t].isnan().all()
            else:
                np.testing.assert_array_equal(pack["reference"][t].numpy(), scores[row][u])


def test_wrong_rows_scores_and_indices():
    with pytest.raises(ValueError, match="row 1 has 16 tokens, max_seq_len is 15"):
        PackedDataset(make_rows(LENGTHS), max_seq_len=15, seed=0)
    with pytest.raises(ValueError, match="row 1 has 0 tokens"):
        PackedDataset(make_rows([3, 0]), max_seq_len=15, seed=0)
    with pytest.raises(ValueError, match="no rows to pack"):
        PackedDataset(make_rows([3]).select([]), max_seq_len=15, seed=0)
    scores = {"reference": [np.zeros(2)]}
    packed = PackedDataset(make_rows([3]), max_seq_len=15, seed=0, scores=scores)
    with pytest.raises(ValueError, match="row 0 has 3 tokens but 2 scores"):
        packed[0]
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"pack {index} of 1"):
            packed[index]


def test_selected_rows_keep_their_order(tmp_path):
    rows = make_rows(LENGTHS)
    chosen = [7, 3, 3, 0, 11]
    packed = PackedDataset(rows.select(chosen), max_seq_len=16, seed=0)
    for pack in packed:
        for token, row, u in zip(pack["tokens"], pack["row"], pack["input_pos"], strict=True):
            if row >= 0:
                assert token == 1000 * chosen[row] + u


def test_survives_pickling_and_loader_workers(tmp_path):
    make_rows(LENGTHS).save_to_disk(str(tmp_path / "rows"))
    packed = PackedDataset(datasets.load_from_disk(str(tmp_path / "rows")), max_seq_len=16, seed=0)
    packed.set_epoch(2)
    pickled = pickle.dumps(packed)
    assert flat_rows(pickle.loads(pickled)) == flat_rows(packed)
    loader = DataLoader(packed, batch_size=2, collate_fn=collate, num_workers=1)
    assert [row for batch in loader for row in batch["row"].tolist()] == flat_rows(packed)


def test_many_rows_pack_in_seconds():
    lengths = np.random.default_rng(0).integers(5, 200, 100_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int32)))
    keep = pa.ListArray.from_arrays(offsets, pa.array(np.ones(offsets[-1], bool)))
    rows = datasets.Dataset(pa.table({"tokens": tokens, "keep": keep}))
    start = time.perf_counter()
    packed = PackedDataset(rows, max_seq_len=2048, seed=0)
    packed.set_epoch(1)
    assert time.perf_counter() - start < 3  # 0.1 s on two idle cores
    assert offsets[-1] / (len(packed) * 2048) > 0.9
    assert packed[0]["keep"].sum() == packed[0]["seq_lens"][:-1].sum()


def test_rewards_stand_at_every_token_of_their_row():
    rows = make_rows([3, 4, 2])
    for pack in PackedDataset(rows, max_seq_len=8, seed=0, rewards=np.array([0.5, -1.0, 2.0])):
        for t, row in enumerate(pack["row"].tolist()):
            if row < 0:
                assert pack["reward"][t].isnan()
            else:
                assert pack["reward"][t] == [0.5, -1.0, 2.0][row]
    with pytest.raises(ValueError, match="there are 2 rewards for 3 rows"):
        PackedDataset(rows, max_seq_len=8, seed=0, rewards=np.zeros(2))
