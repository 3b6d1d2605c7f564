//! The only place that prints: data to standard output, everything else to standard error.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the module that prints")]

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Prints data.
pub(crate) fn line(text: &str) {
    println!("{text}");
}

/// Prints a resource as it came.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints a piece of a download.
pub(crate) fn piece(bytes: &[u8]) -> std::io::Result<()> {
    std::io::Write::write_all(&mut std::io::stdout().lock(), bytes)
}

/// Prints rows under headings.
pub(crate) fn table(headings: &[&str], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(headings.to_vec());
    for row in rows {
        table.add_row(row);
    }
    println!("{table}");
}

/// Tells what goes on.
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

/// Tells what went wrong.
pub(crate) fn error(text: &str) {
    eprintln!("mainstay: {text}");
}

/// Tells what to do next.
pub(crate) fn hint(text: &str) {
    eprintln!("  → {text}");
}

/// Progress of something long, on standard error.
pub(crate) fn spinner() -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}")?);
    Ok(bar)
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
