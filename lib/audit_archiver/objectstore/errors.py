"""The answers of an S3 store in the words of `exits`.

What a retry can cure (connections, timeouts, 5xx, throttling, a digest that broke on the way) becomes
NetworkError with `retry`; everything else says at once who has to do what. No answer's text is passed on
where it could hold a signature.
"""

from __future__ import annotations

from typing import Any, Optional

from audit_archiver.exits import ArchiverError, ConfigError, Failed, NetworkError, PermissionDenied, ResourceError


class Throttled(NetworkError):
    """The store is asked more than it can, or wants to, answer (SlowDown and its like)."""


class CircuitOpen(NetworkError):
    """The store did not answer several operations before, and is not asked now."""


class Expired(PermissionDenied):
    """The credentials were valid, and are no longer."""


class NotFound(Failed):
    """There is no such object."""


class NotThawed(Failed):
    """The object lies in a storage class out of which it cannot be read before it was thawed."""

    code = NetworkError.code


class Thawing(Failed):
    """The object was asked for already, and is not ready yet (409)."""


class Refused(Failed):
    """The store refused a create-only write: the name is taken (412)."""


class Unreadable(NetworkError):
    """The store's answer is no XML that can be read; botocore gives it out as a failure (HTTP 500) without a code, or says so."""


class NameTaken(Failed):
    """The name holds other bytes than ours. Nothing was overwritten; the batch needs another number."""


_THROTTLED = frozenset((
    "SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BandwidthLimitExceeded", "Busy", "429", "503",
))
_TRANSIENT = frozenset((
    "InternalError", "RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete", "ConditionalRequestConflict",
    "OperationAborted", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "408", "500", "502", "504",
))
_EXPIRED = frozenset(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"))
_DENIED = {
    "InvalidToken": ("the session token is not valid", "set s3.session_token together with its keys, or unset AWS_SESSION_TOKEN"),
    "InvalidAccessKeyId": ("the access key is unknown to the store", "check s3.access_key_id and s3.endpoint"),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", "check the secret access key"),
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set the clock (NTP); S3 allows 15 minutes"),
}
_CONFIGURATION = {
    "NoSuchBucket": ("the bucket does not exist", "create it, or correct s3.bucket and s3.endpoint"),
    "InvalidBucketName": ("the bucket's name is not valid", "correct s3.bucket"),
    "PermanentRedirect": ("the bucket is in another region", "correct s3.region"),
    "301": ("the bucket is in another region", "correct s3.region"),
    "AuthorizationHeaderMalformed": ("the store expects another region", "correct s3.region"),
    "IllegalLocationConstraintException": ("the bucket is in another region", "correct s3.region"),
    "InvalidStorageClass": ("the store does not know the storage class", "correct s3.storage_class"),
    "InvalidEncryptionAlgorithmError": ("the store does not know the encryption", "correct s3.encryption"),
    "KMS.NotFoundException": ("the KMS key does not exist", "correct s3.kms_key_id"),
    "KMS.DisabledException": ("the KMS key is disabled", "enable it, or correct s3.kms_key_id"),
    "KMS.KMSInvalidStateException": ("the KMS key cannot be used", "correct s3.kms_key_id"),
}
_FULL = frozenset(("QuotaExceeded", "QuotaExceededException", "EntityTooLarge", "XMinioStorageFull", "507"))
_NO_ROUTE = ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError")
_BROKEN = ("ConnectionClosedError", "ReadTimeoutError", "ResponseStreamingError", "IncompleteReadError",
           "HTTPClientError", "ConnectionError", "ChecksumError", "FlexibleChecksumError")


def translated(error: Exception, what: str, endpoint: str, at: Optional[str] = None) -> ArchiverError:
    """The ArchiverError for what botocore raised while doing `what` ("write 's3://bucket/key'")."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _answer(response, what, at)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "SSLError" in kinds:
        return _final(NetworkError(f"cannot {what}: no trusted TLS connection to '{endpoint}'",
                                   hint="set s3.ca_bundle to the store's certificate authority", at=at))
    if any(kind in kinds for kind in _NO_ROUTE):
        return NetworkError(f"cannot {what}: '{endpoint}' cannot be reached", hint="check s3.endpoint and the network", at=at)
    if "ResponseParserError" in kinds:
        return Unreadable(f"cannot {what}: what '{endpoint}' answered cannot be read ({type(error).__name__})")
    if any(kind in kinds for kind in _BROKEN):
        return NetworkError(f"cannot {what}: the connection to '{endpoint}' broke or timed out ({type(error).__name__})")
    if any(kind in kinds for kind in ("CredentialRetrievalError", "TokenRetrievalError", "SSOError", "LoginError")):
        return PermissionDenied(f"cannot {what}: no valid credentials ({type(error).__name__})", hint="log in again", at=at)
    if any(kind in kinds for kind in ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError")):
        return ConfigError(f"cannot {what}: no complete credentials for the object store", at=at,
                           hint="set s3.access_key_id and its secret, s3.profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return ConfigError(f"cannot {what}: {error}", at=at)


def _answer(response: dict[str, Any], what: str, at: Optional[str]) -> ArchiverError:
    found = response.get("Error", {})
    code = str(found.get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{code} (HTTP {status})" if code != str(status) else f"HTTP {status}"
    if code in _CONFIGURATION:
        reason, hint = _CONFIGURATION[code]
        return ConfigError(f"cannot {what}: {reason}", detail=said, hint=hint, at=at)
    if status == 412 or code == "PreconditionFailed":
        return Refused(f"cannot {what}: the name is taken", detail=said)
    if code in ("NoSuchKey", "NoSuchUpload", "404", "NoSuchVersion") or status == 404:
        return NotFound(f"cannot {what}: there is no such {'upload' if code == 'NoSuchUpload' else 'object'}", detail=said)
    if code == "InvalidObjectState":
        return NotThawed(f"cannot {what}: the object has to be thawed first", detail=said,
                         hint="--thaw of aa-restore and aa-validate asks for it, which takes hours")
    if code == "RestoreAlreadyInProgress":
        return Thawing(f"cannot {what}: it is asked for already", detail=said)
    if code in _FULL or status == 507:
        return ResourceError(f"cannot {what}: the store is full, or the object too large for it", detail=said)
    if status == 500 and code in ("", "500"):
        return Unreadable(f"cannot {what}: the store answered {said}")
    if code in _THROTTLED or status in (429, 503):
        return Throttled(f"cannot {what}: the store answered {said}")
    if code in _TRANSIENT or status >= 500 and status != 501:
        return NetworkError(f"cannot {what}: the store answered {said}")
    if code in _EXPIRED:
        return Expired(f"cannot {what}: the session token has expired", detail=said, at=at,
                       hint="get new credentials and run again: nothing was lost")
    if code in _DENIED:
        reason, hint = _DENIED[code]
        return PermissionDenied(f"cannot {what}: {reason}", detail=said, hint=hint, at=at)
    if status in (401, 403):
        return PermissionDenied(f"cannot {what}: permission denied", detail=said, at=at,
                                hint="the role needs s3:PutObject, s3:GetObject, s3:DeleteObject, s3:AbortMultipartUpload "
                                     "on the prefix, s3:ListBucket on the bucket")
    return Failed(f"cannot {what}: the store answered {said}", detail=str(found.get("Message", ""))[:200] or None)


def _final(error: NetworkError) -> NetworkError:
    error.retry = False
    return error
