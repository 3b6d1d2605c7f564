//! `mainstay agent`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use mainstay_agent::{
    AgentConfig, HostOptions, HostSite, Identity, RegistrationKey, ServerLink, records::Records,
};
use mainstay_kvm::{
    INSTANT_RECOVERY_UNAVAILABLE, KvmHost, KvmOptions,
    libvirt::{mend_statuses, status_directory},
};
use mainstay_provider::{
    Acceleration, Finding, FindingSeverity, HostFacts, Hypervisor, Network, NetworkKind, Site,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    agent_metrics, configuration,
    exit::{Exit, UsageError},
    notify, output,
    server::{LogArguments, terminated},
};

/// The agent's settings: a file, the environment over it (each key as MAINSTAY_AGENT_KEY), and flags over both.
#[derive(Args)]
pub(crate) struct AgentArguments {
    /// Configuration file (TOML; unknown keys are refused).
    #[arg(long, env = "MAINSTAY_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where everything is kept [env: MAINSTAY_AGENT_DATA_DIR].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// libvirt's URI [env: MAINSTAY_AGENT_LIBVIRT_URI].
    #[arg(long, value_name = "URI")]
    libvirt_uri: Option<String>,
}

impl AgentArguments {
    fn config(&self) -> anyhow::Result<AgentConfig> {
        let mut config: AgentConfig = configuration::read(&configuration::AGENT, self.config.as_deref())?;
        if let Some(data_dir) = &self.data_dir {
            config.data_dir.clone_from(data_dir);
        }
        if let Some(uri) = &self.libvirt_uri {
            config.libvirt_uri.clone_from(uri);
        }
        config.check().map_err(UsageError)?;
        Ok(config)
    }
}

fn hypervisor(config: &AgentConfig) -> anyhow::Result<KvmHost> {
    for path in [config.run_dir.clone(), config.vm_dir()] {
        mainstay_block::durable::create_directory(&path).with_context(|| {
            format!("create {}, where the agent must be able to write (vm_dir, run_dir)", path.display())
        })?;
    }
    let of_kind = |names: &[String], kind: NetworkKind| {
        names.iter().map(|name| Network { name: name.clone(), kind }).collect::<Vec<_>>()
    };
    let mut networks = of_kind(&config.networks, NetworkKind::Production);
    networks.extend(of_kind(&config.isolated_networks, NetworkKind::Isolated));
    let options = KvmOptions {
        uri: config.libvirt_uri.clone(),
        directory: config.vm_dir(),
        socket_directory: Some(config.run_dir.clone()),
        networks,
        hydration_bytes_per_second: Some(config.hydration_bytes_per_second).filter(|limit| *limit > 0),
    };
    KvmHost::open(options).map_err(|error| anyhow::anyhow!("{error} {}", error.remedy))
}

/// The agent; without a subcommand it runs.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct AgentInvocation {
    #[command(subcommand)]
    command: Option<AgentCommand>,
    #[command(flatten)]
    agent: AgentArguments,
    #[command(flatten)]
    logging: LogArguments,
}

#[derive(Subcommand)]
enum AgentCommand {
    /// Exchanges a registration key for a certificate.
    Register {
        #[command(flatten)]
        agent: AgentArguments,
        /// The key, as `mainstay host key` printed it; `-` reads it from standard input, so that it is in no list of processes.
        #[arg(long, env = "MAINSTAY_REGISTRATION_KEY", hide_env_values = true)]
        key: String,
        /// The name under which the host is shown; the host's own name by default.
        #[arg(long)]
        name: Option<String>,
    },
    /// Runs the agent until SIGTERM; the same as without a subcommand. VMs run on without it.
    Run {
        #[command(flatten)]
        agent: AgentArguments,
        #[command(flatten)]
        logging: LogArguments,
    },
    /// Takes back libvirt's notes of backups that were lost when its daemon died; for the daemon's unit, before each start.
    ///
    /// A daemon that dies in the moment in which a backup begins leaves a note that makes the next one wait for that backup for ever:
    /// no other can begin while the VM runs. Refused while the daemon runs. VMs are not touched.
    MendLibvirt {
        #[command(flatten)]
        agent: AgentArguments,
        /// Where the daemon keeps its notes; known for qemu:///system and qemu:///session.
        #[arg(long, value_name = "DIR")]
        directory: Option<PathBuf>,
    },
    /// Says what this host is and what it lacks. The exit code is 1 where that is in the way.
    Doctor {
        #[command(flatten)]
        agent: AgentArguments,
        /// The host's VMs are only replicated from here: what recovery VMs need is told, and is in nobody's way.
        #[arg(long)]
        protected_only: bool,
        /// Prints the facts as JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn run(invocation: AgentInvocation) -> anyhow::Result<Exit> {
    let AgentInvocation { command, agent, logging } = invocation;
    match command.unwrap_or(AgentCommand::Run { agent, logging }) {
        AgentCommand::Register { agent, key, name } => {
            let config = agent.config()?;
            let key = match key.as_str() {
                "-" => {
                    std::io::read_to_string(std::io::stdin()).context("read the key from standard input")?
                }
                _ => key,
            };
            let key = RegistrationKey::parse(&key).map_err(|error| UsageError(format!("{error:#}")))?;
            let name = match name {
                Some(name) => name,
                None => host_name()?,
            };
            let identity =
                mainstay_agent::register(&config.data_dir, &key, &name, env!("CARGO_PKG_VERSION")).await?;
            output::note(&format!(
                "host '{name}' is registered in fabric '{}' as {}; start it with `mainstay agent run`",
                identity.fabric, identity.provider
            ));
            Ok(Exit::Done)
        }
        AgentCommand::Run { agent, logging } => {
            logging.start()?;
            run_agent(&agent.config()?).await
        }
        AgentCommand::MendLibvirt { agent, directory } => {
            let uri = agent.config()?.libvirt_uri;
            let Some(directory) = directory.or_else(|| status_directory(&uri)) else {
                return Err(
                    UsageError(format!("{uri} does not tell where the notes are: say --directory")).into()
                );
            };
            for vm in mend_statuses(&directory)? {
                output::note(&format!("the lost backup of VM '{vm}' is taken back"));
            }
            Ok(Exit::Done)
        }
        AgentCommand::Doctor { agent, protected_only, json } => {
            doctor(&agent.config()?, protected_only, json).await
        }
    }
}

async fn run_agent(config: &AgentConfig) -> anyhow::Result<Exit> {
    // Guests come first; without it the agent does its work all the same.
    if let Err(error) = mainstay_agent::stand_back(config.nice) {
        tracing::warn!(%error, nice = config.nice, "the agent's priority cannot be lowered");
    }
    let identity = Identity::load(&config.data_dir)?;
    let address = if config.server.is_empty() { &identity.endpoint } else { &config.server };
    let link = ServerLink::new(&identity, address)?;
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(hypervisor(config)?);
    let records = Records::open(&config.data_dir)
        .with_context(|| format!("data directory {}", config.data_dir.display()))?;
    let boot = std::fs::read_to_string(&config.boot_id_file)
        .with_context(|| format!("read {}", config.boot_id_file.display()))?;
    let options = HostOptions {
        boot: boot.trim().to_owned(),
        run_dir: config.run_dir.clone(),
        capture_time_max: Duration::from_secs(config.capture_seconds_max),
    };
    let site = HostSite::new(hypervisor, Arc::new(link.clone()), records, options);
    site.recover().await.map_err(|error| anyhow::anyhow!("{error} {}", error.remedy))?;
    let stop = CancellationToken::new();
    let serving: Arc<dyn Site> = Arc::new(site.clone());
    let told = tokio::spawn(tell_connection(link.connection(), address.clone()));
    let answering = match config.metrics_listen {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            let listener = listener.with_context(|| format!("listen on {address} (metrics_listen)"))?;
            Some(tokio::spawn(agent_metrics::serve(listener, link.connection())))
        }
        None => None,
    };
    // Without a server, too: it gives recovery VMs their disks. Before there is anything else to tell.
    notify::ready("dialling the server");
    let connection = tokio::spawn(mainstay_agent::run(link, serving, stop.clone()));
    tracing::info!(provider = identity.provider, fabric = identity.fabric, "the agent runs");
    terminated().await?;
    told.abort();
    if let Some(answering) = answering {
        answering.abort();
    }
    notify::stopping();
    stop.cancel();
    connection.await?;
    site.stop().await;
    tracing::info!("the agent has stopped");
    Ok(Exit::Done)
}

/// Tells the service manager whether the server is there, until the link is gone.
async fn tell_connection(mut connected: watch::Receiver<bool>, address: String) {
    while connected.changed().await.is_ok() {
        let is_connected = *connected.borrow_and_update();
        notify::status(&if is_connected {
            format!("connected to {address}")
        } else {
            format!("{address} cannot be reached; trying on")
        });
    }
}

fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("read the host's name")?;
    Ok(name.trim().to_owned())
}

async fn doctor(config: &AgentConfig, protected_only: bool, json: bool) -> anyhow::Result<Exit> {
    let mut host = match host_facts(config).await {
        Ok(host) => host,
        Err(error) => {
            // What can be said without libvirt is said all the same: it is likely to be the reason, or the next thing.
            mainstay_kvm::missing_programs().iter().for_each(|finding| output::note(&line_of(finding)));
            return Err(error);
        }
    };
    if let Some(identity) = Identity::find(&config.data_dir)? {
        host.findings.extend(identity.lapse()?);
    }
    if protected_only {
        host.findings.iter_mut().for_each(excuse);
    }
    if json {
        output::json(&host)?;
    } else {
        let acceleration = match host.acceleration {
            Acceleration::Hardware => "hardware",
            Acceleration::Software => "software (slow, but everything works)",
        };
        output::line(&format!("host:          {}", host.name));
        output::line(&format!("hypervisor:    {}", host.hypervisor));
        output::line(&format!("managed by:    {}", host.manager));
        output::line(&format!("acceleration:  {acceleration}"));
        output::line(&format!("free space:    {}", output::bytes(host.free_bytes)));
        for capability in &host.capabilities {
            let word = if capability.is_available { "yes" } else { "no " };
            output::line(&format!("{word}  {}  {}", capability.name, capability.reason));
        }
        host.findings.iter().for_each(|finding| output::line(&line_of(finding)));
    }
    let is_fit = host.findings.iter().all(|finding| finding.severity != FindingSeverity::Error);
    Ok(if is_fit { Exit::Done } else { Exit::Failed })
}

/// A host that is only protected needs nothing that recovery VMs need.
fn excuse(finding: &mut Finding) {
    if finding.code == INSTANT_RECOVERY_UNAVAILABLE {
        finding.severity = FindingSeverity::Warning;
    }
}

async fn host_facts(config: &AgentConfig) -> anyhow::Result<HostFacts> {
    let facts = hypervisor(config)?.host().await;
    facts.map_err(|error| anyhow::anyhow!("{error} {}", error.remedy))
}

fn line_of(finding: &Finding) -> String {
    format!("{:?}: {}. {}", finding.severity, finding.message.trim_end_matches('.'), finding.remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_only_protected_need_not_be_able_to_run_recovery_vms() {
        let finding = |code: &str| Finding {
            code: code.to_owned(),
            severity: FindingSeverity::Error,
            message: String::new(),
            remedy: String::new(),
        };
        let mut findings = [finding(INSTANT_RECOVERY_UNAVAILABLE), finding("DirectoryNotWritable")];
        findings.iter_mut().for_each(excuse);
        assert_eq!(findings.map(|found| found.severity), [FindingSeverity::Warning, FindingSeverity::Error]);
    }
}
