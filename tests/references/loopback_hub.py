"""A Hub on 127.0.0.1 for the tests: it serves a push and the reading back.

It answers create-repo, validate-yaml, pre-upload, LFS batch and upload, commit, model info, tree, resolve and
whoami; keeps what was committed; and records every request. It refuses what the real Hub refuses and a test
could get wrong: writes without a token, commits of LFS objects that were never uploaded, bytes that do not
match their sha256, broken card metadata. Xet is not spoken: clients set HF_HUB_DISABLE_XET=1 and use LFS.

The client reads HF_ENDPOINT when it is imported, so the code under test runs in a process of its own with
`hub.make_environment(...)`.
"""

import base64
import hashlib
import json
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
JSON = "application/json"


@dataclass
class Request:
    """One recorded request; `status` is what it was answered."""

    method: str
    path: str  # decoded, without the query
    body: bytes
    headers: dict[str, str]  # names in lower case
    status: int = 0


@dataclass
class Commit:
    """One commit: `files` is the whole tree after it, `changed` the paths that it wrote."""

    oid: str
    summary: str
    files: dict[str, bytes]
    changed: list[str]


@dataclass
class Repository:
    """A model repository with one branch, main."""

    commits: list[Commit] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[-1]


@dataclass
class _Failure:
    method: str
    path_pattern: str
    status: int
    message: str


class Refused(Exception):
    """An error answer: HTTP status, the Hub's X-Error-Code (may be None) and message."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """The server; a context manager. `repositories` and `requests` may be read at any time."""

    def __init__(self, token: str = "dummy", user: str = "someone"):
        self.token = token
        self.user = user
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.lfs_objects: dict[str, bytes] = {}  # sha256 -> content
        self.lock = threading.RLock()
        self._failures: list[_Failure] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        """Address of the LFS objects: as with the real Hub another host, to which clients send no token."""
        return f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, method: str, path_pattern: str, status: int, message: str) -> None:
        """Answer requests whose path matches the regular expression with this error from now on."""
        with self.lock:
            self._failures.append(_Failure(method, path_pattern, status, message))

    def make_environment(self, home: str | os.PathLike) -> dict[str, str]:
        """Return the environment for a client process of this server; `home` is its cache folder."""
        unwanted = ("HF_HUB_CACHE", "HF_TOKEN_PATH")
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def find(self, method: str, path_pattern: str) -> list[Request]:
        """Return the recorded requests of this method whose path matches the whole pattern, in order."""
        with self.lock:
            return [r for r in self.requests if r.method == method and re.fullmatch(path_pattern, r.path)]

    def get_failure(self, method: str, path: str) -> _Failure | None:
        with self.lock:
            for failure in self._failures:
                if failure.method == method and re.search(failure.path_pattern, path):
                    return failure
        return None

    def get_repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refused(404, "RepoNotFound", f"Repository {repo_id} not found")
        return self.repositories[repo_id]

    def get_commit(self, repo_id: str, revision: str) -> Commit:
        commits = self.get_repository(repo_id).commits
        for commit in commits if revision != "main" else commits[-1:]:
            if revision in ("main", commit.oid):
                return commit
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def create_repository(self, payload: dict) -> tuple[int, dict]:
        repo_id = f"{payload.get('organization') or self.user}/{payload['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return 409, answer | {"error": "You already created this model repo"}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository = self.repositories[repo_id] = Repository()
        self.add_commit(repository, "initial commit", {".gitattributes": attributes.encode()}, [])
        return 200, answer

    def add_commit(self, repository: Repository, summary: str, written: dict, deleted: list[str]) -> Commit:
        files = dict(repository.head.files) if repository.commits else {}
        for path in deleted:
            for known in [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]:
                del files[known]
        files |= written
        parent = repository.head.oid if repository.commits else ""
        oid = hashlib.sha1(repr((parent, summary, sorted(files.items()))).encode()).hexdigest()
        repository.commits.append(Commit(oid, summary, files, list(written)))
        return repository.head

    def take_commit(self, repo_id: str, body: bytes) -> dict:
        """Apply an NDJSON commit: a header line, then one operation a line."""
        summary, written, deleted = "", {}, []
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.lfs_objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refused(400, None, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                written[value["path"]] = content
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"])
            else:
                raise Refused(400, None, f"unknown operation {key}")
        commit = self.add_commit(self.get_repository(repo_id), summary, written, deleted)
        return {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit.oid}",
            "hookOutput": "",
        }


def compute_git_oid(content: bytes) -> str:
    """Compute the object id that git gives a file: sha1 of its header and content, in hex."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def compute_oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else compute_git_oid(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", "tree"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/lfs/(?P<repo_id>[^/]+/[^/]+)/verify", "lfs_verify"),
        ("PUT", r"/lfs/objects/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", r"/lfs/objects/(?P<oid>[0-9a-f]{64})", "lfs_download"),
        ("GET", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
    WITHOUT_TOKEN = ("lfs_upload", "lfs_download")  # the real Hub signs these addresses instead

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments) -> None:
        pass

    def answer(self) -> None:
        body = self.read_body()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_record = Request(self.command, path, body, headers)
        with self.hub.lock:
            self.hub.requests.append(self.request_record)
        try:
            failure = self.hub.get_failure(self.command, path)
            if failure:
                raise Refused(failure.status, None, failure.message)
            with self.hub.lock:
                self.call_route(path, body, headers)
        except Refused as refused:
            extra = {"X-Error-Message": refused.message}
            if refused.code:
                extra["X-Error-Code"] = refused.code
            self.send_json({"error": refused.message}, refused.status, extra)

    def call_route(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                authorized = headers.get("authorization") == f"Bearer {self.hub.token}"
                if method != "GET" and name not in self.WITHOUT_TOKEN and not authorized:
                    raise Refused(401, None, "Invalid credentials in Authorization header")
                getattr(self, name)(body, **match.groupdict())
                return
        raise Refused(404, None, f"no such address: {self.command} {path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.request_record.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, answer, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": JSON} | (headers or {}))

    def whoami(self, body: bytes) -> None:
        self.send_json({"name": self.hub.user, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        status, answer = self.hub.create_repository(json.loads(body))
        self.send_json(answer, status)

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        block = re.match(r"---\n(.*?)\n---\s*(\n|$)", content, flags=re.DOTALL)
        errors, warnings = [], []
        try:
            metadata = yaml.safe_load(block.group(1)) if block else None
            if metadata is None:
                warnings.append({"message": "empty or missing yaml metadata in repo card"})
            elif not isinstance(metadata, dict):
                errors.append({"message": "metadata is not a mapping"})
            elif not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
                errors.append({"message": '"tags" must be strings'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self.send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        files = self.hub.get_commit(repo_id, revision).files
        answers = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = compute_oid(path, files[path])
            answers.append(answer)
        self.send_json({"files": answers})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self.hub.get_repository(repo_id)
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/lfs/objects/{entry['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.endpoint}/lfs/{repo_id}/verify", "header": {}},
                }
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, None, f"content does not have sha256 {oid}")
        self.hub.lfs_objects[oid] = body
        self.send(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, body: bytes, repo_id: str) -> None:
        wanted = json.loads(body)
        if len(self.hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, None, f"LFS object {wanted['oid']} is not here")
        self.send_json({})

    def lfs_download(self, body: bytes, oid: str) -> None:
        if oid not in self.hub.lfs_objects:
            raise Refused(404, None, f"LFS object {oid} is not here")
        self.send(200, self.hub.lfs_objects[oid], {"ETag": f'"{oid}"'})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        self.hub.get_commit(repo_id, revision)
        self.send_json(self.hub.take_commit(repo_id, body))

    def model_info(self, body: bytes, repo_id: str, revision: str | None) -> None:
        commit = self.hub.get_commit(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send_json({"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": False, "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str) -> None:
        files = self.hub.get_commit(repo_id, revision).files
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries = []
        for path, content in sorted(inside.items()):
            entries.append({"type": "file", "path": path, "size": len(content), "oid": compute_git_oid(content)})
        self.send_json(entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        commit = self.hub.get_commit(repo_id, revision)
        known = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            missing = f"{path} does not exist on {revision}"
            self.send_json({"error": missing}, 404, known | {"X-Error-Code": "EntryNotFound"})
            return
        content = commit.files[path]
        oid = compute_oid(path, content)
        if is_lfs(path):
            linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self.send(302, b"", known | linked | {"Location": f"{self.hub.storage}/lfs/objects/{oid}"})
        else:
            self.send(200, content, known | {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})
