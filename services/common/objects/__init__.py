"""The artifact store: files that services share, on a local folder or in S3. store.py holds all of it but
digest.py, which names content by its SHA-256, and failures.py, which says what its errors mean. sources.py
reads inputs that callers name, where that is allowed; local_files.py opens those of this machine."""

from services.common.objects.digest import blob_path, digest_of_bytes, digest_of_file
from services.common.objects.sources import InputSources, SourceInfo
from services.common.objects.store import ArtifactStore

__all__ = ["ArtifactStore", "InputSources", "SourceInfo", "blob_path", "digest_of_bytes", "digest_of_file"]
