"""Secrets in URLs: settings go into files, MLflow and messages, so none of them may hold one."""

import re
import urllib.parse
from collections.abc import Iterator

REMEDY = (
    "settings are kept in files and shown in MLflow. Leave it out, and let the environment have it: "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) for MLflow; for other stores "
    "what their clients read, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3), "
    "GOOGLE_APPLICATION_CREDENTIALS (gs), AZURE_STORAGE_SAS_TOKEN (abfs), FSSPEC_<PROTOCOL>_<OPTION> (all of fsspec)"
)
# To the next one: fsspec puts several into one, as in simplecache::s3://..., and a proxy into its path.
_NEXT = r"(?!::|[a-z][a-z0-9+.-]{0,30}://)"
_URL = re.compile(
    rf"(?:(?P<scheme>[a-z][a-z0-9+.-]{{0,30}}):)?//(?P<host>(?:{_NEXT}[^\s/?#])*)(?P<rest>(?:{_NEXT}\S)*)",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"(?<=[?&;#])(?P<name>[^\s=&;#?]+)=(?P<value>[^\s&;#'\"]+)")
_SECRET = re.compile(
    r"token|secret|passw|passphrase|pwd|credential|signature|(api|access|account|private|shared)[._-]?key"
    r"|^([\w-]+[._-])?(sig|key|pass|sas|code|auth|authorization)$",
    re.IGNORECASE,
)
_USER = "a name or a password before '@'"
# As a whole: what somebody meant for a URL, without the slashes.
_BARE = re.compile(r"(https?:/?)?[^\s/@:]+:[^\s/@]+@[^\s/@]+", re.IGNORECASE)


def secret(text: str, is_url: bool = False) -> str:
    """What secret the URLs of a text hold, in words that do not repeat it; '' for none.

    Args:
        is_url: the text is nothing but a URL, or should be.
    """
    if is_url and _BARE.match(text):
        return _USER
    return next((what for _, _, what in _secrets(re.sub(r"\s", "_", text) if is_url else text)), "")


def hidden(text: str) -> str:
    """The text with *** in place of the secrets of its URLs."""
    for begin, end, _ in sorted(_secrets(text), reverse=True):
        text = f"{text[:begin]}***{text[end:]}"
    return text


def without_user(url: str) -> str:
    """A URL without the name and the password before '@'."""
    for begin, end, what in _secrets(url):
        if what == _USER:
            return url[:begin] + url[end:].removeprefix("@").removeprefix("%40")
    return url


def _secrets(text: str) -> Iterator[tuple[int, int, str]]:
    """(begin, end, what) of each."""
    for url in _URL.finditer(text):
        begin, host, rest = url.start("host"), url["host"], url["rest"]
        user, at, _ = host.replace("%40", "@").rpartition("@")
        port = "" if host.endswith("]") else host.rpartition(":")[2] if ":" in host else ""
        if at:
            # A name alone is how a folder is named to some stores (abfs://container@account), but no web server.
            if ":" in urllib.parse.unquote(user) or (url["scheme"] or "").lower().split("+")[-1] in ("http", "https"):
                yield begin, begin + _end_of_user(host), _USER
        elif port and not port.isdigit() and "@" in rest:  # a password with an unquoted / ? or #
            yield begin, url.start("rest") + rest.rindex("@"), _USER
        for found in _PARAMETER.finditer(text, url.start("rest"), url.end()):
            if _SECRET.search(urllib.parse.unquote(found["name"])):
                yield found.start("value"), found.end("value"), f"the parameter '{found['name']}'"


def _end_of_user(host: str) -> int:
    return max(host.rfind("@"), host.rfind("%40"))
