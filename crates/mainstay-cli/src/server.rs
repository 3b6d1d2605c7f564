//! `mainstay server`.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use mainstay_server::ServerConfig;

use crate::{configuration, exit::Exit, notify, output};

/// The server's settings: a file, the environment over it (each key as MAINSTAY_SERVER_KEY), and flags over both.
#[derive(Args)]
pub(crate) struct ServerArguments {
    /// Configuration file (TOML; unknown keys are refused).
    #[arg(long, env = "MAINSTAY_SERVER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where everything is kept [env: MAINSTAY_SERVER_DATA_DIR].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the API listens [env: MAINSTAY_SERVER_LISTEN].
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Where agents are let in [env: MAINSTAY_SERVER_AGENT_LISTEN].
    #[arg(long, value_name = "ADDRESS:PORT")]
    agent_listen: Option<SocketAddr>,
}

impl ServerArguments {
    pub(crate) fn config(&self) -> anyhow::Result<ServerConfig> {
        let mut config: ServerConfig = configuration::read(&configuration::SERVER, self.config.as_deref())?;
        if let Some(data_dir) = &self.data_dir {
            config.data_dir.clone_from(data_dir);
        }
        config.listen = self.listen.unwrap_or(config.listen);
        config.agent_listen = self.agent_listen.unwrap_or(config.agent_listen);
        Ok(config)
    }
}

/// The server; without a subcommand it runs.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ServerInvocation {
    #[command(subcommand)]
    command: Option<ServerCommand>,
    #[command(flatten)]
    server: ServerArguments,
    #[command(flatten)]
    logging: LogArguments,
}

#[derive(Subcommand)]
enum ServerCommand {
    /// Makes the vault, the certificate authority and the first token.
    Init {
        #[command(flatten)]
        server: ServerArguments,
        /// Name of the vault.
        #[arg(long, default_value = "mainstay")]
        vault: String,
        /// Name of its resource group.
        #[arg(long, default_value = "mainstay")]
        resource_group: String,
        /// Prints what was made as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Makes a vault key in a new file. Named as vault_key_file in the server's configuration, it encrypts the replica store.
    Key {
        /// The file to make.
        file: PathBuf,
    },
    /// Copies the server's own state (databases, keys, certificates; no recovery points) into a new directory, also while it
    /// runs.
    Backup {
        #[command(flatten)]
        server: ServerArguments,
        /// The directory to make.
        directory: PathBuf,
    },
    /// Puts a backup in the place of a lost state. What has happened since is taken from the replica store at the start.
    Restore {
        #[command(flatten)]
        server: ServerArguments,
        /// The backup's directory.
        directory: PathBuf,
    },
    /// Prints the OpenAPI document of `/api/v1`, which a server also answers at `/api/v1/openapi.json`.
    Openapi,
    /// Runs the server until SIGTERM; the same as without a subcommand.
    Run {
        #[command(flatten)]
        server: ServerArguments,
        #[command(flatten)]
        logging: LogArguments,
    },
}

/// How to log.
#[derive(Args)]
pub(crate) struct LogArguments {
    /// What to log: a level, or `module=level,…`.
    #[arg(long, env = "MAINSTAY_LOG", default_value = "info")]
    log: String,
    /// The form of log lines, on standard error.
    #[arg(long, env = "MAINSTAY_LOG_FORMAT", default_value = "text", value_parser = ["text", "json"])]
    log_format: String,
}

impl LogArguments {
    /// Begins to log.
    pub(crate) fn start(&self) -> anyhow::Result<()> {
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log)
            .with_context(|| format!("--log {}", self.log))?;
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        match self.log_format.as_str() {
            "json" => builder.json().init(),
            _ => builder.with_ansi(false).init(),
        }
        Ok(())
    }
}

/// Returns on SIGTERM or SIGINT.
pub(crate) async fn terminated() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

pub(crate) async fn run(invocation: ServerInvocation) -> anyhow::Result<Exit> {
    let ServerInvocation { command, server, logging } = invocation;
    match command.unwrap_or(ServerCommand::Run { server, logging }) {
        ServerCommand::Init { server, vault, resource_group, json } => {
            let config = server.config()?;
            let made = mainstay_server::initialize(&config, &resource_group, &vault).await?;
            let ca_file = config.data_dir.join("pki/ca.pem");
            let token = made.token.map(|token| token.0);
            if json {
                output::json(&serde_json::json!({
                    "subscription": made.vault.subscription,
                    "resource_group": made.vault.resource_group,
                    "vault": made.vault.name,
                    "ca_file": ca_file,
                    "token": token,
                }))?;
                return Ok(Exit::Done);
            }
            output::line(&format!("vault:  {}", made.vault.id()));
            output::line(&format!("CA:     {}", ca_file.display()));
            match token {
                Some(token) => output::line(&format!("token:  {token}")),
                None => output::note("the server was initialised before; its tokens are as they were"),
            }
            output::note("The token is shown only now. Start the server with `mainstay server run`.");
            Ok(Exit::Done)
        }
        ServerCommand::Key { file } => {
            let fingerprint = mainstay_server::create_vault_key(&file)?;
            output::line(&fingerprint);
            output::note(&format!(
                "the vault key is in {}. Name it as vault_key_file in the server's configuration, and keep a copy apart from the \
                 store: without it no recovery point can be read any more, by nobody",
                file.display()
            ));
            Ok(Exit::Done)
        }
        ServerCommand::Backup { server, directory } => {
            mainstay_server::back_up(&server.config()?, &directory).await?;
            output::note(&format!("the server's state is in {}; keep it secret", directory.display()));
            Ok(Exit::Done)
        }
        ServerCommand::Restore { server, directory } => {
            let config = server.config()?;
            mainstay_server::restore(&config, &directory).await?;
            output::note(&format!(
                "the server's state is back in {}; start it with `mainstay server run`",
                config.data_dir.display()
            ));
            Ok(Exit::Done)
        }
        ServerCommand::Openapi => {
            output::line(mainstay_server::openapi_document().trim_end());
            Ok(Exit::Done)
        }
        ServerCommand::Run { server, logging } => {
            logging.start()?;
            let running = mainstay_server::run(&server.config()?).await?;
            notify::ready(&format!("API on {}, agents on {}", running.api_address, running.agent_address));
            let is_superseded = tokio::select! {
                ended = terminated() => ended.map(|()| false)?,
                () = running.superseded() => true,
            };
            notify::stopping();
            running.stop().await;
            if is_superseded {
                output::error(
                    "another server has taken over the replica store; only one may look after it: \
                     see which one it is before you start this one again",
                );
                // Not a failure: a service manager that started it again would take the store back.
                return Ok(Exit::Refused);
            }
            Ok(Exit::Done)
        }
    }
}
