"""The critic's recipe, all stages, with everything that it writes in a store."""

import json
import shutil
from pathlib import Path

import pytest

CRITIC = "recipes/critic_wmtp_distributed.py"


@pytest.mark.nightly
def test_every_stage_in_a_store_and_found_there_on_an_empty_disk(
    s3, forks, names, tiny_quickstarts, tmp_path
):
    def command(cache, **changes):
        file = tiny_quickstarts.config(
            "critic",
            **{
                "output_dir": "s3://bucket/run",
                "rewards.table_dir": "s3://bucket/rewards",
                "storage": {"cache": str(tmp_path / cache)},
                "resume_from_checkpoint": True,
                "allow_uninformative_critic": True,
                **changes,
            },
        )
        return [CRITIC, "--config", file]

    first = forks.run(command("one"), ranks=2, timeout=900)
    assert first.wait(900) == [0, 0], first.stderr[-4000:]
    kept = names()
    assert {"summary.json", "last/params.json", "metrics.jsonl"} <= kept
    assert {n.split("/")[0] for n in kept} >= {"critic", "values", "best", "controls"}
    assert names("rewards/")
    assert not {n for n in kept if "incomplete" in n}
    objects = s3.list_objects_v2(Bucket="bucket", Prefix="run/")["Contents"]
    made = {one["Key"]: one["ETag"] for one in objects}
    before = json.loads(s3.get_object(Bucket="bucket", Key="run/summary.json")["Body"].read())

    shutil.rmtree(tmp_path / "one")
    second = forks.run(command("two", max_steps=6), ranks=2, timeout=900)
    assert second.wait(900) == [0, 0], second.stderr[-4000:]
    objects = s3.list_objects_v2(Bucket="bucket", Prefix="run/")["Contents"]
    now = {one["Key"]: one["ETag"] for one in objects}
    for stage in ("run/critic/", "run/values/"):  # found, not made again
        assert {k: v for k, v in now.items() if k.startswith(stage)} == {
            k: v for k, v in made.items() if k.startswith(stage)
        }
    after = json.loads(s3.get_object(Bucket="bucket", Key="run/summary.json")["Body"].read())
    assert (before["steps"], after["steps"]) == (4, 6)
    assert not Path("s3:").exists()
