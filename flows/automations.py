"""Prefect's automations of geofm: what the server does by itself when a run begins or ends.

lost_runs         end runs whose process is gone
time_limit        cancel runs that take too long; switched off at first
pretrain_on_new   pretrain on each new dataset version; switched off at first
notify_failures   send a message when a run has failed; made for a user who gives a webhook

What a user has changed in the UI stays. An automation that is there is never updated.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from flows.pipeline import audit_flow, evaluate_flow, pretrain_flow, refresh_flow

#: Tag of geofm's deployments and automations.
TAG = "geofm"
#: Automation that ends runs whose process is gone, and seconds without a heartbeat after which it
#: does.
LOST_RUNS, LOST_AFTER_S = "geofm: lost runs", 120
#: Automation that cancels a run, and the hours after which it does.
TIME_LIMIT, LIMIT_HOURS = "geofm: time limit", 24
#: Automation that pretrains on each dataset version that a refresh publishes.
PRETRAIN_ON_NEW = "geofm: pretrain on a new dataset"
#: Automation that sends a message when a run has failed, and the block with the webhook's address.
FAILURE_NOTICE, WEBHOOK_BLOCK = "geofm: failure notice", "geofm-failure-notice"
#: Names of the states in which a run has ended or is about to.
_ENDED = ("Completed", "Skipped", "Failed", "Crashed", "Cancelled", "Cancelling")
#: What the webhook receives. Slack, Mattermost and Teams show "text".
_NOTICE = """\
{"text": {{ (
  "geofm: the run " ~ flow_run.name ~ " ended as " ~ flow_run.state.name ~ ": "
  ~ (flow_run.state.message or "no reason is recorded") ~ "\\n" ~ (flow_run | ui_url)
) | tojson }} }"""
#: Runs of forms. Their child runs in the GPU pool end with them, and runs in a terminal belong to
#: the person there.
_RUN = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
_OF_FORM = ResourceSpecification(
    {
        "prefect.resource.role": "deployment",
        "prefect.resource.name": [
            flow.name for flow in (refresh_flow, pretrain_flow, evaluate_flow, audit_flow)
        ],
    }
)


def create_automations(client: SyncPrefectClient, tell: Callable[[str], None]) -> None:
    """Create the automations that need nothing from the user; those that are there stay.

    Args:
        client: Client of the server; geofm's deployments must exist.
        tell: Called with a line about each automation that is created.
    """
    for automation in (lost_runs(), time_limit(), pretrain_on_new(client)):
        if not client.read_automations_by_name(automation.name):
            client.create_automation(automation)
            switch = "" if automation.enabled else ", switched off"
            tell(f"automation  {automation.name}: created{switch}")


def lost_runs() -> AutomationCore:
    """Return the automation that ends runs whose process is gone, e.g. after a power cut.

    Without it such a run is shown as running for ever.
    """
    heartbeat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name=LOST_RUNS,
        description="A run whose process is gone, such as after a power cut, ends as Crashed.",
        tags=[TAG],
        trigger=EventTrigger(
            match=_RUN,
            # other projects on this server may send heartbeats more rarely
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": "geofm-*"}
            ),
            after={heartbeat},
            # a paused run has no process
            expect={heartbeat, *(f"prefect.flow-run.{name}" for name in (*_ENDED, "Paused"))},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=LOST_AFTER_S),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                message=f"no sign of life for {LOST_AFTER_S} s: its process was killed, or the "
                "machine stopped; start it again to go on",
                force=True,
            )
        ],
    )


def time_limit() -> AutomationCore:
    """Return the automation that cancels a run after a day; a user may switch it on.

    It cancels, as a click does, because a cancelled training writes a checkpoint and the child run
    in the GPU pool ends too. Prefect's own timeout of a flow does neither: it raises in the main
    thread, while stages work in others. It is off at first, because only the user knows how long an
    honest run takes.
    """
    return AutomationCore(
        name=TIME_LIMIT,
        description="A run that takes longer is cancelled, as by a click on Cancel; what is done "
        "is kept. The time is that of the trigger.",
        tags=[TAG],
        enabled=False,
        trigger=EventTrigger(
            match=_RUN,
            match_related=_OF_FORM,
            after={"prefect.flow-run.Running"},
            expect={f"prefect.flow-run.{name}" for name in _ENDED},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(hours=LIMIT_HOURS),
        ),
        actions=[
            ChangeFlowRunState(
                name="Cancelling",
                state=StateType.CANCELLING,
                message=f"it took longer than the automation {TIME_LIMIT!r} allows; what is done "
                "is kept, start it again to go on",
            )
        ],
    )


def pretrain_on_new(client: SyncPrefectClient) -> AutomationCore:
    """Return the automation that pretrains on each new version; a user may switch it on.

    Only refreshes trigger it: a run of geofm-pretrain that publishes a dataset trains on it itself.
    """
    deployment = client.read_deployment_by_name(f"{pretrain_flow.name}/{pretrain_flow.name}")
    ref = {"__prefect_kind": "jinja", "template": "{{ event.payload.ref }}"}
    return AutomationCore(
        name=PRETRAIN_ON_NEW,
        description="When geofm-refresh publishes a dataset version, geofm-pretrain trains on it. "
        "Add the recipe to the parameters of the action if it is not the form's default.",
        tags=[TAG],
        enabled=False,
        trigger=EventTrigger(
            expect={"geofm.dataset.published"},
            match=ResourceSpecification({"prefect.resource.id": "geofm.dataset.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": refresh_flow.name}
            ),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[RunDeployment(deployment_id=deployment.id, parameters={"dataset": ref})],
    )


def notify_failures(client: SyncPrefectClient, webhook: str, tell: Callable[[str], None]) -> None:
    """Send a message to a webhook when a run fails or crashes.

    The address may be a secret. It is kept in a block, which Prefect encrypts. A later call with
    another address changes the block only, so the automation stays as the user has edited it.

    Args:
        client: Client of the server.
        webhook: Address that takes JSON with a field ``text``.
        tell: Called with a line about what was done; it does not show the address.
    """
    try:
        block = client.read_block_document_by_name(WEBHOOK_BLOCK, "webhook", include_secrets=False)
        update = BlockDocumentUpdate(data={"url": webhook}, merge_existing_data=True)
        client.update_block_document(block.id, update)
    except ObjectNotFound:
        json_headers = SecretDict({"Content-Type": "application/json"})
        Webhook(url=SecretStr(webhook), headers=json_headers).save(WEBHOOK_BLOCK)
        block = client.read_block_document_by_name(WEBHOOK_BLOCK, "webhook", include_secrets=False)
        # an automation that is there calls a block that was deleted
        for automation in client.read_automations_by_name(FAILURE_NOTICE):
            client.delete_automation(automation.id)
    if client.read_automations_by_name(FAILURE_NOTICE):
        tell(f"automation  {FAILURE_NOTICE}: has the webhook of GEOFM_NOTIFY_URL")
        return
    notice = AutomationCore(
        name=FAILURE_NOTICE,
        description="A run that fails or crashes is reported to the webhook of the block "
        f"{WEBHOOK_BLOCK}.",
        tags=[TAG],
        trigger=EventTrigger(
            match=_RUN,
            match_related=_OF_FORM,
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=block.id, payload=_NOTICE)],
    )
    client.create_automation(notice)
    tell(f"automation  {FAILURE_NOTICE}: created")
