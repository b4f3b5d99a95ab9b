"""The paths of the API and the query parameters of each operation, as its OpenAPI document lists them.

The document is the one public list of both. It is made on first use and cached with the app.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.routing import compile_path

from giantleap.service.api.paths import route_path
from giantleap.service.auth import DOCS_PATH, UI_PATH
from giantleap.service.errors import InvalidFields

UNKNOWN_ROUTE = "none"
_PAGES = ("/", "/openapi.json", DOCS_PATH, f"{DOCS_PATH}/{{name}}", UI_PATH, f"{UI_PATH}/{{name}}")


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Templates of paths; by template and method the query parameters, and whether each may be repeated."""

    templates: tuple[tuple[re.Pattern[str], str], ...]
    parameters: Mapping[tuple[str, str], Mapping[str, bool]]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "RouteTable":
        """The table of an OpenAPI document."""
        paths = (*document["paths"], *_PAGES)
        parameters = {
            (path, method.upper()): {
                each["name"]: "'array'" in str(each["schema"])
                for each in operation.get("parameters", ())
                if each["in"] == "query"
            }
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }
        return cls(tuple((compile_path(path)[0], path) for path in paths), parameters)

    def template(self, path: str) -> str:
        """The template that a path matches, such as /jobs/{job_id}; "none" for an unknown path."""
        return next((template for pattern, template in self.templates if pattern.match(path)), UNKNOWN_ROUTE)

    def faults(self, path: str, method: str, names: Sequence[str]) -> list[tuple[str, str]]:
        """A fault for each of the names in a query that is no parameter of an operation, or is there twice."""
        known = self.parameters.get((self.template(path), "GET" if method == "HEAD" else method), {})
        allowed = f"known are {', '.join(known)}" if known else "this path takes none"
        unknown = [(name, f"is not a known query parameter; {allowed}") for name in names if name not in known]
        repeated = [name for name, times in Counter(names).items() if times > 1 and not known.get(name, True)]
        return list(dict.fromkeys(unknown)) + [
            (name, "is in the query more than once; send it once") for name in repeated
        ]


def table_of(request: Request) -> RouteTable:
    """The table of the app that a request came to."""
    table: RouteTable = request.app.state.route_table()
    return table


async def refuse_unknown_parameters(request: Request) -> None:
    """Dependency of every route: refuse parameters without an effect.

    Raises:
        InvalidFields: The query has a parameter that the operation does not know, or one twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    if names and (faults := table_of(request).faults(route_path(request.scope), request.method, names)):
        raise InvalidFields(*((name[:64], reason) for name, reason in faults))
