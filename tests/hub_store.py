"""The repositories that ``hub_server`` keeps in memory: files, commits and branches, with the Hub's own ids."""

import base64
import hashlib
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import yaml


class Refusal(Exception):
    """A request that the Hub turns down, with what the client needs to raise the right error."""

    def __init__(self, status: int, message: str, code: str = "", commit: "Commit | None" = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:  # lets the client remember which files a commit lacks
            self.headers["X-Repo-Commit"] = commit.oid


def git_hash(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One stored file; ``lfs`` tells whether it came by LFS or inside the commit request."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        size = len(self.data)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        return git_hash("blob", self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One version of all files of a repository."""

    title: str
    files: dict[str, Blob]
    parent: "Commit | None" = None
    created: float = field(default_factory=time.time)

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.created))

    @cached_property
    def oid(self) -> str:
        listing = [f"{path} {blob.git_oid}" for path, blob in sorted(self.files.items())]
        head = [self.parent.oid if self.parent else "", self.title, str(self.created)]
        return git_hash("commit", "\n".join(head + listing).encode())

    def blob(self, path: str) -> Blob:
        if path not in self.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", self)
        return self.files[path]


@dataclass
class Repo:
    """A model repository: its branches, and the LFS objects that were uploaded to it."""

    name: str
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: dict[str, Blob] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def advance(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        commit = Commit(title, files, self.branches.get(branch))
        self.commits[commit.oid] = self.branches[branch] = commit
        return commit

    def lfs_object(self, oid: str, size: int | None = None) -> Blob:
        blob = self.lfs_objects.get(oid)
        if blob is None or size not in (None, len(blob.data)):
            raise Refusal(400, f"LFS object {oid} of {size} bytes was not uploaded")
        return blob


def tree_entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders under ``folder``, in the form of the Hub's tree listing."""
    base, entries = PurePosixPath(folder), {}
    for path, blob in sorted(commit.files.items()):
        if not PurePosixPath(path).is_relative_to(base) or path == folder:
            continue
        parents = [str(parent) for parent in PurePosixPath(path).parents if base in parent.parents]
        for parent in reversed(parents):
            # The client only asks that a folder has some id, so its path will do.
            oid = git_hash("tree", parent.encode())
            entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
        if blob.lfs:
            entries[path]["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound", commit)
    return [entry for path, entry in entries.items() if recursive or PurePosixPath(path).parent == base]


def apply_commit(repo: Repo, commit: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob]:
    """The files after a commit request's operations; ``commit`` itself stays as it is if one of them fails."""
    files = dict(commit.files)
    for key, value in ((line["key"], line["value"]) for line in lines):
        path = value.get("path", "")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            files[path] = repo.lfs_object(value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone or (key == "deletedFile") != (gone == [path]):
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound", commit)
            for name in gone:
                del files[name]
        elif key != "header":
            raise Refusal(400, f"Unknown commit operation: {key}")
    return files


class CardError(Refusal):
    """A README whose metadata the Hub does not take."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


def card_metadata(content: str) -> dict[str, Any]:
    """The YAML head of a README, empty if there is none."""
    head = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    try:
        metadata = (yaml.safe_load(head[1]) if head else None) or {}
    except yaml.YAMLError as error:
        raise CardError(str(error)) from error
    if not isinstance(metadata, dict):
        raise CardError("the metadata is not a mapping")
    tags = metadata.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise CardError('"tags" must be an array of strings')
    return metadata
