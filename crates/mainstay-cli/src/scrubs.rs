//! Scrubs: whether the store still has what was written to it.

use std::time::Duration;

use clap::Subcommand;
use mainstay_api::{
    arm::List,
    encode_segment,
    v1::{ItemScrub, ScrubState},
};
use serde_json::json;

use crate::{exit::Exit, output, session::Session};

/// How often a scrub that is waited for is asked about.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

#[derive(Subcommand)]
pub(crate) enum ScrubCommand {
    /// Lists what was found when each item's replica was last read through.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows what is damaged of an item's replica.
    Show {
        /// The item: its name, or its VM's.
        vm: String,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Reads the replica of an item, or of every item, through before its turn, and puts right what can be. Replication, drills
    /// and failovers go on meanwhile.
    Start {
        /// The item: its name, or its VM's.
        #[arg(required_unless_present = "all")]
        vm: Option<String>,
        /// Every item.
        #[arg(long, conflicts_with = "vm")]
        all: bool,
        /// Return at once.
        #[arg(long)]
        no_wait: bool,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn run(session: &Session, command: ScrubCommand) -> anyhow::Result<Exit> {
    match command {
        ScrubCommand::List { json } => {
            let scrubs: List<ItemScrub> = session.client.get(&session.v1("/scrubs")).await?;
            show_all(&scrubs.value, json)?;
            Ok(Exit::Done)
        }
        ScrubCommand::Show { vm, json } => {
            let name = session.item(&vm).await?.into_known().name;
            show(&of_item(session, &name).await?, json)?;
            Ok(Exit::Done)
        }
        ScrubCommand::Start { vm, all: _, no_wait, json } => {
            let names = match vm {
                Some(vm) => vec![session.item(&vm).await?.into_known().name],
                None => {
                    let scrubs: List<ItemScrub> = session.client.get(&session.v1("/scrubs")).await?;
                    scrubs.value.into_iter().map(|scrub| scrub.item).collect()
                }
            };
            let mut scrubs = Vec::new();
            for name in &names {
                let scrub: ItemScrub = session.client.post(&path(session, name), &json!({})).await?;
                scrubs.push(scrub);
            }
            if !no_wait {
                for scrub in &mut scrubs {
                    *scrub = wait(session, scrub).await?;
                }
            }
            match scrubs.as_slice() {
                [one] => show(one, json)?,
                all => show_all(all, json)?,
            }
            let is_whole = scrubs.iter().all(|scrub| scrub.damage.is_empty());
            Ok(if no_wait || is_whole { Exit::Done } else { Exit::Failed })
        }
    }
}

/// What was found of an item.
pub(crate) async fn of_item(session: &Session, item: &str) -> anyhow::Result<ItemScrub> {
    Ok(session.client.get(&path(session, item)).await?)
}

fn path(session: &Session, item: &str) -> String {
    session.v1(&format!("/items/{}/scrub", encode_segment(item)))
}

/// Waits until the scrub is over, and what it had sent again is looked at.
async fn wait(session: &Session, begun: &ItemScrub) -> anyhow::Result<ItemScrub> {
    let progress = output::spinner()?;
    loop {
        let scrub = of_item(session, &begun.item).await?;
        if scrub.state == ScrubState::Idle {
            progress.finish_and_clear();
            return Ok(scrub);
        }
        if let Some(bytes) = scrub.bytes_read {
            progress.set_message(format!("reading the replica of '{}': {}", begun.vm, output::bytes(bytes)));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn show(scrub: &ItemScrub, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(scrub);
    }
    show_all(std::slice::from_ref(scrub), false)?;
    if !scrub.damage.is_empty() {
        let rows = scrub
            .damage
            .iter()
            .map(|damage| vec![damage.what.clone(), damage.points.to_string(), damage.key.clone()]);
        output::table(&["DAMAGE", "RECOVERY POINTS", "OBJECT"], rows.collect());
    }
    for point in &scrub.damaged_points {
        output::line(&format!("damaged recovery point: {point}"));
    }
    if scrub.is_repair_pending {
        output::hint("the next replication cycle sends again what cannot be read");
    }
    Ok(())
}

fn show_all(scrubs: &[ItemScrub], json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(&scrubs);
    }
    let rows = scrubs.iter().map(|scrub| {
        vec![
            scrub.item.clone(),
            match scrub.bytes_read {
                Some(bytes) => format!("Running, {}", output::bytes(bytes)),
                None => format!("{:?}", scrub.state),
            },
            scrub.finished.clone().unwrap_or_else(|| "never".to_owned()),
            output::bytes(scrub.bytes),
            scrub.mended.to_string(),
            scrub.damage.len().to_string(),
            scrub.damaged_points.len().to_string(),
        ]
    });
    let headings =
        ["ITEM", "STATE", "LAST COMPLETE", "READ", "MENDED", "DAMAGED OBJECTS", "DAMAGED RECOVERY POINTS"];
    output::table(&headings, rows.collect());
    Ok(())
}
