"""A recovery plan of two machines, driven by Microsoft's Python SDK for Site Recovery.

Usage: plan.py LAB_JSON VM,VM RECORDING API_VERSION

Writes every request and its answer to RECORDING as journey.py does, and prints one JSON line per step, after which it reads a
line from standard input. Exits with 0 when every step ended as it should.
"""

import json
import sys

from azure.mgmt.recoveryservicessiterecovery import SiteRecoveryManagementClient, models

from connection import options_of, told, wait


def main():
    lab = json.load(open(sys.argv[1], encoding="utf-8"))
    where = (lab["resource_group"], lab["vault"])
    client = SiteRecoveryManagementClient(**options_of(lab, sys.argv[3], sys.argv[4]))
    home = client.replication_fabrics.get(*where, lab["sites"][0]["fabric"])

    def protected():
        found = list(client.replication_protected_items.list(*where))
        return found if all(item.properties.protection_state == "Protected" for item in found) else None

    items = {item.properties.friendly_name: item for item in wait("protection", protected)}
    first, second = (items[name] for name in sys.argv[2].split(","))
    plans, jobs = client.replication_recovery_plans, client.replication_jobs

    def group(item, actions=()):
        return models.RecoveryPlanGroup(
            group_type="Boot",
            replication_protected_items=[
                models.RecoveryPlanProtectedItem(
                    id=item.id, virtual_machine_id=item.properties.provider_specific_details.vm_id
                )
            ],
            start_group_actions=list(actions),
            end_group_actions=[],
        )

    ask = models.RecoveryPlanAction(
        action_name="check the database",
        failover_types=["PlannedFailover"],
        failover_directions=["PrimaryToRecovery"],
        custom_details=models.RecoveryPlanManualActionDetails(description="Is it there?"),
    )
    plan = plans.begin_create(
        *where,
        "shop",
        models.CreateRecoveryPlanInput(
            properties=models.CreateRecoveryPlanInputProperties(
                primary_fabric_id=home.id,
                recovery_fabric_id="Microsoft Azure",
                failover_deployment_model="ResourceManager",
                groups=[group(first)],
            )
        ),
    ).result()
    kinds = [one.group_type for one in plan.properties.groups]
    assert kinds == ["Shutdown", "Failover", "Boot"], kinds
    plan = plans.begin_update(
        *where,
        "shop",
        models.UpdateRecoveryPlanInput(
            properties=models.UpdateRecoveryPlanInputProperties(groups=[group(first), group(second, [ask])])
        ),
    ).result()
    assert len(plan.properties.groups) == 4, plan
    assert {"TestFailover", "PlannedFailover", "UnplannedFailover"} <= set(plan.properties.allowed_operations), plan
    assert [one.name for one in plans.list(*where)] == ["shop"]
    told("created")

    plans.begin_test_failover(
        *where,
        "shop",
        models.RecoveryPlanTestFailoverInput(
            properties=models.RecoveryPlanTestFailoverInputProperties(
                failover_direction="PrimaryToRecovery",
                network_type="NoNetworkAttachAsInput",
                provider_specific_details=[
                    models.RecoveryPlanHyperVReplicaAzureFailoverInput(recovery_point_type="LatestProcessed")
                ],
            )
        ),
    ).result()
    assert plans.get(*where, "shop").properties.allowed_operations == ["TestFailoverCleanup"]
    told("test-failover")
    plans.begin_test_failover_cleanup(
        *where,
        "shop",
        models.RecoveryPlanTestFailoverCleanupInput(
            properties=models.RecoveryPlanTestFailoverCleanupInputProperties(comments="works")
        ),
    ).result()
    told("test-failover-cleanup")

    moving = plans.begin_planned_failover(
        *where,
        "shop",
        models.RecoveryPlanPlannedFailoverInput(
            properties=models.RecoveryPlanPlannedFailoverInputProperties(
                failover_direction="PrimaryToRecovery",
                provider_specific_details=[
                    models.RecoveryPlanHyperVReplicaAzureFailoverInput(recovery_point_type="Latest")
                ],
            )
        ),
        polling=False,
    )
    del moving

    def waiting():
        found = jobs.list(*where, filter="JobStatus eq 'Suspended' and ObjectName eq 'shop'")
        return next(iter(found), None)

    job = jobs.get(*where, wait("the manual action", waiting).name)
    assert job.properties.target_instance_type == "RecoveryPlan", job
    tasks = {task.name: task for task in job.properties.tasks}
    machines = tasks["Group1"].group_task_custom_details.child_tasks
    assert [machine.friendly_name for machine in machines] == [first.properties.friendly_name], machines
    action = tasks["Group2StartAction1"]
    assert action.custom_details.instructions == "Is it there?", action
    told("manual-action")
    jobs.begin_resume(
        *where, job.name, models.ResumeJobParams(properties=models.ResumeJobParamsProperties(comments="yes"))
    ).result()
    wait("the planned failover", lambda: jobs.get(*where, job.name).properties.state == "Succeeded")
    told("planned-failover")
    plans.begin_failover_commit(*where, "shop").result()

    plans.begin_planned_failover(
        *where,
        "shop",
        models.RecoveryPlanPlannedFailoverInput(
            properties=models.RecoveryPlanPlannedFailoverInputProperties(
                failover_direction="RecoveryToPrimary",
                provider_specific_details=[
                    models.RecoveryPlanHyperVReplicaAzureFailbackInput(
                        data_sync_option="ForDownTime", recovery_vm_creation_option="NoAction"
                    )
                ],
            )
        ),
        polling=False,
    )
    job = wait("the failback to wait for its completion", waiting)
    jobs.begin_resume(
        *where, job.name, models.ResumeJobParams(properties=models.ResumeJobParamsProperties(comments="go"))
    ).result()
    wait("the failback", lambda: jobs.get(*where, job.name).properties.state == "Succeeded")
    told("failback")
    plans.begin_failover_commit(*where, "shop").result()
    plans.begin_reprotect(*where, "shop").result()
    told("reverse-replication")
    plans.begin_delete(*where, "shop").result()
    assert not list(plans.list(*where))
    told("removed")


if __name__ == "__main__":
    main()
