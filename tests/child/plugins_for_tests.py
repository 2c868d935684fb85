"""Source of small plugins, each right or wrong in one way; tests write them to files and load them."""

from __future__ import annotations

GREET = '''
from taskd.plugin import Context, hookimpl, job

@job("greet", timeout="10s", rate="90/m")
async def greet(name: str, times: int = 1, *, ctx: Context) -> dict:
    """Say hello.

    As often as you like.

    Example:
        {"name": "Ada", "times": 2}
    """
    return {"text": f"hello {name} " * times}

@hookimpl
def taskd_job_types(options):
    return [greet]
'''

RAISES_ON_IMPORT = 'raise RuntimeError("no luck today")'

EXITS_ON_IMPORT = "import sys; sys.exit(3)"

NO_HOOK = "x = 1"

MISSPELT = """
from taskd.plugin import hookimpl

@hookimpl
def taskd_job_typez(options):
    return []
"""

WRONG_ARGUMENT = """
from taskd.plugin import hookimpl

@hookimpl
def taskd_job_types(option):
    return []
"""

WITH_OPTIONS = """
from typing import Annotated

import msgspec

from taskd.plugin import Secret, hookimpl

class Options(msgspec.Struct):
    api_key: Annotated[str, Secret]
    sender: str = "noreply"
    retries: int = 3

@hookimpl
def taskd_options_schema():
    return Options

@hookimpl
def taskd_job_types(options):
    if options["sender"] == "bad":
        raise ValueError(f"{options['api_key']} may not send as that")
    if options["sender"] == "worse":
        raise RuntimeError(f"broken with {options['api_key']}")
    print("a plugin that prints")
    return []

@hookimpl
async def taskd_check(options):
    return [f"{options['sender']} is not verified with {options['api_key']}"]

@hookimpl
async def taskd_child_started(options):
    raise ConnectionError(f"refused {options['api_key']}")
"""

NO_LIST = """
from taskd.plugin import hookimpl

@hookimpl
def taskd_job_types():
    return "greet"
"""

NO_DECORATOR = """
from taskd.plugin import hookimpl

async def greet(name: str): ...

@hookimpl
def taskd_job_types():
    return [greet]
"""

UNTYPED = """
from taskd.plugin import hookimpl, job

@job("greet")
async def greet(name): ...

@hookimpl
def taskd_job_types():
    return [greet]
"""

BAD_EXAMPLE = """
from taskd.plugin import hookimpl, job

@job("greet", example={"name": 1})
async def greet(name: str): ...

@hookimpl
def taskd_job_types():
    return [greet]
"""

RESERVED = """
from taskd.plugin import hookimpl, job

@job("taskd.notify")
async def notify(): ...

@hookimpl
def taskd_job_types():
    return [notify]
"""

BAD_TIMEOUT = """
from taskd.plugin import job

@job("greet", timeout="10")
async def greet(): ...
"""

HOOKS = """
import contextlib

from taskd.plugin import Fail, hookimpl, job

@job("hooked")
async def hooked(how: str, *, ctx):
    print("running with", ctx.resources)
    if how == "fail":
        raise Fail("no")

@job("hooked_sync")
def hooked_sync():
    print("running")

@hookimpl
def taskd_job_types():
    return [hooked, hooked_sync]

@hookimpl
async def taskd_child_started(options):
    return "resources"

@hookimpl
def taskd_child_stopping():
    open(OUT, "a").write("stopping")

@hookimpl(wrapper=True)
def taskd_around_job(ctx):
    print("before")
    if ctx.attempt == 9:
        raise RuntimeError("not today")
    try:
        yield
    except BaseException as error:
        print("saw", type(error).__name__)
        raise
    finally:
        print("after")

@hookimpl
def taskd_job_finished(ctx, outcome):
    print("finished", outcome.kind, outcome.error)
    raise RuntimeError("ignored")
"""
