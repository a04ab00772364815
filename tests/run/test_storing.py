"""URLs of a config become paths, and stand as URLs in what a run writes."""

import pytest
from omegaconf import OmegaConf

from wmtp_modules.run import resume, storing
from wmtp_modules.storage.places import path_of


@pytest.fixture(autouse=True)
def no_places(monkeypatch):
    monkeypatch.setattr(storing, "_places", {})
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setenv("BUCKET", "b")
    monkeypatch.setenv("WMTP_URL_VARIABLES", "BUCKET")
    return OmegaConf.create(
        {
            "output_dir": "s3://${oc.env:BUCKET}/run/",
            "storage": {"cache": str(tmp_path)},
            "tokenizer": {"path": "${checkpointer.checkpoint_dir}/tokenizer.model"},
            "checkpointer": {"checkpoint_dir": "hf://org/name"},
            "dataset": {"source": "s3://b/data.jsonl"},
            "reference": {"table_dir": "${output_dir}/table"},
            "value_table": {"table_dir": "s3://b/values"},
            "critic": {"checkpoint_dir": "s3://b/run/critic"},
            "metric_logger": {"tracking_uri": "s3://b/mlflow"},
            "controls": [{"one": {"dataset.source": "s3://b/other.jsonl"}}],
            "broken": "${nothing}",
            "local": "runs/x",
        }
    )


def test_paths_for_urls(cfg, tmp_path):
    before = OmegaConf.create(OmegaConf.to_container(cfg))
    storing.localized(cfg)
    run = path_of("s3://b/run", tmp_path, "run")
    assert cfg.output_dir == str(run)
    assert cfg.tokenizer.path == str(tmp_path / "hf/org/name/tokenizer.model")
    assert cfg.dataset.source == str(tmp_path / "s3/b/data.jsonl")
    assert cfg.reference.table_dir == str(run / "table")
    assert cfg.critic.checkpoint_dir == str(run / "critic")  # inside the run, and sent with it
    assert cfg.value_table.table_dir == str(tmp_path / "runs/s3/b/values")
    assert cfg.metric_logger.tracking_uri == "s3://b/mlflow"
    assert cfg.controls[0].one["dataset.source"] == str(tmp_path / "s3/b/other.jsonl")
    assert cfg.local == "runs/x"
    assert {place.url for place in storing._written()} == {"s3://b/run", "s3://b/values"}
    cfg.broken = before.broken = "mended"
    before.output_dir = "s3://b/run"
    # What a run writes has the URLs: another machine compares it with its own config.
    assert resume.kept(cfg) == resume.kept(before)


def test_lists_and_patterns_of_sources(tmp_path):
    source = ["s3://b/a/*.jsonl", "local/*.csv", "hf://org/name/data/train-[0-9].parquet", "${one}"]
    cfg = OmegaConf.create(
        {
            "output_dir": "runs/x",
            "storage": {"cache": str(tmp_path)},
            "one": "s3://b/c.jsonl",
            "dataset": {"source": source},
        }
    )
    storing.localized(cfg)
    assert list(cfg.dataset.source) == [
        str(tmp_path / "s3/b/a/*.jsonl"),
        "local/*.csv",
        str(tmp_path / "hf/org/name/data/train-[0-9].parquet"),
        str(tmp_path / "s3/b/c.jsonl"),
    ]
    wanted = {place.url for place in storing._places.values()}
    assert wanted == {"s3://b/a", "hf://org/name/data", "s3://b/c.jsonl"}
    assert storing.as_named(list(cfg.dataset.source)) == [*source[:3], "s3://b/c.jsonl"]


def test_a_config_without_urls_stays(tmp_path):
    cfg = OmegaConf.create({"output_dir": "runs/x", "prepare": None, "missing": "???"})
    assert storing.localized(cfg.copy()) == cfg
    assert storing._places == {}


def test_what_another_run_of_the_command_writes(cfg, tmp_path, monkeypatch):
    """``requires`` makes it: it is there then, and need not be in the store now."""
    cfg.checkpointer.checkpoint_dir = "s3://b/reference/best"
    cfg.dataset.source = "data.jsonl"
    del cfg["controls"]
    storing.localized(cfg)
    required = OmegaConf.create({"output_dir": "s3://b/reference", "storage": cfg.storage})
    storing.localized(required)
    storing.arrive(cfg)
    storing.arrive(cfg)  # a second time: the link is there already
    best = tmp_path / "runs/s3/b/reference/best"
    best.mkdir(parents=True)
    (best / "params.json").write_text("{}")
    assert (tmp_path / "s3/b/reference/best/params.json").read_text() == "{}"


@pytest.mark.parametrize(
    "value",
    [
        "gs://b/run",
        "s3:/b/run",
        "S3://b/run",
        "https://host/run",
        "hf://org/name",
        "s3://",
        "s3://me:planted@b/run",
    ],
)
def test_no_url_becomes_a_folder(value):
    with pytest.raises(ValueError, match=r"s3://BUCKET/NAME|names no user"):
        storing.localized(OmegaConf.create({"output_dir": value}))
