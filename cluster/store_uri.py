"""What may stand in ``storage``: a directory, or the URI of an object store, without secrets in it."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from tokens.paths import check_name

SCHEMES = ("s3", "gs", "abfs", "abfss")
"""pyarrow's own; fsspec's follow ``fsspec+``."""
OPTIONS = (
    "endpoint_override",
    "region",
    "scheme",
    "tls_ca_file_path",
    "blob_storage_authority",
    "dfs_storage_authority",
    "enable_tls",
)
"""Query options that may stand in a URI: where the store is. Who asks, and with which secret, is the environment's matter."""


def is_store(name: str) -> bool:
    """Whether a storage name means an object store; file:///directory means the directory."""
    return "://" in name and not name.startswith("file://")


def check_storage_name(name: str) -> str:
    """Look at a storage name before anything opens it. Messages never repeat what may be a secret.

    Args:
        name: ``storage`` of a config, or RONDO_STORAGE.

    Returns:
        The name.

    Raises:
        ValueError: if it has a scheme that nothing here opens, no bucket, or a secret in it.
    """
    check_name(name)
    if not is_store(name):
        return name
    parts = urlsplit(name)
    user, _, host = parts.netloc.rpartition("@")
    if ":" in user or (user and parts.scheme.endswith("s3")):
        raise ValueError(
            f"storage {parts.scheme}://...@{host}{parts.path} has credentials in it, which would be written into the run's "
            "config: take them out, and give them by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or the "
            "machine's role"
        )
    if parts.scheme not in SCHEMES and not parts.scheme.startswith("fsspec+"):
        raise ValueError(
            f"storage has the scheme {parts.scheme}://, expected a directory or one of {', '.join(f'{s}://' for s in SCHEMES)} "
            "(docs/storage.md)"
        )
    if not host or parts.fragment:
        raise ValueError(f"storage {parts.scheme}:// has no bucket, or a '#': expected SCHEME://BUCKET/PREFIX")
    unknown = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if key not in OPTIONS]
    if unknown:
        raise ValueError(
            f"storage {parts.scheme}://{host}{parts.path} has the option {unknown[0]}; a URI may say {', '.join(OPTIONS)}. "
            "Credentials come from the environment"
        )
    return name
