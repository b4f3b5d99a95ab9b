"""How a command ends: one line on standard error with what to do, and an exit code with a meaning.

`OneLineErrors` is the class of the `giantleap` command. It turns mistakes on the command line, errors of files and
interrupts into that line; commands end themselves with `giantleap.cli.options.stop` for what they understand better.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from giantleap.models.constraints import explain
from giantleap.service.errors import EXIT_BAD_CONFIGURATION

EXIT_FAILED: Final = 1
EXIT_ROWS_FAILED: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_CODES: Final = (
    "Exit codes: 0 success; 1 failure, such as a full disk: try again; 2 wrong usage, input or configuration; "
    "3 training diverged; 4 rows of a batch failed; 75 a worker made no progress; 130 interrupted."
)

# typer has a copy of click or click itself, by its version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_REASONS: Final = {
    errno.ENOENT: "there is no such file or directory; check the path",
    errno.EACCES: "permission denied; change its permissions or name another path",
    errno.EPERM: "permission denied; change its permissions or name another path",
    errno.EEXIST: "it exists already; name another path",
    errno.EISDIR: "it is a directory; name a file",
    errno.ENOTDIR: "a part of the path is no directory; check the path",
    errno.ENAMETOOLONG: "the name is too long; name another path",
    errno.ENOSPC: "the disk is full; free space and run the command again",
    errno.EDQUOT: "the disk quota is used up; free space and run the command again",
    errno.EROFS: "it is on a read-only file system; name another path",
    errno.ELOOP: "it is a link to itself; name another path",
}


class OneLineErrors(TyperGroup):
    """The `giantleap` command, which reports every error as one line on standard error."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit."""
        # Read once at its import, where it would warn of optional packages that nothing here uses.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
        try:
            code = super().main(args, "giantleap", complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # a group of commands alone: typer has shown its help
                typer.echo(str(error), err=True, nl=False)
                sys.exit(EXIT_BAD_CONFIGURATION)
            _end(_to_usage_line(error), EXIT_BAD_CONFIGURATION)
        except OSError as error:
            _end(to_line(error), EXIT_FAILED)
        except (KeyboardInterrupt, typer.Abort):
            code = EXIT_INTERRUPTED
        if code == EXIT_INTERRUPTED:
            _end("interrupted", EXIT_INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def to_line(error: BaseException) -> str:
    """An error as one line; of a file, which and what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = _REASONS.get(error.errno, str(error.strerror).lower())
        return reason if error.filename is None else f"{error.filename}: {reason}"
    return " ".join(str(error).split())


def _to_usage_line(error: Any) -> str:
    path = "giantleap" if error.ctx is None else error.ctx.command_path
    message = " ".join(error.format_message().split())
    if isinstance(error.__cause__, ValidationError) and error.param is not None:  # typer converts values by pydantic
        message = f"{'/'.join(error.param.opts)} {explain(error.__cause__.errors()[0])}"
    message = message[:1].lower() + message[1:].rstrip(".")
    return f"{message}; `{path} --help` shows its usage"


def _end(line: str, code: int) -> NoReturn:
    typer.echo(f"giantleap: {line}", err=True)
    sys.exit(code)
