//! The `mainstay` binary. The operator's verbs are a client of the published API and nothing more; `server`, `agent`,
//! `lab` and `demo` start the other parts.

mod agent;
mod agent_metrics;
mod configuration;
mod demo;
mod exit;
mod items;
mod jobs;
mod lab;
mod notify;
mod output;
mod plans;
mod principals;
mod progress;
mod resources;
mod scrubs;
mod server;
mod session;
mod settings;
mod vaults;

use clap::{CommandFactory as _, Parser, Subcommand};
use exit::Exit;
use session::ConnectArguments;

/// Self-hosted site recovery for virtual machines: replicate, rehearse, fail over, fail back.
#[derive(Parser)]
#[command(
    name = "mainstay",
    version,
    max_term_width = 110,
    after_help = "\
Exit codes: 0 done, 1 job failed, 2 usage, 3 refused by the item's state, 4 not found, 5 access, 6 waiting for input."
)]
struct Arguments {
    #[command(flatten)]
    connect: ConnectArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the server, or prepares one.
    Server(server::ServerInvocation),
    /// Runs the agent of a host, registers it, or says what the host lacks.
    Agent(agent::AgentInvocation),
    /// Two sites, a server and guests on this machine, to try things on.
    #[command(subcommand)]
    Lab(lab::LabCommand),
    /// Carries the whole journey out on real VMs on this machine and proves every step.
    Demo(demo::DemoArguments),
    /// Vaults.
    #[command(subcommand)]
    Vault(vaults::VaultCommand),
    /// Sites.
    #[command(subcommand)]
    Fabric(resources::FabricCommand),
    /// Registered hosts and the keys that register them.
    #[command(subcommand)]
    Host(resources::HostCommand),
    /// Discovered VMs.
    #[command(subcommand)]
    Vm(resources::VmCommand),
    /// Replication policies.
    #[command(subcommand)]
    Policy(resources::PolicyCommand),
    /// Access tokens.
    #[command(subcommand)]
    Token(resources::TokenCommand),
    /// Service principals: programs that sign in with a client id and a secret, as Azure's own clients do.
    #[command(subcommand)]
    Principal(principals::PrincipalCommand),
    /// Replicated items.
    #[command(subcommand)]
    Item(items::ItemCommand),
    /// Starts to replicate a VM.
    Protect(items::ProtectArguments),
    /// Lists an item's recovery points.
    RecoveryPoints(items::ItemArguments),
    /// Boots a copy in an isolated network, or in the item's test network; source and replication are not touched.
    TestFailover(items::TestFailoverArguments),
    /// Removes the copy of a test failover.
    CleanupTestFailover(items::CleanupArguments),
    /// Runs the VM at the recovery site from a recovery point (disaster: something may be lost).
    Failover(items::FailoverArguments),
    /// Runs another recovery point instead, before the commit; what was written since the failover is discarded.
    ChangeRecoveryPoint(items::ChangePointArguments),
    /// Makes a failover or failback final.
    Commit(items::OperationArguments),
    /// Moves the VM without loss: to the recovery site, or back home.
    PlannedFailover(items::PlannedFailoverArguments),
    /// Completes a failback that waits after its synchronisation.
    CompleteFailover(items::OperationArguments),
    /// Replicates to the recovery site again after a failback, with the changes only.
    ReverseReplicate(items::OperationArguments),
    /// Compares everything by hashes and ships what differs.
    Resync(items::OperationArguments),
    /// Stops replicating; the active VM stays as it is.
    Disable(items::DisableArguments),
    /// Recovery plans: groups of machines, failed over in order by one command.
    #[command(subcommand)]
    Plan(plans::PlanCommand),
    /// Whether the store still has what was written to it: reads replicas through, and puts right what is damaged.
    #[command(subcommand)]
    Scrub(scrubs::ScrubCommand),
    /// Says how to reach a VM's console.
    Console(items::ItemArguments),
    /// Jobs.
    #[command(subcommand)]
    Job(jobs::JobCommand),
    /// Events.
    #[command(subcommand)]
    Event(resources::EventCommand),
    /// Who is told by mail of what goes wrong.
    #[command(subcommand)]
    Alert(settings::AlertCommand),
    /// Networks, and which of the recovery site's they are mapped to.
    #[command(subcommand)]
    Network(settings::NetworkCommand),
    /// Writes a completion script for a shell.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    if matches!(arguments.command, Command::Server(_) | Command::Agent(_)) {
        use_small_pages();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("cannot start: {error}"));
            return std::process::ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(code) => code.into(),
        Err(error) => exit::report(&error).into(),
    }
}

/// Daemons run for months, and hold many small things of different ages. Huge pages keep 2 MiB for each that is left over: a
/// server of three busy VMs had 1.5 GB after an hour with them, and a tenth of that without.
fn use_small_pages() {
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        output::note(&format!("huge pages stay on: {error}"));
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<Exit> {
    let connect = &arguments.connect;
    match arguments.command {
        Command::Server(command) => server::run(command).await,
        Command::Agent(command) => agent::run(command).await,
        Command::Lab(command) => lab::run(command).await,
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::Vault(vaults::VaultCommand::Rebuild { server, store, json }) => {
            vaults::rebuild(&server, store, json).await
        }
        Command::Vault(command) => vaults::run(&connect.open().await?, command).await,
        Command::Fabric(command) => resources::fabric(&connect.open().await?, command).await,
        Command::Host(command) => resources::host(&connect.open().await?, command).await,
        Command::Vm(command) => resources::vm(&connect.open().await?, command).await,
        Command::Policy(command) => resources::policy(&connect.open().await?, command).await,
        Command::Token(command) => resources::token(&connect.open().await?, command).await,
        Command::Principal(command) => principals::principal(&connect.open().await?, command).await,
        Command::Event(command) => resources::event(&connect.open().await?, command).await,
        Command::Scrub(command) => scrubs::run(&connect.open().await?, command).await,
        Command::Item(command) => items::item(&connect.open().await?, command).await,
        Command::Protect(arguments) => items::protect(&connect.open().await?, arguments).await,
        Command::RecoveryPoints(arguments) => items::recovery_points(&connect.open().await?, arguments).await,
        Command::TestFailover(arguments) => items::test_failover(&connect.open().await?, arguments).await,
        Command::CleanupTestFailover(arguments) => items::cleanup(&connect.open().await?, arguments).await,
        Command::Failover(arguments) => items::failover(&connect.open().await?, arguments).await,
        Command::ChangeRecoveryPoint(arguments) => {
            items::change_point(&connect.open().await?, arguments).await
        }
        Command::Commit(arguments) => {
            items::operation(&connect.open().await?, arguments, "failoverCommit").await
        }
        Command::PlannedFailover(arguments) => {
            items::planned_failover(&connect.open().await?, arguments).await
        }
        Command::CompleteFailover(arguments) => items::complete(&connect.open().await?, arguments).await,
        Command::ReverseReplicate(arguments) => items::reverse(&connect.open().await?, arguments).await,
        Command::Resync(arguments) => {
            items::operation(&connect.open().await?, arguments, "repairReplication").await
        }
        Command::Disable(arguments) => items::disable(&connect.open().await?, arguments).await,
        Command::Plan(command) => plans::run(&connect.open().await?, command).await,
        Command::Console(arguments) => items::console(&connect.open().await?, arguments).await,
        Command::Job(command) => jobs::run(&connect.open().await?, command).await,
        Command::Alert(command) => settings::alert(&connect.open().await?, command).await,
        Command::Network(command) => settings::network(&connect.open().await?, command).await,
        Command::Completion { shell } => {
            output::completion(shell, &mut Arguments::command());
            Ok(Exit::Done)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    /// Everything that can be said has a sentence about it.
    #[test]
    fn every_option_of_every_verb_is_explained() {
        fn examine(command: &clap::Command, above: &str, mute: &mut Vec<String>) {
            let name = format!("{above} {}", command.get_name());
            let is_mute = |argument: &&clap::Arg| !argument.is_hide_set() && argument.get_help().is_none();
            mute.extend(
                command
                    .get_arguments()
                    .filter(is_mute)
                    .map(|argument| format!("{name}: {}", argument.get_id())),
            );
            for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
                examine(below, &name, mute);
            }
        }
        let mut mute = Vec::new();
        examine(&Arguments::command(), "", &mut mute);
        assert!(mute.is_empty(), "{mute:#?}");
    }

    #[test]
    fn what_would_do_nothing_or_two_things_is_refused() {
        let code = |words: &[&str]| {
            let words = ["mainstay"].iter().chain(words);
            Arguments::try_parse_from(words).err().map(|error| error.exit_code())
        };
        let set = ["item", "set", "web01", "--nic", "52:54:00:12:34:56"];
        assert_eq!(code(&set), Some(2));
        assert_eq!(code(&[&set[..], &["--ip", "10.0.0.7/24", "--mac-policy", "keep"]].concat()), None);
        assert_eq!(code(&["test-failover", "web01", "--network", "island"]), None);
        assert_eq!(code(&["test-failover", "web01", "--network", "island", "--no-network"]), Some(2));
    }
}
