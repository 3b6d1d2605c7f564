//! `mainstay lab`: two sites on this machine, to try things on and to break things on purpose.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use mainstay_lab::{DiskImage, GuestImages, Lab, LabAction, LabOptions, LedgerCopy};

use crate::{
    exit::{Exit, UsageError},
    output,
};

#[derive(Args)]
pub(crate) struct LabDir {
    /// The lab's directory.
    #[arg(long)]
    dir: PathBuf,
}

#[derive(Args)]
pub(crate) struct ComponentArguments {
    /// `server`, `host:SITE` (its power), `agent:SITE`, `hypervisor:SITE` or `vm:NAME[@SITE]`; the sites are `home` and `recovery`.
    component: String,
    #[command(flatten)]
    lab: LabDir,
}

#[derive(Subcommand)]
pub(crate) enum LabCommand {
    /// Makes a lab and starts it: two sites, a server, two agents, guests.
    Up {
        #[command(flatten)]
        lab: LabDir,
        /// How many guests.
        #[arg(long, default_value_t = 1)]
        vms: usize,
        /// Size of each of a guest's two disks.
        #[arg(long, default_value = "64M", value_parser = parse_mebibytes)]
        disk_size: u64,
        /// Format of the disks.
        #[arg(long, value_enum, default_value = "qcow2")]
        disk_format: Format,
        /// More words for the guests' kernel command line, such as `ledger.rate=50`.
        #[arg(long, default_value = "")]
        guest_options: String,
    },
    /// Ends everything and removes the lab's directory.
    Down(LabDir),
    /// Says which parts live.
    Status {
        #[command(flatten)]
        lab: LabDir,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Ends a component as a crash would.
    Kill(ComponentArguments),
    /// Ends a component in an orderly way.
    Stop(ComponentArguments),
    /// Starts a component (again).
    Start(ComponentArguments),
    /// Freezes a component.
    Pause(ComponentArguments),
    /// Thaws a component.
    Resume(ComponentArguments),
    /// Cuts the network between a site and the server.
    Cut {
        /// The site.
        site: String,
        #[command(flatten)]
        lab: LabDir,
    },
    /// Makes the network between a site and the server slow, until it is healed.
    Slow {
        /// The site.
        site: String,
        /// Bytes per second, for each direction of each connection.
        #[arg(long)]
        bytes_per_second: u64,
        #[command(flatten)]
        lab: LabDir,
    },
    /// Brings the network between a site and the server back, at full speed.
    Heal {
        /// The site.
        site: String,
        #[command(flatten)]
        lab: LabDir,
    },
    /// Asks a guest's ledger what it holds, and compares it with what it acknowledged.
    Ledger {
        /// The guest.
        vm: String,
        #[command(flatten)]
        lab: LabDir,
        /// Which copy of it.
        #[arg(long, value_enum, default_value = "active")]
        copy: Copy,
        /// How long to wait for the copy to answer, in seconds.
        #[arg(long, default_value_t = 120)]
        timeout: u64,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Relays connections between a site and the server; started by the lab itself.
    #[command(hide = true)]
    Link {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        bytes_per_second: Option<u64>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    Qcow2,
    Raw,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Copy {
    /// The one in production.
    Active,
    /// The one of a test failover.
    Test,
}

/// Reads `64M`, `1G`, or bytes that are whole MiB.
pub(crate) fn parse_mebibytes(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is not a size; write 64M or 1G");
    let upper = text.to_uppercase();
    let upper = upper.trim_end_matches("IB").trim_end_matches('B');
    let (number, factor) = match (upper.strip_suffix('M'), upper.strip_suffix('G'), upper.strip_suffix('T')) {
        (Some(number), _, _) => (number, 1),
        (_, Some(number), _) => (number, 1024),
        (_, _, Some(number)) => (number, 1 << 20),
        _ => {
            let bytes: u64 = upper.parse().map_err(|_| bad())?;
            return if bytes.is_multiple_of(1 << 20) { check(bytes >> 20) } else { Err(bad()) };
        }
    };
    check(number.parse::<u64>().map_err(|_| bad())?.checked_mul(factor).ok_or_else(bad)?)
}

/// Smallest disk: ext4 with its journal and the ledger's ring fit in it.
const DISK_MIB_MIN: u64 = 32;

fn check(mebibytes: u64) -> Result<u64, String> {
    if mebibytes < DISK_MIB_MIN {
        return Err(format!("a ledger guest's disk needs at least {DISK_MIB_MIN}M"));
    }
    Ok(mebibytes)
}

pub(crate) async fn run(command: LabCommand) -> anyhow::Result<Exit> {
    match command {
        LabCommand::Up { lab, vms, disk_size, disk_format, guest_options } => {
            let options = LabOptions {
                has_relays: true,
                far_server: None,
                vms,
                disk_mib: disk_size,
                format: match disk_format {
                    Format::Qcow2 => DiskImage::Qcow2,
                    Format::Raw => DiskImage::Raw,
                },
                guest_options,
                program: std::env::current_exe()?,
                images: GuestImages::find()?,
            };
            let made = Lab::up(&lab.dir, &options).await?;
            output::note(&format!(
                "the lab is up; {} has its addresses; try: {} --lab {} vm list",
                made.dir().join("lab.json").display(),
                options.program.display(),
                made.dir().display()
            ));
        }
        LabCommand::Down(lab) => Lab::down(&lab.dir).await?,
        LabCommand::Status { lab, json } => {
            let status = Lab::open(&lab.dir).await?.status().await?;
            if json {
                output::json(&status)?;
            } else {
                let word = |is_alive: bool| if is_alive { "up" } else { "down" }.to_owned();
                let mut rows = vec![vec!["server".to_owned(), word(status.server)]];
                for site in status.sites {
                    rows.push(vec![format!("agent:{}", site.name), word(site.agent)]);
                    rows.push(vec![format!("hypervisor:{}", site.name), word(site.hypervisor)]);
                    rows.push(vec![format!("network of {}", site.name), word(site.link)]);
                    for (name, state) in site.vms {
                        rows.push(vec![format!("vm:{name}@{}", site.name), state]);
                    }
                }
                output::table(&["COMPONENT", "STATE"], rows);
            }
        }
        LabCommand::Kill(it) => act(LabAction::Kill, it).await?,
        LabCommand::Stop(it) => act(LabAction::Stop, it).await?,
        LabCommand::Start(it) => act(LabAction::Start, it).await?,
        LabCommand::Pause(it) => act(LabAction::Pause, it).await?,
        LabCommand::Resume(it) => act(LabAction::Resume, it).await?,
        LabCommand::Cut { site, lab } => Lab::open(&lab.dir).await?.cut(&site).await?,
        LabCommand::Slow { site, bytes_per_second, lab } => {
            Lab::open(&lab.dir).await?.slow(&site, bytes_per_second).await?;
        }
        LabCommand::Heal { site, lab } => Lab::open(&lab.dir).await?.heal(&site).await?,
        LabCommand::Ledger { vm, lab, copy, timeout, json } => {
            let copy = match copy {
                Copy::Active => LedgerCopy::Active,
                Copy::Test => LedgerCopy::Test,
            };
            let found = Lab::open(&lab.dir).await?.ledger(&vm, copy, Duration::from_secs(timeout)).await?;
            if json {
                output::json(&found)?;
            } else {
                output::line(&format!(
                    "{} at {}: last {}, acknowledged {}, corrupt {}, gaps {}, disks agree: {}",
                    vm,
                    found.site,
                    found.last,
                    found.acknowledged,
                    found.corrupt,
                    found.gaps,
                    found.disks_agree
                ));
            }
        }
        LabCommand::Link { listen, to, bytes_per_second } => {
            mainstay_lab::relay(listen, to, bytes_per_second).await?;
        }
    }
    Ok(Exit::Done)
}

async fn act(action: LabAction, arguments: ComponentArguments) -> anyhow::Result<()> {
    let mut lab = Lab::open(&arguments.lab.dir).await?;
    lab.act(action, &arguments.component).await.map_err(|error| {
        if error.to_string().contains("is not a component") {
            UsageError(error.to_string()).into()
        } else {
            error
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_mebibytes("64M"), Ok(64));
        assert_eq!(parse_mebibytes("1GiB"), Ok(1024));
        assert_eq!(parse_mebibytes("67108864"), Ok(64));
        assert!(parse_mebibytes("1M").is_err());
        assert!(parse_mebibytes("many").is_err());
    }
}
