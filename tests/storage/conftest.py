"""An S3 server on loopback, which speaks the protocol over a socket."""

import os
import urllib.request

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing-key",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_server():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def client(s3_server):
    own = {"aws_access_key_id": "own", "aws_secret_access_key": "own"}
    return boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1", **own)


@pytest.fixture
def s3(client, s3_server, monkeypatch, tmp_path):
    """A client of an emptied server with the bucket ``bucket``; the environment names both."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no credentials of this machine's user
    post(s3_server, "reset")
    client.create_bucket(Bucket="bucket")
    yield client
    post(s3_server, "reset-auth", b"inf")


def post(server: str, what: str, data: bytes = b"") -> None:
    url, plain = f"{server}/moto-api/{what}", {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=data, headers=plain, method="POST")
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture
def refuse_keys(s3, s3_server):
    """refuse_keys(after): so many requests later the server knows no credentials; None: it does."""

    def refuse(after: int | None = 0) -> None:
        post(s3_server, "reset-auth", b"inf" if after is None else str(after).encode())

    return refuse


@pytest.fixture
def names(s3):
    """names(prefix): the objects below it, without it."""

    def listed(prefix: str = "run/") -> set[str]:
        page = s3.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return {one["Key"].removeprefix(prefix) for one in page.get("Contents", [])}

    return listed
