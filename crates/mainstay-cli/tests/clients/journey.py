"""The tutorial's journey, driven by Microsoft's Python SDK for Site Recovery.

Usage: journey.py LAB_JSON VM RECORDING [API_VERSION]

Writes every request and its answer to RECORDING, one JSON object per line. Prints one JSON line per step. Between the steps it reads a line from standard input: the test that runs it looks at the
guest there. Exits with 0 when every step ended as it should.
"""

import json
import sys

from azure.mgmt.recoveryservices import RecoveryServicesClient
from azure.mgmt.recoveryservicessiterecovery import SiteRecoveryManagementClient, models

from connection import options_of, told, wait


def main():
    lab = json.load(open(sys.argv[1], encoding="utf-8"))
    vm_name = sys.argv[2]
    group, vault = lab["resource_group"], lab["vault"]
    where = (group, vault)
    options = options_of(lab, sys.argv[3], *sys.argv[4:])
    vaults = RecoveryServicesClient(**options)
    client = SiteRecoveryManagementClient(**options)

    found = vaults.vaults.get(*where)
    assert found.name == vault and found.properties.provisioning_state == "Succeeded", found
    assert [one.name for one in vaults.vaults.list_by_resource_group(group)] == [vault]

    home = lab["sites"][0]["fabric"]
    fabrics = {fabric.name: fabric for fabric in client.replication_fabrics.list(*where)}
    assert home in fabrics and fabrics[home].properties.bcdr_state == "Valid", fabrics
    assert client.replication_fabrics.get(*where, home).id == fabrics[home].id
    providers = list(client.replication_recovery_services_providers.list_by_replication_fabrics(*where, home))
    assert [one.properties.connection_status for one in providers] == ["Connected"], providers
    client.replication_recovery_services_providers.begin_refresh_provider(*where, home, providers[0].name).result()
    container = next(iter(client.replication_protection_containers.list_by_replication_fabrics(*where, home)))
    place = (*where, home, container.name)

    policy = client.replication_policies.begin_create(
        *where,
        "sdk",
        models.CreatePolicyInput(
            properties=models.CreatePolicyInputProperties(
                provider_specific_input=models.HyperVReplicaAzurePolicyInput(
                    recovery_point_history_duration=2,
                    application_consistent_snapshot_frequency_in_hours=0,
                    replication_interval=30,
                )
            )
        ),
    ).result()
    assert policy.properties.provider_specific_details.replication_interval == 30, policy
    mapping = client.replication_protection_container_mappings.begin_create(
        *place,
        "sdk",
        models.CreateProtectionContainerMappingInput(
            properties=models.CreateProtectionContainerMappingInputProperties(
                policy_id=policy.id, target_protection_container_id="Microsoft Azure"
            )
        ),
    ).result()
    assert mapping.properties.state == "Paired", mapping
    protectable = next(
        one for one in client.replication_protectable_items.list_by_replication_protection_containers(*place)
        if one.properties.friendly_name == vm_name
    )
    assert protectable.properties.protection_status == "Unprotected", protectable
    disks = [disk.vhd_id for disk in protectable.properties.custom_details.disk_details]

    items = client.replication_protected_items
    here = (*place, "sdk-item")
    item = items.begin_create(
        *here,
        models.EnableProtectionInput(
            properties=models.EnableProtectionInputProperties(
                policy_id=policy.id,
                protectable_item_id=protectable.id,
                provider_specific_details=models.HyperVReplicaAzureEnableProtectionInput(
                    hv_host_vm_id=protectable.name,
                    vm_name=vm_name,
                    os_type="Linux",
                    vhd_id=disks[0],
                    disks_to_include=disks,
                ),
            )
        ),
    ).result()
    assert isinstance(item.properties.provider_specific_details, models.HyperVReplicaAzureReplicationDetails), item

    def state():
        return items.get(*here).properties

    wait("protection", lambda: state().protection_state == "Protected")
    points = wait("recovery points", lambda: list(client.recovery_points.list_by_replication_protected_items(*here)))
    assert client.recovery_points.get(*here, points[0].name).id == points[0].id
    allowed = state().allowed_operations
    assert {"PlannedFailover", "UnplannedFailover", "DisableProtection", "TestFailover"} <= set(allowed), allowed
    told("protected")

    items.begin_test_failover(
        *here,
        models.TestFailoverInput(
            properties=models.TestFailoverInputProperties(
                failover_direction="PrimaryToRecovery",
                network_type="NoNetworkAttachAsInput",
                provider_specific_details=models.HyperVReplicaAzureTestFailoverInput(),
            )
        ),
    ).result()
    assert state().allowed_operations == ["TestFailoverCleanup"], state()
    told("test-failover")
    items.begin_test_failover_cleanup(
        *here,
        models.TestFailoverCleanupInput(properties=models.TestFailoverCleanupInputProperties(comments="works")),
    ).result()
    assert state().failover_health == "Normal", state()
    told("test-failover-cleanup")

    chosen = next(iter(client.recovery_points.list_by_replication_protected_items(*here)))
    items.begin_unplanned_failover(
        *here,
        models.UnplannedFailoverInput(
            properties=models.UnplannedFailoverInputProperties(
                failover_direction="PrimaryToRecovery",
                source_site_operations="NotRequired",
                provider_specific_details=models.HyperVReplicaAzureUnplannedFailoverInput(
                    recovery_point_id=chosen.id
                ),
            )
        ),
    ).result()
    assert state().active_location == "Recovery", state()
    told("failover")

    items.begin_apply_recovery_point(
        *here,
        models.ApplyRecoveryPointInput(
            properties=models.ApplyRecoveryPointInputProperties(
                recovery_point_id=list(client.recovery_points.list_by_replication_protected_items(*here))[-1].id,
                provider_specific_details=models.HyperVReplicaAzureApplyRecoveryPointInput(),
            )
        ),
    ).result()
    told("change-recovery-point")

    items.begin_failover_commit(*here).result()
    assert not list(client.recovery_points.list_by_replication_protected_items(*here))
    told("failover-commit")

    failback = items.begin_planned_failover(
        *here,
        models.PlannedFailoverInput(
            properties=models.PlannedFailoverInputProperties(
                failover_direction="RecoveryToPrimary",
                provider_specific_details=models.HyperVReplicaAzureFailbackProviderInput(
                    data_sync_option="ForDownTime", recovery_vm_creation_option="NoAction"
                ),
            )
        ),
        polling=False,
    )
    del failback
    jobs = client.replication_jobs

    def suspended():
        running = jobs.list(*where, filter="JobStatus eq 'Suspended' and JobName eq 'Failback'")
        return next(iter(running), None)

    job = wait("the failback to wait for its completion", suspended)
    assert "Resume" in job.properties.allowed_actions, job
    told("failback-synchronize")
    jobs.begin_resume(
        *where,
        job.name,
        models.ResumeJobParams(properties=models.ResumeJobParamsProperties(comments="go")),
    ).result()
    wait("the failback", lambda: jobs.get(*where, job.name).properties.state == "Succeeded")
    assert state().active_location == "Primary", state()
    told("failback-complete")
    items.begin_failover_commit(*here).result()
    told("failback-commit")

    items.begin_reprotect(
        *here,
        models.ReverseReplicationInput(
            properties=models.ReverseReplicationInputProperties(
                failover_direction="PrimaryToRecovery",
                provider_specific_details=models.HyperVReplicaAzureReprotectInput(),
            )
        ),
    ).result()
    wait("protection", lambda: state().protection_state == "Protected")
    told("reverse-replication")

    items.begin_planned_failover(
        *here,
        models.PlannedFailoverInput(
            properties=models.PlannedFailoverInputProperties(
                failover_direction="PrimaryToRecovery",
                provider_specific_details=models.HyperVReplicaAzurePlannedFailoverProviderInput(),
            )
        ),
    ).result()
    assert state().active_location == "Recovery", state()
    told("planned-failover")

    items.begin_delete(
        *here,
        models.DisableProtectionInput(
            properties=models.DisableProtectionInputProperties(
                disable_protection_reason="NotSpecified"
            )
        ),
    ).result()
    assert not list(items.list(*where))
    client.replication_protection_container_mappings.begin_delete(
        *place, "sdk", models.RemoveProtectionContainerMappingInput()
    ).result()
    client.replication_policies.begin_delete(*where, "sdk").result()
    names = [one.properties.scenario_name for one in jobs.list(*where)]
    assert names[0] == "RemoveProtectionProfile" and "AddProtectionProfile" in names, names
    assert list(client.replication_events.list(*where))
    told("disabled")


if __name__ == "__main__":
    main()
