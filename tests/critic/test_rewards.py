"""A reward is that of one response alone, whatever is scored beside it; what is unsound stops."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from wmtp_modules.critic.rewards import (
    Responses,
    RewardModel,
    RewardStatistics,
    goodness,
    rated,
    reward_fingerprint,
    reward_rows,
)
from wmtp_modules.scoring.score_table import ScoreTable, compute_scores

PAIRS = [
    ("Add two numbers.", "def add(a, b):\n    return a + b"),
    ("x", "y"),
    ("Sort a list. " * 12, "def f(x):\n    return sorted(x)\n" * 4),
    ("Say nothing.", "the text ends in the padding token<|eot|>"),
    ("Twice", "<|eot|><|eot|>"),
]
CPU = dict(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def folder(reward_model_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(reward_model_folder, tmp_path / "reward_model")


@pytest.fixture(scope="module")
def reward_model(reward_model_folder):
    return RewardModel(reward_model_folder, **CPU)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def make_rows(pairs=PAIRS, rewards=None):
    columns = {
        "tokens": [list(range(1, 2 + len(response) % 9)) for _, response in pairs],
        "prompt": [prompt for prompt, _ in pairs],
        "response": [response for _, response in pairs],
    }
    return Dataset.from_dict(columns | ({"reward": rewards} if rewards is not None else {}))


# -------------------------------------------------------------------------- the model


def test_scores_together_equal_scores_alone(reward_model):
    together = reward_model.score(PAIRS)
    assert together.shape == (5,)
    assert together.dtype == np.float32
    alone = np.concatenate([reward_model.score([pair]) for pair in PAIRS])
    np.testing.assert_allclose(together, alone, atol=1e-4, rtol=0)
    np.testing.assert_allclose(reward_model.score(PAIRS[::-1])[::-1], alone, atol=1e-4, rtol=0)
    assert np.abs(np.subtract.outer(alone, alone))[~np.eye(5, dtype=bool)].min() > 0.01


@pytest.mark.parametrize("pair", PAIRS)
def test_the_score_is_that_of_transformers_at_the_last_token(
    reward_model, reward_model_folder, pair
):
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

    model = LlamaForSequenceClassification.from_pretrained(reward_model_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reward_model_folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|eot|>"
    prompt, response = (text.strip() for text in pair)
    text = f"<|role|>user\n{prompt}<|eot|><|role|>assistant\n{response}<|eot|>"
    ids = tokenizer(text)["input_ids"]  # this adds the BOS, the only one
    assert ids.count(tokenizer.bos_token_id) == 1
    model.config.pad_token_id = None  # then it takes the last token there is
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.item()
    assert reward_model.score([PAIRS[2], pair])[1] == pytest.approx(expected, abs=1e-4)


def test_half_precision_stays_near(reward_model, reward_model_folder):
    half = RewardModel(reward_model_folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    scores = half.score(PAIRS)
    assert scores.dtype == np.float32
    assert np.corrcoef(scores, reward_model.score(PAIRS))[0, 1] > 0.98


# ------------------------------------------------------------------------- its folder


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no config\.json"):
        RewardModel(tmp_path / "nowhere", **CPU)


def test_a_hub_name_is_not_looked_up():
    with pytest.raises(ValueError, match=r"FsfairX-LLaMA3-RM-v0\.1 holds no config\.json"):
        RewardModel("sfairXC/FsfairX-LLaMA3-RM-v0.1", **CPU)


def test_missing_transformers_names_the_extra(reward_model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install wmtp\[reward\], or uv sync --extra reward"):
        RewardModel(reward_model_folder, **CPU)


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no such"}'])
def test_a_config_of_something_else_is_refused(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(
        ValueError, match=rf"{folder} (is not a readable reward model|holds no tokenizer that)"
    ):
        RewardModel(folder, **CPU)


@pytest.mark.parametrize("size", [0, 5, 3000, -10])
def test_damaged_weights_are_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"{folder} is not a readable reward model, .* weights are damaged"
    ):
        RewardModel(folder, **CPU)


@pytest.mark.parametrize("size", [0, 5, 3000, -10])
def test_damaged_weights_of_the_older_format_are_refused(folder, size):
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"{folder} is not a readable reward model, .* weights are damaged"
    ):
        RewardModel(folder, **CPU)


def test_weights_of_another_shape_are_refused(folder):
    edit_config(folder, hidden_size=64)
    with pytest.raises(ValueError, match=rf"{folder} is not a readable reward model"):
        RewardModel(folder, **CPU)


def test_a_language_model_has_no_score_head(folder):
    def edit(state):
        state["lm_head.weight"] = state.pop("score.weight").repeat(400, 1)

    edit_weights(folder, edit)
    message = r"lacks 1 weights of a LlamaForSequenceClassification \(score.weight\): it is not a"
    with pytest.raises(ValueError, match=message):
        RewardModel(folder, **CPU)


def test_the_missing_score_head_is_named_first(folder):
    def edit(state):
        del state["score.weight"], state["model.norm.weight"]
        del state["model.layers.0.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"]

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=r"lacks 4 weights .* \(score.weight, model.*, \.\.\.\)"):
        RewardModel(folder, **CPU)


def test_several_labels_are_refused(folder):
    edit_config(folder, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    edit_weights(folder, lambda state: state.update({"score.weight": torch.randn(2, 32)}))
    with pytest.raises(ValueError, match=f"{folder} has num_labels 2: a reward model gives one"):
        RewardModel(folder, **CPU)


def test_an_encoder_is_refused(folder):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="BertForSequenceClassification, which does not read its"):
        RewardModel(folder, **CPU)


def test_a_missing_chat_template_is_named(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=f"the tokenizer in {folder} has no chat template"):
        RewardModel(folder, **CPU)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_missing_or_damaged_tokenizer_is_named(folder, damage):
    path = folder / "tokenizer.json"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{folder} holds no tokenizer that can be read"):
        RewardModel(folder, **CPU)


# ------------------------------------------------------------------------- its scores


def test_a_conversation_that_is_too_long_is_not_cut(reward_model):
    pair = ("Count.", "0 1 " * 400)
    with pytest.raises(ValueError, match=r"'Count.', '0 1 .* has \d+ tokens .* takes 512"):
        reward_model.score([PAIRS[0], pair])


def test_a_tokenizer_of_another_model_is_named(folder):
    def edit(state):
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:100].clone()

    edit_config(folder, vocab_size=100)
    edit_weights(folder, edit)
    with pytest.raises(
        ValueError, match=r"has token \d+, the reward model has 100: .* another model"
    ):
        RewardModel(folder, **CPU).score(PAIRS)


def test_a_score_that_is_not_finite_is_refused(folder):
    edit_weights(folder, lambda state: state["score.weight"].fill_(torch.inf))
    with pytest.raises(ValueError, match=r"the reward of the pair 'Add two numbers.', 'def .* is "):
        RewardModel(folder, **CPU).score(PAIRS)


# ------------------------------------------------------------- rewards from the data


def test_rewards_of_a_column():
    rows = make_rows(rewards=[0.5, -2.0, 3.25, 0.0, 1e-3]).select([4, 0, 2])
    rewards_N = reward_rows(rows, "column")
    assert rewards_N.dtype == np.float64
    assert rewards_N.tolist() == [1e-3, 0.5, 3.25]
    assert reward_rows(make_rows(rewards=[1, 0, 1, 1, 0]), "labels").tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("source", ["column", "labels"])
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_rewards_that_are_missing_or_not_finite_are_refused(source, bad):
    rows = make_rows(rewards=[1.0, 0.0, bad, 1.0, bad])
    message = rf"2 of 5 values of rewards.source {source} are missing or .*, the first in row 2"
    with pytest.raises(ValueError, match=message):
        reward_rows(rows, source)


def test_labels_are_0_or_1():
    rows = make_rows(rewards=[1.0, 0.0, 0.0, 0.7, 2.0])
    with pytest.raises(ValueError, match=r"2 of 5 labels are neither .* the first is 0.7 in row 3"):
        reward_rows(rows, "labels")


def test_a_data_set_without_rewards_is_refused():
    with pytest.raises(ValueError, match=r"rewards.source labels needs rows with a reward"):
        reward_rows(make_rows(), "labels")


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"rewards\.source is 'colum'"):
        reward_rows(make_rows(rewards=[1.0] * 5), "colum")


def test_standardised_rewards_have_mean_0_and_deviation_1():
    rewards_N = np.array([3.0, 5.0, 5.0, 11.0])
    statistics = RewardStatistics.of(rewards_N)
    assert statistics == RewardStatistics(mean=6.0, std=3.0)
    assert statistics.standardise(rewards_N).tolist() == [-1, -1 / 3, -1 / 3, 5 / 3]
    assert statistics.standardise(np.array([6.0], np.float32)).tolist() == [0]


def test_constant_rewards_are_refused():
    with pytest.raises(ValueError, match=r"every response has reward 0\.1: a critic needs good an"):
        RewardStatistics.of(np.full(7, 0.1))


@pytest.mark.parametrize(
    ("good", "want"),
    [("label", [0, 1, 1]), ("above", [0, 1, 1]), ("sigmoid", [0.0229, 0.7773, 0.7773])],
)
def test_how_much_a_response_is_wanted(good, want):
    raw = np.array([0.0, 1, 1])
    standardised = np.array([-1.5, 1, 1])
    found = goodness(raw, standardised, good, threshold=0.375, temperature=0.5)
    assert found.tolist() == pytest.approx(want, abs=1e-4)


def test_an_affine_change_of_rewards_leaves_above_as_it_is():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=200)
    found = []
    for rewards in (raw, 7 * raw - 3):
        z = RewardStatistics.of(rewards).standardise(rewards)
        found.append(goodness(rewards, z, "above", threshold=0.3))
    assert (found[0] == found[1]).all()
    assert 0 < found[0].mean() < 1


def test_labels_that_are_none_are_no_label():
    with pytest.raises(ValueError, match=r"label needs rewards of 0 and 1, and row 1 has 0\.5"):
        goodness(np.array([1, 0.5]), np.array([1.0, 0]), "label")


def test_all_sets_are_standardised_by_what_the_critic_learns_from():
    rows = {name: Dataset.from_dict({"x": [1, 2]}) for name in ("train", "heldout", "critic")}
    raw = {"train": np.array([8.0, 9]), "heldout": np.array([1.0, 4]), "critic": np.array([0.0, 4])}
    how = {"good": "above", "threshold": 0.0, "temperature": 1.0}
    found, statistics = rated(rows, raw, both_kinds=True, **how)
    assert (statistics.mean, statistics.std) == (2, 2)
    assert found["train"].rewards.tolist() == [3, 3.5]
    assert found["train"].good.tolist() == [1, 1]  # which a policy may have, but no critic
    assert found["heldout"].good_rows().tolist() == [1]
    without, statistics = rated({"train": rows["train"]}, raw, both_kinds=False, **how)
    assert (statistics.mean, without["train"].good.tolist()) == (8.5, [0, 1])
    with pytest.raises(ValueError, match=r"^critic\.dataset: every response is 0 good"):
        rated(rows, raw, both_kinds=True, **how | {"threshold": 9.0})
    with pytest.raises(ValueError, match=r"^dataset_val: every response is 1 good by"):
        rated(rows, raw | {"heldout": np.array([3.0, 4])}, both_kinds=True, **how)


def test_without_rewards_every_row_is_good():
    plain = Responses(Dataset.from_dict({"x": [1, 2, 3]}))
    assert plain.good_rows().tolist() == plain.above(0.0).tolist() == [0, 1, 2]


def test_statistics_of_nothing_or_of_nan_are_refused():
    with pytest.raises(ValueError, match="there are no rewards"):
        RewardStatistics.of(np.zeros(0))
    with pytest.raises(ValueError, match=r"1 of 3 rewards are missing or .*, the first in row 1"):
        RewardStatistics.of(np.array([1.0, np.nan, 2.0]))


# -------------------------------------------------------------------------- the table


@pytest.fixture
def fingerprint_of(reward_model_folder, tiny_tokenizer_path):
    def fingerprint_of(rows, source="reward_model", **changes):
        args = dict(max_seq_len=64, tokenizer_path=tiny_tokenizer_path)
        if source == "reward_model":
            args |= dict(checkpoint_dir=reward_model_folder, dtype="fp32")
        return reward_fingerprint(rows, source, **args | changes)

    return fingerprint_of


def fill(folder, fingerprint, rows, score):
    compute_scores(
        folder,
        fingerprint,
        rows,
        lambda pairs: [np.array([reward]) for reward in score(pairs)],
        inputs=lambda part: list(zip(part["prompt"], part["response"], strict=True)),
        batch_tokens=16,
        part_rows=2,
    )


def test_rewards_in_a_table_survive_a_kill(tmp_path, reward_model, fingerprint_of):
    rows = make_rows()
    seen = []

    def killed(pairs):
        seen.extend(pairs)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return reward_model.score(pairs)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, fingerprint_of(rows), rows, killed)
    assert [path.name for path in tmp_path.glob("*.arrow")] == ["part-000000.arrow"]
    rest = []
    fill(tmp_path, fingerprint_of(rows), rows, lambda p: rest.extend(p) or reward_model.score(p))
    assert sorted(rest) == sorted(PAIRS[2:])
    rewards = ScoreTable.open(tmp_path, fingerprint_of(rows), rows).per_row()
    np.testing.assert_allclose(rewards, reward_model.score(PAIRS), atol=1e-4, rtol=0)


def test_a_table_of_something_else_names_the_part_that_differs(
    tmp_path, fingerprint_of, make_reward_model, reward_model_folder, folder
):
    rows = make_rows()
    fill(tmp_path / "t", fingerprint_of(rows), rows, lambda pairs: np.zeros(len(pairs)))

    def differences(fingerprint, rows=rows):
        with pytest.raises(ValueError, match="was made for something else") as error:
            ScoreTable.open(tmp_path / "t", fingerprint, rows)
        return [part.split(":")[0].split()[-1].strip("(") for part in str(error.value).split(";")]

    ScoreTable.open(tmp_path / "t", fingerprint_of(rows), rows)
    ScoreTable.open(tmp_path / "t", fingerprint_of(rows, checkpoint_dir=folder), rows)
    assert differences(fingerprint_of(rows, dtype="bf16")) == ["dtype"]
    assert differences(fingerprint_of(rows, max_seq_len=65)) == ["max_seq_len"]
    longer = rows.map(lambda row: {"tokens": [*row["tokens"], 0]})
    assert differences(fingerprint_of(longer), longer) == ["dataset"]
    moved = make_rows([("Add two ", "numbers." + PAIRS[0][1]), *PAIRS[1:]])
    moved = moved.remove_columns("tokens").add_column("tokens", rows["tokens"][:])
    assert differences(fingerprint_of(moved), moved) == ["pairs"]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert differences(fingerprint_of(rows, checkpoint_dir=folder)) == ["reward_tokenizer"]
    other = make_reward_model(tmp_path / "other", seed=1)
    assert differences(fingerprint_of(rows, checkpoint_dir=other)) == ["checkpoint"]
    labelled = rows.add_column("reward", [1.0, 0.0, 1.0, 0.0, 0.0])
    assert "source" in differences(fingerprint_of(labelled, "labels"))


def test_a_table_of_labels_names_other_rewards(tmp_path, fingerprint_of):
    rows = make_rows(rewards=[1.0, 0.0, 1.0, 0.0, 0.0])
    fingerprint = fingerprint_of(rows, "labels")
    assert fingerprint == fingerprint_of(rows, "labels", dtype="bf16")  # no model runs
    fill(tmp_path, fingerprint, rows, lambda pairs: np.zeros(len(pairs)))
    flipped = make_rows(rewards=[1.0, 0.0, 1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"something else \(rewards: the table has '\w+', this"):
        ScoreTable.open(tmp_path, fingerprint_of(flipped, "labels"), flipped)


def test_a_reward_model_needs_prompts_and_responses(fingerprint_of):
    rows = make_rows().remove_columns("prompt")
    with pytest.raises(ValueError, match="a reward model scores prompt/response rows, and this"):
        fingerprint_of(rows)
    rows = make_rows([*PAIRS[:3], (None, "plain text")])
    with pytest.raises(ValueError, match="and row 3 of this data set is plain text"):
        fingerprint_of(rows)


def test_a_reward_model_without_weights_is_refused(fingerprint_of, tmp_path):
    with pytest.raises(ValueError, match="no weight file"):
        fingerprint_of(make_rows(), checkpoint_dir=tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("chat_template.jinja", b"{% for x in", "the chat template in .* cannot be used"),
        ("chat_template.jinja", b"{{ 1 / 0 }}", "the chat template in .* cannot be used"),
        ("chat_template.jinja", b"\xff\xfe", r"holds no tokenizer that can be read \(not UTF-8"),
        ("tokenizer.json", b"{}", "holds no tokenizer that can be read"),
        ("tokenizer.json", b"[" * 100_000, "holds no tokenizer that can be read"),
        ("tokenizer.json", LFS_POINTER, "tokenizer.json is a Git LFS pointer, .*`git lfs pull`"),
        ("model.safetensors", LFS_POINTER, "safetensors is a Git LFS pointer, .*`git lfs pull`"),
        ("config.json", b'{"model_type": "llama", "num_labels": "x"}', "that can be read"),
        ("config.json", b'{"model_type": "llama", "hidden_act": [1]}', "that can be read"),
    ],
)
def test_a_damaged_folder_is_one_sentence(reward_model_folder, tmp_path, name, content, match):
    folder = tmp_path / "reward_model"
    shutil.copytree(reward_model_folder, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        RewardModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_nothing(reward_model_folder, tmp_path):
    folder = tmp_path / "reward_model"
    shutil.copytree(reward_model_folder, folder)
    (folder / "chat_template.jinja").write_text("{# nothing #}")
    model = RewardModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="'a', 'b' becomes no token at all"):
        model.score([("a", "b")])
