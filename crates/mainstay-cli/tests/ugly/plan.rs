//! A recovery plan whose server and agents die while it is carried out.

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LabAction, RECOVERY};

use crate::support::{PATIENCE, World, eventually};

/// Of the eleven victims so many at least die while the plan needs them: those of its two failovers.
const KILLS_MIN: usize = 6;

/// Begins an operation of the plan and kills one after the other of what carries it, each when the job is under way again, as long as it
/// is; answers the job and its exit code, and adds to the kills.
async fn disturbed(
    world: &mut World,
    operation: &[&str],
    victims: &[&str],
    kills: &mut usize,
) -> Result<(String, i32)> {
    let command = [&["plan"], operation, &["--no-wait", "--json"]].concat();
    let job = world.cli(&command).expect(0).json()?;
    let job = job["name"].as_str().context("a job's name")?.to_owned();
    for victim in victims {
        let is_under_way = eventually("the plan is being carried out, or is done", async || {
            let told = world.cli(&["job", "show", &job, "--json"]).expect(0).json()?;
            let tasks = told["properties"]["tasks"].as_array().context("tasks")?.clone();
            let is_under_way = tasks.iter().any(|task| task["state"] == "InProgress");
            ensure!(is_under_way || told["properties"]["state"] != "InProgress", "its tasks are {tasks:?}");
            Ok(is_under_way)
        })
        .await?;
        if !is_under_way {
            break;
        }
        *kills += 1;
        world.lab.act(LabAction::Kill, victim).await?;
        world.lab.act(LabAction::Start, victim).await?;
    }
    // Its end is read anew: who follows a job hears of the server's death.
    let end = eventually("the plan's job does not go on by itself", async || {
        let told = world.cli(&["job", "show", &job, "--json"]).expect(0).json()?;
        let state = told["properties"]["state"].as_str().context("a state")?.to_owned();
        ensure!(!["InProgress", "NotStarted"].contains(&state.as_str()), "it is {state}");
        Ok(())
    });
    end.await?;
    for site in [HOME, RECOVERY] {
        world.lab.wait_connected(site).await?;
    }
    let code = world.cli(&["job", "watch", &job]).code;
    Ok((job, code))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_goes_on_whoever_dies() -> Result<()> {
    let mut world = World::up("plan").await?;
    for name in ["vm1", "vm2"] {
        let vm = world.guest(name, "ledger.rate=10")?;
        world.protect(&vm).await?;
    }
    world.cli(&["plan", "create", "shop", "--group", "vm1", "--group", "vm2"]).expect(0);
    let mut before = Vec::new();
    for vm in ["vm1", "vm2"] {
        before.push(world.whole(vm, HOME).await?);
    }
    let away = ["planned-failover", "shop", "--direction", "PrimaryToRecovery"];
    let victims = ["server", "agent:home", "server", "agent:recovery", "hypervisor:recovery"];
    let mut kills = 0;
    let (job, code) = disturbed(&mut world, &away, &victims, &mut kills).await?;
    ensure!(code == 0, "{}", world.cli(&["job", "show", &job]).out);
    for (vm, before) in ["vm1", "vm2"].into_iter().zip(&before) {
        let moved = world.whole(vm, RECOVERY).await?;
        ensure!(moved.last >= before.acknowledged, "{vm}: {before:?}, {moved:?}");
    }
    let (job, code) = disturbed(&mut world, &["commit", "shop"], &["server"], &mut kills).await?;
    ensure!(code == 0, "{}", world.cli(&["job", "show", &job]).out);

    // Home again; it asks when to stop each machine.
    let home = ["planned-failover", "shop", "--direction", "RecoveryToPrimary"];
    let (job, mut code) =
        disturbed(&mut world, &home, &["agent:recovery", "server", "agent:home"], &mut kills).await?;
    let deadline = std::time::Instant::now() + PATIENCE;
    while code == 6 && std::time::Instant::now() < deadline {
        code = world.cli(&["job", "resume", &job]).code;
    }
    ensure!(code == 0, "{}", world.cli(&["job", "show", &job]).out);
    for vm in ["vm1", "vm2"] {
        world.whole(vm, HOME).await?;
    }
    for operation in ["commit", "reverse-replicate"] {
        let (job, code) = disturbed(&mut world, &[operation, "shop"], &["server"], &mut kills).await?;
        ensure!(code == 0, "{}", world.cli(&["job", "show", &job]).out);
    }
    for vm in ["vm1", "vm2"] {
        world.wait_point(vm).await?;
    }
    ensure!(kills >= KILLS_MIN, "only {kills} kills hit the plan");
    world.proved()
}
