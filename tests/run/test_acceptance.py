"""Tokens per forward of a validation: what counts, by hand and against a plain walk."""

import pytest
import torch
import torch.distributed as dist
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.run.acceptance import (
    CLASSES,
    Acceptance,
    TokenKinds,
    acceptance_metrics,
    kept_guesses,
    kind_of,
    token_kinds,
    verified_positions,
)

K = 3
KINDS = TokenKinds(torch.tensor([0, 1, 2, 3]), torch.tensor([True, True, False, False]))


def labels_of(doc, keep=None):
    doc_BT = torch.tensor([doc])
    keep_BT = doc_BT >= 0 if keep is None else torch.tensor([keep]).bool()
    return mtp_labels(torch.zeros_like(doc_BT), keep_BT, doc_BT, K)


def choices_of(head_0, *others):
    """Choices of the heads at each position, as rows by head."""
    return torch.tensor([head_0, *others]).T[None]


def test_a_guess_is_kept_if_head_0_draws_it_there_and_all_before_it_are():
    choices_BTK = choices_of(
        [5, 6, 7, 8, 9, 4],
        [6, 0, 8, 0, 0, 0],  # of head 1: right at 0 and 2, where head 0 chooses one further
        [7, 8, 9, 0, 0, 0],  # of head 2: right at 0, 1 and 2, which at 1 is behind a miss
    )
    assert kept_guesses(choices_BTK, labels_of([0] * 6)).tolist() == [[2, 0, 2, -1, -1, -1]]


@pytest.mark.parametrize(
    ("doc", "keep", "counted"),
    [
        ([0] * 9, None, [0, 1, 2, 3, 4, 5]),
        ([0] * 5 + [1] * 4, None, [0, 1, 5]),  # targets of 2 to 4 would be of another document
        ([0] * 5 + [-1] * 4, None, [0, 1]),  # padding
        ([0] * 9, [0] * 3 + [1] * 6, [2, 3, 4, 5]),  # from a prompt's last token
        ([0] * 9, [0, 1, 1, 1, 0, 0, 1, 1, 1], [0, 5]),  # two turns
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], None, []),
        ([0] * 9, [0] * 9, []),  # a pack that fills up the last batch
    ],
)
def test_positions_that_count_have_all_targets_in_their_document(doc, keep, counted):
    kept_BT = kept_guesses(torch.zeros(1, 9, K, dtype=torch.long), labels_of(doc, keep))
    assert (kept_BT[0] >= 0).nonzero().flatten().tolist() == counted
    acceptance = Acceptance(K, KINDS)
    assert (kept_BT[0][counted] == K - 1).all()  # and at each all guesses are kept
    # A new document, and a new turn, begins a block whatever the one before reached.
    verified = verified_positions(kept_BT)[0].nonzero().flatten().tolist()
    starts = [t for t in counted if t - 1 not in counted]
    assert set(starts) <= set(verified) <= set(counted)
    assert acceptance._counts.sum() == 0


def test_the_next_block_begins_behind_the_one_before():
    kept_BT = torch.tensor([[2, 2, 2, 0, 0, 1, 2, -1, -1, 0], [-1, 1, 0, 0, -1, -1, 2, 2, 2, 2]])
    verified_BT = verified_positions(kept_BT)
    assert [row.nonzero().flatten().tolist() for row in verified_BT] == [
        [0, 3, 4, 5, 9],
        [1, 3, 6, 9],
    ]


def a_batch(seed, B=4, T=40):
    """Choices that agree often, packed documents with prompts, and marks."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(size, generator=generator)

    doc_BT = (rand(B, T) < 0.05).long().cumsum(1)
    keep_BT = rand(B, T) < 0.97
    tokens_BT = (rand(B, T) * 4).long()
    labels_BTK = mtp_labels(tokens_BT, keep_BT, doc_BT, K)
    return (rand(B, T, K) * 1.6).long(), labels_BTK, tokens_BT, rand(B, T) < 0.2


def plain(batches):
    """The figures by a loop that goes through each row as a decoder would."""
    blocks, everywhere = [], []
    for choices_BTK, labels_BTK, tokens_BT, noise_BT in batches:
        for b in range(len(tokens_BT)):
            counts = (labels_BTK[b] != -100).all(-1).tolist()
            reached = 0
            for t, is_counted in enumerate(counts):
                if not is_counted:
                    continue
                kept, own_TK = 0, choices_BTK[b]
                while kept < K - 1 and own_TK[t, kept + 1] == own_TK[t + kept + 1, 0]:
                    kept += 1
                everywhere.append(1 + kept)
                if not counts[t - 1] or t == 0 or t == reached:
                    after, before = int(tokens_BT[b, t + 1]), int(tokens_BT[b, t])
                    if after == 1 and before > 1:
                        after = 0
                    blocks.append((1 + kept, after, bool(noise_BT[b, t + 1])))
                    reached = t + 1 + kept
    return blocks, everywhere


@pytest.mark.usefixtures("gloo_group")
def test_figures_are_those_of_a_plain_walk():
    batches = [a_batch(seed) for seed in range(3)]
    acceptance = Acceptance(K, KINDS)
    for batch in batches:
        acceptance.add(*batch)
    found, (blocks, everywhere) = acceptance.figures(), plain(batches)

    def mean(values):
        values = list(values)
        return pytest.approx(sum(values) / len(values))

    assert found["tokens_per_forward"] == mean(n for n, *_ in blocks)
    assert found["acceptance_length"] == mean(everywhere)
    assert found["per_head"] == [mean(n > k for n, *_ in blocks) for k in (1, 2)]
    assert found["tokens_per_forward"] == pytest.approx(1 + sum(found["per_head"]))
    groups = {name: [b for b in blocks if b[1] == i] for i, name in enumerate(CLASSES)}
    groups |= {"clean": [b for b in blocks if not b[2]], "marked": [b for b in blocks if b[2]]}
    assert found["by_class"] == {
        name: {
            "share": pytest.approx(len(of) / len(blocks)),
            "tokens_per_forward": mean(n for n, *_ in of),
        }
        for name, of in groups.items()
    }
    metrics = acceptance_metrics(found)
    assert metrics["acceptance_head_2"] == found["per_head"][1]
    assert {"tokens_per_forward/word_start", "tokens_per_forward/marked"} < metrics.keys()
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz_/12") for name in metrics)  # MLflow


@pytest.mark.usefixtures("gloo_group")
def test_one_head_gives_one_token_and_no_position_no_figure():
    for n_heads, doc, expected in ((1, [0] * 5, 1.0), (3, [0, 0, 1, 1], None)):
        doc_BT = torch.tensor([doc])
        labels_BTK = mtp_labels(torch.zeros_like(doc_BT), doc_BT >= 0, doc_BT, n_heads)
        acceptance = Acceptance(n_heads, KINDS)
        nothing = torch.zeros_like(labels_BTK)
        acceptance.add(nothing, labels_BTK, nothing[..., 0], nothing[..., 0].bool())
        found = acceptance.figures()
        assert found.get("tokens_per_forward") == expected
        assert acceptance_metrics(found).get("tokens_per_forward") == expected
        assert found.get("per_head", []) == []
        assert found.get("by_class", {}) == {}


def rank_main(rank, folder, ranks):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    acceptance = Acceptance(K, KINDS)
    for seed in range(rank, 2, ranks):
        acceptance.add(*a_batch(seed, B=1 + 3 * seed))  # ranks with unlike numbers of positions
    torch.save(acceptance.figures(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(forks, tmp_path):
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        forks.call(rank_main, str(folder), ranks, ranks=ranks)
        found += [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    assert found[0] == found[1] == found[2]


def test_kinds_of_tokens(tiny_tokenizer_path):
    START, REST, LAYOUT, SYMBOL = range(4)
    for text, expected in {
        " def": (START, True),
        "def": (REST, True),  # begins a word if no word is before it
        "_x2": (REST, True),
        "é": (REST, True),
        "    ": (LAYOUT, False),
        "\n": (LAYOUT, False),
        "(x": (SYMBOL, True),
        " 7": (SYMBOL, True),
        "):": (SYMBOL, False),
        "x.": (REST, False),
    }.items():
        assert kind_of(text) == expected
    tokenizer = Llama2Tokenizer(str(tiny_tokenizer_path))
    kinds, spm = token_kinds(tokenizer), tokenizer._spm_model.spm_model
    assert len(kinds.class_V) == len(kinds.ends_word_V) == tokenizer.vocab_size
    byte = {chr(b): spm.piece_to_id(f"<0x{b:02X}>") for b in b"\n(a"} | {
        "beyond": spm.piece_to_id("<0xC3>")
    }
    assert [kinds.class_V[i].item() for i in byte.values()] == [LAYOUT, SYMBOL, REST, REST]
    assert kinds.class_V[tokenizer.eos_id] == SYMBOL
    for i in tokenizer.encode("return value(s)\n", add_bos=False, add_eos=False):
        text = spm.id_to_piece(i).replace("▁", " ")
        if not spm.is_byte(i):
            assert (kinds.class_V[i].item(), bool(kinds.ends_word_V[i])) == kind_of(text)
