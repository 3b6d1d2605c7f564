//! `mainstay demo`.
use clap::Args;

use crate::exit::Exit;

#[derive(Args)]
pub(crate) struct DemoArguments {}

pub(crate) async fn run(_: DemoArguments) -> anyhow::Result<Exit> {
    Ok(Exit::Failed)
}
