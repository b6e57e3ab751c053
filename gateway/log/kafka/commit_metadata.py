"""What the metadata of a commit says: pure."""

from base64 import b64decode, b64encode

from gateway.log.base import Commit

COMMIT_MARK = "gw1:"  # Offsets set by another tool have other metadata, or none, and so no completion bitmap.


def encode_metadata(commit: Commit) -> str:
    """Return the completion bitmap, `Commit.metadata` and the topic's id, with colons in between, as metadata."""
    if not (commit.done or commit.metadata or commit.topic_id):
        return ""
    fields = [b64encode(commit.done), b64encode(commit.metadata), b64encode(bytes.fromhex(commit.topic_id))]
    return COMMIT_MARK + b":".join(fields).decode().rstrip(":")


def decode_commit(base: int, metadata: str) -> Commit:
    """Return a commit; one with metadata that isn't ours is of its base alone."""
    if not metadata.startswith(COMMIT_MARK):
        return Commit(base)
    fields = metadata.removeprefix(COMMIT_MARK).split(":")
    try:
        done, own, topic_id, *_ = [b64decode(field, validate=True) for field in [*fields, "", ""]]
    except ValueError:
        return Commit(base)
    return Commit(base, done, own, topic_id.hex())
