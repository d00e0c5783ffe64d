"""What lies in a batch's objects, read for a decision: its keys, and its rows as the server made them."""

from __future__ import annotations

import hashlib
from typing import Any, Iterator

from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import keys, members, metadata, rows
from audit_archiver.objectstore.client import Store

KEY_LIST_BYTES_MOST = 1 << 31


def key_list(store: Store, line: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """The header and the key texts of a batch's key list in the bucket, never in staging.

    Raises Mismatch unless its bytes, its batch and the digest of its keys are the line's; NotFound if there is none.
    """
    batch, key = line["batch"], batches.keys_of(line)[2]
    what = f"'{store.url(key)}'"
    content = store.get_bytes(key, KEY_LIST_BYTES_MOST)
    if hashlib.sha256(content).hexdigest() != line["serialized"]["manifest_sha256"]:
        raise Mismatch(f"{what} is not the key list of {batches.name(batch)}", hint="nothing was deleted; select again")
    header, texts = metadata.parse_key_list(content, what)
    require_keys(texts, batch, what)
    if header["batch_id"] != f"sha256:{batch['id']}" or header["txn"] != batch["txn"] or header["server"] != batch["server"]:
        raise Mismatch(f"{what} belongs to another batch than {batches.name(batch)}")
    return header, texts


def keys_in_data(store: Store, line: dict[str, Any]) -> list[bytes]:
    """The keys of the rows in a batch's data object, where there is no key list to say them."""
    batch, key = line["batch"], batches.keys_of(line)[0]
    matcher = keys.pattern(batch["key"])

    def read() -> list[bytes]:
        with store.get(key) as body:
            return [text for chunk in members.Reader(iter(body)) for text in keys.texts(chunk, matcher)]

    texts = store.again(read)
    require_keys(texts, batch, f"'{store.url(key)}'")
    return texts


def require_keys(texts: list[bytes], batch: dict[str, Any], what: str) -> None:
    """Raise Mismatch unless these are the batch's keys, in its order."""
    digest = keys.Digest()
    digest.update(texts)
    if len(texts) != batch["rows"] or digest.hexdigest() != batch["keys_sha256"]:
        raise Mismatch(f"{what} holds other keys than those of {batches.name(batch)}")


def row_digests(store: Store, line: dict[str, Any]) -> Iterator[str]:
    """The SHA-256 of each archived row, as the server serialized it, in batch order.

    Raises Mismatch, at the end at the latest, unless the data object is the one that was verified: nothing may be
    done with the digests before.
    """
    batch, serialized = line["batch"], line["serialized"]
    url = store.url(batches.keys_of(line)[0])
    stripper = rows.Stripper(rows.added_fields(batch))
    with store.get(batches.keys_of(line)[0]) as body:
        reader, count = members.Reader(iter(body)), 0
        try:
            for chunk in reader:
                for row in chunk.split(b"\n")[:-1]:
                    count += 1
                    yield hashlib.sha256(stripper.strip(row + b"\n")[:-1]).hexdigest()
        except InputError as error:
            raise Mismatch(f"'{url}': {error.msg}") from None
    if (reader.sha256(), count) != (serialized["data"]["sha256"], batch["rows"]):
        raise Mismatch(f"'{url}' is not the object that was verified", hint="nothing was deleted; run aa-verify on the batch")
