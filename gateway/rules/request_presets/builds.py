"""Builds: GitHub's repository_dispatch, GitLab's pipeline triggers and Jenkins' jobs."""

from collections.abc import Mapping
from typing import Any

from gateway.model import ExpressionError
from gateway.rules.json_values import dumps
from gateway.rules.request_presets.preset import Field, Kind, RequestPreset, as_message, form, segment
from gateway.rules.request_templates import Message

MAX_PROPERTIES = 10
MAX_PAYLOAD = 65_535
"""Bytes: `The total size of the JSON payload must be less than 64KB.`"""
FORM = "application/x-www-form-urlencoded"


def _github(values: Mapping[str, Any]) -> Message:
    repository: str = values["repository"]
    if repository.count("/") != 2:  # noqa: PLR2004 - one before each of its two parts
        raise ExpressionError("repository: expected an owner and a name, such as acme/app, got something else")
    if not values["event_type"]:
        raise ExpressionError("event_type: expected a string with something in it, got an empty one")
    payload = values.get("payload", {})
    if len(payload) > MAX_PROPERTIES:
        raise ExpressionError(f"payload: expected at most {MAX_PROPERTIES} keys, got {len(payload)}")
    if (size := len(dumps(payload))) > MAX_PAYLOAD:
        raise ExpressionError(f"payload: expected at most {MAX_PAYLOAD:,} bytes, got {size:,}")
    return as_message(
        {"event_type": values["event_type"], "client_payload": payload},
        path=f"/repos{repository}/dispatches",
        headers=(("accept", "application/vnd.github+json"), ("x-github-api-version", "2022-11-28")),
    )


GITHUB_DISPATCH = RequestPreset(
    name="github-dispatch",
    about="Starts the workflows of a repository that run `on: repository_dispatch`.",
    url="https://api.github.com with `auth: {bearer: …}`",
    source="https://docs.github.com/rest/repos/repos#create-a-repository-dispatch-event",
    fields=(
        Field(
            name="repository",
            kind=Kind.PATH,
            about="The owner and the name: `acme/app`.",
            is_required=True,
            may_be_one=True,
        ),
        Field(
            name="event_type",
            kind=Kind.LINE,
            about="The type that the workflow's `types` has.",
            is_required=True,
            limit=100,
            is_exact=True,
        ),
        Field(
            name="payload", kind=Kind.JSON, about="`github.event.client_payload`: at most 10 keys, and less than 64 KB."
        ),
    ),
    build=_github,
)


def _gitlab(values: Mapping[str, Any]) -> Message:
    pairs = [("token", values["token"]), ("ref", values["ref"])]
    pairs += [(f"variables[{name}]", value) for name, value in values.get("variables", ())]
    path = f"/api/v4/projects/{segment(values['project'])}/trigger/pipeline"
    return Message(form(pairs), content_type=FORM, path=path)


GITLAB_TRIGGER = RequestPreset(
    name="gitlab-trigger",
    about="Starts a pipeline by a trigger token.",
    url="https://gitlab.com, or your own",
    source="https://docs.gitlab.com/ci/triggers/",
    fields=(
        Field(name="project", kind=Kind.LINE, about="The project's id, or its path: `acme/app`.", is_required=True),
        Field(name="ref", kind=Kind.LINE, about="The branch or tag.", is_required=True, limit=255, is_exact=True),
        Field(
            name="token",
            kind=Kind.LINE,
            about="The trigger token: a reference, such as ${GITLAB_TRIGGER}.",
            is_required=True,
        ),
        Field(name="variables", kind=Kind.FACTS, about="Variables of the pipeline.", limit=10_000, is_exact=True),
    ),
    build=_gitlab,
)


def _jenkins(values: Mapping[str, Any]) -> Message:
    parameters = list(values.get("parameters", ()))
    if "token" in values:
        parameters.append(("token", values["token"]))
    job = values["job"].replace("/", "/job/")
    path = f"{job}/{'buildWithParameters' if values.get('parameters') else 'build'}"
    return Message(form(parameters), content_type=FORM, path=path)


JENKINS = RequestPreset(
    name="jenkins",
    about="Starts a job, with parameters if there are any.",
    url="https://jenkins.example with `auth: {basic: …}`, an API token as the password",
    source="https://www.jenkins.io/doc/book/using/remote-access-api/",
    fields=(
        Field(name="job", kind=Kind.PATH, about="The job, in its folders: `apps/deploy`.", is_required=True),
        Field(name="parameters", kind=Kind.FACTS, about="Parameters of the build.", limit=100_000, is_exact=True),
        Field(name="token", kind=Kind.LINE, about="The token of the job, if it is triggered by one: a reference."),
    ),
    build=_jenkins,
)
