"""The answers of ``hub_server``: what the Hugging Face Hub's HTTP interface says about the repositories in memory."""

import base64
import fnmatch
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Blob, CardError, Commit, Refusal, Repo, apply_commit, card_metadata, tree_entries

USER = "user"  # owner of the repositories that are created without a namespace
TOKEN = "hf_local_test_token"
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.npz", "*.zip", "*.gz", "*.model")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LARGE_FILE = 10 * 1024 * 1024  # the Hub keeps larger files out of git whatever their name


@dataclass(frozen=True)
class Request:
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def signed_in(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"


@dataclass(frozen=True)
class Reply:
    content: Any = None  # bytes are sent as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The Hub's state and its answers.

    For tests: ``repos`` has the files that arrived, ``head(repo)`` the last commit (its title, its parent, and which
    files came by LFS), and ``requests`` everything that clients asked, as "METHOD path status".
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[str] = []
        self._repos: dict[str, Repo] = {}
        self._lock = threading.Lock()

    @property
    def repos(self) -> dict[str, dict[str, bytes]]:
        """Each repository's files on its main branch."""
        return {name: {path: blob.data for path, blob in self.head(name).files.items()} for name in list(self._repos)}

    def head(self, repo: str, branch: str = "main") -> Commit:
        return self._repos[repo].branches[branch]

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Reply:
        url = urlsplit(target)
        request, reply = Request(parse_qs(url.query), headers, body), Reply({"error": "Not found"}, 404)
        verb = "GET" if method == "HEAD" else method
        matches = ((re.fullmatch(pattern, f"{verb} {url.path}"), action) for pattern, action in ROUTES.items())
        match, action = next((found for found in matches if found[0]), (None, None))
        if match and action:
            try:
                with self._lock:  # one request at a time makes every commit atomic
                    reply = action(self, request, **{key: unquote(text) for key, text in match.groupdict("").items()})
            except Refusal as refusal:
                reply = Reply({"error": str(refusal)}, refusal.status, refusal.headers)
        self.requests.append(f"{method} {url.path} {reply.status}")
        return reply

    def _check_token(self, request: Request) -> None:
        if not request.signed_in:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _repo(self, request: Request, name: str, write: bool = False) -> Repo:
        if write:
            self._check_token(request)
        repo = self._repos.get(name)
        if repo is None or (repo.private and not request.signed_in):
            raise Refusal(404 if request.signed_in else 401, "Repository not found", "RepoNotFound")
        return repo

    def whoami(self, request: Request) -> Reply:
        self._check_token(request)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Reply({"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def create_repo(self, request: Request) -> Reply:
        self._check_token(request)
        wanted = request.json
        if wanted.get("type", "model") != "model":
            raise Refusal(400, "This server keeps model repositories only")
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self._repos:
            return Reply(answer | {"error": "You already created this model repo"}, 409)
        self._repos[name] = repo = Repo(name, private=wanted.get("visibility") == "private")
        repo.advance("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES)})
        return Reply(answer)

    def create_branch(self, request: Request, repo: str, branch: str) -> Reply:
        found = self._repo(request, repo, write=True)
        if branch in found.branches:
            raise Refusal(409, "Reference already exists")
        found.branches[branch] = found.at(request.json.get("startingPoint", "main"))
        return Reply({})

    def validate_yaml(self, request: Request) -> Reply:
        try:
            metadata = card_metadata(request.json["content"])
        except CardError as error:
            return Reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply({"errors": [], "warnings": warnings})

    def preupload(self, request: Request, repo: str, revision: str) -> Reply:
        present = self._repo(request, repo, write=True).at(revision).files
        answers = []
        for file in request.json["files"]:
            path = file["path"]
            named = any(fnmatch.fnmatch(PurePosixPath(path).name, pattern) for pattern in LFS_PATTERNS)
            lfs = named or b"\0" in base64.b64decode(file["sample"]) or file["size"] > LARGE_FILE
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            # By the stored file's id the client leaves unchanged files out of the commit.
            answers.append(answer | ({"oid": present[path].etag} if path in present else {}))
        return Reply({"files": answers})

    def lfs_batch(self, request: Request, repo: str) -> Reply:
        stored, objects = self._repo(request, repo, write=True).lfs_objects, []
        for wanted in request.json["objects"]:
            href = f"{self.url}/lfs/{repo}/{wanted['oid']}"
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(wanted | ({} if wanted["oid"] in stored else actions))
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, repo: str, oid: str) -> Reply:
        blob = Blob(request.body, lfs=True)  # without a token: the Hub signs the address instead
        if blob.sha256 != oid:
            raise Refusal(400, f"The content's sha256 is {blob.sha256}, not {oid}")
        self._repos[repo].lfs_objects[oid] = blob
        return Reply(b"")

    def lfs_verify(self, request: Request, repo: str, oid: str) -> Reply:
        self._repo(request, repo, write=True).lfs_object(oid, request.json["size"])
        return Reply({})

    def commit(self, request: Request, repo: str, revision: str) -> Reply:
        found = self._repo(request, repo, write=True)
        parent = found.at(revision)
        if revision not in found.branches or "create_pr" in request.query:
            raise Refusal(400, "This server commits to branches only")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if not parent.oid.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        commit = found.advance(revision, header["summary"], apply_commit(found, parent, lines))
        return Reply({"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"})

    def model_info(self, request: Request, repo: str, revision: str) -> Reply:
        found = self._repo(request, repo)
        commit = found.at(revision or "main")
        card = card_metadata(commit.files.get("README.md", Blob(b"")).data.decode(errors="replace"))
        siblings = []
        for entry in tree_entries(commit, "", recursive=True):
            if entry["type"] == "file":
                lfs = {"lfs": entry["lfs"] | {"sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
                blob = {"size": entry["size"], "blobId": entry["oid"]} | lfs if "blobs" in request.query else {}
                siblings.append({"rfilename": entry["path"]} | blob)
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid, "private": found.private}
        info |= {"lastModified": commit.date, "siblings": siblings, "cardData": card}
        return Reply(info | {"tags": card.get("tags") or [], "gated": False, "disabled": False})

    def tree(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        recursive = request.query.get("recursive", [""])[0].lower() == "true"
        return Reply(tree_entries(self._repo(request, repo).at(revision), path, recursive))

    def paths_info(self, request: Request, repo: str, revision: str) -> Reply:
        entries = tree_entries(self._repo(request, repo).at(revision), "", recursive=True)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return Reply([entry for entry in entries if entry["path"] in wanted])

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        commit = self._repo(request, repo).at(revision)
        blob = commit.blob(path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not span:
            return Reply(blob.data, 200, headers)
        part = blob.data[int(span[1]) : int(span[2]) + 1 if span[2] else None]
        if not part:
            raise Refusal(416, "The range is past the end of the file")
        headers["Content-Range"] = f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(blob.data)}"
        return Reply(part, 206, headers)


_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., Reply]] = {
    "GET /api/whoami-v2": HubServer.whoami,
    "POST /api/repos/create": HubServer.create_repo,
    "POST /api/validate-yaml": HubServer.validate_yaml,
    f"POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)": HubServer.create_branch,
    f"POST /api/models/{_REPO}/preupload/{_REVISION}": HubServer.preupload,
    f"POST /api/models/{_REPO}/commit/{_REVISION}": HubServer.commit,
    f"POST /api/models/{_REPO}/paths-info/{_REVISION}": HubServer.paths_info,
    f"GET /api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?": HubServer.tree,
    f"GET /api/models/{_REPO}(?:/revision/{_REVISION})?": HubServer.model_info,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": HubServer.lfs_batch,
    f"PUT /lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})": HubServer.lfs_put,
    f"POST /lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})/verify": HubServer.lfs_verify,
    f"GET /{_REPO}/resolve/{_REVISION}/(?P<path>.+)": HubServer.resolve,
}
