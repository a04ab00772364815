import json
import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.data.tokenize import encode_text
from wmtp_modules.evaluation import measures
from wmtp_modules.evaluation.measures import (
    TOKEN_CLASSES,
    HeldoutSums,
    heldout_sums,
    read_rows,
    read_texts,
    token_classes,
)
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2

CPU = {"device": "cpu"}
# Short, empty, of every class, not ASCII, and longer than the context of 64 tokens.
TEXTS = [
    "x = 1\n",
    "",
    "def f(a):\r\n\treturn 'é', a  # ok\r\n",
    "for i in range(10):\n    print(i, i * 2)\n" * 9,
    "y",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path):
    return llama2_tokenizer(str(tiny_tokenizer_path))


@pytest.fixture
def model(tiny_model_args):
    torch.manual_seed(0)
    model = mtp_llama2(**tiny_model_args)
    with torch.no_grad():
        model.output.proj.weight.mul_(5)  # some confidence, in more than one bin
    return model


def documents_of(tokenizer, texts, context=64):
    ids = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    return [x[cut : cut + context] for x in ids for cut in range(0, len(x), context)]


def add_up(*shards):
    return HeldoutSums(*map(sum, zip(*shards, strict=True)))


class Bigram(nn.Module):
    """A model whose every head has the logits that its table gives for the current token."""

    def __init__(self, logits_VV, n_heads=1):
        super().__init__()
        V = len(logits_VV)
        self.trunk = nn.Embedding.from_pretrained(logits_VV)
        self.heads = nn.ModuleList(nn.Identity() for _ in range(n_heads))
        self.output = nn.Module()
        self.output.norm, self.output.proj = nn.Identity(), nn.Linear(V, V, bias=False)
        self.output.proj.weight.data = torch.eye(V)
        self.n_future_tokens, self.max_seq_len = n_heads, 64


# ------------------------------------------------------------------- the plain formula


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_figures_are_those_of_the_plain_formula(model, tokenizer, batch_tokens):
    """One document at a time, all its logits at once, torch's own functions; whatever the batch."""
    result = heldout_sums(model, tokenizer, TEXTS, batch_tokens=batch_tokens, **CPU).result()
    documents = documents_of(tokenizer, TEXTS)
    assert max(map(len, documents)) == 64
    assert result["tokens"] == sum(map(len, documents))
    assert [head["head"] for head in result["per_head"]] == [0, 1, 2, 3]
    for k, head in enumerate(result["per_head"]):
        logits, labels = [], []
        for document in documents:
            ids = torch.tensor([document])
            with torch.no_grad():
                logits.append(model(ids)[0, : max(0, len(document) - 1 - k), k])
            labels.append(ids[0, k + 1 :])
        logits_NV, labels_N = torch.cat(logits), torch.cat(labels)
        assert head["tokens"] == sum(max(0, len(d) - 1 - k) for d in documents) == len(labels_N)
        assert head["loss"] == pytest.approx(float(F.cross_entropy(logits_NV, labels_N)), rel=1e-5)
        hits_N5 = logits_NV.topk(5).indices == labels_N[:, None]
        assert head["top1"] == pytest.approx(float(hits_N5[:, 0].float().mean()))
        assert head["top5"] == pytest.approx(float(hits_N5.any(1).float().mean()))
        confidence = logits_NV.softmax(-1).amax(-1).numpy()
        edges = np.linspace(0, 1, 16)
        bins, ece = [], 0.0
        for low, high in pairwise(edges):
            inside = (confidence > low) & (confidence <= high)
            if inside.any():
                accuracy = hits_N5[:, 0].numpy()[inside].mean()
                bins.append((low, high, inside.sum(), confidence[inside].mean(), accuracy))
                ece += inside.mean() * abs(accuracy - confidence[inside].mean())
        assert len(bins) > 3
        assert head["ece"] == pytest.approx(ece, rel=1e-4)
        keys = ("low", "high", "tokens", "confidence", "accuracy")
        found = [[bin[key] for key in keys] for bin in head["calibration"]]
        np.testing.assert_allclose(found, bins, rtol=1e-4)


def test_acceptance_length_is_that_of_the_plain_count(tokenizer, tiny_model_args):
    """Position by position, on a model whose heads agree here and there."""
    torch.manual_seed(1)
    model = mtp_llama2(**tiny_model_args)
    for head in model.heads[1:]:  # the same head: it agrees where the text's next tokens repeat
        head.load_state_dict(model.heads[0].state_dict())
    texts = [*TEXTS, "a a a a a a a a a a a a"]
    result = heldout_sums(model, tokenizer, texts, batch_tokens=150, **CPU).result()
    lengths = []
    for document in documents_of(tokenizer, texts):
        with torch.no_grad():
            choice_TK = model(torch.tensor([document]))[0].argmax(-1).tolist()
        for t in range(len(document) - 4):
            length = 1
            while length < 4 and choice_TK[t][length] == choice_TK[t + length][0]:
                length += 1
            lengths.append(length)
    assert len(set(lengths)) > 2
    assert result["acceptance_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_shards_add_up_to_the_whole(model, tokenizer):
    whole = heldout_sums(model, tokenizer, TEXTS, batch_tokens=128, **CPU)
    shards = [
        heldout_sums(model, tokenizer, part, batch_tokens=128, **CPU)
        for part in (TEXTS[::2], [], TEXTS[1::2])
    ]
    for one, parts in zip(whole, add_up(*shards), strict=True):
        torch.testing.assert_close(one, parts, rtol=1e-6, atol=1e-6)
    assert whole.tokens.dtype == torch.float64


def test_no_more_logits_than_a_chunk_are_alive(model, tokenizer, monkeypatch):
    whole = heldout_sums(model, tokenizer, TEXTS, batch_tokens=10_000, **CPU)
    monkeypatch.setattr(measures, "CHUNK_LOGITS_CPU", 7 * 512)
    sizes = []
    model.output.proj.register_forward_hook(lambda _m, _i, out: sizes.append(out.numel()))
    chunked = heldout_sums(model, tokenizer, TEXTS, batch_tokens=10_000, **CPU)
    assert max(sizes) == 7 * 512
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_losses_of_a_bf16_model_are_those_of_fp64_logits(model, tokenizer):
    """Logits rounded to bf16 would put some 1e-2 on a loss, and tie where these do not."""
    model = model.bfloat16()
    result = heldout_sums(model, tokenizer, TEXTS[3:4], batch_tokens=64, **CPU).result()
    losses, top1, confidences = [], [], []
    for document in documents_of(tokenizer, TEXTS[3:4]):
        with torch.no_grad():
            hidden_TD = model.heads[0](model.trunk(torch.tensor([document])))[0, :-1]
            weight_VD = model.output.proj.weight.double()
            logits_TV = model.output.norm(hidden_TD).double() @ weight_VD.T
        labels_T = torch.tensor(document[1:])
        losses.append(F.cross_entropy(logits_TV, labels_T, reduction="none"))
        top1.append((logits_TV.argmax(-1) == labels_T).double())
        confidences.append(logits_TV.softmax(-1).amax(-1))
    head = result["per_head"][0]
    assert head["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-6)
    assert head["top1"] == float(torch.cat(top1).mean())
    bins = [(row["tokens"], row["confidence"]) for row in head["calibration"]]
    confidence = sum(n * mean for n, mean in bins) / sum(n for n, _ in bins)
    assert confidence == pytest.approx(float(torch.cat(confidences).mean()), abs=1e-6)


@pytest.mark.parametrize("context", [2, 10])
def test_a_shorter_context_of_the_tokenizer_counts(model, tiny_tokenizer_path, context):
    """A last document of one token predicts nothing, and is counted all the same."""
    tokenizer = llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=context)
    result = heldout_sums(model, tokenizer, TEXTS, batch_tokens=64, **CPU).result()
    documents = documents_of(tokenizer, TEXTS, context)
    assert context != 2 or any(len(document) == 1 for document in documents)
    assert result["tokens"] == sum(map(len, documents))
    for k, head in enumerate(result["per_head"]):
        assert head["tokens"] == sum(max(0, len(d) - 1 - k) for d in documents)
    too_long = llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=1000)
    assert heldout_sums(model, too_long, TEXTS, batch_tokens=64, **CPU).result()


# ------------------------------------------------------------------ computed by hand


def test_ties_go_to_the_lower_id(tokenizer):
    """All logits equal: token 0 is drawn, ids 0 to 4 are the five likeliest; EOS is id 2."""
    model = Bigram(torch.zeros(512, 512))
    result = heldout_sums(model, tokenizer, ["", "x"], batch_tokens=64, **CPU).result()
    assert result["tokens"] == 5  # BOS EOS, BOS x EOS
    (head,) = result["per_head"]
    assert head["tokens"] == 3
    assert head["loss"] == pytest.approx(math.log(512))
    assert head["top1"] == 0
    assert head["top5"] == pytest.approx(2 / 3)
    assert head["ece"] == pytest.approx(1 / 512)
    assert len(head["calibration"]) == 1


def test_calibration_by_hand(tokenizer):
    """Confidence 0.75 with 3 hits of 4, confidence 0.3 with 2 hits of 2."""
    text = "a b c d e"
    ids = tokenizer.encode(text)
    assert len(ids) == len(set(ids)) == 7
    logits_VV = torch.zeros(512, 512)
    for i, (now, then) in enumerate(pairwise(ids)):
        p = 0.75 if i < 4 else 0.3
        likeliest = 500 if i == 2 else then
        logits_VV[now, likeliest] = math.log(p / ((1 - p) / 511))
    result = heldout_sums(Bigram(logits_VV), tokenizer, [text], batch_tokens=64, **CPU).result()
    (head,) = result["per_head"]
    assert head["top1"] == pytest.approx(5 / 6)
    low, high = head["calibration"]
    assert (low["tokens"], low["low"], low["high"]) == (2, 4 / 15, 5 / 15)
    assert (high["tokens"], high["low"], high["high"]) == (4, 11 / 15, 12 / 15)
    assert [low["confidence"], low["accuracy"]] == pytest.approx([0.3, 1.0])
    assert [high["confidence"], high["accuracy"]] == pytest.approx([0.75, 0.75])
    assert head["ece"] == pytest.approx(2 / 6 * 0.7)
    miss = -math.log(0.25 / 511)
    assert head["loss"] == pytest.approx((-3 * math.log(0.75) + miss - 2 * math.log(0.3)) / 6)


def test_certainty_is_in_the_last_bin(tokenizer):
    model = Bigram(100 * torch.eye(512))
    (head,) = heldout_sums(model, tokenizer, ["x"], batch_tokens=8, **CPU).result()["per_head"]
    (bin,) = head["calibration"]
    assert (bin["low"], bin["high"], bin["confidence"]) == (14 / 15, 1, 1)
    assert head["ece"] == 1


def test_a_head_without_targets_has_no_mean(tokenizer):
    model = Bigram(torch.zeros(512, 512), n_heads=3)
    result = heldout_sums(model, tokenizer, ["", "x"], batch_tokens=64, **CPU).result()
    assert [head["tokens"] for head in result["per_head"]] == [3, 1, 0]
    nothing = dict.fromkeys(("loss", "top1", "top5", "ece"))
    assert result["per_head"][2] == {"head": 2, "tokens": 0, "calibration": []} | nothing
    (eos,) = [row for row in result["by_token_class"] if row["class"] == "eos"]
    assert eos["tokens"] == [2, 1, 0]
    assert eos["loss"] == [pytest.approx(math.log(512))] * 2 + [None]
    json.dumps(result, allow_nan=False)


def test_no_text_gives_no_mean(model, tokenizer):
    result = heldout_sums(model, tokenizer, [], batch_tokens=64, **CPU).result()
    assert result["acceptance_length"] is None
    assert result["tokens"] == 0
    assert result["by_token_class"] == []
    assert [head["loss"] for head in result["per_head"]] == [None] * 4


def test_a_loss_that_is_not_finite_is_refused(model, tokenizer):
    with torch.no_grad():
        model.heads[2].attn.output_proj.weight[0, 0] = torch.nan
    sums = heldout_sums(model, tokenizer, TEXTS, batch_tokens=64, **CPU)
    with pytest.raises(ValueError, match="a held-out loss is not finite: check the checkpoint"):
        sums.result()


# ------------------------------------------------------------------------ token classes

LETTERS = dict(zip("kinsoc_?!.", TOKEN_CLASSES, strict=True))


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("if é1: # ä\n", "kk_iio_ccc_"),
        ("x = 'é b'\r\n", "i_o_sssss__"),
        ("if a:\r\n\tb\r\n", "kk_io___i__"),
        ("a \\\n + 0x1F", "i_?__o_nnnn"),
        ("x=(1,\n\n2)", "ioono__no"),
        ("'''a\n b'''\ny", "ssssssssss_i"),
        ("#\n#b\n  # c", "c_cc___ccc"),
        ("f(a,", "ioio"),  # unfinished, and Python as far as it goes
        ("match None", "iiiii_kkkk"),
        ("\U0001d4b3 = '😀'", "i_o_sss"),  # outside the basic plane
        ("x = '''y\n z", "i_o_!!!!!!!"),
        ("x\n ?\ny ", "i__!!!!"),
        ("x = 1\ry = 'a'\n", "i_o_n_!!!!!!!!"),  # a lone carriage return ends no line
        ("if x:\n  y\n z", "kk_io___i__!"),  # fits no indentation
        ("", ""),
        (" \n", "__"),
    ],
)
def test_classes_of_characters(text, letters):
    found = token_classes(text, [(i, i + 1) for i in range(len(text))])
    assert [TOKEN_CLASSES[i] for i in found] == [LETTERS[letter] for letter in letters]


def test_an_f_string_is_a_string():
    """All of it before Python 3.12, from then on without what stands in its braces."""
    found = token_classes("f'a{b}'", [(0, 3), (6, 7)])
    assert [TOKEN_CLASSES[i] for i in found] == ["string", "string"]


def test_a_token_is_of_the_class_of_its_first_visible_character():
    text = "  x+'  y'  # z"
    spans = [(0, 2), (0, 3), (2, 4), (3, 5), (5, 7), (6, 8), (9, 11), (9, 12), (0, 0), (12, 13)]
    names = [TOKEN_CLASSES[i] for i in token_classes(text, spans)]
    assert names == [
        "layout",
        "identifier",
        "identifier",
        "operator",
        "string",
        "string",
        "layout",
        "comment",
        "layout",
        "comment",
    ]


def test_losses_by_class_are_those_of_the_targets(tokenizer):
    """The logits make every target of one id equally likely, so each class has a loss of its own.

    ``x`` has loss 1 wherever it is predicted, ``=`` 2 and so on: a class off by one token shows.
    """
    text = "x = 7\n"
    ids = tokenizer.encode(text)
    losses = {ids[1 + i]: loss for i, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0])}
    assert [tokenizer.decode([i]) for i in ids[1:-1]] == ["x", " =", " ", "7", "\n"]
    probabilities_V = torch.zeros(512)
    probabilities_V[list(losses)] = torch.exp(-torch.tensor(list(losses.values())))
    probabilities_V[tokenizer.eos_id] = 1 - probabilities_V.sum()
    model = Bigram(probabilities_V.clamp(min=1e-30).log().expand(512, 512), n_heads=2)
    result = heldout_sums(model, tokenizer, [text], batch_tokens=64, **CPU).result()
    eos = -math.log(float(probabilities_V[tokenizer.eos_id]))
    found = {row.pop("class"): row for row in result["by_token_class"]}
    assert {name: row["tokens"] for name, row in found.items()} == {
        "identifier": [1, 0],
        "operator": [1, 1],
        "layout": [2, 2],
        "number": [1, 1],
        "eos": [1, 1],
    }
    assert sum(row["share"] for row in found.values()) == pytest.approx(1)
    assert found["layout"]["share"] == pytest.approx(2 / 6)
    assert found["identifier"]["loss"] == [pytest.approx(1, abs=1e-4), None]
    assert found["operator"]["loss"] == pytest.approx([2, 2], abs=1e-4)
    assert found["layout"]["loss"] == pytest.approx([4, 4], abs=1e-4)
    assert found["number"]["loss"] == pytest.approx([4, 4], abs=1e-4)
    assert found["eos"]["loss"] == pytest.approx([eos, eos], abs=1e-4)
    assert found["eos"]["top1"] == [1, 1]
    assert found["number"]["top1"] == [0, 0]


# ---------------------------------------------------------------------------- the files


@pytest.fixture
def write(tmp_path):
    def write(content, name="held.jsonl"):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def test_texts_of_a_file(write, tmp_path):
    rows = [{"text": text, "other": 1} for text in [*TEXTS, " \n", "x"]]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    assert read_texts(write(lines.encode())) == [*TEXTS, " \n", "x"]
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "held.parquet")
    assert read_texts(str(tmp_path / "held.parquet")) == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a', "not JSON"),
        (b'{"texts": "a"}', "fields missing: expected text, or prompt and response"),
        (b'{"text": null}', "fields missing: expected text, or prompt and response"),
        (b'{"text": 3}', "text is int, not a string"),
        (b'["a"]', "not a JSON object"),
        (b'{"text": "a\\u0000b"}', "holds a NUL character"),
        (b'{"text": "a\\ud800"}', "holds half a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_row_is_named(write, line, message):
    source = write(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{source}:3: .*{message}.*fix or delete it"):
        read_texts(source)


def test_files_that_are_none(write, tmp_path):
    with pytest.raises(ValueError, match=r"held\.jsonl has no rows"):
        read_texts(write(b"\n"))
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist: give a local file"):
        read_texts(str(tmp_path / "gone.jsonl"))


def test_rows_of_every_form_are_measured_where_they_are_supervised(write, model, tokenizer):
    """Of a response, and of each turn, what the head predicts of it, in any batch."""
    pair = {"prompt": "def f(x):\n", "response": "    return x\n"}
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "x = 1"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "y"},
    ]
    lines = [pair, {"messages": talk}, {"question": "q", "text": TEXTS[0]}]
    source = write("".join(json.dumps(line) + "\n" for line in lines).encode())
    rows = read_rows([source])
    assert rows[2] == TEXTS[0]
    assert read_texts(source)[0] == pair["prompt"] + pair["response"]
    K = model.n_future_tokens
    want_KS, all_measured = torch.zeros(K, 2, dtype=torch.float64), 0
    for row in rows:
        one = encode_text(tokenizer, row) if isinstance(row, str) else row.encode(tokenizer)
        tokens = torch.from_numpy(one.tokens.astype(np.int64))[None]
        keep = torch.from_numpy(one.keep)[None]
        labels_BTK = mtp_labels(tokens, keep, torch.zeros_like(tokens), K)
        with torch.no_grad():
            losses_BTK = model(tokens, labels_BTK)
        want_KS[:, 0] += (labels_BTK >= 0).sum((0, 1))
        all_measured += int((labels_BTK >= 0).all(-1).sum())
        want_KS[:, 1] += losses_BTK.double().sum((0, 1))
    for batch_tokens in (1, 1000):
        sums = heldout_sums(model, tokenizer, rows, device="cpu", batch_tokens=batch_tokens)
        torch.testing.assert_close(sums.classes_KCS.sum(1)[:, :2], want_KS, rtol=1e-5, atol=1e-4)
        # Positions whose targets of all heads are measured.
        assert sums.kept_K[0] == all_measured
    with pytest.raises(ValueError, match="expected body, the row has"):
        read_rows(source, {"text": "body"})
